"""Command lines: flags from dataclasses, one clear line for an error, the exit code that belongs to it."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import tyro

from wn_rl.errors import UsageError, WnRlError, one_line

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
) -> _Arguments:
    """Parse ``arguments`` into the dataclass ``kind``; ``--help`` prints and exits.

    Args:
        kind: a dataclass whose fields have docstrings.
        arguments: without the program's name.
        default: values of flags that are not given.
        description: above the flags in ``--help``; default: the dataclass's docstring.

    Raises:
        UsageError: an unknown flag, or a value of the wrong type.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    config = (tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes)
    if any(word in ("-h", "--help") for word in arguments):
        tyro.cli(kind, args=["--help"], description=description, config=config, **options)
    if is_dataclass(kind):
        _check_flags([f"--{entry.name.replace('_', '-')}" for entry in fields(kind)], arguments)
    with _wide_and_captured() as captured:
        try:
            parsed: _Arguments = tyro.cli(kind, args=list(arguments), description=description, config=config, **options)
            return parsed
        except SystemExit:
            pass
    raise UsageError(_first_sentence(captured.getvalue()))


def _check_flags(known: Sequence[str], arguments: Sequence[str]) -> None:
    for word in arguments:
        if not word.startswith("--"):
            continue
        flag = word.split("=", 1)[0].replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else " --help lists the flags."
            raise UsageError(f"unknown flag {flag}.{hint}")


def _first_sentence(box: str) -> str:
    """Fold tyro's boxed message into one line, without its help excerpt."""
    lines = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if text and not set(text) <= set("─ "):
            lines.append(text)
        elif lines and "│" in line:
            break  # the rule between the message and the help excerpt
    words = " ".join(line for line in lines if not re.fullmatch(r"─.*─", line))
    return one_line(Exception(words)) or "the arguments are not understood; see --help"


def given_flags(arguments: Sequence[str]) -> set[str]:
    """Return the names of the flags that stand in ``arguments``, as field names."""
    return {word[2:].split("=", 1)[0].replace("-", "_") for word in arguments if word.startswith("--")}


def take_option(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Take ``flag VALUE`` or ``flag=VALUE`` out of ``arguments``: (the last value or None, the rest).

    Raises:
        UsageError: the flag stands without a value.
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
    """Take ``flag``, which has no value, out of ``arguments``: (whether it stood there, the rest)."""
    rest = [word for word in arguments if word != flag]
    return len(rest) < len(arguments), rest


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script's ``main`` on the command line and exit; an error that a user can mend is one line on stderr."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except WnRlError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
