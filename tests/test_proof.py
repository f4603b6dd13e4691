"""Fast ways only for what they were made for: shards and Winograd's convolution on a CPU, and the
kernels of a GPU, emulated here. Whatever is edited in the script or replaced while it lives, every
way computes what the script says, or steps aside with a line."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_on_cpu import COMPILER, CudaOnCpu
from PIL import Image
from programs import start
from test_workers import leaky

import mnist_resnet9 as m
from support import ROOT, fingerprint, gpu, proof, workers
from support.trace import Trace

LONG = pytest.mark.long
SOURCE = (ROOT / "mnist_resnet9.py").read_text(encoding="utf-8")
SMALL = {"channels": (4, 8, 8, 12), "batch_size": 16, "dropout": 0.5}
# All that an edit could be about is on.
ALL_ON = {"augment": 0.5, "elastic": 0.5, "weight_decay": 0.3, "label_smoothing": 0.05, "ema": 0.9}


def test_the_fingerprint_is_that_of_the_script():
    """The fast ways are tested with the script as it is: test_network.py, test_gpu_kernels.py. So
    when these pass, the new fingerprint may be written."""
    assert fingerprint.fingerprint_of(SOURCE) == fingerprint.MADE_FOR, (
        "mnist_resnet9.py has changed: run `python -m support.fingerprint`"
    )


# ── Edits ─────────────────────────────────────────────────────────────────────────────────────────


class Edit:
    """What a student changes, and what the log says of it. None: nothing, the fast way goes on."""

    def __init__(self, *changes, cpu=None, kernels=None):
        self.changes, self.cpu, self.kernels = changes, cpu, kernels


GRADIENT = r"computes a different gradient from the kernels' \(\S+ apart\)"
EDITS = {
    "leaky relu": Edit(
        ("    mask = x > 0\n", "    slope = xp.where(x > 0, 1, 0.1).astype(x.dtype)\n"),
        (
            "    return xp.maximum(x, 0), mask  # cache: where",
            "    return x * slope, slope  # where",
        ),
        kernels=GRADIENT,
    ),
    "a slope of a thousandth": Edit(
        ("    mask = x > 0\n", "    mask = xp.where(x > 0, 1, 0.001).astype(x.dtype)\n"),
        ("    return xp.maximum(x, 0), mask  # cache: where", "    return x * mask, mask  # where"),
        kernels=GRADIENT,
    ),
    "one more layer": Edit(
        (
            '        pool("pool8", settings),',
            '        conv("conv9", c4, c4),\n        pool("pool8", settings),',
        ),
        kernels=r"the kernels know no conv9.weight",
    ),
    "border repeated": Edit(
        (
            "    padded = xp.zeros((H + 2 * r, W + 2 * r, N, C), x.dtype)\n"
            "    padded[r : r + H, r : r + W] = x\n",
            '    padded = xp.pad(x, ((r, r), (r, r), (0, 0), (0, 0)), "edge")\n',
        ),
        cpu=r"convolution as written here differs from Winograd's \([\d.]+\): the script's own",
        kernels=GRADIENT,
    ),
    "correlation turned round": Edit(
        ("    turned = w[::-1, ::-1]", "    turned = w[::1, ::1]"),
        cpu=r"convolution as written here differs from Winograd's",
        kernels=GRADIENT,
    ),
    "a convolution without the fast way": Edit(
        ("        return winograd.conv2d(x, w, b)\n", "        pass\n")
    ),
    "another augmentation": Edit(
        (
            "    x = to_input(images, dtype_of(params))\n    logits, caches",
            "    if rng is not None:\n        images = images[:, ::-1]\n"
            "    x = to_input(images, dtype_of(params))\n    logits, caches",
        ),
        kernels=GRADIENT,
    ),
    "another turn": Edit(("math.radians(12)", "math.radians(13)"), kernels=GRADIENT),
    "another loss": Edit(
        ("logits - logits.max(axis=1, keepdims=True)\n", "(logits - logits.max()) / 2\n"),
        ("* (dloss / N)  # 1/N", "* (dloss / N / 2)  # 1/N"),
        kernels=GRADIENT,
    ),
    "a sum in place of the mean": Edit(
        (".sum(axis=1).mean()", ".sum()"),
        ("* (dloss / N)  # 1/N", "* dloss  # no 1/N"),
        cpu=r"the gradient of a batch is not the mean of its images' gradients",
        kernels=GRADIENT,
    ),
    "another weight decay": Edit(
        ('            if name.endswith("weight"):\n', "            if True:\n"),
        kernels=r"updates conv1.bias differently",
    ),
    "another mean of the weights": Edit(
        ("+= takes * (state.params.flat", "+= takes**2 * (state.params.flat"),
        kernels=r"updates ema.conv1.weight differently",
    ),
    "a mean that reaches back less far": Edit(("(1 + step) / (10 + step)", "(1 + step) / 99")),
    "another mean of the pixels": Edit(("STD = 0.1307,", "STD = 0.1300,"), kernels=GRADIENT),
    "another input": Edit(("    x = (x - PIXEL_MEAN) / PIXEL_STD\n", ""), kernels=GRADIENT),
    "batch normalisation": Edit(
        (
            "    y, relu_cache = relu(h)\n    return y, (conv_cache, relu_cache)",
            "    h = h - h.mean(axis=(0, 1, 2))\n"
            "    y, relu_cache = relu(h)\n    return y, (conv_cache, relu_cache)",
        ),
        (
            "    return conv2d_backward(dh, conv_cache, need_dx)\n",
            "    dh = dh - dh.mean(axis=(0, 1, 2))\n"
            "    return conv2d_backward(dh, conv_cache, need_dx)\n",
        ),
        cpu=r"the gradient of a batch is not the mean of its images' gradients \(\S+ apart\): "
        "every batch is computed as one, in this process",
        kernels=GRADIENT,
    ),
    "mixup": Edit(
        (
            "    x = to_input(images, dtype_of(params))\n    logits, caches",
            "    if rng is not None:\n        images = (images + 1.0 * images[::-1]) / 2\n"
            "    x = to_input(images, dtype_of(params))\n    logits, caches",
        ),
        cpu=r"images mix in training",
        kernels=GRADIENT,
    ),
    "clipped gradients": Edit(
        (
            "                update(state, gradients, settings, rate)\n",
            "                gradients.flat /= 1 + abs(gradients.flat).max()\n"
            "                update(state, gradients, settings, rate)\n",
        ),
        kernels=r"updates \S+ differently",
    ),
    "two answers averaged": Edit(
        (
            "        parts.append(predict(params, images[start : start + PREDICT_IMAGES], "
            "settings, network))\n",
            "        part = images[start : start + PREDICT_IMAGES]\n"
            "        for x in (part, part[:, ::-1]):\n"
            "            parts.append(predict(params, x, settings, network))\n"
            "        parts[-2:] = [parts[-2] + parts[-1]]\n",
        ),
        kernels=r"the evaluation as written here has another result than the kernels",
    ),
    "a new optimizer": Edit(
        (
            'Literal["sgd", "adam", "muon"] = "adam"',
            'Literal["sgd", "adam", "muon", "lion"] = "lion"',
        ),
        ('{"sgd": sgd, "adam": adam, "muon": muon}', '{"lion": lion, "adam": adam}'),
        (
            "def sgd(state",
            "def lion(state, gradients, settings, rate):\n"
            "    state.params.flat -= rate * xp.sign(gradients.flat)\n\n\ndef sgd(state",
        ),
        kernels=r"the kernels do not know the optimizer lion",
    ),
    "a new pool": Edit(
        ('Literal["max", "avg"] = "max"', 'Literal["max", "avg", "half"] = "half"'),
        (
            '        "avg": (avg_pool2d, avg_pool2d_backward),\n',
            '        "avg": (avg_pool2d, avg_pool2d_backward),\n'
            '        "half": (lambda x: (x[::2, ::2], x.shape), half_backward),\n',
        ),
        (
            "def flat(name):",
            "def half_backward(dy, shape):\n    dx = xp.zeros(shape, dy.dtype)\n"
            "    dx[::2, ::2] = dy\n    return dx\n\n\ndef flat(name):",
        ),
        kernels=r"the kernels do not know the pool half",
    ),
    "a new schedule": Edit(
        ('Literal["constant", "one_cycle"] = "constant"', 'Literal["constant", "less"] = "less"'),
        ('{"constant": constant, "one_cycle"', '{"less": lambda p, i, n, _: p / (1 + i), "_"'),
    ),
}

# These change no number.
HARMLESS = {
    "a comment": Edit(("    mask = x > 0\n", "    # Where it is positive.\n    mask = x > 0\n")),
    "a docstring": Edit(('"""dx = dy where x > 0, and', '"""All of dy where x > 0, and')),
    "a default": Edit(("learning_rate: float = 1e-4", "learning_rate: float = 2e-4")),
    "a renamed variable": Edit(
        ("    mask = x > 0\n", "    positive = x > 0\n"),
        (
            "    return xp.maximum(x, 0), mask  # cache: where",
            "    return xp.maximum(x, 0), positive  # where",
        ),
    ),
    "a printed line": Edit(
        (
            "            book.after_step(loss)\n",
            "            print(loss)\n            book.after_step(loss)\n",
        )
    ),
    "a line in the log": Edit(
        (
            "            book.after_step(loss)\n",
            '            book.folder.log(f"step {number}")\n            book.after_step(loss)\n',
        )
    ),
    "one more column": Edit(
        (
            "    if run.settings.validation_images:\n",
            '    row["norm"] = float(abs(run.state.params.flat).max())\n'
            "    if run.settings.validation_images:\n",
        )
    ),
}
SAME_SOURCE = ("a comment", "a docstring", "a default")  # the same fingerprint


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function that imports a copy of the script with an edit."""

    def load(edit):
        text = SOURCE
        for old, new in edit.changes:
            assert text.count(old) == 1, f"not there, or several times: {old!r}"
            text = text.replace(old, new)
        (tmp_path / "edited.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", module)
        spec.loader.exec_module(module)
        return module

    path = list(sys.path)
    yield load
    sys.path[:] = path


def far(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


def by_its_own_lines(module, images, labels, settings):
    """Gradient and logits as the script has them: a batch at once, no fast way."""
    params = module.init_params(settings, np.float64)
    gradients = module.learn_from(params, images, labels, settings, None, module.layers)[1]
    x = module.to_input(images, np.float64)
    logits, _ = module.forward(module.layers(settings), params, x)
    return np.concatenate([gradients[name].ravel() for name in params]), logits


def by_all_ways(module, images, labels, settings):
    params = module.init_params(settings, np.float64)
    gradients = module.loss_and_gradients(params, images, labels, settings)[1]
    return gradients.flat, module.predict(params, images, settings)


def said_of(name, edit, ways):
    if edit.cpu is None:
        assert ways == proof.ALL, name
    else:
        assert len(ways.lines) == 1 and re.search(edit.cpu, ways.lines[0]), (name, ways)


QUICK_ONES = ("leaky relu", "border repeated", "batch normalisation", "a renamed variable")


def quick(names, some):
    """The names as parameters, all but some of them for the long tests."""
    return [pytest.param(name, marks=() if name in some else LONG) for name in names]


@pytest.mark.parametrize("name", quick([*EDITS, *HARMLESS], QUICK_ONES))
def test_on_a_cpu_an_edit_is_honoured(name, edited, sample, capsys):
    edit = {**EDITS, **HARMLESS}[name]
    module = edited(edit)
    settings = module.Settings(**SMALL, **ALL_ON)
    images, labels = sample.train_images[:40], sample.train_labels[:40]
    right = by_its_own_lines(module, images, labels, settings)
    ways = module.fast_ways.of(module.layers, settings, images)
    said_of(name, edit, ways)
    found = [by_all_ways(module, images, labels, settings)]
    if "fork" in workers.METHOD:
        module.use_cores(2)
        found.append(by_all_ways(module, images, labels, settings))
        module.use_cores(1)
    for gradient, logits in found:
        assert far(gradient, right[0]) < 1e-9 and far(logits, right[1]) < 1e-9
    assert capsys.readouterr().err.count("*** ") == len(ways.lines)  # once
    same = module.fast_ways.fingerprint == fingerprint.MADE_FOR
    assert same == (name in SAME_SOURCE)


# ── The script as it is, and other networks ───────────────────────────────────────────────────────


@pytest.fixture
def doubted(monkeypatch):
    """As if the script had another fingerprint: the fast ways have to show what they compute."""
    monkeypatch.setattr(proof, "MADE_FOR", "")
    monkeypatch.setattr(m, "fast_ways", proof.FastWays(vars(m)))


AS_IT_IS = {
    "reference": {},
    "quick": m.RECIPES["quick"],
    "sprint": m.RECIPES["sprint"],
    "record": m.RECIPES["record"],
    "avg": {"pool": "avg"},
    "nearly all dropped": {"dropout": 0.9999},
    "extremes": {"augment": 10.0, "elastic": 10.0, "weight_decay": 1000.0, "label_smoothing": 0.99},
    "narrow": {"channels": (1, 1, 1, 1)},
    "odd": {"channels": (3, 5, 7, 6)},
    "sgd": {"optimizer": "sgd", "momentum": 0.9999},
    **{f"batches of {size}": {"batch_size": size} for size in (1, 63, 64, 1024)},
}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))]
)
@pytest.mark.parametrize("name", quick(AS_IT_IS, ["nearly all dropped"]))
def test_the_script_as_it_is_is_never_refused(name, seed, sample, doubted):
    settings = m.Settings(seed=seed, **AS_IT_IS[name])
    assert m.fast_ways.of(m.layers, settings, sample.train_images) == proof.ALL


@pytest.mark.parametrize("path", sorted((ROOT / "evolution").glob("step[0-9]*.py")), ids=str)
def test_the_steps_of_evolution_are_not_refused(path, sample, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    step = importlib.import_module(path.stem)
    assert m.fast_ways.of(step.layers, m.Settings(), sample.train_images) == proof.ALL


def test_nothing_is_compared_for_the_script_as_it_is(sample, monkeypatch):
    monkeypatch.setattr(proof.FastWays, "compare", lambda *_: pytest.fail("it is compared"))
    settings = m.Settings(channels=(4, 4, 4, 4))
    by_all_ways(m, sample.train_images[:9], sample.train_labels[:9], settings)
    monkeypatch.setattr(m, "xp", SimpleNamespace(**vars(np)))  # use_device() does this
    assert m.fast_ways.replaced() == set()


# ── Functions replaced while the program lives ────────────────────────────────────────────────────


def repeated(x, k):
    H, W, N, C = x.shape
    r = k // 2
    padded = np.pad(x, ((r, r), (r, r), (0, 0), (0, 0)), "edge")
    view = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (0, 1))
    return view.transpose(4, 5, 3, 0, 1, 2).reshape(k * k * C, H * W * N).T


def doubled(f):
    def twice(*arguments, **options):
        y, *rest = f(*arguments, **options)
        return (2 * y, *rest)

    return twice


def mixing(net, params, x):
    x = x - x.mean(axis=2, keepdims=True)
    return forward(net, params, x)


layers, forward, conv2d, max_pool2d = m.layers, m.forward, m.conv2d, m.max_pool2d


def without_pool4(settings, rng=None):
    return [
        layer._replace(op=m.avg_pool2d, op_backward=m.avg_pool2d_backward)
        if layer.name == "pool4"
        else layer
        for layer in layers(settings, rng)
    ]


REPLACED = {
    "relu": (leaky, ()),
    "conv2d": (doubled(conv2d), ()),
    "surroundings": (repeated, ("convolution as written here differs from Winograd's",)),
    "forward": (mixing, ("not the mean",)),
    "layers": (without_pool4, ()),
    "max_pool2d": (doubled(max_pool2d), ()),
    "cross_entropy_loss": (doubled(m.cross_entropy_loss), ()),
    "PIXEL_MEAN": (0.5, ()),
}


@pytest.mark.parametrize("name", quick(REPLACED, ["surroundings", "forward"]))
def test_what_is_replaced_is_computed_with(name, sample, monkeypatch, capsys):
    """From the next call on, on all cores, and until it is put back."""
    settings = m.Settings(channels=(4, 4, 4, 4), batch_size=16)
    images, labels = sample.train_images[:40], sample.train_labels[:40]
    before = by_all_ways(m, images, labels, settings)
    value, lines = REPLACED[name]
    for cores in (1, 2):
        m.use_cores(cores)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(m, name, value)
            assert m.fast_ways.replaced() == {name}
            found = by_all_ways(m, images, labels, settings)
            right = by_its_own_lines(m, images, labels, settings)
        assert all(far(one, other) < 1e-9 for one, other in zip(found, right))
        assert far(found[0], before[0]) > 1e-3 or name == "cross_entropy_loss"
        said = capsys.readouterr().err.splitlines()
        assert [line for line in lines if cores == 1 and not any(line in s for s in said)] == []
        after = by_all_ways(m, images, labels, settings)
        assert all(far(one, other) < 1e-12 for one, other in zip(after, before))
    m.use_cores(1)
    assert m.fast_ways.replaced() == set()


class Normalised:
    """A network that normalises each image, or, with a flag, the batch."""

    axes = (0, 1, 3)

    def norm(self, x):
        return x - x.mean(axis=self.axes, keepdims=True), None

    def back(self, dy, _):
        return dy - dy.mean(axis=self.axes, keepdims=True)

    def layers(self, settings, rng=None):
        first, *others = m.layers(settings, rng)
        return [first, m.Layer("norm", self.norm, self.back), *others]


def test_a_flag_of_an_object_is_honoured(sample):
    settings, images = m.Settings(channels=(4, 4, 4, 4), threads=1), sample.train_images[:2]
    one = Normalised()
    assert m.fast_ways.of(one.layers, settings, images).shards
    one.axes = (0, 1, 2)
    assert not m.fast_ways.of(one.layers, settings, images).shards
    del one.axes
    assert m.fast_ways.of(one.layers, settings, images).shards


def test_a_script_that_is_loaded_again_is_the_script_as_it_is():
    program = "import importlib, mnist_resnet9 as m; m = importlib.reload(m); "
    program += "print(m.fast_ways.replaced(), m.fast_ways.are_made_for_this())"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["set()", "True"], result.stderr


def test_a_helper_of_what_replaces_is_looked_at_again(sample, monkeypatch):
    settings, images = m.Settings(channels=(4, 4, 4, 4)), sample.train_images
    monkeypatch.setattr(m, "surroundings", lambda x, k: helper(x, k))
    monkeypatch.setitem(globals(), "helper", SURROUNDINGS)
    assert m.fast_ways.of(m.layers, settings, images) == proof.ALL
    monkeypatch.setitem(globals(), "helper", repeated)
    assert not m.fast_ways.of(m.layers, settings, images).winograd


helper, SURROUNDINGS = None, m.surroundings


class Net:
    """A network that is an object, of which one can say m.loss_and_gradients(…, network=net)."""

    ops = [lambda x: (x * 1, None)]

    def layers(self, settings, rng=None):
        first, *others = layers(settings, rng)
        return [first, m.Layer("op", lambda x: self.ops[0](x), lambda dy, cache: dy), *others]

    __call__ = layers


@dataclass
class Unhashable(Net):
    width: int = 1

    __call__ = Net.layers


@pytest.mark.parametrize("kind", (Net, Unhashable))
@pytest.mark.parametrize("of", (lambda net: net, lambda net: net.layers))
def test_a_network_that_is_an_object_is_watched(kind, of, sample, monkeypatch):
    settings, net, images = m.Settings(channels=(4, 4, 4, 4)), kind(), sample.train_images
    compared, compare = [], m.fast_ways.compare
    monkeypatch.setattr(m.fast_ways, "compare", lambda *a: compared.append(a) or compare(*a))
    for _ in range(3):
        assert m.fast_ways.of(of(net), settings, images) == proof.ALL
    assert len(compared) == 1
    monkeypatch.setattr(Net, "ops", [lambda x: (x - x.mean(axis=2, keepdims=True), None)])
    assert not m.fast_ways.of(of(net), settings, images).shards
    Net.ops[0] = lambda x: (x * 1, None)
    assert m.fast_ways.of(of(net), settings, images) == proof.ALL


@pytest.mark.parametrize("given", ("by position", "by name", "through another function"))
def test_an_edited_convolution_is_noticed_however_it_is_called(given, sample, monkeypatch, capsys):
    right = m.conv2d

    def conv_block(x, w, b):
        h, cache = m.conv2d(x, w, b) if given == "by position" else m.conv2d(b=b, w=w, x=x)
        y, mask = m.relu(h)
        return y, (cache, mask)

    if given == "through another function":
        monkeypatch.setattr(m, "conv2d", lambda *inputs, **options: right(*inputs, **options))

    def network(settings, rng=None):
        return [layer for layer in layers(settings, rng) if layer.name not in ("conv4", "conv8")]

    monkeypatch.setattr(m, "conv_block", conv_block)
    settings = m.Settings(channels=(4, 4, 4, 4))
    assert m.fast_ways.of(network, settings, sample.train_images) == proof.ALL
    monkeypatch.setattr(m, "surroundings", repeated)
    ways = m.fast_ways.of(network, settings, sample.train_images)
    assert not ways.winograd and ways.shards
    capsys.readouterr()


def test_a_trace_in_another_thread_replaces_nothing(sample):
    found = []
    with Trace([vars(m)]):
        thread = threading.Thread(
            target=lambda: found.append(
                (m.fast_ways.replaced(), m.fast_ways.of(m.layers, m.Settings(), sample.test_images))
            )
        )
        thread.start()
        thread.join(60)
    assert found == [(set(), proof.ALL)]


def test_code_changed_in_place_is_noticed(sample):
    """As IPython's autoreload does."""
    before = m.surroundings.__code__
    try:
        m.surroundings.__code__ = edge.__code__
        assert m.fast_ways.replaced() == {"surroundings"}
        assert not m.fast_ways.of(m.layers, m.Settings(), sample.train_images).winograd
    finally:
        m.surroundings.__code__ = before
    assert m.fast_ways.of(m.layers, m.Settings(), sample.train_images) == proof.ALL


def edge(x, k):
    H, W, N, C = x.shape
    r = k // 2
    padded = xp.pad(x, ((r, r), (r, r), (0, 0), (0, 0)), "edge")  # noqa: F821  (the script's)
    view = xp.lib.stride_tricks.sliding_window_view(padded, (k, k), (0, 1))  # noqa: F821
    return view.transpose(4, 5, 3, 0, 1, 2).reshape(k * k * C, H * W * N).T


def test_a_replaced_start_is_what_main_starts(monkeypatch):
    monkeypatch.setattr(m, "start_run", lambda arguments: len(arguments))
    assert m.main(["--tag", "mine"]) == 2


# ── The kernels of a GPU ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def cuda():
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    return CudaOnCpu()


def engine_of(module, sample, cuda, monkeypatch, **given):
    """What gpu_engine() of a script says on a GPU, and the engine."""
    monkeypatch.setattr(gpu, "cuda", lambda: cuda)
    monkeypatch.setattr(gpu, "PREDICT_IMAGES", 24)
    monkeypatch.setattr(module, "xp", cuda.xp)
    settings = module.Settings(**{**SMALL, **ALL_ON, **given})
    state = module.init_state(settings)
    part = sample.train_images[:40].copy(), sample.train_labels[:40].copy()
    steps = gpu.ceil_div(40, settings.batch_size) * settings.epochs_max
    run = module.Run(settings, module.layers, state, part, part, part, steps)
    before = {name: a.copy() for name, a in state.views().items()}
    engine, where = module.gpu_engine(run, "GPU")
    assert all(np.array_equal(a, before[name]) for name, a in state.views().items())
    assert state.step == 0 and not state.history
    return engine, where


# Each is compared on emulated kernels, which takes seconds.
ON_A_GPU_BY_HAND = [name for i, name in enumerate([*EDITS, *HARMLESS]) if i % 3 != 2]


@pytest.mark.parametrize(
    "name",
    [
        *quick([*EDITS, *HARMLESS][2::3], ["one more layer"]),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ON_A_GPU_BY_HAND),
    ],
)
def test_on_a_gpu_an_edit_is_honoured_or_the_kernels_are_not_used(
    name, edited, sample, cuda, monkeypatch, capsys
):
    edit = {**EDITS, **HARMLESS}[name]
    engine, where = engine_of(edited(edit), sample, cuda, monkeypatch)
    if edit.kernels is None:
        assert engine is not None and where == "GPU"
    else:
        assert engine is None and re.search(edit.kernels, where), where
        assert where.startswith("GPU (plain operations: ") and "\n" not in where
    assert capsys.readouterr() == ("", "")


KERNELS_AS_THEY_ARE = {
    "reference": {name: 0.0 for name in ALL_ON} | {"dropout": 0.9},
    "quick": m.RECIPES["quick"],
    "sgd and avg": {"optimizer": "sgd", "pool": "avg"},
    "nearly all dropped": {"dropout": 0.9999},
    "extremes": {"augment": 10.0, "elastic": 10.0, "weight_decay": 1000.0, "learning_rate": 1000.0},
    "no rate": {"learning_rate": 0.0},
    "one cycle": {"schedule": "one_cycle", "warm_up": 0.0, "beta2": 0.999999},
    "momentum": {"optimizer": "sgd", "momentum": 0.9999},
    **{f"batches of {size}": {"batch_size": size} for size in (1, 39, 64, 1024)},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KERNELS_AS_THEY_ARE)
def test_the_script_as_it_is_never_loses_the_kernels(
    name, seed, sample, cuda, doubted, monkeypatch
):
    given = {"seed": seed, **KERNELS_AS_THEY_ARE[name]}
    engine, where = engine_of(m, sample, cuda, monkeypatch, **given)
    assert engine is not None and where == "GPU"


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in REPLACED if name != "layers"])
def test_the_kernels_are_not_used_for_what_is_replaced(name, sample, cuda, monkeypatch):
    monkeypatch.setattr(m, name, REPLACED[name][0])
    engine, where = engine_of(m, sample, cuda, monkeypatch)
    assert engine is None and "different gradient" in where


@pytest.mark.long
def test_the_kernels_are_not_used_for_replaced_layers(sample, cuda, monkeypatch):
    monkeypatch.setattr(m, "layers", without_pool4)
    engine, where = engine_of(m, sample, cuda, monkeypatch)
    assert engine is None and "different gradient" in where


def test_the_script_as_it_is_shows_nothing_to_a_gpu(sample, cuda, monkeypatch):
    monkeypatch.setattr(proof, "difference_of_kernels", lambda *_: pytest.fail("it is compared"))
    monkeypatch.setattr(gpu, "fast_path", lambda *_: ("the engine", ""))
    assert engine_of(m, sample, cuda, monkeypatch) == ("the engine", "GPU")


# ── What the files of a run say ───────────────────────────────────────────────────────────────────

FEW = "--device cpu --threads 1 --train-images 32 --batch-size 16 --channels 4,4,4,4".split()
PAGE = ("mnist_resnet9.py", "plot_figs.py", "predict.py")


@pytest.fixture
def copy(tmp_path):
    """A copy of the project, to be edited."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "support", folder / "support")
    for script in PAGE:
        shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "data" / "sample", folder / "data" / "sample")
    return folder


def edit_file(path, name):
    text = path.read_text(encoding="utf-8")
    for old, new in EDITS[name].changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def train(folder, *flags):
    result = start(folder / "mnist_resnet9.py", *FEW, "--data-dir", "data/sample", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
def test_whoever_meets_weights_of_other_code_says_so(copy):
    """Continuing a run, drawing it, reading digits with it; and what a run says of an edit."""
    log = copy / "save" / "resnet9" / "log.txt"
    said = train(copy, "--epochs-max", "1")
    assert said.count("***") == 1 and "*** train-images-idx3-ubyte" in said  # it is a sample
    config = json.loads((log.parent / "config.json").read_text())
    assert config["code"] == fingerprint.MADE_FOR
    digit = copy / "digit.png"
    picture = np.zeros((40, 40), np.uint8)
    picture[8:32, 18:22] = 255
    Image.fromarray(picture).save(digit)
    for script, *flags in (("plot_figs.py",), ("predict.py", digit)):
        result = start(copy / script, *flags)
        assert result.returncode == 0 and "other code" not in result.stdout + result.stderr

    edit_file(copy / "mnist_resnet9.py", "border repeated")
    for script, *flags in (("plot_figs.py",), ("predict.py", digit)):
        result = start(copy / script, *flags)
        said = result.stdout + result.stderr
        assert result.returncode == 0 and said.count("resnet9 was trained by other code") == 1
    train(copy, "--epochs-max", "2")
    said = log.read_text(encoding="utf-8")
    assert said.count("*** What defines the computation changed since") == 1
    assert said.count("*** convolution as written here differs from Winograd's (") == 1
    train(copy, "--epochs-max", "3")
    said = log.read_text(encoding="utf-8")
    assert said.count("*** What defines the computation changed since") == 1

    # A run of before has no fingerprint, and is not said to be another.
    config["code"] = None
    (log.parent / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    assert "other code" not in start(copy / "plot_figs.py").stderr
    assert "defines the computation" not in train(copy, "--epochs-max", "4")


@pytest.mark.parametrize(
    "name, says",
    [
        ("batch normalisation", "1 core (of 2: there is work for no more); files"),
        pytest.param("border repeated", "2 cores", marks=LONG),
        pytest.param("a new optimizer", "2 cores", marks=LONG),
    ],
)
def test_a_run_says_which_fast_way_it_does_without(name, says, edited, sample, tmp_path, capsys):
    module = edited(EDITS[name])
    flags = ["--save-dir", str(tmp_path), "--data-dir", "data/sample", "--epochs-max", "1"]
    settings = module.parse_settings([*FEW, "--threads", "2", *flags])
    assert module.run(settings, scripts=()) == 0
    log = (tmp_path / "resnet9" / "log.txt").read_text(encoding="utf-8")
    assert says in log and len(re.findall(EDITS[name].cpu or "no such line", log)) == bool(
        EDITS[name].cpu
    )
    assert capsys.readouterr().err.count("***") == 0  # it is said once


def test_a_setting_that_is_new_to_a_run_is_said(tmp_path, capsys):
    settings = m.parse_settings([*FEW, "--save-dir", str(tmp_path), "--data-dir", "data/sample"])
    settings = replace(settings, epochs_max=1)
    assert m.run(settings, scripts=()) == 0
    path = tmp_path / "resnet9" / "config.json"
    config = json.loads(path.read_text())
    del config["settings"]["elastic"], config["settings"]["ema"]
    path.write_text(json.dumps(config))
    for epochs, times in ((2, 1), (3, 1)):
        assert m.run(replace(settings, epochs_max=epochs), scripts=()) == 0
        said = (path.parent / "log.txt").read_text()
        line = (
            "*** This run was begun by code that had no setting elastic = 0.0, ema = 0.0: it goes"
        )
        assert said.count(line) == times
    capsys.readouterr()


def test_the_code_that_is_kept_is_the_code_that_runs(copy):
    """Not what is edited after the import; and what was replaced since is named."""
    program = copy / "program.py"
    program.write_text(
        "import pathlib\n"
        "import mnist_resnet9 as m\n"
        "path = pathlib.Path('mnist_resnet9.py')\n"
        "path.write_text('raise SystemExit(7)')\n"
        "pathlib.Path('support/workers.py').write_text('')\n"
        "relu = m.relu\n"
        "m.relu = lambda x: relu(x)\n"
        f"print(m.main({[*FEW, '--epochs-max', '1', '--data-dir', 'data/sample']}))\n"
    )
    result = start(program, cwd=copy)
    assert result.stdout.splitlines()[-1] == "0", result.stderr
    folder = copy / "save" / "resnet9"
    for script in ("mnist_resnet9.py", "support/workers.py"):
        assert (folder / "code" / script).read_bytes() == (ROOT / script).read_bytes()
    assert "*** Replaced since the import, so not as in code/: relu." in result.stdout
    code = json.loads((folder / "config.json").read_text())["code"]
    assert code == f"{fingerprint.MADE_FOR} and another relu"


def test_a_script_without_a_file_is_compared(sample):
    names = {**vars(m)}
    del names["__file__"]
    ways = proof.FastWays(names)
    assert ways.fingerprint == "unknown" and not ways.are_made_for_this()


# ── The fingerprint ───────────────────────────────────────────────────────────────────────────────


def test_what_a_fingerprint_looks_at():
    def of(old, new):
        assert SOURCE.count(old) == 1
        return fingerprint.fingerprint_of(SOURCE.replace(old, new))

    same = fingerprint.MADE_FOR
    assert of("    mask = x > 0\n", "    mask = (x > 0)  # a comment\n") == same
    assert of("sys.exit(main(sys.argv[1:]))", "sys.exit(main())") == same  # in no such section
    assert of("    mask = x > 0\n", "    mask = x >= 0\n") != same
    assert (
        of("0.1307", "0.1308") != same and of("    mask = x > 0\n", "    mask = x > 0.0\n") != same
    )
    assert of('        "max": (max', '        u"max": (max') == same
    without = SOURCE.replace("# ── Main ", "# ── End ")
    assert fingerprint.fingerprint_of(without) != same  # then it is that of the whole file


@pytest.mark.parametrize(
    "lines",
    (
        "def relu(x):\n    return x, x > 0",
        "relu = softmax",
        "relu, other = softmax, None",
        "if xp is np:\n    def relu(x):\n        return x, x > 0",
        "from math import exp as relu",
        "for relu in (softmax,):\n    pass",
        "class Parameters(dict):\n    pass",
        "Parameters.share_out = None",
        'globals()["relu"] = softmax',
        'setattr(sys.modules[__name__], "relu", softmax)',
        "def patch():\n    global relu\n    relu = softmax",
        "del relu",
    ),
)
def test_what_is_replaced_below_the_sections_counts(lines):
    last = "\nfast_ways = FastWays(globals())\n"
    assert SOURCE.count(last) == 1
    assert fingerprint.fingerprint_of(SOURCE.replace(last, f"\n{lines}\n{last}")) != (
        fingerprint.MADE_FOR
    )


def test_what_is_new_below_the_sections_does_not_count():
    last = "\nfast_ways = FastWays(globals())\n"
    lines = 'def mine(arguments):\n    relu = 7\n    return relu\n\n\nNAMES = ("a", "b")\n'
    text = SOURCE.replace(last, f"\n{lines}\n{last}")
    assert fingerprint.fingerprint_of(text) == fingerprint.MADE_FOR


def test_a_new_fingerprint_is_written_by_a_command(copy):
    edit_file(copy / "mnist_resnet9.py", "leaky relu")
    for words in ("MADE_FOR is ", "as before"):
        result = subprocess.run(
            [sys.executable, "-m", "support.fingerprint"], cwd=copy, capture_output=True, text=True
        )
        assert result.returncode == 0 and words in result.stdout
    program = "from support import fingerprint as f; print(f.MADE_FOR)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True
    )
    assert found.stdout.strip() in result.stdout and fingerprint.MADE_FOR not in result.stdout
