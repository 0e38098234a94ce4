"""Search by the compiled kernels of `leafkern._C`."""

import torch

from leafkern.ops._core.native import library, unavailable


def unsuited(u: torch.Tensor, codes: torch.Tensor, k: int, bits: int, query_bits: int) -> str | None:
    """Why the kernels can't serve this call; None when they can."""
    return unavailable() or "no kernel yet"


def search(u, codes, k, bits, query_bits):
    raise NotImplementedError
