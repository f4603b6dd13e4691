"""The numbers of docs/backward.md, by the script's functions and by central differences (float64).

Each of its sections has one example, a block of assignments. They are read here, never copied: an
array called dfoo has to be the gradient of the loss with respect to foo.
"""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from reference import central_differences

import mnist_resnet9 as m
from mnist_resnet9 import conv2d, linear, residual_block

DOCUMENT = (Path(m.__file__).parent / "docs" / "backward.md").read_text(encoding="utf-8")
WRITTEN = 5.1e-5  # the document rounds to four decimals


def number(node):
    """The array that an expression of the document stands for: numbers, log(…), minus and lists."""
    if isinstance(node, ast.List):
        return [number(element) for element in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number(node.operand)
    if isinstance(node, ast.Call) and node.func.id == "log":
        return np.log(number(node.args[0]))
    return node.value


def example_of(section):
    """The syntax tree of the one example in this section."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", DOCUMENT, re.M | re.S)[1]
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return ast.parse(block)


def values_of(tree):
    """name → array in float64, of every assignment of an example; labels are whole numbers."""
    values = {}
    for line in tree.body:
        (target,) = line.targets
        assert target.id not in values, f"{target.id} stands there twice"
        kind = int if target.id == "labels" else float
        values[target.id] = np.array(number(line.value), kind)
    return values


def same(computed, written):
    np.testing.assert_allclose(computed, written, rtol=0, atol=WRITTEN)


def check_gradients(function, dy, inputs, gradients):
    """Central differences of Σ dy · function(*inputs), against the document's gradients."""
    for a, written in zip(inputs, gradients):
        assert written.shape == a.shape
        same(
            central_differences(lambda: float((dy * function(*inputs)[0]).sum()), a, 1e-5), written
        )


def check_linear(v):
    inputs, gradients = [v["x"], v["w"], v["b"]], [v["dx"], v["dw"], v["db"]]
    y, cache = linear(*inputs)
    same(y, v["y"])
    for computed, written in zip(m.linear_backward(v["dy"], cache), gradients):
        same(computed, written)
    check_gradients(linear, v["dy"], inputs, gradients)


def check_softmax(v):
    probs, softmax_cache = m.softmax(v["logits"])
    same(probs, v["probs"])
    loss, cache = m.cross_entropy(probs, v["labels"])
    same(loss, v["loss"])
    dprobs = m.cross_entropy_backward(1, cache)
    same(dprobs, v["dprobs"])
    same(m.softmax_backward(dprobs, softmax_cache), v["dlogits"])
    loss, cache = m.cross_entropy_loss(v["logits"], v["labels"])
    same(loss, v["loss"])
    same(m.cross_entropy_loss_backward(1, cache), v["dlogits"])

    def of_logits(logits):
        return m.cross_entropy_loss(logits, v["labels"])

    def of_probs(probs):
        return m.cross_entropy(probs, v["labels"])

    check_gradients(of_logits, 1, [v["logits"]], [v["dlogits"]])
    check_gradients(of_probs, 1, [v["probs"]], [v["dprobs"]])
    same(v["dlogits"].sum(axis=1), 0)


def check_convolution(v):
    # One image and one channel: the document writes (H, W), the script (H, W, N, C).
    x, w, y, dy, dx, dw = (v[a][:, :, None, None] for a in ("x", "w", "y", "dy", "dx", "dw"))
    inputs, gradients = [x, w, v["b"]], [dx, dw, v["db"]]
    computed, cache = conv2d(*inputs)
    same(computed, y)
    for computed, written in zip(m.conv2d_backward(dy, cache), gradients):
        same(computed, written)
    check_gradients(conv2d, dy, inputs, gradients)

    same(v["cols"] @ w.reshape(9, 1) + v["b"], y.reshape(6, 1))
    same(v["cols"].T @ dy.reshape(6, 1), dw.reshape(9, 1))
    padded = np.pad(v["x"], 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    same(windows.reshape(6, 9), v["cols"])
    same(v["w"][::-1, ::-1], v["turned"])
    same(conv2d(dy, v["turned"][:, :, None, None], np.zeros(1))[0], dx)


def check_residual(v):
    # One image of one pixel: the document writes (C,), the script (1, 1, 1, C); kernels are 1×1.
    x, y, dy, dsum, dx = (v[a].reshape(1, 1, 1, 2) for a in ("x", "y", "dy", "dsum", "dx"))
    w1, w2, dw1, dw2 = (v[a].reshape(1, 1, 2, 2) for a in ("w1", "w2", "dw1", "dw2"))
    inputs = [x, w1, v["b1"], w2, v["b2"]]
    gradients = [dx, dw1, v["db1"], dw2, v["db2"]]
    computed, cache = residual_block(*inputs)
    same(computed, y)
    for computed, written in zip(m.residual_block_backward(dy, cache), gradients):
        same(computed, written)
    check_gradients(residual_block, dy, inputs, gradients)

    h1, _ = conv2d(x, w1, v["b1"])
    same(h1.ravel(), v["h1"])
    h2, mask1 = m.relu(h1.copy())
    same(h2.ravel(), v["h2"])
    h3, conv2 = conv2d(h2, w2, v["b2"])
    same(h3.ravel(), v["h3"])
    computed, mask2 = m.relu(x + h3)
    same(m.relu_backward(dy, mask2), dsum)
    dh2, *_ = m.conv2d_backward(dsum, conv2)
    same(dh2.ravel(), v["dh2"])
    dh1 = m.relu_backward(dh2, mask1)
    same(dh1.ravel(), v["dh1"])
    same(v["dh1"] @ v["w1"].T, v["through"])
    same(dsum.ravel() + v["through"], v["dx"])


CHECKS = {
    "Linear layer": check_linear,
    "Softmax with cross-entropy": check_softmax,
    "Convolution": check_convolution,
    "Residual block": check_residual,
}


def test_every_example_is_checked():
    sections = re.split(r"^## ", DOCUMENT, flags=re.M)
    assert [s.split("\n")[0] for s in sections if "```" in s] == list(CHECKS)


@pytest.mark.parametrize("section", CHECKS)
def test_numbers_of_the_document(section):
    CHECKS[section](values_of(example_of(section)))


@pytest.mark.filterwarnings("ignore")  # a changed number can be a logarithm of 0
@pytest.mark.parametrize("section", CHECKS)
def test_any_other_number_would_be_found_out(section):
    tree = example_of(section)
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert len(constants) > 15
    for constant in constants:
        right = constant.value
        constant.value = right + 1 if isinstance(right, int) else right + 1e-4
        with pytest.raises((AssertionError, IndexError)):
            CHECKS[section](values_of(tree))
            raise RuntimeError(f"line {constant.lineno} of the example: {right} could be another")
        constant.value = right


def test_turned_kernel_with_several_channels():
    """dx is the convolution of dy with the kernel turned round and its channels swapped."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 7, 2, 3)), rng.standard_normal((3, 3, 3, 4))
    y, cache = conv2d(x, w, np.zeros(4))
    dy = rng.standard_normal(y.shape)
    dx, _, _ = m.conv2d_backward(dy, cache)
    turned = w[::-1, ::-1].swapaxes(2, 3)
    np.testing.assert_allclose(conv2d(dy, turned, np.zeros(3))[0], dx, rtol=0, atol=1e-9)


def sums_in_comments():
    """(what it says, its two sides) of each comment such as `# the first: 1·1 + 2·2 = 5`."""
    for comment in re.findall(r"# (.*)$", DOCUMENT, re.M):
        text = comment.split(":")[-1].replace("·", "*").replace("−", "-")
        if re.fullmatch(r"[-+*/(). \d]+=[-. \d]+", text):
            yield comment, [ast.parse(side.strip(), mode="eval") for side in text.split("=")]


def test_sums_in_comments():
    found = list(sums_in_comments())
    assert len(found) >= 8
    for comment, sides in found:
        calculated, written = (eval(compile(side, "a comment", "eval")) for side in sides)
        assert abs(calculated - written) < 1e-12, comment
