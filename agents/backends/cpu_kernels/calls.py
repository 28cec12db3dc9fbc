"""What is kept from one call of the kernels to the next: what is minimized, the memory of a pass, a whole call."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wn_rl.replay import Entries

from .packed_network import Working
from .structs import Back, Objective, Pass, Store


@dataclass(frozen=True)
class Loss:
    """What an update minimizes: the Huber loss of the TD error.

    Attributes:
        gamma: discount per agent step.
        reward_clip: rewards are clipped to ± this; 0: they are not.
        mean: over the minibatch; False: the sum.
        sums: float64, shape (3,): to these the means of loss, |TD error| and Q-value are added.
    """

    gamma: float
    reward_clip: float
    mean: bool
    sums: Tensor


@dataclass
class Room:
    """Memory of one pass over ``batch`` observations; what :meth:`CompiledNetwork.forward` leaves for the way back."""

    seen: list[Tensor]
    lit: Tensor
    flat: Tensor
    hidden: Tensor


@dataclass
class Call:
    """What an update is told, made once for a target network's weights, a replay and a size.

    It keeps everything alive but the replay, which may be as large as the machine, and the memory of the way back,
    whose owner forgets a call that refers to it.
    """

    target: Working
    kept: weakref.ref[Entries] | None
    size: int
    loss: Loss
    passes: ctypes.Array[Pass]
    store: Store | None
    objective: Objective
    back: Back
    q_gradient: Tensor
    room: Room
    spare: Tensor
    alive: list[Any]

    def serves(self, target: Working, kept: Entries, size: int, loss: Loss) -> bool:
        """Whether this is the call for such an update."""
        same_replay = self.kept is not None and self.kept() is kept
        return same_replay and self.target is target and self.size == size and self.loss is loss

    def turn(self) -> None:
        """Let what the dense layer sees go to the other of two places.

        After a refused update somebody asks for the gradient of the one before.
        """
        room, own = self.room, self.passes[1]
        room.flat, self.spare = self.spare, room.flat
        own.flat = room.flat.data_ptr()
        if room.seen[-1] is self.spare:  # where a word is one number
            room.seen[-1] = room.flat
            own.seen[len(room.seen) - 1] = own.flat


class Seen(NamedTuple):
    """Observations as places in a store of frames.

    Attributes:
        frames: uint8 (any, height, width), contiguous.
        places: int64 (B, stack), the frames of an observation next to each other.
    """

    frames: Tensor
    places: Tensor


def seen_in(observations: Tensor) -> Seen:
    """Return uint8 observations, (B, C, H, W), as places in themselves."""
    frames = observations.contiguous()
    batch, stack = frames.shape[:2]
    return Seen(frames.view(-1, *frames.shape[2:]), torch.arange(batch * stack).view(batch, stack))
