"""One trained network under this project's evaluation and under Stable-Baselines3's ``evaluate_policy``.

Both play whole games with ε 0.05, up to 30 no-ops, FIRE at the start, no sticky actions and unclipped scores; the
emulators, preprocessing and counting of episodes are each library's own::

    python benchmarks/against_sb3.py CHECKPOINT_OR_RUN --episodes 100
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ale_py
import gymnasium
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecFrameStack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wn_rl import cli
from wn_rl.errors import UsageError
from wn_rl.evaluation import export, scoring
from wn_rl.evaluation import policies as trained
from wn_rl.evaluation.policies import Trained
from wn_rl.runs.directory import write_file

EPSILON = 0.05


@dataclass(frozen=True)
class Arguments:
    """Score one network with this project and with Stable-Baselines3's evaluate_policy."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT_OR_RUN")]
    """A checkpoint or a run of this project."""
    episodes: int = 100
    """Games on each side."""
    seed: int = 0
    """Of both sides."""
    json: str | None = None
    """Write both sides' scores to this file."""


@dataclass(frozen=True)
class Difference:
    """Scores of both sides, in points, and what lies between them.

    Attributes:
        ours: scores of whole games.
        theirs: the same from Stable-Baselines3.
        value: mean of ours minus mean of theirs.
        half_width: of its 95% interval (normal approximation, variances of their own).
    """

    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]
    value: float
    half_width: float

    @property
    def relative_half_width(self) -> float:
        """The half-width in units of the mean score of both sides."""
        return self.half_width / abs(float(np.mean([self.ours.mean(), self.theirs.mean()])))


def their_scores(network: Trained, episodes: int, seed: int, num_envs: int) -> NDArray[np.float64]:
    """Return the scores that ``evaluate_policy`` finds for the exported network, shape (episodes,)."""
    gymnasium.register_envs(ale_py)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "network.zip"
        export.export(network, "sb3", file)
        model = DQN.load(file, device="cpu")
    model.exploration_rate = EPSILON
    set_random_seed(seed)
    env = VecFrameStack(
        make_atari_env(
            f"{network.game}NoFrameskip-v4",
            num_envs,
            seed=seed,
            wrapper_kwargs={"terminal_on_life_loss": False, "clip_reward": False},
        ),
        4,
    )
    try:
        scores, _ = evaluate_policy(
            model, env, n_eval_episodes=episodes, deterministic=False, return_episode_rewards=True
        )
    finally:
        env.close()
    return np.asarray(scores, np.float64)


def compare(path: Path, episodes: int, seed: int = 0, num_envs: int = 10) -> Difference:
    """Play ``episodes`` games on each side and return the difference of the mean scores."""
    network = trained.load(path)
    # NoFrameskip-v4 ends a game after 108,000 frames; so does this.
    changes = {"episodes": episodes, "epsilon": EPSILON, "fire_reset": True, "noop_max": 30, "sticky_actions": 0.0}
    changes["max_frames_per_episode"] = 108_000
    how = scoring.How("training", changes, seed=seed, num_envs=num_envs, num_threads=1)
    started = time.perf_counter()
    ours = scoring.score(path, how).result.scores
    middle = time.perf_counter()
    theirs = their_scores(network, episodes, seed, num_envs)
    print(f"ours {middle - started:.0f} s, evaluate_policy {time.perf_counter() - middle:.0f} s", file=sys.stderr)
    error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    return Difference(ours, theirs, float(ours.mean() - theirs.mean()), float(1.96 * error))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    wanted = cli.parse(Arguments, arguments)
    if wanted.episodes < 2:
        raise UsageError("--episodes must be at least 2: one game has no interval")
    torch.set_num_threads(1)
    found = compare(Path(wanted.checkpoint), wanted.episodes, wanted.seed)
    for name, scores in (("ours", found.ours), ("evaluate_policy", found.theirs)):
        print(f"{name}: {scores.mean():.2f} ± {scores.std(ddof=1):.2f} over {len(scores)} games")
    print(
        f"difference {found.value:.2f}, 95% interval ± {found.half_width:.2f} "
        f"({100 * found.relative_half_width:.1f}% of the mean)"
    )
    if wanted.json is not None:
        scores = {"ours": found.ours.tolist(), "evaluate_policy": found.theirs.tolist()}
        write_file(Path(wanted.json), json.dumps(scores) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
