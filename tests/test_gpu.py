"""The GPU: what CuPy has, what is said, what is read back, and that devices compute the same.

A machine without a GPU computes the same on arrays of NumPy that refuse what CuPy's refuse; CuPy's
own cases are skipped.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from programs import metrics_of

import mnist_resnet9 as m
import plot_figs
import predict
from support import gpu
from support.device import computing_on_the_cpu


def xp_names():
    """'xp.zeros', 'xp.random.Generator', … as the script has them."""
    tree = ast.parse((m.ROOT / "mnist_resnet9.py").read_text(encoding="utf-8"))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return sorted(
        name for name in names if name.startswith("xp.") and name.replace(".", "").isidentifier()
    )


def test_cupy_has_every_function_that_the_script_calls():
    cupy = pytest.importorskip("cupy")
    assert len(xp_names()) > 20
    for name in xp_names():
        value = cupy
        for part in name.split(".")[1:]:
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_cupy_takes_every_keyword_that_the_script_gives():
    cupy = pytest.importorskip("cupy")
    tree = ast.parse((m.ROOT / "mnist_resnet9.py").read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    checked = 0
    for call in calls:
        owner, name, keywords = (
            ast.unparse(call.func.value),
            call.func.attr,
            {k.arg for k in call.keywords if k.arg},
        )
        if owner == "xp" and isinstance(getattr(cupy, name), type(lambda: 0)):
            function = getattr(cupy, name)
            parameters = inspect.signature(function).parameters
            variadic = inspect.Parameter.VAR_KEYWORD in {p.kind for p in parameters.values()}
            known = f"{' '.join(parameters)} {inspect.getsource(function) if variadic else ''}"
        elif owner == "rng" and name in ("random", "standard_normal"):  # what is drawn on a device
            known = " ".join(inspect.signature(getattr(gpu.Stream, name)).parameters)
        elif name in ("sum", "max", "mean", "argmax"):
            known = getattr(cupy.ndarray, name).__doc__ + " axis keepdims" * (name != "argmax")
        elif owner == "xp" and isinstance(getattr(cupy, name), (type(cupy.matmul), cupy.ufunc)):
            known = "out dtype"
        else:
            continue
        checked += len(keywords)
        assert keywords <= set(re.findall(r"\w+", known)), ast.unparse(call)
    assert checked > 10


def fails(*_, **__):
    raise RuntimeError("CUDA_ERROR_NO_DEVICE:\n  no kernel could be compiled")


NO_TOOLKIT = 'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13'


def fails_without_toolkit(*_, **__):
    raise RuntimeError(NO_TOOLKIT)


NO_GPU = {
    "cupy": None,  # not installed
    "finds no CUDA device": SimpleNamespace(is_available=lambda: False),
    "NO_DEVICE: no kernel could be compiled": SimpleNamespace(
        is_available=lambda: True, arange=fails, float32=np.float32
    ),
    'pip install --upgrade "cupy-cuda12x[ctk]" brings what is missing of CUDA': SimpleNamespace(
        is_available=lambda: True, arange=fails_without_toolkit, float32=np.float32
    ),
}


@pytest.mark.parametrize(
    "complaint, remedy",
    [
        (NO_TOOLKIT, "brings what is missing"),
        ("ImportError: libcublas.so.12: cannot open shared object file", "brings what is missing"),
        ("Failed to find CUDA headers", "brings what is missing"),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available", "does not know the card"),
        ("nvrtc: error: invalid value for --gpu-architecture (-arch)", "does not know the card"),
        ("NVRTC_ERROR_COMPILATION (6)", ""),
        ("CUDA_ERROR_NO_DEVICE", ""),
    ],
)
def test_a_complaint_names_its_remedy(complaint, remedy):
    said = gpu.with_remedy(complaint)
    assert said.startswith(complaint) and remedy in said and (remedy or said == complaint)


@pytest.mark.parametrize("reason", NO_GPU)
def test_without_a_gpu_device_gpu_fails_in_a_line_and_auto_takes_the_cpu(
    reason, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, "cupy", NO_GPU[reason])
    assert m.main(["--device", "gpu", "--save-dir", str(tmp_path / "save")]) == 2
    out, err = capsys.readouterr()
    assert (
        "device gpu cannot be used: " in err and reason in err and err.count("\n") == 1 and not out
    )
    assert not (tmp_path / "save").exists()
    said = m.use_device("auto")
    assert said.startswith("CPU (no GPU: ") and reason in said and "\n" not in said and m.xp is np
    assert m.use_device("cpu") == "CPU"


def test_the_current_device_is_the_one_that_is_named_and_asked(monkeypatch):
    """On a machine with several; `cupy.cuda.Device(1).use()` makes another one current."""
    current, limits = [1], {1: 65_536, 2: 232_448}

    def device():
        return SimpleNamespace(
            id=current[0],
            attributes={
                "MaxSharedMemoryPerBlockOptin": limits[current[0]],
                "MultiProcessorCount": 40 * current[0],
            },
        )

    runtime = SimpleNamespace(getDeviceProperties=lambda number: {"name": b"card %d" % number})
    cupy = SimpleNamespace(is_available=lambda: True, arange=np.arange, exp=np.exp)
    cupy.float32, cupy.cuda = np.float32, SimpleNamespace(Device=device, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(m, "xp", np)
    gpu.cuda_of.cache_clear()
    try:
        for current[0] in limits:
            assert m.use_device("gpu") == f"GPU, card {current[0]}"
            assert gpu.cuda().limit == limits[current[0]] and gpu.cuda() is gpu.cuda()
            assert gpu.cuda().blocks == 80 * current[0]
    finally:
        gpu.cuda_of.cache_clear()


# A device that is made of NumPy: its arrays take part in nothing but their own module's functions,
# as CuPy's do.


def on_host(value):
    """What the device computes with. A host array among its own is an error, on CuPy as well."""
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array among the arrays of the device")
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_host, value))
    return value.a if isinstance(value, Array) else value


def on_device(value):
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_device, value))
    return Array(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def lift(function):
    """The function on arrays of the device."""

    def lifted(*args, **named):
        return on_device(
            function(*on_host(args), **{name: on_host(value) for name, value in named.items()})
        )

    return lifted


def read_back(how):
    def read(self, *args):
        assert Array.readable, f"a training step reads from the device: {how}"
        return getattr(self.a, how)(*args)

    return read


class Array:
    readable = True  # False while a training step runs
    __array_ufunc__ = None  # NumPy leaves it alone
    __hash__ = None

    def __init__(self, a):
        self.a = a

    def __getattr__(self, name):
        value = getattr(self.a, name)
        return lift(value) if callable(value) else on_device(value)

    def __len__(self):
        return len(self.a)

    def get(self):
        return read_back("copy")(self)


for name in "bool float int index".split():
    setattr(Array, f"__{name}__", read_back(f"__{name}__"))
for name in "item tolist tobytes __array__ __contains__".split():
    setattr(Array, name, read_back(name))
for name in "add sub mul truediv floordiv mod pow matmul".split():
    for kind in ("", "r", "i"):
        setattr(Array, f"__{kind}{name}__", lift(getattr(np.ndarray, f"__{kind}{name}__")))
for name in "and or xor invert neg abs eq ne lt le gt ge getitem setitem".split():
    setattr(Array, f"__{name}__", lift(getattr(np.ndarray, f"__{name}__")))


class Module:
    """NumPy, or a module in it, for arrays of the device. uploads counts what was sent there."""

    def __init__(self, module):
        self.module, self.uploads = module, 0

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if isinstance(value, type(np)):
            return Module(value)
        return lift(value) if callable(value) and not isinstance(value, type) else value

    def asarray(self, a, dtype=None):
        self.uploads += isinstance(a, np.ndarray)
        return Array(np.array(a.a if isinstance(a, Array) else a, dtype))


def pretended_stream(_, key):
    stream = np.random.Generator(np.random.Philox(key=int(key)))
    return SimpleNamespace(
        **{name: lift(getattr(stream, name)) for name in ("random", "standard_normal")}
    )


@pytest.fixture
def device(monkeypatch):
    xp = Module(np)
    monkeypatch.setattr(m, "xp", xp)
    monkeypatch.setattr(gpu, "cuda", lambda: None)
    monkeypatch.setattr(gpu, "Stream", pretended_stream)
    monkeypatch.setattr(gpu, "fast_path", lambda *_: (None, "plain operations: a pretended GPU"))
    return xp


@pytest.fixture(params=["pretended", "cupy"])
def any_device(request, monkeypatch):
    if request.param == "pretended":
        return request.getfixturevalue("device")
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("there is no GPU")
    monkeypatch.setattr(m, "xp", cupy)
    return cupy


def host(value):
    """Arrays in a tuple, or one, fetched from the device."""
    return tuple(map(host, value)) if isinstance(value, tuple) else m.to_host(value)


OPERATIONS = {
    "relu": (m.relu, m.relu_backward, [(7, 5)]),
    "softmax": (m.softmax, m.softmax_backward, [(7, 10)]),
    "linear": (m.linear, m.linear_backward, [(7, 5), (5, 3), (3,)]),
    "avg_pool2d": (m.avg_pool2d, m.avg_pool2d_backward, [(5, 4, 3, 2)]),
    "max_pool2d": (m.max_pool2d, m.max_pool2d_backward, [(5, 4, 3, 2)]),
    "conv2d, 5×5": (m.conv2d, m.conv2d_backward, [(6, 5, 3, 2), (5, 5, 2, 4), (4,)]),
    "conv2d": (m.conv2d, m.conv2d_backward, [(28, 9, 3, 16), (3, 3, 16, 5), (5,)]),
    "conv2d, small": (m.conv2d, m.conv2d_backward, [(3, 5, 1, 16), (3, 3, 16, 16), (16,)]),
    "residual_block": (
        m.residual_block,
        m.residual_block_backward,
        [(7, 7, 2, 16), *[(3, 3, 16, 16), (16,)] * 2],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_computes_on_the_device_what_it_does_on_the_cpu(
    name, any_device, rng, monkeypatch
):
    forward, backward, shapes = OPERATIONS[name]
    inputs = [rng.standard_normal(shape) for shape in shapes]
    y, cache = forward(*map(any_device.asarray, inputs))
    dy = rng.standard_normal(y.shape)
    y, gradients = host(y), host(backward(any_device.asarray(dy), cache))
    monkeypatch.setattr(m, "xp", np)
    expected, cache = forward(*inputs)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-11)
    expected = backward(dy, cache)
    found, wanted = (d if isinstance(d, tuple) else (d,) for d in (gradients, expected))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def test_losses_compute_on_the_device_what_they_do_on_the_cpu(any_device, rng, monkeypatch):
    logits, labels = rng.standard_normal((7, 10)), rng.integers(0, 10, 7).astype(np.uint8)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    pairs = [
        (m.cross_entropy, m.cross_entropy_backward, probs),
        (m.cross_entropy_loss, m.cross_entropy_loss_backward, logits),
    ]
    found = []
    for forward, backward, x in pairs:
        loss, cache = forward(any_device.asarray(x), any_device.asarray(labels))
        found.append((float(loss), host(backward(0.7, cache))))
    monkeypatch.setattr(m, "xp", np)
    for (forward, backward, x), (loss, dx) in zip(pairs, found):
        expected, cache = forward(x, labels)
        assert loss == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(dx, backward(0.7, cache), rtol=1e-9)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_the_device_agrees_with_the_cpu_in_float32(pool, any_device, sample, monkeypatch):
    settings = m.Settings(pool=pool)
    images, labels = sample.train_images[:40], sample.train_labels[:40]
    params, on_device = (
        m.init_params(settings),
        (any_device.asarray(images), any_device.asarray(labels)),
    )
    logits = host(m.predict(params, on_device[0], settings))
    loss, gradients = m.loss_and_gradients(params, *on_device, settings)
    loss, gradients = float(loss), {name: host(a) for name, a in gradients.items()}
    monkeypatch.setattr(m, "xp", np)
    params = m.init_params(settings)
    assert np.abs(logits - m.predict(params, images, settings)).max() < 1e-4
    expected_loss, expected = m.loss_and_gradients(params, images, labels, settings)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    # Over the whole gradient: where rounding moves a value across relu's kink, the small ones of
    # early layers jump.
    difference = m.Parameters({name: gradients[name] - expected[name] for name in expected}).flat
    assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(expected.flat)


def test_random_numbers_of_the_device_are_a_function_of_the_stream(any_device, sample):
    """A batch is one shard; dropout and augmentation draw from its generator what they should."""
    streams = [
        m.device_stream(m.random_stream(0, m.STEP, 1, step).integers(2**63)) for step in (3, 3, 4)
    ]
    masks = [
        host(m.dropout(m.xp.ones((50, 400), np.float32), 0.75, stream)[1]) for stream in streams
    ]
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    assert (
        masks[0].dtype == np.float32
        and set(np.unique(masks[0])) == {0, 4}
        and abs(masks[0].mean() - 1) < 0.05
    )
    images = any_device.asarray(sample.train_images[:20])
    found = host(m.augment(images, 1.0, streams[0], elastic=1.0))
    assert (
        found.shape == (20, 28, 28)
        and found.dtype == np.float32
        and 0 <= found.min()
        and found.max() <= 255
    )
    assert 0.8 < found.mean() / sample.train_images[:20].mean() < 1.2


def test_evaluation_takes_part_after_part_and_finds_the_same(sample, monkeypatch):
    """With all test images at once, what the forward pass keeps would not fit into a small GPU."""
    settings, images, labels = m.Settings(), sample.test_images[:300], sample.test_labels[:300]
    params, predict, sizes = m.init_params(settings), m.predict, []
    whole = m.evaluate(params, images, labels, settings)
    monkeypatch.setattr(m, "predict", lambda *a: (sizes.append(len(a[1])), predict(*a))[1])
    monkeypatch.setattr(m, "PREDICT_IMAGES", 128)
    loss, accuracy, probs = m.evaluate(params, images, labels, settings)
    assert (
        sizes == [128, 128, 44]
        and (loss, accuracy) == whole[:2]
        and np.array_equal(probs, whole[2])
    )


EVERYTHING = [
    {"augment": 1.0, "ema": 0.9, "weight_decay": 0.1},
    {"optimizer": "sgd", "pool": "avg", "channels": (4, 8, 8, 8), "schedule": "one_cycle"},
    {"optimizer": "muon", "channels": (4, 8, 8, 8), "weight_decay": 0.1},
]


@pytest.mark.parametrize("given", EVERYTHING)
def test_a_training_step_reads_nothing_back_and_sends_nothing(given, device, sample, monkeypatch):
    settings = m.Settings(dropout=0.5, **given)
    state = m.init_state(settings)
    images, labels = (
        device.asarray(sample.train_images[:20]),
        device.asarray(sample.train_labels[:20]),
    )
    before = state.params.flat.a.copy()
    monkeypatch.setattr(Array, "readable", False)
    for step in range(2):
        uploads = device.uploads
        loss, gradients = m.loss_and_gradients(
            state.params, images, labels, settings, m.random_stream(0, m.STEP, 1, step)
        )
        m.update(state, gradients, settings, 1e-3)
    assert device.uploads == uploads  # the first step sends the constant matrices
    for a in (loss, gradients.flat, state.params.flat, state.moments):
        assert isinstance(a, Array) and np.isfinite(a.a).all()
    assert (state.params.flat.a != before).mean() > 0.5
    with pytest.raises(AssertionError):
        float(loss)


def test_a_whole_run_on_a_device_that_refuses_to_mix(device, sample, tmp_path, monkeypatch):
    """Data, evaluation, checkpoints and continuing: all is converted where it should be."""
    small = replace(
        sample, test_images=sample.test_images[:100], test_labels=sample.test_labels[:100]
    )
    monkeypatch.setattr(m, "load_mnist", lambda _: small)
    given = dict(
        save_dir=str(tmp_path),
        train_images=64,
        batch_size=32,
        dropout=0.0,
        channels=(4, 8, 8, 8),
        ema=0.9,
    )

    uploads = []

    real_gradients, real_update = m.loss_and_gradients, m.update

    def gradients(*arguments):
        uploads.append(device.uploads)
        with monkeypatch.context() as c:
            c.setattr(Array, "readable", False)
            return real_gradients(*arguments)

    def update(*arguments):
        with monkeypatch.context() as c:
            c.setattr(Array, "readable", False)
            return real_update(*arguments)

    monkeypatch.setattr(m, "loss_and_gradients", gradients)
    monkeypatch.setattr(m, "update", update)
    pretended = m.Machinery(lambda _: "GPU, pretended", m.use_cores, m.gpu_engine)
    for epochs in (1, 2):
        settings = m.Settings(tag="device", epochs_max=epochs, **given)
        assert m.run(settings, machinery=pretended) == 0
    assert len(uploads) == 4 and uploads[2] == uploads[3]  # within an epoch nothing is sent
    monkeypatch.setattr(m, "xp", np)
    monkeypatch.setattr(m, "loss_and_gradients", real_gradients)
    monkeypatch.setattr(m, "update", real_update)
    assert m.run(m.Settings(tag="cpu", epochs_max=2, device="cpu", **given)) == 0
    one, two = (metrics_of(tmp_path / tag) for tag in ("device", "cpu"))
    np.testing.assert_allclose(one[:, :3], two[:, :3], rtol=1e-4)
    log = (tmp_path / "device" / "log.txt").read_text()
    assert "GPU, pretended (plain operations: a pretended GPU); files" in log


def test_figures_and_answers_are_computed_on_the_cpu_and_leave_the_gpu_in_use(
    device, sample, tmp_path, monkeypatch, capsys
):
    """In a notebook one kernel trains on the GPU, draws and reads digits, in any order."""
    given = {"save_dir": str(tmp_path), "data_dir": str(m.ROOT / "data" / "sample")}
    settings = m.Settings(tag="device", train_images=32, channels=(2, 2, 2, 2), **given)
    settings = replace(settings, epochs_max=1)
    small = replace(
        sample, test_images=sample.test_images[:50], test_labels=sample.test_labels[:50]
    )
    monkeypatch.setattr(m, "load_mnist", lambda _: small)
    pretended = m.Machinery(lambda _: "GPU, pretended", m.use_cores, m.gpu_engine)
    state = m.init_state(settings)

    def learn():
        images, labels = device.asarray(small.test_images), device.asarray(small.test_labels)
        loss, _ = m.loss_and_gradients(state.params, images, labels, settings)
        assert isinstance(loss, Array) and m.xp is device

    assert m.run(settings, machinery=pretended) == 0
    capsys.readouterr()
    where = ["--save-dir", str(tmp_path), "--data-dir", given["data_dir"]]
    assert plot_figs.main(["device", *where]) == 0
    said = capsys.readouterr().out
    assert said.count(".png") == said.count("\n") == 5 and "layers.png, since" not in said
    learn()
    _, answers = predict.read(small.test_images[:3], tag="device", save_dir=tmp_path)
    assert len(answers) == 3
    learn()
    # What the kernel holds is on the device, and may be drawn as it is.
    images, labels = device.asarray(small.test_images), device.asarray(small.test_labels)
    _, _, probs = m.evaluate(state.params, images, labels, settings)
    for figure in (
        plot_figs.draw_layers("mine", state.params, images, labels, settings),
        plot_figs.draw_filters("mine", state.params, images[0], 7),
        plot_figs.draw_failures("mine", images, labels, probs.argmax(axis=1), probs),
        plot_figs.draw_confusion("mine", labels, probs.argmax(axis=1)),
    ):
        assert "mine" in figure.get_suptitle()
        plt.close(figure)
    learn()
    with pytest.raises(ZeroDivisionError), computing_on_the_cpu(m):
        assert m.xp is np
        raise ZeroDivisionError
    assert m.xp is device


def test_launches_of_a_training_step(device, sample, monkeypatch, capsys):
    """Each function of the array module is a launch or more on a GPU; a reshape of what does not
    lie in one piece is a copy. These are the plain operations, without the fast path."""
    launches, layer = Counter(), ["images"]
    free = {
        "reshape",
        "transpose",
        "swapaxes",
        "ravel",
        "as_strided",
        "broadcast_to",
        "__getitem__",
        "asarray",
    }

    def counted(name, function):
        def call(*args, **named):
            result = function(*args, **named)
            copies = (
                name in ("reshape", "ravel") and isinstance(result, Array) and result.a.base is None
            )
            launches[layer[0]] += name not in free or copies
            return result

        return call

    monkeypatch.setattr(
        Array,
        "__getattr__",
        lambda self, name: (
            on_device(getattr(self.a, name))
            if not callable(getattr(self.a, name))
            else counted(name, lift(getattr(self.a, name)))
        ),
    )
    for name in [
        n
        for n in vars(Array)
        if n.startswith("__")
        and callable(getattr(Array, n))
        and n
        not in (
            "__init__",
            "__getattr__",
            "__len__",
            "__getattribute__",
            "__class__",
            "__repr__",
            "__new__",
        )
    ]:
        monkeypatch.setattr(Array, name, counted(name, getattr(Array, name)))
    plain = Module.__getattr__
    monkeypatch.setattr(
        Module,
        "__getattr__",
        lambda self, name: (
            counted(name, found)
            if callable(found := plain(self, name)) and not isinstance(found, (type, Module))
            else found
        ),
    )
    for name in (
        "conv_block",
        "residual_block",
        "linear",
        "cross_entropy_loss",
        "dropout",
        "update",
        "max_pool2d",
    ):
        for function in (name, f"{name}_backward"):
            if hasattr(m, function):
                monkeypatch.setattr(m, function, named_layer(getattr(m, function), function, layer))
    settings = m.Settings()
    state = m.init_state(settings)
    images, labels = (
        device.asarray(sample.train_images[:4]),
        device.asarray(sample.train_labels[:4]),
    )
    launches.clear()
    _, gradients = m.loss_and_gradients(
        state.params, images, labels, settings, m.random_stream(0, m.STEP, 1, 0)
    )
    m.update(state, gradients, settings, 1e-3)
    with capsys.disabled():
        print("\nlaunches of the plain operations:", sum(launches.values()), dict(launches))
    assert 60 < sum(launches.values()) <= 200


def named_layer(function, name, layer):
    def call(*args, **named):
        before, layer[0] = layer[0], name
        try:
            return function(*args, **named)
        finally:
            layer[0] = before

    return call


def test_the_benchmark_gives_both_sides_the_same_work(sample, monkeypatch):
    """speed/gpu_step_time.py on the CPU: without dropout, whose masks differ, losses agree."""
    pytest.importorskip("torch").set_num_threads(1)
    monkeypatch.syspath_prepend(str(m.ROOT / "benchmarks" / "speed"))
    monkeypatch.syspath_prepend(str(m.ROOT / "torch_version"))
    import gpu_step_time as g

    settings = m.Settings(
        batch_size=20, dropout=0.0, channels=(4, 8, 8, 8), learning_rate=1e-3, device="cpu"
    )
    ours, theirs = g.our_step(m, sample, settings), g.torch_step(m, sample, settings, "cpu")
    losses = np.array([(float(ours()), float(theirs())) for _ in range(4)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=2e-3)
    assert len(np.unique(losses[:, 0])) == 4
    assert set(g.seconds_a_step({"ours": ours, "theirs": theirs}, 1, lambda: None)) == {
        "ours",
        "theirs",
    }


@pytest.mark.parametrize("first_step", [0, 30, 60, 99, 138])
def test_the_clock_is_read_when_the_gpu_has_finished(first_step, monkeypatch):
    """Wherever a run continues: a read loss is what makes the program wait for the GPU."""
    book, finished, said = object.__new__(m.Bookkeeper), [], []
    book.on_gpu, book.epoch_steps, book.state = True, 100, SimpleNamespace(step=first_step)
    book.bar = SimpleNamespace(set_postfix=lambda **_: None)
    book.first_time, book.first_step = 0.0, first_step
    monkeypatch.setattr(book, "check_finite", lambda *_: finished.append(book.state.step))
    monkeypatch.setattr(book, "say_how_long", lambda _: said.append(book.state.step))
    for _ in range(first_step, first_step + 100):
        book.state.step += 1
        book.after_step(1.0)
    assert said == [first_step + min(51, 100 - first_step % 100)]
    assert said[0] in finished and len(finished) <= 3


def test_the_gpu_command_needs_a_gpu_and_says_so_in_a_line(tmp_path):
    cupy = pytest.importorskip("cupy")
    if cupy.is_available():
        pytest.skip("there is a GPU")
    python = tmp_path / "python"  # there need be no `python` on the path where the tests run
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", m.ROOT / "benchmarks" / "gpu.sh"]
    wrong = subprocess.run([*command, "data", tmp_path, "kernel"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "gpu.sh: there is no stage kernel\n"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and not result.stdout
    assert "device gpu cannot be used: " in result.stderr and result.stderr.count("\n") == 1
