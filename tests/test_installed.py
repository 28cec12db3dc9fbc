"""What pip installs works without the checkout, and hides nobody's package called ``agents``."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.small_runs import small_flags
from wn_rl import __main__ as entry
from wn_rl import __version__, layout

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "wn_rl", "agents", "configs")
NOT_OURS = "raise RuntimeError('not the agents of wn_rl')\n"


def copy_of_the_sources(directory: Path) -> Path:
    """Return a copy to build from, since a build leaves files where the sources lie."""
    directory.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, directory)
    return directory


def environment(directory: Path, *what: str) -> Path:
    """Install ``what`` alone into a new environment that finds the dependencies in the present one; returns bin/."""
    venv.create(directory, with_pip=False)
    variables = {"base": str(directory), "platbase": str(directory)}
    scheme = sysconfig.get_preferred_scheme("prefix")
    packages = Path(sysconfig.get_path("purelib", scheme, vars=variables))
    there = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(there)))
    programs = Path(sysconfig.get_path("scripts", scheme, vars=variables))
    offline = ("install", "--no-deps", "--no-index", "--no-build-isolation")
    subprocess.run([PIP[0], *PIP[1:3], "--python", str(programs / "python"), *PIP[3:], *offline, *what], check=True)
    return programs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    sources = copy_of_the_sources(directory / "sources")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(directory))
    subprocess.run([*PIP, *build, str(sources)], check=True)
    (found,) = directory.glob("*.whl")
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that holds somebody else's module called ``agents``, and nothing more."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "agents.py").write_text(NOT_OURS)
    return tmp_path / "empty"


def run(programs: Path, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of an environment's programs in ``directory``, without what the tests' own process finds."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(programs / words[0]), *words[1:]],
        cwd=directory,
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_one_package_with_every_file(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = set()
    for folder, prefix in (("wn_rl", "wn_rl"), ("agents", "wn_rl/agents"), ("configs", "wn_rl/configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                wanted.add(f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}")
    assert inside == wanted


def test_an_installed_package_trains_and_evaluates_from_an_empty_directory(
    wheel: Path, elsewhere: Path, tmp_path: Path
) -> None:
    programs = environment(tmp_path / "environment", str(wheel))
    done = run(programs, elsewhere, "wn-rl", "train", *small_flags(2000), "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((elsewhere / "run" / "summary.json").read_text())["frames"] >= 2000
    flags = ("--episodes", "1", "--max-frames-per-episode", "400", "--json", "scores.json")
    done = run(programs, elsewhere, "python", "-m", "wn_rl", "evaluate", "run", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((elsewhere / "scores.json").read_text())["checkpoint"] == "run/checkpoints/latest"
    where = "import wn_rl.agents.losses as a, wn_rl.layout as l; print(l.import_agent('losses') is a, a.__file__)"
    done = run(programs, elsewhere, "python", "-c", where)
    assert done.stdout.split()[0] == "True"
    assert Path(done.stdout.split()[1]).is_relative_to(tmp_path / "environment")


def test_an_editable_installation_finds_the_checkout_from_anywhere(elsewhere: Path, tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path / "checkout")
    programs = environment(tmp_path / "environment", "--editable", str(sources))
    code = (
        "from wn_rl import config, layout\n"
        "found = layout.import_agent('losses')\n"
        "print(found.__name__, found.__file__, config.load('quick').preset)"
    )
    done = run(programs, elsewhere, "python", "-c", code)
    assert done.stdout.split() == ["wn_rl.agents.losses", str(sources / "agents" / "losses.py"), "quick"], done.stderr
    (elsewhere / "agents.py").unlink()
    assert run(programs, elsewhere, "python", "-c", code).stdout.split()[0] == "wn_rl.agents.losses"
    assert run(programs, sources, "python", "-c", code).stdout.split()[0] == "agents.losses"
    assert "--replay-capacity" in run(programs, elsewhere, "wn-rl", "train", "--help").stdout


def test_a_checkout_whose_agents_another_module_hides_says_so(elsewhere: Path) -> None:
    code = "from wn_rl import cli, layout; cli.run(lambda words: layout.import_agent('dqn'))"
    search = os.pathsep.join([str(elsewhere), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"another module called 'agents' ({elsewhere / 'agents.py'}) is found before" in done.stderr


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of this process, to be changed."""
    words = ["wn-rl"]
    monkeypatch.setattr(sys, "argv", words)
    return words


@pytest.mark.parametrize(
    ("words", "code", "said", "error"),
    [
        ([], 2, "", "error: no command is named: wn-rl train or evaluate\n"),
        (["trian"], 2, "", "error: unknown command 'trian'. Did you mean 'train'? There are: train, evaluate.\n"),
        (["--version"], 0, f"wn_rl {__version__}\n", ""),
        (["evaluate"], 2, "", "error: nothing to score is named: add a CHECKPOINT_OR_RUN\n"),
        (["train", "--batch_sise=2"], 2, "", "error: unknown flag --batch-sise. Did you mean --batch-size?\n"),
    ],
)
def test_commands_and_mistakes(
    words: list[str],
    code: int,
    said: str,
    error: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments.extend(words)
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    found = capsys.readouterr()
    assert (stopped.value.code, found.out, found.err) == (code, said, error)


@pytest.mark.parametrize(
    ("started", "typed"),
    [("/usr/bin/wn-rl", "wn-rl"), ("/x/wn_rl/__main__.py", "python -m wn_rl")],
)
def test_help_and_messages_say_what_was_typed(
    started: str, typed: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[:] = [started, "--help"]
    with pytest.raises(SystemExit):
        entry.main()
    assert f"usage: {typed} COMMAND" in capsys.readouterr().out
    arguments[:] = [started, "evaluate", "--help"]
    with pytest.raises(SystemExit):
        entry.main()
    assert f"usage: {typed} evaluate " in capsys.readouterr().out
    assert layout.command("train") == f"{typed} train"
    arguments[:] = ["/my runs/train.py"]
    assert layout.command("evaluate") == "python evaluate.py"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what a file imports, as (leading dots, the module's name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def test_imports_run_from_scripts_to_agents_to_the_package() -> None:
    """In a wheel ``agents`` has another name: nothing in it may name itself, and the package must not need it."""
    above = {"agents", "train", "evaluate"}
    for path in (*(ROOT / "wn_rl").rglob("*.py"), *(ROOT / "agents").rglob("*.py")):
        for dots, name in imported(path):
            assert dots or name.split(".")[0] not in above, f"{path} imports {name}"
            assert not name.startswith(("wn_rl.agents", "wn_rl.configs")), f"{path} imports {name}"


def test_whatever_the_base_installation_needs_is_pinned() -> None:
    """Reports, curves and Stable-Baselines3 need no extra, and no unpinned package comes with them."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for pin in (Requirement(line) for line in lines if line and line[0] != "#"):
        if pin.marker is None or pin.marker.evaluate():
            (version,) = pin.specifier
            pinned[canonicalize_name(pin.name)] = version.version
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = project.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    waiting = [Requirement(line.strip(' ",')) for line in needed.splitlines() if line.strip()]
    assert {"matplotlib", "stable-baselines3", "torch"} <= {found.name for found in waiting}
    seen = set()
    while waiting:
        found = waiting.pop()
        name = canonicalize_name(found.name)
        of_cuda = name.startswith(("cuda", "nvidia", "triton"))  # torch's own, where its build needs them
        if of_cuda or (found.marker is not None and not found.marker.evaluate({"extra": ""})):
            continue
        assert name in pinned, f"{name} is not pinned"
        assert found.specifier.contains(pinned[name], prereleases=True), f"{found} and {name}=={pinned[name]}"
        if name not in seen:
            seen.add(name)
            waiting.extend(Requirement(line) for line in metadata.requires(name) or ())
