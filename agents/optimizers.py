"""Optimizers that torch does not have, and the choice by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import nn

OptimizerName = Literal["adamax", "adam", "rmsprop_mnih"]


class RMSpropMnih(torch.optim.Optimizer):
    """RMSProp as Mnih et al. 2015 used it (their code; Graves 2013, equations 38-41, without the heavy ball).

    With m and v the running means of the gradient and of its square, both with the same decay,
    Δw = −lr · ∇ / √(v − m² + ε). The variance, not the second moment, scales the step, and ε lies inside the root,
    so ``torch.optim.RMSprop(centered=True)`` is close but not it.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 2.5e-4, *, decay: float = 0.95, eps: float = 0.01
    ) -> None:
        """Make the optimizer.

        Args:
            params: what to train.
            lr: learning rate.
            decay: of both running means.
            eps: added to the variance; 0.01 fits a loss *summed* over the minibatch.
        """
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                gradient, mean, square = parameter.grad, state["mean"], state["square"]
                mean.lerp_(gradient, 1 - group["decay"])
                square.mul_(group["decay"]).addcmul_(gradient, gradient, value=1 - group["decay"])
                # Rounding can make the variance of a constant gradient negative.
                variance = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0.0)
                root = variance.add_(group["eps"]).sqrt_()
                parameter.addcdiv_(gradient, root, value=-group["lr"])
        return loss


def make_optimizer(
    name: OptimizerName,
    params: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    eps: float,
    beta1: float,
    beta2: float,
    rmsprop_decay: float,
) -> torch.optim.Optimizer:
    """Return the optimizer called ``name`` over ``params``; only the arguments that it has are used."""
    if name == "adamax":
        return torch.optim.Adamax(params, lr=learning_rate, betas=(beta1, beta2), eps=eps)
    if name == "adam":
        return torch.optim.Adam(params, lr=learning_rate, betas=(beta1, beta2), eps=eps)
    return RMSpropMnih(params, lr=learning_rate, decay=rmsprop_decay, eps=eps)
