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
    assert {"encoder", "search"} <= set(bench.operations())


def test_search_writes_its_rows_and_report(tmp_path):
    report = tmp_path / "report.html"
    done = run(
        "import sys; from leafkern.bench import main",
        f"sys.exit(main(['search'], report={str(report)!r}, size='tiny', results={str(tmp_path)!r}))",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "cpu" / "search.json").read_text())
    assert found["op"] == "search"
    assert {row["case"] for row in found["rows"]} >= {"float32/Q1", "int8/Q1", "binary/Q5", "asymmetric/Q5"}
    assert all(row["status"] == "ok" and row["p50_s"] > 0 for row in found["rows"])
    assert all("bench/bench_search.py::test_search[" in row["command"] for row in found["rows"])
    assert "int8/Q1" in report.read_text()


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


def test_encoder_runs_on_a_given_model(tmp_path, tiny_bert):
    done = run(
        "import sys; from leafkern.bench import main",
        f"sys.exit(main(['encoder'], size='tiny', model={str(tiny_bert)!r}, results={str(tmp_path)!r}))",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "cpu" / "encoder.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {
        f"{part}/{mix}/float32" for part in ("text", "forward") for mix in ("real", "document")
    }
    assert all(row["values"]["cosine min"] > 0.9999 for row in rows)
