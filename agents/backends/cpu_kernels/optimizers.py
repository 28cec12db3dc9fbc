"""The optimizers for a network with packed weights: a step of everything is one pass in C."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...optimizers import MOMENTS, RMSpropMnih
from .packed_network import PackedNetwork
from .structs import OptimizerKind, OptimizerStep

PLAIN: dict[type[torch.optim.Optimizer], OptimizerKind] = {
    torch.optim.Adamax: OptimizerKind.ADAMAX,
    torch.optim.Adam: OptimizerKind.ADAM,
    RMSpropMnih: OptimizerKind.RMSPROP_MNIH,
}
"""The optimizers that the kernels know."""


def unsupported(optimizer: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> str:
    """Return why the kernels cannot make the steps of ``optimizer``, an empty text if they can.

    Args:
        optimizer: an agent's.
        expected: as its configuration describes it, of which the kernels know every option.
    """
    if type(optimizer) not in PLAIN:
        return f"the optimizer is a {type(optimizer).__name__}"
    if type(optimizer) is not type(expected) or optimizer.state or len(optimizer.param_groups) != 1:
        return "the agent has an optimizer of its own, or one that has made steps"
    group = optimizer.param_groups[0]
    own = [name for name, value in expected.defaults.items() if group[name] != value]
    return f"the agent has changed {own[0]} of its optimizer" if own else ""


class FusedOptimizer(torch.optim.Optimizer):
    """Makes the steps of a :class:`.packed_network.PackedNetwork`; mixed with the plain optimizer that it equals.

    Same state dict as the plain optimizer's, same values but for rounding. Gradients are written to ``.grad`` by
    :meth:`write_gradients` only, since nothing but a report needs them.
    """

    kind: ClassVar[OptimizerKind]

    @staticmethod
    def like(optimizer: torch.optim.Optimizer, network: PackedNetwork) -> FusedOptimizer:
        """Return one for all that ``network`` trains, with the arguments of a plain optimizer."""
        (group,) = optimizer.param_groups
        made: FusedOptimizer = _FUSED[PLAIN[type(optimizer)]](group["params"], **optimizer.defaults)
        made.attach(network)
        return made

    def attach(self, network: PackedNetwork) -> None:
        """Say whose steps these are."""
        self._network = network
        self._steps = 0
        self._has_addresses = False
        self._last_step: OptimizerStep | None = None

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Return both moments of a parameter, contiguous, in the shape of the parameter."""
        state: dict[str, Any] = self.state[parameter]
        names = MOMENTS[self.kind.name.lower()]  # type: ignore[index]
        if not state and self.kind is not OptimizerKind.RMSPROP_MNIH:
            state["step"] = torch.zeros(())
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state[name] = state[name].contiguous()
        return state[names[0]], state[names[1]]

    def _pass_addresses(self) -> None:
        """Tell the C structures where the moments are."""
        for struct, layer in zip(self._network.structs, self._network.layers, strict=True):
            for name in ("v", "g", "b", "gain"):
                parameter = getattr(layer, name)
                if isinstance(parameter, nn.Parameter):  # a weight that is given has no moments
                    for number, moment in enumerate(self.moments(parameter), start=1):
                        setattr(struct, f"{name}_moment{number}", moment.data_ptr())
        self._has_addresses = True

    def next_steps(self, count: int) -> ctypes.Array[OptimizerStep]:
        """Return what the next steps are made with."""
        if not self._has_addresses:
            self._pass_addresses()
        return (OptimizerStep * count)(*(self._step_number(self._steps + 1 + number) for number in range(count)))

    def _step_number(self, number: int) -> OptimizerStep:
        (group,) = self.param_groups
        if self.kind is OptimizerKind.RMSPROP_MNIH:
            return OptimizerStep(self.kind, group["lr"], group["decay"], group["decay"], group["eps"], 1.0)
        beta1, beta2 = group["betas"]
        correction = 1 / math.sqrt(1 - beta2**number) if self.kind is OptimizerKind.ADAM else 1.0
        return OptimizerStep(self.kind, group["lr"] / (1 - beta1**number), beta1, beta2, group["eps"], correction)

    def count_steps(self, steps: ctypes.Array[OptimizerStep], made: int) -> None:
        """Count steps that were made: the first ``made`` of those that :meth:`next_steps` returned."""
        if made:
            self._steps += made
            self._last_step = steps[made - 1]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients of the last :meth:`.packed_network.PackedNetwork.backward`."""
        del closure
        steps = self.next_steps(1)
        self._network.step(steps[0])
        self.count_steps(steps, 1)

    @torch.no_grad()
    def step_computed(self) -> None:
        """Make the last step of the parameters from which torch computes a weight, with their ``.grad``."""
        assert self._last_step is not None
        for parameter in self._network.computed_from:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.contiguous()
            addresses = (tensor.data_ptr() for tensor in (parameter, gradient, *self.moments(parameter)))
            threads = torch.get_num_threads()
            step = ctypes.byref(self._last_step)
            self._network.library.step_tensor(*addresses, parameter.numel(), threads, step)

    def write_gradients(self) -> None:
        """Write the gradients of the last step to ``.grad``; there are none before the first."""
        if self._last_step is not None:
            self._network.write_gradients(self._value_before)

    def _value_before(self, parameter: nn.Parameter, row_factor: Tensor, row: Tensor, v_factor: Tensor) -> Tensor:
        """Return what a parameter was before its last step, with the gradient row_factor · row + v_factor · value."""
        step = self._last_step
        assert step is not None
        first, second = self.moments(parameter)
        size, correction, eps = float(step.step_size), float(step.correction), float(step.eps)
        if self.kind is OptimizerKind.ADAMAX:
            return parameter + size * first / second
        if self.kind is OptimizerKind.ADAM:
            return parameter + size * first / (correction * second.sqrt() + eps)
        rate = size / ((second - first.square()).clamp(min=0.0) + eps).sqrt()
        return (parameter + rate * row_factor * row) / (1 - rate * v_factor)  # its step has the gradient itself

    def state_dict(self) -> dict[str, Any]:
        """Return the plain optimizer's state dict."""
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(self._steps)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the plain optimizer's state dict."""
        super().load_state_dict(state_dict)
        self._steps = max((int(state.get("step", 0)) for state in self.state.values()), default=0)
        self._has_addresses = False


class FusedAdamax(FusedOptimizer, torch.optim.Adamax):
    """torch's Adamax."""

    kind = OptimizerKind.ADAMAX


class FusedAdam(FusedOptimizer, torch.optim.Adam):
    """torch's Adam."""

    kind = OptimizerKind.ADAM


class FusedRMSpropMnih(FusedOptimizer, RMSpropMnih):  # type: ignore[misc]  # step is overloaded there
    """The RMSProp of Mnih et al. 2015."""

    kind = OptimizerKind.RMSPROP_MNIH


_FUSED: dict[OptimizerKind, type[Any]] = {kind.kind: kind for kind in (FusedAdamax, FusedAdam, FusedRMSpropMnih)}
