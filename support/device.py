"""Where a program computes that reads a run: figures and predict.py do it on the CPU, whatever the
run before was on."""

import contextlib

import numpy as np


@contextlib.contextmanager
def computing_on_the_cpu(script):
    """Within this block mnist_resnet9 (the module) computes on the CPU, and then where it did
    before: in a notebook a run on the GPU may come before or after."""
    xp, script.xp = script.xp, np
    try:
        yield
    finally:
        script.xp = xp


def on_host(array):
    """A NumPy array of whatever holds numbers: a list, say, or an array of CuPy."""
    try:
        return np.asarray(array)
    except TypeError:  # CuPy copies nothing from the GPU without being told to
        if not hasattr(array, "get"):
            raise
        return array.get()
