"""A setting with its help and its range, and the command line on which every setting is a flag."""

import argparse
import os
from dataclasses import field, fields
from pathlib import Path

from support import UserError


def setting(default, help, between=None, choices=None):
    """A dataclass field: its default, what it does, and which values make sense."""
    return field(default=default, metadata={"help": help, "between": between, "choices": choices})


def check_settings(settings):
    """UserError if a field has a value of another type than its own, or one that makes no sense."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        between = f.metadata["between"]
        choices = f.metadata["choices"]
        if type(value) is not f.type and (f.type, type(value)) != (float, int):
            raise UserError(f"{f.name} is {value!r}, but should be of type {f.type.__name__}")
        if choices and value not in choices:
            raise UserError(f"{f.name} is {value!r}, but should be one of {', '.join(choices)}")
        if between and not between[0] <= value <= between[1]:
            raise UserError(f"{f.name} is {value}, but should be from {between[0]} to {between[1]}")


def whole_numbers(text):
    """'4,16,32,64' → (4, 16, 32, 64)."""
    return tuple(int(part) for part in text.split(","))


METAVARS = {str: "STR", int: "INT", float: "FLOAT", tuple: "K,K,K,K"}


class Parser(argparse.ArgumentParser):
    """argparse with a flag for each setting, and a UserError in place of printing its usage."""

    def read_settings(self, kind, arguments):
        """{name: value} of the flags that were given, with one for each field of `kind`.

        epochs_max is --epochs-max."""
        for f in fields(kind):
            choices = f.metadata["choices"]
            default = ",".join(map(str, f.default)) if f.type is tuple else f.default
            self.add_argument(
                f"--{f.name.replace('_', '-')}",
                type=whole_numbers if f.type is tuple else f.type,
                choices=choices,
                default=argparse.SUPPRESS,  # only what was given is in the result
                metavar=None if choices else METAVARS[f.type],
                help=f"{f.metadata['help']} (default: {default})",
            )
        given = vars(self.parse_args(arguments))
        for name in given.keys() & {"data_dir", "save_dir"}:
            # A path on the command line starts where the user is, not where the program is. Shells
            # leave the ~ in --data-dir=~/mnist.
            given[name] = str(Path(os.path.expanduser(given[name])).absolute())
        return given

    def error(self, message):
        if "unrecognized arguments" in message:
            flags = (a.option_strings[-1] for a in self._actions if a.option_strings)
            message += f"; the flags are {' '.join(flags)}"
        raise UserError(message)
