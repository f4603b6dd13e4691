"""Figures of a run: what it learnt, what it gets wrong, and what its layers see.

    python plot_figs.py            the run with the tag set in mnist_resnet9.py, finished or not
    python plot_figs.py TAG TAG …  several runs; they are also drawn side by side
    python plot_figs.py --overlay TAG TAG …  only their test accuracies, all in one panel
    python plot_figs.py --watch    draws again after each epoch, until the run is finished
    python plot_figs.py --help     every setting

The figures go to save/<tag>/, and to the screen where there is one:

    curves.png      loss and accuracy, epoch by epoch, in training and on the test images
    confusion.png   which digit is taken for which
    failures.png    the test images that the network gets wrong, the surest mistakes first
    filters.png     the filters of conv1, and what they make of one digit
    layers.png      one step of learning: what each layer puts out, and the gradient that comes back

Of several runs the first one's folder also gets

    curves_TAG+TAG….png     their curves, all with the same axes
    gradients_TAG+TAG….png  how large the gradient of each layer's weights is

With --watch nothing is put on the screen. In a notebook, `plot_figs.main(["TAG"])` does the same.
"""

import contextlib
import functools
import hashlib
import importlib
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out

from mnist_resnet9 import (
    Settings,
    conv2d,
    conv2d_backward,
    conv_block,
    conv_block_backward,
    cross_entropy_loss,
    cross_entropy_loss_backward,
    init_params,
    linear,
    linear_backward,
    load_mnist,
    loss_and_gradients,
    pool,
    predict,
    relu,
    relu_backward,
    softmax,
    to_input,
)
from mnist_resnet9 import (
    layers as resnet9,
)
from support import ROOT, UserError, terminal
from support.runs import (
    SavedRun,
    add_save_dir,
    find_runs,
    has_checkpoint,
    read_newest,
    read_run,
    user_folder,
)
from support.settings import Parser, project_path
from support.storage import is_lfs_pointer, write_file
from support.style import (
    BLUE,
    GREY,
    INK,
    LINES,
    ORANGE,
    load_backend,
    load_pyplot,
    our_style,
    show,
    shows_figures,
    to_png,
)


def say_error(error):
    """The error in a line. Returns the exit status."""
    print(f"plot_figs.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


try:
    plt = load_pyplot()
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        MultipleLocator,
        NullLocator,
    )
except UserError as error:
    if __name__ != "__main__":
        raise
    sys.exit(say_error(error))

WATCH_SECONDS = 2.0  # between two looks at a run in progress
FAILURES_SHOWN = 200  # nobody looks at more, and a bad run has thousands
LEAST_LOSS = 1e-8  # a loss of 0 has no place on a logarithmic axis


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read_arrays(path, read):
    """What read makes of the arrays in an npz file. UserError if the file is damaged.

    FileNotFoundError if there is none."""
    try:
        with open(path, "rb") as file:
            if is_lfs_pointer(file.read(100)):
                raise UserError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return read(arrays)
    except (FileNotFoundError, UserError):
        raise
    # NumPy, zipfile and zlib have a dozen kinds for a damaged file.
    except Exception as error:
        raise UserError(f"{path} is damaged ({error})") from None


def read_predictions(path, labels):
    """(predictions (N,), probabilities (N, 10)) for the test images, which have these labels."""

    def read(arrays):
        predictions, probabilities = arrays["predictions"], arrays["probabilities"]
        if not np.array_equal(arrays["labels"], labels):
            raise ValueError("its labels are not those of the test images")
        if predictions.shape != labels.shape or probabilities.shape != (len(labels), 10):
            raise ValueError("its arrays have other shapes")
        possible = np.isin(predictions, range(10)).all()
        if not (possible and ((0 <= probabilities) & (probabilities <= 1.001)).all()):
            raise ValueError("its values are not those of a run")
        return predictions.astype(int), probabilities

    return read_arrays(path, read)


def read_params(path):
    """{name: array} of the parameters in a checkpoint of any network: those that it answers with.

    Where the run keeps a mean of its weights (the setting ema), that is the mean.
    """

    def read(arrays):
        ends = (".weight", ".bias")
        names = [n for n in arrays.files if n.endswith(ends) and not n.startswith("ema.")]
        params = {n: arrays[f"ema.{n}" if f"ema.{n}" in arrays.files else n] for n in names}
        if not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in params.values()):
            raise ValueError("its parameters are not all finite numbers")
        if "conv1.weight" in params:
            filters = params["conv1.bias"].shape
            if params["conv1.weight"].shape[2:] != (1, *filters):
                raise ValueError("its conv1 has other shapes")
        return params

    return read_arrays(path, read)


def find_network(params, settings):
    """ResNet9 or the step of the evolution that has parameters of these shapes; or None."""
    shapes = {name: a.shape for name, a in params.items()}

    def fits(network):
        theirs = init_params(settings, network=network)
        return shapes == {name: a.shape for name, a in theirs.items()}

    if fits(resnet9):
        return resnet9
    return next((network for network in evolution() if fits(network)), None)


@functools.cache
def evolution():
    """The networks of evolution/, which lead up to ResNet9."""
    folder = ROOT / "evolution"
    sys.path.append(str(folder))
    steps = [importlib.import_module(path.stem) for path in sorted(folder.glob("step[0-9]*.py"))]
    return [step.layers for step in steps]


# ── Curves ────────────────────────────────────────────────────────────────────────────────────────


def draw_curves(runs):
    """Loss and accuracy of each epoch, in training and on the test images: two panels a run.

    All runs have the same axes. More than four of them stand in several rows.
    """
    rows = math.ceil(len(runs) / 4)
    columns = math.ceil(len(runs) / rows)
    size = (max(2.2 * columns + 0.6, 6.2), 6.2 if rows == 1 else 5 * rows)
    letters = int(11 * (size[0] - 0.8) / columns)  # of a title, so that it does not meet the next
    fig = plt.figure(layout="constrained", figsize=size)
    grid = fig.add_gridspec(2 * rows, columns)
    last = max(1, *(run.metrics["epoch"][-1] for run in runs))
    marker = "." if last <= 20 else None  # more would hide the line
    losses, accuracies = (
        np.concatenate(
            [run.metrics[f"{part}_{name}"] for run in runs for part in ("train", "test")]
        )
        for name in ("loss", "accuracy")
    )
    losses = np.maximum(losses, LEAST_LOSS)
    first = None
    for i, run in enumerate(runs):
        row, column = divmod(i, columns)
        loss = fig.add_subplot(grid[2 * row, column], sharex=first)
        first = first or loss
        accuracy = fig.add_subplot(grid[2 * row + 1, column], sharex=first)
        draw_history(loss, run.metrics, "loss", marker)
        draw_history(accuracy, run.metrics, "accuracy", marker)
        if len(runs) > 1:
            loss.set_title(textwrap.fill(run.title(), letters), color=run.colour(), pad=31)
        loss.tick_params(labelbottom=False)
        scale_log(loss, losses.min(), losses.max())
        scale_accuracy(accuracy, accuracies.min(), accuracies.max())
        if column == 0:
            loss.set_ylabel("loss")
            accuracy.set_ylabel("accuracy")
        else:
            loss.tick_params(labelleft=False)
            accuracy.tick_params(labelleft=False)
        if i + columns >= len(runs):
            accuracy.set_xlabel("epoch")
    first.set_xlim(0, last)
    first.xaxis.set_major_locator(MaxNLocator(6 if columns == 1 else 4, integer=True))
    lines = fig.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    if len(runs) == 1:
        lines.set_title(textwrap.fill(runs[0].title(), 70), {"size": 11})
        lines.get_title().set(color=runs[0].colour(), ha="center")
    fig.align_ylabels()
    return fig


def draw_history(ax, metrics, name, marker):
    """The lines of train_<name> and test_<name>; the last and the best value on the test images."""
    least = LEAST_LOSS if name == "loss" else 0
    train, test = (np.maximum(metrics[f"{part}_{name}"], least) for part in ("train", "test"))
    epochs, style = metrics["epoch"], {"lw": 1.2, "marker": marker, "clip_on": False}
    ax.plot(epochs, train, color=BLUE, label="training images", **style)
    ax.plot(epochs, test, color=ORANGE, label="test images", **style)
    ax.grid(True)
    if name == "accuracy":
        mark(ax, epochs, test, {"last": -1, "best": test.argmax()}, "{:.2%}".format)
    else:
        mark(ax, epochs, test, {"last": -1, "lowest": test.argmin()}, "{:.3g}".format)


def draw_overlay(runs):
    """The test accuracy of each epoch: a line a run, all in one panel."""
    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, run in enumerate(runs):
        epochs, accuracies = run.metrics["epoch"], run.metrics["test_accuracy"]
        label = f"{textwrap.shorten(run.title(), 60)}: {accuracies[-1]:.2%}"
        marker = "." if len(epochs) <= 20 else None
        ax.plot(epochs, accuracies, **line_style(i), marker=marker, clip_on=False, label=label)
    every = np.concatenate([run.metrics["test_accuracy"] for run in runs])
    scale_accuracy(ax, every.min(), every.max())
    last = max(run.metrics["epoch"][-1] for run in runs)
    ax.set(xlabel="epoch", ylabel="test accuracy", xlim=(0, max(1, last)))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(True)
    ax.legend(loc="lower right", title="test accuracy at the last epoch")
    return fig


def line_style(i):
    """How the line of run i looks in a panel that the runs share."""
    return {"color": LINES[i % len(LINES)], "ls": ("-", "--", ":")[i // len(LINES) % 3], "lw": 1.2}


def mark(ax, epochs, values, places, show):
    """Marks the values at two places. Their legend stands above the panel, where no line can be."""
    dot = {"marker": "o", "ms": 5, "mfc": ORANGE}
    diamond = {"marker": "D", "ms": 8, "mfc": "none"}
    marks, texts = [], []
    for (name, i), style in zip(places.items(), (dot, diamond)):
        style = style | {"ls": "", "mec": INK, "zorder": 3, "clip_on": False}
        marks += ax.plot(epochs[i], values[i], **style)
        texts.append(f"{name}: {show(values[i])}, epoch {epochs[i]:.0f}")
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "borderaxespad": 0.3}
    ax.legend(marks, texts, handletextpad=0.2, labelspacing=0.3, **place)


def scale_log(ax, low, high):
    """A logarithmic axis with room for all from low to high."""
    margin = 1.1 * (high / low) ** 0.03
    ax.set_yscale("log")
    ax.set_ylim(low / margin, high * margin)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def scale_accuracy(ax, low, high):
    """An axis that stretches towards 100 %, as the logarithm of the error does.

    So 99.0 and 99.6 % lie far apart. The logarithm alone has no place for 100 %;
    0.1 % more error everywhere makes one.
    """

    def stretch(accuracy):
        return -np.log10(np.maximum(1.001 - accuracy, 1e-6))

    def shrink(y):
        return 1.001 - 10.0**-y

    ax.set_yscale("function", functions=(stretch, shrink))
    margin = 0.05 * (stretch(high) - stretch(low)) + 0.01
    low, high = shrink(stretch(low) - margin), shrink(stretch(high) + margin)
    ticks = [
        tick
        for tick in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1)
        if low <= tick <= high
    ]
    ax.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 3 else MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{100 * accuracy:g}%"))
    ax.set_ylim(low, high)


# ── Images ────────────────────────────────────────────────────────────────────────────────────────

INCH = 36  # units of length in the figures below, where an image is 28 wide and high


def canvas(run, subject, width, height):
    """A figure with room for width × height units under its title."""
    wide = max(width / INCH, 6.4) + 0.4
    lines = [*textwrap.wrap(run.title(), int(11 * wide)), *textwrap.wrap(subject, int(11 * wide))]
    high = (height / INCH + 0.1, 0.2 * len(lines) + 0.2)  # of the tiles, of the title
    fig = plt.figure(figsize=(wide, sum(high)))
    fig.suptitle("\n".join(lines), y=1 - 0.1 / sum(high), color=run.colour())
    ax = fig.add_axes((0, 0, 1, high[0] / sum(high)), aspect="equal")
    ax.set(xlim=((width - wide * INCH) / 2, (width + wide * INCH) / 2), ylim=(high[0] * INCH, 0))
    ax.axis("off")
    return fig, ax


def tile(ax, image, x, y, side=28, **style):
    """The image in a thin frame, its top left corner at (x, y)."""
    ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec="#BBBBBB", lw=0.6))
    extent = (x, x + side, y + side, y)
    return ax.imshow(image, extent=extent, interpolation="nearest", **style)


def draw_failures(run, images, labels, predictions, probabilities):
    """The misclassified images, those first whose wrong digit got the highest probability."""
    wrong = np.flatnonzero(predictions != labels)
    sure = probabilities[wrong, predictions[wrong]]
    shown = wrong[np.argsort(-sure, kind="stable")][:FAILURES_SHOWN]
    if not len(wrong):
        return canvas(run, f"None of the {len(labels):,} test images is misclassified.", 0, 0)[0]
    columns = max(min(len(shown), 8), math.ceil(math.sqrt(2 * len(shown))))
    subject = f"Misclassified test images: {len(wrong):,} of {len(labels):,}"
    subject += f"; these are the {len(shown)} surest mistakes" if len(shown) < len(wrong) else ""
    fig, ax = canvas(run, subject, 36 * columns - 8, 18 + 48 * math.ceil(len(shown) / columns))
    for y, what, colour in ((0, "above: the prediction", ORANGE), (6, "below: the label", BLUE)):
        text = f"{what}, with the probability that the network gives it"
        ax.text(18 * columns - 4, y, text, color=colour, ha="center", va="top")
    for n, i in enumerate(shown):
        x, y = n % columns * 36, n // columns * 48 + 26
        tile(ax, images[i], x, y, cmap="gray_r")
        above = (predictions[i], y - 1, ORANGE, "bottom")
        below = (labels[i], y + 29, BLUE, "top")
        for digit, at, colour, va in (above, below):
            text = f"{digit}: {probabilities[i, digit]:.1%}"
            ax.text(x + 14, at, text, color=colour, size=8, ha="center", va=va)
    return fig


def draw_filters(run, params, image, label):
    """Each filter of conv1, and under it its response to one digit: relu(image * filter + bias)."""
    w, b = params["conv1.weight"], params["conv1.bias"]
    y, _ = relu(conv2d(to_input(image[None], w.dtype), w, b)[0])  # (28, 28, 1, K)
    K = len(b)
    columns = max(min(K, 4), math.ceil(2 * math.sqrt(K)))
    rows = math.ceil(K / columns)
    width, height = 44 + 34 * columns, 74 * rows - 6
    subject = f"The {K} filters of conv1, and their response to the digit {label}"
    fig, ax = canvas(run, subject, width + 24, height)
    signed = {"cmap": "PuOr", "vmin": -abs(w).max(), "vmax": abs(w).max()}
    positive = {"cmap": "cividis", "vmin": 0, "vmax": y.max() or 1}
    tile(ax, image, 0, height / 2 - 18, cmap="gray_r")
    for k in range(K):
        left, top = 44 + k % columns * 34, k // columns * 74
        weights = tile(ax, w[:, :, 0, k], left, top, **signed)
        responses = tile(ax, y[:, :, 0, k], left, top + 30, **positive)
        ax.text(left + 14, top + 59, f"bias {b[k]:.2g}", size=7, color=GREY, ha="center", va="top")
    for shades, name, top in ((weights, "weight", 0), (responses, "response", (height - 6) / 2)):
        bar = ax.inset_axes((width, top + 1, 4, (height - 6) / 2 - 4), transform=ax.transData)
        fig.colorbar(shades, cax=bar, label=name)
    return fig


def draw_confusion(run, labels, predictions):
    """How many images of each digit (rows) were taken for which digit (columns)."""
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predictions), 1)
    wrong = counts * (1 - np.eye(10, dtype=int))  # only these are coloured, or they would fade
    fig, ax = plt.subplots(figsize=(6.6, 6), layout="constrained")
    shades = np.ma.masked_equal(wrong, 0)
    ax.imshow(np.sqrt(shades), cmap="Oranges", vmin=0, vmax=1.5 * max(math.sqrt(wrong.max()), 2))
    for i, j in np.ndindex(10, 10):
        text = f"{counts[i, j]:,}" if counts[i, j] or i == j else "·"
        style = {"color": BLUE, "weight": "bold"} if i == j else {"color": INK}
        ax.text(j, i, text, ha="center", va="center", **style)
    for i in range(10):
        text = f"{wrong[i].sum():,} of {counts[i].sum():,} wrong"
        ax.text(9.7, i, text, va="center", color=GREY, size=8)
    ax.set(xticks=range(10), yticks=range(10), xlabel="prediction", ylabel="label")
    ax.tick_params(length=0)
    title = textwrap.fill(run.title(), 66)
    title += f"\nMisclassified test images: {wrong.sum():,} of {len(labels):,}"
    fig.suptitle(title, color=run.colour())
    return fig


# ── One step of learning ──────────────────────────────────────────────────────────────────────────

CANDIDATES = 100  # the digit that is drawn is the least sure one of the first so many
BATCH = 64  # images whose gradient several runs compare


class Pass(NamedTuple):
    """One pass through ResNet9, forwards and backwards; y and dy in the order of the network."""

    loss: float
    y: dict  # layer → what it puts out
    dy: dict  # layer → the gradient of the loss with respect to that
    d: dict  # parameter → the gradient of the loss with respect to it


def learn(params, images, labels, settings, shortcuts=True):
    """forward and backward of mnist_resnet9.py, line by line, keeping what every layer gives.

    The residual blocks are opened up, to see their two layers and the two ways back. shortcuts
    says whether the gradient also comes back through the shortcuts, or through the convolutions
    alone, as in a plain deep network; forwards they are always there. Dropout is off.
    """
    y, dy, d, p = {}, {}, {}, params
    _, pool2d, pool2d_backward, *_ = pool("pool", settings)

    def conv(i):
        return p[f"conv{i}.weight"], p[f"conv{i}.bias"]

    y["image"] = to_input(images, p["fc9.weight"].dtype)
    y["conv1"], conv1 = conv_block(y["image"], *conv(1))
    y["conv2"], conv2 = conv_block(y["conv1"], *conv(2))
    y["conv3"], conv3 = conv_block(y["conv2"], *conv(3))
    h, conv4 = conv2d(y["conv3"], *conv(4))
    y["conv4"], relu4 = relu(y["conv2"] + h)
    y["pool4"], pool4 = pool2d(y["conv4"])
    y["conv5"], conv5 = conv_block(y["pool4"], *conv(5))
    y["conv6"], conv6 = conv_block(y["conv5"], *conv(6))
    y["conv7"], conv7 = conv_block(y["conv6"], *conv(7))
    h, conv8 = conv2d(y["conv7"], *conv(8))
    y["conv8"], relu8 = relu(y["conv6"] + h)
    y["pool8"], pool8 = pool2d(y["conv8"])
    h = y["pool8"].transpose(2, 0, 1, 3)
    y["fc9"], fc9 = linear(h.reshape(len(h), -1), p["fc9.weight"], p["fc9.bias"])
    loss, cross_entropy = cross_entropy_loss(y["fc9"], labels, settings.label_smoothing)

    dy["fc9"] = cross_entropy_loss_backward(1, cross_entropy)
    dh, d["fc9.weight"], d["fc9.bias"] = linear_backward(dy["fc9"], fc9)
    dy["pool8"] = dh.reshape(h.shape).transpose(1, 2, 0, 3)
    dy["conv8"] = pool2d_backward(dy["pool8"], pool8)
    straight = relu_backward(dy["conv8"], relu8)
    dy["conv7"], d["conv8.weight"], d["conv8.bias"] = conv2d_backward(straight, conv8)
    dy["conv6"], d["conv7.weight"], d["conv7.bias"] = conv_block_backward(dy["conv7"], conv7)
    if shortcuts:
        dy["conv6"] += straight
    dy["conv5"], d["conv6.weight"], d["conv6.bias"] = conv_block_backward(dy["conv6"], conv6)
    dy["pool4"], d["conv5.weight"], d["conv5.bias"] = conv_block_backward(dy["conv5"], conv5)
    dy["conv4"] = pool2d_backward(dy["pool4"], pool4)
    straight = relu_backward(dy["conv4"], relu4)
    dy["conv3"], d["conv4.weight"], d["conv4.bias"] = conv2d_backward(straight, conv4)
    dy["conv2"], d["conv3.weight"], d["conv3.bias"] = conv_block_backward(dy["conv3"], conv3)
    if shortcuts:
        dy["conv2"] += straight
    dy["conv1"], d["conv2.weight"], d["conv2.bias"] = conv_block_backward(dy["conv2"], conv2)
    dy["image"], d["conv1.weight"], d["conv1.bias"] = conv_block_backward(dy["conv1"], conv1)
    return Pass(loss, y, {name: dy[name] for name in y}, d)


def least_sure(params, images, labels, settings):
    """The index of the image to whose label the network gives the lowest probability."""
    probs, _ = softmax(predict(params, images, settings))
    return probs[np.arange(len(labels)), labels].argmin()


def stepped(params, step):
    """The parameters after a step down the gradient.

    It is so long that it would halve the loss if the slope stayed the same on the way.
    """
    slope = sum((d * d).sum() for d in step.d.values())  # how fast the loss falls as rate grows
    rate = step.loss / 2 / slope if slope else 0
    return {name: w - w.dtype.type(rate) * step.d[name] for name, w in params.items()}


COLUMN = 41  # units from layer to layer
WIDE = 33  # units: two channels beside each other, with a gap
BAND = 118  # units from the six layers above to the six below
OUT, BACK = 18, 65  # units from the top of a band to the outputs, to the gradients
SMALL = {"size": 7, "ha": "center"}
SHORTCUTS = {"conv2": "conv4", "conv6": "conv8"}  # where each begins and where it is added
DOES = {
    "image": "what comes in",
    "conv4": "3×3, + conv2, relu",
    "conv8": "3×3, + conv6, relu",
    "fc9": "linear, softmax",
}
POOLS_WITH = {"max": "largest of 2×2", "avg": "mean of 2×2"}


def draw_layers(run, params, images, labels):
    """What every layer makes of one digit, and under it the gradient of the loss that comes back.

    The digit is the one of these that the network is least sure of.
    """
    settings = run.settings
    i = least_sure(params, images, labels, settings)
    image, label = images[i : i + 1], labels[i : i + 1]
    step = learn(params, image, label, settings)
    plain = learn(params, image, label, settings, shortcuts=False)
    after = learn(stepped(params, step), image, label, settings)
    probs, probs_after = (softmax(passed.y["fc9"])[0][0] for passed in (step, after))

    given = f"{probs[label[0]]:.1%}"
    subject = (
        f"One step of learning on a {label[0]} (given {given}): outputs forward, gradients back"
    )
    width = 6 * COLUMN + 8
    fig, ax = canvas(run, subject, width, 2 * BAND + 106)
    draw_colours(ax, width)
    at = {name: (12 + n % 6 * COLUMN, 12 + n // 6 * BAND) for n, name in enumerate(step.y)}
    for name, (left, top) in at.items():
        if name == "fc9":
            draw_names(ax, name, DOES[name], "10", left, top)
            draw_probabilities(ax, probs, probs_after, left, top + OUT)
            draw_errors(ax, step.dy[name][0], left, top + BACK)
        else:
            draw_layer(ax, step, name, left, top, settings)
            draw_arrows(ax, left + WIDE + (COLUMN - WIDE) / 2, top + WIDE / 2)
    for start, end in SHORTCUTS.items():
        draw_shortcut(ax, at[start], at[end])
    style = {"rotation": 90, "color": GREY, "size": 8, "ha": "center", "va": "center"}
    for top in (12, 12 + BAND):
        ax.text(4, top + OUT + WIDE / 2, "forward: output", **style)
        ax.text(4, top + BACK + WIDE / 2, "backward: gradient", **style)
    place = (24, 2 * BAND + 30, width - 28, 58)
    draw_lengths(ax.inset_axes(place, transform=ax.transData), step.dy, plain.dy)
    return fig


def draw_colours(ax, width):
    """What the colours stand for: a line over the whole width."""
    for x, cmap, low, high in (
        (52, "cividis", "output: 0", "largest"),
        (width - 72, "PuOr", "gradient: more would lower the loss", "less would"),
    ):
        ax.imshow(np.arange(256)[None], cmap=cmap, extent=(x, x + 28, 4, 0), aspect="auto")
        ax.text(x - 2, 2, low, size=8, ha="right", va="center")
        ax.text(x + 30, 2, high, size=8, ha="left", va="center")


def draw_names(ax, name, does, size, left, top):
    middle = left + WIDE / 2
    ax.text(middle, top + 7, name, weight="bold", ha="center")
    ax.text(middle, top + 11.5, does, **SMALL)
    ax.text(middle, top + 16, size, color=GREY, **SMALL)


def draw_layer(ax, step, name, left, top, settings):
    """A layer's name and size, what it puts out, and under that the gradient that comes back."""
    y, dy = step.y[name][:, :, 0], step.dy[name][:, :, 0]  # (H, W, C)
    size = "{}×{}×{}".format(*y.shape)
    if name.startswith("pool"):
        draw_names(ax, "pool", POOLS_WITH[settings.pool], size, left, top)
    else:
        draw_names(ax, name, DOES.get(name, "3×3, relu"), size, left, top)
    shown = channels_shown(step, name)
    side = WIDE if len(shown) == 1 else (WIDE - 1) / 2
    indent = (WIDE - side) / 2 if len(shown) == 2 else 0
    outputs = {"cmap": "cividis", "vmin": 0, "vmax": y[:, :, shown].max() or 1}
    if name == "image":
        outputs = {"cmap": "gray_r"}
    # A few values are far larger than all others, which would fade if the scale ended there.
    strong = np.percentile(abs(dy[:, :, shown]), 99) or abs(dy).max() or 1
    gradients = {"cmap": "PuOr", "vmin": -strong, "vmax": strong}
    for n, k in enumerate(shown):
        x, z = left + n % 2 * (side + 1), top + indent + n // 2 * (side + 1)
        tile(ax, y[:, :, k], x, z + OUT, side, **outputs)
        tile(ax, dy[:, :, k], x, z + BACK, side, **gradients)
    style = {"color": GREY, "va": "top"} | SMALL
    if name != "image":
        ax.text(left + WIDE / 2, top + OUT + WIDE + 1, f"0 to {brief(outputs['vmax'])}", **style)
    ax.text(left + WIDE / 2, top + BACK + WIDE + 1, f"±{brief(strong)}", **style)


def brief(value):
    """Two digits of a number, with a minus sign as in the axes."""
    return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")


def channels_shown(step, name):
    """The four channels of a layer that vary most. Layers joined by a shortcut show the same."""
    same = {"conv2": "conv4", "pool4": "conv4", "conv6": "conv8", "pool8": "conv8"}
    y = step.y[same.get(name, name)][:, :, 0]
    return np.sort(np.argsort(-y.std(axis=(0, 1)), kind="stable")[:4])


def draw_probabilities(ax, probs, after, left, top):
    """The ten probabilities as bars, and a stroke where each is after the step."""
    bottom, unit = left + 5, WIDE - 5
    for k in range(10):
        y = top + (k + 0.5) * WIDE / 10
        ax.text(left + 3, y, k, size=6.5, ha="right", va="center_baseline")
        ax.barh(y, probs[k] * unit, 0.8 * WIDE / 10, bottom, color=BLUE)
        ax.plot([bottom + after[k] * unit] * 2, [y - 1.5, y + 1.5], color=ORANGE, lw=1.5)
    style = {"va": "top"} | SMALL
    ax.text(left + WIDE / 2, top + WIDE + 1, "probability", **style | {"color": BLUE})
    ax.text(left + WIDE / 2, top + WIDE + 5, "after the step", **style | {"color": ORANGE})


def draw_errors(ax, dlogits, left, top):
    """The gradient of the ten logits: probability minus label."""
    unit = (WIDE - 5) / (np.ptp(dlogits) or 1)
    zero = left + 5 - unit * min(dlogits.min(), 0)
    shades = plt.get_cmap("PuOr")
    for k in range(10):
        y = top + (k + 0.5) * WIDE / 10
        ax.text(left + 3, y, k, size=6.5, ha="right", va="center_baseline")
        colour = shades(0.5 + 0.4 * np.sign(dlogits[k]))
        ax.barh(y, dlogits[k] * unit, 0.8 * WIDE / 10, zero, color=colour)
    text = f"{brief(dlogits.min())} to {brief(dlogits.max())}"
    ax.text(left + WIDE / 2, top + WIDE + 1, text, color=GREY, va="top", **SMALL)


ARROW = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}


def draw_arrows(ax, x, y):
    """To the next layer, and under that the way back."""
    style = ARROW | {"color": GREY}
    ax.annotate("", (x + 2.5, y + OUT), (x - 2.5, y + OUT), arrowprops=style)
    ax.annotate("", (x - 2.5, y + BACK), (x + 2.5, y + BACK), arrowprops=style)


def draw_shortcut(ax, start, end):
    """A bracket above the layers between its two ends, and under them its way back."""
    (left, top), right = start, end[0]
    left, right, under = left + WIDE / 2, right + WIDE / 2, top + BACK + WIDE + 6
    for begin, stop, foot, edge in (
        (left, right, top + 3, top - 0.5),
        (right, left, under, under + 3),
    ):
        ax.plot([begin, begin, stop], [foot, edge, edge], color=BLUE, lw=1.2)
        ax.annotate("", (stop, foot), (stop, edge), arrowprops=ARROW | {"color": BLUE, "lw": 1.2})
        style = {"color": BLUE, "va": "center", "backgroundcolor": "white"} | SMALL
        ax.text((left + right) / 2, edge, "shortcut", **style)


def draw_lengths(ax, dy, plain):
    """How long each gradient in the figure is: the root of the sum of its squares."""
    lines = (
        (dy, BLUE, "-", "as it is, through convolutions and shortcuts"),
        (plain, ORANGE, "--", "through the convolutions alone"),
    )
    lengths = np.array([[np.linalg.norm(d) for d in line[0].values()] for line in lines])
    lengths[lengths == 0] = np.nan  # a logarithmic axis has no place for it
    for length, (_, colour, style, label) in zip(lengths, lines):
        ax.plot(length, style, color=colour, marker=".", lw=1.2, label=label)
    if np.isfinite(lengths).any():
        scale_log(ax, np.nanmin(lengths), np.nanmax(lengths))
    names = ["pool" if name.startswith("pool") else name for name in dy]
    ax.set_xticks(range(len(names)), names)
    ax.grid(True)
    ax.set_title("Length of the gradient at the output of each layer", pad=17)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, borderaxespad=0.2)


def gradient_lengths(d):
    """{layer: the length of the gradient of its weights}."""
    ends = ".weight"
    return {n.removesuffix(ends): np.linalg.norm(a) for n, a in d.items() if n.endswith(ends)}


class Gradients(NamedTuple):
    """The gradient_lengths of a run, and what they are without the shortcuts if it has any."""

    run: SavedRun
    lengths: dict
    plain: dict


def measure_gradients(run, network, params, images, labels):
    settings = run.settings
    _, d = loss_and_gradients(params, images, labels, settings, network=network)
    lengths, plain = gradient_lengths(d), {}
    if network is resnet9:
        found = gradient_lengths(learn(params, images, labels, settings, shortcuts=False).d)
        plain = {name: found[name] for name in lengths}
    return Gradients(run, lengths, plain)


def draw_gradients(measured):
    """How long the gradient of each layer's weights is: a line a run, the output on the right."""
    fig, ax = plt.subplots(figsize=(6.4, 4.2 + 0.16 * len(measured)), layout="constrained")
    every = []
    for i, (run, lengths, plain) in enumerate(measured):
        for layers, style in ((lengths, {"marker": "."}), (plain, {"ls": ":", "label": "_plain"})):
            y = np.array(list(layers.values()), float)
            y[y == 0] = np.nan  # a logarithmic axis has no place for it
            every.append(y)
            style = line_style(i) | {"label": textwrap.shorten(run.title(), 60)} | style
            ax.plot(range(1 - len(y), 1), y, clip_on=False, **style)
    if any(one.plain for one in measured):
        label = "dotted: back through the convolutions alone, without the shortcuts"
        ax.plot([], [], color=GREY, ls=":", label=label)
    every = np.concatenate(every)
    if np.isfinite(every).any():
        scale_log(ax, np.nanmin(every), np.nanmax(every))
    names = [list(one.lengths) for one in measured]
    if all(theirs == names[0] for theirs in names):
        ax.set_xticks(range(1 - len(names[0]), 1), names[0])
        ax.set_xlabel("layer")
    else:
        ax.xaxis.set_major_locator(MultipleLocator(1))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{-x:.0f}" if x else "output"))
        ax.set_xlabel("layers with weights before the output")
    ax.set_ylabel(f"length of the weights' gradient, {BATCH} images")
    ax.grid(True)
    fig.legend(loc="outside upper center")
    return fig


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────


def draw_run(run, load_data):
    """(file name, figure) of all that the run has the files for. A line says what is missing."""
    tag, predictions = run.folder.name, run.folder / "predictions.npz"
    if not has_begun(run):
        print(f"{tag} has no metrics.csv yet, so no curves.png")
    if not predictions.exists():
        print(f"{tag} has no predictions.npz yet, so no confusion.png and failures.png")
    if not has_checkpoint(run.folder):
        print(f"{tag} has no checkpoint_last.npz yet, so no filters.png and layers.png")
    if has_begun(run):
        yield "curves.png", draw_curves([run])
    if predictions.exists():
        data = load_data(run)
        images, labels = data.test_images, data.test_labels
        predicted, probabilities = read_predictions(predictions, labels)
        yield "confusion.png", draw_confusion(run, labels, predicted)
        yield "failures.png", draw_failures(run, images, labels, predicted, probabilities)
    if has_checkpoint(run.folder):
        params = read_newest(run.folder, read_params)
        data = load_data(run)
        if "conv1.weight" in params:
            yield "filters.png", draw_filters(run, params, data.test_images[0], data.test_labels[0])
        else:
            print(f"{run.folder.name} is a network without convolutions, so no filters.png")
        if find_network(params, run.settings) is resnet9:
            yield "layers.png", draw_layers(run, params, *first_images(run, data, CANDIDATES))
        else:
            print(f"{run.folder.name} is not ResNet9, so no layers.png")


def first_images(run, data, count):
    """The first so many images that the run learns from, and their labels."""
    count = min(count, run.settings.train_images or count)
    return data.train_images[:count], data.train_labels[:count]


def compare_gradients(runs, load_data):
    """The Gradients of those runs that have a checkpoint of a known network."""
    measured = []
    for run in runs:
        params = read_newest(run.folder, read_params) if has_checkpoint(run.folder) else {}
        network = find_network(params, run.settings)
        if network:
            first = first_images(run, load_data(run), BATCH)
            measured.append(measure_gradients(run, network, params, *first))
    return measured


def data_of(run, data_dir, load):
    """The data that the run had: from data_dir, or where the run had it if that is None."""
    folder = data_dir or project_path(run.settings.data_dir)
    if not data_dir and not folder.is_dir():  # the run comes from another machine
        folder = project_path(Settings.data_dir)
    data = load(folder)
    if data.hashes != run.hashes:
        raise UserError(
            f"{run.folder.name} ran on {run.data}, but {folder} leads to {data.name} "
            "(its SHA-256 differs); --data-dir names the folder with the run's data"
        )
    return data


def has_begun(run):
    return run.metrics["epoch"].size > 0


def is_finished(run):
    return run.metrics["epoch"].size > run.settings.epochs_max


def joint_path(kind, runs):
    """Where the figure of several runs goes: to the folder of the first.

    No other runs have one of that name: a tag may hold a _, but no +."""
    tags = [run.folder.name for run in runs]
    name = f"{kind}_{'+'.join(tags)}"
    # File systems allow 255 bytes. And somebody may have given a folder another name.
    if len(os.fsencode(name)) > 200 or any("+" in tag for tag in tags):
        digest = hashlib.sha256("/".join(tags).encode(errors="surrogateescape")).hexdigest()
        name = f"{name[:40]}…{digest[:16]}"
    return runs[0].folder / f"{name}.png"


def draw_together(runs, overlay, load_data):
    """(path, figure) of all that there is to draw of these runs so far."""
    begun = [run for run in runs if has_begun(run)]
    if overlay:
        if begun:
            yield joint_path("test_accuracy", begun), draw_overlay(begun)
        return
    if len(begun) > 1:
        yield joint_path("curves", begun), draw_curves(begun)
    for run in runs:
        for name, figure in draw_run(run, load_data):
            yield run.folder / name, figure
    if len(begun) > 1:
        measured = compare_gradients(begun, load_data)
        if len(measured) > 1:
            path = joint_path("gradients", [one.run for one in measured])
            yield path, draw_gradients(measured)


def last_changes(folders):
    """When what is drawn was last written. The checkpoint is an epoch's last file."""
    names = ("config.json", "metrics.csv", "checkpoint_last.npz")
    times = []
    for path in (folder / name for folder in folders for name in names):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # not yet, or it is just being replaced
            times.append(0)
    return times


def plot(tags, save_dir, data_dir=None, overlay=False, watch=False):
    """Draws the runs with these tags; data_dir None stands for the folders that they ran with."""
    folders = find_runs(save_dir, tags)
    load_backend()
    on_screen = shows_figures() and not watch
    load_data = functools.partial(data_of, data_dir=data_dir, load=functools.cache(load_mnist))
    drawn, finished = None, False
    while True:
        now = last_changes(folders)
        # A finished run may still be writing its last files.
        if finished and now == drawn:
            break
        if now != drawn:
            drawn = now
            runs = [read_run(folder, Settings) for folder in folders]
            finished = all(map(is_finished, runs))
            if overlay and not watch and not any(map(has_begun, runs)):
                raise UserError(
                    f"no epoch of {', '.join(tags)} is finished yet: there is nothing to draw"
                )
            with our_style():
                for path, figure in draw_together(runs, overlay, load_data):
                    write(path, figure)
                    if not on_screen:
                        plt.close(figure)
        if not watch:
            break
        time.sleep(WATCH_SECONDS)
    if on_screen:
        show()


def write(path, figure):
    try:
        write_file(path, to_png(figure))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); where that stays so, copy the "
            "run's folder elsewhere and name the folder that it is then in with --save-dir"
        ) from None
    with contextlib.suppress(BrokenPipeError):  # nobody may be reading: `| head`
        print(path, flush=True)


def main(arguments=()):
    """Runs a command line. Returns the exit status: 0, or 2 after an error, which is one line."""
    terminal.prepare()
    parser = Parser(
        prog="plot_figs.py",
        description="Draw the figures of runs into save/<tag>/.",
        allow_abbrev=False,
    )
    said = f"runs; several are also drawn side by side (default: {Settings.tag})"
    parser.add_argument("tags", nargs="*", default=[Settings.tag], metavar="TAG", help=said)
    said = "draw only the runs' test accuracies, in one panel"
    parser.add_argument("--overlay", action="store_true", help=said)
    said = "draw again after each epoch, until the runs are finished"
    parser.add_argument("--watch", action="store_true", help=said)

    add_save_dir(parser, Settings.save_dir)
    said = "folder with the data (default: the one that the run was made with)"
    parser.add_argument("--data-dir", type=user_folder, metavar="FOLDER", help=said)
    try:
        plot(**vars(parser.parse_args(arguments)))
        return 0
    except (UserError, OSError) as error:
        return say_error(error)
    except KeyboardInterrupt:  # the way to end --watch
        return 130
    finally:
        terminal.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
