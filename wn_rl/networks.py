"""Q-networks built from a small spec that a checkpoint carries as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from wn_rl.errors import CheckpointError
from wn_rl.parameterizations import Parameterization, forward, get, reparameterize, resolve

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
        parameterization: a registered name, or ``module:Name`` of a registered class.
        options: of the parameterization; what is missing has its default.
        layers: names of the layers that it treats, with ``*`` and ``?``; None: those that its source treats.
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
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None
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
                options=_options(values["options"]),
                layers=_patterns(values["layers"]),
                observation_shape=_three(values["observation_shape"], 512),
                convolutions=_convolutions(values["convolutions"]),
                hidden_units=_whole(values["hidden_units"], 1, 65536),
                weight_init=values["weight_init"],
            )
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the network spec is damaged: {error}") from None
        try:
            entry = get(spec.parameterization)
        except KeyError:
            raise CheckpointError(unknown_in_file(spec.parameterization)) from None
        try:
            resolve(entry.name, spec.options)
        except ValueError as error:
            raise CheckpointError(f"the network spec is damaged: {error}") from None
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

    def entry(self) -> Parameterization:
        """Return the parameterization with its options.

        Raises:
            ValueError: it is not registered, or has no such option.
        """
        return resolve(self.parameterization, self.options)

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


def unknown_in_file(name: str) -> str:
    """Return the error for a parameterization's name that stands in a file and is not registered."""
    if ":" in name:
        return f"the parameterization '{name}' is somebody's own and is not imported from a file: add --param {name}"
    return f"the parameterization '{name}' is not registered: if it is your own, add --param YOUR_MODULE:ITS_CLASS"


def layer_names(convolutions: int) -> tuple[str, ...]:
    """Return the names of the layers of a Q-network with so many convolutions, from input to output."""
    return (*(f"convolutions.{index}" for index in range(convolutions)), "hidden", "output")


def treated_names(entry: Parameterization, convolutions: int) -> tuple[str, ...]:
    """Return the names of a Q-network's layers that the source of ``entry`` treats."""
    hidden = layer_names(convolutions)[:-1]
    return {"all": (*hidden, "output"), "hidden": hidden, "penultimate": ("hidden",)}[entry.treats]


def _options(values: object) -> dict[str, Any]:
    if not isinstance(values, Mapping) or len(values) > 64:
        raise ValueError("the parameterization's options are not a mapping")
    for name, value in values.items():
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"the parameterization's option {name} is no number or text")
    return dict(values)


def _patterns(values: object) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) and len(value) < 100 for value in values):
        raise ValueError("the names of the parameterized layers are not a list of texts")
    return tuple(values)


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


BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By number of bytes, the type as which so many uint8 pixels are moved at once."""


class FirstConvolution(nn.Conv2d):
    """A convolution that also takes uint8 frames :meth:`packed`: the same sums in another order, on a CPU far cheaper.

    A kernel of k·s × k·s with stride s over C channels is a kernel of k × k with stride 1 over the C·s² pixels of each
    s × s block. Vector units want many channels, pixels may stay whole numbers from 0 to 255 (exact in bfloat16), since
    the division by 255 is made on the few weights, and whole rows of a block are moved when frames are packed.
    """

    def packs(self, observations: Tensor) -> bool:
        """Return whether ``observations`` can be packed for this layer and it pays: on CPUs, for square blocks.

        Not in an exported program, whose runtime may know no views of bytes as words, nor in one that torch compiles.
        """
        size, stride = self.kernel_size[0], self.stride[0]
        return (
            not torch.compiler.is_compiling()
            and not torch.compiler.is_exporting()
            and observations.device.type == "cpu"
            and observations.dtype == torch.uint8
            and stride in BYTES
            and size % stride == 0
            and observations.shape[-2] % stride == 0
            and observations.shape[-1] % stride == 0
            and observations.storage_offset() % stride == 0
            and observations.stride()[-2:] == (observations.shape[-1], 1)
            and all(step % stride == 0 for step in observations.stride()[:2])
        )

    def packed(self, observations: Tensor) -> Tensor:
        """Return uint8 frames, (B, C, H, W), as blocks of pixels, uint8 (B, C·s², H/s, W/s), channels last."""
        stride = self.stride[0]
        batch, channels, height, width = observations.shape
        rows = observations.view(BYTES[stride]).view(batch, channels, height // stride, stride, width // stride)
        blocks = rows.permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8)
        return blocks.view(batch, height // stride, width // stride, -1).permute(0, 3, 1, 2)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if input.shape[1] == self.in_channels:
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        blocks = self.blocks(weight).permute(0, 3, 1, 2) * (1 / 255)
        return nn.functional.conv2d(input, blocks, bias)

    def blocks(self, weight: Tensor) -> Tensor:
        """Return a weight, (units, C, k·s, k·s), as it meets packed frames: (units, k, k, C·s²)."""
        units, channels, size, _ = weight.shape
        stride = self.stride[0]
        split = weight.reshape(units, channels, size // stride, stride, size // stride, stride)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(units, size // stride, size // stride, -1)


class QNetwork(nn.Module):
    """The network of Mnih et al. 2015: convolutions, one dense hidden layer, one Q-value per action; ReLU between."""

    def __init__(self, spec: QNetworkSpec) -> None:
        """Build the network with its spec's initial weights, before any parameterization."""
        super().__init__()
        self.spec = spec
        channels = spec.observation_shape[0]
        convolutions: list[nn.Conv2d] = []
        for filters, kernel, stride in spec.convolutions:
            kind = nn.Conv2d if convolutions else FirstConvolution
            convolutions.append(kind(channels, filters, kernel, stride))
            channels = filters
        self.convolutions = nn.ModuleList(convolutions)
        self.hidden = nn.Linear(spec.flat_features(), spec.hidden_units)
        self.output = nn.Linear(spec.hidden_units, spec.num_actions)
        layers: list[nn.Conv2d | nn.Linear] = [*convolutions, self.hidden, self.output]
        for layer in layers:
            self.initialize_layer(layer)

    def initialize_layer(self, layer: nn.Module) -> None:
        """Draw the initial weights of a plain layer of this network, as its spec says."""
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        _initialize(layer, self.spec.weight_init)

    def forward(self, observations: Tensor) -> Tensor:
        """Return Q-values, shape (B, num_actions), of uint8 observations, shape (B, 4, 84, 84).

        The output layer stays in the weights' precision under autocast: the eight bits of a bfloat16 are too coarse
        for differences between actions.
        """
        return self.q_values(self.features(observations))

    def features(self, observations: Tensor) -> Tensor:
        """Return what the output layer sees, shape (B, hidden units)."""
        x = self._pixels(observations)
        for index, convolution in enumerate(self.convolutions):
            x = forward(convolution, x)
            # In order of rows before the last ReLU: its backward pass is slow where two orders meet.
            x = _relu(convolution, x.flatten(1) if index == len(self.convolutions) - 1 else x)
        return _relu(self.hidden, forward(self.hidden, x.flatten(1)))

    def _pixels(self, observations: Tensor) -> Tensor:
        """Return what the first layer takes: pixels from 0 to 1, or packed."""
        first = next(iter(self.convolutions), None)
        if isinstance(first, FirstConvolution) and not first._forward_pre_hooks and first.packs(observations):
            kind = observations.device.type
            low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.precision
            return first.packed(observations).to(low)
        if observations.device.type == "cuda":
            # Channels last is what tensor cores take; whole numbers up to 255 are exact in bfloat16, then divided.
            on = torch.is_autocast_enabled("cuda") and self.precision == torch.float32
            low = torch.get_autocast_dtype("cuda") if on else self.precision
            return observations.to(low, memory_format=torch.channels_last) / 255
        return observations.to(self.precision) / 255

    def q_values(self, features: Tensor) -> Tensor:
        """Return Q-values, shape (B, num_actions), of :meth:`features`."""
        with torch.autocast(features.device.type, enabled=False):
            return forward(self.output, features.to(self.precision))

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round the hidden layers' plain weights once, as autocast to ``dtype`` does in each pass; the output's stay.

        For a network without parameterization that is not trained. The first convolution divides its weights by 255
        before they are rounded, so it keeps them.
        """
        for layer in (*list(self.convolutions)[1:], self.hidden):
            layer.to(dtype)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of the trained parameters."""
        return next(self.output.parameters()).dtype


def _relu(layer: nn.Module, x: Tensor) -> Tensor:
    """Return max(x, 0), in place unless a hook of the layer whose output ``x`` is may have kept it."""
    hooked = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return torch.relu(x) if hooked else torch.relu_(x)


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
    """Build the network that ``spec`` describes, its weights drawn with ``seed``, not the global generator.

    Raises:
        CheckpointError: its parameterization treats no such layer, or cannot treat it.
    """
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        network = QNetwork(spec)
        try:
            entry = spec.entry()
            treated = treated_names(entry, len(spec.convolutions)) if spec.layers is None else spec.layers
            reparameterize(network, entry, include=treated)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"parameterization '{spec.parameterization}': {error}") from None
    return network
