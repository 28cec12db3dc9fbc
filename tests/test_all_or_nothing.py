"""What fails leaves a model as it was, and what torch itself has done to a layer is understood."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from wn_rl.parameterizations import fold, get, initialize_from_data, names, project, reparameterize
from wn_rl.parameterizations.api import treated_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Complex modules"),
]
ON_WEIGHTS = ["wn", "sn", "wn_projected"]


def content(tensor: Tensor | None) -> object:
    """The tensor itself, how it is trained, and every byte of its values."""
    if tensor is None:
        return None
    lazy = isinstance(tensor, nn.parameter.UninitializedTensorMixin)
    values = None if lazy or tensor.is_meta else bytes(tensor.untyped_storage())
    return id(tensor), type(tensor), tensor.dtype, None if lazy else tensor.shape, tensor.requires_grad, values


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything a model consists of: modules, classes, attributes, hooks, tensors and their values."""
    seen = []
    for name, module in model.named_modules():
        plain = {
            key: list(map(id, value)) if isinstance(value, list) else set(value) if isinstance(value, set) else value
            for key, value in module.__dict__.items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        hooks = {
            key: [(number, id(hook)) for number, hook in value.items()]
            for key, value in plain.items()
            if "hooks" in key
        }
        tensors = [
            (key, content(value)) for store in (module._parameters, module._buffers) for key, value in store.items()
        ]
        seen.append((name, id(module), type(module), {**plain, **hooks}, tensors, list(module._modules)))
    return seen


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def zero_unit() -> nn.Module:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[1] = 0.0
    return layer


BAD: dict[str, Callable[[], nn.Module]] = {
    "complex": lambda: nn.Linear(3, 3, dtype=torch.complex64),
    "complex LSTM": lambda: nn.LSTM(3, 3, dtype=torch.complex64),
    "complex, frozen": lambda: frozen(nn.Conv2d(3, 3, 1, dtype=torch.complex128)),
    "float8": lambda: with_weight(torch.zeros(3, 3, dtype=torch.float8_e4m3fn)),
    "int8": lambda: with_weight(torch.ones(3, 3, dtype=torch.int8)),
    "quantized": lambda: with_weight(torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)),
    "lazy": lambda: nn.LazyLinear(3),
    "torch's parametrization": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "torch's older hook": lambda: weight_norm(nn.Linear(3, 3)),
    "torch's older hook, LSTM": lambda: weight_norm(nn.LSTM(3, 3), "weight_hh_l0"),
    "pruned": lambda: prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5),
    "treated": lambda: reparameterize(nn.Linear(3, 3), "wn"),
    "zero unit, complex": lambda: zero_unit().to(torch.complex64),
}


def good_layers() -> list[nn.Module]:
    return [
        nn.Linear(3, 3),
        frozen(nn.ConvTranspose1d(4, 4, 1, groups=2)),
        nn.Conv2d(3, 3, 1, device="meta"),
        nn.Linear(3, 3, dtype=torch.bfloat16).eval(),
    ]


@pytest.mark.parametrize("name", [name for name in names() if name != "standard"])
@pytest.mark.parametrize("kind", BAD)
def test_one_layer_that_cannot_be_treated_leaves_the_whole_model_as_it_was(name: str, kind: str) -> None:
    for position in range(5):
        layers = good_layers()
        if get(name).layers[-1] is nn.RNNCellBase:
            layers[2] = nn.LSTM(3, 3)
        layers.insert(position, BAD[kind]())
        model = nn.Sequential(*layers)
        before = fingerprint(model)
        with pytest.raises(ValueError, match=rf"^layer '{position}' \(") as error:
            reparameterize(model, name)
        assert "\n" not in str(error.value)
        assert fingerprint(model) == before


def test_the_baseline_takes_any_layer_that_has_a_weight_and_meta_and_frozen_layers_are_treated() -> None:
    reparameterize(nn.Sequential(BAD["complex"](), BAD["float8"](), BAD["quantized"]()), "standard")
    for name in names():
        model = reparameterize(nn.Sequential(*good_layers()), name)
        assert len(treated_layers(model)) == 4
        assert [parameter.requires_grad for parameter in model[1].parameters()].count(True) == 0


@pytest.mark.parametrize("name", [name for name in names() if name != "standard"])
def test_tensors_of_inference_mode_are_treated_or_left(name: str) -> None:
    with torch.inference_mode():
        layer = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), layer)
    before = fingerprint(model)
    try:
        reparameterize(model, name)
    except RuntimeError:
        assert fingerprint(model) == before
    else:
        assert list(treated_layers(model)) == ["0", "1"]


def test_handles_of_hooks_survive_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 3), BAD["complex"]())
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="complex"):
        reparameterize(model, "bn")
    handle.remove()
    assert not model[0]._forward_hooks


# --- failures in the middle --------------------------------------------------------------------------------------


class BrokenError(RuntimeError):
    """What a machine without memory raises."""


def failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """``function`` that raises at its call number ``at``, from 0."""
    calls = iter(range(10**6))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise BrokenError
        return function(*args, **kwargs)

    return called


PLACES = [
    (parametrize, "register_parametrization"),
    (nn.Module, "register_forward_hook"),
    (nn.Module, "register_parameter"),
    (nn.Module, "add_module"),
    (Tensor, "copy_"),
    (Tensor, "detach"),
]


def interrupted(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], act: Callable[[nn.Module], object]
) -> Iterator[tuple[str, object, object]]:
    """Break ``act`` at every call of every place, and compare the model before and after."""
    for owner, function in PLACES:
        for at in range(12):
            model = make()
            before = fingerprint(model)
            with monkeypatch.context() as patched:
                patched.setattr(owner, function, failing(getattr(owner, function), at))
                try:
                    act(model)
                except BrokenError:
                    pass
                else:
                    break
            yield f"{function} {at}", before, fingerprint(model)


def mixed(name: str) -> nn.Module:
    last = nn.LSTM(2, 2) if get(name).layers[-1] is nn.RNNCellBase else nn.Conv1d(2, 2, 1, bias=False)
    return nn.Sequential(nn.Linear(3, 2), last, nn.ConvTranspose1d(2, 4, 1, groups=2))


@pytest.mark.parametrize("name", [name for name in names() if name != "standard"])
def test_a_failure_in_the_middle_of_reparameterizing_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(interrupted(monkeypatch, lambda: mixed(name), lambda model: reparameterize(model, name)))
    assert len(cases) > 2
    for case, before, after in cases:
        assert after == before, case


@pytest.mark.parametrize("name", [name for name in names() if get(name).foldable and name != "standard"])
def test_a_failure_in_the_middle_of_folding_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(interrupted(monkeypatch, lambda: reparameterize(mixed(name), name), fold))
    assert len(cases) > 2
    for case, before, after in cases:
        assert after == before, case


class Poison(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


@pytest.mark.parametrize("name", [name for name in names() if name != "ln"])
def test_an_initialization_that_fails_at_a_later_layer_is_undone_at_the_first(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), Poison(), nn.Linear(2, 2))
    reparameterize(model, name)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="layer '4' gives values that are not finite"):
        initialize_from_data(model, torch.randn(9, 3))
    assert fingerprint(model) == before
    unreached = nn.ModuleDict({"used": nn.Linear(3, 4), "other": nn.Linear(4, 2)})
    unreached.forward = unreached["used"].forward  # type: ignore[method-assign]
    reparameterize(unreached, name)
    state = copy.deepcopy(unreached.state_dict())
    with pytest.raises(ValueError, match="does not reach layer other"):
        initialize_from_data(unreached, torch.randn(9, 3), std_of={"other": 0.1})
    assert all(torch.equal(state[key], value) for key, value in unreached.state_dict().items())


# --- after torch's remove_parametrizations -----------------------------------------------------------------------

REMOVABLE: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(3, 4),
    "frozen": lambda: frozen(nn.Linear(3, 4)),
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2),
    "frozen LSTM": lambda: frozen(nn.LSTM(3, 4)),
}


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


def taken_off(name: str, kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer whose parameterization torch has taken off, an input and its output."""
    model = reparameterize(REMOVABLE[kind](), name).eval()
    x = torch.randn(5, 3)
    expected = output_of(model, x)
    for weight in list(model.parametrizations):
        parametrize.remove_parametrizations(model, weight)
    torch.testing.assert_close(output_of(model, x), expected)
    return model, x, expected


@pytest.mark.parametrize("kind", REMOVABLE)
@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_a_layer_whose_parameterization_torch_took_off_is_a_plain_one(name: str, kind: str) -> None:
    model, x, expected = taken_off(name, kind)
    assert treated_layers(model) == {}
    project(model)
    folded = fold(copy.deepcopy(model))
    plain = REMOVABLE[kind]()
    assert [(key, p.requires_grad) for key, p in folded.named_parameters()] == [
        (key, p.requires_grad) for key, p in plain.named_parameters()
    ]
    assert folded.__dict__.keys() == plain.__dict__.keys()
    assert not folded._forward_hooks
    assert not folded._forward_pre_hooks
    torch.testing.assert_close(output_of(folded, x), expected)
    reparameterize(model, "wn")
    assert list(treated_layers(model)) == [""]
    torch.testing.assert_close(output_of(model, x), expected)
    fold(model)
    torch.testing.assert_close(output_of(model, x), expected)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_it_draws_its_weights_as_a_plain_layer(name: str) -> None:
    model, *_ = taken_off(name, "Linear")
    torch.manual_seed(3)
    model.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(model.weight, nn.Linear(3, 4).weight)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_one_weight_of_several_may_be_taken_off(name: str) -> None:
    model = reparameterize(nn.LSTM(3, 4), name).eval()
    x = torch.randn(5, 3)
    expected = output_of(model, x)
    parametrize.remove_parametrizations(model, "weight_hh_l0")
    project(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="parametrized already; fold"):
        reparameterize(model, name)
    assert fingerprint(model) == before
    torch.testing.assert_close(output_of(fold(model), x), expected)
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in nn.LSTM(3, 4).named_parameters()]
    reparameterize(model, "wn")


def test_the_weight_half_of_a_pair_may_be_taken_off() -> None:
    model = reparameterize(nn.Linear(3, 4), "wn_mean_only_bn")
    x = torch.randn(9, 3)
    initialize_from_data(model, x)
    expected = model.eval()(x)
    parametrize.remove_parametrizations(model, "weight")
    torch.testing.assert_close(model(x), expected)
    assert list(treated_layers(model)) == [""]
    torch.testing.assert_close(fold(model)(x), expected)
    assert list(model.state_dict()) == ["weight", "bias"]
    reparameterize(model, "wn_mean_only_bn")


# --- weights of torch's weight norms -----------------------------------------------------------------------------


def drawn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


OLDER: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int | None, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 4), ("weight",), 0, (5, 3)),
    "Linear, inputs": (lambda: nn.Linear(3, 4), ("weight",), 1, (5, 3)),
    "Linear, whole": (lambda: nn.Linear(3, 4), ("weight",), None, (5, 3)),
    "Linear, one unit": (lambda: nn.Linear(3, 1), ("weight",), 0, (5, 3)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), ("weight",), 0, (2, 4, 5, 5)),
    "ConvTranspose, outputs": (lambda: nn.ConvTranspose1d(4, 6, 3), ("weight",), 1, (2, 4, 5)),
    "ConvTranspose, inputs": (lambda: nn.ConvTranspose1d(4, 6, 3), ("weight",), 0, (2, 4, 5)),
    "ConvTranspose, groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), ("weight",), 0, (2, 4, 5)),
    "LSTM": (lambda: nn.LSTM(3, 4), ("weight_ih_l0", "weight_hh_l0"), 0, (5, 3)),
    "LSTM, in part": (lambda: nn.LSTM(3, 4), ("weight_hh_l0",), 0, (5, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), ("weight_ih",), 0, (5, 3)),
}


@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.parametrize("g", ["direct", "exp"])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_of_torchs_older_weight_norm_load(kind: str, g: str, assign: bool) -> None:
    make, weights, dim, shape = OLDER[kind]
    layer = make()
    for name in weights:
        weight_norm(layer, name, dim)
    older = drawn(nn.Sequential(layer))
    state = older.state_dict()
    keys = list(state)
    model = reparameterize(nn.Sequential(make()), "wn", g=g)
    model.load_state_dict(copy.deepcopy(state), assign=assign)
    x = torch.randn(shape)
    torch.testing.assert_close(output_of(model, x), output_of(older, x), rtol=1e-4, atol=1e-5)
    assert list(state) == keys
    if dim == 0 and g == "direct" and kind == "Linear":
        assert torch.equal(model[0].parametrizations.weight.original0, state["0.weight_g"])
        assert torch.equal(model[0].parametrizations.weight.original1, state["0.weight_v"])


def test_weights_of_torchs_newer_weight_norm_load_and_go_back() -> None:
    torchs = drawn(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3))))
    model = reparameterize(nn.Sequential(nn.Conv2d(4, 6, 3)), "wn")
    model.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), torchs(x))
    torchs.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["wn", "wn_mean_only_bn"])
def test_what_does_not_fit_is_refused_as_torch_does(name: str) -> None:
    model = reparameterize(nn.Sequential(nn.Linear(3, 4)), name)
    other = nn.Sequential(weight_norm(nn.Linear(3, 5)))
    with pytest.raises(RuntimeError, match="size mismatch for 0"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.weight_g": torch.ones(4, 1), "0.bias": torch.ones(4)})
    folded = fold(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        folded.load_state_dict(nn.Sequential(weight_norm(nn.Linear(3, 4))).state_dict())


def test_log_g_of_a_scale_of_0_is_refused() -> None:
    older = weight_norm(nn.Linear(3, 4))
    with torch.no_grad():
        older.weight_g[2] = 0.0
    with pytest.raises(RuntimeError, match="log g of g = 0 is not defined"):
        reparameterize(nn.Linear(3, 4), "wn", g="exp").load_state_dict(older.state_dict())


def test_a_copy_loads_into_itself() -> None:
    model = reparameterize(nn.Linear(3, 4), "wn")
    copied = copy.deepcopy(model)
    before = model.weight.clone()
    older = drawn(weight_norm(nn.Linear(3, 4)))
    copied.load_state_dict(older.state_dict())
    assert torch.equal(model.weight, before)
    torch.testing.assert_close(copied.weight, torch._weight_norm(older.weight_v, older.weight_g, 0))
