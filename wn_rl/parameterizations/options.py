"""Options of a parameterization or a network, read as their types from flags and files."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin


def read_option(hint: Any, name: str, value: object) -> Any:  # noqa: ANN401 - the type is that of the option
    """Return the value of an option as its type.

    Args:
        hint: the type: bool, int, float, str or ``Literal``.
        name: of the option, for the message.
        value: untrusted; a text is parsed as the type.

    Raises:
        ValueError: it is not such a value.
    """
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if str(choice) == str(value):
                return choice
        raise ValueError(f"the option {name} is one of {', '.join(map(str, get_args(hint)))}, not {value!r}")
    if hint is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise ValueError(f"the option {name} is true or false, not {value!r}")
        return truth
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the option {name} is not {value!r}")
    try:
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return hint(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the option {name} is of type {hint.__name__}, not {value!r}") from None
