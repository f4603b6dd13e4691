"""How the figures look: colours, Matplotlib's settings, and whether there is a screen for them.

Matplotlib takes long to load, so it is loaded by those who ask for it.
"""

import contextlib
import io
import os
import re
import sys

from support import UserError, terminal

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


def load_pyplot():
    """matplotlib.pyplot. UserError says in a line what keeps Matplotlib from loading."""
    # `!python plot_figs.py` in a notebook inherits its backend, which serves the notebook alone.
    if "IPython" not in sys.modules and "inline" in os.environ.get("MPLBACKEND", ""):
        del os.environ["MPLBACKEND"]
    try:
        import matplotlib.pyplot
    except OSError:
        raise UserError(
            "Matplotlib finds no folder that it can write its cache to; "
            "name one in the environment variable MPLCONFIGDIR"
        ) from None
    except ValueError as error:
        raise UserError(f"Matplotlib refuses the user's settings ({error})") from None
    return matplotlib.pyplot


def load_backend():
    """Loads what brings pyplot's figures to the screen, or Agg, which brings them to files alone.

    It changes some of Matplotlib's settings for good, in a notebook above all. So it must not come
    as late as the first figure, when our_style() is about to undo all changes."""
    plt = load_pyplot()
    import matplotlib

    # In a notebook windows and figures are the user's.
    if not has_screen() and not terminal.in_notebook():
        matplotlib.use("Agg")
    try:
        plt.draw_if_interactive()  # which draws nothing yet, but needs the backend
    except ImportError as error:
        print(f"*** No window can be opened ({error}): the figures go to files alone.")
        matplotlib.use("Agg")


@contextlib.contextmanager
def our_style():
    """Within this block figures look like ours, whatever the user's matplotlibrc and styles say."""
    plt = load_pyplot()
    load_backend()
    with plt.style.context("default"), plt.rc_context(STYLE):
        yield


def shows_windows():
    """Whether the backend that is loaded opens windows."""
    from matplotlib.backends import BackendFilter, backend_registry

    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    return load_pyplot().get_backend().lower() in windows


def shows_figures():
    """Whether figures come to the screen, in windows or in a notebook, and not to files alone."""
    if terminal.in_notebook() and load_pyplot().get_backend().lower() != "agg":
        return True
    return shows_windows()


def show():
    """Brings all figures to the screen, in the order in which they were made."""
    plt = load_pyplot()
    if terminal.in_notebook():
        # It shows the figures of the user that are open, too, in the user's style.
        plt.show()
    else:
        with our_style():  # zooming in a window makes new ticks
            plt.show(block=True)


def to_png(figure, **options):
    """The bytes of a PNG file with this figure."""
    replace_missing_letters(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **options)
    return stream.getvalue()


def replace_missing_letters(figure):
    """Puts a � for each letter that the font of a text lacks: a run or a picture may have any name.

    Matplotlib would warn of each, every time that it draws."""
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        written = text.get_text()
        if re.search(r"[^ -~\n]", written):
            there = get_font(findfont(text.get_fontproperties())).get_charmap()
            known = [c if ord(c) in there or c == "\n" else "\ufffd" for c in written]
            text.set_text("".join(known))
