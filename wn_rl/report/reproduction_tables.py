"""The generated parts of docs/reproduction.md: what the runs' files say, as Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from wn_rl.errors import WnRlError
from wn_rl.report.experiment_grid import CELLS, GAMES, OTHER_CELLS, RUNGS, SEEDS, Cell, Ladder, Rung, score_at
from wn_rl.report.published import PAPER_GAME, PUBLISHED, ReferenceCurve, nnabla_curve, paper_curves, public_curves
from wn_rl.report.run_data import RunResult
from wn_rl.report.statistics import interval, meaning

PROVENANCE = "provenance.json"
"""Beside a run's files: {"commit": …} of the code that trained it, a list where later code resumed it."""
OPEN = "*open*"
EQUAL_FRAMES = (1, 2, 3, 4, 5, 10, 20, 40, 100, 200)
"""Millions of frames at which curves are compared."""
NEIGHBOURHOOD = 500_000
"""Frames within which a point of the digitized curve stands for an epoch."""


def blocks(ladder: Ladder) -> dict[str, str]:
    """Return the generated parts of the page by name, as Markdown."""
    return {
        "ladder": _ladder(ladder),
        "next": _next(ladder),
        "paper-table": _paper_table(ladder),
        "cells": _cells(ladder),
        "runs": _runs(ladder),
        "references": _references(ladder),
        "figures": _figures(ladder),
    }


# --- tables ------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float, digits: int | None = None) -> str:
    """Return a score in points; where nothing else is asked for, two decimals below 10, one below 1000, none above."""
    if digits is None:
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}".replace("-", "−")


def over_seeds(values: Sequence[float]) -> str:
    """Return the mean of one score per seed, with its band and their number where there are two seeds or more."""
    found = interval(values)
    if found.low is None or found.high is None:
        return number(found.mean)
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}] (n = {found.runs})"


def title(game: str) -> str:
    """Return a game's name for people."""
    return {"SpaceInvaders": "Space Invaders"}.get(game, game)


def _ladder(ladder: Ladder) -> str:
    nexts = {rung: ladder.next_open(rung) for rung in RUNGS}

    def state(cell: Cell, rung: Rung) -> str:
        count = len(ladder.runs(cell, rung))
        found = f"{count} of {len(SEEDS)} seeds" if count else "open"
        following = nexts[rung]
        return f"{found}, **next**" if following is not None and following.cell == cell else found

    head = ["", *(f"{rung.name}: {rung.label} frames" for rung in RUNGS)]
    rows = [[f"{title(cell.game)}, `{cell.param}`", *(state(cell, rung) for rung in RUNGS)] for cell in CELLS]
    first = RUNGS[0]
    for cell in OTHER_CELLS:
        done = ladder.runs(cell, first)
        found = f"{len(done)} of 1 seeds" if done else "open"
        rows.append([f"{title(cell.game)}, {_group(cell)}", found, "–", "–"])
    return _table(head, rows)


def _group(cell: Cell) -> str:
    return f"`{cell.param}`, minibatch {cell.batch_size}" if cell.param == "bn" else f"`{cell.param}`"


def _next(ladder: Ladder) -> str:
    lines = []
    wanted = [(f"{rung.name} ({rung.label} frames)", ladder.next_open(rung)) for rung in RUNGS]
    wanted.append(("The other claim", ladder.next_open(RUNGS[0], OTHER_CELLS, SEEDS[:1])))
    for label, following in wanted:
        if following is None:
            lines.append(f"- {label}: every cell is done.")
        else:
            what = f"{title(following.cell.game)}, {_group(following.cell)}, seed {following.seed}"
            lines += [f"- {label}: {what}", "", "    ```bash", f"    {following.command}", "    ```", ""]
    return "\n".join(lines)


def _paper_table(ladder: Ladder) -> str:
    head = ["", "paper, normal", "ours, `standard`: best", "final", "paper, weight norm", "ours, `wn`: best", "final"]
    rows = []
    for game in sorted(GAMES):
        published = PUBLISHED[game]
        row = [title(game)]
        for param, theirs in (("standard", published.paper_normal), ("wn", published.paper_wn)):
            cell = Cell(game, param)
            rung = ladder.highest(cell)
            row.append(number(theirs, 0))
            if rung is None:
                row += [OPEN, OPEN]
                continue
            runs = ladder.runs(cell, rung)
            at = f"({rung.label} frames, n = {len(runs)})"
            row += [f"{over_seeds([r.best for r in runs])} {at}", f"{over_seeds([r.final for r in runs])} {at}"]
        rows.append(row)
    return _table(head, rows)


def _cells(ladder: Ladder) -> str:
    head = ["rung", "cell", "seeds", "best", "final", "band", "frames trained", "N", "wall time", "hardware", "commit"]
    rows = []
    for rung in RUNGS:
        for cell in (*CELLS, *(OTHER_CELLS if rung is RUNGS[0] else ())):
            name = f"{title(cell.game)}, {_group(cell)}"
            runs = ladder.runs(cell, rung)
            if not runs:
                rows.append([rung.name, name, OPEN, *[""] * 8])
                continue
            rows.append(
                [
                    rung.name,
                    name,
                    ", ".join(str(run.config.seed) for run in runs),
                    over_seeds([run.best for run in runs]),
                    over_seeds([run.final for run in runs]),
                    meaning(len(runs)),
                    *(_each(runs, of) for of in (_frames, _num_envs)),
                    _each(runs, lambda run, rung=rung: _hours(run, rung)),  # type: ignore[misc]
                    *(_each(runs, of) for of in (_hardware, _commit)),
                ]
            )
    return _table(head, rows)


def _each(runs: Sequence[RunResult], of: Callable[[RunResult], str]) -> str:
    """Return what all runs have in common, or what each has."""
    return "; ".join(dict.fromkeys(of(run) for run in runs))


def _frames(run: RunResult) -> str:
    return f"{run.trained_frames / 1e6:.3g}M"


def _num_envs(run: RunResult) -> str:
    return str(run.config.num_envs)


def _hours(run: RunResult, rung: Rung | None = None) -> str:
    seconds = run.number("wall_seconds")
    if seconds is None:
        return "not noted"
    if rung is not None and run.trained_frames > 1.01 * rung.frames:
        return "of a longer run"
    return f"{seconds / 3600:.2f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def _hardware(run: RunResult) -> str:
    parts = [run.text("device") or "not noted", run.text("precision") or run.config.precision]
    threads = run.number("num_threads")
    return ", ".join(parts) + (f", {threads:.0f} thread{'s'[: threads != 1]}" if threads else "")


def _commit(run: RunResult) -> str:
    file = run.path / PROVENANCE
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return "not noted"
    except OSError as error:
        raise WnRlError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise WnRlError(f"{file} is damaged: it is no JSON") from None
    given = value.get("commit") if isinstance(value, dict) else None
    # A list, in order, where a run was resumed with later code.
    commits = given if isinstance(given, list) else [given]
    named = [f"`{commit[:10]}`" for commit in commits if isinstance(commit, str) and re.fullmatch(r"\w{1,40}", commit)]
    if not named or len(named) < len(commits):
        raise WnRlError(f'{file} must hold {{"commit": "…"}}, letters and digits')
    return ", ".join(named)


def _runs(ladder: Ladder) -> str:
    head = ["run", "seed", "best", "at frames", "final", "at frames", "wall time", "commit", "differs in"]
    found = [(run, "") for cell in (*CELLS, *OTHER_CELLS) for run in ladder.all_runs(cell)]
    found += [(run, ", ".join(f"`{key}` {getattr(run.config, key)}" for key in keys)) for run, keys in ladder.others]
    if not found:
        return "No run yet."
    rows = [
        [
            f"`{run.path.name}`",
            str(run.config.seed),
            number(run.best),
            f"{run.best_frames:,.0f}",
            number(run.final),
            f"{run.frames[-1]:,.0f}",
            _hours(run),
            _commit(run),
            keys,
        ]
        for run, keys in found
    ]
    return _table(head, rows)


# --- others' curves ----------------------------------------------------------------------------------------------


def references_of(game: str) -> list[ReferenceCurve]:
    """Return the curves that ours are compared with: nnabla-rl's in full, Dopamine's, on Space Invaders the paper's."""
    found = [curve for curve in [nnabla_curve(game)] if curve is not None]
    found += [curve for curve in public_curves(game) if not curve.source.startswith("nnabla")]
    return found + (list(paper_curves()) if game == PAPER_GAME else [])


def _references(ladder: Ladder) -> str:
    parts = []
    for game in GAMES:
        ours = {cell: ladder.all_runs(cell) for cell in (*CELLS, *OTHER_CELLS) if cell.game == game}
        last = max((float(run.frames[-1]) for runs in ours.values() for run in runs), default=RUNGS[0].frames)
        columns = [count for count in EQUAL_FRAMES if count * 1e6 <= last * 1.01]
        rows = [
            [_name(curve), *(_reference_at(curve, count * 1e6) for count in columns)] for curve in references_of(game)
        ]
        for cell, runs in ours.items():
            if runs or cell in CELLS:
                rows.append([f"ours, {_group(cell)}", *(_ours_at(runs, count * 1e6) for count in columns)])
        head = [f"{title(game)}, frames", *(f"{count}M" for count in columns)]
        parts.append(_table(head, rows))
    return "\n\n".join(parts)


def _name(curve: ReferenceCurve) -> str:
    return curve.source if curve.source.startswith("dopamine") else curve.label


def _reference_at(curve: ReferenceCurve, frames: float) -> str:
    distance = abs(curve.frames - frames)
    nearest = int(distance.argmin())
    if distance[nearest] > (NEIGHBOURHOOD if curve.label.startswith("paper") else 0):
        return ""
    low, high = float(curve.low[nearest]), float(curve.high[nearest])
    if curve.label.startswith("paper"):  # they are the edges of a printed line, no range of seeds
        return number(float(curve.mean[nearest]), 0)
    return f"{number(float(curve.mean[nearest]))} ({number(low)} to {number(high)})"


def _ours_at(runs: Sequence[RunResult], frames: float) -> str:
    scores = [score for run in runs if (score := score_at(run, frames)) is not None]
    if not scores:
        return OPEN if not runs else ""
    mean = number(sum(scores) / len(scores))
    return mean if len(scores) == 1 else f"{mean} ({number(min(scores))} to {number(max(scores))}, n = {len(scores)})"


# --- figures ---------------------------------------------------------------------------------------------------


def figure_name(game: str) -> str:
    """Return the name of a game's figure."""
    return f"reproduction-{game}.png"


def cells_with_runs(ladder: Ladder, game: str) -> dict[Cell, list[RunResult]]:
    """Return the runs of each cell of a game that has any."""
    found = {cell: ladder.all_runs(cell) for cell in (*CELLS, *OTHER_CELLS) if cell.game == game}
    return {cell: runs for cell, runs in found.items() if runs}


def _figures(ladder: Ladder) -> str:
    parts = []
    for game in GAMES:
        if cells := cells_with_runs(ladder, game):
            groups = ", ".join(f"`{cell.param}`" for cell in cells)
            parts.append(f"![Test score over frames on {title(game)}: {groups}]({figure_name(game)})")
    missing = [title(game) for game in GAMES if not cells_with_runs(ladder, game)]
    if missing:
        parts.append(f"No figure yet, for want of a run: {', '.join(missing)}.")
    return "\n\n".join(parts)
