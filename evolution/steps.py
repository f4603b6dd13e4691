"""What all steps share: settings, the training loop of mnist_resnet9.py, and a comparison with the
step before."""

import json
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import mnist_resnet9 as m
from support.run_folder import read_metrics
from support.settings import project_path
from support.storage import read_file


def run_step(number, adds, layers, arguments=None, **fixed):
    """Trains the network of a step as mnist_resnet9.py trains ResNet9, with the same flags. Returns
    the exit status.

    fixed: the settings that this step's network cannot vary, with their values.
    """
    fixed = {"dropout": 0.0} | fixed
    if number < 3:
        fixed["pool"] = m.Settings.pool  # there is none, so a run keeps what it has by default
    if number < 4:
        fixed["channels"] = m.Settings.channels

    def start(arguments):
        asked = m.parse_settings(arguments, checks=True, tag=f"evolution_{number}", **fixed)
        settings = replace(asked, **fixed)
        print(f"Step {number} adds: {adds}")
        for name, value in fixed.items():
            if getattr(asked, name) != value:
                print(f"Step {number} has {name} {value}, whatever is asked for.")
        if "--check" in arguments:
            return 0 if m.check(settings, layers) else 1
        status = m.run(settings, layers, (*m.SCRIPTS, *sorted(HERE.glob("*.py"))))
        if status == 0:
            save_dir = project_path(settings.save_dir)
            print(
                what_it_bought(
                    number, save_dir / settings.tag, save_dir / f"evolution_{number - 1}"
                )
            )
        return status

    return m.main(sys.argv[1:] if arguments is None else arguments, start)


def conditions_of(folder, number):
    """What a run shares with one to compare it with: the hashes of its data, and its settings but
    for those that differ between step `number` and the one before. None if its config.json does not
    say."""
    try:
        config = json.loads(read_file(folder / "config.json"))
        settings, hashes = config["settings"], config["data"]["sha256"]
        left_out = {"tag", "pool", *m.NOT_THE_EXPERIMENT}
        if settings["schedule"] != "constant":
            left_out.remove("epochs_max")  # the learning rate depends on it
        if number == 4:
            left_out.add("channels")  # step 3 has its own, whatever is asked for
        return hashes, {name: settings[name] for name in settings if name not in left_out}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def what_it_bought(number, folder, before):
    """A line that compares the test accuracies of two runs at the last epoch that both have."""
    rows = read_metrics(folder / "metrics.csv")
    conditions = conditions_of(folder, number)
    comparable = conditions is not None and conditions == conditions_of(before, number)
    if not comparable or not (before / "metrics.csv").exists():
        now = rows[-1]["test_accuracy"]
        return f"Step {number}: test accuracy {now:.2%} after epoch {len(rows) - 1}."
    old = read_metrics(before / "metrics.csv")
    epoch = min(len(rows), len(old)) - 1
    now, then = (table[epoch]["test_accuracy"] for table in (rows, old))
    gain = f"{100 * (now - then):+.2f} percentage points on step {number - 1}, which had {then:.2%}"
    return f"Step {number}: test accuracy {now:.2%} after epoch {epoch}, {gain}."
