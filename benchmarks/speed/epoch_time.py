"""One whole epoch as a user runs it, ours against a plain PyTorch loop that does the same.

    python benchmarks/speed/epoch_time.py                      three runs a side, taking turns

Each run is a process of its own that trains for one epoch on MNIST with augmentation: an evaluation
before and after (10,000 training and 10,000 test images), 938 steps of 64 images, a log line,
metrics, predictions and checkpoints. The PyTorch loop turns and shifts its images with affine_grid
and grid_sample, and keeps the faster memory format. The time is that of the training; the imports,
and reading the files, come before it.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from machine import machine
from peers import plain_network

import mnist_resnet9 as m
from support.cores import available_cores

SETTINGS = m.Settings(tag="epoch", epochs_max=1, augment=1.0, dropout=0.5, learning_rate=1e-3)


def train_ours(settings):
    seconds = []

    def use_cores(count):
        m.use_cores(count)
        seconds.append(-time.perf_counter())  # what comes next is the training

    machinery = m.Machinery(m.use_device, use_cores, m.gpu_engine)
    m.run(settings, scripts=(), machinery=machinery)
    return seconds[0] + time.perf_counter()


def train_torch(settings):
    import math

    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(available_cores())
    torch.manual_seed(settings.seed)
    data, folder, form = m.load_mnist(), Path(settings.save_dir), torch.channels_last
    images = torch.from_numpy(data.train_images.copy())
    labels = torch.from_numpy(data.train_labels.astype("int64"))
    test_images = torch.from_numpy(data.test_images.copy())
    test_labels = torch.from_numpy(data.test_labels.astype("int64"))
    net = plain_network(settings.channels).to(memory_format=form)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)

    def to_input(pixels):
        return ((pixels.float() / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[:, None]

    def augment(x):
        """(N, 1, 28, 28): turned ±12°, sheared, scaled and shifted ±2 pixels."""
        turn, shear, wide, high, down, right = (2 * torch.rand(6, len(x)) - 1) * settings.augment
        cos, sin = torch.cos(math.radians(12) * turn), torch.sin(math.radians(12) * turn)
        shear, wide, high = 0.15 * shear, 1 + 0.12 * wide, 1 + 0.12 * high
        x_row = torch.stack(
            [(shear * sin + cos) / wide, (shear * cos - sin) / wide, right * 2 / 14], 1
        )
        y_row = torch.stack([sin / high, cos / high, down * 2 / 14], 1)
        grid = F.affine_grid(torch.stack([x_row, y_row], 1), x.shape, align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def evaluate(images, labels):
        net.eval()
        with torch.inference_mode():
            inputs = map(to_input, images.split(100))
            parts = [net(x.contiguous(memory_format=form)) for x in inputs]
        logits = torch.cat(parts)
        net.train()
        loss = F.cross_entropy(logits, labels).item()
        return loss, (logits.argmax(1) == labels).double().mean().item(), logits.softmax(1)

    def end_epoch(epoch):
        train = evaluate(images[: m.TRAIN_EVALUATION_IMAGES], labels[: m.TRAIN_EVALUATION_IMAGES])
        test = evaluate(test_images, test_labels)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            print(epoch, *train[:2], *test[:2], file=log)
        np.savez(
            folder / "predictions.npz",
            labels=test_labels,
            predictions=test[2].argmax(1),
            probabilities=test[2],
        )
        states = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        for name in ("best", "last"):
            torch.save(states, folder / f"{name}.pt")

    start = time.perf_counter()
    end_epoch(0)
    for batch in torch.randperm(len(images)).split(settings.batch_size):
        x = augment(to_input(images[batch]))
        loss = F.cross_entropy(net(x.contiguous(memory_format=form)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    end_epoch(1)
    return time.perf_counter() - start


SIDES = {"ours": train_ours, "torch": train_torch}


def parser():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--runs", type=int, default=3, help="runs a side")
    p.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return p


def serve(side):
    """One of the processes that are compared: its last line is how long its training took."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = SIDES[side](replace(SETTINGS, save_dir=folder))
    print(f"\n{seconds}")


def main(arguments):
    o = parser().parse_args(arguments)
    if o.runs < 1:
        raise m.UserError(f"--runs is {o.runs}, but should be 1 or more")
    if not importlib.util.find_spec("torch"):
        raise m.UserError("PyTorch is missing; requirements-torch.txt says how to get it")
    print(machine())
    seconds = {side: [] for side in SIDES}
    for _ in range(o.runs):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, __file__, "--side", side],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds[side].append(float(done.stdout.splitlines()[-1]))
            print(f"{side:6s} {seconds[side][-1]:7.1f} s", flush=True)
    ours, torch = (statistics.median(seconds[side]) for side in SIDES)
    print(f"median: ours {ours:.1f} s, torch {torch:.1f} s; ours / torch {ours / torch:.2f}")
    return 0


if __name__ == "__main__":
    if "--side" in sys.argv:
        serve(parser().parse_args().side)
    else:
        sys.exit(m.main(sys.argv[1:], main))
