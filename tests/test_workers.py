"""Worker processes: what they compute, and that they neither outlive the program nor take it down
with them."""

import functools
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

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
    pool.map(abs, [1, 2, 3])  # starts them
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
    assert len(results) == len(arrays)
    for (array, _), expected in zip(results, arrays):
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
    packed, _ = workers.pack(message, memory)
    (*arrays, rest), references = workers.unpack(packed, memory)
    for array, expected in zip(arrays, message):
        assert np.array_equal(array, expected) and (array.shape, array.dtype) == (
            expected.shape,
            expected.dtype,
        )
        assert array.ctypes.data % 64 == 0 or not array.size
    assert rest == message[-1]
    memory[:] = bytes(2**16)
    assert not arrays[0].any()  # a view, not a copy
    view = arrays[0][1:]
    del arrays, array
    assert [reference() is not None for reference in references] == [True, False, False, False]
    del view
    assert not any(reference() is not None for reference in references)


def test_an_error_is_raised_here_wherever_it_happens(three, capfd):
    for bad in (0, 2):
        with pytest.raises(ValueError, match=f"part {bad}"):
            three.map(functools.partial(fail_at, bad), [0, 1, 2])
        assert three.map(functools.partial(fail_at, 3), [0, 1, 2]) == [0, 1, 2]
    assert "Traceback" not in capfd.readouterr().err


@POSIX
def test_what_a_dead_worker_owes_is_computed_by_the_others(three, capsys):
    work = functools.partial(scaled, [np.arange(4.0)] * 3, 1)
    three.map(work, [[0], [1], [2]])
    process = three.workers[0].process
    os.kill(process.pid, signal.SIGKILL)
    process.join()
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
    # A signal may be given to a thread of BLAS; this one does not wake up for it then.
    for _ in range(600):
        time.sleep(0.1)
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
    assert pool.map(abs, [-1, -2, -3, -4]) == [1, 2, 3, 4] and pool.count == 1
    assert (
        "1 of 3 worker processes could be started (Resource temporarily unavailable); the run"
        in capsys.readouterr().err
    )
    pool.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_costs_no_worker(monkeypatch, capsys):
    with open(os.devnull, "w") as nowhere, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("a line that stays in the buffer")
        pool = workers.Workers(2)
        assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3] and len(pool.workers) == 2
        pool.close()
        assert sys.stdout is full
        os.dup2(nowhere.fileno(), full.fileno())  # so that it can be closed
    assert "could be started" not in capsys.readouterr().err


def test_use_cores_starts_and_ends_workers(monkeypatch):
    m.use_cores(3)
    assert not m.workers.workers and m.workers.count == 2  # not before they are needed
    assert m.over_cores(list, [1, 2, 3, 4]) == [1, 2, 3, 4]
    processes = [worker.process for worker in m.workers.workers]
    assert len(processes) == 2 and all(process.is_alive() for process in processes)
    m.use_cores(1)
    assert not m.workers.workers and not any(process.is_alive() for process in processes)
    monkeypatch.setattr(m, "xp", object())
    m.use_cores(3)  # a GPU needs none
    assert not m.workers.count


@pytest.mark.parametrize(
    "count, parts", [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [1, 1, 2]), (16, [5, 5, 6])]
)
def test_shards_are_spread_evenly_and_in_order(count, parts, monkeypatch):
    spread = []
    monkeypatch.setattr(m.workers, "count", 2)
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


# ── Functions that are replaced while the program lives ───────────────────────────────────────────


SLOPE = 0.25
TABLE = {"leaky": None}


def helper(x):
    return np.where(x > 0, x, SLOPE * x)


def leaky(x, out=None):
    return helper(x), x > 0


def twice(part):
    return [helper(x) for x in part]


def by_table(part):
    return [TABLE["leaky"](x) for x in part]


TINY = m.Settings(channels=(4, 4, 4, 4), dropout=0.0)


def loss_of(sample):
    state = m.init_state(TINY)
    part = slice(0, 32)
    loss, _ = m.loss_and_gradients(
        state.params, sample.train_images[part], sample.train_labels[part], TINY
    )
    return loss


def logits_of(sample):
    """A number that depends on all logits of 64 images: two shards."""
    return m.predict(m.init_state(TINY).params, sample.train_images[:64], TINY).sum(dtype=float)


@pytest.fixture
def two_cores():
    m.use_cores(2)
    yield
    m.use_cores(1)


@pytest.mark.skipif(workers.METHOD != "fork", reason="processes are copied")
def test_a_replaced_function_is_used_by_every_process(sample, two_cores, monkeypatch):
    """relu by name, a helper or a constant of the user's, a constant of the script, a table."""
    losses = {}
    for cores in (2, 1):
        m.use_cores(cores)
        with monkeypatch.context() as patch:
            said = [float(logits_of(sample))]
            for change in (
                lambda: patch.setattr(m, "relu", leaky),
                lambda: patch.setitem(globals(), "SLOPE", 0.5),
                lambda: patch.setitem(globals(), "helper", abs),
                lambda: patch.setattr(m, "PIXEL_MEAN", 0.5),
                lambda: patch.setattr(m.winograd, "conv2d", lambda x, w, b: (x[..., :1] + b, None)),
                lambda: patch.setattr(m, "relu", lambda x, out=None: (0 * x, x > 0)),
            ):
                change()
                said.append(float(logits_of(sample)))
        said.append(float(logits_of(sample)))
        losses[cores] = said
    assert losses[1] == losses[2] and losses[1][0] == losses[1][-1]
    assert len(set(losses[1])) == len(losses[1]) - 1


@pytest.mark.skipif(workers.METHOD != "fork", reason="processes are copied")
def test_functions_edited_in_place_and_tables_are_noticed(monkeypatch):
    monkeypatch.setitem(TABLE, "leaky", abs)
    pool = workers.Workers(1)
    assert pool.map(by_table, [[-2], [-2]]) == [[2], [2]]
    monkeypatch.setitem(TABLE, "leaky", float)
    assert pool.map(by_table, [[-2], [-2]]) == [[-2.0], [-2.0]]
    pids = [worker.process.pid for worker in pool.workers]
    assert pool.map(twice, [[-2.0], [-2.0]]) == [[-0.5], [-0.5]]
    assert pids != [worker.process.pid for worker in pool.workers]  # twice() was new to them
    before = helper.__code__
    helper.__code__ = (lambda x: 7).__code__  # as IPython's autoreload does
    try:
        assert pool.map(twice, [[-2.0], [-2.0]]) == [[7], [7]]
    finally:
        helper.__code__ = before
        pool.close()


class Slopes:
    slope = 0.25

    def method(self):
        return 0.25

    @staticmethod
    def static():
        return 0.25

    def __call__(self):
        return 0.25


def enclosing(f):
    def get():
        return f()

    def put(other):
        nonlocal f
        f = other

    return get, put


def constant(value):
    return lambda *_: value


OBJECT, SPACE, LIST = Slopes(), types.SimpleNamespace(slope=0.25), [0.25]
ARRAY, FUNCTIONS, TABLES = np.array([0.25, 1.0]), [None], {"a": [{}]}
BOUND = OBJECT.method
GET, PUT = enclosing(constant(0.25))


# Where a function finds what it computes with; and how that is replaced.
FINDS = {
    "attribute of a class": (lambda: Slopes.slope, lambda v: setattr(Slopes, "slope", v)),
    "a namespace": (lambda: SPACE.slope, lambda v: setattr(SPACE, "slope", v)),
    "a list": (lambda: LIST[0], lambda v: put_at(LIST, 0, v)),
    "a list that grows": (lambda: LIST[-1], lambda v: LIST.append(v)),
    "a function in a table that is new": (
        lambda: TABLES.get("f", constant(0.25))(),
        lambda v: put_at(TABLES, "f", constant(v)),
    ),
    "an array": (lambda: ARRAY[0], lambda v: put_at(ARRAY, 0, v)),
    "an attribute of a function": (
        lambda: by_list.slope,
        lambda v: setattr(by_list, "slope", v),
    ),
    "a built-in that is shadowed": (
        lambda: max(0.25, 0.1),
        lambda v: globals().update(max=constant(v)),
    ),
    "a function in a list": (lambda: FUNCTIONS[0](), lambda v: put_at(FUNCTIONS, 0, constant(v))),
    "a function in an object": (lambda: OBJECT.f(), lambda v: setattr(OBJECT, "f", constant(v))),
    "a number in a table in a list in a table": (
        lambda: TABLES["a"][0]["slope"],
        lambda v: put_at(TABLES["a"][0], "slope", v),
    ),
    "a method": (lambda: OBJECT.method(), lambda v: setattr(Slopes, "method", constant(v))),
    "a bound method": (lambda: BOUND(), lambda v: setattr(Slopes.method, "__code__", TWICE)),
    "a static method": (
        lambda: Slopes.static(),
        lambda v: setattr(Slopes, "static", staticmethod(constant(v))),
    ),
    "a call": (lambda: OBJECT(), lambda v: setattr(Slopes, "__call__", constant(v))),
    "a function of an outer function": (lambda: GET(), lambda v: PUT(constant(v))),
}
TWICE = (lambda self: 0.5).__code__


def put_at(where, key, value):
    where[key] = value


def find(name, part):
    return [float(FINDS[name][0]()) for _ in part]


@pytest.mark.skipif(workers.METHOD != "fork", reason="processes are copied")
@pytest.mark.parametrize("name", FINDS)
def test_whatever_a_function_finds_is_the_same_in_every_process(name):
    OBJECT.f, FUNCTIONS[0], TABLES["a"][0]["slope"] = constant(0.25), constant(0.25), 0.25
    SPACE.slope, LIST[:], ARRAY[:], by_list.slope = 0.25, [0.25], 0.25, 0.25
    TABLES.pop("f", None)
    kept = dict(vars(Slopes)), Slopes.method.__code__
    work, pool = functools.partial(find, name), workers.Workers(1)
    try:
        before, again = (pool.map(work, [[1], [1]]) for _ in range(2))
        pids = [worker.process.pid for worker in pool.workers]
        assert before[0] == before[1] and before == again and len(pids) == 1
        pool.map(work, [[1], [1]])
        assert pids == [worker.process.pid for worker in pool.workers]
        FINDS[name][1](0.5)
        after = pool.map(work, [[1], [1]])
        assert after[0] == after[1] != before[0]
    finally:
        pool.close()
        kept[0]["method"].__code__ = kept[1]
        for attribute in ("slope", "method", "static", "__call__"):
            setattr(Slopes, attribute, kept[0][attribute])
        PUT(constant(0.25))
        globals().pop("max", None)


SEEN, SUMS, COUNTER = [], np.zeros(2), types.SimpleNamespace(calls=0)
COUNTS = {"calls": 0}


def count(part):
    COUNTS["calls"] += 1
    SEEN.append(part)
    SUMS[1] += 1
    COUNTER.calls += 1
    return abs(part)


def test_what_a_function_counts_itself_starts_nothing_anew():
    pool, pids = workers.Workers(1), set()
    for _ in range(4):
        assert pool.map(count, [-1, -2]) == [1, 2]
        pids |= {worker.process.pid for worker in pool.workers}
    pool.close()
    assert len(pids) == 1


def test_threads_that_come_and_go_are_no_change(capsys):
    """Workers end with the thread that has started them, and the next one starts its own."""
    pool = workers.Workers(1)
    for _ in range(6):
        thread = threading.Thread(target=pool.map, args=(abs, [-1, -2]))
        thread.start()
        thread.join()
        assert pool.workers
    pool.close()
    assert not capsys.readouterr().err


def by_list(part):
    return [LIST[0] for _ in part]


def test_what_changes_before_every_call_is_computed_alone(capsys):
    """And once it has stopped to change, by the workers again."""
    pool, pids = workers.Workers(1), []
    for value in (0, 1, 2, 3, 4, 5, 5, 5):
        LIST[0] = value
        assert pool.map(by_list, [[1], [1]]) == [[value], [value]]
        pids.append(tuple(worker.process.pid for worker in pool.workers))
    pool.close()
    assert len(set(pids[:4])) == 4 and pids[4:6] == [()] * 2
    assert pids[6] == pids[7] != ()
    said = capsys.readouterr().err
    assert (
        said
        == "*** This process computes alone: what it computes with changes from call to call.\n"
    )


def test_what_stays_starts_nothing_anew(sample, two_cores):
    state = m.init_state(TINY)
    pids = set()
    for _ in range(3):
        loss_of(sample)
        m.predict(state.params, sample.train_images[:64], TINY)
        pids |= {worker.process.pid for worker in m.workers.workers}
    assert len(pids) == 1


SPAWNED = """
import sys
sys.path[:0] = [{here!r}, {tests!r}]
from support import workers
workers.METHOD = "spawn"
import mnist_resnet9 as m

if __name__ == "__main__":
    from test_workers import leaky, loss_of
    sample = m.load_mnist("data/sample")
    for cores in (1, 2):
        m.use_cores(cores)
        said = [loss_of(sample)]
        m.relu, relu = leaky, m.relu
        said += [loss_of(sample), loss_of(sample)]
        m.relu = relu
        said += [loss_of(sample), len(m.workers.workers)]
        print(*map(repr, said))
    m.use_cores(1)
"""


def test_spawned_processes_do_not_know_what_was_replaced(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(SPAWNED.format(here=str(m.ROOT), tests=str(m.ROOT / "tests")))
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    alone, shared = map(str.split, result.stdout.splitlines())
    assert alone[:-1] == shared[:-1] and alone[0] != alone[1]
    assert alone[-1] == "0" and shared[-1] == "1"  # it computes again once relu is back
    line = "*** This process computes alone: other processes find something else under these names:"
    assert result.stderr == f"{line} relu.\n"


def test_what_cannot_be_sent_is_computed_here(three, capsys):
    def local(part):
        return -part

    class Closed:
        def __reduce__(self):
            raise KeyError("no")

    partials = [functools.partial(fail_at, bad) for bad in (sys.stdout, Closed())]
    for function in (lambda part: -part, local, *partials):
        expected = [1, 2, 3] if isinstance(function, functools.partial) else [-1, -2, -3]
        assert three.map(function, [1, 2, 3]) == three.map(function, [1, 2, 3]) == expected
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and " 0x" not in error
    assert error.startswith("*** This process computes alone: what it computes cannot be sent")
    assert three.map(abs, [-1, -2, -3]) == [1, 2, 3] and len(three.workers) == 2


# ── Threads ───────────────────────────────────────────────────────────────────────────────────────


def slowly_scaled(arrays, factor, parts):
    return [arrays[i] * factor for i in parts]


def test_threads_share_the_workers_and_no_number_is_wrong(rng, monkeypatch):
    """Also where a thread holds its results while another one asks: they lie in shared memory."""
    pool, wrong, shared = workers.Workers(2), [], []
    arrays = [rng.standard_normal(1000) for _ in range(6)]
    share_out = pool.share_out

    def counted(*arguments):
        shared.append(threading.get_ident())
        return share_out(*arguments)

    monkeypatch.setattr(pool, "share_out", counted)

    def loop(factor):
        for i in range(60):
            work = functools.partial(slowly_scaled, arrays, factor + i)
            results = pool.map(work, [[0, 1], [2, 3], [4, 5]])
            time.sleep(0.0005)
            for array, result in zip(arrays, sum(results, [])):
                if not np.array_equal(array * (factor + i), result):
                    wrong.append(factor + i)
            del results, result

    threads = [threading.Thread(target=loop, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not wrong and shared
    pool.close()


def test_results_that_another_thread_holds_are_not_overwritten(rng):
    pool, array = workers.Workers(1), rng.standard_normal(100)
    times = [functools.partial(slowly_scaled, [array], factor) for factor in (2, 3)]
    held = pool.map(times[0], [[], [0]])
    answers = []

    def ask():
        answers.append(pool.map(times[1], [[], [0]]))

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(100)
    assert np.array_equal(held[1][0], 2 * array)
    for answer in answers:
        assert np.array_equal(answer[1][0], 3 * array)
    assert pool.map(times[0], [[], [0]])[1][0][0] == 2 * array[0] and len(pool.workers) == 1
    pool.close()


def test_a_thread_ends_only_the_workers_that_no_other_has_asked_for():
    pool = workers.Workers(2)
    pool.map(abs, [1, 2, 3])
    pids = [worker.process.pid for worker in pool.workers]

    def in_a_thread(*steps):
        thread = threading.Thread(target=lambda: [step() for step in steps])
        thread.start()
        thread.join(100)

    in_a_thread(lambda: pool.use(1), lambda: pool.map(abs, [1, 2]), pool.close)
    in_a_thread(pool.close)
    in_a_thread(lambda: pool.use(0))
    assert [worker.process.pid for worker in pool.workers] == pids
    in_a_thread(lambda: pool.use(3))  # and ends without close(), as by an error
    assert pool.count == 3
    pool.use(2)
    assert pool.count == 2
    pool.close()
    assert pool.count == 0 and not pool.workers


@pytest.mark.parametrize("closes", [True, False])
def test_workers_that_a_thread_has_started_may_end_with_it(closes, capfd):
    pool = workers.Workers(2)

    def first():
        pool.use(2)
        pool.map(abs, [1, 2, 3])
        if closes:
            pool.close()

    for _ in range(3):
        thread = threading.Thread(target=first)
        thread.start()
        thread.join(100)
        assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
        assert pool.count == 2 and len(pool.workers) == 2
        pool.end()  # so that the thread starts them again
    pool.close()
    assert capfd.readouterr().err == "" and not multiprocessing.active_children()


def test_an_interrupt_costs_only_the_question(three):
    for _ in range(2):
        with pytest.raises(ValueError):
            three.map(functools.partial(fail_at, 0), [0, 1, 2])
        assert three.map(functools.partial(fail_at, 9), [0, 1, 2]) == [0, 1, 2]
        assert len(three.workers) == 2


def test_a_run_that_was_hurried_leaves_no_hurry_behind():
    pool = workers.Workers(0)
    pool.hurry()
    pool.use(1)
    assert pool.patience == workers.PATIENCE
    pool.close()


# ── What a call leaves behind ─────────────────────────────────────────────────────────────────────


def test_blas_has_as_many_threads_afterwards_as_before(sample, two_cores, tmp_path, monkeypatch):
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = blas_threads(0)
        if 2 not in before:
            pytest.skip("a BLAS of one thread")
        params = m.init_params(TINY)
        m.predict(params, sample.test_images[:40], TINY)
        assert blas_threads(0) == before
        loss_of(sample)
        assert blas_threads(0) == before
        within = []
        assert m.main([], lambda arguments: within.append(blas_threads(0)) or 0) == 0
        assert set(within[0]) == {1} and blas_threads(0) == before
        assert m.main(["--tag", "no tag"]) == 2 and blas_threads(0) == before
        with pytest.raises(ZeroDivisionError):
            m.main([], lambda arguments: 1 / 0)
        assert blas_threads(0) == before


def test_blocks_of_one_blas_thread_may_overlap_in_any_order():
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = blas_threads(0)
        first, second = workers.OneBlasThread(), workers.OneBlasThread()
        with first:
            second.__enter__()
        assert set(blas_threads(0)) == {1}
        second.__exit__(None, None, None)
        assert blas_threads(0) == before


def test_a_thread_limits_blas_even_if_another_one_has_done_so_before():
    """threadpoolctl 3.8 ignores all but the first thread, and says nothing. BLAS then computes in
    several threads, in one of which the copy of a process, or the process itself, waits for ever.
    """
    limit = ThreadpoolController().limit(limits=2, user_api="blas")
    before, seen = blas_threads(0), []
    if 2 not in before:
        pytest.skip("a BLAS of one thread")

    def look():
        with workers.OneBlasThread():
            seen.append(blas_threads(0))

    with workers.OneBlasThread():
        pass
    for _ in range(2):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(60)
        assert set(seen[-1]) == {1} and blas_threads(0) == before
    look()
    assert set(seen[-1]) == {1} and blas_threads(0) == before
    limit.restore_original_limits()


def test_warnings_are_as_they_were():
    filters, errors = list(warnings.filters), np.geterr()
    seen = []
    m.main([], lambda arguments: seen.append(np.geterr()["over"]) or 0)
    assert m.main(["--tag", "no tag"]) == 2
    assert seen == ["ignore"] and warnings.filters == filters and np.geterr() == errors
    with pytest.warns(RuntimeWarning):
        np.float32(1e38) * np.float32(10)
