"""support/ knows nothing of the script: what learns stands in mnist_resnet9.py, and nowhere is it
loaded twice."""

import ast
import shutil
import subprocess
import sys

import numpy as np
import pytest
from programs import few_digits, metrics_of, start

from support import ROOT

MODULES = sorted((ROOT / "support").glob("*.py"))


def imported(path):
    """The names of all modules that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_in_support_imports_a_program(path):
    programs = {path.stem for path in ROOT.glob("*.py")}
    assert "mnist_resnet9" in programs
    assert not programs & {name.split(".")[0] for name in imported(path)}


def test_each_part_of_support_can_be_imported_alone():
    names = ", ".join(f"support.{path.stem}" for path in MODULES if path.stem != "__init__")
    code = f"import {names}, sys; assert not {{'mnist_resnet9', 'plot_figs'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_without_winograd_the_script_trains_the_same(tmp_path):
    """The one use of the fast path deleted from a copy of the script: the same losses, but for
    rounding."""
    source = (ROOT / "mnist_resnet9.py").read_text(encoding="utf-8")
    use = "        return winograd.conv2d(x, w, b)\n"
    lines = source.splitlines(keepends=True)
    at = lines.index(use)
    assert lines.count(use) == 1 and "winograd.is_faster(w)" in lines[at - 1]
    plain = "".join(lines[: at - 1] + lines[at + 1 :])
    flags = "--device cpu --threads 1 --epochs-max 1 --train-images 128 --batch-size 32".split()
    flags += "--dropout 0.2 --channels 4,8,8,8".split()
    flags += ["--data-dir", few_digits(), "--save-dir", tmp_path / "save"]
    rows = []
    for name, text in (("fast", source), ("plain", plain)):
        folder = tmp_path / name
        shutil.copytree(ROOT / "support", folder / "support")
        for script in ("mnist_resnet9.py", "plot_figs.py"):
            shutil.copy(ROOT / script, folder)
        (folder / "mnist_resnet9.py").write_text(text, encoding="utf-8")
        result = start(folder / "mnist_resnet9.py", *flags, "--tag", name)
        assert result.returncode == 0, result.stderr
        rows.append(metrics_of(tmp_path / "save" / name)[:, 2:6])
    assert rows[0][1, 0] < rows[0][0, 0]  # four steps have learnt something
    np.testing.assert_allclose(*rows, rtol=1e-4)
    assert not np.array_equal(*rows)  # rounding does differ: the fast path was really gone
