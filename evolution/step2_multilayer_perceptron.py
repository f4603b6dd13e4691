"""Step 2, a multilayer perceptron: a hidden layer, so that the network can find its own features.

    python evolution/step2_multilayer_perceptron.py --epochs-max 3 --learning-rate 1e-3

Step 1 can only compare an image with one picture a digit. Here 128 hidden units look for patterns
of their own, and the digits are told from those. Without relu between them two linear layers would
be one: x w1 w2 = x (w1 w2). With relu a unit is silent until its pattern is there, and the
composition can bend.
"""

import sys

from steps import run_step

from mnist_resnet9 import Layer, flat, fully_connected, relu, relu_backward

ADDS = "a hidden layer of 128 units with relu"
HIDDEN = 128


def layers(settings, rng=None):
    return [
        flat("pixels"),  # (N, 784)
        # Random weights, so that the hidden units differ: equal ones would get equal gradients for
        # ever. He's size for relu.
        fully_connected("fc1", 784, HIDDEN, scale=1),  # (N, 128)
        Layer("relu1", relu, relu_backward),
        fully_connected("fc2", HIDDEN, 10),  # (N, 10), the logits
    ]


if __name__ == "__main__":
    sys.exit(run_step(2, ADDS, layers))
