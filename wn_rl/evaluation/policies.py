"""Trained networks: from a checkpoint of this project, a run's latest checkpoint, or the zip file of an SB3 DQN."""

from __future__ import annotations

import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wn_rl import parameterizations
from wn_rl.atari.env import FRAME_SKIP, FULL_ACTION_SET, minimal_actions
from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig
from wn_rl.errors import CheckpointError, UsageError, one_line
from wn_rl.networks import Network, build_q_network
from wn_rl.runs import checkpoint
from wn_rl.sb3 import zip_file as sb3_zip

READ_ATTEMPTS = 4
"""Attempts to read a checkpoint that is being written, 0.5 s apart."""


@dataclass(frozen=True)
class Trained:
    """A trained Q-network and its origin; what a Stable-Baselines3 file does not store is None.

    Attributes:
        path: of the checkpoint directory or zip file.
        kind: ``wn_rl`` or ``sb3``.
        network: on the CPU, in evaluation mode.
        game: its canonical name.
        param: the parameterization.
        full_action_set: whether it has all 18 actions although the game's minimal set is smaller.
        config: of the training run.
        frames: emulator frames of training.
    """

    path: Path
    kind: str
    network: Network
    game: str
    param: str
    full_action_set: bool
    config: TrainConfig | None = None
    frames: int | None = None

    @property
    def preset(self) -> str | None:
        """The preset of the training."""
        return self.config.preset if self.config else None

    @property
    def seed(self) -> int | None:
        """The seed of the training."""
        return self.config.seed if self.config else None


def is_sb3(path: Path) -> bool:
    """Return whether ``path`` is to be read as a Stable-Baselines3 file."""
    return path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def load(
    path: Path, *, game: str | None = None, param: str | None = None, param_options: Mapping[str, Any] | None = None
) -> Trained:
    """Read a checkpoint directory, the latest checkpoint of a run, or an SB3 DQN's zip file.

    A checkpoint that is replaced while it is read is read again.

    Args:
        path: of it.
        game: that an SB3 file was trained on; a checkpoint knows its own.
        param: parameterization of an SB3 file that does not name it.
        param_options: of that parameterization.

    Raises:
        CheckpointError: it is missing, damaged, or does not fit its game.
        UsageError: an SB3 file without ``game``, or a checkpoint of another one.
    """
    if is_sb3(path):
        return _load_sb3(path, game, param, param_options)
    saved = _settled(path)
    config = saved.config
    if game is not None and find_game(game).name != config.game:
        raise UsageError(f"{saved.path} was trained on {config.game}, not on {find_game(game).name} (--game)")
    network = saved.q_network()
    full = _full(saved.path, config.game, saved.spec.num_actions)
    return Trained(
        saved.path, "wn_rl", network, config.game, config.param, full, config, saved.agent_steps * FRAME_SKIP
    )


def _load_sb3(path: Path, game: str | None, param: str | None, options: Mapping[str, Any] | None) -> Trained:
    network = sb3_zip.q_network(path, param, dict(options or {}))
    if game is None:
        raise UsageError(
            f"{path} is a Stable-Baselines3 file and does not say its game: add --game, e.g. --game Breakout"
        )
    name = find_game(game).name
    full = _full(path, name, network.spec.num_actions)
    return Trained(path, "sb3", network, name, network.spec.parameterization, full)


def _full(path: Path, game: str, num_actions: int) -> bool:
    """Return whether a network with this number of actions uses the full set although the minimal one is smaller."""
    minimal = minimal_actions(game)
    if num_actions == minimal:
        return False
    if num_actions == FULL_ACTION_SET:
        return True
    raise CheckpointError(
        f"{path}: its network has {num_actions} actions, {game} has {minimal} (18 with the full action set)"
    )


def _settled(path: Path) -> checkpoint.Checkpoint:
    for attempt in range(READ_ATTEMPTS):
        before = _stamp(path)
        try:
            saved = checkpoint.load(path, with_training=False)
            if saved.notice is None:
                return saved
            if attempt == READ_ATTEMPTS - 1 or (not _being_written(path) and _stamp(path) == before):
                print(saved.notice, file=sys.stderr)
                return saved
        except CheckpointError as error:
            writing = _being_written(path)
            if attempt == READ_ATTEMPTS - 1 or (not writing and _stamp(path) == before):
                if writing:
                    raise CheckpointError(f"{error}; one is being written there: try again") from None
                raise
        time.sleep(0.5)
    raise AssertionError("unreachable")


def _being_written(path: Path) -> bool:
    return any(Path(f"{place}.writing").is_dir() for place in (path, path / "checkpoints" / "latest"))


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when the checkpoint is replaced."""
    try:
        state = checkpoint.find(path).stat()
    except (CheckpointError, OSError):
        return None
    return state.st_ino, state.st_mtime_ns


def copy_network(network: Network) -> Network:
    """Return a copy of a network with weights of its own, in evaluation mode."""
    copy = build_q_network(network.spec, seed=0)
    copy.load_state_dict(network.state_dict())
    return copy.eval()


def check_param(param: str | None, options: Mapping[str, Any]) -> None:
    """Check that there is a parameterization of this name with these options.

    Raises:
        UsageError: there is none, or there are options without a name.
    """
    if param is None:
        if options:
            raise UsageError("--param-options needs --param")
        return
    try:
        parameterizations.resolve(param, options)
    except ValueError as error:
        raise UsageError(f"--param {param}: {one_line(error)}") from None


def greedy(network: Network, device: torch.device | str) -> Any:  # noqa: ANN401 - an evaluation.Policy
    """Return the network's greedy policy on ``device``; see :class:`wn_rl.evaluation.episodes.Policy`."""
    network = network.to(device)

    @torch.no_grad()
    def policy(observations: torch.Tensor) -> torch.Tensor:
        q_values: torch.Tensor = network(observations)
        return q_values.argmax(1)

    return policy
