"""The configuration of a training run: every key, its unit and its checks; presets and YAML files.

Precedence: a flag beats a key of ``--config FILE.yaml``, which beats the preset. Imports neither torch nor ale-py.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from wn_rl.atari.games import find_game
from wn_rl.errors import UsageError, WnRlError, closest, one_line
from wn_rl.layout import PRESETS_DIR

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_count(text: str) -> int:
    """Return the whole number that ``200M``, ``2e6``, ``500k`` or ``1_000_000`` stands for.

    Raises:
        ValueError: it is no whole number.
    """
    match = re.fullmatch(r"([-+]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?)\s*([kKmMgGbB]?)", text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a count such as 200M, 2e6, 500k or 10000")
    number, suffix = match[1].replace("_", ""), match[2].lower()
    if re.fullmatch(r"[-+]?[0-9]+", number):
        return int(number) * _SUFFIXES.get(suffix, 1)
    value = float(number) * _SUFFIXES.get(suffix, 1)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"'{text}' is not a whole number")
    return int(value)


Count = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


class _Auto(int):
    """A whole number that is not chosen yet; only :data:`AUTO` is one."""

    def __repr__(self) -> str:
        return "auto"

    __str__ = __repr__


AUTO = _Auto(0)
"""``num_envs: auto`` until :func:`wn_rl.machine.resolve_device` chooses. Nothing may compute with it before."""


def parse_num_envs(text: str) -> int:
    """Return :data:`AUTO` for ``auto``, else as :func:`parse_count`.

    Raises:
        ValueError: it is neither.
    """
    if text.strip() == "auto":
        return AUTO
    try:
        return parse_count(text)
    except ValueError as error:
        raise ValueError(f"{error}, nor auto") from None


def is_auto(value: object) -> bool:
    """Return whether ``value`` is :data:`AUTO` or a copy of it; a 0 is not."""
    return isinstance(value, _Auto)


EnvCount = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|auto",
        instance_from_str=lambda words: parse_num_envs(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
Options = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE …",
        instance_from_str=lambda words: parse_options(words),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={option}" for name, option in value.items()],
    ),
]
Names = Annotated[
    tuple[str, ...] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="LAYER …",
        instance_from_str=lambda words: tuple(words),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: list(value or ()),
    ),
]


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return ``g=exp rate=0.05`` as a mapping from name to text.

    Raises:
        ValueError: a word is not NAME=VALUE, or a name stands twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"'{word}' is not NAME=VALUE, or the name stands twice")
        found[name] = value
    return found


BackendName = Literal["eager", "cuda_graphs", "cpu_kernels"]
"""Ways in which an agent's work can be carried out, see ``agents.backends``."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a DQN with a weight parameterization of your choice on an Atari game.

    Units: a frame is one emulator frame; an agent step is one decision, 4 frames; an update is one optimizer step.
    Counts may be written 200M, 2e6 or 500k. A flag beats the file of --config, which beats the preset.
    """

    game: str = ""
    """The game, e.g. Breakout, space_invaders or ALE/Pong-v5."""
    param: str = "wn"
    """Parameterization of the network: standard, wn, mean_only_bn, wn_mean_only_bn, bn, ln, sn, wn_projected, or
    module:Name of your own registered class, whose module is imported."""
    param_options: Options = field(default_factory=dict)
    """Options of the parameterization, e.g. g=exp for wn; docs/parameterizations.md lists them."""
    param_layers: Names = None
    """Layers that are parameterized, of convolutions.0 convolutions.1 convolutions.2 hidden output (* and ? may stand
    for letters). Default: those that the parameterization's source treats, for wn all."""
    preset: str = "paper"
    """Start from configs/PRESET.yaml: paper (Salimans & Kingma 2016), nature (Mnih et al. 2015), machado (sticky
    actions, full action set) or quick (for a laptop: something to see within 2M frames)."""
    frames: Count = 200_000_000
    """Length of the training, in emulator frames."""
    seed: Count = 1
    """Seed of everything random. On a CPU with the same number of threads the same seed gives the same weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network and the replay live; auto takes a GPU where there is one."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Arithmetic of the hidden layers; weights, output layer and loss are always float32. auto: bfloat16 on a CPU with
    AVX512-BF16 or AMX and on a GPU that computes in it, else float32. tf32: on a GPU, float32 whose factors are rounded
    to 10 bits."""
    backend: Literal["auto", BackendName] = "auto"
    """How updates are carried out: eager (torch's autograd, the reference), cuda_graphs (recorded once, on a GPU),
    cpu_kernels (C, for standard and wn with adamax). They agree but for rounding. auto: the fastest that supports the
    agent; config.yaml says which."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile: by cuda_graphs for the whole update, by eager on a CPU for adamax's step (some 20 s, once).
    auto: on a GPU for runs of at least 20M frames where there are triton and a C compiler, on a CPU for networks of at
    least half a million parameters where there is a C++ compiler. off: --backend auto takes eager on a CPU."""
    num_envs: EnvCount = 16
    """Emulators that step together. All of them act on the same network, so N changes results a little. auto: chosen
    from cores and device; the number chosen is what the run's config.yaml says."""
    num_threads: Count = 0
    """Threads of the network's arithmetic on a CPU; 0: all cores."""
    emulator_threads: Count = 0
    """Threads that step the emulators; 0: one per core. Changes no result."""
    run_dir: str | None = None
    """Directory of the run; default: runs/GAME-PARAM-PRESET-sSEED-TIME."""

    noop_max: Count = 30
    """At the start of an episode 0 … noop_max no-ops are played."""
    fire_reset: bool = False
    """Press FIRE at the start of an episode."""
    sticky_actions: float = 0.0
    """Probability that a frame repeats the previous action."""
    full_action_set: bool = False
    """All 18 actions instead of the game's minimal set."""
    max_frames_per_episode: Count = 0
    """Truncate an episode after so many emulator frames; 0: no cap."""
    life_loss_terminal: bool = True
    """Treat a lost life as the end of the episode in the learning target (the emulator plays on)."""
    reward_clip: float = 1.0
    """Clip rewards to ± this in learning; 0: don't. Scores are never clipped."""

    replay_capacity: Count = 1_000_000
    """Agent steps that the replay holds (7,056 bytes each)."""
    learning_starts: Count = 50_000
    """Agent steps of random play before the first update."""
    batch_size: Count = 64
    """Transitions per update."""
    update_period: Count = 4
    """Agent steps per update."""
    target_period: Count = 10_000
    """Agent steps between copies to the target network."""
    gamma: float = 0.99
    """Discount per agent step."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Huber loss summed or averaged over the minibatch; it matters only beside the optimizer's eps."""
    optimizer: Literal["adamax", "adam", "rmsprop_mnih"] = "adamax"
    """rmsprop_mnih is the centred RMSProp of Mnih et al. 2015."""
    learning_rate: float | None = None
    """Step size; default: the value of learning_rates for the parameterization."""
    learning_rates: dict[str, float] = field(default_factory=lambda: {"standard": 1e-4, "wn": 3e-4})
    """Learning rate by parameterization; one that is not listed takes that of standard."""
    optimizer_eps: float = 1e-8
    """The optimizer's epsilon."""
    adam_beta1: float = 0.5
    """Momentum of adamax and adam."""
    adam_beta2: float = 0.999
    """Decay of the gradient's scale in adamax and adam."""
    rmsprop_decay: float = 0.95
    """Decay of both running means in rmsprop_mnih."""

    epsilon_start: float = 1.0
    """Probability of a random action until learning_starts."""
    epsilon_end: float = 0.1
    """Probability of a random action after the decay."""
    epsilon_decay_steps: Count = 1_000_000
    """Agent steps of the linear decay, counted from learning_starts."""

    hidden_units: Count = 512
    """Units of the dense hidden layer."""
    weight_init: Literal["he", "torch", "normal"] | None = None
    """Initial weights: he (deep_q_rl's), torch (Torch7's, as Mnih et al. 2015) or normal (N(0, 0.05²), the draw of v
    before data-dependent initialization). Default: normal with data-dependent initialization, else he."""
    data_dependent_init: bool | None = None
    """Initialize scales and biases from replayed observations at learning_starts. Default: the parameterization's
    own choice (wn: yes, standard: no)."""
    init_samples: Count = 512
    """Observations for the data-dependent initialization."""
    output_init_std: float = 0.1
    """Standard deviation of the Q-values after the data-dependent initialization."""
    output_init: Literal["scaled", "literal"] = "scaled"
    """literal: the paper's rule applied to the output layer as to every other, a standard deviation of 1;
    scaled: output_init_std."""
    target_statistics: Literal["running", "batch"] = "running"
    """For parameterizations with batch statistics: those that the target network uses. batch: the minibatch's own, so
    its noise enters the targets."""
    joint_batches: bool = False
    """For parameterizations with batch statistics: observations and next observations share one batch, as in CrossQ,
    instead of being two."""

    evaluation_period: Count = 250_000
    """Agent steps between evaluations."""
    evaluation_steps: Count = 125_000
    """Agent steps per evaluation; only completed episodes count. 0: play evaluation_episodes instead."""
    evaluation_episodes: Count = 30
    """Episodes per evaluation where evaluation_steps is 0."""
    evaluation_epsilon: float = 0.05
    """Probability of a random action in evaluations."""
    evaluation_envs: Count = 16
    """Emulators per evaluation."""
    checkpoint_seconds: float = 600.0
    """Seconds between checkpoints; there is one at every evaluation as well."""
    checkpoint_period: Count = 0
    """Agent steps between checkpoints, besides those by time; 0: none."""
    journal: Literal["whole", "replay"] = "whole"
    """What is kept of what was played: everything (at most 0.8 MB per million agent steps), so that every training
    episode can be seen again, or what a resumed run needs to fill its replay."""
    reseed_period: Count = 100_000
    """Agent steps after which an emulator with sticky actions is seeded anew, at its next episode's start: a resumed
    run plays so many again before what its replay holds."""
    log_period: Count = 10_000
    """Agent steps between points of the TensorBoard curves."""

    @property
    def max_frames(self) -> int | None:
        """The frame cap of an episode, None for no cap."""
        return self.max_frames_per_episode or None


_FIELDS = {entry.name: entry for entry in fields(TrainConfig)}
_HINTS = get_type_hints(TrainConfig)

# key: (lowest, highest) value that makes sense; None for no bound.
_COUNT_RANGES: dict[str, tuple[int, int]] = {
    "frames": (1, 10**12),
    "seed": (0, 2**31 - 1),
    "num_envs": (1, 4096),
    "num_threads": (0, 1024),
    "emulator_threads": (0, 1024),
    "noop_max": (0, 10_000),
    "max_frames_per_episode": (0, 2**31 - 1),
    "replay_capacity": (1, 10**9),
    "learning_starts": (1, 10**12),
    "batch_size": (1, 2**20),
    "update_period": (1, 10**12),
    "target_period": (1, 10**12),
    "epsilon_decay_steps": (0, 10**12),
    "hidden_units": (1, 65_536),
    "init_samples": (2, 2**16),
    "evaluation_period": (1, 10**12),
    "evaluation_steps": (0, 10**12),
    "evaluation_episodes": (1, 10**6),
    "evaluation_envs": (1, 4096),
    "checkpoint_period": (0, 10**12),
    "reseed_period": (1, 10**12),
    "log_period": (1, 10**12),
}
_FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "sticky_actions": (0.0, 0.999),
    "reward_clip": (0.0, 1e9),
    "gamma": (0.0, 1.0),
    "learning_rate": (1e-12, 1e3),
    "optimizer_eps": (0.0, 1.0),
    "adam_beta1": (0.0, 0.99999999),
    "adam_beta2": (0.0, 0.99999999),
    "rmsprop_decay": (0.0, 0.99999999),
    "epsilon_start": (0.0, 1.0),
    "epsilon_end": (0.0, 1.0),
    "output_init_std": (1e-6, 1e6),
    "checkpoint_seconds": (0.0, 1e9),
    "evaluation_epsilon": (0.0, 1.0),
}


def coerce(key: str, value: object) -> Any:  # noqa: ANN401 - the type is that of the key
    """Return ``value``, as it came from YAML or JSON, as the type of configuration key ``key``.

    Raises:
        UsageError: it cannot be one.
    """
    hint = _HINTS[key]
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    wrong = UsageError(f"{key}: {value!r} is not {_describe(hint)}")
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or not isinstance(value, str):
            raise UsageError(f"{key}: {value!r} is not one of {', '.join(get_args(hint))}")
        return value
    if key == "param_options":
        if not isinstance(value, Mapping) or not all(
            isinstance(option, str | int | float) for option in value.values()
        ):
            raise UsageError(f"{key}: {value!r} is not a mapping from option to number or text")
        return {str(name): option for name, option in value.items()}
    if key == "param_layers":
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise UsageError(f"{key}: {value!r} is not a list of layer names")
        return tuple(value)
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return {str(name): _as_float(rate, wrong) for name, rate in value.items()}
    if key == "num_envs" and value == "auto":
        return AUTO
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if hint is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if hint is float:
        return _as_float(value, wrong)
    if isinstance(value, str):
        try:
            return parse_count(value)
        except ValueError:
            raise wrong from None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value
        or value in (math.inf, -math.inf)
    ):
        raise wrong
    if value != int(value):
        raise wrong
    return int(value)


def _as_float(value: object, wrong: UsageError) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise wrong from None


def _describe(hint: Any) -> str:  # noqa: ANN401 - a type hint
    names = {bool: "true or false", float: "a number", int: "a whole number", str: "a text"}
    return names.get(hint, "a mapping from parameterization to learning rate")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = getattr(key_node, "value", None)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the configuration keys of a YAML file, each of its type.

    Raises:
        UsageError: the file cannot be read, is no mapping, or holds an unknown key or a value of the wrong type.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a mapping of configuration keys to values")
    found = {}
    for key, value in values.items():
        if key not in _FIELDS:
            raise UsageError(f"{path}: unknown key '{key}'.{closest(str(key), _FIELDS)}")
        try:
            found[key] = coerce(key, value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return found


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets in ``configs/``."""
    return tuple(sorted(path.stem for path in PRESETS_DIR.glob("*.yaml")))


def load(preset: str | None = None, config_file: Path | None = None) -> TrainConfig:
    """Return the configuration of a preset with the keys of a file over it, not yet resolved.

    Args:
        preset: a name; None takes the file's ``preset`` key, or ``paper``.
        config_file: a YAML file of configuration keys.

    Raises:
        UsageError: an unknown preset, or see :func:`read_yaml`.
    """
    from_file = read_yaml(config_file) if config_file is not None else {}
    preset = preset or from_file.get("preset") or TrainConfig.preset
    if preset not in preset_names():
        raise UsageError(
            f"unknown preset '{preset}'.{closest(preset, preset_names())} There are: {', '.join(preset_names())}."
        )
    from_preset = read_yaml(PRESETS_DIR / f"{preset}.yaml")
    return replace(TrainConfig(), **(from_preset | from_file | {"preset": preset}))


def validate(config: TrainConfig) -> None:
    """Check every value's range and what must hold between keys.

    Raises:
        UsageError: the first thing that is wrong.
    """
    for key, (low, high) in _COUNT_RANGES.items():
        value = getattr(config, key)
        if not low <= value <= high and not (key == "num_envs" and is_auto(value)):
            raise UsageError(f"{key} must be from {low:,} to {high:,}, not {value:,}")
    for key, bounds in _FLOAT_RANGES.items():
        value = getattr(config, key)
        if value is not None and not bounds[0] <= value <= bounds[1]:
            raise UsageError(f"{key} must be from {bounds[0]:g} to {bounds[1]:g}, not {value:g}")
    for name, rate in config.learning_rates.items():
        slow, fast = _FLOAT_RANGES["learning_rate"]
        if not slow <= rate <= fast:
            raise UsageError(f"learning_rates: the value for '{name}' must be from {slow:g} to {fast:g}, not {rate:g}")
    if config.learning_rate is None and "standard" not in config.learning_rates | {config.param: 0.0}:
        raise UsageError(f"learning_rates has no value for '{config.param}' and none for 'standard'")
    if config.run_dir is not None and (not config.run_dir or "\0" in config.run_dir):
        raise UsageError(f"run_dir: {config.run_dir!r} is not the name of a directory")
    if config.replay_capacity < config.num_envs:
        raise UsageError(f"replay_capacity {config.replay_capacity:,} is less than num_envs {config.num_envs:,}")
    if config.learning_starts <= config.num_envs:
        raise UsageError(
            f"learning_starts {config.learning_starts:,} must be larger than num_envs {config.num_envs:,}: "
            "the replay would be empty at the first update"
        )


def resolve(config: TrainConfig, *, param_in_file: bool = False) -> TrainConfig:
    """Return the configuration with names made canonical and every choice of "the default" made.

    Device, precision and ``num_envs: auto`` are resolved where torch is loaded, in the training.

    Args:
        config: as the user gave it.
        param_in_file: the parameterization's name stands in a file, so it is nobody's typing mistake.

    Raises:
        UsageError: an unknown name, or see :func:`validate`.
        WnRlError: an unknown parameterization in a file.
    """
    if not config.game:
        raise UsageError("no game is named: add --game, e.g. --game Breakout")
    validate(replace(config, game=find_game(config.game).name))
    from wn_rl import parameterizations  # loads torch
    from wn_rl.networks import QNetworkSpec, layer_names, treated_names, unknown_in_file

    known = parameterizations.names()
    try:
        param = parameterizations.get(config.param).name
    except KeyError:
        if param_in_file:
            raise WnRlError(f"{unknown_in_file(config.param)}. There are: {', '.join(known)}.") from None
        raise UsageError(
            f"unknown parameterization '{config.param}'.{closest(config.param, known)} There are: {', '.join(known)}."
        ) from None
    try:
        entry = parameterizations.resolve(param, config.param_options)
    except ValueError as error:
        raise UsageError(f"param_options: {error}") from None
    convolutions = len(QNetworkSpec(1).convolutions)
    layers = config.param_layers
    if layers is None:
        layers = treated_names(entry, convolutions)
    there = layer_names(convolutions)
    for layer in layers:
        if not any(fnmatchcase(name, layer) for name in there):
            raise UsageError(
                f"param_layers: no layer matches '{layer}'.{closest(layer, there)} There are: {', '.join(there)}."
            )
    if not layers:
        raise UsageError(f"param_layers names no layer. There are: {', '.join(there)}.")
    from_data = config.data_dependent_init
    if from_data is None:
        from_data = entry.data_dependent_init
    if from_data and (problem := parameterizations.cannot_rescale(entry)):
        raise UsageError(f"data_dependent_init: {problem}")
    rate = config.learning_rate
    if rate is None:
        rate = config.learning_rates.get(param, config.learning_rates.get("standard"))
    return replace(
        config,
        game=find_game(config.game).name,
        param_options=entry.options(),
        param_layers=layers,
        data_dependent_init=from_data,
        weight_init=config.weight_init or ("normal" if from_data else "he"),
        learning_rate=rate,
    )


def import_parameterization(reference: str) -> None:
    """Import the module of ``module:Name``, so that the class in it is registered.

    It runs the module's code: use it on what a person typed, never on what stands in a file.

    Raises:
        UsageError: there is no such module or class.
    """
    from wn_rl import parameterizations

    try:
        parameterizations.load(reference)
    except ValueError as error:
        raise UsageError(f"--param {reference}: {one_line(error)}") from None


def to_yaml(config: TrainConfig) -> str:
    """Return the configuration as a YAML file that ``--config`` reads back to the same values."""
    values = {name: getattr(config, name) for name in _FIELDS}
    values["num_envs"] = "auto" if is_auto(config.num_envs) else config.num_envs
    values["param_layers"] = None if config.param_layers is None else list(config.param_layers)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def from_mapping(values: Mapping[str, object]) -> TrainConfig:
    """Return the configuration that a checkpoint carries; unknown and missing keys are refused.

    Raises:
        UsageError: the mapping is not a whole, valid configuration.
    """
    if unknown := [key for key in values if key not in _FIELDS]:
        raise UsageError(f"unknown configuration key '{unknown[0]}'")
    if missing := [key for key in _FIELDS if key not in values]:
        raise UsageError(f"the configuration key '{missing[0]}' is missing")
    config = replace(TrainConfig(), **{key: coerce(key, value) for key, value in values.items()})
    if is_auto(config.num_envs):
        raise UsageError("num_envs is 'auto', not the number that was chosen")
    validate(config)
    return config
