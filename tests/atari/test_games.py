"""Every game is found under every way of writing its name, and the tables agree with ale-py."""

from __future__ import annotations

import subprocess
import sys

import ale_py
import gymnasium as gym
import pytest
from ale_py import roms
from hypothesis import given
from hypothesis import strategies as st

from wn_rl.atari.games import GAMES, Game, find_game, game_names
from wn_rl.errors import UsageError


def test_the_table_is_what_ale_py_registers_with_gymnasium() -> None:
    gym.register_envs(ale_py)
    registered = {name for name in gym.registry if name.startswith("ALE/") and "-ram" not in name}
    assert {game.gymnasium_id for game in GAMES} == registered
    shipped = set(roms.get_all_rom_ids())
    assert shipped - {game.rom for game in GAMES} == {"combat", "joust", "maze_craze", "warlords"}
    assert {game.rom for game in GAMES} <= shipped


@pytest.mark.parametrize(
    "name",
    ["SpaceInvaders", "spaceinvaders", "space_invaders", "space invaders", "Space-Invaders", "ALE/SpaceInvaders-v5"],
)
def test_names_are_understood_as_people_write_them(name: str) -> None:
    assert find_game(name).rom == "space_invaders"
    assert find_game("BreakoutNoFrameskip-v4").name == "Breakout"


@given(game=st.sampled_from(GAMES), separator=st.sampled_from("_- "), data=st.data())
def test_case_and_separators_do_not_matter(game: Game, separator: str, data: st.DataObject) -> None:
    flips = data.draw(st.lists(st.booleans(), min_size=len(game.rom), max_size=len(game.rom)))
    written = "".join(c.upper() if flip else c for c, flip in zip(game.rom, flips, strict=True))
    assert find_game(written.replace("_", separator)) is game
    assert find_game(game.name) is game
    assert find_game(game.gymnasium_id) is game


@pytest.mark.parametrize(("wrong", "near"), [("Brekout", "Breakout"), ("pongg", "Pong"), ("mspacmen", "MsPacman")])
def test_an_unknown_name_is_answered_with_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown game '{wrong}'.*{near}"):
        find_game(wrong)


@given(st.text(max_size=12))
def test_any_text_is_a_game_or_a_usage_error(text: str) -> None:
    try:
        name = find_game(text).name
    except UsageError:
        name = None
    assert name is None or name in game_names()


def test_human_normalized_scores() -> None:
    breakout = find_game("breakout")
    assert breakout.human_normalized(1.7) == 0.0
    assert breakout.human_normalized(30.5) == 1.0
    assert breakout.human_normalized(401.2) == pytest.approx((401.2 - 1.7) / 28.8)
    assert find_game("tetris").human_normalized(10.0) is None
    assert sum(game.human_score is not None for game in GAMES) == 57


def test_names_need_neither_torch_nor_the_emulator() -> None:
    code = (
        "import sys\nimport wn_rl.atari.games\n"
        "print([m for m in ('torch', 'ale_py', 'gymnasium', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
