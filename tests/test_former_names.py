"""Former names of flags, keys, values and methods still work, with one line that says what they are called now."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wn_rl
from train import main as train
from wn_rl import WeightParameterization, config, reparameterize
from wn_rl.config import TrainConfig, renamed
from wn_rl.config.synonyms import SYNONYMS
from wn_rl.errors import UsageError
from wn_rl.networks import QNetworkSpec
from wn_rl.parameterizations import get, names, registry
from wn_rl.parameterizations.base import Units
from wn_rl.parameterizations.former_names import FORMER_NAMES, FormerNameWarning
from wn_rl.parameterizations.weight_norm import WeightNormalization


class Doubled(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return 2 * v

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


def test_a_class_that_overrides_former_names_works_and_is_told() -> None:
    with pytest.warns(FormerNameWarning) as told:

        class Mine(WeightParameterization):
            name = "mine"
            treats = "hidden"

            def check(self, layer: nn.Module) -> None:
                super().check(layer)  # type: ignore[misc]
                if layer.in_features == 5:  # type: ignore[comparison-overlap]
                    raise ValueError("five inputs")

            def computes(self, units: Units, weight: Tensor) -> nn.Module:
                del units, weight
                return Doubled()

    assert sorted(str(warning.message).split(" is now called ")[0] for warning in told) == [
        "Mine.check",
        "Mine.computes",
        "Mine.treats",
    ]
    assert all("\n" not in str(warning.message) for warning in told)
    layer = nn.Linear(4, 2)
    weight = layer.weight.detach().clone()
    reparameterize(layer, Mine())
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.parametrizations.weight.original, weight / 2)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="five inputs"):
        reparameterize(nn.Linear(5, 2), Mine())
    with pytest.raises(ValueError, match="parametrized already"):  # the check of the class above is still made
        reparameterize(layer, Mine())
    assert QNetworkSpec(3).outline().default_layers(Mine())[-1] == "hidden"


def test_a_subclass_of_a_subclass_calls_the_check_next_above_it() -> None:
    with pytest.warns(FormerNameWarning, match="check"):

        @dataclass(frozen=True)
        class Stricter(WeightNormalization):
            def check(self, layer: nn.Module) -> None:
                super().check(layer)  # type: ignore[misc]

    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(ValueError, match="only zero weights"):  # of weight normalization, not of the base class
        reparameterize(layer, Stricter())


def test_the_projects_own_classes_answer_to_both_names_and_warn_of_nothing() -> None:
    for name in names():
        for former, now in FORMER_NAMES.items():
            if hasattr(get(name), now):
                assert getattr(get(name), former) is getattr(get(name), now), (name, former)
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class New(WeightNormalization):
            default_layers = "hidden"

            def validate(self, layer: nn.Module) -> None:
                super().validate(layer)

    assert New.treats == "hidden"  # type: ignore[attr-defined]


def test_a_class_of_a_users_file_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "former_style.py").write_text(
        "from wn_rl import WeightParameterization, register\n"
        "@register('former_style')\n"
        "class Former(WeightParameterization):\n"
        "    treats = 'hidden'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(UsageError, match="frames must be"):
            train(["--game", "Pong", "--param", "former_style:Former", "--frames", "0"])
    finally:
        registry._REGISTRY.pop("former_style", None)
    told = capsys.readouterr().err
    assert told.startswith("note: Former.treats is now called default_layers;")
    assert told.count("\n") == 1


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--journal", "whole"], "--journal whole is now --action-log full"),
        (["--journal=replay"], "--journal replay is now --action-log replay"),
        (["--action-log", "whole"], "--action-log whole is now --action-log full"),
        (["--output_init", "literal"], "--output-init literal is now --output-init unit-variance"),
        (
            ["--journal", "replay", "--output-init=literal"],
            "--journal replay is now --action-log replay; --output-init literal is now --output-init unit-variance",
        ),
        (["--action-log", "full", "--output-init", "scaled"], ""),
    ],
)
def test_former_flags_and_values_work_and_are_told_in_one_line(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="frames must be"):  # that is, everything else was understood
        train(["--game", "Pong", *flags, "--frames", "0"])
    assert capsys.readouterr().err == (f"note: {told}\n" if told else "")
    with pytest.raises(UsageError, match="frames must be"):
        train(["--game", "Pong", *flags, "--frames", "0", "--quiet"])
    assert capsys.readouterr().err == ""


def test_what_is_refused_is_refused_under_a_former_name_too() -> None:
    with pytest.raises(UsageError, match=r"action[-_]log"):
        train(["--game", "Pong", "--journal", "some"])
    with pytest.raises(UsageError, match="unknown configuration key 'journal'"):
        config.from_mapping(renamed.current({"journal": "whole", "action_log": "full"})[0] | {"seed": 1})


def test_a_file_with_former_keys_and_values_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("journal: whole\noutput_init: literal\nseed: 4\n")
    read = config.load(config_file=file)
    assert (read.action_log, read.output_init, read.seed) == ("full", "unit-variance", 4)
    assert "action_log" in read.chosen
    assert capsys.readouterr().err == (
        f"note: {file}: 'journal: whole' is now 'action_log: full'; "
        "'output_init: literal' is now 'output_init: unit-variance'\n"
    )
    file.write_text("journal: whole\naction_log: full\n")
    with pytest.raises(UsageError, match="unknown key 'journal'"):
        config.load(config_file=file)


def test_a_runs_file_of_an_earlier_version_lists_former_keys_as_chosen(tmp_path: Path) -> None:
    whole = config.to_yaml(config.resolve(config.configure("quick", None, {"game": "Pong", "action_log": "replay"})[0]))
    file = tmp_path / "config.yaml"
    file.write_text(whole.replace("action_log: replay", "journal: replay").replace("- action_log", "- journal"))
    assert "action_log" not in file.read_text()
    assert config.load(config_file=file) == config.load(config_file=_written(tmp_path / "new.yaml", whole))


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_keys_from_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="frames must be"):
        wn_rl.train(game="Pong", journal="whole", frames=0)
    assert capsys.readouterr().err == "note: 'journal: whole' is now 'action_log: full'\n"
    with pytest.raises(UsageError, match=r"unknown configuration key 'lr'\. Did you mean 'learning_rate'\?"):
        wn_rl.train(game="Pong", lr=1e-4)


def test_every_former_name_leads_to_a_key_and_a_value_that_there_are() -> None:
    keys = {field.name for field in fields(TrainConfig)}
    assert set(renamed.KEYS.values()) | set(renamed.VALUES) <= keys
    assert not set(renamed.KEYS) & keys
    for key, values in renamed.VALUES.items():
        for former, now in values.items():
            assert config.coerce(key, now) == now
            with pytest.raises(UsageError):
                config.coerce(key, former)


# --- other implementations' names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--lr", "--learning-rate"),
        ("--total-timesteps", "--frames (emulator frames, 4 for each agent step)"),
        ("--total_timesteps", "--frames (emulator frames, 4 for each agent step)"),
        ("--num-frames", "--frames"),
        ("--buffer-size", "--replay-capacity"),
        ("--train-frequency", "--update-period"),
        ("--target-update-interval", "--target-period"),
        ("--target-network-frequency", "--target-period"),
        ("--env-id", "--game"),
        ("--n-envs", "--num-envs"),
        ("--exploration-final-eps", "--epsilon-end"),
        ("--eval-freq=5", "--evaluation-period"),
        ("--terminal-on-life-loss", "--life-loss-terminal"),
    ],
)
def test_a_flag_of_another_implementation_suggests_ours(flag: str, ours: str) -> None:
    with pytest.raises(UsageError) as error:
        train(["--game", "Pong", flag, "3"])
    name = flag.partition("=")[0].replace("_", "-")
    assert str(error.value) == f"unknown flag {name}. Did you mean {ours}?"


def test_a_key_of_another_implementation_in_a_file_suggests_ours(tmp_path: Path) -> None:
    file = _written(tmp_path / "theirs.yaml", "buffer_size: 1000\n")
    with pytest.raises(UsageError, match=r"unknown key 'buffer_size'\. Did you mean 'replay_capacity'\?"):
        config.load(config_file=file)


def test_every_suggestion_is_a_key_and_no_key_of_ours_is_taken_for_another() -> None:
    keys = {field.name for field in fields(TrainConfig)}
    assert set(SYNONYMS.values()) <= keys
    assert not set(SYNONYMS) & keys


def test_help_names_what_others_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("train frequency", "target update interval", "0 disables clipping", "log interval"):
        assert words in text, words
