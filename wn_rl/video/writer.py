"""Pictures as a film: H.264 in .mp4, which every browser plays, or .gif. Pictures are composed elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn_rl.errors import UsageError, WnRlError, one_line

ENCODER = "libx264"
QUALITY = "18"
"""x264's constant rate factor; 18 is taken for visually lossless."""
PALETTE = 255
"""Colours of a .gif's picture."""
_MUXER = {"mp4": {"movflags": "+faststart"}, "gif": {"loop": "0"}}
_BT601, _LIMITED_RANGE = 6, 1  # ITU-T H.273: colour description 6; FFmpeg's number for 16 … 235

Picture = NDArray[np.uint8]


def write_video(frames: Iterable[Picture], path: Path, *, fps: int = 60, scale: int = 2) -> int:
    """Write pictures as an H.264 film (yuv420p, even sizes, its index in front so that a browser can start at once).

    Each picture is encoded as it comes, so memory does not grow with the length. The file appears under its name when
    it is whole.

    Args:
        frames: uint8 RGB, all of one shape (height, width, 3).
        path: the file, ``….mp4``; one that is there is replaced.
        fps: pictures per second.
        scale: each pixel becomes scale × scale.

    Returns:
        The number of pictures.

    Raises:
        UsageError: another suffix, or a number below 1.
        WnRlError: the encoder is not installed, there is no picture, or the file cannot be written.
    """
    _check(path, ".mp4", fps, scale)
    av = _encoder()
    if ENCODER not in av.codecs_available:
        raise WnRlError(f"this build of av has no {ENCODER}; its wheels from pip have")

    def stream_for(container: Any, picture: Picture) -> Any:  # noqa: ANN401 - container and stream of av
        stream = container.add_stream(ENCODER, rate=fps, options={"crf": QUALITY, "preset": "medium"})
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        # Said in the file, since players guess by size otherwise.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        return stream

    def encode(stream: Any, picture: Picture, number: int) -> Any:  # noqa: ANN401 - stream and packets of av
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
        frame.pts, frame.time_base = number, Fraction(1, fps)
        return stream.encode(frame)

    return _write(av, (_even(enlarge(p, scale)) for p in frames), path, "mp4", stream_for, encode)


def write_gif(
    frames: Iterable[Picture],
    path: Path,
    *,
    fps: int = 60,
    scale: int = 2,
    every: int = 3,
    colours: Picture | None = None,
) -> int:
    """Write pictures as an endless .gif of at most 255 colours a picture; the console has 128, which are kept exactly.

    Args:
        frames: uint8 RGB, all of one shape (height, width, 3).
        path: the file, ``….gif``; one that is there is replaced.
        fps: pictures per second of ``frames``.
        scale: each pixel becomes scale × scale.
        every: keep one of so many pictures; 3 gives the 20 pictures per second that browsers play at full speed.
        colours: that will come, (n, 3), see :func:`colours_of`; while no others do, only what changes from picture to
            picture is written, and the file is several times smaller.

    Returns:
        The number of pictures written.

    Raises:
        UsageError: another suffix, a number below 1, or more than 50 pictures per second, which no browser plays.
        WnRlError: the encoder is not installed, there is no picture, or the file cannot be written.
    """
    _check(path, ".gif", fps, scale)
    if every < 1 or fps > 50 * every:
        raise UsageError(f"a .gif shows at most 50 pictures per second, not {fps} / {every}: raise every")
    av = _encoder()

    def stream_for(container: Any, picture: Picture) -> Any:  # noqa: ANN401 - container and stream of av
        stream = container.add_stream("gif", rate=Fraction(fps, every))
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "pal8"
        return stream

    palette = _Palette(colours)

    def encode(stream: Any, picture: Picture, number: int) -> Any:  # noqa: ANN401 - stream and packets of av
        frame = av.VideoFrame.from_ndarray(palette.indexed(picture), format="pal8")
        frame.pts, frame.time_base = number, Fraction(every, fps)
        return stream.encode(frame)

    kept = (enlarge(picture, scale) for number, picture in enumerate(frames) if number % every == 0)
    return _write(av, kept, path, "gif", stream_for, encode)


def enlarge(picture: Picture, scale: int) -> Picture:
    """Return the picture with each pixel as a square of scale × scale, sharp as on the console."""
    return picture.repeat(scale, 0).repeat(scale, 1)


def _even(picture: Picture) -> Picture:
    """Return the picture with an odd last row or column repeated: yuv420p has one colour per 2 × 2 pixels."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def colours_of(frames: Iterable[Picture]) -> Picture | None:
    """Return the colours of all pictures, uint8 (n, 3), or None where they are more than one .gif palette holds."""
    found: set[int] = set()
    for picture in frames:
        found.update(np.unique(_packed(picture)).tolist())
        if len(found) > PALETTE:
            return None
    listed = np.array(sorted(found), np.uint32)
    colours: Picture = np.stack([listed >> shift & 0xFF for shift in (16, 8, 0)], 1).astype(np.uint8)
    return colours


def _packed(picture: Picture) -> NDArray[np.uint32]:
    red, green, blue = (picture[..., channel].astype(np.uint32) for channel in range(3))
    packed: NDArray[np.uint32] = (red << 16 | green << 8 | blue).astype(np.uint32)
    return packed


def _coarse(picture: Picture) -> Picture:
    """Return the picture in the nearest of 6 · 7 · 6 = 252 colours."""
    steps = np.array([5, 6, 5])
    coarse: Picture = np.round(np.round(picture / 255 * steps) * 255 / steps).astype(np.uint8)
    return coarse


class _Palette:
    """The palette of a .gif, to which colours are added as they come.

    FFmpeg's encoder writes only what differs from the picture before, and compares indices, where a picture has the
    palette of the very *first* one; others it writes as a whole. So a colour keeps its index, and a palette that has
    changed is never the first one again: else pixels of equal index and another colour would stay as they were.
    """

    def __init__(self, colours: Picture | None) -> None:
        self._known = np.zeros(0, np.uint32) if colours is None else np.unique(_packed(colours[None]))
        self._started = self._changed = False

    def indexed(self, picture: Picture) -> tuple[Picture, Picture]:
        """Return the picture as indices (height, width) into a palette (256, 4) of ARGB."""
        packed = _packed(picture)
        wanted: NDArray[np.uint32] = np.unique(packed)
        if len(wanted) > PALETTE:  # something smooth lies on it
            packed = _packed(_coarse(picture))
            wanted = np.unique(packed)
        new: NDArray[np.uint32] = np.setdiff1d(wanted, self._known).astype(np.uint32)
        self._changed = self._changed or (self._started and len(new) > 0)
        self._started = True
        self._known = np.concatenate([self._known, new]) if len(self._known) + len(new) <= PALETTE else wanted
        order = np.argsort(self._known)
        indices = order[np.searchsorted(self._known, packed, sorter=order)]
        palette = np.zeros((256, 4), np.uint8)
        palette[:, 0] = 255
        for channel, shift in ((1, 16), (2, 8), (3, 0)):
            palette[: len(self._known), channel] = self._known >> shift & 0xFF
        palette[PALETTE, 1:] = self._changed  # of no pixel: tells the first palette from all others
        return indices.astype(np.uint8), palette


def check_name(path: Path, suffix: str) -> None:
    """Check the name of a film's file.

    Raises:
        UsageError: another suffix, or a directory.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(f"{path}: the name of the film must end in {suffix}")
    if path.is_dir():
        raise UsageError(f"{path} is a directory")


def check_encoder() -> None:
    """Find out before anything is played whether there is an encoder.

    Raises:
        WnRlError: it is not installed.
    """
    _encoder()


def _check(path: Path, suffix: str, fps: int, scale: int) -> None:
    check_name(path, suffix)
    if fps < 1 or scale < 1:
        raise UsageError(f"fps and scale must be 1 or more, not {fps} and {scale}")


def _encoder() -> Any:  # noqa: ANN401 - the module
    try:
        import av
    except ImportError:
        raise WnRlError('writing a film needs the encoder: pip install av, or pip install "wn_rl[video]"') from None
    return av


def _write(av: Any, frames: Iterator[Picture], path: Path, kind: str, stream_for: Any, encode: Any) -> int:  # noqa: ANN401
    """Encode ``frames`` to a file beside ``path`` and rename it; whatever goes wrong, nothing is left of it."""
    first = next(frames, None)
    if first is None:
        raise WnRlError(f"there is no picture to write to {path}")
    temporary = path.with_name(f".{path.name}.writing")
    count = 0
    try:
        with av.open(str(temporary), "w", format=kind, options=_MUXER[kind]) as container:
            stream = stream_for(container, first)
            for picture in _chained(first, frames):
                if picture.shape != first.shape:
                    raise ValueError(f"pictures of {first.shape} and {picture.shape} make no film")
                container.mux(encode(stream, picture, count))
                count += 1
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    except (OSError, av.error.FFmpegError) as error:
        raise WnRlError(f"cannot write {path}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def _chained(first: Picture, rest: Iterator[Picture]) -> Iterator[Picture]:
    yield first
    yield from rest
