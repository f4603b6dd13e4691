"""accuracy/seeds.py: mean and standard deviation, and runs that do not belong together."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from programs import write_metrics

import mnist_resnet9 as m
from benchmarks.accuracy import seeds
from support.checkpoints import pack_checkpoint


@pytest.fixture
def made(tmp_path, capsys):
    """Makes runs, all of them finished, and returns what seeds.py says about them."""

    def run_of(tag, accuracy=0.99, epochs=3, hashes=None, params=None, weights=None, **settings):
        folder = tmp_path / tag
        folder.mkdir()
        settings = asdict(m.Settings(epochs_max=3, tag=tag, **settings))
        if weights is not None:
            settings["weights"] = weights
        config = {"settings": settings, "data": {"name": "MNIST", "sha256": hashes or {}}}
        (folder / "config.json").write_text(json.dumps(config))
        accuracies = np.linspace(0.1, accuracy, epochs + 1)
        rows = [[epoch, 1e-3, 1, 0.5, 1, a, 1, 1] for epoch, a in enumerate(accuracies)]
        write_metrics(folder, rows)
        if params != {}:
            packed = pack_checkpoint(params or {"fc9.bias": np.zeros(10)}, 0, [], {})
            (folder / "checkpoint_last.npz").write_bytes(packed)

    def say(**runs):
        for tag, given in runs.items():
            run_of(tag, **given)
        status = m.main([*runs, "--save-dir", str(tmp_path)], seeds.main)
        out, err = capsys.readouterr()
        assert (status, err.count("\n"), out.count("\n")) in [(0, 0, 1), (2, 1, 0)]
        return out or err

    return say


def test_it_takes_the_last_epoch_of_each_seed(made):
    said = made(
        a={"accuracy": 0.99, "seed": 1},
        b={"accuracy": 0.992, "seed": 2, "threads": 1, "weights": ""},
        c={"accuracy": 0.997, "seed": 3},
    )
    assert said == "99.00, 99.20, 99.70 %: 99.300 ± 0.361 % over 3 seeds\n"


OTHERS = {
    "same experiment": [{"dropout": 0.5, "seed": 1}, {"seed": 0}],
    "should have done 3": [{"seed": 1, "epochs": 2}, {"seed": 1, "epochs": 4}],
    "same data": [{"seed": 1, "hashes": {"train": "0"}}],
    "same network": [
        {"seed": 1, "params": {"linear.bias": np.zeros(10)}},
        {"seed": 1, "params": {"fc9.bias": np.zeros(20)}},
        {"seed": 1, "params": {"fc9.bias": np.zeros(10), "conv1.bias": np.zeros(4)}},
        {"seed": 1, "params": {"fc9.bias": np.zeros(10), "norm2.gain": np.ones(4)}},
    ],
    "same weights": [{"seed": 1, "weights": "save/other/checkpoint_last.npz"}],
    "no checkpoint_last.npz": [{"seed": 1, "params": {}}],
}


@pytest.mark.parametrize(
    "said, other", [(said, other) for said, others in OTHERS.items() for other in others]
)
def test_runs_that_do_not_belong_together_are_refused(said, other, made):
    assert said in made(a={}, b=other)


def test_steps_of_the_evolution_are_told_apart(tmp_path, monkeypatch, capsys):
    """Their settings are the same, and so may be their tags but for a number."""
    monkeypatch.syspath_prepend(str(m.ROOT / "evolution"))
    import step1_softmax_regression as one
    import step2_multilayer_perceptron as two

    flags = "--device cpu --threads 1 --epochs-max 1 --train-images 64".split()
    flags += ["--data-dir", "data/sample", "--save-dir", str(tmp_path)]
    for number, step in enumerate((one, one, two), start=1):
        mine = [*flags, "--tag", f"mine_{number}", "--seed", str(number)]
        assert step.run_step(int(step.__name__[4]), step.ADDS, step.layers, mine) == 0
    capsys.readouterr()
    assert m.main(["mine_1", "mine_2", "--save-dir", str(tmp_path)], seeds.main) == 0
    assert "over 2 seeds" in capsys.readouterr().out
    assert m.main(["mine_1", "mine_3", "--save-dir", str(tmp_path)], seeds.main) == 2
    assert "the same network" in capsys.readouterr().err
