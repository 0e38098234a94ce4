"""What the search benchmark compares with on a CPU: FAISS, USearch, NumKong and torch, each held to its exact answer.

A peer does the same job when it gives the k best by the same codes. FAISS's PQFastScan is put beside asymmetric bits
as one that does: the same bytes a vector, the same number of 4-bit look-ups, float queries. Its codes are trained, ours
are not, so its scores are held to its own codes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from leafkern.ops import Quantized
from leafkern.ops.retrieval import fold

from .harness import Contestant
from .search_data import BLOCK, clustered, exact_scores, found_share, wrong_refinement, wrong_top_k

SAMPLE = 4  # queries per input set that are checked
# Of bits and float16, USearch takes 0.4 s and 0.9 s a call at 32, and one for each input set to check it; int8 runs at
# 1000 too, for a target names it.
USEARCH_QUERIES = 32
PQ_SUBSPACES, PQ_BITS, PQ_TRAINED = 96, 4, 10_000
# FastScan rounds its 96 tables to 8 bits: half a step of each is 0.5 % of the largest score here.
PQ_TOLERANCE = 5e-3


def sample(q: int) -> list[int]:
    return sorted({round(i * (q - 1) / max(1, SAMPLE - 1)) for i in range(min(q, SAMPLE))})


def checked(name, run, scores_of, q, k, *, tolerance=1e-6, same_job=True, note="") -> Contestant:
    """A peer whose `run(i)` gives ids (Q, k); `scores_of(i)` are the exact scores of the sampled queries."""
    at = sample(q)

    def check(ids, i):
        return wrong_top_k(np.asarray(ids)[at], scores_of(i), k, tolerance)

    return Contestant(name, run, check, same_job=same_job, note=note)


def beside(contestants: Sequence[Contestant], note: str, suffix: str = "") -> list[Contestant]:
    """The same, shown but not what ratios are against."""
    return [Contestant(c.name + suffix, c.run, c.check, same_job=False, note=note) for c in contestants]


def _importable(name: str):
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        return None


def _threads() -> int:
    return torch.get_num_threads()


def _faiss():
    faiss = _importable("faiss")
    if faiss is not None:
        faiss.omp_set_num_threads(_threads())
    return faiss


def _filled(index, rows):
    """A FAISS index with `rows`, in blocks: as float32 all at once would take as much memory again."""
    for part in rows.split(BLOCK):
        index.add(part.float().numpy())
    return index


# float32 and float16


def floats(base: torch.Tensor, queries: list[torch.Tensor], q: int, k: int) -> list[Contestant]:
    """Peers of a float32 or float16 base."""
    scores = cache(lambda i: exact_scores(queries[i][sample(q)], base))
    faiss, usearch = _faiss(), _importable("usearch.index")
    arrays = [x.numpy() for x in queries]
    if base.dtype == torch.float16:
        peers = []
        if faiss is not None:
            scalar = faiss.ScalarQuantizer.QT_fp16
            index = _filled(faiss.IndexScalarQuantizer(base.shape[1], scalar, faiss.METRIC_INNER_PRODUCT), base)
            run = _faiss_search(index, arrays, k)
            peers.append(checked("FAISS SQ fp16", run, scores, q, k, tolerance=1e-4))
        if usearch is not None and q <= USEARCH_QUERIES:
            halves = [x.half().numpy() for x in queries]
            rounded = cache(lambda i: exact_scores(queries[i][sample(q)].half(), base))
            peers.append(_usearch("USearch exact f16", base.numpy(), halves, "IP", {}, rounded, q, k, tolerance=2e-3))
        return peers

    def matmul(i):
        # Blocks of queries: at Q = 1000 the score matrix would take 4 GB.
        return torch.cat([(part @ base.T).topk(k, dim=1).indices for part in queries[i].split(128)])

    peers = [checked("torch matmul + topk", matmul, scores, q, k, tolerance=1e-4)]
    if faiss is not None:
        index = _filled(faiss.IndexFlatIP(base.shape[1]), base)
        peers.append(checked("FAISS FlatIP", _faiss_search(index, arrays, k), scores, q, k, tolerance=1e-4))
    return peers


def _faiss_search(index, queries, k) -> Callable[[int], np.ndarray]:
    return lambda i: index.search(queries[i], k)[1]


# int8


def _folded(queries: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return fold(queries * scale)[0]


def int8(base: Quantized, queries: list[torch.Tensor], q: int, k: int) -> list[Contestant]:
    """Peers over the same codes and the same 7-bit queries."""
    u = [_folded(x, base.scale) for x in queries]
    codes = base.codes.numpy()
    scores = cache(lambda i: exact_scores(u[i][sample(q)], base.codes))
    integers = [x.numpy() for x in u]
    peers = []
    faiss, usearch, numkong = _faiss(), _importable("usearch.index"), _importable("numkong")
    if faiss is not None:
        scalar = faiss.ScalarQuantizer.QT_8bit_direct_signed
        index = _filled(faiss.IndexScalarQuantizer(base.dim, scalar, faiss.METRIC_INNER_PRODUCT), base.codes)
        run = _faiss_search(index, [x.astype(np.float32) for x in integers], k)
        peers.append(checked("FAISS SQ8 direct signed", run, scores, q, k))
    if usearch is not None:
        peers.append(_usearch("USearch exact i8", codes, integers, "IP", {}, scores, q, k))
    if numkong is not None:
        packed = [_numkong_parts(numkong.dots_pack, codes, "int8")]
        name = "NumKong packed i8 dots"
        peers.append(_scores_only(name, numkong.dots_packed, numkong, packed, integers, "int32", q, scores))
    return peers


def _usearch(name, base, queries, metric, options, scores, q, k, tolerance=1e-6) -> Contestant:
    from usearch.index import MetricKind
    from usearch.index import search as exact_search

    kind = getattr(MetricKind, metric)

    def run(i):
        found = exact_search(base, queries[i], k, kind, exact=True, threads=_threads(), **options)
        return np.asarray(found.keys).reshape(len(queries[i]), k)

    return checked(name, run, scores, q, k, tolerance=tolerance)


def _numkong_parts(pack, codes, dtype) -> list:
    return [pack(np.ascontiguousarray(part), dtype=dtype) for part in np.array_split(codes, _threads())]


def _scores_only(name, function, numkong, bases, queries, dtype, q, scores) -> Contestant:
    """NumKong computes scores and selects nothing: shown, but not the peer that ratios are against.

    bases: each in parts, one a thread. Queries go in blocks of at most 256, of one size, so that all write to memory
    that is there.
    """
    block = -(-q // -(-q // 256))
    sizes = [np.asarray(function(queries[0][:1], part)).shape[1] for part in bases[0]]
    outputs = [numkong.zeros((block, size), dtype=dtype) for size in sizes]
    pool = ThreadPoolExecutor(len(sizes))

    def block_from(i, start):
        part = queries[i][start : start + block]
        out = outputs if len(part) == block else [None] * len(outputs)
        packed = bases[i % len(bases)]
        jobs = [pool.submit(function, part, b, **({"out": o} if o is not None else {})) for b, o in zip(packed, out)]
        return [job.result() for job in jobs]

    def run(i):
        for start in range(0, q, block):
            results = block_from(i, start)
        return start, results

    def check(output, i):
        # What is there is the last block; the others are computed again, in the same way.
        for start in range((q - 1) // block * block, -1, -block):
            results = output[1] if start == output[0] else block_from(i, start)
            places = [place for place, row in enumerate(sample(q)) if start <= row < start + block]
            at = [sample(q)[place] - start for place in places]
            got = np.concatenate([np.asarray(part)[at] for part in results], axis=1)
            if not np.array_equal(got.astype(np.int64), scores(i)[places].numpy().astype(np.int64)):
                return "scores differ"
        return None

    return Contestant(name, run, check, same_job=False, note="scores only, no selection")


# Bits


def _signs(codes: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1)).float() * 2 - 1


def hamming(bases: list[Quantized], queries: list[torch.Tensor], q: int, k: int) -> list[Contestant]:
    """Peers that compare signs with signs, over the same bits."""
    dim = bases[0].dim
    packed_queries = [np.packbits(x.numpy() > 0, axis=1) for x in queries]

    @cache
    def scores(i):
        signs = torch.where(queries[i][sample(q)] > 0, 1.0, -1.0)
        return exact_scores(signs, bases[i].codes, _signs)

    peers = []
    faiss, usearch, numkong = _faiss(), _importable("usearch.index"), _importable("numkong")
    if faiss is not None:
        indexes = [faiss.IndexBinaryFlat(dim) for _ in bases]
        for index, base in zip(indexes, bases):
            index.add(base.codes.numpy())
        run = lambda i: indexes[i].search(packed_queries[i], k)[1]  # noqa: E731
        peers.append(checked("FAISS IndexBinaryFlat", run, scores, q, k))
    if usearch is not None and q <= USEARCH_QUERIES:
        options = {"dtype": "b1"}
        exact = [_usearch("", b.codes.numpy(), packed_queries, "Hamming", options, scores, q, k) for b in bases]
        peers.append(checked("USearch exact b1", lambda i: exact[i].run(i), scores, q, k))
    if numkong is not None:
        parts = [_numkong_parts(numkong.hammings_pack, base.codes.numpy(), "uint1") for base in bases]
        distances = cache(lambda i: (dim - scores(i)) / 2)
        name = "NumKong packed hamming"
        peers.append(
            _scores_only(name, numkong.hammings_packed, numkong, parts, packed_queries, "uint32", q, distances)
        )
    return peers


@cache
def _fast_scans(rows: int, dim: int, count: int) -> list:
    """FAISS's PQ with 48 bytes a vector, trained on the first base, over `clustered(rows, dim, 0 .. count - 1)`."""
    faiss = _faiss()
    if faiss is None:
        return []
    trained = faiss.IndexPQFastScan(dim, PQ_SUBSPACES, PQ_BITS, faiss.METRIC_INNER_PRODUCT)
    indexes = []
    for seed in range(count):
        vectors = clustered(rows, dim, seed)
        if seed == 0:
            trained.train(vectors[:PQ_TRAINED].numpy())
        indexes.append(_filled(faiss.clone_index(trained), vectors))
    return indexes


def _decoded(index) -> torch.Tensor:
    return torch.from_numpy(index.reconstruct_n(0, index.ntotal))


def fast_scan(rows: int, queries: list[torch.Tensor], q: int, k: int) -> list[Contestant]:
    """FAISS's PQFastScan, one index per query set."""
    indexes = _fast_scans(rows, queries[0].shape[1], len(queries))
    if not indexes:
        return []
    scores = cache(lambda i: exact_scores(queries[i][sample(q)], _decoded(indexes[i])))
    arrays = [x.numpy() for x in queries]
    run = lambda i: indexes[i].search(arrays[i], k)[1]  # noqa: E731
    note = "trained codes of the same bytes"
    return [checked("FAISS PQFastScan 96x4", run, scores, q, k, tolerance=PQ_TOLERANCE, note=note)]


def refined(
    vectors: torch.Tensor, queries: list[torch.Tensor], at: list[int], k: int, oversample: int, scores_of
) -> list[Contestant]:
    """FAISS's PQFastScan, whose best `oversample`·k are scored again in float32; `scores_of(i)` of the queries `at`."""
    scans = _fast_scans(len(vectors), vectors.shape[1], 1)
    if not scans:
        return []
    faiss = _faiss()
    index = faiss.IndexRefineFlat(scans[0], faiss.swig_ptr(vectors.numpy()))
    index.k_factor = float(oversample)
    arrays = [x.numpy() for x in queries]
    q = len(arrays[0])
    values: dict[str, float] = {}

    @cache
    def stages(i):
        few = queries[i][sample(q)]
        return exact_scores(few, _decoded(scans[0])), exact_scores(few, vectors)

    def check(ids, i):
        values["recall"] = found_share(ids[at], scores_of(i), k)
        return wrong_refinement(ids[sample(q)], *stages(i), k, oversample, 2 * PQ_TOLERANCE)

    name, note = "FAISS PQFastScan 96x4, refined", f"its best {oversample}·k scored again in float32"
    return [Contestant(name, _faiss_search(index, arrays, k), check, note=note, values=values)]
