"""The project from Python: load, train and evaluate give what the commands give."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wn_rl
from agents.dqn import DQN
from tests.small_runs import tiny
from wn_rl.errors import UsageError
from wn_rl.evaluation.scoring import score_checkpoint

KEYS: dict[str, Any] = {
    key: value
    for key, value in asdict(tiny(frames=800, param="wn")).items()
    if key not in ("run_dir", "param_layers", "chosen") and value is not None
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wn_rl.train(run_dir=tmp_path_factory.mktemp("runs") / "one", quiet=True, **KEYS)


def test_a_run_is_trained_scored_and_gone_on_with(run: Path, tmp_path: Path) -> None:
    assert (run / "config.yaml").exists()
    score = wn_rl.evaluate(str(run), episodes=2, seed=3, max_frames_per_episode=200, device="cpu")
    same = score_checkpoint(run, episodes=2, seed=3, max_frames_per_episode=200, device="cpu")
    assert score.result.scores.tolist() == same.result.scores.tolist()
    assert len(score.result.episodes) == 2
    again = wn_rl.train(tiny(frames=800, param="wn"), run_dir=tmp_path / "again", quiet=True)
    assert wn_rl.train(resume=True, run_dir=again, frames=1000, quiet=True) == again
    assert "frames: 1000" in (again / "config.yaml").read_text()


def test_a_loaded_network_predicts_and_its_q_values_are_the_networks(run: Path) -> None:
    for source in (run, str(run / "checkpoints" / "latest")):
        policy = wn_rl.load(source, device="cpu")
        assert policy.game == "Breakout"
        assert policy.config is not None
        assert policy.config.param == "wn"
        states = np.random.default_rng(0).integers(0, 256, (5, 4, 84, 84), np.uint8)
        q_values = policy.q_values(states)
        with torch.no_grad():
            expected = policy.network(torch.from_numpy(states)).numpy()
        assert np.array_equal(q_values, expected)
        actions = policy.predict(states)
        assert actions.dtype == np.int64
        assert actions.tolist() == expected.argmax(1).tolist()
        assert int(policy.predict(states[2])) == actions[2]
        np.testing.assert_allclose(policy.q_values(states[2]), expected[2], rtol=1e-4, atol=1e-5)


def test_epsilon_is_the_probability_of_a_random_action(run: Path) -> None:
    policy = wn_rl.load(run, device="cpu")
    states = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 4, 84, 84), np.uint8), 400, axis=0)
    greedy = policy.predict(states[:1])[0]
    taken = policy.predict(states, epsilon=0.4, generator=np.random.default_rng(5))
    others = float((taken != greedy).mean())
    assert abs(others - 0.4 * 3 / 4) < 4 * np.sqrt(0.3 * 0.7 / 400)
    again = policy.predict(states, epsilon=0.4, generator=np.random.default_rng(5))
    assert taken.tolist() == again.tolist()


def test_emulators_have_the_settings_of_the_training(run: Path) -> None:
    policy = wn_rl.load(run, device="cpu")
    env = policy.make_env(2, seed=4)
    observations, _ = env.reset(seed=4)
    assert observations.shape == (2, *policy.network.spec.observation_shape)
    assert env.step(policy.predict(observations))[1].shape == (2,)
    env.close()


def test_an_agent_of_ones_own_is_trained(tmp_path: Path) -> None:
    calls = []

    class Own(DQN):
        def td_loss(self, batch: Any) -> Any:
            calls.append(len(batch.actions))
            return super().td_loss(batch)

    wn_rl.train(agent=Own, run_dir=tmp_path / "own", quiet=True, **KEYS)
    assert len(calls) == 100 // 4 + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: wn_rl.train(gane="Breakout"), "unknown configuration key 'gane'"),
        (lambda run: wn_rl.train(param="wn"), "no game is named"),
        (lambda run: wn_rl.train(game="Breakout", frames="many"), "frames: 'many' is not a whole number"),
        (lambda run: wn_rl.train(resume=True), "resume needs run_dir"),
        (lambda run: wn_rl.evaluate(run, episode=3), "unknown setting 'episode'"),
        (lambda run: wn_rl.load(run, device="cpu").q_values(np.zeros((84, 84, 4), np.uint8)), "uint8 of shape"),
        (lambda run: wn_rl.load(run, device="cpu").q_values(np.zeros((4, 84, 84))), "not float64 of shape"),
        (lambda run: wn_rl.load(run, device="cpu").predict(np.zeros((4, 84, 84), np.uint8), epsilon=2), "probability"),
    ],
)
def test_mistakes_are_one_clear_line(run: Path, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call(run)
    assert "\n" not in str(caught.value)


def test_the_tour_runs_from_its_first_cell_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/tour.py as it stands, but for the length of the training and of the episodes."""
    source = (Path(__file__).parents[1] / "docs" / "tour.py").read_text(encoding="utf-8")
    for what, short in (("FRAMES = 200_000", "FRAMES = 2_000"), ("episodes=5", "episodes=2, epsilon=1.0")):
        assert what in source
        source = source.replace(what, short)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "docs/tour.py", "exec"), {"__name__": "tour"})
    printed = capsys.readouterr().out
    assert "observations (4, 4, 84, 84) uint8" in printed
    assert "95% interval" in printed
