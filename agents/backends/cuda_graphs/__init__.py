"""Acting and updates on a GPU, captured once as CUDA graphs and replayed from then on.

An update of this network is about a hundred small kernels, and launching each from Python takes longer than running it.
A CUDA graph launches all of them at once. It depends on fixed addresses: weights, moments, replay and random generators
stay where they are, values that change from step to step are read on the device, and nothing is copied back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.errors import NonFiniteLossError, one_line
from wn_rl.replay import Minibatch, Replay
from wn_rl.replay.host import HostReplay
from wn_rl.replay.pinned_transfer import Readback, Staging
from wn_rl.training import Agent

from ...dqn import DQN
from ..interface import Backend, register, subclass_problem
from .flat_optimizer import FlatOptimizer
from .recording import CudaRecorder, Recorder, Repeated
from .torch_compile import CompiledLoss

REPLACED = ("update", "act", "epsilon_greedy", "copy_target", "state_dict", "load_state_dict")
"""Methods of an agent that this backend replaces; the other methods that it calls are captured."""


@register("cuda_graphs")
class CudaGraphs(Backend):
    """Acts and updates with one synchronization per vector step, for the actions.

    The agent gets a :class:`FlatOptimizer`. A loss that is not finite is recorded on the device and read with the next
    actions. With ``compile: on`` torch.compile compiles the loss, its gradient and the optimizer's step.
    """

    agent: DQN

    def __init__(
        self, agent: Agent, replay: Replay, *, recorder: Recorder | Literal["device"] | None = "device"
    ) -> None:
        """Give every tensor of an update a fixed address.

        Args:
            agent: a DQN before its first update.
            replay: staged, or a :class:`HostReplay`.
            recorder: captures work on the agent's device, a GPU; None: nothing is captured.
        """
        super().__init__(agent, replay)
        assert isinstance(agent, DQN)
        device, n, config = agent.device, replay.num_envs, agent.config
        if recorder == "device":
            recorder = CudaRecorder(device) if device.type == "cuda" else None
        agent.optimizer = self.optimizer = FlatOptimizer.of(config, agent.q_network.parameters())
        agent.target.keep_addresses()
        agent.finite.reads_back = False
        # None until the first update has shown whether it can be compiled.
        self._loss_of: Callable[[Minibatch], Tensor] | None = None if config.compile == "on" else agent.loss
        self.detail = "loss and step compiled by torch.compile" if config.compile == "on" else ""
        self._epsilon = Staging({"epsilon": (torch.float32, (n,))}, device)
        self._random_play = torch.zeros(n, agent.q_network.spec.num_actions, device=device)
        # The actions, and last whether an update's loss was not finite.
        self._outcome = torch.zeros(n + 1, dtype=torch.int64, device=device)
        self._readback = Readback(n + 1, device)
        self._observations: Tensor | None = None
        self._batch: Minibatch | None = None
        drawn = [replay.generator] if replay.resident else []
        self.acting = Repeated("acting", self._act, recorder, [agent.generator])
        self.updating = Repeated("the update", self._update, recorder, drawn)

    @classmethod
    def unsupported(cls, agent: Agent, replay: Replay) -> str:
        """Return why the agent is not supported: no GPU, or overridden methods; an empty text if it is."""
        if agent.device.type != "cuda":
            return f"the network is on {agent.device.type}, not on a CUDA GPU"
        return subclass_problem(agent, DQN, REPLACED)

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions for the newest observations, shape (N,), with ε of each; waits for the device.

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
            raise NonFiniteLossError(f"the loss of one of the first {self.updates:,} updates is not finite")
        return outcome[:-1]

    def make_updates(self, count: int) -> None:
        """Make ``count`` updates, asynchronously."""
        for _ in range(count):
            self._stage()
            self.updating()
            self._count()

    def measured_update(self) -> None:
        """Make one update without the CUDA graph."""
        self._stage()
        self.updating.run_directly()
        self._count()

    def _stage(self) -> None:
        if isinstance(self.replay, HostReplay):
            self._batch = self.replay.stage_minibatch(self.agent.config.batch_size)

    def _count(self) -> None:
        self.optimizer.show_gradients()
        self.agent.count_updates(1)

    def _act(self) -> None:
        observations = self.replay.observations() if self._observations is None else self._observations
        self._decide(self.agent.q_values(observations))

    @torch.no_grad()
    def _decide(self, q_values: Tensor) -> None:
        actions = self.agent.epsilon_greedy(q_values, self._epsilon.device["epsilon"])
        self._outcome[:-1].copy_(actions)
        self._outcome[-1:].copy_(self.agent.finite.on_device())

    def _update(self) -> None:
        self.update_on(self.replay.sample(self.agent.config.batch_size) if self._batch is None else self._batch)

    def update_on(self, batch: Minibatch) -> None:
        """Do the device's part of an update on ``batch``; nothing is counted."""
        if self._loss_of is None:
            self._compile(batch)
        else:
            self._step(batch, self._loss_of)

    def _step(self, batch: Minibatch, loss_of: Callable[[Minibatch], Tensor]) -> None:
        with self.agent.training_mode():
            self.optimizer.minimize(loss_of(batch))

    def _compile(self, batch: Minibatch) -> None:
        """Make the first update with torch.compile; if that fails, make it and all others without."""
        print("compiling the update (once per run)", file=sys.stderr)
        agent = self.agent
        loss_of: Callable[[Minibatch], Tensor] = CompiledLoss(agent.loss)
        weights, state = copy.deepcopy(agent.q_network.state_dict()), copy.deepcopy(agent.state_dict())
        offending = agent.finite.offending.clone()
        try:
            self.optimizer.compile()
            self._step(batch, loss_of)
        except Exception as error:  # noqa: BLE001 - torch.compile's are of many kinds; what is wrong otherwise comes again below
            print(f"the update cannot be compiled and runs slower: {one_line(error)[:200]}", file=sys.stderr)
            self.optimizer.compile(False)
            agent.load_state_dict(weights, state)
            agent.finite.offending.copy_(offending)
            loss_of = agent.loss
            self._step(batch, loss_of)
        self._loss_of = loss_of
