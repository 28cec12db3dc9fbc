"""Writing frames to a video file: H.264 in .mp4, which every browser plays, or .gif."""

from __future__ import annotations

import contextlib
import itertools
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
"""x264's constant rate factor; 18 is considered visually lossless."""
PALETTE = 255
"""Largest number of colours of a .gif frame."""
_MUXER = {"mp4": {"movflags": "+faststart"}, "gif": {"loop": "0"}}
_BT601, _LIMITED_RANGE = 6, 1  # ITU-T H.273: colour description 6; FFmpeg's number for 16 … 235

Frame = NDArray[np.uint8]


def write_video(frames: Iterable[Frame], path: Path, *, fps: int = 60, scale: int = 2) -> int:
    """Write frames as an H.264 video (yuv420p, even sizes, index first so that a browser can start at once).

    Each frame is encoded as it comes, so memory does not grow with the length. The file appears under its name when
    it is complete.

    Args:
        frames: uint8 RGB, all of one shape (height, width, 3).
        path: the file, ``….mp4``; an existing one is replaced.
        fps: frames per second.
        scale: each pixel becomes scale × scale.

    Returns:
        The number of frames.

    Raises:
        UsageError: another suffix, or a number below 1.
        WnRlError: the encoder is not installed, there is no frame, or the file cannot be written.
    """
    _check(path, ".mp4", fps, scale)
    av = _encoder()
    if ENCODER not in av.codecs_available:
        raise WnRlError(f"this build of av has no {ENCODER}; its wheels from pip have")

    def stream_for(container: Any, frame: Frame) -> Any:  # noqa: ANN401 - container and stream of av
        stream = container.add_stream(ENCODER, rate=fps, options={"crf": QUALITY, "preset": "medium"})
        stream.height, stream.width = frame.shape[:2]
        stream.pix_fmt = "yuv420p"
        # Stored in the file, since players otherwise guess from the size.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT601
        context.color_range = _LIMITED_RANGE
        return stream

    def encode(stream: Any, frame: Frame, number: int) -> Any:  # noqa: ANN401 - stream and packets of av
        converted = av.VideoFrame.from_ndarray(frame, format="rgb24")
        converted = converted.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
        converted.pts, converted.time_base = number, Fraction(1, fps)
        return stream.encode(converted)

    return _write(av, (_even(enlarge(p, scale)) for p in frames), path, "mp4", stream_for, encode)


def write_gif(
    frames: Iterable[Frame],
    path: Path,
    *,
    fps: int = 60,
    scale: int = 2,
    every: int = 3,
    colours: Frame | None = None,
) -> int:
    """Write frames as an endless .gif of at most 255 colours a frame; the console has 128, which are kept exactly.

    Args:
        frames: uint8 RGB, all of one shape (height, width, 3).
        path: the file, ``….gif``; an existing one is replaced.
        fps: frames per second of ``frames``.
        scale: each pixel becomes scale × scale.
        every: keep every n-th frame; 3 gives the 20 frames per second that browsers play at full speed.
        colours: of all frames, (n, 3), see :func:`colours_of`; as long as no others occur, only changes from frame to
            frame are written, and the file is several times smaller.

    Returns:
        The number of frames written.

    Raises:
        UsageError: another suffix, a number below 1, or more than 50 frames per second, which no browser plays.
        WnRlError: the encoder is not installed, there is no frame, or the file cannot be written.
    """
    _check(path, ".gif", fps, scale)
    if every < 1 or fps > 50 * every:
        raise UsageError(f"a .gif shows at most 50 frames per second, not {fps} / {every}: raise every")
    av = _encoder()

    def stream_for(container: Any, frame: Frame) -> Any:  # noqa: ANN401 - container and stream of av
        stream = container.add_stream("gif", rate=Fraction(fps, every))
        stream.height, stream.width = frame.shape[:2]
        stream.pix_fmt = "pal8"
        return stream

    palette = _Palette(colours)

    def encode(stream: Any, frame: Frame, number: int) -> Any:  # noqa: ANN401 - stream and packets of av
        converted = av.VideoFrame.from_ndarray(palette.indexed(frame), format="pal8")
        converted.pts, converted.time_base = number, Fraction(every, fps)
        return stream.encode(converted)

    kept = (enlarge(frame, scale) for number, frame in enumerate(frames) if number % every == 0)
    return _write(av, kept, path, "gif", stream_for, encode)


def enlarge(frame: Frame, scale: int) -> Frame:
    """Return the frame with each pixel as a square of scale × scale, sharp as on the console."""
    return frame.repeat(scale, 0).repeat(scale, 1)


def _even(frame: Frame) -> Frame:
    """Return the frame with an odd last row or column repeated: yuv420p has one colour per 2 × 2 pixels."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def colours_of(frames: Iterable[Frame]) -> Frame | None:
    """Return the colours of all frames, uint8 (n, 3), or None if they are more than one .gif palette holds."""
    found: set[int] = set()
    for frame in frames:
        found.update(np.unique(_packed(frame)).tolist())
        if len(found) > PALETTE:
            return None
    listed = np.array(sorted(found), np.uint32)
    colours: Frame = np.stack([listed >> shift & 0xFF for shift in (16, 8, 0)], 1).astype(np.uint8)
    return colours


def _packed(frame: Frame) -> NDArray[np.uint32]:
    red, green, blue = (frame[..., channel].astype(np.uint32) for channel in range(3))
    packed: NDArray[np.uint32] = (red << 16 | green << 8 | blue).astype(np.uint32)
    return packed


def _coarse(frame: Frame) -> Frame:
    """Return the frame in the nearest of 6 · 7 · 6 = 252 colours."""
    steps = np.array([5, 6, 5])
    coarse: Frame = np.round(np.round(frame / 255 * steps) * 255 / steps).astype(np.uint8)
    return coarse


class _Palette:
    """The palette of a .gif, to which colours are added when they first occur.

    FFmpeg's encoder writes only what differs from the frame before, and compares indices, where a frame has the
    palette of the very *first* one; others it writes as a whole. So a colour keeps its index, and a palette that has
    changed is never the first one again: else pixels of equal index and another colour would stay as they were.
    """

    def __init__(self, colours: Frame | None) -> None:
        self._known = np.zeros(0, np.uint32) if colours is None else np.unique(_packed(colours[None]))
        self._started = self._changed = False

    def indexed(self, frame: Frame) -> tuple[Frame, Frame]:
        """Return the frame as indices (height, width) into a palette (256, 4) of ARGB."""
        packed = _packed(frame)
        wanted: NDArray[np.uint32] = np.unique(packed)
        if len(wanted) > PALETTE:  # e.g. a saliency layer
            packed = _packed(_coarse(frame))
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
        palette[PALETTE, 1:] = self._changed  # used by no pixel; makes the first palette differ from all others
        return indices.astype(np.uint8), palette


def check_name(path: Path, suffix: str) -> None:
    """Check the name of a video's file.

    Raises:
        UsageError: another suffix, or a directory.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(f"{path}: the name of the video must end in {suffix}")
    if path.is_dir():
        raise UsageError(f"{path} is a directory")


def check_encoder() -> None:
    """Check, before anything is played, that there is an encoder.

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
        raise WnRlError('writing a video needs the encoder: pip install av, or pip install "wn_rl[video]"') from None
    return av


def _write(av: Any, frames: Iterator[Frame], path: Path, kind: str, stream_for: Any, encode: Any) -> int:  # noqa: ANN401
    """Encode ``frames`` to a file beside ``path`` and rename it; after a failure the temporary file is deleted."""
    first = next(frames, None)
    if first is None:
        raise WnRlError(f"there is no frame to write to {path}")
    temporary = path.with_name(f".{path.name}.writing")
    count = 0
    try:
        with av.open(str(temporary), "w", format=kind, options=_MUXER[kind]) as container:
            stream = stream_for(container, first)
            for frame in itertools.chain([first], frames):
                if frame.shape != first.shape:
                    raise ValueError(f"frames of {first.shape} and {frame.shape} cannot be in one video")
                container.mux(encode(stream, frame, count))
                count += 1
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    except (OSError, av.error.FFmpegError) as error:
        raise WnRlError(f"cannot write {path}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count
