"""MNIST in the forms that people have it in: found, downloaded where missing, verified, named.

What a file holds is decided by its bytes, and in the end every form is the same four idx files.
"""

import gzip
import hashlib
import http.client
import io
import itertools
import os
import re
import time
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import ROOT, UserError
from support.progress import place_in_cell, progress_bar
from support.storage import reason, refuse_pointer, write_file

ROLES = ("train_images", "train_labels", "test_images", "test_labels")

# MNIST's files in this order, and the SHA-256 of their decompressed bytes.
MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# The files of the sample in data/sample.
SAMPLE = {
    "train-images-idx3-ubyte": "0393ef47a54d9409156f803f9dadf5db43946dfc63ea96181bda88036556bfd8",
    "train-labels-idx1-ubyte": "406364f750f5359332e38c570a6469f84c3c60c099416f6b656a2351fbbf5158",
    "t10k-images-idx3-ubyte": "c6b89a3fbb98245a30317cdbd6f149b356cce15753cb61c604857636990a65db",
    "t10k-labels-idx1-ubyte": "2062e20a1fa5d7a7e4369877d332ecc151eeb3bb4a7feb6da696628cde98bd8c",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
DOWNLOAD_SECONDS = 300  # then the next mirror is asked
MAX_DOWNLOAD = 2**26  # bytes; the largest file has 47 million if a server unpacks it

# The forms that a data set comes in, by their files' names in plain(): four idx files, or one for
# training and one for the test, or one with all.
FORMS = {
    "MNIST": r"(train|t10k)-(images-idx3|labels-idx1)-ubyte",
    "QMNIST": r"qmnist-(train|test)-(images-idx3-ubyte|labels-idx2-int)",
    "EMNIST digits": r"emnist-digits-(train|test)-(images-idx3|labels-idx1)-ubyte",
    "Keras's MNIST": r"mnist-npz",
    "Kaggle's MNIST": r"mnist-(train|test)-csv",
}
NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")  # in the order of ROLES

# What the network takes, as the errors say it.
SHAPE = (28, 28)
TAKES = f"{SHAPE[0]}×{SHAPE[1]} images with pixels from 0 to 255, or 0 to 1, and labels 0 to 9"
IDX = f"an idx file of {TAKES}"
NPZ = f"an npz file with the arrays {', '.join(NPZ_NAMES)}: {TAKES}"
CSV = f"csv with the label first in each line, or named in a line of headings: {TAKES}"

# No file can fill the memory: no more is read of one, packed or unpacked.
MAX_BYTES = 2**29  # EMNIST's digits as csv have some 440 million


class DataFiles(NamedTuple):
    """A data set as it was found: verified, and not yet made into arrays."""

    name: str  # what figures and logs call it
    hashes: dict  # MNIST's file name → SHA-256 of the idx file
    notes: tuple  # what the user should know about where the data came from
    contents: dict  # role → bytes of the idx file

    def __repr__(self):  # the bytes would be millions of characters
        sizes = [f"{role}: {len(data):,} bytes" for role, data in self.contents.items()]
        return f"{self.name}, {', '.join(sizes)}"


class NoDownload(UserError):
    """MNIST is not there, and no mirror sent it."""


class Damaged(UserError):
    """A file that is not what its name says: cut short, say, or an error page of a server."""


class Unfit(ValueError):
    """A whole file of something other than digits. It may be what somebody wants to keep."""


def find_mnist(data_dir):
    """The data set in data_dir, in any of FORMS; MNIST is downloaded into an empty folder.

    A relative data_dir starts at the script's folder. Another data set is fine in a folder of its
    own. Where the default folder, data, is empty and there is no network, the sample in data/sample
    serves, which .name and .notes say. UserError says in one line what else is wrong.
    """
    folder, sample = ROOT / os.path.expanduser(data_dir), ROOT / "data" / "sample"
    found = find_files(folder)
    try:
        return read_set(folder, found)
    except NoDownload as error:
        if not sample.is_dir():
            raise
        if found.paths or not is_own(folder, "data"):
            raise UserError(f"{error}; --data-dir {sample} has a small part of MNIST") from None
        notes = (
            f"NOT MNIST: {error}.",
            f"Using the bundled sample: 4,000 images to train on, 1,000 to test, in {sample}.",
        )
    return read_set(sample, find_files(sample))._replace(notes=notes)


def read_set(folder, found):
    """The DataFiles of what was found in the folder. What MNIST lacks there is downloaded."""
    notes = []
    if found.form != "MNIST" or found.place != folder:
        notes.append(f"Read {found.form} from {found.place}.")
    contents = read_files(folder, found, notes)
    hashes = {file: sha256(contents[role]) for role, file in zip(ROLES, MNIST)}
    name = name_of(folder, hashes)
    others = [file for file in MNIST if hashes[file] != MNIST[file]]
    if others:
        notes.append(
            f"{', '.join(others)} in {folder}: not MNIST's (other hashes); this run is on {name!r}."
        )
    return DataFiles(name, hashes, tuple(dict.fromkeys(notes)), contents)


def name_of(folder, hashes):
    """MNIST, its sample, or the folder's name.

    UserError where the program's own folders hold anything other than they should. In any other
    folder a set may share files with MNIST: its labels, with noise on the images, say."""
    if hashes == MNIST:
        return "MNIST"
    if hashes == SAMPLE:
        return "MNIST sample"
    for own, right in (("data", MNIST), ("data/sample", SAMPLE)):
        if is_own(folder, own):
            wrong = ", ".join(file for file in right if hashes[file] != right[file])
            raise UserError(
                f"{folder}: {wrong} should be as in data/README.md but is not (SHA-256 differs); "
                "delete and start again to download MNIST anew, or keep another data set in "
                "another --data-dir"
            )
    name = Path(os.path.abspath(folder)).name or "data"
    return f"{name} (not MNIST)" if name.lower().startswith("mnist") else name


def is_own(folder, name):
    """Whether it is the program's own folder of this name, data or data/sample, by any path."""
    return os.path.realpath(folder) == os.path.realpath(ROOT / name)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def hashes_of(arrays):
    """MNIST's file name → SHA-256 of the idx file that an array makes; arrays: {role: array}."""
    return {file: sha256(to_idx(arrays[role])) for role, file in zip(ROLES, MNIST)}


def note_on_pixels(images, mean, deviation):
    """(a note,) where these are not the images' own, with pixels scaled to 0…1; else ()."""
    some = images[:: 1 + len(images) // 5000] / 255
    own_mean, own_deviation = some.mean(), some.std()
    if max(abs(own_mean - mean), abs(own_deviation - deviation)) < 0.01:
        return ()
    return (
        f"The network's input is normalised by PIXEL_MEAN {mean} and PIXEL_STD {deviation} of "
        f"mnist_resnet9.py; in these images they are {own_mean:.3f} and {own_deviation:.3f}.",
    )


# ── Finding the files ─────────────────────────────────────────────────────────────────────────────


class Found(NamedTuple):
    form: str
    place: Path  # the folder with the files
    paths: dict  # role → path of the file that has it; empty where nothing is there


def find_files(folder):
    """The first of FORMS that is whole in the folder, or else the one with most files.

    UserError if there is no folder, or there are only other files in it."""
    candidates = []
    for place in (folder, folder / "MNIST" / "raw", folder / "raw"):  # torchvision's
        if place != folder and not place.is_dir():
            continue
        files = [name for name, is_file in names_in(place) if is_file]
        # The usual names, which are the shortest and in lower case, come last and stay.
        files.sort(key=lambda name: (len(name), name.swapcase()), reverse=True)
        for form, pattern in FORMS.items():
            there = [name for name in files if re.fullmatch(pattern, plain(name))]
            paths = {role: place / name for name in there for role in roles_of(plain(name))}
            candidates.append(Found(form, place, paths))
    found = max(candidates, key=lambda found: len(found.paths))
    if found.paths:
        return found
    # Other sets, and the sample, may have their folders in the default one.
    own = is_own(folder, "data")
    ignored = r"\.|readme|licen[cs]e|.*\.part$|__macosx$|thumbs\.db$|desktop\.ini$"
    others = sorted(
        "".join(c if c.isprintable() else "?" for c in name)
        for name, is_file in names_in(folder)
        if (is_file or not own) and not re.match(ignored, name.lower())
    )
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        raise UserError(
            f"{folder} holds {', '.join(others[:8])}{more}; it should hold MNIST's four files, "
            "mnist.npz, or mnist_train.csv and mnist_test.csv, unpacked from any zip, or be empty, "
            f"and MNIST is downloaded into it: {TAKES} (see data/README.md)"
        )
    return found


def plain(name):
    """A file's name without what browsers and Kaggle do to it.

    Train-Images.idx3-ubyte (1).gz → train-images-idx3-ubyte"""
    name = re.sub(r"\s*\(\d+\)", "", name.lower()).removesuffix(".gz")
    return name.replace(".", "-").replace("_", "-")


def roles_of(name):
    """The roles of what a file of this plain name holds."""
    part = "train" if "train" in name else "test" if re.search("test|t10k", name) else ""
    kind = "images" if "images" in name else "labels" if "labels" in name else ""
    return [role for role in ROLES if role.startswith(part) and role.endswith(kind)]


def names_in(folder):
    """[(name, whether it is a file)] of all in the folder.

    Where the default folder is yet to be made, there are none."""
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_file()) for entry in entries]
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        if is_own(folder, "data") and not os.path.lexists(folder):
            return []
        where = getattr(error, "filename", None) or folder
        raise UserError(
            f"{where} cannot be read ({reason(error)}); --data-dir should be a folder with a data "
            "set, or an empty one to download MNIST into"
        ) from None


# ── Reading them ──────────────────────────────────────────────────────────────────────────────────


def read_files(folder, found, notes):
    """{role: bytes of an idx file of uint8}: 28×28 images and digits.

    What MNIST lacks is downloaded."""
    contents = {}
    try:
        for path in dict.fromkeys(found.paths.values()):
            contents.update(read_file(path, notes))
    except Damaged as error:
        if is_own(folder, "data"):
            raise UserError(f"{error}; delete it and start again to download it anew") from None
        raise
    lacking = {role: file for role, file in zip(ROLES, MNIST) if role not in contents}
    foreign = any(sha256(contents[r]) != MNIST[f] for r, f in zip(ROLES, MNIST) if r in contents)
    if lacking and (found.form != "MNIST" or foreign or is_own(folder, "data/sample")):
        raise UserError(
            f"{found.place} lacks the {' and '.join(lacking).replace('_', ' ')} of {found.form}; "
            "only MNIST's own files are downloaded"
        )
    for role, file in lacking.items():
        contents[role] = download(file, found.place, notes)
    for part in ("train", "test"):
        images, labels = count(contents[f"{part}_images"]), count(contents[f"{part}_labels"])
        if images != labels:
            raise UserError(
                f"{found.place} has {images} {part} images but {labels} labels; "
                "are files of two sets mixed?"
            )
    return contents


def read_file(path, notes):
    """{role: bytes of an idx file of uint8} of what the file at path holds.

    Those of an idx file are its own, if they can be taken as they are."""
    name = plain(path.name)
    read, right = read_idx, IDX
    if name.endswith("npz"):
        read, right = read_npz, NPZ
    if name.endswith("csv"):
        read, right = read_csv, CSV
    contents = {}
    try:
        with open(path, "rb") as file:
            content = read_all(file)
        refuse_pointer(path, content)
        for role, array in zip(roles_of(name), read(content)):
            if "labels" in role:
                a = labels_of(array)
            else:
                a = images_of(array)
                if array.max() <= 1:
                    notes.append(f"The pixels of {path} are 0 to 1; they were multiplied by 255.")
                if name.startswith("emnist"):
                    a = a.transpose(0, 2, 1)
                    notes.append("EMNIST stores its images transposed; they were turned.")
            contents[role] = content if read is read_idx and a is array else to_idx(a)
        return contents
    except (UserError, MemoryError):
        raise
    except Unfit as error:
        raise UserError(f"{path} {error}; it should be {right}") from None
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds on a damaged file
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{path} cannot be read ({reason(error)})") from None
        raise Damaged(f"{path} is damaged ({reason(error)}); it should be {right}") from None


def read_all(file):
    """What is in an open file, unpacked if it is packed. ValueError if it is more than MAX_BYTES.

    Its first bytes say whether it is packed and not its name: browsers unpack a .gz and leave the
    name, or take the name away and leave it packed."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if packed:
        file = gzip.GzipFile(fileobj=file)
    blocks = iter(lambda: file.read(2**20), b"")
    content = b"".join(itertools.islice(blocks, MAX_BYTES >> 20))
    if file.read(1):
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(content):
    """[the array] in the bytes of an idx file: mnist_resnet9.read_idx() says what the format is."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError(f"it begins with {content[:16]!r}")
    kind, start = IDX_TYPES[content[2]], 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    return [np.frombuffer(content, kind, offset=start).reshape(shape)]


def to_idx(array):
    """The bytes of an idx file of uint8 that holds the array, for data that comes in another form.

    mnist_resnet9.read_idx() reads it."""
    return np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes() + array.tobytes()


def count(content):
    """How many images or labels an idx file holds: the length of its first axis."""
    return int.from_bytes(content[4:8], "big")


def read_npz(content):
    """The four arrays of Keras's mnist.npz, in the order of ROLES. A pickle is never loaded."""
    arrays = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in NPZ_NAMES:
            with archive.open(f"{name}.npy") as member:
                array = io.BytesIO(read_all(member))
            arrays.append(np.lib.format.read_array(array, allow_pickle=False))
    return arrays


def read_csv(content):
    """Images and labels of a csv file: in each line a label and the pixels, row by row."""
    # Numbers may be quoted. Excel sets UTF-8's mark at the start, which utf-8-sig leaves out.
    file = io.BytesIO(content.translate(None, b"\"'"))
    text = io.TextIOWrapper(file, "utf-8-sig", "replace")
    names = [name.strip() for name in text.readline().split(",")]
    columns = 1 + SHAPE[0] * SHAPE[1]
    if len(names) != columns:
        raise ValueError(f"columns in its first line: {len(names)}, not {columns}")
    # Headings differ, as the pixels of an image do not, and number the pixels but not the label.
    unnumbered = [i for i, name in enumerate(names) if re.fullmatch(r"\D+", name)]
    if not unnumbered or len(set(names)) < columns:
        unnumbered = []
        text.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no data")
        rows = np.loadtxt(text, np.float32, comments=None, delimiter=",", ndmin=2)
    if not rows.size:
        raise ValueError("it has no images")
    label = unnumbered[0] if len(unnumbered) == 1 else 0
    first, last = set(rows[:, 0].tolist()), set(rows[:, -1].tolist())
    if len(unnumbered) != 1 and len(first) < len(last) and last <= set(range(10)):
        raise Unfit("seems to have its labels in the last column")
    return np.delete(rows, label, axis=1).reshape(-1, *SHAPE), rows[:, label]


def images_of(array):
    """Images in any kind of number as uint8. Pixels from 0 to 1 are multiplied by 255."""
    if array.dtype.kind not in "buif" or array.shape[1:] != SHAPE or not len(array):
        raise Unfit(f"holds {array.dtype} of {'×'.join(map(str, array.shape))}")
    low, high = float(array.min()), float(array.max())
    if not 0 <= low < high <= 255:
        raise Unfit(f"has pixels from {low:g} to {high:g}")
    if high <= 1:
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    whole = array.astype(np.uint8, copy=False)
    if not np.array_equal(whole, array):
        raise Unfit(f"has pixels from {low:g} to {high:g} that are not whole numbers")
    return whole


def labels_of(array):
    """Digits in any kind of number as uint8. QMNIST has them in the first of eight columns."""
    digits = array[:, 0] if array.shape[1:] == (8,) else array
    if digits.dtype.kind not in "uif" or digits.ndim != 1 or not len(digits):
        raise Unfit(f"holds {array.dtype} of {'×'.join(map(str, array.shape))} for labels")
    others = digits[~np.isin(digits, range(10))]
    if len(others):
        raise Unfit(f"has a label {others[0]:g}")
    if (digits == digits[0]).all():
        raise Unfit(f"has no label but {digits[0]:g}")
    return digits.astype(np.uint8, copy=False)


# ── Downloading ───────────────────────────────────────────────────────────────────────────────────


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses a redirect off HTTPS before anything is asked for there."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if not url.startswith("https:"):
            raise OSError(f"redirected to {url}")
        return super().redirect_request(request, answer, code, message, headers, url)


def open_url(url, timeout):
    return urllib.request.build_opener(HttpsOnly).open(url, timeout=timeout)


def download(file, folder, notes):
    """The bytes of one of MNIST's files, from the first mirror that sends the right ones.

    They are kept in the folder, if it can be written to. NoDownload if no mirror sends them."""
    problems = []
    for mirror in MIRRORS:
        try:
            sent = fetch(f"{mirror}{file}.gz")
            content = read_all(io.BytesIO(sent))
            if sha256(content) != MNIST[file]:
                raise ValueError("its bytes are not MNIST's")
        except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException) as error:
            problems.append(f"{mirror}: {getattr(error, 'reason', error)}")
            continue
        path = folder / (file if sent == content else f"{file}.gz")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(path, sent)
        except OSError as error:
            if not path.exists():  # else another program has just put it there
                notes.append(f"{path} cannot be kept for the next time ({reason(error)}).")
        return content
    reasons = "; ".join(problems)
    raise NoDownload(f"{file} is not in {folder}, and no download worked ({reasons})")


def fetch(url):
    """The bytes at the URL. OSError where they are too many, or come too slowly."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    with open_url(url, timeout=20) as answer:
        name, size = url.rpartition("/")[2], int(answer.headers.get("Content-Length") or 0)
        place = place_in_cell()
        with progress_bar(None, name, place, total=size, unit="B", unit_scale=True) as bar:
            # read1() takes what is there; read() would wait for all of the 2**16 bytes.
            while block := answer.read1(2**16):
                content += block
                bar.update(len(block))
                if len(content) > MAX_DOWNLOAD:
                    raise OSError("it sends too much")
                if time.monotonic() > deadline:
                    raise OSError(f"not whole after {DOWNLOAD_SECONDS} seconds")
    return bytes(content)
