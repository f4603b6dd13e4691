"""Step 4, ResNet9 with average pooling: deep, and still trainable, because residual blocks let the
gradient through.

    python evolution/step4_residual_network.py --epochs-max 3 --learning-rate 1e-3

Nine layers with weights, all convolutions 3×3: two of them see as far as one of 5×5, with fewer
weights and one more relu. The deeper a plain network, the weaker and noisier the gradient that
reaches its first layers. A residual block computes x + f(x): its backward pass hands dy on as it is
and adds what comes through f. The network is the same stage twice (convolution, convolution,
residual block, then pooling), and a linear layer. It has its final shape here; max pooling and
dropout are still to come.
"""

import sys

from steps import flatten, flatten_backward, run_step

from mnist_resnet9 import (
    Network,
    avg_pool2d,
    avg_pool2d_backward,
    conv_block,
    conv_block_backward,
    init_params,
    linear,
    linear_backward,
    residual_block,
    residual_block_backward,
)

ADDS = "depth: eight 3×3 convolutions, four of them in two residual blocks"


def stage(p, x, i):
    """conv<i>, conv<i+1> and a residual block of the two convolutions after them: (H, W, N, C) →
    (H, W, N, K)."""
    h, first = conv_block(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"])
    h, second = conv_block(h, p[f"conv{i + 1}.weight"], p[f"conv{i + 1}.bias"])
    block = [p[f"conv{j}.{part}"] for j in (i + 2, i + 3) for part in ("weight", "bias")]
    h, residual = residual_block(h, *block)
    return h, (first, second, residual)


def stage_backward(dh, caches, d, i):
    """Puts the gradients of its eight parameters into d, and returns dx; None for the first
    stage."""
    first, second, residual = caches
    dh, *block = residual_block_backward(dh, residual)
    d |= zip([f"conv{j}.{part}" for j in (i + 2, i + 3) for part in ("weight", "bias")], block)
    dh, d[f"conv{i + 1}.weight"], d[f"conv{i + 1}.bias"] = conv_block_backward(dh, second)
    dh, d[f"conv{i}.weight"], d[f"conv{i}.bias"] = conv_block_backward(dh, first, need_dx=i > 1)
    return dh


def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), caches."""
    h, stage1 = stage(params, x, 1)  # (28, 28, N, 16)
    h, pool1 = avg_pool2d(h)  # (14, 14, N, 16)
    h, stage5 = stage(params, h, 5)  # (14, 14, N, 64)
    h, pool5 = avg_pool2d(h)  # (7, 7, N, 64)
    logits, fc9 = linear(flatten(h), params["fc9.weight"], params["fc9.bias"])  # (N, 10)
    return logits, (stage1, pool1, stage5, pool5, h.shape, fc9)


def backward(dlogits, caches, settings):
    d = {}
    stage1, pool1, stage5, pool5, shape, fc9 = caches
    dfeatures, d["fc9.weight"], d["fc9.bias"] = linear_backward(dlogits, fc9)
    dh = avg_pool2d_backward(flatten_backward(dfeatures, shape), pool5)  # (14, 14, N, 64)
    dh = stage_backward(dh, stage5, d, 5)  # (14, 14, N, 16)
    dh = avg_pool2d_backward(dh, pool1)  # (28, 28, N, 16)
    stage_backward(dh, stage1, d, 1)
    return d


NETWORK = Network(init_params, forward, backward)

if __name__ == "__main__":
    sys.exit(run_step(4, ADDS, NETWORK, pool="avg"))
