"""varlen_attention by torch's own flash kernels, those that scaled_dot_product_attention uses.

On CUDA the kernel takes packed sequences as they are. On the CPU it takes sequences of one length: neighbours of equal
length go through it together, so nothing is padded and no sequence meets another. Half precision is widened first
there: the kernel's backward pass would sum in it.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from leafkern.ops._core.launch import unit_columns
from leafkern.ops._core.normalize import at_least_float32
from leafkern.ops.attention import reference

_CUDA_FORWARD = torch.ops.aten._flash_attention_forward.default
_CUDA_BACKWARD = torch.ops.aten._flash_attention_backward.default
_CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def missing() -> str | None:
    """Why torch has no packed kernel for CUDA; None when it has."""
    return None if torch.backends.cuda.is_flash_attention_available() else "this build of torch has no flash attention"


def varlen_attention(
    q, k, v, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H, D) in the dtype of q and the log-sum-exp of the rows, (H, T) in at least float32."""
    by = _by_runs if q.device.type == "cpu" else _packed
    return by(q, k, v, cu_seqlens, max_seqlen, scale, left, right)


def varlen_attention_backward(
    grad, q, k, v, out, lse, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their dtypes, contiguous."""
    by = _by_runs_backward if q.device.type == "cpu" else _packed_backward
    return by(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, left, right)


def packed(
    cu_seqlens: torch.Tensor, max_seqlen: int, tokens: int, left: int, right: int
) -> tuple[torch.Tensor, int, bool, dict[str, int]]:
    """(bounds, longest, causal, window) as flash kernels of CUDA take them; causal: the window is only that."""
    # With a longest of 1 and grouped queries they expect exactly one token per sequence; one may be empty.
    longest = max(2, min(max_seqlen, tokens))
    left, right = (-1 if side >= longest - 1 else side for side in (left, right))
    window = {"window_size_left": left, "window_size_right": right}
    return cu_seqlens.to(torch.int32).contiguous(), longest, left < 0 and right == 0, window


def _packed(q, k, v, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int):
    if q.shape[0] == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    q, k, v = (unit_columns(x) for x in (q, k, v))
    bounds, longest, causal, window = packed(cu_seqlens, max_seqlen, q.shape[0], left, right)
    out, lse, *_ = _CUDA_FORWARD(
        q,
        k,
        v,
        cum_seq_q=bounds,
        cum_seq_k=bounds,
        max_q=longest,
        max_k=longest,
        dropout_p=0.0,
        is_causal=causal,
        return_debug_mask=False,
        scale=scale,
        **window,
    )
    return out.contiguous(), lse


def _packed_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int):
    if q.shape[0] == 0:
        return tuple(x.new_empty(x.shape) for x in (q, k, v))
    grad, q, k, v = (unit_columns(x) for x in (grad.to(q.dtype), q, k, v))
    bounds, longest, causal, window = packed(cu_seqlens, max_seqlen, q.shape[0], left, right)
    grads = _CUDA_BACKWARD(
        grad,
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        cum_seq_q=bounds,
        cum_seq_k=bounds,
        max_q=longest,
        max_k=longest,
        dropout_p=0.0,
        is_causal=causal,
        # State and offset of a dropout that is not there.
        rng_state=torch.zeros(2, dtype=torch.uint64, device=q.device),
        unused=torch.empty(0, device=q.device),
        scale=scale,
        **window,
    )
    return tuple(x.contiguous() for x in grads)


def _by_runs(q, k, v, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int):
    wide, outs, lses = at_least_float32(q.dtype), [], []
    for tokens, length in _runs(cu_seqlens):
        queries, keys, values = (_by_head(x[tokens], length, wide) for x in (q, k, v))
        parts = [
            _CPU_FORWARD(
                _rows(queries, rows), _rows(keys, span), _rows(values, span), 0.0, causal, attn_mask=mask, scale=scale
            )
            for rows, span, causal, mask in _blocks(length, q.shape[1], wide, left, right)
        ]
        out, lse = (_joined(x, 2) for x in zip(*parts, strict=True))
        outs.append(_by_token(out, q.dtype))
        lses.append(lse.transpose(0, 1).flatten(1))
    if not outs:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], 0, dtype=wide)
    return _joined(outs, 0), _joined(lses, 1).contiguous()


def _by_runs_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int):
    found = []
    for tokens, length in _runs(cu_seqlens):
        grads, queries, keys, values, outs = (_by_head(x[tokens], length, lse.dtype) for x in (grad, q, k, v, out))
        lses, sums = lse[:, tokens].view(len(lse), -1, length).transpose(0, 1), None
        for rows, span, causal, mask in _blocks(length, q.shape[1], lse.dtype, left, right):
            parts = _CPU_BACKWARD(
                _rows(grads, rows),
                _rows(queries, rows),
                _rows(keys, span),
                _rows(values, span),
                _rows(outs, rows),
                _rows(lses, rows),
                0.0,
                causal,
                attn_mask=mask,
                scale=scale,
            )
            if rows is None:
                sums = parts
                continue
            sums = sums or [torch.zeros_like(x) for x in (queries, keys, values)]
            for total, part, place in zip(sums, parts, (rows, span, span), strict=True):
                _rows(total, place).add_(part)
        found.append([_by_token(x, q.dtype) for x in sums])
    if not found:
        return tuple(x.new_empty(x.shape) for x in (q, k, v))
    return tuple(_joined(parts, 0) for parts in zip(*found, strict=True))


def _runs(cu_seqlens: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Tokens and length of each run of neighbouring sequences of one length; empty sequences are in none."""
    pairs = [(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist()) if start < end]
    for length, run in itertools.groupby(pairs, lambda pair: pair[1] - pair[0]):
        (start, end), *others = run
        yield slice(start, others[-1][1] if others else end), length


def _blocks(
    length: int, heads: int, dtype: torch.dtype, left: int, right: int
) -> Iterator[tuple[slice | None, slice | None, bool, torch.Tensor | None]]:
    """(rows, keys, causal, mask) of each call of the kernel for a sequence; None: all of them.

    Only a window needs more than one, for the kernel knows none: a mask of all rows would grow as the length squared.
    """
    left, right = (-1 if side >= length - 1 else side for side in (left, right))
    if left < 0 and right <= 0:
        yield None, None, right == 0, None
        return
    for rows, span, hidden in reference.row_blocks(slice(0, length), torch.empty(heads, 0, dtype=dtype), left, right):
        yield rows, span, False, torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _by_head(x: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """(n · length, H, D) -> (n, H, length, D), a view unless `dtype` or the entries of a row ask for a copy."""
    return unit_columns(x.to(dtype)).view(-1, length, *x.shape[1:]).transpose(1, 2)


def _by_token(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, H, length, D) -> (n · length, H, D), contiguous; no copy of what the kernel makes of token-major inputs."""
    return x.transpose(1, 2).flatten(0, 1).to(dtype).contiguous()


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _rows(x: torch.Tensor, part: slice | None) -> torch.Tensor:
    """Some of the rows of (n, H, length, ...)."""
    return x if part is None else x[:, :, part]
