"""The generated parts of docs/reproduction.md: what the runs' files say, as Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from wn_rl.atari.games import find_game
from wn_rl.errors import WnRlError
from wn_rl.report.experiment_grid import (
    BUDGETS,
    CONFIGURATIONS,
    GAMES,
    OTHER_CONFIGURATIONS,
    SEEDS,
    Budget,
    Configuration,
    ExperimentGrid,
    score_at,
)
from wn_rl.report.published import PAPER_GAME, PUBLISHED, ReferenceCurve, nnabla_curve, paper_curves, public_curves
from wn_rl.report.run_data import RunResult
from wn_rl.report.statistics import interval, meaning

PROVENANCE = "provenance.json"
"""File in a run directory: {"commit": …} of the code that trained it; a list if later code resumed it."""
NOT_RUN = "*not run*"
EQUAL_FRAMES = (1, 2, 3, 4, 5, 10, 20, 40, 100, 200)
"""Millions of frames at which curves are compared."""
NEIGHBOURHOOD = 500_000
"""Largest distance, in frames, of a point of the digitized curve from the epoch that it represents."""


def blocks(grid: ExperimentGrid) -> dict[str, str]:
    """Return the generated parts of the page by name, as Markdown."""
    return {
        "grid": _grid(grid),
        "next": _next(grid),
        "paper-table": _paper_table(grid),
        "configurations": _configurations(grid),
        "runs": _runs(grid),
        "references": _references(grid),
        "figures": _figures(grid),
    }


# --- tables ------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float, digits: int | None = None) -> str:
    """Return a score in points; by default two decimals below 10, one below 1000, none above."""
    if digits is None:
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}".replace("-", "−")


def mean_with_interval(values: Sequence[float]) -> str:
    """Return the mean of one score per seed; for two seeds or more with its interval and the number of seeds."""
    found = interval(values)
    if found.low is None or found.high is None:
        return number(found.mean)
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}] (n = {found.runs})"


def _grid(grid: ExperimentGrid) -> str:
    nexts = {budget: grid.next_missing(budget) for budget in BUDGETS}

    def state(configuration: Configuration, budget: Budget) -> str:
        count = len(grid.runs(configuration, budget))
        found = f"{count} of {len(SEEDS)} seeds" if count else "not run"
        following = nexts[budget]
        return f"{found}, **next**" if following is not None and following.configuration == configuration else found

    head = ["", *(f"{budget.name}: {budget.label} frames" for budget in BUDGETS)]
    rows = [
        [_title(configuration), *(state(configuration, budget) for budget in BUDGETS)]
        for configuration in CONFIGURATIONS
    ]
    first = BUDGETS[0]
    for configuration in OTHER_CONFIGURATIONS:
        done = grid.runs(configuration, first)
        found = f"{len(done)} of 1 seeds" if done else "not run"
        rows.append([_title(configuration), found, "–", "–"])
    return _table(head, rows)


def _group(configuration: Configuration) -> str:
    name = f"`{configuration.param}`"
    return f"{name}, minibatch {configuration.batch_size}" if configuration.param == "bn" else name


def _title(configuration: Configuration) -> str:
    return f"{find_game(configuration.game).title}, {_group(configuration)}"


def _next(grid: ExperimentGrid) -> str:
    lines = []
    wanted = [(f"{budget.name} ({budget.label} frames)", grid.next_missing(budget)) for budget in BUDGETS]
    wanted.append(("The other claim", grid.next_missing(BUDGETS[0], OTHER_CONFIGURATIONS, SEEDS[:1])))
    for label, following in wanted:
        if following is None:
            lines.append(f"- {label}: complete.")
        else:
            what = f"{_title(following.configuration)}, seed {following.seed}"
            lines += [f"- {label}: {what}", "", "    ```bash", f"    {following.command}", "    ```", ""]
    return "\n".join(lines)


def _paper_table(grid: ExperimentGrid) -> str:
    head = ["", "paper, normal", "ours, `standard`: best", "final", "paper, weight norm", "ours, `wn`: best", "final"]
    rows = []
    for game in sorted(GAMES):
        published = PUBLISHED[game]
        row = [find_game(game).title]
        for param, theirs in (("standard", published.paper_normal), ("wn", published.paper_wn)):
            configuration = Configuration(game, param)
            budget = grid.largest_budget(configuration)
            row.append(number(theirs, 0))
            if budget is None:
                row += [NOT_RUN, NOT_RUN]
                continue
            runs = grid.runs(configuration, budget)
            at = f"({budget.label} frames, n = {len(runs)})"
            row += [
                f"{mean_with_interval([r.best for r in runs])} {at}",
                f"{mean_with_interval([r.final for r in runs])} {at}",
            ]
        rows.append(row)
    return _table(head, rows)


def _configurations(grid: ExperimentGrid) -> str:
    head = [
        "budget",
        "configuration",
        "seeds",
        "best",
        "final",
        "band",
        "frames trained",
        "N",
        "wall time",
        "hardware",
        "commit",
    ]
    rows = []
    for budget in BUDGETS:
        for configuration in (*CONFIGURATIONS, *(OTHER_CONFIGURATIONS if budget is BUDGETS[0] else ())):
            name = _title(configuration)
            runs = grid.runs(configuration, budget)
            if not runs:
                rows.append([budget.name, name, NOT_RUN, *[""] * 8])
                continue
            rows.append(
                [
                    budget.name,
                    name,
                    ", ".join(str(run.config.seed) for run in runs),
                    mean_with_interval([run.best for run in runs]),
                    mean_with_interval([run.final for run in runs]),
                    meaning(len(runs)),
                    *(_each(runs, of) for of in (_frames, _num_envs)),
                    _each(runs, lambda run, budget=budget: _hours(run, budget)),  # type: ignore[misc]
                    *(_each(runs, of) for of in (_hardware, _commit)),
                ]
            )
    return _table(head, rows)


def _each(runs: Sequence[RunResult], of: Callable[[RunResult], str]) -> str:
    """Return the value that all runs share, or all their values."""
    return "; ".join(dict.fromkeys(of(run) for run in runs))


def _frames(run: RunResult) -> str:
    return f"{run.trained_frames / 1e6:.3g}M"


def _num_envs(run: RunResult) -> str:
    return str(run.config.num_envs)


def _hours(run: RunResult, budget: Budget | None = None) -> str:
    seconds = run.number("wall_seconds")
    if seconds is None:
        return "not recorded"
    if budget is not None and run.trained_frames > 1.01 * budget.frames:
        return "part of a longer run"
    return f"{seconds / 3600:.2f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def _hardware(run: RunResult) -> str:
    parts = [run.text("device") or "not recorded", run.text("precision") or run.config.precision]
    threads = run.number("num_threads")
    return ", ".join(parts) + (f", {threads:.0f} thread{'s'[: threads != 1]}" if threads else "")


def _commit(run: RunResult) -> str:
    file = run.path / PROVENANCE
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return "not recorded"
    except OSError as error:
        raise WnRlError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise WnRlError(f"{file} is damaged: it is no JSON") from None
    given = value.get("commit") if isinstance(value, dict) else None
    # A list, in order, if later code resumed the run.
    commits = given if isinstance(given, list) else [given]
    named = [f"`{commit[:10]}`" for commit in commits if isinstance(commit, str) and re.fullmatch(r"\w{1,40}", commit)]
    if not named or len(named) < len(commits):
        raise WnRlError(f'{file} must hold {{"commit": "…"}}, letters and digits')
    return ", ".join(named)


def _runs(grid: ExperimentGrid) -> str:
    head = [
        "run",
        "seed",
        "best",
        "at frames",
        "final",
        "at frames",
        "wall time",
        "commit",
        "differs in",
    ]
    found = [
        (run, "") for configuration in (*CONFIGURATIONS, *OTHER_CONFIGURATIONS) for run in grid.all_runs(configuration)
    ]
    found += [(run, ", ".join(f"`{key}` {getattr(run.config, key)}" for key in keys)) for run, keys in grid.others]
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


def _references(grid: ExperimentGrid) -> str:
    parts = []
    for game in GAMES:
        ours = {
            configuration: grid.all_runs(configuration)
            for configuration in (*CONFIGURATIONS, *OTHER_CONFIGURATIONS)
            if configuration.game == game
        }
        last = max((float(run.frames[-1]) for runs in ours.values() for run in runs), default=BUDGETS[0].frames)
        columns = [count for count in EQUAL_FRAMES if count * 1e6 <= last * 1.01]
        rows = [
            [_name(curve), *(_reference_at(curve, count * 1e6) for count in columns)] for curve in references_of(game)
        ]
        for configuration, runs in ours.items():
            if runs or configuration in CONFIGURATIONS:
                rows.append([f"ours, {_group(configuration)}", *(_ours_at(runs, count * 1e6) for count in columns)])
        head = [f"{find_game(game).title}, frames", *(f"{count}M" for count in columns)]
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
    if curve.label.startswith("paper"):  # the edges of a printed line, not a range over seeds
        return number(float(curve.mean[nearest]), 0)
    return f"{number(float(curve.mean[nearest]))} ({number(low)} to {number(high)})"


def _ours_at(runs: Sequence[RunResult], frames: float) -> str:
    scores = [score for run in runs if (score := score_at(run, frames)) is not None]
    if not scores:
        return NOT_RUN if not runs else ""
    mean = number(sum(scores) / len(scores))
    return mean if len(scores) == 1 else f"{mean} ({number(min(scores))} to {number(max(scores))}, n = {len(scores)})"


# --- figures ---------------------------------------------------------------------------------------------------


def figure_name(game: str) -> str:
    """Return the name of a game's figure."""
    return f"reproduction-{game}.png"


def configurations_with_runs(grid: ExperimentGrid, game: str) -> dict[Configuration, list[RunResult]]:
    """Return the runs of each configuration of a game that has any."""
    found = {
        configuration: grid.all_runs(configuration)
        for configuration in (*CONFIGURATIONS, *OTHER_CONFIGURATIONS)
        if configuration.game == game
    }
    return {configuration: runs for configuration, runs in found.items() if runs}


def _figures(grid: ExperimentGrid) -> str:
    parts = []
    for game in GAMES:
        if configurations := configurations_with_runs(grid, game):
            groups = ", ".join(f"`{configuration.param}`" for configuration in configurations)
            parts.append(f"![Evaluation return over frames on {find_game(game).title}: {groups}]({figure_name(game)})")
    missing = [find_game(game).title for game in GAMES if not configurations_with_runs(grid, game)]
    if missing:
        parts.append(f"No figure yet, because there is no run: {', '.join(missing)}.")
    return "\n\n".join(parts)
