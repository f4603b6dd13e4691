"""Notices when what other processes compute with is replaced while the program lives.

`m.relu = leaky` in a notebook, a cell that is run again, a module loaded again: a process that was
copied before has the old function, and one that read the source anew has that. Half of a batch
would be computed with it, in silence.
"""

import contextlib
import functools
import importlib
import os
import sys
from types import CodeType, FunctionType, ModuleType

MISSING = object()
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


class Watched:
    """What functions compute with: their code, and all that they find by a global name."""

    def __init__(self, functions):
        self.roots = set(functions)  # functions and classes
        self.codes = {}  # function → its code
        self.places = {}  # (id of the namespace, name) → (namespace, name, value)
        waiting, met = list(functions), set()
        while waiting:
            value = waiting.pop()
            if id(value) in met:
                continue
            met.add(id(value))
            if isinstance(value, FunctionType):
                waiting += self.read(value)
            elif isinstance(value, type):
                if is_own_module(sys.modules.get(value.__module__)):
                    waiting += [f for f in vars(value).values() if isinstance(f, FunctionType)]
            elif isinstance(value, (list, tuple)):
                waiting += value
            elif isinstance(value, functools.partial):
                waiting.append(value.func)
            elif isinstance(value, FunctionWithCache):
                waiting.append(value.__wrapped__)

    def read(self, function):
        """Notes what the function finds. Returns what may be functions in their turn."""
        code = function.__code__
        if not is_own(code.co_filename):
            return []
        self.codes[function] = code
        names = names_in(code)
        found = self.note(function.__globals__, names)
        for value in list(found):
            if isinstance(value, ModuleType) and is_own_module(value):
                found += self.note(vars(value), names)
            elif type(value) is dict:  # a table of functions
                found += self.note(value, list(value))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # empty yet
                found.append(cell.cell_contents)
        return found + list(function.__defaults__ or ())

    def note(self, namespace, names):
        found = [(name, namespace[name]) for name in names if name in namespace]
        for name, value in found:
            self.places[id(namespace), name] = (namespace, name, value)
        return [value for _, value in found]

    def has_changed(self, functions=()):
        """Whether something was replaced, or others than these are to be computed with now."""
        return (
            not self.roots.issuperset(functions)
            or any(function.__code__ is not code for function, code in self.codes.items())
            or any(
                namespace.get(name, MISSING) is not value
                for namespace, name, value in self.places.values()
            )
        )

    def summary(self):
        """{(module, name): what it is}, for another process to compare with what it has."""
        found = {}
        for namespace, name, value in self.places.values():
            module = namespace.get("__name__")
            if module in sys.modules and vars(sys.modules[module]) is namespace:
                found[module, name] = digest(value)
        for function in self.codes:
            if "." not in function.__qualname__:
                found[function.__module__, function.__name__] = digest(function)
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
