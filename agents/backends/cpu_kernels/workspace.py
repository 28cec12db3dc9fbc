"""The memory that the C kernels work in, and the prepared arguments of an update."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wn_rl.parameterizations.base import Normalization
from wn_rl.replay import uniform

from .layouts import pair_size, transposed_columns, whole_tiles
from .output_normalization import PassNormalizations, pass_normalizations
from .packed_network import PackedWeights
from .structs import BackwardArgs, ConvShape, ForwardArgs, NetworkShape, ReplayStorage, TDLossArgs

MAX_CACHED_SIZES = 8
"""Numbers of observations for which a forward pass that saves nothing keeps its memory; a run has three or four."""


@dataclass(frozen=True)
class TDLoss:
    """What an update minimizes: the Huber loss of the TD error.

    Attributes:
        gamma: discount per agent step.
        reward_clip: rewards are clipped to ± this; 0 disables clipping.
        mean: over the minibatch; False: the sum.
        sums: float64, shape (3,): to these the means of loss, |TD error| and Q-value are added.
    """

    gamma: float
    reward_clip: float
    mean: bool
    sums: Tensor


class ObservationFrames(NamedTuple):
    """Observations as indices into an array of frames.

    Attributes:
        frames: uint8 (any, height, width), contiguous.
        indices: int64 (B, frames of an observation), rows of which may be apart.
    """

    frames: Tensor
    indices: Tensor


def as_frames(observations: Tensor) -> ObservationFrames:
    """Return uint8 observations, (B, C, H, W), as indices into themselves."""
    frames = observations.contiguous()
    batch, count = frames.shape[:2]
    return ObservationFrames(frames.view(-1, *frames.shape[2:]), torch.arange(batch * count).view(batch, count))


@dataclass
class Activations:
    """What a forward pass writes beside the Q-values, see ``ForwardArgs``.

    Attributes:
        saved_inputs: of each layer but the last; empty unless there is a backward pass.
        nonzero_blocks: int64, (groups, blocks in a column).
        flat: (B, flat features) in the passes' precision.
        flat_columns: the same as int32 words (flat features / 2, B rounded up to 16); empty without a tile unit.
        hidden: float32 (B, hidden units).
        normalizations: of a pass that is saved, and what it keeps; None otherwise.
    """

    saved_inputs: list[Tensor]
    nonzero_blocks: Tensor
    flat: Tensor
    flat_columns: Tensor
    hidden: Tensor
    normalizations: PassNormalizations | None


@dataclass
class ActivationGradients:
    """What a backward pass writes for a minibatch, see ``BackwardArgs``."""

    hidden: Tensor
    hidden_pairs: Tensor
    flat: Tensor
    convolutions: list[Tensor]
    transposed: list[Tensor]


class Workspace:
    """Memory of forward and backward passes, kept from one call to the next.

    Attributes:
        activations: by (observations, whether they are saved for a backward pass).
        gradients: of the latest backward pass or preparation of one.
    """

    def __init__(
        self, shape: NetworkShape, precision: torch.dtype, normalizations: Sequence[Normalization | None]
    ) -> None:
        """Allocate nothing yet; ``normalizations`` are those of the network that is trained, by layer."""
        self._shape = shape
        self._normalizations = normalizations
        self._precision = precision
        self._pair = pair_size(precision)
        self._convs: list[ConvShape] = [shape.convolution[index] for index in range(shape.convolutions)]
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.gradients: ActivationGradients | None = None
        self.activations: dict[tuple[int, bool], Activations] = {}

    def scratch(self) -> tuple[int, int]:
        """Return the address of every thread's scratch memory and the number of threads."""
        threads = torch.get_num_threads()
        if self._scratch.numel() < threads * self._shape.workspace_bytes:
            self._scratch = torch.empty(threads * self._shape.workspace_bytes, dtype=torch.uint8)
        return self._scratch.data_ptr(), threads

    def activations_for(self, batch: int, save: bool) -> Activations:
        """Return memory for a pass over ``batch`` observations, as a rule the same at every call."""
        if (batch, save) not in self.activations:
            unsaved = [key for key in self.activations if not key[1]]
            if not save and len(unsaved) >= MAX_CACHED_SIZES:
                del self.activations[unsaved[0]]
            self.activations[batch, save] = self._new_activations(batch, save)
        return self.activations[batch, save]

    def _new_activations(self, batch: int, save: bool) -> Activations:
        groups, shape = -(-batch // self._pair), self._shape
        flat = torch.empty(batch, shape.flat, dtype=self._precision)
        saved: list[Tensor] = []
        if save:
            words = [conv.in_height * conv.in_width * conv.in_channels for conv in self._convs]
            # A tile may reach behind the last: a step of 16 positions of a convolution, of 16 pairs of observations of
            # the hidden layer. What it finds there counts nothing, but must be finite.
            past = [16 * conv.stride * conv.in_channels if shape.tiles else 0 for conv in self._convs]
            saved = [_zero_behind(groups, count, behind) for count, behind in zip(words, past, strict=True)]
            # Where a word is one element, the hidden layer's input is saved as it is.
            rows = whole_tiles(groups) - groups if shape.tiles else 0
            saved.append(flat if self._pair == 1 else _zero_behind(groups, shape.flat, rows * shape.flat))
        nonzero_blocks = torch.empty(groups if save else 0, self._convs[0].in_height, dtype=torch.int64)
        normalizations = pass_normalizations(shape, self._normalizations, batch) if save else None
        columns = (shape.flat // 2, whole_tiles(batch)) if shape.tiles else (0, 0)
        flat_columns, hidden = torch.empty(columns, dtype=torch.int32), torch.empty(batch, shape.hidden)
        return Activations(saved, nonzero_blocks, flat, flat_columns, hidden, normalizations)

    def gradients_for(self, batch: int) -> tuple[ActivationGradients, bool]:
        """Return memory for the gradients of ``batch`` observations, and whether it replaces that of another number."""
        if self.gradients is not None and len(self.gradients.hidden) == batch:
            return self.gradients, False
        groups, shape = -(-batch // self._pair), self._shape
        words = [conv.out_height * conv.out_width * conv.out_channels for conv in self._convs]
        rows = whole_tiles(batch) if shape.tiles else batch
        transposed = []
        if shape.tiles:
            sizes = [conv.out_channels * math.prod(transposed_columns(conv)) for conv in self._convs]
            transposed = [torch.empty(groups, size, dtype=torch.int32) for size in sizes]
        self.gradients = ActivationGradients(
            # A tile takes 32 hidden units of 16 observations, so it may reach behind the last row.
            torch.zeros(rows + 1, shape.hidden, dtype=self._precision)[:batch],
            torch.empty(groups, shape.hidden, dtype=torch.int32),
            torch.empty(rows, shape.flat)[:batch],
            [torch.empty(groups, count, dtype=torch.int32) for count in words],
            transposed,
        )
        return self.gradients, True


def _zero_behind(groups: int, words: int, behind: int) -> Tensor:
    """Return int32 memory (groups, words) with so many more words behind it, which are zero."""
    memory = torch.empty(groups * words + behind, dtype=torch.int32)
    memory[groups * words :] = 0
    return memory[: groups * words].view(groups, words)


@dataclass
class PreparedUpdate:
    """The arguments of an update, made once for a target network's weights, a replay and a minibatch size.

    It keeps everything alive but the replay, which may be as large as the machine, and the memory of the backward pass,
    whose owner forgets a prepared update that refers to it.
    """

    target: PackedWeights
    storage: weakref.ref[uniform.ReplayStorage] | None
    size: int
    loss: TDLoss
    passes: ctypes.Array[ForwardArgs]
    replay: ReplayStorage | None
    loss_args: TDLossArgs
    backward: BackwardArgs
    q_gradient: Tensor
    activations: Activations
    spare_flat: Tensor
    alive: list[Any]

    def serves(self, target: PackedWeights, storage: uniform.ReplayStorage, size: int, loss: TDLoss) -> bool:
        """Whether these are the arguments of such an update."""
        same_replay = self.storage is not None and self.storage() is storage
        return same_replay and self.target is target and self.size == size and self.loss is loss

    def alternate_flat(self) -> None:
        """Let the hidden layer's input go to the other of two buffers.

        After a refused update somebody asks for the gradient of the one before.
        """
        activations, own = self.activations, self.passes[1]
        activations.flat, self.spare_flat = self.spare_flat, activations.flat
        own.flat = activations.flat.data_ptr()
        if activations.saved_inputs[-1] is self.spare_flat:  # where a word is one element
            activations.saved_inputs[-1] = activations.flat
            own.saved_input[len(activations.saved_inputs) - 1] = own.flat
