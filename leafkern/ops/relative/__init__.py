"""The loss that keeps the order of a teacher's similarities."""

from collections.abc import Sequence

import torch

from leafkern.errors import unknown_name
from leafkern.ops._core.checks import check_dims, check_floating, check_number
from leafkern.ops._core.ranks import loss_of_ranks, of_all_ranks
from leafkern.ops._core.registration import needs_gradient
from leafkern.ops._core.teachers import unit_targets
from leafkern.ops.relative import autograd

__all__ = ["TIES", "relative_similarity_loss"]

TIES = ("skip", "reference")


def relative_similarity_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | Sequence[torch.Tensor],
    *,
    dims: Sequence[int] | None = None,
    margin: float = 0.015,
    ties: str = "skip",
    min_gap: float = 0.0,
    teacher_weights: Sequence[float] | None = None,
    gather: str = "none",
) -> torch.Tensor:
    """Jasper's relative similarity loss ("resim", arXiv 2412.19048), exact: pairs of texts in the teacher's order.

    Let p run over the P = B(B-1)/2 pairs i < j of rows, with the student's score S_p = n(s_i)·n(s_j), n(x) =
    x / max(‖x‖, 1e-12), and the teacher's T_p. The loss is the mean over all N = P(P-1)/2 pairs of pairs {a, b}, with
    T_a > T_b, of max(0, margin - (S_a - S_b)). The derivative of max(0, x) at 0 is taken as 0.

    student: (B, D); teacher: (B, D_t), or a list of such tensors with any widths; float dtypes, one device.
    With several teachers, T is the mean of their cosines, weighted by teacher_weights (>= 0, not all 0; None: equal).
    dims: prefix widths of the student, descending; the mean over them of the loss on s[:, :d]; None: D alone. The
    teacher's scores stay those of its full width, sorted once for all dims.
    margin: >= 0. ties: what T_a = T_b adds: "skip" nothing, "reference" what Jasper's code does, which takes the later
    pair in row-major order (of i, then j) for the higher. min_gap: also skip 0 < T_a - T_b <= min_gap. All three only
    choose terms: the divisor is N in every case.
    gather: "ranks" gives the loss of the global batch on every rank (torch.distributed), with gradients such that
    DistributedDataParallel's average is that of one process. What is repeated: every rank computes all scores and sorts
    all pairs; only the gradient of its own rows is its own work. Not under torch.compile.

    Returns a scalar in at least float32; scores are computed in that dtype, whatever autocast says, and compared in
    float64. Differentiable in the student, never in the teacher; the gradient is computed with the value. B < 3 gives
    0. The compiled kernels (CPU, B up to 46340) sort and count; an insertion also adds to P / 2²² vectors of counters,
    which shows beyond B of about 8192. Working memory is 44 bytes per pair, 47 at B = 8192 and 56 at 16384, for all
    dims together; scores and their gradient take 8 each (float64: 16) for every width. The Triton kernels (CUDA, the
    same B) take 12 bytes per pair for the teacher, and 48 (float64: 64) for a width or 256 MiB for several small ones.
    The PyTorch fallback takes several times that. Raises InputError for shapes, widths, an unknown name, or a margin
    or min_gap that is negative or not finite and, where values are checked (CPU, or LEAFKERN_CHECK=1), for a teacher
    row that is zero, NaN or infinite. NaN or infinity in the student makes the loss NaN; a zero row is fine.
    """
    student = check_floating("student", student, ndim=2)
    dims = check_dims(dims, student.shape[1])
    margin, min_gap = check_number("margin", margin, least=0), check_number("min_gap", min_gap, least=0)
    if ties not in TIES:
        raise unknown_name("ties", ties, TIES)
    targets = unit_targets(student, teacher, teacher_weights)
    ranks, everyone, targets = of_all_ranks(gather, student, targets)
    loss = autograd.relative_similarity_loss(
        student,
        everyone,
        targets,
        ranks.start,
        dims,
        margin,
        ties == "reference",
        min_gap,
        needs_gradient(student),
    )[0]
    return loss_of_ranks(ranks, loss, share=False)
