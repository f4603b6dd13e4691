"""The kernels of support/gpu.cu on a real GPU, called with NumPy arrays as tests/cuda_on_cpu.py is.

Each launch copies all its arrays to the device and back, so tests written for one run on the other.
"""

import numpy as np
from cuda_on_cpu import Poisoned

from support import gpu


class CudaForNumpy:
    def __init__(self):
        self.cuda, self.xp = gpu.Cuda(), Poisoned()
        self.limit, self.blocks = self.cuda.limit, self.cuda.blocks
        self.compile = self.cuda.compile

    def run(self, launch):
        kernel, xp = self.cuda.kernels[launch.name], self.cuda.xp
        copies = [xp.asarray(a) if isinstance(a, np.ndarray) else a for a in launch.arguments]
        if launch.shared > 48 * 1024:
            kernel.max_dynamic_shared_size_bytes = launch.shared
        kernel(launch.grid, (launch.threads, 1), tuple(copies), shared_mem=launch.shared)
        for a, copy in zip(launch.arguments, copies):
            if isinstance(a, np.ndarray) and a.flags.writeable:
                a[...] = copy.get()

    def record(self, program):
        self.compile(program.names())

        def play():
            for launch in program.launches():
                self.run(launch)

        return play

    def launch(self, name, grid, threads, *arguments, shared=0):
        self.compile({name})
        grid = (grid, 1) if isinstance(grid, int) else grid
        self.run(gpu.Launch(name, grid, threads, shared, 0, arguments))
