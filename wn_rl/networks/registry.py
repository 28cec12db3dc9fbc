"""The registry of networks: ``--network NAME`` and a checkpoint's name are looked up here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from wn_rl.errors import WnRlError, one_line
from wn_rl.networks.base import Network
from wn_rl.parameterizations.options import read_option
from wn_rl.parameterizations.registry import Registry, qualified

if TYPE_CHECKING:
    from wn_rl.networks.spec import QNetworkSpec

_Entry = TypeVar("_Entry", bound=type[Network])
NETWORKS = Registry("network", Network)


def register(name: str) -> Callable[[_Entry], _Entry]:
    """Enter a :class:`Network` subclass under ``name`` (a class decorator).

    Raises:
        ValueError: the name is taken by another class, or holds a colon or a space.
    """
    return NETWORKS.register(name)


def names() -> tuple[str, ...]:
    """Return the registered names in the order of their registration."""
    return tuple(NETWORKS.entries)


def get(name: str) -> type[Network]:
    """Return the class registered under ``name``, or registered anywhere and called ``module:Name``. Imports nothing.

    Raises:
        KeyError: no network has this name.
    """
    return NETWORKS.get(name)


def is_known(name: str) -> bool:
    """Return whether a network of this name, or called ``module:Name``, is registered. Imports nothing."""
    try:
        get(name)
    except KeyError:
        return False
    return True


def load(reference: str) -> type[Network]:
    """Import the module of ``module:Name`` and return the network in it.

    It runs the module's code: use it on what a person typed, never on what stands in a file.

    Raises:
        ValueError: there is no such module or class, or the class is not registered; the message says which.
    """
    return NETWORKS.load(reference)


def reference(network: type[Network]) -> str:
    """Return the name by which a configuration and a checkpoint call a registered class.

    It is ``module:Name`` of somebody's own class, so that the flag ``--network`` finds it later; the registered name of
    one of the project's, or of one in the script that was started.

    Raises:
        ValueError: it is not a network, or not registered.
    """
    if not (isinstance(network, type) and issubclass(network, Network)):
        raise ValueError(f"{network!r} is not a subclass of wn_rl.networks.Network")
    if network not in NETWORKS.entries.values():
        raise ValueError(f"'{qualified(network)}' is not registered: decorate the class with @register(\"its_name\")")
    of_project = network.__module__.startswith("wn_rl.")
    return network.name if of_project or network.__module__ == "__main__" else qualified(network)


def options(network: type[Network], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a network, complete: ``given`` over the defaults in its constructor.

    The keyword-only arguments of ``__init__`` are the options; their annotations say of which type each is.

    Args:
        network: the class.
        given: by name, untrusted; a text is parsed as the option's type.

    Raises:
        ValueError: an unknown option, a missing one, or a value that it cannot take.
    """
    arguments = inspect.signature(network.__init__).parameters.values()
    known = {argument.name: argument for argument in arguments if argument.kind is inspect.Parameter.KEYWORD_ONLY}
    for name in given:
        if name not in known:
            there = f"there are: {', '.join(sorted(known))}" if known else "it has none"
            raise ValueError(f"the network '{network.name}' has no option '{name}'; {there}")
    # Not those of other arguments, whose types may be imported for type checkers alone.
    annotated = {
        name: argument.annotation for name, argument in known.items() if argument.annotation is not argument.empty
    }
    try:
        hints = get_type_hints(SimpleNamespace(__annotations__=annotated), getattr(network.__init__, "__globals__", {}))
    except NameError as error:
        raise ValueError(f"the network '{network.name}': the type of an option is not known: {error}") from None
    complete = {}
    for name, argument in known.items():
        if name not in given and argument.default is inspect.Parameter.empty:
            raise ValueError(f"the network '{network.name}' needs the option '{name}'")
        value = given.get(name, argument.default)
        complete[name] = read_option(hints.get(name, type(argument.default)), name, value)
    return complete


def make(spec: QNetworkSpec) -> Network:
    """Return the network that ``spec`` describes, as its constructor leaves it: before any parameterization.

    Raises:
        ValueError: no network has this name, an option is wrong, or the constructor fails.
    """
    try:
        network = get(spec.network)
    except KeyError:
        raise ValueError(f"unknown network '{spec.network}'; there are: {', '.join(names())}") from None
    complete = options(network, spec.network_options)
    try:
        return network(spec, **complete)
    except WnRlError:
        raise
    except Exception as error:  # noqa: BLE001 - somebody else's code may raise anything
        told = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"the network '{spec.network}' cannot be built: {told}") from None
