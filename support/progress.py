"""Progress bars: on a terminal and in a cell of a notebook; none where output goes to a file."""

import io
import os
import sys

from tqdm import tqdm

from support import terminal

# Seconds between two looks of a bar. A notebook that runs `!python mnist_resnet9.py` gives it a
# terminal, but keeps whatever comes there: a line for every look.
SECONDS, SECONDS_IN_STORED = 0.1, 10
SECONDS_IN_CELL = 0.5


def place_in_cell():
    """An output of the cell in which bars can stand, one after the other; None without a cell.

    Each look replaces the one before, so the notebook that is saved has none of them."""
    if not terminal.in_notebook() or sys.stderr.isatty():
        return None
    from IPython import get_ipython
    from IPython.display import display

    if not hasattr(get_ipython(), "kernel"):
        return None
    return display({"text/plain": ""}, raw=True, display_id=True)


class CellBar(tqdm):
    """A bar that stands in a place_in_cell()."""

    def __init__(self, *arguments, place, **options):
        self.place = place
        super().__init__(*arguments, file=io.StringIO(), mininterval=SECONDS_IN_CELL, **options)

    def status_printer(self, _file):
        return lambda text: self.place.update({"text/plain": text.strip()}, raw=True)


def progress_bar(numbers, what, place=None, **options):
    """tqdm(numbers, …), where somebody sees it. place: see place_in_cell()."""
    if place is not None:
        return CellBar(numbers, what, place=place, ncols=90, leave=False, **options)
    # Set by Jupyter for its kernels, and handed down to what they start.
    stored = "JPY_PARENT_PID" in os.environ
    options["mininterval"] = SECONDS_IN_STORED if stored else SECONDS
    return tqdm(numbers, what, leave=False, disable=None, dynamic_ncols=True, **options)
