"""Exact search: the best dot products of queries with a base of vectors, quantised or not."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from leafkern.errors import InputError
from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose, forced_backend
from leafkern.ops._core.checks import (
    all_finite,
    check_finite_rows,
    check_floating,
    check_same_device,
    check_tensor,
    values_checked,
)
from leafkern.ops._core.native import unavailable
from leafkern.ops._core.registration import register, without_autocast
from leafkern.ops.quantization import Quantized, code_width
from leafkern.ops.quantization import reference as quantization
from leafkern.ops.retrieval import native, reference

MAX_ROWS = 1 << 32
# 63 * 128 * D must stay below 2^31.
MAX_DIM = 1 << 18
_BITS = {"int8": 8, "int4": 4, "binary": 1, "ubinary": 1}
_PRECISION_OF = {8: "int8", 4: "int4", 1: "binary"}
_CODE_DTYPES = {8: (torch.int8,), 4: (torch.uint8,), 1: (torch.int8, torch.uint8)}
# Of Triton's kernels.
_MOST_TRITON = 1024


def _check_place(name: str, x: torch.Tensor, **queries: torch.Tensor) -> None:
    (place,) = {each.device for each in queries.values()}
    # CPU memory is searched from a GPU too.
    if not (place.type == "cuda" and x.device.type == "cpu"):
        check_same_device(**queries, **{name: x})


def _check_allowed(allowed: torch.Tensor | None, rows: int, device: torch.device) -> None:
    if allowed is None:
        return
    check_tensor("allowed", allowed, ndim=1, dtypes=(torch.bool,))
    if len(allowed) != rows or allowed.device != device:
        raise InputError(
            f"allowed: expected one bool per row of base, ({rows},) on {device}; got {tuple(allowed.shape)} on "
            f"{allowed.device}"
        )


def _check_integers(
    u: torch.Tensor, codes: torch.Tensor, k: int, bits: int, query_bits: int, allowed: torch.Tensor | None
) -> None:
    check_tensor("u", u, ndim=2, dtypes=(torch.int8,))
    if bits not in _PRECISION_OF or query_bits not in (1, 8):
        raise InputError(f"bits, query_bits: expected 8, 4 or 1 and 8 or 1; got {bits} and {query_bits}")
    check_tensor("codes", codes, ndim=2, dtypes=_CODE_DTYPES[bits])
    _check_place("codes", codes, u=u)
    _check_count("k", k)
    if values_checked(u) and u.numel() > 0:
        low, high = (int(value) for value in u.aminmax())
        if low < -reference.MAX_QUERY_CODE or high > reference.MAX_QUERY_CODE:
            raise InputError(
                f"u: expected values in [-{reference.MAX_QUERY_CODE}, {reference.MAX_QUERY_CODE}], got {low} to {high}"
            )
        if query_bits == 1 and not bool((u.abs() == 1).all()):
            raise InputError("u: expected values 1 and -1 for query_bits=1")
    width = code_width(_PRECISION_OF[bits], u.shape[1])
    if codes.shape[1] != width:
        raise InputError(
            f"codes: {u.shape[1]} dimensions at {bits} bits take {width} columns; got shape {tuple(codes.shape)}"
        )
    _check_allowed(allowed, len(codes), codes.device)


def _runs_native(queries: torch.Tensor) -> bool:
    """Whether a step beside the search itself is for the compiled kernels, where they know it."""
    if queries.device.type != "cpu" or not values_checked(queries):
        return False
    return forced_backend("retrieval") in (None, "native") and unavailable() is None


def _candidates(
    queries: torch.Tensor, rows: torch.Tensor, k: int, *dtypes: torch.dtype, native: Callable | None = None
) -> dict[str, str | None]:
    found = launch.candidates("retrieval", queries.device, *dtypes, native=native)
    if found.get("triton", "") is None:
        n, width = rows.shape
        if min(k, n) > _MOST_TRITON:
            found["triton"] = f"k = {min(k, n)}, above {_MOST_TRITON}"
        elif width > 1 and rows.stride(1) != 1:
            found["triton"] = "rows whose entries are not adjacent"
    return found


def _integer_search(
    u: torch.Tensor, codes: torch.Tensor, k: int, bits: int, query_bits: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_integers(u, codes, k, bits, query_bits, allowed)
    return _chosen_integers(u, codes, k, bits, query_bits, allowed)


def _chosen_integers(
    u: torch.Tensor, codes: torch.Tensor, k: int, bits: int, query_bits: int, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = choose("retrieval", _candidates(u, codes, k, native=lambda: native.unsuited(u, codes, k)))
    if backend == "triton":
        from leafkern.ops.retrieval import kernels

        return kernels.search(u, codes, k, bits, query_bits, allowed)
    if backend == "native":
        return native.search(u, codes, k, bits, query_bits, allowed)
    return reference.blocked(u, codes, k, bits, allowed)


def _integer_search_fake(u, codes, k, bits, query_bits, allowed=None):
    shape = (u.shape[0], min(k, codes.shape[0]))
    return u.new_empty(shape, dtype=torch.int32), u.new_empty(shape, dtype=torch.int64)


# u int8 (Q, D) in [-63, 63] (query_bits=1: +-1); codes as in Quantized, of 8, 4 or 1 bits; allowed bool (N,) ->
# integer scores, ids; -2^31 and -1 where fewer rows are allowed.
integer_search = register(
    "integer_search(Tensor u, Tensor codes, int k, int bits, int query_bits, Tensor? allowed=None) -> (Tensor, Tensor)",
    _integer_search,
    _integer_search_fake,
)


def fold(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries w float32 (Q, D) as 7-bit integers: (u int8 in [-63, 63], a float32 (Q,)), w ~ a*u.

    a = max|w|/63, u = w/a rounded half to even; w = 0 gives a = 0, u = 0. Every backend gives the same bits.
    """
    return native.fold(w) if _runs_native(w) else reference.fold(w)


def _size(level: torch.Tensor | Quantized) -> tuple[int, int]:
    return (len(level), level.dim) if isinstance(level, Quantized) else tuple(level.shape)


def _check_level(name: str, level: object, queries: torch.Tensor) -> None:
    if not isinstance(level, Quantized):
        if not isinstance(level, torch.Tensor):
            raise InputError(f"{name}: expected a torch.Tensor or a Quantized, got {type(level).__name__}")
        check_floating(name, level, ndim=2)
    n, dim = _size(level)
    if dim != queries.shape[1]:
        raise InputError(f"{name}: vectors of width {dim}, but the queries have width {queries.shape[1]}")
    if n >= MAX_ROWS:
        raise InputError(f"{name}: {n} rows; fewer than 2^32 are expected")
    _check_place(name, level.codes if isinstance(level, Quantized) else level, queries=queries)


def _check_count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: expected an int >= 1, got {value!r}")
    return value


def _finite_scores(scores: torch.Tensor, first_row: int) -> None:
    if not values_checked(scores):
        return
    bad = ~torch.isfinite(scores).all(dim=0)
    if bad.any():
        row = first_row + int(bad.nonzero()[0])
        raise InputError(f"base: row {row} holds NaN or infinity, or overflows float32; expected finite values")


def _check_fits(x: torch.Tensor, what: str) -> None:
    if not values_checked(x) or all_finite(x):
        return
    row = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
    raise InputError(f"queries: row {row} is too large: {what} overflow float32; scale it down")


def _shows_infinity(scores: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether a score of Triton's, where it may be looked at, isn't finite: the reference then names the row."""
    return values_checked(scores) and bool(((ids >= 0) & ~torch.isfinite(scores)).any())


def _float_search(
    queries: torch.Tensor, base: torch.Tensor, k: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensor("queries", queries, ndim=2, dtypes=(torch.float32,))
    _check_level("base", base, queries)
    _check_count("k", k)
    _check_allowed(allowed, len(base), base.device)
    serves = (lambda: native.unsuited(queries, base, k)) if base.dtype in native.FLOAT_FORMS else None
    backend = choose("retrieval", _candidates(queries, base, k, base.dtype, native=serves))
    if backend == "triton":
        from leafkern.ops.retrieval import kernels

        found = kernels.float_search(queries, base, k, allowed)
        if not _shows_infinity(*found):
            return found
    if backend == "native":
        found = native.float_search(queries, base, k, allowed)
        if found is not None:
            return found
    return reference.blocked_float(
        queries, lambda start, stop: base[start:stop].float(), len(base), k, _finite_scores, allowed
    )


def _float_search_fake(queries, base, k, allowed=None):
    shape = (queries.shape[0], min(k, base.shape[0]))
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


# queries float32 (Q, D); base floating-point (N, D); allowed bool (N,) -> float32 scores, ids; -inf and -1 where fewer
# rows are allowed.
float_search = register(
    "float_search(Tensor queries, Tensor base, int k, Tensor? allowed=None) -> (Tensor, Tensor)",
    _float_search,
    _float_search_fake,
)


def _fp8_search(
    queries: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, k: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensor("queries", queries, ndim=2, dtypes=(torch.float32,))
    _check_level("codes", Quantized(codes, scale, None, "fp8", queries.shape[1]), queries)
    _check_count("k", k)
    _check_allowed(allowed, len(codes), codes.device)
    if choose("retrieval", _candidates(queries, codes, k)) == "triton":
        from leafkern.ops.retrieval import kernels

        found = kernels.fp8_search(queries, codes, scale, k, allowed)
        if not _shows_infinity(*found):
            return found
    own, own_scale = quantization.fp8(queries)

    def rows(start, stop):
        return codes[start:stop].float() * scale[start:stop, None]

    return reference.blocked_float(own.float() * own_scale[:, None], rows, len(codes), k, _finite_scores, allowed)


# queries float32 (Q, D), quantised inside; codes e4m3 (N, D), scale float32 (N,); the rest as of float_search.
fp8_search = register(
    "fp8_search(Tensor queries, Tensor codes, Tensor scale, int k, Tensor? allowed=None) -> (Tensor, Tensor)",
    _fp8_search,
    lambda queries, codes, scale, k, allowed=None: _float_search_fake(queries, codes, k),
)


class FoldedQueries(NamedTuple):
    """Queries as integer codes take them: a row's score is bias + a * I, I its integer score with u.

    u int8 (Q, D); a, bias float32 (Q,), None: 1 and 0.
    """

    u: torch.Tensor
    a: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    query_bits: int

    @classmethod
    def of(cls, queries: torch.Tensor, base: Quantized, query_bits: int) -> "FoldedQueries":
        """For all bases of the same precision and ranges."""
        if base.dim >= MAX_DIM:
            raise InputError(f"base: width {base.dim}; below {MAX_DIM} is expected, where integer scores fit 32 bits")
        bits = _BITS[base.precision]
        if base.precision in ("int8", "int4"):
            scale, offset = base.scale.to(queries.device), base.offset.to(queries.device)
            w = queries * scale
            _check_fits(w, "its products with the scale of the codes")
            return cls(*fold(w), (queries * offset).sum(1), bits, 8)
        if query_bits == 8:
            return cls(*fold(queries), None, bits, 8)
        return cls(torch.where(queries > 0, 1, -1).to(torch.int8), None, None, bits, 1)

    def search(
        self, codes: torch.Tensor, k: int, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `integer_search`."""
        if torch.compiler.is_compiling():
            return integer_search(self.u, codes, k, self.bits, self.query_bits, allowed)
        # u is of our own making: its values need no check.
        return _chosen_integers(self.u, codes, k, self.bits, self.query_bits, allowed)

    def scores(self, integers: torch.Tensor, none: torch.Tensor | None = None) -> torch.Tensor:
        """float32 scores of integer ones (Q, C). none: bool (Q, C), where there is no row."""
        scores = integers.float()
        if self.a is not None:
            scores *= self.a[:, None]
            scores = scores if self.bias is None else scores + self.bias[:, None]
            _check_fits(scores if none is None else scores.masked_fill(none, 0), "its scores")
        return scores if none is None else scores.masked_fill(none, -torch.inf)

    def exact(self, integers: torch.Tensor) -> torch.Tensor:
        """The same in float64, where the scores of two integers don't round to one."""
        scores = integers.double()
        scores = scores if self.a is None else scores * self.a.double()[:, None]
        return scores if self.bias is None else scores + self.bias.double()[:, None]


def is_integer(base: torch.Tensor | Quantized) -> bool:
    """Whether `base` is searched by integers, as `FoldedQueries` says."""
    return isinstance(base, Quantized) and base.precision in _BITS


def checked_query_bits(base: torch.Tensor | Quantized, query_bits: object, rescoring: bool) -> int:
    """`query_bits` of `search` with None as 1 or 8, or an InputError."""
    binary = isinstance(base, Quantized) and base.precision in ("binary", "ubinary")
    if query_bits is not None and (query_bits not in (1, 8) or not binary):
        raise InputError(f"query_bits: expected None, or 1 or 8 with a binary base; got {query_bits!r}")
    return query_bits or (8 if rescoring or not binary else 1)


def _first_stage(
    queries: torch.Tensor, base: torch.Tensor | Quantized, k: int, query_bits: int, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(base, Quantized) and base.precision == "fp8":
        return fp8_search(queries, base.codes, base.scale, k, allowed)
    if not is_integer(base):
        return float_search(queries, base.codes if isinstance(base, Quantized) else base.detach(), k, allowed)
    folded = FoldedQueries.of(queries, base, query_bits)
    integers, ids = folded.search(base.codes, k, allowed)
    return folded.scores(integers, None if allowed is None else ids < 0), ids


def _rescore(
    queries: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    precision: str,
    ids: torch.Tensor,
    keep: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensor("queries", queries, ndim=2, dtypes=(torch.float32,))
    check_tensor("ids", ids, ndim=2, dtypes=(torch.int64,))
    _check_count("keep", keep)
    level = Quantized(rows, scale, offset, precision, queries.shape[1]) if precision else rows
    _check_level("rows", level, queries)
    if len(ids) != len(queries) or (values_checked(ids) and ids.numel() and int(ids.amax()) >= len(rows)):
        raise InputError(f"ids: expected numbers of {len(rows)} rows for {len(queries)} queries")
    # Not a choice that a setting could force: what the kernels don't know, the reference rescores for every backend.
    if _runs_native(queries) and native.rescores(queries, level):
        found = native.rescore(queries, level, ids, keep)
        if found is not None:
            return found
    return reference.rescore(queries, level, ids, keep)


def _rescore_fake(queries, rows, scale, offset, precision, ids, keep):
    shape = (queries.shape[0], min(keep, ids.shape[1]))
    return queries.new_empty(shape), ids.new_empty(shape)


# queries float32 (Q, D); rows of any floating-point type (N, D), precision "", or the parts of a Quantized; ids int64
# (Q, C), -1 for none -> the `keep` best float32 scores, ids.
rescore_candidates = register(
    "rescore(Tensor queries, Tensor rows, Tensor? scale, Tensor? offset, str precision, Tensor ids, int keep)"
    " -> (Tensor, Tensor)",
    _rescore,
    _rescore_fake,
)


@without_autocast
def search(
    queries: torch.Tensor,
    base: torch.Tensor | Quantized,
    k: int,
    *,
    rescore: torch.Tensor | Quantized | Sequence[torch.Tensor | Quantized] | None = None,
    oversample: int = 4,
    query_bits: int | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k vectors of `base` with the largest dot products: (scores float32, ids int64), (Q, min(k, N)) each.

    Best first; equal scores in order of ids (int8, int4: equal I). No gradient.

    queries: floating-point (Q, D), computed in float32. base: floating-point Tensor (N, D) or `Quantized`.
    int8, int4: vectors stand for offset + scale*c. The query is folded, w = q*scale, to 7 bits: a = max|w|/63,
    u = w/a rounded half to even; I = sum of u*c, exact in integers; score = sum of q*offset + a*I. Ordered by I,
    then lower id: where offsets far outweigh the codes, different I may round to equal scores.
    binary, ubinary: query_bits=1 scores D - 2*hamming of the signs; query_bits=8 folds w = q as above and scores
    a*I, I = sum of u*(2*bit - 1). None: 8 when rescoring, else 1.
    fp8: queries are quantised likewise, products in float32. float32, float16, other tensors: products in float32.

    rescore: the same N rows more finely, one level or a list from coarse to fine; scored as float query times
    dequantised row, of the candidates only. The first stage keeps oversample*k, each level but the last half of
    what it got (at least k). The reference gathers all candidates of a query: oversample*k float32 rows of memory.

    allowed: bool Tensor (N,) on base's device: only rows where it is true are returned; None: all. Where fewer than
    min(k, N) are allowed, the rest has score -inf and id -1. Values of other rows do no harm.

    Queries on a GPU may have base and rescore in CPU memory: a base goes over piece by piece, at the speed of the bus;
    of a level, the candidates are gathered on the CPU, for which the host waits.

    base and rescore may be memory-mapped: they are read in blocks, never copied or checked as a whole. NaN or
    infinity in a float base or level shows in its scores and is an error then; codes are not checked.

    Errors: `InputError` for k or oversample < 1, widths or row counts that differ, NaN, infinity or overflow of float32
    in queries (the row is named), `allowed` of another shape, dtype or device, query_bits other than None, 1, 8 or with
    a base that is not binary, N >= 2^32, and D >= 2^18 for integer scores (63*128*D must fit 32 bits).

    Backends (k: oversample*k when rescoring): Triton (CUDA; int8, int4, fp8, binary, float32, float16, bfloat16; k <=
    1024; float scores are those of float32, rows that tie to their rounding may come in another order); native (CPU;
    int8, int4, binary, float32, float16; k <= 8192; levels of float32, float16 or int8); else the PyTorch reference.
    Levels are no choice that LEAFKERN_BACKEND could force: what the kernels don't rescore, the reference does, unsaid.
    """
    check_floating("queries", queries, ndim=2)
    if queries.shape[1] < 1:
        raise InputError(f"queries: expected at least one dimension, got shape {tuple(queries.shape)}")
    _check_count("k", k)
    _check_count("oversample", oversample)
    levels = [] if rescore is None else list(rescore) if isinstance(rescore, (list, tuple)) else [rescore]
    names = ["rescore" if len(levels) == 1 else f"rescore[{place}]" for place in range(len(levels))]
    for name, level in zip(["base", *names], [base, *levels]):
        _check_level(name, level, queries)
    for name, level in zip(names, levels):
        if _size(level)[0] != _size(base)[0]:
            raise InputError(f"{name}: {_size(level)[0]} rows, but base has {_size(base)[0]}; the same are expected")
    _check_allowed(allowed, _size(base)[0], (base.codes if isinstance(base, Quantized) else base).device)
    query_bits = checked_query_bits(base, query_bits, bool(levels))
    queries = queries.detach().float()
    check_finite_rows("queries", queries)

    levels = [level if isinstance(level, Quantized) else level.detach() for level in levels]
    keep = k * oversample if levels else k
    scores, ids = _first_stage(queries, base, keep, query_bits, allowed)
    for place, (name, level) in enumerate(zip(names, levels), start=1):
        keep = k if place == len(levels) else max(k, keep // 2)
        parts = (level, None, None, "")
        if isinstance(level, Quantized):
            parts = (level.codes, level.scale, level.offset, level.precision)
        scores, ids = rescore_candidates(queries, *parts, ids, keep)
        if values_checked(scores) and not all_finite(scores):
            # -inf is right where there is no row.
            if bad := ids[~torch.isfinite(scores) & (ids >= 0)].tolist():
                raise InputError(
                    f"{name}: row {bad[0]} holds NaN or infinity, or overflows float32; expected finite values"
                )
    return scores, ids
