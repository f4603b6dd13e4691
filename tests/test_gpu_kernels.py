"""The GPU's kernels (support/gpu.cu) against the plain operations of the script.

Each test runs twice: on a CPU, where cuda_on_cpu.py compiles the kernels with the C++ compiler
(with plain products in place of tensor cores), and on a GPU. What a machine lacks is skipped. All
arrays start as NaN.
"""

import copy
import itertools
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import nvrtc
import pytest
from cuda_for_numpy import CudaForNumpy
from cuda_on_cpu import COMPILER, KIB, CudaOnCpu, Poisoned

import mnist_resnet9 as m
from support import UserError, gpu

LONG = pytest.mark.long
SMALL = (4, 8, 8, 12)
CLOSE = 1e-5  # tensor cores: up to 6e-6 for sums of 864 products; plain products: 1e-6


@pytest.fixture(scope="module", params=["emulated", "GPU"])
def cuda(request):
    if request.param == "emulated":
        if COMPILER is None:
            pytest.skip("there is no C++ compiler")
        return CudaOnCpu()
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("there is no GPU")
    return CudaForNumpy()


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def double(*arrays):
    return [a.astype(np.float64) for a in arrays]


def far(one, other):
    """The distance of two arrays, in lengths of the other."""
    return np.linalg.norm(one - other) / np.linalg.norm(other)


SHAPES = [
    (28, 1, 4, 3),
    (28, 4, 16, 2),
    (28, 12, 20, 1),
    (14, 16, 32, 5),
    (14, 32, 36, 3),
    (14, 48, 96, 2),
]


def tiles_of_shapes(limit):
    for side, C, K, _ in SHAPES:
        yield gpu.Convolution(side, C, K, False, limit)
        yield gpu.KernelGradient(side, C, K, limit)
        if C > 1:
            yield gpu.Convolution(side, K, C, True, limit)


class Layer:
    """Real and expected results of one convolution, forward and backward."""

    def __init__(self, cuda, rng, side, C, K, N):
        # All at once, which takes less time than one by one.
        cuda.compile({tile.name for tile in tiles_of_shapes(cuda.limit)})
        self.cuda, self.numbers = cuda, (np.int32(N), np.uint32(gpu.inverse(N)))
        self.x, self.w, self.b = (
            floats(rng, side, side, N, C),
            floats(rng, 3, 3, C, K),
            floats(rng, K),
        )
        self.dy, self.add = floats(rng, side, side, N, K), floats(rng, side, side, N, K)
        self.gate, self.shortcut = floats(rng, side, side, N, C), floats(rng, side, side, N, C)
        self.y, cache = m.conv2d(*double(self.x, self.w, self.b))
        self.dx, self.dw, self.db = m.conv2d_backward(self.dy.astype(np.float64), cache)
        self.N = N

    def convolution(self, tile, x, b, add, gate, shape, relu=False):
        y = self.cuda.xp.empty(shape)
        arguments = x, self.w, b, add, gate, y, np.int32(relu), *self.numbers
        grid = tile.grid(self.N)
        self.cuda.launch(tile.name, grid, tile.threads, *arguments, shared=tile.shared)
        return y


@pytest.mark.parametrize("side, C, K, N", SHAPES)
def test_convolution_forward(side, C, K, N, cuda, rng):
    layer = Layer(cuda, rng, side, C, K, N)
    tile, shape = gpu.Convolution(side, C, K, False, cuda.limit), layer.y.shape
    y = layer.convolution(tile, layer.x, layer.b, gpu.NULL, gpu.NULL, shape)
    assert far(y, layer.y) < CLOSE
    y = layer.convolution(tile, layer.x, layer.b, layer.add, gpu.NULL, shape, relu=True)
    assert far(y, np.maximum(layer.y + layer.add, 0)) < CLOSE


@pytest.mark.parametrize("side, C, K, N", SHAPES[1:])
def test_convolution_backward(side, C, K, N, cuda, rng):
    layer = Layer(cuda, rng, side, C, K, N)
    tile, shape = gpu.Convolution(side, K, C, True, cuda.limit), layer.x.shape
    dx = layer.convolution(tile, layer.dy, gpu.NULL, gpu.NULL, gpu.NULL, shape)
    assert far(dx, layer.dx) < CLOSE
    dx = layer.convolution(tile, layer.dy, gpu.NULL, layer.shortcut, layer.gate, shape)
    assert far(dx, (layer.dx + layer.shortcut) * (layer.gate > 0)) < CLOSE


@pytest.mark.parametrize("side, C, K, N", SHAPES)
def test_kernel_gradient(side, C, K, N, cuda, rng):
    layer, tile = Layer(cuda, rng, side, C, K, N), gpu.KernelGradient(side, C, K, cuda.limit)
    a_block, blocks = tile.split(N, cuda.blocks)
    count = blocks * tile.groups
    parts, gradient = cuda.xp.empty((count, tile.size)), cuda.xp.empty(tile.size)
    arguments = layer.x, layer.dy, parts, np.int32(a_block), *layer.numbers
    cuda.launch(tile.name, (blocks, tile.tiles), tile.threads, *arguments, shared=tile.shared)
    for columns in (8, 32):
        grid, sizes = gpu.ceil_div(tile.size, columns), (np.int32(tile.size), np.int32(count))
        cuda.launch(f"add_parts<{columns}>", grid, 256, parts, gradient, *sizes)
        assert far(gradient[:-K], layer.dw.ravel()) < CLOSE
        assert far(gradient[-K:], layer.db) < CLOSE


def with_ties(rng, *shape):
    """Numbers of which many are equal within a window, some only up to rounding, and many are 0."""
    x = np.maximum(rng.integers(-3, 3, shape), 0).astype(np.float32)
    return x * (1 + 1e-6 * floats(rng, *shape))


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pooling(pool, cuda, rng):
    x, dy = with_ties(rng, 28, 28, 3, 4), floats(rng, 14, 14, 3, 4)
    _, forward, backward, *_ = m.pool("pool", m.Settings(pool=pool))
    plain, cache = forward(x)
    dx, expected = cuda.xp.empty(x.shape), backward(dy, cache) * (x > 0)
    y, name, size = (
        cuda.xp.empty(plain.shape),
        f"28, {str(pool == 'max').lower()}",
        (np.int32(dy.size), np.int32(12)),
    )
    cuda.launch(f"pool<{name}>", gpu.blocks_of(dy.size), 256, x, y, *size)
    np.testing.assert_allclose(y, plain, rtol=1e-6)
    cuda.launch(f"pool_gradient<{name}>", gpu.blocks_of(dy.size), 256, x, dy, dx, *size)
    np.testing.assert_allclose(dx, expected, rtol=1e-6)


@pytest.mark.parametrize("key", [0, 5, 2**63 - 7])
def test_uniform_numbers_are_those_of_numpys_philox(key, cuda):
    stream, numpy_stream = gpu.Stream(cuda, key), np.random.Generator(np.random.Philox(key=key))
    # Draws of whole words of four follow one another as NumPy's do.
    for shape in ((6, 12), (16, 49), (3,)):
        np.testing.assert_array_equal(
            stream.random(shape), numpy_stream.random(shape, dtype=np.float32)
        )


def test_normal_numbers_are_made_of_uniform_ones(cuda):
    normal, uniform = (
        gpu.Stream(cuda, 3).standard_normal(20_000),
        gpu.Stream(cuda, 3).random(20_000).astype(float),
    )
    length, angle = np.sqrt(-2 * np.log(1 - uniform[::2])), 2 * np.pi * uniform[1::2]
    np.testing.assert_allclose(normal[::2], length * np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(normal[1::2], length * np.sin(angle), atol=1e-5)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02
    first, second = gpu.Stream(cuda, 4), gpu.Stream(cuda, 4)
    assert not np.array_equal(first.random(9), first.random(9))
    assert np.array_equal(second.random((3, 3)).ravel(), gpu.Stream(cuda, 4).random(9))


def test_what_a_student_may_draw_follows_numpys_generator(cuda):
    """Same arguments, same shapes and kinds of numbers; what is not there is refused in a line."""
    draws = {
        "random": [(), (5,), ((2, 3), np.float64), ((2, 3), np.float32)],
        "standard_normal": [(), ((2, 3), np.float64)],
        "uniform": [(), (-2, 3.5, (40, 9))],
        "normal": [(), (5, 0.1, 200)],
        "integers": [(7,), (-3, 9, 200), (0, 2**16, (8, 8), np.uint16)],
    }
    for name, calls in draws.items():
        for given in calls:
            found = np.asarray(getattr(gpu.Stream(cuda, 4), name)(*given))
            expected = np.asarray(getattr(np.random.default_rng(4), name)(*given))
            assert found.shape == expected.shape, (name, given)
            if name == "integers" or len(given) == 2:
                assert found.dtype == expected.dtype
    assert set(gpu.Stream(cuda, 1).integers(3, 9, size=999)) == set(range(3, 9))
    low = gpu.Stream(cuda, 2).uniform(low=-2, high=3.5, size=9999)
    assert -2 <= low.min() < -1.99 and 3.49 < low.max() < 3.5
    assert gpu.Stream(cuda, 3).normal(5, 0.1, 9999).mean() == pytest.approx(5, abs=0.01)
    for name in ("choice", "permutation", "shuffle", "beta"):
        with pytest.raises(UserError, match=f"rng.{name} is not possible: random, "):
            getattr(gpu.Stream(cuda, 4), name)
    assert not hasattr(gpu.Stream(cuda, 4), "bit_generator")  # which a trace asks for
    for high in (2**63, 0, np.arange(1, 5)):
        with pytest.raises(UserError, match="by at most 65,536"):
            gpu.Stream(cuda, 4).integers(high)


def adam64(gradients, settings, beta1, rate):
    """Parameters and moments after steps with these gradients from 0, in float64."""
    w, mean, square = np.zeros((3, len(gradients[0])))
    for t, slope in enumerate(double(*gradients), 1):
        mean += (1 - beta1) * (slope - mean)
        square += (1 - settings.beta2) * (slope * slope - square)
        corrected = square / (1 - settings.beta2**t)
        w -= rate / (1 - beta1**t) * mean / (np.sqrt(corrected) + 1e-8)
    return w, mean, square


@pytest.mark.parametrize("beta2", [0.999, pytest.param(0.99999, marks=LONG), 0.999999])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_moments_with_beta2_near_1(optimizer, beta2, cuda, rng):
    """1 − beta2 in float32 would lose up to 17 of its 24 bits."""
    settings, beta1 = m.Settings(optimizer=optimizer, beta2=beta2), BETA1[optimizer]
    gradients = [floats(rng, 9 * 8 * 8) for _ in range(3)]
    w, moments = np.zeros(576, np.float32), np.zeros((2, 576), np.float32)
    plan = np.float32(plan_of(settings, 0, [1e-3] * 3))
    betas = np.float32([beta1, 1 - beta1, 1 - beta2])
    kinds, losses, now = np.zeros(576, np.uint8), np.zeros(3, np.float32), np.zeros(1, np.int32)
    X, parts = cuda.xp.empty((96, 16)), cuda.xp.empty((3, 16, 16))
    for step, dw in enumerate(gradients):
        now[:] = step
        if optimizer == "muon":  # its moments are moved by a kernel of their own
            cuda.launch("muon_mean<72, 8>", 3, 256, dw, moments[0], X, parts, *betas[:2])
            continue
        sizes = np.int32(576), *betas, plan, losses, np.int32(1), losses, now, now.copy()
        cuda.launch("update<1>", 3, 256, w, dw, moments, gpu.NULL, kinds, *sizes)
    expected, mean, square = adam64(gradients, settings, beta1, 1e-3)
    assert far(moments[0], mean) < 1e-6
    if optimizer == "adam":
        assert far(moments[1], square) < 1e-6 and far(w, expected) < 1e-6
    else:
        assert not moments[1].any()  # an orthogonal step has no use for it


# ── Whole steps ───────────────────────────────────────────────────────────────────────────────────

BETA1 = {"sgd": 0.0, "adam": 0.9, "muon": 0.95}


def plan_of(settings, first, rates):
    """What changes from step to step, for the steps from `first` on."""
    beta1, beta2 = BETA1[settings.optimizer], settings.beta2
    plan = []
    for t, rate in enumerate(rates, first + 1):
        ema_keeps = min(settings.ema, t / (9 + t))
        shrink = 1 - rate * settings.weight_decay
        plan.append((rate, shrink, rate / (1 - beta1**t), 1 - beta2**t, 1 - ema_keeps))
    return plan


class Keys:
    """The generator of a step, which gives one key, whatever the number of shards."""

    def __init__(self, key):
        self.key = key

    def integers(self, _, size):
        return np.full(size, self.key, np.uint64)


class Both:
    """The same run twice: by the kernels and by the plain operations, on a few images."""

    def __init__(self, cuda, sample, images=24, **given):
        self.settings = m.Settings(**{"channels": SMALL, "batch_size": 16, **given})
        self.state, self.plain = m.init_state(self.settings), m.init_state(self.settings)
        self.images = sample.train_images[:images].copy()
        self.labels = sample.train_labels[:images].copy()
        self.order = np.random.default_rng(1).permutation(images)
        steps = gpu.ceil_div(images, self.settings.batch_size)
        self.keys = np.arange(7, 7 + steps, dtype=np.uint64)
        self.rates = [1e-3 * (i + 1) for i in range(steps)]
        self.trainer = self.make(cuda, self.state)

    def make(self, cuda, state):
        bumps, beta1 = m.bumps(28, 28, np), BETA1[self.settings.optimizer]
        return gpu.Trainer(cuda, self.settings, state, self.images, self.labels, bumps, beta1)

    def begin(self, trainer, done=0):
        trainer.record()
        plan = plan_of(self.settings, 0, self.rates)
        trainer.begin_epoch(self.order, self.keys, plan, done)

    def batch(self, step):
        return self.order[step * self.settings.batch_size :][: self.settings.batch_size]

    def plain_gradients(self, step, dtype=np.float64):
        params = m.Parameters({name: a.astype(dtype) for name, a in self.plain.params.items()})
        batch = self.batch(step)
        return m.loss_and_gradients(
            params, self.images[batch], self.labels[batch], self.settings, Keys(self.keys[step])
        )


def pool_with_ties_of_float32(x, pool=m.max_pool2d):
    """max_pool2d, where numbers count as equal that do so in float32."""
    y, _ = pool(x)
    _, cache = pool(x.astype(np.float32))
    return y, cache


STEPS = [
    {
        "dropout": 0.15,
        "augment": 0.6,
        "elastic": 0.5,
        "optimizer": "muon",
        "ema": 0.99,
        "label_smoothing": 0.05,
    },
]
MORE_STEPS = [
    {"dropout": 0.9},
    {
        "dropout": 0.0,
        "pool": "avg",
        "optimizer": "sgd",
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
    },
    {"dropout": 0.5, "augment": 1.0, "ema": 0.9, "weight_decay": 0.1},
    {
        "dropout": 0.5,
        "elastic": 1.0,
        "optimizer": "muon",
        "weight_decay": 0.3,
        "channels": (12, 20, 16, 36),
    },
]


@pytest.mark.parametrize("given", [*STEPS, *[pytest.param(g, marks=LONG) for g in MORE_STEPS]])
def test_a_step_computes_what_the_plain_operations_do(given, cuda, sample, monkeypatch):
    check_steps(given, cuda, sample, monkeypatch)


@pytest.mark.long
def test_a_step_with_little_shared_memory(cuda, sample, monkeypatch):
    """60 channels in slices of 32 and 28, and Muon's rounds in global memory."""
    given = {"channels": (4, 8, 8, 60), "batch_size": 4, "optimizer": "muon"}
    small = with_limit(cuda, 48 * KIB)
    last = gpu.layers_of(given["channels"], small.limit)[-1]
    assert last.forward.slices == last.back.slices == 2 and not last.rounds.in_shared
    check_steps(given, small, sample, monkeypatch, images=8)


CARDS = {"P100": 48, "T4": 64, "RTX": 99, "A100": 163, "H100": 227}


@pytest.mark.parametrize(
    "card",
    [
        pytest.param(card, marks=LONG if card == "P100" else pytest.mark.exhaustive)
        for card in CARDS
    ],
)
@pytest.mark.parametrize("recipe", m.RECIPES)
def test_a_step_of_each_recipe_on_each_card(recipe, card, cuda, sample, monkeypatch):
    given, limited = m.RECIPES[recipe], with_limit(cuda, CARDS[card] * KIB)
    assert gpu.unsupported(m.Settings(**given)) is None
    channels = m.Settings(**given).channels
    given = {**given, "channels": channels, "batch_size": 4}
    check_steps(given, limited, sample, monkeypatch, images=8)


def with_limit(cuda, limit):
    """As on a card with so much shared memory for a block."""
    limited = copy.copy(cuda)
    limited.limit = min(limit, cuda.limit)
    return limited


def check_steps(given, cuda, sample, monkeypatch, images=20):
    """Loss and gradient against float64; then the update, with the gradient that the kernels found.

    A pixel that relu cuts in float32 only moves the gradient by up to 1e-3. With 8 images that is
    rare enough for one of some batches to be free of it; the last one of 20 is smaller."""
    monkeypatch.setattr(m, "SHARD_IMAGES", 10**6)  # a batch is one shard, as on a GPU
    monkeypatch.setattr(m, "device_stream", lambda key: gpu.Stream(cuda, key))
    monkeypatch.setattr(m, "max_pool2d", pool_with_ties_of_float32)
    both = Both(cuda, sample, images=images, **{"batch_size": 8, **given})
    both.begin(both.trainer)
    distances = []
    mean = both.state.params.flat.copy()
    for step, rate in enumerate(both.rates):
        loss, expected = both.plain_gradients(step)
        assert float(both.trainer.take(step)) == pytest.approx(float(loss), rel=1e-5)
        distances.append(far(both.trainer.gradient, expected.flat))
        found = m.Parameters.of_flat(both.trainer.gradient.copy(), both.plain.params)
        before = both.plain.params.flat.copy()
        m.update(both.plain, found, both.settings, rate)
        np.testing.assert_allclose(both.state.moments, both.plain.moments, rtol=1e-4, atol=1e-6)
        # Muon's rounds amplify rounding.
        bound = 5e-3 if both.settings.optimizer == "muon" else 1e-4
        for name, w in both.plain.params.items():
            change = w - m.Parameters.of_flat(before, both.plain.params)[name]
            assert np.linalg.norm(both.state.params[name] - w) <= bound * np.linalg.norm(change), (
                name
            )
        if both.state.ema is not None:
            keep = min(both.settings.ema, (1 + step) / (10 + step))
            mean += (1 - keep) * (both.state.params.flat - mean)
            np.testing.assert_allclose(both.state.ema.flat, mean, rtol=1e-5, atol=1e-7)
        both.plain.params.flat[:], both.plain.moments[:] = (
            both.state.params.flat,
            both.state.moments,
        )
    bound = 1e-5 if isinstance(cuda, CudaOnCpu) else 5e-5  # tensor cores: 6e-6 a convolution
    assert min(distances) < bound and max(distances) < 1e-3


@pytest.mark.long
def test_an_epoch_that_is_interrupted_gives_the_same_bits(cuda, sample):
    whole, parts = (
        Both(cuda, sample, images=40, ema=0.9, dropout=0.5, augment=0.5) for _ in range(2)
    )
    whole.begin(whole.trainer)
    losses = [float(whole.trainer.take(step)) for step in range(3)]
    parts.begin(parts.trainer)
    assert float(parts.trainer.take(0)) == losses[0]
    again = parts.make(cuda, parts.state)  # as after a restart, from the checkpoint's arrays
    parts.begin(again, done=1)
    assert [float(again.take(1)), float(again.take(2))] == losses[1:]
    assert np.array_equal(whole.state.params.flat, parts.state.params.flat)
    assert np.array_equal(whole.state.ema.flat, parts.state.ema.flat)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_predictions(pool, cuda, sample):
    settings = m.Settings(channels=SMALL, pool=pool)
    params = m.init_params(settings)
    predictor = gpu.Predictor(cuda, settings, dict(params), 8)
    predictor.record()
    for count in (1, 8, 19):
        images = sample.test_images[:count]
        assert np.abs(predictor(images) - m.predict(params, images, settings)).max() < 1e-4


# ── What can go wrong without a wrong number ──────────────────────────────────────────────────────


def signatures():
    """Name of each kernel → for each of its parameters: "reads", "writes" or None (a number)."""
    return {
        name: [
            None if "*" not in kind else "reads" if "const" in kind else "writes"
            for kind, _ in kernel.parameters
        ]
        for name, kernel in gpu.kernels().items()
    }


def conflicts(program, kernels):
    """Pairs of kernels that may run at the same time although one writes what the other uses."""
    done = {0: set()}  # branch → the launches that it has waited for
    before, seen, found = [], [], []
    for entry in program.entries:
        if entry is None:
            for waited in done.values():
                done[0] |= waited
            continue
        branch, name = entry.branch, entry.name
        before.append(done.setdefault(branch, set()))
        if branch:
            before[-1] |= done[0]
        use = [
            (kind, *np.lib.array_utils.byte_bounds(a))
            for kind, a in zip(kernels[name.split("<")[0]], entry.arguments)
            if kind and isinstance(a, np.ndarray)
        ]
        for number, (other, theirs) in enumerate(seen):
            if number not in done[branch] and any(
                "writes" in (mine[0], yours[0]) and mine[1] < yours[2] and yours[1] < mine[2]
                for mine in use
                for yours in theirs
            ):
                found.append((other, name))
        done[branch].add(len(seen))
        seen.append((name, use))
    return found


@pytest.mark.parametrize("given", STEPS + MORE_STEPS)
def test_kernels_that_run_side_by_side_leave_each_others_arrays_alone(given, cuda, sample):
    kernels, both = signatures(), Both(cuda, sample, **given)
    program = both.trainer.program(16)
    assert len(kernels) == 16
    for launch in program.launches():
        assert len(launch.arguments) == len(kernels[launch.name.split("<")[0]]), launch.name
    assert conflicts(program, kernels) == []


def test_a_kernel_that_does_not_wait_is_found(cuda, sample):
    kernels, program = signatures(), Both(cuda, sample, dropout=0.5).trainer.program(16)
    program.entries = program.launches()  # nobody waits for the rest
    found = conflicts(program, kernels)
    assert any("dropout_mask" in one and "head" in other for one, other in found)


@pytest.mark.parametrize("given", [{"smooth": 0}, {"beta1": 0, "beta_2": 0.9}])
def test_an_argument_that_no_kernel_has_is_refused(given):
    with pytest.raises(TypeError, match="no kernel takes (smooth|beta_2)$"):
        gpu.Program(None, **given)


def test_an_argument_that_a_kernel_does_not_have_is_refused():
    """It would be lost, and the kernel would take a null pointer in its place."""
    program, array = gpu.Program(None, N=8), np.zeros(8, np.float32)
    sizes = {"size": 8, "count": 1}
    program.launch("add_parts<8>", 1, 256, parts=array, sum=array, **sizes)
    with pytest.raises(TypeError, match="add_parts takes add, part"):
        program.launch("add_parts<8>", 1, 256, part=array, add=array, **sizes)
    with pytest.raises(TypeError, match="add_parts takes N"):
        program.launch("add_parts<8>", 1, 256, N=8, **sizes)
    with pytest.raises(KeyError, match="count"):  # a number has no null
        program.launch("add_parts<8>", 1, 256, parts=array, sum=array, size=8)
    assert len(program.entries) == 1


@pytest.mark.parametrize("N", [1, 2, 3, 16, 37, 64, 1000, 1024, 2047, 2048])
def test_rows_are_divided_exactly(N):
    rows = np.arange(28 * 28 * N, dtype=np.uint64)
    quotient = (rows * np.uint64(gpu.inverse(N))) >> np.uint64(32) if N > 1 else rows
    assert np.array_equal(quotient, rows // np.uint64(N))


class Modules(Poisoned):
    """Where CuPy would be: modules that are "compiled" by compile(names)."""

    def __init__(self, compile):
        self.cuda, self.compile, self.compiled, self.options = MagicMock(), compile, [], []

    def RawModule(self, code, options, name_expressions):
        self.compiled.append(name_expressions)
        self.options.append(options)
        self.compile(name_expressions)
        return MagicMock()


def cuda_of(xp):
    device = object.__new__(gpu.Cuda)
    device.xp, device.kernels, device.limit, device.blocks = xp, {}, 64 * KIB, 80
    return device


def test_a_recording_keeps_the_arrays_that_it_writes_to():
    cuda = cuda_of(Modules(lambda names: None))
    program = gpu.Program(cuda)
    array = weakref.ref(program.empty(3))
    play = cuda.record(program)
    del program
    assert array() is not None
    play()
    del play
    assert array() is None


def test_the_benchmark_compares_with_plain_products(monkeypatch):
    """benchmarks/gpu_step_time.py: kernels of their own, and those of the fast path stay."""
    monkeypatch.syspath_prepend(str(m.ROOT / "benchmarks"))
    import gpu_step_time as g

    xp = Modules(lambda names: None)
    monkeypatch.setattr(gpu.Cuda, "__init__", lambda self: vars(self).update(vars(cuda_of(xp))))
    fast = gpu.Cuda()
    monkeypatch.setattr(gpu, "cuda", lambda: fast)
    with g.plain_products(gpu):
        assert gpu.cuda() is gpu.cuda() is not fast
        gpu.cuda().compile({"fill_normal"})
    assert gpu.cuda() is fast and not fast.kernels
    fast.compile({"fill_normal"})
    assert xp.options == [("-std=c++17", "-DPLAIN_PRODUCTS"), ("-std=c++17",)]


def test_a_run_compiles_one_module(sample, monkeypatch):
    xp = Modules(lambda names: None)
    monkeypatch.setattr(gpu, "cuda", lambda: cuda_of(xp))
    settings = m.Settings(channels=SMALL, batch_size=16, optimizer="muon", augment=0.5)
    data = sample.train_images[:40], sample.train_labels[:40], m.bumps(28, 28, np)
    path, why = gpu.fast_path(settings, m.init_state(settings), *data, BETA1["muon"])
    assert path is not None, why
    kernels = path.trainer.programs[8].names() | path.predict.program.names()
    assert len(xp.compiled) == 1 and set(xp.compiled[0]) == kernels
    assert {"read_images<true>", "read_images<false>"} < kernels


def test_what_compiles_for_long_is_announced(monkeypatch, capsys):
    said = threading.Event()
    monkeypatch.setattr(gpu, "print", lambda *_, **__: said.set(), raising=False)
    cuda_of(Modules(lambda names: said.wait(60))).compile({"fill_normal"})
    assert said.is_set()


def test_what_is_found_compiled_is_not_announced(monkeypatch):
    timers = []

    class Timer(threading.Timer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            timers.append(self)

    monkeypatch.setattr(threading, "Timer", Timer)
    device = cuda_of(Modules(lambda names: None))
    device.compile({"fill_normal"})
    assert len(timers) == 1 and timers[0].finished.is_set()
    device.compile({"fill_normal"})
    assert len(timers) == 1 and len(device.xp.compiled) == 1


@pytest.mark.parametrize("numbers", [{}, {"MAX": True}, {"SIDE": 28, "MAX": True, "K": 4}])
def test_a_kernels_name_takes_all_its_numbers(numbers):
    assert gpu.with_numbers("pool", MAX=True, SIDE=28) == "pool<28, true>"
    with pytest.raises(TypeError, match="^pool takes SIDE, MAX, not"):
        gpu.with_numbers("pool", **numbers)


def test_the_graph_computes_what_the_plain_operations_do(sample, monkeypatch):
    """On a GPU with the graph itself, whose arrays nothing that is made later may share."""
    cupy = pytest.importorskip("cupy")
    if cupy.is_available():
        xp = cupy
    elif COMPILER:
        cuda = CudaOnCpu()
        xp = cuda.xp
        monkeypatch.setattr(gpu, "cuda", lambda: cuda)
        monkeypatch.setattr(m, "device_stream", lambda key: gpu.Stream(cuda, key))
    else:
        pytest.skip("there is neither a GPU nor a C++ compiler")
    monkeypatch.setattr(m, "xp", xp)
    monkeypatch.setattr(gpu, "PREDICT_IMAGES", 40)
    sizes, empty = [], gpu.Program.empty

    def counted(program, *shape, dtype=np.float32):
        sizes.append(empty(program, *shape, dtype=dtype).nbytes)
        return program.kept[-1]

    monkeypatch.setattr(gpu.Program, "empty", counted)
    settings = m.Settings(
        **dict(channels=SMALL, batch_size=16, optimizer="muon", dropout=0.5, ema=0.9),
        **dict(augment=0.5, elastic=0.5, weight_decay=0.1, label_smoothing=0.05),
    )
    images, labels = xp.asarray(sample.train_images[:40]), xp.asarray(sample.train_labels[:40])
    fast, plain = m.init_state(settings), m.init_state(settings)
    path, why = gpu.fast_path(settings, fast, images, labels, m.bumps(28, 28, xp), BETA1["muon"])
    assert path, why
    others = [xp.full(size, 7, np.uint8) for size in sizes]

    order, rates = np.arange(40)[::-1], [1e-3, 2e-3, 1e-3]
    streams = [m.random_stream(0, m.STEP, 1, step) for step in range(3)]
    keys = [stream.integers(2**63) for stream in streams]
    path.begin_epoch(order, keys, plan_of(settings, 0, rates))
    losses = [float(path.step(fast, step)) for step in range(3)]
    assert fast.step == 3
    logits = m.to_host(path.predict(xp.asarray(sample.test_images[:100])))
    assert all((other == 7).all() for other in others)

    monkeypatch.setattr(m, "SHARD_IMAGES", 10**6)
    for step, rate in enumerate(rates):
        batch = order[16 * step : 16 * step + 16]
        rng = m.random_stream(0, m.STEP, 1, step)
        x, y = images[xp.asarray(batch)], labels[xp.asarray(batch)]
        loss, gradients = m.loss_and_gradients(plain.params, x, y, settings, rng)
        m.update(plain, gradients, settings, rate)
        assert float(loss) == pytest.approx(losses[step], rel=1e-4)
    assert far(m.to_host(fast.params.flat), m.to_host(plain.params.flat)) < 1e-3
    expected = m.to_host(
        m.predict(plain.to_evaluate(), xp.asarray(sample.test_images[:100]), settings)
    )
    assert far(logits, expected) < 1e-3


def test_what_the_kernels_cannot_do_is_said():
    for recipe in m.RECIPES.values():
        assert gpu.unsupported(m.Settings(**recipe)) is None
    assert "multiples of 4" in gpu.unsupported(m.Settings(channels=(4, 10, 8, 8)))
    assert "at most 128" in gpu.unsupported(m.Settings(channels=(4, 8, 8, 132)))
    assert "batch_size" in gpu.unsupported(m.Settings(batch_size=2049))


@pytest.mark.parametrize("limit", [48, 64, 96, 99, 163, 227])
@pytest.mark.parametrize("side", [28, 14])
def test_every_width_fits_into_every_cards_shared_memory(side, limit):
    for C, K in itertools.product([1, *range(4, 132, 4)], range(4, 132, 4)):
        gradient = gpu.KernelGradient(side, C, K, limit * KIB)
        tiles = [gpu.Convolution(side, C, K, False, limit * KIB), gradient]
        tiles += [gpu.Convolution(side, K, C, True, limit * KIB)] if C > 1 else []
        assert all(tile.shared <= limit * KIB for tile in tiles), (C, K)
        assert all(tile.threads <= 256 for tile in tiles), (C, K)
        # A thread for the bias of each column of a tile.
        assert gradient.threads >= gpu.columns_of(K), (C, K)
    rounds = gpu.MuonRounds(K, limit * KIB)
    assert rounds.threads <= 1024 and rounds.shared <= limit * KIB


def names_of(settings, limit):
    """The kernels of a run on a card with so much shared memory."""
    device = SimpleNamespace(xp=np, limit=limit, blocks=264)
    images, labels = np.zeros((10, 28, 28), np.uint8), np.zeros(10, np.uint8)
    arrays = m.init_state(settings), images, labels, m.bumps(28, 28, np)
    trainer = gpu.Trainer(device, settings, *arrays, BETA1[settings.optimizer])
    predictor = gpu.Predictor(device, settings, m.init_params(settings), 8)
    programs = [*trainer.programs.values(), predictor.program]
    return sorted(set().union(*[program.names() for program in programs]))


RANDOM = ["fill_normal", "fill_uniform"]


@pytest.fixture(scope="module")
def compiler():
    found = nvrtc.library()
    if found is None:
        pytest.skip("the package nvidia-cuda-nvrtc-cu12 is not installed")
    return found


@pytest.mark.parametrize("architecture", [75, 80])  # without and with tensor cores
def test_cudas_compiler_takes_the_source(architecture, compiler):
    """One use of each template: without one the compiler would not look into it."""
    settings = m.Settings(**{**m.RECIPES["quick"], "channels": SMALL})
    uses = {name.split("<")[0]: name for name in names_of(settings, nvrtc.LIMITS[75] * KIB)}
    assert uses.keys() | set(RANDOM) == signatures().keys()
    nvrtc.compile_kernels(compiler, [*uses.values(), *RANDOM], architecture)


@pytest.mark.long
@pytest.mark.parametrize("architecture", nvrtc.LIMITS)
def test_cudas_compiler_takes_all_recipes_for_each_card(architecture, compiler):
    """Within the card's registers and shared memory; `pytest -s` shows how many."""
    if architecture not in nvrtc.architectures(compiler):
        pytest.skip(f"this compiler knows no sm_{architecture}")
    limit, names = nvrtc.LIMITS[architecture] * KIB, {*RANDOM}
    for recipe in m.RECIPES.values():
        settings = m.Settings(**recipe)
        names |= set(names_of(settings, limit))
    found = nvrtc.compile_kernels(compiler, sorted(names), architecture)
    registers, spilled, shared = (max(column) for column in zip(*found.values()))
    print(
        f"\nsm_{architecture}: {len(found)} kernels, at most {registers} registers, "
        f"{spilled} bytes spilled, {shared:,} bytes of fixed shared memory"
    )
    assert spilled <= 128 and shared <= 48 * KIB


EMULATED = m.Machinery(lambda _: "GPU, emulated", m.use_cores, m.gpu_engine)


@pytest.fixture
def few(cuda, sample, monkeypatch, tmp_path):
    """Runs on the fast path, on a few images: the settings that all of them have."""
    small = replace(
        sample, test_images=sample.test_images[:20], test_labels=sample.test_labels[:20]
    )
    monkeypatch.setattr(m, "load_mnist", lambda _: small)
    monkeypatch.setattr(m, "xp", cuda.xp)
    monkeypatch.setattr(gpu, "cuda", lambda: cuda)
    monkeypatch.setattr(gpu, "PREDICT_IMAGES", 20)
    return {"save_dir": str(tmp_path), "train_images": 20, "batch_size": 8, "channels": SMALL}


def same_bits(one, other):
    one, other = np.load(one / "checkpoint_last.npz"), np.load(other / "checkpoint_last.npz")
    names = [name for name in one.files if one[name].dtype == np.float32]
    return len(names) > 15 and all(np.array_equal(one[name], other[name]) for name in names)


WHERE = ("a launch", "a loss", "an epoch's end")


@LONG
@pytest.mark.parametrize("where", WHERE)
def test_what_cuda_reports_ends_a_run_in_a_line_and_it_continues(
    where, few, cuda, tmp_path, monkeypatch, capsys
):
    """In its second epoch; what a kernel did wrong shows where a number is next read."""
    error = pytest.importorskip("cupy").cuda.runtime.CUDARuntimeError(719)
    losses, step = [], gpu.FastPath.step

    class Failed:
        def __float__(self):
            raise error

    def failing_step(path, state, number):
        if where == "a launch" and len(losses) == 4:
            raise error
        losses.append(step(path, state, number))
        return Failed() if where == "a loss" and state.step == 4 else losses[-1]

    def failing_predict(predictor, images):
        if where == "an epoch's end" and len(losses) == 6:
            raise error
        return predict(predictor, images)

    def train(tag, epochs):
        settings = m.Settings(tag=tag, epochs_max=epochs, **few)
        return m.main([], lambda _: m.run(settings, machinery=EMULATED))

    predict = gpu.Predictor.__call__
    assert train("whole", 2) == 0
    assert train("parts", 1) == 0
    with monkeypatch.context() as patch:
        losses[:] = [0] * 3
        patch.setattr(gpu.FastPath, "step", failing_step)
        patch.setattr(gpu.Predictor, "__call__", failing_predict)
        capsys.readouterr()
        assert train("parts", 2) == 2
    said = capsys.readouterr().err
    assert "the GPU failed (cudaErrorLaunchFailure: unspecified launch failure); the check" in said
    assert "the same command continues" in said and said.count("\n") == 1
    assert train("parts", 2) == 0
    assert same_bits(tmp_path / "whole", tmp_path / "parts")


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="^not CUDA's$"), gpu.errors_in_a_line():
        raise RuntimeError("not CUDA's")


@pytest.mark.long
def test_a_run_on_the_fast_path_continues_with_the_same_bits(few, tmp_path, monkeypatch):
    """Two epochs at once; the same, stopped within the second; and the plain operations."""
    given = {**few, "ema": 0.9, "augment": 0.5}

    def train(tag):
        return m.run(m.Settings(tag=tag, epochs_max=2, **given), machinery=EMULATED)

    after_step = m.Bookkeeper.after_step

    def stop_in_the_second_epoch(book, loss):
        after_step(book, loss)
        book.stop = 15 * (book.state.step == 5)

    assert train("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(m.Bookkeeper, "after_step", stop_in_the_second_epoch)
        assert train("parts") == 128 + 15
    assert train("parts") == 0
    assert same_bits(tmp_path / "whole", tmp_path / "parts")
    assert "GPU, emulated; files" in (tmp_path / "whole" / "log.txt").read_text()

    plain = {}
    monkeypatch.setattr(gpu, "fast_path", lambda *_: (None, "plain operations: asked for"))
    monkeypatch.setattr(m, "SHARD_IMAGES", 10**6)
    assert train("plain") == 0
    for tag in ("whole", "plain"):
        plain[tag] = np.loadtxt(tmp_path / tag / "metrics.csv", delimiter=",", skiprows=1)[:, 2:6]
    np.testing.assert_allclose(plain["whole"], plain["plain"], rtol=1e-3)


def test_the_benchmark_takes_the_fast_path(cuda, sample, monkeypatch):
    """speed/gpu_step_time.py: the same losses by the fast path and by the plain operations."""
    monkeypatch.syspath_prepend(str(m.ROOT / "benchmarks" / "speed"))
    import gpu_step_time as g

    monkeypatch.setattr(m, "xp", cuda.xp)
    monkeypatch.setattr(gpu, "cuda", lambda: cuda)
    few = replace(
        sample,
        train_images=sample.train_images[:40].copy(),
        train_labels=sample.train_labels[:40].copy(),
    )
    settings = m.Settings(batch_size=16, channels=SMALL, learning_rate=1e-3)
    fast, plain = g.our_step(m, few, settings, fast=True), g.our_step(m, few, settings)
    losses = np.array([(float(fast()), float(plain())) for _ in range(2)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)
    assert np.isfinite(float(fast()))  # the next epoch
