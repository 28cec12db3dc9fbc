"""A training session: a run from its start, or from a checkpoint, to its end or to the next interruption."""

from __future__ import annotations

import functools
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wn_rl import diagnostics
from wn_rl.atari.env import FRAME_SKIP
from wn_rl.config import TrainConfig, is_auto, network_spec, to_yaml
from wn_rl.errors import NonFiniteLossError, UsageError, WnRlError
from wn_rl.evaluation.episodes import EvaluationInterrupted, EvaluationResult
from wn_rl.layout import command, import_agent
from wn_rl.machine import (
    LIBRARY_BYTES,
    MemoryPlan,
    amount,
    check_memory,
    describe_num_envs,
    device_name,
    free_bytes,
    keep_freed_memory,
    place_replay,
    plan_memory,
    precisions,
    processor,
    resolve_device,
    set_float32_precision,
)
from wn_rl.networks import MAX_ACTIONS
from wn_rl.replay import Replay
from wn_rl.runs import checkpoint
from wn_rl.runs.directory import RunDirectory, versions
from wn_rl.training.loop import FinishedEpisode
from wn_rl.training.run import MakeAgent, MakeBackend, Run
from wn_rl.training.schedule import period_ended, updates_owed
from wn_rl.training.signals import Signals
from wn_rl.training.telemetry import Dashboard, Progress

LONG_ON_A_CPU = 20_000_000
"""Emulator frames from which a run on a CPU takes most of a day or more."""
MEASURED_SECONDS = 60.0
"""Wall time of steady training after which the run estimates its duration."""
DIAGNOSTIC_POINTS = 10
"""Points of the curves between two histograms of Q-values and diagnostics."""


@dataclass
class _Clock:
    """Wall time of vector steps, with the frames and updates made in it."""

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
        resume: the checkpoint to resume from.
        quiet: print nothing but errors.
        make_backend: (agent, replay) → backend; None: what ``agents.backends.choice`` chooses.

    Returns:
        The exit code: 0, or 130 / 143 after Ctrl-C / SIGTERM.

    Raises:
        WnRlError: an error that the user can fix; everything saved before is kept.
    """
    # The directory is not part of the experiment: the run's config.yaml repeats it in a directory of its own.
    wanted, config = config, replace(resolve_device(config), run_dir=None)
    set_float32_precision(config.precision)
    torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
    keep_freed_memory()
    memory = plan_memory(
        config,
        Replay.expected_bytes(config.replay_capacity, config.num_envs),
        network_spec(config, MAX_ACTIONS).count_parameters(),
    )
    device = torch.device(config.device)
    if device.type == "cuda":
        memory = place_replay(memory, free_bytes(device))
    check_memory(config, memory, device)
    files = RunDirectory(directory)
    _refuse_finished(config, files, resume)
    with files.claimed() if resume is None else files.locked():
        if resume is not None:
            _check_newest(resume, files)
        if make_backend is None:
            config, make_backend = _choose(wanted, config, make_agent, resume)
        run = Run(config, make_agent, files, make_backend, replay_on_host=memory.replay_on_host)
        try:
            if resume is None:
                files.create(to_yaml(run.config))
            notes = [describe_num_envs(config)] if is_auto(wanted.num_envs) else []
            if resume is not None:
                notes += _moved(run, resume)
            return _train_locked(run, memory, resume, notes, quiet=quiet)
        finally:
            run.env.close()


def _choose(
    wanted: TrainConfig, config: TrainConfig, make_agent: MakeAgent, resume: checkpoint.Checkpoint | None
) -> tuple[TrainConfig, MakeBackend]:
    """Return the configuration with the arithmetic that the run takes, and what makes its backend.

    Args:
        wanted: as the user gave it; what is ``auto`` there is open.
        config: the same, resolved for this machine.
        make_agent: see :func:`train`.
        resume: the checkpoint to go on from; another backend may take the place of its own if that is not there.
    """
    done = resume.agent_steps if resume is not None else 0
    as_before = resume is not None and config.backend == resume.config.backend
    choice = import_agent("backends.choice").choose(  # imported late: agents are above this package
        config,
        make_agent,
        precisions=precisions(wanted, config.device),
        updates=updates_owed(config, done + 1, config.frames // FRAME_SKIP),
    )
    return choice.applied(config), functools.partial(choice.make_backend, strict=not as_before)


def _moved(run: Run, resume: checkpoint.Checkpoint) -> list[str]:
    """Return what to say where the run was on another processor before: it goes on as it was."""
    before, now = resume.versions.get("processor"), processor(run.device)
    if before in (None, now):
        return []
    return [
        f"this run was on {before}, here is {now}: it goes on with {run.config.backend} in {run.config.precision}, and "
        "rounding may differ from here on; --backend auto --precision auto choose for this processor"
    ]


def _refuse_finished(config: TrainConfig, files: RunDirectory, resume: checkpoint.Checkpoint | None) -> None:
    frames = resume.agent_steps * FRAME_SKIP if resume else 0
    if resume and frames >= config.frames and resume.training["run"].get("evaluated_at") == resume.agent_steps:
        raise UsageError(f"{files.path} is finished at frame {frames:,}: raise --frames to continue it")


def _train_locked(
    run: Run, memory: MemoryPlan, resume: checkpoint.Checkpoint | None, notes: list[str], *, quiet: bool
) -> int:
    config, files, loop = run.config, run.directory, run.loop
    progress = Progress(config.frames, resume.agent_steps * FRAME_SKIP if resume else 0, quiet=quiet)
    dashboard: Dashboard | None = None
    try:
        with Signals() as signals:
            for note in notes:
                progress.say(note)
            _describe(run, memory, progress)
            if resume is None:
                run.action_log.create()
                loop.start()
            else:
                try:
                    _restore(run, resume, progress, signals)
                except _StoppedError:
                    progress.say(f"stopped while the replay buffer was restored; nothing changed in {files.path}")
                    return 128 + (signals.received or 0)
                files.cut(episodes=loop.frames, evaluations=run.evaluated_at * FRAME_SKIP)
                files.forget_closing_events()
                run.action_log.cut()
                checkpoint.settle(files.latest, resume.path)
                files.write_config(to_yaml(config))
                if config != resume.config:  # otherwise a kill before the next checkpoint would undo the change
                    run.save(files.latest)
            dashboard = Dashboard(files.path, resume_frames=loop.frames if resume else None)
            dashboard.describe(to_yaml(config))
            try:
                _train(run, dashboard, progress, signals)
            except NonFiniteLossError as error:
                evidence = run.save_evidence()
                kept = f" The minibatch is in {evidence}." if evidence else ""
                raise NonFiniteLossError(
                    f"{error} at frame {loop.frames:,}; the last good checkpoint is kept.{kept} The usual remedy is a "
                    "smaller --learning-rate."
                ) from None
            if signals.received is None:
                return 0
            progress.say(f"stopped at frame {loop.frames:,}; to resume: {command('train')} --resume {files.path}")
            return 128 + signals.received
    finally:
        progress.close()
        if dashboard is not None:
            dashboard.close()


def _check_newest(resume: checkpoint.Checkpoint, files: RunDirectory) -> None:
    """Refuse to resume from a checkpoint that another process replaced before this one had the lock.

    Raises:
        WnRlError: it did; what it wrote after that checkpoint would be lost.
    """
    now = checkpoint.load(files.path)
    if (now.path, now.agent_steps) != (resume.path, resume.agent_steps):
        raise WnRlError(f"{files.path} was written to by another process in the meantime: --resume it again")


class _StoppedError(Exception):
    """A signal arrived while the replay was being restored."""


def _restore(run: Run, saved: checkpoint.Checkpoint, progress: Progress, signals: Signals) -> None:
    if saved.notice is not None:
        progress.say(saved.notice)
    if saved.renamed:
        progress.say(f"a run of an earlier version: {saved.renamed}")
    started = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        if signals.received is not None:
            raise _StoppedError
        progress.restoring(done, total)

    run.restore(saved, on_progress)
    progress.say(
        f"replay buffer restored: {len(run.loop.replay):,} transitions in {duration(time.monotonic() - started)}; "
        f"resuming at frame {run.loop.frames:,}"
    )


def _describe(run: Run, memory: MemoryPlan, progress: Progress) -> None:
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
    replay, working = amount(run.loop.replay.nbytes), amount(memory.working_bytes + LIBRARY_BYTES)
    where = "memory" if config.device == "cpu" or memory.replay_on_host else "GPU memory"
    if memory.replay_on_host:
        progress.say(
            f"a replay of {replay} does not fit in GPU memory: it is kept in host memory, which is slower; "
            "a lower --replay-capacity keeps it on the GPU"
        )
    progress.say(f"memory: at most {replay} of {where} for the replay, about {working} for everything else")
    if config.device == "cpu" and config.frames >= LONG_ON_A_CPU:
        progress.say(
            f"this machine has no GPU, and {config.frames:,} frames take days on a CPU; --preset quick has "
            "results in an hour"
        )


def _train(run: Run, dashboard: Dashboard, progress: Progress, signals: Signals) -> None:
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
                loop.backend.measure_next_update()
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
        # The CSV files must never be behind the checkpoint: a resumed run cuts them to it.
        files.append(files.episodes, [(e.frames, e.episode_return, e.length) for e in unwritten], sync=True)
        unwritten.clear()
        run.earlier_seconds = time.monotonic() - started
        for path in paths:
            run.save(path)
        run.trim_action_log()
        dashboard.flush()
        saved_at, saved_time = loop.agent_steps, time.monotonic()

    while True:
        done = loop.frames >= config.frames
        passed = period_ended(config.evaluation_period, run.evaluated_at, loop.agent_steps)
        if signals.received is None and (passed or (done and not run.finished)):
            try:
                result = run.evaluate(lambda: signals.received is not None)
            except EvaluationInterrupted:
                continue
            if not passed:
                run.begin_closing()
                dashboard.begin_closing()
            run.evaluated_at = loop.agent_steps
            _record_evaluation(run, dashboard, progress, result)
            if done:
                if passed:
                    run.begin_closing()
                    dashboard.begin_closing()
                if run.logged_at != loop.agent_steps:
                    log()
            # The best one first: a run that is resumed from an older checkpoint writes it again.
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
            progress.say(f"measured {rate:,.0f} frames/s: {duration(left)} left, not counting evaluations")
        if period_ended(config.log_period, run.logged_at, loop.agent_steps):
            log()
        period = config.checkpoint_period
        by_steps = period > 0 and period_ended(period, saved_at, loop.agent_steps)
        if by_steps or time.monotonic() - saved_time >= config.checkpoint_seconds:
            save(files.latest)
    # A new run that is stopped before its first step needs a checkpoint, too.
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


def _record_evaluation(run: Run, dashboard: Dashboard, progress: Progress, result: EvaluationResult) -> None:
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
    """Return a wall time in a readable unit: ``40 s``, ``12 min``, ``3.5 h`` or ``2.1 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else math.nan
