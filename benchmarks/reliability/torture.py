"""Kills, fills the disk of, and feeds rubbish to a small run; ends with exit status 0 when nothing
was lost.

    python benchmarks/reliability/torture.py                  everything (some ten minutes)
    python benchmarks/reliability/torture.py --kills 5 --files 100 --operations 10

- **Kills.** SIGKILL at random moments, and before each operation on a file. The same command again
  must end with the same bits, and the same metrics but for the times, as an undisturbed run.
- **Errors.** Each operation on a file fails once, or from there on, as on a broken or full disk or
  with too many open files. No traceback; the repeat ends with the same bits.
- **Full disks.** A limit on the size of files, and a real file system that is too small (needs
  root). A failed save is reported, costs no earlier checkpoint and is made up for.
- **Files.** Idx files (plain and gzipped) and checkpoints with random damage. Each must be read or
  refused with a UserError, within ten seconds and 2 GiB of address space beyond what the program
  has; a checkpoint that is read must be the right one.
"""

import argparse
import collections
import errno
import gzip
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import powercut
from faults import watching

import mnist_resnet9 as m
from support import mnist

FLAGS = "--channels 2,4,4,4 --train-images 256 --batch-size 32 --augment 1 --ema 0.9".split()
FLAGS += "--data-dir data/sample --device cpu --threads 2".split()


def command(save, epochs):
    flags = [*FLAGS, "--save-dir", str(save), "--epochs-max", str(epochs)]
    return [sys.executable, "mnist_resnet9.py", *flags]


def train(save, epochs, **options):
    return subprocess.run(
        command(save, epochs), cwd=ROOT, capture_output=True, text=True, timeout=600, **options
    )


def result(save):
    """What must not depend on kills: the bytes of the checkpoint, the metrics without times, the
    epochs in the log, where one that was repeated says the same twice."""
    folder = save / "resnet9"
    rows = [line.split(",")[:6] for line in (folder / "metrics.csv").read_text().splitlines()]
    log = [
        line[:50]
        for line in (folder / "log.txt").read_text().splitlines()
        if line[:5].strip().isdigit()
    ]
    return (folder / "checkpoint_last.npz").read_bytes(), rows, list(dict.fromkeys(log))


def kill(work, rng, kills, epochs):
    done, where = 0, collections.Counter()
    start = time.perf_counter()
    assert train(work / "whole", epochs).returncode == 0
    longest = (time.perf_counter() - start) / 3
    expected = result(work / "whole")
    rounds = 0
    while done < kills:
        save = work / f"killed{rounds}"
        rounds += 1
        while True:
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command(save, epochs), cwd=ROOT, **streams)
            wait = rng.uniform(0.3, longest) if done < kills else None
            try:
                _, error = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                begun = (save / "resnet9" / "checkpoint_last.npz").exists()
                in_save = "in a save" if list(save.rglob("*.part")) else "between saves"
                where[in_save if begun else "before the first checkpoint"] += 1
                continue
            assert process.returncode == 0 and not error, error.decode()
            break
        assert result(save) == expected, f"round {rounds} ended with other bits"
    print(
        f"kills: {done} in {rounds} runs of {epochs} epochs {dict(where)}; "
        "all ended with the same bits",
        flush=True,
    )


def fill(work, epochs):
    """A limit on the size of files: smaller than a checkpoint, larger than the log. Then the limit
    is lifted."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    full = work / "full"
    assert train(full, 2).returncode == 0
    before = (full / "resnet9" / "checkpoint_last.npz").read_bytes()
    result_full = train(full, epochs, preexec_fn=limit)
    assert result_full.returncode == 1, result_full
    assert "Traceback" not in result_full.stderr, result_full.stderr
    failures = result_full.stderr.count("NOT written")
    assert (full / "resnet9" / "checkpoint_last.npz").read_bytes() == before
    again = train(full, epochs)
    assert again.returncode == 0, again.stderr
    assert result(full) == result(work / "whole")
    print(
        f"write limit: exit status {result_full.returncode}, {failures} failed saves reported, "
        "last checkpoint untouched; continued without the limit to the same bits",
        flush=True,
    )


# ── At each operation on a file ───────────────────────────────────────────────────────────────────


def operations(scenario, save):
    """The operations of a small run, in order."""
    powercut.prepare(scenario, save)
    done = []
    with watching(save, done.append):
        assert powercut.train(save)[0] == 0
    return done


def disturb(work, scenario, disturbed, limit):
    """Calls disturbed(save, n) for each operation n of the run, and then repeats its command.

    Returns what the calls returned, counted."""
    whole, ready, save = work / "whole_small", work / f"ready_{scenario}", work / "save"
    if not whole.exists():
        assert powercut.train(whole)[0] == 0
    expected = powercut.result(whole / powercut.TAG)
    ready.mkdir()
    powercut.prepare(scenario, ready)
    shutil.copytree(ready, save)
    count = len(operations(scenario, save))
    counts = collections.Counter()
    for n in range(count)[: limit or None]:
        shutil.rmtree(save)
        shutil.copytree(ready, save)
        counts[disturbed(save, n)] += 1
        status, text, _ = powercut.train(save)
        assert status == 0, f"{scenario}, operation {n}: {text}"
        same = powercut.result(save / powercut.TAG) == expected
        assert same, f"{scenario}, operation {n}: the repeat ended with other bits"
    shutil.rmtree(save)
    return counts


def kill_at(save, n):
    """Runs it in a process that ends before operation n."""
    child = os.fork()
    if child == 0:
        left = iter(range(n))

        def watch(_):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        with watching(save, watch):
            powercut.train(save)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else "ended before"


def fail_at(number, for_ever):
    """A function that runs it with the error of this number in operation n, or from n on."""

    def run(save, n):
        seen = []

        def watch(operation):
            seen.append(operation)
            if len(seen) - 1 == n or (for_ever and len(seen) > n):
                raise OSError(number, os.strerror(number), str(operation.path))

        with watching(save, watch):
            status, text, _ = powercut.train(save)
        assert status in (0, 1, 2) and "Traceback" not in text, text
        return f"exit status {status}"

    return run


def at_each_operation(work, limit):
    for scenario in powercut.SCENARIOS:
        counts = disturb(work, scenario, kill_at, limit)
        shutil.rmtree(work / f"ready_{scenario}")
        print(f"kill before each operation, {scenario}: {dict(counts)}; all continued", flush=True)
    for number in (errno.EIO, errno.ENOSPC, errno.EMFILE):
        for for_ever in (False, True):
            counts = collections.Counter()
            for scenario in powercut.SCENARIOS:
                counts += disturb(work, scenario, fail_at(number, for_ever), limit)
                shutil.rmtree(work / f"ready_{scenario}")
            when = "from each operation on" if for_ever else "in each operation once"
            counts = dict(sorted(counts.items()))
            print(f"{errno.errorcode[number]} {when}: {counts}; all continued", flush=True)


def small_file_system(work):
    """A run on a file system with room for all but its checkpoints, which is then made larger."""
    place, unlimited = work / "mounted", work / "unlimited"
    assert train(unlimited, 6).returncode == 0
    # A file takes whole pages, and one for its name.
    pages = sum(math.ceil(path.stat().st_size / 4096) + 1 for path in unlimited.rglob("*"))
    checkpoint = (unlimited / "resnet9" / "checkpoint_last.npz").stat().st_size
    size = 4 * pages - 3 * checkpoint // 1024  # KiB
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        print("small file system: skipped, it needs root and the right to mount", flush=True)
        return
    try:
        command_ = command(place, 6)
        first = subprocess.run(command_, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert first.returncode in (1, 2) and "Traceback" not in first.stderr, first.stderr
        failures = first.stderr.count("NOT written")
        for larger in (size + checkpoint // 1024, 2**16):
            resize = ["mount", "-o", f"remount,size={larger}k", str(place)]
            subprocess.run(resize, check=True, capture_output=True)
            again = subprocess.run(command_, cwd=ROOT, capture_output=True, text=True, timeout=600)
            assert "Traceback" not in again.stderr, again.stderr
        assert again.returncode == 0, again.stderr
        assert result(place) == result(unlimited)
        print(
            f"small file system: exit status {first.returncode}, {failures} failed saves reported; "
            "made larger, it was continued to the same bits",
            flush=True,
        )
    finally:
        subprocess.run(["umount", str(place)], check=True)


# ── Damaged files ─────────────────────────────────────────────────────────────────────────────────


def mutate(content, rng):
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(6), rng.randrange(len(data) + 1)
        # Headers are worth more than their share of the bytes.
        near = min(at, rng.choice((at, 64, 1024)))
        if kind == 0 and data:
            data[min(near, len(data) - 1)] = rng.randrange(256)
        elif kind == 1:
            del data[near:]
        elif kind == 2:
            data[near:near] = rng.randbytes(rng.randint(1, 64))
        elif kind == 3:
            del data[near : near + rng.randint(1, 64)]
        elif kind == 4:
            data[near : near + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7))
        else:
            data[max(0, len(data) - rng.randint(1, 200)) :] = rng.randbytes(rng.randint(0, 200))
    return bytes(data)


def fuzz(work, rng, count):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    settings = m.parse_settings(FLAGS)
    checkpoint = (work / "whole" / "resnet9" / "checkpoint_last.npz").read_bytes()
    path = work / "right.npz"
    path.write_bytes(checkpoint)
    right = m.load_checkpoint(path, settings)
    sources = []
    for images in (True, False):
        name = "t10k-images-idx3-ubyte" if images else "t10k-labels-idx1-ubyte"
        packed = (ROOT / "data" / "sample" / f"{name}.gz").read_bytes()
        content = gzip.decompress(packed)
        if images:
            content = content[:4] + (20).to_bytes(4, "big") + content[8 : 16 + 20 * 784]
        for suffix, data in (("", content), (".gz", gzip.compress(content))):
            sources.append((f"{'images' if images else 'labels'}{suffix}", data))
    counts = collections.Counter()

    def hang(*_):
        raise SystemError("hang")  # no kind of error that the readers expect

    signal.signal(signal.SIGALRM, hang)
    for i in range(count):
        signal.alarm(10)
        if i % 2:
            name, content = rng.choice(sources)
            path = work / f"fuzz-{name}"
            path.write_bytes(mutate(content, rng))
            try:
                mnist.read_file(path, [])
                # A changed pixel is still an idx file; the SHA-256 of the set finds it.
                counts["idx read"] += 1
            except m.UserError:
                counts["idx refused"] += 1
        else:
            path = work / "fuzz.npz"
            path.write_bytes(mutate(checkpoint, rng))
            try:
                state = m.load_checkpoint(path, settings)
                assert np.array_equal(state.params.flat, right.params.flat)
                assert np.array_equal(state.ema.flat, right.ema.flat)
                assert np.array_equal(state.moments, right.moments)
                assert (state.step, state.history) == (right.step, right.history)
                # The damage was in bytes that mean nothing.
                counts["checkpoints read, all right"] += 1
            except m.UserError as error:
                assert "hang" not in str(error)
                counts["checkpoints refused"] += 1
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"files: {count} mutated, {dict(counts)}; no other error, no hang, "
        f"peak memory {grown:.0f} MiB",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--operations", type=int, default=0, help="0 = each of a run's")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.environ.pop("PYTHONFAULTHANDLER", None)
    with tempfile.TemporaryDirectory() as work:
        kill(Path(work), rng, args.kills, args.epochs)
        fill(Path(work), args.epochs)
        at_each_operation(Path(work), args.operations)
        small_file_system(Path(work))
        fuzz(Path(work), rng, args.files)


if __name__ == "__main__":
    main()
