"""Default values that follow from other keys: from the game, the parameterization and the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from wn_rl.atari.games import find_game
from wn_rl.config.train_config import TrainConfig, validate
from wn_rl.errors import CheckpointError, UsageError, WnRlError, closest, one_line
from wn_rl.output import notice

if TYPE_CHECKING:
    from wn_rl.networks import QNetworkSpec


TRIAL_ACTIONS = 3
"""Actions of the network that is tried out: no game has so many, so a network must take its number from the spec."""


def resolve(config: TrainConfig, *, param_in_file: bool = False, network_in_file: bool = False) -> TrainConfig:
    """Return the configuration with canonical names and every default value filled in.

    Device, precision and ``num_envs: auto`` are resolved when training starts, where torch is loaded.

    Args:
        config: as the user wrote it.
        param_in_file: the parameterization's name is in a file, so it is not a typing mistake.
        network_in_file: the same for the network's name.

    Raises:
        UsageError: an unknown name, a user's own network that cannot be used, or see :func:`validate`.
        WnRlError: an unknown parameterization or network in a file.
    """
    if not config.game:
        raise UsageError("no game is named: add --game, e.g. --game Breakout")
    validate(replace(config, game=find_game(config.game).name))
    from wn_rl import networks, parameterizations  # loads torch

    param = _known(
        "parameterization",
        config.param,
        parameterizations.names(),
        lambda name: parameterizations.get(name).name,
        networks.unknown_in_file if param_in_file else None,
    )
    try:
        parameterization = parameterizations.resolve(param, config.param_options)
    except ValueError as error:
        raise UsageError(f"param_options: {error}") from None
    _known(
        "network",
        config.network,
        networks.names(),
        lambda name: networks.get(name).name,
        networks.unknown_network_in_file if network_in_file else None,
    )
    try:
        network_options = networks.options(networks.get(config.network), config.network_options)
    except ValueError as error:
        raise UsageError(f"network_options: {error}") from None
    config = replace(config, network_options=network_options)
    try:
        outline = network_spec(config, TRIAL_ACTIONS).outline()
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    layers = config.param_layers
    if layers is None:
        layers = outline.default_layers(parameterization)
    there = outline.layer_names()
    for layer in layers:
        if not any(fnmatchcase(name, layer) for name in there):
            raise UsageError(
                f"param_layers: no layer matches '{layer}'.{closest(layer, there)} There are: {', '.join(there)}."
            )
    if not layers:
        raise UsageError(f"param_layers names no layer. There are: {', '.join(there)}.")
    from_data = config.data_dependent_init
    if from_data is None:
        from_data = parameterization.data_dependent_init
    if from_data and (problem := parameterizations.cannot_rescale(parameterization)):
        raise UsageError(f"data_dependent_init: {problem}")
    rate = config.learning_rate
    if rate is None:
        rate = config.learning_rates.get(param, config.learning_rates.get("standard"))
    config = replace(
        config,
        game=find_game(config.game).name,
        param_options=parameterization.options(),
        param_layers=layers,
        data_dependent_init=from_data,
        weight_init=config.weight_init or ("normal" if from_data else "he"),
        learning_rate=rate,
    )
    if config.network != networks.NATURE:
        try:
            networks.try_out(network_spec(config, TRIAL_ACTIONS), data_dependent_init=from_data)
        except ValueError as error:
            raise UsageError(one_line(error)) from None
    return config


def _known(
    what: str,
    name: str,
    known: Collection[str],
    canonical: Callable[[str], str],
    unknown_in_file: Callable[[str], str] | None,
) -> str:
    """Return the registered name of a parameterization or a network.

    Raises:
        UsageError: there is none.
        WnRlError: there is none, and the name stands in a file.
    """
    try:
        return canonical(name)
    except KeyError:
        if unknown_in_file is not None:
            raise WnRlError(f"{unknown_in_file(name)}. There are: {', '.join(known)}.") from None
        raise UsageError(f"unknown {what} '{name}'.{closest(name, known)} There are: {', '.join(known)}.") from None


def network_spec(config: TrainConfig, num_actions: int) -> QNetworkSpec:
    """Return what describes the Q-network of a configuration, for so many actions."""
    from wn_rl.networks import QNetworkSpec

    return QNetworkSpec(
        num_actions,
        config.param,
        options=config.param_options,
        layers=config.param_layers,
        hidden_units=config.hidden_units,
        weight_init=config.weight_init or "he",
        network=config.network,
        network_options=config.network_options,
    )


def import_parameterization(reference: str) -> None:
    """Import the module of ``module:Name``, so that the class in it is registered.

    It runs the module's code: use it on what the user typed, never on a name from a file.

    Raises:
        UsageError: there is no such module or class.
    """
    from wn_rl import parameterizations
    from wn_rl.parameterizations.former_names import FormerNameWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parameterizations.load(reference)
        except ValueError as error:
            raise UsageError(f"--param {reference}: {one_line(error)}") from None
    for warning in caught:
        if issubclass(warning.category, FormerNameWarning):
            notice(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def import_network(reference: str) -> None:
    """Import the module of ``module:Name``, so that the network in it is registered.

    It runs the module's code: use it on what the user typed, never on a name from a file.

    Raises:
        UsageError: there is no such module or class.
    """
    from wn_rl import networks

    try:
        networks.load(reference)
    except ValueError as error:
        raise UsageError(f"--network {reference}: {one_line(error)}") from None
