"""benchmarks/accuracy/dropout_study.py: its commands, what it reads of runs, and its figure."""

import math
import shlex

from programs import write_metrics

import mnist_resnet9 as m
from benchmarks.accuracy import dropout_study as study


def test_it_prints_ordinary_commands_that_differ_in_dropout_only(capsys):
    assert study.main(["--commands", "--epochs", "7"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[:2] for command in commands] == [["python", "mnist_resnet9.py"]] * 7
    runs = [m.asdict(m.parse_settings(command[2:])) for command in commands]
    assert [run["dropout"] for run in runs] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
    assert len({run["tag"] for run in runs}) == 7
    reference = m.asdict(m.Settings(epochs_max=7))
    assert all({**run, "tag": "resnet9", "dropout": 0.9} == reference for run in runs)


def test_it_draws_the_runs_that_have_got_far_enough(tmp_path):
    for rate, epochs in ((0.5, 5), (0.9, 7), (0.99, 4)):
        (tmp_path / f"dropout_{rate}").mkdir()
        rows = [
            [e, 1e-4, 1, 0, 1, 0.9 + rate / 100 + e / 1000, math.nan, math.nan]
            for e in range(epochs + 1)
        ]
        write_metrics(tmp_path / f"dropout_{rate}", rows)
    found = study.accuracies(tmp_path, 5)
    assert {rate: round(accuracy, 6) for rate, accuracy in found.items()} == {0.5: 0.91, 0.9: 0.914}
    (line,) = study.draw(found, 5).axes[0].lines
    assert list(line.get_xdata()) == [0.5, 0.9] and list(line.get_ydata()) == list(found.values())
