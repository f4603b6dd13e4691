"""Where the time of a training step goes: per layer and per kind of work, and what more cores would
make of it.

    python benchmarks/speed/where_time_goes.py                 batch 64, one core, then all

The functions of mnist_resnet9.py are wrapped with a clock that counts each one's own time, without
that of the functions it calls. A convolution's own time is its matrix products (with adding the
bias); to_points and from_points are its transforms. What lies between the functions (copies,
reshaping, the clock) is counted as "other".
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from machine import machine

import mnist_resnet9 as m
from support import winograd
from support.cores import available_cores

KINDS = {
    "GEMM": ("winograd.conv2d", "winograd.conv2d_backward", "linear", "linear_backward"),
    "transforms": ("winograd.to_points", "winograd.from_points", "winograd.prepare"),
    "elementwise": (
        *("relu", "relu_backward", "residual_block", "residual_block_backward"),
        *("max_pool2d", "max_pool2d_backward", "dropout", "dropout_backward"),
        *("cross_entropy_loss", "cross_entropy_loss_backward", "to_input"),
    ),
    "plain conv": ("conv2d", "conv2d_backward", "surroundings"),
    "other": ("conv_block", "conv_block_backward", "forward", "backward"),
}
# What lies between two convolutions goes to the first.
LAYERS = ("images", *(f"conv{i}" for i in range(1, 9)), "fc9")


class Clock:
    """Own time of every wrapped function, by layer and kind. Works on one core."""

    def __init__(self):
        self.seconds, self.here = Counter(), SimpleNamespace()
        for kind, names in KINDS.items():
            for name in names:
                home = winograd if name.startswith("winograd.") else m
                function = getattr(home, name.removeprefix("winograd."))
                setattr(home, function.__name__, self.wrap(function, kind, name))

    def wrap(self, function, kind, name):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            here = self.here
            if name == "to_input" or not hasattr(here, "inner"):
                here.layer, here.inner = 0, [0.0]
            if name in ("conv2d", "dropout", "cross_entropy_loss_backward"):
                here.layer = min(here.layer + 1, 9)
            here.inner.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            whole = time.perf_counter() - start
            self.seconds[LAYERS[here.layer], kind] += whole - here.inner.pop()
            here.inner[-1] += whole
            if name in ("conv2d_backward", "dropout_backward"):
                here.layer -= 1
            return result

        return timed


def timed(work, shards):
    """work(shards), each result with its share of the processor time that this took."""
    start = time.process_time()
    results = work(shards)
    share = (time.process_time() - start) / len(shards)
    return [(result, share) for result in results]


def measure(threads, batch, steps, clock=None):
    """Median seconds of a step, of its shards side by side, and of the shards one by one (as their
    cores computed)."""
    settings, data = m.Settings(), m.load_mnist()
    images, labels = data.train_images[:batch], data.train_labels[:batch]
    state = m.init_state(settings)
    over_cores, shards, busy, whole = m.over_cores, [], [], []
    m.use_cores(threads)

    def timed_over_cores(work, of):
        start = time.perf_counter()
        results = over_cores(functools.partial(timed, work), of)
        shards.append(time.perf_counter() - start)
        busy.append(sum(share for _, share in results))
        return [result for result, _ in results]

    m.over_cores = timed_over_cores
    for step in range(steps + 5):
        if step == 5:  # warm
            for times in (shards, busy, whole, *([clock.seconds] if clock else [])):
                times.clear()
        start = time.perf_counter()
        rng = m.random_stream(0, m.STEP, 1, step)
        _, gradients = m.loss_and_gradients(state.params, images, labels, settings, rng)
        m.update(state, gradients, settings, settings.learning_rate)
        whole.append(time.perf_counter() - start)
    m.over_cores = over_cores
    return [statistics.median(times) for times in (whole, shards, busy)]


def print_parts(clock, steps, busy):
    ms = {key: 1000 * seconds / steps for key, seconds in clock.seconds.items()}
    print("one core, milliseconds a step (the clock costs some, too)")
    print(f"{'':8s}{''.join(f'{kind:>13s}' for kind in KINDS)}{'sum':>13s}")
    for layer in (*LAYERS, "sum"):
        row = [
            sum(v for (at, of), v in ms.items() if of == kind and layer in (at, "sum"))
            for kind in KINDS
        ]
        print(f"{layer:8s}{''.join(f'{v:13.2f}' for v in row)}{sum(row):13.2f}")


def main(arguments):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=40)
    o = p.parse_args(arguments)
    if min(o.batch, o.steps) < 1:
        raise m.UserError("--batch and --steps should be 1 or more")
    print(machine())
    cores, shards = available_cores(), math.ceil(o.batch / m.SHARD_IMAGES)
    results = {threads: measure(threads, o.batch, o.steps) for threads in sorted({1, cores})}
    print("  cores   step ms   serial   shards   computing   waiting (of all cores)")
    for threads, (whole, side_by_side, busy) in results.items():
        waiting = threads * side_by_side - busy
        times = (whole, whole - side_by_side, side_by_side, busy, waiting)
        row = [f"{1000 * t:{width}.2f}" for t, width in zip(times, (10, 9, 9, 12, 10))]
        print(f"{threads:7d}{''.join(row)}")

    whole, side_by_side, busy = results[1]
    serial, shard = whole - side_by_side, busy / shards
    print(
        f"\npredicted from one core: serial {1000 * serial:.2f} ms, "
        f"and {shards} shards of {1000 * shard:.2f} ms each"
    )
    for threads in (1, 2, 4, 8, 16):
        step = serial + math.ceil(shards / threads) * shard
        measured = f", measured {1000 * results[threads][0]:.1f}" if threads in results else ""
        faster = f"{whole / step:.1f} times as fast as one"
        print(f"{threads:3d} cores: {1000 * step:5.1f} ms, {faster}{measured}")

    print()
    clock = Clock()
    measure(1, o.batch, o.steps, clock)
    print_parts(clock, o.steps, busy)
    return 0


if __name__ == "__main__":
    sys.exit(m.main(sys.argv[1:], main))
