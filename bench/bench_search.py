"""Exact top-k search beside FAISS, USearch, NumKong and torch: floats, int8, fp8, bits, asymmetric bits, rescoring.

CPU: N = 1M clustered unit vectors of width 384. GPU: 10M, made there. k = 10 (and 100 beside it), Q = 1, 32, 1000.
Bases smaller than the cache are rotated. A case's test is named so that `-k "cpu-int8-Q1-"` chooses it.
"""

import gc
from functools import cache

import pytest
import torch

from leafkern.ops import Quantized, calibrate, quantize, search

from . import search_peers as peers_of
from .harness import Case, Contestant, Work
from .recall_page import BITS_ALONE, FLOAT32
from .search_data import (
    clustered,
    clustered_blocks,
    exact_scores,
    found_share,
    queries_for,
    reference_only,
    wrong_top_k,
)
from .search_peers import beside, sample

DIM, K, LARGE_K, OVERSAMPLE = 384, 10, 100, 4
ROWS = {
    "cpu": {"tiny": 2_000, "small": 50_000, "full": 1_000_000},
    "cuda": {"tiny": 20_000, "small": 1_000_000, "full": 10_000_000},
}
BATCHES = {"tiny": (1, 5), "small": (1, 32, 1000), "full": (1, 32, 1000)}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PRECISIONS = {
    "cpu": ("float32", "float16", "int8", "int4", "binary", "asymmetric", "rescored"),
    "cuda": ("float16", "fp8", "int8", "binary", "asymmetric", "rescored"),
}
LARGE_K_PRECISIONS = ("int8", "binary", "asymmetric")
QUERY_BITS = {"binary": 1, "asymmetric": 8}
BINARY_BASES = 4
RECALL_QUERIES = 32
# Relative to the largest score: where the sum's order is free, and where a GPU's first pass is in fewer bits.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}
GPU_BLOCK = 1 << 20
PLACE = {"cpu": "cpu", "cuda": "cuda"}  # a test walks the GPU's cases on a CPU


# Bases


@cache
def _vectors(rows: int) -> torch.Tensor:
    return clustered(rows, DIM, 0)


@cache
def _bits(rows: int) -> list[Quantized]:
    return [quantize(clustered(rows, DIM, seed), "ubinary") for seed in range(BINARY_BASES)]


@cache
def _levels(rows: int) -> tuple[Quantized, ...]:
    """Bits, int8 and float16 of the same vectors."""
    return tuple(quantize(_vectors(rows), precision) for precision in ("ubinary", "int8", "float16"))


@cache
def _made_there(rows: int, precision: str, device: str) -> Quantized:
    """A base made on the device in blocks: float32 vectors of all rows never exist."""
    parts, ranges = [], None
    for block in clustered_blocks(rows, DIM, 0, device, GPU_BLOCK):
        if precision == "int8" and ranges is None:
            ranges = calibrate(block, precision)
        parts.append(quantize(block, precision, ranges=ranges))
    codes = torch.cat([part.codes for part in parts])
    scale = torch.cat([part.scale for part in parts]) if precision == "fp8" else parts[0].scale
    return Quantized(codes, scale, parts[0].offset, precision, DIM)


def _bases(precision: str, rows: int, device: str) -> list[Quantized | torch.Tensor]:
    if device == "cuda":
        kind = {"binary": "ubinary", "asymmetric": "ubinary", "rescored": "ubinary"}.get(precision, precision)
        return [_made_there(rows, kind, PLACE[device])]
    if precision in ("binary", "asymmetric"):
        return _bits(rows)
    if precision == "rescored":
        # Of the same vectors, for the finer levels are theirs.
        bits = _levels(rows)[0]
        return [bits, *(quantize(_vectors(rows), "ubinary") for _ in range(BINARY_BASES - 1))]
    return [_vectors(rows) if precision == "float32" else quantize(_vectors(rows), precision)]


def _finer(rows: int, device: str) -> list[Quantized]:
    if device == "cpu":
        return list(_levels(rows)[1:])
    return [_made_there(rows, precision, PLACE[device]) for precision in ("int8", "float16")]


# Contestants


def _ours(queries, bases, k: int, device: str, name: str = "leafkern", **options) -> Contestant:
    """leafkern, held to its own reference on the sampled queries: same scores, and the same ids for integer codes."""
    tolerance = TOLERANCE[device]

    def run(i):
        return search(queries[i % len(queries)], bases[i % len(bases)], k, **options)

    def check(output, i):
        scores, ids = output
        at = sample(len(queries[0]))
        base = bases[i % len(bases)]
        with reference_only("retrieval"):
            right_scores, right_ids = search(queries[i % len(queries)][at], base, k, **options)
        if not torch.allclose(scores[at], right_scores, rtol=tolerance, atol=tolerance / 10):
            return "scores differ from the reference"
        # Float sums depend on the order of addition, so near ties may swap; integer scores leave no such room.
        exact = (
            isinstance(base, Quantized) and base.precision in ("int8", "int4", "ubinary") and "rescore" not in options
        )
        return "ids differ from the reference" if exact and not torch.equal(ids[at], right_ids) else None

    return Contestant(name, run, check, ours=name == "leafkern")


def _with_recall(ours: Contestant, scores_of, k: int, at: list[int]) -> Contestant:
    values: dict[str, float] = {}

    def check(output, i):
        values["recall"] = found_share(output[1][at].cpu(), scores_of(i), k)
        return ours.check(output, i)

    return Contestant(ours.name, ours.run, check, ours=ours.ours, values=values)


def _matmul(base: torch.Tensor, queries: list[torch.Tensor], q: int, k: int, block: int = GPU_BLOCK) -> Contestant:
    """What a GPU's user would write: float16 products and torch.topk of a block of rows at a time."""
    halves = [x.half() for x in queries]

    def run(i):
        best = None
        for start in range(0, len(base), block):
            scores, ids = (halves[i] @ base[start : start + block].T).topk(min(k, len(base) - start), dim=1)
            ids += start
            if best is not None:
                scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids], 1)
                scores, at = scores.topk(k, dim=1)
                ids = ids.gather(1, at)
            best = scores, ids
        return best[1]

    def check(ids, i):
        # Its scores are rounded to float16, by up to 2^-11 each.
        return wrong_top_k(ids[sample(q)].cpu(), exact_scores(halves[i][sample(q)], base), k, 2e-3)

    return Contestant("torch matmul + topk (float16)", run, check)


def _cpu_peers(precision: str, rows: int, bases, queries, q: int, k: int) -> list[Contestant]:
    if precision in ("float32", "float16"):
        base = bases[0].codes if isinstance(bases[0], Quantized) else bases[0]
        return peers_of.floats(base, queries, q, k)
    if precision == "int4":
        return []  # none of them searches four bits as they are
    if precision == "int8":
        floats = peers_of.floats(_vectors(rows), queries, q, k)
        return [
            *peers_of.int8(bases[0], queries, q, k),
            # 10 s a call at Q = 1000, and no limit of ours is set by it.
            *beside([c for c in floats if q < 1000 or "FAISS" in c.name], "4 times the bytes", " (float32)"),
        ]
    if precision == "binary":
        return peers_of.hamming(bases, queries, q, k)
    return [*peers_of.fast_scan(rows, queries, q, k), *beside(peers_of.hamming(bases, queries, q, k), "Hamming")]


# Cases


def _work(precision: str, rows: int, q: int, device: str) -> Work:
    """The operations and bytes that no exact search of this kind can go below."""
    pairs = float(rows) * q * DIM
    if device == "cuda":
        # Bits, too, are products of the int8 matrix units there.
        rates = {"float16": ("fp16_gemm",), "fp8": ("fp8_gemm",)}.get(precision, ("int8_gemm",))
        per_row = {"float16": 2 * DIM, "fp8": DIM, "int8": DIM}.get(precision, DIM / 8)
        return Work(2 * pairs, "OP", rates, rows * per_row, "copy", q, "query")
    fma = ("fp32_fma", "fp32_gemm")
    operations, unit, rates, per_row = {
        "float32": (2 * pairs, "FLOP", fma, 4 * DIM),
        "float16": (2 * pairs, "FLOP", fma, 2 * DIM),
        "int8": (2 * pairs, "OP", ("int8_maddubs",), DIM),
        "int4": (2 * pairs, "OP", ("int8_maddubs",), DIM / 2),
        "binary": (pairs, "bit", ("popcount_scalar", "popcount_avx2", "lookups_bits"), DIM / 8),
    }.get(precision, (pairs / 4, "lookup", ("lookups",), DIM / 8))
    return Work(operations, unit, rates, rows * per_row, "read", q, "query")


def _queries(precision: str, rows: int, q: int, device: str) -> list[torch.Tensor]:
    # A base of bits would stay in the cache; the others are too large for it, and many queries rotate by themselves.
    sets = BINARY_BASES if q < 1000 or (device == "cpu" and precision in (*QUERY_BITS, "rescored")) else 2
    return [queries_for(q, DIM, rows, seed).to(PLACE[device]) for seed in range(sets)]


def _case(precision: str, rows: int, q: int, device: str, peers: bool) -> Case:
    queries = _queries(precision, rows, q, device)
    bases = _bases(precision, rows, device)
    options = {"query_bits": QUERY_BITS[precision]} if precision in QUERY_BITS else {}
    if precision == "rescored":
        options = {"rescore": _finer(rows, device), "oversample": OVERSAMPLE}
    contestants = [_ours(queries, bases, K, device, **options)]
    if precision == "rescored":
        at = list(range(min(q, RECALL_QUERIES)))
        vectors = _vectors(rows) if device == "cpu" else options["rescore"][-1].codes
        scores_of = cache(lambda i: exact_scores(queries[i][at], vectors))
        contestants = [_with_recall(contestants[0], scores_of, K, at)]
        if peers and device == "cpu":
            contestants += peers_of.refined(vectors, queries, at, K, OVERSAMPLE, scores_of)
            alone = _ours(queries, bases, K, device, BITS_ALONE, query_bits=8)
            contestants += beside([alone], "the first stage, no rescoring")
    elif peers and device == "cpu":
        contestants += _cpu_peers(precision, rows, bases, queries, q, K)
    elif peers:
        matmul = _matmul(_made_there(rows, "float16", PLACE[device]).codes, queries, q, K)
        contestants += [matmul] if precision == "float16" else beside([matmul], "float16: more bytes, finer scores")
    if peers and device == "cpu" and precision != "float32":
        # So that what each precision gains is a ratio of one run.
        floats = _ours(queries, [_vectors(rows)], K, device, FLOAT32)
        contestants += beside([floats], "4 bytes a number")
    shape = {"N": rows, "D": DIM, "Q": q, "k": K}
    work = _work(precision, rows, q, device)
    return Case("search", f"{precision}/Q{q}", shape, work, contestants, len(queries), device)


def _large_k_case(precision: str, rows: int, q: int, device: str) -> Case:
    """k = 100, with k = 10 in the same rounds."""
    queries, bases = _queries(precision, rows, q, device), _bases(precision, rows, device)
    options = {"query_bits": QUERY_BITS[precision]} if precision in QUERY_BITS else {}
    fewer = _ours(queries, bases, K, device, f"leafkern, k = {K}", **options)
    contestants = [_ours(queries, bases, LARGE_K, device, **options), *beside([fewer], "fewer results")]
    shape = {"N": rows, "D": DIM, "Q": q, "k": LARGE_K}
    work = _work(precision, rows, q, device)
    return Case("search", f"{precision}/Q{q}/k{LARGE_K}", shape, work, contestants, len(queries), device)


def pytest_generate_tests(metafunc):
    size = metafunc.config.getoption("--size")
    cells = [
        pytest.param(device, precision, q, k, id=f"{device}-{precision}-Q{q}-k{k}")
        for device in DEVICES
        for k in (K, LARGE_K)
        for precision in PRECISIONS[device]
        if k == K or precision in LARGE_K_PRECISIONS
        for q in BATCHES[size]
    ]
    metafunc.parametrize(("device", "precision", "q", "k"), cells)


def test_search(bench, bench_session, device, precision, q, k):
    rows = ROWS[device][bench_session.size]
    peers = bench_session.peers
    bench(_case(precision, rows, q, device, peers) if k == K else _large_k_case(precision, rows, q, device))
    gc.collect()
