"""The Triton kernels around attention themselves; what they do, how they are cut and launched stands in kernels.py.

Arguments stand together by kind: tensors, strides, sizes and numbers, then what the compiler knows. A tensor that is
None leaves out the part of a kernel that needs it.
"""

import math

import triton
import triton.language as tl

from leafkern.ops._core.device import sequence_of, summed, unit

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
# tanh's form: 2 u = h · (_LINEAR + _CUBIC · h²).
_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_CUBIC_SLOPE = tl.constexpr(6 * math.sqrt(2 / math.pi) * 0.044715)
# Arguments whose value is no reason to compile a kernel again.
PLAIN = ["tokens", "chunk", "count", "sequences", "words", "positions", "types", "heads", "kv_heads", "q_programs"]


@triton.jit
def _store_norm(
    h, rows, columns, valid, weight, bias, out, statistics, tokens, eps, WIDTH: tl.constexpr, NORM: tl.constexpr
):
    h, mean, inverse = unit(h, valid, eps, WIDTH, NORM)
    inside = columns < WIDTH
    h *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        h += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], h.to(out.dtype.element_ty), mask=valid)
    if NORM == "layer":
        tl.store(statistics + rows, mean, mask=rows < tokens)
        statistics += tokens
    tl.store(statistics + rows, inverse, mask=rows < tokens)


@triton.jit
def _norm_gradient(
    g, h, b_weight, dweight, dbias, statistics, rows, high, tokens, WIDTH: tl.constexpr, NORM: tl.constexpr
):
    # The gradient of h, and what its rows add to those of weight and bias. g is 0 outside the tile.
    if NORM == "layer":
        h -= tl.load(statistics + rows, mask=rows < high, other=0.0)[:, None]
        statistics += tokens
    inverse = tl.load(statistics + rows, mask=rows < high, other=0.0)[:, None]
    h *= inverse
    dweight += g * h
    dbias += g
    g *= b_weight[None, :]
    out = g - h * (tl.sum(g * h, 1) / WIDTH)[:, None]
    if NORM == "layer":
        out -= (tl.sum(g, 1) / WIDTH)[:, None]
    return out * inverse, dweight, dbias


@triton.jit(do_not_specialize=PLAIN)
def add_norm_kernel(
    x, residual, weight, bias, out, total, statistics, x_stride, residual_stride, tokens, eps,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    valid = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]
    h = summed(x, residual, rows, columns, valid, x_stride, residual_stride)
    if total is not None:
        rounded = h.to(total.dtype.element_ty)
        tl.store(total + rows[:, None] * WIDTH + columns[None, :], rounded, mask=valid)
        h = rounded.to(tl.float32)
    _store_norm(h, rows, columns, valid, weight, bias, out, statistics, tokens, eps, WIDTH, NORM)


@triton.jit(do_not_specialize=PLAIN)
def add_norm_backward_kernel(
    grad, grad_sum, x, residual, weight, statistics, dx, partial, grad_stride, sum_stride, x_stride, residual_stride,
    tokens, chunk,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    low = i_chunk * chunk
    high = tl.minimum(low + chunk, tokens)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    b_weight = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(low, high, ROWS):
        rows = row + tl.arange(0, ROWS)
        valid = (rows < high)[:, None] & inside[None, :]
        h = summed(x, residual, rows, columns, valid, x_stride, residual_stride)
        g = tl.load(grad + rows[:, None] * grad_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        out, dweight, dbias = _norm_gradient(
            g, h, b_weight, dweight, dbias, statistics, rows, high, tokens, WIDTH, NORM
        )
        if grad_sum is not None:
            further = tl.load(grad_sum + rows[:, None] * sum_stride + columns[None, :], mask=valid, other=0.0)
            out += further.to(tl.float32)
        tl.store(dx + rows[:, None] * WIDTH + columns[None, :], out.to(dx.dtype.element_ty), mask=valid)
    o_partial = partial + 2 * i_chunk * WIDTH + columns
    tl.store(o_partial, tl.sum(dweight, 0), mask=inside)
    tl.store(o_partial + WIDTH, tl.sum(dbias, 0), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def join_kernel(
    partial, first, second, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    # first: the sum of the rows of partial, (count, WIDTH); with second: partial is (count, 2, WIDTH), a part for each.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    stride = WIDTH
    out = first
    if second is not None:
        stride = 2 * WIDTH
        if tl.program_id(1) == 1:
            partial += WIDTH
            out = second
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(0, count, ROWS):
        rows = row + tl.arange(0, ROWS)
        valid = (rows < count)[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=valid, other=0.0)
    tl.store(out + columns, tl.sum(total, 0), mask=columns < WIDTH)


@triton.jit
def _phi(h, TANH: tl.constexpr):
    # Φ(h), or what stands in its place with tanh: (1 + tanh(u)) / 2 is sigmoid(2 u).
    if TANH:
        share = tl.sigmoid(h * (h * h * _CUBIC + _LINEAR))
    else:
        share = 0.5 + 0.5 * tl.erf(h * _ROOT_HALF)
    return share


@triton.jit
def _biased(x, bias, rows, columns, valid, x_stride, WIDTH: tl.constexpr):
    h = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit(do_not_specialize=PLAIN)
def gelu_kernel(
    x, bias, out, x_stride, tokens,
    WIDTH: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]
    h = _biased(x, bias, rows, columns, valid, x_stride, WIDTH)
    h *= _phi(h, TANH)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], h.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=PLAIN)
def gelu_backward_kernel(
    grad, x, bias, dx, partial, grad_stride, x_stride, tokens, chunk,
    WIDTH: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    low = i_chunk * chunk
    high = tl.minimum(low + chunk, tokens)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(low, high, ROWS):
        rows = row + tl.arange(0, ROWS)
        valid = (rows < high)[:, None] & inside[None, :]
        h = _biased(x, bias, rows, columns, valid, x_stride, WIDTH)
        g = tl.load(grad + rows[:, None] * grad_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        share = _phi(h, TANH)
        if TANH:
            slope = share + h * share * (1 - share) * (h * h * _CUBIC_SLOPE + _LINEAR)
        else:
            slope = share + h * tl.exp(-0.5 * h * h) * _DENSITY
        g *= slope
        tl.store(dx + rows[:, None] * WIDTH + columns[None, :], g.to(dx.dtype.element_ty), mask=valid)
        if bias is not None:
            dbias += g
    if bias is not None:
        tl.store(partial + i_chunk * WIDTH + columns, tl.sum(dbias, 0), mask=inside)


@triton.jit
def _rotate(
    x, out, cos, sin, program, x_token, x_head, cos_stride, sin_stride, tokens, heads,
    HALF: tl.constexpr, BACKWARDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    rows = program * ROWS + tl.arange(0, ROWS)
    token = rows // heads
    head = (rows - token * heads).to(tl.int64)
    token = token.to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    valid = (token < tokens)[:, None] & (columns < HALF)[None, :]
    o_x = x + (token * x_token + head * x_head)[:, None] + columns[None, :]
    first = tl.load(o_x, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(o_x + HALF, mask=valid, other=0.0).to(tl.float32)
    b_cos = tl.load(cos + (token * cos_stride)[:, None] + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + (token * sin_stride)[:, None] + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if BACKWARDS:
        b_sin = -b_sin
    o_out = out + rows.to(tl.int64)[:, None] * (2 * HALF) + columns[None, :]
    tl.store(o_out, (first * b_cos - second * b_sin).to(out.dtype.element_ty), mask=valid)
    tl.store(o_out + HALF, (second * b_cos + first * b_sin).to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=PLAIN)
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, q_token, q_head, k_token, k_head, cos_stride, sin_stride,
    tokens, heads, kv_heads, q_programs,
    HALF: tl.constexpr, BACKWARDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        _rotate(
            q, q_out, cos, sin, program, q_token, q_head, cos_stride, sin_stride, tokens, heads,
            HALF, BACKWARDS, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _rotate(
            k, k_out, cos, sin, program - q_programs, k_token, k_head, cos_stride, sin_stride, tokens, kv_heads,
            HALF, BACKWARDS, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _begins(cu_seqlens, rows, low, high, sequences, FAN: tl.constexpr):
    # Where the sequence of each of the rows from low to high begins.
    i_sequence = sequence_of(cu_seqlens, low, sequences, FAN)
    begin = tl.zeros_like(rows) + tl.load(cu_seqlens + i_sequence)
    i_sequence += 1
    # Further ones that begin among these rows; as many may be empty.
    later = tl.load(cu_seqlens + i_sequence, mask=i_sequence < sequences, other=0)
    while (i_sequence < sequences) & (later < high):
        probe = i_sequence + tl.arange(0, FAN)
        begins = tl.load(cu_seqlens + probe, mask=probe < sequences, other=0).to(tl.int64)
        begin = tl.maximum(begin, tl.max(tl.where(begins[None, :] <= rows[:, None], begins[None, :], 0), 1))
        i_sequence += FAN
        later = tl.load(cu_seqlens + i_sequence, mask=i_sequence < sequences, other=0)
    return begin


@triton.jit
def _table_row(ids, rows, valid, size):
    # An id as row number of its table: the nearest there is.
    found = tl.load(ids + rows, mask=valid, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(found, 0), size.to(tl.int64) - 1)


@triton.jit
def _embedded(word, position, token_type, i_word, i_position, i_type, columns, valid, WIDTH: tl.constexpr):
    h = tl.load(word + i_word[:, None] * WIDTH + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    h += tl.load(position + i_position[:, None] * WIDTH + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    return h + tl.load(token_type + i_type[:, None] * WIDTH + columns[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=PLAIN)
def embed_norm_kernel(
    input_ids, token_type_ids, cu_seqlens, word, position, token_type, weight, bias, out, statistics, table_rows,
    tokens, sequences, words, positions, types, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    low = tl.program_id(0).to(tl.int64) * ROWS
    rows = low + tl.arange(0, ROWS)
    there = rows < tokens
    columns = tl.arange(0, COLUMNS)
    valid = there[:, None] & (columns < WIDTH)[None, :]
    place = rows - _begins(cu_seqlens, rows, low, low + ROWS, sequences, FAN)
    i_word = _table_row(input_ids, rows, there, words)
    i_position = tl.minimum(place, positions.to(tl.int64) - 1)
    i_type = tl.zeros_like(rows)
    if token_type_ids is not None:
        i_type = _table_row(token_type_ids, rows, there, types)
    o_rows = table_rows + rows
    tl.store(o_rows, i_word.to(tl.int32), mask=there)
    tl.store(o_rows + tokens, i_position.to(tl.int32), mask=there)
    tl.store(o_rows + 2 * tokens.to(tl.int64), i_type.to(tl.int32), mask=there)
    h = _embedded(word, position, token_type, i_word, i_position, i_type, columns, valid, WIDTH)
    _store_norm(h, rows, columns, valid, weight, bias, out, statistics, tokens, eps, WIDTH, "layer")


@triton.jit(do_not_specialize=PLAIN)
def embed_norm_backward_kernel(
    grad, statistics, table_rows, word, position, token_type, weight, dx, partial, grad_stride, tokens, chunk,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    low = i_chunk * chunk
    high = tl.minimum(low + chunk, tokens)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    b_weight = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(low, high, ROWS):
        rows = row + tl.arange(0, ROWS)
        there = rows < high
        valid = there[:, None] & inside[None, :]
        i_word = tl.load(table_rows + rows, mask=there, other=0).to(tl.int64)
        i_position = tl.load(table_rows + tokens + rows, mask=there, other=0).to(tl.int64)
        i_type = tl.load(table_rows + 2 * tokens.to(tl.int64) + rows, mask=there, other=0).to(tl.int64)
        h = _embedded(word, position, token_type, i_word, i_position, i_type, columns, valid, WIDTH)
        g = tl.load(grad + rows[:, None] * grad_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        out, dweight, dbias = _norm_gradient(
            g, h, b_weight, dweight, dbias, statistics, rows, high, tokens, WIDTH, "layer"
        )
        tl.store(dx + rows[:, None] * WIDTH + columns[None, :], out, mask=valid)
    o_partial = partial + 2 * i_chunk * WIDTH + columns
    tl.store(o_partial, tl.sum(dweight, 0), mask=inside)
    tl.store(o_partial + WIDTH, tl.sum(dbias, 0), mask=inside)
