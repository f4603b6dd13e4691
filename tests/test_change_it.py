"""docs/change_it.md: each of its edits fits the script, passes --check, trains and is drawn."""

import re
import shutil
from subprocess import STDOUT
from typing import NamedTuple

import pytest
from programs import start

from support import ROOT
from support.run_folder import TIMES, read_metrics

PAGE = (ROOT / "docs" / "change_it.md").read_text(encoding="utf-8")
SCRIPT = "mnist_resnet9.py"
SAMPLE = ["--data-dir", ROOT / "data" / "sample"]
SMALL = [*SAMPLE, "--channels", "2,4,4,4"]
FEW = "--recipe quick --epochs-max 1 --train-images 128 --batch-size 32".split()


class Edit(NamedTuple):
    title: str
    hunks: list  # (heading, text as it stands in the script, text to put there)
    flags: list  # the further flags that its section names


def blocks_of(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def edits_of(page):
    """{title: Edit} of all sections with a diff."""
    edits = {}
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        title = section.splitlines()[0]
        for diff in blocks_of(section, "diff"):
            _, *parts = re.split(r"^@@ (.*) @@\n", diff, flags=re.M)
            hunks = []
            for heading, lines in zip(parts[::2], parts[1::2]):
                lines = lines.splitlines(keepends=True)
                assert all(line[0] in " +-\n" for line in lines), f"{title}: {lines}"
                before, after = (
                    "".join(line[1:] or "\n" for line in lines if line[0] != sign) for sign in "+-"
                )
                hunks.append((heading, before, after))
            flags = re.search(r"With\s+`(--[^`]*)`", section.replace(diff, ""))
            edits[title] = Edit(title, hunks, flags[1].split() if flags else [])
    return edits


EDITS = edits_of(PAGE)


def edited(edit):
    """The script with this edit."""
    source = (ROOT / SCRIPT).read_text(encoding="utf-8")
    for heading, before, after in edit.hunks:
        found = source.count(before)
        assert found == 1, f"docs/change_it.md, {edit.title}, {heading}: {found} places fit it"
        source = source.replace(before, after)
    return source


def copy_of_project(folder, source):
    """What a student has: the project, with the script as edited."""
    for name in ("support", "data/sample"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("plot_figs.py", "predict.py"):
        shutil.copy(ROOT / name, folder)
    (folder / SCRIPT).write_text(source, encoding="utf-8")
    return folder


def run(folder, script, *flags):
    """All that the program says. It must end well."""
    result = start(folder / script, *flags, cwd=folder, stderr=STDOUT)
    assert result.returncode == 0, result.stdout
    assert "Traceback" not in result.stdout
    return result.stdout


def check(folder):
    """(exit status, output) of --check."""
    result = start(folder / SCRIPT, "--check", *SMALL, "--threads", "2", cwd=folder)
    return result.returncode, result.stdout


def train(folder, *flags):
    """The rows of metrics.csv after four steps on two cores."""
    run(folder, SCRIPT, *FEW, *SMALL, "--threads", "2", "--tag", "edited", *flags)
    return read_metrics(folder / "save" / "edited" / "metrics.csv")


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    """The rows of the script as it is."""
    source = (ROOT / SCRIPT).read_text(encoding="utf-8")
    return train(copy_of_project(tmp_path_factory.mktemp("unedited"), source))


def test_the_page_has_the_edits_that_it_should():
    assert len(EDITS) >= 10 and all(edit.hunks for edit in EDITS.values())
    assert {"--optimizer lion", "--schedule restarts"} <= {
        " ".join(edit.flags[:2]) for edit in EDITS.values()
    }


@pytest.mark.parametrize("title", EDITS)
def test_an_edit_fits_the_script(title):
    """Its lines stand there, each at one place, and what comes out is Python."""
    source = edited(EDITS[title])
    compile(source, title, "exec")
    for heading, _, after in EDITS[title].hunks:
        # The heading says where: in or beside the function or class of that name.
        name = heading.split()[-1]
        place = source.index(after)
        (begins,) = (m.start() for m in re.finditer(rf"^(def|class) {name}\b", source, re.M))
        near = source[begins:].split("\n\n\n")[0]
        assert begins - len(after) - 3 <= place <= begins + len(near), f"{title}, {heading}"


QUICK = "Layer normalisation"  # with a pair, a layer and parameters of its own


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=[] if title.endswith(QUICK) else pytest.mark.long)
        for title in EDITS
    ],
)
def test_an_edit_is_checked_trained_and_drawn(title, tmp_path, unedited):
    edit = EDITS[title]
    folder = copy_of_project(tmp_path, edited(edit))
    status, said = check(folder)
    assert status == 0 and re.search(r"^All \d+ are ok", said, re.M), said
    # Each new pair is one that was looked at.
    for name in re.findall(r"def (\w+)_backward", "".join(after for _, _, after in edit.hunks)):
        assert re.search(rf"^ok     {name} ", said, re.M), said

    rows = train(folder, *edit.flags)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert all(row["test_loss"] == row["test_loss"] < 10 for row in rows)
    # What was edited is what ran: another loss, or another column and all else as it was.
    new = rows[1].keys() - unedited[1].keys()
    changed = {name for name in unedited[1].keys() - {*TIMES} if rows[1][name] != unedited[1][name]}
    assert not changed if new else "train_loss" in changed

    said = run(folder, "plot_figs.py", "edited", *SAMPLE)
    drawn = {path.name for path in (folder / "save" / "edited").glob("*.png")}
    assert {"curves.png", "failures.png", "confusion.png", "filters.png"} <= drawn, said
    assert "layers.png" in drawn or "no layers.png" in said, said


def test_the_quick_edit_is_there():
    assert sum(title.endswith(QUICK) for title in EDITS) == 1


@pytest.mark.long
@pytest.mark.parametrize("block", range(2), ids=["a mistake", "batch normalisation"])
def test_what_check_says_of_a_wrong_one(block, tmp_path):
    """The page's section on layer normalisation has two changes and --check's answers to them."""
    title = next(title for title in EDITS if title.endswith(QUICK))
    section = PAGE[PAGE.index(f"## {title}") :].split("\n## ")[0]
    old, new = re.findall(r"`([^`]+)`\s*→\s*`([^`]+)`", section)[block]
    source = edited(EDITS[title])
    assert source.count(old) == 1
    status, said = check(copy_of_project(tmp_path, source.replace(old, new)))
    assert status == 1

    def without_numbers(text):
        return re.sub(r"\b\d\S*", "N", text)

    expected = blocks_of(section, "text")[block]
    assert "WRONG" in expected and "ok     twenty steps" in said
    assert without_numbers(expected) in without_numbers(said), said


@pytest.mark.long
def test_the_files_of_two_classes(tmp_path):
    (program,) = blocks_of(PAGE, "python")
    assert program.count("load_mnist()") == 1
    folder = copy_of_project(tmp_path, (ROOT / SCRIPT).read_text(encoding="utf-8"))
    # Not the whole of MNIST, which would be downloaded.
    (folder / "two.py").write_text(program.replace("load_mnist()", 'load_mnist("data/sample")'))
    run(folder, "two.py")
    (data,) = {path for path in (folder / "data").iterdir() if path.name != "sample"}
    assert f"--data-dir data/{data.name}" in PAGE
    flags = [*FEW, "--channels", "2,4,4,4", "--data-dir", f"data/{data.name}", "--tag", "two"]
    said = run(folder, SCRIPT, *flags)
    assert f"two: {data.name}, 128 images" in said
    last = read_metrics(folder / "save" / "two" / "metrics.csv")[-1]
    assert last["test_accuracy"] > 0.3  # of ten classes with as few steps: about 0.2
