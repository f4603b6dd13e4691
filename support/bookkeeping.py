"""What a run does beside learning: its files, its log, its clock, and the wish to stop.

train() in mnist_resnet9.py calls goes_on, steps, after_step, epoch_is_whole, end_epoch and finish;
run_in() there calls is_finished, result, say_start and ask_to_stop. A first reading may skip this
file.
"""

import contextlib
import math
import sys
import time

import numpy as np
from tqdm import tqdm

from support import UserError, terminal
from support.progress import place_in_cell, progress_bar
from support.run_folder import duration, log_header, log_line, pack_metrics
from support.settings import project_path
from support.storage import pack_arrays, write_file

# The run ends after this many epochs in a row that could not be saved: going on would be wasted
# work.
UNSAVED_EPOCHS = 3


class Bookkeeper:
    """Keeps the books of a run.

    folder: its RunFolder. state: all that the training changes. pack(state): the bytes of a
    checkpoint. rate_of(step, steps): its learning rate. images, evaluated: how many an epoch learns
    from and how many it is evaluated on. on_gpu: whether the losses come from one."""

    def __init__(self, settings, folder, state, pack, rate_of, images, evaluated, on_gpu):
        self.settings, self.folder, self.state = settings, folder, state
        self.pack, self.rate_of, self.on_gpu = pack, rate_of, on_gpu
        self.images, self.evaluated = images, evaluated
        # The last step of an epoch may have fewer images.
        self.epoch_steps = math.ceil(images / settings.batch_size)
        self.total_steps = self.epoch_steps * settings.epochs_max
        # The number of the signal that asked for an end, or 0.
        self.stop = 0
        self.evaluating = ""  # the epoch that is being evaluated and saved, in words
        # Epochs in a row that could not be saved.
        self.unsaved = 0
        self.unwritten = {}  # path → bytes of the files of an epoch that are not on the disk yet
        self.flushed = True  # whether what was saved survives a power cut
        others = folder.read_others()
        self.metrics = [others.get(row["epoch"], {}) | row for row in state.history]
        self.place = self.bar = None  # where the progress bar is to stand, and the bar
        self.done = 0  # steps of this epoch that an earlier start has taken
        self.start_time = None  # when this start began the epoch
        # When it took its first step, and which that was.
        self.first_time = self.first_step = None

    def is_finished(self):
        return len(self.state.history) > self.settings.epochs_max

    def say_start(self, data, where, continued):
        """The first lines of the log. where: what computes, in words."""
        settings, folder = self.settings, self.folder
        self.place = place_in_cell()  # above the log, which would be cut in two below it
        for note in data.notes:
            folder.log(f"*** {note}")
        steps = "1 step" if self.epoch_steps == 1 else f"{self.epoch_steps} steps"
        steps = f"{self.images:,} images, {steps} an epoch"
        folder.log(f"{settings.tag}: {data.name}, {steps}")
        size = self.state.params.flat.size
        folder.log(f"{size:,} parameters; {where}; files in {terminal.shown(folder.path)}")
        if continued:
            folder.log(f"Continuing after step {self.state.step:,} of {self.total_steps:,}.")
        folder.log(log_header(settings.validation_images))

    def ask_to_stop(self, number):
        """The run is to end soon, because of the signal with this number. For a signal handler."""
        if self.evaluating and not self.stop:
            # The handler may have come in the middle of another line.
            with contextlib.suppress(RuntimeError, OSError):
                said = f"Stopping as soon as {self.evaluating} is evaluated and saved."
                tqdm.write(said, file=sys.stderr)
                sys.stderr.flush()
        self.stop = number

    def goes_on(self):
        """Whether there is another epoch to begin."""
        lost = self.unsaved >= UNSAVED_EPOCHS
        return not (self.stop or lost or self.is_finished())

    def steps(self, epoch):
        """The numbers of the steps of this epoch that are still to do, until somebody asks to stop.

        They come with a progress bar."""
        self.start_time = time.perf_counter()
        if self.first_time is None:
            self.first_time, self.first_step = self.start_time, self.state.step
        # 0, or where this epoch was interrupted.
        self.done = self.state.step - (epoch - 1) * self.epoch_steps
        with progress_bar(
            range(self.done, self.epoch_steps),
            f"epoch {epoch}",
            self.place,
            initial=self.done,
            total=self.epoch_steps,
            unit="step",
        ) as self.bar:
            for number in self.bar:
                yield number
                if self.stop:
                    return

    def after_step(self, loss):
        """Checks and shows the loss, and says once how long the run takes."""
        taken = self.state.step - self.first_step
        # A GPU's first steps take longer than the others, so more of them are timed.
        enough = 51 if self.on_gpu else 20
        timed = min(enough, self.epoch_steps - self.first_step % self.epoch_steps)
        # Reading a number makes a GPU finish all its work first, as the clock needs it.
        if not self.on_gpu or taken % 50 == 1 or taken == timed:
            epoch, number = divmod(self.state.step - 1, self.epoch_steps)
            self.check_finite(loss, f"epoch {epoch + 1}, step {number + 1}")
            self.bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
        if taken == timed:
            self.say_how_long((time.perf_counter() - self.first_time) / timed)

    def check_finite(self, loss, where):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss)} at {where}: "
                f"learning rate {self.settings.learning_rate:g} is probably too high; "
                f"the checkpoints in {self.folder.path} are those from before; "
                "try a lower one, with another --tag"
            )

    def say_how_long(self, step_seconds):
        epochs_left = self.settings.epochs_max + 1 - len(self.state.history)
        # In steps: its forward pass is a third of one.
        evaluation = self.evaluated / self.settings.batch_size / 3
        steps = self.total_steps - self.state.step + evaluation * epochs_left
        self.folder.log(
            f"About {duration(step_seconds * steps)} to epoch {self.settings.epochs_max} "
            f"on this machine. {terminal.how_to_stop()}"
        )

    def epoch_is_whole(self):
        """Whether all steps of the epoch that was begun are taken."""
        return self.state.step == len(self.state.history) * self.epoch_steps

    def end_epoch(self, evaluate):
        """Evaluates, logs and saves. evaluate: see evaluate_all() in mnist_resnet9.py."""
        settings, state, folder = self.settings, self.state, self.folder
        epoch = len(state.history)
        if epoch == 0:
            # It learns from no images.
            self.start_time, self.done = time.perf_counter(), self.epoch_steps
        trained = time.perf_counter() - self.start_time
        self.evaluating = f"epoch {epoch}"
        measured, predictions = evaluate()
        finite = state.is_finite()
        loss = measured["train_loss"] + measured["test_loss"]
        self.check_finite(loss if finite else math.nan, f"epoch {epoch}")
        seconds = time.perf_counter() - self.start_time

        rate = self.rate_of(max(0, state.step - 1), self.total_steps)
        state.history.append({"epoch": epoch, "learning_rate": rate, **measured})
        seen = max(0, self.images - self.done * settings.batch_size)
        times = {"seconds": seconds, "images_per_second": seen / seconds}
        self.metrics.append(state.history[-1] | times)
        # What the epoch would have taken, had it not been interrupted.
        whole = trained * self.images / max(1, seen) + seconds - trained
        folder.log(log_line(self.metrics[-1], whole * (settings.epochs_max - epoch)))

        self.unwritten[folder.path / "metrics.csv"] = pack_metrics(self.metrics)
        self.unwritten[folder.path / "predictions.npz"] = pack_arrays(**predictions)
        checkpoint = self.pack(state)
        if self.best()["epoch"] == epoch:
            self.unwritten[folder.best] = checkpoint
        self.unsaved = 0 if self.save(checkpoint) else self.unsaved + 1
        self.evaluating = ""

    def save(self, checkpoint):
        """Writes the files of the epoch, and then the checkpoint. Returns whether it could.

        An epoch is saved whole: where one of its files cannot be written, its checkpoint is not
        either, and whoever continues takes that epoch again."""
        folder = self.folder
        try:
            for path in list(self.unwritten):
                self.write(path, self.unwritten[path])
                del self.unwritten[path]
            self.write(folder.last, checkpoint, folder.previous)
            return True
        except OSError as error:
            folder.warn(
                f"{path if self.unwritten else folder.last} was NOT written "
                f"({error.strerror or error}). Training goes on; the next epoch tries again."
            )
            return False

    def write(self, path, data, previous=None):
        if not write_file(path, data, previous) and self.flushed:
            self.flushed = False
            self.folder.warn(
                f"The file system of {terminal.shown(path.parent)} cannot flush a folder: what is "
                "saved may not survive a power cut."
            )

    def finish(self):
        """The last line of the log. Returns the exit status."""
        if self.is_finished():
            return self.say_finished()
        return self.say_stopped() if self.stop else self.say_given_up()

    def say_finished(self):
        folder = self.folder
        words = [self.settings.tag]
        if folder.path.parent != project_path(type(self.settings).save_dir):
            words += ["--save-dir", terminal.shown(folder.path.parent)]
        figures = terminal.command("plot_figs", *words)
        folder.log(f"Finished. {self.result()} Figures: {figures}")
        if self.unsaved or folder.unlogged:
            folder.warn("Some files were not written: see above. The same command tries again.")
            return 1
        return 0

    def say_stopped(self):
        """Saves what there is after a stop signal."""
        saved = self.save(self.pack(self.state))
        what = "everything is saved" if saved else "what came after the last checkpoint is LOST"
        again = terminal.this_command()
        self.folder.log(f"Stopped after step {self.state.step:,}; {what}. To continue: {again}")
        return 128 + self.stop

    def say_given_up(self):
        """Ends a run whose epochs would be lost one after the other."""
        self.folder.log(
            f"*** The last {self.unsaved} epochs could not be saved, so the run ends here. "
            f"Make room in {terminal.shown(self.folder.path)}; to continue from what is saved: "
            f"{terminal.this_command()}"
        )
        return 1

    def best(self):
        """The row of the best epoch: by the images held out, where there are some."""
        by = "validation_accuracy" if self.settings.validation_images else "test_accuracy"
        # Rows of a run that was begun by other code may have NaN there, which is less than nothing.
        return max(self.state.history, key=lambda row: np.nan_to_num(row.get(by, -1), nan=-1))

    def result(self):
        last, best = self.state.history[-1], self.best()
        return (
            f"Test accuracy {last['test_accuracy']:.2%} at the last epoch ({last['epoch']}), "
            f"{best['test_accuracy']:.2%} at the best ({best['epoch']})."
        )
