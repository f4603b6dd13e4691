"""Figures of a run: what it learnt, what it gets wrong, and what its first layer sees.

    python plot_figs.py              the run with the tag set in mnist_resnet9.py, afterwards or while it is going on
    python plot_figs.py TAG TAG …    several runs; their curves are also drawn side by side
    python plot_figs.py --overlay TAG TAG …  only their test accuracies, all in one panel
    python plot_figs.py --watch      draws again after each epoch, until the run is finished
    python plot_figs.py --help       every setting

The figures go to save/<tag>/, and to the screen where there is one:

    curves.png      loss and accuracy, epoch by epoch
    confusion.png   which digit is taken for which
    failures.png    the test images that the network gets wrong, the surest mistakes first
    filters.png     the filters of conv1, and what they make of one digit

A figure of several runs goes to the folder of the first. With --watch nothing is put on the screen.
"""

import functools
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mnist_resnet9 import Settings, conv2d, load_mnist, relu, to_input
from support import ROOT, UserError
from support.run_folder import METRICS, read_metrics
from support.settings import Parser
from support.storage import write_file

BLUE, ORANGE, INK, GREY = "#0072B2", "#D55E00", "#222222", "#707070"  # colour-blind readers tell these apart
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "savefig.dpi": 150, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E4E4E4", "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8, "figure.max_open_warning": 0,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}  # fmt: skip
LINES = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)  # one a run, where runs share a panel
WATCH_SECONDS = 2.0  # between two looks at a run in progress
FAILURES_SHOWN = 200  # nobody looks at more, and a bad run has thousands


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """What the figures need to know of save/<tag>/."""

    folder: Path
    settings: Settings
    data: str  # the name of the data set
    hashes: dict
    metrics: dict  # column of metrics.csv → its values, one an epoch

    def title(self):
        """What every figure's title begins with. No other data set passes for MNIST."""
        some = f", {self.settings.train_images:,} training images" if self.settings.train_images else ""
        return f"{self.folder.name} on {self.data}{'' if self.data == 'MNIST' else ' (not MNIST)'}{some}"

    def colour(self):
        return INK if self.data == "MNIST" else ORANGE


def find_runs(save_dir, tags):
    """The folders of these runs. UserError lists the runs there are if one of these is not among them."""
    runs = {path.parent.name: path.parent for path in sorted(save_dir.glob("*/config.json"))}
    for tag in tags:
        if tag not in runs:
            there = f"its runs are {', '.join(runs)}" if runs else "it has none yet; mnist_resnet9.py makes one"
            raise UserError(f"{save_dir} has no run {tag!r}; {there}")
    return [runs[tag] for tag in dict.fromkeys(tags)]


def read_run(folder):
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        given = {f.name: config["settings"][f.name] for f in fields(Settings) if f.name in config["settings"]}
        settings = Settings(**given | {"channels": tuple(config["settings"]["channels"])})
        data, hashes = " ".join(config["data"]["name"].split()), dict(config["data"]["sha256"])
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # UserError is a ValueError
        raise UserError(f"{path} is damaged ({error!r})") from None
    path = folder / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    metrics = dict(zip(METRICS, np.array([row[: len(METRICS)] for row in rows], float).reshape(-1, len(METRICS)).T))
    accuracies = np.concatenate([metrics["train_accuracy"], metrics["test_accuracy"]])
    if path.exists() and not (rows and np.array_equal(metrics["epoch"], range(len(rows)))
                              and np.isfinite(metrics["train_loss"]).all()
                              and ((0 <= accuracies) & (accuracies <= 1)).all()):  # fmt: skip
        raise UserError(f"{path} is damaged: its values are not those of a run")
    return Run(folder, settings, data, hashes, metrics)


def read_predictions(path, labels):
    """(predictions (N,), probabilities (N, 10)) for the test images, which have these labels."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            theirs, predictions, probabilities = (arrays[name] for name in ("labels", "predictions", "probabilities"))
        if not np.array_equal(theirs, labels):
            raise ValueError("its labels are not those of the test images")
        if predictions.shape != labels.shape or probabilities.shape != (len(labels), 10):
            raise ValueError("its arrays have other shapes")
        if not (np.isin(predictions, range(10)).all() and ((0 <= probabilities) & (probabilities <= 1.001)).all()):
            raise ValueError("its values are not those of a run")
        return predictions.astype(int), probabilities
    except Exception as error:  # NumPy, zipfile and zlib have a dozen kinds of error for a damaged file
        raise UserError(f"{path} is damaged ({error})") from None


def read_conv1(path):
    """The parameters of the first convolution in a checkpoint of any network; {} if that has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean = "ema." if "ema.conv1.weight" in arrays.files else ""
            names = ("conv1.weight", "conv1.bias") if "conv1.weight" in arrays.files else ()
            params = {name: arrays[mean + name] for name in names}
        if params and params["conv1.weight"].shape[2:] != (1, *params["conv1.bias"].shape):
            raise ValueError("its conv1 has other shapes")
        return params
    except Exception as error:  # as above
        raise UserError(f"{path} is damaged ({error})") from None



# ── Curves ────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_curves(runs):
    """Train loss, train accuracy and test accuracy of each epoch: a column a run, all with the same axes."""
    names = {"train_loss": BLUE, "train_accuracy": BLUE, "test_accuracy": ORANGE}
    fig, axes = plt.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False, layout="constrained",
                             figsize=(0.8 + max(2.8 * len(runs), 5.2), 8))  # fmt: skip
    for column, run in zip(axes.T, runs):
        epochs = run.metrics["epoch"]
        for ax, (name, colour) in zip(column, names.items()):
            marker = "." if len(epochs) <= 20 else None  # more would hide the line
            values = np.maximum(run.metrics[name], 1e-8)  # a loss of 0 has no place on a logarithmic axis
            ax.plot(epochs, values, color=colour, lw=1.2, marker=marker, clip_on=False)
            ax.grid(True)
        column[0].set_title(textwrap.fill(run.title(), 76 if len(runs) == 1 else 38), color=run.colour())
        column[2].set_xlabel("epoch")
        mark_accuracies(column[2], epochs, run.metrics["test_accuracy"])
    for (ax, *_), name in zip(axes, names):
        ax.set_ylabel(name.replace("_", " "))
        values = np.concatenate([np.maximum(run.metrics[name], 1e-8) for run in runs])
        (scale_loss if name == "train_loss" else scale_accuracy)(ax, values.min(), values.max())
    axes[0, 0].set_xlim(0, max(1, *(run.metrics["epoch"][-1] for run in runs)))
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    fig.align_ylabels()
    return fig


def draw_overlay(runs):
    """The test accuracy of each epoch: a line a run, all in one panel."""
    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, run in enumerate(runs):
        epochs, accuracies = run.metrics["epoch"], run.metrics["test_accuracy"]
        ax.plot(epochs, accuracies, color=LINES[i % len(LINES)], ls=("-", "--", ":")[i // len(LINES) % 3], lw=1.2,
                marker="." if len(epochs) <= 20 else None, clip_on=False,
                label=f"{textwrap.shorten(run.title(), 60)}: {accuracies[-1]:.2%}")  # fmt: skip
    every = np.concatenate([run.metrics["test_accuracy"] for run in runs])
    scale_accuracy(ax, every.min(), every.max())
    ax.set(xlabel="epoch", ylabel="test accuracy", xlim=(0, max(1, *(run.metrics["epoch"][-1] for run in runs))))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(True)
    ax.legend(loc="lower right", title="test accuracy at the last epoch")
    return fig


def mark_accuracies(ax, epochs, accuracies):
    """Marks the last and the best accuracy. The legend stands above the panel, where no line can be."""
    for name, i, style in (("last", -1, {"marker": "o", "ms": 5, "mfc": ORANGE}),
                           ("best", accuracies.argmax(), {"marker": "D", "ms": 8, "mfc": "none"})):  # fmt: skip
        ax.plot(epochs[i], accuracies[i], ls="", mec=INK, clip_on=False, zorder=3, **style,
                label=f"{name}: {accuracies[i]:.2%}\nepoch {epochs[i]:.0f}")  # fmt: skip
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, handletextpad=0.2, borderaxespad=0.3)


def scale_loss(ax, low, high):
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))


def scale_accuracy(ax, low, high):
    """An axis that stretches towards 100 %, as the logarithm of the error does: 99.0 and 99.6 % lie far apart.

    The logarithm alone has no place for 100 %; 0.1 % more error everywhere makes one.
    """

    def stretch(accuracy):
        return -np.log10(np.maximum(1.001 - accuracy, 1e-6))

    def shrink(y):
        return 1.001 - 10.0**-y

    ax.set_yscale("function", functions=(stretch, shrink))
    margin = 0.05 * (stretch(high) - stretch(low)) + 0.01
    low, high = shrink(stretch(low) - margin), shrink(stretch(high) + margin)
    ticks = [tick for tick in (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1) if low <= tick <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 3 else MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{100 * accuracy:g}%"))
    ax.set_ylim(low, high)


# ── Images ────────────────────────────────────────────────────────────────────────────────────────────────────────

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


def tile(ax, image, x, y, **style):
    """The image in a thin frame, its top left corner at (x, y)."""
    ax.add_patch(plt.Rectangle((x, y), 28, 28, fill=False, ec="#BBBBBB", lw=0.6))
    return ax.imshow(image, extent=(x, x + 28, y + 28, y), **style)


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
        for digit, at, colour, va in ((predictions[i], -1, ORANGE, "bottom"), (labels[i], 29, BLUE, "top")):
            ax.text(x + 14, y + at, f"{digit}: {probabilities[i, digit]:.1%}", color=colour, size=8, ha="center", va=va)
    return fig


def draw_filters(run, params, image, label):
    """Each filter of conv1, and under it its response to one digit: relu(image * filter + bias)."""
    w, b = params["conv1.weight"], params["conv1.bias"]
    y, _ = relu(conv2d(to_input(image[None], w.dtype), w, b)[0])  # (28, 28, 1, K)
    K = len(b)
    columns = max(min(K, 4), math.ceil(2 * math.sqrt(K)))
    rows = math.ceil(K / columns)
    width, height = 44 + 34 * columns, 74 * rows - 6
    fig, ax = canvas(run, f"The {K} filters of conv1, and their response to the digit {label}", width + 24, height)
    tile(ax, image, 0, height / 2 - 18, cmap="gray_r")
    for k in range(K):
        left, top = 44 + k % columns * 34, k // columns * 74
        weights = tile(ax, w[:, :, 0, k], left, top, cmap="PuOr", vmin=-abs(w).max(), vmax=abs(w).max())
        responses = tile(ax, y[:, :, 0, k], left, top + 30, cmap="cividis", vmin=0, vmax=y.max() or 1)
        ax.text(left + 14, top + 59, f"bias {b[k]:.2g}", size=7, color=GREY, ha="center", va="top")
    for shades, name, top in ((weights, "weight", 0), (responses, "response", (height - 6) / 2)):
        bar = ax.inset_axes((width, top + 1, 4, (height - 6) / 2 - 4), transform=ax.transData)
        fig.colorbar(shades, cax=bar, label=name)
    return fig


def draw_confusion(run, labels, predictions):
    """How many images of each digit (rows) were taken for which digit (columns)."""
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predictions), 1)
    wrong = counts * (1 - np.eye(10, dtype=int))  # only these are coloured: the right ones would outshine them
    fig, ax = plt.subplots(figsize=(6.6, 6), layout="constrained")
    shades = np.ma.masked_equal(wrong, 0)
    ax.imshow(np.sqrt(shades), cmap="Oranges", vmin=0, vmax=1.5 * max(math.sqrt(wrong.max()), 2))
    for i, j in np.ndindex(10, 10):
        text = f"{counts[i, j]:,}" if counts[i, j] or i == j else "·"
        style = {"color": BLUE, "weight": "bold"} if i == j else {"color": INK}
        ax.text(j, i, text, ha="center", va="center", **style)
    for i in range(10):
        ax.text(9.7, i, f"{wrong[i].sum():,} of {counts[i].sum():,} wrong", va="center", color=GREY, size=8)
    ax.set(xticks=range(10), yticks=range(10), xlabel="prediction", ylabel="label")
    ax.tick_params(length=0)
    title = f"{textwrap.fill(run.title(), 66)}\nMisclassified test images: {wrong.sum():,} of {len(labels):,}"
    fig.suptitle(title, color=run.colour())
    return fig


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_run(run, load_data):
    """(file name, figure) of all that the run has the files for. Says in a line what is not there yet."""
    path = {name: run.folder / name for name in ("metrics.csv", "predictions.npz", "checkpoint_last.npz")}
    for name, figures in zip(path, ("curves.png", "confusion.png and failures.png", "filters.png")):
        if not path[name].exists():
            print(f"{run.folder.name} has no {name} yet, so no {figures}")
    if run.metrics["epoch"].size:
        yield "curves.png", draw_curves([run])
    if path["predictions.npz"].exists():
        data = load_data(run)
        predictions, probabilities = read_predictions(path["predictions.npz"], data.test_labels)
        yield "confusion.png", draw_confusion(run, data.test_labels, predictions)
        yield "failures.png", draw_failures(run, data.test_images, data.test_labels, predictions, probabilities)
    if path["checkpoint_last.npz"].exists():
        params = read_conv1(path["checkpoint_last.npz"])
        if params:
            data = load_data(run)
            yield "filters.png", draw_filters(run, params, data.test_images[0], data.test_labels[0])
        else:
            print(f"{run.folder.name} is a network without convolutions, so no filters.png")


def plot(tags, save_dir, data_dir, overlay=False, watch=False):
    folders = find_runs(save_dir, tags)
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        matplotlib.use("Agg")
    on_screen = plt.get_backend().lower() != "agg" and not watch
    read_data = functools.cache(load_mnist)

    def load_data(run):
        data = read_data(data_dir)
        if data.hashes != run.hashes:
            raise UserError(f"{run.folder.name} ran on {run.data}, but --data-dir {data_dir} leads to {data.name} "
                            "(its SHA-256 differs); name the folder with the run's data")  # fmt: skip
        return data

    def write(path, figure):
        stream = BytesIO()
        figure.savefig(stream, format="png")
        write_file(path, stream.getvalue())
        print(path, flush=True)
        if not on_screen:
            plt.close(figure)

    def draw_all():
        """Draws everything there is so far. Returns whether all runs have come to their last epoch."""
        runs = [read_run(folder) for folder in folders]
        begun = [run for run in runs if run.metrics["epoch"].size]
        if begun and (overlay or len(begun) > 1):
            name = "_".join(["test_accuracy" if overlay else "curves", *(run.folder.name for run in begun)])
            draw = draw_overlay if overlay else draw_curves
            write(begun[0].folder / f"{name[:200]}.png", draw(begun))  # file systems allow 255 bytes
        for run in () if overlay else runs:
            for name, figure in draw_run(run, load_data):
                write(run.folder / name, figure)
        return all(run.metrics["epoch"].size > run.settings.epochs_max for run in runs)

    def files():
        """When what the figures are drawn from was last written. The checkpoint is an epoch's last file."""
        paths = [folder / name for folder in folders for name in ("config.json", "metrics.csv", "checkpoint_last.npz")]
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]

    with plt.rc_context(STYLE):
        drawn, finished = None, False
        while not finished or drawn != files():  # it ends once the last epoch's files have stopped changing
            if drawn != files():
                drawn, finished = files(), draw_all()
            if not watch:
                break
            time.sleep(WATCH_SECONDS)
        if on_screen:
            plt.show()


def main(arguments=None):
    parser = Parser(prog="plot_figs.py", description="Draw the figures of runs into save/<tag>/.", allow_abbrev=False)
    said = f"runs; of several, the curves also stand side by side (default: {Settings.tag})"
    parser.add_argument("tags", nargs="*", default=[Settings.tag], metavar="TAG", help=said)
    parser.add_argument("--overlay", action="store_true", help="draw only the runs' test accuracies, in one panel")
    parser.add_argument("--watch", action="store_true", help="draw again after each epoch, until the runs are finished")
    for f in fields(Settings):
        if f.name in ("save_dir", "data_dir"):  # a path on the command line starts where the user is
            flag, said = f"--{f.name.replace('_', '-')}", f"{f.metadata['help']} (default: {f.default})"
            parser.add_argument(flag, help=said, metavar="FOLDER", default=ROOT / f.default,
                                type=lambda text: Path(text).absolute())  # fmt: skip
    try:
        plot(**vars(parser.parse_args(arguments)))
        return 0
    except (UserError, OSError) as error:
        print(f"plot_figs.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the way to end --watch
        return 130


if __name__ == "__main__":
    sys.exit(main())
