"""accuracy/compare_settings.py holds out what it says, and never looks at the test images."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import mnist_resnet9 as m

sys.path.insert(0, str(m.ROOT / "benchmarks" / "accuracy"))

import compare_settings


def test_folds_are_disjoint_and_cover_the_training_images(monkeypatch, sample):
    monkeypatch.setattr(compare_settings, "HELD_OUT", 1000)
    images = sample.train_images.reshape(4000, -1)
    held = []
    for fold in range(4):
        part = compare_settings.hold_out(sample, fold)
        assert len(part.train_images) == len(part.train_labels) == 3000
        both = np.concatenate([part.train_images, part.test_images]).reshape(4000, -1)
        assert sorted(map(bytes, both)) == sorted(map(bytes, images))
        held.append(part.test_labels)
        assert np.array_equal(part.test_images, sample.train_images[3000 - 1000 * fold :][:1000])
    assert np.array_equal(np.concatenate(held[::-1]), sample.train_labels)


def test_halves_are_disjoint_and_mixed(sample):
    first, second = (compare_settings.hold_out(sample, fold, halves=True) for fold in (0, 1))
    assert np.array_equal(first.train_images, second.test_images)
    assert np.array_equal(first.test_labels, second.train_labels)
    both = np.concatenate([first.train_images, first.test_images]).reshape(4000, -1)
    images = sample.train_images.reshape(4000, -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, images))
    for half in (sample.train_images[:2000], sample.train_images[2000:]):
        assert not np.array_equal(first.train_images, half)


def test_the_loss_is_that_of_the_best_temperature(rng):
    logits = rng.standard_normal((500, 10))
    probs, _ = m.softmax(logits)
    labels = np.array([rng.choice(10, p=p) for p in probs])  # so the best temperature is 1
    softer, _ = m.softmax(logits / 2)
    expected, _ = m.cross_entropy_loss(logits, labels)
    assert compare_settings.best_loss(softer, labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
def test_a_row_for_each_set_of_flags(monkeypatch, sample, capsys):
    few = {name: getattr(sample, name)[:1000] for name in ("train_images", "train_labels")}
    monkeypatch.setattr(m, "load_mnist", lambda folder: replace(sample, **few))
    monkeypatch.setattr(compare_settings, "HELD_OUT", 200)
    flags = "--device cpu --threads 1 --channels 2,4,4,4 --epochs-max 1"
    assert m.main(["--folds", "2", flags, f"{flags} --dropout 0"], compare_settings.compare) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| flags | held-out errors") and len(rows) == 2
    for row in rows:
        _, _, errors, loss, *_ = row.split("|")
        first, second = errors.split(":")[0].split(",")
        assert 0 < int(first) < 200 and 0 < int(second) < 200 and 0 < float(loss) < 3
    assert m.main(["--folds", "7", flags], compare_settings.compare) == 2
    monkeypatch.setattr(compare_settings, "HELD_OUT", 500)  # all 1,000 in two folds, but not three
    assert m.main(["--folds", "2", flags], compare_settings.compare) == 0
    assert m.main(["--folds", "3", flags], compare_settings.compare) == 2
    assert m.main(["--folds", "3", "--halves", flags], compare_settings.compare) == 2
    assert m.main(["--folds", "1", "--halves", flags], compare_settings.compare) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert 0 < int(row.split("|")[2].split(":")[0]) < 500


BAD = {
    "two images too few": (["--folds", "6", ""], "6 folds hold out 60,000 images"),
    "an open quote": (["", "--tag 'x"], "cannot be read"),
    "a typo in the last": (["", "--dropuot 0"], "--dropuot"),
    "other data": (["--data-dir data/sample"], "--data-dir should stand beside"),
    "held out twice": (["--validation-images 100"], "the folds hold images out"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_said_before_anything_is_trained(name, monkeypatch, sample, capsys):
    monkeypatch.setattr(m, "load_mnist", lambda folder: sample)
    arguments, said = BAD[name]
    assert m.main(arguments, compare_settings.compare) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out
