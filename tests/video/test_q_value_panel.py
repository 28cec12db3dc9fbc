"""The panel beside the screen: bars whose lengths can be counted, letters that are all there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ale_py import Action

from wn_rl.atari.games import find_game, game_names
from wn_rl.video.q_value_panel import (
    ABOVE,
    ADVANCE,
    BELOW,
    CHOSEN,
    GLYPH_HEIGHT,
    GLYPHS,
    RANDOM,
    WIDTH,
    Image,
    QValuePanel,
    Scale,
    State,
    draw_text,
    text_width,
)

ACTIONS = [Action(number).name for number in range(18)]


def state(q_values: list[float], action: int = 0, **changes: Any) -> State:
    wanted: dict[str, Any] = {
        "random": False,
        "score": 0.0,
        "step": 0,
        "lives": 0,
        "values": np.array([max(q_values)], np.float32),
        "points": np.zeros(1, bool),
    }
    return State(np.array(q_values, np.float32), action, **(wanted | changes))


def run_lengths(picture: Image, colour: tuple[int, int, int]) -> list[int]:
    """The longest run of a colour in each row of pixels that has it, equal neighbours once."""
    found: list[int] = []
    for row in (picture == colour).all(2):
        length = max((len(run) for run in "".join("x" if hit else " " for hit in row).split()), default=0)
        if length and (not found or found[-1] != length):
            found.append(length)
    return found


def test_bars_are_as_long_as_a_q_value_is_from_the_mean() -> None:
    """Mean 2; the scale is 1, so 1 above is a whole bar to the right, ½ below half a one to the left."""
    panel = QValuePanel("Game", "wn", ["AA", "BB", "CC", "DD"], Scale(0, 4, 1.0))
    picture = panel.draw(state([3.0, 1.5, 2.0, 1.5], action=2))
    left, right = 6 + text_width("AA") + 4, WIDTH - 6 - text_width("−00.00") - 4
    whole = right - (left + right) // 2 - 1
    assert max(run_lengths(picture, ABOVE)) == whole  # its first column is the baseline
    assert max(run_lengths(picture, BELOW)) == pytest.approx(whole / 2, abs=1)


def test_a_bar_beyond_the_scale_is_cut() -> None:
    panel = QValuePanel("Game", "wn", ["A", "B"], Scale(0, 4, 1.0))
    longest = max(run_lengths(panel.draw(state([3.0, 1.0], action=1)), ABOVE))
    assert max(run_lengths(panel.draw(state([30.0, -26.0], action=1)), ABOVE)) == longest


def test_the_action_played_is_marked_and_whether_it_was_random() -> None:
    panel = QValuePanel("Game", "wn", ["NOOP", "FIRE", "LEFT"], Scale(0, 4, 1.0))
    greedy = panel.draw(state([1.0, 2.0, 3.0], action=2))
    random = panel.draw(state([1.0, 2.0, 3.0], action=0, random=True))
    assert (greedy == CHOSEN).all(2).any()
    assert not (greedy == RANDOM).all(2).any()
    marked = np.flatnonzero((random[:, 2] == RANDOM).all(1))
    other = np.flatnonzero((greedy[:, 2] == CHOSEN).all(1))
    assert len(marked) == len(other)
    assert marked[0] == other[0] - 2 * len(other)  # two rows above


def test_scales_are_those_of_the_whole_game() -> None:
    q_values = np.array([[0.0, 1.0], [4.0, 2.0], [1.0, 1.0]], np.float32)
    scale = Scale.of(q_values)
    assert (scale.low, scale.high) == (1.0, 4.0)
    assert scale.advantage == pytest.approx(np.quantile([0.5, 1.0, 0.0], 0.95))
    assert Scale.of(np.ones((3, 2), np.float32)).advantage == 1.0


def test_what_does_not_change_is_drawn_the_same() -> None:
    """Nothing of the scale depends on the state, so two states with a common Q-value share its row."""
    panel = QValuePanel("Game", "wn", ["A", "B", "C"], Scale(-1, 5, 1.0))
    one = panel.draw(state([1.0, 2.0, 3.0], action=2))
    two = panel.draw(state([1.0, 3.0, 2.0], action=1))
    rows = panel.draw(state([1.0, 2.0, 3.0], action=0)).shape[0]
    first = slice(rows - 6 - 3 * 14, rows - 6 - 2 * 14)
    np.testing.assert_array_equal(one[first], two[first])


@pytest.mark.parametrize("height", [210, 250])
@pytest.mark.parametrize("count", [1, 3, 4, 6, 9, 14, 18])
def test_every_action_set_fits(count: int, height: int) -> None:
    names = ACTIONS[:count] if count < 18 else ACTIONS
    panel = QValuePanel("Journey Escape", "wn_mean_only_bn", names, Scale(-12.3, 12345.0, 0.2), height)
    q_values = [-12.34] * count
    values = np.linspace(-12.3, 12345.0, 400).astype(np.float32)
    everything: dict[str, Any] = {"score": 999_999, "step": 27_000, "lives": 5}
    picture = panel.draw(state(q_values, count - 1, values=values, points=np.ones(400, bool), **everything))
    assert picture.shape == (height, WIDTH, 3)
    assert picture.dtype == np.uint8
    # The last row's mark stands whole above the margin.
    marked = np.flatnonzero((picture[:, 2] == CHOSEN).all(1))
    assert marked[-1] < height - 4
    assert len(marked) >= GLYPH_HEIGHT + 1
    name, number = text_width(max(names, key=len)), text_width("−12.34")
    assert 6 + name + 4 + 20 < WIDTH - 6 - number


def test_letters_are_all_there_and_differ() -> None:
    shapes = {}
    for letter, glyph in GLYPHS.items():
        assert glyph.shape == (7, 5), letter
        assert glyph.tobytes() not in shapes, (letter, shapes.get(glyph.tobytes()))
        shapes[glyph.tobytes()] = letter
    wanted = "".join([*ACTIONS, *(find_game(game).title for game in game_names()), "Q − MEAN ±0123456789.:/,()=+"])
    assert set(wanted.upper()) <= set(GLYPHS)


def test_a_text_is_drawn_where_it_should_be_and_cut_at_the_edges() -> None:
    picture = np.zeros((9, 20, 3), np.uint8)
    draw_text(picture, "i", 2, 1, (9, 9, 9))  # rows .###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.
    lit = np.argwhere(picture.any(2)).tolist()
    assert lit == [[1, 3], [1, 4], [1, 5], *([row, 4] for row in range(2, 7)), [7, 3], [7, 4], [7, 5]]
    for x, y in ((-8, 0), (0, -3), (17, 5), (40, 40), (-100, 0)):
        draw_text(picture, "WIDE", x, y, (1, 2, 3), scale=2)
    assert text_width("") == 0
    assert text_width("AB", 2) == 2 * (ADVANCE + 5)


def test_titles_have_spaces_between_words() -> None:
    assert [find_game(name).title for name in ("SpaceInvaders", "Pong", "Pitfall2")] == [
        "Space Invaders",
        "Pong",
        "Pitfall 2",
    ]
