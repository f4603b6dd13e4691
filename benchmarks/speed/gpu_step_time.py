"""Our training step on a GPU against PyTorch's on the same card, in one run.

    python benchmarks/speed/gpu_step_time.py                  batches of 64, 256 and 1,024
    python benchmarks/speed/gpu_step_time.py --batch 8        another batch

Our step is there three times: the fast path (support/gpu.py: the whole step as one CUDA graph), the
same with plain products in place of tensor cores, which may be faster on a GeForce, and the plain
operations of mnist_resnet9.py on CuPy. PyTorch's is there four times: eager, torch.compile
(the network), the whole step as one CUDA graph, and both together. Same network, images, dropout
and Adam on all sides; the data set and all random numbers are on the device. The sides take turns
of a few steps; each turn is timed between two synchronisations, and the figure is the median turn.
All compute in float32; with --tf32 PyTorch and the plain operations may round the factors of a
product to TF32.
For each side one further step runs under PyTorch's profiler, which sees every kernel of the
process, CuPy's too: how many a step has, and where ours spends its time.
"""

import argparse
import math
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "torch_version")]

TURN, WARM_UP = 10, 20  # steps
KERNELS_SHOWN = 10


@contextmanager
def plain_products(gpu):
    """Within it the fast path's kernels are compiled to multiply without tensor cores."""
    options, make = gpu.Cuda.options, gpu.cuda
    gpu.Cuda.options = (*options, "-DPLAIN_PRODUCTS")
    device = gpu.Cuda()  # the other one keeps its compiled kernels
    gpu.cuda = lambda: device
    try:
        yield
    finally:
        gpu.Cuda.options, gpu.cuda = options, make


def our_step(m, data, settings, fast=False):
    """A function that takes one training step and returns the loss, left on the device."""
    images, labels = m.xp.asarray(data.train_images), m.xp.asarray(data.train_labels)
    order = m.xp.asarray(m.random_stream(settings.seed, m.ORDER, 1).permutation(len(images)))
    state, N = m.init_state(settings), settings.batch_size
    whole = len(images) // N  # batches of an epoch; on no side there are smaller ones
    total = math.ceil(len(images) / N) * settings.epochs_max
    run = m.Run(settings, m.layers, state, (images, labels), (), (), total)

    if fast:
        path, why = m.gpu_engine(run, "GPU")
        if path is None:
            raise m.UserError(why)

    def fast_step():
        epoch, number = divmod(state.step, whole)
        if number == 0:
            path.begin_epoch(order, *m.plan_of(run, epoch + 1))
        return path.step(state, number)

    def step():
        start = state.step % whole * N
        batch = order[start : start + N]
        rng = m.random_stream(settings.seed, m.STEP, 1, state.step)
        loss, gradients = m.loss_and_gradients(
            state.params, images[batch], labels[batch], settings, rng
        )
        m.update(state, gradients, settings, settings.learning_rate)
        return loss

    return fast_step if fast else step


def torch_step(m, data, settings, device, way="eager"):
    """The same with PyTorch; way: eager, compile (the network), graph (the step as one CUDA graph),
    or compile + graph."""
    import resnet9_torch as t
    import torch
    import torch.nn.functional as F

    images = torch.from_numpy(data.train_images.copy()).to(device)
    labels = torch.from_numpy(data.train_labels.astype("int64")).to(device)
    order = torch.from_numpy(
        m.random_stream(settings.seed, m.ORDER, 1).permutation(len(images))
    ).to(device)
    params, N, rate = m.init_params(settings), settings.batch_size, settings.dropout
    net = t.build(settings, torch.from_numpy(m.to_host(params.flat).copy()).to(device), params)
    optimizer = torch.optim.Adam(
        net.parameters(), lr=settings.learning_rate, fused=True, capturable="graph" in way
    )
    model = torch.compile(net, dynamic=False) if "compile" in way else net
    batch, done = order[:N].clone(), 0

    def work():
        x = ((images[batch].float() / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[:, None]
        x = x.contiguous(memory_format=torch.channels_last)
        mask = None
        if rate:
            mask = (torch.rand(N, net.fc9.in_features, device=device) >= rate) / (1 - rate)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, mask), labels[batch])
        loss.backward()
        optimizer.step()
        return loss.detach()

    replay = work
    if "graph" in way:
        # As PyTorch's documentation asks for: some steps on another stream, then the capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
            optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = work()

        # The graph reads the arrays of these, but does not keep them alive: the default does.
        def replay(used=(images, labels, model, optimizer)):
            graph.replay()
            return loss

    def step():
        nonlocal done
        start = done * N % (len(images) - N + 1)
        batch.copy_(order[start : start + N])
        done += 1
        return replay()

    return step


def seconds_a_step(sides, turns, synchronize):
    """{side: median seconds of a step}; the sides take turns."""
    seconds = {name: [] for name in sides}
    for turn in range(WARM_UP // TURN + turns):
        for name, step in sides.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(TURN):
                step()
            synchronize()
            if turn >= WARM_UP // TURN:
                seconds[name].append((time.perf_counter() - start) / TURN)
    return {name: statistics.median(values) for name, values in seconds.items()}


def kernels(step, synchronize):
    """[(name, how often, microseconds)] of one step, longest first: kernels, copies and fills."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        synchronize()
    found = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            count, time_us = found.get(event.name, (0, 0))
            found[event.name] = count + 1, time_us + event.time_range.elapsed_us()
    return sorted(((name, *both) for name, both in found.items()), key=lambda row: -row[2])


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--turns", type=int, default=20, help=f"turns a side, each of {TURN} steps")
    parser.add_argument(
        "--skip-compile", action="store_true", help="leave torch.compile out (it takes a minute)"
    )
    parser.add_argument("--data-dir", default="data", help="folder with the four MNIST files")
    parser.add_argument(
        "--tf32", action="store_true", help="TF32 for PyTorch and the plain operations"
    )
    parser.add_argument(
        "--check", action="store_true", help="only say whether CuPy and PyTorch can both use a GPU"
    )
    o = parser.parse_args(arguments)
    os.environ["CUPY_TF32"] = "1" if o.tf32 else "0"  # CuPy reads it once, before its first product

    import mnist_resnet9 as m

    ours = m.use_device("gpu")
    try:
        import resnet9_torch as t
    except ImportError as error:
        raise m.UserError(
            f"PyTorch is missing ({error}); requirements-torch.txt says how to get it"
        ) from None
    theirs = t.use_device("gpu")
    kind = "TF32" if o.tf32 else "float32"
    print(f"{ours}; {m.xp.__name__} {m.xp.__version__}; {theirs.split(', ')[-1]}; {kind}")
    if o.check:
        return 0

    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = o.tf32
    torch.backends.cudnn.benchmark = True  # PyTorch tries which convolutions are fastest
    data = m.load_mnist(o.data_dir)
    ways = ["eager", "graph"] + ["compile", "compile + graph"] * (not o.skip_compile)
    for N in o.batch:
        settings = m.Settings(batch_size=N)
        sides = {"ours, one CUDA graph": our_step(m, data, settings, fast=True)}
        with plain_products(m.gpu):
            sides["ours, plain products"] = our_step(m, data, settings, fast=True)
        sides["ours, plain operations"] = our_step(m, data, settings)
        sides |= {f"PyTorch {way}": torch_step(m, data, settings, "cuda", way) for way in ways}
        times = seconds_a_step(sides, o.turns, torch.cuda.synchronize)
        print(
            f"\nbatch {N}, median of {o.turns} turns of {TURN} steps   ms a step   images/s   "
            "of eager's time   of its fastest   kernels"
        )
        best = min(seconds for name, seconds in times.items() if name.startswith("PyTorch"))
        for name, seconds in times.items():
            seen = kernels(sides[name], torch.cuda.synchronize)
            count = sum(row[1] for row in seen) or "not seen"
            eager, fastest = seconds / times["PyTorch eager"], seconds / best
            print(
                f"  {name:38s}  {1000 * seconds:9.3f}  {N / seconds:9.0f}  "
                f"{eager:16.2f}  {fastest:15.2f}   {count:>7}"
            )
        fast = "ours, one CUDA graph"
        where = kernels(sides[fast], torch.cuda.synchronize)
        if where:  # side by side they take longer each than alone, and together less than their sum
            summed = sum(row[2] for row in where) / 1000
            print(f"  our kernels, {summed:.2f} ms in {1000 * times[fast]:.2f}:")
        for name, count, time_us in where[:KERNELS_SHOWN]:
            print(f"    {time_us / 1000:7.3f} ms  {count:4d} ×  {name[:90]}")
    return 0


if __name__ == "__main__":
    import mnist_resnet9

    sys.exit(mnist_resnet9.main(sys.argv[1:], main))
