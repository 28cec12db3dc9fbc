"""Load state dicts of torch's two weight norms into layers with ``wn``.

``torch.nn.utils.parametrizations.weight_norm`` names and shapes its tensors as ``wn`` does
(``parametrizations.weight.original0`` is g, ``…original1`` is v). The older ``torch.nn.utils.weight_norm`` has
``weight_g`` and ``weight_v``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Convert = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Converts g and v of w = g · v / ‖v‖, with g on any axis, to the pair that is trained here."""


def accept_older_weight_norm(layer: nn.Module, names: Sequence[str]) -> None:
    """Let ``load_state_dict`` of a parametrized layer read ``NAME_g`` and ``NAME_v`` for each of ``names``.

    A recurrent layer of which only some weights were normalized has the others plain; they are read too.
    """
    own = type(layer)  # this layer's own class since it is parametrized; removed with the parametrization
    plain: Any = own.__bases__[0]

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        slots: Any = self.parametrizations
        present = [name for name in names if name in slots]
        old = [name for name in present if {f"{prefix}{name}_g", f"{prefix}{name}_v"} <= state_dict.keys()]
        for name in present:
            parametrization = slots[name][0]
            try:
                if name in old:
                    g, v = state_dict.pop(f"{prefix}{name}_g"), state_dict.pop(f"{prefix}{name}_v")
                    pair = _pair(parametrization, g, v, slots[name].original0.shape)
                elif old and f"{prefix}{name}" in state_dict:
                    pair = parametrization.right_inverse(state_dict.pop(f"{prefix}{name}"))
                else:
                    continue
            except ValueError:
                *_, errors = rest
                errors.append(f"{prefix}{name}: log g of g = 0 is not defined, nor is a zero weight's direction")
                pair = (slots[name].original0.detach(), slots[name].original1.detach())
            for index, tensor in enumerate(pair):
                state_dict[f"{prefix}parametrizations.{name}.original{index}"] = tensor
        plain._load_from_state_dict(self, state_dict, prefix, *rest)

    setattr(own, "_load_from_state_dict", load)  # noqa: B010 - mypy knows the method


@torch.no_grad()
def _pair(parametrization: Any, g: Tensor, v: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return the trained tensors of ``parametrization`` for the older g and v; ``shape`` is that of its own g."""
    if not parametrization.exponential and g.shape == shape:
        return g, v
    axis = next((axis for axis in range(g.dim()) if g.shape[axis] > 1), 0) if g.dim() else -1
    if g.dim() not in (0, v.dim()) or (g.dim() and g.numel() != v.shape[axis]):
        return g, v  # of another layer: torch reports which shapes do not match
    # A norm over other axes, or log g: another g and v give the same weight.
    pair: tuple[Tensor, Tensor] = parametrization.right_inverse(torch._weight_norm(v, g, axis))
    return pair
