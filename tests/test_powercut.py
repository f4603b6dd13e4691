"""A short form of reliability/powercut.py, and whether it would notice what it looks for."""

import os
import random
import sys
from pathlib import Path

import pytest

import mnist_resnet9 as m

sys.path.insert(0, str(m.ROOT / "benchmarks" / "reliability"))

import powercut
from faults import Operation

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for file names")


@pytest.mark.long
@pytest.mark.parametrize("scenario", powercut.SCENARIOS)
def test_every_state_after_a_power_cut_continues(scenario, tmp_path):
    kinds, problems = powercut.run(scenario, tmp_path, 8, random.Random(0))
    assert sum(kinds.values()) == 8 and not problems


def without_fsync(monkeypatch, unflushed):
    """Recorded runs then lack each fsync of a path for which unflushed(path).

    To make os.fsync itself do nothing would not do: watching() would still record its call."""
    watching = powercut.watching

    def less(folder, watch):
        def watch_less(operation):
            if not (operation.kind == "fsync" and unflushed(operation.path)):
                watch(operation)

        return watching(folder, watch_less)

    monkeypatch.setattr(powercut, "watching", less)


@pytest.mark.parametrize(
    "unflushed",
    [
        pytest.param(Path.is_file, id="files", marks=pytest.mark.long),
        pytest.param(Path.is_dir, id="folders", marks=pytest.mark.exhaustive),
    ],
)
def test_states_that_lose_a_run_are_found_where_nothing_is_flushed(
    unflushed, tmp_path, monkeypatch
):
    without_fsync(monkeypatch, unflushed)
    _, problems = powercut.run("continued", tmp_path, 40, random.Random(0))
    assert any(
        "it went back to step" in problem or "exit status" in problem for problem in problems
    )


@pytest.mark.long
def test_a_state_owes_what_had_been_saved_before_the_latest_cut_that_leads_to_it(
    tmp_path, monkeypatch
):
    """Where no folder is flushed, the disk may look at the end as it did at the start."""
    safe = powercut.prepare("continued", tmp_path)
    start = powercut.freeze(powercut.Disk(tmp_path).as_seen(), tmp_path)
    monkeypatch.setattr(powercut, "prepare", lambda *_: safe)
    without_fsync(monkeypatch, Path.is_dir)
    _, owed = powercut.record("continued", tmp_path)[start]
    assert (safe, owed) == (2 * powercut.STEPS, 4 * powercut.STEPS)


def test_a_write_that_is_not_recorded_is_noticed(tmp_path, monkeypatch):
    """Path.write_bytes does not go through the open() that is watched."""
    save = m.Bookkeeper.save

    def unwatched(self, checkpoint):
        (self.folder.path / "unseen").write_bytes(b"")
        return save(self, checkpoint)

    monkeypatch.setattr(m.Bookkeeper, "save", unwatched)
    with pytest.raises(AssertionError, match="the record lacks an operation"):
        powercut.record("fresh", tmp_path)


def test_what_is_on_the_disk_after_a_cut(tmp_path):
    """By hand: one file, written under another name and renamed over the old one."""
    path, part = tmp_path / "file", tmp_path / "file.part"
    path.write_bytes(b"old")
    disk = powercut.Disk(tmp_path)
    for operation in (
        Operation("open", part, new=True),
        Operation("write", part, data=b"new!"),
        Operation("rename", part, target=path),
    ):
        disk.do(operation)
    states = {powercut.freeze(state, tmp_path) for _, state in disk.states()}
    contents = {dict(state).get("file") for state in states}
    assert contents == {b"old", b"new!", b"", b"ne", bytes(4)}
    disk.do(Operation("fsync", path))
    states = {powercut.freeze(state, tmp_path) for _, state in disk.states()}
    assert {dict(state).get("file") for state in states} == {b"old", b"new!"}
    disk.do(Operation("fsync", tmp_path))
    (state,) = {powercut.freeze(state, tmp_path) for _, state in disk.states()}
    assert state == (("file", b"new!"),)


def test_a_folder_whose_name_was_not_flushed_may_be_missing(tmp_path):
    disk = powercut.Disk(tmp_path)
    disk.do(Operation("mkdir", tmp_path / "run"))
    disk.do(Operation("open", tmp_path / "run" / "log", new=True))
    disk.do(Operation("fsync", tmp_path / "run"))
    states = [dict(powercut.freeze(state, tmp_path)) for _, state in disk.states()]
    assert {} in states and {"run": None, "log": b""} not in states
    assert {"run": None, os.path.join("run", "log"): b""} in states
