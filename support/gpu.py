"""The fast path on a GPU: a whole training step as one CUDA graph of the kernels in gpu.cu.

A step of this network is some forty short computations. Asked for one by one from Python they take
longer to ask for than to compute. A CUDA graph is a recording of them: it is asked for once, and
runs without Python. What differs from step to step (which images, which random numbers, which
learning rate) lies in tables on the device, written at the start of each epoch; a counter there
says which row is next.

Nothing here is needed to understand how the network learns: the plain operations of
mnist_resnet9.py compute the same on a GPU. Of this file they use the random numbers alone (Stream).
"""

import itertools
import re
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import UserError

SOURCE = Path(__file__).with_name("gpu.cu")
BLOCKS = 264  # that a GPU is given at least to be busy: two for each of 132 multiprocessors
PREDICT_IMAGES = 1000  # at once
PLAN_LENGTH = 5  # numbers of a step in the table: see gpu.cu
BIAS, WEIGHT, MUON_WEIGHT = 0, 1, 2
NULL = np.int64(0)  # as a kernel's argument: no array


def round_up(n, to):
    return -(-n // to) * to


def row_of_4x8(n):
    """Floats of a row in shared memory that is read 4 rows by 8 columns: see gpu.cu."""
    return n // 16 * 16 + 8 if n % 16 <= 8 else round_up(n, 16) + 8


def row_of_8x4(n):
    return round_up(n, 8) + 4


# ── Which tile each convolution computes ──────────────────────────────────────────────────────────
# The sizes of the tiles are compiled into the kernels. Best is a tile so large that both factors
# are used often once they are in shared memory, and so small that every multiprocessor has one.


def channels_of_slice(C, slices):
    """Channels of each of several slices of a tap: see gpu.cu."""
    return C if slices == 1 else round_up(-(-C // slices), 8)


def columns_of(channels):
    """Columns of a tile for so many channels."""
    padded = round_up(channels, 8)
    return max(c for c in range(8, 72, 8) if padded % c == 0)


class Convolution:
    """A compiled `convolution`: its name, threads, shared memory and tiles."""

    def __init__(self, side, C, K, back, limit):
        taps = 1 if C >= 32 else 3 if C >= 8 else 9
        columns = columns_of(K)
        self.side, self.K = side, K
        warps_n = 4 if columns == 64 else 2 if columns % 16 == 0 and side == 14 else 1
        # Best are many rows; on a card with little shared memory better shallow than few.
        all_rows = (128, 64, 32) if side == 28 else (32, 16)
        for rows, slices in itertools.product(all_rows, (1, 2, 4) if taps == 1 else (1,)):
            warps_m = min(4 // warps_n, rows // 16)
            tiles_m = rows // 16 // warps_m
            depth = round_up(taps * channels_of_slice(C, slices), 8)
            kernel = columns * row_of_8x4(depth) if back else depth * row_of_4x8(columns)
            self.shared = 4 * (2 if taps < 9 else 1) * (rows * row_of_8x4(depth) + kernel)
            if self.shared <= limit:
                break
        sizes = (
            side,
            side,
            C,
            K,
            str(back).lower(),
            slices,
            warps_m,
            warps_n,
            tiles_m,
            columns // warps_n // 8,
        )
        self.name = f"convolution<{', '.join(map(str, sizes))}>"
        self.threads, self.rows, self.columns = 32 * warps_m * warps_n, rows, columns
        self.slices = slices

    def grid(self, N):
        return -(-self.side * self.side * N // self.rows), -(-self.K // self.columns)


class KernelGradient:
    """A compiled `kernel_gradient`."""

    def __init__(self, side, C, K, limit):
        taps = 9 if C <= 16 else 3 if C <= 48 else 1
        columns = columns_of(K)
        warps_n = 2 if columns >= 48 and columns % 16 == 0 else 1
        tiles = -(-taps * C // 16)
        warps_m = next(w for w in (3, 2, 1) if tiles % w == 0 and tiles > 3 or w == 1)
        self.side, self.size = side, 9 * C * K + K
        for self.groups, rows in ((4, 128), (2, 64), (2, 32), (1, 32), (1, 16)):
            warps = warps_m * warps_n * self.groups
            pitch = row_of_4x8(tiles * 16) + row_of_4x8(columns)
            self.shared = 4 * 2 * rows * pitch
            if warps <= 8 and self.shared <= min(limit, 100_000):
                break
        sizes = (
            side,
            side,
            C,
            K,
            taps,
            warps_m,
            warps_n,
            self.groups,
            tiles // warps_m,
            columns // warps_n // 8,
            rows,
        )
        self.name = f"kernel_gradient<{', '.join(map(str, sizes))}>"
        self.threads, self.rows = 32 * warps, rows
        self.tiles = 9 // taps * -(-K // columns)

    def split(self, N):
        """The rows of N images over blocks: rows a block, blocks."""
        rows = self.side * self.side * N
        a_block = round_up(-(-rows // max(1, BLOCKS // self.tiles)), self.rows)
        return a_block, -(-rows // a_block)


def add_parts(count):
    """Columns of a block that adds so many parts, and the kernel's name."""
    columns = 8 if count > 64 else 32
    return columns, f"add_parts<{columns}>"


def muon_threads(K):
    """A warp for each tile of a (K, K) matrix, the tiles so wide that 32 warps are enough."""
    rows, parts = round_up(K, 16) // 16, round_up(K, 16) // 8
    width = next(n for n in range(1, parts + 1) if parts % n == 0 and rows * parts // n <= 32)
    return rows * parts // width * 32


# ── The network ───────────────────────────────────────────────────────────────────────────────────


class Layer:
    """Convolution number i: from C channels to K, images of side × side pixels."""

    def __init__(self, i, side, C, K, limit):
        self.i, self.side, self.C, self.K = i, side, C, K
        self.forward = Convolution(side, C, K, False, limit)
        self.gradient = KernelGradient(side, C, K, limit)
        self.back = Convolution(side, K, C, True, limit) if i > 1 else None
        self.muon_floats = 3 * round_up(K, 16) * row_of_4x8(round_up(K, 16))
        self.muon_in_shared = 4 * self.muon_floats <= limit  # else in global memory


def layers_of(channels, limit):
    c1, c2, c3, c4 = channels
    shapes = [
        (28, 1, c1),
        (28, c1, c2),
        (28, c2, c2),
        (28, c2, c2),
        (14, c2, c3),
        (14, c3, c4),
        (14, c4, c4),
        (14, c4, c4),
    ]
    return [Layer(i, *shape, limit) for i, shape in enumerate(shapes, start=1)]


def unsupported(settings, limit):
    """Why the kernels cannot compute this network on a GPU with so much shared memory, or None."""
    if any(c % 4 or c > 128 for c in settings.channels):
        return "channels should be multiples of 4, at most 128"
    if settings.batch_size > 2048:  # inverse() is exact up to there
        return "batch_size should be at most 2048"
    needed = []
    for layer in layers_of(settings.channels, limit):
        needed += [layer.forward.shared, layer.gradient.shared]
        if layer.back:
            needed.append(layer.back.shared)
    return f"{max(needed):,} bytes of shared memory are needed" if max(needed) > limit else None


# ── Recording ─────────────────────────────────────────────────────────────────────────────────────

NUMBERS = {"int": np.int32, "unsigned": np.uint32, "float": np.float32, "word": np.uint64}


@lru_cache(maxsize=1)
def signatures():
    """Each kernel of gpu.cu and its parameters: {kernel: [(type, name), …]}."""
    source = re.sub(r"//.*", "", SOURCE.read_text(encoding="utf-8"))
    found = {}
    for text in source.split("__global__ void")[1:]:
        head, _, parameters = text[: text.index("{")].rpartition("(")
        kernel = re.search(r"\w+$", head)[0]
        parameters = parameters.rpartition(")")[0].split(",")
        found[kernel] = [tuple(parameter.strip().rsplit(maxsplit=1)) for parameter in parameters]
    return found


def refuse_others(kernel, given, known):
    """An argument with another name would be lost, and the kernel's own a null pointer."""
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"{kernel} takes {', '.join(unknown)}")


class Program:
    """Kernels in the order in which they are launched, on a main branch (0) and some beside it.

    A kernel beside the main branch waits for what the main branch has launched before it, and runs
    while that goes on; join() makes the main branch wait for all. `common` are arguments that many
    kernels take, by name.
    """

    def __init__(self, device, **common):
        known = {parameter for parameters in signatures().values() for _, parameter in parameters}
        refuse_others("no kernel", common, known)
        self.device, self.common = device, common
        self.entries, self.kept = [], []

    def launch(self, name, grid, threads, shared=0, branch=0, **given):
        """Adds a kernel. Arguments have the names that they have in gpu.cu; an array that is not
        given is null."""
        kernel = name.split("<")[0]
        parameters = signatures()[kernel]
        refuse_others(kernel, given, {parameter for _, parameter in parameters})
        given = self.common | given
        arguments = []
        for kind, parameter in parameters:
            if kind.endswith("*"):
                value = given.get(parameter)
                arguments.append(NULL if value is None else value)
            else:
                arguments.append(NUMBERS[kind](given[parameter]))
        grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)
        self.entries.append((branch, name, grid, (threads, 1, 1), tuple(arguments), shared))

    def join(self):
        self.entries.append(None)

    def empty(self, *shape, dtype=np.float32):
        """An array that lives as long as the program."""
        self.kept.append(self.device.xp.empty(shape, dtype))
        return self.kept[-1]


class Cuda:
    """Compiles and runs programs with CuPy."""

    def __init__(self):
        import cupy

        self.xp = cupy
        self.limit = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        self.modules = {}

    def module(self, names):
        if names not in self.modules:
            code = SOURCE.read_text(encoding="utf-8")
            self.modules[names] = self.xp.RawModule(
                code=code, options=("-std=c++17",), name_expressions=names
            )
        return self.modules[names]

    def launch(self, name, grid, threads, *arguments):
        """Runs one kernel now, by itself."""
        kernel = self.module(("fill_normal", "fill_uniform")).get_function(name)
        kernel((grid, 1, 1), (threads, 1, 1), arguments)

    def record(self, program):
        """A function that runs the program, as one CUDA graph."""
        xp = self.xp
        launches = [entry for entry in program.entries if entry]
        module = self.module(tuple(sorted({entry[1] for entry in launches})))
        kernels = {}
        for _, name, _, _, _, shared in launches:
            kernels[name] = module.get_function(name)
            if shared > 48 * 1024:  # more has to be asked for
                kernels[name].max_dynamic_shared_size_bytes = shared
        main = xp.cuda.Stream(non_blocking=True, priority=-5)  # what the others wait for goes first
        beside = {branch: xp.cuda.Stream(non_blocking=True) for branch, *_ in launches if branch}
        used = set()

        def wait(waiting, stream):
            event = xp.cuda.Event(disable_timing=True)
            event.record(stream)
            waiting.wait_event(event)

        main.begin_capture()
        for entry in program.entries:
            if entry is None:
                for branch in sorted(used):
                    wait(main, beside[branch])
                used.clear()
                continue
            branch, name, grid, block, arguments, shared = entry
            stream = beside[branch] if branch else main
            if branch:
                wait(stream, main)
                used.add(branch)
            with stream:
                kernels[name](grid, block, arguments, shared_mem=shared)
        program.graph = main.end_capture()
        # The graph does not keep the arrays that it writes to; the program does, and lives in here.
        return lambda: program.graph.launch(xp.cuda.get_current_stream())


# ── The network as a program ──────────────────────────────────────────────────────────────────────


def blocks_of(size):
    """Blocks of 256 threads, one for each of so many numbers."""
    return -(-size // 256)


def inverse(N):
    """2³²/N, rounded up: gpu.cu divides by multiplying with it. 0 stands for 2³², where N is 1."""
    return -(-(2**32) // N) if N > 1 else 0


class Network:
    """What training and predicting share: the layers, and forward up to the last pooling."""

    def __init__(self, device, settings):
        self.device, self.settings = device, settings
        self.layers = layers_of(settings.channels, device.limit)
        self.max = str(settings.pool == "max").lower()
        self.features = 49 * settings.channels[3]

    def forward(self, program, params, x, N):
        """Launches convolutions and the first pooling. Returns each layer's input and output."""
        inputs, outputs = {}, {}
        for layer in self.layers:
            i, tile = layer.i, layer.forward
            if i == 5:
                x = program.empty(14, 14, N, layer.C)
                program.launch(
                    f"pool<28, {self.max}>",
                    blocks_of(x.size),
                    256,
                    **dict(x=outputs[4], y=x, size=x.size, NC=N * layer.C),
                )
            inputs[i] = x
            outputs[i] = program.empty(layer.side, layer.side, N, layer.K)
            shortcut = inputs[i - 1] if i in (4, 8) else None
            w, b = params[f"conv{i}.weight"], params[f"conv{i}.bias"]
            program.launch(
                tile.name,
                tile.grid(N),
                tile.threads,
                tile.shared,
                **dict(x=x, w=w, b=b, add=shortcut, y=outputs[i], relu=True),
            )
            x = outputs[i]
        return inputs, outputs


class Predictor(Network):
    """Logits of images, N at a time, with given parameters."""

    def __init__(self, device, settings, params, N):
        super().__init__(device, settings)
        self.N = N
        program = Program(device, N=N, inverse=inverse(N), batch=0, smoothing=0)
        self.images = program.empty(N, 28, 28, dtype=np.uint8)
        self.logits = program.empty(N, 10)
        x = program.empty(28, 28, N)
        as_they_are = dict(strength=0, elastic=0, J=0)
        program.launch("read_images<false>", (N, 4), 256, images=self.images, x=x, **as_they_are)
        _, outputs = self.forward(program, params, x, N)
        w, b = params["fc9.weight"], params["fc9.bias"]
        name = f"head<{settings.channels[3]}, {self.max}>"
        program.launch(name, N, 256, x=outputs[8], w=w, b=b, logits=self.logits)
        self.run = device.record(program)

    def __call__(self, images):
        """images (any number, 28, 28) of bytes → logits (the same number, 10)."""
        xp, N = self.device.xp, self.N
        logits = xp.empty((len(images), 10), np.float32)
        for start in range(0, len(images), N):
            count = min(N, len(images) - start)
            self.images[:count] = images[start : start + count]
            self.run()
            logits[start : start + count] = self.logits[:count]
        return logits


class Trainer(Network):
    """Training steps, one CUDA graph each. Changes params, moments and ema in place.

    params and ema of the state: name → array, views of one vector (flat) in their order; ema may be
    None. moments: (1 or 2, parameters). images and labels: all that are trained on, in bytes.
    bumps: what augmentation bends with. beta1: what adam and muon keep of the mean gradient.
    """

    def __init__(self, device, settings, state, images, labels, bumps, beta1):
        super().__init__(device, settings)
        self.params, self.moments, self.ema = state.params, state.moments, state.ema
        self.flat = state.params.flat
        self.images, self.labels = images, labels
        self.bumps = device.xp.ascontiguousarray(bumps)
        self.beta1 = settings.momentum if settings.optimizer == "sgd" else beta1
        xp, steps = device.xp, -(-len(images) // settings.batch_size)
        self.order = xp.empty(len(images), np.int32)
        self.keys = xp.empty(steps, np.uint64)
        self.plan = xp.empty((steps, PLAN_LENGTH), np.float32)
        self.losses = xp.empty(steps, np.float32)
        self.gradient = xp.empty(self.flat.size, np.float32)
        self.next, self.now = xp.zeros(1, np.int32), xp.zeros(1, np.int32)  # step of the epoch
        kinds = [np.full(a.size, self.kind_of(name), np.uint8) for name, a in self.params.items()]
        self.kinds = xp.asarray(np.concatenate(kinds))
        self.programs = {}
        for N in {self.images_of(number) for number in (0, steps - 1)}:
            self.programs[N] = device.record(self.program(N))

    def kind_of(self, name):
        """How the update treats a parameter."""
        if not name.endswith("weight"):
            return BIAS
        between_hidden_layers = name.startswith("conv") and name != "conv1.weight"
        muon = self.settings.optimizer == "muon" and between_hidden_layers
        return MUON_WEIGHT if muon else WEIGHT

    def images_of(self, number):
        """How many images step `number` of an epoch has: the last batch may be smaller."""
        return min(self.settings.batch_size, len(self.images) - number * self.settings.batch_size)

    def begin_epoch(self, order, keys, plan, done=0):
        """order: the images' numbers. keys: one for each step's random numbers. plan (steps, 5):
        what changes from step to step, computed by the script in float64: the learning rate, what
        decay leaves of a weight, adam's rate and correction, and what ema takes of the new weights.
        done: steps of the epoch that are already taken."""
        xp = self.device.xp
        self.order[...] = xp.asarray(order.astype(np.int32))
        self.keys[...] = xp.asarray(np.asarray(keys, np.uint64))
        self.plan[...] = xp.asarray(np.asarray(plan, np.float32))
        self.next[...] = done

    def take(self, number):
        """Takes step `number` of the epoch, which must be the next one. Returns its loss."""
        self.programs[self.images_of(number)]()
        return self.losses[number]

    def program(self, N):
        """One step with N images, from the images to the update."""
        settings, params = self.settings, self.params
        program = Program(
            self.device,
            **dict(N=N, inverse=inverse(N), batch=settings.batch_size, plan=self.plan),
            **dict(order=self.order, keys=self.keys, next=self.next, now=self.now),
            # 1 − beta is computed here, in double: near 1 a float would lose most of its digits.
            **dict(beta1=self.beta1, fresh1=1 - self.beta1, fresh2=1 - settings.beta2),
            **dict(smoothing=settings.label_smoothing),
        )
        mask = self.dropout_mask(program, N) if settings.dropout else None
        x = program.empty(28, 28, N)
        augment = settings.augment > 0 or settings.elastic > 0
        program.launch(
            f"read_images<{str(augment).lower()}>",
            (N, 4),
            256,
            **dict(images=self.images, x=x, strength=settings.augment, elastic=settings.elastic),
            **dict(bumps=self.bumps, J=len(self.bumps)),
        )
        inputs, outputs = self.forward(program, params, x, N)
        program.join()

        dw, start = {}, 0  # of each layer, kernel and bias in one piece of the flat gradient
        for name, a in params.items():
            if name.endswith("weight"):
                size = a.size + params[name.replace("weight", "bias")].size
                dw[name] = self.gradient[start : start + size]
            start += a.size
        losses = program.empty(N)
        dx = self.head(program, outputs[8], mask, dw["fc9.weight"], losses, N)
        self.backward(program, inputs, outputs, dx, dw, N)
        program.join()
        program.launch(
            f"update<{('sgd', 'adam', 'muon').index(settings.optimizer)}>",
            blocks_of(self.flat.size),
            256,
            **dict(w=self.flat, dw=self.gradient, moments=self.moments),
            **dict(ema=None if self.ema is None else self.ema.flat),
            **dict(kinds=self.kinds, size=self.flat.size),
            **dict(image_losses=losses, losses=self.losses),
        )
        return program

    def dropout_mask(self, program, N):
        """Launches the drawing of dropout's mask, which needs nothing but the step's key."""
        settings, F = self.settings, self.features
        drawn = 0  # by augmentation, in whole words of four
        if settings.augment or settings.elastic:
            drawn = round_up(6 * N, 8)
        if settings.elastic:
            drawn += 2 * round_up(N * len(self.bumps), 8)
        mask, kept = program.empty(N, F), 1 / (1 - settings.dropout)
        size = dict(size=N * F, first=drawn)
        name, blocks = "dropout_mask", blocks_of(-(-N * F // 8))
        program.launch(
            name, blocks, 256, branch=1, mask=mask, rate=settings.dropout, kept=kept, **size
        )
        return mask

    def head(self, program, x, mask, dw, losses, N):
        """From the last activations to the loss, and back. Returns their gradient."""
        F, C, params = self.features, self.settings.channels[3], self.params
        features, logits = program.empty(N, F), program.empty(N, 10)
        dlogits, dx = program.empty(N, 10), program.empty(14, 14, N, C)
        w, b = params["fc9.weight"], params["fc9.bias"]
        program.launch(
            f"head<{C}, {self.max}>",
            N,
            256,
            **dict(x=x, mask=mask, w=w, b=b, features=features, logits=logits),
            **dict(labels=self.labels, losses=losses, dlogits=dlogits),
        )
        gradient = dict(features=features, dlogits=dlogits, dw=dw, F=F)
        program.launch("linear_gradient", -(-(F + 1) // 32), 256, branch=1, **gradient)
        name, blocks = f"head_gradient<{C}, {self.max}>", blocks_of(49 * N * C)
        program.launch(name, blocks, 256, x=x, mask=mask, w=w, dlogits=dlogits, dx=dx)
        return dx

    def backward(self, program, inputs, outputs, dx, dw, N):
        """From dx, the gradient of the last activations, to that of every kernel and bias."""
        slopes = {8: dx}  # the gradient of each layer's output, before its relu
        for layer in reversed(self.layers):
            i, tile = layer.i, layer.back
            change = self.learn(program, layer, inputs[i], slopes[i], dw, N)
            if tile is None:
                break
            dx = program.empty(layer.side, layer.side, N, layer.C)
            gate = None if i == 5 else inputs[i]  # what comes from pooling did not pass a relu
            shortcut = slopes[i + 1] if i in (3, 7) else None
            w = self.params[f"conv{i}.weight"]
            program.launch(
                tile.name,
                tile.grid(N),
                tile.threads,
                tile.shared,
                **dict(x=slopes[i], w=w, add=shortcut, gate=gate, y=dx, relu=False),
            )
            change()
            slopes[i - 1] = dx
            if i == 5:
                slopes[4] = program.empty(28, 28, N, layer.C)
                program.launch(
                    f"pool_gradient<28, {self.max}>",
                    blocks_of(dx.size),
                    256,
                    **dict(x=outputs[4], dy=dx, dx=slopes[4], size=dx.size, NC=N * layer.C),
                )

    def learn(self, program, layer, x, dy, dw, N):
        """The gradient of a layer's kernel and bias, beside the way back. Returns a function that
        launches what changes the kernel: the way back has to have read it by then."""
        tile, name, branch = layer.gradient, f"conv{layer.i}.weight", 2 + layer.i % 3
        a_block, blocks = tile.split(N)
        count = blocks * tile.groups
        parts = program.empty(count, tile.size)
        program.launch(
            tile.name,
            (blocks, tile.tiles),
            tile.threads,
            tile.shared,
            branch,
            **dict(x=x, dy=dy, parts=parts, rows_a_block=a_block),
        )
        columns, sums = add_parts(count)
        blocks, sizes = -(-tile.size // columns), dict(size=tile.size, count=count)
        program.launch(sums, blocks, 256, branch=branch, parts=parts, sum=dw[name], **sizes)
        if self.kind_of(name) == MUON_WEIGHT:
            return self.orthogonal_step(program, layer, dw[name], branch)
        return lambda: None

    def orthogonal_step(self, program, layer, dw, branch):
        """Muon's step with the gradient of a layer's kernel, but for its end: see learn."""
        name, R, K = f"conv{layer.i}.weight", 9 * layer.C, layer.K
        padded, strips = round_up(K, 16), -(-R // 32)
        X, parts = program.empty(32 * strips, padded), program.empty(strips, padded, padded)
        Q, scale = program.empty(padded, padded), program.empty(1)
        m, v = self.moment(0, name), self.moment(1, name)
        mean = f"muon_mean<{R}, {K}>"
        program.launch(mean, strips, 256, branch=branch, dw=dw, m=m, v=v, X=X, parts=parts)
        rounds, threads = f"muon_rounds<{K}, {str(layer.muon_in_shared).lower()}>", muon_threads(K)
        shared, room = 4 * layer.muon_floats, None
        if not layer.muon_in_shared:
            shared, room = 0, program.empty(layer.muon_floats)
        sizes = dict(count=strips, room=room, Q_out=Q, scale=scale)
        program.launch(rounds, 1, threads, shared, branch, parts=parts, **sizes)
        ema = None if self.ema is None else self.ema[name]

        def change():
            changed = dict(w=self.params[name], ema=ema, X=X, Q=Q, scale=scale)
            program.launch(f"muon_update<{R}, {K}>", -(-R // 64), 128, branch=branch, **changed)

        return change

    def moment(self, number, name):
        """The part of the moments that belongs to a parameter."""
        start = 0
        for other, a in self.params.items():
            if other == name:
                return self.moments[number][start : start + a.size]
            start += a.size
        raise KeyError(name)


class FastPath:
    """What a run needs of the two: begin_epoch and step, and predict with the mean weights."""

    def __init__(self, device, settings, state, images, labels, bumps, beta1):
        self.trainer = Trainer(device, settings, state, images, labels, bumps, beta1)
        self.begin_epoch = self.trainer.begin_epoch
        evaluated = state.params if state.ema is None else state.ema
        self.predict = Predictor(device, settings, evaluated, PREDICT_IMAGES)

    def step(self, state, number):
        """Takes step `number` of the epoch, which must be the next one. Returns its loss."""
        loss = self.trainer.take(number)
        state.step += 1
        return loss

    def fetch(self):
        """The kernels write to the state's own arrays, so there is nothing to fetch."""


def fast_path(settings, state, images, labels, bumps, beta1):
    """The fast path of a run of ResNet9 and "", or None and why it takes the plain operations."""
    device = cuda()
    reason = unsupported(settings, device.limit)
    if not reason:
        try:
            return FastPath(device, settings, state, images, labels, bumps, beta1), ""
        except Exception as error:
            # An old CUDA, or a compiler that is missing: the plain operations go on.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
    return None, f"plain operations: {reason}"


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────


class Stream:
    """Random numbers that are a function of the key, with the two methods of NumPy's generator that
    the script uses; each draw is one kernel. Uniform numbers are those of NumPy's Philox(key)."""

    def __init__(self, device, key):
        self.device, self.key, self.used = device, np.uint64(key), 0

    def draw(self, name, shape):
        out = self.device.xp.empty(shape, np.float32)
        self.device.launch(
            name, -(-out.size // 256), 256, out, np.int32(out.size), self.key, np.int32(self.used)
        )
        self.used += round_up(out.size, 8)  # each draw starts with a fresh word of four
        return out

    def random(self, shape, dtype=np.float32):
        return self.draw("fill_uniform", shape)

    def standard_normal(self, shape, dtype=np.float32):
        return self.draw("fill_normal", shape)


def cuda():
    """What compiles and runs on the current device."""
    import cupy

    return cuda_of(cupy.cuda.Device().id)


@lru_cache(maxsize=None)
def cuda_of(_):  # the limits and the compiled modules are those of one device
    return Cuda()


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def errors_in_a_line():
    """What CUDA reports while a run trains ends it in a line, as other errors do that the user can
    put right. A kernel's error shows wherever the device is next waited for, so this stands around
    the whole training."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith("cupy"):
            raise
        raise UserError(
            f"the GPU failed ({' '.join(str(error).split())[:200]}); "
            "the checkpoints are intact, and the same command continues from the last one"
        ) from error
