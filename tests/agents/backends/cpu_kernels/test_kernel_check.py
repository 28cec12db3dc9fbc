"""``kernel_check.c``: random networks by the kernels beside their plain loops, without Python.

Here it runs under sanitizers, and as a program for ARM (NEON) under an emulator, where Debian's packages
``gcc-aarch64-linux-gnu``, ``libc6-dev-arm64-cross`` and ``qemu-user`` are installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agents.backends.cpu_kernels import loader

SOURCES = [str(Path(__file__).with_name("kernel_check.c")), *map(str, loader.SOURCES)]
FLAGS = ["-std=gnu11", "-fno-math-errno", "-fopenmp", f"-I{loader.CSRC}"]
ARM = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


def compiled(compiler: str, program: Path, *flags: str) -> Path:
    subprocess.run([compiler, *FLAGS, *flags, *SOURCES, "-o", str(program), "-lm"], check=True, capture_output=True)
    return program


def output(*command: str | Path) -> str:
    """What a check prints; its leaks are no concern of the kernels."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["native", "tiles", "avx2", "sse2"])
def test_no_kernel_leaves_its_arrays_or_differs_from_its_plain_loop(vectors: str, tmp_path: Path) -> None:
    library, compiler = loader.load(vectors=vectors), loader.compiler()
    if isinstance(library, str) or compiler is None:
        pytest.skip(str(library))
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    trial = [compiler, *sanitizers, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty")]
    if subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    program = compiled(compiler, tmp_path / "check", "-O1", "-g", *sanitizers, *loader.VECTORS[vectors])
    assert "networks agree" in output(program, "40")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)}")
def test_the_kernels_for_arm_are_their_plain_loops(tmp_path: Path) -> None:
    program = compiled(ARM[0], tmp_path / "check", "-O2", "-static")
    assert output(ARM[1], program, "10") == "10 networks agree with their plain loops\n"
