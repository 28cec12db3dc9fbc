"""Changes to a model that are undone if they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class _Snapshot:
    """The state of one module: class, attributes, the contents of its containers, and the values of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.attributes = dict(module.__dict__)
        # The containers themselves are kept: handles of hooks refer to them.
        self.containers: list[tuple[Any, Any]] = [
            (value, value.copy()) for value in self.attributes.values() if isinstance(value, dict | list | set)
        ]
        # ``data`` keeps the storage even where ``set_`` gives the tensor another, and has a version of its own.
        self.tensors = [
            (tensor, tensor.data, tensor.data.clone(), tensor.requires_grad)
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if isinstance(tensor, Tensor) and not is_lazy(tensor) and not tensor.is_inference()
        ]

    def restore(self) -> None:
        """Restore the module."""
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        self.module.__class__ = self.kind
        for container, content in self.containers:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        for tensor, data, values, requires_grad in self.tensors:
            data.copy_(values)
            tensor.data = data
            tensor.requires_grad_(requires_grad)


@contextlib.contextmanager
def unchanged_on_failure(*models: nn.Module) -> Iterator[None]:
    """Undo every change of ``models`` when the block raises: classes, attributes, submodules, hooks, tensors' values.

    While the block runs, a second copy of the values is in memory.
    """
    modules = {id(module): module for model in models for module in model.modules()}
    snapshots = [_Snapshot(module) for module in modules.values()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for snapshot in snapshots:
                snapshot.restore()
        raise
