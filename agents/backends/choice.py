"""What ``auto`` stands for: the backend and the precision that were timed to be the fastest for an agent, here.

A run chooses once, before its first step. Whoever compares several configurations chooses once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from wn_rl.atari.env import FULL_ACTION_SET, minimal_actions
from wn_rl.config import BackendName, TrainConfig
from wn_rl.machine import Precision
from wn_rl.replay import Replay
from wn_rl.training import Agent
from wn_rl.training.run import MakeAgent

from . import kind_of, make_backend, timing, timing_cache
from .interface import Backend
from .timing import Candidate, Measured

LOWERED_FOR = 1.15
"""So many times as many updates a second must a less exact precision bring to be taken."""
TIE = 1.03
"""Times that differ by less are equal, and the earlier of ``BACKENDS`` is taken: timing is no better than that."""
WORTH_TIMING = 20_000
"""Updates from which a run wins back the two seconds that timing takes."""

Measure = Callable[[TrainConfig, MakeAgent, int, Sequence[Precision]], Measured]
"""As :func:`agents.backends.timing.measure`."""


@dataclass(frozen=True)
class Choice:
    """A backend and a precision, and why.

    Attributes:
        backend: ``auto`` where nothing was timed and the first that supports the agent will do.
        precision: of the hidden layers.
        reason: why this backend, for the line that says what was taken; empty: as :func:`make_backend` says.
        note: to be added to that line.
    """

    backend: BackendName
    precision: Precision
    reason: str = ""
    note: str = ""

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with what was chosen."""
        return replace(config, backend=self.backend, precision=self.precision)

    def make_backend(self, agent: Agent, replay: Replay, *, strict: bool = True) -> Backend:
        """Return what :func:`agents.backends.make_backend` does for an agent with this choice, which says why."""
        # What nobody asked for by name may be replaced, should it not be there any more since it was timed.
        backend = make_backend(agent, replay, strict=strict and not self.reason)
        if self.reason and backend.name == self.backend:
            backend.reason = self.reason
        backend.reason += self.note
        return backend


def choose(
    config: TrainConfig,
    make_agent: MakeAgent,
    *,
    precisions: Sequence[Precision],
    updates: int,
    measure: Measure | None = None,
    cached: bool = True,
) -> Choice:
    """Return what a run takes where its configuration leaves the backend or the precision open.

    On a GPU, and for a run of fewer than :data:`WORTH_TIMING` updates, nothing is timed: then it is the first of
    ``precisions``, and the first of ``BACKENDS`` that supports the agent.

    Args:
        config: resolved for this machine; its ``backend`` is ``auto`` where it is open.
        make_agent: (configuration, number of actions, device) → agent.
        precisions: that may be taken, the most exact first, see :func:`wn_rl.machine.precisions`.
        updates: that the run still owes.
        measure: times the candidates; None: :func:`agents.backends.timing.measure`.
        cached: whether times that were taken before will do, and these are kept.
    """
    if config.backend != "auto":
        kind_of(config.backend)
    as_it_is = Choice(config.backend, precisions[0])
    if config.device != "cpu" or (config.backend != "auto" and len(precisions) == 1):
        return as_it_is
    if updates < WORTH_TIMING:
        stays = f" and {precisions[0]} stays" if len(precisions) > 1 else ""
        return replace(as_it_is, note=f"; nothing is timed for {updates:,} updates{stays}")
    measured, before = _measured(config, make_agent, precisions, measure, cached=cached)
    if not measured.candidates:
        failed = f"; nothing could be timed: {next(iter(measured.problems.values()))}" if measured.problems else ""
        return replace(as_it_is, note=failed)
    if not measured.seconds:
        (only,) = measured.candidates
        return replace(as_it_is, precision=only.precision)
    taken = decide(measured.seconds)
    when = "timed before" if before else f"timed in {measured.took:.1f} s"
    if measured.busy:
        when += " as CPU time of one thread, since other processes need the cores, and not kept"
    return Choice(taken.backend, taken.precision, f"{_why(taken, measured.seconds)}; {when}")


def choose_for_all(
    arms: Mapping[str, TrainConfig],
    make_agent: MakeAgent,
    *,
    precisions: Sequence[Precision],
    measure: Measure | None = None,
    cached: bool = True,
) -> Choice:
    """Return one choice for several configurations that will be compared: one arithmetic for all.

    Only what supports every arm may be taken, and it is what is taken for the arm that gains least by a less exact
    precision. Apply it with :meth:`Choice.applied`.

    Args:
        arms: by name, each resolved for the same machine.
        make_agent: see :func:`choose`.
        precisions: see :func:`choose`.
        measure: times the candidates of one arm.
        cached: see :func:`choose`.
    """
    assert arms
    first = next(iter(arms.values()))
    if first.device != "cpu" or (first.backend != "auto" and len(precisions) == 1):
        return Choice(first.backend, precisions[0])
    found = {
        name: _measured(config, make_agent, precisions, measure, cached=cached)[0] for name, config in arms.items()
    }
    common = [
        candidate
        for candidate in next(iter(found.values())).candidates
        if all(candidate in measured.candidates for measured in found.values())
    ]
    if not common:
        return Choice(first.backend, precisions[0])
    if len(common) == 1:
        return Choice(common[0].backend, common[0].precision, "the only one that supports all arms")
    seconds = {
        name: {candidate: measured.seconds[candidate] for candidate in common} for name, measured in found.items()
    }
    least = min(seconds, key=lambda name: gain(seconds[name]))
    taken = decide(seconds[least])
    why = _why(taken, seconds[least])
    return Choice(taken.backend, taken.precision, f"one for all of {len(arms)} arms: {why} with {least}")


def _measured(
    config: TrainConfig,
    make_agent: MakeAgent,
    precisions: Sequence[Precision],
    measure: Measure | None,
    *,
    cached: bool,
) -> tuple[Measured, bool]:
    """Return what is known of the candidates, and whether it was known before."""
    num_actions = FULL_ACTION_SET if config.full_action_set else minimal_actions(config.game)
    key = timing_cache.key_of(config, make_agent, num_actions, precisions) if cached else None
    if key is not None and (known := timing_cache.read(key)):
        return Measured(tuple(known), known, {}, 0.0), True
    measured = (measure or timing.measure)(config, make_agent, num_actions, precisions)
    if key is not None and measured.seconds and not measured.busy:
        timing_cache.write(key, measured.seconds)
    return measured, False


def decide(seconds: Mapping[Candidate, float]) -> Candidate:
    """Return the candidate to take, given the seconds of each per update, in the order of preference.

    The fastest of the most exact precision, unless a less exact one makes :data:`LOWERED_FOR` times as many updates;
    of one precision the first that is slower than the fastest by less than :data:`TIE`.
    """
    precision, *lower = _by_precision(seconds)
    for other in lower:
        if _fastest(seconds, precision) >= LOWERED_FOR * _fastest(seconds, other):
            precision = other
    limit = TIE * _fastest(seconds, precision)
    return next(entry for entry in seconds if entry.precision == precision and seconds[entry] < limit)


def gain(seconds: Mapping[Candidate, float]) -> float:
    """Return how many times as many updates the fastest less exact precision makes as the most exact one."""
    exact, *lower = _by_precision(seconds)
    return max((_fastest(seconds, exact) / _fastest(seconds, other) for other in lower), default=1.0)


def _by_precision(seconds: Mapping[Candidate, float]) -> list[Precision]:
    """Return the precisions of the candidates, the most exact first."""
    return [precision for precision in get_args(Precision) if any(entry.precision == precision for entry in seconds)]


def _fastest(seconds: Mapping[Candidate, float], precision: Precision) -> float:
    return min(took for entry, took in seconds.items() if entry.precision == precision)


def _why(taken: Candidate, seconds: Mapping[Candidate, float]) -> str:
    """Return in words why a candidate was taken, with the milliseconds of all."""
    exact, *lower = _by_precision(seconds)
    brings = gain(seconds) - 1.0
    stays = f", since {lower[-1]} gains only {brings:.1%}" if taken.precision == exact and brings > 0.0 else ""
    times = ", ".join(f"{entry} {1e3 * took:.2f}" for entry, took in sorted(seconds.items(), key=lambda item: item[1]))
    return f"the fastest in {taken.precision}{stays}; ms per update: {times}"
