"""nn.Modules over the operations: packed encoders, heads, sentence models."""

from leafkern.nn.bert import PackedConfig, PackedEncoder
from leafkern.nn.gradcache import cached_backward
from leafkern.nn.graphs import GraphedModel
from leafkern.nn.packed import PackedBatch, Padding, pack
from leafkern.nn.sentence import Dense, SentenceModel, activation_module
from leafkern.nn.transformers import TransformersBackbone

__all__ = [
    "Dense",
    "GraphedModel",
    "PackedBatch",
    "PackedConfig",
    "PackedEncoder",
    "Padding",
    "SentenceModel",
    "TransformersBackbone",
    "activation_module",
    "cached_backward",
    "pack",
]
