"""A window to draw digits in with the mouse; beside it, live, what the network sees and its ten
probabilities."""

import time

import numpy as np
from PIL import Image, ImageDraw

from support.style import BLUE, GREY, load_pyplot, our_style, shows_windows

plt = load_pyplot()

SIZE = 280  # pixels of the paper's side
PEN = 20  # pixels
PAUSE = 0.1  # seconds between two answers while the mouse moves
CLEAR_KEYS = ("c", "delete", "backspace", "escape", " ")
HINT = "Draw a digit with the mouse.  c or Delete: clear   q: close"


class NoWindow(Exception):
    """Why no window can be opened here."""


class Pad:
    """The window. answer: a picture (H, W, 3) → (image (28, 28), probabilities (10,), what to say),
    or None."""

    def __init__(self, answer):
        self.answer = answer
        with plt.rc_context({"toolbar": "None"}):
            self.figure = plt.figure("predict.py --draw", figsize=(9.6, 4.2), layout="constrained")
        manager = self.figure.canvas.manager
        # Matplotlib's own c and backspace mean other things.
        if manager is not None and manager.key_press_handler_id is not None:
            self.figure.canvas.mpl_disconnect(manager.key_press_handler_id)
        left, middle, right = self.figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        self.paper_axes = left
        self.shown = left.imshow(
            np.zeros((SIZE, SIZE)), cmap="gray_r", vmin=0, vmax=255, extent=(0, SIZE, SIZE, 0)
        )
        left.set(xticks=(), yticks=(), title="your digit")
        self.seen = middle.imshow(np.zeros((28, 28)), cmap="gray", vmin=0, vmax=255)
        middle.set(xticks=(), yticks=(), title="what the network sees")
        self.bars = right.barh(range(10), np.zeros(10), color=GREY)
        right.set(yticks=range(10), ylim=(9.6, -0.6), xlim=(0, 1), xticks=(0, 0.5, 1))
        right.set_xticklabels(("0%", "50%", "100%"))
        self.right = right
        self.figure.supxlabel(HINT, size=9, color="0.4")
        self.last, self.answered = None, 0.0
        self.clear()
        reactions = {
            "button_press_event": self.press,
            "motion_notify_event": self.move,
            "button_release_event": self.release,
            "key_press_event": self.key,
        }
        for event, what in reactions.items():
            self.figure.canvas.mpl_connect(event, what)

    def show(self):
        """Until it is closed.

        Matplotlib holds its listeners weakly: the pad has to stay in use."""
        with our_style():
            plt.show(block=True)

    def clear(self):
        self.paper = Image.new("L", (SIZE, SIZE), 0)
        self.update()

    def press(self, event):
        if event.inaxes is self.paper_axes and event.button == 1:
            self.last = (event.xdata, event.ydata)
            self.stroke(event)

    def move(self, event):
        if self.last is None:
            return
        if event.inaxes is not self.paper_axes:
            self.last = None
            self.update()
        else:
            self.stroke(event)

    def release(self, event):
        if self.last is not None:
            self.last = None
            self.update()

    def key(self, event):
        if event.key in CLEAR_KEYS:
            self.clear()
        elif event.key == "q":
            plt.close(self.figure)

    def stroke(self, event):
        """A line with round ends from the last point to this one."""
        here, pen, r = (event.xdata, event.ydata), ImageDraw.Draw(self.paper), PEN / 2
        pen.line([self.last, here], fill=255, width=PEN)
        for x, y in (self.last, here):
            pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
        self.last = here
        self.shown.set_data(np.asarray(self.paper))
        if time.monotonic() - self.answered > PAUSE:
            self.update()
        else:
            self.figure.canvas.draw_idle()

    def update(self):
        paper = np.asarray(self.paper)
        self.shown.set_data(paper)
        answer = None
        if paper.any():
            picture = np.repeat(255 - np.pad(paper, 20)[..., None], 3, axis=2)
            answer = self.answer(picture)
        image, probabilities, text = answer or (np.zeros((28, 28)), np.zeros(10), "")
        self.seen.set_data(image)
        for bar, p in zip(self.bars, probabilities):
            bar.set_width(p)
            bar.set_color(BLUE if p and p == max(probabilities) else GREY)
        self.right.set_title(text or " ", size=10)
        self.answered = time.monotonic()
        self.figure.canvas.draw_idle()


def open_pad(answer):
    """The window, not yet shown. NoWindow says why there can be none."""
    try:
        plt.draw_if_interactive()  # loads the backend, or says why it cannot
        if not shows_windows():
            raise NoWindow(f"Matplotlib's backend here is {plt.get_backend()}, which opens none")
        with our_style():
            return Pad(answer)
    # Each toolkit has its own for a display that cannot be reached.
    except Exception as error:
        raise NoWindow(str(error) or type(error).__name__) from None
