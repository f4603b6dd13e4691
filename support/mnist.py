"""MNIST in every form that people have it in: found, downloaded where missing, verified, named.

FORMS is the one place that knows the names of files. What the files hold is decided by their bytes,
and in the end every form is the same four idx files.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import itertools
import math
import os
import re
import stat
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support import ROOT, UserError

try:
    import lzma
except ImportError:  # some Pythons are built without it, and only .xz files need it
    lzma = None

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
DOWNLOAD_SECONDS = 300  # then the next mirror is asked

# No file can fill the memory: nothing larger is read, whatever a header or a packed stream claims.
MAX_IMAGES = 500_000  # the largest set known here, all digits of NIST, has 402,953
MAX_LINE = 2**14  # bytes of a line of csv; 785 numbers with commas are 3,140 at most
MAX_NPZ = 2**26  # bytes of mnist.npz, which is 11 MB packed and 55 MB unpacked
MAX_NAMES = 100_000  # names in a folder

TAKES = "this network takes 28×28 images of uint8 with labels 0 to 9"


class IdxFile(NamedTuple):
    """An idx file's name, and the SHA-256 of its decompressed bytes in MNIST and in the sample."""

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


def turn_images(arrays):
    """EMNIST's images lie on their side in the file: rows and columns are swapped."""
    turned = {role: a.transpose(0, 2, 1) for role, a in arrays.items() if "images" in role}
    return arrays | turned


def leave_out_test_images(arrays):
    """xnist without the images that QMNIST tests with.

    xnist has every digit of NIST, those too. Column 5 of both files of labels is the digit's number
    in NIST, by which they are found."""
    train, test = arrays["train_labels"], arrays["test_labels"]
    if train.ndim == 1 or test.ndim == 1:
        raise UserError("xnist's and QMNIST's labels should have eight columns, not one")
    keep = ~np.isin(train[:, 5], test[:, 5])
    if not keep.any():
        raise UserError("all images of xnist are test images of QMNIST; none is left to train on")
    return arrays | {role: arrays[role][keep] for role in ("train_images", "train_labels")}


class Form(NamedTuple):
    """A form that a data set comes in.

    names: four files for train_images, train_labels, test_images and test_labels; or two, for
    training and test; or one with all. The end of a name says how to read it: .npz, .csv, or idx.
    """

    what: str  # as messages call it
    names: tuple
    is_mnist: bool = True  # whether this is what the files should hold
    prepare: Callable = lambda arrays: arrays  # what is done to the arrays after reading
    remark: str = ""  # and how the log says that


QMNIST_TEST = ("qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int")

# Of those that are whole in a folder, the first is taken.
FORMS = (
    Form("MNIST", tuple(file.name for file in FILES.values())),
    Form(
        "xnist with QMNIST's test set",
        ("xnist-images-idx3-ubyte", "xnist-labels-idx2-int", *QMNIST_TEST),
        False,
        leave_out_test_images,
        "The test images, which xnist holds too, were left out of the training images.",
    ),
    Form(
        "QMNIST",
        ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int", *QMNIST_TEST),
        False,
    ),
    Form(
        "EMNIST digits",
        (
            "emnist-digits-train-images-idx3-ubyte",
            "emnist-digits-train-labels-idx1-ubyte",
            "emnist-digits-test-images-idx3-ubyte",
            "emnist-digits-test-labels-idx1-ubyte",
        ),
        False,
        turn_images,
        "EMNIST stores its images transposed; they were turned.",
    ),
    Form("Keras's MNIST", ("mnist.npz",)),
    Form("Kaggle's MNIST", ("mnist_train.csv", "mnist_test.csv")),
)
NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")  # in the order of FILES
CSV = "csv with the label and 784 pixels, whole numbers from 0 to 255, in each line"

# Where below the folder the files may lie too: torchvision's folders, and that of EMNIST's zip.
SUBFOLDERS = ("MNIST/raw", "raw", "QMNIST/raw", "EMNIST/raw", "gzip")


class DataFiles(NamedTuple):
    """A data set as it was found: verified, and not yet made into arrays."""

    name: str  # what figures and logs call it
    hashes: dict  # MNIST's file name → SHA-256 of the idx file
    notes: tuple  # what the user should know about where the data came from
    contents: dict  # train_images, train_labels, test_images, test_labels → bytes of the idx file


class NoDownload(UserError):
    """MNIST is not there, and no mirror sent it."""


class Unfit(UserError):
    """A file that is damaged, or is something else than its name says."""


def find_mnist(data_dir):
    """The data set in data_dir, in any of FORMS; MNIST is downloaded into an empty folder.

    A relative data_dir starts at the script's folder. Another data set is fine in a folder of its
    own. Where the default folder, data, is empty and there is no network, the sample in data/sample
    serves, which .name and .notes say. UserError says in one line what else is wrong.
    """
    folder = ROOT / os.path.expanduser(data_dir)
    notes = ()
    found = find_files(folder)
    try:
        arrays = read_files(folder, found)
    except NoDownload as error:
        sample = ROOT / "data" / "sample"
        if kind_of(sample) != "folder":
            raise
        if not is_own(folder, "data") or names_of_interest(folder):
            raise UserError(f"{error}; --data-dir {sample} has a small part of MNIST") from None
        folder = sample
        notes = (
            f"NOT MNIST: {error}.",
            f"Using the bundled sample: 4,000 images to train on, 1,000 to test, in {folder}.",
        )
        found = find_files(folder)
        arrays = read_files(folder, found)
    contents = {role: to_idx(arrays.pop(role)) for role in FILES}  # pop: no set is kept twice
    hashes = {FILES[role].name: sha256(content) for role, content in contents.items()}
    name = name_dataset(folder, found.form, hashes)
    if not notes:
        notes = (*origin(folder, found), *strangers(folder, hashes, name))
    return DataFiles(name, hashes, notes, contents)


def is_own(folder, name):
    """Whether it is the program's own folder of this name, data or data/sample, by any path."""
    return os.path.realpath(folder) == os.path.realpath(ROOT / name)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def to_idx(array):
    """The bytes of the idx file that holds an array of uint8; mnist_resnet9.read_idx() reads it."""
    return np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes() + array.tobytes()


# ── What the log and the figures say ──────────────────────────────────────────────────────────────


def name_dataset(folder, form, hashes):
    """MNIST, its sample, or the folder's name; the form's in the default folder.

    UserError where the program's own folders hold anything else than they should. In any other
    folder a set may share files with MNIST: its labels, with noise on the images, say."""
    again = (
        "delete and start again to download anew, or keep another data set in another --data-dir"
    )
    for name, home, advice in (
        ("MNIST", "data", again),
        ("MNIST sample", "data/sample", "take them from the repository again"),
    ):
        files = {f.name: f.mnist if name == "MNIST" else f.sample for f in FILES.values()}
        wrong = [file for file in files if hashes[file] != files[file]]
        if not wrong:
            return name
        if form.is_mnist and is_own(folder, home):
            raise UserError(
                f"{folder}: {', '.join(wrong)} should have {name}'s contents but has not "
                f"(SHA-256 differs); {advice}"
            )
    if is_own(folder, "data"):
        return form.what
    name = Path(os.path.abspath(folder)).name or "data"
    return f"{name} (not MNIST)" if name.lower().startswith("mnist") else name


def strangers(folder, hashes, name):
    """A note about the files that are not MNIST's, where there are any."""
    others = [file.name for file in FILES.values() if hashes[file.name] != file.mnist]
    if not others:
        return ()
    which = "The files" if len(others) == len(FILES) else f"Of the files, {', '.join(others)}"
    return (f"{which} in {folder} are not MNIST's (other hashes); this run is on {name!r}.",)


def origin(folder, found):
    """A note about the files that were read, where they are not simply MNIST's four."""
    usual = all(path in (folder / n, folder / f"{n}.gz") for n, path in found.paths.items())
    if found.form is FORMS[0] and usual:
        return ()
    names = ", ".join(printable(path.relative_to(folder)) for path in found.paths.values())
    return (f"Read {found.form.what} from {names} in {folder}. {found.form.remark}".strip(),)


def printable(name):
    """A file's name without what a terminal or a log could not show, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in str(name))[:100]


# ── Finding the files ─────────────────────────────────────────────────────────────────────────────


class Found(NamedTuple):
    form: Form
    place: Path  # the folder with the files
    paths: dict  # those of form.names that are there → path


def find_files(folder):
    """The first form that is whole, or else begun, in the folder; MNIST where the folder is empty.

    UserError if there is no folder, or other files in it."""
    begun = []
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        if place != folder and kind_of(place) != "folder":
            continue
        spellings = spellings_in(place)
        for form in FORMS:
            paths = {name: find_file(place, spellings, name) for name in form.names}
            found = Found(form, place, {name: path for name, path in paths.items() if path})
            if len(found.paths) == len(form.names):
                return found
            if found.paths:
                begun.append(found)
    if begun:
        # Where two have as many files, the later one: MNIST's names are the least telling.
        return max(reversed(begun), key=lambda found: len(found.paths))
    others = names_of_interest(folder)
    if is_own(folder, "data"):  # other sets may have their folders here
        others = [name for name in others if kind_of(folder / name) != "folder"]
    if others:
        raise UserError(f"{folder} holds {listing(others)}; {what_would_be_right()}")
    return Found(FORMS[0], folder, {})


def what_would_be_right():
    forms = (f"{f.what} ({f.names[0]}{', …' if f.names[1:] else ''})" for f in FORMS)
    return (
        f"it should hold {', '.join(forms)}, or nothing, and MNIST is downloaded; {TAKES} "
        "(see data/README.md)"
    )


def listing(names):
    """The first few of these names, and how many more there are."""
    archives = any(name.lower().endswith((".zip", ".tar", ".tgz", ".rar", ".7z")) for name in names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    unpack = " (an archive must be unpacked first)" if archives else ""
    return ", ".join(map(printable, names[:8])) + more + unpack


def find_file(place, spellings, wanted, deeper=True):
    """The path of the file that goes by the name `wanted`, or of one in a folder of that name.

    spellings: of the names in the folder `place`. The usual ones come first. None if there is no
    such file."""
    same = spellings.get(plain(wanted), [])
    for name in sorted(same, key=lambda name: (name != wanted, name != f"{wanted}.gz", name)):
        path = place / name
        kind = kind_of(path)
        if kind == "file":
            return path
        if kind != "folder":
            raise UserError(f"{path} is no file but {kind or 'a link to nothing'}")
        if deeper and (inner := find_file(path, spellings_in(path), wanted, deeper=False)):
            return inner
    return None


def spellings_in(folder):
    """{plain name: the names in the folder that come down to it}."""
    spellings = {}
    for name in list_names(folder):
        spellings.setdefault(plain(name), []).append(name)
    return spellings


def plain(name):
    """A file's name without what browsers, Kaggle and editors do to it.

    Train-Images.idx3-ubyte (1).gz → train-images-idx3-ubyte"""
    name = re.sub(r"\s*\(\d+\)", "", name.lower())
    return re.sub(r"(\.(gz|xz|txt))*$", "", name).replace(".", "-").replace("_", "-")


def names_of_interest(folder):
    """What is in the folder, without what every folder may have."""
    ignored = r"\.|readme|licen[cs]e|.*\.part\d+|__macosx$|thumbs\.db$|desktop\.ini$"
    names = [name for name in list_names(folder) if not re.match(ignored, name.lower())]
    return [name for name in names if not (name == "sample" and is_own(folder, "data"))]


def list_names(folder):
    """The sorted names in the folder; none where the default folder is yet to be made."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, MAX_NAMES))
    except FileNotFoundError:
        if is_own(folder, "data") and not folder.is_symlink():
            return []
        raise UserError(
            f"there is no folder {folder}; --data-dir should be a folder with a data set, "
            "or an empty one to download MNIST into"
        ) from None
    except NotADirectoryError:
        raise UserError(f"{folder} is no folder; --data-dir takes the folder of a file") from None
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UserError(f"{folder} cannot be read ({reason(error)})") from None


def kind_of(path):
    """What there is at path: file, folder, something else; None where there is nothing."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from None
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "a pipe or a device"


def reason(error):
    """An error's text in one line of bounded length."""
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    return " ".join(text.split())[:200]


# ── Reading them ──────────────────────────────────────────────────────────────────────────────────


def read_files(folder, found):
    """{role: array of uint8}: 28×28 images and digits. What MNIST lacks is downloaded first."""
    form, place, paths = found
    arrays = {}
    share = len(FILES) // len(form.names)  # how many arrays a file has
    try:
        for i, name in enumerate(form.names):
            roles = list(FILES)[i * share : (i + 1) * share]
            if name in paths:
                arrays.update(zip(roles, read_file(paths[name], name)))
    except Unfit as error:
        if form.is_mnist and is_own(folder, "data"):
            raise UserError(f"{error}; delete it and start again to download it anew") from None
        raise
    lacking = [name for name in form.names if name not in paths]
    if lacking:
        refuse_to_complete(folder, found, arrays, lacking)
    for role in FILES:
        if role not in arrays:
            download(FILES[role], place)
            path = place / f"{FILES[role].name}.gz"
            arrays[role] = read_verified(path, images="images" in role)
    for part in ("train", "test"):
        images, labels = len(arrays[f"{part}_images"]), len(arrays[f"{part}_labels"])
        if images != labels:
            raise UserError(
                f"{place} has {images} {part} images but {labels} labels; "
                "are files of two sets mixed?"
            )
    arrays = form.prepare(arrays)
    return {role: digits(arrays[role]) if "labels" in role else arrays[role] for role in FILES}


def refuse_to_complete(folder, found, arrays, lacking):
    """UserError unless the files that are there are MNIST's: only its other files can be had."""
    foreign = [role for role, a in arrays.items() if sha256(to_idx(a)) != FILES[role].mnist]
    if found.form is not FORMS[0] or foreign or is_own(folder, "data/sample"):
        raise UserError(
            f"{found.place} lacks {', '.join(lacking)} beside the files that it has; "
            "only MNIST's own files are downloaded"
        )


@contextlib.contextmanager
def one_line_errors(path, right):
    """Makes a UserError of all that reading the file at path can raise; right: what it should be.

    zipfile, zlib, lzma and NumPy raise many kinds on a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{path} cannot be read ({reason(error)})") from None
        raise Unfit(f"{path} is damaged ({reason(error)}); it should be {right}") from None


def read_file(path, name):
    """The arrays in the file at path, of the kind that `name` in the table says."""
    if name.endswith(".npz"):
        return read_npz(path)
    if name.endswith(".csv"):
        return read_csv(path)
    return [read_verified(path, images="images" in name)]


def open_unpacked(path):
    """The file at path for reading, unpacked if it is packed.

    Its first bytes say so and not its name: browsers unpack a .gz and leave the name, or take the
    name away and leave it packed."""
    with open(path, "rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head == b"\xfd7zXZ\0":  # xnist comes so
        if lzma is None:
            raise UserError(f"this Python cannot unpack {path}; unpack it with xz -d")
        return lzma.open(path)
    return open(path, "rb")


IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def idx_header(head):
    """The kind of number and the shape that an idx file announces in its first bytes.

    mnist_resnet9.read_idx() says what the format is. (None, ()) if it is no idx file."""
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_TYPES:
        return None, ()
    axes = head[3]
    if not 1 <= axes <= 4 or len(head) < 4 + 4 * axes:
        return None, ()
    return IDX_TYPES[head[2]], tuple(np.frombuffer(head, ">i4", axes, offset=4).tolist())


def read_verified(path, images):
    """The array in the idx file at path: images (N, 28, 28) or labels (N,) of uint8.

    QMNIST's labels are (N, 8) of int32, the first column being the digit.
    Unfit if the file is anything else."""
    what = "28×28 images" if images else "labels"
    with one_line_errors(path, f"an idx file of {what}"), open_unpacked(path) as file:
        head = file.read(20)  # as much as four axes need
        kind, shape = idx_header(head)
        right = [("u1", (28, 28))] if images else [("u1", ()), (">i4", (8,))]
        if (kind, shape[1:]) not in right:
            got = f"begins with {head[:16]!r}"
            if kind:
                got = f"holds {np.dtype(kind).name} of {'×'.join(map(str, shape))}"
            raise Unfit(f"{path} is no idx file of {what} (it {got}); {TAKES}")
        if not 0 < shape[0] <= MAX_IMAGES:
            raise Unfit(
                f"{path} claims to hold {shape[0]} entries, but should hold 1 to {MAX_IMAGES}"
            )
        start = 4 + 4 * len(shape)
        length = start + math.prod(shape) * np.dtype(kind).itemsize
        file.seek(0)
        content = file.read(length + 1)  # one more than belongs there shows trailing bytes
    if len(content) != length:
        problem = "is cut short" if len(content) < length else "has bytes after its end"
        raise Unfit(f"{path} {problem}: its header announces {shape[0]} {what}")
    array = np.frombuffer(content, kind, offset=start).reshape(shape)
    if not images:
        check_digits(path, array if array.ndim == 1 else array[:, 0])
    return array


def check_digits(path, labels):
    for label in (labels.min(), labels.max()):
        if not 0 <= label <= 9:
            raise Unfit(f"{path} has a label {label}, but {TAKES}")


def digits(labels):
    """(N,) uint8 of labels in any of their forms."""
    return (labels if labels.ndim == 1 else labels[:, 0]).astype(np.uint8)


def read_npz(path):
    """The four arrays of Keras's mnist.npz, in the order of FILES. A pickle is never loaded."""
    right = f"an npz file with the arrays {', '.join(NPZ_NAMES)}"
    with one_line_errors(path, right):
        if os.path.getsize(path) > MAX_NPZ:
            raise Unfit(f"{path} is larger than {MAX_NPZ} bytes; it should be {right}")
        with zipfile.ZipFile(path) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
            if set(NPZ_NAMES) - set(there):
                raise Unfit(f"{path} holds {listing(there) or 'nothing'}; it should be {right}")
            arrays = [read_member(archive, f"{name}.npy") for name in NPZ_NAMES]
    for name, a in zip(NPZ_NAMES, arrays):
        images = name.startswith("x")
        if images:
            fits = a.dtype == np.uint8 and a.shape[1:] == (28, 28)
        else:  # some have labels of int64
            fits = a.dtype.kind in "iu" and a.ndim == 1
        if not fits or not 0 < len(a) <= MAX_IMAGES:
            got = f"{a.dtype} of {'×'.join(map(str, a.shape))}"
            raise Unfit(f"{path}: {name} is {got[:100]}; {TAKES}")
        if not images:
            check_digits(path, a)
    return arrays


def read_member(archive, name):
    """An array of an npz file. ValueError if it is too large, or packed as NumPy does not."""
    member = archive.getinfo(name)
    packings = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack without a bound
    if member.file_size > 784 * MAX_IMAGES + 10_000 or member.compress_type not in packings:
        raise ValueError(f"{name} is too large or packed in an unusual way")
    with archive.open(member) as file:
        content = file.read(member.file_size)  # without the number zipfile unpacks up to 2 GiB
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array


def read_csv(path):
    """Images and labels of a csv file: in each line the label, and 784 pixels row by row."""
    with one_line_errors(path, CSV), open_unpacked(path) as file:
        lines = csv_lines(path, file)
        first = next(lines, None)
        if first is None:
            raise Unfit(f"{path} has no images; it should be {CSV}")
        lines = itertools.chain([first], lines)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy 2.0 only warns of 0.5, and takes it for 0
            rows = np.loadtxt(lines, np.uint8, comments=None, delimiter=",", ndmin=2)
    images, labels = rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]
    check_digits(path, labels)
    return images, labels


def csv_lines(path, file):
    """The lines of numbers, with or without a line of headings above them.

    Unfit at the first that has not 785 numbers: NumPy would take any number of columns."""
    lines = iter(lambda: file.readline(MAX_LINE), b"")
    for number, line in enumerate(lines):
        columns = line.count(b",") + 1
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark of UTF-8 that Excel sets
            if columns == 785 and not line.lstrip()[:1].isdigit():
                continue
        if number > MAX_IMAGES:
            raise Unfit(f"{path} has more than {MAX_IMAGES} lines; it should be {CSV}")
        if not line.strip():
            continue
        if columns != 785:
            raise Unfit(f"{path} has {columns} columns in line {number + 1}; it should be {CSV}")
        yield line


# ── Downloading ───────────────────────────────────────────────────────────────────────────────────


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses a redirect off HTTPS before anything is asked for there."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if not url.startswith("https:"):
            raise OSError(f"redirected to {url}")
        return super().redirect_request(request, answer, code, message, headers, url)


def open_url(url, timeout):
    return urllib.request.build_opener(HttpsOnly).open(url, timeout=timeout)


def download(file, folder):
    """Puts one of MNIST's files into folder, from the first mirror that sends the right bytes.

    NoDownload if none does."""
    part = folder / f"{file.name}.part{os.getpid()}.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a killed program left goes; a younger one may be in use.
        for left in folder.glob(f"{file.name}.part*"):
            if time.time() - left.stat().st_mtime > 2 * len(MIRRORS) * DOWNLOAD_SECONDS:
                left.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # another program that downloads has removed it
    except OSError as error:
        raise NoDownload(f"{folder} cannot be written to ({reason(error)})") from None
    problems = []
    for mirror in MIRRORS:
        deadline = time.monotonic() + DOWNLOAD_SECONDS
        try:
            url = f"{mirror}{file.name}.gz"
            with open_url(url, timeout=20) as answer, open(part, "wb") as target:
                size = int(answer.headers.get("Content-Length") or 0)
                bar = tqdm(
                    total=size,
                    unit="B",
                    unit_scale=True,
                    desc=file.name,
                    leave=False,
                    disable=None,
                )
                with bar:
                    # read1() takes what is there; read() would wait for all of the 2**16 bytes.
                    while (block := answer.read1(2**16)) and target.tell() < 2**25:
                        bar.update(target.write(block))
                        if time.monotonic() > deadline:
                            raise OSError(f"not whole after {DOWNLOAD_SECONDS} seconds")
                target.flush()
                os.fsync(target.fileno())
            array = read_verified(part, images="images" in file.name)
            if sha256(to_idx(array)) != file.mnist:
                raise OSError("its bytes are not MNIST's")
            part.replace(folder / f"{file.name}.gz")
            return
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # UserError is a ValueError
            problems.append(f"{mirror}: {getattr(error, 'reason', error)}")
        finally:
            part.unlink(missing_ok=True)
    reasons = "; ".join(problems)
    raise NoDownload(f"{file.name} is not in {folder}, and no download worked ({reasons})")
