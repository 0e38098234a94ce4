"""The encoder's pieces around attention, each in one pass over its tokens."""

import torch

from leafkern.errors import InputError, unknown_name
from leafkern.ops._core.checks import (
    check_cu_seqlens,
    check_floating,
    check_same_device,
    check_tensor,
    values_checked,
)
from leafkern.ops._core.norm import check_norm
from leafkern.ops.norm import autograd

__all__ = ["add_norm", "add_norm_sum", "bias_gelu", "embed_norm", "rotary"]

APPROXIMATIONS = ("none", "tanh")


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    kind: str = "layer",
) -> torch.Tensor:
    """norm(x + residual) over the last dimension.

    x: (..., D), any float dtype; residual: of the same shape, or None. weight: (D,); bias: (D,) or None. kind: "layer"
    (Ba et al., arXiv 1607.06450: mean and biased variance over D) or "rms" (Zhang and Sennrich, arXiv 1910.07467); eps
    is added to the variance or mean square. Returns (..., D), contiguous, in the common dtype of x and residual;
    statistics are in at least float32, autocast or not. Differentiable once in x, residual, weight and bias: the
    backward pass keeps two numbers per row and adds x and residual again.

    Backends: Triton (CUDA; each argument fp32, fp16 or bf16; D up to 8192): reads x and residual once; rows may lie
    apart, but where the entries of a row are not adjacent a tensor is copied; same result every time. Reference
    (everything else): PyTorch's layer norm. There x + residual is rounded to its dtype before its norm is taken.

    Raises InputError for shapes, dtypes or devices that don't fit, an unknown kind and a negative eps.
    """
    eps = _checked_eps(x, residual, weight, bias, eps, kind)
    out, _ = autograd.add_norm(_flat(x), _flat(residual), weight, bias, eps, kind == "layer")
    return out.view(x.shape)


def add_norm_sum(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    kind: str = "layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual): for pre-norm encoders, which take both.

    Arguments, errors, precision and backends are those of `add_norm`, but the norm is always that of the sum as it is
    returned, and the backward pass keeps that sum, not x and residual. Differentiable once, through both results.
    """
    eps = _checked_eps(x, residual, weight, bias, eps, kind)
    out, total, _ = autograd.add_norm_sum(_flat(x), _flat(residual), weight, bias, eps, kind == "layer")
    return out.view(x.shape), total.view(x.shape)


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """(..., D) -> (T, D)."""
    return x if x is None or x.ndim == 2 else x.flatten(0, -2)


def _check_rows(x) -> None:
    if check_floating("x", x).ndim < 2:
        raise InputError(f"x: expected (..., D) of at least 2 dimensions, got shape {tuple(x.shape)}")


def _checked_eps(x, residual, weight, bias, eps, kind) -> float:
    """eps, after the checks that both norms share."""
    _check_rows(x)
    eps = check_norm(x, residual, weight, bias, eps, kind)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias)
    return eps


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none") -> torch.Tensor:
    """gelu(x + bias), with h = x + bias: h · Φ(h) (Hendrycks and Gimpel, arXiv 1606.08415).

    x: (..., D), any float dtype. bias: (D,) or None. approximate: "none" for the error function, "tanh" for
    0.5 h (1 + tanh(√(2/π) (h + 0.044715 h³))). Returns (..., D), contiguous, in the dtype of x. Differentiable once in
    x and bias; the gradient of the bias is summed, in at least float32, in the pass that makes that of x.

    Backends and their rule of layout are those of `add_norm`, for any D: Triton computes in float32, the reference in
    the common dtype of x and bias. Raises InputError for shapes, dtypes or devices that don't fit and an unknown
    approximation.
    """
    _check_rows(x)
    if bias is not None and check_floating("bias", bias, ndim=1).shape[0] != x.shape[-1]:
        raise InputError(f"bias: {bias.shape[0]} entries; expected D = {x.shape[-1]}")
    if approximate not in APPROXIMATIONS:
        raise unknown_name("approximate", approximate, APPROXIMATIONS)
    check_same_device(x=x, bias=bias)
    return autograd.bias_gelu(_flat(x), bias, approximate == "tanh").view(x.shape)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of queries and keys, halves of a head as pairs.

    With h = D / 2: x'_i = x_i cos_i - x_(i+h) sin_i and x'_(i+h) = x_(i+h) cos_i + x_i sin_i, i < h.

    q: (T, H, D), k: (T, H_kv, D) of the same float dtype, D even; both may be views, such as slices of one packed
    tensor. cos, sin: (T, D), any float dtype, as transformers makes them: the two halves are equal, and only the first
    is read. Returns both rotated, contiguous, in the dtype of q, computed in at least float32. Differentiable once, in
    q and k alone.

    Backends: Triton (CUDA; fp32, fp16, bf16): one launch for both; where the entries of a head are not adjacent q or k
    is copied. Reference (everything else). Raises InputError for shapes, dtypes or devices that don't fit, and for cos
    or sin that ask for a gradient.
    """
    tokens, _, width = check_floating("q", q, ndim=3).shape
    check_floating("k", k, ndim=3)
    if k.dtype != q.dtype:
        found, expected = (str(x.dtype).removeprefix("torch.") for x in (k, q))
        raise InputError(f"k: dtype {found}; expected that of q, {expected}")
    if k.shape[0] != tokens or k.shape[2] != width:
        raise InputError(f"k: shape {tuple(k.shape)}; expected (T, H_kv, D) with T = {tokens} and D = {width} as in q")
    if width < 2 or width % 2:
        raise InputError(f"q: width D = {width}; expected an even number of at least 2")
    for name, x in (("cos", cos), ("sin", sin)):
        if check_floating(name, x, ndim=2).shape != (tokens, width):
            raise InputError(f"{name}: shape {tuple(x.shape)}; expected (T, D) = ({tokens}, {width})")
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name}: requires a gradient; rotary has one for q and k only, so detach it")
    check_same_device(q=q, k=k, cos=cos, sin=sin)
    return autograd.rotary(q, k, cos, sin, False)


def embed_norm(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    token_type_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm of word[input_ids] + position[place in the sequence] + token_type[token_type_ids], BERT's embeddings.

    (Devlin et al., arXiv 1810.04805.) input_ids: (T,) int64 or int32; token_type_ids: likewise, or None for row 0
    everywhere. cu_seqlens: (B+1,) int32 (int64 is taken too), rising from 0 to T. word: (V, D), position: (P, D),
    token_type: (Y, D), any float dtype; no sequence longer than P. weight: (D,); bias: (D,) or None; eps as in
    `add_norm`. Returns (T, D) in the dtype of word; sum and statistics are in at least float32 in Triton, whose D is up
    to 8192; in the reference the sum is rounded to the tables' common dtype. Differentiable once in the tables, weight
    and bias; gradients of tables are dense.

    Raises InputError for shapes, dtypes or devices that don't fit and, where values are checked (CPU, or
    LEAFKERN_CHECK=1), for an id that its table does not have and a sequence longer than P. Unchecked, the nearest row
    of the table is taken.
    """
    ids = (torch.int64, torch.int32)
    tokens = check_tensor("input_ids", input_ids, ndim=1, dtypes=ids).shape[0]
    if token_type_ids is not None:
        check_tensor("token_type_ids", token_type_ids, ndim=1, dtypes=ids)
        if token_type_ids.shape[0] != tokens:
            raise InputError(f"token_type_ids: {token_type_ids.shape[0]} entries; expected T = {tokens}")
    width = check_floating("word", word, ndim=2).shape[1]
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        rows, columns = check_floating(name, table, ndim=2).shape
        if rows < 1 or columns != width:
            raise InputError(f"{name}: shape {(rows, columns)}; expected at least one row of D = {width}, that of word")
    eps = check_norm(word, None, weight, bias, eps)
    check_cu_seqlens(cu_seqlens, tokens)
    tables = {"word": word, "position": position, "token_type": token_type}
    check_same_device(
        input_ids=input_ids, cu_seqlens=cu_seqlens, **tables, weight=weight, bias=bias, token_type_ids=token_type_ids
    )
    if values_checked(cu_seqlens):
        _check_ids("input_ids", input_ids, word)
        if token_type_ids is not None:
            _check_ids("token_type_ids", token_type_ids, token_type)
        longest = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        if longest > position.shape[0]:
            raise InputError(f"cu_seqlens: a sequence of {longest} tokens; position has {position.shape[0]} rows")
    return autograd.embed_norm(input_ids, cu_seqlens, word, position, token_type, weight, bias, eps, token_type_ids)[0]


def _check_ids(name: str, ids: torch.Tensor, table: torch.Tensor) -> None:
    """Names the first of `ids` that is no row of `table`."""
    bad = (ids < 0) | (ids >= table.shape[0])
    if bad.any():
        row = int(bad.nonzero()[0])
        raise InputError(f"{name}: row {row} holds {int(ids[row])}; expected 0 to {table.shape[0] - 1}")
