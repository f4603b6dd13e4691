"""What stands in the way when an array is not what a function takes: one line that says what came
and what should come. Nothing here learns.

predict(), evaluate() and loss_and_gradients() take whatever can mean only one thing: a list, one
image alone, rows of 784 pixels, an axis of length 1 for the channel. What would be a guess is
refused, as pixels from 0 to 1: they could be a very dark image too, and a network that was trained
on 0…255 answers such input with something, but not with sense.

The operations check what would otherwise be wrong in silence, or an error of NumPy's that names
neither the operation nor the array. All of them take less than 1/200 of a step.
"""

import math

import numpy as np

from support import UserError

SIDE = 28  # rows and columns of MNIST's images
# The shapes of one image among several, other than (28, 28).
ONE_IMAGE = ((SIDE * SIDE,), (SIDE, SIDE, 1), (1, SIDE, SIDE))


def described(a):
    """float32 (64, 28, 28), or the kind of thing that it is."""
    if hasattr(a, "shape") and hasattr(a, "dtype"):
        return f"{a.dtype} {tuple(a.shape)}"
    return f"of type {type(a).__name__}"


def listed(arrays):
    """The names, shapes and sizes of {name: array}, a line each."""
    width = max((len(name) for name in arrays), default=0)
    return "\n".join(f"    {name:{width}}  {described(a)}" for name, a in arrays.items())


# ── Images and labels ─────────────────────────────────────────────────────────────────────────────


def as_array(a, what, wanted):
    """What NumPy makes of a; an array stays what it is, on a GPU too (CuPy's have a get)."""
    if isinstance(a, np.ndarray) or (hasattr(a, "get") and hasattr(a, "strides")):
        return a
    try:
        return np.asarray(a)
    except (ValueError, TypeError):  # a list of unequal parts
        raise UserError(f"{what} are {described(a)}, but should be {wanted}") from None


def images_of(images):
    """The images as an array (N, 28, 28). UserError if they cannot be that."""
    wanted = "(N, 28, 28), with pixels 0…255"
    a = as_array(images, "images", wanted)
    shape = tuple(a.shape)
    if a.dtype.kind not in "buif":
        raise UserError(f"images are {described(images)}, but should be {wanted}")
    if shape in ((SIDE, SIDE), (SIDE * SIDE,)):
        a = a.reshape(1, SIDE, SIDE)
    elif shape[1:] in ONE_IMAGE:
        a = a.reshape(len(a), SIDE, SIDE)
    elif len(shape) != 3 or shape[1] != shape[2]:  # a network of one's own may take 32×32
        raise UserError(f"images are {shape}, but should be {wanted}")
    if not len(a):
        raise UserError("there are no images: at least one is needed")
    if isinstance(a, np.ndarray):  # on a GPU, looking at numbers would wait for all its work
        check_pixels(a)
    return a


def check_pixels(images):
    """UserError if the numbers cannot be pixels 0…255, but are scaled or normalised already."""
    low, high = images.min(), images.max()
    # A few beyond are fine, as after adding noise; and so is a batch of blank images.
    if 10 < high < math.inf or (low >= 0 and 1 < high <= 10) or low == high == 0:
        return
    said = f"images are {images.dtype} from {float(low):.3g} to {float(high):.3g}"
    remedy = ": multiply them by 255" if low >= 0 and high <= 1 else ", as in MNIST's files"
    raise UserError(f"{said}, but pixels should be 0…255{remedy}")


def labels_of(labels, images):
    """The labels of these images as an array (N,). UserError if they cannot be that."""
    wanted = f"({len(images)},), a digit for each image"
    a = as_array(labels, "labels", wanted)
    if a.shape == () and len(images) == 1:
        a = a.reshape(1)
    if a.shape != (len(images),) or a.dtype.kind not in "iu":
        remedy = ""
        if len(a.shape) == 2 and len(a) == len(images):
            remedy = ": for one-hot rows, pass labels.argmax(axis=1)"
        raise UserError(f"labels are {described(a)}, but should be whole numbers {wanted}{remedy}")
    return a


# ── Operations ────────────────────────────────────────────────────────────────────────────────────


def refuse(operation, wanted, **arrays):
    came = ", ".join(f"{name} is {described(a)}" for name, a in arrays.items())
    came = came.replace("images is", "images are")
    raise UserError(f"{operation}: {came}, but should be {wanted}") from None


def check_conv2d(x, w, b):
    try:
        _, _, _, channels = x.shape
        k, wide, C, K = w.shape
        good = channels == C and k == wide and k % 2 and b.shape == (K,)
        good = good and x.dtype.kind == "f" == w.dtype.kind
    except (AttributeError, ValueError):
        good = False
    if not good:
        wanted = "floats: x (H, W, N, C), w (k, k, C, K) with k odd, b (K,)"
        refuse("conv2d", wanted, x=x, w=w, b=b)


def check_linear(x, w, b):
    try:
        _, features = x.shape
        F, K = w.shape
        good = features == F and b.shape == (K,)
        good = good and x.dtype.kind == "f" == w.dtype.kind
    except (AttributeError, ValueError):
        good = False
    if not good:
        refuse("linear", "floats: x (N, F), w (F, K), b (K,)", x=x, w=w, b=b)


def check_sum(x, h):
    """Whether what a residual block computes can be added to its input."""
    if x.shape != h.shape:  # one channel would be added to all
        refuse("residual_block", "of one shape: as many channels come out as go in", x=x, h=h)


def check_dropout(x, rate):
    if getattr(x, "dtype", np.dtype(object)).kind != "f":
        refuse("dropout", "an array of floats", x=x)
    if not 0 <= rate < 1:
        raise UserError(f"dropout: rate is {rate}, but should be a share of at least 0 and below 1")


def check_batch(operation, images):
    """Whether images are (N, H, W)."""
    if len(getattr(images, "shape", ())) != 3:
        refuse(operation, "(N, 28, 28): for a single image, pass images[:1]", images=images)


def check_images(operation, x, size=1):
    """Whether x is (H, W, N, C), and size, of its windows, a number of pixels."""
    if len(getattr(x, "shape", ())) != 4:
        refuse(operation, "(H, W, N, C)", x=x)
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise UserError(f"{operation}: size is {size}, but should be a whole number of at least 1")


def check_labels(operation, scores, labels):
    """Whether there is a label for each row of scores, (N, K), and a score for each label."""
    try:
        N, K = scores.shape
        good = labels.shape == (N,) and N and labels.dtype.kind in "iu"
        good = good and scores.dtype.kind == "f"
    except (AttributeError, ValueError):
        good = False
    if not good:
        wanted = "floats (N, K), and N whole numbers from 0 to K − 1"
        refuse(operation, wanted, scores=scores, labels=labels)
    if isinstance(labels, np.ndarray):  # on a GPU, looking at numbers would wait for all its work
        numbers = labels.tolist()  # of a few numbers Python finds the largest sooner than NumPy
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= K:
            said = f"labels are from {low} to {high}, but there are scores for 0 to {K - 1}"
            raise UserError(f"{operation}: {said}")
