"""Weight normalization by scaling outputs: y = (g / ‖v‖) · (v·x) + b, the cheap way to the values of w = g · v / ‖v‖.

Computing w costs a pass over all weights in the forward and several in the backward pass; a dense layer's outputs of a
minibatch are far fewer. What is left over a plain layer is one pass over v for its norm and one over its gradient. For
convolutions it is the other way round: few weights, many outputs, so there w is computed.
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
        norm: Tensor | None,
        complete: bool,
    ) -> Any:  # noqa: ANN401
        if norm is None:
            norm = torch.linalg.vector_norm(v, dim=1)
        scale = g.view(-1) / norm
        low = v.to(x.dtype)
        t = torch.mm(x, low.t())
        low_scale = scale.to(x.dtype)
        ctx.save_for_backward(x, v, g, low, t, scale, norm, low_scale)
        ctx.has_bias = b is not None
        ctx.complete = complete
        return t * low_scale if b is None else torch.addcmul(b.to(x.dtype), t, low_scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        if ctx.complete and (torch.is_grad_enabled() or transformed()):
            return _ScaledLinear._differentiable_gradient(ctx, dy)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an optimizer finishes this layer's gradient, so it cannot be differentiated (create_graph=True); "
                "that of a copy.deepcopy of the model can"
            )
        return _ScaledLinear._gradient(ctx, dy)

    @staticmethod
    def _differentiable_gradient(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        # From the inputs alone: what else was saved counts as constant.
        x, v, g, *_ = ctx.saved_tensors
        norm = torch.linalg.vector_norm(v, dim=1)
        scale = g.view(-1) / norm
        low = v.to(x.dtype)
        dt = dy * scale.to(x.dtype)
        dg = (dy * torch.mm(x, low.t())).sum(0, dtype=v.dtype) / norm
        dv = torch.mm(dt.t(), x).to(v.dtype) - v * (dg * scale / norm).unsqueeze(1)
        db = dy.sum(0, dtype=v.dtype) if ctx.has_bias else None
        return torch.mm(dt, low), dv, dg.unsqueeze(1), db, None, None

    @staticmethod
    def _gradient(ctx: Any, dy: Tensor) -> Any:  # noqa: ANN401
        x, v, _, low, t, scale, norm, low_scale = ctx.saved_tensors
        dt = dy * low_scale
        # s = g / ‖v‖, so ∂s/∂g = 1 / ‖v‖ and ∂s/∂v = −s · v / ‖v‖².
        dg = (dy * t).sum(0, dtype=v.dtype).div_(norm)
        dv = torch.mm(dt.t(), x).to(v.dtype)
        if ctx.complete:
            dv.addcmul_(v, (dg * scale).div_(norm).neg_().unsqueeze(1))
        dx = torch.mm(dt, low) if ctx.needs_input_grad[0] else None
        db = dy.sum(0, dtype=v.dtype) if ctx.has_bias else None
        return dx, dv, dg.unsqueeze(1), db, None, None


class Deferred:
    """What an optimizer that finishes the gradient of v itself shares with the layer that v belongs to.

    The second term of ∇v = (g/‖v‖) ∇w − (g ∇g/‖v‖²) v and the norm of the next v each cost a pass over all weights. An
    optimizer that passes over them anyway does both on the way, so the layer leaves the term out and takes the norm.

    Attributes:
        v: the trained direction, shape (units, inputs).
        g: its scale, shape (units, 1).
        norm: ‖v‖, shape (units,), as long as v has the ``version`` that it was taken of.
        left_out: whether the term is missing: a pass through the layer's own forward, say for a hook, computes it.
    """

    def __init__(self, v: torch.nn.Parameter, g: torch.nn.Parameter) -> None:
        """Start with the norm of v as it is."""
        self.v = v
        self.g = g
        self.norm = torch.linalg.vector_norm(v.detach(), dim=1)
        self.version = v._version
        self.left_out = False

    def restore(self, norm: Tensor) -> None:
        """Take over ‖v‖ of the v that was just loaded."""
        self.norm.copy_(norm)
        self.version = self.v._version

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: the copy of a layer has no such optimizer and finishes its gradients itself."""

    def known_norm(self) -> Tensor | None:
        """Return ‖v‖, or None where v was changed since."""
        return self.norm if self.v._version == self.version and self.v.dtype == self.norm.dtype else None


def scaled_linear(x: Tensor, v: Tensor, g: Tensor, b: Tensor | None, deferred: Deferred | None = None) -> Tensor:
    """Return (g / ‖v‖) · (v·x) + b.

    Args:
        x: shape (…, inputs).
        v: shape (units, inputs).
        g: shape (units, 1).
        b: shape (units,), or None.
        deferred: where an optimizer finishes the gradient of v: its first term alone is computed.
    """
    norm = None if deferred is None else deferred.known_norm()
    if deferred is not None and torch.is_grad_enabled():
        deferred.left_out = True
    kind = x.device.type
    leading = x.shape[:-1]
    x = x.to(_precision(x)).reshape(-1, x.shape[-1])
    with torch.autocast(kind, enabled=False):
        y: Tensor = _ScaledLinear.apply(x, v, g, b, norm, deferred is None)  # type: ignore[no-untyped-call]
    return y if len(leading) == 1 else y.view(*leading, -1)
