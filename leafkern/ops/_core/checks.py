"""Argument checks shared by all operations.

Shape, dtype and device are always checked. Values (NaN, zero rows, monotone cu_seqlens) are checked on CPU; on
CUDA only with LEAFKERN_CHECK=1, and never under graph capture or torch.compile (a host synchronisation).
"""

import math
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch

from leafkern.errors import InputError


def values_checked(x: torch.Tensor) -> bool:
    """Whether the values of `x` may be looked at in this call."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    if x.device.type == "cpu":
        return True
    return os.environ.get("LEAFKERN_CHECK") == "1" and not torch.cuda.is_current_stream_capturing()


def check_tensor(
    name: str, x: object, *, ndim: int | None = None, dtypes: Sequence[torch.dtype] | None = None
) -> torch.Tensor:
    """`x` itself, if it is a tensor of `ndim` dimensions and one of `dtypes`."""
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if ndim is not None and x.ndim != ndim:
        raise InputError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{name}: expected dtype {names}; got {str(x.dtype).removeprefix('torch.')}")
    return x


def check_floating(name: str, x: object, *, ndim: int | None = None) -> torch.Tensor:
    """`x` itself, if it is a tensor of `ndim` dimensions and float16, bfloat16, float32 or float64."""
    x = check_tensor(name, x, ndim=ndim)
    if not x.is_floating_point() or x.element_size() < 2:
        raise InputError(f"{name}: expected a floating-point tensor, got {str(x.dtype).removeprefix('torch.')}")
    return x


def check_same_device(**tensors: torch.Tensor | None) -> None:
    present = {name: x for name, x in tensors.items() if x is not None}
    if len({x.device for x in present.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in present.items())
        raise InputError(f"all tensors must be on one device; got {places}")


def all_finite(x: torch.Tensor) -> bool:
    """Whether `x` holds neither NaN nor infinity."""
    # Such a value shows in the sum, which costs one pass and no memory; a sum that overflows says nothing.
    return math.isfinite(x.detach().sum()) or bool(torch.isfinite(x).all())


def check_finite_rows(name: str, x: torch.Tensor) -> None:
    """Names the first row of `x` that holds NaN or infinity."""
    if not values_checked(x) or all_finite(x):
        return
    rows = (~torch.isfinite(x).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    raise InputError(f"{name}: row {rows[0]} holds NaN or infinity ({len(rows)} such rows); expected finite values")


def check_nonzero_rows(name: str, x: torch.Tensor) -> None:
    """Names the first row of `x` without a direction: zero, or of a length that at least float32 can't hold."""
    if not values_checked(x) or x.numel() == 0:
        return
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    bad = ~((norms > 0) & (norms < torch.inf))
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise InputError(
            f"{name}: row {rows[0]} has length {norms[rows[0]]:g} ({len(rows)} such rows); expected vectors that "
            "can be normalised"
        )


def check_directions(name: str, x: torch.Tensor) -> torch.Tensor:
    """Names the first row of `x` (B, D) that can't be normalised; returns all norms (B, 1) in at least float32."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    if norms.numel() and values_checked(x):
        # A length above 0 and finite is that of a good row; only where there is another do the checks look at entries.
        shortest, longest = torch.aminmax(norms)
        if not (shortest.item() > 0 and longest.item() < math.inf):
            check_finite_rows(name, x)
            check_nonzero_rows(name, x)
    return norms


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """`cu_seqlens`: int32 (B+1,), from 0 to `tokens`, never falling."""
    check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=(torch.int32, torch.int64))
    if cu_seqlens.numel() < 1:
        raise InputError("cu_seqlens: expected B+1 entries, got none")
    if not values_checked(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        raise InputError(f"cu_seqlens: must run from 0 to T = {tokens}; got {first} to {last}")
    if (cu_seqlens.diff() < 0).any():
        raise InputError("cu_seqlens: must never fall")


def check_dims(dims: Sequence[int] | None, width: int) -> list[int]:
    """Matryoshka prefix widths: `dims` itself as a list of ints, or [width] for None."""
    if dims is None:
        return [width]
    expected = f"expected prefix widths from 1 to {width}"
    if isinstance(dims, str) or not isinstance(dims, Iterable):
        raise InputError(f"dims: {expected}; got {dims!r}")
    dims = list(dims)
    if not dims or not all(isinstance(d, Integral) and not isinstance(d, bool) and 1 <= d <= width for d in dims):
        raise InputError(f"dims: {expected}; got {dims}")
    dims = [int(d) for d in dims]
    if sorted(set(dims), reverse=True) != dims:
        raise InputError(f"dims: expected descending, unique widths; got {dims}")
    return dims


def check_dim_weights(dim_weights: Sequence[float] | None, dims: Sequence[int]) -> list[float]:
    """One finite weight per prefix width; None: 1/K each."""
    if dim_weights is None:
        return [1 / len(dims)] * len(dims)
    return check_numbers("dim_weights", dim_weights, len(dims))


def check_numbers(name: str, values: Sequence[float], count: int, *, least: float | None = None) -> list[float]:
    """`count` finite numbers, >= `least`."""
    if isinstance(values, str) or not isinstance(values, Iterable) or len(list(values)) != count:
        raise InputError(f"{name}: expected {count} finite numbers; got {values!r}")
    return [check_number(f"{name}[{k}]", value, least=least) for k, value in enumerate(values)]


def check_number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """`value` as a finite float that is > `above` or >= `least`."""
    # Comparisons, not math.isfinite: torch.compile may trace the number as a symbol.
    good = isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf
    # Python's ints know no largest; what no float holds is no number either.
    good = good and not (isinstance(value, int) and abs(value) > 2**1000)
    if not good or (above is not None and value <= above) or (least is not None and value < least):
        bound = f" above {above:g}" if above is not None else f" of at least {least:g}" if least is not None else ""
        raise InputError(f"{name}: expected a finite number{bound}; got {value!r}")
    return float(value)


def check_flag(name: str, value: object) -> bool:
    """`value` itself, if it is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected True or False; got {value!r}")
    return value
