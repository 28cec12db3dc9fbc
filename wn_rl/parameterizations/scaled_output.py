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
        norm = torch.linalg.vector_norm(v, dim=1)
        scale = g.view(-1) / norm
        low = v.to(x.dtype)
        t = torch.mm(x, low.t())
        low_scale = scale.to(x.dtype)
        ctx.save_for_backward(x, v, low, t, scale, norm, low_scale)
        ctx.has_bias = b is not None
        return t * low_scale if b is None else torch.addcmul(b.to(x.dtype), t, low_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        x, v, low, t, scale, norm, low_scale = ctx.saved_tensors
        dt = dy * low_scale
        # s = g / ‖v‖, so ∂s/∂g = 1 / ‖v‖ and ∂s/∂v = −s · v / ‖v‖².
        dg = (dy * t).sum(0, dtype=v.dtype).div_(norm)
        dv = torch.mm(dt.t(), x).to(v.dtype).addcmul_(v, (dg * scale).div_(norm).neg_().unsqueeze(1))
        dx = torch.mm(dt, low) if ctx.needs_input_grad[0] else None
        db = dy.sum(0, dtype=v.dtype) if ctx.has_bias else None
        return dx, dv, dg.unsqueeze(1), db


def scaled_linear(x: Tensor, v: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
    """Return (g / ‖v‖) · (v·x) + b.

    Args:
        x: shape (…, inputs).
        v: shape (units, inputs).
        g: shape (units, 1).
        b: shape (units,), or None.
    """
    kind = x.device.type
    leading = x.shape[:-1]
    x = x.to(_precision(x)).reshape(-1, x.shape[-1])
    with torch.autocast(kind, enabled=False):
        y: Tensor = _ScaledLinear.apply(x, v, g, b)  # type: ignore[no-untyped-call]
    return y if len(leading) == 1 else y.view(*leading, -1)
