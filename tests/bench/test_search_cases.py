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


def test_numkong_s_scores_are_checked_in_every_block(bench_search):
    """By a stand-in that writes to the memory given, as NumKong does."""
    peers = bench_search.peers_of
    wrong = set()  # first numbers of the queries of a block

    def dots(queries, part, out=None):
        scores = queries.astype(np.int64) @ part.T
        if queries[0, 0] in wrong:
            scores = scores + 1
        if out is None:
            return scores
        out[:] = scores
        return out

    class NumKong:
        zeros = staticmethod(lambda shape, dtype: np.zeros(shape, np.int64))

    generator = np.random.default_rng()
    bases = [[generator.integers(-9, 9, (30, 8)) for _ in range(2)] for _ in range(2)]
    queries = [np.column_stack([np.arange(600) // 200, generator.integers(-9, 9, (600, 7))]) for _ in range(2)]

    def scores(i):
        return torch.from_numpy(queries[i][peers.sample(600)] @ np.concatenate(bases[i]).T)

    one = peers._scores_only("x", dots, NumKong, bases, queries, "int32", 600, scores)
    assert one.check(one.run(0), 0) is None
    assert one.check(one.run(1), 1) is None
    for block in (0, 1, 2):
        wrong.clear()
        wrong.add(block)
        assert one.check(one.run(0), 0) == "scores differ"


def test_a_refinement_is_held_to_both_its_stages(bench_search):
    wrong = importlib.import_module("bench.search_data").wrong_refinement
    coarse = torch.tensor([[8.0, 7, 6, 5, 4.001, 4, 1, 0]])  # the best 4, and maybe the fifth and sixth
    fine = torch.tensor([[1.0, 4, 2, 3, 9, 0, 9, 9]])
    for ids, said in (
        ([1, 3], None),
        ([4, 1], None),
        ([0, 2], "a better candidate is left out"),
        ([1, 6], "an id that the first stage does not choose"),
        ([1, 1], "an id twice in one row"),
        ([1, -1], "an id outside the base"),
    ):
        assert wrong(np.array([ids]), coarse, fine, 2, 2, 0.14) == said


def test_rescored_scans_several_bases_with_bits_alone_beside_it(bench_search):
    case = bench_search._case("rescored", 400, 5, "cpu", True)
    names = [contestant.name for contestant in case.contestants]
    assert {bench_search.BITS_ALONE, bench_search.FLOAT32} <= set(names)
    assert case.sets == bench_search.BINARY_BASES
    bases = bench_search._bases("rescored", 400, "cpu")
    assert len({base.codes.data_ptr() for base in bases}) == case.sets
    assert all(torch.equal(base.codes, bases[0].codes) for base in bases)
    for contestant in case.contestants:
        if contestant.name.startswith("leafkern"):
            for i in range(case.sets):
                assert contestant.check(contestant.run(i), i) is None
