"""The distillation losses on CPU: torch's matrix products, and between them the compiled passes of `leafkern._C`.

Over the prefixes of raw rows, from narrow to wide, dot products add up: those of all K widths cost one product of full
width, and inverse norms make them cosines. For whole batches half of the matrix suffices: B²·(D_s + D_t) operations.
The gradient's weights are summed from the widest width down, so that each segment of columns takes one product:
2·B²·D_s operations for all widths. Without the relative term, a block of rows at a time: _BLOCK_BYTES for its K + 1
matrices, or what one row's scores take if that is more. A block is stored because forming its products again would cost
more. With the relative term, whose sorts need all scores, 2·K + 1 matrices of B·B.
"""

from collections.abc import Sequence

import torch

from leafkern.ops._core.launch import unit_columns
from leafkern.ops._core.native import library
from leafkern.ops._core.normalize import common_dtype
from leafkern.ops.distill.gram import gram_is_cheaper, gram_similarity
from leafkern.ops.distill.reference import KINDS
from leafkern.ops.relative.autograd import relative_scores

# Rows of a block, and bytes of its matrices, at the most. Its diagonal square is computed whole, so a block is narrow.
_BLOCK_ROWS, _BLOCK_BYTES = 128, 32 << 20


def similarity_loss(
    student: torch.Tensor,
    everyone: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    start: int,
    dims: Sequence[int],
    needs: Sequence[bool],
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.blocked_similarity_loss`; `threads`: torch's."""
    return distill_loss(student, everyone, targets, start, dims, (0.0, 1.0, 0.0), 0.0, False, 0.0, needs, threads)[::4]


def distill_loss(
    student: torch.Tensor,
    everyone: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    start: int,
    dims: Sequence[int],
    weights: Sequence[float],
    margin: float,
    reference_ties: bool,
    min_gap: float,
    needs: Sequence[bool],
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.blocked_distill_loss`, but a rank's share of similarity is b / B of it too; `threads`: torch's."""
    dtype = common_dtype(student, *targets)
    everyone = unit_columns((student if everyone is None else everyone).to(dtype))
    targets = [unit_columns(target.to(dtype)) for target in targets]
    rows = slice(start, start + student.shape[0])
    gradient = everyone.new_zeros(student.shape) if needs[0] else everyone.new_empty(0)
    cosine = similarity = relative = 0.0
    if student.shape[0]:
        share = student.shape[0] / everyone.shape[0]
        batch = _Batch(everyone, targets, rows, dims, gradient if needs[0] else None, threads)
        by_gram = weights[1] and not weights[2] and gram_is_cheaper(student, everyone, targets, dims, needs[0])
        if by_gram:
            similarity, slopes = gram_similarity(everyone, targets, rows, dims, needs[0])
            similarity = similarity.item()
            if needs[0]:
                gradient.add_(slopes, alpha=weights[1])
        elif weights[2]:
            similarity, relative = batch.similarity_and_relative(weights, margin, reference_ties, min_gap)
        elif weights[1]:
            similarity = batch.similarity(weights[1])
        cosine = batch.finish(weights[0])
        similarity, relative = (similarity * share if weights[1] else 0.0), relative * share
    total = weights[0] * cosine + weights[1] * similarity + weights[2] * relative
    return *(torch.tensor(x, dtype=dtype, device="cpu") for x in (total, cosine, similarity, relative)), gradient


def _block_rows(x: torch.Tensor, widths: int) -> int:
    """Rows of x whose scores against all rows of x, of every width and the teacher's, make one block."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(1, x.element_size() * x.shape[0] * (widths + 1))))


def alignment_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: int,
    normalize: bool,
    needs_gradient: bool,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.lean_alignment_loss`; `threads`: torch's."""
    module, _ = library()
    dtype = common_dtype(student, teacher)
    student, teacher = unit_columns(student.to(dtype)), unit_columns(teacher.to(dtype))
    rows, width = student.shape
    scale = 1 / max(student.numel() if KINDS[kind] == "mse" else rows, 1)
    gradient = student.new_empty(student.shape if needs_gradient else (0,))
    total = module.distill_align(
        dtype == torch.float64,
        kind,
        normalize,
        rows,
        width,
        scale,
        threads or torch.get_num_threads(),
        student.data_ptr(),
        student.stride(0),
        teacher.data_ptr(),
        teacher.stride(0),
        gradient.data_ptr() if needs_gradient else 0,
    )
    return torch.tensor(total * scale, dtype=dtype, device="cpu"), gradient


class _Batch:
    """All rows, the norms of their prefixes, and what the passes collect."""

    def __init__(self, everyone, targets, rows, dims, gradient, threads):
        self.module, _ = library()
        self.is_double = everyone.dtype == torch.float64
        self.threads = threads or torch.get_num_threads()
        self.rows, self.targets, self.own, self.dims, self.gradient = everyone, targets, rows, dims, gradient
        self.count, width = everyone.shape
        self.whole = rows.stop - rows.start == self.count
        # Norms of the whole rows first, for the cosine loss.
        self.first = int(dims[0] != width)
        widths = [width, *dims] if self.first else dims
        self.inverse = everyone.new_empty(len(widths), self.count)
        self.sums = torch.zeros(len(dims), self.count, dtype=torch.float64, device="cpu")
        self.loss = torch.zeros((), dtype=torch.float64, device="cpu")
        matrix = everyone.data_ptr(), self.count, everyone.stride(0), self.inverse.data_ptr(), self.count
        self.module.inverse_norms((self.is_double, self.threads, *matrix), widths)
        # With a single entry n(x) is a sign, unless it is below the clamp, and its gradient is exactly 0.
        self.flat = dims[-1] == 1 and not (self.inverse[-1] >= 1e12).any().item()

    def similarity(self, weight: float) -> float:
        """The mean squared error of the own rows' cosines over all rows; its gradient, times `weight`, without what
        `finish` projects out."""
        widths, count = len(self.dims), self.count
        scale = 1 / (widths * (self.own.stop - self.own.start) * count)
        step = _block_rows(self.rows, widths)
        space = self.rows.new_empty(min(step, count) * count * (widths + 1))
        for first in range(self.own.start, self.own.stop, step):
            last = min(first + step, self.own.stop)
            begin = first if self.whole else 0
            shape = last - first, count - begin
            teacher, *scores = space[: (widths + 1) * shape[0] * shape[1]].view(widths + 1, *shape)
            self._dot_products(first, last, begin, scores, teacher)
            scales = {"error_scale": 4 * weight / (widths * count**2)}
            self._pass("DISTILL_FUSED", first, begin, self.whole, scores, teacher, **scales)
            if self.gradient is not None:
                self._add_to_gradient(first, last, begin, self.whole, scores)
        return self.loss.item() * scale

    def similarity_and_relative(self, weights, margin, reference_ties, min_gap) -> tuple[float, float]:
        """The same for both terms, of the whole batch; its gradient, without what `finish` projects out, is that of the
        own rows."""
        widths, count = len(self.dims), self.count
        scores, teacher = self.rows.new_empty(widths, count, count), self.rows.new_empty(count, count)
        bands = [(first, min(first + _BLOCK_ROWS, count)) for first in range(0, count, _BLOCK_ROWS)]
        for first, last in bands:
            part, teacher_part = scores[:, first:last, first:].unbind(), teacher[first:last, first:]
            self._dot_products(first, last, first, part, teacher_part)
            self._pass("DISTILL_SCORES", first, first, True, part, teacher_part)
        wanted = self.gradient is not None
        losses, slopes = relative_scores(scores, teacher, margin, reference_ties, min_gap, wanted)
        scale = 1 / (widths * count**2)
        for first, last in bands if wanted else ():
            part, teacher_part = scores[:, first:last, first:].unbind(), teacher[first:last, first:]
            scales = {"error_scale": 4 * weights[1] * scale, "relative_scale": weights[2] / widths}
            scales["slopes"] = slopes[:, first:last, first:]
            self._pass("DISTILL_WEIGHTS", first, first, True, part, teacher_part, **scales)
            self._add_to_gradient(first, last, first, True, part)
        return self.loss.item() * scale, losses.sum().item() / widths

    def finish(self, weight: float) -> float:
        """The own rows' share of the cosine loss, if `weight` asks for it; its gradient, and what has to be projected
        out of that of the prefixes."""
        place = self.rows.element_size() * self.own.start
        of_dims = place + self.rows.element_size() * self.first * self.count
        targets = self.targets if weight else []
        total = self.module.distill_finish(
            self.is_double,
            self.own.stop - self.own.start,
            self.rows.shape[1],
            self.dims,
            [target.data_ptr() + target.stride(0) * place for target in targets],
            [target.stride(0) for target in targets],
            [target.shape[1] for target in targets],
            -weight / self.count,
            self.count,
            self.threads,
            self.rows.data_ptr() + self.rows.stride(0) * place,
            self.rows.stride(0),
            self.inverse.data_ptr() + of_dims,
            self.sums.data_ptr() + 8 * self.own.start,
            self.inverse.data_ptr() + place,
            0 if self.gradient is None else self.gradient.data_ptr(),
        )
        return (self.own.stop - self.own.start - total) / self.count if weight else 0.0

    def _dot_products(self, first, last, begin, scores, teacher):
        """Of rows [first, last) with rows from `begin` on: of every prefix into scores, narrow to wide, and targets."""
        left, right = self.rows[first:last], self.rows[begin:].T
        column, narrower = 0, None
        for dim, out in zip(reversed(self.dims), reversed(scores)):
            segment = left[:, column:dim], right[column:dim]
            torch.addmm(narrower, *segment, out=out) if column else torch.mm(*segment, out=out)
            column, narrower = dim, out
        for k, target in enumerate(self.targets):
            segment = target[first:last], target[begin:].T
            torch.addmm(teacher, *segment, out=teacher) if k else torch.mm(*segment, out=teacher)

    def _pass(self, name, first, begin, mirrored, scores, teacher, *, error_scale=0.0, relative_scale=0.0, slopes=None):
        """The pass `name` over the block of rows from `first` and columns from `begin` on."""
        item, count = self.rows.element_size(), self.count
        norms = self.inverse.data_ptr() + item * self.first * count
        stride = scores[1].data_ptr() - scores[0].data_ptr() if len(scores) > 1 else 0
        self.module.distill_block(
            self.is_double,
            getattr(self.module, name),
            len(scores),
            scores[0].shape,
            (stride // item, scores[0].stride(0), teacher.stride(0), count),
            mirrored,
            error_scale,
            relative_scale,
            self.flat,
            self.threads,
            scores[0].data_ptr(),
            teacher.data_ptr(),
            0 if slopes is None else slopes.data_ptr(),
            norms + item * first,
            norms + item * begin,
            self.sums.data_ptr() + 8 * first,
            self.sums.data_ptr() + 8 * begin,
            self.loss.data_ptr(),
        )

    def _add_to_gradient(self, first, last, begin, mirrored, weights):
        """The products of a block's weights with the rows, for the own ones among its rows and mirrored columns."""
        start, stop = self.own.start, self.own.stop
        here = slice(max(first, start), max(min(last, stop), max(first, start)))
        below = slice(max(last, start), stop) if mirrored else slice(0, 0)
        column = 0
        for dim, weight in zip(reversed(self.dims), reversed(weights)):
            of_rows = self.rows[:, column:dim]
            if here.start < here.stop:
                out = self.gradient[here.start - start : here.stop - start, column:dim]
                out.addmm_(weight[here.start - first : here.stop - first], of_rows[begin:])
            if below.start < below.stop:
                out = self.gradient[below.start - start : below.stop - start, column:dim]
                out.addmm_(weight[:, below.start - begin : below.stop - begin].T, of_rows[first:last])
            column = dim
