"""The C functions of ``kernels.c`` and ``passes.c``, compiled on first use where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from wn_rl.errors import one_line

SOURCES = tuple(Path(__file__).parent / "csrc" / name for name in ("optimizer.c", "update.c"))
HEADERS = tuple(Path(__file__).parent / "csrc" / name for name in ("structs.h", "passes.h"))
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
"""No ``-ffast-math``: a number that is not finite must stay one."""
Pointer = ctypes.c_void_p


class LayerStruct(ctypes.Structure):
    """``Layer`` of ``kernels.h``, field by field; addresses of contiguous tensors, which the owner keeps alive."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("units", "inputs", "normalized", "low", "low_gradient", "low_kept")),
        *((name, ctypes.c_int64) for name in ("unit_step", "gradient_unit_step", "back_unit_step", "back_pair")),
        ("factor", ctypes.c_float),
        *((name, Pointer) for name in ("place", "back_place", "gradient_place")),
        *((name, Pointer) for name in ("v", "v_mean", "v_max", "g", "g_mean", "g_max")),
        *((name, Pointer) for name in ("b", "b_mean", "b_max", "g_gradient", "v_gradient", "norm")),
        *((name, Pointer) for name in ("work", "bias", "back", "gradient", "bias_gradient")),
    )


def compiler() -> str | None:
    """Return the C compiler: the environment's ``CC``, else gcc, clang or cc; None where there is none."""
    wanted = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    return next((found for name in wanted if name and (found := shutil.which(name))), None)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wn_rl"


@functools.cache
def load(*macros: str) -> ctypes.CDLL | str:
    """Return the compiled functions, or why there are none.

    ``macros`` are defined for the compiler: with ``VISIT_ALL`` nothing black is left out, to compare with.

    Compiling takes a second; the result is kept in the user's cache directory under a name that changes with the
    source, the compiler and the processor.
    """
    command = compiler()
    if command is None:
        return "there is no C compiler"
    flags = (*FLAGS, *(f"-D{macro}" for macro in macros))
    try:
        version = subprocess.run([command, "--version"], capture_output=True, check=True, timeout=60).stdout  # noqa: S603
        told = (
            *(path.read_bytes() for path in (*SOURCES, *HEADERS)),
            version,
            " ".join(flags).encode(),
            _processor().encode(),
        )
        name = f"kernels-{hashlib.sha256(b'|'.join(told)).hexdigest()[:20]}.so"
        try:
            directory = _cache()
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            return _open(command, flags, directory / name)
        except OSError:  # a cache that cannot be written or does not allow programs
            return _open(command, flags, Path(tempfile.mkdtemp(prefix="wn_rl-")) / name)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return one_line(error)[:200]


def _processor() -> str:
    """Return what the processor can do, since the code is made for this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


def _open(command: str, flags: tuple[str, ...], path: Path) -> ctypes.CDLL:
    if not path.exists():
        # Under another name first: two runs may compile at the same time, or one may be stopped.
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(descriptor)
        try:
            made = subprocess.run(  # noqa: S603 - the compiler of this machine on a file of this package
                [command, *flags, *map(str, SOURCES), "-o", unfinished, "-lm"],
                capture_output=True,
                text=True,
                timeout=300,
            )
            if made.returncode:
                raise RuntimeError(f"{command} failed: {made.stderr.strip() or 'no message'}")
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    library = ctypes.CDLL(str(path))
    integer, real = ctypes.c_int64, ctypes.c_float
    library.renew_layers.argtypes = (ctypes.POINTER(LayerStruct), integer, integer)
    library.step_layers.argtypes = (ctypes.POINTER(LayerStruct), integer, integer, Pointer, integer, *[real] * 4)
    library.pack.argtypes = (Pointer, *[integer] * 9, Pointer)
    for function in (library.renew_layers, library.step_layers, library.pack):
        function.restype = None
    for name in ("float32", "bfloat16"):
        if hasattr(library, f"forward_{name}"):  # where the processor has the vectors for it
            forward, step = getattr(library, f"forward_{name}"), getattr(library, f"backward_and_step_{name}")
            forward.argtypes = (Pointer, Pointer, integer, Pointer, integer)
            step.argtypes = (*[Pointer] * 5, integer, *[real] * 4)
            forward.restype = step.restype = None
            learn = getattr(library, f"learn_{name}")
            learn.argtypes = (*[Pointer] * 4, integer, *[Pointer] * 4, integer, Pointer, *[real] * 3, *[Pointer] * 2)
            learn.restype = integer
    return library
