"""States in which a crash, a full disk or a user can leave a run, and what becomes of them."""

import builtins
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from programs import few_digits, metrics_of

import mnist_resnet9 as m
from support import bookkeeping, checkpoints, run_folder, storage, workers
from support.bookkeeping import Bookkeeper

FLAGS = ["--data-dir", few_digits(), "--device", "cpu", "--threads", "1", "--channels", "2,4,4,4"]
FLAGS += ["--train-images", "64", "--batch-size", "32"]


def train(save, epochs=2):
    return m.main([*FLAGS, "--save-dir", str(save), "--epochs-max", str(epochs)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    save = tmp_path_factory.mktemp("trained")
    assert train(save) == 0
    return save


@pytest.fixture
def whole(trained, tmp_path):
    """A run that nothing disturbed."""
    shutil.copytree(trained, tmp_path / "whole")
    return tmp_path / "whole" / "resnet9"


def same_end(folder, whole):
    files = ("checkpoint_last.npz", "checkpoint_best.npz", "predictions.npz")
    return all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files)


@pytest.mark.parametrize("best", [False, True], ids=["no best", "a best"])
def test_a_run_without_any_checkpoint_starts_from_epoch_0(best, whole, tmp_path, capsys):
    """As after a power cut between the first metrics.csv and the first checkpoint."""
    folder = tmp_path / "again" / "resnet9"
    assert train(tmp_path / "again", epochs=1) == 0
    for path in folder.glob("checkpoint_*.npz"):
        if not best or path.name != "checkpoint_best.npz":
            path.unlink()
    capsys.readouterr()
    assert train(tmp_path / "again") == 0
    said = capsys.readouterr().err
    assert "has no checkpoint to continue from" in said and "epoch 0" in said
    assert said.strip() in (folder / "log.txt").read_text()
    assert same_end(folder, whole)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "1", "2"]


@pytest.mark.skipif(storage.fcntl is None, reason="Windows locks in another way")
def test_a_start_that_failed_on_a_file_system_without_locks_blocks_no_tag(tmp_path, monkeypatch):
    """The warning is in log.txt before anything else is there."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.fcntl, "lockf", lockf)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_file", full)
        assert train(tmp_path) == 2
    assert {path.name for path in (tmp_path / "resnet9").iterdir()} == {"lock", "log.txt"}
    assert train(tmp_path) == 0


def test_neither_log_nor_terminal_can_be_written_to(whole, tmp_path, monkeypatch):
    """As after a closed window, on a full disk: the run goes on to its end."""

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_lines", fails)
        patch.setattr(run_folder.tqdm, "write", fails)
        assert train(tmp_path / "again") == 1  # a file was not written
    assert same_end(tmp_path / "again" / "resnet9", whole)
    assert not (tmp_path / "again" / "resnet9" / "log.txt").exists()


FILES = ("metrics.csv", "predictions.npz", "checkpoint_best.npz", "checkpoint_last.npz")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("when", ["last", "one", "all"])
def test_an_epoch_is_saved_whole(name, when, whole, tmp_path, capsys, monkeypatch):
    """A full disk refuses one of its files: in the last epoch, in one before, or from then on."""
    again, real = tmp_path / "again", bookkeeping.write_file
    steps = {"last": (4,), "one": (2,), "all": (2, 4)}[when]

    def full(path, *rest):
        if path.name == name and now[-1] in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest)

    now, after_step = [0], m.Bookkeeper.after_step

    def counted(book, loss):
        now.append(book.state.step)
        after_step(book, loss)

    with monkeypatch.context() as patch:
        patch.setattr(bookkeeping, "write_file", full)
        patch.setattr(m.Bookkeeper, "after_step", counted)
        # The first epoch is the best, so the others do not write that file.
        failed = when != "one" and name != "checkpoint_best.npz"
        assert train(again) == (1 if failed else 0)
    said = capsys.readouterr()
    if name != "checkpoint_best.npz":
        assert f"{name} was NOT written (No space left" in said.err
        assert f"{name} was NOT written" in (again / "resnet9" / "log.txt").read_text()
    if failed:
        state = checkpoints.read_arrays(again / "resnet9" / "checkpoint_last.npz")
        assert state["step"] == steps[0] - 2
    assert train(again) == 0
    assert ("Continuing" in capsys.readouterr().out) == failed
    assert same_end(again / "resnet9", whole)
    tables = [metrics_of(folder)[:, :6] for folder in (again / "resnet9", whole)]
    assert np.array_equal(*tables)


def test_a_run_that_is_stopped_saves_what_an_epoch_before_could_not(whole, tmp_path, monkeypatch):
    """The best checkpoint is that of its epoch, not of the moment in which it could be written."""
    real, full = bookkeeping.write_file, [True]

    def write_file(path, *rest):
        if full[0] and path.name == "checkpoint_best.npz":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest)

    after_step = m.Bookkeeper.after_step

    def stop_in_epoch_2(book, loss):
        after_step(book, loss)
        if book.state.step == 3:
            book.stop, full[0] = signal.SIGTERM, False

    with monkeypatch.context() as patch:
        patch.setattr(bookkeeping, "write_file", write_file)
        patch.setattr(m.Bookkeeper, "after_step", stop_in_epoch_2)
        assert train(tmp_path / "again") == 128 + signal.SIGTERM
    folder = tmp_path / "again" / "resnet9"
    names = ("checkpoint_best.npz", "checkpoint_last.npz")
    assert [checkpoints.read_arrays(folder / name)["step"] for name in names] == [0, 3]
    assert train(tmp_path / "again") == 0 and same_end(folder, whole)


@pytest.mark.parametrize(
    "number",
    [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.EACCES, errno.EBADF],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_file_system_that_cannot_flush_a_folder_keeps_a_run(
    call, number, whole, tmp_path, monkeypatch, capsys
):
    """CIFS, shared folders of virtual machines, WSL's drives and some of FUSE's are such."""
    real = getattr(os, call)

    def refused(what, *rest, **named):
        is_folder = os.path.isdir(f"/proc/self/fd/{what}" if call == "fsync" else what)
        if is_folder:
            raise OSError(number, os.strerror(number))
        return real(what, *rest, **named)

    capsys.readouterr()
    monkeypatch.setattr(os, call, refused)
    assert train(tmp_path / "again") == 0
    monkeypatch.undo()
    folder = tmp_path / "again" / "resnet9"
    assert same_end(folder, whole)
    said = capsys.readouterr().err
    assert said.count("***") == 1 and "may not survive a power cut" in said
    assert (folder / "log.txt").read_text().count("may not survive a power cut") == 1


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_checkpoint_is_there_at_any_moment(links, tmp_path, monkeypatch):
    """Who looks between two operations of a save finds a checkpoint, where there are links."""
    folder, missing = tmp_path / "resnet9", []
    assert train(tmp_path, epochs=1) == 0
    replace_file = os.replace

    def looked_at(*names):
        replace_file(*names)
        missing.append(not (folder / "checkpoint_last.npz").exists())

    def no_link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", looked_at)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    assert train(tmp_path, epochs=3) == 0
    assert len(missing) > 6 and any(missing) != links
    steps = [
        checkpoints.read_arrays(folder / f"checkpoint_{name}.npz")["step"]
        for name in ("last", "previous")
    ]
    assert steps == [6, 4]
    assert {path.name for path in folder.glob("*.part")} == set()


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(number, whole, monkeypatch, capsys):
    files = {path.name: path.read_bytes() for path in whole.glob("*.npz")}
    real = builtins.open

    def unreadable(path, *args, **named):
        if str(path).endswith("checkpoint_last.npz") and args == ("rb",):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **named)

    monkeypatch.setattr(builtins, "open", unreadable)
    assert train(whole.parent, epochs=3) == 2
    error = capsys.readouterr().err
    assert f"cannot be read ({os.strerror(number)}); nothing was changed" in error
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in whole.glob("*.npz")} == files


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"seed": 1}, {"dropout": 0.5}])
def test_a_checkpoint_of_other_settings_is_refused(change, whole):
    settings = m.parse_settings([*FLAGS, "--save-dir", str(whole.parent)])
    path = whole / "checkpoint_last.npz"
    assert m.load_checkpoint(path, settings).step == 4
    with pytest.raises(m.UserError, match=f"its {next(iter(change))} is "):
        m.load_checkpoint(path, replace(settings, **change))


def test_a_config_of_many_brackets_is_damaged(whole, capsys):
    (whole / "config.json").write_text("[" * 100_000)
    assert train(whole.parent) == 2
    assert "config.json is damaged" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_closed_terminal_stops_a_run_as_ctrl_c_does(tmp_path):
    command = [sys.executable, "mnist_resnet9.py", *FLAGS, "--save-dir", str(tmp_path)]
    log = tmp_path / "resnet9" / "log.txt"
    # Under nohup a run goes on. Should the tests themselves be under it, this run is not.
    heard = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen([*command, "--epochs-max", "10000"], cwd=m.ROOT, preexec_fn=heard)
    for _ in range(600):
        if log.exists() and "    2  " in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert "everything is saved" in log.read_text()
    assert checkpoints.HISTORY and (tmp_path / "resnet9" / "checkpoint_last.npz").exists()


def double(part):
    return [2 * x for x in part]


@pytest.mark.skipif(workers.METHOD != "fork", reason="processes are stopped by a signal")
def test_a_stopped_worker_is_ended_and_its_part_is_computed_here(monkeypatch, capfd):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    team = workers.Workers(2)
    try:
        assert team.map(double, [[1], [2], [3]]) == [[2], [4], [6]]
        stopped = team.workers[0].process
        os.kill(stopped.pid, signal.SIGSTOP)
        assert team.map(double, [[1], [2], [3]]) == [[2], [4], [6]]
        assert "does not answer" in capfd.readouterr().err and len(team.workers) == 1
        stopped.join(10)
        assert stopped.exitcode == -signal.SIGKILL
        os.kill(team.workers[0].process.pid, signal.SIGSTOP)
    finally:
        team.close()  # does not wait for the one that is stopped
    assert not team.workers


@pytest.mark.parametrize("name", ["checkpoint_damaged.npz", "checkpoint_last.npz"])
def test_a_disk_that_refuses_while_a_run_is_restored_is_one_line(name, whole, monkeypatch, capsys):
    """Renaming and looking at a file can each fail, and each leaves all as it was."""
    if name == "checkpoint_damaged.npz":
        (whole / "checkpoint_last.npz").write_bytes(b"damaged")
        monkeypatch.setattr(os, "replace", refuse("checkpoint_last.npz", os.replace))
    else:
        monkeypatch.setattr(type(whole), "exists", refuse(name, type(whole).exists))
    before = {path.name: path.read_bytes() for path in whole.glob("*.npz")}
    assert train(whole.parent) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and os.strerror(errno.EIO) in error
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in whole.glob("*.npz")} == before


def refuse(name, real):
    """The function, but with an error of the disk for the file of this name."""

    def call(path, *rest, **named):
        if str(path).endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *rest, **named)

    return call


def test_too_little_memory_is_one_line_and_no_checkpoint_is_called_damaged(
    whole, monkeypatch, capsys
):
    files = {path.name: path.read_bytes() for path in whole.glob("*.npz")}
    monkeypatch.setattr(checkpoints, "unpack", fails(MemoryError("Unable to allocate")))
    assert train(whole.parent, epochs=3) == 2
    monkeypatch.undo()
    monkeypatch.setattr(m, "learn_from", fails(MemoryError("Unable to allocate 3 GiB")))
    assert train(whole.parent, epochs=3) == 2
    error = capsys.readouterr().err
    assert error.count("Out of memory (Unable to allocate") == 2 and error.count("\n") == 2
    assert {path.name: path.read_bytes() for path in whole.glob("*.npz")} == files


@pytest.mark.parametrize("epochs", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_that_cannot_be_saved_ends_and_can_be_continued(epochs, tmp_path, capsys):
    """It is computed for nothing. Here the folder was renamed while the run went on."""
    folder, moved = tmp_path / "resnet9", tmp_path / "moved"
    real = Bookkeeper.steps

    def rename_first(self, epoch):
        if epoch == 2:
            folder.rename(moved)
        return real(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bookkeeper, "steps", rename_first)
        patch.setattr(bookkeeping, "UNSAVED_EPOCHS", epochs)
        flags = [*FLAGS, "--save-dir", str(tmp_path), "--epochs-max", "10"]
        assert m.main(flags) == 1
    output = capsys.readouterr()
    assert f"The last {epochs} epochs could not be saved" in output.out
    assert f"    {1 + epochs}  " in output.out and f"    {2 + epochs}  " not in output.out
    assert "from before stays" not in output.err  # none is there
    moved.rename(folder)
    assert m.main(flags) == 0
    assert m.main([*FLAGS, "--save-dir", str(tmp_path / "whole"), "--epochs-max", "10"]) == 0
    assert same_end(folder, tmp_path / "whole" / "resnet9")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no file without an end here")
@pytest.mark.parametrize("name", ["metrics.csv", "config.json"])
def test_a_file_without_an_end_is_not_read_for_ever(name, whole, capsys):
    (whole / name).unlink()
    (whole / name).symlink_to("/dev/zero")
    status = {"metrics.csv": 0, "config.json": 2}[name]
    assert train(whole.parent, epochs=3) == status
    error = capsys.readouterr().err
    assert name == "metrics.csv" or f"{name}" in error and "is not a file" in error


@pytest.mark.skipif(workers.METHOD != "fork", reason="processes are stopped by a signal")
def test_a_stopped_worker_does_not_hold_up_a_stop(tmp_path):
    """With patience of half a minute and more, Ctrl-C still ends the run within seconds."""
    script = """
import os, signal, sys, threading, time
import mnist_resnet9 as m

def stop_worker_then_run():
    os.kill(m.workers.workers[0].process.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

real = m.Bookkeeper.steps
def steps(self, epoch):
    if epoch == 2:
        stop_worker_then_run()
    return real(self, epoch)
m.Bookkeeper.steps = steps
sys.exit(m.main(sys.argv[1:]))
"""
    flags = [*FLAGS, "--threads", "2", "--save-dir", str(tmp_path), "--epochs-max", "1000"]
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script, *flags],
        cwd=m.ROOT,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 130 and "everything is saved" in result.stdout
    assert "does not answer" in result.stderr and time.monotonic() - started < workers.PATIENCE


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_outside_the_training_says_nothing_false(when, whole, monkeypatch, capsys):
    before = (whole / "checkpoint_last.npz").read_bytes()
    where, name = (m, "load_mnist") if when == "before" else (m.Workers, "close")
    real = getattr(where, name)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupted)
    assert train(whole.parent, epochs=2 if when == "before" else 3) == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "Stopped; there is nothing to save."
    monkeypatch.undo()
    assert (before == (whole / "checkpoint_last.npz").read_bytes()) == (when == "before")


@pytest.mark.long
@pytest.mark.parametrize("failing", ["checkpoint_best.npz", "predictions.npz", "metrics.csv"])
def test_what_one_epoch_could_not_save_a_later_one_does(failing, tmp_path, monkeypatch, capsys):
    """The disk is full while epoch 1 is saved, whose checkpoint is the best but for the last."""
    flags = [*FLAGS, "--train-images", "512", "--dropout", "0", "--learning-rate", "0.01"]
    flags += ["--epochs-max", "2", "--save-dir"]
    with pytest.MonkeyPatch.context() as patch:
        # epoch 2 is no better: what epoch 1 failed to save must be kept for it
        patch.setattr(m, "update", once_an_epoch(m.update, 16))
        assert m.main([*flags, str(tmp_path / "whole")]) == 0
    path, real, failed = tmp_path / "again" / "resnet9" / failing, storage.os.replace, []

    def full(source, target):
        if target == path:
            log = path.with_name("log.txt").read_text()
            if "\n    1  " in log and "\n    2  " not in log:
                failed.append(target)
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", full)
    monkeypatch.setattr(m, "update", once_an_epoch(m.update, 16))
    assert m.main([*flags, str(tmp_path / "again")]) == 0  # all there is to save was saved
    assert failed and f"{failing} was NOT written" in capsys.readouterr().err
    assert same_end(tmp_path / "again" / "resnet9", tmp_path / "whole" / "resnet9")
    assert len(path.with_name("metrics.csv").read_text().splitlines()) == 4


def once_an_epoch(update, steps):
    """An update that learns in the first epoch alone, so that no later one is better."""

    def call(state, *rest):
        if state.step < steps:
            update(state, *rest)
        else:
            state.step += 1

    return call


def test_lines_that_the_log_lacks_come_with_the_next_one(tmp_path, monkeypatch, capsys):
    real, calls = builtins.open, []

    def full(path, *rest, **named):
        if str(path).endswith("log.txt") and rest[:1] == ("a",):
            calls.append(path)
            if len(calls) in (3, 4):
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest, **named)

    monkeypatch.setattr(builtins, "open", full)
    assert train(tmp_path) == 0
    output = capsys.readouterr()
    assert output.err.count("log.txt was NOT written") == 2
    said = [line for line in output.out.splitlines() if line]
    assert (tmp_path / "resnet9" / "log.txt").read_text().splitlines() == said


@pytest.mark.skipif(os.name != "posix", reason="limits the size of a file")
def test_half_a_line_of_the_log_does_not_stay(tmp_path, monkeypatch):
    """A disk that is nearly full takes the first bytes of a line, and then no more."""
    import resource

    path = tmp_path / "log.txt"
    run_folder.append_lines(path, ["first"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError):
            run_folder.append_lines(path, ["second", "third"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "first\n"
    run_folder.append_lines(path, ["second", "third"])
    assert path.read_text() == "first\nsecond\nthird\n"


def test_a_new_save_dir_survives_a_power_cut(tmp_path, monkeypatch):
    """Every folder whose name is new has that name flushed in the folder above."""
    flushed, real = [], storage.flush_folder
    monkeypatch.setattr(storage, "flush_folder", lambda path: (flushed.append(path), real(path)))
    assert train(tmp_path / "new" / "runs", epochs=1) == 0
    assert {tmp_path, tmp_path / "new", tmp_path / "new" / "runs"} <= set(flushed)


def test_what_goes_wrong_stands_in_the_log_too(whole, tmp_path, capsys, monkeypatch):
    """save/README.md says that log.txt is what the terminal showed."""
    (whole / "checkpoint_last.npz").write_bytes(b"damaged")
    assert train(whole.parent, epochs=3) == 0
    assert "is damaged" in (whole / "log.txt").read_text()

    after_step = m.Bookkeeper.after_step

    def kill_a_worker(book, loss):
        after_step(book, loss)
        if book.state.step == 1:
            m.workers.workers[0].process.kill()
            m.workers.workers[0].process.join()

    capsys.readouterr()
    monkeypatch.setattr(m.Bookkeeper, "after_step", kill_a_worker)
    flags = [*FLAGS, "--threads", "2", "--save-dir", str(tmp_path / "lost"), "--epochs-max", "1"]
    assert m.main(flags) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("***")]
    log = (tmp_path / "lost" / "resnet9" / "log.txt").read_text()
    assert len(said) == 1 and "worker process" in said[0] and said[0] in log


def test_a_link_to_nowhere_is_named(tmp_path, capsys):
    """mkdir says of it that the file exists."""
    for link in (tmp_path / "resnet9", tmp_path / "runs"):
        link.symlink_to(tmp_path / "gone")
    for save in (tmp_path, tmp_path / "runs"):
        assert train(save) == 2
        error = capsys.readouterr().err
        assert "is a link to" in error and "gone, which is not there" in error
        assert error.count("\n") == 1
