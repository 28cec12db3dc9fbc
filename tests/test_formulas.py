"""Each entry against its formula, another implementation, or numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import get, names, project, register, reparameterize, resolve
from wn_rl.parameterizations.base import Parameterization, Units, bias_of, make

F64 = torch.float64


@st.composite
def layers_and_inputs(draw: st.DrawFn, batch: int = 2) -> tuple[nn.Module, Tensor]:
    """A Linear, Conv or ConvTranspose layer of any shape in float64, and a batch of at least ``batch`` for it."""
    dimensions = draw(st.integers(0, 3))
    count, inputs, outputs = draw(st.integers(batch, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    if dimensions == 0:
        leading = draw(st.sampled_from([(count,), (count, 3)]))
        return nn.Linear(inputs, outputs, bias, dtype=F64), torch.randn(*leading, inputs, dtype=F64)
    groups, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kinds = {
        1: (nn.Conv1d, nn.ConvTranspose1d),
        2: (nn.Conv2d, nn.ConvTranspose2d),
        3: (nn.Conv3d, nn.ConvTranspose3d),
    }[dimensions]
    layer = draw(st.sampled_from(kinds))(
        groups * inputs, groups * outputs, kernel, stride=draw(st.integers(1, 2)), groups=groups, bias=bias, dtype=F64
    )
    size = [kernel + draw(st.integers(0, 2)) for _ in range(dimensions)]
    return layer, torch.randn(count, groups * inputs, *size, dtype=F64)


def units_last(layer: nn.Module, t: Tensor) -> Tensor:
    """An output of ``layer`` as (everything else, units)."""
    return (t if isinstance(layer, nn.Linear) else t.movedim(1, -1)).flatten(0, -2)


def without_bias(layer: nn.Module, x: Tensor) -> Tensor:
    plain = copy.deepcopy(layer)
    if plain.bias is not None:
        nn.init.zeros_(plain.bias)
    return plain(x)


def redraw(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()


# --- units of transposed convolutions ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(case=layers_and_inputs())
def test_a_unit_is_what_makes_one_output_channel(case: tuple[nn.Module, Tensor]) -> None:
    """Zeroing all but one unit's weights leaves just that channel of the output."""
    layer, x = case
    units = Units.of(layer)
    count = units_last(layer, layer(x)).shape[-1]
    assert units.rows(layer.weight).shape[0] == count
    reference = units_last(layer, without_bias(layer, x))
    for unit in range(count):
        alone = copy.deepcopy(layer)
        mask = torch.zeros(count, dtype=F64)
        mask[unit] = 1.0
        with torch.no_grad():
            alone.weight.copy_(units.scale(alone.weight, mask))
        found = units_last(layer, without_bias(alone, x))
        torch.testing.assert_close(found, reference * mask, rtol=1e-12, atol=1e-12)
        row = units.rows(layer.weight)[unit]
        torch.testing.assert_close(units.norm(layer.weight).flatten()[unit], row.square().sum().sqrt())


@settings(deadline=None, max_examples=20)
@given(case=layers_and_inputs())
def test_transposed_convolutions_get_a_g_per_output_channel(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    before = units_last(layer, without_bias(layer, x))
    reparameterize(layer, "wn")
    g = layer.parametrizations.weight.original0
    assert g.numel() == before.shape[-1]
    factor = torch.rand(g.numel(), dtype=F64) + 0.5
    get("wn")().rescale(layer, factor)
    after = units_last(layer, layer(x))
    if layer.bias is not None:
        after = after - layer.bias
    torch.testing.assert_close(after, before * factor, rtol=1e-11, atol=1e-11)
    torchs = nn.ConvTranspose2d(3, 2, 2, dtype=F64)
    ours = reparameterize(copy.deepcopy(torchs), "wn")
    parametrizations.weight_norm(torchs, dim=1)
    assert ours.parametrizations.weight.original0.shape == torchs.parametrizations.weight.original0.shape
    torch.testing.assert_close(ours.weight, torchs.weight)


def test_g_may_be_trained_as_its_logarithm() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 2, dtype=F64)
    layer = reparameterize(copy.deepcopy(plain), "wn", g="exp")
    log_g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    torch.testing.assert_close(layer.weight, plain.weight)
    torch.testing.assert_close(log_g.exp().flatten(), v.norm(dim=1))
    x = torch.randn(5, 3, dtype=F64)
    layer(x).sum().backward()
    grad_w = x.sum(0).expand(2, 3)
    # ∂L/∂(log g) = g · ∂L/∂g = g · ∇w·v/‖v‖.
    expected = log_g.exp().flatten() * (grad_w * v).sum(1) / v.norm(dim=1)
    torch.testing.assert_close(log_g.grad.flatten(), expected)
    get("wn")(g="exp").rescale(layer, torch.tensor([2.0, 3.0], dtype=F64))
    torch.testing.assert_close(layer.weight, plain.weight * torch.tensor([[2.0], [3.0]], dtype=F64))


# --- mean-only batch normalization -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean_only_bn", "wn_mean_only_bn"])
@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs())
def test_mean_only_forward_backward_and_running_mean(name: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    bias = None if layer.bias is None else layer.bias.detach().clone()
    normalized = reparameterize(copy.deepcopy(layer), name, rate=0.25).train()
    t = without_bias(layer, x).detach()
    rows = units_last(layer, t)
    mean = torch.stack([column.sum() / len(column) for column in rows.T])

    seen: list[Tensor] = []
    if name == "mean_only_bn":  # the gradient at t itself: ∇t L = ∇t̃ L − mean(∇t̃ L)
        original = normalized.normalization.forward
        normalized.normalization.forward = lambda t: original(seen.append(t.requires_grad_()) or t)
    output = normalized(x)
    expected = rows - mean + (0 if bias is None else bias)
    torch.testing.assert_close(units_last(layer, output), expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(output)
    if seen:
        (gradient,) = torch.autograd.grad((output * weights).sum(), seen[0])
        upstream = units_last(layer, weights)
        torch.testing.assert_close(units_last(layer, gradient), upstream - upstream.mean(0), rtol=1e-10, atol=1e-11)
        del normalized.normalization.forward
    torch.testing.assert_close(normalized.normalization.running_mean, 0.25 * mean, rtol=1e-11, atol=1e-12)
    normalized(x)
    torch.testing.assert_close(normalized.normalization.running_mean, (1 - 0.75**2) * mean, rtol=1e-11, atol=1e-12)
    normalized.eval()
    kept = normalized.normalization.running_mean.clone()
    expected = rows - kept + (0 if bias is None else bias)
    torch.testing.assert_close(units_last(layer, normalized(x)), expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(normalized.normalization.running_mean, kept)


def test_mean_only_by_hand() -> None:
    layer = nn.Linear(1, 1, dtype=F64)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(10.0)
    reparameterize(layer, "mean_only_bn").train()
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=F64)  # t = 2, 4, 12 with mean 6
    assert layer(x).flatten().tolist() == [6.0, 8.0, 16.0]
    assert float(layer.normalization.running_mean) == pytest.approx(0.6)
    assert layer.eval()(x).flatten().tolist() == pytest.approx([11.4, 13.4, 21.4])


# --- batch and layer normalization -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs())
def test_batch_normalization_is_its_formula_in_training_and_in_evaluation(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    rows = units_last(layer, without_bias(layer, x)).detach()
    if len(rows) < 2:
        return
    normalized = reparameterize(copy.deepcopy(layer), "bn", eps=1e-3, rate=0.5).train()
    redraw(normalized.normalization)
    gain, bias = normalized.normalization.gain, bias_of(normalized)
    shift = 0 if bias is None else bias
    mean = rows.sum(0) / len(rows)
    variance = (rows - mean).square().sum(0) / len(rows)
    expected = gain * (rows - mean) / (variance + 1e-3).sqrt() + shift
    torch.testing.assert_close(units_last(layer, normalized(x)), expected, rtol=1e-9, atol=1e-9)
    running_mean, running_var = 0.5 * mean, 0.5 + 0.5 * variance * len(rows) / (len(rows) - 1)
    expected = gain * (rows - running_mean) / (running_var + 1e-3).sqrt() + shift
    torch.testing.assert_close(units_last(layer, normalized.eval()(x)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("over", ["example", "units"])
@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs(batch=1))
def test_layer_normalization_is_its_formula(over: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    t = without_bias(layer, x).detach()
    normalized = reparameterize(copy.deepcopy(layer), "ln", over=over, eps=1e-3)
    redraw(normalized.normalization)
    t = t if isinstance(layer, nn.Linear) else t.movedim(1, -1)
    axes = [-1] if over == "units" or isinstance(layer, nn.Linear) else list(range(1, t.dim()))
    mean = t.mean(axes, keepdim=True)
    variance = (t - mean).square().mean(axes, keepdim=True)
    bias = bias_of(normalized)
    expected = normalized.normalization.gain * (t - mean) / (variance + 1e-3).sqrt()
    expected = expected if bias is None else expected + bias
    found = normalized(x)
    found = found if isinstance(layer, nn.Linear) else found.movedim(1, -1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_single_unbatched_image_is_normalized_like_a_batch_of_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=F64)
    for name in ("bn", "ln", "mean_only_bn"):
        layer = reparameterize(nn.Conv2d(2, 3, 2, dtype=F64), name)
        torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x[None])[0])


# --- spectral normalization --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(case=layers_and_inputs())
def test_spectral_normalization_finds_the_largest_singular_value(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    normalized = reparameterize(copy.deepcopy(layer), "sn", iterations=500).train()
    normalized(x)
    rows = Units.of(layer).rows(normalized.eval().weight)
    torch.testing.assert_close(torch.linalg.matrix_norm(rows, 2), torch.ones((), dtype=F64), rtol=1e-5, atol=0)


def test_spectral_normalization_is_torchs_with_the_same_vectors() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 2, dtype=F64)
    torchs = parametrizations.spectral_norm(copy.deepcopy(plain), n_power_iterations=2)
    ours = reparameterize(copy.deepcopy(plain), "sn", iterations=2)
    theirs, mine = torchs.parametrizations.weight[0], ours.parametrizations.weight[0]
    mine.running_u.copy_(theirs._u)
    mine.running_v.copy_(theirs._v)
    x = torch.randn(2, 3, 5, 5, dtype=F64)
    for _ in range(3):  # two steps of power iteration each
        a, b = torchs(x), ours(x)
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(
        ours.parametrizations.weight.original.grad, torchs.parametrizations.weight.original.grad, rtol=1e-10, atol=1e-12
    )
    before = mine.running_u.clone()
    ours.eval()(x)
    assert torch.equal(mine.running_u, before), "evaluation makes no step of power iteration"


# --- projected weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", ["direct", "none"])
@settings(deadline=None, max_examples=20)
@given(case=layers_and_inputs())
def test_projection_keeps_every_unit_at_length_one(g: str, case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    model = nn.Sequential(reparameterize(copy.deepcopy(layer), "wn_projected", g=g))
    trained = model[0].parametrizations.weight
    v = trained.original1 if g == "direct" else trained.original
    norm = Units.of(layer).norm
    torch.testing.assert_close(norm(v), torch.ones_like(norm(v)), rtol=1e-12, atol=0)
    length = norm(layer.weight) if g == "direct" else torch.ones_like(norm(v))
    torch.testing.assert_close(norm(model[0].weight), length, rtol=1e-12, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.register_step_post_hook(lambda *_: project(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).tanh().sum().backward()
        stepped = v.detach() - 0.5 * v.grad
        optimizer.step()
        expected = Units.of(layer).scale(stepped, 1 / norm(stepped))
        torch.testing.assert_close(v.detach(), expected, rtol=1e-11, atol=1e-12)


def test_projection_is_another_mechanism_than_wn() -> None:
    """wn's gradient has no part along v; here it has one, and the projection takes it back after the step."""
    torch.manual_seed(0)
    plain, x = nn.Linear(3, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    along = {}
    for name in ("wn", "wn_projected"):
        layer = reparameterize(copy.deepcopy(plain), name)
        v = layer.parametrizations.weight.original1
        layer(x).square().sum().backward()
        along[name] = float((v.grad * v.detach()).sum(1).abs().max())
    assert along["wn"] < 1e-12
    assert along["wn_projected"] > 1e-3


# --- what each entry says of itself ------------------------------------------------------------------------------


def random_observations(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", names())
def test_batch_independence_is_what_the_entry_claims(name: str) -> None:
    network = build_q_network(QNetworkSpec(4, name, hidden_units=12), seed=0).double().train()
    batch, others = random_observations(4, seed=1), random_observations(4, seed=2)
    others[1] = batch[1]
    with torch.no_grad():
        among, among_others = (copy.deepcopy(network)(x)[1] for x in (batch, others))
    close = torch.allclose(among, among_others, rtol=1e-11, atol=1e-11)
    assert close == get(name).batch_independent


@pytest.mark.parametrize("name", names())
def test_training_mode_is_what_the_entry_claims(name: str) -> None:
    """Without a training mode, a forward pass changes no buffer and equals that of evaluation mode."""
    network = build_q_network(QNetworkSpec(4, name, hidden_units=12), seed=0).double()
    before = copy.deepcopy(dict(network.named_buffers()))
    x = random_observations(4)
    with torch.no_grad():
        same = torch.equal(copy.deepcopy(network).eval()(x), network.train()(x))
    same = same and all(torch.equal(buffer, before[key]) for key, buffer in network.named_buffers())
    assert same != get(name).has_training_mode


@pytest.mark.parametrize("name", names())
def test_preserving_the_output_is_what_the_entry_claims(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)).to(F64).eval()
    x = torch.randn(4, 2, 4, 4, dtype=F64)
    with torch.no_grad():
        close = torch.allclose(reparameterize(copy.deepcopy(model), name)(x), model(x), rtol=1e-9, atol=1e-9)
    assert close == get(name).preserves_output


def test_which_layers_of_a_q_network_are_treated() -> None:
    def treated(name: str, **changes: object) -> list[str]:
        from wn_rl.parameterizations.api import treated_layers

        return list(treated_layers(build_q_network(QNetworkSpec(2, name, hidden_units=3, **changes), seed=0)))

    hidden = ["convolutions.0", "convolutions.1", "convolutions.2", "hidden"]
    assert treated("wn") == treated("bn") == [*hidden, "output"]
    assert treated("ln") == treated("wn_projected") == hidden
    assert treated("sn") == ["hidden"]
    assert treated("sn", layers=("conv*", "output")) == [*hidden[:3], "output"]


# --- options -----------------------------------------------------------------------------------------------------


def test_options_are_read_from_texts_and_checked() -> None:
    assert resolve("bn", {"eps": "1e-5", "rate": 1}).options() == {"eps": 1e-5, "rate": 1.0}
    assert resolve("sn", {"iterations": "3"}).options() == {"iterations": 3, "eps": 1e-12}
    assert resolve("wn").options() == {"g": "direct"}
    assert resolve("standard").options() == {}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wn", {"h": 1}, "'wn' has no option 'h'; there are: g"),
        ("standard", {"g": "exp"}, "'standard' has no option 'g'; it has none"),
        ("wn", {"g": "log"}, "g is one of direct, exp, not 'log'"),
        ("wn", {"g": ["exp"]}, "g is one of direct, exp"),
        ("bn", {"eps": "small"}, "eps is of type float, not 'small'"),
        ("bn", {"eps": math.nan}, "eps must be from 0 to 1, not nan"),
        ("bn", {"rate": 2}, "rate must be from 0 to 1, not 2"),
        ("bn", {"rate": True}, "rate is not True"),
        ("bn", {"rate": None}, "rate is not None"),
        ("sn", {"iterations": "1.5"}, "iterations is of type int"),
        ("sn", {"iterations": 0}, "iterations must be from 1"),
        ("sn", {"iterations": 1.9}, "iterations is of type int, not 1.9"),
        ("ln", {"over": "batch"}, "over is one of example, units"),
    ],
)
def test_a_wrong_option_is_one_line(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        reparameterize(nn.Linear(2, 2), name, **options)
    assert "\n" not in str(error.value)


def test_options_of_ones_own_may_be_choices_of_numbers_and_may_be_needed() -> None:
    @dataclass(frozen=True)
    class Own(Parameterization):
        name = "own"
        power: int
        kind: Literal[1, 2] = 1

    assert make(Own, {"power": "3", "kind": "2"}) == Own(3, 2)
    with pytest.raises(ValueError, match="'own' needs the option 'power'"):
        make(Own, {})


def test_every_option_says_what_its_source_did() -> None:
    for name in names():
        entry = get(name)
        for option in make(entry, {}).options():
            assert f"        {option}:" in str(entry.__doc__), f"{name}.{option} is not documented"


def test_a_name_with_a_colon_or_a_space_cannot_be_registered() -> None:
    for name in ("a:b", "a b", "", "a/b"):
        with pytest.raises(ValueError, match="is not a name"):
            register(name)
