"""States in which a crash, a full disk or a user can leave a run, and what the repeat makes of them."""

import builtins
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import mnist_resnet9 as m
from support import checkpoints, workers

FLAGS = ["--data-dir", "data/sample", "--device", "cpu", "--threads", "1", "--channels", "2,4,4,4"]
FLAGS += ["--train-images", "64", "--batch-size", "32"]


def train(save, epochs=2):
    return m.main([*FLAGS, "--save-dir", str(save), "--epochs-max", str(epochs)])


@pytest.fixture
def whole(tmp_path):
    """A run that nothing disturbed."""
    assert train(tmp_path / "whole") == 0
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
    kept = (folder / "checkpoint_best.npz").read_bytes() if best else None
    capsys.readouterr()
    assert train(tmp_path / "again") == 0
    said = capsys.readouterr().err
    assert "has no checkpoint to continue from, only metrics.csv" in said and "epoch 0" in said
    assert same_end(folder, whole)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["0", "1", "2"]
    if best:
        assert (folder / "checkpoint_best_before.npz").read_bytes() == kept


@pytest.mark.parametrize("damage", ["missing", "older", "torn"])
def test_what_the_last_epoch_could_not_save_is_written_by_the_repeat(
    damage, whole, capsys, monkeypatch
):
    path = whole / "predictions.npz"
    wanted = path.read_bytes()
    with np.load(path) as arrays:
        older = dict(arrays)
    older["predictions"] = (older["predictions"] + 1) % 10
    if damage == "missing":
        path.unlink()
    elif damage == "older":
        m.save_arrays(path, **older)
    else:
        path.write_bytes(wanted[:1000])
    assert train(whole.parent) == 0
    assert "predictions.npz is not that of the last epoch" in capsys.readouterr().out
    assert path.read_bytes() == wanted
    assert train(whole.parent) == 0
    assert "***" not in capsys.readouterr().out.replace("*** The files", "")

    path.unlink()
    monkeypatch.setattr(m, "save_arrays", fails(OSError(errno.ENOSPC, "No space left on device")))
    assert train(whole.parent) == 1
    assert "was NOT written (No space left" in capsys.readouterr().err


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
    assert m.load_checkpoint(path, settings, to_continue=True).step == 4
    with pytest.raises(m.UserError, match=f"its {next(iter(change))} is "):
        m.load_checkpoint(path, replace(settings, **change), to_continue=True)


def test_a_config_of_many_brackets_is_damaged(whole, capsys):
    (whole / "config.json").write_text("[" * 100_000)
    assert train(whole.parent) == 2
    assert "config.json is damaged" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_closed_terminal_stops_a_run_as_ctrl_c_does(tmp_path):
    command = [sys.executable, "mnist_resnet9.py", *FLAGS, "--save-dir", str(tmp_path)]
    log = tmp_path / "resnet9" / "log.txt"
    process = subprocess.Popen([*command, "--epochs-max", "10000"], cwd=m.ROOT)
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


def test_an_older_best_checkpoint_is_written_anew_by_the_repeat(tmp_path, capsys, monkeypatch):
    """Its save failed in the last epoch, which was the best one."""
    flags = [*FLAGS, "--seed", "0", "--learning-rate", "0.01", "--epochs-max", "3"]
    assert m.main([*flags, "--save-dir", str(tmp_path / "whole")]) == 0
    wanted = (tmp_path / "whole" / "resnet9" / "checkpoint_best.npz").read_bytes()
    real = m.Run.save

    def full(self, path):
        if path == self.folder.best and len(self.state.history) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path)

    monkeypatch.setattr(m.Run, "save", full)
    command = [*flags, "--save-dir", str(tmp_path / "again")]
    best = tmp_path / "again" / "resnet9" / "checkpoint_best.npz"
    assert m.main(command) == 1
    assert best.exists() and best.read_bytes() != wanted
    monkeypatch.undo()
    capsys.readouterr()
    assert m.main(command) == 0
    assert "checkpoint_best.npz is not that of the best epoch" in capsys.readouterr().out
    assert best.read_bytes() == wanted
