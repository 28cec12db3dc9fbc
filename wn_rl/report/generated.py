"""Parts of a hand-written page that a program writes: what stands between two markers of a Markdown file.

``<!-- generated: NAME -->`` begins such a part and ``<!-- end -->`` ends it, each on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from wn_rl.errors import WnRlError

_BEGIN = re.compile(r"^<!-- generated: ([\w-]+) -->$")
_END = "<!-- end -->"


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with the content of every generated part replaced.

    Args:
        page: Markdown.
        blocks: the content of each part by name, without the lines of the markers.

    Raises:
        WnRlError: a part has no end, stands in the page twice or not at all, or is none of ``blocks``.
    """
    lines: list[str] = []
    seen: list[str] = []
    inside = False
    for number, line in enumerate(page.split("\n"), 1):
        begin = _BEGIN.match(line)
        if begin is not None:
            name = begin[1]
            if inside or name in seen:
                raise WnRlError(f"line {number}: '{line}' stands inside another part, or a second time")
            if name not in blocks:
                raise WnRlError(f"line {number}: there is no part '{name}'; there are: {', '.join(blocks)}")
            seen.append(name)
            inside = True
            lines += [line, "", *blocks[name].strip("\n").split("\n"), ""]
        elif line == _END:
            if not inside:
                raise WnRlError(f"line {number}: '{line}' ends nothing")
            inside = False
        if not inside:
            lines.append(line)
    if inside:
        raise WnRlError(f"part '{seen[-1]}' has no end: add a line '{_END}'")
    if missing := [name for name in blocks if name not in seen]:
        raise WnRlError(f"the page has no part '{missing[0]}': add a line '<!-- generated: {missing[0]} -->'")
    return "\n".join(lines)


def differing(old: str, new: str) -> list[str]:
    """Return the names of the parts in which two pages with the same markers differ."""
    return [name for name, text in _parts(new).items() if _parts(old).get(name) != text]


def _parts(page: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    name: str | None = None
    for line in page.split("\n"):
        begin = _BEGIN.match(line)
        if begin is not None:
            name = begin[1]
            parts[name] = ""
        elif line == _END:
            name = None
        elif name is not None:
            parts[name] += line + "\n"
    return parts
