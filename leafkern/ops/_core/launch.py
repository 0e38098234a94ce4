"""What every Triton operation needs around its kernels: may Triton serve, on which device, with how many programs.

No import of triton here: an operation's kernels.py is imported only once this module has said that Triton can serve.
"""

import contextlib
import functools
import importlib.util
import os

import torch

from leafkern.ops._core.backend import forced_backend

TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Programs of the interpreter run one after the other; a few are enough to meet every path.
INTERPRETED_MULTIPROCESSORS = 2


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton reads the variable once, when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def missing() -> str | None:
    """Why no Triton kernel can run in this process at all; None when it can."""
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton; Linux only)"


def candidates(operation: str, device: torch.device, *dtypes: torch.dtype) -> dict[str, str | None]:
    """What `choose` takes for an operation with the backends triton and reference, and tensors of `dtypes`.

    CPU tensors reach Triton only under TRITON_INTERPRET=1: elsewhere it is no candidate and nobody is warned.
    """
    if device.type == "cpu" and not interpreting():
        reason = "CPU tensors reach triton only under TRITON_INTERPRET=1"
        return {"reference": None} | ({"triton": reason} if forced_backend(operation) == "triton" else {})
    if device.type not in ("cpu", "cuda"):
        return {"reference": None}
    return {"triton": missing() or _unsuited(device, dtypes), "reference": None}


def _unsuited(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    for dtype in dtypes:
        if dtype not in TYPES:
            return f"no kernel for {str(dtype).removeprefix('torch.')}"
        if dtype == torch.bfloat16 and interpreting():
            return "bfloat16 arithmetic is wrong in Triton's interpreter"
    return too_old(device)


def too_old(device: torch.device) -> str | None:
    """Why no kernel for CUDA can run on `device`; None when one can, or it is no GPU."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0"
    return None


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the device of `x`, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """Streaming multiprocessors of the device of `x`."""
    return _multiprocessors(x.device.index) if x.is_cuda else INTERPRETED_MULTIPROCESSORS


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` >= 1."""
    return 1 << (n - 1).bit_length()


def unit_columns(x: torch.Tensor) -> torch.Tensor:
    """`x` (T, D) itself where the entries of a row are adjacent, whatever the distance of rows; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
