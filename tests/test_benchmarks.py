"""The benchmarks overwrite nothing that is tracked unless they are told to, and take small and odd arguments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from wn_rl.errors import UsageError

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__")


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_no_default_names_a_tracked_file(name: str) -> None:
    arguments = benchmark(name).Arguments
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split())
    if not tracked:
        pytest.skip("this is no checkout")
    defaults = [value for value in vars(arguments).values() if isinstance(value, str)]
    assert not tracked & set(defaults)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("parameterizations", ["--rounds", "0"]),
        ("parameterizations", ["--batch-sizes", "0"]),
        ("update", ["--updates", "0"]),
        ("throughput", ["--segments", "0"]),
        ("throughput", ["--seconds", "nan"]),
        ("resume", ["--rounds", "0"]),
    ],
)
def test_nothing_to_measure_is_a_usage_error(name: str, words: list[str]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        benchmark(name).main(words)


def test_one_round_is_enough_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--rounds", "1", "--updates", "1", "--batch-sizes", "2", "--params", "ln", "--num-threads", "1"]
    module = benchmark("parameterizations")
    monkeypatch.setattr(module, "resolve_device", lambda config, resolve=module.resolve_device: quick(resolve(config)))
    assert module.main([*words, "--device", "cpu", "--precision", "float32"]) == 0
    assert list(tmp_path.iterdir()) == []


def quick(config: object) -> object:
    from dataclasses import replace

    return replace(config, compile="off", backend="eager")  # type: ignore[type-var]
