"""The Triton kernels of search themselves; how they are cut and launched, and why their result is exact, stands in
kernels.py.

FORM says what a row holds: "int8", "int4", "bits" (packed as in `Quantized`; FLIP: with the highest bit of each byte
turned over), "fp8" (e4m3 as it is, for the matrix units that take it), "fp8 bytes" (its bits, from which float16 / 256
is made here) or "float" (as the pointer says). A tensor that is None leaves out the part of a kernel that needs it.
"""

import triton
import triton.language as tl

from leafkern.ops.retrieval.reference import LAST_ID, NO_ROW

# Below every integer score.
LOWEST = -(1 << 31)

_LOWEST = tl.constexpr(LOWEST)
_LAST_ID = tl.constexpr(LAST_ID)
_NO_ROW = tl.constexpr(NO_ROW)

# Arguments whose value is no reason to compile a kernel again.
PLAIN = ["rows", "number", "tiles", "share", "query_blocks", "count", "blocks"]
# Tensors that may begin anywhere in memory.
SLICES = ["allowed", "scale"]


@triton.jit
def _entries(o_x, d, WIDTH: tl.constexpr, FORM: tl.constexpr, FLIP: tl.constexpr, DEPTH: tl.constexpr):
    # Entries d to d + DEPTH of the rows at o_x: [ROWS, DEPTH] int8 or float. Beyond the width they are those of codes
    # 0, or whatever the last byte holds: queries are 0 there.
    PER_BYTE: tl.constexpr = 2 if FORM == "int4" else 8 if FORM == "bits" else 1
    column = d // PER_BYTE + tl.arange(0, DEPTH // PER_BYTE)
    if WIDTH % DEPTH == 0:
        b_x = tl.load(o_x + column[None, :])
    else:
        inside = column < (WIDTH + PER_BYTE - 1) // PER_BYTE
        b_x = tl.load(o_x + column[None, :], mask=inside[None, :], other=0.0)
    if FORM == "int4":
        shift = (tl.arange(0, 2) * 4).to(tl.uint8)
        b_x = ((b_x[:, :, None] >> shift[None, None, :]) & 15).to(tl.int8) - 8
        b_x = tl.reshape(b_x, [b_x.shape[0], DEPTH])
    if FORM == "bits":
        if FLIP:
            b_x = b_x ^ 0x80
        shift = (7 - tl.arange(0, 8)).to(tl.uint8)
        b_x = ((b_x[:, :, None] >> shift[None, None, :]) & 1).to(tl.int8) * 2 - 1
        b_x = tl.reshape(b_x, [b_x.shape[0], DEPTH])
    if FORM == "fp8 bytes":
        wide = b_x.to(tl.uint16)
        b_x = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return b_x


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def scan_kernel(
    queries, factor, base, scale, allowed, maxima, part_stride, q_stride, base_stride, rows, number, tiles, share,
    query_blocks,
    WIDTH: tl.constexpr, FORM: tl.constexpr, FLIP: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The largest score of QUERIES queries in each of `share` tiles of ROWS rows. Queries are padded with zeros to whole
    # blocks; PARTS of them add up to a query. RESIDENT: they are loaded once. Of floats, a score that isn't finite
    # counts as infinite.
    i_block = tl.program_id(0) % query_blocks
    first = tl.program_id(0) // query_blocks * share
    i_query = i_block * QUERIES + tl.arange(0, QUERIES)
    o_q = queries + i_query.to(tl.int64)[:, None] * q_stride
    o_maxima = maxima + i_query.to(tl.int64) * tiles
    if factor is not None:
        b_factor = tl.load(factor + i_query)
    INTEGER: tl.constexpr = FORM == "int8" or FORM == "int4" or FORM == "bits"
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    inner = tl.arange(0, DEPTH)[None, :]
    # By itself, the matrix unit adds products of fp8 in 14 bits: what it has is added in float32 after each step.
    IMPRECISE: tl.constexpr = DEPTH if FORM == "fp8" else None
    kept = ()
    if RESIDENT:
        for d in tl.static_range(0, WIDTH, DEPTH):
            kept += (tl.load(o_q + d + inner),)
    wide = (tiles * 0).to(tl.int64)
    for i_tile in range(first, tl.minimum(first + share, tiles)):
        start = (wide + i_tile) * ROWS
        # Rows beyond the last are the last again, which changes no maximum.
        i_row = tl.minimum(tl.arange(0, ROWS), tl.minimum(rows - 1 - start, ROWS - 1).to(tl.int32))
        o_x = base + start * base_stride + i_row.to(tl.int64)[:, None] * base_stride
        total = tl.zeros([QUERIES, ROWS], kind)
        if RESIDENT:
            for d in tl.static_range(0, WIDTH, DEPTH):
                b_x = tl.trans(_entries(o_x, d, WIDTH, FORM, FLIP, DEPTH))
                b_q = kept[d // DEPTH]
                total = tl.dot(b_q, b_x, total, PRECISION, max_num_imprecise_acc=IMPRECISE, out_dtype=kind)
        else:
            for d in range(0, WIDTH, DEPTH):
                b_x = tl.trans(_entries(o_x, d, WIDTH, FORM, FLIP, DEPTH))
                for part in tl.static_range(PARTS):
                    b_q = tl.load(o_q + part * part_stride + d + inner)
                    total = tl.dot(b_q, b_x, total, PRECISION, max_num_imprecise_acc=IMPRECISE, out_dtype=kind)
        if factor is not None:
            total *= b_factor[:, None]
        if scale is not None:
            total *= tl.load(scale + start + i_row)[None, :]
        if not INTEGER:
            total = tl.where(tl.abs(total) < float("inf"), total, float("inf"))
        if allowed is not None:
            b_allowed = tl.load(allowed + start + i_row) != 0
            total = tl.where(b_allowed[None, :], total, _LOWEST if INTEGER else float("-inf"))
        tl.store(o_maxima + i_tile, tl.max(total, 1), mask=i_query < number)


@triton.jit
def _ones(x):
    # The compiler knows this way of counting set bits of uint32 and takes the instruction for it.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def bits_kernel(
    planes, base, allowed, maxima, base_stride, rows, number, tiles, share,
    FLIPPED: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # As scan_kernel, for few queries and rows of WORDS words of 32 bits, base_stride * ALIGN apart: their bits of value
    # 2^p are in plane p, and the last of several planes is negative, as of two's complement; counted is the sum over
    # set bits. One plane, of signs: minus the number of different bits. Either is in order with the score.
    first = tl.program_id(0) * share
    column = tl.arange(0, COLUMNS)
    inside = column < WORDS
    one = number * 0 + 1
    TOP: tl.constexpr = 1 << (PLANES - 1)
    wide = (tiles * 0).to(tl.int64)
    for i_tile in range(first, tl.minimum(first + share, tiles)):
        start = (wide + i_tile) * ROWS
        i_row = tl.minimum(tl.arange(0, ROWS), tl.minimum(rows - 1 - start, ROWS - 1).to(tl.int32))
        o_x = base + start * (base_stride * ALIGN) + i_row.to(tl.int64)[:, None] * (base_stride * ALIGN)
        b_x = tl.load(o_x + column[None, :], mask=inside[None, :], other=0) ^ FLIPPED
        if allowed is not None:
            b_allowed = tl.load(allowed + start + i_row) != 0
        for i_query in range(0, number):
            o_plane = planes + i_query * (PLANES * WORDS) + column
            total = tl.zeros([ROWS, COLUMNS], tl.int32)
            if PLANES == 1:
                b_plane = tl.load(o_plane, mask=inside, other=0)
                total -= _ones(tl.where(inside[None, :], b_x ^ b_plane[None, :], 0))
            else:
                # Not unrolled: a shift by a constant would be joined with the count's own and hide it.
                for p in range(0, PLANES):
                    b_plane = tl.load(o_plane + p * WORDS, mask=inside, other=0)
                    # 1, 2, 4 and so on, the last negative.
                    weight = ((one << p) ^ TOP) - TOP
                    total += _ones(b_x & b_plane[None, :]) * weight
            score = tl.sum(total, 1)
            if allowed is not None:
                score = tl.where(b_allowed, score, _LOWEST)
            tl.store(maxima + (wide + i_query) * tiles + i_tile, tl.max(score, 0))


@triton.jit
def _ordered(x):
    # A score as an integer in the same order, as `reference.keys_of` makes it.
    if x.dtype == tl.float32:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        x = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return x.to(tl.int64)


@triton.jit(do_not_specialize=PLAIN)
def key_kernel(
    maxima, chosen, keys, tiles, count, blocks,
    GROUP: tl.constexpr, PLACES: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    # Of `count` groups of tiles per query, those in `chosen` or all: the keys (maximum, lower tile) of their tiles;
    # BEST: the keys (largest maximum, lower group) of the groups.
    i_query = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * PLACES + tl.arange(0, PLACES)
    live = place < count
    o_place = i_query * count + place
    group = place.to(tl.int64)
    if chosen is not None:
        group = tl.load(chosen + o_place, mask=live, other=0)
    tile = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = live[:, None] & (tile < tiles)
    key = _ordered(tl.load(maxima + i_query * tiles + tile, mask=there, other=0)) << 32
    if BEST:
        key = tl.max(tl.where(there, key, _NO_ROW), 1) + (_LAST_ID - group)
        tl.store(keys + o_place, key, mask=live)
    else:
        key = tl.where(there, key + (_LAST_ID - tile), _NO_ROW)
        tl.store(keys + (o_place * GROUP)[:, None] + tl.arange(0, GROUP)[None, :], key, mask=live[:, None])


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SLICES)
def score_kernel(
    queries, factor, base, scale, allowed, chosen, keys, q_stride, base_stride, rows, count,
    WIDTH: tl.constexpr, FORM: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # The keys (score, lower id) of the rows of one of the `count` tiles chosen for a query. A score of a float that
    # isn't finite is NaN, and so comes first.
    i_place = tl.program_id(0).to(tl.int64)
    i_query = i_place // count
    start = tl.load(chosen + i_place) * ROWS
    place = tl.arange(0, ROWS)
    live = place < rows - start
    i_row = tl.minimum(place, tl.minimum(rows - 1 - start, ROWS - 1).to(tl.int32))
    o_q = queries + i_query * q_stride + tl.arange(0, DEPTH)
    o_x = base + start * base_stride + i_row.to(tl.int64)[:, None] * base_stride
    INTEGER: tl.constexpr = FORM == "int8" or FORM == "int4" or FORM == "bits"
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros([ROWS], kind)
    for d in range(0, WIDTH, DEPTH):
        b_x = _entries(o_x, d, WIDTH, FORM, FLIP, DEPTH).to(kind)
        total += tl.sum(b_x * tl.load(o_q + d).to(kind)[None, :], 1)
    if not INTEGER:
        if factor is not None:
            total *= tl.load(factor + i_query)
        if scale is not None:
            total *= tl.load(scale + start + i_row)
        total = tl.where(tl.abs(total) < float("inf"), total, float("nan"))
    if allowed is not None:
        live = live & (tl.load(allowed + start + i_row) != 0)
    key = (_ordered(total) << 32) + (_LAST_ID - start - place)
    tl.store(keys + i_place * ROWS + place, tl.where(live, key, _NO_ROW))
