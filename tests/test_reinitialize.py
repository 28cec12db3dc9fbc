"""reset_parameters() and reinitialize() draw what the plain layer would draw, under every parameterization."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import wn_rl
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import fold, get, initialize_from_data, names, reinitialize, reparameterize

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(3, 4),
    "no bias": lambda: nn.Linear(3, 4, bias=False),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "GRUCell": lambda: nn.GRUCell(3, 4),
}
RANDOM = ("running_u", "running_v")


def treatable(name: str, kind: str) -> bool:
    return isinstance(LAYERS[kind](), get(name).layers)


CASES = [(name, kind) for name in names() for kind in LAYERS if treatable(name, kind)]


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == expected_state.keys()
    for key, value in expected_state.items():
        if not key.endswith(RANDOM):
            assert torch.equal(found_state[key], value), key


def trained(model: nn.Module) -> nn.Module:
    """``model`` with every tensor changed, as training would."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(1.5).add_(0.25)
    return model


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_layer_draws_what_the_plain_layer_draws(name: str, kind: str) -> None:
    layer = trained(reparameterize(LAYERS[kind](), name))
    parameters = [id(parameter) for parameter in layer.parameters()]
    storage = [parameter.data_ptr() for parameter in layer.parameters()]
    torch.manual_seed(7)
    layer.reset_parameters()
    torch.manual_seed(7)
    plain = LAYERS[kind]()
    torch.manual_seed(7)
    plain.reset_parameters()
    assert_same_state(layer, reparameterize(plain, name))
    assert [id(parameter) for parameter in layer.parameters()] == parameters
    assert [parameter.data_ptr() for parameter in layer.parameters()] == storage


def test_g_of_a_recurrent_layer_is_the_length_of_what_was_drawn() -> None:
    layer = reparameterize(nn.LSTM(3, 4), "wn")
    layer.reset_parameters()
    for slot in layer.parametrizations.values():
        torch.testing.assert_close(slot.original0.flatten(), slot.original1.square().sum(1).sqrt())
        assert float(slot.original1.detach().abs().max()) <= 1 / math.sqrt(4)


@pytest.mark.parametrize("name", ["wn", "bn"])
def test_a_copy_resets_itself_and_a_folded_layer_is_ordinary(name: str) -> None:
    layer = reparameterize(nn.Linear(3, 4), name)
    copied = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    copied.reset_parameters()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert not torch.equal(copied.weight, layer.weight)
    fold(copied)
    torch.manual_seed(1)
    copied.reset_parameters()
    torch.manual_seed(1)
    assert torch.equal(copied.weight, nn.Linear(3, 4).weight)
    assert [key for key, _ in copied.named_parameters()] == ["weight", "bias"]


def test_a_pickled_layer_resets_itself() -> None:
    layer = reparameterize(nn.Linear(3, 4), "bn")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    before = layer.weight.clone()
    with torch.no_grad():
        loaded.normalization.gain.fill_(3.0)
    loaded.reset_parameters()
    assert loaded.normalization.gain.tolist() == [1.0] * 4
    assert torch.equal(layer.weight, before)


class Orthogonal(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.constant_(self.bias, 0.5)


@pytest.mark.parametrize("name", ["wn", "sn", "bn", "wn_projected"])
def test_a_class_that_draws_its_own_way_goes_on_doing_so(name: str) -> None:
    layer = trained(reparameterize(Orthogonal(4, 4), name))
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(4), rtol=0, atol=1e-5)
    bias = layer.bias if layer.bias is not None else layer.normalization.bias
    assert bias.tolist() == [0.5] * 4


class Zero(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def test_what_cannot_be_drawn_is_an_error_and_changes_nothing() -> None:
    layer = Zero(3, 2)
    nn.init.ones_(layer.weight)
    reparameterize(layer, "wn")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="only zero weights"):
        layer.reset_parameters()
    with pytest.raises(ValueError, match="only zero weights"):
        reinitialize(nn.Sequential(nn.Linear(3, 3), layer), 1)
    for tensor in ("bias", "weight"):
        more = reparameterize(nn.Linear(3, 2), "wn")
        parametrize.register_parametrization(more, tensor, nn.Tanh())
        with pytest.raises(ValueError, match="has more than its parameterization"):
            more.reset_parameters()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


# --- a whole model -----------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "torso": nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6)),
            "attention": nn.MultiheadAttention(6, 2),
            "output": nn.Linear(6, 3),
        }
    )


def reset_plain(model: nn.Module, seed: int) -> nn.Module:
    """What torch alone makes of a model without parameterization."""
    torch.manual_seed(seed)
    for name in ("embedding", "torso.0", "torso.1", "torso.2", "attention.out_proj"):
        model.get_submodule(name).reset_parameters()
    model.get_submodule("attention")._reset_parameters()
    model.get_submodule("output").reset_parameters()
    return model


@pytest.mark.parametrize("name", [name for name in names() if name != "standard"])
def test_every_parameterization_starts_from_the_weights_that_torch_draws_for_the_plain_model(name: str) -> None:
    linear = ["torso.0", "torso.2", "output"]
    model = trained(reparameterize(network(), name, include=linear))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert reinitialize(model, 3) is model
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
    assert_same_state(model, reparameterize(reset_plain(network(), 3), name, include=linear))


def test_the_seed_alone_decides() -> None:
    first, second, third = (reparameterize(network(), "wn", include="output") for _ in range(3))
    assert_same_state(reinitialize(first, 5), reinitialize(second, 5))
    assert not torch.equal(reinitialize(third, 6)["output"].weight, first["output"].weight)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("output", {"output"}),
        (["out*"], {"output"}),
        (nn.Embedding, {"embedding"}),
        (["torso.*", nn.Embedding], {"torso", "embedding"}),
    ],
)
def test_other_layers_keep_their_values(layers: Any, expected: set[str]) -> None:
    model = reparameterize(network(), "wn", include=["torso.0", "output"])
    before = copy.deepcopy(model.state_dict())
    reinitialize(model, 1, layers=layers)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == expected


def test_an_optimizer_goes_on_and_initialization_from_data_may_follow() -> None:
    model = reparameterize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "wn")
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        reinitialize(model, 2)
        initialize_from_data(model, x)
        torch.testing.assert_close(model(x).std(0, correction=0), torch.ones(2), rtol=1e-4, atol=1e-4)


def test_running_statistics_start_afresh() -> None:
    model = reparameterize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "bn", include="0")
    for _ in range(3):
        model(torch.randn(8, 3) * 5 + 1)
    reinitialize(model, 1)
    for normalization in (model[0].normalization, model[1]):
        assert normalization.running_mean.tolist() == [0.0] * 4
        assert normalization.running_var.tolist() == [1.0] * 4
    assert int(model[1].num_batches_tracked) == 0


def test_a_q_network_draws_its_configured_initial_weights() -> None:
    model = build_q_network(QNetworkSpec(3, "wn", hidden_units=8, weight_init="he"), seed=1)
    before = copy.deepcopy(model.state_dict())
    reinitialize(model, 4, layers=["hidden", "output"])
    for layer in (model.hidden, model.output):
        bound = math.sqrt(3 / layer.in_features)
        assert layer.bias.tolist() == [pytest.approx(0.1)] * layer.out_features
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound * 1.0001
    kept = [key for key in before if key.startswith("convolutions")]
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in kept)


def test_an_initializer_of_torch_sees_plain_layers() -> None:
    model = reparameterize(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), "wn")

    def orthogonal(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            nn.init.orthogonal_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    reinitialize(model, 0, init=orthogonal)
    torch.testing.assert_close(model[0].weight @ model[0].weight.T, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(model[1].weight_hh_l0.T @ model[1].weight_hh_l0, torch.eye(3), rtol=0, atol=1e-5)
    assert not model[1].bias_ih_l0.any()


@pytest.mark.parametrize("name", ["wn", "wn_projected"])
@pytest.mark.parametrize("kind", ["Linear", "LSTM", "ConvTranspose2d"])
def test_a_weight_may_be_assigned(name: str, kind: str) -> None:
    layer = reparameterize(LAYERS[kind](), name)
    weight = "weight_hh_l1" if kind == "LSTM" else "weight"
    new = nn.init.orthogonal_(torch.empty_like(getattr(layer, weight)))
    setattr(layer, weight, new)
    torch.testing.assert_close(getattr(layer, weight), new)


class WithScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("model", "seed", "layers", "message"),
    [
        (network, -1, None, "the seed must be from 0"),
        (network, 1, "outptu", "no layer matches 'outptu'; there are: embedding, torso.0"),
        (WithScale, 1, None, r"'the model itself' \(WithScale\) has parameters \(scale\).*layers=\"\*\""),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), 1, None, r"layer '1' \(LazyLinear\).*run the model"),
        (lambda: nn.Linear(2, 2, device="meta"), 1, None, "no values on the meta device"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), 1, None, "parametrization of torch's own"),
        (lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5), 1, None, "no parameter of its own"),
        pytest.param(
            lambda: weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
            1,
            None,
            "no parameter of its own",
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm"),
        ),
    ],
)
def test_what_cannot_be_reinitialized_is_one_line(
    model: Callable[[], nn.Module], seed: int, layers: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        reinitialize(model(), seed, layers=layers)
    assert "\n" not in str(error.value)


def test_a_compiled_model_and_a_layer_used_twice_are_reset_once() -> None:
    layer = nn.Linear(3, 3)
    model = reparameterize(nn.Sequential(layer, nn.ReLU(), layer), "wn")
    reinitialize(torch.compile(model, backend="eager"), 2)
    torch.manual_seed(2)
    assert torch.equal(layer.parametrizations.weight.original1, nn.Linear(3, 3).weight)


def test_all_layers_but_a_parameter_of_the_model_itself() -> None:
    model = WithScale()
    before = model.layer.weight.clone()
    wn_rl.reinitialize(model, 1, layers="*")
    assert not torch.equal(model.layer.weight, before)
    assert model.scale.tolist() == [1.0]
