"""Diagnostics have the values worked out by hand, and looking at a network changes nothing in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wn_rl.diagnostics import (
    DIAGNOSTIC_TAGS,
    DORMANT_FRACTION,
    Q_NOISE,
    SRANK,
    batch_noise,
    collect,
    discounted_returns,
    dormant_fraction,
    dormant_fractions,
    effective_learning_rate_tags,
    effective_learning_rates,
    gradient_norms,
    layer_norms,
    layer_tag,
    meaning,
    overestimation,
    srank,
    weights,
)
from wn_rl.networks import QNetwork, QNetworkSpec, build_q_network
from wn_rl.parameterizations import get, names, reparameterize

LAYERS = ("convolutions.0", "convolutions.1", "convolutions.2", "hidden", "output")
V_AND_G = {
    "standard": (False, False),
    "wn": (True, True),
    "mean_only_bn": (False, False),
    "wn_mean_only_bn": (True, True),
    "bn": (False, True),
    "ln": (False, True),
    "sn": (True, False),
    "wn_projected": (True, True),
}
"""Which entries have a v and a g in the hidden layer."""


def linear(weight: list[list[float]]) -> nn.Linear:
    """A layer with these weights and no bias, in double precision."""
    values = torch.tensor(weight, dtype=torch.float64)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


def observations(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=generator)


def small_network(name: str = "standard", **options: Any) -> QNetwork:
    """The full convolutions and 12 hidden units, in double precision."""
    return build_q_network(QNetworkSpec(4, name, hidden_units=12, **options), seed=0).double()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that looking at a network could change."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "addresses": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: object, after: object) -> None:
    """Bitwise equality of nested dictionaries of tensors and plain values."""
    if isinstance(before, dict):
        assert isinstance(after, dict)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert_same(value, after[key])
    elif isinstance(before, Tensor):
        assert isinstance(after, Tensor)
        assert torch.equal(before, after)
    else:
        assert before == after


# --- weights and gradients ---------------------------------------------------------------------------------------


def test_norms_of_a_plain_layer_are_of_the_whole_layer() -> None:
    assert layer_norms(nn.Sequential(linear([[1.0, 2.0], [2.0, 4.0]]))) == {"0": {"w_norm": 5.0}}


def test_every_linear_and_convolution_counts_and_nothing_else() -> None:
    model = nn.Sequential(
        nn.Embedding(3, 2), nn.Conv1d(1, 2, 3), nn.ReLU(), nn.BatchNorm1d(2), nn.ConvTranspose2d(2, 3, 2), nn.GRU(2, 2)
    )
    with torch.no_grad():
        nn.init.constant_(model[1].weight, 2.0)  # type: ignore[arg-type]
        nn.init.constant_(model[4].weight, 1.0)  # type: ignore[arg-type]
    norms = layer_norms(model)
    assert set(norms) == set(gradient_norms(model)) == set(weights(model)) == {"1", "4"}
    assert norms["1"]["w_norm"] == pytest.approx(math.sqrt(1 * 2 * 3 * 4))
    assert norms["4"]["w_norm"] == pytest.approx(math.sqrt(2 * 3 * 2 * 2))


@pytest.mark.parametrize("g", ["direct", "exp"])
def test_norms_with_weight_normalization(g: str) -> None:
    """V = [[3, 4], [0, 2]] with ‖v‖² = 29; g = (2, 6), so ‖w‖² = 40 and the mean of g is 4."""
    layer = reparameterize(linear([[3.0, 4.0], [0.0, 2.0]]), "wn", g=g)
    slot: Any = layer.parametrizations["weight"]  # type: ignore[index]
    with torch.no_grad():
        scale = torch.tensor([[2.0], [6.0]], dtype=torch.float64)
        slot.original0.copy_(scale.log() if g == "exp" else scale)
    norms = layer_norms(layer)[""]
    assert norms == pytest.approx({"w_norm": math.sqrt(40), "v_norm": math.sqrt(29), "g_mean": 4.0})


def test_the_mean_of_g_is_of_its_absolute_value() -> None:
    layer = reparameterize(linear([[3.0, 4.0], [0.0, 2.0]]), "wn")
    slot: Any = layer.parametrizations["weight"]  # type: ignore[index]
    with torch.no_grad():
        slot.original0.copy_(torch.tensor([[-2.0], [6.0]]))
    assert layer_norms(layer)[""]["g_mean"] == 4.0


def test_norms_of_projected_weights() -> None:
    """Two units of length 5 and 1: ‖v‖² = 1 + 1."""
    layer = reparameterize(linear([[3.0, 4.0], [0.0, 1.0]]), "wn_projected")
    assert layer_norms(layer)[""] == pytest.approx(
        {"w_norm": math.sqrt(26), "v_norm": math.sqrt(2), "g_mean": (5 + 1) / 2}
    )
    layer = reparameterize(linear([[3.0, 4.0], [0.0, 1.0]]), "wn_projected", g="none")
    assert layer_norms(layer)[""] == pytest.approx({"w_norm": math.sqrt(2), "v_norm": math.sqrt(2)})


@pytest.mark.parametrize("name", ["bn", "ln"])
def test_the_gain_counts_as_g_and_is_no_part_of_w(name: str) -> None:
    layer = reparameterize(linear([[3.0, 4.0], [0.0, 0.0]]), name)
    normalization: Any = layer.normalization
    with torch.no_grad():
        normalization.gain.copy_(torch.tensor([-1.0, 4.0]))
    assert layer_norms(layer)[""] == pytest.approx({"w_norm": 5.0, "g_mean": 2.5})


def test_norms_with_spectral_normalization_leave_its_power_iteration_alone() -> None:
    """σ of diag(3, 1) is 3, so w = diag(1, ⅓)."""
    torch.manual_seed(0)
    layer = reparameterize(linear([[3.0, 0.0], [0.0, 1.0]]), "sn", iterations=3).train()
    slot: Any = layer.parametrizations["weight"]  # type: ignore[index]
    slot[0].eval()
    assert layer_norms(layer)[""] == pytest.approx({"w_norm": math.sqrt(10) / 3, "v_norm": math.sqrt(10)})
    slot.train()
    with torch.no_grad():
        slot.original.copy_(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))  # the buffers are those of another matrix now
    before = snapshot(layer)
    layer_norms(layer)
    effective_learning_rates(weights(layer), layer)
    assert_same(before, snapshot(layer))
    assert layer.weight is not None  # read in training mode it does advance
    assert not torch.equal(slot[0].running_u, before["state"]["parametrizations.weight.0.running_u"])


@settings(deadline=None, max_examples=50)
@given(
    v=st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=5),
    g=st.floats(-10, 10),
)
def test_a_weight_normalized_unit_has_the_length_of_g(v: list[float], g: float) -> None:
    layer = reparameterize(linear([v]), "wn")
    slot: Any = layer.parametrizations["weight"]  # type: ignore[index]
    with torch.no_grad():
        slot.original0.fill_(g)
    norms = layer_norms(layer)[""]
    assert norms["w_norm"] == pytest.approx(abs(g))
    assert norms["g_mean"] == abs(g)
    assert norms["v_norm"] == pytest.approx(math.hypot(*v))


def test_gradient_norms_are_over_all_that_a_layer_trains() -> None:
    model = nn.Sequential(linear([[1.0, 0.0]]), nn.Linear(1, 1, dtype=torch.float64), nn.Linear(1, 1))
    assert all(math.isnan(norm) for norm in gradient_norms(model).values())
    model[0].weight.grad = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    model[1].weight.grad = torch.tensor([[3.0]], dtype=torch.float64)
    model[1].bias.grad = torch.tensor([4.0], dtype=torch.float64)
    norms = gradient_norms(model)
    assert norms["0"] == 2.0
    assert norms["1"] == 5.0
    assert math.isnan(norms["2"])


@pytest.mark.parametrize("name", names())
def test_the_layers_gradient_norms_make_up_the_networks(name: str) -> None:
    network = small_network(name)
    network(observations(3)).square().sum().backward()
    whole = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    norms = gradient_norms(network)
    assert tuple(norms) == LAYERS
    assert math.hypot(*norms.values()) == pytest.approx(float(whole))


def test_the_effective_learning_rate_is_the_relative_change() -> None:
    changed, kept, zero = linear([[3.0, 4.0]]), linear([[1.0]]), linear([[0.0]])
    model = nn.Sequential(changed, kept, zero)
    before = weights(model)
    with torch.no_grad():
        changed.weight.add_(torch.tensor([[0.3, -0.4]]))
        zero.weight.add_(1.0)
    rates = effective_learning_rates(before, model)
    assert rates["0"] == pytest.approx(0.1)
    assert rates["1"] == 0.0
    assert math.isnan(rates["2"]), "no relative change of nothing"


def test_effective_learning_rates_are_of_w_not_of_what_is_trained() -> None:
    layer = reparameterize(linear([[3.0, 4.0], [1.0, 1.0]]), "wn")
    slot: Any = layer.parametrizations["weight"]  # type: ignore[index]
    before = weights(layer)
    with torch.no_grad():
        slot.original1.mul_(7.0)
    assert effective_learning_rates(before, layer)[""] == pytest.approx(0.0, abs=1e-15)
    with torch.no_grad():
        slot.original0.mul_(3.0)
    assert effective_learning_rate_tags(before, layer) == {"layers//effective_learning_rate": pytest.approx(2.0)}


def test_weights_are_copies() -> None:
    layer = linear([[1.0]])
    before = weights(layer)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    assert before[""].item() == 1.0
    assert not before[""].requires_grad


# --- dormant units -----------------------------------------------------------------------------------------------


def test_dormant_units_by_hand() -> None:
    """Mean |h| = 0, 1, 0.02 and 2.98, so their mean is 1 and the scores are the same numbers."""
    activations = torch.tensor([[0.0, 2.0, 0.04, 2.98], [0.0, 0.0, 0.0, -2.98]])
    assert dormant_fraction(activations) == 0.5
    assert dormant_fraction(activations, 0.01) == 0.25
    assert dormant_fraction(activations, 0.0) == 0.25
    assert dormant_fraction(activations, 1.5) == 0.75


def test_the_threshold_itself_is_dormant() -> None:
    assert dormant_fraction(torch.tensor([[0.5, 1.5]]), 0.5) == 0.5


def test_a_layer_of_zeros_is_all_dormant() -> None:
    assert dormant_fraction(torch.zeros(3, 5)) == 1.0
    assert dormant_fraction(torch.zeros(3, 5, 2, 2), 0.0) == 1.0


def test_a_convolutions_unit_is_a_channel() -> None:
    """One active pixel of 100 wakes its channel: mean 0.01 of 0.505 on average is a score of 0.0198."""
    activations = torch.zeros(1, 2, 10, 10)
    activations[:, 0] = 1.0
    activations[0, 1, 3, 7] = 1.0
    assert dormant_fraction(activations) == 0.5
    assert dormant_fraction(activations, 0.0199) == 0.5
    assert dormant_fraction(activations, 0.0198) == 0.0


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.lists(st.floats(0, 10, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    exponent=st.integers(-20, 20),
    threshold=st.floats(0, 1),
)
def test_the_dormant_fraction_is_one_and_the_scale_does_not_matter(
    values: list[list[float]], exponent: int, threshold: float
) -> None:
    """Scaled by a power of two, which rounds nothing."""
    activations = torch.tensor(values, dtype=torch.float64)
    fraction = dormant_fraction(activations, threshold)
    assert 0.0 <= fraction <= 1.0
    assert dormant_fraction(activations * 2.0**exponent, threshold) == fraction
    assert dormant_fraction(activations, threshold / 2) <= fraction


@pytest.mark.parametrize("name", names())
def test_dormant_fractions_are_of_the_hidden_layers_after_their_relu(name: str) -> None:
    network = small_network(name).eval()
    x = observations(4)
    h = x.double() / 255
    expected = {}
    with torch.no_grad():
        for layer_name in LAYERS[:-1]:
            layer = network.get_submodule(layer_name)
            h = torch.relu(layer(h.flatten(1) if layer_name == "hidden" else h))
            expected[layer_name] = dormant_fraction(h, 0.3)
    dormant = sum(expected[n] * units for n, units in zip(LAYERS[:-1], (32, 64, 64, 12), strict=True))
    fractions = dormant_fractions(network, x, 0.3)
    assert fractions == pytest.approx(expected | {"all": dormant / (32 + 64 + 64 + 12)})
    assert fractions["all"] > 0


def test_a_dead_layer_shows() -> None:
    network = small_network()
    with torch.no_grad():
        network.hidden.bias.fill_(-1e6)
    fractions = dormant_fractions(network, observations(2))
    assert fractions["hidden"] == 1.0
    assert fractions["all"] >= 12 / (32 + 64 + 64 + 12)


def test_an_error_leaves_no_hooks_and_the_modes() -> None:
    network = small_network("bn").train()
    network.hidden.eval()
    before = snapshot(network)
    with pytest.raises(RuntimeError):
        dormant_fractions(network, observations(2)[:, :3])
    with pytest.raises(RuntimeError):
        batch_noise(network.eval(), observations(2), [observations(2)[:, :3]] * 2)
    network.train()
    network.hidden.eval()
    assert_same(before, snapshot(network))


# --- effective rank ----------------------------------------------------------------------------------------------


def test_effective_rank_by_hand() -> None:
    """Singular values 3 and 1: the first is 75 % of the sum."""
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert srank(features) == srank(features.T) == 2
    assert srank(features, 0.24) == 2
    assert srank(features, 0.26) == 1
    assert srank(torch.eye(100)) == 99, "99 of 100 equal singular values are 1 − 0.01 of their sum"
    assert srank(torch.eye(100), 0.0) == 100
    assert srank(torch.ones(7, 5)) == 1


def test_a_matrix_of_zeros_has_effective_rank_0() -> None:
    assert srank(torch.zeros(4, 3)) == 0
    assert srank(torch.zeros(0, 3)) == 0


def test_the_effective_rank_of_a_float32_matrix_of_low_rank_is_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(512, 3, generator=generator), torch.randn(3, 128, generator=generator)
    assert srank(left @ right) == 3


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    seed=st.integers(0, 1000),
    rank=st.integers(0, 6),
    exponent=st.integers(-20, 20),
    delta=st.floats(0, 0.9),
)
def test_the_effective_rank_is_at_most_the_rank_and_the_scale_does_not_matter(
    rows: int, columns: int, seed: int, rank: int, exponent: int, delta: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    features = left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    effective = srank(features, delta + 1e-9)
    assert (effective == 0) == (rank == 0)
    assert 0 <= effective <= min(rows, columns, rank)
    assert srank(features * 2.0**exponent, delta + 1e-9) == effective
    assert srank(features, min(delta + 0.05, 1.0)) <= effective


# --- noise across minibatches ------------------------------------------------------------------------------------


def test_noise_across_minibatches_by_hand() -> None:
    """t − μ for t = 0 beside 2, then beside 6: −1 and −3, which deviate by √2 (n − 1)."""
    layer = reparameterize(linear([[1.0]]), "mean_only_bn")
    state = torch.zeros(1, 1, dtype=torch.float64)
    minibatches = [torch.full((1, 1), y, dtype=torch.float64) for y in (2.0, 6.0)]
    assert batch_noise(layer, state, minibatches) == pytest.approx(math.sqrt(2))
    assert batch_noise(layer.eval(), state, minibatches) == pytest.approx(math.sqrt(2)), "in training mode all the same"
    assert not layer.training
    assert batch_noise(layer, state, minibatches[:1] * 3) == 0.0


def test_noise_is_the_mean_over_states_and_actions() -> None:
    """Two outputs, the second three times the first."""
    layer = reparameterize(linear([[1.0], [3.0]]), "mean_only_bn")
    state = torch.zeros(1, 1, dtype=torch.float64)
    minibatches = [torch.full((1, 1), y, dtype=torch.float64) for y in (2.0, 6.0)]
    assert batch_noise(layer, state, minibatches) == pytest.approx(2 * math.sqrt(2))


@pytest.mark.parametrize("name", names())
def test_only_batch_statistics_make_noise(name: str) -> None:
    network = small_network(name)
    minibatches = [observations(5, seed) // (1 + seed) for seed in range(3)]
    before = snapshot(network)
    noise = batch_noise(network, observations(2, seed=9), minibatches)
    assert_same(before, snapshot(network))
    assert noise == 0.0 if get(name).batch_independent else noise > 1e-6


def test_noise_needs_minibatches_that_can_be_compared() -> None:
    layer, state = linear([[1.0]]), torch.zeros(1, 1, dtype=torch.float64)
    for minibatches in ([], [state], [state, torch.zeros(2, 1, dtype=torch.float64)]):
        with pytest.raises(ValueError, match="two or more of the same shape"):
            batch_noise(layer, state, minibatches)


# --- overestimation ----------------------------------------------------------------------------------------------


def test_discounted_returns_by_hand() -> None:
    assert discounted_returns([1.0, 0.0, 2.0], 0.5).tolist() == [1.5, 1.0, 2.0]
    assert discounted_returns(torch.tensor([1, -1]), 0.9).tolist() == pytest.approx([0.1, -1.0])
    assert discounted_returns([], 0.9).shape == (0,)


def test_overestimation_by_hand() -> None:
    """Returns 1.5, 1, 2 and, in the second episode, 1.5, 1: their mean is 1.4; that of max-Q is 2."""
    rewards, ends = [1, 0, 2, 1, 1], [False, False, True, False, True]
    assert overestimation([2.0] * 5, rewards, ends, 0.5) == pytest.approx(0.6)
    arrays = np.full(5, 1, dtype=np.float32), np.array(rewards), np.array(ends)
    assert overestimation(*arrays, 0.5) == pytest.approx(-0.4)
    assert overestimation(torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool), 0.99) == -1.0
    assert math.isnan(overestimation([], [], [], 0.99))


def test_an_incomplete_episode_is_refused() -> None:
    with pytest.raises(ValueError, match="not complete"):
        overestimation([1.0, 1.0], [0.0, 0.0], [True, False], 0.9)
    with pytest.raises(ValueError, match="one shape"):
        overestimation([1.0, 1.0], [0.0], [True], 0.9)


@settings(deadline=None, max_examples=60)
@given(
    episodes=st.lists(st.lists(st.integers(-1, 1), min_size=1, max_size=6), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    bias=st.floats(-5, 5),
)
def test_true_values_are_no_overestimation_and_a_bias_shows(
    episodes: list[list[int]], gamma: float, bias: float
) -> None:
    returns = [sum(gamma**k * r for k, r in enumerate(e[t:])) for e in episodes for t in range(len(e))]
    rewards = [reward for episode in episodes for reward in episode]
    ends = [t == len(episode) - 1 for episode in episodes for t in range(len(episode))]
    assert overestimation([g + bias for g in returns], rewards, ends, gamma) == pytest.approx(bias, abs=1e-12)


# --- all together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_collecting_changes_nothing_and_everything_has_a_value(name: str) -> None:
    network = small_network(name)
    network(observations(3)).square().sum().backward()
    network.train()
    network.convolutions[1].eval()  # a mode of its own, to be found again
    before = snapshot(network)
    values = collect(network, observations(6), [observations(4, seed) for seed in (1, 2)])
    assert_same(before, snapshot(network))
    assert all(math.isfinite(value) for value in values.values())
    assert all(isinstance(value, float) and meaning(tag) for tag, value in values.items())
    assert {layer_tag(layer, quantity) for layer in LAYERS for quantity in ("w_norm", "gradient_norm")} <= set(values)
    assert (layer_tag("hidden", "v_norm") in values, layer_tag("hidden", "g_mean") in values) == V_AND_G[name]
    assert 1 <= values[SRANK] <= 6
    assert values[DORMANT_FRACTION] == dormant_fractions(network, observations(6))["all"]
    assert (values[Q_NOISE] == 0.0) == get(name).batch_independent


def test_collecting_between_updates_changes_no_update() -> None:
    def trained(look: bool) -> dict[str, Tensor]:
        network = small_network("sn")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for seed in range(2):
            network.train()
            optimizer.zero_grad()
            loss = network(observations(3, seed)).square().mean()
            if look:
                collect(network, observations(4), [observations(4, 1)] * 2)
            loss.backward()
            optimizer.step()
        return network.state_dict()

    assert_same(trained(look=False), trained(look=True))


def test_what_is_not_known_is_nan() -> None:
    network = small_network()
    with torch.no_grad():
        next(network.convolutions[0].parameters())[0, 0, 0, 0] = math.nan
    values = collect(network, observations(2), [])
    unknown = {tag for tag, value in values.items() if math.isnan(value)}
    assert unknown == {
        *(layer_tag(layer, "gradient_norm") for layer in LAYERS),
        layer_tag("convolutions.0", "w_norm"),
        DORMANT_FRACTION,
        SRANK,
        Q_NOISE,
    }


def test_tags_name_what_they_hold() -> None:
    assert layer_tag("convolutions.0", "v_norm") == "layers/convolutions.0/v_norm"
    assert meaning("layers/convolutions.0/v_norm") == DIAGNOSTIC_TAGS["layers/LAYER/v_norm"]
    assert set(DIAGNOSTIC_TAGS) == {
        *(f"layers/LAYER/{q}" for q in ("v_norm", "g_mean", "w_norm", "gradient_norm", "effective_learning_rate")),
        *(f"diagnostics/{q}" for q in ("dormant_fraction", "srank", "q_noise_across_minibatches", "overestimation")),
    }
    with pytest.raises(KeyError):
        layer_tag("hidden", "nosuch")
    for tag in ("layers/w_norm", "layers/hidden/nosuch", "diagnostics/nosuch", "other/hidden/w_norm", ""):
        with pytest.raises(KeyError):
            meaning(tag)
