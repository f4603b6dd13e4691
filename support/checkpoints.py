"""Checkpoints: arrays with checksums. No file is trusted before all of it has been checked."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from support import UserError
from support.storage import pack_arrays, read_file, reason

# The columns that every run's history has: a row an epoch, {column: value}.
HISTORY = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
)
VERSION = 1
# What a checkpoint holds beside what the training changes; and beside the parameters and their
# running mean alone.
ABOUT = {"step", "version", "history", "columns", "settings", "sha256"}
OTHERS = ABOUT | {"moments"}
MAX_BYTES = 2**32


class Unreadable(UserError):
    """A checkpoint that cannot be used, though it may be intact: no other one takes its place."""


def checksums(arrays):
    """The SHA-256 of each array with its name, dtype and shape: (len(arrays), 32) uint8.

    The rows are in the alphabetical order of the names."""
    rows = []
    for name in sorted(arrays):
        a = arrays[name]
        what = f"{name} {a.dtype.str} {a.shape}".encode()
        rows.append(hashlib.sha256(what + a.tobytes()).digest())
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)


def columns_of(rows):
    """All columns that any of these rows has, those of HISTORY first."""
    return list(dict.fromkeys([*HISTORY, *(column for row in rows for column in row)]))


def pack_checkpoint(arrays, step, history, settings):
    """The bytes of a checkpoint.

    arrays: {name: array} of all that the training changes; history: a row an epoch; settings: a
    dict of all that defines the experiment."""
    columns = columns_of(history)
    table = [[row.get(column, np.nan) for column in columns] for row in history]
    arrays = arrays | {
        "step": np.int64(step),
        "version": np.int64(VERSION),
        "history": np.array(table, float).reshape(-1, len(columns)),
        "columns": np.array(columns),
        "settings": np.array(json.dumps(settings)),
    }
    return pack_arrays(**arrays, sha256=checksums(arrays))


def read_arrays(path):
    """{name: array} of a checkpoint, each of them whole.

    Unreadable if the system does not hand the file over, another UserError if it is damaged;
    FileNotFoundError if there is none."""
    path = Path(path)
    try:
        content = read_file(path, MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(
            f"{path} cannot be read ({error.strerror or error}); nothing was changed"
        ) from None
    try:
        return unpack(content)
    except MemoryError:
        raise  # it may be whole
    except Exception as error:  # zip, zlib and NumPy raise many kinds on a damaged file
        raise UserError(f"{path} is damaged ({reason(error)})") from None


def unpack(content):
    """What read_arrays() does to the bytes; raises whatever is wrong."""
    # A compressed or overlapping member could fill the memory.
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = file.infolist()
    size = sum(member.file_size for member in members)
    if size > len(content) or any(member.compress_type for member in members):
        raise ValueError("its arrays are not as a run packs them")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    sums = arrays.pop("sha256", None)
    if not np.array_equal(sums, checksums(arrays)):
        raise ValueError("its checksums are not those of its arrays")
    for name, a in arrays.items():
        if name not in ABOUT and not (a.dtype.kind == "f" and np.isfinite(a).all()):
            raise ValueError(f"{name} is not all finite numbers")
    return arrays


def check_arrays(arrays, expected):
    """ValueError, which names them, if these are not arrays of the names, shapes and dtypes of the
    expected ones."""
    wrong = []
    for name in sorted(arrays.keys() | expected.keys()):
        found, wanted = arrays.get(name), expected.get(name)
        if wanted is None:
            wrong.append(f"{name}, which is not expected")
        elif found is None:
            wrong.append(f"no {name}")
        elif (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            there, should = (f"{a.dtype} {a.shape}" for a in (found, wanted))
            wrong.append(f"{name} {there}, not {should}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"it has {'; '.join(wrong[:5])}{more}")


def read_checkpoint(path, expected, settings):
    """What pack_checkpoint packed: {name: array}, step, history.

    expected: arrays of the names, shapes and dtypes that there should be; settings: those that
    must be the same in the file. Unreadable if the system does not hand the file over, another
    UserError if anything is wrong with it.
    """
    arrays = read_arrays(path)
    if "moments" not in arrays:
        raise Unreadable(
            f"{path} has the weights alone, which is too little to continue; choose another --tag"
        )
    try:
        if arrays.get("version") != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        check_arrays({n: a for n, a in arrays.items() if n not in ABOUT}, expected)
        history = read_history(arrays)
        step = int(arrays["step"])
        if step < 0:
            raise ValueError(f"its step is {step}")
        then = json.loads(str(arrays["settings"]))
        for name, value in json.loads(json.dumps(settings)).items():
            if name in then and then[name] != value:  # an older run lacks the newest settings
                raise ValueError(f"its {name} is {then[name]!r}, not {value!r}")
    except Exception as error:
        raise UserError(f"{path} is damaged or of another network ({reason(error)})") from None
    return {name: arrays[name] for name in expected}, step, history


def read_history(arrays):
    """A row for each epoch: {column: value}. ValueError if they are not those of a run."""
    # Before there was this array, all had the same columns.
    columns = [str(column) for column in arrays.get("columns", HISTORY)]
    table = arrays["history"]
    right = table.ndim == 2 and table.shape[1] == len(columns) and columns[0] == HISTORY[0]
    if not right or not np.array_equal(table[:, 0], range(len(table))):
        raise ValueError("its history is not that of a run")
    return [dict(zip(columns, row)) | {"epoch": i} for i, row in enumerate(table.tolist())]


def read_weights(path):
    """{name: array} of the parameters that a checkpoint of any network was evaluated with.

    Where the run keeps a mean of its weights (the setting ema), that is the mean. Unreadable or
    another UserError as read_arrays()."""
    arrays = read_arrays(path)
    names = [name for name in arrays if name not in OTHERS and not name.startswith("ema.")]
    return {name: arrays.get(f"ema.{name}", arrays[name]) for name in names}
