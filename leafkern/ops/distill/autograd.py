"""Registration of the distillation losses with torch.library, and the choice of what serves them."""

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose
from leafkern.ops._core.native import unavailable
from leafkern.ops._core.normalize import common_dtype
from leafkern.ops._core.registration import register_loss
from leafkern.ops.distill import native, reference


def _forms(*tensors):
    """alignment_loss, similarity_loss and distill_loss of the backend that serves these tensors."""
    dtypes = [x.dtype for x in tensors]
    backend = choose("distill", launch.candidates("distill", tensors[0].device, *dtypes, native=unavailable))
    if backend == "triton":
        from leafkern.ops.distill import kernels

        return kernels.alignment_loss, kernels.similarity_loss, kernels.distill_loss
    if backend == "native":
        return native.alignment_loss, native.similarity_loss, native.distill_loss
    return reference.lean_alignment_loss, reference.blocked_similarity_loss, reference.blocked_distill_loss


def _alignment_loss(student, teacher, weight, kind, normalize, needs):
    if weight is None:
        form, *_ = _forms(student, teacher)
        return *form(student, teacher, kind, normalize, needs[0]), student.new_empty(0)
    dtype = common_dtype(student, teacher, weight)
    student, weight = student.to(dtype), weight.to(dtype)
    output = student @ weight.T
    form, *_ = _forms(output, teacher)
    loss, gradient = form(output, teacher, kind, normalize, any(needs))
    of_student = gradient @ weight if needs[0] else gradient.new_empty(0)
    return loss, of_student, gradient.T @ student if needs[1] else gradient.new_empty(0)


def _alignment_loss_fake(student, teacher, weight, kind, normalize, needs):
    dtype = common_dtype(student, teacher, weight)
    gradients = [
        student.new_empty(x.shape if x is not None and wanted else (0,), dtype=dtype)
        for x, wanted in zip((student, weight), needs)
    ]
    return student.new_empty((), dtype=dtype), *gradients


alignment_loss = register_loss(
    "alignment_loss(Tensor student, Tensor teacher, Tensor? weight, int kind, bool normalize, bool[] needs)"
    " -> (Tensor loss, Tensor gradient, Tensor weight_gradient)",
    _alignment_loss,
    _alignment_loss_fake,
    differentiable=[0, 2],
)


def _loss_and_gradient_fake(losses):
    """Fake of an operation that returns so many losses and the student's gradient; needs come last."""

    def fake(student, everyone, targets, *rest):
        dtype = common_dtype(student, *targets)
        gradient = student.new_empty(student.shape if rest[-1][0] else (0,), dtype=dtype)
        return (*(student.new_empty((), dtype=dtype) for _ in range(losses)), gradient)

    return fake


def _similarity_loss(student, everyone, targets, *options):
    return _forms(student, *targets)[1](student, everyone, targets, *options)


def _distill_loss(student, everyone, targets, *options):
    return _forms(student, *targets)[2](student, everyone, targets, *options)


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
