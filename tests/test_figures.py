"""plot_figs.py: what it draws from whole, unfinished and damaged runs, and what it says."""

import builtins
import json
import os
import shutil
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from programs import write_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # (the backend comes first)

import mnist_resnet9 as m
import plot_figs
from support import run_folder, runs, storage, style
from support.checkpoints import checksums, pack_checkpoint, read_arrays, read_weights
from support.stages import one_pass

SCRIPT = Path(plot_figs.__file__)
SAMPLE = str(SCRIPT.parent / "data" / "sample")
DPI = 60
ALL = ["curves.png", "confusion.png", "failures.png", "filters.png", "layers.png"]
FROM_CHECKPOINT = {"filters.png", "layers.png"}


def long(*values):
    """Parameters of a test that the quick command leaves out."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a real run of one epoch on a few images of the sample. Tests copy it."""
    save = tmp_path_factory.mktemp("trained")
    arguments = "--tag real --train-images 128 --epochs-max 1 --channels 4,4,4,4".split()
    arguments += "--device cpu --threads 2".split()
    assert m.main([*arguments, "--data-dir", SAMPLE, "--save-dir", str(save)]) == 0
    return save / "real"


@pytest.fixture
def save(tmp_path, trained, monkeypatch):
    """A save folder with that run in it, on a machine without a screen. Few dots save time."""
    monkeypatch.setattr(plot_figs, "FAILURES_SHOWN", 12)
    monkeypatch.setitem(style.STYLE, "savefig.dpi", DPI)
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
        write_metrics(save / tag, rows)
    path = save / tag / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return save / tag


def save_weights(folder, params):
    """Makes these the weights of a run."""
    packed = pack_checkpoint(dict(params), 0, [], {})
    (folder / "checkpoint_last.npz").write_bytes(packed)


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
    program = Path(sys.argv[0]).name
    assert error.startswith(f"{program}: ") and error.count("\n") == 1, error
    assert "Traceback" not in error, error
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


def read_run(folder):
    return runs.read_run(folder, m.Settings)


@pytest.fixture
def run(save):
    return read_run(save / "real")


# ── Whole runs ────────────────────────────────────────────────────────────────────────────────────


def test_a_run_of_one_epoch_gives_all_figures(save, capsys):
    assert draw(save, "real") == 0
    assert capsys.readouterr().out.splitlines() == [str(save / "real" / name) for name in ALL]
    for name in ALL:
        picture(save / "real" / name)
    assert not list(save.glob("**/*.part"))


def test_without_a_screen_from_another_folder(save):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    # Its failures would take long to draw.
    folder = add_run(save, "bare", without=("predictions.npz",))
    command = [sys.executable, SCRIPT, "bare", "--save-dir", save.name, "--data-dir", SAMPLE]
    done = subprocess.run(
        command, cwd=save.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in folder.glob("*.png")} == {"curves.png", *FROM_CHECKPOINT}


def test_import_does_nothing():
    code = "import matplotlib; before = dict(matplotlib.rcParams); import plot_figs; "
    code += "assert dict(matplotlib.rcParams) == before"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_runs_side_by_side(save, capsys):
    tags = ["a", "b"]
    for tag, epochs in zip(tags, (1, 200)):
        add_run(save, tag, epochs, without=("*.npz",))
    assert draw(save, *tags, tags[0]) == 0  # a tag given twice counts once
    joint, alone = save / "a" / "curves_a+b.png", [save / tag / "curves.png" for tag in tags]
    assert capsys.readouterr().out.splitlines()[0] == str(joint)
    for path in (joint, *alone):
        picture(path)
    assert sorted(save.glob("*/*.png")) == sorted([joint, *alone])


def test_overlay_has_all_accuracies_in_one_panel(save, capsys):
    for tag, epochs in (("one", 3), ("two", 30), ("not_begun", 0)):
        add_run(save, tag, epochs, without=("*.npz",) if epochs else ("*.npz", "metrics.csv"))
    assert draw(save, "--overlay", "real", "one", "two", "not_begun") == 0
    path = save / "real" / "test_accuracy_real+one+two.png"
    assert capsys.readouterr().out.splitlines() == [str(path)] and list(save.glob("*/*.png")) == [
        path
    ]
    picture(path)
    runs = [read_run(save / tag) for tag in ("one", "two")]
    figure = plot_figs.draw_overlay(runs)
    (ax,) = figure.axes
    assert len(ax.lines) == len(runs)
    for line, run in zip(ax.lines, runs):
        assert np.array_equal(
            line.get_xydata().T, [run.metrics["epoch"], run.metrics["test_accuracy"]]
        )
        assert run.title()[:20] in texts(
            figure
        ) and f"{run.metrics['test_accuracy'][-1]:.2%}" in texts(figure)
    plt.close(figure)


def test_another_network_has_filters_of_another_size_or_none(save, capsys):
    folder = save / "real"
    (folder / "predictions.npz").unlink()
    weight, bias = np.ones((5, 5, 1, 8), np.float32), np.zeros(8, np.float32)
    save_weights(folder, {"conv1.weight": weight, "conv1.bias": bias})
    assert draw(save, "real") == 0
    said = capsys.readouterr().out
    assert "filters.png\nreal: no layers.png, since it is of another network than mnist_" in said
    picture(folder / "filters.png")
    for params, why in (
        ({"fc1.weight": np.ones((784, 9))}, "it has no layer conv1"),
        ({"conv1.weight": np.ones((3, 3, 2, 8)), "conv1.bias": bias}, "weights (3, 3, 2, 8)"),
        ({"conv1.weight": np.ones((3, 3, 1)), "conv1.bias": np.ones(1)}, "weights (3, 3, 1)"),
        ({"conv1.weight": np.ones((2, 2, 1, 8)), "conv1.bias": bias}, "no layers.png"),
    ):
        save_weights(folder, params)
        assert draw(save, "real") == 0
        said = capsys.readouterr().out
        assert why in said and "no layers.png" in said


def test_a_run_of_another_network_says_what_differs(save, capsys):
    """Its code was edited since, or before: here it had a norm, and no conv8."""
    params = dict(m.init_params(read_run(save / "real").settings))
    del params["conv8.weight"], params["conv8.bias"]
    save_weights(save / "real", params | {"norm2.gain": np.ones(4, np.float32)})
    assert draw(save, "real") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no layers" in line]
    assert "norm2.gain, which is not expected" in line and "no conv8.weight" in line


def test_curves_show_training_and_test_images_on_equal_axes(save):
    add_run(save, "long", epochs=200)
    runs = [read_run(save / tag) for tag in ("real", "long")]
    runs[1].metrics["test_accuracy"][150] = 0.9999
    runs[1].metrics["test_loss"][30] = 0.001
    figure = plot_figs.draw_curves(runs)
    panels = np.reshape(figure.axes, (2, 2))  # [run][loss, accuracy]
    for run, row in zip(runs, panels):
        for ax, name in zip(row, ("loss", "accuracy")):
            for line, part in zip(ax.lines, ("train", "test")):
                assert np.array_equal(line.get_ydata(), run.metrics[f"{part}_{name}"])
    for one, other in panels.T:
        assert one.get_ylim() == other.get_ylim()
        assert one.get_xlim() == other.get_xlim() == (0, 200)
        assert [line.get_color() for line in one.lines] == [
            line.get_color() for line in other.lines
        ]
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in panels[1]]
    assert legends[0] == ["last: 0.0114, epoch 200", "lowest: 0.001, epoch 30"]
    assert legends[1] == ["last: 99.74%, epoch 200", "best: 99.99%, epoch 150"]
    assert "training images" in texts(figure.legends[0]) and "test images" in texts(
        figure.legends[0]
    )
    plt.close(figure)


def with_validation(run, accuracies):
    return run._replace(metrics=run.metrics | {"validation_accuracy": np.array(accuracies)})


def test_images_held_out_are_drawn_and_choose_the_best_epoch(save):
    plain = read_run(add_run(save, "plain", without=("*.npz",)))
    for accuracies, chosen in (
        ([0.1, 0.9, 0.8, 0.9], 1),
        ([np.nan, 0.5, 0.6, np.nan], 2),  # begun by an older version
        ([np.nan] * 4, 3),  # then by the test images
    ):
        run = with_validation(plain, accuracies)
        figure = plot_figs.draw_curves([plain, run])
        for ax, count in zip(figure.axes, (2, 2, 2, 3)):
            lines = [line for line in ax.lines if len(line.get_xdata()) > 1]
            assert len(lines) == count
        assert np.array_equal(lines[2].get_ydata(), accuracies, equal_nan=True)
        texts_of = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
        best = f"best: {plain.metrics['test_accuracy'][chosen]:.2%}, epoch {chosen}"
        assert texts_of[1] == best
        assert "validation images" in texts(figure.legends[0])
        plt.close(figure)
    figure = plot_figs.draw_curves([with_validation(plain, [0.0001, 0.9, 0.9, 0.9])])
    assert figure.axes[1].get_ylim()[0] < 0.001  # nothing is cut off
    plt.close(figure)


def test_an_overlay_has_the_images_held_out_as_dotted_lines(save):
    plain = read_run(add_run(save, "plain", without=("*.npz",)))
    accuracies = [0.1, 0.9, 0.8, 0.9]
    figure = plot_figs.draw_overlay([plain, with_validation(plain, accuracies)])
    test, other, validation, _ = figure.axes[0].lines
    assert np.array_equal(validation.get_ydata(), accuracies)
    assert validation.get_color() == other.get_color() != test.get_color()
    assert "validation images" in texts(figure)
    plt.close(figure)


def test_a_run_that_holds_out_images_is_drawn(save, capsys):
    flags = "--tag held_out --train-images 96 --validation-images 32 --epochs-max 2".split()
    flags += "--channels 2,2,2,2 --device cpu --threads 1".split()
    assert m.main([*flags, "--data-dir", SAMPLE, "--save-dir", str(save)]) == 0
    best = capsys.readouterr().out.rstrip().split(" at the best (")[1][0]
    run = read_run(save / "held_out")
    assert plot_figs.chosen_epoch(run.metrics) == int(best)
    assert draw(save, "--overlay", "held_out", "real") == 0
    picture(save / "held_out" / "test_accuracy_held_out+real.png")


@pytest.mark.parametrize("count", [1, long(3), long(5), long(12)])
def test_curves_of_many_runs_stay_readable(save, tmp_path, count):
    runs = []
    for i in range(count):
        folder = add_run(save, f"a_longer_tag_{i}", epochs=i, without=("*.npz",))
        runs.append(with_validation(read_run(folder), np.linspace(0.1, 0.9, i + 1)))
    with plt.rc_context(style.STYLE):
        figure = plot_figs.draw_curves(runs)
        figure.savefig(tmp_path / "curves.png", dpi=DPI)
    picture(tmp_path / "curves.png")
    assert figure.get_size_inches()[0] < 10  # at README's width letters are not half their size
    assert len(figure.axes) == 2 * count
    figure.canvas.draw()
    boxes = [ax.get_window_extent() for ax in figure.axes]
    boxes += [ax.get_legend().get_window_extent() for ax in figure.axes]
    boxes += [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for i, box in enumerate(boxes):
        assert box.width > 0 and box.height > 0
        assert not any(box.padded(-1).overlaps(other) for other in boxes[:i])
    plt.close(figure)


def test_the_accuracy_axis_tells_99_0_from_99_6(save):
    add_run(save, "long", epochs=200)
    figure = plot_figs.draw_curves([read_run(save / "long")])
    figure.canvas.draw()
    for ax in figure.axes[1::2]:
        (_, low), (_, high) = ax.transData.transform([(0, 0.990), (0, 0.996)])
        assert (high - low) / ax.bbox.height > 0.1
        labels = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert len(labels) > 3 and not any(a.overlaps(b) for a, b in zip(labels, labels[1:]))
    plt.close(figure)


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 1.0])
def test_curves_of_a_run_that_does_not_change(run, accuracy):
    same = np.full(2, accuracy)
    metrics = run.metrics | {"train_accuracy": same, "test_accuracy": same}
    metrics |= {"train_loss": np.array([2.3, 0.0]), "test_loss": np.zeros(2)}
    figure = plot_figs.draw_curves([run._replace(metrics=metrics)])
    figure.canvas.draw()
    assert f"{accuracy:.2%}" in texts(figure)
    plt.close(figure)


@pytest.mark.long
def test_a_long_tag_is_wrapped(save):
    tag = "a-tag-of-100-letters" * 5
    add_run(save, tag)
    assert draw(save, tag) == 0
    pictures = list(save.glob("*/*.png"))
    assert len(pictures) == len(ALL)
    for path in pictures:
        picture(path)


# ── Images ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, long(5), 60, long(1500)])
def test_failures_stay_readable(run, sample, tmp_path, count, monkeypatch):
    monkeypatch.setattr(plot_figs, "FAILURES_SHOWN", 96)
    answers = answers_with(sample, count)
    figure = plot_figs.draw_failures(run, *answers)
    figure.savefig(tmp_path / "failures.png", dpi=DPI)
    picture(tmp_path / "failures.png")
    written = texts(figure)
    assert len(figure.findobj(matplotlib.image.AxesImage)) == min(count, plot_figs.FAILURES_SHOWN)
    assert (f"{count:,} of " if count else "None of the 2,000") in written
    assert ("96 surest" in written) == (count > 96)
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
    # The right ones do not outshine the wrong ones.
    assert shades.mask[4, 4] and shades[4, 9] == shades.max()
    plt.close(figure)


@pytest.mark.parametrize("filters", [1, long(4), 7, long(64)])
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


def test_predictions_of_ones_own_are_drawn_under_a_title(sample, caplog):
    """As in a notebook: no run, lists for arrays, whatever settings Matplotlib has."""
    settings = m.Settings(channels=(4, 4, 4, 4))
    params = m.init_params(settings)
    images, labels = sample.test_images[:60], sample.test_labels[:60].tolist()
    probs, _ = m.softmax(m.predict(params, images, settings))
    predictions = probs.argmax(axis=1).tolist()
    with plt.rc_context(THEIRS):
        before = dict(plt.rcParams)
        figures = [
            plot_figs.draw_failures("My $own$", list(images), labels, predictions, probs.tolist()),
            plot_figs.draw_failures("My $own$", images, labels, labels, probs),
            plot_figs.draw_confusion("My $own$", labels, predictions),
            plot_figs.draw_filters("My $own$", params, images[0], labels[0]),
            plot_figs.draw_layers("My $own$", params, images, labels, settings),
        ]
        assert dict(plt.rcParams) == before
    for figure in figures:
        written = texts(figure)
        assert "My $own$" in written and "test images" not in written and "MNIST" not in written
        assert figure.get_facecolor() == (1, 1, 1, 1)
        with style.our_style():
            figure.canvas.draw()
        plt.close(figure)
    assert not caplog.records
    with pytest.raises(m.UserError, match="its network raises KeyError"):
        plot_figs.draw_layers("mine", {"fc9.bias": np.zeros(10)}, images, labels)


def test_thousands_of_failures_fit_into_a_cell(sample):
    """A wider figure would be shrunk, and with it the letters."""
    for count in (60, 3000):
        figure = plot_figs.draw_failures("mine", *answers_with(sample, count))
        assert figure.get_size_inches()[0] < 12.5
        plt.close(figure)


def test_a_name_with_dollar_signs_is_no_formula(run):
    with plt.rc_context(style.STYLE):
        figure = plot_figs.draw_curves([run._replace(data="a$x_{$b$")])
        figure.canvas.draw()
    assert "a$x_{$b$" in texts(figure)
    plt.close(figure)


# ── One step of learning ──────────────────────────────────────────────────────────────────────────


def layers_figure(run, path, network, settings, params=None, images=None, labels=None):
    """The figure of a network, written to path, and the Pass that it shows."""
    params = m.init_params(settings, network=network) if params is None else params
    figure = plot_figs.draw_layers(run, params, images, labels, settings, network)
    with style.our_style():
        figure.savefig(path, dpi=DPI)
        figure.canvas.draw()
    picture(path)
    # None of the names under the curves is cut off at the border, or meets another.
    boxes = [t.get_window_extent() for t in figure.axes[0].child_axes[0].get_xticklabels()]
    assert all(box.y0 >= 0 for box in boxes)
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))
    plt.close(figure)
    i = plot_figs.least_sure(params, images, labels, settings, network)
    one = images[i : i + 1], labels[i : i + 1]
    return figure, one_pass(m, network, params, *one, settings)


def test_a_step_lowers_the_loss_and_none_is_taken_where_it_is_flat(sample):
    settings = m.Settings(channels=(4, 5, 6, 7))
    params = m.init_params(settings, np.float64)
    few = sample.train_images[:3], sample.train_labels[:3]
    step = one_pass(m, m.layers, params, *few, settings)
    after = one_pass(m, m.layers, plot_figs.stepped(params, step), *few, settings)
    assert after.loss < step.loss
    flat = step._replace(d={name: np.zeros_like(d) for name, d in step.d.items()})
    for name, w in plot_figs.stepped(params, flat).items():
        assert np.array_equal(w, params[name])


def test_the_digit_drawn_is_the_least_sure_one(sample):
    params = m.init_params(m.Settings())
    images, labels = sample.train_images[:30], sample.train_labels[:30]
    i = plot_figs.least_sure(params, images, labels, m.Settings())
    probs = m.softmax(m.predict(params, images, m.Settings()))[0]
    assert all(probs[i, labels[i]] <= probs[n, labels[n]] for n in range(30))


@pytest.mark.parametrize(
    "pool, channels",
    [
        ("max", (4, 16, 32, 64)),
        ("avg", (1, 2, 3, 1)),
        long("max", (1, 2, 3, 1)),
        long("avg", (4, 16, 32, 64)),
    ],
)
def test_layers_show_every_layer_and_its_gradient(run, sample, tmp_path, pool, channels):
    settings = m.Settings(channels=channels, pool=pool)
    first = {"images": sample.train_images[5:6], "labels": sample.train_labels[5:6]}
    figure, step = layers_figure(run, tmp_path / "layers.png", m.layers, settings, **first)
    written = texts(figure)
    a, b, c, d = channels
    for size in (f"28×28×{a}", f"28×28×{b}", f"14×14×{b}", f"14×14×{c}", f"14×14×{d}", f"7×7×{d}"):
        assert size in written
    assert written.count("largest of 2×2" if pool == "max" else "mean of 2×2") == 2
    for words in ("3×3, + conv2, relu", "3×3, + conv6, relu", "linear, softmax", "output: 0"):
        assert written.count(words) == 1
    assert written.count("shortcut\n") == 4
    tiles = [np.array(image.get_array()) for image in figure.axes[0].images]
    tiles = tiles[2:]  # after the two colour scales
    for stage in step.stages[:-1]:
        y, dy = stage.y[:, :, 0], stage.dy[:, :, 0]
        shown = min(4, y.shape[2])
        assert len(tiles) >= 2 * shown
        for output, gradient in zip(tiles[:shown], tiles[shown : 2 * shown]):
            (k,) = {k for k in range(y.shape[2]) if np.array_equal(y[:, :, k], output)} or {-1}
            assert k >= 0 and np.array_equal(dy[:, :, k], gradient), stage.name
        del tiles[: 2 * shown]
    assert not tiles
    curves = figure.axes[0].child_axes[0]
    lengths = [np.sqrt((stage.dy**2).sum()) for stage in step.stages]
    assert np.allclose(curves.lines[0].get_ydata(), lengths, rtol=1e-4)
    named = [label.get_text() for label in curves.get_xticklabels()]
    assert named == [stage.name for stage in step.stages]


def test_layers_of_a_network_that_is_switched_off(run, sample, tmp_path):
    """All outputs are 0, and so are all gradients but those of fc9's bias."""
    first = {"images": sample.train_images[:3], "labels": sample.train_labels[:3]}
    params = {name: np.zeros_like(p) for name, p in m.init_params(run.settings).items()}
    path = tmp_path / "layers.png"
    figure, _ = layers_figure(run, path, m.layers, run.settings, params, **first)
    assert texts(figure).count("shortcut\n") == 4


@pytest.mark.parametrize("number", [1, 2, long(3), long(4), long(5)])
def test_layers_of_the_steps_of_the_evolution(number, run, sample, tmp_path):
    first = {"images": sample.train_images[:3], "labels": sample.train_labels[:3]}
    network = plot_figs.evolution()[number - 1]
    figure, step = layers_figure(run, tmp_path / "layers.png", network, run.settings, **first)
    written = texts(figure)
    assert all(stage.name in written for stage in step.stages) and "(given" in written
    assert ("without" in written, "shortcut" in written) == (False, number > 3)
    assert len(figure.axes[0].child_axes[0].lines) == (2 if number > 3 else 1)


def many_layers(settings, rng=None):
    """17 stages in three rows, with shortcuts that meet, and one from a row to the next."""
    layers = [m.conv("conv1", 1, 3, need_dx=False)]
    for i in range(2, 14, 2):
        layers.append(m.residual(f"conv{i}", f"conv{i + 1}", 3))
    layers += [m.pool("a_pool_with_a_long_name", settings), m.flat("flat")]
    layers += [m.fully_connected("fc14", 588, 7), m.Layer("relu14", m.relu, m.relu_backward)]
    return [*layers, m.fully_connected("fc15", 7, 10)]


def test_layers_of_a_network_of_many(run, sample, tmp_path):
    first = {"images": sample.train_images[:3], "labels": sample.train_labels[:3]}
    figure, step = layers_figure(run, tmp_path / "l.png", many_layers, run.settings, **first)
    written = texts(figure)
    for name in ("conv13", "fc14", "relu14", "a_pool_with_…", "+ conv11, relu", "output: least"):
        assert name in written
    assert len(step.stages) == 18 and written.count("forward: output") == 3


@pytest.mark.parametrize("count, name", [(14, "conv"), long(7, "layer_named_"), long(18, "c")])
def test_layers_of_any_number_and_name(count, name, run, sample, tmp_path):
    def network(settings, rng=None):
        made = [m.conv(f"{name}{i}", 1, 1) for i in range(1, count - 1)]
        return [*made, m.flat("flat"), m.fully_connected("fc", 784, 10)]

    first = {"images": sample.train_images[:3], "labels": sample.train_labels[:3]}
    _, step = layers_figure(run, tmp_path / "l.png", network, run.settings, **first)
    assert len(step.stages) == count


def test_a_network_that_computes_nothing_to_draw_gets_a_line(save, capsys, monkeypatch):
    right, relu = m.layers, m.relu
    (save / "real" / "predictions.npz").unlink()  # whose figures take long

    def raises(settings, rng=None):
        raise IndexError("list index out of range")

    def wrong_order(settings, rng=None):
        return right(settings)[::-1]

    def explodes(x):
        return relu(x * np.float32(1e30))

    for name, broken, why in (
        ("layers", raises, "raises IndexError: list index out of range"),
        ("layers", wrong_order, "its network raises "),
        ("relu", explodes, "not finite"),
        ("conv_block", lambda x, w, b: None, "no filters.png, since conv_block() raises TypeError"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(m, name, broken)
            assert draw(save, "real") == 0
        out, err = capsys.readouterr()
        assert "real: no layers.png, since " in out and why in out, out
        assert all(line.startswith("*** ") for line in err.splitlines()), err
        assert out.count("\n") == len(ALL) - 1  # a line for both that are missing


def test_the_network_of_a_checkpoint_is_found(monkeypatch):
    settings = m.Settings(channels=(4, 5, 6, 7))
    assert plot_figs.find_network(m.init_params(settings), settings) is m.layers
    for params in (m.init_params(m.Settings()), {}):
        with pytest.raises(m.UserError, match="another network"):
            plot_figs.find_network(params, settings)
    steps = plot_figs.evolution()
    pools = {number: m.Settings(pool=pool) for number, pool in ((3, "avg"), (4, "avg"), (5, "max"))}
    for number, network in enumerate(steps, 1):
        its_own = pools.get(number, m.Settings())
        params = m.init_params(its_own, network=network)
        # From step 4 on they have ResNet9's parameters.
        expected = network if number < 4 else m.layers
        assert plot_figs.find_network(params, its_own) is expected
        # A script that was edited: its own runs, and those of the steps.
        with monkeypatch.context() as patch:
            patch.setattr(m, "layers", many_layers)
            assert plot_figs.find_network(m.init_params(settings), settings) is many_layers
            assert plot_figs.find_network(params, its_own) is network


@pytest.mark.long
def test_gradients_of_several_runs_stand_in_one_figure(save, sample, capsys, monkeypatch):
    add_run(save, "other", without=("predictions.npz",))
    folder = add_run(save, "first_step", without=("predictions.npz",))
    network = plot_figs.evolution()[1]
    params = m.init_params(m.Settings(), network=network)
    save_weights(folder, params)
    add_run(save, "none", without=("*.npz",))
    monkeypatch.setattr(plot_figs, "draw_run", lambda *_: ())  # only what they have together
    assert draw(save, "real", "other", "first_step", "none") == 0
    path = save / "real" / "gradients_real+other+first_step.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    picture(path)
    runs = [read_run(save / tag) for tag in ("real", "first_step")]
    residual, perceptron = plot_figs.compare_gradients(runs, lambda run: sample, print)
    first = sample.train_images[: plot_figs.BATCH], sample.train_labels[: plot_figs.BATCH]
    _, d = m.loss_and_gradients(params, *first, m.Settings(), network=network)
    expected = {name: np.sqrt((d[f"{name}.weight"] ** 2).sum()) for name in ("fc1", "fc2")}
    assert perceptron.lengths == pytest.approx(expected, rel=1e-5) and not perceptron.plain
    assert list(residual.lengths) == [*(f"conv{i}" for i in range(1, 9)), "fc9"]
    _, d = m.loss_and_gradients(
        read_weights(save / "real" / "checkpoint_last.npz"), *first, runs[0].settings
    )
    assert residual.lengths["conv1"] == pytest.approx(np.linalg.norm(d["conv1.weight"]), rel=1e-2)
    assert residual.plain["fc9"] == pytest.approx(residual.lengths["fc9"], rel=1e-5)
    assert residual.plain["conv1"] != pytest.approx(residual.lengths["conv1"], rel=1e-3)
    figure = plot_figs.draw_gradients([residual, perceptron])
    (ax,) = figure.axes
    assert list(ax.lines[0].get_ydata()) == list(residual.lengths.values())
    assert list(ax.lines[0].get_xdata()) == list(range(-8, 1))
    plt.close(figure)


# ── Runs in progress ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "without, figures, lines",
    [
        (("*.npz",), {"curves.png"}, 2),
        long(("checkpoint*",), set(ALL) - FROM_CHECKPOINT, 1),
        (("predictions.npz",), {"curves.png", *FROM_CHECKPOINT}, 1),
        (("*.npz", "metrics.csv"), set(), 3),
    ],
)
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


def test_watching_a_run_draws_after_each_epoch_and_ends_with_it(save, monkeypatch, capsys):
    """While it sleeps the run goes on: an epoch, the last epoch's metrics, then its checkpoint."""
    folder = add_run(save, "young", epochs=0, without=("*.npz",))
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["epochs_max"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    rows = [[i, 1e-4, 2.3 / (i + 1), 0.3 * i, 2.3 / (i + 1), 0.3 * i, 1.0, 100.0] for i in range(3)]
    happens = iter(
        [
            lambda: None,
            lambda: write_metrics(folder, rows[:2]),
            lambda: write_metrics(folder, rows),
            lambda: shutil.copy(save / "real" / "checkpoint_last.npz", folder),
            lambda: None,
        ]
    )
    epochs, draw_curves = [], plot_figs.draw_curves

    def spy(runs):
        epochs.append(runs[0].metrics["epoch"].size - 1)
        return draw_curves(runs)

    monkeypatch.setattr(plot_figs, "draw_curves", spy)
    monkeypatch.setattr(plot_figs.time, "sleep", lambda _: next(happens)())
    config["code"] = "another"
    (folder / "config.json").write_text(json.dumps(config))
    assert draw(save, "young", "--watch") == 0
    said = capsys.readouterr()
    assert said.err.count("was trained by other code") == 1  # not at each look
    for missing in ("predictions.npz", "checkpoint_last.npz"):
        assert said.out.count(f"has no {missing} yet") == 1
    assert epochs == [0, 1, 2, 2] and (folder / "filters.png").exists()
    assert next(happens, None) is None  # it looked once more, saw nothing new, and ended


def test_watching_ends_at_once_where_all_is_finished_and_with_ctrl_c(save, monkeypatch):
    naps = []
    monkeypatch.setattr(plot_figs.time, "sleep", naps.append)
    add_run(save, "finished", without=("*.npz",))
    assert draw(save, "finished", "--watch") == 0 and len(naps) == 1

    def ctrl_c(_):
        raise KeyboardInterrupt

    add_run(save, "young", epochs=0, without=("*.npz",))
    monkeypatch.setattr(plot_figs.time, "sleep", ctrl_c)
    assert draw(save, "young", "--watch") == 130


def test_too_little_memory_gets_one_line(save, monkeypatch, capsys):
    def full(*_):
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(plot_figs, "draw_curves", full)
    assert draw(save, "real") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Out of memory (Unable to allocate 3 GiB)" in error


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11490434\n"
FILES = ["config.json", "metrics.csv", "predictions.npz", "checkpoint_last.npz"]


@pytest.mark.parametrize("name", FILES)
def test_a_git_lfs_pointer_is_called_what_it_is(name, save, capsys):
    folder = add_run(save, "cloned")
    (folder / name).write_bytes(POINTER)
    (folder / "checkpoint_previous.npz").unlink(missing_ok=True)
    assert draw(save, "cloned") == 2
    error = error_of(capsys)
    assert name in error and "is a git-lfs pointer, not the file: run `git lfs pull`" in error
    assert "damaged" not in error and (folder / name).read_bytes() == POINTER


# ── What the user can put right ───────────────────────────────────────────────────────────────────


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
    assert "it has none yet: mnist_resnet9.py makes one" in error_of(capsys)
    assert draw(tmp_path / "nowhere") == 2
    assert repr(m.Settings.tag) in error_of(capsys)


def test_an_unknown_flag(capsys):
    assert plot_figs.main(["--tags", "x"]) == 2
    assert "--save-dir" in error_of(capsys)


@pytest.mark.parametrize(
    "name, contents",
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b'{"settings": {}}'),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b'{"settings": {"channels": 4}, "data": {"name": "MNIST", "sha256": {}}}'),
        ("config.json", b'{"settings": {"channels": [4, 4, 4, 4]}, "data": {"name": null}}'),
        ("metrics.csv", b""),
        ("metrics.csv", b"\xff\xfe\x00"),
        ("metrics.csv", b"epoch,loss\n0,1\n"),
        ("metrics.csv", ",".join(run_folder.METRICS).encode()),
        ("metrics.csv", ",".join(run_folder.METRICS).encode() + b"\n0,0,nan,0.5,1,0.5,1,1\n"),
        ("metrics.csv", ",".join(run_folder.METRICS).encode() + b"\n0,0,1,0.5,nan,0.5,1,1\n"),
        ("metrics.csv", ",".join(run_folder.METRICS).encode() + b"\n0,0,1,0.5,1,1.5,1,1\n"),
        ("metrics.csv", ",".join(run_folder.METRICS).encode() + b"\n7,0,1,0.5,1,0.5,1,1\n"),
        ("predictions.npz", b""),
        ("checkpoint_last.npz", b"PK\x03\x04 and then nothing"),
    ],
)
def test_damaged_files(save, capsys, name, contents):
    (save / "real" / name).write_bytes(contents)
    assert draw(save, "real") == 2
    assert name in error_of(capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"predictions": np.full(1000, 10)},
        {"predictions": np.zeros(5, int)},
        {"probabilities": np.zeros((1000, 9))},
        {"probabilities": np.full((1000, 10), np.nan)},
        {"labels": np.zeros(1000, np.uint8)},
        {"labels": np.zeros(7, np.uint8)},
        {"predictions": np.full(1000, "three")},
        {"predictions": np.full(1000, None)},
    ],
)
def test_predictions_of_another_kind(save, sample, change):
    path = save / "real" / "predictions.npz"
    with np.load(path) as arrays:
        storage.write_file(path, storage.pack_arrays(**dict(arrays) | change))
    with pytest.raises(m.UserError, match="predictions.npz is damaged"):
        plot_figs.read_predictions(path, sample.test_labels)


@pytest.mark.parametrize("part", [slice(0, 100), slice(1000, None), slice(0, -30)])
def test_predictions_that_are_cut_off(save, sample, part):
    path = save / "real" / "predictions.npz"
    path.write_bytes(path.read_bytes()[part])
    with pytest.raises(m.UserError, match="predictions.npz is damaged"):
        plot_figs.read_predictions(path, sample.test_labels)


@pytest.mark.parametrize("change", [np.full((10,), np.nan, np.float32), long(np.zeros(10, int))])
def test_parameters_of_another_kind(save, capsys, change):
    path = save / "real" / "checkpoint_last.npz"
    arrays = read_arrays(path) | {"fc9.bias": change}
    storage.write_file(path, storage.pack_arrays(**arrays, sha256=checksums(arrays)))
    assert draw(save, "real") == 2
    assert "checkpoint_last.npz is damaged" in error_of(capsys)


def test_another_data_set(save, capsys):
    add_run(save, "other", data={"name": "fashion", "sha256": {"train-images-idx3-ubyte": "0"}})
    assert draw(save, "other") == 2
    error = error_of(capsys)
    assert "ran on fashion" in error and "MNIST sample" in error and SAMPLE in error
    assert {path.name for path in (save / "other").glob("*.png")} == {"curves.png"}


@pytest.mark.long
def test_the_data_is_looked_for_where_the_run_had_it(save, monkeypatch, sample):
    asked = []
    monkeypatch.setattr(m, "load_mnist", lambda folder: asked.append(folder) or sample)
    path = add_run(save, "bare", without=("checkpoint*",)) / "config.json"
    arguments = ["bare", "--save-dir", str(save)]
    assert plot_figs.main(arguments) == 0
    config = json.loads(path.read_text())
    config["settings"]["data_dir"] = "/a/folder/of/another/machine"
    path.write_text(json.dumps(config))
    assert plot_figs.main(arguments) == 0
    assert plot_figs.main([*arguments, "--data-dir", str(save)]) == 0
    assert asked == [Path(SAMPLE), SCRIPT.parent / "data", save]


# ── Whatever settings and folders the user has ────────────────────────────────────────────────────

# Each of these spoilt a figure, or said hundreds of lines.
THEIRS = {
    "text.usetex": True,
    "font.family": ["NoSuchFont"],
    "axes.facecolor": "black",
    "figure.facecolor": "black",
    "text.color": "white",
    "axes.grid": True,
    "lines.linewidth": 9,
    "image.cmap": "jet",
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "figure.dpi": 31,
}


@pytest.mark.long
def test_the_users_settings_change_no_figure_and_no_figure_changes_them(save, caplog):
    assert draw(save, "real") == 0
    usual = {name: (save / "real" / name).read_bytes() for name in ALL}
    with plt.rc_context(THEIRS), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = dict(plt.rcParams)
        assert draw(save, "real") == 0
        assert dict(plt.rcParams) == before
    assert not caplog.records
    for name, content in usual.items():
        assert (save / "real" / name).read_bytes() == content, name


PLOT_FIGS = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
NOTHING_WRITABLE = """
import os, pathlib, tempfile

def refuse(*_, **__):
    raise OSError(30, "Read-only file system")

tempfile.mkdtemp = pathlib.Path.mkdir = refuse
"""


def overlay_in_a_process(save, code="", **environment):
    """plot_figs.py as a program of its own, which prints one path."""
    arguments = ["--overlay", "real", "--save-dir", str(save)]
    return subprocess.run(
        [sys.executable, "-c", code + PLOT_FIGS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "lines",
    [
        "text.usetex: True\nfont.family: NoSuchFont\nbackend: TkAgg\ninteractive: True\n",
        long("font.sans-serif: NoSuchFont\nbackend: pdf\nsavefig.format: svg\n"),
    ],
)
def test_a_matplotlibrc_is_not_asked(save, tmp_path, lines):
    (tmp_path / "matplotlibrc").write_text(lines)
    theirs = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": ""}
    done = overlay_in_a_process(save, **theirs)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.long
def test_a_toolkit_that_is_missing_costs_the_windows_alone(save):
    done = overlay_in_a_process(save, MPLBACKEND="module://no_such_toolkit", DISPLAY=":9")
    assert done.returncode == 0 and not done.stderr
    assert "No window can be opened" in done.stdout and list(save.glob("*/test_accuracy*"))


@pytest.mark.parametrize(
    "code, environment, said",
    [
        (NOTHING_WRITABLE, {"MPLCONFIGDIR": "/proc/nowhere"}, "MPLCONFIGDIR"),
        ("", {"MPLBACKEND": "nonsense"}, "'nonsense'"),
    ],
)
def test_a_matplotlib_that_does_not_load_gets_one_line(save, code, environment, said):
    done = overlay_in_a_process(save, code, **environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("plot_figs.py: ")]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_in_letters_that_the_font_lacks(run, tmp_path):
    with style.our_style(), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_figs.draw_overlay([run._replace(data="数字 🦖 Größe")])
        (tmp_path / "curves.png").write_bytes(style.to_png(figure))
    assert "�� � Größe" in texts(figure)
    plt.close(figure)


def test_a_folder_that_cannot_be_written(save, capsys):
    (save / "real" / "curves.png.part").mkdir()  # a file cannot take its place, not even root's
    assert draw(save, "real") == 2
    error = error_of(capsys)
    assert "curves.png cannot be written (Is a directory)" in error and "--save-dir" in error


def test_no_two_lists_of_runs_share_a_file(run):
    def path(*tags):
        return plot_figs.joint_path(
            "curves", [run._replace(folder=run.folder.parent / tag) for tag in tags]
        )

    assert path("a", "x_y").name == "curves_a+x_y.png"
    lists = [("a", "x_y"), ("a", "x", "y"), ("a_x", "y"), ("a+x", "y"), ("a", "x+y"), ("a", "+x")]
    lists += [("a", "b" * 100, "c" * 90, tag) for tag in "de"] + [("数" * 50, "字" * 50, "d")]
    lists += [("数" * 50, "字" * 50, "e")]
    paths = {path(*tags).name for tags in lists}
    assert len(paths) == len(lists)
    assert all(len(os.fsencode(f"{name}.part")) < 255 for name in paths)


# ── In a notebook ─────────────────────────────────────────────────────────────────────────────────


def test_in_a_notebook_the_figures_of_the_user_stay(save, monkeypatch):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    asked = []
    monkeypatch.setattr(matplotlib, "use", asked.append)
    mine = plt.figure()
    before = plt.get_fignums()
    add_run(save, "bare", without=("*.npz",))
    assert draw(save, "bare") == 0
    assert not asked and plt.get_fignums() == before
    plt.close(mine)


def test_in_a_notebook_an_error_stops_the_cells_that_follow(save, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    with pytest.raises(m.UserError, match="^.*has no run 'unknown'"):
        draw(save, "unknown")
    with pytest.raises(m.UserError, match=r"main\(\['real', '--overlay'\]\)"):
        plot_figs.main("real --overlay")
    assert draw(save, "--help") == 0
    add_run(save, "young", epochs=0, without=("*.npz",))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plot_figs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(save, "young", "--watch")


def test_outside_of_a_notebook_agg_is_asked_for(save, monkeypatch):
    asked = []
    monkeypatch.setattr(matplotlib, "use", asked.append)
    # It is imported, but nothing runs in it.
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    add_run(save, "bare", without=("*.npz",))
    assert draw(save, "bare") == 0
    assert set(asked) == ({"Agg"} if sys.platform.startswith("linux") else set())


def test_main_without_arguments_reads_none_of_another_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(m.Settings, "save_dir", str(tmp_path))
    assert plot_figs.main() == 2
    assert f"no run {m.Settings.tag!r}" in error_of(capsys)


KERNEL = """
import matplotlib, os
os.chdir({root!r})
import {program}
assert {program}.main({arguments!r}) == 0
#%%
import matplotlib.pyplot as plt
plt.plot([1, 2])
"""


@pytest.mark.parametrize("program", [long("plot_figs"), long("predict")])
def test_in_a_fresh_kernel_the_users_next_figure_is_shown(save, program, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    arguments = ["--overlay", "real", "--save-dir", str(save)]
    if program == "predict":
        picture = m.ROOT / "save" / "record" / "filters.png"
        arguments = [str(picture), "--figure", str(tmp_path / "out.png")]
    code = KERNEL.format(root=str(m.ROOT), program=program, arguments=arguments)
    cells = [nbformat.v4.new_code_cell(part) for part in code.split("#%%\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for cell in notebook.cells:
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(shown) == 1, cell.source


# ── While the run is saving ───────────────────────────────────────────────────────────────────────


def test_between_the_renames_of_a_save_the_previous_checkpoint_is_read(save, capsys):
    last, previous = (save / "real" / name for name in runs.CHECKPOINTS)
    last.rename(previous)
    (save / "real" / "predictions.npz").unlink()
    assert draw(save, "real") == 0
    assert "filters.png" in capsys.readouterr().out and (save / "real" / "layers.png").exists()


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_checkpoint_whose_name_changes_while_it_is_looked_for(missing):
    looked = []

    def read(path):
        looked.append(path.name)
        if len(looked) <= missing:
            raise FileNotFoundError(path)
        return path.name

    assert runs.read_newest(Path(), read) == runs.CHECKPOINTS[missing % 2]


def test_a_reader_never_sees_a_save_half_done(save):
    folder, stop = save / "real", threading.Event()
    last, previous = (folder / name for name in runs.CHECKPOINTS)
    content = last.read_bytes()
    storage.write_file(last, content, previous)

    def save_again_and_again():
        while not stop.is_set():
            storage.write_file(last, content, previous)

    writer = threading.Thread(target=save_again_and_again)
    writer.start()
    try:
        for _ in range(100):
            assert runs.has_checkpoint(folder)
            assert "conv1.weight" in runs.read_newest(folder, read_weights)
    finally:
        stop.set()
        writer.join()


# ── A crash while writing ─────────────────────────────────────────────────────────────────────────


def test_a_half_written_figure_replaces_nothing(save, monkeypatch, capsys):
    before = b"a whole figure"
    (save / "real" / "curves.png").write_bytes(before)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert draw(save, "real") == 2
    assert "No space left" in error_of(capsys)
    assert (save / "real" / "curves.png").read_bytes() == before
