"""A run directory: its files, their columns, and how a resumed run truncates them."""

from __future__ import annotations

import csv
import errno
import fcntl
import glob
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from wn_rl import __version__
from wn_rl.errors import UsageError, WnRlError

EVALUATION_COLUMNS = ("frames", "episodes", "mean", "std", "min", "max", "mean_length", "seconds")
EPISODE_COLUMNS = ("frames", "return", "length")
_LOCK = ".lock"
CLOSING_SUFFIX = ".closing"
"""Suffix of the TensorBoard file with the end of a run, which is removed when the run is continued."""


def versions() -> dict[str, str]:
    """Return the versions of this project, of Python and of the packages on which results depend."""
    found = {"wn_rl": __version__, "python": platform.python_version()}
    for package in ("torch", "ale-py", "gymnasium", "numpy"):
        found[package] = metadata.version(package)
    return found


@contextmanager
def new_directory(game: str, param: str, preset: str, seed: int) -> Iterator[Path]:
    """Make ``runs/GAME-PARAM-PRESET-sSEED-TIME``, which no other run has; TIME is local, PARAM a class's name alone.

    If another run took the name within the same second, ``-2``, ``-3`` … is appended. If nothing was written to it, it
    is removed afterwards.

    Raises:
        WnRlError: it cannot be made.
    """
    name = f"{game}-{param.rpartition(':')[2]}-{preset}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = Path("runs")
    there = runs.is_dir()
    try:
        for number in itertools.count(1):
            path = runs / (name if number == 1 else f"{name}-{number}")
            if os.path.lexists(runs) and not runs.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            with suppress(FileExistsError):
                path.mkdir(parents=True)  # only one process succeeds, the others get the error
                break
    except OSError as error:
        raise WnRlError(f"cannot write to runs: {error.strerror}") from None
    try:
        yield path
    finally:
        _remove_unused(path)
        if not there:
            with suppress(OSError):  # another run may be in it
                runs.rmdir()


def _remove_unused(path: Path) -> None:
    """Remove a directory in which there is nothing, or nothing but a lock."""
    with suppress(OSError):
        if {entry.name for entry in path.iterdir()} <= {_LOCK}:
            (path / _LOCK).unlink(missing_ok=True)
            path.rmdir()


class RunDirectory:
    """The files of one run.

    ``config.yaml``, ``action_log.bin``, TensorBoard events, ``evaluations.csv``, ``episodes.csv``,
    ``checkpoints/latest``, ``checkpoints/best`` and ``summary.json``. Every axis is emulator frames.
    """

    def __init__(self, path: Path) -> None:
        """Name the directory; nothing is written yet."""
        self.path = path
        self.config = path / "config.yaml"
        self.evaluations = path / "evaluations.csv"
        self.episodes = path / "episodes.csv"
        self.summary = path / "summary.json"
        former = path / "journal.bin"  # in runs of earlier versions
        self.action_log = former if os.path.lexists(former) else path / "action_log.bin"
        self.nonfinite = path / "nonfinite"
        self.latest = path / "checkpoints" / "latest"
        self.best = path / "checkpoints" / "best"

    def create(self, config_yaml: str) -> None:
        """Write the first files of a new run, under its lock.

        Raises:
            UsageError: the directory holds a run already.
            WnRlError: it cannot be written.
        """
        try:
            if self.latest.exists() or self.latest.with_name("latest.previous").exists():
                raise UsageError(f"{self.path} already holds a run: name another --run-dir, or --resume {self.path}")
            if self.config.exists():  # no checkpoint to resume from yet
                raise UsageError(
                    f"{self.path} already holds a run, which has no checkpoint yet: name another --run-dir; "
                    f"--config {self.config} repeats it"
                )
            write_atomically(self.evaluations, _csv_lines([EVALUATION_COLUMNS]))
            write_atomically(self.episodes, _csv_lines([EPISODE_COLUMNS]))
            write_atomically(self.config, config_yaml)
        except OSError as error:
            raise WnRlError(f"cannot write to {self.path}: {error.strerror}") from None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the directory of a new run and keep other processes from it; see :meth:`locked`.

        Raises:
            UsageError: it is no directory.
            WnRlError: another process trains in it, or it cannot be written.
        """
        try:
            there = self.path.is_dir()
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"--run-dir {self.path}: a file is in the way") from None
        except OSError as error:
            raise WnRlError(f"cannot write to {self.path}: {error.strerror}") from None
        with self.locked():
            try:
                yield
            finally:
                if not there:
                    _remove_unused(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this directory.

        Raises:
            WnRlError: another process trains in it.
        """
        lock = self.path / _LOCK
        try:
            file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, which unlocks
        except OSError as error:
            raise WnRlError(f"cannot write to {self.path}: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                process = file.read(20).strip() or "?"
                raise WnRlError(
                    f"process {process} is training in {self.path}: wait for it or stop it, or name another --run-dir"
                ) from None
            except OSError:
                pass  # a file system without locks
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise WnRlError(f"{self.path} was removed by another process: try again")
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def cut(self, *, episodes: int, evaluations: int) -> None:
        """Remove the rows of both CSV files after these frames, for a run that is resumed there.

        Raises:
            WnRlError: a file is missing or damaged, or cannot be written.
        """
        for file, columns, frames in (
            (self.evaluations, EVALUATION_COLUMNS, evaluations),
            (self.episodes, EPISODE_COLUMNS, episodes),
        ):
            kept = [[row[column] for column in columns] for row in read_rows(file) if float(row["frames"]) <= frames]
            write_file(file, _csv_lines([columns, *kept]))

    def forget_closing_events(self) -> None:
        """Remove the TensorBoard files with the end of the run, for a run that is continued."""
        for file in self.path.glob(f"events.out.tfevents.*{CLOSING_SUFFIX}"):
            file.unlink(missing_ok=True)

    def append(self, file: Path, rows: Iterable[Sequence[object]], *, sync: bool = False) -> None:
        """Append rows to a CSV file of this run; ``sync`` waits for the disk.

        Raises:
            WnRlError: it cannot be written.
        """
        try:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(_csv_lines(rows))
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
        except OSError as error:
            raise WnRlError(f"cannot write to {file}: {error.strerror}") from None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace ``summary.json``; see :func:`write_file`."""
        write_file(self.summary, json.dumps(summary, indent=2) + "\n")

    def write_config(self, config_yaml: str) -> None:
        """Replace ``config.yaml``; see :func:`write_file`."""
        write_file(self.config, config_yaml)


@dataclass(frozen=True)
class Found:
    """The paths that names on a command line mean.

    Attributes:
        paths: in the order of the names, sorted within each, without duplicates.
        searched: directories that were searched and contain some.
        skipped: directories below those that look like runs but are not, each with the reason.
    """

    paths: list[Path]
    searched: list[Path]
    skipped: list[tuple[Path, str]]

    def describe(self, what: str) -> str:
        """Return one line on how many were found where, and what was skipped; empty if nothing was searched."""
        if not self.searched:
            return ""
        count = f"{len(self.paths)} {what}{'' if len(self.paths) == 1 else 's'}"
        told = f"found {count} in {', '.join(map(str, self.searched))}"
        if self.skipped:
            shown = "; ".join(f"{path} ({reason})" for path, reason in self.skipped[:MOST_SKIPPED])
            more = len(self.skipped) - MOST_SKIPPED
            told += f"; skipped {shown}" + (f" and {more} more" if more > 0 else "")
        return told


MOST_SKIPPED = 5
"""Most skipped directories that the line names."""


def expand(names: Sequence[str], is_one: Callable[[Path], bool], what: str) -> Found:
    """Return the paths that ``names`` mean: each is one itself, a directory that contains some, or a pattern.

    A directory that is not one itself is searched recursively; what is found is not searched further, and a directory
    is visited only once, also with symbolic links.

    Args:
        names: as the user typed them.
        is_one: whether a path is what is searched for.
        what: its name for the error, e.g. ``run``.

    Raises:
        WnRlError: a pattern that matches nothing, or a directory that contains none.
    """
    paths: list[Path] = []
    searched: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    for name in names:
        path = Path(name)
        if not path.exists() and glob.has_magic(name):
            matches = [Path(match) for match in sorted(glob.glob(name))]  # noqa: PTH207 - takes absolute patterns
            # A pattern may also match files that are not runs; they are ignored.
            found = [match for match in matches if is_one(match)]
            for match in matches:
                if match not in found and match.is_dir():
                    found += _below(match, is_one, skipped)
            if not found:
                raise WnRlError(f"{name} matches no {what}")
        elif path.is_dir() and not is_one(path):
            found = _below(path, is_one, skipped) or [path]
            if found != [path]:
                searched.append(path)
        else:
            found = [path]
        paths += found
    return Found(list(dict.fromkeys(paths)), searched, skipped)


def _below(directory: Path, is_one: Callable[[Path], bool], skipped: list[tuple[Path, str]]) -> list[Path]:
    """Return what is found in a directory, recursively, sorted by path; ``skipped`` gets what only looks like a run."""
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()

    def search(place: Path) -> None:
        try:
            state = place.stat()
            if (state.st_dev, state.st_ino) in visited:
                return
            visited.add((state.st_dev, state.st_ino))
            children = sorted(place.iterdir())
        except OSError as error:
            skipped.append((place, error.strerror or "cannot be read"))
            return
        for child in children:
            if child.name.startswith("."):
                continue
            if is_one(child):
                found.append(child)
            elif child.is_dir():
                if looks := sorted(name for name in _OF_A_RUN if (child / name).exists()):
                    skipped.append((child, f"it has {looks[0]} but is not a run"))
                search(child)

    search(directory)
    return found


_OF_A_RUN = ("evaluations.csv", "episodes.csv", "summary.json", "action_log.bin", "journal.bin")
"""Files that a directory without ``config.yaml`` has if it was a run."""


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a run's CSV file by column; an incomplete last line is ignored.

    Raises:
        WnRlError: it cannot be read, or its columns are not numbers.
    """
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if None not in row.values() and None not in row]
        for row in rows:
            [float(value) for value in row.values()]
    except OSError as error:
        raise WnRlError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise WnRlError(f"{file} is damaged: {error}") from None
    return rows


def write_file(file: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Replace a file's content atomically; see :func:`write_atomically`.

    Raises:
        WnRlError: it cannot be written; the former content is unchanged.
    """
    try:
        write_atomically(file, content, sync=sync)
    except OSError as error:
        raise WnRlError(f"cannot write {file}: {error.strerror}") from None


def write_atomically(file: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Replace a file's content atomically: a reader sees the old or the new content; text is written as UTF-8.

    Without ``sync`` it does not wait for the disk: for files that can be made again, since a power cut may lose them.
    """
    temporary = file.with_name(f".{file.name}.writing")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def _csv_lines(rows: Iterable[Sequence[object]]) -> str:
    return "".join(",".join(_cell(value) for value in row) + "\n" for row in rows)


def _cell(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
