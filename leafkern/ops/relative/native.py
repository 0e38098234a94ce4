"""Relative similarity scores by the compiled kernels of `leafkern._C`: sorts and counts, exact, float and double."""

import torch

from leafkern.ops._core.native import library, unavailable


def unsuited(student_scores: torch.Tensor) -> str | None:
    """Why the kernels can't serve this call; None when they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    module, _ = library()
    if student_scores.shape[-1] > module.MAX_BATCH:
        return f"B = {student_scores.shape[-1]}, above {module.MAX_BATCH} (B*B must stay below 2^31)"
    return None


def relative_scores(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    margin: float,
    reference_ties: bool,
    min_gap: float,
    with_gradient: bool,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `autograd.relative_scores`, for 3 <= B <= MAX_BATCH on CPU; `threads`: torch's. Strided scores are copied."""
    module, _ = library()
    student_scores, teacher_scores = student_scores.contiguous(), teacher_scores.contiguous()
    widths, batch, _ = student_scores.shape
    gradient = torch.empty_like(student_scores) if with_gradient else student_scores.new_empty(0)
    loss = torch.empty(widths, dtype=torch.float64, device="cpu")
    sizes = (student_scores.dtype == torch.float64, batch, widths, threads or torch.get_num_threads())
    workspace = torch.empty(module.relative_workspace(*sizes), dtype=torch.uint8, device="cpu")
    tensors = (student_scores, teacher_scores, loss)
    pointers = [x.data_ptr() for x in tensors] + [gradient.data_ptr() if with_gradient else 0, workspace.data_ptr()]
    module.relative(*sizes, margin, min_gap, reference_ties, *pointers, workspace.numel())
    return loss.to(student_scores.dtype), gradient
