"""A sentence-embedding model: backbone, pooling, dense heads, normalisation."""

import inspect
import re

import torch
from torch import nn

from leafkern.errors import InputError, unknown_name
from leafkern.nn.packed import PackedBatch
from leafkern.ops import mean_pool
from leafkern.ops._core.normalize import at_least_float32, normalize_rows

POOLING = ("mean", "cls", "last")


def activation_module(path: str) -> nn.Module:
    """The activation that a sentence-transformers Dense config names, such as "torch.nn.modules.activation.Tanh".

    Only torch.nn's activations and Identity are accepted: a config must not be able to import anything else.
    """
    match = re.fullmatch(r"torch\.nn\.(?:modules\.(?:activation|linear)\.)?(\w+)", path)
    found = getattr(nn, match[1], None) if match else None
    usable = inspect.isclass(found) and (found is nn.Identity or found.__module__ == "torch.nn.modules.activation")
    if not usable:
        raise InputError(
            f"activation_function: {path!r} is not an activation of torch.nn; expected, for example, "
            "'torch.nn.modules.linear.Identity' or 'torch.nn.modules.activation.Tanh'"
        )
    try:
        return found()
    except TypeError:
        raise InputError(f"activation_function: {path!r} needs arguments, which the layout can't carry") from None


class Dense(nn.Module):
    """A linear layer with an activation, and optionally a residual, on pooled vectors: (B, in) -> (B, out).

    The same parameters as sentence-transformers' Dense: `linear.weight`, `linear.bias` and, where a residual
    changes the width, `residual.weight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: nn.Module | None = None,
        use_residual: bool = False,
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation if activation is not None else nn.Identity()
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.linear(x))
        if not self.use_residual:
            return y
        return y + (self.residual(x) if self.in_features != self.out_features else x)

    def config(self) -> dict:
        """The contents of sentence-transformers' config.json for this head."""
        kind = type(self.activation)
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__qualname__}",
        } | ({"use_residual": True} if self.use_residual else {})


class SentenceModel(nn.Module):
    """backbone -> pooling -> dense heads -> L2 normalisation.

    backbone: a module with `width` and forward(PackedBatch) -> (T, width). pooling: "mean", "cls" (first token) or
    "last" (last token). An empty sequence pools to 0. normalize: x / max(‖x‖, 1e-12) at the end.
    """

    def __init__(
        self, backbone: nn.Module, *, pooling: str = "mean", dense: tuple[Dense, ...] = (), normalize: bool = False
    ):
        super().__init__()
        if pooling not in POOLING:
            raise unknown_name("pooling", pooling, POOLING)
        width = backbone.width
        for head in dense:
            if head.in_features != width:
                raise InputError(f"dense: a head takes {head.in_features} features, but {width} come in")
            width = head.out_features
        self.backbone = backbone
        self.pooling = pooling
        self.dense = nn.ModuleList(dense)
        self.normalize = normalize

    @property
    def width(self) -> int:
        """Width of the pooled states."""
        return self.backbone.width

    @property
    def dim(self) -> int:
        """Width of the output."""
        return self.dense[-1].out_features if len(self.dense) else self.width

    def pooled(self, batch: PackedBatch) -> torch.Tensor:
        """(B, width), before the dense heads and normalisation; float32 also for half-precision weights."""
        if self.pooling == "mean" and hasattr(self.backbone, "mean_pooled"):
            return self.backbone.mean_pooled(batch)
        states = self.backbone(batch)
        if self.pooling == "mean":
            return mean_pool(states, batch.cu_seqlens)
        starts, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
        if states.shape[0] == 0:
            return states.new_zeros(batch.size, self.width, dtype=at_least_float32(states.dtype))
        rows = starts.clamp(max=states.shape[0] - 1) if self.pooling == "cls" else (ends - 1).clamp(min=0)
        picked = states.index_select(0, rows).to(at_least_float32(states.dtype))
        # Not a product: the row that stands for an empty sequence is another's, and may hold NaN.
        return torch.where((ends > starts)[:, None], picked, 0)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """(B, dim); float32 also for half-precision weights."""
        x = self.pooled(batch)
        for head in self.dense:
            x = head(x.to(head.linear.weight.dtype))
        x = x.to(at_least_float32(x.dtype))
        return normalize_rows(x) if self.normalize else x
