"""A figure's SVG made part of a page: it takes the page's colours, light or dark, and nobody else's identifiers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from wn_rl.report.figures import BEHIND, COLOURS, GRID, INK, MUTED, OTHER_COLOURS, PAPER

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_NAMES = dict(
    zip(
        (*COLOURS.values(), *OTHER_COLOURS, INK, MUTED, GRID, BEHIND),
        ("vermillion", "blue", "green", "purple", "orange", "sky", "black", "ink", "muted", "grid", "paper"),
        strict=True,
    )
)
THEME = {colour.lower(): f"var(--{name})" for colour, name in _NAMES.items()}
"""What each colour of a figure is in the page's style sheet."""


def inline(svg: bytes, number: int, title: str, *, below: float = 0.0) -> str:
    """Return an SVG file of :mod:`wn_rl.report.figures` as an element for an HTML page.

    Args:
        svg: the file.
        number: of the figure, so that identifiers differ between the figures of a page.
        title: what is read aloud in the picture's place.
        below: height of the strip with the caption, inches; it is cut off, since the page has the caption as text.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314 - matplotlib has just written it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata" or child.get("id") == "caption":
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set("id", f"f{number}-{value}")
            elif name == _HREF:
                del element.attrib[name]
                element.set("href", f"#f{number}-{value[1:]}")
            elif name in ("style", "fill", "stroke", "clip-path"):
                element.set(name, _themed(value, number))
    left, top, width, height = (float(part) for part in root.get("viewBox", "0 0 1 1").split())
    words = ElementTree.Element("title", {"id": f"f{number}-title"})
    words.text = title
    root.insert(0, words)
    root.attrib = {
        "viewBox": f"{left:g} {top:g} {width:g} {height - 72 * below:g}",
        "role": "img",
        "aria-labelledby": f"f{number}-title",
    }
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _themed(value: str, number: int) -> str:
    value = re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: THEME.get(found[0].lower(), found[0]), value)
    value = value.replace(f"fill: {PAPER}", "fill: none")  # what is behind the figure is the page
    value = re.sub(r"font-family: [^;]*", "font-family: inherit", value)
    return value.replace("url(#", f"url(#f{number}-")
