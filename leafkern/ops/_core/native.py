"""Access to the compiled extension `leafkern._C`, which may be absent (no compiler at install).

The best instruction set that the CPU has serves; LEAFKERN_ISA=portable|avx2, read once, forces one.
"""

import functools
import os
from types import ModuleType

import torch

from leafkern.errors import unknown_name

NEEDED = (
    "install a C++ compiler and Python's headers (python3-dev), then reinstall leafkern (in a checkout: make -B setup)"
)


@functools.cache
def library() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it is missing."""
    try:
        from leafkern import _C
    except ImportError as error:
        return None, f"leafkern._C is not built ({error}); {NEEDED}"
    available = _C.instruction_sets()
    isa = os.environ.get("LEAFKERN_ISA") or available[-1]
    if isa not in available:
        raise unknown_name("LEAFKERN_ISA (on this CPU)", isa, available)
    _C.select_isa(isa)
    return _C, ""


def unavailable() -> str | None:
    """Why the native backend can't be used at all; None when it can."""
    module, reason = library()
    return reason if module is None else None


def huge(x: torch.Tensor) -> torch.Tensor:
    """`x`, new and contiguous on CPU, with huge pages asked for: writing it first, and each reading, is faster."""
    module, _ = library()
    if module is not None and x.device.type == "cpu":
        module.advise_huge(x.data_ptr(), x.nbytes)
    return x
