"""save/<tag>/, the folder of a run: its log, its metrics, and what makes stopping it safe."""

import contextlib
import json
import os
import re
import sys

import numpy as np
from tqdm import tqdm

from support import ROOT, UserError
from support.checkpoints import HISTORY, Epoch, Unreadable
from support.storage import lock_file, make_folder, read_file, write_file

METRICS = (*HISTORY, "seconds", "images_per_second")
VALIDATION = ("validation_accuracy",)  # one more column where images were held out


def log_header(validation):
    valid = "  valid acc" if validation else ""
    return f"epoch  train loss  train acc  test loss  test acc{valid}  seconds  images/s  left"


def log_line(metrics, left):
    """A row of metrics.csv as a line of log.txt. left: the seconds to the end of the run."""
    row = Epoch(*metrics[: len(HISTORY)])
    seconds, speed, *validation = metrics[len(HISTORY) :]
    line = f"{row.epoch:5d}  {row.train_loss:10.5f}  {row.train_accuracy:9.2%}"
    line += f"  {row.test_loss:9.5f}  {row.test_accuracy:8.2%}"
    for accuracy in validation:
        line += f"  {accuracy:9.2%}"
    line += f"  {seconds:7.1f}"
    if row.epoch:  # epoch 0 is only evaluated
        line += f"  {speed:8.0f}  {duration(left)}"
    return line


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def write_metrics(path, rows):
    columns = (METRICS + VALIDATION)[: len(rows[0])]
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(f"{value:.8g}" for value in row))
    write_file(path, "".join(f"{line}\n" for line in lines).encode())


def read_metrics(path):
    """The rows of metrics.csv, from epoch 0 on: METRICS, and VALIDATION if it is there.

    UserError if the file is anything else."""
    try:
        header, *lines = read_file(path).decode().splitlines()
        rows = [[float(value) for value in line.split(",")] for line in lines]
        columns = tuple(header.split(","))
        known = columns in (METRICS, METRICS + VALIDATION)
        if not known or any(len(row) != len(columns) for row in rows):
            raise ValueError("other columns")
        return rows
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the metrics of a run ({error})") from None


class RunFolder:
    """save/<tag>/: locked, holding nothing but this run, and written so that a crash loses no file.

    config describes the run: {"settings": …, "data": {"name", "sha256"}, …}. free are the names of
    the settings that may differ when it is continued. defaults are the settings that an older run
    had before they could be set. UserError if this cannot be the run's folder.
    """

    def __init__(self, path, config, free, defaults, scripts):
        self.path, self.config = path, config
        self.scripts = scripts
        self.unsaved = {}  # path → save, of what could not be written
        self.unlogged = []  # lines that log.txt lacks
        self.last = path / "checkpoint_last.npz"
        self.previous = path / "checkpoint_previous.npz"
        self.best = path / "checkpoint_best.npz"
        try:
            new = not (path / "config.json").exists()
            unfinished = {
                "code",
                "lock",
                "config.json.part",
            }  # what a start that was cut off leaves
            if new and path.exists() and {file.name for file in path.iterdir()} - unfinished:
                raise UserError(f"{path} holds something else than a run; choose another --tag")
            make_folder(path)
            self.lock = lock_file(path / "lock")
            for part in path.rglob("*.part"):
                if not part.name.endswith(".png.part"):  # plot_figs.py may be writing that one
                    part.unlink()
            if not new:
                check_same_experiment(path, config, free, defaults)
        except OSError as error:
            raise cannot_be_written(path, error) from None

    def write_config(self):
        try:
            write_file(self.path / "config.json", json.dumps(self.config, indent=2).encode())
        except OSError as error:
            raise cannot_be_written(self.path, error) from None

    def keep_code(self):
        """Keeps a copy of the scripts as they run, in code/.

        Where they have been edited since an earlier start, that copy stays and a new one goes to
        code_2/, code_3/ and so on. A line says so."""
        there = [
            path for path in self.path.glob("code*") if re.fullmatch(r"code(_\d+)?", path.name)
        ]
        number = max((int(path.name[5:] or 1) for path in there), default=1)
        folder = self.path / ("code" if number == 1 else f"code_{number}")
        copies = {folder / script.relative_to(ROOT): script for script in self.scripts}
        try:
            edited = [
                script.name
                for copy, script in copies.items()
                if copy.exists() and copy.read_bytes() != script.read_bytes()
            ]
            if edited:
                folder, before = self.path / f"code_{number + 1}", folder
                self.log(
                    f"*** {', '.join(edited)} changed since this run's last start: the scripts as "
                    f"they were are in {before.name}/, as they are in {folder.name}/."
                )
            for script in self.scripts:
                copy = folder / script.relative_to(ROOT)
                if not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    write_file(copy, script.read_bytes())
        except OSError as error:
            raise cannot_be_written(self.path, error) from None

    def restore(self, load):
        """load(path) of the last checkpoint, or of the previous one where the last is damaged.

        None if there is neither."""
        try:
            return self.find_checkpoint(load)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.path}: {error.strerror or error}; "
                "put that right and start again"
            ) from None

    def find_checkpoint(self, load):
        problem = None
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    state = load(path)
                except Unreadable:  # it may be whole, so nothing else takes its place
                    raise
                except UserError as error:
                    problem = problem or error
                    continue
                if problem:
                    # Or the next save would make the damaged one the previous one.
                    damaged = self.path / "checkpoint_damaged.npz"
                    os.replace(self.last, damaged)
                    print(
                        f"*** {problem}. Continuing from {path.name}, step {state.step:,}; "
                        f"the damaged file is now {damaged.name}.",
                        file=sys.stderr,
                    )
                return state
        if problem:
            raise UserError(
                f"{problem}; there is no other checkpoint to continue from: choose another --tag"
            )
        self.begin_anew()
        return None

    def begin_anew(self):
        """Without a checkpoint the run starts from epoch 0, whatever else an earlier start left.

        What contradicts that goes; a best checkpoint is kept under another name."""
        left = []
        for name in ("metrics.csv", "predictions.npz"):
            if (self.path / name).exists():
                (self.path / name).unlink()
                left.append(name)
        if self.best.exists():
            kept = self.path / "checkpoint_best_before.npz"
            os.replace(self.best, kept)
            left.append(f"{self.best.name}, now {kept.name}")
        if left:
            print(
                f"*** {self.path} has no checkpoint to continue from, only {', '.join(left)}: "
                "the run starts from epoch 0.",
                file=sys.stderr,
            )

    def restore_metrics(self, history, lost):
        """The rows of metrics.csv: history, from the checkpoint, with the file's further columns.

        Where the file lacks an epoch, `lost` stands in for these. metrics.csv and log.txt are then
        as they were when the checkpoint was written: no epoch twice, none missing.
        """
        path = self.path / "metrics.csv"
        others = {}
        if path.exists():
            with contextlib.suppress(UserError):  # a damaged file is no loss: it is written anew
                others = {row[0]: row[len(HISTORY) :] for row in read_metrics(path)}
        rows = [[*row, *others.get(row[0], lost)] for row in history]
        if path.exists():
            self.write(path, lambda path: write_metrics(path, rows))
        self.write(self.path / "log.txt", lambda path: restore_log(path, rows))
        return rows

    def predicted_accuracy(self):
        """The accuracy that predictions.npz shows; None if the file is missing or damaged."""
        with contextlib.suppress(Exception):  # zip, zlib and NumPy raise many kinds
            with np.load(self.path / "predictions.npz", allow_pickle=False) as arrays:
                return float((arrays["labels"] == arrays["predictions"]).mean())
        return None

    def write(self, path, save):
        """Calls save(path), which writes that file. Returns whether it could.

        Training goes on without it, and write_unsaved() tries again. So save must write then what
        it would write now."""
        try:
            save(path)
            self.unsaved.pop(path, None)
            return True
        except OSError as error:
            self.unsaved[path] = save
            tqdm.write(
                f"*** {path} was NOT written ({error.strerror or error}). Training goes on; "
                "the next epoch tries again.",
                file=sys.stderr,
            )
            return False

    def write_unsaved(self, *paths):
        """Writes what could not be written before: all, or these files.

        Returns whether all there is to save is saved."""
        for path in paths or list(self.unsaved):
            if path in self.unsaved:
                self.write(path, self.unsaved[path])
        return not (self.unsaved or self.unlogged)

    def log(self, line):
        """Says a line on the terminal, above the progress bar if there is one, and in log.txt."""
        with contextlib.suppress(OSError):  # the terminal may be gone: the run goes on
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        self.unlogged.append(line)
        try:
            append_lines(self.path / "log.txt", self.unlogged)
            self.unlogged = []
        except OSError as error:
            reason = error.strerror or error
            tqdm.write(f"*** log.txt was NOT written ({reason}).", file=sys.stderr)

    def close(self):
        self.lock.close()


def cannot_be_written(path, error):
    return UserError(f"{path} cannot be written ({error.strerror}); choose another --save-dir")


def append_lines(path, lines):
    """Adds lines to a file: all of them or, with an OSError, none, so that they can come later."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, before)  # a disk that is nearly full takes half a line
        raise


def restore_log(path, rows):
    """Leaves one line in log.txt for each epoch of rows, and none for others.

    Lines that are not about an epoch stay."""
    lines = []
    if path.exists():
        lines = read_file(path).decode(errors="replace").splitlines()
    missing = {row[0]: log_line(row, 0) for row in rows}
    kept = []
    for line in lines:
        epoch = int(line[:5]) if line[:5].strip().isdecimal() else None
        same = epoch in missing and line[:50] == missing[epoch][:50]  # [:50]: without the times
        if epoch is None or same:
            kept.append(line)
            missing.pop(epoch, None)
    write_file(path, "".join(f"{line}\n" for line in [*kept, *missing.values()]).encode())


def check_same_experiment(folder, config, free, defaults):
    """UserError if the run in the folder is another one than config describes."""
    try:
        old = json.loads(read_file(folder / "config.json"))
        then = defaults | old["settings"]
        hashes = old["data"]["sha256"]
    except OSError as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({error.strerror}); choose another --tag"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'config.json'} is damaged ({error!r}); choose another --tag"
        ) from None
    now = config["settings"]
    differ = []
    for name in now:
        if name not in free and then.get(name) != now[name]:
            differ.append(f"{name} {then.get(name)!r}, not {now[name]!r}")
    if hashes != config["data"]["sha256"]:
        differ.append(f"data {old['data'].get('name')!r}, not {config['data']['name']!r}")
    if differ:
        raise UserError(
            f"{folder} holds another experiment: it has {'; '.join(differ)}. Choose another --tag"
        )
