"""Each stage of an update by C kernels beside the plain loop that it equals, on the stage's own inputs."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agents.backends.cpu_kernels import layouts
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.packed_network import channels_last
from agents.backends.cpu_kernels.structs import WeightKind
from tests.kernel_networks import fused_adamax
from wn_rl.parameterizations import fold
from wn_rl.replay import Minibatch

STEP_SIZE, BETAS, EPS = 0.01, (0.9, 0.99), 0.05
"""So large an ε that a step is no sign of a gradient, which rounding may change."""


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


Compare = Callable[[str, Tensor, Tensor, torch.dtype], None]


def check_each_stage(
    reference: ctypes.CDLL, kernels: KernelNetwork, frames: Tensor, q_gradient: Tensor, compare: Compare = assert_stage
) -> None:
    """Make an update and compare every stage with its plain loop.

    Args:
        reference: what is made of ``csrc/reference.c``.
        kernels: a network that has not been stepped.
        frames: uint8, the observations, then as many next observations.
        q_gradient: float32 (observations, actions): dL/dQ.
        compare: takes a stage's name, its result, the plain loop's and the precision.
    """
    optimizer = fused_adamax(kernels, STEP_SIZE * (1 - BETAS[0]), BETAS, EPS)
    kernels.refresh()
    network, spec, precision, batch = kernels.network, kernels.network.spec, kernels.precision, len(q_gradient)
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
        compare(f"conv_forward {index}", flat if last else inputs[index + 1], to_flat(out, last), precision)
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
    kernels.backward(saved_pass, q_gradient)
    optimizer.step()
    gradients = kernels.workspace.gradients
    assert gradients is not None
    expected = torch.empty_like(hidden)
    call(reference.reference_dense_input_backward, *output_sizes, q_gradient, output_weight, hidden, expected)
    compare("hidden_backward", gradients.hidden, expected, precision)
    hidden_gradient = gradients.hidden.float()
    assert torch.equal(unpaired(gradients.hidden_pairs, batch, precision), hidden_gradient)
    expected = torch.empty_like(flat)
    call(reference.reference_dense_input_backward, *sizes, hidden_gradient, hidden_weight, None, expected)
    compare("flat_backward", gradients.flat, expected, precision)
    dys = [
        unpaired(words, batch, precision).view(batch, conv.out_height, conv.out_width, conv.out_channels)
        for words, conv in zip(gradients.convolutions, convs, strict=True)
    ]
    compare("ReLU", to_flat(dys[-1], True), torch.where(flat != 0, gradients.flat, 0.0), precision)
    weight_gradients = []
    for index, conv in reversed(list(enumerate(convs))):
        if index:
            expected = torch.empty_like(inputs[index])
            arrays = (dys[index], weights[index], inputs[index], expected)
            call(reference.reference_conv_input_backward, conv, batch, *arrays)
            compare(f"conv_input_backward {index}", dys[index - 1], expected, precision)
        dw, db = torch.empty_like(weights[index]), torch.empty(conv.out_channels)
        call(reference.reference_conv_weight_backward, conv, batch, dys[index], inputs[index], dw, db)
        found = kernels._weight_gradients[index]
        assert found is not None
        compare(f"conv_weight_backward {index}", found, dw, precision)
        compare(f"its bias {index}", kernels._bias_gradients[index], db, precision)
        weight_gradients.insert(0, dw.t())
    for sizes_, dy, x in ((sizes, hidden_gradient, flat), (output_sizes, q_gradient, hidden)):
        dw, db = torch.empty(sizes_[2], sizes_[1]), torch.empty(sizes_[2])
        call(reference.reference_dense_weight_backward, *sizes_, dy, x, dw, db)
        weight_gradients.append(dw)
        index = len(weight_gradients) - 1
        torch.testing.assert_close(kernels._bias_gradients[index], db, rtol=1e-5, atol=1e-5)
    hidden_layer = kernels.layers[-2]
    if hidden_layer.kind is WeightKind.PLAIN:  # the step makes its gradient and keeps of it the first moment only
        moment, dw = optimizer.moments(hidden_layer.v)[0], (1 - BETAS[0]) * weight_gradients[-2]  # type: ignore[arg-type]
        torch.testing.assert_close(moment, dw, rtol=1e-5, atol=1e-6 * float(dw.abs().max()))
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
