"""Compares settings on training images that are held out, so that the test set chooses nothing.

    python benchmarks/accuracy/compare_settings.py "--recipe quick" "--recipe quick --dropout 0.3"
    python benchmarks/accuracy/compare_settings.py --folds 5 "--recipe record --epochs-max 20"
    python benchmarks/accuracy/compare_settings.py --halves "--recipe record --epochs-max 12"

Each argument is one set of flags of mnist_resnet9.py. For each fold the last 10,000 training
images, the 10,000 before them, and so on, are held out, and the others trained on, with a seed
(100, 101, …) that no result uses. With --halves a random half is held out, then the other: three
times as many images decide, and an epoch takes half as long. Shown are the held-out errors of each
fold; the mean held-out loss, at the best of eight temperatures, since label smoothing changes the
scale of the logits; the errors in 10,000 of the images trained on; and the seconds of an epoch.
10,000 images decide a few errors by chance.
"""

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mnist_resnet9 as m
from support.run_folder import read_metrics

HELD_OUT = 10_000
TEMPERATURES = (0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3)


def hold_out(data, fold, halves=False):
    """The data set without its test images: those of the fold take their place."""
    count = len(data.train_images)
    if halves:
        keep, held = np.split(np.random.default_rng(7).permutation(count), [count // 2])
        if fold == 1:
            keep, held = held, keep
    else:
        stop = count - fold * HELD_OUT
        held = np.arange(stop - HELD_OUT, stop)
        keep = np.delete(np.arange(count), held)
    return replace(
        data,
        train_images=data.train_images[keep],
        train_labels=data.train_labels[keep],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


def best_loss(probs, labels):
    """The mean loss at the temperature that makes it least."""
    log_probs = np.log(np.maximum(m.to_host(probs), 1e-30))
    losses = [m.cross_entropy_loss(log_probs * t, m.to_host(labels))[0] for t in TEMPERATURES]
    return float(min(losses))


def settings_of(flags, fold, folder):
    """Settings of the run that holds out this fold."""
    try:
        given = shlex.split(flags)
    except ValueError as error:
        raise m.UserError(f"{flags!r} cannot be read ({error})") from None
    settings = m.parse_settings(given)
    if settings.data_dir != m.Settings.data_dir:
        raise m.UserError(f"--data-dir should stand beside {flags!r}, not in it")
    if settings.validation_images:
        raise m.UserError(f"{flags!r} has --validation-images, but the folds hold images out")
    return replace(settings, seed=100 + fold, save_dir=folder, tag=f"fold{fold}")


def measure(flags, data, fold, folder, halves=False):
    """(held-out errors, held-out loss, errors in training images, seconds an epoch)."""
    settings = settings_of(flags, fold, folder)
    held_out = hold_out(data, fold, halves)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = m.run(settings, scripts=(), data=held_out)
    if status:
        sys.exit(status)
    run = Path(settings.save_dir) / settings.tag
    last = read_metrics(run / "metrics.csv")
    seconds = sum(row["seconds"] for row in last[1:]) / settings.epochs_max
    with np.load(run / "predictions.npz") as file:
        probs, labels = file["probabilities"], file["labels"]
    errors = int((probs.argmax(axis=1) != labels).sum())
    seen = min(len(held_out.train_images), m.TRAIN_EVALUATION_IMAGES)
    train_errors = round((1 - last[-1]["train_accuracy"]) * seen)
    m.xp = np
    return errors, best_loss(probs, labels), train_errors, seconds


def compare(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flags", nargs="+", help="flags of mnist_resnet9.py, in quotes")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--halves", action="store_true", help="hold out one half, then the other")
    parser.add_argument("--data-dir", default="data")
    o = parser.parse_args(arguments)
    if not 1 <= o.folds <= 6:
        raise m.UserError(f"--folds is {o.folds}, but should be from 1 to 6")
    if o.halves and o.folds > 2:
        raise m.UserError(f"--folds is {o.folds}, but there are two halves")
    for flags in o.flags:  # a mistake in the last shows before the first has trained
        settings_of(flags, 0, "")
    data = m.load_mnist(o.data_dir)
    if not o.halves and len(data.train_images) < max(o.folds * HELD_OUT, HELD_OUT + 1):
        raise m.UserError(
            f"{o.folds} folds hold out {o.folds * HELD_OUT:,} images, "
            f"but there are {len(data.train_images):,}"
        )
    print("| flags | held-out errors | held-out loss | training errors | seconds an epoch |")
    print("|---|---|---|---|---|")
    for flags in o.flags:
        with tempfile.TemporaryDirectory() as folder:
            rows = [measure(flags, data, fold, folder, o.halves) for fold in range(o.folds)]
        errors, losses, train_errors, seconds = zip(*rows)
        listed, listed_train = (", ".join(map(str, counts)) for counts in (errors, train_errors))
        print(
            f"| `{flags}` | {listed}: {np.mean(errors):.1f} | {np.mean(losses):.4f} "
            f"| {listed_train} | {np.mean(seconds):.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], compare))
