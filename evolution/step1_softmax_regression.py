"""Step 1, softmax regression: every pixel votes for every digit, and the votes are added up.

    python evolution/step1_softmax_regression.py --epochs-max 3 --learning-rate 1e-3

The whole network is one matrix product, logits = x w + b. Column k of w is a picture of digit k,
and its logit says how much the image resembles that picture. Softmax makes probabilities of the
logits; cross_entropy_loss() does that together with the loss. The gradient says, for each pixel,
how much brighter or darker the pictures should be.
"""

import sys

import numpy as np
from steps import run_step

from mnist_resnet9 import flat, fully_connected

ADDS = "one linear layer, 784 pixels to 10 logits, trained with softmax and cross-entropy"


def layers(settings, rng=None):
    return [
        flat("pixels"),  # (N, 784)
        # _replace() of a named tuple gives a copy with another field.
        fully_connected("fc1", 784, 10)._replace(start=zeros),  # (N, 10), the logits
    ]


def zeros(rng):
    # Here, and only here, zeros are a good start: without a hidden layer no two weights do the same
    # work.
    return np.zeros((784, 10)), np.zeros(10)


if __name__ == "__main__":
    sys.exit(run_step(1, ADDS, layers))
