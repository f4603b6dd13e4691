"""The places in which the program is started: without a terminal, in a thread, in a folder that is
gone, with an encoding that has no letters but ASCII's."""

import builtins
import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from programs import few_digits, start

import mnist_resnet9 as m
from support import gpu, storage, terminal

SCRIPT = "mnist_resnet9.py"
FLAGS = "--channels 2,4,4,4 --train-images 64 --batch-size 32 --epochs-max 1".split()
FLAGS += ["--data-dir", few_digits(), "--device", "cpu", "--threads", "2"]


def no_traceback(result):
    return "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


ALONE = [pytest.param(closed, marks=pytest.mark.long) for closed in ((1,), (2,), (1, 2))]


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
@pytest.mark.parametrize("closed", [*ALONE, (0, 1, 2)], ids=str)
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


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.long) if script.startswith("benchmarks") else script
        for script in SCRIPTS
    ],
)
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
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "metrics.csv"):
        shutil.copy(tmp_path / "record" / name, tmp_path / "bare")
    where = ["record", "--save-dir", tmp_path]
    picture = m.ROOT / "save" / "record" / "filters.png"
    for script, flags, status, said in [
        ("benchmarks/accuracy/seeds.py", where, 128 + 13, ""),
        ("predict.py", [picture], 128 + 13, ""),
        ("plot_figs.py", ["bare", "--save-dir", tmp_path], 128 + 13, ""),
        ("plot_figs.py", [*where, "--data-dir", m.ROOT / "data" / "sample"], 2, "SHA-256 differs"),
    ]:
        reading, writing = os.pipe()
        os.close(reading)
        result = start(script, *flags, python=["-u"], stdout=writing)
        os.close(writing)
        assert result.returncode == status and no_traceback(result), script
        assert said in result.stderr and (said or not result.stderr)
    assert (tmp_path / "record" / "curves.png").exists()


def commands_with(folder, data=True):
    """The commands in which a flag names a folder, with that folder. data: the data's as well."""
    picture = m.ROOT / "save" / "record" / "filters.png"
    for script, flags in [
        (SCRIPT, FLAGS),
        ("torch_version/resnet9_torch.py", FLAGS),
        ("evolution/step1_softmax_regression.py", FLAGS),
        ("plot_figs.py", ["record"]),
        ("predict.py", [picture]),
    ]:
        if script.startswith("torch") and not importlib.util.find_spec("torch"):
            continue
        yield script, [*flags, "--save-dir", folder]
        if script == "plot_figs.py":
            flags = [*flags, "--save-dir", m.ROOT / "save"]
        if data and script != "predict.py":
            yield script, [*flags, "--data-dir", folder]
        if script.startswith("torch"):
            yield script, [*flags, "--weights", folder]


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="~name is a user's folder")
def test_the_folder_of_a_user_who_is_not_there(tmp_path):
    """It is a folder's name, as in a shell."""
    # Into an empty folder for data MNIST would be downloaded.
    for script, flags in commands_with("~no-such-user/x", data=False):
        result = start(script, *flags, cwd=tmp_path)
        assert no_traceback(result), (script, flags)
        if result.returncode == 0:
            assert list((tmp_path / "~no-such-user" / "x").iterdir())
            shutil.rmtree(tmp_path / "~no-such-user")
        else:
            assert result.returncode == 2 and result.stderr.count("\n") == 1
            assert str(tmp_path / "~no-such-user" / "x") in result.stderr


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="removes the current folder")
def test_a_flag_for_a_folder_where_the_current_one_is_gone(tmp_path):
    for script, flags in commands_with("x"):
        if script.startswith("torch"):  # PyTorch's libraries do not load there
            continue
        gone = tmp_path / "gone"
        gone.mkdir()
        result = start(script, *flags, cwd=gone, preexec_fn=gone.rmdir)
        assert result.returncode == 2 and no_traceback(result)
        assert result.stderr.count("\n") == 1, result.stderr
        assert "x: the current folder is gone" in result.stderr


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
@pytest.mark.parametrize("option", ["-I", pytest.param("-P", marks=pytest.mark.long)])
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


def metrics_of(folder):
    """All but the times."""
    lines = (folder / "resnet9" / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:6] for line in lines]


def weights_of(folder):
    with np.load(folder / "resnet9" / "checkpoint_last.npz") as file:
        return {name: file[name] for name in file.files if file[name].dtype == np.float32}


@pytest.mark.long
def test_runs_and_evaluations_in_threads_give_the_numbers_of_a_run_alone(sample, tmp_path, capsys):
    """All share one set of workers. A second run on the same tag is refused."""
    flags = [*FLAGS, "--epochs-max", "3", "--save-dir"]
    assert m.main([*flags, str(tmp_path / "alone")]) == 0
    settings = m.parse_settings(FLAGS)
    params, images = m.init_params(settings), sample.test_images[:200]
    expected = m.predict(params, images, settings)
    for turn in range(2):
        statuses, wrong = {}, []

        def run(name, folder, statuses=statuses):
            statuses[name] = m.main([*flags, str(tmp_path / folder)])

        def look(wrong=wrong, statuses=statuses):
            while len(statuses) < 3:
                wrong.append(not np.array_equal(m.predict(params, images, settings), expected))

        threads = [threading.Thread(target=run, args=("first", f"first{turn}"))]
        threads[0].start()
        while not (tmp_path / f"first{turn}" / "resnet9" / "config.json").exists():
            assert threads[0].is_alive()
        for arguments in [("refused", f"first{turn}"), ("other", f"other{turn}")]:
            threads.append(threading.Thread(target=run, args=arguments))
        threads.append(threading.Thread(target=look))
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert statuses == {"first": 0, "refused": 2, "other": 0} and wrong and not any(wrong)
        for name in (f"first{turn}", f"other{turn}"):
            assert metrics_of(tmp_path / name) == metrics_of(tmp_path / "alone")
            alone = weights_of(tmp_path / "alone")
            for key, array in weights_of(tmp_path / name).items():
                assert np.array_equal(array, alone[key])
    error = capsys.readouterr().err
    assert error.count("is in use by another run of this program") == 2


LOCK = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from support import UserError, storage
try:
    storage.lock_file(pathlib.Path(sys.argv[1]))
except UserError as error:
    sys.exit(str(error))
"""


def test_a_lock_holds_off_this_process_and_others(tmp_path):
    path = tmp_path / "a" / "lock"
    path.parent.mkdir()
    (tmp_path / "link").symlink_to(path.parent)

    def another_program():
        return subprocess.run(
            [sys.executable, "-c", LOCK, str(path), str(m.ROOT)],
            capture_output=True,
            text=True,
            timeout=100,
        )

    held = storage.lock_file(path)
    for same in (path, tmp_path / "link" / "lock", tmp_path / "a" / ".." / "a" / "lock"):
        with pytest.raises(m.UserError, match="in use by another run of this program"):
            storage.lock_file(same)
        result = another_program()  # that refusal has not freed it
        assert result.returncode == 1 and "in use by another program" in result.stderr
    other = storage.lock_file(tmp_path / "lock")
    held.close()
    assert another_program().returncode == 0
    storage.lock_file(path).close()
    again = storage.lock_file(path)
    del again  # a run that ended without closing it
    storage.lock_file(path).close()
    other.close()


def test_a_run_that_failed_holds_no_lock(tmp_path, monkeypatch):
    """Even while its traceback is kept, as a notebook does."""
    kept = []

    def fail(*_):
        raise ZeroDivisionError

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(m.np, "isfinite", fail)
            with pytest.raises(ZeroDivisionError) as error:
                m.main([*FLAGS, "--save-dir", str(tmp_path)])
            kept.append(error.value)
    assert m.main([*FLAGS, "--save-dir", str(tmp_path)]) == 0
    assert m.main([*FLAGS, "--save-dir", str(tmp_path)]) == 0


def test_many_threads_and_one_lock(tmp_path):
    taken, start_line = [], threading.Barrier(8)

    def take():
        start_line.wait(60)
        try:
            taken.append(storage.lock_file(tmp_path / "lock"))
        except m.UserError:
            pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(taken) == 1
    taken[0].close()


@pytest.mark.skipif(storage.fcntl is None, reason="Windows locks in another way")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.fcntl, "lockf", lockf)
    file = storage.lock_file(tmp_path / "lock")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "without locks" in said and "no second run" in said
    with pytest.raises(m.UserError):  # in this process it holds all the same
        storage.lock_file(tmp_path / "lock")
    file.close()


def test_a_notebook_is_not_told_to_start_its_kernel(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["resnet9.py", "--tag", "my run"])
    assert terminal.this_command() == "python resnet9.py --tag 'my run'"
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    assert "resnet9.py" not in terminal.this_command()


@pytest.mark.parametrize(
    "module",
    ["cProfile", *(pytest.param(name, marks=pytest.mark.long) for name in ("profile", "trace"))],
)
def test_a_profiler(module, tmp_path):
    """Up to Python 3.13 the script is then not __main__, and no other process finds its names."""
    options = ["--count", "--coverdir"] if module == "trace" else ["-o"]
    python = ["-m", module, *options, tmp_path / "profile"]
    result = start(SCRIPT, *FLAGS, "--save-dir", tmp_path, python=python)
    assert result.returncode == 0 and "Finished" in result.stdout, result.stderr
    alone = "*** This process computes alone: what it computes cannot be sent"
    lines = [line for line in result.stderr.splitlines() if "***" in line]
    assert len(lines) <= 1 and all(line.startswith(alone) for line in lines)
    assert (tmp_path / "resnet9" / "checkpoint_best.npz").exists()


UNGUARDED = """
import sys
sys.path.insert(0, {here!r})
from support import workers
workers.METHOD = {method!r}
import mnist_resnet9 as m
{statement}
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_script_on_standard_input(method, tmp_path):
    source = (m.ROOT / SCRIPT).read_text(encoding="utf-8")
    if method == "spawn":
        at = source.index("# ── Settings")
        source = (
            f"{source[:at]}import support.workers\nsupport.workers.METHOD = 'spawn'\n{source[at:]}"
        )
    command = [sys.executable, "-", *FLAGS, "--save-dir", str(tmp_path)]
    result = subprocess.run(
        command, input=source, capture_output=True, encoding="utf-8", timeout=200, cwd=m.ROOT
    )
    assert result.returncode == 0 and "Finished" in result.stdout, result.stderr
    assert result.stderr.count("***") == (1 if method == "spawn" else 0), result.stderr


@pytest.mark.parametrize("exits", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_users_script_without_a_main_guard(exits, tmp_path):
    """Where processes are spawned, each runs that script again, from its top."""
    call = f"m.main({[*FLAGS, '--save-dir', str(tmp_path)]})"
    statement = f"sys.exit({call})" if exits else f"assert {call} == 0; print('the end')"
    path = tmp_path / "program.py"
    path.write_text(UNGUARDED.format(here=str(m.ROOT), method="spawn", statement=statement))
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and no_traceback(result), result.stderr
    assert result.stdout.count("Finished") == 1 and result.stdout.count("2 steps an epoch") == 1
    assert result.stderr.count("***") == (1 if exits else 0), result.stderr


def test_an_evaluation_without_a_main_guard(tmp_path):
    statement = """
settings = m.Settings(channels=(2, 4, 4, 4))
m.use_cores(2)
images = m.load_mnist("data/sample").test_images[:64]
print(m.predict(m.init_params(settings), images, settings).shape, len(m.workers.workers))
"""
    path = tmp_path / "program.py"
    path.write_text(UNGUARDED.format(here=str(m.ROOT), method="spawn", statement=statement))
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and result.stderr == ""
    # The worker runs it again, and has none of its own.
    assert sorted(result.stdout.splitlines()) == ["(64, 10) 0", "(64, 10) 1"]


def test_another_module_named_support(tmp_path):
    (tmp_path / "support.py").write_text("")
    program = f"import support, sys; sys.path.insert(0, {str(m.ROOT)!r}); import mnist_resnet9"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    last = result.stderr.splitlines()[-1]
    assert "another module named support is loaded already" in last and "support.py" in last
    plain = program.replace("import support, ", "import ")
    assert subprocess.run([sys.executable, "-c", plain], cwd=tmp_path).returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX")
@pytest.mark.parametrize("to_all", [False, True], ids=["program", "group"])
def test_the_signal_of_a_batch_system_before_its_limit(to_all, tmp_path):
    """It may reach the workers too: they leave it to the program."""
    flags = [*FLAGS, "--save-dir", tmp_path, "--epochs-max", "10000"]
    program = subprocess.Popen(
        [sys.executable, m.ROOT / SCRIPT, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in program.stdout:
        if line.startswith("    2 "):
            break
    (os.killpg if to_all else os.kill)(program.pid, signal.SIGUSR1)
    out, error = program.communicate(timeout=100)
    assert program.returncode == 128 + signal.SIGUSR1 and "everything is saved" in out
    assert "***" not in error
    state = m.load_checkpoint(tmp_path / "resnet9" / "checkpoint_last.npz", m.parse_settings(FLAGS))
    assert state.step >= 4


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX")
def test_a_signal_that_has_another_meaning_keeps_it():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert signal.SIGUSR1 not in terminal.stop_signals()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.SIGUSR1 not in terminal.stop_signals()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        assert signal.SIGUSR1 in terminal.stop_signals()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_commands_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my folder" / "script.py"), "--tag", "x"])
    assert terminal.this_command() == f"python '{tmp_path}/my folder/script.py' --tag x"
    monkeypatch.chdir(m.ROOT)
    assert terminal.command("plot_figs", "x") == "python plot_figs.py x"
    monkeypatch.setattr(terminal, "ROOT", tmp_path / "my folder")
    monkeypatch.chdir(tmp_path)
    command = terminal.command("plot_figs", "x", "--save-dir", Path("a b"))
    assert command == "python 'my folder/plot_figs.py' x --save-dir 'a b'"


# ── Notebooks ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "arguments", ["--tag x", b"--tag x", "it's", 5, None, {"--tag": "x"}, Path("a")]
)
def test_main_takes_a_list(arguments, capsys):
    assert m.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "main() takes a list of words, as main([" in error
    assert arguments != "--tag x" or "main(['--tag', 'x'])" in error


@pytest.mark.parametrize("arguments", [["--help"], ("--help",), iter(["--help"])])
def test_help_is_no_exit(arguments, capsys):
    assert m.main(arguments) == 0 and capsys.readouterr().out.startswith("usage:")


KERNEL = """
import os, signal, sys, threading, warnings, urllib.request
sys.path.insert(0, {here!r})
import numpy as np
import mnist_resnet9 as m
flags = {flags!r}
filters = list(warnings.filters)
---
m.main("--tag x")
---
m.main(["--help"])
---
m.main(["--tag", "no tag"])
---
m.main([*flags, "--train-images", "100000"])
---
m.main(flags)
---
threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
m.main([*flags, "--tag", "long", "--epochs-max", "100000"])
---
os.path.exists(os.path.join(flags[-1], "long", "checkpoint_last.npz"))
---
statuses = []
thread = threading.Thread(target=lambda: statuses.append(m.main(["--tag", "no tag"])))
thread.start()
thread.join()
statuses
---
warnings.filters == filters, urllib.request._opener
"""


@pytest.mark.long
def test_in_a_kernel(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    flags = [*FLAGS, "--save-dir", str(tmp_path)]
    sources = KERNEL.format(here=str(m.ROOT), flags=flags).split("---\n")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client.NotebookClient(notebook, timeout=200, allow_errors=True).execute(cwd=str(tmp_path))

    def of(number, kind):
        return [out for out in notebook.cells[number].outputs if out.output_type == kind]

    def text(number):
        return "".join(out.text for out in of(number, "stream"))

    def value(number):
        return [out.data["text/plain"] for out in of(number, "execute_result")]

    def failure(number):
        (error,) = of(number, "error")
        assert len(error.traceback) == 1 and "\n" not in error.traceback[0]
        return error.traceback[0]

    assert not notebook.cells[0].outputs
    assert failure(1).startswith("UserError: main() takes a list of words, as main(['--tag', 'x'])")
    assert text(2).startswith("usage: main() [-h]") and value(2) == ["0"]
    assert failure(3).startswith("UserError: tag 'no tag' cannot name a folder")
    assert failure(4).startswith("UserError: ")
    assert "Finished." in text(5) and value(5) == ["0"]
    assert "Figures: plot_figs.main(['resnet9', '--save-dir', '" in text(5)
    assert failure(6).startswith("KeyboardInterrupt: ") and "everything is saved" in text(6)
    assert value(7) == ["True"]
    assert value(8) == ["[2]"] and "cannot name a folder" in text(8)
    assert value(9) == ["(True, None)"]
    for number in range(10):
        assert "ipykernel" not in text(number) and "Ctrl-C" not in text(number)


def test_cupys_error_is_shown_by_its_cause():
    banner = "=" * 80 + "\nFailed to import CuPy.\n" + "Please reinstall. " * 20
    cause = "libcudart.so.12: cannot open shared object file"
    text = f"{banner}\nOriginal error:\n  ImportError: {cause}\n"
    assert gpu.root_cause(ImportError(text)) == f"ImportError: {cause}"
    error = ImportError(banner)
    error.__cause__ = OSError(cause)
    assert gpu.root_cause(error) == cause
    assert gpu.root_cause(RuntimeError()) == "RuntimeError"
