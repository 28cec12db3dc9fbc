"""Saliency against gradients that are known by hand, in the place on the screen where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import names
from wn_rl.video.saliency import COLOUR, HIGH, LOW, STRENGTH, gradients, heat, overlay


class Weighted(nn.Module):
    """Q(s, a) = Σ w_a · s, whose gradient is w_a."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, observations: Tensor) -> Tensor:
        return torch.einsum("bcyx,acyx->ba", observations, self.weights)


def test_a_linear_networks_gradient_is_its_weights() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 4, 84, 84)
    observations = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    found = gradients(Weighted(weights), observations, torch.tensor([2, 0]))
    assert found.shape == (2, 84, 84)
    torch.testing.assert_close(found[0], weights[2].abs().amax(0))
    torch.testing.assert_close(found[1], weights[0].abs().amax(0))


@pytest.mark.parametrize("name", names())
def test_every_parameterization_has_the_gradient_of_its_q_value(name: str) -> None:
    """Where only one pixel of the oldest frame changes, the Q-value changes by its gradient."""
    network = build_q_network(QNetworkSpec(4, name, hidden_units=16), seed=1).eval().double()
    torch.manual_seed(0)
    observation = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)
    layer = gradients(network, observation, torch.tensor([3]))[0]
    row, column = np.unravel_index(int(layer.argmax()), layer.shape)
    slopes = []
    for frame in range(4):
        lower, upper = observation.double(), observation.double()
        lower[0, frame, row, column] -= 1e-4
        upper[0, frame, row, column] += 1e-4
        with torch.no_grad():
            slopes.append(float(network(upper)[0, 3] - network(lower)[0, 3]) / 2e-4)
    assert float(layer[row, column]) == pytest.approx(max(map(abs, slopes)), rel=1e-3)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_no_gradient_leaves_the_screen_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (210, 160, 3), dtype=np.uint8)
    layer = heat(np.zeros((84, 84), np.float32))
    assert not layer.any()
    np.testing.assert_array_equal(overlay(picture, layer), picture)


@settings(deadline=None, max_examples=25)
@given(row=st.integers(6, 77), column=st.integers(6, 77), height=st.sampled_from([210, 250]))
def test_a_pixels_gradient_is_drawn_where_the_pixel_lies_on_the_screen(row: int, column: int, height: int) -> None:
    gradient = np.zeros((84, 84), np.float32)
    gradient[row, column] = 1.0
    black = np.zeros((height, 160, 3), np.uint8)
    drawn = overlay(black, heat(gradient))[..., 2].astype(float)
    rows, columns = np.nonzero(drawn == drawn.max())
    assert abs((rows.mean() + 0.5) - (row + 0.5) * height / 84) < 1.5
    assert abs((columns.mean() + 0.5) - (column + 0.5) * 160 / 84) < 1.5
    assert drawn.max() == round(COLOUR[2] * STRENGTH)
    assert (drawn > 0).mean() < 0.03


@settings(deadline=None, max_examples=15)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_the_layer_knows_no_unit_and_keeps_to_its_quantiles(scale: float, seed: int) -> None:
    gradient = np.random.default_rng(seed).exponential(size=(84, 84)).astype(np.float32)
    layer = heat(gradient)
    np.testing.assert_allclose(heat(gradient * np.float32(scale)), layer, atol=2e-3)
    assert (layer == 0).mean() == pytest.approx(LOW, abs=1e-3)
    assert (layer == 1).mean() == pytest.approx(1 - HIGH, abs=1e-3)
    one_outlier = gradient.copy()
    one_outlier[40, 40] = 1e4
    assert (heat(one_outlier) > 0.05).mean() > 0.001


def test_a_whole_layer_of_colour_is_blended_by_its_strength() -> None:
    picture = np.full((210, 160, 3), 100, np.uint8)
    expected = [round(100 * (1 - STRENGTH) + part * STRENGTH) for part in COLOUR]
    np.testing.assert_array_equal(overlay(picture, np.ones((84, 84), np.float32)), np.full((210, 160, 3), expected))
