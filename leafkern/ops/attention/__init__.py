"""Attention within each sequence of a packed batch."""

import torch

from leafkern.errors import InputError
from leafkern.ops._core.checks import (
    check_cu_seqlens,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    values_checked,
)
from leafkern.ops.attention import autograd

__all__ = ["attention_mean_pool", "varlen_attention"]


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Softmax attention of each token to the tokens of its own sequence (Vaswani et al., arXiv 1706.03762).

    For query head h, kv head c = h // (H / H_kv) (grouped queries, arXiv 2305.13245) and tokens i, j of one sequence:
    out_ih = sum_j P_ij v_jc, P_i = softmax over the j that i sees of scale · q_ih · k_jc.

    q: (T, H, D), any float dtype, any D >= 1. k, v: (T, H_kv, D) of the same dtype, H a multiple of H_kv. cu_seqlens:
    (B+1,) int32 (int64 is taken too), rising from 0 to T; sequences may be empty. max_seqlen: at least the length of
    the longest sequence; kernels size their grid by it, so that cu_seqlens need not come to the host. scale: a finite
    number, or None for D^-0.5. window: (left, right) in tokens; i sees i - left <= j <= i + right, -1 means no limit
    (arXiv 2004.05150). causal: i sees no later token, as if right were 0.

    Returns (T, H, D), contiguous, in the dtype of q; scores, softmax and sums are in at least float32, autocast or not.
    Differentiable once in q, k and v: the backward pass keeps the log-sum-exp of each row, recomputes the weights from
    it and takes sum_j P_ij dP_ij as dO_i · O_i (Dao et al., arXiv 2205.14135). NaN stays in its sequence.

    q, k and v may be views, such as slices of one packed tensor. Backends:
    - Triton (CUDA; fp32, fp16, bf16; D a multiple of 8 up to 128) reads views in place, or copies them where the
      entries of a row are not adjacent or another stride is no multiple of 8, and never waits for the host. Its blocks,
      which follow from D, dtype, max_seqlen and the mean length, show within rounding; float32 is multiplied as
      float32, or as tf32 where torch.backends.cuda.matmul allows it. With LEAFKERN_AUTOTUNE=1 the first call of each
      class of shapes times several blocks, which waits for the host, and the fastest serve the process from then on;
      not while a graph is captured.
    - flash (CUDA; fp16, bf16; D a multiple of 8 up to 192; scale > 0): the package flash-attn, 2.8 or later; and sdpa
      (the same): torch's own packed flash kernel. From D = 96 on they come before Triton: a rule by reasoning, not
      measured yet. Their backward pass is deterministic where torch.use_deterministic_algorithms(True) asks for it;
      every other one always is.
    - sdpa (CPU; any dtype and D): torch's flash kernel on neighbours of equal length together, without padding. A row
      of q that holds NaN may come out as 0.
    - The reference copies one sequence at a time and reads cu_seqlens on the host: on CUDA it waits for the stream, and
      can't be captured in a graph. The size of its row blocks, fixed per device, shows within rounding.
    None holds a (T, T) matrix. On CPU the result for a sequence is the same bit for bit whatever stands beside it in
    the batch, though not from one backend to the other.

    Raises BackendError where LEAFKERN_BACKEND forces a backend that can't serve the call, and InputError for shapes,
    dtypes or devices that don't fit, a window below -1, a scale that is not finite and, where values are checked (CPU,
    or LEAFKERN_CHECK=1), for cu_seqlens that fall or don't run from 0 to T and for a sequence longer than max_seqlen.
    """
    scale = _checked_scale(q, k, v, cu_seqlens, max_seqlen, scale)
    left, right = _checked_window(window)
    return autograd.varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, check_flag("causal", causal), left, right)[
        0
    ]


def attention_mean_pool(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """mean_pool of varlen_attention, (B, H, D), without its (T, H, D) result.

    For a sequence of L tokens: pooled_h = sum_j c_jh v_j, c_jh = (1 / L) sum_i P_ij, the mean of column j of head h's
    weights. Each token sees its whole sequence. An empty sequence pools to 0.

    Arguments, errors, precision and host synchronisation are those of varlen_attention; the result is in at least
    float32, as mean_pool returns it. Differentiable once in q, k and v: with g the incoming gradient of a sequence and
    head, dv_j = c_j g and dP_ij = v_j · g / L. Backends: Triton; reference. Where LEAFKERN_BACKEND forces attention to
    flash or sdpa, it raises BackendError.
    """
    scale = _checked_scale(q, k, v, cu_seqlens, max_seqlen, scale)
    return autograd.attention_mean_pool(q, k, v, cu_seqlens, max_seqlen, scale)[0]


def _checked_scale(q, k, v, cu_seqlens, max_seqlen, scale) -> float:
    """The scale to use, after the checks that both operations share."""
    tokens, heads, width = check_floating("q", q, ndim=3).shape
    for name, x in (("k", k), ("v", v)):
        check_floating(name, x, ndim=3)
        if x.dtype != q.dtype:
            found, expected = (str(y.dtype).removeprefix("torch.") for y in (x, q))
            raise InputError(f"{name}: dtype {found}; expected that of q, {expected}")
    if k.shape[0] != tokens or k.shape[2] != width:
        raise InputError(f"k: shape {tuple(k.shape)}; expected (T, H_kv, D) with T = {tokens} and D = {width} as in q")
    if v.shape != k.shape:
        raise InputError(f"v: shape {tuple(v.shape)}; expected that of k, {tuple(k.shape)}")
    kv_heads = k.shape[1]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"q: {heads} heads; expected a positive multiple of the {kv_heads} heads of k and v")
    if width < 1:
        raise InputError("q: width D = 0; expected at least 1")
    check_cu_seqlens(cu_seqlens, tokens)
    check_same_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool) or max_seqlen < 0:
        raise InputError(f"max_seqlen: expected an int that is not negative, got {max_seqlen!r}")
    if cu_seqlens.numel() > 1 and values_checked(cu_seqlens):
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise InputError(f"max_seqlen: {max_seqlen}; expected at least {longest}, the longest sequence's length")
    return width**-0.5 if scale is None else check_number("scale", scale)


def _checked_window(window) -> tuple[int, int]:
    """(left, right) of the window."""
    good = isinstance(window, (tuple, list)) and len(window) == 2
    if not good or any(not isinstance(side, int) or isinstance(side, bool) or side < -1 for side in window):
        raise InputError(f"window: expected (left, right), each an int of at least -1 (no limit); got {window!r}")
    return window[0], window[1]
