"""The video shows the episode that was scored, and beside each frame the Q-values of exactly that state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import evaluate
from wn_rl.atari.env import make_atari
from wn_rl.errors import UsageError, WnRlError
from wn_rl.evaluation import scoring
from wn_rl.evaluation.episodes import EvaluationProtocol
from wn_rl.evaluation.episodes import evaluate as score
from wn_rl.evaluation.policies import Trained
from wn_rl.networks import QNetworkSpec, build_q_network
from wn_rl.video import episode_video, saliency
from wn_rl.video.episode_video import EpisodeVideo
from wn_rl.video.q_value_panel import WIDTH
from wn_rl.video.recorded_episodes import EpisodeRecorder, RecordedEpisode, record_evaluation

SaveCheckpoint = Callable[..., Path]


def options(**changes: Any) -> dict[str, Any]:
    return {
        "noop_max": 30,
        "fire_reset": False,
        "sticky_actions": 0.0,
        "full_action_set": False,
        "max_frames_per_episode": None,
    } | changes


def network(actions: int) -> torch.nn.Module:
    return build_q_network(QNetworkSpec(actions, "wn", hidden_units=16), seed=5).eval()


CASES = [
    ("Breakout", {"fire_reset": True, "max_frames_per_episode": 201}),
    ("Breakout", {"sticky_actions": 0.25, "max_frames_per_episode": 200}),
    ("SpaceInvaders", {"max_frames_per_episode": 150, "full_action_set": True}),
]


@pytest.mark.parametrize(("game", "changes"), CASES)
def test_the_episodes_of_a_video_are_those_that_are_scored(game: str, changes: dict[str, Any]) -> None:
    """Scores, lengths, actions, rewards, ends and every observation, over several games of each of two emulators."""
    given = options(**changes)
    protocol = EvaluationProtocol(epsilon=0.3, episodes=5)
    env = make_atari(game, 2, num_threads=1, **given)
    q_values = network(env.num_actions)
    recorded, games = record_evaluation(q_values, env, protocol, seed=11)

    # The evaluation that scores, watched from outside: what the network saw, and what came of it.
    seen: list[list[Tensor]] = []
    open_games: list[int] = []
    rewards: list[list[float]] = []

    @torch.no_grad()
    def watched(observations: Tensor) -> Tensor:
        if not open_games:
            open_games.extend(range(2))
            seen.extend([] for _ in range(2))
            rewards.extend([] for _ in range(2))
        for slot in range(2):
            seen[open_games[slot]].append(observations[slot].clone())
        found: Tensor = q_values(observations).argmax(1)
        return found

    def after(came: Any, terminated: Any, truncated: Any, info: Any) -> None:
        for slot in range(2):
            if info["is_reset"][slot]:
                seen[open_games[slot]].pop()  # of a step that ignored its action
                open_games[slot] = len(seen)
                seen.append([])
                rewards.append([])
            else:
                rewards[open_games[slot]].append(float(came[slot]))

    other = make_atari(game, 2, num_threads=1, **given)
    scored = score(watched, other, protocol, seed=11, on_step=after)
    env.close()
    other.close()
    assert recorded.episodes == scored.episodes
    assert [(g.score, g.length) for g in games] == [(e.score, e.length) for e in scored.episodes]
    assert {g.resets for g in games} > {0, 1}
    assert any(any(g.random) and not all(g.random) for g in games)
    for number in (0, 4):
        played = games[number]
        assert played.rewards == rewards[number]
        again = list(played.observations(game, given))
        assert len(again) == played.length == len(seen[number])
        assert all(np.array_equal(one, two.numpy()) for one, two in zip(again, seen[number], strict=True))
        for observation, noted, action, random in zip(
            again[::7], played.q_values[::7], played.actions[::7], played.random[::7], strict=True
        ):
            with torch.no_grad():
                q = q_values(torch.from_numpy(observation[None]))[0]
            np.testing.assert_allclose(noted, q.numpy(), atol=1e-5)
            assert random or action == int(noted.argmax())
        frames = list(played.frames(game, given))
        per_step = np.zeros(played.length)
        for frame in frames[1:]:
            per_step[frame.step] += frame.reward
            assert frame.action == played.actions[frame.step]
        assert per_step.tolist() == played.rewards
        assert frames[-1].step == played.length - 1
        assert [f.terminated or f.truncated for f in frames] == [False] * (len(frames) - 1) + [True]
        assert frames[-1].truncated == played.truncated
        assert frames[0].is_reset


def test_each_frame_has_the_q_values_of_the_state_that_it_shows() -> None:
    """The newest frame of an observation is the screen of its picture, made gray and small by another program."""
    given = options(max_frames_per_episode=400)
    env = make_atari("SpaceInvaders", 1, num_threads=1, **given)
    q_values = network(env.num_actions)
    _, (game, *_) = record_evaluation(q_values, env, EvaluationProtocol(epsilon=0.5, episodes=1), seed=2)
    env.close()
    found = list(_video(game, "SpaceInvaders", q_values, given).rendered_frames())
    observations = list(game.observations("SpaceInvaders", given))
    assert len(found) == 401
    assert [decision for _, decision, _ in found] == [min(number // 4, 99) for number in range(401)]
    assert found[-1][2] == game.score
    off = []
    for number in range(8, 392, 16):
        decision = found[number][1]
        screens = [found[number - back][0].rgb for back in (0, 1)]
        gray = np.maximum(*(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY) for screen in screens))
        small = cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA).astype(int)
        off.append([np.abs(small - observations[decision + other][-1]).mean() for other in (0, -1, 1)])
    shown, before, after = np.array(off).T
    assert shown.max() < 0.5  # grays are rounded otherwise
    assert (before >= shown).all()
    assert (after >= shown).all()
    assert min(before.mean(), after.mean()) > 5 * shown.mean()
    for (_, _, earlier), (frame, _, later) in pairwise(found):
        assert later == earlier + frame.reward


def _video(game: RecordedEpisode, name: str, q_values: Any, given: dict[str, Any], **more: Any) -> EpisodeVideo:
    trained = Trained(Path(), "wn_rl", q_values, name, "wn", full_action_set=False, frames=2_000_000)
    return EpisodeVideo(trained, game, [f"A{index}" for index in range(len(game.q_values[0]))], given, **more)


def made_up(rewards: list[float], seed: int = 1) -> RecordedEpisode:
    count = len(rewards)
    return RecordedEpisode(
        0, seed, 0, b"", [0] * count, [False] * count, [np.array([0.0, 1.0], np.float32)] * count, rewards
    )


def test_the_highest_scoring_part() -> None:
    """15 agent steps are a second. 100 points in the 40th second, 1 in each of the first ten."""
    rewards = [0.0] * 900
    for second in range(10):
        rewards[second * 15] = 1.0
    rewards[600] = 100.0
    begin = _video(made_up(rewards), "Breakout", None, options()).highest_scoring_start(5.0)
    assert begin <= 600 / 15 - 1 < 600 / 15 < begin + 5.0
    assert _video(made_up(rewards), "Breakout", None, options()).highest_scoring_start(60.0) == 0.0
    assert _video(made_up([0.0] * 900), "Breakout", None, options()).highest_scoring_start(5.0) == 0.0
    late = [0.0] * 899 + [7.0]
    assert _video(made_up(late), "Breakout", None, options()).highest_scoring_start(5.0) == pytest.approx(55.0)


def test_which_of_the_episodes() -> None:
    games = [made_up([float(points)]) for points in (3, 9, 1, 9, 5)]
    for index, game in enumerate(games):
        game.index = index
    assert episode_video._pick(games, "best") is games[1]
    assert episode_video._pick(games, "median") is games[4]
    assert episode_video._pick(games[:4], "median") is games[0]
    assert episode_video._pick(games, "4") is games[3]
    with pytest.raises(UsageError, match="only 5 episodes"):
        episode_video._pick(games, "6")


def test_an_episode_that_differs_from_the_recorded_one_is_an_error() -> None:
    given = options(max_frames_per_episode=100)
    env = make_atari("Breakout", 1, num_threads=1, **given)
    _, (game,) = record_evaluation(network(4), env, EvaluationProtocol(episodes=1), seed=2)
    env.close()
    game.rewards[3] += 1
    with pytest.raises(WnRlError, match="agent step 3 differs"):
        list(_video(game, "Breakout", None, given).frames())


def test_saliency_is_that_of_the_state_and_the_action_shown() -> None:
    given = options(max_frames_per_episode=120)
    env = make_atari("Breakout", 1, num_threads=1, **given)
    q_values = network(4)
    _, (game,) = record_evaluation(q_values, env, EvaluationProtocol(epsilon=0.5, episodes=1), seed=2)
    env.close()
    plain = list(_video(game, "Breakout", q_values, given).frames())
    layered = list(_video(game, "Breakout", q_values, given, with_saliency=True).frames(50, 30))
    observations = list(game.observations("Breakout", given))
    assert len(layered) == 30
    for number, picture in enumerate(layered, 50):
        decision = min(number // 4, 29)
        gradient = saliency.gradients(
            q_values, torch.from_numpy(observations[decision][None]), torch.tensor([game.actions[decision]])
        )
        expected = saliency.overlay(plain[number][:, :160], saliency.heat(gradient[0].numpy()))
        np.testing.assert_array_equal(picture[:, :160], expected)
        np.testing.assert_array_equal(picture[:, 160:], plain[number][:, 160:])


def test_a_recorder_asks_nothing_of_emulators() -> None:
    """A game by hand: two emulators, the second of which ends first and starts the third game."""
    answers = iter(torch.tensor([[[0.0, 1.0], [2.0, 1.0]]] * 3))
    recorder = EpisodeRecorder(lambda _: next(answers), np.array([5, 6], np.int32))
    info = {"is_reset": np.array([False, False])}
    flags = np.zeros(2, bool)
    for ended in (True, False, False):
        assert recorder.policy(torch.zeros(2, 4, 84, 84)).tolist() == [1, 0]
        recorder.before_step(np.array([1, 0]), np.array([False, True]))
        recorder.after_step(np.array([1.0, 2.0]), flags, flags, info)
        info = {"is_reset": np.array([False, ended])}
    first, second, third = recorder.episodes
    assert (first.seed, first.actions, first.rewards, first.resets) == (5, [1, 1, 1], [1.0] * 3, 0)
    assert (second.seed, second.actions, second.random, second.history) == (6, [0], [True], b"")
    assert (third.seed, third.actions, third.resets, third.history) == (6, [0], 1, bytes([0, 255]))


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, save_checkpoint: SaveCheckpoint) -> Path:
    return save_checkpoint(tmp_path / "run", "Breakout", "wn", max_frames_per_episode=160, seed=3)


def test_the_command_shows_a_scored_episode(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--episodes", "3", "--epsilon", "0.2", "--seed", "4", "--num-threads", "1"]
    wanted = scoring.score(run, scoring.How("training", {"episodes": 3, "epsilon": 0.2}, seed=4, num_threads=1))
    files = ["--video", str(tmp_path / "a.mp4"), "--gif", str(tmp_path / "a.gif"), "--saliency"]
    assert evaluate.main([str(run), *flags, *files, "--pick", "best", "--start", "0.5", "--seconds", "1.5"]) == 0
    said = capsys.readouterr().out.splitlines()
    best = int(wanted.result.scores.argmax())
    episode = wanted.result.episodes[best]
    assert said[0].startswith(
        f"episode {best + 1} of 3 (best), seed 4: {episode.score:g} points in {episode.length} agent steps"
    )
    assert "protocol training with epsilon, episodes changed: 3 episodes, ε 0.2" in said[0]
    assert said[1].startswith(f"90 frames written to {tmp_path / 'a.mp4'}")
    assert said[1].endswith("seconds 0.5 to 2.0 of 2.7")
    assert said[2].startswith(f"30 frames written to {tmp_path / 'a.gif'}")
    video = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 60
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 90
    assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (3 * (160 + WIDTH), 630)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 30
        assert gif.size == (2 * (160 + WIDTH), 420)


def test_without_flags_one_whole_episode_is_shown(run: Path, tmp_path: Path) -> None:
    assert evaluate.main([str(run), "--video", str(tmp_path / "a.mp4"), "--num-threads", "1"]) == 0
    video = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 161  # the cap's 160 frames, and the one before the first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--saliency"], "--saliency needs --video FILE.mp4 or --gif FILE.gif"),
        (["--seconds", "5"], "--seconds needs --video"),
        (["--video", "x.mp4", "--json", "x.json"], "a video scores nothing"),
        (["--video", "x.avi"], r"must end in \.mp4"),
        (["--gif", "x.mp4"], r"must end in \.gif"),
        (["--gif", "nowhere/x.gif"], "not a file in an existing directory"),
        (["--video", "x.mp4", "--pick", "worst"], "neither best nor median nor the number"),
        (["--video", "x.mp4", "--pick", "0"], "only 1 episodes are played"),
        (["--video", "x.mp4", "--seconds", "0"], "--seconds must be more than 0"),
        (["--video", "x.mp4", "--seconds", "nan"], "--seconds must be more than 0"),
        (["--video", "x.mp4", "--start", "-1"], "--start must be 0 or more"),
        (["--video", "x.mp4", "--start", "90"], r"the episode ends after 2\.7 seconds"),
        (["--video", "x.mp4", "--steps", "100"], "--steps cannot be used"),
    ],
)
def test_flags_that_make_no_video(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        evaluate.main([str(run), *flags, "--num-threads", "1"])
    assert sorted(tmp_path.iterdir()) == before


def test_several_networks_make_no_video(run: Path, save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other")
    with pytest.raises(UsageError, match="a video shows one network, not 2"):
        evaluate.main([str(run), str(other), "--video", str(tmp_path / "x.mp4")])


def test_without_the_encoder_nothing_is_played(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(episode_video, "record_evaluation", lambda *_, **__: pytest.fail("it played"))
    with pytest.raises(WnRlError, match=r'pip install "wn_rl\[video\]"'):
        evaluate.main([str(run), "--video", str(tmp_path / "x.mp4")])
