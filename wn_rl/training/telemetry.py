"""What a run reports while it trains: TensorBoard scalars, and a progress bar or plain lines."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

from wn_rl import diagnostics
from wn_rl.config import TrainConfig
from wn_rl.errors import WnRlError
from wn_rl.evaluation.episodes import EvaluationResult
from wn_rl.output import forget, readable
from wn_rl.runs.directory import CLOSING_SUFFIX

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

TAGS = {
    "train/episode_return": "mean raw return of the training episodes that ended since the last point, points",
    "train/episode_length": "their mean length, agent steps",
    "train/loss": "mean Huber loss per transition of the updates since the last point",
    "train/td_error": "mean absolute TD error of these updates, clipped-reward units",
    "train/q_value": "mean Q-value of the actions in these updates' minibatches, clipped-reward units",
    "train/max_q_held_out": "mean over a fixed set of states of the largest Q-value, clipped-reward units",
    "train/gradient_norm": "2-norm of the last update's gradient",
    "train/learning_rate": "learning rate of the optimizer",
    "train/epsilon": "probability of a random action",
    "train/replay_size": "transitions that can be sampled from the replay, agent steps",
    "speed/frames_per_second": "emulator frames per second since the last point, evaluation excluded",
    "speed/updates_per_second": "optimizer steps per second since the last point, evaluation excluded",
    "evaluation/return_mean": "mean raw return of the evaluation's episodes, points",
    "evaluation/return_std": "their standard deviation (n - 1), points",
    "evaluation/episode_length_mean": "their mean length, agent steps",
}
"""Every scalar tag and what it holds. The axis of all is emulator frames."""
FINAL_TAGS = {
    "summary/final_return_mean": "mean return of the last evaluation, one point at the end of the run, points",
    "summary/best_return_mean": "highest mean return of all evaluations, one point at the end of the run, points",
}
"""Scalars that are written once; the HPARAMS tab shows them beside the configuration."""
HISTOGRAM_TAGS = {"q_values/held_out": "Q-values of every action on a fixed set of states, clipped-reward units"}
LAYOUT = {
    "Overview": {
        "Evaluation return": ["Multiline", ["evaluation/return_mean"]],
        "Training return": ["Multiline", ["train/episode_return"]],
        "Max-Q on held-out states": ["Multiline", ["train/max_q_held_out"]],
        "Loss": ["Multiline", ["train/loss"]],
    },
    "Diagnostics": {
        "TD error and Q-value": ["Multiline", ["train/td_error", "train/q_value"]],
        "Gradient norm": ["Multiline", ["train/gradient_norm"]],
        "Dormant units": ["Multiline", [diagnostics.DORMANT_FRACTION]],
        "Noise of Q-values across minibatches": ["Multiline", [diagnostics.Q_NOISE]],
        "Overestimation": ["Multiline", [diagnostics.OVERESTIMATION]],
        "Effective learning rate": ["Multiline", ["layers/.*/effective_learning_rate"]],
        "Speed": ["Multiline", ["speed/frames_per_second", "speed/updates_per_second"]],
    },
}
"""Charts of the CUSTOM SCALARS tab, which opens on the first group."""
HPARAMS = (
    "game",
    "param",
    "preset",
    "seed",
    "num_envs",
    "precision",
    "optimizer",
    "learning_rate",
    "batch_size",
    "update_period",
    "target_period",
    "replay_capacity",
    "learning_starts",
    "epsilon_end",
    "epsilon_decay_steps",
    "weight_init",
    "data_dependent_init",
    "output_init_std",
    "sticky_actions",
)
"""Configuration keys by which the HPARAMS tab compares runs."""


class Dashboard:
    """Writes scalars under the tags of :data:`TAGS` to a run directory."""

    def __init__(self, directory: Path, *, resume_frames: int | None = None) -> None:
        """Open the event file; points after ``resume_frames`` of an earlier one are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_frames is None else resume_frames + 1
        self._directory = directory
        self._silence_writer_thread()
        with self._writing():
            self._writer = SummaryWriter(directory, purge_step=purge)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the event file's writer thread into one line."""
        try:
            yield
        except OSError as error:
            raise WnRlError(
                f"cannot write TensorBoard's events to {self._directory}: {error.strerror or error}"
            ) from None

    def scalars(self, frames: int, values: dict[str, float]) -> None:
        """Add one point at ``frames`` to each tag; NaN means "nothing to show" and is left out.

        Raises:
            KeyError: a tag that neither :data:`TAGS` nor ``diagnostics.DIAGNOSTIC_TAGS`` documents.
        """
        for tag, value in values.items():
            if tag not in TAGS:
                diagnostics.meaning(tag)
            if value == value:
                with self._writing():
                    self._writer.add_scalar(tag, value, frames)

    @staticmethod
    def _silence_writer_thread() -> None:
        """Print no traceback of TensorBoard's thread: the next call raises its error."""
        shown = threading.excepthook

        def hook(arguments: threading.ExceptHookArgs) -> None:
            if not (
                isinstance(arguments.exc_value, OSError) and type(arguments.thread).__module__.startswith("tensorb")
            ):
                shown(arguments)

        threading.excepthook = hook

    def begin_closing(self) -> None:
        """Write the end of the run, which a longer run does not have, into a separate event file."""
        from torch.utils.tensorboard import SummaryWriter

        with self._writing():
            self._writer.close()
            self._writer = SummaryWriter(self._directory, filename_suffix=CLOSING_SUFFIX)

    def describe(self, config_yaml: str) -> None:
        """Show the resolved configuration as text, and the layout of the custom scalars."""
        with self._writing():
            self._writer.add_text("config", "```yaml\n" + config_yaml + "```", 0)
            self._writer.add_custom_scalars(LAYOUT)

    def histogram(self, frames: int, tag: str, values: Tensor) -> None:
        """Add a histogram at ``frames``.

        Raises:
            KeyError: a tag that :data:`HISTOGRAM_TAGS` does not document.
        """
        if tag not in HISTOGRAM_TAGS:
            raise KeyError(tag)
        with self._writing():
            self._writer.add_histogram(tag, values, frames)

    def hparams(self, frames: int, config: TrainConfig, *, final: float, best: float) -> None:
        """Add the run to the HPARAMS tab with its final and best evaluation return."""
        from torch.utils.tensorboard.summary import hparams

        scores = dict(zip(FINAL_TAGS, (final, best), strict=True))
        with self._writing():
            for tag, score in scores.items():
                self._writer.add_scalar(tag, score, frames)
        # SummaryWriter.add_hparams would make a directory of its own, which shows up as a second run.
        chosen = {key: getattr(config, key) for key in HPARAMS}
        file_writer = self._writer.file_writer
        assert file_writer is not None
        with self._writing():
            for summary in hparams(chosen, scores):
                file_writer.add_summary(summary)

    def evaluation(self, frames: int, result: EvaluationResult) -> None:
        """Add an evaluation's points at ``frames``."""
        self.scalars(
            frames,
            {
                "evaluation/return_mean": result.mean,
                "evaluation/return_std": result.std,
                "evaluation/episode_length_mean": result.mean_length,
            },
        )
        self.flush()

    def flush(self) -> None:
        """Write everything to the file system."""
        with self._writing():
            self._writer.flush()

    def close(self) -> None:
        """Close the event file; what cannot be written is lost, which :meth:`flush` has reported."""
        with suppress(OSError):
            self._writer.close()


class Progress:
    """A progress bar on a terminal; elsewhere one plain line a minute."""

    LINE_SECONDS = 60.0

    def __init__(
        self, total_frames: int, start_frames: int = 0, stream: TextIO | None = None, *, quiet: bool = False
    ) -> None:
        """Prepare; nothing is shown yet.

        Args:
            total_frames: where the run ends.
            start_frames: where it starts (more than 0 in a resumed run).
            stream: the output; default: standard output.
            quiet: show nothing.
        """
        self._stream = readable(stream or sys.stdout)
        self._total = total_frames
        self._started = self._last_line = time.monotonic()
        self._start_frames = start_frames
        self._returns: deque[float] = deque(maxlen=100)
        self._evaluation = ""
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._quiet = quiet
        if self._stream.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:.1f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self._stream),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=total_frames, completed=start_frames)
            self._bar.start()

    def episode(self, episode_return: float) -> None:
        """Record the raw return of a training episode that ended."""
        self._returns.append(episode_return)

    def evaluation(self, frames: int, result: EvaluationResult) -> None:
        """Show an evaluation."""
        self._evaluation = f"evaluation {result.mean:.1f}"
        self.say(
            f"frames {frames:,}: evaluation {result.mean:.2f} ± {result.std:.2f} over {len(result.episodes)} episodes "
            f"({result.seconds:.0f} s)"
        )

    def update(self, frames: int, epsilon: float) -> None:
        """Show the progress of the run."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._bar is None and now - self._last_line < self.LINE_SECONDS:
            return
        rate = (frames - self._start_frames) / max(now - self._started, 1e-9)
        parts = [f"{rate:,.0f} frames/s", f"ε {epsilon:.2f}"]
        if self._returns:
            parts.append(f"return {sum(self._returns) / len(self._returns):.1f} (last {len(self._returns)})")
        if self._evaluation:
            parts.append(self._evaluation)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=frames, description=", ".join(parts))
            return
        self._last_line = now
        left = (self._total - frames) / max(rate, 1e-9) / 60
        self.say(f"frames {frames:,} of {self._total:,}, {left:.0f} min left, {', '.join(parts)}")

    def restoring(self, done: int, total: int) -> None:
        """Show the progress of restoring a resumed run's replay: vector steps done, of how many."""
        if self._quiet:
            return
        now = time.monotonic()
        share = done / max(total, 1)
        if self._bar is not None and self._task is not None:
            if now - self._last_line >= 0.2 or done == total:
                self._last_line = now
                self._bar.update(self._task, total=total, completed=done, description="restoring the replay buffer")
            if done == total:
                self._bar.reset(self._task, total=self._total, completed=self._start_frames, description="")
        elif now - self._last_line >= self.LINE_SECONDS / 6:
            self._last_line = now
            self.say(f"restoring the replay buffer from the action log: {100 * share:.0f}%")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._quiet:
            return
        try:
            if self._bar is not None:
                self._bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=self._stream, flush=True)
        except OSError:  # the reader of a pipe went away, or a log's disk is full: the run continues without
            self._quiet = True
            forget(self._stream)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
