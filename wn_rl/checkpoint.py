"""A checkpoint on disk: a directory that is written whole or not at all, and never executes code when read.

checkpoint.json        format, versions, configuration, network spec, counters, and the SHA-256 of the other files
model.safetensors      the Q-network's weights
training.safetensors   target network, optimizer, random states
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from wn_rl.config import TrainConfig, from_mapping
from wn_rl.errors import CheckpointError, UsageError, one_line
from wn_rl.networks import QNetwork, QNetworkSpec, build_q_network

FORMAT = 3
_SINCE_FORMAT_3 = {"config": {"checkpoint_seconds": 600.0, "journal": "whole", "reseed_period": 100_000}}
"""What a checkpoint of format 2 does not say; it can be evaluated, not resumed, and these matter in training only."""
_SINCE_FORMAT_2 = {
    "network": {"options": {}, "layers": None},
    "config": {
        "param_options": {},
        "param_layers": None,
        "target_statistics": "running",
        "joint_batches": False,
        "output_init": "scaled",
        "compile": "off",
    },
}
"""What a checkpoint of format 1 does not say, and what it then was."""
_JSON, _MODEL, _TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
_MAX_BYTES = {_JSON: 2**24, _MODEL: 2**32, _TRAINING: 2**34}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        config: the run's resolved configuration.
        spec: of the Q-network.
        weights: the Q-network's state dict, on the CPU.
        agent_steps: at which it was saved.
        training: state of agent, replay and loop, or empty where only the weights were read.
        path: where it was read from.
        versions: of this project and of the packages with which it was written.
        notice: what a user should be told about it, where there is something.
    """

    config: TrainConfig
    spec: QNetworkSpec
    weights: dict[str, Tensor]
    agent_steps: int
    training: dict[str, Any]
    path: Path
    versions: dict[str, str]
    notice: str | None = None

    def q_network(self, device: torch.device | str = "cpu") -> QNetwork:
        """Build the Q-network with its weights, in evaluation mode.

        Raises:
            CheckpointError: the weights do not fit the spec.
        """
        network = build_q_network(self.spec, seed=0)
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: the weights do not fit the network: {one_line(error)}") from None
        return network.to(device).eval()


def flatten(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a nested state into tensors and JSON values, each under its path, e.g. ``agent/optimizer/0/exp_avg``."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner_tensors, inner_values = flatten(value, f"{path}/")
            tensors |= inner_tensors
            values |= inner_values
        elif isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous()
        else:
            values[path] = value
    return tensors, values


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`flatten`."""
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise CheckpointError(f"the entry '{path}' of the training state contradicts another")
        inner[last] = value
    return state


def save(
    path: Path,
    *,
    config: Mapping[str, Any],
    spec: QNetworkSpec,
    weights: Mapping[str, Tensor],
    agent_steps: int,
    training: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write a checkpoint to the directory ``path``, replacing the one there only when the new one is whole.

    The files go to a directory beside it, are synced, and are renamed into place; a reader finds the old or the new
    checkpoint, at worst under the name ``path.previous``, where the old one stays.

    Raises:
        CheckpointError: it could not be written; what was there before still is.
    """
    tensors, values = flatten(training)
    files = {
        _MODEL: save_safetensors({name: value.detach().cpu().contiguous() for name, value in weights.items()}),
        _TRAINING: save_safetensors(tensors),
    }
    description = {
        "format": FORMAT,
        "versions": dict(versions),
        "agent_steps": agent_steps,
        "config": dict(config),
        "network": spec.to_json(),
        "training": values,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files[_JSON] = json.dumps(description, indent=1).encode()
    temporary = path.with_name(f"{path.name}.writing")
    previous = path.with_name(f"{path.name}.previous")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists() and previous.exists():
            with contextlib.suppress(OSError):
                os.rename(previous, path)
        raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from None


def save_evidence(path: Path, tensors: Mapping[str, Tensor], statistics: Mapping[str, Any]) -> None:
    """Write tensors and JSON values to the directory ``path``, for a person to look at.

    Raises:
        OSError: it cannot be written.
    """
    path.mkdir(exist_ok=True)
    data = save_safetensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    (path / "minibatch.safetensors").write_bytes(data)
    (path / "statistics.json").write_text(json.dumps(statistics, indent=1) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(latest: Path, found: Path) -> None:
    """Make the checkpoint ``found`` that a run goes on from its latest, and put a damaged one aside.

    Raises:
        CheckpointError: a file cannot be renamed.
    """
    if found == latest:
        return
    damaged = latest.with_name(f"{latest.name}.damaged")
    try:
        if latest.exists():
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(latest, damaged)
        os.rename(found, latest)
        _sync(latest.parent)
    except OSError as error:
        raise CheckpointError(f"cannot rename {found}: {error.strerror or error}") from None


def find(path: Path) -> Path:
    """Return the checkpoint directory that ``path`` means: itself, or a run's latest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    for candidate in (path, path / "checkpoints" / "latest"):
        for place in (candidate, Path(f"{candidate}.previous")):
            if (place / _JSON).is_file():
                return place
    raise CheckpointError(f"{path} holds no checkpoint ({_JSON} is missing); a run saves its first at an evaluation")


def load(path: Path, *, with_training: bool = True) -> Checkpoint:
    """Read the checkpoint in the directory ``path``, or the latest of the run ``path``.

    Args:
        path: see :func:`find`.
        with_training: read the training state too; False reads what evaluation needs.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = find(path)
    try:
        description = json.loads(_read(path, _JSON))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path / _JSON} is damaged: it is not JSON") from None
    try:
        if description["format"] not in (1, 2, FORMAT):
            raise CheckpointError(
                f"{path} has format {description['format']!r}; this version of wn_rl reads formats 1 to {FORMAT}"
            )
        for later, unsaid in ((2, _SINCE_FORMAT_2), (3, _SINCE_FORMAT_3)):
            for part, values in unsaid.items() if description["format"] < later else ():
                description[part] = values | description[part]
        spec = QNetworkSpec.from_json(description["network"])
        config = from_mapping(description["config"])
        agent_steps = description["agent_steps"]
        values = description["training"]
        digests = {name: description["sha256"][name] for name in (_MODEL, _TRAINING)}
        if type(agent_steps) is not int or agent_steps < 0 or not isinstance(values, dict):
            raise CheckpointError("a counter is not a number")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _JSON} is damaged: {one_line(error)} is missing or misplaced") from None
    except (CheckpointError, UsageError) as error:
        raise CheckpointError(f"{path / _JSON}: {error}") from None
    weights = _tensors(path, _MODEL, digests[_MODEL])
    training: dict[str, Any] = {}
    if with_training:
        training = unflatten(values | _tensors(path, _TRAINING, digests[_TRAINING]))
    written_with = {str(package): str(version) for package, version in dict(description["versions"]).items()}
    return Checkpoint(config, spec, weights, agent_steps, training, path, written_with)


def _read(directory: Path, name: str) -> bytes:
    file = directory / name
    try:
        if file.stat().st_size > _MAX_BYTES[name]:
            raise CheckpointError(f"{file} is too large to be a checkpoint's")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None


def _tensors(directory: Path, name: str, digest: object) -> dict[str, Tensor]:
    data = _read(directory, name)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{directory / name} is damaged: its checksum does not match")
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory / name} is damaged: {one_line(error)}") from None
