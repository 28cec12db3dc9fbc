"""The compiled passes against torch's operations: values, gradients and steps, for shapes of every kind."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from agents.backends.cpu_kernels import layouts, loader
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.optimizers import FusedAdamax
from agents.backends.cpu_kernels.output_normalization import normalization_of
from agents.backends.cpu_kernels.packed_network import PackedNetwork
from agents.backends.cpu_kernels.workspace import MAX_CACHED_SIZES
from tests.carried import Carried, carried
from tests.kernel_networks import LAYERS, NORMALIZED, fused_adamax, mostly_black, networks, packed_target
from wn_rl.config import TrainConfig, load, resolve
from wn_rl.errors import NonFiniteLossError
from wn_rl.networks import QNetwork, QNetworkSpec, build_q_network
from wn_rl.parameterizations import fold
from wn_rl.parameterizations.base import bias_of, parameterization_of
from wn_rl.parameterizations.batch_norm import Full, MeanOnly, WeightNormalizationWithMeanOnly
from wn_rl.parameterizations.layer_norm import PerExample
from wn_rl.parameterizations.projected import ProjectedWeights
from wn_rl.parameterizations.weight_norm import WeightNormalization, direction_and_scale
from wn_rl.replay import LazyMinibatch, Minibatch, Replay

CPU = torch.device("cpu")


def units_on(compiled: KernelNetwork, batch: int) -> list[Tensor]:
    """Which units of each hidden layer were not at rest in the latest pass that a step can follow: bool, by layer."""
    room = compiled.workspace.activations_for(batch, True)
    found = []
    for conv, words in zip(compiled.convolutions, room.saved_inputs[1:-1], strict=False):
        # (groups, pixels, units, observations of a group)
        values = words.view(compiled.precision).view(len(words), conv.out_height, conv.out_width, conv.out_channels, -1)
        found.append(values.permute(0, 4, 3, 1, 2).flatten(0, 1)[:batch] != 0)
    last = compiled.convolutions[-1]
    return [*found, room.flat.view(batch, last.out_channels, last.out_height, last.out_width) != 0, room.hidden != 0]


def by_hand(
    network: QNetwork,
    observations: Tensor,
    precision: torch.dtype,
    on: list[Tensor] | None = None,
    training: bool = False,
) -> tuple[Tensor, float]:
    """Q-values in float64 where only weights and what a layer sees are rounded, and how large the sums of sizes are.

    Derivatives pass the rounding as if it were not there. Where a sum is nearly zero, rounding alone may say whether
    the unit is at rest, and the derivative jumps: ``on`` says how it was taken, and may say so nowhere else.
    With ``training`` batch statistics are those of the observations.
    """
    taken = iter(on or [])

    def relu(x: Tensor) -> Tensor:
        mask = next(taken) if on is not None else x > 0
        otherwise = x.detach()[mask != (x > 0)].abs()
        assert bool((otherwise < (1e-5 if precision is torch.float32 else 3e-3) * x.detach().abs().max()).all())
        return x * mask

    def low(x: Tensor) -> Tensor:
        return x + (x.to(precision).double() - x).detach()

    def weight_of(layer: nn.Module) -> Tensor:
        entry = parameterization_of(layer)
        if isinstance(entry, ProjectedWeights) and entry.g == "direct":
            slot: Any = layer.parametrizations["weight"]  # type: ignore[index]
            return slot.original0.double() * slot.original1.double()
        if isinstance(entry, WeightNormalization | WeightNormalizationWithMeanOnly):
            v, g = (tensor.double() for tensor in direction_and_scale(layer))
            g = g.exp() if entry.options().get("g") == "exp" else g
            return (g.view(-1, 1) * v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True)).view_as(v)
        assert isinstance(layer.weight, Tensor)
        return layer.weight.double()

    def biased(layer: nn.Module, t: Tensor) -> Tensor:
        bias = bias_of(layer)
        assert bias is not None
        return normalized_by_hand(layer, t, training) + bias.double().view(-1, *[1] * (t.dim() - 2))

    x = observations.double()
    for index, (layer, (_, _, stride)) in enumerate(zip(network.convolutions, network.spec.convolutions, strict=True)):
        weight = weight_of(layer) / 255 if index == 0 else weight_of(layer)
        x = low(relu(biased(layer, torch.conv2d(x, low(weight), None, stride))))
    hidden = relu(biased(network.hidden, x.flatten(1) @ low(weight_of(network.hidden)).t()))
    weight = weight_of(network.output)
    size = float((hidden @ weight.abs().t()).detach().max()) + 1e-3
    q_values = biased(network.output, hidden @ weight.t())
    return q_values, size * largest_scale(network.output, (hidden @ weight.t()).detach(), training)


def largest_scale(layer: nn.Module, t: Tensor, training: bool) -> float:
    """By how much a layer's normalization stretches its sums t at most, (B, units)."""
    with torch.no_grad():
        spread = t.clone()
        spread[0] += 1e-6 * (1.0 + t.abs().max())
        moved = normalized_by_hand(layer, spread, training) - normalized_by_hand(layer, t, training)
        return max(1.0, float(moved.abs().max() / (spread - t).abs().max()))


def normalized_by_hand(layer: nn.Module, t: Tensor, training: bool) -> Tensor:
    """What a layer's normalization makes of its sums, bias aside: the formulas of wn_rl/parameterizations."""
    module = normalization_of(layer)
    if module is None:
        return t

    def of_units(values: Tensor) -> Tensor:
        return values.double().view(-1, *[1] * (t.dim() - 2))

    if isinstance(module, PerExample):
        axes = [axis for axis in range(1, t.dim()) if module.over == "example" or axis == 1]
    else:
        axes = [axis for axis in range(t.dim()) if axis != 1]
    running = not (training or isinstance(module, PerExample))
    centred = t - (of_units(module.running_mean) if running else t.mean(axes, keepdim=True))  # type: ignore[arg-type]
    if isinstance(module, MeanOnly):
        return centred
    assert isinstance(module, PerExample | Full)
    variance = of_units(module.running_var) if running else centred.square().mean(axes, keepdim=True)  # type: ignore[union-attr]
    return centred / (variance + module.eps).sqrt() * of_units(module.gain)


def gradient(network: QNetwork) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def both(spec: QNetworkSpec, precision: torch.dtype) -> tuple[KernelNetwork, PackedNetwork]:
    library = loader.load()
    assert not isinstance(library, str)
    network = build_q_network(spec, seed=1)
    assert layouts.unsupported(network, library, precision) == ""
    return (
        KernelNetwork(network, library, precision=precision),
        PackedNetwork(copy.deepcopy(network), library, precision=precision),
    )


@given(spec=networks(), batch=st.integers(1, 13), seed=st.integers(0, 1000), lit=st.sampled_from([1.0, 0.3, 0.03, 0.0]))
@settings(deadline=None, max_examples=60)
def test_values_gradients_and_steps_are_those_of_torch(
    precision: torch.dtype, spec: QNetworkSpec, batch: int, seed: int, lit: float
) -> None:
    compare_with_torch(precision, spec, batch, seed, lit)


@given(
    spec=networks(NORMALIZED, LAYERS),
    batch=st.integers(1, 13),
    seed=st.integers(0, 1000),
    lit=st.sampled_from([1.0, 0.3]),
)
@settings(deadline=None, max_examples=60)
def test_values_gradients_and_steps_of_normalized_layers_are_those_of_torch(
    precision: torch.dtype, spec: QNetworkSpec, batch: int, seed: int, lit: float
) -> None:
    # Two observations whose sums are normalized over both have gradients that nearly cancel in every layer.
    compare_with_torch(precision, spec, batch if spec.entry().batch_independent else max(batch, 4), seed, lit)


def compare_with_torch(precision: torch.dtype, spec: QNetworkSpec, batch: int, seed: int, lit: float) -> None:
    """Values, gradients and a step by the kernels, by hand in float64, and by torch's operations in float32."""
    normalized = (spec.parameterization, spec.options) in NORMALIZED
    compiled, plain = both(spec, precision)
    generator = torch.Generator().manual_seed(seed)
    # Where nearly all is black the gradient is little but sums over places that nearly cancel, too coarse in bfloat16
    # for the bounds below; that black changes nothing is compared to the last bit further down.
    x = mostly_black((2 * batch, *spec.observation_shape), lit if precision is torch.float32 else 1.0, generator)
    nothing = torch.zeros(batch)
    minibatch = Minibatch(x[:batch], nothing, nothing, x[batch:], nothing)
    slopes = torch.randn(batch, spec.num_actions, generator=generator)
    optimizer = fused_adamax(compiled, 1e-3, (0.5, 0.999), 1e-8)
    compiled.refresh()
    target = packed_target(compiled)
    *found, seen = compiled.forward_both(target, minibatch)
    network, folded = copy.deepcopy(compiled.network), copy.deepcopy(compiled.network)
    if spec.entry().foldable:  # the weights that are rounded are the folded ones
        fold(folded)
    of_both = ((folded, x[batch:], None, False), (network, x[:batch], units_on(compiled, batch), True))
    for ours, (of, frames, on, training) in zip(found, of_both, strict=True):
        expected, size = by_hand(of, frames, precision, on, training)
        assert float((ours - expected.detach()).abs().max()) < (1e-5 if precision is torch.float32 else 3e-3) * size
    (expected * slopes).sum().backward()
    compiled.backward(seen, slopes)
    optimizer.step()
    optimizer.write_gradients()
    whole = float(gradient(network).norm())
    for ours, theirs in zip(compiled.network.parameters(), network.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        # A scale's gradient is a sum that may nearly cancel, so an error counts against the whole gradient too.
        bound = 2e-5 * float(theirs.grad.norm()) + 5e-6 * whole if precision is torch.float32 else 1e-2 * whole
        assert float((ours.grad - theirs.grad).norm()) < bound
    if precision is torch.float32:
        steps = fused_adamax(plain, 1e-3, (0.5, 0.999), 1e-8)
        plain.refresh()
        plain.backward(plain.forward_both(packed_target(plain), minibatch)[2], slopes)
        steps.step()
        for ours, theirs in zip(compiled.network.parameters(), plain.network.parameters(), strict=True):
            # The first step of Adamax is the sign of a gradient, so one that is nearly zero may go either way. In front
            # of a normalization a whole parameter's may be nothing but rounding.
            off = (ours - theirs).detach().abs()
            if normalized:
                assert ours.grad is not None
                assert bool((off[ours.grad.abs() > 1e-4 * whole] < 1e-6).all())
            else:
                assert float(off.median()) < 1e-6
        for ours, theirs in zip(compiled.network.buffers(), plain.network.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # The next passes see the step: the working weights are those of what was trained.
    expected, size = by_hand(compiled.network, x, precision)
    furthest = float((compiled.q_values(x) - expected.detach()).abs().max())
    assert furthest < (1e-5 if precision is torch.float32 else 3e-3) * size


def large(convolutions: tuple[tuple[int, int, int], ...] = (), *shape: int) -> QNetworkSpec:
    """The network of Mnih et al., or another; with few hidden units."""
    changes = {"convolutions": convolutions, "observation_shape": shape} if convolutions else {}
    return QNetworkSpec(4, "wn", hidden_units=16, **changes)  # type: ignore[arg-type]


LARGE = [
    pytest.param(large(), id="Mnih et al."),
    pytest.param(large(((64, 8, 4), (64, 4, 2)), 8, 84, 84), id="8 frames"),
    pytest.param(large(((16, 8, 4),), 4, 36, 256), id="64 blocks wide"),
    pytest.param(large(((32, 4, 2),), 4, 20, 28), id="blocks of 2"),
    pytest.param(large(((32, 8, 8),), 3, 48, 40), id="blocks of 8"),
]


@pytest.mark.parametrize("spec", LARGE)
@pytest.mark.parametrize(("lit", "filled"), [(0.97, 1.0), (0.5, 0.02), (0.1, 1.0)])
def test_what_is_left_out_of_large_frames_changes_no_bit(
    precision: torch.dtype, spec: QNetworkSpec, lit: float, filled: float
) -> None:
    compare_with_all_visited(spec, precision, 5, 0, lit, filled)


@given(
    spec=networks() | networks(NORMALIZED, LAYERS),
    batch=st.integers(1, 13),
    seed=st.integers(0, 1000),
    lit=st.sampled_from([0.9, 0.3, 0.03, 0.0]),
    filled=st.sampled_from([1.0, 0.02]),
)
@settings(deadline=None, max_examples=60)
def test_what_is_left_out_where_frames_are_black_changes_no_bit(
    precision: torch.dtype, spec: QNetworkSpec, batch: int, seed: int, lit: float, filled: float
) -> None:
    # One observation has no variance.
    batch = batch if spec.entry().batch_independent else max(batch, 2)
    compare_with_all_visited(spec, precision, batch, seed, lit, filled)


def compare_with_all_visited(
    spec: QNetworkSpec, precision: torch.dtype, batch: int, seed: int, lit: float, filled: float
) -> None:
    """Two steps give the same bits, up to the sign of a zero, as with a build that leaves nothing out."""
    leaving_out, _ = both(spec, precision)
    whole = loader.load("VISIT_ZERO_BLOCKS")
    assert not isinstance(whole, str)
    visiting_all = KernelNetwork(copy.deepcopy(leaving_out.network), whole, precision=precision)
    found = []
    for compiled in (leaving_out, visiting_all):
        generator = torch.Generator().manual_seed(seed)
        optimizer = fused_adamax(compiled, 1e-3, (0.5, 0.999), 1e-8)
        compiled.refresh()
        target = packed_target(compiled)
        seen = []
        for _ in range(2):  # the second in memory that holds what the first left
            x = mostly_black((2 * batch, *spec.observation_shape), lit, generator, filled)
            nothing = torch.zeros(batch)
            *q_values, room = compiled.forward_both(target, Minibatch(x[:batch], nothing, nothing, x[batch:], nothing))
            compiled.backward(room, torch.randn(batch, spec.num_actions, generator=generator))
            optimizer.step()
            optimizer.write_gradients()
            seen += [*q_values, gradient(compiled.network)]
            seen += [tensor.detach().clone() for tensor in compiled.network.state_dict().values()]
        found.append(seen)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("param", ["wn", "ln", "bn", "wn_mean_only_bn"])
def test_no_result_depends_on_the_number_of_threads(precision: torch.dtype, param: str) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(1)  # the initialization is torch's
            agent = made(precision, param=param)
            torch.set_num_threads(count)
            for number in range(3):
                agent.update(drawn(number))
            found.append([tensor.clone() for tensor in agent.q_network.state_dict().values()])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


def test_frames_in_the_ring_give_what_copied_ones_give(precision: torch.dtype) -> None:
    first, second = made(precision), made(precision)
    for number in range(3):
        batch = drawn(number)
        copied = Minibatch(
            batch.observations, batch.actions, batch.rewards, batch.next_observations, batch.terminals, batch.indices
        )
        lazy = drawn(number)
        assert isinstance(lazy, LazyMinibatch)
        assert lazy.is_lazy
        first.update(lazy)
        assert lazy.is_lazy
        second.update(batch if number == 1 else copied)
    for ours, theirs in zip(first.q_network.parameters(), second.q_network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("reward_clip", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_torch(precision: torch.dtype, reduction: str, reward_clip: float) -> None:
    agent = made(precision, loss_reduction=reduction, reward_clip=reward_clip)
    compiled = agent.network
    assert isinstance(compiled, KernelNetwork)
    assert isinstance(agent.optimizer, FusedAdamax)
    sizes = []
    for number in range(3):
        batch = drawn(number)
        with torch.no_grad():
            direction_and_scale(agent.q_network.output)[1].mul_(5.0)  # errors on both sides of 1
            compiled.refresh()
            next_q_values, q_values, _ = compiled.forward_both(agent._packed_target(), batch)
        leaf = q_values.clone().requires_grad_(True)
        losses, error, value = agent.td_loss_of(batch, leaf, next_q_values)
        loss = losses.sum() if reduction == "sum" else losses.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        steps = agent.optimizer.next_steps(1)
        _, found = compiled.update(agent._packed_target(), batch, agent._loss, steps)
        assert compiled._prepared is not None
        torch.testing.assert_close(compiled._prepared.q_gradient, leaf.grad, rtol=1e-6, atol=0)
        assert found == pytest.approx(float(loss.detach()), rel=1e-5)
        expected = torch.stack([losses.mean(), error.abs().mean(), value.mean()]).tolist()
        assert agent.statistics.sums.tolist() == pytest.approx(expected, rel=1e-5)
        agent.statistics.sums.zero_()
        sizes.append(error.detach().abs())
    assert (torch.cat(sizes) > 1).any()
    assert (torch.cat(sizes) < 1).any()


def test_a_loss_that_is_not_finite_changes_nothing(precision: torch.dtype) -> None:
    agent = made(precision)
    agent.update(drawn(0))
    with torch.no_grad():
        agent.q_network.output.bias[2] = float("inf")
    before, batch = copy.deepcopy(agent.state_dict()), drawn(1)
    assert before["gradient_norm"] > 0.0
    weights = [parameter.detach().clone() for parameter in agent.q_network.parameters()]
    with pytest.raises(NonFiniteLossError):
        agent.update(batch)
    assert agent.offending_transitions().tolist() == batch.indices.tolist()  # type: ignore[union-attr]
    for ours, theirs in zip(weights, agent.q_network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    after = agent.state_dict()
    assert after["sums"].tolist() == before["sums"].tolist()
    assert after["gradient_norm"] == before["gradient_norm"]
    for index, state in before["optimizer"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, after["optimizer"][index][name])


def test_what_somebody_writes_into_a_minibatch_counts(precision: torch.dtype) -> None:
    agents = [made(precision, compile=choice) for choice in ("on", "off")]
    for agent in agents:
        batch = drawn(3)
        batch.rewards[:] = torch.arange(9) / 8
        batch.actions.fill_(2)
        agent.update(batch)
    ours, theirs = (agent.read_statistics() for agent in agents)
    assert ours.td_error == pytest.approx(theirs.td_error, rel=1e-4 if precision is torch.float32 else 2e-2)


def test_what_does_not_exist_is_refused(precision: torch.dtype) -> None:
    agent = made(precision)
    agent.update(drawn(0))
    before = [parameter.detach().clone() for parameter in agent.q_network.parameters()]
    batch = drawn(1)
    assert isinstance(batch, LazyMinibatch)
    with pytest.raises(IndexError, match="does not exist"):
        agent.update(LazyMinibatch(batch.storage, torch.tensor([3, -1])))
    actions = batch.storage.actions.clone()
    batch.storage.actions.fill_(4)
    with pytest.raises(IndexError, match="does not exist"):
        agent.update(LazyMinibatch(batch.storage, batch.indices))
    batch.storage.actions.copy_(actions)
    fewer = Minibatch(batch.observations[:5], *[getattr(batch, entry.name) for entry in fields(batch)[1:]])
    with pytest.raises(ValueError, match="does not fit"):
        agent.update(fewer)
    other = Replay(60, 2, frame_shape=(88, 84))
    with pytest.raises(ValueError, match="does not fit"):
        agent.update(LazyMinibatch(other.storage, batch.indices))
    assert agent.q_values(batch.observations[:0]).shape == (0, 4)
    for ours, theirs in zip(before, agent.q_network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_passes_of_another_size_between_two_updates_change_nothing(precision: torch.dtype) -> None:
    """The memory of the way back is made anew for them, and no update may go on with the old one."""
    first, second = made(precision), made(precision)
    for agent in (first, second):
        compiled, batch = agent.network, drawn(0)
        assert isinstance(compiled, KernelNetwork)
        assert isinstance(batch, LazyMinibatch)
        agent.update(batch)
        if agent is first:
            for size in (3, 40):
                indices = batch.indices[:1].expand(size)
                *_, seen = compiled.forward_both(agent._packed_target(), LazyMinibatch(batch.storage, indices))
                compiled.backward(seen, torch.zeros(size, 4))
                compiled._backward_args(torch.zeros(size, 4))
        agent.update(drawn(1))
    for ours, theirs in zip(first.q_network.parameters(), second.q_network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_leaves_the_working_weights_that_are_made_of_what_is_trained(precision: torch.dtype) -> None:
    agent = made(precision)
    compiled = agent.network
    assert isinstance(compiled, KernelNetwork)
    for number in range(2):
        agent.update(drawn(number))
    kept = [*compiled.packed.weights, *(weight for weight in compiled.transposed_weights if weight is not None)]
    assert len(kept) == 7
    stepped = [tensor.clone() for tensor in kept]
    for tensor in kept:
        tensor.zero_()
    compiled._versions = []  # as after somebody else's change
    compiled.refresh()
    for ours, theirs in zip(stepped, kept, strict=True):
        assert torch.equal(ours, theirs)


def test_memory_does_not_grow_with_the_numbers_of_observations_seen(precision: torch.dtype) -> None:
    agent = made(precision)
    agent.update(drawn(0))
    norm, x = agent.gradient_norm(), drawn(1).observations
    expected = agent.q_values(x)
    for count in (*range(1, 31), 9):
        found = agent.q_values(x.repeat(4, 1, 1, 1)[:count])
        assert torch.equal(found[:9], expected[:count])
    assert isinstance(agent.network, KernelNetwork)
    assert len(agent.network.workspace.activations) <= MAX_CACHED_SIZES + 1  # and the update's
    assert agent.gradient_norm() == norm


def test_the_network_of_the_paper_takes_the_compiled_passes_where_the_processor_can() -> None:
    network = build_q_network(QNetworkSpec(4, "wn"), seed=0)
    library = loader.load()
    if isinstance(library, str) or not loader.supports(library, torch.float32):
        pytest.skip("no compiler, or no vectors")
    assert layouts.unsupported(network, library, torch.float32) == ""
    assert isinstance(made(torch.float32).network, KernelNetwork)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_units": 20}, "multiple"),
        ({"convolutions": ((32, 8, 4), (24, 4, 2))}, "channels"),
        ({"convolutions": ((32, 8, 4), (64, 5, 2))}, "stride"),
        ({"convolutions": ((32, 8, 4), (64, 4, 2), (32, 4, 2))}, "stride"),
        ({"convolutions": tuple([(32, 8, 4)] + [(32, 1, 1)] * 8)}, "9 convolutions"),
        ({"observation_shape": (65, 84, 84)}, "frames"),
        ({"observation_shape": (4, 84, 260)}, "64 blocks"),
    ],
)
def test_what_the_passes_cannot_compute_is_said(changes: dict[str, object], reason: str) -> None:
    library = loader.load()
    if isinstance(library, str) or not loader.supports(library, torch.float32):
        pytest.skip("no compiler, or no vectors")
    network = build_q_network(QNetworkSpec(4, **changes), seed=0)  # type: ignore[arg-type]
    assert reason in layouts.unsupported(network, library, torch.float32)


def made(precision: torch.dtype, **changes: object) -> Carried:
    values: dict[str, object] = {"game": "breakout", "param": "wn", "hidden_units": 64, "compile": "on", **changes}
    name = "bfloat16" if precision is torch.bfloat16 else "float32"
    config: TrainConfig = resolve(replace(load("paper"), **values, precision=name, batch_size=9))  # type: ignore[arg-type]
    agent = carried(replace(config, device="cpu"))
    agent.initialize(drawn(0).observations)
    return agent


def drawn(seed: int) -> Minibatch:
    """A minibatch of an odd size from a replay of noise."""
    generator = np.random.default_rng(0)
    replay = Replay(60, 2, seed=seed)
    replay.start(generator.integers(0, 256, (2, 84, 84), np.uint8))
    for step in range(50):
        shown = generator.integers(0, 256, (2, 84, 84), np.uint8)
        rewards, ends = generator.integers(-3, 4, 2) / 2, generator.random(2) < 0.3
        replay.add(generator.integers(0, 4, 2), rewards, ends, shown, np.full(2, step % 7 == 6))
    return replay.sample(9)
