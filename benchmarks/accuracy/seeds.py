"""Test accuracy at the last epoch over several runs, mean ± standard deviation: what README's
results are.

    for s in 1 2 3 4 5; do python mnist_resnet9.py --recipe quick --seed $s --tag quick_$s; done
    python benchmarks/accuracy/seeds.py quick_1 quick_2 quick_3 quick_4 quick_5
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mnist_resnet9 as m
from support import UserError
from support.checkpoints import read_weights
from support.runs import find_runs, read_run
from support.storage import read_file


def network(run):
    """The shapes of the parameters by name. Steps of evolution/ may have the same settings."""
    path = run.folder / "checkpoint_last.npz"
    if not path.exists():
        raise UserError(f"{run.folder.name} has no {path.name}, which shows what network it is")
    return {name: a.shape for name, a in read_weights(path).items()}


def first_weights(run):
    """The checkpoint that a run of the PyTorch version started from, or "": `--weights`."""
    config = json.loads(read_file(run.folder / "config.json"))
    return config["settings"].get("weights", "")


def summary(runs):
    """UserError if the runs differ in more than seed, tag and where they were computed, or one is
    unfinished."""
    here = {"seed", "tag", *m.NOT_THE_EXPERIMENT} - {"epochs_max"}
    kinds = {tuple((k, v) for k, v in vars(run.settings).items() if k not in here) for run in runs}
    if len(kinds) > 1 or len({run.settings.seed for run in runs}) < len(runs):
        raise UserError("these runs should be the same experiment with different seeds")
    if any(run.hashes != runs[0].hashes for run in runs):
        raise UserError("these runs should have been made with the same data")
    for run in runs:
        done, last = max(0, len(run.metrics["epoch"]) - 1), run.settings.epochs_max
        if done != last:
            raise UserError(
                f"{run.folder.name} has done {done} epochs, and should have done {last}"
            )
    if len({first_weights(run) for run in runs}) > 1:
        raise UserError("these runs should have started from the same weights, or all anew")
    if any(network(run) != network(runs[0]) for run in runs):
        raise UserError("these runs should be of the same network")
    last = [100 * run.metrics["test_accuracy"][-1] for run in runs]
    spread = f" ± {statistics.stdev(last):.3f}" if len(last) > 1 else ""
    each = ", ".join(f"{accuracy:.2f}" for accuracy in last)
    return f"{each} %: {statistics.mean(last):.3f}{spread} % over {len(last)} seeds"


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tags", nargs="+")
    parser.add_argument("--save-dir", type=Path, default=ROOT / "save")
    o = parser.parse_args(arguments)
    print(summary([read_run(folder, m.Settings) for folder in find_runs(o.save_dir, o.tags)]))
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], main))
