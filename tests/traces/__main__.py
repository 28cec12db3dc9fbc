"""Record the traces of scripted runs anew: ``python -m tests.traces --record``; without the flag, compare."""

from __future__ import annotations

import json
import sys

from tests.traces.recording import EXPECTED, RUNS, first_difference, record_named, shortened, where_recorded


def main(words: list[str]) -> int:
    """Return 1 where a trace differs from the recorded one, 2 where the words make no sense."""
    if words not in ([], ["--record"]):
        print("usage: python -m tests.traces [--record]", file=sys.stderr)
        return 2
    found = {name: shortened(record_named(name)) for name in RUNS}
    if words:
        EXPECTED.write_text(json.dumps({"recorded with": where_recorded(), "runs": found}, indent=1) + "\n", "utf-8")
        print(f"wrote {EXPECTED}")
        return 0
    told = first_difference(found, json.loads(EXPECTED.read_text("utf-8"))["runs"])
    print(told or f"{len(found)} runs are as recorded")
    return bool(told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
