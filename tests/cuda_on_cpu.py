"""Runs the programs of support/gpu.py on a CPU: its kernels, compiled by the C++ compiler.

The arithmetic, the indices, the barriers and the shared memory are those of the GPU; the tensor
cores are not, products are plain there. Arrays are NumPy's, full of NaN when they are made, so what
a kernel reads, another must have written.
"""

import ctypes
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from support import gpu

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++") or shutil.which("c++")
KIB = 1024

# Kernels that are compiled already, by name, and their libraries: for all tests of a process.
COMPILED, LIBRARIES, NUMBERS = {}, tempfile.TemporaryDirectory(), itertools.count()


class Poisoned:
    """NumPy, with arrays that start as NaN (or 255, for whole numbers)."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(shape, dtype=np.float32):
        dtype = np.dtype(dtype)
        return np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max, dtype)


def compile_kernels(names):
    """Compiles the kernels that are not yet; half of them at a time on each of two cores."""
    missing = sorted(set(names) - COMPILED.keys())
    compiling = []
    for half in filter(None, (missing[::2], missing[1::2])):
        lines = [f'#include "{HERE / "cuda_on_cpu.h"}"', f'#include "{gpu.SOURCE}"', 'extern "C" {']
        for i, name in enumerate(half):
            lines.append(
                f"int kernel_{i}(int x, int y, int block, int shared, void** arguments) {{"
            )
            lines.append(f"  return launch({name}, x, y, block, shared, arguments);")
            lines.append("}")
        source = Path(LIBRARIES.name) / f"kernels_{next(NUMBERS)}.cpp"
        source.write_text("\n".join([*lines, "}"]))
        library = source.with_suffix(".so")
        command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", library, source]
        compiling.append((half, library, subprocess.Popen(command)))
    for half, library, compiler in compiling:
        assert compiler.wait() == 0
        loaded = ctypes.CDLL(str(library))
        COMPILED.update({name: getattr(loaded, f"kernel_{i}") for i, name in enumerate(half)})


class CudaOnCpu:
    blocks = 264  # as on an H200

    def __init__(self, limit=227 * KIB):
        self.xp, self.limit = Poisoned(), limit

    def compile(self, names):
        compile_kernels(names)

    def run(self, launch):
        assert launch.shared <= self.limit and launch.threads <= 1024
        holders = []
        for a in launch.arguments:
            if isinstance(a, np.ndarray):
                assert a.flags.c_contiguous
                holders.append(ctypes.c_void_p(a.ctypes.data))
            else:
                holders.append(ctypes.create_string_buffer(a.tobytes()))
        pointers = (ctypes.c_void_p * len(holders))(*[ctypes.addressof(h) for h in holders])
        sizes = *launch.grid, launch.threads, launch.shared // 4
        overwritten = COMPILED[launch.name](*map(int, sizes), pointers)
        assert not overwritten, f"{launch.name} writes beyond its shared memory"

    def record(self, program):
        compile_kernels(program.names())

        def play():
            for launch in program.launches():
                self.run(launch)

        return play

    def launch(self, name, grid, threads, *arguments, shared=0):
        compile_kernels({name})
        grid = (grid, 1) if isinstance(grid, int) else grid
        self.run(gpu.Launch(name, grid, threads, shared, 0, arguments))
