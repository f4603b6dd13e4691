"""Files that stay whole, the old one or the new one, whenever the program or the machine stops."""

import contextlib
import errno
import io
import os
import threading
import weakref

import numpy as np

from support import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


MAX_BYTES = 2**26  # of a file that is read whole; metrics.csv has some 100 for an epoch


def read_file(path, most=MAX_BYTES):
    """The bytes of a file. OSError if it is not a file but a device or a pipe, say; if it is too
    large; or if it is not there yet, but what git-lfs leaves in its place."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a file", str(path))
    with open(path, "rb") as file:
        # Asked for more, Python takes the memory of all that is asked for.
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, most) + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"is larger than {most >> 20} MiB", str(path))
    refuse_pointer(path, data)
    return data


def refuse_pointer(path, data):
    """OSError if these are the first bytes of what git-lfs leaves in place of a file."""
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        what = "is a git-lfs pointer, not the file: run `git lfs pull`"
        raise OSError(errno.EINVAL, what, str(path))


def reason(error):
    """An error's text in one line of bounded length."""
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    if "pickle" in text:  # NumPy's advice is to load them unsafely
        text = "it holds Python objects, which are never loaded"
    return " ".join(text.split())[:200]


def describe(error):
    """An error that is not ours, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def write_file(path, data, previous=None):
    """Writes bytes to path so that a crash at any moment leaves the old file or the new one, whole.

    previous: the name that the old file keeps. Returns whether the file will survive a power cut,
    as flush_folder() does."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            keep(path, previous)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()  # half a file on a full disk is in the way of everything else
        raise
    return flush_folder(path.parent)


def keep(path, name):
    """Gives the file at path a second name, which it keeps when another file takes the first.

    Where the file system has no hard links, no file is at path until then."""
    link = name.with_name(name.name + ".part")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, name)
        return
    os.replace(link, name)
    # Where both are names of the same file, the system leaves both.
    link.unlink(missing_ok=True)


def flush_folder(path):
    """Makes the names in a folder survive a power cut. Returns whether the system could do that.

    Windows has no way to, and some network and shared file systems have none either. The names are
    there all the same, so this is no reason to lose anything."""
    if not fcntl:
        return True
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        return False
    return True


def make_folder(path):
    """Makes the folder, and those above it that are missing; each new name survives a power cut."""
    if not path.parent.exists():
        make_folder(path.parent)
    if path.is_symlink() and not path.exists():
        where = os.readlink(path)
        raise OSError(errno.ENOENT, f"it is a link to {where}, which is not there", str(path))
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)  # also of one that was there: its start may have been cut off here


def pack_arrays(**arrays):
    """The bytes of an npz file."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


# The files that this process has locked. The system's locks hold off other processes alone; and
# whoever opens and closes such a file a second time frees it for them.
HELD = weakref.WeakValueDictionary()  # (device, number) of the file → the open file
HELD_LOCK = threading.Lock()


def lock_file(path, warn=print):
    """The open file at path, locked until it is closed or its process ends.

    UserError if another program has it, or another run of this one. warn(line) where the file
    system has no locks."""
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
            warn(
                f"{path.parent} is on a file system without locks ({error.strerror}): see to it "
                "that no second run with this tag is started before this one has ended."
            )
        HELD[identity(os.fstat(file.fileno()))] = file
        return file


def identity(stat):
    return stat.st_dev, stat.st_ino
