"""Forward/backward pairs of the pooling operations and their registration with torch.library."""

import torch
import torch.nn.functional as F

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


# Tokens normalised at a time: the normalised (T, D) states never exist as a whole. A GPU needs more work per launch.
_BLOCK = {"cpu": 1024, "cuda": 65536}


def _normed(x, residual, weight, bias, eps, layer):
    """Norm of x + residual in at least float32."""
    dtype = at_least_float32(x.dtype)
    h = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if layer:
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    y = F.rms_norm(h, h.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def _norm_mean_pool(x, residual, weight, bias, cu_seqlens, eps, layer):
    tokens, dtype = x.shape[0], at_least_float32(x.dtype)
    total = torch.zeros(cu_seqlens.numel() - 1, x.shape[1], device=x.device, dtype=dtype)
    size = _BLOCK.get(x.device.type, 65536)
    for start in range(0, tokens, size):
        block = slice(start, start + size)
        y = _normed(x[block], None if residual is None else residual[block], weight, bias, eps, layer)
        total += segment_sum(y, cu_seqlens.sub(start).clamp(0, y.shape[0]))
    return total / lengths_of(cu_seqlens)


def _norm_mean_pool_fake(x, residual, weight, bias, cu_seqlens, eps, layer):
    return _mean_pool_fake(x, cu_seqlens)


def _norm_mean_pool_context(ctx, inputs, output):
    x, residual, weight, bias, cu_seqlens, ctx.eps, ctx.layer = inputs
    ctx.save_for_backward(x, residual, weight, bias, cu_seqlens)


def _norm_mean_pool_backward(ctx, grad):
    x, residual, weight, bias, cu_seqlens = ctx.saved_tensors
    share = (grad / lengths_of(cu_seqlens)).index_select(0, sequence_of(cu_seqlens, x.shape[0]))
    dx, dweight, dbias = _norm_backward(share, x, residual, weight, ctx.eps, ctx.layer)
    return (
        dx.to(x.dtype),
        None if residual is None else dx.to(residual.dtype),
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
        None,
    )


def _norm_backward(grad, x, residual, weight, eps, layer):
    """Gradients of the norm with respect to x + residual, weight and bias; the statistics are computed again."""
    dtype = at_least_float32(x.dtype)
    h = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    if layer:
        h = h - h.mean(-1, keepdim=True)
    inverse = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    unit = h * inverse
    inner = grad * weight.to(dtype)
    projected = inner - unit * (inner * unit).mean(-1, keepdim=True)
    if layer:
        projected = projected - inner.mean(-1, keepdim=True)
    return projected * inverse, (grad * unit).sum(0), grad.sum(0)


norm_mean_pool = register(
    "norm_mean_pool(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor cu_seqlens, float eps, bool layer)"
    " -> Tensor",
    _norm_mean_pool,
    _norm_mean_pool_fake,
    setup_context=_norm_mean_pool_context,
    backward=_norm_mean_pool_backward,
)
