"""Weight normalization by scaling outputs: y = (g / ‖v‖) · (v·x) + b, the cheap way to the values of w = g · v / ‖v‖.

Computing w costs a pass over all weights in the forward and several in the backward pass; the outputs of a minibatch
are far fewer. What is left over a plain layer is one pass over v for its norm and one over its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _precision(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would compute, or that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, g: Tensor, b: Tensor | None, low: Tensor) -> Any:  # noqa: ANN401
        norm = torch.linalg.vector_norm(v, dim=1)
        scale = g.flatten() / norm
        t = x @ low.T
        ctx.save_for_backward(x, v, low, t, scale, norm)
        ctx.g_shape = g.shape
        ctx.has_bias = b is not None
        y = t * scale.to(t.dtype)
        return y if b is None else y.add_(b.to(t.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        x, v, low, t, scale, norm = ctx.saved_tensors
        dt = dy * scale.to(dy.dtype)
        dx = dt @ low if ctx.needs_input_grad[0] else None
        flat_dy = dy.reshape(-1, dy.shape[-1])
        ds = (flat_dy * t.reshape_as(flat_dy)).sum(0, dtype=v.dtype)
        dv = (dt.reshape_as(flat_dy).T @ x.reshape(-1, x.shape[-1])).to(v.dtype)
        # s = g / ‖v‖, so ∂s/∂v = −s · v / ‖v‖².
        dv.addcmul_(v, (-ds * scale / norm.square())[:, None])
        dg = (ds / norm).view(ctx.g_shape)
        db = flat_dy.sum(0, dtype=v.dtype) if ctx.has_bias else None
        return dx, dv, dg, db, None


class _ScaledConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        v: Tensor,
        g: Tensor,
        b: Tensor | None,
        low: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Any:  # noqa: ANN401
        norm = torch.linalg.vector_norm(v, dim=(1, 2, 3))
        scale = g.flatten() / norm
        t = torch.conv2d(x, low, None, stride, padding, dilation, groups)
        ctx.save_for_backward(x, v, low, t, scale, norm)
        ctx.g_shape = g.shape
        ctx.has_bias = b is not None
        ctx.geometry = (stride, padding, dilation, groups)
        y = t * scale.to(t.dtype)[:, None, None]
        return y if b is None else y.add_(b.to(t.dtype)[:, None, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        x, v, low, t, scale, norm = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        axes = [axis for axis in range(dy.dim()) if axis != dy.dim() - 3]
        dt = dy * scale.to(dy.dtype)[:, None, None]
        ds = (dy * t).sum(axes, dtype=v.dtype)
        dx, dv, _ = torch.ops.aten.convolution_backward(
            dt, x, low, None, stride, padding, dilation, False, [0, 0], groups, [ctx.needs_input_grad[0], True, False]
        )
        dv = dv.to(v.dtype)
        dv.addcmul_(v, (-ds * scale / norm.square())[:, None, None, None])
        dg = (ds / norm).view(ctx.g_shape)
        db = dy.sum(axes, dtype=v.dtype) if ctx.has_bias else None
        return dx, dv, dg, db, None, None, None, None, None


def scaled_linear(x: Tensor, v: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
    """Return (g / ‖v‖) · (v·x) + b.

    Args:
        x: shape (…, inputs).
        v: shape (units, inputs).
        g: shape (units, 1).
        b: shape (units,), or None.
    """
    dtype = _precision(x)
    y: Tensor = _ScaledLinear.apply(x.to(dtype), v, g, b, v.detach().to(dtype))  # type: ignore[no-untyped-call]
    return y


def scaled_conv2d(
    x: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return (g / ‖v‖) · (v ∗ x) + b.

    Args:
        x: shape (B, channels, height, width).
        v: shape (units, channels / groups, kernel height, kernel width).
        g: shape (units, 1, 1, 1).
        b: shape (units,), or None.
        stride: of the convolution, as are the others.
        padding: zeros on each side.
        dilation: of the kernel.
        groups: of channels.
    """
    dtype = _precision(x)
    y: Tensor = _ScaledConv2d.apply(  # type: ignore[no-untyped-call]
        x.to(dtype), v, g, b, v.detach().to(dtype), stride, padding, dilation, groups
    )
    return y
