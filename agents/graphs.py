"""Acting and updating on a GPU: recorded once as CUDA graphs and done again from then on.

An update of this network is some hundred small kernels, and starting each from Python takes longer than running it. A
CUDA graph starts all of them at once. What is recorded must find everything where it was: weights, moments, replay and
random generators keep their place, whatever changes from step to step lies on the device, and nothing is read back.

The pieces of work are ordinary functions. :class:`Repeated` runs them as they are where there is no recorder, so that a
CPU can test everything but CUDA's own recording.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.config import TrainConfig
from wn_rl.errors import NonFiniteLossError, one_line
from wn_rl.host_replay import HostReplay
from wn_rl.networks import QNetwork
from wn_rl.replay import Minibatch, Replay
from wn_rl.staging import Readback, Staging

WARM_UPS = 3
"""Times that a piece of work is done as it is before it is recorded: libraries choose and allocate in the first ones
what must not be chosen or allocated while recording. torch's documentation takes as many."""

Work = Callable[[], None]
_FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording failed: torch's allocator goes on asking them whether memory is theirs."""


class Recorder(Protocol):
    """Records device work."""

    def warm_up(self, work: Work) -> None:
        """Do the work where it will be recorded."""

    def record(self, work: Work, generators: Sequence[torch.Generator]) -> Work:
        """Return what does the work again, without doing it now.

        Args:
            work: gives kernels to the device and reads nothing back.
            generators: that it draws from; each goes on from wherever it is at every repetition.

        Raises:
            RuntimeError: it cannot be recorded. Nothing was done and everything is as it was before.
        """


class CudaRecorder:
    """Records work of the current GPU as CUDA graphs.

    Warm-ups and recordings share one stream that is not the default one: recording is not allowed there, and handles
    that libraries make for each stream are then ready.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Work) -> None:
        """Do the work on the recording stream, in order with what comes before and after on the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work, generators: Sequence[torch.Generator]) -> Work:
        """Return the replay of a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        touched = [*generators, *torch.cuda.default_generators]  # torch registers the default one by itself
        states = [generator.get_state() for generator in touched]
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                work()
        except Exception:
            # torch leaves its stream current when the end of a recording fails, and a generator waiting for that end.
            _FAILED.append(graph)
            torch.cuda.set_stream(current)
            for generator, state in zip(touched, states, strict=True):
                fresh = torch.Generator(generator.device)
                fresh.set_state(state)
                generator.graphsafe_set_state(fresh)
            raise
        replay: Work = graph.replay
        return replay


class Repeated:
    """A piece of device work that is done many times: a few times as it is, then recorded, then as recorded."""

    def __init__(
        self, name: str, work: Work, recorder: Recorder | None, generators: Sequence[torch.Generator] = ()
    ) -> None:
        """Prepare; the first calls do the work as it is.

        Args:
            name: for the message if it cannot be recorded.
            work: gives kernels to the device and reads nothing back; what it leaves is in tensors that keep their
                place.
            recorder: None: always do the work as it is.
            generators: that it draws from.
        """
        self.name = name
        self._work = work
        self._recorder = recorder
        self._generators = generators
        self._warm_ups = 0
        self._again: Work | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next call does what was recorded."""
        return self._again is not None

    def __call__(self) -> None:
        """Do the work in the quickest way that there is by now."""
        if self._again is None and self._recorder is not None:
            if self._warm_ups < WARM_UPS:
                self._warm_ups += 1
                self._recorder.warm_up(self._work)
                return
            self._record(self._recorder)
        (self._again or self._work)()

    def as_it_is(self) -> None:
        """Do the work without what was recorded."""
        self._work()

    def _record(self, recorder: Recorder) -> None:
        try:
            self._again = recorder.record(self._work, self._generators)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the first thing that went wrong; the rest follows from it
                cause = cause.__context__
            print(
                f"{self.name} cannot be recorded as a CUDA graph and runs slower: {one_line(cause)[:200]}",
                file=sys.stderr,
            )
            self._recorder = None


class StaticAgent(Protocol):
    """What :class:`GraphStepper` needs of an agent; a ``static`` :class:`agents.dqn.DQN` is one."""

    config: TrainConfig
    device: torch.device
    generator: torch.Generator
    q_network: QNetwork
    updates: int

    @property
    def watching(self) -> bool:
        """Whether the next update is to be measured, for which the host reads from the device."""

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions)."""

    def epsilon_greedy(self, q_values: Tensor, epsilon: Tensor) -> Tensor:
        """Return actions, int64 (B,), drawn with the agent's generator."""

    def has_offending(self) -> Tensor:
        """Return on the device whether the loss of an update was not finite."""

    def work_of_update(self, batch: Minibatch) -> None:
        """Do what of an update the device does."""

    def counted(self, work: Work) -> None:
        """Do ``work``, an update's, and count it."""


class GraphStepper:
    """Acts and updates for a :class:`agents.dqn.DQN` that is ``static``, with one wait per vector step: the actions.

    See :class:`wn_rl.stepping.Stepper`. A loss that is not finite is noted on the device and comes with the next
    actions.
    """

    def __init__(self, agent: StaticAgent, replay: Replay, recorder: Recorder | None) -> None:
        """Join agent and replay.

        Args:
            agent: of which every tensor keeps its place.
            replay: staged, or a :class:`HostReplay`.
            recorder: of the agent's device; None: nothing is recorded.
        """
        device, n = agent.device, replay.num_envs
        self.agent = agent
        self.replay = replay
        self._epsilon = Staging({"epsilon": (torch.float32, (n,))}, device)
        self._random_play = torch.zeros(n, agent.q_network.spec.num_actions, device=device)
        # The actions and, last, whether an update's loss was not finite.
        self._outcome = torch.zeros(n + 1, dtype=torch.int64, device=device)
        self._readback = Readback(n + 1, device)
        self._observations: Tensor | None = None
        self._batch: Minibatch | None = None
        drawn = [replay.generator] if replay.resident else []
        self.acting = Repeated("acting", self._act, recorder, [agent.generator])
        self.updating = Repeated("the update", self._update, recorder, drawn)

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observations, shape (N,), with ε of each; waits for them.

        Raises:
            NonFiniteLossError: the loss of an update before this call was not finite.
        """
        self._epsilon.begin()["epsilon"][:] = epsilon
        self._epsilon.send()
        if epsilon.min() >= 1.0:  # the warm-up needs no Q-values
            self._decide(self._random_play)
        else:
            if isinstance(self.replay, HostReplay):
                self._observations = self.replay.stage_observations()
            self.acting()
        outcome = self._readback.read(self._outcome)
        if outcome[-1]:
            raise NonFiniteLossError(f"the loss of one of the first {self.agent.updates:,} updates is not finite")
        return outcome[:-1]

    def update(self, count: int = 1) -> None:
        """Make ``count`` updates; waits for nothing unless the agent was asked to watch one."""
        for _ in range(count):
            if isinstance(self.replay, HostReplay):
                self._batch = self.replay.stage_minibatch(self.agent.config.batch_size)
            self.agent.counted(self.updating.as_it_is if self.agent.watching else self.updating)

    def _act(self) -> None:
        observations = self.replay.observations() if self._observations is None else self._observations
        self._decide(self.agent.q_values(observations))

    @torch.no_grad()
    def _decide(self, q_values: Tensor) -> None:
        actions = self.agent.epsilon_greedy(q_values, self._epsilon.device["epsilon"])
        self._outcome[:-1].copy_(actions)
        self._outcome[-1:].copy_(self.agent.has_offending())

    def _update(self) -> None:
        batch = self.replay.sample(self.agent.config.batch_size) if self._batch is None else self._batch
        self.agent.work_of_update(batch)
