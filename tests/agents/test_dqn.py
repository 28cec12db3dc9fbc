"""The agent's update equals one worked out by other means, number for number; acting and state do as they say."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agents.dqn import DQN, epsilon_greedy, huber, td_targets
from wn_rl.config import load, resolve
from wn_rl.errors import UsageError
from wn_rl.networks import build_q_network
from wn_rl.parameterizations import names
from wn_rl.replay import Minibatch

ACTIONS = 4
CPU = torch.device("cpu")


def agent(param: str = "standard", *, preset: str = "paper", **changes: Any) -> DQN:
    """A Breakout agent of a preset; 16 hidden units keep it quick where their number does not matter."""
    changes = {"device": "cpu", "precision": "float32", "hidden_units": 16} | changes
    return DQN(resolve(replace(load(preset), game="breakout", param=param, **changes)), ACTIONS, CPU)


def in_float64(dqn: DQN) -> DQN:
    """Convert both networks; the parameters must stay the ones that the optimizer trains."""
    before = list(dqn.q_network.parameters())
    dqn.q_network.double()
    dqn.target_network.double()
    after = list(dqn.q_network.parameters())
    (group,) = dqn.optimizer.param_groups
    assert all(p.dtype == torch.float64 for p in after)
    assert len(before) == len(after) == len(group["params"])
    assert all(a is b is c for a, b, c in zip(before, after, group["params"], strict=True))
    return dqn


def random_observations(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=generator)


def minibatch(seed: int = 0, **changes: Tensor) -> Minibatch:
    """Five transitions: rewards on both sides of the clipping, the second and the last terminal."""
    values = {
        "observations": random_observations(5, 2 * seed),
        "actions": torch.tensor([0, 3, 1, 1, 2]),
        "rewards": torch.tensor([0.0, 4.0, -7.0, 0.25, 1.0]),
        "next_observations": random_observations(5, 2 * seed + 1),
        "terminals": torch.tensor([False, True, False, False, True]),
    }
    return Minibatch(**(values | changes))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- targets, loss, exploration ----------------------------------------------------------------------------------


def test_td_targets_on_numbers_worked_out_by_hand() -> None:
    """1 + 0.9 · 5 = 5.5; −1 + 0.9 · (−2) = −2.8; a terminal gives its reward alone."""
    targets = td_targets(
        torch.tensor([1.0, -1.0, 1.0, 0.0], dtype=torch.float64),
        torch.tensor([False, False, True, True]),
        torch.tensor([[5.0, 2.0], [-3.0, -2.0], [100.0, 7.0], [-1.0, -9.0]], dtype=torch.float64),
        0.9,
    )
    assert targets.tolist() == pytest.approx([5.5, -2.8, 1.0, 0.0], rel=1e-15)


def test_huber_on_numbers_worked_out_by_hand_and_its_gradient_is_the_clipped_error() -> None:
    errors = [0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -10.0]
    x = torch.tensor(errors, dtype=torch.float64, requires_grad=True)
    losses = huber(x)
    assert losses.tolist() == [0.0, 0.125, 0.125, 0.5, 0.5, 2.5, 9.5]
    losses.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.5, -0.5, 1.0, -1.0, 1.0, -1.0]


def test_huber_with_another_delta() -> None:
    """δ = 2: ½ · 1.5² = 1.125 within, 2 · (5 − 1) = 8 beyond."""
    assert huber(torch.tensor([1.5, -5.0]), delta=2.0).tolist() == [1.125, 8.0]


def test_epsilon_0_is_greedy_and_epsilon_1_is_uniform() -> None:
    q_values = torch.tensor([[0.0, 3.0, 2.9], [-1.0, -5.0, -0.5]]).repeat(6000, 1)
    generator = torch.Generator().manual_seed(0)
    greedy = epsilon_greedy(q_values, torch.zeros(12_000), generator)
    assert greedy.dtype == torch.int64
    assert greedy.tolist() == [1, 2] * 6000
    random = epsilon_greedy(q_values, torch.ones(12_000), generator)
    spread = math.sqrt(12_000 * (1 / 3) * (2 / 3))
    assert all(abs(count - 4000) < 4.5 * spread for count in random.bincount(minlength=3).tolist())


def test_epsilon_is_the_probability_of_a_random_action_of_each_emulator() -> None:
    q_values = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(20_000, 4)
    epsilon = torch.tensor([0.1, 0.8]).repeat(10_000)
    others = epsilon_greedy(q_values, epsilon, torch.Generator().manual_seed(1)) != 0
    for slot, probability in enumerate((0.1 * 3 / 4, 0.8 * 3 / 4)):
        spread = math.sqrt(10_000 * probability * (1 - probability))
        assert abs(int(others[slot::2].sum()) - 10_000 * probability) < 4.5 * spread


def test_the_same_random_numbers_are_drawn_whatever_epsilon_is() -> None:
    states = []
    for epsilon in (0.0, 0.3, 1.0):
        generator = torch.Generator().manual_seed(2)
        epsilon_greedy(torch.rand(7, 3), torch.full((7,), epsilon), generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_acting_during_warm_up_consumes_the_generator_as_acting_later_does() -> None:
    observations = random_observations(3, 0)
    warm_up, later, greedy = (agent(seed=4) for _ in range(3))
    warm_up.act(observations, np.ones(3, np.float32))
    later.act(observations, np.full(3, 0.5, np.float32))
    greedy_actions = greedy.act(observations, np.zeros(3, np.float32))
    assert torch.equal(warm_up.generator.get_state(), later.generator.get_state())
    assert torch.equal(warm_up.generator.get_state(), greedy.generator.get_state())
    assert greedy_actions.tolist() == greedy.q_values(observations).argmax(1).tolist()


def test_one_emulator_below_epsilon_1_gets_its_greedy_action_and_the_others_their_random_ones() -> None:
    observations = random_observations(6, 0)
    warm_up, mixed = agent(seed=4), agent(seed=4)
    with torch.no_grad():
        mixed.q_network.output.bias[3] += 100.0
    random = warm_up.act(observations, np.ones(6, np.float32)).tolist()
    actions = mixed.act(observations, np.array([1, 1, 1, 1, 1, 0], np.float32)).tolist()
    assert actions == [*random[:5], 3]
    assert random[5] != 3


# --- one whole update --------------------------------------------------------------------------------------------


def plain_q_values(weights: dict[str, Tensor], observations: Tensor) -> Tensor:
    """The network of Mnih et al. 2015 on raw weights, or on g and v of w = g · v / ‖v‖."""

    def weight(layer: str) -> Tensor:
        if f"{layer}.weight" in weights:
            return weights[f"{layer}.weight"]
        g = weights[f"{layer}.parametrizations.weight.original0"]
        v = weights[f"{layer}.parametrizations.weight.original1"]
        return g * v / (v * v).sum(tuple(range(1, v.dim())), keepdim=True).sqrt()

    x = observations.double() / 255
    for layer, stride in (("convolutions.0", 4), ("convolutions.1", 2), ("convolutions.2", 1)):
        x = functional.conv2d(x, weight(layer), weights[f"{layer}.bias"], stride).clamp(min=0)
    x = (x.flatten(1) @ weight("hidden").T + weights["hidden.bias"]).clamp(min=0)
    return x @ weight("output").T + weights["output.bias"]


def plain_gradients(
    weights: dict[str, Tensor], target_weights: dict[str, Tensor], batch: Minibatch, *, clip: float, mean: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of the loss by name, and the TD errors; γ = 0.99, δ = 1."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    chosen = torch.stack([q[a] for q, a in zip(plain_q_values(leaves, batch.observations), batch.actions, strict=True)])
    best_next = plain_q_values(target_weights, batch.next_observations).max(1).values
    targets = []
    for reward, terminal, value in zip(batch.rewards.tolist(), batch.terminals.tolist(), best_next, strict=True):
        clipped = max(-clip, min(clip, reward)) if clip else reward
        targets.append(torch.tensor(clipped, dtype=torch.float64) if terminal else clipped + 0.99 * value)
    error = torch.stack(targets) - chosen
    losses = torch.where(error.abs() <= 1, 0.5 * error * error, error.abs() - 0.5)
    (losses.mean() if mean else losses.sum()).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, error.detach()


@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
@pytest.mark.parametrize("param", ["standard", "wn"])
def test_two_whole_updates_equal_an_independent_implementation(param: str, loss_reduction: str) -> None:
    """The full-size network in float64: loss, gradients, Adamax; the target network differs from the Q-network."""
    dqn = in_float64(agent(param, hidden_units=512, loss_reduction=loss_reduction))
    learning_rate = {"standard": 1e-4, "wn": 3e-4}[param]
    dqn.target_network.load_state_dict(build_q_network(dqn.q_network.spec, seed=99).state_dict())
    with torch.no_grad():  # so that errors lie on both sides of Huber's δ
        dqn.target_network.output.bias.add_(2.0)
        dqn.q_network.output.bias[2:].add_(1.0)
    target_weights = weights_of(dqn.target_network)
    expected = weights_of(dqn.q_network)
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    infinity_norm = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in (1, 2):
        batch = minibatch(step)
        mean = loss_reduction == "mean"
        gradients, errors = plain_gradients(expected, target_weights, batch, clip=1.0, mean=mean)
        assert (errors.abs() < 1).any()
        assert (errors.abs() > 1).any()
        for name, gradient in gradients.items():
            momentum[name] = 0.5 * momentum[name] + 0.5 * gradient
            infinity_norm[name] = torch.maximum(0.999 * infinity_norm[name], gradient.abs() + 1e-8)
            expected[name] -= learning_rate / (1 - 0.5**step) * momentum[name] / infinity_norm[name]
        dqn.update(batch)
        for name, parameter in dqn.q_network.named_parameters():
            assert parameter.grad is not None
            scale = float(gradients[name].abs().max())
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-12 * scale, msg=name)
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-12, msg=name)
    assert dqn.updates == 2
    for name, value in weights_of(dqn.target_network).items():
        assert torch.equal(value, target_weights[name]), "an update must not touch the target network"


def plain_td_errors(dqn: DQN, batch: Minibatch, *, clip: float) -> list[float]:
    gradients_and_errors = plain_gradients(
        weights_of(dqn.q_network), weights_of(dqn.target_network), batch, clip=clip, mean=False
    )
    return gradients_and_errors[1].tolist()


@pytest.mark.parametrize(("reward_clip", "bound"), [(1.0, 1.0), (0.5, 0.5), (0.0, math.inf)])
def test_rewards_are_clipped_in_the_loss_and_0_means_they_are_not(reward_clip: float, bound: float) -> None:
    dqn = in_float64(agent(reward_clip=reward_clip))
    batch = minibatch()
    losses, errors, q_values = dqn.td_loss(batch)
    assert losses.shape == errors.shape == q_values.shape == (5,)
    assert errors.tolist() == pytest.approx(plain_td_errors(dqn, batch, clip=reward_clip), rel=1e-12)
    clipped = [max(-bound, min(bound, reward)) for reward in batch.rewards.tolist()]
    for i in (1, 4):  # terminal: the target is the reward alone
        assert (errors + q_values)[i].item() == pytest.approx(clipped[i], rel=1e-12)
    assert batch.rewards.tolist() == [0.0, 4.0, -7.0, 0.25, 1.0], "the minibatch is left as it was"


def test_what_follows_a_terminal_has_no_part_in_the_loss() -> None:
    """A lost life is stored as terminal although the game goes on, so next frames are there: they must not count."""
    dqn = in_float64(agent())
    batch = minibatch()
    before = dqn.td_loss(batch)[0]
    after = dqn.td_loss(minibatch(next_observations=random_observations(5, 77)))[0]
    changed = (before != after).tolist()
    assert changed == [not terminal for terminal in batch.terminals.tolist()]


def test_the_target_network_gives_the_bootstrap_and_gets_no_gradient() -> None:
    dqn = in_float64(agent())
    batch = minibatch(terminals=torch.zeros(5, dtype=torch.bool))
    errors = dqn.td_loss(batch)[1]
    with torch.no_grad():
        dqn.q_network.output.bias.add_(10.0)
    dqn.copy_target()
    with torch.no_grad():
        dqn.q_network.output.bias.sub_(10.0)
    torch.testing.assert_close(dqn.td_loss(batch)[1] - errors, torch.full((5,), 9.9, dtype=torch.float64))
    dqn.update(batch)
    assert all(p.grad is None and not p.requires_grad for p in dqn.target_network.parameters())


def test_a_summed_loss_has_the_gradient_of_the_mean_times_the_minibatch() -> None:
    norms = []
    for reduction in ("sum", "mean"):
        dqn = in_float64(agent(loss_reduction=reduction))
        assert math.isnan(dqn.gradient_norm())
        dqn.update(minibatch())
        by_hand = math.sqrt(sum(float(p.grad.square().sum()) for p in dqn.q_network.parameters() if p.grad is not None))
        assert dqn.gradient_norm() == pytest.approx(by_hand, rel=1e-12)
        norms.append(by_hand)
    assert norms[0] == pytest.approx(5 * norms[1], rel=1e-12)


def test_the_nature_preset_steps_by_mnihs_rmsprop() -> None:
    """First step, both averages 0 before: Δ = 0.00025 · ∇ / √(0.05 ∇² − 0.0025 ∇² + 0.01)."""
    dqn = in_float64(agent(preset="nature"))
    before = weights_of(dqn.q_network)
    batch = minibatch()
    gradients, _ = plain_gradients(before, weights_of(dqn.target_network), batch, clip=1.0, mean=False)
    dqn.update(batch)
    for name, parameter in dqn.q_network.named_parameters():
        gradient = gradients[name]
        step = 0.00025 * gradient / (0.0475 * gradient * gradient + 0.01).sqrt()
        torch.testing.assert_close(parameter.detach(), before[name] - step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("param", ["standard", "wn"])
def test_bfloat16_gradients_point_where_float32s_do(param: str) -> None:
    gradients = []
    for precision in ("float32", "bfloat16"):
        dqn = agent(param, hidden_units=128, precision=precision)
        dqn.update(minibatch())
        grads = [p.grad for p in dqn.q_network.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in grads)
        gradients.append(torch.cat([g.flatten() for g in grads if g is not None]).double())
        assert dqn.q_values(random_observations(1, 0)).dtype == torch.float32
    assert not torch.equal(*gradients), "the precision changed nothing"
    assert functional.cosine_similarity(*gradients, dim=0).item() >= 0.99


def test_statistics_are_means_since_the_last_reading() -> None:
    dqn = in_float64(agent())
    losses, errors, values = [], [], []
    for seed in (1, 2):
        batch = minibatch(seed)
        with torch.no_grad():
            loss, error, value = dqn.td_loss(batch)
        losses += loss.tolist()
        errors += error.abs().tolist()
        values += value.tolist()
        dqn.update(batch)
    found = dqn.read_statistics()
    assert found.updates == 2
    assert [found.loss, found.td_error, found.q_value] == pytest.approx([sum(x) / 10 for x in (losses, errors, values)])
    after = dqn.read_statistics()
    assert after.updates == 0
    assert all(math.isnan(x) for x in (after.loss, after.td_error, after.q_value))


def test_a_weight_that_is_not_finite_is_noticed() -> None:
    dqn = agent("wn")
    assert dqn.is_finite()
    with torch.no_grad():
        next(dqn.q_network.parameters()).flatten()[0] = math.inf
    assert not dqn.is_finite()


# --- target network, initialization, state -----------------------------------------------------------------------


@pytest.mark.parametrize("param", ["standard", "wn"])
def test_copy_target_makes_the_networks_equal_without_shared_storage(param: str) -> None:
    dqn = agent(param)
    assert_same_weights(dqn.q_network, dqn.target_network)
    dqn.update(minibatch())
    q, target = dqn.q_network.state_dict(), dqn.target_network.state_dict()
    assert not any(torch.equal(q[key], target[key]) for key in q)
    dqn.copy_target()
    assert_same_weights(dqn.q_network, dqn.target_network)
    storages = {p.untyped_storage().data_ptr() for p in dqn.q_network.state_dict().values()}
    assert storages.isdisjoint(p.untyped_storage().data_ptr() for p in dqn.target_network.state_dict().values())


@pytest.mark.parametrize(
    ("param", "changes", "std"),
    [
        ("wn", {}, 0.1),
        ("wn", {"output_init_std": 1.0}, 1.0),
        ("standard", {"data_dependent_init": True}, 0.1),
    ],
)
def test_initialization_from_data_sets_mean_and_std_of_each_actions_q_values(
    param: str, changes: dict[str, Any], std: float
) -> None:
    dqn = in_float64(agent(param, **changes))
    observations = random_observations(12, 5)
    dqn.initialize(observations)
    with torch.no_grad():
        q_values = dqn.q_network(observations)
    assert q_values.mean(0).abs().max().item() < 1e-9
    assert q_values.std(0, correction=0).tolist() == pytest.approx([std] * ACTIONS, rel=1e-9)
    assert_same_weights(dqn.q_network, dqn.target_network)


@pytest.mark.parametrize(("param", "changes"), [("standard", {}), ("wn", {"data_dependent_init": False})])
def test_without_initialization_from_data_no_weight_changes(param: str, changes: dict[str, Any]) -> None:
    dqn = agent(param, **changes)
    untouched = agent(param, **changes)
    with torch.no_grad():
        dqn.target_network.output.bias.add_(1.0)
    dqn.initialize(random_observations(4, 5))
    assert_same_weights(dqn.q_network, untouched.q_network)
    assert_same_weights(dqn.target_network, untouched.q_network)


@pytest.mark.parametrize("optimizer", ["adamax", "adam", "rmsprop_mnih"])
@pytest.mark.parametrize("param", ["standard", "wn"])
def test_an_agent_restored_from_its_state_goes_on_identically(param: str, optimizer: str) -> None:
    original = agent(param, optimizer=optimizer, optimizer_eps=0.01, seed=1)
    observations = random_observations(4, 9)
    half = np.full(4, 0.5, np.float32)
    original.initialize(observations)
    for seed in (1, 2):
        original.update(minibatch(seed))
        original.act(observations, half)
    weights, state = copy.deepcopy((original.q_network.state_dict(), original.state_dict()))
    state["optimizer"] = {str(key): value for key, value in state["optimizer"].items()}  # as in a checkpoint's JSON

    restored = agent(param, optimizer=optimizer, optimizer_eps=0.01, seed=2)
    restored.load_state_dict(weights, state)
    assert restored.updates == 2
    for seed in (3, 4):
        actions = [dqn.act(observations, half).tolist() for dqn in (original, restored)]
        assert actions[0] == actions[1]
        for dqn in (original, restored):
            dqn.update(minibatch(seed))
        assert_same_weights(original.q_network, restored.q_network)
        assert_same_weights(original.target_network, restored.target_network)
    assert restored.updates == original.updates == 4


def test_the_state_before_the_first_update_can_be_restored() -> None:
    original, restored = agent(seed=1), agent(seed=2)
    restored.load_state_dict(*copy.deepcopy((original.q_network.state_dict(), original.state_dict())))
    for dqn in (original, restored):
        dqn.update(minibatch())
    assert_same_weights(original.q_network, restored.q_network)


def test_the_seed_decides_weights_and_actions() -> None:
    observations, epsilon = random_observations(16, 0), np.full(16, 0.9, np.float32)
    first, again, other = agent(seed=3), agent(seed=3), agent(seed=4)
    assert_same_weights(first.q_network, again.q_network)
    assert not torch.equal(first.q_network.hidden.weight, other.q_network.hidden.weight)
    actions = first.act(observations, epsilon)
    assert torch.equal(actions, again.act(observations, epsilon))
    assert not torch.equal(actions, other.act(observations, epsilon))


# --- batch statistics --------------------------------------------------------------------------------------------


def statistics_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("param", ["bn", "mean_only_bn", "wn_mean_only_bn"])
def test_acting_uses_running_statistics_and_changes_none(param: str) -> None:
    dqn = agent(param)
    dqn.initialize(random_observations(16, 3))
    dqn.update(minibatch())
    assert not any(module.training for module in dqn.q_network.modules())
    before = statistics_of(dqn.q_network)
    states = random_observations(6, 4)
    together = dqn.q_values(states)
    alone = torch.cat([dqn.q_values(state[None]) for state in states])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    dqn.act(states, np.zeros(6, np.float32))
    assert same(before, statistics_of(dqn.q_network))


@pytest.mark.parametrize("param", ["bn", "wn_mean_only_bn"])
def test_an_update_uses_the_minibatchs_statistics_online_and_running_ones_in_the_target(param: str) -> None:
    dqn = in_float64(agent(param))
    dqn.initialize(random_observations(16, 3))
    batch = minibatch()
    online, target = copy.deepcopy(dqn.q_network), copy.deepcopy(dqn.target_network)
    running = statistics_of(dqn.target_network)
    expected = td_targets(
        batch.rewards.clamp(-1, 1).double(), batch.terminals, target.eval()(batch.next_observations), dqn.config.gamma
    ) - online.train()(batch.observations).gather(1, batch.actions[:, None]).squeeze(1)
    dqn.q_network.train()
    torch.testing.assert_close(dqn.td_loss(batch)[1], expected, rtol=1e-10, atol=1e-12)
    dqn.update(batch)
    assert same(running, statistics_of(dqn.target_network)), "the target keeps its statistics until it is copied"
    assert not same(running, statistics_of(dqn.q_network))
    dqn.copy_target()
    assert_same_weights(dqn.q_network, dqn.target_network)


def test_target_statistics_batch_lets_the_minibatch_into_the_targets() -> None:
    errors = {}
    for choice in ("running", "batch"):
        dqn = in_float64(agent("bn", target_statistics=choice, learning_rate=1e-6))
        dqn.initialize(random_observations(16, 3))
        batch = minibatch()
        other = replace(batch, next_observations=batch.next_observations.clone())
        other.next_observations[3] = random_observations(1, 9)[0]
        seen: list[Tensor] = []
        original = dqn.td_loss

        def td_loss(batch: Minibatch, original: Any = original, seen: list[Tensor] = seen) -> Any:
            found = original(batch)
            seen.append(found[1].detach())
            return found

        dqn.td_loss = td_loss  # type: ignore[method-assign]
        state = copy.deepcopy(dqn.q_network.state_dict())
        dqn.update(batch)
        dqn.q_network.load_state_dict(state)
        dqn.update(other)
        errors[choice] = (seen[0] - seen[1]).abs()
        assert not dqn.target_network.training
    # Transition 0 is not terminal: another state beside it changes its target only through batch statistics.
    assert float(errors["running"][0]) == 0.0
    assert float(errors["batch"][0]) > 1e-6


def test_joint_batches_give_both_networks_one_batch_of_both_observations() -> None:
    dqn = in_float64(agent("bn", joint_batches=True, target_statistics="batch"))
    dqn.initialize(random_observations(16, 3))
    batch = minibatch()
    both = torch.cat([batch.observations, batch.next_observations])
    q_values = copy.deepcopy(dqn.q_network).train()(both)[:5]
    next_q_values = copy.deepcopy(dqn.target_network).train()(both)[5:]
    dqn.q_network.train()
    dqn.target_network.train()
    _, td_error, q_value = dqn.td_loss(batch)
    targets = td_targets(batch.rewards.clamp(-1, 1).double(), batch.terminals, next_q_values, dqn.config.gamma)
    torch.testing.assert_close(q_value, q_values.gather(1, batch.actions[:, None]).squeeze(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(td_error, targets - q_value, rtol=1e-10, atol=1e-12)


def test_joint_batches_change_nothing_without_batch_statistics() -> None:
    losses = []
    for joint in (False, True):
        dqn = agent("wn", joint_batches=joint)
        dqn.initialize(random_observations(16, 3))
        losses.append(dqn.td_loss(minibatch())[0])
    assert torch.equal(losses[0], losses[1])


def test_projected_weights_stay_at_length_one_through_updates() -> None:
    dqn = agent("wn_projected")
    for step in range(3):
        dqn.update(minibatch(step))
    v = dqn.q_network.hidden.parametrizations.weight.original1
    torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v)))
    assert not hasattr(dqn.q_network.output, "parametrizations")


def test_unit_variance_initialization_gives_q_values_a_standard_deviation_of_one() -> None:
    states = random_observations(64, 5)
    for choice, std in (("unit-variance", 1.0), ("scaled", 0.1)):
        dqn = agent("wn", output_init=choice)
        dqn.initialize(states)
        found = dqn.q_values(states)
        torch.testing.assert_close(found.std(0, correction=0), torch.full((ACTIONS,), std), rtol=1e-3, atol=0)


def test_a_parameterization_without_a_scale_cannot_be_initialized_from_data() -> None:
    with pytest.raises(UsageError, match="data_dependent_init: 'wn_projected' has no scale"):
        agent("wn_projected", param_options={"g": "none"}, data_dependent_init=True)


def test_any_entry_may_be_initialized_from_data_or_not() -> None:
    for param in names():
        dqn = agent(param, data_dependent_init=param != "wn")
        before = weights_of(dqn.q_network)
        dqn.initialize(random_observations(16, 3))
        after = weights_of(dqn.q_network)
        assert (param == "wn") == all(torch.equal(before[key], after[key]) for key in before)
        assert_same_weights(dqn.q_network, dqn.target_network)
