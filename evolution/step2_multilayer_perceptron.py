"""Step 2, a multilayer perceptron: a hidden layer, so that the network can find its own features.

    python evolution/step2_multilayer_perceptron.py --epochs-max 3 --learning-rate 1e-3

Step 1 can only compare an image with one picture a digit. Here 128 hidden units look for patterns
of their own, and the digits are told from those. Without relu between them two linear layers would
be one: x w1 w2 = x (w1 w2). With relu a unit is silent until its pattern is there, and the
composition can bend.
"""

import math
import sys

import numpy as np
from steps import flatten, run_step, to_params

from mnist_resnet9 import INIT, Network, linear, linear_backward, random_stream, relu, relu_backward

ADDS = "a hidden layer of 128 units with relu"
HIDDEN = 128


def init_params(settings, dtype=np.float32):
    """Random, so that the hidden units differ (equal ones would get equal gradients for ever); He's
    size for relu."""
    rng = random_stream(settings.seed, INIT)
    arrays = {
        "fc1.weight": rng.standard_normal((784, HIDDEN)) * math.sqrt(2 / 784),
        "fc1.bias": np.zeros(HIDDEN),
        "fc2.weight": rng.standard_normal((HIDDEN, 10))
        * 0.1
        * math.sqrt(2 / HIDDEN),  # small: first loss near ln 10
        "fc2.bias": np.zeros(10),
    }
    return to_params(arrays, dtype)


def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), caches."""
    h, fc1 = linear(flatten(x), params["fc1.weight"], params["fc1.bias"])  # (N, 128)
    h, act = relu(h)
    logits, fc2 = linear(h, params["fc2.weight"], params["fc2.bias"])  # (N, 10)
    return logits, (fc1, act, fc2)


def backward(dlogits, caches, settings):
    """Forward from bottom to top: what comes out of one line's backward pass goes into that of the
    line above."""
    fc1, act, fc2 = caches
    dh, dw2, db2 = linear_backward(dlogits, fc2)  # dh (N, 128)
    dh = relu_backward(dh, act)
    _, dw1, db1 = linear_backward(dh, fc1)
    return {"fc1.weight": dw1, "fc1.bias": db1, "fc2.weight": dw2, "fc2.bias": db2}


NETWORK = Network(init_params, forward, backward)

if __name__ == "__main__":
    sys.exit(run_step(2, ADDS, NETWORK))
