"""Adamax for a network with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...optimizers import CompiledAdamax
from .packed_network import PackedNetwork


class FusedAdamax(CompiledAdamax):
    """Adamax as one pass in C over the layers of a :class:`.packed_network.PackedNetwork`.

    Same state dict as torch's, same values but for rounding. Gradients are written to ``.grad`` by
    :meth:`write_gradients` only, since nothing but a report needs them.
    """

    def __init__(self, network: PackedNetwork, lr: float, betas: tuple[float, float], eps: float) -> None:
        """Make the optimizer of all that ``network`` trains; arguments as :class:`agents.optimizers.CompiledAdamax`."""
        super().__init__(network.network.parameters(), lr, betas, eps)
        self._packed_network = network
        self._has_addresses = False
        self._has_gradients = False
        self._step_size = 0.0

    def _pass_addresses(self) -> None:
        """Tell the C structures where the moments are."""
        for struct, layer in zip(self._packed_network.structs, self._packed_network.layers, strict=True):
            for name in ("v", "g", "b", "gain"):
                parameter = getattr(layer, name)
                if parameter is None:
                    continue
                state = self._moments(parameter)
                for key in ("exp_avg", "exp_inf"):
                    state[key] = state[key].contiguous()
                    setattr(struct, f"{name}_{key}", state[key].data_ptr())
        self._has_addresses = True

    def next_steps(self, count: int) -> tuple[list[float], tuple[float, float], float]:
        """Return what the next steps are made with: step sizes, learning rate / (1 − β1ᵗ); (β1, β2); ε."""
        if not self._has_addresses:
            self._pass_addresses()
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        step_sizes = [group["lr"] / (1 - beta1 ** (self._steps + number)) for number in range(1, count + 1)]
        return step_sizes, (beta1, beta2), group["eps"]

    def count_steps(self, step_sizes: Sequence[float]) -> None:
        """Count steps that were made, with these of the step sizes that :meth:`next_steps` returned."""
        if step_sizes:
            self._steps += len(step_sizes)
            self._step_size = step_sizes[-1]
            self._has_gradients = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients of the last :meth:`.packed_network.PackedNetwork.backward`."""
        (step_size,), betas, eps = self.next_steps(1)
        self._packed_network.step(step_size, betas, eps)
        self.count_steps([step_size])

    def write_gradients(self) -> None:
        """Write the gradients of the last step to ``.grad``; there are none before the first."""
        if self._has_gradients:
            self._packed_network.write_gradients(self._moments, self._step_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's state dict."""
        super().load_state_dict(state_dict)
        self._has_addresses = False
