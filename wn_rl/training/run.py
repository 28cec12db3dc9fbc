"""One training run from its start to its end: what it writes, says and saves around the training loop."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wn_rl import diagnostics
from wn_rl.atari.action_log import Journal, Mark
from wn_rl.atari.env import FRAME_SIDE, FRAME_SKIP, STACK_SIZE, make_atari
from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig, is_auto, to_yaml, validate
from wn_rl.errors import CheckpointError, NonFiniteLossError, UsageError, WnRlError
from wn_rl.evaluation.episodes import (
    EvaluationInterrupted,
    EvaluationProtocol,
    EvaluationResult,
    ValueRecorder,
    environment_options,
    evaluate,
)
from wn_rl.layout import command, import_agent
from wn_rl.machine import (
    LIBRARY_BYTES,
    MemoryPlan,
    check_memory,
    describe_num_envs,
    device_name,
    free_bytes,
    keep_freed_memory,
    pick_device,
    place_replay,
    plan_memory,
    resolve_device,
    set_float32_precision,
)
from wn_rl.networks import MAX_ACTIONS, QNetworkSpec
from wn_rl.parameterizations import resolve
from wn_rl.replay import Replay
from wn_rl.replay.host import HostReplay
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, read_rows, versions
from wn_rl.training import Agent, Backend, FinishedEpisode, TrainingLoop
from wn_rl.training.telemetry import Dashboard, Progress

LONG_ON_A_CPU = 20_000_000
"""Emulator frames from which a run on a CPU takes the better part of a day or more."""
MEASURED_SECONDS = 60.0
"""Wall time of steady training after which the run says how long it will take."""
DIAGNOSTIC_POINTS = 10
"""A histogram of Q-values and the diagnostics at every so many points of the curves."""
NOISE_MINIBATCHES = 8
"""Minibatches across which the noise of a state's Q-value is measured."""
HELD_OUT_STATES = 512
"""States on which the mean max-Q is watched."""

MakeAgent = Callable[[TrainConfig, int, torch.device], Agent]
"""(configuration, number of actions, device) → agent."""
MakeBackend = Callable[[Agent, Replay], Backend]
"""(agent, replay) → what carries the agent out, as its configuration says."""


class _Signals:
    """Turns SIGINT and SIGTERM into a flag while it is entered; a second one acts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere the caller handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Run:
    """One run in one process: the loop, its directory and its dashboards."""

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
        self.journal = Journal(directory.journal, config.num_envs, reseed_period)
        self.config = config = replace(config, backend=backend.name)
        self.loop = TrainingLoop(config, self.env, backend, replay, self.journal)
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

    @property
    def finished(self) -> bool:
        return self.loop.frames >= self.config.frames and self.evaluated_at == self.loop.agent_steps

    def save(self, path: Path) -> None:
        backend = self.loop.backend
        if not backend.is_finite():
            raise NonFiniteLossError("a weight is not finite")
        checkpoint.save(
            path,
            config=asdict(self.config),
            spec=backend.q_network.spec,
            weights=backend.q_network.state_dict(),
            agent_steps=self.loop.agent_steps,
            training={
                "agent": backend.state_dict(),
                "replay": self.loop.replay.state_dict(),
                "loop": self.loop.state_dict(),
                "run": {
                    "evaluated_at": self.evaluated_at,
                    "logged_at": self.logged_at,
                    "points": self.points,
                    "unlogged": torch.tensor(
                        [[episode.frames, episode.episode_return, episode.length] for episode in self.unlogged],
                        dtype=torch.float64,
                    ).reshape(-1, 3),
                    "best": self.best or {},
                    "final": self.final or {},
                    "seconds": self.earlier_seconds,
                    "held_out": _packed(self.held_out),
                },
            },
            versions=versions(),
            keep_previous=path == self.directory.latest,
        )

    def save_evidence(self) -> Path | None:
        """Write what the update saw whose loss was not finite; None where it is not known or cannot be written."""
        backend, replay, path = self.loop.backend, self.loop.replay, self.directory.nonfinite
        numbers = backend.offending_transitions()
        low, high = replay.drawable
        if numbers is None or not bool(((numbers >= low) & (numbers < high)).all()):
            return None
        batch = replay.transitions(numbers)
        tensors = {
            "numbers": numbers,
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

    def trim_journal(self) -> None:
        """Forget what no resumed run needs, where the configuration says so; after each latest checkpoint.

        What the checkpoint before it needs stays: the run goes on from that one if the latest is damaged.
        """
        if self.config.journal == "replay":
            self.journal.trim(self._first_row_before)
        self._first_row_before = self.loop.first_row_kept

    def restore(self, saved: checkpoint.Checkpoint, on_progress: Callable[[int, int], None]) -> None:
        """Bring everything to where it was at the checkpoint; nothing on the disk changes.

        Raises:
            CheckpointError: the checkpoint, the journal and the emulators do not fit together.
        """
        try:
            agent, device = saved.training["agent"], self.device.type
            if saved.config.device != device:
                # The random numbers of another kind of device cannot go on; new ones must not repeat the first.
                agent = agent | {"generator": torch.Generator(device).manual_seed(self._new_seed()).get_state()}
            # Norms of weight-normalized layers, which an earlier version kept beside the weights.
            agent = {key: value for key, value in agent.items() if key != "norms"}
            backend = self.loop.backend
            parameters = list(backend.q_network.parameters())
            checkpoint.check_state(agent, backend.state_dict(), parameters, place="agent/")
            backend.load_state_dict(saved.weights, agent)
            loop, run = saved.training["loop"], saved.training["run"]
            if loop["agent_steps"] != saved.agent_steps:
                raise ValueError("two counters of agent steps differ")
            history = self.journal.open(Mark.of(loop, self.config.num_envs))
            self.loop.rebuild(history, on_progress)
            self._first_row_before = self.loop.first_row_kept
            if self.loop.agent_steps != saved.agent_steps:
                raise ValueError(f"the journal holds {self.loop.agent_steps:,} agent steps, not {saved.agent_steps:,}")
            drawn = saved.training["replay"]["generator"]
            # A replay in host memory draws with another kind of generator than one on a GPU.
            same = saved.config.device == device and len(drawn) == len(self.loop.replay.generator.get_state())
            self.loop.replay.load_state_dict(saved.training["replay"], same_device=same)
            self.evaluated_at = int(run["evaluated_at"])
            self.logged_at, self.points = int(run["logged_at"]), int(run["points"])
            self.unlogged = [FinishedEpisode(int(f), float(r), int(n)) for f, r, n in run["unlogged"].tolist()]
            self.earlier_seconds = float(run["seconds"])
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
        """Evaluate on emulators and generators of their own: the cadence changes no weight."""
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
        """Return Q-values, (states, actions), of states that random play reached, the same ones for the whole run.

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


@dataclass
class _Clock:
    """Wall time of vector steps after warm-up, with the frames and updates that were made in it."""

    seconds: float = 0.0
    frames: int = 0
    updates: int = 0

    def rates(self) -> tuple[float | None, float | None]:
        if self.seconds <= 0.0:
            return None, None
        return self.frames / self.seconds, self.updates / self.seconds


def train(
    config: TrainConfig,
    make_agent: MakeAgent,
    directory: Path,
    *,
    resume: checkpoint.Checkpoint | None = None,
    quiet: bool = False,
    make_backend: MakeBackend | None = None,
) -> int:
    """Train as ``config`` says and write the run to ``directory``.

    Args:
        config: resolved by :func:`wn_rl.config.resolve`.
        make_agent: (configuration, number of actions, device) → agent.
        directory: of the run; new unless ``resume`` is given.
        resume: the checkpoint to go on from.
        quiet: print nothing but errors.
        make_backend: (agent, replay) → backend; None: ``agents.backends.make_backend``.

    Returns:
        The exit code: 0, or 130 / 143 after Ctrl-C / SIGTERM.

    Raises:
        WnRlError: what a user can mend; everything saved before is kept.
    """
    # Where a run lies is no part of it: its config.yaml repeats it in a directory of its own.
    chosen = is_auto(config.num_envs)
    config = replace(resolve_device(config), run_dir=None)
    set_float32_precision(config.precision)
    torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
    keep_freed_memory()
    memory = plan_memory(
        config,
        Replay.expected_bytes(config.replay_capacity, config.num_envs),
        QNetworkSpec(MAX_ACTIONS, hidden_units=config.hidden_units).count_parameters(),
    )
    device = torch.device(config.device)
    if device.type == "cuda":
        memory = place_replay(memory, free_bytes(device))
    check_memory(config, memory, device)
    files = RunDirectory(directory)
    _refuse_finished(config, files, resume)
    if make_backend is None:
        make_backend = _backend_maker(as_before=resume is not None and config.backend == resume.config.backend)
    run = _Run(config, make_agent, files, make_backend, replay_on_host=memory.replay_on_host)
    config = run.config
    try:
        if resume is None:
            files.create(to_yaml(config))
        with files.locked():
            if resume is not None:
                _check_newest(resume, files)
            notes = [describe_num_envs(config)] if chosen else []
            return _train_locked(run, memory, resume, notes, quiet=quiet)
    finally:
        run.env.close()


def _backend_maker(*, as_before: bool) -> MakeBackend:
    """Return what chooses the backend; ``as_before``: another one may take the place of a run's that is not there."""
    backends = import_agent("backends")  # late: the agents stand above this package
    return functools.partial(backends.make_backend, strict=not as_before)


def _refuse_finished(config: TrainConfig, files: RunDirectory, resume: checkpoint.Checkpoint | None) -> None:
    frames = resume.agent_steps * FRAME_SKIP if resume else 0
    if resume and frames >= config.frames and resume.training["run"].get("evaluated_at") == resume.agent_steps:
        raise UsageError(f"{files.path} is finished at frame {frames:,}: raise --frames to go on")


def _train_locked(
    run: _Run, memory: MemoryPlan, resume: checkpoint.Checkpoint | None, notes: list[str], *, quiet: bool
) -> int:
    config, files, loop = run.config, run.directory, run.loop
    progress = Progress(config.frames, resume.agent_steps * FRAME_SKIP if resume else 0, quiet=quiet)
    dashboard: Dashboard | None = None
    try:
        with _Signals() as signals:
            for note in notes:
                progress.say(note)
            _describe(run, memory, progress)
            if resume is None:
                run.journal.create()
                loop.start()
            else:
                try:
                    _rebuild(run, resume, progress, signals)
                except _StoppedError:
                    progress.say(f"stopped before it went on; nothing changed in {files.path}")
                    return 128 + (signals.received or 0)
                files.cut(episodes=loop.frames, evaluations=run.evaluated_at * FRAME_SKIP)
                run.journal.cut()
                checkpoint.settle(files.latest, resume.path)
                files.write_config(to_yaml(config))
                if config != resume.config:  # else a kill before the next checkpoint would undo the change
                    run.save(files.latest)
            dashboard = Dashboard(files.path, resume_frames=loop.frames if resume else None)
            dashboard.describe(to_yaml(config))
            try:
                _train(run, dashboard, progress, signals)
            except NonFiniteLossError as error:
                evidence = run.save_evidence()
                kept = f" The minibatch is in {evidence}." if evidence else ""
                raise NonFiniteLossError(
                    f"{error} at frame {loop.frames:,}; the last good checkpoint is kept.{kept} A smaller "
                    "--learning-rate is the usual remedy."
                ) from None
            if signals.received is None:
                return 0
            progress.say(f"stopped at frame {loop.frames:,}; go on with: {command('train')} --resume {files.path}")
            return 128 + signals.received
    finally:
        progress.close()
        if dashboard is not None:
            dashboard.close()


def _check_newest(resume: checkpoint.Checkpoint, files: RunDirectory) -> None:
    """Refuse to go on from a checkpoint that another process replaced before this one had the lock.

    Raises:
        WnRlError: it did; what it wrote after that checkpoint would be cut or put aside as damaged.
    """
    now = checkpoint.load(files.path)
    if (now.path, now.agent_steps) != (resume.path, resume.agent_steps):
        raise WnRlError(f"{files.path} was written to by another process in the meantime: --resume it again")


class _StoppedError(Exception):
    """A signal came while the replay was being filled."""


def _rebuild(run: _Run, saved: checkpoint.Checkpoint, progress: Progress, signals: _Signals) -> None:
    if saved.notice is not None:
        progress.say(saved.notice)
    started = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        if signals.received is not None:
            raise _StoppedError
        progress.rebuilding(done, total)

    run.restore(saved, on_progress)
    progress.say(
        f"played {len(run.loop.replay):,} transitions again in {duration(time.monotonic() - started)}; going on from "
        f"frame {run.loop.frames:,}"
    )


def _describe(run: _Run, memory: MemoryPlan, progress: Progress) -> None:
    config, files = run.config, run.directory
    network = run.loop.backend.q_network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    progress.say(
        f"{config.game}, {config.param}, preset {config.preset}, seed {config.seed}: {config.frames:,} frames with "
        f"{config.num_envs} emulators on {config.device} in {config.precision}"
    )
    progress.say(
        f"{parameters:,} parameters, {config.optimizer} with learning rate {config.learning_rate:g}, replay of "
        f"{config.replay_capacity:,} agent steps; writing to {files.path}"
    )
    backend = run.loop.backend
    detail = f" ({backend.detail})" if backend.detail else ""
    progress.say(f"backend {backend.name}{detail}: {backend.reason}")
    replay_gb, working_gb = run.loop.replay.nbytes / 1e9, (memory.working_bytes + LIBRARY_BYTES) / 1e9
    where = "memory" if config.device == "cpu" or memory.replay_on_host else "GPU memory"
    if memory.replay_on_host:
        progress.say(
            f"the GPU has no room for a replay of {replay_gb:.1f} GB: it is kept in host memory, which is slower; "
            "lower --replay-capacity to have it on the GPU"
        )
    progress.say(
        f"at most {replay_gb:.2f} GB of {where} for the replay, about {working_gb:.1f} GB of memory for the rest"
    )
    if config.device == "cpu" and config.frames >= LONG_ON_A_CPU:
        progress.say(
            f"this machine has no GPU, and {config.frames:,} frames take days on a CPU; --preset quick shows "
            "something in an hour"
        )


def _train(run: _Run, dashboard: Dashboard, progress: Progress, signals: _Signals) -> None:
    config, loop, files = run.config, run.loop, run.directory
    started = time.monotonic() - run.earlier_seconds
    saved_at, saved_time = loop.agent_steps, time.monotonic()
    steady, point = _Clock(), _Clock()
    first_update = loop.backend.updates + 1
    told_duration = False
    unwritten: list[FinishedEpisode] = []

    def log() -> None:
        nonlocal point
        statistics = loop.backend.read_statistics()
        if statistics.updates and not math.isfinite(statistics.loss):
            raise NonFiniteLossError(f"the loss is {statistics.loss}")
        frame_rate, update_rate = point.rates()
        q_values = run.q_values_held_out()
        if q_values is not None:
            if run.points % DIAGNOSTIC_POINTS == 0:
                dashboard.histogram(loop.frames, "q_values/held_out", q_values)
                dashboard.scalars(loop.frames, run.diagnose() | loop.backend.effective_learning_rates())
                loop.backend.watch_next_update()
            run.points += 1
        dashboard.scalars(
            loop.frames,
            {
                "train/episode_return": _mean([episode.episode_return for episode in run.unlogged]),
                "train/episode_length": _mean([episode.length for episode in run.unlogged]),
                "train/loss": statistics.loss,
                "train/td_error": statistics.td_error,
                "train/q_value": statistics.q_value,
                "train/max_q_held_out": math.nan if q_values is None else float(q_values.amax(1).mean()),
                "train/gradient_norm": loop.backend.gradient_norm(),
                "train/learning_rate": config.learning_rate or math.nan,
                "train/epsilon": loop.epsilon,
                "train/replay_size": len(loop.replay),
                "speed/frames_per_second": math.nan if frame_rate is None else frame_rate,
                "speed/updates_per_second": math.nan if update_rate is None else update_rate,
            },
        )
        run.unlogged, point = [], _Clock()
        run.logged_at = loop.agent_steps

    def save(*paths: Path) -> None:
        nonlocal saved_at, saved_time
        # A checkpoint must never know more than the files that a resumed run cuts to it.
        files.append(files.episodes, [(e.frames, e.episode_return, e.length) for e in unwritten], sync=True)
        unwritten.clear()
        run.earlier_seconds = time.monotonic() - started
        for path in paths:
            run.save(path)
        run.trim_journal()
        dashboard.flush()
        saved_at, saved_time = loop.agent_steps, time.monotonic()

    while True:
        done = loop.frames >= config.frames
        passed = loop.agent_steps // config.evaluation_period > run.evaluated_at // config.evaluation_period
        if signals.received is None and (passed or (done and not run.finished)):
            try:
                result = run.evaluate(lambda: signals.received is not None)
            except EvaluationInterrupted:
                continue
            run.evaluated_at = loop.agent_steps
            _record_evaluation(run, dashboard, progress, result)
            if done:
                log()
            # The best one first: a run that goes on from an older checkpoint makes it again.
            best = run.best is not None and run.best["frames"] == loop.frames
            save(*([files.best] if best else []), files.latest)
        if done or signals.received is not None:
            break
        agent_steps, updates = loop.agent_steps, loop.backend.updates
        warm = updates >= first_update
        stepped = time.perf_counter()
        ended = loop.vector_step()
        stepped = time.perf_counter() - stepped
        unwritten += ended
        run.unlogged += ended
        for clock in (steady, point) if warm else (point,):
            clock.seconds += stepped
            clock.frames += (loop.agent_steps - agent_steps) * FRAME_SKIP
            clock.updates += loop.backend.updates - updates
        for episode in ended:
            progress.episode(episode.episode_return)
        progress.update(loop.frames, loop.epsilon)
        if not told_duration and steady.seconds >= MEASURED_SECONDS:
            told_duration = True
            rate = steady.frames / steady.seconds
            left = (config.frames - loop.frames) / rate
            progress.say(f"measured {rate:,.0f} frames/s: {duration(left)} for the rest, evaluations not counted")
        if loop.agent_steps // config.log_period > run.logged_at // config.log_period:
            log()
        by_steps = config.checkpoint_period > 0 and (
            loop.agent_steps // config.checkpoint_period > saved_at // config.checkpoint_period
        )
        if by_steps or time.monotonic() - saved_time >= config.checkpoint_seconds:
            save(files.latest)
    # A new run that is stopped before its first step needs a checkpoint to go on from, too.
    if saved_at != loop.agent_steps or unwritten or not files.latest.exists():
        save(files.latest)
    if done and run.final is not None and run.best is not None:
        dashboard.hparams(loop.frames, config, final=run.final["mean"], best=run.best["mean"])
    frame_rate, update_rate = steady.rates()
    files.write_summary(
        {
            "game": config.game,
            "param": config.param,
            "preset": config.preset,
            "seed": config.seed,
            "frames": loop.frames,
            "agent_steps": loop.agent_steps,
            "updates": loop.backend.updates,
            "finished": loop.frames >= config.frames,
            "final_evaluation": run.final,
            "best_evaluation": run.best,
            "wall_seconds": time.monotonic() - started,
            "frames_per_second": frame_rate,
            "updates_per_second": update_rate,
            "num_envs": config.num_envs,
            "device": device_name(run.device),
            "precision": config.precision,
            "num_threads": torch.get_num_threads(),
            "versions": versions(),
        }
    )


def _record_evaluation(run: _Run, dashboard: Dashboard, progress: Progress, result: EvaluationResult) -> None:
    frames, files, scores = run.loop.frames, run.directory, result.scores
    run.final = {
        "frames": frames,
        "episodes": len(result.episodes),
        "mean": result.mean,
        "std": result.std,
        "min": float(scores.min()),
        "max": float(scores.max()),
        "mean_length": result.mean_length,
        "seconds": result.seconds,
    }
    if run.best is None or run.final["mean"] > run.best["mean"]:
        run.best = run.final
    files.append(files.evaluations, [tuple(run.final.values())], sync=True)
    dashboard.evaluation(frames, result)
    dashboard.scalars(frames, {diagnostics.OVERESTIMATION: run.overestimation})
    progress.evaluation(frames, result)


def duration(seconds: float) -> str:
    """Return a wall time as a person would say it: ``40 s``, ``12 min``, ``3.5 h`` or ``2.1 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


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


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else math.nan


def open_for_resume(directory: Path, changes: Mapping[str, Any]) -> tuple[TrainConfig, checkpoint.Checkpoint]:
    """Return the configuration and the checkpoint with which the run in ``directory`` goes on.

    Args:
        directory: of the run.
        changes: configuration keys that the user gave; only those that do not change the experiment may differ.

    Raises:
        UsageError: a key that may not change.
        CheckpointError: the checkpoint is missing or damaged.
    """
    saved = checkpoint.load(RunDirectory(directory).path)
    _check_resumable(saved)
    read_rows(RunDirectory(directory).evaluations)
    # A name may be written in several ways, and an option as a text.
    changes = {key: _canonical(saved.config, key, value) for key, value in changes.items()}
    for key, value in changes.items():
        if key not in RESUMABLE and value != getattr(saved.config, key):
            raise UsageError(
                f"--resume: {key} is {getattr(saved.config, key)!r} in this run and cannot change to {value!r}; "
                f"only these can: {', '.join(sorted(RESUMABLE))}"
            )
    changes = {key: value for key, value in changes.items() if key in RESUMABLE}
    moved = "device" in changes and pick_device(changes["device"]) != saved.config.device
    if moved:  # what was decided for another device says nothing about this one
        changes = {"compile": "auto", "backend": "auto"} | changes
    config = replace(saved.config, **changes)
    if chosen := {key for key in changes if getattr(saved.config, key) != changes[key] and key not in ("device",)}:
        config = replace(config, chosen=tuple(sorted({*saved.config.chosen, *chosen})))
    validate(config)
    return config, saved


def _check_resumable(saved: checkpoint.Checkpoint) -> None:
    if "rows" not in saved.training.get("loop", {}):
        raise CheckpointError(
            f"{saved.path} was written by an earlier version, which kept no journal: it can be evaluated, not resumed"
        )
    then, now = saved.versions.get("ale-py"), versions()["ale-py"]
    if then != now:
        raise CheckpointError(
            f"{saved.path} was made with ale-py {then}, here is {now}, whose games may differ: "
            f"pip install ale-py=={then} to go on"
        )


def _canonical(config: TrainConfig, key: str, value: Any) -> Any:  # noqa: ANN401 - the type is that of the key
    if key == "num_envs" and is_auto(value):
        return config.num_envs  # what was chosen for this run
    if key == "game":
        return find_game(value).name
    if key == "param_options":
        try:
            return resolve(config.param, value).options()
        except ValueError as error:
            raise UsageError(f"param_options: {error}") from None
    return value


RESUMABLE = frozenset(
    {
        "frames",
        "device",
        "precision",
        "backend",
        "compile",
        "num_threads",
        "emulator_threads",
        "evaluation_period",
        "evaluation_steps",
        "evaluation_episodes",
        "evaluation_envs",
        "checkpoint_seconds",
        "checkpoint_period",
        "journal",
        "log_period",
    }
)
"""Configuration keys that a resumed run may change."""
