"""A score as a table on the terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wn_rl.evaluation import Score
from wn_rl.runs import versions, write_file


def as_json(score: Score) -> dict[str, Any]:
    """Return the score with every episode and everything that is needed to compare it, as JSON values."""
    result, config = score.result, score.config
    return {
        "checkpoint": str(score.path),
        "game": config.game,
        "param": config.param,
        "preset": config.preset,
        "training_seed": config.seed,
        "training_frames": score.frames,
        "protocol": {
            "epsilon": score.protocol.epsilon,
            "steps": score.protocol.steps,
            "episodes": score.protocol.episodes if score.protocol.steps == 0 else None,
            "max_frames_per_episode": score.max_frames_per_episode,
            "noop_max": config.noop_max,
            "sticky_actions": config.sticky_actions,
            "full_action_set": config.full_action_set,
            "seed": score.seed,
            "num_envs": score.num_envs,
        },
        "episodes": len(result.episodes),
        "mean": result.mean,
        "std": result.std,
        "min": float(result.scores.min()),
        "max": float(result.scores.max()),
        "mean_length": result.mean_length,
        "human_normalized": score.human_normalized,
        "seconds": result.seconds,
        "scores": [episode.score for episode in result.episodes],
        "lengths": [episode.length for episode in result.episodes],
        "completed": [episode.completed for episode in result.episodes],
        "versions": versions(),
    }


def write_json(path: Path, score: Score) -> None:
    """Write :func:`as_json` to a file.

    Raises:
        WnRlError: it cannot be written.
    """
    write_file(path, json.dumps(as_json(score), indent=1) + "\n")


def print_table(score: Score) -> None:
    """Print the score as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    result, config = score.result, score.config
    cap = f"{score.max_frames_per_episode:,} frames" if score.max_frames_per_episode else "no cap"
    table = Table(
        title=f"{config.game}, {config.param}, preset {config.preset}, after {score.frames:,} frames",
        caption=f"raw points of whole games, ε {score.protocol.epsilon:g}, {cap}, up to {config.noop_max} no-ops, "
        f"sticky actions {config.sticky_actions:g}, {score.num_envs} emulators, seed {score.seed}",
    )
    human = score.human_normalized
    cells = {
        "episodes": f"{len(result.episodes)}",
        "mean": f"{result.mean:.2f}",
        "std": f"{result.std:.2f}",
        "min": f"{result.scores.min():g}",
        "max": f"{result.scores.max():g}",
        "mean length (agent steps)": f"{result.mean_length:.0f}",
        "human-normalized": "unknown" if human is None else f"{100 * human:.1f}%",
    }
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    Console().print(table)
    if not all(episode.completed for episode in result.episodes):
        print("The only episode was not finished within the budget of agent steps; its score so far is shown.")
