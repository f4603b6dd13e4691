"""support/ knows nothing of the script: what learns stands in mnist_resnet9.py, and nowhere is it loaded twice."""

import ast
import subprocess
import sys

import pytest

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
