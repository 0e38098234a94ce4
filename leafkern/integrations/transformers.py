"""leafkern in transformers' models: its attention by the name "leafkern", and `patch` for one whole model.

Importing this module registers the name; nothing else in transformers changes.

    import leafkern.integrations.transformers
    model = AutoModel.from_pretrained(path, attn_implementation="leafkern")
    with leafkern.patch(model) as patch:
        print(*patch.replaced, sep="\\n")
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from leafkern.errors import InputError
from leafkern.nn.bert import linear_gelu
from leafkern.nn.packed import spread_rows, take_rows
from leafkern.ops import varlen_attention
from leafkern.ops.norm import APPROXIMATIONS, add_norm, bias_gelu

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


class Patch:
    """What was replaced on one model, and the way back: `undo()`, or the end of a `with` block.

    replaced: lines of "module path: what by what". Copies and pickles of the model stay patched; their Patch is
    `model._leafkern_patch`.
    """

    def __init__(self, model: nn.Module):
        if any("_leafkern_patch" in vars(module) for module in model.modules()):
            raise InputError(f"model: this {type(model).__name__} is patched already; expected undo() before")
        self.replaced: list[str] = []
        self._before: list[tuple[object, str, bool, object]] = []
        self.set(model, "_leafkern_patch", self)

    def keep(self, thing: object, name: str) -> None:
        """`undo` will bring back this attribute as it is now, or as absent."""
        self._before.append((thing, name, name in vars(thing), vars(thing).get(name)))

    def set(self, thing: object, name: str, value: object, line: str | None = None) -> None:
        """Sets an attribute; `line` is what `replaced` says of it."""
        self.keep(thing, name)
        setattr(thing, name, value)
        if line is not None:
            self.replaced.append(line)

    def undo(self) -> None:
        """Brings back everything as it was. Twice does no harm."""
        while self._before:
            thing, name, present, value = self._before.pop()
            if present:
                setattr(thing, name, value)
            else:
                delattr(thing, name)
        self.replaced.clear()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_) -> None:
        self.undo()


def patch(model: PreTrainedModel) -> Patch:
    """Makes one transformers model run on leafkern's operations; its parameters stay where they are.

    Replaced, on this instance alone: attention, by `attention`; LayerNorm and RMSNorm, by add_norm; GELU, by bias_gelu;
    of BERT and its relatives the ends of both halves of a layer (dense, dropout, LayerNorm of the sum), by one
    add_norm, and dense with GELU, on CUDA by a product without bias and bias_gelu. A module is recognised by its parts
    and by its result on a few random rows; one whose forward was replaced before, or with hooks on its parts, is left
    alone. Rotary embeddings and the residual sums of pre-norm layers stay with transformers, whose functions and layers
    hold them. Not timed yet.

    state_dict, save_pretrained and deepcopy work as before. Training needs an attention dropout of 0; other dropout
    stays. Raises InputError for another kind of model, one that is patched already, and one whose attention
    transformers can't exchange.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model: {type(model).__name__}; expected a transformers PreTrainedModel")
    done = Patch(model)
    try:
        set_attention(done, model)
        inside = set()
        for path, module in model.named_modules():
            if module in inside or _is_touched(module):
                continue
            forward = _replacement(module)
            if forward is not None:
                line = f"{path}: {type(module).__name__} by {forward.func.__name__.strip('_')}"
                done.set(module, "forward", forward, line)
                inside.update(module.children())
    except Exception:
        done.undo()
        raise
    return done


def patch_if_equal(model: PreTrainedModel, run: Callable[[], torch.Tensor]) -> str | None:
    """`patch(model)`, kept if `run` gives the same before and after, within rounding; else undone, and the reason."""
    with evaluating(model):
        expected = run()
        try:
            done = patch(model)
        except InputError as error:
            return str(error)
        try:
            found = run()
        except InputError as error:
            done.undo()
            return str(error)
    if equal_states(found, expected):
        return None
    done.undo()
    return "other states than with its own attention"


def equal_states(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether hidden states differ by no more than rounding through a model's layers."""
    near = 1e-3 if expected.element_size() > 2 else 0.05
    return found.shape == expected.shape and bool((found - expected).norm() <= near * expected.norm())


def set_attention(done: Patch, model: PreTrainedModel) -> None:
    """Switches the attention of `model` and the models inside it to "leafkern"."""
    models = {id(m.config): (path, m.config) for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    configs = [config for _, config in models.values()]
    for config in configs:
        configs += [part for name in config.sub_configs if (part := getattr(config, name)) is not None]
        done.keep(config, "_attn_implementation_internal")
    before = [config._attn_implementation for _, config in models.values()]
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(
            f"model: the installed transformers can't exchange the attention of {type(model).__name__}; "
            "expected a model that takes it from AttentionInterface"
        )
    for (path, config), name in zip(models.values(), before, strict=True):
        if config._attn_implementation == NAME:
            done.replaced.append(f"{path or 'model'}: attention {name} by {NAME}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; each module's mode as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _is_touched(module: nn.Module) -> bool:
    """Whether something else than this module's class, or someone who listens inside, has a part in its forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    listened = (getattr(part, name) for part in module.children() for name in hooks)
    return "forward" in vars(module) or any(listened)


def _replacement(module: nn.Module) -> Callable | None:
    """What may take the place of `module.forward`, if that is known."""
    parts = {name: type(part) for name, part in module.named_children()}
    if parts == {"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}:
        rows = _rows(module.dense.weight, module.dense.in_features, module.dense.out_features)
        return _proved(module, _dense_add_norm, rows)
    if list(parts) == ["dense", "intermediate_act_fn"] and parts["dense"] is nn.Linear:
        approximate = _approximation(module.intermediate_act_fn)
        if approximate is None:
            return None
        rows = _rows(module.dense.weight, module.dense.in_features)
        return _proved(module, _dense_bias_gelu, rows, approximate=approximate)
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return functools.partial(_add_norm, module, eps=module.eps, kind="layer")
    if type(module).__name__.endswith("RMSNorm") and list(dict(module.named_parameters())) == ["weight"]:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is None or module.weight.ndim != 1:
            return None
        return _proved(module, _add_norm, _rows(module.weight, len(module.weight)), eps=eps, kind="rms")
    approximate = _approximation(module)
    return None if approximate is None else functools.partial(_bias_gelu, module, approximate=approximate)


def _approximation(module: nn.Module) -> str | None:
    """Which of bias_gelu's forms `module` is."""
    if "gelu" not in type(module).__name__.lower() or any(True for _ in module.parameters()):
        return None
    rows = torch.linspace(-20, 20, 101)[None]
    # The two forms lie 5e-4 apart.
    found = (a for a in APPROXIMATIONS if _proved(module, _bias_gelu, (rows,), near=1e-5, approximate=a))
    return next(found, None)


def _rows(like: torch.Tensor, *widths: int) -> tuple[torch.Tensor, ...]:
    """Random (1, 3, D) of the dtype and on the device of `like`, for each width; the global generators stay."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 3, width, generator=generator).to(like) for width in widths)


def _proved(
    module: nn.Module, forward: Callable, rows: tuple[torch.Tensor, ...], *, near: float = 0.02, **options
) -> Callable | None:
    """`forward` for `module`, if both agree on `rows`: within `near`, as half precision and tf32 do."""
    replacement = functools.partial(forward, module, **options)
    with evaluating(module):
        try:
            expected = module(*rows)
        except (TypeError, RuntimeError):
            return None
        found = replacement(*rows)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return None
    return replacement if torch.allclose(found, expected, rtol=near, atol=near) else None


def _add_norm(module: nn.Module, x: torch.Tensor, *, eps: float, kind: str) -> torch.Tensor:
    # Under autocast x may be narrower than the weight: an RMSNorm, and on CUDA a LayerNorm, returns the wider dtype.
    x = x.to(torch.promote_types(x.dtype, module.weight.dtype))
    return add_norm(x, None, module.weight, getattr(module, "bias", None), eps=eps, kind=kind)


def _dense_add_norm(module: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    norm = module.LayerNorm
    return add_norm(module.dropout(module.dense(hidden_states)), input_tensor, norm.weight, norm.bias, eps=norm.eps)


def _bias_gelu(module: nn.Module, x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    return bias_gelu(x, None, approximate=approximate)


def _dense_bias_gelu(module: nn.Module, hidden_states: torch.Tensor, *, approximate: str) -> torch.Tensor:
    return linear_gelu(module.dense, hidden_states, approximate=approximate)
