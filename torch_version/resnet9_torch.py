"""The network of mnist_resnet9.py once more, with PyTorch's autograd and optimizers in place of
ours.

    python torch_version/resnet9_torch.py               train; takes every flag of mnist_resnet9.py
    python torch_version/resnet9_torch.py --weights F   start from a checkpoint, ours or PyTorch's
    python plot_figs.py resnet9 torch_resnet9           the curves of both, side by side

Read it beside mnist_resnet9.py: all that is not here comes from there. Settings, data,
initialisation, the order of the batches, augmentation, dropout's masks, log and checkpoints are the
same, so what differs between two runs of one seed is rounding, and pixels that tie in a max pooling
window (there our gradient goes to all of them, PyTorch's to one). Files go to save/torch_<tag>/. A
checkpoint of either program can be continued or evaluated by the other.

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
    Run,
    Settings,
    augment,
    device_stream,
    dropout,
    ema_keeps,
    init_params,
    main,
    orthogonal,
    parse_settings,
    run,
    shards_of,
    takes_muon,
    to_input,
)
from support import UserError
from support.checkpoints import checksums
from support.settings import project_path, setting, settings_class, user_path
from support.workers import prepare_process

EVALUATION_BATCH = 100  # images; larger ones leave the caches and are no faster


@settings_class
class TorchSettings(Settings):
    weights: str = setting(
        "", "checkpoint, of either version, whose weights a new run starts from; empty = none"
    )


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


def load_weights(path, settings):
    """The weights that the checkpoint at path was evaluated with: their running mean, if it has
    one."""
    params = init_params(settings)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        sums = arrays.pop("sha256", None)
        if sums is not None and not np.array_equal(sums, checksums(arrays)):
            raise ValueError("its checksums are not those of its arrays")
        for name, a in params.items():
            theirs = arrays[f"ema.{name}" if f"ema.{name}" in arrays else name]
            if theirs.shape != a.shape:
                raise ValueError(f"{name} has the shape {theirs.shape}, not {a.shape}")
            a[...] = theirs
    except Exception as error:  # zip, zlib and NumPy raise many kinds on a damaged file
        raise UserError(f"{path} is no checkpoint of this network ({error})") from None
    return params


class TorchRun(Run):
    """A run whose steps PyTorch takes. Parameters, moments and mean are the arrays of `state`, seen
    as tensors."""

    use_device = staticmethod(use_device)

    @staticmethod
    def use_cores(count):
        prepare_process()
        torch.set_num_threads(count)  # their number can change the last digits here

    def __init__(self, settings, network, data, device, scripts):
        folder = project_path(settings.save_dir) / settings.tag
        if settings.weights and not any(folder.glob("checkpoint_*.npz")):
            weights = load_weights(settings.weights, settings)
            network = network._replace(init_params=lambda _: weights)
        super().__init__(settings, network, data, device, scripts)
        self.on_gpu = device.startswith("GPU")
        self.device = torch.device("cuda" if self.on_gpu else "cpu")

        state, self.copies = self.state, []
        self.flat, self.ema = self.tensor(state.params.flat), None
        self.net = self.evaluated = build(settings, self.flat, state.params)
        if settings.ema:
            self.ema = self.tensor(state.ema.flat)
            self.evaluated = build(settings, self.ema, state.params)
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                self.net.parameters(), momentum=settings.momentum, fused=True
            )
        else:
            self.beta1 = 0.95 if settings.optimizer == "muon" else 0.9
            self.optimizer = torch.optim.Adam(
                self.net.parameters(), betas=(self.beta1, settings.beta2), fused=True
            )
        moments = ("momentum_buffer",) if settings.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
        for moment, array in zip(moments, state.moments):
            views = named_views(self.tensor(array), state.params)
            for name, w in self.net.named_parameters():
                # So the checkpoint holds what the optimizer remembers.
                self.optimizer.state[w][moment] = views[name]
                self.optimizer.state[w]["step"] = torch.tensor(
                    float(state.step), device=self.device
                )

    def tensor(self, array):
        """The array as a tensor on the device: the same memory on the CPU, a copy on a GPU, which
        save() fetches."""
        tensor = torch.from_numpy(array)
        self.copies.append((tensor, tensor.to(self.device)))
        return self.copies[-1][1]

    def save(self, path):
        for here, there in self.copies:
            here.copy_(there)
        return super().save(path)

    def to_input(self, images):
        """(N, 28, 28) pixels 0…255 → (N, 1, 28, 28). In memory channels come last: that is
        faster."""
        x = torch.from_numpy(to_input(images, self.state.params.flat.dtype)).permute(2, 3, 0, 1)
        return x.to(self.device, memory_format=torch.channels_last)

    def draw(self, images, rng):
        """The images augmented, and dropout's mask: both from the random streams of the shards that
        our step uses."""
        settings, parts = self.settings, []
        shards = shards_of(len(images), SHARD_IMAGES)
        for key, (_, shard) in zip(rng.integers(2**63, size=len(shards)), shards):
            x, stream = images[shard], device_stream(key)
            if settings.augment or settings.elastic:
                x = augment(x, settings.augment, stream, settings.elastic)
            ones = np.ones((len(x), self.net.fc9.in_features), self.state.params.flat.dtype)
            parts.append((x, dropout(ones, settings.dropout, stream)[1]))
        x, masks = zip(*parts)
        mask = torch.from_numpy(np.concatenate(masks)).to(self.device) if settings.dropout else None
        return self.to_input(np.concatenate(x)), mask

    def learn(self, images, labels, rng, rate):
        """Forward, loss, backward and update."""
        settings, state = self.settings, self.state
        x, mask = self.draw(images, rng)
        self.optimizer.zero_grad()
        labels = torch.tensor(labels, dtype=torch.long, device=self.device)
        loss = F.cross_entropy(self.net(x, mask), labels, label_smoothing=settings.label_smoothing)
        loss.backward()
        with torch.no_grad():
            # Like AdamW's, for SGD too: decoupled from the gradient, biases left out.
            if settings.weight_decay:
                for name, w in self.net.named_parameters():
                    if name.endswith("weight"):
                        w.mul_(1 - rate * settings.weight_decay)
            self.optimizer.param_groups[0]["lr"] = rate
            before = self.flat.clone() if settings.optimizer == "muon" else None
            self.optimizer.step()
            if before is not None:
                self.orthogonal_steps(named_views(before, state.params), rate)
            if settings.ema:
                self.ema.lerp_(self.flat, 1 - ema_keeps(settings, state.step))
        state.step += 1
        return loss.detach()

    def orthogonal_steps(self, before, rate):
        """Puts Muon's steps from `before` in place of Adam's, between two hidden layers:
        torch.optim.Muon takes matrices only, and computes in bfloat16."""
        for name, w in self.net.named_parameters():
            if takes_muon(name, w):
                mean = w.grad.lerp(self.optimizer.state[w]["exp_avg"], self.beta1)
                mean = mean.flatten(1)  # (K, 9C)
                far = rate * 0.2 * max(mean.shape) ** 0.5
                w.copy_(before[name] - far * orthogonal(mean.T).T.reshape(w.shape))

    @torch.inference_mode()
    def evaluate(self, images, labels):
        parts = [
            images[start : start + EVALUATION_BATCH]
            for start in range(0, len(images), EVALUATION_BATCH)
        ]
        logits = torch.cat([self.evaluated(self.to_input(part)) for part in parts]).cpu()
        labels = torch.tensor(labels, dtype=torch.long)
        accuracy = (logits.argmax(1) == labels).double().mean()
        return F.cross_entropy(logits, labels).item(), accuracy.item(), logits.softmax(1).numpy()


def start(arguments):
    settings = parse_settings(arguments, TorchSettings)
    tag = f"torch_{settings.tag.removeprefix('torch_')}"
    weights = settings.weights and user_path(settings.weights)
    settings = replace(settings, tag=tag, weights=weights)
    return run(settings, scripts=(Path(__file__).resolve(), *SCRIPTS), kind=TorchRun)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], start))
