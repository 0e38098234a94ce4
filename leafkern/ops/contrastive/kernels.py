"""Triton kernels of info_nce and soft_label_loss, value and gradients. Not timed yet.

Work. B queries, N columns, width D, K prefix widths, s bytes per entry. The value takes one product of the raw rows,
2·B·N·D operations, whatever K: the sum over the entries so far is at the end of each segment the dot product of the
prefixes, which inverse norms, (K, rows) numbers, turn into cosines. Per width and pair one exponential and some ten
further operations. The gradients take that product again and one of each side, 6·B·N·D: with g_k the derivative by
the cosine at width k, the rows of segment k of the other side count with W_k = sum over k' >= k of g_k' / (norms). In
all 8·B·N·D, where eager PyTorch, which keeps all similarities, does 6·B·N·D. Compulsory bytes: the rows and gradients.

Order. `prefix_kernel` (a launch per tensor) leaves inverse norms. `score_kernel` forms tiles of products on the matrix
units and reduces them at once: per row and width the largest score, the sum of exponentials and the first moment of
the scores, from which the projection of the query's gradient follows; no tile is stored. It runs once for the scores
of the own positives, which are thus the very products that every column's score is, bit by bit, so that fn_margin
compares like with like and a copy of the positive scores exactly as it does; then once for the positives and once for
the negatives, which are never joined. `row_kernel` joins the parts and the query's own columns (mixed) and leaves the
loss (focal weight in log space) and what the weights are made of. Then, chunk by chunk of rows and columns,
`weight_kernel` forms the products again and writes W, and the library multiplies it with the rows of both sides and
adds in float32. So weights *are* stored, CHUNK_BYTES at a time: a product of the library over a chunk of them, which
stays in the cache of a large GPU, is less work than forming them once for each side in a kernel of our own, 10·B·N·D.
`finish_kernel` adds the own positive's part, exactly and in float32, and projects. Soft labels: the same, with
`teacher_kernel` for the teacher's softmax; candidates of one query alone are own columns, without tiles.
No atomics: a result depends on nothing but its inputs and the number of multiprocessors. The host waits for nothing.

Launches of info_nce with all gradients: norms 3 (without negatives 2; one more with mixed), positives 1, scores 2, rows
1, its sum 1; per chunk 1 + 2·K; per column chunk 1 and for the queries 1 (two more with mixed). In float16 some of
torch's for a scale of the weights. One chunk serves each side up to B = N = 4096 in half precision at K = 1.

Memory besides inputs and gradients: the weights of a chunk; parts of the scores, 12·K bytes for each of at most
max(B, 1024 · multiprocessors) rows; parts of column sums, 4·K·B/ROWS bytes per column of a chunk; inverse norms and
what the rows need, about 32·K bytes per row. At B = N = 16k, K = 1, bfloat16, 132 multiprocessors: 32 + 1.6 + 2 + 0.7
MiB, at any D. Rows may lie apart; where the entries of a row are not adjacent, or queries, positives and negatives
differ in dtype, a tensor is copied.

Numerics. Products, sums and exponentials are float32, the products of float32 IEEE unless
torch.backends.cuda.matmul allows tf32. W is rounded to the dtype of the rows: in bfloat16 by a relative 2^-8 at the
most, in float16 2^-11, but not the own positive's; sums over widths twice. float16 is scaled so that the largest weight
fits.
Addresses are 64-bit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from leafkern.ops._core.cubin import Shipped
from leafkern.ops._core.launch import multiprocessors, next_power_of_2, on_device, precision, tile_options, unit_columns
from leafkern.ops.contrastive.device import (
    PAIR,
    PAIR_SUM,
    PLAIN,
    SLICES,
    STATE_FIELDS,
    SUM,
    TEACHER_FIELDS,
    finish_kernel,
    prefix_kernel,
    row_kernel,
    score_kernel,
    teacher_kernel,
    weight_kernel,
)
from leafkern.ops.contrastive.reference import empty_gradient

# Bytes of the weights of one chunk of rows and columns.
CHUNK_BYTES = 32 << 20
# Programs of `score_kernel` per multiprocessor: the last wave, which is not full, is one of several.
WAVES = 8
# Weights in float16 are scaled so that none is above this.
LARGEST_HALF = 2.0**14


@dataclass(frozen=True)
class Tile:
    """How the score and weight kernels are cut: a program forms rows x columns scores in steps of `depth` entries."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict:
        """What the launch passes to the compiler."""
        return tile_options(self.warps, self.stages)

    def constants(self, bounds: tuple[int, ...], precision: str) -> dict:
        cut = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {"BOUNDS": bounds, "ALIGN": math.gcd(self.depth, *bounds), "PRECISION": precision} | cut


def configure(size: int, precision: str, bounds: tuple[int, ...], masked: bool, taught: bool) -> Tile:
    """The heuristic, by bytes of an entry: of tiles whose registers suffice on every architecture, the largest.

    bounds: of the segments of the rows. masked: by ids or margin. taught: against a teacher."""
    several, odd = len(bounds) > 2, math.gcd(*bounds) % 16 > 0
    if size == 2:
        if odd:
            # Entries are loaded one by one.
            return Tile(64, 64, 32, 8, 2)
        if several or taught:
            return Tile(64, 64, 64, 8, 3)
        return Tile(64 if masked else 128, 128, 64, 8, 3)
    if precision == "tf32":
        return Tile(64, 64, 32, 8, 3)
    # Products of float32 leave the matrix units: they take a thread's rows and columns into registers whole.
    if several or odd or masked or taught:
        return Tile(32, 32 if taught else 64, 16, 8, 2)
    return Tile(64, 64, 16, 8, 2)


def _prefix_constants(bounds: tuple[int, ...]) -> dict:
    widest = max(high - low for low, high in itertools.pairwise(bounds))
    return {"BOUNDS": bounds, "ROWS": 16, "COLUMNS": min(next_power_of_2(widest), 128)}


TEACHER_CONSTANTS = {"COLUMNS": 1024}
# Rows of a program of `row_kernel`.
ROW_BLOCK = 128
# Parts of a sum that `finish_kernel` adds at once.
PARTS = 32
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _row_constants(dim_weights: tuple[float, ...], gamma: float, detach_focal: bool) -> dict:
    return {"DIM_WEIGHTS": dim_weights, "FOCAL": gamma > 0, "DETACHED": detach_focal, "ROWS": ROW_BLOCK}


@dataclass
class _Columns:
    """Columns that all queries share: x (N, D), perhaps ids (N,), and room for their gradient where it is wanted.

    first_own: the column of the first query's own positive, the others' follow; None where the positives are elsewhere.
    """

    x: torch.Tensor
    ids: torch.Tensor | None = None
    first_own: int | None = None
    grad: torch.Tensor | None = None
    inverse: torch.Tensor | None = None


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def _rows_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as rows (N, D) of `dtype` whose entries are adjacent: itself or a view of it where it can be."""
    x = x.to(dtype)
    return unit_columns(x.flatten(0, 1) if x.ndim == 3 else x)


def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """out (+)= a b, summed in float32; `first`: whatever is in out is not looked at."""
    beta = 0 if first else 1
    # The library has no product of half precision for the interpreter, and none that is summed in float16 into float32.
    sums_in_half = a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda and not sums_in_half:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


class _Call:
    """One loss: queries (b, D) against columns that all share and, perhaps, each query's own (b, n, D)."""

    def __init__(self, queries, columns, own, teacher, *, total, temperature, teacher_temperature, dims, dim_weights):
        self.queries, self.columns, self.own, self.teacher = queries, columns, own, teacher
        self.rows, self.number = len(queries), 0 if own is None else len(own) // len(queries)
        self.bounds, self.dim_weights = (0, *reversed(dims)), tuple(reversed(dim_weights))
        self.total, self.temperature = total, temperature
        self.scale = math.log2(math.e) / temperature
        self.teacher_scale = math.log2(math.e) / teacher_temperature
        self.precision = precision(queries.dtype)

    @property
    def widths(self) -> int:
        return len(self.dim_weights)

    def evaluate(self, gamma, detach_focal, margin, q_grad, own_grad) -> torch.Tensor:
        """The loss; fills the gradients that are there."""
        queries, widths, rows = self.queries, self.widths, self.rows
        self.q_inverse, _ = self._prefixes(queries)
        for side in self.columns:
            side.inverse, _ = self._prefixes(side.x)
        own_inverse = own_scores = None
        if self.own is not None:
            own_inverse, own_scores = self._prefixes(self.own, with_queries=True)
        self.positive, self.margin = None, margin
        self.teacher_state = None
        if self.teacher is not None:
            self.teacher_state = _floats(queries, TEACHER_FIELDS, rows)
            teacher_kernel[rows,](
                self.teacher,
                self.teacher_state,
                self.teacher.stride(0),
                rows,
                self.teacher.shape[1],
                self.teacher_scale,
                **TEACHER_CONSTANTS,
                **OPTIONS,
            )
        partial = self._scores()
        wants_columns = any(side.grad is not None for side in self.columns)
        wanted = q_grad is not None or own_grad is not None or wants_columns
        unit = None
        if queries.dtype == torch.float16 and self.columns and (q_grad is not None or wants_columns):
            unit = self._unit(gamma)
        losses, state = _floats(queries, rows), _floats(queries, STATE_FIELDS, widths, rows) if wanted else None
        own_pairs = own_sums = None
        if wanted and self.own is not None:
            own_pairs, own_sums = _floats(queries, 2, widths, len(self.own))
        positives = self.columns[0] if self.positive is not None else None
        row_kernel[triton.cdiv(rows, ROW_BLOCK),](
            partial,
            self.positive,
            self.q_inverse,
            None if positives is None else positives.inverse,
            own_scores,
            own_inverse,
            self.teacher,
            self.teacher_state,
            unit,
            losses,
            state,
            own_pairs,
            own_sums,
            0 if self.teacher is None else self.teacher.stride(0),
            rows,
            0 if positives is None else len(positives.x),
            0 if positives is None else positives.first_own,
            0 if partial is None else len(partial),
            self.number,
            self.scale,
            self.teacher_scale,
            1 / self.total,
            1 / self.temperature,
            gamma,
            **_row_constants(self.dim_weights, gamma, detach_focal),
            **OPTIONS,
        )
        first = True
        for side in self.columns:
            if q_grad is not None or side.grad is not None:
                self._chunks(side, state, unit, q_grad, first)
                first = False
        if q_grad is not None:
            launches = []
            if self.own is not None:
                by_own = {"partner": self.own, "pairs": own_pairs, "of_partner": True, "count": self.number}
                launches.append(by_own | {"add": not first})
            if positives is not None:
                launches.append({"partner": positives.x, "pairs": state[PAIR], "offset": positives.first_own})
            launches = launches or [{}]
            # The last one divides by the unit and takes away what lies along the row.
            launches[-1] |= {"inverse": self.q_inverse, "sums": state[SUM], "unit": unit}
            for given in launches:
                self._finish(q_grad, queries, **given)
        if own_grad is not None:
            self._finish(
                own_grad,
                self.own,
                inverse=own_inverse,
                sums=own_sums,
                partner=queries,
                pairs=own_pairs,
                group=self.number,
                unit=unit,
                add=False,
            )
        return losses.sum()

    def _prefixes(self, x: torch.Tensor, with_queries: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inverse norms of the prefixes, (K, N); of own columns, their scores too."""
        inverse = _floats(x, self.widths, len(x))
        scores = torch.empty_like(inverse) if with_queries else None
        constants = _prefix_constants(self.bounds)
        prefix_kernel[triton.cdiv(len(x), constants["ROWS"]),](
            x,
            self.queries if with_queries else None,
            inverse,
            scores,
            x.stride(0),
            self.queries.stride(0),
            len(x),
            max(self.number, 1),
            **constants,
            **OPTIONS,
        )
        return inverse, scores

    @property
    def tile(self) -> Tile:
        masked = self.margin is not None or any(side.ids is not None for side in self.columns)
        return configure(self.queries.element_size(), self.precision, self.bounds, masked, self.teacher is not None)

    def _tile_arguments(self, side: _Columns) -> dict:
        """What the kernels over tiles share."""
        masked = self.margin is not None
        return {
            "queries": self.queries,
            "x": side.x,
            "q_inverse": self.q_inverse,
            "x_inverse": side.inverse,
            "positive": self.positive if masked else None,
            "q_ids": None if side.ids is None else self.columns[0].ids,
            "x_ids": side.ids,
            "teacher": self.teacher,
            "teacher_state": self.teacher_state,
            "q_stride": self.queries.stride(0),
            "x_stride": side.x.stride(0),
            "teacher_stride": 0 if self.teacher is None else self.teacher.stride(0),
            "rows": self.rows,
            "columns": len(side.x),
            "start": self.columns[0].first_own or 0,
            "first_own": side.first_own,
            "scale": self.scale,
            "teacher_scale": self.teacher_scale,
            "margin": self.margin,
        }

    def _scores(self) -> torch.Tensor | None:
        """(parts, fields, K, rows): what each program of `score_kernel` leaves of its columns; before, the scores of
        the positives."""
        if not self.columns:
            return None
        tile = self.tile
        constants = tile.constants(self.bounds, self.precision) | tile.options
        blocks = triton.cdiv(self.rows, tile.rows)
        positives = self.columns[0]
        if positives.first_own is not None:
            self.positive = _floats(self.queries, self.widths, self.rows)
            given = self._tile_arguments(positives)
            given |= dict.fromkeys(("q_ids", "x_ids", "margin", "partial")) | {"positive": self.positive}
            score_kernel[blocks,](**given, first_part=0, row_blocks=blocks, tiles=1, **constants)
        wanted = triton.cdiv(multiprocessors(self.queries) * WAVES, blocks)
        cuts = []
        for side in self.columns:
            tiles = triton.cdiv(len(side.x), tile.columns)
            each = triton.cdiv(tiles, min(tiles, wanted))
            cuts.append((side, each, triton.cdiv(tiles, each)))
        fields = 3 if self.teacher is None else 4
        partial = _floats(self.queries, sum(parts for *_, parts in cuts), fields, self.widths, self.rows)
        done = 0
        for side, each, parts in cuts:
            given = self._tile_arguments(side) | {"partial": partial, "first_part": done}
            score_kernel[blocks * parts,](**given, row_blocks=blocks, tiles=each, **constants)
            done += parts
        return partial

    def _unit(self, gamma: float) -> torch.Tensor:
        """What weights are multiplied with so that float16 holds them; the largest factor of any is below
        (1 + 0.37 gamma) / temperature / total times the largest inverse norms of either side."""
        largest = self.q_inverse.nan_to_num(nan=0.0).amax()
        columns = torch.stack([side.inverse.nan_to_num(nan=0.0).amax() for side in self.columns]).amax()
        most = (1 + 0.37 * gamma) * sum(abs(w) for w in self.dim_weights) / self.temperature / self.total
        return (LARGEST_HALF / (most * largest * columns)).clamp(max=2.0**60)

    def _chunks(self, side: _Columns, state, unit, q_grad, first: bool) -> None:
        """Adds the products of weights and columns to the gradient of the queries, and fills that of the columns; chunk
        by chunk of queries and columns."""
        tile, queries, x, widths = self.tile, self.queries, side.x, self.widths
        high, wide = chunk(self.rows, len(x), widths, queries.element_size(), tile)
        weights = torch.empty(widths, high, wide, device=x.device, dtype=x.dtype)
        sums = None
        if side.grad is not None:
            sums = _floats(x, triton.cdiv(self.rows, tile.rows), widths, wide)
        segments = [slice(low, end) for low, end in itertools.pairwise(self.bounds)]
        given = self._tile_arguments(side) | {"state": state, "weights": weights, "sums": sums}
        given |= {"slab": high * wide, "slab_columns": wide}
        given |= tile.constants(self.bounds, self.precision) | tile.options
        for column in range(0, len(x), wide):
            columns = slice(column, min(column + wide, len(x)))
            for row in range(0, self.rows, high):
                rows = slice(row, min(row + high, self.rows))
                blocks = triton.cdiv(rows.stop - row, tile.rows)
                across = triton.cdiv(columns.stop - column, tile.columns)
                weight_kernel[blocks * across,](**given, first_row=row, first_column=column)
                for k, segment in enumerate(segments):
                    b_weights = weights[k, : rows.stop - row, : columns.stop - column]
                    if q_grad is not None:
                        _product(q_grad[rows, segment], b_weights, x[columns, segment], first and column == 0)
                    if side.grad is not None:
                        _product(side.grad[columns, segment], b_weights.T, queries[rows, segment], row == 0)
            if side.grad is not None:
                pairs = {}
                if side.first_own is not None:
                    pairs = {"partner": queries, "pairs": state[PAIR], "pair_sums": state[PAIR_SUM]}
                    pairs |= {"offset": -side.first_own, "of_partner": True}
                self._finish(side.grad, x, inverse=side.inverse, sums=sums, unit=unit, rows=columns, **pairs)

    def _finish(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        *,
        inverse: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
        partner: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        pair_sums: torch.Tensor | None = None,
        unit: torch.Tensor | None = None,
        rows: slice | None = None,
        offset: int = 0,
        group: int = 1,
        count: int = 1,
        add: bool = True,
        of_partner: bool = False,
    ) -> None:
        rows = slice(0, len(x)) if rows is None else rows
        constants = _finish_constants(self.bounds, add, of_partner)
        sums = sums if sums is None or sums.ndim == 3 else sums[None]
        finish_kernel[triton.cdiv(rows.stop - rows.start, constants["ROWS"]),](
            grad,
            x,
            inverse,
            sums,
            partner,
            pairs,
            pair_sums,
            unit,
            grad.stride(0),
            x.stride(0),
            0 if partner is None else partner.stride(0),
            len(x),
            rows.start,
            rows.stop,
            0 if sums is None else sums.shape[0],
            0 if sums is None else sums.shape[2],
            0 if pairs is None else pairs.shape[1],
            offset,
            group,
            count,
            **constants,
            **OPTIONS,
        )


def chunk(rows: int, columns: int, widths: int, size: int, tile: Tile) -> tuple[int, int]:
    """(rows, columns) of a chunk: whole tiles, near a square, of at most CHUNK_BYTES for all widths where one tile
    allows it; where one side has fewer, longer on the other."""
    entries = CHUNK_BYTES // (widths * size)
    all_rows, all_columns = (triton.cdiv(n, m) * m for n, m in ((rows, tile.rows), (columns, tile.columns)))
    side = math.isqrt(entries)
    high = min(all_rows, max(side // tile.rows, 1) * tile.rows)
    wide = min(all_columns, max(entries // high // tile.columns, 1) * tile.columns)
    return min(all_rows, max(entries // wide // tile.rows, 1) * tile.rows), wide


def _finish_constants(bounds: tuple[int, ...], add: bool, of_partner: bool) -> dict:
    return _prefix_constants(bounds) | {"ADD": add, "OF_PARTNER": of_partner, "PARTS": PARTS}


def _gradient(x: torch.Tensor | None, wanted: bool, like: torch.Tensor, whole: bool) -> torch.Tensor:
    """Room for the gradient; zeros where kernels don't fill all of it."""
    grad = empty_gradient(x, wanted, like, torch.float32)
    return grad if whole else grad.zero_()


def info_nce(
    queries: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None,
    mixed: torch.Tensor | None,
    positive_ids: torch.Tensor | None,
    negative_ids: torch.Tensor | None,
    start: int,
    temperature: float,
    gamma: float,
    detach_focal: bool,
    fn_margin: float | None,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """As `reference.blocked_info_nce`."""
    given = queries, positives, negatives, mixed
    whole = len(queries) > 0 and dims[0] == queries.shape[1]
    grads = [_gradient(x, wanted, queries, whole) for x, wanted in zip(given, needs, strict=True)]
    if len(queries) == 0:
        return queries.new_zeros((), dtype=torch.float32), *grads
    negatives, mixed = (None if x is None or x.numel() == 0 else x for x in (negatives, mixed))
    dtype = positives.dtype
    for x in (queries, negatives):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    wide = []
    for x, grad, wanted in zip((queries, positives, negatives, mixed), grads, needs, strict=True):
        wide.append(grad.view(-1, queries.shape[1]) if wanted and x is not None else None)
    ids = None if positive_ids is None else positive_ids.contiguous()
    columns = [_Columns(_rows_of(positives, dtype), ids, start, wide[1])]
    if negatives is not None:
        ids = None if negative_ids is None else negative_ids.flatten().contiguous()
        columns.append(_Columns(_rows_of(negatives, dtype), ids, None, wide[2]))
    with on_device(queries):
        call = _Call(
            _rows_of(queries, dtype),
            columns,
            None if mixed is None else _rows_of(mixed, mixed.dtype),
            None,
            total=len(positives),
            temperature=temperature,
            teacher_temperature=1.0,
            dims=dims,
            dim_weights=dim_weights,
        )
        loss = call.evaluate(gamma, detach_focal, fn_margin, wide[0], wide[3])
    return loss, *grads


def soft_label_loss(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    teacher_scores: torch.Tensor,
    total: int,
    temperature: float,
    teacher_temperature: float,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """As `reference.blocked_soft_label_loss`."""
    empty = teacher_scores.numel() == 0
    whole = not empty and dims[0] == queries.shape[1]
    grads = [_gradient(x, wanted, queries, whole) for x, wanted in zip((queries, candidates), needs, strict=True)]
    if empty:
        return queries.new_zeros((), dtype=torch.float32), *grads
    q_grad, c_grad = (grad.view(-1, queries.shape[1]) if need else None for grad, need in zip(grads, needs))
    shared = candidates.ndim == 2
    dtype = torch.promote_types(queries.dtype, candidates.dtype) if shared else queries.dtype
    rows = _rows_of(candidates, dtype if shared else candidates.dtype)
    with on_device(queries):
        call = _Call(
            _rows_of(queries, dtype),
            [_Columns(rows, grad=c_grad)] if shared else [],
            None if shared else rows,
            unit_columns(teacher_scores),
            total=total,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            dims=dims,
            dim_weights=dim_weights,
        )
        loss = call.evaluate(0.0, True, None, q_grad, None if shared else c_grad)
    return loss, *grads


# What is shipped, for the proof without a GPU

# The widths of KaLM-Embedding-V2; 100 is no multiple of 16.
BOUNDS = {"D=384": (0, 384), "D=768": (0, 768), "D=1024": (0, 1024), "D=100": (0, 100)}
BOUNDS |= {"D=896 in 5": (0, 64, 128, 256, 512, 896)}
# Widths and forms of the kernels over tiles, by dtype.
TILES = {
    "bf16": [
        *((width, "") for width in BOUNDS),
        ("D=384", "masked"),
        ("D=896 in 5", "masked"),
        ("D=384", "taught"),
        ("D=896 in 5", "taught"),
        ("D=384", "negatives"),
        ("D=384", "positives"),
        ("D=384", "positives masked"),
    ],
    "fp16": [("D=384", "")],
    "fp32": [("D=384", ""), ("D=384", "masked"), ("D=896 in 5", "masked"), ("D=896 in 5", "taught")],
}
TESTED = {
    "score bf16 D=384",
    "weight masked bf16 D=896 in 5",
    "row focal D=384",
    "finish positives bf16 D=384",
    "prefix bf16 D=384",
    "teacher fp32",
}


def shipped() -> list[Shipped]:
    """What is launched for the widths of encoders in use, with and without masks, a teacher and own columns."""
    found = [_shipped("teacher fp32", teacher_kernel, {"teacher": "fp32"}, TEACHER_CONSTANTS)]
    for dtype, cases in TILES.items():
        for width, form in cases:
            found.append(_shipped_tile("score", score_kernel, dtype, width, form))
            if "positives" not in form:
                found.append(_shipped_tile("weight", weight_kernel, dtype, width, form))
    for width in ("D=384", "D=896 in 5"):
        found += [_shipped_prefix(width, own) for own in (False, True)]
        found += [_shipped_row(width, form) for form in ("", "focal", "own", "taught", "taught own")]
        found += [_shipped_finish(width, form) for form in FINISHES]
    return found


def _shipped(
    title: str, kernel, pointers: dict[str, str], constants: dict, options: dict = OPTIONS, absent=()
) -> Shipped:
    """Pointers that `pointers` does not name are float32; `absent` arguments are None."""
    types = dict.fromkeys(("scale", "teacher_scale", "margin", "share", "inverse_temperature", "gamma"), "fp32")
    types |= dict.fromkeys(PLAIN, "i32")
    signature = {}
    for name in kernel.arg_names:
        if name in absent or name in constants:
            continue
        stride = "i32" if "D=100" in title and name != "teacher_stride" else "i32:16"
        pointer = f"*{pointers.get(name, 'fp32')}{'' if name in SLICES else ':16'}"
        signature[name] = types.get(name, stride if name.endswith("stride") else pointer)
    constants = constants | {name: None for name in absent if name in kernel.arg_names}
    return Shipped("contrastive", title, kernel, signature, constants, options, tested=title in TESTED)


def _shipped_tile(name: str, kernel, dtype: str, width: str, form: str) -> Shipped:
    bounds, masked, taught, positives = BOUNDS[width], "masked" in form, form == "taught", "positives" in form
    tile = configure(4 if dtype == "fp32" else 2, "ieee", bounds, masked, taught)
    pointers = dict.fromkeys(("queries", "x", "weights"), dtype) | {"q_ids": "i64", "x_ids": "i64"}
    absent = set() if taught else {"teacher", "teacher_state"}
    absent |= set() if masked and not positives else {"q_ids", "x_ids", "margin"}
    absent |= {"partial"} if positives else set() if masked else {"positive"}
    absent |= {"first_own"} if taught or form == "negatives" else set()
    title = " ".join(filter(None, (name, form, dtype, width)))
    return _shipped(title, kernel, pointers, tile.constants(bounds, "ieee"), tile.options, absent)


def _shipped_prefix(width: str, own: bool) -> Shipped:
    constants, absent = _prefix_constants(BOUNDS[width]), () if own else ("queries", "scores")
    title = f"prefix{' own' if own else ''} bf16 {width}"
    return _shipped(title, prefix_kernel, {"x": "bf16", "queries": "bf16"}, constants, absent=absent)


def _shipped_row(width: str, form: str) -> Shipped:
    absent = {"unit"} | (set() if "own" in form else {"own_scores", "own_inverse", "own_pairs", "own_sums"})
    absent |= {"positive", "x_inverse"} if "taught" in form else {"teacher", "teacher_state"}
    absent |= {"partial"} if form == "taught own" else set()
    weights = (1 / (len(BOUNDS[width]) - 1),) * (len(BOUNDS[width]) - 1)
    constants = _row_constants(weights, 0.5 if form == "focal" else 0.0, True)
    return _shipped(" ".join(filter(None, ("row", form, width))), row_kernel, {}, constants, absent=absent)


# The launches of `_finish`, as (absent tensors, ADD, OF_PARTNER).
FINISHES = {
    "queries": (("pair_sums",), True, False),
    "positives": ((), True, True),
    "negatives": (("partner", "pairs_of", "pair_sums"), True, False),
    "own": (("pair_sums",), False, False),
    "queries by own": (("inverse", "sums", "pair_sums"), True, True),
    "queries by own alone": (("pair_sums",), False, True),
}


def _shipped_finish(width: str, form: str) -> Shipped:
    absent, add, of_partner = FINISHES[form]
    constants = _finish_constants(BOUNDS[width], add, of_partner)
    pointers = {"x": "bf16", "partner": "bf16"}
    return _shipped(f"finish {form} bf16 {width}", finish_kernel, pointers, constants, absent=(*absent, "unit"))
