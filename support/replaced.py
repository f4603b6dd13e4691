"""Notices when what other processes compute with is replaced while the program lives.

`m.relu = leaky` in a notebook, a cell that is run again, a module loaded again: a process that was
copied before has the old function, and one that read the source anew has that. Half of a batch
would be computed with it, in silence.
"""

import contextlib
import dis
import functools
import importlib
import operator
import os
import sys
import types
import zlib
from types import CodeType, FunctionType, ModuleType
from typing import Any, Callable, NamedTuple

import numpy as np

from support.trace import untraced

MISSING = object()
LARGE = 1000  # a list or an array with more than this is not looked into
FunctionWithCache = type(functools.lru_cache(abs))
LIBRARY = os.path.dirname(os.__file__)  # Python's own


def is_own(file):
    """Whether a file is the project's or the user's, and not one of a library, which stays."""
    installed = "site-packages" in file or "dist-packages" in file
    return not installed and not file.startswith((LIBRARY, "<frozen"))


def is_own_module(module):
    if module is None:
        return False
    return module.__name__ == "__main__" or is_own(getattr(module, "__file__", None) or LIBRARY)


def names_in(code):
    """All names that are looked up by this code, and by the functions defined in it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


@functools.lru_cache(maxsize=None)
def globals_in(code):
    """Those of them that are looked up as global names, and not as attributes."""
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    names = {name for how, name in steps if "GLOBAL" in how or "NAME" in how}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= globals_in(constant)
    return names


def look_up(namespace, name):
    return namespace.get(name, MISSING)


def held_by(value):
    """Where a value keeps what can be replaced in it: a dictionary or a list, or None.

    Of objects, only those of the user's classes count: those of support/ change as they run."""
    kind = value if isinstance(value, type) else type(value)
    is_users = is_own_module(sys.modules.get(kind.__module__)) and "support." not in kind.__module__
    held = None
    if isinstance(value, (list, dict)):
        held = value
    elif is_users or kind is types.SimpleNamespace:
        held = getattr(value, "__dict__", None)
    return None if held is None or len(held) > LARGE else held


def names_in_held(held):
    if isinstance(held, list):
        return range(len(held))
    # Of what Python adds to a class, only methods count.
    return [
        name
        for name, value in list(held.items())  # another thread may add some
        if isinstance(value, FunctionType) or not str(name).startswith("__")
    ]


def length(held, _):
    return len(held)


def checksum(array, _):
    return zlib.crc32(array.tobytes())


class Seen(NamedTuple):
    """look(owner, name) gave this value."""

    look: Callable
    owner: Any
    name: Any
    value: Any

    def has_changed(self):
        try:
            now = untraced(self.look(self.owner, self.name))
            return now is not self.value and not now == self.value
        except Exception:  # it is gone, or an array, of which == makes another one
            return True


def glance_at(group):
    """(function, what it gives): for Seen of one owner or one name."""
    look, owner, name, _ = group[0]
    _, owners, names, values = zip(*group)
    if look is getattr:
        glance = functools.partial(map, operator.attrgetter(name), owners)
    elif look is operator.getitem and len(names) > 1:
        glance = functools.partial(operator.itemgetter(*names), owner)
    else:
        glance = functools.partial(map, look, owners, names)
    return glance, values


class Watched:
    """What functions compute with: their code; all that they find by a global name; and what is in
    that: items, attributes, methods, the numbers of small arrays."""

    def __init__(self, functions):
        self.roots = {id(function) for function in functions}
        self.found = {}  # what to look at → Seen
        self.met = {}  # id → value: held here, so that no other gets its id
        waiting = list(functions)
        while waiting:
            value = untraced(waiting.pop())
            if id(value) not in self.met:
                self.met[id(value)] = value
                waiting += self.parts_of(value)
        self.is_settled = False
        self.keep(self.found.values())

    def parts_of(self, value):
        """Notes what can be replaced in a value. Returns what may have such parts in its turn."""
        if isinstance(value, FunctionType):
            return self.read(value)
        if isinstance(value, tuple):
            return value
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, (staticmethod, classmethod)):
            return [value.__func__]
        if isinstance(value, property):
            return [value.fget]
        if isinstance(value, FunctionWithCache):
            return [value.__wrapped__]
        if isinstance(value, np.ndarray):
            self.note(checksum, value, [None] if value.size <= LARGE else [])
            return []
        kin = value.__bases__ if isinstance(value, type) else [type(value)]
        held = held_by(value)
        if held is None:
            return kin
        self.note(length, held, [None])
        return [*kin, *self.note(operator.getitem, held, names_in_held(held))]

    def read(self, function):
        """parts_of() a function: what it finds."""
        code = function.__code__
        if not is_own(code.co_filename):
            return []
        own = ("__code__", "__defaults__", "__kwdefaults__")
        found = self.note(getattr, function, [name for name in own if getattr(function, name)])
        found += self.note(operator.getitem, vars(function), names_in_held(vars(function)))
        own, names = function.__globals__, names_in(code)
        modules = [sys.modules.get(name) for name in names]  # that are imported within it
        namespaces = [own, *(vars(one) for one in modules if is_own_module(one))]
        self.note(look_up, own, [name for name in globals_in(code) if name not in own])
        for namespace in namespaces:  # it grows
            wanted = globals_in(code) if namespace is own else names
            there = [name for name in wanted if name in namespace]
            values = self.note(operator.getitem, namespace, there)
            for value in values:
                if isinstance(value, ModuleType) and is_own_module(value):
                    if not any(vars(value) is other for other in namespaces):
                        namespaces.append(vars(value))
            found += values
        for cell in function.__closure__ or ():
            found += self.note(getattr, cell, ["cell_contents"])
        return found

    def note(self, look, owner, names):
        values = []
        for name in names:
            with contextlib.suppress(ValueError):  # a cell that is empty yet
                seen = Seen(look, owner, name, untraced(look(owner, name)))
                self.found[look, id(owner), name] = seen
                values.append(seen.value)
        return values

    def keep(self, found):
        """Watches these Seen alone."""
        self.seen = list(found)
        groups = {}  # what one call can look at
        for seen in self.seen:
            by = id(seen.owner) if seen.look is operator.getitem else seen.name
            groups.setdefault((seen.look, by), []).append(seen)
        self.glances = [glance_at(group) for group in groups.values()]

    def changed(self):
        return [seen for seen in self.seen if seen.has_changed()]

    def has_changed(self):
        """Whether something was replaced."""
        try:
            if all(tuple(glance()) == values for glance, values in self.glances):
                return False
        except Exception:  # as in Seen.has_changed()
            pass
        return bool(self.changed())  # not if it is only traced

    def settle(self):
        """To be called when the functions have computed something: numbers that have changed are
        their own bookkeeping, as a counter, and no longer watched."""
        if not self.is_settled:
            self.is_settled = True
            changed = self.changed()
            code = (FunctionType, CodeType, type)
            mine = [id(seen) for seen in changed if not isinstance(seen.value, code)]
            if mine:
                self.keep([seen for seen in self.seen if id(seen) not in mine])

    def summary(self):
        """{(module, name): what it is}, for another process to compare with what it has."""
        found = {}
        for look, owner, name, value in self.seen:
            if look is operator.getitem and isinstance(owner, dict):
                module = owner.get("__name__")
                if module in sys.modules and vars(sys.modules[module]) is owner:
                    found[module, name] = digest(value)
            elif name == "__code__" and "." not in owner.__qualname__:
                found[owner.__module__, owner.__name__] = digest(owner)
        return found


def digest(value, depth=4):
    """What two processes can compare: the same for the same source."""
    if isinstance(value, FunctionWithCache):
        value = value.__wrapped__
    if isinstance(value, FunctionType):
        value = value.__code__
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, digest(value.co_consts)
    if isinstance(value, tuple):
        return tuple(digest(part, depth - 1) for part in value) if depth else "tuple"
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    if isinstance(value, np.ndarray) and value.size <= LARGE:
        return value.dtype.str, value.shape, checksum(value, None)
    held = held_by(value) if depth else None
    names = () if held is None else names_in_held(held)
    return type(value).__name__, *((digest(n), digest(held[n], depth - 1)) for n in names)


def different(summary):
    """The names of a summary that are something else in this process."""
    names = []
    for (module, name), expected in summary.items():
        try:
            here = digest(getattr(importlib.import_module(module), name))
        except Exception:  # the module cannot be loaded here, or lacks the name
            here = MISSING
        if here != expected:
            names.append(name)
    return names
