"""The C functions of ``csrc``, compiled on first use where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from wn_rl.errors import UsageError, one_line

from .structs import STRUCTS, Integer, Pointer, TrainedLayerStruct, precision_code

CSRC = Path(__file__).with_name("csrc")
REFERENCE = CSRC / "reference.c"
"""Plain loops that the tests compare the kernels with; no part of the library that :func:`load` makes."""
SOURCES = tuple(path for path in sorted(CSRC.glob("*.c")) if path != REFERENCE)
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
"""No ``-ffast-math``: a number that is not finite must stay one. Without ``errno`` loops with a root are vectorized."""
PROCESSOR = ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)
VECTORS = {
    "native": PROCESSOR,
    "avx512": ("-march=x86-64-v4", "-mtune=native"),
    "avx2": ("-march=x86-64-v3", "-mtune=native"),
    "sse2": ("-march=x86-64", "-mtune=native"),
    "tiles": (*PROCESSOR, "-DTILE_STAND_IN"),
    "no_tiles": (*PROCESSOR, "-DNO_TILES"),
}
"""What the compiler may use, by the names of :data:`VARIABLE`; ``native``: whatever this processor has.

``tiles``: the tile unit's kernels in bfloat16 with plain C in place of the unit, slow; ``no_tiles``: without them.
"""
VARIABLE = "WN_RL_KERNELS"
"""The environment variable that chooses one of :data:`VECTORS`, to test or time what other processors would run."""
_NEEDED = {"avx512": "avx512vl", "avx2": "fma", "sse2": "sse2"}


def compiler() -> str | None:
    """Return the C compiler: the environment's ``CC``, else gcc, clang or cc; None where there is none."""
    wanted = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    return next((found for name in wanted if name and (found := shutil.which(name))), None)


def chosen_vectors() -> str:
    """Return which of :data:`VECTORS` the environment chooses.

    Raises:
        UsageError: there are no such vectors.
    """
    chosen = os.environ.get(VARIABLE) or "native"
    if chosen not in VECTORS:
        raise UsageError(f"{VARIABLE} is {chosen!r}; it can be {', '.join(VECTORS)}")
    return chosen


def cache_directory() -> Path:
    """Return where what was compiled and timed on this machine is kept; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wn_rl"


@functools.cache
def load(*macros: str, vectors: str = "") -> ctypes.CDLL | str:
    """Return the compiled kernels, or why there are none.

    Args:
        macros: defined for the compiler: with ``VISIT_ZERO_BLOCKS`` no block of zero pixels is skipped, to compare.
        vectors: one of :data:`VECTORS`; empty: :func:`chosen_vectors`, whose errors are raised.
    """
    library = build(SOURCES, *macros, vectors=vectors)
    if not isinstance(library, str):
        _declare(library)
    return library


def build(sources: Sequence[Path], *macros: str, vectors: str = "") -> ctypes.CDLL | str:
    """Return these C files as a library, or why there is none; arguments and errors as :func:`load`.

    Compiling takes a few seconds; the result is kept in the user's cache directory under a name that changes with the
    sources, the headers, the compiler and the processor.
    """
    vectors = vectors or chosen_vectors()
    features = processor()
    if features.startswith("flags") and _NEEDED.get(vectors, "") not in ("", *features.split()):
        return f"{VARIABLE} is {vectors}, which the processor does not have"
    command = compiler()
    if command is None:
        return "there is no C compiler"
    flags = (*FLAGS, *VECTORS[vectors], *(f"-D{macro}" for macro in macros))
    try:
        version = subprocess.run([command, "--version"], capture_output=True, check=True, timeout=60).stdout  # noqa: S603
        inputs = (
            *(path.read_bytes() for path in (*sources, *sorted(CSRC.glob("*.h")))),
            version,
            " ".join(flags).encode(),
            features.encode(),
        )
        name = f"kernels-{hashlib.sha256(b'|'.join(inputs)).hexdigest()[:20]}.so"
        try:
            directory = cache_directory()
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            return _open(command, flags, sources, directory / name)
        except OSError:  # a cache that cannot be written or does not allow programs
            return _open(command, flags, sources, Path(tempfile.mkdtemp(prefix="wn_rl-")) / name)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return one_line(error)[:200]


def supports(library: ctypes.CDLL, precision: torch.dtype) -> bool:
    """Return whether ``library`` has the forward and backward pass of a network in ``precision``."""
    return bool(library.supports_precision(precision_code(precision)))


def processor() -> str:
    """Return what the processor can do, since the code is made for this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


def _open(command: str, flags: Sequence[str], sources: Sequence[Path], path: Path) -> ctypes.CDLL:
    if not path.exists():
        # Under another name first: two runs may compile at the same time, or one may be stopped.
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(descriptor)
        try:
            made = subprocess.run(  # noqa: S603 - the compiler of this machine on files of this package
                [command, *flags, *map(str, sources), "-o", unfinished, "-lm"],
                capture_output=True,
                text=True,
                timeout=300,
            )
            if made.returncode:
                raise RuntimeError(f"{command} failed: {made.stderr.strip() or 'no message'}")
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _declare(library: ctypes.CDLL) -> None:
    """Set argument and result types, and check that both languages agree on the structures.

    Raises:
        RuntimeError: they do not.
    """
    layers = ctypes.POINTER(TrainedLayerStruct)
    library.supports_precision.argtypes = (Integer,)
    library.supports_precision.restype = library.has_tile_unit.restype = Integer
    library.has_tile_unit.argtypes = ()
    library.pack_layers.argtypes = library.prepare_training_pass.argtypes = (layers, Integer, Integer)
    library.step_layers.argtypes = (layers, Integer, Integer, Pointer, Integer, Pointer)
    library.step_tensor.argtypes = (*[Pointer] * 4, Integer, Integer, Pointer)
    library.pack_frames.argtypes = (Pointer, *[Integer] * 9, Pointer)
    for function in (
        library.pack_layers,
        library.prepare_training_pass,
        library.step_layers,
        library.step_tensor,
        library.pack_frames,
        library.struct_sizes,
    ):
        function.restype = None
    sizes = (Integer * len(STRUCTS))()
    library.struct_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in STRUCTS]:
        raise RuntimeError("structs.py and csrc/structs.h disagree")
    if not supports(library, torch.float32):
        return
    library.network_forward.argtypes = (Pointer, Pointer, Integer, Pointer, Integer)
    library.network_backward_and_step.argtypes = (*[Pointer] * 5, Integer, Pointer)
    library.network_forward.restype = library.network_backward_and_step.restype = None
    library.network_updates.argtypes = (
        *[Pointer] * 4,
        Integer,
        *[Pointer] * 4,
        Integer,
        *[Pointer] * 3,
    )
    library.network_updates.restype = Integer
