"""Processes that compute beside the main one, so that every core has work. Nothing here learns.

Threads would be simpler, but Python lets one thread run at a time: it is free only within NumPy's calls, and between
hundreds of short ones two threads keep waiting for each other (benchmarks/README.md has what that costs). So each
further core gets a process. What it is told goes through a pipe, but for the arrays: they are copied once, into memory
that both processes see.
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
import warnings
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy  # noqa: F401  (threadpoolctl finds only a BLAS that is already loaded)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

SHARED_BYTES = 2**26  # for the arrays of one message; only what a message fills takes memory
METHOD = "fork" if sys.platform == "linux" else "spawn"  # elsewhere a copy of a running process is not safe

def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

@functools.lru_cache(maxsize=1)
def prepare_process():
    """One thread in BLAS, the library of NumPy's matrix products, and no page faults.

    More threads would fight the other processes for the cores; and a process that is copied while its BLAS has threads
    can leave the copy waiting for one that was not copied. So this comes before the first worker is started.

    malloc, the system's allocator, gives large arrays back and asks for them again, and each new page costs a fault:
    thousands a step. With these limits raised it keeps what it has. Other systems than glibc's stay as they are.
    """
    threadpool_limits(1, user_api="blas")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for limit, size in ((-3, 2**25), (-1, 2**30), (-2, 2**26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(limit, size)

def shared_memory():
    """Memory that this process and its copies see. Without copies there is none, and arrays go through the pipe."""
    return mmap.mmap(-1, SHARED_BYTES) if METHOD == "fork" else b""

def pack(message, memory):
    """The message as bytes, and where its arrays lie in memory; an array without room there stays in the bytes."""
    places, used = [], 0

    def place(array):
        nonlocal used
        data = array.raw()
        if used + data.nbytes > len(memory):
            return True  # that is: into the bytes
        memory[used : used + data.nbytes] = data
        places.append((used, data.nbytes))
        used += -(-data.nbytes // 64) * 64  # each starts on a cache line of its own

    return pickle.dumps(message, protocol=5, buffer_callback=place), places

def unpack(packed, memory):
    """The message that was packed. Its arrays are views of memory: the next message will overwrite them."""
    data, places = packed
    return pickle.loads(data, buffers=[memoryview(memory)[at : at + size] for at, size in places])

def serve(connection, inbox, outbox):
    """The life of a worker: function(part) for each message (function, part), until the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore", RuntimeWarning)  # as in the main process, where the loss is checked
    prepare_process()
    parent = multiprocessing.parent_process().sentinel
    with contextlib.suppress(Exception):  # a worker ends on any error; the main process then meets the same one itself
        while parent not in wait([connection, parent]):
            function, part = connection.recv()
            connection.send(pack(unpack(function, inbox)(part), outbox))

class Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    outbox: mmap.mmap

class Workers:
    """So many processes beside this one. They end with it, however it ends.

    Messages are pickles, as everywhere in multiprocessing: the pipes are inherited, so nobody else can write to them.
    """

    def __init__(self, count):
        context, self.inbox, self.workers = multiprocessing.get_context(METHOD), b"", []
        if not count:
            return
        prepare_process()
        self.inbox = shared_memory()
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process starts with what is set here
        try:
            for _ in range(count):
                (here, there), outbox = context.Pipe(), shared_memory()
                process = context.Process(target=serve, args=(there, self.inbox, outbox), daemon=True)
                process.start()
                there.close()
                self.workers.append(Worker(process, here, outbox))
        except OSError as error:  # a limit on processes, files or memory
            tqdm.write(f"*** Only {len(self.workers)} of {count} worker processes started ({error.strerror}); "
                       "fewer cores go on.", file=sys.stderr)  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, previous)

    def map(self, function, parts):
        """[function(part) for part in parts], the first by this process, each other one by a worker.

        function must be found by its module and name (functools.partial gives it arguments). Arrays in the results of
        workers are good until the next call. What a worker that has died owes is computed here, and said.
        """
        prepare_process()
        asked = self.workers[: len(parts) - 1]
        try:
            packed = pack(function, self.inbox) if asked else None
            for worker, part in zip(asked, parts[1:]):
                with contextlib.suppress(OSError):  # it has died; that shows when its answer is missing
                    worker.connection.send((packed, part))
            first, *others = parts
            return [function(first), *(self.answer(worker, function, part) for worker, part in zip(asked, others)),
                    *map(function, others[len(asked) :])]  # fmt: skip
        except BaseException:
            self.close()  # or its answer would be taken for that to the next question
            raise

    def answer(self, worker, function, part):
        try:
            return unpack(worker.connection.recv(), worker.outbox)
        except (EOFError, OSError):
            self.workers.remove(worker)
            tqdm.write("*** A worker process has ended; the others do its work.", file=sys.stderr)
            return function(part)

    def close(self):
        for worker in self.workers:
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()
        self.workers = []
