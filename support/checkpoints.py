"""Checkpoints: arrays with checksums. No file is trusted before all of it has been checked."""

import hashlib
import io
import json
import zipfile
from typing import NamedTuple

import numpy as np

from support import UserError
from support.storage import is_lfs_pointer, pack_arrays


class Epoch(NamedTuple):
    """What is known of an epoch: a row of a run's history, in checkpoints and metrics."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


class Unreadable(UserError):
    """A checkpoint that the system does not hand over. It may be whole."""


HISTORY = Epoch._fields
CHECKPOINT_VERSION = 1


def checksums(arrays):
    """The SHA-256 of each array with its name, dtype and shape: (len(arrays), 32) uint8.

    The rows are in the alphabetical order of the names."""
    rows = []
    for name in sorted(arrays):
        a = arrays[name]
        what = f"{name} {a.dtype.str} {a.shape}".encode()
        rows.append(hashlib.sha256(what + a.tobytes()).digest())
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)


def pack_checkpoint(arrays, step, history, settings):
    """The bytes of a checkpoint.

    arrays: {name: array} of all that the training changes; settings: a dict of all that defines the
    experiment."""
    arrays = arrays | {
        "step": np.int64(step),
        "version": np.int64(CHECKPOINT_VERSION),
        "history": np.array(history, float).reshape(-1, len(HISTORY)),
        "settings": np.array(json.dumps(settings)),
    }
    return pack_arrays(**arrays, sha256=checksums(arrays))


def read_checkpoint(path, expected, settings):
    """What pack_checkpoint packed: {name: array}, step, history.

    expected: arrays of the names, shapes and dtypes that there should be; settings: those that
    must be the same in the file. Unreadable if the system does not hand the file over, another
    UserError if anything is wrong with it.
    """
    try:
        # A checkpoint is twice its largest arrays at most; anything may lie under its name.
        bound = 2**26 + 2 * sum(a.nbytes for a in expected.values())
        with open(path, "rb") as file:
            content = file.read(bound + 1)
    except OSError as error:
        raise Unreadable(
            f"{path} cannot be read ({error.strerror or error}); nothing was changed"
        ) from None
    if is_lfs_pointer(content):
        raise Unreadable(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`")
    try:
        if len(content) > bound:
            raise ValueError("it is larger than a checkpoint")
        return check_checkpoint(io.BytesIO(content), bound, expected, settings)
    except MemoryError:
        raise  # it may be whole
    except Exception as error:  # zip, zlib and NumPy raise many kinds on a damaged file
        reason = str(error) or repr(error)
        raise UserError(f"{path} is damaged or of another network ({reason})") from None


def check_checkpoint(content, bound, expected, settings):
    """The substance of read_checkpoint(), with a ValueError or another one for what is wrong."""
    # A compressed or overlapping member could fill the memory.
    with zipfile.ZipFile(content) as file:
        members = file.infolist()
    size = sum(member.file_size for member in members)
    if size > bound or any(member.compress_type for member in members):
        raise ValueError("it is larger than a checkpoint")
    content.seek(0)
    with np.load(content, allow_pickle=False) as file:
        if "version" not in file or file["version"] != CHECKPOINT_VERSION:
            raise ValueError(f"it has not version {CHECKPOINT_VERSION}")
        arrays = {name: file[name] for name in file.files}
    sums = arrays.pop("sha256", None)
    if "moments" not in arrays:  # a finished run, made small to be passed on: see save/README.md
        expected = {name: a for name, a in expected.items() if not name.startswith("ema.")}
        expected.pop("moments")
    if arrays.keys() != expected.keys() | {"step", "history", "settings", "version"}:
        others = ", ".join(sorted(arrays.keys() ^ expected.keys()))
        raise ValueError(f"it has other arrays: {others[:200]}")
    if not np.array_equal(sums, checksums(arrays)):
        raise ValueError("its checksums are not those of its arrays")
    for name, wanted in expected.items():
        a = arrays[name]
        if (a.shape, a.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"{name} is {a.dtype} {a.shape}, not {wanted.dtype} {wanted.shape}")
        if not np.isfinite(a).all():
            raise ValueError(f"{name} is not finite")
    step = int(arrays["step"])
    history = arrays["history"]
    columns_are_right = history.shape[1:] == (len(HISTORY),)
    if step < 0 or not columns_are_right or not np.array_equal(history[:, 0], range(len(history))):
        raise ValueError("its history is not that of a run")
    then = json.loads(str(arrays["settings"]))
    for name, value in json.loads(json.dumps(settings)).items():
        if name in then and then[name] != value:  # an older run lacks the newest settings
            raise ValueError(f"its {name} is {then[name]!r}, not {value!r}")
    epochs = [Epoch(int(epoch), *values) for epoch, *values in history.tolist()]
    return {name: arrays[name] for name in expected}, step, epochs
