"""Record the traces of scripted runs anew: ``python -m tests.traces --record``; without the flag, compare."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from tests.traces.recording import EXPECTED, RUNS, first_difference, record_named, shortened, where_recorded


def readable(traces: dict[str, Any]) -> str:
    """Return JSON, a line for each list of numbers and for each object of numbers."""
    text = json.dumps(traces, indent=1, ensure_ascii=False)
    number = r"-?[\d.e+-]+"
    member = rf'"[\w,]+": {number}'
    for inner in (rf"\[\s*({number}(?:,\s*{number})*)\s*\]", rf"{{\s*({member}(?:,\s*{member})*)\s*}}"):
        text = re.sub(inner, lambda match: match[0][0] + re.sub(r"\s+", " ", match[1]) + match[0][-1], text)
    return text


def main(words: list[str]) -> int:
    """Return 1 where a trace differs from the recorded one, 2 where the words make no sense."""
    if words not in ([], ["--record"]):
        print("usage: python -m tests.traces [--record]", file=sys.stderr)
        return 2
    found = {name: shortened(record_named(name)) for name in RUNS}
    if words:
        EXPECTED.write_text(readable({"recorded with": where_recorded(), "runs": found}) + "\n", encoding="utf-8")
        print(f"wrote {EXPECTED}")
        return 0
    told = first_difference(found, json.loads(EXPECTED.read_text(encoding="utf-8"))["runs"])
    print(told or f"{len(found)} runs are as recorded")
    return bool(told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
