"""The Q-network has the size, initial weights and arithmetic of its spec, and a damaged spec is one clear error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wn_rl.errors import CheckpointError
from wn_rl.networks import MAX_PARAMETERS, QNetwork, QNetworkSpec, WeightInit, build_q_network
from wn_rl.parameterizations import names
from wn_rl.parameterizations.base import bias_of

PARAMETERS = {
    "convolutions.0": 32 * 4 * 8 * 8 + 32,
    "convolutions.1": 64 * 32 * 4 * 4 + 64,
    "convolutions.2": 64 * 64 * 3 * 3 + 64,
    "hidden": 64 * 7 * 7 * 512 + 512,  # 84 → 20 → 9 → 7 pixels
    "output": 512 * 4 + 4,
}
"""Of the network of Mnih et al. 2015 for 4 actions."""
FAN_IN = {"convolutions.0": 256, "convolutions.1": 512, "convolutions.2": 576, "hidden": 3136, "output": 512}


def layers(network: QNetwork) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def random_observations(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=generator)


# --- size and arithmetic -----------------------------------------------------------------------------------------


def test_the_standard_network_has_the_parameters_counted_by_hand() -> None:
    assert sum(PARAMETERS.values()) == 8_224 + 32_832 + 36_928 + 1_606_144 + 2_052 == 1_686_180
    network = build_q_network(QNetworkSpec(4), seed=0)
    assert {n: sum(p.numel() for p in layer.parameters()) for n, layer in layers(network).items()} == PARAMETERS
    assert sum(p.numel() for p in network.parameters()) == 1_686_180


def test_weight_normalization_adds_one_parameter_per_output_unit() -> None:
    network = build_q_network(QNetworkSpec(4, "wn"), seed=0)
    assert sum(p.numel() for p in network.parameters()) == 1_686_180 + 32 + 64 + 64 + 512 + 4


def test_strides_and_input_channels_are_the_papers() -> None:
    network = build_q_network(QNetworkSpec(6), seed=0)
    convolutions = [layer for layer in layers(network).values() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in convolutions] == [
        (4, 32, (8, 8), (4, 4), (0, 0)),
        (32, 64, (4, 4), (2, 2), (0, 0)),
        (64, 64, (3, 3), (1, 1), (0, 0)),
    ]
    assert network(random_observations(2)).shape == (2, 6)


def test_a_network_of_two_units_is_worked_out_by_hand() -> None:
    """Q = 3 · relu(2 · x/255 − 0.5) − 1 for x = 51 and 255, and the ReLU cuts off x = 0."""
    spec = QNetworkSpec(1, observation_shape=(1, 1, 1), convolutions=(), hidden_units=1)
    network = build_q_network(spec, seed=0)
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), (2.0, -0.5, 3.0, -1.0), strict=True):
            parameter.fill_(value)
    q_values = network(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1))
    assert q_values.shape == (3, 1)
    assert q_values.flatten().tolist() == pytest.approx([-1.0, -1.0, 3.5])


@pytest.mark.parametrize("name", names())
def test_under_autocast_the_q_values_are_float32_and_close(name: str) -> None:
    network = build_q_network(QNetworkSpec(4, name, hidden_units=64), seed=0).eval()
    x = random_observations(3)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x)
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact), "autocast changed nothing"
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_the_output_layer_is_not_rounded_under_autocast() -> None:
    """A bfloat16 has 8 significant bits: 1 + 2⁻¹² is none."""
    spec = QNetworkSpec(2, observation_shape=(1, 1, 1), convolutions=(), hidden_units=1)
    network = build_q_network(spec, seed=0)
    with torch.no_grad():
        for parameter, values in zip(network.parameters(), ([[1.0]], [0.0], [[1.0], [1 + 2**-12]], [0.0]), strict=True):
            parameter.copy_(torch.tensor(values))
        with torch.autocast("cpu", torch.bfloat16):
            q_values = network(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8))
    assert q_values.tolist() == [[1.0, 1 + 2**-12]]


# --- initial weights ---------------------------------------------------------------------------------------------


def assert_uniform(weight: Tensor, bound: float) -> None:
    """``weight`` fills ±bound: its extremes come near it and its deviation is bound/√3."""
    assert weight.abs().max().item() <= bound
    assert weight.abs().max().item() > bound * (1 - 20 / weight.numel())
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=3 / math.sqrt(weight.numel()))
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel())


def test_he_uniform_with_gain_1_and_bias_one_tenth() -> None:
    network = build_q_network(QNetworkSpec(4, weight_init="he"), seed=0)
    for name, layer in layers(network).items():
        assert_uniform(layer.weight, math.sqrt(3 / FAN_IN[name]))
        assert bool((layer.bias == 0.1).all())
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(FAN_IN[name]), rel=0.05)


def test_torchs_uniform_weights_and_biases() -> None:
    network = build_q_network(QNetworkSpec(4, weight_init="torch"), seed=0)
    for name, layer in layers(network).items():
        assert_uniform(layer.weight, 1 / math.sqrt(FAN_IN[name]))
        assert 0 < layer.bias.abs().max().item() <= 1 / math.sqrt(FAN_IN[name])


def test_normal_weights_of_deviation_005_and_no_bias() -> None:
    network = build_q_network(QNetworkSpec(4, weight_init="normal"), seed=0)
    for layer in layers(network).values():
        assert layer.weight.std().item() == pytest.approx(0.05, rel=4 / math.sqrt(2 * layer.weight.numel()))
        assert layer.weight.abs().max().item() > 0.05 * math.sqrt(3), "not uniform"
        assert bool((layer.bias == 0).all())


@pytest.mark.parametrize("weight_init", get_args(WeightInit))
def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(weight_init: WeightInit) -> None:
    spec = QNetworkSpec(3, hidden_units=4, weight_init=weight_init)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_q_network(spec, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_q_network(spec, seed=7).state_dict()
    other = build_q_network(spec, seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("weight"))


@pytest.mark.parametrize("name", names())
def test_every_parameterization_starts_from_the_same_weights(name: str) -> None:
    spec = QNetworkSpec(3, hidden_units=4)
    standard, other = (
        layers(build_q_network(spec, seed=7)),
        layers(build_q_network(replace(spec, parameterization=name), seed=7)),
    )
    for layer_name, layer in standard.items():
        weight = other[layer_name].weight
        if name == "sn" and layer_name == "hidden":  # here the layer's own w is divided by its largest singular value
            weight = weight * torch.linalg.matrix_norm(layer.weight, 2)
        torch.testing.assert_close(weight, layer.weight, rtol=2e-2 if name == "sn" else 1.3e-6, atol=1e-6)
        bias = bias_of(other[layer_name])
        assert bias is not None
        assert torch.equal(bias, layer.bias)


# --- the spec as JSON --------------------------------------------------------------------------------------------


class NoTensorWork(TorchDispatchMode):
    """Fail at any tensor operation, an allocation included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def read(values: object) -> QNetworkSpec:
    """Read a spec; nothing may be allocated for it."""
    with NoTensorWork():
        return QNetworkSpec.from_json(values)


def good() -> dict[str, Any]:
    return json.loads(json.dumps(QNetworkSpec(4, "wn").to_json()))


def small_specs() -> st.SearchStrategy[QNetworkSpec]:
    """Valid specs; each convolution leaves at least one of at least 40 pixels."""
    return st.builds(
        QNetworkSpec,
        num_actions=st.integers(1, 18),
        parameterization=st.sampled_from(names()),
        layers=st.none() | st.lists(st.sampled_from(["output", "hid*", "convolutions.?"]), max_size=3).map(tuple),
        observation_shape=st.tuples(st.integers(1, 4), st.integers(40, 84), st.integers(40, 84)),
        convolutions=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 4), st.integers(1, 2)), max_size=3).map(
            tuple
        ),
        hidden_units=st.integers(1, 1000),
        weight_init=st.sampled_from(get_args(WeightInit)),
    )


@settings(deadline=None, max_examples=30)
@given(spec=small_specs())
def test_a_spec_comes_back_equal_from_json(spec: QNetworkSpec) -> None:
    assert read(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_read_back_builds_the_same_network() -> None:
    spec = QNetworkSpec(2, "wn", {"g": "exp"}, ("hidden", "conv*"), (2, 9, 7), ((3, 3, 2), (4, 2, 1)), 5, "torch")
    again = read(json.loads(json.dumps(spec.to_json())))
    x = torch.randint(0, 256, (3, 2, 9, 7), dtype=torch.uint8)
    assert torch.equal(build_q_network(again, seed=4)(x), build_q_network(spec, seed=4)(x))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 4096, 65536])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([*names(), *get_args(WeightInit)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(field=st.sampled_from(sorted(good())), value=JSON_VALUES)
def test_a_spec_with_any_value_in_a_field_is_refused_or_means_what_it_says(field: str, value: object) -> None:
    try:
        spec = read(good() | {field: value})
    except CheckpointError:
        return
    assert json.loads(json.dumps(spec.to_json())) == good() | {field: value}
    assert spec.flat_features() * spec.hidden_units <= MAX_PARAMETERS


@settings(deadline=None, max_examples=50)
@given(
    convolutions=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 100), st.integers(1, 100)), max_size=4),
    shape=st.tuples(st.integers(1, 600), st.integers(1, 600), st.integers(1, 600)),
    hidden_units=st.integers(1, 70_000),
)
def test_a_spec_of_any_size_is_refused_or_within_the_bound(
    convolutions: list[tuple[int, int, int]], shape: tuple[int, int, int], hidden_units: int
) -> None:
    values = good() | {"convolutions": convolutions, "observation_shape": shape, "hidden_units": hidden_units}
    try:
        read(values)
    except CheckpointError:
        return
    channels, height, width = shape
    weights = 0
    for filters, kernel, stride in convolutions:
        weights += filters * channels * kernel * kernel
        height, width = len(range(0, height - kernel + 1, stride)), len(range(0, width - kernel + 1, stride))
        channels = filters
    assert min(height, width) > 0
    assert weights + channels * height * width * hidden_units <= MAX_PARAMETERS


@pytest.mark.parametrize("values", [None, [], "spec", 3, {}, [["num_actions", 4]]])
def test_what_is_no_spec_is_refused(values: object) -> None:
    with pytest.raises(CheckpointError, match="network spec"):
        read(values)


@pytest.mark.parametrize("field", sorted(good()))
def test_a_missing_field_is_refused(field: str) -> None:
    values = good()
    del values[field]
    with pytest.raises(CheckpointError, match="missing or unknown fields"):
        read(values)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(CheckpointError, match="missing or unknown fields"):
        read(good() | {"dropout": 0.5})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_actions", 0),
        ("num_actions", 19),
        ("num_actions", True),
        ("num_actions", 4.0),
        ("num_actions", "4"),
        ("num_actions", None),
        ("parameterization", "nosuch"),
        ("parameterization", None),
        ("parameterization", ["wn"]),
        ("weight_init", "xavier"),
        ("weight_init", None),
        ("weight_init", ["he"]),
        ("weight_init", {"he": 1}),
        ("hidden_units", 0),
        ("hidden_units", -512),
        ("hidden_units", 65_537),
        ("hidden_units", 10**30),
        ("hidden_units", math.inf),
        ("observation_shape", [4, 84]),
        ("observation_shape", [4, 84, 84, 1]),
        ("observation_shape", [4, 84, 513]),
        ("observation_shape", [0, 84, 84]),
        ("observation_shape", "444"),
        ("observation_shape", 84),
        ("observation_shape", {"frames": 4, "height": 84, "width": 84}),
        ("convolutions", None),
        ("convolutions", 3),
        ("convolutions", "abc"),
        ("convolutions", ""),
        ("convolutions", {}),
        ("convolutions", [32, 8, 4]),
        ("convolutions", [[32, 8]]),
        ("convolutions", [[32, 8, 0]]),
        ("convolutions", [[32, -8, 4]]),
        ("convolutions", [[32.5, 8, 4]]),
        ("convolutions", {"abc": 1}),
        ("convolutions", [{"filters": 32, "kernel": 8, "stride": 4}]),
        ("convolutions", [[32, 85, 1]]),  # a kernel larger than the observation
        ("convolutions", [[32, 8, 4], [64, 21, 1]]),  # the second sees 20 × 20
        ("convolutions", [[4096, 1, 1]]),  # 4096 · 84 · 84 · 512 weights in the hidden layer
        ("convolutions", [[4096, 8, 4], [4096, 8, 4]]),  # 4096 · 4096 · 64 in the second convolution
    ],
)
def test_a_wrong_value_is_refused(field: str, value: object) -> None:
    with pytest.raises(CheckpointError):
        read(good() | {field: value})


def test_more_layers_than_memory_could_hold_are_refused() -> None:
    """Each has 1 weight, but as a torch module it takes 10 to 20 kB."""
    with pytest.raises(CheckpointError):
        read(good() | {"convolutions": [[1, 1, 1]] * 1_000_000})


def test_the_hidden_layers_size_counts_the_convolutions_too() -> None:
    """65,536 units fit 4,096 features exactly, and then no convolution; the bound itself is allowed."""
    values = good() | {"observation_shape": [1, 64, 64], "hidden_units": 65_536}
    assert read(values | {"convolutions": []}).flat_features() * 65_536 == MAX_PARAMETERS
    with pytest.raises(CheckpointError, match="more than 268,435,456 parameters"):
        read(values | {"convolutions": [[1, 1, 1]]})


def test_a_hook_sees_a_layers_output_before_the_relu() -> None:
    network = build_q_network(QNetworkSpec(4, "wn", hidden_units=8), seed=0)
    seen: list[torch.Tensor] = []
    for layer in (*network.convolutions, network.hidden):
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    network(torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8))
    assert all(bool((output < 0).any()) for output in seen)
    network.hidden.register_full_backward_hook(lambda *_: None)
    network(torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)).sum().backward()
