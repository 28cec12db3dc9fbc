"""Backends: they do an agent's computations, with equal results, and one is chosen at the start of a run."""

from __future__ import annotations

from wn_rl.errors import UsageError
from wn_rl.replay import Replay
from wn_rl.training import Agent

from ..dqn import DQN
from .cpu_kernels.backend import CpuKernels
from .cuda_graphs import CudaGraphs
from .eager import Eager
from .interface import Backend as Backend

BACKENDS: tuple[type[Backend], ...] = (CudaGraphs, CpuKernels, Eager)
"""The order of preference: where nothing is timed, ``auto`` takes the first that supports the agent."""


def make_backend(agent: Agent, replay: Replay, *, strict: bool = True) -> Backend:
    """Return the backend that the agent's configuration asks for; ``auto``: the first that supports the agent.

    A run times those that do before it comes here, see :mod:`agents.backends.choice`.

    ``compile: off`` with ``auto`` means ``eager`` on a CPU.

    Args:
        agent: before its first update.
        replay: from which it will sample.
        strict: raise if the configured backend does not support the agent; otherwise use another one.

    Raises:
        UsageError: the configured backend does not support the agent.
    """
    _refuse_former_methods(agent)
    wanted = agent.config.backend
    problems: dict[str, str] = {}
    for kind in BACKENDS:
        if kind.name == wanted or wanted == "auto" or wanted in problems:
            problem = why_not(kind, agent, replay)
            if not problem:
                backend = kind(agent, replay)
                backend.reason = _reason(agent, kind, problems)
                return backend
            problems[kind.name] = problem
            if kind.name == wanted and strict:
                break
    raise UsageError(f"--backend {wanted}: {problems[wanted]}; --backend auto uses one that does")


def why_not(kind: type[Backend], agent: Agent, replay: Replay) -> str:
    """Return why this backend does not carry out the agent's work; an empty text if it may."""
    problem = kind.unsupported(agent, replay)
    if not problem and kind is CpuKernels and agent.config.backend != kind.name and agent.config.compile == "off":
        return "compile is off"
    return problem


FORMER = {
    "measured_loss": "loss",
    "_forward": "forward",
    "_compare": "td_loss_of",
    "work_of_update": "update",
    "counted": "count_updates",
    "update_several": "update",
    "stepper": "update",
}
"""Former methods of a DQN → the methods that replace them."""


def _refuse_former_methods(agent: Agent) -> None:
    """Refuse a subclass that overrides a former method, which would not be called.

    Raises:
        UsageError: it does.
    """
    for name, now in FORMER.items():
        if isinstance(agent, DQN) and hasattr(agent, name):
            raise UsageError(
                f"{type(agent).__name__} overrides {name}, which is no longer called: override {now} instead"
            )


def _reason(agent: Agent, taken: type[Backend], problems: dict[str, str]) -> str:
    wanted = agent.config.backend
    if wanted == taken.name:
        return "as asked for"
    # Why the device's own backend was not used, or the one that the run had before.
    own = "cuda_graphs" if agent.device.type == "cuda" else "cpu_kernels"
    missed = own if wanted == "auto" else wanted
    why = f"; not {missed}, since {problems[missed]}" if missed in problems else ""
    return f"{'the first that supports this agent' if taken is not Eager else 'it supports everything'}{why}"
