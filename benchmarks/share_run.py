"""Makes the last checkpoint of a finished run small: a quarter of its size, for git or to pass on.

    python benchmarks/share_run.py record       save/record/checkpoint_last.npz then has only the
                                                weights that were evaluated

Figures and predictions stay possible, and mnist_resnet9.py still says that the run is finished.
What goes is what only further training would need: the optimizer's moments, and the weights
themselves beside their running mean.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.checkpoints import checksums
from support.storage import save_arrays


def keep_weights_only(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name not in ("moments", "sha256")}
    averaged = {name: arrays.pop(f"ema.{name}") for name in list(arrays) if f"ema.{name}" in arrays}
    arrays |= averaged
    save_arrays(path, **arrays, sha256=checksums(arrays))


if __name__ == "__main__":
    keep_weights_only(ROOT / "save" / sys.argv[1] / "checkpoint_last.npz")
