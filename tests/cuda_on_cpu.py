"""Runs the programs of support/gpu.py on a CPU: its kernels, compiled by the C++ compiler.

The arithmetic, the indices, the barriers and the shared memory are those of the GPU; the tensor
cores are not, products are plain there. Arrays are NumPy's, full of NaN when they are made, so what
a kernel reads, another must have written.
"""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np

from support import gpu

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++") or shutil.which("c++")


class Poisoned:
    """NumPy, with arrays that start as NaN (or 255, for whole numbers)."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(shape, dtype=np.float32):
        dtype = np.dtype(dtype)
        return np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max, dtype)


class CudaOnCpu:
    def __init__(self, folder, limit=230_000):
        self.xp, self.limit, self.folder, self.launched = Poisoned(), limit, Path(folder), []

    def compile(self, names):
        names = sorted(names)
        lines = [f'#include "{HERE / "cuda_on_cpu.h"}"', f'#include "{gpu.SOURCE}"', 'extern "C" {']
        for i, name in enumerate(names):
            head = f"void kernel_{i}(int x, int y, int block, void** a)"
            lines.append(f"{head} {{ launch({name}, x, y, block, a); }}")
        code = "\n".join([*lines, "}"])
        stem = hashlib.sha256(
            (code + gpu.SOURCE.read_text() + (HERE / "cuda_on_cpu.h").read_text()).encode()
        )
        library = self.folder / f"kernels_{stem.hexdigest()[:16]}.so"
        if not library.exists():
            source = library.with_suffix(".cpp")
            source.write_text(code)
            command = [
                COMPILER,
                "-std=c++17",
                "-O2",
                "-w",
                "-shared",
                "-fPIC",
                "-o",
                str(library),
                str(source),
            ]
            subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
        return {name: getattr(loaded, f"kernel_{i}") for i, name in enumerate(names)}

    def run(self, kernel, grid, block, arguments):
        holders = []
        for a in arguments:
            if isinstance(a, np.ndarray):
                assert a.flags.c_contiguous
                holders.append(ctypes.c_void_p(a.ctypes.data))
            else:
                holders.append(ctypes.create_string_buffer(a.tobytes()))
        pointers = (ctypes.c_void_p * len(holders))(*[ctypes.addressof(h) for h in holders])
        kernel(int(grid[0]), int(grid[1]), int(block[0]), pointers)

    def record(self, program):
        launches = [entry for entry in program.entries if entry]
        kernels = self.compile({entry[1] for entry in launches})
        for *_, shared in launches:
            assert shared <= 4 * 2**16

        def play():
            for _, name, grid, block, arguments, _ in launches:
                self.run(kernels[name], grid, block, arguments)

        return play

    def launch(self, name, grid, threads, *arguments, shared=0):
        grid = (grid, 1) if isinstance(grid, int) else grid
        self.run(self.compile({name})[name], grid, (threads,), arguments)
