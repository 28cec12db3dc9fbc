"""Weight normalization by scaling outputs: y = (g / ‖v‖) · (v·x) + b, the cheap way to the values of w = g · v / ‖v‖.

Computing w costs a pass over all weights in the forward and several in the backward pass; a dense layer's outputs of a
minibatch are far fewer. What is left over a plain layer is one pass over v for its norm and one over its gradient. For
convolutions it is the other way round: few weights, many outputs, so there w is computed.
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
    def forward(ctx: Any, x: Tensor, v: Tensor, g: Tensor, b: Tensor | None) -> Any:  # noqa: ANN401
        v = v.detach()
        norm = torch.linalg.vector_norm(v, dim=1)
        low = v.to(x.dtype)
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
        dy, x, t = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), t.reshape(-1, t.shape[-1])
        dt = dy * scale.to(dy.dtype)
        ds = (dy * t).sum(0, dtype=v.dtype)
        dx = (dt @ low).reshape(ctx.saved_tensors[0].shape) if ctx.needs_input_grad[0] else None
        # s = g / ‖v‖, so ∂s/∂v = −s · v / ‖v‖².
        dv = (dt.T @ x).to(v.dtype).addcmul_(v, (ds * scale / norm.square()).neg_()[:, None])
        dg = (ds / norm).view(ctx.g_shape)
        db = dy.sum(0, dtype=v.dtype) if ctx.has_bias else None
        return dx, dv, dg, db


def scaled_linear(x: Tensor, v: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
    """Return (g / ‖v‖) · (v·x) + b.

    Args:
        x: shape (…, inputs).
        v: shape (units, inputs).
        g: shape (units, 1).
        b: shape (units,), or None.
    """
    y: Tensor = _ScaledLinear.apply(x.to(_precision(x)), v, g, b)  # type: ignore[no-untyped-call]
    return y
