"""The target that one teacher or several give (arXiv 2412.19048): n(concat_k sqrt(w_k) n(t_k))."""

from collections.abc import Sequence

import torch

from leafkern.errors import InputError
from leafkern.ops._core.checks import (
    check_finite_rows,
    check_floating,
    check_nonzero_rows,
    check_numbers,
    check_same_device,
)
from leafkern.ops._core.normalize import at_least_float32, normalize_rows
from leafkern.ops._core.registration import without_autocast


@without_autocast
def unit_target(
    student: torch.Tensor,
    teacher: torch.Tensor | Sequence[torch.Tensor],
    teacher_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """(B, sum of the teachers' widths): unit rows in at least float32, detached.

    teacher: (B, D_k) each. teacher_weights: w_k >= 0, not all 0; None: equal. So t_i . t_j is the weighted mean of
    the teachers' cosines. Raises InputError for other shapes and, where values are checked, bad teacher rows by number.
    """
    several = not isinstance(teacher, torch.Tensor)
    if several and not (isinstance(teacher, (list, tuple)) and teacher):
        raise InputError(f"teacher: expected a tensor or a list of tensors, got {type(teacher).__name__}")
    names = [f"teacher[{k}]" for k in range(len(teacher))] if several else ["teacher"]
    teachers = [check_floating(name, t, ndim=2) for name, t in zip(names, teacher if several else [teacher])]
    for name, t in zip(names, teachers):
        if t.shape[0] != student.shape[0]:
            raise InputError(f"student, {name}: {student.shape[0]} and {t.shape[0]} rows; expected the same number")
        check_same_device(student=student, **{name: t})
        check_finite_rows(name, t)
        check_nonzero_rows(name, t)
    count = len(teachers)
    weights = (
        [1.0] * count if teacher_weights is None else check_numbers("teacher_weights", teacher_weights, count, least=0)
    )
    if not any(weights):
        raise InputError("teacher_weights: all are 0; expected at least one above 0")
    units = [normalize_rows(t.detach().to(at_least_float32(t.dtype))) for t in teachers]
    if len(units) == 1:
        return units[0]
    return normalize_rows(torch.cat([weight**0.5 * unit for weight, unit in zip(weights, units)], dim=1))
