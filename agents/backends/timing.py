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
from wn_rl.machine import Precision, cores, cores_of_others
from wn_rl.replay import Replay
from wn_rl.training import Agent
from wn_rl.training.run import MakeAgent

from . import BACKENDS, why_not
from .eager import Eager
from .interface import Backend

SECONDS = 0.8
"""Wall time of the rounds in which the candidates are timed, in turn."""
MOST_ROUNDS = 20
"""Rounds after which more would change nothing."""
HOPELESS = 2.0
"""A candidate that takes so many times as long as the fastest for :data:`FIRST_UPDATES` single updates is out."""
FIRST_UPDATES = 2
STORED = 1024
"""Transitions in the synthetic replay, 7 MB."""
BLACK_ROWS = slice(40, 80)
"""Rows of a synthetic frame that are black, about half of it: all-zero blocks are skipped by the kernels, and 47% of
Breakout's are."""
INITIALIZED_FROM = 64
"""Observations for the data-dependent initialization."""
MOST_TOGETHER = 8
"""Updates that are asked for in one call, at most; more would only take longer."""
ROOM = 0.25
"""Cores that other processes may use beside the threads of this one without being noticed."""


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
        busy: whether other processes needed the cores, so that these are seconds of one thread's CPU time.
    """

    candidates: tuple[Candidate, ...]
    seconds: Mapping[Candidate, float]
    problems: Mapping[str, str]
    took: float
    busy: bool = False


def measure(config: TrainConfig, make_agent: MakeAgent, num_actions: int, precisions: Sequence[Precision]) -> Measured:
    """Time every backend that the configuration leaves open with each of ``precisions``.

    Only copies of the agents that ``make_agent`` returns are worked with. A candidate whose work fails, or whose agent
    cannot be copied, is none. While other processes need the cores, threads that wait for each other say nothing: then
    it is the CPU time of a single thread that counts.

    Args:
        config: resolved for this machine; ``backend`` names one or is ``auto``.
        make_agent: (configuration, number of actions, device) → agent; called once for each precision.
        num_actions: of the game.
        precisions: the most exact first.
    """
    started = time.perf_counter()
    busy = cores_of_others() + torch.get_num_threads() > cores() + ROOM
    with unchanged_process_state():
        if busy:
            torch.set_num_threads(1)
        clock = time.process_time if busy else time.perf_counter
        candidates, seconds, problems = _measured(config, make_agent, num_actions, precisions, clock)
    gc.collect()  # agents refer to themselves
    return Measured(candidates, seconds, problems, time.perf_counter() - started, busy)


def _measured(
    config: TrainConfig,
    make_agent: MakeAgent,
    num_actions: int,
    precisions: Sequence[Precision],
    clock: Callable[[], float],
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
    trials: dict[Candidate, Callable[[int], float]] = {}
    for candidate, kind, agent in found:
        trial = _trial(kind, agent, replay, clock)
        if isinstance(trial, str):
            problems[str(candidate)] = trial
        else:
            trials[candidate] = trial
    together = min(max(config.num_envs // config.update_period, 1), MOST_TOGETHER)
    seconds = best_times(trials, problems, together=together)
    return tuple(seconds), seconds, problems


def _trial(kind: type[Backend], agent: Agent, replay: Replay, clock: Callable[[], float]) -> Trial | str:
    """Return the trial of a backend on a copy of the agent, or why there can be none."""
    try:
        return Trial(kind, copy.deepcopy(agent), replay, clock)
    except Exception as error:  # noqa: BLE001 - an agent of a user's own may raise anything
        return one_line(error)[:200]


class Trial:
    """What is timed of one candidate: acting for all emulators, and updates."""

    def __init__(self, kind: type[Backend], agent: Agent, replay: Replay, clock: Callable[[], float]) -> None:
        """Prepare the agent, which nobody else uses, for updates.

        Args:
            kind: of the backend.
            agent: before its first update.
            replay: holds something.
            clock: in seconds.
        """
        config = agent.config
        if kind is Eager:  # torch.compile would take longer than all else together
            agent.config = replace(config, compile="off")
        self._backend = kind(agent, replay)
        self._backend.initialize(replay.sample(INITIALIZED_FROM).observations)
        self._device = agent.device
        self._clock = clock
        self._epsilon = np.full(config.num_envs, 0.1, np.float32)
        self._vector_steps_per_update = config.update_period / config.num_envs

    def __call__(self, updates: int) -> float:
        """Return the seconds of an update with its share of acting, where so many are asked for in a call."""
        started = self._now()
        self._backend.act(self._epsilon)
        acted = self._now()
        self._backend.update(updates)
        updated = self._now()
        return (updated - acted) / updates + (acted - started) * self._vector_steps_per_update

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def best_times(
    trials: Mapping[Candidate, Callable[[int], float]],
    problems: dict[str, str],
    *,
    together: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Candidate, float]:
    """Return the least that each trial returned, over rounds in which each is called once.

    The least, because whatever else the machine does only ever adds to a time; in turn, so that a busy moment meets
    all of them. Each is called once to warm up, then a few times for single updates, which shows what is hopeless.

    Args:
        trials: given how many updates to make in a call, each returns the seconds of one.
        problems: a trial that raises is left out, and why is noted here.
        together: updates that the loop asks for in a call.
        clock: of the wall, in seconds: no round begins that would end after :data:`SECONDS`.
    """

    def call(candidate: Candidate, updates: int) -> float:
        """Return the seconds; infinite where the trial failed."""
        try:
            took = trials[candidate](updates)
            if not (math.isfinite(took) and took > 0.0):
                raise ValueError(f"timed as {took}")
        except Exception as error:  # noqa: BLE001 - an agent of a user's own may raise anything
            problems[str(candidate)] = one_line(error)[:200]
            return math.inf
        return took

    warm = [candidate for candidate in trials if call(candidate, 1) < math.inf]
    singles = {candidate: [call(candidate, 1) for _ in range(FIRST_UPDATES)] for candidate in warm}
    best = {candidate: min(times) for candidate, times in singles.items() if max(times) < math.inf}
    running = [candidate for candidate in best if best[candidate] <= HOPELESS * min(best.values())]
    rounds: dict[Candidate, list[float]] = {candidate: [] for candidate in running}
    started = clock()
    for turn in range(1, MOST_ROUNDS + 1):
        for candidate in running if turn % 2 else reversed(running):
            rounds[candidate].append(call(candidate, together))
        if (clock() - started) * (turn + 1) / turn > SECONDS:
            break
    for candidate, times in rounds.items():  # not compared with single updates, which are slower
        if max(times) < math.inf:
            best[candidate] = min(times)
        else:
            del best[candidate]
    return best


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
