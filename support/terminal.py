"""Where the program runs: its output, the folder that the user is in, and the signals to stop."""

import builtins
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from support import ROOT, UserError


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


def in_notebook():
    """Whether this is a notebook, or IPython: there is no command line, and cells follow."""
    return hasattr(builtins, "__IPYTHON__")


def quoted(words):
    """The words as a user would type them in this system's shell."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def this_command():
    """How to start the same program again."""
    if in_notebook():  # sys.argv is the notebook's
        return "main() with the same arguments"
    return quoted(["python", *sys.argv])


def command(script, *words):
    """How to start another script of this folder, as `plot_figs`, with these words."""
    if in_notebook():
        return f"{script}.main({[str(word) for word in words]})"
    return quoted(["python", shown(ROOT / f"{script}.py"), *words])


def how_to_stop():
    if in_notebook():
        return "Interrupting the cell is safe: the same call continues."
    return "Ctrl-C is safe: the same command continues."


def words_of(arguments):
    """The arguments of main() as a list of texts. UserError if they are something else."""
    if isinstance(arguments, (str, bytes, dict)) or not hasattr(arguments, "__iter__"):
        text = arguments if isinstance(arguments, str) else "--tag mine"
        try:
            words = shlex.split(text)
        except ValueError:  # a quotation mark without a second one
            words = text.split()
        raise UserError(f"main() takes a list of words, as main({words}), not {arguments!r}")
    return [str(argument) for argument in arguments]


def prefix():
    """What stands before an error on a command line: the program's name."""
    return "" if in_notebook() else f"{Path(sys.argv[0]).name}: "


def end(status, why=""):
    """The last thing that main() does: says why it failed, and returns the exit status.

    In a notebook the cells that follow would not look at a status, so there it is an exception: the
    one that the user's own interrupt of a cell is, or UserError. A thread stops no cell."""
    cell = in_notebook() and threading.current_thread() is threading.main_thread()
    if status and cell:
        flush()
        if status > 128:
            text = why or "The run was stopped: see the lines above."
            error = KeyboardInterrupt(text)
            error._render_traceback_ = lambda: [f"KeyboardInterrupt: {text}"]
            raise error
        raise UserError(why or "Something could not be saved: see the lines above.")
    if why:
        with contextlib.suppress(OSError):
            print(why, file=sys.stderr)
        flush()
    return status


def stop_signals():
    """The signals that ask a program to end: Ctrl-C, kill, a terminal that was closed, and the one
    that batch systems send some time before they kill."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # nohup has it ignored
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        numbers.append(signal.SIGUSR1)  # elsewhere it has a meaning of its own
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
            # None: it was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
