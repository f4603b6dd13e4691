"""save/<tag>/, the folder of a run: its log, its metrics, and what makes stopping it safe."""

import contextlib
import json
import os
import re
import sys

from tqdm import tqdm

from support import ROOT, UserError
from support.checkpoints import HISTORY, Unreadable, columns_of
from support.storage import lock_file, make_folder, read_file, reason, write_file

# The columns of metrics.csv in every run; others follow: validation_accuracy, or a student's own.
TIMES = ("seconds", "images_per_second")
METRICS = (*HISTORY, *TIMES)


def log_header(validation):
    valid = "  valid acc" if validation else ""
    return f"epoch  train loss  train acc  test loss  test acc{valid}  seconds  images/s  left"


def log_line(row, left):
    """A row of metrics.csv as a line of log.txt. left: the seconds to the end of the run."""
    line = f"{row['epoch']:5d}  {row['train_loss']:10.5f}  {row['train_accuracy']:9.2%}"
    line += f"  {row['test_loss']:9.5f}  {row['test_accuracy']:8.2%}"
    if "validation_accuracy" in row:
        line += f"  {row['validation_accuracy']:9.2%}"
    line += f"  {row['seconds']:7.1f}"
    if row["epoch"]:  # epoch 0 is only evaluated
        line += f"  {row['images_per_second']:8.0f}  {duration(left)}"
    return line


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def pack_metrics(rows):
    """The bytes of metrics.csv. rows: a {column: value} an epoch."""
    columns = [*METRICS, *(column for column in columns_of(rows) if column not in METRICS)]
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(f"{row.get(column, float('nan')):.8g}" for column in columns))
    return "".join(f"{line}\n" for line in lines).encode()


def read_metrics(path):
    """The rows of metrics.csv, from epoch 0 on: {column: value}, METRICS and perhaps others.

    UserError if the file is anything else."""
    try:
        header, *lines = read_file(path).decode().splitlines()
        columns = header.split(",")
        rows = [[float(value) for value in line.split(",")] for line in lines]
        if tuple(columns[: len(METRICS)]) != METRICS or len(set(columns)) < len(columns):
            raise ValueError("other columns")
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("rows of another length")
        return [dict(zip(columns, row)) for row in rows]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as the metrics of a run ({reason(error)})"
        ) from None


SOURCES = {}  # path → bytes of the scripts that were imported, as they were then


def remember(scripts):
    """Keeps what the scripts hold now: a run that starts later is computed by that."""
    for script in scripts:
        with contextlib.suppress(OSError):
            SOURCES[script] = script.read_bytes()


def source_of(script):
    return SOURCES[script] if script in SOURCES else script.read_bytes()


def newest_code(path):
    """The newest of code/, code_2/ and so on in the folder of a run; code/ if there is none yet."""
    numbers = {1: path / "code"}
    for copy in path.glob("code_*"):
        if re.fullmatch(r"code_\d+", copy.name):
            numbers[int(copy.name[5:])] = copy
    return numbers[max(numbers)]


class RunFolder:
    """save/<tag>/: locked, holding nothing but this run, and written so that a crash loses no file.

    config describes the run: {"settings": …, "data": {"name", "sha256"}, …}. free are the names of
    the settings that may differ when it is continued. defaults are the settings that an older run
    had before they could be set. UserError if this cannot be the run's folder.
    """

    def __init__(self, path, config, free, defaults, scripts):
        self.path, self.config = path, config
        self.scripts = scripts
        self.unlogged = []  # lines that log.txt lacks
        self.notes = []  # what the log should say of a run that is continued
        self.lock = None
        self.last = path / "checkpoint_last.npz"
        self.previous = path / "checkpoint_previous.npz"
        self.best = path / "checkpoint_best.npz"
        try:
            new = not (path / "config.json").exists()
            # What a start that was cut off leaves: in the log stands that there are no locks, say.
            unfinished = {"lock", "log.txt", "config.json.part"}
            if new and path.exists() and {file.name for file in path.iterdir()} - unfinished:
                raise UserError(f"{path} holds something other than a run; choose another --tag")
            make_folder(path)
            self.lock = lock_file(path / "lock", self.warn)
            for part in path.rglob("*.part"):
                if not part.name.endswith(".png.part"):  # plot_figs.py may be writing that one
                    part.unlink()
            if not new:
                self.notes = check_same_experiment(path, config, free, defaults)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise cannot_be_written(path, error) from None
            raise

    def write_config(self):
        try:
            write_file(self.path / "config.json", json.dumps(self.config, indent=2).encode())
        except OSError as error:
            raise cannot_be_written(self.path, error) from None
        for note in self.notes:
            self.note(note)

    def keep_code(self, replaced):
        """Keeps a copy of the scripts as they run, in code/.

        Where they have been edited since an earlier start, that copy stays and a new one goes to
        code_2/, code_3/ and so on. A line says so, and another one which of their functions were
        replaced since they were imported: the copy does not show that."""
        folder = newest_code(self.path)
        copies = {folder / script.relative_to(ROOT): script for script in self.scripts}
        try:
            edited = [
                script.name
                for copy, script in copies.items()
                if copy.exists() and copy.read_bytes() != source_of(script)
            ]
            if edited:
                number, before = int(folder.name[5:] or 1), folder
                folder = self.path / f"code_{number + 1}"
                self.note(
                    f"{', '.join(edited)} changed since this run's last start: the scripts as "
                    f"they were are in {before.name}/, as they are in {folder.name}/."
                )
            for script in self.scripts:
                copy = folder / script.relative_to(ROOT)
                if not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    write_file(copy, source_of(script))
            if replaced:
                self.note(
                    f"Replaced since the import, so not as in {folder.name}/: "
                    f"{', '.join(sorted(replaced))}."
                )
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
                    self.warn(
                        f"{problem}. Continuing from {path.name}, step {state.step:,}; "
                        f"the damaged file is now {damaged.name}."
                    )
                return state
        if problem:
            raise UserError(
                f"{problem}; there is no other checkpoint to continue from: choose another --tag"
            )
        if (self.path / "metrics.csv").exists():
            # Its files are those of an epoch 0 that was cut off, or of a run that has lost its
            # checkpoints. They are written anew at the end of epoch 0.
            self.warn(
                f"{self.path} has no checkpoint to continue from: the run starts from epoch 0."
            )
        return None

    def read_others(self):
        """{epoch: its row of metrics.csv}, for the columns that a checkpoint does not hold."""
        try:
            rows = read_metrics(self.path / "metrics.csv")
        except UserError:  # a missing or damaged file is no loss: it is written anew
            return {}
        return {row["epoch"]: row for row in rows}

    def note(self, line):
        """As log(), of what the user should know."""
        self.log(f"*** {line}")

    def warn(self, line):
        """As log(), on the stream for errors."""
        self.log(f"*** {line}", sys.stderr)

    def log(self, line, stream=None):
        """Says a line on the terminal, above the progress bar if there is one, and in log.txt.

        log.txt is a diary: what stands there stays."""
        stream = stream or sys.stdout
        with contextlib.suppress(OSError):  # the terminal may be gone: the run goes on
            tqdm.write(line, file=stream)
            stream.flush()
        self.unlogged.append(line)
        try:
            append_lines(self.path / "log.txt", self.unlogged)
            self.unlogged = []
        except OSError as error:
            reason = error.strerror or error
            with contextlib.suppress(OSError):  # neither disk nor terminal: the run goes on
                tqdm.write(f"*** log.txt was NOT written ({reason}).", file=sys.stderr)

    def close(self):
        """Lets another program, or another run of this one, have the folder."""
        if self.lock:
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


def check_same_experiment(folder, config, free, defaults):
    """UserError if the run in the folder is another one than config describes.

    Returns what else is not as it was, a sentence each."""
    # As the file has them: with lists where there are tuples here.
    config, defaults = json.loads(json.dumps([config, defaults]))
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
    notes = []
    added = [f"{name} = {now[name]!r}" for name in now if name not in old["settings"]]
    if added:
        notes.append(
            f"This run was begun by code that had no setting {', '.join(added)}: "
            "it goes on with that, and config.json now has it."
        )
    if "code" in old and old["code"] != config["code"]:
        notes.append(
            "What defines the computation changed since this run's last start: it goes on with "
            "other code than it was begun with."
        )
    return notes
