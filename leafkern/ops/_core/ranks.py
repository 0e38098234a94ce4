"""The loss of the global batch on every rank: rows gathered over torch.distributed's default process group.

Each rank computes its share of the loss, from its own rows against everyone's; `loss_of_ranks` adds the shares.
Gradients are scaled by the number of ranks W, because DistributedDataParallel averages parameter gradients over
ranks: after that averaging, a parameter's gradient equals that of one process holding the whole batch.
Without an initialised process group, "ranks" means one rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from leafkern.errors import InputError, unknown_name

GATHER = ("none", "ranks")


@dataclass(frozen=True)
class Ranks:
    """counts: rows of every rank, in rank order; rank: this one."""

    counts: tuple[int, ...]
    rank: int = 0

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


def ranks_of(gather: str, name: str, x: torch.Tensor) -> Ranks:
    """Who holds how many rows of the argument `x`, called `name`; every rank must call this.

    gather: "none" (this rank alone) or "ranks". Ranks may hold different numbers of rows, also 0, but must agree in the
    other dimensions and the dtype. The counts come to the host: a CUDA stream is waited for.
    """
    if gather not in GATHER:
        raise unknown_name("gather", gather, GATHER)
    if gather == "none" or not (dist.is_available() and dist.is_initialized()):
        return Ranks((x.shape[0],))
    mine = torch.tensor([x.shape[0], *x.shape[1:], x.element_size()], device=x.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    shapes = [part.tolist() for part in everyone]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        seen = ", ".join(f"{tuple(shape[:-1])} of {8 * shape[-1]} bits" for shape in shapes)
        raise InputError(f"{name}: ranks must agree in all but the number of rows and in dtype; they hold {seen}")
    return Ranks(tuple(shape[0] for shape in shapes), dist.get_rank())


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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, x):
        ctx.ranks = ranks
        return gather_constant(ranks, x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return None, grad[ctx.ranks.own]


def gather_rows(ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
    """All ranks' rows of x in rank order; the gradient of a row is the sum over ranks, on the rank that holds it.

    Every rank must call this, and must run the backward pass if one does.
    """
    return x if ranks.world == 1 else _GatherRows.apply(ranks, x)


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
