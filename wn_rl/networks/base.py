"""What every network is: features of an observation (the torso), then one Q-value per action (the head)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from wn_rl.parameterizations import Parameterization, forward
from wn_rl.parameterizations.base import LAYERS

if TYPE_CHECKING:
    from wn_rl.networks.spec import QNetworkSpec, WeightInit


class Network(nn.Module):
    """A Q-network: uint8 observations (B, 4, 84, 84) → Q-values (B, actions).

    A subclass makes its layers in ``__init__(spec)``, the last of them ``self.output``, and computes :meth:`features`;
    the rest is here and may be overridden. Keyword-only arguments of ``__init__`` are its options: bool, int, float,
    str or ``Literal``, best with defaults. Under :func:`wn_rl.networks.register` its name works wherever one is
    accepted.

    A network is a function of its weights and buffers: it draws no random numbers in a forward pass and keeps nothing
    else between two of them, so that a run can go on exactly. ``__init__`` also works where torch allocates nothing
    (``torch.device("meta")``), so that a checkpoint is compared with its network before either takes memory.

    Attributes:
        spec: what describes it in a checkpoint.
        output: the layer that gives the Q-values, unless :meth:`q_values` is overridden.
    """

    name: ClassVar[str] = ""
    """Set by :func:`wn_rl.networks.register`."""

    output_layers: ClassVar[tuple[str, ...]] = ("output",)
    """Names of the layers that give the Q-values; all others are hidden layers."""

    has_training_mode: ClassVar[bool] = True
    """Whether a layer, parameterizations aside, may compute something else in training mode (``nn.BatchNorm2d``)."""

    spec: QNetworkSpec
    output: nn.Linear

    def __init__(self, spec: QNetworkSpec) -> None:
        """Keep the spec; a subclass calls this first and then makes its layers.

        Args:
            spec: says the number of actions, the observations' shape, ``hidden_units`` and ``weight_init``.
        """
        super().__init__()
        self.spec = spec

    def features(self, observations: Tensor) -> Tensor:
        """Return what the output layer sees, shape (B, features), of uint8 observations; a subclass computes it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it computes features()")

    def forward(self, observations: Tensor) -> Tensor:
        """Return Q-values, shape (B, num_actions), of uint8 observations, shape (B, 4, 84, 84).

        The output layer stays in the weights' precision under autocast: the eight bits of a bfloat16 are too coarse
        for differences between actions.
        """
        return self.q_values(self.features(observations))

    def q_values(self, features: Tensor) -> Tensor:
        """Return Q-values, shape (B, num_actions), of :meth:`features`."""
        with torch.autocast(features.device.type, enabled=False):
            return forward(self.output, features.to(self.precision))

    def pixels(self, observations: Tensor) -> Tensor:
        """Return observations as the first layer takes them: floating point, from 0 to 1.

        Args:
            observations: uint8, or floating point from 0 to 255, where a gradient by pixels is wanted.
        """
        if observations.device.type == "cuda":
            # Channels last is what tensor cores take; whole numbers up to 255 are exact in bfloat16, then divided.
            on = torch.is_autocast_enabled("cuda") and self.precision == torch.float32
            low = torch.get_autocast_dtype("cuda") if on else self.precision
            return observations.to(low, memory_format=torch.channels_last) / 255
        return observations.to(self.precision) / 255

    def activation(self, x: Tensor) -> Tensor:
        """Return the nonlinearity of ``x``, what a hidden layer gives: by it the diagnostics find dormant units."""
        return torch.relu(x)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of the trained parameters."""
        return next(self.get_submodule(self.output_layers[-1]).parameters()).dtype

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round plain weights once, as autocast to ``dtype`` would in each pass; only where the result is the same.

        For a network without parameterization that is not trained. Here nothing is rounded: autocast goes on doing so
        in each pass, which any network can bear.
        """

    def layer_names(self) -> tuple[str, ...]:
        """Return the names of the layers that may be parameterized, in the order in which they were made."""
        return tuple(name for name, module in self.named_modules() if isinstance(module, LAYERS))

    def default_layers(self, parameterization: Parameterization) -> tuple[str, ...]:
        """Return the names of the layers that the source of ``parameterization`` treats."""
        there = self.layer_names()
        hidden = tuple(name for name in there if name not in self.output_layers)
        return {"all": there, "hidden": hidden, "penultimate": hidden[-1:]}[parameterization.default_layers]

    def initialize_layers(self) -> None:
        """Draw the initial weights of every layer, before any parameterization."""
        for module in self.modules():
            if hasattr(type(module), "reset_parameters"):
                self.initialize_layer(module)

    def initialize_layer(self, layer: nn.Module) -> None:
        """Initialize the weights of a plain layer of this network, as its spec says; also called to reinitialize them.

        Linear layers and convolutions get the spec's ``weight_init``, all others keep torch's initialization.
        """
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _initialize(layer, self.spec.weight_init)


def _initialize(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, weight_init: WeightInit) -> None:
    fan_in = layer.weight[0].numel()
    bias: Tensor | None = layer.bias
    if weight_init == "he":
        nn.init.uniform_(layer.weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
        if bias is not None:
            nn.init.constant_(bias, 0.1)
    elif weight_init == "normal":
        nn.init.normal_(layer.weight, std=0.05)
        if bias is not None:
            nn.init.zeros_(bias)
    else:
        nn.init.uniform_(layer.weight, -math.sqrt(1 / fan_in), math.sqrt(1 / fan_in))
        if bias is not None:
            nn.init.uniform_(bias, -math.sqrt(1 / fan_in), math.sqrt(1 / fan_in))
