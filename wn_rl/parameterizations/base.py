"""What a parameterization is: how one layer's weight is written in terms of trained parameters."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layer types that :func:`wn_rl.reparameterize` knows how to treat: output units lie on weight axis 0."""


class Parameterization:
    """One way of writing the weights of a layer.

    Subclass it, decorate the class with :func:`wn_rl.parameterizations.register` and its name works everywhere
    a name is accepted. An instance holds options, never a layer's state: that lives in the layer itself, so
    ``state_dict`` and ``deepcopy`` of the model carry all of it.
    """

    name: ClassVar[str] = ""
    """Set by :func:`register`."""

    batch_independent: ClassVar[bool] = True
    """Whether, in training mode, an example's output is independent of the other examples of the minibatch."""

    data_dependent_init: ClassVar[bool] = False
    """Whether the entry's source initializes it from data (Salimans & Kingma 2016, section 3)."""

    def apply(self, layer: nn.Module) -> None:
        """Reparameterize ``layer`` in place. Its output must not change."""
        raise TypeError(f"{type(self).__name__} does not say how it treats a layer")

    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply the layer's weight by ``factor`` per output unit, in place.

        Data-dependent initialization uses it to give each pre-activation its scale.

        Args:
            layer: a layer that :meth:`apply` has treated.
            factor: positive, shape ``(output units,)``, the weight's dtype and device.
        """
        raise TypeError(f"{type(self).__name__} has no scale to initialize from data")


def per_output(factor: Tensor, weight: Tensor) -> Tensor:
    """Reshape ``(output units,)`` so that it broadcasts along axis 0 of ``weight``."""
    return factor.reshape(-1, *([1] * (weight.dim() - 1)))


@torch.no_grad()
def plain_weight_rescale(layer: nn.Module, factor: Tensor) -> None:
    """Scale a layer whose ``weight`` is an ordinary parameter, in place."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.mul_(per_output(factor, weight))
