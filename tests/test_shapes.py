"""What a user hands to predict(), evaluate(), loss_and_gradients() and the operations, in other
shapes and other kinds of numbers: it is understood, or refused in one line."""

import numpy as np
import pytest

import mnist_resnet9 as m

SETTINGS = m.Settings(channels=(2, 4, 4, 4))


@pytest.fixture(scope="module")
def params():
    return m.init_params(SETTINGS)


FORMS = {
    "rows": lambda a: a.reshape(len(a), 784),
    "channel last": lambda a: a[..., None],
    "channel first": lambda a: a[:, None],
    "list of arrays": list,
    "list of lists": lambda a: a.tolist(),
    "float64": lambda a: a.astype(float),
    "int64": lambda a: a.astype(int),
    "backwards and again": lambda a: a[::-1][::-1],
    "array in another way": lambda a: type("Array", (), {"__array__": lambda self, *_, **__: a})(),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_can_mean_only_one_thing_is_understood(form, params, sample):
    images, labels = sample.test_images[:9], sample.test_labels[:9]
    given = FORMS[form](images)
    expected = m.predict(params, images, SETTINGS)
    assert np.array_equal(m.predict(params, given, SETTINGS), expected)
    loss, accuracy, probs = m.evaluate(params, given, list(labels), SETTINGS)
    known = m.evaluate(params, images, labels, SETTINGS)
    assert (loss, accuracy) == known[:2] and np.array_equal(probs, known[2])
    loss, gradients = m.loss_and_gradients(params, given, labels.tolist(), SETTINGS)
    known = m.loss_and_gradients(params, images, labels, SETTINGS)
    assert loss == known[0] and np.array_equal(gradients.flat, known[1].flat)


@pytest.mark.parametrize("shape", [(28, 28), (784,), (1, 784), (1, 28, 28), (1, 28, 28, 1)])
def test_one_image_alone(shape, params, sample):
    image, label = sample.test_images[0], sample.test_labels[0]
    logits = m.predict(params, image.reshape(shape), SETTINGS)
    assert np.array_equal(logits, m.predict(params, image[None], SETTINGS))
    loss, _ = m.loss_and_gradients(params, image.reshape(shape), label, SETTINGS)
    assert loss == m.cross_entropy_loss(logits, np.array([label]))[0]


def refusal_of(f, *arguments):
    with pytest.raises(m.UserError) as error:
        f(*arguments)
    text = str(error.value)
    assert "\n" not in text and len(text) < 250
    return text


@pytest.mark.parametrize(
    "images, came",
    [
        ([], "(0,)"),
        (np.zeros((0, 28, 28), np.uint8), "no images"),
        (np.zeros((0, 784)), "no images"),
        (5, "()"),
        (None, "of type NoneType"),
        ("seven.png", "of type str"),
        ([[1, 2], [3]], "of type list"),
        (np.zeros((2, 28, 28), complex), "complex128 (2, 28, 28)"),
        (np.zeros((2, 28, 28), object), "object (2, 28, 28)"),
        (np.zeros((28, 28, 5)), "(28, 28, 5)"),  # images last
        (np.zeros((28, 28, 5, 1)), "(28, 28, 5, 1)"),  # as the network's own input
        (np.zeros((5, 28, 28, 3)), "(5, 28, 28, 3)"),  # colours
        (np.zeros((5, 1, 784)), "(5, 1, 784)"),
        (np.zeros((5, 32, 32)), "(5, 256)"),  # the network says what does not fit
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, came, params):
    text = refusal_of(m.predict, params, images, SETTINGS)
    assert came in text and ("should be" in text or "needed" in text)
    assert refusal_of(m.evaluate, params, images, [0], SETTINGS)
    assert refusal_of(m.loss_and_gradients, params, images, [0], SETTINGS)


@pytest.mark.parametrize(
    "scaled, said",
    [
        (lambda a: a / 255, "from 0 to 1, but pixels should be 0…255: multiply them by 255"),
        (lambda a: (a / 255).astype(np.float32), "multiply them by 255"),
        (lambda a: a / 255 * 2 - 1, "from -1 to 1"),
        (lambda a: (a / 255 - 0.1307) / 0.3081, "pixels should be 0…255"),
        (lambda a: a > 100, "bool from 0 to 1"),
        (lambda a: np.uint8(a > 100), "uint8 from 0 to 1"),
        (lambda a: np.where(a > 100, np.nan, a), "nan"),
    ],
)
def test_pixels_on_another_scale_are_refused(scaled, said, params, sample):
    """They would be answered, and wrongly."""
    images = scaled(sample.test_images[:20])
    assert said in refusal_of(m.predict, params, images, SETTINGS)
    assert said in refusal_of(m.loss_and_gradients, params, images, sample.test_labels, SETTINGS)


def test_noise_and_blank_images_are_pixels(params, sample, rng):
    images = sample.test_images[:20]
    for changed in (
        images + rng.normal(0, 30, images.shape),
        images * 0,
        images * 0.0,
        255 - images,
    ):
        assert np.isfinite(m.predict(params, changed, SETTINGS)).all()


@pytest.mark.parametrize(
    "labels, said",
    [
        (lambda a: a[:3], "labels are uint8 (3,), but should be whole numbers (20,)"),
        (lambda a: np.r_[a, a], "uint8 (40,)"),  # the others would be left out in silence
        (lambda a: a[0], "uint8 ()"),
        (lambda a: np.eye(10)[a], "argmax(axis=1)"),
        (lambda a: a[:, None], "uint8 (20, 1)"),
        (lambda a: a.astype(float), "float64 (20,)"),
        (lambda a: a > 4, "bool (20,)"),  # would choose rows
        (lambda a: list("seven digits, and more"[:20]), "should be whole numbers"),
        (lambda a: None, "should be whole numbers"),
        (lambda a: a.astype(int) - 10, "but there are scores for 0 to 9"),  # -1 would be the last
        (lambda a: a + 1, "to 10, but there are scores for 0 to 9"),
    ],
)
def test_labels_that_are_none(labels, said, params, sample):
    images, labels = sample.test_images[:20], labels(sample.test_labels[:20])
    for f in (m.evaluate, m.loss_and_gradients):
        assert said in refusal_of(f, params, images, labels, SETTINGS)


def f(*shape, dtype=float):
    """An array to try an operation on."""
    return np.ones(shape, dtype)


X, W, B = f(6, 6, 2, 3), f(3, 3, 3, 4), f(4)
LABELS = np.array([1, 0, 2])


@pytest.mark.parametrize(
    "operation, arguments, said",
    [
        (m.conv2d, (f(6, 6, 2, 1), W, B), "x is float64 (6, 6, 2, 1), w is float64 (3, 3, 3, 4)"),
        (m.conv2d, (f(2, 3, 6, 6), W, B), "x (H, W, N, C), w (k, k, C, K) with k odd, b (K,)"),
        (m.conv2d, (f(6, 6, 3), W, B), "x is float64 (6, 6, 3)"),
        (m.conv2d, (X, f(2, 2, 3, 4), B), "with k odd"),
        (m.conv2d, (X, f(3, 5, 3, 4), B), "w is float64 (3, 5, 3, 4)"),
        (m.conv2d, (X, f(4, 3, 3, 3), B), "w is float64 (4, 3, 3, 3)"),  # PyTorch's order
        (m.conv2d, (X, W, f(3)), "b is float64 (3,)"),
        (m.conv2d, (X, W, f(1)), "b is float64 (1,)"),
        (m.conv2d, (X, W, 0), "b is of type int"),
        (m.conv2d, (X.astype(int), W, B), "x is int64"),
        (m.conv2d, (X, W.astype(int), B), "w is int64"),
        (m.conv2d, (X.tolist(), W, B), "x is of type list"),
        (m.conv_block, (f(6, 6, 2, 1), W, B), "conv2d: "),
        (m.residual_block, (X, f(3, 3, 3, 3), f(3), W, B), "h is float64 (6, 6, 2, 4)"),
        (m.residual_block, (X[..., :1], f(3, 3, 1, 3), f(3), W, B), "as many channels come out"),
        (m.linear, (f(2, 5), f(4, 3), f(3)), "x is float64 (2, 5), w is float64 (4, 3)"),
        (m.linear, (f(2, 4), f(4, 3), f(4)), "b is float64 (4,)"),
        (m.linear, (f(4), f(4, 3), f(3)), "x is float64 (4,)"),
        (m.linear, (f(2, 4, dtype=np.uint8), f(4, 3), f(3)), "x is uint8 (2, 4)"),
        (m.linear, ([[1, 2]], f(2, 3), f(3)), "x is of type list"),
        (m.dropout, (f(3, 4, dtype=int), 0.5, np.random.default_rng(0)), "x is int64 (3, 4)"),
        (m.dropout, (f(3, 4), 1, np.random.default_rng(0)), "rate is 1"),
        (m.dropout, (f(3, 4), -0.1, None), "rate is -0.1"),
        (m.dropout, (f(3, 4), float("nan"), None), "rate is nan"),
        (m.max_pool2d, (f(3, 4),), "max_pool2d: x is float64 (3, 4), but should be (H, W, N, C)"),
        (m.avg_pool2d, (f(3, 4, 5),), "avg_pool2d: x is float64 (3, 4, 5)"),
        (m.max_pool2d, (f(4, 4, 1, 1), 0), "size is 0"),
        (m.avg_pool2d, (f(4, 4, 1, 1), 2.5), "size is 2.5"),
        (
            m.to_input,
            (f(28, 28), float),
            "to_input: images are float64 (28, 28), but should be (N, 28",
        ),
        (m.to_input, ([[1]], float), "images are of type list"),
        (
            m.augment,
            (f(3, 784), 1, np.random.default_rng(0)),
            "augment: images are float64 (3, 784)",
        ),
        (m.flatten, (f(3, 4),), "flatten: x is float64 (3, 4)"),
        (m.cross_entropy_loss, (f(3, 4), LABELS[:2]), "labels is int64 (2,)"),
        (m.cross_entropy_loss, (f(3, 4), LABELS[:1]), "labels is int64 (1,)"),
        (m.cross_entropy_loss, (f(3, 4), LABELS - 1), "labels are from -1 to 1"),
        (m.cross_entropy_loss, (f(3, 2), LABELS), "to 2, but there are scores for 0 to 1"),
        (m.cross_entropy_loss, (f(3, 4), f(3)), "labels is float64 (3,)"),
        (m.cross_entropy_loss, (f(3, 4), f(3, 4)), "labels is float64 (3, 4)"),
        (m.cross_entropy_loss, (f(3, 4, dtype=int), LABELS), "scores is int64 (3, 4)"),
        (m.cross_entropy_loss, (f(0, 4), LABELS[:0]), "scores is float64 (0, 4)"),
        (m.cross_entropy, (f(4), LABELS), "cross_entropy: scores is float64 (4,)"),
        (m.cross_entropy, (f(3, 4), LABELS - 3), "labels are from -3 to -1"),
    ],
)
def test_an_operation_says_what_came_and_what_should_come(operation, arguments, said):
    assert said in refusal_of(operation, *arguments).replace("int32", "int64")


def test_what_is_printed_fits_a_cell(sample, params):
    """names and shapes, not the numbers: there are 100,000 of them"""
    state = m.init_state(m.Settings(ema=0.9))
    for shown, names in [(sample, 5), (sample.files, 1), (state.params, 19), (state, 38)]:
        text = repr(shown)
        assert len(text.splitlines()) == names and len(text) < 2500
    assert "fc9.weight    float32 (3136, 10)" in repr(state.params)
    assert "ema.fc9.bias" in repr(state) and "moments" in repr(state)
    assert "133,634 numbers" in repr(state.params) and "0 steps" in repr(state)
    assert "MNIST sample" in repr(sample) and "test_images   uint8 (1000, 28, 28)" in repr(sample)
    _, gradients = m.loss_and_gradients(params, sample.test_images[:2], [1, 2], SETTINGS)
    assert "conv1.weight  float32 (3, 3, 1, 2)" in repr(gradients)


def test_help_on_settings_says_what_they_are():
    for name in m.Settings.__dataclass_fields__:
        assert f"\n{name}: " in m.Settings.__doc__
