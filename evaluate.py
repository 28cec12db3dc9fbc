"""Score a saved checkpoint: ``python evaluate.py CHECKPOINT_OR_RUN``; raw points of whole games."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from wn_rl import cli
from wn_rl.config import Count, import_parameterization
from wn_rl.errors import UsageError, WnRlError


@dataclass(frozen=True)
class EvaluateArguments:
    """Score a checkpoint: raw points of whole games, played with a small probability of random actions.

    The emulator's settings (sticky actions, action set, no-ops, frame cap) are those of the checkpoint's training.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT_OR_RUN")]
    """A checkpoint directory, or a run directory (its latest checkpoint is scored)."""
    episodes: Count = 30
    """Whole games to play."""
    steps: Count = 0
    """Play for so many agent steps instead and count the games completed (the paper's test: 125000)."""
    epsilon: float = 0.05
    """Probability of a random action."""
    max_frames_per_episode: Count | None = None
    """End a game after so many emulator frames, 0: never. Default: that of the training, or 108000 where it had none
    and --episodes counts, since a game need not end."""
    seed: Count = 0
    """Seed of the emulators and of the random actions."""
    num_envs: Count = 0
    """Emulators that play at a time; 0: as many as episodes, at most 30. It does not favour short games."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    num_threads: Count = 0
    """Threads of the network's arithmetic on a CPU; 0: all cores."""
    param: str | None = None
    """module:Name of the parameterization, where it is your own: a checkpoint names it, but its module is imported only
    when it stands here."""
    json: str | None = None
    """Write every episode's score and length, and how they were played, to this file."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    wanted = cli.parse(EvaluateArguments, arguments)
    _check(wanted)
    if wanted.param is not None:
        import_parameterization(wanted.param)
    from wn_rl.evaluation import score_checkpoint  # late: --help and wrong words need no torch
    from wn_rl.report import table

    scored = score_checkpoint(
        Path(wanted.checkpoint),
        steps=wanted.steps,
        episodes=wanted.episodes,
        epsilon=wanted.epsilon,
        max_frames_per_episode=wanted.max_frames_per_episode,
        seed=wanted.seed,
        num_envs=wanted.num_envs,
        device=wanted.device,
        num_threads=wanted.num_threads,
    )
    if wanted.json is not None:
        table.write_json(Path(wanted.json), scored)
    table.print_table(scored)
    return 0


def _check(wanted: EvaluateArguments) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "episodes": (0, 10**6),
        "steps": (0, 10**12),
        "epsilon": (0.0, 1.0),
        "seed": (0, 2**31 - 1),
        "num_envs": (0, 4096),
        "num_threads": (0, 1024),
        "max_frames_per_episode": (0, 2**31 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(wanted, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} must be from {low:,} to {high:,}, not {value}")
    if wanted.steps == 0 and wanted.episodes == 0:
        raise WnRlError("nothing to evaluate: ask for at least 1 of --episodes or --steps")
    if wanted.json is not None and (Path(wanted.json).is_dir() or not Path(wanted.json).absolute().parent.is_dir()):
        raise UsageError(f"--json {wanted.json}: not a file in an existing directory")


if __name__ == "__main__":
    cli.run(main)
