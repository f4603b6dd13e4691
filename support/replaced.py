"""Notices when what other processes compute with is replaced while the program lives.

`m.relu = leaky` in a notebook, a cell that is run again, a module loaded again: a process that was
copied before has the old function, and one that read the source anew has that. Half of a batch
would be computed with it, in silence.

What counts is code, wherever a function finds it, and what has a name: in a module, in a class, in
a table. Numbers in a list, in an array or in an object do not: many a program counts something
there from step to step.
"""

import contextlib
import functools
import importlib
import operator
import os
import sys
import types
from types import CodeType, FunctionType, ModuleType
from typing import Any, Callable, NamedTuple

from support.trace import untraced

MISSING = object()
LARGE = 1000  # a list or a table with more than this is data
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


CODE = (FunctionType, FunctionWithCache, CodeType, type, types.MethodType, functools.partial)


def is_users(kind):
    """Whether a class is the user's or the script's: objects of support/ change as they run."""
    return is_own_module(sys.modules.get(kind.__module__)) and "support." not in kind.__module__


def held_by(value):
    """(a table or a list, the keys in it of what can be replaced in a value)."""
    if isinstance(value, (list, dict)) and len(value) > LARGE:
        return {}, []
    if isinstance(value, list):
        return value, [i for i, part in enumerate(value) if isinstance(part, (*CODE, list, dict))]
    if isinstance(value, dict):
        return value, list(value)
    if isinstance(value, type) and is_users(value):
        # Of what Python adds to a class, only methods count.
        named = list(vars(value).items())  # another thread may add some
        keys = [k for k, a in named if isinstance(a, FunctionType) or not k.startswith("__")]
        return vars(value), keys
    if is_users(type(value)):
        named = getattr(value, "__dict__", {})
        return named, [k for k, a in list(named.items()) if isinstance(a, CODE)]
    return {}, []


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
        kin = value.__bases__ if isinstance(value, type) else [type(value)]
        return [*kin, *self.note(operator.getitem, *held_by(value))]

    def read(self, function):
        """parts_of() a function: what it finds."""
        code = function.__code__
        if not is_own(code.co_filename):
            return []
        own = ("__code__", "__defaults__", "__kwdefaults__")
        found = self.note(getattr, function, [name for name in own if getattr(function, name)])
        namespaces, names = [function.__globals__], names_in(code)
        for namespace in namespaces:  # it grows
            there = [name for name in names if name in namespace]
            values = self.note(operator.getitem, namespace, there)
            for value in values:
                if isinstance(value, ModuleType) and is_own_module(value):
                    if not any(vars(value) is other for other in namespaces):
                        namespaces.append(vars(value))
            found += values
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is empty yet
                is_code = isinstance(cell.cell_contents, CODE)
                found += self.note(getattr, cell, ["cell_contents"] if is_code else [])
                found.append(cell.cell_contents)
        return found

    def note(self, look, owner, names):
        values = []
        for name in names:
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


def digest(value):
    """What two processes can compare: the same for the same source."""
    if isinstance(value, FunctionWithCache):
        value = value.__wrapped__
    if isinstance(value, FunctionType):
        value = value.__code__
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, digest(value.co_consts)
    if isinstance(value, tuple):
        return tuple(digest(part) for part in value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    return type(value).__name__


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
