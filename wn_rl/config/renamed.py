"""Former names of configuration keys and values: they still work, and one line says what they are called now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEYS = {"journal": "action_log"}
"""Former name of a key → its name."""
VALUES: dict[str, dict[str, str]] = {
    "action_log": {"whole": "full"},
    "output_init": {"literal": "unit-variance"},
}
"""Key → former value → the value."""


def current(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return configuration keys and values under their present names, and one line about those that were renamed.

    Args:
        values: as a file or a checkpoint has them. A former name stays where the present one is there too.

    Returns:
        The keys and values, and the line; an empty text if nothing was renamed.
    """
    renamed: dict[str, Any] = {}
    told = []
    for given, value in values.items():
        key = KEYS.get(given, given)
        if key in values:
            key = given
        renamed[key] = now = _value(key, value)
        if key != given or now != value:
            told.append(f"'{given}: {value}' is now '{key}: {now}'")
    if isinstance(chosen := renamed.get("chosen"), list | tuple):
        renamed["chosen"] = [KEYS.get(name, name) if isinstance(name, str) else name for name in chosen]
    return renamed, "; ".join(told)


def current_flags(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Return a command line with flags and values under their present names, and one line as :func:`current` does."""
    words = list(arguments)
    told = []
    for index, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        given = name[2:].replace("-", "_")
        key = KEYS.get(given, given)
        if key not in KEYS.values() and key not in VALUES:
            continue
        flag = f"--{key.replace('_', '-')}"
        separate = not equals and index + 1 < len(words)
        value = words[index + 1] if separate else value
        now = str(_value(key, value))
        if key == given and now == value:
            continue
        words[index] = f"{flag}={now}" if equals else flag
        if separate:
            words[index + 1] = now
        told.append(f"--{given.replace('_', '-')} {value} is now {flag} {now}")
    return words, "; ".join(told)


def _value(key: str, value: object) -> object:
    return VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
