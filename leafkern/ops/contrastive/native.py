"""The contrastive losses on the CPU: matrix products by torch, everything between them by the kernels of `leafkern._C`.

For a block of queries, raw products with all columns lie in one buffer; a pass over it turns them into cosines by the
inverse norms of both sides, and these into the loss and into weights, its derivative by the raw products; the weights'
products with the rows themselves are the gradients, but for what the norms project out. No unit vectors are formed and
no columns joined. Raw products of prefixes are partial sums of those of whole rows, and weights of prefixes add up:
all widths cost one product each way, 2·B·N·D operations forward and 4·B·N·D backward for N columns. A block of R
queries reads the columns twice and their gradients once, which it writes: 16·N·D bytes in float32 for 6·R·N·D
operations.

Of the similarities a block is stored, K times for K widths, within `reference.BLOCK_BYTES`: MKL's products of a block
take less time than computing it again. Beside inputs and gradients that block is all but the whole of the memory. What
is not of the loss's type (half precision), or lies with entries of a row apart, is converted in pieces of PIECE_BYTES,
once for each use.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from leafkern.ops._core.launch import unit_columns
from leafkern.ops._core.native import library
from leafkern.ops._core.normalize import common_dtype
from leafkern.ops.contrastive.reference import BLOCK_BYTES, empty_gradient

PIECE_BYTES = 4 << 20
MOST_ROWS = 512  # of a block: beyond, products gain nothing, and the block leaves the cache


class _Columns:
    """Rows (N, D) or (B, M, D), flattened, that are columns of the similarities, from number `first` on."""

    def __init__(self, x: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype, first: int, ids=None):
        self.x, self.dtype, self.first, self.ids = x, dtype, first, None if ids is None else ids.contiguous()
        self.count = x.shape[:-1].numel()
        self.gradient = gradient.view(-1, x.shape[-1]) if gradient.ndim > 1 else None
        self.rows = max(min(PIECE_BYTES, BLOCK_BYTES["cpu"]) // max(x[:1].numel() * dtype.itemsize, 1), 1)
        self.flat = None
        adjacent = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] and (x.ndim == 2 or x.is_contiguous())
        if x.dtype == dtype and adjacent:
            self.flat = x.view(-1, x.shape[-1])
        elif x.shape[0] <= self.rows:
            self.flat = self._piece(x)

    def _piece(self, x: torch.Tensor) -> torch.Tensor:
        return unit_columns(x.to(self.dtype)).reshape(-1, x.shape[-1])

    def pieces(self, entries: slice) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first row, these entries of rows)"""
        if self.flat is not None:
            yield 0, self.flat[:, entries]
            return
        for start in range(0, self.x.shape[0], self.rows):
            piece = self.x[start : start + self.rows, ..., entries]
            yield start * (self.count // self.x.shape[0]), self._piece(piece)


def _loss(
    queries: torch.Tensor,
    columns: Sequence[torch.Tensor | None],
    own: torch.Tensor | None,
    needs: Sequence[bool],
    dtype: torch.dtype,
    temperature: float,
    dims: Sequence[int],
    shares: Sequence[float],
    arguments: Callable[[slice], tuple],
    ids: Sequence[torch.Tensor | None] = (None, None),
    row_numbers: int = 0,
) -> tuple[torch.Tensor, ...]:
    """(loss, gradients by queries, columns, own): sums over queries times shares[k] at width dims[k].

    queries: (B', D). columns: (N, D) or (B, M, D), shared by all queries. own: (B', n, D), each query's. needs: for
    queries, columns and own. arguments(rows): what `contrastive_rows` takes last, which tells the losses apart;
    row_numbers: how many numbers that takes for a row.
    """
    module, _ = library()
    threads, widths, item = torch.get_num_threads(), len(dims), dtype.itemsize
    is_double, wanted = dtype == torch.float64, any(needs)
    tensors = (queries, *columns, own)
    grads = [empty_gradient(x, need, queries, dtype) for x, need in zip(tensors, needs, strict=True)]
    nothing = queries.shape[0] == 0 or all(x is None or x.numel() == 0 for x in tensors[1:])
    if nothing or dims[0] < queries.shape[1]:
        for grad in grads:
            grad.zero_()
    if nothing:
        return queries.new_zeros((), dtype=dtype), *grads
    parts, total = [], 0
    for x, gradient, given in zip(columns, grads[1:-1], ids):
        if x is not None and x.numel() > 0:
            parts.append(_Columns(x, gradient, dtype, total, given))
            total += parts[-1].count
    number = 0 if own is None else own.shape[1]
    row_numbers += widths * (total + 3 * number)
    if own is not None and (own.dtype != dtype or own.stride(-1) != 1):
        row_numbers += number * queries.shape[1]
    size = max(min(BLOCK_BYTES["cpu"] // max(row_numbers * item, 1), MOST_ROWS, queries.shape[0]), 1)
    segments = [slice(narrower, width) for width, narrower in zip(dims, [*dims[1:], 0])]

    def empty(*shape, dtype=dtype):
        return queries.new_empty(shape, dtype=dtype)

    def matrix(x, inverse, stride, place=0):
        return is_double, threads, x.data_ptr(), x.shape[0], x.stride(0), inverse.data_ptr() + place * item, stride

    inverse = empty(widths, total)
    for part in parts:
        for place, piece in part.pieces(slice(dims[0])):
            module.inverse_norms(matrix(piece, inverse, total, part.first + place), dims)
    groups = -(-size // module.GROUP_ROWS)
    z, losses = empty(widths, size, total), empty(size, dtype=torch.float64)
    partial = sums = None
    if widths > 1:
        partial = empty(groups * total)
        sums = queries.new_zeros(widths - 1, total, dtype=torch.float64)

    def part_arguments(part, width):
        further = (0, 0)
        if width > 0 and part.gradient is not None:
            place = (width - 1) * total + part.first
            further = (partial.data_ptr() + groups * part.first * item, sums.data_ptr() + place * 8)
        return (
            z.data_ptr() + part.first * item,
            z.data_ptr() + (width * size * total + part.first) * item,
            inverse.data_ptr() + (width * total + part.first) * item,
            part.count,
            total,
            0,
            0 if part.ids is None else part.ids.data_ptr(),
            True,
            *further,
        )

    none = (0, 0, 0, 0, 0, 0, 0, False, 0, 0)
    loss = 0.0
    for start in range(0, queries.shape[0], size):
        rows = slice(start, min(start + size, queries.shape[0]))
        count = rows.stop - start
        x = unit_columns(queries[rows].to(dtype))
        inverse_x, row_sums = empty(widths, count), empty(widths - 1, count, dtype=torch.float64)
        of_rows = matrix(x, inverse_x, count)
        module.inverse_norms(of_rows, dims)
        if number:
            y, mine = unit_columns(own[rows].to(dtype)), empty(3, widths, count, number)
            raw, inverse_y, weights = (part.data_ptr() for part in mine)
            of_own = (y.data_ptr(), number, y.stride(0), y.stride(1), raw, inverse_y, weights)
            module.own_products(of_rows, dims, (*of_own, 0, 0, 0, 0))
        last = arguments(rows)
        for width in reversed(range(widths)):
            for part in parts:
                for place, piece in part.pieces(segments[width]):
                    place += part.first
                    out = z[0, :count, place : place + piece.shape[0]]
                    out.addmm_(x[:, segments[width]], piece.T, beta=0 if width == widths - 1 else 1)
            given = [part_arguments(part, width) for part in parts] + [none] * (2 - len(parts))
            if number:
                offset = width * count * number * item
                shape = (number, number, number)
                given.append((raw + offset, weights + offset, inverse_y + offset, *shape, 0, False, 0, 0))
            else:
                given.append(none)
            loss += module.contrastive_rows(
                is_double,
                wanted,
                threads,
                count,
                inverse_x.data_ptr() + width * count * item,
                given,
                temperature,
                shares[width],
                losses.data_ptr(),
                row_sums.data_ptr() + (width - 1) * count * 8 if width > 0 else 0,
                widths if width == 0 else 1,
                size * total,
                *last,
            )
        if not wanted:
            continue
        gradient = grads[0][rows] if needs[0] else None
        if needs[0] and not parts:
            gradient.zero_()
        for width, segment in enumerate(segments):
            for part in parts:
                by_part = z[width, :count, part.first : part.first + part.count]
                if needs[0]:
                    for place, piece in part.pieces(segment):
                        by_piece = by_part[:, place : place + piece.shape[0]]
                        gradient[:, segment].addmm_(by_piece, piece, beta=0 if part.first + place == 0 else 1)
                if part.gradient is not None:
                    part.gradient[:, segment].addmm_(by_part.T, x[:, segment], beta=0 if start == 0 else 1)
        if number:
            by_rows = (gradient.data_ptr(), gradient.stride(0)) if needs[0] else (0, 0)
            by_own = (grads[-1][rows].data_ptr(), own.shape[2]) if needs[-1] else (0, 0)
            module.own_gradients(of_rows, dims, (*of_own, *by_rows, *by_own))
        if needs[0]:
            module.project(of_rows, dims, gradient.data_ptr(), gradient.stride(0), row_sums.data_ptr(), count)
    for part in parts:
        if part.gradient is None:
            continue
        for place, piece in part.pieces(slice(dims[0])):
            first = part.first + place
            module.project(
                matrix(piece, inverse, total, first),
                dims,
                part.gradient[place:].data_ptr(),
                part.gradient.stride(0),
                0 if sums is None else sums.data_ptr() + first * 8,
                total,
            )
    return queries.new_full((), loss, dtype=dtype), *grads


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
    dtype = common_dtype(queries, positives, negatives, mixed)
    shares = [weight / max(positives.shape[0], 1) for weight in dim_weights]
    ids = None if positive_ids is None else positive_ids.contiguous()

    def arguments(rows):
        own = start + rows.start
        return (own, 0 if ids is None else ids.data_ptr() + own * 8, fn_margin, gamma, detach_focal), 0, 1.0

    both = (ids, negative_ids)
    return _loss(queries, (positives, negatives), mixed, needs, dtype, temperature, dims, shares, arguments, ids=both)


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
    dtype = common_dtype(queries, candidates, teacher_scores)
    shares = [weight / max(total, 1) for weight in dim_weights]
    shared = candidates.ndim == 2
    block = [None]

    def arguments(rows):
        block[0] = teacher_scores[rows].to(dtype).contiguous()  # kept until the next block's
        return None, block[0].data_ptr(), teacher_temperature

    needs = (needs[0], needs[1] and shared, needs[1] and not shared)
    columns, own = ((candidates,), None) if shared else ((None,), candidates)
    copied = 0 if teacher_scores.dtype == dtype and teacher_scores.is_contiguous() else teacher_scores.shape[1]
    loss, by_queries, by_columns, by_own = _loss(
        queries, columns, own, needs, dtype, temperature, dims, shares, arguments, row_numbers=copied
    )
    return loss, by_queries, by_columns if shared else by_own
