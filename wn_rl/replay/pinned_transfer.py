"""Transfers between host and device in a vector step: packed, through pinned memory, without waiting for the device.

On a CPU the same code copies from memory to memory, so that it can be tested there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 256
"""Each field begins at a multiple of so many bytes: no kernel then reads across fields, or slowly."""

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each field, by name."""


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Staging:
    """Staging buffers: fields that are filled on the host and copied to the device in one asynchronous copy.

    Double-buffered: two pinned buffers alternate. An event says when the device has read one, so the host never
    overwrites bytes that are still being copied; it waits only if it is two vector steps ahead. ::

        fields = staging.begin()      # numpy arrays to fill; their previous content is undefined
        fields["rewards"][:] = …
        staging.send()
        staging.device["rewards"]     # valid for work given to the device after send(), until the next send()

    Attributes:
        device: the fields on the device, by name; always the same tensors.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        """Allocate the buffers.

        Args:
            fields: what is sent.
            device: to which it is sent.
        """
        spans: dict[str, tuple[int, int]] = {}
        size = 0
        for name, (dtype, shape) in fields.items():
            length = math.prod(shape) * dtype.itemsize
            spans[name] = (size, size + length)
            size += -(-length // ALIGNMENT) * ALIGNMENT

        def split(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[slice(*spans[name])].view(dtype).view(shape) for name, (dtype, shape) in fields.items()
            }

        on_gpu = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._read = [_event() for _ in range(2)] if on_gpu else None
        self._tensors = [split(buffer) for buffer in self._host]
        self._arrays = [{name: field.numpy() for name, field in tensors.items()} for tensors in self._tensors]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device = split(self._device)
        self._current = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._device.nbytes

    def begin(self) -> dict[str, NDArray[Any]]:
        """Return the fields to fill, as numpy arrays."""
        self._current = 1 - self._current
        if self._read is not None:
            self._read[self._current].synchronize()  # returns at once for an event that was never recorded
        return self._arrays[self._current]

    @property
    def host(self) -> dict[str, Tensor]:
        """The fields that :meth:`begin` returned, as tensors."""
        return self._tensors[self._current]

    def send(self) -> None:
        """Start the copy to the device; it is done before any work that the device gets from now on."""
        self._device.copy_(self._host[self._current], non_blocking=True)
        if self._read is not None:
            self._read[self._current].record()


class Readback:
    """Integers that are copied back from the device: the only synchronization of a vector step."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Allocate the pinned memory for ``size`` integers."""
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = _event() if on_gpu else None

    def read(self, values: Tensor) -> NDArray[np.int64]:
        """Return ``values``, int64 of shape (size,), as an array of its own; waits until the device has them."""
        self._host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
            self._arrived.synchronize()
        here: NDArray[np.int64] = self._host.numpy().copy()
        return here
