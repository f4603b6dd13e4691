"""predict.py: digits as people make them, MNIST's own on larger pages, what is no digit, and bad
files.

The network is a small one, trained on the sample in seconds: these tests are about finding digits
and preparing them.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import mnist_resnet9 as m
import predict
from support import drawing, runs, storage
from support import pictures as find

sys.path.insert(0, str(m.ROOT / "benchmarks" / "pictures"))
import pages  # noqa: E402  (it lies in the folder that was just added)
from predict_accuracy import FONTS, edits, paste  # noqa: E402

long, exhaustive = pytest.mark.long, pytest.mark.exhaustive

FONT_NAMES = (
    "DejaVuSans",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "cmr10",
    "cmss10",
)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """A save folder with a run in it."""
    save = tmp_path_factory.mktemp("save")
    flags = """--tag small --data-dir data/sample --epochs-max 2 --learning-rate 4e-3
               --schedule one_cycle --dropout 0.3 --channels 4,8,16,16 --augment 0.5
               --batch-size 32 --device cpu""".split()
    flags[3] = str(m.ROOT / "data" / "sample")
    assert m.main([*flags, "--save-dir", str(save)]) == 0
    return save


@pytest.fixture(scope="module")
def reader(save):
    return predict.Reader(save / "small")


def page(
    text,
    font="DejaVuSans",
    size=120,
    ink="black",
    paper="white",
    mode="RGB",
    at=(60, 40),
    shape=None,
):
    """A picture with text on it."""
    font = ImageFont.truetype(str(FONTS / f"{font}.ttf"), size)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new(mode, shape or (right + 2 * at[0], bottom + 2 * at[1]), paper)
    ImageDraw.Draw(picture).text(at, text, font=font, fill=ink)
    return picture


def found(picture, tmp_path, format="png", **options):
    """The digits in a picture, after a round trip through a file."""
    path = tmp_path / f"picture.{format}"
    picture.save(path, **options)
    return find.find_digits(predict.read_picture(path)[0])


def read(reader, digits):
    return "".join(
        str(answer.probabilities.argmax())
        for answer in reader.answers([digit.image for digit in digits])
    )


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err and not captured.out, (
        captured
    )
    return captured.err


# ── Digits as people make them ────────────────────────────────────────────────────────────────────


QUICK = [("DejaVuSans", 16), ("cmr10", 60), ("DejaVuSerif", 300)]


@pytest.mark.parametrize(
    "font, size",
    [
        pytest.param(font, size, marks=() if (font, size) in QUICK else exhaustive)
        for font in FONT_NAMES
        for size in (16, 60, 300)
    ],
)
def test_rendered_digits_are_found_one_by_one(font, size, tmp_path, reader):
    text = "2 0 5 3 8 4 7 6"
    digits = found(page(text, font, size), tmp_path)
    assert len(digits) == 8
    answers = read(reader, digits)
    wrong = sum(a != b for a, b in zip(answers, text.replace(" ", "")))
    # Print is not what the network learnt, and this one learnt for seconds.
    assert wrong <= 2, answers


@pytest.mark.parametrize(
    "ink, paper, mode",
    [
        ("black", "white", "RGB"),
        ("white", "black", "RGB"),
        pytest.param("#202060", "#f0e0b0", "RGB", marks=long),
        pytest.param("yellow", "navy", "RGB", marks=long),
        ("#d00000", "#009000", "RGB"),
        pytest.param(60, 200, "L", marks=long),
        (0, 1, "1"),
        ("black", (0, 0, 0, 0), "RGBA"),
        pytest.param("white", (0, 0, 0, 0), "RGBA", marks=long),
        pytest.param("white", (255, 255, 255, 0), "RGBA", marks=long),
        (30, (200, 0), "LA"),
        (2, 1, "P"),
        ((0, 0, 0, 255), (0, 0, 0, 0), "CMYK"),
    ],
)
def test_any_colours_give_the_same_image(ink, paper, mode, tmp_path):
    if mode == "LA":
        picture = page("4", ink=255, paper=0, mode="L")
        picture = Image.merge("LA", (Image.new("L", picture.size, 30), picture))
    else:
        picture = page("4", ink=ink, paper=paper, mode=mode)
    if mode == "P":
        picture.putpalette([255, 0, 0, 240, 240, 240, 0, 80, 0])
    (digit,) = found(picture, tmp_path, "tiff" if mode == "CMYK" else "png")
    (usual,) = found(page("4"), tmp_path)
    difference = abs(digit.image.astype(int) - usual.image)
    # Two have no grey, so their edges are rough.
    assert difference.mean() < (12 if mode in "1P" else 4)


def test_sixteen_bits_are_not_cut_off(tmp_path):
    values = np.asarray(page("4", mode="L", ink=0, paper=255)).astype(np.uint16) * 257
    (digit,) = found(Image.fromarray(values), tmp_path)
    (usual,) = found(page("4"), tmp_path)
    assert abs(digit.image.astype(int) - usual.image).max() < 3


def spoil(values, name):
    """The picture (H, W) as instruments write it, with some of its pixels wrong."""
    if name == "hot":
        values[5, 5], values[50, 60:62] = 65535, 65535
    elif name == "dead and hot":
        values[np.random.default_rng(0).random(values.shape) < 1e-3] = 0
        values[7, 9] = 65535
    elif name == "not finite":
        values[:20], values[-5:, 3], values[30, 30] = np.nan, np.inf, -np.inf
    elif name == "no data":
        values[:, :30] = -9999
    elif name == "no data, largest float":
        values[:25] = -3.4e38
    elif name == "no data in whole numbers":
        values[:10] = -(2**31)
    return values


@pytest.mark.parametrize(
    "name, kind",
    [
        ("hot", np.uint16),
        ("hot", np.float32),
        ("dead and hot", np.uint16),
        ("not finite", np.float32),
        ("no data", np.float32),
        ("no data, largest float", np.float32),
        ("no data in whole numbers", np.int32),
    ],
)
def test_single_wrong_pixels_and_those_without_data_do_not_hide_the_digit(name, kind, tmp_path):
    grey = np.asarray(page("4", mode="L", ink=0, paper=255))
    values = spoil((grey.astype(kind) * 20 + 1000).astype(kind), name)
    (digit,) = found(Image.fromarray(values), tmp_path, "tiff")
    (usual,) = found(page("4"), tmp_path)
    assert abs(digit.image.astype(int) - usual.image).mean() < 1


def test_a_tiff_file_names_the_value_of_pixels_without_data(tmp_path):
    values = np.asarray(page("4", mode="L", ink=0, paper=255)).astype(np.uint16) * 20 + 1000
    values[:30] = 0
    (digit,) = found(Image.fromarray(values), tmp_path, "tiff", tiffinfo={predict.GDAL_NODATA: "0"})
    (usual,) = found(page("4"), tmp_path)
    assert abs(digit.image.astype(int) - usual.image).mean() < 1


@pytest.mark.parametrize("noise", [0, 400])
def test_the_thinnest_line_in_sixteen_bits_is_ink(noise, tmp_path, rng):
    picture = Image.new("L", (200, 200))
    ImageDraw.Draw(picture).line([(30, 40), (140, 40), (70, 170)], fill=255)
    values = np.asarray(picture) * 100.0 + 500 + noise * rng.random((200, 200))
    assert len(found(Image.fromarray(values.astype(np.uint16)), tmp_path)) == 1
    two = np.where(values > 13_000, 1, -1).astype(np.float32)  # no data anywhere in this one
    assert len(found(Image.fromarray(two), tmp_path, "tiff")) == 1


def test_a_picture_without_a_single_number_is_blank(tmp_path):
    assert not found(Image.fromarray(np.full((50, 50), np.nan, np.float32)), tmp_path, "tiff")


def pages_in(path, count):
    first, *others = [page(text) for text in "274"[:count]]
    first.save(path, save_all=True, append_images=others)
    return path


@pytest.mark.parametrize("form", ["tiff", "gif", "png"])
def test_of_several_pages_it_says_that_it_reads_the_first(form, tmp_path):
    several, one = (pages_in(tmp_path / f"{count}.{form}", count) for count in (3, 1))
    pixels, _, note = predict.read_picture(several)
    assert note == f"*** {several} has 3 pages; only the first is read."
    first, _, nothing = predict.read_picture(one)
    assert nothing is None and abs(pixels - first).max() < 2
    several.write_bytes(several.read_bytes()[:-200])  # the last page is cut off
    assert abs(predict.read_picture(several)[0] - first).max() < 2


def test_the_command_says_it_too(save, tmp_path, capsys):
    path = pages_in(tmp_path / "pages.tiff", 3)
    assert predict.main([str(path), "--save-dir", str(save)]) == 0
    out = capsys.readouterr().out
    assert f"*** {path} has 3 pages; only the first is read.\n{path}: 2\n" in out


def test_position_and_size_do_not_matter(tmp_path):
    (usual,) = found(page("5", size=100), tmp_path)
    for size, at in ((100, (2, 0)), (100, (200, 10)), (70, (5, 150)), (400, (25, 25))):
        (digit,) = found(page("5", size=size, at=at, shape=(350, 450)), tmp_path)
        assert abs(digit.image.astype(int) - usual.image).mean() < 6, (size, at)


def test_digits_are_prepared_as_mnists_were(tmp_path):
    for text in "01234567":
        (digit,) = found(page(text), tmp_path)
        y, x = np.nonzero(digit.image > 40)
        assert (
            digit.image.shape == (28, 28)
            and digit.image.dtype == np.uint8
            and digit.image.max() == 255
        )
        assert max(np.ptp(y), np.ptp(x)) + 1 in (19, 20)
        mass = digit.image.sum(dtype=float)
        middle = (
            np.arange(28) @ digit.image.sum(axis=1) / mass,
            np.arange(28) @ digit.image.sum(axis=0) / mass,
        )
        assert middle == pytest.approx((14, 14), abs=0.7)


def test_a_thin_line_is_thickened(tmp_path, reader):
    picture = Image.new("RGB", (400, 600), "white")
    ImageDraw.Draw(picture).line([(60, 60), (300, 60), (150, 520)], fill="black", width=4)
    (digit,) = found(picture, tmp_path)
    assert (digit.image > 100).sum() > 45 and read(reader, [digit]) == "7"


def test_a_photograph_with_uneven_light_noise_and_the_edge_of_the_page(tmp_path, rng, reader):
    picture = np.asarray(page("3 7 5 4", size=150, ink=(60, 60, 90), paper=(235, 225, 205)), float)
    H, W, _ = picture.shape
    y, x = np.mgrid[:H, :W]
    picture = picture * (0.45 + 0.4 * x / W + 0.15 * y / H)[..., None] + rng.normal(
        0, 8, picture.shape
    )
    picture[:, :12] = 25  # the table beside the page
    picture = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(1.5)
    )
    digits = found(picture, tmp_path, "jpg", quality=60)
    assert read(reader, digits) == "3754"


def test_a_camera_held_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    turned = page("4").rotate(90, expand=True)
    (digit,) = found(turned, tmp_path, "jpg", quality=95, exif=exif)
    (usual,) = found(page("4"), tmp_path)
    assert abs(digit.image.astype(int) - usual.image).mean() < 3


def test_lines_are_read_like_a_text(tmp_path, reader):
    picture = page("2 7 4", at=(50, 30), shape=(600, 480))
    picture.paste(page("5 3", at=(0, 0), shape=(400, 160)), (120, 260))
    assert read(reader, found(picture, tmp_path)) == "27453"


def test_a_five_whose_bar_stands_apart_is_one_digit(tmp_path):
    picture = page("5", size=200)
    (whole,) = found(picture, tmp_path)
    left, top, right, bottom = whole.box
    # Parts bar and stem.
    ImageDraw.Draw(picture).rectangle([left + 45, top, left + 52, top + 25], fill="white")
    ImageDraw.Draw(picture).rectangle([left - 2, top + 22, right, top + 29], fill="white")
    (digit,) = found(picture, tmp_path)
    assert digit.box == whole.box


def test_specks_are_no_digits(tmp_path, rng):
    picture = page("7", size=200)
    for x, y in rng.integers(0, 60, (30, 2)):
        picture.paste("black", (int(x), int(y), int(x) + 3, int(y) + 3))
    assert len(found(picture, tmp_path)) == 1


# ── Pictures as people take them ──────────────────────────────────────────────────────────────────

# The small network of these tests makes a mistake now and then, so most pages are only asked for
# the right count.
KIND = {kind.make.__name__: number for number, kind in enumerate(pages.KINDS)}


@long
@pytest.mark.parametrize(
    "kind, least",
    [
        ("tight", 9),
        ("hard_shadow", 7),
        ("pencil", 8),
        pytest.param("plain", 9, marks=exhaustive),
        pytest.param("bright_on_dark", 9, marks=exhaustive),
        pytest.param("sheet_on_table", 9, marks=exhaustive),
        pytest.param("ruled", 8, marks=exhaustive),
        pytest.param("squared", 8, marks=exhaustive),
        pytest.param("ball_pen", 8, marks=exhaustive),
        pytest.param("sloping", 8, marks=exhaustive),
        pytest.param("close_together", 9, marks=exhaustive),
        pytest.param("all_at_once", 8, marks=exhaustive),
    ],
)
def test_digits_are_found_on_pages_as_people_take_them(kind, least, sample, reader, tmp_path):
    hand = pages.Hand(sample.test_images, sample.test_labels)
    right = 0
    for n in range(10):
        picture, text = pages.page_of(KIND[kind], 3, n, hand)
        picture.save(tmp_path / "page.png")
        digits = find.find_digits(predict.read_picture(tmp_path / "page.png")[0], reader.are_digits)
        right += len(digits) == len(text)
    assert right >= least, right


@pytest.mark.parametrize(
    "kinds", [("plain", "ruled", "hard_shadow", "sheet_on_table"), pytest.param(KIND, marks=long)]
)
def test_digits_are_found_on_a_small_page_of_each_kind(kinds, sample, reader):
    hand = pages.Hand(sample.test_images, sample.test_labels)
    wrong = []
    for kind in kinds:
        picture, text = pages.page_of(KIND[kind], 3, 0, hand)
        small = np.asarray(picture.convert("RGB").reduce(2), np.float32)
        if len(find.find_digits(small, reader.are_digits)) != len(text):
            wrong.append(kind)
    assert len(wrong) <= len(kinds) // 4, wrong


@pytest.mark.parametrize("slope", [-8, -4, 0, 6, 8])
def test_a_sloping_row_is_read_from_left_to_right(slope, rng):
    rise, step = np.tan(np.radians(slope)), 60
    boxes = [
        (40 + step * i, 300 + rise * step * i + jitter)
        for i, jitter in enumerate(rng.uniform(-6, 6, 10))
    ]
    boxes += [(40 + step * i, 400 + rise * step * i) for i in range(7)]  # and a second one below
    digits = [find.Digit((x, y, x + 30, y + 50), i) for i, (x, y) in enumerate(boxes)]
    mixed = [digits[i] for i in rng.permutation(len(digits))]
    assert [digit.image for digit in find.reading_order(mixed)] == list(range(len(digits)))


def test_long_lines_go_and_strokes_that_cross_them_stay():
    ink = np.zeros((400, 500))
    ink[100:300, 240:250] = 200  # a stroke
    for at in range(20, 400, 60):
        ink[at : at + 2] = np.maximum(ink[at : at + 2], 150)
    left = find.without_lines(ink, 8)
    assert (left[100:300, 240:250] == 200).all()
    assert (left[:, :230] == 0).all() and (left[:, 260:] == 0).all()
    stroke_only = np.zeros((400, 500))
    stroke_only[100:104, 100:300] = 200  # the bar of a seven is no ruled line: it ends on the page
    assert np.array_equal(find.without_lines(stroke_only, 8), stroke_only)


def test_the_sheet_is_told_from_the_table_and_a_zero_is_no_sheet():
    picture = Image.new("RGB", (600, 400), (90, 60, 40))
    draw = ImageDraw.Draw(picture)
    draw.polygon([(150, 90), (470, 70), (480, 300), (160, 320)], fill=(235, 235, 225))
    sheet = find.sheet_of(np.asarray(picture, np.float32))
    assert sheet[200, 300] and not sheet[:60].any() and not sheet[:, :140].any()
    assert 0.8 < sheet.sum() / (315 * 230) < 1
    for width in (20, 60):
        zero = Image.new("RGB", (400, 500), "white")
        ImageDraw.Draw(zero).ellipse([60, 60, 340, 440], outline="black", width=width)
        assert find.sheet_of(np.asarray(zero, np.float32)) is None


# 108 million pixels, and 3 million.
@pytest.mark.parametrize("unit", [pytest.param(3000, marks=long), pytest.param(500, marks=long)])
def test_a_large_photograph_is_read_and_where_its_digits_are_is_told_in_its_own_pixels(
    unit, tmp_path, save, capsys
):
    picture = Image.new("L", (4 * unit, 3 * unit), 235)
    digit = page("7", size=4 * unit // 3, mode="L", ink=30, paper=235, at=(0, 0))
    picture.paste(digit, (unit, 2 * unit // 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.rotate(90, expand=True).save(tmp_path / "large.jpg", exif=exif)
    assert predict.main([str(tmp_path / "large.jpg"), "--save-dir", str(save)]) == 0
    out = capsys.readouterr().out
    edges = re.search(r"columns (\d+) to (\d+), rows (\d+) to (\d+)", out).groups()
    left, right, top, bottom = (int(edge) * 3000 / unit for edge in edges)
    assert 3000 < left < right < 3000 + 2600
    assert 2000 < top < bottom < 2000 + 4700 and bottom - top > 2500


@pytest.mark.parametrize("n", [pytest.param(n, marks=long) for n in range(3)])
def test_a_page_of_fine_lines_ends_with_an_answer(n):
    picture, _ = pages.fine_lines(np.random.default_rng(n), None)
    assert len(find.find_digits(np.asarray(picture, np.float32))) <= find.MAX_PIECES


LFS_POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def heic(path):
    path.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100))
    return path


def test_a_heic_picture_is_named_where_it_cannot_be_read(tmp_path, save, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it fails
    assert predict.main([str(heic(tmp_path / "IMG_1.HEIC")), "--save-dir", str(save)]) == 2
    error = error_of(capsys)
    assert "IMG_1.HEIC is a HEIC picture" in error and "JPEG" in error and "pillow-heif" in error


def test_a_heic_picture_is_read_with_its_decoder(tmp_path, reader):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(page("2 7", size=200)).save(tmp_path / "two.heic")
    digits = find.find_digits(predict.read_picture(tmp_path / "two.heic")[0], reader.are_digits)
    assert len(digits) == 2
    heic(tmp_path / "cut.heic")
    with pytest.raises(m.UserError, match="cannot be read as a picture"):
        predict.read_picture(tmp_path / "cut.heic")


# ── The window to draw in ─────────────────────────────────────────────────────────────────────────

DRAW = """
import sys
import predict
from matplotlib.backend_bases import KeyEvent, MouseEvent
from support import drawing

def draw(pad):
    canvas = pad.figure.canvas

    def at(name, x, y):
        px, py = pad.paper_axes.transData.transform((x, y))
        MouseEvent(name, canvas, px, py, button=1)._process()

    canvas.start_event_loop(0.2)
    at("motion_notify_event", 10, 10)  # the button is up: nothing is drawn
    assert not any(bar.get_width() for bar in pad.bars)
    at("button_press_event", 140, 40)
    for y in range(60, 240, 20):
        at("motion_notify_event", 140, y)
    at("button_release_event", 140, 240)
    canvas.start_event_loop(0.2)
    assert abs(sum(bar.get_width() for bar in pad.bars) - 1) < 1e-3
    assert pad.seen.get_array().max() == 255 and "%" in pad.right.get_title()
    print("seen", max(range(10), key=lambda i: pad.bars[i].get_width()))
    KeyEvent("key_press_event", canvas, "c")._process()
    assert not any(bar.get_width() for bar in pad.bars) and not pad.seen.get_array().any()
    KeyEvent("key_press_event", canvas, "q")._process()

show = drawing.Pad.show
def both(pad):
    pad.figure.canvas.manager.show()
    draw(pad)
    show(pad)  # it comes back at once, since q has closed the window
drawing.Pad.show = both
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def screen():
    """The name of a display: the one there is, or a virtual one."""
    pytest.importorskip("tkinter", reason="Python is without Tk here, so no window")
    if os.environ.get("DISPLAY"):
        yield os.environ["DISPLAY"]
        return
    if not shutil.which("Xvfb"):
        pytest.skip("there is no display here, and no Xvfb to make one")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write)], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    os.close(write)
    try:
        name = os.fdopen(read).readline().strip()
        if not name:
            pytest.skip("Xvfb does not start here")
        yield f":{name}"
    finally:
        server.terminate()
        server.wait()


def run_draw(save, code, **environment):
    environment = {k: v for k, v in (os.environ | environment).items() if v is not None}
    command = [sys.executable, "-c", code, "--draw", "--save-dir", str(save)]
    return subprocess.run(
        command, cwd=m.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_what_is_drawn_in_the_window_is_answered(save, screen):
    result = run_draw(save, DRAW, DISPLAY=screen, MPLBACKEND="TkAgg")
    assert result.returncode == 0, result.stderr
    assert "seen 1" in result.stdout


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere there is always a display"
)
@pytest.mark.parametrize(
    "environment, said",
    [
        ({"DISPLAY": None, "WAYLAND_DISPLAY": None}, "there is no display here"),
        pytest.param(
            {"DISPLAY": ":99999", "MPLBACKEND": "Agg"},
            "cannot open a window (Matplotlib's backend here is agg",
            marks=long,
        ),
        pytest.param(
            {"DISPLAY": ":99999", "MPLBACKEND": "TkAgg"}, "cannot open a window", marks=long
        ),
    ],
)
def test_without_a_screen_drawing_gets_one_line(environment, said, save):
    result = run_draw(
        save, "import sys, predict; sys.exit(predict.main(sys.argv[1:]))", **environment
    )
    assert result.returncode == 2, result.stderr
    assert (
        said in result.stderr.replace("Agg", "agg")
        and result.stderr.count("\n") == 1
        and not result.stdout
    )


# ── MNIST's own images ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=exhaustive)])
def test_mnist_on_larger_pages_is_read_as_well_as_mnist_itself(
    count, sample, reader, rng, tmp_path
):
    images, labels = sample.test_images[:count], sample.test_labels[:count]
    itself = reader.logits(images).argmax(axis=1) == labels
    right = 0
    for i, (image, label) in enumerate(zip(images, labels)):
        digits = found(paste(image, rng, i % 2), tmp_path)
        right += len(digits) == 1 and read(reader, digits) == str(label)
    assert itself.mean() > 0.9 and right >= itself.sum() - max(2, 0.03 * count)


def test_an_mnist_image_comes_back_as_it_was(sample, tmp_path):
    same = []
    for image in sample.test_images[:40]:
        digits = found(Image.fromarray(image), tmp_path)
        same.append(len(digits) == 1 and abs(digits[0].image.astype(int) - image).mean() < 2)
    # Where a faint tip is below the threshold, the digit is enlarged by a pixel.
    assert np.mean(same) >= 0.85


# ── What is no digit ──────────────────────────────────────────────────────────────────────────────


def test_most_real_digits_pass_and_no_noise_does(reader, sample, rng):
    images = sample.test_images
    real = [answer.is_digit for answer in reader.answers(images)]
    assert 0.97 <= np.mean(real) < 1  # the bounds leave out one in a hundred each
    noise = rng.integers(0, 256, (50, 28, 28)).astype(np.uint8)
    assert not any(answer.is_digit for answer in reader.answers(noise))
    assert reader.likeness(sample.train_images[:5]) == pytest.approx(np.ones(5))
    # Whatever the contrast.
    assert np.allclose(reader.likeness(images // 2 + 0.0), reader.likeness(images), atol=0.01)


def test_the_answer_says_that_it_is_no_digit(save, tmp_path, capsys, rng):
    picture = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(picture).rectangle([40, 40, 260, 260], outline="black", width=14)  # a frame
    picture.save(tmp_path / "shape.png")
    assert predict.main([str(tmp_path / "shape.png"), "--save-dir", str(save)]) == 0
    out = capsys.readouterr().out
    assert "shape.png: ?" in out and "does not look like a digit" in out


def test_edits_are_counted():
    assert [edits(said, "1234") for said in ("1234", "234", "12345", "1324", "")] == [0, 1, 1, 2, 4]


def test_energy_is_the_logarithm_of_the_sum(rng):
    logits = rng.standard_normal((5, 10)) * 3
    np.testing.assert_allclose(
        predict.energy(logits), np.log(np.exp(logits).sum(axis=1)), rtol=1e-12
    )
    assert np.isfinite(predict.energy(logits + 5000)).all()


# ── The command ───────────────────────────────────────────────────────────────────────────────────


def test_the_command_shows_image_probabilities_and_figure(save, tmp_path, capsys, sample):
    page("2 7").save(tmp_path / "one.png")
    page("A", size=300).save(tmp_path / "two.png")
    paths = [str(tmp_path / name) for name in ("one.png", "two.png")]
    figure = tmp_path / "figure.png"
    assert predict.main([*paths, "--save-dir", str(save), "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert f"Weights of {save / 'small'}" in out and f"{paths[0]}: 2 7" in out and "1 of 2" in out
    bars = [line.split("|")[2] for line in out.splitlines() if line.count("|") == 2 and "%" in line]
    assert len(bars) == 30  # ten a digit
    for ten in (bars[:10], bars[10:20], bars[20:]):
        assert [line.split()[0] for line in ten] == list("0123456789")
        assert sum(float(line.split("%")[0].split()[-1]) for line in ten) == pytest.approx(
            100, abs=0.5
        )
    image = np.asarray(Image.open(figure).convert("L"))
    assert 0.01 < (image < 200).mean() < 0.5 and min(image.shape) > 400


def test_a_run_on_other_data_says_what_its_answers_mean(save, tmp_path, capsys):
    page("2").save(tmp_path / "two.png")
    shutil.copytree(save / "small", tmp_path / "save" / "small")
    path = tmp_path / "save" / "small" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["name"] = "fashion"
    path.write_text(json.dumps(config))
    for folder, said in ((save, False), (tmp_path / "save", True)):
        assert (
            predict.main([str(tmp_path / "two.png"), "--tag", "small", "--save-dir", str(folder)])
            == 0
        )
        assert ("*** small was trained on fashion, not on MNIST" in capsys.readouterr().out) == said


def test_a_terminal_without_unicode(save, tmp_path):
    page("2").save(tmp_path / "two.png")
    command = [sys.executable, m.ROOT / "predict.py", "two.png", "--save-dir", save]
    environment = {
        "PYTHONIOENCODING": "ascii",
        "PATH": "",
        "MPLBACKEND": "Agg",
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "two.png: 2" in result.stdout and "##" in result.stdout and result.stdout.isascii()


def test_default_weights(tmp_path, save):
    with pytest.raises(m.UserError, match="no run with weights yet; this trains one"):
        predict.find_weights(tmp_path)
    for when, tag in ((3, "old"), (5, "new"), (7, "evolution_1"), (1, "record")):
        (tmp_path / tag).mkdir()
        path = tmp_path / tag / "checkpoint_last.npz"
        path.write_bytes((save / "small" / "checkpoint_last.npz").read_bytes())
        if tag == "evolution_1":
            storage.write_file(path, storage.pack_arrays(**{"fc1.weight": np.zeros(3)}))
        os.utime(path, (when, when))
        assert predict.find_weights(tmp_path).name == {"old": "old", "record": "record"}.get(
            tag, "new"
        )
    with pytest.raises(m.UserError, match="has no run 'other'"):
        predict.find_weights(tmp_path, "other")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with pictures that cannot be read, and a good one. No test changes it."""
    tmp_path = tmp_path_factory.mktemp("bad")
    page("2").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    page("2", size=400).save(tmp_path / "good.jpg")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("This is no picture.")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:3000])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("1", (20_000, 10_001)).save(tmp_path / "large.png")
    Image.new("RGB", (200, 100), "#aabbcc").save(tmp_path / "blank.png")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "pointer.png").write_bytes(LFS_POINTER)
    return tmp_path


@pytest.mark.parametrize(
    "name, said",
    [
        ("missing.png", "there is no picture"),
        ("folder.png", "cannot be read"),
        ("text.png", "cannot be read"),
        ("empty.png", "cannot be read"),
        ("cut.png", "cannot be read"),
        ("cut.jpg", "cannot be read"),
        ("huge.png", "too large"),
        ("large.png", "too large"),
        ("blank.png", "blank"),
        ("dot.png", "blank"),
        ("pointer.png", "run `git lfs pull`"),
    ],
)
def test_a_bad_picture_gets_one_line_and_exit_status_2(name, said, bad, save, capsys):
    assert predict.main([str(bad / "good.png"), str(bad / name), "--save-dir", str(save)]) == 2
    error = error_of(capsys)
    assert said in error and name in error


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "PICTURE"),
        (("--draw", "good.png"), "--draw takes no PICTURE"),
        (("--digit", "x.png"), "--figure"),
        (("good.png", "--tag", "other"), "has no run 'other'"),
        (("good.png", "--figure", "nowhere/out.png"), "cannot be written"),
        (("good.png", "--figure", "good.png"), "would overwrite the picture"),
        (("good.png", "--figure", "out.jpg"), "should end in .png"),
        (("good.png", "--figure", "."), "should end in .png"),
        (("good.png", "--figure", "folder.png"), "is not a file"),
        (("good.png", "--figure", "x" * 300 + ".png"), "cannot be written"),
    ],
)
def test_a_bad_command_gets_one_line(flags, said, bad, save, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    before = Path("good.png").read_bytes()
    assert predict.main([*flags, "--save-dir", str(save)]) == 2
    assert said in capsys.readouterr().err
    assert Path("good.png").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such names")
def test_a_name_that_is_no_text_and_a_link_for_the_figure(tmp_path, save):
    link, figure = tmp_path / "link.png", tmp_path / "figure.png"
    link.symlink_to(figure)
    for name in (b"\xff.png", "数字 🦖\t.png".encode()):
        picture = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        page("2").save(picture)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert predict.main([picture, "--figure", link, "--save-dir", str(save)]) == 0
        assert link.is_symlink() and figure.stat().st_size > 1000
        figure.unlink()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PK\x03\x04 and then nothing", "checkpoint_last.npz is damaged"),
        (LFS_POINTER, "checkpoint_last.npz cannot be read (is a git-lfs pointer, not the file"),
    ],
)
def test_a_damaged_checkpoint_gets_one_line(content, said, bad, save, capsys, tmp_path):
    folder = tmp_path / "save" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((save / "small" / "config.json").read_bytes())
    (folder / "checkpoint_last.npz").write_bytes(content)
    assert predict.main([str(bad / "good.png"), "--save-dir", str(tmp_path / "save")]) == 2
    assert said in error_of(capsys)


def test_while_a_run_is_saving_its_previous_checkpoint_is_read(save, tmp_path, capsys):
    shutil.copytree(save / "small", tmp_path / "save" / "small")
    last, previous = (tmp_path / "save" / "small" / name for name in runs.CHECKPOINTS)
    os.replace(last, previous)
    page("2").save(tmp_path / "two.png")
    for tag in ((), ("--tag", "small")):
        where = ["--save-dir", str(tmp_path / "save"), *tag]
        assert predict.main([str(tmp_path / "two.png"), *where]) == 0
        assert "two.png: 2" in capsys.readouterr().out


def test_the_command_that_it_prints_can_be_typed(tmp_path, bad, capsys):
    folder = tmp_path / "my runs"
    assert predict.main([str(bad / "good.png"), "--save-dir", str(folder)]) == 2
    words = shlex.split(error_of(capsys).rpartition(": ")[2])
    assert words[0] == "python" and m.parse_settings(words[2:]).save_dir == str(folder)
    assert Path(words[1]).resolve() == m.ROOT / "mnist_resnet9.py"


# ── What it loads ─────────────────────────────────────────────────────────────────────────────────

LOADED = """
import sys, predict
status = predict.main(sys.argv[1:])
print("loaded", *({"matplotlib", "skimage", "scipy"} & set(sys.modules)))
sys.exit(status)
"""


def loaded(*arguments, code=""):
    """Which of the heavy packages a command loads."""
    command = [sys.executable, "-c", code + LOADED, *map(str, arguments)]
    result = subprocess.run(command, cwd=m.ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_nothing_is_loaded_before_it_is_needed(bad, save):
    assert not loaded("nowhere.png", "--save-dir", save, code=HELP)
    with_digits = loaded(bad / "good.png", "--save-dir", save)
    assert "matplotlib" not in with_digits  # so it needs no cache that can be written


HELP = """
import sys
sys.argv[1:] = ["--help"]
import predict
predict.sys = sys
main = predict.main
def help(arguments):
    try:
        main(arguments)
    except SystemExit as done:
        return done.code
predict.main = help
"""


# ── Windows and figures under the user's own settings ─────────────────────────────────────────────

THEIRS = {
    "text.usetex": True,
    "font.family": ["NoSuchFont"],
    "figure.facecolor": "black",
    "text.color": "white",
    "axes.titlecolor": "white",
    "savefig.bbox": "tight",
}


def test_the_users_settings_change_no_figure(bad, save, tmp_path, caplog):
    contents = []
    plt.close("all")
    for settings in ({}, THEIRS):
        arguments = [str(bad / "good.png"), "--figure", tmp_path / "out.png"]
        with plt.rc_context(settings):
            assert predict.main([*arguments, "--save-dir", str(save)]) == 0
            assert all(plt.rcParams[name] == value for name, value in settings.items())
        contents.append((tmp_path / "out.png").read_bytes())
    assert contents[0] == contents[1] and not caplog.records and not plt.get_fignums()


def test_the_users_settings_do_not_change_the_window_to_draw_in(monkeypatch, caplog):
    monkeypatch.setattr(drawing, "shows_windows", lambda: True)
    with plt.rc_context(THEIRS):
        pad = drawing.open_pad(lambda picture: None)
        pad.figure.canvas.draw()
    assert (
        pad.figure.get_facecolor() == (1, 1, 1, 1) and pad.paper_axes.title.get_color() != "white"
    )
    assert not caplog.records
    plt.close(pad.figure)


# ── In a notebook ─────────────────────────────────────────────────────────────────────────────────


def digits_of(reading):
    digits, answers = reading
    assert len(digits) == len(answers)
    return "".join(str(answer.digit) if answer.is_digit else "?" for answer in answers)


@pytest.fixture(scope="module")
def door(save):
    """predict.read() with the small network."""
    return lambda picture: predict.read(picture, tag="small", save_dir=save)


def forms_of(grey):
    """A grey picture (H, W) uint8 in all forms in which a notebook may have it, by name."""
    rgb = np.stack([grey] * 3, axis=2)
    opaque = np.full_like(grey, 255)
    return {
        "uint8": grey,
        "floats to 255": grey.astype(np.float32),
        "floats to 1": grey / 255,
        "16 bits": grey.astype(np.uint16) * 257,
        "one channel": grey[..., None],
        "colours": rgb,
        "colours to 1": rgb / 255,
        "colours in 16 bits": rgb.astype(np.uint16) * 257,
        "opaque": np.dstack([rgb, opaque]),
        "channels first": np.moveaxis(rgb, 2, 0) / np.float32(255),
        "a list": grey.tolist(),
        "light on dark": 255 - grey,
        "bits": grey > 127,
        "ones and zeros": (grey > 127).astype(int),
        "Pillow's": Image.fromarray(grey),
        "Pillow's in colours": Image.fromarray(rgb),
    }


FORMS = list(forms_of(np.zeros((9, 9), np.uint8)))


# The others take another way through the same lines.
OFTEN = ("uint8", "floats to 1", "16 bits", "colours", "channels first", "a list")


@pytest.mark.parametrize(
    "form", [form if form in OFTEN else pytest.param(form, marks=long) for form in FORMS]
)
def test_read_takes_a_picture_in_any_form(form, door):
    grey = np.asarray(page("2 7").convert("L"))
    usual, reading = door(grey), door(forms_of(grey)[form])
    assert digits_of(reading) == digits_of(usual) == "27"
    for digit, same in zip(reading.digits, usual.digits):
        assert np.allclose(digit.box, same.box, atol=2)
        # Two have no grey, so their edges are rough.
        rough = form in ("bits", "ones and zeros")
        assert abs(digit.image.astype(int) - same.image).mean() < (12 if rough else 3)
    assert repr(usual).count("\n") == 1 and repr(usual).startswith("2 (")


MODES = "1 L P RGB RGBA RGBX RGBa CMYK YCbCr HSV LA PA I F I;16 I;16L I;16B I;16N".split()


@pytest.mark.parametrize(
    "mode", ["La", "LAB", *(pytest.param(mode, marks=pytest.mark.long) for mode in MODES)]
)
def test_read_takes_a_picture_of_any_mode(mode, door):
    """On white paper, as far as Pillow can convert to it; blank in one that it can make alone."""
    grey = page("2 7").convert("L")
    ways = {"La": "LA", "PA": "LA", "RGBa": "RGBA", "HSV": "RGB"}
    through = grey.convert(ways.get(mode, "L"))
    try:
        picture = through.convert(mode)
    except ValueError:
        assert len(door(Image.new(mode, (40, 40))).digits) == 0
        return
    assert digits_of(door(picture)) == "27"


def test_read_takes_a_file_and_says_where_in_its_own_pixels(door, tmp_path, monkeypatch):
    picture = page("7", at=(150, 90))
    picture.save(tmp_path / "seven.png")
    (usual,), _ = door(picture)
    monkeypatch.setattr(predict, "WORKING_SIZE", 200)
    assert max(picture.size) > 1.4 * predict.WORKING_SIZE
    for form in (picture, np.asarray(picture), str(tmp_path / "seven.png")):
        (digit,), _ = door(form)
        np.testing.assert_allclose(digit.box, usual.box, atol=4)
    with pytest.raises(m.UserError, match="there is no picture"):
        door(tmp_path / "missing.png")


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images,
        lambda images: images / 255,
        lambda images: images.astype(np.float32),
        lambda images: images[..., None],
        lambda images: images[:, None] / np.float32(255),
        lambda images: list(images),
        lambda images: 255 - images,  # dark ink
    ],
)
def test_read_takes_images_that_are_prepared(change, door, sample, reader):
    images = sample.test_images[:5]
    digits, answers = door(change(images))
    assert all(np.array_equal(digit.image, image) for digit, image in zip(digits, images))
    assert len(answers) == len(images)
    for answer, same in zip(answers, reader.answers(images)):
        assert np.array_equal(answer.probabilities, same.probabilities)
    for one in (change(images)[0], change(images[:1])):
        (answer,) = door(one).answers
        np.testing.assert_allclose(answer.probabilities, answers[0].probabilities, atol=1e-5)


def test_read_where_there_is_no_digit(door):
    for nothing in (np.full((100, 80), 255), np.zeros((40, 60, 3)), np.zeros((0, 28, 28))):
        reading = door(nothing)
        assert reading == ([], []) and repr(reading) == "no digit"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert digits_of(door(np.zeros((2, 28, 28)))) == "??"


@pytest.mark.parametrize(
    "picture, said",
    [
        (np.zeros((2, 3, 4, 5)), "this array is (2, 3, 4, 5)"),
        (np.zeros((30, 30, 2)), "this array is (30, 30, 2)"),
        (np.zeros((2, 28, 28, 3)), "this array is (2, 28, 28, 3)"),
        (np.zeros(784), "this array is (784,)"),
        (np.zeros((0, 5)), "this array is (0, 5)"),
        (np.full((1, 28, 28), -0.4), "from -0.4 to -0.4"),
        (np.full((28, 28), np.nan), "from nan to nan"),
        (np.full((50, 50, 3), 300), "from 300 to 300"),
        (["one.png", "two.png"], "one picture at a time"),
        ([[1, 2], [3]], "one picture at a time"),
        (None, "one picture at a time"),
        ({"a": 1}, "one picture at a time"),
    ],
)
def test_read_says_what_it_takes(picture, said, door):
    with pytest.raises(m.UserError) as raised:
        door(picture)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_read_loads_the_weights_once_and_again_when_they_change(save, tmp_path):
    shutil.copytree(save / "small", tmp_path / "small")
    readers = [predict.reader_of(tmp_path, tag) for tag in (None, "small")]
    os.utime(tmp_path / "small" / "checkpoint_last.npz", (1, 1))
    again = predict.reader_of(tmp_path, None)
    assert readers[0] is readers[1] is not again


def test_read_computes_with_the_functions_as_they_are_now(save, monkeypatch):
    usual = predict.reader_of(save, "small")
    monkeypatch.setattr(m, "relu", lambda x: (x * 2, x > 0))
    other = predict.reader_of(save, "small")
    assert other is not usual and other.least != usual.least


def test_what_was_read_can_be_drawn(door):
    for picture in (page("2 7"), np.asarray(page("2 7").convert("L")) / 255):
        figure = predict.draw([("mine", picture, *door(picture))])
        assert figure.axes[0].get_title() == "mine: 2 7" and len(figure.axes) == 5
        plt.close(figure)


# ── A network that was edited ─────────────────────────────────────────────────────────────────────


def one_more_layer(settings, rng=None):
    layers = RIGHT_LAYERS(settings, rng)
    return [*layers[:8], m.conv("conv9", settings.channels[3], settings.channels[3]), *layers[8:]]


def two_classes(settings, rng=None):
    return [*RIGHT_LAYERS(settings, rng)[:-1], m.fully_connected("fc9", 49 * 16, 2)]


def raises(settings, rng=None):
    raise KeyError("widths")


RIGHT_LAYERS = m.layers


def test_an_edited_network_reads_with_its_own_runs(tmp_path, save, monkeypatch, capsys):
    shutil.copytree(save / "small", tmp_path / "small")
    page("2").save(tmp_path / "two.png")
    picture, where = str(tmp_path / "two.png"), ["--save-dir", str(tmp_path)]
    monkeypatch.setattr(m, "layers", one_more_layer)
    assert predict.main([picture, *where]) == 2
    assert "has no run with weights of this network yet" in error_of(capsys)
    assert predict.main([picture, *where, "--tag", "small"]) == 2
    assert "is of another network (it has no conv9.bias; no conv9.weight)" in error_of(capsys)
    flags = "--tag edited --epochs-max 1 --train-images 64 --channels 2,2,2,2 --device cpu".split()
    flags += ["--data-dir", str(m.ROOT / "data" / "sample"), "--threads", "1"]
    assert m.main([*flags, *where]) == 0
    for tag in ([], ["--tag", "edited"]):
        assert predict.main([picture, *where, *tag]) == 0
        assert f"Weights of {tmp_path / 'edited'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, edited, said",
    [
        ("layers", raises, "the network in mnist_resnet9.py raises KeyError: 'widths'"),
        ("layers", two_classes, "is of another network"),
        ("relu", lambda x: x[:5], "the network in mnist_resnet9.py raises "),
        ("linear", lambda x, w, b: ((x @ w)[:, :2], None), "gives (2,) scores an image"),
    ],
)
def test_a_broken_network_gets_one_line(name, edited, said, bad, save, monkeypatch, capsys):
    monkeypatch.setattr(m, name, edited)
    flags = [str(bad / "good.png"), "--save-dir", str(save), "--tag", "small"]
    assert predict.main(flags) == 2
    captured = capsys.readouterr()
    *notes, error = captured.err.splitlines()  # notes: the fast ways step aside
    assert said in error and not captured.out
    assert all(note.startswith("*** ") for note in notes)
