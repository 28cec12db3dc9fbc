"""An optimizer over one flat buffer whose step never synchronizes with the host, so that a CUDA graph can capture it.

torch's optimizers loop over a list of parameters, and an update on a GPU spends its time on those many small kernels.
Here all parameters, all gradients and all moments are in one buffer each, and the step counter is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wn_rl.config import TrainConfig

from ...optimizers import MOMENTS, OptimizerName

ALIGNMENT = 64
"""Each parameter begins at a multiple of so many elements: 256 bytes in float32, as in a GPU's allocator."""


class FlatOptimizer(torch.optim.Optimizer):
    """adamax, adam or rmsprop_mnih over one flat buffer: the values of torch's optimizer up to rounding.

    The parameters become views of the buffer; from then on they must not get other storage. The state dict is that of
    torch's optimizer, so a checkpoint of one loads into the other.
    """

    def __init__(
        self,
        name: OptimizerName,
        params: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        eps: float,
        beta1: float,
        beta2: float,
        rmsprop_decay: float,
    ) -> None:
        """Move the parameters into one buffer.

        Args:
            name: of the optimizer; only its own arguments are used.
            params: what to train, all of one dtype and on one device.
            learning_rate: learning rate.
            eps: as the plain optimizer's.
            beta1: decay of the gradient's running mean in adamax and adam.
            beta2: decay of the gradient's running scale in adamax and adam.
            rmsprop_decay: of both running means in rmsprop_mnih.
        """
        self._parameters = list(params)
        super().__init__(self._parameters, {"lr": learning_rate, "eps": eps})
        self.name = name
        self._rate, self._eps = learning_rate, eps
        self._betas = (rmsprop_decay, rmsprop_decay) if name == "rmsprop_mnih" else (beta1, beta2)
        first = self._parameters[0]
        rooms = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in self._parameters]
        self._places = [sum(rooms[:index]) for index in range(len(rooms))]
        self.values = torch.zeros(sum(rooms), dtype=first.dtype, device=first.device)
        self.gradient, self._mean, self._scale = (torch.zeros_like(self.values) for _ in range(3))
        self._fillers = [
            self.values.new_zeros(room - parameter.numel())
            for room, parameter in zip(rooms, self._parameters, strict=True)
        ]
        self._steps = torch.zeros((), dtype=torch.float64, device=first.device)
        for index, parameter in enumerate(self._parameters):
            place = self._of(self.values, index)
            place.copy_(parameter.detach())
            parameter.data = place
        self._shown = False
        self.compile(False)

    @classmethod
    def of(cls, config: TrainConfig, params: Iterable[nn.Parameter]) -> FlatOptimizer:
        """Return the optimizer that the configuration names."""
        assert config.learning_rate is not None
        return cls(
            config.optimizer,
            params,
            learning_rate=config.learning_rate,
            eps=config.optimizer_eps,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            rmsprop_decay=config.rmsprop_decay,
        )

    def _of(self, flat: Tensor, index: int) -> Tensor:
        """Return the part of a flat buffer that belongs to a parameter, in that parameter's shape."""
        parameter, start = self._parameters[index], self._places[index]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def minimize(self, loss: Tensor) -> None:
        """Make one step against the gradient of ``loss``, a scalar."""
        # Not backward(): it would add to .grad in one kernel per parameter, on the stream that first used it.
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        with torch.no_grad():
            parts: list[Tensor] = []
            for parameter, gradient, filler in zip(self._parameters, gradients, self._fillers, strict=True):
                parts.append((torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1))
                parts.append(filler)
            torch.cat(parts, out=self.gradient)
        self.step()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step with :attr:`gradient`."""
        # Outside the rule: torch 2.13, compiling for a CPU, loses changes of zero-dimensional tensors.
        self._steps.add_(1)
        self._rule()
        self.show_gradients()

    def compile(self, on: bool = True) -> None:
        """Compile the step with torch.compile when the next one is made; with ``on`` False, use the uncompiled one."""
        plain: Callable[[], None] = getattr(self, f"_{self.name}")
        self._rule = torch.compile(plain, fullgraph=True, dynamic=False) if on else plain

    def _correction(self, beta: float) -> Tensor:
        """Return 1 − βᵗ, float64."""
        return 1.0 - torch.pow(beta, self._steps)

    def _move(self, direction: Tensor, rate: Tensor) -> None:
        self.values.addcmul_(direction, rate.to(self.values.dtype))

    def _adamax(self) -> None:
        """Kingma & Ba 2015, algorithm 2, with ε where torch has it: u ← max(β2 u, |∇| + ε)."""
        beta1, beta2 = self._betas
        self._mean.lerp_(self.gradient, 1 - beta1)
        torch.maximum(self._scale.mul_(beta2), self.gradient.abs().add_(self._eps), out=self._scale)
        self._move(self._mean / self._scale, -self._rate / self._correction(beta1))

    def _adam(self) -> None:
        """Kingma & Ba 2015, algorithm 1."""
        beta1, beta2 = self._betas
        self._mean.lerp_(self.gradient, 1 - beta1)
        self._scale.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        root = self._scale.sqrt().div_(self._correction(beta2).sqrt()).add_(self._eps)
        self._move(self._mean / root, -self._rate / self._correction(beta1))

    def _rmsprop_mnih(self) -> None:
        """See :class:`agents.optimizers.RMSpropMnih`."""
        decay = self._betas[0]
        self._mean.lerp_(self.gradient, 1 - decay)
        self._scale.mul_(decay).addcmul_(self.gradient, self.gradient, value=1 - decay)
        variance = torch.addcmul(self._scale, self._mean, self._mean, value=-1).clamp_(min=0.0)
        self.values.addcdiv_(self.gradient, variance.add_(self._eps).sqrt_(), value=-self._rate)

    def show_gradients(self) -> None:
        """Set each parameter's ``.grad`` to its part of :attr:`gradient`, which every step overwrites."""
        if not self._shown:
            self._shown = True
            for index, parameter in enumerate(self._parameters):
                parameter.grad = self._of(self.gradient, index)

    def hide_gradients(self) -> None:
        """Set every ``.grad`` to None, as before the first step."""
        self._shown = False
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return copies, by parameter, with the names of torch's optimizer; waits for the device."""
        steps = int(self._steps)
        first, second = MOMENTS[self.name]
        state: dict[int, dict[str, Tensor]] = {}
        for index in range(len(self._parameters)) if steps else ():
            moments = {first: self._of(self._mean, index).clone(), second: self._of(self._scale, index).clone()}
            counted = {} if self.name == "rmsprop_mnih" else {"step": torch.tensor(float(steps))}
            state[index] = counted | moments
        groups = [{"lr": self._rate, "eps": self._eps, "params": list(range(len(self._parameters)))}]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state dict of this or of torch's optimizer into the buffers, which keep their addresses.

        Raises:
            KeyError: it is another optimizer's.
        """
        state = state_dict["state"]
        first, second = MOMENTS[self.name]
        for buffer in (self._mean, self._scale, self._steps, self.gradient):
            buffer.zero_()
        for index in range(len(self._parameters)) if state else ():
            self._of(self._mean, index).copy_(state[index][first])
            self._of(self._scale, index).copy_(state[index][second])
        if state:
            # rmsprop_mnih counts no steps; a number above 0 means that there is a state.
            self._steps.fill_(1.0 if self.name == "rmsprop_mnih" else float(state[0]["step"]))
        self.hide_gradients()
