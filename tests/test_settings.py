"""The settings at the top of the script are there to be edited: what a slip there is answered with,
and which ways to write a default are all the same."""

import importlib.util
import sys

import pytest

import mnist_resnet9 as m

SOURCE = (m.ROOT / "mnist_resnet9.py").read_text(encoding="utf-8")
SMALL = ["--data-dir", "data/sample", "--device", "cpu", "--threads", "1", "--epochs-max", "1"]
SMALL += ["--train-images", "64", "--batch-size", "32"]


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """edited({old: new, …}): the script with that done to its text, as a module."""

    def load(edits):
        text = SOURCE
        for old, new in edits.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "edited.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", module)  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    return load


DROPOUT = """    dropout: float = setting(
        0.9, "share of the features that a training step switches off", between=(0, 0.9999)
    )
"""
CHANNELS = (
    '    channels: tuple = setting((4, 16, 32, 64), "channels after conv1, conv2, conv5 and conv6")'
)
EPOCHS = '    epochs_max: int = setting(200, "passes over the training images", between=(1, 10**6))'


SLIPS = {
    "a text for a number": (DROPOUT, DROPOUT.replace("0.9,", '"0.5",'), "dropout is '0.5'"),
    "out of range": (DROPOUT, DROPOUT.replace("0.9,", "1,"), "dropout is 1, but should be from 0"),
    "a float for a whole number": (EPOCHS, EPOCHS.replace("200", "10.0"), "epochs_max is 10.0"),
    "a number in quotes": (EPOCHS, EPOCHS.replace("200", '"50"'), "epochs_max is '50'"),
    "a plain slip": (EPOCHS, "    epochs_max: int = 10.0", "epochs_max is 10.0"),
    "a tag with a blank": ('setting("resnet9",', 'setting("my run",', "tag 'my run' cannot name"),
    "an unknown device": (
        '        "auto", "auto takes',
        '        "cuda", "auto takes',
        "auto, cpu",
    ),
    "an unknown pool": ('setting("max", "what', 'setting("average", "what', "one of max, avg"),
    "three channels": ("(4, 16, 32, 64)", "(4, 16, 32)", "channels (4, 16, 32) should be four"),
    "one channel": ("setting((4, 16, 32, 64),", "setting(16,", "channels is 16, but should be sev"),
    "half a channel": ("(4, 16, 32, 64)", "[4, 16, 32.5, 64]", "channels (4, 16, 32.5, 64) should"),
    "a recipe's value": ("    warm_up=0.15,", '    warm_up="0.15",', "warm_up is '0.15'"),
    "a recipe's name": ("    warm_up=0.15,", "    warmup=0.15,", "recipe quick sets 'warmup'"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_at_the_top_of_the_script_gets_one_line(slip, edited, capsys):
    old, new, said = SLIPS[slip]
    module = edited({old: new})
    assert module.main(["--recipe", "quick"] if "recipe" in slip else []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


@pytest.mark.parametrize("slip", SLIPS)
def test_help_is_there_all_the_same(slip, edited, capsys):
    old, new, _ = SLIPS[slip]
    assert edited({old: new}).main(["--help"]) == 0 and "--dropout" in capsys.readouterr().out


WAYS = {
    "a list": (CHANNELS, CHANNELS.replace("(4, 16, 32, 64)", "[2, 4, 4, 4]")),
    "a plain tuple": (CHANNELS, "    channels: tuple = (2, 4, 4, 4)"),
    "a plain list": (CHANNELS, "    channels: tuple = [2, 4, 4, 4]"),
    "nothing but the value": (CHANNELS, "    channels = [2, 4, 4, 4]"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_default_may_be_written_in_any_way(way, edited, tmp_path):
    old, new = WAYS[way]
    module = edited({old: new, DROPOUT: "    dropout: float = 0.5\n"})
    expected = m.parse_settings(["--channels", "2,4,4,4", "--dropout", "0.5"])
    settings = module.parse_settings([])
    assert (settings.channels, settings.dropout) == (expected.channels, expected.dropout)
    assert module.main([*SMALL, "--save-dir", str(tmp_path / "edited")]) == 0
    assert m.main([*SMALL, "--channels", "2,4,4,4", "--dropout", "0.5", "--save-dir",
                   str(tmp_path / "flags")]) == 0  # fmt: skip
    ends = [tmp_path / name / "resnet9" / "checkpoint_last.npz" for name in ("edited", "flags")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_edited_code_is_kept_beside_the_code_of_before(tmp_path, capsys, monkeypatch):
    """A run that is continued with other code keeps both, and says so once."""
    script = tmp_path / "script.py"
    monkeypatch.setattr("support.run_folder.ROOT", tmp_path)

    def train(epochs):
        settings = m.parse_settings([*SMALL, "--save-dir", str(tmp_path), "--channels", "2,4,4,4",
                                     "--epochs-max", str(epochs)])  # fmt: skip
        assert m.run(settings, scripts=(script,)) == 0
        return capsys.readouterr().out

    folder = tmp_path / "resnet9"
    script.write_text("first")
    assert "changed" not in train(1)
    script.write_text("second")
    assert "script.py changed since this run's last start" in train(2)
    assert (folder / "code" / "script.py").read_text() == "first"
    assert (folder / "code_2" / "script.py").read_text() == "second"
    assert "changed" not in train(3)
    script.write_text("first")  # changed back: what ran last was the second
    assert "code_2/, as they are in code_3/" in train(4)
    assert "changed since" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("tag", ["CON", "nul", "com1.txt", "run.", ".hidden", "a/b", "ü"])
def test_a_tag_that_no_folder_can_have_everywhere_is_refused(tag, capsys):
    assert m.main(["--tag", tag]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and repr(tag) in error


def test_main_without_arguments_takes_none_from_the_program_around_it(monkeypatch):
    """In a notebook, sys.argv belongs to the notebook's kernel."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    seen = []
    assert m.main(start=lambda arguments: seen.append(m.parse_settings(arguments)) or 0) == 0
    assert seen == [m.Settings()]
