"""Triton kernels of search: exact top k without a matrix of scores. Not timed yet.

Work. Q queries, N rows of width D: 2·Q·N·D operations on the matrix units (int8: integers; fp8: 8-bit floats where the
matrix units have them, else float16; float16 and bfloat16 rows: twice, as a query is the sum of two such numbers;
float32: three times in tf32, or once where torch is allowed tf32). The bytes of the base are read once per block of
queries, those of QUERIES queries at a time from the cache. For a few queries the bytes are what counts, N·D·bits/8;
binary rows are then compared by 32 bits at once, Q·N·D/32 words with one count of bits (Hamming) or seven; each is one
instruction (a test looks), which is all that CUDA C++ would have added.

Order. `scan_kernel` (or `bits_kernel`) forms scores a tile of 128 rows at a time and keeps only each tile's largest,
4·Q·N/128 bytes. Of these maxima the k best tiles of each query are chosen, and `score_kernel` scores their rows once
more, exactly, as keys (score, lower id), of which the k largest are the result. The k tiles with the best (largest
score, lower tile) hold the k best rows by (score, lower id): each of them has a row that comes before all rows of any
other tile, by its score, or at an equal one by its id, for all ids of a lower tile are lower. Groups of tiles stand in
for tiles in the same way, so that a long row of maxima is gone through once. No atomics, nothing that depends on the
number of multiprocessors; the host waits for nothing.

Floats. The scan chooses tiles by scores that are nearly those of float32; the chosen rows are then scored in float32,
so that every score returned is exact to its rounding, and a row can be missed only for one whose score is as good to a
relative 2^-20 (fp8 rows: 2^-10) of the length of both vectors.

Memory besides the result: WORKSPACE_BYTES, by taking the queries in blocks, or what 16 queries need; with a base in
CPU memory, twice 64 MiB on each side besides.

A base on another device than the queries (as CPU memory, mapped files too) comes in pieces: `streaming.py`.
"""

from dataclasses import dataclass

import torch
import triton

from leafkern.ops._core.cubin import ARCHITECTURES, SHARED_PER_BLOCK, Shipped
from leafkern.ops._core.launch import (
    multiprocessors,
    next_power_of_2,
    on_device,
    precision,
    shared_memory,
    tile_options,
)
from leafkern.ops.quantization import reference as quantization
from leafkern.ops.retrieval import reference, streaming
from leafkern.ops.retrieval.device import bits_kernel, key_kernel, scan_kernel, score_kernel
from leafkern.ops.retrieval.streaming import Base

# Rows of a tile, and tiles of a group; queries that are taken at once are a multiple of BLOCK.
TILE = 128
GROUP = 64
BLOCK = 16
WORKSPACE_BYTES = 256 << 20
# Rows up to this width are compared by words of 32 bits, for as many counts of bits per word at most.
WIDEST_WORDS = 1024
MOST_COUNTS = 16
# Programs per multiprocessor that the tiles are shared among: the last wave, which is not full, is one of several.
WAVES = 8
# Rows of bytes up to this width have all their steps in one piece of code, the queries of a program loaded once, where
# a program may take as much shared memory.
RESIDENT, RESIDENT_BYTES = 512, 160 << 10
# Entries that score_kernel takes at a time.
SCORE_DEPTH = 64
# e4m3 as float16, see `device`.
FP8_FACTOR = 256.0
_PARTS = {torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Cut:
    """How scan_kernel is cut: a program forms scores of `queries` queries by TILE rows in steps of `depth` entries."""

    queries: int
    depth: int
    warps: int
    stages: int
    resident: bool

    @property
    def options(self) -> dict:
        """What the launch passes to the compiler."""
        return tile_options(self.warps, self.stages)


def configure(form: str, size: int, queries: int, width: int, shared: int) -> Cut:
    """The heuristic, by bytes of an entry: the queries that there are, up to what registers and shared memory hold."""
    rows = 16 if queries <= 16 else 64 if queries <= 64 or size == 4 else 128
    resident = size == 1 and width <= RESIDENT and shared >= RESIDENT_BYTES
    stages = (3 if width <= 384 else 2) if resident else 4 if rows == 16 else 3
    warps = 8 if rows == 128 or size == 4 or form in ("int4", "bits") else 4
    return Cut(rows, {1: 128, 2: 32 if rows == 128 else 64, 4: 16}[size], warps, stages, resident)


def _scan_constants(width: int, form: str, flip: bool, parts: int, cut: Cut, precision: str) -> dict:
    shape = {"WIDTH": width, "FORM": form, "FLIP": flip, "PARTS": parts, "PRECISION": precision}
    return shape | {"QUERIES": cut.queries, "ROWS": TILE, "DEPTH": cut.depth, "RESIDENT": cut.resident}


def _score_constants(width: int, form: str, flip: bool) -> dict:
    return {"WIDTH": width, "FORM": form, "FLIP": flip, "ROWS": TILE, "DEPTH": SCORE_DEPTH}


def _bits_constants(width: int, flip: bool, planes: int, align: int) -> dict:
    words = width // 32
    shape = {"WORDS": words, "COLUMNS": next_power_of_2(words), "PLANES": planes, "ALIGN": align, "ROWS": TILE}
    return {"FLIPPED": 0x80808080 if flip else 0} | shape


def _key_constants(best: bool) -> dict:
    return {"GROUP": GROUP, "PLACES": 32 if best else 8, "BEST": best}


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@dataclass(frozen=True)
class _Queries:
    """Queries as the kernels take them, padded with zeros: `parts` (P, Q', D'), whose sum is multiplied with the rows
    by scan_kernel, perhaps times `factor` (Q',); `exact` (Q', D') for score_kernel, perhaps times `exact_factor`;
    `planes`, the bits of few queries, for bits_kernel. number: queries that there are."""

    number: int
    width: int
    cut: Cut
    precision: str
    parts: torch.Tensor
    exact: torch.Tensor
    factor: torch.Tensor | None = None
    exact_factor: torch.Tensor | None = None
    planes: torch.Tensor | None = None


def search(
    u: torch.Tensor, codes: torch.Tensor, k: int, bits: int, query_bits: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.blocked`, for rows of codes whose entries are adjacent and k <= 1024."""
    form = {8: "int8", 4: "int4", 1: "bits"}[bits]
    flip = bits == 1 and codes.dtype == torch.int8
    width = u.shape[1]
    cut = configure(form, 1, len(u), width, shared_memory(u))
    padded = _padded(u, cut)
    planes = None
    if (
        bits == 1
        and width % 32 == 0
        and width <= WIDEST_WORDS
        and len(u) * (1 if query_bits == 1 else 7) <= MOST_COUNTS
    ):
        planes = _planes(u, query_bits)
    queries = _Queries(len(u), width, cut, "ieee", padded[None], padded, planes=planes)
    base = Base(codes if bits == 8 else codes.view(torch.uint8), form, flip, None, allowed)
    return _search(queries, base, k, torch.int32)


def float_search(
    queries: torch.Tensor, rows: torch.Tensor, k: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.blocked_float`, of queries float32 with rows whose entries are adjacent, float32, float16 or
    bfloat16, k <= 1024. Where a score isn't finite, the first returned is NaN."""
    width = queries.shape[1]
    cut = configure("float", rows.element_size(), len(queries), width, shared_memory(queries))
    exact, factor = _padded(queries, cut), None
    if rows.dtype == torch.float32:
        parts = exact[None]
        how = precision(rows.dtype).replace("ieee", "tf32x3")
    else:
        # Queries of any length as two numbers of half precision.
        factor = exact.abs().amax(1)
        unit = exact / torch.where(factor == 0, 1, factor)[:, None]
        high = unit.to(rows.dtype)
        parts, how = torch.stack([high, (unit - high.float()).to(rows.dtype)]), "ieee"
    made = _Queries(len(queries), width, cut, how, parts, exact, factor)
    return _search(made, Base(rows, "float", False, None, allowed), k, torch.float32)


def fp8_search(
    queries: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, k: int, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `float_search`, of rows of fp8, times `scale` (N,); the queries are quantised likewise."""
    codes, factor = quantization.fp8(queries)
    native = _takes_fp8(queries.device)
    cut = configure("fp8", 1 if native else 2, len(queries), queries.shape[1], shared_memory(queries))
    exact = _padded(codes.float(), cut)
    factor = torch.nn.functional.pad(factor if native else factor * FP8_FACTOR, (0, len(exact) - len(factor)))
    parts = (exact.to(rows.dtype) if native else exact.half())[None]
    made = _Queries(len(queries), queries.shape[1], cut, "ieee", parts, exact, factor, factor)
    base = Base(rows if native else rows.view(torch.uint8), "fp8" if native else "fp8 bytes", False, scale, allowed)
    return _search(made, base, k, torch.float32)


def _takes_fp8(device: torch.device) -> bool:
    """Whether the matrix units take e4m3 as it is."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _padded(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    # Whichever multiple of BLOCK a program begins at, it has all its queries.
    more = -x.shape[0] % BLOCK + cut.queries - BLOCK
    return torch.nn.functional.pad(x, (0, -x.shape[1] % max(cut.depth, SCORE_DEPTH), 0, more)).contiguous()


def _planes(u: torch.Tensor, query_bits: int) -> torch.Tensor:
    """Bit p of every entry in plane p, as two's complement of 7 bits; of +-1, one plane of signs: (Q, P, D / 32)."""
    if query_bits == 1:
        bits = (u > 0)[:, None]
    else:
        bits = u[:, None] & (1 << torch.arange(7, device=u.device, dtype=torch.int8))[:, None]
        bits = bits != 0
    packed = quantization.pack_bits(bits.flatten(0, 1))
    return packed.view(torch.uint32).view(*bits.shape[:2], -1)


def _search(queries: _Queries, base: Base, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    k, device, base = min(k, len(base)), queries.parts.device, base.plain()
    if queries.number == 0 or k == 0:
        return reference.from_keys(torch.empty((queries.number, k), dtype=torch.int64, device=device), dtype)
    with on_device(queries.parts):
        if base.rows.device == device:
            keys = _best_keys(queries, base, k, dtype)
        else:
            keys = streaming.best_keys(base, k, device, lambda piece: _best_keys(queries, piece, k, dtype))
    return reference.from_keys(keys, dtype)


def queries_at_once(number: int, bytes_each: int) -> int:
    """How many of `number` queries are taken together, a multiple of BLOCK, as even as the bound allows."""
    most = max(BLOCK, WORKSPACE_BYTES // bytes_each // BLOCK * BLOCK)
    return BLOCK * triton.cdiv(number, triton.cdiv(number, most) * BLOCK)


def _best_keys(queries: _Queries, base: Base, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The keys (Q, min(k, N)) of the best rows of a base on the queries' device, best first."""
    k = min(k, len(base))
    tiles = triton.cdiv(len(base), TILE)
    # Maxima, keys of tiles and of rows; topk takes as much again as it is given, and more.
    each = 4 * tiles + 24 * min(tiles, 2 * GROUP * k) + 24 * min(k, tiles) * TILE
    step = queries_at_once(queries.number, each)
    found = []
    for start in range(0, queries.number, step):
        maxima = _maxima(queries, base, start, min(step, queries.number - start), dtype)
        chosen = _best_tiles(maxima, min(k, tiles))
        keys = _tile_keys(queries, base, start, chosen)
        found.append(keys.topk(k, dim=1).values)
    return found[0] if len(found) == 1 else torch.cat(found)


def _maxima(queries: _Queries, base: Base, start: int, number: int, dtype: torch.dtype) -> torch.Tensor:
    """The largest score of queries `start` and following in each tile, (number, tiles)."""
    rows, tiles = base.rows, triton.cdiv(len(base), TILE)
    device = queries.parts.device
    maxima = torch.empty((number, tiles), dtype=dtype, device=device)
    waves = multiprocessors(queries.parts) * WAVES
    words = None if queries.planes is None else base.words()
    if words is not None:
        planes = queries.planes[start : start + number]
        align = 4 if words.stride(0) % 4 == 0 else 1
        share = triton.cdiv(tiles, waves)
        bits_kernel[triton.cdiv(tiles, share),](
            planes,
            words,
            base.allowed,
            maxima,
            words.stride(0) // align,
            len(base),
            number,
            tiles,
            share,
            **_bits_constants(queries.width, base.flip, planes.shape[1], align),
            **OPTIONS,
        )
        return maxima
    cut = queries.cut
    query_blocks = triton.cdiv(number, cut.queries)
    share = triton.cdiv(tiles, max(1, waves // query_blocks))
    parts = queries.parts[:, start:]
    scan_kernel[query_blocks * triton.cdiv(tiles, share),](
        parts,
        None if queries.factor is None else queries.factor[start:],
        rows,
        base.scale,
        base.allowed,
        maxima,
        parts.stride(0),
        parts.stride(1),
        rows.stride(0),
        len(base),
        number,
        tiles,
        share,
        query_blocks,
        **_scan_constants(queries.width, base.form, base.flip, len(parts), cut, queries.precision),
        **cut.options,
    )
    return maxima


def _best_tiles(maxima: torch.Tensor, k: int) -> torch.Tensor:
    """The k best tiles by (maximum, lower tile), in any order: (Q, k) int64."""
    tiles = maxima.shape[1]
    groups = triton.cdiv(tiles, GROUP)
    if tiles <= 2 * GROUP * k:
        return _best(_keys(maxima, None, groups, best=False), k)
    chosen = _best(_keys(maxima, None, groups, best=True), k)
    return _best(_keys(maxima, chosen, k, best=False), k)


def _keys(maxima: torch.Tensor, chosen: torch.Tensor | None, count: int, best: bool) -> torch.Tensor:
    """Keys of the tiles of `count` groups, or of the groups, which are the first or (Q, count) chosen ones."""
    number, tiles = maxima.shape
    constants = _key_constants(best)
    blocks = triton.cdiv(count, constants["PLACES"])
    keys = torch.empty((number, count if best else count * GROUP), dtype=torch.int64, device=maxima.device)
    key_kernel[number * blocks,](maxima, chosen, keys, tiles, count, blocks, **constants, **OPTIONS)
    return keys


def _best(keys: torch.Tensor, k: int) -> torch.Tensor:
    """What the k largest keys are keys of, in any order."""
    return reference.LAST_ID - (keys.topk(k, dim=1, sorted=False).values & reference.LAST_ID)


def _tile_keys(queries: _Queries, base: Base, start: int, chosen: torch.Tensor) -> torch.Tensor:
    """The keys of all rows of the chosen tiles, (Q, k * TILE)."""
    number, count = chosen.shape
    keys = torch.empty((number, count * TILE), dtype=torch.int64, device=chosen.device)
    factor = queries.exact_factor
    score_kernel[number * count,](
        queries.exact[start:],
        None if factor is None else factor[start:],
        base.rows,
        base.scale,
        base.allowed,
        chosen.contiguous(),
        keys,
        queries.exact.stride(0),
        base.rows.stride(0),
        len(base),
        count,
        **_score_constants(queries.width, base.form, base.flip),
        **OPTIONS,
    )
    return keys


# What is shipped, for the proof without a GPU

WIDTHS = {"int8": (384, 256, 512, 768, 1024, 100), "int4": (384, 1024), "bits": (384, 1024, 100)}
FLOAT_WIDTHS = {"fp32": (384, 1024), "fp16": (384, 1024), "bf16": (384,), "fp8": (384, 1024), "fp8 bytes": (384,)}
# Also for GPUs on which a block has little shared memory.
SMALL = {"int8": 86, "int4": 86, "bits": 86, "fp8": 89}
# Title, of chosen groups, of groups.
KEY_CASES = (("of tiles", False, False), ("of groups", False, True), ("of chosen tiles", True, False))
TESTED = {
    "scan int8 D=384 Q=1",
    "scan int8 D=384 Q=1000",
    "scan bits D=384 Q=1000",
    "bits D=384 P=7",
    "score int8 D=384",
    "keys of groups i32",
}


def shipped() -> list[Shipped]:
    """What is launched for widths of encoders in use and an odd one, for many queries; for the first, for few too."""
    found = []
    for kind, widths in (WIDTHS | FLOAT_WIDTHS).items():
        found += [_shipped_scan(kind, widths[0], queries) for queries in (1, 64)]
        found += [_shipped_scan(kind, width, 1000) for width in widths]
        found += [_shipped_score(kind, width) for width in widths]
        found.append(_shipped_scan(kind, widths[0], 1000, allowed=True))
    found += [_shipped_scan(kind, 384, q, small=True) for kind in SMALL for q in (1, 64, 1000)]
    found += [_shipped_score(kind, 384, allowed=True) for kind in ("int8", "bits", "fp16")]
    found += [_shipped_bits(width, planes) for width in (384, 1024) for planes in (1, 7)]
    found.append(_shipped_bits(384, 7, allowed=True))
    found += [_shipped_keys(kind, *case) for kind in ("i32", "fp32") for case in KEY_CASES]
    return found


def _shipped(title: str, kernel, types: dict, constants: dict, options: dict, only: int | None = None) -> Shipped:
    constants = constants | {name: None for name, kind in types.items() if kind is None}
    types = {name: kind for name, kind in types.items() if kind is not None}
    takes_fp8 = ARCHITECTURES[1:] if "*fp8e4nv:16" in types.values() else ARCHITECTURES
    architectures = takes_fp8 if only is None else (only,)
    return Shipped("retrieval", title, kernel, types, constants, options, 1, title in TESTED, architectures)


def _shipped_keys(kind: str, title: str, chosen: bool, best: bool) -> Shipped:
    types = {"maxima": f"*{kind}:16", "chosen": "*i64:16" if chosen else None, "keys": "*i64:16"}
    types |= dict.fromkeys(("tiles", "count", "blocks"), "i32")
    return _shipped(f"keys {title} {kind}", key_kernel, types, _key_constants(best), OPTIONS)


def _base_types(kind: str, width: int, allowed: bool) -> dict:
    entry = {"int8": "i8", "int4": "u8", "bits": "u8", "fp8": "fp8e4nv", "fp8 bytes": "u8"}.get(kind, kind)
    stride = width // {"int4": 2, "bits": 8}.get(kind, 1)
    return {
        "base": f"*{entry}:16",
        "scale": "*fp32" if kind.startswith("fp8") else None,
        "allowed": "*u8" if allowed else None,
        "base_stride": "i32:16" if stride % 16 == 0 else "i32",
        "rows": "i32",
    }


def _form_of(kind: str) -> str:
    return "float" if kind in ("fp32", "fp16", "bf16") else kind


def _shipped_scan(kind: str, width: int, queries: int, allowed: bool = False, small: bool = False) -> Shipped:
    form, halves = _form_of(kind), kind in ("fp16", "bf16")
    size = 4 if kind == "fp32" else 2 if halves or kind == "fp8 bytes" else 1
    only = SMALL[kind] if small else None
    cut = configure(form, size, queries, width, SHARED_PER_BLOCK[only or 90])
    entry = {"fp8": "fp8e4nv", "fp8 bytes": "fp16"}.get(kind, kind if form == "float" else "i8")
    types = {"queries": f"*{entry}:16", "factor": "*fp32:16" if halves or kind.startswith("fp8") else None}
    types |= _base_types(kind, width, allowed) | {"maxima": "*i32:16" if form in WIDTHS else "*fp32:16"}
    types |= dict.fromkeys(("part_stride", "q_stride"), "i32:16")
    types |= dict.fromkeys(("number", "tiles", "share", "query_blocks"), "i32")
    how = "tf32x3" if kind == "fp32" else "ieee"
    constants = _scan_constants(width, form, False, 2 if halves else 1, cut, how)
    title = f"scan {kind} D={width} Q={queries}{' allowed' * allowed}{' small' * small}"
    return _shipped(title, scan_kernel, types, constants, cut.options, only)


def _shipped_score(kind: str, width: int, allowed: bool = False) -> Shipped:
    form = _form_of(kind)
    types = {"queries": "*i8:16" if form in WIDTHS else "*fp32:16"}
    types |= {"factor": "*fp32:16" if kind.startswith("fp8") else None}
    types |= _base_types(kind, width, allowed) | {"chosen": "*i64:16", "keys": "*i64:16", "q_stride": "i32:16"}
    title = f"score {kind} D={width}{' allowed' * allowed}"
    return _shipped(title, score_kernel, types | {"count": "i32"}, _score_constants(width, form, False), OPTIONS)


def _shipped_bits(width: int, planes: int, allowed: bool = False) -> Shipped:
    types = {"planes": "*u32:16", "base": "*u32:16", "allowed": "*u8" if allowed else None, "maxima": "*i32:16"}
    types |= {"base_stride": "i32:16" if width // 128 % 16 == 0 else "i32"}
    types |= dict.fromkeys(("rows", "number", "tiles", "share"), "i32")
    title = f"bits D={width} P={planes}{' allowed' * allowed}"
    return _shipped(title, bits_kernel, types, _bits_constants(width, False, planes, 4), OPTIONS)
