"""Step 1, softmax regression: every pixel votes for every digit, and the votes are added up.

    python evolution/step1_softmax_regression.py --epochs-max 3 --learning-rate 1e-3

The whole network is one matrix product, logits = x w + b. Column k of w is a picture of digit k,
and its logit says how much the image resembles that picture. Softmax makes probabilities of the
logits; the training loop does that together with the loss. The gradient says, for each pixel, how
much brighter or darker the pictures should be.
"""

import sys

import numpy as np
from steps import flatten, run_step, to_params

from mnist_resnet9 import Network, linear, linear_backward

ADDS = "one linear layer, 784 pixels to 10 logits, trained with softmax and cross-entropy"


def init_params(settings, dtype=np.float32):
    # Here, and only here, zeros are a good start: without a hidden layer no two weights do the same
    # work.
    return to_params({"fc1.weight": np.zeros((784, 10)), "fc1.bias": np.zeros(10)}, dtype)


def forward(params, x, settings, rng=None):
    """x (28, 28, N, 1) → logits (N, 10), cache."""
    return linear(flatten(x), params["fc1.weight"], params["fc1.bias"])


def backward(dlogits, cache, settings):
    _, dw, db = linear_backward(dlogits, cache)  # dx is not needed: images are not learnt
    return {"fc1.weight": dw, "fc1.bias": db}


NETWORK = Network(init_params, forward, backward)

if __name__ == "__main__":
    sys.exit(run_step(1, ADDS, NETWORK))
