"""A setting with its help and its range, and the command line on which every setting is a flag."""

import argparse
from dataclasses import field, fields
from pathlib import Path

from support import UserError


def setting(default, help, between=None, choices=None):
    """A dataclass field: its default, what it does, and which values make sense."""
    return field(default=default, metadata={"help": help, "between": between, "choices": choices})


def check_settings(settings):
    """UserError if a field has a value of another type than its own, or one that makes no sense."""
    for f in fields(settings):
        value, between, choices = (
            getattr(settings, f.name),
            f.metadata["between"],
            f.metadata["choices"],
        )
        if type(value) is not f.type and (f.type, type(value)) != (float, int):
            raise UserError(f"{f.name} is {value!r}, but should be of type {f.type.__name__}")
        if choices and value not in choices:
            raise UserError(f"{f.name} is {value!r}, but should be one of {', '.join(choices)}")
        if between and not between[0] <= value <= between[1]:
            raise UserError(f"{f.name} is {value}, but should be from {between[0]} to {between[1]}")


def whole_numbers(text):
    """'4,16,32,64' → (4, 16, 32, 64)."""
    return tuple(int(part) for part in text.split(","))


class Parser(argparse.ArgumentParser):
    """argparse with a flag for each setting, and a UserError in place of printing its usage."""

    def read_settings(self, kind, arguments):
        """{name: value} of the flags that are given, those of the fields of `kind` among them:
        epochs_max is --epochs-max."""
        for f in fields(kind):
            read, choices = whole_numbers if f.type is tuple else f.type, f.metadata["choices"]
            default = ",".join(map(str, f.default)) if f.type is tuple else f.default
            self.add_argument(f"--{f.name.replace('_', '-')}", type=read, choices=choices, default=argparse.SUPPRESS,
                              metavar=None if choices else f.type.__name__.upper().replace("TUPLE", "K,K,K,K"),
                              help=f"{f.metadata['help']} (default: {default})")  # fmt: skip
        given = vars(self.parse_args(arguments))
        for name in given.keys() & {
            "data_dir",
            "save_dir",
        }:  # a path on the command line starts where the user is
            given[name] = str(Path(given[name]).absolute())
        return given

    def error(self, message):
        if "unrecognized arguments" in message:
            message += f"; the flags are {' '.join(a.option_strings[-1] for a in self._actions if a.option_strings)}"
        raise UserError(message)
