"""Which tests need the compiled passes, and so a compiler and, for bfloat16, a processor with AVX512-BF16."""

from __future__ import annotations

import pytest
import torch

from agents.backends.cpu_kernels import loader


def needs_passes(precision: str) -> pytest.MarkDecorator:
    """Skip where there are no compiled passes for ``float32`` or ``bfloat16``."""
    library = loader.load()
    return pytest.mark.skipif(
        isinstance(library, str) or not loader.supports(library, getattr(torch, precision)),
        reason=f"no compiler, or no vectors for {precision}",
    )
