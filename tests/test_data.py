"""Finding, checking and downloading the data. Nothing here reaches a network: the mirrors are
replaced."""

import gzip
import io
import os
import shutil
import urllib.error

import numpy as np
import pytest

import mnist_resnet9 as m
from support import mnist

NAMES = [file.name for file in mnist.FILES.values()]


def idx(array):
    magic = 0x803 if array.ndim == 3 else 0x801
    return np.array([magic, *array.shape], ">i4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A data set of another origin: random images in MNIST's format."""
    folder, rng = tmp_path / "fashion", np.random.default_rng(0)
    folder.mkdir()
    for part, N in (("train", 30), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (N, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, N)))
    return folder


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

    monkeypatch.setattr(mnist.urllib.request, "urlopen", urlopen)
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
    "content", [b"<html>not found</html>", gzip.compress(b"\0" * 10000)[:-20], b""]
)
def test_a_gz_file_that_is_no_whole_gzip_is_refused(folder, content):
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(content)
    with pytest.raises(m.UserError, match=f"{IMAGES}.gz is"):
        m.load_mnist(folder)


def test_a_gzip_bomb_is_read_no_further_than_its_header_allows(folder):
    (folder / LABELS).unlink()
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.zeros(30)) + b"\0" * 10**8))
    with pytest.raises(m.UserError, match="bytes after its end"):
        m.load_mnist(folder)


def test_a_changed_pixel_in_known_data_is_refused(tmp_path):
    shutil.copytree(m.ROOT / "data" / "sample", tmp_path / "copy")
    path = tmp_path / "copy" / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[5000] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(
        m.UserError, match="train-images-idx3-ubyte should have MNIST sample's contents"
    ):
        m.load_mnist(tmp_path / "copy")


def test_an_incomplete_foreign_set_is_not_completed_with_mnist(folder, mirrors):
    (folder / LABELS).unlink()
    with pytest.raises(m.UserError, match=f"lacks {LABELS}"):
        m.load_mnist(folder)
    assert not mirrors[1]


def test_without_files_and_network_the_sample_serves_and_says_so(tmp_path):
    data = m.load_mnist(tmp_path / "new")
    assert (
        data.name == "MNIST sample"
        and "NOT MNIST" in data.notes[0]
        and "no network" in data.notes[0]
    )
    assert not any((tmp_path / "new").iterdir())


def test_a_download_takes_the_first_mirror_that_sends_the_right_bytes(
    tmp_path, mirrors, monkeypatch
):
    monkeypatch.setattr(
        mnist, "FILES", {role: f._replace(mnist=f.sample) for role, f in mnist.FILES.items()}
    )
    answers, asked = mirrors
    for name in NAMES:
        right = (m.ROOT / "data" / "sample" / f"{name}.gz").read_bytes()
        answers[f"{mnist.MIRRORS[0]}{name}.gz"] = right[: len(right) // 2]
        answers[f"{mnist.MIRRORS[1]}{name}.gz"] = right
    data = m.load_mnist(tmp_path)
    assert data.name == "MNIST" and len(asked) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.gz" for name in NAMES)


def test_wrong_bytes_from_every_mirror_never_get_the_final_name(tmp_path, mirrors):
    for mirror in mnist.MIRRORS:
        mirrors[0][f"{mirror}{IMAGES}.gz"] = gzip.compress(idx(np.zeros((60, 28, 28))))
    assert m.load_mnist(tmp_path).name == "MNIST sample"
    assert not any(tmp_path.iterdir())


def test_a_mirror_that_trickles_is_given_up(tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(
        mnist, "FILES", {role: f._replace(mnist=f.sample) for role, f in mnist.FILES.items()}
    )
    answers, asked = mirrors
    for name in NAMES:
        for mirror in mnist.MIRRORS:
            answers[f"{mirror}{name}.gz"] = (m.ROOT / "data" / "sample" / f"{name}.gz").read_bytes()
    monkeypatch.setattr(
        mnist.time, "monotonic", lambda: 1000.0 * len(asked)
    )  # each question takes so long
    assert "not whole after 300 seconds" in m.load_mnist(tmp_path).notes[0]
    assert len(asked) == 2 and not any(tmp_path.iterdir())


def test_two_programs_that_download_at_once_both_get_the_file(tmp_path, mirrors, monkeypatch):
    file = mnist.FILES["test_labels"]._replace(mnist=mnist.FILES["test_labels"].sample)
    right = (m.ROOT / "data" / "sample" / f"{file.name}.gz").read_bytes()
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
    m.load_mnist(tmp_path)
    assert not old.exists() and new.exists()
