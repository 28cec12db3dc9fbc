"""Types of configuration keys as a user writes them: counts, ``auto``, options, layer names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_count(text: str) -> int:
    """Return the integer that ``200M``, ``2e6``, ``500k`` or ``1_000_000`` means.

    Raises:
        ValueError: it is not an integer.
    """
    match = re.fullmatch(r"([-+]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?)\s*([kKmMgGbB]?)", text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a count such as 200M, 2e6, 500k or 10000")
    number, suffix = match[1].replace("_", ""), match[2].lower()
    if re.fullmatch(r"[-+]?[0-9]+", number):
        return int(number) * _SUFFIXES.get(suffix, 1)
    value = float(number) * _SUFFIXES.get(suffix, 1)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"'{text}' is not a whole number")
    return int(value)


Count = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


class _Auto(int):
    """An integer that is not chosen yet; only :data:`AUTO` is one."""

    def __repr__(self) -> str:
        return "auto"

    __str__ = __repr__


AUTO = _Auto(0)
"""``num_envs: auto`` until :func:`wn_rl.machine.resolve_device` chooses; not to be computed with before."""


def parse_num_envs(text: str) -> int:
    """Return :data:`AUTO` for ``auto``, else as :func:`parse_count`.

    Raises:
        ValueError: it is neither.
    """
    if text.strip() == "auto":
        return AUTO
    try:
        return parse_count(text)
    except ValueError as error:
        raise ValueError(f"{error}, nor auto") from None


def is_auto(value: object) -> bool:
    """Return whether ``value`` is :data:`AUTO` or a copy of it; a 0 is not."""
    return isinstance(value, _Auto)


EnvCount = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|auto",
        instance_from_str=lambda words: parse_num_envs(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
Options = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE …",
        instance_from_str=lambda words: parse_options(words),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={option}" for name, option in value.items()],
    ),
]
Names = Annotated[
    tuple[str, ...] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="LAYER …",
        instance_from_str=lambda words: tuple(words),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: list(value or ()),
    ),
]


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return ``g=exp rate=0.05`` as a mapping from name to text.

    Raises:
        ValueError: a word is not NAME=VALUE, or a name appears twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"'{word}' is not NAME=VALUE, or the name appears twice")
        found[name] = value
    return found
