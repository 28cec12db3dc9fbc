"""Which vectors the kernels are compiled for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from agents.backends.cpu_kernels import loader
from wn_rl.errors import UsageError

pytestmark = pytest.mark.skipif(loader.compiler() is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    loader.load.cache_clear()
    yield
    loader.load.cache_clear()


def test_the_environment_chooses_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "avx2")
    library = loader.load()
    if isinstance(library, str):
        pytest.skip(library)
    asked = loader.load(vectors="avx2")
    assert not isinstance(asked, str)
    assert library._name == asked._name
    assert loader.supports(library, torch.float32)
    assert not loader.supports(library, torch.bfloat16)  # whatever this processor has
    loader.load.cache_clear()
    monkeypatch.delenv(loader.VARIABLE)
    native = loader.load()
    assert not isinstance(native, str)
    assert native._name != library._name


def test_vectors_that_there_are_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "mmx")
    with pytest.raises(UsageError, match="WN_RL_KERNELS is 'mmx'; it can be native, avx512, avx2, sse2"):
        loader.load()


def test_vectors_that_the_processor_does_not_have_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "processor", lambda: "flags : fpu sse2 avx avx2 fma")
    assert loader.load(vectors="avx512") == "WN_RL_KERNELS is avx512, which the processor does not have"
    assert loader.load(vectors="avx2") != "WN_RL_KERNELS is avx2, which the processor does not have"
