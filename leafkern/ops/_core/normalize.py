"""L2 normalisation of rows as every operation defines it."""

import torch


def normalize_rows(x: torch.Tensor) -> torch.Tensor:
    """n(x) = x / max(‖x‖, 1e-12) along the last dimension; n(0) = 0 with gradient 0; differentiable."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Dividing by infinity gives a zero row, and a zero gradient, where plain clamping would give a gradient of 1e12.
    return x / torch.where(norm == 0, torch.inf, norm.clamp(min=1e-12))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32 for half precision, otherwise `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)


def normalize_rows_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient with respect to x of normalize_rows, given that with respect to its result."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.where(norm == 0, torch.inf, norm.clamp(min=1e-12))
    unit = x / scale
    # Below the clamp n(x) = x / 1e-12 is linear: nothing is projected out.
    along = torch.where(norm >= 1e-12, (grad * unit).sum(-1, keepdim=True), 0.0)
    return (grad - along * unit) / scale


def common_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """What to compute in: the tensors' common dtype, at least float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    return dtype


def brute_normalize(x: torch.Tensor) -> torch.Tensor:
    """The definition of n(x) along the last dimension, for tests: by autograd, with n(0) = 0 and gradient 0 there."""
    square = x.square().sum(-1, keepdim=True)
    alive = square > 0
    return torch.where(alive, x / torch.where(alive, square, 1.0).sqrt().clamp(min=1e-12), 0.0)
