"""Weight normalization is the paper's formula, entries work by name, and initialization from data does what it says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from wn_rl import config
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import (
    Parameterization,
    WeightParameterization,
    get,
    initialize_from_data,
    names,
    project,
    register,
    registry,
    reparameterize,
    resolve,
)
from wn_rl.parameterizations.base import Units
from wn_rl.parameterizations.weight_norm import direction_and_scale

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ONE_AXIS = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "ConvTranspose1d": nn.ConvTranspose1d}


@st.composite
def layers_and_inputs(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A Linear or a Conv layer of any shape in float64, and a batch for it."""
    dimensions = draw(st.integers(0, 3))
    batch, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    if dimensions == 0:
        return nn.Linear(inputs, outputs, bias, dtype=torch.float64), torch.randn(batch, inputs, dtype=torch.float64)
    groups, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    layer = CONVOLUTIONS[dimensions](
        groups * inputs,
        groups * outputs,
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        groups=groups,
        bias=bias,
        dtype=torch.float64,
    )
    size = [kernel + draw(st.integers(0, 2)) for _ in range(dimensions)]
    return layer, torch.randn(batch, groups * inputs, *size, dtype=torch.float64)


def length(v: Tensor) -> Tensor:
    """‖v‖ of each output unit, shaped to divide ``v``."""
    return torch.stack([unit.square().sum().sqrt() for unit in v]).reshape(-1, *[1] * (v.dim() - 1))


def weight_normalized(layer: nn.Module) -> nn.Module:
    """A weight-normalized copy of ``layer`` whose g (either sign) and v are drawn anew."""
    copied = reparameterize(copy.deepcopy(layer), "wn")
    v, g = direction_and_scale(copied)
    with torch.no_grad():
        v.normal_()
        g.normal_()
    return copied


def weighted_sum(output: Tensor) -> Tensor:
    """A loss whose gradient differs at each element of ``output``."""
    return (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum()


# --- w = g · v / ‖v‖ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in names() if get(name).preserves_output])
@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs())
def test_reparameterizing_changes_no_output(name: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    assert reparameterize(model, name) is model
    torch.testing.assert_close(model(x), layer(x), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs())
def test_the_weight_is_g_times_the_unit_vector_of_v_with_one_g_per_output_unit(case: tuple[nn.Module, Tensor]) -> None:
    layer, _ = case
    normalized = weight_normalized(layer)
    v, g = direction_and_scale(normalized)
    assert v.shape == layer.weight.shape
    assert g.shape == (layer.weight.shape[0], *[1] * (v.dim() - 1))
    torch.testing.assert_close(normalized.weight, g * v / length(v), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(length(normalized.weight), g.abs(), rtol=1e-13, atol=1e-13)
    assert {id(p) for p in normalized.parameters()} - {id(normalized.bias)} == {id(g), id(v)}


def test_the_length_runs_over_every_axis_but_the_first() -> None:
    layer = nn.Conv2d(1, 2, (1, 2), bias=False, dtype=torch.float64)
    reparameterize(layer, "wn")
    v, g = direction_and_scale(layer)
    with torch.no_grad():
        v.copy_(torch.tensor([[[[3.0, 4.0]]], [[[0.0, -2.0]]]]))
        g.copy_(torch.tensor([10.0, 0.5]).view(2, 1, 1, 1))
    torch.testing.assert_close(layer.weight.flatten().tolist(), [6.0, 8.0, 0.0, -0.5])


@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs())
def test_gradients_are_the_papers_and_torchs(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    normalized = weight_normalized(layer)
    v, g = direction_and_scale(normalized)
    weighted_sum(normalized(x)).backward()

    with torch.no_grad():
        layer.weight.copy_(g * v / length(v))
    weighted_sum(layer(x)).backward()
    grad_w, n = layer.weight.grad, length(v)
    assert grad_w is not None
    grad_g = torch.stack([(dw * unit).sum() for dw, unit in zip(grad_w, v, strict=True)]).view_as(g) / n
    grad_v = g / n * grad_w - g * grad_g / n**2 * v
    with torch.no_grad():
        size = 1 + float(grad_w.abs().max() * (g / n).abs().clamp(min=1).max())
    torch.testing.assert_close(g.grad, grad_g, rtol=1e-11, atol=1e-13 * size)
    torch.testing.assert_close(v.grad, grad_v, rtol=1e-11, atol=1e-13 * size)
    assert v.grad is not None
    assert float((v.grad * v.detach()).flatten(1).sum(1).abs().max()) < 1e-12 * size, "the gradient of v is not ⟂ v"

    torchs = parametrizations.weight_norm(copy.deepcopy(layer), dim=0)
    torchs.zero_grad()
    with torch.no_grad():
        torchs.parametrizations.weight.original0.copy_(g)
        torchs.parametrizations.weight.original1.copy_(v)
    weighted_sum(torchs(x)).backward()
    torch.testing.assert_close(g.grad, torchs.parametrizations.weight.original0.grad, rtol=1e-12, atol=1e-13 * size)
    torch.testing.assert_close(v.grad, torchs.parametrizations.weight.original1.grad, rtol=1e-12, atol=1e-13 * size)


@settings(deadline=None, max_examples=15)
@given(case=layers_and_inputs(), rate=st.sampled_from([1e-3, 0.1, 10.0]))
def test_the_length_of_v_never_shrinks_under_plain_sgd(case: tuple[nn.Module, Tensor], rate: float) -> None:
    layer, x = case
    normalized = weight_normalized(layer)
    v, g = direction_and_scale(normalized)
    optimizer = torch.optim.SGD(normalized.parameters(), lr=rate)
    for _ in range(4):
        optimizer.zero_grad()
        torch.tanh(normalized(x)).square().sum().backward()
        assert g.grad is not None
        assert v.grad is not None
        before = length(v.detach())
        # The radial part of ∇v = g/‖v‖ (∇w − …) cancels but for rounding; a unit of one input has no other part.
        terms_that_cancel = (g.detach() * g.grad / before).abs() + length(v.grad)
        optimizer.step()
        assert bool((length(v.detach()) >= before - 1e-14 * before - 1e-14 * rate * terms_that_cancel).all())


def test_state_dict_round_trip_and_deepcopy_carry_g_and_v() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    reparameterize(model, "wn")
    for layer in (model[0], model[2]):
        direction_and_scale(layer)[1].data.mul_(-1.7)
    copied = copy.deepcopy(model)
    restored = reparameterize(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double(), "wn")
    restored.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(copied(x), model(x))
    assert torch.equal(restored(x), model(x))
    with torch.no_grad():
        direction_and_scale(model[0])[1].mul_(2)
    assert torch.equal(copied(x), restored(x)), "a copy shares no storage with its original"
    assert not torch.equal(copied(x), model(x))


def test_layers_of_other_types_are_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    before = {name: id(parameter) for name, parameter in model[:2].named_parameters()}
    reparameterize(model, "wn")
    assert {name: id(parameter) for name, parameter in model[:2].named_parameters()} == before
    direction_and_scale(model[2])
    with pytest.raises(TypeError, match="Embedding is not weight-normalized"):
        direction_and_scale(model[0])


# --- the registry ------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Take out again what a test registers."""
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def test_standard_and_wn_are_registered_and_know_their_names() -> None:
    assert {"standard", "wn"} <= set(names())
    assert all(get(name).name == name for name in names())
    assert not get("standard").data_dependent_init
    assert get("wn").data_dependent_init


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"unknown parameterization 'weightnorm'; there are: .*standard.*wn"):
        reparameterize(nn.Linear(2, 2), "weightnorm")
    with pytest.raises(ValueError, match="standard"):
        resolve("")


@pytest.mark.usefixtures("clean_registry")
def test_a_taken_name_is_an_error_but_the_same_class_may_come_again() -> None:
    entry = get("wn")
    with pytest.raises(ValueError, match=r"'wn' is taken by .*:WeightNormalization"):
        register("wn")(type("Other", (Parameterization,), {}))
    assert get("wn") is entry
    assert register("wn")(entry) is entry


class Twice(nn.Module):
    """w = 2u."""

    def forward(self, u: Tensor) -> Tensor:
        return 2 * u

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


@pytest.mark.usefixtures("clean_registry")
def test_a_users_class_works_by_name_everywhere() -> None:
    @register("twice")
    class TwiceTheParameter(Parameterization):
        def apply(self, layer: nn.Module) -> None:
            parametrize.register_parametrization(layer, "weight", Twice())

        @torch.no_grad()
        def rescale(self, layer: nn.Module, factor: Tensor) -> None:
            layer.weight = Units.of(layer).scale(layer.weight, factor)

    assert names()[-1] == "twice"
    assert isinstance(resolve("twice"), TwiceTheParameter)
    standard, twice = (build_q_network(QNetworkSpec(3, name, hidden_units=4), seed=5) for name in ("standard", "twice"))
    x = random_observations(6)
    torch.testing.assert_close(twice(x), standard(x))
    initialize_from_data(twice, x)
    assert_centred_and_scaled(pre_activations(twice, x), {}, tolerance=1e-4)
    resolved = config.resolve(replace(config.load("paper"), game="pong", param="twice"))
    assert (resolved.param, resolved.weight_init, resolved.learning_rate) == ("twice", "he", 1e-4)


def test_an_object_may_stand_for_a_name_and_an_entry_without_methods_is_refused() -> None:
    layer = reparameterize(nn.Linear(2, 2), get("wn")())
    direction_and_scale(layer)
    with pytest.raises(TypeError, match="does not define"):
        reparameterize(nn.Linear(2, 2), Parameterization())
    with pytest.raises(TypeError, match="no scale"):
        Parameterization().rescale(nn.Linear(2, 2), torch.ones(2))


# --- initialization from data ------------------------------------------------------------------------------------


def random_observations(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=generator)


def pre_activations(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """What every Linear and Conv layer of ``model`` puts out for ``batch``, units last."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            seen[name] = output if isinstance(module, nn.Linear) else output.movedim(1, -1)

        return hook

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [m.register_forward_hook(record(n)) for n, m in model.named_modules() if isinstance(m, layers)]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return seen


def population(values: list[float]) -> tuple[float, float]:
    """Mean and population standard deviation."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def assert_centred_and_scaled(
    found: dict[str, Tensor], std_of: dict[str, float], *, std: float = 1.0, tolerance: float = 1e-6
) -> None:
    for name, values in found.items():
        for unit in values.flatten(0, -2).T:
            mean, deviation = population(unit.tolist())
            assert abs(mean) < tolerance, name
            assert abs(deviation - std_of.get(name, std)) < tolerance, name


def dense() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)), torch.rand(11, 5) + 3


def dense_over_sequences() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.rand(3, 6, 5)


def convolutions(dimensions: int) -> tuple[nn.Module, Tensor]:
    conv = CONVOLUTIONS[dimensions]
    model = nn.Sequential(conv(2, 3, 3, stride=2, padding=1), nn.ELU(), conv(3, 4, 2), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(5, 2, *[6, 5, 4][:dimensions])
    model(x)
    return model, x


def q_network() -> tuple[nn.Module, Tensor]:
    return build_q_network(QNetworkSpec(4, hidden_units=12, weight_init="normal"), seed=3), random_observations(8)


MODELS = {
    "dense": dense,
    "dense over sequences": dense_over_sequences,
    "conv1d": lambda: convolutions(1),
    "conv2d": lambda: convolutions(2),
    "conv3d": lambda: convolutions(3),
    "q network": q_network,
}


@pytest.mark.parametrize("name", ["standard", "wn"])
@pytest.mark.parametrize("model_name", MODELS)
def test_every_pre_activation_of_the_batch_gets_mean_0_and_std_1(name: str, model_name: str) -> None:
    torch.manual_seed(1)
    model, x = MODELS[model_name]()
    x = x if x.dtype == torch.uint8 else x.double()
    reparameterize(model.double(), name)
    report = initialize_from_data(model, x)
    found = pre_activations(model, x)
    assert_centred_and_scaled(found, {})
    assert report.keys() == found.keys()
    assert not has_hooks(model)


@pytest.mark.parametrize("name", ["standard", "wn"])
def test_another_std_for_all_layers_and_for_single_ones(name: str) -> None:
    network, x = q_network()
    reparameterize(network.double(), name)
    initialize_from_data(network, x, std=0.5, std_of={"output": 0.1, "convolutions.1": 2.0})
    assert_centred_and_scaled(pre_activations(network, x), {"output": 0.1, "convolutions.1": 2.0}, std=0.5)


@settings(deadline=None, max_examples=20)
@given(
    inputs=st.integers(1, 4),
    units=st.integers(1, 4),
    batch=st.integers(2, 6),
    size=st.integers(0, 3),
    seed=st.integers(0),
)
def test_wn_gets_g_and_b_of_the_papers_formula_and_keeps_v(
    inputs: int, units: int, batch: int, size: int, seed: int
) -> None:
    """With t = v·x/‖v‖: g = 1/σ[t], b = −μ[t]/σ[t]; ``size`` 0 is a dense layer, else a 1 × 1 convolution."""
    torch.manual_seed(seed % 2**31)
    layer = nn.Linear(inputs, units) if size == 0 else nn.Conv2d(inputs, units, 1)
    reparameterize(layer.double(), "wn")
    v, g = direction_and_scale(layer)
    with torch.no_grad():
        g.normal_().abs_().add_(0.1)
    v_before = v.clone()
    examples = torch.randn(batch, inputs, dtype=torch.float64) * 3 + 1
    if size > 0:
        examples = torch.randn(batch, inputs, size, 2, dtype=torch.float64) * 3 + 1
    report = initialize_from_data(layer, examples)[""]
    assert torch.equal(v, v_before)
    columns = examples.tolist() if size == 0 else examples.movedim(1, -1).flatten(0, 2).tolist()
    for unit, direction in enumerate(v.flatten(1).tolist()):
        norm = math.sqrt(math.fsum(weight**2 for weight in direction))
        t = [math.fsum(w * a for w, a in zip(direction, x, strict=True)) / norm for x in columns]
        mean, deviation = population(t)
        assert g[unit].item() == pytest.approx(1 / deviation, rel=1e-9)
        assert layer.bias[unit].item() == pytest.approx(-mean / deviation, rel=1e-9, abs=1e-9)
        # The report is of the layer's own t, which had another g before.
        assert float(report.mean[unit] / report.std[unit]) == pytest.approx(mean / deviation, rel=1e-9, abs=1e-9)


def test_standard_gets_w_and_b_divided_by_the_deviation() -> None:
    layer = reparameterize(nn.Linear(2, 1, dtype=torch.float64), "standard")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -1.0]]))
        layer.bias.fill_(17.0)
    # t = 2·x₁ − x₂ is 0, 4, 8: mean 4, population variance 32/3.
    x = torch.tensor([[1.0, 2.0], [2.0, 0.0], [5.0, 2.0]], dtype=torch.float64)
    report = initialize_from_data(layer, x)[""]
    deviation = math.sqrt(32 / 3)
    assert layer.weight.tolist() == [pytest.approx([2 / deviation, -1 / deviation])]
    assert layer.bias.tolist() == pytest.approx([-4 / deviation])
    assert (float(report.mean), float(report.std)) == (pytest.approx(4.0), pytest.approx(deviation))


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize("name", ["standard", "wn"])
@pytest.mark.parametrize(
    ("model", "std_of", "message"),
    [
        (without_bias, {}, "layer '1' has no bias"),
        (UsedTwice, {}, "layer 'layer' is used twice"),
        (UsedTwice, {"outptu": 0.1}, "no treated layer is named outptu; there are: layer"),
    ],
)
def test_what_cannot_be_initialized_is_an_error_and_leaves_no_hook(
    name: str, model: Callable[[], nn.Module], std_of: dict[str, float], message: str
) -> None:
    network = reparameterize(model(), name)
    with pytest.raises(ValueError, match=message):
        initialize_from_data(network, torch.rand(4, 3), std_of=std_of)
    assert not has_hooks(network)


def test_an_error_of_the_model_itself_leaves_no_hook() -> None:
    model = reparameterize(nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2)), "wn")
    with pytest.raises(RuntimeError):
        initialize_from_data(model, torch.rand(4, 3))
    assert not has_hooks(model)


@pytest.mark.parametrize("name", ["standard", "wn"])
def test_a_unit_without_inputs_is_only_centred(name: str) -> None:
    torch.manual_seed(0)
    model = reparameterize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), name)
    weight_before = model[0].weight.detach().clone()
    initialize_from_data(model, torch.zeros(6, 3, dtype=torch.float64))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    torch.testing.assert_close(model[0].weight.detach(), weight_before, rtol=0, atol=1e-15)
    assert bool((model(torch.zeros(6, 3, dtype=torch.float64)) == 0).all())


@pytest.mark.parametrize("name", ["standard", "wn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_that_is_constant_but_for_rounding_is_only_centred(name: str, dtype: torch.dtype) -> None:
    """Matrix products round equal rows a little differently, so the deviation of a constant unit need not be 0."""
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(33, 9), torch.rand(33).expand(17, 33)),
        (nn.Conv2d(4, 32, 8, stride=4), torch.full((8, 4, 84, 84), 0.3)),
    ):
        reparameterize(layer.to(dtype), name)
        weight_before = layer.weight.detach().clone()
        initialize_from_data(layer, x.to(dtype).contiguous())
        torch.testing.assert_close(layer.weight.detach(), weight_before)


@pytest.mark.parametrize("name", [name for name in names() if get(name).rescale is not Parameterization.rescale])
def test_one_large_constant_input_hides_no_ordinary_unit(name: str) -> None:
    """What is constant is told by the unit's own sum: 10⁶ times one weight is rounded to 10⁻³ or so, not to 0.5."""
    torch.manual_seed(0)
    x = torch.randn(500, 256)
    x[:, 0] = 1e6
    layer = reparameterize(nn.Linear(256, 16), name)
    initialize_from_data(layer, x)
    output = layer.train(not get(name).batch_independent)(x).detach()
    torch.testing.assert_close(output.std(0, correction=0), torch.ones(16), rtol=0.03, atol=0)


@pytest.mark.parametrize("name", ["bn", "mean_only_bn", "ln"])
def test_a_normalization_does_not_make_a_signal_of_rounding(name: str) -> None:
    """Divided by its own deviation the rounding of a constant unit looks like any other signal."""
    torch.manual_seed(0)
    layer = reparameterize(nn.Linear(33, 9), name)
    before = copy.deepcopy(layer.normalization)
    initialize_from_data(layer, (1e3 * torch.rand(33)).expand(17, 33).contiguous())
    if name != "mean_only_bn":
        torch.testing.assert_close(layer.normalization.gain, before.gain, rtol=0, atol=0)


@st.composite
def inputs_of_any_size(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A layer, and a batch for it of ordinary inputs among which a few are large or small, and spread or constant."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kind, groups, inputs = (
        draw(st.sampled_from(list(ONE_AXIS))),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 4, 150])),
    )
    layer = nn.Linear(inputs, 6) if kind == "Linear" else ONE_AXIS[kind](groups * inputs, 6, 2, groups=groups)
    x = torch.randn(40, inputs) if kind == "Linear" else torch.randn(40, groups * inputs, 3)
    for _ in range(draw(st.integers(0, 3))):
        unusual = draw(st.integers(0, x.shape[1] - 1))
        spread = draw(st.sampled_from([0.0, 1e-8, 1e-6, 1e-3, 1.0]))
        x[:, unusual] = 10.0 ** draw(st.sampled_from([-6, -2, 3, 5, 6])) * (1 + spread * x[:, unusual])
    if draw(st.booleans()):
        x[:, draw(st.integers(0, x.shape[1] - 1)) :] = 0.0
    return layer, x


@settings(deadline=None, max_examples=60)
@given(case=inputs_of_any_size(), name=st.sampled_from(["standard", "wn"]))
def test_a_unit_is_scaled_just_where_its_deviation_is_more_than_rounding(
    case: tuple[nn.Module, Tensor], name: str
) -> None:
    layer, x = case
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact.bias.zero_()
        t = exact(x.double()).transpose(0, 1).flatten(1)
        exact.weight.abs_()
        terms = exact(x.double().abs()).transpose(0, 1).flatten(1).amax(1)  # Σ |w||x|
    deviation = t.std(1, correction=0)
    reparameterize(layer, name)
    before = layer.weight.detach().clone()
    initialize_from_data(layer, x)
    scale = Units.of(layer).rows(layer.weight).norm(dim=1) / Units.of(layer).rows(before).norm(dim=1)
    rounding = torch.finfo(torch.float32).eps * terms
    clear, hidden = deviation > 20 * rounding, deviation < 1e-3 * rounding
    torch.testing.assert_close(scale[clear].double(), 1 / deviation[clear], rtol=0.03, atol=0)
    torch.testing.assert_close(scale[hidden], torch.ones_like(scale[hidden]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["standard", "wn"])
def test_one_state_over_and_over_scales_no_dense_layer(name: str) -> None:
    """A convolution's statistics run over positions too, so it has something to go by; a dense layer has not."""
    network = build_q_network(QNetworkSpec(3, name, hidden_units=12), seed=0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = random_observations(1).expand(32, -1, -1, -1)
    initialize_from_data(network, x)
    for key, value in network.state_dict().items():
        if key.startswith(("hidden", "output")) and "bias" not in key:
            torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0, msg=key)
    assert float(network(x).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("name", [name for name in names() if get(name).batch_independent])
def test_the_q_values_of_a_state_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    network = build_q_network(QNetworkSpec(4, name, hidden_units=12), seed=0).double().train()
    batch, others = random_observations(4, seed=1), random_observations(4, seed=2)
    others[1] = batch[1]
    with torch.no_grad():
        alone, among, among_others = (copy.deepcopy(network)(x) for x in (batch[1:2], batch, others))
    torch.testing.assert_close(among[1], alone[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(among_others[1], alone[0], rtol=1e-12, atol=1e-12)


class ByName(nn.Module):
    """Calls its layer by keyword, and never calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(input=x)


def test_layers_may_be_called_by_keyword_and_one_that_is_never_reached_cannot_be_asked_for() -> None:
    torch.manual_seed(0)
    model, batch = reparameterize(ByName().double(), "wn"), torch.randn(9, 3, dtype=torch.float64)
    found = initialize_from_data(model, batch, std_of={"used": 0.5})
    assert set(found) == {"used"}
    torch.testing.assert_close(model(batch).std(0, correction=0), torch.full((2,), 0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not reach layer unused"):
        initialize_from_data(model, batch, std_of={"unused": 0.5})


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.ConvTranspose2d(3, 2, 2), lambda: nn.GRU(3, 2)])
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in names()), ("bn", {"eps": 0.0}), ("ln", {"eps": 0.0})]
)
def test_a_zero_weight_is_refused_or_gives_finite_values(
    name: str, options: dict[str, float], make: Callable[[], nn.Module]
) -> None:
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    if isinstance(layer, nn.GRU) and not issubclass(get(name), WeightParameterization) and name != "standard":
        return
    refuses = name in ("wn", "wn_mean_only_bn", "sn", "wn_projected") or options.get("eps") == 0.0
    if refuses:
        before = [id(parameter) for parameter in layer.parameters()]
        with pytest.raises(ValueError, match=r"has only zero weights.*its norm is zero"):
            reparameterize(layer, name, **options)
        assert [id(parameter) for parameter in layer.parameters()] == before
        return
    x = torch.randn(5, 3, 4, 4) if isinstance(layer, nn.ConvTranspose2d) else torch.randn(5, 3)
    output = reparameterize(layer, name, **options)(x)
    assert bool((output[0] if isinstance(output, tuple) else output).isfinite().all())


def test_a_direction_that_became_zero_stays_finite_when_it_is_projected() -> None:
    layer = reparameterize(nn.Linear(3, 2), "wn_projected")
    v = layer.parametrizations.weight.original1
    with torch.no_grad():
        v[0] = 0.0
        v[1] *= 7.0
    project(layer)
    assert v[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(v[1].norm().detach(), torch.tensor(1.0))


def test_spectral_normalization_refuses_weights_that_eps_hides() -> None:
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1e-13)
    with pytest.raises(ValueError, match="none above eps=1e-12"):
        reparameterize(layer, "sn")
    reparameterize(layer, "sn", eps=0.0)
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight.detach(), 2), torch.tensor(1.0))


def test_wn_needs_a_direction_for_each_unit_and_a_weight_of_its_own() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[1] = 0.0
    with pytest.raises(ValueError, match="only zero weights"):
        reparameterize(layer, "wn")
    model = reparameterize(nn.Linear(3, 2), "wn")
    with pytest.raises(ValueError, match="parametrized already"):
        reparameterize(model, "wn")


@pytest.mark.parametrize("param", ["wn", "wn_projected", "sn"])
def test_a_zero_weight_that_is_assigned_is_refused_and_changes_nothing(param: str) -> None:
    model = reparameterize(nn.Sequential(nn.Linear(4, 3)), param).eval()
    before = model[0].weight.detach().clone()
    weight = torch.zeros(3, 4) if param == "sn" else torch.tensor([[1.0] * 4, [0.0] * 4, [2.0] * 4])
    with pytest.raises(ValueError, match="only zero weights, so its norm is zero"):
        model[0].weight = weight
    assert torch.equal(model[0].weight, before)
    model[0].weight = torch.ones(3, 4)
    assert bool(model(torch.ones(1, 4)).isfinite().all())
