"""Metrics against values computed by hand and by scipy; loaders and their errors; the grid on known vectors."""

import gzip
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from leafkern import Encoder, evaluate
from leafkern.errors import InputError
from leafkern.evaluate import Retrieval, Similarity, evaluate_vectors, load, ndcg, recall, spearman
from leafkern.ops.retrieval import fold

pytestmark = pytest.mark.filterwarnings("ignore::leafkern.ops._core.backend.FallbackWarning")


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    monkeypatch.setattr(evaluate, "_TIMED_SECONDS", 0.01)


def test_ndcg_by_hand():
    qrels = {"q": {"a": 3, "b": 2, "c": 0, "d": 1}}
    dcg = 2 / math.log2(2) + 0 + 3 / math.log2(4)
    best = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg([["b", "x", "a", "c"]], ["q"], qrels) == pytest.approx(dcg / best)
    assert ndcg([["a", "b", "d"]], ["q"], qrels) == pytest.approx(1)
    assert ndcg([["b", "a"]], ["q"], qrels, k=1) == pytest.approx(2 / 3)
    assert ndcg([["x"] * 10 + ["a"]], ["q"], qrels) == 0  # beyond the tenth rank nothing counts
    assert ndcg([[]], ["q"], qrels) == 0
    # A query without a relevant document is left out; two queries are averaged.
    qrels = {"q": {"a": 1}, "r": {"a": 0}, "s": {"b": 1}}
    assert ndcg([["a"], ["a"], ["a", "b"]], ["q", "r", "s"], qrels) == pytest.approx((1 + 1 / math.log2(3)) / 2)
    with pytest.raises(InputError, match="no query has a relevant document"):
        ndcg([["a"]], ["r"], qrels)
    with pytest.raises(InputError, match="1 rankings for 2 queries"):
        ndcg([["a"]], ["q", "r"], qrels)


def test_ndcg_counts_unretrievable_documents_in_the_ideal():
    qrels = {"q": {f"d{i}": 1 for i in range(20)}}
    ideal = sum(1 / math.log2(rank + 2) for rank in range(10))
    assert ndcg([["d3"]], ["q"], qrels) == pytest.approx(1 / ideal)
    assert recall([["d3", "d4"]], ["q"], qrels) == pytest.approx(2 / 20)


def test_recall_by_hand():
    qrels = {"q": {"a": 1, "b": 2, "c": 0}, "r": {"z": 1}}
    assert recall([["a", "c", "x"], ["x"]], ["q", "r"], qrels) == pytest.approx((1 / 2 + 0) / 2)
    assert recall([["x", "a", "b"], ["z"]], ["q", "r"], qrels, k=2) == pytest.approx((1 / 2 + 1) / 2)


def test_spearman_equals_scipy():
    generator = np.random.default_rng()
    for size in (2, 3, 50, 401):
        x, y = generator.integers(0, max(2, size // 3), size), generator.normal(size=size)
        x[:2] = 0, 1
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(InputError, match="one length"):
        spearman([1, 2], [1, 2, 3])


def beir(folder, *, packed=False, qrels="qrels.tsv"):
    def write(name, lines):
        content = ("\n".join(lines) + "\n").encode()
        file = folder / (name + ".gz" * packed)
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(gzip.compress(content) if packed else content)

    write(
        "corpus.jsonl",
        [
            json.dumps({"_id": "d1", "title": "leaf", "text": "the leaf"}),
            json.dumps({"_id": "d2", "title": "", "text": "a kernel"}),
            json.dumps({"_id": "d3", "text": "search"}),
        ],
    )
    write("queries.jsonl", [json.dumps({"_id": f"q{i}", "text": f"query {i}"}) for i in range(4)])
    write(qrels, ["query-id\tcorpus-id\tscore", "q0\td1\t1", "q2\td2\t2", "q2\td9\t1", "q3\td1\t0"])
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/test.tsv"])
def test_beir(tmp_path, packed, qrels):
    task = load(beir(tmp_path / "task", packed=packed, qrels=qrels))
    assert task.name == "task"
    assert task.corpus_ids == ["d1", "d2", "d3"]
    assert task.corpus_texts == ["leaf the leaf", "a kernel", "search"]
    assert (task.query_ids, task.query_texts) == (["q0", "q2"], ["query 0", "query 2"])
    assert task.qrels["q2"] == {"d2": 2, "d9": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}',
            r"corpus\.jsonl:2: _id 'a' occurs twice",
        ),
        ("corpus.jsonl", '{"_id": "a"}', r"corpus\.jsonl:1: no field 'text'"),
        ("queries.jsonl", '{"text": "a"}', r"queries\.jsonl:1: no field '_id'"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq0\td1", r"qrels\.tsv:2: expected query-id, corpus-id, score"),
        ("qrels.tsv", "h\th\th\nq0\td1\t1\nq9\td1\t1", r"qrels\.tsv:3: query 'q9' is not in the queries"),
        ("qrels.tsv", "h\th\th\nq0\tnone\t1", r"qrels\.tsv:1: no query has a relevant document"),
    ],
)
def test_bad_beir(tmp_path, name, content, message):
    beir(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_missing_data(tmp_path):
    with pytest.raises(InputError, match=r"has no corpus\.jsonl \(nor \.gz\)"):
        load(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "none")


def test_sts(tmp_path):
    file = tmp_path / "dev.tsv"
    file.write_text('score\tsentence1\tsentence2\n2.5\tA "girl\tB\n0\tC\tD\n')
    assert load(file) == Similarity([2.5, 0], ['A "girl', "C"], ["B", "D"], "dev")
    for content, message in (
        ("h\th\th\n1\ta\n", r"dev\.tsv:2: 2 columns"),
        ("h\th\th\n1\ta\tb\nx\ta\tb\n", r"dev\.tsv:3: score 'x' is not a number"),
        ("h\th\th\nnan\ta\tb\n", r"dev\.tsv:2: score 'nan'"),
        ("", r"dev\.tsv:1: 0 pairs"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            load(file)


def vectors(n=300, q=20, width=32):
    generator = np.random.default_rng()
    documents = generator.normal(size=(n, width)).astype(np.float32)
    rows = generator.choice(n, q, replace=False)
    queries = documents[rows] + 0.7 * generator.normal(size=(q, width)).astype(np.float32)
    ids = [f"d{i}" for i in range(n)]
    names = [f"q{i}" for i in range(q)]
    qrels = {name: {ids[row]: 1} for name, row in zip(names, rows)}
    return documents, queries, Retrieval(ids, [""] * n, names, [""] * q, qrels, "task")


def test_grid():
    documents, queries, task = vectors()
    perfect = [[document] for query in task.query_ids for document in task.qrels[query]]
    result = evaluate_vectors(
        {"one": (documents, queries), "two": (documents * 3, queries)}, task, rankings={"x": perfect}
    )
    rows = {(row["system"], row["dim"], row["precision"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * 3 * 6 + 1
    assert {dim for _, dim, _ in rows} == {32, 16, 8, None}
    assert rows["x", None, None]["ndcg"] == 1
    full = rows["one", 32, "float32"]
    exact = np.argsort(-(queries @ (documents / np.linalg.norm(documents, axis=1, keepdims=True)).T), axis=1)[:, :10]
    ranked = [[task.corpus_ids[row] for row in line] for line in exact]
    assert full["ndcg"] == pytest.approx(ndcg(ranked, task.query_ids, task.qrels))
    assert full["neighbours"] == full["found_10"] == full["found_100"] == 1
    assert full["found_100_rescored"] > 0.99
    assert full["queries_per_s"] > 0
    assert [rows["one", 32, p]["bytes_per_vector"] for p in evaluate.DEFAULT_PRECISIONS] == [128, 32, 16, 4, 4, 36]
    assert rows["one", 32, "int8"]["neighbours"] > rows["one", 32, "binary"]["neighbours"]
    assert rows["one", 32, "binary+int8"]["neighbours"] > rows["one", 32, "binary"]["neighbours"]
    assert rows["one", 32, "binary@8"]["found_10"] > rows["one", 32, "binary"]["found_10"]
    assert rows["one", 8, "float32"]["neighbours"] == 1 > rows["one", 8, "float32"]["found_10"]
    assert rows["one", 8, "float32"]["ndcg"] < full["ndcg"]
    assert rows["two", 16, "int8"]["ndcg"] == pytest.approx(rows["one", 16, "int8"]["ndcg"])  # normalised
    assert result == json.loads(json.dumps(result))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def best(scores, k):
    """Rows of the k largest per query; equal scores in order of rows."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def share(found, exact):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist())])


@pytest.mark.parametrize("n", [60, 700])
@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize(
    ("precision", "scored"),
    [
        ("float32", lambda queries, base: queries @ base.T),
        ("binary", lambda queries, base: np.where(queries > 0, 1, -1) @ np.where(base > 0, 1, -1).T),
        ("binary@8", lambda queries, base: codes_of(queries) @ np.where(base > 0, 1, -1).T),
        ("binary@8+float32", lambda queries, base: codes_of(queries) @ np.where(base > 0, 1, -1).T),
    ],
)
def test_recall_against_float32_is_what_plain_numpy_counts(n, width, precision, scored):
    documents, queries, task = vectors(n)
    result = evaluate_vectors({"s": (documents, queries)}, task, dims=[width], precisions=[precision])
    (row,) = result["rows"]
    documents, queries = unit(documents.astype(np.float64)), unit(queries.astype(np.float64))
    narrow, asked = unit(documents[:, :width]), unit(queries[:, :width])
    halves = documents.astype(np.float16).astype(np.float64)
    for depth in evaluate.RECALL_DEPTHS:
        k = min(depth, n)
        exact = best(queries @ documents.T, k)
        candidates = best(scored(asked, narrow), 4 * k)
        again = {"exact": asked @ narrow.T} if "+" in precision else {"exact": queries @ halves.T}
        lost = np.full_like(again["exact"], -np.inf)
        np.put_along_axis(lost, candidates, np.take_along_axis(again["exact"], candidates, 1), 1)
        rescored = share(best(lost, k), exact)
        # A near tie of float32 and float64 may swap one of the 20 queries' results.
        room = 1 / exact.size + 1e-9
        if "+" in precision:
            assert row[f"found_{depth}"] == pytest.approx(rescored, abs=room)
            assert row[f"found_{depth}_rescored"] is None
        else:
            assert row[f"found_{depth}"] == pytest.approx(share(candidates[:, :k], exact), abs=room)
            assert row[f"found_{depth}_rescored"] == pytest.approx(rescored, abs=room)


def codes_of(queries):
    """7-bit queries, in float32 as `search` folds them."""
    return fold(torch.from_numpy(queries.astype(np.float32)))[0].numpy().astype(np.float64)


def test_a_query_does_not_find_itself():
    documents, _, task = vectors()
    twins = task._replace(query_ids=task.corpus_ids[:20], qrels={f"d{i}": {f"d{i + 20}": 1} for i in range(20)})
    row = evaluate_vectors({"s": (documents, documents[:20])}, twins, dims=[32], precisions=["float32"])["rows"][0]
    ranks = np.argsort(-(n := documents / np.linalg.norm(documents, axis=1, keepdims=True))[:20] @ n.T, axis=1)
    ranked = [[f"d{j}" for j in line if j != i][:10] for i, line in enumerate(ranks)]
    assert row["ndcg"] == pytest.approx(ndcg(ranked, twins.query_ids, twins.qrels))
    elsewhere = twins._replace(query_texts=["a text that the document of the same id does not hold"] * 20)
    row = evaluate_vectors({"s": (documents, documents[:20])}, elsewhere, dims=[32], precisions=["float32"])["rows"][0]
    ranked = [[f"d{j}" for j in line][:10] for line in ranks]
    assert row["ndcg"] == pytest.approx(ndcg(ranked, twins.query_ids, twins.qrels))
    judged = twins._replace(qrels={f"d{i}": {f"d{i}": 1} for i in range(20)})
    row = evaluate_vectors({"s": (documents, documents[:20])}, judged, dims=[32], precisions=["float32"])["rows"][0]
    assert row["ndcg"] == 1


def test_grid_refuses():
    documents, queries, task = vectors()
    for options, message in (
        ({"dims": [33]}, "dims: 33 is not a width of s, whose vectors have 32 numbers"),
        ({"precisions": ["int9"]}, "unknown name 'int9'; did you mean 'int8'"),
        ({"precisions": ["int8+binary"]}, "'binary' is no finer precision than 'int8'"),
        ({"precisions": ["binary@4"]}, "'binary@4': expected binary@1 or binary@8"),
        ({"precisions": ["int8@8"]}, "'int8@8': expected binary@1 or binary@8"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_vectors({"s": (documents, queries)}, task, **options)
    with pytest.raises(InputError, match="widths 32 and 16"):
        evaluate_vectors({"s": (documents, queries[:, :16])}, task)
    with pytest.raises(InputError, match="7 and 20 vectors for 300 documents"):
        evaluate_vectors({"s": (documents[:7], queries)}, task)


def test_similarity_grid():
    generator = np.random.default_rng()
    first, second = (generator.normal(size=(150, 16)).astype(np.float32) for _ in range(2))
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    task = Similarity((cosine * 2 + 1).tolist(), [""] * 150, [""] * 150)
    rows = evaluate_vectors({"s": (first, second)}, task, dims=[16])["rows"]
    assert [row["precision"] for row in rows] == ["float32", "int8", "int4", "binary"]
    assert rows[0]["spearman"] == pytest.approx(1)
    assert 1 > rows[1]["spearman"] > rows[2]["spearman"] > rows[3]["spearman"] > 0.3


def test_models(tmp_path, tiny_bert):
    teacher = Encoder.from_pretrained(tiny_bert)
    student = Encoder.from_layers(teacher, [0, 3])
    result = evaluate.evaluate(student, tiny_bert, data=beir(tmp_path), dims=[32], precisions=["float32", "binary"])
    assert {row["system"] for row in result["rows"]} == {"teacher", "student", "asymmetric"}
    assert result["models"]["teacher"]["fingerprint"] == teacher.fingerprint
    narrow = Encoder.from_layers(teacher, [0], dense_out=16)
    result = evaluate.evaluate(narrow, teacher, data=beir(tmp_path), precisions=["float32"])
    assert {row["system"] for row in result["rows"]} == {"teacher", "student"}
    assert "32 and 16" in result["notes"][0]
    with pytest.raises(InputError, match="dims: 32 is not a width of student, whose vectors have 16"):
        evaluate.evaluate(narrow, teacher, data=beir(tmp_path), dims=[32])


@pytest.mark.skipif("LEAFKERN_DATA" not in os.environ, reason="needs LEAFKERN_DATA")
def test_real_tasks():
    folder = Path(os.environ["LEAFKERN_DATA"])
    task = load(folder / "scifact")
    assert (len(task.corpus_ids), len(task.query_ids)) == (5183, 300)
    assert sum(map(len, task.qrels.values())) == 339
    for name, pairs in (("train", 5749), ("dev", 1500), ("test", 1379)):
        sts = load(folder / "stsb" / f"{name}.tsv.gz")
        assert len(sts.scores) == pairs
        words = [[set(re.findall(r"\w+", text.lower())) for text in side] for side in (sts.first, sts.second)]
        overlap = [len(a & b) / len(a | b) for a, b in zip(*words)]
        assert 0.5 < spearman(overlap, sts.scores) < 0.8  # shared words alone give about this much
