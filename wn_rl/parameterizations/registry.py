"""The one registry of parameterizations: ``--param NAME`` and a checkpoint's name are looked up here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wn_rl.parameterizations.base import Parameterization

_REGISTRY: dict[str, type[Parameterization]] = {}
_Entry = TypeVar("_Entry", bound=type[Parameterization])


def register(name: str) -> Callable[[_Entry], _Entry]:
    """Enter a :class:`Parameterization` subclass under ``name`` (a class decorator).

    Raises:
        ValueError: the name is taken by another class, or holds a colon or a space.
    """
    if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
        raise ValueError(f"'{name}' is not a name: letters, digits, '_', '-' and '.' make one")

    def enter(entry: _Entry) -> _Entry:
        taken = _REGISTRY.get(name, entry)
        if taken is not entry and qualified(taken) != qualified(entry):  # a module may be loaded anew
            raise ValueError(f"the parameterization name '{name}' is taken by {qualified(taken)}")
        entry.name = name
        _REGISTRY[name] = entry
        return entry

    return enter


def qualified(entry: type[Parameterization]) -> str:
    """Return ``module:Name`` of a class."""
    return f"{entry.__module__}:{entry.__qualname__}"


def names() -> tuple[str, ...]:
    """Return the registered names in the order of their registration."""
    return tuple(_REGISTRY)


def get(name: str) -> type[Parameterization]:
    """Return the class registered under ``name``, or registered anywhere and called ``module:Name``. Imports nothing.

    Raises:
        KeyError: no parameterization has this name.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    for entry in _REGISTRY.values():
        if qualified(entry) == name:
            return entry
    raise KeyError(name)


def load(reference: str) -> type[Parameterization]:
    """Import the module of ``module:Name`` and return the parameterization in it.

    It runs the module's code: use it on what a person typed, never on what stands in a file.

    Raises:
        ValueError: there is no such module or class, or the class is not registered; the message says which.
    """
    module_name, _, class_name = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a user's own file lies where they are
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code may raise anything
        raise ValueError(f"cannot import '{module_name}': {type(error).__name__}: {error}") from None
    entry = getattr(module, class_name, None)
    if not (isinstance(entry, type) and issubclass(entry, Parameterization)):
        raise ValueError(f"'{module_name}' has no parameterization called '{class_name}'")
    if _REGISTRY.get(entry.name) is not entry:
        raise ValueError(f"'{reference}' is not registered: decorate the class with @register(\"its_name\")")
    return entry
