"""Which backend serves a call of attention. No import of triton here."""

import torch

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose

# The widest head that the Triton kernels hold in registers.
WIDEST_HEAD = 128


def varlen_attention(q: torch.Tensor) -> str:
    """CPU: torch's kernel, which takes every float dtype and width; else Triton."""
    candidates = _triton_and_reference(q)
    if q.device.type == "cpu":
        first = {"triton": candidates.pop("triton")} if launch.interpreting() else {}
        candidates = first | {"sdpa": None} | candidates
    return choose("attention", candidates)


def attention_mean_pool(q: torch.Tensor) -> str:
    # What stands behind the reference is heard of only where it is forced.
    return choose("attention", _triton_and_reference(q) | {"sdpa": "attention_mean_pool has no such backend"})


def _triton_and_reference(q: torch.Tensor) -> dict[str, str | None]:
    candidates, width = launch.candidates("attention", q.device, q.dtype), q.shape[2]
    if "triton" in candidates and (width % 8 or width > WIDEST_HEAD):
        reason = f"D = {width}; its kernels take multiples of 8 up to {WIDEST_HEAD}"
        candidates["triton"] = candidates["triton"] or reason
    return candidates
