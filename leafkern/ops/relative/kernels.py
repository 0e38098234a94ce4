"""Triton kernels of the relative similarity loss: exact counts, by all pairs of pairs or by sorts. Not timed yet.

P = B(B-1)/2 pairs have ranks by T (ties in row-major order) and by S. With r_b, how many x are violated with b on the
low side, and l_a, how many are not violated with a on the high side, both prefixes of the order by S, the counts of a
pair are r_b - Q(r_b, one past b's window) and (first of a's window) - Q(l_a, first of a's window), where Q(end, bound)
is how many of the first `end` by S have a t rank below `bound`. A window holds what ties or lies within min_gap.

Both forms sort T once (torch.sort, a radix sort) and find the windows by bisection.

All pairs of pairs, for P of some ten thousands: margin and S_b give the smallest float32 that is not violated, found by
bisection of the float32 numbers with the comparison in float64. Then "violated" is one comparison of float32, which
side it is on tells the place in the order by T, and a tile is compared in registers: P² comparisons and additions of
float32 per width, nothing stored. 4 launches for all widths together, besides those of torch: the sort, two fills, and
the sum of the programs' parts.

By sorts: S is sorted, r and l are found by bisection side by side, and Q goes down a tree. At each of its L levels a
node holds the t ranks that agree in their upper bits, in the order of S; the next DIGIT_BITS divide it, leaves have
2^LEAF_BITS. Per level: the digits, one byte each, and before each block of 2^BLOCK_BITS how many have at most each
digit (16 bits, within a group of 2^SUPER_BITS blocks, plus 32 bits per group). A query adds two entries of such a table
to what it counts in one block. t ranks are a permutation, so a node begins at the least of them and all before it are
full: no node needs a table of its own.
Work per width, L = ceil((log2 P - LEAF_BITS) / DIGIT_BITS), 3 for B = 4096: 2·P·(L + 1)·64 comparisons of bytes in the
queries and 2·P·L·64 in building. In the machine code for sm_90 that is 7500 instructions per pair in the queries and
1500 in building (L = 3), for which an H200 at its full rate of issue needs 2.6 ms at B = 4096; all pairs of pairs take
2.6 instructions each. Bytes per pair: a sort some 110; gather, positions and gradient a sector of 32 bytes each,
scattered; a level 4 read twice and 4 scattered; a query per level 64 bytes and up to 4 sectors, those of the upper
levels from the second-level cache and those of the lower ones from lines that neighbours share. The 2·16·P·log2 P bytes
of the benchmark's limit take half the time of the instructions, which bind. 3 + 3·L launches for a group of widths and
2 for T, besides torch's.

Working memory per pair (float32): 12 bytes for T (20 with min_gap and ties="reference"), and for each width of a group
36 in the sort (48 where torch sorts several rows of less than a million at once, by rows in a second pass) and then up
to 38 in the tree, 50 in all; groups of widths are as large as GROUP_BYTES allows. Nothing waits for the GPU. No atomics
but on integers; a result depends on its inputs alone.

Errors: counts are integers. The loss is the sum of P terms in float64, in a tree: its error is at most
2⁻⁴⁶·(margin + the largest |S - S'|), before it is rounded to the scores' dtype.
"""

from dataclasses import dataclass

import torch
import triton

from leafkern.ops._core.cubin import Shipped
from leafkern.ops._core.launch import on_device
from leafkern.ops.relative.device import (
    brute_kernel,
    count_kernel,
    gather_kernel,
    partition_kernel,
    positions_kernel,
    query_kernel,
    scan_kernel,
    windows_kernel,
)

# Pairs of pairs over all widths up to which they are all compared. From the operation count; not measured.
BRUTE_WORK = 3 << 30
# Working memory that a group of more than one width may take, and what a width takes per pair: in torch's sort.
GROUP_BYTES, WIDTH_BYTES = 256 << 20, 48
BLOCK = 512
TILE = {"ROWS": 32, "COLUMNS": 64}
QUERIES = 32
SCAN = {"ROWS": 128, "COLUMNS": 16}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# The sums over a block then stay within threads: a third of the instructions.
COUNT_OPTIONS, PARTITION_OPTIONS = OPTIONS | {"num_warps": 2}, OPTIONS | {"num_warps": 1}


@dataclass(frozen=True)
class Tree:
    """How t ranks are cut: bits per level, of a leaf, of a block that is counted through (no fewer), and of a group of
    blocks (at most 15 with those of a block: its counts have 16 bits)."""

    digit: int = 6
    leaf: int = 6
    block: int = 6
    group: int = 5

    def levels(self, pairs: int) -> int:
        """Levels above the leaves, such that t ranks up to `pairs` have their place."""
        return max(1, -(-(pairs.bit_length() - self.leaf) // self.digit))

    @property
    def tables(self) -> dict:
        return {"DIGIT_BITS": self.digit, "BLOCK_BITS": self.block, "SUPER_BITS": self.group}


TREE = Tree()


def relative_scores(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    margin: float,
    reference_ties: bool,
    min_gap: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `autograd.relative_scores`, for 3 <= B <= autograd.MAX_BATCH. Strided scores are copied."""
    student, teacher = student_scores.contiguous(), teacher_scores.contiguous()
    widths, batch, _ = student.shape
    pairs = batch * (batch - 1) // 2
    losses = student.new_empty(widths)
    gradient = torch.zeros_like(student) if with_gradient else None
    bad = student.new_zeros(widths + 1, dtype=torch.int32)
    mode = ("both" if min_gap > 0 else "place") if reference_ties else "gap"
    brute = student.dtype == torch.float32 and widths * pairs * pairs <= BRUTE_WORK
    form = _all_pairs if brute else _by_sorts
    group = widths if brute else max(1, min(widths, GROUP_BYTES // (WIDTH_BYTES * pairs)))
    with on_device(student):
        order, windows = _by_teacher(teacher, bad, mode, min_gap)
        for first in range(0, widths, group):
            count = min(group, widths - first)
            parts = form(student, first, count, order, windows, mode, float(margin), gradient, bad)
            losses[first : first + count] = parts.sum(1)
    return losses, student.new_empty(0) if gradient is None else gradient


def _by_teacher(teacher, bad, mode: str, min_gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(t rank -> place in the matrix, windows by t rank)."""
    batch = teacher.shape[0]
    pairs = batch * (batch - 1) // 2
    grid = (triton.cdiv(pairs, BLOCK), 1)
    scores = teacher.new_empty(pairs)
    gather_kernel[grid](teacher, None, scores, None, bad, 0.0, batch, pairs, 0, BLOCK=BLOCK, **OPTIONS)
    ascending, index = scores.sort(stable=True)
    order = index.new_empty(pairs, dtype=torch.int32)
    windows = index.new_empty(4 if mode == "both" else 2, pairs, dtype=torch.int32)
    windows_kernel[grid](
        ascending,
        index,
        order,
        windows,
        float(min_gap),
        batch,
        pairs,
        pairs.bit_length(),
        MODE=mode,
        BLOCK=BLOCK,
        **OPTIONS,
    )
    return order, windows


def _gathered(student, first, count, order, bad, margin, limits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores (count, P) by t rank, and their limits."""
    pairs = order.shape[0]
    scores = student.new_empty(count, pairs)
    limits = torch.empty_like(scores) if limits else None
    grid = (triton.cdiv(pairs, BLOCK), count)
    gather_kernel[grid](
        student, order, scores, limits, bad, margin, student.shape[-1], pairs, first, BLOCK=BLOCK, **OPTIONS
    )
    return scores, limits


def _all_pairs(student, first, count, order, windows, mode: str, margin: float, gradient, bad) -> torch.Tensor:
    """Fills the gradients of widths [first, first + count); returns the losses' parts, (count, programs) float64."""
    pairs = order.shape[0]
    scores, limits = _gathered(student, first, count, order, bad, margin, limits=True)
    programs = triton.cdiv(pairs, TILE["ROWS"])
    parts = scores.new_empty(count, programs, dtype=torch.float64)
    brute_kernel[programs, count](
        scores,
        limits,
        order,
        windows,
        gradient,
        parts,
        bad,
        margin,
        student.shape[-1],
        pairs,
        first,
        MODE=mode,
        **TILE,
        **OPTIONS,
    )
    return parts


def _by_sorts(student, first, count, order, windows, mode: str, margin: float, gradient, bad) -> torch.Tensor:
    """As `_all_pairs`."""
    pairs = order.shape[0]
    levels, blocks = TREE.levels(pairs), triton.cdiv(pairs, 1 << TREE.block)
    supers, radix = triton.cdiv(blocks, 1 << TREE.group), 1 << TREE.digit
    scores, _ = _gathered(student, first, count, order, bad, margin, limits=False)
    ascending, ranks = scores.sort(stable=True)
    positions = order.new_empty(count, pairs, 2)
    positions_kernel[triton.cdiv(pairs, BLOCK), count](
        ascending, ranks, positions, margin, pairs, pairs.bit_length(), BLOCK=BLOCK, **OPTIONS
    )
    del ascending
    digits = order.new_empty(levels + 1, count, blocks << TREE.block, dtype=torch.uint8)
    counts = order.new_empty(levels, count, blocks, radix, dtype=torch.int16)
    sums = order.new_empty(levels, count, supers, radix)
    for level in range(levels):
        sizes = (pairs, blocks, supers, TREE.leaf + TREE.digit * (levels - 1 - level))
        count_kernel[supers, count](
            ranks, digits[level], counts[level], sums[level], *sizes, **TREE.tables, **COUNT_OPTIONS
        )
        scan_kernel[triton.cdiv(radix, SCAN["COLUMNS"]), count](sums[level], supers, RADIX=radix, **SCAN, **OPTIONS)
        last = level == levels - 1
        after = digits[levels] if last else order.new_empty(count, pairs)
        partition_kernel[blocks, count](
            ranks,
            counts[level],
            sums[level],
            after,
            *sizes,
            LEAF_BITS=TREE.leaf,
            LAST=last,
            **TREE.tables,
            **PARTITION_OPTIONS,
        )
        ranks = after
    programs = triton.cdiv(pairs, QUERIES)
    parts = scores.new_empty(count, programs, dtype=torch.float64)
    query_kernel[programs, count](
        scores,
        positions,
        order,
        windows,
        digits,
        counts,
        sums,
        gradient,
        parts,
        bad,
        margin,
        student.shape[-1],
        pairs,
        blocks,
        supers,
        first,
        MODE=mode,
        **_tree_constants(levels),
        **OPTIONS,
    )
    return parts


# What is shipped, for the proof without a GPU

TESTED = {
    "gather teacher fp32",
    "windows gap fp32",
    "all pairs gap",
    "positions fp32",
    "count i64",
    "scan",
    "partition i64",
    "query 3 gap fp32",
}


def shipped() -> list[Shipped]:
    """What is launched for B from 91 up (two to four levels) and, of these, for the modes and dtypes in use."""
    found = [_shipped("gather student with limits", gather_kernel, {"limits": "*fp32:16"}, {"BLOCK": BLOCK})]
    found += [_shipped("scan", scan_kernel, {}, {"RADIX": 1 << TREE.digit, **SCAN})]
    for mode in ("gap", "place", "both"):
        found += [_shipped(f"windows {mode}", windows_kernel, {}, {"MODE": mode, "BLOCK": BLOCK}, "fp32")]
        found += [_shipped(f"all pairs {mode}", brute_kernel, {"limits": "*fp32:16"}, {"MODE": mode, **TILE})]
        found += [_shipped_query(3, mode, "fp32")]
    for name, kernel in (("all pairs gap", brute_kernel), ("query 3 gap", query_kernel)):
        constants = TILE if kernel is brute_kernel else _tree_constants(3)
        more = {"limits": "*fp32:16", "gradient": None}
        found += [_shipped(f"{name}, no gradient", kernel, more, {"MODE": "gap", **constants})]
    for dtype in ("fp32", "fp64"):
        found += [_shipped("gather teacher", gather_kernel, {"order": None}, {"BLOCK": BLOCK}, dtype)]
        found += [_shipped("gather student", gather_kernel, {}, {"BLOCK": BLOCK}, dtype)]
        found += [_shipped("positions", positions_kernel, {}, {"BLOCK": BLOCK}, dtype)]
    found += [_shipped("windows gap", windows_kernel, {}, {"MODE": "gap", "BLOCK": BLOCK}, "fp64")]
    found += [_shipped_query(levels, "gap", dtype) for levels, dtype in ((2, "fp32"), (4, "fp32"), (3, "fp64"))]
    for ranks in ("i64", "i32"):
        types = {"ranks": f"*{ranks}:16"}
        found += [_shipped(f"count {ranks}", count_kernel, types, TREE.tables)]
        for last in (False, True):
            types = types | {"out": "*u8:16" if last else "*i32:16"}
            constants = {"LEAF_BITS": TREE.leaf, "LAST": last, **TREE.tables}
            name = f"partition {ranks}{' into leaves' if last else ''}"
            found += [_shipped(name, partition_kernel, types, constants)]
    return found


def _tree_constants(levels: int) -> dict:
    return {"ROWS": QUERIES, "LEVELS": levels, "LEAF_BITS": TREE.leaf, **TREE.tables}


def _shipped_query(levels: int, mode: str, dtype: str) -> Shipped:
    return _shipped(f"query {levels} {mode}", query_kernel, {}, {"MODE": mode, **_tree_constants(levels)}, dtype)


def _shipped(name: str, kernel, more: dict, constants: dict, dtype: str = "") -> Shipped:
    """`more`: types that differ from the usual ones; None: absent. dtype: of the scores, float32 where not named."""
    scores = f"*{dtype or 'fp32'}:16"
    types = dict.fromkeys(("scores", "out", "ascending", "gradient"), scores)
    types |= dict.fromkeys(("order", "windows", "positions", "bad", "sums"), "*i32:16")
    types |= {"limits": None, "index": "*i64:16", "digits": "*u8:16", "counts": "*i16:16", "partial": "*fp64:16"}
    types |= dict.fromkeys(("batch", "pairs", "first", "steps", "blocks", "supers", "shift"), "i32")
    types |= {"margin": "fp64", "gap": "fp64"} | more
    types = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    constants = constants | {argument: None for argument, kind in types.items() if kind is None}
    types = {argument: kind for argument, kind in types.items() if kind is not None}
    title = f"{name} {dtype}".strip()
    options = {count_kernel: COUNT_OPTIONS, partition_kernel: PARTITION_OPTIONS}.get(kernel, OPTIONS)
    return Shipped("relative", title, kernel, types, constants, options, tested=title in TESTED)
