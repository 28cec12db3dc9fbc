"""Every game is found however its name is written, the table agrees with ale-py, and every game starts."""

from __future__ import annotations

import subprocess
import sys

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from ale_py import roms
from hypothesis import given, settings
from hypothesis import strategies as st

from wn_rl import make_atari
from wn_rl.atari.games import GAMES, Game, find_game, game_names
from wn_rl.errors import UsageError

gym.register_envs(ale_py)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Breakout", "Breakout"),
        ("breakout", "Breakout"),
        ("SpaceInvaders", "SpaceInvaders"),
        ("space_invaders", "SpaceInvaders"),
        ("space invaders", "SpaceInvaders"),
        ("space-invaders", "SpaceInvaders"),
        ("ALE/Breakout-v5", "Breakout"),
        ("BreakoutNoFrameskip-v4", "Breakout"),
        ("BreakoutDeterministic-v4", "Breakout"),
        ("ale/tic_tac_toe_3d-v5", "TicTacToe3D"),
        ("Pitfall-v5", "Pitfall"),
        ("Pitfall2-v5", "Pitfall2"),
    ],
)
def test_names_are_understood_as_people_write_them(written: str, name: str) -> None:
    assert find_game(written).name == name


@given(game=st.sampled_from(GAMES), data=st.data())
def test_case_and_separators_do_not_matter(game: Game, data: st.DataObject) -> None:
    words = game.rom.split("_")
    separators = data.draw(st.lists(st.sampled_from(["", "_", "-", " "]), min_size=len(words), max_size=len(words)))
    bare = "".join(word + separator for word, separator in zip(words, [*separators[1:], ""], strict=True))
    flips = data.draw(st.lists(st.booleans(), min_size=len(bare), max_size=len(bare)))
    assert find_game("".join(c.upper() if flip else c for c, flip in zip(bare, flips, strict=True))) is game


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.rom)
def test_each_game_is_found_by_its_name_its_rom_and_its_gymnasium_ids(game: Game) -> None:
    for written in (game.name, game.rom, game.gymnasium_id, f"{game.name}NoFrameskip-v4"):
        assert find_game(written) is game


def test_the_table_is_what_ale_py_registers_with_gymnasium() -> None:
    registered = {spec.id: spec for spec in gym.registry.values() if spec.namespace == "ALE" and spec.version == 5}
    assert {game.gymnasium_id: game.rom for game in GAMES} == {
        name: spec.kwargs["game"] for name, spec in registered.items()
    }


def test_the_table_has_every_rom_but_the_four_that_only_several_players_can_start() -> None:
    shipped = set(roms.get_all_rom_ids())
    listed = {game.rom for game in GAMES}
    assert listed <= shipped
    assert shipped - listed == {"combat", "joust", "maze_craze", "warlords"}


def test_game_names_are_those_of_the_table_in_alphabetical_order() -> None:
    assert game_names() == tuple(game.name for game in GAMES)
    assert list(game_names()) == sorted(set(game_names()), key=str.lower)


@pytest.mark.parametrize(("wrong", "near"), [("Brekout", "Breakout"), ("pongg", "Pong"), ("space_invader", "SpaceI")])
def test_an_unknown_name_is_a_usage_error_that_names_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown game '{wrong}'. Did you mean .*'{near}"):
        find_game(wrong)


@pytest.mark.parametrize("wrong", ["", "xqzw", "combat", "v5", "ALE/"])
def test_a_name_like_no_game_is_a_usage_error(wrong: str) -> None:
    with pytest.raises(UsageError, match=f"unknown game '{wrong}'"):
        find_game(wrong)


@settings(max_examples=30)
@given(st.text(max_size=12))
def test_any_text_is_a_game_or_a_usage_error(text: str) -> None:
    try:
        found = find_game(text)
    except UsageError:
        return
    assert found in GAMES


def test_human_normalized_scores_put_random_play_at_0_and_a_human_at_1() -> None:
    breakout = find_game("breakout")
    assert breakout.human_normalized(1.7) == 0.0
    assert breakout.human_normalized(30.5) == 1.0
    assert breakout.human_normalized(16.1) == pytest.approx(0.5)
    assert find_game("skiing").human_normalized(-17098.1) == 0.0


def test_57_games_have_scores_and_the_others_no_normalized_score() -> None:
    assert sum(game.human_score is not None for game in GAMES) == 57
    for game in GAMES:
        assert (game.random_score is None) == (game.human_score is None)
        assert (game.human_normalized(1.0) is None) == (game.human_score is None)


def test_the_names_need_neither_torch_nor_the_emulator() -> None:
    code = (
        "import sys\nimport wn_rl.atari.games\n"
        "print([name for name in ('torch', 'ale_py', 'gymnasium', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("game", game_names())
def test_every_game_starts_and_steps(game: str) -> None:
    env = make_atari(game, 1, num_threads=1)
    env.reset()
    for t in range(8):
        observations, rewards, _, _, _ = env.step(np.array([t % env.num_actions]))
        assert observations in env.observation_space
        assert np.isfinite(rewards).all()
    env.close()
