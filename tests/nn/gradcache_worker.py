"""One rank of test_gradcache.py: cached_backward under DistributedDataParallel; and the small model of its tests."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from leafkern.nn import cached_backward
from leafkern.ops import info_nce

ROWS, WIDTH, OUT, NEGATIVES = 9, 6, 4, 2
# Chunks of each rank's queries and positives.
CUTS = {"uneven": [([2, 2], [1, 3]), ([1, 2, 2], [5])], "one without rows": [([4, 5], [9]), ([0], [0])]}
WORLD = 2


def encoder(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(3)
    layers = [torch.nn.Linear(WIDTH, 32), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(32, OUT)]
    return torch.nn.Sequential(*layers).to(dtype)


def batch(*shape, seed=0):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_towers():
    return [batch(ROWS, seed=0), batch(ROWS, seed=1), batch(ROWS, NEGATIVES, seed=2)]


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def exchange(exchanges, bucket):
    """DistributedDataParallel's averaging, counted."""
    exchanges.append(bucket.index())
    mean = bucket.buffer() / WORLD
    dist.all_reduce(mean)
    done = torch.futures.Future()
    done.set_result(mean)
    return done


def results(rank, cuts, closure):
    """(loss, gradient, number of exchanges of gradients)."""
    start = sum(sum(queries) for queries, _ in cuts[:rank])
    towers = [x[start : start + sum(cut)].split(cut) for x, cut in zip(three_towers(), cuts[rank])]
    model = torch.nn.parallel.DistributedDataParallel(encoder())
    exchanges = []
    model.register_comm_hook(exchanges, exchange)
    how = {"encode": lambda x: model(x), "no_sync": model.no_sync} if closure else {"encode": model}

    def loss(queries, positives):
        return info_nce(queries, positives, temperature=0.2, gather="ranks")

    return cached_backward(towers=towers, loss=loss, **how), gradients(model), len(exchanges)


def main(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {(name, closure): results(rank, cuts, closure) for name, cuts in CUTS.items() for closure in (False, True)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as ranks_worker.py does


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
