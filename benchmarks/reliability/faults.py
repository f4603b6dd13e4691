"""What a run writes, operation by operation: to record it, to stop it there, or to make it fail.

A run writes in few ways (support/storage.py, support/run_folder.py): it opens a file, writes, calls
fsync on the file or its folder, renames, links, deletes, makes a folder. watching() calls a
function before each of these. powercut.py records them, torture.py ends the process or raises an
error at one.
"""

import builtins
import contextlib
import os
from pathlib import Path
from typing import NamedTuple


class Operation(NamedTuple):
    kind: str  # open, write, fsync, rename, link, unlink or mkdir
    path: Path
    new: bool = False  # open: whether the file is emptied, not continued
    data: bytes = b""  # write: what is added
    target: Path = Path()  # rename, link: the new name


class WatchedFile:
    """A file that is open for writing, and says so before each write."""

    def __init__(self, file, path, watch):
        self.file, self.path, self.watch = file, path, watch

    def write(self, data):
        self.watch(Operation("write", self.path, data=data.encode() if type(data) is str else data))
        return self.file.write(data)

    def __getattr__(self, name):  # fileno, flush, close and so on
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@contextlib.contextmanager
def watching(folder, watch):
    """Within this block, calls watch(Operation) before each operation on what is below folder."""
    real = builtins.open, os.fsync, os.replace, os.link, Path.unlink, Path.mkdir
    real_open, fsync, replace, link, unlink, mkdir = real

    def is_below(path):
        return Path(path).is_relative_to(folder)

    def watched_open(path, mode="r", *rest, **named):
        if isinstance(path, int) or not is_below(path) or mode[0] == "r":
            return real_open(path, mode, *rest, **named)
        path = Path(path)
        watch(Operation("open", path, new=mode[0] == "w"))
        return WatchedFile(real_open(path, mode, *rest, **named), path, watch)

    def watched_fsync(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if is_below(path):
            watch(Operation("fsync", path))
        fsync(number)

    def watched_replace(path, target):
        if is_below(path):
            watch(Operation("rename", Path(path), target=Path(path).parent / target))
        replace(path, target)

    def watched_link(path, target):
        if is_below(path):
            watch(Operation("link", Path(path), target=Path(target)))
        link(path, target)

    def watched_unlink(path, *rest, **named):
        if is_below(path) and path.exists():
            watch(Operation("unlink", path))
        unlink(path, *rest, **named)

    def watched_mkdir(path, *rest, **named):
        if is_below(path) and not path.exists() and path.parent.exists():
            watch(Operation("mkdir", path))
        mkdir(path, *rest, **named)

    try:
        builtins.open, os.fsync = watched_open, watched_fsync
        os.replace, os.link = watched_replace, watched_link
        Path.unlink, Path.mkdir = watched_unlink, watched_mkdir
        yield
    finally:
        builtins.open, os.fsync, os.replace, os.link, Path.unlink, Path.mkdir = real
