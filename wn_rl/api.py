"""The project from Python: load a trained network, train one, score one.

``wn_rl.load``, ``wn_rl.train`` and ``wn_rl.evaluate`` do what the commands do, without a command line.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl import config as configuration
from wn_rl import networks
from wn_rl.atari.env import AtariVector, make_atari
from wn_rl.config import TrainConfig
from wn_rl.errors import UsageError, closest
from wn_rl.evaluation import policies, scoring
from wn_rl.evaluation.episodes import environment_options
from wn_rl.layout import import_agent
from wn_rl.machine import pick_device
from wn_rl.networks import Network
from wn_rl.output import notice
from wn_rl.runs.directory import new_directory
from wn_rl.training.resume import open_for_resume
from wn_rl.training.run import MakeAgent
from wn_rl.training.session import train as train_run


class Policy:
    """A trained network as a policy.

    Attributes:
        trained: the network with its game, its configuration and its source.
        device: where it is computed, in float32.
    """

    def __init__(self, trained: policies.Trained, device: str | torch.device = "cpu") -> None:
        """Wrap the result of :func:`wn_rl.evaluation.policies.load`."""
        self.trained = trained
        self.device = torch.device(device)
        self.trained.network.to(self.device).eval()

    @property
    def network(self) -> Network:
        """The Q-network, a ``torch.nn.Module`` in evaluation mode."""
        return self.trained.network

    @property
    def game(self) -> str:
        """The game that it was trained on."""
        return self.trained.game

    @property
    def config(self) -> TrainConfig | None:
        """The configuration of its training; None for a Stable-Baselines3 file."""
        return self.trained.config

    @torch.no_grad()
    def q_values(self, observation: NDArray[np.uint8] | Tensor) -> NDArray[np.float32]:
        """Return Q(s, ·).

        Args:
            observation: uint8, shape (4, 84, 84), oldest frame first, or (N, 4, 84, 84).

        Returns:
            Shape (actions,) or (N, actions).

        Raises:
            UsageError: the observation has another shape or dtype.
        """
        given = torch.as_tensor(observation)
        shape = tuple(self.network.spec.observation_shape)
        if given.dtype != torch.uint8 or tuple(given.shape[-3:]) != shape or given.dim() not in (3, 4):
            raise UsageError(
                f"an observation is uint8 of shape {shape} or (N, {', '.join(map(str, shape))}), not "
                f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
            )
        batch = given if given.dim() == 4 else given[None]
        q_values: NDArray[np.float32] = self.network(batch.to(self.device)).float().cpu().numpy()
        return q_values if given.dim() == 4 else q_values[0]

    def predict(
        self,
        observation: NDArray[np.uint8] | Tensor,
        *,
        epsilon: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> NDArray[np.int64]:
        """Return ε-greedy actions.

        Args:
            observation: as :meth:`q_values` takes it.
            epsilon: probability of a random action; 0: always the action with the highest Q-value.
            generator: of the random actions; None: a new one each time.

        Returns:
            int64, shape () or (N,).

        Raises:
            UsageError: the observation has another shape or dtype, or ``epsilon`` is not a probability.
        """
        if not 0.0 <= epsilon <= 1.0:
            raise UsageError(f"epsilon is a probability from 0 to 1, not {epsilon}")
        q_values = self.q_values(observation)
        greedy: NDArray[np.int64] = np.asarray(q_values.argmax(-1))
        if epsilon == 0.0:
            return greedy
        rng = generator or np.random.default_rng()
        random = rng.integers(q_values.shape[-1], size=greedy.shape)
        return np.where(rng.random(greedy.shape) < epsilon, random, greedy)

    def make_env(self, num_envs: int = 1, **options: Any) -> AtariVector:  # noqa: ANN401 - make_atari's arguments
        """Return emulators of its game with the settings of its training; see :func:`wn_rl.make_atari`.

        Args:
            num_envs: N.
            options: of :func:`wn_rl.make_atari`, over those of the training.
        """
        trained = environment_options(self.config) if self.config else {"full_action_set": self.trained.full_action_set}
        return make_atari(self.game, num_envs, **(trained | options))


def load(
    source: str | Path,
    *,
    game: str | None = None,
    param: str | None = None,
    param_options: Mapping[str, Any] | None = None,
    network: str | type[Network] | None = None,
    device: str = "auto",
) -> Policy:
    """Load a trained network; nothing in the files is executed.

    Args:
        source: a run directory (its latest checkpoint), a checkpoint directory, or a Stable-Baselines3 DQN's zip file.
        game: that a Stable-Baselines3 file was trained on.
        param: its parameterization, where the file does not name it.
        param_options: of that parameterization.
        network: of your own: its class, or ``module:Name``, which is imported; a checkpoint's is not, unless it stands
            here.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        CheckpointError: it is missing, damaged, or does not fit its game.
        UsageError: there is no such network, a Stable-Baselines3 file without ``game``, or no GPU where one was asked
            for.
    """
    _registered(network)
    where = pick_device(device)
    return Policy(policies.load(Path(source), game=game, param=param, param_options=param_options), where)


def train(
    config: TrainConfig | str | Path | None = None,
    *,
    agent: MakeAgent | None = None,
    resume: bool = False,
    quiet: bool = False,
    **keys: Any,  # noqa: ANN401 - configuration keys
) -> Path:
    """Train a DQN and return its run directory.

    Args:
        config: a configuration, the name of a preset, or a YAML file; None: ``paper``, or the preset of ``keys``.
        agent: (configuration, number of actions, device) → agent; None: :class:`agents.dqn.DQN`. May be a subclass.
        resume: resume the run in ``run_dir``, exactly, instead of starting one.
        quiet: print nothing but errors.
        keys: configuration keys, over ``config``: ``game="Breakout", param="wn", frames=2_000_000``; ``run_dir`` says
            where to, ``network`` and ``backend`` may be classes, and ``module:Name`` in one of them is imported.

    Raises:
        UsageError: an unknown key or preset, or an invalid value.
        WnRlError: the run failed; everything saved before is kept.
        KeyboardInterrupt: it was interrupted; it can be resumed.
        SystemExit: SIGTERM ended it; it can be resumed.
    """
    keys, renamed = configuration.current(keys)
    if renamed and not quiet:
        notice(renamed)
    known = {field.name for field in fields(TrainConfig)}
    for key in keys:
        if key not in known:
            raise UsageError(f"unknown configuration key '{key}'.{configuration.suggestion(key, known)}")
    if isinstance(keys.get("run_dir"), Path):
        keys["run_dir"] = str(keys["run_dir"])
    if "network" in keys:
        keys["network"] = _registered(keys["network"])
    if isinstance(keys.get("backend"), type):
        keys["backend"] = keys["backend"].name
    elif ":" in str(keys.get("backend", "")):
        import_agent("backends").load(keys["backend"])
    keys = {key: configuration.coerce(key, value) for key, value in keys.items()}
    make_agent: MakeAgent = agent or import_agent("dqn").DQN
    if resume:
        run_dir = keys.pop("run_dir", None)
        if run_dir is None:
            raise UsageError("resume needs run_dir, the directory of the run")
        resumed, checkpoint = open_for_resume(Path(run_dir), keys)
        return _ended(train_run(resumed, make_agent, Path(run_dir), resume=checkpoint, quiet=quiet), Path(run_dir))
    if isinstance(config, TrainConfig):
        wanted = replace(config, **keys, chosen=tuple(sorted({*config.chosen, *keys} - {"run_dir"})))
    else:
        is_preset = config is None or (isinstance(config, str) and config in configuration.preset_names())
        file = None if config is None or is_preset else Path(config)
        preset = keys.pop("preset", None) or (None if config is None or file else str(config))
        wanted, stays = configuration.configure(preset, file, keys)
        if stays and not quiet:
            print(stays)
    wanted = configuration.resolve(wanted)
    if wanted.run_dir:
        directory = Path(wanted.run_dir)
        return _ended(train_run(wanted, make_agent, directory, quiet=quiet), directory)
    with new_directory(wanted.game, wanted.param, wanted.preset, wanted.seed) as directory:
        return _ended(train_run(wanted, make_agent, directory, quiet=quiet), directory)


def _registered(network: str | type[Network] | None) -> str | None:
    """Return the name of a network, a class or a name, whose module is imported where it is ``module:Name``.

    Raises:
        UsageError: there is no such module or class, or the class is not registered.
    """
    if isinstance(network, str):
        if ":" in network and not networks.is_known(network):
            configuration.import_network(network)
        return network
    if network is None:
        return None
    try:
        return networks.reference(network)
    except ValueError as error:
        raise UsageError(f"network: {error}") from None


def _ended(code: int, directory: Path) -> Path:
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return directory


def evaluate(
    source: str | Path,
    *,
    protocol: str = "training",
    seed: int = 0,
    num_envs: int = 0,
    device: str = "auto",
    num_threads: int = 0,
    game: str | None = None,
    param: str | None = None,
    param_options: Mapping[str, Any] | None = None,
    network: str | type[Network] | None = None,
    **settings: Any,  # noqa: ANN401 - of the protocol
) -> scoring.Score:
    """Evaluate a trained network under a named protocol and return its score.

    Args:
        source: as for :func:`load`.
        protocol: ``paper``, ``nature``, ``machado`` or ``training`` (docs/evaluation.md).
        seed: of the emulators and of the random actions.
        num_envs: parallel emulators; 0: chosen automatically.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_threads: of the arithmetic on a CPU; 0: all cores.
        game: that a Stable-Baselines3 file was trained on.
        param: its parameterization, where the file does not name it.
        param_options: of that parameterization.
        network: as for :func:`load`.
        settings: of the protocol, over its own: ``episodes``, ``steps``, ``epsilon``, ``max_frames_per_episode``,
            ``noop_max``, ``sticky_actions``, ``fire_reset``, ``action_set``.

    Returns:
        ``.result.mean``, ``.result.scores`` (raw points of each episode), ``.interval``, ``.human_normalized``.

    Raises:
        CheckpointError: it is missing, damaged, or does not fit its game or the protocol.
        UsageError: an unknown protocol, setting or network, or nothing to evaluate.
    """
    from wn_rl.evaluation.protocols import SETTINGS

    for key in settings:
        if key not in SETTINGS:
            raise UsageError(f"unknown setting '{key}'.{closest(key, SETTINGS)} There are: {', '.join(SETTINGS)}.")
    _registered(network)
    how = scoring.How(
        protocol, settings, seed, num_envs, device, num_threads, game, param, param_options=dict(param_options or {})
    )
    return scoring.score(Path(source), how)
