"""Weights projected to unit norm after each optimizer step (Lyle et al. 2024; Palenicek et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wn_rl.parameterizations.base import (
    Units,
    WeightParameterization,
    refuse_zero_length,
    refuse_zero_weights,
    weight_names,
)
from wn_rl.parameterizations.registry import register


class Projected(nn.Module):
    """Compute w = g · v, where the projection keeps ‖v‖ = 1 per output unit; without g, w = v."""

    def __init__(self, units: Units, *, has_scale: bool) -> None:
        """Set where the units are and whether g is trained."""
        super().__init__()
        self.units = units
        self.has_scale = has_scale

    def forward(self, *trained: Tensor) -> Tensor:
        """Return w from (g, v), or from v alone."""
        return self.units.scale(trained[1], trained[0]) if self.has_scale else trained[0]

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Return (‖w‖, w / ‖w‖), or the second alone."""
        norm = self.units.norm(w)
        refuse_zero_length(norm)
        v = self.units.scale(w, 1 / norm)
        if self.units.groups > 1:  # no more axes than the weight has, or .to(memory_format=...) would refuse
            norm = norm.flatten()
        return (norm, v) if self.has_scale else v


@register("wn_projected")
@dataclass(frozen=True)
class ProjectedWeights(WeightParameterization):
    """Keep each unit's weight vector v at norm 1 by projecting it back after every optimizer step; w = g · v.

    Not the mechanism of ``wn``. There v is free and the division by ‖v‖ is part of the function: its gradient has no
    component along v, so under plain gradient descent ‖v‖ can only grow, and the effective learning rate 1/‖v‖² falls.
    Here the function is linear in v, the gradient may have a component along v, and the projection removes that part
    after the step; ‖v‖ and with it the effective learning rate stay constant. In both sources a normalization layer
    follows, which has the scale; without one a g is needed. The output layer is left plain, as in Palenicek et al.

    Call :func:`wn_rl.project` after each optimizer step, or once
    ``optimizer.register_step_post_hook(lambda *_: project(model))``.

    Attributes:
        g: ``direct``: one trained g per unit, at first the length of its weights; ``none``: unit-norm weights alone, as
            in the sources; only sensible where a normalization layer follows.
    """

    g: Literal["direct", "none"] = "direct"

    projects = True
    default_layers = "hidden"

    def validate(self, layer: nn.Module) -> None:
        """Refuse, beyond the common checks, a unit whose weights are all zero: it has no direction."""
        super().validate(layer)
        refuse_zero_weights(layer)

    def make_parametrization(self, units: Units, weight: Tensor) -> nn.Module:
        """Return w = g · v."""
        return Projected(units, has_scale=self.g == "direct")

    def apply(self, layer: nn.Module) -> None:
        """Replace each weight by its norm and its direction."""
        super().apply(layer)
        self.project(layer)

    @torch.no_grad()
    def project(self, layer: nn.Module) -> None:
        """Divide v by its norm, per output unit; a v of norm 0 has no direction and stays."""
        for name in weight_names(layer):
            if not parametrize.is_parametrized(layer, name):
                continue  # removed by torch's remove_parametrizations()
            v = self._direction(layer, name)
            norm = Units.of(layer).norm(v)
            v.copy_(Units.of(layer).scale(v, torch.where(norm == 0, 1.0, 1 / norm)))

    def _direction(self, layer: nn.Module, name: str) -> Tensor:
        slot = layer.parametrizations[name]  # type: ignore[index]
        assert isinstance(slot, parametrize.ParametrizationList)
        v = slot.original1 if self.g == "direct" else slot.original
        assert isinstance(v, Tensor)
        return v

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply g by ``factor``."""
        if self.g == "none":
            super().rescale(layer, factor)
        g = layer.parametrizations["weight"].original0  # type: ignore[index,union-attr]
        assert isinstance(g, Tensor)
        g.mul_(factor.reshape(g.shape))
