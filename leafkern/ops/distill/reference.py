"""The definition of the alignment loss in plain PyTorch, differentiable in the student."""

import torch

from leafkern.ops._core.normalize import at_least_float32

KINDS = ("l2sq", "l2", "mse", "cosine")


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


def _unit(x: torch.Tensor) -> torch.Tensor:
    """n(x) = x / max(‖x‖, 1e-12), n(0) = 0 with gradient 0."""
    square = x.square().sum()
    return x / square.sqrt().clamp(min=1e-12) if square > 0 else 0 * x
