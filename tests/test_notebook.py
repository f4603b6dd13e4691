"""What a cell of a notebook shows and leaves behind, in real kernels."""

import signal

import pytest
from programs import few_digits

import mnist_resnet9 as m

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FLAGS = "--channels 2,4,4,4 --train-images 640 --batch-size 32 --epochs-max 2".split()
FLAGS += ["--data-dir", few_digits(), "--device", "cpu", "--threads", "2"]


class Notebook:
    """Cells that a kernel has run, separated by ---."""

    def __init__(self, sources, folder):
        begin = f"import sys\nsys.path.insert(0, {str(m.ROOT)!r})\nimport mnist_resnet9 as m\n"
        begin += f"flags = {[*FLAGS, '--save-dir', str(folder)]}"
        cells = [nbformat.v4.new_code_cell(text) for text in [begin, *sources.split("---\n")]]
        self.notebook = nbformat.v4.new_notebook(cells=cells)
        client = nbclient.NotebookClient(self.notebook, timeout=200, allow_errors=True)
        client.execute(cwd=str(folder))

    def of(self, number, kind):
        return [out for out in self.notebook.cells[number].outputs if out.output_type == kind]

    def text(self, number):
        return "".join(out.text for out in self.of(number, "stream"))

    def value(self, number):
        """Of the cell's last line, or the error in its one line."""
        for out in self.of(number, "error"):
            (line,) = out.traceback
            return line
        return "".join(out.data["text/plain"] for out in self.of(number, "execute_result"))


PROGRESS = """
from support import progress
looks, status_printer = [], progress.CellBar.status_printer
def watched(self, file):
    show = status_printer(self, file)
    return lambda text: (looks.append(text), show(text))
progress.CellBar.status_printer = watched
progress.SECONDS_IN_CELL = 0
---
m.main(flags)
---
[[look for look in looks if f"epoch {n}" in look][-1] for n in (1, 2)]
---
!{sys.executable} {m.__file__} {" ".join(flags)} --tag command
---
m.init_state(m.Settings())
---
m.load_mnist(flags[flags.index("--data-dir") + 1])
---
m.predict(m.init_params(m.Settings()), m.np.zeros((2, 30, 28)), m.Settings())
"""


def test_a_cell_has_a_bar_and_the_notebook_that_is_saved_has_not(tmp_path):
    notebook = Notebook(PROGRESS, tmp_path)
    assert "Finished" in notebook.text(2) and notebook.value(2) == "0"
    assert "epoch 1:" not in notebook.text(2) and "step/s" not in notebook.text(2)
    (place,) = notebook.of(2, "display_data")
    assert place.data == {"text/plain": ""}
    assert notebook.notebook.cells[2].outputs[0] is place  # so the log is not cut in two
    for number in (1, 2):
        assert f"epoch {number}:" in notebook.value(3)
    assert "loss=" in notebook.value(3) and "/20" in notebook.value(3)
    # `!` has a terminal, of which each look at the bar would be kept.
    assert "Finished" in notebook.text(4) and notebook.text(4).count("epoch 1:") <= 2
    assert "fc9.weight    float32 (3136, 10)" in notebook.value(5) and len(notebook.value(5)) < 2000
    assert notebook.value(6).startswith("digits:") and len(notebook.value(6)) < 500
    assert notebook.value(7) == (
        "UserError: images are (2, 30, 28), but should be (N, 28, 28), with pixels 0…255"
    )


def test_an_interrupt_during_an_evaluation_says_what_it_waits_for(tmp_path, monkeypatch, capsys):
    asked, whole = [], m.evaluate_all

    def evaluate_all(run, engine):
        if len(run.state.history) == 1:
            signal.raise_signal(signal.SIGINT)
            asked.append(capsys.readouterr().err)
            signal.raise_signal(signal.SIGINT)
            asked.append(capsys.readouterr().err)
        return whole(run, engine)

    monkeypatch.setattr(m, "evaluate_all", evaluate_all)
    assert m.main([*FLAGS, "--save-dir", str(tmp_path)]) == 130
    assert asked == ["Stopping as soon as epoch 1 is evaluated and saved.\n", ""]
    assert "Stopped after step 20; everything is saved" in capsys.readouterr().out


def test_an_interrupt_of_a_step_says_nothing_more(tmp_path, monkeypatch, capsys):
    step, steps = m.update, []

    def update(*arguments):
        step(*arguments)
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(m, "update", update)
    assert m.main([*FLAGS, "--save-dir", str(tmp_path)]) == 130
    shown = capsys.readouterr()
    assert "Stopped after step 5; everything is saved" in shown.out
    assert "Stopping" not in shown.err + shown.out


def test_a_run_leaves_the_array_module_as_it_was(tmp_path, monkeypatch, capsys):
    """After a run on a GPU, what a notebook has computed so far still fits."""
    used, there = [], m.xp

    def use_device(device):
        m.xp = "that of a GPU"
        used.append(device)
        return "GPU"

    monkeypatch.setattr(m, "use_device", use_device)
    assert m.main(["--data-dir", str(tmp_path / "none")]) == 2 and used == ["auto"]
    assert m.xp is there


THREADS = """
import threading, time, warnings
import numpy as np
import predict, threadpoolctl, matplotlib.pyplot as plt
settings = m.parse_settings(flags)
data = m.load_mnist(settings.data_dir)
params = m.init_params(settings)
alone = m.predict(params, data.test_images[:300], settings)
plt.plot([1, 2]); plt.close()
def threads_of_blas():
    return {lib["filepath"]: lib["num_threads"] for lib in threadpoolctl.threadpool_info()}
before = threads_of_blas(), list(warnings.filters)
statuses = []
def run(tag):
    statuses.append(m.main([*flags, "--tag", tag]))
m.main([*flags, "--tag", "alone"])
---
threads = [threading.Thread(target=run, args=[tag]) for tag in ("one", "two")]
for thread in threads: thread.start()
same = []
while any(thread.is_alive() for thread in threads):
    same.append(np.array_equal(m.predict(params, data.test_images[:300], settings), alone))
for thread in threads: thread.join()
statuses, all(same), len(same) > 0
---
m.main([*flags, "--tag", "three"])
---
def metrics(tag):
    lines = open(f"{flags[-1]}/{tag}/metrics.csv").read().splitlines()
    return str([line.split(",")[:6] for line in lines])
len({metrics(tag) for tag in ("alone", "one", "two", "three")})
---
before == (threads_of_blas(), list(warnings.filters))
---
predict.main(["no_such_picture.png"])
---
predict.main("seven.png")
---
predict.main(["--help"])
---
before[0].items() <= threads_of_blas().items(), m.xp is np
"""


@pytest.mark.long
def test_threads_in_a_kernel_give_the_numbers_of_a_run_alone(tmp_path):
    notebook = Notebook(THREADS, tmp_path)
    assert notebook.value(1) == "0" and notebook.value(3) == "0"
    assert notebook.value(2) == "([0, 0], True, True)"
    assert notebook.value(4) == "1"
    assert notebook.value(5) == "True"
    assert notebook.value(6).startswith("UserError: ") and "no_such_picture.png" in notebook.value(
        6
    )
    assert notebook.value(7).startswith("UserError: main() takes a list of words")
    assert notebook.value(8) == "0"
    assert notebook.value(9) == "(True, True)"
