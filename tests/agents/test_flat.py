"""The flat optimizer makes the steps of the plain ones, and exchanges its state with them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agents.backends.cuda_graphs.flat_optimizer import FlatOptimizer
from agents.optimizers import OptimizerName, make_optimizer
from wn_rl.config import TrainConfig

NAMES: tuple[OptimizerName, ...] = ("adamax", "adam", "rmsprop_mnih")
OPTIONS: dict[str, Any] = {"learning_rate": 1e-2, "eps": 1e-6, "beta1": 0.5, "beta2": 0.9, "rmsprop_decay": 0.95}


def configured(name: OptimizerName) -> TrainConfig:
    keys = {"eps": "optimizer_eps", "beta1": "adam_beta1", "beta2": "adam_beta2"}
    return replace(TrainConfig(), optimizer=name, **{keys.get(key, key): value for key, value in OPTIONS.items()})


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 1)).double()


def loss(network: nn.Module, seed: int) -> Tensor:
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return network(x).square().sum()


def plain_step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss(network, seed).backward()
    optimizer.step()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_one_step_of_adamax_by_hand() -> None:
    """m = ½·0 + ½·2 = 1, u = max(0, 2) = 2, step = 0.1 / (1 − ½) · 1/2 = 0.1; the second element's ∇ is 0."""
    parameter = nn.Parameter(torch.tensor([1.0, 5.0], dtype=torch.float64))
    flat = FlatOptimizer("adamax", [parameter], **(OPTIONS | {"learning_rate": 0.1, "eps": 1e-300}))
    flat.minimize(2.0 * parameter[0])
    assert parameter.tolist() == pytest.approx([0.9, 5.0], rel=1e-15)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0, 0.0]
    # Then ∇ = −4: m = ½·1 − ½·4 = −1.5, u = max(0.9·2, 4) = 4, step = −0.1 / (1 − ¼) · 1.5/4 = −0.05.
    flat.minimize(-4.0 * parameter[0])
    assert parameter.tolist() == pytest.approx([0.95, 5.0], rel=1e-15)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 6), handed_over=st.integers(0, 6))
def test_steps_and_state_are_the_plain_optimizers(name: OptimizerName, steps: int, handed_over: int) -> None:
    ours, theirs = model(), model()
    flat = FlatOptimizer(name, ours.parameters(), **OPTIONS)
    plain = make_optimizer(configured(name), theirs.parameters())
    for step in range(steps):
        if step == handed_over:  # each goes on from the other's state
            of_flat, of_plain = copy.deepcopy(flat.state_dict()["state"]), copy.deepcopy(plain.state_dict()["state"])
            groups = plain.state_dict()["param_groups"]
            flat.load_state_dict({"state": of_plain, "param_groups": groups})
            plain.load_state_dict({"state": of_flat, "param_groups": groups})
        flat.minimize(loss(ours, step))
        plain_step(theirs, plain, step)
        assert_same(ours, theirs)
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-11, atol=1e-13)
    found, expected = flat.state_dict()["state"], plain.state_dict()["state"]
    assert found.keys() == expected.keys()
    for index, moments in expected.items():
        assert found[index].keys() == moments.keys()
        for key, value in moments.items():
            torch.testing.assert_close(found[index][key].double(), value.double(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaves_its_place(name: OptimizerName) -> None:
    network = model()
    flat = FlatOptimizer(name, network.parameters(), **OPTIONS)
    before = [parameter.data_ptr() for parameter in network.parameters()]
    flat.minimize(loss(network, 0))
    gradients = [parameter.grad.data_ptr() for parameter in network.parameters() if parameter.grad is not None]
    saved, weights = copy.deepcopy(flat.state_dict()), copy.deepcopy(network.state_dict())
    flat.minimize(loss(network, 1))
    after_two = copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    flat.load_state_dict(saved)
    assert all(parameter.grad is None for parameter in network.parameters()), "as before the first step"
    flat.minimize(loss(network, 1))
    for key, value in network.state_dict().items():
        assert torch.equal(value, after_two[key])
    assert [parameter.data_ptr() for parameter in network.parameters()] == before
    assert [parameter.grad.data_ptr() for parameter in network.parameters() if parameter.grad is not None] == gradients
    assert all(pointer % 16 == 0 for pointer in before), "vector loads and cuDNN want whole blocks"


def test_state_before_the_first_step_and_of_another_optimizer() -> None:
    network = model()
    flat = FlatOptimizer("adamax", network.parameters(), **OPTIONS)
    assert flat.state_dict()["state"] == {}
    flat.minimize(loss(network, 0))
    other = FlatOptimizer("adam", model().parameters(), **OPTIONS)
    with pytest.raises(KeyError, match="exp_avg_sq"):
        other.load_state_dict(flat.state_dict())
    flat.load_state_dict({"state": {}, "param_groups": []})
    assert flat.state_dict()["state"] == {}


def test_a_parameter_that_the_loss_does_not_use_has_a_gradient_of_zero() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    flat = FlatOptimizer("adamax", [used, unused], **OPTIONS)
    flat.minimize(used.sum())
    assert unused.tolist() == [1.0, 1.0]
    assert used[0] < 1.0
