"""Forward and backward operations of attention and their registration with torch.library.

The forward operations also return lse, (H, T) in at least float32: the natural logarithm of the sum of exp(score) over
the keys that a row sees, from which the backward operations recompute the weights. It is not differentiable.
"""

import importlib

import torch

from leafkern.ops._core.normalize import at_least_float32
from leafkern.ops._core.registration import register
from leafkern.ops.attention import choice, reference

# The module of each backend but the reference; kernels.py can't be imported without triton.
_MODULES = {"triton": "kernels", "flash": "flash", "sdpa": "sdpa"}


def _module(backend: str):
    return importlib.import_module(f"leafkern.ops.attention.{_MODULES[backend]}")


def _varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, causal, left, right):
    right = 0 if causal else right
    backend = choice.varlen_attention(q, scale)
    if backend == "reference":
        return reference.blocked_attention(q, k, v, cu_seqlens, scale, left, right)
    return _module(backend).varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, left, right)


def _varlen_attention_fake(q, k, v, cu_seqlens, max_seqlen, scale, causal, left, right):
    return q.new_empty(q.shape), _lse_fake(q)


def _lse_fake(q):
    return q.new_empty(q.shape[1], q.shape[0], dtype=at_least_float32(q.dtype))


def _varlen_attention_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _varlen_attention_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    # Always the registered operation, not its implementation: torch.compile traces this.
    grads = torch.ops.leafkern.varlen_attention_backward.default(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * 6


varlen_attention = register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float scale, bool causal,"
    " int left, int right) -> (Tensor out, Tensor lse)",
    _varlen_attention,
    _varlen_attention_fake,
    setup_context=_varlen_attention_context,
    backward=_varlen_attention_backward,
)


def _varlen_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, causal, left, right):
    right = 0 if causal else right
    backend = choice.varlen_attention(q, scale)
    if backend == "reference":
        return reference.blocked_attention_backward(grad, q, k, v, out, lse, cu_seqlens, scale, left, right)
    arguments = (grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, left, right)
    return _module(backend).varlen_attention_backward(*arguments)


def _varlen_backward_fake(grad, q, k, v, *_):
    return _qkv_fake(q, k, v)


def _qkv_fake(q, k, v):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_nothing(ctx, inputs, output):
    pass


def _refuse(ctx, *_):
    raise RuntimeError("leafkern's attention is differentiable only once")


register(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens,"
    " int max_seqlen, float scale, bool causal, int left, int right) -> (Tensor dq, Tensor dk, Tensor dv)",
    _varlen_backward,
    _varlen_backward_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)


def _attention_mean_pool(q, k, v, cu_seqlens, max_seqlen, scale):
    if choice.attention_mean_pool(q) == "triton":
        return _module("triton").attention_mean_pool(q, k, v, cu_seqlens, max_seqlen, scale)
    return reference.blocked_attention_mean_pool(q, k, v, cu_seqlens, scale)


def _attention_mean_pool_fake(q, k, v, cu_seqlens, max_seqlen, scale):
    pooled = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], dtype=at_least_float32(q.dtype))
    return pooled, _lse_fake(q)


def _attention_mean_pool_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.options = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, lse, cu_seqlens)


def _attention_mean_pool_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    grads = torch.ops.leafkern.attention_mean_pool_backward.default(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * 3


attention_mean_pool = register(
    "attention_mean_pool(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float scale)"
    " -> (Tensor pooled, Tensor lse)",
    _attention_mean_pool,
    _attention_mean_pool_fake,
    setup_context=_attention_mean_pool_context,
    backward=_attention_mean_pool_backward,
)


def _mean_pool_backward(grad, q, k, v, lse, cu_seqlens, max_seqlen, scale):
    if choice.attention_mean_pool(q) == "triton":
        return _module("triton").attention_mean_pool_backward(grad, q, k, v, lse, cu_seqlens, max_seqlen, scale)
    return reference.blocked_attention_mean_pool_backward(grad, q, k, v, lse, cu_seqlens, scale)


def _mean_pool_backward_fake(grad, q, k, v, *_):
    return _qkv_fake(q, k, v)


register(
    "attention_mean_pool_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor cu_seqlens,"
    " int max_seqlen, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    _mean_pool_backward,
    _mean_pool_backward_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
