"""varlen_attention by the package flash-attn (Dao, arXiv 2307.08691), which brings its own kernels for CUDA.

Called below the package's autograd function, whose forward pass keeps the log-sum-exp to itself.
"""

import functools
import importlib

import torch

from leafkern.ops._core.launch import unit_columns
from leafkern.ops.attention.sdpa import packed

_INTERFACE = "flash_attn.flash_attn_interface"
# Neither dropout nor a cap on the scores nor a bias of distance.
_PLAIN = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None}


@functools.cache
def missing() -> str | None:
    """Why flash-attn can't be used in this process; None when it can."""
    try:
        importlib.import_module(_INTERFACE)
    except ModuleNotFoundError:
        return "flash-attn is not installed (pip install flash-attn; needs nvcc)"
    except ImportError as error:
        return f"flash-attn can't be imported: {error}"
    return None


def varlen_attention(
    q, k, v, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H, D) in the dtype of q and the log-sum-exp of the rows, (H, T) float32."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    q, k, v = (unit_columns(x) for x in (q, k, v))
    out, lse, *_ = importlib.import_module(_INTERFACE)._flash_attn_varlen_forward(
        q=q, k=k, v=v, **_bounds(cu_seqlens, max_seqlen, q, left, right), softmax_scale=scale, return_softmax=False
    )
    return out.contiguous(), lse


def varlen_attention_backward(
    grad, q, k, v, out, lse, cu_seqlens, max_seqlen: int, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v in their dtypes, contiguous; the kernel adds into dq by atomics unless torch asks for
    deterministic algorithms."""
    found = {f"d{name}": x.new_empty(x.shape) for name, x in (("q", q), ("k", k), ("v", v))}
    if q.shape[0] == 0:
        return tuple(found.values())
    grad, q, k, v = (unit_columns(x) for x in (grad.to(q.dtype), q, k, v))
    importlib.import_module(_INTERFACE)._flash_attn_varlen_backward(
        dout=grad,
        q=q,
        k=k,
        v=v,
        out=out.contiguous(),
        softmax_lse=lse.contiguous(),
        **found,
        **_bounds(cu_seqlens, max_seqlen, q, left, right),
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return tuple(found.values())


def _bounds(cu_seqlens, max_seqlen: int, q: torch.Tensor, left: int, right: int) -> dict:
    """What both passes say alike about sequences, window and what is not used."""
    bounds, longest, causal, window = packed(cu_seqlens, max_seqlen, q.shape[0], left, right)
    both = {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
    return both | {"causal": causal} | window | _PLAIN
