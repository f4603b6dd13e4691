"""`python mnist_resnet9.py --check`: is every backward pass the gradient of its forward pass, and
if not, which one is wrong? Nothing here learns, and nothing is written to disk.

The gradients are compared with central differences: support/probe.py says how.

**Pair by pair.** The whole network can be compared, and is, at the end. But that says only that
something is wrong. So each pair f, f_backward is compared first, on the very arrays that the
network gave it, without the fast ways of support/. A pair is wrong wherever one that it calls is,
so the innermost stand first: the first wrong line is the one to mend.

**On which numbers.** All are float64, which leaves room for a small step. The images, and what one
layer hands to the next, have noise added to every pixel. On a flat background all pixels of a
pooling window are the largest, and many relus are at their kink at once: there are no slopes to
compare with.
"""

import contextlib
import functools
import textwrap
import time
from dataclasses import dataclass, field, replace

import numpy as np

from support import UserError, winograd
from support.probe import (
    IMAGES,
    LIMIT,
    STEPS,
    Failed,
    Probe,
    describe,
    distance,
    same,
    short,
    unit,
)
from support.trace import Trace, arrays_in, namespaces_of, pairs_in
from support.workers import OneBlasThread

BATCH = 64  # images for all that needs no central differences
WIDTH = 88  # of the lines that are printed


@dataclass
class Finding:
    """A line of the table, and the sentences below it."""

    name: str
    numbers: str = ""
    problems: list = field(default_factory=list)  # sentences; without any, all is right
    because: list = field(default_factory=list)  # names of what is wrong inside

    def __str__(self):
        status = "WRONG" if self.problems else "ok   "
        because = f"because of {', '.join(self.because)}" if self.because else ""
        words = "  ".join(part for part in (self.numbers, because) if part)
        line = f"{status}  {self.name:<18}  {words}".rstrip()
        if self.because:  # these say more
            return line
        wrap = textwrap.TextWrapper(WIDTH, initial_indent=" " * 7, subsequent_indent=" " * 7)
        return "\n".join([line, *map(wrap.fill, self.problems)])


def check_network(script, network, settings, say=print):
    """Prints the table. Returns whether all is right.

    script is the module mnist_resnet9, network a function as its layers()."""
    start = time.perf_counter()
    say(f"Gradients against central differences, on {IMAGES} images in float64.")
    say(f"The numbers are relative errors: up to {LIMIT:.0e} is rounding.\n")
    bench, findings = Bench(script, network, settings), []
    with OneBlasThread(), np.errstate(all="ignore"):  # what is not finite is in the table
        for finding in bench.findings():
            findings.append(finding)
            say(str(finding))
    if bench.not_called:
        rest = f"Not called by this network, so not looked at: {', '.join(bench.not_called)}."
        say("\n" + textwrap.fill(rest, WIDTH))
    wrong = [finding.name for finding in findings if finding.problems]
    seconds = f"{time.perf_counter() - start:.1f} s"
    if wrong:
        say(f"\n{len(wrong)} of {len(findings)} are WRONG ({seconds}). Begin with {wrong[0]}.")
    else:
        say(f"\nAll {len(findings)} are ok ({seconds}).")
    return not wrong


class Bench:
    """A network with images and parameters to try it on."""

    def __init__(self, script, network, settings):
        self.script, self.network, self.settings = script, network, settings
        # Dropout on, as in training, but so that enough is left; and the images stay as they are.
        calm = {"dropout": 0.5, "augment": 0.0, "elastic": 0.0}
        self.calm = replace(settings, **{k: calm[k] for k in calm if hasattr(settings, k)})
        self.random = np.random.default_rng(settings.seed)
        self.not_called = []  # names of pairs

    def findings(self):
        script = self.script
        xp, script.xp = script.xp, np
        cores = 1 + script.workers.count
        try:
            self.take_images()
            try:
                self.take_parameters()
                pairs = self.pairs()
            except Exception as error:
                yield Finding("the network", problems=[sentence_on(error)])
                return
            yield from pairs
            culprits = [f.name for f in pairs if f.problems and not f.because]
            for name, look in (
                ("whole network", self.whole_network),
                ("images apart", self.images_apart),
                ("fast convolution", self.fast_convolution),
                ("one core and two", self.two_cores),
                ("twenty steps", self.twenty_steps),
            ):
                raised = []
                try:
                    numbers, problems = look()
                except Exception as error:
                    numbers, problems, raised = "", [sentence_on(error)], [name]
                yield Finding(name, numbers, problems, culprits if problems else [])
                culprits = culprits or raised  # what follows raises the same
        finally:
            script.xp = xp
            script.use_cores(cores)

    def take_images(self):
        random = self.random
        data = self.script.load_mnist(self.settings.data_dir)
        chosen = random.permutation(len(data.train_images))[:BATCH]
        self.images, self.labels = data.train_images[chosen], data.train_labels[chosen]
        self.few = self.images[:IMAGES] + random.uniform(0, 20, self.images[:IMAGES].shape)
        self.few_labels = self.labels[:IMAGES]

    def take_parameters(self):
        self.params = self.script.init_params(self.calm, np.float64, self.network)
        self.params.flat += 0.01 * self.random.standard_normal(self.params.flat.size)
        self.noise = {}  # number of the layer → what is added to its y

    def learn(self, layers):
        """(loss, gradients) of the few images, always with the same random numbers."""
        rng = np.random.default_rng(7)
        return self.script.learn_from(
            self.params, self.few, self.few_labels, self.calm, rng, layers
        )

    def with_noise(self, layers):
        """The network, but each layer adds noise to the pixels it hands on: always the same."""

        def noisy(settings, rng=None):
            return [noisy_layer(i, layer) for i, layer in enumerate(layers(settings, rng))]

        def noisy_layer(i, layer):
            def op(*inputs):
                y, cache = layer.op(*inputs)
                if np.ndim(y) == 4:
                    if i not in self.noise:
                        self.noise[i] = 0.05 * self.random.random(y.shape)
                    y = y + self.noise[i]
                return y, cache

            return layer._replace(op=op)

        return noisy

    # ── Pair by pair ──

    def traced(self):
        return Trace(namespaces_of(self.script, self.network, self.calm))

    def pairs(self):
        """A Finding for each pair that the network calls, the innermost first."""
        with plain_ways(), self.traced() as trace, contextlib.suppress(Exception):
            self.learn(self.with_noise(trace.of(self.network)))
        calls = [call for outer in trace.calls for call in outer.all()]
        called = {call.f for call in calls}
        there = [pair for namespace in trace.namespaces for pair in pairs_in(namespace)]
        self.not_called = sorted({name for name, f, _ in there if f not in called})
        groups = {}
        for call in calls:
            groups.setdefault((call.f, call.f_backward), []).append(call)
        found = {}
        for pair, group in sorted(groups.items(), key=lambda item: max(map(height, item[1]))):
            inner = [call for outer in group for call in outer.all() if call not in group]
            inside = [found[call.f, call.f_backward] for call in inner]
            wrong = [finding for finding in inside if finding.problems and not finding.because]
            with plain_ways():
                found[pair] = compare(group, self.random, wrong)
        return list(found.values())

    # ── The whole ──

    def whole_network(self):
        """Every parameter and the image, through all layers and the loss."""
        with plain_ways():
            d = self.gradients()
            arrays = {**self.params, "the image": self.push}
            errors = {name: self.error_of(d[name], arrays[name]) for name in arrays if name in d}
        wrong = [name for name, error in errors.items() if not error <= LIMIT]
        problems = [
            f"Wrong are the gradients of {', '.join(wrong)}.",
            "Where every pair is ok, look at what joins them: the order of the layers, of their "
            "parameters and of their gradients.",
        ]
        return f"{len(errors)} gradients, {short(max(errors.values()))} at most", wrong and problems

    def gradients(self):
        """{name: gradient} of every parameter, and of the image, to which self.push is added."""
        self.push = np.zeros((*self.few.shape[1:], len(self.few), 1))
        dx = []  # of the first layer, which training may do without

        def keep_dx(layer):
            back = with_dx(layer.op_backward)

            def op_backward(dy, cache):
                result = back(dy, cache)
                dx.append(result[0] if isinstance(result, tuple) else result)
                return result

            return layer._replace(op_backward=op_backward)

        _, gradients = self.learn(self.pushed(keep_dx))
        if dx[0] is not None:
            gradients["the image"] = dx[0]
        return gradients

    def pushed(self, changed=lambda layer: layer):
        """The network with noise, self.push added to the image, and its first layer `changed`."""
        network = self.with_noise(self.network)

        def pushed(settings, rng=None):
            first, *others = network(settings, rng)
            op = first.op
            first = first._replace(op=lambda x, *inputs: op(x + self.push, *inputs))
            return [changed(first), *others]

        return pushed

    def error_of(self, gradient, a):
        """How far a gradient is from the central difference along one direction."""
        v = unit(self.random.standard_normal(a.shape))
        claimed, errors = np.sum(gradient * v), []
        for h in STEPS:
            losses = []
            for step in (h, -2 * h):
                a += step * v
                losses.append(self.loss())
            a += h * v
            rounding = 1e-15 * abs(losses[0]) / h
            slope = (losses[0] - losses[1]) / (2 * h)
            errors.append(distance(claimed, slope, rounding / LIMIT))
            if errors[-1] < LIMIT / 100:
                break
        return min(errors)

    def loss(self):
        """The loss of the few images. The backward passes are left out: their gradients are 0."""

        def forward_only(layer):
            def op(*inputs):
                return layer.op(*inputs)[0], inputs

            def op_backward(dy, inputs):
                zeros = tuple(map(np.zeros_like, inputs))
                return zeros if len(zeros) > 1 else zeros[0]

            return layer._replace(op=op, op_backward=op_backward)

        network = self.pushed()
        return self.learn(lambda *given: [forward_only(layer) for layer in network(*given)])[0]

    def images_apart(self):
        """Whether an image's logits depend on the other images in the batch."""
        batches = self.few, np.concatenate([self.few[:1], self.images[IMAGES : 2 * IMAGES - 1]])
        traces = []
        for images in batches:
            with self.traced() as trace:
                x = self.script.to_input(images, np.float64)
                rng = np.random.default_rng(7)
                net = trace.of(self.network)(self.calm, rng)
                self.script.forward(net, self.params, x)
            traces.append([call for outer in trace.calls for call in outer.all()])
        apart = 0
        for one, other in zip(*traces):
            # (H, W, N, C), or (N, F)
            y, y_other = (np.take(call.y, 0, 2 if call.y.ndim == 4 else 0) for call in (one, other))
            apart = distance(y, y_other, 0)
            if apart > 1e-9:
                return f"{short(apart)} apart", [
                    f"In {one.layer}, {one.name} makes of an image what depends on others in the "
                    "batch. So a batch has to be computed as one, in one process, and the answer "
                    "for an image depends on those that are asked for with it."
                ]
        return "whatever the others are, an image's logits stay", []

    def fast_convolution(self):
        """Winograd's way (support/winograd.py) against the script's own lines."""
        fast = self.flat_gradient(np.float64)
        with plain_ways():
            error = distance(fast, self.flat_gradient(np.float64), 0)
        if not error <= LIMIT:
            what = "support/winograd.py computes another convolution than the script's lines."
            return short(error), [what]
        unused = "not used: the script's own lines compute"
        return f"{short(error)} from the script's own lines" if error else unused, []

    def flat_gradient(self, dtype):
        script = self.script
        params = script.init_params(self.calm, dtype, self.network)
        rng = np.random.default_rng(7)
        batch = self.images, self.labels
        return script.loss_and_gradients(params, *batch, self.calm, rng, self.network)[1].flat

    def two_cores(self):
        flat = {}
        for cores in (1, 2):
            self.script.use_cores(cores)
            flat[cores] = self.flat_gradient(np.float32).copy()
        if same(flat[1], flat[2]):
            return "the same bits", []
        apart = short(distance(flat[1], flat[2], 0))
        return f"{apart} apart", ["The gradient depends on the number of processes."]

    def twenty_steps(self):
        """On the same images, with a rate and an optimizer that suit any network."""
        script = self.script
        plain = {
            "optimizer": "adam",
            "beta2": 0.999,
            "dropout": 0.0,
            "weight_decay": 0.0,
            "ema": 0.0,
        }
        settings = replace(self.calm, **{k: plain[k] for k in plain if hasattr(self.calm, k)})
        state = script.init_state(settings, self.network)
        losses = []
        for _ in range(21):
            loss, gradients = script.loss_and_gradients(
                state.params, self.images, self.labels, settings, None, self.network
            )
            losses.append(float(loss))
            script.update(state, gradients, settings, 1e-3)
        problems = [] if losses[-1] < losses[0] else ["The loss does not fall."]
        return f"loss {losses[0]:.3f} → {losses[-1]:.3f}", problems


def sentence_on(error):
    """The script's own errors are sentences already."""
    return f"{error}." if isinstance(error, UserError) else f"It raises {describe(error)}."


def with_dx(f_backward):
    """f_backward, but with the dx that a network's first layer does without."""
    if not isinstance(f_backward, functools.partial):
        return f_backward
    options = {name: x for name, x in f_backward.keywords.items() if name != "need_dx"}
    return functools.partial(f_backward.func, *f_backward.args, **options)


def height(call):
    """0 for a call that made no other, 1 for one that made such calls only, …"""
    return 1 + max(map(height, call.inner)) if call.inner else 0


@contextlib.contextmanager
def plain_ways():
    """Within this block the script's own lines compute, not the fast ways of support/."""
    before, winograd.MIN_CHANNELS = winograd.MIN_CHANNELS, 10**9
    try:
        yield
    finally:
        winograd.MIN_CHANNELS = before


def gets_numbers(call):
    """Whether all that goes in is finite. If not, another pair is to blame."""
    arrays = arrays_in([*call.inputs, *call.options.values()])
    return all(np.isfinite(a).all() for a in arrays if a.dtype.kind == "f")


def compare(calls, random, wrong_inside):
    """The Finding of a pair, from all its calls. Where another is wrong inside, that is the reason
    for what is wrong here; if it is not the only one, that shows once the other is mended."""
    name = calls[0].name
    errors, wrong = {}, {}  # gradient → its largest error; sentence → the layers it is true of
    first = {}  # gradient → the first Probe in which it is wrong
    calls = [call for call in calls if gets_numbers(call)]
    if not calls:
        return Finding(name, "not compared: what it gets is not finite")
    for call in calls:
        found = []
        try:
            probe = Probe(call, random)
            found += probe.problems()
            for array, error in probe.errors().items():
                errors[array] = max(error, errors.get(array, 0))
                if not error <= LIMIT:
                    found.append(array)
                    first.setdefault(array, probe)
        except Failed as failed:
            found.append(str(failed))
        except Exception as error:
            found.append(f"{name} cannot be compared: {describe(error)}.")
        for what in found:
            wrong.setdefault(what, []).append(call.layer or "the loss")
    numbers = "  ".join(f"d{array} {short(error)}" for array, error in errors.items())
    finding = Finding(name, numbers)
    if wrong and wrong_inside:
        finding.problems = ["It calls what is wrong."]
        finding.because = list(dict.fromkeys(other.name for other in wrong_inside))
        return finding
    for what, layers in wrong.items():
        if what in first:
            what = first[what].explanation(what)
        if len(layers) < len(calls):
            what += f" (In {len(layers)} of {len(calls)} calls, the first of them in {layers[0]}.)"
        finding.problems.append(what)
    right = [f"d{array}" for array in errors if array not in first]
    if right and first:
        finding.problems.append(f"{' and '.join(right)} {'are' if right[1:] else 'is'} right.")
    return finding
