"""The Triton kernels of attention themselves; what they do, how they are cut and launched stands in kernels.py.

Arguments stand together by kind: tensors, strides, sizes and numbers, then what the compiler knows. A tensor that is
None leaves out the part of a kernel that needs it.
"""

import math

import triton
import triton.language as tl

from leafkern.ops.attention.exponential import exp2

# Strides reach the kernels in units of this many entries, from which the compiler knows that a row is aligned.
UNIT = 8
_UNIT = tl.constexpr(UNIT)
_LN_2 = tl.constexpr(math.log(2))
_LOG2_E = tl.constexpr(math.log2(math.e))
# Arguments whose value is no reason to compile a kernel again.
PLAIN = [f"{name}_{step}" for name in ("grad", "q", "k", "v") for step in ("token", "head")]
PLAIN += ["tokens", "sequences", "blocks", "heads", "left", "right", "width"]


@triton.jit
def _place(cu_seqlens, place, sequences, blocks, SIZE: tl.constexpr, SEARCH: tl.constexpr, FAN: tl.constexpr):
    # The sequence of a place, its first token and its length, and the first row of the block, past the end for places
    # that hold none. Row numbers count within the sequence.
    if SEARCH:
        i_sequence = place * 0
        width = i_sequence + sequences
        while width > 1:
            step = (width + FAN - 1) // FAN
            probe = i_sequence + tl.arange(0, FAN) * step
            inside = tl.arange(0, FAN) * step < width
            first = tl.load(cu_seqlens + probe, mask=inside, other=0) // SIZE + probe
            passed = tl.sum((inside & (first <= place)).to(tl.int32), 0)
            i_sequence += tl.maximum(passed - 1, 0) * step
            width = tl.minimum(step, sequences - i_sequence)
        begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
        row = (place - (begin // SIZE).to(tl.int32) - i_sequence) * SIZE
    else:
        i_sequence = place // blocks
        begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
        row = (place - i_sequence * blocks) * SIZE
    length = (tl.load(cu_seqlens + i_sequence + 1).to(tl.int64) - begin).to(tl.int32)
    return i_sequence, begin, length, row


@triton.jit
def _program(heads, HEADS: tl.constexpr):
    # The place of a program, and its heads from `first` to `last`.
    parts = tl.cdiv(heads, HEADS)
    place = tl.program_id(0) // parts
    first = (tl.program_id(0) - place * parts) * HEADS
    return place, first, tl.minimum(first + HEADS, heads)


@triton.jit
def _sequence(x, token, head, begin):
    # Where x begins for a sequence, and its strides in entries, 64 bits wide.
    token = token.to(tl.int64) * _UNIT
    return x + begin * token, token, head.to(tl.int64) * _UNIT


@triton.jit
def _load(base, stride, rows, length, columns, WIDTH: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr):
    # Rows of one head, 0 outside; CUT: some may lie past the end of the sequence.
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if CUT and WIDTH < DIM:
        return tl.load(pointers, mask=(rows < length)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif CUT:
        return tl.load(pointers, mask=(rows < length)[:, None], other=0.0)
    elif WIDTH < DIM:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(base, stride, rows, length, columns, value, WIDTH: tl.constexpr):
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _seen(queries, keys, length, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    # Numbers within the sequence, of which one is a column and the other a row.
    seen = (keys < length) & (queries >= 0)
    if LEFT:
        seen = seen & (keys >= queries - left)
    if RIGHT:
        seen = seen & (keys <= queries + right)
    return seen


@triton.jit
def _keys_seen(
    row, length, left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    # For ROWS queries from `row` on: the first key that any sees, the end of the blocks that all of them see whole, and
    # the end of the keys that any sees.
    low = row * 0
    high = length
    whole = length
    if RIGHT:
        high = tl.minimum(length, row + ROWS + right)
        whole = tl.minimum(length, row + right + 1)
    if LEFT:
        low = tl.maximum(row - left, 0)
        whole = low
    return low, low + (whole - low) // COLUMNS * COLUMNS, high


@triton.jit
def _attend_block(
    b_q, top, total, b_out, k, k_token, v, v_token, rows, key, length, left, right, log2_scale, columns,
    WIDTH: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    EDGE: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    # One step of the running softmax. EDGE: some scores may be hidden. ONE: it is the only step.
    keys = key + tl.arange(0, COLUMNS)
    b_k = _load(k, k_token, keys, length, columns, WIDTH, DIM, EDGE)
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [ROWS, COLUMNS]
    if EDGE:
        seen = _seen(rows[:, None], keys[None, :], length, left, right, LEFT, RIGHT)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.max(scores, 1) * log2_scale
    if not ONE:
        new_top = tl.maximum(top, new_top)
    shift = new_top
    if LEFT:
        # A row may have seen no key yet; elsewhere the first block has one for each.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = exp2(scores * log2_scale - shift[:, None], SHARE)
    new_total = tl.sum(weights, 1)
    if not ONE:
        fade = tl.exp2(top - shift)
        new_total += total * fade
        b_out *= fade[:, None]
    if v is not None:
        b_v = _load(v, v_token, keys, length, columns, WIDTH, DIM, EDGE)
        b_out = tl.dot(weights.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
    return new_top, new_total, b_out


@triton.jit(do_not_specialize=PLAIN)
def attend_kernel(
    q, k, v, cu_seqlens, out, lse, q_token, q_head, k_token, k_head, v_token, v_head, tokens, sequences, blocks,
    heads, left, right, log2_scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ONE: tl.constexpr, NEGATE: tl.constexpr,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    # Without v and out: the log-sum-exp alone.
    place, first, last = _program(heads, HEADS)
    _, begin, length, row = _place(cu_seqlens, place, sequences, blocks, ROWS, SEARCH, FAN)
    if row >= length:
        return
    q, q_token, q_head = _sequence(q, q_token, q_head, begin)
    k, k_token, k_head = _sequence(k, k_token, k_head, begin)
    if v is not None:
        v, v_token, v_head = _sequence(v, v_token, v_head, begin)
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    low, whole, high = _keys_seen(row, length, left, right, ROWS, COLUMNS, LEFT, RIGHT)
    for i_head in range(first, last):
        i_kv = i_head // GROUP
        b_q = _load(q + i_head * q_head, q_token, rows, length, columns, WIDTH, DIM, True)
        if NEGATE:
            b_q = -b_q
        o_k = k + i_kv * k_head
        o_v = None
        if v is not None:
            o_v = v + i_kv * v_head
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        b_out = tl.zeros([ROWS, DIM], tl.float32)
        if not ONE and not LEFT:
            for key in range(low, whole, COLUMNS):
                top, total, b_out = _attend_block(
                    b_q, top, total, b_out, o_k, k_token, o_v, v_token, rows, key, length, left, right,
                    log2_scale, columns, WIDTH, DIM, COLUMNS, LEFT, RIGHT, False, False, PRECISION, SHARE,
                )  # fmt: skip
        if ONE:
            top, total, b_out = _attend_block(
                b_q, top, total, b_out, o_k, k_token, o_v, v_token, rows, row * 0, length, left, right,
                log2_scale, columns, WIDTH, DIM, COLUMNS, LEFT, RIGHT, True, True, PRECISION, SHARE,
            )  # fmt: skip
        else:
            for key in range(whole, high, COLUMNS):
                top, total, b_out = _attend_block(
                    b_q, top, total, b_out, o_k, k_token, o_v, v_token, rows, key, length, left, right,
                    log2_scale, columns, WIDTH, DIM, COLUMNS, LEFT, RIGHT, True, False, PRECISION, SHARE,
                )  # fmt: skip
        # Rows past the end, which may see nothing, are not stored.
        total = tl.where(rows < length, total, 1.0)
        tl.store(lse + begin + tokens.to(tl.int64) * i_head + rows, (top + tl.log2(total)) * _LN_2, mask=rows < length)
        if v is not None:
            o_out = out + (begin * heads + i_head) * WIDTH
            _store(o_out, heads * WIDTH, rows, length, columns, b_out / total[:, None], WIDTH)


@triton.jit
def _dq_block(
    b_q, b_grad, b_lse, delta, norm, b_dq, k, k_token, v, v_token, rows, key, length, left, right, log2_scale,
    columns,
    WIDTH: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    EDGE: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    # PART "rows": b_grad holds rows of the gradient, adds to b_dq. "delta": it is the one row g / L, adds to delta and
    # norm. "pooled": the same row, adds to b_dq.
    keys = key + tl.arange(0, COLUMNS)
    b_k = _load(k, k_token, keys, length, columns, WIDTH, DIM, EDGE)
    b_v = _load(v, v_token, keys, length, columns, WIDTH, DIM, EDGE)
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [ROWS, COLUMNS]
    weights = exp2(scores * log2_scale - b_lse[:, None], SHARE)
    if EDGE:
        seen = _seen(rows[:, None], keys[None, :], length, left, right, LEFT, RIGHT)
        weights = tl.where(seen, weights, 0.0)
    if PART == "rows":
        dweights = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
    else:
        dweights = tl.sum(b_v.to(tl.float32) * b_grad[None, :], 1)[None, :]
    if PART == "delta":
        delta += tl.sum(weights * dweights, 1)
        norm += tl.sum(weights, 1)
    else:
        dscores = weights * (dweights - delta[:, None])
        b_dq = tl.dot(dscores.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return delta, norm, b_dq


@triton.jit(do_not_specialize=PLAIN)
def dq_kernel(
    grad, q, k, v, cu_seqlens, out, lse, delta, dq, grad_token, grad_head, q_token, q_head, k_token, k_head,
    v_token, v_head, tokens, sequences, blocks, heads, left, right, scale, log2_scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NEGATE: tl.constexpr, SEARCH: tl.constexpr,
    PRECISION: tl.constexpr, FAN: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    # Without out: the backward pass of the pooled form, where grad has one row per sequence.
    place, first, last = _program(heads, HEADS)
    i_sequence, begin, length, row = _place(cu_seqlens, place, sequences, blocks, ROWS, SEARCH, FAN)
    if row >= length:
        return
    q, q_token, q_head = _sequence(q, q_token, q_head, begin)
    k, k_token, k_head = _sequence(k, k_token, k_head, begin)
    v, v_token, v_head = _sequence(v, v_token, v_head, begin)
    grad, grad_token, grad_head = _sequence(grad, grad_token, grad_head, i_sequence if out is None else begin)
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    low, whole, high = _keys_seen(row, length, left, right, ROWS, COLUMNS, LEFT, RIGHT)
    for i_head in range(first, last):
        i_kv = i_head // GROUP
        b_q = _load(q + i_head * q_head, q_token, rows, length, columns, WIDTH, DIM, True)
        if NEGATE:
            b_q = -b_q
        o_k = k + i_kv * k_head
        o_v = v + i_kv * v_head
        o_rows = begin + tokens.to(tl.int64) * i_head + rows
        # exp2(-inf) = 0: rows past the end have no weights.
        b_lse = tl.load(lse + o_rows, mask=rows < length, other=float("inf")) * _LOG2_E
        b_delta = tl.zeros([ROWS], tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        b_dq = tl.zeros([ROWS, DIM], tl.float32)
        if out is None:
            b_grad = tl.load(grad + i_head * grad_head + columns, mask=columns < WIDTH, other=0.0) / length
            for key in range(low, high, COLUMNS):
                b_delta, norm, b_dq = _dq_block(
                    b_q, b_grad, b_lse, b_delta, norm, b_dq, o_k, k_token, o_v, v_token, rows, key, length,
                    left, right, log2_scale, columns, WIDTH, DIM, COLUMNS, LEFT, RIGHT, True, "delta",
                    PRECISION, SHARE,
                )  # fmt: skip
            # A row's recomputed weights add up to 1 only within the rounding of its lse, large for large scores.
            b_delta /= tl.where(rows < length, norm, 1.0)
        else:
            b_grad = _load(grad + i_head * grad_head, grad_token, rows, length, columns, WIDTH, DIM, True)
            o_out = out + (begin * heads + i_head) * WIDTH
            b_out = _load(o_out, heads * WIDTH, rows, length, columns, WIDTH, DIM, True)
            b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        tl.store(delta + o_rows, b_delta, mask=rows < length)
        PART: tl.constexpr = "pooled" if out is None else "rows"
        if not LEFT:
            for key in range(low, whole, COLUMNS):
                b_delta, norm, b_dq = _dq_block(
                    b_q, b_grad, b_lse, b_delta, norm, b_dq, o_k, k_token, o_v, v_token, rows, key, length,
                    left, right, log2_scale, columns, WIDTH, DIM, COLUMNS, LEFT, RIGHT, False, PART, PRECISION, SHARE,
                )  # fmt: skip
        for key in range(whole, high, COLUMNS):
            b_delta, norm, b_dq = _dq_block(
                b_q, b_grad, b_lse, b_delta, norm, b_dq, o_k, k_token, o_v, v_token, rows, key, length, left,
                right, log2_scale, columns, WIDTH, DIM, COLUMNS, LEFT, RIGHT, True, PART, PRECISION, SHARE,
            )  # fmt: skip
        o_dq = dq + (begin * heads + i_head) * WIDTH
        _store(o_dq, heads * WIDTH, rows, length, columns, b_dq * scale, WIDTH)


@triton.jit
def _queries_seeing(row, length, left, right, ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    # For ROWS keys from `row` on: the first query that sees any of them, and the end of those that do.
    low = row * 0
    high = length
    if RIGHT:
        low = tl.maximum(row - right, 0)
    if LEFT:
        high = tl.minimum(length, row + ROWS + left)
    return low, high


@triton.jit
def _column_weights(
    b_k, b_q, lse, o_rows, keys, queries, length, left, right, log2_scale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    # The weights again, one row per key; 0 for queries past the end, as exp2(-inf) is 0.
    b_lse = tl.load(lse + o_rows, mask=queries < length, other=float("inf")) * _LOG2_E
    scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    weights = exp2(scores * log2_scale - b_lse[None, :], SHARE)
    if LEFT or RIGHT:
        seen = _seen(queries[None, :], keys[:, None], length, left, right, LEFT, RIGHT)
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit(do_not_specialize=PLAIN)
def dkv_kernel(
    grad, q, k, v, cu_seqlens, lse, delta, dk, dv, grad_token, grad_head, q_token, q_head, k_token, k_head,
    v_token, v_head, tokens, sequences, blocks, heads, left, right, scale, log2_scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, NEGATE: tl.constexpr, SEARCH: tl.constexpr,
    POOLED: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    # `heads`: those of k and v. POOLED: grad has one row per sequence.
    place, first, last = _program(heads, HEADS)
    i_sequence, begin, length, row = _place(cu_seqlens, place, sequences, blocks, ROWS, SEARCH, FAN)
    if row >= length:
        return
    q, q_token, q_head = _sequence(q, q_token, q_head, begin)
    k, k_token, k_head = _sequence(k, k_token, k_head, begin)
    v, v_token, v_head = _sequence(v, v_token, v_head, begin)
    grad, grad_token, grad_head = _sequence(grad, grad_token, grad_head, i_sequence if POOLED else begin)
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    low, high = _queries_seeing(row, length, left, right, ROWS, LEFT, RIGHT)
    for i_kv in range(first, last):
        b_k = _load(k + i_kv * k_head, k_token, rows, length, columns, WIDTH, DIM, True)
        b_v = _load(v + i_kv * v_head, v_token, rows, length, columns, WIDTH, DIM, True)
        b_dk = tl.zeros([ROWS, DIM], tl.float32)
        b_dv = tl.zeros([ROWS, DIM], tl.float32)
        for i_head in range(i_kv * GROUP, i_kv * GROUP + GROUP):
            o_grad = grad + i_head * grad_head
            if POOLED:
                g = tl.load(o_grad + columns, mask=columns < WIDTH, other=0.0) / length
                dweights = tl.sum(b_v.to(tl.float32) * g[None, :], 1)[:, None]
                column = tl.zeros([ROWS], tl.float32)
            for query in range(low, high, COLUMNS):
                queries = query + tl.arange(0, COLUMNS)
                b_q = _load(q + i_head * q_head, q_token, queries, length, columns, WIDTH, DIM, True)
                if NEGATE:
                    b_q = -b_q
                o_rows = begin + tokens.to(tl.int64) * i_head + queries
                weights = _column_weights(
                    b_k, b_q, lse, o_rows, rows, queries, length, left, right, log2_scale, LEFT, RIGHT, PRECISION,
                    SHARE,
                )  # fmt: skip
                b_delta = tl.load(delta + o_rows, mask=queries < length, other=0.0)
                if POOLED:
                    column += tl.sum(weights, 1)
                else:
                    b_grad = _load(o_grad, grad_token, queries, length, columns, WIDTH, DIM, True)
                    b_dv = tl.dot(weights.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
                    dweights = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
                dscores = weights * (dweights - b_delta[None, :])
                b_dk = tl.dot(dscores.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
            if POOLED:
                b_dv += column[:, None] * g[None, :]
        o_dkv = (begin * heads + i_kv) * WIDTH
        _store(dk + o_dkv, heads * WIDTH, rows, length, columns, b_dk * scale, WIDTH)
        _store(dv + o_dkv, heads * WIDTH, rows, length, columns, b_dv, WIDTH)


@triton.jit(do_not_specialize=PLAIN)
def column_kernel(
    q, k, v, cu_seqlens, lse, partial, q_token, q_head, k_token, k_head, v_token, v_head, tokens, sequences,
    blocks, heads, log2_scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr, NEGATE: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, FAN: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    place, first, last = _program(heads, HEADS)
    _, begin, length, row = _place(cu_seqlens, place, sequences, blocks, ROWS, SEARCH, FAN)
    if row >= length:
        return
    q, q_token, q_head = _sequence(q, q_token, q_head, begin)
    k, k_token, k_head = _sequence(k, k_token, k_head, begin)
    v, v_token, v_head = _sequence(v, v_token, v_head, begin)
    rows = row + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    for i_head in range(first, last):
        i_kv = i_head // GROUP
        b_k = _load(k + i_kv * k_head, k_token, rows, length, columns, WIDTH, DIM, True)
        column = tl.zeros([ROWS], tl.float32)
        for query in range(0, length, COLUMNS):
            queries = query + tl.arange(0, COLUMNS)
            b_q = _load(q + i_head * q_head, q_token, queries, length, columns, WIDTH, DIM, True)
            if NEGATE:
                b_q = -b_q
            o_rows = begin + tokens.to(tl.int64) * i_head + queries
            weights = _column_weights(
                b_k, b_q, lse, o_rows, rows, queries, length, 0, 0, log2_scale, False, False, PRECISION, SHARE
            )
            column += tl.sum(weights, 1)
        # Keys past the end have weights too, but no values.
        column = tl.where(rows < length, column / length, 0.0)
        b_v = _load(v + i_kv * v_head, v_token, rows, length, columns, WIDTH, DIM, True)
        b_out = tl.sum(column[:, None] * b_v.to(tl.float32), 0)
        o_partial = partial + (place.to(tl.int64) * heads + i_head) * WIDTH + columns
        tl.store(o_partial, b_out, mask=columns < WIDTH)


@triton.jit(do_not_specialize=PLAIN)
def join_kernel(
    partial,
    cu_seqlens,
    pooled,
    blocks,
    width,
    SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The sum of the parts of one sequence, in order; 0 without any.
    i_sequence = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(cu_seqlens + i_sequence + 1).to(tl.int64)
    first = i_sequence * blocks
    if SEARCH:
        first = begin // SIZE + i_sequence
    last = first + tl.cdiv(end - begin, SIZE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for place in range(first, last, ROWS):
        places = place + tl.arange(0, ROWS)
        inside = (places < last)[:, None] & (columns < width)[None, :]
        total += tl.load(partial + places[:, None] * width + columns[None, :], mask=inside, other=0.0)
    tl.store(pooled + i_sequence * width + columns, tl.sum(total, 0), mask=columns < width)
