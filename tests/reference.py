"""The operations once more, as their definitions read: slow loops, no cleverness, nothing shared
with the program."""

import math

import numpy as np


def error(got, right, scale=None):
    """Distance of two arrays, relative to the size of the right one (or of scale)."""
    got, right = np.asarray(got), np.asarray(right)
    assert got.shape == right.shape, f"shape {got.shape}, not {right.shape}"
    size = np.linalg.norm(right if scale is None else scale)
    return np.linalg.norm(got.astype(float) - right) / (size or 1.0)


def central_differences(f, x, h):
    """The gradient of the number f() with respect to x: each element of x is moved up and down by
    h, in place."""
    dx = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        before = x[i]
        x[i] = before + h
        above = f()
        x[i] = before - h
        below = f()
        x[i] = before
        dx[i] = (above - below) / (2 * h)
    return dx


def relu(x):
    return np.array([max(v, 0.0) for v in x.ravel()]).reshape(x.shape)


def softmax(x):
    rows = [[math.exp(v - max(row)) for v in row] for row in x]
    return np.array([[v / math.fsum(row) for v in row] for row in rows])


def cross_entropy(probs, labels):
    return -math.fsum(math.log(row[label]) for row, label in zip(probs, labels)) / len(labels)


def linear(x, w, b):
    y = np.zeros((x.shape[0], w.shape[1]))
    for n, k in np.ndindex(y.shape):
        y[n, k] = b[k] + sum(x[n, f] * w[f, k] for f in range(x.shape[1]))
    return y


def conv2d(x, w, b):
    (H, W, N, C), (size, _, _, K) = x.shape, w.shape
    r = size // 2
    y = np.zeros((H, W, N, K))
    for row in range(H):
        for col in range(W):
            for n in range(N):
                for k in range(K):
                    y[row, col, n, k] = b[k]
                    for i in range(size):
                        for j in range(size):
                            if 0 <= row + i - r < H and 0 <= col + j - r < W:
                                pixel = x[row + i - r, col + j - r, n]
                                for c in range(C):
                                    y[row, col, n, k] += pixel[c] * w[i, j, c, k]
    return y


def pool2d(x, size, of_window):
    H, W, N, C = x.shape
    y = np.zeros((H // size, W // size, N, C))
    for row, col, n, c in np.ndindex(y.shape):
        y[row, col, n, c] = of_window(
            x[row * size : (row + 1) * size, col * size : (col + 1) * size, n, c]
        )
    return y


def max_pool2d_backward(dy, x, size):
    """The gradient goes to every position that equals its window's maximum."""
    dx = np.zeros(x.shape)
    for row, col, n, c in np.ndindex(dy.shape):
        window = (slice(row * size, (row + 1) * size), slice(col * size, (col + 1) * size), n, c)
        dx[window] = dy[row, col, n, c] * (x[window] == x[window].max())
    return dx


def bilinear(image, row, col):
    """The image between its pixels: the mean of the four around (row, col), weighted by nearness; 0
    outside."""
    total = 0.0
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(col), math.floor(col) + 1):
            if 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
                total += (1 - abs(row - r)) * (1 - abs(col - c)) * float(image[r, c])
    return total


def distort(image, turn, shear, wide, high, down, right):
    """Looks up every pixel where it came from: turned about the centre, sheared, scaled, shifted,
    in this order."""
    turned = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    sheared = np.array([[1.0, 0.0], [shear, 1.0]])
    scaled = np.diag([1 / high, 1 / wide])
    centre = (np.array(image.shape) - 1) / 2
    out = np.zeros(image.shape)
    for at in np.ndindex(image.shape):
        source = scaled @ sheared @ turned @ (np.array(at) - centre) + centre + (down, right)
        out[at] = bilinear(image, *source)
    return out


def logits(params, images, pool=np.max, mask=1.0):
    """The whole network: images (N, 28, 28), in the usual layout (N, H, W, C). mask multiplies the
    features."""

    def conv(x, i):
        w, b = params[f"conv{i}.weight"], params[f"conv{i}.bias"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        # windows: (N, H, W, C, 3, 3)
        return np.einsum("nhwcij,ijck->nhwk", windows, w, optimize=True) + b

    def halve(x):
        N, H, W, C = x.shape
        return pool(x.reshape(N, H // 2, 2, W // 2, 2, C), axis=(2, 4))

    def positive(x):
        return np.maximum(x, 0)

    x = (images[..., None] / 255.0 - 0.1307) / 0.3081
    x = positive(conv(positive(conv(x, 1)), 2))
    x = halve(positive(x + conv(positive(conv(x, 3)), 4)))
    x = positive(conv(positive(conv(x, 5)), 6))
    x = halve(positive(x + conv(positive(conv(x, 7)), 8)))
    return (x.reshape(len(x), -1) * mask) @ params["fc9.weight"] + params["fc9.bias"]
