"""The loss of an update through torch.compile: a few kernels made for it in place of many general ones.

As it is, an update asks the device for more than a hundred small operations, three times as many as are left
(``tests/agents/test_compiled.py`` counts them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wn_rl.replay import DrawnMinibatch, Entries, Minibatch


class CompiledLoss:
    """Computes the same as ``plain`` but for rounding; what was drawn is looked up in the same kernels.

    The first call compiles, for each size of a minibatch anew; so does the first gradient of what it returns. torch
    compiles the same code eight times in a process, so for eight agents, and then raises.
    """

    def __init__(self, plain: Callable[[Minibatch], Tensor]) -> None:
        """Prepare.

        Args:
            plain: returns the loss of a minibatch, a scalar, and may change tensors where they are.
        """

        def of_drawn(kept: Entries, numbers: Tensor) -> Tensor:
            return plain(kept.minibatch(numbers))

        # A whole graph or an error: with Python in between most of what it is for is lost.
        self._of_drawn = torch.compile(of_drawn, fullgraph=True, dynamic=False)
        self._of_given = torch.compile(plain, fullgraph=True, dynamic=False)

    def __call__(self, batch: Minibatch) -> Tensor:
        """Return the loss of a minibatch, a scalar."""
        if not isinstance(batch, DrawnMinibatch):
            return self._of_given(batch)
        if batch.untouched:
            return self._of_drawn(batch.kept, batch.numbers)
        # What somebody wrote into its fields counts, and looking up on demand cannot be compiled.
        return self._of_given(batch.looked_up())
