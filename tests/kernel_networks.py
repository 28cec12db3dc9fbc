"""Small networks that the C kernels can compute, and observations with blocks of zero pixels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from agents.backends.cpu_kernels.optimizers import FusedOptimizer
from agents.backends.cpu_kernels.packed_network import PackedNetwork, PackedWeights
from wn_rl.networks import QNetworkSpec
from wn_rl.parameterizations import fold

IN_C: tuple[tuple[str, dict[str, Any]], ...] = (
    ("standard", {}),
    ("wn", {}),
    ("wn", {"g": "exp"}),
    ("wn_projected", {}),
    ("wn_projected", {"g": "none"}),
)
"""The parameterizations, with options, whose weights the C functions make themselves."""
NORMALIZED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ln", {}),
    ("ln", {"over": "units", "eps": 1e-3}),
    # An ε at which a unit that hardly varies in a small minibatch does not make large numbers of rounding.
    ("bn", {"eps": 0.05, "rate": 0.3}),
    ("mean_only_bn", {"rate": 0.3}),
    ("wn_mean_only_bn", {}),
)
"""The parameterizations, with options, whose outputs the C functions normalize."""
LAYERS = (None, ("*",), ("convolutions.0", "output"), ("convolutions.*",), ("hidden",))
"""Which layers are treated: those that the source treats, all of them, or some."""


@st.composite
def networks(
    draw: st.DrawFn,
    params: tuple[tuple[str, dict[str, Any]], ...] = IN_C,
    layers_treated: tuple[tuple[str, ...] | None, ...] = (None,),
) -> QNetworkSpec:
    """Small networks that the kernels can compute; the first layer's blocks are 4 × 4 pixels of 1 to 4 frames."""
    layers = [(draw(st.sampled_from([16, 32, 48])), 4 * draw(st.integers(1, 2)), 4)]
    size = draw(st.integers(5, 9))
    down = size - layers[0][1] // 4 + 1
    for _ in range(draw(st.integers(0, 2))):
        choices = [
            (kernel, stride)
            for kernel in (1, 2, 3, 4)
            for stride in (1, 2)
            if kernel <= down and kernel % stride == 0 == down % stride and (down - kernel) % stride == 0
        ]
        kernel, stride = draw(st.sampled_from(choices))
        layers.append((draw(st.sampled_from([16, 64, 80])), kernel, stride))
        down = (down - kernel) // stride + 1
    param, options = draw(st.sampled_from(params))
    spec = QNetworkSpec(
        # Two numbers that are normalized together are 1 and -1, whatever they were.
        draw(st.integers(4 if param == "ln" else 1, 18)),
        param,
        options=options,
        layers=draw(st.sampled_from(layers_treated)),
        observation_shape=(draw(st.integers(1, 4)), 4 * size, 4 * size),
        convolutions=tuple(layers),
        hidden_units=draw(st.sampled_from([16, 48])),
    )
    # The dense layer's inputs are taken 32 at a time.
    wide = spec.flat_features() % 32 == 0
    return spec if wide else replace(spec, convolutions=(*layers[:-1], (64, *layers[-1][1:])))


def mostly_black(shape: tuple[int, ...], lit: float, generator: torch.Generator, filled: float = 1.0) -> Tensor:
    """Noise, uint8 (B, C, H, W), in about the share ``lit`` of blocks of 4 × 4 pixels, and there in that of pixels."""
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    blocks = torch.rand((shape[0], 1, shape[2] // 4, shape[3] // 4), generator=generator) < lit
    pixels = torch.rand(shape, generator=generator) < filled
    return noise * pixels * blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)


def fused_adamax(network: PackedNetwork, lr: float, betas: tuple[float, float], eps: float) -> FusedOptimizer:
    """Return Adamax for a network with packed weights."""
    return FusedOptimizer.like(torch.optim.Adamax(network.network.parameters(), lr, betas, eps), network)


def packed_target(network: PackedNetwork) -> PackedWeights:
    """Return the packed weights of a target network with the weights of ``network``."""
    copied = copy.deepcopy(network.network)
    return network.pack_network(fold(copied) if copied.spec.entry().foldable else copied)
