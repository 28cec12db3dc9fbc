"""Training episodes seen again are those of the run: same rewards, same lengths, same ends."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import pytest

import evaluate
from agents.dqn import DQN
from tests.small_runs import tiny
from wn_rl.errors import CheckpointError, UsageError, WnRlError
from wn_rl.training.session import train
from wn_rl.video.recorded_episodes import training_episode


@pytest.fixture(scope="module", params=[0.0, 0.25], ids=["plain", "sticky"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    config = tiny(
        game="space_invaders", frames=8000, learning_starts=1900, sticky_actions=request.param, reseed_period=700
    )
    assert train(config, DQN, directory, quiet=True) == 0
    return directory


def episodes(run: Path) -> list[tuple[float, int]]:
    with open(run / "episodes.csv", newline="") as file:
        return [(float(row["return"]), int(row["length"])) for row in csv.DictReader(file)]


def test_every_episode_tracks_the_runs_rewards_and_its_end(run: Path) -> None:
    wanted = episodes(run)
    assert len(wanted) > 10
    for number, (episode_return, length) in list(enumerate(wanted, 1))[:-3:3]:
        episode = training_episode(run, str(number))
        assert (episode.number, episode.episode_return, episode.length) == (number, episode_return, length)
        frames = list(episode.frames)
        assert sum(frame.reward for frame in frames) == episode_return
        assert len({frame.step for frame in frames if frame.action is not None}) == length
        assert frames[-1].terminated or frames[-1].truncated
        assert not any(frame.terminated or frame.truncated for frame in frames[:-1])
        assert frames[0].rgb.shape == (210, 160, 3)


def test_best_and_longest_are_those_of_the_csv(run: Path) -> None:
    found = episodes(run)[:-3]
    best, longest = training_episode(run, "best"), training_episode(run, "longest")
    assert best.episode_return >= max(episode_return for episode_return, _ in found)
    assert longest.length >= max(length for _, length in found)


@pytest.mark.parametrize("which", ["0", "-1", "worst", "1.5", "99999999", "9" * 40, ""])
def test_an_episode_that_is_not_there_is_refused(run: Path, which: str) -> None:
    with pytest.raises(UsageError, match="--replay-episode"):
        training_episode(run, which)


def test_the_command_writes_a_film_and_says_what_it_shows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), "--replay-episode", "best", "--video", str(tmp_path / "best.mp4")]) == 0
    said = capsys.readouterr().out
    best = training_episode(run, "best")
    assert said.startswith(
        f"training episode {best.number}, ended at frame {best.training_frames:,}: {best.episode_return:g} "
    )
    with av.open(str(tmp_path / "best.mp4")) as film:
        stream = film.streams.video[0]
        assert stream.average_rate == 60
        assert (stream.height, stream.width) == (420, 320)
        assert sum(1 for _ in film.decode(stream)) == len(list(best.frames))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay-episode", "best"], "belong together"),
        (["--replay-episode", "best", "--gif", "x.gif"], "belong together"),
        (["--replay-episode", "best", "--video", "x.mp4", "--saliency"], "--saliency is for episodes played now"),
        (["--replay-episode", "best", "--video", "x.mp4", "--pick", "2"], "--pick is for episodes played now"),
        (["--replay-episode", "best", "--video", "x.avi"], "must end in .mp4"),
        (["--replay-episode", "best", "--video", "nowhere/x.mp4"], "not a file in an existing directory"),
        (["--replay-episode", "best", "--video", "x.mp4", "--json", "x.json"], "scores nothing"),
    ],
)
def test_flags_that_do_not_go_together(run: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate.main([str(run), *flags])


def test_other_points_than_in_training_are_told_and_leave_an_older_film(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    lines = (run / "episodes.csv").read_text().splitlines(keepends=True)
    frames, _, length = lines[1].split(",")
    (tmp_path / "run" / "episodes.csv").write_text("".join([lines[0], f"{frames},7777,{length}", *lines[2:]]))
    film = tmp_path / "film.mp4"
    film.write_bytes(b"older")
    with pytest.raises(WnRlError, match="7777 in training"):
        evaluate.main([str(tmp_path / "run"), "--replay-episode", "best", "--video", str(film)])
    assert film.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "run"]


def test_a_csv_that_does_not_fit_is_told(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    lines = (run / "episodes.csv").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "episodes.csv").write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(CheckpointError, match=r"does not fit .*action_log\.bin"):
        training_episode(tmp_path / "run", "best")
