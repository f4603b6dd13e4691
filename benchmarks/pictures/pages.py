"""Pictures of digits as people take them, made from real handwriting, for predict_accuracy.py and
the tests.

The handwriting is MNIST's test digits, enlarged; every page is made from a random generator, so a
seed makes the same pages on any machine. Each kind of page is a function of KINDS: rng, hand → (a
PIL picture, the text on it).
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import draw, morphology, transform


class Hand:
    """Whose digits are written: images (N, 28, 28) uint8 and their labels."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def digit(self, rng, height, pen=None):
        """A digit of about this height as ink from 0 to 1, cut to its box, and its label.

        pen: the width of the stroke in pixels; without it the stroke is as wide as it was written.
        """
        i = rng.integers(len(self.images))
        image = self.images[i]
        rows, cols = np.flatnonzero(image.max(axis=1) > 60), np.flatnonzero(image.max(axis=0) > 60)
        image = image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        scale = height / max(image.shape)
        shape = [round(length * scale) for length in np.add(image.shape, 4)]
        soft = transform.resize(np.pad(image / 255, 2), shape, order=3, anti_aliasing=False)
        if pen is None:
            return trim(np.clip((soft - 0.3) * 4 + 0.5, 0, 1)), str(self.labels[i])
        line = morphology.skeletonize(soft > 0.4)
        line = np.pad(line, int(pen) + 2)
        away = ndimage.distance_transform_edt(~line)
        return trim(np.clip(pen / 2 + 0.5 - away, 0, 1)), str(self.labels[i])


def trim(ink):
    rows, cols = np.flatnonzero(ink.max(axis=1) > 0.1), np.flatnonzero(ink.max(axis=0) > 0.1)
    return ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


class Page:
    """Ink on paper: (H, W) ink from 0 to 1, and the text as it is read."""

    def __init__(self, height, width):
        self.ink, self.text = np.zeros((height, width)), ""

    def put(self, digit, top, left):
        h, w = digit.shape
        part = self.ink[top : top + h, left : left + w]
        np.maximum(part, digit, out=part)

    def colour(self, paper, ink, strength=1.0):
        """(H, W, 3), 0 … 255. paper: a colour, or (H, W, 3)."""
        share = (self.ink * strength)[..., None]
        return np.asarray(paper, float) * (1 - share) + np.asarray(ink, float) * share


def row(
    rng, hand, count=None, height=None, pen=None, gap=(0.25, 0.7), slope=0.0, margin=0.35, most=1500
):
    """A page with a row of digits of about the same height, on a line that slopes by this many
    degrees."""
    count = count or int(rng.integers(1, 5))
    height = height or int(rng.integers(90, 220))
    height = min(height, int(most / (1.3 * count)))
    digits = [hand.digit(rng, height * rng.uniform(0.9, 1.1), pen) for _ in range(count)]
    gaps = rng.uniform(*gap, count) * height
    side = int(margin * height) + 2
    width = int(sum(d.shape[1] for d, _ in digits) + gaps[:-1].sum()) + 2 * side
    rise = np.tan(np.radians(slope)) * width
    tallest = max(d.shape[0] for d, _ in digits)
    page = Page(int(tallest * 1.25 + abs(rise)) + 2 * side, width)
    x = side
    for (digit, label), space in zip(digits, gaps):
        down = rise * x / width + max(0, -rise)
        middle = side + down + tallest * 0.6 + rng.uniform(-0.05, 0.05) * height
        page.put(
            digit,
            int(np.clip(middle - digit.shape[0] / 2, 0, page.ink.shape[0] - digit.shape[0])),
            int(x),
        )
        x += digit.shape[1] + space
        page.text += label
    return page


def around(page, rng, up_to=0.6):
    """The same page with more paper around, of random size."""
    h, w = page.ink.shape
    more = (rng.uniform(0, up_to, 4) * [h, h, w, w]).astype(int)
    page.ink = np.pad(page.ink, (more[:2], more[2:]))
    return page


def paper_and_ink(rng):
    paper = rng.uniform(195, 245) + rng.uniform(-12, 12, 3)
    ink = [
        np.array(c, float)
        for c in ((25, 25, 30), (30, 40, 120), (60, 60, 70), (140, 30, 40), (20, 80, 60))
    ]
    return np.clip(paper, 0, 255), ink[rng.integers(len(ink))]


def light(rng, H, W, least=0.6):
    """A smooth fall of light over the page, (H, W, 1), at most 1."""
    y, x = np.mgrid[0 : 1 : H * 1j, 0 : 1 : W * 1j]
    angle, drop = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1 - least)
    t = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) + 0.5
    return (1 - drop * np.clip(t, 0, 1))[..., None]


def camera(rng, picture, noise=3.0, blur=0.6):
    """What a camera makes of it: a little blur and noise."""
    picture = ndimage.gaussian_filter(np.asarray(picture, np.float32), (blur, blur, 0))
    noise = rng.normal(0, noise, picture.shape[:2])[..., None] + rng.normal(
        0, noise / 2, picture.shape
    )
    return Image.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8))


# ── The kinds of pages ────────────────────────────────────────────────────────────────────────────


def plain(rng, hand):
    """Dark ink on bright paper, photographed: light that falls off, a little blur and noise."""
    page = around(row(rng, hand), rng)
    return camera(rng, page.colour(*paper_and_ink(rng)) * light(rng, *page.ink.shape)), page.text


def bright_on_dark(rng, hand):
    """Chalk on a board, or bright on dark on a screen."""
    page = around(row(rng, hand), rng)
    board, chalk = rng.uniform(10, 70, 3), rng.uniform(180, 255, 3)
    return camera(rng, page.colour(board, chalk), noise=2), page.text


def tight(rng, hand):
    """A digit that fills the picture: no margin, or a few pixels."""
    digit, label = hand.digit(rng, int(rng.integers(30, 300)))
    page = Page(*np.add(digit.shape, (side := int(rng.integers(0, 4))) * 2))
    page.put(digit, side, side)
    return Image.fromarray((255 - 255 * page.ink).astype(np.uint8)), label


def turned(rng, hand):
    """A picture taken at an angle of up to 10 degrees, with scan-like clean paper."""
    page = around(row(rng, hand), rng)
    page.ink = np.pad(page.ink, 20)
    page.ink = np.clip(transform.rotate(page.ink, rng.uniform(-10, 10), resize=True), 0, 1)
    return camera(rng, page.colour(*paper_and_ink(rng)), noise=2), page.text


def number(rng, hand):
    """A telephone number in a straight row."""
    page = around(row(rng, hand, count=int(rng.integers(7, 12)), gap=(0.2, 0.5)), rng, 0.2)
    return camera(rng, page.colour(*paper_and_ink(rng)), noise=2), page.text


def sheet_on_table(rng, hand):
    """A sheet that does not fill the picture: a table around it, bright or dark, plain or with a
    grain."""
    page = around(row(rng, hand), rng)
    paper, ink = paper_and_ink(rng)
    sheet = page.colour(paper, ink)
    h, w = page.ink.shape
    scale = rng.uniform(1.3, 1.9)
    H, W = int(h * scale), int(w * scale)
    table = rng.uniform(30, 150) * np.array([1.0, rng.uniform(0.75, 1), rng.uniform(0.5, 1)])
    y, x = np.mgrid[:H, :W]
    grain = np.sin(y / rng.uniform(4, 15) + 3 * np.sin(x / rng.uniform(100, 300))) * rng.uniform(
        0, 12
    )
    table = table + grain[..., None] * rng.integers(0, 2)
    room = np.array([W - w, H - h]) / 2
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], float)
    angle = np.radians(rng.uniform(-8, 8))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    there = (corners - [w / 2, h / 2]) @ turn.T * rng.uniform(0.85, 1) + [W / 2, H / 2]
    there += rng.uniform(-0.3, 0.3, 2) * room + rng.uniform(-0.03, 0.03, (4, 2)) * [w, h]
    back = transform.ProjectiveTransform.from_estimate(there, corners)
    seen = transform.warp(sheet, back, output_shape=(H, W), cval=-1, order=1)
    inside = transform.warp(np.ones((h, w)), back, output_shape=(H, W), order=1)[..., None]
    picture = np.clip(seen, 0, 255) * inside + table * (1 - inside)
    return camera(rng, picture * light(rng, H, W, 0.75)), page.text


def hard_shadow(rng, hand):
    """The shadow of a hand or a telephone: a straight edge or a round one, across the page."""
    page = around(row(rng, hand), rng)
    H, W = page.ink.shape
    y, x = np.mgrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]
    if rng.integers(2):
        angle = rng.uniform(0, 2 * np.pi)
        away = x * np.cos(angle) + y * np.sin(angle) - rng.uniform(-0.5, 0.5)
    else:
        away = np.hypot(x - rng.uniform(-1.2, 1.2), y - rng.uniform(-1.2, 1.2)) - rng.uniform(
            0.5, 1.2
        )
    soft = np.clip(away * max(H, W) / 2 / rng.uniform(2, 12) + 0.5, 0, 1)[..., None]
    dark = rng.uniform(0.4, 0.7)
    return camera(rng, page.colour(*paper_and_ink(rng)) * (dark + (1 - dark) * soft)), page.text


def lined(rng, hand, squared):
    height = int(rng.integers(90, 220))
    page = around(row(rng, hand, height=height, pen=rng.uniform(0.04, 0.09) * height), rng)
    H, W = page.ink.shape
    pitch = height * (rng.uniform(0.3, 0.7) if squared else rng.uniform(0.6, 1.3))
    paper, ink = paper_and_ink(rng)
    lines = np.zeros((H, W))
    thick = int(rng.integers(1, 4))
    for at in np.arange(rng.uniform(0, pitch), H, pitch):
        lines[int(at) : int(at) + thick] = 1
    if squared:
        for at in np.arange(rng.uniform(0, pitch), W, pitch):
            lines[:, int(at) : int(at) + thick] = 1
    colours = ((70, 100, 180), (100, 100, 110), (60, 80, 140), (180, 80, 100))
    lines = lines[..., None] * rng.uniform(0.7, 1)
    sheet = page.colour(
        paper * (1 - lines) + np.array(colours[rng.integers(4)], float) * lines, ink, 0.95
    )
    angle = rng.uniform(-3, 3)
    sheet = transform.rotate(sheet, angle, mode="edge", order=1)
    return camera(rng, sheet * light(rng, H, W, 0.7)), page.text


def ruled(rng, hand):
    """Ruled paper with clear lines, which run through the digits; held at up to 3 degrees."""
    return lined(rng, hand, squared=False)


def squared(rng, hand):
    """Squared paper, as for arithmetic: lines both ways."""
    return lined(rng, hand, squared=True)


def pencil(rng, hand):
    """Faint pencil with a grain, and the noise of a camera in a dark room."""
    height = int(rng.integers(90, 220))
    page = around(row(rng, hand, height=height, pen=rng.uniform(0.04, 0.08) * height), rng)
    page.ink *= rng.uniform(0.6, 1, page.ink.shape)
    paper = rng.uniform(170, 225) + rng.uniform(-8, 8, 3)
    picture = page.colour(paper, paper - rng.uniform(45, 90)) * light(rng, *page.ink.shape, 0.7)
    return camera(rng, picture, noise=rng.uniform(6, 14)), page.text


def ball_pen(rng, hand):
    """A thin ball pen: strokes of one pixel, in pictures up to photo size."""
    height = int(rng.integers(60, 500))
    page = around(row(rng, hand, height=height, pen=1.0, most=3500), rng)
    picture = page.colour(*paper_and_ink(rng))
    return camera(rng, picture, noise=1, blur=rng.uniform(0, 0.6)), page.text


def sloping(rng, hand):
    """Ten digits in a row that rises or falls by 6 to 8 degrees."""
    slope = rng.uniform(6, 8) * rng.choice([-1, 1])
    page = around(row(rng, hand, count=10, slope=slope, gap=(0.2, 0.5)), rng, 0.2)
    return camera(rng, page.colour(*paper_and_ink(rng)), noise=2), page.text


def two_rows(rng, hand):
    """Two or three rows, one below the other, sloping by up to 5 degrees."""
    slope, height = rng.uniform(-5, 5), int(rng.integers(70, 110))
    rows = [
        row(rng, hand, count=int(rng.integers(3, 7)), height=height, slope=slope, margin=0.2)
        for _ in range(int(rng.integers(2, 4)))
    ]
    W = max(page.ink.shape[1] for page in rows)
    whole = Page(sum(page.ink.shape[0] for page in rows), W)
    top = 0
    for page in rows:
        whole.put(page.ink, top, 0)
        whole.text += page.text
        top += page.ink.shape[0]
    return camera(rng, whole.colour(*paper_and_ink(rng)), noise=2), whole.text


def close_together(rng, hand):
    """Digits so close that their boxes overlap, without touching."""
    height = int(rng.integers(90, 200))
    digits = [
        hand.digit(rng, height * rng.uniform(0.9, 1.1)) for _ in range(int(rng.integers(2, 5)))
    ]
    page = Page(int(height * 2), int(height * 1.3 * (len(digits) + 1)))
    apart = max(4, int(0.06 * height))
    x = 30
    for digit, label in digits:
        h, w = digit.shape
        top = int(height - h / 2)
        taken = ndimage.binary_dilation(page.ink > 0.1, np.ones((3, 3)), iterations=apart)
        while page.text and not taken[top : top + h, x - 1 : x - 1 + w][digit > 0.1].any():
            x -= 1
        page.put(digit, top, x)
        page.text += label
        x += w + apart + 2
    return camera(rng, page.colour(*paper_and_ink(rng)), noise=2), page.text


def touching(rng, hand):
    """Two or three digits, of which two touch."""
    height = int(rng.integers(90, 200))
    digits = [
        hand.digit(rng, height * rng.uniform(0.9, 1.1)) for _ in range(int(rng.integers(2, 4)))
    ]
    page = Page(int(height * 2), int(height * 1.3 * (len(digits) + 1)))
    x, joined = 30, int(rng.integers(len(digits) - 1))
    for i, (digit, label) in enumerate(digits):
        h, w = digit.shape
        top = int(height - h / 2)
        if i == joined + 1:
            x -= 2
            while not ((page.ink[top : top + h, x : x + w] > 0.5) & (digit > 0.5)).any():
                x -= 1
            x -= 2
        page.put(digit, top, x)
        page.text += label
        x += w + (int(0.3 * height) if i != joined else 0)
    return camera(rng, page.colour(*paper_and_ink(rng)), noise=2), page.text


def all_at_once(rng, hand):
    """A photograph of a sheet on a table, ruled, in a soft shadow, with noise."""
    height = int(rng.integers(90, 180))
    page = around(row(rng, hand, height=height, pen=rng.uniform(0.05, 0.09) * height), rng)
    H, W = page.ink.shape
    paper, ink = paper_and_ink(rng)
    lines = np.zeros((H, W))
    for at in np.arange(rng.uniform(0, height), H, height * rng.uniform(0.6, 1.1)):
        lines[int(at) : int(at) + 2] = 1
    sheet = page.colour(
        paper * (1 - 0.4 * lines[..., None]) + 0.4 * lines[..., None] * np.array([110, 140, 200]),
        ink,
    )
    side = int(rng.uniform(0.15, 0.3) * max(H, W))
    picture = np.empty((H + 2 * side, W + 2 * side, 3))
    picture[:] = rng.uniform(40, 130) * np.array([1, 0.85, 0.7])
    picture[side:-side, side:-side] = sheet
    picture = transform.rotate(picture, rng.uniform(-4, 4), mode="edge", order=1)
    shade = np.ones(picture.shape[:2])
    shade[:, int(rng.uniform(0.3, 0.7) * picture.shape[1]) :] = rng.uniform(0.65, 0.85)
    shade = ndimage.gaussian_filter(shade, rng.uniform(3, 15))[..., None]
    return camera(rng, picture * shade, noise=4), page.text


def fine_lines(rng, hand):
    """A page that is all fine lines: squares of a few pixels, or hatching; there is nothing to
    read."""
    H, W = rng.integers(700, 1001, 2)
    pitch = int(rng.integers(4, 9))
    picture = np.full((H, W, 3), 240.0)
    kind = rng.integers(3)
    if kind == 0:
        picture[::pitch] = picture[:, ::pitch] = 90
    elif kind == 1:
        for start in range(0, H + W, pitch):
            rr, cc = draw.line(start, 0, 0, start)
            keep = (rr < H) & (cc < W)
            picture[rr[keep], cc[keep]] = 60
    else:
        picture[::pitch, rng.random(W) < 0.8] = 70  # short dashes by the thousand
    return Image.fromarray(picture.astype(np.uint8)), ""


class Kind(NamedTuple):
    name: str
    make: object


KINDS = [
    Kind("plain paper, dark ink, uneven light", plain),
    Kind("bright on dark", bright_on_dark),
    Kind("no margin", tight),
    Kind("turned by up to 10°", turned),
    Kind("7 to 11 digits in a row", number),
    Kind("two or three rows", two_rows),
    Kind("sheet on a table", sheet_on_table),
    Kind("hard shadow", hard_shadow),
    Kind("ruled paper", ruled),
    Kind("squared paper", squared),
    Kind("pencil, camera noise", pencil),
    Kind("ball pen of one pixel", ball_pen),
    Kind("ten digits, sloping by 6 to 8°", sloping),
    Kind("boxes that overlap", close_together),
    Kind("two digits that touch", touching),
    Kind("ruled sheet on a table, shadow, noise", all_at_once),
]
TUNING = 1  # the seed of the pages that predict.py was made with
MEASURING = 2  # and of those that only the table was measured with


def half(data, seed):
    """The handwriting of a seed: each takes every second of MNIST's test digits, so no digit serves
    both."""
    return Hand(data.test_images[seed % 2 :: 2], data.test_labels[seed % 2 :: 2])


def page_of(kind, seed, number, hand):
    return KINDS[kind].make(np.random.default_rng([seed, kind, number]), hand)
