"""Test accuracy against dropout rate: the reference experiment with dropout 0.5, 0.6, 0.7, 0.8,
0.9, 0.95 and 0.99.

    python benchmarks/accuracy/dropout_study.py               run or continue all, 5 epochs each
    python benchmarks/accuracy/dropout_study.py --epochs 200  any number; a study of 5 goes on
    python benchmarks/accuracy/dropout_study.py --commands    print the commands, run nothing

The first two draw docs/dropout.png at the end; the commands are for a job scheduler.
Each run is an ordinary one, in save/dropout_<rate>/. Finished runs are not repeated, so after the
commands have run elsewhere the first line only draws. Runs with fewer epochs than asked for are not
drawn.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import mnist_resnet9 as m
from plot_figs import scale_accuracy
from support.runs import read_history
from support.style import BLUE, our_style

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def command(rate, epochs):
    flags = f"--tag dropout_{rate} --dropout {rate} --epochs-max {epochs}"
    return ["mnist_resnet9.py", *flags.split()]


def accuracies(save, epochs):
    """{rate: test accuracy after this many epochs} of the runs that have got as far."""
    found = {}
    for rate in RATES:
        path = save / f"dropout_{rate}" / "metrics.csv"
        history = read_history(path)["test_accuracy"]
        if len(history) > epochs:
            found[rate] = history[epochs]
    return found


def draw(found, epochs):
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(list(found), list(found.values()), "o-", color=BLUE, lw=1.2)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for rate, accuracy in found.items():
        point, text = (rate, accuracy), f"{accuracy:.2%}"
        ax.annotate(text, point, (6, 10), textcoords="offset points", size=8, bbox=box)
    scale_accuracy(ax, min(found.values()), max(found.values()))
    ax.set(
        title=f"The reference experiment after {epochs} epochs, one run for each rate",
        xlabel="dropout rate",
        ylabel="test accuracy",
        xticks=RATES[:-2] + RATES[-1:],
    )
    ax.margins(x=0.17, y=0.1)  # room for the numbers
    ax.grid(True)
    return fig


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each run (default: 5)")
    parser.add_argument(
        "--commands", action="store_true", help="print the commands and run nothing"
    )
    o = parser.parse_args(arguments)
    if o.epochs < 1:
        raise m.UserError(f"--epochs is {o.epochs}, but should be 1 or more")
    for rate in RATES:
        arguments = command(rate, o.epochs)
        print("python", *arguments, flush=True)
        if o.commands:
            continue
        status = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
        if status:  # stopped or refused; what is done stays, and the same command continues
            return status
    if o.commands:
        return 0
    found = accuracies(ROOT / "save", o.epochs)
    with our_style():
        draw(found, o.epochs).savefig(ROOT / "docs" / "dropout.png")
    for rate, accuracy in found.items():
        print(f"dropout {rate:<5}  test accuracy after {o.epochs} epochs {accuracy:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], main))
