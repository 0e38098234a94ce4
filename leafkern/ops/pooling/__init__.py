"""Pooling of packed token states into one vector per sequence."""

import torch

from leafkern.ops._core.checks import check_cu_seqlens, check_floating, check_same_device
from leafkern.ops._core.norm import check_norm
from leafkern.ops._core.normalize import normalize_rows
from leafkern.ops.pooling import autograd

__all__ = ["mean_pool", "norm_mean_pool"]


def mean_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """Mean over the tokens of each sequence.

    x: (T, D), any float dtype. cu_seqlens: (B+1,) int32, rising from 0 to T. Returns (B, D) in float32 (float64 for
    float64 input): half precision is accumulated, and returned, in float32. An empty sequence pools to 0.
    normalize: divide each row by max(‖row‖, 1e-12); a zero row stays zero, with gradient 0.
    Differentiable in x.
    Backends: Triton (CUDA; fp32, fp16, bf16): rows of x may lie apart, but where the entries of a row are not adjacent
    x is copied; same result every time. Reference (everything else): a non-contiguous or half-precision x is copied.
    """
    x = check_floating("x", x, ndim=2)
    check_cu_seqlens(cu_seqlens, x.shape[0])
    check_same_device(x=x, cu_seqlens=cu_seqlens)
    pooled = autograd.mean_pool(x, cu_seqlens)
    return normalize_rows(pooled) if normalize else pooled


def norm_mean_pool(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    eps: float,
    kind: str = "layer",
    normalize: bool = True,
) -> torch.Tensor:
    """The end of an encoder in one operation: norm(x + residual), mean over each sequence, unit length.

    x, residual: (T, D), any float dtype; residual may be None. weight: (D,); bias: (D,) or None. cu_seqlens: (B+1,)
    int32, rising from 0 to T. kind: "layer" (Ba et al., arXiv 1607.06450: mean and biased variance over D) or "rms"
    (Zhang and Sennrich, arXiv 1910.07467); eps is added to the variance or mean square. Returns (B, D) in float32
    (float64 for float64 input); statistics and sums are accumulated in that dtype. An empty sequence pools to 0.
    normalize: divide each row by max(‖row‖, 1e-12); a zero row stays zero, with gradient 0.
    Differentiable in x, residual, weight and bias. The normalised tokens never exist as a whole in the forward pass,
    and the backward pass computes the statistics again.
    Backends: Triton (CUDA; each argument fp32, fp16 or bf16; D up to 8192): reads x and residual once; the same layout
    rule as `mean_pool`; same result every time. Reference (everything else): PyTorch, a block of tokens at a time.
    """
    x = check_floating("x", x, ndim=2)
    eps = check_norm(x, residual, weight, bias, eps, kind)
    check_cu_seqlens(cu_seqlens, x.shape[0])
    check_same_device(x=x, residual=residual, weight=weight, bias=bias, cu_seqlens=cu_seqlens)
    pooled = autograd.norm_mean_pool(x, residual, weight, bias, cu_seqlens, eps, kind == "layer")
    return normalize_rows(pooled) if normalize else pooled
