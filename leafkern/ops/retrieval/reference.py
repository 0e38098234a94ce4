"""Search in plain PyTorch. `brute` is the definition; `blocked` gives the same in bounded memory.

Integer scores are exact in both: products of u in [-63, 63] with codes in [-128, 127] are summed in float64
(`brute`), or in float32 over at most 2048 dimensions at a time (63*128*2048 < 2^24) and then in integers.
`allowed`, bool (N,): the rows that may be returned, None for all. Where too few are, the rest is score -inf (integers:
-2^31) and id -1.
"""

from collections.abc import Callable

import torch

from leafkern.ops.quantization import Quantized, dequantize
from leafkern.ops.quantization.reference import unpack

MAX_QUERY_CODE = 63
_BLOCK_ELEMENTS = 1 << 22
_QUERY_BLOCK = 256
_EXACT_COLUMNS = 2048
LAST_ID = (1 << 32) - 1  # no row's: there are fewer
NO_ROW = -(1 << 63)  # the key below every row's


def fold(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of w as (u int8, a float32): a = max|w|/MAX_QUERY_CODE, u = w/a rounded half to even; 0 where a = 0."""
    a = w.abs().amax(1)
    # A tensor divisor: CUDA turns division by a Python number into a multiplication, which rounds differently.
    a = a / torch.full_like(a, MAX_QUERY_CODE)
    u = (w / torch.where(a == 0, 1, a)[:, None]).round().clamp(-MAX_QUERY_CODE, MAX_QUERY_CODE)
    return torch.where(a[:, None] == 0, 0, u).to(torch.int8), a


def decode(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes of 8 (int8), 4 (int4) or 1 bit (uint8: ubinary, int8: binary) as one integer per dimension."""
    precision = {8: "int8", 4: "int4"}.get(bits) or ("ubinary" if codes.dtype == torch.uint8 else "binary")
    return unpack(codes, precision, dim)


def brute(
    queries: torch.Tensor, base: torch.Tensor, k: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of queries @ base.T per query, float64, equal scores in order of ids: (Q, k) each."""
    scores = queries.double() @ base.double().T
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best, ids = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k], ids.masked_fill(best == -torch.inf, -1)[:, :k]


def keys_of(scores: torch.Tensor, first_id: int) -> torch.Tensor:
    """int64 keys, all different, in the order (score, then lower id); scores float32 or int32 (Q, n)."""
    if scores.dtype == torch.float32:
        # The bits of a float order as an integer once those of negative numbers are flipped; + 0.0 turns -0 into 0.
        bits = (scores + 0.0).view(torch.int32)
        scores = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(first_id, first_id + scores.shape[1], device=scores.device)
    return (scores.long() << 32) + (LAST_ID - ids)


def from_keys(keys: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    none = keys == NO_ROW
    ids = (LAST_ID - (keys & LAST_ID)).masked_fill(none, -1)
    scores = (keys >> 32).int()
    if dtype == torch.float32:
        scores = (scores ^ ((scores >> 31) & 0x7FFFFFFF)).view(torch.float32).masked_fill(none, -torch.inf)
    return scores, ids


def _streamed(
    queries: torch.Tensor,
    n: int,
    k: int,
    dtype: torch.dtype,
    rows: Callable,
    score: Callable,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top k over blocks: rows(start, stop) gives base rows in float32, score(queries, rows, start) dtype (q, n)."""
    k = min(k, n)
    dim = queries.shape[1]
    step = max(1, _BLOCK_ELEMENTS // max(dim, min(len(queries), _QUERY_BLOCK)))
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start in range(0, n, step):
        block = rows(start, min(n, start + step)).to(queries.device)
        merged = []
        for part, kept in zip(queries.split(_QUERY_BLOCK), best.split(_QUERY_BLOCK)):
            keys = keys_of(score(part, block, start), start)
            if allowed is not None:
                keys.masked_fill_(~allowed[start : start + len(block)].to(keys.device), NO_ROW)
            keys = torch.cat([kept, keys.topk(min(k, keys.shape[1]), dim=1).values], dim=1)
            merged.append(keys.topk(min(k, keys.shape[1]), dim=1).values)
        best = torch.cat(merged) if merged else best.new_empty((0, min(k, best.shape[1] + len(block))))
    return from_keys(best, dtype)


def _exact_products(u: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
    total = torch.zeros((len(u), len(rows)), dtype=torch.int32, device=u.device)
    for columns, row_columns in zip(u.split(_EXACT_COLUMNS, dim=1), rows.split(_EXACT_COLUMNS, dim=1)):
        total += (columns.float() @ row_columns.T).int()
    return total


def blocked(
    u: torch.Tensor, codes: torch.Tensor, k: int, bits: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest integer scores of folded queries u int8 (Q, D): int32 and int64 (Q, min(k, N))."""

    def rows(start: int, stop: int) -> torch.Tensor:
        return decode(codes[start:stop], bits, u.shape[1]).float()

    return _streamed(u, len(codes), k, torch.int32, rows, _exact_products, allowed)


def blocked_float(
    queries: torch.Tensor, rows: Callable, n: int, k: int, check: Callable, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of queries float32 (Q, D) @ rows(start, stop).T; `check` sees each block of allowed scores."""

    def score(part: torch.Tensor, block: torch.Tensor, start: int) -> torch.Tensor:
        scores = part @ block.T
        if allowed is not None:
            scores.masked_fill_(~allowed[start : start + len(block)].to(scores.device), 0)
        check(scores, start)
        return scores

    return _streamed(queries, n, k, torch.float32, rows, score, allowed)


def rescore(
    queries: torch.Tensor, level: torch.Tensor | Quantized, ids: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` best of the candidates ids (Q, C) by the float scores of their rows of `level`; ties: lower id.

    Candidates -1 are none: they stay so, with score -inf.
    """
    ids = ids.sort(dim=1).values
    step = max(1, _BLOCK_ELEMENTS // max(1, ids.shape[1] * queries.shape[1]))
    scores = []
    for part, candidates in zip(queries.split(step), ids.split(step)):
        gathered = level[candidates.flatten().clamp(min=0).to(level.device)].to(queries.device)
        rows = dequantize(gathered) if isinstance(gathered, Quantized) else gathered.float()
        # Row by row, unlike a matrix product: equal rows score equally wherever they stand.
        products = (rows.view(*candidates.shape, part.shape[1]) * part[:, None, :]).sum(2)
        scores.append(products.masked_fill(candidates < 0, -torch.inf))
    best, places = torch.cat(scores).sort(dim=1, descending=True, stable=True)
    return best[:, :keep].contiguous(), ids.gather(1, places[:, :keep])
