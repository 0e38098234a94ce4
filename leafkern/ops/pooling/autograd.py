"""Forward/backward pairs of the pooling operations and their registration with torch.library.

The backend is chosen inside the implementations, forward and backward alike: torch.compile sees one opaque call each.
"""

import torch

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose
from leafkern.ops._core.norm import norm_backward, norm_forward, summed_dtype
from leafkern.ops._core.normalize import at_least_float32
from leafkern.ops._core.registration import register

# The widest row that the kernels of norm_mean_pool hold in registers; kernels.py can't be asked without triton.
WIDEST_NORM = 8192


def _backend(x: torch.Tensor, *dtypes: torch.dtype) -> str:
    return choose("pooling", launch.candidates("pooling", x.device, *dtypes))


def _norm_backend(x: torch.Tensor, *others: torch.Tensor | None) -> str:
    dtypes = [tensor.dtype for tensor in (x, *others) if tensor is not None]
    candidates, width = launch.candidates("pooling", x.device, *dtypes), x.shape[1]
    if width > WIDEST_NORM and "triton" in candidates:
        candidates["triton"] = candidates["triton"] or f"D = {width}; its kernel takes at most {WIDEST_NORM}"
    return choose("pooling", candidates)


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
    if _backend(x, x.dtype) == "triton":
        from leafkern.ops.pooling import kernels

        return kernels.mean_pool(x, cu_seqlens)
    return segment_sum(x, cu_seqlens) / lengths_of(cu_seqlens)


def _mean_pool_fake(x, cu_seqlens):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=at_least_float32(x.dtype))


def _mean_pool_context(ctx, inputs, output):
    x, cu_seqlens = inputs
    ctx.tokens, ctx.dtype = x.shape[0], x.dtype
    ctx.save_for_backward(cu_seqlens)


def _mean_pool_grad(grad, cu_seqlens, tokens, dtype):
    if _backend(grad, grad.dtype, dtype) == "triton":
        from leafkern.ops.pooling import kernels

        return kernels.mean_pool_backward(grad, cu_seqlens, tokens, dtype)
    share = (grad / lengths_of(cu_seqlens)).to(dtype)
    return share.index_select(0, sequence_of(cu_seqlens, tokens))


def _mean_pool_grad_fake(grad, cu_seqlens, tokens, dtype):
    return grad.new_empty(tokens, grad.shape[1], dtype=dtype)


register(
    "mean_pool_backward(Tensor grad, Tensor cu_seqlens, SymInt tokens, ScalarType dtype) -> Tensor",
    _mean_pool_grad,
    _mean_pool_grad_fake,
)


def _mean_pool_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    # Through the dispatcher, in eager mode too: whatever traces a backward pass must meet one opaque call.
    return torch.ops.leafkern.mean_pool_backward(grad, cu_seqlens, ctx.tokens, ctx.dtype), None


mean_pool = register(
    "mean_pool(Tensor x, Tensor cu_seqlens) -> Tensor",
    _mean_pool,
    _mean_pool_fake,
    setup_context=_mean_pool_context,
    backward=_mean_pool_backward,
)


# Tokens normalised at a time: the normalised (T, D) states never exist as a whole. A GPU needs more work per launch.
_BLOCK = {"cpu": 1024, "cuda": 65536}


def _summed(x, residual):
    """x + residual in at least float32."""
    dtype = at_least_float32(x.dtype)
    return x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)


def _norm_mean_pool(x, residual, weight, bias, cu_seqlens, eps, layer):
    if _norm_backend(x, residual, weight, bias) == "triton":
        from leafkern.ops.pooling import kernels

        return kernels.norm_mean_pool(x, residual, weight, bias, cu_seqlens, eps, layer)
    tokens, dtype = x.shape[0], at_least_float32(x.dtype)
    total = torch.zeros(cu_seqlens.numel() - 1, x.shape[1], device=x.device, dtype=dtype)
    size = _BLOCK.get(x.device.type, 65536)
    for start in range(0, tokens, size):
        block = slice(start, start + size)
        h = _summed(x[block], None if residual is None else residual[block])
        y, _ = norm_forward(h, weight, bias, eps, layer)
        total += segment_sum(y, cu_seqlens.sub(start).clamp(0, y.shape[0]))
    return total / lengths_of(cu_seqlens)


def _norm_mean_pool_fake(x, residual, weight, bias, cu_seqlens, eps, layer):
    return _mean_pool_fake(x, cu_seqlens)


def _norm_mean_pool_context(ctx, inputs, output):
    x, residual, weight, bias, cu_seqlens, ctx.eps, ctx.layer = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, residual, weight, cu_seqlens)


def _norm_mean_pool_grad(grad, x, residual, weight, cu_seqlens, eps, layer):
    """Gradients of x + residual, in the wider dtype of the two, and of weight and bias, in the dtype of `grad`."""
    if _norm_backend(x, residual, weight) == "triton":
        from leafkern.ops.pooling import kernels

        return kernels.norm_mean_pool_backward(grad, x, residual, weight, cu_seqlens, eps, layer)
    share = (grad / lengths_of(cu_seqlens)).index_select(0, sequence_of(cu_seqlens, x.shape[0]))
    h = _summed(x, residual)
    _, statistics = norm_forward(h, weight, None, eps, layer)
    dx, dweight, dbias = norm_backward(share, h, statistics, weight, layer)
    return dx.to(summed_dtype(x, residual)), dweight, dbias


def _norm_mean_pool_grad_fake(grad, x, residual, weight, cu_seqlens, eps, layer):
    dx = torch.empty(x.shape, device=x.device, dtype=summed_dtype(x, residual))
    return dx, grad.new_empty(weight.shape), grad.new_empty(weight.shape)


register(
    "norm_mean_pool_backward(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor cu_seqlens, float eps,"
    " bool layer) -> (Tensor, Tensor, Tensor)",
    _norm_mean_pool_grad,
    _norm_mean_pool_grad_fake,
)


def _norm_mean_pool_backward(ctx, grad):
    x, residual, weight, cu_seqlens = ctx.saved_tensors
    arguments = grad, x, residual, weight, cu_seqlens, ctx.eps, ctx.layer
    dx, dweight, dbias = torch.ops.leafkern.norm_mean_pool_backward(*arguments)
    return (
        dx.to(x.dtype),
        None if residual is None else dx.to(residual.dtype),
        dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
        None,
    )


norm_mean_pool = register(
    "norm_mean_pool(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor cu_seqlens, float eps, bool layer)"
    " -> Tensor",
    _norm_mean_pool,
    _norm_mean_pool_fake,
    setup_context=_norm_mean_pool_context,
    backward=_norm_mean_pool_backward,
)
