"""The four files of MNIST: found, downloaded where they are missing, verified and named."""

import gzip
import hashlib
import http.client
import math
import os
import time
import urllib.request
import zlib
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support import ROOT, UserError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MAX_IMAGES = 300_000  # nothing larger is read, whatever a file's header or a gzip stream claims

DOWNLOAD_SECONDS = 300  # then the next mirror is asked


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


class DataFiles(NamedTuple):
    """A data set as it was found: verified, and not yet made into arrays."""

    name: str  # what figures and logs call it
    hashes: dict  # file name → SHA-256 of the decompressed file
    notes: tuple  # what the user should know about where the data came from
    contents: dict  # train_images, train_labels, test_images, test_labels → bytes of the idx file


def find_mnist(data_dir):
    """The data set in data_dir, downloaded first where it is missing.

    A relative data_dir starts at the script's folder. Another data set of MNIST's format is fine in
    a folder of its own. With neither files nor network the sample in data/sample serves, which
    .name and .notes say. UserError names a file that is damaged or does not belong there.
    """
    folder = ROOT / data_dir
    notes = ()
    try:
        contents, hashes = read_folder(folder, complete=True)
    except OSError as error:  # no download worked
        folder = ROOT / "data" / "sample"
        notes = (
            f"NOT MNIST: {error}.",
            f"Using the bundled sample: 4,000 images to train on, 1,000 to test, in {folder}.",
        )
        contents, hashes = read_folder(folder, complete=False)
    for part in ("train", "test"):
        images, labels = (entries(contents[f"{part}_{kind}"]) for kind in ("images", "labels"))
        if images != labels:
            raise UserError(
                f"{folder} has {images} {part} images but {labels} labels; "
                "are files of two sets mixed?"
            )
    name = name_dataset(folder, hashes)
    if not notes and name != "MNIST":
        notes = (f"The files in {folder} are not MNIST's (other hashes); this run is on {name!r}.",)
    return DataFiles(name, hashes, notes, contents)


def entries(content):
    """How many images or labels the idx file with these bytes announces."""
    return int.from_bytes(content[4:8], "big")


def read_folder(folder, complete):
    """{role: bytes}, {file name: SHA-256} of the four files.

    complete: whether to download those that an incomplete MNIST lacks."""
    paths = {role: find_idx(folder, file.name) for role, file in FILES.items()}
    read = {}
    for role, path in paths.items():
        if path:
            read[role] = read_verified(path, images="images" in role)
    lacking = [role for role in FILES if role not in read]
    if lacking and (not complete or any(read[role][1] != FILES[role].mnist for role in read)):
        names = ", ".join(FILES[role].name for role in lacking)
        raise UserError(f"{folder} lacks {names} beside the files that it has")
    for role in lacking:
        download(FILES[role], folder)
        read[role] = read_verified(find_idx(folder, FILES[role].name), images="images" in role)
    contents = {role: read[role][0] for role in FILES}
    hashes = {FILES[role].name: read[role][1] for role in FILES}
    return contents, hashes


def find_idx(folder, name):
    """The path of the file `name` in folder, as it is or gzipped; None if it has neither."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_verified(path, images):
    """The decompressed bytes of the idx file at path, and their SHA-256.

    UserError if it is anything else. mnist_resnet9.read_idx() says what the format is.
    """
    again = "delete it and start again to download it anew"
    header = 16 if images else 8
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(header)
            magic, count, size = 0, 0, []
            if len(head) == header:
                magic, count, *size = np.frombuffer(head, ">i4").tolist()
            if magic != (0x803 if images else 0x801) or size not in ([28, 28], []):
                what = "28×28 images" if images else "labels"
                raise UserError(
                    f"{path} is no idx file of {what} (it begins with {head[:16]!r}); {again}"
                )
            if not 0 < count <= MAX_IMAGES:
                raise UserError(
                    f"{path} claims to hold {count} entries, "
                    f"but should hold 1 to {MAX_IMAGES}; {again}"
                )
            length = count * math.prod(size)
            body = file.read(length + 1)  # one more than belongs there shows trailing bytes
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or no gzip file ({error}); {again}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    if len(body) != length:
        problem = "is cut short" if len(body) < length else "has bytes after its end"
        raise UserError(f"{path} {problem}: its header announces {count} entries; {again}")
    if not images and max(body) > 9:
        raise UserError(
            f"{path} has a label {max(body)}, but labels are the digits 0 to 9; {again}"
        )
    content = head + body
    return content, hashlib.sha256(content).hexdigest()


def name_dataset(folder, hashes):
    """MNIST, its sample, or the folder's name.

    UserError where only some files are MNIST's: the others are then damaged."""
    for name, known in (("MNIST", "mnist"), ("MNIST sample", "sample")):
        wrong = [file.name for file in FILES.values() if hashes[file.name] != getattr(file, known)]
        if not wrong:
            return name
        if len(wrong) < len(FILES) or (name == "MNIST" and folder.resolve() == ROOT / "data"):
            raise UserError(
                f"{folder}: {', '.join(wrong)} should have {name}'s contents but has not "
                "(SHA-256 differs); delete and start again to download anew, "
                "or keep another data set in another --data-dir"
            )
    return f"{folder.name} (not MNIST)" if "mnist" == folder.name.lower()[:5] else folder.name


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses a redirect off HTTPS before anything is asked for there."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if not url.startswith("https:"):
            raise OSError(f"redirected to {url}")
        return super().redirect_request(request, answer, code, message, headers, url)


def download(file, folder):
    """Puts one of MNIST's files into folder, from the first mirror that sends the right bytes.

    OSError if none does."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.part{os.getpid()}.gz"
    # What a killed program left goes; a younger one may be in use.
    for left in folder.glob(f"{file.name}.part*"):
        if time.time() - left.stat().st_mtime > 2 * len(MIRRORS) * DOWNLOAD_SECONDS:
            left.unlink(missing_ok=True)
    urllib.request.install_opener(urllib.request.build_opener(HttpsOnly))
    problems = []
    for mirror in MIRRORS:
        deadline = time.monotonic() + DOWNLOAD_SECONDS
        try:
            url = f"{mirror}{file.name}.gz"
            with urllib.request.urlopen(url, timeout=20) as answer, open(part, "wb") as target:
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
            if read_verified(part, images="images" in file.name)[1] != file.mnist:
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
    raise OSError(f"{file.name} is not in {folder}, and no download worked ({reasons})")
