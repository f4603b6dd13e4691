"""Every operation against its definition (reference.py) and every gradient against central
differences."""

import numpy as np
import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st
from reference import central_differences, error

import mnist_resnet9 as m
from support import winograd

pytestmark = pytest.mark.filterwarnings("error")

seeds = st.integers(0, 2**32 - 1)
few = st.integers(1, 4)
sides = st.integers(1, 7)


def spread(rng, shape, dtype=float):
    """Numbers of both signs, all different, at least 1/100 from each other and from 0: no step
    crosses a kink."""
    size = int(np.prod(shape))
    values = (np.arange(size) + 1) / 50 * rng.choice((-1, 1), size)
    return rng.permutation(values).reshape(shape).astype(dtype)


def normal(rng, shape, dtype=float):
    return rng.standard_normal(shape).astype(dtype)


def no_bias(K, dtype=float):
    return np.zeros(K, dtype)


class Case:
    """An operation with inputs for it: forward(*inputs) gives y, cache; gradients(dy, cache) one
    for each input."""

    def __init__(self, forward, backward, *inputs):
        self.forward, self.backward, self.inputs = forward, backward, inputs

    def gradients(self, dy, cache):
        d = self.backward(dy, cache)
        return d if isinstance(d, tuple) else (d,)

    def upstream(self, rng):
        """A random gradient of y, of y's shape and dtype."""
        y = np.asarray(self.forward(*self.inputs)[0])
        return normal(rng, y.shape, y.dtype) if y.ndim else float(rng.standard_normal())

    def check_gradients(self, rng, h=1e-6, limit=1e-7):
        dy = self.upstream(rng)
        gradients = self.gradients(dy, self.forward(*self.inputs)[1])
        assert len(gradients) == len(self.inputs)
        for x, dx in zip(self.inputs, gradients):
            numeric = central_differences(lambda: np.sum(self.forward(*self.inputs)[0] * dy), x, h)
            assert error(dx, numeric) < limit


def layer(conv, backward, k, rng, dtype, H=5, W=4, N=2, C=2, K=3):
    return Case(
        conv,
        backward,
        normal(rng, (H, W, N, C), dtype),
        normal(rng, (k, k, C, K), dtype),
        normal(rng, K, dtype),
    )


def conv2d(x, w, b):
    """m.conv2d as networks call it: the fast way for a kernel for which that pays."""
    return m.conv2d(x, winograd.prepare({"w": w})["w"], b)


def residual(C, K):
    """A residual block: with 3 and 2 channels its convolutions take the plain way, with 4 the fast
    one."""

    def case(rng, dtype):
        shapes = (3, 3, C, K), K, (3, 3, K, C), C
        w1, b1, w2, b2 = (normal(rng, shape, dtype) for shape in shapes)
        assert winograd.pays(w1) == winograd.pays(w2) == (C == 4)

        def block(x, w1, b1, w2, b2):
            w = winograd.prepare({"1": w1, "2": w2})
            return m.residual_block(x, w["1"], b1, w["2"], b2)

        return Case(
            block,
            m.residual_block_backward,
            normal(rng, (5, 4, 2, C), dtype),
            w1,
            b1,
            w2,
            b2,
        )

    return case


def after_softmax(rng, dtype):
    labels = rng.integers(10, size=6)
    probs = m.softmax(normal(rng, (6, 10), dtype))[0]
    return Case(lambda p: m.cross_entropy(p, labels), m.cross_entropy_backward, probs)


def fused(smoothing):
    def case(rng, dtype):
        labels = rng.integers(10, size=6)
        logits = normal(rng, (6, 10), dtype)
        return Case(
            lambda x: m.cross_entropy_loss(x, labels, smoothing),
            m.cross_entropy_loss_backward,
            logits,
        )

    return case


def pooling(pool, backward, size):
    return lambda rng, dtype: Case(
        lambda x: pool(x, size), backward, spread(rng, (7, 6, 2, 3), dtype)
    )


# Every operation once, at an ordinary size; for these all general promises are checked below.
CASES = {
    "relu": lambda rng, dtype: Case(m.relu, m.relu_backward, spread(rng, (5, 4, 2, 3), dtype)),
    "softmax": lambda rng, dtype: Case(m.softmax, m.softmax_backward, normal(rng, (6, 10), dtype)),
    "cross_entropy": after_softmax,
    "cross_entropy_loss": fused(smoothing=0),
    "cross_entropy_loss, smoothed": fused(smoothing=0.2),
    "dropout": lambda rng, dtype: Case(
        lambda x: m.dropout(x, 0.4, np.random.default_rng(3)),
        m.dropout_backward,
        normal(rng, (6, 20), dtype),
    ),
    "linear": lambda rng, dtype: Case(
        m.linear,
        m.linear_backward,
        normal(rng, (4, 6), dtype),
        normal(rng, (6, 5), dtype),
        normal(rng, 5, dtype),
    ),
    "avg_pool2d": pooling(m.avg_pool2d, m.avg_pool2d_backward, 2),
    "avg_pool2d of 3": pooling(m.avg_pool2d, m.avg_pool2d_backward, 3),
    "max_pool2d": pooling(m.max_pool2d, m.max_pool2d_backward, 2),
    "max_pool2d of 3": pooling(m.max_pool2d, m.max_pool2d_backward, 3),
    "conv2d of 1": lambda rng, dtype: layer(conv2d, m.conv2d_backward, 1, rng, dtype),
    "conv2d of 3": lambda rng, dtype: layer(conv2d, m.conv2d_backward, 3, rng, dtype),
    "conv2d of 3, 16 channels": lambda rng, dtype: layer(
        conv2d, m.conv2d_backward, 3, rng, dtype, C=16
    ),
    "conv2d of 5": lambda rng, dtype: layer(conv2d, m.conv2d_backward, 5, rng, dtype),
    "plain conv2d, 16 channels": lambda rng, dtype: layer(
        m.conv2d, m.conv2d_backward, 3, rng, dtype, C=16
    ),
    "winograd.conv2d": lambda rng, dtype: layer(
        winograd.conv2d, winograd.conv2d_backward, 3, rng, dtype, H=7, W=9
    ),
    "conv_block": lambda rng, dtype: layer(m.conv_block, m.conv_block_backward, 3, rng, dtype),
    "conv_block, 8 channels": lambda rng, dtype: layer(
        m.conv_block, m.conv_block_backward, 3, rng, dtype, C=8
    ),
    "residual_block": residual(3, 2),
    "residual_block, 4 channels": residual(4, 4),
}
every_operation = pytest.mark.parametrize("name", CASES)


# ── What holds for every operation ────────────────────────────────────────────────────────────────


@every_operation
def test_gradients_equal_central_differences(name, rng):
    CASES[name](rng, float).check_gradients(rng)


@every_operation
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_dtype_stays(name, dtype, rng):
    case = CASES[name](rng, dtype)
    y, cache = case.forward(*case.inputs)
    assert y.dtype == dtype
    assert [d.dtype for d in case.gradients(case.upstream(rng), cache)] == [dtype] * len(
        case.inputs
    )


@every_operation
def test_float32_gradients_are_those_of_float64(name):
    single = CASES[name](np.random.default_rng(5), np.float32)
    double = CASES[name](np.random.default_rng(5), np.float64)
    dy = double.upstream(np.random.default_rng(6))
    few = single.gradients(np.float32(dy) if np.ndim(dy) else dy, single.forward(*single.inputs)[1])
    many = double.gradients(dy, double.forward(*double.inputs)[1])
    assert all(error(a, b) < 1e-5 for a, b in zip(few, many))


@every_operation
def test_neither_pass_changes_its_inputs(name, rng):
    case = CASES[name](rng, float)
    before = [x.copy() for x in case.inputs]
    dy = case.upstream(rng)
    for x in (*case.inputs, *([dy] if np.ndim(dy) else [])):
        x.flags.writeable = False  # writing raises, even where it writes what was there
    _, cache = case.forward(*case.inputs)
    case.gradients(dy, cache)
    assert all(np.array_equal(x, x0) for x, x0 in zip(case.inputs, before))


@every_operation
def test_backward_twice_gives_the_same_and_a_forward_in_between_does_not_disturb(name, rng):
    case = CASES[name](rng, float)
    dy = case.upstream(rng)
    y, cache = case.forward(*case.inputs)
    y0, first = y.copy(), [d.copy() for d in case.gradients(dy, cache)]
    # As another layer of the same shape does.
    case.forward(*(x[::-1].copy() for x in case.inputs))
    second = case.gradients(dy, cache)
    assert np.array_equal(y, y0)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


@every_operation
def test_gradients_are_linear_in_the_upstream_gradient(name, rng):
    case = CASES[name](rng, float)
    dy, other = case.upstream(rng), case.upstream(rng)
    _, cache = case.forward(*case.inputs)
    both = case.gradients(2 * dy - 3 * other, cache)
    for d, a, b in zip(both, case.gradients(dy, cache), case.gradients(other, cache)):
        assert error(d, 2 * a - 3 * b) < 1e-12


# ── relu, softmax, cross-entropy ──────────────────────────────────────────────────────────────────


def test_relu_is_the_larger_of_x_and_0(rng):
    x = normal(rng, (5, 4, 2, 3))
    assert np.array_equal(m.relu(x)[0], reference.relu(x))


def test_relu_leaves_its_input_alone(rng):
    x = rng.standard_normal((5, 4))
    before = x.copy()
    y, _ = m.relu(x)
    assert np.array_equal(x, before) and not np.shares_memory(x, y)


def test_blocks_leave_their_input_as_it_was(rng):
    x, w, b = (
        rng.standard_normal((7, 7, 3, 4)),
        rng.standard_normal((3, 3, 4, 4)),
        rng.standard_normal(4),
    )
    before = x.copy()
    for block, weights in ((m.conv_block, (w, b)), (m.residual_block, (w, b, w, b))):
        y, cache = block(x, *weights)
        dy = rng.standard_normal(y.shape)
        dy_before = dy.copy()
        backward = m.conv_block_backward if block is m.conv_block else m.residual_block_backward
        backward(dy, cache)
        assert np.array_equal(x, before) and np.array_equal(dy, dy_before)


def test_relu_passes_nothing_at_0_and_below(rng):
    y, cache = m.relu(np.array([-2.0, -0.0, 0.0, 1e-300, 3.0]))
    assert y.tolist() == [0, 0, 0, 1e-300, 3]
    assert m.relu_backward(np.full(5, 7.0), cache).tolist() == [0, 0, 0, 7, 7]


@given(N=few, K=st.integers(1, 12), seed=seeds)
def test_softmax_equals_its_definition(N, K, seed):
    x = 5 * normal(np.random.default_rng(seed), (N, K))
    probs = m.softmax(x)[0]
    assert error(probs, reference.softmax(x)) < 1e-14
    assert np.abs(probs.sum(axis=1) - 1).max() < 1e-14
    # A number added to a whole row changes nothing.
    assert error(m.softmax(x + 100)[0], probs) < 1e-12


@given(N=few, K=st.integers(1, 12), seed=seeds)
def test_fused_loss_equals_softmax_then_cross_entropy(N, K, seed):
    rng = np.random.default_rng(seed)
    x, labels, dloss = (
        3 * normal(rng, (N, K)),
        rng.integers(K, size=N),
        float(rng.standard_normal()),
    )
    probs, probs_cache = m.softmax(x)
    loss, loss_cache = m.cross_entropy(probs, labels)
    fused_loss, fused_cache = m.cross_entropy_loss(x, labels)
    assert (
        abs(loss - fused_loss) < 1e-13
        and abs(loss - reference.cross_entropy(probs, labels)) < 1e-13
    )
    dx = m.softmax_backward(m.cross_entropy_backward(dloss, loss_cache), probs_cache)
    assert error(m.cross_entropy_loss_backward(dloss, fused_cache), dx, scale=dloss) < 1e-13


@given(N=few, K=st.integers(1, 12), smoothing=st.floats(0, 0.99), seed=seeds)
def test_a_smoothed_loss_is_that_of_a_label_that_is_spread(N, K, smoothing, seed):
    rng = np.random.default_rng(seed)
    x, labels = 3 * normal(rng, (N, K)), rng.integers(K, size=N)
    target = (1 - smoothing) * np.eye(K)[labels] + smoothing / K
    loss = -np.mean(np.sum(target * np.log(reference.softmax(x)), axis=1))
    assert m.cross_entropy_loss(x, labels, smoothing)[0] == pytest.approx(
        loss, rel=1e-12, abs=1e-13
    )


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_loss_of_extreme_logits_is_finite_and_exact(dtype):
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0]], dtype)
    loss, cache = m.cross_entropy_loss(logits, np.array([0, 1], np.uint8))
    assert loss == (0 + 2e4) / 2
    assert m.cross_entropy_loss_backward(1.0, cache).tolist() == [[0, 0, 0], [0.5, -0.5, 0]]
    assert m.softmax(logits)[0].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_loss_of_equal_logits_is_the_logarithm_of_their_number():
    assert abs(m.cross_entropy_loss(np.full((4, 10), 2.5), np.arange(4))[0] - np.log(10)) < 1e-15


# ── dropout ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rate", (0.1, 0.5, 0.9))
def test_dropout_keeps_its_share_and_the_expectation(rate, rng):
    x = 1 + rng.random((400, 500))
    y, _ = m.dropout(x, rate, np.random.default_rng(1))
    kept = y != 0
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation
    assert error(y[kept], x[kept] / (1 - rate)) < 1e-14
    assert abs(y.mean() / x.mean() - 1) < 5 * deviation / (1 - rate)


def test_dropout_depends_on_its_rng_alone(rng):
    x = normal(rng, (20, 30))
    one, again, other = (m.dropout(x, 0.5, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_dropout_switches_every_feature_of_every_image_on_its_own(rng):
    kept = m.dropout(np.ones((200, 300)), 0.5, rng)[0] != 0
    for axis in (0, 1):
        # No row and no column is all on or all off.
        assert np.abs(kept.mean(axis=axis) - 0.5).max() < 0.25


@pytest.mark.parametrize(
    "rate, generator", ((0.5, None), (0.0, np.random.default_rng(0)), (0.0, None))
)
def test_dropout_without_rng_or_rate_is_the_identity(rate, generator, rng):
    x, dy = normal(rng, (6, 7)), normal(rng, (6, 7))
    y, cache = m.dropout(x, rate, generator)
    assert np.array_equal(y, x) and np.array_equal(m.dropout_backward(dy, cache), dy)


def test_dropout_backward_uses_the_mask_of_forward(rng):
    x, dy = 1 + rng.random((20, 30)), normal(rng, (20, 30))
    y, cache = m.dropout(x, 0.7, rng)
    assert error(m.dropout_backward(dy, cache), dy * (y / x)) < 1e-14


# ── linear ────────────────────────────────────────────────────────────────────────────────────────


@given(N=few, F=sides, K=few, seed=seeds)
def test_linear_equals_its_definition_and_its_gradients_central_differences(N, F, K, seed):
    rng = np.random.default_rng(seed)
    case = Case(
        m.linear, m.linear_backward, normal(rng, (N, F)), normal(rng, (F, K)), normal(rng, K)
    )
    assert error(case.forward(*case.inputs)[0], reference.linear(*case.inputs)) < 1e-13
    case.check_gradients(rng, h=0.5, limit=1e-10)  # linear in each input, so a large step is exact


# ── pooling ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "pool, backward, of_window",
    [
        (m.avg_pool2d, m.avg_pool2d_backward, np.mean),
        (m.max_pool2d, m.max_pool2d_backward, np.max),
    ],
)
@given(H=sides, W=sides, N=few, C=few, size=st.integers(1, 3), seed=seeds)
@example(H=1, W=5, N=1, C=1, size=2, seed=0)  # no window fits
@example(H=7, W=5, N=1, C=2, size=2, seed=0)  # a row and a column are left out
def test_pooling_equals_its_definition_and_its_gradient_central_differences(
    pool, backward, of_window, H, W, N, C, size, seed
):
    rng = np.random.default_rng(seed)
    case = Case(lambda x: pool(x, size), backward, spread(rng, (H, W, N, C)))
    y, cache = case.forward(*case.inputs)
    assert error(y, reference.pool2d(*case.inputs, size, of_window)) < 1e-14
    case.check_gradients(rng, h=1e-4, limit=1e-9)
    (dx,) = case.gradients(case.upstream(rng), cache)
    assert not dx[H // size * size :].any() and not dx[:, W // size * size :].any()


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@given(H=sides, W=sides, N=few, C=few, size=st.integers(1, 3), seed=seeds)
def test_all_tied_maxima_get_the_full_gradient(dtype, H, W, N, C, size, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (H, W, N, C)).astype(dtype)  # five values: most windows hold a tie
    y, cache = m.max_pool2d(x, size)
    dy = normal(rng, y.shape, dtype)
    assert np.array_equal(
        m.max_pool2d_backward(dy, cache), reference.max_pool2d_backward(dy, x, size)
    )


def test_a_flat_window_passes_its_gradient_to_each_of_its_pixels():
    _, cache = m.max_pool2d(np.zeros((2, 2, 1, 1)))
    assert m.max_pool2d_backward(np.full((1, 1, 1, 1), 3.0), cache).ravel().tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_maxima_tie_up_to_rounding_and_no_further(dtype):
    eps = np.finfo(dtype).eps
    for apart, tie in ((2 * eps, 1), (1e5 * eps, 0)):
        x = np.array([5, 5 * (1 + apart), -1, 2], dtype).reshape(2, 2, 1, 1)
        y, cache = m.max_pool2d(x)
        assert y.item() == x.max()
        assert m.max_pool2d_backward(np.ones((1, 1, 1, 1), dtype), cache).ravel().tolist() == [
            tie,
            1,
            0,
            0,
        ]


# ── convolution ───────────────────────────────────────────────────────────────────────────────────


@given(
    k=st.sampled_from((1, 3, 5, 7)), H=sides, W=sides, N=st.integers(1, 3), C=few, K=few, seed=seeds
)
@example(k=7, H=1, W=1, N=1, C=1, K=1, seed=0)
@example(k=3, H=1, W=7, N=1, C=1, K=2, seed=0)
@example(k=5, H=7, W=1, N=2, C=2, K=1, seed=0)
def test_convolution_equals_its_definition(k, H, W, N, C, K, seed):
    rng = np.random.default_rng(seed)
    inputs = normal(rng, (H, W, N, C)), normal(rng, (k, k, C, K)), normal(rng, K)
    right = reference.conv2d(*inputs)
    # The terms may cancel, so their sizes are what rounding scales with.
    size = reference.conv2d(*map(np.abs, inputs))
    ways = (conv2d, m.conv2d, winograd.conv2d) if k == 3 else (conv2d, m.conv2d)
    for way in ways:
        assert error(way(*inputs)[0], right, size) < 1e-12


@pytest.mark.parametrize("k", (1, 3, 5, 7))
@given(
    H=st.integers(1, 5),
    W=st.integers(1, 5),
    N=st.integers(1, 2),
    C=st.integers(1, 2),
    K=st.integers(1, 3),
    seed=seeds,
)
@example(H=1, W=1, N=1, C=1, K=1, seed=0)
@example(H=1, W=5, N=1, C=1, K=1, seed=0)
def test_convolution_gradients_equal_central_differences(k, H, W, N, C, K, seed):
    rng = np.random.default_rng(seed)
    case = layer(m.conv2d, m.conv2d_backward, k, rng, float, H, W, N, C, K)
    case.check_gradients(rng, h=0.5, limit=1e-9)  # linear in each input, so a large step is exact


@given(H=st.integers(1, 7), W=st.integers(1, 7), seed=seeds)
@example(H=5, W=5, seed=0)
@example(H=6, W=4, seed=0)
def test_winograd_gradients_equal_central_differences(H, W, seed):
    rng = np.random.default_rng(seed)
    case = layer(winograd.conv2d, winograd.conv2d_backward, 3, rng, float, H, W, 2, 1, 2)
    case.check_gradients(rng, h=0.5, limit=1e-9)


def both_ways(x, w, b, dy):
    for way, backward in (
        (winograd.conv2d, winograd.conv2d_backward),
        (m.conv2d, m.conv2d_backward),
    ):
        y, cache = way(x, w, b)
        yield (y, *backward(dy, cache))


# Measured over 3,000 random shapes: at most 1.2e-14 in float64 and 5.6e-6 in float32.
@pytest.mark.parametrize("dtype, limit", ((np.float64, 1e-12), (np.float32, 1e-4)))
@given(
    H=st.integers(1, 30),
    W=st.integers(1, 30),
    N=few,
    C=st.integers(1, 20),
    K=st.integers(1, 20),
    seed=seeds,
)
@example(H=1, W=1, N=1, C=1, K=1, seed=0)
@example(H=28, W=28, N=2, C=16, K=16, seed=0)
@example(H=14, W=14, N=2, C=64, K=64, seed=0)
def test_winograd_equals_the_plain_way_forward_and_backward(dtype, limit, H, W, N, C, K, seed):
    rng = np.random.default_rng(seed)
    arrays = [normal(rng, shape, dtype) for shape in ((H, W, N, C), (3, 3, C, K), K, (H, W, N, K))]
    fast, plain = both_ways(*arrays)
    # Sums of the terms' sizes: what rounding scales with.
    _, sizes = both_ways(*map(np.abs, arrays))
    for a, b, size in zip(fast, plain, sizes):
        assert a.dtype == b.dtype == dtype
        assert error(a, b, size) < limit


def test_winograd_without_learning_gives_the_same_bits_and_keeps_nothing(rng):
    x, w, b = (normal(rng, shape, "f4") for shape in ((14, 14, 3, 8), (3, 3, 8, 5), 5))
    y, cache = winograd.conv2d(x, winograd.prepare({"w": w})["w"], b)
    again, nothing = winograd.conv2d(x, winograd.prepare({"w": w}, to_learn=False)["w"], b)
    assert cache is not None and nothing is None
    np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("C", (1, 16))  # both ways
@given(k=st.sampled_from((1, 3, 5)), H=st.integers(1, 20), W=st.integers(1, 20), K=few, seed=seeds)
def test_backward_is_the_adjoint_of_forward(C, k, H, W, K, seed):
    # Without bias, y is linear in x and in w: then ⟨dy, y⟩ = ⟨dx, x⟩ = ⟨dw, w⟩ for whatever dy.
    rng = np.random.default_rng(seed)
    x, w, dy = normal(rng, (H, W, 2, C)), normal(rng, (k, k, C, K)), normal(rng, (H, W, 2, K))
    y, cache = conv2d(x, w, no_bias(K))
    dx, dw, _ = m.conv2d_backward(dy, cache)
    size = np.abs(dy * y).sum() + np.abs(dx * x).sum()
    assert abs((dy * y).sum() - (dx * x).sum()) < 1e-12 * size
    assert abs((dy * y).sum() - (dw * w).sum()) < 1e-12 * size


@pytest.mark.parametrize("C", (2, 16))
@pytest.mark.parametrize("k", (1, 3, 5, 7))
def test_bias_gradient_is_the_sum_over_pixels_and_images(k, C, rng):
    case = layer(conv2d, m.conv2d_backward, k, rng, float, H=6, W=9, N=3, C=C)
    dy = case.upstream(rng)
    db = case.gradients(dy, case.forward(*case.inputs)[1])[2]
    assert error(db, dy.sum(axis=(0, 1, 2))) < 1e-13


@pytest.mark.parametrize("C", (2, 16))
def test_images_of_a_batch_do_not_mix(C, rng):
    case = layer(conv2d, m.conv2d_backward, 3, rng, float, H=9, W=8, N=3, C=C)
    x, w, b = case.inputs
    for n in range(3):
        assert (
            error(conv2d(x, w, b)[0][:, :, n], conv2d(x[:, :, n : n + 1], w, b)[0][:, :, 0]) < 1e-13
        )


def test_arrays_may_be_views_of_other_layouts(rng):
    for C in (2, 16):
        x, w, dy = normal(rng, (2, C, 7, 6)), normal(rng, (3, C, 3, 3)), normal(rng, (2, 3, 7, 6))
        views = [x.transpose(2, 3, 0, 1), w.transpose(2, 3, 1, 0), dy.transpose(2, 3, 0, 1)]
        (y, *d), (y0, *d0) = (
            (y, *m.conv2d_backward(dy, cache))
            for dy, (y, cache) in (
                (v[2], conv2d(v[0], v[1], no_bias(3))) for v in (views, [v.copy() for v in views])
            )
        )
        assert error(y, y0) < 1e-13 and all(error(a, b) < 1e-13 for a, b in zip(d, d0))


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("C", (3, 16))
def test_conv_block_is_convolution_then_relu(C, rng):
    case = layer(m.conv_block, m.conv_block_backward, 3, rng, float, H=6, W=5, C=C)
    dy = case.upstream(rng)
    y, cache = case.forward(*case.inputs)
    h, conv = m.conv2d(*case.inputs)
    y0, act = m.relu(h)
    assert error(y, y0) < 1e-13
    for d, d0 in zip(case.gradients(dy, cache), m.conv2d_backward(m.relu_backward(dy, act), conv)):
        assert error(d, d0) < 1e-13


@pytest.mark.parametrize("C", (3, 16))
def test_residual_block_adds_its_branch_to_its_input(C, rng):
    x, w1, w2 = (normal(rng, shape) for shape in ((6, 5, 2, C), (3, 3, C, C), (3, 3, C, C)))
    b1, b2 = normal(rng, C), normal(rng, C)
    y, cache = m.residual_block(x, w1, b1, w2, b2)
    h1, conv1 = m.conv2d(x, w1, b1)
    a1, act1 = m.relu(h1)
    h2, conv2 = m.conv2d(a1, w2, b2)
    y0, act2 = m.relu(x + h2)
    assert error(y, y0) < 1e-13
    dy = normal(rng, y.shape)
    dsum = m.relu_backward(dy, act2)
    da1, dw2, db2 = m.conv2d_backward(dsum, conv2)
    dx, dw1, db1 = m.conv2d_backward(m.relu_backward(da1, act1), conv1)
    for d, d0 in zip(m.residual_block_backward(dy, cache), (dsum + dx, dw1, db1, dw2, db2)):
        assert error(d, d0) < 1e-13


def test_residual_block_with_a_silent_branch_is_relu(rng):
    x, dy = normal(rng, (5, 4, 2, 3)), normal(rng, (5, 4, 2, 3))
    silent = np.zeros((3, 3, 3, 3)), no_bias(3)
    y, cache = m.residual_block(x, *silent, *silent)
    assert np.array_equal(y, np.maximum(x, 0))
    assert np.array_equal(m.residual_block_backward(dy, cache)[0], dy * (x > 0))


# ── augment ───────────────────────────────────────────────────────────────────────────────────────


class Drawn:
    """A generator that gives known numbers: r (±1) for turn, shear, width, height, down and right,
    for each image."""

    def __init__(self, *r):
        self.r = np.reshape(np.array(r, float), (6, -1))

    def random(self, shape, dtype=float):
        assert shape == self.r.shape
        return ((self.r + 1) / 2).astype(dtype)


def pattern(rng, N=1, H=28, W=28):
    return rng.integers(0, 256, (N, H, W), dtype=np.uint8)


def test_augment_of_strength_0_is_the_identity(rng):
    images = pattern(rng, 5)
    assert np.abs(m.augment(images, 0.0, np.random.default_rng(0)) - images).max() < 1e-3


@pytest.mark.parametrize("strength", (0.3, 1.0, 5.0))
def test_augmented_pixels_stay_within_0_and_255(strength, rng):
    out = m.augment(pattern(rng, 20), strength, rng)
    assert out.dtype == np.float32 and out.shape == (20, 28, 28)
    assert out.min() >= 0 and out.max() <= 255 * (1 + 1e-6)


def test_augment_depends_on_its_rng_alone_and_leaves_the_images_as_they_are(rng):
    images = pattern(rng, 4)
    images[1:] = images[0]
    before = images.copy()
    images.flags.writeable = False
    one, again, other = (m.augment(images, 1.0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])  # each image is distorted in its own way
    assert np.array_equal(images, before)


def test_augment_shifts_by_up_to_two_pixels_and_fills_with_0(rng):
    image = pattern(rng)
    # Looks 2 rows up and 1 column to the right.
    (out,) = m.augment(image, 1.0, Drawn(0, 0, 0, 0, -1, 0.5))
    right = np.zeros((28, 28))
    right[2:, :-1] = image[0, :-2, 1:]
    assert np.abs(out - right).max() < 1e-3
    half = m.augment(image, 1.0, Drawn(0, 0, 0, 0, 0, 0.25))[0]
    assert (
        np.abs(half[:, :-1] - (image[0, :, :-1] + image[0, :, 1:].astype(float)) / 2).max() < 1e-3
    )


def test_augment_by_a_quarter_turn(rng):
    image = pattern(rng)
    out = m.augment(image, 7.5, Drawn(1, 0, 0, 0, 0, 0))[0]  # 7.5 times 12° are 90°
    assert (
        np.abs(out - np.rot90(image[0])).max() < 1e-2
        or np.abs(out - np.rot90(image[0], -1)).max() < 1e-2
    )


@pytest.mark.parametrize("kind", ("turn", "shear", "width", "height", "down", "right", "all"))
def test_augment_equals_a_loop_over_pixels(kind, rng):
    images, r = pattern(rng, 3, 9, 12), 2 * rng.random((6, 3)) - 1
    kinds = ("turn", "shear", "width", "height", "down", "right")
    for i, name in enumerate(kinds):
        r[i] *= kind in (name, "all")
    for image, out, (turn, shear, wide, high, down, right) in zip(
        images, m.augment(images, 1.0, Drawn(*r)), r.T
    ):
        turn, wide, high = np.radians(12) * turn, 1 + 0.12 * wide, 1 + 0.12 * high
        assert (
            np.abs(
                out - reference.distort(image, turn, 0.15 * shear, wide, high, 2 * down, 2 * right)
            ).max()
            < 0.01
        )


class Bent(Drawn):
    """A generator that draws no turn or shift, but known weights for the bumps: rows first, then
    columns."""

    def __init__(self, rows, cols):
        super().__init__(*np.zeros((6, len(rows))))
        self.weights = [rows, cols]

    def standard_normal(self, shape, dtype=float):
        weights = self.weights.pop(0)
        assert shape == weights.shape
        return weights.astype(dtype)


def test_bending_equals_a_loop_over_pixels(rng):
    images, smooth = pattern(rng, 3, 9, 12), m.bumps(9, 12, np)
    rows, cols = rng.standard_normal((2, 3, len(smooth)))
    down, right = ((1.5 * (weights @ smooth)).reshape(3, 9, 12) for weights in (rows, cols))
    for i, out in enumerate(m.augment(images, 0.0, Bent(rows, cols), 1.5)):
        for y, x in np.ndindex(9, 12):
            wanted = reference.bilinear(images[i], y + down[i, y, x], x + right[i, y, x])
            assert abs(out[y, x] - wanted) < 0.01


@pytest.mark.parametrize("H, W", [(28, 28), (9, 12), (1, 5)])
def test_a_bend_is_smooth_and_as_large_as_asked(H, W, rng):
    smooth = m.bumps(H, W, np)
    assert smooth.dtype == np.float32 and smooth.shape[1] == H * W
    variance = (smooth.astype(float) ** 2).sum(axis=0)  # of each pixel
    np.testing.assert_allclose(variance, 1, rtol=1e-5)
    field = (rng.standard_normal((2000, len(smooth))) @ smooth).reshape(2000, H, W)
    assert np.abs(field.std(axis=0) - 1).max() < 0.15
    assert np.diff(field, axis=2).std() < 0.4  # neighbours move together


def test_bending_leaves_everything_else_as_it_was(rng):
    images = pattern(rng, 4)
    plain, off, bent = (
        m.augment(images, 1.0, np.random.default_rng(1), elastic) for elastic in (0, 0.0, 1.0)
    )
    assert np.array_equal(plain, off) and not np.array_equal(plain, bent)
    assert bent.dtype == np.float32 and 0 <= bent.min() and bent.max() <= 255 * (1 + 1e-6)
