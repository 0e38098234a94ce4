"""Search by the compiled kernels of `leafkern._C`: int8, int4 and binary, selection fused with the products."""

import torch

from leafkern.ops._core.native import library, unavailable


def unsuited(u: torch.Tensor, codes: torch.Tensor, k: int) -> str | None:
    """Why the kernels can't serve this call; None when they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    module, _ = library()
    if min(k, len(codes)) > module.MAX_K:
        return f"k = {min(k, len(codes))}, above {module.MAX_K}"
    if u.shape[1] > module.MAX_DIM:
        return f"width {u.shape[1]}, above {module.MAX_DIM} (255*63*D must stay below 2^31)"
    n, width = codes.shape
    if (width > 1 and codes.stride(1) != 1) or (n > 1 and codes.stride(0) < width):
        return "codes whose rows are not contiguous"
    return None


def search(
    u: torch.Tensor,
    codes: torch.Tensor,
    k: int,
    bits: int,
    query_bits: int,
    allowed: torch.Tensor | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.blocked`, for contiguous rows of codes on CPU and min(k, N) <= 2048; `threads`: torch's."""
    module, _ = library()
    u = u.contiguous()
    n, k = len(codes), min(k, len(codes))
    scores = torch.empty((len(u), k), dtype=torch.int32, device="cpu")
    ids = torch.empty((len(u), k), dtype=torch.int64, device="cpu")
    if scores.numel() == 0:
        return scores, ids
    form = {8: 0, 4: 1, 1: 3 if query_bits == 1 else 2}[bits]
    flip = 0x80 if bits == 1 and codes.dtype == torch.int8 else 0
    stride = codes.stride(0) if n > 1 else codes.shape[1]
    sizes = (form, u.shape[1], flip, len(u), n, stride, k, threads or torch.get_num_threads())
    workspace = torch.empty(module.search_workspace(*sizes), dtype=torch.uint8, device="cpu")
    allowed = None if allowed is None else allowed.contiguous()
    mask = 0 if allowed is None else allowed.data_ptr()
    pointers = (u.data_ptr(), codes.data_ptr(), mask, scores.data_ptr(), ids.data_ptr(), workspace.data_ptr())
    module.search(*sizes, *pointers, workspace.numel())
    return scores, ids
