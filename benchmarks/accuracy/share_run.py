"""Makes the last checkpoint of a finished run small: a quarter of its size, for git or to pass on.

    python benchmarks/accuracy/share_run.py record

save/record/checkpoint_last.npz then has only the weights that were evaluated. Figures and
predictions stay possible; mnist_resnet9.py refuses to continue such a run. What goes is what only
further training would need: the optimizer's moments, and the weights themselves beside their
running mean.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mnist_resnet9 as m
from support.checkpoints import checksums, read_arrays, read_history
from support.runs import find_runs, read_run
from support.storage import pack_arrays, write_file


def keep_weights_only(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name not in ("moments", "sha256")}
    averaged = {name: arrays.pop(f"ema.{name}") for name in list(arrays) if f"ema.{name}" in arrays}
    arrays |= averaged
    write_file(path, pack_arrays(**arrays, sha256=checksums(arrays)))


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tag")
    parser.add_argument("--save-dir", type=Path, default=ROOT / "save")
    o = parser.parse_args(arguments)
    run = read_run(find_runs(o.save_dir, [o.tag])[0], m.Settings)
    path, last = run.folder / "checkpoint_last.npz", run.settings.epochs_max
    done = len(read_history(read_arrays(path))) - 1
    if done < last:
        raise m.UserError(
            f"{o.tag} has done {done} of {last} epochs, and could not be continued; finish it first"
        )
    keep_weights_only(path)
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], main))
