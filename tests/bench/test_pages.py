"""Pages that are made from figures: the recall guide, the billion, the targets; and the recall that is measured."""

import copy
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psutil")

from leafkern.evaluate import Retrieval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"bench.{name}")


def task(name, judged):
    ids, asked = [f"d{i}" for i in range(300)], [f"q{i}" for i in range(20)]
    qrels = {query: {ids[i]: 1} for i, query in enumerate(asked)} if judged else {}
    return Retrieval(ids, [""] * 300, asked, [""] * 20, qrels, name)


def test_recall_is_measured_and_the_guide_follows_it(module, tmp_path, monkeypatch):
    recall = module("recall")
    generator = np.random.default_rng()
    documents = generator.normal(size=(300, 32)).astype(np.float32)
    queries = documents[:20] + 0.5 * generator.normal(size=(20, 32)).astype(np.float32)
    given = {"one": (task("one", True), None), "two": (task("two", False), 64)}
    monkeypatch.setattr(recall, "collections", lambda data: given)
    monkeypatch.setattr(recall, "vectors", lambda *asked: (documents, queries))
    monkeypatch.setattr("leafkern.evaluate._TIMED_SECONDS", 0.01)
    monkeypatch.delenv("LEAFKERN_DATA", raising=False)
    assert recall.main(["--work", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "recall.json").read_text())
    one, two = document["collections"]["one"], document["collections"]["two"]
    assert "ndcg" in one["grid"][0]
    assert "ndcg" not in two["grid"][0]
    assert [row | {"ndcg": 0} for row in two["grid"]] == [row | {"ndcg": 0} for row in one["grid"]]  # the same vectors
    exact = one["grid"][0]
    assert (exact["precision"], exact["dim"], exact["found_10"]) == ("float32", 32, 1)
    # Of 300 documents, the best 20·10 hold nearly everything.
    assert min(row["found_10"] for row in one["oversampling"] if row["oversample"] == 20) > 0.9
    # float32 does not feel a rotation, codes do a little.
    assert {row["precision"] for row in one["rotated"]} == set(recall.ROTATED)
    assert all(0.2 < row["found_10"] <= 1 for row in one["rotated"])
    guide = (tmp_path / "out" / "guide.md").read_text()
    for row in one["grid"]:
        assert f"{row['found_10']:.3f} / {row['found_10_rescored']:.3f}" in guide
    changed = copy.deepcopy(document)
    changed["collections"]["one"]["grid"][2]["found_10"] = 0.123
    page = module("recall_page")
    assert "| 0.123 / " in page.guide(changed, {})
    assert recall.main(["--page", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "guide.md").read_text() == guide
    assert recall.main(["--page", "--output", str(tmp_path / "none")]) == 2
    assert "Vectors of all-MiniLM-L6-v2" in guide
    assert f"after {recall.ROTATIONS} random rotations" in " ".join(guide.split())
    assert "SciFact was not on the machine" in " ".join(guide.split())
    assert "commit 0123456789ab-changed," in page.guide(document | {"commit": "0123456789abcdef-changed"}, {})
    assert "Vectors of mine," in " ".join(page.guide(document | {"model": "mine"}, {}).split())


def test_the_guide_s_speeds_are_ratios_of_one_run(module):
    page, figures = module("recall_page"), module("figures")

    def measured(**seconds):
        rows = {
            name: {"ours": name == "leafkern", "p50_s": time, "shape": {"N": 2_000_000, "D": 384}}
            for name, time in seconds.items()
        }
        document = {"date": "2026-01-02", "commit": None, "machine": {"cpu": "c", "threads": 2, "gpu": None}}
        return figures.Measured(rows, {}, document)

    speeds = {
        "float32/Q1": measured(leafkern=1.0),
        "int8/Q1": measured(leafkern=0.5, **{page.FLOAT32: 2.0}),
        "int4/Q1": measured(leafkern=0.5),  # without float32 beside it
        "rescored/Q1": measured(leafkern=0.6, **{page.BITS_ALONE: 0.4}),
    }
    assert [page._faster(speeds, case, 1) for case in ("float32", "int8", "int4", "binary")] == [1.0, 4.0, None, None]
    said = page.cost_of_rescoring(speeds)
    assert "Of 2 million × 384 bits" in said
    assert "took 1.50 × for Q = 1 the time of bits alone" in said
    assert page.cost_of_rescoring({}) == ""


def test_collections_and_their_vectors(module, tmp_path, monkeypatch, tiny_bert):
    data = module("recall_data")
    source = "\n".join(f'def f{i}():\n    """Return the leaf of number {i} in the tree."""\n' for i in range(30))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "leaves.py").write_text(source + '\ndef long():\n    """' + "word " * 50 + '"""\n')
    monkeypatch.setattr(data, "source_roots", lambda: [tmp_path / "code"])
    monkeypatch.setattr(data, "DOCSTRINGS", 20)
    monkeypatch.setattr(data, "HELD_OUT", 5)
    found = data.docstrings()
    assert (len(found.corpus_texts), len(found.query_texts)) == (15, 5)
    assert len({*found.corpus_texts, *found.query_texts}) == 20
    assert all(len(text) <= 160 for text in found.corpus_texts)
    assert found == data.docstrings()
    documents, queries = data.vectors(found, None, tiny_bert, tmp_path / "work")
    assert (documents.shape[0], queries.shape[0]) == (15, 5)
    monkeypatch.setattr(data.Encoder, "encode", None)  # kept vectors are not encoded again
    again = data.vectors(found, None, tiny_bert, tmp_path / "work")
    assert np.array_equal(again[0], documents)
    with pytest.raises(TypeError):
        data.vectors(found._replace(query_texts=["another"] * 5), None, tiny_bert, tmp_path / "work")


def search_document(seconds, date="2026-01-02", cpu="here"):
    """Result file of a benchmark: ours by case in seconds, and a peer that takes three times as long."""
    rows = [
        {
            "case": case,
            "provider": provider,
            "ours": provider == "leafkern",
            "same_job": True,
            "status": "ok",
            "p50_s": time * factor,
            "bytes": 384e6,
            "operations": 768e9,
            "percent_of_limit": 50.0,
            "shape": {"N": 1_000_000, "D": 384},
        }
        for case, time in seconds.items()
        for provider, factor in (("leafkern", 1), ("FAISS PQFastScan 96x4", 3))
    ]
    rows.append({"case": "int8/Q1", "provider": "FAISS SQ8", "ours": False, "status": "failed"})
    ceilings = {name: {"rate": rate} for name, rate in (("read", 50e9), ("int8_maddubs", 400e9))}
    machine = {"cpu": cpu, "threads": 2, "gpu": None}
    return {"date": date, "commit": "c" * 40, "size": "full", "machine": machine, "ceilings": ceilings, "rows": rows}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "cpu").mkdir()
    small = search_document({"int8/Q1": 9.0, "binary/Q1": 9.0}, date="2026-01-04") | {"size": "small"}
    (tmp_path / "cpu" / "search-small.json").write_text(json.dumps(small))
    first = search_document({"int8/Q1": 0.5, "int8/Q1000": 2.0, "asymmetric/Q1": 0.004}, cpu="old")
    (tmp_path / "cpu" / "search.json").write_text(json.dumps(first))
    second = search_document({"int8/Q1": 0.012}, date="2026-01-03")
    (tmp_path / "cpu" / "search-2.json").write_text(json.dumps(second))
    return tmp_path


def test_a_case_measured_twice_is_the_later_one(module, results):
    cases = module("figures").cases(results / "cpu", "search")
    assert cases["int8/Q1"].seconds == 0.012
    assert set(cases["int8/Q1"].rows) == {"leafkern", "FAISS PQFastScan 96x4"}  # what failed was not timed
    assert cases["asymmetric/Q1"].seconds == 0.004
    assert cases["asymmetric/Q1"].faster_than("FAISS") == pytest.approx(3)
    assert cases["asymmetric/Q1"].faster_than("USearch") is None
    assert "binary/Q1" not in cases  # a small run's
    assert module("figures").cases(results / "none", "search") == {}


def test_targets_by_hand(module, results):
    targets = module("targets")
    found = targets.measurements(results)
    lines = {(line[0], line[1]): line[2:] for line in (target.line(found) for target in targets._targets())}
    assert lines["int8/Q1", "of read bandwidth"] == ["≥ 80.0 %", "64.0 %", "missed"]  # 384 MB at 50 GB/s: 7.68 of 12 ms
    assert lines["int8/Q1000", "of the maddubs + madd peak"] == ["≥ 65.0 %", "96.0 %", "reached"]
    assert lines["asymmetric/Q1", "FAISS PQFastScan 96x4"] == ["≥ 1 ×", "3 ×", "reached"]
    assert lines["asymmetric/Q32", "FAISS PQFastScan 96x4"][1:] == ["not measured", ""]
    assert lines["binary/Q1", "of read bandwidth"][1] == "not measured"
    assert targets.main(["--results", str(results), "--output", str(results / "page.md")]) == 0
    page = (results / "page.md").read_text()
    assert "| int8/Q1 | of read bandwidth | ≥ 80.0 % | 64.0 % | missed |" in page
    assert targets.main(["--results", str(results / "none")]) == 2
    assert "1 million × 384" in page


def test_more_targets_by_hand(module):
    targets, figures = module("targets"), module("figures")

    def measured(rows, **ceilings):
        given = {name: {"ours": name == "leafkern"} | row for name, row in rows.items()}
        document = {"date": "2026-01-02", "commit": "c", "machine": {"cpu": "here", "threads": 2, "gpu": None}}
        return figures.Measured(given, ceilings, document)

    gpu = {"leafkern": {"p50_s": 1.0, "bytes": 9e12, "operations": 8e14}, "torch matmul + topk (float16)": {"p50_s": 3}}
    several = {"leafkern": {"p50_s": 1.0, "bytes": 1.0}, "USearch exact": {"p50_s": 9}, "NumKong": {"p50_s": 2.5}}
    near = {"leafkern": {"p50_s": 1.0, "bytes": 8.0}, "USearch exact": {"p50_s": 1.2}}
    found = {
        ("cpu", "search"): {
            "int8/Q1": measured(several, read=10.0),
            "binary/Q1": measured(near, read=10.0),
            "int8/Q32/k100": measured({"leafkern": {"p50_s": 1.2}, "leafkern, k = 10": {"p50_s": 1.0}}),
        },
        ("cpu", "quantization"): {"int8": measured({"leafkern": {"p50_s": 1, "percent_of_limit": 55.0}})},
        ("cpu", "index"): {
            "open": measured({"leafkern": {"p50_s": 0.02, "peak_bytes": 10, "shape": {"bytes": 500}}}),
        },
        ("h200", "search"): {"int8/Q1": measured(gpu, copy=1e13), "int8/Q1000": measured(gpu, int8_gemm=1e15)},
    }
    lines = {(line[0], line[1]): line[3:] for line in (target.line(found) for target in targets._targets())}
    assert lines["int8/Q1", "the best of FAISS, USearch, NumKong"] == ["2.5 ×", "reached"]  # the fastest, not the first
    # 8 bytes at 10 a second take 0.8 s, a peer 1.2 s: nobody can be 2 times faster.
    assert lines["binary/Q1", "the best of FAISS, USearch, NumKong"] == ["1.2 ×", "missed; at the limit 1.5 ×"]
    assert lines["int8/Q32/k100", "slower than k = 10 by"] == ["20.0 %", "missed"]
    assert lines["quantise int8", "of copy bandwidth"] == ["55.0 %", "reached"]
    assert lines["open 10 GB", "milliseconds"] == ["20 ms", "reached"]
    assert lines["open 10 GB", "resident memory, of its size"] == ["2.0 %", "missed"]
    assert lines["H200, int8/Q1", "of copy bandwidth"] == ["90.0 %", "reached"]
    assert lines["H200, int8/Q1000", "of the int8 product's peak"] == ["80.0 %", "reached"]
    assert lines["H200, int8/Q1000", "fp16 torch matmul + topk"] == ["3 ×", "reached"]
    one = {"width": 64, "grid": [{"precision": "binary@8", "dim": 64, "found_10": 0.8, "found_10_rescored": 0.9}]}
    for collection, said in ((one, "0.800"), (one | {"width": 384}, "not measured")):
        target = next(target for target in targets._targets() if target.what.startswith("recall@10"))
        assert target.line({"recall": {"collections": {"docstrings": collection}}})[3] == said


def test_billion_by_hand(module, results):
    billion = module("billion")
    assert billion.main(["--results", str(results)]) == 0
    page = (results / "billion.md").read_text()
    # 12 ms for 1M × 384 on 2 threads: times 1000 × 256/384 is 8 s, 16 core-seconds.
    assert "| int8 | 1 | 16 | 1 s | 250 ms | 62.5 ms | 16 |" in page
    assert "| int8 | 256 GB | 2 | 3 |" in page  # 256 GB in machines of 0.85·256, GPUs of 0.85·141
    assert "left no figures here yet" in page
    # A candidate: two scores, row, id; 4·10 of them, from each of ceil(1024 / (0.85·256)) = 5 machines.
    assert "sends 960 bytes a query for k = 10" in page
    assert "over 5 shards\n4.8 MB" in page or "over 5 shards 4.8 MB" in page
    (results / "h200").mkdir()
    gpu = search_document({"int8/Q1": 0.0001}, cpu="x")
    gpu["machine"]["gpu"] = {"name": "NVIDIA H200"}
    (results / "h200" / "search.json").write_text(json.dumps(gpu))
    assert billion.main(["--results", str(results)]) == 0
    # 0.1 ms: 66.7 ms for the billion, over the three GPUs that hold 256 GB.
    assert "| int8 | 1 | 3 | 22.2 ms | 45 |" in (results / "billion.md").read_text()
    assert billion.main(["--results", str(results / "none")]) == 2


def test_figures_that_the_readme_names_are_there():
    for readme, base in ((ROOT / "README.md", ROOT), (ROOT / "bench" / "README.md", ROOT / "bench")):
        links = re.findall(r"\]\(((?:bench/)?results/[^)#]+)", readme.read_text())
        assert links
        assert [link for link in links if not (base / link).is_file()] == []


@pytest.mark.parametrize("name", ["recall/guide.md", "billion.md", "search.md"])
def test_the_pages_kept_are_what_their_figures_say(module, tmp_path, name):
    """After a new measurement: `python -m bench.recall --page`, `bench.billion`, `bench.targets`."""
    if name == "recall/guide.md":
        document = json.loads((RESULTS / "recall" / "recall.json").read_text())
        made = module("recall_page").guide(document, module("figures").cases(RESULTS / "cpu", "search"))
    elif name == "billion.md":
        cases = module("figures").cases
        made = module("billion").page(cases(RESULTS / "cpu", "search"), cases(RESULTS / "h200", "search"))
    else:
        targets = module("targets")
        made = targets.page(targets.measurements(RESULTS))
    assert (RESULTS / name).read_text() == made
