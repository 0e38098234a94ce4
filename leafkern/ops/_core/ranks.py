"""The loss of the global batch on every rank: rows gathered over torch.distributed's default process group.

Each rank computes its share of the loss, from its own rows against everyone's; `loss_of_ranks` adds the shares.
Gradients are scaled by the number of ranks W, because DistributedDataParallel averages parameter gradients over
ranks: after that averaging, a parameter's gradient equals that of one process holding the whole batch.
Without an initialised process group, "ranks" means one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from leafkern.errors import InputError, unknown_name

GATHER = ("none", "ranks")


# Half precisions differ in more than their size: ranks compare places in this list.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


@dataclass(frozen=True)
class Ranks:
    """counts: rows of every rank, in rank order; rank: this one; differentiated: arguments that any rank trains."""

    counts: tuple[int, ...]
    rank: int = 0
    differentiated: frozenset[str] = frozenset()

    @property
    def world(self) -> int:
        return len(self.counts)

    @property
    def start(self) -> int:
        """Place of this rank's first row in the global batch."""
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.counts[self.rank])


def ranks_of(gather: str, **arguments: torch.Tensor | None) -> Ranks:
    """Who holds how many rows of `arguments`, which have the same number on a rank; every rank must call this.

    gather: "none" (this rank alone) or "ranks". Ranks may hold different numbers of rows, also 0, but must agree in the
    other dimensions, the dtypes, and which arguments are None. The answers come to the host: a CUDA stream is waited
    for. A rank that raised before, such as for a bad teacher row, is waited for until the process group's timeout.
    """
    if gather not in GATHER:
        raise unknown_name("gather", gather, GATHER)
    present = {name: x for name, x in arguments.items() if x is not None}
    rows = next(iter(present.values())).shape[0]
    if gather == "none" or not (dist.is_available() and dist.is_initialized()):
        return Ranks((rows,))
    mine = [rows]
    for x in arguments.values():
        shape = (-1, 0, 0) if x is None else (_DTYPES.index(x.dtype), *x.shape[1:], *[1] * (3 - x.ndim))
        mine += [*shape, x is not None and x.requires_grad and torch.is_grad_enabled()]
    device = next(iter(present.values())).device
    mine = torch.tensor(mine, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).cpu()  # [W, 1 + 4 * arguments]
    for place, name in enumerate(arguments):
        seen = table[:, 1 + 4 * place : 4 + 4 * place].tolist()
        if any(shape != seen[0] for shape in seen):
            held = ", ".join(_described(*shape) for shape in seen)
            raise InputError(f"{name}: ranks must agree in all but the number of rows; they hold {held}")
    trained = table[:, 4::4].any(0).tolist()
    differentiated = frozenset(name for name, any_rank in zip(arguments, trained) if any_rank)
    return Ranks(tuple(table[:, 0].tolist()), dist.get_rank(), differentiated)


def _described(dtype: int, *dims: int) -> str:
    if dtype < 0:
        return "None"
    dims = dims if dims[1] > 1 else dims[:1]
    return f"(rows, {', '.join(map(str, dims))}) of {str(_DTYPES[dtype]).removeprefix('torch.')}"


def gather_constant(ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
    """All ranks' rows of x in rank order, detached; every rank must call this."""
    x = x.detach()
    if ranks.world == 1:
        return x
    # Collectives want equal shapes: rows are padded to the longest rank's.
    padded = x.new_zeros(max(ranks.counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in ranks.counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, ranks.counts)])


def of_all_ranks(
    gather: str, student: torch.Tensor, targets: Sequence[torch.Tensor]
) -> tuple[Ranks, torch.Tensor | None, list[torch.Tensor]]:
    """Who holds which rows; all ranks' students, detached, or None where there is one rank; all ranks' targets."""
    # First how many targets, for ranks that disagree in that would send messages of different lengths.
    first = targets[0][:, :, None].expand(-1, -1, len(targets))
    ranks = ranks_of(gather, student=student, teacher=first)
    if ranks.world == 1:
        return ranks, None, list(targets)
    if len(targets) > 1:
        ranks_of(gather, **{f"teacher[{k}]": target for k, target in enumerate(targets)})
    return ranks, gather_constant(ranks, student), [gather_constant(ranks, target) for target in targets]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, x):
        ctx.ranks = ranks
        return gather_constant(ranks, x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return None, grad[ctx.ranks.own]


def gather_rows(ranks: Ranks, name: str, x: torch.Tensor) -> torch.Tensor:
    """All ranks' rows of x, the argument `name`; a row's gradient is the sum over ranks, on the rank that holds it.

    Every rank must call this, and must run the backward pass if one does. A rank whose own x needs no gradient, such as
    one without rows, still adds to the others'.
    """
    if ranks.world == 1:
        return x
    if name not in ranks.differentiated:
        return gather_constant(ranks, x)
    return _GatherRows.apply(ranks, x if x.requires_grad else x.detach().requires_grad_())


class _LossOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, world, share):
        ctx.world = world
        loss = loss.clone()
        if share:
            dist.all_reduce(loss)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.world, None, None


def loss_of_ranks(ranks: Ranks, loss: torch.Tensor, *, share: bool = True) -> torch.Tensor:
    """The global loss on every rank, its gradient scaled by the number of ranks.

    loss: this rank's share of a sum over ranks, or (share=False) the global loss already, as every rank computed it.
    """
    return loss if ranks.world == 1 else _LossOfRanks.apply(loss, ranks.world, share)
