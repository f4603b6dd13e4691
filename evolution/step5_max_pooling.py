"""Step 5, ResNet9 with max pooling: what counts is that a pattern is there, not how much of the
window it fills.

    python evolution/step5_max_pooling.py --epochs-max 3 --learning-rate 1e-3

The mean of a window makes one strong response among three weak ones weak. The maximum keeps it. In
the backward pass the gradient then goes to the pixel that was the maximum (or to each of several,
if they are equal) and to no other, where the mean gave each a quarter. All else is step 4, down to
the initial weights; the next step, dropout and weight decay, is mnist_resnet9.py itself:

    python mnist_resnet9.py --tag evolution_6 --epochs-max 3 --learning-rate 1e-3 \
        --weight-decay 0.05
"""

import sys

from steps import run_step

from mnist_resnet9 import (
    Layer,
    conv,
    flat,
    fully_connected,
    max_pool2d,
    max_pool2d_backward,
    residual,
)

ADDS = "max pooling in place of average pooling"


def layers(settings, rng=None):
    c1, c2, c3, c4 = settings.channels
    return [
        conv("conv1", 1, c1, need_dx=False),  # (28, 28, N, 4)
        conv("conv2", c1, c2),  # (28, 28, N, 16)
        residual("conv3", "conv4", c2),
        Layer("pool4", max_pool2d, max_pool2d_backward),  # (14, 14, N, 16)
        conv("conv5", c2, c3),  # (14, 14, N, 32)
        conv("conv6", c3, c4),  # (14, 14, N, 64)
        residual("conv7", "conv8", c4),
        Layer("pool8", max_pool2d, max_pool2d_backward),  # (7, 7, N, 64)
        flat("features"),  # (N, 3136)
        fully_connected("fc9", 49 * c4, 10),  # (N, 10), the logits
    ]


if __name__ == "__main__":
    sys.exit(run_step(5, ADDS, layers, pool="max"))
