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

from steps import run_step

from mnist_resnet9 import (
    Layer,
    avg_pool2d,
    avg_pool2d_backward,
    conv,
    flat,
    fully_connected,
    residual,
)

ADDS = "depth: eight 3×3 convolutions, four of them in two residual blocks"


def layers(settings, rng=None):
    c1, c2, c3, c4 = settings.channels
    return [
        conv("conv1", 1, c1, need_dx=False),  # (28, 28, N, 4)
        conv("conv2", c1, c2),  # (28, 28, N, 16)
        residual("conv3", "conv4", c2),
        Layer("pool4", avg_pool2d, avg_pool2d_backward),  # (14, 14, N, 16)
        conv("conv5", c2, c3),  # (14, 14, N, 32)
        conv("conv6", c3, c4),  # (14, 14, N, 64)
        residual("conv7", "conv8", c4),
        Layer("pool8", avg_pool2d, avg_pool2d_backward),  # (7, 7, N, 64)
        flat("features"),  # (N, 3136)
        fully_connected("fc9", 49 * c4, 10),  # (N, 10), the logits
    ]


if __name__ == "__main__":
    sys.exit(run_step(4, ADDS, layers, pool="avg"))
