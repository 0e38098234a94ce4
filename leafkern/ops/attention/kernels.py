"""Triton kernels of varlen_attention and attention_mean_pool, forward and backward. Not timed yet.

Work. With S = sum over sequences of L², H heads of width D, s bytes per entry: forward 4·H·D·S operations, H·S
exponentials, and q, k, v and the result once, s·D·T·(2·H + 2·H_kv) bytes. That is 4·D operations per exponential: 128
at width 32, where exponentials (16 per multiprocessor and clock) bound the time before the matrix units do, and 512
at width 128, where they don't. The tile's other arithmetic is kept below that: scores are scaled inside the exponent,
exp2(score · scale · log2(e) - top), which is one fused multiplication and addition per score, and only tiles at an edge
are masked. Backward: 14·H·D·S operations (each of its two kernels recomputes the weights: 7 products where five would
do with atomics, which would make the result depend on their order) and 2·H·S exponentials.

Order. A program takes one block of rows of one sequence and `heads` heads one after the other. Blocks are counted
without the host knowing a length: sequence i owns the places from cu_seqlens[i] // ROWS + i on, at least as many as it
has blocks, so T // ROWS + B places hold all of them, whatever the lengths; a program finds its sequence by search.
Where B times the blocks of the longest sequence is no more than that, places are counted so, and nothing is searched.
Heads are the fastest: programs side by side read the same lines of memory. A tile holds one head of one sequence, cut
down to the longest one: n short sequences in one tile would take n times the exponentials that they need.

Forward: loop over blocks of keys with running maximum and sum (Dao, arXiv 2307.08691); if all sequences fit one block
of keys, softmax at once. Backward: `dq_kernel` takes a block of queries, loops over keys, and leaves delta_i =
dO_i · O_i for `dkv_kernel`, which takes a block of keys and loops over the queries of all heads that share it. No
atomics: results depend on nothing but the inputs and the choice of blocks, which follows from shapes and max_seqlen.

attention_mean_pool: `attend_kernel` without values leaves the log-sum-exp of the rows; `column_kernel` takes a block of
keys, adds the columns of the weights and multiplies them with the block's values; `join_kernel` adds the blocks of a
sequence. Backward by the kernels above: dP_ij is u_j = v_j · g / L for every row, and delta_i = sum_j P_ij u_j /
sum_j P_ij needs a loop of its own.

Memory. Entries of a row must be adjacent and other strides multiples of 8 entries, else the tensor is copied: slices of
a packed qkv are read in place. Loads outside a sequence are masked, so that NaN stays where it is. Scores, sums and
softmax are float32; weights are rounded to the dtype of v before they meet it. float32 products are IEEE unless
torch.backends.cuda.matmul allows tf32. Addresses are 64-bit.

LEAFKERN_AUTOTUNE=1 replaces the heuristic by what is fastest of `candidates` (tuning.py); only these have polynomials
in place of a part of the exponentials (exponential.py).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import triton

from leafkern.ops._core.cubin import Shipped
from leafkern.ops._core.launch import next_power_of_2, on_device, precision, tile_options
from leafkern.ops.attention import tuning
from leafkern.ops.attention.device import (
    PLAIN,
    UNIT,
    attend_kernel,
    column_kernel,
    dkv_kernel,
    dq_kernel,
    join_kernel,
)

# Entries of cu_seqlens that one step of the search looks at.
FAN = 256
# Below any scale that matters; 0 would turn the -inf of a hidden score into NaN.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Config:
    """How one kernel is cut: `rows` is the block that a program owns, `columns` the one it loops over (queries and keys
    in attend_kernel and dq_kernel, keys and queries in dkv_kernel and column_kernel), `heads` how many it does; one of
    every `share` exponentials is a polynomial, with 0 none (exponential.py)."""

    rows: int
    columns: int
    warps: int
    stages: int
    heads: int = 1
    share: int = 0

    @property
    def options(self) -> dict:
        """What the launch passes to the compiler."""
        return tile_options(self.warps, self.stages)


# By width up to which they serve. Of blocks whose registers suffice on every architecture, the largest; loads one step
# ahead (two stages) where registers are left for it. Products of float32 leave the matrix units: they take a thread's
# rows and columns into registers whole.
HALF = {
    "attend": {32: Config(64, 32, 4, 2), 64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 2)},
    "dq": {32: Config(64, 32, 4, 2), 64: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 2)},
    "dkv": {32: Config(64, 32, 4, 2), 64: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 2)},
    "column": {32: Config(64, 32, 4, 2), 64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 1)},
}
FLOAT = {
    "attend": {32: Config(32, 32, 4, 1), 64: Config(32, 16, 4, 1), 128: Config(16, 16, 4, 1)},
    "dq": {32: Config(32, 32, 4, 1), 64: Config(16, 16, 4, 1), 128: Config(16, 16, 8, 1)},
    "dkv": {32: Config(32, 32, 4, 1), 64: Config(32, 16, 4, 1), 128: Config(16, 16, 8, 1)},
    "column": {32: Config(32, 32, 4, 1), 64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1)},
}
# Forward blocks for texts of LONG tokens on average. The unused part of a block costs as much as the rest: on
# log-normal lengths of mean 70, blocks of 64 x 32 compute 1.4 times the scores that are needed, 128 x 32 1.8 times.
LONG = 192
HALF_LONG = {32: Config(128, 32, 4, 2), 64: Config(128, 32, 8, 2), 128: Config(64, 32, 8, 2)}


def configure(kernel: str, width: int, half: bool, longest: int, mean: int) -> Config:
    """The heuristic; lengths in tokens."""
    table = (HALF if half else FLOAT)[kernel]
    if half and kernel == "attend" and mean >= LONG:
        table = HALF_LONG
    config = table[min(size for size in table if width <= size)]
    fits = max(16, next_power_of_2(longest))
    rows, columns, warps = min(config.rows, fits), min(config.columns, fits), config.warps
    if half and kernel == "attend" and width <= 64 and longest <= 64:
        # One block of keys: no running softmax.
        columns = fits
    if half and rows < config.rows:
        warps = max(1, warps * rows // config.rows)
    # Several heads for one search where a block of one head is little work.
    heads = 1 if not half or width > 32 else 4 if longest <= 64 else 2
    return Config(rows, columns, warps, config.stages, heads)


def candidates(kernel: str, width: int, half: bool, longest: int, mean: int, architecture: int) -> list[Config]:
    """What autotuning times: the heuristic's choice first, then that with one thing changed or a few. Some spill.

    `architecture`: 90 for sm_90; polynomials instead of exponentials only from there on, for half precision.
    """
    first, fits = configure(kernel, width, half, longest, mean), max(16, next_power_of_2(longest))
    polynomial = {"share": 4 if half and architecture >= 90 else 0}
    larger = {"rows": first.rows * 2, "warps": first.warps * 2}
    changes = [
        {},
        *({"rows": rows} for rows in (first.rows // 2, first.rows * 2)),
        *({"columns": columns} for columns in (first.columns // 2, first.columns * 2)),
        *({"stages": stages} for stages in (1, 2, 3)),
        {"warps": first.warps * 2},
        {"heads": 1 if first.heads > 1 else 2},
        larger,
        polynomial,
        larger | polynomial,
    ]
    found = dict.fromkeys(replace(first, **change) for change in changes)
    return [c for c in found if 16 <= c.rows <= fits and 16 <= c.columns <= fits and 1 <= c.warps <= 8]


# Launches


@dataclass(frozen=True)
class _Batch:
    """What the kernels of one call share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int
    scale: float
    left: int = -1
    right: int = -1

    @classmethod
    def of(cls, q, k, v, cu_seqlens, max_seqlen: int, scale: float, left: int = -1, right: int = -1) -> "_Batch":
        longest = max(1, min(max_seqlen, q.shape[0]))
        # A limit beyond the longest sequence limits nothing.
        left, right = (-1 if side >= longest - 1 else side for side in (left, right))
        q, k, v = (_readable(x) for x in (q, k, v))
        return cls(q, k, v, cu_seqlens.contiguous(), longest, scale, left, right)

    @property
    def strides(self) -> dict[str, int]:
        return {name: step for name in "qkv" for name, step in _strides(name, getattr(self, name)).items()}

    def run(self, kernel: str, launch: Callable[[Config], None], *, pooled: bool = False) -> None:
        """`launch` with the configuration of a kernel, on the device of the batch; pooled: it lacks a tensor."""
        mean = self.q.shape[0] // max(1, self.cu_seqlens.numel() - 1)
        shape = kernel, self.q.shape[2], self.q.dtype != torch.float32, self.longest, mean
        with on_device(self.q):
            if tuning.requested(self.q.device):
                major, minor = torch.cuda.get_device_capability(self.q.device)
                architecture, lengths = 10 * major + minor, [next_power_of_2(max(1, n)) for n in (self.longest, mean)]
                key = (
                    kernel,
                    pooled,
                    self.q.dtype,
                    self.q.shape[2],
                    self.left < 0,
                    self.right < 0,
                    architecture,
                    *lengths,
                )
                launch(tuning.fastest(key, lambda: candidates(*shape, architecture), launch))
            else:
                launch(configure(*shape))

    def places(self, size: int) -> tuple[int, int, bool]:
        """(places, blocks of the longest sequence, whether a program has to search its sequence)."""
        sequences, blocks = self.cu_seqlens.numel() - 1, triton.cdiv(self.longest, size)
        searched = self.q.shape[0] // size + sequences
        return min(searched, sequences * blocks), blocks, searched < sequences * blocks

    def arguments(self, config: Config, heads: int) -> tuple[tuple[int], dict]:
        """Grid and what all kernels take, for a program per place and some of `heads`."""
        places, blocks, search = self.places(config.rows)
        given = {"q": self.q, "k": self.k, "v": self.v, "cu_seqlens": self.cu_seqlens} | self.strides
        given |= {"tokens": self.q.shape[0], "sequences": self.cu_seqlens.numel() - 1, "blocks": blocks, "heads": heads}
        given["log2_scale"] = max(abs(self.scale) * math.log2(math.e), SMALLEST_SCALE)
        given |= _constants(
            self.q.shape[2],
            self.q.shape[1] // self.k.shape[1],
            config,
            NEGATE=self.scale < 0,
            SEARCH=search,
            PRECISION=precision(self.q.dtype),
        )
        return (places * triton.cdiv(heads, config.heads),), given | config.options

    @property
    def window(self) -> dict:
        return {"left": self.left, "right": self.right, "LEFT": self.left >= 0, "RIGHT": self.right >= 0}


def _constants(width: int, group: int, config: Config, **more) -> dict:
    dim = max(16, next_power_of_2(width))
    blocks = {"ROWS": config.rows, "COLUMNS": config.columns, "HEADS": config.heads, "SHARE": config.share}
    return {"GROUP": group, "WIDTH": width, "DIM": dim, "FAN": FAN} | blocks | more


def _readable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where a row's entries are adjacent and rows begin at multiples of UNIT entries; else a copy."""
    return x if x.stride(-1) == 1 and not any(step % UNIT for step in x.stride()[:-1]) else x.contiguous()


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}_token": x.stride(0) // UNIT, f"{name}_head": x.stride(1) // UNIT}


def _lse_like(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape[1], q.shape[0], device=q.device, dtype=torch.float32)


def varlen_attention(
    q, k, v, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H, D) in the dtype of q and the log-sum-exp of the rows, (H, T) float32."""
    out, lse = q.new_empty(q.shape), _lse_like(q)
    if q.shape[0]:
        _attend(_Batch.of(q, k, v, cu_seqlens, max_seqlen, scale, left, right), out, lse)
    return out, lse


def _attend(batch: _Batch, out: torch.Tensor | None, lse: torch.Tensor) -> None:
    def launch(config: Config) -> None:
        grid, given = batch.arguments(config, batch.q.shape[1])
        given |= {"out": out, "lse": lse, "ONE": batch.longest <= config.columns} | batch.window
        if out is None:
            given["v"] = None
        attend_kernel[grid](**given)

    batch.run("attend", launch, pooled=out is None)


def varlen_attention_backward(
    grad, q, k, v, out, lse, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their dtypes, contiguous."""
    batch = _Batch.of(q, k, v, cu_seqlens, max_seqlen, scale, left, right)
    return _backward(batch, _readable(grad.to(q.dtype)), out.contiguous(), lse.contiguous())


def _backward(batch: _Batch, grad, out, lse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`grad`: (T, H, D), or (B, H, D) float32 with `out` None."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (batch.q, batch.k, batch.v))
    if dq.numel() == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    shared = {"grad": grad, "lse": lse, "delta": delta} | _strides("grad", grad) | batch.window

    def launch_dq(config: Config) -> None:
        grid, given = batch.arguments(config, dq.shape[1])
        dq_kernel[grid](**given, **shared, out=out, dq=dq, scale=batch.scale)

    def launch_dkv(config: Config) -> None:
        grid, given = batch.arguments(config, dk.shape[1])
        # The sign of the scale is in the negated q.
        dkv_kernel[grid](**given, **shared, dk=dk, dv=dv, scale=abs(batch.scale), POOLED=out is None)

    batch.run("dq", launch_dq, pooled=out is None)
    batch.run("dkv", launch_dkv, pooled=out is None)
    return dq, dk, dv


def attention_mean_pool(q, k, v, cu_seqlens, max_seqlen: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, D) and the log-sum-exp of the rows, (H, T), both float32."""
    sequences, (heads, width) = cu_seqlens.numel() - 1, q.shape[1:]
    pooled, lse = torch.empty(sequences, heads, width, device=q.device, dtype=torch.float32), _lse_like(q)
    if q.shape[0] == 0 or sequences == 0:
        return pooled.zero_(), lse
    batch = _Batch.of(q, k, v, cu_seqlens, max_seqlen, scale)
    _attend(batch, None, lse)

    def launch(config: Config) -> None:
        grid, given = batch.arguments(config, heads)
        places, blocks, search = batch.places(config.rows)
        partial = torch.empty(places, heads, width, device=q.device, dtype=torch.float32)
        constants = _join_constants(heads * width, config.rows, search)
        column_kernel[grid](**given, lse=lse, partial=partial)
        join_kernel[sequences, triton.cdiv(heads * width, constants["COLUMNS"])](
            partial, batch.cu_seqlens, pooled, blocks, heads * width, **constants, **JOIN_OPTIONS
        )

    batch.run("column", launch)
    return pooled, lse


JOIN_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _join_constants(width: int, size: int, search: bool) -> dict:
    return {"SIZE": size, "SEARCH": search, "ROWS": 4, "COLUMNS": min(next_power_of_2(width), 512)}


def attention_mean_pool_backward(
    grad, q, k, v, lse, cu_seqlens, max_seqlen: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their dtypes, contiguous, for `grad` (B, H, D)."""
    batch = _Batch.of(q, k, v, cu_seqlens, max_seqlen, scale)
    return _backward(batch, grad.float().contiguous(), None, lse.contiguous())


# What is shipped, for the proof without a GPU

# Longest and mean length in tokens: single words, texts of one block, the real mix, documents.
LENGTHS = {"words": (16, 8), "short": (64, 30), "mixed": (512, 70), "long": (512, 512)}
KERNELS = {"attend": attend_kernel, "dq": dq_kernel, "dkv": dkv_kernel, "column": column_kernel}
BACKWARD = ("dq", "dkv")
# (kernel, dtype, width, lengths, further)
TESTED = {
    *((kernel, "bf16", 32, "mixed", "") for kernel in KERNELS),
    *((kernel, "bf16", 64, "mixed", "") for kernel in ("attend", "dq")),
    *((kernel, "bf16", 128, "long", "causal") for kernel in ("attend", *BACKWARD)),
    ("attend", "bf16", 32, "short", ""),
    *((kernel, "bf16", 32, "mixed", "pooled") for kernel in BACKWARD),
    *((kernel, "fp32", 32, "mixed", "") for kernel in ("attend", "dq")),
}


def shipped() -> list[Shipped]:
    """What is launched for the widths of encoders in use and for each class of lengths, and odd cases."""
    found = [_shipped_join()]
    for dtype, widths in {"bf16": (32, 64, 128), "fp16": (32, 64), "fp32": (32, 64, 128)}.items():
        for width in widths:
            for lengths in LENGTHS:
                found += [_shipped(kernel, dtype, width, lengths) for kernel in KERNELS]
            found += [_shipped(kernel, dtype, width, "mixed", "pooled") for kernel in ("attend", *BACKWARD)]
            found += [_shipped(kernel, dtype, width, "long", "causal") for kernel in ("attend", *BACKWARD)]
            found += [_shipped(kernel, dtype, width, "long", "window") for kernel in ("attend", *BACKWARD)]
    return found + [_shipped(kernel, "bf16", width, "mixed") for width in (24, 96) for kernel in KERNELS]


def tunable(architecture: int = 90) -> list[Shipped]:
    """What autotuning may choose in place of what is shipped, plain forms; `cubin.compile_shipped` takes each."""
    found = []
    for kernel, dtype, width, lengths in itertools.product(KERNELS, ("bf16", "fp32"), (32, 64, 128), LENGTHS):
        _, *others = candidates(kernel, width, dtype != "fp32", *LENGTHS[lengths], architecture)
        found += [_shipped(kernel, dtype, width, lengths, config=config) for config in others]
    return found


def _shipped(
    kernel: str, dtype: str, width: int, lengths: str, further: str = "", config: Config | None = None
) -> Shipped:
    (longest, mean), pooled, jit = LENGTHS[lengths], further == "pooled", KERNELS[kernel]
    cut = "" if config is None else " ".join(f"{name}={value}" for name, value in asdict(config).items())
    config = config or configure(kernel, width, dtype != "fp32", longest, mean)
    types = dict.fromkeys(("q", "k", "v", "out", "dq", "dk", "dv"), f"*{dtype}:16")
    types |= {"grad": f"*{'fp32' if pooled else dtype}:16", "cu_seqlens": "*i32:16"}
    types |= dict.fromkeys(("lse", "delta", "partial"), "*fp32:16") | dict.fromkeys(PLAIN, "i32")
    types |= {"scale": "fp32", "log2_scale": "fp32"}
    absent = ["out", "v"] if pooled and kernel == "attend" else ["out"] if pooled else []
    constants = _constants(
        width,
        4 if further == "causal" else 1,
        config,
        LEFT=further == "window",
        RIGHT=further in ("window", "causal"),
        ONE=longest <= config.columns,
        NEGATE=False,
        SEARCH=lengths == "mixed",
        POOLED=pooled,
        PRECISION="ieee",
    ) | dict.fromkeys(absent)
    return Shipped(
        "attention",
        " ".join(filter(None, (kernel, further, dtype, f"D={width}", lengths, cut))),
        jit,
        {name: kind for name, kind in types.items() if name in jit.arg_names and name not in absent},
        {name: value for name, value in constants.items() if name in jit.arg_names},
        config.options,
        tested=not cut and (kernel, dtype, width, lengths, further) in TESTED,
    )


def _shipped_join() -> Shipped:
    types = {"partial": "*fp32:16", "cu_seqlens": "*i32:16", "pooled": "*fp32:16", "blocks": "i32", "width": "i32"}
    return Shipped("attention", "join", join_kernel, types, _join_constants(384, 64, True), JOIN_OPTIONS, tested=True)
