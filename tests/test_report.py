"""The HTML report: well-formed, self-contained, everything escaped; names beside plots never overlap."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from leafkern.report import Point, Section, Series, cards, preformatted, render, scatter, table
from leafkern.report.evaluation import page
from leafkern.report.plot import WIDTH, frontier

EVIL = "<script>alert('x')</script> & \"quoted\""


def parse(html):
    """The page as XML: it is written so that it is well-formed as such, too."""
    assert html.startswith("<!DOCTYPE html>")
    return ET.fromstring(html.removeprefix("<!DOCTYPE html>"))


def test_everything_is_escaped_and_nothing_is_loaded():
    points = [Point(1, 2, EVIL, EVIL), Point(3, 4, "b", EVIL)]
    html = render(
        EVIL,
        [
            Section(EVIL, [EVIL, cards([(EVIL, EVIL)]), preformatted(EVIL)]),
            Section("", [table([EVIL, "n"], [[EVIL, 1.0]], caption=EVIL, best={"n": "max"})]),
            Section("", [scatter([Series(EVIL, points)], x=EVIL, y=EVIL, caption=EVIL)]),
        ],
        lead=EVIL,
        foot=EVIL,
    )
    root = parse(html)
    assert not root.findall(".//script")
    assert "<script" not in html
    for attribute in ("src=", "href=", "url(", "@import", "http:", "https:", "onload", "onclick"):
        assert attribute not in html
    texts = "".join(root.itertext())
    assert texts.count(EVIL) >= 13


def rows_of(html):
    root = ET.fromstring(html)
    return [[(cell.text or "", cell.get("class") or "") for cell in row] for row in root.iter("tr")]


def test_table():
    html = table(
        ["who", "speed", "error", "note"],
        [["a", 1234.5, 0.25, "x"], ["a", 7, None, "y"], ["b", 1234.5, 0.125, None]],
        formats={"error": ".3f"},
        best={"speed": "max", "error": "min"},
        group="who",
    )
    head, *rows = rows_of(html)
    assert [name for name, _ in head] == ["who", "speed", "error", "note"]
    assert rows[0] == [("a", ""), ("1,234", "n best"), ("0.250", "n"), ("x", "")]
    assert rows[1] == [("", ""), ("7", "n"), ("–", "n"), ("y", "")]
    assert rows[2] == [("b", ""), ("1,234", "n best"), ("0.125", "n best"), ("–", "")]


def test_frontier():
    points = [(1, 5), (2, 4), (3, 6), (3, 7), (4, 7), (5, 9)]
    assert frontier(points) == [(1, 5), (3, 7), (5, 9)]
    assert frontier([(1, 5), (2, 4), (3, 3), (3, 2), (2.5, 1)], larger_x_better=True) == [(1, 5), (2, 4), (3, 3)]


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("spread", [0, 1e-3, 1e6])
def test_plots_hold_their_marks_and_names(spread, log_x):
    series = [
        Series(f"a rather long name {i}", [Point(2 + spread * j, 0.5 + spread * i * j * 1e-6, "m") for j in range(4)])
        for i in range(8)
    ]
    series.append(Series("a level", level=0.5))
    series.append(Series("not a number", [Point(float("nan"), 1)]))
    root = ET.fromstring(scatter(series, x="x", y="y", log_x=log_x))
    names = [text for text in root.iter("text") if text.get("class") == "name"]
    heights = sorted(float(name.get("y")) for name in names)
    assert len(names) == 9
    assert all(after - before >= 16 for before, after in itertools.pairwise(heights))
    assert all(0 < height < 400 for height in heights)
    for path in root.iter("path"):
        x, y = map(float, re.match(r"M(-?[\d.]+) (-?[\d.]+)", path.get("d")).groups())
        assert 0 <= x <= WIDTH
        assert 0 <= y <= 400
    assert ET.fromstring(scatter([], x="x", y="y")).text == "Nothing to plot."


def result(kind):
    found = ("found_10", "found_10_rescored", "found_100", "found_100_rescored")
    retrieval = ("ndcg", "recall", "neighbours", *found, "queries_per_s")
    quality = {"retrieval": retrieval, "similarity": ("spearman",)}[kind]
    rows = [
        {"system": system, "dim": dim, "precision": precision, "bytes_per_vector": dim * size}
        | {name: 0.9 / (i + 1) for name in quality}
        for i, system in enumerate(("teacher", "student", EVIL))
        for dim in (64, 32)
        for precision, size in (("float32", 4), ("int8", 1))
    ]
    rows.append({"system": "BM25", "dim": None, "precision": None, "bytes_per_vector": None, quality[0]: 0.4})
    sizes = {"documents": 5, "queries": 3, "k": 10} if kind == "retrieval" else {"pairs": 4}
    machine = {"leafkern": "1", "torch": "2", "threads": 1, "machine": EVIL}
    return {"task": {"name": EVIL, "kind": kind, **sizes}, "rows": rows, "machine": machine, "notes": [EVIL]}


@pytest.mark.parametrize("kind", ["retrieval", "similarity"])
def test_evaluation_page(kind):
    given = result(kind)
    html = page(given)
    root = parse(html)
    assert len(root.findall(".//svg")) == (3 if kind == "retrieval" else 2)
    assert "<script" not in html
    body = root.findall(".//tbody/tr")
    assert len(body) == len(given["rows"])
    assert "50.0%" in "".join(root.find(".//*[@class='cards']").itertext())  # the student's 0.45 of the teacher's 0.9
    assert "How to read this" in html
