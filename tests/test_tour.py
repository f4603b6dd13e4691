"""docs/tour.ipynb: what is stored in it can be read without running it, and it runs."""

import re
import shutil

import pytest

import mnist_resnet9 as m

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

TOUR = m.ROOT / "docs" / "tour.ipynb"


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown_in(cell):
    """(text, number of pictures) of a cell's outputs."""
    text, pictures = "", 0
    for out in cell.outputs:
        assert out.output_type != "error", "\n".join(out.traceback)
        data = out.get("data", {})
        text += out.get("text", "") + data.get("text/plain", "")
        pictures += "image/png" in data
    return text, pictures


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(TOUR, 4)


def test_it_is_stored_with_what_it_showed(stored):
    cells = code_of(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [shown_in(cell) for cell in cells]
    text = "".join(text for text, _ in shown)
    assert sum(pictures for _, pictures in shown) >= 14
    assert "MNIST:\n    train_images  uint8 (60000, 28, 28)" in text
    assert text.count("All 14 are ok") == 1 and "WRONG  residual_block" in text
    assert text.count("Finished. Test accuracy") == 3 and "step/s" not in text


def test_it_can_be_read_anywhere(stored):
    assert TOUR.stat().st_size < 1_000_000
    text = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users|mnt)/", text)
    assert "***" not in text and "Warning" not in text  # notes and warnings of one machine
    nbformat.validate(stored)
    assert stored.metadata.kernelspec.name == "python3"
    for cell in stored.cells:
        for link in re.findall(r"\]\((?!http)(.*?)\)", cell.source):
            assert (TOUR.parent / link).exists(), link


@pytest.mark.long
def test_it_runs(stored, tmp_path):
    """In a copy, on the sample and on fewer images: it leaves nothing in the project's folder."""
    for path in m.ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(m.ROOT / "support", tmp_path / "support")
    shutil.copytree(m.ROOT / "data" / "sample", tmp_path / "data")
    shutil.copytree(m.ROOT / "data" / "sample", tmp_path / "data" / "sample")
    shutil.copytree(m.ROOT / "save" / "record", tmp_path / "save" / "record")
    (tmp_path / "docs").mkdir()
    first = code_of(stored)[0]
    assert first.source.count("IMAGES = 6_000") == 1
    first.source = first.source.replace("IMAGES = 6_000", "IMAGES = 128")
    pictures = [shown_in(cell)[1] for cell in code_of(stored)]
    nbclient.NotebookClient(stored, timeout=600).execute(cwd=str(tmp_path / "docs"))
    shown = [shown_in(cell) for cell in code_of(stored)]
    assert [there for _, there in shown] == pictures
    text = "".join(text for text, _ in shown)
    assert "MNIST sample:" in text and "7 (" in text
    assert text.count("All 14 are ok") == 1 and "WRONG: 2 of 14" in text
    assert text.count("Finished. Test accuracy") == 3
    tags = {path.name for path in (tmp_path / "save").iterdir()}
    assert tags == {"record", "tour_128", "tour_with_shortcuts_128", "tour_without_128"}
