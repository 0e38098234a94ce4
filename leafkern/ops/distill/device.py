"""The Triton kernels of the distillation losses; what they do, how they are cut and launched stands in kernels.py.

Arguments stand together by kind: tensors, strides, sizes and numbers, then what the compiler knows. A tensor that is
None leaves out the part of a kernel that needs it; several tensors of one kind come as a tuple. widths: the prefixes',
descending, all divisible by ALIGN. Planes: one matrix (rows, columns) per width, `plane` entries apart.
"""

import triton
import triton.language as tl

# Arguments whose value is no reason to compile a kernel again.
PLAIN = ["count", "batch", "first", "begin", "low", "high", "start", "parts", "tiles"]
# The inverse norm of a row below the clamp of n(x) = x / max(‖x‖, 1e-12), along which nothing is projected out.
CLAMPED = tl.constexpr(1e12)


@triton.jit
def _width(i_width, widths):
    # widths[i_width] for an index that is known only as the kernel runs.
    found = i_width * 0
    for k in tl.static_range(len(widths)):
        found = tl.where(i_width == k, widths[k], found)
    return found


@triton.jit
def _inverse(square):
    # 1 / max(‖x‖, 1e-12), 0 for x = 0; NaN stays.
    norm = tl.sqrt(square)
    inverse = tl.where(norm < 1e-12, CLAMPED, 1 / tl.where(norm == 0, 1.0, norm))
    return tl.where(norm == 0, 0.0, inverse)


@triton.jit(do_not_specialize=[*PLAIN, "rows"])
def norms_kernel(
    x, inverse, wide, x_stride, widths, batch, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # inverse (widths, batch): of every prefix of every row; wide: x in float32, (batch, widths[0]).
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros([ROWS], tl.float32)
    low = 0
    for step in range(len(widths)):
        k = len(widths) - 1 - step
        low = tl.multiple_of(low, ALIGN)
        high = tl.multiple_of(_width(k, widths), ALIGN)
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(low, high, COLUMNS):
            columns = at + tl.arange(0, COLUMNS)
            valid = (rows < batch)[:, None] & (columns < high)[None, :]
            b_x = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
            squares += b_x * b_x
            if wide is not None:
                tl.store(wide + rows[:, None] * widths[0] + columns[None, :], b_x, mask=valid)
        square += tl.sum(squares, 1)
        tl.store(inverse + k * batch + rows, _inverse(square), mask=rows < batch)
        low = high


@triton.jit
def _products(
    total, x, stride, i_rows, j_rows, m_i, m_j, low, high, PRECISION: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    # total + x[i_rows, low:high] · x[j_rows, low:high]ᵀ.
    for at in range(low, high, DEPTH):
        inner = at + tl.arange(0, DEPTH)
        m_inner = inner < high
        b_i = tl.load(x + i_rows[:, None] * stride + inner[None, :], mask=m_i[:, None] & m_inner[None, :], other=0.0)
        b_j = tl.load(x + j_rows[None, :] * stride + inner[:, None], mask=m_inner[:, None] & m_j[None, :], other=0.0)
        total = tl.dot(b_i, b_j, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=PLAIN)
def scores_kernel(
    x, inverse, targets, scores, teacher_scores, partial,
    x_stride, target_strides, columns, plane,
    widths, target_widths, rows, batch, first, begin, low, high,
    ALIGN: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    TARGET_DEPTH: tl.constexpr,
):  # fmt: skip
    # Cosines of rows first... with rows begin... of x, for every width, and of the targets: into scores, planes of
    # (rows, columns), and teacher_scores; partial: per program, the squared errors in the rows low...high.
    i_tile, j_tile = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_partial = i_tile * tl.num_programs(0) + j_tile
    if SYMMETRIC and j_tile < i_tile:
        if partial is not None:
            tl.store(partial + o_partial, 0.0)
        return
    lanes = tl.arange(0, TILE)
    i_local, j_local = i_tile * TILE + lanes, j_tile * TILE + lanes
    i_rows, j_rows = first + i_local, begin + j_local
    m_i, m_j = i_local < rows, j_local < columns
    taught = tl.zeros([TILE, TILE], tl.float32)
    for p in tl.static_range(len(targets)):
        taught = _products(
            taught,
            targets[p],
            target_strides[p],
            i_rows,
            j_rows,
            m_i,
            m_j,
            0,
            target_widths[p],
            PRECISION,
            TARGET_DEPTH,
        )
    inside = m_i[:, None] & m_j[None, :]
    # The place of a tile is 64-bit, places in it 32-bit: registers are short here.
    o_tile, o_mirror = TILE * (i_tile * columns + j_tile), TILE * (j_tile * columns + i_tile)
    # A tile above the diagonal also serves the rows that its columns are, where these are rows of the block.
    beyond = j_local >= (i_tile + 1) * TILE
    mirror = m_i[:, None] & (beyond & (j_local < rows))[None, :]
    if teacher_scores is not None:
        tl.store(teacher_scores + o_tile + lanes[:, None] * columns + lanes[None, :], taught, mask=inside)
        if SYMMETRIC:
            tl.store(teacher_scores + o_mirror + lanes[None, :] * columns + lanes[:, None], taught, mask=mirror)
    i_squares = tl.zeros([TILE], tl.float32)
    j_squares = tl.zeros([TILE], tl.float32)
    dots = tl.zeros([TILE, TILE], tl.float32)
    at = 0
    for step in range(len(widths)):
        k = len(widths) - 1 - step
        at = tl.multiple_of(at, ALIGN)
        end = tl.multiple_of(_width(k, widths), ALIGN)
        dots = _products(dots, x, x_stride, i_rows, j_rows, m_i, m_j, at, end, PRECISION, DEPTH)
        i_inverse = tl.load(inverse + k * batch + i_rows, mask=m_i, other=0.0)
        j_inverse = tl.load(inverse + k * batch + j_rows, mask=m_j, other=0.0)
        cosines = dots * i_inverse[:, None] * j_inverse[None, :]
        if partial is not None:
            error = cosines - taught
            i_squares += tl.sum(error * error, 1)
            if SYMMETRIC:
                j_squares += tl.sum(error * error, 0)
        if scores is not None:
            o_scores = scores + tl.cast(plane, tl.int64) * k
            tl.store(o_scores + o_tile + lanes[:, None] * columns + lanes[None, :], cosines, mask=inside)
            if SYMMETRIC:
                tl.store(o_scores + o_mirror + lanes[None, :] * columns + lanes[:, None], cosines, mask=mirror)
        at = end
    if partial is not None:
        squares = tl.sum(tl.where((i_rows >= low) & (i_rows < high), i_squares, 0.0), 0)
        if SYMMETRIC:
            squares += tl.sum(tl.where(beyond & (j_rows >= low) & (j_rows < high), j_squares, 0.0), 0)
        tl.store(partial + o_partial, squares)


@triton.jit(do_not_specialize=["count", "flat"])
def weights_kernel(
    scores, teacher_scores, pairs, inverse, row_sums, column_sums,
    columns, plane, rows, count, flat, batch, first, begin, scale, pair_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # scores, planes of (rows, columns), become weights: g, the gradient by a cosine, times both inverse norms, summed
    # from the widest prefix down. row_sums (programs of columns, count, rows) and column_sums (programs of rows, count,
    # columns): g · cosine. pairs (count, batch, batch): gradients of the relative term, above the diagonal. flat: the
    # place of a prefix of width 1, or -1: its cosines are signs, whose gradient is exactly 0.
    i_program, j_program = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_lanes, j_lanes = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    i_local, j_local = i_program * ROWS + i_lanes, j_program * COLUMNS + j_lanes
    i_rows, j_rows = first + i_local, begin + j_local
    m_i, m_j = i_local < rows, j_local < columns
    inside = m_i[:, None] & m_j[None, :]
    # The place of a tile is 64-bit, places in it 32-bit: registers are short here.
    i_first, j_first = first + i_program * ROWS, begin + j_program * COLUMNS
    o_tile = i_program * ROWS * columns + j_program * COLUMNS
    # Only tiles that the diagonal crosses read both sides of it.
    above = m_i[:, None] & (j_local < tl.where(j_first + COLUMNS > i_first, columns, 0))[None, :]
    below = m_j[None, :] & (i_local < tl.where(i_first + ROWS > j_first, rows, 0))[:, None]
    taught = tl.load(teacher_scores + o_tile + i_lanes[:, None] * columns + j_lanes[None, :], mask=inside, other=0.0)
    weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(count):
        p_scores = scores + tl.cast(plane, tl.int64) * k + o_tile + i_lanes[:, None] * columns + j_lanes[None, :]
        cosines = tl.load(p_scores, mask=inside, other=0.0)
        slope = scale * (cosines - taught)
        if pairs is not None:
            o_pairs = pairs + tl.cast(batch, tl.int64) * batch * k
            o_above, o_below = o_pairs + i_first * batch + j_first, o_pairs + j_first * batch + i_first
            b_above = tl.load(o_above + i_lanes[:, None] * batch + j_lanes[None, :], mask=above, other=0.0)
            b_below = tl.load(o_below + j_lanes[None, :] * batch + i_lanes[:, None], mask=below, other=0.0)
            slope += pair_scale * tl.where(i_rows[:, None] < j_rows[None, :], b_above, 0.0)
            slope += pair_scale * tl.where(i_rows[:, None] > j_rows[None, :], b_below, 0.0)
        i_inverse = tl.load(inverse + k * batch + i_rows, mask=m_i, other=0.0)
        j_inverse = tl.load(inverse + k * batch + j_rows, mask=m_j, other=0.0)
        # By a product: NaN stays.
        signs = (i_inverse != CLAMPED)[:, None] & (j_inverse != CLAMPED)[None, :]
        slope *= 1.0 - tl.where(k == flat, signs.to(tl.float32), 0.0)
        along = slope * cosines
        tl.store(row_sums + (j_program * count + k) * rows + i_local, tl.sum(along, 1), mask=m_i)
        if column_sums is not None:
            tl.store(column_sums + (i_program * count + k) * columns + j_local, tl.sum(along, 0), mask=m_j)
        weight += slope * i_inverse[:, None] * j_inverse[None, :]
        tl.store(p_scores, weight, mask=inside)


@triton.jit
def _along(x, target, width, COLUMNS: tl.constexpr):
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(0, width, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)
        b_x = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
        total += b_x * tl.load(target + columns, mask=columns < width, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _finish(
    x, gradient, target, sums, inverse, widths, width, offset, i_row, i_own, rows, batch, parts,
    along, x_inverse, scale, ADDED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Columns offset... of a row of the gradient; target: the teacher's part that stands beside them, or None.
    for at in range(0, width, COLUMNS):
        place = at + tl.arange(0, COLUMNS)
        inside = place < width
        columns = offset + place
        b_x = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        found = tl.zeros([COLUMNS], tl.float32)
        if ADDED:
            found += tl.load(gradient + columns, mask=inside & (columns < widths[0]), other=0.0)
        if sums is not None:
            coefficients = tl.zeros([COLUMNS], tl.float32)
            for k in range(len(widths)):
                projected = tl.zeros([PARTS], tl.float32)
                for begin in range(0, parts, PARTS):
                    i_part = begin + tl.arange(0, PARTS)
                    o_sums = (i_part.to(tl.int64) * len(widths) + k) * rows + i_own
                    projected += tl.load(sums + o_sums, mask=i_part < parts, other=0.0)
                k_inverse = tl.load(inverse + k * batch + i_row)
                k_inverse = tl.where(k_inverse == CLAMPED, 0.0, k_inverse)
                coefficient = tl.sum(projected, 0) * k_inverse * k_inverse
                coefficients += tl.where(columns < _width(k, widths), coefficient, 0.0)
            found -= coefficients * b_x
        if target is not None:
            b_target = tl.load(target + place, mask=inside, other=0.0)
            unclamped = tl.where(x_inverse == CLAMPED, 0.0, x_inverse)
            found -= scale * x_inverse * (b_target - along * unclamped * unclamped * b_x)
        tl.store(gradient + columns, found, mask=inside)


@triton.jit(do_not_specialize=[*PLAIN, "rows"])
def finish_kernel(
    x, gradient, targets, sums, inverse, full_inverse, cosines,
    x_stride, target_strides, widths, target_widths, width, rows, batch, start, parts, scale,
    ADDED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Completes the gradient of one of the rows start... of x, of which other terms' is there if ADDED, up to widths[0].
    # sums (parts, widths, rows), of weights_kernel: what unit vectors do not feel is taken out. cosines: s · t per row;
    # `scale` times the gradient of the cosine term is put in. Either may be None.
    i_own = tl.program_id(0).to(tl.int64)
    i_row = start + i_own
    x += i_row * x_stride
    along = 0.0
    x_inverse = 0.0
    if cosines is not None:
        offset = 0
        for p in tl.static_range(len(targets)):
            along += _along(x + offset, targets[p] + i_row * target_strides[p], target_widths[p], COLUMNS)
            offset += target_widths[p]
        x_inverse += tl.load(full_inverse + i_row)
        tl.store(cosines + i_own, along * x_inverse)
        # The gradient of a sign is exactly 0; by a product: NaN stays.
        scale *= tl.where((width == 1) & (x_inverse != CLAMPED), 0.0, 1.0)
    if gradient is not None:
        gradient += i_own * width
        if cosines is None:
            _finish(
                x, gradient, None, sums, inverse, widths, width, 0, i_row, i_own, rows, batch, parts,
                along, x_inverse, scale, ADDED, COLUMNS, PARTS,
            )  # fmt: skip
        else:
            offset = 0
            for p in tl.static_range(len(targets)):
                _finish(
                    x, gradient, targets[p] + i_row * target_strides[p], sums, inverse, widths, target_widths[p],
                    offset, i_row, i_own, rows, batch, parts, along, x_inverse, scale, ADDED, COLUMNS, PARTS,
                )  # fmt: skip
                offset += target_widths[p]


@triton.jit
def _sum(values, count, ENTRIES: tl.constexpr):
    total = tl.zeros([ENTRIES], tl.float64)
    for begin in range(0, count, ENTRIES):
        place = begin + tl.arange(0, ENTRIES)
        total += tl.load(values + place, mask=place < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=[*PLAIN, "rows"])
def join_kernel(
    partial, cosines, losses, total, cosine, similarity, relative, tiles, rows, count,
    cosine_weight, similarity_weight, relative_weight, cosine_share, similarity_share, relative_share,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    # The terms, each a share times a sum, and their weighted sum; a term without values is 0.
    found_cosine = tl.zeros([], tl.float64)
    found_similarity = tl.zeros([], tl.float64)
    found_relative = tl.zeros([], tl.float64)
    if cosines is not None:
        found_cosine += (rows - _sum(cosines, rows, ENTRIES)) * cosine_share
    if partial is not None:
        found_similarity += _sum(partial, tiles, ENTRIES) * similarity_share
    if losses is not None:
        found_relative += _sum(losses, count, ENTRIES) * relative_share
    found = found_cosine * cosine_weight + found_similarity * similarity_weight + found_relative * relative_weight
    tl.store(total, found.to(tl.float32))
    if cosine is not None:
        tl.store(cosine, found_cosine.to(tl.float32))
        tl.store(similarity, found_similarity.to(tl.float32))
        tl.store(relative, found_relative.to(tl.float32))


@triton.jit(do_not_specialize=[*PLAIN, "rows"])
def alignment_kernel(
    student, teacher, gradient, losses, student_stride, teacher_stride, rows, share,
    WIDTH: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Per row the loss, and its gradient times `share`.
    i_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    m_rows = i_rows < rows
    inside = m_rows[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(student + i_rows[:, None] * student_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + i_rows[:, None] * teacher_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE or KIND == "cosine":
        inverse = _inverse(tl.sum(x * x, 1))
        x *= inverse[:, None]
    if KIND == "cosine":
        t *= _inverse(tl.sum(t * t, 1))[:, None]
        loss = 1 - tl.sum(x * t, 1)
        slope = -t
    else:
        error = x - t
        square = tl.sum(error * error, 1)
        loss = square
        slope = 2 * error
        if KIND == "l2":
            loss = tl.sqrt(square)
            slope = error / tl.where(loss == 0, 1.0, loss)[:, None]
    tl.store(losses + i_rows, loss, mask=m_rows)
    if gradient is not None:
        if NORMALIZE or KIND == "cosine":
            along = tl.where(inverse == CLAMPED, 0.0, tl.sum(slope * x, 1))
            slope = (slope - along[:, None] * x) * inverse[:, None]
            if WIDTH == 1:
                # The gradient of a sign is exactly 0; by a product: NaN stays.
                slope *= tl.where(inverse == CLAMPED, 1.0, 0.0)[:, None]
        tl.store(gradient + i_rows[:, None] * WIDTH + columns[None, :], slope * share, mask=inside)
