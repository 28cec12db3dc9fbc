"""How long a resumed run takes to restore its replay buffer, compared with bare emulators that make as many steps.

``python benchmarks/resume.py --steps 1M``: random play of so many agent steps with an action log, then alternately
restoring them and a bare ``AtariVectorEnv`` loop, on all cores. Prints sizes, times and their ratio.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents.backends.eager import Eager
from wn_rl import cli
from wn_rl.atari.action_log import ActionLog
from wn_rl.atari.env import NO_CAP, make_atari
from wn_rl.atari.games import find_game
from wn_rl.config import Count, TrainConfig
from wn_rl.errors import UsageError
from wn_rl.machine import keep_freed_memory
from wn_rl.replay import Replay
from wn_rl.training import TrainingLoop, training_seeds


@dataclass(frozen=True)
class Arguments:
    """Time how long a replay buffer takes to be restored from its action log."""

    game: str = "Breakout"
    """The game."""
    steps: Count = 200_000
    """Agent steps of the replay (7,056 bytes each)."""
    num_envs: Count = 16
    """Emulators."""
    rounds: Count = 2
    """Measurements of each of the two."""
    sticky_actions: float = 0.0
    """Probability that a frame repeats the previous action."""
    seed: Count = 1
    """Seed of the emulators and of the random play."""


class RandomPlay:
    """An agent that plays at random."""

    def __init__(self, num_actions: int, seed: int) -> None:
        """Play ``num_actions`` actions."""
        self.device = torch.device("cpu")
        self._num_actions = num_actions
        self._generator = torch.Generator().manual_seed(seed)

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return random actions."""
        return torch.randint(self._num_actions, (len(observations),), generator=self._generator)


def make_loop(config: TrainConfig, path: Path) -> TrainingLoop:
    """Return a training loop that only plays."""
    env = make_atari(config.game, config.num_envs, sticky_actions=config.sticky_actions)
    action_log = ActionLog(path, config.num_envs, config.reseed_period if config.sticky_actions else 0)
    agent = RandomPlay(env.num_actions, config.seed)
    replay = Replay(config.replay_capacity, config.num_envs)
    return TrainingLoop(config, env, Eager(agent, replay), replay, action_log)  # type: ignore[arg-type]


def bare_seconds(config: TrainConfig, vector_steps: int) -> float:
    """Return the time that ale-py's own loop takes for so many vector steps."""
    emulators = AtariVectorEnv(
        find_game(config.game).rom,
        config.num_envs,
        noop_max=31,
        use_fire_reset=False,
        reward_clipping=False,
        repeat_action_probability=config.sticky_actions,
        max_num_frames_per_episode=NO_CAP,
        autoreset_mode=AutoresetMode.NEXT_STEP,
    )
    emulators.reset(seed=training_seeds(config, 0))
    actions = np.random.default_rng(0).integers(emulators.single_action_space.n, size=(1000, config.num_envs))  # type: ignore[attr-defined]
    started = time.perf_counter()
    for step in range(vector_steps):
        emulators.send(actions[step % 1000])
        emulators.recv()
    return time.perf_counter() - started


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    arguments = cli.parse(Arguments, words)
    if min(arguments.rounds, arguments.num_envs) < 1 or arguments.steps < arguments.num_envs:
        raise UsageError("--rounds and --num-envs must be at least 1, --steps at least --num-envs")
    keep_freed_memory()  # as training does
    config = TrainConfig(
        game=arguments.game,
        num_envs=arguments.num_envs,
        replay_capacity=arguments.steps,
        learning_starts=10**12,
        sticky_actions=arguments.sticky_actions,
        seed=arguments.seed,
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "action_log.bin"
        loop = make_loop(config, path)
        assert loop.action_log is not None
        loop.action_log.create()
        loop.start()
        while loop.agent_steps < arguments.steps:
            loop.vector_step()
        mark, checksum, vector_steps = loop.action_log.mark(), loop.replay.checksum(), loop.vector_steps
        loop.env.close()
        del loop
        print(f"action log: {path.stat().st_size / arguments.steps * 1e6 / 1e6:.2f} MB per million agent steps")
        ratios = []
        for _ in range(arguments.rounds):
            bare = bare_seconds(config, vector_steps)
            again = make_loop(config, path)
            assert again.action_log is not None
            started = time.perf_counter()
            again.restore(again.action_log.open(mark))
            took = time.perf_counter() - started
            if again.replay.checksum() != checksum:
                print("the restored replay differs", file=sys.stderr)
                return 1
            again.env.close()
            del again
            ratios.append(took / bare)
            print(f"restored in {took:.1f} s, bare emulators {bare:.1f} s: {took / bare:.2f} times", flush=True)
        print(f"median {statistics.median(ratios):.2f} times, for {arguments.steps:,} agent steps of {config.game}")
    return 0


if __name__ == "__main__":
    cli.run(main)
