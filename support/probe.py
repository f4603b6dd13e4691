"""One call of a pair f, f_backward, made again to see whether the gradient is right, and if it is
not, what its numbers show. Nothing here learns; support/check.py uses it.

**Central differences.** Let f be an operation, dy any numbers of y's shape, and φ(x) = Σ dy · f(x).
f_backward(dy) claims that φ has the gradient dx. Then its slope along any direction v is Σ dx · v:

    Σ dx · v  ≈  (φ(x + h v) − φ(x − h v)) / 2h

The right-hand side needs f alone, so no mistake in f_backward can hide in it. dy and v are random,
since chosen ones may hide one: for dy = 1 the gradient of softmax is 0, whatever its lines say.

**The best of several h counts.** The two sides differ by about h², as f bends, and by 1e-16 / h, as
numbers are rounded. And where x crosses a kink between x − h v and x + h v (relu's at 0, or where
another pixel becomes the largest of its window), the right-hand side is a mean of two slopes. Which
h is free of all that cannot be known before. But a right gradient agrees with one of them to six
digits at least, and a wrong one agrees with none. So an error is the smallest one among those for
h = 1e-5, 1e-6 and 1e-7.
"""

import inspect
import traceback
from pathlib import Path

import numpy as np

from support.trace import copied, mark_of

IMAGES = 5  # nothing else in the network has this length, so a forgotten 1/N shows by its size
STEPS = (1e-6, 1e-7, 1e-5)  # h
LIMIT = 1e-5  # an error above it is a mistake
DLOSS = 1.37  # the gradient of the loss itself; with 1, it would not show if it were left out
TRIED = 30  # numbers of a wrong gradient that are looked at one by one


class Failed(Exception):
    """A function of a pair could not be called, or not be made sense of. The text says why."""


class Probe:
    """A call of a pair, to be repeated: with the same arrays, or with one moved a little."""

    def __init__(self, call, random):
        self.call, self.random = call, random
        self.name, self.back_name = call.name, f"{call.name}_backward"
        if call.error:
            raise Failed(f"{self.name} raises {describe(call.error)}.")
        names = list(inspect.signature(call.f).parameters)
        self.places = {}  # of what moves: the arrays of fractions
        for i, x in enumerate(call.inputs):
            if is_fraction(x):
                self.places[names[i] if i < len(names) else f"input{i + 1}"] = i
        self.places.update((name, name) for name, x in call.options.items() if is_fraction(x))
        self.inputs = self.fresh()
        self.y, self.cache = self.forward(self.inputs)
        if not np.all(np.isfinite(self.y)):
            raise Failed(f"{self.name}: y is not finite.")
        if np.ndim(self.y) and self.y.dtype != np.float64:
            raise Failed(f"{self.name}: from inputs of float64 it makes a y of {self.y.dtype}.")
        self.dy = random.standard_normal(self.y.shape) if np.ndim(self.y) else DLOSS
        self.given = copied(self.dy)
        before = copied(self.inputs)
        mark = mark_of(self.cache)
        self.gradients = self.backward(self.given, self.cache)
        self.cache_used_up = mark_of(self.cache) != mark
        self.changed_by_backward = self.changed(before)

    # An argument list is (inputs by position, inputs by name).

    def fresh(self, dtype=np.float64):
        """The call's inputs once more, as copies."""

        def new(x):
            return x.astype(dtype) if is_fraction(x) else copied(x)

        options = {name: new(x) for name, x in self.call.options.items()}
        return [new(x) for x in self.call.inputs], options

    def at(self, inputs, name):
        place = self.places[name]
        return inputs[0][place] if isinstance(place, int) else inputs[1][place]

    def forward(self, inputs):
        self.call.rewind()
        try:
            result = self.call.f(*inputs[0], **inputs[1])
        except Exception as error:
            raise Failed(f"{self.name} raises {describe(error)}.") from None
        if not isinstance(result, tuple) or len(result) != 2:
            raise Failed(f"{self.name} does not return two things, y and a cache.")
        return result

    def backward(self, dy, cache):
        """{"x": dx, "w": dw, …}, for each array that moves; None for one that is not returned."""
        try:
            result = self.call.f_backward(dy, cache)
        except Exception as error:
            raise Failed(f"{self.back_name} raises {describe(error)}.") from None
        gradients = list(result) if isinstance(result, tuple) else [result]
        while gradients and gradients[-1] is None:
            gradients.pop()
        if len(gradients) > len(self.places):
            raise Failed(
                f"{self.back_name} returns {len(gradients)} gradients, but {self.name} has only "
                f"{len(self.places)} arrays: {', '.join(self.places)}."
            )
        gradients += [None] * (len(self.places) - len(gradients))
        return dict(zip(self.places, gradients))

    def changed(self, before):
        """Names of the arrays in self.inputs that are no longer what they were before."""
        return [
            name
            for name in self.places
            if not same(self.at(self.inputs, name), self.at(before, name))
        ]

    def problems(self):
        """Sentences on all that shows without a difference."""
        call, found = self.call, []
        again = np.shape(self.y) == np.shape(call.y) and np.allclose(self.y, call.y, 1e-5, 1e-5)
        if not again:
            found.append(
                f"{self.name} gives another y when it is called again with the same inputs."
            )
        original = self.fresh()
        for name in self.places:
            x = self.at(self.inputs, name)
            if name in self.changed_by_backward:
                found.append(f"{self.back_name} changes {name} in place, which is not its own.")
            elif not same(x, self.at(original, name)):
                found.append(f"{self.name} changes its input {name} in place: others may need it.")
        if self.cache_used_up and not self.changed_by_backward:
            found.append(f"{self.back_name} changes the cache in place: it cannot be called twice.")
        if not same(self.given, self.dy):
            found.append(f"{self.back_name} changes dy in place: its caller may need it.")
        if call.cache_changed:
            found.append(
                f"The cache of {self.name} was changed before {self.back_name} got it: "
                "it shares an array that a later line changes in place."
            )
        for name, gradient in self.gradients.items():
            shape, right = np.shape(gradient), self.at(original, name).shape
            if gradient is not None and shape != right:
                found.append(
                    f"{self.back_name}: d{name} has the shape {shape}, but {name} has {right}."
                )
        return found or self.problems_of_float32()

    def problems_of_float32(self):
        """Training is in float32. One float64 makes all that follows slow, and nobody notices."""
        inputs = self.fresh(np.float32)
        y, cache = self.forward(inputs)
        if np.ndim(y) and y.dtype != np.float32:
            return [f"{self.name}: from inputs of float32 it makes a y of {y.dtype}."]
        gradients = self.backward(np.float32(self.dy), cache)
        return [
            f"{self.back_name}: d{name} is {dtype}, where all that goes in is float32."
            for name, dtype in ((name, np.asarray(d).dtype) for name, d in gradients.items())
            if dtype != np.float32 and gradients[name] is not None
        ]

    def errors(self):
        """{name: how far its gradient is from central differences}, for those that can be."""
        errors = {}
        for name, gradient in self.gradients.items():
            x = self.at(self.inputs, name)
            if np.shape(gradient if gradient is not None else x) == x.shape:
                directions = [unit(self.random.standard_normal(x.shape)) for _ in range(2)]
                errors[name] = self.differences(name, directions)[0]
        return errors

    def differences(self, name, directions):
        """(error, slopes by central differences, slopes that the gradient claims)."""
        gradient = self.gradients[name]
        claimed = [0.0 if gradient is None else np.sum(gradient * v) for v in directions]
        tries = []
        for h in STEPS:
            slopes = [self.slope(name, v, h) for v in directions]
            # y has 16 digits. What the difference of two y loses of them is no error.
            rounding = 1e-16 * np.linalg.norm(self.dy * self.y) / h
            tries.append((distance(claimed, slopes, 1e6 * rounding), slopes))
            if tries[-1][0] < LIMIT / 100:
                break
        error, slopes = min(tries, key=lambda one: one[0])
        return error, np.array(slopes), np.array(claimed)

    def slope(self, name, v, h):
        """(φ(x + h v) − φ(x − h v)) / 2h."""
        ys = []
        for step in (h, -h):
            inputs = self.fresh()
            x = self.at(inputs, name)
            x += step * v
            ys.append(self.forward(inputs)[0])
        return np.sum(self.dy * (ys[0] - ys[1])) / (2 * h)

    # ── What a wrong gradient looks like ──

    def explanation(self, name):
        """A sentence on a wrong gradient."""
        try:
            return self.explained(name)
        except Exception as error:
            return f"{self.back_name}: d{name} is wrong ({describe(error)})."

    def explained(self, name):
        gradient, x = self.gradients[name], self.at(self.inputs, name)
        subject = f"{self.back_name}: d{name}"
        if gradient is None:
            return f"{subject} is missing."
        if not np.all(np.isfinite(gradient)):
            return f"{subject} is not finite: NaN or infinite."
        directions = [unit(self.random.standard_normal(x.shape)) for _ in range(4)]
        _, slopes, claimed = self.differences(name, directions)
        ratios = claimed / np.where(slopes == 0, np.inf, slopes)
        if np.ptp(ratios) < 1e-4 * abs(ratios).max() or not claimed.any():
            return f"{subject} {times(ratios.mean(), np.size(self.dy) // max(1, gradient.size))}"
        guesses = [*rearranged(gradient), *self.with_dy(gradient), *self.exchanged(name)]
        for words, guess in guesses:
            if distance([np.sum(guess * v) for v in directions], slopes, 0) < 1e-4:
                return f"{subject} is right once {words}."
        return f"{subject} {self.of_one_dy(name) or self.one_by_one(name)}"

    def exchanged(self, name):
        """(words, gradient of another array): returned in the wrong order."""
        for other, gradient in self.gradients.items():
            if other != name and np.shape(gradient) == self.gradients[name].shape:
                yield f"d{name} and d{other} change places", gradient

    def of_one_dy(self, name):
        """Whether dx is right in a convolution whose kernel is turned round, or "".

        Where dy is a single 1, dx is the kernel itself, as far as one channel shows it."""
        x = self.at(self.inputs, name)
        is_map = np.ndim(self.dy) == x.ndim == 4 and self.dy.shape[:2] == x.shape[:2]
        if not is_map or min(x.shape[:2]) < 5:
            return ""
        dy, self.dy = self.dy, np.zeros_like(self.dy)
        try:
            row, col = x.shape[0] // 2, x.shape[1] // 2
            self.dy[row, col, 0, 0] = 1
            gradient = self.backward(self.dy, self.forward(self.fresh())[1])[name]
            box = (slice(row - 2, row + 3), slice(col - 2, col + 3), 0, 0)
            slopes = np.zeros((5, 5))
            for i, j in np.ndindex(5, 5):
                v = np.zeros(x.shape)
                v[box][i, j] = 1
                slopes[i, j] = self.slope(name, v, 1e-6)
        finally:
            self.dy = dy
        if not slopes.any() or distance(gradient[box], slopes, 0) < 1e-4:
            return ""
        for words, guess in rearranged(gradient[box]):
            if distance(guess, slopes, 0) < 1e-4:
                return f"is wrong: what one number of dy gives is right once {words}."
        return ""

    def with_dy(self, gradient):
        """(words, gradient and dy): a path past a block that is forgotten, or taken twice."""
        if np.shape(self.dy) == gradient.shape:
            passed = self.dy * (self.y != 0)
            for words, dy in (("", self.dy), (", where y is not 0,", passed)):
                yield f"dy{words} is added", gradient + dy
                yield f"dy{words} is taken off", gradient - dy

    def one_by_one(self, name):
        """Which of some numbers of a gradient are right, and what the wrong ones have in common."""
        gradient = self.gradients[name]
        slopes, claimed = [], []
        for i in self.random.permutation(gradient.size)[:TRIED]:
            v = np.zeros(gradient.size)
            v[i] = 1
            v = v.reshape(gradient.shape)
            slopes.append(self.slope(name, v, 1e-6))
            claimed.append(np.sum(gradient * v))
        slopes, claimed = np.array(slopes), np.array(claimed)
        size = max(abs(slopes).max(), abs(claimed).max())
        wrong = abs(slopes - claimed) > 1e-4 * np.maximum(abs(slopes), 1e-3 * size)
        slopes, claimed = slopes[wrong], claimed[wrong]
        words = f"is wrong in {len(slopes)} of {wrong.size} numbers that were tried"
        small = 1e-6 * size
        if not len(slopes):
            return f"{words}: only few are."
        if (abs(slopes) < small).all():
            return f"{words}: these should be 0."
        if (abs(claimed) < small).all():
            return f"{words}: these are 0, but should not be."
        if (abs(slopes) > small).all():
            ratios = claimed / slopes
            if np.ptp(ratios) < 1e-3 * abs(ratios).max():
                return f"{words}: each {times(ratios.mean())}"
        return f"{words}."


def times(ratio, summed=0):
    """What a gradient is that is `ratio` times the right one.

    summed is the number of dy for each of its numbers."""
    if abs(ratio) < 1e-9:
        return "is 0, but should not be."
    if abs(ratio + 1) < 1e-4:
        return "has the wrong sign."
    sign, ratio = "has the wrong sign and " if ratio < 0 else "", abs(ratio)
    factor = max(ratio, 1 / ratio)
    whole = abs(factor - round(factor)) < 1e-4 * factor
    words = f"exactly {round(factor)}" if whole else f"{factor:.4g}"
    words = f"{sign}is {words} times too {'large' if ratio > 1 else 'small'}"
    if whole and round(factor) == IMAGES:
        there = "missing" if ratio > 1 else "there twice"
        return f"{words}. There are {IMAGES} images: is a 1/N {there}?"
    if whole and round(factor) == summed:
        there = "sum in place of a mean" if ratio > 1 else "mean in place of a sum"
        return f"{words}. Each comes from {summed} numbers of dy: is it a {there}?"
    if abs(factor - DLOSS) < 1e-4:
        return f"{words}. dy was {DLOSS}: is it {'there twice' if ratio > 1 else 'left out'}?"
    return f"{words}, everywhere."


def rearranged(a):
    """(words, a with its numbers in another order): what is mixed up most often."""
    for i in range(a.ndim):
        yield f"axis {i} is turned round", np.flip(a, i)
        for j in range(i):
            if a.shape[i] == a.shape[j]:
                yield f"axes {j} and {i} are swapped", a.swapaxes(i, j)
                yield f"axes {j} and {i} are turned round", np.flip(a, (i, j))
    if a.ndim == 4 and a.shape[0] == a.shape[1] and a.shape[2] == a.shape[3]:
        both = np.flip(a, (0, 1)).swapaxes(2, 3)
        yield "axes 0 and 1 are turned round, and axes 2 and 3 swapped", both


def is_fraction(x):
    """Whether x is an array of numbers that can move a little."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def unit(v):
    return v / (np.linalg.norm(v) or 1)


def distance(a, b, floor):
    """|a − b|, relative to their size, or to the floor if they are smaller."""
    a, b = np.asarray(a), np.asarray(b)
    size = max(np.linalg.norm(a), np.linalg.norm(b), floor)
    return float(np.linalg.norm(a - b) / size) if size else 0.0


def short(error):
    return "0" if error == 0 else f"{error:.0e}" if error < 0.1 else f"{error:.2g}"


def describe(error):
    """An exception in a line, with the place in the user's code that it comes from."""
    text = " ".join(str(error).split())
    words = f"{type(error).__name__}: {text}" if text else type(error).__name__
    here = Path(__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent != here and "site-packages" not in frame.filename
    ]
    if not frames:
        return words
    return f"{words} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
