"""What a network does, call by call: what went into each operation and came out, there and back.
Nothing here learns. The checker and the figures look through it.

    with Trace(namespaces_of(script, network, settings)) as trace:
        script.learn_from(params, images, labels, settings, rng, trace.of(network))
    for call in trace.calls:
        print(call.layer, call.name, call.y.shape, call.dy.shape)

A pair is a function f with an f_backward beside it, as everywhere in the script: y, cache = f(x, …)
and f_backward(dy, cache), which returns dx, or (dx, dw, …). While the trace is on, both are
replaced by functions that call them and write down what they see: in every module that holds them,
since the steps of evolution/ call each other and the script. A layer's functions are traced as
well, whatever they are: a function within a function, a lambda, a partial. So there is nothing to
register. Other threads compute on as if nothing were there; one that wants to trace too, waits.
"""

import contextlib
import copy
import functools
import inspect
import operator
import sys
import threading
import types
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

LOCK = threading.RLock()  # held by the thread whose trace is on


@dataclass(eq=False)
class Call:
    """One call of a pair. Its arrays are copies, except for those of the result: a later operation
    may overwrite an array."""

    name: str  # of the pair: "conv2d"
    key: Any  # what its backward function is known by
    f: Callable  # its two functions, untraced
    f_backward: Callable
    layer: str  # name of the layer that it belongs to; "" for the loss
    inputs: tuple  # in the order of f's parameters
    options: dict  # those that can only be given by name
    rewind: Callable  # () sets the random numbers back to where they were before the call
    inner: list = field(default_factory=list)  # the calls within this one, in order
    error: Any = None  # the exception that it ended with
    result: Any = None  # (y, cache) themselves, no copies
    y: Any = None
    mark: int = 0  # of the arrays in the cache: another one if they change
    cache_changed: bool = False  # between the forward and the backward pass
    dy: Any = None  # stays None where no backward pass came by
    gradients: tuple = ()  # dx, dw, …

    def all(self):
        """The calls within this one, and those within them, and this one: the innermost first."""
        return [*(call for inner in self.inner for call in inner.all()), self]


def without_partial(f):
    return f.func if isinstance(f, functools.partial) else f


def untraced(f):
    """What was there before it was traced."""
    return vars(f).get("untraced", f) if isinstance(f, types.FunctionType) else f


def name_of(f):
    return getattr(without_partial(f), "__name__", str(f))


def namespaces_of(script, layers, settings):
    """Those of all modules that have a part in the network of these layers."""
    functions = [layers, *(layer.op for layer in layers(settings))]
    return [vars(script), *(getattr(without_partial(f), "__globals__", {}) for f in functions)]


def pairs_in(namespace):
    """[(name, f, f_backward)] of a module."""
    named = [(name, f, namespace.get(f"{name}_backward")) for name, f in namespace.items()]
    return [(name, f, back) for name, f, back in named if callable(f) and callable(back)]


def copied(x):
    """A copy, or x itself if it cannot be copied: then it is no array."""
    try:
        return copy.deepcopy(x)
    except Exception:
        return x


def by_position(f, inputs, options):
    """(inputs, options) of a call, but by name only what f does not take by its position."""
    try:
        bound = inspect.signature(f).bind(*inputs, **options)
    except (TypeError, ValueError):  # f has no signature, or will say itself what is wrong
        return inputs, options
    return bound.args, bound.kwargs


def arrays_in(x):
    """All NumPy arrays in tuples and lists, however they are nested."""
    if isinstance(x, np.ndarray):
        return [x]
    return [a for part in x for a in arrays_in(part)] if isinstance(x, (tuple, list)) else []


def mark_of(cache):
    """A number that tells whether an array in the cache has changed."""
    return hash(tuple(zlib.crc32(a.tobytes()) for a in arrays_in(cache)))


def rewinding(rng):
    """A function that sets rng, a NumPy generator or None, back to where it is now."""
    if not hasattr(rng, "bit_generator"):
        return lambda: None
    state = rng.bit_generator.state
    return lambda: setattr(rng.bit_generator, "state", state)


def is_only_handed_on(call):
    """Whether a layer's function is no more than a call of a pair, as with a rate filled in."""
    if not isinstance(call.key, int) or len(call.inner) != 1:  # a number: of a layer
        return False
    inner = call.inner[0]
    same = inner.result and all(map(operator.is_, inner.result, call.result))
    return same and inner.f_backward is call.f_backward


class Trace:
    """Fills .calls, within a `with` block: with those of the layers and of the loss, in order.

    namespaces are the vars() of the modules that define the pairs."""

    def __init__(self, namespaces):
        self.namespaces = namespaces
        self.calls = []
        self.open = []  # calls that have not returned yet, the outermost first
        self.thread = None  # whose calls are seen; None while the trace is off
        self.layer, self.rng, self.backwards = "", None, 0

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(LOCK)
            self.replace_pairs(stack)
            self.thread = threading.get_ident()
            self.put_back = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.thread = None
        self.put_back.close()

    def replace_pairs(self, stack):
        new = self.new = {}  # id of a function → what replaces it
        for name, f, f_backward in [pair for names in self.namespaces for pair in pairs_in(names)]:
            new[id(f)] = self.forward(name, f, f_backward, f_backward)
            new[id(f_backward)] = self.backward(f_backward, f_backward)
        # A list, since asking a module that is loaded late for its names loads further ones.
        modules = [vars(one) for one in list(sys.modules.values()) if hasattr(one, "__dict__")]
        for names in {id(names): names for names in [*modules, *self.namespaces]}.values():
            for name, value in list(names.items()):
                if id(value) in new:
                    stack.callback(names.__setitem__, name, value)
                    names[name] = new[id(value)]

    def is_on(self):
        """Whether this is the thread whose calls are seen."""
        return self.thread == threading.get_ident()

    def all_calls(self):
        """Also those within others: the innermost first."""
        return [call for outer in self.calls for call in outer.all()]

    def of(self, layers):
        """The network of these layers, to be given to the script's functions in its place."""

        def traced(settings, rng=None):
            self.rng = rng or self.rng
            return [self.traced_layer(i, layer) for i, layer in enumerate(layers(settings, rng))]

        return traced

    def traced_layer(self, i, layer):
        # A layer that was made before the trace holds the functions themselves.
        op, op_backward = (self.new.get(id(g), g) for g in (layer.op, layer.op_backward))
        pair = tuple(untraced(without_partial(g)) for g in (op, op_backward))
        if getattr(without_partial(op), "pair", None) != pair:  # in none of the modules
            name = layer.name if name_of(op) == "<lambda>" else name_of(op)
            op, op_backward = self.forward(name, op, pair[1], i), self.backward(op_backward, i)

        def in_layer(*inputs, **options):
            self.layer = layer.name
            try:
                return op(*inputs, **options)
            finally:
                self.layer = ""

        return layer._replace(op=in_layer, op_backward=op_backward)

    def forward(self, name, f, f_backward, key):
        """f, which from now on leaves a Call for f_backward. Both are known by the key."""

        @functools.wraps(f)
        def traced(*inputs, **options):
            # A backward pass may use f for its own ends.
            if not self.is_on() or self.backwards:
                return f(*inputs, **options)
            kept, by_name = by_position(f, inputs, options)
            kept, by_name = tuple(map(copied, kept)), {k: copied(x) for k, x in by_name.items()}
            rewind = rewinding(self.rng)
            call = Call(name, key, f, f_backward, self.layer, kept, by_name, rewind)
            calls = self.open[-1].inner if self.open else self.calls
            calls.append(call)
            self.open.append(call)
            try:
                result = f(*inputs, **options)
            except Exception as error:
                call.error = error
                raise
            finally:
                self.open.pop()
            if isinstance(result, tuple) and len(result) == 2:  # else it is no pair, or half of one
                call.result = result
                call.y, call.mark = copied(result[0]), mark_of(result[1])
                if is_only_handed_on(call):
                    calls[-1] = call.inner[0]
            return result

        traced.untraced, traced.pair = f, (f, f_backward)
        return traced

    def backward(self, f_backward, key):
        """f_backward, which from now on writes into the Call that f left for it."""

        @functools.wraps(f_backward)
        def traced(dy, cache, *inputs, **options):
            call = self.waiting(key, cache) if self.is_on() else None
            if call is None:
                return f_backward(dy, cache, *inputs, **options)
            call.cache_changed = cache is call.result[1] and mark_of(cache) != call.mark
            call.dy = copied(dy)
            self.backwards += 1
            try:
                result = f_backward(dy, cache, *inputs, **options)
            finally:
                self.backwards -= 1
            call.gradients = copied(result if isinstance(result, tuple) else (result,))
            return result

        traced.untraced = f_backward
        return traced

    def waiting(self, key, cache):
        """The Call whose backward pass this is: the last that has none yet.

        Where several have the same functions, the one that left this very cache. A cache need not
        tell, though: that of dropout is None where it is off."""
        calls = [call for call in self.all_calls() if call.key == key]
        calls = [call for call in calls if call.dy is None and call.result]
        same = [call for call in calls if call.result[1] is cache]
        return (same or calls or [None])[-1]
