"""Encoders of the BERT family (absolute positions, post-norm), run on packed tokens.

Devlin et al., BERT (arXiv 1810.04805). Every step takes (T, D); there is no padding. On CUDA, where Triton serves, a
layer is four matrix products, attention, two residual norms and one GELU, each one launch, and nothing waits for the
GPU: the forward pass can be captured in a CUDA graph.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from leafkern.errors import InputError, unknown_name
from leafkern.nn.packed import PackedBatch
from leafkern.ops import attention, norm_mean_pool, varlen_attention
from leafkern.ops.norm import add_norm, bias_gelu, embed_norm


def linear_gelu(linear: nn.Linear, x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """gelu(linear(x)). On a GPU the bias is added in GELU's pass, whose backward pass sums the bias's gradient too; a
    product on the CPU adds a bias for nothing."""
    if x.is_cuda:
        return bias_gelu(F.linear(x, linear.weight), linear.bias, approximate=approximate)
    return bias_gelu(linear(x), None, approximate=approximate)


_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_ACTIVATIONS: dict[str, Callable[[nn.Linear, torch.Tensor], torch.Tensor]] = {
    "relu": lambda linear, x: F.relu(linear(x)),
    "silu": lambda linear, x: F.silu(linear(x)),
    "swish": lambda linear, x: F.silu(linear(x)),
    **{name: functools.partial(linear_gelu, approximate=form) for name, form in _GELU.items()},
}


@dataclasses.dataclass(frozen=True)
class PackedConfig:
    """Sizes of a BERT encoder, under transformers' names.

    `dropout` is leafkern's own and 0 unless asked for: of the embeddings and of what is added to each residual; weights
    of attention are never dropped.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        if self.hidden_act not in _ACTIVATIONS:
            raise unknown_name("hidden_act", self.hidden_act, _ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads = {self.num_attention_heads}"
            )
        if self.num_hidden_layers < 1:
            raise InputError(f"num_hidden_layers: expected at least 1, got {self.num_hidden_layers}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a number from 0 to 1 (exclusive), got {self.dropout}")

    @staticmethod
    def serves(config: Mapping) -> bool:
        """Whether a transformers config.json describes a model that PackedEncoder can run."""
        return (
            config.get("model_type") == "bert"
            and config.get("position_embedding_type", "absolute") == "absolute"
            and config.get("hidden_act", "gelu") in _ACTIVATIONS
            and not config.get("is_decoder", False)
        )

    @classmethod
    def from_dict(cls, config: Mapping, *, dropout: float = 0.0) -> "PackedConfig":
        """From the contents of a transformers config.json; its dropout rates are not taken over."""
        fields = [field for field in dataclasses.fields(cls) if field.name != "dropout"]
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in config]
        if missing:
            raise InputError(f"config.json: {', '.join(missing)} missing; expected the config of a BERT model")
        values = {field.name: config[field.name] for field in fields if config.get(field.name) is not None}
        return cls(**values, dropout=dropout)

    def to_dict(self) -> dict:
        """The contents of config.json, as transformers reads it."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "dropout"}
        return {"architectures": ["BertModel"], "model_type": "bert", "position_embedding_type": "absolute", **values}


class PackedEncoder(nn.Module):
    """BERT encoder on packed tokens: PackedBatch -> (T, hidden_size).

    The names in state_dict equal those of transformers' `BertModel` without its pooler, so weights load and save one to
    one. Runs and trains on CPU and CUDA in any float dtype; LayerNorm and softmax accumulate in fp32.
    """

    def __init__(self, config: PackedConfig):
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def max_length(self) -> int:
        """The longest sequence that has positions."""
        return self.config.max_position_embeddings

    @property
    def capturable(self) -> bool:
        """Whether the forward pass runs on a GPU and never waits for it, so that a CUDA graph can hold it."""
        weight, heads = self.embeddings.word_embeddings.weight, self.config.num_attention_heads
        if not weight.is_cuda:
            return False
        q = weight.new_empty(0, heads, self.width // heads)
        return attention.choice.varlen_attention(q, scale=1.0) != "reference"

    def description(self) -> dict:
        """What a fingerprint covers beside the weights."""
        return self.config.to_dict()

    def with_layers(self, layers: Sequence[int], *, dropout: float = 0.0) -> "PackedEncoder":
        """A new encoder with copies of the embeddings and of these layers, in the order given."""
        config = dataclasses.replace(self.config, num_hidden_layers=len(layers), dropout=dropout)
        chosen = PackedEncoder(config).to(self.embeddings.word_embeddings.weight)
        chosen.embeddings.load_state_dict(self.embeddings.state_dict())
        for new, number in zip(chosen.encoder.layer, layers, strict=True):
            new.load_state_dict(self.encoder.layer[number].state_dict())
        return chosen

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.encoder.layer[-1].output.norm(*self._before_last_norm(batch))

    def mean_pooled(self, batch: PackedBatch) -> torch.Tensor:
        """mean_pool of `forward`, (B, hidden_size) in at least float32; the last states never exist as a whole."""
        x, residual = self._before_last_norm(batch)
        norm = self.encoder.layer[-1].output.LayerNorm
        return norm_mean_pool(x, residual, norm.weight, norm.bias, batch.cu_seqlens, eps=norm.eps, normalize=False)

    def _before_last_norm(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        if batch.max_seqlen > self.max_length:
            raise InputError(
                f"batch: a sequence of {batch.max_seqlen} tokens; this model has {self.max_length} positions"
            )
        x = self.embeddings(batch)
        *layers, last = self.encoder.layer
        for layer in layers:
            x = layer(x, batch)
        return last.before_norm(x, batch)


class _Embeddings(nn.Module):
    def __init__(self, config: PackedConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        x = embed_norm(
            batch.input_ids,
            batch.cu_seqlens,
            *(table.weight for table in tables),
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            eps=self.LayerNorm.eps,
            token_type_ids=batch.token_type_ids,
        )
        return self.dropout(x)


class _SelfAttention(nn.Module):
    """Query, key and value are one linear layer here, and three, as in BertModel, in state_dict."""

    def __init__(self, config: PackedConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)

    def forward(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, x.shape[1] // self.heads)).unbind(1)
        return varlen_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen).flatten(1)


_JOINED = ("query", "key", "value")


def _split(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
    whole = {kind: state.pop(f"{prefix}qkv.{kind}").chunk(len(_JOINED)) for kind in ("weight", "bias")}
    for place, name in enumerate(_JOINED):
        state |= {f"{prefix}{name}.{kind}": parts[place] for kind, parts in whole.items()}


def _join(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
    for kind in ("weight", "bias"):
        names = [f"{prefix}{name}.{kind}" for name in _JOINED]
        # Where one is missing, loading says so.
        if all(name in state for name in names):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


class _Residual(nn.Module):
    """Linear, dropout, residual, LayerNorm: the end of both halves of a layer."""

    def __init__(self, inner: int, config: PackedConfig):
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the residual."""
        return self.dropout(self.dense(x))

    def norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return add_norm(x, residual, self.LayerNorm.weight, self.LayerNorm.bias, eps=self.LayerNorm.eps)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.norm(self.branch(x), residual)


class _Layer(nn.Module):
    def __init__(self, config: PackedConfig):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = _SelfAttention(config)
        self.attention.output = _Residual(config.hidden_size, config)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = _Residual(config.intermediate_size, config)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def before_norm(self, x: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The two summands that go into the layer's last LayerNorm."""
        x = self.attention.output(self.attention.self(x, batch), x)
        return self.output.branch(self.activation(self.intermediate.dense, x)), x

    def forward(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return self.output.norm(*self.before_norm(x, batch))
