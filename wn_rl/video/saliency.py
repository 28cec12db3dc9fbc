"""Saliency: the gradient of a Q-value with respect to the observation, drawn over the screen (Simonyan et al. 2014)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

COLOUR = (0, 229, 255)
"""Cyan, which few games use."""
STRENGTH = 0.75
"""Opacity of the colour where the gradient is largest."""
LEVELS = 12
"""Number of opacity levels, so that a .gif needs no more than its 256 colours."""
SMOOTHING = 1.5
"""Standard deviation of the Gaussian, in pixels of the observation: the gradient of single pixels is noisy."""
LOW, HIGH = 0.75, 0.995
"""Quantiles of a gradient that are drawn fully transparent and with the full colour."""

Heat = NDArray[np.float32]


def gradients(network: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
    """Return |∂Q(s, a) / ∂s|, the maximum over the frames of the stack.

    Args:
        network: uint8 or float observations → Q-values (B, actions); in evaluation mode, so that states do not
            affect each other.
        observations: (B, 4, 84, 84), pixels from 0 to 255.
        actions: int64 (B,), whose Q-values are differentiated.

    Returns:
        float32 (B, 84, 84) on the CPU: change of the Q-value per gray level of a pixel.
    """
    pixels = observations.to(torch.float32).requires_grad_()
    with torch.enable_grad():
        chosen = network(pixels).gather(1, actions[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, pixels)
    return gradient.abs().amax(1).cpu()


def heat(gradient: NDArray[np.float32]) -> Heat:
    """Smooth a gradient (84, 84) and scale it to 0 … 1.

    Three quarters of the image are 0 and the strongest 0.5% are 1, so that one outlier does not hide the rest. A
    gradient of zero gives zeros.
    """
    smooth = _smoothed(gradient.astype(np.float64))
    low, high = np.quantile(smooth, [LOW, HIGH])
    if not high > low:
        return np.zeros(gradient.shape, np.float32)
    scaled: Heat = np.clip((smooth - low) / (high - low), 0, 1).astype(np.float32)
    return scaled


def overlay(image: NDArray[np.uint8], layer: Heat) -> NDArray[np.uint8]:
    """Return a screen with ``layer`` over it.

    An observation is the downscaled whole screen, so the layer is upscaled linearly to the whole screen.

    Args:
        image: uint8 RGB (height, width, 3).
        layer: 0 … 1, any size.
    """
    height, width = image.shape[:2]
    stretched = _stretch(_stretch(layer, height).T, width).T
    alpha = np.round(stretched * LEVELS) / LEVELS * STRENGTH
    mixed = image * (1 - alpha[..., None]) + np.array(COLOUR) * alpha[..., None]
    rounded: NDArray[np.uint8] = np.round(mixed).astype(np.uint8)
    return rounded


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``values`` under a Gaussian that repeats the edges."""
    radius = int(np.ceil(3 * SMOOTHING))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / SMOOTHING) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(values, ((radius, radius), (0, 0)), mode="edge")
        rows = [weight * padded[shift : shift + len(values)] for shift, weight in enumerate(kernel)]
        values = np.sum(rows, axis=0).T
    return values


def _stretch(values: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Return ``values`` with ``length`` rows, linear between the centres of its rows."""
    count = len(values)
    places = np.clip((np.arange(length) + 0.5) * count / length - 0.5, 0, count - 1)
    below = np.minimum(places.astype(int), max(count - 2, 0))
    above = np.minimum(below + 1, count - 1)
    share = (places - below)[:, None].astype(np.float32)
    stretched: NDArray[np.float32] = values[below] * (1 - share) + values[above] * share
    return stretched
