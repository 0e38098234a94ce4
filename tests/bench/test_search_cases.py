"""The search benchmark's cases for a GPU, walked on the CPU; what each case must read; its peers' approximations."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("psutil")

from leafkern.ops import quantize


@pytest.fixture
def bench_search(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    module = importlib.import_module("bench.bench_search")
    monkeypatch.setitem(module.PLACE, "cuda", "cpu")
    monkeypatch.setattr(module, "GPU_BLOCK", 1000)
    yield module
    module._made_there.cache_clear()


@pytest.mark.parametrize("q", [1, 5])
def test_the_gpu_cases_agree_with_the_exact_answer(bench_search, q):
    for precision in bench_search.PRECISIONS["cuda"]:
        case = bench_search._case(precision, 2500, q, "cuda", True)
        assert case.contestants[0].ours
        assert len(case.contestants) == (1 if precision == "rescored" else 2)
        for contestant in case.contestants:
            for i in range(case.sets):
                assert contestant.check(contestant.run(i), i) is None, (precision, contestant.name)
    case = bench_search._large_k_case("int8", 2500, q, "cuda")
    for contestant in case.contestants:
        assert contestant.check(contestant.run(0), 0) is None


def test_a_base_made_in_blocks_is_that_of_all_rows(bench_search):
    blocks = list(bench_search.clustered_blocks(2500, bench_search.DIM, 0, "cpu", 1000))
    assert [len(block) for block in blocks] == [1000, 1000, 500]
    whole = torch.cat(blocks)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(2500))
    for precision in ("float16", "fp8", "ubinary"):
        made, expected = bench_search._made_there(2500, precision, "cpu"), quantize(whole, precision)
        assert torch.equal(made.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert (made.scale is None) == (expected.scale is None)
    ranges = bench_search.calibrate(blocks[0], "int8")
    made, expected = bench_search._made_there(2500, "int8", "cpu"), quantize(whole, "int8", ranges=ranges)
    assert torch.equal(made.codes, expected.codes)


def test_a_wrong_answer_is_found(bench_search):
    case = bench_search._case("int8", 2500, 5, "cuda", True)
    ours, peer = case.contestants
    scores, ids = ours.run(0)
    assert "ids differ" in ours.check((scores, ids.flip(1)), 0)
    assert "scores differ" in ours.check((scores + 1, ids), 0)
    assert "off the exact top k" in peer.check((peer.run(0) + 7) % 2500, 0)


@pytest.mark.parametrize(
    ("precision", "device", "per_row", "rate"),
    [
        ("float32", "cpu", 1536, "fp32_fma"),
        ("float16", "cpu", 768, "fp32_fma"),
        ("int8", "cpu", 384, "int8_maddubs"),
        ("int4", "cpu", 192, "int8_maddubs"),
        ("binary", "cpu", 48, "popcount_avx2"),
        ("asymmetric", "cpu", 48, "lookups"),
        ("rescored", "cpu", 48, "lookups"),
        ("int8", "cuda", 384, "int8_gemm"),
        ("fp8", "cuda", 384, "fp8_gemm"),
        ("float16", "cuda", 768, "fp16_gemm"),
        ("binary", "cuda", 48, "int8_gemm"),
    ],
)
def test_what_must_be_read_and_what_bounds_it(bench_search, precision, device, per_row, rate):
    work = bench_search._work(precision, 1000, 7, device)
    assert work.bytes == 1000 * per_row
    assert rate in work.rates
    products = {"popcount_avx2": 1, "lookups": 1 / 4}.get(rate, 2)
    assert work.operations == 1000 * 7 * 384 * products


def test_quantisation_is_checked_against_the_definition(bench_search, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # takes long to load
    module = importlib.import_module("bench.bench_quantization")
    for precision, given in module.CELLS:
        case = module._case(precision, 300, given, "cpu", True)
        for contestant in case.contestants:
            assert contestant.check(contestant.run(0), 0) is None, (precision, contestant.name)
        written = {"int8": 384, "int4": 192, "float16": 768, "binary": 48}[precision]
        assert case.work.bytes == 300 * (4 * 384 + written)
        peer = case.contestants[-1]
        assert "codes differ" in peer.check(np.flip(peer.run(0), 0).copy(), 0)
