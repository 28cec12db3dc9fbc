"""Videos hold the frames they were made from, seen through other programs' decoders."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from wn_rl.atari.render import render
from wn_rl.errors import UsageError, WnRlError
from wn_rl.video.writer import Frame, colours_of, enlarge, write_gif, write_video


def moving_square(count: int, height: int = 20, width: int = 16) -> list[Frame]:
    """A bright square that moves over a dark ground."""
    found = []
    for number in range(count):
        picture = np.full((height, width, 3), (20, 40, 90), np.uint8)
        picture[4:12, number % 8 : number % 8 + 8] = (230, 120, 60)
        found.append(picture)
    return found


def decoded(path: Path) -> tuple[list[Frame], float]:
    """Frames as RGB, and their rate, as OpenCV reads them."""
    video = cv2.VideoCapture(str(path))
    rate, found = video.get(cv2.CAP_PROP_FPS), []
    while (frame := video.read())[0]:
        found.append(frame[1][..., ::-1])
    return found, rate


def test_a_video_holds_every_frame_at_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    assert write_video(iter(moving_square(30)), path, fps=60, scale=4) == 30
    found, rate = decoded(path)
    assert len(found) == 30
    assert rate == 60
    for picture, original in zip(found, moving_square(30), strict=True):
        expected = enlarge(original, 4)
        assert picture.shape == expected.shape
        assert np.abs(picture.astype(int) - expected).mean() < 3  # edges lose some colour, areas none
        assert np.abs(picture[24:40, 34:36].astype(int) - expected[24:40, 34:36]).max() < 8
    assert list(tmp_path.iterdir()) == [path]


def test_a_browser_can_start_before_the_end_and_knows_the_colours(tmp_path: Path) -> None:
    import av

    path = tmp_path / "video.mp4"
    write_video(moving_square(5), path)
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (6, 1)  # BT.601, 16 … 235
        assert float(container.duration) / av.time_base == pytest.approx(5 / 60, abs=1e-3)


def test_odd_sizes_gain_a_row_and_a_column(tmp_path: Path) -> None:
    write_video(moving_square(2, 21, 17), tmp_path / "video.mp4", scale=1)
    found, _ = decoded(tmp_path / "video.mp4")
    assert found[0].shape == (22, 18, 3)


def test_a_gif_keeps_the_colours_of_a_game_exactly(tmp_path: Path) -> None:
    frames = [frame.rgb for frame in render("Breakout", [1, 2, 3] * 10, seed=1)]
    assert write_gif(iter(frames), tmp_path / "game.gif", scale=2, every=3) == 41
    with Image.open(tmp_path / "game.gif") as video:
        assert video.n_frames == 41
        assert video.info["loop"] == 0
        for number in range(41):
            video.seek(number)
            assert video.info["duration"] == 50
            np.testing.assert_array_equal(np.asarray(video.convert("RGB")), enlarge(frames[3 * number], 2))


def test_a_gif_of_many_colours_is_near(tmp_path: Path) -> None:
    smooth = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_gif([smooth], tmp_path / "smooth.gif", scale=1)
    with Image.open(tmp_path / "smooth.gif") as video:
        off = np.abs(np.asarray(video.convert("RGB")).astype(int) - smooth).max((0, 1))
    assert (off <= [31, 31, 63]).all()  # three bits of red and green, two of blue


@pytest.mark.parametrize("known", [False, True])
def test_a_gif_whose_colours_come_and_go_keeps_each_picture(tmp_path: Path, known: bool) -> None:
    """The encoder compares indices with the picture before: a colour that changed its index would leave its pixels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 3), dtype=np.uint8)
    frames = []
    for number in range(60):
        picture = np.zeros((20, 24, 3), np.uint8)
        some = rng.integers(2, 40) if number % 3 else 1  # now and then the colours of the first picture alone
        picture[4:10, 5:20] = colours[rng.integers(0, some, (6, 15))]
        frames.append(picture)
    write_gif(frames, tmp_path / "video.gif", scale=1, every=2, colours=colours_of(frames) if known else None)
    with Image.open(tmp_path / "video.gif") as video:
        for number in range(video.n_frames):
            video.seek(number)
            np.testing.assert_array_equal(np.asarray(video.convert("RGB")), frames[2 * number])


def test_a_gif_of_known_colours_is_smaller(tmp_path: Path) -> None:
    frames = [frame.rgb for frame in render("SpaceInvaders", [1, 2, 3] * 10, seed=1)]
    colours = colours_of(frames)
    assert colours is not None
    seen = {colour for frame in frames[::20] for _, colour in Image.fromarray(frame).getcolors()}
    assert seen <= set(map(tuple, colours.tolist()))
    write_gif(frames, tmp_path / "known.gif", colours=colours)
    write_gif(frames, tmp_path / "unknown.gif")
    assert (tmp_path / "known.gif").stat().st_size <= (tmp_path / "unknown.gif").stat().st_size
    assert colours_of([np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)]) is None


def test_pictures_are_taken_one_at_a_time(tmp_path: Path) -> None:
    taken = 0

    def interrupted() -> Iterator[Frame]:
        nonlocal taken
        for picture in moving_square(500):
            taken += 1
            yield picture
        raise WnRlError("the action log ends here")

    old = tmp_path / "video.mp4"
    old.write_bytes(b"an older video")
    with pytest.raises(WnRlError, match="the action log ends here"):
        write_video(interrupted(), old)
    assert taken == 500
    assert old.read_bytes() == b"an older video"
    assert list(tmp_path.iterdir()) == [old]


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"an older video")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(WnRlError, match=r"cannot write .*video.mp4: File too large"):
            write_video(moving_square(50), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"an older video"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(WnRlError, match=r"cannot write .*No such file or directory"):
        write_video(moving_square(2), tmp_path / "nowhere" / "video.mp4")
    with pytest.raises(WnRlError, match=r"cannot write .*Not a directory"):
        write_gif(moving_square(2), path / "video.gif")


def test_without_the_encoder_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(WnRlError, match=r'pip install "wn_rl\[video\]"'):
        write_video(moving_square(2), tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.mp4"):
        write_video(moving_square(2), tmp_path / "video.avi")
    with pytest.raises(UsageError, match=r"must end in \.gif"):
        write_gif(moving_square(2), tmp_path / "video.mp4")
    with pytest.raises(UsageError, match="scale must be 1 or more"):
        write_video(moving_square(2), tmp_path / "video.mp4", scale=0)
    with pytest.raises(UsageError, match="raise every"):
        write_gif(moving_square(2), tmp_path / "video.gif", every=1)
    (tmp_path / "directory.mp4").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        write_video(moving_square(2), tmp_path / "directory.mp4")
    with pytest.raises(WnRlError, match="no frame"):
        write_video([], tmp_path / "video.mp4")
    with pytest.raises(ValueError, match="cannot be in one video"):
        write_video([*moving_square(1), *moving_square(1, 30)], tmp_path / "video.mp4")
