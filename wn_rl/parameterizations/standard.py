"""The normal parameterization: the weight itself is trained."""

from __future__ import annotations

from torch import Tensor, nn

from wn_rl.parameterizations.base import Parameterization, plain_weight_rescale
from wn_rl.parameterizations.registry import register


@register("standard")
class Standard(Parameterization):
    """Train w directly: the baseline ("normal parameterization") of Salimans & Kingma 2016.

    Not initialized from data unless asked: whether the paper's deep RL baseline was, is not known.
    """

    def apply(self, layer: nn.Module) -> None:
        """Leave the layer as it is."""

    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply w by ``factor`` per output unit."""
        plain_weight_rescale(layer, factor)
