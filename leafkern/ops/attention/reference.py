"""The definitions of the attention operations in plain PyTorch, and the blocked forms that serve without a kernel.

The blocked forms take one sequence at a time and, of a long one, a block of query rows at a time. With P the weights of
a head, S = scale · q kᵀ its scores and delta_i = sum_j P_ij dP_ij, the gradient of the scores is
dS_ij = P_ij (dP_ij - delta_i); from it dq = scale · dS k and dk = scale · dSᵀ q.
"""

import itertools
import math
from collections.abc import Iterator

import torch

from leafkern.ops._core.normalize import at_least_float32


def brute_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
) -> torch.Tensor:
    """One sequence and one head at a time, (T, H, D) in at least float32; differentiable."""
    dtype, (left, right) = at_least_float32(q.dtype), window
    q, k, v = (x.to(dtype) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    parts = [q[:0]]
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        if causal:
            seen &= ahead <= 0
        heads = []
        for h in range(q.shape[1]):
            scores = scale * q[start:end, h] @ k[start:end, h // group].T
            weights = scores.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1)
            heads.append(weights @ v[start:end, h // group])
        parts.append(torch.stack(heads, 1))
    return torch.cat(parts)


def brute_attention_mean_pool(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The mean of brute_attention over each sequence, (B, H, D) in at least float32; differentiable."""
    out = brute_attention(q, k, v, cu_seqlens, scale, False, (-1, -1))
    bounds = cu_seqlens.tolist()
    rows = [out[start:end].sum(0) / max(end - start, 1) for start, end in itertools.pairwise(bounds)]
    return torch.stack(rows) if rows else out[:0]


# Of one block of scores, all heads; a few of that size exist at once. A GPU needs more work per launch.
_BLOCK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def blocked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H, D) in the dtype of q, and the log-sum-exp of its rows, (H, T) in at least float32."""
    dtype, heads, kv_heads = at_least_float32(q.dtype), q.shape[1], k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, q.shape[0], dtype=dtype)
    for _, tokens in _sequences(cu_seqlens):
        keys, values = (_by_kv_head(x[tokens], kv_heads, dtype) for x in (k, v))
        for rows, span, hidden in row_blocks(tokens, lse, left, right):
            queries = _by_kv_head(q[rows], kv_heads, dtype) * scale
            weights, row_lse = _softmax(_scores(queries, keys[:, span], hidden))
            out[rows] = _by_token(weights @ values[:, span], heads)
            lse[:, rows] = row_lse.view(heads, -1)
    return out, lse


def blocked_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    left: int,
    right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v for `grad` (T, H, D), that of the output; dP_ij = grad_i · v_j, delta_i = grad_i · out_i.

    They are summed in at least float32 and returned in the dtypes of q, k and v. delta_i carries the rounding of `out`.
    """
    dtype, heads, kv_heads = lse.dtype, q.shape[1], k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for _, tokens in _sequences(cu_seqlens):
        keys, values = (_by_kv_head(x[tokens], kv_heads, dtype) for x in (k, v))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, span, hidden in row_blocks(tokens, lse, left, right):
            queries, gradient, result = (_by_kv_head(x[rows], kv_heads, dtype) for x in (q, grad, out))
            queries = queries * scale
            weights = _weights(queries, keys[:, span], hidden, lse[:, rows])
            dvalues[:, span] += weights.mT @ gradient
            delta = (gradient * result).sum(-1, keepdim=True)
            dscores = (gradient @ values[:, span].mT).sub_(delta).mul_(weights)
            dq[rows] = _by_token(dscores @ keys[:, span], heads) * scale
            dkeys[:, span] += dscores.mT @ queries
        dk[tokens], dv[tokens] = dkeys.transpose(0, 1), dvalues.transpose(0, 1)
    return dq, dk, dv


def blocked_attention_mean_pool(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, D) and the log-sum-exp of the rows, (H, T), both in at least float32."""
    dtype, heads, kv_heads = at_least_float32(q.dtype), q.shape[1], k.shape[1]
    pooled = q.new_zeros(cu_seqlens.numel() - 1, *q.shape[1:], dtype=dtype)
    lse = q.new_empty(heads, q.shape[0], dtype=dtype)
    for number, tokens in _sequences(cu_seqlens):
        length = tokens.stop - tokens.start
        keys, values = (_by_kv_head(x[tokens], kv_heads, dtype) for x in (k, v))
        columns = lse.new_zeros(heads, length)
        for rows, _, _ in row_blocks(tokens, lse):
            queries = _by_kv_head(q[rows], kv_heads, dtype) * scale
            weights, row_lse = _softmax(_scores(queries, keys))
            columns += weights.view(heads, -1, length).sum(1)
            lse[:, rows] = row_lse.view(heads, -1)
        pooled[number] = (columns.div_(length).view(kv_heads, -1, length) @ values).view(heads, -1)
    return pooled, lse


def blocked_attention_mean_pool_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v for `grad` (B, H, D), that of the pooled rows.

    Every row i of a sequence of L tokens receives the same g / L: dP_ij = u_j = v_j · g / L does not depend on i,
    dv_j = g · mean_i P_ij, and delta_i = sum_j P_ij u_j.
    """
    dtype, heads, kv_heads = lse.dtype, q.shape[1], k.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for number, tokens in _sequences(cu_seqlens):
        length = tokens.stop - tokens.start
        keys, values = (_by_kv_head(x[tokens], kv_heads, dtype) for x in (k, v))
        gradient = grad[number].to(dtype).reshape(kv_heads, -1, grad.shape[2]) / length  # [H_kv, H/H_kv, D]
        u = (gradient @ values.mT).view(heads, 1, length)
        columns, dkeys = lse.new_zeros(heads, length), torch.zeros_like(keys)
        for rows, _, _ in row_blocks(tokens, lse):
            queries = _by_kv_head(q[rows], kv_heads, dtype) * scale
            weights = _weights(queries, keys, None, lse[:, rows]).view(heads, -1, length)
            columns += weights.sum(1)
            # A row's recomputed weights add up to 1 only within the rounding of its lse, large for large scores.
            delta = (weights @ u.mT).div_(weights.sum(-1, keepdim=True))
            dscores = (u - delta).mul_(weights).view(kv_heads, -1, length)
            dq[rows] = _by_token(dscores @ keys, heads) * scale
            dkeys += dscores.mT @ queries
        dk[tokens] = dkeys.transpose(0, 1)
        dv[tokens] = (columns.view(kv_heads, -1, length).mT @ gradient).transpose(0, 1)
    return dq, dk, dv


def _sequences(cu_seqlens: torch.Tensor) -> list[tuple[int, slice]]:
    """Number and tokens of each sequence that is not empty."""
    pairs = itertools.pairwise(cu_seqlens.tolist())
    return [(number, slice(start, end)) for number, (start, end) in enumerate(pairs) if start < end]


def row_blocks(
    tokens: slice, lse: torch.Tensor, left: int = -1, right: int = -1
) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Blocks of query rows of one sequence: rows of the packed batch, keys that any of them sees, and which not.

    The keys count from the sequence's start; the mask (rows, keys) is True where a row does not see a key, None if each
    sees all. Sizes depend on nothing but the sequence itself, so its result does not depend on its neighbours.
    """
    length = tokens.stop - tokens.start
    left, right = (length if side < 0 else min(side, length) for side in (left, right))
    reach, cells = left + right, _BLOCK_BYTES.get(lse.device.type, 256 << 20) // (lse.shape[0] * lse.element_size())
    # A block of r rows sees at most L keys, and at most r + reach: the largest r that keeps either within `cells`.
    size = max(1, cells // length, (math.isqrt(reach**2 + 4 * cells) - reach) // 2)
    for first in range(0, length, size):
        end = min(first + size, length)
        span = slice(max(first - left, 0), min(end + right, length))
        hidden = None
        if min(left, right) < length - 1:
            row = torch.arange(first, end, device=lse.device)[:, None]
            ahead = torch.arange(span.start, span.stop, device=lse.device) - row
            hidden = (ahead < -left) | (ahead > right)
        yield slice(tokens.start + first, tokens.start + end), span, hidden


def _by_kv_head(x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(n, H, D) -> (H_kv, H/H_kv · n, D) in `dtype`: all queries of one kv head are rows of one matrix."""
    x = x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return x.to(dtype, memory_format=torch.contiguous_format).reshape(kv_heads, -1, x.shape[3])


def _by_token(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(H_kv, H/H_kv · n, D) -> (n, H, D), the way back."""
    return x.view(heads, -1, x.shape[2]).transpose(0, 1)


def _scores(queries: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """(H_kv, H/H_kv · rows, keys): products, -inf where hidden."""
    scores = queries @ keys.mT
    if hidden is not None:
        scores.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, -torch.inf)
    return scores


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in the memory of the scores, and the log-sum-exp of each row."""
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total), top + total.log()


def _weights(queries: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor | None, lse: torch.Tensor) -> torch.Tensor:
    """The weights again, from the rows' log-sum-exp (H, rows)."""
    scores = _scores(queries, keys, hidden)
    return scores.sub_(lse.reshape(*scores.shape[:2], 1)).exp_()
