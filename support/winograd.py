"""A 3×3 convolution with a fifth of the multiplications, after Winograd. Nothing here learns.

mnist_resnet9.conv2d() shows what a convolution is; what stands here computes the same, faster, on a
CPU. A reader who skips this file misses nothing but speed: with MIN_CHANNELS set to 10**9 every
convolution takes the plain way, and so does every kernel that prepare() has not seen.

**In one dimension.** A kernel of three weights slides along a row. Seven neighbouring outputs take
7·3 = 21 multiplications directly. This way takes 9:

    transform the 9 pixels that the seven outputs depend on   9 values    x → B x
    transform the 3 weights                                   9 values    g → G g
    multiply elementwise                                      9 products  B x ⊙ G g
    transform the products into the 7 outputs                 7 values    y = A (B x ⊙ G g)

A, B and G are small matrices of constants. The transforms are not free, but they are shared: one
pixel's transform serves all output channels, one kernel's all images, and the sum over the input
channels is taken before the last transform. In two dimensions the same is done along the rows and
then along the columns, so 9·9 = 81 multiplications take the place of 49·9 = 441.

**Why it works.** Multiplying polynomials: take g(t) of degree 2 and d(t) of degree 6. Their product
has degree 8, so its values at 9 points determine it. So evaluate both at the points, multiply the
values, and interpolate. Evaluating a polynomial at fixed points is a matrix times its coefficients
(G for g, Aᵀ for d); interpolating is a matrix too, Bᵀ:

    coefficients of g·d = Bᵀ (G g ⊙ Aᵀ d)

For a fixed g that is a matrix times d: the coefficients of g·d are sums Σ g[i] d[j − i], and the
matrix has g shifted by one in each column. Its transpose computes Σ g[i] x[j + i]: it slides g
along x, and that is our convolution. Transposing the right-hand side gives y = A (G g ⊙ B x).
(Lavin and Gray 2016, arXiv:1509.09308; the matrices are Cook and Toom's.)

**In this file.** A row is cut into tiles of 7 outputs; each needs 9 pixels, so neighbouring tiles
share 2. An image is transformed from both sides, as every matrix is that has rows and columns:
B x Bᵀ, G w Gᵀ and A (…) Aᵀ. The values of all tiles at one pair of points then stand together, so
that the multiplications are 81 large matrix products. All of this is linear in x and in w, so the
backward pass is the same with the matrices transposed.

Letters, as in mnist_resnet9.py: H W rows and columns, N images, C channels in, K channels out; T
and S are the numbers of tiles down and across.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

# Pairs ±p, some smaller and some larger than 1. Large or uneven points lose digits: these have a
# third of the rounding errors of 0, ±1, ±2, ±1/2 …
POINTS = (1, -1, 1 / 4, -1 / 4, 2 / 3, -2 / 3, 2, -2)
VALUES = len(POINTS) + 1  # 9 values a tile, from 9 pixels; the ninth point is infinity
OUTPUTS = VALUES - 2  # 7 outputs a tile: 28 and 14, the sizes of our images, are multiples of it

MIN_CHANNELS = 4  # with fewer, the transforms cost more than the multiplications that they save


def pays(w):
    """Whether this is the faster way for an array w, if it is a kernel.

    On a GPU, where w is not a NumPy array, it is not."""
    is_array = isinstance(w, np.ndarray) and w.ndim == 4
    return is_array and w.shape[:2] == (3, 3) and w.shape[2] >= MIN_CHANNELS


def is_faster(w):
    """Whether this is the way to take for w: a Kernel, or one that was computed from a Kernel.

    Whoever has not called prepare() gets the script's own lines."""
    return isinstance(w, Kernel) and pays(w)


# ── Matrices ──────────────────────────────────────────────────────────────────────────────────────


class Matrices(NamedTuple):
    """The matrices of one tile, in float64."""

    A: Any  # (OUTPUTS, VALUES)
    B: Any  # (VALUES, VALUES)
    G: Any  # (VALUES, 3)


def matrices():
    points = np.array(POINTS)
    A = np.zeros((OUTPUTS, VALUES))
    B = np.zeros((VALUES, VALUES))
    G = np.zeros((VALUES, 3))
    for j, p in enumerate(points):
        others = np.delete(points, j)
        A[:, j] = p ** np.arange(OUTPUTS)  # 1, p, p², …: the polynomial's value at p
        B[j, : VALUES - 1] = np.poly(others)[::-1]  # the polynomial that is 0 at all other points
        G[j] = p ** np.arange(3) / np.prod(p - others)  # its value at p is divided out here, once
    A[OUTPUTS - 1, VALUES - 1] = 1  # the value at infinity is the highest coefficient
    G[VALUES - 1, 2] = 1
    B[VALUES - 1] = np.poly(points)[::-1]
    return Matrices(A, B, G)


@functools.lru_cache(maxsize=None)
def kernel_matrix(dtype):
    """G, (VALUES, 3), for weights of this dtype."""
    return matrices().G.astype(dtype)


class Tile(NamedTuple):
    pixels: slice  # which pixels of the row it reads or makes
    matrix: Any  # B or A, or one of them transposed


class Tiles(NamedTuple):
    """The tiles of a row of L pixels, for the forward pass and, transposed, for the backward."""

    reads: list  # B of each tile, (VALUES, pixels)
    makes: list  # A of each tile, (pixels, VALUES)
    reads_back: list  # Bᵀ
    makes_back: list  # Aᵀ


def transposed(tiles):
    return [Tile(tile.pixels, tile.matrix.T) for tile in tiles]


@functools.lru_cache(maxsize=None)
def tiles_of(L, dtype):
    """The Tiles of a row of L pixels."""
    A, B, _ = matrices()
    reads, makes = [], []
    for start in range(0, L, OUTPUTS):
        end = min(start + OUTPUTS, L)
        first, stop = max(start - 1, 0), min(start + OUTPUTS + 1, L)  # beyond the border are zeros
        columns = B[:, first - start + 1 : stop - start + 1]  # what would multiply them is left out
        reads.append(Tile(slice(first, stop), np.asarray(columns, dtype)))
        makes.append(Tile(slice(start, end), np.asarray(A[: end - start], dtype)))
    return Tiles(reads, makes, transposed(reads), transposed(makes))


# ── Transforms ────────────────────────────────────────────────────────────────────────────────────


def spaced(*shape, dtype):
    """An empty array whose last axis has a gap of 64 bytes after it.

    Lengths are often powers of two, and addresses a multiple of 4,096 bytes apart compete for the
    same few places in the processor's cache: without the gaps, a matrix product over such rows
    takes up to half as long again."""
    *outer, last = shape
    return np.empty((*outer, last + 64 // dtype.itemsize), dtype)[..., :last]


def to_points(rows, x, cols):
    """B x Bᵀ, tile by tile: (H, W, N, C) → (VALUES, VALUES, T·S·N, C)."""
    H, W, N, C = x.shape
    T, S = len(rows), len(cols)
    x = x.reshape(H, W, N * C)
    R = spaced(H, VALUES, S * N * C, dtype=x.dtype)
    by_tile = R.reshape(H, VALUES, S, N * C)  # a view
    for s, (pixels, B) in enumerate(cols):
        np.matmul(B, x[:, pixels], out=by_tile[:, :, s])  # along the rows
    R = R.swapaxes(0, 1)  # (VALUES, H, S·N·C)
    X = np.empty((VALUES, VALUES, T, S * N * C), x.dtype)
    for t, (pixels, B) in enumerate(rows):
        np.matmul(B, R[:, pixels], out=X[:, :, t])  # along the columns, all tiles across at once
    return X.reshape(VALUES, VALUES, T * S * N, C)


def from_points(rows, M, cols, N):
    """A M Aᵀ, tile by tile: (VALUES, VALUES, T·S·N, K) → (H, W, N, K)."""
    H, W, K = rows[-1].pixels.stop, cols[-1].pixels.stop, M.shape[-1]
    T, S = len(rows), len(cols)
    M = M.reshape(VALUES, VALUES, T, S * N * K)
    R = spaced(H, VALUES, S * N * K, dtype=M.dtype)
    join(rows, [M[:, :, t] for t in range(T)], R.swapaxes(0, 1))
    y = np.empty((H, W, N * K), M.dtype)
    by_tile = R.reshape(H, VALUES, S, N * K)
    join(cols, [by_tile[:, :, s] for s in range(S)], y)
    return y.reshape(H, W, N, K)


def join(tiles, xs, y):
    """Writes matrix @ x of each tile into its pixels of y.

    Where tiles overlap, their values add."""
    done = 0
    for (pixels, A), x in zip(tiles, xs):
        shared = y[..., pixels.start : done, :]  # with the tile before; often empty
        before = shared.copy() if shared.size else 0
        np.matmul(A, x, out=y[..., pixels, :])
        shared += before
        done = pixels.stop


def both_sides(G, a, out=None):
    """G a Gᵀ over the first two axes, which change places: (n, n, L) → (m, m, L).

    One after the other takes less than half of the multiplications of G and G as one matrix."""
    return np.matmul(G, (G @ a).swapaxes(0, 1), out=out)


# ── The convolution ───────────────────────────────────────────────────────────────────────────────


class Kernel(np.ndarray):
    """A kernel w (3, 3, C, K) that carries its transform along. It is an array all the same, so an
    edited operation that knows nothing of transforms can compute with it.

    U = G w Gᵀ is (VALUES, VALUES, C, K); UT, for the backward pass, is (VALUES, VALUES, K, C).
    A kernel without UT is for the forward pass alone: conv2d() then keeps nothing."""

    U = UT = None


def transform(w, to_learn=True):
    """w as a Kernel; with UT, if it is to learn."""
    kernel = w.view(Kernel)
    kernel.U = kernel_to_points(w)
    kernel.UT = kernel_to_points(w.swapaxes(2, 3)) if to_learn else None
    return kernel


def kernel_to_points(w):
    """G w Gᵀ: (3, 3, C, K) → (VALUES, VALUES, C, K)."""
    _, _, C, K = w.shape
    U = spaced(VALUES, VALUES, C * K, dtype=w.dtype)
    both_sides(kernel_matrix(w.dtype), w.reshape(3, 3, C * K), out=U)
    return U.reshape(VALUES, VALUES, C, K)


def prepare(params, to_learn=True):
    """params, with every kernel transformed for which that pays.

    This is done once for a batch, not once for each of its shards. Without to_learn they are good
    for the forward pass alone. It keeps nothing then, and so needs less of the processor's cache,
    which makes it faster."""
    prepared = {}
    for name, p in params.items():
        prepared[name] = transform(p, to_learn) if pays(p) else p
    return prepared


class Cache(NamedTuple):
    """What the backward pass needs: the two factors that were multiplied, as everywhere."""

    X: Any  # the transformed images
    w: Kernel
    shape: tuple  # of x


def conv2d(x, w, b):
    """The same y as mnist_resnet9.conv2d(): (H, W, N, C) → (H, W, N, K), and the Cache or None."""
    H, W, N, C = x.shape
    rows, cols = tiles_of(H, x.dtype), tiles_of(W, x.dtype)
    if not isinstance(w, Kernel) or w.U is None:
        w = transform(w)
    X = to_points(rows.reads, x, cols.reads)  # (VALUES, VALUES, T·S·N, C)
    M = X @ w.U  # at each pair of points, a sum over the channels: (VALUES, VALUES, T·S·N, K)
    # All powers of 1 are 1: the value at the points (1, 1) enters every output as it is.
    M[0, 0] += b
    cache = Cache(X, w, x.shape) if w.UT is not None else None
    return from_points(rows.makes, M, cols.makes, N), cache


def conv2d_backward(dy, cache, need_dx=True):
    """From y = A M Aᵀ, M = X @ U, X = B x Bᵀ, U = G w Gᵀ: dx, dw and db.

    These are the same products in reverse, each factor transposed."""
    X, w, (H, W, N, C) = cache
    rows, cols = tiles_of(H, dy.dtype), tiles_of(W, dy.dtype)
    dM = to_points(rows.makes_back, dy, cols.makes_back)
    db = dM[0, 0].sum(axis=0)
    dU = X.swapaxes(2, 3) @ dM  # (VALUES, VALUES, C, K)
    dw = both_sides(kernel_matrix(dy.dtype).T, dU.reshape(VALUES, VALUES, -1)).reshape(w.shape)
    if not need_dx:
        return None, dw, db
    dX = dM @ w.UT  # (VALUES, VALUES, T·S·N, C)
    return from_points(rows.reads_back, dX, cols.reads_back, N), dw, db
