"""The training step and the evaluation of step_time.py in PyTorch, TensorFlow and JAX.

Each as one would write it there: the same network, images, Adam and dropout, float32 unless its
name says otherwise. step(o, name) imports what it needs; who lacks a library leaves its sides out.
"""

import importlib.util
import os

import mnist_resnet9 as m

# Sides of the comparison → the library that they need.
PEERS = {
    "torch": "torch",
    "torch channels_last": "torch",
    "torch.compile": "torch",
    "torch bfloat16": "torch",  # products of 8 bits: less precise, so no other side's equal
    "tensorflow": "tensorflow",
    "jax": "jax",
}


def installed():
    """The sides whose library is there."""
    return [side for side, library in PEERS.items() if importlib.util.find_spec(library)]


def step(o, side):
    """A function that takes one step, or evaluates one batch; o has batch, threads, channels."""
    if side == "tensorflow":
        return tensorflow_step(o)
    if side == "jax":
        return jax_step(o)
    return torch_step(o, side)


def batch_of(o):
    data = m.load_mnist()
    return data.train_images[: o.batch].copy(), data.train_labels[: o.batch].astype("int32")


def layers(channels):
    """(C, K) of the eight convolutions."""
    c1, c2, c3, c4 = channels
    return [(1, c1), (c1, c2), (c2, c2), (c2, c2), (c2, c3), (c3, c4), (c4, c4), (c4, c4)]


# ── PyTorch ───────────────────────────────────────────────────────────────────────────────────────


def plain_network(channels):
    """The network as one would write it with PyTorch."""
    import torch
    import torch.nn.functional as F

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.ModuleList(
                torch.nn.Conv2d(C, K, 3, padding=1) for C, K in layers(channels)
            )
            self.fc9 = torch.nn.Linear(49 * channels[-1], 10)

        def forward(self, x):
            conv1, conv2, conv3, conv4, conv5, conv6, conv7, conv8 = self.conv
            h = F.relu(conv2(F.relu(conv1(x))))
            h = F.relu(h + conv4(F.relu(conv3(h))))
            h = F.max_pool2d(h, 2)
            h = F.relu(conv6(F.relu(conv5(h))))
            h = F.relu(h + conv8(F.relu(conv7(h))))
            h = F.max_pool2d(h, 2)
            return self.fc9(F.dropout(h.flatten(1), 0.9, self.training))

    return Net()


def torch_step(o, side):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(o.threads)
    images, labels = map(torch.from_numpy, batch_of(o))
    labels = labels.long()
    last = side in ("torch channels_last", "torch bfloat16")
    memory_format = torch.channels_last if last else torch.contiguous_format
    net = plain_network(o.channels).to(memory_format=memory_format)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    model = torch.compile(net) if side == "torch.compile" else net
    precision = torch.autocast("cpu", torch.bfloat16, enabled=side == "torch bfloat16")

    def batch():
        x = ((images.float() / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[:, None]
        return x.contiguous(memory_format=memory_format)

    def train():
        optimizer.zero_grad()
        with precision:
            loss = F.cross_entropy(model(batch()), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def evaluate():
        net.eval()
        with torch.inference_mode(), precision:
            return model(batch())

    return evaluate if o.evaluate else train


# ── TensorFlow ────────────────────────────────────────────────────────────────────────────────────


def tensorflow_step(o):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the CPU is what is compared
    tf.config.threading.set_intra_op_parallelism_threads(o.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    images, labels = map(tf.constant, batch_of(o))
    start = tf.keras.initializers.HeNormal()
    weights = [tf.Variable(start((3, 3, C, K))) for C, K in layers(o.channels)]
    biases = [tf.Variable(tf.zeros(K)) for _, K in layers(o.channels)]
    w9 = tf.Variable(start((49 * o.channels[-1], 10)))
    b9 = tf.Variable(tf.zeros(10))
    variables = [*weights, *biases, w9, b9]
    optimizer = tf.keras.optimizers.Adam(1e-4)
    optimizer.build(variables)

    def logits(rate):
        def conv(x, i):
            return tf.nn.bias_add(tf.nn.conv2d(x, weights[i], 1, "SAME"), biases[i])

        x = ((tf.cast(images, tf.float32) / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[..., None]
        h = tf.nn.relu(conv(tf.nn.relu(conv(x, 0)), 1))
        h = tf.nn.relu(h + conv(tf.nn.relu(conv(h, 2)), 3))
        h = tf.nn.max_pool2d(h, 2, 2, "VALID")
        h = tf.nn.relu(conv(tf.nn.relu(conv(h, 4)), 5))
        h = tf.nn.relu(h + conv(tf.nn.relu(conv(h, 6)), 7))
        h = tf.reshape(tf.nn.max_pool2d(h, 2, 2, "VALID"), (o.batch, -1))
        return (tf.nn.dropout(h, rate) if rate else h) @ w9 + b9

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(0.9))
            loss = tf.reduce_mean(losses)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    evaluate = tf.function(lambda: logits(0))
    return (lambda: evaluate().numpy()) if o.evaluate else lambda: float(train())


# ── JAX ───────────────────────────────────────────────────────────────────────────────────────────


def jax_step(o):
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it sees cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: o.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    images, labels = map(jnp.asarray, batch_of(o))
    keys = iter(jax.random.split(jax.random.key(0), 10))
    params = [
        (jax.random.normal(next(keys), (3, 3, C, K)) * (2 / (9 * C)) ** 0.5, jnp.zeros(K))
        for C, K in layers(o.channels)
    ]
    F = 49 * o.channels[-1]
    params.append((jax.random.normal(next(keys), (F, 10)) * (2 / F) ** 0.5, jnp.zeros(10)))

    def logits(params, key=None):
        def conv(x, i):
            w, b = params[i]
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout) + b

        def pool(x):
            window = (1, 2, 2, 1)
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")

        x = ((images.astype(jnp.float32) / 255 - m.PIXEL_MEAN) / m.PIXEL_STD)[..., None]
        h = jax.nn.relu(conv(jax.nn.relu(conv(x, 0)), 1))
        h = jax.nn.relu(h + conv(jax.nn.relu(conv(h, 2)), 3))
        h = pool(h)
        h = jax.nn.relu(conv(jax.nn.relu(conv(h, 4)), 5))
        h = jax.nn.relu(h + conv(jax.nn.relu(conv(h, 6)), 7))
        h = pool(h).reshape(o.batch, -1)
        if key is not None:
            h = h * jax.random.bernoulli(key, 0.1, h.shape) * 10
        w, b = params[8]
        return h @ w + b

    def loss_of(params, key):
        log_probs = jax.nn.log_softmax(logits(params, key))
        return -log_probs[jnp.arange(o.batch), labels].mean()

    @jax.jit
    def train(params, means, squares, t):
        loss, gradients = jax.value_and_grad(loss_of)(params, jax.random.key(t))
        over = jax.tree.map
        means = over(lambda a, g: 0.9 * a + 0.1 * g, means, gradients)
        squares = over(lambda a, g: 0.999 * a + 0.001 * g * g, squares, gradients)
        rate = 1e-4 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        move = lambda w, a, s: w - rate * a / (jnp.sqrt(s) + 1e-8)  # noqa: E731
        return over(move, params, means, squares), means, squares, loss

    zeros = jax.tree.map(jnp.zeros_like, params)
    state = [params, zeros, zeros, 0]

    def take_step():
        params, means, squares, t = state
        params, means, squares, loss = train(params, means, squares, t + 1)
        state[:] = params, means, squares, t + 1
        return float(loss)

    forward = jax.jit(logits)
    return (lambda: forward(params).block_until_ready()) if o.evaluate else take_step
