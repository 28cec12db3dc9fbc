"""A checkpoint on disk: a directory that is written completely or not at all; reading it never executes code.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig, current, from_mapping
from wn_rl.errors import CheckpointError, OtherVersionError, WnRlError
from wn_rl.networks import (
    Network,
    QNetworkSpec,
    build_q_network,
    unknown_in_file,
    unknown_network_in_file,
)
from wn_rl.networks import get as get_network
from wn_rl.networks import options as network_options
from wn_rl.parameterizations import get, resolve
from wn_rl.runs.safe_load import MAX_DEPTH, Layout, layout_of, open_regular, read_json, read_tensors, shown
from wn_rl.runs.safe_load import check_state as check_state

FORMAT = 4
_SINCE_FORMAT_4 = {"config": {"backend": "auto", "chosen": []}}
"""Keys that a checkpoint of format 3 lacks: the backend followed from the keys that it has."""
_SINCE_FORMAT_3 = {"config": {"checkpoint_seconds": 600.0, "action_log": "full", "reseed_period": 100_000}}
"""Keys that a checkpoint of format 2 lacks; it can be evaluated, not resumed, and these matter in training only."""
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
"""Keys that a checkpoint of format 1 lacks, with the values that held then."""
_RENAMED = {
    "loop/rows": "loop/vector_steps",
    "loop/journal": "loop/action_log",
    "run/watching": "run/measuring",
    "run/watched": "run/measured",
}
"""Former paths of entries of the training state → their paths."""
_JSON, _MODEL, _TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
_MAX_JSON = 2**21
"""Largest checkpoint.json, bytes; a usual one has a few thousand."""
_MAX_STEPS = 10**12
"""More agent steps than any run makes."""
_MAX_LAYERS = 64
"""Most layer names in a spec; a network has five layers."""
_TRAINING_MULTIPLE = 5
"""Most bytes of the training state per byte of weights: target network, two moments, and a margin."""
_TRAINING_CONSTANT = 2**25
"""Most bytes of the rest of the training state: random states, counters, held-out observations."""
_COUNTERS = ("agent/updates", "loop/agent_steps", "run/evaluated_at")
"""Entries of the training state that never exceed the number of agent steps."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        config: the run's resolved configuration.
        spec: of the Q-network.
        weights: the Q-network's state dict, on the CPU.
        agent_steps: when it was saved.
        training: state of agent, replay and loop, or empty where only the weights were read.
        path: where it was read from.
        versions: of this project and of the packages with which it was written, and the ``processor`` on which.
        notice: one line for the user if a damaged checkpoint was skipped for the one before it, or None.
        renamed: one line about configuration keys that have other names now; empty if there are none.
    """

    config: TrainConfig
    spec: QNetworkSpec
    weights: dict[str, Tensor]
    agent_steps: int
    training: dict[str, Any]
    path: Path
    versions: dict[str, str]
    notice: str | None = None
    renamed: str = ""

    def q_network(self, device: torch.device | str = "cpu") -> Network:
        """Build the Q-network with its weights, in evaluation mode.

        Raises:
            CheckpointError: the weights do not fit the spec.
        """
        network = build_q_network(self.spec, seed=0)
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: the weights do not fit the network: {shown(error)}") from None
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
    """Undo :func:`flatten`.

    Raises:
        CheckpointError: an entry is both a value and a group, or nested too deeply.
    """
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        if len(parents) >= MAX_DEPTH:
            raise CheckpointError(f"the entry '{shown(path)}' of the training state is nested too deeply")
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise CheckpointError(f"the entry '{shown(path)}' of the training state contradicts another")
        if last in inner:
            raise CheckpointError(f"the entry '{shown(path)}' of the training state contradicts another")
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
    keep_previous: bool = False,
) -> None:
    """Write a checkpoint to the directory ``path``; the one there is only replaced when the new one is complete.

    The files are written to a directory beside it, synced, and renamed into place. A reader finds the old or the new
    checkpoint, at worst under the name ``path.previous``, where ``keep_previous`` keeps the old one.

    Raises:
        CheckpointError: it could not be written; the one before is unchanged.
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
    files[_JSON] = json.dumps(seal(description), indent=1).encode()
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
        if not keep_previous:
            shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists() and previous.exists():
            with contextlib.suppress(OSError):
                os.rename(previous, path)
        raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from None


def save_evidence(path: Path, tensors: Mapping[str, Tensor], statistics: Mapping[str, Any]) -> None:
    """Write tensors and JSON values to the directory ``path``, for inspection by a person.

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
    """Rename the checkpoint ``found``, from which a run is resumed, to the latest one; a damaged one is kept aside.

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
    return _places(path)[0]


def _places(path: Path) -> list[Path]:
    """Return the checkpoint directories that ``path`` can mean, the newest first; at least one."""
    try:
        # A run that was killed between the two renames of a save has only the one before.
        if not path.exists() and not Path(f"{path}.previous").exists():
            raise CheckpointError(f"{path} does not exist")
        for candidate in (path, path / "checkpoints" / "latest"):
            both = (candidate, Path(f"{candidate}.previous"))
            if places := [place for place in both if (place / _JSON).is_file()]:
                return places
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {shown(path)}: {getattr(error, 'strerror', error)}") from None
    raise CheckpointError(
        f"{path} holds no checkpoint ({_JSON} is missing); a run saves its first after --checkpoint-seconds, at an "
        "evaluation, or when it is told to stop"
    )


def load(path: Path, *, with_training: bool = True) -> Checkpoint:
    """Read the checkpoint in the directory ``path``, or the latest of the run ``path``.

    Nothing in it is trusted: the files are read up to the size that their network can need, and names, dtypes and
    shapes of the weights are compared with those of the network before either is allocated. If the checkpoint is
    damaged and the one before it is still there and complete, that one is read and ``notice`` says so.

    Args:
        path: see :func:`find`.
        with_training: read the training state too; False reads what evaluation needs.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    places = _places(path)
    try:
        saved = _load(places[0], with_training=with_training)
    except OtherVersionError:
        raise  # complete, so it must not be skipped
    except CheckpointError as error:
        for place in places[1:]:
            with contextlib.suppress(CheckpointError):
                earlier = _load(place, with_training=with_training)
                return replace(earlier, notice=f"{error}; going on from the checkpoint before it, {place}")
        raise
    if saved.path.name.endswith(".previous") and not path.name.endswith(".previous"):
        return replace(saved, notice=f"the latest checkpoint is missing; going on from the one before it, {saved.path}")
    return saved


def _load(path: Path, *, with_training: bool) -> Checkpoint:
    """Read the checkpoint in the directory ``path``."""
    description = read_json(path / _JSON, _MAX_JSON)
    try:
        config, spec, agent_steps, values, digests = _described(description)
        versions = {str(package): str(version) for package, version in description["versions"].items()}
        expected = _expected_weights(spec, path / _MODEL)
        _check_agreement(config, spec)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _JSON} is damaged: {shown(error)} is missing or misplaced") from None
    except OtherVersionError as error:
        raise OtherVersionError(f"{path / _JSON}: {error}") from None
    except WnRlError as error:
        raise CheckpointError(f"{path / _JSON}: {shown(error)}") from None
    size = sum(layout.nbytes for layout in expected.values())
    weights = read_tensors(path / _MODEL, digest=digests[_MODEL], limit=size, expected=expected)
    training: dict[str, Any] = {}
    if with_training:
        limit = _TRAINING_MULTIPLE * size + _TRAINING_CONSTANT
        tensors = read_tensors(path / _TRAINING, digest=digests[_TRAINING], limit=limit)
        try:
            if twice := values.keys() & tensors.keys():
                raise CheckpointError(f"the entry '{min(twice)}' of the training state appears twice")
            training = unflatten({_RENAMED.get(path, path): value for path, value in (values | tensors).items()})
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {shown(error)}") from None
    renamed = current(description["config"])[1]
    return Checkpoint(config, spec, weights, agent_steps, training, path, versions, renamed=renamed)


def seal(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of checkpoint.json with its own SHA-256 among the others.

    It is computed of the content as JSON with sorted keys and without spaces, without itself, so that a flipped bit in
    a setting is noticed like one in the weights.
    """
    digests = {name: digest for name, digest in description["sha256"].items() if name != _JSON}
    content = {**description, "sha256": digests}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, "sha256": {**digests, _JSON: hashlib.sha256(text.encode()).hexdigest()}}


def _described(description: Any) -> tuple[TrainConfig, QNetworkSpec, int, dict[str, Any], dict[str, object]]:  # noqa: ANN401
    """Return configuration, spec, agent steps, values of the training state and checksums."""
    for part in ("config", "network", "training", "sha256", "versions"):
        if not isinstance(description[part], dict):
            raise CheckpointError(f"{part} is not a mapping")
    sealed = description["format"] not in (1, 2) or _JSON in description["sha256"]  # earlier formats had no seal
    if sealed and description != seal(description):
        raise CheckpointError("it is damaged: its checksum does not match")
    if description["format"] not in (1, 2, 3, FORMAT):
        raise OtherVersionError(
            f"it has format {description['format']!r}; this version of wn_rl reads formats 1 to {FORMAT}"
        )
    for later, unsaid in ((2, _SINCE_FORMAT_2), (3, _SINCE_FORMAT_3), (4, _SINCE_FORMAT_4)):
        for part, values in unsaid.items() if description["format"] < later else ():
            description[part] = values | description[part]
    spec = QNetworkSpec.from_json(description["network"])
    config = from_mapping(current(description["config"])[0])
    for key in ("game", "preset"):
        name = getattr(config, key)
        if len(name) > 100 or not name.isprintable():
            raise CheckpointError(f"{key} is not a name")
    find_game(config.game)
    agent_steps, values = description["agent_steps"], description["training"]
    if type(agent_steps) is not int or not 0 <= agent_steps <= _MAX_STEPS:
        raise CheckpointError("a counter is not a number: agent_steps")
    _check_values(values, agent_steps)
    digests = {name: description["sha256"][name] for name in (_MODEL, _TRAINING)}
    return config, spec, agent_steps, values, digests


def _check_values(values: Mapping[str, Any], agent_steps: int) -> None:
    """Refuse values of the training state that no run writes."""
    for path, value in values.items():
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, bool | int | float | str | None) for entry in entries):
            raise CheckpointError(f"the entry '{path}' of the training state is neither a number nor a text")
        if any(type(entry) is int and entry < 0 for entry in entries):
            raise CheckpointError(f"the entry '{path}' of the training state is below 0")
        if path in _COUNTERS and not (type(value) is int and value <= agent_steps):
            raise CheckpointError(f"a counter is not a number up to agent_steps: {path}")
    if values.get("loop/agent_steps", agent_steps) != agent_steps:
        raise CheckpointError("agent_steps and loop/agent_steps contradict each other")


def _expected_weights(spec: QNetworkSpec, model: Path) -> dict[str, Layout]:
    """Return the layouts of the weights of the network that ``spec`` describes, which is not allocated for it."""
    if spec.layers is not None and len(spec.layers) > _MAX_LAYERS:
        raise CheckpointError(f"the network spec names more than {_MAX_LAYERS} layers")
    try:
        with torch.device("meta"):
            weights = build_q_network(spec, seed=0).state_dict()
    except RuntimeError:
        # A user's own parameterization may need values, which tensors on the meta device lack. Then the network is
        # built on the CPU, if the file can hold its weights.
        plain = spec.count_parameters() * torch.float32.itemsize
        with open_regular(model, 2**40) as file:
            there = os.fstat(file.fileno()).st_size
        if there < plain // 2:
            raise CheckpointError(
                f"the weights do not fit the network: it has {plain:,} bytes of them, the file {there:,}"
            ) from None
        weights = build_q_network(spec, seed=0).state_dict()
    return {name: layout_of(weight) for name, weight in weights.items()}


def _check_agreement(config: TrainConfig, spec: QNetworkSpec) -> None:
    """Refuse a network that does not match the configuration."""
    try:
        parameterization = resolve(get(config.param).name, config.param_options)
    except KeyError:
        raise CheckpointError(unknown_in_file(config.param)) from None
    except ValueError as error:
        raise CheckpointError(f"param_options: {error}") from None
    try:
        kind = get_network(config.network)
        options = network_options(kind, config.network_options)
    except KeyError:
        raise CheckpointError(unknown_network_in_file(config.network)) from None
    except ValueError as error:
        raise CheckpointError(f"network_options: {error}") from None
    treated = spec.outline().default_layers(parameterization)
    pairs: dict[str, tuple[object, object]] = {
        "the parameterization": (get(spec.parameterization).name, parameterization.name),
        "its options": (spec.entry().options(), parameterization.options()),
        "the layers": (
            treated if spec.layers is None else spec.layers,
            treated if config.param_layers is None else config.param_layers,
        ),
        "the network": (get_network(spec.network).name, kind.name),
        "the network's options": (network_options(get_network(spec.network), spec.network_options), options),
        "hidden_units": (spec.hidden_units, config.hidden_units),
        "weight_init": (spec.weight_init, config.weight_init or spec.weight_init),
    }
    for name, (of_network, of_config) in pairs.items():
        if of_network != of_config:
            raise CheckpointError(f"network and configuration do not match: {name}: {of_network!r} and {of_config!r}")
