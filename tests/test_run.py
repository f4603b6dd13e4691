"""The program as its user meets it: a run, its files, stopping and continuing, and what it says to
bad input."""

import json
import math
import os
import shutil
import signal
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from programs import few_digits, metrics_of, start

import mnist_resnet9 as m
from benchmarks.accuracy import share_run
from support import bookkeeping, checkpoints, run_folder, runs

SMALL = "--channels 4,16,16,16 --train-images 320 --batch-size 16 --device cpu".split()
SMALL += ["--data-dir", few_digits()]
# With these, the run that nothing disturbed.
WHOLE = "--epochs-max 3 --augment 1 --ema 0.9".split()


def train(save, *flags):
    return start("mnist_resnet9.py", *SMALL, "--save-dir", save, *flags)


def train_here(save, *flags):
    """The same in this process, where a test can change parts of the program."""
    return m.main([*SMALL, "--save-dir", str(save), *flags])


def arrays(path):
    left_out = ("settings", "sha256", "columns")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name not in left_out}


def epochs_in_log(folder):
    starts = [line[:5].strip() for line in (folder / "log.txt").read_text().splitlines()]
    return [int(start) for start in starts if start.isdigit()]


def assert_same_run(a, b):
    one, two = arrays(a / "checkpoint_last.npz"), arrays(b / "checkpoint_last.npz")
    assert one.keys() == two.keys()
    for name in one:
        if name == "history":  # runs that hold images out have one more column
            one[name], two[name] = one[name][:, :6], two[name][:, :6]
        assert np.array_equal(one[name], two[name]), name
    assert np.array_equal(*(metrics_of(folder)[:, :6] for folder in (a, b)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs that nothing disturbed."""
    save = tmp_path_factory.mktemp("whole")
    result = train(save, *WHOLE)
    assert result.returncode == 0, result.stderr
    return save / "resnet9", result.stdout


def test_a_run_leaves_the_files_that_it_promises(whole):
    folder, out = whole
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["augment"] == 1 and config["data"]["name"] == "digits"
    copy = folder / "code"
    code = {path.relative_to(copy).as_posix() for path in copy.rglob("*.py")}
    support = {f"support/{path.name}" for path in (m.ROOT / "support").glob("*.py")}
    assert "support/workers.py" in support
    assert code == {"mnist_resnet9.py", "plot_figs.py", *support}
    rows = metrics_of(folder)
    assert list(rows[:, 0]) == [0, 1, 2, 3]
    assert rows[0][2] == pytest.approx(math.log(10), abs=0.6)
    predictions = arrays(folder / "predictions.npz")
    np.testing.assert_allclose(predictions["probabilities"].sum(axis=1), 1, rtol=1e-5)
    right = predictions["predictions"] == predictions["labels"]
    assert right.mean() == pytest.approx(rows[-1][5])
    assert (folder / "log.txt").read_text() == out
    assert "digits, 320 images" in out and "Ctrl-C is safe" in out
    assert not list(folder.glob("*.part*"))


def test_the_saved_copy_of_the_program_still_runs(whole, tmp_path):
    folder, _ = whole
    flags = [*SMALL, *WHOLE, "--save-dir", tmp_path]
    result = start(folder / "code" / "mnist_resnet9.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, tmp_path / "resnet9")


def test_checkpoint_holds_the_weights_that_were_evaluated(whole, sample):
    folder, _ = whole
    settings = m.Settings(channels=(4, 16, 16, 16), ema=0.9)
    weights = m.load_weights(folder / "checkpoint_last.npz", settings)
    images, labels = sample.test_images[:100], sample.test_labels[:100]
    accuracy = m.evaluate(weights, images, labels, settings)[1]
    assert accuracy == pytest.approx(metrics_of(folder)[-1, 5])


def test_a_checkpoint_with_the_weights_only_evaluates_alike(whole, tmp_path, sample):
    """What is passed on of a finished run: half a megabyte instead of two."""
    settings = m.Settings(channels=(4, 16, 16, 16), ema=0.9)
    shutil.copytree(whole[0], tmp_path / "small")
    assert m.main(["small", "--save-dir", str(tmp_path)], share_run.main) == 0
    path = tmp_path / "small" / "checkpoint_last.npz"
    paths = whole[0] / "checkpoint_last.npz", path
    assert np.array_equal(*(m.load_weights(p, settings).flat for p in paths))
    histories = [checkpoints.read_history(checkpoints.read_arrays(p)) for p in paths]
    assert histories[0] == histories[1]
    assert path.stat().st_size < (whole[0] / "checkpoint_last.npz").stat().st_size / 3


def test_a_run_of_weights_alone_is_not_continued(whole, tmp_path):
    """Not even with a note: without its moments it would become another run."""
    shutil.copytree(whole[0], tmp_path / "resnet9")
    assert m.main(["resnet9", "--save-dir", str(tmp_path)], share_run.main) == 0
    paths = [tmp_path / "resnet9" / name for name in ("checkpoint_last.npz", "config.json")]
    before = [path.read_bytes() for path in paths]
    for epochs in ("2", "3", "4"):
        refused = train(tmp_path, *WHOLE, "--epochs-max", epochs)
        assert refused.returncode == 2 and "the weights alone" in refused.stderr
        assert "choose another --tag" in refused.stderr and refused.stderr.count("\n") == 1
    assert [path.read_bytes() for path in paths] == before


def test_a_folder_in_the_home_is_found_by_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert m.project_path("~/runs") == tmp_path / "runs"
    assert m.project_path("save") == m.ROOT / "save"


def test_only_a_finished_run_is_made_small(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "unfinished")
    config = tmp_path / "unfinished" / "config.json"
    config.write_text(config.read_text().replace('"epochs_max": 3', '"epochs_max": 4'))
    path = tmp_path / "unfinished" / "checkpoint_last.npz"
    before = path.read_bytes()
    for tag in ("unfinished", "no such run"):
        assert m.main([tag, "--save-dir", str(tmp_path)], share_run.main) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "3 of 4 epochs" in first and "no such run" in second
    assert path.read_bytes() == before


def test_the_same_command_on_a_finished_run_says_so(whole):
    folder, _ = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = train(folder.parent, *WHOLE)
    assert result.returncode == 0
    assert "is finished" in result.stdout and "--epochs-max" in result.stdout
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_another_experiment_under_the_same_tag_is_refused(whole):
    folder, _ = whole
    before = (folder / "config.json").read_bytes()
    result = train(folder.parent, *WHOLE, "--dropout", "0.5")
    assert result.returncode == 2 and "dropout 0.9, not 0.5" in result.stderr and not result.stdout
    assert result.stderr.count("\n") == 1 and (folder / "config.json").read_bytes() == before


def test_more_epochs_continue_as_if_they_had_been_asked_for_at_once(whole, tmp_path):
    folder, _ = whole
    assert train(tmp_path, *WHOLE, "--epochs-max", "1").returncode == 0
    assert train(tmp_path, *WHOLE, "--threads", "1").returncode == 0
    assert_same_run(folder, tmp_path / "resnet9")


@pytest.mark.long
def test_where_processes_cannot_be_copied_the_bits_are_the_same(whole, tmp_path):
    """As on macOS and Windows: each worker reads the script anew, and arrays go through the
    pipe."""
    shutil.copy(m.ROOT / "mnist_resnet9.py", tmp_path)
    shutil.copy(m.ROOT / "plot_figs.py", tmp_path)
    shutil.copytree(m.ROOT / "support", tmp_path / "support")
    path = tmp_path / "support" / "workers.py"
    source, choice = path.read_text(), '"fork" if sys.platform == "linux" else "spawn"'
    assert choice in source
    path.write_text(source.replace(choice, '"spawn"'))
    flags = [*SMALL, *WHOLE, "--threads", "2"]
    result = start(tmp_path / "mnist_resnet9.py", *flags, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert_same_run(whole[0], tmp_path / "save" / "resnet9")


def test_validation_images_are_measured_and_not_trained_on(tmp_path, sample):
    """A run on 320 images that holds 100 out is a run on the 220 others, and one more column."""
    fewer = "--epochs-max 2 --tag fewer --train-images 220".split()
    assert train(tmp_path, *fewer).returncode == 0
    held_out = "--epochs-max 2 --tag held_out --validation-images 100".split()
    result = train(tmp_path, *held_out)
    assert result.returncode == 0
    assert "220 images, 14 steps" in result.stdout and "valid acc" in result.stdout
    assert_same_run(tmp_path / "fewer", tmp_path / "held_out")
    settings = m.Settings(channels=(4, 16, 16, 16))
    params = m.load_weights(tmp_path / "held_out" / "checkpoint_last.npz", settings)
    accuracy = m.evaluate(
        params, sample.train_images[220:320], sample.train_labels[220:320], settings
    )[1]
    path = tmp_path / "held_out" / "metrics.csv"
    assert path.read_text().startswith(",".join((*run_folder.METRICS, "validation_accuracy\n")))
    rows = run_folder.read_metrics(path)
    assert rows[-1]["validation_accuracy"] == pytest.approx(accuracy)
    assert f"{accuracy:.2%}" in result.stdout
    assert train(tmp_path, *held_out, "--epochs-max", "3").returncode == 0
    assert [len(row) for row in run_folder.read_metrics(path)] == [9] * 4


def test_a_run_from_before_a_setting_came_in_is_continued(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "resnet9")
    path = tmp_path / "resnet9" / "config.json"
    config = json.loads(path.read_text())
    del config["settings"]["validation_images"]
    path.write_text(json.dumps(config))
    result = train(tmp_path, *WHOLE)
    assert result.returncode == 0 and "is finished" in result.stdout, result.stderr


def test_a_finished_run_says_only_what_is_possible(tmp_path, capsys):
    for schedule, possible in (("constant", "raise --epochs-max"), ("one_cycle", "another --tag")):
        flags = f"--tag {schedule} --schedule {schedule} --epochs-max 1 --train-images 64".split()
        flags += "--channels 2,4,4,4 --threads 1".split()
        for _ in range(2):
            assert train_here(tmp_path, *flags) == 0
        assert "is finished" in (out := capsys.readouterr().out) and possible in out
        refused = train_here(tmp_path, *flags, "--epochs-max", "2")
        assert (refused == 2) == (schedule == "one_cycle")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_stopped_within_an_epoch_it_continues_bit_for_bit(whole, tmp_path, monkeypatch, capsys):
    folder, _ = whole
    update, calls = m.update, []

    def update_and_interrupt(state, *rest):
        update(state, *rest)
        calls.append(state.step)
        if state.step in (7, 33):  # in the first and in the second epoch
            os.kill(os.getpid(), signal.SIGINT if state.step == 7 else signal.SIGTERM)

    monkeypatch.setattr(m, "update", update_and_interrupt)
    assert train_here(tmp_path, *WHOLE) == 130 and calls == list(range(1, 8))
    assert "To continue" in capsys.readouterr().out
    assert train_here(tmp_path, *WHOLE) == 143 and calls[-1] == 33
    assert train_here(tmp_path, *WHOLE) == 0 and calls == list(range(1, 61))
    assert_same_run(folder, tmp_path / "resnet9")
    assert sorted(set(epochs_in_log(tmp_path / "resnet9"))) == [0, 1, 2, 3]


@pytest.fixture
def clock(monkeypatch):
    """Time as the program sees it: a step takes 1 second, an evaluation 10."""
    now, update, evaluate = [0.0], m.update, m.evaluate

    def slow(function, seconds):
        def slowed(*args):
            now[0] += seconds
            return function(*args)

        return slowed

    monkeypatch.setattr(bookkeeping, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(m, "update", slow(update, 1))
    monkeypatch.setattr(m, "evaluate", slow(evaluate, 10))


def stop_when(monkeypatch, name, condition):
    """Ctrl-C as soon as the function of this name in the script was called with what meets the
    condition."""
    function, stopped = getattr(m, name), []

    def call_and_stop(*args):
        result = function(*args)
        if not stopped and condition(*args):
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(m, name, call_and_stop)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_time_left_is_right_after_a_stop_near_the_end_of_an_epoch(
    clock, tmp_path, monkeypatch, capsys
):
    stop_when(monkeypatch, "update", lambda state, *_: state.step == 33)
    assert train_here(tmp_path, "--epochs-max", "3") == 130
    capsys.readouterr()
    assert train_here(tmp_path, "--epochs-max", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    about, second = (
        next(i for i, line in enumerate(lines) if line.startswith(start))
        for start in ("About", "    2 ")
    )
    assert about < second  # after the seven steps that were left, not with an evaluation among them
    assert lines[second].endswith("  40 s")  # 20 steps and two evaluations


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_stop_after_the_last_step_leaves_a_finished_run(tmp_path, monkeypatch, capsys):
    stop_when(monkeypatch, "checkpoint_of", lambda state, settings: state.step == 20)
    assert train_here(tmp_path, "--epochs-max", "1") == 0
    out = capsys.readouterr().out
    assert "Finished." in out and "Stopped" not in out


def test_killed_it_continues_from_the_last_epoch(whole, tmp_path, monkeypatch):
    folder, _ = whole
    write = m.Bookkeeper.write

    def die_instead_of_saving(self, path, *rest):
        if self.state.step == 40 and path.name == "checkpoint_last.npz":
            raise SystemExit("killed after log and metrics, before the checkpoint")
        return write(self, path, *rest)

    monkeypatch.setattr(m.Bookkeeper, "write", die_instead_of_saving)
    with pytest.raises(SystemExit):
        train_here(tmp_path, *WHOLE)
    monkeypatch.setattr(m.Bookkeeper, "write", write)
    assert train_here(tmp_path, *WHOLE) == 0
    assert_same_run(folder, tmp_path / "resnet9")
    assert sorted(set(epochs_in_log(tmp_path / "resnet9"))) == [0, 1, 2, 3]


@pytest.mark.exhaustive
def test_the_sample_is_learnt_in_seconds(tmp_path):
    flags = "--train-images 0 --channels 4,16,32,64 --epochs-max 3 --dropout 0.5".split()
    flags += "--learning-rate 3e-3 --schedule one_cycle".split()
    result = train(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert metrics_of(tmp_path / "resnet9")[-1, 5] > 0.95


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    result = train(tmp_path, "--learning-rate", "1000", "--optimizer", "sgd")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "learning rate 1000" in result.stderr
    kept = arrays(tmp_path / "resnet9" / "checkpoint_last.npz")
    assert all(np.isfinite(array).all() for array in kept.values())


@pytest.mark.parametrize("recipe", m.RECIPES)
def test_a_recipe_comes_before_the_flags(recipe):
    settings = m.parse_settings(["--recipe", recipe])
    assert settings == replace(m.Settings(), **m.RECIPES[recipe])
    assert (
        settings.batch_size == 64
        and settings.validation_images == 0
        and (recipe != "quick" or settings.epochs_max <= 3)
    )
    assert m.parse_settings(["--dropout", "0.25", "--recipe", recipe]) == replace(
        settings, dropout=0.25
    )


BAD = {
    "--foo 1": "--learning-rate",
    "stray": "unrecognized",
    "--batch-size 0": "batch_size is 0",
    "--batch-size 1.5": "invalid int",
    "--dropout 1": "dropout is 1.0",
    "--learning-rate -1": "learning_rate is -1.0",
    "--learning-rate nan": "learning_rate is nan",
    "--threads 10000": "from 0 to 256",
    "--seed x": "invalid int",
    "--pool mean": "max",
    "--channels 1,2": "4,16,32,64",
    "--channels a": "invalid",
    "--recipe nonsense": "reference",
    "--tag ../up": "cannot name a folder",
    "--tag a/b": "cannot name a folder",
    "--tag ..": "cannot name a folder",
    "--train-images 70000": "the data set has",
    "--train-images 600 --validation-images 600": "validation_images is 600",
    "--save-dir requirements.txt": "cannot be written",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line_and_exit_status_2(flags, tmp_path, capsys, monkeypatch):
    given = flags.split()
    where = [] if "--save-dir" in given else ["--save-dir", str(tmp_path / "save")]
    assert m.main(["--data-dir", "data/sample", "--device", "cpu", *where, *given]) == 2
    out, err = capsys.readouterr()
    assert BAD[flags] in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "save").exists()


def test_device_gpu_without_a_gpu_says_why(capsys):
    try:
        import cupy

        if cupy.is_available():
            pytest.skip("there is a GPU")
    except ImportError:
        pass
    assert m.main(["--device", "gpu"]) == 2
    assert "device gpu cannot be used: " in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "resnet9").mkdir()
    (tmp_path / "resnet9" / "thesis.tex").write_text("years of work")
    assert train_here(tmp_path) == 2
    assert "something other than a run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "resnet9").iterdir()] == ["thesis.tex"]


def test_the_note_on_other_code_names_the_copy_that_the_run_went_on_with(whole, tmp_path):
    """And none where there is none, as in a run that was passed on."""
    shutil.copytree(whole[0], tmp_path / "resnet9")
    folder = tmp_path / "resnet9"

    def note():
        return runs.read_run(folder, m.Settings).note_on_code("another")

    for name in ("code", "code_2", "code_10"):
        (folder / name).mkdir(exist_ok=True)
        assert f"{os.sep}{name} holds" in note()
        assert run_folder.newest_code(folder) == folder / name
    (folder / "code_11_of_mine").mkdir()
    assert f"{os.sep}code_10 holds" in note()
    for path in folder.glob("code*"):
        shutil.rmtree(path)
    assert "holds" not in note() and "was trained by other code: what" in note()


def bookkeeper(folder, history=(), **changes):
    """A Bookkeeper of a run of three epochs of ten steps, without anything that computes."""
    settings = m.Settings(batch_size=1, epochs_max=3, **changes)
    state = SimpleNamespace(step=10 * max(0, len(history) - 1), history=list(history))
    log = SimpleNamespace(path=folder, read_others=dict, log=print)
    return m.Bookkeeper(settings, log, state, None, None, 10, 10, on_gpu=False)


def test_the_first_step_starts_the_clock(tmp_path, monkeypatch):
    """Making the engine and starting the other processes takes seconds, and only once."""
    now = [0.0]
    monkeypatch.setattr(bookkeeping.time, "perf_counter", lambda: now[0])
    for history in ([], [{"epoch": 0}, {"epoch": 1}]):
        now[0], said = 0.0, []
        book = bookkeeper(tmp_path, history)
        monkeypatch.setattr(book, "say_how_long", said.append)
        # Until here the run prepares itself.
        now[0] = 1000.0
        for _ in book.steps(max(1, len(history))):
            now[0] += 2.0
            book.state.step += 1
            book.after_step(1.0)
        assert said == [2.0]


@pytest.mark.parametrize("missing", [math.nan, None])
def test_the_best_epoch_is_one_that_was_measured(missing, tmp_path):
    """An older start of the run held out no images."""
    accuracies = [missing, 0.5, missing, 0.7, 0.6]
    rows = [{"epoch": i, "validation_accuracy": a} for i, a in enumerate(accuracies)]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert bookkeeper(tmp_path, rows, validation_images=1).best()["epoch"] == 3


@pytest.mark.parametrize("batch, words", [(64, "1 step an epoch"), (32, "2 steps an epoch")])
def test_one_step_is_no_steps(batch, words, tmp_path, capsys):
    flags = ["--train-images", "64", "--batch-size", str(batch), "--channels", "2,2,2,2"]
    assert train_here(tmp_path, *flags, "--epochs-max", "1", "--threads", "1") == 0
    assert f"64 images, {words}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "checkpoint_last.npz"])
def test_a_run_of_git_lfs_pointers_is_left_as_it_is(name, whole, tmp_path, capsys):
    """Also where the checkpoint before is there: nothing is damaged."""
    shutil.copytree(whole[0], tmp_path / "resnet9")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11490434\n"
    (tmp_path / "resnet9" / name).write_bytes(pointer)
    before = {path: path.read_bytes() for path in (tmp_path / "resnet9").glob("*.*")}
    assert train_here(tmp_path, *WHOLE, "--epochs-max", "4") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is a git-lfs pointer, not the file: run" in error
    assert {path: path.read_bytes() for path in before} == before


def damage(path):
    content = bytearray(path.read_bytes())
    # Within that array, not in a header that nobody reads.
    content[content.index(b"conv5.weight.npy") + 1000] ^= 255
    path.write_bytes(bytes(content))
    return bytes(content)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_continues(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "resnet9")
    before = (tmp_path / "resnet9" / "checkpoint_last.npz").read_bytes()
    content = damage(tmp_path / "resnet9" / "checkpoint_last.npz")
    result = train(tmp_path, *WHOLE)
    assert result.returncode == 0 and "is damaged" in result.stderr
    assert "checkpoint_previous.npz, step 40" in result.stderr
    assert (tmp_path / "resnet9" / "checkpoint_last.npz").read_bytes() == before
    assert (tmp_path / "resnet9" / "checkpoint_damaged.npz").read_bytes() == content
    assert_same_run(whole[0], tmp_path / "resnet9")


def test_two_damaged_checkpoints_are_reported_and_not_overwritten(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "resnet9")
    paths = [tmp_path / "resnet9" / f"checkpoint_{which}.npz" for which in ("last", "previous")]
    contents = [damage(path) for path in paths]
    result = train(tmp_path, *WHOLE, "--epochs-max", "4")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "is damaged" in result.stderr
    assert [path.read_bytes() for path in paths] == contents


def test_help_explains_every_setting():
    out = start("mnist_resnet9.py", "--help").stdout
    for f in fields(m.Settings):
        assert f"--{f.name.replace('_', '-')} " in out
