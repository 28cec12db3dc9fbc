"""The optimizers' steps equal their papers' formulas, worked out in plain Python floats."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from agents.optimizers import CompiledAdamax, OptimizerName, RMSpropMnih, make_optimizer
from tests.carried import carried
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.parameterizations import reparameterize
from wn_rl.replay import Minibatch

START = [1.0, -2.0, 0.5]
GRADIENTS = [[3.0, -0.5, 0.0], [-1.0, -4.0, 0.25]]
"""Of two steps, one entry per parameter: signs that change and stay, and a first gradient of zero."""


def named(
    name: OptimizerName, *, learning_rate: float = 0.01, eps: float = 0.01
) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes the optimizer called ``name``; β1 = 0.5, β2 = 0.999, RMSProp's decay 0.95."""
    config = replace(TrainConfig(), optimizer=name, learning_rate=learning_rate, optimizer_eps=eps, adam_beta1=0.5)
    return lambda params: make_optimizer(replace(config, adam_beta2=0.999, rmsprop_decay=0.95), params)


def after_each_step(make: Callable[..., torch.optim.Optimizer]) -> list[list[float]]:
    """Apply ``GRADIENTS`` one after the other to ``START`` and return the parameters after each step."""
    parameter = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = make([parameter])
    seen = []
    for gradient in GRADIENTS:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        seen.append(parameter.tolist())
    return seen


def rmsprop_by_hand(learning_rate: float) -> list[list[float]]:
    """Mnih et al. 2015: Δ = lr · ∇ / √(E[∇²] − E[∇]² + 0.01), both averages 0.95·old + 0.05·new, from 0."""
    after_first, after_second = [], []
    for start, first, second in zip(START, *GRADIENTS, strict=True):
        mean = 0.05 * first
        square = 0.05 * first * first
        once = start - learning_rate * first / math.sqrt(square - mean * mean + 0.01)
        mean = 0.95 * mean + 0.05 * second
        square = 0.95 * square + 0.05 * second * second
        twice = once - learning_rate * second / math.sqrt(square - mean * mean + 0.01)
        after_first.append(once)
        after_second.append(twice)
    return [after_first, after_second]


def test_rmsprop_takes_two_steps_of_mnihs_rule() -> None:
    steps = after_each_step(lambda params: RMSpropMnih(params, 0.02))
    for found, expected in zip(steps, rmsprop_by_hand(0.02), strict=True):
        assert found == pytest.approx(expected, rel=1e-14)


def test_rmsprops_first_step_is_this_number() -> None:
    """With ∇ = 3: mean 0.15, square 0.45, variance + 0.01 = 0.4375, so Δ = 3 · 0.01 / 0.661438 = 0.0453557."""
    first = after_each_step(named("rmsprop_mnih"))[0]
    assert first[0] == pytest.approx(1.0 - 0.04535573676110727, rel=1e-14)
    assert first[2] == START[2], "no gradient, no step"


def test_rmsprop_is_not_torchs_centred_rmsprop() -> None:
    torchs = after_each_step(lambda params: torch.optim.RMSprop(params, 0.01, alpha=0.95, eps=0.01, centered=True))
    ours = after_each_step(named("rmsprop_mnih"))
    assert ours == [pytest.approx(step, rel=1e-14) for step in rmsprop_by_hand(0.01)]
    assert torchs[0][1] != pytest.approx(ours[0][1], rel=1e-5)


def test_rmsprop_returns_the_closures_loss_and_skips_what_has_no_gradient() -> None:
    trained, untouched = (nn.Parameter(torch.tensor([2.0])) for _ in range(2))
    optimizer = RMSpropMnih([trained, untouched], 0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = trained.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert trained.item() < 2.0
    assert untouched.item() == 2.0
    assert untouched not in optimizer.state


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.01])
def test_adamax_takes_two_steps_of_kingma_and_bas_rule(eps: float) -> None:
    """Section 7.1: m = β1 m + (1 − β1) ∇, u = max(β2 u, |∇|), Δ = lr / (1 − β1ᵗ) · m / u; torch adds ε to |∇|."""
    found = after_each_step(named("adamax", learning_rate=0.03, eps=eps))
    for unit, (start, first, second) in enumerate(zip(START, *GRADIENTS, strict=True)):
        if first == 0.0 and eps == 0.0:
            continue  # 0 / 0
        m = 0.5 * first
        u = abs(first) + eps
        once = start - 0.03 / (1 - 0.5) * m / u
        m = 0.5 * m + 0.5 * second
        u = max(0.999 * u, abs(second) + eps)
        twice = once - 0.03 / (1 - 0.25) * m / u
        assert [step[unit] for step in found] == pytest.approx([once, twice], rel=1e-14)


def test_adamaxs_steps_are_these_numbers() -> None:
    """∇ = 3, −1: m = 1.5, 0.25; u = 3, 2.997; Δ = 0.01 · (1.5/3)/0.5 = 0.01, then 0.01 · (0.25/2.997)/0.75."""
    found = [step[0] for step in after_each_step(named("adamax", eps=0.0))]
    assert found == pytest.approx([0.99, 0.99 - 0.0011122233344456], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamax", torch.optim.Adamax, {"lr": 0.07, "betas": (0.5, 0.999), "eps": 1e-3}),
        ("adam", torch.optim.Adam, {"lr": 0.07, "betas": (0.5, 0.999), "eps": 1e-3}),
        ("rmsprop_mnih", RMSpropMnih, {"lr": 0.07, "decay": 0.95, "eps": 1e-3}),
    ],
)
def test_each_name_gives_its_optimizer_with_its_options(
    name: OptimizerName, kind: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    optimizer = named(name, learning_rate=0.07, eps=1e-3)([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in options} == options
    assert group.get("weight_decay", 0) == 0


@pytest.mark.parametrize("gradient", [3.7, 37.3, 1000.3])
def test_rmsprop_survives_a_variance_that_rounds_below_zero(gradient: float) -> None:
    """A constant gradient in float32 with a tiny epsilon: E[g²] − E[g]² comes out negative now and then."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = RMSpropMnih([parameter], lr=1e-4, eps=1e-8)
    for _ in range(600):
        parameter.grad = torch.full((1,), gradient)
        optimizer.step()
    assert bool(parameter.isfinite().all())


# --- the compiled Adamax -----------------------------------------------------------------------------------------


def two_layers(param: str) -> nn.Module:
    torch.manual_seed(0)
    return reparameterize(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), param)


def as_written(function: Any, **_: object) -> Any:
    """Stand in for ``torch.compile``: the same function, not compiled."""
    return function


@pytest.mark.parametrize("param", ["standard", "wn", "bn"])
def test_the_one_pass_equals_torchs_adamax_and_leaves_whole_gradients(
    param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", as_written)
    ours, torchs = two_layers(param), two_layers(param)
    adamaxes = [torch.optim.Adamax(model.parameters(), 0.01, (0.5, 0.999), 1e-8) for model in (ours, torchs)]
    assert CompiledAdamax.replaces(adamaxes[0])
    optimizers = (CompiledAdamax.like(adamaxes[0]), adamaxes[1])
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
        for model, optimizer in zip((ours, torchs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=name)

    # Both read each other's state and go on alike.
    first, second = copy.deepcopy(optimizers[0].state_dict()), copy.deepcopy(optimizers[1].state_dict())
    optimizers[0].load_state_dict(second)
    optimizers[1].load_state_dict(first)
    for model, optimizer in zip((ours, torchs), optimizers, strict=True):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_code_gives_the_same_updates_of_a_whole_agent() -> None:
    """In float32 on the full network; compiling takes some 10 s."""
    x = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Minibatch(x[:4], torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 0, -1, 0]), x[4:], torch.zeros(4).bool())
    agents = []
    for choice in ("on", "off"):
        config = resolve(replace(load("paper"), game="breakout", param="ln", compile=choice, backend="eager"))
        agent = carried(replace(config, device="cpu", precision="float32"))
        agent.initialize(x)
        for _ in range(5):
            agent.update(batch)
        agents.append(agent)
    assert agents[0].backend.name == agents[1].backend.name == "eager"
    assert isinstance(agents[0].optimizer, CompiledAdamax)
    for (name, mine), theirs in zip(
        agents[0].q_network.named_parameters(), agents[1].q_network.parameters(), strict=True
    ):
        off = float(((mine - theirs).norm() / theirs.norm()).detach())
        assert off < 2e-5, name
    # A copy that is loaded from the state goes on to the last bit.
    resumed = carried(agents[0].config)
    resumed.load_state_dict(copy.deepcopy(agents[0].q_network.state_dict()), copy.deepcopy(agents[0].state_dict()))
    for agent in (agents[0], resumed):
        agent.update(batch)
    for mine, theirs in zip(agents[0].q_network.parameters(), resumed.q_network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    agents[1].update(batch)
    assert agents[0].gradient_norm() == pytest.approx(agents[1].gradient_norm(), rel=1e-3)
