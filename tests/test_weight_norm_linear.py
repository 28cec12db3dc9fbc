"""The DQN's own way to a weight-normalized layer equals the plain one, output and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import forward, initialize_from_data, reparameterize, weight_norm
from wn_rl.parameterizations.weight_norm_linear import scaled_linear


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        inputs, units = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        return nn.Linear(inputs, units, bias), torch.randn(*leading, inputs)
    groups, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    channels, units = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    layer = nn.Conv2d(
        channels,
        units,
        (kernel, draw(st.integers(1, 3))),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=bias,
    )
    return layer, torch.randn(draw(st.integers(1, 3)), channels, draw(st.integers(5, 7)), draw(st.integers(5, 7)))


@pytest.fixture(autouse=True)
def small_layers_take_the_scaled_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_norm, "LARGE", 0)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_output_and_every_gradient_equal_the_plain_layers(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    layer, x = reparameterize(layer.double(), "wn"), x.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    other = copy.deepcopy(layer)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    plain, scaled = layer(inputs[0]), forward(other, inputs[1])
    torch.testing.assert_close(scaled, plain, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(plain)
    (plain.tanh() * direction).sum().backward()
    (scaled.tanh() * direction).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-10)
    for (name, expected), found in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_finite_differences_agree() -> None:
    torch.manual_seed(0)
    layer = reparameterize(nn.Linear(3, 2).double(), "wn")
    v, g = layer.parametrizations.weight.original1, layer.parametrizations.weight.original0
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaled_linear, (x, v, g, layer.bias))
    assert torch.autograd.gradcheck(lambda *tensors: scaled_linear(*tensors, None), (x, v, g))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_whole_network_and_its_gradient_under_autocast(precision: torch.dtype) -> None:
    """Against the plain network in float64: the scaled path is no further from it than the plain path is."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)
    network = build_q_network(QNetworkSpec(4, "wn", hidden_units=64, weight_init="normal"), seed=1)
    initialize_from_data(network, x)

    class Plain(nn.Module):
        """The same layers through their own forward pass."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, observations: Tensor) -> Tensor:
            y = observations.to(self.network.precision) / 255
            for convolution in self.network.convolutions:
                y = torch.relu(convolution(y))
            y = torch.relu(self.network.hidden(y.flatten(1)))
            with torch.autocast("cpu", enabled=False):
                return self.network.output(y.to(self.network.precision))

    def gradient(model: nn.Module, *, low: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(x).square().sum()
        loss.backward()
        return torch.cat([p.grad.flatten().double() for _, p in sorted(model.named_parameters(), key=key)])

    def key(entry: tuple[str, nn.Parameter]) -> str:
        return entry[0].removeprefix("network.")

    low = precision is torch.bfloat16
    exact = gradient(Plain(copy.deepcopy(network).double()), low=False)
    plain, scaled = gradient(Plain(copy.deepcopy(network)), low=low), gradient(copy.deepcopy(network), low=low)

    def off(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert off(scaled) < max(1.5 * off(plain), 1e-5)
    assert float(torch.nn.functional.cosine_similarity(scaled, exact, dim=0)) > (0.99 if low else 0.999999)
