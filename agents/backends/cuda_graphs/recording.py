"""Device work that is captured once as a CUDA graph and replayed from then on.

The work is ordinary functions. Without a recorder :class:`Repeated` calls them directly, so that everything but CUDA's
own capture can be tested on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from wn_rl.errors import one_line

WARM_UPS = 3
"""Direct calls before the capture: in the first calls libraries choose algorithms and allocate memory, which they must
not do during a capture. torch's documentation recommends as many."""

Work = Callable[[], None]
_FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed; torch's allocator still refers to them, so they must stay alive."""


class Recorder(Protocol):
    """Captures device work."""

    def warm_up(self, work: Work) -> None:
        """Do the work where it will be captured."""

    def record(self, work: Work, generators: Sequence[torch.Generator]) -> Work:
        """Return a function that does the work again; it is not done now.

        Args:
            work: launches kernels and reads nothing back.
            generators: the random generators that it uses; each replay continues from their present state.

        Raises:
            RuntimeError: it cannot be captured. Nothing was done and everything is unchanged.
        """


class CudaRecorder:
    """Captures work of the current GPU as CUDA graphs.

    Warm-ups and captures share one stream other than the default one, on which capture is not allowed; handles that
    libraries create for each stream then exist already.
    """

    def __init__(self, device: torch.device) -> None:
        """Create the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Work) -> None:
        """Do the work on the capture stream, in order with the work before and after it on the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work, generators: Sequence[torch.Generator]) -> Work:
        """Return the replay of a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        touched = [*generators, *torch.cuda.default_generators]  # torch registers the default one itself
        states = [generator.get_state() for generator in touched]
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                work()
        except Exception:
            # If the end of a capture fails, torch leaves its stream current and the generators in capture mode.
            _FAILED.append(graph)
            torch.cuda.set_stream(current)
            for generator, state in zip(touched, states, strict=True):
                fresh = torch.Generator(generator.device)
                fresh.set_state(state)
                generator.graphsafe_set_state(fresh)
            raise
        replay: Work = graph.replay
        return replay


class Repeated:
    """Device work that is done many times: a few times directly, then captured, then replayed."""

    def __init__(
        self, name: str, work: Work, recorder: Recorder | None, generators: Sequence[torch.Generator] = ()
    ) -> None:
        """Prepare; the first calls do the work directly.

        Args:
            name: for the message if it cannot be captured.
            work: launches kernels and reads nothing back; its results are in tensors with fixed addresses.
            recorder: None: always do the work directly.
            generators: the random generators that it uses.
        """
        self.name = name
        self._work = work
        self._recorder = recorder
        self._generators = generators
        self._warm_ups = 0
        self._again: Work | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next call replays the captured graph."""
        return self._again is not None

    def __call__(self) -> None:
        """Do the work: directly, or by replaying the graph."""
        if self._again is None and self._recorder is not None:
            if self._warm_ups < WARM_UPS:
                self._warm_ups += 1
                self._recorder.warm_up(self._work)
                return
            self._record(self._recorder)
        (self._again or self._work)()

    def run_directly(self) -> None:
        """Do the work without the graph."""
        self._work()

    def _record(self, recorder: Recorder) -> None:
        try:
            self._again = recorder.record(self._work, self._generators)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the first error; the others follow from it
                cause = cause.__context__
            print(
                f"{self.name} cannot be captured as a CUDA graph and runs slower: {one_line(cause)[:200]}",
                file=sys.stderr,
            )
            self._recorder = None
