"""Default values that follow from other keys: those that depend on the game and on the parameterization."""

from __future__ import annotations

import warnings
from dataclasses import replace
from fnmatch import fnmatchcase

from wn_rl.atari.games import find_game
from wn_rl.config.train_config import TrainConfig, validate
from wn_rl.errors import UsageError, WnRlError, closest, one_line
from wn_rl.output import notice


def resolve(config: TrainConfig, *, param_in_file: bool = False) -> TrainConfig:
    """Return the configuration with canonical names and every default value filled in.

    Device, precision and ``num_envs: auto`` are resolved when training starts, where torch is loaded.

    Args:
        config: as the user wrote it.
        param_in_file: the parameterization's name is in a file, so it is not a typing mistake.

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
        parameterization = parameterizations.resolve(param, config.param_options)
    except ValueError as error:
        raise UsageError(f"param_options: {error}") from None
    convolutions = len(QNetworkSpec(1).convolutions)
    layers = config.param_layers
    if layers is None:
        layers = treated_names(parameterization, convolutions)
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
        from_data = parameterization.data_dependent_init
    if from_data and (problem := parameterizations.cannot_rescale(parameterization)):
        raise UsageError(f"data_dependent_init: {problem}")
    rate = config.learning_rate
    if rate is None:
        rate = config.learning_rates.get(param, config.learning_rates.get("standard"))
    return replace(
        config,
        game=find_game(config.game).name,
        param_options=parameterization.options(),
        param_layers=layers,
        data_dependent_init=from_data,
        weight_init=config.weight_init or ("normal" if from_data else "he"),
        learning_rate=rate,
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
