"""The C functions of a normalization beside the plain loop that they equal (``csrc/reference.c``) and autograd."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents.backends.cpu_kernels import loader
from agents.backends.cpu_kernels.output_normalization import (
    BATCH,
    EXAMPLE,
    POSITION,
    RUNNING,
    NormalizationMemory,
    make_struct,
)
from agents.backends.cpu_kernels.structs import NormalizationStruct
from tests.kernel_stages import call
from wn_rl.parameterizations.base import Normalization
from wn_rl.parameterizations.batch_norm import Full, MeanOnly
from wn_rl.parameterizations.layer_norm import PerExample

LIBRARY = loader.load()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason="needs a C compiler")
KINDS = ("example", "units", "bn", "mean_only")
EPS, RATE = 1e-3, 0.3


@pytest.fixture(scope="module")
def reference() -> ctypes.CDLL:
    library = loader.build((loader.REFERENCE,))
    assert not isinstance(library, str), library
    return library


@dataclass
class Case:
    """A normalization of random sums; dense layers have one position and any number of units."""

    module: Normalization
    gain: Tensor
    t: Tensor
    dy: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))
    positions = draw(st.sampled_from([1, 2, 7, 81]))
    units = draw(st.sampled_from([16, 32, 48])) if positions > 1 else draw(st.integers(1, 40))
    batch = draw(st.integers(2 if kind == "bn" else 1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    # Numbers far from zero: what computes a variance as a difference of squares loses it.
    t = torch.randn(batch, positions, units, generator=generator) + draw(st.sampled_from([0.0, -3.0, 300.0]))
    gain = torch.rand(units, generator=generator) + 0.5
    bias, like = torch.nn.Parameter(torch.randn(units, generator=generator)), torch.zeros(1, requires_grad=True)
    module: Normalization
    if kind == "bn":
        module = Full(bias, 0, units, RATE, EPS, like)
    elif kind == "mean_only":
        module = MeanOnly(bias, 0, units, RATE, like)
    else:
        module = PerExample(bias, 2, units, EPS, kind, like)
    if isinstance(module, PerExample | Full):
        with torch.no_grad():
            module.gain.copy_(gain)
    else:
        gain = torch.ones(units)
    return Case(module, gain, t, torch.randn(t.shape, generator=generator))


def forward(library: ctypes.CDLL, struct: NormalizationStruct, t: Tensor, sums: Tensor | None) -> Tensor:
    """What the C functions make of sums, (batch, positions, units), bias aside."""
    batch, out = len(t), torch.empty_like(t)
    if struct.over == BATCH:
        assert sums is not None
        sums.copy_(t)
        for n in range(batch):
            call(library["observation_statistics"], struct, n)
        call(library["batch_statistics"], struct, batch, 0, struct.units)
    for n in range(batch):
        call(library["normalize"], struct, n, t[n], out[n])
    return out


@given(cases())
@settings(deadline=None, max_examples=150)
def test_forward_and_backward_are_the_plain_loop(reference: ctypes.CDLL, case: Case) -> None:
    assert not isinstance(LIBRARY, str)
    t, dy, gain = case.t, case.dy, case.gain
    batch, positions, units = t.shape
    struct = make_struct(case.module, positions, training=True)
    memory = NormalizationMemory.of(struct, batch)
    bias_gradient, gain_gradient = torch.empty(2, units)
    struct.bias_gradient, struct.gain_gradient = bias_gradient.data_ptr(), gain_gradient.data_ptr()
    y = forward(LIBRARY, struct, t, memory.sums)
    dt = torch.empty_like(t)
    for n in range(batch):
        call(LIBRARY["observation_gradients"], struct, n, dy[n])
    call(LIBRARY["unit_gradients"], struct, batch, 0, units)
    for n in range(batch):
        call(LIBRARY["sums_gradient"], struct, batch, n, dy[n], dt[n])

    groups = {BATCH: units, EXAMPLE: batch, POSITION: batch * positions}[struct.over]
    mean, variance = torch.empty(2, groups, dtype=torch.float64)
    x, expected_dt = torch.empty(2, *t.shape, dtype=torch.float64)
    db, dgain = torch.empty(2, units, dtype=torch.float64)
    sizes = (struct.over, struct.mean_only, batch, positions, units, float(struct.eps))
    arrays = (gain.double(), t.double(), dy.double(), mean, variance, x, expected_dt, db, dgain)
    call(reference["reference_normalization"], *sizes, *arrays, torch.empty(2 * groups, dtype=torch.float64))
    # A mean far from zero is rounded as it is, and every number behind it is off by as much.
    shift = 2e-7 * (1.0 + float(t.abs().max()))
    scale = 1.0 if struct.mean_only else float((variance + struct.eps).rsqrt().max())
    close = 1e-5 + 2 * shift * scale
    torch.testing.assert_close(memory.mean.double(), mean, rtol=1e-6, atol=1e-6)
    if struct.over == BATCH:
        atol = 1e-6 + 4 * shift * float(variance.max().sqrt())
        torch.testing.assert_close(memory.variance.double(), variance, rtol=1e-5, atol=atol)
    torch.testing.assert_close(y.double(), x * gain, rtol=close, atol=close)
    torch.testing.assert_close(bias_gradient.double(), db, rtol=1e-5, atol=1e-4)
    if not struct.mean_only:
        torch.testing.assert_close(gain_gradient.double(), dgain, rtol=1e-5, atol=batch * positions * close)
    torch.testing.assert_close(dt.double(), expected_dt, rtol=1e-4, atol=5 * close * scale)


@given(cases())
@settings(deadline=None, max_examples=100)
def test_the_plain_loop_is_the_module_and_its_gradients(reference: ctypes.CDLL, case: Case) -> None:
    """In float64, with the running statistics that the C functions make of the same numbers."""
    assert not isinstance(LIBRARY, str)
    batch, positions, units = case.t.shape
    struct = make_struct(case.module, positions, training=True)
    memory = NormalizationMemory.of(struct, batch)
    forward(LIBRARY, struct, case.t, memory.sums)
    if struct.over == BATCH:
        call(LIBRARY["update_running_statistics"], struct, batch)
    running = [buffer.clone() for buffer in case.module.buffers()]
    groups = {BATCH: units, EXAMPLE: batch, POSITION: batch * positions}[struct.over]
    mean, variance = torch.empty(2, groups, dtype=torch.float64)
    x, dt = torch.empty(2, *case.t.shape, dtype=torch.float64)
    db, dgain = torch.empty(2, units, dtype=torch.float64)
    sizes = (struct.over, struct.mean_only, batch, positions, units, float(struct.eps))
    arrays = (case.gain.double(), case.t.double(), case.dy.double(), mean, variance, x, dt, db, dgain)
    call(reference["reference_normalization"], *sizes, *arrays, torch.empty(2 * groups, dtype=torch.float64))

    module = case.module.double().train()
    for buffer, start in zip(module.buffers(), (0.0, 1.0), strict=False):
        buffer.fill_(start)
    t = case.t.double().requires_grad_()
    rows = t.flatten(0, 1) if struct.over == BATCH else t.transpose(1, 2)[..., None]
    y = module(rows)
    y = y.view_as(t) if struct.over == BATCH else y[..., 0].transpose(1, 2)
    (y * case.dy).sum().backward()
    assert module.bias is not None
    torch.testing.assert_close(y.detach(), x * case.gain + module.bias.detach())
    assert t.grad is not None
    torch.testing.assert_close(t.grad, dt, rtol=1e-6, atol=1e-9)
    assert module.bias.grad is not None
    torch.testing.assert_close(module.bias.grad, db)
    if isinstance(module, PerExample | Full):
        assert module.gain.grad is not None
        torch.testing.assert_close(module.gain.grad, dgain)
    for ours, theirs in zip(running, module.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_running_statistics_stand_in_for_those_of_a_minibatch(case: Case) -> None:
    """In evaluation mode, where nothing is kept, and the sums are normalized in place."""
    assert not isinstance(LIBRARY, str)
    struct = make_struct(case.module, case.t.shape[1], training=False)
    if struct.over != RUNNING:  # the same in both modes, but in place
        kept = make_struct(case.module, case.t.shape[1], training=True)
        memory = NormalizationMemory.of(kept, len(case.t))
        expected = forward(LIBRARY, kept, case.t, memory.sums)
    else:
        for buffer in case.module.buffers():
            buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(0)))
        assert case.module.bias is not None
        rows = case.module.eval()(case.t.flatten(0, 1)).detach() - case.module.bias.detach()
        expected = rows.view_as(case.t)
    found = case.t.clone()
    for n in range(len(found)):
        call(LIBRARY["normalize"], struct, n, found[n], found[n])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * (1.0 + float(case.t.abs().max())))
