"""Work of the device that is recorded once as a CUDA graph and replayed from then on.

The pieces of work are ordinary functions. :class:`Repeated` runs them as they are where there is no recorder, so that a
CPU can test everything but CUDA's own recording.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from wn_rl.errors import one_line

WARM_UPS = 3
"""Times that a piece of work is done as it is before it is recorded: libraries choose and allocate in the first ones
what must not be chosen or allocated while recording. torch's documentation takes as many."""

Work = Callable[[], None]
_FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording failed: torch's allocator goes on asking them whether memory is theirs."""


class Recorder(Protocol):
    """Records device work."""

    def warm_up(self, work: Work) -> None:
        """Do the work where it will be recorded."""

    def record(self, work: Work, generators: Sequence[torch.Generator]) -> Work:
        """Return what does the work again, without doing it now.

        Args:
            work: gives kernels to the device and reads nothing back.
            generators: that it draws from; each goes on from wherever it is at every repetition.

        Raises:
            RuntimeError: it cannot be recorded. Nothing was done and everything is as it was before.
        """


class CudaRecorder:
    """Records work of the current GPU as CUDA graphs.

    Warm-ups and recordings share one stream that is not the default one: recording is not allowed there, and handles
    that libraries make for each stream are then ready.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Work) -> None:
        """Do the work on the recording stream, in order with what comes before and after on the current one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work, generators: Sequence[torch.Generator]) -> Work:
        """Return the replay of a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        touched = [*generators, *torch.cuda.default_generators]  # torch registers the default one by itself
        states = [generator.get_state() for generator in touched]
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                work()
        except Exception:
            # torch leaves its stream current when the end of a recording fails, and a generator waiting for that end.
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
    """A piece of device work that is done many times: a few times as it is, then recorded, then as recorded."""

    def __init__(
        self, name: str, work: Work, recorder: Recorder | None, generators: Sequence[torch.Generator] = ()
    ) -> None:
        """Prepare; the first calls do the work as it is.

        Args:
            name: for the message if it cannot be recorded.
            work: gives kernels to the device and reads nothing back; what it leaves is in tensors that keep their
                place.
            recorder: None: always do the work as it is.
            generators: that it draws from.
        """
        self.name = name
        self._work = work
        self._recorder = recorder
        self._generators = generators
        self._warm_ups = 0
        self._again: Work | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next call does what was recorded."""
        return self._again is not None

    def __call__(self) -> None:
        """Do the work in the quickest way that there is by now."""
        if self._again is None and self._recorder is not None:
            if self._warm_ups < WARM_UPS:
                self._warm_ups += 1
                self._recorder.warm_up(self._work)
                return
            self._record(self._recorder)
        (self._again or self._work)()

    def as_it_is(self) -> None:
        """Do the work without what was recorded."""
        self._work()

    def _record(self, recorder: Recorder) -> None:
        try:
            self._again = recorder.record(self._work, self._generators)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the first thing that went wrong; the rest follows from it
                cause = cause.__context__
            print(
                f"{self.name} cannot be recorded as a CUDA graph and runs slower: {one_line(cause)[:200]}",
                file=sys.stderr,
            )
            self._recorder = None
