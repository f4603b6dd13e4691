"""Step 3, a first convolutional network: the same small patterns are looked for everywhere.

    python evolution/step3_convolution.py --epochs-max 3 --learning-rate 1e-3

To step 2 a digit that moves by a pixel is another image: it has weights for each place. A
convolution has one set of 5×5 weights a pattern and slides it over the image. Pooling then halves
the picture, so that the next convolution sees twice as much of the image, and the exact place
matters less. It is LeNet's plan (LeCun et al. 1998): convolution and pooling twice, then a linear
layer, with a ninth of step 2's parameters.
"""

import sys

from steps import run_step

from mnist_resnet9 import Layer, avg_pool2d, avg_pool2d_backward, conv, flat, fully_connected

ADDS = "two 5×5 convolutions, each followed by average pooling, in place of the hidden layer"


def layers(settings, rng=None):
    return [
        conv("conv1", 1, 8, k=5, need_dx=False),  # (28, 28, N, 8)
        Layer("pool1", avg_pool2d, avg_pool2d_backward),  # (14, 14, N, 8)
        conv("conv2", 8, 16, k=5),  # (14, 14, N, 16)
        Layer("pool2", avg_pool2d, avg_pool2d_backward),  # (7, 7, N, 16)
        flat("features"),  # (N, 784)
        fully_connected("fc3", 784, 10),  # (N, 10), the logits
    ]


if __name__ == "__main__":
    sys.exit(run_step(3, ADDS, layers, pool="avg"))
