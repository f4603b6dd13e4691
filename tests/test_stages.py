"""The stages of a pass: what layers.png shows is what the network computes, whatever it is."""

import functools

import numpy as np
import pytest

import mnist_resnet9 as m
from support.stages import CannotDraw, one_pass, words_for

SETTINGS = m.Settings(channels=(4, 5, 6, 7), label_smoothing=0.1)
RESNET9 = "image conv1 conv2 conv3 conv4 pool4 conv5 conv6 conv7 conv8 pool8 fc9".split()


def make_step(network=None, settings=SETTINGS, N=3, **options):
    """Parameters in float64, images, labels, and the Pass of them."""
    network = network or m.layers
    rng = np.random.default_rng(7)
    params = m.init_params(settings, np.float64, network)
    for p in params.values():
        p += 0.02 * rng.standard_normal(p.shape)
    images, labels = rng.integers(0, 256, (N, 28, 28)), rng.integers(0, 10, N)
    return params, images, labels, one_pass(m, network, params, images, labels, settings, **options)


def by_name(step):
    stages = {stage.name: stage for stage in step.stages}
    assert len(stages) == len(step.stages)
    return stages


def words(step):
    return [words_for(step.stages, i) for i in range(1, len(step.stages))]


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("channels", [(4, 5, 6, 7), (1, 2, 3, 2)])
def test_the_stages_are_what_the_network_computes(pool, channels):
    settings = m.Settings(channels=channels, pool=pool, label_smoothing=0.1)
    params, images, labels, step = make_step(settings=settings)
    loss, d = m.learn_from(params, images, labels, settings, None, m.layers)
    assert step.loss == loss and step.d.keys() == d.keys() == params.keys()
    for name in d:
        assert np.array_equal(step.d[name], d[name]), name
    assert [stage.name for stage in step.stages] == RESNET9
    x = m.to_input(images, np.float64)
    assert np.array_equal(step.stages[0].y, x)
    stages = by_name(step)
    for layer in m.layers(settings):
        x, _ = layer.op(x, *[params[name] for name in layer.params])
        if layer.name in stages:
            assert np.array_equal(stages[layer.name].y, x)
    assert np.array_equal(step.logits, x)
    h, _ = m.conv_block(stages["conv2"].y, params["conv3.weight"], params["conv3.bias"])
    assert np.array_equal(stages["conv3"].y, h)
    for stage in step.stages:
        assert stage.y.shape == stage.dy.shape, stage.name


def test_every_gradient_is_the_slope_of_the_loss():
    """Central differences of the loss: a layer's output is moved where the gradient is largest."""
    settings = m.Settings(channels=(4, 5, 6, 7), pool="avg", label_smoothing=0.1)
    params, images, labels, step = make_step(settings=settings)
    layers, eps = m.layers(settings), 1e-6
    ends = {layer.name: i + 1 for i, layer in enumerate(layers)} | {"image": 0}

    def loss(y, start):
        for layer in layers[start:]:
            y, _ = layer.op(y, *[params[name] for name in layer.params])
        return m.cross_entropy_loss(y, labels, settings.label_smoothing)[0]

    for stage in step.stages:
        if stage.name in ends:  # those within a block have no layer of their own
            at = np.unravel_index(abs(stage.dy).argmax(), stage.dy.shape)
            up, down = stage.y.copy(), stage.y.copy()
            up[at] += eps
            down[at] -= eps
            slope = (loss(up, ends[stage.name]) - loss(down, ends[stage.name])) / (2 * eps)
            assert stage.dy[at] == pytest.approx(slope, rel=1e-4), stage.name


def test_without_shortcuts_the_gradient_lacks_what_they_carry():
    params, _, _, whole = make_step()
    plain = make_step(shortcuts=False)[-1]
    one, other = by_name(whole), by_name(plain)
    for name in ("fc9", "pool8", "conv8", "conv7"):
        assert np.array_equal(one[name].dy, other[name].dy), name
    carried = one["conv8"].dy * (one["conv8"].y > 0)
    assert np.allclose(one["conv6"].dy - other["conv6"].dy, carried, rtol=0, atol=1e-15)
    _, cache = m.conv_block(other["conv2"].y, params["conv3.weight"], params["conv3.bias"])
    through, _, _ = m.conv_block_backward(other["conv3"].dy, cache)
    assert np.array_equal(other["conv2"].dy, through) and abs(through).max() > 0
    assert np.array_equal(whole.logits, plain.logits)
    assert not np.array_equal(one["image"].dy, other["image"].dy)
    assert not np.array_equal(whole.d["conv1.weight"], plain.d["conv1.weight"])


def test_shortcuts_are_found_and_named():
    step = make_step()[-1]
    starts = {stage.name: stage.start for stage in step.stages if stage.start is not None}
    assert starts == {"conv4": RESNET9.index("conv2"), "conv8": RESNET9.index("conv6")}
    assert words(step) == [
        *["3×3, relu"] * 3,
        "3×3, + conv2, relu",
        "largest of 2×2",
        *["3×3, relu"] * 3,
        "3×3, + conv6, relu",
        "largest of 2×2",
        "linear",
    ]


# ── As a student would edit it ────────────────────────────────────────────────────────────────────


def network_of(*made, features):
    """A network: these layers, and then a linear one."""

    def network(settings, rng=None):
        layers = [layer() for layer in made]
        return [*layers, m.flat("flat"), m.fully_connected("fc", features, 10)]

    return network


def leaky_relu(x):
    slope = np.where(x > 0, 1, 0.1).astype(x.dtype)
    return x * slope, slope


def leaky_relu_backward(dy, slope):
    return dy * slope


def strided(x, w, b):
    y, cache = m.conv2d(x, w, b)
    return y[::2, ::2], (cache, y.shape)


def strided_backward(dy, cache):
    cache, shape = cache
    whole = np.zeros(shape, dy.dtype)
    whole[::2, ::2] = dy
    return m.conv2d_backward(whole, cache)


def norm(x, gain):
    std = np.sqrt((x**2).mean(axis=(0, 1, 3), keepdims=True) + 1e-5)
    return gain * x / std, (x, std, gain)


def norm_backward(dy, cache):
    x, std, gain = cache
    z, dz = x / std, dy * gain
    along = (dz * z).mean(axis=(0, 1, 3), keepdims=True)
    return (dz - z * along) / std, (dy * z).sum(axis=(0, 1, 2))


def early_relu_block(x, w1, b1, w2, b2):
    """x + conv(relu(conv(relu(x)))): nothing comes after the sum."""
    h, act1 = m.relu(x)
    h, conv1 = m.conv2d(h, w1, b1)
    h, act2 = m.relu(h)
    h, conv2 = m.conv2d(h, w2, b2)
    return x + h, (act1, conv1, act2, conv2)


def early_relu_block_backward(dy, cache):
    act1, conv1, act2, conv2 = cache
    dh, dw2, db2 = m.conv2d_backward(dy, conv2)
    dh, dw1, db1 = m.conv2d_backward(m.relu_backward(dh, act2), conv1)
    return dy + m.relu_backward(dh, act1), dw1, db1, dw2, db2


def projected_block(x, w1, b1, w2, b2):
    """relu(conv(x) + 1×1 convolution of x): it is no chain."""
    h, conv1 = m.conv2d(x, w1, b1)
    p, conv2 = m.conv2d(x, w2, b2)
    y, act = m.relu(h + p)
    return y, (conv1, conv2, act)


def projected_block_backward(dy, cache):
    conv1, conv2, act = cache
    dsum = m.relu_backward(dy, act)
    dx1, dw1, db1 = m.conv2d_backward(dsum, conv1)
    dx2, dw2, db2 = m.conv2d_backward(dsum, conv2)
    return dx1 + dx2, dw1, db1, dw2, db2


def projected(C, K):
    def start(rng):
        return m.he(rng, (3, 3, C, K)), np.zeros(K), m.he(rng, (1, 1, C, K)), np.zeros(K)

    params = ("conv2.weight", "conv2.bias", "side2.weight", "side2.bias")
    return m.Layer("block2", projected_block, projected_block_backward, params, start)


def early(first, second, C):
    made = m.residual(first, second, C)
    return made._replace(op=early_relu_block, op_backward=early_relu_block_backward)


def with_norm(name, C):
    return m.Layer(name, norm, norm_backward, (f"{name}.gain",), lambda rng: (np.ones(C),))


def conv1(need_dx=False):
    return m.conv("conv1", 1, 2, need_dx=need_dx)


def in_a_lambda():
    """conv1 without its dx, as somebody might write it."""
    back = lambda dy, cache: m.conv_block_backward(dy, cache, need_dx=False)  # noqa: E731
    return conv1()._replace(op_backward=back)


POOL = functools.partial(m.pool, "pool", m.Settings(pool="avg"))


def pool3():
    op = functools.partial(m.avg_pool2d, size=3)
    return m.Layer("pool3", op, m.avg_pool2d_backward)


def leaky():
    return m.Layer("leaky", leaky_relu, leaky_relu_backward)


def reduced():
    return m.conv("conv2", 2, 3)._replace(op=strided, op_backward=strided_backward)


EDITED = {
    "another activation": (
        network_of(conv1, leaky, POOL, features=392),
        [("conv1", "3×3, relu"), ("leaky", "leaky relu"), ("pool", "mean of 2×2")],
    ),
    "a lambda": (network_of(in_a_lambda, features=1568), [("conv1", "3×3, relu")]),
    "a pool alone": (network_of(pool3, features=81), [("pool3", "mean of 3×3")]),
    "a stride": (
        network_of(conv1, reduced, features=588),
        [("conv1", "3×3, relu"), ("conv2", "3×3")],
    ),
    "a norm": (
        network_of(conv1, functools.partial(with_norm, "norm1", 2), features=1568),
        [("conv1", "3×3, relu"), ("norm1", "norm")],
    ),
    "relu before the convolution": (
        network_of(conv1, functools.partial(early, "conv2", "conv3", 2), features=1568),
        [("conv1", "3×3, relu"), ("conv2", "relu, 3×3, relu"), ("conv3", "3×3, + conv1")],
    ),
    "a shortcut that is no chain": (
        network_of(conv1, functools.partial(projected, 2, 3), features=2352),
        [("conv1", "3×3, relu"), ("block2", "3×3, 1×1, relu")],
    ),
    "a block that comes first": (
        network_of(functools.partial(m.residual, "conv1", "conv2", 1), features=784),
        [("conv1", "3×3, relu"), ("conv2", "3×3, + image, relu")],
    ),
    "blocks one after the other": (
        network_of(
            conv1,
            functools.partial(m.residual, "conv2", "conv3", 2),
            functools.partial(m.residual, "conv4", "conv5", 2),
            features=1568,
        ),
        [
            ("conv1", "3×3, relu"),
            ("conv2", "3×3, relu"),
            ("conv3", "3×3, + conv1, relu"),
            ("conv4", "3×3, relu"),
            ("conv5", "3×3, + conv3, relu"),
        ],
    ),
    "nothing but a linear layer": (network_of(features=784), []),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_network_has_its_own_stages(name):
    network, expected = EDITED[name]
    params, images, labels, step = make_step(network)
    found = list(zip([stage.name for stage in step.stages[1:]], words(step)))
    assert found == [*expected, ("fc", "linear")]
    _, d = m.learn_from(params, images, labels, SETTINGS, None, network)
    assert all(np.array_equal(d[name], step.d[name]) for name in d)
    for stage in step.stages:
        assert stage.dy is not None and stage.dy.shape == stage.y.shape, stage.name
    # The gradient of the image, which training does without, against a difference.
    direction = np.random.default_rng(1).standard_normal(step.stages[0].y.shape)

    def loss(eps):
        x = step.stages[0].y + eps * direction
        logits, _ = m.forward(network(SETTINGS), params, x)
        return m.cross_entropy_loss(logits, labels, SETTINGS.label_smoothing)[0]

    slope = (loss(1e-7) - loss(-1e-7)) / 2e-7
    assert (step.stages[0].dy * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_a_block_that_comes_first_has_two_gradients_at_the_image():
    network, _ = EDITED["a block that comes first"]
    whole, plain = (make_step(network, shortcuts=way)[-1].stages[0].dy for way in (True, False))
    assert whole.shape == plain.shape and not np.allclose(whole, plain)


def test_a_residual_block_whose_sum_was_taken_out_has_no_shortcut(monkeypatch):
    def residual_block(x, w1, b1, w2, b2):
        h, block = m.conv_block(x, w1, b1)
        h, conv = m.conv2d(h, w2, b2)
        y, act = m.relu(h)
        return y, (block, conv, act)

    def residual_block_backward(dy, cache):
        block, conv, act = cache
        dh, dw2, db2 = m.conv2d_backward(m.relu_backward(dy, act), conv)
        return *m.conv_block_backward(dh, block), dw2, db2

    monkeypatch.setattr(m, "residual_block", residual_block)
    monkeypatch.setattr(m, "residual_block_backward", residual_block_backward)
    step = make_step()[-1]
    assert [stage.name for stage in step.stages] == RESNET9 and not step.has_shortcuts
    assert "3×3, + conv2, relu" not in words(step)


def test_functions_that_were_replaced_are_the_ones_that_are_seen(monkeypatch):
    monkeypatch.setattr(m, "relu", leaky_relu)
    monkeypatch.setattr(m, "relu_backward", leaky_relu_backward)
    step = make_step()[-1]
    assert step.stages[1].y.min() < 0


@pytest.mark.parametrize(
    "broken, why",
    [
        (lambda x: np.zeros(3)[x], "raises IndexError"),
        (lambda x: x, "raises "),
        (lambda x: (x * np.inf, None), "not finite"),
    ],
)
def test_a_network_that_cannot_be_drawn_says_why_in_a_line(broken, why):
    def layer():
        return m.Layer("broken", broken, lambda dy, cache: dy)

    with pytest.raises(CannotDraw, match=why) as raised:
        make_step(network_of(layer, features=784))
    assert "\n" not in str(raised.value)
    assert m.relu.__name__ == "relu" and not hasattr(m.relu, "original")
