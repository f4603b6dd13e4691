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

and with --overlay nothing but

    test_accuracy_TAG+TAG….png  their test accuracies

With --watch nothing is put on the screen. In a notebook, `plot_figs.main(["TAG"])` does the same;
draw_failures(), draw_confusion(), draw_filters() and draw_layers() also work without a run: pass a
title (a string) instead.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out

import mnist_resnet9 as m
from support import ROOT, UserError, terminal
from support.checkpoints import check_arrays, read_weights
from support.device import computing_on_the_cpu, on_host
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
from support.stages import CannotDraw, first_of, one_pass, words_for
from support.storage import describe, read_file, reason, write_file
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
    sys.exit(terminal.end(2, terminal.prefix() + reason(error)))

WATCH_SECONDS = 2.0  # between two looks at a run in progress
# Nobody looks at more, and a bad run has thousands. In a notebook a wider figure would be shrunk
# until nobody could read it.
FAILURES_SHOWN, FAILURE_COLUMNS = 96, 12
VALIDATION = "validation_accuracy"  # the column of a run that holds out images
LEAST_LOSS = 1e-8  # a loss of 0 has no place on a logarithmic axis


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read_predictions(path, labels):
    """(predictions (N,), probabilities (N, 10)) for the test images, which have these labels.

    UserError if the file is not what a run has written."""
    try:
        with np.load(io.BytesIO(read_file(path)), allow_pickle=False) as arrays:
            predictions, probabilities = arrays["predictions"], arrays["probabilities"]
            if not np.array_equal(arrays["labels"], labels):
                raise ValueError("its labels are not those of the test images")
        if predictions.shape != labels.shape or probabilities.shape != (len(labels), 10):
            raise ValueError("its arrays have other shapes")
        possible = np.isin(predictions, range(10)).all()
        if not (possible and ((0 <= probabilities) & (probabilities <= 1.001)).all()):
            raise ValueError("its values are not those of a run")
        return predictions.astype(int), probabilities
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from None
    # NumPy, zipfile and zlib have a dozen kinds for a damaged file.
    except Exception as error:
        raise UserError(f"{path} is damaged ({reason(error)})") from None


def find_network(params, settings):
    """The network that has parameters of these shapes: that of mnist_resnet9.py as it is now, or a
    step of the evolution.

    CannotDraw says what differs from the former if there is none."""
    try:
        expected = m.init_params(settings)
    # Whoever edits the script may break it.
    except Exception as error:
        raise CannotDraw(f"layers() in mnist_resnet9.py raises {describe(error)}") from error
    try:
        check_arrays(params, expected)
        return m.layers
    except ValueError as error:
        why = f"it is of another network than mnist_resnet9.py now has ({error})"
    for network in evolution():
        with contextlib.suppress(Exception):
            check_arrays(params, m.init_params(settings, network=network))
            # Pools have no parameters that could differ.
            names = {layer.op.__name__ for layer in network(settings)}
            if not {"max_pool2d", "avg_pool2d"} & names - {f"{settings.pool}_pool2d"}:
                return network
    raise CannotDraw(why)


@functools.cache
def evolution():
    """The networks of evolution/, which lead up to ResNet9."""
    folder, networks = ROOT / "evolution", []
    sys.path.append(str(folder))
    try:
        for path in sorted(folder.glob("step[0-9]*.py")):
            # A step takes its parts from the script, which may lack one by now.
            with contextlib.suppress(ImportError):
                networks.append(importlib.import_module(path.stem).layers)
    finally:
        sys.path.remove(str(folder))
    return networks


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
    losses = np.maximum(values_of(runs, "train_loss", "test_loss"), LEAST_LOSS)
    accuracies = values_of(runs, "train_accuracy", "test_accuracy", VALIDATION)
    first, lines = None, {}
    for i, run in enumerate(runs):
        row, column = divmod(i, columns)
        loss = fig.add_subplot(grid[2 * row, column], sharex=first)
        first = first or loss
        accuracy = fig.add_subplot(grid[2 * row + 1, column], sharex=first)
        draw_history(loss, run.metrics, "loss", marker)
        draw_history(accuracy, run.metrics, "accuracy", marker)
        handles, labels = accuracy.get_legend_handles_labels()
        lines |= zip(labels, handles)
        if len(runs) > 1:
            loss.set_title(textwrap.fill(run.title(), letters), color=run.colour(), pad=31)
        loss.tick_params(labelbottom=False)
        scale_log(loss, losses.min(), losses.max())
        scale_accuracy(accuracy, np.nanmin(accuracies), np.nanmax(accuracies))
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
    legend = fig.legend(lines.values(), lines, loc="outside upper center", ncols=2)
    if len(runs) == 1:
        legend.set_title(textwrap.fill(runs[0].title(), 70), {"size": 11})
        legend.get_title().set(color=runs[0].colour(), ha="center")
    fig.align_ylabels()
    return fig


def values_of(runs, *columns):
    """All numbers in these columns of metrics.csv; a run may lack one."""
    return np.concatenate([run.metrics[c] for run in runs for c in columns if c in run.metrics])


def chosen_epoch(metrics):
    """The epoch of checkpoint_best.npz: images that are held out choose it, or else the test
    images."""
    by = metrics.get(VALIDATION, np.array([np.nan]))
    return np.nanargmax(by) if np.isfinite(by).any() else metrics["test_accuracy"].argmax()


def draw_history(ax, metrics, name, marker):
    """The lines of train_<name> and test_<name>, and of validation_accuracy where there is one; the
    last and the best value on the test images."""
    least = LEAST_LOSS if name == "loss" else 0
    train, test = (np.maximum(metrics[f"{part}_{name}"], least) for part in ("train", "test"))
    epochs, style = metrics["epoch"], {"lw": 1.2, "marker": marker, "clip_on": False}
    ax.plot(epochs, train, color=BLUE, label="training images", **style)
    ax.plot(epochs, test, color=ORANGE, label="test images", **style)
    ax.grid(True)
    if name == "accuracy":
        if VALIDATION in metrics:
            label = "validation images, which choose the best epoch"
            ax.plot(epochs, metrics[VALIDATION], color=LINES[2], label=label, **style)
        mark(ax, epochs, test, {"last": -1, "best": chosen_epoch(metrics)}, "{:.2%}".format)
    else:
        mark(ax, epochs, test, {"last": -1, "lowest": test.argmin()}, "{:.3g}".format)


def draw_overlay(runs):
    """The test accuracy of each epoch: a line a run, all in one panel; and a dotted one for the
    images that it held out."""
    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, run in enumerate(runs):
        epochs, accuracies = run.metrics["epoch"], run.metrics["test_accuracy"]
        label = f"{textwrap.shorten(run.title(), 60)}: {accuracies[-1]:.2%}"
        marker = "." if len(epochs) <= 20 else None
        ax.plot(epochs, accuracies, **line_style(i), marker=marker, clip_on=False, label=label)
        if VALIDATION in run.metrics:
            style = line_style(i) | {"ls": (0, (1, 1.5)), "label": "_validation"}
            ax.plot(epochs, run.metrics[VALIDATION], clip_on=False, **style)
    if any(VALIDATION in run.metrics for run in runs):
        label = "dotted: accuracy on its validation images"
        ax.plot([], [], color=GREY, ls=(0, (1, 1.5)), label=label)
    every = values_of(runs, "test_accuracy", VALIDATION)
    scale_accuracy(ax, np.nanmin(every), np.nanmax(every))
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


def title_of(run):
    """A SavedRun's title, or the user's own, which stands in its place."""
    return run if isinstance(run, str) else run.title()


def colour_of(run):
    return INK if isinstance(run, str) else run.colour()


def images_of(run):
    """What the images are called that the run was tested with."""
    return "images" if isinstance(run, str) else "test images"


@contextlib.contextmanager
def drawing():
    """Within this block figures have our style, and the network computes on the CPU.

    @drawing() is for those functions that a cell of a notebook calls, too."""
    with our_style(), computing_on_the_cpu(m), np.errstate(all="ignore"):
        yield


def canvas(run, subject, width, height):
    """A figure with room for width × height units under its title."""
    wide = max(width / INCH, 6.4) + 0.4
    letters = int(11 * wide)
    lines = [*textwrap.wrap(title_of(run), letters), *textwrap.wrap(subject, letters)]
    high = (height / INCH + 0.1, 0.2 * len(lines) + 0.2)  # of the tiles, of the title
    fig = plt.figure(figsize=(wide, sum(high)))
    fig.suptitle("\n".join(lines), y=1 - 0.1 / sum(high), color=colour_of(run))
    ax = fig.add_axes((0, 0, 1, high[0] / sum(high)), aspect="equal")
    ax.set(xlim=((width - wide * INCH) / 2, (width + wide * INCH) / 2), ylim=(high[0] * INCH, 0))
    ax.axis("off")
    return fig, ax


def tile(ax, image, x, y, side=28, **style):
    """The image in a thin frame, its top left corner at (x, y)."""
    ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec="#BBBBBB", lw=0.6))
    extent = (x, x + side, y + side, y)
    return ax.imshow(image, extent=extent, interpolation="nearest", **style)


@drawing()
def draw_failures(run, images, labels, predictions, probabilities):
    """The misclassified images, those first whose wrong digit got the highest probability.

    run: a SavedRun, or a title, a text, as for predictions of one's own: images (N, 28, 28), labels
    and predictions (N,), probabilities (N, 10)."""
    images, labels = on_host(images), on_host(labels).astype(int)
    predictions, probabilities = on_host(predictions).astype(int), on_host(probabilities)
    wrong = np.flatnonzero(predictions != labels)
    sure = probabilities[wrong, predictions[wrong]]
    shown = wrong[np.argsort(-sure, kind="stable")][:FAILURES_SHOWN]
    if not len(wrong):
        none = f"None of the {len(labels):,} {images_of(run)} is misclassified."
        return canvas(run, none, 0, 0)[0]
    columns = min(max(min(len(shown), 8), math.ceil(math.sqrt(2 * len(shown)))), FAILURE_COLUMNS)
    subject = f"Misclassified {images_of(run)}: {len(wrong):,} of {len(labels):,}"
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


@drawing()
def draw_filters(run, params, image, label):
    """Each filter of conv1, and under it its response to one digit: relu(image * filter + bias).

    run: a SavedRun, or a title. image: (28, 28). UserError if conv1 does not filter images."""
    if not {"conv1.weight", "conv1.bias"} <= set(params):
        raise CannotDraw("it has no layer conv1")
    w, b = (on_host(params[f"conv1.{part}"]) for part in ("weight", "bias"))
    if w.ndim != 4 or w.shape[2:] != (1, *b.shape):
        raise CannotDraw(f"conv1 has weights {w.shape}, not (rows, columns, 1, filters)")
    image, K = on_host(image), len(b)
    try:
        y, _ = m.conv_block(m.to_input(image[None], w.dtype), w, b)  # (28, 28, 1, K)
    except Exception as error:
        raise CannotDraw(f"conv_block() raises {describe(error)}") from error
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


@drawing()
def draw_confusion(run, labels, predictions):
    """How many images of each digit (rows) were taken for which digit (columns).

    run: a SavedRun, or a title. labels, predictions: (N,)."""
    labels, predictions = on_host(labels).astype(int), on_host(predictions).astype(int)
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
    title = textwrap.fill(title_of(run), 66)
    title += f"\nMisclassified {images_of(run)}: {wrong.sum():,} of {len(labels):,}"
    fig.suptitle(title, color=colour_of(run))
    return fig


# ── One step of learning ──────────────────────────────────────────────────────────────────────────

CANDIDATES = 100  # the digit drawn is the least sure of the first 100
BATCH = 64  # images whose gradient several runs compare
AT_ONCE = 8  # of them: all that happens to them is kept


def least_sure(params, images, labels, settings, network=None):
    """The index of the image to whose label the network gives the lowest probability."""
    probs, _ = m.softmax(m.predict(params, images, settings, network))
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
LONGEST_NAME, LONGEST_WORDS = 13, 22  # letters, with room for them above a layer


@drawing()
def draw_layers(run, params, images, labels, settings=None, network=None):
    """What every layer makes of one digit, and under it the gradient of the loss that comes back.

    The digit is the one of these that the network is least sure of. run: a SavedRun, or a title.
    settings are the run's if not given, network is layers() in mnist_resnet9.py. UserError if the
    network computes nothing that could be drawn."""
    settings = settings or (m.Settings() if isinstance(run, str) else run.settings)
    network = network or m.layers
    params = {name: on_host(a) for name, a in params.items()}
    images, labels = on_host(images), on_host(labels)
    try:
        i = least_sure(params, images, labels, settings, network)
    except Exception as error:
        raise CannotDraw(f"its network raises {describe(error)}") from error
    image, label = images[i : i + 1], labels[i : i + 1]
    step = one_pass(m, network, params, image, label, settings)
    plain = step
    if step.has_shortcuts:
        plain = one_pass(m, network, params, image, label, settings, shortcuts=False)
    x, after = step.stages[0].y, stepped(params, step)
    logits_after, _ = m.forward(network(settings), after, x)
    probs, probs_after = (m.softmax(logits)[0][0] for logits in (step.logits, logits_after))

    given = f"{probs[label[0]]:.1%}"
    subject = (
        f"One step of learning on a {label[0]} (given {given}): outputs forward, gradients back"
    )
    stages = step.stages
    width, bands = 6 * COLUMN + 8, math.ceil(len(stages) / 6)
    names = [cut(stage.name, LONGEST_NAME) for stage in stages]
    # The names under the curves, where two would meet: in all there is room for 80 letters.
    upright = max(len(a) + len(b) for a, b in zip(names, names[1:])) / 2 + 1 > 80 / len(names)
    room = 3 * max(map(len, names)) - 8 if upright else 0
    fig, ax = canvas(run, subject, width, bands * BAND + 106 + room)
    draw_colours(ax, width, any(stage.y.min() < 0 for stage in stages[1:-1]))
    left = max(0, 6 - len(stages)) * COLUMN / 2  # a short row stands in the middle
    at = [(12 + left + n % 6 * COLUMN, 12 + n // 6 * BAND) for n in range(len(stages))]
    shown = channels_shown(stages)
    for n, (stage, (x, y)) in enumerate(zip(stages, at)):
        words = words_for(stages, n) if n else "what comes in"
        if stage is stages[-1]:
            words = f"{words}, softmax" if words else "softmax"
        draw_names(ax, names[n], cut(words, LONGEST_WORDS), size_of(stage), x, y)
        if stage is stages[-1]:
            draw_probabilities(ax, probs, probs_after, x, y + OUT)
            draw_errors(ax, stage.dy[0], x, y + BACK)
        else:
            draw_layer(ax, stage, shown[n], n == 0, x, y)
            draw_arrows(ax, x + WIDE + (COLUMN - WIDE) / 2, y + WIDE / 2)
    for end, stage in enumerate(stages):
        if stage.start is not None:
            draw_shortcut(ax, at, stages, stage.start, end)
    style = {"rotation": 90, "color": GREY, "size": 8, "ha": "center", "va": "center"}
    for top in (12 + band * BAND for band in range(bands)):
        ax.text(left + 4, top + OUT + WIDE / 2, "forward: output", **style)
        ax.text(left + 4, top + BACK + WIDE / 2, "backward: gradient", **style)
    place = (24, bands * BAND + 30, width - 28, 58)
    curves = ax.inset_axes(place, transform=ax.transData)
    draw_lengths(curves, names, step, plain, rotation=90 if upright else 0)
    return fig


def cut(text, most):
    return text if len(text) <= most else f"{text[: most - 1].rstrip(', ')}…"


def size_of(stage):
    """28×28×16 of an image, 128 of a row of features."""
    return "×".join(str(n) for n in first_of(stage.y).shape)


def draw_colours(ax, width, signed):
    """What the colours stand for: a line over the whole width. signed: some outputs are below 0."""
    for x, cmap, low, high in (
        (52, "cividis", "output: least" if signed else "output: 0", "largest"),
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


def draw_layer(ax, stage, shown, is_input, left, top):
    """What a layer puts out, and under that the gradient that comes back. shown: its channels."""
    y = tiles_of(first_of(stage.y))[:, :, shown]
    low = min(np.nanmin(y), 0) + 0.0  # relu makes −0.0 of what is below 0
    outputs = {"cmap": "cividis", "vmin": low, "vmax": np.nanmax(y) if np.nanmax(y) > low else 1}
    if is_input:
        outputs = {"cmap": "gray_r"}
    draw_channels(ax, y, left, top + OUT, **outputs)
    style = {"color": GREY, "va": "top"} | SMALL
    if not is_input:
        text = f"{brief(low)} to {brief(outputs['vmax'])}"
        ax.text(left + WIDE / 2, top + OUT + WIDE + 1, text, **style)
    if stage.dy is None:
        ax.text(left + WIDE / 2, top + BACK + WIDE / 2, "not computed", **style)
        return
    dy = tiles_of(first_of(stage.dy))[:, :, shown]
    # A few values are far larger than all others, which would fade if the scale ended there.
    strong = np.nanpercentile(abs(dy), 99) or np.nanmax(abs(dy)) or 1
    draw_channels(ax, dy, left, top + BACK, cmap="PuOr", vmin=-strong, vmax=strong)
    ax.text(left + WIDE / 2, top + BACK + WIDE + 1, f"±{brief(strong)}", **style)


def draw_channels(ax, channels, left, top, **style):
    """One channel, or up to four, two in a row: (H, W, C)."""
    count = channels.shape[2]
    side = WIDE if count == 1 else (WIDE - 1) / 2
    indent = (WIDE - side) / 2 if count == 2 else 0
    for k in range(count):
        x, y = left + k % 2 * (side + 1), top + indent + k // 2 * (side + 1)
        tile(ax, channels[:, :, k], x, y, side, **style)


def tiles_of(a):
    """(H, W, C) as it is; (F,) features as the pixels of one, nearly square."""
    if a.ndim == 3:
        return a
    columns = math.ceil(math.sqrt(a.size))
    rows = math.ceil(a.size / columns)
    square = np.full(rows * columns, np.nan)
    square[: a.size] = a
    return square.reshape(rows, columns, 1)


def brief(value):
    """Two digits of a number, with a minus sign as in the axes."""
    return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")


def channels_shown(stages):
    """For each stage the four channels that vary most.

    Stages that are joined by a shortcut show the same, and so does what is pooled: those of the
    last one with parameters."""
    joined = list(range(len(stages)))  # stage → the first one that it is joined with
    sizes = [tiles_of(first_of(stage.y)).shape[2] for stage in stages]
    for n, stage in enumerate(stages[1:], 1):
        partners = [] if stage.start is None else [stage.start]
        if not stage.has_params and sizes[n] == sizes[n - 1]:
            partners.append(n - 1)
        for partner in partners:
            old, new = joined[n], joined[partner]
            joined = [new if group == old else group for group in joined]
    shown = []
    for group in joined:
        members = [n for n, theirs in enumerate(joined) if theirs == group]
        leader = max(members, key=lambda n: (stages[n].has_params, n))
        y = tiles_of(first_of(stages[leader].y))
        shown.append(np.sort(np.argsort(-np.nanstd(y, axis=(0, 1)), kind="stable")[:4]))
    return shown


def draw_probabilities(ax, probs, after, left, top):
    """The probabilities as bars, and a stroke where each is after the step."""
    bottom, unit, K = left + 5, WIDE - 5, len(probs)
    for k in range(K):
        y = top + (k + 0.5) * WIDE / K
        ax.text(left + 3, y, k, size=6.5, ha="right", va="center_baseline")
        ax.barh(y, probs[k] * unit, 0.8 * WIDE / K, bottom, color=BLUE)
        ax.plot([bottom + after[k] * unit] * 2, [y - 1.5, y + 1.5], color=ORANGE, lw=1.5)
    style = {"va": "top"} | SMALL
    ax.text(left + WIDE / 2, top + WIDE + 1, "probability", **style | {"color": BLUE})
    ax.text(left + WIDE / 2, top + WIDE + 5, "after the step", **style | {"color": ORANGE})


def draw_errors(ax, dlogits, left, top):
    """The gradient of the logits: probability minus label."""
    unit, K = (WIDE - 5) / (np.ptp(dlogits) or 1), len(dlogits)
    zero = left + 5 - unit * min(dlogits.min(), 0)
    shades = plt.get_cmap("PuOr")
    for k in range(K):
        y = top + (k + 0.5) * WIDE / K
        ax.text(left + 3, y, k, size=6.5, ha="right", va="center_baseline")
        colour = shades(0.5 + 0.4 * np.sign(dlogits[k]))
        ax.barh(y, dlogits[k] * unit, 0.8 * WIDE / K, zero, color=colour)
    text = f"{brief(dlogits.min())} to {brief(dlogits.max())}"
    ax.text(left + WIDE / 2, top + WIDE + 1, text, color=GREY, va="top", **SMALL)


ARROW = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}


def draw_arrows(ax, x, y):
    """To the next layer, and under that the way back."""
    style = ARROW | {"color": GREY}
    ax.annotate("", (x + 2.5, y + OUT), (x - 2.5, y + OUT), arrowprops=style)
    ax.annotate("", (x - 2.5, y + BACK), (x + 2.5, y + BACK), arrowprops=style)


def draw_shortcut(ax, at, stages, start, end):
    """A bracket above the layers between its two ends, and under them its way back.

    Where the ends stand in different rows, it leaves one on the right and enters the next on the
    left."""
    # Where one shortcut ends and the next begins, they stand beside each other.
    first = at[start][0] + WIDE / 2 + (3 if stages[start].start is not None else 0)
    begins_here = any(stage.start == end for stage in stages)
    last = at[end][0] + WIDE / 2 - (3 if begins_here else 0)
    tops = sorted({top for _, top in at[start : end + 1]})
    leftmost, rightmost = at[0][0] - 4, max(left for left, _ in at) + WIDE + 4
    for foot, edge, forward in ((3, -0.5, True), (BACK + WIDE + 6, BACK + WIDE + 9, False)):
        for top in tops:
            ends = [
                (first if top == tops[0] else leftmost, top == tops[0]),
                (last if top == tops[-1] else rightmost, top == tops[-1]),
            ]
            draw_bracket(ax, *(ends if forward else ends[::-1]), top + foot, top + edge)


def draw_bracket(ax, tail, head, foot, edge):
    """A line along the edge, from the tail to the head: each (x, whether it stands there, on its
    foot)."""
    (begin, has_tail), (stop, has_head) = tail, head
    ax.plot([begin] * has_tail + [begin, stop], [foot] * has_tail + [edge] * 2, color=BLUE, lw=1.2)
    if has_head:
        ax.annotate("", (stop, foot), (stop, edge), arrowprops=ARROW | {"color": BLUE, "lw": 1.2})
    if abs(stop - begin) > 26:
        style = {"color": BLUE, "va": "center", "backgroundcolor": "white"} | SMALL
        ax.text((begin + stop) / 2, edge, "shortcut", **style)


def draw_lengths(ax, names, step, plain, rotation):
    """How long each gradient in the figure is: the root of the sum of its squares."""
    lines = [(step, BLUE, "-", "as it is, through convolutions and shortcuts")]
    if step.has_shortcuts:
        lines.append((plain, ORANGE, "--", "through the convolutions alone"))
    lengths = [
        [np.nan if stage.dy is None else np.linalg.norm(stage.dy) for stage in line[0].stages]
        for line in lines
    ]
    lengths = np.array(lengths)
    lengths[lengths == 0] = np.nan  # a logarithmic axis has no place for it
    for length, (_, colour, style, label) in zip(lengths, lines):
        ax.plot(length, style, color=colour, marker=".", lw=1.2, label=label)
    if np.isfinite(lengths).any():
        scale_log(ax, np.nanmin(lengths), np.nanmax(lengths))
    ax.set_xticks(range(len(names)), names, rotation=rotation)
    ax.grid(True)
    if step.has_shortcuts:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, borderaxespad=0.2)
    title = "Length of the gradient at the output of each layer"
    ax.set_title(title, pad=17 if step.has_shortcuts else 6)


def gradient_lengths(d):
    """{layer: the length of the gradient of its weights}."""
    return {n.removesuffix(".weight"): np.linalg.norm(a) for n, a in d.items() if a.ndim > 1}


class Gradients(NamedTuple):
    """The gradient_lengths of a run, and what they are without the shortcuts if it has any."""

    run: SavedRun
    lengths: dict
    plain: dict


def measure_gradients(run, network, params, images, labels):
    def lengths(shortcuts):
        """And whether there are any shortcuts."""
        total = {}
        for start in range(0, len(images), AT_ONCE):
            part = images[start : start + AT_ONCE], labels[start : start + AT_ONCE]
            step = one_pass(m, network, params, *part, run.settings, shortcuts)
            share = len(part[0]) / len(images)
            total = {name: share * d + total.get(name, 0) for name, d in step.d.items()}
        return gradient_lengths(total), step.has_shortcuts

    whole, has_shortcuts = lengths(shortcuts=True)
    return Gradients(run, whole, lengths(shortcuts=False)[0] if has_shortcuts else {})


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


def draw_run(run, load_data, say):
    """(file name, figure) of all that the run has the files for. say(line) says what is missing."""
    tag, predictions = run.folder.name, run.folder / "predictions.npz"
    if not has_begun(run):
        say(f"{tag} has no metrics.csv yet, so no curves.png")
    if not predictions.exists():
        say(f"{tag} has no predictions.npz yet, so no confusion.png and failures.png")
    if not has_checkpoint(run.folder):
        say(f"{tag} has no checkpoint_last.npz yet, so no filters.png and layers.png")
    if has_begun(run):
        yield "curves.png", draw_curves([run])
    if predictions.exists():
        data = load_data(run)
        images, labels = data.test_images, data.test_labels
        predicted, probabilities = read_predictions(predictions, labels)
        yield "confusion.png", draw_confusion(run, labels, predicted)
        yield "failures.png", draw_failures(run, images, labels, predicted, probabilities)
    if has_checkpoint(run.folder):
        params = read_newest(run.folder, read_weights)
        data = load_data(run)
        first = data.test_images[0], data.test_labels[0]
        few = first_images(run, data, CANDIDATES)
        for name, draw in (
            ("filters.png", lambda: draw_filters(run, params, *first)),
            (
                "layers.png",
                lambda: draw_layers(run, params, *few, network=find_network(params, run.settings)),
            ),
        ):
            try:
                yield name, draw()
            except CannotDraw as error:
                say(f"{tag}: no {name}, since {error}")


def first_images(run, data, count):
    """The first `count` images that the run learns from, and their labels."""
    count = min(count, run.settings.train_images or count)
    return data.train_images[:count], data.train_labels[:count]


def compare_gradients(runs, load_data, say):
    """The Gradients of those runs that have a checkpoint of a known network."""
    measured = []
    for run in runs:
        if has_checkpoint(run.folder):
            params = read_newest(run.folder, read_weights)
            first = first_images(run, load_data(run), BATCH)
            try:
                network = find_network(params, run.settings)
                measured.append(measure_gradients(run, network, params, *first))
            except CannotDraw as error:
                say(f"{run.folder.name}: no gradients, since {error}")
    return measured


def data_of(run, data_dir, load):
    """The data that the run had: from data_dir, or where the run had it if that is None."""
    folder = data_dir or project_path(run.settings.data_dir)
    if not data_dir and not folder.is_dir():  # the run comes from another machine
        folder = project_path(m.Settings.data_dir)
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


def draw_together(runs, overlay, load_data, say):
    """(path, figure) of all that there is to draw of these runs so far."""
    begun = [run for run in runs if has_begun(run)]
    if overlay:
        if begun:
            yield joint_path("test_accuracy", begun), draw_overlay(begun)
        return
    if len(begun) > 1:
        yield joint_path("curves", begun), draw_curves(begun)
    for run in runs:
        for name, figure in draw_run(run, load_data, say):
            yield run.folder / name, figure
    if len(begun) > 1:
        measured = compare_gradients(begun, load_data, say)
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
    load_data = functools.partial(data_of, data_dir=data_dir, load=functools.cache(m.load_mnist))
    drawn, finished, said = None, False, set()

    def say(line, stream=None):
        """Says it once, however often the runs are drawn."""
        if line not in said:
            print(line, file=stream, flush=True)
        said.add(line)

    while True:
        now = last_changes(folders)
        # A finished run may still be writing its last files.
        if finished and now == drawn:
            break
        if now != drawn:
            drawn = now
            runs = [read_run(folder, m.Settings) for folder in folders]
            for note in filter(None, (run.note_on_code(m.fast_ways.code()) for run in runs)):
                say(note, sys.stderr)
            finished = all(map(is_finished, runs))
            if overlay and not watch and not any(map(has_begun, runs)):
                raise UserError(
                    f"no epoch of {', '.join(tags)} is finished yet: there is nothing to draw"
                )
            with drawing():
                for path, figure in draw_together(runs, overlay, load_data, say):
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


def start(arguments):
    description = "Draw the figures of runs into save/<tag>/."
    parser = Parser(prog="plot_figs.py", description=description)
    said = f"runs; several are also drawn side by side (default: {m.Settings.tag})"
    parser.add_argument("tags", nargs="*", default=[m.Settings.tag], metavar="TAG", help=said)
    said = "draw only the runs' test accuracies, in one panel"
    parser.add_argument("--overlay", action="store_true", help=said)
    said = "draw again after each epoch, until the runs are finished"
    parser.add_argument("--watch", action="store_true", help=said)
    add_save_dir(parser, m.Settings.save_dir)
    said = "folder with the data (default: the one that the run was made with)"
    parser.add_argument("--data-dir", metavar="FOLDER", help=said)
    given = parser.parse_args(arguments)
    save_dir = user_folder(given.save_dir)
    data_dir = None if given.data_dir is None else user_folder(given.data_dir)
    try:
        plot(given.tags, save_dir, data_dir, given.overlay, given.watch)
    except KeyboardInterrupt:  # the way to end --watch
        return 130
    return 0


def main(arguments=()):
    """Runs a command line, as main() of mnist_resnet9.py does; that says what it returns."""
    return m.main(arguments, start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
