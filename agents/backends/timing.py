"""How long an agent's work takes with each backend and precision, on synthetic frames and copies of the agent.

Nothing here belongs to a run: it draws from generators of its own, steps no emulator, and is freed afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from wn_rl.config import BackendName, TrainConfig
from wn_rl.errors import one_line
from wn_rl.machine import Precision
from wn_rl.replay import Replay
from wn_rl.training import Agent
from wn_rl.training.run import MakeAgent

from . import BACKENDS, why_not
from .eager import Eager
from .interface import Backend

SECONDS = 1.0
"""Wall time in which all candidates are timed, after one warm-up of each."""
MOST_ROUNDS = 20
"""Rounds after which more would change nothing."""
HOPELESS = 1.6
"""A candidate that takes so many times as long as the fastest after :data:`FIRST_ROUNDS` is timed no more."""
FIRST_ROUNDS = 2
STORED = 1024
"""Transitions in the synthetic replay, 7 MB."""
BLACK_ROWS = slice(40, 80)
"""Rows of a synthetic frame that are black, about half of it: all-zero blocks are skipped by the kernels, and 47% of
Breakout's are."""
INITIALIZED_FROM = 64
"""Observations for the data-dependent initialization."""
MOST_TOGETHER = 8
"""Updates that are asked for in one call, at most; more would only take longer."""


@dataclass(frozen=True)
class Candidate:
    """A backend with the precision in which it computes."""

    backend: BackendName
    precision: Precision

    def __str__(self) -> str:
        """Return both names."""
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Measured:
    """What was found out about the candidates.

    Attributes:
        candidates: that support the agent, in the order of preference: the more exact precision first, then the order
            of ``BACKENDS``.
        seconds: per update, with its share of acting; empty where there is but one candidate.
        problems: why other candidates are none, by name.
        took: wall seconds, the building of the agents included.
    """

    candidates: tuple[Candidate, ...]
    seconds: Mapping[Candidate, float]
    problems: Mapping[str, str]
    took: float


def measure(config: TrainConfig, make_agent: MakeAgent, num_actions: int, precisions: Sequence[Precision]) -> Measured:
    """Time every backend that the configuration leaves open with each of ``precisions``.

    Only copies of the agents that ``make_agent`` returns are worked with. A candidate whose work fails, or whose agent
    cannot be copied, is none.

    Args:
        config: resolved for this machine; ``backend`` names one or is ``auto``.
        make_agent: (configuration, number of actions, device) → agent; called once for each precision.
        num_actions: of the game.
        precisions: the most exact first.
    """
    started = time.perf_counter()
    with unchanged_process_state():
        candidates, seconds, problems = _measured(config, make_agent, num_actions, precisions)
    gc.collect()  # agents refer to themselves
    return Measured(candidates, seconds, problems, time.perf_counter() - started)


def _measured(
    config: TrainConfig, make_agent: MakeAgent, num_actions: int, precisions: Sequence[Precision]
) -> tuple[tuple[Candidate, ...], dict[Candidate, float], dict[str, str]]:
    replay = synthetic_replay(config.num_envs, num_actions)
    problems: dict[str, str] = {}
    found: list[tuple[Candidate, type[Backend], Agent]] = []
    for precision in precisions:
        agent = make_agent(replace(config, precision=precision), num_actions, torch.device(config.device))
        for kind in BACKENDS:
            if config.backend not in ("auto", kind.name):
                continue
            candidate = Candidate(kind.name, precision)
            problem = why_not(kind, agent, replay)
            if problem:
                problems[str(candidate)] = problem
            else:
                found.append((candidate, kind, agent))
    if len(found) <= 1:
        return tuple(candidate for candidate, _, _ in found), {}, problems
    trials: dict[Candidate, Callable[[], float]] = {}
    for candidate, kind, agent in found:
        trial = _trial(kind, agent, replay)
        if isinstance(trial, str):
            problems[str(candidate)] = trial
        else:
            trials[candidate] = trial
    seconds = best_times(trials, problems)
    return tuple(seconds), seconds, problems


def _trial(kind: type[Backend], agent: Agent, replay: Replay) -> Trial | str:
    """Return the trial of a backend on a copy of the agent, or why there can be none."""
    try:
        return Trial(kind, copy.deepcopy(agent), replay)
    except Exception as error:  # noqa: BLE001 - an agent of a user's own may raise anything
        return one_line(error)[:200]


class Trial:
    """What is timed of one candidate: acting for all emulators, and the updates that one vector step owes."""

    def __init__(self, kind: type[Backend], agent: Agent, replay: Replay) -> None:
        """Prepare the agent, which nobody else uses, for updates.

        Args:
            kind: of the backend.
            agent: before its first update.
            replay: holds something.
        """
        config = agent.config
        if kind is Eager:  # torch.compile would take longer than all else together
            agent.config = replace(config, compile="off")
        self._backend = kind(agent, replay)
        self._backend.initialize(replay.sample(INITIALIZED_FROM).observations)
        self._device = agent.device
        self._epsilon = np.full(config.num_envs, 0.1, np.float32)
        self._updates = min(max(config.num_envs // config.update_period, 1), MOST_TOGETHER)
        self._vector_steps_per_update = config.update_period / config.num_envs

    def __call__(self) -> float:
        """Return the seconds of an update with its share of acting."""
        started = self._now()
        self._backend.act(self._epsilon)
        acted = self._now()
        self._backend.update(self._updates)
        updated = self._now()
        # A policy that hardly learns would be all acting, which then decides.
        return (updated - acted) / self._updates + (acted - started) * self._vector_steps_per_update

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def best_times(
    trials: Mapping[Candidate, Callable[[], float]],
    problems: dict[str, str],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Candidate, float]:
    """Return the least that each trial returned, over rounds in which each is called once.

    The least, because whatever else the machine does only ever adds to a time; in turn, so that a busy moment meets
    all of them.

    Args:
        trials: each returns the seconds of its work, and is called once before to warm up.
        problems: a trial that raises is left out, and why is noted here.
        seconds: no round begins that would end after so long.
        clock: in seconds.
    """
    best: dict[Candidate, float] = {}

    def call(candidate: Candidate) -> float | None:
        try:
            took = trials[candidate]()
            if not (math.isfinite(took) and took > 0.0):
                raise ValueError(f"timed as {took}")
        except Exception as error:  # noqa: BLE001 - an agent of a user's own may raise anything
            problems[str(candidate)] = one_line(error)[:200]
            best.pop(candidate, None)
            return None
        return took

    running = [candidate for candidate in trials if call(candidate) is not None]
    started = clock()
    for turn in range(1, MOST_ROUNDS + 1):
        for candidate in running if turn % 2 else reversed(running):
            took = call(candidate)
            if took is not None:
                best[candidate] = min(took, best.get(candidate, math.inf))
        running = [candidate for candidate in running if candidate in best]
        if turn == FIRST_ROUNDS and best:
            limit = HOPELESS * min(best.values())
            running = [candidate for candidate in running if best[candidate] <= limit]
        if (clock() - started) * (turn + 1) / turn > seconds:
            break
    return {candidate: best[candidate] for candidate in trials if candidate in best}


def synthetic_replay(num_envs: int, num_actions: int) -> Replay:
    """Return a replay of random frames, about half of each black, and random actions, on the CPU."""
    generator = np.random.default_rng(0)
    capacity = max(STORED, 2 * num_envs)
    replay = Replay(capacity, num_envs)
    none = np.zeros(num_envs, bool)

    def frames() -> np.ndarray:
        made = generator.integers(1, 256, (num_envs, 84, 84), np.uint8)
        made[:, BLACK_ROWS] = 0
        return made

    replay.start(frames())
    for _ in range(capacity // num_envs):
        actions = generator.integers(num_actions, size=num_envs)
        replay.add(actions, generator.integers(-1, 2, num_envs), none, frames(), none)
    return replay


@contextlib.contextmanager
def unchanged_process_state() -> Iterator[None]:
    """Leave the process's own random generators and torch's number of threads as they were."""
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
