"""The builds of the kernels that these tests run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from agents.backends.cpu_kernels import loader

BUILDS = (
    ("native", "float32"),
    ("native", "bfloat16"),
    ("tiles", "bfloat16"),
    ("avx2", "float32"),
    ("sse2", "float32"),
)
"""Vectors (:data:`loader.VECTORS`) and precision. Narrower ones than the processor's have no bfloat16."""
if "amx_bf16" in loader.processor().split():  # there "native" uses the tile unit
    BUILDS += (("no_tiles", "bfloat16"),)


@pytest.fixture(
    scope="module",
    params=[pytest.param(build, marks=pytest.mark.slow if build[0] == "sse2" else ()) for build in BUILDS],
    ids=["-".join(build) for build in BUILDS],
)
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The precision of a build; meanwhile everything takes the kernels from that build."""
    vectors, name = request.param
    dtype: torch.dtype = getattr(torch, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(loader.VARIABLE, vectors)
        loader.load.cache_clear()
        library = loader.load()
        if isinstance(library, str):
            pytest.skip(library)
        if not loader.supports(library, dtype):
            pytest.skip(f"no vectors for {name}")
        yield dtype
    loader.load.cache_clear()
