"""The library on any torch model: choice of layers, recurrent layers, folding, and what torch does with models."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

import wn_rl
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import (
    OutputNormalization,
    fold,
    get,
    initialize_from_data,
    names,
    project,
    reparameterize,
)
from wn_rl.parameterizations.api import treated_layers

F64 = torch.float64
FOLDABLE = [name for name in names() if get(name).foldable]
ON_WEIGHTS = [name for name in names() if not issubclass(get(name), OutputNormalization)]


class Branches(nn.Module):
    """Two ways from the input, joined; an embedding, a layer norm and a transposed convolution on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.left = nn.Sequential(nn.Conv1d(4, 6, 3), nn.GELU(), nn.ConvTranspose1d(6, 4, 3, groups=2))
        self.right = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3, bias=True)

    def forward(self, tokens: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens).mT
        joined = self.left(x) + torch.tanh(self.right(x))
        joined = joined if gate is None else joined * gate
        return self.head(self.norm(joined)).mean(1)


def branches() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Branches().to(F64), torch.randint(7, (9, 5))


def train(model: nn.Module, inputs: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.square().sum().backward()
        optimizer.step()
        project(model)


# --- which layers ------------------------------------------------------------------------------------------------


def test_every_layer_but_embeddings_and_norms_is_treated() -> None:
    model, _ = branches()
    assert list(treated_layers(reparameterize(model, "wn"))) == ["left.0", "left.2", "right", "head"]


@pytest.mark.parametrize(
    ("include", "exclude", "treated"),
    [
        (["left.*"], [], ["left.0", "left.2"]),
        ([nn.Linear], ["head"], ["right"]),
        (None, [nn.ConvTranspose1d, "h?ad"], ["left.0", "right"]),
        (["right", nn.Conv1d], [], ["left.0", "right"]),
        ([], [], []),
    ],
)
def test_layers_are_chosen_by_name_pattern_and_type(
    include: list[str | type[nn.Module]] | None, exclude: list[str | type[nn.Module]], treated: list[str]
) -> None:
    model, _ = branches()
    reparameterize(model, "wn", include=include, exclude=exclude)
    assert list(treated_layers(model)) == treated


def test_a_single_choice_needs_no_list() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    assert list(treated_layers(reparameterize(model, "wn", include="10"))) == ["10"]
    assert list(treated_layers(reparameterize(model, "sn", include=model[3]))) == ["3", "10"]
    with pytest.raises(ValueError, match="parametrized already"):
        reparameterize(model, "wn", include=nn.Linear)


def test_a_layer_itself_may_be_chosen_and_two_entries_live_in_one_model() -> None:
    model, tokens = branches()
    reparameterize(model, "wn", include=[model.right])
    reparameterize(model, "ln", include=["left.0"])
    reparameterize(model, "bn", exclude=["right", "left.0", "left.2"])
    assert {name: entry.name for name, (_, entry) in treated_layers(model).items()} == {
        "left.0": "ln",
        "right": "wn",
        "head": "bn",
    }
    train(model, tokens)


def one_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model[2].bias = model[0].bias
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "name", "options", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "wn",
            {"include": ["hidden"]},
            "no layer matches 'hidden'; there are: the model itself",
        ),
        (lambda: nn.ReLU(), "wn", {"exclude": [nn.Conv2d]}, "no layer matches 'Conv2d'; there are: none"),
        (tied, "wn", {}, r"layer '1' \(Linear\): its weight is shared with another layer"),
        (one_bias, "bn", {}, r"layer '0' \(Linear\): its bias is shared with another layer"),
        (one_bias, "mean_only_bn", {"exclude": ["0"]}, r"layer '2' \(Linear\): its bias is shared"),
        (one_bias, "ln", {}, "its bias is shared with another layer"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "wn", {}, "layer '0' .*lazy layer.*run the model once"),
        (lambda: nn.LSTM(2, 2), "bn", {}, r"the model itself' \(LSTM\): 'bn' does not treat this type"),
        (lambda: nn.MultiheadAttention(4, 2), "ln", {}, "layer 'out_proj'.*attention that never calls it"),
        (lambda: reparameterize(nn.Linear(2, 2), "bn"), "wn", {}, "parametrized already; fold"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "sn", {}, "parametrized already"),
        (lambda: torch.nn.utils.weight_norm(nn.Linear(2, 2)), "wn", {}, "no parameter of its own: a hook"),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(2, 2)), "bn", {}, "no parameter of its own: a hook"),
        (
            lambda: torch.nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
            "wn",
            {},
            "no parameter of its own: a hook",
        ),
        (lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5), "standard", {}, "no parameter of its own"),
    ],
)
def test_what_cannot_be_treated_is_one_line_and_changes_nothing(
    model: Callable[[], nn.Module], name: str, options: dict[str, object], message: str
) -> None:
    built = nn.Sequential(nn.Linear(2, 2), model())
    include = options.get("include", options.get("exclude"))
    target = built[1] if include is not None else built
    before = [(key, id(parameter)) for key, parameter in built.named_parameters()]
    with pytest.raises(ValueError, match=message.replace("layer '", "layer '.*").replace("the model itself'", ".*'")):
        reparameterize(target, name, **options)
    assert [(key, id(parameter)) for key, parameter in built.named_parameters()] == before


def test_one_may_change_from_standard_to_another_and_fold_and_take_a_third() -> None:
    model, tokens = branches()
    expected = model(tokens)
    for name in ("standard", "wn", "wn_projected"):
        reparameterize(model, name)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-11, atol=1e-11)
        fold(model) if name == "wn" else None


# --- initialization from data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in names() if name != "ln"])
def test_initialization_from_data_walks_through_branches_and_further_arguments(name: str) -> None:
    model, tokens = branches()
    reparameterize(model, name).eval()
    gate = torch.rand(9, 1, 5, dtype=F64)
    seen: dict[str, Tensor] = {}
    initialize_from_data(model, tokens, gate, std=0.7)
    for key, (layer, entry) in treated_layers(model).items():
        if entry.has_training_mode and not entry.batch_independent:
            layer.normalization.train()

        def keep(module: nn.Module, _: object, output: Tensor, key: str = key) -> None:
            seen[key] = output if isinstance(module, nn.Linear) else output.movedim(1, -1)

        layer.register_forward_hook(keep)
    model(tokens, gate)
    assert len(seen) == 4
    for key, output in seen.items():
        rows = output.flatten(0, -2)
        torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), rtol=0, atol=1e-9, msg=key)
        std = rows.std(0, correction=0)
        torch.testing.assert_close(std, torch.full_like(std, 0.7), rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("name", ["bn", "mean_only_bn", "wn_mean_only_bn"])
def test_running_statistics_become_those_of_the_batch(name: str) -> None:
    """So acting, which uses running statistics, starts with the values that the initialization promised."""
    model, tokens = branches()
    reparameterize(model, name).eval()
    initialize_from_data(model, tokens)
    rates = {layer.normalization.rate for layer, _ in treated_layers(model).values()}
    assert rates == {0.1}
    assert not any(layer.normalization.training for layer, _ in treated_layers(model).values())
    in_evaluation = model(tokens)
    in_training = copy.deepcopy(model).train()(tokens)
    # bn's running variance is the unbiased one: of 9 × 3 values or more here.
    torch.testing.assert_close(in_evaluation, in_training, rtol=1e-9, atol=0.05 if name == "bn" else 1e-9)


def test_recurrent_layers_and_models_without_parameterization_are_refused() -> None:
    model = reparameterize(nn.LSTM(3, 4), "wn")
    with pytest.raises(ValueError, match="is recurrent: it is used at every time step"):
        initialize_from_data(model, torch.rand(2, 1, 3))
    with pytest.raises(ValueError, match="carries no parameterization"):
        initialize_from_data(nn.Linear(2, 2), torch.rand(3, 2))
    with pytest.raises(TypeError, match="'wn_projected' has no scale"):
        initialize_from_data(reparameterize(nn.Linear(2, 2), "wn_projected", g="none"), torch.rand(3, 2))


@pytest.mark.parametrize("half", ["a model in bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["standard", "wn"])
def test_half_precision_does_not_take_ordinary_units_for_constant_ones(name: str, half: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    reparameterize(model, name)
    x = torch.rand(500, 784)
    if half == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            report = initialize_from_data(model, x)
    else:
        report = initialize_from_data(model.bfloat16(), x.bfloat16())
    assert set(report) == {"0", "2", "4"}
    seen = x
    for layer in model.float():
        seen = layer(seen)
        if isinstance(layer, nn.Linear):
            std = seen.std(0, correction=0)
            torch.testing.assert_close(std, torch.ones_like(std), rtol=0.1, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_initialization_of_spectral_normalization_does_not_depend_on_the_mode(training: bool) -> None:
    torch.manual_seed(0)
    layer, x = reparameterize(nn.Linear(64, 64, dtype=F64), "sn").train(training), torch.randn(200, 64, dtype=F64)
    initialize_from_data(layer, x)
    std = layer.eval()(x).std(0, correction=0)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        (torch.randn(9, 7), {}, RuntimeError, "shape"),
        (torch.full((9, 3), torch.nan), {}, ValueError, "layer '0' gives values that are not finite"),
        (torch.randn(3), {}, ValueError, "layer '0' sees a single example"),
        (torch.randn(9, 3), {"std": -1.0}, ValueError, "must be a number above 0"),
        (torch.randn(9, 3), {"std_of": {"1": 0.0}}, ValueError, "must be a number above 0"),
    ],
)
def test_an_initialization_that_fails_changes_nothing(
    batch: Tensor, options: dict[str, object], error: type[Exception], message: str
) -> None:
    model = reparameterize(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "wn")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        initialize_from_data(model, batch, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_shared_bias_is_not_initialized_and_folds_where_it_stays() -> None:
    """It would be set for one layer and change the other; reparameterized and folded it stays as it is."""
    x = torch.randn(9, 2)
    for name in ("standard", "wn"):
        model = reparameterize(one_bias(), name)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="layer '0': its bias is shared with another layer"):
            initialize_from_data(model, x)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        expected = model(x)
        torch.testing.assert_close(fold(model)(x), expected)
        assert model[0].bias is model[2].bias


@pytest.mark.parametrize("name", ["mean_only_bn", "wn_mean_only_bn", "bn"])
def test_parameters_that_came_to_be_shared_fold_to_the_same_output(name: str) -> None:
    torch.manual_seed(0)
    model, x = (
        reparameterize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).to(F64), name),
        torch.randn(9, 2),
    )
    model[2].normalization.bias = model[0].normalization.bias
    if name != "wn_mean_only_bn":
        model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].normalization.bias.normal_()
    model(x.to(F64))
    expected = model.eval()(x.to(F64))
    torch.testing.assert_close(fold(model)(x.to(F64)), expected)


# --- recurrent layers --------------------------------------------------------------------------------------------

RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "GRU": lambda: nn.GRU(3, 4, bias=False),
    "RNN": lambda: nn.RNN(3, 4),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_recurrent_layers_train_copy_and_fold(kind: str, name: str) -> None:
    torch.manual_seed(0)
    plain = RECURRENT[kind]().to(F64)
    x = torch.randn(5, 2, 3, dtype=F64)
    model = reparameterize(copy.deepcopy(plain), name)
    if get(name).preserves_output:
        torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-11, atol=1e-12)
    train(model, x)
    assert not torch.allclose(model(x)[0], plain(x)[0], atol=1e-4)
    model.eval()
    expected = model(x)[0].detach()
    copied = copy.deepcopy(model)  # right after a forward pass: torch's own parametrized LSTM fails here
    torch.testing.assert_close(copied(x)[0], expected)
    torch.testing.assert_close(copy.deepcopy(model.double().to("cpu"))(x)[0], expected)
    restored = reparameterize(RECURRENT[kind]().to(F64), name).eval()
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored(x)[0], expected)
    folded = fold(model)
    torch.testing.assert_close(folded(x)[0], expected, rtol=1e-12, atol=1e-12)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(plain(x)[0], expected, rtol=1e-12, atol=1e-12)
    train(folded, x)


def test_a_recurrent_layer_that_failed_can_still_be_copied() -> None:
    model = reparameterize(nn.LSTM(4, 8), "wn")
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 2, 7))
    copy.deepcopy(model)(torch.randn(5, 2, 4))


@pytest.mark.parametrize("name", ["wn", "sn", "wn_projected"])
def test_threads_that_share_a_recurrent_layer_each_have_their_weights(name: str) -> None:
    """One thread makes a whole forward pass while another is in the middle of its own."""
    model, x = reparameterize(nn.LSTM(3, 4), name).eval(), torch.randn(5, 2, 3)
    expected = model(x)[0].detach()
    begun, finished = threading.Event(), threading.Event()

    def wait(module: nn.Module, inputs: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert finished.wait(60)

    handle = model.register_forward_pre_hook(wait)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: model(x)[0].detach())
        assert begun.wait(60)
        torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)
        finished.set()
        torch.testing.assert_close(other.result(60), expected, rtol=0, atol=0)
    handle.remove()
    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: model(x)[0].detach(), range(150)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_forward_pass_of_a_recurrent_layer_makes_one_step_of_power_iteration() -> None:
    torch.manual_seed(0)
    lstm, x = reparameterize(nn.LSTM(3, 4), "sn"), torch.randn(5, 2, 3)
    computes = lstm.parametrizations["weight_hh_l0"][0]
    with torch.no_grad():
        lstm.parametrizations["weight_hh_l0"].original.normal_()
        u, v, weight = computes.running_u, computes.running_v, lstm.parametrizations["weight_hh_l0"].original
        one_step = nn.functional.normalize(weight @ v, dim=0)
        lstm(x)
    torch.testing.assert_close(u, one_step)


def test_a_recurrent_layer_that_torch_makes_plain_again_works() -> None:
    torch.manual_seed(0)
    lstm, x = reparameterize(nn.LSTM(3, 4), "wn"), torch.randn(5, 2, 3)
    expected = lstm(x)[0]
    for name in list(lstm.parametrizations):
        torch.nn.utils.parametrize.remove_parametrizations(lstm, name)
    assert type(lstm) is nn.LSTM
    torch.testing.assert_close(lstm(x)[0], expected)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
    assert bool((lstm(x)[0] == 0).all())


def test_torchs_own_parametrized_lstm_cannot_be_copied_after_a_forward_pass() -> None:
    """The behaviour that ours avoids; when torch mends it, the hooks on recurrent layers can go."""
    model = nn.LSTM(3, 4)
    torch.nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    model(torch.rand(2, 1, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)


def test_recurrent_cells_are_treated() -> None:
    model = reparameterize(nn.GRUCell(3, 4).to(F64), "wn")
    assert model.parametrizations.keys() == {"weight_ih", "weight_hh"}
    train(model, torch.rand(2, 3, dtype=F64))


# --- folding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_changes_no_output_and_leaves_no_trace(name: str) -> None:
    model, tokens = branches()
    plain_keys = model.state_dict().keys()
    plain_modules = [type(module) for module in model.modules()]
    reparameterize(model, name)
    initialize_from_data(model, tokens)
    train(model, tokens)
    model.eval()
    expected = model(tokens).detach()
    model.train()
    assert fold(model) is model
    assert model.training
    assert [type(module) for module in model.modules()] == plain_modules
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.state_dict().keys() == plain_keys
    assert not treated_layers(model)
    torch.testing.assert_close(model.eval()(tokens), expected, rtol=1e-12, atol=1e-12)
    assert all(parameter.requires_grad for parameter in model.parameters())
    train(model, tokens)
    other, _ = branches()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_a_copy_leaves_the_original_whole(name: str) -> None:
    """deepcopy shares the class that parametrize made for the layer, and torch's own removal edits that class."""
    model, tokens = branches()
    reparameterize(model, name).eval()
    expected = model(tokens)
    folded = fold(copy.deepcopy(model))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
    torch.testing.assert_close(folded(tokens), expected, rtol=1e-12, atol=1e-12)
    train(model, tokens)
    lstm = reparameterize(nn.LSTM(3, 4), "wn")
    fold(copy.deepcopy(lstm))
    lstm(torch.rand(2, 1, 3))


def test_a_parametrization_that_the_user_added_survives_folding() -> None:
    model = reparameterize(nn.Linear(3, 2), "wn")
    torch.nn.utils.parametrize.register_parametrization(model, "bias", nn.Tanh())
    x = torch.rand(4, 3)
    expected = model(x)
    torch.testing.assert_close(fold(model)(x), expected)
    assert set(model.state_dict()) == {"weight", "parametrizations.bias.original"}


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_frozen_model_folds_to_frozen_parameters(name: str) -> None:
    model, tokens = branches()
    reparameterize(model, name).eval().requires_grad_(False)
    expected = model(tokens)
    torch.testing.assert_close(fold(model)(tokens), expected, rtol=1e-12, atol=1e-12)
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in branches()[0].named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not list(model.buffers())


@pytest.mark.parametrize("name", ["mean_only_bn", "bn"])
def test_a_layer_without_bias_gains_one_when_a_mean_was_subtracted(name: str) -> None:
    torch.manual_seed(0)
    model = reparameterize(nn.Conv2d(2, 3, 2, bias=False, dtype=F64), name).train()
    x = torch.randn(4, 2, 5, 5, dtype=F64) + 1
    model(x)
    expected = model.eval()(x)
    torch.testing.assert_close(fold(model)(x), expected, rtol=1e-12, atol=1e-12)
    assert set(model.state_dict()) == {"weight", "bias"}


def test_layer_normalization_refuses_to_be_folded_by_name_and_nothing_is_changed() -> None:
    model, _ = branches()
    reparameterize(model, "ln", include=["head"])
    reparameterize(model, "wn", include=["right"])
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match="layer 'head': 'ln' cannot be folded"):
        fold(model)
    assert model.state_dict().keys() == before


# --- what torch does with models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_copies_and_state_dicts_carry_everything_and_share_nothing(name: str) -> None:
    model, tokens = branches()
    reparameterize(model, name)
    train(model, tokens)
    copied = copy.deepcopy(model)
    restored = reparameterize(branches()[0], name)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    expected = model.eval()(tokens).detach().clone()
    for other in (copied, restored):
        torch.testing.assert_close(other.eval()(tokens), expected, rtol=0, atol=0)
    train(model.train(), tokens)
    torch.testing.assert_close(copied(tokens), expected, rtol=0, atol=0)
    train(copied.train(), tokens)  # a copy is whole: it trains, folds and projects
    torch.testing.assert_close(copied.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("name", names())
def test_functional_calls_and_gradients_per_example(name: str) -> None:
    model, tokens = branches()
    reparameterize(model, name).eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(functional_call(model, state, (tokens,)), model(tokens))

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, parameters | dict(model.named_buffers()), (example[None],)).square().sum()

    parameters = {key: value.detach() for key, value in model.named_parameters()}
    one_by_one = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    model(tokens).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(one_by_one[key].sum(0), parameter.grad, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", names())
def test_autocast_runs_forward_and_backward(name: str) -> None:
    model, tokens = branches()
    reparameterize(model.float(), name)
    exact = copy.deepcopy(model)(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens)
    output.square().sum().backward()
    torch.testing.assert_close(output.float(), exact, rtol=0.2, atol=0.2)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in names() if name != "sn"])
def test_models_in_half_precision_train_and_stay_in_it(name: str) -> None:
    torch.manual_seed(0)
    model = reparameterize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), name)
    exact, x = copy.deepcopy(model), torch.randn(8, 2, 4, 4)
    model.bfloat16()
    for training in (True, False):
        output = model.train(training)(x.bfloat16())
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), exact.train(training)(x), rtol=0.2, atol=0.2)
    train(model.train(), x.bfloat16())
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", names())
def test_grouped_transposed_convolutions_take_another_memory_format(name: str) -> None:
    torch.manual_seed(0)
    model = reparameterize(nn.ConvTranspose2d(8, 4, 3, groups=2), name).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = model(x)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected)
    if get(name).foldable:
        torch.testing.assert_close(fold(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_single_example_has_no_batch_statistics() -> None:
    model = reparameterize(nn.Linear(3, 2), "mean_only_bn")
    with pytest.raises(ValueError, match="a single example has no batch statistics"):
        model(torch.randn(3))
    assert model.eval()(torch.randn(3)).shape == (2,)


def test_gradients_of_the_whole_q_network_as_a_function() -> None:
    """Its large layer takes a way of its own, which knows no transforms; there the plain one is taken."""
    network = build_q_network(QNetworkSpec(4, "wn"), seed=0)
    x = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    parameters = {key: value.detach() for key, value in network.named_parameters()}
    found = grad(lambda state: functional_call(network, state, (x,)).sum())(parameters)
    network(x).sum().backward()
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", names())
def test_torch_compile_traces_one_graph_with_the_same_output(name: str) -> None:
    """The tracer and autograd alone: generating code takes a compiler and half a minute."""
    model, tokens = branches()
    reparameterize(model, name).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    compiled(tokens).sum().backward()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_torch_compile_generates_code_that_trains(name: str) -> None:
    model, tokens = branches()
    reparameterize(model, name)
    reference = copy.deepcopy(model)
    train(torch.compile(model), tokens)
    train(reference, tokens)
    torch.testing.assert_close(model.eval()(tokens), reference.eval()(tokens), rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", names())
def test_distributed_data_parallel(name: str, tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, tokens = branches()
        reparameterize(model, name)
        reference = copy.deepcopy(model)
        train(nn.parallel.DistributedDataParallel(model), tokens)
        train(reference, tokens)
        torch.testing.assert_close(model.eval()(tokens), reference.eval()(tokens))
    finally:
        torch.distributed.destroy_process_group()


def test_an_entry_pickles_by_reference() -> None:
    for name in names():
        assert pickle.loads(pickle.dumps(get(name)())) == get(name)() or name == "standard"


def test_the_package_offers_the_library() -> None:
    for name in ("reparameterize", "initialize_from_data", "fold", "project", "register", "OutputNormalization"):
        assert getattr(wn_rl, name) is getattr(wn_rl.parameterizations, name)
