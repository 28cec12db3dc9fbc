"""A trained network at play, as a film: the screen at 60 pictures a second, and beside it what the network thinks."""

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
from wn_rl.atari.render import FRAMES_PER_SECOND, RenderedFrame
from wn_rl.errors import UsageError, WnRlError
from wn_rl.evaluation.policies import Trained
from wn_rl.evaluation.scoring import How, emulators, prepare
from wn_rl.video import saliency, writer
from wn_rl.video.q_value_panel import LETTERS, Panel, Scale, State, title_of
from wn_rl.video.recorded_episodes import Options, PlayedGame, play, training_episode

VIDEO_SECONDS, GIF_SECONDS = 300.0, 12.0
"""At most so long where the user leaves it open."""
VIDEO_SCALE, GIF_SCALE = 3, 2
"""Pixels of the film for one of the console."""
GIF_EVERY = 3
"""One of so many pictures: 20 a second."""
PROGRESS_SECONDS = 10.0
"""Between two lines that say how far it is."""
LEAD_SECONDS = 1.0
"""Of play before the first point of the stretch that a .gif shows."""


@dataclass(frozen=True)
class Wanted:
    """What to film.

    Attributes:
        pick: of the games that are played, ``best``, ``median`` (of the scores, the lower one of two) or a number from
            1; of several that are equal the first.
        saliency: draw the gradient of the chosen Q-value over the screen.
        start: seconds into the game; None begins a video at its beginning, a .gif where most points are made.
        seconds: length at most; None is :data:`VIDEO_SECONDS` or :data:`GIF_SECONDS`.
    """

    pick: str = "1"
    saliency: bool = False
    start: float | None = None
    seconds: float | None = None


def check(wanted: Wanted, video_path: Path | None, gif_path: Path | None) -> None:
    """Find out before anything is played whether a film can be made.

    Raises:
        UsageError: a number out of its range, or a file name with another ending.
        WnRlError: the encoder is not installed.
    """
    if wanted.pick not in ("best", "median") and not (wanted.pick.isdecimal() and 1 <= len(wanted.pick) <= 6):
        raise UsageError(f"--pick '{wanted.pick}' is neither best nor median nor the number of a game, from 1")
    if wanted.start is not None and not 0 <= wanted.start <= 1e6:
        raise UsageError(f"--start must be 0 or more seconds, not {wanted.start:g}")
    if wanted.seconds is not None and not 0 < wanted.seconds <= 1e6:
        raise UsageError(f"--seconds must be more than 0, not {wanted.seconds:g}")
    for path, suffix in ((video_path, ".mp4"), (gif_path, ".gif")):
        if path is not None:
            writer.check_name(path, suffix)
    writer.check_encoder()


def film_command(
    paths: Sequence[Path], how: How, wanted: Wanted, *, video_path: Path | None = None, gif_path: Path | None = None
) -> int:
    """Play games under a protocol, film one of them, and say which; returns the exit code.

    The games are those that scoring plays with the same protocol, number of episodes, emulators and seed.

    Args:
        paths: of one network.
        how: to play; its changes hold ``episodes``, so many games are played and one is filmed.
        wanted: what to film.
        video_path: of an .mp4 file, or None.
        gif_path: of a .gif file, or None.

    Raises:
        UsageError: several networks, or see :func:`check`.
        WnRlError: the film cannot be written, or see :func:`wn_rl.evaluation.scoring.prepare`.
    """
    if len(paths) != 1:
        raise UsageError(f"a film shows one network, not {len(paths)}: name one, or call this once for each")
    check(wanted, video_path, gif_path)
    setup = prepare(paths[0], how)
    with emulators(setup) as env:
        names = env.action_meanings
        network = setup.trained.network.to(setup.device)
        result, games = play(network, env, setup.protocol, seed=how.seed, device=setup.device)
    game = _pick(games, wanted.pick)
    film = Film(setup.trained, game, names, setup.options, setup.device, with_saliency=wanted.saliency)
    which = f"game {game.index + 1} of {len(games)}" + ("" if wanted.pick.isdecimal() else f" ({wanted.pick})")
    assert result.episodes[game.index].score == game.score
    print(
        f"{which}, seed {how.seed}: {game.score:g} points in {game.length:,} agent steps"
        f"{', ended by the frame cap' if game.truncated else ''}; {setup.protocol.describe()}"
    )
    for path in (video_path, gif_path):
        if path is not None:
            _write(film, path, wanted)
    return 0


def _pick(games: Sequence[PlayedGame], pick: str) -> PlayedGame:
    if pick == "best":
        return max(games, key=lambda game: (game.score, -game.index))
    if pick == "median":
        return sorted(games, key=lambda game: (game.score, game.index))[(len(games) - 1) // 2]
    if not 1 <= int(pick) <= len(games):
        raise UsageError(f"--pick {pick}: only {len(games)} games are played (--episodes)")
    return games[int(pick) - 1]


def _write(film: Film, path: Path, wanted: Wanted) -> None:
    is_gif = path.suffix.lower() == ".gif"
    limit = wanted.seconds or (GIF_SECONDS if is_gif else VIDEO_SECONDS)
    start = wanted.start
    if start is None:
        start = film.richest(limit) if is_gif else 0.0
    first = round(start * FRAMES_PER_SECOND)
    count = max(round(limit * FRAMES_PER_SECOND), 1)
    pictures = _with_progress(film.pictures(first, count), path, min(limit, film.seconds - start))
    if is_gif:
        colours = writer.colours_of(islice(film.pictures(first, count), 0, None, GIF_EVERY))
        written = writer.write_gif(
            pictures, path, fps=FRAMES_PER_SECOND, scale=GIF_SCALE, every=GIF_EVERY, colours=colours
        )
        shown = written * GIF_EVERY / FRAMES_PER_SECOND
    else:
        written = writer.write_video(pictures, path, fps=FRAMES_PER_SECOND, scale=VIDEO_SCALE)
        shown = written / FRAMES_PER_SECOND
    print(
        f"{written:,} pictures written to {path} ({path.stat().st_size / 1e6:.1f} MB): seconds {start:.1f} to "
        f"{start + shown:.1f} of {film.seconds:.1f}"
    )


def _with_progress(pictures: Iterator[writer.Picture], path: Path, seconds: float) -> Iterator[writer.Picture]:
    told = time.monotonic()
    for number, picture in enumerate(pictures):
        yield picture
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{path}: {number / FRAMES_PER_SECOND:.0f} of {seconds:.0f} seconds", file=sys.stderr, flush=True)


class Film:
    """The pictures of a game that was played.

    A picture shows the Q-values of the newest state that the network had seen by then, and the action that was played
    from there: they change with the very picture that is the state's newest frame, and stay for the 4 frames that the
    action lasts.
    """

    def __init__(
        self,
        trained: Trained,
        game: PlayedGame,
        actions: Sequence[str],
        options: Options,
        device: torch.device | str = "cpu",
        *,
        with_saliency: bool = False,
    ) -> None:
        """Prepare to show ``game``.

        Args:
            trained: the network that played, on ``device``.
            game: that it played.
            actions: their names.
            options: of the emulators.
            device: of the network.
            with_saliency: draw the gradient of the chosen Q-value over the screen.
        """
        self._trained = trained
        self._game = game
        self._actions = actions
        self._options = options
        self._device = device
        self._saliency = with_saliency
        self._q_values: NDArray[np.float32] = np.stack(game.q_values)
        self._max_q: NDArray[np.float32] = self._q_values.max(1)
        # A state "led to points" when the action played from it did.
        self._points = np.array(game.rewards) != 0

    @property
    def seconds(self) -> float:
        """Length of the game; its last agent step may be cut short."""
        return self._game.length * FRAME_SKIP / FRAMES_PER_SECOND

    def richest(self, seconds: float) -> float:
        """Return where to begin so that most points are made within ``seconds``; 0 where all fits or none are made."""
        length = int(seconds * FRAMES_PER_SECOND / FRAME_SKIP)
        lead = int(min(LEAD_SECONDS, seconds / 4) * FRAMES_PER_SECOND / FRAME_SKIP)
        if length < 1 or length >= self._game.length:
            return 0.0
        gained = np.cumsum([0.0, *np.maximum(self._game.rewards, 0.0)])
        ends = np.minimum(np.arange(self._game.length) + max(length - lead, 1), self._game.length)
        sums = gained[ends] - gained[: self._game.length]
        if sums.max() <= 0:
            return 0.0
        begin = min(max(int(sums.argmax()) - lead, 0), self._game.length - length)
        return begin * FRAME_SKIP / FRAMES_PER_SECOND

    def frames(self) -> Iterator[tuple[RenderedFrame, int, float]]:
        """Yield (frame, index of the decision that it shows, score so far) from the game's first picture on.

        Raises:
            WnRlError: the game does something else than when it was scored.
        """
        decision, score = 0, 0.0
        last = self._game.length - 1
        played = 0
        gained = 0.0
        for frame in self._game.frames(self._trained.game, self._options):
            if frame.action is not None:
                played += 1
                gained += frame.reward
                score += frame.reward
            if played == FRAME_SKIP or frame.terminated or frame.truncated:
                ended = frame.terminated or frame.truncated
                if gained != self._game.rewards[decision] or ended != (decision == last):
                    raise WnRlError(
                        f"agent step {decision:,} does not come out as it did when it was scored: please report this"
                    )
                decision, played, gained = min(decision + 1, last), 0, 0.0
            yield frame, decision, score

    def pictures(self, first: int = 0, count: int | None = None) -> Iterator[writer.Picture]:
        """Yield the pictures of the film, uint8 RGB (height, 160 + panel, 3), at the console's resolution.

        Args:
            first: frames of the game to leave out.
            count: pictures at most; None for all.

        Raises:
            UsageError: the game ends before ``first``.
            WnRlError: see :meth:`frames`.
        """
        heats = self._heats(first // FRAME_SKIP) if self._saliency else None
        panel: Panel | None = None
        drawn: tuple[int, float, int] | None = None
        side = layer = None
        shown = -1
        yielded = 0
        for number, (frame, decision, score) in enumerate(self.frames()):
            if number < first:
                continue
            if count is not None and yielded >= count:
                return
            if panel is None:
                panel = self._panel(frame.picture.shape[0])
            if drawn != (key := (decision, score, frame.lives)):
                side, drawn = panel.draw(self._state(decision, score, frame.lives, panel.memory)), key
            screen = frame.picture
            if heats is not None:
                while shown < decision:
                    shown, layer = next(heats)
                assert layer is not None
                screen = saliency.overlay(screen, layer)
            assert side is not None
            yielded += 1
            yield np.concatenate([screen, side], 1)
        if yielded == 0:
            raise UsageError(f"the game ends after {self.seconds:.1f} seconds: begin the film earlier (--start)")

    def _panel(self, height: int) -> Panel:
        trained = self._trained
        title, subtitle = title_of(trained.game), trained.param.rpartition(":")[2]
        if trained.frames is not None:
            longer = f"{subtitle}, {_short(trained.frames)} frames"
            subtitle = longer if len(title) + 1 + len(longer) <= LETTERS else subtitle
        return Panel(title, subtitle, self._actions, Scale.of(self._q_values), height)

    def _state(self, decision: int, score: float, lives: int, memory: int) -> State:
        begin = max(decision + 1 - memory, 0)
        points = self._points[begin : decision + 1].copy()
        points[-1] = False  # not known yet in this picture
        return State(
            self._q_values[decision],
            self._game.actions[decision],
            self._game.random[decision],
            score,
            decision,
            lives,
            self._max_q[begin : decision + 1],
            points,
        )

    def _heats(self, first: int) -> Iterator[tuple[int, saliency.Heat]]:
        """Yield (decision, layer) from the decision ``first`` on."""
        for decision, observation in enumerate(self._game.observations(self._trained.game, self._options)):
            if decision >= first:
                batch = torch.from_numpy(observation[None]).to(self._device)
                action = torch.tensor([self._game.actions[decision]], device=self._device)
                yield decision, saliency.heat(saliency.gradients(self._trained.network, batch, action)[0].numpy())


def _short(count: int) -> str:
    """Return a count in few letters: 2,000,000 is 2M."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


def one_game(how: How) -> How:
    """Return ``how`` with one game to play where the user asked for no number of them.

    Raises:
        UsageError: agent steps are asked for.
    """
    if how.changes.get("steps"):
        raise UsageError("a film shows a game, so --steps has no use here: --episodes N plays N and --pick chooses one")
    return how if how.changes.get("episodes") else replace(how, changes={**how.changes, "episodes": 1})


def training_video_command(paths: Sequence[Path], which: str, video: Path) -> int:
    """Write the film of a training episode and say which one it is; returns the exit code.

    Raises:
        UsageError: not one run, or see :func:`training_episode`.
        WnRlError: the film cannot be written, or the game does something else than in the run.
    """
    if len(paths) != 1:
        raise UsageError(f"--replay-episode shows one run, not {len(paths)}")
    episode = training_episode(paths[0], which)
    seen = 0.0

    def pictures() -> Iterator[writer.Picture]:
        nonlocal seen
        for frame in episode.pictures:
            seen += frame.reward
            yield frame.picture
        if seen != episode.episode_return:  # raised here, the film is not written
            raise WnRlError(
                f"episode {episode.number:,} gave {seen:g} points when it was played again and "
                f"{episode.episode_return:g} in training: another version of ale-py?"
            )

    count = writer.write_video(pictures(), video)
    print(
        f"training episode {episode.number:,}, ended at frame {episode.frames:,}: {episode.episode_return:g} points in "
        f"{episode.length:,} agent steps; {count:,} pictures written to {video}"
    )
    return 0
