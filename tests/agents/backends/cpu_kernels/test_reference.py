"""Each C kernel beside the plain loop that it equals, ``csrc/reference.c``, stage by stage on the kernel's own inputs.

In float32 the loops add in the kernels' order, so most stages agree bit for bit. In bfloat16 pairs are added at once
and results are rounded to 8 bits, so they agree within that. ``transpose_16x16`` and the packing and unpacking of words
are part of stages that agree bit for bit.
"""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents.backends.cpu_kernels import layouts, loader
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.packed_network import channels_last
from agents.backends.cpu_kernels.structs import ReplayStorage, TDLossArgs, WeightKind
from tests.kernel_networks import fused_adamax, mostly_black, networks
from tests.vectors import needs_passes
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.parameterizations import fold
from wn_rl.replay import Minibatch

pytestmark = pytest.mark.skipif(loader.compiler() is None, reason="needs a C compiler")
PRECISIONS = [pytest.param(getattr(torch, name), marks=needs_passes(name), id=name) for name in ("float32", "bfloat16")]
STEP_SIZE, BETAS, EPS = 0.01, (0.9, 0.99), 0.05
"""So large an ε that a step is no sign of a gradient, which rounding may change."""


@pytest.fixture(scope="module")
def reference() -> ctypes.CDLL:
    library = loader.build((loader.REFERENCE,))
    assert not isinstance(library, str), library
    return library


def call(function: Any, *arguments: Any) -> None:
    """Call a C function: tensors by address, integers as int64, floats as double, structures by reference."""
    converted = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, ctypes.Structure):
            converted.append(ctypes.byref(argument))
        else:
            kind = ctypes.c_double if isinstance(argument, float) else ctypes.c_int64
            converted.append(argument if argument is None else kind(argument))
    function.restype = None
    function(*converted)


def unpaired(words: Tensor, batch: int, precision: torch.dtype) -> Tensor:
    """Words (groups, n) that pair observations as float32 (batch, n)."""
    elements = words.view(precision).view(*words.shape, -1)
    return elements.transpose(1, 2).flatten(0, 1)[:batch].float().contiguous()


def conv_weight(packed: Tensor, units: int, precision: torch.dtype) -> Tensor:
    """A packed convolution's weight as float32 (kernel · kernel · in_channels, units)."""
    pair = layouts.pair_size(precision)
    return packed.view(-1, units, pair).transpose(1, 2).reshape(-1, units).float().contiguous()


def assert_stage(name: str, found: Tensor, expected: Tensor, precision: torch.dtype, exact: bool = True) -> None:
    """Equal in float32, to the last bit but for the sign of a zero where ``exact``; within rounding in bfloat16."""
    found, expected = found.float().flatten(), expected.flatten()
    if precision is torch.float32 and exact:
        assert torch.equal(found, expected), name
        return
    scale = float(expected.abs().max()) + 1e-30
    relative, absolute = (1e-5, 1e-5) if precision is torch.float32 else (2**-8, 2e-5)
    assert bool(((found - expected).abs() <= relative * expected.abs() + absolute * scale).all()), name


@pytest.mark.parametrize("precision", PRECISIONS)
@given(spec=networks(), batch=st.integers(1, 9), seed=st.integers(0, 1000), lit=st.sampled_from([1.0, 0.3, 0.05]))
@settings(deadline=None, max_examples=25)
def test_each_stage_of_an_update_is_its_plain_loop(
    reference: ctypes.CDLL, precision: torch.dtype, spec: QNetworkSpec, batch: int, seed: int, lit: float
) -> None:
    library, generator = loader.load(), torch.Generator().manual_seed(seed)
    assert not isinstance(library, str)
    network = build_q_network(spec, seed=seed)
    kernels = KernelNetwork(network, library, precision=precision)
    optimizer = fused_adamax(kernels, STEP_SIZE * (1 - BETAS[0]), BETAS, EPS)
    kernels.refresh()
    frames = mostly_black((2 * batch, *spec.observation_shape), lit, generator)
    zeros = torch.zeros(batch)
    minibatch = Minibatch(frames[:batch], zeros, zeros, frames[batch:], zeros)
    target = kernels.pack_network(fold(copy.deepcopy(network)))
    _, q_values, saved_pass = kernels.forward_both(target, minibatch)
    weights = [
        conv_weight(packed, conv.out_channels, precision).clone()  # the step writes the next
        for packed, conv in zip(kernels.packed.weights, kernels.convolutions, strict=False)
    ]
    hidden_weight, output_weight = (weight.float().clone() for weight in kernels.packed.weights[-2:])
    biases = [bias.detach().clone() for bias in kernels.packed.biases]
    activations = kernels.workspace.activations_for(batch, True)

    # Forward: frames, convolutions, hidden layer, Q-values.
    convs, (count, height, width) = kernels.convolutions, spec.observation_shape
    blocks = torch.empty(batch, convs[0].in_height, convs[0].in_width, convs[0].in_channels)
    call(reference.reference_pack_frames, minibatch.observations, batch, count, height, width, kernels.block, blocks)
    nonzero = torch.empty(batch, convs[0].in_height, dtype=torch.int64)
    call(reference.reference_nonzero_blocks, convs[0], batch, blocks, nonzero)
    if kernels.pair == 2:  # a pair of observations shares a mask
        even, odd = nonzero[::2].clone(), nonzero[1::2]
        even[: len(odd)] |= odd
        assert torch.equal(activations.nonzero_blocks, even)
    else:
        assert torch.equal(activations.nonzero_blocks, nonzero)
    shapes = [(batch, conv.in_height, conv.in_width, conv.in_channels) for conv in convs]
    inputs = [
        unpaired(words, batch, precision).view(shape)
        for words, shape in zip(activations.saved_inputs, shapes, strict=False)
    ]
    inputs[0] = torch.where((blocks != 0).any(3, keepdim=True), inputs[0], 0.0)  # others are not written
    assert torch.equal(inputs[0], blocks)
    flat = activations.flat.float()
    for index, conv in enumerate(convs):
        out = torch.empty(batch, conv.out_height, conv.out_width, conv.out_channels)
        call(reference.reference_conv_forward, conv, batch, inputs[index], weights[index], biases[index], out)
        last = index == len(convs) - 1
        assert_stage(f"conv_forward {index}", flat if last else inputs[index + 1], to_flat(out, last), precision)
    assert torch.equal(unpaired(activations.saved_inputs[-1], batch, precision) if kernels.pair == 2 else flat, flat)
    hidden, expected_q = torch.empty(batch, spec.hidden_units), torch.empty(batch, spec.num_actions)
    sizes = (batch, kernels.shape.flat, spec.hidden_units)
    call(reference.reference_dense_forward, *sizes, flat, hidden_weight, biases[-2], 1, hidden)
    torch.testing.assert_close(activations.hidden, hidden, rtol=1e-5, atol=1e-5 * float(hidden.max()) + 1e-30)
    hidden = activations.hidden
    output_sizes = (batch, spec.hidden_units, spec.num_actions)
    call(reference.reference_dense_forward, *output_sizes, hidden, output_weight, biases[-1], 0, expected_q)
    torch.testing.assert_close(q_values, expected_q, rtol=1e-5, atol=1e-5 * float(expected_q.abs().max()))

    # Backward, and the step.
    before = {id(p): p.detach().clone() for p in network.parameters()}
    q_gradient = torch.randn(batch, spec.num_actions, generator=generator)
    kernels.backward(saved_pass, q_gradient)
    optimizer.step()
    gradients = kernels.workspace.gradients
    assert gradients is not None
    expected = torch.empty_like(hidden)
    call(reference.reference_dense_input_backward, *output_sizes, q_gradient, output_weight, hidden, expected)
    assert_stage("hidden_backward", gradients.hidden, expected, precision)
    hidden_gradient = gradients.hidden.float()
    assert torch.equal(unpaired(gradients.hidden_pairs, batch, precision), hidden_gradient)
    expected = torch.empty_like(flat)
    call(reference.reference_dense_input_backward, *sizes, hidden_gradient, hidden_weight, None, expected)
    assert_stage("flat_backward", gradients.flat, expected, precision)
    dys = [
        unpaired(words, batch, precision).view(batch, conv.out_height, conv.out_width, conv.out_channels)
        for words, conv in zip(gradients.convolutions, convs, strict=True)
    ]
    assert_stage("ReLU", to_flat(dys[-1], True), torch.where(flat != 0, gradients.flat, 0.0), precision)
    weight_gradients = []
    for index, conv in reversed(list(enumerate(convs))):
        if index:
            expected = torch.empty_like(inputs[index])
            arrays = (dys[index], weights[index], inputs[index], expected)
            call(reference.reference_conv_input_backward, conv, batch, *arrays)
            assert_stage(f"conv_input_backward {index}", dys[index - 1], expected, precision)
        dw, db = torch.empty_like(weights[index]), torch.empty(conv.out_channels)
        call(reference.reference_conv_weight_backward, conv, batch, dys[index], inputs[index], dw, db)
        found = kernels._weight_gradients[index]
        assert found is not None
        assert_stage(f"conv_weight_backward {index}", found, dw, precision)
        assert_stage(f"its bias {index}", kernels._bias_gradients[index], db, precision)
        weight_gradients.insert(0, dw.t())
    for sizes_, dy, x in ((sizes, hidden_gradient, flat), (output_sizes, q_gradient, hidden)):
        dw, db = torch.empty(sizes_[2], sizes_[1]), torch.empty(sizes_[2])
        call(reference.reference_dense_weight_backward, *sizes_, dy, x, dw, db)
        weight_gradients.append(dw)
        index = len(weight_gradients) - 1
        torch.testing.assert_close(kernels._bias_gradients[index], db, rtol=1e-5, atol=1e-5)
    check_step(reference, kernels, weight_gradients, before)


def to_flat(out: Tensor, last: bool) -> Tensor:
    """Channels-last output as it is, or in the order (channel, position) of the hidden layer's input."""
    return out.permute(0, 3, 1, 2).flatten(1).contiguous() if last else out


def check_step(
    reference: ctypes.CDLL, kernels: KernelNetwork, weight_gradients: list[Tensor], before: dict[int, Tensor]
) -> None:
    """The parameters after the first step, unit by unit, and the packed weights made of them."""
    for index, (layer, dw) in enumerate(zip(kernels.layers, weight_gradients, strict=True)):
        inputs = layer.v[0].numel()
        order = torch.arange(inputs)
        if isinstance(layer.module, torch.nn.Conv2d):  # of (kernel, kernel, channels) in v
            order = channels_last(layer.module, torch.arange(inputs).view(1, *layer.v.shape[1:])).flatten()
        gradient = torch.empty(len(dw), inputs, dtype=torch.float64)
        gradient[:, order] = dw.double() * layer.input_scale
        v = before[id(layer.v)].double().view(len(dw), -1).clone()
        g = None if layer.g is None else before[id(layer.g)].double().view(-1).clone()
        if layer.kind in (WeightKind.PLAIN, WeightKind.NORM):
            moments = torch.zeros(2, inputs + 1, dtype=torch.float64)
            for unit in range(len(v)):
                scale = None if g is None else g[unit]
                moments.zero_()
                arrays = (gradient[unit], v[unit], scale, moments[0], moments[1])
                call(reference.reference_step, inputs, *arrays, STEP_SIZE, *BETAS, EPS)
        else:
            v, g = step_by_autograd(layer.kind, v, g, gradient)
        close = {"rtol": 0.0, "atol": 1e-3 * STEP_SIZE}
        torch.testing.assert_close(layer.v.detach().double().view_as(v), v, **close)
        if layer.g is not None and g is not None:
            torch.testing.assert_close(layer.g.detach().double().view_as(g), g, **close)
        # The packed weight is that of the parameters as they now are.
        v = layer.v.detach().view(len(v), -1)
        w = weight_of(layer.kind, v, None if layer.g is None else layer.g.detach().flatten())
        packed = kernels.packed.weights[index]
        if index < len(kernels.convolutions):
            found = conv_weight(packed, len(v), kernels.precision).t()
        else:
            found = packed.float()
        tolerance = 2**-8 if packed.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, (w * layer.input_scale)[:, order], rtol=tolerance, atol=1e-7)


def weight_of(kind: WeightKind, v: Tensor, g: Tensor | None) -> Tensor:
    """w, (units, inputs), as csrc/structs.h says it of each kind."""
    if g is None:
        return v
    g = g.exp() if kind is WeightKind.NORM_EXP else g
    return g[:, None] * (v if kind is WeightKind.UNIT_SCALED else v / v.norm(dim=1, keepdim=True))


def step_by_autograd(kind: WeightKind, v: Tensor, g: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """Adamax's first step of v and g in float64, given dL/dw, and the projection that some kinds make after it."""
    trained = [tensor.requires_grad_() for tensor in (v, g) if tensor is not None]
    (weight_of(kind, *trained, *[None] * (2 - len(trained))) * gradient).sum().backward()
    with torch.no_grad():
        for tensor in trained:
            assert tensor.grad is not None
            tensor -= STEP_SIZE * (1 - BETAS[0]) * tensor.grad / (tensor.grad.abs() + EPS)
        if kind in (WeightKind.UNIT, WeightKind.UNIT_SCALED):
            v /= v.norm(dim=1, keepdim=True)
    return v.detach(), None if g is None else g.detach()


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10_000), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=30)
def test_td_loss_is_its_plain_loop(
    reference: ctypes.CDLL, batch: int, actions: int, seed: int, mean: bool, reward_clip: float
) -> None:
    if not loader.supports(loader.load(), torch.float32):  # type: ignore[arg-type]
        pytest.skip("no vectors of 512 bits")
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
