"""Weight normalization of a dense layer by scaling its outputs: y = (g / ‖v‖) · (v·x) + b.

That is cheaper than computing w = g · v / ‖v‖, which reads or writes all weights once in the forward pass and several
times in the backward pass; the outputs of a dense layer for a minibatch are far fewer. Compared with a plain layer,
what remains is to read v once for its norm and its gradient once. Convolutions have few weights and many outputs, so
for them w is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wn_rl.parameterizations.base import transformed


def _precision(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would compute, or that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        v: Tensor,
        g: Tensor,
        b: Tensor | None,
    ) -> Any:  # noqa: ANN401
        norm = torch.linalg.vector_norm(v, dim=1)
        scale = g.view(-1) / norm
        low = v.to(x.dtype)
        t = torch.mm(x, low.t())
        low_scale = scale.to(x.dtype)
        ctx.save_for_backward(x, v, g, low, t, scale, norm, low_scale)
        ctx.has_bias = b is not None
        return t * low_scale if b is None else torch.addcmul(b.to(x.dtype), t, low_scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        if torch.is_grad_enabled() or transformed():
            return _ScaledLinear._gradient_for_second_derivatives(ctx, dy)
        return _ScaledLinear._gradient(ctx, dy)

    @staticmethod
    def _gradient_for_second_derivatives(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        # From the inputs alone: other saved tensors count as constants.
        x, v, g, *_ = ctx.saved_tensors
        norm = torch.linalg.vector_norm(v, dim=1)
        scale = g.view(-1) / norm
        low = v.to(x.dtype)
        dt = dy * scale.to(x.dtype)
        dg = (dy * torch.mm(x, low.t())).sum(0, dtype=v.dtype) / norm
        dv = torch.mm(dt.t(), x).to(v.dtype) - v * (dg * scale / norm).unsqueeze(1)
        db = dy.sum(0, dtype=v.dtype) if ctx.has_bias else None
        return torch.mm(dt, low), dv, dg.unsqueeze(1), db

    @staticmethod
    def _gradient(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        x, v, _, low, t, scale, norm, low_scale = ctx.saved_tensors
        dt = dy * low_scale
        # s = g / ‖v‖, so ∂s/∂g = 1 / ‖v‖ and ∂s/∂v = −s · v / ‖v‖².
        dg = (dy * t).sum(0, dtype=v.dtype).div_(norm)
        dv = torch.mm(dt.t(), x).to(v.dtype)
        dv.addcmul_(v, (dg * scale).div_(norm).neg_().unsqueeze(1))
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
