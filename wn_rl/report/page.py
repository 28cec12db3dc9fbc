"""One self-contained HTML page about a set of runs; a content security policy tells the browser to fetch nothing.

Everything that comes from runs (directory names, configuration values, file contents) is untrusted text and is escaped;
none of it enters the script or the style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wn_rl import __version__
from wn_rl.errors import Failure
from wn_rl.layout import command
from wn_rl.report.figures import plain
from wn_rl.report.learning_curves import FINE_BINS
from wn_rl.report.published import SOURCES
from wn_rl.report.run_data import RunResult, RunVideo, games_of, groups_of, names_of
from wn_rl.report.run_tables import LAST, GroupRow, differences, group_rows, last_mean, warnings
from wn_rl.report.statistics import Interval, meaning

DATA = Path(__file__).parent / "data"
GENERATOR = "wn_rl report"
"""In the page's head; a directory that holds such a page may be overwritten."""
NONE = "–"
SEEDS = 6
"""Seeds that a row of the scores lists at most; the table of runs has all."""
UNBROKEN = 24
"""Longest cell text, in characters, that is never broken into lines."""


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        game: that it is about.
        name: of its files, without the ending.
        svg: the element, see :func:`wn_rl.report.figures.inline_svg`.
        caption: plain text.
    """

    game: str
    name: str
    svg: str
    caption: str


@dataclass
class Content:
    """What the page shows.

    Attributes:
        runs: at least one.
        by: configuration key whose values are the groups.
        failures: runs that were left out.
        curves: learning curves.
        diagnostics: figures of training diagnostics.
        videos: to embed.
        videos_left_out: a line for each that is not embedded.
        without_events: names of runs whose TensorBoard events are missing, or hold no scalar that can be read.
        files: names of the files beside the page.
        problems: what else went wrong, one line each.
    """

    runs: Sequence[RunResult]
    by: str
    failures: Sequence[Failure] = ()
    curves: list[PageFigure] = field(default_factory=list)
    diagnostics: list[PageFigure] = field(default_factory=list)
    videos: Sequence[RunVideo] = ()
    videos_left_out: Sequence[str] = ()
    without_events: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what it is sorted by, and a second line in small print."""

    text: str
    value: float | str | None = None
    small: str = ""
    wrap: bool = False


def render(content: Content) -> str:
    """Return the page."""
    style = (DATA / "page.css").read_text(encoding="utf-8")
    script = (DATA / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [
        ("scores", "Scores", _scores(content)),
        ("curves", "Learning curves", _figures(content.curves, "figures")),
        ("diagnostics", "Diagnostics", _diagnostics(content)),
        ("videos", "Videos", _videos(content)),
        ("differences", "Configurations", _differences(content)),
        ("runs", "Every run", _runs(content)),
        ("files", "Figures and numbers", _files(content)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{text}\n</section>'
        for name, title, text in sections
    )
    title = _title(content)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{GENERATOR}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_escape(title)}</h1>
<p class="lede">{_lede(content)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer class="muted">
<p>Made by <code>{command("evaluate")} RUNS… --report OUT_DIR</code> of wn_rl {_escape(__version__)} from the files of
the run directories; nothing was played for it. The axis of every figure is emulator frames; scores are raw points.</p>
</footer>
<script>{script}</script>
</body>
</html>
"""


def points(value: float) -> str:
    """Return a score as text: a decimal where it is small, groups of three digits where it is large."""
    text = f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def millions(frames: float) -> str:
    """Return a number of frames as text, in millions."""
    return f"{frames / 1e6:.3g}M"


def duration(seconds: float) -> str:
    """Return a wall time as text."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _escape(text: object) -> str:
    return html.escape(plain(str(text)), quote=True)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _title(content: Content) -> str:
    games = games_of(content.runs)
    about = games[0] if len(games) == 1 else _count(len(games), "game")
    return f"{_count(len(content.runs), 'run')} on {about}"


def _lede(content: Content) -> str:
    groups = groups_of(content.runs, content.by)
    frames = sorted({millions(run.trained_frames) for run in content.runs})
    shown = ", ".join(f"<code>{_escape(group)}</code>" for group in groups[:8])
    shown += f" and {len(groups) - 8} more" if len(groups) > 8 else ""
    lengths = (
        frames[0]
        if len(frames) == 1
        else f"{len(frames)} lengths up to " + millions(max(run.trained_frames for run in content.runs))
    )
    return (
        f"DQN on {_escape(', '.join(games_of(content.runs)))}, grouped by <code>{_escape(content.by)}</code>: {shown}. "
        f"Trained for {lengths} emulator frames."
    )


def _list(lines: Iterable[str], kind: str) -> str:
    items = "".join(f"<li>{_escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _table(label: str, heads: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a sortable table in a box of its own that scrolls where it is wider than the page.

    Args:
        label: its name.
        heads: (text, whether the column holds numbers).
        rows: cells; the first of each is the row's head.
    """
    top = "".join(
        f'<th scope="col"{" class=number" if number else ""}><button type="button">{_escape(text)}</button></th>'
        for text, number in heads
    )
    body = []
    for row in rows:
        cells = []
        for index, (cell, (_, number)) in enumerate(zip(row, heads, strict=True)):
            wrap = cell.wrap and len(cell.text) > UNBROKEN
            kind = " ".join([*(["number"] if number else []), *(["wrap"] if wrap else [])])
            attributes = f' class="{kind}"' if kind else ""
            if number or cell.value is not None:
                attributes += f' data-value="{_escape("" if cell.value is None else _plain_value(cell.value))}"'
            small = f"<small>{_escape(cell.small)}</small>" if cell.small else ""
            opening, closing = ('<th scope="row"', "</th>") if index == 0 else ("<td", "</td>")
            cells.append(f"{opening}{attributes}>{_escape(cell.text)}{small}{closing}")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_escape(label)}">'
        f'<table class="sortable" aria-label="{_escape(label)}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _plain_value(value: float | str) -> str:
    return value if isinstance(value, str) else repr(float(value))


def _interval_cell(interval: Interval) -> Cell:
    small = ""
    if interval.low is not None and interval.high is not None:
        small = f"{points(interval.low)} … {points(interval.high)} (n = {interval.runs})"
    return Cell(points(interval.mean), interval.mean, small)


def _number_cell(value: float | None) -> Cell:
    return Cell(NONE) if value is None else Cell(points(value), value)


def _reference_cell(value: float | None) -> Cell:
    """Return a published number with the digits that it was published with."""
    return Cell(NONE) if value is None else Cell(f"{value:,.10g}".replace("-", "−"), value)


def _scores(content: Content) -> str:
    rows = group_rows(content.runs, content.by)
    heads = [
        ("game", False), (content.by, False), ("seeds", True), ("frames", True), ("best", True), ("final", True),
        (f"last {LAST}", True), ("human-normalized score", True), ("paper normal", True), ("paper wn", True),
        ("Mnih 2015", True), ("random", True), ("human", True), ("N", True),
    ]  # fmt: skip
    cells = [_group_cells(row) for row in rows]
    if len({run.evaluation_protocol for run in content.runs}) > 1:
        heads.append(("each evaluation", False))
        for row, line in zip(rows, cells, strict=True):
            line.append(Cell("; ".join(dict.fromkeys(run.evaluation_protocol for run in row.runs)), wrap=True))
    table = _table("Scores by game and group", heads, cells)
    notes = _list([*warnings(rows), *(failure.message for failure in content.failures), *content.problems], "notes")
    return f"{notes}\n{table}\n{_explanations(rows)}"


def _group_cells(row: GroupRow) -> list[Cell]:
    frames = sorted({millions(run.trained_frames): run.trained_frames for run in row.runs}.values())
    shown = millions(frames[0])
    emulators = sorted({run.config.num_envs for run in row.runs})
    published = row.published
    listed = [*map(str, row.seeds)]
    seeds = ", ".join(listed if len(listed) <= SEEDS else [*listed[: SEEDS - 2], "…", listed[-1]])
    return [
        Cell(row.game),
        Cell(row.group, wrap=True),
        Cell(str(len(row.runs)), len(row.runs), f"seed {seeds}" if len(row.runs) == 1 else f"seeds {seeds}"),
        Cell(shown if len(frames) == 1 else f"{shown} to {millions(frames[-1])}", frames[-1]),
        _interval_cell(row.best),
        _interval_cell(row.final),
        _interval_cell(row.last),
        Cell(NONE)
        if row.human_normalized is None
        else Cell(f"{100 * row.human_normalized:.1f}%".replace("-", "−"), row.human_normalized),
        _reference_cell(published.paper_normal if published else None),
        _reference_cell(published.paper_wn if published else None),
        _reference_cell(published.mnih if published else None),
        _reference_cell(row.random_score),
        _reference_cell(row.human_score),
        Cell(", ".join(map(str, emulators)), emulators[0]),
    ]


def _explanations(rows: Sequence[GroupRow]) -> str:
    evaluations = [len(run.scores) for row in rows for run in row.runs]
    many = (
        f"{min(evaluations)}" if min(evaluations) == max(evaluations) else f"{min(evaluations)} to {max(evaluations)}"
    )
    counts = sorted({min(len(row.runs), 3) for row in rows})
    bands = "; ".join(f"{'n ≥ 3' if count == 3 else f'n = {count}'}: {meaning(count)}" for count in counts)
    protocols = list(dict.fromkeys(run.evaluation_protocol for row in rows for run in row.runs))
    definitions = {
        "evaluation": protocols[0] + "." if len(protocols) == 1 else "see the last column; the runs differ in it.",
        "best": f"the highest mean of a single evaluation of a run, of {many} evaluations: what the paper reports of "
        "its runs (the highest evaluation return of all epochs). The maximum of many noisy evaluations is higher than "
        "the network's mean score.",
        "final": "the mean of the last evaluation of the training. Mnih et al. 2015 report 30 episodes of up to five "
        "minutes of the trained network; evaluate.py RUN --protocol nature plays those, and this page does not.",
        f"last {LAST}": f"the mean of the last {LAST} evaluations, less noisy than the final evaluation.",
        **({"small print": f"below a score: {bands}. The score is the mean over seeds."} if counts[-1] > 1 else {}),
        "human-normalized score": "the final score on the scale where random play is 0% and the human is 100%.",
        "random, human": "Wang et al. 2016 (arXiv 1511.06581, appendix); Mnih et al. 2015 have other human scores.",
        **SOURCES,
        "N": "emulators that stepped in parallel in training; it changes results a little.",
    }
    items = "".join(f"<dt>{_escape(word)}</dt><dd>{_escape(text)}</dd>" for word, text in definitions.items())
    return f'<details open><summary>What the columns mean</summary><dl class="defs">{items}</dl></details>'


def _figures(figures: Sequence[PageFigure], kind: str) -> str:
    shown = "\n".join(
        f"<figure>{figure.svg}<figcaption>{_escape(figure.caption)}</figcaption></figure>" for figure in figures
    )
    return f'<div class="{kind}">\n{shown}\n</div>' if figures else ""


def _diagnostics(content: Content) -> str:
    parts = []
    for game in dict.fromkeys(figure.game for figure in content.diagnostics):
        of_game = [figure for figure in content.diagnostics if figure.game == game]
        parts.append(f"<h3>{_escape(game)}</h3>\n{_figures(of_game, 'figures small')}")
    intro = "Lines are means over seeds, bands as in the learning curves. "
    intro += f"Curves with more than {FINE_BINS} points are downsampled to {FINE_BINS} by averaging neighbours."
    if len(content.without_events) == len(content.runs):
        intro += (
            " These run directories hold no readable TensorBoard events, so there are no Q-values, losses and "
            "gradients: only what the CSV files hold is shown."
        )
    elif content.without_events:
        intro += f" Without TensorBoard events, and so missing in some figures: {', '.join(content.without_events)}."
    return f"<p>{_escape(intro)}</p>\n" + "\n".join(parts)


def _videos(content: Content) -> str:
    names = dict(zip((run.path for run in content.runs), names_of(content.runs), strict=True))
    shown = []
    for video in content.videos:
        poster = f' poster="{video.poster_url}"' if video.poster_url else ""
        label = f"{names[video.run.path]}: {video.path.relative_to(video.run.path)}"
        shown.append(
            f'<figure><video controls loop muted playsinline preload="metadata"{poster} src="{video.url}" '
            f'aria-label="{_escape(label)}"></video><figcaption>{_escape(label)}</figcaption></figure>'
        )
    videos = f'<div class="figures small">{"".join(shown)}</div>' if shown else ""
    left_out = _list((f"Left out: {line}" for line in content.videos_left_out), "notes")
    return videos + left_out


def _differences(content: Content) -> str:
    found = differences(content.runs, content.by)
    if not found:
        return "<p>None: the runs differ only in game and seed.</p>"
    groups = groups_of(content.runs, content.by)
    heads = "".join(f'<th scope="col" class="wide">{_escape(group)}</th>' for group in groups)
    rows = []
    for key, values in found:
        cells = "".join(f'<td class="wrap">{_escape("; ".join(values[group]))}</td>' for group in groups)
        rows.append(f'<tr><th scope="row"><code>{_escape(key)}</code></th>{cells}</tr>')
    label = "Configuration keys that differ, by group"
    return (
        "<p>Keys whose values are not the same in all runs, beside game and seed; several values in a cell "
        "mean that runs of one group differ.</p>"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table aria-label="{label}">'
        f'<thead><tr><th scope="col">key</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _runs(content: Content) -> str:
    heads = [
        ("run", False), ("game", False), (content.by, False), ("seed", True), ("frames", True), ("best", True),
        ("at frames", True), ("final", True), (f"last {LAST}", True), ("evaluations", True), ("N", True),
        ("wall time", True), ("frames/s", True), ("hardware", False), ("precision", False),
    ]  # fmt: skip
    rows = []
    for run, name in zip(content.runs, names_of(content.runs), strict=True):
        wall, speed = run.number("wall_seconds"), run.number("frames_per_second")
        rows.append(
            [
                Cell(name),
                Cell(run.config.game),
                Cell(run.group(content.by), wrap=True),
                Cell(str(run.config.seed), run.config.seed),
                Cell(millions(run.trained_frames), run.trained_frames, "" if run.finished else "not finished"),
                _number_cell(run.best),
                Cell(millions(run.best_frames), run.best_frames),
                _number_cell(run.final),
                _number_cell(last_mean(run)),
                Cell(str(len(run.scores)), len(run.scores)),
                Cell(str(run.config.num_envs), run.config.num_envs),
                Cell(NONE) if wall is None else Cell(duration(wall), wall),
                Cell(NONE) if speed is None else Cell(f"{speed:,.0f}", speed),
                Cell(run.text("device") or NONE, wrap=True),
                Cell(run.text("precision") or run.config.precision, wrap=True),
            ]
        )
    return _table("Every run", heads, rows)


def _files(content: Content) -> str:
    links = [f'<li><a href="{_escape(name)}"><code>{_escape(name)}</code></a></li>' for name in content.files]
    return (
        "<p>This page is self-contained. The directory that it was written to also holds the figures for a paper, and "
        "the numbers that they were drawn from.</p>"
        f"<details><summary>{_count(len(content.files), 'file')}</summary><ul>{''.join(links)}</ul></details>"
    )
