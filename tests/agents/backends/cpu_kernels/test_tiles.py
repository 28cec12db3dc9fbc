"""The tile unit's kernels, with plain C in place of the unit: on any processor with AVX512-BF16.

The other tests of this directory run on this build too.
"""

from __future__ import annotations

import copy
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from agents.backends.cpu_kernels import kernel_network, layouts, loader
from agents.backends.cpu_kernels.kernel_network import KernelNetwork
from agents.backends.cpu_kernels.structs import TileStage
from tests.kernel_networks import fused_adamax, mostly_black
from tests.kernel_stages import check_each_stage
from wn_rl.networks import QNetwork, QNetworkSpec, build_q_network
from wn_rl.parameterizations import fold
from wn_rl.replay import Minibatch

ALL = TileStage(63)
EXACT = 2.0**24
"""Whole numbers up to this are float32 numbers, so sums of such terms are the same in every order."""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = loader.load(vectors="tiles")
    if isinstance(found, str):
        pytest.skip(found)
    if not loader.supports(found, torch.bfloat16):
        pytest.skip("no vectors for bfloat16")
    return found


@pytest.fixture(scope="module")
def reference() -> ctypes.CDLL:
    found = loader.build((loader.REFERENCE,))
    assert not isinstance(found, str), found
    return found


@pytest.fixture
def unit(library: ctypes.CDLL) -> Iterator[Any]:
    """The stand-in's primitives, configured."""
    for name, count in (("zero_tile", 1), ("multiply_tiles", 3)):
        getattr(library, name).argtypes = (ctypes.c_int,) * count
    for name in ("load_tile", "store_tile"):
        getattr(library, name).argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
    library.configure_tiles()
    yield library
    library.release_tiles()


def in_use(library: ctypes.CDLL) -> int:
    return ctypes.c_int64.in_dll(library, "configured_threads").value


@st.composite
def tile_networks(draw: st.DrawFn) -> QNetworkSpec:
    """Small networks all of whose stages the tile unit can compute."""
    frames, size, kernel = draw(st.integers(1, 4)), draw(st.integers(5, 9)), draw(st.integers(1, 2))
    if frames * kernel % 2:  # a kernel's line is a multiple of 32 elements
        kernel = 2
    layers = [(draw(st.sampled_from([16, 32, 48])), 4 * kernel, 4)]
    down = size - kernel + 1
    for _ in range(draw(st.integers(0, 2))):
        before = layers[-1][0]
        choices = [
            (units, k, s)
            for units in (16, 32, 64, 80)
            for k in (1, 2, 3, 4)
            for s in (1, 2)
            if k <= down and k % s == 0 == down % s and (down - k) % s == 0
            if before * k % 32 == 0 == units * (k // s) % 32
        ]
        if not choices:
            break
        layers.append(draw(st.sampled_from(choices)))
        down = (down - layers[-1][1]) // layers[-1][2] + 1
    spec = QNetworkSpec(
        draw(st.integers(1, 18)),
        "standard",
        observation_shape=(frames, 4 * size, 4 * size),
        convolutions=tuple(layers),
        hidden_units=draw(st.sampled_from([16, 32, 80])),
    )
    wide = spec.flat_features() % 32 == 0  # only a single layer's need not be
    return spec if wide else replace(spec, convolutions=((32, *layers[0][1:]),))


stages = st.lists(st.sampled_from(list(TileStage)), unique=True).map(lambda found: TileStage(sum(found)))


def with_stages(network: QNetwork, library: ctypes.CDLL, wanted: TileStage) -> KernelNetwork:
    """Kernels of which only these stages use tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_network, "tile_stages", lambda *_: wanted)
        return KernelNetwork(network, library, precision=torch.bfloat16)


def with_whole_numbers(spec: QNetworkSpec, generator: torch.Generator) -> QNetwork:
    """A network whose packed weights are -1, 0 or 1, and so all sums whole numbers."""
    network = build_q_network(spec, seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            drawn = torch.randint(-1, 2, parameter.shape, generator=generator)
            sparse = torch.rand(parameter.shape, generator=generator) < 0.3
            parameter.copy_(drawn * sparse * (255 if index == 0 else 1))  # pixels are divided by 255
    return network


def same_sums(name: str, found: Tensor, expected: Tensor, precision: torch.dtype) -> None:
    """Bit for bit, where the stage stores bfloat16 after rounding."""
    found, expected = found.float().flatten(), expected.flatten()
    assert float(expected.abs().max()) < EXACT, name
    assert torch.equal(found, expected) or torch.equal(found, expected.to(precision).float()), name


def test_the_stages_are_those_of_c() -> None:
    header = (loader.CSRC / "structs.h").read_text(encoding="utf-8")
    assert all(f"TILE_{stage.name} = {int(stage)}" in header for stage in TileStage)
    assert TileStage(sum(TileStage)) == ALL


def test_the_paper_s_network_uses_tiles_in_every_stage_of_bfloat16(library: ctypes.CDLL) -> None:
    network = build_q_network(QNetworkSpec(4, "wn"), seed=0)
    assert layouts.tile_stages(network, library, torch.bfloat16) == ALL
    assert layouts.tile_stages(network, library, torch.float32) == TileStage(0)
    without = loader.load(vectors="no_tiles")
    assert not isinstance(without, str)
    assert layouts.tile_stages(network, without, torch.bfloat16) == TileStage(0)
    odd = build_q_network(QNetworkSpec(4, "wn", observation_shape=(1, 84, 84), convolutions=((80, 4, 4),)), seed=0)
    assert TileStage.CONV_FORWARD not in layouts.tile_stages(odd, library, torch.bfloat16)


@given(
    spec=tile_networks(), batch=st.integers(1, 70), seed=st.integers(0, 1000), wanted=st.one_of(st.just(ALL), stages)
)
@settings(deadline=None, max_examples=40)
def test_whole_numbers_give_the_sums_of_the_plain_loops_bit_for_bit(
    library: ctypes.CDLL, reference: ctypes.CDLL, spec: QNetworkSpec, batch: int, seed: int, wanted: TileStage
) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert layouts.tile_stages(build_q_network(spec, seed=0), library, torch.bfloat16) == ALL
    kernels = with_stages(with_whole_numbers(spec, generator), library, wanted)
    frames = mostly_black((2 * batch, *spec.observation_shape), 0.7, generator) % 2
    slopes = torch.randint(-1, 2, (batch, spec.num_actions), generator=generator).float()
    check_each_stage(reference, kernels, frames, slopes, same_sums)
    assert in_use(library) == 0


@given(spec=tile_networks(), batch=st.integers(1, 40), seed=st.integers(0, 1000), wanted=stages)
@settings(deadline=None, max_examples=25)
def test_every_choice_of_stages_is_the_plain_loops_within_rounding(
    library: ctypes.CDLL, reference: ctypes.CDLL, spec: QNetworkSpec, batch: int, seed: int, wanted: TileStage
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernels = with_stages(build_q_network(spec, seed=seed), library, wanted)
    frames = mostly_black((2 * batch, *spec.observation_shape), 0.5, generator)
    check_each_stage(reference, kernels, frames, torch.randn(batch, spec.num_actions, generator=generator))


def test_the_paper_s_network_gives_the_sums_of_the_plain_loops(library: ctypes.CDLL, reference: ctypes.CDLL) -> None:
    spec, generator = QNetworkSpec(4, "standard", hidden_units=48), torch.Generator().manual_seed(0)
    kernels = with_stages(build_q_network(spec, seed=0), library, ALL)
    frames = torch.randint(0, 256, (6, *spec.observation_shape), dtype=torch.uint8, generator=generator)
    check_each_stage(reference, kernels, frames, torch.randn(3, 4, generator=generator))


@given(spec=tile_networks(), batch=st.sampled_from([1, 5, 16, 33]), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_what_lies_in_unused_rows_and_columns_counts_nothing(
    library: ctypes.CDLL, spec: QNetworkSpec, batch: int, seed: int
) -> None:
    """Tiles reach past the end of arrays: memory that nobody has written is full of NaN, or of zeros."""
    network, found = build_q_network(spec, seed=seed), []
    for filled in (0, 255):
        kernels = with_stages(copy.deepcopy(network), library, ALL)
        workspace = kernels.workspace
        workspace.scratch()
        activations, (gradients, _) = workspace.activations_for(batch, True), workspace.gradients_for(batch)
        written = [*activations.saved_inputs, activations.flat, activations.flat_columns, activations.hidden]
        written += [gradients.hidden, gradients.hidden_pairs, gradients.flat, workspace._scratch]
        for memory in (*written, *gradients.convolutions, *gradients.transposed):
            memory.view(torch.uint8).fill_(filled)
        found.append(one_update(kernels, batch, torch.Generator().manual_seed(seed)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_an_update_by_the_unit_is_that_by_its_stand_in_bit_for_bit(library: ctypes.CDLL) -> None:
    native = loader.load(vectors="native")
    assert not isinstance(native, str)
    if not native.has_tile_unit():
        pytest.skip("no tile unit")
    spec = QNetworkSpec(4, "wn", hidden_units=48)
    network, found = build_q_network(spec, seed=0), []
    for built in (library, native):
        kernels = KernelNetwork(copy.deepcopy(network), built, precision=torch.bfloat16)
        assert kernels.shape.tiles == ALL
        found.append(one_update(kernels, 33, torch.Generator().manual_seed(0)))
    assert all(map(torch.equal, *found))


def one_update(kernels: KernelNetwork, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Both networks' Q-values before an update and the parameters after it."""
    network = kernels.network
    assert isinstance(network, QNetwork)
    optimizer = fused_adamax(kernels, 1e-3, (0.9, 0.999), 1e-8)
    kernels.refresh()
    frames = mostly_black((2 * batch, *network.spec.observation_shape), 0.5, generator)
    zeros = torch.zeros(batch)
    minibatch = Minibatch(frames[:batch], zeros, zeros, frames[batch:], zeros)
    *q_values, saved = kernels.forward_both(kernels.pack_network(fold(copy.deepcopy(network))), minibatch)
    kernels.backward(saved, torch.randn(batch, network.spec.num_actions, generator=generator))
    optimizer.step()
    return [*q_values, *(parameter.detach() for parameter in network.parameters())]


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of numbers that are bfloat16."""
    bits = values.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def product_of_tiles(unit: Any, sums: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32]) -> Any:
    """Sums (16, 16) + a (16, 32) · b (32, 16) by the stand-in; b goes to its tile as words of two rows each."""
    rows, words = bfloat16(a), np.ascontiguousarray(bfloat16(b).reshape(16, 2, 16).transpose(0, 2, 1))
    out = np.empty((16, 16), np.float32)
    for tile, array in ((0, sums), (1, rows), (2, words)):
        unit.load_tile(tile, array.ctypes.data, 64)
    unit.multiply_tiles(0, 1, 2)
    unit.store_tile(0, out.ctypes.data, 64)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_a_product_of_tiles_rounds_as_the_instruction_is_documented(unit: Any, seed: int) -> None:
    """First and second numbers of pairs are added apart, from zero; both together; then to what was there."""
    generator = np.random.default_rng(seed)
    a, b = (
        torch.from_numpy(generator.standard_normal(shape)).bfloat16().float().numpy() for shape in ((16, 32), (32, 16))
    )
    sums = generator.standard_normal((16, 16)).astype(np.float32)
    parts = np.zeros((2, 16, 16), np.float32)
    for k in range(16):
        for i in range(2):
            # A product of two numbers of 8 bits is exact in float64, and so is its sum with one of 24 of that size.
            exact = a[:, 2 * k + i, None].astype(np.float64) * b[2 * k + i] + parts[i]
            parts[i] = exact.astype(np.float32)
    expected = sums + (parts[0] + parts[1])
    assert np.array_equal(product_of_tiles(unit, sums, a, b), expected)
    other_order = sums.copy()
    for k in range(32):
        other_order = (a[:, k, None].astype(np.float64) * b[k] + other_order).astype(np.float32)
    assert not np.array_equal(other_order, expected)  # so the order is seen


def test_denormals_count_as_zero(unit: Any) -> None:
    smallest = float(np.finfo(np.float32).tiny)
    a, b, zeros = np.zeros((16, 32), np.float32), np.zeros((32, 16), np.float32), np.zeros((16, 16), np.float32)
    a[0, 0], b[0, 0] = smallest / 2, 2.0**20  # a factor
    a[1, 2], b[2, 1] = smallest * 2**10, 2.0**-11  # a product
    a[2, 4], b[4, 2] = smallest, 1.0  # neither
    sums = np.full((16, 16), smallest / 4, np.float32)
    expected = zeros.copy()
    expected[2, 2] = smallest
    assert np.array_equal(product_of_tiles(unit, sums, a, b), expected)
    assert np.isnan(product_of_tiles(unit, zeros, np.full_like(a, np.nan), b)).all()


def test_the_unit_is_found_where_the_processor_has_one() -> None:
    native = loader.load(vectors="native")
    if isinstance(native, str):
        pytest.skip(native)
    if not native.has_tile_unit():
        return  # the processor, the operating system or the compiler has none
    assert {"amx_tile", "amx_bf16"} <= set(loader.processor().split())


def test_kernels_for_the_unit_are_compiled_on_processors_without_one(library: ctypes.CDLL) -> None:
    disassembler = shutil.which("objdump")
    if disassembler is None or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs objdump")
    native = loader.load(vectors="native")
    assert isinstance(native, ctypes.CDLL)
    listing = subprocess.run([disassembler, "-d", native._name], capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert f"{instruction} " in listing or f"{instruction}\n" in listing
    del library
