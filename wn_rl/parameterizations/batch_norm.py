"""Batch normalization, and the paper's mean-only variant (Salimans & Kingma 2016, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wn_rl.parameterizations.base import (
    Normalization,
    OutputNormalization,
    Units,
    check_range,
    refuse_zero_weights,
    spatial_axes,
    transformed,
    units_of,
)
from wn_rl.parameterizations.registry import register
from wn_rl.parameterizations.weight_norm import WeightNormalization


def _full_precision(t: Tensor) -> Tensor:
    """Return half-precision values as float32, which a mean and a difference from it need."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _as_stored(t: Tensor, parameter: Tensor) -> Tensor:
    """Return ``t`` in half precision if the model is: under autocast parameters are float32, and so is ``t``."""
    return t.to(parameter.dtype) if parameter.dtype in (torch.bfloat16, torch.float16) else t


class MeanOnly(Normalization):
    """t̃ = t − μ[t] + b with μ over the minibatch (and positions); in evaluation mode a running mean of μ."""

    running_mean: Tensor

    def __init__(self, bias: nn.Parameter | None, spatial_axes: int, units: int, rate: float, like: Tensor) -> None:
        """Start with a running mean of zero, in the dtype of ``like``."""
        super().__init__(bias, spatial_axes, rate)
        self.register_buffer("running_mean", torch.zeros(units, dtype=like.dtype))

    def forward(self, t: Tensor) -> Tensor:
        """Return t̃, the shape of ``t``."""
        t = _full_precision(t)
        mean = self.running_mean.to(t.dtype)
        if self.training:
            axes = self.other_axes(t)
            if not axes:
                raise ValueError("a single example has no batch statistics: give it a batch axis, or use eval()")
            mean = t.mean(axes)
            with torch.no_grad():
                self.running_mean.copy_(torch.lerp(self.running_mean.to(t.dtype), mean.detach(), self.rate))
        shift = -mean if self.bias is None else self.bias - mean
        return _as_stored(t + self.along_units(shift, t), self.running_mean)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return scale 1 and shift b − running mean."""
        shift = -self.running_mean if self.bias is None else self.bias - self.running_mean
        return torch.ones_like(self.running_mean), shift

    def rescale(self, factor: Tensor) -> None:
        """Follow a layer whose weights were multiplied by ``factor``."""
        self.running_mean.mul_(factor)


class Full(Normalization):
    """t̃ = γ · (t − μ[t]) / √(σ²[t] + ε) + b; in evaluation mode with running mean and (unbiased) variance."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, bias: nn.Parameter | None, spatial_axes: int, units: int, rate: float, eps: float, like: Tensor
    ) -> None:
        """Start with γ = 1, a running mean of 0 and a running variance of 1, in the dtype of ``like``."""
        super().__init__(bias, spatial_axes, rate)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(units, dtype=like.dtype), requires_grad=like.requires_grad)
        self.register_buffer("running_mean", torch.zeros(units, dtype=like.dtype))
        self.register_buffer("running_var", torch.ones(units, dtype=like.dtype))

    def forward(self, t: Tensor) -> Tensor:
        """Return t̃, the shape of ``t``."""
        t = _full_precision(t)
        axis = self.unit_axis(t)
        shape = t.shape
        if self.spatial_axes == 0:
            t = t.reshape(-1, shape[-1])
        elif axis == 0:
            t = t.unsqueeze(0)
        if transformed():
            return _as_stored(self._written_out(t).view(shape), self.running_mean)
        mean, variance = (statistic.to(t.dtype) for statistic in (self.running_mean, self.running_var))
        gain, bias = self.gain.to(t.dtype), None if self.bias is None else self.bias.to(t.dtype)
        normalized = nn.functional.batch_norm(t, mean, variance, gain, bias, self.training, self.rate, self.eps)
        if self.training and mean is not self.running_mean:  # copies in full precision took the new statistics
            with torch.no_grad():
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        return _as_stored(normalized.view(shape), self.running_mean)

    def _written_out(self, t: Tensor) -> Tensor:
        axes = [0, *range(2, t.dim())]
        per_unit = [1, -1, *(1 for _ in axes[1:])]
        if self.training:
            count = t.numel() // t.shape[1]
            if count == 1:
                raise ValueError("a single example has no batch statistics: give it a batch axis, or use eval()")
            mean = t.mean(axes)
            variance = (t - mean.view(per_unit)).square().mean(axes)
            with torch.no_grad():
                unbiased = variance.detach() * (count / (count - 1))
                for running, new in ((self.running_mean, mean.detach()), (self.running_var, unbiased)):
                    running.copy_(torch.lerp(running.to(t.dtype), new, self.rate))
        else:
            mean, variance = self.running_mean.to(t.dtype), self.running_var.to(t.dtype)
        scale = self.gain.to(t.dtype) / (variance + self.eps).sqrt()
        y = (t - mean.view(per_unit)) * scale.view(per_unit)
        return y if self.bias is None else y + self.bias.to(t.dtype).view(per_unit)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return γ / √(σ² + ε) and b − μ · γ / √(σ² + ε), with running statistics."""
        scale = self.gain / (self.running_var + self.eps).sqrt()
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def rescale(self, factor: Tensor) -> None:
        """Multiply γ."""
        self.gain.mul_(factor)


@register("mean_only_bn")
@dataclass(frozen=True)
class MeanOnlyBatchNormalization(OutputNormalization):
    """Subtract each pre-activation's minibatch mean, and nothing else; weights are trained directly.

    Salimans & Kingma 2016, section 4: t̃ = t − μ[t] + b, so ∇t L = ∇t̃ L − mean(∇t̃ L). A state's Q-value depends on
    the other states of the minibatch through μ.

    Attributes:
        rate: of a new minibatch in the running mean; 0.1 in the authors' code.
    """

    rate: float = 0.1

    batch_independent = False
    has_training_mode = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("rate", self.rate, 0.0, 1.0)

    def normalization(self, layer: nn.Module, bias: nn.Parameter | None) -> Normalization:
        """Return t − μ[t] + b."""
        return mean_only(layer, bias, self.rate)

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply w by ``factor`` per output unit; the running mean follows."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weight.copy_(Units.of(layer).scale(weight, factor))
        super().rescale(layer, factor)


def mean_only(layer: nn.Module, bias: nn.Parameter | None, rate: float) -> Normalization:
    """Return mean-only batch normalization for ``layer``."""
    return MeanOnly(bias, spatial_axes(layer), units_of(layer), rate, next(layer.parameters()))


@register("wn_mean_only_bn")
@dataclass(frozen=True)
class WeightNormalizationWithMeanOnly(OutputNormalization):
    """Weight normalization together with mean-only batch normalization (Salimans & Kingma 2016, section 4).

    The paper's best image classifier. Initialized from data by rescaling g; b stays what it is, 0 in the authors'
    code, since the mean is subtracted anyway.

    Attributes:
        rate: of a new minibatch in the running mean; 0.1 in the authors' code.
    """

    rate: float = 0.1

    batch_independent = False
    has_training_mode = True
    data_dependent_init = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("rate", self.rate, 0.0, 1.0)

    def normalization(self, layer: nn.Module, bias: nn.Parameter | None) -> Normalization:
        """Return t − μ[t] + b."""
        return mean_only(layer, bias, self.rate)

    def validate(self, layer: nn.Module) -> None:
        """Refuse what either part refuses."""
        super().validate(layer)
        WeightNormalization().validate(layer)

    def apply(self, layer: nn.Module) -> None:
        """Put weight normalization on the weight and mean-only batch normalization behind the layer."""
        super().apply(layer)
        WeightNormalization().apply(layer)

    @torch.no_grad()
    def rescale(self, layer: nn.Module, factor: Tensor) -> None:
        """Multiply g by ``factor``; the running mean follows."""
        WeightNormalization().rescale(layer, factor)
        super().rescale(layer, factor)

    def fold(self, layer: nn.Module) -> None:
        """Leave a plain weight, and a bias without the running mean."""
        WeightNormalization().fold(layer)
        super().fold(layer)


@register("bn")
@dataclass(frozen=True)
class BatchNormalization(OutputNormalization):
    """Batch normalization (Ioffe & Szegedy 2015) of each pre-activation, with gain γ and bias b.

    The paper reports that the authors could not get it to work in DQN without an impractically large minibatch: a
    state's Q-value, and through ``target_statistics: batch`` its target, takes on the noise of the minibatch.

    Attributes:
        eps: inside the square root; 1e-6 in the authors' code (torch's layers have 1e-5).
        rate: of a new minibatch in the running statistics; 0.1 in the authors' code and in torch. The running
            variance is the unbiased one, as in torch.
    """

    eps: float = 1e-6
    rate: float = 0.1

    batch_independent = False
    has_training_mode = True
    preserves_output = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("eps", self.eps, 0.0, 1.0)
        check_range("rate", self.rate, 0.0, 1.0)

    def validate(self, layer: nn.Module) -> None:
        """Refuse, beyond the common checks, a unit whose weights are all zero where ε is: σ² is 0."""
        super().validate(layer)
        if self.eps == 0.0:
            refuse_zero_weights(layer)

    def normalization(self, layer: nn.Module, bias: nn.Parameter | None) -> Normalization:
        """Return γ · (t − μ[t]) / √(σ²[t] + ε) + b."""
        return Full(bias, spatial_axes(layer), units_of(layer), self.rate, self.eps, next(layer.parameters()))
