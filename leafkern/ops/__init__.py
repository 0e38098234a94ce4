"""The operations: fast, exact, and usable alone in other people's code. Nothing here imports from above."""

import importlib

_WHERE = {
    "varlen_attention": "attention",
    "attention_mean_pool": "attention",
    "mean_pool": "pooling",
    "norm_mean_pool": "pooling",
    "alignment_loss": "distill",
    "similarity_loss": "distill",
    "distill_loss": "distill",
    "DistillTerms": "distill",
    "relative_similarity_loss": "relative",
    "info_nce": "contrastive",
    "soft_label_loss": "contrastive",
    "mix_negatives": "contrastive",
    "quantize": "quantization",
    "dequantize": "quantization",
    "calibrate": "quantization",
    "Quantized": "quantization",
    "search": "retrieval",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f"leafkern.ops.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'leafkern.ops' has no attribute {name!r}")


def __dir__():
    return __all__
