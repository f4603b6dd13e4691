"""The compiler that CuPy calls, from the package nvidia-cuda-nvrtc-cu12.

It needs no GPU, and compiles for all of them."""

import ctypes
import re
from collections import namedtuple
from importlib import util
from pathlib import Path

from support import gpu

# What CuPy gives, and a report on each kernel.
OPTIONS = ("-std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")
# Shared memory that a block may have, in KiB, on cards of a compute capability.
LIMITS = {60: 48, 61: 48, 62: 48, 70: 96, 72: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99}
LIMITS |= {90: 227, 100: 227, 101: 227, 103: 227, 110: 227, 120: 99, 121: 99}

Usage = namedtuple("Usage", "registers spilled shared")  # spilled and shared in bytes


def library():
    """The compiler, or None where the package is missing."""
    package = util.find_spec("nvidia.cuda_nvrtc") if util.find_spec("nvidia") else None
    for folder in package.submodule_search_locations if package else ():
        for path in [
            *Path(folder).glob("lib/libnvrtc.so.*"),
            *Path(folder).glob("bin/nvrtc64*.dll"),
        ]:
            if ".alt." not in path.name:
                return ctypes.CDLL(str(path))
    return None


def architectures(nvrtc):
    """[60, 61, …]: the compute capabilities that the compiler knows."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(numbers)
    return list(numbers)


def compile_kernels(nvrtc, names, architecture):
    """{name: Usage} of the kernels, compiled for a compute capability."""
    program, log_size, lowered = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p()
    source = gpu.SOURCE.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"gpu.cu", 0, None, None)
    for name in names:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = [option.encode() for option in (*OPTIONS, f"-arch=sm_{architecture}")]
    options = (ctypes.c_char_p * len(options))(*options)
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(log_size))
    buffer = ctypes.create_string_buffer(log_size.value)
    nvrtc.nvrtcGetProgramLog(program, buffer)
    log, found = buffer.value.decode(), {}
    assert status == 0, log
    for name in names:
        assert nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)) == 0, name
        _, _, report = log.partition(f"Compiling entry function '{lowered.value.decode()}'")
        report = report.partition("Compile time")[0]
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
        shared = re.search(r"(\d+) bytes smem", report)
        found[name] = Usage(registers, spilled, int(shared[1]) if shared else 0)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return found
