"""The runs in a save folder: which there are, and what config.json and metrics.csv say of one."""

import contextlib
import errno
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import UserError, terminal
from support.run_folder import METRICS, newest_code, read_metrics
from support.settings import project_path, user_path
from support.storage import read_file
from support.style import INK, ORANGE

CHECKPOINTS = ("checkpoint_last.npz", "checkpoint_previous.npz")


class SavedRun(NamedTuple):
    """What the readers of save/<tag>/ need to know of it."""

    folder: Path
    settings: Any  # the script's Settings
    data: str  # the name of the data set
    hashes: dict
    metrics: dict  # column of metrics.csv → its values, one an epoch
    code: str = ""  # what defined its computation; "" where config.json does not say

    def title(self):
        """What every figure's title begins with. No other data set passes for MNIST."""
        name = self.data if self.data == "MNIST" else f"{self.data} (not MNIST)"
        count = self.settings.train_images
        return f"{self.folder.name} on {name}" + (f", {count:,} training images" if count else "")

    def note_on_code(self, code):
        """What to say of it where `code` (fast_ways.code() of the script) computes with it: often
        nothing."""
        if self.code in ("", code):
            return ""
        copy = newest_code(self.folder)
        where = f", which {terminal.shown(copy)} holds" if copy.is_dir() else ""
        return (
            f"*** {self.folder.name} was trained by other code{where}: "
            "what follows is computed by the code as it is now."
        )

    def colour(self):
        return INK if self.data == "MNIST" else ORANGE


def find_runs(save_dir, tags):
    """The folders of these runs. UserError lists the runs there are if one of these is missing."""
    runs = {path.parent.name: path.parent for path in sorted(save_dir.glob("*/config.json"))}
    there = "it has none yet: mnist_resnet9.py makes one"
    if runs:
        there = f"its runs are {', '.join(runs)}"
    for tag in tags:
        if tag not in runs:
            raise UserError(f"{save_dir} has no run {tag!r}; {there}")
    return [runs[tag] for tag in dict.fromkeys(tags)]


def read_run(folder, kind):
    """The SavedRun in a folder. kind is the class of its settings: the script's Settings."""
    path = folder / "config.json"
    try:
        config = json.loads(read_file(path))
        names = [f.name for f in fields(kind) if f.name in config["settings"]]
        given = {name: config["settings"][name] for name in names}
        settings = kind(**given)
        data = " ".join(config["data"]["name"].split())
        hashes = dict(config["data"]["sha256"])
        code = str(config.get("code", ""))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r})") from None
    return SavedRun(folder, settings, data, hashes, read_history(folder / "metrics.csv"), code)


def has_checkpoint(folder):
    return any((folder / name).exists() for name in CHECKPOINTS)


def read_newest(folder, read):
    """What read(path) makes of the newest checkpoint of a run; FileNotFoundError if it has none.

    Its name is checkpoint_last.npz, but for a moment in each save, and after a crash in that
    moment: then the one before is the newest."""
    # Twice, since a save may end between the two looks.
    for name in CHECKPOINTS * 2:
        with contextlib.suppress(FileNotFoundError):
            return read(folder / name)
    raise FileNotFoundError(errno.ENOENT, "has no checkpoint", str(folder))


def read_history(path):
    """{column of metrics.csv: its values, one an epoch}; they are empty before there is a file."""
    if not path.exists():
        return {name: np.empty(0) for name in METRICS}
    rows = read_metrics(path)
    columns = list(rows[0]) if rows else METRICS
    metrics = {name: np.array([row[name] for row in rows], float) for name in columns}
    losses = np.concatenate([metrics["train_loss"], metrics["test_loss"]])
    accuracies = np.concatenate([metrics["train_accuracy"], metrics["test_accuracy"]])
    good = np.isfinite(losses).all() and ((0 <= accuracies) & (accuracies <= 1)).all()
    held_out = metrics.get("validation_accuracy", accuracies)
    good = good and not ((held_out < 0) | (held_out > 1)).any()  # epochs of older code have none
    if not (rows and good and np.array_equal(metrics["epoch"], range(len(rows)))):
        raise UserError(f"{path} is damaged: its values are not those of a run")
    return metrics


def add_save_dir(parser, default):
    """The flag --save-dir, for user_folder(). Without it, the folder is that of the settings."""
    parser.add_argument(
        "--save-dir",
        default=str(project_path(default)),
        metavar="FOLDER",
        help=f"folder that holds the runs (default: {default})",
    )


def user_folder(text):
    """A folder on the command line as a Path."""
    return Path(user_path(text))
