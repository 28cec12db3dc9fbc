"""Weight normalization: w = g · v / ‖v‖ (Salimans & Kingma 2016, section 2, equation 2).

The gradients of g and v (equation 3) are those of torch's function of the same name, :func:`normalized`; of a large
dense layer they are in ``weight_norm_linear.py``, and in the CPU kernels in ``csrc/weight_norm.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wn_rl.parameterizations.base import (
    Units,
    WeightParameterization,
    refuse_zero_length,
    refuse_zero_weights,
    transformed,
    weight_names,
)
from wn_rl.parameterizations.registry import register
from wn_rl.parameterizations.torch_weights import accept_older_weight_norm
from wn_rl.parameterizations.weight_norm_linear import scaled_linear

LARGE = 2**16
"""Number of weights from which scaling a dense layer's outputs is faster than computing w (measured on a CPU)."""

Scale = Literal["direct", "exp"]


def _norm(v: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)
    return norm


_Gradients = tuple[Tensor | None, ...]


def _gradients_for_second_derivatives(v: Tensor, g: Tensor, found: _Gradients, dw: _Gradients) -> _Gradients | None:
    """Replace torch's gradients of v and g if they are differentiated again: torch treats ‖v‖ as a constant."""
    if not torch.is_grad_enabled() or dw[0] is None:
        return None
    norm = _norm(v)
    dg = (dw[0] * v).sum(tuple(range(1, v.dim())), keepdim=True) / norm  # equation 3 of the paper
    dv = (dw[0] - v * (dg / norm)) * (g / norm)
    return None if found[0] is None else dv, None if found[1] is None else dg


def normalized(v: Tensor, g: Tensor) -> Tensor:
    """Return g · v / ‖v‖, ‖·‖ over all but the first axis of ``v``; ``g`` has size 1 there.

    It may be differentiated any number of times, in forward and reverse mode.
    """
    exporting = torch.compiler.is_exporting()
    if transformed() or (torch.compiler.is_compiling() and not exporting):
        # Elementary operations are fused with the kernels around them; torch's own function is not.
        return v * (g / _norm(v))
    w = torch._weight_norm(v, g, 0)
    # For dtypes without a kernel torch uses elementary operations, whose gradients are right.
    if w.grad_fn is not None and not exporting and w.grad_fn.name().startswith("WeightNormInterface"):
        w.grad_fn.register_hook(
            partial(_gradients_for_second_derivatives, v, g)
        )  # an autograd function of our own would cost more
    return w


class WeightNormalized(nn.Module):
    """Compute w = g · v / ‖v‖ with one g per output unit; ‖·‖ runs over every other axis.

    No epsilon in the norm, as in the authors' code. Plugs into ``torch.nn.utils.parametrize``, under which g is
    ``parametrizations.weight.original0``, shape ``(output units, 1, …)`` (its logarithm where ``exponential``), and v
    is ``…original1``, the shape of w.
    """

    def __init__(self, units: Units, *, exponential: bool = False) -> None:
        """Set where the units are, and whether log g is trained instead of g."""
        super().__init__()
        self.units = units
        self.exponential = exponential

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Return w, the shape of ``v``."""
        if self.exponential:
            g = g.exp()
        if not self.units.transposed:
            return normalized(v, g)
        return self.units.scale(v, self.units.shaped(g, v) / self.units.norm(v))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (g, v) = (‖w‖, w), so that the layer's output does not change."""
        g = self.units.norm(w)
        refuse_zero_length(g)
        if self.units.groups > 1:  # no more axes than the weight has, or .to(memory_format=...) would refuse
            g = g.flatten()
        return g.log() if self.exponential else g, w.clone(memory_format=torch.preserve_format)


def direction_and_scale(layer: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Return a weight-normalized layer's trained parameters (v, g); g is log g where that is trained.

    Raises:
        TypeError: the layer is not weight-normalized.
    """
    if parametrize.is_parametrized(layer, name):
        slot = layer.parametrizations[name]  # type: ignore[index]
        if isinstance(slot, parametrize.ParametrizationList) and isinstance(slot[0], WeightNormalized):
            g, v = slot.original0, slot.original1
            assert isinstance(g, Tensor)
            assert isinstance(v, Tensor)
            return v, g
    raise TypeError(f"{type(layer).__name__} is not weight-normalized")


@register("wn")
@dataclass(frozen=True)
class WeightNormalization(WeightParameterization):
    """Train g and v of w = g · v / ‖v‖: the norm and the direction of each unit's weights, separately.

    Uses no batch statistics, so the Q-value of a state never depends on the other states of a minibatch. The
    paper pairs it with data-dependent initialization (section 3), on here unless switched off. It normalizes every
    layer, the last one included, as the authors' image code does; for the RL runs this is not known.

    Attributes:
        g: ``direct`` trains g (the authors' code); ``exp`` trains log g, which the paper tried and found no better.
    """

    g: Scale = "direct"

    data_dependent_init = True

    def validate(self, layer: nn.Module) -> None:
        """Refuse, beyond the common checks, a unit whose weights are all zero: it has no direction."""
        super().validate(layer)
        refuse_zero_weights(layer)

    def make_parametrization(self, units: Units, weight: Tensor) -> nn.Module:
        """Return w = g · v / ‖v‖."""
        return WeightNormalized(units, exponential=self.g == "exp")

    def apply(self, layer: nn.Module) -> None:
        """Register the parametrization of each weight; state dicts of torch's weight norms load into it."""
        super().apply(layer)
        accept_older_weight_norm(layer, weight_names(layer))

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply g by ``factor``; v keeps its norm, on which the effective learning rate of its direction depends."""
        _, g = direction_and_scale(layer)
        factor = factor.reshape(g.shape)
        if self.g == "exp":
            g.add_(factor.log())
        else:
            g.mul_(factor)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the output of ``layer(x)`` without the overhead of torch's parametrize.

        A large dense layer's is (g / ‖v‖) · (v·x) + b, which scales the few outputs; of others w is computed.
        """
        plain = transformed()  # for which the cheap way has no rules
        if plain or self.g != "direct" or layer._forward_hooks or layer._forward_pre_hooks:
            return super().forward(layer, x)
        # Attribute access on modules takes a tenth of a small layer's time, dictionaries almost none.
        trained = layer._modules["parametrizations"]._modules["weight"]._parameters  # type: ignore[union-attr]
        g, v = trained["original0"], trained["original1"]
        bias = layer._parameters["bias"]
        assert g is not None
        assert v is not None
        if isinstance(layer, nn.Linear):
            if v.numel() >= LARGE:
                return scaled_linear(x, v, g, bias)
            return nn.functional.linear(x, normalized(v, g), bias)
        if isinstance(layer, nn.Conv2d):
            output: Tensor = layer._conv_forward(x, normalized(v, g), bias)
            return output
        return super().forward(layer, x)
