"""Triton kernels of mean_pool and norm_mean_pool, forward and backward.

Work. T tokens of width D, B sequences, s bytes per entry. Forward: about 2 (mean) or 8 (norm) operations per entry of
x, far below the arithmetic limit of any GPU; what counts are the bytes: x and residual once, 2·T·D·s, and B·D·4
written. Backward: x and residual once more and dx once, 3·T·D·s (mean_pool: dx alone). The statistics of the norm are
computed again: keeping them would save no byte of x.

Order. Programs get equal shares of *tokens*, not of sequences: `chunk` consecutive tokens each, so that one long
sequence among short ones, one sequence alone, and thousands all fill the GPU alike, and no length has to be known on
the host. A program finds its first sequence by search in cu_seqlens and walks to the end of its share. A sequence that
lies within one share is finished there; of the others, each share writes its sum to `partial` ((chunks, 2, D) float32;
place 0: the sequence began before the share, 1: it began inside), and a second kernel adds these in order of tokens.
That costs at most 16 bytes per entry and program, some percent of x at the smallest batch that fills the GPU.
As weight and bias are the same for every token, they are applied once per sequence, to the mean of the normed tokens;
in the backward pass, the gradient of a token's norm is the same for all tokens of its sequence.
No atomics: a result depends on nothing but its inputs and the number of multiprocessors.

Memory. Rows of x and residual may lie apart (views of a wider tensor); the entries of a row must be adjacent, else the
tensor is copied. Loads are upcast at once: statistics and sums are float32. Addresses are 64-bit.
"""

import torch
import triton
import triton.language as tl

from leafkern.ops._core.cubin import Shipped
from leafkern.ops._core.device import sequence_of, summed, unit
from leafkern.ops._core.launch import Config, next_power_of_2, norm_config, on_device, shares, unit_columns

# Entries of cu_seqlens that one step of the search looks at.
FAN = 256


def configure(width: int, norm: bool, backward: bool) -> Config:
    """The heuristic. Without a norm, a row may be cut: for the bytes in flight see `norm_config`."""
    if not norm:
        columns = min(next_power_of_2(width), 512)
        return Config(rows=min(16, 2048 // columns), columns=columns, warps=4, programs=8)
    return norm_config(width, backward)


@triton.jit
def _finish(total, length, weight, bias, columns, inside):
    mean = total / length.to(tl.float32)
    if weight is not None:
        mean *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        mean += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return mean


@triton.jit(do_not_specialize=["tokens", "sequences", "chunk"])
def pool_kernel(
    x,
    residual,
    weight,
    bias,
    cu_seqlens,
    pooled,
    partial,
    x_stride,
    residual_stride,
    tokens,
    sequences,
    chunk,
    eps,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FAN: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    low = i_chunk * chunk
    high = tl.minimum(low + chunk, tokens)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    i_sequence = sequence_of(cu_seqlens, low, sequences, FAN)
    start = low
    while (start < high) & (i_sequence < sequences):
        begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
        end = tl.load(cu_seqlens + i_sequence + 1).to(tl.int64)
        stop = tl.minimum(end, high)
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for row in range(start, stop, ROWS):
            rows = row + tl.arange(0, ROWS)
            valid = (rows < stop)[:, None] & inside[None, :]
            h = summed(x, residual, rows, columns, valid, x_stride, residual_stride)
            h, _, _ = unit(h, valid, eps, WIDTH, NORM)
            # A row beyond the end is no row of zeros: without eps, its deviation is 0.
            tile += tl.where(valid, h, 0.0)
        total = tl.sum(tile, 0)
        if (begin >= low) & (end <= high):
            if end > begin:
                mean = _finish(total, end - begin, weight, bias, columns, inside)
                tl.store(pooled + i_sequence * WIDTH + columns, mean, mask=inside)
        else:
            place = 2 * i_chunk + (begin >= low).to(tl.int64)
            tl.store(partial + place * WIDTH + columns, total, mask=inside)
        start = tl.maximum(start, stop)
        i_sequence += 1


@triton.jit(do_not_specialize=["chunk"])
def join_kernel(
    partial,
    weight,
    bias,
    cu_seqlens,
    pooled,
    chunk,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One sequence: the sum of its pieces if several programs shared it; 0 if it is empty; else it is done.
    i_sequence = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(cu_seqlens + i_sequence + 1).to(tl.int64)
    o_pooled = pooled + i_sequence * WIDTH + columns
    if end <= begin:
        tl.store(o_pooled, tl.zeros([COLUMNS], tl.float32), mask=inside)
    else:
        first = begin // chunk
        last = (end - 1) // chunk
        if last > first:
            tile = tl.zeros([ROWS, COLUMNS], tl.float32)
            for i_chunk in range(first, last + 1, ROWS):
                chunks = i_chunk + tl.arange(0, ROWS)
                places = 2 * chunks + (chunks == first).to(tl.int64)
                valid = (chunks <= last)[:, None] & inside[None, :]
                tile += tl.load(partial + places[:, None] * WIDTH + columns[None, :], mask=valid, other=0.0)
            mean = _finish(tl.sum(tile, 0), end - begin, weight, bias, columns, inside)
            tl.store(o_pooled, mean, mask=inside)


@triton.jit(do_not_specialize=["tokens", "sequences", "chunk"])
def backward_kernel(
    grad,
    x,
    residual,
    weight,
    cu_seqlens,
    dx,
    partial,
    x_stride,
    residual_stride,
    tokens,
    sequences,
    chunk,
    eps,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FAN: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    low = i_chunk * chunk
    high = tl.minimum(low + chunk, tokens)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = sequence_of(cu_seqlens, low, sequences, FAN)
    i_sequence = first
    start = low
    while (start < high) & (i_sequence < sequences):
        begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
        end = tl.load(cu_seqlens + i_sequence + 1).to(tl.int64)
        stop = tl.minimum(end, high)
        share = tl.load(grad + i_sequence * WIDTH + columns, mask=inside, other=0.0)
        share /= tl.maximum(end - begin, 1).to(tl.float32)
        inner = share
        if NORM != "none":
            inner = share * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        offset = tl.sum(inner, 0) / WIDTH
        for row in range(start, stop, ROWS):
            rows = row + tl.arange(0, ROWS)
            valid = (rows < stop)[:, None] & inside[None, :]
            if NORM == "none":
                out = tl.broadcast_to(inner[None, :], [ROWS, COLUMNS])
            else:
                h = summed(x, residual, rows, columns, valid, x_stride, residual_stride)
                h, _, inverse = unit(h, valid, eps, WIDTH, NORM)
                dweight += tl.where(valid, h * share[None, :], 0.0)
                along = tl.sum(inner[None, :] * h, 1) / WIDTH
                out = inner[None, :] - h * along[:, None]
                if NORM == "layer":
                    out -= offset
                out *= inverse[:, None]
            tl.store(dx + rows[:, None] * WIDTH + columns[None, :], out.to(dx.dtype.element_ty), mask=valid)
        start = tl.maximum(start, stop)
        i_sequence += 1
    if NORM != "none":
        o_partial = partial + 2 * i_chunk * WIDTH + columns
        tl.store(o_partial, tl.sum(dweight, 0), mask=inside)
        # A second walk, when the registers of the first are free. Each sequence counts once, where it begins.
        dbias = tl.zeros([COLUMNS], tl.float32)
        for i in range(first, i_sequence):
            begin = tl.load(cu_seqlens + i)
            end = tl.load(cu_seqlens + i + 1)
            b_grad = tl.load(grad + i * WIDTH + columns, mask=inside, other=0.0)
            dbias += tl.where((begin >= low) & (end > begin), b_grad, 0.0)
        tl.store(o_partial + WIDTH, dbias, mask=inside)


# Launches

NORMS = {True: "layer", False: "rms"}


def _constants(width: int, norm: str, config: Config) -> dict:
    return {"WIDTH": width, "NORM": norm, "ROWS": config.rows, "COLUMNS": config.columns, "FAN": FAN}


def _join_constants(width: int) -> dict:
    columns = min(next_power_of_2(width), 256)
    return {"WIDTH": width, "ROWS": 8, "COLUMNS": columns}


JOIN_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _pool(x, residual, weight, bias, cu_seqlens, eps: float, norm: str) -> torch.Tensor:
    (tokens, width), sequences = x.shape, cu_seqlens.numel() - 1
    pooled = torch.empty(sequences, width, device=x.device, dtype=torch.float32)
    if pooled.numel() == 0:
        return pooled
    config = configure(width, norm != "none", backward=False)
    blocks = triton.cdiv(width, config.columns)
    chunk, programs = shares(x, tokens, blocks, config)
    x, residual = unit_columns(x), None if residual is None else unit_columns(residual)
    weight, bias, cu_seqlens = (None if v is None else v.contiguous() for v in (weight, bias, cu_seqlens))
    partial = torch.empty(programs, 2, width, device=x.device, dtype=torch.float32)
    with on_device(x):
        if tokens:
            pool_kernel[programs, blocks](
                x,
                residual,
                weight,
                bias,
                cu_seqlens,
                pooled,
                partial,
                x.stride(0),
                x.stride(0) if residual is None else residual.stride(0),
                tokens,
                sequences,
                chunk,
                eps,
                **_constants(width, norm, config),
                **config.options,
            )
        constants = _join_constants(width)
        join_kernel[sequences, triton.cdiv(width, constants["COLUMNS"])](
            partial, weight, bias, cu_seqlens, pooled, chunk, **constants, **JOIN_OPTIONS
        )
    return pooled


def _pool_backward(grad, x, residual, weight, cu_seqlens, eps: float, norm: str, dx: torch.Tensor):
    """Fills `dx`; returns the gradients of weight and bias as (2, D) float32, None without a norm."""
    tokens, width = dx.shape
    if tokens == 0 or width == 0:
        return None if norm == "none" else torch.zeros(2, width, device=dx.device, dtype=torch.float32)
    config = configure(width, norm != "none", backward=True)
    blocks = triton.cdiv(width, config.columns)
    chunk, programs = shares(dx, tokens, blocks, config)
    grad, cu_seqlens = grad.contiguous(), cu_seqlens.contiguous()
    x, residual = (None if v is None else unit_columns(v) for v in (x, residual))
    weight = None if weight is None else weight.contiguous()
    partial = None
    if norm != "none":
        partial = torch.empty(programs, 2, width, device=dx.device, dtype=torch.float32)
    with on_device(dx):
        backward_kernel[programs, blocks](
            grad,
            x,
            residual,
            weight,
            cu_seqlens,
            dx,
            partial,
            width if x is None else x.stride(0),
            width if residual is None else residual.stride(0),
            tokens,
            cu_seqlens.numel() - 1,
            chunk,
            eps,
            **_constants(width, norm, config),
            **config.options,
        )
    return None if partial is None else partial.sum(0)


def mean_pool(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return _pool(x, None, None, None, cu_seqlens, 0.0, "none")


def mean_pool_backward(grad: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    dx = torch.empty(tokens, grad.shape[1], device=grad.device, dtype=dtype)
    _pool_backward(grad, None, None, None, cu_seqlens, 0.0, "none", dx)
    return dx


def norm_mean_pool(x, residual, weight, bias, cu_seqlens, eps: float, layer: bool) -> torch.Tensor:
    return _pool(x, residual, weight, bias, cu_seqlens, eps, NORMS[layer])


def norm_mean_pool_backward(
    grad, x, residual, weight, cu_seqlens, eps: float, layer: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x + residual (in the wider dtype of the two), weight and bias (float32)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dx = torch.empty(x.shape, device=x.device, dtype=dtype)
    dweight, dbias = _pool_backward(grad, x, residual, weight, cu_seqlens, eps, NORMS[layer], dx)
    return dx, dweight.clone(), dbias.clone()


# What is shipped, for the proof without a GPU

# The last is the widest that `autograd.WIDEST_NORM` lets come here.
WIDTHS = {"bf16": (384, 768, 1024, 2048, 4096, 100), "fp16": (384,), "fp32": (384, 1024, 8192)}
TESTED = {(384, "bf16", "none"), (384, "fp32", "layer"), (768, "bf16", "layer"), (8192, "fp32", "layer")}


def shipped() -> list[Shipped]:
    """What `_pool` and `_pool_backward` launch for the widths of encoders in use, the widest norm, and an odd one."""
    found = [_shipped_join(384, tested=True), _shipped_join(100, tested=False)]
    for dtype, widths in WIDTHS.items():
        for width in widths:
            for norm in ("none", "layer", "rms"):
                tested = (width, dtype, norm) in TESTED
                found += [_shipped(width, dtype, norm, backward, tested) for backward in (False, True)]
    return found


def _shipped(width: int, dtype: str, norm: str, backward: bool, tested: bool) -> Shipped:
    config = configure(width, norm != "none", backward)
    stride = "i32:16" if width % 16 == 0 else "i32"
    counts = dict.fromkeys(("tokens", "sequences", "chunk"), "i32") | {"eps": "fp32"}
    types = {"x": f"*{dtype}:16", "cu_seqlens": "*i32:16", "partial": "*fp32:16", "x_stride": stride, **counts}
    types |= {"residual": f"*{dtype}:16", "weight": f"*{dtype}:16", "residual_stride": stride}
    types |= {"grad": "*fp32:16", "dx": f"*{dtype}:16"} if backward else {"bias": f"*{dtype}:16", "pooled": "*fp32:16"}
    absent = ()
    if norm == "none":
        absent = ("x", "residual", "weight", "partial") if backward else ("residual", "weight", "bias")
    return Shipped(
        "pooling",
        f"{'backward' if backward else 'forward'} {norm} {dtype} D={width}",
        backward_kernel if backward else pool_kernel,
        {name: kind for name, kind in types.items() if name not in absent},
        _constants(width, norm, config) | dict.fromkeys(absent),
        config.options,
        config.programs,
        tested,
    )


def _shipped_join(width: int, tested: bool) -> Shipped:
    types = {"partial": "*fp32:16", "weight": "*bf16:16", "bias": "*bf16:16", "cu_seqlens": "*i32:16"}
    types |= {"pooled": "*fp32:16", "chunk": "i32"}
    constants = _join_constants(width)
    return Shipped("pooling", f"join bf16 D={width}", join_kernel, types, constants, JOIN_OPTIONS, tested=tested)
