"""Whether requirements.txt can be installed where people are, without a compiler: every package a
wheel. Nothing is installed.

    pip install uv
    python benchmarks/reliability/installs.py

uv resolves for another platform and Python, markers included. Free-threaded Python it does not know
without having one; there pip looks for the wheels, by their tags.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHONS = ("3.9", "3.14", "3.15")  # oldest, newest, next
CPU = (
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "x86_64-unknown-linux-musl",
    "aarch64-apple-darwin",
    "x86_64-apple-darwin",
    "x86_64-pc-windows-msvc",
)
GPU = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "x86_64-pc-windows-msvc")
FREE_THREADED = ("cp313t", "cp314t")
TAGS = ("manylinux_2_28_x86_64", "musllinux_1_2_x86_64", "macosx_14_0_arm64", "win_amd64")
# Known to fail: scikit-image has wheels for musl from Python 3.11 on, and what Matplotlib needs has
# wheels for free-threaded Python on Windows from 3.14 on.
KNOWN = {
    ("requirements.txt", "3.9", "x86_64-unknown-linux-musl"),
    ("requirements.txt", "cp313t", "win_amd64"),
}


def with_uv(requirements, python, platform):
    command = ["uv", "pip", "compile", "-q", "--only-binary", ":all:", "--python-version", python]
    # As pip: a release candidate only where the requirement names one.
    command += ["--prerelease", "explicit", "--python-platform", platform, requirements]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def with_pip(requirements, abi, tag):
    version = f"{abi[2]}.{abi[3:5]}"
    with tempfile.TemporaryDirectory() as nowhere:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        command += ["--target", nowhere, "--only-binary", ":all:", "--implementation", "cp"]
        command += ["--python-version", version, "--abi", abi, "--abi", "none", "--platform", tag]
        command += ["--platform", "manylinux_2_17_x86_64"] if tag.startswith("many") else []
        command += ["-r", requirements]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n\n")[0]).parse_args()
    checks = [(with_uv, "requirements.txt", python, p) for python in PYTHONS for p in CPU]
    checks += [(with_uv, "requirements-gpu.txt", "3.14", p) for p in GPU]
    checks += [(with_pip, "requirements.txt", abi, tag) for abi in FREE_THREADED for tag in TAGS]
    failed = 0
    for how, *what in checks:
        result = how(*what)
        known = tuple(what) in KNOWN
        said = "known not to" if known and result.returncode else "ok"
        if result.returncode and not known:
            said, failed = "FAILED", failed + 1
        print(*(f"{word:25}" for word in what), said, flush=True)
        if said == "FAILED":
            print(result.stderr[-2000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
