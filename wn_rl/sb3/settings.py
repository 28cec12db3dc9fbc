"""What a Stable-Baselines3 file says about its network in text, beside the pickles that are never executed.

``data`` in the zip is JSON. What JSON cannot hold stands there as a pickle and, next to it, as the text of its parts: a
class by its name, a space by its shape and dtype. That is enough to tell whether a network is the one that can be
rebuilt here; everything else is refused by its name, since another network with the same weights plays otherwise.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wn_rl.parameterizations import Parameterization, names, registry, resolve

CNN = "<class 'stable_baselines3.common.torch_layers.NatureCNN'>"
_POLICIES = "stable_baselines3.dqn.policies"
_DICTIONARIES = ("<class 'dict'>", "<class 'collections.OrderedDict'>", "<class 'wn_rl.sb3.PolicyKwargs'>")
_OPTIMIZER = {"optimizer_class", "optimizer_kwargs", "device"}
"""What of ``policy_kwargs`` does not change what a network computes; SB3 ignores a saved ``device`` too."""
# With net_arch [] there is one linear layer behind the features, so activation_fn is used nowhere.
_KNOWN = _OPTIMIZER | {
    "activation_fn", "features_extractor_class", "features_extractor_kwargs", "net_arch", "normalize_images",
}  # fmt: skip


class NotTheNetworkError(Exception):
    """The file describes a network that is not rebuilt here, or does not describe it; the text says what."""


@dataclass(frozen=True)
class Settings:
    """What must be known beside the weights.

    Attributes:
        normalize_images: whether pixels are divided by 255.
        parameterization: with which ``wn_rl.sb3.policy_kwargs`` the model was built; None where none is named, or
            one that is not registered here.
        num_actions: of the action space.
        features_dim: units of the dense layer before the output, None for SB3's default.
    """

    normalize_images: bool
    parameterization: Parameterization | None
    num_actions: int
    features_dim: int | None


def read_settings(data: bytes) -> Settings:
    """Read the file's ``data``.

    Raises:
        NotTheNetworkError: it is no DQN with ``CnnPolicy`` on stacks of four 84 × 84 frames of bytes, or is damaged.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise NotTheNetworkError("its 'data' is not what Stable-Baselines3 writes")
    policy = _policy(_part(values, "policy_class"))
    kwargs = _policy_kwargs(_part(values, "policy_kwargs"))
    for name in kwargs.keys() - _KNOWN:
        raise NotTheNetworkError(f"its policy_kwargs hold '{name}', which this does not know")
    extractor = kwargs.get("features_extractor_class", CNN if policy == "CnnPolicy" else None)
    if extractor is None:
        raise NotTheNetworkError("it is no DQN with CnnPolicy: its policy is MlpPolicy")
    if extractor != CNN:
        raise NotTheNetworkError(f"its features_extractor_class is {_named(extractor)}, not NatureCNN")
    if kwargs.get("net_arch") not in (None, []):
        raise NotTheNetworkError(f"its net_arch is {_named(kwargs['net_arch'])}, not [], CnnPolicy's default")
    normalize = kwargs.get("normalize_images", True)
    if not isinstance(normalize, bool):
        raise NotTheNetworkError(f"its normalize_images is {_named(normalize)}, neither true nor false")
    dimension = _features_dim(kwargs.get("features_extractor_kwargs"), normalize=normalize)
    _check_observations(_part(values, "observation_space"))
    actions = _actions(_part(values, "action_space"))
    return Settings(normalize, _parameterization(kwargs.get("optimizer_class")), actions, dimension)


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    if not isinstance(part, dict):
        raise NotTheNetworkError(f"it does not say its {name}")
    return part


def _named(value: object) -> str:
    """Return a value as it is named in a message, a class without the brackets."""
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"^<class '(.*)'>$", r"\1", text)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _policy(part: Mapping[str, Any]) -> str:
    """Return ``CnnPolicy`` or ``DQNPolicy``, which is called ``MlpPolicy`` too."""
    module = str(part.get("__module__"))
    # A class is not named; its constructor is, and a subclass is of another module.
    constructor = re.match(r"<function (\w+)\.__init__ at ", str(part.get("__init__")))
    name = constructor[1] if constructor else "a class"
    if module != _POLICIES or name not in ("CnnPolicy", "DQNPolicy"):
        raise NotTheNetworkError(f"it is no DQN with CnnPolicy: its policy is {name} of {_named(module)}")
    return name


def _policy_kwargs(part: Mapping[str, Any]) -> dict[str, Any]:
    if ":serialized:" in part and part.get(":type:") not in _DICTIONARIES:
        raise NotTheNetworkError(f"its policy_kwargs are a {_named(part.get(':type:'))}, which is not readable")
    return {name: value for name, value in part.items() if name not in (":type:", ":serialized:")}


def _features_dim(kwargs: object, *, normalize: bool) -> int | None:
    if kwargs is None:
        return None
    if not isinstance(kwargs, dict):
        raise NotTheNetworkError(f"its features_extractor_kwargs are {_named(kwargs)}, which is not readable")
    for name in kwargs.keys() - {"features_dim", "normalized_image"}:
        raise NotTheNetworkError(f"its features_extractor_kwargs hold '{name}', which this does not know")
    if normalize and kwargs.get("normalized_image", False) is not False:
        # SB3 then divides pixels by 255 or not, as the bounds of its observation space say, which are not written out.
        raise NotTheNetworkError("its features_extractor_kwargs say normalized_image beside normalize_images")
    dimension = kwargs.get("features_dim")
    if dimension is not None and type(dimension) is not int:
        raise NotTheNetworkError(f"its features_dim is {_named(dimension)}, which is no number")
    return dimension


def _check_observations(space: Mapping[str, Any]) -> None:
    kind, shape, dtype = (space.get(name) for name in (":type:", "_shape", "dtype"))
    if kind not in ("<class 'gymnasium.spaces.box.Box'>", "<class 'gym.spaces.box.Box'>"):
        raise NotTheNetworkError(f"its observation_space is a {_named(kind)}; this plays stacks of 4 gray frames")
    if not isinstance(shape, list) or len(shape) != 3:
        raise NotTheNetworkError(
            f"it was trained on observations of shape {_named(shape)}; this plays stacks of 4 gray frames"
        )
    if shape[0] != 4:
        raise NotTheNetworkError(
            f"it was trained on observations of {_named(shape[0])} channels; this plays stacks of 4 gray frames"
        )
    if shape[1:] != [84, 84]:
        size = " × ".join(map(_named, shape[1:]))
        raise NotTheNetworkError(f"it was trained on observations of another size than 84 × 84 pixels: {size}")
    if dtype != "uint8":
        raise NotTheNetworkError(
            f"it was trained on observations of type {_named(dtype)}, whose scale is not known; this plays uint8 frames"
        )


def _actions(space: Mapping[str, Any]) -> int:
    kind, count, start = space.get(":type:"), str(space.get("n")), str(space.get("start", 0))
    if kind not in ("<class 'gymnasium.spaces.discrete.Discrete'>", "<class 'gym.spaces.discrete.Discrete'>"):
        raise NotTheNetworkError(f"its action_space is a {_named(kind)}, not Discrete")
    if not re.fullmatch(r"[0-9]{1,5}", count):
        raise NotTheNetworkError(f"its action_space has {_named(count)} actions")
    if start != "0":
        raise NotTheNetworkError(f"its actions are counted from {_named(start)}, not from 0")
    return int(count)


def _parameterization(optimizer: object) -> Parameterization | None:
    """Return what ``wn_rl.sb3.policy_kwargs`` was given, as the text of its ``optimizer_class`` says."""
    if not isinstance(optimizer, str):
        return None
    try:
        said = json.loads(optimizer)
        name, options = said["parameterization"], said["options"]
    except (ValueError, RecursionError, TypeError, KeyError):
        name, options = _before(optimizer)
    if not isinstance(name, str) or name not in names() or not isinstance(options, dict):
        return None
    try:
        return resolve(name, options)
    except ValueError:
        return None


def _before(text: str) -> tuple[str | None, dict[str, Any]]:
    """Read the text of files written before it was JSON: the representation of Python objects."""
    found = re.match(r"ReparameterizeThenOptimize\(parameterization=(\w+)(\(.*?\)), include=", text)
    if found is None:
        return None, {}
    name = next((name for name in names() if registry.get(name).__name__ == found[1]), None)
    try:
        call = ast.parse(f"f{found[2]}", mode="eval").body
        assert isinstance(call, ast.Call)
        return name, {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, {}
