"""Finding, checking and downloading the data. Nothing here reaches a network: the mirrors are
replaced."""

import contextlib
import errno
import gzip
import io
import os
import shutil
import tracemalloc
import urllib.error
import zipfile

import numpy as np
import pytest

import mnist_resnet9 as m
from support import mnist

NAMES = [file.name for file in mnist.FILES.values()]
SAMPLE = m.ROOT / "data" / "sample"


def idx(array):
    magic = 0x803 if array.ndim == 3 else 0x801
    return np.array([magic, *array.shape], ">i4").tobytes() + array.astype(np.uint8).tobytes()


def idx_of(array, kind):
    """An idx file of numbers other than uint8; kind is the third byte of its first four."""
    head = np.array([kind << 8 | array.ndim, *array.shape], ">i4").tobytes()
    return head + array.tobytes()


def error_of(folder):
    """The one line that loading from there ends with."""
    with pytest.raises(m.UserError) as error:
        m.load_mnist(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextlib.contextmanager
def little_memory():
    """Fails if what is done within takes 10 MB at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def same(data, other):
    """Whether two data sets have the same images and labels."""
    return data.hashes == other.hashes and all(
        np.array_equal(getattr(data, role), getattr(other, role)) for role in mnist.FILES
    )


@pytest.fixture
def folder(tmp_path):
    """A data set of another origin: random images in MNIST's format."""
    folder, rng = tmp_path / "fashion", np.random.default_rng(0)
    folder.mkdir()
    for part, N in (("train", 30), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (N, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, N)))
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the program's folder, with the sample and without MNIST."""
    monkeypatch.setattr(mnist, "ROOT", tmp_path / "program")
    shutil.copytree(SAMPLE, tmp_path / "program" / "data" / "sample")
    (tmp_path / "program" / "data" / "README.md").write_text("# The data")
    return tmp_path / "program"


@pytest.fixture
def sample_is_mnist(monkeypatch):
    """Takes the sample's hashes for MNIST's, so that MNIST is small."""
    files = {role: f._replace(mnist=f.sample) for role, f in mnist.FILES.items()}
    monkeypatch.setattr(mnist, "FILES", files)


@pytest.fixture(autouse=True)
def mirrors(monkeypatch):
    """What the mirrors answer: {url: bytes}; anything else is a refused connection."""
    answers, asked = {}, []

    class Answer(io.BytesIO):
        headers = {}

    def urlopen(url, timeout):
        asked.append(url)
        if url not in answers:
            raise urllib.error.URLError("no network")
        answer = Answer(answers[url])
        answer.url = url
        return answer

    monkeypatch.setattr(mnist, "open_url", urlopen)
    return answers, asked


def test_the_sample_is_real_and_balanced(sample):
    assert sample.name == "MNIST sample" and sample.notes
    assert sample.train_images.shape == (4000, 28, 28) and sample.test_images.shape == (
        1000,
        28,
        28,
    )
    assert np.array_equal(
        np.bincount(sample.train_labels) + np.bincount(sample.test_labels), [500] * 10
    )


def test_another_data_set_is_named_after_its_folder_and_reported(folder):
    data = m.load_mnist(folder)
    assert data.name == "fashion" and "not MNIST's" in data.notes[0]
    assert data.train_images.shape == (30, 28, 28) and data.train_labels.dtype == np.uint8


def test_gzipped_files_are_the_same_data(folder):
    before = m.load_mnist(folder)
    for name in NAMES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    assert m.load_mnist(folder).hashes == before.hashes


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
DAMAGE = {
    "empty": (IMAGES, lambda b: b"", "no idx file"),
    "cut short": (IMAGES, lambda b: b[:-1], "cut short"),
    "longer": (IMAGES, lambda b: b + b"x", "bytes after its end"),
    "HTML": (IMAGES, lambda b: b"<html>404 not found</html>", "no idx file"),
    "wrong magic number": (IMAGES, lambda b: b"\0\0\x08\x01" + b[4:], "no idx file"),
    "wrong dimensions": (IMAGES, lambda b: b[:8] + b"\0\0\0\x1b" + b[12:], "no idx file"),
    "absurd count": (
        IMAGES,
        lambda b: b[:4] + b"\x7f\xff\xff\xff" + b[8:],
        "claims to hold 2147483647",
    ),
    "negative count": (IMAGES, lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:], "claims to hold -1"),
    "label 10": (LABELS, lambda b: b[:-1] + b"\x0a", "label 10"),
    "images as labels": (LABELS, lambda b: idx(np.zeros((30, 28, 28))), "no idx file"),
    "another number of labels": (
        LABELS,
        lambda b: idx(np.zeros(29)),
        "30 train images but 29 labels",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_file_is_refused_by_name(folder, kind, zipped):
    name, damage, said = DAMAGE[kind]
    content = damage((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(m.UserError, match=said) as error:
        m.load_mnist(folder)
    assert kind == "another number of labels" or name in str(error.value)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", gzip.compress(b"\0" * 10000, mtime=0)[:-20], b""]
)
def test_a_gz_file_that_is_no_whole_gzip_is_refused(folder, content):
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(content)
    with pytest.raises(m.UserError, match=f"{IMAGES}.gz is"):
        m.load_mnist(folder)


def test_a_gzip_bomb_is_read_no_further_than_its_header_allows(folder):
    (folder / LABELS).unlink()
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.zeros(30)) + b"\0" * 10**8))
    with little_memory(), pytest.raises(m.UserError, match="bytes after its end"):
        m.load_mnist(folder)


def change_a_pixel(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[5000] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))


def test_a_changed_pixel_in_the_sample_is_refused(root):
    change_a_pixel(root / "data" / "sample")
    said = "sample: train-images-idx3-ubyte should have MNIST sample's contents"
    assert said in error_of("data/sample") and said in error_of("data")


def test_a_changed_pixel_of_mnist_is_refused_in_the_default_folder_only(root, sample_is_mnist):
    shutil.copytree(SAMPLE, root / "data", dirs_exist_ok=True)
    assert m.load_mnist("data").name == "MNIST"
    change_a_pixel(root / "data")
    error = error_of("data")
    assert "train-images-idx3-ubyte should have MNIST's contents" in error
    assert "delete and start again" in error and "another --data-dir" in error


def test_a_set_that_shares_files_with_mnist_is_fine_in_a_folder_of_its_own(
    tmp_path, sample_is_mnist
):
    shutil.copytree(SAMPLE, tmp_path / "noisy")
    change_a_pixel(tmp_path / "noisy")
    data = m.load_mnist(tmp_path / "noisy")
    assert data.name == "noisy" and len(data.notes) == 1
    assert data.notes[0].startswith("Of the files, train-images-idx3-ubyte in")


def test_another_whole_set_in_the_default_folder_is_refused(root, folder):
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    assert "keep another data set in another --data-dir" in error_of("data")


def test_an_incomplete_foreign_set_is_not_completed_with_mnist(folder, mirrors):
    (folder / LABELS).unlink()
    with pytest.raises(m.UserError, match=f"lacks {LABELS}"):
        m.load_mnist(folder)
    assert not mirrors[1]


# ── Where there is no data set ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("there", [True, False])
def test_an_empty_default_folder_without_network_gives_the_sample_and_says_so(root, there):
    if not there:
        (root / "data").rename(root / "elsewhere")
        (root / "data").symlink_to(root / "elsewhere")
    data = m.load_mnist("data")
    assert data.name == "MNIST sample"
    assert "NOT MNIST" in data.notes[0] and "no network" in data.notes[0]
    assert sorted(os.listdir(root / "data")) == ["README.md", "sample"]


def test_without_the_sample_too_the_error_is_that_of_the_download(root):
    shutil.rmtree(root / "data")
    assert "no network" in error_of("data")


def test_a_default_folder_that_is_missing_is_made(root, mirrors, sample_is_mnist):
    (root / "data").rename(root / "away")
    for name in NAMES:
        mirrors[0][f"{mnist.MIRRORS[0]}{name}.gz"] = (SAMPLE / f"{name}.gz").read_bytes()
    assert m.load_mnist("data").name == "MNIST"


def test_a_default_folder_that_is_a_link_to_nothing_is_not_taken_for_an_empty_one(root):
    shutil.rmtree(root / "data")
    (root / "data").symlink_to(root / "unplugged")
    assert "there is no folder" in error_of("data")


def test_a_folder_that_does_not_exist_is_named_and_not_made(tmp_path, mirrors):
    assert f"there is no folder {tmp_path / 'nwe'}" in error_of(tmp_path / "nwe")
    assert not list(tmp_path.iterdir()) and not mirrors[1]


def test_an_empty_folder_where_the_download_fails_is_no_reason_for_the_sample(tmp_path, mirrors):
    (tmp_path / ".hidden").write_text("")
    error = error_of(tmp_path)
    assert "no download worked" in error and "no network" in error and len(mirrors[1]) == 2
    assert os.listdir(tmp_path) == [".hidden"]


def test_a_part_of_mnist_where_the_download_fails_is_no_reason_for_the_sample(
    root, sample_is_mnist
):
    shutil.copy(SAMPLE / f"{LABELS}.gz", root / "data")
    assert f"{IMAGES} is not in" in error_of("data")


def test_a_folder_of_another_set_in_the_default_one_leaves_the_download_but_not_the_sample(
    root, folder, mirrors, sample_is_mnist
):
    shutil.copytree(folder, root / "data" / "fashion")
    assert "no network" in error_of("data")
    for name in NAMES:
        mirrors[0][f"{mnist.MIRRORS[0]}{name}.gz"] = (SAMPLE / f"{name}.gz").read_bytes()
    assert m.load_mnist("data").name == "MNIST"
    assert m.load_mnist("data/fashion").name == "fashion"


@pytest.mark.parametrize("default", [True, False])
def test_files_that_cannot_be_used_are_listed_with_what_would_be_right(root, mirrors, default):
    folder = root / "data" if default else root / "mine"
    folder.mkdir(exist_ok=True)
    for i in range(20):
        (folder / f"train-{i:02}.parquet").write_bytes(b"PAR1")
    (folder / "archive.zip").write_bytes(b"PK")
    error = error_of(folder)
    assert f"{folder} holds archive.zip, train-00.parquet" in error and "and 13 more" in error
    assert "must be unpacked first" in error and "train-19" not in error
    for form in mnist.FORMS:
        assert f"{form.what} ({form.names[0]}" in error
    assert "28×28 images of uint8 with labels 0 to 9" in error and not mirrors[1]


def test_names_that_a_terminal_cannot_show_are_listed_without_harm(tmp_path):
    (tmp_path / "a\x1b[2J\n.bin").write_text("")
    (tmp_path / os.fsdecode(b"b\xff.bin")).write_text("")
    assert "a?[2J?.bin, b?.bin;" in error_of(tmp_path)


def test_a_file_in_place_of_a_folder_is_named(folder):
    assert "is no folder" in error_of(folder / IMAGES)


@pytest.mark.parametrize("call", ["scandir", "stat", "open"])
@pytest.mark.parametrize("number", ["EACCES", "EIO"])
def test_what_the_system_does_not_hand_over_is_an_error_and_never_the_sample(
    root, monkeypatch, call, number
):
    path = root / "data" / IMAGES
    path.write_bytes(idx(np.zeros((30, 28, 28))))
    (root / "data" / LABELS).write_bytes(idx(np.zeros(30)))
    at = path.parent if call == "scandir" else path
    where, real = (mnist, open) if call == "open" else (mnist.os, getattr(os, call))

    def fails(asked, *arguments, **named):
        if asked == at:
            raise OSError(getattr(errno, number), "the disk says no")
        return real(asked, *arguments, **named)

    monkeypatch.setattr(where, call, fails, raising=False)
    assert f"{at} cannot be read (the disk says no)" in error_of("data")


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_is_not_opened(folder, kind):
    path = folder / IMAGES
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    else:
        path.symlink_to(path if kind == "link to itself" else folder / "gone")
    assert str(path) in error_of(folder)


def test_the_home_folder_may_be_written_as_in_a_shell(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert m.load_mnist("~/fashion").name == "fashion"
    assert m.parse_settings(["--data-dir=~/fashion"]).data_dir == str(folder)


# ── The forms ─────────────────────────────────────────────────────────────────────────────────────


def rename(folder, change):
    for name in NAMES:
        new = folder / change(name)
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)


SPELLINGS = {
    "Kaggle": lambda name: name.replace("-idx", ".idx"),
    "Kaggle, a folder for each": lambda name: f"{name}/{name}",
    "Kaggle, a folder for each and a dot": lambda name: f"{name}/{name.replace('-idx', '.idx')}",
    "torchvision": lambda name: f"MNIST/raw/{name}",
    "other case": lambda name: name.title(),
    "downloaded twice": lambda name: f"{name} (1).gz",
    "downloaded twice, unpacked": lambda name: f"{name}(2)",
    "a text file, it says": lambda name: f"{name}.gz.txt",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("zipped", [False, True])
def test_names_may_be_spelled_as_the_world_does(folder, spelling, zipped):
    before = m.load_mnist(folder)
    if zipped:  # whether the name says so or not
        for name in NAMES:
            (folder / name).write_bytes(gzip.compress((folder / name).read_bytes()))
    rename(folder, SPELLINGS[spelling])
    data = m.load_mnist(folder)
    assert same(data, before) and data.name == "fashion"
    assert SPELLINGS[spelling](NAMES[0]) in data.notes[0] and len(data.notes) == 2


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_first_bytes_say_whether_a_file_is_packed(folder, suffix):
    before = m.load_mnist(folder)
    for name in NAMES:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        packed = content if suffix else gzip.compress(content)
        (folder / f"{name}{suffix}").write_bytes(packed)
    data = m.load_mnist(folder)
    assert same(data, before) and len(data.notes) == 1  # the four usual names


def test_the_usual_name_comes_before_other_spellings(folder):
    before = m.load_mnist(folder)
    for other in ("Train-Images-idx3-ubyte", f"{IMAGES} (1)", f"{IMAGES}.gz", f"._{IMAGES}"):
        (folder / other).write_bytes(b"damaged")
    assert same(m.load_mnist(folder), before)


def test_a_whole_set_below_comes_before_a_part_of_one_above(folder):
    rename(folder, SPELLINGS["torchvision"])
    (folder / IMAGES).write_bytes(b"damaged")
    assert m.load_mnist(folder).train_images.shape == (30, 28, 28)


def test_what_mnist_lacks_is_put_beside_its_other_files(tmp_path, mirrors, sample_is_mnist):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(SAMPLE, raw)
    (raw / f"{LABELS}.gz").unlink()
    mirrors[0][f"{mnist.MIRRORS[0]}{LABELS}.gz"] = (SAMPLE / f"{LABELS}.gz").read_bytes()
    assert m.load_mnist(tmp_path).name == "MNIST"
    assert sorted(os.listdir(raw)) == sorted(f"{name}.gz" for name in NAMES)


def test_nothing_is_downloaded_into_the_folder_of_the_sample(root, mirrors, sample_is_mnist):
    (root / "data" / "sample" / f"{LABELS}.gz").unlink()
    assert f"lacks {LABELS}" in error_of("data/sample") and not mirrors[1]


def arrays_of(data):
    return {
        name: getattr(data, role) for name, role in zip(mnist.NPZ_NAMES, mnist.FILES, strict=True)
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_kerass_file_is_read_and_mnist_in_it_is_mnist(sample, tmp_path, sample_is_mnist, save):
    save(tmp_path / "mnist.npz", **arrays_of(sample))
    data = m.load_mnist(tmp_path)
    assert data.name == "MNIST" and same(data, sample)
    assert data.notes == (f"Read Keras's MNIST from mnist.npz in {tmp_path}.",)


def test_labels_of_another_integer_type_are_fine_in_kerass_file(folder):
    before = m.load_mnist(folder)
    arrays = arrays_of(before)
    for name in NAMES:
        (folder / name).unlink()
    arrays |= {name: arrays[name].astype(np.int64) for name in ("y_train", "y_test")}
    np.savez(folder / "mnist.npz", **arrays)
    assert same(m.load_mnist(folder), before)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a.pop("y_test"), "npz holds x_train, y_train, x_test; it should be an npz"),
        (lambda a: a.update(x_train=a["x_train"] / 255), "x_train is float64 of 30×28×28; this"),
        (lambda a: a.update(x_test=np.zeros((20, 32, 32), np.uint8)), "20×32×32; this network"),
        (lambda a: a.update(y_test=np.full(20, 26)), "label 26, but this network takes 28×28"),
        (lambda a: a.update(y_test=np.eye(20)), "y_test is float64 of 20×20; this network"),
        (lambda a: a.update(y_test=np.full(20, None)), "is damaged (Object arrays cannot"),
        (lambda a: a.update(y_test=a["y_test"][1:]), "20 test images but 19 labels"),
        (lambda a: a.update(x_test=a["x_test"][:0]), "x_test is uint8 of 0×28×28"),
    ],
)
def test_other_arrays_in_kerass_file_are_refused(folder, change, said):
    arrays = arrays_of(m.load_mnist(folder))
    change(arrays)
    for name in NAMES:
        (folder / name).unlink()
    np.savez(folder / "mnist.npz", **arrays)
    assert said in error_of(folder)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\3\4", "cut"])
def test_a_damaged_npz_is_refused(tmp_path, content, folder):
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays_of(m.load_mnist(folder)))
    path.write_bytes(path.read_bytes()[:-40] if content == "cut" else content)
    assert f"{path} is damaged" in error_of(tmp_path)


def test_an_npz_cannot_fill_the_memory(tmp_path, monkeypatch):
    """Neither by its size, nor by one that it claims, nor by one that it conceals."""
    monkeypatch.setattr(mnist, "MAX_IMAGES", 1000)
    path = tmp_path / "mnist.npz"
    names = [f"{name}.npy" for name in mnist.NPZ_NAMES]
    header = b"\x93NUMPY\2\0" + b"\xff\xff\xff\x0f"  # 256 MiB of header
    for packing, size in (
        (zipfile.ZIP_DEFLATED, 10**8),
        (zipfile.ZIP_DEFLATED, 1000),
        (zipfile.ZIP_BZIP2, 1000),
    ):
        with zipfile.ZipFile(path, "w", packing) as file:
            for name in names:
                file.writestr(name, header + bytes(3 * 10**7))
            file.getinfo(names[0]).file_size = size  # as the list at the end will say
        with little_memory():
            assert "is damaged" in error_of(tmp_path)
    monkeypatch.setattr(mnist, "MAX_NPZ", 100)
    assert "is larger than 100 bytes" in error_of(tmp_path)


def csv(images, labels, head=b"", end=b"\n"):
    """The bytes of a file like Kaggle's."""
    rows = np.column_stack([labels, images.reshape(len(images), -1)]).tolist()
    return head + b"".join(b",".join(b"%d" % v for v in row) + end for row in rows)


HEAD = b"label," + b",".join(b"%dx%d" % (y, x) for y in range(1, 29) for x in range(1, 29))


@pytest.mark.parametrize(
    "head, end",
    [
        (b"", b"\n"),
        (HEAD + b"\n", b"\n"),
        (b"\xef\xbb\xbf", b"\n"),
        (b"\xef\xbb\xbf" + HEAD + b"\r\n", b"\r\n"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_kaggles_csv_is_read_with_and_without_headings(folder, head, end, zipped):
    before = m.load_mnist(folder)
    for part in ("train", "test"):
        content = csv(
            getattr(before, f"{part}_images"), getattr(before, f"{part}_labels"), head, end
        )
        content = content if head else content + end  # an empty line at the end
        (folder / f"mnist_{part}.csv").write_bytes(gzip.compress(content) if zipped else content)
    for name in NAMES:
        (folder / name).unlink()
    data = m.load_mnist(folder)
    assert same(data, before)
    assert "Kaggle's MNIST from mnist_train.csv, mnist_test.csv" in data.notes[0]


def test_mnist_in_csv_is_mnist(sample, tmp_path, sample_is_mnist):
    for part in ("train", "test"):
        content = csv(getattr(sample, f"{part}_images"), getattr(sample, f"{part}_labels"))
        (tmp_path / f"mnist_{part}.csv").write_bytes(content)
    data = m.load_mnist(tmp_path)
    assert data.name == "MNIST" and same(data, sample)


def test_a_blank_before_the_first_label_makes_it_no_heading(sample, tmp_path, sample_is_mnist):
    for part in ("train", "test"):
        content = csv(getattr(sample, f"{part}_images"), getattr(sample, f"{part}_labels"))
        numbers = content[content.index(b"\n") + 1 :] if content[:1].isalpha() else content
        (tmp_path / f"mnist_{part}.csv").write_bytes(b" " + numbers)
    assert same(m.load_mnist(tmp_path), sample)


def test_a_line_of_csv_cannot_fill_the_memory(tmp_path):
    (tmp_path / "mnist_train.csv").write_bytes(gzip.compress(b"7" * 10**8))
    (tmp_path / "mnist_test.csv").write_bytes(b"")
    with little_memory():
        assert "1 columns in line 1" in error_of(tmp_path)


ROW = b"7" + b",0" * 784 + b"\n"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "has no images; it should be csv"),
        (HEAD + b"\n", "has no images; it should be csv"),
        (b"<html>404</html>", "1 columns in line 1; it should be csv with the label and 784"),
        (ROW + ROW[2:], "784 columns in line 2"),
        (ROW + b"8," + ROW, "786 columns in line 2"),
        (ROW.replace(b",", b";"), "1 columns in line 1"),
        (ROW + b"7" + b",256" * 784, "could not convert string '256'"),
        (ROW + b"7" + b",0.5" * 784, "could not convert string '0.5'"),
        (ROW + b"26" + b",0" * 784, "label 26, but this network takes 28×28"),
        (b"7" + b",0" * 10**7, "columns in line 1"),
        (ROW * 52, "more than 50 lines"),
        (b"\n" * 100, "more than 50 lines"),
        (gzip.compress(ROW * 9, mtime=0)[:-9], "is damaged"),
    ],
)
def test_csv_that_is_something_else_is_refused(tmp_path, content, said, monkeypatch):
    monkeypatch.setattr(mnist, "MAX_IMAGES", 50)
    (tmp_path / "mnist_train.csv").write_bytes(content)
    (tmp_path / "mnist_test.csv").write_bytes(ROW)
    error = error_of(tmp_path)
    assert said in error and "mnist_train.csv" in error and "download" not in error


def qmnist_labels(digits, numbers):
    """As QMNIST has them: the digit comes first, and the digit's number in NIST in column 5."""
    columns = np.zeros((len(digits), 8), ">i4")
    columns[:, 0], columns[:, 1:5], columns[:, 5] = digits, 99, numbers
    return idx_of(columns, 12)


@pytest.fixture
def qmnist(folder):
    """The images of `folder` under QMNIST's names, and what they should be read as."""
    data = m.load_mnist(folder)
    for part, other in (("train", "train"), ("test", "t10k")):
        (folder / f"qmnist-{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress((folder / f"{other}-images-idx3-ubyte").read_bytes())
        )
        labels = getattr(data, f"{part}_labels")
        numbers = np.arange(len(labels)) + 1000 * (part == "test")
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(qmnist_labels(labels, numbers))
    for name in NAMES:
        (folder / name).unlink()
    return folder, data


def test_qmnist_is_read_by_its_own_names(qmnist):
    folder, before = qmnist
    data = m.load_mnist(folder)
    assert same(data, before) and data.train_labels.dtype == np.uint8
    assert "Read QMNIST from qmnist-train-images-idx3-ubyte.gz" in data.notes[0]
    (folder / "qmnist-test-labels-idx2-int").write_bytes(qmnist_labels([26] * 20, 0))
    assert "label 26, but this network takes" in error_of(folder)
    (folder / "qmnist-test-labels-idx2-int").unlink()
    assert "lacks qmnist-test-labels-idx2-int" in error_of(folder)


def test_qmnist_in_the_default_folder_is_taken_there_by_its_names(qmnist, root):
    folder, before = qmnist
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    data = m.load_mnist("data")
    assert same(data, before) and data.name == "QMNIST"
    (root / "data" / "qmnist-test-labels-idx2-int").write_bytes(b"damaged")
    assert "delete" not in error_of("data")  # MNIST would come in its place


def test_xnist_is_trained_on_without_the_images_that_qmnist_tests_with(qmnist, rng):
    folder, before = qmnist
    images = rng.integers(0, 256, (50, 28, 28))
    images[30:] = before.test_images  # xnist has the test images too
    numbers = np.r_[np.arange(30), 1000 + np.arange(20)]
    labels = np.r_[before.train_labels, before.test_labels]
    lzma = pytest.importorskip("lzma")  # it comes as .xz
    (folder / "xnist-images-idx3-ubyte.xz").write_bytes(lzma.compress(idx(images)))
    (folder / "xnist-labels-idx2-int.xz").write_bytes(lzma.compress(qmnist_labels(labels, numbers)))
    data = m.load_mnist(folder)
    assert np.array_equal(data.train_images, images[:30])
    assert np.array_equal(data.train_labels, before.train_labels)
    assert np.array_equal(data.test_images, before.test_images)
    assert "xnist" in data.notes[0] and "left out of the training images" in data.notes[0]

    (folder / "xnist-labels-idx2-int.xz").write_bytes(idx(labels))
    assert "eight columns" in error_of(folder)
    (folder / "xnist-labels-idx2-int.xz").write_bytes(qmnist_labels(labels, 1000))
    assert "none is left to train on" in error_of(folder)


def test_an_xz_file_needs_a_python_that_can_unpack_it(folder, monkeypatch):
    lzma = pytest.importorskip("lzma")
    monkeypatch.setattr(mnist, "lzma", None)
    (folder / IMAGES).write_bytes(lzma.compress(b""))
    assert "unpack it with xz -d" in error_of(folder)


def test_as_many_images_as_xnist_has_are_read():
    assert mnist.MAX_IMAGES >= 402_953


def test_emnists_images_are_turned(folder):
    before = m.load_mnist(folder)
    for part, other in (("train", "train"), ("test", "t10k")):
        images = getattr(before, f"{part}_images").transpose(0, 2, 1)
        name = f"emnist-digits-{part}"
        (folder / "gzip").mkdir(exist_ok=True)  # the folder in EMNIST's zip
        (folder / "gzip" / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        shutil.move(
            folder / f"{other}-labels-idx1-ubyte", folder / "gzip" / f"{name}-labels-idx1-ubyte"
        )
        (folder / f"{other}-images-idx3-ubyte").unlink()
    data = m.load_mnist(folder)
    assert same(data, before) and "EMNIST digits" in data.notes[0] and "turned" in data.notes[0]


@pytest.mark.parametrize(
    "name, content, said",
    [
        (IMAGES, idx(np.zeros((30, 32, 32))), "it holds uint8 of 30×32×32"),
        (IMAGES, idx_of(np.zeros((30, 28, 28), ">f4"), 13), "it holds float32 of 30×28×28"),
        (LABELS, idx(np.arange(30) % 26 + 1), "has a label 26, but"),
        (LABELS, idx_of(np.zeros((30, 3), ">i4"), 12), "it holds int32 of 30×3"),
    ],
)
def test_what_the_network_does_not_take_is_refused_with_what_it_takes(folder, name, content, said):
    (folder / name).write_bytes(content)
    error = error_of(folder)
    assert said in error and "this network takes 28×28 images of uint8 with labels 0 to 9" in error


def test_deleting_a_damaged_file_is_advice_for_the_default_folder_only(root, folder):
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    shutil.copytree(folder, root / "data" / "fashion")
    for place in ("data", "data/fashion"):
        (root / place / IMAGES).write_bytes(b"damaged")
    assert error_of("data").endswith("delete it and start again to download it anew")
    assert "delete" not in error_of("data/fashion")


# ── Downloading ───────────────────────────────────────────────────────────────────────────────────


def test_a_download_takes_the_first_mirror_that_sends_the_right_bytes(
    tmp_path, mirrors, sample_is_mnist
):
    answers, asked = mirrors
    for name in NAMES:
        right = (SAMPLE / f"{name}.gz").read_bytes()
        answers[f"{mnist.MIRRORS[0]}{name}.gz"] = right[: len(right) // 2]
        answers[f"{mnist.MIRRORS[1]}{name}.gz"] = right
    data = m.load_mnist(tmp_path)
    assert data.name == "MNIST" and len(asked) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.gz" for name in NAMES)


def test_wrong_bytes_from_every_mirror_never_get_the_final_name(tmp_path, mirrors):
    for mirror in mnist.MIRRORS:
        mirrors[0][f"{mirror}{IMAGES}.gz"] = gzip.compress(idx(np.zeros((60, 28, 28))))
    assert "its bytes are not MNIST's" in error_of(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_mirror_that_trickles_is_given_up(tmp_path, mirrors, monkeypatch, sample_is_mnist):
    answers, asked = mirrors
    for name in NAMES:
        for mirror in mnist.MIRRORS:
            answers[f"{mirror}{name}.gz"] = (SAMPLE / f"{name}.gz").read_bytes()
    monkeypatch.setattr(
        mnist.time, "monotonic", lambda: 1000.0 * len(asked)
    )  # each question takes so long
    assert "not whole after 300 seconds" in error_of(tmp_path)
    assert len(asked) == 2 and not any(tmp_path.iterdir())


def test_two_programs_that_download_at_once_both_get_the_file(tmp_path, mirrors, monkeypatch):
    file = mnist.FILES["test_labels"]._replace(mnist=mnist.FILES["test_labels"].sample)
    right = (SAMPLE / f"{file.name}.gz").read_bytes()
    mirrors[0][f"{mnist.MIRRORS[0]}{file.name}.gz"] = right
    read_idx, seen = mnist.read_verified, []

    def other_program_first(path, images):
        """Another program downloads the same file, from start to end, while ours lies unchecked
        beside it."""
        monkeypatch.setattr(mnist, "read_verified", read_idx)
        monkeypatch.setattr(mnist.os, "getpid", lambda: 10**6)
        mnist.download(file, tmp_path)
        seen.extend(sorted(p.name for p in tmp_path.iterdir()))
        return read_idx(path, images)

    monkeypatch.setattr(mnist, "read_verified", other_program_first)
    mnist.download(file, tmp_path)
    assert len(seen) == 2 and f"{file.name}.gz" in seen  # the other's whole file, and our part
    assert [p.name for p in tmp_path.iterdir()] == [f"{file.name}.gz"]
    assert (tmp_path / f"{file.name}.gz").read_bytes() == right


def test_leftovers_of_killed_downloads_go_and_those_in_use_stay(tmp_path):
    old, new = (tmp_path / f"{IMAGES}.part{number}.gz" for number in (1, 2))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    error_of(tmp_path)
    assert not old.exists() and new.exists()
