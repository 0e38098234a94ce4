"""Codes and ranges by the compiled kernels of `leafkern._C`: one pass over the vectors, their finite check included."""

import torch

from leafkern.ops._core.native import huge, library
from leafkern.ops.quantization import reference

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The kernels' form, what is xor-ed to each byte, and dimensions in a column of codes.
_FORMS = {
    "int8": (0, 0, 1),
    "int4": (1, 0, 2),
    "ubinary": (2, 0, 8),
    "binary": (2, 0x80, 8),
    "float16": (3, 0, 1),
}
PRECISIONS = tuple(_FORMS)


def _vectors(x: torch.Tensor, threads: int | None) -> tuple[int, ...]:
    return (TYPES[x.dtype], x.data_ptr(), *x.shape, *x.stride(), threads or torch.get_num_threads())


def codes(
    x: torch.Tensor, precision: str, ranges: torch.Tensor | None, threads: int | None = None
) -> torch.Tensor | None:
    """As `reference.codes`; None where an entry is not finite, or not in `precision`. `threads`: torch's."""
    module, _ = library()
    form, flip, per_byte = _FORMS[precision]
    dtype = reference.CODE_DTYPES[precision]
    out = huge(torch.empty((len(x), -(-x.shape[1] // per_byte)), dtype=dtype, device="cpu"))
    factors = () if ranges is None else (ranges[0].contiguous(), reference.divisors(precision, ranges))
    low, step = (factor.data_ptr() for factor in factors) if factors else (0, 0)
    good = module.encode(_vectors(x, threads), form, flip, low, step, out.data_ptr())
    return out if good else None


def extremes(x: torch.Tensor, threads: int | None = None) -> torch.Tensor | None:
    """Smallest and largest value of each dimension, float32 (2, D); None where an entry is not finite."""
    module, _ = library()
    found = torch.empty((2, x.shape[1]), device="cpu")
    return found if module.extremes(_vectors(x, threads), found.data_ptr()) else None
