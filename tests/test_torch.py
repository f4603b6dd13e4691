"""The network against the same one in PyTorch, with autograd and its optimizers."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from programs import metrics_of
from test_run import SMALL, arrays, assert_same_run

import mnist_resnet9 as m
import plot_figs
from support import storage
from support.checkpoints import checksums, read_checkpoint

torch = pytest.importorskip("torch")
F = torch.nn.functional
# More of its threads wait for each other at full speed, longer than these small networks compute.
torch.set_num_threads(1)

sys.path.insert(0, str(m.ROOT / "torch_version"))
import resnet9_torch as t


def tensors(params):
    """Our parameters in PyTorch's shapes: convolutions (K, C, 3, 3), linear (10, F)."""
    out = {}
    for name, a in params.items():
        a = np.transpose(a, (3, 2, 0, 1)) if a.ndim == 4 else a.T
        out[name] = torch.tensor(np.ascontiguousarray(a), requires_grad=True)
    return out


def ours(tensor):
    a = tensor.detach().numpy()
    return a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T


def logits(p, images, pool, mask=None):
    x = torch.tensor((images.astype(float) / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[:, None]
    pool2d = F.max_pool2d if pool == "max" else F.avg_pool2d

    def conv(x, i):
        return F.conv2d(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=1)

    h = conv(F.relu(conv(x, 1)), 2).relu()
    h = pool2d((h + conv(conv(h, 3).relu(), 4)).relu(), 2)
    h = conv(conv(h, 5).relu(), 6).relu()
    h = pool2d((h + conv(conv(h, 7).relu(), 8)).relu(), 2)
    features = h.permute(0, 2, 3, 1).flatten(1)
    features = features if mask is None else features * torch.tensor(mask)
    return F.linear(features, p["fc9.weight"], p["fc9.bias"])


def batch(rng, N=8):
    return rng.integers(0, 256, (N, 28, 28)).astype(np.uint8), rng.integers(0, 10, N)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_logits_loss_and_all_gradients_agree(rng, pool, dropout):
    settings = m.Settings(pool=pool, dropout=dropout)
    images, labels = batch(rng)
    params = m.init_params(settings, np.float64)
    params.flat += 0.01 * rng.standard_normal(params.flat.size)
    stream = m.device_stream(np.random.default_rng(5).integers(2**63, size=1)[0])
    _, mask = m.dropout(np.ones((len(images), 3136)), dropout, stream)
    p = tensors(params)
    expected = logits(p, images, pool, mask)
    expected_loss = F.cross_entropy(expected, torch.tensor(labels))
    expected_loss.backward()
    loss, gradients = m.loss_and_gradients(
        params, images, labels, settings, np.random.default_rng(5)
    )
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    if not dropout:
        np.testing.assert_allclose(
            m.predict(params, images, settings), expected.detach().numpy(), rtol=1e-9, atol=1e-12
        )
    for name, gradient in gradients.items():
        reference = ours(p[name].grad)
        assert np.linalg.norm(gradient - reference) < 1e-9 * np.linalg.norm(reference), name


def test_float32_fast_path_agrees_to_a_thousandth(rng):
    images, labels = batch(rng, 16)
    params = m.init_params(m.Settings())
    p = tensors({name: a.astype(float) for name, a in params.items()})
    F.cross_entropy(logits(p, images, "max"), torch.tensor(labels)).backward()
    gradients = m.loss_and_gradients(params, images, labels, m.Settings())[1]
    reference = np.concatenate([ours(p[name].grad).ravel() for name in params])
    assert np.linalg.norm(gradients.flat - reference) < 1e-3 * np.linalg.norm(reference)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_ten_steps_stay_together(rng, optimizer):
    settings = m.Settings(optimizer=optimizer, pool="avg", channels=(4, 16, 16, 16))
    images, labels = batch(rng, 4)
    params = m.init_params(settings, np.float64)
    state = m.State(params, np.zeros((2, params.flat.size)), None)
    p = tensors(params)
    if optimizer == "sgd":
        theirs = torch.optim.SGD(p.values(), lr=1e-3, momentum=0.9)
    else:
        theirs = torch.optim.Adam(p.values(), lr=1e-3)
    for _ in range(10):
        theirs.zero_grad()
        F.cross_entropy(logits(p, images, "avg"), torch.tensor(labels)).backward()
        theirs.step()
        m.update(state, m.loss_and_gradients(params, images, labels, settings)[1], settings, 1e-3)
    for name in params:
        np.testing.assert_allclose(params[name], ours(p[name]), rtol=1e-8, atol=1e-8)


def test_a_tie_in_max_pooling_sends_the_gradient_to_all_of_ours_and_one_of_theirs():
    x = torch.full((1, 1, 2, 2), 3.0, requires_grad=True)
    F.max_pool2d(x, 2).backward(torch.full((1, 1, 1, 1), 5.0))
    _, cache = m.max_pool2d(np.full((2, 2, 1, 1), 3.0))
    dx = m.max_pool2d_backward(np.full((1, 1, 1, 1), 5.0), cache)
    assert sorted(x.grad.numpy().ravel()) == [0, 0, 0, 5] and (dx == 5).all()


# torch_version/resnet9_torch.py: a run of each kind, step by step.


@pytest.fixture
def pair(tmp_path, sample):
    """Makes the same run in both versions: (ours, PyTorch's)."""

    def make(dtype=np.float64, **given):
        settings = t.TorchSettings(save_dir=str(tmp_path), threads=1, **given)
        runs = []
        for kind in (Ours, Theirs):
            params = m.init_params(settings, dtype)
            moments = np.zeros((1 if settings.optimizer == "sgd" else 2, params.flat.size), dtype)
            state = m.State(params, moments, m.Parameters(params) if settings.ema else None)
            run = m.Run(settings, m.layers, state, *m.split(sample, settings), total_steps=100)
            runs.append(kind(run, torch.device("cpu")))
        return runs

    return make


class Ours:
    """A step of the script, as PyTorch's engine takes it."""

    def __init__(self, run, device):
        self.run, self.settings = run, run.settings

    def learn(self, images, labels, rng, rate):
        loss, gradients = m.loss_and_gradients(
            self.run.state.params, images, labels, self.settings, rng, self.run.network
        )
        m.update(self.run.state, gradients, self.settings, rate)
        return loss

    def predict(self, images):
        return m.predict(self.run.state.to_evaluate(), images, self.settings)


class Theirs(t.Engine):
    def learn(self, images, labels, rng, rate):
        keeps = m.decay_keeps(rate, self.settings)
        takes = 1 - m.ema_keeps(self.settings, self.run.state.step)
        loss = super().learn(images, labels, rng, rate, keeps, takes)
        self.run.state.step += 1
        return loss


def step_both(runs, steps, rate=1e-3, seed=7):
    """Each run learns from the same batches of random images (no two pixels of which tie)."""
    for step in steps:
        # 20 images are shards of 8, 8 and 4.
        images, labels = batch(np.random.default_rng([seed, step]), 20)
        losses = [
            run.learn(images, labels, m.random_stream(0, m.STEP, 1, step), rate) for run in runs
        ]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-9)


def assert_together(runs, tolerance=1e-8):
    ours, theirs = (one.run.state for one in runs)
    assert ours.step == theirs.step
    np.testing.assert_allclose(ours.params.flat, theirs.params.flat, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.moments, theirs.moments, rtol=tolerance, atol=tolerance)
    if ours.ema is not None:
        np.testing.assert_allclose(ours.ema.flat, theirs.ema.flat, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pool": "avg", "augment": 1.0, "elastic": 1.0, "dropout": 0.5},
        {"dropout": 0.0, "label_smoothing": 0.1},
    ],
)
def test_a_step_of_the_pytorch_version_has_our_logits_loss_and_gradients(pair, rng, given):
    run, theirs = pair(**given)
    images, labels = batch(rng, 20)
    params = run.run.state.params
    expected = m.predict(params, images, run.settings)
    found = theirs.net(theirs.to_input(images)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    loss, gradients = m.loss_and_gradients(
        params, images, labels, run.settings, m.random_stream(0, m.STEP, 1, 0)
    )
    assert theirs.learn(
        images, labels, m.random_stream(0, m.STEP, 1, 0), 0.0
    ).item() == pytest.approx(loss, rel=1e-9)
    assert np.array_equal(theirs.run.state.params.flat, params.flat)  # at rate 0
    named = dict(theirs.net.named_parameters())
    assert list(named) == list(params) and len(named) == 18
    for name, w in named.items():
        assert np.linalg.norm(ours(w.grad) - gradients[name]) < 1e-9 * np.linalg.norm(
            gradients[name]
        ), name


OPTIMIZERS = [
    {"optimizer": "sgd"},
    {"optimizer": "adam", "weight_decay": 0.1, "ema": 0.9},
    {"optimizer": "muon", "weight_decay": 0.1, "ema": 0.9},
]
MORE = [
    {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.1, "ema": 0.99},
    {"optimizer": "adam"},
    {"optimizer": "adam", "beta2": 0.9},
    {"optimizer": "muon"},
]


@pytest.mark.parametrize(
    "given", [*OPTIMIZERS, *[pytest.param(given, marks=pytest.mark.long) for given in MORE]]
)
def test_ten_steps_of_the_pytorch_version_stay_with_ours(pair, given):
    runs = pair(channels=(4, 16, 16, 16), dropout=0.5, **given)
    step_both(runs, range(10))
    if given.get("momentum") == 0:  # without momentum PyTorch does not write down the last gradient
        runs[0].run.state.moments[...] = runs[1].run.state.moments
    assert_together(runs)


def test_each_version_continues_the_others_checkpoint(pair, tmp_path):
    given = dict(channels=(4, 16, 16, 16), dropout=0.5, ema=0.9)
    runs = pair(**given)
    step_both(runs, range(5))
    swapped = pair(**given)
    for one, other in zip(runs, reversed(swapped)):
        packed = m.checkpoint_of(one.run.state, one.settings)
        (tmp_path / "checkpoint.npz").write_bytes(packed)
        views = other.run.state.views()
        arrays, other.run.state.step, _ = read_checkpoint(tmp_path / "checkpoint.npz", views, {})
        for name, a in arrays.items():
            views[name][...] = a
    swapped = [type(one)(one.run, torch.device("cpu")) for one in swapped]
    assert all(one.run.state.step == 5 for one in swapped)
    step_both(swapped, range(5, 10))
    step_both(runs, range(5, 10))
    assert_together((runs[0], swapped[0]))
    assert_together((runs[1], swapped[1]))


def test_both_evaluate_alike(pair, sample):
    runs = pair(np.float32, ema=0.9)
    for run in runs:
        mean = run.run.state.ema.flat
        mean += 0.01 * np.random.default_rng(3).standard_normal(mean.size)
    images, labels = sample.test_images[:250], sample.test_labels[:250]
    (loss, accuracy, probs), theirs = [
        m.loss_and_accuracy(run.predict(images), labels) for run in runs
    ]
    assert theirs[:2] == (pytest.approx(loss, rel=1e-4), accuracy) and type(theirs[1]) is float
    np.testing.assert_allclose(theirs[2], probs, atol=1e-4)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_on_a_blank_image_max_pooling_ties_and_the_two_differ_on_purpose(pair, pool):
    run, theirs = pair(dropout=0.0, pool=pool)
    images, labels = np.zeros((4, 28, 28), np.uint8), np.arange(4)
    loss, gradients = m.loss_and_gradients(run.run.state.params, images, labels, run.settings)
    assert theirs.learn(images, labels, m.random_stream(0, m.STEP), 0.0).item() == pytest.approx(
        loss, rel=1e-9
    )
    w = dict(theirs.net.named_parameters())
    np.testing.assert_allclose(
        ours(w["fc9.weight"].grad), gradients["fc9.weight"], rtol=1e-9, atol=1e-12
    )
    for name in ("conv1.weight", "conv8.weight"):
        ratio = np.linalg.norm(gradients[name]) / w[name].grad.norm().item()
        assert ratio > 1.2 if pool == "max" else ratio == pytest.approx(1, rel=1e-9), name


# The program as its user meets it.


# Three steps an epoch.
TINY = [*SMALL, *"--threads 1 --learning-rate 1e-3 --train-images 96 --batch-size 32".split()]


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch, sample):
    few = replace(
        sample, test_images=sample.test_images[:200], test_labels=sample.test_labels[:200]
    )
    monkeypatch.setattr(m, "load_mnist", lambda _: few)


def torch_main(*flags):
    return m.main([*TINY, *map(str, flags)], t.start)


@pytest.mark.parametrize(
    "flags",
    [
        "--augment 1 --elastic 1 --ema 0.9 --weight-decay 0.1",
        pytest.param("--optimizer sgd --schedule one_cycle", marks=pytest.mark.long),
        pytest.param("--optimizer muon", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_continues_bit_for_bit(flags, tmp_path, monkeypatch, capsys):
    flags = ("--epochs-max", "3", *flags.split())
    assert torch_main("--save-dir", tmp_path / "whole", *flags) == 0
    step = t.Engine.step

    def step_and_interrupt(engine, state, number):
        loss = step(engine, state, number)
        if state.step in (2, 7):  # in the first and in the last epoch
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(t.Engine, "step", step_and_interrupt)
    parts = ("--save-dir", tmp_path / "parts", *flags)
    assert [torch_main(*parts), torch_main(*parts), torch_main(*parts)] == [130, 130, 0]
    assert_same_run(tmp_path / "whole" / "torch_resnet9", tmp_path / "parts" / "torch_resnet9")


@pytest.mark.parametrize(
    "pool, tolerance", [("max", 0.1), pytest.param("avg", 0.01, marks=pytest.mark.long)]
)
def test_a_tiny_training_ends_alike_on_both_sides(pool, tolerance, tmp_path):
    flags = (
        "--save-dir",
        str(tmp_path),
        "--pool",
        pool,
        "--train-images",
        "320",
        "--epochs-max",
        "3",
        "--tag",
        "x",
    )
    assert m.main([*TINY, *flags]) == 0 and torch_main(*flags) == 0
    one, two = (metrics_of(tmp_path / tag) for tag in ("x", "torch_x"))
    np.testing.assert_allclose(one[0, :6], two[0, :6], rtol=1e-5)  # the network before training
    np.testing.assert_allclose(one[:, [2, 4]], two[:, [2, 4]], atol=tolerance)
    assert two[-1, 2] < two[0, 2] - 0.1


def test_weights_go_both_ways_and_the_run_has_its_files(tmp_path, capsys, monkeypatch):
    flags = ("--save-dir", str(tmp_path), "--epochs-max", "1")
    assert m.main([*TINY, *flags, "--ema", "0.5"]) == 0
    assert torch_main(*flags, "--weights", tmp_path / "resnet9" / "checkpoint_last.npz") == 0
    folder = tmp_path / "torch_resnet9"
    code = {
        path.relative_to(folder / "code").as_posix() for path in (folder / "code").rglob("*.py")
    }
    support = {f"support/{path.name}" for path in (m.ROOT / "support").glob("*.py")}
    assert code == {"torch_version/resnet9_torch.py", "mnist_resnet9.py", "plot_figs.py", *support}
    assert "PyTorch" in (folder / "log.txt").read_text()
    ours, theirs = (metrics_of(path) for path in (tmp_path / "resnet9", folder))
    assert theirs[0][2:6] == pytest.approx(ours[1][2:6], rel=1e-5)  # it starts where ours ended

    settings, data = m.Settings(channels=(4, 16, 16, 16)), m.load_mnist("")
    params = m.load_weights(folder / "checkpoint_last.npz", settings)
    probs = m.softmax(m.predict(params, data.test_images, settings))[0]
    np.testing.assert_allclose(
        probs, arrays(folder / "predictions.npz")["probabilities"], atol=1e-5
    )

    # Only the curves that stand side by side are drawn.
    monkeypatch.setattr(plot_figs, "draw_run", lambda *_: ())
    assert plot_figs.main(["resnet9", "torch_resnet9", "--save-dir", str(tmp_path)]) == 0
    assert (tmp_path / "resnet9" / "curves_resnet9+torch_resnet9.png").exists()


def test_a_run_that_started_from_weights_continues_without_their_file(tmp_path):
    flags = ("--save-dir", tmp_path, "--weights", tmp_path / "start.npz")
    assert torch_main("--save-dir", tmp_path, "--tag", "start", "--epochs-max", "1") == 0
    shutil.move(tmp_path / "torch_start" / "checkpoint_last.npz", tmp_path / "start.npz")
    assert torch_main(*flags, "--epochs-max", "1") == 0
    (tmp_path / "start.npz").unlink()
    assert torch_main(*flags, "--epochs-max", "2") == 0


def test_a_mean_of_the_weights_starts_from_them_too(tmp_path):
    """The mean is what is evaluated, from epoch 0 on."""
    flags = ("--save-dir", tmp_path, "--epochs-max", "1")
    assert m.main([*TINY, *map(str, flags)]) == 0
    weights = ("--weights", tmp_path / "resnet9" / "checkpoint_last.npz")
    assert torch_main(*flags, *weights, "--ema", "0.9") == 0
    ours, theirs = (metrics_of(tmp_path / tag) for tag in ("resnet9", "torch_resnet9"))
    assert theirs[0][2:6] == pytest.approx(ours[1][2:6], rel=1e-5)


def test_a_run_without_a_checkpoint_to_continue_starts_from_the_weights(tmp_path, capsys):
    """What a crash in epoch 0 leaves, or a damaged file that was put aside, is none."""
    flags = ("--save-dir", tmp_path, "--epochs-max", "1")
    assert m.main([*TINY, *map(str, flags)]) == 0
    ours, folder = metrics_of(tmp_path / "resnet9"), tmp_path / "torch_resnet9"
    flags += ("--weights", tmp_path / "resnet9" / "checkpoint_last.npz")
    for left in ("best", "damaged"):
        assert torch_main(*flags) == 0
        (folder / "checkpoint_last.npz").rename(folder / f"checkpoint_{left}.npz")
        for name in ("last", "previous"):
            (folder / f"checkpoint_{name}.npz").unlink(missing_ok=True)
        assert torch_main(*flags) == 0
        assert "starts from epoch 0" in capsys.readouterr().err
        assert metrics_of(folder)[0, 2:6] == pytest.approx(ours[1][2:6], rel=1e-5)


def test_either_version_continues_what_the_other_made(tmp_path):
    flags = ("--save-dir", tmp_path)
    assert torch_main(*flags, "--epochs-max", "1") == 0
    assert m.main([*TINY, *map(str, flags), "--tag", "torch_resnet9", "--epochs-max", "2"]) == 0
    assert torch_main(*flags, "--epochs-max", "3") == 0
    assert len(metrics_of(tmp_path / "torch_resnet9")) == 4


def test_altered_weights_are_refused(tmp_path, capsys):
    flags = ("--save-dir", tmp_path, "--epochs-max", "1")
    assert torch_main(*flags) == 0
    with np.load(tmp_path / "torch_resnet9" / "checkpoint_last.npz") as file:
        content = dict(file)
    content["conv3.bias"] = content["conv3.bias"] + 1
    storage.write_file(tmp_path / "altered.npz", storage.pack_arrays(**content))
    capsys.readouterr()
    assert torch_main(*flags, "--tag", "other", "--weights", tmp_path / "altered.npz") == 2
    assert "checksums" in capsys.readouterr().err


BAD = {
    "--weights missing.npz": "No such file or directory",
    "--weights README.md": "README.md is damaged",
    "--foo 1": "--weights",
    "--batch-size 0": "batch_size is 0",
    "--device gpu": "device gpu cannot be used: ",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line_and_exit_status_2(flags, tmp_path, capsys, monkeypatch):
    if "gpu" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(m.ROOT)
    assert torch_main("--save-dir", tmp_path / "save", *flags.split()) == 2
    out, err = capsys.readouterr()
    assert BAD[flags] in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "save").exists()


def test_weights_of_another_network_are_refused(tmp_path, capsys):
    # NumPy would stretch one channel to four.
    params = m.init_params(m.Settings(channels=(1, 16, 16, 16)))
    content = storage.pack_arrays(**params, sha256=checksums(params))
    storage.write_file(tmp_path / "other.npz", content)
    assert torch_main("--save-dir", tmp_path / "save", "--weights", tmp_path / "other.npz") == 2
    assert "conv1.weight float32 (3, 3, 1, 1), not float32 (3, 3, 1, 4)" in capsys.readouterr().err


def test_device_auto_says_what_it_took():
    said = t.use_device("auto")
    assert (
        said.startswith("GPU, " if torch.cuda.is_available() else "CPU (no GPU: ")
        and torch.__version__ in said
    )


def test_the_script_starts_from_its_own_folder():
    command, folder = [sys.executable, "resnet9_torch.py", "--help"], m.ROOT / "torch_version"
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "--weights " in result.stdout and "--augment " in result.stdout


def test_without_pytorch_a_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(t.__file__, run_name="__main__")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "requirements-torch.txt" in err and err.count("\n") == 1
