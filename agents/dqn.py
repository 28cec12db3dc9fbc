"""Deep Q-learning with a replay memory and a target network (Mnih et al. 2015, algorithm 1).

The loop of :mod:`wn_rl.training` schedules the events; :mod:`agents.backends` may compute them faster.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wn_rl.config import TrainConfig, network_spec
from wn_rl.networks import Network, build_q_network, output_deviations
from wn_rl.parameterizations import initialize_from_data, project
from wn_rl.replay import Minibatch
from wn_rl.training import Statistics

from .exploration import epsilon_greedy
from .losses import huber, td_targets
from .monitoring import FiniteCheck, LossStatistics
from .optimizers import make_optimizer
from .target_network import TargetNetwork


class DQN:
    """The agent: a Q-network, its target network and an optimizer.

    Attributes:
        q_network: Q; in evaluation mode except in the update, so layers with batch statistics act on running ones.
        target: Q̂.
        optimizer: of the Q-network's parameters.
        generator: draws the actions.
        updates: made so far.
        statistics: means of the updates since the last reading.
        finite: checks that losses are finite, and keeps the transitions of the first one that is not.
    """

    def __init__(self, config: TrainConfig, num_actions: int, device: torch.device) -> None:
        """Build the agent.

        Args:
            config: a resolved configuration (``learning_rate``, ``data_dependent_init`` and ``weight_init`` set).
            num_actions: of the environment.
            device: of the networks.
        """
        assert config.weight_init is not None
        self.config = config
        self.device = device
        self.precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        spec = network_spec(config, num_actions)
        self.parameterization = spec.entry()
        statistics_fixed = self.parameterization.batch_independent or config.target_statistics == "running"
        self.q_network: Network = build_q_network(spec, seed=config.seed).to(device).eval()
        self.target = TargetNetwork(
            build_q_network(spec, seed=config.seed).to(device).eval(),
            folds=self.parameterization.foldable and statistics_fixed,
            precision=self.precision,
        )
        self.optimizer: torch.optim.Optimizer = make_optimizer(config, self.q_network.parameters())
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.updates = 0
        self.statistics = LossStatistics(device)
        self.finite = FiniteCheck(config.batch_size, device, lambda: self.updates + 1)
        self._restored_gradient_norm = math.nan

    @property
    def target_network(self) -> Network:
        """The target network with its parameterization; change its weights only between updates."""
        return self.target.network

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass: hidden layers in the configuration's precision."""
        # One pass gains nothing from the cache of rounded weights, and a captured one must not find them in it.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision is torch.bfloat16, cache_enabled=False
        )

    @torch.no_grad()
    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q(s, ·), float32 (B, actions), of uint8 observations, (B, 4, 84, 84)."""
        with self.autocast():
            q_values: Tensor = self.q_network(observations)
        return q_values.float()

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return ε-greedy actions, int64 (B,), on the device; ``epsilon`` has shape (B,)."""
        if epsilon.min() >= 1.0:  # random play needs no Q-values
            q_values = torch.zeros(len(epsilon), self.q_network.spec.num_actions, device=self.device)
        else:
            q_values = self.q_values(observations)
        return self.epsilon_greedy(q_values, torch.from_numpy(epsilon).to(self.device))

    def epsilon_greedy(self, q_values: Tensor, epsilon: Tensor) -> Tensor:
        """Return :func:`epsilon_greedy` actions, int64 (B,), with the agent's generator."""
        return epsilon_greedy(q_values, epsilon, self.generator)

    def initialize(self, observations: Tensor) -> None:
        """Initialize the network from observations in replay, if so configured, then copy it to the target network.

        Salimans & Kingma 2016, section 3, in full precision; the output layer's Q-values get the standard deviation
        ``output_init_std`` instead of 1 (see docs/algorithm.md for why) unless ``output_init`` is ``unit-variance``.
        """
        if self.config.data_dependent_init:
            std = 1.0 if self.config.output_init == "unit-variance" else self.config.output_init_std
            initialize_from_data(self.q_network, observations, std_of=output_deviations(self.q_network, std))
        self.copy_target()

    def forward(self, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """Return Q(s, ·) with its gradient and Q̂(s', ·) without one, each (B, actions).

        With batch statistics and ``joint_batches``, each network sees both states as one batch.
        """
        joint = self.config.joint_batches and not self.parameterization.batch_independent
        with self.autocast():
            if not joint:
                with torch.no_grad():
                    next_q_values = self.target(batch.next_observations)
                return self.q_network(batch.observations), next_q_values
            both = torch.cat([batch.observations, batch.next_observations])
            with torch.no_grad():
                next_q_values = self.target(both)[len(batch.observations) :]
            return self.q_network(both)[: len(batch.observations)], next_q_values

    def td_loss_of(self, batch: Minibatch, q_values: Tensor, next_q_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`td_loss` does, given the Q-values of both networks, each (B, actions).

        Override this for another loss; a backend that computes the networks itself calls it too.
        """
        rewards = batch.rewards
        if self.config.reward_clip > 0:
            rewards = rewards.clamp(-self.config.reward_clip, self.config.reward_clip)
        dtype = torch.promote_types(q_values.dtype, torch.float32)
        targets = td_targets(rewards.to(dtype), batch.terminals, next_q_values.to(dtype), self.config.gamma)
        q_value = q_values.to(dtype).gather(1, batch.actions[:, None]).squeeze(1)
        td_error = targets - q_value
        return huber(td_error), td_error, q_value

    def td_loss(self, batch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss per transition, TD error, Q-value of the action taken), each of shape (B,)."""
        return self.td_loss_of(batch, *self.forward(batch))

    def reduce(self, batch: Minibatch, losses: Tensor, td_error: Tensor, q_value: Tensor) -> Tensor:
        """Return the loss of a minibatch, a scalar, from the results of :meth:`td_loss`, and add to the statistics."""
        loss = losses.sum() if self.config.loss_reduction == "sum" else losses.mean()
        self.finite.check(loss, batch.indices)
        self.statistics.add(losses, td_error, q_value)
        return loss

    def loss(self, batch: Minibatch) -> Tensor:
        """Return the loss of a minibatch, a scalar."""
        return self.reduce(batch, *self.td_loss(batch))

    def update(self, batch: Minibatch) -> None:
        """Make one optimizer step on a minibatch.

        Raises:
            NonFiniteLossError: on a CPU, the loss is not finite; no step was made.
        """
        with self.training_mode():
            loss = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.count_updates(1)

    @contextlib.contextmanager
    def training_mode(self) -> Iterator[None]:
        """Put the networks into training mode for an optimizer step; project the weights after it."""
        # Only some parameterizations and networks depend on the mode, and switching visits the whole module tree.
        switch_mode = self.parameterization.has_training_mode or self.q_network.has_training_mode
        if switch_mode:
            self.q_network.train()
            batch_statistics = self.config.target_statistics == "batch" and not self.parameterization.batch_independent
            self.target_network.train(batch_statistics)
        try:
            yield
            if self.parameterization.projects:
                project(self.q_network)
        finally:
            if switch_mode:
                self.q_network.eval()
                self.target_network.eval()

    def count_updates(self, count: int) -> None:
        """Add to the number of updates made."""
        self.updates += count
        self.statistics.updates += count

    def copy_target(self) -> None:
        """Copy the Q-network, buffers included, to the target network: Q̂ ← Q."""
        self.target.load_state_dict(self.q_network.state_dict())

    def is_finite(self) -> bool:
        """Return whether every weight is a finite number; waits for the device."""
        return all(bool(parameter.isfinite().all()) for parameter in self.q_network.parameters())

    def gradient_norm(self) -> float:
        """Return the 2-norm of the last update's gradient, NaN before the first; waits for the device."""
        gradients = [parameter.grad for parameter in self.q_network.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else self._restored_gradient_norm

    def read_statistics(self) -> Statistics:
        """Return the means of the updates since the last reading and reset them; waits for the device."""
        return self.statistics.read()

    def offending_transitions(self) -> Tensor | None:
        """Return the replay indices of the first minibatch whose loss was not finite, int64 (B,); None if all were."""
        return self.finite.transitions()

    def state_dict(self) -> dict[str, Any]:
        """Return the state except the Q-network's weights: target network, optimizer, random state, counters."""
        return {
            "target_network": self.target_network.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "generator": self.generator.get_state(),
            "updates": self.updates,
            "gradient_norm": self.gradient_norm() if self.updates else None,
            "sums": self.statistics.sums.clone(),
            "summed_updates": self.statistics.updates,
        }

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore the Q-network's weights and what :meth:`state_dict` returned."""
        self.q_network.load_state_dict(weights)
        self.target.load_state_dict(state["target_network"])
        moments = {int(key): copy.deepcopy(value) for key, value in state.get("optimizer", {}).items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.generator.set_state(state["generator"].cpu())
        self.updates = int(state["updates"])
        self._restored_gradient_norm = math.nan if state["gradient_norm"] is None else float(state["gradient_norm"])
        self.statistics.sums.copy_(state["sums"])
        self.statistics.updates = int(state["summed_updates"])
