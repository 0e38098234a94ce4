"""The Triton kernels of the contrastive losses themselves; what they do, how they are cut and launched stands in
kernels.py.

Widths count from the narrowest: width k ends segment k, BOUNDS[k] to BOUNDS[k + 1], of the rows, and covers segments 0
to k. A tensor that is None leaves out the part of a kernel that needs it. A score is a cosine times the norm of its
query: one factor less per entry of a tile.
"""

import math

import triton
import triton.language as tl

# The score of a column that is masked or does not exist. Finite, so that its product with a weight of 0 is 0; far below
# any other: norms of rows end at the root of the largest float, 1.8e19.
HIDDEN = -3.0e38
# What scores are multiplied with is at least this, so that hidden ones stay far away for a query of length 0 too.
LEAST_SCALE = 1.0e-30
# Inverse norms from here on are clamped: nothing is projected out of the gradient.
CLAMPED = 1.0e12
# What `row_kernel` leaves of each width and row.
TOP, FACTOR, SUM, PAIR, PAIR_SUM = range(5)
STATE_FIELDS = 5
# What `teacher_kernel` leaves of each row.
TEACHER_TOP, TEACHER_LOG, TEACHER_ENTROPY, TEACHER_MASS = range(4)
TEACHER_FIELDS = 4

_HIDDEN = tl.constexpr(HIDDEN)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_CLAMPED = tl.constexpr(CLAMPED)
_TOP, _FACTOR, _SUM = tl.constexpr(TOP), tl.constexpr(FACTOR), tl.constexpr(SUM)
_PAIR, _PAIR_SUM = tl.constexpr(PAIR), tl.constexpr(PAIR_SUM)
_TEACHER_TOP, _TEACHER_LOG = tl.constexpr(TEACHER_TOP), tl.constexpr(TEACHER_LOG)
_TEACHER_ENTROPY, _TEACHER_MASS = tl.constexpr(TEACHER_ENTROPY), tl.constexpr(TEACHER_MASS)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))

# Arguments whose value is no reason to compile a kernel again.
PLAIN = ["rows", "columns", "own_columns", "first_row", "first_column", "first_own", "row_blocks", "tiles", "parts"]
PLAIN += ["offset", "group", "count", "pairs", "slab", "slab_columns", "positives", "numbers", "start", "first_part"]
# Tensors that may begin anywhere in memory.
SLICES = ["own_pairs", "own_sums", "sums", "pairs_of", "pair_sums"]


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def prefix_kernel(
    x, queries, inverse, scores, x_stride, q_stride, rows, own_columns,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Inverse norms of the prefixes of each row; of a query's own columns, with `queries`, the scores too.
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i_row < rows
    o_x = x + i_row.to(tl.int64)[:, None] * x_stride
    if queries is not None:
        o_q = queries + (i_row // own_columns).to(tl.int64)[:, None] * q_stride
    square = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    for k in tl.static_range(len(BOUNDS) - 1):
        for d in range(BOUNDS[k], BOUNDS[k + 1], COLUMNS):
            column = d + tl.arange(0, COLUMNS)
            m_x = live[:, None] & (column < BOUNDS[k + 1])[None, :]
            b_x = tl.load(o_x + column[None, :], mask=m_x, other=0.0).to(tl.float32)
            square += tl.sum(b_x * b_x, 1)
            if queries is not None:
                b_q = tl.load(o_q + column[None, :], mask=m_x, other=0.0).to(tl.float32)
                product += tl.sum(b_x * b_q, 1)
        norm = tl.sqrt_rn(square)
        # As n(x) = x / max(norm, 1e-12), but 0 for a row of zeros, and NaN for one with NaN.
        inverse_norm = tl.where(norm == 0, 0.0, tl.where(norm < 1e-12, _CLAMPED, tl.div_rn(1.0, norm)))
        place = k * rows.to(tl.int64) + i_row
        tl.store(inverse + place, inverse_norm, mask=live)
        if queries is not None:
            tl.store(scores + place, product * inverse_norm, mask=live)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def teacher_kernel(teacher, state, teacher_stride, rows, columns, teacher_scale, COLUMNS: tl.constexpr):
    # One row: what its softmax needs, the sum of p log p, and that of p as it is rounded.
    wide = rows.to(tl.int64)
    i_row = tl.program_id(0).to(tl.int64)
    o_teacher = teacher + i_row * teacher_stride
    tops = tl.full([COLUMNS], float("-inf"), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        b = tl.load(o_teacher + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        tops = tl.maximum(tops, b)
    top = tl.max(tops, 0)
    mass = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        b = tl.load(o_teacher + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        mass += tl.where(column < columns, tl.exp2((b - top) * teacher_scale), 0.0)
    log = tl.log2(tl.sum(mass, 0))
    entropy = tl.zeros([COLUMNS], tl.float32)
    whole = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        b = tl.load(o_teacher + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        log_p = (b - top) * teacher_scale - log
        p = tl.where(column < columns, tl.exp2(log_p), 0.0)
        whole += p
        # 0 log 0 = 0.
        entropy += tl.where(p == 0, 0.0, p * (log_p * _LN_2))
    tl.store(state + _TEACHER_TOP * wide + i_row, top)
    tl.store(state + _TEACHER_LOG * wide + i_row, log)
    tl.store(state + _TEACHER_ENTROPY * wide + i_row, tl.sum(entropy, 0))
    tl.store(state + _TEACHER_MASS * wide + i_row, tl.sum(whole, 0))


@triton.jit
def _bound(k, BOUNDS: tl.constexpr, ALIGN: tl.constexpr):
    bound = k * 0
    for i in tl.static_range(1, len(BOUNDS)):
        if k >= i:
            bound = k * 0 + BOUNDS[i]
    if ALIGN > 1 and len(BOUNDS) > 2:
        bound = tl.multiple_of(bound, ALIGN)
    return bound


@triton.jit
def _segment(total, a, b, k, BOUNDS: tl.constexpr, ALIGN: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    # total + the products of segment k of the rows at `a` and `b`. ALIGN divides every bound: where it is DEPTH, there
    # is nothing to mask; else the last block of a segment is.
    inner = tl.arange(0, DEPTH)
    low = _bound(k, BOUNDS, ALIGN)
    high = _bound(k + 1, BOUNDS, ALIGN)
    whole = low + (high - low) // DEPTH * DEPTH
    for d in range(low, whole, DEPTH):
        b_a = tl.load(a + (d + inner)[None, :])
        b_b = tl.load(b + (d + inner)[None, :])
        total = tl.dot(b_a, tl.trans(b_b), total, input_precision=PRECISION)
    if ALIGN < DEPTH:
        inside = (whole + inner < high)[None, :]
        b_a = tl.load(a + (whole + inner)[None, :], mask=inside, other=0.0)
        b_b = tl.load(b + (whole + inner)[None, :], mask=inside, other=0.0)
        total = tl.dot(b_a, tl.trans(b_b), total, input_precision=PRECISION)
    return total


@triton.jit
def _scores(
    total, inverse, q_inverse, positive, q_ids, x_ids, i_row, near, place, row, column, columns, start, first_own,
    margin, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The scores of the tile at (row, column); hidden where a column is beyond the last, masked, or the row's own.
    z = total * inverse[None, :]
    if margin is not None:
        # The positive's score is the product that every column's is.
        limit = tl.load(positive + place) * q_inverse - margin
        z = tl.where(z * q_inverse[:, None] > limit[:, None], _HIDDEN, z)
    if q_ids is not None:
        q_id = tl.load(q_ids + start + i_row)
        x_id = tl.load(x_ids + near)
        z = tl.where(q_id[:, None] == x_id[None, :], _HIDDEN, z)
    # Few tiles have such columns.
    edge = column + COLUMNS > columns
    if first_own is not None:
        edge = edge | ((row + first_own < column + COLUMNS) & (row + first_own + ROWS > column))
    if edge:
        i_column = column + tl.arange(0, COLUMNS)
        hidden = (i_column >= columns)[None, :]
        if first_own is not None:
            hidden = hidden | ((row + first_own + tl.arange(0, ROWS))[:, None] == i_column[None, :])
        z = tl.where(hidden, _HIDDEN, z)
    return z


@triton.jit
def _taught(teacher, teacher_state, teacher_stride, rows, columns, i_row, i_column, teacher_scale):
    # A tile of the teacher's probabilities.
    pointers = teacher + i_row.to(tl.int64)[:, None] * teacher_stride + i_column[None, :]
    b = tl.load(pointers, mask=(i_column < columns)[None, :], other=float("-inf")).to(tl.float32)
    top = tl.load(teacher_state + _TEACHER_TOP * rows + i_row)
    log = tl.load(teacher_state + _TEACHER_LOG * rows + i_row)
    return tl.exp2((b - top[:, None]) * teacher_scale - log[:, None])


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def score_kernel(
    queries, x, q_inverse, x_inverse, positive, q_ids, x_ids, teacher, teacher_state, partial, q_stride, x_stride,
    teacher_stride, rows, columns, start, first_own, first_part, row_blocks, tiles, scale, teacher_scale, margin,
    BOUNDS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Of ROWS queries and `tiles` tiles of columns, for each width: the largest score, the sum of exp(score - largest),
    # that of exp(score - largest) * score and, with a teacher, that of its probability * score. They stay in memory
    # between tiles: loaded while the products run, they cost no registers. Without `partial`: the scores of the
    # queries' own positives, by the very products.
    i_block = tl.program_id(0) % row_blocks
    i_part = (tl.program_id(0) // row_blocks).to(tl.int64)
    wide = rows.to(tl.int64)
    place = i_block * ROWS + tl.arange(0, ROWS)
    live = place < rows
    # Rows and columns beyond the last are the last again: loads need no mask.
    i_row = tl.minimum(place, rows - 1)
    o_q = queries + i_row.to(tl.int64)[:, None] * q_stride
    WIDTHS: tl.constexpr = len(BOUNDS) - 1
    if partial is None:
        i_column = tl.minimum(i_block * ROWS + tl.arange(0, COLUMNS) + first_own, columns - 1)
        o_x = x + i_column.to(tl.int64)[:, None] * x_stride
        own = tl.arange(0, ROWS)[:, None] == tl.arange(0, COLUMNS)[None, :]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, WIDTHS):
            total = _segment(total, o_q, o_x, k, BOUNDS, ALIGN, DEPTH, PRECISION)
            inverse = tl.load(x_inverse + k * columns.to(tl.int64) + i_column)
            z = tl.sum(tl.where(own, total * inverse[None, :], 0.0), 1)
            tl.store(positive + k * wide + place, z, mask=live)
    else:
        FIELDS: tl.constexpr = 3 if teacher is None else 4
        step = WIDTHS * wide
        first = i_part.to(tl.int32) * tiles
        last = tl.minimum(first + tiles, tl.cdiv(columns, COLUMNS))
        for i_tile in range(first, last):
            i_column = i_tile * COLUMNS + tl.arange(0, COLUMNS)
            near = tl.minimum(i_column, columns - 1)
            o_x = x + near.to(tl.int64)[:, None] * x_stride
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, WIDTHS):
                o_partial = partial + ((first_part + i_part) * FIELDS * WIDTHS + k) * wide + place
                m_partial = live & (place * 0 + i_tile > first)
                before = tl.load(o_partial, mask=m_partial, other=_HIDDEN)
                mass = tl.load(o_partial + step, mask=m_partial, other=0.0)
                moment = tl.load(o_partial + 2 * step, mask=m_partial, other=0.0)
                if teacher is not None:
                    taught = tl.load(o_partial + 3 * step, mask=m_partial, other=0.0)
                inverse = tl.load(x_inverse + k * columns.to(tl.int64) + near)
                b_inverse = tl.load(q_inverse + k * wide + i_row)
                total = _segment(total, o_q, o_x, k, BOUNDS, ALIGN, DEPTH, PRECISION)
                z = _scores(
                    total, inverse, b_inverse, positive, q_ids, x_ids, i_row, near, k * wide + i_row, i_block * ROWS,
                    i_tile * COLUMNS, columns, start, first_own, margin, ROWS, COLUMNS,
                )  # fmt: skip
                c = tl.maximum(b_inverse * scale, _LEAST_SCALE)
                top = tl.maximum(before, tl.max(z, 1))
                shift = tl.where(top == _HIDDEN, 0.0, top)
                fade = tl.exp2((before - shift) * c)
                e = tl.exp2((z - shift[:, None]) * c[:, None])
                tl.store(o_partial, top, mask=live)
                tl.store(o_partial + step, mass * fade + tl.sum(e, 1), mask=live)
                tl.store(o_partial + 2 * step, moment * fade + tl.sum(e * z, 1), mask=live)
                if teacher is not None:
                    t = _taught(teacher, teacher_state, teacher_stride, wide, columns, i_row, i_column, teacher_scale)
                    tl.store(o_partial + 3 * step, taught + tl.sum(t * z, 1), mask=live)
            # What one thread has stored, another loads.
            tl.debug_barrier()


@triton.jit
def _log1p(x):
    # log(1 + x) for 0 <= x <= 1, to the last digits of x: 2 atanh(x / (2 + x)) as a series.
    y = x / (2 + x)
    s = y * y
    series = 1.0 / 13 + s * (1.0 / 15)
    series = 1.0 / 11 + s * series
    series = 1.0 / 9 + s * series
    series = 1.0 / 7 + s * series
    series = 1.0 / 5 + s * series
    series = 1.0 / 3 + s * series
    return 2 * y * (1 + s * series)


@triton.jit
def _focal(gap, gamma, FOCAL: tl.constexpr, DETACHED: tl.constexpr):
    # Loss of each row and its derivative by the gap between the log mass of the other columns and the positive's: with
    # p the probability of the positive, 1 - p = sigmoid(gap), -log p = softplus(gap), log(1 - p) = -softplus(-gap).
    e = tl.exp(-tl.abs(gap))
    log = _log1p(e)
    rest = tl.where(gap >= 0, 1.0, e) / (1 + e)
    surprise = tl.maximum(gap, 0.0) + log
    value = surprise
    slope = rest
    if FOCAL:
        weight = tl.exp(-gamma * (tl.maximum(-gap, 0.0) + log))
        if not DETACHED:
            slope += gamma * (tl.where(gap >= 0, e, 1.0) / (1 + e)) * surprise
        value = weight * surprise
        slope = weight * slope
    return value, slope


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def row_kernel(
    partial, positive, q_inverse, x_inverse, own_scores, own_inverse, teacher, teacher_state, unit, losses, state,
    own_pairs, own_sums, teacher_stride, rows, positives, first_own, parts, own_columns, scale, teacher_scale, share,
    inverse_temperature, gamma,
    DIM_WEIGHTS: tl.constexpr, FOCAL: tl.constexpr, DETACHED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # The parts of each row joined with its own columns; its loss; what its weights are made of.
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i_row < rows
    wide = rows.to(tl.int64)
    WIDTHS: tl.constexpr = len(DIM_WEIGHTS)
    FIELDS: tl.constexpr = 3 if teacher_state is None else 4
    loss = tl.zeros([ROWS], tl.float32)
    factor_unit = 1.0
    if unit is not None:
        factor_unit = tl.load(unit)
    if teacher_state is not None:
        o_state = teacher_state + i_row
        teacher_top = tl.load(o_state + _TEACHER_TOP * wide, mask=live, other=0.0)
        teacher_log = tl.load(o_state + _TEACHER_LOG * wide, mask=live, other=0.0)
        entropy = tl.load(o_state + _TEACHER_ENTROPY * wide, mask=live, other=0.0)
        teacher_mass = tl.load(o_state + _TEACHER_MASS * wide, mask=live, other=0.0)
    for k in tl.static_range(WIDTHS):
        b_inverse = tl.load(q_inverse + k * wide + i_row, mask=live, other=0.0)
        c = tl.maximum(b_inverse * scale, _LEAST_SCALE)
        top = tl.full([ROWS], _HIDDEN, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        moment = tl.zeros([ROWS], tl.float32)
        taught = tl.zeros([ROWS], tl.float32)
        step = WIDTHS * wide
        if partial is not None:
            o_part = partial + k * wide + i_row
            for _ in range(0, parts):
                part_top = tl.load(o_part, mask=live, other=0.0)
                new_top = tl.maximum(top, part_top)
                shift = tl.where(new_top == _HIDDEN, 0.0, new_top)
                before = tl.exp2((top - shift) * c)
                now = tl.exp2((part_top - shift) * c)
                mass = mass * before + tl.load(o_part + step, mask=live, other=0.0) * now
                moment = moment * before + tl.load(o_part + 2 * step, mask=live, other=0.0) * now
                if teacher_state is not None:
                    taught += tl.load(o_part + 3 * step, mask=live, other=0.0)
                top = new_top
                o_part += FIELDS * step
        o_own = k * wide * own_columns + i_row.to(tl.int64) * own_columns
        if own_scores is not None:
            for j in range(0, own_columns):
                z = tl.load(own_scores + o_own + j, mask=live, other=0.0)
                new_top = tl.maximum(top, z)
                before = tl.exp2((top - new_top) * c)
                e = tl.exp2((z - new_top) * c)
                mass = mass * before + e
                moment = moment * before + e * z
                if teacher_state is not None:
                    b = tl.load(teacher + i_row.to(tl.int64) * teacher_stride + j, mask=live, other=0.0)
                    taught += tl.exp2((b.to(tl.float32) - teacher_top) * teacher_scale - teacher_log) * z
                top = new_top
        empty = mass == 0
        top = tl.where(empty, 0.0, top)
        mass = tl.where(empty, 1.0, mass)
        cosine = b_inverse * inverse_temperature
        o_out = state
        if state is not None:
            o_out = state + k * wide + i_row
        if teacher_state is None:
            z = tl.load(positive + k * wide + i_row, mask=live, other=0.0)
            # Scores are subtracted before the temperature magnifies them: no digits are lost to large logits.
            gap = (top - z) * cosine + tl.log(mass)
            gap = tl.where(empty, float("-inf") + 0 * z, gap)
            value, slope = _focal(gap, gamma, FOCAL, DETACHED)
            slope *= share * DIM_WEIGHTS[k] * inverse_temperature * factor_unit * b_inverse
            if state is not None:
                o_x = x_inverse + k * positives.to(tl.int64) + i_row + first_own
                tl.store(o_out + _SUM * step, slope * (moment / mass - z), mask=live)
                tl.store(o_out + _PAIR * step, -slope * tl.load(o_x, mask=live, other=0.0), mask=live)
                tl.store(o_out + _PAIR_SUM * step, -slope * z, mask=live)
        else:
            value = entropy + (top * cosine + tl.log(mass)) * teacher_mass - taught * cosine
            slope = share * DIM_WEIGHTS[k] * inverse_temperature * factor_unit * b_inverse
            if state is not None:
                tl.store(o_out + _SUM * step, slope * (moment / mass - taught), mask=live)
                # What the teacher's probability is multiplied with.
                tl.store(o_out + _PAIR * step, slope, mask=live)
        loss += tl.where(live, share * DIM_WEIGHTS[k] * value, 0.0)
        if state is not None:
            factor = slope / mass
            factor = tl.where(empty, 0.0, factor)
            tl.store(o_out + _TOP * step, top, mask=live)
            tl.store(o_out + _FACTOR * step, factor, mask=live)
            if own_scores is not None:
                for j in range(0, own_columns):
                    z = tl.load(own_scores + o_own + j, mask=live, other=0.0)
                    weight = tl.exp2((z - top) * c) * factor
                    if teacher_state is not None:
                        b = tl.load(teacher + i_row.to(tl.int64) * teacher_stride + j, mask=live, other=0.0)
                        p = tl.exp2((b.to(tl.float32) - teacher_top) * teacher_scale - teacher_log)
                        weight -= p * slope
                    inverse = tl.load(own_inverse + o_own + j, mask=live, other=0.0)
                    tl.store(own_pairs + o_own + j, weight * inverse, mask=live)
                    tl.store(own_sums + o_own + j, weight * z, mask=live)
    tl.store(losses + i_row, loss, mask=live)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def weight_kernel(
    queries, x, q_inverse, x_inverse, positive, q_ids, x_ids, teacher, teacher_state, state, weights, sums, q_stride,
    x_stride, teacher_stride, rows, columns, start, first_own, first_row, first_column, slab, slab_columns, scale,
    teacher_scale, margin,
    BOUNDS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # A tile of what the rows of either side are multiplied with for the gradient of the other, per segment. `slab`: the
    # entries of a segment's matrix, slab_columns wide.
    wide = rows.to(tl.int64)
    across = tl.cdiv(tl.minimum(slab_columns, columns - first_column), COLUMNS)
    i_down = tl.program_id(0) // across
    i_across = tl.program_id(0) % across
    WIDTHS: tl.constexpr = len(BOUNDS) - 1
    row = first_row + i_down * ROWS
    column = first_column + i_across * COLUMNS
    place = row + tl.arange(0, ROWS)
    i_row = tl.minimum(place, rows - 1)
    i_column = column + tl.arange(0, COLUMNS)
    near = tl.minimum(i_column, columns - 1)
    o_q = queries + i_row.to(tl.int64)[:, None] * q_stride
    o_x = x + near.to(tl.int64)[:, None] * x_stride
    down = i_down * ROWS + tl.arange(0, ROWS)
    right = i_across * COLUMNS + tl.arange(0, COLUMNS)
    o_weights = weights + down[:, None] * slab_columns + right[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, WIDTHS):
        inverse = tl.load(x_inverse + k * columns.to(tl.int64) + near)
        b_inverse = tl.load(q_inverse + k * wide + i_row)
        o_state = state + k * wide + i_row
        step = WIDTHS * wide
        top = tl.load(o_state + _TOP * step)
        # Rows beyond the last add nothing.
        factor = tl.load(o_state + _FACTOR * step, mask=place < rows, other=0.0)
        total = _segment(total, o_q, o_x, k, BOUNDS, ALIGN, DEPTH, PRECISION)
        z = _scores(
            total, inverse, b_inverse, positive, q_ids, x_ids, i_row, near, k * wide + i_row, row, column, columns,
            start, first_own, margin, ROWS, COLUMNS,
        )  # fmt: skip
        c = tl.maximum(b_inverse * scale, _LEAST_SCALE)
        w = tl.exp2((z - top[:, None]) * c[:, None]) * factor[:, None]
        if teacher is not None:
            t = _taught(teacher, teacher_state, teacher_stride, wide, columns, i_row, i_column, teacher_scale)
            w -= t * tl.load(o_state + _PAIR * step, mask=place < rows, other=0.0)[:, None]
        w *= inverse[None, :]
        if sums is not None:
            o_sums = sums + ((first_row // ROWS + i_down).to(tl.int64) * WIDTHS + k) * slab_columns
            tl.store(o_sums + right, tl.sum(w * total, 0))
        tl.store(o_weights + k * slab, w.to(weights.dtype.element_ty))
    if WIDTHS > 1:
        # Segment k counts in all widths from k on. What one thread has stored, another may load.
        tl.debug_barrier()
        running = tl.load(o_weights + (WIDTHS - 1) * slab).to(tl.float32)
        for i in range(1, WIDTHS):
            o_segment = o_weights + (WIDTHS - 1 - i) * slab
            running += tl.load(o_segment).to(tl.float32)
            tl.store(o_segment, running.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def finish_kernel(
    grad, x, inverse, sums, partner, pairs_of, pair_sums, unit, grad_stride, x_stride, partner_stride, numbers,
    first_row, rows, parts, slab_columns, pairs, offset, group, count,
    BOUNDS: tl.constexpr, ADD: tl.constexpr, OF_PARTNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # Rows first_row to rows of a gradient: what the products left there (ADD), plus the rows' partners times their
    # weights, minus what lies along the row itself, over `unit`. Row i has partners (i + offset) // group * count to
    # ... + count; their weights are counted as they are (OF_PARTNER), else as the rows. numbers: rows of `inverse`.
    i_row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i_row < rows
    WIDTHS: tl.constexpr = len(BOUNDS) - 1
    along = tl.zeros([ROWS], tl.float32)
    back = 1.0
    if unit is not None:
        back = 1.0 / tl.load(unit)
    o_grad = grad + i_row.to(tl.int64)[:, None] * grad_stride
    o_x = x + i_row.to(tl.int64)[:, None] * x_stride
    for i in tl.static_range(WIDTHS):
        if sums is not None:
            b_inverse = tl.load(inverse + (WIDTHS - 1 - i) * numbers.to(tl.int64) + i_row, mask=live, other=0.0)
            total = tl.zeros([ROWS], tl.float32)
            for part in range(0, parts, PARTS):
                i_part = part + tl.arange(0, PARTS)
                o_sums = sums + ((i_part.to(tl.int64) + 1) * WIDTHS - 1 - i)[:, None] * slab_columns
                o_sums += (i_row - first_row)[None, :]
                total += tl.sum(tl.load(o_sums, mask=(i_part < parts)[:, None] & live[None, :], other=0.0), 0)
            if pair_sums is not None:
                i_pair = i_row + offset
                there = live & (i_pair >= 0) & (i_pair < pairs)
                total += tl.load(pair_sums + (WIDTHS - 1 - i) * pairs.to(tl.int64) + i_pair, mask=there, other=0.0)
            # NaN stays NaN.
            along += tl.where(b_inverse >= _CLAMPED, 0.0, total * b_inverse * b_inverse)
        for d in range(BOUNDS[WIDTHS - 1 - i], BOUNDS[WIDTHS - i], COLUMNS):
            column = d + tl.arange(0, COLUMNS)
            inside = live[:, None] & (column < BOUNDS[WIDTHS - i])[None, :]
            out = tl.zeros([ROWS, COLUMNS], tl.float32)
            if ADD:
                out = tl.load(o_grad + column[None, :], mask=inside, other=0.0)
            if partner is not None:
                for j in range(0, count):
                    i_partner = (i_row + offset) // group * count + j
                    i_pair = i_partner if OF_PARTNER else i_row
                    there = live & (i_row + offset >= 0) & (i_pair < pairs)
                    weight = tl.zeros([ROWS], tl.float32)
                    for above in tl.static_range(i + 1):
                        o_pair = pairs_of + (WIDTHS - 1 - above) * pairs.to(tl.int64) + i_pair
                        weight += tl.load(o_pair, mask=there, other=0.0)
                    o_partner = partner + i_partner.to(tl.int64)[:, None] * partner_stride + column[None, :]
                    b_partner = tl.load(o_partner, mask=inside & there[:, None], other=0.0).to(tl.float32)
                    out += weight[:, None] * b_partner
            if sums is not None:
                b_x = tl.load(o_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
                out -= along[:, None] * b_x
            tl.store(o_grad + column[None, :], out * back, mask=inside)
