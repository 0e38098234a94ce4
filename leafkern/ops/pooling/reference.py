"""The definitions of the pooling operations in plain PyTorch, differentiable."""

import itertools

import torch

from leafkern.ops._core.norm import brute_norm
from leafkern.ops._core.normalize import at_least_float32, brute_normalize


def brute_mean_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, normalize: bool) -> torch.Tensor:
    """One sequence at a time; accumulates in at least float32."""
    wide = x.to(at_least_float32(x.dtype))
    bounds = cu_seqlens.tolist()
    rows = [wide[start:end].sum(0) / max(end - start, 1) for start, end in itertools.pairwise(bounds)]
    pooled = torch.stack(rows) if rows else wide.new_zeros(0, x.shape[1])
    return brute_normalize(pooled) if normalize else pooled


def brute_norm_mean_pool(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    eps: float,
    kind: str,
    normalize: bool,
) -> torch.Tensor:
    """The norm of every token, as its formula says, then brute_mean_pool."""
    dtype = at_least_float32(x.dtype)
    h = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    return brute_mean_pool(brute_norm(h, weight, bias, eps, kind), cu_seqlens, normalize)
