"""What describes a Q-network: a small spec that a checkpoint carries as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from wn_rl.errors import CheckpointError
from wn_rl.parameterizations import Parameterization, get, resolve

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
    return {"all": (*hidden, "output"), "hidden": hidden, "penultimate": ("hidden",)}[entry.default_layers]


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
