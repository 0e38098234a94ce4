"""The contrastive losses held to their definitions, on every backend."""

import math

import torch
from compare import relative
from contrastive_cases import batch, soft_label_batch
from tolerances import TOLERANCE

from leafkern.ops import info_nce, soft_label_loss
from leafkern.ops._core.normalize import at_least_float32
from leafkern.ops.contrastive.reference import brute_info_nce, brute_soft_label_loss


def batch_on(device, rows, width=24, number=3, mixes=2, dtype=torch.float32):
    """`batch`, on a device."""
    given = batch(rows, width, number, mixes, torch.float32)
    return [None if x is None else x.detach().to(device, dtype).requires_grad_() for x in given]


def labelled_on(device, rows, number, shared, width=24, dtype=torch.float32):
    """`soft_label_batch` on a device; one score in each row is -inf where there are several."""
    *student, scores = soft_label_batch(rows, number, shared=shared, width=width, dtype=torch.float32)
    if number > 1:
        scores[torch.arange(rows), torch.randint(number, (rows,))] = -torch.inf
    return *(x.detach().to(device, dtype).requires_grad_() for x in student), scores.to(device, dtype)


def contrast(function, tensors, **options):
    queries, positives, negatives, mixed = tensors
    return function(queries, positives, negatives, mixed=mixed, **options)


def exactly(tensors):
    """In float64 on the CPU."""
    return [None if x is None else x.detach().double().cpu().requires_grad_(x.requires_grad) for x in tensors]


def hold(found, expected, tensors, exact):
    """Loss and gradients within tolerance of the definition's."""
    dtype = tensors[0].dtype
    assert found.dtype == at_least_float32(dtype)
    assert found.shape == ()
    assert relative(found.detach(), expected.detach()) <= TOLERANCE[dtype]
    pairs = [(x, y) for x, y in zip(tensors, exact, strict=True) if x is not None and x.requires_grad]
    if not pairs:
        return
    right = torch.autograd.grad(expected, [y for _, y in pairs])
    for (x, _), exact_grad in zip(pairs, right, strict=True):
        # A loss scale, as half precision is trained with, for each argument: float16 holds nothing below 6e-8.
        largest = exact_grad.abs().max().item() if exact_grad.numel() else 0.0
        scale = 2.0 ** -round(math.log2(largest)) if largest > 0 else 1.0
        (grad,) = torch.autograd.grad(found * scale, x, retain_graph=True)
        assert grad.dtype == x.dtype
        assert grad.shape == x.shape
        assert relative(grad, exact_grad * scale) <= TOLERANCE[dtype]


def hold_contrast(tensors, **options):
    exact = exactly(tensors)
    ids = options.get("ids")
    right = options if ids is None else options | {"ids": [None if x is None else x.cpu() for x in ids]}
    hold(contrast(info_nce, tensors, **options), contrast(brute_info_nce, exact, **right), tensors, exact)


def hold_labels(queries, candidates, scores, **options):
    exact = exactly((queries, candidates))
    found = soft_label_loss(queries, candidates, scores, **options)
    expected = brute_soft_label_loss(*exact, scores.double().cpu(), **options)
    hold(found, expected, (queries, candidates), exact)
