"""Settings written as a card, a line each, and the command line on which each of them is a flag.

    dropout: float = 0.9  # share of the features that a training step switches off

The comment is the help. Choices are in the type, as Literal["max", "avg"].
"""

import argparse
import inspect
import io
import numbers
import os
import re
import textwrap
import tokenize
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin

from support import ROOT, UserError, terminal


def settings_class(cls):
    """A frozen dataclass, however its defaults are written: they are there to be edited.

    `dropout = 0.5` and `channels = [4, 8, 8, 8]` are as good as `dropout: float = 0.5` and a tuple.
    What is wrong with a value, or a default missing, check_settings() says."""
    comments, given = comments_of(cls), getattr(cls, "__annotations__", {})
    without = {name: None for name in given if not hasattr(cls, name)}
    types = {}
    for name, default in (without | dict(vars(cls))).items():
        # Methods and properties are descriptors, nested classes are callable: neither is a setting.
        if name.startswith("_") or hasattr(default, "__get__") or callable(default):
            continue
        # Dataclasses take no list, as all objects would share it.
        default = tuple(default) if isinstance(default, list) else default
        kind = given.get(name, type(default))
        choices = get_args(kind) if get_origin(kind) is Literal else None
        types[name] = type(choices[0]) if choices else kind
        help = comments.get(name, "")
        setattr(cls, name, field(default=default, metadata={"help": help, "choices": choices}))
    cls.__annotations__ = types
    lines = [f"{name}: {comments[name]}" for name in types if name in comments]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", *lines])
    return dataclass(frozen=True)(cls)


def comments_of(cls):
    """{field: the comment behind it} in the source of a class; {} where the source is not there."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = re.match(r"\s*(\w+)\s*[:=]", token.line)
        if token.type == tokenize.COMMENT and name:
            found[name[1]] = token.string.lstrip("# ")
    return found


KINDS = {
    str: "a text in quotes",
    int: "a whole number, without a point or quotes",
    float: "a number, without quotes",
    tuple: "several numbers, as (4, 16, 32, 64)",
}


def check_settings(settings, ranges):
    """UserError if a field has a value of another type than its own, or one that makes no sense.

    ranges: {field: (least, largest)}."""
    for f in fields(settings):
        value = as_python(getattr(settings, f.name))
        # The way into a frozen dataclass.
        object.__setattr__(settings, f.name, value)
        choices = f.metadata.get("choices")
        if value is None:
            raise UserError(f"the setting {f.name} has no default: give it one, as {f.name} = …")
        if type(value) is not f.type and (f.type, type(value)) != (float, int):
            kind = KINDS.get(f.type, f"of type {f.type.__name__}")
            raise UserError(f"{f.name} is {value!r}, but should be {kind}")
        if choices and value not in choices:
            raise UserError(f"{f.name} is {value!r}, but should be one of {', '.join(choices)}")
        low, high = ranges.get(f.name, (value, value))
        if not low <= value <= high:
            raise UserError(f"{f.name} is {value}, but should be from {low} to {high}")


def as_python(value):
    """Lists as tuples, NumPy's numbers and texts as Python's."""
    if isinstance(value, (list, tuple)):
        return tuple(as_python(one) for one in value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


# Names that Windows keeps for devices, whatever follows them after a dot.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)


def check_folder_name(tag):
    """UserError if this cannot name a folder on every system."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", tag) or tag.endswith("."):
        raise UserError(
            f"tag {tag!r} cannot name a folder: "
            "use letters, digits, '.', '_' and '-', at most 100, and no '.' at the end"
        )
    if RESERVED.fullmatch(tag):
        raise UserError(f"tag {tag!r} is a device's name on Windows: choose another")


def number(text):
    try:
        return int(text)
    except ValueError:
        return float(text)


def numbers_in(text):
    """'4,16,32,64' → (4, 16, 32, 64)."""
    return tuple(number(part) for part in text.split(","))


def user_path(text):
    """A path on the command line starts where the user is, not where the program is."""
    try:
        return os.path.abspath(os.path.expanduser(text))
    except OSError:
        raise UserError(f"{text}: the current folder is gone; give the path from / on") from None


def project_path(text):
    """A path in the settings starts at the project's folder, wherever the user is."""
    return ROOT / os.path.expanduser(text)


METAVARS = {str: "STR", int: "INT", float: "FLOAT", tuple: "K,K,K,K"}


class Parser(argparse.ArgumentParser):
    """argparse with a flag for each setting, and a UserError in place of printing its usage."""

    def __init__(self, **options):
        if terminal.in_notebook():  # sys.argv is the notebook's
            options.setdefault("prog", "main()")
        # Or --t would be --threads or --tag, until another setting begins so.
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def read_settings(self, kind, arguments):
        """{name: value} of the flags that were given, with one for each field of `kind`.

        epochs_max is --epochs-max."""
        for f in fields(kind):
            help, choices = f.metadata["help"], f.metadata["choices"]
            several = isinstance(f.default, tuple)
            default = ",".join(map(str, f.default)) if several else f.default
            if f.type is bool:
                # --nesterov and --no-nesterov
                options = {"action": argparse.BooleanOptionalAction}
            else:
                options = {
                    "type": numbers_in if f.type is tuple else f.type,
                    "choices": choices,
                    "metavar": None if choices else METAVARS.get(f.type),
                }
            # Only what was given is in the result.
            flag = f"--{f.name.replace('_', '-')}"
            added = self.add_argument(flag, default=argparse.SUPPRESS, **options)
            # Not before: to some flags Python 3.9 adds a default of its own.
            added.help = f"{help} (default: {default})".replace("%", "%%")
        given = vars(self.parse_args(arguments))
        for name in given.keys() & {"data_dir", "save_dir"}:
            given[name] = user_path(given[name])
        return given

    def error(self, message):
        if "unrecognized arguments" in message:
            flags = (a.option_strings[-1] for a in self._actions if a.option_strings)
            message += f"; the flags are {' '.join(flags)}"
        raise UserError(message)
