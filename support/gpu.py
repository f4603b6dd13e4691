"""The fast path on a GPU: a whole training step as one CUDA graph of the kernels in gpu.cu.

A step of this network is some forty short computations. Asked for one by one from Python they take
longer to ask for than to compute. A CUDA graph is a recording of them: it is asked for once, and
runs without Python. What differs from step to step (which images, which random numbers, which
learning rate) lies in tables on the device, written at the start of each epoch; a counter there
says which row is next.

Nothing here is needed to understand how the network learns: the plain operations of
mnist_resnet9.py compute the same on a GPU. Of this file they use the random numbers (Stream), and
what is said when CUDA fails.
"""

import re
import threading
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import UserError, ceil_div

SOURCE = Path(__file__).with_name("gpu.cu")
PREDICT_IMAGES = 256  # at once
NUMBERS_OF_A_STEP = 5  # in the plan: see gpu.cu
OPTIMIZERS = ("sgd", "adam", "muon")  # numbered as in gpu.cu
POOLS = ("max", "avg")
BIAS, WEIGHT, MUON_WEIGHT = 0, 1, 2  # likewise
NULL = np.int64(0)  # as a kernel's argument: no array


def round_up(n, to):
    return ceil_div(n, to) * to


def row_of_4x8(n):
    """Floats of a row in shared memory that is read 4 rows by 8 columns: see gpu.cu."""
    return n // 16 * 16 + 8 if n % 16 <= 8 else round_up(n, 16) + 8


def row_of_8x4(n):
    return round_up(n, 8) + 4


# ── What stands in gpu.cu ─────────────────────────────────────────────────────────────────────────


class Kernel(NamedTuple):
    template: list  # the names of its template's numbers
    parameters: list  # (type, name) of each


@lru_cache(maxsize=1)
def kernels():
    """{name: Kernel} of all kernels in gpu.cu."""
    source = re.sub(r"//.*", "", SOURCE.read_text(encoding="utf-8"))
    found, pieces = {}, source.split("__global__ void")
    for before, text in zip(pieces, pieces[1:]):
        template = re.search(r"template <([^>]*)>\s*$", before)
        numbers = re.findall(r"\w+ (\w+)", template[1]) if template else []
        head, _, parameters = text[: text.index("{")].rpartition("(")
        parameters = parameters.rpartition(")")[0].split(",")
        parameters = [tuple(parameter.strip().rsplit(maxsplit=1)) for parameter in parameters]
        found[re.search(r"\w+$", head)[0]] = Kernel(numbers, parameters)
    return found


def with_numbers(kernel, **numbers):
    """The kernel with these numbers compiled into it, by its name in C++: "pool<28, true>"."""
    template = kernels()[kernel].template
    if numbers.keys() != set(template):
        raise TypeError(f"{kernel} takes {', '.join(template)}, not {', '.join(numbers)}")
    values = [str(numbers[name]).lower() for name in template]
    return f"{kernel}<{', '.join(values)}>"


# ── Which tile each convolution computes ──────────────────────────────────────────────────────────
# The sizes of the tiles are compiled into the kernels. Best is a tile so large that both factors
# are used often once they are in shared memory, and so small that every multiprocessor has one.


def columns_of(channels):
    """Columns of a tile for this number of channels."""
    padded = round_up(channels, 8)
    return max(c for c in range(8, 72, 8) if padded % c == 0)


def tiles_of(side, C):
    """(rows, taps of the kernel, channels of each) that a tile can have, the best first.

    Narrow layers fill a tile better with several taps. Many rows are best; where shared memory is
    small, better a slice of the channels at a time than few rows."""
    all_rows = (128, 64, 32) if side == 28 else (32, 16)
    if C < 8:
        return [(rows, 9, C) for rows in all_rows]
    slices = (C, round_up(ceil_div(C, 2), 8), round_up(ceil_div(C, 4), 8))
    one_tap = [(rows, 1, channels) for rows in all_rows for channels in slices]
    return one_tap if C >= 32 else [(rows, 3, C) for rows in all_rows] + one_tap


class Convolution:
    """A compiled `convolution`: its name, threads, shared memory and tiles."""

    def __init__(self, side, C, K, back, limit):
        self.side, self.K, self.columns = side, K, columns_of(K)
        warps_n = 4 if self.columns == 64 else 2 if self.columns % 16 == 0 and side == 14 else 1
        for self.rows, taps, channels in tiles_of(side, C):
            depth = round_up(taps * channels, 8)
            kernel = self.columns * row_of_8x4(depth) if back else depth * row_of_4x8(self.columns)
            buffers = 1 if taps == 9 else 2
            self.shared = 4 * buffers * (self.rows * row_of_8x4(depth) + kernel)
            if self.shared <= limit:
                break
        self.slices = ceil_div(C, channels)
        warps_m = min(4 // warps_n, self.rows // 16)
        self.threads = 32 * warps_m * warps_n
        self.name = with_numbers(
            "convolution",
            SIDE=side,
            C=C,
            K=K,
            BACK=back,
            TAPS=taps,
            SLICE=channels,
            WARPS_M=warps_m,
            WARPS_N=warps_n,
            MT=self.rows // 16 // warps_m,
            NT=self.columns // 8 // warps_n,
        )

    def grid(self, N):
        return ceil_div(self.side * self.side * N, self.rows), ceil_div(self.K, self.columns)


class KernelGradient:
    """A compiled `kernel_gradient`."""

    def __init__(self, side, C, K, limit):
        taps = 9 if C <= 16 else 3 if C <= 48 else 1
        columns, tiles = columns_of(K), ceil_div(taps * C, 16)
        warps_n = 2 if columns >= 48 and columns % 16 == 0 else 1
        warps_m = next(w for w in (3, 2, 1) if tiles % w == 0 and tiles > 3 or w == 1)
        self.side, self.size = side, 9 * C * K + K
        for self.groups, self.rows in ((4, 128), (2, 64), (2, 32), (1, 32), (1, 16)):
            warps = warps_m * warps_n * self.groups
            pitch = row_of_4x8(tiles * 16) + row_of_4x8(columns)
            self.shared = 4 * 2 * self.rows * pitch
            if warps <= 8 and self.shared <= min(limit, 100_000):
                break
        self.threads, self.tiles = 32 * warps, 9 // taps * ceil_div(K, columns)
        self.name = with_numbers(
            "kernel_gradient",
            SIDE=side,
            C=C,
            K=K,
            TAPS=taps,
            WARPS_M=warps_m,
            WARPS_N=warps_n,
            WARPS_R=self.groups,
            MT=tiles // warps_m,
            NT=columns // 8 // warps_n,
            ROWS=self.rows,
        )

    def split(self, N, blocks):
        """The rows of N images over about this many blocks: rows a block, blocks."""
        rows = self.side * self.side * N
        a_block = round_up(ceil_div(rows, max(1, blocks // self.tiles)), self.rows)
        return a_block, ceil_div(rows, a_block)


class MuonRounds:
    """A compiled `muon_rounds`: a warp for each tile of a (K, K) matrix."""

    def __init__(self, K, limit):
        rows, parts = round_up(K, 16) // 16, round_up(K, 16) // 8
        # Tiles so wide that 32 warps are enough.
        width = next(n for n in range(1, parts + 1) if parts % n == 0 and rows * parts // n <= 32)
        floats = 3 * round_up(K, 16) * row_of_4x8(round_up(K, 16))
        self.in_shared = 4 * floats <= limit
        self.shared, self.room = (4 * floats, 0) if self.in_shared else (0, floats)
        self.threads = rows * parts // width * 32
        self.name = with_numbers("muon_rounds", K=K, NT=width, IN_SHARED=self.in_shared)


# ── The network ───────────────────────────────────────────────────────────────────────────────────


class Layer:
    """Convolution number i: from C channels to K channels, images of side × side pixels."""

    def __init__(self, i, side, C, K, limit):
        self.i, self.side, self.C, self.K = i, side, C, K
        self.forward = Convolution(side, C, K, False, limit)
        self.gradient = KernelGradient(side, C, K, limit)
        self.back = Convolution(side, K, C, True, limit) if i > 1 else None
        self.rounds = MuonRounds(K, limit)


def shapes_of(channels):
    """(side, C, K) of each convolution."""
    c1, c2, c3, c4 = channels
    return [
        (28, 1, c1),
        (28, c1, c2),
        (28, c2, c2),
        (28, c2, c2),
        (14, c2, c3),
        (14, c3, c4),
        (14, c4, c4),
        (14, c4, c4),
    ]


def layers_of(channels, limit):
    shapes = shapes_of(channels)
    return [Layer(i, *shape, limit) for i, shape in enumerate(shapes, start=1)]


def unsupported(settings):
    """Why the kernels cannot compute this network, or None.

    All else fits into the 48 KiB of shared memory that every card has: the smallest tiles do."""
    if settings.optimizer not in OPTIMIZERS:
        return f"the kernels do not know the optimizer {settings.optimizer}"
    if settings.pool not in POOLS:
        return f"the kernels do not know the pool {settings.pool}"
    if any(c % 4 or c > 128 for c in settings.channels):
        return "channels should be multiples of 4, at most 128"
    if settings.batch_size > 2048:  # inverse() is exact up to there
        return "batch_size should be at most 2048"
    return None


def other_arrays(settings, state):
    """Why the kernels cannot compute with these parameters and moments, or None.

    They know where each of them begins, and would read beyond the end of others."""
    shapes = {}
    for i, (_, C, K) in enumerate(shapes_of(settings.channels), start=1):
        shapes |= {f"conv{i}.weight": (3, 3, C, K), f"conv{i}.bias": (K,)}
    shapes |= {"fc9.weight": (49 * settings.channels[3], 10), "fc9.bias": (10,)}
    rows = 1 if settings.optimizer == "sgd" else 2
    expected = [*shapes.items(), ("moments", (rows, state.params.flat.size))]
    found = [(name, a.shape) for name, a in state.params.items()]
    for name, shape in [*found, ("moments", state.moments.shape)]:
        if (name, shape) not in expected:
            return f"the kernels know no {name} {shape}"
    if found != expected[:-1]:
        return "the kernels know these parameters, but others too or in another order"
    return None


# ── Recording ─────────────────────────────────────────────────────────────────────────────────────

NUMBERS = {"int": np.int32, "unsigned": np.uint32, "float": np.float32, "word": np.uint64}


def refuse_others(kernel, given, known):
    """An argument with another name would be lost, and the kernel's own a null pointer."""
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"{kernel} takes {', '.join(unknown)}")


class Launch(NamedTuple):
    name: str
    grid: tuple  # of blocks
    threads: int  # of each block
    shared: int  # bytes of shared memory of each block
    branch: int
    arguments: tuple


class Program:
    """Kernels in the order in which they are launched, on a main branch (0) and some beside it.

    A kernel beside the main branch waits for what the main branch has launched before it, and runs
    while that goes on; join() makes the main branch wait for all. `common` are arguments that many
    kernels take, by name.
    """

    def __init__(self, device, **common):
        every = {name for kernel in kernels().values() for _, name in kernel.parameters}
        refuse_others("no kernel", common, every)
        self.device, self.common = device, common
        self.entries, self.kept = [], []

    def launch(self, name, grid, threads=256, shared=0, branch=0, **given):
        """Adds a kernel. Arguments have the names that they have in gpu.cu; an array that is not
        given is null."""
        kernel = name.partition("<")[0]
        parameters = kernels()[kernel].parameters
        refuse_others(kernel, given, {parameter for _, parameter in parameters})
        given = self.common | given
        arguments = []
        for kind, parameter in parameters:
            if kind.endswith("*"):
                value = given.get(parameter)
                arguments.append(NULL if value is None else value)
            else:
                arguments.append(NUMBERS[kind](given[parameter]))
        grid = (grid, 1) if isinstance(grid, int) else grid
        self.entries.append(Launch(name, grid, threads, shared, branch, tuple(arguments)))

    def join(self):
        self.entries.append(None)

    def launches(self):
        return [entry for entry in self.entries if entry]

    def names(self):
        return {launch.name for launch in self.launches()}

    def empty(self, *shape, dtype=np.float32):
        """An array that lives as long as the program."""
        self.kept.append(self.device.xp.empty(shape, dtype))
        return self.kept[-1]


class Cuda:
    """Compiles and runs programs with CuPy, on the current device."""

    options = ("-std=c++17",)

    def __init__(self):
        import cupy

        attributes = cupy.cuda.Device().attributes
        self.xp, self.kernels = cupy, {}
        self.limit = attributes["MaxSharedMemoryPerBlockOptin"]
        # So many are given to it, at least, to be busy.
        self.blocks = 2 * attributes["MultiProcessorCount"]

    def compile(self, names):
        """Compiles what is not yet compiled of these kernels, as one module."""
        missing = tuple(sorted(set(names) - self.kernels.keys()))
        if not missing:
            return
        code = SOURCE.read_text(encoding="utf-8")
        with said_if_long("Compiling the GPU's kernels, once: later starts find them compiled."):
            module = self.xp.RawModule(code=code, options=self.options, name_expressions=missing)
            for name in missing:
                self.kernels[name] = module.get_function(name)

    def launch(self, name, grid, threads, *arguments):
        """Runs one kernel now, by itself."""
        self.compile({"fill_normal", "fill_uniform"})
        self.kernels[name]((grid, 1), (threads, 1), arguments)

    def record(self, program):
        """A function that runs the program, as one CUDA graph."""
        xp, launches = self.xp, program.launches()
        self.compile(program.names())
        for launch in launches:
            if launch.shared > 48 * 1024:  # more has to be asked for
                self.kernels[launch.name].max_dynamic_shared_size_bytes = launch.shared
        main = xp.cuda.Stream(non_blocking=True, priority=-5)  # what the others wait for goes first
        branches = {launch.branch for launch in launches} - {0}
        beside = {branch: xp.cuda.Stream(non_blocking=True) for branch in branches}
        used = set()

        def wait(waiting, stream):
            event = xp.cuda.Event(disable_timing=True)
            event.record(stream)
            waiting.wait_event(event)

        main.begin_capture()
        for launch in program.entries:
            if launch is None:
                for branch in sorted(used):
                    wait(main, beside[branch])
                used.clear()
                continue
            stream = beside[launch.branch] if launch.branch else main
            if launch.branch:
                wait(stream, main)
                used.add(launch.branch)
            with stream:
                kernel, threads = self.kernels[launch.name], (launch.threads, 1)
                kernel(launch.grid, threads, launch.arguments, shared_mem=launch.shared)
        program.graph = main.end_capture()
        # The graph does not keep the arrays that it writes to; the program does, and lives in here.
        return lambda: program.graph.launch(xp.cuda.get_current_stream())


@contextmanager
def said_if_long(line):
    """Prints the line if what is done within takes more than a second."""
    timer = threading.Timer(1, print, [line], {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ── The network as a program ──────────────────────────────────────────────────────────────────────


def blocks_of(size):
    """Blocks of 256 threads, one for each of these numbers."""
    return ceil_div(size, 256)


def inverse(N):
    """2³²/N, rounded up: gpu.cu divides by multiplying with it. 0 stands for 2³², where N is 1."""
    return ceil_div(2**32, N) if N > 1 else 0


class Network:
    """What training and predicting share: the layers, and forward up to the last pooling."""

    def __init__(self, device, settings):
        self.device, self.settings = device, settings
        self.layers = layers_of(settings.channels, device.limit)
        self.max_pool = settings.pool == "max"
        self.features = 49 * settings.channels[3]

    def forward(self, program, params, x, N):
        """Launches convolutions and the first pooling. Returns each layer's input and output."""
        inputs, outputs = {}, {}
        for layer in self.layers:
            i, tile = layer.i, layer.forward
            if i == 5:
                x = program.empty(14, 14, N, layer.C)
                pool = with_numbers("pool", SIDE=28, MAX=self.max_pool)
                size, NC = x.size, N * layer.C
                program.launch(pool, blocks_of(size), x=outputs[4], y=x, size=size, NC=NC)
            inputs[i] = x
            outputs[i] = program.empty(layer.side, layer.side, N, layer.K)
            program.launch(
                tile.name,
                tile.grid(N),
                tile.threads,
                tile.shared,
                x=x,
                w=params[f"conv{i}.weight"],
                b=params[f"conv{i}.bias"],
                add=inputs[i - 1] if i in (4, 8) else None,
                relu=True,
                y=outputs[i],
            )
            x = outputs[i]
        return inputs, outputs

    def head_name(self, kernel):
        return with_numbers(kernel, C=self.settings.channels[3], MAX=self.max_pool)


class Predictor(Network):
    """Logits of images, N at a time, with given parameters."""

    def __init__(self, device, settings, params, N):
        super().__init__(device, settings)
        self.N, self.run = N, None
        self.program = program = Program(device, N=N, inverse=inverse(N), batch=0, smoothing=0)
        self.images = program.empty(N, 28, 28, dtype=np.uint8)
        self.logits = program.empty(N, 10)
        x = program.empty(28, 28, N)
        read = with_numbers("read_images", AUGMENT=False)
        program.launch(read, (N, 4), images=self.images, x=x, strength=0, elastic=0, J=0)
        _, outputs = self.forward(program, params, x, N)
        program.launch(
            self.head_name("head"),
            N,
            x=outputs[8],
            w=params["fc9.weight"],
            b=params["fc9.bias"],
            logits=self.logits,
        )

    def record(self):
        self.run = self.device.record(self.program)

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
        xp, steps = device.xp, ceil_div(len(images), settings.batch_size)
        self.order = xp.empty(len(images), np.int32)
        self.keys = xp.empty(steps, np.uint64)
        self.plan = xp.empty((steps, NUMBERS_OF_A_STEP), np.float32)
        self.losses = xp.empty(steps, np.float32)
        self.gradient = xp.empty(self.flat.size, np.float32)
        self.next, self.now = xp.zeros(1, np.int32), xp.zeros(1, np.int32)  # step of the epoch
        kinds = [np.full(a.size, self.kind_of(name), np.uint8) for name, a in self.params.items()]
        self.kinds = xp.asarray(np.concatenate(kinds))
        sizes = {self.images_of(number) for number in (0, steps - 1)}
        self.programs = {N: self.program(N) for N in sizes}
        self.run = {}

    def record(self):
        self.run = {N: self.device.record(program) for N, program in self.programs.items()}

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
        self.run[self.images_of(number)]()
        return self.losses[number]

    def program(self, N):
        """One step with N images, from the images to the update."""
        settings, params = self.settings, self.params
        program = Program(
            self.device,
            N=N,
            inverse=inverse(N),
            batch=settings.batch_size,
            order=self.order,
            keys=self.keys,
            plan=self.plan,
            next=self.next,
            now=self.now,
            smoothing=settings.label_smoothing,
            beta1=self.beta1,
            # 1 − beta is computed here, in double: near 1 a float would lose most of its digits.
            fresh1=1 - self.beta1,
            fresh2=1 - settings.beta2,
        )
        mask = self.dropout_mask(program, N) if settings.dropout else None
        x = program.empty(28, 28, N)
        program.launch(
            with_numbers("read_images", AUGMENT=settings.augment > 0 or settings.elastic > 0),
            (N, 4),
            images=self.images,
            x=x,
            strength=settings.augment,
            elastic=settings.elastic,
            bumps=self.bumps,
            J=len(self.bumps),
        )
        inputs, outputs = self.forward(program, params, x, N)
        program.join()
        dw = self.gradients()
        losses = program.empty(N)
        dx = self.head(program, outputs[8], mask, dw["fc9.weight"], losses, N)
        self.backward(program, inputs, outputs, dx, dw, N)
        program.join()
        program.launch(
            with_numbers("update", OPTIMIZER=OPTIMIZERS.index(settings.optimizer)),
            blocks_of(self.flat.size),
            w=self.flat,
            dw=self.gradient,
            moments=self.moments,
            ema=None if self.ema is None else self.ema.flat,
            kinds=self.kinds,
            size=self.flat.size,
            image_losses=losses,
            losses=self.losses,
        )
        return program

    def gradients(self):
        """Where in the gradient each layer's part is, its weight and bias in one piece."""
        dw, start = {}, 0
        for name, a in self.params.items():
            if name.endswith("weight"):
                size = a.size + self.params[name.replace("weight", "bias")].size
                dw[name] = self.gradient[start : start + size]
            start += a.size
        return dw

    def dropout_mask(self, program, N):
        """Launches the drawing of dropout's mask, which needs nothing but the step's key."""
        settings, size = self.settings, N * self.features
        drawn = 0  # by augmentation, in whole words of four
        if settings.augment or settings.elastic:
            drawn = round_up(6 * N, 8)
        if settings.elastic:
            drawn += 2 * round_up(N * len(self.bumps), 8)
        mask = program.empty(N, self.features)
        program.launch(
            "dropout_mask",
            blocks_of(ceil_div(size, 8)),
            branch=1,
            mask=mask,
            size=size,
            rate=settings.dropout,
            kept=1 / (1 - settings.dropout),
            first=drawn,
        )
        return mask

    def head(self, program, x, mask, dw, losses, N):
        """From the last activations to the loss, and back. Returns their gradient."""
        F, C, w = self.features, self.settings.channels[3], self.params["fc9.weight"]
        features, logits = program.empty(N, F), program.empty(N, 10)
        dlogits, dx = program.empty(N, 10), program.empty(14, 14, N, C)
        program.launch(
            self.head_name("head"),
            N,
            x=x,
            mask=mask,
            w=w,
            b=self.params["fc9.bias"],
            features=features,
            logits=logits,
            labels=self.labels,
            losses=losses,
            dlogits=dlogits,
        )
        program.launch(
            "linear_gradient",
            ceil_div(F + 1, 32),
            branch=1,
            features=features,
            dlogits=dlogits,
            dw=dw,
            F=F,
        )
        name, blocks = self.head_name("head_gradient"), blocks_of(49 * N * C)
        program.launch(name, blocks, x=x, mask=mask, w=w, dlogits=dlogits, dx=dx)
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
            program.launch(
                tile.name,
                tile.grid(N),
                tile.threads,
                tile.shared,
                x=slopes[i],
                w=self.params[f"conv{i}.weight"],
                add=slopes[i + 1] if i in (3, 7) else None,
                gate=None if i == 5 else inputs[i],  # what comes from pooling did not pass a relu
                relu=False,
                y=dx,
            )
            change()
            slopes[i - 1] = dx
            if i == 5:
                slopes[4] = program.empty(28, 28, N, layer.C)
                program.launch(
                    with_numbers("pool_gradient", SIDE=28, MAX=self.max_pool),
                    blocks_of(dx.size),
                    x=outputs[4],
                    dy=dx,
                    dx=slopes[4],
                    size=dx.size,
                    NC=N * layer.C,
                )

    def learn(self, program, layer, x, dy, dw, N):
        """The gradient of a layer's kernel and bias, beside the way back. Returns a function that
        launches what changes the kernel: the way back has to have read it by then."""
        tile, name, branch = layer.gradient, f"conv{layer.i}.weight", 2 + layer.i % 3
        a_block, blocks = tile.split(N, self.device.blocks)
        count = blocks * tile.groups
        parts = program.empty(count, tile.size)
        program.launch(
            tile.name,
            (blocks, tile.tiles),
            tile.threads,
            tile.shared,
            branch,
            x=x,
            dy=dy,
            parts=parts,
            rows_a_block=a_block,
        )
        columns = 8 if count > 64 else 32
        program.launch(
            with_numbers("add_parts", COLUMNS=columns),
            ceil_div(tile.size, columns),
            branch=branch,
            parts=parts,
            sum=dw[name],
            size=tile.size,
            count=count,
        )
        if self.kind_of(name) == MUON_WEIGHT:
            return self.orthogonal_step(program, layer, dw[name], branch)
        return lambda: None

    def orthogonal_step(self, program, layer, dw, branch):
        """Muon's step with the gradient of a layer's kernel, but for its end: see learn."""
        name, R, K, rounds = f"conv{layer.i}.weight", 9 * layer.C, layer.K, layer.rounds
        padded, strips = round_up(K, 16), ceil_div(R, 32)
        X, parts = program.empty(32 * strips, padded), program.empty(strips, padded, padded)
        Q, scale = program.empty(padded, padded), program.empty(1)
        program.launch(
            with_numbers("muon_mean", R=R, K=K),
            strips,
            branch=branch,
            dw=dw,
            m=self.moment(0, name),
            X=X,
            parts=parts,
        )
        program.launch(
            rounds.name,
            1,
            rounds.threads,
            rounds.shared,
            branch,
            parts=parts,
            count=strips,
            room=program.empty(rounds.room) if rounds.room else None,
            Q_out=Q,
            scale=scale,
        )

        def change():
            program.launch(
                with_numbers("muon_update", R=R, K=K),
                ceil_div(R, 64),
                128,
                branch=branch,
                w=self.params[name],
                ema=None if self.ema is None else self.ema[name],
                X=X,
                Q=Q,
                scale=scale,
            )

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
        evaluated = state.params if state.ema is None else state.ema
        self.predict = Predictor(device, settings, evaluated, PREDICT_IMAGES)
        programs = [*self.trainer.programs.values(), self.predict.program]
        device.compile(set().union(*[program.names() for program in programs]))
        self.trainer.record()
        self.predict.record()
        self.begin_epoch = self.trainer.begin_epoch

    def step(self, state, number):
        """Takes step `number` of the epoch, which must be the next one. Returns its loss."""
        loss = self.trainer.take(number)
        state.step += 1
        return loss

    def fetch(self):
        """The kernels write to the state's own arrays, so there is nothing to fetch."""


def fast_path(settings, state, images, labels, bumps, beta1):
    """The fast path of a run of ResNet9 and "", or None and why it takes the plain operations."""
    reason = unsupported(settings) or other_arrays(settings, state)
    if not reason:
        try:
            return FastPath(cuda(), settings, state, images, labels, bumps, beta1), ""
        # An old CUDA, a compiler that is missing: the plain operations go on.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            reason = with_remedy(reason)
    return None, f"plain operations: {reason}"


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────


class Stream:
    """Random numbers that are a function of the key, with the methods of NumPy's generator that a
    network needs; each draw is one kernel. random() gives the numbers of NumPy's Philox(key), in
    float32 unless another dtype is asked for; the others are made of them in a way of their own."""

    def __init__(self, device, key):
        self.device, self.key, self.used = device, np.uint64(key), 0

    def draw(self, name, size, dtype):
        out = self.device.xp.empty(() if size is None else size, np.float32)
        numbers = np.int32(out.size), self.key, np.int32(self.used)
        self.device.launch(name, blocks_of(out.size), 256, out, *numbers)
        self.used += round_up(out.size, 8)  # each draw starts with a fresh word of four
        return out.astype(dtype, copy=False)

    def random(self, size=None, dtype=np.float32):
        return self.draw("fill_uniform", size, dtype)

    def standard_normal(self, size=None, dtype=np.float32):
        return self.draw("fill_normal", size, dtype)

    def uniform(self, low=0.0, high=1.0, size=None):
        return low + (high - low) * self.random(size)

    def normal(self, loc=0.0, scale=1.0, size=None):
        return loc + scale * self.standard_normal(size)

    def integers(self, low, high=None, size=None, dtype=np.int64):
        low, high = (0, low) if high is None else (low, high)
        # random() has 24 bits: of a number as large as that, the last digits would never change.
        if np.ndim(high - low) or not 0 < high - low <= 2**16:
            raise UserError(
                f"on a GPU, rng.integers({low}, {high}) is not possible: "
                "low and high should be two numbers, high above low by at most 65,536"
            )
        # In float64, so that nothing is rounded up to `high`.
        return (low + self.random(size, np.float64) * (high - low) // 1).astype(dtype)

    def __getattr__(self, name):
        if callable(getattr(np.random.Generator, name, None)) and not name.startswith("_"):
            raise UserError(
                f"on a GPU, rng.{name} is not possible: "
                "random, standard_normal, uniform, normal and integers are"
            )
        raise AttributeError(f"Stream has no {name}")


def cuda():
    """What compiles and runs on the current device."""
    import cupy

    return cuda_of(cupy.cuda.Device().id)


@lru_cache(maxsize=None)
def cuda_of(_):  # the limits and the compiled modules are those of one device
    return Cuda()


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

TOOLKIT = 'pip install --upgrade "cupy-cuda12x[ctk]"'
REMEDIES = {
    r"(find|load).*(nvrtc|cublas|cudart)|(nvrtc|cublas|cudart).*cannot open|CUDA headers": (
        f"{TOOLKIT} brings what is missing of CUDA"
    ),
    r"NO_BINARY_FOR_GPU|no kernel image|--gpu-architecture|unsupported toolchain": (
        f"this CUDA does not know the card: {TOOLKIT} brings one that does"
    ),
}


def root_cause(error):
    """What an error says in one line. CuPy's begins with a banner, and has the cause below it."""
    while error.__cause__:
        error = error.__cause__
    text = str(error).rpartition("Original error:")[2]
    return " ".join(text.split())[:200] or type(error).__name__


def with_remedy(reason):
    """What CUDA complains about, and what helps where that is known."""
    for complaint, remedy in REMEDIES.items():
        if re.search(complaint, reason, re.IGNORECASE):
            return f"{reason}; {remedy}"
    return reason


@contextmanager
def errors_in_a_line():
    """What CUDA reports ends a run in a line, as other errors do that the user can put right. A
    kernel's error shows wherever the device is next waited for, so this stands around all of it."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith("cupy"):
            raise
        raise UserError(
            f"the GPU failed ({' '.join(str(error).split())[:200]}); "
            "the checkpoints are intact, and the same command continues from the last one"
        ) from error
