"""What a parameterization computes can be differentiated twice, in reverse and forward mode, by torch.func too."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

from wn_rl.parameterizations import OutputNormalization, forward, get, names, reparameterize, weight_norm
from wn_rl.parameterizations.weight_norm import normalized

F64 = torch.float64

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "Conv1d": (lambda: nn.Conv1d(2, 2, 2), (2, 2, 3)),
    "Conv2d": (lambda: nn.Conv2d(2, 2, 2, groups=2), (2, 2, 3, 2)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, (1, 2, 1)), (2, 1, 1, 2, 2)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 2, 2), (2, 2, 2)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 2, (2, 1), groups=2), (2, 2, 2, 1)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, (2, 1, 1)), (2, 1, 1, 2, 1)),
    "LSTM": (lambda: nn.LSTM(2, 2), (2, 1, 2)),
    "GRU": (lambda: nn.GRU(2, 2), (2, 1, 2)),
    "GRUCell": (lambda: nn.GRUCell(2, 2), (2, 2)),
}
OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name in names()},
    "log g": ("wn", {"g": "exp"}),
    "without g": ("wn_projected", {"g": "none"}),
    "over units": ("ln", {"over": "units"}),
}


def treated(kind: str, name: str) -> bool:
    return kind not in ("LSTM", "GRU", "GRUCell") or not issubclass(get(name), OutputNormalization)


PAIRS = [(kind, option) for kind in LAYERS for option, (name, _) in OPTIONS.items() if treated(kind, name)]


def case(kind: str, option: str) -> tuple[nn.Module, Tensor]:
    """A treated layer in float64 whose trained tensors are drawn anew (so that v has not length g), and an input.

    Spectral normalization is in evaluation mode: its power iteration is no part of what is differentiated.
    """
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    name, options = OPTIONS[option]
    layer = reparameterize(make().to(F64), name, **options).train(name != "sn")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, torch.randn(shape, dtype=F64)


def as_function(
    layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The layer's output as a function of the input and the trained tensors, and these tensors."""
    wrapped = Through(layer, call)
    keys = [key for key, _ in wrapped.named_parameters()]

    def function(x: Tensor, *trained: Tensor) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in wrapped.named_buffers()}
        return functional_call(wrapped, buffers | dict(zip(keys, trained, strict=True)), (x,))

    return function, tuple(parameter.detach().clone().requires_grad_() for parameter in wrapped.parameters())


class Through(nn.Module):
    """A layer's output through ``call``; of a recurrent layer the outputs alone."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.layer, self.call = layer, call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        output = self.call(self.layer, x)
        return output[0] if isinstance(output, tuple) else output


def weight_of_the_example(v: Tensor, g: Tensor) -> Tensor:
    return (normalized(v, g) @ torch.tensor([1.0, 0.0], dtype=F64)).sum()


def by_autograd(v: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return torch.autograd.functional.hessian(weight_of_the_example, (v, g))


def by_batched_autograd(v: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return torch.autograd.functional.hessian(weight_of_the_example, (v, g), vectorize=True)


def by_forward_over_reverse(v: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return torch.autograd.functional.hessian(
        weight_of_the_example, (v, g), vectorize=True, outer_jacobian_strategy="forward-mode"
    )


def by_hessian(v: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return hessian(weight_of_the_example, argnums=(0, 1))(v, g)


def by_jacrev_twice(v: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return jacrev(jacrev(weight_of_the_example, argnums=(0, 1)), argnums=(0, 1))(v, g)


def by_jacfwd_twice(v: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return jacfwd(jacfwd(weight_of_the_example, argnums=(0, 1)), argnums=(0, 1))(v, g)


@pytest.mark.parametrize(
    "way",
    [by_autograd, by_batched_autograd, by_forward_over_reverse, by_hessian, by_jacrev_twice, by_jacfwd_twice],
)
def test_second_derivatives_worked_out_by_hand(way: Callable[..., tuple[tuple[Tensor, ...], ...]]) -> None:
    """y = g · v₁/‖v‖ at v = (3, 4), g = 5: with n = v/‖v‖ = (0.6, 0.8) and e = (1, 0),

    ∂y/∂v = g (e − n n₁)/‖v‖; its derivative by v is −g/‖v‖² (e nᵀ + n eᵀ + n₁ I − 3 n₁ n nᵀ), by g it is
    (e − n n₁)/‖v‖ = (0.64, −0.48)/5.
    """
    found = way(torch.tensor([[3.0, 4.0]], dtype=F64), torch.tensor([[5.0]], dtype=F64))
    by_v, mixed = found[0][0].view(2, 2), found[0][1].flatten()
    torch.testing.assert_close(by_v, torch.tensor([[-0.2304, 0.0128], [0.0128, 0.1104]], dtype=F64))
    torch.testing.assert_close(mixed, torch.tensor([0.128, -0.096], dtype=F64))
    torch.testing.assert_close(found[1][0].flatten(), mixed)
    assert bool((found[1][1] == 0.0).all())


@pytest.mark.parametrize(("kind", "option"), PAIRS)
def test_finite_differences_of_the_gradient_agree(kind: str, option: str) -> None:
    layer, x = case(kind, option)
    function, trained = as_function(layer)
    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(), *trained))


def test_finite_differences_of_the_cheap_ways_gradient_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_norm, "LARGE", 0)
    for kind in ("Linear", "Conv2d"):
        layer, x = case(kind, "wn")
        function, trained = as_function(layer, forward)
        assert torch.autograd.gradgradcheck(function, (x.requires_grad_(), *trained))


@pytest.mark.parametrize(("kind", "option"), PAIRS)
def test_every_way_of_torch_func_gives_autograds_second_derivatives(kind: str, option: str) -> None:
    layer, x = case(kind, option)
    function, trained = as_function(layer)
    slopes = torch.linspace(-1, 2, function(x, *trained).numel(), dtype=F64)
    everything = torch.cat([x.flatten(), *(tensor.detach().flatten() for tensor in trained)])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([x.numel(), *(tensor.numel() for tensor in trained)])
        shaped = [part.view(like.shape) for part, like in zip(parts, (x, *trained), strict=True)]
        return (function(*shaped).flatten().sin() * slopes).sum()

    expected = torch.autograd.functional.hessian(loss, everything)
    torch.testing.assert_close(expected, expected.T)
    torch.testing.assert_close(jacrev(jacrev(loss))(everything), expected)
    direction = torch.linspace(1, 2, len(everything), dtype=F64)
    slope = torch.autograd.functional.jacobian(loss, everything) @ direction
    torch.testing.assert_close(jvp(loss, (everything,), (direction,))[1], slope)
    torch.testing.assert_close(jvp(jacrev(loss), (everything,), (direction,))[1], expected @ direction)
    torch.testing.assert_close(hessian(loss)(everything), expected)
    torch.testing.assert_close(jacfwd(jacfwd(loss))(everything), expected)
    layer.eval()  # vmap cannot have several running means written into one
    shifted = torch.stack([everything, everything + 0.1 * direction])
    both = torch.stack([torch.autograd.functional.hessian(loss, one) for one in shifted])
    torch.testing.assert_close(vmap(hessian(loss))(shifted), both)


def test_half_precision_and_another_memory_format_have_second_derivatives() -> None:
    torch.manual_seed(0)
    v, g, dw = torch.randn(4, 2, 3, 3), torch.rand(4, 1, 1, 1) + 0.5, torch.randn(4, 2, 3, 3)

    def second(v: Tensor, g: Tensor, dw: Tensor) -> Tensor:
        v.requires_grad_()
        (dv,) = torch.autograd.grad(normalized(v, g), v, dw, create_graph=True)
        return torch.autograd.grad(dv.square().sum(), v)[0]

    expected = second(v.double(), g.double(), dw.double()).float()
    torch.testing.assert_close(second(v.clone().to(memory_format=torch.channels_last), g, dw), expected)
    for dtype in (torch.float16, torch.bfloat16):
        low = second(v.to(dtype), g.to(dtype), dw.to(dtype))
        assert float((low.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_layer_is_saved_without_python() -> None:
    layer, x = case("Linear", "wn")
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))
