"""Videos of an episode: the screen at 60 fps with the Q-values of the network beside it; or of a training episode."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wn_rl.atari.env import FRAME_SKIP
from wn_rl.atari.games import find_game
from wn_rl.atari.render import FRAMES_PER_SECOND, RenderedFrame
from wn_rl.errors import UsageError, WnRlError
from wn_rl.evaluation.policies import Trained
from wn_rl.evaluation.scoring import How, emulators, prepare
from wn_rl.video import saliency, writer
from wn_rl.video.q_value_panel import LETTERS, QValuePanel, Scale, State
from wn_rl.video.recorded_episodes import Options, RecordedEpisode, record_evaluation, training_episode

VIDEO_SECONDS, GIF_SECONDS = 300.0, 12.0
"""Default largest length of a video and of a .gif, seconds."""
VIDEO_SCALE, GIF_SCALE = 3, 2
"""Each pixel of the console becomes scale × scale pixels of the video."""
GIF_EVERY = 3
"""A .gif keeps every third frame: 20 fps."""
PROGRESS_SECONDS = 10.0
"""Between two lines about the progress."""
LEAD_SECONDS = 1.0
"""Of play before the first point in the part that a .gif shows."""


@dataclass(frozen=True)
class VideoOptions:
    """What a video shows.

    Attributes:
        pick: which of the played episodes: ``best``, ``median`` (of the scores, the lower one of two) or a number from
            1; of equal ones the first.
        saliency: draw the gradient of the chosen Q-value over the screen.
        start: seconds from the start of the episode; None is the start for a video, and the part with the highest
            score for a .gif.
        seconds: largest length; None is :data:`VIDEO_SECONDS` or :data:`GIF_SECONDS`.
    """

    pick: str = "1"
    saliency: bool = False
    start: float | None = None
    seconds: float | None = None


def check(options: VideoOptions, video_path: Path | None, gif_path: Path | None) -> None:
    """Check, before anything is played, that a video can be written.

    Raises:
        UsageError: a number out of its range, or a file name with another suffix.
        WnRlError: the encoder is not installed.
    """
    if options.pick not in ("best", "median") and not (options.pick.isdecimal() and 1 <= len(options.pick) <= 6):
        raise UsageError(f"--pick '{options.pick}' is neither best nor median nor the number of an episode, from 1")
    if options.start is not None and not 0 <= options.start <= 1e6:
        raise UsageError(f"--start must be 0 or more seconds, not {options.start:g}")
    if options.seconds is not None and not 0 < options.seconds <= 1e6:
        raise UsageError(f"--seconds must be more than 0, not {options.seconds:g}")
    for path, suffix in ((video_path, ".mp4"), (gif_path, ".gif")):
        if path is not None:
            writer.check_name(path, suffix)
    writer.check_encoder()


def video_command(
    paths: Sequence[Path],
    how: How,
    options: VideoOptions,
    *,
    video_path: Path | None = None,
    gif_path: Path | None = None,
) -> int:
    """Play episodes under a protocol, write a video of one of them, and print which; returns the exit code.

    The episodes are those that scoring plays with the same protocol, number of episodes, emulators and seed.

    Args:
        paths: of one network.
        how: to play; its changes hold ``episodes``, the number of episodes that are played.
        options: what the video shows.
        video_path: of an .mp4 file, or None.
        gif_path: of a .gif file, or None.

    Raises:
        UsageError: several networks, or see :func:`check`.
        WnRlError: the video cannot be written, or see :func:`wn_rl.evaluation.scoring.prepare`.
    """
    if len(paths) != 1:
        raise UsageError(f"a video shows one network, not {len(paths)}: name one, or run this command once for each")
    check(options, video_path, gif_path)
    setup = prepare(paths[0], how)
    with emulators(setup) as env:
        names = env.action_meanings
        network = setup.trained.network.to(setup.device)
        result, episodes = record_evaluation(network, env, setup.protocol, seed=how.seed, device=setup.device)
    episode = _pick(episodes, options.pick)
    video = EpisodeVideo(setup.trained, episode, names, setup.options, setup.device, with_saliency=options.saliency)
    which = f"episode {episode.index + 1} of {len(episodes)}" + (
        "" if options.pick.isdecimal() else f" ({options.pick})"
    )
    assert result.episodes[episode.index].score == episode.score
    print(
        f"{which}, seed {how.seed}: {episode.score:g} points in {episode.length:,} agent steps"
        f"{', truncated by the frame cap' if episode.truncated else ''}; {setup.protocol.describe()}"
    )
    for path in (video_path, gif_path):
        if path is not None:
            _write(video, path, options)
    return 0


def _pick(episodes: Sequence[RecordedEpisode], pick: str) -> RecordedEpisode:
    if pick == "best":
        return max(episodes, key=lambda one: (one.score, -one.index))
    if pick == "median":
        return sorted(episodes, key=lambda one: (one.score, one.index))[(len(episodes) - 1) // 2]
    if not 1 <= int(pick) <= len(episodes):
        raise UsageError(f"--pick {pick}: only {len(episodes)} episodes are played (--episodes)")
    return episodes[int(pick) - 1]


def _write(video: EpisodeVideo, path: Path, options: VideoOptions) -> None:
    is_gif = path.suffix.lower() == ".gif"
    limit = options.seconds or (GIF_SECONDS if is_gif else VIDEO_SECONDS)
    start = options.start
    if start is None:
        start = video.highest_scoring_start(limit) if is_gif else 0.0
    first = round(start * FRAMES_PER_SECOND)
    count = max(round(limit * FRAMES_PER_SECOND), 1)
    frames = _with_progress(video.frames(first, count), path, min(limit, video.seconds - start))
    if is_gif:
        colours = writer.colours_of(islice(video.frames(first, count), 0, None, GIF_EVERY))
        written = writer.write_gif(
            frames, path, fps=FRAMES_PER_SECOND, scale=GIF_SCALE, every=GIF_EVERY, colours=colours
        )
        shown = written * GIF_EVERY / FRAMES_PER_SECOND
    else:
        written = writer.write_video(frames, path, fps=FRAMES_PER_SECOND, scale=VIDEO_SCALE)
        shown = written / FRAMES_PER_SECOND
    print(
        f"{written:,} frames written to {path} ({path.stat().st_size / 1e6:.1f} MB): seconds {start:.1f} to "
        f"{start + shown:.1f} of {video.seconds:.1f}"
    )


def _with_progress(frames: Iterator[writer.Frame], path: Path, seconds: float) -> Iterator[writer.Frame]:
    told = time.monotonic()
    for number, frame in enumerate(frames):
        yield frame
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{path}: {number / FRAMES_PER_SECOND:.0f} of {seconds:.0f} seconds", file=sys.stderr, flush=True)


class EpisodeVideo:
    """The frames of a video of a recorded episode.

    A frame shows the Q-values of the last state that the network had observed by then, and the action that was played
    from it: they change exactly at the frame that is the newest one of the state, and stay for the 4 frames of the
    action.
    """

    def __init__(
        self,
        trained: Trained,
        episode: RecordedEpisode,
        actions: Sequence[str],
        options: Options,
        device: torch.device | str = "cpu",
        *,
        with_saliency: bool = False,
    ) -> None:
        """Prepare a video of ``episode``.

        Args:
            trained: the network that played, on ``device``.
            episode: that it played.
            actions: names of the actions.
            options: of the emulators.
            device: of the network.
            with_saliency: draw the gradient of the chosen Q-value over the screen.
        """
        self._trained = trained
        self._episode = episode
        self._actions = actions
        self._options = options
        self._device = device
        self._saliency = with_saliency
        self._q_values: NDArray[np.float32] = np.stack(episode.q_values)
        self._max_q: NDArray[np.float32] = self._q_values.max(1)
        # For each state, whether the action played from it changed the score.
        self._points = np.array(episode.rewards) != 0

    @property
    def seconds(self) -> float:
        """Length of the episode; its last agent step may be shorter than 4 frames."""
        return self._episode.length * FRAME_SKIP / FRAMES_PER_SECOND

    def highest_scoring_start(self, seconds: float) -> float:
        """Return the start of the ``seconds`` with the highest score; 0 if the whole episode fits or has no points."""
        length = int(seconds * FRAMES_PER_SECOND / FRAME_SKIP)
        lead = int(min(LEAD_SECONDS, seconds / 4) * FRAMES_PER_SECOND / FRAME_SKIP)
        if length < 1 or length >= self._episode.length:
            return 0.0
        gained = np.cumsum([0.0, *np.maximum(self._episode.rewards, 0.0)])
        ends = np.minimum(np.arange(self._episode.length) + max(length - lead, 1), self._episode.length)
        sums = gained[ends] - gained[: self._episode.length]
        if sums.max() <= 0:
            return 0.0
        begin = min(max(int(sums.argmax()) - lead, 0), self._episode.length - length)
        return begin * FRAME_SKIP / FRAMES_PER_SECOND

    def rendered_frames(self) -> Iterator[tuple[RenderedFrame, int, float]]:
        """Yield (frame, index of the agent step that it shows, score so far) from the first frame of the episode on.

        Raises:
            WnRlError: the episode differs from the recorded one.
        """
        step, score = 0, 0.0
        last = self._episode.length - 1
        played = 0
        gained = 0.0
        for frame in self._episode.frames(self._trained.game, self._options):
            if frame.action is not None:
                played += 1
                gained += frame.reward
                score += frame.reward
            if played == FRAME_SKIP or frame.terminated or frame.truncated:
                ended = frame.terminated or frame.truncated
                if gained != self._episode.rewards[step] or ended != (step == last):
                    raise WnRlError(f"agent step {step:,} differs from the one that was scored: please report this")
                step, played, gained = min(step + 1, last), 0, 0.0
            yield frame, step, score

    def frames(self, first: int = 0, count: int | None = None) -> Iterator[writer.Frame]:
        """Yield the frames of the video, uint8 RGB (height, 160 + panel, 3), at the console's resolution.

        Args:
            first: number of frames at the start to leave out.
            count: largest number of frames; None for all.

        Raises:
            UsageError: the episode ends before ``first``.
            WnRlError: see :meth:`rendered_frames`.
        """
        heats = self._heats(first // FRAME_SKIP) if self._saliency else None
        panel: QValuePanel | None = None
        drawn: tuple[int, float, int] | None = None
        side = layer = None
        shown = -1
        yielded = 0
        for number, (frame, step, score) in enumerate(self.rendered_frames()):
            if number < first:
                continue
            if count is not None and yielded >= count:
                return
            if panel is None:
                panel = self._panel(frame.rgb.shape[0])
            if drawn != (key := (step, score, frame.lives)):
                side, drawn = panel.draw(self._state(step, score, frame.lives, panel.memory)), key
            screen = frame.rgb
            if heats is not None:
                while shown < step:
                    shown, layer = next(heats)
                assert layer is not None
                screen = saliency.overlay(screen, layer)
            assert side is not None
            yielded += 1
            yield np.concatenate([screen, side], 1)
        if yielded == 0:
            raise UsageError(f"the episode ends after {self.seconds:.1f} seconds: start the video earlier (--start)")

    def _panel(self, height: int) -> QValuePanel:
        trained = self._trained
        title, subtitle = find_game(trained.game).title, trained.param.rpartition(":")[2]
        if trained.frames is not None:
            longer = f"{subtitle}, {_short(trained.frames)} frames"
            subtitle = longer if len(title) + 1 + len(longer) <= LETTERS else subtitle
        return QValuePanel(title, subtitle, self._actions, Scale.of(self._q_values), height)

    def _state(self, step: int, score: float, lives: int, memory: int) -> State:
        begin = max(step + 1 - memory, 0)
        points = self._points[begin : step + 1].copy()
        points[-1] = False  # not known yet in this frame
        return State(
            self._q_values[step],
            self._episode.actions[step],
            self._episode.random[step],
            score,
            step,
            lives,
            self._max_q[begin : step + 1],
            points,
        )

    def _heats(self, first: int) -> Iterator[tuple[int, saliency.Heat]]:
        """Yield (agent step, saliency layer) from agent step ``first`` on."""
        for step, observation in enumerate(self._episode.observations(self._trained.game, self._options)):
            if step >= first:
                batch = torch.from_numpy(observation[None]).to(self._device)
                action = torch.tensor([self._episode.actions[step]], device=self._device)
                yield step, saliency.heat(saliency.gradients(self._trained.network, batch, action)[0].numpy())


def _short(count: int) -> str:
    """Return a count in short form: 2,000,000 is 2M."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


def one_episode(how: How) -> How:
    """Return ``how`` with one episode if the user gave no number of episodes.

    Raises:
        UsageError: agent steps are given instead of episodes.
    """
    if how.changes.get("steps"):
        raise UsageError(
            "a video shows an episode, so --steps cannot be used: --episodes N plays N and --pick chooses one"
        )
    return how if how.changes.get("episodes") else replace(how, changes={**how.changes, "episodes": 1})


def training_video_command(paths: Sequence[Path], which: str, video: Path) -> int:
    """Write the video of a training episode and print which one it is; returns the exit code.

    Raises:
        UsageError: not one run, or see :func:`training_episode`.
        WnRlError: the video cannot be written, or the episode differs from the one of the training.
    """
    if len(paths) != 1:
        raise UsageError(f"--replay-episode shows one run, not {len(paths)}")
    episode = training_episode(paths[0], which)
    seen = 0.0

    def frames() -> Iterator[writer.Frame]:
        nonlocal seen
        for frame in episode.frames:
            seen += frame.reward
            yield frame.rgb
        if seen != episode.episode_return:  # raised here, no file is written
            raise WnRlError(
                f"episode {episode.number:,} gave {seen:g} points when it was rendered again and "
                f"{episode.episode_return:g} in training: another version of ale-py?"
            )

    count = writer.write_video(frames(), video)
    print(
        f"training episode {episode.number:,}, ended at frame {episode.training_frames:,}: "
        f"{episode.episode_return:g} points in {episode.length:,} agent steps; {count:,} frames written to {video}"
    )
    return 0
