"""What must not cost a run: damaged checkpoints, a full disk, two programs at once, stops in the
middle of a save."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from programs import few_digits, metrics_of, start

import mnist_resnet9 as m
from support import checkpoints, mnist, storage

resource = pytest.importorskip("resource")  # POSIX

SETTINGS = m.Settings(channels=(2, 4, 4, 4), ema=0.9)
FLAGS = (
    *("--data-dir", few_digits(), "--device", "cpu", "--threads", "1", "--channels", "2,4,4,4"),
    *("--ema", "0.9", "--train-images", "64", "--batch-size", "32", "--epochs-max", "2"),
)


def train(save, **options):
    command = [sys.executable, "mnist_resnet9.py", *FLAGS, "--save-dir", str(save)]
    return subprocess.run(
        command, cwd=m.ROOT, capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def state(rng):
    state = m.init_state(SETTINGS)
    state.moments[...] = rng.standard_normal(state.moments.shape)
    state.step, state.history = 7, [dict.fromkeys(checkpoints.HISTORY, 0.1) | {"epoch": 0}]
    return state


def rewrite(path, change):
    """The checkpoint with other arrays and right checksums."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"}
    change(arrays)
    storage.write_file(path, storage.pack_arrays(**arrays, sha256=checkpoints.checksums(arrays)))


def test_a_checkpoint_has_the_same_bytes_at_any_time(state, tmp_path, monkeypatch):
    storage.write_file(tmp_path / "a.npz", m.checkpoint_of(state, SETTINGS))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    storage.write_file(
        tmp_path / "b.npz",
        m.checkpoint_of(state, replace(SETTINGS, threads=3, save_dir="elsewhere")),
    )
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = m.load_checkpoint(tmp_path / "a.npz", SETTINGS)
    assert np.array_equal(again.moments, state.moments) and (again.step, again.history) == (
        7,
        state.history,
    )


CHANGES = {
    "NaN": (
        lambda a: a["conv3.weight"].__setitem__((0, 0, 0, 0), np.nan),
        "conv3.weight is not all finite",
    ),
    "moments": (lambda a: a["moments"].__setitem__((0, 0), np.inf), "moments is not all finite"),
    "dtype": (lambda a: a.update({"fc9.bias": a["fc9.bias"].astype(float)}), "fc9.bias float64"),
    "shape": (lambda a: a.update({"fc9.bias": a["fc9.bias"][:9]}), r"\(9,\)"),
    "missing": (lambda a: a.pop("ema.conv1.bias"), "it has no ema.conv1.bias"),
    "extra": (lambda a: a.update(more=np.zeros(3)), "it has more, which is not expected"),
    "version": (lambda a: a.update(version=np.int64(99)), "its version is not 1"),
    "history": (lambda a: a["history"].__setitem__((0, 0), 5), "history"),
    "step": (lambda a: a.update(step=np.int64(-1)), "its step is -1"),
    "settings": (
        lambda a: a.update(settings=np.array(json.dumps({"pool": "avg", "optimizer": "adam"}))),
        "its pool",
    ),
}


def test_reading_a_file_takes_the_memory_of_its_bytes(tmp_path):
    """Not of as many as it may have: under `ulimit -v 4000000` no checkpoint could be read."""
    path = tmp_path / "small"
    path.write_bytes(bytes(1000))
    tracemalloc.start()
    try:
        content = storage.read_file(path, checkpoints.MAX_BYTES)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert content == bytes(1000) and most < 10**6
    with pytest.raises(OSError, match="larger than 0 MiB"):
        storage.read_file(path, 999)
    assert storage.read_file(path, 1000) == content


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_with_wrong_contents_is_refused(kind, state, tmp_path):
    change, said = CHANGES[kind]
    path = tmp_path / "c.npz"
    storage.write_file(path, m.checkpoint_of(state, SETTINGS))
    rewrite(path, lambda arrays: None)
    m.load_checkpoint(path, SETTINGS)
    rewrite(path, change)
    with pytest.raises(m.UserError, match=said):
        m.load_checkpoint(path, SETTINGS)


def test_one_changed_number_is_found_by_its_checksum(state, tmp_path):
    path = tmp_path / "c.npz"
    storage.write_file(path, m.checkpoint_of(state, SETTINGS))
    with np.load(path) as file:
        arrays = dict(file)
    arrays["conv1.bias"][0] += 1
    storage.write_file(path, storage.pack_arrays(**arrays))
    with pytest.raises(m.UserError, match="checksums"):
        m.load_checkpoint(path, SETTINGS)


def test_a_pickle_and_a_zip_bomb_are_refused(state, tmp_path):
    path = tmp_path / "c.npz"
    storage.write_file(path, m.checkpoint_of(state, SETTINGS))
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"history": np.array([{}], object)})
    with pytest.raises(m.UserError, match="Python objects"):
        m.load_checkpoint(path, SETTINGS)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("version.npy", b"\0" * 10**7)
    with pytest.raises(m.UserError, match="not as a run packs them"):
        m.load_checkpoint(path, SETTINGS)


def test_what_is_not_finite_is_not_saved(state, tmp_path):
    path = tmp_path / "c.npz"
    storage.write_file(path, m.checkpoint_of(state, SETTINGS))
    before = path.read_bytes()
    state.moments[1, 5] = np.inf
    with pytest.raises(m.UserError, match="step 7"):
        storage.write_file(path, m.checkpoint_of(state, SETTINGS))
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", range(4))
def test_a_save_that_ends_at_any_of_its_calls_leaves_a_whole_checkpoint(
    call, state, tmp_path, monkeypatch
):
    last, previous = tmp_path / "checkpoint_last.npz", tmp_path / "checkpoint_previous.npz"
    for state.step in (1, 2):
        storage.write_file(last, m.checkpoint_of(state, SETTINGS), previous)
    state.step, calls = 3, []

    class Killed(BaseException):
        pass

    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def die(*args, name=name, real=real):
            calls.append(name)
            if len(calls) == call + 1:
                raise Killed
            return real(*args)

        monkeypatch.setattr(os, name, die)
    with pytest.raises(Killed):
        storage.write_file(last, m.checkpoint_of(state, SETTINGS), previous)
    path = last if last.exists() else previous
    assert m.load_checkpoint(path, SETTINGS).step == (3 if call == 3 else 2)


def test_a_full_disk_is_said_and_costs_no_earlier_checkpoint(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    result = train(tmp_path, preexec_fn=limit)
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "cannot be written" in result.stderr
    )
    assert train(tmp_path).returncode == 0
    before = (tmp_path / "resnet9" / "checkpoint_last.npz").read_bytes()
    flags = [sys.executable, "mnist_resnet9.py", *FLAGS[:-1], "3", "--save-dir", str(tmp_path)]
    result = subprocess.run(
        flags, cwd=m.ROOT, capture_output=True, text=True, preexec_fn=limit_4k, timeout=120
    )
    assert result.returncode == 1 and "predictions.npz was NOT written" in result.stderr
    assert "Traceback" not in result.stderr and "Finished" in result.stdout
    assert (tmp_path / "resnet9" / "checkpoint_last.npz").read_bytes() == before


def limit_4k():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))


def test_a_second_program_on_one_folder_is_refused_and_a_dead_one_holds_no_lock(tmp_path):
    assert train(tmp_path).returncode == 0
    hold = """
import sys, pathlib; from support import storage
f = storage.lock_file(pathlib.Path(sys.argv[1])); print('held', flush=True); input()
"""
    command = [sys.executable, "-c", hold, str(tmp_path / "resnet9" / "lock")]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, cwd=m.ROOT, stdin=pipe, stdout=pipe)
    holder.stdout.readline()
    result = train(tmp_path)
    assert (
        result.returncode == 2
        and "in use by another program" in result.stderr
        and result.stderr.count("\n") == 1
    )
    holder.kill()
    holder.communicate()
    assert train(tmp_path).returncode == 0


def test_metrics_are_written_anew_from_the_checkpoint_and_the_log_stays(tmp_path):
    assert train(tmp_path).returncode == 0
    folder = tmp_path / "resnet9"
    log, rows = (folder / "log.txt").read_text(), metrics_of(folder)
    (folder / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes()[:-20])
    (folder / "checkpoint_best.npz.part").write_bytes(b"half")
    assert train(tmp_path).returncode == 0  # it is finished, and says so
    longer = [*FLAGS, "--epochs-max", str(len(rows)), "--save-dir", str(tmp_path)]
    assert start("mnist_resnet9.py", *longer).returncode == 0
    assert np.array_equal(metrics_of(folder)[:-1, :6], rows[:, :6])
    assert np.isnan(metrics_of(folder)[:-1, 6:]).all()  # how long they took is lost
    assert (folder / "log.txt").read_text().startswith(log)
    assert not list(folder.glob("*.part"))


def test_a_redirect_off_https_is_refused_before_anything_is_asked_for_there():
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opener = urllib.request.build_opener(mnist.HttpsOnly, urllib.request.ProxyHandler({}))
        with pytest.raises(OSError, match="redirected to http:"):
            opener.open(f"http://127.0.0.1:{server.server_port}/start", timeout=10)
        server.shutdown()
    assert asked == ["/start"]
