"""The definitions of the operations around attention in plain PyTorch, differentiable."""

import torch
import torch.nn.functional as F

from leafkern.ops._core.norm import brute_norm
from leafkern.ops._core.normalize import at_least_float32


def brute_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x + residual) over the last dimension, and x + residual."""
    h = x.to(at_least_float32(x.dtype))
    h = h if residual is None else h + residual.to(h.dtype)
    return brute_norm(h, weight, bias, eps, kind), h


def brute_bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> torch.Tensor:
    """gelu(h) for h = x + bias: h · Φ(h), or with tanh in place of the error function."""
    h = x.to(at_least_float32(x.dtype))
    h = h if bias is None else h + bias.to(h.dtype)
    if approximate == "tanh":
        return 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return 0.5 * h * (1 + torch.erf(h / 2**0.5))


def brute_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x · cos + rotate_half(x) · sin, where rotate_half puts minus the second half of a head before the first."""

    def rotated(x):
        x = x.to(at_least_float32(x.dtype))
        first, second = x.chunk(2, -1)
        return x * cos[:, None].to(x.dtype) + torch.cat((-second, first), -1) * sin[:, None].to(x.dtype)

    return rotated(q), rotated(k)


def brute_embed_norm(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    token_type_ids: torch.Tensor | None,
) -> torch.Tensor:
    """LayerNorm of the sum of three embeddings, one sequence at a time; the tokens of the sequences only."""
    dtype = at_least_float32(word.dtype)
    places = [torch.arange(length, device=word.device) for length in cu_seqlens.diff().tolist()]
    place = torch.cat([*places, cu_seqlens.new_zeros(0, dtype=torch.int64)])
    ids = input_ids[: len(place)]
    types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids[: len(place)]
    tables = ((word, ids), (position, place), (token_type, types))
    h = sum(F.embedding(rows, table.to(dtype)) for table, rows in tables)
    return brute_norm(h, weight, bias, eps, "layer")
