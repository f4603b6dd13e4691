"""ResNet9 on MNIST, every forward and backward pass written by hand on NumPy or CuPy.

    python mnist_resnet9.py                  train; the same command again continues a run that was stopped
    python mnist_resnet9.py --recipe quick   three epochs, to a test accuracy of 99.64 % (mean of ten seeds)
    python mnist_resnet9.py --help           every setting; each can also be edited below, under "Settings"
    python plot_figs.py                      curves and failures of the run, afterwards or while it is going on
    python predict.py my_digit.png           what the network takes your own digit for

The network has nine layers with weights. Letters: H, W rows and columns of the image, N images, C channels
coming in, K channels going out, F features of one image.

    layer          what it does                                               output (H, W, N, K)   parameters
    conv1          3×3 convolution, relu (what is below 0 becomes 0)          28, 28, N,  4                 40
    conv2          3×3 convolution, relu                                      28, 28, N, 16                592
    conv3, conv4   residual block: relu(x + conv4(relu(conv3(x))))            28, 28, N, 16              4,640
    pool           the largest (or the mean) of each 2×2 window               14, 14, N, 16
    conv5          3×3 convolution, relu                                      14, 14, N, 32              4,640
    conv6          3×3 convolution, relu                                      14, 14, N, 64             18,496
    conv7, conv8   residual block                                             14, 14, N, 64             73,856
    pool           the largest (or the mean) of each 2×2 window                7,  7, N, 64
    dropout        switches a random share of the features off                N, 3136
    fc9            linear: ten scores (logits); the largest is the answer     N, 10                     31,370

How to read it. Every operation is a pair of functions: `y, cache = op(x, …)`, and directly under it
`op_backward(dy, cache)`. dy is the gradient of the loss with respect to y and has y's shape; the backward pass
turns it into dx, dw and db, the gradients with respect to what went in. The cache is what the backward pass will
need of the forward pass. That is all of backpropagation: the network calls the pairs in order, then in reverse.
"""

import functools
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from support import ROOT, UserError, winograd
from support.checkpoints import read_checkpoint, write_checkpoint
from support.mnist import find_mnist
from support.run_folder import RunFolder, duration, log_header, log_line, write_metrics
from support.settings import Parser, check_settings, setting
from support.storage import save_arrays
from support.workers import Workers, available_cores

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Settings:
    """What defines a run. Edit the defaults here, or give them as flags: epochs_max is --epochs-max."""
    tag: str = setting("resnet9", "name of the run; its files go to save/<tag>/")
    seed: int = setting(0, "start of all random numbers: the same seed gives the same run", between=(0, 2**63 - 1))
    device: str = setting("auto", "auto takes the GPU when CuPy can use it", choices=("auto", "cpu", "gpu"))
    data_dir: str = setting("data", "folder with the four MNIST idx files; they are downloaded there if missing")
    save_dir: str = setting("save", "folder that holds one folder for each run")
    train_images: int = setting(0, "use only the first so many training images; 0 = all", between=(0, 10**9))
    validation_images: int = setting(0, "hold out so many, the last ones, to choose settings", between=(0, 10**9))
    epochs_max: int = setting(200, "passes over the training images", between=(1, 10**6))
    batch_size: int = setting(64, "images a step: small for many updates, large for fast matrix products", between=(1, 10**6))
    learning_rate: float = setting(1e-4, "step size of the optimizer; the peak of one_cycle", between=(0, 1000))
    optimizer: str = setting("adam", "sgd: down the gradient; adam: evened out; muon: by whole directions", choices=("sgd", "adam", "muon"))
    momentum: float = setting(0.9, "how much of its last step sgd keeps", between=(0, 0.9999))
    beta2: float = setting(0.999, "how much of its mean squared gradient adam or muon keeps a step", between=(0, 0.999999))
    weight_decay: float = setting(0.0, "share taken off each weight, times the learning rate", between=(0, 1000))
    schedule: str = setting("constant", "one_cycle warms up, then cools down to 0", choices=("constant", "one_cycle"))
    warm_up: float = setting(0.3, "share of all steps in which one_cycle warms up", between=(0, 0.9))
    dropout: float = setting(0.9, "share of the features that a training step switches off", between=(0, 0.9999))
    pool: str = setting("max", "what a pooling window passes on", choices=("max", "avg"))
    channels: tuple = setting((4, 16, 32, 64), "channels after conv1, conv2, conv5 and conv6")
    label_smoothing: float = setting(0.0, "share of each label that goes to all ten classes alike", between=(0, 0.99))
    augment: float = setting(0.0, "random turn, scale, shear and shift: 1 = ±12°, ±2 pixels; 0 = off", between=(0, 10))
    elastic: float = setting(0.0, "random smooth bending of the images, in pixels (standard deviation)", between=(0, 10))
    ema: float = setting(0.0, "share kept a step by the mean of the weights to evaluate with; 0 = off", between=(0, 0.999999))
    threads: int = setting(0, "CPU cores to compute on, a process on each, without influence on the result; 0 = all", between=(0, 256))

    def __post_init__(self):
        check_settings(self)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.tag):
            raise UserError(f"tag {self.tag!r} is no folder name: letters, digits, '.', '_' and '-', at most 100")
        if len(self.channels) != 4 or not all(isinstance(c, int) and 1 <= c <= 1024 for c in self.channels):
            raise UserError(f"channels {self.channels} should be four whole numbers from 1 to 1024, as 4,16,32,64")

# What `--recipe NAME` changes, before the other flags; chosen on held-out training images: benchmarks/README.md.
RECIPES = {
    "reference": {},
    "quick": dict(epochs_max=3, optimizer="muon", learning_rate=2e-3, schedule="one_cycle", warm_up=0.15, beta2=0.99,
                  weight_decay=0.3, dropout=0.15, label_smoothing=0.05, augment=0.6, elastic=0.5, ema=0.99),
}
RECIPES["record"] = RECIPES["quick"] | dict(epochs_max=9, channels=(16, 16, 48, 96), learning_rate=1.5e-3,
                                            weight_decay=0.2, ema=0.995)  # fmt: skip

# These say where and how a run is computed, not what is computed: they may differ when it is continued.
NOT_THE_EXPERIMENT = ("device", "data_dir", "save_dir", "epochs_max", "threads")

def parse_settings(arguments=None, kind=Settings, **preset):
    """The settings of a command line: defaults, then preset, then the recipe, then the flags. UserError if wrong."""
    parser = Parser(description="Train ResNet9 on MNIST.", allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="reference", help="a tried set of settings; flags come on top")
    given = parser.read_settings(kind, arguments)
    return kind(**{**preset, **RECIPES[given.pop("recipe")], **given})

# ── Array module ──────────────────────────────────────────────────────────────────────────────────────────────────
# xp is NumPy or CuPy; both have the same functions, so the network is written once for CPU and GPU.

xp = np

def use_device(device):
    """Points xp to CuPy or NumPy as `device` asks (auto, cpu, gpu). Returns a line that says what was taken and why."""
    global xp
    xp = np
    if device == "cpu":
        return "CPU"
    try:
        import cupy
        if not cupy.is_available():
            raise RuntimeError("CuPy finds no CUDA device")
        a = cupy.arange(6, dtype=cupy.float32).reshape(2, 3)
        if float((a @ a.T + cupy.exp(-a).sum()).sum()) <= 0:  # elementwise, matrix product (GEMM), sum
            raise RuntimeError("a first computation on the GPU gave a wrong result")
        xp = cupy
        return f"GPU, {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}"
    except Exception as error:  # ImportError, or any of many ways in which a CUDA installation is incomplete
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if device == "gpu":
            raise UserError(f"device gpu cannot be used: {reason}; --device cpu works everywhere") from None
        return f"CPU (no GPU: {reason})"

def to_host(a):
    """A NumPy array with the contents of a."""
    return a if isinstance(a, np.ndarray) else a.get()

# ── Cores ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Nothing in the network mixes images (no batch normalisation), so a batch's gradient is the sum of its images': a batch
# is cut into shards, each core takes some, and the results are added in the order of the shards. The size of a shard is
# fixed, so the result has the same bits on one core or sixteen. support/workers.py has the processes that compute beside this.

SHARD_IMAGES = 16  # small enough for the caches, large enough that a NumPy call costs more than calling it
PREDICT_SHARD_IMAGES = 32  # there is more to predict than a batch, so shards may be larger: fewer NumPy calls

workers = Workers(0)  # none, until use_cores() starts some

def use_cores(count):
    """Spreads the shards from now on over so many processes, this one among them; a GPU needs no more than this one."""
    global workers
    workers.close()
    workers = Workers(count - 1 if xp is np else 0)

def shards_of(N, size):
    """[(0, the first `size` images), (1, the next), …] as slices of a batch of N; on a GPU all images are one shard."""
    if xp is not np:
        return [(0, slice(0, N))]
    return list(enumerate(slice(start, min(start + size, N)) for start in range(0, N, size)))

def over_cores(work, shards):
    """The list work(shards), which has a result for each shard, made of such lists for some shards a core."""
    cores = min(1 + len(workers.workers), len(shards))
    bounds = [i * len(shards) // cores for i in range(cores + 1)]
    parts = workers.map(work, [shards[start:stop] for start, stop in zip(bounds, bounds[1:])])
    return [result for part in parts for result in part]

# ── Random numbers ────────────────────────────────────────────────────────────────────────────────────────────────

ORDER, STEP, INIT = 1, 2, 3  # what random numbers are for; each purpose has a stream of its own

def random_stream(seed, purpose, epoch=0, step=0):
    """A generator that is a function of its arguments alone (Philox scrambles key and counter, and remembers nothing).
    So a run that is continued needs no saved state of a generator, and draws exactly what it would have drawn."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, epoch]))

def device_stream(key):
    """A generator that is a function of the key, on the device that xp computes on."""
    if xp is not np:
        return xp.random.Generator(xp.random.Philox4x3210(int(key)))
    return np.random.Generator(np.random.Philox(key=key))

# ── Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# 60,000 images of digits to train on and 10,000 to test with. support/mnist.py finds, downloads and verifies the files.

@dataclass(frozen=True)
class Dataset:
    name: str  # what figures and logs call it
    hashes: dict  # file name → SHA-256 of the decompressed file
    notes: tuple  # what the user should know about where the data came from
    train_images: Any  # (60000, 28, 28) uint8
    train_labels: Any  # (60000,) uint8
    test_images: Any  # (10000, 28, 28) uint8
    test_labels: Any  # (10000,) uint8

def read_idx(content):
    """The array in the bytes of an idx file, MNIST's format: images (N, 28, 28) or labels (N,).

    Two zero bytes, a byte for the kind of number (8: uint8), a byte for the number of axes; then the length of each
    axis in four bytes, the most significant first (">u4"); then the numbers."""
    axes = content[3]
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)

def load_mnist(data_dir="data"):
    """The data set in data_dir (taken from the script's folder if relative), downloaded first where it is missing."""
    files = find_mnist(data_dir)
    arrays = {role: read_idx(content) for role, content in files.contents.items()}
    return Dataset(files.name, files.hashes, files.notes, **arrays)

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the 60,000 training images, pixels scaled to 0…1

def to_input(images, dtype):
    """(N, 28, 28) pixels 0…255 → the network's input (28, 28, N, 1), with mean 0 and variance 1 over the data set."""
    x = images.astype(dtype) / 255
    return ((x - PIXEL_MEAN) / PIXEL_STD).transpose(1, 2, 0)[..., None]

BEND_PIXELS = 4  # over about this distance neighbouring pixels move together

@functools.lru_cache(maxsize=None)
def bumps(H, W, _xp):
    """(J, H·W): J round bumps on a grid. Their sums with normal weights are smooth, with variance 1 at every pixel."""
    bells = []
    for L in (H, W):
        centres = np.linspace(0, L - 1, round(L / (BEND_PIXELS * math.sqrt(2))) + 1)[:, None]
        bells.append(np.exp(-((np.arange(L) - centres) ** 2) / (2 * BEND_PIXELS**2)))  # (centres, L), Gauss's curves
    both = np.kron(*bells)
    return xp.asarray(both / np.sqrt((both**2).sum(axis=0)), np.float32)

def augment(images, strength, rng, elastic=0):
    """Each image turned, scaled, sheared, shifted and bent at random: (N, 28, 28) → the same in float32, pixels 0…255.

    Every pixel of the result looks up where it came from: source = A (pixel − centre) + centre + shift + bend, and takes
    the mean of the four pixels around that point, weighted by nearness (bilinear). Outside the image all is 0. The bend
    is smooth: like ink on rubber, strokes keep their topology (Simard, Steinkraus and Platt 2003)."""
    N, H, W = images.shape
    r = strength * (2 * rng.random((6, N), dtype=xp.float32) - 1)  # (6, N) uniform in ±strength
    turn, shear = math.radians(12) * r[0], 0.15 * r[1]
    wide, high = 1 + 0.12 * r[2], 1 + 0.12 * r[3]
    cos, sin = xp.cos(turn), xp.sin(turn)
    A = xp.stack([cos / high, sin / high, (shear * cos - sin) / wide, (shear * sin + cos) / wide])  # (4, N)
    y, x = xp.meshgrid(xp.arange(H) - (H - 1) / 2, xp.arange(W) - (W - 1) / 2, indexing="ij")
    y, x = y.ravel().astype(xp.float32), x.ravel().astype(xp.float32)  # (H·W,) from the centre
    row = A[0][:, None] * y + A[1][:, None] * x + (2 * r[4] + (H - 1) / 2)[:, None]  # (N, H·W)
    col = A[2][:, None] * y + A[3][:, None] * x + (2 * r[5] + (W - 1) / 2)[:, None]
    if elastic:
        smooth = bumps(H, W, xp)  # (J, H·W)
        row += elastic * (rng.standard_normal((N, len(smooth)), dtype=xp.float32) @ smooth)
        col += elastic * (rng.standard_normal((N, len(smooth)), dtype=xp.float32) @ smooth)
    row, col = xp.clip(row, -1, H), xp.clip(col, -1, W)  # all that lies outside meets the border of zeros
    padded = xp.zeros((N, H + 3, W + 3), xp.float32)
    padded[:, 1 : H + 1, 1 : W + 1] = images
    top, left = xp.floor(row), xp.floor(col)
    down, right = row - top, col - left  # how far below and to the right of the top left neighbour
    at = (top.astype(xp.int32) + 1) * (W + 3) + left.astype(xp.int32) + 1 + xp.arange(N)[:, None] * ((H + 3) * (W + 3))
    pixels = padded.ravel()
    upper = pixels[at] * (1 - right) + pixels[at + 1] * right
    lower = pixels[at + W + 3] * (1 - right) + pixels[at + W + 4] * right
    return (upper * (1 - down) + lower * down).reshape(N, H, W)

# ── Operations ────────────────────────────────────────────────────────────────────────────────────────────────────
# Each comes with its backward pass directly underneath. The chain rule is the only rule: from dy, the gradient of
# the loss with respect to y, follows dx = dy · ∂y/∂x. Where x goes into y in several ways, its gradients add.

def relu(x, out=None):
    """y = max(x, 0), element by element; out is where to write y, x itself if nobody needs it any more."""
    mask = x > 0
    return xp.multiply(x, mask, out=out), mask  # cache: where x > 0; the slope needs no more

def relu_backward(dy, mask):
    """dx = dy where x > 0, and 0 elsewhere: the slope is 1 or 0."""
    return dy * mask

def softmax(x):
    """probs = exp(x) / Σ exp(x), row by row: (N, K) numbers → (N, K) probabilities."""
    e = xp.exp(x - x.max(axis=1, keepdims=True))  # subtracting the maximum changes no probability, and never overflows
    probs = e / e.sum(axis=1, keepdims=True)
    return probs, probs

def softmax_backward(dprobs, probs):
    """From ∂probs_i/∂x_j = probs_i (1[i=j] − probs_j): dx = probs · (dprobs − Σ dprobs · probs)."""
    return probs * (dprobs - (dprobs * probs).sum(axis=1, keepdims=True))

def cross_entropy(probs, labels):
    """loss = −mean log probs[n, labels[n]]: probs (N, K), labels (N,) → a number; 0 when all are right and sure."""
    N = len(labels)
    return -xp.log(probs[xp.arange(N), labels]).mean(), (probs, labels)

def cross_entropy_backward(dloss, cache):
    """dprobs = −dloss / (N · probs) at the label, 0 elsewhere."""
    probs, labels = cache
    at, dprobs = (xp.arange(len(labels)), labels), xp.zeros_like(probs)
    dprobs[at] = -dloss / (len(labels) * probs[at])  # 1/N comes from the mean
    return dprobs

def cross_entropy_loss(logits, labels, smoothing=0):
    """Softmax and cross-entropy in one: loss = mean (log Σ exp(logits) − logits[label]). What the training uses.

    Working with logarithms throughout, it stays exact where a probability is too small for a float. smoothing is the
    share of the label that all K classes get alike, so that logits need not grow for ever: Szegedy et al. 2016."""
    shifted = logits - logits.max(axis=1, keepdims=True)  # (N, K)
    log_sum = xp.log(xp.exp(shifted).sum(axis=1))  # (N,)
    log_probs = shifted - log_sum[:, None]
    loss = (log_sum - shifted[xp.arange(len(labels)), labels]).mean()
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_probs.mean()
    return loss, (log_probs, labels, smoothing)  # cache: exp(log_probs) are the probabilities

def cross_entropy_loss_backward(dloss, cache):
    """From d(log Σ exp)/dlogits = probs and d(logits[label])/dlogits = onehot: dlogits = (probs − onehot) dloss / N.
    With smoothing, (1 − smoothing) onehot + smoothing / K takes the place of onehot."""
    log_probs, labels, smoothing = cache
    dlogits = xp.exp(log_probs)
    dlogits[xp.arange(len(labels)), labels] -= 1 - smoothing
    dlogits -= smoothing / dlogits.shape[1]
    return dlogits * (dloss / len(labels))  # 1/N enters here, from the mean

def dropout(x, rate, rng):
    """Switches each feature off with probability `rate`; the others grow by 1/(1 − rate), so the expectation stays.
    Without rng (evaluation) y = x. Srivastava et al. 2014, in its inverted form."""
    if rng is None or rate == 0:
        return x, None
    mask = (rng.random(x.shape, dtype=xp.float32) >= rate) * x.dtype.type(1 / (1 - rate))
    return x * mask, mask  # cache: which features were on, and their factor

def dropout_backward(dy, mask):
    """From y = x · mask: dx = dy · mask."""
    return dy if mask is None else dy * mask

def linear(x, w, b):
    """y = x @ w + b: (N, F) @ (F, K) + (K,)."""
    return x @ w + b, (x, w)  # cache: each factor is the other one's slope

def linear_backward(dy, cache):
    """From y = x @ w + b: dx = dy wᵀ, dw = xᵀ dy, db = Σ dy."""
    x, w = cache
    dx = dy @ w.T  # (N, F)
    dw = x.T @ dy  # (F, K), the sum over the images
    db = dy.sum(axis=0)  # (K,)
    return dx, dw, db

def windows(x, size):
    """The size×size windows of x as a view: (H, W, N, C) → (H/size, size, W/size, size, N, C)."""
    H, W, N, C = x.shape
    h, w = H // size, W // size  # a last row or column that fills no window is left out
    return x[: h * size, : w * size].reshape(h, size, w, size, N, C)

def from_windows(d, shape):
    """The reverse: gradients of the windows as gradient of x; what no window covers gets 0."""
    h, size, w = d.shape[:3]
    d = d.reshape(h * size, w * size, *d.shape[4:])
    if d.shape == shape:
        return d
    dx = xp.zeros(shape, d.dtype)
    dx[: h * size, : w * size] = d
    return dx

def avg_pool2d(x, size=2):
    """y = mean of each size×size window: (H, W, N, C) → (H/size, W/size, N, C)."""
    return windows(x, size).mean(axis=(1, 3)), (x.shape, size)

def avg_pool2d_backward(dy, cache):
    """dx = dy / size²: every pixel of a window has that slope."""
    shape, size = cache  # a mean is linear, so no value of x was kept
    share = xp.broadcast_to((dy / size**2)[:, None, :, None], (dy.shape[0], size, dy.shape[1], size, *dy.shape[2:]))
    return from_windows(share, shape)

def max_pool2d(x, size=2):
    """y = maximum of each size×size window: (H, W, N, C) → (H/size, W/size, N, C).
    The cache is a mask of every position that equals the maximum, ties included. Pixels whose surroundings are
    equal (background) tie, but their values were summed up in different orders: equal means up to that rounding."""
    v = windows(x, size)
    y = functools.reduce(xp.maximum, (v[:, i, :, j] for i in range(size) for j in range(size)))
    rounding = 1e-5 if x.dtype == xp.float32 else 1e-12
    mask = v >= (y - rounding * (1 + abs(y)))[:, None, :, None]
    return y, (mask, x.shape)

def max_pool2d_backward(dy, cache):
    """dx = dy at every maximum of the window, and 0 elsewhere."""
    mask, shape = cache
    return from_windows(dy[:, None, :, None] * mask, shape)

# A convolution slides a k×k kernel over the image: each output is a weighted sum of the k×k pixels around its place,
# and of all their channels. Beyond the border there are zeros, so y is as large as x.
#
#     y[h, w] = b + Σ x[h + i − r, w + j − r] @ w[i, j]    over i, j = 0 … k − 1, with r = (k − 1) / 2
#
# x is (H, W, N, C), w is (k, k, C, K) with k odd, y is (H, W, N, K).

def surroundings(x, k):
    """The k×k pixels around each pixel, a column for each: (H, W, N, C) → (k·k·C, H·W·N).

    Moving one place along an axis of an array means going on by so many bytes in memory, its stride. The view below
    gives the steps i, j within a kernel the same strides as the steps h, w over the image, so view[i, j, c, h, w, n] is
    padded[h + i, w + j, n, c], without a copy; the reshape then copies it all at once."""
    H, W, N, C = x.shape
    r = k // 2
    padded = xp.zeros((H + 2 * r, W + 2 * r, N, C), x.dtype)
    padded[r : r + H, r : r + W] = x
    down, right, image, channel = padded.strides
    view = xp.lib.stride_tricks.as_strided(
        padded, (k, k, C, H, W, N), (down, right, channel, down, right, image)
    )
    return view.reshape(k * k * C, H * W * N)

def conv2d(x, w, b):
    """y = conv(x, w) + b: (H, W, N, C) → (H, W, N, K), as one matrix product."""
    if winograd.is_faster(w):  # the same result, faster: support/winograd.py
        return winograd.conv2d(x, w, b)
    H, W, N, C = x.shape
    k, K = w.shape[0], w.shape[3]
    cols = surroundings(x, k)  # (k·k·C, H·W·N)
    y = cols.T @ w.reshape(k * k * C, K) + b  # (H·W·N, K)
    return y.reshape(H, W, N, K), (cols, w)  # cache: as in linear, each factor is the other one's slope

def conv2d_backward(dy, cache, need_dx=True):
    """dx, dw, db; the first layer of a network does without dx, since images are not learnt.

    A pixel x[h, w] enters y[h − i + r, w − j + r] with the weight w[i, j]: dx is itself a convolution, of dy, with the
    kernel turned round by 180° and its channels swapped."""
    if isinstance(cache, winograd.Cache):
        return winograd.conv2d_backward(dy, cache, need_dx)
    cols, w = cache
    H, W, N, K = dy.shape
    k, C = w.shape[0], w.shape[2]
    columns = dy.reshape(H * W * N, K)
    dw = (cols @ columns).reshape(k, k, C, K)
    db = xp.ones(H * W * N, dy.dtype) @ columns  # Σ dy; as a product it takes a tenth of the time
    if not need_dx:
        return None, dw, db
    turned = w[::-1, ::-1].swapaxes(2, 3)  # (k, k, K, C)
    dx = surroundings(dy, k).T @ turned.reshape(k * k * K, C)  # (H·W·N, C)
    return dx.reshape(H, W, N, C), dw, db

# ── Blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────

def conv_block(x, w, b):
    """y = relu(conv(x, w) + b), (H, W, N, C) → (H, W, N, K)."""
    h, conv = conv2d(x, w, b)
    y, act = relu(h, out=h)
    return y, (conv, act)

def conv_block_backward(dy, cache, need_dx=True):
    """dx, dw, db: first back through relu, then through the convolution."""
    conv, act = cache
    return conv2d_backward(relu_backward(dy, act), conv, need_dx)

def residual_block(x, w1, b1, w2, b2):
    """relu(x + conv(relu(conv(x)))): two convolutions learn what to add to x. He et al. 2015, arXiv:1512.03385."""
    h, block = conv_block(x, w1, b1)
    h, conv = conv2d(h, w2, b2)
    h += x
    y, act = relu(h, out=h)
    return y, (block, conv, act)

def residual_block_backward(dy, cache):
    """dx, dw1, db1, dw2, db2. x forked: what comes back on the straight way and through the block adds."""
    block, conv, act = cache
    dsum = relu_backward(dy, act)  # of x + h: the gradient goes to both alike
    dh, dw2, db2 = conv2d_backward(dsum, conv)
    dh, dw1, db1 = conv_block_backward(dh, block)
    dh += dsum
    return dh, dw1, db1, dw2, db2

# ── The network ───────────────────────────────────────────────────────────────────────────────────────────────────

class Parameters(dict):
    """name → array, each a view of one flat vector: `.flat`. So an update of all of them is a few array operations."""
    def __init__(self, arrays, flat=None):
        """A copy of the arrays; or views of `flat`, shaped as they are."""
        self.flat = xp.concatenate([a.reshape(-1) for a in arrays.values()]) if flat is None else flat
        start = 0
        for name, a in arrays.items():
            self[name] = self.flat[start : start + a.size].reshape(a.shape)
            start += a.size

def init_params(settings, dtype=np.float32):
    """Normal with variance 2 / (inputs of one output), so relu keeps the size of the signal: arXiv:1502.01852.

    A residual block adds its branch to its input, so the branch starts small (its second convolution at half size); fc9
    starts small too, so the first probabilities are near 1/10 and the first loss is near −ln(1/10). Biases start a
    little above 0: where a background has switched off all inputs of a relu, 0 would be its kink, without a slope."""
    rng = random_stream(settings.seed, INIT)
    c1, c2, c3, c4 = settings.channels
    arrays, shapes = {}, [(1, c1), (c1, c2), (c2, c2), (c2, c2), (c2, c3), (c3, c4), (c4, c4), (c4, c4)]
    for i, (C, K) in enumerate(shapes, start=1):
        scale = 0.5 if i in (4, 8) else 1
        arrays[f"conv{i}.weight"] = rng.standard_normal((3, 3, C, K)) * scale * math.sqrt(2 / (9 * C))
        arrays[f"conv{i}.bias"] = np.full(K, 0.01)
    arrays["fc9.weight"] = rng.standard_normal((49 * c4, 10)) * 0.1 * math.sqrt(2 / (49 * c4))
    arrays["fc9.bias"] = np.zeros(10)
    return Parameters({name: xp.asarray(a, dtype) for name, a in arrays.items()})

POOLS = {"max": (max_pool2d, max_pool2d_backward), "avg": (avg_pool2d, avg_pool2d_backward)}

def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), caches. With rng dropout is on."""
    p, (pool2d, _) = params, POOLS[settings.pool]
    h, conv1 = conv_block(x, p["conv1.weight"], p["conv1.bias"])  # (28, 28, N, 4)
    h, conv2 = conv_block(h, p["conv2.weight"], p["conv2.bias"])  # (28, 28, N, 16)
    h, res34 = residual_block(h, p["conv3.weight"], p["conv3.bias"], p["conv4.weight"], p["conv4.bias"])
    h, pool4 = pool2d(h)  # (14, 14, N, 16)
    h, conv5 = conv_block(h, p["conv5.weight"], p["conv5.bias"])  # (14, 14, N, 32)
    h, conv6 = conv_block(h, p["conv6.weight"], p["conv6.bias"])  # (14, 14, N, 64)
    h, res78 = residual_block(h, p["conv7.weight"], p["conv7.bias"], p["conv8.weight"], p["conv8.bias"])
    h, pool8 = pool2d(h)  # (7, 7, N, 64)
    h = h.transpose(2, 0, 1, 3)  # (N, 7, 7, 64)
    features, drop = dropout(h.reshape(len(h), -1), settings.dropout, rng)  # (N, 3136)
    logits, fc9 = linear(features, p["fc9.weight"], p["fc9.bias"])  # (N, 10)
    return logits, (conv1, conv2, res34, pool4, conv5, conv6, res78, pool8, h.shape, drop, fc9)

def backward(dlogits, caches, settings):
    """dlogits (N, 10) → the gradient of every parameter. Read it beside forward: the same lines from bottom to top."""
    d, (_, pool2d_backward) = {}, POOLS[settings.pool]
    conv1, conv2, res34, pool4, conv5, conv6, res78, pool8, shape, drop, fc9 = caches
    dfeatures, d["fc9.weight"], d["fc9.bias"] = linear_backward(dlogits, fc9)
    dh = dropout_backward(dfeatures, drop).reshape(shape).transpose(1, 2, 0, 3)  # (7, 7, N, 64)
    dh = pool2d_backward(dh, pool8)
    dh, d["conv7.weight"], d["conv7.bias"], d["conv8.weight"], d["conv8.bias"] = residual_block_backward(dh, res78)
    dh, d["conv6.weight"], d["conv6.bias"] = conv_block_backward(dh, conv6)
    dh, d["conv5.weight"], d["conv5.bias"] = conv_block_backward(dh, conv5)
    dh = pool2d_backward(dh, pool4)
    dh, d["conv3.weight"], d["conv3.bias"], d["conv4.weight"], d["conv4.bias"] = residual_block_backward(dh, res34)
    dh, d["conv2.weight"], d["conv2.bias"] = conv_block_backward(dh, conv2)
    _, d["conv1.weight"], d["conv1.bias"] = conv_block_backward(dh, conv1, need_dx=False)
    return d

class Network(NamedTuple):
    """What the training needs to know of a network."""
    init_params: Callable  # (settings, dtype) → Parameters
    forward: Callable  # (params, x, settings, rng) → logits, caches
    backward: Callable  # (dlogits, caches, settings) → {name: gradient}

RESNET9 = Network(init_params, forward, backward)

def gradients_of_shards(params, images, labels, settings, keys, forward, backward, shards):
    """[(loss, gradient of all parameters as one vector)] of some shards: their shares in those of the batch."""
    kernels, dtype, results = winograd.prepare(params), next(iter(params.values())).dtype, []
    for i, shard in shards:
        x, rng = images[shard], device_stream(keys[i]) if keys is not None else None
        if rng is not None and (settings.augment or settings.elastic):
            x = augment(x, settings.augment, rng, settings.elastic)
        logits, caches = forward(kernels, to_input(x, dtype), settings, rng)
        loss, cache = cross_entropy_loss(logits, labels[shard], settings.label_smoothing)
        share = len(x) / len(images)  # the batch's mean is the mean of the shards' means, weighted by their sizes
        gradients = backward(cross_entropy_loss_backward(share, cache), caches, settings)
        results.append((loss * share, xp.concatenate([gradients[name].reshape(-1) for name in params])))
    return results

def loss_and_gradients(params, images, labels, settings, rng=None, network=RESNET9):
    """(mean loss, {name: gradient}) of a batch: images (N, 28, 28) pixels 0…255, labels (N,) digits.
    rng (any NumPy generator) turns dropout and augmentation on. All is in the dtype of params."""
    shards = shards_of(len(images), SHARD_IMAGES)
    keys = rng.integers(2**63, size=len(shards)) if rng is not None else None  # a random stream for each shard
    work = functools.partial(gradients_of_shards, dict(params), images, labels, settings, keys, network.forward, network.backward)
    (loss, flat), *others = over_cores(work, shards)
    for shard_loss, shard_flat in others:
        loss = loss + shard_loss
        flat += shard_flat
    return loss, Parameters(params, flat)

def logits_of_shards(params, images, settings, forward, shards):
    """[logits] of some shards, without dropout."""
    kernels, dtype = winograd.prepare(params), next(iter(params.values())).dtype
    return [forward(kernels, to_input(images[shard], dtype), settings)[0] for _, shard in shards]

def predict(params, images, settings=Settings(), network=RESNET9):
    """images (N, 28, 28), pixels 0…255 → logits (N, 10), without dropout, in the dtype of params."""
    work = functools.partial(logits_of_shards, dict(params), images, settings, network.forward)
    return xp.concatenate(over_cores(work, shards_of(len(images), PREDICT_SHARD_IMAGES)))

# ── Optimizer and schedule ────────────────────────────────────────────────────────────────────────────────────────

def learning_rate(step, steps, settings):
    """The rate of step 0, 1, … steps − 1. one_cycle rises linearly at first, then falls to 0 as a cosine."""
    if settings.schedule == "constant":
        return settings.learning_rate
    rise = settings.warm_up * steps
    if step < rise:
        return settings.learning_rate * (step + 1) / (rise + 1)
    return settings.learning_rate * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2

def sgd(w, dw, moments, rate, momentum):
    """moment ← momentum · moment + dw,  w ← w − rate · moment."""
    moments[0] *= momentum
    moments[0] += dw
    w -= rate * moments[0]

def adam(w, dw, moments, rate, step, beta2, beta1=0.9, eps=1e-8):
    """w ← w − rate · m / (√v + eps), where m and v are running means of dw and dw². Kingma and Ba 2015, arXiv:1412.6980.
    Both start at 0; dividing by 1 − beta^t makes up for that."""
    m, v = moments
    m += (1 - beta1) * (dw - m)
    v += (1 - beta2) * (dw * dw - v)
    t = step + 1
    w -= (rate / (1 - beta1**t)) * m / (xp.sqrt(v / (1 - beta2**t)) + eps)

def orthogonal(x):
    """About U Vᵀ, where U S Vᵀ is the singular value decomposition of x (rows, K): all directions as long as each other.

    Without a decomposition: each round takes every singular value s to 3.4445 s − 4.775 s³ + 2.0315 s⁵, and five bring
    what lies between 0.01 and 1 to between 0.68 and 1.14. Jordan and others 2024, kellerjordan.github.io/posts/muon."""
    x = x / ((x * x).sum() ** 0.5 + 1e-7)  # so no singular value is above 1
    for _ in range(5):
        A = x.T @ x  # (K, K)
        x = 3.4445 * x + x @ (-4.775 * A + 2.0315 * (A @ A))
    return x

def muon(params, gradients, moments, rate, step, beta2, beta1=0.95):
    """Adam, except between two hidden layers: w ← w − 0.2 rate √(longer side) orthogonal(running mean of dw).

    A gradient is mostly a few strong directions. Adam evens out single numbers, this whole directions, so that weak ones
    are learnt too. The factor makes a step about as long as Adam's: Liu and others 2025, arXiv:2502.16982."""
    before, m = Parameters(params), Parameters(params, moments[0])
    adam(params.flat, gradients.flat, moments, rate, step, beta2, beta1)
    for name, w in params.items():
        if w.ndim == 4 and name != "conv1.weight":  # (3, 3, C, K), as a matrix (9C, K)
            mean = ((1 - beta1) * gradients[name] + beta1 * m[name]).reshape(-1, w.shape[3])  # one ahead: Nesterov's
            w[...] = before[name] - rate * 0.2 * math.sqrt(max(mean.shape)) * orthogonal(mean).reshape(w.shape)

@dataclass
class State:
    """All that training changes: what a checkpoint holds."""
    params: Parameters
    moments: Any  # (1 or 2, parameters): what the optimizer remembers
    ema: Any  # running mean of the parameters, or None
    step: int = 0  # steps done
    history: list = field(default_factory=list)  # a row for each epoch, from epoch 0 on: HISTORY names the columns

    def views(self):
        """name → array of all that a checkpoint holds in numbers of the parameters' kind."""
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
    moments = xp.zeros((1 if settings.optimizer == "sgd" else 2, params.flat.size), params.flat.dtype)
    return State(params, moments, Parameters(params) if settings.ema else None)

def update(state, gradients, settings, rate):
    """One step of the optimizer, in place; state.step counts it. gradients are Parameters, rate is the step size."""
    w = state.params.flat
    if settings.weight_decay:  # decoupled from the gradient: Loshchilov and Hutter 2019, arXiv:1711.05101
        for name, weight in state.params.items():
            if name.endswith("weight"):
                weight *= 1 - rate * settings.weight_decay
    if settings.optimizer == "adam":
        adam(w, gradients.flat, state.moments, rate, state.step, settings.beta2)
    elif settings.optimizer == "muon":
        muon(state.params, gradients, state.moments, rate, state.step, settings.beta2)
    else:
        sgd(w, gradients.flat, state.moments, rate, settings.momentum)
    if state.ema is not None:
        keep = min(settings.ema, (1 + state.step) / (10 + state.step))  # a short memory as long as all is new
        state.ema.flat += (1 - keep) * (w - state.ema.flat)
    state.step += 1

# ── Evaluation, log, checkpoints ──────────────────────────────────────────────────────────────────────────────────

TRAIN_EVALUATION_IMAGES = 10_000  # train loss and accuracy are measured on the first so many, without dropout
PREDICT_IMAGES = 1024  # at once: whole shards, and all 10,000 would fill 10 GB of a GPU with what backward needs

def evaluate(params, images, labels, settings, network=RESNET9):
    """(mean loss, accuracy 0…1, probabilities (N, 10)) of images (N, 28, 28) with labels (N,), without dropout."""
    starts = range(0, len(images), PREDICT_IMAGES)
    logits = xp.concatenate([predict(params, images[i : i + PREDICT_IMAGES], settings, network) for i in starts])
    right = logits.argmax(axis=1) == labels
    return float(cross_entropy_loss(logits, labels)[0]), float(right.mean()), softmax(logits)[0]

def save_checkpoint(path, state, settings, previous=None):
    """Writes the State; the file from before stays under the name `previous`. UserError if it is no longer finite."""
    if not state.is_finite():
        raise UserError(f"the parameters are no longer finite at step {state.step}; {path.name} stays as it was")
    experiment = {name: value for name, value in asdict(settings).items() if name not in ("tag", *NOT_THE_EXPERIMENT)}
    arrays = {name: to_host(a) for name, a in state.views().items()}
    write_checkpoint(path, arrays, state.step, state.history, experiment, previous)

def load_checkpoint(path, settings, network=RESNET9):
    """The State that save_checkpoint wrote. UserError if the file is damaged or of another network."""
    state = init_state(settings, network)
    like = {"pool": settings.pool, "optimizer": settings.optimizer}  # the arrays' shapes show the other settings
    arrays, state.step, state.history = read_checkpoint(path, state.views(), like)
    for name, a in state.views().items():
        if name in arrays or name != "moments":  # a run that was made small has only the weights: they are their mean
            a[...] = xp.asarray(arrays[name if name in arrays else name.removeprefix("ema.")])
    return state

# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────

class Run:
    """One training run: its data, its folder and its state, as new or as the last checkpoint left it."""
    use_device, use_cores = staticmethod(use_device), staticmethod(use_cores)

    def __init__(self, settings, network, data, device, scripts):
        count, held_out = settings.train_images or len(data.train_images), settings.validation_images
        if count > len(data.train_images):
            raise UserError(f"train_images is {count}, but the data set has {len(data.train_images)}")
        if held_out >= count:
            raise UserError(f"validation_images is {held_out}, but should leave some of the {count} images to train on")
        self.settings, self.network = settings, network
        config = {
            "settings": asdict(settings) | {"channels": list(settings.channels)},
            "data": {"name": data.name, "sha256": data.hashes}, "device": device,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, xp.__name__: xp.__version__}}
        free = set(NOT_THE_EXPERIMENT) - (set() if settings.schedule == "constant" else {"epochs_max"})
        self.folder = RunFolder(ROOT / settings.save_dir / settings.tag, config, free, asdict(Settings()), scripts)
        state = self.folder.restore(lambda path: load_checkpoint(path, settings, network))
        self.resumed, self.state = state is not None, state or init_state(settings, network)
        self.metrics = self.folder.restore_metrics(self.state.history, lost=[math.nan] * (2 + bool(held_out)))
        images, labels = xp.asarray(data.train_images[:count]), xp.asarray(data.train_labels[:count])
        count -= held_out
        self.images, self.labels = images[:count], labels[:count]
        self.validation_images, self.validation_labels = images[count:], labels[count:]
        self.test_images, self.test_labels = xp.asarray(data.test_images), xp.asarray(data.test_labels)
        self.steps = -(-count // settings.batch_size)  # an epoch; its last batch may be smaller
        self.on_gpu = xp is not np
        self.stop = 0  # the number of the signal that asked for an end, or 0

    def train(self):
        """Trains until epochs_max or a stop signal. Returns the exit status."""
        settings, state, folder, steps, B = self.settings, self.state, self.folder, self.steps, self.settings.batch_size
        if not state.history:
            self.end_epoch(0, time.perf_counter(), 0)
        first_step, first_time, timed = state.step, time.perf_counter(), min(20, steps - state.step % steps)
        while len(state.history) <= settings.epochs_max and not self.stop:
            epoch, start = len(state.history), time.perf_counter()
            order = xp.asarray(random_stream(settings.seed, ORDER, epoch).permutation(len(self.images)))
            done = state.step - (epoch - 1) * steps  # 0, or where this epoch was interrupted
            with tqdm(range(done, steps), f"epoch {epoch}", initial=done, total=steps, unit="step", leave=False,
                       disable=None, dynamic_ncols=True) as bar:  # fmt: skip
                for step in bar:
                    batch = order[step * B : (step + 1) * B]
                    rng = random_stream(settings.seed, STEP, epoch, step)
                    rate = learning_rate(state.step, steps * settings.epochs_max, settings)
                    loss = self.step(self.images[batch], self.labels[batch], rng, rate)
                    if not self.on_gpu or step % 50 == 0:  # reading a number from a GPU waits for all that it has to do
                        self.check_finite(loss, f"epoch {epoch}, step {step + 1}")
                        bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                    if state.step == first_step + timed:
                        self.say_how_long((time.perf_counter() - first_time) / timed)
                    if self.stop:
                        break
            if state.step == epoch * steps:
                self.end_epoch(epoch, start, len(self.images) - done * B)
        if self.stop and len(state.history) <= settings.epochs_max:
            saved = folder.write(folder.last, self.save)
            what = "everything is saved" if saved else "what came after the last checkpoint is LOST"
            folder.log(f"Stopped after step {state.step:,}; {what}. To continue: {shlex.join(['python', *sys.argv])}")
            return 128 + self.stop
        folder.log(f"Finished. {self.result()} Figures: python {os.path.relpath(ROOT / 'plot_figs.py')} {settings.tag}")
        if folder.save_failed:
            print("*** Some files were not written: see above.", file=sys.stderr)
        return 1 if folder.save_failed else 0

    def step(self, images, labels, rng, rate):
        """Learns from one batch. Returns its loss."""
        loss, gradients = loss_and_gradients(self.state.params, images, labels, self.settings, rng, self.network)
        update(self.state, gradients, self.settings, rate)
        return loss

    def evaluate(self, images, labels):
        return evaluate(self.state.averaged(), images, labels, self.settings, self.network)

    def end_epoch(self, epoch, start, images_seen):
        """Evaluates, logs and saves; the checkpoint last, so that a crash before it leaves only what restore removes."""
        settings, state, folder, part = self.settings, self.state, self.folder, TRAIN_EVALUATION_IMAGES
        trained = time.perf_counter() - start
        train_loss, train_accuracy, _ = self.evaluate(self.images[:part], self.labels[:part])
        test_loss, test_accuracy, probs = self.evaluate(self.test_images, self.test_labels)
        validation = [self.evaluate(self.validation_images, self.validation_labels)[1]] if settings.validation_images else []
        self.check_finite(train_loss + test_loss if state.is_finite() else math.nan, f"epoch {epoch}")
        seconds = time.perf_counter() - start
        rate = learning_rate(max(0, state.step - 1), self.steps * settings.epochs_max, settings)
        best = test_accuracy > max((row[-1] for row in state.history), default=-1)
        state.history.append([epoch, rate, train_loss, train_accuracy, test_loss, test_accuracy])
        self.metrics.append([*state.history[-1], seconds, images_seen / seconds, *validation])
        whole = trained * len(self.images) / max(1, images_seen) + seconds - trained  # had it not been interrupted
        folder.log(log_line(self.metrics[-1], whole * (settings.epochs_max - epoch)))
        predictions = dict(labels=self.test_labels, predictions=probs.argmax(axis=1), probabilities=probs)
        folder.write(folder.path / "metrics.csv", lambda path: write_metrics(path, self.metrics))
        folder.write(folder.path / "predictions.npz",
                     lambda path: save_arrays(path, **{name: to_host(a) for name, a in predictions.items()}))  # fmt: skip
        for path in (folder.best, folder.last) if best else (folder.last,):
            folder.write(path, self.save)

    def save(self, path):
        save_checkpoint(path, self.state, self.settings, self.folder.previous if path == self.folder.last else None)

    def check_finite(self, loss, where):
        if not math.isfinite(loss):
            rate, folder = self.settings.learning_rate, self.folder.path
            raise UserError(f"the loss is {float(loss)} at {where}: learning rate {rate:g} is probably too high; "
                            f"the checkpoints in {folder} are those from before; try a lower one, with another --tag")  # fmt: skip

    def say_how_long(self, step_seconds):
        state, settings = self.state, self.settings
        evaluation = (len(self.test_images) + min(len(self.images), TRAIN_EVALUATION_IMAGES)) / settings.batch_size
        evaluations = evaluation / 3 * (settings.epochs_max + 1 - len(state.history))  # forward is a third of a step
        steps = self.steps * settings.epochs_max - state.step + evaluations
        self.folder.log(f"About {duration(step_seconds * steps)} to epoch {settings.epochs_max} on this "
                        "machine. Ctrl-C is safe: the same command continues.")  # fmt: skip

    def ask_to_stop(self, number, _frame):
        self.stop = number

    def result(self):
        last, best = self.state.history[-1], max(self.state.history, key=lambda row: row[-1])
        return f"Test accuracy {last[-1]:.2%} at the last epoch ({last[0]:.0f}), {best[-1]:.2%} at the best ({best[0]:.0f})."

SCRIPTS = (ROOT / "mnist_resnet9.py", ROOT / "plot_figs.py", *sorted((ROOT / "support").glob("*.py")))  # for save/<tag>/code/

def run(settings, network=RESNET9, scripts=SCRIPTS, kind=Run):
    """Starts or continues the run that settings define. Returns the exit status."""
    device, data = kind.use_device(settings.device), load_mnist(settings.data_dir)
    run = kind(settings, network, data, device, scripts)
    if len(run.state.history) > settings.epochs_max:
        print(f"{settings.tag} is finished. {run.result()} To go further, raise --epochs-max.")
        return 0
    count = settings.threads or available_cores()
    cores = f", {count} core{'s' * (count > 1)}" if not run.on_gpu else ""
    for line in (*(f"*** {note}" for note in data.notes),
                 f"{settings.tag}: {data.name}, {len(run.images):,} images, {run.steps} steps an epoch",
                 f"{run.state.params.flat.size:,} parameters; {device}{cores}; files in {os.path.relpath(run.folder.path)}",
                 *([f"Continuing after step {run.state.step:,} of {run.steps * settings.epochs_max:,}."] * run.resumed),
                 log_header(settings.validation_images)):  # fmt: skip
        run.folder.log(line)
    previous = {number: signal.signal(number, run.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        kind.use_cores(count)
        return run.train()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        run.folder.close()
        workers.close()

def main(arguments=None, start=lambda arguments: run(parse_settings(arguments))):
    """Runs a command line. Returns the exit status: 0, 2 after a UserError (one line says it), 128 + a stop signal."""
    warnings.simplefilter("ignore", RuntimeWarning)  # overflow and the like show in the loss, which is checked
    try:
        return start(arguments)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped before the first step; nothing to save.", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
