"""Output that cannot end a run: letters that the encoding lacks are replaced, a closed output is ignored."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
"""Replacements for letters that the output cannot encode; others become a question mark."""


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(_READABLE, _replace)


def readable(stream: TextIO) -> TextIO:
    """Let ``stream`` replace letters that its encoding lacks, instead of raising; returns it."""
    if hasattr(stream, "reconfigure"):
        with suppress(ValueError, OSError):  # closed, or detached
            stream.reconfigure(errors=_READABLE)
    return stream


def forget(stream: TextIO) -> None:
    """Discard everything that is still printed to ``stream``, whose reader has gone away."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def make_standard_streams_readable() -> None:
    """Apply :func:`readable` to standard output and standard error."""
    for stream in (sys.stdout, sys.stderr):
        readable(stream)


_noticed: set[str] | None = set()
"""Notices that were printed already; None: none are printed."""


@contextmanager
def notices(*, shown: bool) -> Iterator[None]:
    """Print each notice of one command once, or with ``shown=False`` none."""
    global _noticed
    before, _noticed = _noticed, set() if shown else None
    try:
        yield
    finally:
        _noticed = before


def notice(line: str) -> None:
    """Print ``note: LINE`` on standard error, the same line once; something works, and the user should know more."""
    if _noticed is not None and line not in _noticed:
        _noticed.add(line)
        print(f"note: {line}", file=sys.stderr)
