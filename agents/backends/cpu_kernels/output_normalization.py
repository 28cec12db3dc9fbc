"""Normalizations behind a network's layers: as the kernels take them, and by torch's operations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wn_rl.networks import QNetwork
from wn_rl.parameterizations.base import Normalization
from wn_rl.parameterizations.batch_norm import Full, MeanOnly
from wn_rl.parameterizations.layer_norm import PerExample

from .structs import MAX_BLOCKS, NetworkShape, NormalizationStruct

RUNNING, BATCH, EXAMPLE, POSITION = range(4)
"""Over what statistics are taken: ``StatisticsOver`` in ``csrc/structs.h``."""


def normalization_of(layer: nn.Module) -> Normalization | None:
    """Return what normalizes the output of ``layer``, None where nothing does."""
    found = layer._modules.get("normalization")
    return found if isinstance(found, Normalization) else None


def gain_of(normalization: Normalization | None) -> nn.Parameter | None:
    """Return γ of a normalization that has one."""
    return normalization.gain if isinstance(normalization, PerExample | Full) else None


def statistics_over(normalization: Normalization, training: bool) -> int:
    """Return over what the statistics are taken in a pass, one of the numbers above."""
    if isinstance(normalization, PerExample):
        return EXAMPLE if normalization.over == "example" else POSITION
    return BATCH if training else RUNNING


def make_struct(normalization: Normalization, positions: int, training: bool) -> NormalizationStruct:
    """Return the structure of a normalization without memory of a minibatch; it refers to the module's tensors.

    Args:
        normalization: a module of one of the classes that :func:`unsupported` has nothing against.
        positions: of the layer's output, 1 for a dense layer.
        training: whether the statistics of the minibatch are taken where there are running ones too.
    """
    assert normalization.bias is not None
    struct = NormalizationStruct(statistics_over(normalization, training), len(normalization.bias), positions)
    struct.mean_only = isinstance(normalization, MeanOnly)
    struct.rate = normalization.rate
    if isinstance(normalization, PerExample | Full):
        struct.eps = normalization.eps
    tensors = {
        "gain": gain_of(normalization),
        "bias": normalization.bias,
        "running_mean": getattr(normalization, "running_mean", None),
        "running_var": getattr(normalization, "running_var", None),
    }
    for name, tensor in tensors.items():
        setattr(struct, name, None if tensor is None else tensor.data_ptr())
    return struct


@dataclass
class SavedPass:
    """What a forward pass by torch's operations saves for the backward pass and the step.

    Attributes:
        inputs: of each layer.
        normalized: of each layer that is normalized, its sums and what they became, with their graph.
        statistics: running statistics, and what they become with the step.
    """

    inputs: list[Tensor]
    normalized: list[tuple[Tensor, Tensor]]
    statistics: list[tuple[Tensor, Tensor]]


def normalized(normalization: Normalization, t: Tensor, saved: SavedPass | None) -> Tensor:
    """Return a layer's normalized output, bias included, in the dtype of ``t``; to be ``saved``, in training mode."""
    if saved is None:
        output: Tensor = normalization(t.float())
        return output.to(t.dtype)
    new = {name: buffer.clone() for name, buffer in normalization.named_buffers()}
    saved.statistics.extend((buffer, new[name]) for name, buffer in normalization.named_buffers())
    normalization.train()
    sums = t.float().requires_grad_()
    with torch.enable_grad():
        y: Tensor = functional_call(normalization, new, (sums,))
    normalization.eval()
    saved.normalized.append((sums, y))
    return y.detach().to(t.dtype, copy=True)


def normalization_backward(
    normalization: Normalization, t: Tensor, y: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients by a layer's sums t, by the bias and, if there is one, by γ, from that by y."""
    wanted = [t, normalization.bias, gain_of(normalization)]
    dt, bias, *gain = torch.autograd.grad(y, [tensor for tensor in wanted if tensor is not None], dy.float())
    return dt, bias, gain[0] if gain else None


@dataclass
class NormalizationMemory:
    """What the passes over a minibatch keep of a normalization, see ``Normalization`` in ``csrc/structs.h``."""

    sums: Tensor
    mean: Tensor
    scale: Tensor
    variance: Tensor
    observation_mean: Tensor
    observation_square: Tensor
    nonzero: Tensor
    gradient: Tensor
    bias_parts: Tensor
    gain_parts: Tensor

    @classmethod
    def of(cls, struct: NormalizationStruct, batch: int) -> NormalizationMemory:
        """Allocate it for ``batch`` observations and let ``struct`` refer to it."""
        positions, units, over = struct.positions, struct.units, struct.over
        single, each_unit = positions == 1, over == BATCH
        statistics = {BATCH: units, EXAMPLE: batch, POSITION: batch * positions}[over]
        parts = batch if each_unit and not single else 0
        sums = torch.empty(batch, positions, units)
        made = cls(
            sums=sums,
            mean=torch.empty(statistics),
            scale=torch.empty(statistics),
            variance=torch.empty(units if each_unit else 0),
            observation_mean=sums if single else torch.empty(parts, units),
            observation_square=torch.empty(parts, units),
            nonzero=torch.empty(batch if each_unit else 0, MAX_BLOCKS, dtype=torch.int64),
            gradient=torch.empty(batch if single or each_unit else 0, positions, units),
            bias_parts=torch.empty(batch, units),
            gain_parts=torch.empty(batch, units),
        )
        for entry in fields(made):
            setattr(struct, entry.name, getattr(made, entry.name).data_ptr())
        return made


@dataclass
class PassNormalizations:
    """The structures of one pass, by layer, None where it has no normalization, and the memory of its minibatch."""

    structs: Sequence[NormalizationStruct | None]
    memory: Sequence[NormalizationMemory | None]

    def addresses(self) -> list[int | None]:
        """Return the address of each structure."""
        return [None if struct is None else ctypes.addressof(struct) for struct in self.structs]


def positions_of(shape: NetworkShape) -> list[int]:
    """Return how many positions the output of each layer has, the hidden and the output layer's included."""
    convs = [shape.convolution[index] for index in range(shape.convolutions)]
    return [*(conv.out_height * conv.out_width for conv in convs), 1, 1]


def pass_normalizations(
    shape: NetworkShape, normalizations: Sequence[Normalization | None], batch: int = 0
) -> PassNormalizations:
    """Return the structures for passes with running statistics or, with a ``batch``, for updates on so many."""
    structs = [
        None if normalization is None else make_struct(normalization, positions, batch > 0)
        for normalization, positions in zip(normalizations, positions_of(shape), strict=True)
    ]
    memory = [None if struct is None or not batch else NormalizationMemory.of(struct, batch) for struct in structs]
    return PassNormalizations(structs, memory)


def unsupported(network: QNetwork, batch_size: int) -> str:
    """Return why a normalization in ``network`` cannot be computed by kernels, an empty text if all can."""
    for layer in network.modules():
        normalization = normalization_of(layer)
        if normalization is None:
            continue
        if type(normalization) not in (PerExample, MeanOnly, Full):
            return f"a layer is normalized by a {type(normalization).__name__}"
        if isinstance(normalization, Full) and batch_size < 2:
            return "a minibatch of one transition has no variance"
    return ""
