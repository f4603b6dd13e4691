"""The whole network: its gradient, the fast path against the plain one, shards and cores,
optimizers, schedule."""

import math

import numpy as np
import pytest

import mnist_resnet9 as m
from support import winograd

SMALL = m.Settings(channels=(2, 3, 3, 4), dropout=0.5, threads=1)


def noise(rng, N):
    """Images without two equal pixels side by side, so that no two pixels tie in a pooling
    window."""
    return rng.integers(0, 256, (N, 28, 28)).astype(np.uint8), rng.integers(0, 10, N)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Not max with few channels: where all of them are dead, neighbours tie, and a tie's gradient is
# defined, not derived.
@pytest.mark.parametrize(
    "pool, channels", [("avg", (2, 3, 3, 4)), ("avg", (2, 16, 16, 16)), ("max", (2, 16, 16, 16))]
)
def test_gradient_agrees_with_central_differences(rng, pool, channels):
    settings = m.Settings(channels=channels, pool=pool, dropout=0.5, threads=1)
    images, labels = noise(rng, 3)
    params = m.init_params(settings, np.float64)
    params.flat += 0.01 * rng.standard_normal(params.flat.size)  # biases too

    def loss_and_gradients():
        return m.loss_and_gradients(params, images, labels, settings, np.random.default_rng(7))

    loss, gradients = loss_and_gradients()
    for name in params:
        direction = rng.standard_normal(params[name].shape)
        step = 1e-6 / np.linalg.norm(direction) * direction
        params[name] += step
        above = loss_and_gradients()[0]
        params[name] -= 2 * step
        below = loss_and_gradients()[0]
        params[name] += step
        assert (above - below) / 2 == pytest.approx(
            (gradients[name] * step).sum(), rel=1e-4, abs=1e-11
        ), name


@pytest.mark.parametrize("N", [1, 15, 17, 33])
def test_gradient_is_the_mean_of_the_images_gradients(rng, N):
    images, labels = noise(rng, N)
    params = m.init_params(SMALL, np.float64)
    loss, gradients = m.loss_and_gradients(params, images, labels, SMALL)
    each = [
        m.loss_and_gradients(params, images[i : i + 1], labels[i : i + 1], SMALL) for i in range(N)
    ]
    assert loss == pytest.approx(np.mean([one for one, _ in each]))
    np.testing.assert_allclose(
        gradients.flat, np.mean([one.flat for _, one in each], axis=0), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("images_of", ["noise", "digits"])
def test_fast_path_agrees_with_the_plain_one(rng, sample, monkeypatch, images_of):
    settings = m.Settings(threads=1)
    images, labels = sample.train_images[:16], sample.train_labels[:16]
    if images_of == "noise":
        images, labels = noise(rng, 16)

    def gradients(dtype):
        return m.loss_and_gradients(m.init_params(settings, dtype), images, labels, settings)[
            1
        ].flat

    fast, fast32 = gradients(np.float64), gradients(np.float32)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 10**6)
    plain = gradients(np.float64)
    assert relative(fast, plain) < 1e-10
    assert relative(fast32, plain) < 1e-3
    assert fast32.dtype == np.float32


@pytest.mark.parametrize(
    "dtype, tolerance", [pytest.param(np.float64, 1e-9, marks=pytest.mark.long), (np.float32, 1e-3)]
)
def test_fast_and_plain_path_share_ten_steps(rng, monkeypatch, dtype, tolerance):
    settings = m.Settings(threads=1)
    images, labels = noise(rng, 16)

    def losses():
        state = m.init_state(settings)
        state.params = m.init_params(settings, dtype)
        state.moments = state.moments.astype(dtype)
        out = []
        for step in range(10):
            rng = m.random_stream(0, m.STEP, 1, step)
            loss, gradients = m.loss_and_gradients(state.params, images, labels, settings, rng)
            m.update(state, gradients, settings, settings.learning_rate)
            out.append(float(loss))
        return np.array(out)

    fast = losses()
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 10**6)
    np.testing.assert_allclose(fast, losses(), rtol=tolerance)


def test_number_of_cores_changes_no_bit(sample):
    results, settings = [], m.Settings(augment=1.0)
    for cores in (2, 3, 1):
        m.use_cores(cores)
        params = m.init_params(settings)
        rng = m.random_stream(3, m.STEP, 1, 2)
        loss, gradients = m.loss_and_gradients(
            params, sample.train_images[:40], sample.train_labels[:40], settings, rng
        )
        results.append((loss, gradients.flat, m.predict(params, sample.test_images[:40], settings)))
    for one, two, three in zip(*results):
        assert np.array_equal(one, two) and np.array_equal(one, three)


def test_without_rng_there_is_no_dropout_and_no_augmentation(rng):
    images, labels = noise(rng, 5)
    params = m.init_params(SMALL, np.float64)
    plain = m.loss_and_gradients(
        params, images, labels, m.Settings(channels=(2, 3, 3, 4), dropout=0.0)
    )[1]
    noisy = m.Settings(channels=(2, 3, 3, 4), dropout=0.9, augment=1.0)
    assert np.array_equal(m.loss_and_gradients(params, images, labels, noisy)[1].flat, plain.flat)
    assert not np.allclose(
        m.loss_and_gradients(params, images, labels, noisy, rng)[1].flat, plain.flat
    )


def test_a_plain_dict_of_parameters_serves(rng):
    images, labels = noise(rng, 2)
    params = m.init_params(SMALL)
    one, two = (m.loss_and_gradients(p, images, labels, SMALL)[1] for p in (params, dict(params)))
    assert list(one) == list(params) and np.array_equal(one.flat, two.flat)


@pytest.mark.parametrize("N", [1, 16, 37])
def test_predict_is_forward(sample, N):
    params, settings = m.init_params(m.Settings()), m.Settings()
    logits = m.predict(params, sample.test_images[:N], m.Settings())
    x = m.to_input(sample.test_images[:N], np.float32)
    expected, _ = m.forward(m.layers(settings), params, x)
    assert logits.shape == (N, 10) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_initialisation(sample):
    params = m.init_params(m.Settings())
    assert params.flat.size == 133_634 and len(params) == 18
    assert params["conv7.weight"].std() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert np.array_equal(params.flat, m.init_params(m.Settings()).flat)
    assert not np.array_equal(params.flat, m.init_params(m.Settings(seed=1)).flat)
    loss, _, _ = m.evaluate(
        params, sample.test_images[:200], sample.test_labels[:200], m.Settings()
    )
    assert loss == pytest.approx(math.log(10), abs=0.5)


def test_parameters_are_views_of_one_vector():
    params = m.init_params(SMALL)
    params.flat[:] = 1
    params["fc9.bias"][...] = 2
    assert (params["conv1.weight"] == 1).all() and (params.flat[-10:] == 2).all()


def polar(x):
    """What orthogonal(x) should be, by a singular value decomposition."""
    U, S, Vt = np.linalg.svd(x, full_matrices=False)
    S = S / np.linalg.norm(S)
    for _ in range(5):
        S = 3.4445 * S - 4.775 * S**3 + 2.0315 * S**5
    return U @ np.diag(S) @ Vt


@pytest.mark.parametrize("shape", [(36, 16), (144, 32), (9, 16), (1, 1), (7, 1)])
def test_orthogonal_agrees_with_a_singular_value_decomposition(rng, shape):
    x = rng.standard_normal(shape)
    x *= np.geomspace(0.1, 1, shape[1])  # directions of unlike strength
    y = m.orthogonal(x)
    # The 1e-7 that keeps 0 / 0 away is seen in the last digits.
    np.testing.assert_allclose(y, polar(x), atol=1e-5)
    S = np.linalg.svd(y, compute_uv=False)
    assert 0.68 < S.min() and S.max() < 1.14
    np.testing.assert_allclose(m.orthogonal(1000 * x), y, atol=1e-5)  # only directions count
    assert not m.orthogonal(np.zeros(shape, np.float32)).any()


@pytest.mark.parametrize(
    "optimizer, beta2", [("sgd", 0.999), ("adam", 0.999), ("adam", 0.9), ("muon", 0.9)]
)
def test_optimizers_agree_with_their_formulas(rng, optimizer, beta2):
    settings = m.Settings(
        channels=(2, 3, 3, 4), optimizer=optimizer, beta2=beta2, weight_decay=0.1, ema=0.9
    )
    state = m.init_state(settings)
    beta1 = 0.95 if optimizer == "muon" else 0.9
    w = {name: a.astype(float) for name, a in state.params.items()}
    ema, first, second = dict(w), dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0)
    for t in range(1, 6):
        gradients = m.Parameters(
            {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in w.items()}
        )
        m.update(state, gradients, settings, 0.01)
        for name, g in gradients.items():
            if name.endswith("weight"):
                w[name] = w[name] * (1 - 0.01 * 0.1)
            if optimizer == "sgd":
                first[name] = 0.9 * first[name] + g
                w[name] = w[name] - 0.01 * first[name]
            else:
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g**2
                m_hat, v_hat = first[name] / (1 - beta1**t), second[name] / (1 - beta2**t)
                step = m_hat / (np.sqrt(v_hat) + 1e-8)
                if (
                    optimizer == "muon"
                    and name.startswith("conv")
                    and name.endswith("weight")
                    and name != "conv1.weight"
                ):
                    x = (beta1 * first[name] + (1 - beta1) * g).reshape(-1, g.shape[3])
                    step = 0.2 * np.sqrt(max(x.shape)) * polar(x).reshape(g.shape)
                w[name] = w[name] - 0.01 * step
            keep = min(0.9, t / (9 + t))
            ema[name] = keep * ema[name] + (1 - keep) * w[name]
    for name in w:
        np.testing.assert_allclose(state.params[name], w[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.ema[name], ema[name], rtol=1e-4, atol=1e-5)
    assert state.step == 5 and state.to_evaluate() is state.ema


@pytest.mark.parametrize("warm_up", [0, 0.1, 0.3])
def test_one_cycle_rises_to_the_peak_and_falls_to_zero(warm_up):
    settings = m.Settings(schedule="one_cycle", learning_rate=0.002, warm_up=warm_up)
    peak = round(1000 * warm_up)
    rates = [m.rate_of_step(step, 1000, settings) for step in range(1000)]
    assert max(rates) == pytest.approx(0.002, rel=0.01) and abs(np.argmax(rates) - peak) <= 1
    assert (np.diff(rates[:peak]) > 0).all() and (np.diff(rates[peak + 1 :]) < 0).all()
    assert 0 < rates[-1] < 1e-6 and (not warm_up or rates[0] < 2e-5)
    assert m.rate_of_step(7, 1000, m.Settings()) == 1e-4


def test_shards_are_added_in_order_however_many_are_computed_at_once(rng, monkeypatch):
    """So that a batch of thousands of images does not fill the memory, and has the same bits."""
    images, labels = noise(rng, 41)
    params, found, sizes = m.init_params(SMALL), [], []
    over_cores = m.over_cores

    def counted(work, shards):
        sizes.append(len(shards))
        return over_cores(work, shards)

    monkeypatch.setattr(m, "over_cores", counted)
    for at_once in (1, 2, 64):
        monkeypatch.setattr(m, "SHARDS_AT_ONCE", at_once)
        stream = m.random_stream(0, m.STEP, 1)
        found.append(m.loss_and_gradients(params, images, labels, SMALL, stream))
    assert sizes == [1] * 6 + [2] * 3 + [6]
    for loss, gradients in found[1:]:
        assert loss == found[0][0] and np.array_equal(gradients.flat, found[0][1].flat)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_plan_has_the_key_that_each_step_would_draw(epoch):
    """Of its own stream; a GPU's step takes it from the plan."""
    settings = m.Settings(seed=9, epochs_max=3)
    keys, plan = m.plan_of(m.Run(settings, m.layers, None, (), (), (), total_steps=3 * 40), epoch)
    streams = [m.random_stream(9, m.STEP, epoch, number) for number in range(40)]
    assert list(keys) == [stream.integers(2**63, size=1)[0] for stream in streams]
    assert plan.shape == (40, 5)


def transposed(dy, cache):
    dx, dw, db = m.linear_backward(dy, cache)
    return dx, dw.T, db


def in_double(dy, cache):
    dx, dw, db = m.linear_backward(dy, cache)
    return dx, dw.astype(np.float64), db


def without_db(dy, cache):
    return m.linear_backward(dy, cache)[:2]


def dx_alone(dy, cache):
    return m.linear_backward(dy, cache)[0]


def with_another(dy, cache):
    return *m.linear_backward(dy, cache), dy


def summed_too_far(dy, cache):
    dx, dw, db = m.linear_backward(dy, cache)
    return dx, dw, db.sum()


SLIPS = {
    transposed: r"fc9.weight is float32 \(196, 10\), but its gradient is float32 \(10, 196\)",
    in_double: r"fc9.weight is float32 \(196, 10\), but its gradient is float64 \(196, 10\)",
    without_db: "the backward pass of fc9 gives 2 arrays, not dx and gradients of 2 parameters",
    with_another: "the backward pass of fc9 gives 4 arrays, not dx and gradients of 2 parameters",
    dx_alone: "the backward pass of fc9 gives 1 arrays, not dx and gradients of 2 parameters",
    summed_too_far: r"fc9.bias is float32 \(10,\), but its gradient is float32 \(\)",
}


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__)
def test_a_gradient_of_another_shape_or_dtype_is_an_error_with_its_name(slip, rng):
    """All of them go into one vector, where a transposed one would be taken for right."""

    def network(settings, rng=None):
        *others, last = m.layers(settings, rng)
        return [*others, last._replace(op_backward=slip)]

    images, labels = noise(rng, 3)
    with pytest.raises(m.UserError, match=f"^{SLIPS[slip]}$"):
        m.loss_and_gradients(m.init_params(SMALL), images, labels, SMALL, network=network)


@pytest.mark.parametrize("name", ["conv7", "conv_again"])
def test_two_parameters_of_one_name_are_an_error(name):
    """One's gradient would be taken for the other's: in two layers, or in one."""

    def network(settings, rng=None):
        *others, drop, last = m.layers(settings, rng)
        second = "conv8" if name == "conv7" else name
        return [*others, m.residual(name, second, settings.channels[3]), drop, last]

    with pytest.raises(m.UserError, match=f"^there are two parameters {name}.weight: give each"):
        m.init_params(SMALL, network=network)


@pytest.mark.parametrize("given", [(), None, np.zeros(2), (np.zeros(2),)], ids=str)
def test_a_layer_whose_parameters_have_no_values_is_an_error(given):
    names = ("scale.weight", "scale.bias")
    layer = m.Layer("scale", m.conv_block, m.conv_block_backward, names, lambda rng: given)

    with pytest.raises(
        m.UserError, match="^scale has the parameters scale.weight, scale.bias: its start"
    ):
        m.init_params(SMALL, network=lambda settings, rng=None: [layer])


def forgets_to_return(dy, mask):
    m.relu_backward(dy, mask)


@pytest.mark.parametrize("back", [m.relu_backward, forgets_to_return])
def test_a_layer_that_gets_no_gradient_is_an_error(back, rng):
    """The one after it has need_dx=False, or computes dx and does not return it."""

    def network(settings, rng=None):
        first, *others = m.layers(settings, rng)
        if back is forgets_to_return:
            return [first, m.Layer("twice", m.relu, back), *others]
        return [m.Layer("bend", m.relu, back), first, *others]

    name = "conv1" if back is forgets_to_return else "bend"
    images, labels = noise(rng, 3)
    params = m.init_params(SMALL, network=network)
    with pytest.raises(
        m.UserError, match=f"^{name} gets no gradient: the layer after it returns no dx"
    ):
        m.loss_and_gradients(params, images, labels, SMALL, network=network)
