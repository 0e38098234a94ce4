"""Forward/backward pairs of the pooling operations and their registration with torch.library."""

import torch

from leafkern.ops._core.normalize import at_least_float32
from leafkern.ops._core.registration import register


def segment_sum(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(T, D), (B+1,) -> (B, D): sums over each sequence, in at least float32, without atomics on any device."""
    wide = x.to(at_least_float32(x.dtype))
    if x.numel() == 0:
        return wide.new_zeros(cu_seqlens.numel() - 1, x.shape[1])
    return torch.segment_reduce(wide.contiguous(), "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0)


def lengths_of(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(B, 1): the length of each sequence, an empty one counting as 1."""
    return cu_seqlens.diff().clamp(min=1)[:, None]


def sequence_of(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """(T,): the sequence of each token."""
    numbers = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(numbers, cu_seqlens.diff(), output_size=tokens)


def _mean_pool(x, cu_seqlens):
    return segment_sum(x, cu_seqlens) / lengths_of(cu_seqlens)


def _mean_pool_fake(x, cu_seqlens):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=at_least_float32(x.dtype))


def _mean_pool_context(ctx, inputs, output):
    x, cu_seqlens = inputs
    ctx.tokens, ctx.dtype = x.shape[0], x.dtype
    ctx.save_for_backward(cu_seqlens)


def _mean_pool_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    share = (grad / lengths_of(cu_seqlens)).to(ctx.dtype)
    return share.index_select(0, sequence_of(cu_seqlens, ctx.tokens)), None


mean_pool = register(
    "mean_pool(Tensor x, Tensor cu_seqlens) -> Tensor",
    _mean_pool,
    _mean_pool_fake,
    setup_context=_mean_pool_context,
    backward=_mean_pool_backward,
)
