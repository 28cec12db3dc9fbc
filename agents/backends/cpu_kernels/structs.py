"""The C structures of ``csrc``, field by field; addresses are of contiguous tensors that the owner keeps alive."""

from __future__ import annotations

import ctypes

MOST_CONVOLUTIONS, MOST_FRAMES, MOST_LINES = 8, 64, 64
"""As in ``passes.c``."""
LARGEST_TILE = 12
"""Places, likewise."""
Integer, Pointer = ctypes.c_int64, ctypes.c_void_p


class Convolution(ctypes.Structure):
    """Shapes of a convolution: of its input, of its kernel, of its output."""

    _fields_ = tuple(
        (name, Integer) for name in ("height", "width", "channels", "kernel", "stride", "down", "across", "units")
    )


class Shape(ctypes.Structure):
    """Shapes of the network, and the room that a thread needs."""

    _fields_ = (
        ("convolutions", Integer),
        ("convolution", Convolution * MOST_CONVOLUTIONS),
        *((name, Integer) for name in ("stack", "block", "flat", "hidden", "actions")),
        *((name, Integer) for name in ("largest", "most_places", "scratch")),
    )


class Pass(ctypes.Structure):
    """One forward pass: weights, observations, and what is kept of it."""

    _fields_ = (
        ("weight", Pointer * MOST_CONVOLUTIONS),
        ("bias", Pointer * MOST_CONVOLUTIONS),
        *((name, Pointer) for name in ("dense", "dense_bias", "output", "output_bias", "frames", "places")),
        *((name, Integer) for name in ("place_step", "batch")),
        ("seen", Pointer * (MOST_CONVOLUTIONS + 1)),
        *((name, Pointer) for name in ("lit", "flat", "hidden", "q_values")),
    )


class Back(ctypes.Structure):
    """What a backward pass needs beside its forward pass."""

    _fields_ = (
        ("weight", Pointer * MOST_CONVOLUTIONS),
        *((name, Pointer) for name in ("q_gradient", "hidden", "hidden_words", "flat")),
        ("words", Pointer * MOST_CONVOLUTIONS),
        ("gradient", Pointer * MOST_CONVOLUTIONS),
        ("bias_gradient", Pointer * MOST_CONVOLUTIONS),
    )


class Store(ctypes.Structure):
    """What the replay keeps of each entry."""

    _fields_ = (
        *((name, Pointer) for name in ("entry_of", "age", "actions", "terminals", "rewards")),
        *((name, Integer) for name in ("entries", "num_envs", "stack")),
    )


class Objective(ctypes.Structure):
    """Actions, rewards and ends of a minibatch, and the loss."""

    _fields_ = (
        *((name, Pointer) for name in ("places", "actions", "rewards", "terminals", "q_gradient", "sums", "seconds")),
        *((name, ctypes.c_float) for name in ("gamma", "clip")),
        *((name, Integer) for name in ("mean", "unchecked")),
    )
