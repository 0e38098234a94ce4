"""Triton code of the relative similarity loss: what one program of each kernel does. Launches stand in kernels.py.

Pairs are numbered row by row above the diagonal. In a workspace every width has its own part; `first` is the number of
the first width of a launch, program axis 1 counts on from there. Comparisons of scores are in float64.
"""

import triton
import triton.language as tl


@triton.jit
def _place(pair, batch):
    # Row * batch + column of a pair. The root may be off by one where it is nearly whole.
    p = pair.to(tl.int64)
    n = (2 * batch - 1).to(tl.int64)
    root = tl.sqrt((n * n - 8 * p).to(tl.float64))
    row = ((n.to(tl.float64) - root) * 0.5).to(tl.int64)
    row -= (row * (n - row) // 2 > p).to(tl.int64)
    row += ((row + 1) * (n - row - 1) // 2 <= p).to(tl.int64)
    column = p - row * (n - row) // 2 + row + 1
    return (row * batch + column).to(tl.int32)


@triton.jit
def _beyond(x, own, bound, KIND: tl.constexpr):
    # Of ascending x, false and then true. x not violated with `own` on the low side; violated with it on the high side;
    # more than `bound` above it; not more than `bound` below it.
    if KIND == "low":
        found = (bound - (x - own)) <= 0
    elif KIND == "high":
        found = (bound - (own - x)) > 0
    elif KIND == "above":
        found = (x > own) & (x - own > bound)
    else:
        found = (own <= x) | (own - x <= bound)
    return found


@triton.jit
def _first(ascending, own, bound, pairs, steps, KIND: tl.constexpr):
    # The first place from which on `_beyond` holds, or `pairs`: bisection.
    low = tl.zeros([own.shape[0]], tl.int32)
    high = low + pairs
    for _ in range(steps):
        middle = (low + high) >> 1
        x = tl.load(ascending + middle, mask=low < high, other=0.0).to(tl.float64)
        found = (low >= high) | _beyond(x, own, bound, KIND)
        low = tl.where(found, low, middle + 1)
        high = tl.where(found, tl.minimum(middle, high), high)
    return high


@triton.jit
def _float_of(key):
    # Floats in their order as integers: the bits, those of a negative number turned around.
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _limit(own, margin):
    # The smallest float32 that is not violated with `own` on the low side: bisection of all finite ones and infinity.
    low = tl.full([own.shape[0]], -0x7F800000, tl.int32)
    high = tl.full([own.shape[0]], 0x7F800000, tl.int32)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        found = _beyond(_float_of(middle).to(tl.float64), own, margin, "low")
        low = tl.where(found, low, middle + 1)
        high = tl.where(found, middle, high)
    return _float_of(high)


@triton.jit(do_not_specialize=["batch", "pairs", "first"])
def gather_kernel(
    scores,
    order,
    out,
    limits,
    bad,
    margin: tl.float64,
    batch,
    pairs,
    first,
    BLOCK: tl.constexpr,
):
    # Scores above the diagonal, in `order` or as they lie (the teacher's); 0 for what is not finite, which is noted.
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = x < pairs
    i_width = tl.program_id(1).to(tl.int64)
    if order is None:
        i_matrix = i_width
        o_place = _place(tl.minimum(x, pairs - 1), batch)
    else:
        i_matrix = first + i_width
        o_place = tl.load(order + x, mask=inside, other=0)
    b_score = tl.load(scores + i_matrix * batch * batch + o_place, mask=inside, other=0.0)
    finite = tl.abs(b_score) < float("inf")
    # -0.0 is written as 0.0: a radix sort may tell them apart.
    b_score = tl.where(finite & (b_score != 0), b_score, 0.0)
    tl.store(out + i_width * pairs + x, b_score, mask=inside)
    if limits is not None:
        tl.store(limits + i_width * pairs + x, _limit(b_score.to(tl.float64), margin), mask=inside)
    ill = tl.max((~finite).to(tl.int32), 0)
    if ill > 0:
        # Place 0 is the teacher's.
        tl.atomic_max(bad + i_matrix + (0 if order is None else 1), ill)


@triton.jit(do_not_specialize=["batch", "pairs", "steps"])
def windows_kernel(
    ascending,
    index,
    order,
    windows,
    gap: tl.float64,
    batch,
    pairs,
    steps,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # By t rank: the place in the matrix; one past the window and its begin; in mode "both" those of exact ties too.
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = x < pairs
    tl.store(order + x, _place(tl.load(index + x, mask=inside, other=0), batch), mask=inside)
    o_windows = windows + x
    size = tl.zeros([BLOCK], tl.int64) + pairs
    if MODE == "place":
        tl.store(o_windows, x + 1, mask=inside)
        tl.store(o_windows + size, x, mask=inside)
    else:
        own = tl.load(ascending + x, mask=inside, other=0.0).to(tl.float64)
        tl.store(o_windows, _first(ascending, own, gap, pairs, steps, "above"), mask=inside)
        tl.store(o_windows + size, _first(ascending, own, gap, pairs, steps, "below"), mask=inside)
        if MODE == "both":
            tl.store(o_windows + 2 * size, _first(ascending, own, 0.0, pairs, steps, "above"), mask=inside)
            tl.store(o_windows + 3 * size, _first(ascending, own, 0.0, pairs, steps, "below"), mask=inside)


@triton.jit
def _finish(on_low, violations, score, x, origin, order, gradient, partial, bad, margin, batch, pairs, first):
    # The program's part of the loss, and the gradient of its pairs: NaN where a score was not finite.
    i_width = tl.program_id(1).to(tl.int64)
    inside = x < pairs
    ill = tl.load(bad) + tl.load(bad + 1 + first + i_width)
    terms = pairs.to(tl.float64) * (pairs - 1).to(tl.float64) * 0.5
    scale = tl.where(ill > 0, float("nan"), 1.0 / terms)
    count = violations.to(tl.float64)
    share = margin * on_low.to(tl.float64) + (score - origin) * count
    total = tl.sum(tl.where(inside, share, 0.0), 0) * scale
    tl.store(partial + i_width * tl.num_programs(0) + tl.program_id(0), total)
    if gradient is not None:
        o_place = tl.load(order + x, mask=inside, other=0)
        o_gradient = gradient + (first + i_width) * batch * batch + o_place
        tl.store(o_gradient, (count * scale).to(gradient.dtype.element_ty), mask=inside)


# All pairs of pairs


@triton.jit(do_not_specialize=["batch", "pairs", "first"])
def brute_kernel(
    scores,
    limits,
    order,
    windows,
    gradient,
    partial,
    bad,
    margin: tl.float64,
    batch,
    pairs,
    first,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The pairs of a row of tiles against all others, by t rank. Sums of ones are exact in float32 below 2²⁴.
    i_width = tl.program_id(1).to(tl.int64)
    scores += i_width * pairs
    limits += i_width * pairs
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = x < pairs
    # Beyond the end, limits and scores such that nothing is violated.
    own = tl.load(scores + x, mask=inside, other=float("inf"))
    limit = tl.load(limits + x, mask=inside, other=float("-inf"))
    above = tl.load(windows + x, mask=inside, other=0)
    below = tl.load(windows + pairs + x, mask=inside, other=pairs)
    columns = tl.arange(0, COLUMNS)
    on_low = tl.zeros([ROWS, COLUMNS], tl.float32)
    on_high = tl.zeros([ROWS, COLUMNS], tl.float32)
    near = tl.min(below, 0) // COLUMNS * COLUMNS
    far = tl.minimum((tl.max(above, 0) + COLUMNS - 1) // COLUMNS * COLUMNS, pairs)
    for start in range(0, near, COLUMNS):
        b_limit = tl.load(limits + start + columns)
        on_high += tl.where(own[:, None] < b_limit[None, :], 1.0, 0.0)
    for start in range(near, far, COLUMNS):
        y = start + columns
        b_score = tl.load(scores + y, mask=y < pairs, other=float("inf"))
        b_limit = tl.load(limits + y, mask=y < pairs, other=float("-inf"))
        higher = y[None, :] >= above[:, None]
        lower = y[None, :] < below[:, None]
        if MODE == "both":
            tied_above = tl.load(windows + 2 * pairs.to(tl.int64) + x, mask=inside, other=0)
            tied_below = tl.load(windows + 3 * pairs.to(tl.int64) + x, mask=inside, other=pairs)
            higher |= (y[None, :] > x[:, None]) & (y[None, :] < tied_above[:, None])
            lower |= (y[None, :] < x[:, None]) & (y[None, :] >= tied_below[:, None])
        on_low += tl.where(higher & (b_score[None, :] < limit[:, None]), 1.0, 0.0)
        on_high += tl.where(lower & (own[:, None] < b_limit[None, :]), 1.0, 0.0)
    for start in range(far, pairs, COLUMNS):
        y = start + columns
        b_score = tl.load(scores + y, mask=y < pairs, other=float("inf"))
        on_low += tl.where(b_score[None, :] < limit[:, None], 1.0, 0.0)
    low = tl.sum(on_low, 1).to(tl.int32)
    high = tl.sum(on_high, 1).to(tl.int32)
    own = tl.where(inside, own, 0.0).to(tl.float64)
    origin = tl.load(scores + pairs // 2).to(tl.float64)
    _finish(low, low - high, own, x, origin, order, gradient, partial, bad, margin, batch, pairs, first)


# Counts by digits of the t rank


@triton.jit(do_not_specialize=["pairs", "steps"])
def positions_kernel(ascending, index, positions, margin: tl.float64, pairs, steps, BLOCK: tl.constexpr):
    # By t rank: how many are violated with the pair on the low side, not violated with it on the high side. Both are
    # prefixes of the order by S, in which neighbours search side by side.
    i_width = tl.program_id(1).to(tl.int64)
    ascending += i_width * pairs
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = x < pairs
    own = tl.load(ascending + x, mask=inside, other=0.0).to(tl.float64)
    rank = tl.load(index + i_width * pairs + x, mask=inside, other=0)
    o_positions = positions + 2 * (i_width * pairs + rank)
    tl.store(o_positions, _first(ascending, own, margin, pairs, steps, "low"), mask=inside)
    tl.store(o_positions + 1, _first(ascending, own, margin, pairs, steps, "high"), mask=inside)


@triton.jit(do_not_specialize=["pairs", "blocks", "supers", "shift"])
def count_kernel(
    ranks,
    digits,
    counts,
    sums,
    pairs,
    blocks,
    supers,
    shift,
    DIGIT_BITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SUPER_BITS: tl.constexpr,
):
    # Of a group of blocks: the digits; before each block of it, and in all, how many have at most a digit.
    RADIX: tl.constexpr = 1 << DIGIT_BITS
    BLOCK: tl.constexpr = 1 << BLOCK_BITS
    i_super = tl.program_id(0)
    i_width = tl.program_id(1).to(tl.int64)
    ranks += i_width * pairs
    digits += i_width * blocks << BLOCK_BITS
    counts += i_width * blocks * RADIX
    radix = tl.arange(0, RADIX)
    running = tl.zeros([RADIX], tl.int32)
    for i_block in range(i_super << SUPER_BITS, tl.minimum((i_super + 1) << SUPER_BITS, blocks)):
        x = (i_block << BLOCK_BITS) + tl.arange(0, BLOCK)
        inside = x < pairs
        digit = (tl.load(ranks + x, mask=inside, other=0).to(tl.int32) >> shift) & (RADIX - 1)
        tl.store(digits + x, digit.to(tl.uint8), mask=inside)
        tl.store(counts + i_block * RADIX + radix, running.to(tl.int16))
        # Beyond the end a digit that none is at most.
        digit = tl.where(inside, digit, RADIX)
        running += tl.sum((digit[:, None] <= radix[None, :]).to(tl.int32), 0)
    tl.store(sums + (i_width * supers + i_super) * RADIX + radix, running)


@triton.jit(do_not_specialize=["supers"])
def scan_kernel(sums, supers, RADIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # In place: each group's sums become those of all groups before it.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums += tl.program_id(1).to(tl.int64) * supers * RADIX
    before = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, supers, ROWS):
        rows = start + tl.arange(0, ROWS)
        o_sums = sums + rows[:, None] * RADIX + columns[None, :]
        inside = (rows < supers)[:, None] & (columns < RADIX)[None, :]
        b_sums = tl.load(o_sums, mask=inside, other=0)
        tl.store(o_sums, tl.cumsum(b_sums, 0) - b_sums + before[None, :], mask=inside)
        before += tl.sum(b_sums, 0)


@triton.jit
def _at_most(counts, sums, block, digit, some, DIGIT_BITS: tl.constexpr, SUPER_BITS: tl.constexpr):
    # How many before the block have at most the digit: below 0, none.
    some &= digit >= 0
    within = tl.load(counts + (block << DIGIT_BITS) + digit, mask=some, other=0).to(tl.int32)
    return within + tl.load(sums + (block >> SUPER_BITS << DIGIT_BITS) + digit, mask=some, other=0)


@triton.jit(do_not_specialize=["pairs", "blocks", "supers", "shift"])
def partition_kernel(
    ranks,
    counts,
    sums,
    out,
    pairs,
    blocks,
    supers,
    shift,
    DIGIT_BITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SUPER_BITS: tl.constexpr,
    LEAF_BITS: tl.constexpr,
    LAST: tl.constexpr,
):
    # One block, stably, into the nodes below: a node holds the t ranks that agree above `shift`, and begins at the
    # least of them, for t ranks are a permutation. In the last round only the bits within a leaf are kept.
    RADIX: tl.constexpr = 1 << DIGIT_BITS
    BLOCK: tl.constexpr = 1 << BLOCK_BITS
    i_block = tl.program_id(0)
    i_width = tl.program_id(1).to(tl.int64)
    ranks += i_width * pairs
    counts += i_width * blocks * RADIX
    sums += i_width * supers * RADIX
    x = (i_block << BLOCK_BITS) + tl.arange(0, BLOCK)
    inside = x < pairs
    rank = tl.load(ranks + x, mask=inside, other=0).to(tl.int32)
    digit = (rank >> shift) & (RADIX - 1)
    lower = tl.arange(0, BLOCK)
    same = (digit[:, None] == digit[None, :]) & (lower[:, None] < lower[None, :])
    place = tl.sum(same.to(tl.int32), 0)
    place += _at_most(counts, sums, i_block, digit, inside, DIGIT_BITS, SUPER_BITS)
    place -= _at_most(counts, sums, i_block, digit - 1, inside, DIGIT_BITS, SUPER_BITS)
    # All nodes before this one are full, with as many of each digit.
    place += (rank >> shift << shift) - (rank >> (shift + DIGIT_BITS) << shift)
    if LAST:
        leaf = rank & ((1 << LEAF_BITS) - 1)
        tl.store(out + (i_width * blocks << BLOCK_BITS) + place, leaf.to(tl.uint8), mask=inside)
    else:
        tl.store(out + i_width * pairs + place, rank, mask=inside)


@triton.jit
def _level(
    end,
    bound,
    digits,
    counts,
    sums,
    SHIFT: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SUPER_BITS: tl.constexpr,
):
    # Of the first `end` of the node that `bound` is in: how many have a lower digit, and how many have the same.
    RADIX: tl.constexpr = 1 << DIGIT_BITS
    BLOCK: tl.constexpr = 1 << BLOCK_BITS
    some = end > 0
    node = bound >> (SHIFT + DIGIT_BITS)
    digit = (bound >> SHIFT) & (RADIX - 1)
    last = (node << (SHIFT + DIGIT_BITS)) + end - 1
    block = last >> BLOCK_BITS
    lower = _at_most(counts, sums, block, digit - 1, some, DIGIT_BITS, SUPER_BITS)
    same = _at_most(counts, sums, block, digit, some, DIGIT_BITS, SUPER_BITS) - lower
    x = tl.arange(0, BLOCK)[None, :]
    o_digits = digits + (block << BLOCK_BITS)[:, None] + x
    b_digits = tl.load(o_digits, mask=some[:, None], other=0).to(tl.int32)
    upto = x <= (last & (BLOCK - 1))[:, None]
    lower += tl.sum((upto & (b_digits < digit[:, None])).to(tl.int32), 1)
    same += tl.sum((upto & (b_digits == digit[:, None])).to(tl.int32), 1)
    # The tables count from the first node on: those before are full.
    return tl.where(some, lower - (node * digit << SHIFT), 0), tl.where(some, same - (node << SHIFT), 0)


@triton.jit
def _within(
    end,
    bound,
    tree,
    LEVELS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LEAF_BITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SUPER_BITS: tl.constexpr,
):
    # How many of the first `end` by S have a t rank below `bound`: at every level those of the node with a lower digit,
    # then on to the node of the same digit, with as many as have it.
    digits, counts, sums, blocks, supers = tree
    widths = tl.num_programs(1).to(tl.int64)
    i_part = tl.program_id(1).to(tl.int64)
    found = tl.zeros_like(end)
    for level in tl.static_range(LEVELS):
        lower, end = _level(
            end,
            bound,
            digits + (i_part * blocks << BLOCK_BITS),
            counts + (i_part * blocks << DIGIT_BITS),
            sums + (i_part * supers << DIGIT_BITS),
            LEAF_BITS + DIGIT_BITS * (LEVELS - 1 - level),
            DIGIT_BITS,
            BLOCK_BITS,
            SUPER_BITS,
        )
        found += lower
        i_part += widths
    LEAF: tl.constexpr = 1 << LEAF_BITS
    x = tl.arange(0, LEAF)[None, :]
    o_digits = digits + (i_part * blocks << BLOCK_BITS) + (bound >> LEAF_BITS << LEAF_BITS)[:, None] + x
    b_digits = tl.load(o_digits, mask=(end > 0)[:, None], other=0).to(tl.int32)
    lower = (x < end[:, None]) & (b_digits < (bound & (LEAF - 1))[:, None])
    return found + tl.sum(lower.to(tl.int32), 1)


@triton.jit(do_not_specialize=["batch", "pairs", "blocks", "supers", "first"])
def query_kernel(
    scores,
    positions,
    order,
    windows,
    digits,
    counts,
    sums,
    gradient,
    partial,
    bad,
    margin: tl.float64,
    batch,
    pairs,
    blocks,
    supers,
    first,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LEAF_BITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SUPER_BITS: tl.constexpr,
):
    # Pairs by t rank: neighbours meet in the lower nodes, which then are in the cache.
    i_width = tl.program_id(1).to(tl.int64)
    scores += i_width * pairs
    x = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = x < pairs
    o_positions = positions + 2 * (i_width * pairs + x)
    violated = tl.load(o_positions, mask=inside, other=0)
    kept = tl.load(o_positions + 1, mask=inside, other=0)
    on_low = tl.zeros([ROWS], tl.int32)
    on_high = tl.zeros([ROWS], tl.int32)
    tree = digits, counts, sums, blocks, supers
    # The window; in mode "both" also without the own place, less without exact ties.
    for span in tl.static_range(3 if MODE == "both" else 1):
        if span == 1:
            above = tl.where(inside, x + 1, 0)
            below = tl.where(inside, x, 0)
        else:
            o_windows = windows + span * pairs.to(tl.int64) + x
            above = tl.load(o_windows, mask=inside, other=0)
            below = tl.load(o_windows + pairs, mask=inside, other=0)
        low = violated - _within(violated, above, tree, LEVELS, DIGIT_BITS, LEAF_BITS, BLOCK_BITS, SUPER_BITS)
        high = below - _within(kept, below, tree, LEVELS, DIGIT_BITS, LEAF_BITS, BLOCK_BITS, SUPER_BITS)
        on_low += -low if span == 2 else low
        on_high += -high if span == 2 else high
    own = tl.load(scores + x, mask=inside, other=0.0).to(tl.float64)
    origin = tl.load(scores + pairs // 2).to(tl.float64)
    _finish(on_low, on_low - on_high, own, x, origin, order, gradient, partial, bad, margin, batch, pairs, first)
