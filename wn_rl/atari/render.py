"""Render an episode from its actions: one emulator in colour, with every emulator frame.

The emulator's own frame skip does not change the game: sticky actions are random in every frame, no-ops at a reset, and
both do not depend on the skip. So frame skip 1 with each action given four times plays the same as frame skip 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from wn_rl.atari.env import FRAME_SKIP, NO_CAP
from wn_rl.atari.games import find_game
from wn_rl.errors import UsageError, WnRlError

FRAMES_PER_SECOND = 60
"""Frame rate of the emulated console."""
RESET = 255
"""In place of an action: this vector step was an auto-reset, without an action."""
RESEED = 254
"""The same, and the emulator was re-seeded after it: what follows belongs to another seed."""

RgbImage = NDArray[np.uint8]


@dataclass(frozen=True)
class RenderedFrame:
    """One emulator frame.

    Attributes:
        rgb: the screen, uint8 of shape (height, 160, 3); the height is 210, in a few games up to 250.
        step: index in ``actions`` of the element of this frame; −1 for the frame before the first action.
        action: the index of the agent's action in the game's action set, None in a frame without an action. With sticky
            actions the emulator may have repeated the one before.
        reward: raw points of this frame.
        lives: remaining lives.
        terminated: the game was over with this frame.
        truncated: the frame cap ended the episode with this frame.
        is_reset: the first frame of an episode; the no-ops before it are not rendered.
    """

    rgb: RgbImage
    step: int
    action: int | None
    reward: float
    lives: int
    terminated: bool = False
    truncated: bool = False
    is_reset: bool = False


def render(
    game: str,
    actions: Sequence[int],
    *,
    seed: int,
    resets: int = 0,
    history: Sequence[int] = b"",
    noop_max: int = 30,
    fire_reset: bool = False,
    sticky_actions: float = 0.0,
    full_action_set: bool = False,
    max_frames_per_episode: int | None = None,
) -> Iterator[RenderedFrame]:
    """Play ``actions`` and yield every frame, beginning with the frame before the first action.

    Args:
        game: the game; it and the options, see :func:`wn_rl.atari.env.make_atari`, must be the original ones.
        actions: for each vector step of the emulator an index in the game's action set, played for 4 frames unless the
            game is over before, or ``RESET``; may be ``bytes``.
        seed: of the emulator.
        resets: number of resets without seed between the seeded one and ``history`` or ``actions``. Without sticky
            actions an episode depends on these and its own actions only.
        history: the actions in between; needed with sticky actions, which use random numbers in every frame.
        noop_max: no-ops at the start of an episode.
        fire_reset: press FIRE at the start of an episode.
        sticky_actions: probability that a frame repeats the previous action.
        full_action_set: all 18 actions.
        max_frames_per_episode: frame cap; None for none.

    Raises:
        UsageError: an unknown game, a seed or a number below 0, or ``resets`` with sticky actions.
        WnRlError: an element that is not an action of this game, or that does not match the course of the game: a reset
            while the episode goes on, or an action after its end (other options, another emulator).
    """
    if seed < 0 or resets < 0:
        raise UsageError(f"seed and resets must be 0 or more, not {seed} and {resets}")
    if resets and sticky_actions > 0:
        raise UsageError(
            "with sticky actions resets do not determine an episode: give the actions before it as history"
        )
    emulator = _ColourEmulator(
        game,
        noop_max=noop_max,
        fire_reset=fire_reset,
        sticky_actions=sticky_actions,
        full_action_set=full_action_set,
        max_frames_per_episode=max_frames_per_episode,
    )
    for value in {*history, *actions}:
        if value != RESET and not 0 <= value < emulator.num_actions:
            raise WnRlError(f"{find_game(game).name} has {emulator.num_actions} actions; there is no action {value}")
    return _render(emulator, actions, history, seed, resets)


def _render(
    emulator: _ColourEmulator, actions: Sequence[int], history: Sequence[int], seed: int, resets: int
) -> Iterator[RenderedFrame]:
    last = emulator.reset(seed)
    for _ in range(resets):
        last = emulator.reset()
    for step, value in enumerate(history):
        *_, last = emulator.play(value, step)
    if not emulator.ended:
        yield RenderedFrame(last.rgb, -1, None, 0.0, last.lives, is_reset=last.is_reset)
    for step, value in enumerate(actions):
        yield from emulator.play(value, step)


class _ColourEmulator:
    """One emulator with every frame in colour, at the console's own resolution."""

    def __init__(
        self,
        game: str,
        *,
        noop_max: int,
        fire_reset: bool,
        sticky_actions: float,
        full_action_set: bool,
        max_frames_per_episode: int | None,
    ) -> None:
        found = find_game(game)
        height, width = _screen_size(found.rom)
        self._emulator = AtariVectorEnv(
            found.rom,
            1,
            num_threads=1,
            # ale-py draws from 0 … noop_max − 1.
            noop_max=noop_max + 1 if noop_max else 0,
            use_fire_reset=fire_reset,
            repeat_action_probability=sticky_actions,
            full_action_space=full_action_set,
            max_num_frames_per_episode=max_frames_per_episode or NO_CAP,
            reward_clipping=False,
            episodic_life=False,
            life_loss_info=False,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            frameskip=1,
            maxpool=False,
            stack_num=1,
            grayscale=False,
            img_height=height,
            img_width=width,
        )
        self.num_actions = len(self._emulator.ale.get_action_set())
        self.ended = False

    def reset(self, seed: int | None = None, step: int = -1) -> RenderedFrame:
        """Start an episode."""
        seeds = None if seed is None else np.array([seed], np.int32)
        screens, info = self._emulator.reset(seed=seeds)
        self.ended = False
        return RenderedFrame(screens[0, 0], step, None, 0.0, int(info["lives"][0]), is_reset=True)

    def play(self, value: int, step: int) -> Iterator[RenderedFrame]:
        """Play one element of a sequence; yields its frames."""
        if self.ended != (value == RESET):
            what = "the game has ended" if self.ended else "the game goes on"
            wanted = "a reset" if value == RESET else f"action {value}"
            raise WnRlError(
                f"the actions do not match the game: at vector step {step} {what}, but {wanted} was recorded; options "
                "or versions of ale-py differ"
            )
        if value == RESET:
            yield self.reset(step=step)
            return
        for _ in range(FRAME_SKIP):
            screens, rewards, terminated, truncated, info = self._emulator.step(np.array([value]))
            # The frame cap also shortens an agent step, if it is not a multiple of 4.
            self.ended = bool(terminated[0] or truncated[0])
            yield RenderedFrame(
                screens[0, 0],
                step,
                value,
                float(rewards[0]),
                int(info["lives"][0]),
                bool(terminated[0]),
                bool(truncated[0]),
            )
            if self.ended:
                return


def _screen_size(rom: str) -> tuple[int, int]:
    """Return height and width of a game's screen, which differs between games made for NTSC and for PAL."""
    path = roms.get_rom_path(rom)
    if path is None:
        raise UsageError(f"this ale-py does not ship {rom}")
    ALEInterface.setLoggerMode(LoggerMode.Error)
    console = ALEInterface()
    console.loadROM(path)
    height, width = console.getScreenDims()
    return height, width
