"""Weight normalization: w = g · v / ‖v‖ (Salimans & Kingma 2016, section 2, equation 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wn_rl.parameterizations.base import Parameterization, per_output
from wn_rl.parameterizations.registry import register


class WeightNormalized(nn.Module):
    """Compute w = g · v / ‖v‖ with one g per output unit; ‖·‖ runs over every axis but the first.

    No epsilon in the norm, as in the authors' code. Plugs into ``torch.nn.utils.parametrize``, under which g is
    ``parametrizations.weight.original0``, shape ``(output units, 1, …)``, and v is ``…original1``, the shape of w.
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return w, the shape of ``v``."""
        return torch._weight_norm(v, g, 0)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (g, v) = (‖w‖, w), so that the layer's output does not change."""
        return torch.norm_except_dim(w, 2, 0), w.clone(memory_format=torch.preserve_format)


def direction_and_scale(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a weight-normalized layer's trained parameters (v, g).

    Raises:
        TypeError: the layer is not weight-normalized.
    """
    if parametrize.is_parametrized(layer, "weight"):
        slot = layer.parametrizations["weight"]  # type: ignore[index]
        if isinstance(slot, parametrize.ParametrizationList) and isinstance(slot[0], WeightNormalized):
            g, v = slot.original0, slot.original1
            assert isinstance(g, Tensor)
            assert isinstance(v, Tensor)
            return v, g
    raise TypeError(f"{type(layer).__name__} is not weight-normalized")


@register("wn")
class WeightNormalization(Parameterization):
    """Train g and v of w = g · v / ‖v‖: length and direction of each unit's weights apart.

    Uses no batch statistics, so the Q-value of a state never depends on the other states of a minibatch. The
    paper pairs it with data-dependent initialization (section 3), on here unless switched off.
    """

    data_dependent_init = True

    def apply(self, layer: nn.Module) -> None:
        """Replace ``weight`` by (g, v) = (‖w‖, w).

        Raises:
            ValueError: the layer is parametrized already, or a unit's weights are all zero and have no direction.
        """
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"the weight of {type(layer).__name__} is parametrized already")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if bool((weight.detach().flatten(1).abs().amax(1) == 0).any()):
            raise ValueError(f"a unit of {type(layer).__name__} has only zero weights, so v / ‖v‖ is not defined")
        parametrize.register_parametrization(layer, "weight", WeightNormalized())

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply g by ``factor``; v keeps its length, which sets how fast its direction turns."""
        _, g = direction_and_scale(layer)
        g.mul_(per_output(factor, g))
