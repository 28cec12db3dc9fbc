"""From a spec to a network: built, and tried out before a run depends on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wn_rl.errors import CheckpointError, one_line
from wn_rl.networks import registry
from wn_rl.networks.base import Network
from wn_rl.networks.spec import QNetworkSpec
from wn_rl.parameterizations import initialize_from_data, reparameterize
from wn_rl.parameterizations.api import treated_layers

TRIAL_EXAMPLES = 8
"""Observations on which a network is tried out."""


@contextmanager
def _drawn_with(seed: int) -> Iterator[None]:
    """Draw with ``seed`` and leave the global generators as they were."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


def build_q_network(spec: QNetworkSpec, *, seed: int) -> Network:
    """Build the network that ``spec`` describes, initialized with ``seed`` and not with the global generator.

    Raises:
        CheckpointError: it cannot be built, or its parameterization treats no such layer, or cannot treat it.
    """
    with _drawn_with(seed):
        try:
            network = registry.make(spec)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        network.initialize_layers()
        try:
            entry = spec.entry()
            reparameterize(
                network, entry, include=network.default_layers(entry) if spec.layers is None else spec.layers
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"parameterization '{spec.parameterization}': {error}") from None
    return network


def output_deviations(network: Network, std: float) -> dict[str, float] | None:
    """Return the standard deviation that data-dependent initialization gives to each parameterized output layer.

    None where there is no such layer: what :func:`wn_rl.initialize_from_data` takes as ``std_of``.
    """
    treated = treated_layers(network)
    return {name: std for name in network.output_layers if name in treated} or None


def try_out(spec: QNetworkSpec, *, data_dependent_init: bool) -> None:
    """Find out whether a run can be made with the network that ``spec`` describes; takes about one forward pass.

    Raises:
        ValueError: it cannot; the message says why.
    """
    try:
        network = build_q_network(spec, seed=0)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    generator = torch.Generator().manual_seed(0)
    shape = (TRIAL_EXAMPLES, *spec.observation_shape)
    observations = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    called = f"the network '{spec.network}'"
    if missing := [name for name in network.output_layers if name not in network.layer_names()]:
        raise ValueError(
            f"{called} has no layer '{missing[0]}': make the layer that gives the Q-values in its __init__, or name it "
            "in output_layers"
        )
    with _drawn_with(0), torch.no_grad():
        before = torch.get_rng_state()
        try:
            network.train()(observations)
            network.eval()
            features = network.features(observations)
            one, several = network(observations[:1]), network(observations)
            copy.deepcopy(network)
        except Exception as error:  # noqa: BLE001 - somebody else's code may raise anything
            raise ValueError(f"{called} cannot compute Q-values: {type(error).__name__}: {one_line(error)}") from None
        if not torch.equal(torch.get_rng_state(), before):
            raise ValueError(f"{called} draws random numbers in a forward pass, which a resumed run could not repeat")
        if not (isinstance(features, Tensor) and features.dim() == 2 and len(features) == TRIAL_EXAMPLES):
            raise ValueError(f"{called}: features() gives {_shown(features)}, not ({TRIAL_EXAMPLES}, features)")
        for values, count in ((one, 1), (several, TRIAL_EXAMPLES)):
            if not (isinstance(values, Tensor) and tuple(values.shape) == (count, spec.num_actions)):
                raise ValueError(
                    f"{called} gives {_shown(values)} for {count} observations and {spec.num_actions} actions, not "
                    f"({count}, {spec.num_actions})"
                )
        if not data_dependent_init:
            return
        try:
            initialize_from_data(network, observations, std_of=output_deviations(network, 0.1))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{called} cannot be initialized from data: {error}; --data-dependent-init False does without"
            ) from None


def _shown(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
