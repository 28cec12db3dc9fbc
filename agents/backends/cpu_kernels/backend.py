"""The kernels as a backend: what they support, and an agent's work carried out by them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.networks import QNetwork
from wn_rl.parameterizations import fold
from wn_rl.replay import LazyMinibatch, Minibatch, Replay
from wn_rl.training import Agent

from ...dqn import DQN
from ...optimizers import make_optimizer
from ...target_network import TargetNetwork
from .. import interface
from . import layouts, loader, optimizers
from .kernel_network import KernelNetwork
from .output_normalization import unsupported as normalization_problem
from .packed_network import PackedNetwork, PackedWeights
from .packed_network import unsupported as network_problem
from .workspace import TDLoss

REPLACED = ("q_values", "forward", "act", "copy_target", "update", "training_mode", "loss", "td_loss", "count_updates")
"""Methods that the kernels replace or rely on: an agent with its own takes another backend."""
LOSS = ("td_loss_of", "reduce")
"""The loss given both networks' Q-values: an agent's own is computed by torch between the kernels' two passes."""


@interface.register("cpu_kernels")
class CpuKernels(interface.Backend):
    """Acts and updates by C kernels on packed copies of the weights.

    Where the kernels have the processor's vectors (``csrc/simd.h``) the updates that a vector step owes are one call,
    from the minibatches' indices to the next weights; an agent's own :meth:`~agents.dqn.DQN.td_loss_of` is computed by
    torch in between.
    """

    agent: DQN

    def __init__(self, agent: Agent, replay: Replay) -> None:
        """Pack the weights and give the agent an optimizer whose step is a kernel."""
        super().__init__(agent, replay)
        assert isinstance(agent, DQN)
        config, library, network = agent.config, loader.load(), agent.q_network
        assert not isinstance(library, str)
        assert isinstance(network, QNetwork)
        kind = PackedNetwork if layouts.unsupported(network, library, agent.precision) else KernelNetwork
        self.network = kind(network, library, precision=agent.precision)
        self.optimizer = optimizers.FusedOptimizer.like(agent.optimizer, self.network)
        agent.optimizer = self.optimizer
        mean = config.loss_reduction != "sum"
        self._loss = TDLoss(config.gamma, config.reward_clip, mean, agent.statistics.sums)
        self._torch_loss = bool(interface.overridden(agent, DQN, LOSS))
        self._target: tuple[int, PackedWeights] | None = None
        whole = isinstance(self.network, KernelNetwork)
        computed = bool(self.network.computed_from)
        self._one_call = whole and not self._torch_loss and not computed
        parts = {"loss": self._torch_loss, "weights": computed, "products": not whole}
        by_torch = " and ".join(name for name, is_torchs in parts.items() if is_torchs)
        on_tiles = isinstance(self.network, KernelNetwork) and self.network.shape.tiles
        details = (f"{by_torch} by torch" if by_torch else "", "products by the tile unit" if on_tiles else "")
        self.detail = ", ".join(filter(None, details))

    @classmethod
    def unsupported(cls, agent: Agent, replay: Replay) -> str:
        """Return why the kernels cannot carry out the work of ``agent``; an empty text if they can."""
        del replay
        if agent.device.type != "cpu":
            return f"the network is on {agent.device.type}"
        if problem := interface.subclass_problem(agent, DQN, REPLACED):
            return problem
        assert isinstance(agent, DQN)
        expected = make_optimizer(agent.config, agent.q_network.parameters())
        if problem := optimizers.unsupported(agent.optimizer, expected):
            return problem
        for network in (agent.q_network, agent.target_network):
            if type(network) is not QNetwork:
                return f"the network is a {type(network).__name__}, and the kernels know nature (QNetwork) alone"
        if type(agent.target) is not TargetNetwork:
            return f"the target is a {type(agent.target).__name__}"
        assert isinstance(agent.q_network, QNetwork)
        if not agent.parameterization.batch_independent:
            if agent.config.joint_batches:
                return "joint_batches is on"
            if agent.config.target_statistics != "running":
                return "the target network takes the statistics of the minibatch"
        problem = network_problem(agent.q_network) or normalization_problem(agent.q_network, agent.config.batch_size)
        if problem:
            return problem
        library = loader.load()
        return library if isinstance(library, str) else ""

    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations, (B, 4, 84, 84)."""
        return self.network.q_values(observations)

    def act(self, epsilon: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return ε-greedy actions, shape (N,)."""
        agent = self.agent
        if epsilon.min() >= 1.0:  # random play needs no Q-values
            q_values = torch.zeros(len(epsilon), agent.q_network.spec.num_actions)
        else:
            q_values = self.q_values(self.replay.observations())
        actions: NDArray[np.int64] = agent.epsilon_greedy(q_values, torch.from_numpy(epsilon)).numpy()
        return actions

    def make_updates(self, count: int) -> None:
        """Make ``count`` updates, where possible in one call; they draw what one by one would draw."""
        size = self.agent.config.batch_size
        if self._one_call and type(self.replay) is Replay:
            self.update_on(LazyMinibatch(self.replay.storage, self.replay.sample_indices(count * size)), count)
            return
        for _ in range(count):
            self.update_on(self.replay.sample(size))

    def update_on(self, batch: Minibatch, count: int = 1) -> None:
        """Make ``count`` updates on B transitions each, and count them.

        Args:
            batch: count · B transitions; drawn ones at whose fields nobody has looked if there is more than one update.
            count: at least 1; 1 where the loss is torch's.

        Raises:
            NonFiniteLossError: the loss of an update is not finite; those before it were made.
            IndexError: a transition or an action does not exist; no update was made.
        """
        if self.network.computed_from:
            assert count == 1
            with self.agent.training_mode():
                with self.agent.autocast():
                    self.network.refresh_for_training()
                self._update(batch, count)
                self.network.backward_computed()
                self.optimizer.step_computed()
        else:
            self.network.refresh_for_training()
            self._update(batch, count)

    def _update(self, batch: Minibatch, count: int) -> None:
        """Make the updates with the weights as they are packed."""
        if self._torch_loss or not isinstance(self.network, KernelNetwork):
            assert count == 1
            self._update_with_loss_by_torch(batch)
            self.agent.count_updates(1)
            return
        steps = self.optimizer.next_steps(count)
        made, loss = self.network.update(self._packed_target(), batch, self._loss, steps)
        self.optimizer.count_steps(steps, made)
        self.agent.count_updates(made)
        if made < count and batch.indices is not None:
            self.agent.finite.refuse(loss, batch.indices.view(count, -1)[made])

    def _update_with_loss_by_torch(self, batch: Minibatch) -> None:
        """Make one update: both forward passes, torch's loss of the Q-values, the backward pass and the step."""
        self.network.prepare_training_pass()
        with torch.no_grad():
            next_q_values, q_values, saved = self.network.forward_both(self._packed_target(), batch)
        q_values.requires_grad_()
        loss = self.agent.reduce(batch, *self.agent.td_loss_of(batch, q_values, next_q_values))
        (gradient,) = torch.autograd.grad(loss, q_values)
        self.network.backward(saved, gradient)
        self.optimizer.step()

    def _packed_target(self) -> PackedWeights:
        """Return the target network's packed weights."""
        target = self.agent.target
        if self._target is None or self._target[0] != target.copies:
            assert isinstance(target.network, QNetwork)
            network = copy.deepcopy(target.network)
            self._target = (target.copies, self.network.pack_network(fold(network) if target.folds else network))
        return self._target[1]

    def write_gradients(self) -> None:
        """Let the parameters' ``.grad`` be the gradients of the last update."""
        self.optimizer.write_gradients()

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore the Q-network's weights and the state."""
        super().load_state_dict(weights, state)
        self._target = None
