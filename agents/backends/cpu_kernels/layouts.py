"""Shapes and memory layouts of the C kernels, worked out from a network; ``csrc/structs.h`` defines them."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wn_rl.networks import QNetwork

from . import loader
from .packed_network import channels_last
from .structs import (
    MAX_BLOCKS,
    MAX_CONVOLUTIONS,
    MAX_FRAMES,
    MAX_TILE,
    ConvShape,
    Integer,
    NetworkShape,
    TileStage,
    precision_code,
)


def pair_size(precision: torch.dtype) -> int:
    """Return the number of elements in a word of four bytes."""
    return 2 if precision is torch.bfloat16 else 1


def conv_shapes(network: QNetwork) -> list[ConvShape]:
    """Return the shapes of the convolutions, the first on blocks of pixels."""
    channels, height, width = network.spec.observation_shape
    found = []
    for index, (units, kernel, stride) in enumerate(network.spec.convolutions):
        if index == 0:
            channels, height, width = channels * stride**2, height // stride, width // stride
            kernel, stride = kernel // stride, 1
        out_height, out_width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        found.append(ConvShape(height, width, channels, kernel, stride, out_height, out_width, units))
        channels, height, width = units, out_height, out_width
    return found


def unsupported(network: QNetwork, library: ctypes.CDLL, precision: torch.dtype) -> str:
    """Return why the kernels cannot compute ``network``, an empty text if they can."""
    if not loader.supports(library, precision):
        return f"the kernels have no vectors of this processor's for {str(precision).removeprefix('torch.')}"
    shapes = conv_shapes(network)
    if not 1 <= len(shapes) <= MAX_CONVOLUTIONS:
        return f"it has {len(shapes)} convolutions"
    if network.spec.observation_shape[0] > MAX_FRAMES:
        return f"an observation has more than {MAX_FRAMES} frames"
    if max(shapes[0].in_height, shapes[0].in_width) > MAX_BLOCKS:
        return f"an observation has more than {MAX_BLOCKS} blocks in a line"
    for index, conv in enumerate(shapes):
        if conv.in_channels % 16 or conv.out_channels % 16:
            return "a convolution's channels are no multiple of 16"
        divides = not (conv.kernel % conv.stride or conv.in_height % conv.stride or conv.in_width % conv.stride)
        covers = all((size - conv.kernel) % conv.stride == 0 for size in (conv.in_height, conv.in_width))
        if index > 0 and not (divides and covers):
            return "a convolution's stride divides neither its kernel nor its input"
    if network.spec.flat_features() % 32 or network.spec.hidden_units % 16:
        return "the hidden layer's inputs or units are no multiple of 32 and 16"
    return ""


def whole_tiles(count: int) -> int:
    """Return ``count`` rounded up to whole tiles of 16 rows or columns."""
    return -(-count // 16) * 16


def tile_stages(network: QNetwork, library: ctypes.CDLL, precision: torch.dtype) -> TileStage:
    """Return the stages of an update that the tile unit can compute; none where there is no such unit."""
    stages = TileStage(0)
    if precision is not torch.bfloat16 or not library.has_tile_unit():
        return stages
    convs = conv_shapes(network)
    stages |= TileStage.HIDDEN_FORWARD | TileStage.FLAT_BACKWARD | TileStage.HIDDEN_WEIGHT | TileStage.CONV_WEIGHT
    # A tile's row is 32 elements of a kernel's line, of one kernel's line only.
    if all(conv.kernel * conv.in_channels % 32 == 0 for conv in convs):
        stages |= TileStage.CONV_FORWARD
    if all(conv.kernel // conv.stride * conv.out_channels % 32 == 0 for conv in convs[1:]):
        stages |= TileStage.CONV_INPUT
    return stages


def transposed_columns(conv: ConvShape) -> tuple[int, int]:
    """Return how many lines a transposed gradient by a convolution's sums has, and their columns."""
    if conv.stride == 1:
        return 1, whole_tiles((conv.out_height - 1) * conv.in_width + conv.out_width)
    return conv.out_height, whole_tiles(conv.out_width)


def network_shape(network: QNetwork, precision: torch.dtype, block: int, tiles: TileStage) -> NetworkShape:
    """Return all sizes, those of a thread's workspace included.

    Args:
        network: one that :func:`unsupported` has nothing against.
        precision: of the hidden layers.
        block: the first layer's stride in pixels.
        tiles: some of :func:`tile_stages`.
    """
    spec, convs = network.spec, conv_shapes(network)
    flat, hidden = spec.flat_features(), spec.hidden_units
    max_activation = 0
    for index, conv in enumerate(convs):
        border = conv.kernel // conv.stride - 1 if index else 0
        padded = (conv.out_height + 2 * border) * (conv.out_width + 2 * border) * conv.out_channels
        max_activation = max(max_activation, conv.in_height * conv.in_width * conv.in_channels, padded)
    max_positions = 2 * max(conv.out_height * conv.out_width for conv in convs) + MAX_TILE
    inputs = [conv.kernel**2 * conv.in_channels for conv in convs]
    workspace = max(
        6 * max_activation * 4 + 16 * max_positions,  # four activations and two of sums, and a list of positions
        8 * flat * 4,  # the gradient of 8 hidden units
        hidden // pair_size(precision) * 32 * 4,  # the hidden layer's weights for 32 inputs
        hidden * 4,  # the gradient of an output unit
        # The rows of 16 units of a convolution, twice, and the order of their inputs.
        *((2 * 16 + 1) * count * 4 for count in inputs),
        *(_tile_workspace(convs, flat, hidden, max_activation) if tiles else ()),
    )
    return NetworkShape(
        precision_code(precision),
        len(convs),
        (ConvShape * MAX_CONVOLUTIONS)(*convs),
        spec.observation_shape[0],
        block,
        flat,
        hidden,
        spec.num_actions,
        max_activation,
        max_positions,
        workspace + 4096 - workspace % 4096,
        tiles,
        (Integer * MAX_CONVOLUTIONS)(*(transposed_columns(conv)[1] for conv in convs)),
    )


def _tile_workspace(convs: list[ConvShape], flat: int, hidden: int, max_activation: int) -> tuple[int, ...]:
    """Return what each stage on the tile unit takes of a thread's workspace, in bytes."""
    past_the_end = 16 * max(conv.stride * conv.in_channels for conv in convs) * 2
    return (
        # Sums of two blocks, the last layer's output as words, four activations in bfloat16.
        2 * 32 * 32 * 4 + max_activation * (4 + 4 * 2) + past_the_end,
        -(-hidden // 32) * 16 * 32 * 4,  # the hidden layer's weights for 32 inputs
        16 * flat * 4,  # the gradient of 16 hidden units
        *(conv.kernel * conv.in_channels * conv.out_channels * 4 for conv in convs),  # of a row of a kernel
    )


class ConvOffsets(NamedTuple):
    """Where each input of a convolution's unit lies, in the order of v; int32, shape (inputs,).

    Attributes:
        packed: in the packed weight of unit 0, elements (k / pair, units, pair) over k = (kernel, kernel, channels).
        gradient: in the packed weight's gradient, float32 (kernel, kernel, channels, units).
        transposed: in the weight for the gradient by the layer's input, see ``BackwardArgs.transposed_weight``.
    """

    packed: Tensor
    gradient: Tensor
    transposed: Tensor


def conv_offsets(module: nn.Conv2d, v: Tensor, conv: ConvShape, pair: int) -> ConvOffsets:
    """Return where the inputs of a convolution lie in each layout; ``pair`` is the number of elements in a word."""
    inputs = v[0].numel()
    # For each (kernel, kernel, channel) which input of v it is.
    input_of = channels_last(module, torch.arange(inputs).view(1, *v.shape[1:]))[0]
    units = conv.out_channels
    k = torch.arange(inputs).view(input_of.shape)
    y, x, channel = torch.meshgrid(*(torch.arange(size) for size in input_of.shape), indexing="ij")
    taps = conv.kernel // conv.stride
    place = y % conv.stride * conv.stride + x % conv.stride  # within a stride
    reversed_tap = (taps - 1 - y // conv.stride) * taps + taps - 1 - x // conv.stride
    transposed = (place * taps**2 + reversed_tap) * units * conv.in_channels + channel * pair

    def in_order_of_v(offsets: Tensor) -> Tensor:
        ordered = torch.empty(inputs, dtype=torch.int32)
        ordered[input_of.flatten()] = offsets.flatten().to(torch.int32)
        return ordered

    return ConvOffsets(
        in_order_of_v(k // pair * pair * units + k % pair), in_order_of_v(k * units), in_order_of_v(transposed)
    )


def pack_conv_weight(module: nn.Conv2d, w: Tensor, pair: int, input_scale: float) -> Tensor:
    """Return a convolution's weight, (units, channels, k, k), in the layout that the forward pass reads, flat."""
    # (units, k) as (k / pair, units, pair)
    rows = (channels_last(module, w).reshape(len(w), -1, pair) * input_scale).transpose(0, 1)
    return rows.reshape(-1)
