"""Registries of classes by name; in that of parameterizations ``--param NAME`` and a checkpoint's are looked up."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from wn_rl.parameterizations.base import Parameterization

Base = TypeVar("Base")
_Entry = TypeVar("_Entry", bound=type[Any])


class Registry(Generic[Base]):
    """Classes of one kind under names; a user's own class enters it as the project's do.

    Attributes:
        entries: the classes by name, in the order of their registration. Each has its name in the attribute ``name``.
    """

    def __init__(self, what: str, base: type[Base]) -> None:
        """Start empty.

        Args:
            what: the field's word for such a class, for messages.
            base: of which the classes are subclasses.
        """
        self.what = what
        self.base = base
        self.entries: dict[str, type[Base]] = {}

    def register(self, name: str) -> Callable[[_Entry], _Entry]:
        """Enter a class under ``name`` (a class decorator).

        Raises:
            ValueError: the name is taken by another class, or holds a colon or a space.
        """
        if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
            raise ValueError(f"'{name}' is not a name: letters, digits, '_', '-' and '.' make one")

        def enter(entry: _Entry) -> _Entry:
            taken = self.entries.get(name, entry)
            if taken is not entry and qualified(taken) != qualified(entry):  # a module may be loaded anew
                raise ValueError(f"the {self.what} name '{name}' is taken by {qualified(taken)}")
            entry.name = name
            self.entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> type[Base]:
        """Return the class registered under ``name``, or registered anywhere and called ``module:Name``.

        Imports nothing.

        Raises:
            KeyError: no class has this name.
        """
        if name in self.entries:
            return self.entries[name]
        for entry in self.entries.values():
            if qualified(entry) == name:
                return entry
        raise KeyError(name)

    def load(self, reference: str) -> type[Base]:
        """Import the module of ``module:Name`` and return the class in it.

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
        if not (isinstance(entry, type) and issubclass(entry, self.base)):
            hint = "" if entry is None else f": it must be a subclass of {self.base.__name__}"
            raise ValueError(f"'{module_name}' has no {self.what} called '{class_name}'{hint}")
        if entry not in self.entries.values():
            raise ValueError(f"'{reference}' is not registered: decorate the class with @register(\"its_name\")")
        return entry


def qualified(entry: type[Any]) -> str:
    """Return ``module:Name`` of a class."""
    return f"{entry.__module__}:{entry.__qualname__}"


PARAMETERIZATIONS = Registry("parameterization", Parameterization)
_REGISTRY = PARAMETERIZATIONS.entries


def register(name: str) -> Callable[[_Entry], _Entry]:
    """Enter a :class:`Parameterization` subclass under ``name`` (a class decorator).

    Raises:
        ValueError: the name is taken by another class, or holds a colon or a space.
    """
    return PARAMETERIZATIONS.register(name)


def names() -> tuple[str, ...]:
    """Return the registered names in the order of their registration."""
    return tuple(PARAMETERIZATIONS.entries)


def get(name: str) -> type[Parameterization]:
    """Return the class registered under ``name``, or registered anywhere and called ``module:Name``. Imports nothing.

    Raises:
        KeyError: no parameterization has this name.
    """
    return PARAMETERIZATIONS.get(name)


def load(reference: str) -> type[Parameterization]:
    """Import the module of ``module:Name`` and return the parameterization in it; see :meth:`Registry.load`.

    Raises:
        ValueError: there is no such module or class, or the class is not registered; the message says which.
    """
    return PARAMETERIZATIONS.load(reference)
