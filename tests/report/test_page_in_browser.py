"""The page in a real browser: it shows all, sorts, fits a phone, fetches nothing, and runs no one else's code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.browser import CHROMIUM, Browser, browser
from tests.report.test_page import HOSTILE, QUICK, video_file
from wn_rl.report import report_directory

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="browser: there is no Chromium here"),
]
SIZES = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two games, two groups, two seeds of one, a video, TensorBoard events, and a run of somebody who means harm."""
    runs = tmp_path_factory.mktemp("runs")
    for name in ("Breakout-standard-quick-s1", "Breakout-wn-quick-s1", "SpaceInvaders-wn-quick-s1"):
        shutil.copytree(QUICK / name, runs / name)
    evil = runs / "<img src=http:evil onerror=alert(1)>"
    shutil.copytree(QUICK / "Breakout-wn-quick-s1", evil)
    config = (evil / "config.yaml").read_text().replace("param: wn\n", f"param: '{HOSTILE[:-4]}'\n".replace("\x07", ""))
    (evil / "config.yaml").write_text(config)
    video_file(runs / "Breakout-wn-quick-s1" / "best.mp4")
    with SummaryWriter(runs / "Breakout-wn-quick-s1") as writer:
        for frames in range(0, 100_000, 10_000):
            writer.add_scalar("train/max_q_held_out", frames / 1e5, frames)
    out = tmp_path_factory.mktemp("out") / "report"
    assert report_directory.report_command([str(runs)], report=out) == 0
    return (out / "index.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_every_figure_is_visible_nothing_is_fetched_and_nothing_complains(
    width: int, dark: bool, page: str, chromium: Browser
) -> None:
    chromium.look(width, dark=dark)
    chromium.open(page)
    assert chromium.complaints() == []
    assert chromium.requests() == [page]
    assert chromium.value("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    sizes = chromium.value(
        "[...document.querySelectorAll('figure > svg, video')].map(e => { const r = e.getBoundingClientRect(); "
        "return [r.width, r.height, r.right] })"
    )
    # Two games: test scores, training return, length of test games, and max-Q of the one with events; and a video.
    assert len(sizes) == 2 * 3 + 1 + 1
    assert all(w > 150 and h > 100 and right <= width for w, h, right in sizes)
    ink, behind = chromium.value(
        "(() => { const s = e => getComputedStyle(e); return [s(document.querySelector('svg text')).fill, "
        "s(document.body).backgroundColor] })()"
    )
    light = [sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) > 384 for colour in (ink, behind)]
    assert light == [dark, not dark]
    assert chromium.value("document.querySelectorAll('img').length") == 0
    assert chromium.value("[...document.querySelectorAll('svg')].every(e => e.textContent.includes('emulator frames'))")


def test_a_table_is_sorted_by_click_and_by_key(page: str, chromium: Browser) -> None:
    chromium.look(1280)
    chromium.open(page)
    column = (
        "(() => { const t = document.querySelector('table.sortable'); const i = [...t.tHead.rows[0].cells]"
        ".findIndex(c => c.textContent === 'NAME'); "
        "return [t.tHead.rows[0].cells[i].getAttribute('aria-sort'), [...t.tBodies[0].rows].map(r => VALUE)] })()"
    )

    def seen(name: str, value: str) -> tuple[str | None, list[str]]:
        found = chromium.value(column.replace("NAME", name).replace("VALUE", value))
        return found[0], found[1]

    button = "[...document.querySelectorAll('table.sortable button')].find(b => b.textContent === 'NAME')"
    best = "Number(r.cells[i].dataset.value)"
    before, values = seen("best", best)
    assert before is None
    where = chromium.value(
        f"(() => {{ const r = {button.replace('NAME', 'best')}.getBoundingClientRect(); "
        "return [r.x + r.width / 2, r.y + r.height / 2] })()"
    )
    mouse = {"x": where[0], "y": where[1], "button": "left", "clickCount": 1}
    chromium.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
    chromium.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
    assert seen("best", best) == ("descending", sorted(values, reverse=True))

    chromium.value(f"{button.replace('NAME', 'game')}.focus()")
    chromium.press("Enter")
    order, games = seen("game", "r.cells[i].textContent")
    assert (order, games) == ("ascending", sorted(games))
    assert seen("best", best)[0] is None
    chromium.press("Space")
    assert seen("game", "r.cells[i].textContent") == ("descending", sorted(games, reverse=True))
    chromium.press("Tab")
    assert chromium.value("document.activeElement.textContent") == "param"
    assert chromium.complaints() == []


def test_a_video_shows_its_first_frame_and_plays(page: str, chromium: Browser) -> None:
    chromium.look(1280)
    chromium.open(page)
    assert str(chromium.value("document.querySelector('video').poster")).startswith("data:image/png")
    error = chromium.value(
        "new Promise(done => { const v = document.querySelector('video'); v.onerror = () => done(v.error.message); "
        "v.onloadeddata = () => done(null); v.load() })"
    )
    if error and "codec" in str(error).lower():
        pytest.skip("this Chromium has no H.264")
    assert error is None
    assert chromium.value("document.querySelector('video').videoWidth") == 16
