"""The definition of mean pooling in plain PyTorch."""

import itertools

import torch


def brute_mean_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, normalize: bool) -> torch.Tensor:
    """One sequence at a time; differentiable; accumulates in float32 or x's wider dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    bounds = cu_seqlens.tolist()
    rows = [wide[start:end].sum(0) / max(end - start, 1) for start, end in itertools.pairwise(bounds)]
    pooled = torch.stack(rows) if rows else wide.new_zeros(0, x.shape[1])
    return brute_normalize(pooled) if normalize else pooled


def brute_normalize(x: torch.Tensor) -> torch.Tensor:
    """n(x) = x / max(‖x‖, 1e-12), with n(0) = 0 and gradient 0 there."""
    square = x.square().sum(-1, keepdim=True)
    alive = square > 0
    norm = torch.where(alive, square, 1.0).sqrt().clamp(min=1e-12)
    return torch.where(alive, x / norm, 0.0)
