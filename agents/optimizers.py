"""Optimizers that torch does not have, and :func:`make_optimizer`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from wn_rl.config import TrainConfig
from wn_rl.errors import one_line

OptimizerName = Literal["adamax", "adam", "rmsprop_mnih"]
MOMENTS: dict[OptimizerName, tuple[str, str]] = {
    "adamax": ("exp_avg", "exp_inf"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "rmsprop_mnih": ("mean", "square"),
}
"""The names under which each optimizer keeps its two moments."""


class RMSpropMnih(torch.optim.Optimizer):
    """RMSProp as Mnih et al. 2015 used it (their code; Graves 2013, equations 38-41, without the heavy ball).

    With m and v the running means of the gradient and of its square, both with the same decay,
    Δw = −lr · ∇ / √(v − m² + ε). The variance, not the second moment, scales the step, and ε is inside the root,
    so ``torch.optim.RMSprop(centered=True)`` is close but not equal.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 2.5e-4, *, decay: float = 0.95, eps: float = 0.01
    ) -> None:
        """Make the optimizer.

        Args:
            params: what to train.
            lr: learning rate.
            decay: decay of both running means.
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


def _adamax(
    params: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    maxima: list[Tensor],
    rate: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Update in place: Kingma & Ba 2015, algorithm 2, with ε where torch has it; ``rate`` is lr / (1 − β1ᵗ)."""
    for parameter, gradient, mean, maximum in zip(params, gradients, means, maxima, strict=True):
        new_mean = torch.lerp(mean, gradient, 1 - beta1)
        new_maximum = torch.maximum(maximum * beta2, gradient.abs() + eps)
        new = parameter - rate * (new_mean / new_maximum)
        mean.copy_(new_mean)
        maximum.copy_(new_maximum)
        parameter.copy_(new)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "every parameter gets a gradient in every step"
    return parameter.grad


class CompiledAdamax(torch.optim.Adamax):
    """Adamax as one pass over each tensor, compiled by torch.compile, on a CPU with a C++ compiler.

    torch's own makes about 16 passes over memory. Same state dict as torch's, same values up to rounding.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        """Make the optimizer; the first step compiles.

        Args:
            params: what to train; all get a gradient in every step.
            lr: learning rate.
            betas: β1 and β2.
            eps: added to the absolute gradient.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        self._steps = 0
        self._plain = functools.partial(_adamax, beta1=betas[0], beta2=betas[1], eps=eps)
        self._compiled: Callable[..., None] | None = None

    @staticmethod
    def replaces(optimizer: torch.optim.Optimizer) -> bool:
        """Return whether ``optimizer`` is an Adamax as :func:`make_optimizer` makes it, before its first step."""
        return type(optimizer) is torch.optim.Adamax and not optimizer.state and len(optimizer.param_groups) == 1

    @classmethod
    def like(cls, optimizer: torch.optim.Optimizer) -> CompiledAdamax:
        """Return one with the parameters and the arguments of an Adamax."""
        (group,) = optimizer.param_groups
        return cls(group["params"], group["lr"], group["betas"], group["eps"])

    def _moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_inf"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step."""
        self._steps += 1
        (group,) = self.param_groups
        trained: list[nn.Parameter] = group["params"]
        # A tensor, since a number would become a constant of the compiled code.
        rate = torch.tensor(group["lr"] / (1 - group["betas"][0] ** self._steps), dtype=trained[0].dtype)
        moments = [self._moments(parameter) for parameter in trained]
        arguments = (
            [parameter.detach() for parameter in trained],
            [_gradient(parameter) for parameter in trained],
            [state["exp_avg"] for state in moments],
            [state["exp_inf"] for state in moments],
            rate,
        )
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, dynamic=False, options={"compile_threads": 1})
        try:
            self._compiled(*arguments)
        except BackendCompilerFailed as error:
            print(
                f"the optimizer step could not be compiled and runs uncompiled: {one_line(error)[:200]}",
                file=sys.stderr,
            )
            self._compiled = self._plain
            self._compiled(*arguments)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict."""
        for state in self.state.values():
            state["step"].fill_(self._steps)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's state dict."""
        super().load_state_dict(state_dict)
        self._steps = max((int(state["step"]) for state in self.state.values()), default=0)


def make_optimizer(config: TrainConfig, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the configured optimizer over ``params``; only the keys of that optimizer are used."""
    assert config.learning_rate is not None
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adamax":
        return torch.optim.Adamax(params, lr=config.learning_rate, betas=betas, eps=config.optimizer_eps)
    if config.optimizer == "adam":
        return torch.optim.Adam(params, lr=config.learning_rate, betas=betas, eps=config.optimizer_eps)
    return RMSpropMnih(params, lr=config.learning_rate, decay=config.rmsprop_decay, eps=config.optimizer_eps)
