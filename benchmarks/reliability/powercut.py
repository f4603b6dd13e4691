"""Simulates power cuts: every state in which one could leave a run's folder must continue well.

    python benchmarks/reliability/powercut.py               every state (some minutes)
    python benchmarks/reliability/powercut.py --states 200  this many of each scenario, at random

A run's file operations are recorded (faults.py). After each of them the power may fail. What is on
the disk then depends on what had been flushed:

- **Contents** that were not flushed by fsync may be there, lacking, there by half, or zeros.
- **Names** (made, renamed, deleted) that were not flushed by fsync of their folder may be missing.
  In order: all up to one of them are there. Pessimistic: any of them, whatever came before.
- The run's own folder is a name too, in save/: without a flush there, all of it may be missing.

In each state the same command is repeated. It must end with exit status 0 and the same bytes as a
run that nothing disturbed, with each epoch once in metrics.csv, and continue no earlier than from
the last checkpoint whose save had ended. Not modelled: a disk that says it flushed and
has not, damage to what was flushed long ago (torture.py does that), and writes out of order within
one file other than the four cases above.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from faults import watching

import mnist_resnet9 as m

FLAGS = "--channels 2,4,4,4 --train-images 64 --batch-size 32 --ema 0.5 --epochs-max 4".split()
FLAGS += ["--data-dir", str(m.ROOT / "data" / "sample"), "--device", "cpu", "--threads", "1"]
TAG = m.Settings.tag
STEPS = 2  # an epoch
CONTENTS = ("there", "lacking", "half", "zeros")


def train(save, epochs=4):
    """(exit status, what was said, the step that it continued from) of the run in save/."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = m.main([*FLAGS, "--save-dir", str(save), "--epochs-max", str(epochs)])
    text = said.getvalue()
    continued = re.search(r"Continuing after step ([\d,]+)", text)
    step = int(continued[1].replace(",", "")) if continued else 0
    if "is finished" in text:
        step = epochs * STEPS
    return status, text, step


def result(folder):
    """What must not depend on power cuts: the files' bytes, and the metrics but for times."""
    files = ("checkpoint_last.npz", "checkpoint_best.npz", "predictions.npz")
    rows = [line.split(",")[:6] for line in (folder / "metrics.csv").read_text().splitlines()]
    return [(folder / name).read_bytes() for name in files], rows


# ── The disk ──────────────────────────────────────────────────────────────────────────────────────


class Contents:
    """A file's bytes: as the program sees them, and as they were last flushed."""

    def __init__(self, now=b"", flushed=b""):
        self.now, self.flushed = now, flushed

    def after_a_cut(self, kind):
        if kind == "there" or self.now == self.flushed:
            return self.now
        if kind == "lacking":
            return self.flushed
        kept = self.flushed if self.now.startswith(self.flushed) else b""
        added = self.now[len(kept) :]
        return kept + (added[: len(added) // 2] if kind == "half" else bytes(len(added)))


class Disk:
    """The names and contents below save/, and which changes of names are not flushed yet."""

    def __init__(self, save):
        self.save = save
        self.seen = {}  # path → Contents, as the program sees it; a folder has None
        for path in save.rglob("*"):
            data = path.read_bytes() if path.is_file() else None
            self.seen[path] = None if data is None else Contents(data, data)
        self.flushed = dict(self.seen)
        self.pending = []  # (the folder, {path: Contents, None or GONE}) in order

    def change(self, names):
        """The program makes, renames or deletes; {path: what it is now}."""
        self.apply(self.seen, names)
        self.pending.append((next(iter(names)).parent, names))

    @staticmethod
    def apply(to, names):
        for path, what in names.items():
            if what == "gone":
                to.pop(path, None)
            else:
                to[path] = what

    def do(self, operation):
        path = operation.path
        if operation.kind == "mkdir":
            self.change({path: None})
        elif operation.kind == "open" and path not in self.seen:
            self.change({path: Contents()})
        elif operation.kind == "open" and operation.new:
            self.seen[path].now = b""
        elif operation.kind == "write":
            self.seen[path].now += operation.data
        elif operation.kind == "unlink":
            self.change({path: "gone"})
        elif operation.kind == "link":
            self.change({operation.target: self.seen[path]})
        elif operation.kind == "rename" and self.seen[path] is self.seen.get(operation.target):
            pass  # two names of one file: the system leaves both
        elif operation.kind == "rename":
            self.change({operation.target: self.seen[path], path: "gone"})
        elif operation.kind == "fsync" and path in self.seen and self.seen[path] is not None:
            self.seen[path].flushed = self.seen[path].now
        elif operation.kind == "fsync":  # a folder: its names are now on the disk
            for folder, names in self.pending:
                if folder == path:
                    self.apply(self.flushed, names)
            self.pending = [(folder, names) for folder, names in self.pending if folder != path]

    def as_seen(self):
        """{path: bytes; None for a folder} as the program sees them."""
        return {path: what and what.now for path, what in self.seen.items()}

    def states(self, most=64):
        """Every state after a cut now: how the names came out, {path: bytes; None for a folder}."""
        count = len(self.pending)
        chosen = {tuple(range(n)): "in order" for n in range(count + 1)}
        subsets = (c for n in range(count + 1) for c in itertools.combinations(range(count), n))
        for subset in itertools.islice(subsets, most):
            chosen.setdefault(subset, "any")
        for subset, order in chosen.items():
            names = dict(self.flushed)
            for i in subset:
                self.apply(names, self.pending[i][1])
            names = {path: what for path, what in names.items() if self.is_there(path, names)}
            for state in self.contents(names, most):
                yield order, state

    @staticmethod
    def contents(names, most):
        """{path: bytes; None for a folder} with each kind of contents for each unflushed file."""
        unsure = [what for what in names.values() if what and what.now != what.flushed]
        for kinds in itertools.islice(itertools.product(CONTENTS, repeat=len(unsure)), most):
            kind = dict(zip(map(id, unsure), kinds))
            yield {
                path: what and what.after_a_cut(kind.get(id(what), "there"))
                for path, what in names.items()
            }

    def is_there(self, path, names):
        """Whether all folders between save/ and the path are there."""
        between = itertools.takewhile(lambda folder: folder != self.save, path.parents)
        return all(folder in names for folder in between)


# ── Scenarios ─────────────────────────────────────────────────────────────────────────────────────


def prepare(scenario, save):
    """Puts what the scenario begins with into save/. Returns the step that is safely saved."""
    if scenario == "fresh":
        return 0
    train(save, epochs=2)
    if scenario == "damaged":
        (save / TAG / "checkpoint_last.npz").write_bytes(b"damaged")
        return STEPS
    return 2 * STEPS


def record(scenario, save):
    """{state: (how the names came out, the step that it must not fall behind)}, each state once."""
    safe = prepare(scenario, save)
    disk = Disk(save)
    states = {}
    last = save / TAG / "checkpoint_last.npz"
    renamed = False

    def watch(operation):
        nonlocal safe, renamed
        flush = operation.kind == "fsync" and operation.path == last.parent
        if renamed and not flush:  # the program goes on, so it takes the checkpoint for saved
            safe, renamed = saved_step(disk.seen[last].now), False
        add()
        disk.do(operation)
        renamed = renamed or (operation.kind == "rename" and operation.target == last)

    def add():
        for order, state in disk.states():
            state = freeze(state, save)
            # The same state can come of an earlier cut and of a later one: the later one, after
            # which more had been saved, says what the repeat owes.
            first, owed = states.get(state, (order, safe))
            states[state] = first, max(owed, safe)

    with watching(save, watch):
        status, text, _ = train(save)
    assert status == 0, text
    add()
    # Else something was written in a way that watching() does not see, and no state shows it.
    assert disk.as_seen() == Disk(save).as_seen(), "the record lacks an operation"
    return states


def saved_step(checkpoint):
    with m.np.load(io.BytesIO(checkpoint), allow_pickle=False) as arrays:
        return int(arrays["step"])


def freeze(state, save):
    """A state as a sorted tuple, so that equal ones are found."""
    return tuple(sorted((str(path.relative_to(save)), data) for path, data in state.items()))


def restore(state, save):
    shutil.rmtree(save, ignore_errors=True)
    save.mkdir()
    for name, data in state:  # sorted, so a folder comes before what is in it
        if data is None:
            (save / name).mkdir()
        else:
            (save / name).write_bytes(data)


def check(state, safe, save, expected):
    """What is wrong with how the run goes on from this state; None if nothing is."""
    restore(state, save)
    try:
        status, text, step = train(save)
    except Exception as error:  # a user would see a traceback; the other states are still tried
        return f"{type(error).__name__}: {error}"
    if status:
        return f"exit status {status}: {text.strip().splitlines()[-1]}"
    if step < safe:
        return f"it went back to step {step}, though step {safe} had been saved"
    if result(save / TAG) != expected:
        return "it ended with other bytes, metrics or log lines"
    return None


def run(scenario, work, states, rng):
    """Checks the states of a scenario. Returns their kinds, counted, and a list of what failed."""
    expected_save, save = work / "whole", work / "save"
    save.mkdir(exist_ok=True)
    if not expected_save.exists():
        assert train(expected_save)[0] == 0
    expected = result(expected_save / TAG)
    found = list(record(scenario, save).items())
    if states and states < len(found):
        found = rng.sample(found, states)
    kinds, problems = collections.Counter(), []
    for state, (order, safe) in found:
        kinds[order] += 1
        problem = check(state, safe, save, expected)
        if problem:
            digest = hashlib.sha256(repr(state).encode()).hexdigest()[:8]
            files = ", ".join(
                name for name, data in state if data is not None and "/code/" not in name
            )
            problems.append(f"{scenario}, {order}, state {digest} ({files}): {problem}")
    shutil.rmtree(save)
    return kinds, problems


SCENARIOS = ("fresh", "continued", "damaged")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=0, help="of each scenario; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    rng, failed = random.Random(o.seed), 0
    with tempfile.TemporaryDirectory() as work:
        for scenario in SCENARIOS:
            kinds, problems = run(scenario, Path(work), o.states, rng)
            counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            print(f"{scenario}: {sum(kinds.values())} states ({counted}), {len(problems)} failed")
            print(*problems[:20], sep="\n", end="\n" if problems else "", flush=True)
            failed += len(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
