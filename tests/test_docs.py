"""The examples of the documentation run as they stand, and its tables name what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wn_rl.evaluation.protocols import PROTOCOLS
from wn_rl.parameterizations import get, names, registry
from wn_rl.parameterizations.base import make
from wn_rl.report.score_tables import CSV_COLUMNS

DOCS = Path(__file__).parents[1] / "docs"
PARAMETERIZATIONS = (DOCS / "parameterizations.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PARAMETERIZATIONS, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


@pytest.mark.parametrize("example", EXAMPLES, ids=["torch", "reset", "sb3", "own"])
def test_the_examples_run(example: str) -> None:
    names_after: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "docs/parameterizations.md", "exec"), names_after)
    assert {"model", "CentredWeights"} & names_after.keys()


def test_every_entry_and_every_option_has_a_line() -> None:
    rows = [line for line in PARAMETERIZATIONS.splitlines() if line.startswith("|")]
    for name in names():
        entry = get(name)
        if not entry.__module__.startswith("wn_rl."):
            continue  # a benchmark or a test that ran before in this process registered it
        assert sum(line.startswith(f"| `{name}` |") for line in rows) >= 2, name
        treated = {"all": "all", "hidden": "all but the output", "penultimate": "the one before the output"}[
            entry.default_layers
        ]
        (claims,) = (line.split("|") for line in rows if line.startswith(f"| `{name}` |") and line.count("|") == 7)
        assert claims[4].strip() == ("no" if entry.batch_independent else "yes"), name
        assert claims[5].strip() == treated, name
        assert claims[6].strip().startswith("yes" if entry.foldable else "no"), name
        for option in make(entry, {}).options():
            assert f"| `{option}` |" in PARAMETERIZATIONS, f"{name}.{option}"


def test_every_protocol_and_every_csv_column_has_its_line() -> None:
    evaluation = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in evaluation.splitlines() if line[:1] == "|"]
    for name, protocol in PROTOCOLS.items():
        (row,) = (row for row in rows if row[0] == f"`{name}`")
        length = f"{protocol.steps:,} agent steps" if protocol.steps else f"{protocol.episodes} episodes"
        cap = protocol.max_frames_per_episode
        assert row[1:7] == [
            length,
            f"{protocol.epsilon:g}",
            f"{cap:,}" if cap else "none",
            f"{protocol.noop_max}",
            f"{protocol.sticky_actions:g}",
            protocol.action_set,
        ]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(CSV_COLUMNS) <= documented
