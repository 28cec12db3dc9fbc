"""What of a layer is trained, and how its weight is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wn_rl.parameterizations.base import Normalization, Parameterization, WeightParameterization, parameterization_of
from wn_rl.parameterizations.batch_norm import (
    BatchNormalization,
    MeanOnlyBatchNormalization,
    WeightNormalizationWithMeanOnly,
)
from wn_rl.parameterizations.layer_norm import LayerNormalization
from wn_rl.parameterizations.projected import ProjectedWeights
from wn_rl.parameterizations.spectral_norm import SpectralNormalization
from wn_rl.parameterizations.standard import Standard
from wn_rl.parameterizations.weight_norm import WeightNormalization

from .output_normalization import gain_of
from .structs import WeightKind


@dataclass
class TrainedLayer:
    """A layer of the network with what is trained.

    Attributes:
        module: the layer.
        kind: how w is made of v and g.
        v: the direction; w itself where ``g`` is None; not a parameter where torch computes w.
        g: the scale, or its logarithm.
        b: the bias.
        normalization: what normalizes the layer's output and holds the bias, if anything does.
        offsets: int32, (inputs,): where each of a unit's inputs lies in its packed weight; None: in their order.
        input_scale: by which w is multiplied when it is packed.
        bfloat16: whether the packed weight is.
        weight_gradient: by the packed weight, after a backward pass.
        bias_gradient: by the bias.
    """

    module: nn.Module
    kind: WeightKind
    v: Tensor
    g: nn.Parameter | None
    b: nn.Parameter
    normalization: Normalization | None
    offsets: Tensor | None
    input_scale: float
    bfloat16: bool
    weight_gradient: Tensor | None = None
    bias_gradient: Tensor | None = None

    @property
    def gain(self) -> nn.Parameter | None:
        """γ of the normalization."""
        return gain_of(self.normalization)


TRAINS_W = (Standard, LayerNormalization, BatchNormalization, MeanOnlyBatchNormalization)
"""Parameterizations that train w itself."""


def weight_kind(layer: nn.Module) -> WeightKind | str:
    """Return how the C function makes a layer's weight, or why nothing here can."""
    entry = parameterization_of(layer)
    if entry is None or type(entry) in TRAINS_W:
        return WeightKind.PLAIN
    if type(entry) is WeightNormalizationWithMeanOnly:
        return WeightKind.NORM
    if type(entry) is WeightNormalization:
        return WeightKind.NORM if entry.g == "direct" else WeightKind.NORM_EXP
    if type(entry) is ProjectedWeights:
        return WeightKind.UNIT if entry.g == "none" else WeightKind.UNIT_SCALED
    if type(entry) is SpectralNormalization:
        return WeightKind.SPECTRAL
    if not isinstance(entry, WeightParameterization):
        return f"its parameterization is '{entry.name}'"
    if type(entry).forward is not Parameterization.forward:
        return f"its parameterization '{entry.name}' has a forward pass of its own"
    return WeightKind.GIVEN


UNSCALED = (WeightKind.UNIT, WeightKind.SPECTRAL)
"""Parameterizations that train v alone."""


def trained_weight(module: nn.Module, kind: WeightKind) -> tuple[Tensor, nn.Parameter | None]:
    """Return v and g of a layer; where torch computes its weight, memory for it."""
    if kind is WeightKind.GIVEN:
        w = module.weight
        assert isinstance(w, Tensor)
        return torch.empty(w.shape), None
    if kind is WeightKind.PLAIN:
        v, g = module.weight, None
    else:
        trained: Any = module.parametrizations["weight"]  # type: ignore[index]
        v, g = (trained.original, None) if kind in UNSCALED else (trained.original1, trained.original0)
    assert isinstance(v, nn.Parameter)
    return v, g
