"""benchmarks/speed/machine.py names what a benchmark ran on, and what would make it misleading."""

import sys

import mnist_resnet9 as m

sys.path.insert(0, str(m.ROOT / "benchmarks" / "speed"))

import machine


def test_a_forced_kernel_is_said(monkeypatch):
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        monkeypatch.delenv(name, raising=False)
    plain = machine.machine()
    assert machine.processor() in plain and "blas" in plain.lower() and " set:" not in plain
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert machine.machine() == f"{plain}; OPENBLAS_CORETYPE set: not what the processor can do"
