"""One pass through a network as a figure shows it: stage by stage, forwards and backwards. Nothing
here learns.

A stage is a layer; of a block with several layers in it, as a residual one, each of them is one.
The stages are found by watching the calls (support/trace.py), so this works for any network.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np

from support import UserError
from support.trace import Trace, namespaces_of


class CannotDraw(UserError):
    """A network that computes nothing that could be shown, in words that follow "since"."""


@dataclass(eq=False)
class Stage:
    name: str
    calls: list  # of the pairs in it, in order; none for the image
    y: Any  # what it puts out: (H, W, N, C) or (N, F)
    dy: Any  # the gradient of the loss with respect to that; None where none came back
    has_params: bool = False
    # The number of the stage whose output goes past some others and is added here, or None.
    start: Optional[int] = None


class Pass(NamedTuple):
    loss: float
    stages: list  # the image, and what each layer makes of it
    d: dict  # parameter → the gradient of the loss with respect to it

    @property
    def logits(self):
        return self.stages[-1].y

    @property
    def has_shortcuts(self):
        return any(stage.start is not None for stage in self.stages)


def one_pass(script, network, params, images, labels, settings, shortcuts=True):
    """The Pass of these images through a network, without dropout.

    script is the module mnist_resnet9. shortcuts says whether the gradient also comes back through
    the shortcuts of residual blocks, or through their layers alone, as in a plain deep network;
    forwards they are always there. CannotDraw if the network raises an error, calls its layers in
    another order, or computes what is not finite."""
    image_gradient = []
    try:
        with np.errstate(all="ignore"), Trace(namespaces_of(script, network, settings)) as trace:
            watched = watching(trace, network, shortcuts, image_gradient)
            loss, d = script.learn_from(params, images, labels, settings, None, watched)
        layers, calls = network(settings), calls_of_layers(trace)
        if not image_gradient or len(layers) != len(calls):
            raise CannotDraw("its layers are not called one after the other, there and back")
        stages = stages_of(layers, calls, params, image_gradient[0])
        values = [a for stage in stages for a in (stage.y, stage.dy) if a is not None]
        if not all(np.isfinite(a).all() for a in values):
            raise CannotDraw("its outputs or their gradients are not finite numbers")
        return Pass(loss, stages, {name: d[name] for name in params})
    except CannotDraw:
        raise
    # The network may be anything that somebody wrote.
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CannotDraw(f"its network raises {what}") from error


def stages_of(layers, calls, params, image_gradient):
    stages = [Stage("image", [], calls[0].inputs[0], image_gradient)]
    for layer, call in zip(layers, calls):
        if call is calls[-1] or not hands_on(layer, call):
            own = [(prefix_of(name), params[name]) for name in layer.params]
            found = opened(layer.name, call, own)
            if has_shortcut(call):
                found[-1].start = len(stages) - 1
            stages += found
    return stages


def calls_of_layers(trace):
    """The outermost calls: one for each layer, in order."""
    return [call for call in trace.calls if call.layer]


def watching(trace, network, shortcuts, image_gradient):
    """The traced network. The gradient of the image is appended to image_gradient."""
    traced = trace.of(network)

    def watched(settings, rng=None):
        return [watched_layer(i, layer) for i, layer in enumerate(traced(settings, rng))]

    def watched_layer(i, layer):
        def op_backward(dy, cache):
            dx, *gradients = as_tuple(layer.op_backward(dy, cache))
            call = calls_of_layers(trace)[i]
            if not shortcuts and has_shortcut(call):
                # What the first of the layers in the block handed back, before the sum.
                dx = call.inner[0].gradients[0]
            if i == 0:
                image_gradient.append(dx_of_first(call, dy) if dx is None else dx)
            return (dx, *gradients) if layer.params else dx

        return layer._replace(op_backward=op_backward)

    return watched


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def dx_of_first(call, dy):
    """The gradient of the image, which training does without; None if there is no way to ask."""
    cache = call.result[1]
    for one in reversed(call.all()):
        if one.result and one.result[1] is cache:
            with contextlib.suppress(Exception):
                dx = as_tuple(one.f_backward(dy, cache))[0]
                if dx is not None:
                    return dx
    return None


def equal(a, b):
    return a is not None and b is not None and a.shape == b.shape and np.array_equal(a, b)


def hands_on(layer, call):
    """Whether a layer gives out the numbers that it gets, and in backward too: flatten does, and
    dropout that is off."""
    if layer.params or not call.gradients or call.gradients[0] is None:
        return False
    pairs = (call.y, call.inputs[0]), (call.gradients[0], call.dy)
    return all(equal(first_of(a).ravel(), first_of(b).ravel()) for a, b in pairs)


def first_of(a):
    """What belongs to the first image: (H, W, C), or (F,) where there are no rows and columns."""
    return a[:, :, 0] if a.ndim == 4 else a[0].ravel()


def has_shortcut(call):
    """Whether a block adds what it gets to what it makes of that: then the gradient also comes back
    past the calls within it."""
    if not call.inner or not call.gradients or not call.inner[0].gradients:
        return False
    x, dx, through = call.inputs[0], call.gradients[0], call.inner[0].gradients[0]
    if dx is None or through is None or not equal(call.inner[0].inputs[0], x):
        return False
    if not dx.any():  # where all is 0, the gradient tells nothing
        return call.name == "residual_block"
    ways = [one for one in call.inner if weight_of(one) is not None and equal(one.inputs[0], x)]
    if len(ways) > 1:  # none of them goes past everything
        return False
    return dx.shape == through.shape and not np.array_equal(dx, through)


def prefix_of(name):
    """conv3 of conv3.weight."""
    return name.rpartition(".")[0] or name


def opened(name, call, params):
    """[Stage] of a layer: one for each part of it that has parameters of another name.

    params: [(prefix, array)]. A layer whose parts are no chain is one stage."""
    whole = Stage(name, call.inner or [call], call.y, call.dy, bool(params))
    parts = parts_of(call, params)
    ends = [(before[-1], after[0]) for (_, before), (_, after) in zip(parts, parts[1:])]
    is_chain = all(equal(before.y, after.inputs[0]) for before, after in ends)
    if len(parts) < 2 or not is_chain or not equal(call.inputs[0], parts[0][1][0].inputs[0]):
        return [whole]
    whole.calls = parts[-1][1]
    inner = [Stage(prefix, calls, calls[-1].y, calls[-1].dy, True) for prefix, calls in parts[:-1]]
    return [*inner, whole]


def parts_of(call, params):
    """[(prefix, calls)]: the calls within a call, by the parameters that they get.

    A call without any belongs to the one before it."""
    left, parts, first = list(params), [], []
    for inner in call.inner:
        prefix = None
        for a in [*inner.inputs[1:], *inner.options.values()]:
            # The first that fits, as two may be equal.
            found = [
                i for i, (_, p) in enumerate(left) if isinstance(a, np.ndarray) and equal(a, p)
            ]
            if found:
                prefix, _ = left.pop(found[0])
        if prefix is None or (parts and parts[-1][0] == prefix):
            (parts[-1][1] if parts else first).append(inner)
        else:
            parts.append((prefix, [*first, inner]))
            first = []
    return parts


# ── In words ──────────────────────────────────────────────────────────────────────────────────────


def words_for(stages, i):
    """What stage i does: "3×3, + conv2, relu"."""
    stage = stages[i]
    leaves = [leaf for call in stage.calls for leaf in call.all() if not leaf.inner]
    words = [word_for(leaf) for leaf in leaves]
    if stage.start is not None:
        with_weights = [n for n, leaf in enumerate(leaves, 1) if weight_of(leaf) is not None]
        words.insert(max(with_weights, default=len(words)), f"+ {stages[stage.start].name}")
    return ", ".join(word for word in words if word != stage.name)


def weight_of(call):
    """The first array that it gets beside x, if that is the weights of something."""
    arrays = [a for a in call.inputs[1:] if isinstance(a, np.ndarray) and a.ndim > 1]
    return arrays[0] if arrays else None


def word_for(call):
    x, y, weight = call.inputs[0], call.y, weight_of(call)
    shrinks = x.shape[0] // y.shape[0] if np.ndim(x) == np.ndim(y) == 4 else 1
    if call.name in ("max_pool2d", "avg_pool2d"):
        kind = "largest" if call.name == "max_pool2d" else "mean"
        return f"{kind} of {shrinks}×{shrinks}"
    if weight is not None and weight.ndim > 2:
        stride = f", stride {shrinks}" if shrinks > 1 else ""
        return f"{weight.shape[0]}×{weight.shape[1]}{stride}"
    return call.name.replace("_", " ")
