"""--check: right gradients are found right, and of wrong ones the pair is named."""

import functools
import inspect
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import mnist_resnet9 as m
from support import winograd
from support.check import Bench, check_network
from support.trace import pairs_in
from support.workers import OneBlasThread

SMALL = m.Settings(channels=(2, 4, 4, 4), data_dir="data/sample", label_smoothing=0.1, threads=1)


def textbook_loss(params, images, labels, settings, rng, network):
    """learn_from() with softmax and cross-entropy one by one."""
    net = network(settings, rng)
    logits, caches = m.forward(net, params, m.to_input(images, np.float64))
    probs, probs_cache = m.softmax(logits)
    loss, cache = m.cross_entropy(probs, labels)
    dlogits = m.softmax_backward(m.cross_entropy_backward(1, cache), probs_cache)
    return loss, m.backward(net, dlogits, caches)


def tiny(settings, rng=None):
    """A network with every pair of ResNet9 and few numbers."""
    return [
        m.pool("pool1", settings),  # (14, 14, N, 1)
        m.conv("conv2", 1, 3),
        m.residual("conv3", "conv4", 3),
        m.pool("pool4", settings),  # (7, 7, N, 3)
        m.flat("features"),
        m.drop("dropout", settings, rng),
        m.fully_connected("fc5", 147, 10),
    ]


def findings(settings, network=tiny):
    bench = Bench(m, network, settings)
    bench.take_images()
    bench.take_parameters()
    with OneBlasThread(), np.errstate(all="ignore"):
        return bench.pairs()


@pytest.fixture
def edit(monkeypatch):
    """edit("relu_backward", "dy * mask", "dy") makes that change to the script's function."""

    sources = {}

    def edit(name, old, new):
        source = sources.get(name) or inspect.getsource(getattr(m, name))
        head, document, body = source.split('"""', 2)
        assert body.count(old) == 1, f"{name} has no {old!r}, or several: the test needs mending"
        sources[name] = f'{head}"""{document}"""{body.replace(old, new)}'
        made = {}
        exec(compile(sources[name], "edited.py", "exec"), vars(m), made)
        monkeypatch.setattr(m, name, made[name])

    return edit


def rows(text):
    return [line.strip().split(" | ") for line in text.strip().splitlines()]


# A function, what stands there, and the mistake in its place. The first wrong line must name the
# pair that the function belongs to.
MISTAKES = rows("""
    relu_backward | return dy * mask | return dy
    relu_backward | dy * mask | dy * ~mask
    relu_backward | dy * mask | -dy * mask
    relu_backward | dy * mask | dy * (mask + 0.1 * ~mask)
    relu_backward | return dy * mask | dy *= mask; return dy
    relu_backward | dy * mask | dy * mask.astype(xp.float64)
    relu | xp.maximum(x, 0) | xp.maximum(x, 0) * xp.ones(1)
    softmax_backward | (dprobs - | (dprobs - 0 *
    softmax_backward | (dprobs - | (dprobs * (1 - probs) - 0 *
    softmax_backward | axis=1 | axis=0
    softmax_backward | (dprobs - | (dprobs +
    cross_entropy_backward | (N * probs[at_label]) | probs[at_label]
    cross_entropy_backward | -dloss | dloss
    cross_entropy_backward | -dloss | -1
    cross_entropy_backward | xp.zeros_like(probs) | -dloss / (N * probs)
    cross_entropy_loss_backward | (dloss / N) | dloss
    cross_entropy_loss_backward | (dloss / N) | (dloss / N / N)
    cross_entropy_loss_backward | (dloss / N) | (1 / N)
    cross_entropy_loss_backward | (dloss / N) | (dloss / target.shape[1])
    cross_entropy_loss_backward | - target | - (target > 0.5)
    cross_entropy_loss_backward | - target | - 0
    cross_entropy_loss_backward | - target | + target
    cross_entropy_loss_backward | (xp.exp(log_probs) - target) | (target - xp.exp(log_probs))
    cross_entropy_loss_backward | xp.exp(log_probs) | log_probs.copy()
    cross_entropy_loss_backward | xp.exp(log_probs) | xp.exp(log_probs, out=log_probs)
    dropout | x * mask, mask | x * mask, kept
    dropout_backward | dy * mask | dy
    dropout_backward | dy * mask | dy / mask
    dropout_backward | dy * mask | dy * mask * mask
    linear_backward | dy @ w.T | dy @ w
    linear_backward | x.T @ dy | dy.T @ x
    linear_backward | x.T @ dy | x.T @ dy / len(dy)
    linear_backward | x.T @ dy | 2 * x.T @ dy
    linear_backward | x.T @ dy | x.T @ dy.astype(xp.float64)
    linear_backward | dy.sum(axis=0) | dy.sum()
    linear_backward | dy.sum(axis=0) | dy.sum(axis=1)
    linear_backward | dy.sum(axis=0) | dy.sum(axis=0, keepdims=True)
    linear_backward | dy.sum(axis=0) | dy.mean(axis=0)
    linear_backward | dy.sum(axis=0) | dy[0]
    linear_backward | return dx, dw, db | return dx, db, dw
    linear_backward | return dx, dw, db | return dx, dw
    linear_backward | return dx, dw, db | w -= 0.1 * dw; return dx, dw, db
    flatten_backward | reshape(N, H, W, C).transpose(1, 2, 0, 3) | reshape(H, W, N, C)
    flatten_backward | transpose(1, 2, 0, 3) | transpose(2, 1, 0, 3)
    avg_pool2d_backward | size**2 | size
    avg_pool2d_backward | dy / size**2 | dy
    max_pool2d_backward | * mask | * ~mask
    max_pool2d_backward | * mask | * xp.ones_like(mask)
    max_pool2d_backward | * mask | * mask / 4
    max_pool2d_backward | * mask | * mask.swapaxes(1, 3)
    max_pool2d | v >= | v <=
    conv2d_backward | w[::-1, ::-1].swapaxes(2, 3) | w.swapaxes(2, 3)
    conv2d_backward | w[::-1, ::-1] | w[::-1]
    conv2d_backward | w[::-1, ::-1].swapaxes(2, 3) | w[::-1, ::-1]
    conv2d_backward | (cols.T @ dy_rows) | (cols.T @ dy_rows / N)
    conv2d_backward | (cols.T @ dy_rows) | -(cols.T @ dy_rows)
    conv2d_backward | xp.ones(H * W * N, dy.dtype) @ dy_rows | dy.sum(axis=(0, 1))
    conv2d_backward | xp.ones(H * W * N, dy.dtype) @ dy_rows | dy_rows.mean(axis=0)
    conv2d_backward | xp.ones(H * W * N, dy.dtype) | xp.ones(H * W * N)
    conv_block_backward | relu_backward(dy, relu_cache) | dy
    conv_block_backward | relu_backward(dy, relu_cache) | relu_backward(dy, ~relu_cache)
    conv_block_backward | (dh, conv_cache, need_dx) | (2 * dh, conv_cache)
    residual_block_backward | dx += dsum | pass
    residual_block_backward | dx += dsum | dx += dy
    residual_block_backward | dx += dsum | dx = dsum
    residual_block_backward | conv2d_backward(dsum, conv_cache) | conv2d_backward(dy, conv_cache)
    residual_block_backward | (dh, block_cache) | (dsum, block_cache)
    residual_block_backward | return dx, dw1, db1, dw2, db2 | return dx, dw2, db2, dw1, db1
""")

# Two functions that do not fit together: this convolution keeps its y, to which residual_block adds
# something in place.
OVERWRITTEN = rows("""
    conv2d | return y.reshape(H, W, N, K) | y = xp.exp(0.1 * y).reshape(H, W, N, K); return y
    conv2d | (cols, w) | (cols, w, y)
    conv2d_backward | cols, w = cache | cols, w, y = cache; dy = 0.1 * dy * y
""")


@pytest.fixture
def small(monkeypatch, sample):
    monkeypatch.setattr(m, "load_mnist", lambda data_dir: sample)


def wrong_in(found):
    """The wrong ones among the Findings. Those after the first must be so because of it."""
    wrong = [finding for finding in found if finding.problems]
    assert wrong and not wrong[0].because
    assert all(finding.because == [wrong[0].name] for finding in wrong[1:])
    return wrong


@pytest.mark.parametrize("function, old, new", MISTAKES)
def test_a_mistake_is_found_by_name(function, old, new, edit, small, monkeypatch):
    pair = function.removesuffix("_backward")
    if pair in ("softmax", "cross_entropy"):
        monkeypatch.setattr(m, "learn_from", textbook_loss)
    edit(function, old, new)
    pool = "avg" if pair == "avg_pool2d" else "max"
    wrong = wrong_in(findings(replace(SMALL, pool=pool)))
    assert wrong[0].name == pair
    line, *sentences = str(wrong[0]).splitlines()
    assert line.split()[:2] == ["WRONG", pair] and sentences
    assert all(len(text) <= 100 for finding in wrong for text in str(finding).splitlines())


def test_a_cache_that_another_function_overwrites_is_found_by_name(edit, small):
    for change in OVERWRITTEN:
        edit(*change)
    wrong = wrong_in(findings(SMALL))
    assert wrong[0].name == "conv2d"
    assert "it shares an array that a later line changes in place" in " ".join(wrong[0].problems)


def cube(x, out=None):
    """It keeps x, and is right, unless it is asked to write y over x."""
    return np.multiply(x, x**2, out=out), x


def cube_backward(dy, x):
    return 3 * x**2 * dy


def cube_block(x, in_place=False):
    h = x / 2
    return cube(h, out=h if in_place else None)


def cube_block_backward(dy, cache):
    return cube_backward(dy, cache) / 2


@pytest.mark.parametrize("in_place", (False, True))
def test_a_cache_that_is_overwritten_by_request_is_found_by_name(in_place, small):
    def network(settings, rng=None):
        block = functools.partial(cube_block, in_place=in_place)
        return with_layer(settings, rng, block, cube_block_backward, ())

    found = findings(SMALL, network)
    if in_place:
        assert [finding.name for finding in wrong_in(found)] == ["cube", "cube_block"]
    else:
        assert "cube" in [finding.name for finding in found]
        assert not [finding for finding in found if finding.problems]


def test_every_pair_of_the_script_has_mistakes_among_these():
    pairs = {name for name, _, _ in pairs_in(vars(m))}
    assert pairs == {function.removesuffix("_backward") for function, _, _ in MISTAKES}
    assert len(MISTAKES) >= 30


SAYS = rows("""
    relu_backward | return dy * mask | return dy | these should be 0
    relu_backward | dy * mask | -dy * mask | has the wrong sign
    linear_backward | x.T @ dy | 2 * x.T @ dy | dw is exactly 2 times too large
    linear_backward | x.T @ dy | 2 * x.T @ dy | dx and db are right
    linear_backward | x.T @ dy | dy.T @ x | dw has the shape (10, 147), but w has
    linear_backward | dy.sum(axis=0) | dy.sum(axis=1) | db has the shape (5,), but b has
    linear_backward | dy.sum(axis=0) | dy.mean(axis=0) | There are 5 images: is a 1/N there twice?
    linear_backward | return dx, dw, db | return dx, dw | db is missing
    linear_backward | return dx, dw, db | return dx, dw, db, db | returns 4 gradients
    linear_backward | dy @ w.T | dy @ w | linear_backward raises ValueError
    linear_backward | return dx | w *= 2; return dx | changes w in place
    linear | return x @ w | x += 1; return x @ w | linear changes its input x in place
    linear | return x @ w + b, (x, w) | return x @ w + b | does not return two things
    linear_backward | dy @ w.T | dy @ w.T / 0 | dx is not finite: NaN or infinite. dw and db are
    linear | x @ w + b, | x @ w / 0 + b, | linear: y is not finite
    linear | x @ w + b, | (x @ w + b).astype(np.float32), | float64 it makes a y of float32
    linear | x @ w + b, | x @ w + b + np.random.rand(), | gives another y when it is called again
    cross_entropy_loss_backward | (dloss / N) | dloss | is a 1/N missing?
    cross_entropy_loss_backward | (dloss / N) | (1 / N) | dy was 1.37: is it left out?
    conv2d_backward | [::-1, ::-1] |  | right once axes 0 and 1 are turned round
    conv2d_backward | xp.ones(H * W * N, dy.dtype) @ dy_rows | dy_rows.mean(axis=0) | of a sum?
    residual_block_backward | dx += dsum | pass | right once dy, where y is not 0, is added
    residual_block_backward | dw1, db1, dw2 | dw2, db1, dw1 | once dw1 and dw2 change places
    dropout_backward | dy * mask | dy * mask.astype(xp.float64) | dx is float64
    dropout | x * mask, mask | x * mask + rng.random(), mask * 2 | dx is exactly 2 times too large
""")


@pytest.mark.parametrize("function, old, new, says", SAYS)
def test_the_numbers_are_read(function, old, new, says, edit, small):
    edit(function, old, new)
    wrong = wrong_in(findings(SMALL))
    assert wrong[0].name == function.removesuffix("_backward")
    assert says in " ".join(str(wrong[0]).split())


def test_a_pair_wrong_in_some_calls_alone_says_in_which(edit, small):
    edit("conv2d_backward", "if not need_dx:", "if C == 3:\n        dw *= 2\n    if not need_dx:")
    text = " ".join(str(wrong_in(findings(SMALL))[0]).split())
    assert "(In 2 of 3 calls, the first of them in conv4.)" in text


def scaled(x, gain):
    """A pair that the script does not have."""
    return x * gain, (x, gain)


def scaled_backward(dy, cache):
    x, gain = cache
    return dy * gain, (dy * x).sum(axis=(0, 1, 2))


def halves(x, module):
    """A pair with an argument that cannot be copied."""
    return module.divide(x, 2), None


def halves_backward(dy, cache):
    return dy / 2


def with_layer(settings, rng, op, op_backward, params):
    layer = m.Layer("new", op, op_backward, params, lambda rng: [np.ones(3)] * len(params))
    return [*tiny(settings, rng)[:2], layer, *tiny(settings, rng)[2:]]


@pytest.mark.parametrize("times", (1, 3))
@pytest.mark.parametrize(
    "name, op, back, params",
    [
        ("scaled", scaled, scaled_backward, ["gain"]),
        ("scaled", functools.partial(scaled), functools.partial(scaled_backward), ["gain"]),
        ("new", lambda x: (2 * x, None), lambda dy, _: 2 * dy, []),
        ("new", lambda x: (m.relu(x)[0], x > 0), lambda dy, mask: dy * mask, []),
        ("halves", functools.partial(halves, module=np), halves_backward, []),
    ],
)
def test_a_new_layer_is_checked_without_registering(name, op, back, params, times, small):
    def wrong_back(dy, cache):
        dx = back(dy, cache)
        return tuple(times * d for d in dx) if params else times * dx

    def network(settings, rng=None):
        return with_layer(settings, rng, op, wrong_back, params)

    found = findings(SMALL, network)
    names = [finding.name for finding in found]
    assert name in names and "relu" in names
    if times == 1:
        assert not [str(finding) for finding in found if finding.problems]
    else:
        assert wrong_in(found)[0].name == name


def layer_norm(x, gain, shift):
    axes = (0, 1, 3)
    centred = x - x.mean(axis=axes, keepdims=True)
    std = np.sqrt((centred**2).mean(axis=axes, keepdims=True) + np.float32(1e-5))
    return gain * centred / std + shift, (centred / std, std, gain)


def layer_norm_backward(dy, cache):
    z, std, gain = cache
    dz = dy * gain
    mean, along = (a.mean(axis=(0, 1, 3), keepdims=True) for a in (dz, dz * z))
    return (dz - mean - z * along) / std, (dy * z).sum(axis=(0, 1, 2)), dy.sum(axis=(0, 1, 2))


def batch_norm(x, gain, shift):
    std = np.sqrt(x.var(axis=(0, 1, 2)) + np.float32(1e-5))
    z = (x - x.mean(axis=(0, 1, 2))) / std
    return gain * z + shift, (z, std, gain)


def batch_norm_backward(dy, cache):
    z, std, gain = cache
    dz = dy * gain
    dz = dz - dz.mean(axis=(0, 1, 2)) - z * (dz * z).mean(axis=(0, 1, 2))
    return dz / std, (dy * z).sum(axis=(0, 1, 2)), dy.sum(axis=(0, 1, 2))


def with_layer_norm(settings, rng=None):
    return with_layer(settings, rng, layer_norm, layer_norm_backward, ("gain", "shift"))


def with_batch_norm(settings, rng=None):
    return with_layer(settings, rng, batch_norm, batch_norm_backward, ("gain", "shift"))


def full(network=tiny, settings=SMALL):
    """(what check() prints, whether it says that all is right)"""
    lines = []
    ok = check_network(m, network, settings, lines.append)
    return "\n".join(lines), ok


@pytest.mark.parametrize("pool", ("max", "avg"))
def test_the_script_as_it_is_is_right(small, pool):
    text, ok = full(m.layers, replace(SMALL, pool=pool, seed=3))
    assert ok and "WRONG" not in text and text.count("\nok ") == 14
    assert f"{'avg' if pool == 'max' else 'max'}_pool2d" in text.split("not looked at: ")[1]


def test_a_norm_of_each_image_is_right_and_one_of_the_batch_mixes_images(small):
    text, ok = full(with_layer_norm)
    assert ok and "ok     layer_norm          dx" in text
    text, ok = full(with_batch_norm)
    assert not ok and "ok     batch_norm          dx" in text  # its gradients are right
    assert text.count("WRONG") == 2 and "WRONG  images apart" in text
    assert "In new, batch_norm makes of an image what depends on others" in " ".join(text.split())


JOINS = rows("""
    dy, *of_params | *of_params, dy | It raises
    zip(layer.params, | zip(layer.params[:1], | backward gives no gradient of conv
    params, of_params) | params, of_params[::-1]) | conv2.weight is float64 (3, 3, 1, 3), but
    return gradients | gradients["odd"] = dy; return gradients | odd, which is not a parameter
    params, of_params) | params, [2 * g for g in of_params]) | Wrong are the gradients of conv2.w
""")


@pytest.mark.parametrize("old, new, says", JOINS)
def test_what_joins_the_pairs_is_checked_too(old, new, says, edit, small):
    edit("backward", old, new)
    text, ok = full()
    assert not ok and f" {says}" in " ".join(text.split())
    first_wrong = text[text.index("WRONG") :].splitlines()[0]
    assert first_wrong.startswith("WRONG  whole network")
    assert text.count("because of whole network") == text.count("WRONG") - 2


def test_another_convolution_than_winograds_is_computed_by_its_own_lines(edit, small):
    edit("conv2d", "K) + b", "K) + 2 * b")
    edit("conv2d_backward", "db = xp.ones", "db = 2 * xp.ones")
    text, ok = full(m.layers, replace(SMALL, channels=(4, 4, 4, 4)))
    assert ok and "fast convolution    not used" in text


def test_a_loss_that_does_not_fall_is_noticed(small, monkeypatch):
    def uphill(state, gradients, settings, rate):
        state.params.flat += rate * gradients.flat

    monkeypatch.setattr(m, "update", uphill)
    text, ok = full()
    assert not ok and "WRONG  twenty steps        loss " in text and text.count("WRONG") == 2


def test_an_exception_is_a_line(edit, small):
    edit("linear_backward", "dy @ w.T", "dy @ w")
    text, ok = full()
    assert not ok and "WRONG  linear\n" in text and "Traceback" not in text
    assert "WRONG  twenty steps        because of linear" in text
    assert text.endswith("Begin with linear.")


def test_a_network_that_cannot_be_built_is_a_line(small):
    def network(settings, rng=None):
        return [m.pool("pool", settings), m.conv("conv1", 1)]

    text, ok = full(network)
    assert not ok and "WRONG  the network\n       It raises TypeError: conv()" in text


def test_the_script_is_left_as_it_was(small, edit):
    edit("linear_backward", "dy @ w.T", "dy @ w")  # with an exception on the way, too
    before = dict(vars(m)), winograd.MIN_CHANNELS
    cores = m.workers.count
    full()
    after = dict(vars(m)), winograd.MIN_CHANNELS
    for names in (before[0], after[0]):
        del names["workers"]
    assert before == after and m.workers.count == cores


def test_check_in_a_notebook_honours_a_replaced_function(small, monkeypatch, capsys):
    monkeypatch.setattr(m, "relu_backward", lambda dy, mask: dy)
    assert m.check(SMALL, tiny) is False
    assert "\nWRONG  relu " in capsys.readouterr().out


def run_script(folder, *flags, script="mnist_resnet9.py"):
    command = [sys.executable, folder / script, "--check", "--channels", "2,4,4,4", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_from_the_command_line(tmp_path):
    data = ("--data-dir", str(m.ROOT / "data" / "sample"), "--save-dir", str(tmp_path / "save"))
    result = run_script(m.ROOT, *data, "--recipe", "quick", script="evolution/step3_convolution.py")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "are ok" in result.stdout and not (tmp_path / "save").exists()
    result = run_script(m.ROOT, *data, "--droput", "0.5")
    assert result.returncode == 2 and "--check" in result.stderr and "--dropout" in result.stderr


def copy_of_the_tree(folder):
    for name in ("support", "evolution", "data/sample"):
        shutil.copytree(m.ROOT / name, folder / name)
    shutil.copy(m.ROOT / "mnist_resnet9.py", folder)
    return folder


@pytest.mark.long
def test_an_edited_copy_is_checked_as_it_is_edited(tmp_path):
    copy = copy_of_the_tree(tmp_path)
    script = copy / "mnist_resnet9.py"
    source = script.read_text()
    assert source.count("return dy * mask\n") == 1
    script.write_text(source.replace("return dy * mask\n", "return dy\n"))

    def files():
        return [path for path in sorted(copy.rglob("*.*")) if "__pycache__" not in str(path)]

    before = files()
    for name in ("mnist_resnet9.py", "evolution/step5_max_pooling.py"):
        result = run_script(copy, "--data-dir", "data/sample", script=name)
        assert result.returncode == 1 and not result.stderr, result.stderr
        first_wrong = result.stdout[result.stdout.index("WRONG") :].splitlines()[0]
        assert first_wrong.startswith("WRONG  relu ")
    assert files() == before


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 6))
def test_steps_of_evolution_are_right(number):
    (path,) = (m.ROOT / "evolution").glob(f"step{number}_*.py")
    result = run_script(m.ROOT, "--data-dir", "data/sample", script=path)
    assert result.returncode == 0 and "WRONG" not in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=pytest.mark.long if seed in (0, 2, 3) else pytest.mark.exhaustive)
        for seed in range(20)
    ],
)
def test_the_script_as_it_is_is_right_on_any_seed(small, seed):
    recipe = list(m.RECIPES)[seed] if seed < 4 else "quick"  # the others have wider layers
    settings = m.parse_settings(["--recipe", recipe, "--seed", str(seed), "--device", "cpu"])
    pool, smoothing = ("max", "avg")[seed // 4 % 2], (0.0, 0.1, 0.9)[seed % 3]
    text, ok = full(m.layers, replace(settings, pool=pool, label_smoothing=smoothing))
    assert ok, text


@pytest.mark.long
@pytest.mark.parametrize("function, old, new", MISTAKES[::20])
def test_a_mistake_is_found_in_the_whole_network(function, old, new, edit, small, monkeypatch):
    pair = function.removesuffix("_backward")
    if pair in ("softmax", "cross_entropy"):
        monkeypatch.setattr(m, "learn_from", textbook_loss)
    edit(function, old, new)
    pool = "avg" if pair == "avg_pool2d" else "max"
    text, ok = full(m.layers, m.Settings(pool=pool, label_smoothing=0.1, threads=1))
    first_wrong = text[text.index("WRONG") :].splitlines()[0]
    assert not ok and first_wrong.startswith(f"WRONG  {pair} ")
