"""The definitions of the distillation losses in plain PyTorch (brute, differentiable) and their lean form (blocked)."""

from collections.abc import Sequence

import torch

from leafkern.ops._core.normalize import brute_normalize, common_dtype, normalize_rows, normalize_rows_backward
from leafkern.ops.relative.autograd import relative_scores
from leafkern.ops.relative.reference import brute_relative

KINDS = ("l2sq", "l2", "mse", "cosine")

# A block of rows times all rows: at most so many rows, and bytes. On CPU its scores should stay in a cache; a GPU must
# be filled.
_BLOCK = {"cpu": (256, 16 << 20), "cuda": (2048, 256 << 20)}


def brute_alignment_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    normalize: bool = False,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row at a time, as the formulas say; with `weight`, of student @ weightᵀ."""
    dtype = common_dtype(student, teacher, weight)
    teacher = teacher.detach()
    total = sum((x * 0).sum().to(dtype) for x in (student, weight) if x is not None)
    for s, t in zip(student.to(dtype), teacher.to(dtype), strict=True):
        s = s if weight is None else weight.to(dtype) @ s
        s = brute_normalize(s) if normalize else s
        square = (s - t).square().sum()
        if kind == "l2sq":
            total = total + square
        elif kind == "mse":
            total = total + square / s.numel()
        elif kind == "l2":
            total = total + (square.sqrt() if square > 0 else 0 * square)
        else:
            total = total + 1 - (brute_normalize(s) * brute_normalize(t)).sum()
    return total / max(student.shape[0], 1)


def brute_cosine_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One row at a time. target: unit rows, used as they are."""
    dtype = common_dtype(student, target)
    student, target = student.to(dtype), target.detach().to(dtype)
    total = student[:0].sum()
    for s, t in zip(student, target, strict=True):
        total = total + 1 - (brute_normalize(s) * t).sum()
    return total / max(student.shape[0], 1)


def brute_similarity_loss(student: torch.Tensor, target: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """One pair of rows at a time. target: unit rows."""
    dtype = common_dtype(student, target)
    student, target = student.to(dtype), target.detach().to(dtype)
    rows = student.shape[0]
    total = student[:0].sum()
    for d in dims:
        units = [brute_normalize(row[:d]) for row in student]
        for i in range(rows):
            for j in range(rows):
                total = total + ((units[i] * units[j]).sum() - (target[i] * target[j]).sum()).square()
    return total / (len(dims) * max(rows, 1) ** 2)


def brute_distill_loss(
    student: torch.Tensor,
    target: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    margin: float,
    reference_ties: bool,
    min_gap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """total, cosine, similarity, relative; a term of weight 0 is 0. target: unit rows."""
    zero = student[:0].to(common_dtype(student, target)).sum()
    cosine = brute_cosine_loss(student, target) if weights[0] else zero
    similarity = brute_similarity_loss(student, target, dims) if weights[1] else zero
    relative = zero
    for d in dims if weights[2] and len(student) else ():
        units = torch.stack([brute_normalize(row[:d].to(zero.dtype)) for row in student])
        scores, teacher_scores = units @ units.T, (target @ target.T).to(zero.dtype)
        relative = relative + brute_relative(scores, teacher_scores, margin, reference_ties, min_gap) / len(dims)
    total = weights[0] * cosine + weights[1] * similarity + weights[2] * relative
    return total, cosine, similarity, relative


def lean_alignment_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: int,
    normalize: bool,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The alignment loss of given rows (B, D) and its gradient (B, D), or an empty (0,); kind: a place in KINDS."""
    dtype = common_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    rows = max(s.shape[0], 1)
    if KINDS[kind] == "cosine":
        units, targets = normalize_rows(s), normalize_rows(t)
        loss = (1 - (units * targets).sum(-1)).sum() / rows
        slope = targets.div_(-rows)
    else:
        units = normalize_rows(s) if normalize else s
        slope = units - t
        if KINDS[kind] == "l2":
            norm = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
            loss = norm.sum() / rows
            slope /= torch.where(norm == 0, torch.inf, norm * rows)
        else:
            scale = 1 / (max(s.numel(), 1) if KINDS[kind] == "mse" else rows)
            loss = slope.square().sum() * scale
            slope *= 2 * scale
    if not needs_gradient:
        return loss, s.new_empty(0)
    return loss, normalize_rows_backward(slope, s) if normalize or KINDS[kind] == "cosine" else slope


def blocked_similarity_loss(
    student: torch.Tensor,
    everyone: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    start: int,
    dims: Sequence[int],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity loss that rows [start, start + b) of all B give, and these rows' gradient of the whole loss.

    student: (b, D); everyone: (B, D), None for the student itself; targets: (B, D_k) each, the parts of unit rows.
    Memory beyond copies of the inputs: two blocks of rows times B. The shares of ranks that hold all rows between them
    add up to the loss.
    """
    student, everyone, targets = _wide(student, everyone, targets)
    gradient = student.new_zeros(student.shape) if needs[0] else student.new_empty(0)
    units = [normalize_rows(everyone[:, :d]) for d in dims]
    loss, grads = _similarity_by_blocks(units, targets, start, student.shape[0], needs[0])
    if needs[0]:
        _add_unit_gradients(gradient, student, dims, grads)
    return loss, gradient


def blocked_distill_loss(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The share of rows [start, start + b) in the total and its three terms, and these rows' gradient of the total.

    Arguments as in blocked_similarity_loss. A term of weight 0 is 0 and takes no work; without the relative term
    nothing takes B×B memory. Every rank computes the whole relative term and reports b / B of it.
    """
    student, everyone, targets = _wide(student, everyone, targets)
    rows, batch = student.shape[0], max(everyone.shape[0], 1)
    cosine, similarity, relative = (student.new_zeros(()) for _ in range(3))
    gradient = student.new_zeros(student.shape) if needs[0] else student.new_empty(0)
    if weights[0]:
        own = torch.cat([target[start : start + rows] for target in targets], 1)
        cosine = (1 - (normalize_rows(student) * own).sum(-1)).sum() / batch
        if needs[0]:
            gradient += normalize_rows_backward(own * (-weights[0] / batch), student)
    if weights[1] or weights[2]:
        units = [normalize_rows(everyone[:, :d]) for d in dims]
        if weights[2]:
            similarity, relative, grads = _similarity_and_relative(
                units, targets, start, rows, weights, margin, reference_ties, min_gap, needs[0]
            )
        else:
            similarity, grads = _similarity_by_blocks(units, targets, start, rows, needs[0])
            grads = [grad.mul_(weights[1]) for grad in grads]
        if needs[0]:
            _add_unit_gradients(gradient, student, dims, grads)
    total = weights[0] * cosine + weights[1] * similarity + weights[2] * relative
    return total, cosine, similarity, relative, gradient


def _wide(student, everyone, targets):
    dtype = common_dtype(student, *targets)
    student = student.to(dtype)
    everyone = student if everyone is None else everyone.to(dtype)
    return student, everyone, [target.to(dtype) for target in targets]


def _block_rows(x: torch.Tensor) -> int:
    """Rows of x whose scores against all rows of x make one block."""
    rows, size = _BLOCK.get(x.device.type, _BLOCK["cpu"])
    return max(1, min(rows, size // max(1, x.shape[0] * x.element_size())))


def _teacher_scores(targets, rows, columns):
    """t_i·t_j of rows i and columns j, both slices."""
    scores = targets[0][rows] @ targets[0][columns].T
    for target in targets[1:]:
        scores.addmm_(target[rows], target[columns].T)
    return scores


def _similarity_by_blocks(units, targets, start, rows, wanted):
    """The share of the loss, and the gradients of rows [start, start + rows) with respect to `units`, one each width.

    dL/ds_i = 4/(K B²) Σ_j (s_i·s_j − t_i·t_j) s_j: the loss is symmetric, so own rows against all rows suffice.
    """
    batch = units[0].shape[0]
    scale = 1 / (len(units) * max(batch, 1) ** 2)
    loss = units[0].new_zeros(())
    grads = [unit.new_zeros(rows, unit.shape[1]) for unit in units] if wanted else []
    # With the whole batch here, scores left of a diagonal block mirror those of blocks above it.
    whole, step = rows == batch, _block_rows(units[0])
    for first in range(start, start + rows, step):
        last = min(first + step, start + rows)
        begin, mirrored = (first, last < batch) if whole else (0, False)
        teacher_scores = _teacher_scores(targets, slice(first, last), slice(begin, None))
        for k, unit in enumerate(units):
            error = (unit[first:last] @ unit[begin:].T).sub_(teacher_scores)
            if wanted:
                grads[k][first - start : last - start].addmm_(error, unit[begin:], alpha=4 * scale)
                if mirrored:
                    grads[k][last:].addmm_(error[:, last - first :].T, unit[first:last], alpha=4 * scale)
            error.square_()
            loss += error.sum()
            if mirrored:
                loss += error[:, last - first :].sum()
    return loss * scale, grads


def _similarity_and_relative(units, targets, start, rows, weights, margin, reference_ties, min_gap, wanted):
    """Both terms' shares and the gradients of their weighted sum with respect to own rows of `units`, one each width.

    One Gram matrix for the teacher and one per width serve both terms; one matrix product per width gives the gradient.
    """
    batch = units[0].shape[0]
    widths, entries = len(units), max(batch, 1) ** 2
    own = slice(start, start + rows)
    teacher_scores = _teacher_scores(targets, slice(None), slice(None))
    scores = units[0].new_empty(widths, batch, batch)
    for unit, out in zip(units, scores):
        torch.mm(unit, unit.T, out=out)
    losses, pairs = relative_scores(scores, teacher_scores, margin, reference_ties, min_gap, wanted)
    relative = losses.sum() * (rows / (widths * max(batch, 1)))
    similarity, grads = units[0].new_zeros(()), []
    for k, unit in enumerate(units):
        error = scores[k, own].sub_(teacher_scores[own])
        if wanted:
            # A pair's gradient is stored once, above the diagonal, and reaches both of its rows.
            # Copied before it is added: adding a transposed view walks memory column by column.
            slope = pairs[k, :, own].T.contiguous().add_(pairs[k, own]).mul_(weights[2] / widths)
            if weights[1]:
                slope.add_(error, alpha=4 * weights[1] / (widths * entries))
            grads.append(slope @ unit)
        if weights[1]:
            similarity += error.square_().sum() / (widths * entries)
    return similarity, relative, grads


def _add_unit_gradients(gradient, student, dims, grads):
    """Adds to `gradient` what the gradients of the unit prefixes give."""
    for d, grad in zip(dims, grads):
        gradient[:, :d] += normalize_rows_backward(grad, student[:, :d])
