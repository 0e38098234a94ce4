"""leafkern: exact, fast kernels for text-embedding models, and the thin layer that distils, encodes and searches.

`import leafkern` loads neither torch, triton nor transformers: names are resolved on first use (PEP 562).
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "Encoder": "leafkern.encode",
    "Index": "leafkern.index",
    "Shards": "leafkern.index.shards",
    "patch": "leafkern.integrations.patch",
}
_SUBMODULES = ("bench", "encode", "errors", "evaluate", "index", "nn", "ops", "train")

__all__ = ["Encoder", "Index", "Shards", "__version__", "patch", *_SUBMODULES]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"leafkern.{name}")
    raise AttributeError(f"module 'leafkern' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
