"""Search by the compiled kernels of `leafkern._C`, selection fused with the products: int8, int4, binary, floats."""

import torch

from leafkern.ops._core.native import library, unavailable
from leafkern.ops.quantization import Quantized

FLOAT_FORMS = {torch.float32: 4, torch.float16: 5}
_LEVEL_FORMS = FLOAT_FORMS | {torch.int8: 6}


def unsuited(queries: torch.Tensor, rows: torch.Tensor, k: int) -> str | None:
    """Why the kernels can't serve this call; None when they can."""
    reason = unavailable()
    if reason is not None:
        return reason
    module, _ = library()
    if min(k, len(rows)) > module.MAX_K:
        return f"k = {min(k, len(rows))}, above {module.MAX_K}"
    if queries.shape[1] > module.MAX_DIM:
        return f"width {queries.shape[1]}, above {module.MAX_DIM} (255*63*D must stay below 2^31)"
    n, width = rows.shape
    if (width > 1 and rows.stride(1) != 1) or (n > 1 and rows.stride(0) < width):
        return f"rows of strides {rows.stride()}: expected adjacent entries and rows apart, as .contiguous() gives"
    return None


def fold(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.fold`, for finite w on CPU."""
    module, _ = library()
    w = w.resolve_neg().contiguous()
    u, a = torch.empty(w.shape, dtype=torch.int8, device="cpu"), torch.empty(len(w), device="cpu")
    module.fold(w.data_ptr(), *w.shape, u.data_ptr(), a.data_ptr())
    return u, a


def search(
    u: torch.Tensor,
    codes: torch.Tensor,
    k: int,
    bits: int,
    query_bits: int,
    allowed: torch.Tensor | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.blocked`, for contiguous rows of codes on CPU and min(k, N) <= 8192; `threads`: torch's."""
    form = {8: 0, 4: 1, 1: 3 if query_bits == 1 else 2}[bits]
    flip = 0x80 if bits == 1 and codes.dtype == torch.int8 else 0
    scores, ids, _ = _search(form, flip, u, codes, k, allowed, threads)
    return scores, ids


def float_search(
    queries: torch.Tensor,
    base: torch.Tensor,
    k: int,
    allowed: torch.Tensor | None = None,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `reference.blocked_float`, for contiguous rows of float32 or float16; None where a score is not finite."""
    scores, ids, finite = _search(FLOAT_FORMS[base.dtype], 0, queries, base, k, allowed, threads)
    return (scores.view(torch.float32), ids) if finite else None


def rescores(queries: torch.Tensor, level: torch.Tensor | Quantized) -> bool:
    """Whether `rescore` knows this level."""
    if isinstance(level, Quantized) and level.precision == "binary":
        return False
    rows = level.codes if isinstance(level, Quantized) else level
    return rows.device.type == "cpu" and rows.dtype in _LEVEL_FORMS and unsuited(queries, rows, 1) is None


def rescore(
    queries: torch.Tensor,
    level: torch.Tensor | Quantized,
    ids: torch.Tensor,
    keep: int,
    threads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `reference.rescore`, for contiguous rows of float32, float16 or int8; None where a score is not finite."""
    module, _ = library()
    rows, bias = (level.codes, level.offset) if isinstance(level, Quantized) else (level, None)
    folded, rows = queries.resolve_neg(), rows.resolve_neg()
    if bias is not None:
        # Added before the selection: candidates are ordered by the scores that are returned.
        folded, bias = folded * level.scale, (folded * bias).sum(1)
    folded, ids = folded.contiguous(), ids.contiguous()
    keep = min(keep, ids.shape[1])
    scores = torch.empty((len(ids), keep), dtype=torch.int32, device="cpu")
    best = torch.empty((len(ids), keep), dtype=torch.int64, device="cpu")
    if scores.numel() == 0:
        return scores.view(torch.float32), best
    stride = (rows.stride(0) if len(rows) > 1 else rows.shape[1]) * rows.element_size()
    sizes = (_LEVEL_FORMS[rows.dtype], rows.shape[1], len(ids), stride, ids.shape[1], keep)
    sizes += (threads or torch.get_num_threads(),)
    workspace = torch.empty(module.rescore_workspace(sizes), dtype=torch.uint8, device="cpu")
    parts = (folded, bias, rows, ids, scores, best, workspace)
    pointers = [0 if part is None else part.data_ptr() for part in parts]
    finite = module.rescore(sizes, *pointers, workspace.numel())
    return (scores.view(torch.float32), best) if finite else None


def _search(
    form: int,
    flip: int,
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    allowed: torch.Tensor | None,
    threads: int | None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    module, _ = library()
    queries, rows = queries.resolve_neg().contiguous(), rows.resolve_neg()
    n, k = len(rows), min(k, len(rows))
    scores = torch.empty((len(queries), k), dtype=torch.int32, device="cpu")
    ids = torch.empty((len(queries), k), dtype=torch.int64, device="cpu")
    if scores.numel() == 0:
        return scores, ids, True
    stride = (rows.stride(0) if n > 1 else rows.shape[1]) * rows.element_size()
    sizes = (form, queries.shape[1], flip, len(queries), n, stride, k, threads or torch.get_num_threads())
    workspace = torch.empty(module.search_workspace(*sizes), dtype=torch.uint8, device="cpu")
    allowed = None if allowed is None else allowed.contiguous()
    mask = 0 if allowed is None else allowed.data_ptr()
    pointers = (queries.data_ptr(), rows.data_ptr(), mask, scores.data_ptr(), ids.data_ptr(), workspace.data_ptr())
    return scores, ids, module.search(*sizes, *pointers, workspace.numel())
