"""Worker processes: what they compute, and that they neither outlive the program nor take it down
with them."""

import functools
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import mnist_resnet9 as m
from support import workers

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def scaled(arrays, factor, parts):
    return [(arrays[i] * factor, os.getpid()) for i in parts]


def fail_at(bad, part):
    if part == bad:
        raise ValueError(f"part {part}")
    return part


@pytest.fixture(params=["fork", "spawn"])
def three(request, monkeypatch):
    """Two workers beside this process, made in each way that there is."""
    if request.param == "fork" and sys.platform != "linux":
        pytest.skip("copies of a running process are made on Linux only")
    monkeypatch.setattr(workers, "METHOD", request.param)
    pool = workers.Workers(2)
    yield pool
    pool.close()


def test_each_part_is_computed_once_in_a_process_of_its_own(three, rng):
    arrays = [
        rng.standard_normal((40, 30 + i)).astype(np.float32)[:, ::2] for i in range(5)
    ]  # not contiguous
    for factor in (2, 3):  # the second message overwrites the first
        results = three.map(functools.partial(scaled, arrays, factor), [[0], [1, 4], [2, 3]])
        assert [len(part) for part in results] == [1, 2, 2]
        for i, (array, _) in zip((0, 1, 4, 2, 3), sum(results, [])):
            assert np.array_equal(array, arrays[i] * factor)
        assert (
            len({pid for part in results for _, pid in part}) == 3
            and results[0][0][1] == os.getpid()
        )


def test_arrays_that_do_not_fit_into_the_shared_memory_go_through_the_pipe(rng, monkeypatch):
    monkeypatch.setattr(workers, "SHARED_BYTES", mmap.PAGESIZE)
    arrays, pool = [rng.standard_normal(n) for n in (100, 100_000, 200)], workers.Workers(1)
    results = sum(pool.map(functools.partial(scaled, arrays, 2), [[], [0, 1, 2]]), [])
    for (array, _), expected in zip(results, arrays, strict=True):
        assert np.array_equal(array, expected * 2)
    pool.close()


def test_packed_arrays_keep_shape_order_dtype_and_are_aligned(rng):
    memory = mmap.mmap(-1, 2**16)
    message = [
        rng.standard_normal((3, 5)),
        np.arange(7, dtype=np.int8),
        np.zeros((0, 4)),
        np.asfortranarray(rng.random((4, 6))),
        {"text": "ü", "number": 1.5},
    ]
    *arrays, rest = workers.unpack(workers.pack(message, memory), memory)
    for array, expected in zip(arrays, message):
        assert np.array_equal(array, expected) and (array.shape, array.dtype) == (
            expected.shape,
            expected.dtype,
        )
        assert array.ctypes.data % 64 == 0 or not array.size
    assert rest == message[-1]
    memory[:] = bytes(2**16)
    assert not arrays[0].any()  # a view, not a copy


def test_an_error_is_raised_here_wherever_it_happens(three, capfd):
    for bad in (0, 2):
        with pytest.raises(ValueError, match=f"part {bad}"):
            three.map(functools.partial(fail_at, bad), [0, 1, 2])
        assert three.map(functools.partial(fail_at, 3), [0, 1, 2]) == [0, 1, 2]
    assert "Traceback" not in capfd.readouterr().err


@POSIX
def test_what_a_dead_worker_owes_is_computed_by_the_others(three, capsys):
    process = three.workers[0].process
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    work = functools.partial(scaled, [np.arange(4.0)] * 3, 1)
    pids = [[pid for _, pid in part] for part in three.map(work, [[0], [1], [2]])]
    assert pids == [[os.getpid()], [os.getpid()], [three.workers[0].process.pid]]
    assert capsys.readouterr().err.count("has ended") == 1 and len(three.workers) == 1
    three.map(work, [[0], [1]])
    assert capsys.readouterr().err == ""


@POSIX
def test_an_interrupted_question_leaves_no_answer_to_the_next_one(three):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            three.map(time.sleep, [5, 0.6, 0.6])
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert three.map(abs, [-1, -2, -3]) == [1, 2, 3]


def running(pid):
    """Whether the process is there, and no corpse that only waits for its parent to look."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


PROGRAM = """
import os, sys, time
sys.path.insert(0, {here!r})
from support import workers
workers.METHOD = {method!r}
if __name__ == "__main__":
    pool = workers.Workers(3)
    pool.map(abs, [1, 2, 3, 4])
    print(*(w.process.pid for w in pool.workers), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_program_however_it_ends(end, method, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(here=str(m.ROOT), method=method))
    program = subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # What a script starts with & ignores Ctrl-C, and so would whatever the tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 3 and all(map(running, pids))
    program.send_signal(end)
    program.wait(30)
    deadline = time.monotonic() + 30
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "a worker outlived the program"
        time.sleep(0.01)


@POSIX
def test_ctrl_c_reaches_the_workers_too_and_they_leave_it_to_the_program(three):
    for worker in three.workers:
        os.kill(worker.process.pid, signal.SIGINT)
    time.sleep(0.1)
    assert three.map(abs, [-1, -2, -3]) == [1, 2, 3] and len(three.workers) == 2


def test_a_limit_on_processes_leaves_fewer_workers(monkeypatch, capsys):
    start, started = multiprocessing.process.BaseProcess.start, []

    def start_one(process):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(process))

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_one)
    pool = workers.Workers(3)
    assert (
        "Only 1 of 3 worker processes started (Resource temporarily unavailable)"
        in capsys.readouterr().err
    )
    assert pool.map(abs, [-1, -2, -3, -4]) == [1, 2, 3, 4]
    pool.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_costs_no_worker(monkeypatch, capsys):
    with open(os.devnull, "w") as nowhere, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("a line that stays in the buffer")
        pool = workers.Workers(2)
        assert len(pool.workers) == 2 and pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
        pool.close()
        assert sys.stdout is full
        os.dup2(nowhere.fileno(), full.fileno())  # so that it can be closed
    assert "worker processes started" not in capsys.readouterr().err


def test_use_cores_starts_and_ends_workers(monkeypatch):
    m.use_cores(3)
    processes = [worker.process for worker in m.workers.workers]
    assert len(processes) == 2 and all(process.is_alive() for process in processes)
    m.use_cores(1)
    assert not m.workers.workers and not any(process.is_alive() for process in processes)
    monkeypatch.setattr(m, "xp", object())
    m.use_cores(3)  # a GPU needs none
    assert not m.workers.workers


@pytest.mark.parametrize(
    "count, parts", [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [1, 1, 2]), (16, [5, 5, 6])]
)
def test_shards_are_spread_evenly_and_in_order(count, parts, monkeypatch):
    spread = []
    monkeypatch.setattr(m.workers, "workers", [None] * 2)
    monkeypatch.setattr(
        m.workers,
        "map",
        lambda work, of: spread.extend(map(len, of)) or [work(part) for part in of],
    )
    shards = m.shards_of(16 * count - 3, 16)
    assert [i for i, _ in shards] == list(range(count))
    assert [i for _, s in shards for i in range(s.start, s.stop)] == list(range(16 * count - 3))
    assert (
        m.over_cores(lambda part: [i for i, _ in part], shards) == list(range(count))
        and spread == parts
    )


def blas_threads(_):
    return [
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    ]


def test_every_process_computes_with_one_thread(three):
    """Whatever BLAS NumPy is built with: more threads than one in each process would fight for the
    cores."""
    for counts in three.map(blas_threads, [0, 1, 2]):
        assert counts and set(counts) == {1}
