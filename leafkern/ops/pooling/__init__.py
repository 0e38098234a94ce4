"""Pooling of packed token states into one vector per sequence."""

import torch

from leafkern.ops._core.backend import choose
from leafkern.ops._core.checks import check_cu_seqlens, check_floating, check_same_device
from leafkern.ops._core.normalize import normalize_rows
from leafkern.ops.pooling import autograd

__all__ = ["mean_pool"]


def mean_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """Mean over the tokens of each sequence.

    x: (T, D), any float dtype. cu_seqlens: (B+1,) int32, rising from 0 to T. Returns (B, D) in float32 (float64 for
    float64 input): half precision is accumulated, and returned, in float32. An empty sequence pools to 0.
    normalize: divide each row by max(‖row‖, 1e-12); a zero row stays zero, with gradient 0.
    Differentiable in x. A non-contiguous or half-precision x is copied.
    """
    x = check_floating("x", x, ndim=2)
    check_cu_seqlens(cu_seqlens, x.shape[0])
    check_same_device(x=x, cu_seqlens=cu_seqlens)
    choose("pooling", {"reference": None})
    pooled = autograd.mean_pool(x, cu_seqlens)
    return normalize_rows(pooled) if normalize else pooled
