"""ResNet9, a residual network of nine layers, on MNIST. Every forward and backward pass is written
by hand on NumPy, or on CuPy, which is NumPy on an NVIDIA GPU.

    python mnist_resnet9.py                  train; the same command again continues a stopped run
    python mnist_resnet9.py --recipe quick --tag quick    three epochs, 99.64 % test accuracy
    python mnist_resnet9.py --help           every setting; each can also be edited below
    python plot_figs.py                      the run's curves and failures, while it trains or later
    python predict.py my_digit.png           what the network takes your own digit for

A network is a function with many adjustable numbers, its parameters. It turns an image into ten
scores (logits), one for each digit; the highest one is its answer. The loss measures how wrong the
scores are for a batch, a few images at a time. Training does three things, batch after batch:

    forward    compute the scores and the loss of the batch
    backward   compute the gradient: how the loss would change with each parameter
    update     change each parameter a little, against its gradient

These three are a step. How far the update goes is the learning rate; by which rule, the optimizer.
One pass over all training images is an epoch.

The network has nine layers with weights. Letters, here and throughout: H, W rows and columns of the
image, N images, C channels coming in, K channels (or classes) going out, F features of one image.
A channel is one of several numbers that each pixel has, as the red, green and blue of a photograph.

    layer          what it does                                  output                parameters
    conv1          3×3 convolution, relu (below 0 becomes 0)     28, 28, N,  4                 40
    conv2          3×3 convolution, relu                         28, 28, N, 16                592
    conv3, conv4   residual block: relu(x + conv4(relu(conv3(x))))
                                                                 28, 28, N, 16              4,640
    pool           the largest (or the mean) of each 2×2 window  14, 14, N, 16
    conv5          3×3 convolution, relu                         14, 14, N, 32              4,640
    conv6          3×3 convolution, relu                         14, 14, N, 64             18,496
    conv7, conv8   residual block                                14, 14, N, 64             73,856
    pool           the largest (or the mean) of each 2×2 window   7,  7, N, 64
    dropout        switches a random share of the features off    N, 3136
    fc9            linear: the ten logits                         N, 10                     31,370

The outputs are (H, W, N, K); at the end (N, F), with F = 7·7·64 = 3136, and (N, K). Rows and
columns come first, so that shifts, windows and borders are slices of the first two axes. A
convolution has 9·C·K weights and K biases: conv2 has 9·4·16 + 16 = 592 parameters.

How to read it. Every operation is a pair of functions: `y, cache = op(x, …)`, and directly below it
`op_backward(dy, cache)`. dy is the gradient of the loss with respect to y and has y's shape; the
backward function turns it into dx, dw and db, the gradients with respect to what went in: the input
x, the weights w and the bias b, a number added to each output. The cache holds what the backward
function will need from the forward one. That is all of backpropagation: the network calls the pairs
in order, and then in reverse. What does not learn (files, processes, speed) is in support/.
"""

import functools
import math
import platform
import shlex
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out

from support import ROOT, UserError, gpu, terminal, winograd
from support.checkpoints import Epoch, Unreadable, pack_checkpoint, read_checkpoint
from support.mnist import find_mnist
from support.run_folder import RunFolder, duration, log_header, log_line, write_metrics
from support.settings import (
    Parser,
    check_folder_name,
    check_settings,
    project_path,
    setting,
    settings_class,
)
from support.storage import pack_arrays, write_file
from support.workers import Workers, available_cores, prepare_process

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


@settings_class
class Settings:
    """What defines a run. Edit the defaults here, or give flags: epochs_max is --epochs-max."""

    # the run and its data
    tag: str = setting("resnet9", "name of the run; its files go to save/<tag>/")
    seed: int = setting(
        0, "start of all random numbers: the same seed gives the same run", between=(0, 2**63 - 1)
    )
    device: str = setting(
        "auto", "auto takes the GPU if CuPy can use one", choices=("auto", "cpu", "gpu")
    )
    data_dir: str = setting(
        "data", "folder with MNIST, in any form of data/README.md; downloaded there if missing"
    )
    save_dir: str = setting("save", "folder that holds one folder for each run")
    train_images: int = setting(
        0, "use only the first so many training images; 0 = all", between=(0, 10**9)
    )
    validation_images: int = setting(
        0, "of these, hold out this many, the last, to choose settings by", between=(0, 10**9)
    )

    # how it learns
    epochs_max: int = setting(200, "passes over the training images", between=(1, 10**6))
    batch_size: int = setting(
        64,
        "images in a step: fewer give more updates, more give faster matrix products",
        between=(1, 10**6),
    )
    learning_rate: float = setting(
        1e-4, "how far an update goes; with one_cycle, at its peak", between=(0, 1000)
    )
    optimizer: str = setting(
        "adam",
        "the rule that makes an update of a gradient: the functions of these names say how",
        choices=("sgd", "adam", "muon"),
    )
    momentum: float = setting(0.9, "share of its last update that sgd keeps", between=(0, 0.9999))
    beta2: float = setting(
        0.999,
        "share of its mean squared gradient that adam or muon keeps in a step",
        between=(0, 0.999999),
    )
    weight_decay: float = setting(
        0.0, "a step takes this share, times the learning rate, off each weight", between=(0, 1000)
    )
    schedule: str = setting(
        "constant",
        "one_cycle: the learning rate rises, then falls to 0",
        choices=("constant", "one_cycle"),
    )
    warm_up: float = setting(0.3, "share of all steps in which one_cycle rises", between=(0, 0.9))

    # the network, and how it is kept from learning by heart
    dropout: float = setting(
        0.9, "share of the features that a training step switches off", between=(0, 0.9999)
    )
    pool: str = setting("max", "what a pooling window passes on", choices=("max", "avg"))
    channels: tuple = setting((4, 16, 32, 64), "channels after conv1, conv2, conv5 and conv6")
    label_smoothing: float = setting(
        0.0, "share of each label that is spread evenly over all ten classes", between=(0, 0.99)
    )
    augment: float = setting(
        0.0, "random turn, scale, shear and shift: 1 = ±12°, ±2 pixels; 0 = off", between=(0, 10)
    )
    elastic: float = setting(
        0.0, "random smooth bending of the images, in pixels (standard deviation)", between=(0, 10)
    )

    # evaluation, and the machine
    ema: float = setting(
        0.0,
        "evaluate with a running mean of the weights, which keeps this share of itself in a step; "
        "0 = off",
        between=(0, 0.999999),
    )
    threads: int = setting(
        0,
        "CPU cores to compute on, one process on each, without influence on the result; 0 = all",
        between=(0, 256),
    )
    unsaved_epochs: int = setting(
        3, "end the run when so many epochs in a row could not be saved", between=(1, 10**6)
    )

    def __post_init__(self):
        check_settings(self)
        check_folder_name(self.tag)
        if len(self.channels) != 4 or not all(
            type(c) is int and 1 <= c <= 1024 for c in self.channels
        ):
            raise UserError(
                f"channels {self.channels} should be four whole numbers from 1 to 1024, "
                "as 4,16,32,64"
            )


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

# These say where and how a run is computed, not what: they may differ in a continued run.
NOT_THE_EXPERIMENT = (
    "device",
    "data_dir",
    "save_dir",
    "epochs_max",
    "threads",
    "unsaved_epochs",
)


def parse_settings(arguments=(), kind=Settings, **preset):
    """The settings of a command line: defaults, then preset, then the recipe, then the flags."""
    parser = Parser(description="Train ResNet9 on MNIST.", allow_abbrev=False)
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="reference",
        help="a tried set of settings; flags come on top",
    )
    given = parser.read_settings(kind, arguments)
    name = given.pop("recipe")
    chosen = {**preset, **RECIPES[name], **given}
    known = [f.name for f in fields(kind)]
    for name_in_recipe in chosen:
        if name_in_recipe not in known:
            raise UserError(
                f"recipe {name} sets {name_in_recipe!r}; the settings are {', '.join(known)}"
            )
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
        reason = gpu.with_remedy(root_cause(error))
        if device == "gpu":
            raise UserError(
                f"device gpu cannot be used: {reason}; --device cpu works everywhere"
            ) from None
        return f"CPU (no GPU: {reason})"


def root_cause(error):
    """What an error says in one line. CuPy's begins with a banner, and has the cause below it."""
    while error.__cause__:
        error = error.__cause__
    text = str(error).rpartition("Original error:")[2]
    return " ".join(text.split())[:200] or type(error).__name__


def to_host(a):
    """A NumPy array with the contents of a."""
    return a if isinstance(a, np.ndarray) else a.get()


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────
# MNIST: 60,000 handwritten digits to train on and 10,000 others to test with, 28×28 pixels each.
# support/mnist.py finds, downloads and verifies the files.


@dataclass(frozen=True)
class Dataset:
    name: str  # what figures and logs call it
    hashes: dict  # file name → SHA-256 of the decompressed file
    notes: tuple  # what the user should know about where the data came from
    train_images: Any  # (60000, 28, 28) uint8, pixels 0…255
    train_labels: Any  # (60000,) uint8, the digits 0…9
    test_images: Any  # (10000, 28, 28) uint8
    test_labels: Any  # (10000,) uint8


def read_idx(content):
    """The array in the bytes of an idx file, MNIST's format: images (N, 28, 28) or labels (N,).

    The bytes are two zeros, one for the kind of number (8: uint8), one for the number of axes; then
    the length of each axis in four bytes, most significant first (">u4"); then the numbers."""
    axes = content[3]
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load_mnist(data_dir="data"):
    """The data set in data_dir (relative to this script), downloaded first where it is missing."""
    files = find_mnist(data_dir)
    arrays = {role: read_idx(content) for role, content in files.contents.items()}
    return Dataset(files.name, files.hashes, files.notes, **arrays)


PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the 60,000 training images, with pixels scaled to 0…1


def to_input(images, dtype):
    """Pixels 0…255 (N, 28, 28) → the network's input (28, 28, N, 1): mean 0, variance 1 over MNIST.

    dtype, the kind of number in an array, is float32 in training and float64 in exact tests."""
    x = images.astype(dtype) / 255
    x = (x - PIXEL_MEAN) / PIXEL_STD
    return x.transpose(1, 2, 0)[..., None]


# ── Operations ────────────────────────────────────────────────────────────────────────────────────
# Each has its backward pass directly below it. The chain rule is the only rule: from dy, the
# gradient of the loss with respect to y, follows dx = dy · ∂y/∂x. Where x enters y in several ways,
# its gradients add.


def relu(x, out=None):
    """y = max(x, 0), element by element.

    out is where to write y: x itself, where nobody needs x any more. That saves 2 % of the time."""
    mask = x > 0
    y = xp.multiply(x, mask, out=out)
    return y, mask  # cache: where x > 0; the slope depends on nothing else


def relu_backward(dy, mask):
    """dx = dy where x > 0, and 0 elsewhere: the slope is 1 or 0."""
    return dy * mask


# softmax and cross_entropy show the two parts of the loss one by one. Training uses both in one,
# cross_entropy_loss, which is more exact.


def softmax(x):
    """probs = exp(x) / Σ exp(x), row by row: (N, K) numbers → (N, K) probabilities."""
    shifted = x - x.max(axis=1, keepdims=True)  # changes no probability, and exp cannot overflow
    e = xp.exp(shifted)
    probs = e / e.sum(axis=1, keepdims=True)
    return probs, probs


def softmax_backward(dprobs, probs):
    """dx = probs · (dprobs − Σ dprobs · probs), with the sum over the row.

    Each probability depends on every x: ∂probs_i/∂x_j = probs_i ([i = j] − probs_j), where [i = j]
    is 1 if i = j and 0 otherwise. So dx_j = Σ_i dprobs_i probs_i ([i = j] − probs_j)."""
    return probs * (dprobs - (dprobs * probs).sum(axis=1, keepdims=True))


def cross_entropy(probs, labels):
    """loss = −mean log probs[n, labels[n]]: probs (N, K), labels (N,) → a number.

    It is 0 when every label has probability 1, and grows without bound as one's goes to 0."""
    N = len(labels)
    loss = -xp.log(probs[xp.arange(N), labels]).mean()
    return loss, (probs, labels)


def cross_entropy_backward(dloss, cache):
    """dprobs = −dloss / (N · probs) at the label, 0 elsewhere."""
    probs, labels = cache
    N = len(labels)
    at_label = (xp.arange(N), labels)
    dprobs = xp.zeros_like(probs)
    dprobs[at_label] = -dloss / (N * probs[at_label])  # 1/N comes from the mean
    return dprobs


def cross_entropy_loss(logits, labels, smoothing=0):
    """Softmax and cross-entropy in one: loss = mean (log Σ exp(logits) − logits[label]).

    This is what the training uses. With logarithms throughout, it stays exact where a probability
    is too small for a float. smoothing is the share of each label that all K classes get alike, so
    that logits need not grow for ever (Szegedy et al. 2016)."""
    shifted = logits - logits.max(axis=1, keepdims=True)  # (N, K)
    log_sum = xp.log(xp.exp(shifted).sum(axis=1))  # (N,)
    log_probs = shifted - log_sum[:, None]
    loss = (log_sum - shifted[xp.arange(len(labels)), labels]).mean()
    if smoothing:
        # The label gets 1 − smoothing, and every class smoothing / K; mean() divides by N and K.
        loss = (1 - smoothing) * loss - smoothing * log_probs.mean()
    return loss, (log_probs, labels, smoothing)  # cache: exp(log_probs) are the probabilities


def cross_entropy_loss_backward(dloss, cache):
    """dlogits = (probs − onehot) · dloss / N, where onehot is 1 at the label and 0 elsewhere.

    It follows from d(log Σ exp)/dlogits = probs and d(logits[label])/dlogits = onehot. With
    smoothing, (1 − smoothing) · onehot + smoothing / K takes the place of onehot."""
    log_probs, labels, smoothing = cache
    N, K = log_probs.shape
    dlogits = xp.exp(log_probs)
    dlogits[xp.arange(N), labels] -= 1 - smoothing
    dlogits -= smoothing / K
    return dlogits * (dloss / N)  # 1/N enters here, from the mean


def dropout(x, rate, rng):
    """Switches each feature off with probability `rate`, so that none is relied on too much.

    The others grow by 1/(1 − rate), which keeps the expected value. Without rng, a generator of
    random numbers, y = x: that is for evaluation. Srivastava et al. 2014, in its inverted form."""
    if rng is None or rate == 0:
        return x, None
    kept = rng.random(x.shape, dtype=xp.float32) >= rate
    mask = kept * x.dtype.type(1 / (1 - rate))
    return x * mask, mask  # cache: which features stayed on, and their factor


def dropout_backward(dy, mask):
    """From y = x · mask: dx = dy · mask."""
    return dy if mask is None else dy * mask


def linear(x, w, b):
    """y = x @ w + b: (N, F) @ (F, K) + (K,)."""
    return x @ w + b, (x, w)  # cache: the slope of x @ w is w for x, and x for w


def linear_backward(dy, cache):
    """From y = x @ w + b: dx = dy wᵀ, dw = xᵀ dy, db = Σ dy."""
    x, w = cache
    dx = dy @ w.T  # (N, F)
    dw = x.T @ dy  # (F, K), the sum over the images
    db = dy.sum(axis=0)  # (K,)
    return dx, dw, db


def windows(x, size):
    """The size×size windows of x: (H, W, N, C) → (H/size, size, W/size, size, N, C).

    The result is a view: an array that shares its memory with x, so nothing is copied. A last row
    or column that fills no window is left out."""
    H, W, N, C = x.shape
    h, w = H // size, W // size
    return x[: h * size, : w * size].reshape(h, size, w, size, N, C)


def windows_backward(dv, shape):
    """Turns dv, the gradient of the windows, into dx. Pixels in no window get 0."""
    h, size, w, _, N, C = dv.shape
    covered = dv.reshape(h * size, w * size, N, C)
    if covered.shape == shape:
        return covered
    dx = xp.zeros(shape, dv.dtype)
    dx[: h * size, : w * size] = covered
    return dx


def avg_pool2d(x, size=2):
    """y = mean of each size×size window: (H, W, N, C) → (H/size, W/size, N, C)."""
    return windows(x, size).mean(axis=(1, 3)), (x.shape, size)


def avg_pool2d_backward(dy, cache):
    """dx = dy / size²: every pixel of a window has that slope."""
    shape, size = cache  # a mean is linear, so no value of x was kept
    h, w, N, C = dy.shape
    each = (dy / size**2)[:, None, :, None]
    return windows_backward(xp.broadcast_to(each, (h, size, w, size, N, C)), shape)


def max_pool2d(x, size=2):
    """y = maximum of each size×size window: (H, W, N, C) → (H/size, W/size, N, C).

    The cache is a mask of every position that equals the maximum. Where two or more do, each gets
    the whole dy in the backward pass: none of them is more the maximum than another."""
    v = windows(x, size)
    positions = [v[:, i, :, j] for i in range(size) for j in range(size)]
    y = functools.reduce(xp.maximum, positions)
    # Pixels with equal surroundings (background) should tie. But their sums were taken in different
    # orders, which rounds differently, so equal means equal up to rounding.
    rounding = 1e-5 if x.dtype == xp.float32 else 1e-12
    lowest = y - rounding * (1 + abs(y))
    mask = v >= lowest[:, None, :, None]
    return y, (mask, x.shape)


def max_pool2d_backward(dy, cache):
    """dx = dy at every maximum of the window, and 0 elsewhere."""
    mask, shape = cache
    return windows_backward(dy[:, None, :, None] * mask, shape)


# A convolution slides a k×k kernel of weights over the image, one pixel at a time. Each output is a
# weighted sum of the k×k pixels around its place, over all their channels. Beyond the border there
# are zeros, so y has as many rows and columns as x:
#
#     y[row, col] = b + Σ x[row + i − r, col + j − r] @ w[i, j]
#
# The sum is over i, j = 0 … k − 1, and r = (k − 1) / 2. x is (H, W, N, C), the weights w are
# (k, k, C, K) with k odd, y is (H, W, N, K).


def surroundings(x, k):
    """The k×k pixels around each pixel, a column for each: (H, W, N, C) → (k·k·C, H·W·N).

    An array's strides are how many bytes of memory lie between neighbours along each axis. One more
    in i is a row further down, as is one more in row, so both get the same stride; likewise j and
    col. That makes

        view[i, j, c, row, col, n] = padded[row + i, col + j, n, c]

    without a copy. The reshape then copies everything at once."""
    H, W, N, C = x.shape
    r = k // 2
    padded = xp.zeros((H + 2 * r, W + 2 * r, N, C), x.dtype)
    padded[r : r + H, r : r + W] = x
    down, right, next_image, next_channel = padded.strides
    strides = (down, right, next_channel, down, right, next_image)
    view = xp.lib.stride_tricks.as_strided(padded, (k, k, C, H, W, N), strides)
    return view.reshape(k * k * C, H * W * N)


def conv2d(x, w, b):
    """y = convolution of x with w, + b: (H, W, N, C) → (H, W, N, K), as one matrix product."""
    if winograd.is_faster(w):  # on a CPU: the same but for rounding, sooner (support/winograd.py)
        return winograd.conv2d(x, w, b)
    H, W, N, C = x.shape
    k, _, _, K = w.shape
    cols = surroundings(x, k)  # (k·k·C, H·W·N)
    y = cols.T @ w.reshape(k * k * C, K) + b  # (H·W·N, K)
    return y.reshape(H, W, N, K), (cols, w)  # cache: as in linear


def conv2d_backward(dy, cache, need_dx=True):
    """dw = cols @ dy, db = Σ dy, and dx is a convolution too: of dy, with the kernel turned round.

    x[row, col] enters y[row − i + r, col − j + r] with the weights w[i, j]. So a pixel collects dy
    from all around itself, with the kernel turned by 180° and its channels swapped. The first layer
    of a network does without dx, since images are not learnt."""
    if isinstance(cache, winograd.Cache):
        return winograd.conv2d_backward(dy, cache, need_dx)
    cols, w = cache
    H, W, N, K = dy.shape
    k, _, C, _ = w.shape
    dy_rows = dy.reshape(H * W * N, K)
    dw = (cols @ dy_rows).reshape(k, k, C, K)
    db = xp.ones(H * W * N, dy.dtype) @ dy_rows  # Σ dy; sum() would take ten times as long
    if not need_dx:
        return None, dw, db
    turned = w[::-1, ::-1].swapaxes(2, 3)  # (k, k, K, C)
    dx = surroundings(dy, k).T @ turned.reshape(k * k * K, C)  # (H·W·N, C)
    return dx.reshape(H, W, N, C), dw, db


# ── Blocks ────────────────────────────────────────────────────────────────────────────────────────


def conv_block(x, w, b):
    """y = relu(convolution): (H, W, N, C) → (H, W, N, K)."""
    h, conv = conv2d(x, w, b)
    y, act = relu(h, out=h)
    return y, (conv, act)


def conv_block_backward(dy, cache, need_dx=True):
    """dx, dw, db: first back through relu, then through the convolution."""
    conv, act = cache
    dh = relu_backward(dy, act)
    return conv2d_backward(dh, conv, need_dx)


def residual_block(x, w1, b1, w2, b2):
    """relu(x + conv(relu(conv(x)))): two convolutions learn only what to add to x, the residual.

    The gradient also goes straight past them, through the sum. So it reaches the layers before
    undiminished. He et al. 2015, arXiv:1512.03385."""
    h, block = conv_block(x, w1, b1)
    h, conv = conv2d(h, w2, b2)
    h += x
    y, act = relu(h, out=h)
    return y, (block, conv, act)


def residual_block_backward(dy, cache):
    """dx, dw1, db1, dw2, db2. x took two paths, so the gradients of both paths add."""
    block, conv, act = cache
    dsum = relu_backward(dy, act)  # of x + h: x and h both get it unchanged
    dh, dw2, db2 = conv2d_backward(dsum, conv)
    dx, dw1, db1 = conv_block_backward(dh, block)  # through the two convolutions
    dx += dsum  # and past them
    return dx, dw1, db1, dw2, db2


# ── The network ───────────────────────────────────────────────────────────────────────────────────


class Parameters(dict):
    """name → array. Each array is a view of one flat vector, `.flat`.

    So an update of all parameters is a few operations on one array."""

    def __init__(self, arrays, flat=None):
        """A copy of the arrays; or, with flat, views of it that have the arrays' shapes."""
        self.flat = (
            xp.concatenate([a.reshape(-1) for a in arrays.values()]) if flat is None else flat
        )
        start = 0
        for name, a in arrays.items():
            self[name] = self.flat[start : start + a.size].reshape(a.shape)
            start += a.size


def init_params(settings, dtype=np.float32):
    """Random weights with variance 2 / (numbers that an output is summed from), and small biases.

    Without the 2, an output would vary as much as what it is summed from. relu sets half of it to
    0, which halves the mean square; the 2 makes up for that. So the numbers neither grow nor shrink
    from layer to layer: He's initialisation, arXiv:1502.01852. A residual block adds its branch to
    its input, so the branch starts small: its second convolution at half size. fc9 starts small
    too, so the first probabilities are near 1/10 and the first loss near −ln(1/10) = 2.3. The
    convolutions' biases start a little above 0: where all pixels under a kernel are 0, relu gets
    the bias alone, and its slope is then 1."""
    rng = random_stream(settings.seed, INIT)  # its numbers depend on the seed alone
    c1, c2, c3, c4 = settings.channels
    shapes = [(1, c1), (c1, c2), (c2, c2), (c2, c2), (c2, c3), (c3, c4), (c4, c4), (c4, c4)]
    arrays = {}
    for i, (C, K) in enumerate(shapes, start=1):
        scale = 0.5 if i in (4, 8) else 1
        arrays[f"conv{i}.weight"] = (
            rng.standard_normal((3, 3, C, K)) * scale * math.sqrt(2 / (9 * C))
        )
        arrays[f"conv{i}.bias"] = np.full(K, 0.01)
    F = 49 * c4
    arrays["fc9.weight"] = rng.standard_normal((F, 10)) * 0.1 * math.sqrt(2 / F)
    arrays["fc9.bias"] = np.zeros(10)
    return Parameters({name: xp.asarray(a, dtype) for name, a in arrays.items()})


def dtype_of(params):
    return next(iter(params.values())).dtype


POOLS = {
    "max": (max_pool2d, max_pool2d_backward),
    "avg": (avg_pool2d, avg_pool2d_backward),
}


def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), caches. With rng, dropout is on."""
    p = params
    pool2d, _ = POOLS[settings.pool]
    h, conv1 = conv_block(x, p["conv1.weight"], p["conv1.bias"])  # (28, 28, N, 4)
    h, conv2 = conv_block(h, p["conv2.weight"], p["conv2.bias"])  # (28, 28, N, 16)
    h, res34 = residual_block(
        h, p["conv3.weight"], p["conv3.bias"], p["conv4.weight"], p["conv4.bias"]
    )
    h, pool4 = pool2d(h)  # (14, 14, N, 16)
    h, conv5 = conv_block(h, p["conv5.weight"], p["conv5.bias"])  # (14, 14, N, 32)
    h, conv6 = conv_block(h, p["conv6.weight"], p["conv6.bias"])  # (14, 14, N, 64)
    h, res78 = residual_block(
        h, p["conv7.weight"], p["conv7.bias"], p["conv8.weight"], p["conv8.bias"]
    )
    h, pool8 = pool2d(h)  # (7, 7, N, 64)
    h = h.transpose(2, 0, 1, 3)  # (N, 7, 7, 64)
    features, drop = dropout(h.reshape(len(h), -1), settings.dropout, rng)  # (N, 3136)
    logits, fc9 = linear(features, p["fc9.weight"], p["fc9.bias"])  # (N, 10)
    return logits, (conv1, conv2, res34, pool4, conv5, conv6, res78, pool8, h.shape, drop, fc9)


def backward(dlogits, caches, settings):
    """dlogits (N, 10) → {name: gradient}. Read it beside forward: the same lines, bottom to top."""
    d = {}
    _, pool2d_backward = POOLS[settings.pool]
    conv1, conv2, res34, pool4, conv5, conv6, res78, pool8, shape, drop, fc9 = caches
    dfeatures, d["fc9.weight"], d["fc9.bias"] = linear_backward(dlogits, fc9)
    dh = dropout_backward(dfeatures, drop).reshape(shape)  # (N, 7, 7, 64)
    dh = dh.transpose(1, 2, 0, 3)  # (7, 7, N, 64)
    dh = pool2d_backward(dh, pool8)
    dh, d["conv7.weight"], d["conv7.bias"], d["conv8.weight"], d["conv8.bias"] = (
        residual_block_backward(dh, res78)
    )
    dh, d["conv6.weight"], d["conv6.bias"] = conv_block_backward(dh, conv6)
    dh, d["conv5.weight"], d["conv5.bias"] = conv_block_backward(dh, conv5)
    dh = pool2d_backward(dh, pool4)
    dh, d["conv3.weight"], d["conv3.bias"], d["conv4.weight"], d["conv4.bias"] = (
        residual_block_backward(dh, res34)
    )
    dh, d["conv2.weight"], d["conv2.bias"] = conv_block_backward(dh, conv2)
    _, d["conv1.weight"], d["conv1.bias"] = conv_block_backward(dh, conv1, need_dx=False)
    return d


class Network(NamedTuple):
    """What the training needs to know of a network."""

    init_params: Callable  # (settings, dtype) → Parameters
    forward: Callable  # (params, x, settings, rng) → logits, caches
    backward: Callable  # (dlogits, caches, settings) → {name: gradient}


RESNET9 = Network(init_params, forward, backward)

# ── One step of learning ──────────────────────────────────────────────────────────────────────────


def learn_from(params, images, labels, settings, rng, network, share=1.0):
    """The loss of these images, and its gradient for every parameter.

    Where they are only a part of a batch, share is how large a part. The batch's loss is the sum of
    share · loss over its parts, so share is its gradient for the loss of this one. Without rng,
    there is no dropout and the images stay as they are."""
    if rng is not None and (settings.augment or settings.elastic):
        images = augment(images, settings.augment, rng, settings.elastic)
    x = to_input(images, dtype_of(params))
    logits, caches = network.forward(params, x, settings, rng)
    loss, cache = cross_entropy_loss(logits, labels, settings.label_smoothing)
    dlogits = cross_entropy_loss_backward(share, cache)
    return loss * share, network.backward(dlogits, caches, settings)


# The rest of a step is the update, below. Run.learn(), near the end, joins the two.

# ── Optimizer and schedule ────────────────────────────────────────────────────────────────────────


@dataclass
class State:
    """All that training changes: what a checkpoint holds."""

    params: Parameters
    moments: Any  # (1, parameters), a running sum of dw (sgd), or (2, …), means of dw and dw²
    ema: Any  # running mean of the parameters, or None
    step: int = 0  # steps done
    history: list = field(default_factory=list)  # an Epoch for each epoch, from epoch 0 on
    weights_only: bool = False  # too little to train on: see benchmarks/share_run.py

    def views(self):
        """name → array: all that a checkpoint holds in the parameters' dtype."""
        ema = {f"ema.{name}": a for name, a in (self.ema or {}).items()}
        return {**self.params, **ema, "moments": self.moments}

    def is_finite(self):
        return all(bool(xp.isfinite(a).all()) for a in self.views().values())

    def averaged(self):
        """The parameters to evaluate with."""
        return self.ema if self.ema is not None else self.params


def init_state(settings, network=RESNET9):
    """The State before the first step: fresh parameters, moments 0."""
    params = network.init_params(settings)
    rows = 1 if settings.optimizer == "sgd" else 2
    moments = xp.zeros((rows, params.flat.size), params.flat.dtype)
    return State(params, moments, Parameters(params) if settings.ema else None)


def update(state, gradients, settings, rate):
    """The update, in place. gradients are Parameters, rate is this step's learning rate."""
    w, dw = state.params.flat, gradients.flat
    decay_weights(state.params, settings, rate)
    if settings.optimizer == "adam":
        adam(w, dw, state.moments, rate, state.step, settings.beta2)
    elif settings.optimizer == "muon":
        muon(state.params, gradients, state.moments, rate, state.step, settings.beta2)
    else:
        sgd(w, dw, state.moments, rate, settings.momentum)
    if state.ema is not None:
        # An exponential moving average: it evens out the zigzag of the last steps.
        state.ema.flat += (1 - ema_keeps(settings, state.step)) * (w - state.ema.flat)
    state.step += 1


def learning_rate(step, steps, settings):
    """The rate of step 0, 1, … steps − 1.

    one_cycle rises in a straight line, since long steps do harm while the weights are random, and
    falls along half a cosine wave to 0, since short steps settle what was learnt."""
    if settings.schedule == "constant":
        return settings.learning_rate
    rise = settings.warm_up * steps
    if step < rise:
        return settings.learning_rate * (step + 1) / (rise + 1)
    return settings.learning_rate * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def decay_weights(params, settings, rate):
    """Shrinks the weights, not the biases, a little, so that none grows without a reason.

    This is done apart from the gradient. Added to dw, it would be divided by the usual size of dw
    in adam, and weights with large gradients would hardly shrink. Decoupled weight decay:
    Loshchilov and Hutter 2019, arXiv:1711.05101."""
    if settings.weight_decay:
        for name, weight in params.items():
            if name.endswith("weight"):
                weight *= 1 - rate * settings.weight_decay


def ema_keeps(settings, step):
    """The share that the running mean of the weights keeps in this step.

    A mean that keeps the share s reaches back over about 1 / (1 − s) steps. The first weights are
    soon worth little, so at first that is (10 + step) / 9, about a ninth of the steps done."""
    return min(settings.ema, (1 + step) / (10 + step))


def sgd(w, dw, moments, rate, momentum):
    """moment ← momentum · moment + dw,  w ← w − rate · moment.

    Stochastic gradient descent: each gradient is that of a random batch. The moment carries on in
    the direction of the last steps, as a rolling ball does: what changes from batch to batch
    cancels, what stays adds up."""
    moments[0] *= momentum
    moments[0] += dw
    w -= rate * moments[0]


def adam(w, dw, moments, rate, step, beta2, beta1=0.9, eps=1e-8):
    """w ← w − rate · mean / (√square + eps): running means of dw and of dw².

    In each step mean keeps the share beta1 of itself and takes the rest from dw; square does so
    with beta2 and dw². Dividing by √square, the usual size of a gradient, gives all parameters
    steps of about the same size. Both start at 0, so after t steps the shares of all gradients add
    up to only 1 − beta^t, and dividing by that makes up for it. eps keeps the divisor from being 0.
    Kingma and Ba 2015, arXiv:1412.6980."""
    mean, square = moments
    mean += (1 - beta1) * (dw - mean)
    square += (1 - beta2) * (dw * dw - square)
    t = step + 1
    w -= (rate / (1 - beta1**t)) * mean / (xp.sqrt(square / (1 - beta2**t)) + eps)


def takes_muon(name, w):
    """Whether muon updates this parameter its own way: the weights of every convolution but conv1,
    which has the image itself for its input."""
    return w.ndim == 4 and name != "conv1.weight"


def muon(params, gradients, moments, rate, step, beta2, beta1=0.95):
    """Adam for the biases, conv1 and fc9; for the weights of the other convolutions

        w ← w − rate · 0.2 √(longer side of the matrix) · orthogonal(mean of dw)

    A gradient, taken as a matrix, is large in a few directions and small in the rest: see
    orthogonal(). Adam makes the steps of single numbers alike, this makes those of whole directions
    alike, so that weak ones are learnt too. The factor makes a step about as long as Adam's: Liu
    and others 2025, arXiv:2502.16982."""
    before = Parameters(params)  # Adam moves all; those that are muon's start again from here
    means = Parameters(params, moments[0])  # the running means of dw, by name; Adam updates them
    adam(params.flat, gradients.flat, moments, rate, step, beta2, beta1)
    for name, w in params.items():
        if takes_muon(name, w):
            # What the mean would be after another such gradient: Nesterov's look ahead. How large
            # it is does not matter here, so it needs no 1 − beta^t.
            mean = (1 - beta1) * gradients[name] + beta1 * means[name]
            matrix = mean.reshape(-1, w.shape[3])  # (3, 3, C, K) → (9C, K)
            length = 0.2 * math.sqrt(max(matrix.shape))
            w[...] = before[name] - rate * length * orthogonal(matrix).reshape(w.shape)


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


# ── Augmentation ──────────────────────────────────────────────────────────────────────────────────
# A digit that is turned, shifted or bent a little is still the same digit. So each time an image
# is learnt from, it can be changed at random, and the network hardly ever sees one twice.


def augment(images, strength, rng, elastic=0):
    """Changes every image at random: (N, 28, 28) → the same shape in float32, pixels 0…255.

    Each pixel of the result looks up where in the image it came from:
    source = matrix @ (pixel − centre) + centre + shift + bend."""
    N, H, W = images.shape
    matrices, shifts = random_matrices(N, strength, rng)
    y, x = xp.meshgrid(xp.arange(H) - (H - 1) / 2, xp.arange(W) - (W - 1) / 2, indexing="ij")
    y, x = y.ravel().astype(xp.float32), x.ravel().astype(xp.float32)  # (H·W,), from the centre
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
    image = xp.arange(N)[:, None] * ((H + 3) * (W + 3))  # where each image starts in pixels
    line = image + (top.astype(xp.int32) + 1) * (W + 3)  # and the line of the pixel above
    at = line + left.astype(xp.int32) + 1  # and the upper left one of the four pixels
    upper = pixels[at] * (1 - right) + pixels[at + 1] * right
    lower = pixels[at + W + 3] * (1 - right) + pixels[at + W + 4] * right
    return (upper * (1 - down) + lower * down).reshape(N, H, W)


# ── Cores and repeatable randomness ───────────────────────────────────────────────────────────────
# Nothing in the network mixes images, so a batch's gradient is the mean of its images' gradients. A
# batch is cut into shards, each core takes some of them, and their results are added in the order
# of the shards. A shard's size is fixed, so the result has the same bits on one core or sixteen.
# support/workers.py has the processes that compute beside this one.

# With 16, a step would take a tenth less time on one or two cores, and far more on eight: a
# batch of 64 would be only four shards.
SHARD_IMAGES = 8
PREDICT_SHARD_IMAGES = 32  # without a backward pass less is kept, so more fits

workers = Workers(0)  # none, until use_cores() starts some


def use_cores(count):
    """Spreads the shards from now on over `count` processes, this one included.

    A GPU needs no more than this one."""
    global workers
    workers.close()
    workers = Workers(count - 1 if xp is np else 0)


def shards_of(N, size):
    """A batch of N images as [(0, slice of the first `size`), (1, the next), …]; one on a GPU."""
    if xp is not np:
        return [(0, slice(0, N))]
    starts = range(0, N, size)
    return list(enumerate(slice(start, min(start + size, N)) for start in starts))


def over_cores(work, shards):
    """work(shards), a list with one result for each shard; each core does a part of it."""
    cores = min(1 + len(workers.workers), len(shards))
    bounds = [i * len(shards) // cores for i in range(cores + 1)]
    parts = workers.map(work, [shards[start:stop] for start, stop in zip(bounds, bounds[1:])])
    return [result for part in parts for result in part]


ORDER, STEP, INIT = 1, 2, 3  # what random numbers are for: each purpose has a stream of its own


def random_stream(seed, purpose, epoch=0, step=0):
    """A generator of random numbers that depends on its arguments alone.

    Philox is a generator without a memory: it scrambles a key and a counter. So a continued run
    needs no saved state of a generator, and draws exactly what it would have drawn."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, epoch]))


def device_stream(key):
    """A generator that depends on the key alone, on the device that xp computes on."""
    if xp is not np:
        return gpu.Stream(gpu.cuda(), key)
    return np.random.Generator(np.random.Philox(key=key))


def gradients_of_shards(params, images, labels, settings, keys, network, shards):
    """[(loss, gradient of all parameters as one vector)]: what each shard adds to the batch's."""
    prepared = winograd.prepare(params)  # once for all shards
    results = []
    for i, shard in shards:
        rng = device_stream(keys[i]) if keys is not None else None
        part, part_labels = images[shard], labels[shard]
        share = len(part) / len(images)  # the batch's mean, from the shards' means
        loss, gradients = learn_from(prepared, part, part_labels, settings, rng, network, share)
        results.append((loss, xp.concatenate([gradients[name].reshape(-1) for name in params])))
    return results


def loss_and_gradients(params, images, labels, settings, rng=None, network=RESNET9):
    """learn_from() on all cores: (mean loss, {name: gradient}) of a batch.

    images are (N, 28, 28) pixels 0…255, labels (N,) digits. rng, any NumPy generator, turns dropout
    and augmentation on. All is in the dtype of params."""
    shards = shards_of(len(images), SHARD_IMAGES)
    keys = rng.integers(2**63, size=len(shards)) if rng is not None else None  # a stream per shard
    work = functools.partial(
        gradients_of_shards, dict(params), images, labels, settings, keys, network
    )
    results = over_cores(work, shards)
    loss, flat = results[0]
    for shard_loss, shard_flat in results[1:]:
        loss = loss + shard_loss
        flat += shard_flat
    return loss, Parameters(params, flat)


def logits_of_shards(params, images, settings, network, shards):
    """[logits] of each shard, without dropout."""
    prepared = winograd.prepare(params, to_learn=False)
    dtype = dtype_of(params)
    return [
        network.forward(prepared, to_input(images[shard], dtype), settings)[0]
        for _, shard in shards
    ]


def predict(params, images, settings, network=RESNET9):
    """Pixels 0…255 (N, 28, 28) → logits (N, 10), without dropout, in the dtype of params."""
    work = functools.partial(logits_of_shards, dict(params), images, settings, network)
    return xp.concatenate(over_cores(work, shards_of(len(images), PREDICT_SHARD_IMAGES)))


# ── Evaluation and checkpoints ────────────────────────────────────────────────────────────────────

TRAIN_EVALUATION_IMAGES = 10_000  # train loss and accuracy are measured on the first of them
PREDICT_IMAGES = 1024  # at once; what backward would need of all 10,000 fills many GB of a GPU


def evaluate(params, images, labels, settings, network=RESNET9):
    """(mean loss, accuracy 0…1, probabilities (N, 10)) of images (N, 28, 28), without dropout."""
    parts = []
    for start in range(0, len(images), PREDICT_IMAGES):
        parts.append(predict(params, images[start : start + PREDICT_IMAGES], settings, network))
    return scores(xp.concatenate(parts), labels)


def scores(logits, labels):
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


def load_checkpoint(path, settings, network=RESNET9, to_continue=False):
    """The State that checkpoint_of() packed. UserError if it is damaged or of another network, or,
    to continue it, of another experiment."""
    state = init_state(settings, network)
    views = state.views()
    same = {"pool": settings.pool, "optimizer": settings.optimizer}  # shapes show the others
    if to_continue:
        same = experiment_of(settings)
    arrays, state.step, state.history = read_checkpoint(path, views, same)
    if "moments" not in arrays:
        state.weights_only = True  # the mean ones, that is, if there is a mean
        del views["moments"]
    for name, a in views.items():
        a[...] = xp.asarray(arrays[name if name in arrays else name.removeprefix("ema.")])
    return state


# ── Training ──────────────────────────────────────────────────────────────────────────────────────

BETA1 = {"sgd": 0.0, "adam": 0.9, "muon": 0.95}


def plan_of_step(step, rate, settings):
    """The numbers that change from step to step, as support/gpu.py takes them."""
    t = step + 1
    return (
        rate,
        1 - rate * settings.weight_decay,
        rate / (1 - BETA1[settings.optimizer] ** t),
        1 - settings.beta2**t,
        1 - ema_keeps(settings, step),
    )


class Run:
    """A training run: its data, its folder and its state, new or from the last checkpoint."""

    use_device, use_cores = staticmethod(use_device), staticmethod(use_cores)

    def __init__(self, settings, network, data, device, scripts):
        count = settings.train_images or len(data.train_images)
        held_out = settings.validation_images
        if count > len(data.train_images):
            raise UserError(
                f"train_images is {count}, but the data set has {len(data.train_images)}"
            )
        if held_out >= count:
            raise UserError(
                f"validation_images is {held_out}, "
                f"but should leave some of the {count} images to train on"
            )
        self.settings, self.network = settings, network
        self.on_gpu = xp is not np
        self.stop = 0  # the number of the signal that asked for an end, or 0
        self.unsaved = 0  # epochs in a row that could not be saved

        config = {
            "settings": asdict(settings) | {"channels": list(settings.channels)},
            "data": {"name": data.name, "sha256": data.hashes},
            "device": device,
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                xp.__name__: xp.__version__,
            },
        }
        free = set(NOT_THE_EXPERIMENT)
        if settings.schedule != "constant":
            free.remove("epochs_max")  # the learning rate depends on it
        folder = project_path(settings.save_dir) / settings.tag
        self.folder = RunFolder(folder, config, free, asdict(type(settings)()), scripts)
        state = self.folder.restore(
            lambda path: load_checkpoint(path, settings, network, to_continue=True)
        )
        self.resumed = state is not None
        self.state = state or init_state(settings, network)
        if len(self.state.history) <= settings.epochs_max:  # there is work to do
            if self.state.weights_only:
                raise UserError(
                    f"{folder} has the weights alone, which is too little to continue; "
                    "choose another --tag"
                )
            self.folder.write_config()
        lost = [math.nan] * (3 if held_out else 2)
        self.metrics = self.folder.restore_metrics(self.state.history, lost)

        train = count - held_out
        self.images = xp.asarray(data.train_images[:train])
        self.labels = xp.asarray(data.train_labels[:train])
        self.validation_images = xp.asarray(data.train_images[train:count])
        self.validation_labels = xp.asarray(data.train_labels[train:count])
        self.test_images = xp.asarray(data.test_images)
        self.test_labels = xp.asarray(data.test_labels)
        self.epoch_steps = math.ceil(train / settings.batch_size)  # the last may have fewer images
        self.total_steps = self.epoch_steps * settings.epochs_max
        self.fast, self.why_plain = self.fast_path()

    def fast_path(self):
        """The GPU's fast path (support/gpu.py) or None, and why a GPU has to do without it."""
        if not self.on_gpu:
            return None, ""
        if self.network is not RESNET9:
            return None, "plain operations: another network than ResNet9"
        beta1 = BETA1[self.settings.optimizer]
        return gpu.fast_path(
            self.settings, self.state, self.images, self.labels, bumps(28, 28, xp), beta1
        )

    def train(self):
        """Trains until epochs_max or a stop signal. Returns the exit status."""
        settings, state = self.settings, self.state
        if not state.history:
            self.end_epoch(0, time.perf_counter(), 0)
        self.first_step, self.first_time = state.step, time.perf_counter()
        while len(state.history) <= settings.epochs_max:
            if self.stop:
                return self.stopped()
            if self.unsaved >= settings.unsaved_epochs:
                return self.given_up()
            self.train_epoch(len(state.history))
        return self.finished()

    def train_epoch(self, epoch):
        """One pass over the training images in random order, or what is left of it."""
        settings, state, B = self.settings, self.state, self.settings.batch_size
        start = time.perf_counter()
        order = self.order_of(epoch)
        done = state.step - (epoch - 1) * self.epoch_steps  # 0, or where this epoch was interrupted
        if self.fast:
            self.begin_fast_epoch(epoch, order, done)
        with self.progress(epoch, done) as bar:
            for step in bar:
                if self.fast:  # what stands below as one CUDA graph: support/gpu.py
                    loss = self.fast_step(step)
                else:
                    batch = order[step * B : (step + 1) * B]
                    rng = random_stream(settings.seed, STEP, epoch, step)
                    rate = learning_rate(state.step, self.total_steps, settings)
                    loss = self.step(batch, rng, rate)
                self.watch(loss, epoch, step, bar)
                if self.stop:
                    break
        if state.step == epoch * self.epoch_steps:
            self.end_epoch(epoch, start, len(self.images) - done * B)

    def order_of(self, epoch):
        """The order in which this epoch takes the images."""
        rng = random_stream(self.settings.seed, ORDER, epoch)
        return xp.asarray(rng.permutation(len(self.images)))

    def begin_fast_epoch(self, epoch, order, done):
        """Gives the fast path what differs from step to step."""
        settings, first = self.settings, (epoch - 1) * self.epoch_steps
        keys = [
            random_stream(settings.seed, STEP, epoch, step).integers(2**63)
            for step in range(self.epoch_steps)
        ]
        steps = range(first, first + self.epoch_steps)
        rates = [learning_rate(step, self.total_steps, settings) for step in steps]
        plan = [plan_of_step(step, rate, settings) for step, rate in zip(steps, rates)]
        self.fast.begin_epoch(order, keys, plan, done)

    def fast_step(self, step):
        return self.fast.step(self.state, step)

    def step(self, batch, rng, rate):
        """Learns from the images with these indices. Returns their loss."""
        return self.learn(self.images[batch], self.labels[batch], rng, rate)

    def learn(self, images, labels, rng, rate):
        """Forward, loss and backward, which are learn_from() on all cores, and the update."""
        loss, gradients = loss_and_gradients(
            self.state.params, images, labels, self.settings, rng, self.network
        )
        update(self.state, gradients, self.settings, rate)
        return loss

    def evaluate(self, images, labels):
        if self.fast:
            return scores(self.fast.predict(images), labels)
        return evaluate(self.state.averaged(), images, labels, self.settings, self.network)

    def end_epoch(self, epoch, start, images_seen):
        """Evaluates, logs and saves.

        The checkpoint comes last: a crash before it leaves only what restore() removes."""
        settings, state, folder = self.settings, self.state, self.folder
        trained = time.perf_counter() - start
        part = slice(0, TRAIN_EVALUATION_IMAGES)
        train_loss, train_accuracy, _ = self.evaluate(self.images[part], self.labels[part])
        test_loss, test_accuracy, probs = self.evaluate(self.test_images, self.test_labels)
        validation = []
        if settings.validation_images:
            _, accuracy, _ = self.evaluate(self.validation_images, self.validation_labels)
            validation.append(accuracy)
        finite = state.is_finite()
        self.check_finite(train_loss + test_loss if finite else math.nan, f"epoch {epoch}")
        seconds = time.perf_counter() - start

        rate = learning_rate(max(0, state.step - 1), self.total_steps, settings)
        best = test_accuracy > max((row.test_accuracy for row in state.history), default=-1)
        row = Epoch(epoch, rate, train_loss, train_accuracy, test_loss, test_accuracy)
        state.history.append(row)
        self.metrics.append([*row, seconds, images_seen / seconds, *validation])
        # What the epoch would have taken, had it not been interrupted.
        whole = trained * len(self.images) / max(1, images_seen) + seconds - trained
        folder.log(log_line(self.metrics[-1], whole * (settings.epochs_max - epoch)))

        folder.write(folder.path / "metrics.csv", lambda path: write_metrics(path, self.metrics))
        self.save_predictions(probs)
        if best:
            self.save(folder.best)
        else:
            folder.write_unsaved(folder.best)
        saved = self.save(folder.last)
        self.unsaved = 0 if saved else self.unsaved + 1

    def save_predictions(self, probs):
        predictions = {
            "labels": to_host(self.test_labels),
            "predictions": to_host(probs.argmax(axis=1)),
            "probabilities": to_host(probs),
        }
        packed = pack_arrays(**predictions)
        self.folder.write(
            self.folder.path / "predictions.npz", lambda path: write_file(path, packed)
        )

    def make_up_for_failed_saves(self):
        """Writes what a finished run could not save after its last epoch, on a full disk, say."""
        last = self.state.history[-1]
        best = max(self.state.history, key=lambda row: row.test_accuracy)
        if self.folder.predicted_accuracy() != last.test_accuracy:
            print("*** predictions.npz is not that of the last epoch: it is written now.")
            self.save_predictions(self.evaluate(self.test_images, self.test_labels)[2])
        if best is last and self.saved_best() != best.epoch:
            print("*** checkpoint_best.npz is not that of the best epoch: it is written now.")
            self.save(self.folder.best)

    def saved_best(self):
        """The epoch of checkpoint_best.npz; None if the file is missing or damaged."""
        if not self.folder.best.exists():
            return None
        try:
            state = load_checkpoint(self.folder.best, self.settings, self.network)
        except Unreadable:
            raise
        except UserError:
            return None
        return state.history[-1].epoch if state.history else None

    def save(self, path):
        """Writes a checkpoint. Returns whether it could."""
        checkpoint = checkpoint_of(self.state, self.settings)
        previous = self.folder.previous if path == self.folder.last else None
        return self.folder.write(path, lambda path: write_file(path, checkpoint, previous))

    def progress(self, epoch, done):
        """The numbers of the steps to do, with a progress bar."""
        return tqdm(
            range(done, self.epoch_steps),
            f"epoch {epoch}",
            initial=done,
            total=self.epoch_steps,
            unit="step",
            leave=False,
            disable=None,
            dynamic_ncols=True,
        )

    def watch(self, loss, epoch, step, bar):
        """After each step: checks and shows the loss, and says once how long the run takes."""
        taken = self.state.step - self.first_step
        enough = 51 if self.on_gpu else 20
        timed = min(enough, self.epoch_steps - self.first_step % self.epoch_steps)
        # Reading a number makes a GPU finish all its work first, as the clock needs it.
        if not self.on_gpu or taken % 50 == 1 or taken == timed:
            self.check_finite(loss, f"epoch {epoch}, step {step + 1}")
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
        if taken == timed:
            self.say_how_long((time.perf_counter() - self.first_time) / timed)

    def check_finite(self, loss, where):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss)} at {where}: "
                f"learning rate {self.settings.learning_rate:g} is probably too high; "
                f"the checkpoints in {self.folder.path} are those from before; "
                "try a lower one, with another --tag"
            )

    def say_how_long(self, step_seconds):
        settings = self.settings
        epochs_left = settings.epochs_max + 1 - len(self.state.history)
        evaluated = len(self.test_images) + min(len(self.images), TRAIN_EVALUATION_IMAGES)
        evaluation = evaluated / settings.batch_size / 3  # in steps: forward is a third of one
        steps = self.total_steps - self.state.step + evaluation * epochs_left
        self.folder.log(
            f"About {duration(step_seconds * steps)} to epoch {settings.epochs_max} "
            "on this machine. Ctrl-C is safe: the same command continues."
        )

    def ask_to_stop(self, number, _frame):
        self.stop = number
        workers.hurry()

    def stopped(self):
        """Saves what there is after a stop signal. Returns the exit status."""
        saved = self.save(self.folder.last)
        what = "everything is saved" if saved else "what came after the last checkpoint is LOST"
        again = terminal.this_command()
        self.folder.log(f"Stopped after step {self.state.step:,}; {what}. To continue: {again}")
        return 128 + self.stop

    def given_up(self):
        """Ends a run whose epochs would be lost one after the other. Returns the exit status."""
        self.folder.log(
            f"*** The last {self.unsaved} epochs could not be saved, so the run ends here. "
            f"Make room in {terminal.shown(self.folder.path)}; to continue from what is saved: "
            f"{terminal.this_command()}"
        )
        return 1

    def finished(self):
        figures = f"python {terminal.shown(ROOT / 'plot_figs.py')} {self.settings.tag}"
        runs = self.folder.path.parent
        if runs != project_path(Settings.save_dir):
            figures += f" --save-dir {shlex.quote(terminal.shown(runs))}"
        self.folder.log(f"Finished. {self.result()} Figures: {figures}")
        if not self.folder.write_unsaved():
            print("*** Some files were not written: see above.", file=sys.stderr)
            return 1
        return 0

    def result(self):
        last = self.state.history[-1]
        best = max(self.state.history, key=lambda row: row.test_accuracy)
        return (
            f"Test accuracy {last.test_accuracy:.2%} at the last epoch ({last.epoch}), "
            f"{best.test_accuracy:.2%} at the best ({best.epoch})."
        )

    def log_start(self, data, device, cores):
        settings, folder = self.settings, self.folder
        for note in data.notes:
            folder.log(f"*** {note}")
        images = f"{len(self.images):,} images, {self.epoch_steps} steps an epoch"
        folder.log(f"{settings.tag}: {data.name}, {images}")
        where = device
        if not self.on_gpu:
            where += f", {cores} core" if cores == 1 else f", {cores} cores"
        if self.why_plain:
            where += f" ({self.why_plain})"
        path = terminal.shown(folder.path)
        folder.log(f"{self.state.params.flat.size:,} parameters; {where}; files in {path}")
        if self.resumed:
            folder.log(f"Continuing after step {self.state.step:,} of {self.total_steps:,}.")
        folder.log(log_header(settings.validation_images))


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────

# What a run keeps a copy of, in save/<tag>/code/.
SCRIPTS = (
    ROOT / "mnist_resnet9.py",
    ROOT / "plot_figs.py",
    *sorted((ROOT / "support").glob("*.py")),
    ROOT / "support" / "gpu.cu",
)


@gpu.errors_in_a_line()
def run(settings, network=RESNET9, scripts=SCRIPTS, kind=Run):
    """Starts or continues the run that settings define. Returns the exit status."""
    device = kind.use_device(settings.device)
    data = load_mnist(settings.data_dir)
    training = kind(settings, network, data, device, scripts)
    if len(training.state.history) > settings.epochs_max:
        training.make_up_for_failed_saves()
        longer = settings.schedule == "constant" and not training.state.weights_only
        further = "raise --epochs-max" if longer else "take another --tag"
        print(f"{settings.tag} is finished. {training.result()} To go further, {further}.")
        return 0 if training.folder.write_unsaved() else 1
    cores = settings.threads or available_cores()
    training.folder.keep_code()
    training.log_start(data, device, cores)
    with terminal.signals_to(training.ask_to_stop, terminal.stop_signals()):
        try:
            kind.use_cores(cores)
            return training.train()
        finally:
            training.folder.close()
            workers.close()


def start_run(arguments):
    return run(parse_settings(arguments))


def main(arguments=(), start=start_run):
    """Runs a command line, start(arguments), as `main(["--tag", "mine"])` in a notebook does.

    Returns the exit status: 0, 1 if something could not be saved, 2 after an error that the user
    can put right (one line says it), or 128 + the number of a signal."""
    terminal.prepare()
    prepare_process()
    warnings.simplefilter("ignore", RuntimeWarning)  # overflow shows in the loss, which is checked
    try:
        return start([str(argument) for argument in arguments])
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError as error:
        reason = " ".join(str(error).split()) or "no more is there"
        print(
            f"Out of memory ({reason}). What was saved stays; a smaller --batch-size takes less.",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`
        return 128 + 13  # SIGPIPE, which ends other programs then
    except OSError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the training or after it: within, it saves what there is
        print("Stopped; there is nothing to save.", file=sys.stderr)
        return 130
    finally:
        terminal.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
