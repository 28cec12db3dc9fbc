"""Spectral normalization: w = v / σ(v), σ the largest singular value (Miyato et al. 2018; Gogianu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from wn_rl.parameterizations.base import (
    Units,
    WeightParameterization,
    check_range,
    refuse_zero_length,
    refuse_zero_weights,
)
from wn_rl.parameterizations.registry import register


class SpectralNormalized(nn.Module):
    """Compute w = c · v / σ(v) with σ from power iteration; c is 1 unless initialized from data.

    A convolution's weight counts as a matrix of shape (units, everything else). In training mode each forward pass
    makes ``iterations`` steps of power iteration; in evaluation mode none. Buffers are called ``running_…`` since
    Stable-Baselines3 copies only such to its target network.
    """

    running_u: Tensor
    running_v: Tensor
    running_scale: Tensor

    def __init__(self, units: Units, weight: Tensor, iterations: int, eps: float) -> None:
        """Start with 15 steps of power iteration, as torch's own does, so that σ is right from the first forward."""
        super().__init__()
        self.units = units
        self.iterations = iterations
        self.eps = eps
        with torch.no_grad():
            rows = units.rows(weight)
            self.register_buffer("running_u", normalize(rows.new_empty(rows.shape[0]).normal_(), dim=0, eps=eps))
            self.register_buffer("running_v", normalize(rows.new_empty(rows.shape[1]).normal_(), dim=0, eps=eps))
            self.register_buffer("running_scale", rows.new_ones(rows.shape[0]))
            self._iterate(rows, 15)

    def _iterate(self, rows: Tensor, steps: int) -> None:
        for _ in range(steps):
            self.running_u.copy_(normalize(torch.mv(rows, self.running_v), dim=0, eps=self.eps))
            self.running_v.copy_(normalize(torch.mv(rows.T, self.running_u), dim=0, eps=self.eps))

    def forward(self, v: Tensor) -> Tensor:
        """Return w, the shape of ``v``."""
        rows = self.units.rows(v)
        if self.training:
            with torch.no_grad():
                self._iterate(rows, self.iterations)
        # Copies, since the next forward pass changes the buffers before this one's backward.
        sigma = torch.dot(self.running_u.clone(), torch.mv(rows, self.running_v.clone()))
        return self.units.scale(v, self.running_scale / sigma)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v = w; the layer's output changes by the factor 1/σ."""
        refuse_zero_length(w.detach().abs().max(), self.eps)
        return w


@register("sn")
@dataclass(frozen=True)
class SpectralNormalization(WeightParameterization):
    """Divide a layer's weight by its largest singular value: the layer's Lipschitz constant becomes 1.

    Gogianu et al. 2021 found it to work best on a single layer, the one before the output, which is the default for a
    Q-network; ``--param-layers`` chooses others.

    Attributes:
        iterations: of the power method per training forward pass; 1 in Miyato et al. 2018 and in torch.
        eps: lower bound of the norm of a vector before dividing by it; 1e-12 in torch.
    """

    iterations: int = 1
    eps: float = 1e-12

    has_training_mode = True
    preserves_output = False
    default_layers = "penultimate"

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("iterations", self.iterations, 1, 1000)
        check_range("eps", self.eps, 0.0, 1e-3)

    def validate(self, layer: nn.Module) -> None:
        """Refuse, beyond the common checks, a weight that is zero: so is its largest singular value."""
        super().validate(layer)
        # σ is at least the largest element; below eps power iteration would not reach unit vectors.
        refuse_zero_weights(layer, whole=True, eps=self.eps)

    def make_parametrization(self, units: Units, weight: Tensor) -> nn.Module:
        """Return w = v / σ(v)."""
        return SpectralNormalized(units, weight, self.iterations, self.eps)

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply the fixed c, which is 1 in the sources, by ``factor`` per output unit; σ(w) is no longer 1."""
        parametrization = layer.parametrizations["weight"][0]  # type: ignore[index]
        assert isinstance(parametrization, SpectralNormalized)
        parametrization.running_scale.mul_(factor)
