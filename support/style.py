"""How the figures look: colours, Matplotlib's settings, and whether there is a screen for them."""

import io
import os
import sys

# Colours that colour-blind readers tell apart.
BLUE, ORANGE, INK, GREY = "#0072B2", "#D55E00", "#222222", "#707070"
# Where several runs share a panel.
LINES = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "legend.fontsize": 8,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.max_open_warning": 0,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 150,
}


def has_screen():
    """Whether windows can be opened: on Linux a display says so, elsewhere there is always one."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown) or not sys.platform.startswith("linux")


def in_notebook():
    """Whether this runs inside IPython, whose windows and figures are the user's."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def to_png(figure, **options):
    """The bytes of a PNG file with this figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **options)
    return stream.getvalue()
