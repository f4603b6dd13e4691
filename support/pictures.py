"""Digits in a picture: where they are, and each as an image like MNIST's. NumPy, SciPy and
scikit-image do the work.

A page is looked at in two ways, because no single one serves all pages:

- against one smooth sheet of light, which is right for bold digits that fill the picture;
- against the page with all narrow strokes filled in, which follows the edge of a shadow but hollows
  out bold strokes.

Before that, a sheet that lies on a table is cut out; in each look, long straight lines are taken
away: those of ruled and squared paper. Which look is the better one only the network can tell, so
find_digits() takes a judge.
"""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from skimage import filters, transform

MIN_CONTRAST = 16  # of 255: ink that stands out less is none
# Of 20 pixels: thinner strokes are thickened to this. Three quarters of MNIST's are wider.
THIN_STROKE = 1.6
# Of the longer side: at the edge of a page, what is wider is a shadow, not a stroke.
WIDE_STROKE = 0.33
MAX_PIECES = 300  # the largest connected pieces of ink that are looked at
EIGHT = np.ones((3, 3), bool)  # diagonal neighbours are neighbours


class Digit(NamedTuple):
    """A digit that was found in a picture."""

    box: tuple  # left, top, right, bottom in pixels of the picture
    image: Any  # (28, 28) uint8, what the network sees


def find_digits(picture, judge=lambda images: np.ones(len(images), bool)):
    """The digits of a picture (H, W, 3), line by line, in a line from left to right. [] if it is
    blank.

    judge: images (N, 28, 28) → (N,) bool, whether each looks like a digit. The look that finds most
    wins.
    """
    picture = np.asarray(picture, np.float32)
    sheet = sheet_of(picture)
    if sheet is not None:
        top, left = (int(np.flatnonzero(sheet.any(axis=axis))[0]) for axis in (1, 0))
        bottom, right = (int(np.flatnonzero(sheet.any(axis=axis))[-1]) + 1 for axis in (1, 0))
        found = best_look(picture[top:bottom, left:right], sheet[top:bottom, left:right], judge)
        if found:
            return [
                Digit(tuple(np.add(d.box, (left, top, left, top)).tolist()), d.image) for d in found
            ]
    return best_look(picture, np.ones(picture.shape[:2], bool), judge)


def best_look(picture, paper, judge):
    """The digits of the look that finds most; the first look's, when no other finds more."""
    quiet, noise = without_noise(picture)
    light = smooth_light(quiet, paper)
    inks = [abs(quiet - light).max(axis=-1), ink_in_any_light(quiet, paper)]
    if (light - quiet).mean(axis=-1)[inks[0] > otsu(inks[0])].sum() < 0:  # chalk on a board
        inks.append(ink_in_any_light(quiet, paper, bright=True))
    inks = [np.where(paper, ink, 0) for ink in inks]
    spots = spots_in(inks[0], noise, paper)
    if spots.any():
        edge = max(2, max(spots.shape) // 60)  # which is soft
        soft = ndimage.binary_dilation(spots, EIGHT, iterations=edge)
        if is_bold(spots, *inks[:2]):
            inks[1:] = [np.where(soft, 0, ink) for ink in inks[1:]]
        else:
            inks[0] = np.where(soft, 0, inks[0])
    looks = [digits_of(ink, noise) for ink in inks]
    values = [worth(digits, judge) for digits in looks]
    values[0] *= 1.25  # it does least to the strokes
    return looks[int(np.argmax(values))]


def worth(digits, judge):
    """How much of a text these are: the height of those that look like digits, times their share of
    the whole."""
    if not digits:
        return 0
    good = np.asarray(judge(np.stack([digit.image for digit in digits])))
    heights = np.array([digit.box[3] - digit.box[1] for digit in digits])
    return (heights @ np.where(good, 1, 0.3)) ** 2 / heights.sum()


def digits_of(ink, noise):
    """The digits in an ink map (H, W), in the order of reading."""
    least = least_ink(ink, noise)
    if not (ink > least).any():
        return []
    ink = without_lines(ink, least)
    mask = ink_mask(ink, least)
    if not mask.any() or np.percentile(ink[mask], 80) < MIN_CONTRAST:
        return []
    joined = mask
    if is_thin(mask):  # thin strokes break where a pen skips
        joined = ndimage.binary_dilation(mask, EIGHT, iterations=2)
    labels, _ = ndimage.label(joined, EIGHT)
    labels *= mask
    digits = []
    for members in group(labels):
        (crop,) = ndimage.find_objects(np.isin(labels, members).astype(np.uint8))
        own = np.isin(labels[crop], members)
        around = ndimage.binary_dilation(own, EIGHT)  # with its soft edges
        rows, cols = crop
        box = (cols.start, rows.start, cols.stop, rows.stop)
        digits.append(Digit(box, to_mnist(ink[crop] * around, own)))
    return reading_order(digits)


# ── Paper and ink ─────────────────────────────────────────────────────────────────────────────────


def without_noise(picture):
    """The picture, blurred a little if a camera's noise is in it, and the noise that is left (a
    standard deviation)."""
    noise = noise_of(picture)
    if noise < 2.5:
        return picture, noise
    width = 0.8 if noise < 5 else 1.5
    return ndimage.gaussian_filter(picture, (width, width, 0)), noise / (2 * np.sqrt(np.pi) * width)


def noise_of(picture):
    """The standard deviation of the noise: the median of what a second difference in both
    directions leaves."""
    if min(picture.shape[:2]) < 8:
        return 0.0
    second = np.diff(np.diff(picture, n=2, axis=0), n=2, axis=1)
    # Of independent pixels it is 6 standard deviations wide.
    return float(np.median(abs(second)) / 0.6745 / 6)


def smooth_light(picture, paper):
    """The page without its ink, (H, W, 3): a smooth surface, since light falls unevenly on a page.

    It is quadratic in row and column, and fitted to the pixels along the border, then to all that
    are no ink.
    """
    H, W, _ = picture.shape
    y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)  # (H, W, 6)
    edge = max(1, min(H, W) // 50)
    border = paper & ~ndimage.binary_erosion(paper, EIGHT, iterations=edge)
    colours = picture[border]
    levels = np.sort(colours.mean(axis=-1))
    most = np.argmax(np.searchsorted(levels, levels + 24, side="right") - np.arange(len(levels)))
    # Not the median: a digit may reach the border.
    common = abs(colours.mean(axis=-1) - levels[most] - 12) <= 12
    background = np.median(colours[common], axis=0)  # one colour, to begin with
    for share in (1, 0.7, 0.4):  # at last without the soft edges of the ink
        ink = abs(picture - background).max(axis=-1)
        bare = paper & (ink <= min(share * otsu(ink[paper]), np.percentile(ink[paper], 90)))
        step = max(1, bare.sum() // 20_000)
        fit = np.linalg.lstsq(terms[bare][::step], picture[bare][::step], rcond=1e-3)[0]  # (6, 3)
        background = terms @ fit
    return background


def ink_in_any_light(picture, paper, bright=False):
    """The ink (H, W) against what is left of the picture when all that is narrow and dark is filled
    in: a closing.

    It follows the edge of a shadow to the pixel, as a smooth surface cannot. In the shade ink
    stands out less, so it counts by its share of the light there. bright: what is narrow and bright
    is taken away, for chalk on a board.
    """
    H, W, _ = picture.shape
    size = max(5, round(min(0.25 * min(H, W), 0.12 * max(H, W))))
    if bright:
        background = ndimage.grey_opening(picture, (size, size, 1))
        ink = (picture - background).max(axis=-1)
    else:
        background = ndimage.grey_closing(picture, (size, size, 1))
        ink = (background - picture).max(axis=-1)
        level = background.mean(axis=-1)
        ink = ink * np.clip(np.median(level[paper]) / np.maximum(level, 1), 0.5, 3)
    # In noise the highest of many pixels is above their mean.
    return np.clip(ink - np.median(ink[paper]), 0, 255)


def otsu(values):
    """The value that splits these best into dark and bright: Otsu 1979, the most variance between
    the two."""
    if values.size and np.ptp(values) > 0.01:
        return filters.threshold_otsu(values)
    return values.max(initial=0)


def spots_in(ink, noise, paper):
    """The pieces of ink at the edge of the paper that are somewhere too wide for a stroke: shadows,
    the table, (H, W)."""
    edge = paper & ~ndimage.binary_erosion(paper, EIGHT, iterations=2, border_value=0)
    labels, _ = ndimage.label(ink_mask(ink, least_ink(ink, noise)), EIGHT)
    spots = np.zeros(ink.shape, bool)
    for i in np.unique(labels[edge & (labels > 0)]):
        (crop,) = ndimage.find_objects((labels == i).astype(np.uint8))
        piece = np.pad(labels[crop] == i, 1)
        if 2 * ndimage.distance_transform_edt(piece).max() > WIDE_STROKE * max(piece.shape):
            spots |= labels == i
    return spots


def is_bold(spots, ink, narrow):
    """Whether what fills spots is the bold stroke of a digit, not a shadow that digits lie in.

    narrow, the ink in any light, then shows the outline of the spot, which is no darker than the
    rest of it.
    """
    part = spots & (narrow > otsu(narrow))
    if part.sum() <= 0.02 * spots.sum():
        return False
    return np.median(ink[part]) < 1.15 * np.percentile(ink[spots], 80)


def least_ink(ink, noise):
    """What is below is no ink: the camera's noise, or the paper's own grain."""
    return max(MIN_CONTRAST / 2, 5 * noise, 8 * np.percentile(ink, 30))


def ink_mask(ink, least):
    """Which pixels are ink. A thin stroke is blurred a little, and its fainter pixels count too:
    else it breaks."""
    mask = ink > cut_of(ink, least)
    if is_thin(mask):
        ink, least = ndimage.gaussian_filter(ink, 1), least / 3
        cut = cut_of(ink, least)
        mask = filters.apply_hysteresis_threshold(ink, max(0.4 * cut, least), cut)
    return mask


def is_thin(mask):
    """Whether this is written with a pen so thin for its size that its strokes may break."""
    width = stroke_width(mask) if mask.any() else 0
    if not 0 < width < 4:
        return False
    labels, _ = ndimage.label(ndimage.binary_dilation(mask, EIGHT, iterations=2))
    tallest = max(rows.stop - rows.start for rows, _ in ndimage.find_objects(labels))
    return tallest > max(40, 15 * width)


def cut_of(ink, least):
    """The value that parts ink from paper. If there is too little ink for all pixels to tell, the
    inked ones do."""
    cut = otsu(ink)
    seen = ink[ink > least]
    if seen.size and (cut < least or (ink > cut).mean() < 0.002):
        cut = min(otsu(seen), seen.max() / 2)
    return max(cut, least)


def sheet_of(picture):
    """The sheet of paper that lies on a table, as a mask (H, W), a little smaller than it is; None
    if there is none.

    A sheet is a large region, unlike what lies along the border, that is about a rectangle, solid
    but for its ink.
    """
    H, W, _ = picture.shape
    if min(H, W) < 60:
        return None
    shrink = 200 / max(H, W)
    shape = (max(8, round(H * shrink)), max(8, round(W * shrink)))
    small = transform.resize(picture, shape, anti_aliasing=True)
    border = np.ones(shape, bool)
    border[3:-3, 3:-3] = False
    table = np.median(small[border], axis=0)
    apart = abs(small - table).max(axis=-1)
    cut = otsu(apart)
    sheets = []
    for share in (1, 0.7, 0.45):
        if share * cut > MIN_CONTRAST:
            sheet = region_as_sheet(apart > share * cut)
            if sheet is not None:
                sheets.append(sheet)
    if not sheets:
        return None
    # The largest: of a sheet in half shade it is the whole.
    return transform.resize(max(sheets, key=np.sum), (H, W), order=0) > 0


def region_as_sheet(mask):
    labels, count = ndimage.label(mask)
    if not count:
        return None
    region = labels == 1 + np.argmax(np.bincount(labels.ravel(), minlength=count + 1)[1:])
    filled = ndimage.binary_fill_holes(region)
    area = filled.sum()
    if area < 0.08 * filled.size or region.sum() < 0.6 * area:
        return None
    edges = (filled[0], filled[-1], filled[:, 0], filled[:, -1])
    if max(edge.mean() for edge in edges) > 0.5:
        return None
    if area < 0.85 * least_rectangle(filled):
        return None
    core = ndimage.distance_transform_edt(np.pad(region, 1)).max()
    if core < 0.12 * np.sqrt(area):  # a ring, a zero's: strokes, not a sheet
        return None
    depth = ndimage.distance_transform_edt(np.pad(filled, 1))[1:-1, 1:-1]
    inner = depth > max(2.5, 0.02 * np.sqrt(area))
    return inner if inner.any() else None


def least_rectangle(mask):
    """The area of the smallest rectangle, at any angle, around a mask."""
    points = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    angles = np.radians(np.arange(0, 90, 2))
    along = points @ np.stack([np.cos(angles), np.sin(angles)])
    across = points @ np.stack([-np.sin(angles), np.cos(angles)])
    return ((np.ptp(along, axis=0) + 1) * (np.ptp(across, axis=0) + 1)).min()


# ── Lines ─────────────────────────────────────────────────────────────────────────────────────────


def without_lines(ink, least):
    """The ink without long straight lines, near level or upright, that run through most of the
    page.

    A Hough transform finds them. Of a line only what is no thicker than the line itself goes:
    strokes that cross stay.
    """
    H, W = ink.shape
    if min(H, W) < 100:
        return ink
    step = max(1, round(max(H, W) / 500))
    ink = ink.copy()
    for upright in (False, True):
        mask = ink > least
        thin = mask & ~ndimage.binary_opening(mask, np.ones((4 * step + 3, 4 * step + 3)))
        small = ndimage.maximum_filter(thin, step)[::step, ::step]
        where = np.zeros(mask.shape, bool)
        broad = ndimage.binary_dilation(thin, EIGHT, iterations=step + 1)
        # a line is where x cos(angle) + y sin(angle) = distance
        angles = np.radians(np.arange(-12, 12.01, 0.25) + (0 if upright else 90))
        counts, _, distances = transform.hough_line(small, angles)
        length = small.shape[0] if upright else small.shape[1]
        near = ndimage.maximum_filter(counts, (5, 9))
        for d, a in np.argwhere((counts >= 0.55 * length) & (counts == near))[:400]:
            angle, distance = angles[a], distances[d] * step
            if upright:
                y = np.arange(H)
                x = np.rint((distance - y * np.sin(angle)) / np.cos(angle)).astype(int)
                good = (x >= 0) & (x < W)
            else:
                x = np.arange(W)
                y = np.rint((distance - x * np.cos(angle)) / np.sin(angle)).astype(int)
                good = (y >= 0) & (y < H)
            there, whole = np.flatnonzero(broad[y[good], x[good]]), good.sum()
            # A bar of a digit is long, too, but ends on the page.
            through = there.size and there[0] < 0.15 * whole and there[-1] > 0.85 * whole
            if there.size > 0.55 * whole and through:
                where[y[good], x[good]] = True
        if not where.any():
            continue
        line = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
        across = line if upright else line.T
        runs, _ = ndimage.label(mask, across)
        thickness = np.bincount(runs.ravel())
        thickness[0] = 0
        corridor = ndimage.binary_dilation(where, across, iterations=step + 2)
        present = thickness[runs][corridor & thin]
        if not present.size:
            continue
        usual = np.median(present)
        ink[corridor & thin & (thickness[runs] <= 1.5 * usual + 1)] = 0
    return ink


# ── Pieces of ink, and which make a digit ─────────────────────────────────────────────────────────


def group(labels):
    """Which pieces make a digit each: lists of their numbers. Specks, and what fills the border,
    are left out."""
    H, W = labels.shape
    slices = ndimage.find_objects(labels)
    # Top, left, bottom, right.
    boxes = np.array([(r.start, c.start, r.stop, c.stop) for r, c in slices])
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # The longer side; of digits that touch, about a digit's.
    size = np.minimum(np.maximum(height, width), 3.0 * height)
    contact = []  # the share of each border that it covers
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        contact.append(np.bincount(border, minlength=len(size) + 1)[1:] / len(border))
    inside = np.max(contact, axis=0) < 0.5  # else the edge of the paper, or a shadow
    if inside.any():
        size[~inside] = 0
    order = np.argsort(-size, kind="stable")[:MAX_PIECES]
    order = order[size[order] >= max(0.15 * size.max(), 2)]
    groups = [[int(i)] for i in order]
    around = boxes[order]
    while True:
        together = one_digit(around)
        count, names = connected_components(together, directed=False)
        if count == len(groups):
            break
        joined = [[] for _ in range(count)]
        for members, name in zip(groups, names):
            joined[name] += members
        groups = joined
        edges = [(boxes[own, :2].min(axis=0), boxes[own, 2:].max(axis=0)) for own in groups]
        around = np.reshape(edges, (count, 4))
    least = 0.3 * size.max()
    return [[i + 1 for i in own] for own in groups if size[own].max() >= least]


def one_digit(boxes):
    """Which of these boxes (N, 4) hold pieces of one digit: (N, N) bool.

    Two do if they are close, and one is smaller or straight above the other.
    """
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    gap = low - high  # in rows and in columns; negative: overlap
    sides = boxes[:, 2:] - boxes[:, :2]
    size = sides.max(axis=1)
    larger, smaller = np.maximum.outer(size, size), np.minimum.outer(size, size)
    narrower = np.minimum.outer(sides[:, 1], sides[:, 1])
    lower = np.minimum.outer(sides[:, 0], sides[:, 0])
    above = (-gap[..., 1] > 0.5 * narrower) & (-gap[..., 0] < 0.5 * lower)
    return (gap.max(axis=-1) <= 0.2 * larger) & (above | (smaller < 0.6 * larger))


def reading_order(digits):
    """Line by line, each from left to right, as a text is read that may slope.

    The slope is the median of those from each digit to its next neighbour on the right. After that
    a digit is of the line above if it begins above that line's middle.
    """
    if len(digits) < 2:
        return digits
    boxes = np.array([digit.box for digit in digits], float)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    height = np.median(boxes[:, 3] - boxes[:, 1])
    slopes = []
    for i in range(len(digits)):
        right = (x > x[i]) & (abs(y - y[i]) < 0.7 * height) & (x - x[i] > abs(y - y[i]))
        if right.any():
            j = np.flatnonzero(right)[np.argmin((x[right] - x[i]) + 2 * abs(y[right] - y[i]))]
            slopes.append((y[j] - y[i]) / (x[j] - x[i]))
    slope = np.median(slopes) if len(slopes) > 1 else 0
    middle = y - slope * x
    half = (boxes[:, 3] - boxes[:, 1]) / 2
    lines = []
    for i in np.argsort(middle, kind="stable"):
        if lines and middle[i] - half[i] < np.mean(middle[lines[-1]]):
            lines[-1].append(i)
        else:
            lines.append([i])
    return [digits[i] for line in lines for i in sorted(line, key=lambda i: boxes[i, 0])]


# ── As MNIST's images ─────────────────────────────────────────────────────────────────────────────


def to_mnist(ink, own):
    """The ink of one digit, and the pixels that are its own, both (h, w), as an MNIST image: (28,
    28) uint8."""
    # MNIST's ink is full white, its edges are grey.
    ink = np.clip(ink / np.percentile(ink[own], 90), 0, 1)
    side = max(ink.shape)
    stroke = stroke_width(own & (ink > 0.4)) * 20 / side  # when the digit is 20 high
    grow = round((THIN_STROKE - stroke) * side / 20 / 2)
    if grow > 0:
        ink = ndimage.grey_dilation(np.pad(ink, grow), (2 * grow + 1, 2 * grow + 1))
    h, w = (max(1, round(20 * length / max(ink.shape))) for length in ink.shape)
    small = Image.fromarray(ink.astype(np.float32)).resize((w, h), Image.Resampling.BICUBIC)
    small = np.clip(np.asarray(small), 0, None)
    small = np.clip(255 * small / np.percentile(small, 98), 0, 255)
    mass = small.sum()
    y, x = np.arange(h) @ small.sum(axis=1) / mass, np.arange(w) @ small.sum(axis=0) / mass
    top, left = int(np.clip(round(14 - y), 0, 28 - h)), int(np.clip(round(14 - x), 0, 28 - w))
    image = np.zeros((28, 28), np.uint8)
    image[top : top + h, left : left + w] = np.rint(small)
    return image


def stroke_width(own):
    """Twice the area over the length of the outline: a stroke has two outlines."""
    framed = np.pad(own, 1)
    outline = (framed[1:] != framed[:-1]).sum() + (framed[:, 1:] != framed[:, :-1]).sum()
    return 2 * own.sum() / outline
