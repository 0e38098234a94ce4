"""Registration of the contrastive losses, and forward/backward pair and registration of mixed negatives."""

import torch
import torch.nn.functional as F

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose
from leafkern.ops._core.native import unavailable
from leafkern.ops._core.normalize import common_dtype, normalize_rows, normalize_rows_backward
from leafkern.ops._core.registration import register, register_loss
from leafkern.ops.contrastive import native
from leafkern.ops.contrastive.reference import blocked_info_nce, blocked_soft_label_loss, empty_gradient


def _forms(*tensors):
    """info_nce and soft_label_loss of the backend that serves these tensors."""
    dtypes = [x.dtype for x in tensors if x is not None]
    backend = choose("contrastive", launch.candidates("contrastive", tensors[0].device, *dtypes, native=unavailable))
    if backend == "triton":
        from leafkern.ops.contrastive import kernels

        return kernels.info_nce, kernels.soft_label_loss
    if backend == "native":
        return native.info_nce, native.soft_label_loss
    return blocked_info_nce, blocked_soft_label_loss


def _loss_fake(differentiable, constants, needs):
    queries, dtype = differentiable[0], common_dtype(*differentiable, *constants)
    grads = [empty_gradient(x, wanted, queries, dtype) for x, wanted in zip(differentiable, needs, strict=True)]
    return queries.new_empty((), dtype=dtype), *grads


def _info_nce(queries, positives, negatives, mixed, *rest):
    form, _ = _forms(queries, positives, negatives, mixed)
    return form(queries, positives, negatives, mixed, *rest)


def _info_nce_fake(queries, positives, negatives, mixed, *rest):
    return _loss_fake((queries, positives, negatives, mixed), (), rest[-1])


info_nce = register_loss(
    "info_nce(Tensor queries, Tensor positives, Tensor? negatives, Tensor? mixed, Tensor? positive_ids,"
    " Tensor? negative_ids, int start, float temperature, float gamma, bool detach_focal, float? fn_margin, int[] dims,"
    " float[] dim_weights, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _info_nce,
    _info_nce_fake,
    differentiable=(0, 1, 2, 3),
)


def _soft_label_loss(queries, candidates, teacher_scores, *rest):
    _, form = _forms(queries, candidates, teacher_scores)
    return form(queries, candidates, teacher_scores, *rest)


def _soft_label_loss_fake(queries, candidates, teacher_scores, *rest):
    return _loss_fake((queries, candidates), (teacher_scores,), rest[-1])


soft_label_loss = register_loss(
    "soft_label_loss(Tensor queries, Tensor candidates, Tensor teacher_scores, int total, float temperature,"
    " float teacher_temperature, int[] dims, float[] dim_weights, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _soft_label_loss,
    _soft_label_loss_fake,
    differentiable=(0, 1),
)


def _mix_weights(queries, units, first, second, lambdas, listwise, temperature):
    """(B, n, M): how much of each unit negative goes into each mix."""
    lambdas = lambdas.to(units.dtype)[:, :, None]
    number = units.shape[1]
    pairs = lambdas * F.one_hot(first, number) + (1 - lambdas) * F.one_hot(second, number)
    scores = units @ normalize_rows(queries.to(units.dtype))[:, :, None]
    lists = torch.softmax(scores.mT / temperature, -1).expand(-1, listwise, -1)
    return torch.cat([pairs, lists], dim=1)


def _mix_negatives(queries, negatives, first, second, lambdas, listwise, temperature):
    units = normalize_rows(negatives.to(common_dtype(queries, negatives)))
    return normalize_rows(_mix_weights(queries, units, first, second, lambdas, listwise, temperature) @ units)


def _mix_negatives_fake(queries, negatives, first, second, lambdas, listwise, temperature):
    shape = (negatives.shape[0], first.shape[1] + listwise, negatives.shape[2])
    return negatives.new_empty(shape, dtype=common_dtype(queries, negatives))


def _mix_negatives_context(ctx, inputs, output):
    *tensors, ctx.listwise, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _mix_negatives_backward(ctx, grad):
    queries, negatives, first, second, lambdas = ctx.saved_tensors
    wide = negatives.to(common_dtype(queries, negatives))
    units = normalize_rows(wide)
    weights = _mix_weights(queries, units, first, second, lambdas, ctx.listwise, ctx.temperature)
    by_units = weights.mT @ normalize_rows_backward(grad, weights @ units)
    return None, normalize_rows_backward(by_units, wide).to(negatives.dtype), None, None, None, None, None


mix_negatives = register(
    "mix_negatives(Tensor queries, Tensor negatives, Tensor first, Tensor second, Tensor lambdas, int listwise,"
    " float temperature) -> Tensor",
    _mix_negatives,
    _mix_negatives_fake,
    setup_context=_mix_negatives_context,
    backward=_mix_negatives_backward,
)
