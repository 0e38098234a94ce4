"""The relative similarity loss with its gradient, and its registration with torch.library."""

import torch

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose
from leafkern.ops._core.normalize import common_dtype, normalize_rows, normalize_rows_backward
from leafkern.ops._core.registration import register_loss
from leafkern.ops.relative import native
from leafkern.ops.relative.reference import blocked_relative

# Triton counts in 32 bits: places in a matrix, and twice the number of pairs.
MAX_BATCH = 46340


def _backend(scores):
    # No dtype is asked about: the kernels take float64 too.
    candidates = launch.candidates("relative", scores.device, native=lambda: native.unsuited(scores))
    if scores.shape[-1] > MAX_BATCH and candidates.get("triton", "none") is None:
        candidates["triton"] = f"B = {scores.shape[-1]}, above {MAX_BATCH} (B*B must stay below 2^31)"
    return choose("relative", candidates)


def relative_scores(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    margin: float,
    reference_ties: bool,
    min_gap: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative similarity loss of given scores, one per width, and its gradient with respect to them.

    student_scores: (K, B, B); teacher_scores: (B, B); both float32 or both float64; only upper triangles are read.
    Returns the losses (K,) and the gradient of each, (K, B, B) with zeros on and below the diagonal, or an empty (0,).
    Both are NaN for a width with a score, or for all with a teacher's, that is not finite. B < 3 gives 0. The teacher's
    scores are sorted once for all widths.
    """
    backend = _backend(student_scores)
    batch = student_scores.shape[-1]
    if batch < 3 or student_scores.shape[0] == 0:
        gradient = torch.zeros_like(student_scores) if with_gradient else student_scores.new_empty(0)
        return student_scores.new_zeros(student_scores.shape[0]), gradient
    if backend == "triton":
        from leafkern.ops.relative import kernels

        return kernels.relative_scores(student_scores, teacher_scores, margin, reference_ties, min_gap, with_gradient)
    if backend == "native":
        return native.relative_scores(student_scores, teacher_scores, margin, reference_ties, min_gap, with_gradient)
    losses, gradients = [], []
    for scores in student_scores:
        loss, gradient = _blocked_scores(scores, teacher_scores, margin, reference_ties, min_gap)
        losses.append(loss)
        if with_gradient:
            gradients.append(gradient)
    return torch.stack(losses), torch.stack(gradients) if with_gradient else student_scores.new_empty(0)


def _blocked_scores(scores, teacher_scores, margin, reference_ties, min_gap):
    rows, columns = torch.triu_indices(*scores.shape, 1, device=scores.device)
    if not (scores[rows, columns] + teacher_scores[rows, columns]).isfinite().all():
        return scores.new_full((), torch.nan), torch.full_like(scores, torch.nan).triu(1)
    loss, counts = blocked_relative(scores, teacher_scores, margin, reference_ties, min_gap)
    pairs = len(rows)
    return loss.to(scores.dtype), (counts.double() / (pairs * (pairs - 1) / 2)).to(scores.dtype)


def upper_products(parts, out):
    """The upper triangle of sum over parts x (B, D_k) of x @ x.T into out (B, B), in bands of rows; what lies well
    below is left as it is."""
    # Narrow bands save nearly half of the products; on a GPU few launches count for more.
    size = 128 if out.device.type == "cpu" else 1024
    for start in range(0, out.shape[0], size):
        band = out[start : start + size, start:]
        for k, rows in enumerate(parts):
            left, right = rows[start : start + size], rows[start:].T
            torch.addmm(band, left, right, out=band) if k else torch.mm(left, right, out=band)


def _relative_similarity_loss(student, everyone, targets, start, dims, margin, reference_ties, min_gap, needs):
    dtype = common_dtype(student, *targets)
    rows = (student if everyone is None else everyone).to(dtype)
    batch, own = rows.shape[0], slice(start, start + student.shape[0])
    units = [normalize_rows(rows[:, :dim]) for dim in dims]
    scores = rows.new_empty(len(dims), batch, batch)
    teacher_scores = rows.new_empty(batch, batch)
    for unit, out in zip(units, scores):
        upper_products([unit], out)
    upper_products([target.to(dtype) for target in targets], teacher_scores)
    losses, gradients = relative_scores(scores, teacher_scores, margin, reference_ties, min_gap, needs[0])
    if not needs[0]:
        return losses.mean(), rows.new_empty(0)
    total = torch.zeros(student.shape, dtype=dtype, device=student.device)
    for dim, unit, gradient in zip(dims, units, gradients):
        # A score belongs to both of its rows, but its gradient stands above the diagonal only. The transpose is
        # copied before it is added: as it lies, it is walked column by column. The memory of the scores serves for it.
        both = scores[0, : student.shape[0]].copy_(gradient[:, own].T).add_(gradient[own])
        of_units = torch.mm(both, unit)
        total[:, :dim] += normalize_rows_backward(of_units, rows[own, :dim])
    return losses.mean(), total / len(dims)


def _relative_similarity_loss_fake(student, everyone, targets, start, dims, margin, reference_ties, min_gap, needs):
    dtype = common_dtype(student, *targets)
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if needs[0] else 0, dtype=dtype)


relative_similarity_loss = register_loss(
    "relative_similarity_loss(Tensor student, Tensor? everyone, Tensor[] targets, int start, int[] dims, "
    "float margin, bool reference_ties, float min_gap, bool[] needs) -> (Tensor loss, Tensor gradient)",
    _relative_similarity_loss,
    _relative_similarity_loss_fake,
    differentiable=(0,),
)
