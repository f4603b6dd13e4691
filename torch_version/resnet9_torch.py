"""The network of mnist_resnet9.py once more, with PyTorch's autograd and optimizers in place of
ours.

    python torch_version/resnet9_torch.py               train
    python torch_version/resnet9_torch.py --weights F   start from a checkpoint, ours or PyTorch's
    python plot_figs.py resnet9 torch_resnet9           the curves of both, side by side

Read it beside mnist_resnet9.py: all that is not here comes from there. Settings and their flags,
data, initialisation, the order of the batches, augmentation, dropout's masks, log and checkpoints
are the same, so what differs between two runs of one seed is rounding, and pixels that tie in a max
pooling window (there our gradient goes to all of them, PyTorch's to one). Files go to
save/torch_<tag>/. A checkpoint of either program can be continued or evaluated by the other.

PyTorch's images are (N, C, H, W) where ours are (H, W, N, C). No backward function is left: the
calls of the forward pass are recorded, and loss.backward() walks the record back, as our network
calls its pairs in reverse.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(
        f"resnet9_torch.py needs PyTorch ({error}); requirements-torch.txt says how to get it",
        file=sys.stderr,
    )
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mnist_resnet9 import (
    SCRIPTS,
    SHARD_IMAGES,
    STEP,
    Machinery,
    Settings,
    augment,
    beta1_of,
    device_stream,
    dropout,
    load_weights,
    main,
    orthogonal,
    parse_settings,
    random_stream,
    run,
    shards_of,
    takes_muon,
    to_input,
)
from support import UserError
from support.runs import has_checkpoint
from support.settings import project_path, settings_class, user_path
from support.workers import prepare_process

EVALUATION_BATCH = 100  # images; larger ones leave the caches and are no faster


@settings_class
class TorchSettings(Settings):
    weights: str = ""  # checkpoint of either version whose weights a new run starts from


# ── The network ───────────────────────────────────────────────────────────────────────────────────


class ResNet9(nn.Module):
    """forward of mnist_resnet9.py, line by line. The parameters have the same names: conv1.weight,
    … fc9.bias."""

    def __init__(self, settings):
        super().__init__()
        c1, c2, c3, c4 = settings.channels
        self.conv1 = nn.Conv2d(1, c1, 3, padding=1)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.conv3 = nn.Conv2d(c2, c2, 3, padding=1)
        self.conv4 = nn.Conv2d(c2, c2, 3, padding=1)
        self.conv5 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv6 = nn.Conv2d(c3, c4, 3, padding=1)
        self.conv7 = nn.Conv2d(c4, c4, 3, padding=1)
        self.conv8 = nn.Conv2d(c4, c4, 3, padding=1)
        self.fc9 = nn.Linear(49 * c4, 10)
        self.pool = nn.MaxPool2d(2) if settings.pool == "max" else nn.AvgPool2d(2)

    def forward(self, x, mask=None):
        """x (N, 1, 28, 28) → logits (N, 10). mask (N, 3136): dropout's, while training."""
        h = F.relu(self.conv1(x))  # (N, 4, 28, 28)
        h = F.relu(self.conv2(h))  # (N, 16, 28, 28)
        h = F.relu(h + self.conv4(F.relu(self.conv3(h))))
        h = self.pool(h)  # (N, 16, 14, 14)
        h = F.relu(self.conv5(h))  # (N, 32, 14, 14)
        h = F.relu(self.conv6(h))  # (N, 64, 14, 14)
        h = F.relu(h + self.conv8(F.relu(self.conv7(h))))
        h = self.pool(h)  # (N, 64, 7, 7)
        features = h.permute(0, 2, 3, 1).flatten(1)  # (N, 3136), in our order: row, column, channel
        return self.fc9(features if mask is None else features * mask)


def named_views(flat, params):
    """The parts of a flat vector by name, as PyTorch shapes them: (3, 3, C, K) → (K, C, 3, 3) and
    (F, K) → (K, F).

    Views: who changes one changes the vector. The convolutions take them as fast as arrays in
    PyTorch's own order.
    """
    parts = flat.split([a.size for a in params.values()])
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    return {
        name: part.view(a.shape).permute(axes[a.ndim])
        for (name, a), part in zip(params.items(), parts)
    }


def build(settings, flat, params):
    """The network whose parameters are views of the flat vector."""
    net = ResNet9(settings)
    net.load_state_dict(named_views(flat, params), assign=True)
    return net


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def use_device(device):
    """Like the one of mnist_resnet9.py, but for PyTorch's GPU."""
    version = f"PyTorch {torch.__version__}"
    if device == "cpu":
        return f"CPU, {version}"
    try:
        # A first computation: a GPU that is seen may still be one that cannot be used.
        ones = torch.ones(8, 8, device="cuda")
        ones.mm(ones).sum().item()
        return f"GPU, {torch.cuda.get_device_name()}, {version}"
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if device == "gpu":
            raise UserError(
                f"device gpu cannot be used: {reason}; --device cpu works everywhere"
            ) from None
        return f"CPU (no GPU: {reason}), {version}"


def use_cores(count):
    """Like the one of mnist_resnet9.py, but for PyTorch's threads."""
    prepare_process()
    # Their number can change the last digits here.
    torch.set_num_threads(count)


def torch_engine(run, where):
    return Engine(run, torch.device("cuda" if where.startswith("GPU") else "cpu")), where


class Engine:
    """Takes the steps of a run with PyTorch: what train() of mnist_resnet9.py asks an engine for.

    Parameters, moments and mean are the arrays of the run's state, seen as tensors: the same memory
    on the CPU, copies on a GPU, which fetch() brings back."""

    def __init__(self, run, device):
        self.run, self.settings, self.device, self.copies = run, run.settings, device, []
        state, settings = run.state, run.settings
        self.dtype = state.params.flat.dtype
        self.flat, self.ema = self.tensor(state.params.flat), None
        self.net = self.evaluated = build(settings, self.flat, state.params)
        if settings.ema:
            self.ema = self.tensor(state.ema.flat)
            self.evaluated = build(settings, self.ema, state.params)
        parameters, beta1 = self.net.parameters(), beta1_of(settings)
        if settings.optimizer == "sgd":
            names = ("momentum_buffer",)
            self.optimizer = torch.optim.SGD(parameters, momentum=settings.momentum, fused=True)
        else:
            names, betas = ("exp_avg", "exp_avg_sq"), (beta1, settings.beta2)
            self.optimizer = torch.optim.Adam(parameters, betas=betas, fused=True)
        # So a checkpoint holds what the optimizer remembers.
        for moment, array in zip(names, state.moments):
            views = named_views(self.tensor(array), state.params)
            for name, w in self.net.named_parameters():
                memory = self.optimizer.state[w]
                memory[moment] = views[name]
                memory["step"] = torch.tensor(float(state.step), device=self.device)

    def tensor(self, array):
        tensor = torch.from_numpy(array)
        self.copies.append((tensor, tensor.to(self.device)))
        return self.copies[-1][1]

    def fetch(self):
        """Brings what a checkpoint holds back from a GPU."""
        for here, there in self.copies:
            here.copy_(there)

    def begin_epoch(self, order, _keys, plan, done):
        self.order, self.plan = order, plan

    def step(self, state, number):
        """Learns from a batch of the epoch. Returns its loss."""
        settings, B = self.settings, self.settings.batch_size
        images, labels = self.run.train
        batch = self.order[number * B : (number + 1) * B]
        epoch = state.step // len(self.plan) + 1
        rng = random_stream(settings.seed, STEP, epoch, number)
        rate, keeps, _, _, takes = self.plan[number]
        loss = self.learn(images[batch], labels[batch], rng, rate, keeps, takes)
        state.step += 1
        return loss

    def learn(self, images, labels, rng, rate, keeps, takes):
        """Forward, loss, backward and update. keeps: the share of themselves that decaying weights
        keep; takes: the share that the mean of the weights takes from the new ones."""
        settings, state = self.settings, self.run.state
        x, mask = self.randomise(images, rng)
        self.optimizer.zero_grad()
        labels = torch.tensor(labels, dtype=torch.long, device=self.device)
        loss = F.cross_entropy(self.net(x, mask), labels, label_smoothing=settings.label_smoothing)
        loss.backward()
        with torch.no_grad():
            # Like AdamW's, for SGD too: decoupled from the gradient, biases left out.
            if settings.weight_decay:
                for name, w in self.net.named_parameters():
                    if name.endswith("weight"):
                        w.mul_(keeps)
            self.optimizer.param_groups[0]["lr"] = rate
            before = self.flat.clone() if settings.optimizer == "muon" else None
            self.optimizer.step()
            if before is not None:
                self.orthogonal_steps(named_views(before, state.params), rate)
            if settings.ema:
                self.ema.lerp_(self.flat, takes)
        return loss.detach()

    def orthogonal_steps(self, before, rate):
        """Puts Muon's steps from `before` in place of Adam's, between two hidden layers.

        torch.optim.Muon takes matrices only, and computes in bfloat16."""
        beta1 = beta1_of(self.settings)
        for name, w in self.net.named_parameters():
            if takes_muon(name, w):
                memory = self.optimizer.state[w]
                mean = w.grad.lerp(memory["exp_avg"], beta1).flatten(1)  # (K, 9C)
                memory["exp_avg_sq"].zero_()  # Adam's alone; our checkpoints have none
                length = 0.2 * max(mean.shape) ** 0.5
                w.copy_(before[name] - rate * length * orthogonal(mean.T).T.reshape(w.shape))

    def to_input(self, images):
        """(N, 28, 28) pixels 0…255 → (N, 1, 28, 28). In memory channels come last: that is
        faster."""
        x = torch.from_numpy(to_input(images, self.dtype))
        return x.permute(2, 3, 0, 1).to(self.device, memory_format=torch.channels_last)

    def randomise(self, images, rng):
        """The images augmented, and dropout's mask: both from the random streams of the shards that
        our step uses."""
        settings, parts = self.settings, []
        shards = shards_of(len(images), SHARD_IMAGES)
        for key, (_, shard) in zip(rng.integers(2**63, size=len(shards)), shards):
            x, stream = images[shard], device_stream(key)
            if settings.augment or settings.elastic:
                x = augment(x, settings.augment, stream, settings.elastic)
            ones = np.ones((len(x), self.net.fc9.in_features), self.dtype)
            parts.append((x, dropout(ones, settings.dropout, stream)[1]))
        x, masks = zip(*parts)
        mask = torch.from_numpy(np.concatenate(masks)).to(self.device) if settings.dropout else None
        return self.to_input(np.concatenate(x)), mask

    @torch.inference_mode()
    def predict(self, images):
        """(N, 28, 28) pixels 0…255 → logits (N, 10), without dropout."""
        starts = range(0, len(images), EVALUATION_BATCH)
        parts = [images[start : start + EVALUATION_BATCH] for start in starts]
        logits = [self.evaluated(self.to_input(part)) for part in parts]
        return torch.cat(logits).cpu().numpy()


def start(arguments):
    settings = parse_settings(arguments, TorchSettings)
    settings = replace(
        settings,
        tag=f"torch_{settings.tag.removeprefix('torch_')}",
        weights=settings.weights and user_path(settings.weights),
    )
    folder = project_path(settings.save_dir) / settings.tag
    weights = None
    if settings.weights and not has_checkpoint(folder):
        weights = load_weights(settings.weights, settings)

    def engine_of(training, where):
        if weights:
            # Without the setting ema there is no mean of them.
            for kept in filter(None, (training.state.params, training.state.ema)):
                kept.flat[...] = weights.flat
        return torch_engine(training, where)

    scripts = (Path(__file__).resolve(), *SCRIPTS)
    return run(settings, scripts=scripts, machinery=Machinery(use_device, use_cores, engine_of))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], start))
