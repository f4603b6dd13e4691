"""Files that stay whole, the old one or the new one, whenever the program or the machine stops."""

import contextlib
import errno
import io
import os
import sys
import threading
import weakref

import numpy as np
from tqdm import tqdm

from support import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


MAX_BYTES = 2**26  # of a file that is read whole: a log of a million epochs has as many


def read_file(path):
    """The bytes of a file. OSError if it is none, or has no end: a device or a pipe, say."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "is no file", str(path))
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"is larger than {MAX_BYTES >> 20} MiB", str(path))
    return data


def write_file(path, data, previous=None):
    """Writes bytes to path so that a crash at any moment leaves the old file or the new one, whole.

    previous: the name that the old file keeps. A crash between the two renames leaves only that
    one: see RunFolder.restore.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()  # half a file on a full disk is in the way of everything else
        raise
    flush_folder(path.parent)


def flush_folder(path):
    """Makes the names in a folder survive a power cut. Windows has no way to do that."""
    if fcntl:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path):
    """Makes the folder, and those above it that are missing; each new name survives a power cut."""
    if not path.parent.exists():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)  # also of one that was there: its start may have been cut off here


def pack_arrays(**arrays):
    """The bytes of an npz file."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def save_arrays(path, **arrays):
    write_file(path, pack_arrays(**arrays))


# The files that this process has locked. The system's locks hold off other processes alone; and
# whoever opens and closes such a file a second time frees it for them.
HELD = weakref.WeakValueDictionary()  # (device, number) of the file → the open file
HELD_LOCK = threading.Lock()


def lock_file(path):
    """The open file at path, locked until it is closed or its process ends.

    UserError if another program has it, or another run of this one."""
    with HELD_LOCK:
        if path.exists():
            held = HELD.get(identity(path.stat()))
            if held is not None and not held.closed:
                raise UserError(
                    f"{path.parent} is in use by another run of this program; wait or choose "
                    "another --tag"
                )
        file = open(path, "a")
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise UserError(
                    f"{path.parent} is in use by another program; wait or choose another --tag"
                ) from None
            tqdm.write(
                f"*** {path.parent} is on a file system without locks ({error.strerror}): see to "
                "it that no second run with this tag is started before this one has ended.",
                file=sys.stderr,
            )
        file.thread = threading.get_ident()
        HELD[identity(os.fstat(file.fileno()))] = file
        return file


def unlock():
    """Closes what this thread has locked, however its run has ended.

    A notebook keeps the traceback of an error, and with it the run and its lock."""
    for file in list(HELD.values()):
        if file.thread == threading.get_ident():
            file.close()


def identity(stat):
    return stat.st_dev, stat.st_ino
