"""Films of a run that a page can carry inside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wn_rl.report.results import RunResult

LARGEST = 6 * 2**20
"""Bytes of one film."""
LARGEST_TOTAL = 48 * 2**20
"""Bytes of all films of a page."""


@dataclass(frozen=True)
class Film:
    """A film of a run.

    Attributes:
        run: whose.
        path: its file.
        data: the file's bytes.
        poster: its first picture as a PNG file, or None where it cannot be decoded here.
    """

    run: RunResult
    path: Path
    data: bytes
    poster: bytes | None

    @property
    def address(self) -> str:
        """The film as a ``data:`` address."""
        return "data:video/mp4;base64," + base64.b64encode(self.data).decode()

    @property
    def poster_address(self) -> str | None:
        """The first picture as a ``data:`` address."""
        return None if self.poster is None else "data:image/png;base64," + base64.b64encode(self.poster).decode()


def find_films(runs: Sequence[RunResult]) -> tuple[list[Film], list[str]]:
    """Return the ``.mp4`` films anywhere in the runs' directories, and a line for each that is left out, with why.

    A link is not followed: it could bring any file of this machine into a page that is handed on.
    """
    films: list[Film] = []
    left_out: list[str] = []
    total = 0
    for run in runs:
        for path in sorted(run.path.rglob("*.mp4")):
            if path.is_symlink() or not path.is_file():
                continue
            name = f"{run.path.resolve().name}/{path.relative_to(run.path)}"
            size = path.stat().st_size
            if size > LARGEST:
                left_out.append(f"{name}: {_megabytes(size)}, more than the {_megabytes(LARGEST)} that a page takes")
            elif total + size > LARGEST_TOTAL:
                left_out.append(f"{name}: the films together would be more than {_megabytes(LARGEST_TOTAL)}")
            else:
                try:
                    data = path.read_bytes()
                except OSError as error:
                    left_out.append(f"{name}: {error.strerror}")
                    continue
                if data[4:8] != b"ftyp":
                    left_out.append(f"{name}: no MP4 file")
                    continue
                total += size
                films.append(Film(run, path, data, _first_picture(data)))
    return films, left_out


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _first_picture(data: bytes) -> bytes | None:
    """Return the first picture as a PNG file where PyAV and Pillow are installed."""
    try:
        import av

        with av.open(io.BytesIO(data)) as container:
            picture = next(container.decode(video=0)).to_image()
        stream = io.BytesIO()
        picture.save(stream, format="PNG", optimize=True)
        return stream.getvalue()
    except Exception:  # noqa: BLE001 - without a poster the browser shows what it can decode
        return None
