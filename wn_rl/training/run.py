"""One training run: its state, as a checkpoint stores it, its evaluations and its diagnostics."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wn_rl import diagnostics
from wn_rl.atari.action_log import ActionLog, Mark
from wn_rl.atari.env import FRAME_SIDE, STACK_SIZE, make_atari
from wn_rl.config import TrainConfig, to_mapping
from wn_rl.errors import CheckpointError, NonFiniteLossError
from wn_rl.evaluation.episodes import (
    EvaluationProtocol,
    EvaluationResult,
    ValueRecorder,
    environment_options,
    evaluate,
)
from wn_rl.machine import processor
from wn_rl.replay import Replay
from wn_rl.replay.host import HostReplay
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, versions
from wn_rl.training.interfaces import Agent, Backend
from wn_rl.training.loop import FinishedEpisode, TrainingLoop

NOISE_MINIBATCHES = 8
"""Minibatches over which the noise of a state's Q-value is measured."""
HELD_OUT_STATES = 512
"""States on which the mean max-Q is measured."""

MakeAgent = Callable[[TrainConfig, int, torch.device], Agent]
"""(configuration, number of actions, device) → agent."""
MakeBackend = Callable[[Agent, Replay], Backend]
"""(agent, replay) → the backend that the agent's configuration asks for."""


class Run:
    """One run in one process: the training loop, its run directory, and what it reports."""

    def __init__(
        self,
        config: TrainConfig,
        make_agent: MakeAgent,
        directory: RunDirectory,
        make_backend: MakeBackend,
        *,
        replay_on_host: bool = False,
    ) -> None:
        self.directory = directory
        self.device = torch.device(config.device)
        self.env = make_atari(
            config.game, config.num_envs, num_threads=config.emulator_threads, **environment_options(config)
        )
        kind = HostReplay if replay_on_host else Replay
        replay = kind(config.replay_capacity, config.num_envs, device=self.device, seed=config.seed)
        backend = make_backend(make_agent(config, self.env.num_actions, self.device), replay)
        reseed_period = config.reseed_period if config.sticky_actions > 0 else 0
        self.action_log = ActionLog(directory.action_log, config.num_envs, reseed_period)
        self.config = config = replace(config, backend=backend.name)
        self.loop = TrainingLoop(config, self.env, backend, replay, self.action_log)
        self.held_out: Tensor | None = None
        self.evaluated_at = 0
        self.logged_at = 0
        self.points = 0
        self.unlogged: list[FinishedEpisode] = []
        self.best: dict[str, float] | None = None
        self.final: dict[str, float] | None = None
        self.earlier_seconds = 0.0
        self.overestimation = math.nan
        self._first_row_before = 0  # oldest row that the replay held at the latest checkpoint
        self._before_closing: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether all frames were trained and the last evaluation was made."""
        return self.loop.frames >= self.config.frames and self.evaluated_at == self.loop.agent_steps

    def begin_closing(self) -> None:
        """Mark the end of the run: what is reported from now on is not part of a longer run that goes on from here.

        The last evaluation and the last point of the curves are made at the end of a run, scheduled or not; a longer
        run would not have made them there. Checkpoints store the state before them.
        """
        self._before_closing = {"agent": self.loop.backend.state_dict(), **self._reported()}

    def _reported(self) -> dict[str, Any]:
        return {
            "evaluated_on_schedule": self.evaluated_at,
            "logged_at": self.logged_at,
            "points": self.points,
            "unlogged": torch.tensor(
                [[episode.frames, episode.episode_return, episode.length] for episode in self.unlogged],
                dtype=torch.float64,
            ).reshape(-1, 3),
            "best": self.best or {},
            "final": self.final or {},
            **self.loop.backend.measurement_state(),
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint.

        Raises:
            NonFiniteLossError: a weight is not finite; nothing is written.
        """
        backend = self.loop.backend
        if not backend.is_finite():
            raise NonFiniteLossError("a weight is not finite")
        reported = self._reported() if self._before_closing is None else dict(self._before_closing)
        checkpoint.save(
            path,
            config=to_mapping(self.config),
            spec=backend.q_network.spec,
            weights=backend.q_network.state_dict(),
            agent_steps=self.loop.agent_steps,
            training={
                "agent": reported.pop("agent", None) or backend.state_dict(),
                "replay": self.loop.replay.state_dict(),
                "loop": self.loop.state_dict(),
                "run": {
                    "evaluated_at": self.evaluated_at,
                    **reported,
                    "seconds": self.earlier_seconds,
                    "held_out": _packed(self.held_out),
                },
            },
            versions=versions() | {"processor": processor(self.device)},
            keep_previous=path == self.directory.latest,
        )

    def save_evidence(self) -> Path | None:
        """Write the minibatch whose loss was not finite; returns None if it is not known or cannot be written."""
        backend, replay, path = self.loop.backend, self.loop.replay, self.directory.nonfinite
        indices = backend.offending_transitions()
        low, high = replay.index_range
        if indices is None or not bool(((indices >= low) & (indices < high)).all()):
            return None
        batch = replay.transitions(indices)
        tensors = {
            "indices": indices,
            "observations": batch.observations,
            "actions": batch.actions,
            "rewards": batch.rewards,
            "next_observations": batch.next_observations,
            "terminals": batch.terminals,
            "q_values": backend.q_values(batch.observations),
        }
        weights = backend.q_network.state_dict().items()
        statistics = {
            "frames": self.loop.frames,
            "updates": backend.updates,
            "gradient_norm_of_the_update_before": backend.gradient_norm(),
            "largest_weight": {name: float(value.abs().max()) for name, value in weights if value.numel()},
            "weights_not_finite": {name: int((~value.isfinite()).sum()) for name, value in weights},
        }
        try:
            checkpoint.save_evidence(path, tensors, statistics)
        except OSError:
            return None
        return path

    def trim_action_log(self) -> None:
        """With ``action_log: replay``, remove actions that no resumed run needs; called after each latest checkpoint.

        What the checkpoint before it needs is kept: the run is resumed from that one if the latest is damaged.
        """
        if self.config.action_log == "replay":
            self.action_log.trim(self._first_row_before)
        self._first_row_before = self.loop.oldest_vector_step

    def restore(self, saved: checkpoint.Checkpoint, on_progress: Callable[[int, int], None]) -> None:
        """Restore everything as it was at the checkpoint; nothing on the disk changes.

        Raises:
            CheckpointError: the checkpoint, the action log and the emulators do not match.
        """
        try:
            agent, device = saved.training["agent"], self.device.type
            if saved.config.device != device:
                # A generator's state cannot move to another type of device, and the first numbers must not be repeated.
                agent = agent | {"generator": torch.Generator(device).manual_seed(self._new_seed()).get_state()}
            # Norms of weight-normalized layers, which an earlier version stored beside the weights.
            agent = {key: value for key, value in agent.items() if key != "norms"}
            backend = self.loop.backend
            parameters = list(backend.q_network.parameters())
            checkpoint.check_state(agent, backend.state_dict(), parameters, place="agent/")
            backend.load_state_dict(saved.weights, agent)
            loop, run = saved.training["loop"], saved.training["run"]
            if loop["agent_steps"] != saved.agent_steps:
                raise ValueError("two counters of agent steps differ")
            history = self.action_log.open(Mark.of(loop, self.config.num_envs))
            self.loop.restore(history, on_progress)
            self._first_row_before = self.loop.oldest_vector_step
            if self.loop.agent_steps != saved.agent_steps:
                raise ValueError(
                    f"the action log holds {self.loop.agent_steps:,} agent steps, not {saved.agent_steps:,}"
                )
            drawn = saved.training["replay"]["generator"]
            # A replay in host memory has another type of generator than one on a GPU.
            same = saved.config.device == device and len(drawn) == len(self.loop.replay.generator.get_state())
            self.loop.replay.load_state_dict(saved.training["replay"], same_device=same)
            self.evaluated_at = int(run.get("evaluated_on_schedule", run["evaluated_at"]))
            self.logged_at, self.points = int(run["logged_at"]), int(run["points"])
            self.unlogged = [FinishedEpisode(int(f), float(r), int(n)) for f, r, n in run["unlogged"].tolist()]
            self.earlier_seconds = float(run["seconds"])
            if "measuring" in run:
                self.loop.backend.load_measurement_state(run)
            self.best, self.final = run.get("best"), run.get("final")
            self.held_out = _unpacked(run["held_out"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, zlib.error) as error:
            raise CheckpointError(
                f"{saved.path} does not fit this run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from None

    def _new_seed(self) -> int:
        seeds = np.random.SeedSequence([self.config.seed, self.loop.agent_steps, 1]).generate_state(1)
        return int(seeds[0])

    def evaluate(self, should_stop: Callable[[], bool]) -> EvaluationResult:
        """Evaluate with separate emulators and generators, so how often this is done changes no weight."""
        config = self.config
        options = environment_options(config)
        env = make_atari(config.game, config.evaluation_envs, num_threads=config.emulator_threads, **options)
        protocol = EvaluationProtocol(config.evaluation_epsilon, config.evaluation_steps, config.evaluation_episodes)
        seed = int(np.random.SeedSequence([config.seed, self.loop.agent_steps]).generate_state(1)[0]) & 0x7FFFFFFF
        recorder = ValueRecorder(
            self.loop.backend.q_values,
            gamma=config.gamma,
            reward_clip=config.reward_clip,
            life_loss_terminal=config.life_loss_terminal,
        )
        try:
            result = evaluate(
                recorder,
                env,
                protocol,
                seed=seed,
                device=self.device,
                on_step=recorder.after_step,
                should_stop=should_stop,
            )
            self.overestimation = recorder.overestimation()
            return result
        finally:
            env.close()

    def q_values_held_out(self) -> Tensor | None:
        """Return Q-values, (states, actions), of states that random play reached; the same states for the whole run.

        None before the first update.
        """
        replay, backend = self.loop.replay, self.loop.backend
        if backend.updates == 0:
            return None
        if self.held_out is None:
            generator = torch.Generator(replay.generator.device).manual_seed(self.config.seed)
            self.held_out = replay.sample(HELD_OUT_STATES, generator).observations.clone()
        return backend.q_values(self.held_out)

    def diagnose(self) -> dict[str, float]:
        """Return the diagnostics of the network on the held-out states, by tag; after :meth:`q_values_held_out`."""
        assert self.held_out is not None
        replay, size = self.loop.replay, self.config.batch_size
        generator = torch.Generator(replay.generator.device).manual_seed(self.loop.agent_steps)
        minibatches = [replay.sample(size, generator).observations for _ in range(NOISE_MINIBATCHES)]
        return diagnostics.collect(self.loop.backend.q_network, self.held_out, minibatches)


def _packed(frames: Tensor | None) -> Tensor:
    """Return observations compressed, uint8; empty for None."""
    data = b"" if frames is None else zlib.compress(frames.cpu().contiguous().numpy().tobytes(), 1)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _unpacked(packed: Tensor, device: torch.device) -> Tensor | None:
    if len(packed) == 0:
        return None
    size = HELD_OUT_STATES * STACK_SIZE * FRAME_SIDE**2
    data = zlib.decompressobj().decompress(packed.numpy().tobytes(), size)
    frames = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return frames.view(HELD_OUT_STATES, STACK_SIZE, FRAME_SIDE, FRAME_SIDE).to(device)
