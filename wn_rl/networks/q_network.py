"""The network of Mnih et al. 2015."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wn_rl.networks.base import Network
from wn_rl.networks.registry import register
from wn_rl.parameterizations import forward

if TYPE_CHECKING:
    from wn_rl.networks.spec import QNetworkSpec

BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By number of bytes, the type as which so many uint8 pixels are moved at once."""


class FirstConvolution(nn.Conv2d):
    """A convolution that also takes uint8 frames :meth:`packed`: the same sums in another order, on a CPU far cheaper.

    A kernel of k·s × k·s with stride s over C channels is a kernel of k × k with stride 1 over the C·s² pixels of each
    s × s block. Vector units want many channels, pixels may stay whole numbers from 0 to 255 (exact in bfloat16), since
    the division by 255 is made on the few weights, and whole rows of a block are moved when frames are packed.
    """

    def packs(self, observations: Tensor) -> bool:
        """Return whether ``observations`` can be packed for this layer and it pays: on CPUs, for square blocks.

        Not in an exported program, whose runtime may know no views of bytes as words, nor in one that torch compiles.
        """
        size, stride = self.kernel_size[0], self.stride[0]
        return (
            not torch.compiler.is_compiling()
            and not torch.compiler.is_exporting()
            and observations.device.type == "cpu"
            and observations.dtype == torch.uint8
            and stride in BYTES
            and size % stride == 0
            and observations.shape[-2] % stride == 0
            and observations.shape[-1] % stride == 0
            and observations.storage_offset() % stride == 0
            and observations.stride()[-2:] == (observations.shape[-1], 1)
            and all(step % stride == 0 for step in observations.stride()[:2])
        )

    def packed(self, observations: Tensor) -> Tensor:
        """Return uint8 frames, (B, C, H, W), as blocks of pixels, uint8 (B, C·s², H/s, W/s), channels last."""
        stride = self.stride[0]
        batch, channels, height, width = observations.shape
        rows = observations.view(BYTES[stride]).view(batch, channels, height // stride, stride, width // stride)
        blocks = rows.permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8)
        return blocks.view(batch, height // stride, width // stride, -1).permute(0, 3, 1, 2)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if input.shape[1] == self.in_channels:
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        blocks = self.blocks(weight).permute(0, 3, 1, 2) * (1 / 255)
        return nn.functional.conv2d(input, blocks, bias)

    def blocks(self, weight: Tensor) -> Tensor:
        """Return a weight, (units, C, k·s, k·s), as it meets packed frames: (units, k, k, C·s²)."""
        units, channels, size, _ = weight.shape
        stride = self.stride[0]
        split = weight.reshape(units, channels, size // stride, stride, size // stride, stride)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(units, size // stride, size // stride, -1)


@register("nature")
class QNetwork(Network):
    """The network of Mnih et al. 2015: convolutions, one dense hidden layer, one Q-value per action; ReLU between."""

    has_training_mode = False

    def __init__(self, spec: QNetworkSpec) -> None:
        """Make the layers."""
        super().__init__(spec)
        channels = spec.observation_shape[0]
        convolutions: list[nn.Conv2d] = []
        for filters, kernel, stride in spec.convolutions:
            kind = nn.Conv2d if convolutions else FirstConvolution
            convolutions.append(kind(channels, filters, kernel, stride))
            channels = filters
        self.convolutions = nn.ModuleList(convolutions)
        self.hidden = nn.Linear(spec.flat_features(), spec.hidden_units)
        self.output = nn.Linear(spec.hidden_units, spec.num_actions)

    def features(self, observations: Tensor) -> Tensor:
        """Return what the output layer sees, shape (B, hidden units)."""
        x = self.pixels(observations)
        for index, convolution in enumerate(self.convolutions):
            x = forward(convolution, x)
            # In order of rows before the last ReLU: its backward pass is slow where two orders meet.
            x = _relu(convolution, x.flatten(1) if index == len(self.convolutions) - 1 else x)
        return _relu(self.hidden, forward(self.hidden, x.flatten(1)))

    def pixels(self, observations: Tensor) -> Tensor:
        """Return what the first layer takes: pixels from 0 to 1, or packed."""
        first = next(iter(self.convolutions), None)
        if isinstance(first, FirstConvolution) and not first._forward_pre_hooks and first.packs(observations):
            kind = observations.device.type
            low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.precision
            return first.packed(observations).to(low)
        return super().pixels(observations)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round the hidden layers' plain weights once, as autocast to ``dtype`` does in each pass; the output's stay.

        For a network without parameterization that is not trained. The first convolution divides its weights by 255
        before they are rounded, so it keeps them.
        """
        for layer in (*list(self.convolutions)[1:], self.hidden):
            layer.to(dtype)


def _relu(layer: nn.Module, x: Tensor) -> Tensor:
    """Return max(x, 0), in place unless a hook of the layer whose output ``x`` is may have kept it."""
    hooked = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return torch.relu(x) if hooked else torch.relu_(x)
