"""leafkern in transformers' models: its attention by the name "leafkern", and `patch` for one whole model.

Importing this module registers the name; nothing else in transformers changes.

    import leafkern.integrations.transformers
    model = AutoModel.from_pretrained(path, attn_implementation="leafkern")
    with leafkern.patch(model) as patch:
        print(*patch.replaced, sep="\\n")
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from leafkern.errors import InputError
from leafkern.nn.packed import spread_rows, take_rows
from leafkern.ops import varlen_attention

NAME = "leafkern"

_CUSTOM_MASK = "attention_mask: a pattern of the model's own; leafkern serves full, causal and sliding-window attention"
_PACKED_ROWS = (
    "position_ids: several sequences in one row, or (under torch.compile) not known; leafkern finds them by "
    "cu_seq_lens_q and max_length_q, which DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives"
)
# What a model may ask of its attention that varlen_attention doesn't do.
_REFUSED = {
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias by position",
    "head_mask": "a mask of heads",
    "cache": "a paged cache",
    "output_attentions": "returned weights (output_attentions)",
}


class Packing(NamedTuple):
    """What all layers of a forward share: where the sequences stand and what a token sees. Made by `mask`.

    cu_seqlens, max_seqlen: as varlen_attention takes them. place: (T,) int64, the rows of the (B·L) padded ones that
    hold tokens; None if all do. causal, window: what the mask says. refusal: why it can't be served, or None.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    place: torch.Tensor | None
    causal: bool
    window: tuple[int, int]
    refusal: str | None = None


def register() -> None:
    """Makes the name "leafkern" known to transformers. Importing this module has done it; twice does no harm."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    config=None,
    **options,
) -> Packing:
    """The mask function of `attention`: called by transformers once per forward and kind of mask, not per layer.

    attention_mask: (B, L) bool, True at tokens, or None. Where it is given, one transfer tells the host how many tokens
    there are: one synchronisation per kind of mask (a model with full and sliding layers has two kinds, and the
    second finds the stream drained by the first), which torch.compile breaks its graph at. Without it there is none.
    """
    bidirectional = "allow_is_bidirectional_skip" in options
    plain = options.get("allow_is_bidirectional_skip" if bidirectional else "allow_is_causal_skip", True)
    refusal = None if plain else _CUSTOM_MASK if use_vmap or bidirectional else _PACKED_ROWS
    # transformers counts a causal window with the token itself, and one to both sides without.
    reach = -1 if local_size is None else local_size - (not bidirectional)
    if use_vmap and not bidirectional and getattr(config, "use_bidirectional_attention", None) is True:
        # Gemma 3 lays this pattern over a causal one; its window stays as it was.
        bidirectional, refusal = True, None
    # Chunks come by the same arguments as windows.
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        refusal = _CUSTOM_MASK
    sees = {"causal": not bidirectional, "window": (reach, reach)}
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        refusal = f"attention_mask: shape {tuple(attention_mask.shape)}; expected {(batch_size, kv_length)}, (B, L)"
        attention_mask = None
    if attention_mask is None or attention_mask.numel() == 0:
        device = options.get("device") or options["cache_position"].device
        return Packing(_equal_bounds(batch_size, kv_length, device), kv_length, None, refusal=refusal, **sees)

    counts = attention_mask.sum(1, dtype=torch.int32)
    cu_seqlens = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    begins = (attention_mask[:, 1:] & ~attention_mask[:, :-1]).sum(1, dtype=torch.int32) + attention_mask[:, 0]
    tokens, longest, pieces = torch.stack([cu_seqlens[-1], counts.max(), begins.max()]).tolist()
    if pieces > 1 and 0 <= reach < kv_length - 1:
        raise InputError(
            "attention_mask: a row with padding between its tokens; expected none for a sliding window, "
            "which counts distances across it"
        )
    place = None
    if tokens < attention_mask.numel():
        place = torch.nonzero_static(attention_mask.flatten(), size=tokens)[:, 0]
    return Packing(cu_seqlens, longest, place, refusal=refusal, **sees)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """varlen_attention for a layer of a transformers model; called by the model.

    query: (B, H, L, D), key, value: (B, H_kv, L, D) -> (B, L, H, D), and None for the weights, which never exist. With
    padding, on any side, q, k and v are packed and the result is unpacked: rows of padding are 0. Without, and where
    each of q, k and v has its heads beside each other in memory or B is 1, nothing is copied and nothing waits for
    the host. Unpadded input: (1, T) with cu_seq_lens_q (B+1,) and max_length_q, which keys share; without
    max_length_q it is T, which costs time.

    A token sees what the mask says, as in eager attention; a layer that is not causal (is_causal, else the module's
    own) sees both sides under a causal mask too, as in transformers' flash attention. Without a mask `is_causal` and
    `sliding_window` decide. Under autocast q, k and v are in its dtype.

    Raises InputError for what varlen_attention doesn't do: dropout in training, keys of another length than queries
    (a filled cache, generation, cross-attention), masks given as 4-D tensors, patterns other than full, causal and
    sliding, padding between the tokens of a sliding window, capped scores, sinks, a bias by position, returned weights.
    """
    _check(module, query, key, attention_mask, dropout, options)
    batch, _, length, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reach = -1 if sliding_window is None else sliding_window - 1
    window, place = (reach, reach), None
    if attention_mask is not None:
        cu_seqlens, max_seqlen, place, mask_causal, window, refusal = attention_mask
        causal = causal and mask_causal
        if refusal is not None and (cu_seq_lens_q is None or refusal != _PACKED_ROWS):
            raise InputError(refusal)
    if cu_seq_lens_q is not None:
        if place is not None:
            raise InputError("cu_seq_lens_q: given beside an attention_mask with padding; expected one of the two")
        cu_seqlens, max_seqlen = cu_seq_lens_q, batch * length if max_length_q is None else int(max_length_q)
    elif attention_mask is None:
        cu_seqlens, max_seqlen = _equal_bounds(batch, length, query.device), length

    q, k, v = (_packed(x, place) for x in (query, key, value))
    out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale=scaling, causal=causal, window=window)
    if place is not None:
        out = spread_rows(out, place, batch * length)
    return out.view(batch, length, *out.shape[1:]), None


def _check(module, query, key, attention_mask, dropout, options) -> None:
    if dropout and module.training:
        raise InputError(
            f"dropout: {dropout}; leafkern attention has none: set attention_dropout or attention_probs_dropout_prob "
            "(by the model's config) to 0"
        )
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise InputError(f"{name}: leafkern attention has no {what}; use attn_implementation='eager' or 'sdpa'")
    config = getattr(module, "config", None)
    crossing = any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention"))
    if crossing or query.shape[2] != key.shape[2]:
        raise InputError(
            f"key: {key.shape[2]} rows for {query.shape[2]} queries{' of a model with cross-attention' * crossing}; "
            "leafkern attention is for encoders, whose tokens attend to each other: no cross-attention, no generation"
        )
    if attention_mask is not None and not isinstance(attention_mask, Packing):
        raise InputError(
            f"attention_mask: {type(attention_mask).__name__} of shape {tuple(attention_mask.shape)}; expected the "
            "(B, L) padding mask, given to the model, or None"
        )


def _packed(x: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """(B, H, L, D) -> (T, H, D)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    x = x.transpose(1, 2).flatten(0, 1)
    return x if place is None else take_rows(x, place)


def _equal_bounds(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of `batch` sequences of `length` tokens."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


register()
