"""How figures are drawn: panels of curves over seeds with bands, as PNG, SVG or PDF, and as SVG inside the page.

Groups differ in colour, line style and marker, so a figure can be read in gray.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from wn_rl.errors import WnRlError
from wn_rl.report.published import PAPER_SOURCE, ReferenceCurve
from wn_rl.report.statistics import Band, Curve, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["png", "svg", "pdf"]

COLOURS = {"standard": "#D55E00", "wn": "#0072B2"}
"""Colours of the two groups that nearly every comparison has."""
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is hard to see on white."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (1.2, 1)), (0, (7, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^DvPX"
INK, MUTED, GRID, PAPER, BEHIND = "#1b1c1e", "#74767a", "#e3e4e6", "#ffffff", "#fefefe"
"""Text and axes, references and captions, grid lines, background, and background of a legend over curves."""
MARKED_POINTS = 7
"""Markers on a line."""
LABELS_HEIGHT = 0.43
"""Height of the horizontal axis's tick labels and label, inches: a legend below begins there."""
INSIDE = 3
"""Largest number of legend entries inside the axes; a longer legend would hide the curves and is placed below."""
MISSING = "figures need matplotlib, which is not installed: pip install matplotlib"


@dataclass(frozen=True)
class Style:
    """How one group is drawn."""

    colour: str
    dashes: Any
    marker: str


@dataclass(frozen=True)
class Series:
    """A group in one panel.

    Attributes:
        group: its label.
        curves: one per seed, as they are drawn.
        dots: single measurements behind them, one curve per seed; may be empty.
    """

    group: str
    curves: tuple[Curve, ...]
    dots: tuple[Curve, ...] = ()

    @property
    def band(self) -> Band:
        """The mean over seeds with its band."""
        return over_seeds(self.curves)


@dataclass(frozen=True)
class Panel:
    """One pair of axes over emulator frames.

    Attributes:
        title: above it.
        unit: label of the vertical axis.
        series: the groups.
        level: name and value of a horizontal line, or None.
        references: published curves, drawn in gray, up to the last frame of ours.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    level: tuple[str, float] | None = None
    references: tuple[ReferenceCurve, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        figure: of matplotlib.
        caption_height: of the strip at its lower edge that holds the caption, inches.
    """

    figure: Figure
    caption_height: float

    def render(self, kind: Format) -> bytes:
        """Return the figure as a PNG, SVG or PDF file; equal figures give equal bytes."""
        stream = io.BytesIO()
        undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
        with _look():
            self.figure.savefig(stream, format=kind, dpi=160, facecolor=PAPER, metadata=undated[kind])
        return stream.getvalue()


def styles_of(groups: Sequence[str]) -> dict[str, Style]:
    """Return how each group is drawn, in this order; no two alike where there are at most 35."""
    colours = [COLOURS.get(group) for group in groups]
    free = [*OTHER_COLOURS, *(colour for colour in COLOURS.values() if colour not in colours)]
    others = 0
    styles = {}
    for index, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        if colour is None:
            colour, others = free[others % len(free)], others + 1
        styles[group] = Style(colour, DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])
    return styles


def check_installed() -> None:
    """Check that figures can be drawn.

    Raises:
        WnRlError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is installed
    except ImportError:
        raise WnRlError(MISSING) from None


def draw(
    panels: Sequence[Panel],
    styles: Mapping[str, Style],
    caption: str,
    *,
    width: float,
    height: float,
    columns: int = 3,
) -> Drawing:
    """Draw panels side by side, in rows of ``columns``, with the caption below, inside the figure.

    Args:
        panels: at least one.
        styles: of every group in them.
        caption: plain text; wrapped.
        width: of one panel, inches.
        height: of one panel, inches.
        columns: panels in a row.

    Raises:
        WnRlError: matplotlib is missing.
    """
    check_installed()
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    lines = textwrap.wrap(plain(caption), max(40, int(width * columns * 18.5)))
    entries = max(map(_entries, panels))
    below = (0.128 * len(lines) + 0.1) if lines else 0.0  # inches
    with _look():
        # Legends that do not fit stand below, for all panels, so that the axes stay alike.
        for legend_columns in (2, 1) if entries > INSIDE else (0,):
            legend = 0.17 * math.ceil(entries / legend_columns) if legend_columns else 0.0
            total = rows * (height + legend) + below
            figure = Figure(figsize=(width * columns, total))
            figure.set_layout_engine("constrained", rect=(0, below / total, 1, 1 - below / total))
            axes = figure.subplots(rows, columns, squeeze=False).ravel()
            for panel, where in zip(panels, axes, strict=False):
                _draw_panel(panel, styles, where, legend_columns=legend_columns)
            for unused in axes[len(panels) :]:
                unused.remove()
            if legend_columns < 2 or _legends_fit(figure):
                break
        if lines:
            text = figure.text(
                0.06 / (width * columns), 0.06 / total, "\n".join(lines), fontsize=7, color=MUTED, va="bottom"
            )
            text.set_gid("caption")
            text.set_in_layout(False)
            text.set_linespacing(1.25)
    return Drawing(figure, below)


def plain(text: str) -> str:
    """Return ``text`` with what cannot be printed, line breaks too, as replacement characters.

    Names of directories and values of configurations are untrusted text, and XML and fonts do not allow every
    character.
    """
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


@contextmanager
def _look() -> Iterator[None]:
    import matplotlib as mpl

    look: dict[str, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": "none",
        "figure.facecolor": PAPER,
        "legend.facecolor": BEHIND,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.7,
        "legend.fancybox": False,
        "legend.fontsize": 7.5,
        "legend.handlelength": 2.8,
        "text.parse_math": False,  # a dollar sign in a value is no formula
        "svg.fonttype": "none",
        "svg.hashsalt": "wn_rl",
        "pdf.fonttype": 42,
    }
    # From matplotlib's own defaults, so that the user's matplotlibrc does not change a figure.
    settings: Any = {**dict(mpl.rcParamsDefault), "backend": "agg", **look}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _draw_panel(panel: Panel, styles: Mapping[str, Style], axes: Axes, *, legend_columns: int) -> None:
    """Draw a panel, its legend in so many columns below the axes, or inside them where that is 0."""
    end = max((float(curve.frames[-1]) for one in panel.series for curve in one.curves), default=0.0)
    scale, unit = (1e6, "millions") if end >= 2e5 else (1e3, "thousands")
    if panel.level is not None:
        name, value = panel.level
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=":", label=name)
    for index, reference in enumerate(panel.references):
        shown = reference.frames <= end
        if shown.sum() > 1:
            frames = reference.frames[shown] / scale
            if reference.source != PAPER_SOURCE:  # where low and high are seeds, not the edges of a printed line
                axes.fill_between(frames, reference.low[shown], reference.high[shown], color=MUTED, alpha=0.18, lw=0)
            dashes = DASHES[1 + index % (len(DASHES) - 1)]
            axes.plot(
                frames, reference.mean[shown], color=MUTED, linewidth=1.0, linestyle=dashes, label=reference.label
            )
    for index, one in enumerate(panel.series):
        style, band = styles[one.group], one.band
        for dots in one.dots:
            axes.plot(dots.frames / scale, dots.values, ".", color=style.colour, alpha=0.4, markersize=3.5)
        if len(one.curves) > 1:
            for curve in one.curves:
                axes.plot(curve.frames / scale, curve.values, color=style.colour, alpha=0.45, linewidth=0.6)
        if band.low is not None and band.high is not None:
            axes.fill_between(band.frames / scale, band.low, band.high, color=style.colour, alpha=0.16, linewidth=0)
        every = max(1, len(band.frames) // MARKED_POINTS)
        axes.plot(
            band.frames / scale,
            band.mean,
            color=style.colour,
            linestyle=style.dashes,
            linewidth=1.7,
            marker=style.marker,
            markersize=4,
            markeredgewidth=0,
            markevery=(min(index * every // max(1, len(panel.series)), max(0, len(band.frames) - 1)), every),
            label=_legend_label(one),
        )
    lowest = min((float(curve.values.min()) for one in panel.series for curve in one.curves), default=0.0)
    if lowest >= 0 > axes.get_ylim()[0]:  # the band of a quantity that is never negative may be
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title)
    axes.set_xlabel(f"emulator frames ({unit})")
    axes.set_ylabel(panel.unit)
    axes.margins(x=0.02)
    handles, labels = axes.get_legend_handles_labels()
    ours = len(panel.series)
    handles, labels = handles[-ours:] + handles[:-ours], labels[-ours:] + labels[:-ours]
    if legend_columns:
        from matplotlib.transforms import ScaledTranslation

        # Inches, for a share of the axes' height would move while the layout looks for that height.
        below = axes.transAxes + ScaledTranslation(0, -LABELS_HEIGHT, axes.figure.dpi_scale_trans)
        where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.06, 0), "bbox_transform": below}
        axes.legend(handles, labels, ncols=legend_columns, borderaxespad=0, **where)
    else:
        axes.legend(handles, labels, loc="best")


def _entries(panel: Panel) -> int:
    """Return the number of entries of a panel's legend."""
    return len(panel.series) + (panel.level is not None) + len(panel.references)


def _legends_fit(figure: Figure) -> bool:
    """Return whether each legend ends at the right edge of its axes, or before it.

    The layout makes axes narrower to keep a wide legend inside the figure, and a browser's letters may be wider still.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # where they are far too wide
        figure.draw_without_rendering()
    legends = [(axes.get_legend(), axes.get_window_extent().x1) for axes in figure.axes]
    return all(legend is None or legend.get_window_extent().x1 <= end for legend, end in legends)


def _legend_label(one: Series) -> str:
    label = plain(one.group)
    label = label if len(label) <= 28 else f"{label[:27]}…"
    # matplotlib hides what begins with an underscore
    return f"{' ' if label.startswith('_') else ''}{label} (n = {len(one.curves)})"


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
"""CSS variable of each colour of a figure in the page's style sheet."""


def inline_svg(svg: bytes, number: int, title: str, *, below: float = 0.0) -> str:
    """Return an SVG file of :mod:`wn_rl.report.figures` as an element for an HTML page.

    Args:
        svg: the file.
        number: of the figure, so that identifiers differ between the figures of a page.
        title: for screen readers.
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
    value = value.replace(f"fill: {PAPER}", "fill: none")  # the background is the page's
    value = re.sub(r"font-family: [^;]*", "font-family: inherit", value)
    return value.replace("url(#", f"url(#f{number}-")
