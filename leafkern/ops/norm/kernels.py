"""Triton kernels of add_norm, bias_gelu, rotary and embed_norm, forward and backward. Not timed yet.

Work. T tokens of width D, s bytes per entry. What counts are the bytes:
- add_norm: forward x and residual once and the result, 3·T·D·s (add_norm_sum: the sum too, 4·T·D·s); backward the
  gradient, x and residual once and one gradient, 4·T·D·s (add_norm_sum: both gradients, the sum and one gradient, the
  same). Some 10 and 16 operations per entry. The statistics, 8 bytes per token, are kept: that saves the backward pass
  two of its four sums over a row.
- bias_gelu: x and the result, 2·T·D·s; backward 3·T·D·s. Some 30 operations per entry with the error function, which
  in half precision are near the arithmetic limit of an H100 at its full bandwidth; half as many with tanh.
- rotary: q and k once and both results, 2·T·(H + H_kv)·D·s, and half of cos and sin per token; 3 operations per entry.
- embed_norm: the result, T·D·s, and up to as much from each table, of which position and token_type stay in cache;
  backward the gradient, the tables and a float32 gradient of their sum. The tables' gradients are torch's
  embedding_dense_backward, which sorts and adds in a fixed order.

Order. A program of the forward kernels takes one tile of rows. In the backward kernels that owe a gradient to weight
or bias, one wave of programs shares the tokens: each adds up its rows in registers and writes one row per parameter to
`partial`, and `join_kernel` adds these in order. No atomics: a result depends on nothing but its inputs and the number
of multiprocessors. A token's place in its sequence is found by search in cu_seqlens: no length comes to the host.

Memory. Rows of x, residual and gradients may lie apart; the entries of a row must be adjacent, else the tensor is
copied; tables, weight and bias are copied unless contiguous. Loads are upcast at once: statistics and sums are float32.
Addresses are 64-bit; rotary counts tokens times heads in 32 bits.
"""

from dataclasses import replace

import torch
import triton

from leafkern.ops._core.cubin import Shipped
from leafkern.ops._core.launch import Config, next_power_of_2, norm_config, on_device, shares, unit_columns
from leafkern.ops._core.norm import summed_dtype
from leafkern.ops.norm.device import (
    add_norm_backward_kernel,
    add_norm_kernel,
    embed_norm_backward_kernel,
    embed_norm_kernel,
    gelu_backward_kernel,
    gelu_kernel,
    join_kernel,
    rotary_kernel,
)

# Entries of cu_seqlens that one step of the search looks at.
FAN = 256
NORMS = {True: "layer", False: "rms"}
JOIN_OPTIONS = ROTARY_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _norm_config(width: int, backward: bool) -> Config:
    """The heuristic. Backward, two sums and up to four loads of a tile are in registers: three programs for four."""
    config = norm_config(width, backward)
    return replace(config, programs=triton.cdiv(3 * config.programs, 4)) if backward else config


def gelu_config(width: int, backward: bool) -> Config:
    """The heuristic: 16 entries of a tile per thread, in pieces of rows of which three make up most widths in use."""
    columns = min(next_power_of_2(width), 512)
    return Config(rows=min(16, 2048 // columns), columns=columns, warps=4, programs=5 if backward else 8)


def _norm_constants(width: int, norm: str, config: Config) -> dict:
    return {"WIDTH": width, "NORM": norm, "ROWS": config.rows, "COLUMNS": config.columns}


def _embed_constants(width: int, config: Config, **search) -> dict:
    return {"WIDTH": width, "ROWS": config.rows, "COLUMNS": config.columns, **search}


def _gelu_constants(width: int, tanh: bool, config: Config) -> dict:
    return {"WIDTH": width, "TANH": tanh, "ROWS": config.rows, "COLUMNS": config.columns}


def _join_constants(width: int) -> dict:
    """Few columns per program, a line of memory, as there are few; so many rows that some steps read all of them."""
    return {"WIDTH": width, "ROWS": 128, "COLUMNS": min(next_power_of_2(width), 32)}


def _rotary_constants(width: int, backwards: bool) -> dict:
    """Rows of a tile are heads; 8 entries of either half per thread."""
    half = width // 2
    columns = next_power_of_2(half)
    return {"HALF": half, "BACKWARDS": backwards, "ROWS": max(1, 1024 // columns), "COLUMNS": columns}


def _plain(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _apart(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else unit_columns(x) for x in tensors]


def _stride(x: torch.Tensor | None, width: int) -> int:
    """The distance of rows; that of a tensor that isn't there is as good as any."""
    return width if x is None else x.stride(0)


def _floats(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device=x.device, dtype=torch.float32)


def _join(partial: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None) -> None:
    """Fills first (D,), and second, with the sums over the programs' parts."""
    width = first.shape[0]
    constants = _join_constants(width)
    grid = triton.cdiv(width, constants["COLUMNS"]), 1 if second is None else 2
    join_kernel[grid](partial, first, second, partial.shape[0], **constants, **JOIN_OPTIONS)


def add_norm(x, residual, weight, bias, eps: float, layer: bool, with_sum: bool):
    """(norm, statistics), or with the sum: (norm, x + residual, statistics)."""
    tokens, width = x.shape
    out = torch.empty(x.shape, device=x.device, dtype=summed_dtype(x, residual))
    total = torch.empty_like(out) if with_sum else None
    statistics = _floats(x, 2 if layer else 1, tokens)
    if out.numel():
        config = _norm_config(width, backward=False)
        (x, residual), (weight, bias) = _apart(x, residual), _plain(weight, bias)
        with on_device(x):
            add_norm_kernel[triton.cdiv(tokens, config.rows),](
                x,
                residual,
                weight,
                bias,
                out,
                total,
                statistics,
                x.stride(0),
                _stride(residual, width),
                tokens,
                eps,
                **_norm_constants(width, NORMS[layer], config),
                **config.options,
            )
    return (out, total, statistics) if with_sum else (out, statistics)


def add_norm_backward(grad, grad_sum, x, residual, weight, statistics, layer: bool):
    """Gradients of x + residual (in the wider dtype of the two), weight and bias (float32)."""
    tokens, width = x.shape
    dx = torch.empty(x.shape, device=x.device, dtype=summed_dtype(x, residual))
    if not dx.numel():
        return dx, _floats(x, width).zero_(), _floats(x, width).zero_()
    dweight, dbias = _floats(x, width), _floats(x, width)
    config = _norm_config(width, backward=True)
    chunk, programs = shares(x, tokens, 1, config)
    partial = _floats(x, programs, 2, width)
    grad, grad_sum, x, residual = _apart(grad, grad_sum, x, residual)
    with on_device(x):
        add_norm_backward_kernel[programs,](
            grad,
            grad_sum,
            x,
            residual,
            weight.contiguous(),
            statistics,
            dx,
            partial,
            grad.stride(0),
            _stride(grad_sum, width),
            x.stride(0),
            _stride(residual, width),
            tokens,
            chunk,
            **_norm_constants(width, NORMS[layer], config),
            **config.options,
        )
        _join(partial, dweight, dbias)
    return dx, dweight, dbias


def bias_gelu(x, bias, tanh: bool) -> torch.Tensor:
    tokens, width = x.shape
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if out.numel():
        config = gelu_config(width, backward=False)
        (x,), (bias,) = _apart(x), _plain(bias)
        with on_device(x):
            gelu_kernel[triton.cdiv(tokens, config.rows), triton.cdiv(width, config.columns)](
                x, bias, out, x.stride(0), tokens, **_gelu_constants(width, tanh, config), **config.options
            )
    return out


def bias_gelu_backward(grad, x, bias, tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and, in float32, of the bias; without a bias that is (0,)."""
    tokens, width = x.shape
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    dbias = _floats(x, 0 if bias is None else width)
    if not dx.numel():
        return dx, dbias.zero_()
    config = gelu_config(width, backward=True)
    blocks = triton.cdiv(width, config.columns)
    chunk, programs = shares(x, tokens, blocks, config)
    partial = None if bias is None else _floats(x, programs, width)
    (grad, x), (bias,) = _apart(grad, x), _plain(bias)
    with on_device(x):
        gelu_backward_kernel[programs, blocks](
            grad,
            x,
            bias,
            dx,
            partial,
            grad.stride(0),
            x.stride(0),
            tokens,
            chunk,
            **_gelu_constants(width, tanh, config),
            **config.options,
        )
        if partial is not None:
            _join(partial, dbias, None)
    return dx, dbias


def rotary(q, k, cos, sin, backwards: bool) -> tuple[torch.Tensor, torch.Tensor]:
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    q_out, k_out = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))
    constants = _rotary_constants(width, backwards)
    programs = [triton.cdiv(tokens * x, constants["ROWS"]) for x in (heads, kv_heads)]
    if sum(programs):
        q, k, cos, sin = _apart(q, k, cos, sin)
        with on_device(q):
            rotary_kernel[sum(programs),](
                q,
                k,
                cos,
                sin,
                q_out,
                k_out,
                *q.stride()[:2],
                *k.stride()[:2],
                cos.stride(0),
                sin.stride(0),
                tokens,
                heads,
                kv_heads,
                programs[0],
                **constants,
                **ROTARY_OPTIONS,
            )
    return q_out, k_out


def embed_norm(input_ids, cu_seqlens, word, position, token_type, weight, bias, eps: float, token_type_ids):
    """(norm, statistics, the row of each table that a token takes)."""
    tokens, width = input_ids.shape[0], word.shape[1]
    out = torch.empty(tokens, width, device=word.device, dtype=word.dtype)
    statistics = _floats(word, 2, tokens)
    rows = torch.empty(3, tokens, device=word.device, dtype=torch.int32)
    if out.numel():
        config = _norm_config(width, backward=False)
        tensors = input_ids, token_type_ids, cu_seqlens, word, position, token_type, weight, bias
        with on_device(word):
            embed_norm_kernel[triton.cdiv(tokens, config.rows),](
                *_plain(*tensors),
                out,
                statistics,
                rows,
                tokens,
                cu_seqlens.shape[0] - 1,
                word.shape[0],
                position.shape[0],
                token_type.shape[0],
                eps,
                **_embed_constants(width, config, FAN=FAN),
                **config.options,
            )
    return out, statistics, rows


def embed_norm_backward(grad, statistics, rows, word, position, token_type, weight):
    """Gradients of the sum of the embeddings, of weight and of bias, all float32."""
    tokens, width = grad.shape
    dx = _floats(word, tokens, width)
    if not dx.numel():
        return dx, _floats(word, width).zero_(), _floats(word, width).zero_()
    dweight, dbias = _floats(word, width), _floats(word, width)
    config = _norm_config(width, backward=True)
    chunk, programs = shares(word, tokens, 1, config)
    partial = _floats(word, programs, 2, width)
    (grad,) = _apart(grad)
    with on_device(word):
        embed_norm_backward_kernel[programs,](
            grad,
            *_plain(statistics, rows, word, position, token_type, weight),
            dx,
            partial,
            grad.stride(0),
            tokens,
            chunk,
            **_embed_constants(width, config),
            **config.options,
        )
        _join(partial, dweight, dbias)
    return dx, dweight, dbias


# What is shipped, for the proof without a GPU

# The last is the widest that `autograd.WIDEST_NORM` lets come here. "mixed": under autocast, x bf16 and all else fp32.
WIDTHS = {
    "bf16": (384, 768, 896, 1024, 4096, 100),
    "fp16": (384,),
    "fp32": (384, 1024, 4096, 8192),
    "mixed": (384, 768),
}
EMBED_WIDTHS = {"bf16": (384, 768, 1024), "fp32": (384, 768, 1024, 8192)}
GELU_WIDTHS = {"bf16": (1536, 3072, 4096, 100), "fp16": (1536,), "fp32": (1536, 4096)}
ROTARY_WIDTHS = {"bf16": (32, 64, 128, 20), "fp16": (64,), "fp32": (64, 128)}
TESTED = {
    "add_norm layer bf16 D=384",
    "add_norm backward layer bf16 D=384",
    "add_norm backward layer fp32 D=8192",
    "add_norm_sum backward rms bf16 D=896",
    "embed_norm fp32 D=384",
    "embed_norm backward fp32 D=384",
    "bias_gelu bf16 D=1536",
    "bias_gelu backward bf16 D=1536",
    "rotary bf16 D=64",
    "join two D=384",
}


def shipped() -> list[Shipped]:
    """What is launched for the widths of encoders in use, the widest norm, and some odd ones."""
    found = [_shipped_join(*case) for case in ((384, True), (1536, False), (100, True), (100, False))]
    for dtype, widths in WIDTHS.items():
        for width in widths:
            for norm, total in (("layer", False), ("rms", True)):
                found += [_shipped_norm(width, dtype, norm, total, backward) for backward in (False, True)]
    for dtype, widths in EMBED_WIDTHS.items():
        found += [_shipped_embed(width, dtype, backward) for width in widths for backward in (False, True)]
    for dtype, widths in GELU_WIDTHS.items():
        found += [_shipped_gelu(width, dtype, tanh, back) for width in widths for tanh in (0, 1) for back in (0, 1)]
    for dtype, widths in ROTARY_WIDTHS.items():
        found += [_shipped_rotary(width, dtype, backwards) for width in widths for backwards in (False, True)]
    return found


def _shipped(title: str, kernel, types: dict, constants: dict, options: dict, programs: int = 1) -> Shipped:
    """Arguments that `types` has in excess are left out; those that it gives as None are absent."""
    constants = constants | {name: None for name, kind in types.items() if kind is None and name in kernel.arg_names}
    types = {name: kind for name, kind in types.items() if kind is not None and name in kernel.arg_names}
    return Shipped("norm", title, kernel, types, constants, options, programs, title in TESTED)


def _types(width: int, pointers: dict[str, str | None], *strides: str, numbers: tuple[str, ...]) -> dict:
    found = {name: None if kind is None else f"*{kind}:16" for name, kind in pointers.items()}
    return found | dict.fromkeys(strides, "i32:16" if width % 16 == 0 else "i32") | dict.fromkeys(numbers, "i32")


def _shipped_norm(width: int, dtype: str, norm: str, total: bool, backward: bool) -> Shipped:
    wide = "fp32" if dtype == "mixed" else dtype
    narrow = "bf16" if dtype == "mixed" else dtype
    # The backward pass of add_norm_sum has the sum in place of x, and no residual.
    pointers = dict.fromkeys(("residual", "weight", "bias", "out", "total", "grad", "grad_sum", "dx"), wide)
    pointers |= {"x": wide if total and backward else narrow, "statistics": "fp32", "partial": "fp32"}
    pointers |= {"residual": None} if total and backward else {} if total else {"total": None, "grad_sum": None}
    strides = "x_stride", "residual_stride", "grad_stride", "sum_stride"
    types = _types(width, pointers, *strides, numbers=("tokens", "chunk")) | {"eps": "fp32"}
    config = _norm_config(width, backward)
    title = f"add_norm{'_sum' if total else ''}{' backward' if backward else ''} {norm} {dtype} D={width}"
    kernel, constants = add_norm_backward_kernel if backward else add_norm_kernel, _norm_constants(width, norm, config)
    return _shipped(title, kernel, types, constants, config.options, config.programs)


def _shipped_embed(width: int, dtype: str, backward: bool) -> Shipped:
    pointers = dict.fromkeys(("word", "position", "token_type", "weight", "bias", "out", "grad"), dtype)
    pointers |= {"input_ids": "i64", "token_type_ids": None, "cu_seqlens": "i32", "table_rows": "i32"}
    pointers |= dict.fromkeys(("statistics", "dx", "partial"), "fp32")
    counts = "tokens", "sequences", "words", "positions", "types", "chunk"
    types = _types(width, pointers, "grad_stride", numbers=counts) | {"eps": "fp32"}
    config = _norm_config(width, backward)
    constants = _embed_constants(width, config) if backward else _embed_constants(width, config, FAN=FAN)
    kernel = embed_norm_backward_kernel if backward else embed_norm_kernel
    title = f"embed_norm{' backward' if backward else ''} {dtype} D={width}"
    return _shipped(title, kernel, types, constants, config.options, config.programs)


def _shipped_gelu(width: int, dtype: str, tanh: bool, backward: bool) -> Shipped:
    pointers = dict.fromkeys(("x", "bias", "out", "grad", "dx"), dtype) | {"partial": "fp32"}
    types = _types(width, pointers, "x_stride", "grad_stride", numbers=("tokens", "chunk"))
    config = gelu_config(width, backward)
    kernel, constants = gelu_backward_kernel if backward else gelu_kernel, _gelu_constants(width, bool(tanh), config)
    title = f"bias_gelu{' tanh' if tanh else ''}{' backward' if backward else ''} {dtype} D={width}"
    return _shipped(title, kernel, types, constants, config.options, config.programs)


def _shipped_rotary(width: int, dtype: str, backwards: bool) -> Shipped:
    pointers = dict.fromkeys(("q", "k", "q_out", "k_out"), dtype) | {"cos": "fp32", "sin": "fp32"}
    strides = "q_token", "q_head", "k_token", "k_head", "cos_stride", "sin_stride"
    types = _types(width, pointers, *strides, numbers=("tokens", "heads", "kv_heads", "q_programs"))
    title = f"rotary{' backwards' if backwards else ''} {dtype} D={width}"
    return _shipped(title, rotary_kernel, types, _rotary_constants(width, backwards), ROTARY_OPTIONS)


def _shipped_join(width: int, second: bool) -> Shipped:
    pointers = {"partial": "fp32", "first": "fp32", "second": "fp32" if second else None}
    types = _types(width, pointers, numbers=("count",))
    return _shipped(
        f"join{' two' if second else ''} D={width}", join_kernel, types, _join_constants(width), JOIN_OPTIONS
    )
