"""`leafkern bench` end to end on tiny inputs: kept alive, not read for speed."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("psutil")

from leafkern import bench
from leafkern.errors import InputError


def run(*code: str):
    return subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=300)


def test_wrong_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="search"):
        bench.main(["serch"])
    with pytest.raises(InputError, match="tiny"):
        bench.main(["search"], size="tinny")


def test_the_benchmarks_are_found():
    assert {"attention", "encoder", "norm", "pooling", "search"} <= set(bench.operations())


def test_all_write_their_rows_and_the_report(tmp_path, tiny_bert):
    report = tmp_path / "report.html"
    done = run(
        "import sys; from leafkern.bench import main",
        f"options = dict(report={str(report)!r}, size='tiny', model={str(tiny_bert)!r}, results={str(tmp_path)!r})",
        "sys.exit(main(['search', 'encoder', 'pooling'], **options))",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("search", "encoder", "pooling")
    search, encoder, pooling = (json.loads((tmp_path / "cpu" / f"{op}.json").read_text()) for op in names)
    assert (search["op"], encoder["op"], pooling["op"]) == names
    precisions = ("float32", "float16", "int8", "int4", "binary", "asymmetric", "rescored")
    assert {row["case"] for row in search["rows"]} == {
        *(f"{precision}/Q{q}" for precision in precisions for q in (1, 5)),
        *(f"{precision}/Q{q}/k100" for precision in ("int8", "binary", "asymmetric") for q in (1, 5)),
    }
    assert {row["case"] for row in encoder["rows"]} == {
        *(f"{part}/{mix}/float32" for part in ("text", "forward") for mix in ("real", "document")),
        "batch/real/float32/B1",
    }
    assert {row["case"] for row in pooling["rows"]} == {
        f"{op}/{part}/float32/B3xD32"
        for op in ("mean_pool", "norm_mean_pool")
        for part in ("forward", "forward and backward")
    }
    for row in search["rows"] + encoder["rows"] + pooling["rows"]:
        assert row["status"] == "ok"
        assert row["p50_s"] > 0
        assert f"bench/bench_{row['op']}.py::test_{row['op']}[" in row["command"]
    assert all(row["values"]["cosine min"] > 0.9999 for row in encoder["rows"])
    assert {"tokenize ms", "pack ms", "forward ms", "read back ms"} <= set(encoder["rows"][0]["values"])
    page = report.read_text()
    assert "int8/Q1" in page
    assert "forward/document/float32" in page


def test_the_bytes_of_pooling_are_those_that_must_move():
    from leafkern.bench import bench_pooling

    inputs = bench_pooling.Inputs(3, 32, "cpu", "float32", 0)
    entries, result = inputs.x.numel(), 3 * 32
    for op, backward, moved in [
        ("mean_pool", False, entries + result),
        ("mean_pool", True, 2 * entries + 2 * result),
        ("norm_mean_pool", False, 2 * entries + result),
        ("norm_mean_pool", True, 5 * entries + 2 * result),
    ]:
        assert bench_pooling._work(op, backward, inputs).bytes == 4 * moved


def test_the_bytes_of_norm_are_those_that_must_move():
    from leafkern.bench import bench_norm

    model, tokens = bench_norm.MODELS["MiniLM"], 5
    tile, head = tokens * 384, 32
    for op, forward, backward in [
        ("add_norm", 3 * tile, 4 * tile),
        ("bias_gelu", 2 * 4 * tile, 3 * 4 * tile),
        ("rotary", 4 * tile + tokens * head, 4 * tile + tokens * head),
    ]:
        inputs = bench_norm.Inputs(op, model, tokens, "cpu", "float32", 0)
        assert bench_norm._work(False, inputs).bytes == 4 * forward
        assert bench_norm._work(True, inputs).bytes == 4 * (forward + backward)


@pytest.mark.slow
def test_peers_agree_with_the_exact_answer(tmp_path):
    pytest.importorskip("faiss")
    done = run(
        "import sys; from leafkern.bench import main",
        f"sys.exit(main(['search'], peers=True, size='tiny', results={str(tmp_path)!r}))",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "cpu" / "search.json").read_text())["rows"]
    assert len({row["provider"] for row in rows}) >= 3
    assert not [row for row in rows if row["status"] != "ok"]


@pytest.mark.slow
def test_pooling_beside_its_peers(tmp_path):
    done = run(
        "import sys; from leafkern.bench import main",
        f"sys.exit(main(['pooling'], peers=True, size='tiny', results={str(tmp_path)!r}))",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "cpu" / "pooling.json").read_text())["rows"]
    assert {row["provider"] for row in rows} == {"leafkern", "torch, packed", "torch, padded"}
    assert not [row for row in rows if row["status"] != "ok"]
