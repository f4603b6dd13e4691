"""Our training step against that of PyTorch, TensorFlow and JAX, in one run.

    pip install -r requirements-torch.txt --extra-index-url https://download.pytorch.org/whl/cpu
    pip install tensorflow-cpu jax                    as you like: what is there is compared
    python benchmarks/speed/step_time.py              batch 64, every core, 40 steps a side
    python benchmarks/speed/step_time.py --evaluate   forward only
    python benchmarks/speed/step_time.py --table      batches, one thread and all, two widths
    python benchmarks/speed/step_time.py --memory     resident memory over 1,000 steps

Same network, batch, threads, images and Adam on all sides: forward, backward, update. Each side is
a process of its own (with workers of its own, whose memory counts) and only one computes at a time:
they take turns of a few steps until each has done --steps, so a machine that gets slower meanwhile
does so for all. Figures are medians.

The floor is the time that the multiplications alone would take, in the fewest that we know of
(Winograd's, without its transforms), at the speed of a large matrix product on this machine,
measured in the same run.
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import peers
from machine import machine

import mnist_resnet9 as m
from support import winograd
from support.cores import available_cores

SIDES = ("ours", *peers.PEERS)
LESS_PRECISE = ("torch bfloat16",)  # shown, and left out of the ratio
TURN, WARM_UP = 5, 5  # steps
WIDE = [16, 32, 64, 64]


def our_step(o):
    settings = m.Settings(channels=tuple(o.channels), dropout=0.9)
    m.use_cores(o.threads)
    data = m.load_mnist()
    images, labels = data.train_images[: o.batch], data.train_labels[: o.batch]
    state = m.init_state(settings)

    def train():
        rng = m.random_stream(0, m.STEP, 1, state.step)
        loss, gradients = m.loss_and_gradients(state.params, images, labels, settings, rng)
        m.update(state, gradients, settings, settings.learning_rate)
        return float(loss)

    return (lambda: m.predict(state.params, images, settings)) if o.evaluate else train


def serve(o):
    """A side: for every line on stdin does one turn and answers with the seconds of its steps."""
    step = our_step(o) if o.side == "ours" else peers.step(o, o.side)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        processes = [os.getpid(), *(worker.process.pid for worker in m.workers.workers)]
        peak, resident = (
            sum(memory_of(pid, field) for pid in processes) for field in ("VmHWM", "VmRSS")
        )
        print(
            json.dumps({"seconds": seconds, "peak_mib": peak, "resident_mib": resident}), flush=True
        )


def memory_of(pid, field):
    """MiB. What processes share is counted in each of them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024  # the file has KiB


class Side:
    def __init__(self, name, arguments):
        command = [sys.executable, __file__, "--side", name, *arguments]
        self.name, self.seconds, self.peak, self.resident = name, [], 0, 0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self, steps):
        print(steps, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or sys.exit(f"{self.name} failed"))
        self.peak, self.resident = answer["peak_mib"], answer["resident_mib"]
        return answer["seconds"]

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def start_sides(o, names):
    arguments = ["--batch", str(o.batch), "--threads", str(o.threads)]
    arguments += ["--channels", *map(str, o.channels)]
    if o.evaluate:
        arguments.append("--evaluate")
    sides = [Side(name, arguments) for name in names]
    for side in sides:
        side.turn(WARM_UP)
    return sides


def compare(o, names):
    """{name: (median seconds, seconds, peak MiB)}; the sides take turns. And the floor in
    seconds."""
    # First, since copies of this process that are made later would hold the sides' pipes open.
    m.use_cores(o.threads)
    sides, peaks = start_sides(o, names), []
    for _ in range(math.ceil(o.steps / TURN)):
        for side in sides:
            side.seconds += side.turn(TURN)
        peaks.append(gemm_peak(o.threads))
    for side in sides:
        side.end()
    floor = 2 * multiplications(o) / statistics.median(peaks)
    measured = {
        side.name: (statistics.median(side.seconds), side.seconds, side.peak) for side in sides
    }
    return measured, floor


def fastest_peer(result):
    """(median seconds, name) of the fastest side that computes as precisely as ours."""
    others = set(result) - {"ours", *LESS_PRECISE}
    return min((result[name][0], name) for name in others)


def multiply(size, repeats):
    a = np.ones((size, size), np.float32)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def gemm_peak(threads):
    """Floating point operations a second of large float32 matrix products, on all of the threads
    together."""
    return sum(m.workers.map(functools.partial(multiply, 1024), [4] * threads))


def multiplications(o):
    """Of one step (or of one forward pass), with Winograd's algorithm in the 3×3 convolutions but
    the first."""
    c1, c2, c3, c4 = o.channels
    large = [(28, c1, c2), (28, c2, c2), (28, c2, c2)]
    small = [(14, c2, c3), (14, c3, c4), (14, c4, c4), (14, c4, c4)]
    one_pass = 49 * c4 * 10
    for size, C, K in large + small:
        tiles = math.ceil(size / winograd.OUTPUTS)  # along a side
        one_pass += (tiles * winograd.VALUES) ** 2 * C * K
    first = 28 * 28 * 9 * c1
    if o.evaluate:
        return o.batch * (one_pass + first)
    return o.batch * (3 * one_pass + 2 * first)  # images need no gradient


def table(o, names):
    """One line a setting: milliseconds of each side, microseconds an image of ours, and the
    ratio."""
    titles = "  ".join(f"{name:>20s}" for name in names)
    print(f"{'channels':>14s}  threads  batch  {titles}  ours µs/image  ratio")
    for channels, batches in (([4, 16, 32, 64], (1, 8, 64, 256, 1024)), (WIDE, (64,))):
        for threads, batch in itertools.product(sorted({1, o.threads}), batches):
            one = argparse.Namespace(
                **vars(o) | {"channels": channels, "threads": threads, "batch": batch}
            )
            one.steps = o.steps if batch <= 64 else 10
            result, _ = compare(one, names)
            medians = {name: median for name, (median, *_) in result.items()}
            fastest, _ = fastest_peer(result)
            times = "  ".join(f"{1000 * medians[name]:17.2f} ms" for name in names)
            print(
                f"{','.join(map(str, channels)):>14s}  {threads:7d}  {batch:5d}  {times}  "
                f"{1e6 * medians['ours'] / batch:13.0f}  {medians['ours'] / fastest:5.2f}",
                flush=True,
            )


def memory(o, names):
    """Resident memory after 100 and after 1,000 steps, and the peak."""
    print("                      after 100 steps  after 1,000 steps    peak (MiB)")
    for name in names:
        (side,) = start_sides(o, [name])
        side.turn(100 - WARM_UP)
        early = side.resident
        side.turn(900)
        print(f"{name:20s}  {early:15.0f}  {side.resident:17.0f}  {side.peak:12.0f}", flush=True)
        side.end()


def parser():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--threads", type=int, default=available_cores())
    p.add_argument("--channels", type=int, nargs=4, default=[4, 16, 32, 64])
    p.add_argument("--steps", type=int, default=40, help="steps a side")
    p.add_argument("--evaluate", action="store_true", help="forward only")
    p.add_argument(
        "--skip-compile",
        action="store_true",
        help="leave torch.compile out (it takes a minute to compile)",
    )
    p.add_argument("--table", action="store_true")
    p.add_argument("--memory", action="store_true")
    p.add_argument("--sides", nargs="*", choices=SIDES[1:], help="only these, beside ours")
    p.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return p


def main(arguments):
    o = parser().parse_args(arguments)
    if min(o.batch, o.threads, o.steps, *o.channels) < 1:
        raise m.UserError("--batch, --threads, --steps and --channels should be 1 or more")
    print(machine())
    names = ["ours", *peers.installed()]
    for name in SIDES:
        if name not in names:
            print(f"{name}: left out, {peers.PEERS[name]} is not installed")
    if o.skip_compile and "torch.compile" in names:
        names.remove("torch.compile")
    if o.sides:
        names = ["ours", *(name for name in names if name in o.sides)]
    if not o.memory and not set(names) - {"ours", *LESS_PRECISE}:
        raise m.UserError("there is no other side to compare with; requirements-torch.txt has one")
    if o.batch > (images := len(m.load_mnist().train_images)):
        raise m.UserError(f"--batch is {o.batch}, but the data set has {images} images")
    if o.table or o.memory:
        (table if o.table else memory)(o, names)
        return 0
    result, floor = compare(o, names)
    what = "evaluation" if o.evaluate else "training step"
    print(
        f"{what}, batch {o.batch}, {o.threads} threads, channels {o.channels}, "
        f"median of {o.steps} each"
    )
    print("                       median ms    fastest ms    times the floor    peak MiB")
    for name, (median, seconds, peak) in result.items():
        print(
            f"{name:20s}  {1000 * median:10.1f}  {1000 * min(seconds):12.1f}  "
            f"{median / floor:17.1f}  {peak:10.0f}"
        )
    print(f"floor                 {1000 * floor:10.1f}")
    median, name = fastest_peer(result)
    print(f"ours / fastest of the others in float32 ({name}): {result['ours'][0] / median:.2f}")
    return 0


if __name__ == "__main__":
    if "--side" in sys.argv:  # one of the processes that are compared
        serve(parser().parse_args())
    else:
        sys.exit(m.main(sys.argv[1:], main))
