"""Which backend serves a call of attention. No import of triton here."""

import torch

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose, forced_backend
from leafkern.ops.attention import flash, sdpa

# The widest head that the Triton kernels hold in registers.
WIDEST_HEAD = 128
# From this width on, matrix products bound attention and not exponentials, and kernels written in CUDA serve before
# those in Triton. A rule by reasoning: not measured yet.
WIDE_HEAD = 96
# The widest head for which flash kernels have a backward pass on every GPU.
WIDEST_FLASH_HEAD = 192


def varlen_attention(q: torch.Tensor, scale: float) -> str:
    """CPU: torch's kernel. CUDA: Triton for heads narrower than WIDE_HEAD; else flash-attn, torch's kernel, Triton."""
    reasons, cpu = _triton_and_reference(q), q.device.type == "cpu"
    wide = q.shape[2] >= WIDE_HEAD and not cpu
    if not wide and reasons.get("triton", "") is None and forced_backend("attention") is None:
        return "triton"
    limit = _flash_limit(q, scale)
    peers = {"flash": limit or flash.missing(), "sdpa": None if cpu else limit or sdpa.missing()}
    able = [name for name, reason in peers.items() if reason is None]
    # A peer that can't serve is no reason to warn anybody: behind the reference, it is heard of only where forced.
    order = (*able, "triton") if wide else ("triton", *able)
    reasons |= peers
    return choose("attention", {name: reasons[name] for name in (*order, "reference", *reasons) if name in reasons})


def attention_mean_pool(q: torch.Tensor) -> str:
    """Triton or the reference."""
    peers = dict.fromkeys(("flash", "sdpa"), "attention_mean_pool has no such backend; triton and reference are there")
    return choose("attention", _triton_and_reference(q) | peers)


def _triton_and_reference(q: torch.Tensor) -> dict[str, str | None]:
    candidates, width = launch.candidates("attention", q.device, q.dtype), q.shape[2]
    if "triton" in candidates and (width % 8 or width > WIDEST_HEAD):
        reason = f"D = {width}; its kernels take multiples of 8 up to {WIDEST_HEAD}"
        candidates["triton"] = candidates["triton"] or reason
    return candidates


def _flash_limit(q: torch.Tensor, scale: float) -> str | None:
    """Why no flash kernel for CUDA can serve this call, whoever wrote it; None when one can."""
    width = q.shape[2]
    if q.device.type != "cuda":
        return "its kernels run on CUDA"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel for {str(q.dtype).removeprefix('torch.')}"
    if width % 8 or width > WIDEST_FLASH_HEAD:
        return f"D = {width}; its kernels take multiples of 8 up to {WIDEST_FLASH_HEAD}"
    if scale <= 0:
        return f"scale = {scale:g}; its kernels look for the largest score before they scale it, and need it above 0"
    return launch.too_old(q.device)
