"""Losses that pull a student's vectors towards a teacher's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from leafkern.errors import InputError, unknown_name
from leafkern.ops._core.checks import (
    check_dims,
    check_directions,
    check_flag,
    check_floating,
    check_number,
    check_numbers,
    check_same_device,
)
from leafkern.ops._core.ranks import loss_of_ranks, of_all_ranks, ranks_of
from leafkern.ops._core.registration import needs_gradient
from leafkern.ops._core.teachers import unit_targets
from leafkern.ops.distill import autograd
from leafkern.ops.distill.reference import KINDS
from leafkern.ops.relative import TIES

__all__ = ["KINDS", "DistillTerms", "alignment_loss", "distill_loss", "similarity_loss"]


class DistillTerms(NamedTuple):
    """What `distill_loss` returns: scalars. Only `total` has a gradient; the terms are unweighted and detached."""

    total: torch.Tensor
    cosine: torch.Tensor
    similarity: torch.Tensor
    relative: torch.Tensor


def alignment_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kind: str = "l2sq",
    normalize: bool = False,
    weight: torch.Tensor | None = None,
    gather: str = "none",
) -> torch.Tensor:
    """Distance between a student's vectors s_b and the teacher's t_b, as LEAF regresses them (arXiv 2509.12539).

    kind: "l2sq" mean_b ‖s_b − t_b‖²; "l2" mean_b ‖s_b − t_b‖; "mse" mean over all B·D entries of (s − t)²;
    "cosine" mean_b 1 − n(s_b)·n(t_b), n(x) = x / max(‖x‖, 1e-12). Only "cosine" normalises; on unit vectors
    l2sq = 2 · cosine.
    weight: (D_t, D_s), a Dense head without bias: student @ weightᵀ is compared. normalize: n(s_b) is compared, after
    the head, instead of s_b; the teacher's vectors stay as given; "cosine" is the same either way.

    student: (B, D_s), teacher: (B, D_t), D_s = D_t without a head; any float dtypes, one device. Returns a scalar in at
    least float32; computes value and gradients together, a head's through two (B, D_t) matrices: its output and
    the gradient by it. Differentiable in the student and the head, never in the teacher; finite also where s_b = t_b
    and, where s_b is normalised, for s_b = 0 (gradient 0 there).
    gather: "ranks" gives the loss of the batch of all ranks, which may hold different numbers of rows (0 too), on every
    rank, its gradient scaled for DistributedDataParallel's averaging; not under torch.compile.
    B = 0 gives 0. Raises InputError for shapes that do not fit, an unknown kind and, where values are checked (CPU, or
    LEAFKERN_CHECK=1), for a teacher row that is zero, NaN or infinite; NaN in the student propagates. Backends: Triton
    (CUDA; fp32, fp16, bf16); native (CPU; every dtype, half precision by a copy); reference.
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    student, teacher = check_floating("student", student, ndim=2), check_floating("teacher", teacher, ndim=2)
    expected = student.shape
    if weight is not None:
        check_floating("weight", weight, ndim=2)
        if weight.shape != (teacher.shape[1], student.shape[1]):
            raise InputError(
                f"weight: shape {tuple(weight.shape)}; expected (D_t, D_s) = {(teacher.shape[1], student.shape[1])}"
            )
        expected = (student.shape[0], weight.shape[0])
    if teacher.shape != expected:
        raise InputError(
            f"student, teacher: shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ; expected the same "
            "rows and width (a student of another width needs a Dense head, `weight`)"
        )
    check_same_device(student=student, teacher=teacher, weight=weight)
    check_directions("teacher", teacher)
    check_flag("normalize", normalize)
    ranks = ranks_of(gather, student=student, teacher=teacher)
    needs = needs_gradient(student, weight)
    loss = autograd.alignment_loss(student, teacher.detach(), weight, KINDS.index(kind), normalize, needs)[0]
    if ranks.world > 1:
        loss = loss * (student.shape[0] / max(ranks.total, 1))
    return loss_of_ranks(ranks, loss)


def similarity_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | Sequence[torch.Tensor],
    *,
    dims: Sequence[int] | None = None,
    teacher_weights: Sequence[float] | None = None,
    gather: str = "none",
) -> torch.Tensor:
    """Squared error of the student's cosines, as Jasper and Stella distil them (arXiv 2412.19048, similarity loss).

    Mean over the prefix widths d in dims and over all B·B entries, the diagonal included, of (s_i·s_j − t_i·t_j)²:
    s_i = n(student_i[:d]), n(x) = x / max(‖x‖, 1e-12); t_i = n(teacher_i), full width for every d. For several
    teachers t_i = n(concat_k √w_k n(teacher_k,i)): t_i·t_j is the weighted mean of the teachers' cosines.

    student: (B, D). teacher: (B, D_t) or a list of (B, D_k), of any widths. Any float dtypes, one device.
    dims: descending, unique, ≤ D; None: D alone. teacher_weights: w_k ≥ 0, not all 0; None: equal.
    gather: "ranks" gives the loss of the batch of all ranks, which may hold different numbers of rows (0 too), on every
    rank, its gradient scaled for DistributedDataParallel's averaging; each rank computes its own rows against all rows,
    nothing twice; not under torch.compile.

    Returns a scalar in at least float32; computes value and gradient together. The compiled kernels (CPU) take blocks
    of rows: 2·B²·(D + D_t) operations for the value whatever the number of widths, down to half where one process holds
    the batch, and 2·B²·D for the gradient, in 32 MiB, or what one row's B scores of every width take if that is more;
    for batches that are large against the widths D×D matrices in float64 where those cost less: 8·D·(D + D_t) bytes.
    The PyTorch fallback's operations grow with Σ dims, in two blocks of 16 MiB. All beyond copies of the inputs.
    Differentiable in the student, never in the teacher; a student row of zeros has no gradient; NaN in the student
    propagates; B = 0 gives 0. Raises InputError for wrong shapes, dims or weights and, where values are checked (CPU,
    or LEAFKERN_CHECK=1), for a teacher row that is zero, NaN or infinite.
    """
    student, targets, dims = _checked(student, teacher, dims, teacher_weights)
    ranks, everyone, targets = of_all_ranks(gather, student, targets)
    loss, _ = autograd.similarity_loss(student, everyone, targets, ranks.start, dims, needs_gradient(student))
    return loss_of_ranks(ranks, loss)


def distill_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | Sequence[torch.Tensor],
    *,
    dims: Sequence[int] | None = None,
    weights: Sequence[float] = (10.0, 200.0, 20.0),
    margin: float = 0.015,
    ties: str = "skip",
    min_gap: float = 0.0,
    teacher_weights: Sequence[float] | None = None,
    gather: str = "none",
) -> DistillTerms:
    """The loss of Jasper and Stella (arXiv 2412.19048): total = w_0 · cosine + w_1 · similarity + w_2 · relative.

    cosine: mean_b 1 − n(s_b)·t_b at full width, as alignment_loss(kind="cosine"); similarity: as similarity_loss;
    relative: as relative_similarity_loss, which defines margin, ties and min_gap. The latter two are means over the
    prefix widths in dims, of which cosine knows nothing. t_b: as in similarity_loss, for several teachers too.
    The paper's weights are (10, 200, 20). A term of weight 0 is not computed and returned as 0. Equals the weighted sum
    of the three functions; the scores of all rows are formed once for both terms that need them.

    student: (B, D). teacher: (B, D_t) or a list of (B, D_k); D = Σ D_k, unless weights[0] = 0: then any widths
    (independent heads). Any float dtypes, one device. weights: three finite numbers ≥ 0.
    gather: "ranks" gives the loss of the batch of all ranks, which may hold different numbers of rows (0 too), on every
    rank, its gradient scaled for DistributedDataParallel's averaging; not under torch.compile. Each rank computes its
    own rows' share of cosine and similarity and the gradient of its own rows; with a relative term every rank repeats
    that term's work on the whole batch: all B×B scores of teacher and student, the sorts and counts of pairs.

    Returns DistillTerms(total, cosine, similarity, relative), scalars in at least float32; the last three unweighted,
    without gradient. Memory beyond copies of the inputs: (1 + 2·len(dims)) B×B matrices and what relative needs;
    without the relative term that of similarity_loss. Differentiable in the student, never in the teacher; a
    student row of zeros has no gradient; NaN in the student propagates; B = 0 gives 0, B < 3 no relative term. Raises
    InputError as similarity_loss does, and for wrong weights, margin, ties, min_gap or widths. Backends: as
    alignment_loss; what the relative term runs on is that operation's choice.
    """
    student, targets, dims = _checked(student, teacher, dims, teacher_weights)
    weights = check_numbers("weights", weights, 3, least=0)
    width = sum(target.shape[1] for target in targets)
    if weights[0] and student.shape[1] != width:
        raise InputError(
            f"student, teacher: widths {student.shape[1]} and {width} differ; the cosine term compares the "
            "student with all teachers side by side: expected the same width, or weights[0] = 0"
        )
    if ties not in TIES:
        raise unknown_name("ties", ties, TIES)
    margin, min_gap = check_number("margin", margin, least=0), check_number("min_gap", min_gap, least=0)
    ranks, everyone, targets = of_all_ranks(gather, student, targets)
    total, *terms, _ = autograd.distill_loss(
        student,
        everyone,
        targets,
        ranks.start,
        dims,
        weights,
        margin,
        ties == "reference",
        min_gap,
        needs_gradient(student),
    )
    if ranks.world > 1:
        terms = loss_of_ranks(ranks, torch.stack(terms)).unbind()
    return DistillTerms(loss_of_ranks(ranks, total), *terms)


def _checked(student, teacher, dims, teacher_weights) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """The student, the teachers' targets and the prefix widths, once they are found to be right."""
    student = check_floating("student", student, ndim=2)
    dims = check_dims(dims, student.shape[1])
    targets = unit_targets(student, teacher, teacher_weights)
    return student, targets, dims
