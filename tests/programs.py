"""Starts the project's programs as their user does, and reads what they leave."""

import subprocess
import sys

import numpy as np

from support import ROOT
from support.run_folder import METRICS, pack_metrics, read_metrics


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
