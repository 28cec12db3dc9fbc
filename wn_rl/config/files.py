"""Presets, YAML files and mappings: sources of configuration keys, each value read as its type."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from wn_rl.atari.games import find_game
from wn_rl.config import renamed
from wn_rl.config.flags import AUTO, is_auto, parse_count
from wn_rl.config.synonyms import suggestion
from wn_rl.config.train_config import TrainConfig, validate
from wn_rl.errors import UsageError, WnRlError, closest, one_line
from wn_rl.layout import PRESETS_DIR
from wn_rl.output import notice

FIELDS = {entry.name: entry for entry in fields(TrainConfig)}
_HINTS = get_type_hints(TrainConfig)


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
    if key in ("param_options", "network_options"):
        if not isinstance(value, Mapping) or not all(
            isinstance(option, str | int | float) for option in value.values()
        ):
            raise UsageError(f"{key}: {value!r} is not a mapping from option to number or text")
        return {str(name): option for name, option in value.items()}
    if key in ("param_layers", "chosen"):
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            what = "layer names" if key == "param_layers" else "configuration keys"
            raise UsageError(f"{key}: {value!r} is not a list of {what}")
        if key == "chosen" and (unknown := [name for name in value if name not in FIELDS]):
            raise UsageError(f"chosen: there is no configuration key {unknown[0]!r}")
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
    """A safe loader that refuses a duplicate key."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = getattr(key_node, "value", None)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' appears twice", key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path, *, notices: bool = True) -> dict[str, Any]:
    """Return the configuration keys of a YAML file, each of its type.

    Args:
        path: the file.
        notices: print one line if a key or a value has another name now.

    Raises:
        UsageError: the file cannot be read, is not a mapping, or holds an unknown key or a value of the wrong type.
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
    values, told = renamed.current(values)
    if told and notices:
        notice(f"{path}: {told}")
    found = {}
    for key, value in values.items():
        if key not in FIELDS:
            raise UsageError(f"{path}: unknown key '{key}'.{suggestion(str(key), FIELDS)}")
        try:
            found[key] = coerce(key, value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return found


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets in ``configs/``."""
    return tuple(sorted(path.stem for path in PRESETS_DIR.glob("*.yaml")))


def _preset(name: str) -> dict[str, Any]:
    """Return the keys of a preset.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in preset_names():
        raise UsageError(
            f"unknown preset '{name}'.{closest(name, preset_names())} There are: {', '.join(preset_names())}."
        )
    return read_yaml(PRESETS_DIR / f"{name}.yaml") | {"preset": name}


FROM_PARAM = ("param_options", "network_options", "param_layers", "data_dependent_init", "weight_init", "learning_rate")
"""Keys that follow from parameterization and network unless the user chose them, see :func:`wn_rl.config.resolve`."""
FROM_MACHINE = ("device", "backend", "compile")
"""Keys that follow from the machine unless the user chose them."""
UNSAID = ("network", "network_options")
"""Keys that files omit at their defaults unless the user chose them: such files equal those of earlier versions."""
_NEWER = frozenset({"backend", "chosen", *UNSAID})
"""Keys that the config.yaml of a run of earlier versions lacks."""


def load(preset: str | None = None, config_file: Path | None = None) -> TrainConfig:
    """Return the configuration of a preset with the keys of a file over it, not yet resolved.

    In a run's config.yaml, keys that were derived from the run's parameterization or machine are left open, so that
    they are derived again, with the same result unless one of these has changed. With another preset only chosen keys
    stay.

    Args:
        preset: a name; None takes the file's ``preset`` key, or ``paper``.
        config_file: a YAML file of configuration keys.

    Raises:
        UsageError: an unknown preset, or see :func:`read_yaml`.
    """
    from_file = read_yaml(config_file) if config_file is not None else {}
    name = preset or from_file.get("preset") or TrainConfig.preset
    values = _preset(name)
    of_a_run = FIELDS.keys() - _NEWER <= from_file.keys()
    if not of_a_run:
        chosen = set(from_file)
    elif "chosen" in from_file:
        chosen = set(from_file["chosen"])
    else:
        chosen = _inferred(from_file)
    if of_a_run and name != from_file["preset"]:
        values |= {key: value for key, value in from_file.items() if key in chosen}
    else:
        derived = {*FROM_PARAM, *FROM_MACHINE} - chosen if of_a_run else set()
        values |= {key: value for key, value in from_file.items() if key not in derived}
    chosen = (chosen | ({"preset"} if preset else set())) - {"chosen", "run_dir"}
    return replace(TrainConfig(), **(values | {"preset": name, "chosen": tuple(sorted(chosen))}))


def recorded(config_file: Path) -> TrainConfig:
    """Return the configuration in a run's config.yaml, every key as it is there: to report a run, not to repeat it.

    Raises:
        UsageError: see :func:`read_yaml`, or an unknown preset.
    """
    from_file = read_yaml(config_file, notices=False)
    return replace(TrainConfig(), **(_preset(from_file.get("preset") or TrainConfig.preset) | from_file))


def _inferred(from_file: Mapping[str, Any]) -> set[str]:
    """Return the keys that were probably chosen, for a config.yaml without ``chosen``: those unlike the derived values.

    Keys that follow from the machine cannot be distinguished from chosen ones, and count as derived.
    """
    from wn_rl.config.resolving import resolve

    values = _preset(str(from_file["preset"]))
    names = {key: from_file[key] for key in ("game", "param")}
    try:
        derived = resolve(replace(TrainConfig(), **(values | names)))
    except WnRlError:  # e.g. a parameterization that is not imported: then nothing is derived from it
        return set(from_file) - _NEWER
    differs = {key for key, value in from_file.items() if value != getattr(derived, key)}
    if from_file["param"] != values.get("param", TrainConfig.param):
        differs.add("param")
    return (differs | {"game"}) - {*FROM_MACHINE, "precision"}


def configure(
    preset: str | None = None, config_file: Path | None = None, given: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, str]:
    """Return the configuration of a preset, overridden by a file and by single keys, not yet resolved.

    Args:
        preset: see :func:`load`.
        config_file: see :func:`load`.
        given: keys that the user chose now, of the right types; ``auto`` chooses nothing.

    Returns:
        The configuration, and one line on which keys of a run's file are kept with another parameterization, preset or
        game; empty if none of these changes.

    Raises:
        UsageError: see :func:`load`.
    """
    given = dict(given or {})
    base = load(preset, config_file)
    before = read_yaml(config_file) if config_file is not None else {}
    turned = {**given, **({"preset": preset} if preset else {})}
    changed = [key for key in ("game", "param", "network", "preset") if key in turned and _differs(key, turned, before)]
    stays = [key for key in base.chosen if key not in turned]
    if "param" in changed and "param_options" in stays:  # options are a parameterization's own
        base = replace(base, param_options={})
        stays.remove("param_options")
    if "network" in changed and "network_options" in stays:
        base = replace(base, network_options={})
        stays.remove("network_options")
    open_now = {key for key, value in given.items() if value == "auto" or is_auto(value)}
    chosen = {*stays, *turned} - open_now - {"run_dir"}
    config = replace(base, **given, chosen=tuple(sorted(chosen)))
    of_a_run = FIELDS.keys() - _NEWER <= before.keys()
    if not (changed and of_a_run):
        return config, ""
    source = "as chosen there" if "chosen" in before else "which are no defaults there"
    told = f"kept, {source}: {_named(stays, config)}" if stays else "nothing is kept"
    return config, f"{config_file}: {told}; the rest follows from {_named(changed, config)}"


def _differs(key: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    if key == "network":
        return FIELDS.keys() - _NEWER <= before.keys() and now[key] != before.get(key, TrainConfig.network)
    if key not in before:
        return False
    if key == "game":
        return find_game(now[key]).name != find_game(before[key]).name
    return bool(now[key] != before[key])


def _named(keys: Sequence[str], config: TrainConfig) -> str:
    return ", ".join(f"{key} {getattr(config, key)}" for key in keys)


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as a checkpoint carries it, for :func:`from_mapping`."""
    values = {name: getattr(config, name) for name in FIELDS}
    defaults = TrainConfig()
    for key in UNSAID:
        if key not in config.chosen and values[key] == getattr(defaults, key):
            del values[key]
    return values


def to_yaml(config: TrainConfig) -> str:
    """Return the configuration as a YAML file that ``--config`` reads back to the same values."""
    values = to_mapping(config)
    values["num_envs"] = "auto" if is_auto(config.num_envs) else config.num_envs
    values["param_layers"] = None if config.param_layers is None else list(config.param_layers)
    values["chosen"] = list(config.chosen)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def from_mapping(values: Mapping[str, object]) -> TrainConfig:
    """Return the configuration that a checkpoint carries; unknown and missing keys are refused, but for :data:`UNSAID`.

    Raises:
        UsageError: the mapping is not a complete, valid configuration.
    """
    if unknown := [key for key in values if key not in FIELDS]:
        raise UsageError(f"unknown configuration key '{unknown[0]}'")
    if missing := [key for key in FIELDS if key not in values and key not in UNSAID]:
        raise UsageError(f"the configuration key '{missing[0]}' is missing")
    config = replace(TrainConfig(), **{key: coerce(key, value) for key, value in values.items()})
    if is_auto(config.num_envs):
        raise UsageError("num_envs is 'auto', not the number that was chosen")
    validate(config)
    return config
