"""An episode played again frame by frame is the episode that was played; on real emulators."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from ale_py import ALEInterface, LoggerMode, roms
from hypothesis import given, settings
from hypothesis import strategies as st

from wn_rl.atari.env import make_atari
from wn_rl.atari.games import find_game
from wn_rl.atari.render import RESEED, RESET, RenderedFrame, render
from wn_rl.errors import UsageError, WnRlError

Step = tuple[float, int, bool, bool]
"""Reward, lives, terminated, truncated of an agent step."""


def play(game: str, seeds: list[int], steps: int, **options: Any) -> list[tuple[list[int], list[Step]]]:
    """Random play on emulators with a frame skip of 4; what was played and what came of it, per emulator."""
    env = make_atari(game, len(seeds), num_threads=1, **options)
    env.reset(seed=np.array(seeds))
    rng = np.random.default_rng(seeds)
    played: list[list[int]] = [[] for _ in seeds]
    came: list[list[Step]] = [[] for _ in seeds]
    for _ in range(steps):
        actions = rng.integers(env.num_actions, size=len(seeds))
        _, rewards, terminated, truncated, info = env.step(actions)
        for slot in range(len(seeds)):
            played[slot].append(RESET if info["is_reset"][slot] else int(actions[slot]))
            came[slot].append(
                (float(rewards[slot]), int(info["lives"][slot]), bool(terminated[slot]), bool(truncated[slot]))
            )
    env.close()
    return list(zip(played, came, strict=True))


def rendered(*arguments: Any, **options: Any) -> list[RenderedFrame]:
    """The frames without their RGB values, which would take too much memory."""
    nothing = np.zeros((0, 0, 3), np.uint8)
    return [replace(frame, rgb=nothing) for frame in render(*arguments, **options)]


def by_step(frames: list[RenderedFrame]) -> list[Step]:
    found = []
    for step, group in groupby(frames, key=lambda frame: frame.step):
        own = list(group)
        if step >= 0:
            assert not any(frame.terminated or frame.truncated for frame in own[:-1])
            found.append((sum(f.reward for f in own), own[-1].lives, own[-1].terminated, own[-1].truncated))
    return found


@pytest.mark.parametrize(
    ("game", "steps", "options"),
    [
        ("Breakout", 300, {}),
        ("Breakout", 300, {"sticky_actions": 0.25, "fire_reset": True}),
        ("SpaceInvaders", 600, {"max_frames_per_episode": 1801}),
        ("SpaceInvaders", 900, {"sticky_actions": 0.25, "full_action_set": True}),
        ("Pong", 250, {"fire_reset": True, "max_frames_per_episode": 303}),
        ("Pong", 250, {"sticky_actions": 0.25, "max_frames_per_episode": 401, "noop_max": 0}),
    ],
)
def test_rewards_lives_and_ends_are_those_of_the_four_frame_emulator(
    game: str, steps: int, options: dict[str, Any]
) -> None:
    """A cap that is no multiple of 4 cuts the last agent step short: with sticky actions every later draw tells."""
    episodes = points = 0
    for seed, (played, came) in zip([7, 2**31 - 2], play(game, [7, 2**31 - 2], steps, **options), strict=True):
        frames = rendered(game, bytes(played), seed=seed, **options)
        assert by_step(frames) == came
        for step, group in groupby(frames, key=lambda frame: frame.step):
            own = list(group)
            assert {frame.action for frame in own} == ({played[step]} if own[0].action is not None else {None})
            short = own[-1].terminated or own[-1].truncated or own[0].is_reset
            assert len(own) == 4 or (short and len(own) < 4)
        episodes += sum(frame.is_reset for frame in frames)
        points += sum(abs(frame.reward) for frame in frames)
    assert episodes >= 3
    assert points > 0


@settings(max_examples=6, deadline=None)
@given(
    game=st.sampled_from(["Breakout", "Seaquest", "Freeway", "Pacman"]),
    seed=st.integers(0, 2**31 - 1),
    sticky=st.sampled_from([0.0, 0.25, 0.9]),
    fire=st.booleans(),
    noop_max=st.sampled_from([0, 1, 30]),
    cap=st.integers(1, 90),
)
def test_any_options_track(game: str, seed: int, sticky: float, fire: bool, noop_max: int, cap: int) -> None:
    options = {
        "sticky_actions": sticky, "fire_reset": fire, "noop_max": noop_max, "max_frames_per_episode": cap,
    }  # fmt: skip
    ((played, came),) = play(game, [seed], 80, **options)
    assert by_step(rendered(game, played, seed=seed, **options)) == came


@pytest.mark.parametrize("game", ["Breakout", "Adventure", "Carnival"])
def test_pictures_are_those_of_the_console(game: str) -> None:
    """Beside ale-py's single interface; Adventure's screen is 250 lines high, Carnival's 214."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    console = ALEInterface()
    console.setInt("random_seed", 5)
    console.setFloat("repeat_action_probability", 0.0)
    console.loadROM(roms.get_rom_path(find_game(game).rom))
    console.reset_game()
    actions = console.getMinimalActionSet()
    played = np.random.default_rng(0).integers(len(actions), size=30)
    frames = list(render(game, bytes(played.tolist()), seed=5, noop_max=0))
    expected = [console.getScreenRGB()]
    for action in played:
        for _ in range(4):
            console.act(actions[action])
            expected.append(console.getScreenRGB())
    assert len(frames) == 121
    for frame, picture in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.rgb, picture)
    assert len({frame.rgb.tobytes() for frame in frames}) > 20


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_a_late_episode_is_reached_by_resets_alone_or_by_its_history(sticky: float) -> None:
    options = {"sticky_actions": sticky, "max_frames_per_episode": 200}
    ((played, _),) = play("Breakout", [3], 200, **options)
    whole = list(render("Breakout", played, seed=3, **options))
    second = [index for index, value in enumerate(played) if value == RESET][1]
    third = [index for index, value in enumerate(played) if value == RESET][2]
    expected = [frame for frame in whole if second <= frame.step < third]
    assert len(expected) == 201
    ways = {"history": played[: second + 1]} if sticky else {"resets": 2}
    frames = list(render("Breakout", played[second + 1 : third], seed=3, **ways, **options))
    assert frames[0].is_reset
    for frame, same in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.rgb, same.rgb)
        assert (frame.reward, frame.lives, frame.action) == (same.reward, same.lives, same.action)


def test_a_history_may_end_within_an_episode_or_at_its_end() -> None:
    options = {"max_frames_per_episode": 40}
    ((played, _),) = play("Breakout", [3], 24, **options)
    assert played[10] == RESET
    (first, *rest) = render("Breakout", played[6:], seed=3, history=played[:6], **options)
    assert (first.step, first.is_reset, first.action) == (-1, False, None)
    assert len(rest) == 4 * 4 + 1 + 4 * 10 + 1 + 4 * 2
    (first, *_) = render("Breakout", played[10:], seed=3, history=played[:10], **options)
    assert (first.step, first.is_reset) == (0, True)


@pytest.mark.parametrize(
    ("played", "options", "error", "message"),
    [
        ([0, RESET], {}, WnRlError, "at vector step 1 the game goes on, but a reset was recorded"),
        ([0, 0, 0], {"max_frames_per_episode": 5}, WnRlError, "at vector step 2 the game has ended, but action 0"),
        ([4], {}, WnRlError, "Breakout has 4 actions; there is no action 4"),
        ([0, RESEED], {}, WnRlError, "there is no action 254"),
        ([0], {"history": [17]}, WnRlError, "there is no action 17"),
        ([0], {"resets": 1, "sticky_actions": 0.25}, UsageError, "give the actions before it as history"),
        ([0], {"resets": -1}, UsageError, "0 or more"),
        ([0], {"game": "Braekout"}, UsageError, "Did you mean 'Breakout'"),
    ],
)
def test_what_does_not_fit_is_refused(
    played: list[int], options: dict[str, Any], error: type[WnRlError], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(render(**({"game": "Breakout", "actions": played, "seed": 1} | options)))
