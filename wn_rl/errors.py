"""Errors that a user can fix: each is one clear line and has its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class WnRlError(Exception):
    """An error that one line can explain; scripts exit with ``exit_code``."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message on one line, whatever a name or a value that it quotes contains."""
        return " ".join(super().__str__().splitlines())


class UsageError(WnRlError):
    """The command, the configuration or an argument is wrong (exit code 2)."""

    exit_code = 2


class CheckpointError(WnRlError):
    """A checkpoint is missing, damaged or belongs to another network (exit code 1)."""


class OtherVersionError(CheckpointError):
    """A checkpoint is intact, but of a version of this project that this one does not read (exit code 1)."""


class NonFiniteLossError(WnRlError):
    """The loss became NaN or infinite; the last good checkpoint is kept (exit code 1)."""


@dataclass(frozen=True)
class Failure:
    """One of several checkpoints or runs that could not be read or scored, and the one line that says why."""

    path: Path
    message: str
    exit_code: int


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, with single spaces."""
    return " ".join(str(error).split()) or type(error).__name__


def closest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``" Did you mean …?"`` for the names nearest to ``name``, or an empty string."""
    by_folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_folded, n=limit, cutoff=0.5)
    if not matches:
        return ""
    return " Did you mean " + " or ".join(f"'{by_folded[match]}'" for match in matches) + "?"
