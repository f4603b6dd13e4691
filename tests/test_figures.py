"""plot_figs.py: what it draws from whole runs, unfinished ones and damaged ones, and what it says to the user."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

import files
import mnist_resnet9 as m  # noqa: E402
import plot_figs  # noqa: E402

SCRIPT = Path(plot_figs.__file__)
SAMPLE = str(SCRIPT.parent / "data" / "sample")
DPI = 60
ALL = ["curves.png", "confusion.png", "failures.png", "filters.png"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run of one epoch on a few images of the sample. Tests copy it."""
    save = tmp_path_factory.mktemp("trained")
    arguments = "--tag real --train-images 128 --epochs-max 1 --channels 4,4,4,4 --device cpu --threads 2".split()
    assert m.main([*arguments, "--data-dir", SAMPLE, "--save-dir", str(save)]) == 0
    return save / "real"


@pytest.fixture
def save(tmp_path, trained, monkeypatch):
    """A save folder with that run in it, on a machine without a screen. Few failures, few dots: it saves time."""
    monkeypatch.setattr(plot_figs, "FAILURES_SHOWN", 12)
    monkeypatch.setitem(plot_figs.STYLE, "savefig.dpi", DPI)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(trained, tmp_path / "save" / "real")
    return tmp_path / "save"


def draw(save, *tags):
    return plot_figs.main([*tags, "--save-dir", str(save), "--data-dir", SAMPLE])


def add_run(save, tag, epochs=3, without=(), **config):
    """A copy of the real run, with a made-up history and without some of its files."""
    shutil.copytree(save / "real", save / tag, ignore=shutil.ignore_patterns("*.png", *without))
    if "metrics.csv" not in without:
        accuracy = 1 - 0.9 / (1 + np.arange(epochs + 1)) ** 1.1
        rows = [
            [i, 1e-4, 2.3 / (i + 1) ** 2, a, 2.3 / (i + 1), a, 1.0, 100.0]
            for i, a in enumerate(accuracy)
        ]
        files.write_metrics(save / tag / "metrics.csv", rows)
    path = save / tag / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return save / tag


def picture(path):
    """The picture, which is not blank and of a sensible size: (height, width, 3) in 0…1."""
    image = plt.imread(path)[..., :3]
    height, width = image.shape[0] / DPI, image.shape[1] / DPI  # in inches
    assert 5 <= width <= 24 and 0.5 <= height <= 18, (
        f"{path.name} is {width:.1f} by {height:.1f} inches"
    )
    inked = (image.min(axis=2) < 0.9).mean()
    assert 0.005 < inked < 0.9, f"{path.name}: {inked:.1%} of it is not white"
    border = np.concatenate(
        [image[:2].ravel(), image[-2:].ravel(), image[:, :2].ravel(), image[:, -2:].ravel()]
    )
    assert border.min() > 0.5, f"{path.name} is cut off at its border"
    return image


def texts(figure):
    """All that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def error_of(capsys):
    """The error, which has to be one line."""
    error = capsys.readouterr().err
    assert (
        error.startswith("plot_figs.py: ") and error.count("\n") == 1 and "Traceback" not in error
    ), error
    return error


def answers_with(sample, count):
    """Predictions of which `count` are wrong, and probabilities that go with them."""
    rng = np.random.default_rng(count)
    labels = np.resize(sample.test_labels, max(count, 1000) * 2)
    wrong = rng.choice(len(labels), count, replace=False)
    predictions = labels.astype(int)
    predictions[wrong] = (predictions[wrong] + rng.integers(1, 10, count)) % 10
    probabilities = rng.dirichlet(np.full(10, 0.2), len(labels))
    best = probabilities.argmax(axis=1)
    rows = np.arange(len(labels))
    swapped = probabilities[rows, predictions]
    probabilities[rows, predictions], probabilities[rows, best] = probabilities.max(axis=1), swapped
    return np.resize(sample.test_images, (len(labels), 28, 28)), labels, predictions, probabilities


@pytest.fixture
def run(save):
    return plot_figs.read_run(save / "real")


# ── Whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_of_one_epoch_gives_all_four_figures(save, capsys):
    assert draw(save, "real") == 0
    assert capsys.readouterr().out.splitlines() == [str(save / "real" / name) for name in ALL]
    for name in ALL:
        picture(save / "real" / name)
    assert not list(save.glob("**/*.part"))


def test_without_a_screen_from_another_folder(save):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    folder = add_run(
        save, "bare", without=("predictions.npz",)
    )  # whose failures would take long to draw
    command = [sys.executable, SCRIPT, "bare", "--save-dir", save.name, "--data-dir", SAMPLE]
    done = subprocess.run(
        command, cwd=save.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in folder.glob("*.png")} == {"curves.png", "filters.png"}


def test_import_does_nothing():
    code = "import matplotlib; b = dict(matplotlib.rcParams); import plot_figs; assert dict(matplotlib.rcParams) == b"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_runs_side_by_side(save, capsys):
    tags = ["a", "b"]
    for tag, epochs in zip(tags, (1, 200)):
        add_run(save, tag, epochs, without=("*.npz",))
    assert draw(save, *tags, tags[0]) == 0  # a tag given twice counts once
    joint, alone = save / "a" / "curves_a_b.png", [save / tag / "curves.png" for tag in tags]
    assert capsys.readouterr().out.splitlines()[0] == str(joint)
    for path in (joint, *alone):
        picture(path)
    assert sorted(save.glob("*/*.png")) == sorted([joint, *alone])


def test_overlay_has_all_accuracies_in_one_panel(save, capsys):
    for tag, epochs in (("one", 3), ("two", 30), ("not_begun", 0)):
        add_run(save, tag, epochs, without=("*.npz",) if epochs else ("*.npz", "metrics.csv"))
    assert draw(save, "--overlay", "real", "one", "two", "not_begun") == 0
    path = save / "real" / "test_accuracy_real_one_two.png"
    assert capsys.readouterr().out.splitlines() == [str(path)] and list(save.glob("*/*.png")) == [
        path
    ]
    picture(path)
    runs = [plot_figs.read_run(save / tag) for tag in ("one", "two")]
    figure = plot_figs.draw_overlay(runs)
    (ax,) = figure.axes
    for line, run in zip(ax.lines, runs, strict=True):
        assert np.array_equal(
            line.get_xydata().T, [run.metrics["epoch"], run.metrics["test_accuracy"]]
        )
        assert run.title()[:20] in texts(
            figure
        ) and f"{run.metrics['test_accuracy'][-1]:.2%}" in texts(figure)
    plt.close(figure)


def test_another_network_has_filters_of_another_size_or_none(save, sample, capsys):
    folder = save / "real"
    for names, said in (
        (("conv1.weight", "conv1.bias"), "filters.png"),
        ((), "without convolutions"),
    ):
        arrays = {
            "conv1.weight": np.ones((5, 5, 1, 8), np.float32),
            "conv1.bias": np.zeros(8, np.float32),
        }
        files.save_arrays(
            folder / "checkpoint_last.npz",
            **{name: arrays[name] for name in names},
            step=np.int64(0),
        )
        assert draw(save, "real") == 0
        assert said in capsys.readouterr().out.splitlines()[-1]
    picture(folder / "filters.png")


def test_curves_have_equal_axes_and_mark_best_and_last(save):
    add_run(save, "long", epochs=200)
    runs = [plot_figs.read_run(save / tag) for tag in ("real", "long")]
    runs[1].metrics["test_accuracy"][150] = 0.9999
    figure = plot_figs.draw_curves(runs)
    axes = np.reshape(figure.axes, (3, 2))
    for left, right in axes:
        assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim() == (
            0,
            200,
        )
    marked = [text.get_text() for text in axes[2, 1].get_legend().get_texts()]
    assert marked == ["last: 99.74%\nepoch 200", "best: 99.99%\nepoch 150"]
    plt.close(figure)


def test_the_accuracy_axis_tells_99_0_from_99_6(save):
    add_run(save, "long", epochs=200)
    figure = plot_figs.draw_curves([plot_figs.read_run(save / "long")])
    figure.canvas.draw()
    for ax in figure.axes[1:]:
        (_, low), (_, high) = ax.transData.transform([(0, 0.990), (0, 0.996)])
        assert (high - low) / ax.bbox.height > 0.1
        labels = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert len(labels) > 3 and not any(a.overlaps(b) for a, b in zip(labels, labels[1:]))
    plt.close(figure)


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 1.0])
def test_curves_of_a_run_that_does_not_change(run, accuracy):
    metrics = run.metrics | {"train_accuracy": np.full(2, accuracy), "test_accuracy": np.full(2, accuracy),
                             "train_loss": np.array([2.3, 0.0])}  # fmt: skip
    figure = plot_figs.draw_curves([run._replace(metrics=metrics)])
    figure.canvas.draw()
    assert f"{accuracy:.2%}" in texts(figure)
    plt.close(figure)


def test_a_long_tag_is_wrapped(save):
    tag = "a-tag-of-100-letters" * 5
    add_run(save, tag)
    assert draw(save, tag) == 0
    pictures = list(save.glob("*/*.png"))
    assert len(pictures) == 4
    for path in pictures:
        picture(path)


# ── Images ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, 5, 60, 1500])
def test_failures_stay_readable(run, sample, tmp_path, count, monkeypatch):
    monkeypatch.setattr(plot_figs, "FAILURES_SHOWN", 200)
    answers = answers_with(sample, count)
    figure = plot_figs.draw_failures(run, *answers)
    figure.savefig(tmp_path / "failures.png", dpi=DPI)
    picture(tmp_path / "failures.png")
    written = texts(figure)
    assert len(figure.findobj(matplotlib.image.AxesImage)) == min(count, plot_figs.FAILURES_SHOWN)
    assert (f"{count:,} of " if count else "None of the 2,000") in written
    assert ("200 surest" in written) == (count > 200)
    plt.close(figure)


def test_each_failure_names_prediction_and_label_the_surest_first(run):
    images = np.zeros((4, 28, 28), np.uint8)
    labels, predictions = np.array([3, 1, 8, 5]), np.array([5, 1, 9, 6])
    probabilities = np.zeros((4, 10))
    probabilities[[0, 0, 1, 2, 2, 3, 3], [5, 3, 1, 9, 8, 6, 5]] = [
        0.6,
        0.4,
        1,
        0.9,
        0.08,
        0.75,
        0.2,
    ]
    figure = plot_figs.draw_failures(run, images, labels, predictions, probabilities)
    said = [line for line in texts(figure).splitlines() if line[:1].isdigit() and line[1:2] == ":"]
    assert said == ["9: 90.0%", "8: 8.0%", "6: 75.0%", "5: 20.0%", "5: 60.0%", "3: 40.0%"]
    plt.close(figure)


def test_confusion_counts(run):
    labels, predictions = np.array([4] * 50 + [4, 4, 7]), np.array([4] * 50 + [9, 9, 1])
    figure = plot_figs.draw_confusion(run, labels, predictions)
    at = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert (
        at[4, 4] == "50"
        and at[9, 4] == "2"
        and at[1, 7] == "1"
        and at[0, 0] == "0"
        and at[2, 1] == "·"
    )
    shades = figure.axes[0].images[0].get_array()
    assert (
        shades.mask[4, 4] and shades[4, 9] == shades.max()
    )  # the right ones do not outshine the wrong ones
    plt.close(figure)


@pytest.mark.parametrize("filters", [1, 4, 7, 64])
def test_filters_for_any_number_of_channels(run, sample, tmp_path, filters):
    params = m.init_params(m.Settings(channels=(filters, 1, 1, 1)))
    figure = plot_figs.draw_filters(run, params, sample.test_images[0], sample.test_labels[0])
    figure.savefig(tmp_path / "filters.png", dpi=DPI)
    picture(tmp_path / "filters.png")
    tiles = figure.axes[0].images
    assert len(tiles) == 1 + 2 * filters  # the digit, then each filter and its response
    response = np.array(tiles[2].get_array())
    y = m.conv_block(
        m.to_input(sample.test_images[:1], np.float32), params["conv1.weight"], params["conv1.bias"]
    )[0]
    assert np.array_equal(response, y[:, :, 0, 0]) and response.min() >= 0
    plt.close(figure)


def test_no_other_data_set_passes_for_mnist(run, sample):
    wrong = answers_with(sample, 3)
    params = m.init_params(run.settings)

    def figures(run):
        yield plot_figs.draw_curves([run])
        yield plot_figs.draw_failures(run, *wrong)
        yield plot_figs.draw_failures(run, *answers_with(sample, 0))
        yield plot_figs.draw_confusion(run, *wrong[1:3])
        yield plot_figs.draw_filters(run, params, sample.test_images[0], 3)

    for figure in figures(run):
        assert "MNIST sample (not MNIST)" in texts(figure)
        plt.close(figure)
    for figure in figures(run._replace(data="MNIST")):
        assert "on MNIST" in texts(figure) and "not MNIST" not in texts(figure)
        plt.close(figure)


def test_a_name_with_dollar_signs_is_no_formula(run):
    with plt.rc_context(plot_figs.STYLE):
        figure = plot_figs.draw_curves([run._replace(data="a$x_{$b$")])
        figure.canvas.draw()
    assert "a$x_{$b$" in texts(figure)
    plt.close(figure)


# ── Runs in progress ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("without, figures, lines", [
    (("*.npz",), {"curves.png"}, 2),
    (("checkpoint*",), set(ALL) - {"filters.png"}, 1),
    (("predictions.npz",), {"curves.png", "filters.png"}, 1),
    (("*.npz", "metrics.csv"), set(), 3),
])  # fmt: skip
def test_a_run_in_progress(save, capsys, without, figures, lines):
    folder = add_run(save, "young", epochs=0, without=without)
    assert draw(save, "young") == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("yet, so no" in line for line in said) == lines and len(said) == lines + len(figures)
    assert {path.name for path in folder.glob("*.png")} == figures
    for name in figures:
        picture(folder / name)


def test_a_run_that_has_not_begun_stands_beside_nothing(save):
    add_run(save, "young", without=("*.npz", "metrics.csv"))
    add_run(save, "old", without=("*.npz",))
    assert draw(save, "young", "old") == 0
    assert not list(save.glob("*/curves_*.png"))


def test_watching_a_run_draws_after_each_epoch_and_ends_with_it(save, monkeypatch):
    """The run goes on while plot_figs.py sleeps: an epoch later, the last epoch's metrics, then its checkpoint."""
    folder = add_run(save, "young", epochs=0, without=("*.npz",))
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["epochs_max"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    rows = [[i, 1e-4, 2.3 / (i + 1), 0.3 * i, 2.3 / (i + 1), 0.3 * i, 1.0, 100.0] for i in range(3)]
    happens = iter([
        lambda: None,
        lambda: files.write_metrics(folder / "metrics.csv", rows[:2]),
        lambda: files.write_metrics(folder / "metrics.csv", rows),
        lambda: shutil.copy(save / "real" / "checkpoint_last.npz", folder),
        lambda: None,
    ])  # fmt: skip
    epochs, draw_curves = [], plot_figs.draw_curves

    def spy(runs):
        epochs.append(runs[0].metrics["epoch"].size - 1)
        return draw_curves(runs)

    monkeypatch.setattr(plot_figs, "draw_curves", spy)
    monkeypatch.setattr(plot_figs.time, "sleep", lambda _: next(happens)())
    assert draw(save, "young", "--watch") == 0
    assert epochs == [0, 1, 2, 2] and (folder / "filters.png").exists()
    assert next(happens, None) is None  # it looked once more, saw nothing new, and ended


def test_watching_ends_at_once_where_all_is_finished_and_with_ctrl_c(save, monkeypatch):
    naps = []
    monkeypatch.setattr(plot_figs.time, "sleep", naps.append)
    assert draw(save, "real", "--watch") == 0 and len(naps) == 1

    def ctrl_c(_):
        raise KeyboardInterrupt

    add_run(save, "young", epochs=0, without=("*.npz",))
    monkeypatch.setattr(plot_figs.time, "sleep", ctrl_c)
    assert draw(save, "young", "--watch") == 130


# ── What the user can put right ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tag", ["unknown", "notes", "../save/real", ""])
def test_an_unknown_tag_lists_those_there_are(save, capsys, tag):
    add_run(save, "second")
    (save / "notes").mkdir()
    assert draw(save, "real", tag) == 2
    error = error_of(capsys)
    assert repr(tag) in error and "real, second" in error and "notes," not in error
    assert not list(save.glob("*/*.png"))


def test_a_folder_without_runs(tmp_path, capsys):
    assert draw(tmp_path, "real") == 2
    assert "none yet" in error_of(capsys)
    assert draw(tmp_path / "nowhere") == 2
    assert repr(m.Settings.tag) in error_of(capsys)


def test_an_unknown_flag(capsys):
    assert plot_figs.main(["--tags", "x"]) == 2
    assert "--save-dir" in error_of(capsys)


@pytest.mark.parametrize("name, contents", [
    ("config.json", b""), ("config.json", b"[]"), ("config.json", b'{"settings": {}}'),
    ("config.json", b"\xff\xfe\x00"),
    ("config.json", b'{"settings": {"channels": 4}, "data": {"name": "MNIST", "sha256": {}}}'),
    ("config.json", b'{"settings": {"channels": [4, 4, 4, 4]}, "data": {"name": null, "sha256": {}}}'),
    ("metrics.csv", b""), ("metrics.csv", b"\xff\xfe\x00"), ("metrics.csv", b"epoch,loss\n0,1\n"),
    ("metrics.csv", ",".join(files.METRICS).encode()),
    ("metrics.csv", ",".join(files.METRICS).encode() + b"\n0,0,nan,0.5,1,0.5,1,1\n"),
    ("metrics.csv", ",".join(files.METRICS).encode() + b"\n0,0,1,0.5,1,1.5,1,1\n"),
    ("metrics.csv", ",".join(files.METRICS).encode() + b"\n7,0,1,0.5,1,0.5,1,1\n"),
    ("predictions.npz", b""), ("checkpoint_last.npz", b"PK\x03\x04 and then nothing"),
])  # fmt: skip
def test_damaged_files(save, capsys, name, contents):
    (save / "real" / name).write_bytes(contents)
    assert draw(save, "real") == 2
    assert name in error_of(capsys)


@pytest.mark.parametrize("change", [
    {"predictions": np.full(1000, 10)}, {"predictions": np.zeros(5, int)}, {"probabilities": np.zeros((1000, 9))},
    {"probabilities": np.full((1000, 10), np.nan)},
    {"labels": np.zeros(1000, np.uint8)}, {"labels": np.zeros(7, np.uint8)},
    {"predictions": np.full(1000, "three")}, {"predictions": np.full(1000, None)},
])  # fmt: skip
def test_predictions_of_another_kind(save, sample, change):
    path = save / "real" / "predictions.npz"
    with np.load(path) as arrays:
        files.save_arrays(path, **dict(arrays) | change)
    with pytest.raises(m.UserError, match="predictions.npz is damaged"):
        plot_figs.read_predictions(path, sample.test_labels)


@pytest.mark.parametrize("part", [slice(0, 100), slice(1000, None), slice(0, -30)])
def test_predictions_that_are_cut_off(save, sample, part):
    path = save / "real" / "predictions.npz"
    path.write_bytes(path.read_bytes()[part])
    with pytest.raises(m.UserError, match="predictions.npz is damaged"):
        plot_figs.read_predictions(path, sample.test_labels)


def test_another_data_set(save, capsys):
    add_run(save, "other", data={"name": "fashion", "sha256": {"train-images-idx3-ubyte": "0"}})
    assert draw(save, "other") == 2
    error = error_of(capsys)
    assert "ran on fashion" in error and "MNIST sample" in error and SAMPLE in error
    assert {path.name for path in (save / "other").glob("*.png")} == {"curves.png"}


def test_a_half_written_figure_replaces_nothing(save, monkeypatch, capsys):
    before = b"a whole figure"
    (save / "real" / "curves.png").write_bytes(before)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert draw(save, "real") == 2
    assert "No space left" in error_of(capsys)
    assert (save / "real" / "curves.png").read_bytes() == before
