"""Exact top-k search beside FAISS, USearch, NumKong and torch: float32, int8, binary and asymmetric binary.

N = 1M clustered unit vectors of width 384, k = 10, Q = 1, 32, 1000. Bases smaller than the cache are rotated.
"""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch

from leafkern.ops import Quantized, quantize, search

from .harness import Case, Contestant, Work
from .search_data import clustered, exact_scores, queries_for, wrong_top_k

DIM, K = 384, 10
ROWS = {"tiny": 2_000, "small": 50_000, "full": 1_000_000}
BATCHES = {"tiny": (1, 5), "small": (1, 32, 1000), "full": (1, 32, 1000)}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SAMPLE = 4  # queries per input set that are checked
BINARY_BASES = 4


@contextmanager
def _reference():
    before = os.environ.get("LEAFKERN_BACKEND")
    os.environ["LEAFKERN_BACKEND"] = "retrieval=reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LEAFKERN_BACKEND"]
        else:
            os.environ["LEAFKERN_BACKEND"] = before


@cache
def _vectors(rows: int, seed: int) -> torch.Tensor:
    return clustered(rows, DIM, seed)


@cache
def _bits(rows: int) -> list:
    return [quantize(clustered(rows, DIM, seed), "ubinary") for seed in range(BINARY_BASES)]


def _sample(q: int) -> list[int]:
    return sorted({round(i * (q - 1) / max(1, SAMPLE - 1)) for i in range(min(q, SAMPLE))})


def _query_sets(q: int, rows: int, sets: int) -> list[torch.Tensor]:
    return [queries_for(q, DIM, rows, seed) for seed in range(sets)]


def _ours(queries, bases, **options) -> Contestant:
    """leafkern, held to its own reference on the sampled queries: same scores, same ids."""

    def run(i):
        return search(queries[i % len(queries)], bases[i % len(bases)], K, **options)

    def check(output, i):
        scores, ids = output
        at = _sample(len(queries[0]))
        base = bases[i % len(bases)]
        with _reference():
            right_scores, right_ids = search(queries[i % len(queries)][at].cpu(), base.to("cpu"), K, **options)
        if not torch.allclose(scores[at].cpu(), right_scores, rtol=1e-5, atol=1e-6):
            return "scores differ from the reference"
        # Float sums depend on the order of addition, so near ties may swap; integer scores leave no such room.
        swapped = isinstance(base, Quantized) and not torch.equal(ids[at].cpu(), right_ids)
        return "ids differ from the reference" if swapped else None

    return Contestant("leafkern", run, check, ours=True)


def _peer(name, run, scores_of, q, *, tolerance=1e-6, same_job=True, note="") -> Contestant:
    """A peer whose `run(i)` gives ids (Q, k); `scores_of(i, rows)` are the exact scores of the sampled queries."""
    at = _sample(q)

    def check(ids, i):
        return wrong_top_k(np.asarray(ids)[at], scores_of(i, at), K, tolerance)

    return Contestant(name, run, check, same_job=same_job, note=note)


def _importable(name: str):
    try:
        return __import__(name)
    except ImportError:
        return None


def _threads() -> int:
    return torch.get_num_threads()


def _faiss():
    faiss = _importable("faiss")
    if faiss is not None:
        faiss.omp_set_num_threads(_threads())
    return faiss


# float32


def _float_peers(base: torch.Tensor, queries: list[torch.Tensor], q: int) -> list[Contestant]:
    scores = cache(lambda i: exact_scores(queries[i][_sample(q)].cpu(), base.cpu(), lambda x: x))

    def matmul(i):
        # Blocks of queries: at Q = 1000 the score matrix would take 4 GB.
        return torch.cat([(part @ base.T).topk(K, dim=1).indices for part in queries[i].split(128)]).cpu()

    peers = [_peer("torch matmul + topk", matmul, lambda i, at: scores(i), q, tolerance=1e-4)]
    faiss = _faiss()
    if faiss is not None and base.device.type == "cpu":
        index = faiss.IndexFlatIP(DIM)
        index.add(base.numpy())
        arrays = [x.numpy() for x in queries]
        peers.append(
            _peer("FAISS FlatIP", lambda i: index.search(arrays[i], K)[1], lambda i, at: scores(i), q, tolerance=1e-4)
        )
    return peers


# int8


def _folded(queries: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    w = queries * scale
    return (w / (w.abs().amax(1, keepdim=True) / 63)).round().to(torch.int8)


def _int8_peers(base, vectors, queries, q) -> list[Contestant]:
    u = [_folded(x, base.scale) for x in queries]
    codes = base.codes.numpy()
    scores = cache(lambda i: exact_scores(u[i][_sample(q)], base.codes, lambda x: x))
    integers = [x.numpy() for x in u]
    peers = []
    faiss, usearch, numkong = _faiss(), _importable("usearch.index"), _importable("numkong")
    if faiss is not None:
        index = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)
        for start in range(0, len(codes), 1 << 16):
            index.add(codes[start : start + (1 << 16)].astype(np.float32))
        floats = [x.astype(np.float32) for x in integers]
        peers.append(
            _peer("FAISS SQ8 direct signed", lambda i: index.search(floats[i], K)[1], lambda i, at: scores(i), q)
        )
    if usearch is not None and q < 1000:
        peers.append(_usearch("USearch exact i8", codes, integers, "IP", {}, scores, q))
    if numkong is not None:
        packed = _numkong_parts(numkong.dots_pack, codes, "int8")
        peers.append(
            _scores_only("NumKong packed i8 dots", numkong.dots_packed, numkong, packed, integers, "int32", q, scores)
        )
    return peers + _float_beside(vectors, queries, q)


def _float_beside(vectors, queries, q) -> list[Contestant]:
    """float32 peers beside int8, for few queries; for many, the float32 case has them."""
    return [
        Contestant(c.name + " (float32)", c.run, c.check, same_job=False, note="4 times the bytes, exact scores")
        for c in (_float_peers(vectors, queries, q) if q < 1000 else [])
    ]


def _usearch(name, base, queries, metric, options, scores, q) -> Contestant:
    from usearch.index import MetricKind
    from usearch.index import search as exact_search

    kind = getattr(MetricKind, metric)

    def run(i):
        found = exact_search(base, queries[i], K, kind, exact=True, threads=_threads(), **options)
        return np.asarray(found.keys).reshape(len(queries[i]), K)

    return _peer(name, run, lambda i, at: scores(i), q)


def _numkong_parts(pack, codes, dtype) -> list:
    return [pack(np.ascontiguousarray(part), dtype=dtype) for part in np.array_split(codes, _threads())]


def _scores_only(name, function, numkong, packed, queries, dtype, q, scores, sign=1) -> Contestant:
    """NumKong computes scores and selects nothing: shown, but not the peer that ratios are against."""
    block = min(q, 256)
    sizes = [np.asarray(function(queries[0][:1], part)).shape[1] for part in packed]
    outputs = [numkong.zeros((block, size), dtype=dtype) for size in sizes]
    pool = ThreadPoolExecutor(len(packed))

    def run(i):
        for start in range(0, q, block):
            part = queries[i][start : start + block]
            whole = len(part) == block
            jobs = [pool.submit(function, part, b, **({"out": o} if whole else {})) for b, o in zip(packed, outputs)]
            results = [job.result() for job in jobs]
        return start, results

    def check(output, i):
        start, results = output
        at = [row for row in _sample(q) if row >= start]
        got = np.concatenate([np.asarray(part)[[row - start for row in at]] for part in results], axis=1)
        right = scores(i)[[_sample(q).index(row) for row in at]]
        return None if np.array_equal(sign * got.astype(np.int64), right.numpy().astype(np.int64)) else "scores differ"

    return Contestant(name, run, check, same_job=False, note="scores only, no selection")


# binary


def _signs(codes: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1)).float() * 2 - 1


def _binary_peers(bases, queries, q) -> list[Contestant]:
    packed_queries = [np.packbits(x.numpy() > 0, axis=1) for x in queries]

    @cache
    def scores(i):
        signs = torch.where(queries[i][_sample(q)] > 0, 1.0, -1.0)
        return exact_scores(signs, bases[i].codes, _signs)

    peers = []
    faiss, usearch, numkong = _faiss(), _importable("usearch.index"), _importable("numkong")
    if faiss is not None:
        indexes = []
        for base in bases:
            indexes.append(faiss.IndexBinaryFlat(DIM))
            indexes[-1].add(base.codes.numpy())
        peers.append(
            _peer(
                "FAISS IndexBinaryFlat",
                lambda i: indexes[i].search(packed_queries[i], K)[1],
                lambda i, at: scores(i),
                q,
            )
        )
    if usearch is not None and q < 1000:
        exact = [_usearch("", b.codes.numpy(), packed_queries, "Hamming", {"dtype": "b1"}, scores, q) for b in bases]
        peers.append(_peer("USearch exact b1", lambda i: exact[i].run(i), lambda i, at: scores(i), q))
    if numkong is not None and q <= 32:
        parts = [_numkong_parts(numkong.hammings_pack, base.codes.numpy(), "uint1") for base in bases]
        distances = cache(lambda i: (DIM - scores(i)) / 2)
        each = [
            _scores_only("", numkong.hammings_packed, numkong, part, packed_queries, "uint32", q, distances)
            for part in parts
        ]
        peers.append(
            Contestant(
                "NumKong packed hamming",
                lambda i: each[i].run(i),
                lambda output, i: each[i].check(output, i),
                same_job=False,
                note="scores only, no selection",
            )
        )
    return peers


# Cases


def _work(precision: str, rows: int, q: int, device: str) -> Work:
    """The operations and bytes that no exact search of this kind can go below."""
    pairs = float(rows) * q * DIM
    gemm = "fp32_gemm" if device == "cpu" else "bf16_gemm"
    operations, unit, rates, per_row = {
        "float32": (2 * pairs, "FLOP", ("fp32_fma", gemm) if device == "cpu" else ("fp32_gemm",), 4 * DIM),
        "int8": (2 * pairs, "OP", ("int8_maddubs", "int8_gemm"), DIM),
        "binary": (pairs, "bit", ("popcount_scalar", "popcount_avx2"), DIM / 8),
        "asymmetric": (pairs / 4, "lookup", ("lookups",), DIM / 8),
    }[precision]
    return Work(operations, unit, rates, rows * per_row, "read", q, "query")


def _case(precision: str, rows: int, q: int, device: str, peers: bool) -> Case:
    # A base of bits would stay in the cache; the others are too large for it, and many queries rotate by themselves.
    sets = BINARY_BASES if q < 1000 or precision in ("binary", "asymmetric") else 2
    queries = [x.to(device) for x in _query_sets(q, rows, sets)]
    contestants = []
    if precision == "float32":
        base = _vectors(rows, 0).to(device)
        contestants = [_ours(queries, [base]), *(_float_peers(base, queries, q) if peers else [])]
    elif precision == "int8":
        vectors = _vectors(rows, 0)
        base = quantize(vectors, "int8")
        contestants = [_ours(queries, [base.to(device)])]
        if peers and device == "cpu":
            contestants += _int8_peers(base, vectors, queries, q)
        elif peers:
            contestants += _float_beside(vectors.to(device), queries, q)
    else:
        bases = _bits(rows)
        bits = 1 if precision == "binary" else 8
        contestants = [_ours(queries, [base.to(device) for base in bases], query_bits=bits)]
        if peers and device == "cpu":
            # No peer searches signs by a float query; Hamming over the same bytes is shown beside it.
            others = _binary_peers(bases, queries, q)
            if bits == 8:
                others = [Contestant(c.name, c.run, c.check, same_job=False, note="Hamming") for c in others]
            contestants += others
    shape = {"N": rows, "D": DIM, "Q": q, "k": K}
    return Case("search", f"{precision}/Q{q}", shape, _work(precision, rows, q, device), contestants, sets, device)


def pytest_generate_tests(metafunc):
    size = metafunc.config.getoption("--size")
    metafunc.parametrize("q", BATCHES[size], ids=[f"Q{q}" for q in BATCHES[size]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "asymmetric"])
def test_search(bench, bench_session, precision, q, device):
    size = bench_session.size
    bench(_case(precision, ROWS[size], q, device, bench_session.peers))
    gc.collect()
