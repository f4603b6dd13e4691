"""The GPU, as far as a machine without one can test it: which functions CuPy has, what is said, and what is read back."""

import ast
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import mnist_resnet9 as m


def xp_names():
    """'xp.zeros', 'xp.random.Generator', … as the script has them."""
    tree = ast.parse((m.HERE / "mnist_resnet9.py").read_text(encoding="utf-8"))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return sorted(name for name in names if name.startswith("xp.") and name.replace(".", "").isidentifier())


def test_cupy_has_every_function_that_the_script_calls():
    cupy = pytest.importorskip("cupy")
    assert len(xp_names()) > 20
    for name in xp_names():
        value = cupy
        for part in name.split(".")[1:]:
            assert hasattr(value, part), name
            value = getattr(value, part)


def fails(*_, **__):
    raise RuntimeError("CUDA_ERROR_NO_DEVICE:\n  no kernel could be compiled")


NO_GPU = {
    "cupy": None,  # not installed
    "finds no CUDA device": SimpleNamespace(is_available=lambda: False),
    "NO_DEVICE: no kernel could be compiled": SimpleNamespace(is_available=lambda: True, arange=fails, float32=np.float32),
}


@pytest.mark.parametrize("reason", NO_GPU)
def test_without_a_gpu_device_gpu_fails_in_a_line_and_auto_takes_the_cpu(reason, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", NO_GPU[reason])
    assert m.main(["--device", "gpu", "--save-dir", str(tmp_path / "save")]) == 2
    out, err = capsys.readouterr()
    assert "device gpu cannot be used: " in err and reason in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "save").exists()
    said = m.use_device("auto")
    assert said.startswith("CPU (no GPU: ") and reason in said and "\n" not in said and m.xp is np
    assert m.use_device("cpu") == "CPU"


# A device that is made of NumPy: its arrays take part in nothing but their own module's functions, as CuPy's do.


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
        return on_device(function(*on_host(args), **{name: on_host(value) for name, value in named.items()}))

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
    """NumPy, or a module in it, for arrays of the device. uploads counts the host arrays that were sent there."""

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

    random = SimpleNamespace(
        Philox4x3210=np.random.Philox,
        Generator=lambda bits: SimpleNamespace(random=lift(np.random.Generator(bits).random)),
    )


@pytest.fixture
def device(monkeypatch):
    xp = Module(np)
    monkeypatch.setattr(m, "xp", xp)
    return xp


EVERYTHING = [
    {"augment": 1.0, "ema": 0.9, "weight_decay": 0.1},
    {"optimizer": "sgd", "pool": "avg", "channels": (4, 8, 8, 8), "schedule": "one_cycle"},
]


@pytest.mark.parametrize("given", EVERYTHING)
def test_a_training_step_reads_nothing_back_and_sends_nothing(given, device, sample, monkeypatch):
    settings = m.Settings(dropout=0.5, **given)
    state = m.init_state(settings)
    images, labels = device.asarray(sample.train_images[:20]), device.asarray(sample.train_labels[:20])
    before = state.params.flat.a.copy()
    monkeypatch.setattr(Array, "readable", False)
    for step in range(2):
        uploads = device.uploads
        loss, gradients = m.loss_and_gradients(state.params, images, labels, settings, m.random_stream(0, m.STEP, 1, step))
        m.update(state, gradients, settings, 1e-3)
    assert device.uploads == uploads  # the first step sends the constant matrices
    for a in (loss, gradients.flat, state.params.flat, state.moments):
        assert isinstance(a, Array) and np.isfinite(a.a).all()
    assert (state.params.flat.a != before).mean() > 0.5
    with pytest.raises(AssertionError):
        float(loss)


def test_a_whole_run_on_a_device_that_refuses_to_mix(device, sample, tmp_path, monkeypatch):
    """Data loading, evaluation, checkpoints and continuing: what enters and leaves is converted where it should be."""
    small = replace(sample, test_images=sample.test_images[:100], test_labels=sample.test_labels[:100])
    monkeypatch.setattr(m, "load_mnist", lambda _: small)
    given = dict(save_dir=str(tmp_path), train_images=64, batch_size=32, dropout=0.0, channels=(4, 8, 8, 8), ema=0.9)

    uploads = []

    def step(run, images, labels, rng, rate):
        uploads.append(device.uploads)
        with monkeypatch.context() as c:
            c.setattr(Array, "readable", False)
            return m.Run.step(run, images, labels, rng, rate)

    class DeviceRun(m.Run):
        use_device = staticmethod(lambda _: "a pretended GPU")

    DeviceRun.step = step
    for epochs in (1, 2):
        settings = m.Settings(tag="device", epochs_max=epochs, **given)
        assert m.run(settings, kind=DeviceRun) == 0
    assert len(uploads) == 4 and uploads[2] == uploads[3]  # within an epoch nothing is sent
    monkeypatch.setattr(m, "xp", np)
    assert m.run(m.Settings(tag="cpu", epochs_max=2, device="cpu", **given)) == 0
    one, two = (np.array(m.read_metrics(tmp_path / tag / "metrics.csv")) for tag in ("device", "cpu"))
    np.testing.assert_allclose(one[:, :3], two[:, :3], rtol=1e-4)
    assert "a pretended GPU; files" in (tmp_path / "device" / "log.txt").read_text()
