"""`patch`: one transformers model on leafkern's operations, and the way back.

with leafkern.patch(model) as patch:
    print(*patch.replaced, sep="\\n")
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from leafkern.errors import InputError
from leafkern.integrations.transformers import NAME, attention
from leafkern.nn.bert import linear_gelu
from leafkern.ops.norm import APPROXIMATIONS, add_norm, bias_gelu, rotary


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
    add_norm, and dense with GELU, on CUDA by a product without bias and bias_gelu; in attention as Llama's (Qwen2,
    Mistral) rotary embeddings, by rotary, where no cache is filled (pass use_cache=False). A module is recognised by
    its parts and by its result on a few random rows; one whose forward was replaced before, or with hooks on its parts,
    is left alone. Other rotary embeddings and the residual sums of pre-norm layers stay with transformers, whose
    functions and layers hold them. Not timed yet.

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
    if parts == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), nn.Linear):
        return _rotary_replacement(module)
    approximate = _approximation(module)
    return None if approximate is None else functools.partial(_bias_gelu, module, approximate=approximate)


def _rotary_replacement(module: nn.Module) -> Callable | None:
    """For attention as in Llama: four linear layers, and rotary embeddings given to it as (cos, sin)."""
    if not all(hasattr(module, name) for name in ("head_dim", "scaling", "attention_dropout")):
        return None
    states, angles = _rows(module.q_proj.weight, module.q_proj.in_features, module.head_dim // 2)
    angles = torch.cat([angles, angles], dim=-1)
    rows = states, (angles.cos(), angles.sin()), None
    return _proved(module, _rotary_attention, rows, original=type(module).forward)


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


def _proved(module: nn.Module, forward: Callable, rows: tuple, *, near: float = 0.02, **options) -> Callable | None:
    """`forward` for `module`, if both agree on `rows`: within `near`, as half precision and tf32 do."""
    replacement = functools.partial(forward, module, **options)
    with evaluating(module):
        try:
            expected, found = module(*rows), replacement(*rows)
        except (InputError, TypeError, RuntimeError):
            return None
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
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


def _rotary_attention(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: object = None,
    past_key_values: object = None,
    *,
    original: Callable,
    **options,
) -> tuple[torch.Tensor, None]:
    if past_key_values is not None:
        return original(module, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    batch, length, _ = hidden_states.shape
    linears = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (linear(hidden_states).view(batch * length, -1, module.head_dim) for linear in linears)
    cos, sin = (x.expand(batch, -1, -1).reshape(batch * length, -1) for x in position_embeddings)
    heads = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (*rotary(q, k, cos, sin), v))
    options["sliding_window"] = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    dropout = module.attention_dropout if module.training else 0.0
    out, _ = attention(module, *heads, attention_mask, dropout=dropout, scaling=module.scaling, **options)
    return module.o_proj(out.flatten(2)), None
