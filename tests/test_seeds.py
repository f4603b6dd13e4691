"""accuracy/seeds.py: mean and standard deviation, and runs that do not belong together."""

import numpy as np
import pytest

import mnist_resnet9 as m
from benchmarks.accuracy.seeds import summary
from support.runs import Run


def run_of(accuracy, epochs=3, hashes=None, **settings):
    metrics = {
        "epoch": np.arange(epochs + 1),
        "test_accuracy": np.linspace(0.1, accuracy, epochs + 1),
    }
    return Run(m.ROOT / "x", m.Settings(epochs_max=3, **settings), "MNIST", hashes, metrics)


def test_it_takes_the_last_epoch_of_each_seed():
    runs = [run_of(0.99, seed=1, tag="a"), run_of(0.992, seed=2, threads=1), run_of(0.997, seed=3)]
    assert summary(runs) == "99.00, 99.20, 99.70 %: 99.300 ± 0.361 % over 3 seeds"


@pytest.mark.parametrize(
    "other",
    [
        {"dropout": 0.5, "seed": 1},
        {"seed": 0},
        {"seed": 1, "epochs": 2},
        {"seed": 1, "epochs": 4},
        {"seed": 1, "hashes": {"train": "0"}},
    ],
)
def test_runs_that_do_not_belong_together_are_refused(other):
    with pytest.raises(m.UserError):
        summary([run_of(0.99), run_of(0.99, **other)])
