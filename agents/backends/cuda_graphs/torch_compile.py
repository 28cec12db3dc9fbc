"""The loss of an update through torch.compile: a few fused kernels in place of many general ones.

Without it an update is more than a hundred small operations on the device, three times as many as with it
(``tests/agents/test_compiled.py`` counts them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wn_rl.replay import LazyMinibatch, Minibatch, ReplayStorage


class CompiledLoss:
    """Computes what ``plain`` does, up to rounding; a lazy minibatch is gathered from the replay in the same kernels.

    The first call compiles, once for each minibatch size; so does the first gradient of the result. torch compiles the
    same code at most eight times in a process, so for eight agents, and then raises.
    """

    def __init__(self, plain: Callable[[Minibatch], Tensor]) -> None:
        """Prepare.

        Args:
            plain: returns the loss of a minibatch, a scalar, and may change tensors in place.
        """

        def of_storage(storage: ReplayStorage, indices: Tensor) -> Tensor:
            return plain(storage.minibatch(indices))

        # One whole graph or an error: with Python in between, most of the gain is lost.
        self._of_storage = torch.compile(of_storage, fullgraph=True, dynamic=False)
        self._of_tensors = torch.compile(plain, fullgraph=True, dynamic=False)

    def __call__(self, batch: Minibatch) -> Tensor:
        """Return the loss of a minibatch, a scalar."""
        if not isinstance(batch, LazyMinibatch):
            return self._of_tensors(batch)
        if batch.is_lazy:
            return self._of_storage(batch.storage, batch.indices)
        # What somebody wrote into its fields counts, and lazy fields cannot be compiled.
        return self._of_tensors(batch.materialize())
