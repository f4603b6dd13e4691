"""The tests themselves: they pass wherever pytest is started."""

import subprocess
import sys
from pathlib import Path

import mnist_resnet9 as m


def test_paths_in_flags_begin_at_the_projects_folder():
    settings = m.parse_settings(["--data-dir", "data/sample"])
    assert Path(settings.data_dir) == m.ROOT / "data" / "sample"


def test_they_do_so_too_where_pytest_is_started_elsewhere(tmp_path):
    test = f"{__file__}::{test_paths_in_flags_begin_at_the_projects_folder.__name__}"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", test]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout
