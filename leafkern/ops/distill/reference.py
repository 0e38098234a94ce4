"""The definitions of the distillation losses in plain PyTorch (brute, differentiable) and their lean form (blocked)."""

from collections.abc import Sequence

import torch

from leafkern.ops._core.normalize import at_least_float32, normalize_rows, normalize_rows_backward

KINDS = ("l2sq", "l2", "mse", "cosine")

# A block of rows times all rows: at most so many rows, and bytes. On CPU its scores should stay in a cache; a GPU must
# be filled.
_BLOCK = {"cpu": (256, 16 << 20), "cuda": (2048, 256 << 20)}


def brute_alignment_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """One row at a time, as the formulas say."""
    dtype = at_least_float32(torch.promote_types(student.dtype, teacher.dtype))
    teacher = teacher.detach()
    total = student.new_zeros((), dtype=dtype) + (student * 0).sum().to(dtype)
    for s, t in zip(student.to(dtype), teacher.to(dtype), strict=True):
        square = (s - t).square().sum()
        if kind == "l2sq":
            total = total + square
        elif kind == "mse":
            total = total + square / s.numel()
        elif kind == "l2":
            total = total + (square.sqrt() if square > 0 else 0 * square)
        else:
            total = total + 1 - (_unit(s) * _unit(t)).sum()
    return total / max(student.shape[0], 1)


def brute_cosine_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One row at a time. target: unit rows, used as they are."""
    dtype = at_least_float32(torch.promote_types(student.dtype, target.dtype))
    student, target = student.to(dtype), target.detach().to(dtype)
    total = student[:0].sum()
    for s, t in zip(student, target, strict=True):
        total = total + 1 - (_unit(s) * t).sum()
    return total / max(student.shape[0], 1)


def brute_similarity_loss(student: torch.Tensor, target: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """One pair of rows at a time. target: unit rows."""
    dtype = at_least_float32(torch.promote_types(student.dtype, target.dtype))
    student, target = student.to(dtype), target.detach().to(dtype)
    rows = student.shape[0]
    total = student[:0].sum()
    for d in dims:
        units = [_unit(row[:d]) for row in student]
        for i in range(rows):
            for j in range(rows):
                total = total + ((units[i] * units[j]).sum() - (target[i] * target[j]).sum()).square()
    return total / (len(dims) * max(rows, 1) ** 2)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """n(x) = x / max(‖x‖, 1e-12), n(0) = 0 with gradient 0."""
    square = x.square().sum()
    return x / square.sqrt().clamp(min=1e-12) if square > 0 else 0 * x


def blocked_similarity_loss(
    student: torch.Tensor,
    everyone: torch.Tensor | None,
    target: torch.Tensor,
    start: int,
    dims: Sequence[int],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity loss that rows [start, start + b) of all B give, and these rows' gradient of the whole loss.

    student: (b, D); everyone: (B, D), None for the student itself; target: (B, D_t), unit rows. Memory beyond copies
    of the inputs: two blocks of rows times B. The shares of ranks that hold all rows between them add up to the loss.
    """
    student, everyone, target = _wide(student, everyone, target)
    gradient = torch.zeros_like(student) if needs[0] else student.new_empty(0)
    units = [normalize_rows(everyone[:, :d]) for d in dims]
    loss, grads = _similarity_by_blocks(units, target, start, student.shape[0], needs[0])
    if needs[0]:
        _add_unit_gradients(gradient, student, dims, grads)
    return loss, gradient


def _wide(student, everyone, target):
    dtype = at_least_float32(torch.promote_types(student.dtype, target.dtype))
    student = student.to(dtype)
    return student, student if everyone is None else everyone.to(dtype), target.to(dtype)


def _block_rows(x: torch.Tensor) -> int:
    """Rows of x whose scores against all rows of x make one block."""
    rows, size = _BLOCK.get(x.device.type, _BLOCK["cpu"])
    return max(1, min(rows, size // max(1, x.shape[0] * x.element_size())))


def _similarity_by_blocks(units, target, start, rows, wanted):
    """The share of the loss, and the gradients of rows [start, start + rows) with respect to `units`, one each width.

    dL/ds_i = 4/(K B²) Σ_j (s_i·s_j − t_i·t_j) s_j: the loss is symmetric, so own rows against all rows suffice.
    """
    batch = target.shape[0]
    scale = 1 / (len(units) * max(batch, 1) ** 2)
    loss = target.new_zeros(())
    grads = [unit.new_zeros(rows, unit.shape[1]) for unit in units] if wanted else []
    # With the whole batch here, scores left of a diagonal block mirror those above it.
    whole, step = rows == batch, _block_rows(target)
    for first in range(start, start + rows, step):
        last = min(first + step, start + rows)
        begin = first if whole else 0
        teacher_scores = target[first:last] @ target[begin:].T
        for k, unit in enumerate(units):
            error = (unit[first:last] @ unit[begin:].T).sub_(teacher_scores)
            if wanted:
                grads[k][first - start : last - start].addmm_(error, unit[begin:], alpha=4 * scale)
                if whole:
                    grads[k][last:].addmm_(error[:, last - first :].T, unit[first:last], alpha=4 * scale)
            error.square_()
            loss += error.sum()
            if whole:
                loss += error[:, last - first :].sum()
    return loss * scale, grads


def _add_unit_gradients(gradient, student, dims, grads):
    """Adds to `gradient` what the gradients of the unit prefixes give."""
    for d, grad in zip(dims, grads):
        gradient[:, :d] += normalize_rows_backward(grad, student[:, :d])
