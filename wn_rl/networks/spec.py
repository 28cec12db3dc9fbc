"""What describes a Q-network: a small spec that a checkpoint carries as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from wn_rl.errors import CheckpointError
from wn_rl.networks import registry
from wn_rl.networks.base import Network
from wn_rl.parameterizations import Parameterization, get, resolve

WeightInit = Literal["he", "torch", "normal"]
MAX_ACTIONS = 18
"""The Atari joystick has no more."""
MAX_PARAMETERS = 2**28
"""No spec may ask for more: a damaged checkpoint must not exhaust memory."""
MAX_CONVOLUTIONS = 64
"""Nor for more layers, since each takes some memory whatever its size."""
MAX_MODULES = 10_000
"""Nor, of a network of one's own, for more modules."""
NATURE = "nature"
"""The network of Mnih et al. 2015, for which a spec need not say ``network``."""


@dataclass(frozen=True)
class QNetworkSpec:
    """What is needed to build a Q-network; the defaults are the network of Mnih et al. 2015 (Methods).

    Attributes:
        num_actions: outputs, one Q-value per action.
        parameterization: a registered name, or ``module:Name`` of a registered class.
        options: of the parameterization; what is missing has its default.
        layers: names of the layers that it treats, with ``*`` and ``?``; None: those that its source treats.
        observation_shape: (frames, height, width) of a uint8 observation.
        convolutions: (filters, kernel size, stride) of each, without padding; of ``nature`` alone.
        hidden_units: units of the dense layer before the output.
        weight_init: ``he``: He-uniform with gain 1 (standard deviation 1/√fan_in) and bias 0.1, as in deep_q_rl, the
            paper's base code; ``torch``: uniform ±1/√fan_in, weights and biases, torch's default and that of Torch7,
            which Mnih et al. used; ``normal``: N(0, 0.05²) and bias 0, as v before data-dependent
            initialization (Salimans & Kingma 2016, section 3).
        network: a registered name, or ``module:Name`` of a registered class.
        network_options: of that network; what is missing has its default.
    """

    num_actions: int
    parameterization: str = "standard"
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    observation_shape: tuple[int, int, int] = (4, 84, 84)
    convolutions: tuple[tuple[int, int, int], ...] = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    hidden_units: int = 512
    weight_init: WeightInit = field(default="he")
    network: str = NATURE
    network_options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values; ``nature`` goes without saying, as in files of earlier versions."""
        values = asdict(self)
        if (self.network, self.network_options) == (NATURE, {}):
            del values["network"], values["network_options"]
        return values

    @classmethod
    def from_json(cls, values: object) -> QNetworkSpec:
        """Build a spec from untrusted JSON values.

        Raises:
            CheckpointError: a field is missing, unknown, of another type or out of range.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("the network spec is not a mapping")
        values = {"network": NATURE, "network_options": {}, **values}
        if set(values) != {entry.name for entry in fields(cls)}:
            raise CheckpointError("the network spec has missing or unknown fields")
        try:
            spec = cls(
                num_actions=_whole(values["num_actions"], 1, MAX_ACTIONS),
                parameterization=str(values["parameterization"]),
                options=_options(values["options"], "parameterization"),
                layers=_patterns(values["layers"]),
                observation_shape=_three(values["observation_shape"], 512),
                convolutions=_convolutions(values["convolutions"]),
                hidden_units=_whole(values["hidden_units"], 1, 65536),
                weight_init=values["weight_init"],
                network=str(values["network"]),
                network_options=_options(values["network_options"], "network"),
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
        try:
            registry.options(registry.get(spec.network), spec.network_options)
        except KeyError:
            raise CheckpointError(unknown_network_in_file(spec.network)) from None
        except ValueError as error:
            raise CheckpointError(f"the network spec is damaged: {error}") from None
        if spec.network == NATURE:
            spec.flat_features()
        else:
            spec.outline()
        return spec

    def outline(self) -> Network:
        """Return the network without parameterization on torch's meta device: names and shapes, no values.

        Raises:
            CheckpointError: it cannot be built there, or would be enormous.
        """
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _limited():
            try:
                network = registry.make(self)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
        if strange := [name for name, tensor in network.state_dict().items() if not tensor.is_meta]:
            raise CheckpointError(
                f"the network '{self.network}' makes {strange[0]} with values where torch allocates nothing: its "
                '__init__ must work under torch.device("meta")'
            )
        return network

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
            CheckpointError: see :meth:`flat_features` and :meth:`outline`.
        """
        if self.network != NATURE:
            return sum(parameter.numel() for parameter in self.outline().parameters())
        channels = self.observation_shape[0]
        total = 0
        for filters, kernel, _ in self.convolutions:
            total += filters * (channels * kernel**2 + 1)
            channels = filters
        return total + self.hidden_units * (self.flat_features() + 1) + self.num_actions * (self.hidden_units + 1)


def unknown_in_file(name: str) -> str:
    """Return the error for a parameterization's name that stands in a file and is not registered."""
    if ":" in name:
        return f"the parameterization '{name}' is user-defined and is not imported from a file: add --param {name}"
    return f"the parameterization '{name}' is not registered: if it is your own, add --param YOUR_MODULE:ITS_CLASS"


def unknown_network_in_file(name: str) -> str:
    """Return the error for a network's name that stands in a file and is not registered."""
    if ":" in name:
        return f"the network '{name}' is user-defined and is not imported from a file: add --network {name}"
    return f"the network '{name}' is not registered: if it is your own, add --network YOUR_MODULE:ITS_CLASS"


@contextmanager
def _limited() -> Iterator[None]:
    """Refuse a network that would be enormous while it is built, whatever its constructor makes of its options."""
    parameters = modules = 0

    def count_tensor(_owner: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal parameters
        parameters += 0 if tensor is None or isinstance(tensor, nn.UninitializedParameter) else tensor.numel()
        if parameters > MAX_PARAMETERS:
            raise CheckpointError(f"the network spec asks for more than {MAX_PARAMETERS:,} parameters")

    def count_module(_owner: nn.Module, _name: str, _module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise CheckpointError(f"the network spec asks for more than {MAX_MODULES:,} modules")

    handles = [
        torch_module.register_module_parameter_registration_hook(count_tensor),
        torch_module.register_module_buffer_registration_hook(count_tensor),
        torch_module.register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _options(values: object, owner: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or len(values) > 64:
        raise ValueError(f"the {owner}'s options are not a mapping")
    for name, value in values.items():
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"the {owner}'s option {name} is neither a number nor a text")
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
