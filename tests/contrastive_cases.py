"""Arguments of the contrastive losses, for the tests of each of their backends; and the products that a call takes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def batch(rows, width=24, number=3, mixes=2, dtype=torch.float64):
    """Queries, positives near them, negatives, mixed; no negatives or no mixes for None."""
    queries = torch.randn(rows, width, dtype=dtype)
    positives = queries + torch.randn(rows, width, dtype=dtype)
    shapes = [None if count is None else (rows, count, width) for count in (number, mixes)]
    others = [None if shape is None else torch.randn(shape, dtype=dtype) for shape in shapes]
    return [None if x is None else x.requires_grad_() for x in (queries, positives, *others)]


def some_ids(rows, number, kinds=3):
    return torch.randint(kinds, (rows,)), None if number is None else torch.randint(kinds, (rows, number))


def info_nce_arguments(tensors, ids, start, options, needs=(True,) * 4):
    """What the registered operation and each of its forms take."""
    defaults = {"temperature": 0.1, "gamma": 0.0, "detach_focal": True, "fn_margin": None}
    width = tensors[0].shape[1]
    rest = (defaults | {"dims": [width], "dim_weights": [1.0]} | options).values()
    return (*tensors, *ids, start, *rest, list(needs))


def soft_label_batch(rows, number, *, shared, width=24, dtype=torch.float64):
    """Queries, candidates, teacher's scores as cosines."""
    queries = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    shape = (number, width) if shared else (rows, number, width)
    return queries, torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(rows, number, dtype=dtype) / 4


def soft_label_arguments(tensors, total, needs=(True, True), dims=None, dim_weights=None):
    """What the registered operation and each of its forms take."""
    dims = [tensors[0].shape[1]] if dims is None else dims
    return (*tensors, total, 0.1, 0.2, dims, [1.0] if dim_weights is None else dim_weights, list(needs))


class MatrixWork(TorchDispatchMode):
    """Multiplications in matrix products."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__.strip("_") in ("mm", "bmm", "addmm"):
            left, right = args[-2:]
            self.total += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))
