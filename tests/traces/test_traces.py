"""What happens in runs with scripted actions: beside the definitions, and beside what was recorded.

Weights differ between processors; event order, action log, replay content, schedules and statistics do not, once the
actions no longer follow from weights. The runs of ``recording.RUNS`` are real ones, through ``train``, with an agent
that plays a script. What they do is compared twice, key by key, and the first difference is named:

- with ``by_definition.derive``, which works the same out in a few plain loops: which agent step owes what, which
  transitions the replay holds, what is drawn, what is logged. It says that the code does what is meant.
- with ``expected.json``: nothing changes unnoticed, evaluations and frames included. A change that is meant is recorded
  with ``python -m tests.traces --record``; read the diff before it is committed.

Frames depend on ale-py's emulators and, where they are resized, on the kind of processor: elsewhere their hashes are
skipped, but they are those of the emulators all the same. Which transitions are drawn depends on torch's generator.
Weights are compared by ``benchmarks/traces.py``, before and after a change on one machine.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from tests.traces.by_definition import derive
from tests.traces.recording import (
    EXPECTED,
    RUNS,
    Trace,
    configured,
    first_difference,
    record_named,
    shortened,
    vector_steps,
    where_recorded,
)

found = functools.cache(record_named)
recorded = json.loads(EXPECTED.read_text(encoding="utf-8"))
each_run = pytest.mark.parametrize("name", RUNS)


@each_run
def test_a_run_is_what_the_definitions_say(name: str) -> None:
    trace = found(name)
    expected = derive(configured(name), [row["mean"] for row in trace["evaluations.csv"]])
    for key, value in expected.items():
        ours = trace[key]
        if key in ("frames", "tensorboard"):  # what evaluations show and checksums are not derived
            ours = {part: ours.get(part) for part in value}
        assert not (told := first_difference(ours, value, key)), told
    assert {key for key in trace["tensorboard"] if key.startswith("train/")} == expected["tensorboard"].keys()


@each_run
def test_a_run_is_what_was_recorded(name: str) -> None:
    ours, theirs = shortened(found(name)), recorded["runs"][name]
    told = first_difference(without_frames(ours), without_frames(theirs))
    assert not told, told


@each_run
def test_frames_are_those_that_were_recorded(name: str) -> None:
    here, there = where_recorded(), recorded["recorded with"]
    if here != there:
        pytest.skip(f"frames were recorded with {there}, here is {here}")
    told = first_difference(shortened(found(name))["frames"], recorded["runs"][name]["frames"], "frames")
    assert not told, told


def without_frames(trace: Trace) -> Trace:
    return {key: value for key, value in trace.items() if key != "frames"}


def test_the_runs_have_in_them_what_they_are_there_for() -> None:
    assert recorded["runs"].keys() == RUNS.keys()
    seen: dict[str, list[Any]] = {name: [] for name in ("wraps", "resets", "seeds", "copies", "lives", "draws", "best")}
    for name in RUNS:
        trace, config = found(name), configured(name)
        rows = trace["action log"]
        ends = len(trace["episodes.csv"])
        seen["wraps"].append(trace["replay"]["first index"])
        seen["resets"].append(sum(row.count(255) for row in rows))
        seen["seeds"].append(sum(row.count(254) for row in rows))
        seen["copies"].append(sum(event.startswith("target copy") for event in trace["events"]))
        seen["best"].append(sum(event.startswith("checkpoint best") for event in trace["events"]))
        terminals = sum(sum(batch["terminals"]) for batch in trace["minibatches"])
        seen["lives"].append(config.life_loss_terminal and terminals > ends)
        seen["draws"].append(sum(any(batch["rewards"]) for batch in trace["minibatches"]))
    assert min(seen["wraps"]) > 0
    assert min(seen["resets"]) > 0
    assert min(seen["copies"]) > 3
    assert min(seen["best"]) > 0
    assert max(seen["seeds"]) > 0
    assert sum(seen["lives"]) == 2  # both runs of Breakout
    assert sum(seen["draws"]) > 10
    assert {configured(name).num_envs for name in RUNS} == {1, 2, 8}


def test_the_first_difference_is_named() -> None:
    events = ["act at agent step 1,203", "update at agent step 1,204", "target copy at agent step 1,204"]
    swapped = [events[0], events[2], events[1]]
    assert first_difference({"events": swapped}, {"events": events}) == (
        "event 1: target copy at agent step 1,204, expected update at agent step 1,204"
    )
    assert first_difference({"events": events[:2]}, {"events": events}) == (
        "event 2: 'target copy at agent step 1,204' expected, and nothing found"
    )
    assert first_difference({"epsilon": {1: 1.0, 61: 0.9}}, {"epsilon": {1: 1.0, 61: 0.95}}) == (
        "epsilon, 61: 0.9, expected 0.95"
    )
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == "b: missing"
    assert first_difference({"a": 1, "c": 2}, {"a": 1}) == "c: nothing like it was expected"
    assert first_difference([[1, 2], [1, 3]], [[1, 2], [1, 4]], "action log") == (
        "action log, vector step 1, number 1: 3, expected 4"
    )
    assert first_difference({"events": events}, {"events": list(events)}) == ""


def test_vector_steps_are_written_short() -> None:
    events = ["act at agent step 0", "send at agent step 2", "act at agent step 2", "send at agent step 4"]
    events += ["act at agent step 4", "send at agent step 1,006", "update at agent step 1,006"]
    assert list(vector_steps(events)) == ["2–4 (2): act, send", "1,006: act, send, update"]
