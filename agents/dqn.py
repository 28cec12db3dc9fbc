"""Deep Q-learning with a replay memory and a target network (Mnih et al. 2015, algorithm 1)."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.compiled import CompiledLoss
from agents.flat import FlatOptimizer
from agents.graphs import CudaRecorder, GraphStepper
from agents.optimizers import make_optimizer
from wn_rl import diagnostics
from wn_rl.config import TrainConfig
from wn_rl.errors import NonFiniteLossError, one_line
from wn_rl.networks import QNetwork, QNetworkSpec, build_q_network
from wn_rl.parameterizations import fold, initialize_from_data, project
from wn_rl.parameterizations.api import treated_layers
from wn_rl.parameterizations.weight_norm import defer
from wn_rl.replay import DrawnMinibatch, Minibatch, Replay
from wn_rl.stepping import PlainStepper, Stepper, TogetherStepper
from wn_rl.training import Statistics

from .backends.cpu_kernels import kernel_network, loader
from .backends.cpu_kernels.adamax import FusedAdamax
from .backends.cpu_kernels.kernel_network import KernelNetwork, TDLoss
from .backends.cpu_kernels.packed_network import PackedNetwork, PackedWeights, unsupported


def td_targets(rewards: Tensor, terminals: Tensor, next_q_values: Tensor, gamma: float) -> Tensor:
    """Return y = r + γ · max_a Q̂(s', a), or r where s' is terminal (Mnih et al. 2015, algorithm 1).

    Args:
        rewards: shape (B,), clipped already.
        terminals: bool, shape (B,).
        next_q_values: of the target network, shape (B, actions).
        gamma: discount per agent step.
    """
    return rewards + gamma * next_q_values.amax(1) * (~terminals)


def huber(td_error: Tensor, delta: float = 1.0) -> Tensor:
    """Return ½x² within ±δ and δ(|x| − ½δ) beyond: the clipped TD error of Mnih et al. 2015 as a loss."""
    return nn.functional.huber_loss(td_error, torch.zeros_like(td_error), reduction="none", delta=delta)


def epsilon_greedy(q_values: Tensor, epsilon: Tensor, generator: torch.Generator) -> Tensor:
    """Return actions, int64 (B,): random with probability ε, else the one of the highest Q-value.

    The same random numbers are drawn whatever ε is.

    Args:
        q_values: shape (B, actions).
        epsilon: shape (B,), on the device of ``q_values``.
        generator: on the device of ``q_values``.
    """
    batch, actions = q_values.shape
    explore = torch.rand(batch, device=q_values.device, generator=generator) < epsilon
    random = torch.randint(actions, (batch,), device=q_values.device, generator=generator)
    return torch.where(explore, random, q_values.argmax(1))


def _fuse(network: QNetwork, config: TrainConfig) -> PackedNetwork | None:
    """Return the compiled way to train ``network``, None where there is none; says so if it should be there."""
    if unsupported(network):
        return None
    library = loader.load()
    if isinstance(library, str):
        print(f"updates take the plain path: {library}", file=sys.stderr)
        return None
    precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    kind = PackedNetwork if kernel_network.unsupported(network, library, precision) else KernelNetwork
    return kind(network, library, precision=precision)


class DQN:
    """The agent: a Q-network, its target network and an optimizer.

    The network is in evaluation mode but for the update, so entries with batch statistics act on running ones.
    """

    def __init__(
        self, config: TrainConfig, num_actions: int, device: torch.device, *, static: bool | None = None
    ) -> None:
        """Build the agent.

        Args:
            config: a resolved configuration (``learning_rate``, ``data_dependent_init`` and ``weight_init`` set).
            num_actions: of the environment.
            device: where the networks live.
            static: keep every tensor of an update in its place and read nothing back, so that the update can be
                recorded; None: on a GPU.
        """
        assert config.learning_rate is not None
        assert config.weight_init is not None
        self.config = config
        self.device = device
        self.static = device.type == "cuda" if static is None else static
        spec = QNetworkSpec(
            num_actions,
            config.param,
            options=config.param_options,
            layers=config.param_layers,
            hidden_units=config.hidden_units,
            weight_init=config.weight_init,
        )
        self.parameterization = spec.entry()
        self.q_network: QNetwork = build_q_network(spec, seed=config.seed).to(device).eval()
        self.target_network: QNetwork = build_q_network(spec, seed=config.seed).to(device).eval()
        self.target_network.requires_grad_(False)
        compiled = config.compile == "on" and not self.static
        self._fused = _fuse(self.q_network, config) if compiled else None
        self._deferred = defer(self.q_network) if compiled and self._fused is None else []
        self.optimizer: torch.optim.Optimizer
        arguments: dict[str, Any] = {
            "learning_rate": config.learning_rate,
            "eps": config.optimizer_eps,
            "beta1": config.adam_beta1,
            "beta2": config.adam_beta2,
            "rmsprop_decay": config.rmsprop_decay,
        }
        trained = self.q_network.parameters()
        if self._fused is not None:
            betas = (config.adam_beta1, config.adam_beta2)
            self.optimizer = FusedAdamax(self._fused, config.learning_rate, betas, config.optimizer_eps)
        elif self.static:
            self.optimizer = FlatOptimizer(config.optimizer, trained, **arguments)
        else:
            self.optimizer = make_optimizer(
                config.optimizer, trained, **arguments, compiled=compiled, deferred=self._deferred
            )
        self.generator = torch.Generator(device).manual_seed(config.seed)
        # What the target network computes between two copies is fixed, so where it can it does without the
        # parameterization: the same values but for rounding, at the price of a plain network.
        statistics_fixed = self.parameterization.batch_independent or config.target_statistics == "running"
        self._folds_target = self.parameterization.foldable and statistics_fixed
        self._plain_target: QNetwork | None = None
        self._packed_target: PackedWeights | None = None
        # None until the first update has shown whether it can be compiled.
        plain = config.compile == "off" or not self.static
        self._loss_of: Callable[[Minibatch], Tensor] | None = self.measured_loss if plain else None
        self._watching = False
        self._watched: dict[str, float] = {}
        self.updates = 0
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        mean = config.loss_reduction != "sum"
        self._loss = TDLoss(config.gamma, config.reward_clip, mean, self._sums)
        self._summed_updates = 0
        self._restored_gradient_norm = math.nan
        self._offending = torch.full((config.batch_size,), -1, dtype=torch.int64, device=device)

    def stepper(self, replay: Replay) -> Stepper:
        """Return what acts and updates with ``replay``.

        On a GPU it does so as CUDA graphs; on a CPU, where the passes are compiled, it makes several updates in one
        call. A subclass with an update of its own is given minibatches on every device, and so is one that a replay of
        another kind draws.
        """
        kind = type(self)
        own = kind.update is DQN.update
        if self.static and own and kind.act is DQN.act:
            return GraphStepper(self, replay, CudaRecorder(self.device) if self.device.type == "cuda" else None)
        own = own and kind.work_of_update is DQN.work_of_update and kind.counted is DQN.counted
        if own and isinstance(self._fused, KernelNetwork) and type(replay) is Replay:
            return TogetherStepper(self, replay, self.config.batch_size)
        return PlainStepper(self, replay, self.config.batch_size)

    def _autocast(self) -> torch.autocast:
        # The cache of rounded weights brings nothing to one pass, and a recorded pass must not find them in it.
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.precision == "bfloat16",
            cache_enabled=False if self.static else None,
        )

    @torch.no_grad()
    def q_values(self, observations: Tensor) -> Tensor:
        """Return Q-values, float32 (B, actions), of uint8 observations, (B, 4, 84, 84)."""
        if self._fused is not None:
            return self._fused.q_values(observations)
        with self._autocast():
            q_values: Tensor = self.q_network(observations)
        return q_values.float()

    def greedy(self, observations: Tensor) -> Tensor:
        """Return the actions of the highest Q-values, int64 (B,)."""
        return self.q_values(observations).argmax(1)

    def act(self, observations: Tensor, epsilon: NDArray[np.float32]) -> Tensor:
        """Return ε-greedy actions, int64 (B,), on the device; ``epsilon`` has shape (B,)."""
        if epsilon.min() >= 1.0:  # the warm-up needs no Q-values
            q_values = torch.zeros(len(epsilon), self.q_network.spec.num_actions, device=self.device)
        else:
            q_values = self.q_values(observations)
        return self.epsilon_greedy(q_values, torch.from_numpy(epsilon).to(self.device))

    def epsilon_greedy(self, q_values: Tensor, epsilon: Tensor) -> Tensor:
        """Return :func:`epsilon_greedy` actions, int64 (B,), drawn from the agent's generator."""
        return epsilon_greedy(q_values, epsilon, self.generator)

    def initialize(self, observations: Tensor) -> None:
        """Initialize the network from replayed observations, if its parameterization asks for it, then the target.

        Salimans & Kingma 2016, section 3, in full precision; the output layer's Q-values get the standard deviation
        ``output_init_std`` instead of 1 (see docs/algorithm.md for why) unless ``output_init`` is ``literal``.
        """
        if self.config.data_dependent_init:
            std = 1.0 if self.config.output_init == "literal" else self.config.output_init_std
            treats_output = "output" in treated_layers(self.q_network)
            initialize_from_data(self.q_network, observations, std_of={"output": std} if treats_output else None)
        self.copy_target()

    def td_loss(self, batch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss per transition, TD error, Q-value of the action taken), each of shape (B,)."""
        return self._compare(batch, *self._forward(batch))

    def _compare(self, batch: Minibatch, q_values: Tensor, next_q_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`td_loss` does, given both networks' Q-values."""
        rewards = batch.rewards
        if self.config.reward_clip > 0:
            rewards = rewards.clamp(-self.config.reward_clip, self.config.reward_clip)
        dtype = torch.promote_types(q_values.dtype, torch.float32)
        targets = td_targets(rewards.to(dtype), batch.terminals, next_q_values.to(dtype), self.config.gamma)
        q_value = q_values.to(dtype).gather(1, batch.actions[:, None]).squeeze(1)
        td_error = targets - q_value
        return huber(td_error), td_error, q_value

    def _forward(self, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """Return the network's Q-values of the observations and the target network's of the next ones.

        Where batch statistics matter, ``joint_batches`` lets each network see both as one batch.
        """
        joint = self.config.joint_batches and not self.parameterization.batch_independent
        with self._autocast():
            if not joint:
                with torch.no_grad():
                    next_q_values = self._target(batch.next_observations)
                return self.q_network(batch.observations), next_q_values
            both = torch.cat([batch.observations, batch.next_observations])
            with torch.no_grad():
                next_q_values = self._target(both)[len(batch.observations) :]
            return self.q_network(both)[: len(batch.observations)], next_q_values

    def update(self, batch: Minibatch) -> None:
        """Make one optimizer step on a minibatch; nothing is read back from the device."""
        self.counted(lambda: self.work_of_update(batch))

    def work_of_update(self, batch: Minibatch) -> None:
        """Do what an update does on the device; :meth:`counted` does what it does on the host."""
        if isinstance(self._fused, KernelNetwork):
            _, loss = self._compiled_steps(self._fused, batch, 1)
            if batch.numbers is not None:
                self._refuse(loss, batch.numbers)
            return
        if self._fused is not None:
            self._fused_step(self._fused, batch)
        elif self._loss_of is None:
            self._compile(batch)
        else:
            self._step(batch, self._loss_of)

    def counted(self, work: Callable[[], None]) -> None:
        """Count an update that ``work`` makes, and watch it where that was asked for."""
        before = diagnostics.weights(self.q_network) if self._watching else None
        work()
        if isinstance(self.optimizer, FlatOptimizer):
            self.optimizer.show_gradients()
        if before is not None:
            self._watched = diagnostics.effective_learning_rate_tags(before, self.q_network)
            self._watching = False
        self.updates += 1
        self._summed_updates += 1

    def update_several(self, batch: DrawnMinibatch, count: int) -> None:
        """Make ``count`` updates in one call, on B transitions each: to the last bit those of :meth:`update`, B by B.

        Args:
            batch: count · B transitions, at whose fields nobody has looked.
            count: at least 1.

        Raises:
            NonFiniteLossError: the loss of an update is not finite; those before it were made.
            IndexError: a transition or an action does not exist; no update was made.
        """
        compiled = self._fused
        assert isinstance(compiled, KernelNetwork)
        numbers = batch.numbers.view(count, -1)
        if self._watching:
            self.update(DrawnMinibatch(batch.kept, numbers[0]))
            numbers = numbers[1:]
        if len(numbers):
            made, loss = self._compiled_steps(compiled, DrawnMinibatch(batch.kept, numbers.flatten()), len(numbers))
            self.updates += made
            self._summed_updates += made
            if made < len(numbers):
                self._refuse(loss, numbers[made])

    def _compiled_steps(self, compiled: KernelNetwork, batch: Minibatch, count: int) -> tuple[int, float]:
        """Do all of :meth:`work_of_update` for so many in one call; returns how many were made, and the last loss."""
        optimizer = self.optimizer
        assert isinstance(optimizer, FusedAdamax)
        rates, betas, eps = optimizer.next_steps(count)
        made, loss = compiled.update(self._targets_weights(compiled), batch, self._loss, rates, betas, eps)
        optimizer.count_steps(rates[:made])
        return made, loss

    def _targets_weights(self, fused: PackedNetwork) -> PackedWeights:
        """Return the target network's packed weights, after the network's own are up to date."""
        fused.refresh()
        if self._packed_target is None:
            self._packed_target = fused.pack_network(fold(copy.deepcopy(self.target_network)))
        return self._packed_target

    @torch.no_grad()
    def _fused_step(self, fused: PackedNetwork, batch: Minibatch) -> None:
        """Step on the gradient of the loss, written out."""
        next_q_values, q_values, seen = fused.forward_both(self._targets_weights(fused), batch)
        losses, td_error, q_value = self._compare(batch, q_values, next_q_values)
        self._check(losses.sum(), batch)
        # The Huber loss's derivative by the Q-value of the action taken; the other actions' do not enter the loss.
        slope = td_error.clamp(-1.0, 1.0).neg_()
        if self.config.loss_reduction != "sum":
            slope = slope / len(slope)
        fused.backward(seen, torch.zeros_like(q_values).scatter_(1, batch.actions[:, None], slope[:, None]))
        self.optimizer.step()
        self._sums += torch.stack([losses.mean(), td_error.abs().mean(), q_value.mean()])

    def measured_loss(self, batch: Minibatch) -> Tensor:
        """Return the loss of a minibatch, a scalar, after its statistics were summed and a bad one was noted."""
        losses, td_error, q_value = self.td_loss(batch)
        loss = losses.sum() if self.config.loss_reduction == "sum" else losses.mean()
        self._check(loss, batch)
        with torch.no_grad():
            self._sums += torch.stack([losses.mean(), td_error.abs().mean(), q_value.mean()])
        return loss

    def _step(self, batch: Minibatch, loss_of: Callable[[Minibatch], Tensor]) -> None:
        """Step on the gradient that autograd finds of what ``loss_of`` returns."""
        # Only some entries care for the mode, and switching walks the whole module tree.
        switch_mode = self.parameterization.has_training_mode
        if switch_mode:
            self.q_network.train()
            batch_statistics = self.config.target_statistics == "batch" and not self.parameterization.batch_independent
            self.target_network.train(batch_statistics)
        loss = loss_of(batch)
        if isinstance(self.optimizer, FlatOptimizer):
            self.optimizer.minimize(loss)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        if self.parameterization.projects:
            project(self.q_network)
        if switch_mode:
            self.q_network.eval()
            self.target_network.eval()

    def _compile(self, batch: Minibatch) -> None:
        """Make the first update through torch.compile; where that cannot be done make it, and all others, without."""
        assert isinstance(self.optimizer, FlatOptimizer)
        print("compiling the update, once for this run", file=sys.stderr)
        loss_of: Callable[[Minibatch], Tensor] = CompiledLoss(self.measured_loss)
        weights, state = copy.deepcopy(self.q_network.state_dict()), copy.deepcopy(self.state_dict())
        offending = self._offending.clone()
        try:
            self.optimizer.compile()
            self._step(batch, loss_of)
        except Exception as error:  # noqa: BLE001 - torch.compile's are of many kinds; what is wrong otherwise comes again below
            print(f"the update cannot be compiled and runs slower: {one_line(error)[:200]}", file=sys.stderr)
            self.optimizer.compile(False)
            self.q_network.eval()
            self.target_network.eval()
            self.load_state_dict(weights, state)
            self._offending.copy_(offending)
            loss_of = self.measured_loss
            self._step(batch, loss_of)
        self._loss_of = loss_of

    def _check(self, loss: Tensor, batch: Minibatch) -> None:
        """Note the first minibatch whose loss is not finite; on a CPU stop before it spoils the weights.

        On a GPU nothing may be read back here; the next actions tell of it (:class:`agents.graphs.GraphStepper`).
        """
        if batch.numbers is None:
            return
        if not self.static:
            self._refuse(loss.item(), batch.numbers)
            return
        known = loss.isfinite() | (self._offending[0] >= 0)
        self._offending.copy_(torch.where(known, self._offending, batch.numbers))

    def _refuse(self, loss: float, numbers: Tensor) -> None:
        """Stop at a loss that is not finite, of the transitions with these numbers."""
        if math.isfinite(loss):
            return
        self._offending.copy_(numbers)
        raise NonFiniteLossError(f"the loss of update {self.updates + 1:,} is {loss}")

    def has_offending(self) -> Tensor:
        """Return on the device whether a loss was not finite, bool, shape (1,)."""
        return self._offending[:1] >= 0

    def offending_transitions(self) -> Tensor | None:
        """Return the numbers in replay of the first minibatch whose loss was not finite, int64 (B,); None: none."""
        return None if int(self._offending[0]) < 0 else self._offending

    def _target(self, observations: Tensor) -> Tensor:
        """Return the target network's Q-values."""
        q_values: Tensor
        if not self._folds_target:
            q_values = self.target_network(observations)
            return q_values
        if self._plain_target is None:
            self._plain_target = self._folded_target()
        q_values = self._plain_target(observations)
        return q_values

    def _folded_target(self) -> QNetwork:
        plain = fold(copy.deepcopy(self.target_network))
        if self.config.precision == "bfloat16":
            plain.round_weights(torch.bfloat16)
        return plain

    def _target_changed(self) -> None:
        """Make anew what was computed from the target network's weights; a static agent does so in its place."""
        if self.static and self._plain_target is not None:
            self._plain_target.load_state_dict(self._folded_target().state_dict())
            return
        self._plain_target = self._packed_target = None
        if self.static and self._folds_target:
            self._plain_target = self._folded_target()

    def copy_target(self) -> None:
        """Copy the Q-network, buffers included, to the target network."""
        self.target_network.load_state_dict(self.q_network.state_dict())
        self._target_changed()

    def is_finite(self) -> bool:
        """Return whether every weight is a finite number; waits for the device."""
        return all(bool(parameter.isfinite().all()) for parameter in self.q_network.parameters())

    def gradient_norm(self) -> float:
        """Return the 2-norm of the last update's gradient, NaN before the first; waits for the device."""
        if isinstance(self.optimizer, FusedAdamax):
            self.optimizer.write_gradients()
        gradients = [parameter.grad for parameter in self.q_network.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else self._restored_gradient_norm

    @property
    def watching(self) -> bool:
        """Whether the next update is watched."""
        return self._watching

    def watch_next_update(self) -> None:
        """Measure the effective learning rate of the next update, which then waits for the device."""
        self._watching = True

    def watched_update(self) -> dict[str, float]:
        """Return the effective learning rates of the watched update by tag; empty before it is made."""
        return self._watched

    def read_statistics(self) -> Statistics:
        """Return the means since the last reading and start anew; waits for the device.

        From then on the parameters' ``.grad`` are those of the last update, until the next.
        """
        if isinstance(self.optimizer, FusedAdamax):
            self.optimizer.write_gradients()
        count = self._summed_updates
        loss, td_error, q_value = (self._sums / max(count, 1)).tolist() if count else [float("nan")] * 3
        self._sums.zero_()
        self._summed_updates = 0
        return Statistics(count, loss, td_error, q_value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the Q-network's weights: target network, optimizer, random state, counters."""
        return {
            "target_network": self.target_network.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            # Known to the last bit, or a resumed run would differ from one that was never stopped.
            "norms": {str(index): entry.norm for index, entry in enumerate(self._deferred)},
            "generator": self.generator.get_state(),
            "updates": self.updates,
            "gradient_norm": self.gradient_norm() if self.updates else None,
            "sums": self._sums.clone(),
            "summed_updates": self._summed_updates,
        }

    def load_state_dict(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore the Q-network's weights and what :meth:`state_dict` returned."""
        self.q_network.load_state_dict(weights)
        self.target_network.load_state_dict(state["target_network"])
        self._target_changed()
        self.optimizer.load_state_dict(
            {
                "state": {int(key): copy.deepcopy(value) for key, value in state.get("optimizer", {}).items()},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        for key, norm in state.get("norms", {}).items():
            if int(key) < len(self._deferred):
                self._deferred[int(key)].restore(norm)
        self.generator.set_state(state["generator"].cpu())
        self.updates = int(state["updates"])
        self._restored_gradient_norm = math.nan if state["gradient_norm"] is None else float(state["gradient_norm"])
        self._sums.copy_(state["sums"])
        self._summed_updates = int(state["summed_updates"])
