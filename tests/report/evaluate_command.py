"""Run ``evaluate.py`` as the command line would, for the tests of what it writes."""

from __future__ import annotations

import sys

import pytest

import evaluate
from wn_rl import cli


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(evaluate.main)
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err
