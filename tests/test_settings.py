"""The settings at the top of the script are there to be edited: what a slip there is answered with,
and which ways to write a default are all the same."""

import dataclasses
import fractions
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from programs import few_digits

import mnist_resnet9 as m

SOURCE = (m.ROOT / "mnist_resnet9.py").read_text(encoding="utf-8")
SMALL = "--device cpu --threads 1 --epochs-max 1 --train-images 64 --batch-size 32".split()
SMALL += ["--data-dir", few_digits()]


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


def test_a_run_with_a_tuple_of_ones_own_continues(edited, tmp_path, capsys):
    """config.json has a list in its place."""
    line = CARD["warm_up"]
    module = edited({line: f"{line}\n    strides: tuple = (1, 2)  # of conv1"})
    flags = [*SMALL, "--save-dir", str(tmp_path)]
    assert module.main(flags) == 0
    assert module.main([*flags, "--epochs-max", "2"]) == 0
    assert module.main([*flags, "--epochs-max", "3", "--strides", "1,1"]) == 2
    assert "another experiment: it has strides [1, 2], not [1, 1]" in capsys.readouterr().err
    assert module.parse_settings(["--strides", "0.5,2"]).strides == (0.5, 2)


CLASS = SOURCE[SOURCE.index("class Settings:") : SOURCE.index("def __post_init__")]
CARD = {line.split(":")[0].strip(): line for line in CLASS.splitlines()}
CARD_NAMES = [f.name for f in dataclasses.fields(m.Settings)]
DROPOUT, CHANNELS, EPOCHS = CARD["dropout"], CARD["channels"], CARD["epochs_max"]

SLIPS = {
    "a text for a number": (DROPOUT, DROPOUT.replace("0.9", '"0.5"'), "dropout is '0.5'"),
    "out of range": (DROPOUT, DROPOUT.replace("0.9", "1"), "dropout is 1, but should be from 0"),
    "a float for a whole number": (EPOCHS, EPOCHS.replace("200", "10.0"), "epochs_max is 10.0"),
    "a number in quotes": (EPOCHS, EPOCHS.replace("200", '"50"'), "epochs_max is '50'"),
    "without its comment": (EPOCHS, "    epochs_max: int = 10.0", "epochs_max is 10.0"),
    "true for a number": (EPOCHS, "    epochs_max: int = True", "epochs_max is True"),
    "a tag with a blank": ('str = "resnet9"', 'str = "my run"', "tag 'my run' cannot name"),
    "an unknown device": ('"gpu"] = "auto"', '"gpu"] = "cuda"', "auto, cpu"),
    "an unknown pool": ('"avg"] = "max"', '"avg"] = "average"', "one of max, avg"),
    "three channels": ("(4, 16, 32, 64)  #", "(4, 16, 32)  #", "channels (4, 16, 32) should be"),
    "one channel": ("(4, 16, 32, 64)  #", "16  #", "channels is 16, but should be several"),
    "half a channel": ("(4, 16, 32, 64)  #", "[4, 16, 32.5, 64]  #", "channels (4, 16, 32.5, 64)"),
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


def test_a_setting_without_a_default_is_asked_for_one(edited, capsys):
    module = edited({DROPOUT: DROPOUT + "\n    depth: int  # blocks"})
    for flags in ([], ["--depth", "3"], ["--check"]):
        assert module.main(flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "the setting depth has no default" in error
    assert module.main(["--help"]) == 0 and "--depth INT" in capsys.readouterr().out


def test_what_is_computed_from_settings_is_none(edited, capsys):
    """Methods of any kind, and classes."""
    more = """
    @property
    def wide(self):
        return 2 * self.channels[3]

    @functools.cached_property
    def wider(self):
        return 3 * self.channels[3]

    @classmethod
    def small(cls):
        return cls(channels=(2, 4, 4, 4))

    @staticmethod
    def blocks():
        return 2

    class Inner:
        pass
"""
    module = edited({DROPOUT: DROPOUT + more})
    settings = module.parse_settings(["--channels", "2,4,4,5"])
    assert (settings.wide, settings.blocks(), settings.small().channels[3]) == (10, 2, 4)
    assert [f.name for f in dataclasses.fields(settings)] == list(CARD_NAMES)
    assert settings.wider == 15 and isinstance(settings.Inner, type)


YES = "    nesterov: bool = True  # look ahead 100 %"
NO = "    nesterov = False"


@pytest.mark.parametrize("default, line", [(True, YES), (False, NO)])
def test_a_setting_may_be_yes_or_no(default, line, edited, capsys, tmp_path):
    module = edited({DROPOUT: f"{DROPOUT}\n{line}"})
    flags = {(): default, ("--nesterov",): True, ("--no-nesterov",): False}
    for flag, value in flags.items():
        assert module.parse_settings(flag).nesterov is value
    for wrong in (["--nesterov", "False"], ["--nesterov=False"], ["--nester"]):
        assert module.main(wrong) == 2 and capsys.readouterr().err.count("\n") == 1
    assert module.main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--no-nesterov" in out and out.count(f"(default: {default})") == 1
    where = [*SMALL, "--channels", "2,4,4,4", "--save-dir", str(tmp_path)]
    assert module.main([*where, "--nesterov"]) == 0
    config = json.loads((tmp_path / "resnet9" / "config.json").read_text())
    assert config["settings"]["nesterov"] is True
    capsys.readouterr()
    assert module.main([*where, "--no-nesterov"]) == 2
    assert "nesterov True, not False" in capsys.readouterr().err


WAYS = {
    "a list": (CHANNELS, CHANNELS.replace("(4, 16, 32, 64)", "[2, 4, 4, 4]")),
    "a plain tuple": (CHANNELS, "    channels: tuple = (2, 4, 4, 4)"),
    "a plain list": (CHANNELS, "    channels: tuple = [2, 4, 4, 4]"),
    "nothing but the value": (CHANNELS, "    channels = [2, 4, 4, 4]"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_default_may_be_written_in_any_way(way, edited, tmp_path):
    old, new = WAYS[way]
    module = edited({old: new, DROPOUT: "    dropout: float = 0.5"})
    expected = m.parse_settings(["--channels", "2,4,4,4", "--dropout", "0.5"])
    settings = module.parse_settings([])
    assert (settings.channels, settings.dropout) == (expected.channels, expected.dropout)
    assert module.main([*SMALL, "--save-dir", str(tmp_path / "edited")]) == 0
    flags = [*SMALL, "--channels", "2,4,4,4", "--dropout", "0.5"]
    assert m.main([*flags, "--save-dir", str(tmp_path / "flags")]) == 0
    ends = [tmp_path / name / "resnet9" / "checkpoint_last.npz" for name in ("edited", "flags")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_edited_code_is_kept_beside_the_code_of_before(tmp_path, capsys, monkeypatch):
    """A run that is continued with other code keeps both, and says so once."""
    script = tmp_path / "script.py"
    monkeypatch.setattr("support.run_folder.ROOT", tmp_path)

    def train(epochs):
        flags = [*SMALL, "--channels", "2,4,4,4", "--epochs-max", str(epochs)]
        settings = m.parse_settings([*flags, "--save-dir", str(tmp_path)])
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


def test_the_card_is_a_line_a_setting_and_its_comments_are_the_help(edited):
    for f in dataclasses.fields(m.Settings):
        assert CARD[f.name].endswith(f"  # {f.metadata['help']}") and f.metadata["help"]
        assert f"{f.name}: {f.metadata['help']}" in m.Settings.__doc__
    module = edited({DROPOUT: DROPOUT + "\n    gain: float = 2.0  # 100 % new: a = b # c"})
    added = {f.name: f for f in dataclasses.fields(module.Settings)}["gain"]
    assert added.metadata["help"] == "100 % new: a = b # c" and added.type is float


@pytest.mark.parametrize("source", ["none", "frozen"])
def test_where_the_source_is_not_there_the_settings_work_without_help(source, monkeypatch):
    """As in a script on standard input."""
    module = types.ModuleType("nowhere")
    module.__file__ = str(m.ROOT / "mnist_resnet9.py")
    monkeypatch.setitem(sys.modules, "nowhere", module)
    exec(compile(SOURCE, f"<{source}>", "exec"), vars(module))
    assert module.parse_settings(["--dropout", "0.5"]).dropout == 0.5


NUMBERS = {
    "learning_rate": np.float64(1e-3),
    "dropout": np.float32(0.5),
    "epochs_max": np.int64(3),
    "weight_decay": fractions.Fraction(1, 4),
    "channels": np.array([2, 4, 4, 4]).tolist(),
    "seed": np.uint8(7),
    "tag": np.str_("mine"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_numbers(name):
    value = getattr(m.Settings(**{name: NUMBERS[name]}), name)
    kind = type(getattr(m.Settings(), name))
    assert type(value) is kind and value == kind(NUMBERS[name])
    json.dumps(value)


@pytest.mark.parametrize("wrong", [{"epochs_max": np.float64(3)}, {"seed": np.bool_(True)}])
def test_numbers_of_another_kind_are_refused(wrong):
    with pytest.raises(m.UserError, match="should be a whole number"):
        m.Settings(**wrong)


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
