"""Safe reading of untrusted files: their claims are checked before anything of that size is allocated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from wn_rl.errors import CheckpointError, one_line

MAX_HEADER = 2**20
"""Largest safetensors header, bytes; that of the largest Q-network has some tens of thousands."""
MAX_DEPTH = 16
"""Most levels of a nested state; ours have four."""
MAX_DIGITS = 40
"""Most digits of an integer in JSON: enough for the 128 bits of a random generator's state."""
_MAX_MESSAGE = 300
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def shown(error: object) -> str:
    """Return a text that may quote a file as one short line without control characters."""
    text = one_line(error) if isinstance(error, BaseException) else " ".join(str(error).split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} …"


@contextlib.contextmanager
def open_regular(path: Path, limit: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most ``limit`` bytes, or a symbolic link to one.

    Raises:
        CheckpointError: it cannot be opened, is too large, or is not a regular file: a pipe, a device, a directory.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a device can have side effects
            raise CheckpointError(f"{path} is not a file")
        # The file may have been replaced since, and opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a file")
            if status.st_size > limit:
                raise CheckpointError(f"{path} is too large: {status.st_size:,} bytes where at most {limit:,} fit")
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path, limit: int) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return the content of a JSON file of at most ``limit`` bytes.

    Also refused: NaN and infinity, a key that appears twice, bytes that are not UTF-8, a number of more than
    ``MAX_DIGITS`` digits.

    Raises:
        CheckpointError: the file cannot be read or is refused.
    """
    with open_regular(path, limit) as file:
        data = file.read(limit)
    try:
        return parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON: {shown(error)}") from None


def parse_json(data: bytes) -> Any:  # noqa: ANN401 - whatever the text holds
    """Return ``data`` parsed as JSON; see :func:`read_json`.

    Raises:
        ValueError: it is refused.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


@dataclass(frozen=True)
class Layout:
    """dtype and shape of a tensor, as a file declares them."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def layout_of(tensor: Tensor) -> Layout:
    """Return dtype and shape of a tensor, on whatever device, meta included."""
    return Layout(tensor.dtype, tuple(tensor.shape))


def read_layouts(file: BinaryIO) -> dict[str, Layout]:
    """Return the layouts of a safetensors file's tensors by name, reading its header only.

    The format: 8 bytes with the length of the header, the header as JSON, then the tensors without gaps
    (https://github.com/huggingface/safetensors, section Format).

    Raises:
        ValueError: the header is invalid, or does not describe the bytes that follow it.
    """
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("its header is cut off or too long")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    header.pop("__metadata__", None)
    layouts, places = {}, []
    for name, entry in header.items():
        layouts[name], place = _layout(name, entry)
        places.append(place)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its header describes {end:,} bytes and {size - 8 - length:,} follow")
    return layouts


def _layout(name: str, entry: object) -> tuple[Layout, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry '{name}' of its header is not a tensor's")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"the tensor '{name}' has an unknown dtype")
    if not (_are_sizes(shape) and len(shape) <= MAX_DEPTH and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"the tensor '{name}' has no sizes")
    layout = Layout(_DTYPES[entry["dtype"]], tuple(shape))
    if offsets[1] - offsets[0] != layout.nbytes:
        raise ValueError(f"the tensor '{name}' has another size than its shape")
    return layout, (offsets[0], offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_tensors(
    path: Path, *, digest: object, limit: int, expected: Mapping[str, Layout] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; its tensors are allocated after everything else was checked.

    Args:
        path: the file.
        digest: SHA-256 that it must have, in hexadecimal.
        limit: most bytes of all its tensors.
        expected: the layouts that it must have; None: any.

    Raises:
        CheckpointError: it cannot be read, is damaged, holds other tensors, or a number that is not finite.
    """
    with open_regular(path, limit + MAX_HEADER + 8) as file:
        if _sha256(file) != digest:
            raise CheckpointError(f"{path} is damaged: its checksum does not match")
        try:
            layouts = read_layouts(file)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {shown(error)}") from None
        if expected is not None:
            compare_layouts(path, layouts, expected)
        file.seek(0)
        data = file.read()
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {shown(error)}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path} is damaged: '{shown(name)}' holds a number that is not finite")
    return tensors


def _sha256(file: BinaryIO) -> str:
    """Return the SHA-256 of a file, read in pieces: the file may still be refused for its size."""
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def compare_layouts(path: Path, found: Mapping[str, Layout], expected: Mapping[str, Layout]) -> None:
    """Refuse weights that do not match the network.

    Raises:
        CheckpointError: the first difference.
    """
    for name, layout in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: the weights do not fit the network: '{name}' is missing")
        if found[name] != layout:
            raise CheckpointError(
                f"{path}: the weights do not fit the network: '{name}' is {found[name]}, not {layout}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path}: the weights do not fit the network: it has no '{shown(name)}'")


def check_state(
    found: Mapping[str, Any], expected: Mapping[str, Any], parameters: Sequence[Tensor] = (), *, place: str = ""
) -> None:
    """Compare a nested state that was read from a file with that of freshly built objects, before it is restored.

    Same keys; tensors of the same shape and dtype (the device may differ); values of the same type, numbers finite, a
    counter not below 0. A mapping that is empty in ``expected`` has no content yet, e.g. an optimizer's state before
    the first step. It may be missing in ``found``. Otherwise it holds finite numbers and texts, or for the index of
    each parameter the optimizer's tensors: each a scalar or of the parameter's shape, with the same names for every
    parameter.

    Args:
        found: from the file.
        expected: state of new objects with the same configuration.
        parameters: the optimizer's, in order.
        place: path of the state within a larger one, for messages.

    Raises:
        CheckpointError: the first difference, by its path.
    """
    for key, value in expected.items():
        path = f"{place}{key}"
        if key not in found:
            if isinstance(value, Mapping) and not value:
                continue
            raise CheckpointError(f"the training state lacks '{path}'")
        _check_entry(found[key], value, parameters, path)
    for key in found:
        if key not in expected:
            raise CheckpointError(f"the training state has an unknown entry '{shown(place + str(key))}'")


def _check_entry(found: object, expected: object, parameters: Sequence[Tensor], path: str) -> None:
    if isinstance(expected, Mapping) != isinstance(found, Mapping):
        raise CheckpointError(f"the training state's '{path}' is {_kind(found)}, not {_kind(expected)}")
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if expected:
            check_state(found, expected, parameters, place=f"{path}/")
        elif any(isinstance(value, Mapping) for value in found.values()):
            _check_moments(found, parameters, path)
        else:
            for key, value in found.items():
                if not isinstance(value, bool | int | float | str | None):
                    raise CheckpointError(f"the training state's '{shown(f'{path}/{key}')}' is {_kind(value)}")
                _check_number(value, f"{path}/{key}")
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        if layout_of(found) != layout_of(expected):
            raise CheckpointError(
                f"the training state's '{path}' is {layout_of(found)}, not {layout_of(expected)} as in this run"
            )
    elif not _same_kind(found, expected):
        raise CheckpointError(f"the training state's '{path}' is {_kind(found)}, not {_kind(expected)}")
    else:
        _check_number(found, path, counter=type(expected) is int and expected >= 0)


def _same_kind(found: object, expected: object) -> bool:
    if expected is None:
        return isinstance(found, bool | int | float | str | None)
    if type(expected) is float:
        return type(found) in (float, int)
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple)
    return type(found) is type(expected)


def _check_number(value: object, path: str, *, counter: bool = False) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"the training state's '{shown(path)}' is not a finite number")
    if counter and isinstance(value, int) and value < 0:
        raise CheckpointError(f"the training state's '{shown(path)}' is below 0")


def _check_moments(found: Mapping[Any, Any], parameters: Sequence[Tensor], path: str) -> None:
    """Refuse an optimizer's state that does not match ``parameters``."""
    numbers = [str(number) for number in range(len(parameters))]
    if set(found) != set(numbers):
        raise CheckpointError(f"the training state's '{path}' is not that of {len(numbers)} parameters")
    first = found[numbers[0]]
    for number, parameter in zip(numbers, parameters, strict=True):
        entries = found[number]
        if not isinstance(entries, Mapping) or not isinstance(first, Mapping) or set(entries) != set(first):
            raise CheckpointError(f"the training state's '{path}/{number}' has other entries than '{path}/0'")
        for key, value in entries.items():
            here = shown(f"{path}/{number}/{key}")
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, parameter.dtype):
                raise CheckpointError(f"the training state's '{here}' is {_kind(value)}, not a tensor of the network's")
            if value.dim() > 0 and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the training state's '{here}' has shape {list(value.shape)}; its parameter has "
                    f"{list(parameter.shape)}"
                )
            if value.dim() == 0 and not 0 <= float(value) < math.inf:
                raise CheckpointError(f"the training state's '{here}' counts {float(value):g} steps")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {layout_of(value)}"
    if isinstance(value, Mapping):
        return "a group"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else type(value).__name__)
