"""Scalars of a run's TensorBoard events, as curves."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from wn_rl.errors import WnRlError, one_line
from wn_rl.report.bands import Curve


def has_events(directory: Path) -> bool:
    """Return whether a run directory holds TensorBoard events."""
    return any(directory.glob("*tfevents*"))


def read_scalars(directory: Path) -> dict[str, Curve]:
    """Return every scalar of a run directory's events by its tag; none where there are no events.

    Points that are not finite are left out; of two points at the same frame the later one counts.

    Raises:
        WnRlError: the events cannot be read.
    """
    if not has_events(directory):
        return {}
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a cut-off last record is no news of a run that goes on
    unwanted = dict.fromkeys(("histograms", "images", "audio", "compressedHistograms"), 1)
    try:
        events = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0, **unwanted})
        events.Reload()
        tags = events.Tags()["scalars"]
        found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes the reader raise
        raise WnRlError(f"{directory}: its TensorBoard events cannot be read: {one_line(error)}") from None
    return {tag: curve for tag, points in found.items() if len((curve := _curve(points)).frames)}


def _curve(points: list[tuple[int, float]]) -> Curve:
    last = {step: value for step, value in points if np.isfinite(value)}
    frames = sorted(last)
    return Curve(np.array(frames, np.float64), np.array([last[frame] for frame in frames], np.float64))
