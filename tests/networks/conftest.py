"""A user's file of networks in the directory where they are, forgotten again afterwards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.networks.own import SOURCE
from wn_rl.networks.registry import NETWORKS


def forget() -> None:
    """Be a new process, which has not imported the user's module."""
    for name in [name for name, kind in NETWORKS.entries.items() if kind.__module__ == "my_networks"]:
        del NETWORKS.entries[name]
    sys.modules.pop("my_networks", None)


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_networks.py").write_text(SOURCE)
    (tmp_path / "broken_networks.py").write_text("raise RuntimeError('on purpose')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget()
    sys.modules.pop("broken_networks", None)


@pytest.fixture
def own(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The imported module."""
    monkeypatch.syspath_prepend(str(own_file))
    return importlib.import_module("my_networks")
