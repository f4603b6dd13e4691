"""What supports the training and learns nothing: a reader of mnist_resnet9.py may skip all of it.

Nothing in this folder imports mnist_resnet9: run as a program, it would be loaded a second time.
"""

from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def with_known(settings, **values):
    """The settings with these values, but for those that they do not have."""
    known = {name: value for name, value in values.items() if hasattr(settings, name)}
    return replace(settings, **known)


class UserError(ValueError):
    """Something the user can put right. main() prints it in one line; the exit status is 2."""

    def _render_traceback_(self):
        """What a notebook shows of it, in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]
