"""The target that one teacher or several give (arXiv 2412.19048): n(concat_k sqrt(w_k) n(t_k)), part by part."""

from collections.abc import Sequence

import torch

from leafkern.errors import InputError
from leafkern.ops._core.checks import (
    check_directions,
    check_floating,
    check_numbers,
    check_same_device,
)
from leafkern.ops._core.normalize import at_least_float32
from leafkern.ops._core.registration import without_autocast


@without_autocast
def unit_targets(
    student: torch.Tensor,
    teacher: torch.Tensor | Sequence[torch.Tensor],
    teacher_weights: Sequence[float] | None = None,
) -> list[torch.Tensor]:
    """The parts of the unit rows t_i, one (B, D_k) per teacher: side by side they are the rows; detached.

    teacher: (B, D_k) each. teacher_weights: w_k >= 0, not all 0; None: equal. So t_i . t_j, the sum of the parts' dot
    products, is the weighted mean of the teachers' cosines. Each part is in its teacher's dtype, at least float32.
    Raises InputError for other shapes and, where values are checked, bad teacher rows by number.
    """
    several = not isinstance(teacher, torch.Tensor)
    if several and not (isinstance(teacher, (list, tuple)) and teacher):
        raise InputError(f"teacher: expected a tensor or a list of tensors, got {type(teacher).__name__}")
    names = [f"teacher[{k}]" for k in range(len(teacher))] if several else ["teacher"]
    teachers = [check_floating(name, t, ndim=2) for name, t in zip(names, teacher if several else [teacher])]
    wide, norms = [], []
    for name, t in zip(names, teachers):
        if t.shape[0] != student.shape[0]:
            raise InputError(f"student, {name}: {student.shape[0]} and {t.shape[0]} rows; expected the same number")
        check_same_device(student=student, **{name: t})
        wide.append(t.detach().to(at_least_float32(t.dtype)))
        norms.append(check_directions(name, wide[-1]))
    count = len(teachers)
    weights = (
        [1.0] * count if teacher_weights is None else check_numbers("teacher_weights", teacher_weights, count, least=0)
    )
    if not any(weights):
        raise InputError("teacher_weights: all are 0; expected at least one above 0")
    divisors = [_divisor(norm) for norm in norms]
    if count == 1:
        return [wide[0] / divisors[0]]
    scales = [weight**0.5 / divisor for weight, divisor in zip(weights, divisors)]
    # By the true length of the whole row: parts below the clamp of n(x) are shorter than their weights say.
    whole = _divisor(sum((norm * scale).square() for norm, scale in zip(norms, scales)).sqrt())
    return [x * (scale / whole).to(x.dtype) for x, scale in zip(wide, scales)]


def _divisor(norm: torch.Tensor) -> torch.Tensor:
    """max(norm, 1e-12), and infinity for 0: a zero row stays zero."""
    return torch.where(norm == 0, torch.inf, norm.clamp(min=1e-12))
