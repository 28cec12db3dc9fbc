"""How a run is resumed: its checkpoint, and the configuration keys that may change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wn_rl import networks, parameterizations
from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig, is_auto, validate
from wn_rl.errors import CheckpointError, UsageError
from wn_rl.machine import pick_device
from wn_rl.parameterizations import resolve
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, read_rows, versions


def open_for_resume(directory: Path, changes: Mapping[str, Any]) -> tuple[TrainConfig, checkpoint.Checkpoint]:
    """Return the configuration and the checkpoint with which the run in ``directory`` is resumed.

    Args:
        directory: of the run.
        changes: configuration keys that the user gave; only those that do not change the experiment may differ.

    Raises:
        UsageError: a key that may not change.
        CheckpointError: the checkpoint is missing or damaged.
    """
    saved = checkpoint.load(RunDirectory(directory).path)
    _check_resumable(saved)
    read_rows(RunDirectory(directory).evaluations)
    # A name can be written in several ways, and an option as text.
    changes = {key: _canonical(saved.config, key, value) for key, value in changes.items()}
    for key, value in changes.items():
        if key not in RESUMABLE and value != getattr(saved.config, key):
            raise UsageError(
                f"--resume: {key} is {getattr(saved.config, key)!r} in this run and cannot change to {value!r}; "
                f"only these can: {', '.join(sorted(RESUMABLE))}"
            )
    changes = {key: value for key, value in changes.items() if key in RESUMABLE}
    moved = "device" in changes and pick_device(changes["device"]) != saved.config.device
    if moved:  # what was chosen for another device does not hold for this one
        changes = {"compile": "auto", "backend": "auto"} | changes
    config = replace(saved.config, **changes)
    differs = {key for key in changes if getattr(saved.config, key) != changes[key] and changes[key] != "auto"}
    if chosen := differs - {"device"}:
        config = replace(config, chosen=tuple(sorted({*saved.config.chosen, *chosen})))
    validate(config)
    return config, saved


def _check_resumable(saved: checkpoint.Checkpoint) -> None:
    if "vector_steps" not in saved.training.get("loop", {}):
        raise CheckpointError(
            f"{saved.path} was written by an earlier version, without an action log: it can be evaluated, not resumed"
        )
    then, now = saved.versions.get("ale-py"), versions()["ale-py"]
    if then != now:
        raise CheckpointError(
            f"{saved.path} was made with ale-py {then}, and this is {now}, whose games may differ: "
            f"pip install ale-py=={then} to resume it"
        )


def _canonical(config: TrainConfig, key: str, value: Any) -> Any:  # noqa: ANN401 - the type is that of the key
    if key == "num_envs" and is_auto(value):
        return config.num_envs  # what was chosen for this run
    if key == "game":
        return find_game(value).name
    try:
        if key == "param_options":
            return resolve(config.param, value).options()
        if key == "network_options":
            return networks.options(networks.get(config.network), value)
    except ValueError as error:
        raise UsageError(f"{key}: {error}") from None
    if key in ("param", "network"):
        get: Callable[[str], object] = parameterizations.get if key == "param" else networks.get
        with contextlib.suppress(KeyError):
            if get(value) is get(getattr(config, key)):
                return getattr(config, key)
    return value


RESUMABLE = frozenset(
    {
        "frames",
        "device",
        "precision",
        "backend",
        "compile",
        "num_threads",
        "emulator_threads",
        "evaluation_period",
        "evaluation_steps",
        "evaluation_episodes",
        "evaluation_envs",
        "checkpoint_seconds",
        "checkpoint_period",
        "action_log",
        "log_period",
    }
)
"""Configuration keys that a resumed run may change."""
