"""A setting with its help and its range, and the command line on which every setting is a flag."""

import argparse
import os
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

from support import ROOT, UserError, terminal


def setting(default, help, between=None, choices=None):
    """A dataclass field: its default, what it does, and which values make sense."""
    if isinstance(default, list):  # dataclasses take none, as all objects would share it
        default = tuple(default)
    return field(default=default, metadata={"help": help, "between": between, "choices": choices})


def settings_class(cls):
    """A frozen dataclass, however its defaults are written: they are there to be edited.

    `dropout: float = 0.5` and `dropout = 0.5` are as good as `dropout: float = setting(0.5, …)`,
    but for the help and the range. What is wrong with a value, check_settings() says."""
    types = {}
    for name, default in list(vars(cls).items()):
        if name.startswith("_") or callable(default):
            continue
        if not isinstance(default, Field):
            default = setting(default, "edited by hand")
            setattr(cls, name, default)
        types[name] = cls.__annotations__.get(name, type(default.default))
    cls.__annotations__ = types
    return dataclass(frozen=True)(cls)


KINDS = {
    str: "a text in quotes",
    int: "a whole number, without a point or quotes",
    float: "a number, without quotes",
    tuple: "several numbers, as (4, 16, 32, 64)",
}


def check_settings(settings):
    """UserError if a field has a value of another type than its own, or one that makes no sense."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(settings, f.name, value)  # the way into a frozen dataclass
        between = f.metadata.get("between")
        choices = f.metadata.get("choices")
        if type(value) is not f.type and (f.type, type(value)) != (float, int):
            kind = KINDS.get(f.type, f"of type {f.type.__name__}")
            raise UserError(f"{f.name} is {value!r}, but should be {kind}")
        if choices and value not in choices:
            raise UserError(f"{f.name} is {value!r}, but should be one of {', '.join(choices)}")
        if between and not between[0] <= value <= between[1]:
            raise UserError(f"{f.name} is {value}, but should be from {between[0]} to {between[1]}")


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


def whole_numbers(text):
    """'4,16,32,64' → (4, 16, 32, 64)."""
    return tuple(int(part) for part in text.split(","))


def user_path(text):
    """A path on the command line starts where the user is, not where the program is."""
    try:
        return os.path.abspath(Path(text).expanduser())
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
        super().__init__(**options)

    def read_settings(self, kind, arguments):
        """{name: value} of the flags that were given, with one for each field of `kind`.

        epochs_max is --epochs-max."""
        for f in fields(kind):
            choices = f.metadata.get("choices")
            several = isinstance(f.default, tuple)
            default = ",".join(map(str, f.default)) if several else f.default
            self.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=whole_numbers if f.type is tuple else f.type,
                choices=choices,
                default=argparse.SUPPRESS,  # only what was given is in the result
                metavar=None if choices else METAVARS.get(f.type),
                help=f"{f.metadata.get('help', '')} (default: {default})".replace("%", "%%"),
            )
        given = vars(self.parse_args(arguments))
        for name in given.keys() & {"data_dir", "save_dir"}:
            given[name] = user_path(given[name])
        return given

    def error(self, message):
        if "unrecognized arguments" in message:
            flags = (a.option_strings[-1] for a in self._actions if a.option_strings)
            message += f"; the flags are {' '.join(flags)}"
        raise UserError(message)
