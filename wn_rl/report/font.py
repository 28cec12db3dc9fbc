"""Letters of 5 × 7 pixels for pictures: drawn here, so that a film needs no font file and looks alike everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HEIGHT = 7
"""Pixels."""
WIDTH = 5
"""Pixels of a letter."""
ADVANCE = WIDTH + 1
"""Pixels from one letter to the next."""

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

# Each block: the letters of a line, then their rows side by side.
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
_UNKNOWN = np.ones((HEIGHT, WIDTH), bool)


def _read_sheet() -> dict[str, NDArray[np.bool_]]:
    glyphs: dict[str, NDArray[np.bool_]] = {" ": np.zeros((HEIGHT, WIDTH), bool)}
    for block in _SHEET.strip().split("\n\n"):
        names, *rows = block.split("\n")
        for index, name in enumerate(names.split()):
            cells = [row.split(" ")[index] for row in rows]
            glyphs[name] = np.array([[cell == "#" for cell in row] for row in cells])
    return glyphs


GLYPHS = _read_sheet()
"""Letter → bool (7, 5); a small letter looks like its capital, and what is not here is a full box."""


def text_width(text: str, scale: int = 1) -> int:
    """Return the width of a text in pixels, without the gap behind its last letter."""
    return max(len(text) * ADVANCE - 1, 0) * scale


def draw_text(picture: Picture, text: str, x: int, y: int, colour: Colour, *, scale: int = 1) -> None:
    """Draw a text into a picture; what lies outside is cut off.

    Args:
        picture: uint8 RGB (height, width, 3), changed in place.
        text: one line.
        x: column of its left edge.
        y: row of its upper edge.
        colour: RGB.
        scale: each pixel of a letter becomes scale × scale.
    """
    gap = np.zeros((HEIGHT, 1), bool)
    parts = [part for letter in text.upper() for part in (GLYPHS.get(letter, _UNKNOWN), gap)]
    if not parts:
        return
    mask = np.concatenate(parts, 1).repeat(scale, 0).repeat(scale, 1)
    mask = mask[max(-y, 0) :, max(-x, 0) :]
    target = picture[max(y, 0) :, max(x, 0) :][: mask.shape[0], : mask.shape[1]]
    target[mask[: target.shape[0], : target.shape[1]]] = colour
