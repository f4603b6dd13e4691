"""The steps in evolution/: their gradients, and their training through the main script's loop."""

import dataclasses
import importlib
import json
import math

import numpy as np
import pytest
from programs import few_digits, metrics_of, start, write_metrics

import mnist_resnet9 as m

FOLDER = m.ROOT / "evolution"
SCRIPTS = sorted(FOLDER.glob("step[0-9]_*.py"))
FEW = "--train-images 1024 --epochs-max 2 --learning-rate 3e-3 --channels 4,8,8,8".split()
FEW += ["--data-dir", few_digits(), "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def steps_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def step(request):
    """The module of a step."""
    return importlib.import_module(request.param.stem)


def train(step, save, *flags, **fixed):
    """A run of a step with these flags, in this process. Returns the exit status."""
    flags, number = [*FEW, "--save-dir", str(save), *flags], int(step.__name__[4])
    return step.run_step(number, step.ADDS, step.layers, flags, **fixed)


def made_up_run(folder, accuracies, data="0", **settings):
    """What a comparison reads of a run: its metrics, its data and its settings. Returns the
    folder."""
    folder.mkdir()
    rows = [[epoch, 1e-3, 1, 0.5, 1, accuracy, 1, 1] for epoch, accuracy in enumerate(accuracies)]
    write_metrics(folder, rows)
    settings = dataclasses.asdict(m.Settings(tag=folder.name, **settings))
    config = {"settings": settings, "data": {"sha256": {"train": data}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_no_step_is_missing():
    """The other tests take what the folder holds, and would pass on an empty one."""
    assert [path.name[:5] for path in SCRIPTS] == [f"step{i}" for i in range(1, 6)]


def test_gradient_agrees_with_central_differences(step, rng):
    # Sixteen channels, since where all of a few are dead, neighbours tie in a pooling window.
    settings = m.Settings(channels=(2, 16, 16, 16), threads=1)
    images, labels = rng.integers(0, 256, (3, 28, 28)).astype(np.uint8), rng.integers(0, 10, 3)
    params = m.init_params(settings, np.float64, network=step.layers)
    # Biases and weights that begin with 0 are moved off it, too.
    params.flat += 0.01 * rng.standard_normal(params.flat.size)

    def loss_and_gradients():
        return m.loss_and_gradients(params, images, labels, settings, network=step.layers)

    loss, gradients = loss_and_gradients()
    assert gradients.flat.dtype == np.float64 and gradients.keys() == params.keys()
    for name in params:
        direction = rng.standard_normal(params[name].shape)
        nudge = 1e-6 / np.linalg.norm(direction) * direction
        params[name] += nudge
        above = loss_and_gradients()[0]
        params[name] -= 2 * nudge
        below = loss_and_gradients()[0]
        params[name] += nudge
        along = (gradients[name] * nudge).sum()
        assert (above - below) / 2 == pytest.approx(along, rel=1e-4, abs=1e-11), name


def test_parameters_and_activations_stay_float32(step, sample):
    settings = m.Settings(threads=1)
    params = m.init_params(settings, network=step.layers)
    images, labels = sample.train_images[:64], sample.train_labels[:64]
    loss, gradients = m.loss_and_gradients(params, images, labels, settings, network=step.layers)
    assert params.flat.dtype == gradients.flat.dtype == loss.dtype == np.float32
    assert loss == pytest.approx(math.log(10), abs=0.6)


def test_steps_4_and_5_are_resnet9_without_dropout(sample):
    for script, pool in ((SCRIPTS[3], "avg"), (SCRIPTS[4], "max")):
        network = importlib.import_module(script.stem).layers
        settings = m.Settings(pool=pool, dropout=0.0, threads=1)
        params = m.init_params(settings, np.float64, network)
        batch = sample.train_images[:2], sample.train_labels[:2]
        loss, gradients = m.loss_and_gradients(params, *batch, settings, network=network)
        resnet9_loss, resnet9_gradients = m.loss_and_gradients(params, *batch, settings)
        assert loss == pytest.approx(resnet9_loss, rel=1e-12)
        np.testing.assert_allclose(gradients.flat, resnet9_gradients.flat, rtol=1e-9, atol=1e-14)


def test_a_step_trains_with_the_same_flags_and_can_be_continued(step, tmp_path, capsys):
    for _ in range(2):  # the second time it is finished, and says so
        assert train(step, tmp_path) == 0
    out = capsys.readouterr().out
    folder = tmp_path / f"evolution_{step.__name__[4]}"
    rows = metrics_of(folder)
    assert len(rows) == 3 and rows[-1, 5] > 0.6 and rows[-1][2] < rows[0][2]
    assert step.ADDS in out and "is finished" in out
    assert f"test accuracy {rows[-1][5]:.2%} after epoch 2" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["dropout"] == 0 and config["settings"]["learning_rate"] == 3e-3
    code = folder / "code" / "evolution"
    assert (code / f"{step.__name__}.py").is_file() and (code / "steps.py").is_file()


def test_a_step_is_compared_with_the_one_before(tmp_path):
    steps = importlib.import_module("steps")
    first = made_up_run(tmp_path / "1", [0.1, 0.90, 0.91])
    second = made_up_run(tmp_path / "2", [0.1, 0.95, 0.97, 0.98])
    line = steps.what_it_bought(2, second, first)
    assert "97.00% after epoch 2" in line
    assert "+6.00 percentage points on step 1, which had 91.00%" in line
    alone = "Step 1: test accuracy 91.00% after epoch 2."
    assert steps.what_it_bought(1, first, tmp_path / "0") == alone


def test_a_step_on_other_data_is_not_compared(tmp_path):
    steps = importlib.import_module("steps")
    first, second = (made_up_run(tmp_path / name, [0.9], data=name) for name in "12")
    alone = "Step 2: test accuracy 90.00% after epoch 0."
    assert steps.what_it_bought(2, second, first) == alone
    for damaged in ("{", "[]", '{"data": 1}'):
        (first / "config.json").write_text(damaged)
        assert steps.what_it_bought(2, second, first) == alone


OTHER = {
    "learning_rate": 0.01,
    "batch_size": 32,
    "seed": 1,
    "optimizer": "sgd",
    "train_images": 100,
    "augment": 1.0,
    "schedule": "one_cycle",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_step_with_other_settings_is_not_compared(name, tmp_path):
    steps = importlib.import_module("steps")
    first = made_up_run(tmp_path / "1", [0.9])
    second = made_up_run(tmp_path / "2", [0.95], **{name: OTHER[name]})
    alone = "Step 2: test accuracy 95.00% after epoch 0."
    assert steps.what_it_bought(2, second, first) == alone


def test_a_step_is_compared_whatever_has_no_part_in_it(tmp_path):
    """Where it was computed; how long, if the rate is constant; and what only one step can vary."""
    steps = importlib.import_module("steps")
    elsewhere = {"device": "cpu", "threads": 1, "data_dir": "x", "save_dir": "y"}
    whole = {"schedule": "one_cycle"}
    for number, one, two, compared in [
        (2, {}, {**elsewhere, "epochs_max": 3}, True),
        (5, {"pool": "avg"}, {"pool": "max"}, True),
        (4, {}, {"channels": (4, 8, 8, 8)}, True),
        (5, {}, {"channels": (4, 8, 8, 8)}, False),
        (2, whole, {**whole, "epochs_max": 3}, False),
    ]:
        before = made_up_run(tmp_path / f"{number}{compared}-", [0.9], **one)
        folder = made_up_run(tmp_path / f"{number}{compared}", [0.95], **two)
        line = steps.what_it_bought(number, folder, before)
        assert ("+5.00 percentage points" in line) == compared


def test_channels_are_not_those_of_a_step_without_resnet9(tmp_path, capsys):
    step = importlib.import_module("step1_softmax_regression")
    assert train(step, tmp_path, "--epochs-max", "1", "--channels", "2,4,4,4") == 0
    assert "Step 1 has channels (4, 16, 32, 64), whatever" in capsys.readouterr().out
    assert train(step, tmp_path, "--epochs-max", "1", "--pool", "avg") == 0


def test_what_a_step_has_of_its_own_no_flag_changes(tmp_path, capsys):
    step = importlib.import_module("step4_residual_network")
    flags = "--epochs-max 1 --pool max --channels 2,4,4,4".split()
    assert train(step, tmp_path, *flags, pool="avg") == 0
    assert "Step 4 has pool avg, whatever is asked for." in capsys.readouterr().out
    config = json.loads((tmp_path / "evolution_4" / "config.json").read_text())
    assert config["settings"]["pool"] == "avg" and config["settings"]["dropout"] == 0


def test_run_as_a_script_from_another_folder(tmp_path):
    result = start(SCRIPTS[0], *FEW, "--save-dir", "runs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "evolution_1" / "metrics.csv").is_file()
    result = start(SCRIPTS[0], *FEW, "--epochs", "3", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--epochs-max" in result.stderr
