"""Attributes and hooks that a parameterization leaves on a layer: which one it is, and which submodules it added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from wn_rl.parameterizations.base import Parameterization

OWN = "_wn_rl_"
"""Prefix of every attribute that this package sets on a layer."""

_PARAMETERIZATION = f"{OWN}parameterization"
_ADDED = f"{OWN}added"


def parameterization_of(layer: nn.Module) -> Parameterization | None:
    """Return the parameterization on ``layer``, None if there is none (any more)."""
    parameterization: Parameterization | None = layer.__dict__.get(_PARAMETERIZATION)
    added = layer.__dict__.get(_ADDED)
    if not added:
        return parameterization
    for name in added:
        if name in layer._modules:
            return parameterization
    return None  # removed by torch.nn.utils.parametrize.remove_parametrizations()


def added_modules(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the submodules that the layer's parameterization has added."""
    return tuple(layer.__dict__.get(_ADDED, ()))


def note_parameterization(layer: nn.Module, parameterization: Parameterization, added: tuple[str, ...]) -> None:
    """Record on ``layer`` which parameterization it has, and the names of the submodules that were ``added``."""
    layer.__dict__[_PARAMETERIZATION] = parameterization
    layer.__dict__[_ADDED] = added


def forget_notes(layer: nn.Module) -> None:
    """Remove every attribute that this package has set on ``layer``."""
    for key in [key for key in layer.__dict__ if key.startswith(OWN)]:
        del layer.__dict__[key]


def was_taken_off(layer: nn.Module) -> bool:
    """Return whether torch's ``remove_parametrizations`` has removed a parameterization from ``layer``."""
    return _PARAMETERIZATION in layer.__dict__ and parameterization_of(layer) is None


def remove_hook(hooks: dict[int, Any], hook: object) -> None:
    """Remove a hook by its function, since a copied model has no handle for it."""
    for key in [key for key, registered in hooks.items() if registered is hook]:
        del hooks[key]
