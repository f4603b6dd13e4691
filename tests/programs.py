"""Starts the project's programs as their user does, and reads what they leave."""

import atexit
import functools
import gzip
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from support import ROOT
from support.mnist import to_idx
from support.run_folder import METRICS, pack_metrics, read_metrics


@functools.cache
def few_digits():
    """A folder with the first images of the sample: 1,024 to train on, 100 to test with.

    Of a short run on the sample itself, evaluations would take most of the time."""
    above = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    folder = Path(above, "digits")  # what the data set is then called
    folder.mkdir()
    for path in (ROOT / "data" / "sample").glob("*.gz"):
        content = gzip.decompress(path.read_bytes())
        count = 1024 if path.name.startswith("train") else 100
        shape = (-1, 28, 28) if "images" in path.name else (-1,)
        header = 16 if "images" in path.name else 8
        a = np.frombuffer(content, np.uint8, offset=header).reshape(shape)[:count]
        (folder / path.stem).write_bytes(to_idx(a))
    return str(folder)


def start(script, *flags, python=(), **options):
    """The process of `python script flags…`, after its end. A relative script is the project's.

    python: flags of Python itself; options: those of subprocess.run."""
    command = [sys.executable, *python, ROOT / script, *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"cwd": ROOT, "timeout": 120, **streams, **options}
    return subprocess.run([str(argument) for argument in command], **options)


def metrics_of(folder):
    """metrics.csv as an array: a row an epoch, and a column for each of METRICS."""
    rows = read_metrics(folder / "metrics.csv")
    return np.array([[row[column] for column in METRICS] for row in rows])


def write_metrics(folder, rows):
    """Makes a metrics.csv. rows: the values of METRICS, an epoch each."""
    packed = pack_metrics([dict(zip(METRICS, row)) for row in rows])
    (folder / "metrics.csv").write_bytes(packed)
