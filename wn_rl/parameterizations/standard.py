"""The normal parameterization: the weight itself is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wn_rl.parameterizations.base import Parameterization, Units, weight_names
from wn_rl.parameterizations.registry import register


@register("standard")
class Standard(Parameterization):
    """Train w directly: the baseline ("normal parameterization") of Salimans & Kingma 2016.

    Not initialized from data unless asked. In the authors' image code the baseline was; whether the paper's deep RL
    baseline was, is not known.
    """

    foldable = True
    leaves_plain = True
    dtypes = None

    def apply(self, layer: nn.Module) -> None:
        """Leave the layer as it is."""

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply w by ``factor`` per output unit."""
        for name in weight_names(layer):
            weight = getattr(layer, name)
            weight.copy_(Units.of(layer).scale(weight, factor))

    def fold(self, layer: nn.Module) -> None:
        """Leave the layer as it is."""
