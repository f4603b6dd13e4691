"""Test accuracy when each image is read several times, shifted by a pixel, and the probabilities
are averaged.

    python benchmarks/shifts.py record        the weights of save/record/checkpoint_last.npz

Not what README's results are: those read each image once.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_resnet9 as m
from support.runs import find_runs, read_run

SHIFTS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]  # rows down, columns to the right


def shifted(images, down, right):
    """(N, 28, 28) moved within the frame; what comes in from outside is 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 - down : 29 - down, 1 - right : 29 - right]


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tags", nargs="+")
    o = parser.parse_args(arguments)
    for run in (read_run(folder, m.Settings) for folder in find_runs(ROOT / "save", o.tags)):
        data = m.load_mnist(run.settings.data_dir)
        params = m.load_checkpoint(run.folder / "checkpoint_last.npz", run.settings).averaged()
        probs = [
            m.evaluate(params, shifted(data.test_images, *s), data.test_labels, run.settings)[2]
            for s in SHIFTS
        ]
        once, five = [
            (p.argmax(axis=1) == data.test_labels).mean()
            for p in (probs[0], np.mean(probs, axis=0))
        ]
        print(f"{run.folder.name}: read once {once:.2%}, five times {five:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], main))
