"""What every Triton operation needs around its kernels: may Triton serve, on which device, with how many programs.

No import of triton here: an operation's kernels.py is imported only once this module has said that Triton can serve.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from leafkern.ops._core.backend import forced_backend
from leafkern.ops._core.cubin import SHARED_PER_BLOCK

TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Programs of the interpreter run one after the other; a few are enough to meet every path.
INTERPRETED_MULTIPROCESSORS = 2
# Tokens of a share at the least: below, adding up the pieces costs more than the idle programs.
SHORTEST_SHARE = 16


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton reads the variable once, when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def missing() -> str | None:
    """Why no Triton kernel can run in this process at all; None when it can."""
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton; Linux only)"


def candidates(
    operation: str, device: torch.device, *dtypes: torch.dtype, native: Callable[[], str | None] | None = None
) -> dict[str, str | None]:
    """What `choose` takes for an operation with the backends triton, perhaps native, and reference, and tensors of
    `dtypes`. native: says why the compiled CPU kernels can't serve, or None when they can; asked on CPU alone.

    CPU tensors reach Triton only under TRITON_INTERPRET=1: elsewhere it is no candidate and nobody is warned.
    """
    on_cpu = {} if native is None or device.type != "cpu" else {"native": native()}
    if device.type == "cpu" and not interpreting():
        reason = "CPU tensors reach triton only under TRITON_INTERPRET=1"
        return on_cpu | {"reference": None} | ({"triton": reason} if forced_backend(operation) == "triton" else {})
    if device.type not in ("cpu", "cuda"):
        return {"reference": None}
    return {"triton": missing() or _unsuited(device, dtypes), **on_cpu, "reference": None}


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


@functools.cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory that a program may take on the device of `x`; the interpreter counts none."""
    return _shared_memory(x.device.index) if x.is_cuda else SHARED_PER_BLOCK[90]


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` >= 1."""
    return 1 << (n - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of products of `dtype`: those of float32 are as torch computes its own."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def unit_columns(x: torch.Tensor) -> torch.Tensor:
    """`x` (T, D) itself where the entries of a row are adjacent, whatever the distance of rows; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_options(warps: int, stages: int) -> dict:
    """What the launch of a kernel of tiles passes to the compiler. Left alone, ptxas spills to win occupancy; fusing
    multiplication and addition is Triton's default, which 3.10 changes and 3.9 warns about."""
    return {"num_warps": warps, "num_stages": stages, "maxnreg": 255, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """How a kernel over rows is cut: a tile is `rows` tokens by `columns` entries, and `programs` run on a
    multiprocessor at once, for which each gets its part of the registers."""

    rows: int
    columns: int
    warps: int
    programs: int

    @property
    def options(self) -> dict:
        """What the launch passes to the compiler. Left alone, ptxas spills to win occupancy that the launch never uses;
        fusing multiplication and addition is Triton's default, which 3.10 changes and 3.9 warns about."""
        registers = 65536 // (32 * self.warps * self.programs) // 8 * 8
        return {"num_warps": self.warps, "maxnreg": min(registers, 255), "enable_fp_fusion": True}


def norm_config(width: int, backward: bool) -> Config:
    """The heuristic for kernels that hold whole rows. About 16 entries of a tile per thread, and enough programs for
    the bytes in flight that hide the latency of memory (about 24 KiB per multiprocessor on an H100), as far as their
    registers allow."""
    columns = next_power_of_2(width)
    warps = 4 if columns <= 2048 else 8 if columns <= 4096 else 16
    rows = min(8, max(1, 512 * warps // columns))
    return Config(rows=rows, columns=columns, warps=warps, programs=(16 if backward else 20) // warps or 1)


def shares(x: torch.Tensor, tokens: int, blocks: int, config: Config) -> tuple[int, int]:
    """(tokens per program, programs): one wave, all resident, in whole tiles; `blocks` programs share the tokens."""
    programs = max(1, multiprocessors(x) * config.programs // blocks)
    chunk = max(SHORTEST_SHARE, -(-tokens // programs))
    chunk = -(-chunk // config.rows) * config.rows
    return chunk, -(-tokens // chunk)
