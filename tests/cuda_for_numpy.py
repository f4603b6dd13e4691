"""The kernels of support/gpu.cu on a real GPU, called with NumPy arrays as tests/cuda_on_cpu.py is.

Each launch copies all its arrays to the device and back, so tests written for one run on the other.
"""

import numpy as np
from cuda_on_cpu import Poisoned

from support import gpu


class CudaForNumpy:
    def __init__(self):
        self.cuda, self.xp = gpu.Cuda(), Poisoned()
        self.limit = self.cuda.limit

    def run(self, kernel, grid, block, arguments, shared):
        copies = [self.cuda.xp.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
        if shared > 48 * 1024:
            kernel.max_dynamic_shared_size_bytes = shared
        kernel((*grid, 1)[:3], block, tuple(copies), shared_mem=shared)
        for a, copy in zip(arguments, copies):
            if isinstance(a, np.ndarray) and a.flags.writeable:
                a[...] = copy.get()

    def record(self, program):
        launches = [entry for entry in program.entries if entry]
        module = self.cuda.module(tuple(sorted({entry[1] for entry in launches})))

        def play():
            for _, name, grid, block, arguments, shared in launches:
                self.run(module.get_function(name), grid, block, arguments, shared)

        return play

    def launch(self, name, grid, threads, *arguments, shared=0):
        grid = (grid, 1) if isinstance(grid, int) else grid
        self.run(
            self.cuda.module((name,)).get_function(name), grid, (threads, 1, 1), arguments, shared
        )
