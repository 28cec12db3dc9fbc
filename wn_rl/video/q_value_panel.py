"""The panel beside the screen of a video: Q-values as bars, action, score, the value over time; and its letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GLYPH_HEIGHT = 7
"""Of a letter, pixels."""
GLYPH_WIDTH = 5
"""Of a letter, pixels."""
ADVANCE = GLYPH_WIDTH + 1
"""Distance from one letter to the next, pixels."""

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

# Letters of 5 × 7 pixels, so that a video needs no font file and looks the same on every machine. Each block: the
# letters of a line, then their rows side by side.
_SHEET = """
A     B     C     D     E     F     G     H     I     J     K     L     M
.###. ####. .###. ####. ##### ##### .###. #...# .###. ..### #...# #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ##... #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .###. ####. ##### #.... .###. #...# .###. .##.. #...# ##### #...#

N     O     P     Q     R     S     T     U     V     W     X     Y     Z
#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
#.#.# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#..## #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#...# #...# #.... #.#.# #.#.. ....# ..#.. #...# #...# #.#.# .#.#. ..#.. .#...
#...# #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## #...# ..#.. #....
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####

0     1     2     3     4     5     6     7     8     9
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ..##. #..#. ....# ####. ...#. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.

-     −     +     .     ,     :     /     _     (     )     =     ±     ▶
..... ..... ..... ..... ..... ..... ....# ..... ...#. .#... ..... ..#.. .#...
..... ..... ..#.. ..... ..... ..#.. ...#. ..... ..#.. ..#.. ..... ..#.. .##..
..... ..... ..#.. ..... ..... ..#.. ...#. ..... .#... ...#. ##### ##### .###.
.###. ##### ##### ..... ..... ..... ..#.. ..... .#... ...#. ..... ..#.. .####
..... ..... ..#.. ..... .##.. ..#.. .#... ..... .#... ...#. ##### ..#.. .###.
..... ..... ..#.. .##.. ..#.. ..#.. .#... ..... ..#.. ..#.. ..... ..... .##..
..... ..... ..... .##.. .#... ..... #.... ##### ...#. .#... ..... ##### .#...
"""
_UNKNOWN = np.ones((GLYPH_HEIGHT, GLYPH_WIDTH), bool)


def _read_sheet() -> dict[str, NDArray[np.bool_]]:
    glyphs: dict[str, NDArray[np.bool_]] = {" ": np.zeros((GLYPH_HEIGHT, GLYPH_WIDTH), bool)}
    for block in _SHEET.strip().split("\n\n"):
        names, *rows = block.split("\n")
        for index, name in enumerate(names.split()):
            cells = [row.split(" ")[index] for row in rows]
            glyphs[name] = np.array([[cell == "#" for cell in row] for row in cells])
    return glyphs


GLYPHS = _read_sheet()
"""Letter → bool (7, 5); lower-case letters look like capitals, and an unknown letter is a filled box."""


def text_width(text: str, scale: int = 1) -> int:
    """Return the width of a text in pixels, without the gap after its last letter."""
    return max(len(text) * ADVANCE - 1, 0) * scale


def draw_text(image: Image, text: str, x: int, y: int, colour: Colour, *, scale: int = 1) -> None:
    """Draw a text into an image; parts outside are clipped.

    Args:
        image: uint8 RGB (height, width, 3), changed in place.
        text: one line.
        x: column of its left edge.
        y: row of its upper edge.
        colour: RGB.
        scale: each pixel of a letter becomes scale × scale.
    """
    gap = np.zeros((GLYPH_HEIGHT, 1), bool)
    parts = [part for letter in text.upper() for part in (GLYPHS.get(letter, _UNKNOWN), gap)]
    if not parts:
        return
    mask = np.concatenate(parts, 1).repeat(scale, 0).repeat(scale, 1)
    mask = mask[max(-y, 0) :, max(-x, 0) :]
    target = image[max(y, 0) :, max(x, 0) :][: mask.shape[0], : mask.shape[1]]
    target[mask[: target.shape[0], : target.shape[1]]] = colour


WIDTH = 180
"""Of the panel, pixels of the console; even, and enough for the longest action name, a bar and a number."""
MARGIN = 6
LETTERS = (WIDTH - 2 * MARGIN + 1) // ADVANCE
"""Letters per line."""
LARGEST_ROW, SMALLEST_ROW = 14, 9
"""Largest and smallest height of an action's row; 18 of the smallest leave room for the header."""
HEADER = 46
"""Height of the header, above the curve or the bars."""
SMALLEST_CURVE = 30
"""Smallest height of the curve of the value; it is left out if it does not fit."""

GROUND: Colour = (16, 18, 27)
TEXT: Colour = (232, 234, 242)
FAINT: Colour = (126, 134, 156)
LINE: Colour = (52, 57, 76)
CHOSEN: Colour = (255, 209, 102)
RANDOM: Colour = (255, 123, 84)
ABOVE: Colour = (76, 175, 240)
BELOW: Colour = (96, 106, 140)
ROW: Colour = (38, 42, 60)

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Scale:
    """The scales of a whole video, so that axes do not change between frames.

    Attributes:
        low: smallest value of the curve.
        high: largest value of the curve.
        advantage: distance of a Q-value from the mean of its state at which a bar has its full length.
    """

    low: float
    high: float
    advantage: float

    @classmethod
    def of(cls, q_values: NDArray[np.float32]) -> Scale:
        """Choose the scales for an episode's Q-values, (T, A).

        A bar has its full length at the 95th percentile over states of the longest bar: otherwise a few states, often
        those just before the end, would make all other bars too short to see. Longer bars are clipped; the numbers
        beside them are not.
        """
        values = q_values.max(1)
        longest = np.abs(q_values - q_values.mean(1, keepdims=True)).max(1)
        advantage = float(np.quantile(longest, 0.95))
        return cls(float(values.min()), float(values.max()), advantage if advantage > 0 else 1.0)


@dataclass(frozen=True)
class State:
    """What a frame shows.

    Attributes:
        q_values: of the state on the screen, (A,).
        action: index of the action that was played.
        random: whether it was drawn at random.
        score: raw points so far.
        step: number of agent steps before this state.
        lives: number of lives left.
        values: largest Q-value of this state and of those before it, the newest last.
        points: whether each of these states was followed by a reward; same length.
    """

    q_values: Values
    action: int
    random: bool
    score: float
    step: int
    lives: int
    values: Values
    points: NDArray[np.bool_]


class QValuePanel:
    """Draws the panel of one video, state by state."""

    def __init__(self, title: str, subtitle: str, actions: Sequence[str], scale: Scale, height: int = 210) -> None:
        """Compute the layout of the panel.

        Args:
            title: at the left.
            subtitle: at the right, as much of it as fits beside the title.
            actions: names of the actions.
            scale: of the video.
            height: of the screen in pixels of the console.
        """
        self._actions = tuple(actions)
        self._scale = scale
        self._names = max(map(text_width, self._actions))
        room = height - HEADER - MARGIN - len(actions) * SMALLEST_ROW
        self._curve = room >= SMALLEST_CURVE + 6
        spare = height - HEADER - MARGIN - (SMALLEST_CURVE + 12 if self._curve else 0)
        self._pitch = max(min(spare // len(actions), LARGEST_ROW), 1)
        self._first_row = height - MARGIN - len(actions) * self._pitch
        self._curve_height = self._first_row - 12 - HEADER
        self._ground = np.full((height, WIDTH, 3), GROUND, np.uint8)
        draw_text(self._ground, title[:LETTERS], MARGIN, 5, TEXT)
        self._right(self._ground, subtitle[: max(LETTERS - len(title) - 1, 0)], 5, FAINT)
        self._ground[15, MARGIN:-MARGIN] = LINE
        self._label = self._first_row - GLYPH_HEIGHT - 3
        self._right(self._ground, f"BARS Q − MEAN ±{_number(scale.advantage)}", self._label, FAINT)
        draw_text(self._ground, "SCORE", MARGIN, 21, FAINT)
        draw_text(self._ground, "VALUE MAX Q", MARGIN, HEADER - 6, FAINT)

    @property
    def memory(self) -> int:
        """Number of states that the curve shows, the largest useful length of :attr:`State.values`."""
        return WIDTH - 2 * MARGIN - self._axis()

    def _axis(self) -> int:
        return max(text_width(_number(value)) for value in (self._scale.low, self._scale.high)) + 3

    def draw(self, state: State) -> Image:
        """Return the panel, uint8 RGB (height, WIDTH, 3)."""
        image: Image = self._ground.copy()
        self._draw_head(image, state)
        if self._curve:
            self._draw_curve(image, state)
        for index, name in enumerate(self._actions):
            self._draw_row(image, state, index, name)
        return image

    def _draw_head(self, image: Image, state: State) -> None:
        draw_text(image, f"{state.score:.0f}".replace("-", "−"), MARGIN + 5 * ADVANCE + 3, 20, TEXT, scale=2)
        self._right(image, f"STEP {state.step}", 20, FAINT)
        self._right(image, f"LIVES {state.lives}" if state.lives else "", 29, FAINT)
        self._right(image, _number(float(state.values[-1])), HEADER - 6, TEXT)
        chosen, colour = ("RANDOM", RANDOM) if state.random else ("GREEDY", CHOSEN)
        draw_text(image, chosen, MARGIN, self._label, colour)

    def _draw_curve(self, image: Image, state: State) -> None:
        top, bottom = HEADER + 6, HEADER + self._curve_height - 4
        left, right = MARGIN + self._axis(), WIDTH - MARGIN
        low, high = self._scale.low, self._scale.high
        draw_text(image, _number(high), MARGIN, top, FAINT)
        draw_text(image, _number(low), MARGIN, bottom - GLYPH_HEIGHT + 1, FAINT)
        image[bottom + 1, left:right] = LINE
        values = state.values[-(right - left) :]
        share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
        rows = np.clip(np.round(bottom - share * (bottom - top)), top, bottom).astype(int)
        first = right - len(values)
        for number, row in enumerate(rows):
            before = rows[max(number - 1, 0)]
            image[min(row, before) : max(row, before) + 1, first + number] = ABOVE
        scored = first + np.flatnonzero(state.points[-len(values) :])
        image[bottom + 1 : bottom + 3, scored] = CHOSEN

    def _draw_row(self, image: Image, state: State, index: int, name: str) -> None:
        y = self._first_row + index * self._pitch
        taken = index == state.action
        accent = RANDOM if state.random else CHOSEN
        if taken:
            image[y : y + self._pitch, 2:-2] = ROW
            image[y : y + self._pitch, 2:4] = accent
        text = y + (self._pitch - GLYPH_HEIGHT) // 2
        colour = accent if taken else TEXT
        draw_text(image, name, MARGIN, text, colour)
        number = _number(float(state.q_values[index]))
        self._right(image, number, text, colour)
        left = MARGIN + self._names + 4
        right = WIDTH - MARGIN - text_width("−00.00") - 4
        middle = (left + right) // 2
        difference = float(state.q_values[index] - state.q_values.mean())
        length = round(min(abs(difference) / self._scale.advantage, 1.0) * (right - middle - 1))
        ends = (middle, middle + length) if difference > 0 else (middle - length, middle)
        fill = accent if taken else ABOVE if difference > 0 else BELOW
        half = max(self._pitch // 4, 2)
        centre = text + GLYPH_HEIGHT // 2
        image[centre - half : centre + half + 1, ends[0] : ends[1] + 1] = fill
        image[y : y + self._pitch, middle] = FAINT if taken else LINE

    @staticmethod
    def _right(image: Image, text: str, y: int, colour: Colour) -> None:
        """Draw a right-aligned text."""
        draw_text(image, text, WIDTH - MARGIN - text_width(text), y, colour)


def _number(value: float) -> str:
    """Return a value in at most six characters."""
    for form in (".2f", ".1f", ".0f", ".0e"):
        text = format(value, form).replace("-", "−")
        if text.strip("−0.") == "" and value:
            text = text.removeprefix("−")
        if len(text) <= 6:
            return text
    return "?"
