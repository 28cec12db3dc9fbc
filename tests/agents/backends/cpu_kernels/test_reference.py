"""Each C kernel beside the plain loop that it equals, ``csrc/reference.c``, stage by stage on the kernel's own inputs.

In float32 the loops add in the kernels' order, so most stages agree bit for bit. In bfloat16 pairs are added at once
and results are rounded to 8 bits, so they agree within that. ``transpose_16x16`` and the packing and unpacking of words
are part of stages that agree bit for bit.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents.backends.cpu_kernels import loader
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.structs import ReplayStorage, TDLossArgs
from tests.kernel_networks import mostly_black, networks
from tests.kernel_stages import call, check_each_stage
from wn_rl.networks import QNetworkSpec, build_q_network

pytestmark = pytest.mark.skipif(loader.compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def reference(precision: torch.dtype) -> ctypes.CDLL:
    library = loader.build((loader.REFERENCE,))
    assert not isinstance(library, str), library
    return library


@given(spec=networks(), batch=st.integers(1, 9), seed=st.integers(0, 1000), lit=st.sampled_from([1.0, 0.3, 0.05]))
@settings(deadline=None, max_examples=25)
def test_each_stage_of_an_update_is_its_plain_loop(
    reference: ctypes.CDLL, precision: torch.dtype, spec: QNetworkSpec, batch: int, seed: int, lit: float
) -> None:
    library, generator = loader.load(), torch.Generator().manual_seed(seed)
    assert not isinstance(library, str)
    kernels = KernelNetwork(build_q_network(spec, seed=seed), library, precision=precision)
    frames = mostly_black((2 * batch, *spec.observation_shape), lit, generator)
    check_each_stage(reference, kernels, frames, torch.randn(batch, spec.num_actions, generator=generator))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10_000), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=30)
def test_td_loss_is_its_plain_loop(
    reference: ctypes.CDLL, batch: int, actions: int, seed: int, mean: bool, reward_clip: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_values, next_q_values = 2 * torch.randn(2, batch, actions, generator=generator)
    taken = torch.randint(actions, (batch,), generator=generator)
    rewards = torch.randint(-3, 4, (batch,), generator=generator).float() / 2
    terminals = torch.rand(batch, generator=generator) < 0.3
    q_gradient, sums = torch.empty(batch, actions), torch.zeros(3, dtype=torch.float64)
    arrays = (None, *(tensor.data_ptr() for tensor in (taken, rewards, terminals, q_gradient, sums)), None)
    loss = TDLossArgs(*arrays, 0.9, reward_clip, mean, 0)
    library: Any = loader.load()
    library.td_loss.restype = ctypes.c_float
    pointers = (ctypes.c_void_p(q_values.data_ptr()), ctypes.c_void_p(next_q_values.data_ptr()))
    found = library.td_loss(ctypes.byref(loss), ctypes.c_int64(batch), ctypes.c_int64(actions), *pointers)
    results, expected = torch.empty(3, batch, dtype=torch.float64), torch.zeros(batch, actions)
    for n in range(batch):
        transition = (int(taken[n]), float(rewards[n]), int(terminals[n]), 0.9, reward_clip)
        rows = (q_values[n], next_q_values[n])
        call(reference.reference_td_loss, actions, *rows, *transition, *results[:, n].split(1))
        expected[n, taken[n]] = results[2, n] / (batch if mean else 1)
    torch.testing.assert_close(q_gradient, expected, rtol=1e-5, atol=1e-6)
    assert found == pytest.approx(float(results[1].mean() if mean else results[1].sum()), rel=1e-5, abs=1e-6)
    value = q_values.gather(1, taken[:, None]).mean()
    assert sums.tolist() == pytest.approx(
        [float(results[1].mean()), float(results[0].abs().mean()), float(value)], 1e-4, 1e-5
    )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_gathered_transitions_are_those_of_the_plain_loop(
    reference: ctypes.CDLL, num_envs: int, frames: int, seed: int
) -> None:
    library: Any = loader.load()
    generator = np.random.default_rng(seed)
    capacity, batch = num_envs * int(generator.integers(frames + 1, 9)), 7
    entry_of = torch.from_numpy(generator.permutation(capacity))
    age, actions, terminals = (
        torch.from_numpy(generator.integers(0, top, capacity, dtype=np.uint8)) for top in (frames + 1, 5, 2)
    )
    rewards = torch.from_numpy(generator.standard_normal(capacity, dtype=np.float32))
    arrays = (entry_of, age, actions, terminals, rewards)
    replay = ReplayStorage(*(tensor.data_ptr() for tensor in arrays), capacity, num_envs, frames)
    indices = torch.from_numpy(generator.integers(0, 3 * capacity, batch))
    frame_indices = torch.empty(batch, frames + 1, dtype=torch.int64)
    taken, got = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    ends = torch.empty(batch, dtype=torch.uint8)
    loss = TDLossArgs(*(tensor.data_ptr() for tensor in (frame_indices, taken, got, ends)))
    call(library.gather_transitions, replay, indices, batch, loss)
    expected = torch.empty_like(frame_indices)
    for n in range(batch):
        call(reference.reference_frame_indices, replay, int(indices[n]), expected[n])
    assert torch.equal(frame_indices, expected)
    entries = entry_of[indices % capacity]
    assert torch.equal(taken, actions[entries].long())
    assert torch.equal(got, rewards[entries])
    assert torch.equal(ends, terminals[entries])

    library.validate_indices.restype = ctypes.c_int

    def valid(wanted: Tensor, num_actions: int) -> bool:
        pointers = (ctypes.byref(replay), ctypes.c_void_p(wanted.data_ptr()), ctypes.c_int64(batch))
        return bool(library.validate_indices(*pointers, ctypes.byref(loss), ctypes.c_int64(num_actions)))

    assert valid(indices, 5)
    assert valid(indices, int(taken.max()) + 1)
    assert not valid(indices, int(taken.max()))
    indices[3] = -1
    assert not valid(indices, 5)
