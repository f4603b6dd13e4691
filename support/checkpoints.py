"""Checkpoints: arrays with checksums. No file is trusted before all of it has been checked."""

import hashlib
import json
import zipfile
from typing import NamedTuple

import numpy as np

from support import UserError
from support.storage import save_arrays


class Epoch(NamedTuple):
    """What is known of an epoch: a row of a run's history, in checkpoints and metrics."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


HISTORY = Epoch._fields
CHECKPOINT_VERSION = 1

def checksums(arrays):
    """(len(arrays), 32) uint8: the SHA-256 of each array with its name, dtype and shape, in the order of the names."""
    texts = {name: f"{name} {a.dtype.str} {a.shape}".encode() for name, a in arrays.items()}
    rows = [hashlib.sha256(texts[name] + arrays[name].tobytes()).digest() for name in sorted(arrays)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)

def write_checkpoint(path, arrays, step, history, settings, previous=None):
    """arrays: {name: array} of all that the training changes; settings: a dict of all that defines the experiment."""
    arrays = arrays | {"step": np.int64(step), "version": np.int64(CHECKPOINT_VERSION),
                       "history": np.array(history, float).reshape(-1, len(HISTORY)),
                       "settings": np.array(json.dumps(settings))}  # fmt: skip
    save_arrays(path, previous, **arrays, sha256=checksums(arrays))

def read_checkpoint(path, like, settings):
    """What write_checkpoint wrote: {name: array}, step, history. UserError if anything is wrong with the file.

    like: the arrays there should be, as examples; settings: those that must be the same, beyond what shapes show.
    """
    try:
        return check_checkpoint(path, like, settings)
    except Exception as error:  # zip, zlib and NumPy raise many kinds on a damaged file
        raise UserError(f"{path} is damaged or of another network ({str(error) or repr(error)})") from None

def check_checkpoint(path, like, settings):
    with zipfile.ZipFile(path) as members:  # a compressed or overlapping member could fill the memory
        size, bound = sum(member.file_size for member in members.infolist()), 2**26 + 2 * sum(a.nbytes for a in like.values())
        if size > bound or any(member.compress_type for member in members.infolist()):
            raise ValueError("it is larger than a checkpoint")
    with np.load(path, allow_pickle=False) as file:
        if "version" not in file or file["version"] != CHECKPOINT_VERSION:
            raise ValueError(f"it has not version {CHECKPOINT_VERSION}")
        arrays = {name: file[name] for name in file.files}
    sums = arrays.pop("sha256", None)
    if "moments" not in arrays:  # a finished run, made small to be passed on: see save/README.md
        like = {name: a for name, a in like.items() if name != "moments" and not name.startswith("ema.")}
    if arrays.keys() != like.keys() | {"step", "history", "settings", "version"}:
        raise ValueError(f"it has other arrays: {', '.join(sorted(arrays.keys() ^ like.keys()))[:200]}")
    if not np.array_equal(sums, checksums(arrays)):
        raise ValueError("its checksums are not those of its arrays")
    for name, a in like.items():
        if (arrays[name].shape, arrays[name].dtype) != (a.shape, a.dtype):
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}, not {a.dtype} {a.shape}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not finite")
    history, step, then = arrays["history"], int(arrays["step"]), json.loads(str(arrays["settings"]))
    if step < 0 or history.shape[1:] != (len(HISTORY),) or not np.array_equal(history[:, 0], range(len(history))):
        raise ValueError("its history is not that of a run")
    for name, value in settings.items():
        if then.get(name) != value:
            raise ValueError(f"its {name} is {then.get(name)!r}, not {value!r}")
    return {name: arrays[name] for name in like}, step, [Epoch(int(epoch), *row) for epoch, *row in history.tolist()]
