"""The network in a file that Stable-Baselines3's ``DQN.save`` wrote, read without executing anything from it.

Such a file is a zip with ``policy.pth``, itself the zip of ``torch.save``: raw tensors, and ``data.pkl`` which says
what they are. ``data.pkl`` is not unpickled: :func:`_interpret` reads the few instructions that a state dict consists
of, imports and calls nothing, and refuses every other. Of the file's ``data``, JSON with real pickles in it, the texts
beside the pickles are read (:mod:`wn_rl.sb3.settings`); the rest of the file is not read.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from wn_rl.errors import CheckpointError, one_line
from wn_rl.networks import QNetwork, QNetworkSpec, build_q_network
from wn_rl.parameterizations import Parameterization, fold, resolve
from wn_rl.sb3.settings import NotTheNetworkError, Settings, read_settings

MAX_BYTES = 2**28
"""Of ``policy.pth``: SB3's DQN keeps two networks of 1.7M parameters there, 13 MB."""
MAX_PICKLE_BYTES = 2**20
"""Of ``data.pkl``, which takes some 200 bytes for a tensor."""
MAX_DATA_BYTES = 2**27
"""Of ``data``, where SB3 keeps the last observation of each environment: 40 kB each."""
_POLICY = "policy.pth"
_DATA = "data"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
}
_MARK = object()
_Found = TypeVar("_Found")
# SB3's QNetwork (NatureCNN and one linear layer) and ours, layer by layer.
LAYERS = {
    "features_extractor.cnn.0": "convolutions.0",
    "features_extractor.cnn.2": "convolutions.1",
    "features_extractor.cnn.4": "convolutions.2",
    "features_extractor.linear.0": "hidden",
    "q_net.0": "output",
}
"""Names of the layers in SB3's ``policy.q_net`` and here."""


class _DamagedError(Exception):
    """The file is not what ``torch.save`` writes for a state dict."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict of the policy in an SB3 file, on the CPU.

    Raises:
        CheckpointError: it is no such file, is damaged, or is larger than a DQN for Atari can be.
    """

    def tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
        with zipfile.ZipFile(io.BytesIO(_member(archive, _POLICY, MAX_BYTES))) as inner:
            return _tensors(inner)

    return _read(path, _POLICY, tensors)


def _read(path: Path, name: str, read: Callable[[zipfile.ZipFile], _Found]) -> _Found:
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                raise CheckpointError(f"{path} is no file of Stable-Baselines3: it holds no {name}")
            return read(archive)
    except _DamagedError as error:
        raise CheckpointError(f"{path}: {name} is damaged: {error}") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or no zip file: {one_line(error)}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _settings(path: Path) -> Settings:
    data = _read(path, _DATA, lambda archive: _member(archive, _DATA, MAX_DATA_BYTES))
    try:
        return read_settings(data)
    except NotTheNetworkError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    entry = archive.getinfo(name)
    if entry.file_size > limit:
        raise _DamagedError(f"{name} would take {entry.file_size:,} bytes, more than {limit:,}")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _DamagedError(f"{name} is compressed, which neither Stable-Baselines3 nor torch does")
    return archive.read(name)


def _tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise _DamagedError("it is not what torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and _member(archive, f"{root}byteorder", 16) != b"little":
        raise _DamagedError("it was written on a machine of another byte order")
    storages: dict[_Storage, Tensor] = {}

    def tensor(storage: object, offset: object, size: object, stride: object) -> Tensor:
        """Copy a tensor out of its storage; sizes are checked before anything is allocated."""
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise _DamagedError("a tensor has no storage")
        if len(size) != len(stride) or len(size) > 4 or not all(_whole(n) for n in (offset, *size, *stride)):
            raise _DamagedError("a tensor has an impossible shape")
        assert isinstance(offset, int)
        contiguous, count = [], 1
        for length in reversed(size):
            contiguous.append(count)
            count *= length
        if offset + count > storage.numel or (count > 1 and not _alike(size, stride, contiguous[::-1])):
            raise _DamagedError("a tensor reaches beyond its storage")
        if storage not in storages:
            name = f"{root}data/{storage.key}"
            if name not in archive.namelist():
                raise _DamagedError(f"{name} is missing")
            data = _member(archive, name, MAX_BYTES)
            if len(data) != storage.numel * storage.dtype.itemsize or not data:
                raise _DamagedError(f"{name} has {len(data):,} bytes, not those of {storage.numel:,} numbers")
            storages[storage] = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return storages[storage][offset : offset + count].reshape(size).clone()

    state = _interpret(_member(archive, pickles[0], MAX_PICKLE_BYTES), tensor)
    if not isinstance(state, dict) or not state:
        raise _DamagedError("it holds no state dict")
    named = {str(key): value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if len(named) != len(state):
        raise _DamagedError("its state dict holds something else than tensors")
    return named


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_BYTES


def _alike(size: tuple[int, ...], stride: tuple[int, ...], contiguous: list[int]) -> bool:
    # The stride of an axis of length 1 says nothing.
    return all(n == 1 or given == plain for n, given, plain in zip(size, stride, contiguous, strict=True))


def _interpret(data: bytes, tensor: Callable[[object, object, object, object], Tensor]) -> object:
    """Follow the pickle instructions of a state dict; nothing is imported and nothing is called but ``tensor``.

    Raises:
        _DamagedError: an instruction, a name or an argument that a state dict of plain tensors does not have.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = max(index for index, value in enumerate(stack) if value is _MARK)
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    def fill(items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            stack[-1][key] = value

    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            index = argument if isinstance(argument, int) else -1
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                return stack.pop()
            if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"):
                stack.append(argument)
            elif name in ("NEWTRUE", "NEWFALSE", "NONE"):
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[index] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[index])
            elif name == "MARK":
                stack.append(_MARK)
            elif name in ("EMPTY_TUPLE", "EMPTY_DICT"):
                stack.append(() if name == "EMPTY_TUPLE" else {})
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "TUPLE":
                stack.append(tuple(to_mark()))
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                fill([key, value])
            elif name == "SETITEMS":
                fill(to_mark())
            elif name == "GLOBAL":
                stack.append(_Global(str(argument)))
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments, tensor))
            elif name == "BUILD":
                stack.pop()  # _metadata of a state dict: versions of modules, which nobody needs
            else:
                raise _DamagedError(f"it holds the pickle instruction {name}, which no state dict needs")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError):
        raise _DamagedError("its list of tensors is not readable") from None
    raise _DamagedError("its list of tensors has no end")


def _storage(description: object) -> _Storage:
    kind, storage_type, key, _, numel = description if isinstance(description, tuple) else (None,) * 5
    if kind != "storage" or not isinstance(storage_type, _Global) or not isinstance(key, str) or not _whole(numel):
        raise _DamagedError("a tensor's storage is not described")
    if storage_type.name not in _DTYPES:
        raise _DamagedError(f"it holds '{storage_type.name}', which no network has")
    assert isinstance(numel, int)
    return _Storage(_DTYPES[storage_type.name], key, numel)


def _call(
    function: object, arguments: object, tensor: Callable[[object, object, object, object], Tensor]
) -> Tensor | dict[Any, Any]:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise _DamagedError("it calls what is no function")
    if function.name == _DICT and not arguments:
        return {}
    if function.name == _TENSOR and len(arguments) >= 4:
        return tensor(*arguments[:4])
    if function.name == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
        return arguments[0]
    raise _DamagedError(f"it calls '{function.name}', which no state dict needs")


def q_network(path: Path, param: str | None = None, options: dict[str, Any] | None = None) -> QNetwork:
    """Return the Q-network of an SB3 DQN with ``CnnPolicy``, on the CPU, in evaluation mode.

    Its Q-values of uint8 frames are those of ``model.q_net``. Which parameterization the layers carry is told by the
    file where ``wn_rl.sb3.policy_kwargs`` built the model.

    Args:
        path: of the zip.
        param: the parameterization, where the file does not name it.
        options: of the parameterization.

    Raises:
        CheckpointError: see :func:`read_state_dict`; another algorithm, policy, network, observation or
            parameterization, or a file that does not say which.
    """
    state = {
        name.removeprefix("q_net."): value for name, value in read_state_dict(path).items() if name.startswith("q_net.")
    }
    if not state:
        raise CheckpointError(f"{path} is no DQN: its policy has no q_net")
    settings = _settings(path)
    theirs = {name: next((layer for layer in LAYERS if name.startswith(f"{layer}.")), None) for name in state}
    if strange := [name for name, layer in theirs.items() if layer is None]:
        raise CheckpointError(f"{path} is no DQN with CnnPolicy and its default network: it has q_net.{strange[0]}")
    if missing := set(LAYERS) - set(theirs.values()):
        raise CheckpointError(f"{path} is no DQN with CnnPolicy: it has no q_net.{min(missing)}")
    ours = {LAYERS[layer] + name.removeprefix(layer): value for name, value in state.items() if (layer := theirs[name])}
    plain = {name for name in LAYERS.values() if {k for k in ours if k.startswith(f"{name}.")} == _plain(name)}
    treated = tuple(name for name in LAYERS.values() if name not in plain)
    parameterization = _parameterization(path, settings, treated, param, options or {})
    filters = [value for name, value in ours.items() if name.startswith("convolutions.0.") and value.dim() == 4]
    channels = max((value.shape[1] for value in filters), default=4)  # g of wn has an axis of length 1 there
    if channels != 4:
        raise CheckpointError(
            f"{path} was trained on observations of {channels} channels; this plays stacks of 4 gray frames"
        )
    spec = QNetworkSpec(
        num_actions=_units(path, ours, "output", 18),
        parameterization=parameterization.name,
        options=parameterization.options(),
        layers=treated or None,
        hidden_units=_units(path, ours, "hidden", 65_536),
    )
    network = build_q_network(spec, seed=0)
    assert isinstance(network, QNetwork)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in ours.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) == found.get(name):
            continue
        if name == "hidden.weight" and name in found:
            raise CheckpointError(f"{path} was trained on observations of another size than 84 × 84 pixels")
        raise CheckpointError(
            f"{path} does not fit a DQN with CnnPolicy and --param {spec.parameterization}: its {name} is "
            f"{_shown(found.get(name))}, not {_shown(expected.get(name))}"
        )
    if spec.num_actions != settings.num_actions or settings.features_dim not in (None, spec.hidden_units):
        raise CheckpointError(f"{path} is damaged: its weights are not of the network that its data describe")
    network.load_state_dict(ours)
    return (network if settings.normalize_images else _for_raw_pixels(path, network)).eval()


def _parameterization(
    path: Path, settings: Settings, treated: tuple[str, ...], param: str | None, options: dict[str, Any]
) -> Parameterization:
    """Return the parameterization of the layers that carry one, as the file and the caller say.

    Raises:
        CheckpointError: neither does, or they say two.
    """
    if not treated:
        return resolve("standard")
    named = settings.parameterization
    if param in (None, "standard") and (named is None or param is not None):
        raise CheckpointError(
            f"{path}: the layers {', '.join(treated)} carry a parameterization that the weights do not name: "
            "add --param, e.g. --param wn (and --param-options where the training had some)"
        )
    if param is None:
        assert named is not None
        return named
    given = resolve(param, options)
    if named is not None and (type(given), given.options()) != (type(named), named.options()):
        raise CheckpointError(
            f"{path} was trained with {_described(named)}, not with {_described(given)}: leave --param out"
        )
    return given


def _described(parameterization: Parameterization) -> str:
    options = ", ".join(f"{name}={value}" for name, value in parameterization.options().items())
    return f"{parameterization.name} ({options})" if options else parameterization.name


@torch.no_grad()
def _for_raw_pixels(path: Path, network: QNetwork) -> QNetwork:
    """Return a network of the same Q-values for one trained on pixels from 0 to 255: its first filters are multiplied.

    A Q-network here divides pixels by 255.
    """
    spec = network.spec
    first = network.convolutions[0]
    if parametrize.is_parametrized(first, "weight"):  # what computes filters may not be able to multiply them
        try:
            fold(first)
        except ValueError as error:
            raise CheckpointError(f"{path}: its normalize_images is false, and {one_line(error)}") from None
        layers = tuple(name for name in spec.layers or () if name != "convolutions.0")
        spec = (
            replace(spec, layers=layers)
            if layers
            else replace(spec, parameterization="standard", options={}, layers=None)
        )
        plain = build_q_network(spec, seed=0)
        assert isinstance(plain, QNetwork)
        plain.load_state_dict(network.state_dict())
        network = plain
    weight = network.convolutions[0].weight
    assert isinstance(weight, Tensor)
    weight.mul_(255)
    return network


def _plain(layer: str) -> set[str]:
    return {f"{layer}.weight", f"{layer}.bias"}


def _units(path: Path, weights: dict[str, Tensor], layer: str, most: int) -> int:
    bias = weights.get(f"{layer}.bias", weights.get(f"{layer}.normalization.bias"))
    if bias is None or bias.dim() != 1 or not 1 <= len(bias) <= most:
        raise CheckpointError(f"{path}: the layer {layer} has no bias of 1 to {most:,} units")
    return len(bias)


def _shown(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "missing"
    return " × ".join(map(str, shape)) or "one number"
