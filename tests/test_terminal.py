"""The places in which the program is started: without a terminal, in a thread, in a folder that is
gone, with an encoding that has no letters but ASCII's."""

import builtins
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
from programs import start

import mnist_resnet9 as m
from support import terminal

SCRIPT = "mnist_resnet9.py"
FLAGS = "--channels 2,4,4,4 --train-images 64 --batch-size 32 --epochs-max 1".split()
FLAGS += ["--data-dir", str(m.ROOT / "data" / "sample"), "--device", "cpu", "--threads", "2"]


def no_traceback(result):
    return "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_a_run_without_output_is_a_run(closed, tmp_path):
    def close():
        for number in closed:
            os.close(number)

    result = start(SCRIPT, *FLAGS, "--save-dir", tmp_path, preexec_fn=close)
    assert result.returncode == 0 and no_traceback(result)
    folder = tmp_path / "resnet9"
    assert "Finished" in (folder / "log.txt").read_text()
    assert m.load_checkpoint(folder / "checkpoint_last.npz", m.parse_settings(FLAGS)).step == 2


@pytest.mark.parametrize(
    "flags", [["--help"], ["--tag", "no tag"], FLAGS], ids=["help", "2", "run"]
)
def test_nobody_reads_the_output(flags, tmp_path):
    """`python mnist_resnet9.py | head -0`: the pipe is closed before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    result = start(SCRIPT, *flags, "--save-dir", tmp_path, stdout=writing)
    os.close(writing)
    assert no_traceback(result) and result.returncode == (2 if "no tag" in flags else 0)


ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.mark.parametrize("script", ["mnist_resnet9.py", "plot_figs.py", "predict.py"])
def test_help_under_an_ascii_encoding(script):
    result = start(script, "--help", env={**os.environ, **ASCII})
    assert result.returncode == 0 and result.stdout.startswith("usage:") and no_traceback(result)


SCRIPTS = [
    path.relative_to(m.ROOT).as_posix()
    for pattern in ("*.py", "evolution/*.py", "torch_version/*.py", "benchmarks/*/*.py")
    for path in sorted(m.ROOT.glob(pattern))
    if "__main__" in path.read_text(encoding="utf-8")
]
DOCUMENTS = [m.ROOT / script for script in SCRIPTS]
for pattern in ("*.md", "*/README.md", "docs/*.md", "benchmarks/*.sh"):
    DOCUMENTS += sorted(m.ROOT.glob(pattern))


def documented_commands():
    """{script: its flags} in all commands that stand in a document or at the top of a script."""
    flags = {}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, arguments in re.findall(r"python ([\w/]+\.py)(.*)", text):
            arguments = re.split(r"[`#;|]|\s{2,}\w", re.sub('".*?"', "", arguments))[0]
            found = re.findall(r"(?<!\S)--[\w-]+", arguments)
            flags.setdefault(script, set()).update(found)
    return flags


def test_every_script_of_a_document_is_there():
    commands = documented_commands()
    assert len(commands) > 10 and set(commands) <= set(SCRIPTS)
    assert {"--recipe", "--tag", "--device"} <= commands["mnist_resnet9.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_the_flags_of_its_documents(script):
    if script.startswith("torch_version"):
        pytest.importorskip("torch")
    usage = start(script, "--help")
    assert usage.returncode == 0 and usage.stdout.startswith("usage:") and no_traceback(usage)
    known = set(re.findall(r"--[\w-]+", usage.stdout))
    assert documented_commands().get(script, set()) <= known


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_a_flag_that_it_has_not(script):
    if script.startswith("torch_version"):
        pytest.importorskip("torch")
    wrong = start(script, "--no-such-flag")
    assert wrong.returncode == 2 and no_traceback(wrong)
    assert "--no-such-flag" in wrong.stderr or "required" in wrong.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe as a shell does")
def test_a_reader_that_leaves_ends_a_program_quietly(tmp_path):
    shutil.copytree(m.ROOT / "save" / "record", tmp_path / "record")
    (tmp_path / "record" / "curves.png").unlink()
    where = ["record", "--save-dir", tmp_path]
    picture = m.ROOT / "save" / "record" / "filters.png"
    for script, flags, status, said in [
        ("benchmarks/accuracy/seeds.py", where, 128 + 13, ""),
        ("predict.py", [picture], 128 + 13, ""),
        ("plot_figs.py", [*where, "--data-dir", m.ROOT / "data" / "sample"], 2, "SHA-256 differs"),
    ]:
        reading, writing = os.pipe()
        os.close(reading)
        result = start(script, *flags, python=["-u"], stdout=writing)
        os.close(writing)
        assert result.returncode == status and no_traceback(result), script
        assert said in result.stderr and (said or not result.stderr)
    assert (tmp_path / "record" / "curves.png").exists()


def test_a_notebooks_backend_is_for_the_notebook(tmp_path):
    """A program that a notebook starts inherits it, and may lack its module."""
    shutil.copytree(m.ROOT / "save" / "record", tmp_path / "record")
    backend = {"MPLBACKEND": "module://matplotlib_inline.not_there"}
    flags = ["--overlay", "record", "--save-dir", tmp_path]
    result = start("plot_figs.py", *flags, env={**os.environ, **backend})
    assert result.returncode == 0 and no_traceback(result), result.stderr


def test_a_path_that_ascii_does_not_have(tmp_path):
    folder, ascii_only = tmp_path / "ünïcödé", {**os.environ, **ASCII}
    result = start(SCRIPT, *FLAGS, "--save-dir", folder, env=ascii_only)
    assert result.returncode == 0 and no_traceback(result)
    assert "Finished" in (folder / "resnet9" / "log.txt").read_text(encoding="utf-8")
    again = start(SCRIPT, *FLAGS, "--save-dir", folder, env=ascii_only)
    assert again.returncode == 0 and "is finished" in again.stdout
    flags = ["--overlay", "resnet9", "--save-dir", folder]
    figures = start("plot_figs.py", *flags, env=ascii_only)
    assert figures.returncode == 0 and no_traceback(figures)
    assert list((folder / "resnet9").glob("*.png"))


@pytest.mark.parametrize("script", ["mnist_resnet9.py", "plot_figs.py", "predict.py"])
@pytest.mark.parametrize("option", ["-I", "-P"])
def test_an_isolated_python_finds_support_too(script, option):
    """`python -I` and `python -P` (3.11) leave the script's folder out of the search."""
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("-P came with Python 3.11")
    assert start(script, "--help", python=[option]).returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a folder in use cannot be deleted")
def test_a_working_directory_that_is_gone(tmp_path):
    gone = tmp_path / "gone"

    def go():
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    result = start(SCRIPT, *FLAGS, "--save-dir", tmp_path, preexec_fn=go)
    assert result.returncode == 0 and no_traceback(result)
    assert "Finished" in (tmp_path / "resnet9" / "log.txt").read_text()
    for script in ("mnist_resnet9.py", "plot_figs.py", "predict.py"):
        relative = start(script, "--save-dir", "runs", preexec_fn=go)
        assert relative.returncode == 2 and relative.stderr.count("\n") == 1
        assert script in relative.stderr


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME" if os.name == "posix" else "USERPROFILE", str(tmp_path))
    settings = m.parse_settings(["--save-dir", "~/runs", "--data-dir", "~/mnist"])
    assert Path(settings.save_dir) == tmp_path / "runs"
    assert Path(settings.data_dir) == tmp_path / "mnist"


def test_a_run_in_a_thread(tmp_path, capsys):
    """Signals can be caught in the main thread alone; elsewhere a run goes on without."""
    results = []
    flags = [*FLAGS, "--save-dir", str(tmp_path)]
    thread = threading.Thread(target=lambda: results.append(m.main(flags)))
    thread.start()
    thread.join(100)
    assert results == [0] and "Finished" in capsys.readouterr().out


def test_a_notebook_is_not_told_to_start_its_kernel(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["resnet9.py", "--tag", "my run"])
    assert terminal.this_command() == "python resnet9.py --tag 'my run'"
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    assert "resnet9.py" not in terminal.this_command()


def test_cupys_error_is_shown_by_its_cause():
    banner = "=" * 80 + "\nFailed to import CuPy.\n" + "Please reinstall. " * 20
    cause = "libcudart.so.12: cannot open shared object file"
    text = f"{banner}\nOriginal error:\n  ImportError: {cause}\n"
    assert m.root_cause(ImportError(text)) == f"ImportError: {cause}"
    error = ImportError(banner)
    error.__cause__ = OSError(cause)
    assert m.root_cause(error) == cause
    assert m.root_cause(RuntimeError()) == "RuntimeError"
