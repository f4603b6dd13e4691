"""Step 3, a first convolutional network: the same small patterns are looked for everywhere.

    python evolution/step3_convolution.py --epochs-max 3 --learning-rate 1e-3

To step 2 a digit that moves by a pixel is another image: it has weights for each place. A
convolution has one set of 5×5 weights a pattern and slides it over the image. Pooling then halves
the picture, so that the next convolution sees twice as much of the image, and the exact place
matters less. It is LeNet's plan (LeCun et al. 1998): convolution and pooling twice, then a linear
layer, with a ninth of step 2's parameters.
"""

import math
import sys

import numpy as np
from steps import flatten, flatten_backward, run_step, to_params

from mnist_resnet9 import (
    INIT,
    Network,
    avg_pool2d,
    avg_pool2d_backward,
    conv_block,
    conv_block_backward,
    linear,
    linear_backward,
    random_stream,
)

ADDS = "two 5×5 convolutions, each followed by average pooling, in place of the hidden layer"


def init_params(settings, dtype=np.float32):
    rng = random_stream(settings.seed, INIT)
    arrays = {
        "conv1.weight": rng.standard_normal((5, 5, 1, 8)) * math.sqrt(2 / 25),
        "conv1.bias": np.full(8, 0.01),
        "conv2.weight": rng.standard_normal((5, 5, 8, 16)) * math.sqrt(2 / (25 * 8)),
        "conv2.bias": np.full(16, 0.01),
        "fc3.weight": rng.standard_normal((784, 10)) * 0.1 * math.sqrt(2 / 784),
        "fc3.bias": np.zeros(10),
    }
    return to_params(arrays, dtype)


def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), caches."""
    h, conv1 = conv_block(x, params["conv1.weight"], params["conv1.bias"])  # (28, 28, N, 8)
    h, pool1 = avg_pool2d(h)  # (14, 14, N, 8)
    h, conv2 = conv_block(h, params["conv2.weight"], params["conv2.bias"])  # (14, 14, N, 16)
    h, pool2 = avg_pool2d(h)  # (7, 7, N, 16)
    logits, fc3 = linear(flatten(h), params["fc3.weight"], params["fc3.bias"])  # (N, 10)
    return logits, (conv1, pool1, conv2, pool2, h.shape, fc3)


def backward(dlogits, caches, settings):
    d = {}
    conv1, pool1, conv2, pool2, shape, fc3 = caches
    dfeatures, d["fc3.weight"], d["fc3.bias"] = linear_backward(dlogits, fc3)
    dh = avg_pool2d_backward(flatten_backward(dfeatures, shape), pool2)  # (14, 14, N, 16)
    dh, d["conv2.weight"], d["conv2.bias"] = conv_block_backward(dh, conv2)
    dh = avg_pool2d_backward(dh, pool1)  # (28, 28, N, 8)
    _, d["conv1.weight"], d["conv1.bias"] = conv_block_backward(dh, conv1, need_dx=False)
    return d


NETWORK = Network(init_params, forward, backward)

if __name__ == "__main__":
    sys.exit(run_step(3, ADDS, NETWORK, pool="avg"))
