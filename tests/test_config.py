"""Presets, files and flags give a checked configuration; nonsense is one line that names the key."""

from __future__ import annotations

import functools
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wn_rl.config import (
    TrainConfig,
    configure,
    from_mapping,
    load,
    parse_count,
    preset_names,
    read_yaml,
    resolve,
    to_yaml,
)
from wn_rl.errors import UsageError

KEYS = [entry.name for entry in fields(TrainConfig)]


@pytest.mark.parametrize(
    ("text", "value"),
    [("200M", 200_000_000), ("2e6", 2_000_000), ("500k", 500_000), ("1_000", 1000), ("1.5M", 1_500_000), ("-3", -3)],
)
def test_counts_are_read_as_people_write_them(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "1.5", "2e-3", "nan", "inf", "1e999", "12x", "0x10", "1 2", "--3"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_count(text)


@given(st.integers(-(10**15), 10**15))
def test_every_integer_reads_back(value: int) -> None:
    assert parse_count(str(value)) == value
    assert parse_count(f"{value:_}") == value


def test_presets_hold_the_papers_settings() -> None:
    assert preset_names() == ("machado", "nature", "paper", "quick")
    paper = resolve(replace(load("paper"), game="breakout", param="wn"))
    assert (paper.optimizer, paper.adam_beta1, paper.batch_size, paper.learning_rate) == ("adamax", 0.5, 64, 3e-4)
    assert resolve(replace(load(), game="breakout", param="standard")).learning_rate == 1e-4
    assert (paper.frames, paper.evaluation_period, paper.evaluation_steps) == (200_000_000, 250_000, 125_000)
    assert (paper.data_dependent_init, paper.weight_init) == (True, "normal")
    nature = resolve(replace(load("nature"), game="breakout", param="standard"))
    assert (nature.optimizer, nature.rmsprop_decay, nature.optimizer_eps) == ("rmsprop_mnih", 0.95, 0.01)
    assert (nature.batch_size, nature.learning_rate, nature.max_frames) == (32, 2.5e-4, 18_000)
    assert (nature.data_dependent_init, nature.weight_init) == (False, "torch")
    machado = load("machado")
    assert (machado.sticky_actions, machado.full_action_set, machado.life_loss_terminal) == (0.25, True, False)
    quick = load("quick")
    assert quick.learning_starts <= 10_000
    assert quick.evaluation_period * 4 <= 60_000
    assert quick.checkpoint_period * 4 <= 60_000


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_pins_what_changes_results_and_its_yaml_round_trips(preset: str, tmp_path: Path) -> None:
    keys = yaml.safe_load((Path(__file__).parents[1] / "configs" / f"{preset}.yaml").read_text())
    assert {"preset", "frames", "num_envs", "batch_size", "optimizer", "replay_capacity"} <= keys.keys()
    config = resolve(replace(load(preset), game="pong", param="standard", seed=7))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resolve(load(None, tmp_path / "config.yaml")) == config
    assert from_mapping(yaml.safe_load(to_yaml(config))) == config


def test_a_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: quick\nframes: 3M\ngamma: 0.5\nlearning_rate: null\n")
    config = load(None, file)
    assert (config.preset, config.frames, config.gamma, config.batch_size) == ("quick", 3_000_000, 0.5, 32)
    assert load("nature", file).optimizer == "rmsprop_mnih"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "mapping"),
        ("", "mapping"),
        ("gamma: [1\n", "not valid YAML"),
        ("gamma: 0.9\ngamma: 0.8\n", "appears twice"),
        ("gama: 0.9\n", "unknown key 'gama'. Did you mean 'gamma'"),
        ("gamma: much\n", "gamma: 'much' is not a number"),
        ("frames: 1.5\n", "frames: 1.5 is not a whole number"),
        ("frames: true\n", "frames: True is not a whole number"),
        ("frames: .inf\n", "frames: inf is not a whole number"),
        ("full_action_set: 1\n", "full_action_set: 1 is not true or false"),
        ("device: tpu\n", "device: 'tpu' is not one of auto, cpu, cuda"),
        ("game: 5\n", "game: 5 is not a text"),
        ("learning_rates: 3\n", "learning_rates: 3 is not a mapping"),
        ("x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(").replace("[", r"\[")) as error:
        read_yaml(file)
    assert str(file) in str(error.value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_yaml(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="not a text file"):
        read_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 0},
        {"gamma": math.nan},
        {"gamma": 1.5},
        {"epsilon_end": -0.1},
        {"learning_rate": math.inf},
        {"num_envs": 0},
        {"batch_size": -1},
        {"sticky_actions": 1.0},
        {"seed": -1},
        {"replay_capacity": 4},
        {"learning_starts": 8},
        {"output_init_std": 0.0},
        {"learning_rates": {"wn": math.nan, "standard": 1e-4}},
        {"game": ""},
        {"game": "Brekout"},
        {"param": "wm"},
    ],
)
def test_values_out_of_range_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes)) if "param" not in changes else "wm"):
        resolve(replace(load("quick"), **({"game": "breakout"} | changes)))


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.one_of(st.text(max_size=3), st.floats(), st.none()), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(KEYS), value=anything)
@example(key="learning_rates", value={"\n": 0.0})
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key: str, value: object) -> None:
    values = {entry.name: getattr(resolved(), entry.name) for entry in fields(TrainConfig)} | {key: value}
    try:
        config = from_mapping(values)
    except UsageError as error:
        refusal = str(error)
    else:
        refusal = ""
        allowed = (type(getattr(resolved(), key)), type(None), str, float, bool)
        assert type(getattr(config, key)) in allowed
    assert "\n" not in refusal


@functools.cache
def resolved() -> TrainConfig:
    return resolve(replace(load("quick"), game="breakout", run_dir="somewhere"))


# --- what was chosen and what was derived ------------------------------------------------------------------------


def run_of(tmp_path: Path, preset: str | None = None, **given: Any) -> Path:
    """The config.yaml that a run with these flags writes."""
    config, _ = configure(preset, None, {"game": "Breakout", **given})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(replace(resolve(config), device="cpu", backend="eager", compile="off")))
    return file


def plain(preset: str | None, **given: Any) -> TrainConfig:
    return replace(resolve(configure(preset, None, {"game": "Breakout", **given})[0]), chosen=())


@pytest.mark.parametrize("before", ["standard", "wn", "bn", "wn_projected"])
@pytest.mark.parametrize("after", ["standard", "wn", "sn", "ln"])
def test_another_parameterization_derives_its_own_settings(before: str, after: str, tmp_path: Path) -> None:
    """Learning rate, initialization, layers and options are those of the new one, as if it had been named at first."""
    file = run_of(tmp_path, "quick", param=before)
    config, told = configure(None, file, {"param": after})
    assert replace(resolve(config), chosen=()) == plain("quick", param=after)
    assert (told == "") == (before == after)
    if told:
        assert (
            told == f"{file}: kept, as chosen there: game Breakout, preset quick; the rest follows from param {after}"
        )


def test_what_was_chosen_stays_under_another_parameterization_and_preset(tmp_path: Path) -> None:
    file = run_of(tmp_path, "quick", param="standard", learning_rate=7e-4, data_dependent_init=True, batch_size=16)
    config, told = configure(None, file, {"param": "wn"})
    found = resolve(config)
    assert (found.param, found.learning_rate, found.data_dependent_init) == ("wn", 7e-4, True)
    assert "batch_size 16, data_dependent_init True, game Breakout, learning_rate 0.0007" in told
    config, told = configure("nature", file, {})
    found = resolve(config)
    assert (found.preset, found.optimizer, found.batch_size, found.learning_rate) == (
        "nature",
        "rmsprop_mnih",
        16,
        7e-4,
    )
    assert found.replay_capacity == 1_000_000
    assert told.endswith("the rest follows from preset nature")
    again, _ = configure(None, file, {"param": "wn", "learning_rate": 1e-5})
    assert again.learning_rate == 1e-5
    assert "learning_rate" in again.chosen


def test_options_of_one_parameterization_are_not_anothers(tmp_path: Path) -> None:
    file = run_of(tmp_path, param="wn", param_options={"g": "exp"})
    assert resolve(configure(None, file, {})[0]).param_options == {"g": "exp"}
    assert resolve(configure(None, file, {"param": "standard"})[0]).param_options == {}
    assert resolve(configure(None, file, {"param": "sn"})[0]).param_options == {"iterations": 1, "eps": 1e-12}


def test_a_file_alone_repeats_the_run_and_the_machine_is_asked_anew(tmp_path: Path) -> None:
    file = run_of(tmp_path, "quick", param="wn", seed=4)
    config, told = configure(None, file, {})
    assert told == ""
    assert (config.device, config.backend, config.compile) == ("auto", "auto", "auto")
    assert replace(resolve(config), chosen=()) == plain("quick", param="wn", seed=4)
    chosen = run_of(tmp_path, "quick", device="cpu", compile="off")
    assert configure(None, chosen, {})[0].device == "cpu"
    assert configure(None, chosen, {})[0].compile == "off"
    assert "device" not in configure("quick", None, {"device": "auto"})[0].chosen


def test_the_same_from_python_without_configure(tmp_path: Path) -> None:
    file = run_of(tmp_path, "quick", param="standard")
    found = resolve(replace(load(None, file), param="wn"))
    assert replace(found, chosen=()) == plain("quick", param="wn")


def test_a_file_of_an_earlier_version_says_no_choice_so_what_is_no_default_counts_as_one(tmp_path: Path) -> None:
    file = run_of(tmp_path, "quick", param="standard", learning_rate=7e-4, seed=3)
    values = yaml.safe_load(file.read_text())
    del values["chosen"], values["backend"]
    file.write_text(yaml.safe_dump(values))
    config, told = configure(None, file, {"param": "wn"})
    found = resolve(config)
    assert (found.learning_rate, found.data_dependent_init, found.seed) == (7e-4, True, 3)
    assert "kept, which are no defaults there: game Breakout, learning_rate 0.0007, seed 3" in told


def test_a_file_by_hand_is_chosen_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: quick\nlearning_rate: 0.002\nparam: standard\n")
    config, told = configure(None, file, {"game": "Breakout", "param": "wn"})
    assert told == ""
    assert resolve(config).learning_rate == 0.002
    assert config.chosen == ("game", "learning_rate", "param", "preset")


@pytest.mark.parametrize(("preset", "param"), [("nature", "standard"), ("machado", "standard"), ("paper", "wn")])
def test_presets_of_papers_without_weight_norm_train_without_it(preset: str, param: str) -> None:
    assert load(preset).param == param
    assert resolve(configure(preset, None, {"game": "Breakout", "param": "wn"})[0]).param == "wn"
