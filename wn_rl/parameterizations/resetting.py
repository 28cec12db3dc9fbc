"""Draw a layer's weights anew, whatever computes them: what ``reset_parameters()`` does on a treated layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from wn_rl.parameterizations.base import (
    RECURRENT,
    OutputNormalization,
    Parameterization,
    WeightParameterization,
    entry_of,
    note_entry,
    remove_normalization,
)

_RESET = "reset_parameters"


class ResetParameters:
    """In place of a treated layer's ``reset_parameters``, which would draw into tensors that are computed anew."""

    def __init__(self, layer: nn.Module) -> None:
        """Belong to ``layer``; a deep copy belongs to the copy."""
        self.layer = layer

    def __call__(self) -> None:
        """Draw the weights that the plain layer would draw, and write them in the layer's parameterization."""
        redraw(self.layer)


def watch_resets(layer: nn.Module) -> None:
    """Let ``layer.reset_parameters()`` do what it says; where its type has none, it still has none."""
    if hasattr(type(layer), _RESET):
        layer.__dict__[_RESET] = ResetParameters(layer)


def forget_resets(layer: nn.Module) -> None:
    """Give a layer that is plain again its own ``reset_parameters`` back."""
    layer.__dict__.pop(_RESET, None)


def redraw(layer: nn.Module, initialize: Callable[[nn.Module], object] | None = None) -> None:
    """Draw a layer's weights anew, in place: its parameters stay the ones that an optimizer trains.

    A plain layer of the same shapes is initialized and treated as ``layer`` is, and its state is copied: the same
    random numbers are drawn as for a plain layer, running statistics start anew, trained scales fit the new weights.

    Args:
        layer: treated or not.
        initialize: fills the plain layer's weight and bias; None: its own ``reset_parameters``.

    Raises:
        ValueError: the new weights are none that the layer's parameterization can write; nothing was changed.
    """
    entry = entry_of(layer)
    plain = copy.deepcopy(layer)
    forget_resets(plain)
    if entry is not None:
        _make_plain(plain, entry)
    (initialize or _own_reset)(plain)
    if entry is not None:
        entry.check(plain)
        entry.apply(plain)
    with torch.no_grad():
        layer.load_state_dict(plain.state_dict())


def _make_plain(layer: nn.Module, entry: Parameterization) -> None:
    """Take off what ``entry`` put on a layer whose values do not matter: also what :func:`wn_rl.fold` cannot."""
    ours = isinstance(entry, OutputNormalization | WeightParameterization)
    if ours and "normalization" in layer._modules:
        remove_normalization(layer)
    if ours and "parametrizations" in layer._modules:
        WeightParameterization().fold(layer)
    if not ours:
        entry.fold(layer)
    note_entry(layer, None)
    if isinstance(layer, RECURRENT):  # which draw in the order of their parameters
        names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else _CELL
        for name in [name for name in names if name in layer._parameters]:
            layer._parameters[name] = layer._parameters.pop(name)


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Parameters of a recurrent cell in their order."""


def _own_reset(layer: nn.Module) -> None:
    reset = getattr(type(layer), _RESET, None)
    if reset is None:
        raise ValueError(f"{type(layer).__name__} has no reset_parameters(): say how to initialize it")
    reset(layer)
