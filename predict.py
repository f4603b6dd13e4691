"""Your own digit: pictures in, predictions out.

    python predict.py my_digit.png               one picture, or several, each with one digit or
                                                 several, well apart
    python predict.py page.jpg --figure out.png  the probabilities as a figure too
    python predict.py my_digit.png --tag TAG     with the weights of that run
    python predict.py --draw                     a window to draw in with the mouse
    predict.read(picture)                        the same in a notebook: see read()

Photographs and drawings of any size and colours will do: dark on light, light on dark, transparent.
Each digit is made into an image as MNIST's were: fitted into 20×20 pixels by its longer side, and
moved so that its centre of mass is the centre of 28×28. What the network saw is shown beside its
answer: if that is not a digit, the answer means nothing. Digits are also found on a sheet that lies
on a table, in a shadow, and on ruled or squared paper (support/pictures.py).
"""

import contextlib
import functools
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out

import mnist_resnet9 as m
from support import ROOT, UserError, terminal
from support.checkpoints import OTHERS
from support.device import computing_on_the_cpu, on_host
from support.runs import (
    CHECKPOINTS,
    add_save_dir,
    find_runs,
    has_checkpoint,
    read_newest,
    read_run,
    user_folder,
)
from support.settings import Parser, project_path
from support.storage import describe, refuse_pointer, write_file
from support.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    has_screen,
    load_pyplot,
    our_style,
    to_png,
)

REFERENCE = "record"  # the run in git, whose weights are the default
# A run that reads well after minutes.
FEW_EPOCHS = "--epochs-max 2 --learning-rate 1e-3 --dropout 0.5 --augment 1 --tag mine".split()
# A larger picture is refused before it is unpacked; the largest cameras have as many.
MAX_PIXELS = 2 * 10**8
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is below that
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
ONE_PICTURE = ("MPO", "PSD")  # their further pages are previews and layers
GDAL_NODATA = 42113  # the field of a TIFF file with the value of pixels without data
BEYOND_LIGHT = 1e9  # no sensor counts so far: 3.4e38 and the like stand for "no data"
WORKING_SIZE = 1000  # pixels of the longer side in which digits are looked for
BAR = 24  # characters of a probability of 1 in the terminal
COLUMNS = 3  # digits beside each other in a figure


# ── Finding the digits ────────────────────────────────────────────────────────────────────────────


def read_picture(path):
    """The picture at path as (H, W, 3) float32, values 0…255; its scale, its pixels for one of the
    file's; and a line on what else is in the file, or None.

    UserError names a file that is no picture, is damaged, or is too large.
    """
    try:
        with open_picture(path) as file:
            size = file.size
            nodata = getattr(file, "tag_v2", {}).get(GDAL_NODATA)
            if size[0] * size[1] > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{size[0]:,} × {size[1]:,} pixels")
            # JPEG can be unpacked at up to an eighth of its size.
            file.draft(None, (2 * WORKING_SIZE, 2 * WORKING_SIZE))
            picture = ImageOps.exif_transpose(file)  # cameras note which side is up
            picture.load()
            note = on_further_pages(path, file)
    except Image.DecompressionBombError as error:
        limit = f"{MAX_PIXELS // 10**6} million pixels"
        raise UserError(f"{path} is too large ({error}); make it {limit} at most") from None
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except UserError:
        raise
    # Pillow raises a dozen kinds for a file that is damaged or no picture.
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be read as a picture ({reason}); PNG or JPEG would do"
        ) from None
    return *of_working_size(picture, size, nodata), note


def of_working_size(picture, size, nodata=None):
    """The picture as (H, W, 3) float32, values 0…255, and its pixels for one of the given size."""
    small = in_rgb(picture, nodata)
    return np.asarray(small, np.float32), max(small.size) / max(size)


def on_further_pages(path, file):
    """A line on a file of several pages; None if it has one."""
    if file.format in ONE_PICTURE:
        return None
    try:
        pages = getattr(file, "n_frames", 1)
    except Exception:  # a later page is damaged, which does not matter here
        return None
    return f"*** {path} has {pages} pages; only the first is read." if pages > 1 else None


def open_picture(path):
    """The file as Pillow opens it. UserError for a HEIC picture, as telephones take them, without
    its decoder."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            head = file.read(100)
        refuse_pointer(path, head)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIC_BRANDS:
            raise
    try:
        import pillow_heif
    except ImportError:
        how = "save it as JPEG, or install its decoder: pip install pillow-heif"
        raise UserError(
            f"{path} is a HEIC picture, which Pillow cannot read by itself; {how}"
        ) from None
    return pillow_heif.open_heif(path).to_pillow()


def in_rgb(picture, nodata=None):
    """The picture in RGB and of working size. What is transparent becomes white, or black if the
    ink is bright."""
    if picture.mode[0] in "IF":  # 16 bits or more, where Pillow would cut off all above 255
        picture = Image.fromarray(in_eight_bits(np.asarray(picture, np.float32), nodata))
    # Pillow shrinks no indices, and knows no other way out of La, premultiplied grey, than LA.
    shades = {"1": "L", "P": "RGBA", "La": "LA"}
    picture = picture.convert(shades.get(picture.mode, picture.mode))
    # A large picture is then done at once.
    picture = picture.reduce(max(1, max(picture.size) // (2 * WORKING_SIZE)))
    rgba = picture.convert("RGBA")
    rgba.thumbnail((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    grey, alpha = np.asarray(rgba.convert("L"), float), np.asarray(rgba.getchannel("A"), float)
    bright = alpha.min() < 255 and (grey * alpha).sum() > 127 * alpha.sum()
    background = Image.new("RGBA", rgba.size, "black" if bright else "white")
    return Image.alpha_composite(background, rgba).convert("RGB")


def in_eight_bits(values, nodata=None):
    """Any range of values (H, W) scaled to 0…255, uint8.

    Single pixels that a sensor has wrong do not count for the range, and what was not measured
    becomes like most of the picture."""
    from scipy import ndimage

    measured = is_measured(values, nodata)
    if not measured.any():
        return np.zeros(values.shape, np.uint8)
    values = np.where(measured, values, np.median(values[measured]))
    step = max(1, max(values.shape) // (2 * WORKING_SIZE))
    some = values[::step, ::step]
    # Of 3×3 pixels three are of a stroke, however thin it is, and one or two are none.
    low = np.percentile(ndimage.rank_filter(some, 2, 3), 0.01)
    high = np.percentile(ndimage.rank_filter(some, -3, 3), 99.99)
    if low == high:
        low, high = values.min(), values.max()
    return np.clip(255 * (values - low) / ((high - low) or 1), 0, 255).astype(np.uint8)


def is_measured(values, nodata=None):
    """Which values (H, W) are those of a picture. Others are infinite or not numbers, or one value
    that stands for pixels without data: nodata, which the file names, or a negative one."""
    try:
        named = float(str(nodata).strip("\0 "))
    except ValueError:
        named = np.nan
    measured = (abs(values) < BEYOND_LIGHT) & (values != np.float32(named))
    if measured.any():
        least = values[measured].min()
        others = values[measured & (values > least)]
        # No brightness is negative, and so far below all others only a sign for something else.
        if least < 0 and others.size and others.min() - least > np.ptp(others) > 0:
            measured &= values > least
    return measured


# ── Pictures and images in arrays ─────────────────────────────────────────────────────────────────


def as_images(pixels):
    """An array of images that are prepared as MNIST's are, (N, 28, 28) or one alone, as (N, 28, 28)
    uint8 with ink bright. None if the array is a picture, in which digits are to be looked for."""
    one = ((28, 28), (28, 28, 1))
    many = ((28, 28), (28, 28, 1), (1, 28, 28))
    if pixels.shape not in one and pixels.shape[1:] not in many:
        return None
    images = in_levels(pixels.reshape(-1, 28, 28))
    edges = np.concatenate([images[:, [0, -1]], images[:, :, [0, -1]].swapaxes(1, 2)], axis=1)
    dark_ink = edges.mean(axis=(1, 2)) > 127
    return np.where(dark_ink[:, None, None], 255 - images, images)


def as_picture(pixels):
    """An array as a picture of Pillow's: (H, W), (H, W, 3) or (H, W, 4), or with channels first."""
    shape = pixels.shape
    if len(shape) == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if not (pixels.size and (pixels.ndim == 2 or pixels.shape[2:] in ((3,), (4,)))):
        raise UserError(
            "a picture should be (H, W), (H, W, 3) or (H, W, 4), or images (N, 28, 28); "
            f"this array is {shape}"
        )
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        pixels = pixels // 257
    # One of grey values may have any range, as a file may.
    grey = pixels.ndim == 2 and not in_range(pixels)
    return Image.fromarray(in_eight_bits(pixels.astype(np.float32)) if grey else in_levels(pixels))


def in_range(pixels):
    return bool((pixels >= 0).all() and (pixels <= 255).all())  # what is no number is not


def in_levels(pixels):
    """Pixels 0…255 or 0…1 as uint8, 0…255. UserError for others."""
    if not in_range(pixels):
        raise UserError(
            "pixels should be numbers from 0 to 255, or from 0 to 1; "
            f"these go from {pixels.min():.4g} to {pixels.max():.4g}"
        )
    if pixels.size and pixels.max() <= 1:
        pixels = pixels * 255.0
    return np.rint(pixels).astype(np.uint8)


def as_array(picture):
    """Whatever holds numbers as an array of NumPy. UserError names what does not."""
    try:
        pixels = on_host(picture)
    except (TypeError, ValueError):  # lists of different lengths, say
        pixels = np.array(None)
    if pixels.dtype.kind not in "buif":
        raise UserError(
            "read() takes one picture at a time: an array of numbers, a picture of Pillow's or "
            f"the name of a file, not {type(picture).__name__}"
        )
    return pixels


# ── Predicting ────────────────────────────────────────────────────────────────────────────────────


class Answer(NamedTuple):
    """What the network says to one digit."""

    probabilities: Any  # (10,)
    is_digit: bool  # whether it looks like one at all

    @property
    def digit(self):
        return int(self.probabilities.argmax())

    def text(self):
        best = self.probabilities.argmax()
        sure = f"{best} ({self.probabilities[best]:.1%})"
        return sure if self.is_digit else f"does not look like a digit; if it is one, {sure}"


class Reading(NamedTuple):
    """What read() finds. A notebook shows it as a line a digit."""

    digits: list  # each with .box (left, top, right, bottom), pixels, and .image (28, 28) uint8
    answers: list  # an Answer to each: .digit, .probabilities, .is_digit

    def __repr__(self):
        return "\n".join(answer.text() for answer in self.answers) or "no digit"


def read(picture, tag=None, save_dir=None):
    """The digits in a picture and the network's answers: `digits, answers = predict.read(picture)`.

    picture may be
    - a picture of any size: an array (H, W), (H, W, 3) or (H, W, 4), a picture of Pillow's, or the
      name of a file. Its digits are looked for and prepared as MNIST's were;
    - images that are prepared already, as m.load_mnist().test_images: an array (N, 28, 28), or one
      of them, (28, 28). Each is a digit.
    Pixels are 0…255 or 0…1, ink dark on light or light on dark. tag, save_dir: the run whose
    weights serve, as with the flags of the command."""
    from support.pictures import Digit, find_digits

    reader = reader_of(save_dir, tag)
    if isinstance(picture, (str, os.PathLike)):
        found, scale, note = read_picture(Path(picture))
        if note:
            print(note)
    else:
        if not isinstance(picture, Image.Image):
            pixels = as_array(picture)
            images = as_images(pixels)
            if images is not None:
                digits = [Digit((0, 0, 28, 28), image) for image in images]
                return Reading(digits, reader.answers(images))
            picture = as_picture(pixels)
        picture = ImageOps.exif_transpose(picture)
        found, scale = of_working_size(picture, picture.size)
    digits = [
        digit._replace(box=tuple(round(edge / scale) for edge in digit.box))
        for digit in find_digits(found, reader.are_digits)
    ]
    return Reading(digits, reader.answers([digit.image for digit in digits]))


def reader_of(save_dir, tag):
    """The Reader with the newest weights of a run; the last few are kept."""
    folder = user_folder(save_dir) if save_dir else project_path(m.Settings.save_dir)
    folder = find_weights(folder, tag)
    return kept_reader(folder, read_newest(folder, os.path.getmtime), m.fast_ways.code())


@functools.lru_cache(maxsize=4)
def kept_reader(folder, written, code):
    """The Reader for weights that were written then, and for the code as it is now."""
    reader = Reader(folder)
    reader.say_notes()
    return reader


def find_weights(save_dir, tag=None):
    """The folder of the run whose weights serve: tag, else the reference run, else the newest that
    has a checkpoint.

    UserError if there is none.
    """
    if tag:
        folder = find_runs(save_dir, [tag])[0]
        if not has_checkpoint(folder):
            raise UserError(f"{folder} has no checkpoint_last.npz yet")
        return folder
    # The files of one run with weights may have other names in the next moment.
    folders = {path.parent for name in CHECKPOINTS for path in save_dir.glob(f"*/{name}")}
    names = names_of_parameters()
    ours = [
        folder
        for folder in sorted(folders)
        if read_newest(folder, lambda path: may_have(path, names))
    ]
    if not ours:
        of_it = "of this network " if folders else ""
        command = ["python", terminal.shown(ROOT / "mnist_resnet9.py"), *FEW_EPOCHS]
        if save_dir != project_path(m.Settings.save_dir):
            command += ["--save-dir", terminal.shown(save_dir)]
        raise UserError(
            f"{save_dir} has no run with weights {of_it}yet; this trains one in minutes: "
            f"{shlex.join(command)}"
        )
    ours.sort(key=lambda folder: read_newest(folder, os.path.getmtime))
    return next((folder for folder in ours if folder.name == REFERENCE), ours[-1])


@contextlib.contextmanager
def errors_of_the_network():
    """The network may be edited, and what it then raises is for the user to mend."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"the network in mnist_resnet9.py raises {describe(error)}") from error


def names_of_parameters():
    with errors_of_the_network():
        return {name for layer in m.layers(m.Settings()) for name in layer.params}


def may_have(path, names):
    """Whether a checkpoint is of the network with parameters of these names, not of one of the
    evolution's first steps or of a script since edited. A damaged one may be."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            theirs = {name for name in arrays.files if not name.startswith("ema.")}
            return theirs - OTHERS == names
    except FileNotFoundError:
        raise
    except Exception:  # load_weights will say what is wrong
        return True


class Reader:
    """The network of a run, and how it answers to digits.

    Softmax always names a digit, so two other numbers tell whether there is one: the energy, which
    is how much of a digit the network finds, and the likeness to the nearest of 4,000 real digits.
    Their sum, likeness weighted, is measured on the sample's 1,000 other digits with the network in
    use, since each network has its own energies: what is below all but a share of FOREIGN of those
    does not look like a digit.
    """

    FOREIGN = 0.015
    # Letters are told from digits best so; the energy alone refuses bold handwriting.
    LIKENESS_WEIGHT = 12

    def __init__(self, folder):
        run = read_run(folder, m.Settings)
        self.settings = run.settings
        # What the user should know of the run.
        self.notes = []
        if run.data not in ("MNIST", "MNIST sample"):
            self.notes.append(
                f"*** {folder.name} was trained on {run.data}, not on MNIST: "
                "its answers 0 to 9 are the classes of that data, which need not be digits."
            )
        if other_code := run.note_on_code(m.fast_ways.code()):
            self.notes.append(other_code)
        with computing_on_the_cpu(m), errors_of_the_network():
            self.params = read_newest(folder, lambda path: m.load_weights(path, self.settings))
        sample = m.load_mnist("data/sample")
        self.known = unit_rows(sample.train_images)  # (4000, 784)
        self.least = np.quantile(self.digitness(sample.test_images), self.FOREIGN)

    def say_notes(self):
        for note in self.notes:
            print(note)

    def logits(self, images):
        images = np.asarray(images)
        with computing_on_the_cpu(m), errors_of_the_network():
            logits = m.predict(self.params, images, self.settings)
        if logits.shape != (len(images), 10):
            raise UserError(
                f"the network in mnist_resnet9.py gives {logits.shape[1:]} scores an image, "
                "and digits need 10"
            )
        return logits

    def likeness(self, images):
        """The cosine of the angle between each image and the known digit that is nearest: (N,), 1 =
        the same."""
        return (unit_rows(images) @ self.known.T).max(axis=1)

    def digitness(self, images, logits=None):
        """How much like a digit each image is, in its own unit: (N,)."""
        logits = self.logits(images) if logits is None else logits
        return energy(logits) + self.LIKENESS_WEIGHT * self.likeness(images)

    def are_digits(self, images):
        """Whether each image looks like a digit: (N,) bool."""
        return self.digitness(images) >= self.least

    def answers(self, images):
        """images (N, 28, 28) uint8 → N Answers."""
        images = np.asarray(images)
        if not len(images):
            return []
        logits = self.logits(images)
        real = self.digitness(images, logits) >= self.least
        with computing_on_the_cpu(m):
            probs, _ = m.softmax(logits)
        return [Answer(*answer) for answer in zip(probs, real.tolist())]


def unit_rows(images):
    """Each image as a vector of length 1: (N, 28, 28) → (N, 784) float32."""
    rows = np.asarray(images, np.float32).reshape(len(images), -1)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths, lengths, 1)  # a blank one is like none


def energy(logits):
    """log Σ exp(logits) of each row. Softmax forgets it: it tells which digit, and this how much of
    a digit.

    Liu et al. 2020, arXiv:2010.03759. It is high where some logit is, and low for what the network
    never saw.
    """
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1))


# ── Showing ───────────────────────────────────────────────────────────────────────────────────────


def in_terminal(image, answer):
    """The image in characters (two rows of pixels a line), and beside it the probabilities as
    bars."""
    try:
        shades, full = " ░▒▓█", "█"
        (shades + full).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        shades, full = " .:*#", "#"
    # A character is about twice as high as wide.
    pairs = image.reshape(14, 2, 28).mean(axis=1)  # (14, 28)
    left = ["".join(shades[int(v / 256 * len(shades))] for v in row) for row in pairs]
    best = answer.probabilities.argmax()
    right = []
    for digit, p in enumerate(answer.probabilities):
        sign = "  <" if digit == best else ""
        right.append(f"{digit}  {full * round(BAR * p):{BAR}} {p:6.1%}{sign}")
    return "\n".join(f"  |{a}|   {b}".rstrip() for a, b in zip(left, ["", "", *right, "", ""]))


@our_style()
def draw(pictures):
    """A figure: each picture with its digits framed, and for each digit what the network saw and
    its probabilities.

    pictures: [(name, picture, digits, answers)], as `[("mine", picture, *read(picture))]`."""
    plt = load_pyplot()
    lines = [math.ceil(len(digits) / COLUMNS) for _, _, digits, _ in pictures]
    heights = [height for n in lines for height in (2.0, *[1.4] * n)]  # inches
    fig = plt.figure(figsize=(4 * COLUMNS, 0.2 + sum(heights)), layout="constrained")
    grid = iter(fig.add_gridspec(len(heights), 1, height_ratios=heights))
    for (path, picture, digits, answers), n in zip(pictures, lines):
        ax = fig.add_subplot(next(grid))
        if not isinstance(picture, Image.Image):
            picture = as_picture(as_array(picture))
        ax.imshow(np.asarray(picture.convert("RGB")))
        name = os.fsencode(Path(path).name).decode(errors="replace")
        ax.set_title(f"{name}: {' '.join(reading(answers))}")
        ax.axis("off")
        for i, (left, top, right, bottom) in enumerate((digit.box for digit in digits), start=1):
            ax.add_patch(
                plt.Rectangle((left, top), right - left, bottom - top, fill=False, ec=ORANGE, lw=1)
            )
            ax.text(left, top, str(i), color=ORANGE, size=7, ha="right", va="bottom")
        cells = [cell for _ in range(n) for cell in next(grid).subgridspec(1, COLUMNS)]
        for i, (digit, answer, cell) in enumerate(zip(digits, answers, cells), start=1):
            draw_digit(fig, cell.subgridspec(1, 2, width_ratios=(1, 2)), i, digit, answer)
    return fig


def draw_digit(fig, cells, number, digit, answer):
    ax = fig.add_subplot(cells[0])
    ax.imshow(digit.image, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=(), yticks=(), ylabel=number)
    ax = fig.add_subplot(cells[1])
    best = answer.probabilities.argmax()
    ax.bar(range(10), answer.probabilities, color=[BLUE if i == best else GREY for i in range(10)])
    ax.set(xticks=range(10), yticks=(0, 0.5, 1), yticklabels=("0%", "50%", "100%"), ylim=(0, 1))
    ax.set_title(
        answer.text().replace("; ", "\n"), color=INK if answer.is_digit else ORANGE, size=8
    )


def reading(answers):
    return [str(answer.probabilities.argmax()) if answer.is_digit else "?" for answer in answers]


def predict_pictures(paths, save_dir, tag, figure):
    from support.pictures import find_digits  # not above: SciPy and scikit-image take long to load

    folder = find_weights(save_dir, tag)
    # All are read before the first answer: a bad one spoils no output.
    pictures = [(path, *read_picture(path)) for path in paths]
    reader = Reader(folder)
    found = []
    for path, picture, scale, note in pictures:
        digits = find_digits(picture, reader.are_digits)
        if not digits:
            raise UserError(
                f"{path} shows nothing that could be a digit: it is blank, or all specks"
            )
        found.append((path, picture, scale, note, digits))
    print(f"Weights of {folder}")
    reader.say_notes()
    shown = []
    for path, picture, scale, note, digits in found:
        if note:
            print(note)
        answers = reader.answers([digit.image for digit in digits])
        print(f"{path}: {' '.join(reading(answers))}")
        for n, (digit, answer) in enumerate(zip(digits, answers), start=1):
            left, top, right, bottom = (round(edge / scale) for edge in digit.box)
            print(
                f"\n  {n} of {len(digits)}, columns {left} to {right}, rows {top} to {bottom}: "
                f"{answer.text()}"
            )
            print(in_terminal(digit.image, answer))
        shown.append((path, picture, digits, answers))
    if figure:
        write_figure(figure, shown)
        print(figure)


def check_figure(path, pictures):
    """UserError if writing a figure there would take a picture's place, or something else's."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--figure {path} should end in .png")
    if os.path.exists(path) and not path.is_file():
        raise UserError(f"--figure {path} is not a file; choose another name")
    if os.path.exists(path) and any(os.path.exists(p) and p.samefile(path) for p in pictures):
        raise UserError(f"--figure {path} would overwrite the picture; choose another name")


def write_figure(path, shown):
    figure = draw(shown)
    with our_style():
        # Matplotlib makes no picture of more than 2¹⁶ pixels a side.
        png = to_png(figure, dpi=min(150, 2**15 / figure.get_figheight()))
    if not terminal.in_notebook():  # which shows it below the cell
        load_pyplot().close(figure)
    try:
        write_file(Path(os.path.realpath(path)), png)  # where a link leads to
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another --figure"
        ) from None


def draw_by_hand(save_dir, tag):
    """A window to draw in with the mouse, until it is closed."""
    from support.drawing import NoWindow, open_pad
    from support.pictures import find_digits

    reader = Reader(find_weights(save_dir, tag))
    reader.say_notes()

    def answer(picture):
        digits = find_digits(picture, reader.are_digits)
        if not digits:
            return None
        digit = max(digits, key=lambda digit: digit.box[3] - digit.box[1])
        (said,) = reader.answers([digit.image])
        return digit.image, said.probabilities, said.text().replace("; ", "\n")

    if not has_screen():
        raise UserError(
            "--draw needs a screen, and there is no display here; predict.py PICTURE does without"
        )
    try:
        pad = open_pad(answer)
    except NoWindow as error:
        raise UserError(
            f"--draw cannot open a window ({error}); with a screen, python3-tk or "
            "pip install PyQt6 gives Matplotlib one"
        ) from None
    pad.show()


def start(arguments):
    parser = Parser(prog="predict.py", description="Recognise the digits in pictures.")
    said = "PNG, JPEG or whatever Pillow reads"
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", help=said)
    said = "open a window to draw digits in with the mouse"
    parser.add_argument("--draw", action="store_true", help=said)
    said = f"the run whose weights serve (default: {REFERENCE}, else the newest)"
    parser.add_argument("--tag", help=said)
    said = "also write the answers to this file as a figure"
    parser.add_argument("--figure", type=Path, metavar="PNG", help=said)
    add_save_dir(parser, m.Settings.save_dir)
    given = parser.parse_args(arguments)
    save_dir = user_folder(given.save_dir)
    if given.draw:
        if given.pictures or given.figure:
            raise UserError(
                "--draw takes no PICTURE and no --figure: you draw the picture in its window"
            )
        draw_by_hand(save_dir, given.tag)
        return 0
    if given.figure:
        check_figure(given.figure, given.pictures)
    if not given.pictures:
        parser.error("the following arguments are required: PICTURE (or --draw)")
    predict_pictures(given.pictures, save_dir, given.tag, given.figure)
    return 0


def main(arguments=()):
    return m.main(arguments, start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
