"""--num-envs auto: what it chooses, and that a run keeps the number, not the word."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.backends.eager import Eager
from agents.dqn import DQN
from tests.small_runs import Interrupted, tiny
from wn_rl import cli, machine
from wn_rl.atari.env import make_atari
from wn_rl.config import (
    AUTO,
    TrainConfig,
    from_mapping,
    is_auto,
    load,
    parse_num_envs,
    preset_names,
    read_yaml,
    resolve,
    to_yaml,
    validate,
)
from wn_rl.errors import UsageError
from wn_rl.machine import choose_num_envs, cores, describe_num_envs, resolve_device
from wn_rl.replay import Replay
from wn_rl.training import TrainingLoop
from wn_rl.training.resume import open_for_resume
from wn_rl.training.session import train


@pytest.mark.parametrize(
    ("usable_cores", "device", "expected"),
    [
        (1, "cpu", 8),
        (2, "cpu", 16),
        (8, "cpu", 64),
        (96, "cpu", 64),
        (2, "cuda", 32),
        (16, "cuda", 256),
        (64, "cuda", 512),
    ],
)
def test_the_choice_by_hand(usable_cores: int, device: str, expected: int) -> None:
    """8 a core on a CPU and 64 at most; 16 a core beside a GPU and 512 at most."""
    assert choose_num_envs(load("paper"), usable_cores, device) == expected  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(usable=st.integers(1, 300), capacity=st.integers(1, 2000), starts=st.integers(2, 2000), gpu=st.booleans())
def test_whatever_is_chosen_is_valid(usable: int, capacity: int, starts: int, gpu: bool) -> None:
    config = replace(load("paper"), replay_capacity=capacity, learning_starts=starts)
    chosen = choose_num_envs(config, usable, "cuda" if gpu else "cpu")
    assert 1 <= chosen <= 512
    validate(replace(config, num_envs=chosen))


def test_auto_is_a_word_and_not_a_number() -> None:
    assert parse_num_envs("auto") is AUTO
    assert parse_num_envs("512") == 512
    assert str(AUTO) == repr(AUTO) == "auto"
    assert is_auto(copy.deepcopy(AUTO))
    assert not is_auto(0)
    for wrong in ("Auto!", "", "sixteen"):
        with pytest.raises(ValueError, match=r"not a count.*, nor auto"):
            parse_num_envs(wrong)
    config = cli.parse(TrainConfig, ["--game", "Breakout", "--num-envs", "auto"], default=load("quick"))
    assert is_auto(config.num_envs)
    assert is_auto(resolve(config).num_envs)
    with pytest.raises(UsageError, match="num_envs must be from 1 to 4,096, not 0"):
        resolve(cli.parse(TrainConfig, ["--game", "Breakout", "--num-envs", "0"], default=load("quick")))


@pytest.mark.parametrize("num_envs", [1, 2, 511, 512])
def test_one_to_512_emulators_are_accepted(num_envs: int) -> None:
    assert resolve(replace(load("paper"), game="Breakout", num_envs=num_envs)).num_envs == num_envs


def test_presets_say_their_number() -> None:
    for name in preset_names():
        assert not is_auto(load(name).num_envs)
        assert "num_envs" in read_yaml(Path(__file__).parents[1] / "configs" / f"{name}.yaml")


def test_a_file_may_say_auto_and_a_checkpoint_may_not(tmp_path: Path) -> None:
    config = resolve(replace(load("quick"), game="Breakout", num_envs=AUTO))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert is_auto(load(config_file=tmp_path / "config.yaml").num_envs)
    with pytest.raises(UsageError, match="not the number that was chosen"):
        from_mapping(asdict(config) | {"num_envs": "auto"})


def test_resolving_chooses_and_checks() -> None:
    config = resolve(replace(load("quick"), game="Breakout", num_envs=AUTO, device="cpu"))
    resolved = resolve_device(config)
    assert resolved.num_envs == min(8 * cores(), 64)
    assert type(resolved.num_envs) is int
    assert f"num_envs auto: {resolved.num_envs} emulators, since there are {cores()} cores" in describe_num_envs(
        resolved
    )
    with pytest.raises(UsageError, match="learning_starts 1 must be larger"):
        resolve_device(replace(config, learning_starts=1))


def test_a_run_says_what_it_chose_and_goes_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ENVS_PER_CORE", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(machine, "cores", lambda: 1)  # every emulator takes time to load its game
    Interrupted.after = [3]
    config = replace(tiny(frames=10**6), num_envs=AUTO, device="cpu")
    assert train(config, Interrupted, tmp_path) == 143
    expected = 2
    printed = capsys.readouterr()
    assert f"num_envs auto: {expected} emulators" in " ".join((printed.out + printed.err).split())
    assert f"num_envs: {expected}\n" in (tmp_path / "config.yaml").read_text()
    for changes in ({}, {"num_envs": AUTO}, {"num_envs": expected}):
        config, saved = open_for_resume(tmp_path, changes)
        assert config.num_envs == saved.config.num_envs == expected
        assert not is_auto(config.num_envs)
    with pytest.raises(UsageError, match=f"num_envs is {expected} in this run and cannot change to {expected + 1}"):
        open_for_resume(tmp_path, {"num_envs": expected + 1})


@pytest.mark.slow
def test_512_emulators_train() -> None:
    """Slow since each loads its game."""
    config = replace(tiny(num_envs=512, learning_starts=600, replay_capacity=2000, update_period=64), device="cpu")
    env = make_atari("breakout", 512)
    agent = DQN(config, env.num_actions, torch.device("cpu"))
    replay = Replay(config.replay_capacity, 512)
    loop = TrainingLoop(config, env, Eager(agent, replay), replay)
    loop.start()
    for _ in range(4):
        loop.vector_step()
    env.close()
    assert loop.agent_steps == 4 * 512
    # Steps 640, 704, … 2048: every 64th from 600 on.
    assert agent.updates == len([step for step in range(600, 2049) if step % 64 == 0])
    assert np.isfinite(agent.read_statistics().loss)
