"""What stands on a layer about its parameterization: which one it is, and what that has added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from wn_rl.parameterizations.base import Parameterization

OWN = "_wn_rl_"
"""How every attribute begins that this package writes on a layer."""

_ENTRY = f"{OWN}parameterization"
_ADDED = f"{OWN}added"


def parameterization_of(layer: nn.Module) -> Parameterization | None:
    """Return the parameterization on ``layer``, None where there is none (any more)."""
    entry: Parameterization | None = layer.__dict__.get(_ENTRY)
    added = layer.__dict__.get(_ADDED)
    if not added:
        return entry
    for name in added:
        if name in layer._modules:
            return entry
    return None  # taken off by torch.nn.utils.parametrize.remove_parametrizations()


def added_modules(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the submodules that the layer's parameterization has brought."""
    return tuple(layer.__dict__.get(_ADDED, ()))


def note_parameterization(layer: nn.Module, entry: Parameterization, added: tuple[str, ...]) -> None:
    """Write on ``layer`` which parameterization it carries, and which submodules that has ``added``."""
    layer.__dict__[_ENTRY] = entry
    layer.__dict__[_ADDED] = added


def forget_notes(layer: nn.Module) -> None:
    """Remove whatever this package has written on ``layer``."""
    for key in [key for key in layer.__dict__ if key.startswith(OWN)]:
        del layer.__dict__[key]


def was_taken_off(layer: nn.Module) -> bool:
    """Return whether torch's ``remove_parametrizations`` has taken a parameterization off ``layer``."""
    return _ENTRY in layer.__dict__ and parameterization_of(layer) is None
