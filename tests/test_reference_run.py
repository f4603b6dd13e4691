"""The run in git, save/record/: whole, of this machine or any other, and what plot_figs.py makes of
it."""

import json
import re

import numpy as np
import pytest

import mnist_resnet9 as m
import plot_figs
from support.checkpoints import read_arrays, read_history
from support.runs import read_run

RECORD = m.ROOT / "save" / "record"


@pytest.fixture(scope="module")
def run():
    return read_run(RECORD, m.Settings)


def test_its_files_belong_together(run):
    history = read_history(read_arrays(RECORD / "checkpoint_last.npz"))
    assert len(history) == run.settings.epochs_max + 1 == len(run.metrics["epoch"])
    accuracies = [row["test_accuracy"] for row in history]
    np.testing.assert_allclose(accuracies, run.metrics["test_accuracy"])
    with np.load(RECORD / "predictions.npz") as file:
        labels, predictions, probabilities = (
            file[name] for name in ("labels", "predictions", "probabilities")
        )
    accuracy = (predictions == labels).mean()
    assert accuracy == pytest.approx(run.metrics["test_accuracy"][-1]) and len(labels) == 10_000
    assert np.array_equal(predictions, probabilities.argmax(axis=1))
    assert f"{accuracy:.2%} at the last epoch" in (RECORD / "log.txt").read_text().splitlines()[-1]


def test_it_names_no_folder_of_the_machine_that_it_was_made_on():
    settings = json.loads((RECORD / "config.json").read_text())["settings"]
    assert (settings["data_dir"], settings["save_dir"], settings["tag"]) == (
        "data",
        "save",
        "record",
    )
    text = "".join(
        (RECORD / name).read_text() for name in ("config.json", "log.txt", "metrics.csv")
    )
    assert not re.search(r"(?<![\w.])(/\w|[A-Z]:\\)", text)  # no absolute path


def test_it_reads_digits_that_it_was_trained_on(run, sample):
    """The sample's images are training images of MNIST, so nearly all must be right, and surely
    so."""
    params = m.load_weights(RECORD / "checkpoint_last.npz", run.settings)
    loss, accuracy, _ = m.evaluate(
        params, sample.train_images[:1000], sample.train_labels[:1000], run.settings
    )
    assert accuracy > 0.99 and loss == pytest.approx(run.metrics["train_loss"][-1], abs=0.02)


def test_its_figures_need_the_data_of_the_run(capsys, tmp_path, monkeypatch):
    # The curves need no data, so they are drawn before it is found to be another set.
    monkeypatch.setattr(plot_figs, "write_file", lambda path, data: None)
    assert plot_figs.main(["record", "--data-dir", str(m.ROOT / "data" / "sample")]) == 2
    error = capsys.readouterr().err
    assert "record ran on MNIST, but" in error and error.count("\n") == 1
