"""What comes in and goes out: the command line, the files of MNIST, and those of a run in save/<tag>/.

Nothing here has to do with learning; mnist_resnet9.py reads well without it. Two promises: no file is trusted before
all of it has been checked, and a crash at any moment leaves each file as it was or as it should become.
"""

import argparse
import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import sys
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

HERE = Path(__file__).resolve().parent

class UserError(ValueError):
    """Something the user can put right. main() prints it as one line and ends with exit status 2."""


# ── Settings and command line ─────────────────────────────────────────────────────────────────────────────────────

def setting(default, help, between=None, choices=None):
    """A dataclass field: its default, what it does, and which values make sense."""
    return field(default=default, metadata={"help": help, "between": between, "choices": choices})

def check_settings(settings):
    """UserError if a field has a value of another type than its own, or one that makes no sense."""
    for f in fields(settings):
        value, between, choices = getattr(settings, f.name), f.metadata["between"], f.metadata["choices"]
        if type(value) is not f.type and (f.type, type(value)) != (float, int):
            raise UserError(f"{f.name} is {value!r}, but should be of type {f.type.__name__}")
        if choices and value not in choices:
            raise UserError(f"{f.name} is {value!r}, but should be one of {', '.join(choices)}")
        if between and not between[0] <= value <= between[1]:
            raise UserError(f"{f.name} is {value}, but should be from {between[0]} to {between[1]}")

def whole_numbers(text):
    """'4,16,32,64' → (4, 16, 32, 64)."""
    return tuple(int(part) for part in text.split(","))

class Parser(argparse.ArgumentParser):
    """argparse with a flag for each setting, and a UserError in place of printing its usage."""

    def read_settings(self, kind, arguments):
        """{name: value} of the flags that are given, those of the fields of `kind` among them: epochs_max is --epochs-max."""
        for f in fields(kind):
            read, choices = whole_numbers if f.type is tuple else f.type, f.metadata["choices"]
            default = ",".join(map(str, f.default)) if f.type is tuple else f.default
            self.add_argument(f"--{f.name.replace('_', '-')}", type=read, choices=choices, default=argparse.SUPPRESS,
                              metavar=None if choices else f.type.__name__.upper().replace("TUPLE", "K,K,K,K"),
                              help=f"{f.metadata['help']} (default: {default})")  # fmt: skip
        given = vars(self.parse_args(arguments))
        for name in given.keys() & {"data_dir", "save_dir"}:  # a path on the command line starts where the user is
            given[name] = str(Path(given[name]).absolute())
        return given

    def error(self, message):
        if "unrecognized arguments" in message:
            message += f"; the flags are {' '.join(a.option_strings[-1] for a in self._actions if a.option_strings)}"
        raise UserError(message)

# ── MNIST ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
MAX_IMAGES = 300_000  # nothing larger is read, whatever a file's header or a gzip stream claims

DOWNLOAD_SECONDS = 300  # then the next mirror is asked

class IdxFile(NamedTuple):
    """An idx file: its name, and SHA-256 of its decompressed bytes in MNIST and in the bundled sample."""

    name: str
    mnist: str
    sample: str

FILES = {
    "train_images": IdxFile("train-images-idx3-ubyte",
                            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                            "0393ef47a54d9409156f803f9dadf5db43946dfc63ea96181bda88036556bfd8"),
    "train_labels": IdxFile("train-labels-idx1-ubyte",
                            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                            "406364f750f5359332e38c570a6469f84c3c60c099416f6b656a2351fbbf5158"),
    "test_images": IdxFile("t10k-images-idx3-ubyte",
                           "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                           "c6b89a3fbb98245a30317cdbd6f149b356cce15753cb61c604857636990a65db"),
    "test_labels": IdxFile("t10k-labels-idx1-ubyte",
                           "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                           "2062e20a1fa5d7a7e4369877d332ecc151eeb3bb4a7feb6da696628cde98bd8c"),
}  # fmt: skip

@dataclass(frozen=True)
class Dataset:
    name: str  # what figures and logs call it
    hashes: dict  # file name → SHA-256 of the decompressed file
    notes: tuple  # what the user should know about where the data came from
    train_images: Any  # (60000, 28, 28) uint8
    train_labels: Any  # (60000,) uint8
    test_images: Any  # (10000, 28, 28) uint8
    test_labels: Any  # (10000,) uint8

def load_mnist(data_dir="data"):
    """The data set in data_dir (taken from the script's folder if relative), downloaded first where it is missing.

    Another data set of MNIST's format is fine in a folder of its own. With neither files nor network the sample in
    data/sample serves, and says so in .name and .notes. UserError names a file that is damaged or does not belong.
    """
    folder, notes = HERE / data_dir, ()
    try:
        arrays, hashes = read_folder(folder, complete=True)
    except OSError as error:  # no download worked
        folder = HERE / "data" / "sample"
        notes = (f"NOT MNIST: {error}.", f"Using the bundled sample: 4,000 images to train on, 1,000 to test, in {folder}.")
        arrays, hashes = read_folder(folder, complete=False)
    for part in ("train", "test"):
        images, labels = len(arrays[f"{part}_images"]), len(arrays[f"{part}_labels"])
        if images != labels:
            raise UserError(f"{folder} has {images} {part} images but {labels} labels; are files of two sets mixed?")
    name = name_dataset(folder, hashes)
    if not notes and name != "MNIST":
        notes = (f"The files in {folder} are not MNIST's (other hashes); this run is on {name!r}.",)
    return Dataset(name, hashes, notes, **arrays)

def read_folder(folder, complete):
    """{role: array}, {file name: SHA-256} of the four files, downloading those that an incomplete MNIST lacks."""
    paths = {role: find_idx(folder, file.name) for role, file in FILES.items()}
    read = {role: read_idx(path, images="images" in role) for role, path in paths.items() if path}
    lacking = [role for role in FILES if role not in read]
    if lacking and (not complete or any(read[role][1] != FILES[role].mnist for role in read)):
        raise UserError(f"{folder} lacks {', '.join(FILES[role].name for role in lacking)} beside the files that it has")
    for role in lacking:
        download(FILES[role], folder)
        read[role] = read_idx(find_idx(folder, FILES[role].name), images="images" in role)
    return {role: read[role][0] for role in FILES}, {FILES[role].name: read[role][1] for role in FILES}

def find_idx(folder, name):
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)

def read_idx(path, images):
    """(array of the idx file at path, SHA-256 of its decompressed bytes). UserError if it is anything else.

    The format: four bytes of magic number, the size of each dimension as a big-endian int32, then one byte a value.
    """
    again = "delete it and start again to download it anew"
    header = 16 if images else 8
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(header)
            magic, count, *size = np.frombuffer(head, ">i4").tolist() if len(head) == header else (0, 0)
            if magic != (0x803 if images else 0x801) or size not in ([28, 28], []):
                what = f"28×28 {'images' if images else 'pixels'}" if images else "labels"
                raise UserError(f"{path} is no idx file of {what} (it begins with {head[:16]!r}); {again}")
            if not 0 < count <= MAX_IMAGES:
                raise UserError(f"{path} claims to hold {count} entries, but should hold 1 to {MAX_IMAGES}; {again}")
            body = file.read(count * math.prod(size) + 1)  # one more than belongs there shows trailing bytes
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or no gzip file ({error}); {again}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    if len(body) != count * math.prod(size):
        problem = "is cut short" if len(body) < count * math.prod(size) else "has bytes after its end"
        raise UserError(f"{path} {problem}: its header announces {count} entries; {again}")
    array = np.frombuffer(body, np.uint8).reshape(count, *size)
    if not images and array.max() > 9:
        raise UserError(f"{path} has a label {array.max()}, but labels are the digits 0 to 9; {again}")
    return array, hashlib.sha256(head + body).hexdigest()

def name_dataset(folder, hashes):
    """MNIST, its sample, or the folder's name. UserError where only some files are MNIST's: the others are damaged."""
    for name, known in (("MNIST", "mnist"), ("MNIST sample", "sample")):
        wrong = [file.name for file in FILES.values() if hashes[file.name] != getattr(file, known)]
        if not wrong:
            return name
        if len(wrong) < len(FILES) or (name == "MNIST" and folder.resolve() == HERE / "data"):
            raise UserError(f"{folder}: {', '.join(wrong)} should have {name}'s contents but has not (SHA-256 differs); "
                            "delete and start again to download anew, or keep another data set in another --data-dir")  # fmt: skip
    return f"{folder.name} (not MNIST)" if "mnist" == folder.name.lower()[:5] else folder.name

class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses a redirect off HTTPS before anything is asked for there."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if not url.startswith("https:"):
            raise OSError(f"redirected to {url}")
        return super().redirect_request(request, answer, code, message, headers, url)

def download(file, folder):
    """Puts one of MNIST's files into folder, from the first mirror that sends the right bytes. OSError if none does."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.part{os.getpid()}.gz"
    for left in folder.glob(f"{file.name}.part*"):  # by a program that was killed; a younger one may be in use
        if time.time() - left.stat().st_mtime > 2 * len(MIRRORS) * DOWNLOAD_SECONDS:
            left.unlink(missing_ok=True)
    urllib.request.install_opener(urllib.request.build_opener(HttpsOnly))
    problems = []
    for mirror in MIRRORS:
        deadline = time.monotonic() + DOWNLOAD_SECONDS
        try:
            with urllib.request.urlopen(f"{mirror}{file.name}.gz", timeout=20) as answer, open(part, "wb") as target:
                size = int(answer.headers.get("Content-Length") or 0)
                with tqdm(total=size, unit="B", unit_scale=True, desc=file.name, leave=False, disable=None) as bar:
                    while (block := answer.read1(2**16)) and target.tell() < 2**25:  # read() would wait for all 2**16
                        bar.update(target.write(block))
                        if time.monotonic() > deadline:
                            raise OSError(f"not whole after {DOWNLOAD_SECONDS} seconds")
                target.flush()
                os.fsync(target.fileno())
            if read_idx(part, images="images" in file.name)[1] != file.mnist:
                raise OSError("its bytes are not MNIST's")
            part.replace(folder / f"{file.name}.gz")
            return
        except (OSError, ValueError, http.client.HTTPException) as error:  # UserError is a ValueError
            problems.append(f"{mirror}: {getattr(error, 'reason', error)}")
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"{file.name} is not in {folder}, and no download worked ({'; '.join(problems)})")


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

def write_file(path, data, previous=None):
    """Writes bytes to path so that a crash at any moment leaves the old file or the new one, whole.

    previous: the name that the old file keeps. A crash between the two renames leaves only that one: see RunFolder.restore.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()  # half a file on a full disk is in the way of everything else
        raise
    if fcntl:  # Windows has no way to flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # only now do the new names survive a power cut
        finally:
            os.close(folder)

def save_arrays(path, previous=None, **arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_file(path, stream.getvalue(), previous)


# ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────

HISTORY = ("epoch", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
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
    return {name: arrays[name] for name in like}, step, [[int(epoch), *row] for epoch, *row in history.tolist()]


# ── Metrics and log ───────────────────────────────────────────────────────────────────────────────────────────────

METRICS = (*HISTORY, "seconds", "images_per_second")
VALIDATION = ("validation_accuracy",)  # one more column where images were held out

def log_header(validation):
    valid = "  valid acc" if validation else ""
    return f"epoch  train loss  train acc  test loss  test acc{valid}  seconds  images/s  left"

def log_line(metrics, left):
    epoch, _, train_loss, train_accuracy, test_loss, test_accuracy, seconds, speed, *validation = metrics
    line = f"{epoch:5d}  {train_loss:10.5f}  {train_accuracy:9.2%}  {test_loss:9.5f}  {test_accuracy:8.2%}"
    line += "".join(f"  {accuracy:9.2%}" for accuracy in validation) + f"  {seconds:7.1f}"
    return f"{line}  {speed:8.0f}  {duration(left)}" if epoch else line

def duration(seconds):
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes // 60} h {minutes % 60:02d} min" if minutes > 59 else f"{minutes} min"

def write_metrics(path, rows):
    lines = [",".join((METRICS + VALIDATION)[: len(rows[0])])] + [",".join(f"{value:.8g}" for value in row) for row in rows]
    write_file(path, "".join(f"{line}\n" for line in lines).encode())

def read_metrics(path):
    """The rows of metrics.csv: METRICS, and VALIDATION if it is there, from epoch 0 on. UserError if the file is anything else."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        rows = [[float(value) for value in line.split(",")] for line in lines]
        columns = tuple(header.split(","))
        if columns not in (METRICS, METRICS + VALIDATION) or any(len(row) != len(columns) for row in rows):
            raise ValueError("other columns")
        return rows
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the metrics of a run ({error})") from None


# ── The folder of a run ───────────────────────────────────────────────────────────────────────────────────────────

class RunFolder:
    """save/<tag>/: locked, checked to hold nothing but this run, and written so that a crash loses no file.

    config describes the run, {"settings": …, "data": {"name", "sha256"}, …}; free names the settings that may differ
    when it is continued, defaults are what a run from before a setting came in had. UserError if this cannot be its folder.
    """

    def __init__(self, path, config, free, defaults, scripts):
        self.path, self.save_failed = path, False
        self.last, self.previous, self.best = (path / f"checkpoint_{w}.npz" for w in ("last", "previous", "best"))
        try:
            new = not (path / "config.json").exists()
            if new and path.exists() and {file.name for file in path.iterdir()} - {"code", "lock", "config.json.part"}:
                raise UserError(f"{path} holds something else than a run; choose another --tag")
            (path / "code").mkdir(parents=True, exist_ok=True)
            self.lock = lock_file(path / "lock")
            for part in path.rglob("*.part"):
                if not part.name.endswith(".png.part"):  # plot_figs.py may be writing that one
                    part.unlink()
            if not new:
                check_same_experiment(path, config, free, defaults)
            for script in scripts:
                if not (path / "code" / script.name).exists():
                    write_file(path / "code" / script.name, script.read_bytes())
            write_file(path / "config.json", json.dumps(config, indent=2).encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another --save-dir") from None

    def restore(self, load):
        """load(path) of the last checkpoint, or of the one before where the last is damaged; None if there is neither."""
        problem = None
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    state = load(path)
                except UserError as error:
                    problem = problem or error
                    continue
                if problem:
                    damaged = self.path / "checkpoint_damaged.npz"
                    os.replace(self.last, damaged)  # or the next save would make it the previous one
                    print(f"*** {problem}. Continuing from {path.name}, step {state.step:,}; "
                          f"the damaged file is now {damaged.name}.", file=sys.stderr)  # fmt: skip
                return state
        if problem:
            raise UserError(f"{problem}; there is no other checkpoint to continue from: choose another --tag")
        return None

    def restore_metrics(self, history, lost):
        """The rows of metrics.csv: from the checkpoint, and from the file (else: lost) what only that one holds.

        metrics.csv and log.txt are then as they were when the checkpoint was written: no epoch twice, none missing.
        """
        path, others = self.path / "metrics.csv", {}
        if path.exists():
            with contextlib.suppress(UserError):  # a damaged file is no loss: it is written anew
                others = {row[0]: row[len(HISTORY) :] for row in read_metrics(path)}
        rows = [[*row, *others.get(row[0], lost)] for row in history]
        if path.exists():
            self.write(path, lambda path: write_metrics(path, rows))
        self.write(self.path / "log.txt", lambda path: restore_log(path, rows))
        return rows

    def write(self, path, save):
        """Calls save(path), which writes that file. Returns whether it could; training goes on without it."""
        try:
            save(path)
            return True
        except OSError as error:
            self.save_failed = True
            tqdm.write(f"*** {path} was NOT written ({error.strerror or error}). Training goes on; the file from before "
                       "stays, and the next epoch tries again.", file=sys.stderr)  # fmt: skip
            return False

    def log(self, line):
        """Says a line on the terminal, above the progress bar if there is one, and in log.txt."""
        with contextlib.suppress(OSError):  # the terminal may be gone: the run goes on
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        self.write(self.path / "log.txt", lambda path: append_line(path, line))

    def close(self):
        self.lock.close()

def append_line(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")

def restore_log(path, rows):
    """Leaves one line in log.txt for each epoch of rows, and none for others; all that is no epoch's line stays."""
    missing, kept = {row[0]: log_line(row, 0) for row in rows}, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        epoch = int(line[:5]) if line[:5].strip().isdecimal() else None
        if epoch is None or (epoch in missing and line[:50] == missing[epoch][:50]):  # [:50]: without times
            kept.append(line)
            missing.pop(epoch, None)
    write_file(path, "".join(f"{line}\n" for line in [*kept, *missing.values()]).encode())

def lock_file(path):
    """The open file at path, locked until it is closed or its process ends. UserError if another program has it."""
    file = open(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB) if fcntl else msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else: a file system without locks
            raise UserError(f"{path.parent} is in use by another program; wait or choose another --tag") from None
    return file

def check_same_experiment(folder, config, free, defaults):
    try:
        old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        then, hashes = defaults | old["settings"], old["data"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error!r}); choose another --tag") from None
    now = config["settings"]
    differ = [f"{name} {then.get(name)!r}, not {now[name]!r}" for name in now if name not in free and then.get(name) != now[name]]
    if hashes != config["data"]["sha256"]:
        differ.append(f"data {old['data'].get('name')!r}, not {config['data']['name']!r}")
    if differ:
        raise UserError(f"{folder} holds another experiment: it has {'; '.join(differ)}. Choose another --tag")
