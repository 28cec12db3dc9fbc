"""Backends: they do an agent's computations, with equal results, and one is chosen at the start of a run."""

from __future__ import annotations

from wn_rl.errors import UsageError, WnRlError, closest, one_line
from wn_rl.replay import Replay
from wn_rl.training import Agent

from ..dqn import DQN
from .cpu_kernels.backend import CpuKernels
from .cuda_graphs import CudaGraphs
from .eager import Eager
from .interface import REGISTRY
from .interface import Backend as Backend
from .interface import register as register

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
    kinds = BACKENDS if wanted == "auto" else (kind_of(wanted), *BACKENDS)
    problems: dict[str, str] = {}
    for kind in kinds:
        if kind.name in problems:
            continue
        problem = why_not(kind, agent, replay)
        if not problem:
            backend = kind(agent, replay)
            backend.reason = _reason(agent, kind, problems)
            return backend
        problems[kind.name] = problem
        if kind.name == kinds[0].name and wanted != "auto" and strict:
            break
    raise UsageError(f"--backend {wanted}: {problems[kinds[0].name]}; --backend auto takes one that can")


def kind_of(name: str) -> type[Backend]:
    """Return the backend called ``name``, or registered anywhere and called ``module:Name``. Imports nothing.

    Raises:
        UsageError: there is none.
        WnRlError: the name is that of somebody's own backend, whose module is not imported.
    """
    try:
        return REGISTRY.get(name)
    except KeyError:
        if ":" in name:
            raise WnRlError(
                f"the backend '{name}' is user-defined and is not imported from a file: add --backend {name}"
            ) from None
        names = ("auto", *REGISTRY.entries)
        raise UsageError(
            f"unknown backend '{name}'.{closest(name, names)} There are: {', '.join(names)}; if it is your own, give "
            "--backend YOUR_MODULE:ITS_CLASS"
        ) from None


def load(reference: str) -> type[Backend]:
    """Import the module of ``module:Name``, so that the backend in it is registered, and return it.

    It runs the module's code: use it on what a person typed, never on what stands in a file.

    Raises:
        UsageError: there is no such module or class.
    """
    try:
        return REGISTRY.load(reference)
    except ValueError as error:
        raise UsageError(f"--backend {reference}: {one_line(error)}") from None


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
    wanted = agent.config.backend if agent.config.backend == "auto" else kind_of(agent.config.backend).name
    if wanted == taken.name:
        return "as asked for"
    # Why the device's own backend was not used, or the one that the run had before.
    own = "cuda_graphs" if agent.device.type == "cuda" else "cpu_kernels"
    missed = own if wanted == "auto" else wanted
    why = f"; not {missed}, since {problems[missed]}" if missed in problems else ""
    return f"{'the first that supports this agent' if taken is not Eager else 'it supports everything'}{why}"
