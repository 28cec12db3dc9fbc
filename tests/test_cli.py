"""The command lines as their user meets them: exit codes, one clear line, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import evaluate
import train
from wn_rl import cli, machine, parameterizations
from wn_rl.atari.games import game_names
from wn_rl.config import TrainConfig
from wn_rl.parameterizations import registry
from wn_rl.training import session as trainer

ROOT = Path(__file__).parents[1]
TINY = (  # noqa: SIM905 - reads like a command line
    "--preset quick --frames 1200 --num-envs 2 --num-threads 1 --hidden-units 8 --batch-size 4 --learning-starts 60 "
    "--target-period 50 --replay-capacity 200 --init-samples 16 --evaluation-period 200 --evaluation-episodes 2 "
    "--evaluation-envs 2 --max-frames-per-episode 200 --checkpoint-period 100 --log-period 20"
).split()


def run(
    script: object, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run a script as the command line would; return (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(script.main)  # type: ignore[attr-defined]
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "no game is named"),
        ("--game Brekout", 2, "Did you mean 'Breakout'"),
        ("--game Breakout --param wm", 2, "Did you mean 'wn'"),
        ("--game Breakout --preset quik", 2, "Did you mean 'quick'"),
        ("--gane Breakout", 2, "Did you mean --game"),
        ("--game Breakout --frames lots", 2, "--frames"),
        ("--game Breakout --frames 0", 2, "frames must be from 1"),
        ("--game Breakout --frames", 2, "--frames"),
        ("--game Breakout --gamma nan", 2, "gamma must be"),
        ("--game Breakout --device tpu", 2, "tpu"),
        ("--game Breakout --fire-reset maybe", 2, "maybe"),
        ("--game Breakout surplus", 2, "surplus"),
        ("--game Breakout --config nowhere.yaml", 2, "cannot read nowhere.yaml"),
        ("--game Breakout --config", 2, "--config needs a value"),
        ("--resume nowhere", 1, "nowhere does not exist"),
    ],
)
def test_a_wrong_word_to_train_is_one_line(
    arguments: str, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, err = run(train, arguments.split(), capsys, monkeypatch)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "CHECKPOINT_OR_RUN"),
        ("nowhere", 1, "nowhere does not exist"),
        ("wn_rl", 1, "holds no checkpoint"),
        ("nowhere --episodes 0", 2, "--episodes must be from 1"),
        ("nowhere --episodes -1", 2, "--episodes must be from 1"),
        ("nowhere --steps 0", 2, "--steps must be from 1"),
        ("nowhere --steps 5 --episodes 5", 2, "give one of them"),
        ("nowhere --protocol natur", 2, "Did you mean 'nature'"),
        ("nowhere --action-set all", 2, "--action-set"),
        ("nowhere --game Brekout", 2, "Did you mean 'Breakout'"),
        ("nowhere --param wm", 2, "unknown parameterization 'wm'"),
        ("nowhere --param-options g=exp", 2, "--param-options needs --param"),
        ("nowhere --by gama", 2, "Did you mean 'gamma'"),
        ("nowhere --export tf out.zip", 2, "--export"),
        ("nowhere --export sb3 out.pt2", 2, "must end in .zip"),
        ("nowhere --export sb3 out.zip --json x.json", 2, "leave one of them out"),
        ("--saliency nowhere", 2, "--saliency needs --video"),
        ("nowhere --saliency True", 2, "--saliency needs --video"),
        ("nowhere --saliency False", 1, "nowhere does not exist"),
        ("nowhere --saliency --gif out.mp4", 2, "must end in .gif"),
        ("nowhere* --episodes 1", 1, "nowhere* matches no run"),
        ("nowhere --epsilon 2", 2, "--epsilon must be"),
        ("nowhere --epsilon nan", 2, "--epsilon must be"),
        ("nowhere --episode 3", 2, "Did you mean --episodes"),
        ("nowhere --json no/such/file.json", 2, "--json no/such/file.json"),
        ("nowhere --json scores --csv ./scores", 2, "--json and --csv both name scores"),
    ],
)
def test_a_wrong_word_to_evaluate_is_one_line(
    arguments: str, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, err = run(evaluate, arguments.split(), capsys, monkeypatch)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_train_watch_evaluate_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from wn_rl.diagnostics import DIAGNOSTIC_TAGS, OVERESTIMATION
    from wn_rl.training.telemetry import FINAL_TAGS, HISTOGRAM_TAGS, LAYOUT, TAGS

    directory = tmp_path / "run"
    arguments = ["--game", "space invaders", "--param", "wn", *TINY, "--run-dir", str(directory)]
    code, out, _ = run(train, arguments, capsys, monkeypatch)
    assert code == 0
    assert "SpaceInvaders, wn, preset quick" in out
    assert "evaluation" in out

    events = EventAccumulator(str(directory)).Reload()
    layers = ["convolutions.0", "convolutions.1", "convolutions.2", "hidden", "output"]
    expected = {tag.replace("LAYER", layer) for tag in DIAGNOSTIC_TAGS for layer in layers}
    expected.remove(OVERESTIMATION)  # every game is cut at 200 frames here, so no return is known
    assert set(events.Tags()["scalars"]) == {*TAGS, *FINAL_TAGS, *expected}
    assert all(point.value == 0.0 for point in events.Scalars("diagnostics/q_noise_across_minibatches"))
    assert set(events.Tags()["histograms"]) == set(HISTOGRAM_TAGS)
    documented = (ROOT / "docs" / "monitoring.md").read_text()
    assert all(f"`{tag}`" in documented for tag in (*TAGS, *FINAL_TAGS, *HISTOGRAM_TAGS, *DIAGNOSTIC_TAGS))
    shown = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    written = [*events.Tags()["scalars"], OVERESTIMATION]
    assert all(any(re.fullmatch(tag, name) for name in written) for tag in shown)
    assert "output_init_std: 0.1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [point.step for point in events.Scalars("evaluation/return_mean")][-1] == 1200

    code, out, _ = run(train, arguments, capsys, monkeypatch)
    assert code == 2  # the directory holds a run

    scores = tmp_path / "scores.json"
    code, out, _ = run(evaluate, [str(directory), "--episodes", "3", "--json", str(scores)], capsys, monkeypatch)
    assert code == 0
    assert "SpaceInvaders" in out
    written = json.loads(scores.read_text())
    assert len(written["scores"]) == len(written["lengths"]) == written["episodes"] == 3
    assert written["mean"] == pytest.approx(sum(written["scores"]) / 3)
    assert written["human_normalized"] == pytest.approx((written["mean"] - 148.0) / (1668.7 - 148.0))
    code, out, _ = run(evaluate, [str(directory / "checkpoints" / "best"), "--steps", "120"], capsys, monkeypatch)
    assert code == 0

    code, out, err = run(train, ["--resume", str(directory), "--gamma", "0.5"], capsys, monkeypatch)
    assert (code, err.count("\n")) == (2, 1)
    assert "gamma" in err
    code, out, _ = run(train, ["--resume", str(directory), "--frames", "2k", "--quiet"], capsys, monkeypatch)
    assert (code, out) == (0, "")
    assert json.loads((directory / "summary.json").read_text())["frames"] >= 2000

    monkeypatch.chdir(tmp_path)
    again = ["--config", str(directory / "config.yaml"), "--frames", "600", "--seed", "3"]
    code, out, _ = run(train, again, capsys, monkeypatch)
    assert code == 0
    (summary,) = tmp_path.glob("runs/SpaceInvaders-wn-quick-s3-*/summary.json")
    assert json.loads(summary.read_text())["seed"] == 3


def test_help_names_every_game_and_parameterization_and_needs_no_torch() -> None:
    code = (
        "import sys, train\ntry:\n  train.main(['--help'])\n"
        "finally:\n  print([m for m in ('torch', 'ale_py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith("[]\n")
    for word in (*game_names(), *parameterizations.names(), "--replay-capacity", "--config", "--resume"):
        assert word in done.stdout


def test_reparameterize_loads_neither_gymnasium_nor_ale_nor_tensorboard() -> None:
    code = (
        "import sys\nfrom wn_rl import reparameterize\n"
        "print([m for m in ('gymnasium', 'ale_py', 'tensorboard', 'stable_baselines3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


TEXTS = st.one_of(
    st.sampled_from(["", "-1", "0", "nan", "inf", "-inf", "1e400", "9" * 40, "1e30", "None", "true", "[]", "--", "/"]),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12),
    st.text("0123456789.e-+kMG_", max_size=8),
)
FLAGS = [f"--{entry.name.replace('_', '-')}" for entry in fields(TrainConfig)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flag=st.sampled_from(FLAGS), text=TEXTS)
@example(flag="--learning-rate", text="abc")
@example(flag="--frames", text="a" * 5000)
@example(flag="--run-dir", text="a" * 5000)
@example(flag="--run-dir", text="")
@example(flag="--max-frames-per-episode", text="1e400")
def test_any_text_after_any_flag_is_understood_or_one_short_line(
    flag: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train", lambda *_, **__: 77)  # whatever is understood would train
    code, out, err = run(train, ["--game", "Breakout", flag, text], capsys, monkeypatch)
    assert (code == 77 and err == "") or code in (1, 2)
    assert out == ""
    if code != 77:
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert len(err) <= cli.LONGEST_MESSAGE + 20


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flag=st.sampled_from([f"--{entry.name.replace('_', '-')}" for entry in fields(evaluate.EvaluateArguments)[1:]]),
    text=TEXTS,
)
@example(flag="--json", text="a" * 5000)
@example(flag="--max-frames-per-episode", text="abc")
def test_any_text_after_any_flag_of_evaluate_is_one_short_line(
    flag: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # --json FILE says there why nothing was scored
    code, out, err = run(evaluate, ["no/such/run", flag, text], capsys, monkeypatch)
    assert (code in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert err.startswith("error: ")
    assert len(err) <= cli.LONGEST_MESSAGE + 20


def test_places_where_no_run_can_be_written_or_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a run")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged" / "checkpoints" / "latest"
    damaged.mkdir(parents=True)
    (damaged / "checkpoint.json").write_text("{")
    inside = tmp_path / "inside" / "checkpoints" / "latest"
    (inside / "checkpoint.json").mkdir(parents=True)
    game = ["--game", "Pong", *TINY]
    cases = [
        (train, [*game, "--run-dir", str(file)], 2, "a file is in the way"),
        (train, [*game, "--run-dir", str(file / "below")], 2, "a file is in the way"),
        (train, [*game, "--run-dir", str(tmp_path / ("x" * 300))], 1, "cannot write"),
        (train, [*game, "--run-dir", "/proc/run"], 1, "cannot write"),
        (train, [*game, "--config", str(tmp_path)], 2, "cannot read"),
        (train, [*game, "--config", str(file)], 2, "must hold a mapping"),
        (train, [*game, "--config", "y" * 300], 2, "cannot read"),
        (train, ["--resume", str(file)], 1, "holds no checkpoint"),
        (train, ["--resume", str(tmp_path / "empty")], 1, "holds no checkpoint"),
        (train, ["--resume", str(tmp_path / "damaged")], 1, "is not JSON"),
        (train, ["--resume", str(tmp_path / "inside")], 1, "holds no checkpoint"),
        (train, ["--resume", "z" * 300], 1, "File name too long"),
        (evaluate, [str(file)], 1, "holds no checkpoint"),
        (evaluate, [str(tmp_path / "empty")], 1, "holds no checkpoint"),
        (evaluate, [str(damaged)], 1, "is not JSON"),
        (evaluate, [str(damaged), "--json", str(tmp_path)], 2, "not a file in an existing directory"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for script, arguments, code, message in cases:
        found, out, err = run(script, arguments, capsys, monkeypatch)
        assert (found, out, err.count("\n")) == (code, "", 1), arguments
        assert message in err
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_text() == "not a run"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("--batch-size 1048576", "--batch-size"),
        ("--replay-capacity 1000M", "--replay-capacity"),
        ("--hidden-units 65536 --replay-capacity 1000 --learning-starts 100", "--hidden-units"),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_by_name(
    arguments: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 6_000_000_000)
    command = ["--game", "Pong", *TINY, "--run-dir", str(tmp_path / "run"), *arguments.split()]
    code, out, err = run(train, command, capsys, monkeypatch)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"lower {flag} (about " in err
    assert not (tmp_path / "run").exists()


OWN = """
from dataclasses import dataclass
import torch
from torch import nn
from wn_rl import WeightParameterization, register

print("imported", end="")


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, u):
        return self.factor * u

    def right_inverse(self, w):
        return w / self.factor


@register("scaled")
@dataclass(frozen=True)
class ScaledWeights(WeightParameterization):
    factor: float = 2.0

    def make_parametrization(self, units, weight):
        return Scaled(self.factor)


class Unregistered(WeightParameterization):
    pass


@register("empty")
class Empty(WeightParameterization):
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's file in the directory where they are; forgotten again afterwards."""
    (tmp_path / "my_entries.py").write_text(OWN)
    (tmp_path / "broken_entries.py").write_text("raise RuntimeError('on purpose')")
    (tmp_path / "exit_entries.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    before, path = dict(registry._REGISTRY), list(sys.path)
    yield "my_entries:ScaledWeights"
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)
    sys.path[:] = path
    for name in ("my_entries", "broken_entries", "exit_entries"):
        sys.modules.pop(name, None)


def forget() -> None:
    """Be a new process, which has not imported the user's module."""
    registry._REGISTRY.pop("scaled")
    sys.modules.pop("my_entries")


def test_a_users_own_class_is_imported_from_the_command_line_and_never_from_a_file(
    own_module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--game", "Pong", *TINY, "--frames", "600", "--quiet"]
    own = ["--param", own_module, "--param-options", "factor=4", "--param-layers", "hidden"]
    code, out, err = run(train, [*arguments, *own], capsys, monkeypatch)
    assert (code, out, err) == (0, "imported", "")
    (directory,) = tmp_path.glob("runs/Pong-ScaledWeights-quick-*")
    assert "factor: 4.0" in (directory / "config.yaml").read_text()

    commands = {
        "resume": (train, ["--resume", str(directory), "--frames", "800", "--quiet"]),
        "config": (train, ["--config", str(directory / "config.yaml"), "--quiet"]),
        "evaluate": (evaluate, [str(directory), "--episodes", "1", "--max-frames-per-episode", "100"]),
    }
    for script, words in commands.values():
        forget()
        code, out, err = run(script, words, capsys, monkeypatch)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"--param {own_module}" in err
        code, out, err = run(script, [*words, "--param", own_module], capsys, monkeypatch)
        assert (code, err) == (0, "")
        assert out.startswith("imported")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--param my_entries:Nothing", 2, "'my_entries' has no parameterization called 'Nothing'"),
        ("--param my_entries:Unregistered", 2, "is not registered: decorate the class"),
        ("--param my_entries:nn", 2, "has no parameterization called 'nn'"),
        ("--param nowhere:Nothing", 2, "cannot import 'nowhere': ModuleNotFoundError"),
        ("--param broken_entries:Nothing", 2, "RuntimeError: on purpose"),
        ("--param :x", 2, "cannot import ''"),
        ("--param exit_entries:x", 2, "cannot import 'exit_entries': SystemExit"),
        ("--param my_entries:Empty --data-dependent-init True", 2, "data_dependent_init: Empty does not define"),
        (
            "--param my_entries:Empty",
            1,
            "parameterization 'my_entries:Empty': Empty does not define make_parametrization",
        ),
        ("--param wn_projected --param-options g=none --data-dependent-init True", 2, "'wn_projected' has no scale"),
        ("--param wn --param-options g", 2, "'g' is not NAME=VALUE"),
        ("--param wn --param-options g=log", 2, "g is one of direct, exp, not 'log'"),
        ("--param wn --param-options eps=1", 2, "'wn' has no option 'eps'"),
        ("--param wn --param-layers hiden", 2, "no layer matches 'hiden'. Did you mean 'hidden'"),
        ("--param wn --param-layers", 2, "param_layers names no layer"),
        ("--config other.yaml", 1, "not imported from a file: add --param my_entries:ScaledWeights"),
        ("--config unknown.yaml", 1, "'scald' is not registered"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_wrong_words_about_parameterizations_are_one_line(
    words: str, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("other.yaml").write_text("param: my_entries:ScaledWeights\n")
    Path("unknown.yaml").write_text("param: scald\n")
    # A replay of 0.4 GB, so that a machine with little memory free says nothing of that.
    run_words = ["--game", "Pong", "--replay-capacity", "60k", *words.split()]
    found, out, err = run(train, run_words, capsys, monkeypatch)
    assert (found, out.removeprefix("imported"), err.count("\n")) == (code, "", 1)
    assert message in err
    assert not Path("runs").exists()


def test_help_is_there_at_once() -> None:
    """The promise is 1.5 s and 0.3 s was measured; loading torch alone would take more than the promise."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.5
