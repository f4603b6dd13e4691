"""benchmarks/shifts.py: images move by a pixel, and a run is read once and five times."""

import numpy as np
import pytest

import mnist_resnet9 as m
from benchmarks import shifts


@pytest.mark.parametrize("down, right", shifts.SHIFTS)
def test_an_image_moves_and_zeros_come_in(rng, down, right):
    images = rng.integers(1, 256, (2, 28, 28)).astype(np.uint8)
    moved = shifts.shifted(images, down, right)
    assert moved.shape == images.shape
    for h in range(28):
        for w in range(28):
            inside = 0 <= h - down < 28 and 0 <= w - right < 28
            assert (moved[:, h, w] == (images[:, h - down, w - right] if inside else 0)).all()


def test_it_names_a_run_that_is_not_there(capsys):
    assert m.main(["no_such_run"], shifts.main) == 2
    assert "no_such_run" in capsys.readouterr().err
