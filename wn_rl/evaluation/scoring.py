"""Scores of trained networks under a protocol: of one network, or of many of which some may fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wn_rl.atari.env import FULL_ACTION_SET, AtariVector, make_atari, minimal_actions
from wn_rl.atari.games import find_game
from wn_rl.errors import CheckpointError, Failure, UsageError, WnRlError, one_line
from wn_rl.evaluation import policies as trained
from wn_rl.evaluation.episodes import EvaluationResult, evaluate
from wn_rl.evaluation.policies import Trained
from wn_rl.evaluation.protocols import TRAINING, ActionSet, ScoreProtocol, find_protocol
from wn_rl.evaluation.statistics import Estimate, mean_interval
from wn_rl.machine import pick_device, set_float32_precision
from wn_rl.runs import directory as runs

MAX_EMULATORS = 30
"""Default of the largest number of parallel emulators if episodes are counted."""
EMULATORS_FOR_STEPS = 16
"""Default number of parallel emulators if agent steps are counted."""


@dataclass(frozen=True)
class Score:
    """A network's score with everything that a comparison needs.

    Attributes:
        trained: what was scored.
        protocol: how it was measured; its action set is the one that was used.
        seed: of the evaluation.
        num_envs: emulators that played in parallel.
        result: the episodes.
    """

    trained: Trained
    protocol: ScoreProtocol
    seed: int
    num_envs: int
    result: EvaluationResult

    @property
    def human_normalized(self) -> float | None:
        """Mean score on the scale random play = 0, human = 1, where both are known."""
        return find_game(self.trained.game).human_normalized(self.result.mean)

    @property
    def interval(self) -> Estimate:
        """Mean score with its 95% interval over episodes."""
        return mean_interval(self.result.scores)


@dataclass(frozen=True)
class How:
    """How to score networks.

    Attributes:
        protocol: a name of :func:`wn_rl.evaluation.protocols.protocol_names`.
        changes: settings that override the protocol.
        seed: of the emulators and of the random actions.
        num_envs: emulators that play in parallel; 0 chooses.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_threads: of the arithmetic on a CPU; 0 takes all cores.
        game: of Stable-Baselines3 files.
        param: parameterization of Stable-Baselines3 files.
        param_options: of that parameterization.
    """

    protocol: str = TRAINING
    changes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    num_envs: int = 0
    device: str = "auto"
    num_threads: int = 0
    game: str | None = None
    param: str | None = None
    param_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """A network and the settings of the emulators that it plays on.

    Attributes:
        trained: the network.
        protocol: how it plays; its action set is the one that is used.
        num_envs: emulators that play in parallel.
        device: of the network.
        options: of :func:`wn_rl.make_atari`.
    """

    trained: Trained
    protocol: ScoreProtocol
    num_envs: int
    device: str
    options: Mapping[str, Any]


def prepare(path: Path, how: How) -> Setup:
    """Load a checkpoint, a run's latest one or a Stable-Baselines3 file to play in float32.

    Raises:
        CheckpointError: it is missing, damaged, does not fit its game, or was trained with another action set than the
            protocol's.
        UsageError: a GPU was asked for and there is none, or see :func:`wn_rl.evaluation.protocols.find_protocol`.
    """
    torch.set_num_threads(how.num_threads or os.cpu_count() or 1)
    set_float32_precision("float32")  # by default torch lets a GPU's convolutions round to TF32
    device = pick_device(how.device)
    found = trained.load(path, game=how.game, param=how.param, param_options=how.param_options)
    protocol = _with_action_set(found, find_protocol(how.protocol, how.changes, found.config))
    num_envs = how.num_envs or (EMULATORS_FOR_STEPS if protocol.steps else min(protocol.episodes, MAX_EMULATORS))
    options = {
        "noop_max": protocol.noop_max,
        "fire_reset": protocol.fire_reset,
        "sticky_actions": protocol.sticky_actions,
        "full_action_set": found.full_action_set,
        "max_frames_per_episode": protocol.max_frames_per_episode,
    }
    return Setup(found, protocol, num_envs, device, options)


@contextlib.contextmanager
def emulators(setup: Setup) -> Iterator[AtariVector]:
    """Start the emulators of ``setup`` and stop them afterwards.

    Raises:
        CheckpointError: the network sees other observations than the game shows.
    """
    found = setup.trained
    env = make_atari(found.game, setup.num_envs, **setup.options)
    try:
        if env.single_observation_space.shape != found.network.spec.observation_shape:
            raise CheckpointError(
                f"{found.path}: its network takes observations {found.network.spec.observation_shape}, "
                f"{found.game} gives {env.single_observation_space.shape}"
            )
        yield env
    finally:
        env.close()


def score(path: Path, how: How) -> Score:
    """Load a network and play it; see :func:`prepare` and :func:`emulators` for errors."""
    setup = prepare(path, how)
    policy = trained.greedy(setup.trained.network, setup.device)
    with emulators(setup) as env:
        result = evaluate(policy, env, setup.protocol, seed=how.seed, device=setup.device)
    return Score(setup.trained, setup.protocol, how.seed, setup.num_envs, result)


def _with_action_set(found: Trained, protocol: ScoreProtocol) -> ScoreProtocol:
    """Return the protocol with the action set that is played.

    Raises:
        CheckpointError: the network was trained with another one than the protocol has.
    """
    played: ActionSet = "full" if found.full_action_set else "minimal"
    if protocol.action_set == "checkpoint":
        return replace(protocol, action_set=played)
    # In some games the minimal set has all 18 actions.
    if protocol.action_set != played and minimal_actions(found.game) < FULL_ACTION_SET:
        raise CheckpointError(
            f"{found.path} was trained with the {played} action set ({found.network.spec.num_actions} actions) and "
            f"protocol {protocol.name} uses the {protocol.action_set} one: the action set is chosen in training "
            "(--full-action-set); --action-set checkpoint scores it anyway and labels the score"
        )
    return protocol


def expand(names: Sequence[str]) -> list[Path]:
    """Return the paths to score: each name is a checkpoint, a run, an SB3 file, a directory of these, or a glob.

    A directory that is not a run is searched recursively for runs, checkpoints and ``.zip`` files; one line says what
    was found.

    Raises:
        WnRlError: a name that matches nothing, or a directory without any of these.
    """
    found = runs.expand(names, _is_something, "run, checkpoint or .zip file")
    if told := found.describe("network"):
        print(told)
    return found.paths


def _is_something(path: Path) -> bool:
    if not path.is_dir():
        return trained.is_sb3(path)
    if path.suffix in (".writing", ".previous"):  # of a checkpoint that is being replaced
        return False
    return any((path / name).exists() for name in ("checkpoint.json", "config.yaml", "checkpoints"))


def score_many(paths: Sequence[Path], how: How) -> Iterator[Score | Failure]:
    """Yield the score of each path, or the failure; a failure does not stop the others.

    Args:
        paths: see :func:`expand`.
        how: to score them.
    """
    for path in paths:
        yield _attempt(path, how)


def _attempt(path: Path, how: How) -> Score | Failure:
    try:
        return score(path, how)
    except (WnRlError, OSError) as error:
        message = one_line(error)
        if str(path) not in message:
            message = f"{path}: {message}"
        return Failure(path, message, getattr(error, "exit_code", 1))


def score_checkpoint(
    path: Path,
    *,
    steps: int = 0,
    episodes: int = 30,
    epsilon: float = 0.05,
    max_frames_per_episode: int | None = None,
    seed: int = 0,
    num_envs: int = 0,
    device: str = "auto",
    num_threads: int = 0,
) -> Score:
    """Score a checkpoint with the emulator's settings of its own training; see :func:`score` for errors.

    Args:
        path: a checkpoint directory or a run directory.
        steps: see :class:`wn_rl.evaluation.protocols.EvaluationProtocol`.
        episodes: used where ``steps`` is 0.
        epsilon: see :class:`wn_rl.evaluation.protocols.EvaluationProtocol`.
        max_frames_per_episode: cap in emulator frames, 0 for none; None takes that of the training, or
            :data:`wn_rl.evaluation.protocols.SAFETY_CAP` if it had none and episodes are counted.
        seed: of the emulators and of the random actions.
        num_envs: emulators that play in parallel; 0 chooses.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_threads: of the arithmetic on a CPU; 0 takes all cores.
    """
    changes: dict[str, Any] = {"epsilon": epsilon, **({"steps": steps} if steps else {"episodes": episodes})}
    if max_frames_per_episode is not None:
        changes["max_frames_per_episode"] = max_frames_per_episode
    if not steps and not episodes:
        raise UsageError("nothing to evaluate: ask for at least 1 episode or 1 agent step")
    return score(path, How(TRAINING, changes, seed, num_envs, device, num_threads))
