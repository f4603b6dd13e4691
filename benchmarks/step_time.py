"""Our training step against PyTorch's, in one run.

    pip install -r requirements-torch.txt --extra-index-url https://download.pytorch.org/whl/cpu
    python benchmarks/step_time.py                      batch 64, every core, 40 steps a side
    python benchmarks/step_time.py --evaluate --batch 500

Same network, batch, threads, images and Adam on both sides: forward, backward, update. Each side is a process of
its own (so that each one's peak memory is its own) and only one computes at a time: they take turns of a few steps
until each has done --steps, so a machine that gets slower meanwhile does so for all. Figures are medians.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDES = ("ours", "torch", "torch channels_last", "torch.compile")
TURN, WARM_UP = 5, 5  # steps


def our_step(o):
    import mnist_resnet9 as m

    settings = m.Settings(threads=o.threads, channels=tuple(o.channels), dropout=0.9)
    data = m.load_mnist()
    images, labels = data.train_images[: o.batch], data.train_labels[: o.batch]
    state = m.init_state(settings)

    def train():
        rng = m.random_stream(0, m.STEP, 1, state.step)
        loss, gradients = m.loss_and_gradients(state.params, images, labels, settings, rng)
        m.update(state, gradients, settings, settings.learning_rate)
        return float(loss)

    return (lambda: m.predict(state.params, images, settings)) if o.evaluate else train


def torch_step(o, memory_format, compiled):
    import torch
    import torch.nn.functional as F

    import mnist_resnet9 as m

    torch.set_num_threads(o.threads)
    data = m.load_mnist()
    pixels = torch.from_numpy(data.train_images[: o.batch].copy())
    labels = torch.from_numpy(data.train_labels[: o.batch].astype("int64"))
    c1, c2, c3, c4 = o.channels

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            widths = [(1, c1), (c1, c2), (c2, c2), (c2, c2), (c2, c3), (c3, c4), (c4, c4), (c4, c4)]
            self.conv = torch.nn.ModuleList(torch.nn.Conv2d(c, k, 3, padding=1) for c, k in widths)
            self.fc9 = torch.nn.Linear(49 * c4, 10)

        def forward(self, x):
            conv1, conv2, conv3, conv4, conv5, conv6, conv7, conv8 = self.conv
            h = F.relu(conv2(F.relu(conv1(x))))
            h = F.relu(h + conv4(F.relu(conv3(h))))
            h = F.max_pool2d(h, 2)
            h = F.relu(conv6(F.relu(conv5(h))))
            h = F.relu(h + conv8(F.relu(conv7(h))))
            h = F.max_pool2d(h, 2)
            return self.fc9(F.dropout(h.flatten(1), 0.9, self.training))

    net = Net().to(memory_format=memory_format)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    model = torch.compile(net) if compiled else net

    def batch():
        x = ((pixels.float() / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[:, None]
        return x.contiguous(memory_format=memory_format)

    def train():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch()), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def evaluate():
        net.eval()
        with torch.inference_mode():
            return model(batch())

    return evaluate if o.evaluate else train


def serve(o):
    """A side: for every line on stdin does one turn and answers with the seconds of its steps."""
    if o.side == "ours":
        step = our_step(o)
    else:
        import torch

        memory_format = torch.channels_last if "channels_last" in o.side else torch.contiguous_format
        step = torch_step(o, memory_format, compiled="compile" in o.side)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({"seconds": seconds, "peak_mib": used.ru_maxrss / 1024}), flush=True)


class Side:
    def __init__(self, name, arguments):
        command = [sys.executable, __file__, "--side", name, *arguments]
        self.name, self.seconds, self.peak = name, [], 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, steps):
        print(steps, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or sys.exit(f"{self.name} failed"))
        self.peak = answer["peak_mib"]
        return answer["seconds"]


def compare(o, names=SIDES):
    """{name: (median seconds, peak MiB, seconds)}; the sides take turns."""
    arguments = ["--batch", str(o.batch), "--threads", str(o.threads), "--channels", *map(str, o.channels)]
    sides = [Side(name, arguments + ["--evaluate"] * o.evaluate) for name in names]
    for side in sides:
        side.turn(WARM_UP)
    for _ in range(-(-o.steps // TURN)):
        for side in sides:
            side.seconds += side.turn(TURN)
    for side in sides:
        side.process.stdin.close()
        side.process.wait()
    return {side.name: (statistics.median(side.seconds), side.peak, side.seconds) for side in sides}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--channels", type=int, nargs=4, default=[4, 16, 32, 64])
    p.add_argument("--steps", type=int, default=40, help="steps a side")
    p.add_argument("--evaluate", action="store_true", help="forward only")
    p.add_argument("--skip-compile", action="store_true", help="leave torch.compile out (it takes a minute to compile)")
    p.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return p


def main():
    o = parser().parse_args()
    if o.side:
        return serve(o)
    result = compare(o, SIDES[:-1] if o.skip_compile else SIDES)
    what = "evaluation" if o.evaluate else "training step"
    print(f"{what}, batch {o.batch}, {o.threads} threads, channels {o.channels}, median of {o.steps} each")
    print("                       median ms    fastest ms    peak MiB")
    for name, (median, peak, seconds) in result.items():
        print(f"{name:20s}  {1000 * median:10.1f}  {1000 * min(seconds):12.1f}  {peak:10.0f}")
    fastest = min((v[0], k) for k, v in result.items() if k != "ours")
    print(f"ours / fastest of PyTorch ({fastest[1]}): {result['ours'][0] / fastest[0]:.2f}")


if __name__ == "__main__":
    main()
