"""What was timed before on this machine, kept beside the compiled kernels.

A file that is missing, damaged or cannot be written is no error: it is timed again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from wn_rl import networks, parameterizations
from wn_rl.config import TrainConfig
from wn_rl.machine import Precision, cores, processor
from wn_rl.training.run import MakeAgent

from .cpu_kernels import loader
from .interface import REGISTRY
from .timing import Candidate

_NAMES = (
    "game preset chosen frames seed run_dir precision backend num_threads emulator_threads noop_max fire_reset "
    "sticky_actions full_action_set max_frames_per_episode life_loss_terminal reward_clip replay_capacity "
    "learning_starts target_period gamma learning_rate learning_rates optimizer_eps adam_beta1 adam_beta2 "
    "rmsprop_decay epsilon_start epsilon_end epsilon_decay_steps weight_init data_dependent_init init_samples "
    "output_init_std output_init evaluation_period evaluation_steps evaluation_episodes evaluation_epsilon "
    "evaluation_envs checkpoint_seconds checkpoint_period action_log reseed_period log_period"
)
CHANGES_NO_TIME = frozenset(_NAMES.split())
"""Configuration keys that change nothing about how long an update takes; all others are part of the key."""
MOST_BYTES = 2**16
"""Of a file; one has about a thousand."""

Key = dict[str, Any]


def key_of(config: TrainConfig, make_agent: MakeAgent, num_actions: int, precisions: Sequence[str]) -> Key | None:
    """Return all that the times depend on: machine, model, code, and what was left open.

    None where the agent's maker has no name by which another process would know it, say a lambda.
    """
    name = f"{getattr(make_agent, '__module__', '')}.{getattr(make_agent, '__qualname__', '<>')}"
    if "<" in name:
        return None
    keys = {key: value for key, value in asdict(config).items() if key not in CHANGES_NO_TIME}
    parameterization = parameterizations.get(config.param)
    return {
        "processor": [processor(torch.device(config.device)), loader.processor()],
        "vectors": loader.chosen_vectors(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "compiler": loader.compiler(),
        "torch": torch.__version__,
        "code": _code(),
        "agent": [name, _source_of(make_agent)],
        "parameterization": _source_of(parameterization),
        "network": _source_of(networks.get(config.network)),
        "actions": num_actions,
        "open": [config.backend, *precisions],
        "config": keys,
    }


@functools.cache
def _code() -> str:
    """Return the SHA-256 of the sources that an update runs through."""
    agents = Path(__file__).parents[1]
    found = [*agents.rglob("*.py"), *loader.CSRC.glob("*.[ch]")]
    for package in (networks, parameterizations):
        found += Path(str(package.__file__)).parent.glob("*.py")
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _source_of(thing: object) -> str:
    """Return the SHA-256 of the file that defines a class, a function or an object's class; empty if there is none."""
    module = sys.modules.get(getattr(thing, "__module__", ""))
    try:
        return hashlib.sha256(Path(str(getattr(module, "__file__", ""))).read_bytes()).hexdigest()
    except OSError:
        return ""


def directory() -> Path:
    """Return where the files are: beside the compiled kernels."""
    return loader.cache_directory()


def _path(key: Key) -> Path:
    text = json.dumps(key, sort_keys=True, default=str)
    return directory() / f"timings-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def read(key: Key) -> dict[Candidate, float]:
    """Return the seconds that were kept under ``key``; empty if there are none, or none that make sense."""
    try:
        with _path(key).open("rb") as file:
            kept = json.loads(file.read(MOST_BYTES))
        if kept["key"] != json.loads(json.dumps(key, default=str)):
            return {}
        seconds = {Candidate(backend, precision): value for backend, precision, value in kept["seconds"]}
        known = all(c.backend in REGISTRY.entries and c.precision in get_args(Precision) for c in seconds)
        sensible = all(type(value) is float and math.isfinite(value) and value > 0 for value in seconds.values())
        return seconds if known and sensible else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write(key: Key, seconds: Mapping[Candidate, float]) -> None:
    """Keep seconds under ``key``, if that can be done."""
    kept = {"key": key, "seconds": [(entry.backend, entry.precision, value) for entry, value in seconds.items()]}
    with contextlib.suppress(OSError):
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".json")  # two runs may write at a time
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1, default=str)
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
