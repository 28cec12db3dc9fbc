"""Printing that never costs a run: what an output cannot encode is replaced, and one that went away is forgotten."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

_READABLE = "wn_rl.readable"
_IN_ASCII = {
    "±": "+-",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "×": "x",
    "·": "*",
    "≥": ">=",
    "≤": "<=",
    "→": "->",
    "ε": "epsilon",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "σ": "sigma",
    "√": "sqrt",
    "‖": "||",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
"""What stands for a letter where the output has none; for others a question mark does."""


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(_READABLE, _replace)


def readable(stream: TextIO) -> TextIO:
    """Let ``stream`` replace what its encoding has no letter for, instead of raising; returns it."""
    if hasattr(stream, "reconfigure"):
        with suppress(ValueError, OSError):  # closed, or detached
            stream.reconfigure(errors=_READABLE)
    return stream


def forget(stream: TextIO) -> None:
    """Let what is still to be printed to ``stream``, whose reader has gone, go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def make_standard_streams_readable() -> None:
    """Apply :func:`readable` to standard output and standard error."""
    for stream in (sys.stdout, sys.stderr):
        readable(stream)
