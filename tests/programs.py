"""Starts the project's programs as their user does."""

import subprocess
import sys

from support import ROOT


def start(script, *flags, python=(), **options):
    """The process of `python script flags…`, after its end. A relative script is the project's.

    python: flags of Python itself; options: those of subprocess.run."""
    command = [sys.executable, *python, ROOT / script, *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"cwd": ROOT, "timeout": 120, **streams, **options}
    return subprocess.run([str(argument) for argument in command], **options)
