"""Whether the fast ways compute what the script says. Nothing here learns.

The script is made to be edited, and three things make it fast that know nothing of an edit: shards
of a batch over several cores, Winograd's convolution (winograd.py) and the kernels of a GPU
(gpu.py). They were made for one source, whose fingerprint is in fingerprint.py. As long as the
script has it, and none of its functions was replaced while the program lives, as `m.relu = leaky`
does in a notebook, there is nothing to show.

Otherwise each of them is compared with the script's own lines before it is used: a comment or
another line in the log changes no number. Where it differs, the script's own lines compute, and a
line says so.
"""

import contextlib
import functools
import io
import math
import operator
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import ceil_div, winograd, with_known
from support.fingerprint import MADE_FOR, fingerprint_of
from support.replaced import Watched
from support.workers import OneBlasThread, on_the_terminal

ROUNDING = 1e-6  # in float64: much more than rounding, much less than any edit

# The kernels compute in float32. Rounding then decides, for some pixel of about every second image,
# on which side of its kink a relu is. So single images are compared, and two of them have to agree
# closely; batches show, less closely, that their images go together in the same way.
# (images in a batch, batches, limit):
TRIALS = ((1, 16, 5e-5), (8, 2, math.inf))
ANY_BATCH = 5e-2  # the limit for each of them


class Ways(NamedTuple):
    """Which of the fast ways to take on a CPU."""

    winograd: bool
    shards: bool
    lines: tuple = ()  # why one is not taken


ALL, NONE = Ways(True, True), Ways(False, False)


class Script:
    """The script's module, as the names in it are now."""

    def __init__(self, names):
        self.__dict__ = names


class FastWays:
    """Decides on them, for the script whose globals() these are. Made at the end of its import."""

    def __init__(self, names):
        self.script = Script(names)
        self.source = b""
        with contextlib.suppress(KeyError, OSError):  # `python - < mnist_resnet9.py` has no file
            self.source = Path(names["__file__"]).read_bytes()
        self.imported = Watched([a for a in names.values() if is_of(a, names["__name__"])])
        self.imported.keep([seen for seen in self.imported.seen if is_in(names, seen)])
        self.lock, self.comparing = threading.RLock(), False
        self.found = {}  # (network, settings, shape of an image) → the network and its Ways
        self.watched = None  # the functions that they were found with
        self.said = set()

    @functools.cached_property
    def fingerprint(self):
        return fingerprint_of(self.source.decode()) if self.source else "unknown"

    def replaced(self):
        """The names of what was replaced in the script since it was imported."""
        return {getattr(owner, "__name__", name) for _, owner, name, _ in self.imported.changed()}

    def code(self):
        """What config.json says of the code: its fingerprint, and what was replaced."""
        return " and another ".join([self.fingerprint, *sorted(self.replaced())])

    def are_made_for_this(self):
        return self.fingerprint == MADE_FOR and not self.imported.has_changed()

    def of(self, network, settings, images, say=None):
        """The Ways for a network and images of this shape.

        Why one is not taken, say(line) says; without it, the terminal, once."""
        script = self.script
        if script.xp is not np:  # a GPU has its own
            return NONE
        if network is script.layers and self.are_made_for_this():
            return ALL
        with self.lock:
            if self.comparing:
                return NONE
            if self.watched is None or self.watched.has_changed():
                self.found.clear()
            key = key_of(network), settings, images.shape[1:]
            if key not in self.found:
                if len(self.found) > 20:  # a notebook may make one after the other
                    self.found.clear()
                networks = [network, *(network for network, _ in self.found.values())]
                self.watched = Watched([script.gradients_of_shards, *networks])
                self.found[key] = network, self.compare(network, settings, images.shape[1:])
                self.watched.settle()
            _, ways = self.found[key]
        for line in ways.lines:
            if say:
                say(line)
            elif line not in self.said:
                on_the_terminal(line)
            self.said.add(line)
        return ways

    def compare(self, network, settings, shape):
        """The Ways for a network that is not known."""
        with self.script_alone():
            candidate = Candidate(self.script, network, settings, shape)
            lines = [compare(candidate) for compare in (compare_winograd, compare_shards)]
        return Ways(*[not line for line in lines], tuple(filter(None, lines)))

    @contextlib.contextmanager
    def script_alone(self):
        """Within this block the script's own lines compute."""
        self.comparing = True
        try:
            with OneBlasThread(), np.errstate(all="ignore"):
                yield
        finally:
            self.comparing = False

    def engine(self, run, make):
        """make(run), an engine of support/gpu.py and "".

        Or None and why its kernels cannot be used."""
        if run.network is not self.script.layers:
            return None, "plain operations: another network than ResNet9"
        if not self.are_made_for_this():
            with self.lock, self.script_alone():
                difference = difference_of_kernels(self.script, run, make)
            if difference:
                return None, f"plain operations: {difference}"
        return make(run)


def is_of(value, module):
    """Whether a function or class is defined in the module."""
    return callable(value) and getattr(value, "__module__", None) == module


def is_in(names, seen):
    """Whether it is a name of the script with these globals(), or its function.

    But for xp, which use_device() changes."""
    if seen.look is operator.getitem:
        return seen.owner is names and seen.name not in ("xp", "fast_ways")
    return getattr(seen.owner, "__globals__", None) is names


def key_of(network):
    """What a dictionary can find the network by; a bound method is made anew each time."""
    try:
        hash(network)
    except TypeError:
        return id(network)
    return network


def gap_between(one, other):
    """How far one is from other, in lengths of the other."""
    if np.shape(one) != np.shape(other):
        return math.inf
    gap, length = np.linalg.norm(np.subtract(one, other)), np.linalg.norm(other)
    return gap / max(length, 1e-300)


def calm(settings, **given):
    """The settings, but with nothing so extreme that rounding would decide."""
    most = {"dropout": 0.5, "augment": 0.6, "elastic": 0.5, "weight_decay": 1.0}
    less = {name: min(getattr(settings, name, 0), most[name]) for name in most}
    return with_known(settings, **less, **given)


def describe(error):
    """An exception in a line."""
    words = " ".join(str(error).split())[:100]
    return f"{type(error).__name__}: {words}"


# ── On a CPU ──────────────────────────────────────────────────────────────────────────────────────


class Candidate:
    """A network with parameters and random images to try it on, in float64."""

    def __init__(self, script, network, settings, shape):
        self.script, self.network, self.settings = script, network, calm(settings)
        self.shape, self.random = shape, np.random.default_rng(0)

    @functools.cached_property
    def params(self):
        params = self.script.init_params(self.settings, np.float64, self.network)
        params.flat += 0.01 * self.random.standard_normal(params.flat.size)
        return params

    def batch(self, count):
        """Images and labels."""
        images = self.random.integers(256, size=(count, *self.shape), dtype=np.uint8)
        return images, self.random.integers(2, size=count, dtype=np.uint8)

    def learn(self, images, labels, rng=True, params=None):
        """The gradient as one vector, the loss at its end. With rng, as in training."""
        rng = np.random.default_rng(7) if rng else None
        loss, gradients = self.script.learn_from(
            params or self.params, images, labels, self.settings, rng, self.network
        )
        return np.concatenate([*(gradients[name].ravel() for name in self.params), [loss]])


def compare_winograd(candidate):
    """Why Winograd's way is not taken, or "" if it is.

    The gradient is computed with prepared kernels and without. Each part of it counts; but where a
    part is nothing but rounding, as that of a bias before a norm, it is small beside the whole."""
    slower = "the script's own lines compute, about 3 times slower"
    prepared = winograd.prepare(candidate.params)
    if not any(isinstance(w, winograd.Kernel) for w in prepared.values()):
        return ""
    batch = candidate.batch(2)
    try:
        expected = candidate.learn(*batch)
    except Exception:  # whoever computes with it will meet it too
        return ""
    try:
        found = candidate.learn(*batch, params=prepared)
    except Exception as error:
        return f"the network cannot take Winograd's convolution ({describe(error)}): {slower}"
    ends = np.cumsum([a.size for a in candidate.params.values()])
    floor = ROUNDING * np.linalg.norm(expected)
    difference = max(
        np.linalg.norm(one - other) / max(np.linalg.norm(other), floor, 1e-300)
        for one, other in zip(np.split(found, ends), np.split(expected, ends))
    )
    if not difference < ROUNDING:
        return f"convolution as written here differs from Winograd's ({difference:.1g}): {slower}"
    return ""


def compare_shards(candidate):
    """Why a batch is not cut into shards, each computed without the others, or "" if it is.

    The gradient of a batch has to be the mean of its halves' gradients; and, with random numbers,
    what one half adds to it must not depend on the other half."""
    one, other, third, fourth = (candidate.batch(1) for _ in range(4))
    whole = "every batch is computed as one, in this process"

    def learn(*halves, rng):
        return candidate.learn(*map(np.concatenate, zip(*halves)), rng)

    try:
        both = learn(one, other, rng=False)
        mean = (learn(one, rng=False) + learn(other, rng=False)) / 2
        if not gap_between(mean, both) < ROUNDING:
            return (
                "the gradient of a batch is not the mean of its images' gradients "
                f"({gap_between(mean, both):.1g} apart): {whole}"
            )
        both, neither = learn(one, other, rng=True), learn(third, fourth, rng=True)
        crossed = learn(one, fourth, rng=True) + learn(third, other, rng=True)
        if not gap_between(both + neither, crossed) < ROUNDING:
            apart = gap_between(both + neither, crossed)
            return f"images mix in training ({apart:.1g} of the gradient): {whole}"
    except Exception as error:
        return f"whether images mix could not be tested ({describe(error)}): {whole}"
    return ""


# ── On a GPU ──────────────────────────────────────────────────────────────────────────────────────


class Step(NamedTuple):
    """What the kernels made of a batch."""

    loss: float
    gradient: np.ndarray
    arrays: dict  # name → array: what a checkpoint holds, after the step


class Book:
    """A Bookkeeper that keeps nothing, for an epoch of `steps` steps."""

    def __init__(self, state, steps, after_step):
        self.state, self.count, self.after_step = state, steps, after_step
        self.measured = []  # what was found at the start and at the end

    def goes_on(self):
        return len(self.measured) < 2

    def steps(self, epoch):
        return range(self.count)

    def epoch_is_whole(self):
        return True

    def end_epoch(self, evaluate):
        self.measured.append(evaluate())
        self.state.history.append({"epoch": len(self.state.history)})

    def __getattr__(self, name):
        return Nothing()


class Nothing:
    """Whatever is asked of it, as by another line in the log."""

    def __call__(self, *_, **__):
        return self

    def __getattr__(self, name):
        return self


def difference_of_kernels(script, run, make):
    """What the kernels compute in another way than the script, or "".

    The script's train() takes a few steps twice: with the kernels, and with the plain operations,
    which begin each step with the kernels' parameters and update them by the kernels' gradient."""
    try:
        differences = (Trial(script, run, *trial).difference(make) for trial in TRIALS)
        return next(filter(None, differences), "")
    except Differs as reason:
        return str(reason)
    except Exception as error:
        return f"the script as written here cannot be compared with the kernels ({describe(error)})"


class Differs(Exception):
    """What the script computes in another way."""


class Trial:
    """So many batches of `size` images. Of the gradients, two are to differ by less than limit."""

    def __init__(self, script, run, size, batches, limit):
        self.script, self.limit = script, limit
        images, labels = (a[: size * batches] for a in run.train)
        self.count = ceil_div(len(images), size)
        settings = calm(run.settings, batch_size=size, epochs_max=1, learning_rate=0.001)
        self.run = run._replace(
            settings=settings,
            train=(images, labels),
            test=tuple(a[:8] for a in run.test),
            total_steps=self.count,
        )
        self.steps = []  # the kernels', a Step each
        self.distances = []  # of the script's gradients from these

    def start(self):
        """The run at its start, with the same parameters each time."""
        script, run = self.script, self.run
        state = script.init_state(run.settings, run.network)
        noise = np.random.default_rng(0).standard_normal(state.params.flat.size)
        state.params.flat += script.xp.asarray(0.01 * noise, state.params.flat.dtype)
        if state.ema is not None:
            state.ema.flat[...] = state.params.flat
        return run._replace(state=state)

    def difference(self, make):
        """Why make() gives no engine, or "" if all agrees. Raises Differs, or whatever the script
        raises, where it does not."""
        fast, plain = self.start(), self.start()
        engine, why_not = make(fast)
        if engine is None:
            return why_not.replace("plain operations: ", "")
        with contextlib.redirect_stdout(io.StringIO()):  # what an edited train() prints
            expected = self.take_steps(fast, engine)
            found = self.compare_steps(plain)
        for (row, predictions), (wanted, shown) in zip(found, expected):
            same = row.keys() == wanted.keys() and all(
                math.isclose(row[name], wanted[name], rel_tol=1e-3, abs_tol=1e-3) for name in row
            )
            probabilities = (p["probabilities"] for p in (predictions, shown))
            if not (same and gap_between(*probabilities) < 1e-3):
                raise Differs("the evaluation as written here has another result than the kernels")
        return ""

    def take_steps(self, run, engine):
        """Fills self.steps. Returns what was measured before and after."""

        def keep(loss):
            gradient = self.script.to_host(engine.trainer.gradient).copy()
            self.steps.append(Step(float(loss), gradient, self.arrays(run.state)))

        book = Book(run.state, self.count, keep)
        self.script.train(run, book, engine)
        return book.measured

    def compare_steps(self, run):
        """Raises Differs, or returns what was measured before and after."""
        script, state, done = self.script, run.state, []
        before = self.arrays(state)
        compute = script.loss_and_gradients

        def compared(*arguments, **options):
            loss, gradients = compute(*arguments, **options)
            step = self.steps[len(self.distances)]
            apart = max(
                gap_between(script.to_host(gradients.flat), step.gradient),
                abs(float(loss) - step.loss) / max(1, abs(step.loss)),
            )
            self.distances.append(apart)
            if not apart < ANY_BATCH:
                self.refuse_gradient()
            gradient = script.xp.asarray(step.gradient)
            return step.loss, script.Parameters.of_flat(gradient, state.params)

        def after_step(loss):
            step = self.steps[len(done)]
            for name, a in self.arrays(state).items():
                self.compare_update(name, a, step.arrays[name], before[name])
            for name, a in state.views().items():
                a[...] = script.xp.asarray(step.arrays[name])
            before.update(step.arrays)
            done.append(loss)

        book = Book(state, self.count, after_step)
        script.loss_and_gradients = compared
        try:
            script.train(run, book, None)
        finally:
            script.loss_and_gradients = compute
        if not (len(done) == len(self.distances) == len(self.steps)):
            raise Differs("train() as written here does not take the same steps as the kernels")
        if not max(sorted(self.distances)[:2]) < self.limit:
            self.refuse_gradient()
        return book.measured

    def refuse_gradient(self):
        apart = f"({max(self.distances):.1g} apart)"
        other = "a different gradient from the kernels'"
        raise Differs(f"the script as written here computes {other} {apart}")

    def compare_update(self, name, found, expected, before):
        """Raises Differs if two arrays of a State differ by more than rounding."""
        muon = self.run.settings.optimizer == "muon" and found.ndim == 4
        limit = 5e-3 if muon else 1e-4  # muon's rounds amplify rounding
        change, length = np.linalg.norm(found - before), np.linalg.norm(found)
        gap = np.linalg.norm(found - expected)
        if not gap <= limit * change + 1e-6 * length:
            relative = gap / max(change, 1e-300)
            how = f"differently from the kernels ({relative:.1g})"
            raise Differs(f"the script as written here updates {name} {how}")

    def arrays(self, state):
        return {name: self.script.to_host(a).copy() for name, a in state.views().items()}
