"""The one registry of parameterizations: ``--param NAME`` and a checkpoint's name are looked up here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from wn_rl.parameterizations.base import Parameterization

_REGISTRY: dict[str, type[Parameterization]] = {}
_Entry = TypeVar("_Entry", bound=type[Parameterization])


def register(name: str) -> Callable[[_Entry], _Entry]:
    """Enter a :class:`Parameterization` subclass under ``name`` (a class decorator).

    Raises:
        ValueError: the name is taken by another class.
    """

    def enter(entry: _Entry) -> _Entry:
        if _REGISTRY.get(name, entry) is not entry:
            raise ValueError(f"the parameterization name '{name}' is taken by {_REGISTRY[name].__qualname__}")
        entry.name = name
        _REGISTRY[name] = entry
        return entry

    return enter


def names() -> tuple[str, ...]:
    """Return the registered names in the order of their registration."""
    return tuple(_REGISTRY)


def get(name: str) -> type[Parameterization]:
    """Return the class registered under ``name``.

    Raises:
        KeyError: no parameterization has this name.
    """
    return _REGISTRY[name]
