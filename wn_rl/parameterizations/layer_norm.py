"""Layer normalization of pre-activations (Ba et al. 2016), as PQN uses it (Gallici et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wn_rl.parameterizations.base import (
    Normalization,
    OutputNormalization,
    check_range,
    refuse_zero_weights,
    spatial_axes,
    transformed,
    units_of,
)
from wn_rl.parameterizations.registry import register


class PerExample(Normalization):
    """t̃ = γ · (t − μ) / √(σ² + ε) + b with μ and σ² of one example, over its units, or units and positions."""

    def __init__(
        self, bias: nn.Parameter | None, spatial_axes: int, units: int, eps: float, over: str, like: Tensor
    ) -> None:
        """Start with γ = 1, in the dtype of ``like``."""
        super().__init__(bias, spatial_axes)
        self.eps = eps
        self.over = over
        self.gain = nn.Parameter(torch.ones(units, dtype=like.dtype), requires_grad=like.requires_grad)

    def forward(self, t: Tensor) -> Tensor:
        """Return t̃, the shape of ``t``."""
        if transformed():
            return self._written_out(t)
        if self.over == "example" and self.spatial_axes:
            batched = t if self.unit_axis(t) == 1 else t.unsqueeze(0)
            return torch.group_norm(batched, 1, self.gain, self.bias, self.eps).view_as(t)
        axis = self.unit_axis(t)
        moved = t.movedim(axis, -1)
        return nn.functional.layer_norm(moved, moved.shape[-1:], self.gain, self.bias, self.eps).movedim(-1, axis)

    def _written_out(self, t: Tensor) -> Tensor:
        axis = self.unit_axis(t)
        axes = list(range(axis, t.dim())) if self.over == "example" else [axis]
        full = t.to(torch.promote_types(t.dtype, torch.float32))
        centred = full - full.mean(axes, keepdim=True)
        y = centred / (centred.square().mean(axes, keepdim=True) + self.eps).sqrt() * self.along_units(self.gain, t)
        y = y if self.bias is None else y + self.along_units(self.bias, t)
        return y.to(torch.promote_types(t.dtype, self.gain.dtype))

    def rescale(self, factor: Tensor) -> None:
        """Multiply γ."""
        self.gain.mul_(factor)


@register("ln")
@dataclass(frozen=True)
class LayerNormalization(OutputNormalization):
    """Layer normalization before the nonlinearity, with gain γ and bias b per unit; not on the output layer.

    Its statistics are those of a single example: no noise from the minibatch, but they change with every input, so
    it cannot be folded into the weights.

    Attributes:
        over: ``example``: all units and positions of a convolution together, as in CleanRL's PQN; ``units``: the units
            at each position separately, as flax's layer does in the authors' PQN.
        eps: inside the square root; 1e-5 is torch's, 1e-6 flax's.
    """

    over: Literal["example", "units"] = "example"
    eps: float = 1e-5

    preserves_output = False
    foldable = False
    default_layers = "hidden"

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("eps", self.eps, 0.0, 1.0)

    def validate(self, layer: nn.Module) -> None:
        """Refuse, beyond the common checks, a weight that is zero where ε is: so is σ² of every example."""
        super().validate(layer)
        if self.eps == 0.0:
            refuse_zero_weights(layer, whole=True)

    def normalization(self, layer: nn.Module, bias: nn.Parameter | None) -> Normalization:
        """Return γ · (t − μ) / √(σ² + ε) + b."""
        return PerExample(bias, spatial_axes(layer), units_of(layer), self.eps, self.over, next(layer.parameters()))
