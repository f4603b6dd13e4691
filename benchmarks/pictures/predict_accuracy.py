"""How well predict.py reads: MNIST's test images on larger pages, pictures as people take them, and
what is no digit.

    python benchmarks/pictures/predict_accuracy.py --tag TAG
    python benchmarks/pictures/predict_accuracy.py --seed 1

With --seed 1 the pages are those that predict.py was made with, not those of the table in
docs/results.md.

The pictures as people take them are those of pages.py. With scikit-learn installed, its 1,797
digits are read, too: other people's handwriting, 8×8 pixels, enlarged. The first 400 were looked at
when predict.py was made.

The pages are of random sizes, the digit on them 28 to 120 pixels high, at a random place, dark on
light or light on dark. What is no digit: letters and signs in the fonts that come with matplotlib
(without those that look like digits: B, I, O, S, Z, …), random shapes, and noise.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pages

import mnist_resnet9 as m
import predict
from support.pictures import find_digits

try:
    from sklearn.datasets import load_digits
except ImportError:
    load_digits = None

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # in every installation of matplotlib
FONT_NAMES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
    *("DejaVuSerif", "DejaVuSerif-Bold"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmss10", "cmtt10"),
)
LETTERS = "ACDEFHKMNPQRUVWXYadefhjkmnprtuvwxy@#&?%$*+"


def paste(image, rng, dark_on_light):
    """An MNIST image in a random size at a random place of a page that is larger."""
    size = int(rng.integers(28, 120))
    digit = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), float)
    height, width = rng.integers(size + 10, 400, 2)
    y, x = rng.integers(0, height - size), rng.integers(0, width - size)
    picture = np.zeros((height, width))
    picture[y : y + size, x : x + size] = digit
    return Image.fromarray((255 - picture if dark_on_light else picture).astype(np.uint8))


def written(text, font):
    picture = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(picture).text(
        (50, 30), text, font=ImageFont.truetype(str(FONTS / f"{font}.ttf"), 80), fill="black"
    )
    return picture


def shape(rng, kind):
    picture = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(picture)
    points = [tuple(point) for point in rng.integers(20, 180, (8, 2)).tolist()]
    (x, y), (w, h) = points[0], rng.integers(20, 100, 2).tolist()
    if kind == 0:
        draw.rectangle([x, y, x + w, y + h], fill="black")
    elif kind == 1:
        draw.ellipse([x, y, x + w, y + h], fill="black")
    elif kind == 2:
        draw.polygon(points[:3], fill="black")
    else:
        draw.line(points, fill="black", width=6)  # a scribble
    return picture


def find(picture, reader):
    return find_digits(np.asarray(picture.convert("RGB"), np.float32), reader.are_digits)


def edits(said, text):
    """How many digits are wrong, missing or too many: the least number of edits (Levenshtein)
    between the two."""
    costs = list(range(len(said) + 1))
    for i, wanted in enumerate(text, start=1):
        before, costs[0] = costs[0], i
        for j, got in enumerate(said, start=1):
            cost = min(costs[j] + 1, costs[j - 1] + 1, before + (wanted != got))
            before, costs[j] = costs[j], cost
    return costs[-1]


def read_pages(reader, data, seed, count):
    """A line for each kind of page: pages read without a mistake, digits right, digits called none,
    the slowest page."""
    hand = pages.half(data, seed)
    print(
        "kind of page                                 "
        "pages right    digits right    called no digit    slowest"
    )
    for number, kind in enumerate(pages.KINDS):
        whole = wrong = total = called = slowest = 0
        for n in range(count):
            picture, text = pages.page_of(number, seed, n, hand)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "page.png"
                picture.save(path, compress_level=1)
                start = time.perf_counter()
                digits = find_digits(predict.read_picture(path)[0], reader.are_digits)
                slowest = max(slowest, time.perf_counter() - start)
            answers = reader.answers([digit.image for digit in digits]) if digits else []
            said = "".join(str(answer.probabilities.argmax()) for answer in answers)
            whole += said == text
            wrong += edits(said, text)
            total += len(text)
            called += sum(not answer.is_digit for answer in answers)
        print(
            f"{kind.name:44} {whole / count:7.1%} of {count:<4}"
            f"{1 - wrong / total:10.1%} of {total:<5}{called / total:11.1%}{slowest:12.1f} s",
            flush=True,
        )


def read_others(reader, first):
    """scikit-learn's digits, those from `first` on, enlarged to 12 times their size."""
    digits = load_digits()
    for margin in (3, 0):
        right = called = 0
        for image, label in zip(digits.images[first:], digits.target[first:]):
            image = 255 - np.pad(np.clip(16 * image, 0, 255).astype(np.uint8), margin)
            side = 12 * len(image)
            found = find(
                Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), reader
            )
            answers = reader.answers([digit.image for digit in found]) if found else []
            right += len(answers) == 1 and answers[0].probabilities.argmax() == label
            called += any(not answer.is_digit for answer in answers)
        count = len(digits.images) - first
        what = f"other people's digits, {'with' if margin else 'no'} margin"
        print(f"{what}, right:  {share(right, count)}")
        print(f"{what}, called no digit:  {share(called, count)}")


def share(part, whole):
    return f"{part / whole:.2%} ({part:,} of {whole:,})"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", help="the run whose weights serve, as for predict.py")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images of MNIST")
    parser.add_argument("--pages", type=int, default=100, help="how many pages of each kind")
    parser.add_argument("--seed", type=int, default=pages.MEASURING, help="of the pages")
    args = parser.parse_args(arguments)
    if args.images < 1 or args.pages < 0:
        raise m.UserError("--images should be 1 or more, --pages 0 or more")
    folder = predict.find_weights(ROOT / "save", args.tag)
    reader, data, rng = predict.Reader(folder), m.load_mnist(), np.random.default_rng(0)
    images, labels = data.test_images[: args.images], data.test_labels[: args.images]
    print(f"Weights of {folder.name}; the images are those of {data.name}.")

    itself = (reader.logits(images).argmax(axis=1) == labels).sum()
    found = [find(paste(image, rng, i % 2), reader) for i, image in enumerate(images)]
    alone = [(digits[0].image, label) for digits, label in zip(found, labels) if len(digits) == 1]
    answers = reader.answers([image for image, _ in alone])
    right = sum(
        answer.probabilities.argmax() == label for answer, (_, label) in zip(answers, alone)
    )
    called = sum(not answer.is_digit for answer in answers)
    print(f"test images themselves, right:            {share(itself, len(labels))}")
    print(f"on larger pages, found as one digit:      {share(len(alone), len(labels))}")
    print(f"on larger pages, found and right:         {share(right, len(labels))}")
    print(f"on larger pages, called no digit:         {share(called, len(alone))}")

    digits = [
        (digit, text)
        for font in FONT_NAMES
        for text in "0123456789"
        for digit in find(written(text, font), reader)
    ]
    answers = reader.answers([digit.image for digit, _ in digits])
    right = sum(
        str(answer.probabilities.argmax()) == text for answer, (_, text) in zip(answers, digits)
    )
    called = sum(not answer.is_digit for answer in answers)
    what = f"digits in {len(FONT_NAMES)} fonts"
    print(f"{what}, right:               {share(right, 10 * len(FONT_NAMES))}")
    print(f"{what}, called no digit:     {share(called, len(answers))}")

    letters = [
        digit.image
        for font in FONT_NAMES
        for text in LETTERS
        for digit in find(written(text, font), reader)
    ]
    shapes = [digit.image for i in range(400) for digit in find(shape(rng, i % 4), reader)]
    noise = list(rng.integers(0, 256, (100, 28, 28)).astype(np.uint8))
    for name, foreign in (
        ("letters and signs", letters),
        ("shapes and scribbles", shapes),
        ("noise", noise),
    ):
        called = sum(not answer.is_digit for answer in reader.answers(foreign))
        print(f"{name + ', called no digit:':42}{share(called, len(foreign))}")

    if args.pages:
        read_pages(reader, data, args.seed, args.pages)
    if load_digits:
        read_others(reader, first=400)
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], main))
