"""Layers are reset, made plain by torch, loaded from older files and treated again without anything left behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wn_rl
from wn_rl.parameterizations import names
from wn_rl.parameterizations.api import treated_layers
from wn_rl.parameterizations.base import entry_of

TREATED = [name for name in names() if name != "standard" and ":" not in name]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4),
    "linear without bias": lambda: nn.Linear(5, 4, bias=False),
    "conv": lambda: nn.Conv2d(3, 4, 2),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 2),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "gru cell": lambda: nn.GRUCell(3, 4),
}


def treats(param: str, kind: str) -> bool:
    return kind not in ("lstm", "gru cell") or param in ("wn", "sn", "wn_projected")


CASES = [(param, kind) for param in TREATED for kind in LAYERS if treats(param, kind)]


def made(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[kind]()


# --- reset_parameters and reinitialize ---------------------------------------------------------------------------


@pytest.mark.parametrize(("param", "kind"), CASES)
def test_reset_parameters_draws_what_the_plain_layer_draws(param: str, kind: str) -> None:
    """The same weights from the same seed, of recurrent layers no negative g; the parameters stay the same ones."""
    layer, plain = made(kind), made(kind)
    wn_rl.reparameterize(layer, param)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3)
    before = list(layer.parameters())
    torch.manual_seed(7)
    layer.reset_parameters()  # type: ignore[operator]
    torch.manual_seed(7)
    plain.reset_parameters()  # type: ignore[operator]
    expected = wn_rl.reparameterize(plain, param)
    for (name, value), other in zip(layer.state_dict().items(), expected.state_dict().values(), strict=True):
        if "running_" not in name or param != "sn":  # whose vectors of the power method are drawn after all weights
            assert torch.equal(value, other), name
    assert all(ours is theirs for ours, theirs in zip(layer.parameters(), before, strict=True))
    if param == "wn":
        assert all(bool((g > 0).all()) for name, g in layer.named_parameters() if name.endswith("original0"))


@pytest.mark.parametrize("param", TREATED)
def test_a_copy_resets_itself_and_a_folded_layer_is_an_ordinary_one(param: str) -> None:
    layer = wn_rl.reparameterize(made("linear"), param)
    copied = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    copied.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in copied.state_dict().items())
    if entry_of(layer).foldable:  # type: ignore[union-attr]
        folded = wn_rl.fold(copied)
        assert "reset_parameters" not in vars(folded)
        weight = folded.weight.clone()
        folded.reset_parameters()
        assert not torch.equal(folded.weight, weight)
    if "parametrizations" not in layer._modules:  # torch itself pickles no parametrized module
        torch.manual_seed(3)
        again = pickle.loads(pickle.dumps(layer))
        again.reset_parameters()
        assert any(not torch.equal(value, before[name]) for name, value in again.state_dict().items())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("param", [*TREATED, None])
def test_reinitialize_draws_by_its_seed_and_touches_nothing_else(param: str | None) -> None:
    network = model()
    if param is not None:
        wn_rl.reparameterize(network, param, include=["0", "3"])
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    assert wn_rl.reinitialize(network, 5, ["3", nn.Conv2d]) is network
    assert torch.equal(torch.get_rng_state(), state)
    first = copy.deepcopy(network.state_dict())
    untouched = {name for name in before if name.startswith("5.")}
    assert untouched
    for name in untouched:
        assert torch.equal(first[name], before[name])
    assert any(not torch.equal(first[name], before[name]) for name in before.keys() - untouched)
    wn_rl.reinitialize(network, 5, ["3", nn.Conv2d])
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())
    wn_rl.reinitialize(network, 6)
    assert all(not torch.equal(network.state_dict()[name], before[name]) for name in ("5.weight", "5.bias"))
    assert treated_layers(network).keys() == ({"0", "3"} if param else set())


def test_reinitialize_with_an_initializer_of_ones_own() -> None:
    network = wn_rl.reparameterize(model(), "wn")
    wn_rl.reinitialize(network, 0, initialize=lambda layer: nn.init.constant_(layer.weight, 0.5))  # type: ignore[arg-type]
    assert torch.allclose(network[3].weight, torch.full((6, 12), 0.5))
    assert torch.allclose(network[3].parametrizations.weight.original0.detach(), torch.full((6, 1), 12**0.5 / 2))  # type: ignore[union-attr]
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="no length to divide by"):
        wn_rl.reinitialize(network, 0, initialize=lambda layer: nn.init.zeros_(layer.weight))  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="no layer matches 'hiden'"):
        wn_rl.reinitialize(network, 0, "hiden")


def test_an_optimizer_goes_on_after_a_reset() -> None:
    network = wn_rl.reparameterize(model(), "wn")
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    wn_rl.reinitialize(network, 3)
    before = copy.deepcopy(network.state_dict())
    network(torch.randn(4, 1, 3, 3)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- what torch takes off ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("param", ["wn", "sn", "wn_projected"])
def test_after_torchs_remove_parametrizations_a_layer_is_an_ordinary_one(param: str, kind: str) -> None:
    layer = wn_rl.reparameterize(nn.Sequential(made(kind)), param)[0].eval()
    computed = {name: getattr(layer, name).detach().clone() for name in list(layer.parametrizations)}  # type: ignore[arg-type, union-attr]
    for name in computed:
        parametrize.remove_parametrizations(layer, name)
    assert entry_of(layer) is None
    assert treated_layers(layer) == {}
    wn_rl.fold(layer)  # there is nothing to fold
    for name, value in computed.items():
        assert torch.equal(getattr(layer, name), value)
    torch.manual_seed(1)
    layer.reset_parameters()  # type: ignore[operator]
    for again in ("wn", "sn"):
        wn_rl.reparameterize(layer, again)
        assert list(treated_layers(layer)) == [""]
        wn_rl.fold(layer)
    if kind == "lstm":
        assert layer(torch.randn(2, 1, 3))[0].shape == (2, 1, 8)


def test_a_recurrent_layer_of_which_torch_made_one_weight_plain_is_folded() -> None:
    layer = wn_rl.reparameterize(made("lstm"), "wn").eval()
    x = torch.randn(3, 2, 3)
    expected = layer(x)[0]
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    torch.testing.assert_close(wn_rl.fold(layer)(x)[0], expected)
    assert not hasattr(layer, "parametrizations")


# --- all or nothing ----------------------------------------------------------------------------------------------


def odd_layers() -> dict[str, Callable[[], nn.Module]]:
    def frozen() -> nn.Module:
        layer = nn.Linear(4, 4)
        return layer.requires_grad_(False)

    return {
        "complex": lambda: nn.Linear(4, 4, dtype=torch.complex64),
        "float8": lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn),
        "meta": lambda: nn.Linear(4, 4, device="meta"),
        "lazy": lambda: nn.LazyLinear(4),
        "frozen": frozen,
        "zero": lambda: nn.Linear(4, 4).apply(lambda layer: nn.init.zeros_(layer.weight)),  # type: ignore[arg-type]
        "half": lambda: nn.Linear(4, 4).half(),
        "recurrent": lambda: nn.GRU(4, 4),
    }


def everything_of(network: nn.Module) -> list[Any]:
    """What a layer is made of: class, parameters by identity and value, buffers, modules, hooks, other attributes."""
    found: list[Any] = []
    for name, module in network.named_modules():
        state = {key: list(value.items()) if isinstance(value, dict) else value for key, value in vars(module).items()}
        values = [
            (key, id(value), None if value.is_meta or isinstance(value, nn.UninitializedParameter) else value.clone())
            for key, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None
        ]
        found.append((name, type(module), {key: repr(value) for key, value in state.items()}, values))
    return found


def same(before: list[Any], after: list[Any]) -> bool:
    if [entry[:3] for entry in before] != [entry[:3] for entry in after]:
        return False
    for (*_, ours), (*_, theirs) in zip(before, after, strict=True):
        if [entry[:2] for entry in ours] != [entry[:2] for entry in theirs]:
            return False
        for (*_, a), (*_, b) in zip(ours, theirs, strict=True):
            if a is not None and not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                return False
    return True


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("odd", odd_layers())
@pytest.mark.parametrize("param", TREATED)
@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_cannot_be_treated_leaves_the_model_as_it_was(param: str, odd: str, position: int) -> None:
    """Whatever the layer, wherever it stands: it works, or one ValueError names the layer and nothing changed."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 4), nn.Linear(4, 4)]
    layers.insert(position, odd_layers()[odd]())
    network = nn.Sequential(*layers)
    handle = network[1].register_forward_hook(lambda *_: None)
    before = everything_of(network)
    refusal = ""
    try:
        wn_rl.reparameterize(network, param)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert f"layer '{position}'" in refusal
        assert "\n" not in refusal
        assert same(before, everything_of(network))
        handle.remove()
        assert not network[1]._forward_hooks
        wn_rl.reparameterize(network, param, exclude=str(position))


def test_a_failure_in_the_middle_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a parameterization of somebody's own raises while it is put on, or folded; Ctrl-C too."""
    for raised, expected in ((RuntimeError("no room"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):
        network = model()
        before = everything_of(network)
        calls: list[int] = []

        def breaks(
            self: object, layer: nn.Module, real: Any, raised: BaseException = raised, calls: list[int] = calls
        ) -> None:
            real(self, layer)
            calls.append(1)
            if len(calls) == 3:
                raise raised

        kind = type(wn_rl.parameterizations.get("wn")())
        real_apply, real_fold = kind.apply, kind.fold
        with monkeypatch.context() as patched:
            patched.setattr(kind, "apply", lambda self, layer, real=real_apply: breaks(self, layer, real))
            with pytest.raises(
                expected, match="cannot be put on it: RuntimeError: no room" if expected is ValueError else ""
            ):
                wn_rl.reparameterize(network, "wn")
        assert same(before, everything_of(network))
        wn_rl.reparameterize(network, "wn")
        x = torch.randn(2, 1, 3, 3)
        output, state = network(x), copy.deepcopy(network.state_dict())
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(kind, "fold", lambda self, layer, real=real_fold: breaks(self, layer, real))
            with pytest.raises(expected):
                wn_rl.fold(network)
        assert torch.equal(network(x), output)
        assert network.state_dict().keys() == state.keys()
        assert wn_rl.fold(network)(x).shape == output.shape


# --- files of torch's older weight norm --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv", "lstm"])
def test_weights_of_torchs_older_weight_norm_load(kind: str) -> None:
    older, newer = made(kind, 1), made(kind, 1)
    matrices = [name for name, _ in older.named_parameters() if name.startswith("weight")]
    for name in matrices:
        torch.nn.utils.weight_norm(older, name)
        torch.nn.utils.parametrizations.weight_norm(newer, name)
    assert any(name.endswith("_g") for name in older.state_dict())
    x = torch.randn(2, 3, 4, 4) if kind == "conv" else torch.randn(2, 1, 3) if kind == "lstm" else torch.randn(2, 5)
    for source in (older, newer):
        ours = nn.Sequential(wn_rl.reparameterize(made(kind, 2), "wn"))
        ours.load_state_dict({f"0.{name}": value for name, value in source.state_dict().items()})
        expected, found = source(x), ours(x)
        pair = (found[0], expected[0]) if kind == "lstm" else (found, expected)
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)
    exponential = wn_rl.reparameterize(made(kind, 2), "wn", g="exp")
    exponential.load_state_dict(older.state_dict())
    for name in matrices:
        torch.testing.assert_close(getattr(exponential, name), getattr(newer, name), rtol=1e-5, atol=1e-6)
    copied = copy.deepcopy(exponential)
    copied.load_state_dict(older.state_dict())
    wn_rl.fold(copied)
    assert not copied._load_state_dict_pre_hooks
