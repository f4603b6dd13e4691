"""Finding, checking and downloading the data. Nothing here reaches a network: the mirrors are
replaced."""

import errno
import gzip
import io
import os
import shutil
import urllib.error
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import mnist_resnet9 as m
from support import mnist

NAMES = list(mnist.MNIST)
IMAGES, LABELS = NAMES[:2]
SAMPLE = m.ROOT / "data" / "sample"
TAKES = "28×28 images with pixels from 0 to 255, or 0 to 1, and labels 0 to 9"


def idx(array, kind=8):
    """The bytes of an idx file. kind, the third of them, says what its numbers are; 8: uint8."""
    array = np.asarray(array, mnist.IDX_TYPES[kind])
    return np.array([kind << 8 | array.ndim, *array.shape], ">i4").tobytes() + array.tobytes()


def error_of(folder):
    """The one line that loading from there ends with."""
    with pytest.raises(m.UserError) as error:
        m.load_mnist(folder)
    assert "\n" not in str(error.value) and "pickle" not in str(error.value)
    return str(error.value)


def same(data, other):
    """Whether two data sets have the same images and labels, as uint8."""
    pairs = [(getattr(data, role), getattr(other, role)) for role in mnist.ROLES]
    return all(np.array_equal(a, b) and a.dtype == b.dtype == np.uint8 for a, b in pairs)


def arrays_of(data):
    return {name: getattr(data, role) for name, role in zip(mnist.NPZ_NAMES, mnist.ROLES)}


@pytest.fixture
def folder(tmp_path):
    """A data set in MNIST's format: random images, of MNIST's mean and deviation."""
    folder, rng = tmp_path / "fashion", np.random.default_rng(0)
    folder.mkdir()
    for part, N in (("train", 30), ("t10k", 20)):
        images = rng.integers(192, 256, (N, 28, 28)) * (rng.random((N, 28, 28)) < 0.149)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, N)))
    return folder


@pytest.fixture
def before(folder):
    """What is read of folder before a test changes it."""
    return m.load_mnist(folder)


@pytest.fixture
def small_mnist(before, folder, monkeypatch):
    """Takes folder's hashes for MNIST's, so that MNIST is small. {name: bytes}"""
    monkeypatch.setattr(mnist, "MNIST", before.hashes)
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the program's folder, with the sample and without MNIST."""
    monkeypatch.setattr(mnist, "ROOT", tmp_path / "program")
    shutil.copytree(SAMPLE, tmp_path / "program" / "data" / "sample")
    (tmp_path / "program" / "data" / "README.md").write_text("# The data")
    return tmp_path / "program"


@pytest.fixture(autouse=True)
def mirrors(monkeypatch):
    """What the mirrors answer, {url: bytes}, and the URLs that were asked for.

    Anything else is a refused connection."""
    answers, asked = {}, []

    class Answer(io.BytesIO):
        headers = {}

    def urlopen(url, timeout):
        asked.append(url)
        if url not in answers:
            raise urllib.error.URLError("no network")
        return Answer(answers[url])

    monkeypatch.setattr(mnist, "open_url", urlopen)
    return answers, asked


def serve(answers, contents, mirror=0):
    for name, content in contents.items():
        answers[f"{mnist.MIRRORS[mirror]}{name}.gz"] = gzip.compress(content)


def remove_files(folder):
    for name in NAMES:
        (folder / name).unlink()


def test_the_sample_is_real_and_balanced(sample):
    assert sample.name == "MNIST sample" and sample.notes
    assert sample.train_images.shape == (4000, 28, 28)
    assert sample.test_images.shape == (1000, 28, 28)
    labels = np.concatenate([sample.train_labels, sample.test_labels])
    assert np.array_equal(np.bincount(labels), [500] * 10)


def test_idx_files_are_handed_over_as_they_are_and_decoded_by_the_script(folder, monkeypatch):
    """Only other forms are made into idx files."""
    monkeypatch.delattr(mnist, "to_idx")
    files, data = mnist.find_mnist(folder), m.load_mnist(folder)
    for role, name in zip(mnist.ROLES, NAMES):
        assert files.contents[role] == (folder / name).read_bytes()
        assert np.array_equal(m.read_idx(files.contents[role]), getattr(data, role))


@pytest.mark.parametrize("kind", [9, 11, 12, 13, 14])
def test_labels_may_be_in_any_kind_of_number(folder, before, kind):
    (folder / LABELS).write_bytes(idx(before.train_labels, kind))
    data = m.load_mnist(folder)
    assert same(data, before) and data.hashes == before.hashes


def test_another_data_set_is_named_after_its_folder_and_reported(before):
    assert before.name == "fashion" and "not MNIST's" in before.notes[0]
    assert before.train_images.shape == (30, 28, 28) and before.train_labels.dtype == np.uint8


def test_images_of_another_mean_or_deviation_than_the_script_has_are_reported(
    folder, before, sample, monkeypatch
):
    assert len(before.notes) == len(sample.notes) == 1
    halves = np.zeros((30, 28, 28))
    halves[:, 14:] = 204  # 0.8, so that mean and deviation are 0.4
    (folder / IMAGES).write_bytes(idx(halves))
    note = m.load_mnist(folder).notes[-1]
    assert "by PIXEL_MEAN 0.1307 and PIXEL_STD 0.3081 of mnist_resnet9.py" in note
    assert note.endswith("in these images they are 0.400 and 0.400.")
    monkeypatch.setattr(m, "PIXEL_MEAN", 0.4)  # as whoever reads the note may do
    monkeypatch.setattr(m, "PIXEL_STD", 0.4)
    assert len(m.load_mnist(folder).notes) == 1


def test_what_is_trained_on_says_which_data_it_is_and_not_what_was_read(
    sample, tmp_path, monkeypatch, capsys
):
    """A student's edit of load_mnist: two classes only."""
    find, start = (
        m.load_mnist,
        ["--data-dir", "data/sample", "--save-dir", tmp_path, "--threads", 1],
    )
    start += ["--train-images", 64, "--channels", "2,2,2,2", "--epochs-max", 1, "--device", "cpu"]
    assert sample.hashes == sample.files.hashes == mnist.SAMPLE

    def two_classes(data_dir):
        data = find(data_dir)
        train, test = data.train_labels < 2, data.test_labels < 2
        return replace(
            data,
            train_images=data.train_images[train],
            train_labels=data.train_labels[train],
            test_images=data.test_images[test],
            test_labels=data.test_labels[test],
        )

    assert m.main(start) == 0
    monkeypatch.setattr(m, "load_mnist", two_classes)
    assert m.main([*start, "--epochs-max", 2]) == 2
    error = capsys.readouterr().err
    assert "another experiment: it has data 'MNIST sample', not 'MNIST sample, changed'" in error
    assert m.main([*start, "--tag", "two"]) == 0
    assert "MNIST sample, changed, 64 images" in capsys.readouterr().out
    monkeypatch.undo()
    assert m.main([*start, "--tag", "two", "--epochs-max", 2]) == 2  # nor the other way round


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1],
        lambda a: a.transpose(0, 2, 1),
        lambda a: 255 - a,
        lambda a: np.pad(a, ((0, 0), (2, 2), (2, 2))),
        lambda a: a / np.float32(255),
        lambda a: a[:10],
    ],
)
def test_any_change_of_the_images_changes_their_hash_and_the_name(sample, change):
    data = replace(sample, train_images=change(sample.train_images))
    assert data.name == "MNIST sample, changed"
    assert [data.hashes[name] == sample.hashes[name] for name in NAMES] == [False] + 3 * [True]
    same = replace(sample, train_images=np.asfortranarray(sample.train_images))
    assert same.name == "MNIST sample" and same.hashes == sample.hashes


def test_mnist_in_an_edited_shape_is_no_damaged_file(root, folder, small_mnist, monkeypatch):
    """support/mnist.py with another SHAPE, for 32×32 images: MNIST is not to be deleted."""
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    monkeypatch.setattr(mnist, "SHAPE", (32, 32))
    error = error_of("data")
    assert f"{IMAGES} holds uint8 of 30×28×28; it should be" in error and "delete" not in error


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "name, damage, said",
    [
        (IMAGES, lambda b: b"", "is damaged (it begins with b'')"),
        (IMAGES, lambda b: b[:-1], "is damaged"),
        (IMAGES, lambda b: b + b"x", "is damaged"),
        (IMAGES, lambda b: b"<html>404 not found</html>", "begins with b'<html>404"),
        (IMAGES, lambda b: b"\0\0\x08\x01" + b[4:], "is damaged"),
        (IMAGES, lambda b: b[:8] + b"\0\0\0\x1b" + b[12:], "is damaged"),
        (IMAGES, lambda b: b[:4] + b"\x7f\xff\xff\xff" + b[8:], "is damaged"),
        (IMAGES, lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:], "is damaged"),
        (IMAGES, lambda b: b[:4] + b"\0\0\0\0" + b[8:16], "holds uint8 of 0×28×28"),
        (IMAGES, lambda b: idx(np.zeros((30, 32, 32))), "holds uint8 of 30×32×32; it should"),
        (LABELS, lambda b: idx(np.zeros((30, 28, 28))), "holds uint8 of 30×28×28 for labels"),
        (LABELS, lambda b: idx(np.zeros((30, 3)), 12), "holds >i4 of 30×3 for labels"),
        (LABELS, lambda b: b[:-1] + b"\x0a", "has a label 10; it should be an idx file"),
        (LABELS, lambda b: idx(np.arange(30) % 10 / 2, 13), "has a label 0.5; it should be"),
        (LABELS, lambda b: idx(np.full(30, np.nan), 13), "has a label nan; it should be"),
        (LABELS, lambda b: idx(np.full(30, 7)), "has no label but 7; it should be an idx file"),
        (LABELS, lambda b: b[:4] + b"\0\0\0\x1d" + b[8:-1], "30 train images but 29 labels"),
    ],
)
def test_what_is_no_file_of_digits_is_refused(folder, pack, name, damage, said):
    content = damage((folder / name).read_bytes())
    (folder / name).write_bytes(pack(content))
    error = error_of(folder)
    assert said in error and str(folder) in error and "delete" not in error
    assert TAKES in error or "of two sets" in error


@pytest.mark.parametrize("content", [b"", b"<html>", gzip.compress(b"\0" * 10000, mtime=0)[:-20]])
def test_a_gz_file_that_is_no_whole_gzip_is_refused(folder, content):
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(content)
    assert f"{IMAGES}.gz is damaged" in error_of(folder)


@pytest.mark.parametrize("name", [LABELS, "mnist.npz", "mnist_train.csv"])
def test_no_file_is_unpacked_without_a_bound(folder, monkeypatch, name):
    monkeypatch.setattr(mnist, "MAX_BYTES", 2**20)
    remove_files(folder)
    (folder / name).write_bytes(gzip.compress(bytes(2**21)))
    if name == "mnist.npz":
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x_train.npy", bytes(2**21))
    assert f"{name} is damaged (it has more than 1048576 bytes" in error_of(folder)


def change_a_pixel(folder, name=IMAGES):
    path = folder / f"{name}.gz" if (folder / f"{name}.gz").exists() else folder / name
    with open(path, "rb") as file:
        content = bytearray(mnist.read_all(file))
    content[5000] ^= 1
    path.write_bytes(content)


def test_a_changed_pixel_in_the_sample_is_refused(root):
    change_a_pixel(root / "data" / "sample")
    assert f"sample: {IMAGES} should be as in data/README.md" in error_of("data/sample")
    assert f"sample: {IMAGES} should be as in data/README.md" in error_of("data")


def test_a_changed_pixel_of_mnist_is_refused_in_the_default_folder_only(root, folder, small_mnist):
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    assert m.load_mnist("data").name == "MNIST"
    change_a_pixel(root / "data")
    error = error_of("data")
    assert f"data: {IMAGES} should be as in data/README.md but is not" in error
    assert "delete and start again" in error and "another --data-dir" in error
    # The same where files are MNIST's in part: its labels, say, with noise on the images.
    change_a_pixel(folder)
    data = m.load_mnist(folder)
    assert data.name == "fashion" and len(data.notes) == 1
    assert data.notes[0].startswith(f"{IMAGES} in {folder}: not MNIST's")


def test_deleting_a_file_is_advice_for_a_damaged_one_in_the_default_folder_only(root, folder):
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    shutil.copytree(folder, root / "data" / "fashion")
    for place in ("data", "data/fashion"):
        (root / place / IMAGES).write_bytes(b"damaged")
    assert error_of("data").endswith("delete it and start again to download it anew")
    assert "delete" not in error_of("data/fashion")
    # A whole file may be what somebody wants to keep.
    (root / "data" / IMAGES).write_bytes(idx(np.zeros((30, 32, 32))))
    assert "delete" not in error_of("data")


def test_an_incomplete_foreign_set_is_not_completed_with_mnist(folder, mirrors):
    (folder / LABELS).unlink()
    assert "lacks the train labels of MNIST" in error_of(folder) and not mirrors[1]


# ── Where there is no data set ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("linked", [False, True])
def test_an_empty_default_folder_without_network_gives_the_sample_and_says_so(root, linked):
    if linked:
        (root / "data").rename(root / "elsewhere")
        (root / "data").symlink_to(root / "elsewhere")
    data = m.load_mnist("data")
    assert data.name == "MNIST sample"
    assert "NOT MNIST" in data.notes[0] and "no network" in data.notes[0]
    assert sorted(os.listdir(root / "data")) == ["README.md", "sample"]


def test_without_the_sample_too_the_error_is_that_of_the_download(root):
    shutil.rmtree(root / "data")
    assert "no network" in error_of("data")


def test_a_default_folder_that_is_missing_is_made(root, mirrors, small_mnist):
    shutil.rmtree(root / "data")
    serve(mirrors[0], small_mnist)
    assert m.load_mnist("data").name == "MNIST"
    assert sorted(os.listdir(root / "data")) == sorted(f"{name}.gz" for name in NAMES)


def test_a_default_folder_that_is_a_link_to_nothing_is_not_taken_for_an_empty_one(root, mirrors):
    shutil.rmtree(root / "data")
    (root / "data").symlink_to(root / "unplugged")
    assert "cannot be read (No such file" in error_of("data") and not mirrors[1]


def test_a_folder_that_does_not_exist_is_named_and_not_made(tmp_path, mirrors):
    assert f"{tmp_path / 'nwe'} cannot be read (No such file" in error_of(tmp_path / "nwe")
    assert not list(tmp_path.iterdir()) and not mirrors[1]


def test_an_empty_folder_where_the_download_fails_is_no_reason_for_the_sample(tmp_path, mirrors):
    (tmp_path / ".hidden").write_text("")
    error = error_of(tmp_path)
    assert "no download worked" in error and "no network" in error and len(mirrors[1]) == 2
    assert os.listdir(tmp_path) == [".hidden"]


def test_a_part_of_mnist_where_the_download_fails_is_no_reason_for_the_sample(
    root, folder, small_mnist
):
    shutil.copy(folder / LABELS, root / "data")
    assert f"{IMAGES} is not in" in error_of("data")


def test_a_folder_of_another_set_in_the_default_one_is_not_in_the_way(
    root, folder, mirrors, small_mnist
):
    shutil.copytree(folder, root / "data" / "fashion")
    assert m.load_mnist("data").name == "MNIST sample"
    serve(mirrors[0], small_mnist)
    assert m.load_mnist("data").name == "MNIST"


@pytest.mark.parametrize("default", [True, False])
def test_files_that_cannot_be_used_are_listed_with_what_would_be_right(root, mirrors, default):
    folder = root / "data" if default else root / "mine"
    folder.mkdir(exist_ok=True)
    for i in range(20):
        (folder / f"train-{i:02}.parquet").write_bytes(b"PAR1")
    (folder / "a\x1b[2J\n.bin").write_bytes(b"a name that a terminal cannot show")
    error = error_of(folder)
    assert f"{folder} holds a?[2J?.bin, train-00.parquet" in error and "and 13 more" in error
    assert "mnist.npz" in error and TAKES in error and not mirrors[1]


def test_a_file_in_place_of_a_folder_is_named(folder):
    assert f"{folder / IMAGES} cannot be read (Not a directory)" in error_of(folder / IMAGES)


@pytest.mark.parametrize("call", ["scandir", "open"])
@pytest.mark.parametrize("number", ["EACCES", "EIO"])
def test_what_the_system_does_not_hand_over_is_an_error_and_never_the_sample(
    root, monkeypatch, call, number
):
    path = root / "data" / IMAGES
    path.write_bytes(idx(np.zeros((30, 28, 28))))
    at = path.parent if call == "scandir" else path
    where, real = (mnist, open) if call == "open" else (mnist.os, os.scandir)

    def fails(asked, *arguments, **named):
        if asked == at:
            raise OSError(getattr(errno, number), "the disk says no")
        return real(asked, *arguments, **named)

    monkeypatch.setattr(where, call, fails, raising=False)
    assert f"{at} cannot be read (the disk says no)" in error_of("data")


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_is_not_opened(folder, kind, mirrors):
    path = folder / IMAGES
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    else:
        path.symlink_to(path if kind == "link to itself" else folder / "gone")
    error = error_of(folder)
    assert ("lacks the train images" in error or str(path) in error) and not mirrors[1]


def test_the_home_folder_may_be_written_as_in_a_shell(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert m.load_mnist("~/fashion").name == "fashion"
    assert m.parse_settings(["--data-dir=~/fashion"]).data_dir == str(folder)


# ── The forms ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name,
        lambda name: f"{name}.gz",
        lambda name: name.replace("-idx", ".idx"),  # Kaggle's
        lambda name: f"MNIST/raw/{name}.gz",  # torchvision's
        lambda name: f"raw/{name}.gz",  # torchvision's, of another set
        lambda name: name.title(),
        lambda name: f"{name} (1).gz",  # downloaded twice
        lambda name: f"{name}(2)",
    ],
)
def test_names_may_be_spelled_as_the_world_does(folder, before, spell, pack):
    """The first bytes say whether a file is packed, whatever its name."""
    for name in NAMES:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / spell(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / spell(name)).write_bytes(pack(content))
    data = m.load_mnist(folder)
    assert same(data, before) and data.hashes == before.hashes and data.name == "fashion"
    below = "raw" in spell("")
    assert len(data.notes) == 1 + below
    assert not below or data.notes[0] == f"Read MNIST from {(folder / spell('')).parent}."


def test_the_usual_name_comes_before_other_spellings(folder, before):
    for other in ("Train-Images-idx3-ubyte", f"{IMAGES} (1)", f"{IMAGES}.gz", f"._{IMAGES}"):
        (folder / other).write_bytes(b"damaged")
    assert same(m.load_mnist(folder), before)


def test_a_whole_set_below_comes_before_a_part_of_one_above(folder, before):
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for name in NAMES:
        (folder / name).rename(folder / "MNIST" / "raw" / name)
    (folder / IMAGES).write_bytes(b"damaged")
    assert same(m.load_mnist(folder), before)


def test_what_mnist_lacks_is_put_beside_its_other_files(tmp_path, folder, small_mnist, mirrors):
    raw = tmp_path / "torchvision" / "MNIST" / "raw"
    shutil.copytree(folder, raw)
    (raw / LABELS).unlink()
    serve(mirrors[0], small_mnist)
    assert m.load_mnist(tmp_path / "torchvision").name == "MNIST"
    assert sorted(os.listdir(raw)) == sorted([IMAGES, f"{LABELS}.gz", *NAMES[2:]])


def test_nothing_is_downloaded_into_the_folder_of_the_sample(root, mirrors, monkeypatch):
    monkeypatch.setattr(mnist, "MNIST", mnist.SAMPLE)
    (root / "data" / "sample" / f"{LABELS}.gz").unlink()
    assert "lacks the train labels" in error_of("data/sample") and not mirrors[1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_kerass_file_is_read_and_mnist_in_it_is_mnist(folder, before, small_mnist, save):
    remove_files(folder)
    arrays = arrays_of(before)
    save(folder / "mnist.npz", **arrays | {"y_test": arrays["y_test"].astype(np.int64)})
    data = m.load_mnist(folder)
    assert data.name == "MNIST" and same(data, before)
    assert data.notes == (f"Read Keras's MNIST from {folder}.",)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a.pop("y_test"), "'y_test.npy' in the archive"),
        (
            lambda a: a.update(x_test=np.zeros((20, 32, 32), np.uint8)),
            "uint8 of 20×32×32; it should",
        ),
        (lambda a: a.update(y_test=np.full(20, 26)), "has a label 26; it should"),
        (lambda a: a.update(y_test=np.eye(20)), "float64 of 20×20 for labels"),
        (lambda a: a.update(y_test=a["y_test"][1:]), "20 test images but 19 labels"),
        (lambda a: a.update(x_test=a["x_test"][:0]), "holds uint8 of 0×28×28"),
        (lambda a: a.update(y_train=np.zeros(30)), "has no label but 0; it should be an npz file"),
        (lambda a: a.update(y_test=np.full(20, None)), "Python objects, which are never loaded"),
    ],
)
def test_other_arrays_in_kerass_file_are_refused(folder, before, change, said):
    arrays = arrays_of(before)
    change(arrays)
    remove_files(folder)
    np.savez(folder / "mnist.npz", **arrays)
    assert said in error_of(folder)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\3\4", "cut"])
def test_a_damaged_npz_is_refused(tmp_path, content, before):
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays_of(before))
    path.write_bytes(path.read_bytes()[:-40] if content == "cut" else content)
    error = error_of(tmp_path)
    assert f"{path} is damaged" in error and "arrays x_train, y_train, x_test, y_test" in error


def csv(rows, head="", end="\n"):
    """The bytes of a file like Kaggle's."""
    lines = [",".join(map(str, row)) for row in np.asarray(rows).tolist()]
    return "".join(line + end for line in ([head] if head else []) + lines).encode()


def write_csv(folder, data, write=csv, change=bytes):
    """Puts the data set there as two files in csv; write makes one of rows of numbers."""
    remove_files(folder)
    for part in ("train", "test"):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        rows = np.column_stack([labels, images.reshape(len(images), -1)])
        (folder / f"mnist_{part}.csv").write_bytes(change(write(rows)))


PIXELS = [f"{y}x{x}" for y in range(1, 29) for x in range(1, 29)]
HEAD = ",".join(["label", *PIXELS])


@pytest.mark.parametrize("head", ["", HEAD])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "change", [bytes, gzip.compress, lambda b: b"\xef\xbb\xbf" + b, lambda b: b + b"\n"]
)
def test_kaggles_csv_is_read_with_and_without_headings(
    folder, before, small_mnist, head, end, change
):
    write_csv(folder, before, lambda rows: csv(rows, head, end), change)
    data = m.load_mnist(folder)
    assert same(data, before) and data.name == "MNIST"
    assert data.notes == (f"Read Kaggle's MNIST from {folder}.",)


def test_a_blank_before_the_first_label_makes_it_no_heading(folder, before):
    write_csv(folder, before, change=lambda content: b" " + content)
    assert same(m.load_mnist(folder), before)


ROW = b"7" + b",0" * 783 + b",9\n"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "columns in its first line: 1, not 785"),
        (HEAD.encode() + b"\n", "has no images"),
        (b"<html>404</html>", "columns in its first line: 1, not 785"),
        (ROW[2:] + ROW[2:], "columns in its first line: 784, not 785"),
        (ROW + ROW[2:], "number of columns changed from 785 to 784"),
        (ROW + b"8," + ROW, "number of columns changed from 785 to 786"),
        (ROW.replace(b",", b";"), "columns in its first line: 1, not 785"),
        (ROW + ROW.replace(b"9", b"nine"), "could not convert string 'nine'"),
        (ROW + ROW.replace(b"7", b"26"), "has a label 26; it should"),
        (b"7" + b",0" * 10**5, "columns in its first line: 100001, not 785"),
        (
            ROW * 2,
            "has no label but 7; it should be csv with the label first in each line, or named",
        ),
        (gzip.compress(ROW * 9, mtime=0)[:-9], "is damaged"),
    ],
)
def test_csv_that_is_something_else_is_refused(tmp_path, content, said):
    (tmp_path / "mnist_train.csv").write_bytes(content)
    (tmp_path / "mnist_test.csv").write_bytes(ROW + ROW.replace(b"7", b"1"))
    error = error_of(tmp_path)
    assert said in error and "mnist_train.csv" in error and "download" not in error
    assert "it should be csv with the label first in each line, or named" in error


def label_last(head="", quote=""):
    """Makes csv() of rows with the label in the last column."""

    def write(rows):
        rows = np.roll(rows, -1, axis=1)
        content = csv(rows, head)
        numbers = content if not quote else content.replace(b",", b'","')
        return b"".join(b'"' + line + b'"\n' if quote else line + b"\n" for line in numbers.split())

    return write


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize(
    "head",
    [
        ",".join([*PIXELS, "label"]),
        ",".join([*(f"pixel{i}" for i in range(784)), "class"]),  # OpenML's
        ",".join([*map(str, range(784)), "Target"]),  # pandas'
        ",".join([*(f"p_{i}" for i in range(784)), "the_digit"]),
    ],
)
def test_headings_say_which_column_of_csv_is_the_label(folder, before, small_mnist, head, quote):
    write_csv(folder, before, label_last(head, quote))
    data = m.load_mnist(folder)
    assert same(data, before) and data.name == "MNIST"


@pytest.mark.parametrize("corner", [[0], [0, 1], [0, 1, 2, 3, 7]])
@pytest.mark.parametrize("head", ["", ",".join([*(f"p{i}" for i in range(784)), "y1"])])
def test_labels_in_the_last_column_without_headings_are_never_pixels(folder, before, corner, head):
    """The first column then holds the first pixel, which may look like a label."""
    images = before.train_images.copy()
    images[:, 0, 0] = np.resize(corner, len(images))
    data = replace(before, train_images=images)
    write_csv(folder, data, label_last(head))
    error = error_of(folder)
    assert "label first in each line, or named in a line of headings" in error
    assert "last column" in error or head


@pytest.mark.parametrize(
    "head",
    [
        ",".join(map(str, range(785))),  # pandas' for an array
        ",".join(["label"] + ["pixel"] * 784),
    ],
)
def test_headings_that_do_not_tell_the_columns_apart_are_refused(folder, before, head):
    write_csv(folder, before, lambda rows: csv(rows, head))
    assert "mnist_train.csv" in error_of(folder)


SCALES = {
    "binary": lambda a: (a > 127).astype(np.uint8),
    "boolean": lambda a: a > 127,
    "float": lambda a: a / 255,
    "half": lambda a: (a / 255).astype(np.float32),
    "whole": lambda a: a.astype(float),
    "int64": lambda a: a.astype(np.int64),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", ["idx", "npz", "csv"])
def test_pixels_in_any_numbers_become_those_from_0_to_255(folder, before, small_mnist, form, scale):
    if form == "csv":

        def write(rows):
            pixels = SCALES[scale](rows[:, 1:])
            return csv(np.column_stack([rows[:, :1], pixels.astype(float)]))

        write_csv(folder, before, write)
    else:
        arrays = arrays_of(before)
        arrays |= {name: SCALES[scale](arrays[name]) for name in ("x_train", "x_test")}
        remove_files(folder)
        np.savez(folder / "mnist.npz", **arrays)
    if form == "idx":
        (folder / "mnist.npz").unlink()
        kinds = {"b": 8, "u": 8, "f": 14, "i": 12}
        for name, array in zip(NAMES, arrays.values()):
            (folder / name).write_bytes(idx(array, kinds[array.dtype.kind]))
    data = m.load_mnist(folder)
    said = [note for note in data.notes if "are 0 to 1; they were multiplied by 255" in note]
    if scale in ("binary", "boolean"):
        assert np.array_equal(data.train_images, (before.train_images > 127) * np.uint8(255))
        assert data.name == "fashion" and said
    else:  # nothing is lost: it is MNIST again
        assert same(data, before) and data.name == "MNIST"
        files = 1 if form == "npz" else 2
        assert len(said) == (files if scale in ("float", "half") else 0)


@pytest.mark.parametrize("form", ["idx", "npz", "csv"])
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a / 127.5 - 1, "has pixels from -1 to 1; it should be"),
        (lambda a: a * 257.0, "has pixels from 0 to 65535; it should be"),
        (lambda a: a + 0.5, "has pixels from 0.5 to 255.5; it should be"),
        (lambda a: a / 2, "has pixels from 0 to 127.5 that are not whole numbers; it should be"),
        (lambda a: np.where(a == 0, np.nan, a), "has pixels from nan to nan; it should be"),
        (lambda a: a != a, "has pixels from 0 to 0; it should be"),
    ],
)
def test_other_pixels_are_refused(folder, before, form, change, said):
    arrays = arrays_of(before)
    images = arrays["x_train"].copy()
    images[0, :, :2] = 0, 255
    arrays["x_train"] = images = change(images)
    remove_files(folder)
    if form == "csv":
        write = csv(np.column_stack([arrays["y_train"], images.reshape(30, -1)]))
        (folder / "mnist_train.csv").write_bytes(write)
        (folder / "mnist_test.csv").write_bytes(ROW)
    elif form == "npz":
        np.savez(folder / "mnist.npz", **arrays)
    else:
        (folder / IMAGES).write_bytes(idx(images, 14))
    error = error_of(folder)
    assert said in error and TAKES in error


@pytest.mark.parametrize("name", [IMAGES, f"{IMAGES}.gz", "mnist.npz", "mnist_train.csv"])
def test_a_git_lfs_pointer_is_called_what_it_is(root, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11490434\n"
    (root / "data" / name).write_bytes(pointer)
    error = error_of("data")
    assert f"{name} cannot be read (is a git-lfs pointer, not the file: run `git" in error
    assert "delete" not in error


def write_qmnist(folder, data):
    """The data set under QMNIST's names: the digit is the first of eight columns of labels."""
    remove_files(folder)
    for part in ("train", "test"):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        columns = np.full((len(labels), 8), 99)
        columns[:, 0] = labels
        (folder / f"qmnist-{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(idx(columns, 12))


def test_qmnist_is_read_by_its_own_names(folder, before):
    write_qmnist(folder, before)
    data = m.load_mnist(folder)
    assert same(data, before) and data.name == "fashion"
    assert data.notes[0] == f"Read QMNIST from {folder}."
    (folder / "qmnist-test-labels-idx2-int").unlink()
    assert "lacks the test labels of QMNIST" in error_of(folder)


def test_another_set_in_the_default_folder_is_refused(root, folder, before):
    write_qmnist(folder, before)
    shutil.copytree(folder, root / "data", dirs_exist_ok=True)
    assert "keep another data set in another --data-dir" in error_of("data")


def test_emnists_images_are_turned(folder, before):
    remove_files(folder)
    for part in ("train", "test"):
        images, labels = getattr(before, f"{part}_images"), getattr(before, f"{part}_labels")
        name = folder / "raw" / f"emnist-digits-{part}"  # in torchvision's folder
        name.parent.mkdir(exist_ok=True)
        name.with_name(f"{name.name}-images-idx3-ubyte").write_bytes(idx(images.swapaxes(1, 2)))
        name.with_name(f"{name.name}-labels-idx1-ubyte").write_bytes(idx(labels))
    data = m.load_mnist(folder)
    assert same(data, before) and "EMNIST digits" in data.notes[0] and "turned" in data.notes[1]


# ── Downloading ───────────────────────────────────────────────────────────────────────────────────


def test_a_download_takes_the_first_mirror_that_sends_the_right_bytes(
    tmp_path, mirrors, small_mnist
):
    answers, asked = mirrors
    serve(answers, small_mnist, mirror=1)
    for url, right in list(answers.items()):
        cut = right[: len(right) // 2]
        answers[url.replace(mnist.MIRRORS[1], mnist.MIRRORS[0])] = cut
    (tmp_path / "new").mkdir()
    data = m.load_mnist(tmp_path / "new")
    assert data.name == "MNIST" and not data.notes and len(asked) == 8
    for name in NAMES:
        content = (tmp_path / "new" / f"{name}.gz").read_bytes()
        assert content == answers[f"{mnist.MIRRORS[1]}{name}.gz"]
    assert len(os.listdir(tmp_path / "new")) == 4


def test_a_mirror_may_send_a_file_unpacked(tmp_path, mirrors, small_mnist):
    for name in NAMES:
        mirrors[0][f"{mnist.MIRRORS[0]}{name}.gz"] = small_mnist[name]
    (tmp_path / "new").mkdir()
    assert m.load_mnist(tmp_path / "new").name == "MNIST"
    assert sorted(os.listdir(tmp_path / "new")) == sorted(NAMES)
    assert mnist.MAX_DOWNLOAD > 47_040_016  # bytes of the largest


def test_wrong_bytes_from_every_mirror_are_never_kept(tmp_path, mirrors):
    for mirror in range(2):
        serve(mirrors[0], {IMAGES: idx(np.zeros((60, 28, 28)))}, mirror)
    assert "its bytes are not MNIST's" in error_of(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_mirror_that_trickles_is_given_up(tmp_path, mirrors, monkeypatch):
    answers, asked = mirrors
    for mirror in range(2):
        serve(answers, {IMAGES: b"slow"}, mirror)
    # Each question takes so long:
    monkeypatch.setattr(mnist.time, "monotonic", lambda: 1000.0 * len(asked))
    assert "not whole after 300 seconds" in error_of(tmp_path)
    assert len(asked) == 2 and not any(tmp_path.iterdir())


def test_a_mirror_that_never_ends_is_given_up(tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(mnist, "MAX_DOWNLOAD", 1000)
    serve(mirrors[0], {IMAGES: os.urandom(2000)})
    assert "it sends too much" in error_of(tmp_path)


@pytest.mark.parametrize("other_program", [False, True])
def test_a_download_that_cannot_be_kept_is_used_all_the_same(
    tmp_path, mirrors, small_mnist, monkeypatch, other_program
):
    """Said unless another program has put the file there at the same moment."""

    def fails(path, content):
        if other_program:
            path.write_bytes(content)
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(mnist, "write_file", fails)
    serve(mirrors[0], small_mnist)
    (tmp_path / "new").mkdir()
    data = m.load_mnist(tmp_path / "new")
    assert data.name == "MNIST" and len(data.notes) == (0 if other_program else 4)
    assert other_program or "cannot be kept for the next time (Read-only" in data.notes[0]


def test_a_file_that_was_downloaded_is_written_whole_or_not_at_all(tmp_path, mirrors, small_mnist):
    """What a killed download leaves is in nobody's way."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"{IMAGES}.gz.part").write_bytes(b"half")
    serve(mirrors[0], small_mnist)
    assert m.load_mnist(tmp_path / "new").name == "MNIST"
    assert not list((tmp_path / "new").glob("*.part"))
