"""The benchmark harness: what it refuses to time, its arithmetic, its inputs, its files."""

import json
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("psutil")

from leafkern.bench import ceilings, harness, lengths, machine, search_data

from leafkern.errors import InputError

CEILINGS = {
    "rate": ceilings.Ceiling(1000.0, "OP", 1, "made up"),
    "faster": ceilings.Ceiling(4000.0, "OP", 1, "made up"),
    "read": ceilings.Ceiling(100.0, "byte", 1, "made up"),
}


def work(**changed):
    given = dict(operations=10.0, unit="OP", rates=("rate",), bytes=0.5, bandwidth="read", items=4, item="query")
    return harness.Work(**(given | changed))


def contestant(name, calls, *, output=1, wrong=None, seconds=0.0, **options):
    def run(i):
        calls.append((name, i))
        time.sleep(seconds)
        return output

    return harness.Contestant(name, run, lambda got, i: wrong, **options)


def case(*contestants, **options):
    return harness.Case("toy", "toy/1", {"N": 1}, work(), contestants, **options)


def test_floor_is_the_larger_of_arithmetic_and_memory():
    assert work().floor(CEILINGS) == pytest.approx(10 / 1000)
    assert work(bytes=5.0).floor(CEILINGS) == pytest.approx(5 / 100)
    assert work(rates=("rate", "faster")).floor(CEILINGS) == pytest.approx(0.5 / 100)
    assert work(rates=("absent", "faster"), bytes=0.0).floor(CEILINGS) == pytest.approx(10 / 4000)
    assert work(rates=("absent",)).floor(CEILINGS) is None
    assert work(bandwidth="absent").floor(CEILINGS) is None


def test_less_work_has_no_share_of_the_limit():
    calls = []
    ours, part = contestant("leafkern", calls, ours=True), contestant("part", calls, same_job=False, limited=False)
    rows = harness.measure(case(ours, part), CEILINGS, budget=0.1)
    assert rows[0]["percent_of_limit"] > 0
    assert rows[1]["status"] == "ok"
    assert rows[1]["percent_of_limit"] is None


def test_a_very_slow_peer_is_quoted_by_its_checked_call(monkeypatch):
    monkeypatch.setattr(harness, "ONE_CALL_S", 0.02)
    calls = []
    slow, ours = contestant("slow", calls, seconds=0.03), contestant("leafkern", calls, seconds=0.03, ours=True)
    rows = harness.measure(case(slow, ours), CEILINGS, budget=0.1)
    assert rows[0]["rounds"] == 1
    assert [name for name, _ in calls].count("slow") == 1
    assert rows[0]["status"] == "ok"
    assert rows[0]["p50_s"] >= 0.03
    assert rows[1]["rounds"] >= 3


def test_on_a_gpu_first_calls_are_no_measure(monkeypatch):
    monkeypatch.setattr(harness, "ONE_CALL_S", 0.02)
    monkeypatch.setattr(harness, "synchronizer", lambda device: lambda: None)
    monkeypatch.setattr(harness, "peak_memory", lambda device: nullcontext({"peak": 0}))
    compiled = set()

    def run(i):
        if i not in compiled:
            compiled.add(i)
            time.sleep(0.03)

    peer = harness.Contestant("peer", run, lambda got, i: None)
    (row,) = harness.measure(case(peer, device="cuda", sets=2), CEILINGS, budget=0.1)
    assert row["rounds"] >= 3
    assert row["p50_s"] < 0.001


def test_percentiles_are_numpys():
    values = np.random.default_rng().random(17).tolist()
    for percent in (0, 20, 50, 80, 100):
        assert harness.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert harness.percentile([3.0], 80) == 3.0


def test_percent_rates_and_ratios():
    rows = [
        {"provider": "leafkern", "ours": True, "same_job": True, "status": "ok", "p50_s": 0.02, "floor_s": 0.01},
        {"provider": "slow", "ours": False, "same_job": True, "status": "ok", "p50_s": 0.08, "floor_s": 0.01},
        {"provider": "good", "ours": False, "same_job": True, "status": "ok", "p50_s": 0.05, "floor_s": 0.01},
        {"provider": "less work", "ours": False, "same_job": False, "status": "ok", "p50_s": 0.001, "floor_s": 0.01},
        {"provider": "broken", "ours": False, "same_job": True, "status": "failed", "floor_s": 0.01},
    ]
    for row in rows:
        row |= harness.derived(row, work(also={"text": 2.0}))
    harness.compare(rows)
    ours = rows[0]
    assert ours["percent_of_limit"] == pytest.approx(50)
    assert ours["items_per_s"] == pytest.approx(200)
    assert ours["also_per_s"]["text"] == pytest.approx(100)
    assert ours["best_peer"] == "good"
    assert ours["ratio_to_best_peer"] == pytest.approx(2.5)
    assert rows[1]["ours_is_faster"] == pytest.approx(4)
    assert rows[3]["ours_is_faster"] == pytest.approx(0.05)
    assert rows[4]["ours_is_faster"] is None
    assert rows[4]["percent_of_limit"] is None


def test_a_wrong_contestant_is_reported_and_never_timed():
    calls = []
    wrong = contestant("wrong", calls, wrong="off by one")
    right = contestant("leafkern", calls, ours=True, seconds=0.021)
    rows = harness.measure(case(right, wrong, sets=2), CEILINGS, budget=0.01)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["wrong"]["status"] == "failed"
    assert "off by one" in by_name["wrong"]["reason"]
    assert by_name["wrong"].get("p50_s") is None
    assert [name for name, _ in calls].count("wrong") == 1, "called for its check alone"
    assert by_name["leafkern"]["status"] == "ok"
    assert by_name["leafkern"]["p50_s"] >= 0.006
    assert by_name["leafkern"]["ratio_to_best_peer"] is None


def test_an_error_on_a_later_input_set_counts_as_wrong():
    def run(i):
        if i == 1:
            raise ValueError("no such set")

    rows = harness.measure(
        case(harness.Contestant("leafkern", run, lambda got, i: None, ours=True), sets=2), CEILINGS, budget=0.01
    )
    assert rows[0]["status"] == "failed"
    assert "no such set" in rows[0]["reason"]


def test_rounds_are_interleaved_and_inputs_rotate():
    calls = []
    ours = contestant("leafkern", calls, ours=True, seconds=0.021)
    peer = contestant("peer", calls, seconds=0.021)
    harness.measure(case(ours, peer, sets=3), CEILINGS, budget=0.05)
    timed = calls[6:]  # after the checks of 3 sets each
    assert {i for _, i in timed} == {0, 1, 2}
    names = [name for name, _ in timed]
    longest = max(len(run) for run in "".join("p" if name == "peer" else "o" for name in names).split("o"))
    assert longest <= 2, "a peer's rounds stand together"
    assert abs(names.count("peer") - names.count("leafkern")) <= 1


def test_the_better_allocator_is_quoted():
    timing = harness._best_timing({"default": [3.0, 3.0, 3.0], "reuse": [1.0, 2.0, 9.0]})
    assert timing["allocator"] == "reuse"
    assert timing["p50_s"] == 2.0


def test_document_and_table():
    calls = []
    rows = harness.measure(case(contestant("leafkern", calls, ours=True)), CEILINGS, budget=0.01, command="run me")
    found = harness.document("toy", rows, CEILINGS, size="tiny", command="leafkern bench toy")
    found = json.loads(json.dumps(found, allow_nan=False))
    assert set(found) == {
        "format", "op", "date", "commit", "command", "size", "machine", "versions", "ceilings", "rows"
    }  # fmt: skip
    assert {"cpu", "cores", "threads", "isa", "memory_gib", "system", "gpu"} <= set(found["machine"])
    assert {"python", "torch", "leafkern"} <= set(found["versions"])
    row = found["rows"][0]
    assert {"op", "case", "shape", "provider", "status", "operations", "bytes", "floor_s", "p20_s", "p50_s", "p80_s",
            "percent_of_limit", "ratio_to_best_peer", "peak_bytes", "command", "allocator"} <= set(row)  # fmt: skip
    assert row["command"] == "run me"
    header, body = harness.table(rows)
    assert all(len(cells) == len(header) for cells in body)


def test_peak_memory_sees_a_buffer():
    with machine.peak_memory("cpu") as memory:
        np.ones(64 << 20, dtype=np.uint8)
    if memory["peak"] is None:
        pytest.skip("this system does not say")
    assert 60 << 20 <= memory["peak"] < 200 << 20


@pytest.mark.parametrize(("mix", "before", "after"), [("real", 70, 69.6), ("document", 300, 254.6)])
def test_lengths_are_the_published_mixes(mix, before, after):
    drawn = lengths.lengths(mix, 200_000)
    assert drawn.min() >= 4
    assert drawn.max() == 512
    assert drawn.mean() == pytest.approx(after, rel=0.01)
    # Against the formula, not the code: log-normal of sigma 0.8 whose mean before clipping is 70 or 300.
    assert np.median(drawn) == pytest.approx(before * np.exp(-0.32), rel=0.01)
    inside = np.log(drawn[(drawn > 4) & (drawn < 512)])
    if mix == "real":
        assert inside.std() == pytest.approx(0.8, rel=0.05)
    assert (drawn[:100] == lengths.lengths(mix, 200_000, seed=0)[:100]).all()
    assert (drawn[:100] != lengths.lengths(mix, 200_000, seed=1)[:100]).any()


def test_an_unknown_mix_is_named():
    with pytest.raises(InputError, match="real"):
        lengths.lengths("reel", 3)


def test_texts_have_exactly_the_lengths_drawn(minilm):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    counts = lengths.lengths("real", 50)
    made = lengths.texts(counts, list(tokenizer.get_vocab()))
    assert [len(encoding.ids) for encoding in tokenizer.encode_batch(made)] == counts.tolist()


def test_top_k_check_accepts_ties_and_names_errors():
    scores = torch.tensor([[5.0, 3.0, 5.0, 1.0]])
    assert search_data.wrong_top_k([[2, 0]], scores, 2, 0.0) is None
    assert search_data.wrong_top_k([[0, 2]], scores, 2, 0.0) is None
    assert "off" in search_data.wrong_top_k([[0, 1]], scores, 2, 1e-3)
    assert "twice" in search_data.wrong_top_k([[0, 0]], scores, 2, 0.0)
    assert "outside" in search_data.wrong_top_k([[0, 4]], scores, 2, 0.0)
    assert "shape" in search_data.wrong_top_k([[0]], scores, 2, 0.0)
    assert search_data.wrong_top_k([[0, 2]], torch.tensor([[5.0, float("nan"), 5.0, 1.0]]), 2, 1e-3) is not None


def test_clustered_vectors_are_unit_and_near_their_centres():
    base = search_data.clustered(3000, 48, seed=0)
    other = search_data.clustered(3000, 48, seed=1)
    torch.testing.assert_close(base.norm(dim=1), torch.ones(3000))
    queries = search_data.queries_for(20, 48, 3000, seed=0)
    nearest = (queries @ base.T).max(dim=1).values
    assert nearest.min() > 0.7
    assert not torch.equal(base[:10], other[:10])


def test_ceilings_are_positive_and_name_their_units():
    found = ceilings.measure("cpu", 1, quick=True)
    assert {"copy", "read"} <= set(found)
    assert all(ceiling.rate > 0 and ceiling.unit and ceiling.how for ceiling in found.values())
    if ceilings.native_loops() is not None:
        # A core that does fewer than 10^9 of anything per second would mean a loop that is no loop.
        loops = {name: ceiling.rate for name, ceiling in found.items() if name.removesuffix("_1") in ceilings.LOOPS}
        assert loops
        assert all(rate > 1e9 for rate in loops.values())
