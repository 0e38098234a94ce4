"""Losses that pull a student's vectors towards a teacher's."""

import torch

from leafkern.errors import InputError, unknown_name
from leafkern.ops._core.backend import choose
from leafkern.ops._core.checks import check_finite_rows, check_floating, check_nonzero_rows, check_same_device
from leafkern.ops.distill import autograd
from leafkern.ops.distill.reference import KINDS

__all__ = ["KINDS", "alignment_loss"]


def alignment_loss(student: torch.Tensor, teacher: torch.Tensor, *, kind: str = "l2sq") -> torch.Tensor:
    """Distance between a student's vectors s_b and the teacher's t_b, as LEAF regresses them (arXiv 2509.12539).

    kind: "l2sq" mean_b ‖s_b − t_b‖²; "l2" mean_b ‖s_b − t_b‖; "mse" mean over all B·D entries of (s − t)²;
    "cosine" mean_b 1 − n(s_b)·n(t_b), n(x) = x / max(‖x‖, 1e-12). Only "cosine" normalises; on unit vectors
    l2sq = 2 · cosine.

    student, teacher: (B, D), any float dtypes, one device. Returns a scalar in at least float32. Differentiable in the
    student, never in the teacher; finite also where s_b = t_b and, for "cosine", where s_b = 0 (gradient 0 there).
    B = 0 gives 0. Raises InputError for shapes that differ, an unknown kind and, where values are checked (CPU, or
    LEAFKERN_CHECK=1), for a teacher row that is zero, NaN or infinite; NaN in the student propagates.
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    student, teacher = check_floating("student", student, ndim=2), check_floating("teacher", teacher, ndim=2)
    if student.shape != teacher.shape:
        raise InputError(
            f"student, teacher: shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ; expected the same "
            "rows and width (a student of another width needs a Dense head)"
        )
    check_same_device(student=student, teacher=teacher)
    check_finite_rows("teacher", teacher)
    check_nonzero_rows("teacher", teacher)
    choose("distill", {"reference": None})
    return autograd.alignment_loss(student, teacher.detach(), KINDS.index(kind))
