"""Registration of the distillation losses with torch.library; forward/backward pair of the alignment loss."""

import torch

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose
from leafkern.ops._core.normalize import common_dtype, normalize_rows, normalize_rows_backward
from leafkern.ops._core.registration import register, register_loss
from leafkern.ops.distill import native
from leafkern.ops.distill.reference import KINDS, blocked_distill_loss, blocked_similarity_loss

_L2SQ, _L2, _MSE, _COSINE = (KINDS.index(kind) for kind in ("l2sq", "l2", "mse", "cosine"))


def _wide(student, teacher):
    dtype = common_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def _alignment_loss(student, teacher, kind):
    s, t = _wide(student, teacher)
    rows = max(s.shape[0], 1)
    if kind == _COSINE:
        return (1 - (normalize_rows(s) * normalize_rows(t)).sum(-1)).sum() / rows
    if kind == _L2:
        return torch.linalg.vector_norm(s - t, dim=-1).sum() / rows
    return (s - t).square().sum() / (max(s.numel(), 1) if kind == _MSE else rows)


def _alignment_loss_fake(student, teacher, kind):
    dtype = common_dtype(student, teacher)
    return student.new_empty((), dtype=dtype)


def _alignment_loss_context(ctx, inputs, output):
    student, teacher, ctx.kind = inputs
    ctx.save_for_backward(student, teacher)


def _alignment_loss_backward(ctx, grad):
    student, teacher = ctx.saved_tensors
    s, t = _wide(student, teacher)
    rows = max(s.shape[0], 1)
    if ctx.kind == _COSINE:
        direction = normalize_rows_backward(-normalize_rows(t), s) / rows
    elif ctx.kind == _L2:
        norm = torch.linalg.vector_norm(s - t, dim=-1, keepdim=True)
        direction = (s - t) / torch.where(norm == 0, torch.inf, norm) / rows
    else:
        direction = (s - t) * (2 / (max(s.numel(), 1) if ctx.kind == _MSE else rows))
    return (grad * direction).to(student.dtype), None, None


alignment_loss = register(
    "alignment_loss(Tensor student, Tensor teacher, int kind) -> Tensor",
    _alignment_loss,
    _alignment_loss_fake,
    setup_context=_alignment_loss_context,
    backward=_alignment_loss_backward,
)


def _loss_and_gradient_fake(losses):
    """Fake of an operation that returns so many losses and the student's gradient; needs come last."""

    def fake(student, everyone, targets, *rest):
        dtype = common_dtype(student, *targets)
        gradient = student.new_empty(student.shape if rest[-1][0] else (0,), dtype=dtype)
        return (*(student.new_empty((), dtype=dtype) for _ in range(losses)), gradient)

    return fake


def _similarity_loss(*arguments):
    return _forms(*arguments)[0](*arguments)


def _distill_loss(*arguments):
    return _forms(*arguments)[1](*arguments)


def _forms(student, everyone, targets, *_):
    """similarity_loss and distill_loss of the backend that serves these tensors."""
    dtypes = student.dtype, *(target.dtype for target in targets)
    backend = choose("distill", launch.candidates("distill", student.device, *dtypes, native=native.unsuited))
    if backend == "triton":
        from leafkern.ops.distill import kernels

        return kernels.similarity_loss, kernels.distill_loss
    if backend == "native":
        return native.similarity_loss, native.distill_loss
    return blocked_similarity_loss, blocked_distill_loss


similarity_loss = register_loss(
    "similarity_loss(Tensor student, Tensor? everyone, Tensor[] targets, int start, int[] dims, bool[] needs)"
    " -> (Tensor loss, Tensor gradient)",
    _similarity_loss,
    _loss_and_gradient_fake(1),
    differentiable=[0],
)

distill_loss = register_loss(
    "distill_loss(Tensor student, Tensor? everyone, Tensor[] targets, int start, int[] dims, float[] weights,"
    " float margin, bool reference_ties, float min_gap, bool[] needs)"
    " -> (Tensor total, Tensor cosine, Tensor similarity, Tensor relative, Tensor gradient)",
    _distill_loss,
    _loss_and_gradient_fake(4),
    differentiable=[0],
)
