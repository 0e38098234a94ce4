"""Triton kernels of similarity_loss, distill_loss and alignment_loss, value and gradient together. Not timed yet.

Work. B rows in all ranks, b of them here, K prefix widths d_1 > ... > d_K of D, teachers D_t wide together, s bytes per
entry of the student. Raw dot products of prefixes add up from narrow to wide, so that all widths cost one product of
width d_1; inverse norms, K·B floats, make them cosines; no unit rows are formed.
- norms: one launch. Reads s·B·D bytes; of half precision writes a float32 copy, 4·B·d_1, for the gradient's products.
- scores: one launch over square tiles. With the whole batch here only tiles on and above the diagonal are formed,
  B²·(d_1 + D_t) operations, else 2·b·B·(d_1 + D_t). At a width's end the tile is in registers: cosine, squared error.
  Without a gradient and the relative term nothing else is written, 4 bytes per tile.
- weights: one launch, of bytes. A width's gradient by the cosine, g, times both inverse norms, summed from the widest
  prefix down, in the place of the cosines: 8·K + 4 bytes per pair of rows, and 4·K for the relative term, whose
  gradient stands above the diagonal only. Sums of g · cosine over rows give what is projected out.
- products: K launches of the library's, weights by rows, one per segment of the columns: 2·b·B·d_1 operations.
- finish: one launch. Projections, and the cosine term with its gradient: 2·s·b·D + 4·b·D_t bytes read, 8·b·D for the
  gradient. join: one launch of one program adds up the parts.
Together K + 5 launches, and those of the relative term; 3 for the value of similarity alone. Sums that programs share
are joined in order, in float64 for the losses: no atomics, nothing on the host.

A block of rows' cosines is stored, (K + 1)·4 bytes per pair of rows, because forming them again would cost d_1 + D_t
multiply-adds per pair, and because a library's product of the weights with the rows is the fastest there is. Without
the relative term blocks take at most BLOCK bytes whatever B (one row's cosines, if that is more: B > 11 million for
K = 5), and with several of them the mirrored halves of the weights serve the rows below. With the relative term, which
sorts all cosines, (2·K + 1)·4·B² bytes with the gradient by them. For batches that are large against the widths
the D×D form of gram.py takes fewer operations; it is chosen by their count where float64 has matrix units.

Precision. float32 products are IEEE, or TF32 where torch.backends.cuda.matmul allows it; half precision
enters the matrix units as it is, with float32 sums. The gradient's products take float32 weights and rows on both
sides: weights rounded to bfloat16 would be off by up to 2⁻⁹ each, and by more of what the projections leave of them,
beside a tolerance of 1e-2. Cosines, errors, weights and norms are float32.

alignment_loss: one launch over rows, held in registers between loads and stores: s·B·D + 4·B·D bytes read, 4·B·D
written with the gradient, some 10 operations per entry; and join.

Memory. Rows may lie apart; where the entries of a row are not adjacent, a tensor is copied. Addresses of tiles are
64-bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from leafkern.ops._core.cubin import Shipped
from leafkern.ops._core.launch import (
    Config,
    multiprocessors,
    next_power_of_2,
    norm_config,
    on_device,
    precision,
    unit_columns,
)
from leafkern.ops.distill.device import (
    alignment_kernel,
    finish_kernel,
    join_kernel,
    norms_kernel,
    scores_kernel,
    weights_kernel,
)
from leafkern.ops.distill.gram import gram_is_cheaper, gram_similarity
from leafkern.ops.distill.reference import KINDS
from leafkern.ops.relative.autograd import relative_scores

# Bytes of a block of rows' scores, of all widths and the teacher.
BLOCK = 256 << 20
# Programs of one launch that keeps a partial sum of each and nothing else.
MOST_TILES = 1 << 22
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
WEIGHTS = Config(rows=32, columns=64, warps=8, programs=2)
JOIN = {"ENTRIES": 1024}


def _norms_constants(widths: Sequence[int]) -> dict:
    """8 entries of a tile per thread."""
    columns = min(next_power_of_2(widths[0]), 1024)
    return {"ALIGN": math.gcd(16, *widths), "ROWS": 1024 // columns, "COLUMNS": columns}


def _scores_constants(dims: Sequence[int], tile: int, half: bool, symmetric: bool, precision: str) -> dict:
    """half: x is in half precision, so that its products are those of the matrix units and deep."""
    return {
        "ALIGN": math.gcd(16, *dims),
        "SYMMETRIC": symmetric,
        "PRECISION": precision,
        "TILE": tile,
        "DEPTH": 64 if half else 16,
        "TARGET_DEPTH": 16,
    }


def _scores_options(tile: int, spread: bool) -> dict:
    """16 entries of each of a tile's two sums per thread, or 8. Told nothing, ptxas spills to win occupancy that the
    launch doesn't use, but not in the kernel that stores float32 products (spread), where it spills if told."""
    config = Config(rows=tile, columns=tile, warps=tile // 8, programs=1 if tile == 64 else 3)
    return {name: value for name, value in config.options.items() if not spread or name != "maxnreg"}


def _finish_constants(width: int, added: bool) -> dict:
    return {"ADDED": added, "COLUMNS": min(next_power_of_2(width), 1024), "PARTS": 16}


def _alignment_constants(width: int, kind: int, normalize: bool) -> dict:
    config = norm_config(width, backward=True)
    return {
        "WIDTH": width,
        "KIND": KINDS[kind],
        "NORMALIZE": normalize,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
    }


def _floats(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device=x.device, dtype=torch.float32)


@dataclass(frozen=True)
class _Rows:
    """What the passes over blocks share. x (B, D): the rows of all ranks; targets: their teachers' parts; inverse
    (K, B): the inverse norms of the prefixes `dims`; wide: x in float32, where a gradient is wanted."""

    x: torch.Tensor
    targets: tuple[torch.Tensor, ...]
    dims: tuple[int, ...]
    inverse: torch.Tensor
    wide: torch.Tensor | None

    @property
    def segments(self) -> list[slice]:
        """Of the columns, from the widest prefix down, what the next one leaves out."""
        return [slice(low, high) for high, low in zip(self.dims, (*self.dims[1:], 0))]


def _norms(x: torch.Tensor, widths: Sequence[int], with_wide: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverse norms (K, B) of all prefixes of the rows of x, and x in float32 if that is asked for."""
    copied = with_wide and x.dtype != torch.float32
    inverse, wide = _floats(x, len(widths), len(x)), _floats(x, len(x), widths[0]) if copied else None
    constants = _norms_constants(widths)
    norms_kernel[triton.cdiv(len(x), constants["ROWS"]),](
        x, inverse, wide, x.stride(0), tuple(widths), len(x), **constants, **OPTIONS
    )
    return inverse, wide if copied else x if with_wide else None


def _scores(
    held: _Rows,
    block: range,
    begin: int,
    own: range,
    symmetric: bool,
    scores: torch.Tensor | None,
    taught: torch.Tensor | None,
    partial: torch.Tensor | None,
) -> None:
    """Cosines of the rows `block` with rows begin... into scores (K, b, B - begin), and of their targets into taught;
    squared errors of the rows `own` into partial. symmetric: begin is the block's first row, and own holds all rows or
    the block does."""
    batch, tile, half = len(held.x), _tile(held.x), held.x.dtype != torch.float32
    scores_kernel[_grid(held.x, block, begin)](
        held.x,
        held.inverse,
        held.targets,
        scores,
        taught,
        partial,
        held.x.stride(0),
        tuple(t.stride(0) for t in held.targets),
        batch - begin,
        len(block) * (batch - begin),
        held.dims,
        tuple(t.shape[1] for t in held.targets),
        len(block),
        batch,
        block.start,
        begin,
        own.start,
        own.stop,
        **_scores_constants(held.dims, tile, half, symmetric, precision(torch.float32)),
        **_scores_options(tile, scores is not None and not half),
    )


def _tile(x: torch.Tensor) -> int:
    """Rows of a square tile of scores: 64, one at a time per multiprocessor, where there are some for each; else 32."""
    tiles = triton.cdiv(len(x), 64)
    return 64 if tiles * (tiles + 1) // 2 >= 4 * multiprocessors(x) else 32


def _grid(x: torch.Tensor, block: range, begin: int) -> tuple[int, int]:
    tile = _tile(x)
    return triton.cdiv(len(x) - begin, tile), triton.cdiv(len(block), tile)


def _weights(held, block, begin, scores, taught, pairs, scale, pair_scale, mirrored):
    """Scores (K, b, B - begin) of the rows `block` become the weights of the products. Returns, in parts, the sums that
    the projections need: of rows (parts, K, b) and, if mirrored, of columns (parts, K, B - begin)."""
    count, rows, columns = scores.shape
    grid = triton.cdiv(columns, WEIGHTS.columns), triton.cdiv(rows, WEIGHTS.rows)
    row_sums = _floats(scores, grid[0], count, rows)
    column_sums = _floats(scores, grid[1], count, columns) if mirrored else None
    weights_kernel[grid](
        scores,
        taught,
        pairs,
        held.inverse,
        row_sums,
        column_sums,
        scores.stride(1),
        scores.stride(0),
        rows,
        count,
        count - 1 if held.dims[-1] == 1 else -1,
        len(held.x),
        block.start,
        begin,
        float(scale),
        float(pair_scale),
        ROWS=WEIGHTS.rows,
        COLUMNS=WEIGHTS.columns,
        **WEIGHTS.options,
    )
    return row_sums, column_sums


def _with_relative(held: _Rows, own: range, weights: Sequence[float], options: tuple, gradient: torch.Tensor | None):
    """Squared errors, the relative term's losses and what the projections of the own rows need; their products go into
    the gradient."""
    x, batch = held.x, len(held.x)
    scores, taught = _floats(x, len(held.dims), batch, batch), _floats(x, batch, batch)
    partial = _floats(x, math.prod(_grid(x, range(batch), 0))) if weights[1] else None
    _scores(held, range(batch), 0, own, True, scores, taught, partial)
    losses, pairs = relative_scores(scores, taught, *options, gradient is not None)
    if gradient is None:
        return partial, losses, None
    scale, pair_scale = weights[1] * _slope(held), weights[2] / len(held.dims)
    rows = slice(own.start, own.stop)
    sums, _ = _weights(held, own, 0, scores[:, rows], taught[rows], pairs, scale, pair_scale, False)
    for columns, weight in zip(held.segments, scores[:, rows]):
        torch.mm(weight, held.wide[:, columns], out=gradient[:, columns])
    return partial, losses, sums


def _slope(held: _Rows) -> float:
    """dL/dcos over the error: a pair of rows stands twice in the mean, and reaches either row by both."""
    return 4 / (len(held.dims) * len(held.x) ** 2)


def _by_blocks(held: _Rows, own: range, weight: float, gradient: torch.Tensor | None):
    """Squared errors and what the projections of the own rows need, by blocks of rows; products into the gradient."""
    x, batch, count = held.x, len(held.x), len(held.dims)
    symmetric, tile = len(own) == batch, _tile(x)
    if gradient is None:
        step = tile * max(1, MOST_TILES // triton.cdiv(batch, tile))
    else:
        step = max(1, BLOCK // (4 * (count + 1) * batch))
        # Symmetry needs tiles on the diagonal that the end of a block doesn't cut.
        symmetric = symmetric and step >= tile
        step = step // tile * tile if symmetric else step
    blocks = [range(first, min(first + step, own.stop)) for first in range(own.start, own.stop, step)]
    begins = [block.start if symmetric else 0 for block in blocks]
    tiles = [math.prod(_grid(x, *pair)) for pair in zip(blocks, begins)]
    partial = _floats(x, sum(tiles))
    memory = None if gradient is None else _floats(x, (count + 1) * len(blocks[0]) * (batch - begins[0]))
    sums = None if gradient is None or len(blocks) == 1 else _floats(x, 1, count, len(own)).zero_()
    for block, begin, errors in zip(blocks, begins, partial.split(tiles)):
        if gradient is None:
            _scores(held, block, begin, own, symmetric, None, None, errors)
            continue
        shape = len(block), batch - begin
        planes = memory[: (count + 1) * math.prod(shape)].view(count + 1, *shape)
        scores, taught = planes[:count], planes[count]
        _scores(held, block, begin, own, symmetric, scores, taught, errors)
        mirrored = symmetric and block.stop < batch
        row_sums, column_sums = _weights(held, block, begin, scores, taught, None, weight * _slope(held), 0, mirrored)
        mine = slice(block.start - own.start, block.stop - own.start)
        # What the first of several symmetric blocks leaves behind, the others add to.
        beta = int(symmetric and block.start > own.start)
        for columns, plane in zip(held.segments, scores):
            gradient[mine, columns].addmm_(plane, held.wide[begin:, columns], beta=beta)
            if mirrored:
                mirror = plane[:, len(block) :].T
                gradient[mine.stop :, columns].addmm_(mirror, held.wide[block.start : block.stop, columns], beta=beta)
        if sums is None:
            return partial, row_sums
        sums[0, :, mine] += row_sums.sum(0)
        if mirrored:
            sums[0, :, mine.stop :] += column_sums.sum(0)[:, len(block) :]
    return partial, sums


def _finish(x, targets, dims, start, gradient, added, sums, inverse, full_inverse, cosines, scale) -> None:
    """The own rows' s · t into cosines, and the gradient completed, where these are given. added: whether there is
    something in the gradient."""
    rows = len(gradient if cosines is None else cosines)
    finish_kernel[rows,](
        x,
        gradient,
        targets,
        sums,
        inverse,
        full_inverse,
        cosines,
        x.stride(0),
        tuple(t.stride(0) for t in targets),
        dims,
        tuple(t.shape[1] for t in targets),
        x.shape[1],
        rows,
        len(x),
        start,
        0 if sums is None else len(sums),
        float(scale),
        **_finish_constants(x.shape[1], added),
        **OPTIONS,
    )


def _join(partial, cosines, losses, terms, weights, shares) -> None:
    """Fills terms, scalars: the weighted total of the three terms and, if they are asked for, these. Each is a share of
    a sum; of a term that is None, 0."""
    join_kernel[1,](
        partial,
        cosines,
        losses,
        *terms,
        *(0 if x is None else len(x) for x in (partial, cosines, losses)),
        *map(float, weights),
        *map(float, shares),
        **JOIN,
        **OPTIONS,
    )


def distill_loss(
    student: torch.Tensor,
    everyone: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    start: int,
    dims: Sequence[int],
    weights: Sequence[float],
    margin: float,
    reference_ties: bool,
    min_gap: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As blocked_distill_loss in reference.py."""
    (rows, width), batch, dims = student.shape, max(targets[0].shape[0], 1), tuple(dims)
    compared = bool(weights[1] or weights[2])
    if compared:
        x = student if everyone is None else everyone
    else:
        # The cosine term sees no other rows.
        x, targets, start = student, [t[start : start + rows] for t in targets], 0
    x, targets = unit_columns(x), tuple(unit_columns(t) for t in targets)
    own = range(start, start + rows)
    by_gram = compared and not weights[2] and _by_gram(x, own, targets, dims, needs[0])
    widths = list(dims) if compared and not by_gram else []
    if weights[0] and widths[:1] != [width]:
        widths.insert(0, width)
    shares = [1 / batch, 1 / (len(dims) * batch**2), rows / (len(dims) * batch)]
    gradient = _floats(x, rows, width) if needs[0] else None
    partial = cosines = losses = sums = inverse = of_dims = None
    with on_device(x):
        if rows and (weights[0] or compared):
            if widths:
                inverse, wide = _norms(x, widths, compared and needs[0] and not by_gram)
            if compared and not by_gram:
                of_dims = inverse[len(widths) - len(dims) :]
                held = _Rows(x, targets, dims, of_dims, wide)
            if by_gram:
                mean, slopes = gram_similarity(x.float(), targets, slice(start, start + rows), dims, needs[0])
                partial, shares[1] = mean.float().reshape(1), rows / batch
                gradient = slopes.mul_(weights[1]) if needs[0] else None
            elif weights[2]:
                partial, losses, sums = _with_relative(held, own, weights, (margin, reference_ties, min_gap), gradient)
            elif weights[1]:
                partial, sums = _by_blocks(held, own, weights[1], gradient)
            if weights[0]:
                cosines = _floats(x, rows)
            if cosines is not None or sums is not None:
                scale = weights[0] / batch
                _finish(x, targets, dims, start, gradient, compared, sums, of_dims, inverse, cosines, scale)
        elif needs[0]:
            gradient.zero_()
        terms = [_floats(x) for _ in range(4)]
        _join(partial, cosines, losses, terms, weights, shares)
    return *terms, gradient if needs[0] else _floats(x, 0)


def _by_gram(x: torch.Tensor, own: range, targets: Sequence[torch.Tensor], dims: Sequence[int], wanted: bool) -> bool:
    """Whether the D×D form is cheaper. Only where float64 has matrix units: A100, H100 and H200, B200."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) not in ((8, 0), (9, 0), (10, 0)):
        return False
    return gram_is_cheaper(x[own.start : own.stop], x, targets, dims, wanted)


def similarity_loss(
    student: torch.Tensor,
    everyone: torch.Tensor | None,
    targets: Sequence[torch.Tensor],
    start: int,
    dims: Sequence[int],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As blocked_similarity_loss in reference.py."""
    weights = (0.0, 1.0, 0.0)
    loss, *_, gradient = distill_loss(student, everyone, targets, start, dims, weights, 0.0, False, 0.0, needs)
    return loss, gradient


def alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, kind: int, normalize: bool, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As lean_alignment_loss in reference.py; float32. Rows wider than 16384 no longer fit into registers."""
    rows, width = student.shape
    student, teacher = unit_columns(student), unit_columns(teacher)
    gradient = _floats(student, rows, width) if needs_gradient else None
    loss, losses = _floats(student), _floats(student, rows)
    share = 1 / (max(rows, 1) * (max(width, 1) if KINDS[kind] == "mse" else 1))
    config = norm_config(width, backward=True)
    with on_device(student):
        if rows:
            alignment_kernel[triton.cdiv(rows, config.rows),](
                student,
                teacher,
                gradient,
                losses,
                student.stride(0),
                teacher.stride(0),
                rows,
                share,
                **_alignment_constants(width, kind, normalize),
                **config.options,
            )
        _join(losses, None, None, (loss, None, None, None), (0, 1, 0), (0, share, 0))
    return loss, gradient if needs_gradient else _floats(student, 0)


# What is shipped, for the proof without a GPU

DIMS = (1024, 768, 512, 256, 128)
ALIGNMENT_WIDTHS = {"fp32": (384, 1024, 8192, 16384), "bf16": (384, 1024, 100), "fp16": (384,)}
TESTED = {
    "norms bf16",
    "scores bf16 tile=64",
    "weights and relative",
    "finish bf16",
    "join",
    "alignment l2sq normalized bf16 D=1024",
}
# Arguments by kind; others are sizes and strides.
OF_STUDENT = ("x", "student")
OF_FLOATS = (
    *("inverse", "wide", "targets", "scores", "teacher_scores", "partial", "pairs", "row_sums", "column_sums"),
    *("gradient", "sums", "full_inverse", "cosines", "losses", "total", "cosine", "similarity", "relative", "teacher"),
)
NUMBERS = (
    *("scale", "pair_scale", "share", "cosine_weight", "similarity_weight", "relative_weight"),
    *("cosine_share", "similarity_share", "relative_share"),
)
TUPLES = {"targets": 1, "target_strides": 1, "target_widths": 1, "widths": len(DIMS)}


def shipped() -> list[Shipped]:
    """What is launched for one teacher and the widths DIMS, and for alignment what encoders' widths ask for."""
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        half, constants = dtype != "fp32", _norms_constants(DIMS)
        found.append(_shipped(f"norms {dtype}", norms_kernel, constants, OPTIONS, () if half else ("wide",), dtype))
        if half:
            title = f"norms without copy {dtype}"
            found.append(_shipped(title, norms_kernel, constants, OPTIONS, ("wide",), dtype))
        for tile in (32, 64):
            for what, symmetric, absent in (
                ("", True, ()),
                (" of ranks", False, ()),
                (" loss alone", True, ("scores", "teacher_scores")),
            ):
                constants = _scores_constants(DIMS, tile, half, symmetric, "ieee")
                title = f"scores{what} {dtype} tile={tile}"
                options, programs = _scores_options(tile, not absent and not half), 1 if tile == 64 else 3
                found.append(_shipped(title, scores_kernel, constants, options, absent, dtype, programs))
        for what, absent in (("", ()), (" without cosine", ("cosines",))):
            constants = _finish_constants(DIMS[0], added=True)
            found.append(_shipped(f"finish{what} {dtype}", finish_kernel, constants, OPTIONS, absent, dtype))
        for width in ALIGNMENT_WIDTHS[dtype]:
            for kind, normalize in ((0, False), (0, True), (1, False), (3, False)):
                title = f"alignment {KINDS[kind]}{' normalized' if normalize else ''} {dtype} D={width}"
                constants, config = _alignment_constants(width, kind, normalize), norm_config(width, backward=True)
                found.append(_shipped(title, alignment_kernel, constants, config.options, (), dtype, config.programs))
    for what, absent in (
        (" and relative", ("column_sums",)),
        ("", ("pairs",)),
        (" of ranks", ("pairs", "column_sums")),
    ):
        constants = {"ROWS": WEIGHTS.rows, "COLUMNS": WEIGHTS.columns}
        title, programs = f"weights{what}", WEIGHTS.programs
        found.append(_shipped(title, weights_kernel, constants, WEIGHTS.options, absent, programs=programs))
    for what, absent in (
        ("", ()),
        (" of similarity", ("cosines", "losses")),
        (" of alignment", ("cosines", "losses", "cosine", "similarity", "relative")),
    ):
        found.append(_shipped(f"join{what}", join_kernel, JOIN, OPTIONS, absent))
    return found


def _shipped(title, kernel, constants, options, absent, dtype="fp32", programs=1) -> Shipped:
    signature = {}
    for param in kernel.params:
        name = param.name
        if name in constants or name in absent:
            continue
        if name in OF_STUDENT or name in OF_FLOATS:
            kind = f"*{dtype if name in OF_STUDENT else 'fp32'}:16"
        else:
            kind = "fp32" if name in NUMBERS else "i32" if param.do_not_specialize else "i32:16"
            if name.endswith("stride") and constants.get("WIDTH", 0) % 16:
                kind = "i32"
        signature[name] = (kind,) * TUPLES[name] if name in TUPLES else kind
    constants = constants | dict.fromkeys(absent)
    return Shipped("distill", title, kernel, signature, constants, options, programs, title in TESTED)
