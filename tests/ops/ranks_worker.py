"""One rank of test_ranks.py: every loss of this rank's rows under gather="ranks", and its parameter gradients."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from leafkern import ops

ROWS, WIDTH, OUT, NEGATIVES = 8, 6, 10, 3


def data(dtype):
    """The global batch, the same on every rank; tensors' first dimension is the row."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(ROWS, WIDTH),
        "y": random(ROWS, WIDTH),
        "z": random(ROWS, NEGATIVES, WIDTH),
        "m": random(ROWS, 2, WIDTH),
        "same": random(ROWS, OUT),
        "other": random(ROWS, 7),
        "own_scores": random(ROWS, NEGATIVES),
        "shared_scores": random(ROWS, ROWS),
        "ids": torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]),
        "negative_ids": torch.randint(0, 10, (ROWS, NEGATIVES), generator=generator),
    }


def head(dtype):
    torch.manual_seed(5)
    return torch.nn.Linear(WIDTH, OUT, bias=True).to(dtype)


def losses(model, rows, gather):
    """name -> the loss of `rows` as a function without arguments."""
    x, y, z, m = (model(rows[name]) for name in "xyzm")
    dims, ids = {"dims": [OUT, 4]}, (rows["ids"], rows["negative_ids"])
    teachers, both = [rows["same"], rows["other"]], {"teacher_weights": [2.0, 1.0]}
    cases = {f"alignment {kind}": (ops.alignment_loss, x, rows["same"], {"kind": kind}) for kind in KINDS}
    cases["alignment of a head"] = (
        ops.alignment_loss,
        rows["x"],
        rows["same"],
        {"weight": getattr(model, "module", model).weight, "normalize": True},
    )
    cases |= {
        "similarity": (ops.similarity_loss, x, rows["other"], dims),
        "similarity, two teachers": (ops.similarity_loss, x, teachers, both),
        "relative": (ops.relative_similarity_loss, x, rows["other"], {"margin": 0.3, **dims}),
        "distill": (ops.distill_loss, x, rows["same"], {"margin": 0.3, **dims}),
        "distill without relative": (ops.distill_loss, x, rows["same"], {"weights": (1, 2, 0), **dims}),
        "distill, two teachers": (ops.distill_loss, x, teachers, {"weights": (0, 2, 3), **both}),
        "info_nce in batch": (ops.info_nce, x, y, {"temperature": 0.1}),
        "info_nce": (
            ops.info_nce,
            x,
            y,
            z,
            {"temperature": 0.2, "gamma": 0.5, "mixed": m, "ids": ids, "fn_margin": 0.02, **dims},
        ),
        "info_nce, focal": (ops.info_nce, x, y, z, {"temperature": 0.2, "gamma": 0.5, "detach_focal": False}),
        "soft labels, own": (ops.soft_label_loss, x, z, rows["own_scores"], {"temperature": 0.3, **dims}),
        "soft labels, shared": (ops.soft_label_loss, x, y, rows["shared_scores"], {"temperature": 0.3}),
    }
    return {name: (lambda f=f, a=a, o=o: f(*a, **o, gather=gather)) for name, (f, *a, o) in cases.items()}


KINDS = ("l2sq", "l2", "mse", "cosine")


def _gradient(parameter):
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()


def results(rows, gather, dtype):
    """name -> (value, gradient of every parameter, flat)."""
    found = {}
    for name in losses(head(dtype), rows, gather):
        model = head(dtype)
        loss = losses(model, rows, gather)[name]()
        loss = getattr(loss, "total", loss)
        loss.backward()
        found[name] = (loss.detach(), torch.cat([_gradient(p) for p in model.parameters()]))
    return found


def halves(rank):
    return [torch.ones(2, 4, dtype=torch.bfloat16 if rank else torch.float16)] * 2


def uneven(rank, world):
    """One rank has no rows, no gradient of its own and no ids: every collective is met all the same."""
    generator = torch.Generator().manual_seed(2)
    batch = [torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in ((6,), (6,), (3, 6))]
    ids = torch.arange(4), torch.zeros(4, 3, dtype=torch.int64)
    alone = [x.clone().requires_grad_() for x in batch]
    expected = ops.info_nce(*alone, ids=ids, temperature=0.5)
    expected.backward()
    mine = [x if rank == 0 else x[:0] for x in batch]
    mine = [x.requires_grad_() if rank == 0 or place == 0 else x for place, x in enumerate(mine)]
    given = ids if rank == 0 else (ids[0][:0], None)
    loss = ops.info_nce(*mine, ids=given, temperature=0.5, gather="ranks")
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for x, exact in zip(mine if rank == 0 else [], alone):
        torch.testing.assert_close(x.grad, world * exact.grad)


def main(rank, counts, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(counts))
    for dtype in (torch.float64, torch.float32):
        start = sum(counts[:rank])
        rows = {name: part[start : start + counts[rank]] for name, part in data(dtype).items()}
        found = results(rows, "ranks", dtype)
        for _, grad in found.values():
            # What DistributedDataParallel does.
            dist.all_reduce(grad)
            grad /= len(counts)
        torch.save(found, Path(folder) / f"{rank}-{str(dtype).removeprefix('torch.')}.pt")
    # The real wrapper gives what its arithmetic, above, gives.
    ddp = torch.nn.parallel.DistributedDataParallel(head(torch.float64))
    rows = {name: part[start : start + counts[rank]] for name, part in data(torch.float64).items()}
    losses(ddp, rows, "ranks")["distill"]().total.backward()
    torch.save(torch.cat([p.grad.flatten() for p in ddp.parameters()]), Path(folder) / f"{rank}-ddp.pt")
    del ddp
    uneven(rank, len(counts))
    said = []
    for call in (
        lambda: ops.similarity_loss(torch.ones(2, 4 + rank), torch.ones(2, 3), gather="ranks"),
        lambda: ops.relative_similarity_loss(torch.ones(2, 4), torch.ones(2, 3 + rank), gather="ranks"),
        lambda: ops.similarity_loss(torch.ones(2, 4), [torch.ones(2, 3)] * (1 + rank), gather="ranks"),
        lambda: ops.similarity_loss(torch.ones(2, 4), [torch.ones(2, 3), torch.ones(2, 5 + rank)], gather="ranks"),
        lambda: ops.info_nce(*halves(rank), gather="ranks"),
        lambda: ops.info_nce(*[torch.ones(2, 4)] * 2, torch.ones(2, 1, 4) if rank else None, gather="ranks"),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    (Path(folder) / f"{rank}-errors.txt").write_text("\n".join(said))
    # A rank that leaves early may abort the others' last collective.
    dist.barrier()
    dist.destroy_process_group()
    # Everything is written. About one exit in twenty aborted in a thread of gloo ("terminate called without an active
    # exception") while the interpreter shut down.
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), [int(count) for count in sys.argv[2].split(",")], os.fspath(sys.argv[3]))
