"""What a benchmark computes on. A figure without it says little."""

import os
import platform
from pathlib import Path

import numpy  # noqa: F401  (threadpoolctl finds only a BLAS that is already loaded)
from threadpoolctl import threadpool_info


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        values = dict(
            map(str.strip, line.split(":", 1))
            for line in cpuinfo.read_text().splitlines()
            if ":" in line
        )
        if "model name" in values:
            family, model = (values.get(key, "?") for key in ("cpu family", "model"))
            return f"{values['model name']} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def machine():
    """The processor, NumPy's BLAS and, for OpenBLAS, the kernels that it chose for the processor.

    The environment can choose others, which may take twice as long; then the line says so."""
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    names = [
        " ".join(filter(None, (b["internal_api"], b["version"], b.get("architecture"))))
        for b in libraries
    ]
    line = f"{processor()}; {', '.join(names) or 'an unknown BLAS'}"
    forced = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if os.environ.get(name)]
    if forced:
        line += f"; {' and '.join(forced)} set: not what the processor can do"
    return line
