"""The trace: every call of a network is seen, and nothing else changes."""

import functools
import importlib
import sys
import threading
import types

import numpy as np
import pytest

import mnist_resnet9 as m
from support.trace import Trace, namespaces_of

SETTINGS = m.Settings(channels=(2, 4, 4, 4), dropout=0.5, threads=1)


@pytest.fixture
def batch(sample):
    return sample.train_images[:3], sample.train_labels[:3]


def learn(network, batch, settings=SETTINGS, seed=5, traced=True):
    """(trace, loss, gradients) of one learn_from()."""
    params = m.init_params(settings, np.float64, network)
    rng = np.random.default_rng(seed) if seed is not None else None
    if not traced:
        return None, *m.learn_from(params, *batch, settings, rng, network)
    with Trace(namespaces_of(m, network, settings)) as trace:
        return trace, *m.learn_from(params, *batch, settings, rng, trace.of(network))


def test_layers_and_loss_are_seen_in_their_order(batch):
    trace, _, gradients = learn(m.layers, batch)
    layers = m.layers(SETTINGS)
    assert [call.layer for call in trace.calls] == [*(layer.name for layer in layers), ""]
    assert trace.calls[-1].name == "cross_entropy_loss" and trace.calls[-1].dy == 1
    for layer, call, following in zip(layers, trace.calls, trace.calls[1:]):
        assert call.dy.shape == call.y.shape
        # What one hands on is what the next one gets, forward and backward.
        assert np.array_equal(call.y, following.inputs[0])
        assert np.array_equal(call.dy, following.gradients[0])
        for name, gradient in zip(layer.params, call.gradients[1:]):
            assert np.array_equal(gradient, gradients[name])
    names = [call.name for call in trace.calls]
    assert names.count("conv_block") == 4 and names.count("residual_block") == 2
    assert names.count("max_pool2d") == 2 and names[-3:-1] == ["dropout", "linear"]


def test_calls_within_a_call_are_seen(batch):
    trace, _, _ = learn(m.layers, batch)
    block = trace.calls[2]
    assert [call.name for call in block.inner] == ["conv_block", "conv2d", "relu"]
    assert [call.name for call in block.inner[0].inner] == ["conv2d", "relu"]
    assert [call.name for call in block.all()] == [
        *("conv2d", "relu", "conv_block", "conv2d", "relu", "residual_block")
    ]
    assert {call.layer for call in block.all()} == {"conv4"}
    # Each has its own backward pass: what the last relu hands back is what the convolution got.
    assert np.array_equal(block.inner[2].gradients[0], block.inner[1].dy)
    assert not np.array_equal(block.inner[2].dy, block.inner[1].dy)


def test_what_is_overwritten_later_is_kept(batch):
    """residual_block adds x to what its second convolution made, in place."""
    trace, _, _ = learn(m.layers, batch)
    block = trace.calls[2]
    _, conv, relu = block.inner
    assert np.array_equal(relu.inputs[0], conv.y + block.inputs[0])
    assert not np.array_equal(relu.inputs[0], conv.y)
    assert not any(call.cache_changed for call in trace.all_calls())


@pytest.mark.parametrize("seed", (5, None))  # with dropout, and without
def test_a_traced_network_computes_the_same_bits(batch, seed):
    _, loss, gradients = learn(m.layers, batch, seed=seed)
    _, plain_loss, plain = learn(m.layers, batch, seed=seed, traced=False)
    assert loss == plain_loss
    assert all(np.array_equal(gradients[name], plain[name]) for name in plain)


def test_everything_is_put_back(batch):
    before = {name: value for name, value in vars(m).items() if callable(value)}
    with pytest.raises(ZeroDivisionError):
        with Trace([vars(m)]) as trace:
            assert m.relu is not before["relu"]
            relu = m.relu
            raise ZeroDivisionError
    assert all(vars(m)[name] is value for name, value in before.items())
    relu(np.ones(3))  # whoever holds a traced function beyond the end can call it
    assert not trace.calls


def test_steps_of_evolution_call_each_others_pairs(batch, monkeypatch):
    monkeypatch.syspath_prepend(str(m.ROOT / "evolution"))
    counts = {}
    for path in sorted((m.ROOT / "evolution").glob("step[0-9]_*.py")):
        step = importlib.import_module(path.stem)
        trace, _, _ = learn(step.layers, batch)
        calls = trace.all_calls()
        assert all(call.dy is not None for call in calls)
        counts[path.stem[:5]] = [call.name for call in calls].count("relu")
    assert counts == {"step1": 0, "step2": 1, "step3": 2, "step4": 8, "step5": 8}


def test_every_module_that_holds_a_function_is_traced(batch, monkeypatch):
    """As `from mnist_resnet9 import relu` does it."""
    other = type(sys)("other")
    other.relu, other.relu_backward = m.relu, m.relu_backward
    monkeypatch.setitem(sys.modules, "other", other)

    def stem(x):
        h, first = other.relu(x)
        y, second = other.relu(-h)
        return y, (first, second)

    def stem_backward(dy, cache):
        first, second = cache
        return other.relu_backward(-other.relu_backward(dy, second), first)

    def network(settings, rng=None):
        return [
            m.Layer("stem", stem, stem_backward),
            m.flat("flat"),
            m.fully_connected("fc", 784, 10),
        ]

    trace, _, _ = learn(network, batch)
    call = trace.calls[0]
    assert call.name == "stem" and [inner.name for inner in call.inner] == ["relu", "relu"]
    first, second = call.inner
    assert np.array_equal(second.gradients[0], -first.dy)


def halves(x):
    return x / 2, None


def halves_backward(dy, cache):
    return dy / 2


@pytest.mark.parametrize(
    "name, f, f_backward",
    [
        ("halves", halves, halves_backward),
        ("halves", functools.partial(halves), functools.partial(halves_backward)),
        ("odd", lambda x: (x / 2, None), lambda dy, cache: dy / 2),
        ("relu", lambda x: m.relu(x), lambda dy, mask: m.relu_backward(dy, mask)),
        ("relu", lambda x: m.relu(x), m.relu_backward),
        ("avg_pool2d", functools.partial(m.avg_pool2d, size=2), m.avg_pool2d_backward),
    ],
)
def test_a_layer_of_any_functions_is_traced(batch, name, f, f_backward):
    def network(settings, rng=None):
        return [
            m.conv("conv1", 1, 2),
            m.Layer("odd", f, f_backward),
            m.pool("pool", settings),
            m.flat("flat"),
            m.fully_connected("fc", 98 if name == "avg_pool2d" else 392, 10),
        ]

    trace, _, _ = learn(network, batch)
    call = trace.calls[1]
    assert call.layer == "odd" and call.dy is not None and len(call.gradients) == 1
    assert name in [inner.name for inner in call.all()]
    assert np.array_equal(call.gradients[0], trace.calls[0].dy)


def test_two_branches_of_one_pair_keep_their_own_gradients(batch):
    """Here the backward pass takes the branches in the order of the forward pass."""

    def fork(x, w1, b1, w2, b2):
        y1, one = m.conv2d(x, w1, b1)
        y2, two = m.conv2d(x, w2, b2)
        return y1 + y2, (one, two)

    def fork_backward(dy, cache):
        one, two = cache
        dx1, *d1 = m.conv2d_backward(dy, one)
        dx2, *d2 = m.conv2d_backward(2 * dy, two)
        return dx1 + dx2, *d1, *d2

    def start(rng):
        return m.he(rng, (3, 3, 1, 2)), np.zeros(2), m.he(rng, (3, 3, 1, 2)), np.zeros(2)

    def network(settings, rng=None):
        return [
            m.Layer("fork", fork, fork_backward, ("w1", "b1", "w2", "b2"), start),
            m.flat("flat"),
            m.fully_connected("fc", 1568, 10),
        ]

    trace, _, gradients = learn(network, batch)
    one, two = trace.calls[0].inner
    assert np.array_equal(two.dy, 2 * one.dy)
    assert np.array_equal(one.gradients[1], gradients["w1"])
    assert np.array_equal(two.gradients[1], gradients["w2"])


def test_dropout_that_is_off_is_matched_though_it_has_no_cache(batch):
    def network(settings, rng=None):
        return [
            m.flat("flat"),
            m.drop("first", settings, None),
            m.drop("second", settings, None),
            m.fully_connected("fc", 784, 10),
        ]

    trace, _, _ = learn(network, batch)
    assert [call.layer for call in trace.calls] == ["flat", "first", "second", "fc", ""]
    assert all(call.dy is not None for call in trace.calls)


def test_a_forward_function_within_a_backward_pass_is_no_call_of_the_network(batch, monkeypatch):
    right = m.linear_backward

    def linear_backward(dy, cache):
        m.relu(dy)
        return right(dy, cache)

    monkeypatch.setattr(m, "linear_backward", linear_backward)
    trace, _, _ = learn(m.layers, batch)
    assert [call.name for call in trace.all_calls()].count("relu") == 8
    assert trace.calls[-2].name == "linear" and not trace.calls[-2].inner


def test_a_call_that_raises_keeps_its_error(batch, monkeypatch):
    def relu(x):
        raise ValueError("no")

    monkeypatch.setattr(m, "relu", relu)
    with Trace([vars(m)]) as trace, pytest.raises(ValueError):
        params = m.init_params(SETTINGS, np.float64)
        m.learn_from(params, *batch, SETTINGS, None, trace.of(m.layers))
    assert [(call.name, str(call.error)) for call in trace.all_calls()] == [
        ("conv2d", "None"),
        ("relu", "no"),
        ("conv_block", "no"),
    ]


def test_a_cache_that_is_overwritten_is_noticed(batch, monkeypatch):
    """This convolution keeps its y, which this relu writes over."""
    right, right_backward = m.conv2d, m.conv2d_backward

    def conv2d(x, w, b):
        y, cache = right(x, w, b)
        return y, (y, cache)

    def relu(x):
        mask = x > 0
        x *= mask
        return x, mask

    monkeypatch.setattr(m, "conv2d", conv2d)
    monkeypatch.setattr(m, "relu", relu)
    monkeypatch.setattr(
        m, "conv2d_backward", lambda dy, cache, *need: right_backward(dy, cache[1], *need)
    )
    trace, _, _ = learn(m.layers, batch)
    changed = {call.name for call in trace.all_calls() if call.cache_changed}
    assert changed == {"conv2d"}


def test_modules_that_load_others_when_they_are_looked_at(monkeypatch):
    """As some of Matplotlib's and IPython's do in a notebook."""

    class Late(types.ModuleType):
        def __getattribute__(self, name):
            if name == "__dict__":
                monkeypatch.setitem(sys.modules, f"another_{len(sys.modules)}", None)
            return super().__getattribute__(name)

    monkeypatch.setitem(sys.modules, "late", Late("late"))
    before = len(sys.modules)
    with Trace([vars(m)]):
        assert hasattr(m.relu, "untraced")
    assert len(sys.modules) > before and not hasattr(m.relu, "untraced")


def test_inputs_stand_in_the_order_of_the_parameters_however_they_were_given(batch, monkeypatch):
    def conv_block(x, w, b):
        h, conv_cache = m.conv2d(b=b, x=x, w=w)
        y, relu_cache = m.relu(x=h)
        return y, (conv_cache, relu_cache)

    monkeypatch.setattr(m, "conv_block", conv_block)
    trace, _, gradients = learn(m.layers, batch)
    conv = trace.all_calls()[0]
    assert conv.name == "conv2d" and not conv.options
    assert [a.shape for a in conv.inputs] == [(28, 28, 3, 1), (3, 3, 1, 2), (2,)]
    assert np.array_equal(conv.gradients[1], gradients["conv1.weight"])


def test_pairs_that_share_a_backward_function_keep_their_gradients(batch, monkeypatch):
    """As leaky relu and relu do: relu_backward multiplies by whatever is in the cache."""

    def leaky(x):
        slope = np.maximum(x > 0, 0.1)
        return x * slope, slope

    monkeypatch.setattr(m, "leaky", leaky, raising=False)
    monkeypatch.setattr(m, "leaky_backward", m.relu_backward, raising=False)

    def network(settings, rng=None):
        first, *others = m.layers(settings, rng)
        return [first, m.Layer("leaky", m.leaky, m.leaky_backward), *others]

    trace, _, _ = learn(network, batch)
    calls = trace.all_calls()
    assert [call.name for call in calls].count("leaky") == 1
    assert all(call.dy is not None and call.gradients for call in calls)


def test_other_threads_compute_on_and_are_not_seen(batch):
    """Each thread finds the script as it is, before, in and after a trace of another."""
    params = m.init_params(SETTINGS)
    expected = m.loss_and_gradients(params, *batch, SETTINGS)[0]
    names = [call.name for call in learn(m.layers, batch)[0].all_calls()]
    losses, errors, stop = set(), [], threading.Event()

    def train():
        try:
            while not stop.is_set():
                losses.add(m.loss_and_gradients(params, *batch, SETTINGS)[0])
        except Exception as error:
            errors.append(error)

    def trace_too():
        for _ in range(10):
            if [call.name for call in learn(m.layers, batch)[0].all_calls()] != names:
                errors.append("another thread's calls")

    threads = [threading.Thread(target=work) for work in (train, trace_too, trace_too)]
    for thread in threads:
        thread.start()
    trace_too()
    for thread in threads[1:]:
        thread.join(200)
    stop.set()
    threads[0].join(200)
    assert not errors and losses == {expected}
    assert m.fast_ways.replaced() == set()


def test_a_trace_that_cannot_begin_leaves_nothing_behind(monkeypatch):
    class Closed(types.ModuleType):
        def __getattribute__(self, name):
            raise ImportError("not installed")

    before = dict(vars(m))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "closed", Closed("closed"))
        with pytest.raises(ImportError):
            Trace([vars(m)]).__enter__()
    assert vars(m) == before
    free = []

    def trace_too():
        with Trace([vars(m)]):
            free.append(True)

    thread = threading.Thread(target=trace_too, daemon=True)
    thread.start()
    thread.join(60)
    assert free == [True]
