"""Command lines: flags from dataclasses, one clear line for an error, and its exit code."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any, TypeVar, get_type_hints

import tyro

from wn_rl.errors import UsageError, WnRlError, one_line
from wn_rl.output import forget, make_standard_streams_readable

LONGEST_MESSAGE = 600
"""Most letters of an error line; the middle of a longer one is left out."""

_Arguments = TypeVar("_Arguments")


@contextlib.contextmanager
def _wide_and_captured() -> Iterator[io.StringIO]:
    captured = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        with contextlib.redirect_stderr(captured):
            yield captured
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def parse(
    kind: type[_Arguments],
    arguments: Sequence[str],
    *,
    default: _Arguments | None = None,
    description: str | None = None,
    suggest: Callable[[str], str] = lambda name: "",
) -> _Arguments:
    """Parse ``arguments`` into the dataclass ``kind``; ``--help`` prints and exits.

    Args:
        kind: a dataclass whose fields have docstrings.
        arguments: without the program's name.
        default: values of flags that are not given.
        description: above the flags in ``--help``; default: the dataclass's docstring.
        suggest: returns `` Did you mean …?`` for an unknown flag that it knows, given without dashes and with
            underscores, or an empty text.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    config = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
    if any(word in ("-h", "--help") for word in arguments):
        tyro.cli(kind, args=["--help"], description=description, config=config, **options)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        shown = [name for name, hint in hints.items() if tyro.conf.Suppress not in getattr(hint, "__metadata__", ())]
        _check_flags([f"--{name.replace('_', '-')}" for name in shown], arguments, suggest)
    with _wide_and_captured() as captured:
        try:
            parsed: _Arguments = tyro.cli(kind, args=list(arguments), description=description, config=config, **options)
            return parsed
        except SystemExit:
            pass
    raise UsageError(_first_sentence(captured.getvalue()))


def _check_flags(known: Sequence[str], arguments: Sequence[str], suggest: Callable[[str], str]) -> None:
    for word in arguments:
        if not word.startswith("--"):
            continue
        flag = word.split("=", 1)[0].replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else " --help lists the flags."
            raise UsageError(f"unknown flag {flag}.{suggest(flag[2:].replace('-', '_')) or hint}")


def _first_sentence(box: str) -> str:
    """Return tyro's message on one line, without its title, its list of attempts and its help excerpt.

    It is between the first rule (the box's upper edge, or the line below the title where the output is not
    Unicode) and the next.
    """
    lines: list[str] = []
    rules = 0
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if re.search(r"(─{3}|-{20})$", text):
            rules += 1
        elif rules == 1 and text.startswith("Got errors:"):
            break
        elif rules == 1 and text:
            lines.append(text)
    return one_line(Exception(" ".join(lines) or "the arguments are not understood; see --help"))


def given_flags(arguments: Sequence[str]) -> set[str]:
    """Return the names of the flags in ``arguments``, as field names."""
    return {word[2:].split("=", 1)[0].replace("-", "_") for word in arguments if word.startswith("--")}


def take_option(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Take ``flag VALUE`` or ``flag=VALUE`` out of ``arguments``: (the last value or None, the rest).

    Raises:
        UsageError: the flag has no value.
    """
    value: str | None = None
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, inline = word.partition("=")
        if name.replace("_", "-") != flag:
            rest.append(word)
            continue
        value = inline if equals else next(words, "")
        if not value or (not equals and value.startswith("--")):
            raise UsageError(f"{flag} needs a value")
    return value, rest


def take_switch(arguments: Sequence[str], flag: str) -> tuple[bool, list[str]]:
    """Take ``flag``, which has no value, out of ``arguments``: (whether it was there, the rest)."""
    rest = [word for word in arguments if word != flag]
    return len(rest) < len(arguments), rest


def fill_switch(arguments: Sequence[str], flag: str) -> list[str]:
    """Return ``arguments`` with ``flag`` as ``flag=True`` if no ``True`` or ``False`` follows it."""
    words = [*arguments, ""]
    return [
        f"{flag}=True" if word == flag and following not in ("True", "False") else word
        for word, following in pairwise(words)
    ]


def complain(message: str) -> None:
    """Print one error line on standard error."""
    if len(message) > LONGEST_MESSAGE:  # a flag of a megabyte must not hide what is wrong with it
        message = f"{message[: LONGEST_MESSAGE // 2]} … {message[-LONGEST_MESSAGE // 2 :]}"
    print(
        "error:",
        "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in message),
        file=sys.stderr,
    )


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script's ``main`` on the command line and exit; an error that a user can fix is one line on stderr."""
    make_standard_streams_readable()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except WnRlError as error:
        complain(one_line(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output went away.
        forget(sys.stdout)
        code = 1
    except OSError as error:
        # A path that the system refuses, e.g. too long or without permission.
        complain(f"{error.filename or 'a file'}: {error.strerror or error}")
        code = 1
    sys.exit(code)
