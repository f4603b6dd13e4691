"""Runs the programs on other Pythons, each in a fresh virtual environment.

    python benchmarks/reliability/pythons.py python3.9 python3.13
    python benchmarks/reliability/pythons.py python3.9 --numpy 2.0.0

It trains on the sample on two cores, is stopped and continues, profiles a run, draws its figures
and reads a picture. --numpy takes that version in place of the newest one that fits.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ["--data-dir", "data/sample", "--device", "cpu", "--threads", "2", "--channels", "2,4,4,4"]
FLAGS += ["--train-images", "640"]


def check(python, numpy, folder):
    """Raises an error where something fails."""
    run([python, "-m", "venv", folder / "venv"])
    here = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = [f"numpy=={numpy}"] if numpy else []
    run([here, "-m", "pip", "install", "-q", "-r", "requirements.txt", *wanted])
    versions = "import sys, numpy; print(sys.version.split()[0], numpy.__version__)"
    python_version, numpy_version = run([here, "-c", versions]).split()
    print(f"Python {python_version}, NumPy {numpy_version}:", end=" ", flush=True)
    save = ["--save-dir", folder / "save"]
    warnings = ["-W", "error::DeprecationWarning:__main__", "-W", "error::SyntaxWarning"]
    train = [here, *warnings, "mnist_resnet9.py", *FLAGS, *save]
    stop_and_continue([*train, "--epochs-max", "4"], folder / "save" / "resnet9" / "log.txt")
    run([*train, "--tag", "quick", "--recipe", "quick", "--epochs-max", "1"])
    small = ["--tag", "profiled", "--train-images", "64", "--epochs-max", "1"]
    run(
        [here, "-m", "cProfile", "-o", folder / "profile", "mnist_resnet9.py", *FLAGS, *save]
        + small
    )
    figures = [here, *warnings, "plot_figs.py", "resnet9", *save, "--data-dir", "data/sample"]
    run(figures)
    assert (folder / "save" / "resnet9" / "curves.png").exists()
    picture = ROOT / "save" / "record" / "filters.png"
    run([here, *warnings, "predict.py", picture, "--tag", "resnet9", *save])
    print("ok", flush=True)


def run(command, statuses=(0,)):
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    if result.returncode not in statuses or "Traceback" in result.stderr:
        words = " ".join(map(str, command))
        raise SystemExit(f"{words}\nended with {result.returncode}:\n{result.stderr[-3000:]}")
    return result.stdout


def stop_and_continue(command, log):
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and "\n    1 " in log.read_text()):
        time.sleep(0.1)
    if os.name == "nt":
        process.wait()  # a console of its own would be needed to interrupt it alone
    else:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) in (0, 130), process.returncode
    run(command)
    assert "Finished" in log.read_text()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--numpy", help="the version to take (default: the newest that fits)")
    given = parser.parse_args()
    for python in given.pythons:
        with tempfile.TemporaryDirectory() as folder:
            check(python, given.numpy, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
