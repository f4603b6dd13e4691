"""Where the program runs: its output, the folder that the user is in, and the signals to stop."""

import builtins
import contextlib
import os
import shlex
import signal
import sys
import threading


def prepare():
    """Output goes somewhere and cannot fail for a letter that the terminal does not have.

    A program without a console (pythonw) or with its output closed (>&-) has None for a stream.
    The null device then takes its place, and also its number: the next file to be opened would get
    it otherwise, and whatever a library prints would land in that file."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # notebooks have streams of their own
            stream.reconfigure(errors="replace")


def flush():
    """Writes out what is buffered. Nobody may be reading any more: `| head` ends early."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def shown(path):
    """The path as it is seen from the folder in which the user is."""
    try:
        return os.path.relpath(path)
    except (OSError, ValueError):  # that folder was deleted; on Windows: it is on another drive
        return str(path)


def this_command():
    """How to start the same program again, as a user would type it."""
    if hasattr(builtins, "__IPYTHON__"):  # sys.argv is the notebook's
        return "main() with the same arguments"
    return shlex.join(["python", *sys.argv])


def stop_signals():
    """The signals that ask a program to end: Ctrl-C, kill, and a terminal that was closed."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # nohup has it ignored
    return numbers


@contextlib.contextmanager
def signals_to(handler, numbers):
    """Within this block, these signals call the handler.

    Python allows that in the main thread alone; in another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
