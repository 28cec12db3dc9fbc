"""A recorder for the CPU that behaves as a CUDA graph does, so that what is recorded can be tested without a GPU.

While recording it notes every operation below autograd with the very tensors that it got, and then puts everything back
as it was, since recording does nothing. Repeating does the same operations on the same tensors again, with no Python in
between: a number of the host that changes, a tensor that was given other storage, or a result that was kept from
outside is then as wrong as it would be in a CUDA graph. Operations that would read from the device or wait for it are
refused, as CUDA does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.lift_fresh.default,  # torch.tensor(...): on a GPU a copy from memory that is not pinned
    aten.repeat_interleave.Tensor,
}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _storages(tree: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(tree)}


class _Notes(TorchDispatchMode):
    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.steps: list[tuple[Any, list[Any], Any, list[Any]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made: set[int] = set()
        self.kept: list[Any] = []  # so that no id is given twice
        self.generators = generators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS or self._boolean_index(func, args):
            raise RuntimeError(f"{func} waits for the device")
        drawn = [value for value in kwargs.values() if isinstance(value, torch.Generator)]
        if any(not any(generator._cdata == known._cdata for known in self.generators) for generator in drawn):
            raise RuntimeError(f"{func} draws from a generator that is not registered")
        if func is aten.native_batch_norm.default:  # its schema does not say that it writes running statistics
            for tensor in _tensors(args[3:5]):
                self._keep(tensor)
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    self._keep(tensor)
        flat, spec = tree_flatten((args, kwargs))
        result = func(*args, **kwargs)
        results = tree_flatten(result)[0]
        # A result that shares memory with an argument is a view of it, or the argument itself.
        self.made |= _storages(results) - _storages(flat)
        self.kept.append((flat, results))
        self.steps.append((func, flat, spec, results))
        return result

    @staticmethod
    def _boolean_index(func: Any, args: Any) -> bool:
        if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return False
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.made and storage._cdata not in self.before:
            self.before[storage._cdata] = (storage, storage.clone())

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)


class TapeRecorder:
    """See the module; ``refuses`` makes every recording fail, as an operation that CUDA cannot record does."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.recordings = 0
        self.repetitions = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        states = [generator.get_state() for generator in generators]
        notes = _Notes(generators)
        try:
            with notes:
                work()
                if self.refuses:
                    raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            notes.undo()
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
        self.recordings += 1

        def again() -> None:
            self.repetitions += 1
            made: dict[int, Any] = {}
            with torch.no_grad():
                for func, flat, spec, results in notes.steps:
                    args, kwargs = tree_unflatten([made.get(id(leaf), leaf) for leaf in flat], spec)
                    found = tree_flatten(func(*args, **kwargs))[0]
                    for old, new in zip(results, found, strict=True):
                        if isinstance(old, Tensor) and not any(old is leaf for leaf in flat):
                            made[id(old)] = new

        return again
