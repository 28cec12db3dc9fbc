"""The structures of ``csrc/structs.h``, field by field; layouts are said there.

Pointers are addresses of contiguous tensors, which the owner of a structure keeps alive.
"""

from __future__ import annotations

import ctypes
import enum

import torch

MAX_CONVOLUTIONS, MAX_FRAMES, MAX_BLOCKS, MAX_TILE = 8, 64, 64, 12
"""As in ``csrc/structs.h`` and ``csrc/simd.h``."""
FLOAT32, BFLOAT16 = 0, 1


class WeightKind(enum.IntEnum):
    """How a layer's weight is made of what is trained; see ``csrc/structs.h``."""

    PLAIN = 0
    NORM = 1
    NORM_EXP = 2
    UNIT = 3
    UNIT_SCALED = 4
    SPECTRAL = 5
    GIVEN = 6


class OptimizerKind(enum.IntEnum):
    """The optimizers; see ``csrc/structs.h``."""

    ADAMAX = 0
    ADAM = 1
    RMSPROP_MNIH = 2


class TileStage(enum.IntFlag):
    """Stages of an update that the tile unit computes; see ``csrc/structs.h``."""

    CONV_FORWARD = 1
    HIDDEN_FORWARD = 2
    FLAT_BACKWARD = 4
    HIDDEN_WEIGHT = 8
    CONV_INPUT = 16
    CONV_WEIGHT = 32


Integer, Float, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
Pointers = Pointer * MAX_CONVOLUTIONS


def precision_code(precision: torch.dtype) -> int:
    """Return the number that stands for a precision in C."""
    return BFLOAT16 if precision is torch.bfloat16 else FLOAT32


def _fields(kind: type, *names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names)


class TrainedLayerStruct(ctypes.Structure):
    """``TrainedLayer``: a layer as a matrix, its moments and its packed weight."""

    _fields_ = (
        *_fields(Integer, "units", "inputs", "weight_kind"),
        *_fields(Integer, "packed_bfloat16", "gradient_bfloat16", "bias_gradient_bfloat16", "v_gradient_bfloat16"),
        *_fields(Integer, "packed_unit_stride", "gradient_unit_stride", "transposed_unit_stride", "transposed_pair"),
        ("input_scale", Float),
        *_fields(Pointer, "packed_offset", "transposed_offset", "gradient_offset"),
        *_fields(Pointer, "v", "v_moment1", "v_moment2", "g", "g_moment1", "g_moment2"),
        *_fields(Pointer, "b", "b_moment1", "b_moment2", "gain", "gain_moment1", "gain_moment2"),
        *_fields(Pointer, "g_gradient", "row_factor", "v_factor", "v_gradient", "norm"),
        ("iterations", Integer),
        ("normalize_eps", Float),
        *_fields(Pointer, "left", "right", "c", "product", "alignment", "sigma"),
        *_fields(Pointer, "packed", "packed_bias", "transposed", "packed_gradient", "bias_gradient"),
        ("gain_gradient", Pointer),
    )


class ConvShape(ctypes.Structure):
    """Input and output of a convolution; the first layer's input positions are blocks of pixels."""

    _fields_ = _fields(
        Integer, "in_height", "in_width", "in_channels", "kernel", "stride", "out_height", "out_width", "out_channels"
    )


class NetworkShape(ctypes.Structure):
    """All sizes of a network, and of the memory that its passes take."""

    _fields_ = (
        *_fields(Integer, "precision", "convolutions"),
        ("convolution", ConvShape * MAX_CONVOLUTIONS),
        *_fields(Integer, "frames", "block", "flat", "hidden", "actions"),
        *_fields(Integer, "max_activation", "max_positions", "workspace_bytes", "tiles"),
        ("transposed_columns", Integer * MAX_CONVOLUTIONS),
    )


class NormalizationStruct(ctypes.Structure):
    """``Normalization``: how a layer's sums are normalized, and what the passes over a minibatch keep of it."""

    _fields_ = (
        *_fields(Integer, "over", "units", "positions", "mean_only"),
        *_fields(Float, "eps", "rate"),
        *_fields(Pointer, "gain", "bias", "running_mean", "running_var", "sums", "mean", "scale", "variance"),
        *_fields(Pointer, "observation_mean", "observation_square", "nonzero"),
        *_fields(Pointer, "gradient", "bias_parts", "gain_parts", "bias_gradient", "gain_gradient"),
    )


class ForwardArgs(ctypes.Structure):
    """One network's forward pass over a batch of observations."""

    _fields_ = (
        *_fields(Pointers, "conv_weight", "conv_bias"),
        *_fields(Pointer, "hidden_weight", "hidden_bias", "output_weight", "output_bias"),
        ("normalization", Pointer * (MAX_CONVOLUTIONS + 2)),
        *_fields(Pointer, "frames", "frame_indices"),
        *_fields(Integer, "frame_index_stride", "batch"),
        ("saved_input", Pointer * (MAX_CONVOLUTIONS + 1)),
        *_fields(Pointer, "nonzero_blocks", "flat", "flat_columns", "hidden", "q_values"),
    )


class BackwardArgs(ctypes.Structure):
    """The backward pass after a :class:`ForwardArgs`."""

    _fields_ = (
        ("transposed_weight", Pointers),
        *_fields(Pointer, "q_gradient", "hidden_gradient", "hidden_gradient_pairs", "flat_gradient"),
        *_fields(Pointers, "conv_gradient", "transposed_gradient", "weight_gradient", "bias_gradient"),
    )


class ReplayStorage(ctypes.Structure):
    """What replay keeps of its entries."""

    _fields_ = (
        *_fields(Pointer, "entry_of", "age", "actions", "terminals", "rewards"),
        *_fields(Integer, "capacity", "num_envs", "frames"),
    )


class TDLossArgs(ctypes.Structure):
    """A minibatch of transitions, without its frames, and the loss."""

    _fields_ = (
        *_fields(Pointer, "frame_indices", "actions", "rewards", "terminals", "q_gradient", "sums", "stage_seconds"),
        *_fields(Float, "gamma", "reward_clip"),
        *_fields(Integer, "mean", "allow_nonfinite"),
    )


class OptimizerStep(ctypes.Structure):
    """One optimizer step."""

    _fields_ = (("kind", Integer), *_fields(Float, "step_size", "beta1", "beta2", "eps", "correction"))


STRUCTS = (
    TrainedLayerStruct,
    NetworkShape,
    ForwardArgs,
    BackwardArgs,
    ReplayStorage,
    TDLossArgs,
    OptimizerStep,
    NormalizationStruct,
)
"""In the order of the C function ``struct_sizes``."""
