"""Step 5, ResNet9 with max pooling: what counts is that a pattern is there, not how much of the
window it fills.

    python evolution/step5_max_pooling.py --epochs-max 3 --learning-rate 1e-3

The mean of a window makes one strong response among three weak ones weak. The maximum keeps it. In
the backward pass the gradient then goes to the pixel that was the maximum and to no other, where
the mean gave each a quarter. All else is step 4, down to the initial weights; the next step,
dropout and weight decay, is mnist_resnet9.py itself:

    python mnist_resnet9.py --tag evolution_6 --epochs-max 3 --learning-rate 1e-3 \
        --weight-decay 0.05
"""

import sys

from step4_residual_network import stage, stage_backward
from steps import flatten, flatten_backward, run_step

from mnist_resnet9 import (
    Network,
    init_params,
    linear,
    linear_backward,
    max_pool2d,
    max_pool2d_backward,
)

ADDS = "max pooling in place of average pooling"


def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), caches."""
    h, stage1 = stage(params, x, 1)  # (28, 28, N, 16)
    h, pool1 = max_pool2d(h)  # (14, 14, N, 16)
    h, stage5 = stage(params, h, 5)  # (14, 14, N, 64)
    h, pool5 = max_pool2d(h)  # (7, 7, N, 64)
    logits, fc9 = linear(flatten(h), params["fc9.weight"], params["fc9.bias"])  # (N, 10)
    return logits, (stage1, pool1, stage5, pool5, h.shape, fc9)


def backward(dlogits, caches, settings):
    d = {}
    stage1, pool1, stage5, pool5, shape, fc9 = caches
    dfeatures, d["fc9.weight"], d["fc9.bias"] = linear_backward(dlogits, fc9)
    dh = max_pool2d_backward(flatten_backward(dfeatures, shape), pool5)  # (14, 14, N, 64)
    dh = stage_backward(dh, stage5, d, 5)  # (14, 14, N, 16)
    dh = max_pool2d_backward(dh, pool1)  # (28, 28, N, 16)
    stage_backward(dh, stage1, d, 1)
    return d


NETWORK = Network(init_params, forward, backward)

if __name__ == "__main__":
    sys.exit(run_step(5, ADDS, NETWORK, pool="max"))
