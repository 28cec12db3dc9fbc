"""What happens at which agent step, determinism, interruption and resume; on real emulators with small networks."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agents.backends import make_backend
from agents.dqn import DQN
from wn_rl.atari.env import make_atari
from wn_rl.config import TrainConfig, from_mapping, load, resolve
from wn_rl.errors import CheckpointError, NonFiniteLossError, UsageError
from wn_rl.replay import Minibatch, Replay
from wn_rl.runs import checkpoint
from wn_rl.training import TrainEvent, TrainingLoop, epsilon_at, scheduled_events
from wn_rl.training.resume import open_for_resume
from wn_rl.training.schedule import updates_owed
from wn_rl.training.session import train

TINY = {
    "game": "breakout",
    "param": "wn",
    "frames": 1600,
    "num_envs": 3,
    "num_threads": 1,
    "hidden_units": 16,
    "batch_size": 4,
    "learning_starts": 100,
    "target_period": 50,
    "replay_capacity": 250,
    "epsilon_decay_steps": 200,
    "init_samples": 16,
    "evaluation_period": 200,
    "evaluation_episodes": 1,
    "evaluation_envs": 1,
    "max_frames_per_episode": 400,
    "checkpoint_period": 150,
    "log_period": 60,
    "precision": "float32",
}


def tiny(**changes: object) -> TrainConfig:
    return resolve(replace(load("quick"), **(TINY | changes)))


class RecordingDQN(DQN):
    """A DQN that notes what was asked of it, with a reading of its surroundings at that moment."""

    def __init__(self, config: TrainConfig, num_actions: int, device: torch.device) -> None:
        super().__init__(config, num_actions, device)
        self.events: list[tuple[TrainEvent, int]] = []
        self.read: Callable[[], int] = lambda: 0

    def update(self, batch: Minibatch) -> None:
        self.events.append((TrainEvent.UPDATE, self.read()))
        self.updates += 1

    def copy_target(self) -> None:
        self.events.append((TrainEvent.TARGET_COPY, self.read()))

    def initialize(self, observations: torch.Tensor) -> None:
        self.events.append((TrainEvent.INITIALIZE, self.read()))


@pytest.mark.parametrize(("num_envs", "target_period"), [(1, 30), (3, 30), (16, 30), (16, 3)])
def test_events_happen_at_the_agent_steps_of_the_schedule(num_envs: int, target_period: int) -> None:
    config = tiny(num_envs=num_envs, learning_starts=50, target_period=target_period, max_frames_per_episode=60)
    env = make_atari("breakout", num_envs, seed=5, max_frames_per_episode=config.max_frames)
    agent = RecordingDQN(config, env.num_actions, torch.device("cpu"))
    replay = Replay(config.replay_capacity, num_envs)
    agent.read = lambda: replay.index_range[1]
    loop = TrainingLoop(config, env, make_backend(agent, replay), replay)
    loop.start()
    expected: list[tuple[TrainEvent, int]] = []
    resets = 0
    for _ in range(400 // num_envs):
        before = loop.agent_steps
        assert before == replay.index_range[1]
        loop.vector_step()
        resets += num_envs - (loop.agent_steps - before)
        for step in range(before + 1, loop.agent_steps + 1):
            # An update sees the transitions of the vector steps before its own, whatever its number.
            if step == 50:
                expected.append((TrainEvent.INITIALIZE, before))
            if step >= 50 and step % 4 == 0:
                expected.append((TrainEvent.UPDATE, before))
            if step >= 50 and step % target_period == 0:
                expected.append((TrainEvent.TARGET_COPY, before))
        assert agent.events == expected
    assert resets > 0
    assert len(expected) > 50


@given(cuts=st.lists(st.integers(1, 40), max_size=20))
def test_owed_events_do_not_depend_on_how_the_steps_are_cut_into_vector_steps(cuts: list[int]) -> None:
    config = tiny(learning_starts=17, update_period=4, target_period=10)
    whole = list(scheduled_events(config, 1, sum(cuts)))
    pieces, first = [], 1
    for cut in cuts:
        pieces += scheduled_events(config, first, first + cut - 1)
        updates = sum(event is TrainEvent.UPDATE for _, event in scheduled_events(config, first, first + cut - 1))
        assert updates_owed(config, first, first + cut - 1) == updates
        first += cut
    assert pieces == whole


def test_owed_events_written_out() -> None:
    config = tiny(learning_starts=8, update_period=4, target_period=6)
    assert list(scheduled_events(config, 1, 16)) == [
        (8, TrainEvent.INITIALIZE),
        (8, TrainEvent.UPDATE),
        (12, TrainEvent.UPDATE),
        (12, TrainEvent.TARGET_COPY),
        (16, TrainEvent.UPDATE),
    ]


def test_epsilon_decays_linearly_after_the_warm_up() -> None:
    config = tiny(learning_starts=100, epsilon_decay_steps=1000, epsilon_start=1.0, epsilon_end=0.1)
    np.testing.assert_allclose(
        epsilon_at(config, np.array([1, 100, 600, 1100, 9999])), [1.0, 1.0, 0.55, 0.1, 0.1], rtol=1e-6
    )


OTHER_CADENCE = {
    "log_period": 33,
    "evaluation_period": 90,
    "checkpoint_period": 10**6,
    "evaluation_envs": 2,
}


def run(directory: Path, config: TrainConfig) -> dict[str, torch.Tensor]:
    assert train(config, DQN, directory) == 0
    return checkpoint.load(directory).weights


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of ``tiny()``, to be read only."""
    directory = tmp_path_factory.mktemp("finished")
    run(directory, tiny())
    return directory


def test_same_seed_gives_same_weights_whatever_is_logged_evaluated_or_saved_when(
    finished: Path, tmp_path: Path
) -> None:
    first = checkpoint.load(finished).weights
    again = run(tmp_path / "b", tiny(emulator_threads=1))
    other_cadence = run(tmp_path / "c", tiny(**OTHER_CADENCE))
    assert equal(first, again)
    assert equal(first, other_cadence)
    assert (finished / "episodes.csv").read_text() == (tmp_path / "b" / "episodes.csv").read_text()
    assert not equal(first, run(tmp_path / "d", tiny(seed=2)))


@pytest.mark.slow
def test_same_seed_gives_same_weights_without_weight_normalization(tmp_path: Path) -> None:
    first = run(tmp_path / "a", tiny(param="standard"))
    assert equal(first, run(tmp_path / "b", tiny(param="standard", emulator_threads=1, **OTHER_CADENCE)))


def test_a_resume_with_a_value_out_of_range_is_refused_and_touches_nothing(finished: Path) -> None:
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    for key, value in {
        "evaluation_steps": -1,
        "num_threads": 5000,
        "evaluation_period": 0,
        "log_period": 0,
        "checkpoint_period": -3,
        "evaluation_envs": 0,
        "frames": -5,
    }.items():
        with pytest.raises(UsageError, match=key):
            open_for_resume(finished, {key: value})
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


def test_a_resume_understands_another_way_of_writing_the_same(tmp_path: Path) -> None:
    run(tmp_path, tiny(param="bn", frames=800))
    config, _ = open_for_resume(tmp_path, {"game": "BREAKOUT", "param_options": {"rate": "1e-1", "eps": "0.000001"}})
    assert (config.game, config.param_options) == ("Breakout", {"eps": 1e-6, "rate": 0.1})
    with pytest.raises(UsageError, match="param_options is"):
        open_for_resume(tmp_path, {"param_options": {"rate": "0.5"}})
    with pytest.raises(UsageError, match=r"param_options: .* no option 'speed'"):
        open_for_resume(tmp_path, {"param_options": {"speed": "1"}})


def test_a_run_directory_holds_what_it_promises(finished: Path) -> None:
    config = tiny()
    assert from_mapping(yaml.safe_load((finished / "config.yaml").read_text())) == replace(
        config, device="cpu", compile="off", backend="eager"
    )
    with open(finished / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["frames", "episodes", "mean", "std", "min", "max", "mean_length", "seconds"]
    assert [int(row["frames"]) // 4 // 200 for row in rows] == [1, 2]
    with open(finished / "episodes.csv") as file:
        episodes = list(csv.DictReader(file))
    assert list(episodes[0]) == ["frames", "return", "length"]
    assert all(float(episode["length"]) <= 100 for episode in episodes)  # the cap of 400 frames
    summary = json.loads((finished / "summary.json").read_text())
    for key in ("game", "param", "preset", "seed", "frames", "final_evaluation", "best_evaluation", "wall_seconds"):
        assert summary[key] is not None
    assert summary["updates"] == sum(
        event is TrainEvent.UPDATE for _, event in scheduled_events(config, 1, summary["agent_steps"])
    )
    assert summary["frames_per_second"] > 0
    assert summary["updates_per_second"] > 0
    assert {"torch", "ale-py", "python"} <= summary["versions"].keys()
    for name in ("latest", "best"):
        assert checkpoint.load(finished / "checkpoints" / name).config.game == "Breakout"
    assert list(finished.glob("events.out.tfevents.*"))
    with pytest.raises(UsageError, match="already holds a run"):
        train(config, DQN, finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    class Interrupting(DQN):
        def update(self, batch: Minibatch) -> None:
            super().update(batch)
            if self.updates == 40:
                os.kill(os.getpid(), number)

    config = tiny(frames=10**7)
    assert train(config, Interrupting, tmp_path) == code
    saved = checkpoint.load(tmp_path)
    frames = saved.agent_steps * 4
    assert saved.training["agent"]["updates"] == 40  # the vector step ended, and no other was begun
    assert not json.loads((tmp_path / "summary.json").read_text())["finished"]

    resumed, saved = open_for_resume(tmp_path, {"frames": frames + 800})
    assert train(resumed, DQN, tmp_path, resume=saved) == 0
    ended = checkpoint.load(tmp_path)
    assert frames + 800 <= ended.agent_steps * 4 < frames + 800 + 4 * config.num_envs
    assert int(ended.training["agent"]["updates"]) > int(saved.training["agent"]["updates"])
    with open(tmp_path / "evaluations.csv") as file:
        evaluated = [int(row["frames"]) for row in csv.DictReader(file)]
    assert evaluated == sorted(set(evaluated))
    assert evaluated[-1] == ended.agent_steps * 4


def test_resume_refuses_another_experiment_by_name(tmp_path: Path) -> None:
    run(tmp_path, tiny(frames=800))
    with pytest.raises(UsageError, match=r"gamma is 0\.99 in this run and cannot change to 0\.5"):
        open_for_resume(tmp_path, {"gamma": 0.5})
    config, saved = open_for_resume(tmp_path, {"gamma": 0.99, "frames": 10})
    assert config.frames == 10
    with pytest.raises(UsageError, match="is finished"):
        train(config, DQN, tmp_path, resume=saved)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_for_resume(tmp_path / "nothing", {})


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Diverging(DQN):
        def update(self, batch: Minibatch) -> None:
            super().update(batch)
            if self.updates == 60:
                with torch.no_grad():
                    self.q_network.output.bias.fill_(math.nan)

    with pytest.raises(NonFiniteLossError, match="the last good checkpoint is kept"):
        train(tiny(frames=4000, checkpoint_period=10), Diverging, tmp_path)
    saved = checkpoint.load(tmp_path)
    assert 0 < int(saved.training["agent"]["updates"]) <= 60
    assert all(bool(weight.isfinite().all()) for weight in saved.weights.values())


def test_wn_is_initialized_from_replayed_observations_at_learning_starts() -> None:
    config = tiny(param="wn", num_envs=2, target_period=1000)
    env = make_atari("breakout", 2, seed=1)
    agent = DQN(config, env.num_actions, torch.device("cpu"))
    replay = Replay(config.replay_capacity, 2)
    loop = TrainingLoop(config, env, make_backend(agent, replay), replay)
    loop.start()
    while loop.agent_steps < config.learning_starts - 2:
        loop.vector_step()
    before = {name: value.clone() for name, value in agent.q_network.state_dict().items()}
    state = replay.generator.get_state()
    observations = replay.sample(config.init_samples).observations
    replay.generator.set_state(state)
    loop.vector_step()  # initialization, then the first update
    assert agent.updates == 1
    scale = "output.parametrizations.weight.original0"
    assert not torch.equal(before[scale], agent.q_network.state_dict()[scale])
    target = agent.target_network(observations)  # copied at the initialization, not touched by the update
    torch.testing.assert_close(target.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.std(0, correction=0), torch.full((4,), 0.1), atol=1e-3, rtol=0)
