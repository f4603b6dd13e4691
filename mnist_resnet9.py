"""ResNet9, a residual network of nine layers, on MNIST. Every forward and backward pass is written
by hand on NumPy, or on CuPy, which is NumPy on an NVIDIA GPU.

    python mnist_resnet9.py                  train; the same command again continues a stopped run
    python mnist_resnet9.py --recipe quick --tag quick    three epochs, 99.64 % test accuracy
    python mnist_resnet9.py --help           every setting; each can also be edited below
    python mnist_resnet9.py --check          is every backward pass right? After any edit
    python plot_figs.py                      the run's curves and failures, while it trains or later
    python predict.py my_digit.png           what the network takes your own digit for

A network is a function with many adjustable numbers, its parameters. It turns an image into ten
scores (logits), one for each digit; the highest one is its answer. A few images at a time make a
batch; the loss is one number that says how wrong their scores are. Training does three things,
batch after batch:

    forward    compute the scores and the loss of the batch
    backward   compute the gradient: how the loss would change with each parameter
    update     change each parameter a little, against its gradient

These three are a step. The learning rate sets how far an update goes; the optimizer is its rule.
One pass over all training images is an epoch.

The network has nine layers with weights: eight 3×3 convolutions, four of them in two residual
blocks, and a linear layer. Each is explained at its function. layers(), below, lists what an
image passes through, one operation or block per line.

Letters, here and throughout: H, W rows and columns of the image, N images, C channels coming in, K
channels (or classes) going out, F features (the numbers of one image in a row), k the side of a
kernel (the k×k weights of a convolution). A channel is one of several numbers that each pixel has,
like the red, green and blue of a photograph. What goes from layer to layer is (H, W, N, C), at the
end (N, F) and (N, K). Rows and columns come first, so that shifts, windows and borders are slices
of the first two axes.

How to read it. Every operation is a pair of functions: `y, cache = op(x, …)`, and directly below it
`op_backward(dy, cache)`. dy is the gradient of the loss with respect to y and has y's shape; the
backward function turns it into dx, dw and db, the gradients with respect to what went in: the input
x, the weights w and the bias b, a number added to each output. The cache holds what the backward
function will need from the forward one. That is all of backpropagation: forward() calls the first
of each pair, in the order of the list, and backward() calls the second, in reverse.

A first reading needs Operations, Blocks, The network, One step of learning and Training, and, of
the optimizers, State, update() and adam_step(). It may skip Settings, Array module, Random numbers,
Cores and Main, and support/, which holds most of what is not learning: files, processes, speed.
"""

import functools
import math
import platform
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import numpy as np

if "__file__" in globals():  # `python - < mnist_resnet9.py` has none, and looks in this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out
if "support" in sys.modules and not hasattr(sys.modules["support"], "UserError"):
    raise ImportError(
        f"another module named support is loaded already ({sys.modules['support']}); "
        "rename it, or import mnist_resnet9 first"
    )

from support import ROOT, UserError, gpu, shapes, terminal, winograd
from support.bookkeeping import Bookkeeper
from support.check import check_network
from support.checkpoints import check_arrays, pack_checkpoint, read_checkpoint, read_weights
from support.cores import cores_to_use
from support.mnist import DataFiles, find_mnist, hashes_of, note_on_pixels
from support.proof import FastWays
from support.run_folder import RunFolder, remember
from support.settings import (
    Parser,
    check_folder_name,
    check_settings,
    project_path,
    settings_class,
)
from support.workers import (
    OneBlasThread,
    Workers,
    is_starting,
    on_the_terminal,
    prepare_process,
)

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


@settings_class
class Settings:
    """What defines a run. Edit the defaults here, or give flags: epochs_max is --epochs-max."""

    # the run and its data
    tag: str = "resnet9"  # name of the run; its files go to save/<tag>/
    seed: int = 0  # all random numbers follow from it: the same seed gives the same run
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto takes the GPU if CuPy can use one
    data_dir: str = "data"  # folder with MNIST (forms: data/README.md); downloaded to it if missing
    save_dir: str = "save"  # folder that holds one folder for each run
    train_images: int = 0  # train on only this many images, the first ones; 0 = all
    validation_images: int = 0  # hold out this many of them, the last ones, to choose settings by

    # how it learns
    epochs_max: int = 200  # passes over the training images
    batch_size: int = 64  # images in a step: fewer give more updates, more take less time each
    learning_rate: float = 1e-4  # how far an update goes; with one_cycle, at its peak
    optimizer: Literal["sgd", "adam", "muon"] = "adam"  # how a gradient becomes an update
    momentum: float = 0.9  # share of its last update that sgd keeps
    beta2: float = 0.999  # share of its mean squared gradient that adam or muon keeps in a step
    weight_decay: float = 0.0  # share of each weight that a step takes off, times the learning rate
    schedule: Literal["constant", "one_cycle"] = "constant"  # one_cycle: the rate rises, then falls
    warm_up: float = 0.3  # share of all steps in which one_cycle rises

    # the network, and how it is kept from learning by heart
    dropout: float = 0.9  # share of the features that a training step switches off
    pool: Literal["max", "avg"] = "max"  # what a pooling window passes on: its maximum or its mean
    channels: tuple = (4, 16, 32, 64)  # channels after conv1, conv2, conv5 and conv6
    label_smoothing: float = 0.0  # share of each label that is spread evenly over all ten classes
    augment: float = 0.0  # random turn, scale, shear and shift: 1 = ±12°, ±2 pixels; 0 = off
    elastic: float = 0.0  # random smooth bending, in pixels (standard deviation); 0 = off

    # evaluation, and the machine
    ema: float = 0.0  # evaluate a running mean of the weights that keeps this share a step; 0 = off
    threads: int = 0  # CPU cores to compute on, without influence on the result; 0 = all

    def __post_init__(self):
        check_settings(self, RANGES)
        check_folder_name(self.tag)
        if len(self.channels) != 4 or not all(
            type(c) is int and 1 <= c <= 1024 for c in self.channels
        ):
            raise UserError(
                f"channels {self.channels} should be four whole numbers from 1 to 1024, "
                "as 4,16,32,64"
            )


# The smallest and the largest value that makes sense.
RANGES = {
    "seed": (0, 2**63 - 1),
    "train_images": (0, 10**9),
    "validation_images": (0, 10**9),
    "epochs_max": (1, 10**6),
    "batch_size": (1, 10**6),
    "learning_rate": (0, 1000),
    "momentum": (0, 0.9999),
    "beta2": (0, 0.999999),
    "weight_decay": (0, 1000),
    "warm_up": (0, 0.9),
    "dropout": (0, 0.9999),
    "label_smoothing": (0, 0.99),
    "augment": (0, 10),
    "elastic": (0, 10),
    "ema": (0, 0.999999),
    "threads": (0, 256),
}

# What `--recipe NAME` changes before the other flags are applied. The values were chosen on
# training images that were held out: docs/history.md.
QUICK = dict(
    epochs_max=3,
    optimizer="muon",
    learning_rate=2e-3,
    schedule="one_cycle",
    warm_up=0.15,
    beta2=0.99,
    weight_decay=0.3,
    dropout=0.15,
    label_smoothing=0.05,
    augment=0.6,
    elastic=0.5,
    ema=0.99,
)
RECIPES = {
    "reference": {},
    # In a single epoch nothing is learnt by heart, so wide layers pay and dropout does not.
    "sprint": QUICK
    | dict(epochs_max=1, channels=(32, 32, 64, 128), dropout=0.0, augment=0.3, elastic=0.3),
    "quick": QUICK,
    "record": QUICK
    | dict(
        epochs_max=9, channels=(16, 16, 48, 96), learning_rate=1.5e-3, weight_decay=0.2, ema=0.995
    ),
}

# These say where, how and how long a run is computed, not what: a continued run may have others.
NOT_THE_EXPERIMENT = ("device", "data_dir", "save_dir", "epochs_max", "threads")


def parse_settings(arguments=(), kind=Settings, checks=False, **preset):
    """The settings of a command line: defaults, then preset, then the recipe, then the flags."""
    parser = Parser(description="Train ResNet9 on MNIST.")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="reference",
        help="a tried set of settings; flags come on top",
    )
    if checks:
        parser.add_argument(
            "--check", action="store_true", help="check all gradients in place of training"
        )
    given = parser.read_settings(kind, arguments)
    given.pop("check", None)
    name = given.pop("recipe")
    chosen = {**preset, **RECIPES[name], **given}
    known = [f.name for f in fields(kind)]
    for setting in RECIPES[name]:
        if setting not in known:
            raise UserError(f"recipe {name} sets {setting!r}; the settings are {', '.join(known)}")
    return kind(**chosen)


# ── Array module ──────────────────────────────────────────────────────────────────────────────────
# xp is NumPy or CuPy. Both have the same functions, so the network is written once for CPU and GPU.

xp = np


def use_device(device):
    """Points xp to CuPy or NumPy as `device` asks. Returns a line saying what was taken and why."""
    global xp
    xp = np
    if device == "cpu":
        return "CPU"
    try:
        import cupy

        if not cupy.is_available():
            raise RuntimeError("CuPy finds no CUDA device")
        a = cupy.arange(6, dtype=cupy.float32).reshape(2, 3)
        if float((a @ a.T + cupy.exp(-a).sum()).sum()) <= 0:  # elementwise, matrix product, sum
            raise RuntimeError("a first computation on the GPU gave a wrong result")
        xp = cupy
        number = cupy.cuda.Device().id
        return f"GPU, {cupy.cuda.runtime.getDeviceProperties(number)['name'].decode()}"
    except Exception as error:  # ImportError, or any of many ways for CUDA to be incomplete
        reason = gpu.with_remedy(gpu.root_cause(error))
        if device == "gpu":
            raise UserError(
                f"device gpu cannot be used: {reason}; --device cpu works everywhere"
            ) from None
        return f"CPU (no GPU: {reason})"


def to_host(a):
    """A NumPy array with the contents of a."""
    return a if isinstance(a, np.ndarray) else a.get()


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────

ORDER, STEP, INIT = 1, 2, 3  # what random numbers are for: each purpose has a stream of its own


def random_stream(seed, purpose, epoch=0, step=0):
    """A generator of random numbers that depends on its arguments alone.

    Philox, its algorithm, scrambles a key and a counter. Both are given here, so a continued run
    needs no saved generator and draws what it would have drawn. The draws count up in the zeros."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, epoch]))


def device_stream(key):
    """A generator for dropout and augmentation, on xp's device. It depends on the key alone."""
    if xp is not np:
        return gpu.Stream(gpu.cuda(), key)
    return np.random.Generator(np.random.Philox(key=key))


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────
# MNIST: 60,000 handwritten digits to train on and 10,000 others to test with, 28×28 pixels each.
# support/mnist.py finds, downloads and verifies the files.


@dataclass(frozen=True)
class Dataset:
    files: DataFiles  # what the arrays were read from
    train_images: Any  # (60000, 28, 28) uint8, pixels 0…255
    train_labels: Any  # (60000,) uint8, the digits 0…9
    test_images: Any  # (10000, 28, 28) uint8
    test_labels: Any  # (10000,) uint8

    @functools.cached_property
    def hashes(self):
        """File name → SHA-256 of the arrays, by which a continued run recognises its data.

        These are hashes of what is trained on, whatever files it was read from."""
        return hashes_of(vars(self))

    @property
    def name(self):
        """What figures and logs call it."""
        changed = self.hashes != self.files.hashes  # by whoever has edited load_mnist, say
        return f"{self.files.name}, changed" if changed else self.files.name

    @property
    def notes(self):
        """What the user should know about it."""
        return self.files.notes + note_on_pixels(self.train_images, PIXEL_MEAN, PIXEL_STD)

    def __repr__(self):
        arrays = {name: a for name, a in vars(self).items() if name.endswith(("images", "labels"))}
        return f"{self.name}:\n{shapes.listed(arrays)}"


def read_idx(content):
    """The array in the bytes of an idx file, MNIST's format: images (N, 28, 28) or labels (N,).

    First come two bytes of zero, a byte for the kind of number (8: uint8) and one for the number of
    axes; then the length of each axis in four bytes, most significant first (">u4"); then the
    numbers."""
    axes = content[3]
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load_mnist(data_dir="data"):
    """The data set in data_dir (relative to this script), downloaded first where it is missing."""
    files = find_mnist(data_dir)
    arrays = {role: read_idx(content) for role, content in files.contents.items()}
    return Dataset(files, **arrays)


# Mean and standard deviation of the pixels of MNIST's 60,000 training images, scaled to 0…1. A run
# on other data says in its log how far its own are from these.
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081


def to_input(images, dtype):
    """Pixels 0…255 (N, 28, 28) → the network's input (28, 28, N, 1), of mean 0 and variance 1.

    dtype, the kind of number in an array, is float32 in training and float64 in exact tests."""
    shapes.check_batch("to_input", images)
    x = images.astype(dtype) / 255
    x = (x - PIXEL_MEAN) / PIXEL_STD
    return x.transpose(1, 2, 0)[..., None]  # the last axis is the one channel


# ── Operations ────────────────────────────────────────────────────────────────────────────────────
# Each has its backward pass directly below it. All of them follow from the chain rule: dx[i] is the
# sum, over every y[j] that x[i] enters, of dy[j] · ∂y[j]/∂x[i]. The slope ∂y[j]/∂x[i] says how much
# y[j] changes for a small change of x[i]. docs/backward.md derives four of them, with numbers.
# Lines with shapes.check_… compute nothing: they say in words which array does not fit, and why.


def relu(x):
    """y = max(x, 0), element by element."""
    mask = x > 0
    return xp.maximum(x, 0), mask  # cache: where x > 0; the slope depends on nothing else


def relu_backward(dy, mask):
    """dx = dy where x > 0, and 0 elsewhere: the slope is 1 or 0."""
    return dy * mask


# The loss has two parts: softmax makes probabilities of the logits, and cross_entropy measures the
# probabilities against the labels. They stand here one by one to be understood. Training uses the
# two in one, cross_entropy_loss, below: it takes the logits, is more exact, and has a far simpler
# backward pass.


def softmax(x):
    """probs = exp(x) / Σ exp(x), row by row: (N, K) numbers → (N, K) probabilities."""
    # keepdims makes the maximum (N, 1), not (N,), so each row loses its own. That changes no
    # probability, and exp cannot overflow.
    shifted = x - x.max(axis=1, keepdims=True)
    e = xp.exp(shifted)
    probs = e / e.sum(axis=1, keepdims=True)
    return probs, probs


def softmax_backward(dprobs, probs):
    """dx = probs · (dprobs − Σ dprobs · probs), with the sum over the row.

    Each probability depends on every x: ∂probs_i/∂x_j = probs_i ([i = j] − probs_j), where [i = j]
    is 1 if i = j and 0 otherwise. So dx_j = Σ_i dprobs_i probs_i ([i = j] − probs_j)."""
    return probs * (dprobs - (dprobs * probs).sum(axis=1, keepdims=True))


def cross_entropy(probs, labels):
    """loss = −mean log probs[n, labels[n]]: probabilities (N, K), labels (N,) → a number.

    It is 0 when every label has probability 1, and grows without bound as the probability of one
    goes to 0."""
    shapes.check_labels("cross_entropy", probs, labels)
    N = len(labels)
    # Two arrays as indices pick one number for each n: probs[n, labels[n]].
    loss = -xp.log(probs[xp.arange(N), labels]).mean()
    return loss, (probs, labels)


def cross_entropy_backward(dloss, cache):
    """dprobs = −dloss / (N · probs) at the label, 0 elsewhere.

    dloss, the gradient of the loss with respect to itself, is 1 where the loss ends the chain."""
    probs, labels = cache
    N = len(labels)
    at_label = (xp.arange(N), labels)
    dprobs = xp.zeros_like(probs)
    dprobs[at_label] = -dloss / (N * probs[at_label])  # 1/N comes from the mean
    return dprobs


def cross_entropy_loss(logits, labels, smoothing=0):
    """loss = −mean Σ target · log softmax(logits), with the sum over the row: logits (N, K), labels
    (N,) → a number.

    target is what the probabilities should be: 1 at the label and 0 elsewhere. With smoothing, each
    class gets smoothing / K and the label 1 − smoothing more, so that logits need not grow for ever
    (Szegedy et al. 2016). With logarithms throughout, the loss stays exact where a probability is
    too small for a float."""
    shapes.check_labels("cross_entropy_loss", logits, labels)
    N, K = logits.shape
    # log softmax(x) = x − log Σ exp(x). The maximum of the row is subtracted as in softmax.
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))  # (N, K)
    target = xp.full((N, K), smoothing / K, logits.dtype)
    target[xp.arange(N), labels] += 1 - smoothing
    loss = -(target * log_probs).sum(axis=1).mean()
    return loss, (log_probs, target)


def cross_entropy_loss_backward(dloss, cache):
    """dlogits = (probs − target) · dloss / N.

    log_probs = logits − log Σ exp(logits), and d(log Σ exp(logits))/dlogits = probs. A row of
    target adds up to 1, so Σ target · log_probs has the slope target − probs."""
    log_probs, target = cache
    N = len(target)
    return (xp.exp(log_probs) - target) * (dloss / N)  # 1/N enters here, from the mean


def dropout(x, rate, rng):
    """Switches each feature off with probability `rate`, so that none is relied on too much.

    The others are multiplied by 1/(1 − rate), so that y is x on average. rng is a generator of
    random numbers; without one, as in evaluation, y = x. Srivastava et al. 2014 ("inverted")."""
    shapes.check_dropout(x, rate)
    if rng is None or rate == 0:
        return x, None
    kept = rng.random(x.shape, dtype=xp.float32) >= rate
    mask = kept * x.dtype.type(1 / (1 - rate))  # in the dtype of x, so y has it too
    return x * mask, mask  # cache: which features stayed on, and their factor


def dropout_backward(dy, mask):
    """From y = x · mask: dx = dy · mask."""
    return dy if mask is None else dy * mask


def linear(x, w, b):
    """y = x @ w + b: (N, F) @ (F, K) + (K,)."""
    shapes.check_linear(x, w, b)
    return x @ w + b, (x, w)  # cache: the slope of x @ w is w for x, and x for w


def linear_backward(dy, cache):
    """From y = x @ w + b: dx = dy wᵀ, dw = xᵀ dy, db = Σ dy.

    Number by number, y[n, k] = Σ_f x[n, f] w[f, k] + b[k]. So x[n, f] enters y[n, k] with the slope
    w[f, k], for every k, and dx[n, f] = Σ_k dy[n, k] w[f, k], which is dy wᵀ. Likewise dw[f, k] is
    the sum over n."""
    x, w = cache
    dx = dy @ w.T  # (N, F)
    dw = x.T @ dy  # (F, K), the sum over the images
    db = dy.sum(axis=0)  # (K,)
    return dx, dw, db


def flatten(x):
    """Every image as one row of features: (H, W, N, C) → (N, H·W·C)."""
    shapes.check_images("flatten", x)
    H, W, N, C = x.shape
    return x.transpose(2, 0, 1, 3).reshape(N, H * W * C), x.shape


def flatten_backward(dy, shape):
    """The same numbers in x's shape."""
    H, W, N, C = shape
    return dy.reshape(N, H, W, C).transpose(1, 2, 0, 3)


# Pooling makes the image smaller: of each window of pixels, one number a channel goes on.


def cut_into_windows(x, size):
    """The size×size windows of x: (H, W, N, C) → (H/size, size, W/size, size, N, C).

    The rows' axis splits in two: which window, and which row of it. So does the columns' axis. The
    result is a view: an array that shares its memory with x, so nothing is copied. A last row or
    column that fills no window is left out."""
    H, W, N, C = x.shape
    down, across = H // size, W // size
    return x[: down * size, : across * size].reshape(down, size, across, size, N, C)


def join_windows(windows, shape):
    """The reverse of cut_into_windows(): an array of this shape. Pixels in no window are 0."""
    down, size, across, _, N, C = windows.shape
    covered = windows.reshape(down * size, across * size, N, C)
    if covered.shape == shape:
        return covered
    x = xp.zeros(shape, windows.dtype)
    x[: down * size, : across * size] = covered
    return x


def avg_pool2d(x, size=2):
    """y = mean of each size×size window: (H, W, N, C) → (H/size, W/size, N, C)."""
    shapes.check_images("avg_pool2d", x, size)
    return cut_into_windows(x, size).mean(axis=(1, 3)), (x.shape, size)


def avg_pool2d_backward(dy, cache):
    """dx = dy / size²: every pixel of a window has that slope."""
    shape, size = cache  # a mean is linear, so no value of x was kept
    down, across, N, C = dy.shape
    each = (dy / size**2)[:, None, :, None]  # (H/size, 1, W/size, 1, N, C): one number a window
    return join_windows(xp.broadcast_to(each, (down, size, across, size, N, C)), shape)


def max_pool2d(x, size=2):
    """y = maximum of each size×size window: (H, W, N, C) → (H/size, W/size, N, C).

    The cache is a mask of every position that equals the maximum, up to rounding. Where two or more
    do, there is no slope, and a rule has to take its place: here each of them gets the whole dy.
    (PyTorch gives it to one of them.)"""
    shapes.check_images("max_pool2d", x, size)
    v = cut_into_windows(x, size)
    y = v.max(axis=(1, 3))
    # Pixels with equal surroundings (background) should tie. But their sums were taken in different
    # orders, which rounds differently, so equal means equal up to rounding.
    rounding = 1e-5 if x.dtype == xp.float32 else 1e-12
    lowest = y - rounding * (1 + abs(y))  # a share of y alone would allow nothing where y is 0
    mask = v >= lowest[:, None, :, None]
    return y, (mask, x.shape)


def max_pool2d_backward(dy, cache):
    """dx = dy at every maximum of the window, and 0 elsewhere."""
    mask, shape = cache
    return join_windows(dy[:, None, :, None] * mask, shape)


# A convolution slides a k×k kernel of weights over the image, one pixel at a time. Each output is a
# weighted sum of the k×k pixels around its place, over all their channels. Beyond the border there
# are zeros, so y has as many rows and columns as x:
#
#     y[row, col] = b + Σ x[row + i − r, col + j − r] @ w[i, j]
#
# The sum is over i, j = 0 … k − 1, and r = (k − 1) / 2. x is (H, W, N, C), the weights w are
# (k, k, C, K) with k odd, y is (H, W, N, K). So x[row, col] is (N, C) and w[i, j] is (C, K), and
# each term of the sum is (N, K).


def surroundings(x, k):
    """The k×k pixels around each pixel, a row for each: (H, W, N, C) → (H·W·N, k·k·C)."""
    H, W, N, C = x.shape
    r = k // 2
    padded = xp.zeros((H + 2 * r, W + 2 * r, N, C), x.dtype)
    padded[r : r + H, r : r + W] = x
    # All windows, as a view: (H, W, N, C, k, k). reshape, below, copies it. To build the transpose
    # and turn it with .T takes a CPU a third of the time.
    view = xp.lib.stride_tricks.sliding_window_view(padded, (k, k), (0, 1))
    return view.transpose(4, 5, 3, 0, 1, 2).reshape(k * k * C, H * W * N).T


def conv2d(x, w, b):
    """The convolution above: (H, W, N, C) → (H, W, N, K), as one matrix product."""
    shapes.check_conv2d(x, w, b)
    # In training and evaluation on a CPU, all 3×3 convolutions but conv1 return here:
    # support/winograd.py computes the same, up to rounding, but faster. With
    # winograd.MIN_CHANNELS = 10**9 the lines below compute them all.
    if winograd.is_faster(w):
        return winograd.conv2d(x, w, b)
    H, W, N, C = x.shape
    k, _, _, K = w.shape
    cols = surroundings(x, k)  # (H·W·N, k·k·C)
    y = cols @ w.reshape(k * k * C, K) + b  # (H·W·N, K)
    return y.reshape(H, W, N, K), (cols, w)  # cache: as in linear


def conv2d_backward(dy, cache, need_dx=True):
    """dw = colsᵀ dy, db = Σ dy, and dx is a convolution too: of dy, with the kernel turned round.

    x[row, col] enters y[row − i + r, col − j + r] with the weights w[i, j]. So a pixel collects dy
    from all around itself, with the kernel turned by 180° and its channels swapped. The first layer
    of a network takes need_dx=False: images are not learnt, so nobody needs their gradient."""
    if isinstance(cache, winograd.Cache):
        return winograd.conv2d_backward(dy, cache, need_dx)
    cols, w = cache
    H, W, N, K = dy.shape
    k, _, C, _ = w.shape
    dy_rows = dy.reshape(H * W * N, K)
    dw = (cols.T @ dy_rows).reshape(k, k, C, K)
    db = xp.ones(H * W * N, dy.dtype) @ dy_rows  # Σ dy; sum() would take ten times as long
    if not need_dx:
        return None, dw, db
    turned = w[::-1, ::-1].swapaxes(2, 3)  # (k, k, K, C)
    dx = surroundings(dy, k) @ turned.reshape(k * k * K, C)  # (H·W·N, C)
    return dx.reshape(H, W, N, C), dw, db


# ── Blocks ────────────────────────────────────────────────────────────────────────────────────────


def conv_block(x, w, b):
    """y = relu(convolution): (H, W, N, C) → (H, W, N, K)."""
    h, conv_cache = conv2d(x, w, b)
    y, relu_cache = relu(h)
    return y, (conv_cache, relu_cache)


def conv_block_backward(dy, cache, need_dx=True):
    """dx, dw, db: first back through relu, then through the convolution."""
    conv_cache, relu_cache = cache
    dh = relu_backward(dy, relu_cache)
    return conv2d_backward(dh, conv_cache, need_dx)


def residual_block(x, w1, b1, w2, b2):
    """relu(x + conv(relu(conv(x)))): two convolutions learn only what to add to x, the residual.

    The gradient also goes straight past them, through the sum, and so reaches the earlier layers
    undiminished. He et al. 2015, arXiv:1512.03385."""
    h, block_cache = conv_block(x, w1, b1)
    h, conv_cache = conv2d(h, w2, b2)
    shapes.check_sum(x, h)
    h += x  # in place: nobody else needs what conv2d has put out
    y, relu_cache = relu(h)
    return y, (block_cache, conv_cache, relu_cache)


def residual_block_backward(dy, cache):
    """dx, dw1, db1, dw2, db2. x took two paths, so the gradients of both paths add."""
    block_cache, conv_cache, relu_cache = cache
    dsum = relu_backward(dy, relu_cache)  # the gradient of x + h, which x and h each get unchanged
    dh, dw2, db2 = conv2d_backward(dsum, conv_cache)
    dx, dw1, db1 = conv_block_backward(dh, block_cache)  # through the two convolutions
    dx += dsum  # and past them
    return dx, dw1, db1, dw2, db2


# ── The network ───────────────────────────────────────────────────────────────────────────────────


class Parameters(dict):
    """name → array. Each array is a view of one flat vector, `.flat`.

    So an update of all parameters is a few operations on one array."""

    def __init__(self, arrays):
        """A copy of the arrays {name: array}."""
        self.share_out(xp.concatenate([a.reshape(-1) for a in arrays.values()]), arrays)

    @classmethod
    def of_flat(cls, flat, arrays):
        """The parts of a flat vector, by the names and in the shapes of these arrays."""
        params = cls.__new__(cls)  # a new object without __init__, which would copy
        params.share_out(flat, arrays)
        return params

    def share_out(self, flat, arrays):
        """Gives each name its stretch of flat, as a view: whoever changes one changes both."""
        self.flat = flat
        start = 0
        for name, a in arrays.items():
            self[name] = flat[start : start + a.size].reshape(a.shape)
            start += a.size

    def __repr__(self):
        return f"Parameters, {self.flat.size:,} numbers:\n{shapes.listed(self)}"


class Layer(NamedTuple):
    """A line of the network: y, cache = op(x, *its parameters), and the op's backward pass."""

    name: str
    op: Callable
    # op_backward(dy, cache) returns dx; with parameters, dx and then the gradient of each.
    op_backward: Callable
    params: tuple = ()  # the names of its parameters
    start: Callable = lambda rng: ()  # a function: start(rng) gives their first values; here none


def layers(settings, rng=None):
    """The network, from the image to the logits. To change it, change this list.

    rng switches dropout on, for training. The shapes are those of the default channels."""
    c1, c2, c3, c4 = settings.channels
    return [
        # (28, 28, N, 1), the images
        conv("conv1", 1, c1, need_dx=False),  # (28, 28, N, 4)
        conv("conv2", c1, c2),  # (28, 28, N, 16)
        residual("conv3", "conv4", c2),  # (28, 28, N, 16)
        pool("pool4", settings),  # (14, 14, N, 16)
        conv("conv5", c2, c3),  # (14, 14, N, 32)
        conv("conv6", c3, c4),  # (14, 14, N, 64)
        residual("conv7", "conv8", c4),  # (14, 14, N, 64)
        pool("pool8", settings),  # (7, 7, N, 64)
        flat("features"),  # (N, 3136)
        drop("dropout", settings, rng),  # (N, 3136)
        fully_connected("fc9", 7 * 7 * c4, 10),  # (N, 10), the logits
    ]


def conv(name, C, K, k=3, need_dx=True):
    """A k×k convolution and relu: from C channels to K."""

    def start(rng):
        # he(), below, draws the weights. The biases start a little above 0: where all pixels under
        # a kernel are 0, relu gets the bias alone, and its slope is then 1.
        return he(rng, (k, k, C, K)), np.full(K, 0.01)

    # conv_block_backward with need_dx filled in, so that it takes (dy, cache) as all others do.
    back = functools.partial(conv_block_backward, need_dx=need_dx)
    return Layer(name, conv_block, back, (f"{name}.weight", f"{name}.bias"), start)


def residual(first, second, C):
    """A residual block of two 3×3 convolutions with these names: from C channels to C."""

    def start(rng):
        # The two convolutions together start small, so that at first the block hardly changes its
        # input: the second has weights of half size. (Each draws from rng, so their order counts.)
        w1, w2 = he(rng, (3, 3, C, C)), he(rng, (3, 3, C, C), scale=0.5)
        return w1, np.full(C, 0.01), w2, np.full(C, 0.01)

    # conv3.weight, conv3.bias, conv4.weight, conv4.bias, say. The layer is named after the second.
    params = [f"{name}.{part}" for name in (first, second) for part in ("weight", "bias")]
    return Layer(second, residual_block, residual_block_backward, tuple(params), start)


def fully_connected(name, F, K, scale=0.1):
    """A linear layer: from F features to K.

    The last one starts small, so the first probabilities are near 1/10 and the first loss near
    −ln(1/10) = 2.3."""

    def start(rng):
        return he(rng, (F, K), scale), np.zeros(K)

    return Layer(name, linear, linear_backward, (f"{name}.weight", f"{name}.bias"), start)


def pool(name, settings):
    """Of each 2×2 window the largest number, or the mean."""
    pairs = {
        "max": (max_pool2d, max_pool2d_backward),
        "avg": (avg_pool2d, avg_pool2d_backward),
    }
    return Layer(name, *pairs[settings.pool])


def flat(name):
    """Every image as one row of features."""
    return Layer(name, flatten, flatten_backward)


def drop(name, settings, rng):
    """Dropout, where there is an rng."""
    return Layer(name, lambda x: dropout(x, settings.dropout, rng), dropout_backward)


def he(rng, shape, scale=1):
    """Random weights with variance scale² · 2 / (numbers that an output is summed from).

    Without the 2, an output would vary as much as what it is summed from. relu sets half of it to
    0, which halves the mean square; the 2 makes up for that. So the numbers neither grow nor shrink
    from layer to layer: He's initialisation, arXiv:1502.01852."""
    return rng.standard_normal(shape) * scale * math.sqrt(2 / math.prod(shape[:-1]))


# Where a function below takes a network, that is layers() or another function like it; net is the
# list that it returns.


def init_params(settings, dtype=np.float32, network=None):
    """The first Parameters, random but for the biases. They depend on settings.seed alone."""
    rng = random_stream(settings.seed, INIT)
    arrays = {}
    for layer in (network or layers)(settings):
        values = layer.start(rng)
        if not isinstance(values, (tuple, list)) or len(values) != len(layer.params):
            raise UserError(
                f"{layer.name} has the parameters {', '.join(layer.params)}: its start(rng) should "
                "give a tuple with an array for each"
            )
        for name, a in zip(layer.params, values):
            if name in arrays:
                raise UserError(f"there are two parameters {name}: give each a name of its own")
            arrays[name] = a
    return Parameters({name: xp.asarray(a, dtype) for name, a in arrays.items()})


def dtype_of(params):
    return next(iter(params.values())).dtype


def forward(net, params, x):
    """x (28, 28, N, 1) → logits (N, 10), and the cache of every layer of net, a list of them."""
    caches = []
    for layer in net:
        # Its parameters, by name, become arguments. Its y is the x of the next layer.
        x, cache = layer.op(x, *[params[name] for name in layer.params])
        caches.append(cache)
    return x, caches  # x is now what the last layer put out: the logits


def backward(net, dlogits, caches):
    """dlogits (N, 10) → {name: gradient}. The same layers, from the last to the first."""
    gradients, dy = {}, dlogits
    # dx of a layer is dy of the one before it.
    for layer, cache in zip(reversed(net), reversed(caches)):
        if dy is None:
            raise UserError(
                f"{layer.name} gets no gradient: the layer after it returns no dx "
                "(need_dx=False, or a return is missing)"
            )
        given = layer.op_backward(dy, cache)
        given = given if isinstance(given, tuple) else (given,)
        if len(given) != 1 + len(layer.params):
            raise UserError(
                f"the backward pass of {layer.name} gives {len(given)} arrays, not dx and "
                f"gradients of {len(layer.params)} parameters"
            )
        # The first is dx; * collects the rest, one for each parameter.
        dy, *of_params = given
        gradients.update(zip(layer.params, of_params))
    return gradients


def check_gradients(gradients, params):
    """UserError if any has another shape or dtype than its parameter, or is missing.

    The update takes all of them as one vector, in which a transposed one would not be noticed."""
    for name in {**params, **gradients}:
        found, wanted = gradients.get(name), params.get(name)
        if wanted is None:
            raise UserError(f"backward gives a gradient of {name}, which is not a parameter")
        if found is None:
            raise UserError(f"backward gives no gradient of {name}")
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise UserError(
                f"{name} is {wanted.dtype} {wanted.shape}, "
                f"but its gradient is {found.dtype} {found.shape}"
            )


# ── Optimizer and schedule ────────────────────────────────────────────────────────────────────────


@dataclass
class State:
    """All that training changes: what a checkpoint holds."""

    params: Parameters
    moments: Any  # the optimizer's memory: a row of velocities for sgd; adam, muon: two rows, means
    ema: Any  # running mean of the parameters, or None
    step: int = 0  # steps done
    # A row {column: number} for each epoch, the first one for epoch 0: before any training.
    history: list = field(default_factory=list)

    def views(self):
        """name → array: all that a checkpoint holds in the parameters' dtype."""
        ema = {f"ema.{name}": a for name, a in (self.ema or {}).items()}
        return {**self.params, **ema, "moments": self.moments}

    def __repr__(self):
        epochs = f"{max(0, len(self.history) - 1)} epochs"
        return f"State after {self.step:,} steps, {epochs}:\n{shapes.listed(self.views())}"

    def is_finite(self):
        return all(bool(xp.isfinite(a).all()) for a in self.views().values())

    def to_evaluate(self):
        """The parameters to evaluate with: the mean ones, if there is a mean."""
        return self.ema if self.ema is not None else self.params


def init_state(settings, network=None):
    """The State before the first step: fresh parameters, moments 0."""
    params = init_params(settings, network=network)
    rows = 1 if settings.optimizer == "sgd" else 2
    moments = xp.zeros((rows, params.flat.size), params.flat.dtype)
    return State(params, moments, Parameters(params) if settings.ema else None)


def update(state, gradients, settings, rate):
    """The update. gradients are Parameters, rate is this step's learning rate.

    It changes the arrays in place: w -= … writes into w, where w = w − … would make a new array."""
    optimizers = {"sgd": sgd, "adam": adam, "muon": muon}
    decay_weights(state.params, settings, rate)
    optimizers[settings.optimizer](state, gradients, settings, rate)
    if state.ema is not None:
        # An exponential moving average: it evens out the zigzag of the last steps.
        takes = 1 - ema_keeps(settings, state.step)
        state.ema.flat += takes * (state.params.flat - state.ema.flat)
    state.step += 1


def sgd(state, gradients, settings, rate):
    """velocity ← momentum · velocity + dw,  w ← w − rate · velocity.

    Stochastic gradient descent: each gradient is that of a random batch. The velocity carries on in
    the direction of the last steps, as a rolling ball does: what changes from batch to batch
    cancels, what stays adds up."""
    velocity, w = state.moments[0], state.params.flat
    velocity *= settings.momentum
    velocity += gradients.flat
    w -= rate * velocity


def adam(state, gradients, settings, rate):
    """adam_step() for all parameters at once."""
    w, dw, (mean, square) = state.params.flat, gradients.flat, state.moments
    adam_step(w, dw, mean, square, state.step, settings, rate)


def adam_step(w, dw, mean, square, step, settings, rate):
    """w ← w − rate · mean / (√square + eps): running means of dw and of dw², corrected as below.

    In each step mean keeps the share beta1 of itself and takes the rest from dw; square does so
    with beta2 and dw². Dividing by √square, the usual size of a gradient, gives all parameters
    steps of about the same size. Both start at 0, so after t steps the shares of all gradients add
    up to only 1 − beta^t, and dividing by that makes up for it. eps keeps the divisor from being 0.
    Kingma and Ba 2015, arXiv:1412.6980."""
    beta1, beta2, eps = beta1_of(settings), settings.beta2, 1e-8
    mean += (1 - beta1) * (dw - mean)
    square += (1 - beta2) * (dw * dw - square)
    mean_share, square_share = corrections(step, beta1, beta2)
    w -= (rate / mean_share) * mean / (xp.sqrt(square / square_share) + eps)


def beta1_of(settings):
    """The share of its mean gradient that adam or muon keeps in a step."""
    return 0.95 if settings.optimizer == "muon" else 0.9


def corrections(step, beta1, beta2):
    """1 − beta^t for adam's two means: the share of each that comes from gradients, not from 0."""
    t = step + 1
    return 1 - beta1**t, 1 - beta2**t


def takes_muon(name, w):
    """Whether muon updates this parameter its own way: the weights of every convolution but conv1,
    which has the image itself for its input."""
    return w.ndim == 4 and name != "conv1.weight"


def muon(state, gradients, settings, rate):
    """Adam for the biases, conv1 and fc9; for the weights of the other convolutions

        w ← w − rate · 0.2 √(longer side of the matrix) · orthogonal(mean of dw)

    A gradient, taken as a matrix, is large in a few directions and small in the rest: see
    orthogonal(). Adam evens out the steps of single numbers, muon those of whole directions, so
    that weak directions are learnt too. The factor makes a step about as long as Adam's: Liu and
    others 2025, arXiv:2502.16982."""
    params, beta1 = state.params, beta1_of(settings)
    means, squares = (Parameters.of_flat(row, params) for row in state.moments)
    for name, w in params.items():
        dw, mean = gradients[name], means[name]
        if not takes_muon(name, w):
            adam_step(w, dw, mean, squares[name], state.step, settings, rate)
            continue
        mean += (1 - beta1) * (dw - mean)
        # What the mean would be after another such gradient: Nesterov's look ahead. How large it is
        # does not matter here, so it needs no 1 − beta^t.
        ahead = (1 - beta1) * dw + beta1 * mean
        matrix = ahead.reshape(-1, w.shape[3])  # (3, 3, C, K) → (9C, K)
        length = 0.2 * math.sqrt(max(matrix.shape))
        w -= rate * length * orthogonal(matrix).reshape(w.shape)


def orthogonal(x):
    """About U Vᵀ, where U S Vᵀ is the singular value decomposition of the matrix x.

    Every matrix turns what it is multiplied with (Vᵀ), stretches it along each axis (by S, the
    singular values) and turns it again (U). U Vᵀ turns in the same way and stretches nothing. No
    decomposition is needed: each round takes every singular value s to
    3.4445 s − 4.775 s³ + 2.0315 s⁵ and leaves U and V alone. Five rounds bring what lies between
    0.01 and 1 to between 0.68 and 1.14. Jordan and others 2024,
    kellerjordan.github.io/posts/muon."""
    x = x / ((x * x).sum() ** 0.5 + 1e-7)  # so no singular value is above 1
    for _ in range(5):
        gram = x.T @ x  # (K, K) = V S² Vᵀ; so x @ gram = U S³ Vᵀ, and x @ gram @ gram = U S⁵ Vᵀ
        x = 3.4445 * x + x @ (-4.775 * gram + 2.0315 * (gram @ gram))
    return x


def rate_of_step(step, steps, settings):
    """The learning rate of step 0, 1, … steps − 1."""
    schedules = {"constant": constant, "one_cycle": one_cycle}
    return schedules[settings.schedule](settings.learning_rate, step, steps, settings)


def constant(peak, step, steps, settings):
    return peak


def one_cycle(peak, step, steps, settings):
    """Rises in a straight line, since long steps do harm while the weights are random, and falls
    along half a cosine wave to 0, since short steps settle what was learnt."""
    rise = settings.warm_up * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def decay_weights(params, settings, rate):
    """Shrinks the weights, not the biases, a little, so that none grows without a reason.

    This is done apart from the gradient. Added to dw, it would be divided by the usual size of dw
    in adam, and weights with large gradients would hardly shrink. Decoupled weight decay:
    Loshchilov and Hutter 2019, arXiv:1711.05101."""
    if settings.weight_decay:
        for name, weight in params.items():
            if name.endswith("weight"):
                weight *= decay_keeps(rate, settings)


def decay_keeps(rate, settings):
    """The share of themselves that decaying weights keep in a step."""
    return 1 - rate * settings.weight_decay


def ema_keeps(settings, step):
    """The share that the running mean of the weights keeps in this step.

    A mean that keeps the share s reaches back over about 1 / (1 − s) steps. The first weights are
    soon worth little. So at first it reaches back over only (10 + step) / 9 steps, about a ninth of
    those done."""
    return min(settings.ema, (1 + step) / (10 + step))


# ── Augmentation ──────────────────────────────────────────────────────────────────────────────────
# A digit that is turned, shifted or bent a little is still the same digit. So each time an image
# is learnt from, it can be changed at random, and the network hardly ever sees one twice.


def augment(images, strength, rng, elastic=0):
    """Changes every image at random: (N, 28, 28) → the same shape in float32, pixels 0…255.

    Each pixel of the result looks up where in the image it came from:
    source = matrix @ (pixel − centre) + centre + shift + bend."""
    shapes.check_batch("augment", images)
    N, H, W = images.shape
    matrices, shifts = random_matrices(N, strength, rng)
    # Here y and x are the row and the column of every pixel, counted from the centre: (H·W,).
    y, x = xp.meshgrid(xp.arange(H) - (H - 1) / 2, xp.arange(W) - (W - 1) / 2, indexing="ij")
    y, x = y.ravel().astype(xp.float32), x.ravel().astype(xp.float32)
    a, b, c, d = matrices[:, :, None]  # (N, 1) each
    row = a * y + b * x + (shifts[0] + (H - 1) / 2)[:, None]  # (N, H·W)
    col = c * y + d * x + (shifts[1] + (W - 1) / 2)[:, None]
    if elastic:
        row += random_bend(N, H, W, elastic, rng)
        col += random_bend(N, H, W, elastic, rng)
    return pixels_at(images, row, col)


def random_matrices(N, strength, rng):
    """2×2 matrices that turn, scale and shear, as four numbers each, (4, N), and shifts (2, N).

    A matrix, for (row, column), is

        [1/high     0  ]   [  1    0]   [ cos  sin]
        [   0    1/wide] @ [shear  1] @ [−sin  cos]

    It divides because it says where a pixel came from: in a digit twice as high, two pixels down
    are one in the image."""
    r = strength * (2 * rng.random((6, N), dtype=xp.float32) - 1)  # uniform in ±strength
    turn = math.radians(12) * r[0]
    shear = 0.15 * r[1]
    wide = 1 + 0.12 * r[2]
    high = 1 + 0.12 * r[3]
    cos, sin = xp.cos(turn), xp.sin(turn)
    matrices = [cos / high, sin / high, (shear * cos - sin) / wide, (shear * sin + cos) / wide]
    return xp.stack(matrices), 2 * r[4:]


BEND_PIXELS = 4  # over about this distance neighbouring pixels move together


@functools.lru_cache(maxsize=None)
def bumps(H, W, xp):  # xp is an argument so that each array module gets a result of its own
    """(J, H·W): J smooth round bumps, each an image, with their centres on a grid.

    Their sum with J random weights is a smooth random image. At each pixel the squares of the bumps
    add up to 1. So if the weights are independent, with mean 0 and variance 1, so is the pixel."""
    bells = []
    for L in (H, W):
        count = round(L / (BEND_PIXELS * math.sqrt(2))) + 1  # so close that no gaps show
        centres = np.linspace(0, L - 1, count)[:, None]
        bells.append(np.exp(-((np.arange(L) - centres) ** 2) / (2 * BEND_PIXELS**2)))  # (count, L)
    both = np.kron(*bells)  # (J, H·W): each bell down times each bell across
    return xp.asarray(both / np.sqrt((both**2).sum(axis=0)), np.float32)


def random_bend(N, H, W, size, rng):
    """How far each pixel moves along one axis, (N, H·W): smoothly, with standard deviation `size`.

    Like ink on rubber, strokes stay connected. Simard, Steinkraus and Platt 2003."""
    smooth = bumps(H, W, xp)  # (J, H·W)
    return size * (rng.standard_normal((N, len(smooth)), dtype=xp.float32) @ smooth)


def pixels_at(images, row, col):
    """The images' values at the points (row, col), both (N, H·W), which lie between the pixels.

    A value is the mean of the four pixels around the point, weighted by nearness (bilinear
    interpolation). Outside the image all is 0."""
    N, H, W = images.shape
    row, col = xp.clip(row, -1, H), xp.clip(col, -1, W)  # all that lies outside meets the border
    # A border of zeros: 1 pixel before, for row −1, and 2 after, for row H and the one below it.
    padded = xp.zeros((N, H + 3, W + 3), xp.float32)
    padded[:, 1 : H + 1, 1 : W + 1] = images
    top, left = xp.floor(row), xp.floor(col)
    down, right = row - top, col - left  # how far below and to the right of pixel (top, left)
    pixels = padded.ravel()
    # Where in pixels each image starts, the row of the upper two of the four pixels, and the upper
    # left one of them.
    image_start = xp.arange(N)[:, None] * ((H + 3) * (W + 3))
    row_start = image_start + (top.astype(xp.int32) + 1) * (W + 3)
    corner = row_start + left.astype(xp.int32) + 1
    upper = pixels[corner] * (1 - right) + pixels[corner + 1] * right
    lower = pixels[corner + W + 3] * (1 - right) + pixels[corner + W + 4] * right
    return (upper * (1 - down) + lower * down).reshape(N, H, W)


# ── Cores ─────────────────────────────────────────────────────────────────────────────────────────
# Nothing in the network mixes images, so a batch's gradient is the mean of its images' gradients. A
# batch is cut into shards, each core takes some of them, and their results are added in the order
# of the shards. A shard's size is fixed, so the result has the same bits on one core or sixteen.
# support/workers.py has the processes that compute beside this one.

# With 16, a step would take a tenth less time on one or two cores, and far more on eight: a
# batch of 64 would be only four shards.
SHARD_IMAGES = 8
PREDICT_SHARD_IMAGES = 32  # without a backward pass less is kept, so more fits

workers = Workers(0)  # none, until use_cores() asks for some


def use_cores(count):
    """Spreads the shards from now on over `count` processes, this one included.

    A GPU needs no more than this one."""
    if not isinstance(count, (int, np.integer)) or count < 1:
        raise UserError(f"use_cores: {count!r} should be a whole number of at least 1")
    workers.use(count - 1 if xp is np else 0, [gradients_of_shards, logits_of_shards])


def most_cores(settings):
    """For how many cores a step or an evaluation has work: a shard each."""
    step = math.ceil(settings.batch_size / SHARD_IMAGES)
    evaluation = math.ceil(PREDICT_IMAGES / PREDICT_SHARD_IMAGES)
    return max(step, evaluation)


def shards_of(N, size):
    """[(number, slice)]: the shards, of at most `size` images, that N images are cut into."""
    starts = range(0, N, size)
    return list(enumerate(slice(start, min(start + size, N)) for start in starts))


def over_cores(work, shards):
    """work(shards), a list with one result for each shard; each core does a part of it."""
    cores = min(1 + workers.count, len(shards))
    bounds = [i * len(shards) // cores for i in range(cores + 1)]
    parts = workers.map(work, [shards[start:stop] for start, stop in zip(bounds, bounds[1:])])
    return [result for part in parts for result in part]


def gradients_of_shards(params, images, labels, settings, keys, network, fast, shards):
    """[(loss, gradient of all parameters as one vector)]: what each shard adds to the batch's."""
    prepared = winograd.prepare(params) if fast else params  # once for all shards
    results = []
    for i, shard in shards:
        rng = device_stream(keys[i]) if keys is not None else None
        part, part_labels = images[shard], labels[shard]
        loss, gradients = learn_from(prepared, part, part_labels, settings, rng, network)
        flat = xp.concatenate([gradients[name].reshape(-1) for name in params])
        share = len(part) / len(images)  # the batch's mean, from the means of its shards
        flat *= share
        results.append((loss * share, flat))
    return results


# At most this many shards are computed before their gradients are added. Each gradient is as large
# as all parameters: thousands of images at once would fill the memory.
SHARDS_AT_ONCE = 64


def loss_and_gradients(params, images, labels, settings, rng=None, network=None):
    """learn_from() on all cores: (mean loss, {name: gradient}) of a batch.

    images are (N, 28, 28) pixels 0…255, labels (N,) digits. rng, any NumPy generator, turns dropout
    and augmentation on. All is in the dtype of params."""
    images = xp.asarray(shapes.images_of(images))
    labels = xp.asarray(shapes.labels_of(labels, images))
    network = network or layers
    # fast_ways, made at the end of this file, says which shortcuts compute the same as this script.
    ways = fast_ways.of(network, settings, images)
    shards = shards_of(len(images), SHARD_IMAGES if ways.shards else len(images))
    keys = rng.integers(2**63, size=len(shards)) if rng is not None else None  # a stream per shard
    # A plain dict is sent to the other processes array by array; Parameters would send flat too.
    work = functools.partial(
        gradients_of_shards,
        dict(params),
        images,
        labels,
        settings,
        keys,
        network,
        ways.winograd,
    )
    loss, total = 0, 0
    for start in range(0, len(shards), SHARDS_AT_ONCE):
        for shard_loss, flat in over_cores(work, shards[start : start + SHARDS_AT_ONCE]):
            loss += shard_loss
            total += flat
    return loss, Parameters.of_flat(total, params)


def logits_of_shards(params, images, settings, network, fast, shards):
    """[logits] of each shard, without dropout."""
    prepared = winograd.prepare(params, to_learn=False) if fast else params
    net, dtype = network(settings), dtype_of(params)
    return [forward(net, prepared, to_input(images[shard], dtype))[0] for _, shard in shards]


def predict(params, images, settings, network=None):
    """Pixels 0…255 (N, 28, 28) → logits (N, 10), without dropout, in the dtype of params."""
    images = xp.asarray(shapes.images_of(images))
    network = network or layers
    ways = fast_ways.of(network, settings, images)
    size = PREDICT_SHARD_IMAGES if ways.shards else len(images)
    work = functools.partial(
        logits_of_shards, dict(params), images, settings, network, ways.winograd
    )
    return xp.concatenate(over_cores(work, shards_of(len(images), size)))


# ── Evaluation and checkpoints ────────────────────────────────────────────────────────────────────

# After each epoch, this many of the training images are evaluated, the first ones.
TRAIN_EVALUATION_IMAGES = 10_000
# Images evaluated at a time: what the layers put out for 10,000 would fill many GB of a GPU.
PREDICT_IMAGES = 1024


def evaluate(params, images, labels, settings, network=None):
    """(mean loss, accuracy 0…1, probabilities (N, 10)) of images (N, 28, 28), without dropout."""
    images = shapes.images_of(images)
    labels = xp.asarray(shapes.labels_of(labels, images))
    parts = []
    for start in range(0, len(images), PREDICT_IMAGES):
        parts.append(predict(params, images[start : start + PREDICT_IMAGES], settings, network))
    return loss_and_accuracy(xp.concatenate(parts), labels)


def loss_and_accuracy(logits, labels):
    """(mean loss, accuracy 0…1, probabilities (N, 10)) of logits (N, 10)."""
    loss, _ = cross_entropy_loss(logits, labels)
    probs, _ = softmax(logits)
    right = logits.argmax(axis=1) == labels
    return float(loss), float(right.mean()), probs


def checkpoint_of(state, settings):
    """The State as the bytes of a checkpoint. UserError if it is not finite."""
    if not state.is_finite():
        raise UserError(
            f"the parameters are no longer finite at step {state.step}; the checkpoints stay as "
            "they were"
        )
    experiment = experiment_of(settings)
    arrays = {name: to_host(a) for name, a in state.views().items()}
    return pack_checkpoint(arrays, state.step, state.history, experiment)


def experiment_of(settings):
    """The settings that say what is computed, by name."""
    left_out = ("tag", *NOT_THE_EXPERIMENT)
    return {name: value for name, value in asdict(settings).items() if name not in left_out}


def load_checkpoint(path, settings, network=None):
    """The State that checkpoint_of() packed, to be continued.

    UserError if it is damaged, of another network or of another experiment."""
    state = init_state(settings, network)
    views = state.views()
    arrays, state.step, state.history = read_checkpoint(path, views, experiment_of(settings))
    for name, a in views.items():
        a[...] = xp.asarray(arrays[name])  # fills the array itself, which the state holds
    return state


def load_weights(path, settings, network=None):
    """The Parameters that a checkpoint was evaluated with: their running mean, if it has one.

    UserError if it is damaged or of another network."""
    params, weights = init_params(settings, network=network), read_weights(path)
    try:
        check_arrays(weights, params)
    except ValueError as error:
        raise UserError(f"{path} is of another network ({error})") from None
    for name, a in params.items():
        a[...] = xp.asarray(weights[name])
    return params


# ── The parts of a run ────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """What a training run learns from, and what it changes."""

    settings: Settings
    network: Callable  # layers(), or another function like it
    state: State
    train: tuple  # images and labels, on the device
    validation: tuple  # held out of the training images, to choose settings by; often none
    test: tuple
    total_steps: int


def split(data, settings):
    """(images, labels) to train on, to validate with and to test with, on the device."""
    count = settings.train_images or len(data.train_images)
    if count > len(data.train_images):
        raise UserError(f"train_images is {count}, but the data set has {len(data.train_images)}")
    held_out = settings.validation_images
    if held_out >= count:
        raise UserError(
            f"validation_images is {held_out}, "
            f"but should leave some of the {count} images to train on"
        )
    first, others = slice(count - held_out), slice(count - held_out, count)
    parts = (
        (data.train_images[first], data.train_labels[first]),
        (data.train_images[others], data.train_labels[others]),
        (data.test_images, data.test_labels),
    )
    return [(xp.asarray(images), xp.asarray(labels)) for images, labels in parts]


def plan_of(run, epoch):
    """What differs from step to step of an epoch: an engine (see train()) computes none of it.

    A key for the random numbers of each step; and, (steps, 5), its learning rate, the share of
    themselves that decaying weights keep, the rate and the divisor of adam's two corrections, and
    the share that the mean of the weights takes from the new ones."""
    settings, steps = run.settings, run.total_steps // run.settings.epochs_max
    rng = random_stream(settings.seed, STEP, epoch)  # that of the first step
    keys, plan = [], []
    for number in range(steps):
        step = (epoch - 1) * steps + number
        keys.append(rng.integers(2**63))
        # On to the next step's: a draw has added 1 to the counter, a step adds 2**128 to it. That
        # takes a third of the time that making each stream anew would, while a GPU waits.
        rng.bit_generator.advance(2**128 - 1)
        rate = rate_of_step(step, run.total_steps, settings)
        mean_share, square_share = corrections(step, beta1_of(settings), settings.beta2)
        keeps, takes = decay_keeps(rate, settings), 1 - ema_keeps(settings, step)
        plan.append((rate, keeps, rate / mean_share, square_share, takes))
    return np.array(keys, np.uint64), np.array(plan)


def evaluate_all(run, engine):
    """What is measured after an epoch: a row of metrics.csv, {column: number}, to which a line here
    adds one more; and the arrays of predictions.npz."""

    def measure(images, labels):
        if engine:
            return loss_and_accuracy(engine.predict(images), labels)
        return evaluate(run.state.to_evaluate(), images, labels, run.settings, run.network)

    images, labels = run.train
    part, row = slice(TRAIN_EVALUATION_IMAGES), {}
    row["train_loss"], row["train_accuracy"], _ = measure(images[part], labels[part])
    row["test_loss"], row["test_accuracy"], probs = measure(*run.test)
    if run.settings.validation_images:
        _, row["validation_accuracy"], _ = measure(*run.validation)
    if engine:
        engine.fetch()
    predictions = {
        "labels": to_host(run.test[1]),
        "predictions": to_host(probs.argmax(axis=1)),
        "probabilities": to_host(probs),
    }
    return row, predictions


# ── One step of learning ──────────────────────────────────────────────────────────────────────────


def learn_from(params, images, labels, settings, rng, network):
    """The mean loss of these images, and its gradient: {name: array} for every parameter.

    Without rng, there is no dropout and the images stay as they are."""
    if rng is not None and (settings.augment or settings.elastic):
        images = augment(images, settings.augment, rng, settings.elastic)
    net = network(settings, rng)
    x = to_input(images, dtype_of(params))
    logits, caches = forward(net, params, x)
    loss, cache = cross_entropy_loss(logits, labels, settings.label_smoothing)
    dlogits = cross_entropy_loss_backward(1, cache)  # 1 is dloss: d loss / d loss
    gradients = backward(net, dlogits, caches)
    check_gradients(gradients, params)
    return loss, gradients


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def train(run, book, engine=None):
    """Epoch after epoch, to the last one or until somebody asks to stop. Returns the exit status.

    book keeps files, log and clock (support/bookkeeping.py). engine is another way to compute the
    same steps: one CUDA graph on a GPU (support/gpu.py), or PyTorch (torch_version/)."""
    settings, state, B = run.settings, run.state, run.settings.batch_size
    images, labels = run.train
    # Epoch 0 is how good the network is before it has learnt anything.
    if not state.history:
        book.end_epoch(lambda: evaluate_all(run, engine))
    while book.goes_on():
        epoch = len(state.history)  # history has a row for epoch 0 too
        # The numbers of the training images, shuffled; each batch takes the next few of them.
        order = xp.asarray(random_stream(settings.seed, ORDER, epoch).permutation(len(images)))
        if engine:
            keys, plan = plan_of(run, epoch)
            engine.begin_epoch(order, keys, plan, done=state.step % len(plan))
        for number in book.steps(epoch):  # 0, 1, …: those of the epoch that are still to do
            if engine:
                loss = engine.step(state, number)  # the same as the lines below
            else:
                # The numbers of its images. The last batch of an epoch may be smaller.
                batch = order[number * B : (number + 1) * B]
                rng = random_stream(settings.seed, STEP, epoch, number)
                # Forward, loss and backward: learn_from(), above, on all cores.
                loss, gradients = loss_and_gradients(
                    state.params, images[batch], labels[batch], settings, rng, run.network
                )
                rate = rate_of_step(state.step, run.total_steps, settings)
                update(state, gradients, settings, rate)
            book.after_step(loss)
        if book.epoch_is_whole():
            book.end_epoch(lambda: evaluate_all(run, engine))
    return book.finish()


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────

# What a run keeps a copy of, in save/<tag>/code/.
SCRIPTS = (
    ROOT / "mnist_resnet9.py",
    ROOT / "plot_figs.py",
    *sorted((ROOT / "support").glob("*.py")),
    ROOT / "support" / "gpu.cu",
)
remember(SCRIPTS)  # as they are now: whoever edits one later changes nothing in this process


class Machinery(NamedTuple):
    """What computes a run: functions that choose the device and the cores, and make the engine."""

    use_device: Callable  # (settings.device) → what was taken and why, in words
    use_cores: Callable  # (their number)
    engine_of: Callable  # (run, in words) → the engine or None, and the words to log


def gpu_engine(run, where):
    """On a GPU the engine of support/gpu.py, where it computes what this script says."""
    if xp is np:
        return None, where

    def make(run):
        smooth, beta1 = bumps(28, 28, xp), beta1_of(run.settings)
        return gpu.fast_path(run.settings, run.state, *run.train, smooth, beta1)

    engine, why_not = fast_ways.engine(run, make)
    return engine, f"{where} ({why_not})" if why_not else where


def config_of(settings, data, device):
    """What config.json holds."""
    return {
        "settings": asdict(settings),
        "data": {"name": data.name, "sha256": data.hashes},
        "code": fast_ways.code(),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            xp.__name__: xp.__version__,
        },
    }


def open_folder(settings, data, device, scripts):
    """The folder of the run that settings define. UserError if it holds another one."""
    free = set(NOT_THE_EXPERIMENT)
    if settings.schedule != "constant":
        free.remove("epochs_max")  # the learning rate depends on it
    path = project_path(settings.save_dir) / settings.tag
    config, defaults = config_of(settings, data, device), asdict(type(settings)())
    return RunFolder(path, config, free, defaults, scripts)


@gpu.errors_in_a_line()
def run(settings, network=None, scripts=SCRIPTS, machinery=None, data=None):
    """Starts or continues the run that settings define. Returns the exit status.

    data, a Dataset, takes the place of the one in settings.data_dir."""
    global xp
    before = xp
    machinery = machinery or Machinery(use_device, use_cores, gpu_engine)
    try:
        device = machinery.use_device(settings.device)
        data = data or load_mnist(settings.data_dir)
        parts = split(data, settings)
        with closing(open_folder(settings, data, device, scripts)) as folder:
            return run_in(folder, settings, network or layers, machinery, device, data, parts)
    finally:
        xp = before  # the next cell of a notebook goes on where it was


def run_in(folder, settings, network, machinery, device, data, parts):
    """Restores the state or makes it, opens the log, chooses the cores, and trains."""
    restored = folder.restore(lambda path: load_checkpoint(path, settings, network))
    state = restored or init_state(settings, network)
    engine = None  # until the run begins, below

    def pack(state):
        if engine:
            engine.fetch()
        return checkpoint_of(state, settings)

    to_train_on, held_out, to_test_with = (len(images) for images, _ in parts)
    book = Bookkeeper(
        settings,
        folder,
        state,
        pack,
        rate_of=lambda step, steps: rate_of_step(step, steps, settings),
        images=to_train_on,
        evaluated=min(to_train_on, TRAIN_EVALUATION_IMAGES) + held_out + to_test_with,
        on_gpu=device.startswith("GPU"),
    )
    if book.is_finished():
        further = "raise --epochs-max" if settings.schedule == "constant" else "take another --tag"
        print(f"{settings.tag} is finished. {book.result()} To go further, {further}.")
        return 0
    folder.write_config()
    folder.keep_code(fast_ways.replaced())
    most = None
    if machinery.use_cores is use_cores:
        ways = fast_ways.of(network, settings, parts[0][0], say=folder.note)
        most = most_cores(settings) if ways.shards else 1
    cores, words = cores_to_use(settings.threads, most)
    where = device if book.on_gpu else f"{device}, {words}"
    training = Run(settings, network, state, *parts, book.total_steps)
    engine, where = machinery.engine_of(training, where)
    book.say_start(data, where, continued=restored is not None)

    def stop(number, _frame):
        book.ask_to_stop(number)
        workers.hurry()

    with terminal.signals_to(stop, terminal.stop_signals()):
        try:
            machinery.use_cores(cores)
            workers.warn = folder.warn
            return train(training, book, engine)
        finally:
            workers.close()
            workers.warn = on_the_terminal


def check(settings, network=None):
    """Whether every backward pass is the gradient of its forward pass: a table, and what is wrong
    by name. It trains nothing and saves nothing."""
    return check_network(sys.modules[__name__], network or layers, settings)


def start_run(arguments):
    settings = parse_settings(arguments, checks=True)
    if "--check" in arguments:
        return 0 if check(settings) else 1
    return run(settings)


def main(arguments=(), start=None):
    """Runs a command line, start(arguments), as `main(["--tag", "mine"])` in a notebook does.

    start is start_run() or another like it. Returns the exit status: 0, 1 if something could not be
    saved, 2 after an error that the user can put right (one line says it), or 128 + the number of a
    signal. In a cell of a notebook, what is not 0 is an exception: see terminal.end()."""
    # A worker process that imports the user's script is not to do what the script does.
    if is_starting():
        return 0
    terminal.prepare()
    prepare_process()
    status, why = 2, ""
    try:
        # Overflow shows in the loss, which is checked.
        with OneBlasThread(), np.errstate(all="ignore"):
            status = (start or start_run)(terminal.words_of(arguments))
    except SystemExit as stop:
        if stop.code:
            raise
        status = 0  # after --help
    except UserError as error:
        why = terminal.prefix() + " ".join(str(error).split())
    except MemoryError as error:
        reason = " ".join(str(error).split())
        why = f"Out of memory{reason and f' ({reason})'}. Everything saved so far is kept; "
        why += "a run with a smaller --batch-size needs less."
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`
        status = 128 + 13  # SIGPIPE, which ends other programs then
    except OSError as error:
        why = f"{terminal.prefix()}{error}"
    except KeyboardInterrupt:  # before the training or after it: within, it saves what there is
        status, why = 130, "Stopped; there is nothing to save."
    finally:
        terminal.flush()
    return terminal.end(status, why)


# Shortcuts stand in for some of the functions above. If you replace one of those, in a notebook,
# say, fast_ways notices, and the shortcut is not taken.
fast_ways = FastWays(globals())

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
