"""Q-networks built from a small spec that a checkpoint carries as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from wn_rl.errors import CheckpointError
from wn_rl.parameterizations import names, reparameterize

WeightInit = Literal["he", "torch", "normal"]
MAX_ACTIONS = 18
"""The Atari joystick has no more."""
MAX_PARAMETERS = 2**28
"""No spec may ask for more: a damaged checkpoint must not exhaust memory."""
MAX_CONVOLUTIONS = 64
"""Nor for more layers, since each takes some memory whatever its size."""


@dataclass(frozen=True)
class QNetworkSpec:
    """What is needed to build a Q-network; the defaults are the network of Mnih et al. 2015 (Methods).

    Attributes:
        num_actions: outputs, one Q-value per action.
        parameterization: a registered name.
        observation_shape: (frames, height, width) of a uint8 observation.
        convolutions: (filters, kernel size, stride) of each, without padding.
        hidden_units: units of the dense layer before the output.
        weight_init: ``he``: He-uniform with gain 1 (standard deviation 1/√fan_in) and bias 0.1, as in deep_q_rl, the
            paper's base code; ``torch``: uniform ±1/√fan_in, weights and biases, torch's default and that of Torch7,
            which Mnih et al. used; ``normal``: N(0, 0.05²) and bias 0, the draw of v before data-dependent
            initialization (Salimans & Kingma 2016, section 3).
    """

    num_actions: int
    parameterization: str = "standard"
    observation_shape: tuple[int, int, int] = (4, 84, 84)
    convolutions: tuple[tuple[int, int, int], ...] = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    hidden_units: int = 512
    weight_init: WeightInit = field(default="he")

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> QNetworkSpec:
        """Build a spec from JSON values that nobody vouches for.

        Raises:
            CheckpointError: a field is missing, unknown, of another type or out of range.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("the network spec is not a mapping")
        if set(values) != {entry.name for entry in fields(cls)}:
            raise CheckpointError("the network spec has missing or unknown fields")
        try:
            spec = cls(
                num_actions=_whole(values["num_actions"], 1, MAX_ACTIONS),
                parameterization=str(values["parameterization"]),
                observation_shape=_three(values["observation_shape"], 512),
                convolutions=_convolutions(values["convolutions"]),
                hidden_units=_whole(values["hidden_units"], 1, 65536),
                weight_init=values["weight_init"],
            )
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the network spec is damaged: {error}") from None
        if spec.parameterization not in names():
            raise CheckpointError(
                f"the checkpoint's parameterization '{spec.parameterization}' is not registered; "
                f"there are: {', '.join(names())}"
            )
        if spec.weight_init not in get_args(WeightInit):
            raise CheckpointError(f"the network spec has an unknown weight_init '{spec.weight_init}'")
        spec.flat_features()
        return spec

    def flat_features(self) -> int:
        """Return the number of features after the last convolution.

        Raises:
            CheckpointError: the convolutions do not fit the observation, or the network would be enormous.
        """
        channels, height, width = self.observation_shape
        total = 0
        for filters, kernel, stride in self.convolutions:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            if height < 1 or width < 1:
                raise CheckpointError("the network spec's convolutions do not fit its observations")
            total += filters * channels * kernel**2
            channels = filters
        features = channels * height * width
        if total + features * self.hidden_units > MAX_PARAMETERS:
            raise CheckpointError(f"the network spec asks for more than {MAX_PARAMETERS:,} parameters")
        return features

    def count_parameters(self) -> int:
        """Return the number of weights and biases, before any parameterization adds its own.

        Raises:
            CheckpointError: see :meth:`flat_features`.
        """
        channels = self.observation_shape[0]
        total = 0
        for filters, kernel, _ in self.convolutions:
            total += filters * (channels * kernel**2 + 1)
            channels = filters
        return total + self.hidden_units * (self.flat_features() + 1) + self.num_actions * (self.hidden_units + 1)


def _whole(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
    return value


def _convolutions(layers: object) -> tuple[tuple[int, int, int], ...]:
    if not isinstance(layers, list | tuple) or len(layers) > MAX_CONVOLUTIONS:
        raise ValueError(f"the convolutions are not a list of at most {MAX_CONVOLUTIONS} layers")
    return tuple(_three(layer, 4096) for layer in layers)


def _three(values: Any, high: int) -> tuple[int, int, int]:  # noqa: ANN401 - untrusted JSON
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{values!r} is not a list of three numbers")
    return _whole(values[0], 1, high), _whole(values[1], 1, high), _whole(values[2], 1, high)


class QNetwork(nn.Module):
    """The network of Mnih et al. 2015: convolutions, one dense hidden layer, one Q-value per action; ReLU between."""

    def __init__(self, spec: QNetworkSpec) -> None:
        """Build the network with its spec's initial weights, before any parameterization."""
        super().__init__()
        self.spec = spec
        channels = spec.observation_shape[0]
        convolutions: list[nn.Conv2d] = []
        for filters, kernel, stride in spec.convolutions:
            convolutions.append(nn.Conv2d(channels, filters, kernel, stride))
            channels = filters
        self.convolutions = nn.ModuleList(convolutions)
        self.hidden = nn.Linear(spec.flat_features(), spec.hidden_units)
        self.output = nn.Linear(spec.hidden_units, spec.num_actions)
        layers: list[nn.Conv2d | nn.Linear] = [*convolutions, self.hidden, self.output]
        for layer in layers:
            _initialize(layer, spec.weight_init)

    def forward(self, observations: Tensor) -> Tensor:
        """Return Q-values, shape (B, num_actions), of uint8 observations, shape (B, 4, 84, 84).

        The output layer stays in the weights' precision under autocast: the eight bits of a bfloat16 are too coarse
        for differences between actions.
        """
        x = observations.to(self.output.bias.dtype) / 255
        for convolution in self.convolutions:
            x = torch.relu(convolution(x))
        x = torch.relu(self.hidden(x.flatten(1)))
        with torch.autocast(x.device.type, enabled=False):
            q_values: Tensor = self.output(x.to(self.output.bias.dtype))
        return q_values


def _initialize(layer: nn.Conv2d | nn.Linear, weight_init: WeightInit) -> None:
    fan_in = layer.weight[0].numel()
    if weight_init == "he":
        nn.init.uniform_(layer.weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
        nn.init.constant_(_bias(layer), 0.1)
    elif weight_init == "normal":
        nn.init.normal_(layer.weight, std=0.05)
        nn.init.zeros_(_bias(layer))
    else:
        nn.init.uniform_(layer.weight, -math.sqrt(1 / fan_in), math.sqrt(1 / fan_in))
        nn.init.uniform_(_bias(layer), -math.sqrt(1 / fan_in), math.sqrt(1 / fan_in))


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def build_q_network(spec: QNetworkSpec, *, seed: int) -> QNetwork:
    """Build the network that ``spec`` describes, its weights drawn with ``seed``, not the global generator."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        network = QNetwork(spec)
        reparameterize(network, spec.parameterization)
    return network
