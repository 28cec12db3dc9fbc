"""Optimizers that torch does not have, and the choice by name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from wn_rl.errors import one_line
from wn_rl.parameterizations.scaled_output import Deferred

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


def _adamax(
    params: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    maxima: list[Tensor],
    scales: list[tuple[Tensor, Tensor, Tensor]],
    rate: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Update in place; the first ``len(scales)`` parameters are directions v with their (g, ∇g, ‖v‖)."""
    for index, (parameter, gradient, mean, maximum) in enumerate(zip(params, gradients, means, maxima, strict=True)):
        whole = gradient
        if index < len(scales):
            g, g_gradient, norm = scales[index]
            whole = gradient - (g * g_gradient / norm.square().unsqueeze(1)) * parameter
            gradient.copy_(whole)
        new_mean = torch.lerp(mean, whole, 1 - beta1)
        new_maximum = torch.maximum(maximum * beta2, whole.abs() + eps)
        new = parameter - rate * (new_mean / new_maximum)
        mean.copy_(new_mean)
        maximum.copy_(new_maximum)
        parameter.copy_(new)
        if index < len(scales):
            scales[index][2].copy_(new.square().sum(1).sqrt())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "every parameter gets a gradient in every step"
    return parameter.grad


def _term(entry: Deferred) -> Tensor:
    """Return ∇g for the term that is missing in ∇v, zeros where none is."""
    gradient = _gradient(entry.g)
    return gradient if entry.left_out else torch.zeros_like(gradient)


class CompiledAdamax(torch.optim.Adamax):
    """torch's Adamax as one compiled pass over each tensor, on a CPU with a C++ compiler.

    torch makes about 16 passes over memory. The same pass finishes the gradient of a weight-normalized layer's v (the
    second term of ∇v = (g/‖v‖) ∇w − (g ∇g/‖v‖²) v) and takes the norm of the new v; after a step ``v.grad`` is whole.
    Same state dict as torch's, same values but for rounding.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        deferred: Sequence[Deferred] = (),
    ) -> None:
        """Make the optimizer; the first step compiles.

        Args:
            params: what to train; all get a gradient in every step.
            lr: learning rate.
            betas: β1 and β2.
            eps: added to the absolute gradient.
            deferred: what :func:`wn_rl.parameterizations.weight_norm.defer` returned for the model.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        self._deferred = list(deferred)
        self._steps = 0
        self._written = functools.partial(_adamax, beta1=betas[0], beta2=betas[1], eps=eps)
        self._compiled: Callable[..., None] | None = None
        (group,) = self.param_groups
        self._dtype = group["params"][0].dtype
        directions = {id(entry.v) for entry in self._deferred}
        self._plain = [parameter for parameter in group["params"] if id(parameter) not in directions]

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
        # A tensor, since a number would be compiled into the code.
        rate = torch.tensor(group["lr"] / (1 - group["betas"][0] ** self._steps), dtype=self._dtype)
        # A scale's own step changes g, so the directions, whose gradient needs the old one, come first.
        ordered = [*(entry.v for entry in self._deferred), *self._plain]
        moments = [self._moments(parameter) for parameter in ordered]
        gradients = [_gradient(parameter) for parameter in ordered]
        scales = [(entry.g.detach(), _term(entry), entry.norm) for entry in self._deferred]
        for entry in self._deferred:
            if entry.known_norm() is None:
                torch.linalg.vector_norm(entry.v, dim=1, out=entry.norm)
        arguments = (
            [parameter.detach() for parameter in ordered],
            gradients,
            [state["exp_avg"] for state in moments],
            [state["exp_inf"] for state in moments],
            scales,
            rate,
        )
        if self._compiled is None:
            self._compiled = torch.compile(self._written, dynamic=False, options={"compile_threads": 1})
        try:
            self._compiled(*arguments)
        except BackendCompilerFailed as error:
            print(
                f"the optimizer step could not be compiled and runs as it is: {one_line(error)[:200]}", file=sys.stderr
            )
            self._compiled = self._written
            self._compiled(*arguments)
        for entry in self._deferred:
            entry.version = entry.v._version
            entry.left_out = False

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict."""
        for state in self.state.values():
            state["step"].fill_(self._steps)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's state dict."""
        super().load_state_dict(state_dict)
        self._steps = max((int(state["step"]) for state in self.state.values()), default=0)


def make_optimizer(
    name: OptimizerName,
    params: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    eps: float,
    beta1: float,
    beta2: float,
    rmsprop_decay: float,
    compiled: bool = False,
    deferred: Sequence[Deferred] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer called ``name`` over ``params``; only the arguments that it has are used.

    ``compiled`` and ``deferred`` are for adamax, see :class:`CompiledAdamax`.
    """
    if name == "adamax" and compiled:
        return CompiledAdamax(params, learning_rate, (beta1, beta2), eps, deferred)
    if name == "adamax":
        return torch.optim.Adamax(params, lr=learning_rate, betas=(beta1, beta2), eps=eps)
    if name == "adam":
        return torch.optim.Adam(params, lr=learning_rate, betas=(beta1, beta2), eps=eps)
    return RMSpropMnih(params, lr=learning_rate, decay=rmsprop_decay, eps=eps)
