"""Processes that compute beside the main one, so that every core has work. Nothing here learns.

Threads would be simpler, but Python lets only one thread run at a time. Others can run while one is
inside a call of NumPy, but between hundreds of short calls they keep waiting for each other:
benchmarks/README.md has what that costs. So each further core gets a process of its own. Messages
go through a pipe, except for their arrays: these are copied once, into memory that both see.
"""

import contextlib
import ctypes
import functools
import io
import mmap
import multiprocessing
import os
import pickle
import platform
import re
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy  # noqa: F401  (threadpoolctl finds only a BLAS that is already loaded)
import threadpoolctl
from threadpoolctl import ThreadpoolController, threadpool_limits
from tqdm import tqdm

from support.replaced import FunctionWithCache, Watched, different
from support.terminal import signals_to

# After more calls than this before each of which something was replaced, as a number that a loop
# lowers from step to step, this process computes alone: new workers each time would take longer.
CHANGES_IN_A_ROW = 3

# How many times longer than this process, and a second, a worker may take. One that takes more is
# stopped, or swapped out. Whoever asks the run to stop should not have to wait so long.
PATIENCE = 30
HURRY = 2
SHARED_BYTES = 2**26  # for the arrays of one message; only what a message fills takes memory
# On other systems a copy of a running process is not safe to use.
METHOD = "fork" if sys.platform == "linux" else "spawn"


@functools.lru_cache(maxsize=1)
def prepare_process():
    """No page faults.

    malloc, the system's allocator, gives large arrays back and asks for them again. Each new page
    then costs a fault: thousands in a step. With these limits raised, glibc's malloc keeps what it
    has. Others are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-2, 2**26)  # M_TOP_PAD


class OneBlasThread:
    """Within this block BLAS, the library of NumPy's matrix products, computes in one thread.

    More would fight the other processes for the cores, and round in another order. And if a process
    is copied while its BLAS has threads, the copy can wait for ever for one that was not copied.

    The number is the whole process's, and blocks may overlap, in one thread or several: the first
    sets it, the last puts it back."""

    lock = threading.Lock()
    blocks = 0
    limits = None

    def __enter__(self):
        with self.lock:
            if OneBlasThread.blocks == 0:
                let_any_thread_limit()
                OneBlasThread.limits = blas().limit(limits=1, user_api="blas")
            OneBlasThread.blocks += 1

    def __exit__(self, *_):
        with self.lock:
            OneBlasThread.blocks -= 1
            if OneBlasThread.blocks == 0:
                let_any_thread_limit()
                OneBlasThread.limits.restore_original_limits()
                let_any_thread_limit()


def let_any_thread_limit():
    """From threadpoolctl 3.8 on, one thread sets the number, and what others ask for is ignored.

    But a run may be in a thread that another one was not in."""
    controller = getattr(threadpoolctl, "OpenBLASController", None)
    if hasattr(controller, "clear_controlling_thread"):
        controller.clear_controlling_thread(force=True)


@functools.lru_cache(maxsize=1)
def blas():
    return ThreadpoolController()  # looks for the libraries: a millisecond


def shared_memory():
    """Memory that this process and its copies see.

    Without copies there is none, and arrays go through the pipe."""
    return mmap.mmap(-1, SHARED_BYTES) if METHOD == "fork" else b""


class Packer(pickle.Pickler):
    """Also notes which functions and classes it meets."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.functions = set()

    def reducer_override(self, value):
        if isinstance(value, (types.FunctionType, FunctionWithCache, type)):
            self.functions.add(value)
        return NotImplemented  # that is: as always


def pack(message, memory):
    """((the message as bytes, where its arrays lie in memory), the functions it names).

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

    stream = io.BytesIO()
    packer = Packer(stream, protocol=5, buffer_callback=place)
    packer.dump(message)
    return (stream.getvalue(), places), packer.functions


def unpack(packed, memory):
    """The message that was packed, and weak references that live as long as its arrays do.

    The arrays are views of memory: the next message will overwrite them."""
    data, places = packed
    buffers = [(ctypes.c_char * size).from_buffer(memory, at) for at, size in places]
    return pickle.loads(data, buffers=buffers), [weakref.ref(buffer) for buffer in buffers]


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
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    warnings.simplefilter("ignore", RuntimeWarning)  # the main process checks the loss
    prepare_process()
    threadpool_limits(1, user_api="blas")
    parent = multiprocessing.parent_process().sentinel
    # A worker ends on any error; the main process then does its part, and meets the error itself.
    with contextlib.suppress(Exception):
        while parent not in wait([connection, parent]):
            packed, part = connection.recv()
            function, _ = unpack(packed, inbox)
            answer, _ = pack(function(part), outbox)
            connection.send(answer)


class Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    outbox: mmap.mmap


class Lost(Exception):
    """No answer comes from a worker. The text says why."""


def is_starting():
    """Whether this is a spawned process that is still importing the main script.

    Without `if __name__ == "__main__":` that script does there what it does in the main process."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def on_the_terminal(line):
    tqdm.write(f"*** {line}", file=sys.stderr)


class Workers:
    """`count` processes beside this one. They end with it, however it ends.

    They are started when they are first needed, and anew when functions were replaced since. The
    threads of this process share them: one that finds them busy computes alone. Messages are
    pickles, as everywhere in multiprocessing. The pipes are inherited, so nobody else can write to
    them.
    """

    def __init__(self, count=0):
        self.lock = threading.Lock()  # held by the thread that gives the workers something to do
        self.waiting = set()  # something for each thread that waits for the lock
        self.asked = {}  # thread → how many it has asked for
        self.count = 0  # how many there are to be
        self.workers = []
        self.inbox = b""
        self.functions = set()  # that they are asked to compute
        self.watched = None  # what the workers compute with; None before they are started
        self.changes = 0  # calls in a row before which some of that was replaced
        self.starter = threading.current_thread()  # Linux ends a worker with the thread that did
        self.lent_to = 0  # the thread that got the last results,
        self.lent = []  # and weak references to their memory
        self.said = set()
        self.warn = on_the_terminal  # a run has a log besides
        self.patience = PATIENCE
        self.took = 0  # seconds, for this process's own part
        self.ready = 0  # when it was done with it
        self.use(count)

    def use(self, count, functions=()):
        """From now on there are to be `count`, or as many as another thread has asked for.

        They will be asked to compute these functions, perhaps others too."""
        with self.my_turn():
            self.functions = set(functions)
            self.patience = PATIENCE
            self.said.clear()
            self.changes = 0
            self.asked[threading.get_ident()] = count
            self.settle()

    def close(self):
        """Ends the workers, unless another thread has asked for some."""
        with self.my_turn():
            self.asked.pop(threading.get_ident(), None)
            if self.starter is threading.current_thread():
                self.end()  # another thread starts its own, which do not end with this one
            self.settle()

    @contextlib.contextmanager
    def my_turn(self):
        """The lock. Who waits for it comes before the threads that take it in each step: see map().

        Python's locks are not fair: the thread that has just let go would often take it again."""
        waiting = object()
        self.waiting.add(waiting)
        with self.lock:
            self.waiting.remove(waiting)
            yield

    def settle(self):
        running = {thread.ident for thread in threading.enumerate()}
        self.asked = {thread: n for thread, n in self.asked.items() if thread in running}
        count = max(self.asked.values(), default=0)
        if count != self.count or count == 0:
            self.end()
            self.count = count

    def map(self, function, parts):
        """[function(part) for part in parts], the first by this process, the others by workers.

        function must be found by its module and name; functools.partial gives it arguments. Arrays
        in the results of workers are good until this thread's next call. If a worker has died, its
        part is computed here, and a line says so.
        """
        prepare_process()
        with OneBlasThread():
            wanted = len(parts) > 1 and self.count and not self.waiting
            if wanted and self.lock.acquire(blocking=False):
                try:
                    if self.are_free() and self.are_prepared(function):
                        return self.share_out(function, parts)
                finally:
                    self.lock.release()
            return [function(part) for part in parts]

    def are_free(self):
        """Whether their memory may be overwritten: no other thread still reads results there."""
        mine = self.lent_to == threading.get_ident()
        return mine or not any(reference() is not None for reference in self.lent)

    def are_prepared(self, function):
        """Packs function for them. False if none can compute what this process would."""
        try:
            if not self.inbox:
                self.inbox = shared_memory()
            self.packed, functions = pack(function, self.inbox)
        except Exception as error:  # a class of the user's may raise anything when it is packed
            reason = " ".join(re.sub(" at 0x[0-9a-fA-F]+", "", str(error)).split())
            self.say(f"what it computes cannot be sent to another ({reason})", once="sent")
            return False
        try:
            ended = self.watched is None or not self.starter.is_alive()
            known = ended or self.watched.roots.issuperset(map(id, functions))
            alone = self.changes > CHANGES_IN_A_ROW  # at the last call
            changed = not ended and (not known or self.watched.has_changed())
            self.changes = self.changes + 1 if changed else 0
            if ended or changed:
                self.functions |= functions
                self.end(Watched(self.functions))
            if self.changes > CHANGES_IN_A_ROW:
                self.say("what it computes with changes from call to call", once="changes")
                return False
            if ended or changed or alone:
                self.start()
        except BaseException:
            self.end()
            raise
        return bool(self.workers)

    def say(self, why, once):
        if once not in self.said:
            self.warn(f"This process computes alone: {why}.")
        self.said.add(once)

    def start(self):
        if is_starting():  # it cannot have workers, and is one itself
            return
        self.starter = threading.current_thread()
        context = multiprocessing.get_context(METHOD)
        try:
            with signals_to(signal.SIG_IGN, [signal.SIGINT]):  # a new process starts with this
                for _ in range(self.count):
                    self.workers.append(self.start_one(context))
        except OSError as error:  # a limit on processes, files or memory
            started = f"{len(self.workers)} of {self.count} worker processes could be started"
            self.warn(f"{started} ({error.strerror}); the run continues on fewer cores.")
            self.count = len(self.workers)
        if METHOD != "fork":
            self.compare()

    def start_one(self, context):
        here, there = context.Pipe()
        outbox = shared_memory()
        arguments = (there, self.inbox, outbox)
        process = context.Process(target=serve, args=arguments, daemon=True)
        with contextlib.ExitStack() as stack:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except (AttributeError, OSError, ValueError):
                # A start flushes the output too, and would look as if it had failed itself.
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            process.start()
        there.close()
        return Worker(process, here, outbox)

    def compare(self):
        """Ends spawned workers that would compute something other than this process.

        They have read the sources anew, and know nothing of what was replaced since."""
        summary = self.watched.summary()
        question, _ = pack(different, self.inbox)
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.connection.send((question, summary))
        self.took, self.ready = 0, time.perf_counter()
        try:
            names = {name for worker in self.workers for name in self.receive(worker)}
        except Lost as lost:
            why = f"a worker process {lost} at its start"
        else:
            some = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            why = f"other processes find something else under these names: {some}"
            if not names:
                return
        self.say(why, once=why)
        self.end(self.watched)

    def share_out(self, function, parts):
        asked = self.workers[: len(parts) - 1]
        try:
            for worker, part in zip(asked, parts[1:]):
                # An OSError means that it has died; that shows when its answer is missing.
                with contextlib.suppress(OSError):
                    worker.connection.send((self.packed, part))
            first, *others = parts
            start = time.perf_counter()
            results = [function(first)]
            self.ready = time.perf_counter()
            self.took = self.ready - start
            self.watched.settle()
            self.lent_to, self.lent = threading.get_ident(), []
            for worker, part in zip(asked, others):
                results.append(self.answer(worker, function, part))
            for part in others[len(asked) :]:  # more parts than processes
                results.append(function(part))
            return results
        except BaseException:
            self.end()  # or its answer would be taken for that to the next question
            raise

    def hurry(self):
        """Waits less long for answers from now on, the present one too. For a signal handler."""
        self.patience = HURRY

    def receive(self, worker):
        """The worker's answer. Lost if there is none."""
        try:
            while not worker.connection.poll(0.2):  # in short turns, so that hurry() is noticed
                if time.perf_counter() > self.ready + self.patience * (1 + self.took):
                    worker.process.kill()
                    raise Lost("does not answer, and is ended")
            answer, references = unpack(worker.connection.recv(), worker.outbox)
            self.lent += references
            return answer
        except (EOFError, OSError):
            raise Lost("has ended") from None

    def answer(self, worker, function, part):
        try:
            return self.receive(worker)
        except Lost as lost:
            if not self.starter.is_alive():
                return function(part)
            self.workers.remove(worker)
            self.count -= 1
            self.warn(f"A worker process {lost}; the others do its work.")
            return function(part)

    def end(self, watched=None):
        """Ends the processes. They start anew when they are needed and something has changed."""
        for worker in self.workers:
            worker.process.terminate()
            worker.process.join(2)
            worker.process.kill()  # one that is stopped does not hear the first request
            worker.process.join()
            worker.connection.close()
        self.workers = []
        self.watched = watched
