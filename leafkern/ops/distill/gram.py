"""The similarity loss by D×D matrices, for batches that are large against the widths.

‖UUᵀ − TTᵀ‖² = ‖UᵀU‖² − 2‖UᵀT‖² + ‖TᵀT‖², with the unit rows U of a prefix; its gradient by U is 4·(U(UᵀU) − T(TᵀU)).
Terms of the size of B² cancel, so that all is computed in float64, a few rows at a time.
"""

from collections.abc import Sequence

import torch

from leafkern.ops._core.normalize import normalize_rows, normalize_rows_backward

_ROWS, _ROWS_ON_CUDA = 512, 4096
_FLOAT64_COST = 2  # times a product in float32, on CPU


def gram_is_cheaper(
    student: torch.Tensor,
    everyone: torch.Tensor,
    targets: Sequence[torch.Tensor],
    dims: Sequence[int],
    wanted: bool,
) -> bool:
    """Whether the multiply-adds, those in float64 counted as often as they cost, are fewer than by blocks of B×B."""
    rows, batch, teacher = student.shape[0], everyone.shape[0], sum(target.shape[1] for target in targets)
    by_blocks = rows * batch * ((dims[0] + teacher) / (2 if rows == batch else 1) + (dims[0] if wanted else 0))
    crossed = sum(dim * (dim + teacher) for dim in dims)
    by_gram = batch * (crossed + teacher**2) + (rows * crossed if wanted else 0)
    return by_gram * (1 if everyone.dtype == torch.float64 else _FLOAT64_COST) < by_blocks


def gram_similarity(
    everyone: torch.Tensor, targets: Sequence[torch.Tensor], own: slice, dims: Sequence[int], wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity loss of all rows, float64, and its gradient by the rows `own`, in their dtype (or an empty (0,)).

    everyone: (B, D); targets: (B, D_k) each, the parts of unit rows. Memory: 8·d·(d + Σ D_k) bytes for the widest
    prefix d, 8·D_k·D_l for two targets, and some copies of 512 rows (CUDA: 4096).
    """
    batch = everyone.shape[0]
    gradient = everyone.new_zeros(own.stop - own.start, everyone.shape[1]) if wanted else everyone.new_empty(0)
    teacher = 0
    for k, target in enumerate(targets):
        for other in targets[k:]:
            square = _crossed(_blocks(target, 0, batch), _blocks(other, 0, batch)).square().sum()
            teacher = teacher + (square if other is target else 2 * square)
    loss = 0
    for dim in dims:
        prefix = everyone[:, :dim]
        among = _crossed(_units(prefix, 0, batch), _units(prefix, 0, batch))
        across = [_crossed(_blocks(target, 0, batch), _units(prefix, 0, batch)) for target in targets]
        loss = loss + among.square().sum() - 2 * sum(x.square().sum() for x in across) + teacher
        if not wanted:
            continue
        parts = [_blocks(target, own.start, own.stop) for target in targets]
        to = gradient[:, :dim].split(_rows(prefix))
        for rows, out, *targets_rows in zip(_blocks(prefix, own.start, own.stop), to, *parts):
            slope = normalize_rows(rows) @ among
            for target, matrix in zip(targets_rows, across):
                slope.addmm_(target, matrix, alpha=-1)
            out += normalize_rows_backward(slope.mul_(4 / (len(dims) * batch**2)), rows)
    # Where student and teacher agree, rounding may be all that is left.
    return (loss / (len(dims) * batch**2)).clamp(min=0), gradient


def _rows(x):
    return _ROWS_ON_CUDA if x.is_cuda else _ROWS


def _blocks(x, start, stop):
    """Rows [start, stop) of x in float64, a few at a time."""
    step = _rows(x)
    return (x[first : min(first + step, stop)].double() for first in range(start, stop, step))


def _units(x, start, stop):
    return map(normalize_rows, _blocks(x, start, stop))


def _crossed(left, right):
    """leftᵀ @ right, both given in blocks of rows."""
    total = None
    for x, y in zip(left, right):
        total = x.T @ y if total is None else total.addmm_(x.T, y)
    return total
