"""Processes that compute beside the main one, so that every core has work. Nothing here learns.

Threads would be simpler, but Python lets only one thread run at a time. Others can run while one is
inside a call of NumPy, but between hundreds of short calls they keep waiting for each other:
benchmarks/README.md has what that costs. So each further core gets a process of its own. Messages
go through a pipe, except for their arrays: these are copied once, into memory that both see.
"""

import contextlib
import ctypes
import functools
import mmap
import multiprocessing
import os
import pickle
import platform
import signal
import sys
import time
import warnings
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy  # noqa: F401  (threadpoolctl finds only a BLAS that is already loaded)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from support.terminal import signals_to

# How many times longer than this process, and a second, a worker may take. One that takes more is
# stopped, or swapped out. Whoever asks the run to stop should not have to wait so long.
PATIENCE = 30
HURRY = 2
SHARED_BYTES = 2**26  # for the arrays of one message; only what a message fills takes memory
# On other systems a copy of a running process is not safe to use.
METHOD = "fork" if sys.platform == "linux" else "spawn"


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.lru_cache(maxsize=1)
def prepare_process():
    """One thread in BLAS, the library of NumPy's matrix products, and no page faults.

    More threads would fight the other processes for the cores. And if a process is copied while
    its BLAS has threads, the copy can wait for ever for one that was not copied. So this comes
    before the first worker is started.

    malloc, the system's allocator, gives large arrays back and asks for them again. Each new page
    then costs a fault: thousands in a step. With these limits raised, glibc's malloc keeps what it
    has. Others are left as they are.
    """
    threadpool_limits(1, user_api="blas")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-2, 2**26)  # M_TOP_PAD


def shared_memory():
    """Memory that this process and its copies see.

    Without copies there is none, and arrays go through the pipe."""
    return mmap.mmap(-1, SHARED_BYTES) if METHOD == "fork" else b""


def pack(message, memory):
    """The message as bytes, and where its arrays lie in memory.

    An array for which memory has no room stays in the bytes."""
    places, used = [], 0

    def place(array):
        nonlocal used
        data = array.raw()
        if used + data.nbytes > len(memory):
            return True  # that is: into the bytes
        memory[used : used + data.nbytes] = data
        places.append((used, data.nbytes))
        used += (data.nbytes + 63) // 64 * 64  # each starts on a cache line, 64 bytes, of its own

    return pickle.dumps(message, protocol=5, buffer_callback=place), places


def unpack(packed, memory):
    """The message that was packed.

    Its arrays are views of memory: the next message will overwrite them."""
    data, places = packed
    return pickle.loads(data, buffers=[memoryview(memory)[at : at + size] for at, size in places])


def serve(connection, inbox, outbox):
    """A worker's life: function(part) for each message (function, part).

    It ends with the main process."""
    # Ctrl-C reaches every process; the main one decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":
        # Even a stopped worker ends with the main process (PR_SET_PDEATHSIG, 1).
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    warnings.simplefilter("ignore", RuntimeWarning)  # the main process checks the loss
    prepare_process()
    parent = multiprocessing.parent_process().sentinel
    # A worker ends on any error; the main process then does its part, and meets the error itself.
    with contextlib.suppress(Exception):
        while parent not in wait([connection, parent]):
            function, part = connection.recv()
            connection.send(pack(unpack(function, inbox)(part), outbox))


class Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    outbox: mmap.mmap


class Workers:
    """`count` processes beside this one. They end with it, however it ends.

    Messages are pickles, as everywhere in multiprocessing. The pipes are inherited, so nobody else
    can write to them.
    """

    def __init__(self, count):
        context = multiprocessing.get_context(METHOD)
        self.inbox = b""
        self.workers = []
        self.patience = PATIENCE
        self.took = 0  # seconds, for this process's own part
        self.ready = 0  # when it was done with it
        if not count:
            return
        prepare_process()
        self.inbox = shared_memory()
        try:
            with signals_to(signal.SIG_IGN, [signal.SIGINT]):  # a new process starts with this
                for _ in range(count):
                    self.workers.append(self.start(context))
        except OSError as error:  # a limit on processes, files or memory
            started = f"{len(self.workers)} of {count} worker processes started"
            reason = error.strerror
            tqdm.write(f"*** Only {started} ({reason}); fewer cores go on.", file=sys.stderr)

    def start(self, context):
        here, there = context.Pipe()
        outbox = shared_memory()
        arguments = (there, self.inbox, outbox)
        process = context.Process(target=serve, args=arguments, daemon=True)
        # A start flushes the output; were that to fail, it would look as if the start had.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with contextlib.redirect_stderr(nowhere):
                process.start()
        there.close()
        return Worker(process, here, outbox)

    def map(self, function, parts):
        """[function(part) for part in parts], the first by this process, the others by workers.

        function must be found by its module and name; functools.partial gives it arguments. Arrays
        in the results of workers are good until the next call. If a worker has died, its part is
        computed here, and a line says so.
        """
        prepare_process()
        asked = self.workers[: len(parts) - 1]
        try:
            packed = pack(function, self.inbox) if asked else None
            for worker, part in zip(asked, parts[1:]):
                # An OSError means that it has died; that shows when its answer is missing.
                with contextlib.suppress(OSError):
                    worker.connection.send((packed, part))
            first, *others = parts
            start = time.perf_counter()
            results = [function(first)]
            self.ready = time.perf_counter()
            self.took = self.ready - start
            for worker, part in zip(asked, others):
                results.append(self.answer(worker, function, part))
            for part in others[len(asked) :]:  # more parts than processes
                results.append(function(part))
            return results
        except BaseException:
            self.close()  # or its answer would be taken for that to the next question
            raise

    def hurry(self):
        """Waits less long for answers from now on, the present one too. For a signal handler."""
        self.patience = HURRY

    def answer(self, worker, function, part):
        what = "has ended"
        try:
            while not worker.connection.poll(0.2):  # in short turns, so that hurry() is noticed
                if time.perf_counter() > self.ready + self.patience * (1 + self.took):
                    what = "does not answer, and is ended"
                    worker.process.kill()
                    break
            else:
                return unpack(worker.connection.recv(), worker.outbox)
        except (EOFError, OSError):
            pass
        self.workers.remove(worker)
        tqdm.write(f"*** A worker process {what}; the others do its work.", file=sys.stderr)
        return function(part)

    def close(self):
        for worker in self.workers:
            worker.process.terminate()
            worker.process.join(2)
            worker.process.kill()  # one that is stopped does not hear the first request
            worker.process.join()
            worker.connection.close()
        self.workers = []
