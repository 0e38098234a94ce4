"""InfoNCE and the loss of soft labels, forward and backward, beside PyTorch and the losses of other libraries.

Given are embeddings, and the gradients of all of them are asked for. InfoNCE at temperature 0.05 with the positives of
the batch as columns, at one width or five, or with seven negatives for each query, these also masked by ids and margin;
the divergence from a teacher's softmax with 16 candidates for each query, or with as many shared candidates as queries.
The limit is 2·B·N·D operations forward and 4·B·N·D backward for N columns (for five widths as for one) at the rate of a
large matrix product. Chunks are of 256 queries, each recomputed in the backward pass.
"""

import functools
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from leafkern.ops import info_nce, soft_label_loss

from .harness import Case, Contestant, Work
from .machine import compiled

TEMPERATURE, MARGIN, NEGATIVES, CANDIDATES, CHUNK = 0.05, 0.1, 7, 16, 256
KINDS = ("in batch", "5 widths", "7 negatives", "7 negatives, masked", "soft labels, own", "soft labels, shared")
# (B, D)
SHAPES = {
    "tiny": [(24, 48)],
    "small": [(64, 384), (1024, 384)],
    "full": [(batch, width) for width in (384, 1024) for batch in (64, 256, 1024, 4096, 16384)],
}
# Multiplications and additions of the largest case on the CPU: seconds a call.
MOST_CPU_OPERATIONS = 1e12
DEVICES = [("cpu", "float32"), *([("cuda", "bfloat16"), ("cuda", "float32")] if torch.cuda.is_available() else [])]
# Relative error of the loss, and relative Frobenius error of gradients twice that; a peer that rounds in between gets
# ten times as much. A cosine that falls on the other side of the margin adds to it.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
CACHE_BYTES = 64 << 20  # input sets are rotated until they exceed a cache, or are four
MOST_SETS = 4


@dataclass(frozen=True)
class Options:
    kind: str
    dims: tuple[int, ...]

    @property
    def masked(self) -> bool:
        return self.kind.endswith("masked")

    @property
    def soft(self) -> bool:
        return self.kind.startswith("soft labels")


class Inputs:
    """One input set: `given` gets gradients. Positives and candidates are near their queries, as in training."""

    def __init__(self, options: Options, batch: int, width: int, device: str, dtype: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return scale * torch.randn(*shape, generator=generator, device=device)

        queries = draw(batch, width)
        self.given, self.ids, self.scores = [queries], None, None
        if options.kind == "soft labels, own":
            self.given.append(queries[:, None] * draw(batch, CANDIDATES, 1, scale=0.3) + draw(batch, CANDIDATES, width))
            self.scores = draw(batch, CANDIDATES, scale=0.3)
        else:
            self.given.append(0.3 * queries + draw(batch, width))
        if options.kind == "soft labels, shared":
            self.scores = draw(batch, batch, scale=0.05)
        elif options.kind.startswith("7 negatives"):
            self.given.append(0.2 * queries[:, None] + draw(batch, NEGATIVES, width))
        if options.masked:
            shapes = (batch,), (batch, NEGATIVES)
            ids = [torch.randint(20 * batch, shape, generator=generator, device=device) for shape in shapes]
            self.ids = ids[0], ids[1]
        self.given = [x.to(getattr(torch, dtype)).requires_grad_() for x in self.given]
        self._truth: list[torch.Tensor] | None = None

    def truth(self, options: Options) -> list[torch.Tensor]:
        """Loss and gradients in float64, a chunk of queries at a time."""
        if self._truth is None:
            exact = [x.detach().double().requires_grad_() for x in self.given]
            total, gradients = 0.0, [torch.zeros_like(x) for x in exact]
            for rows in _chunks(len(exact[0])):
                loss = _of_rows(options, rows, self.ids, self.scores, *exact)
                total += loss.detach()
                for sum_of, part in zip(gradients, torch.autograd.grad(loss, exact)):
                    sum_of += part
            self._truth = [total, *gradients]
        return self._truth


def _chunks(batch: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, batch)) for start in range(0, batch, CHUNK)]


# Peers


def _of_rows(options: Options, rows: slice, ids, scores, queries, *others) -> torch.Tensor:
    """The share of some queries in the loss, as public code has it: all similarities at once, and masks beside them."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    total = queries.new_zeros((), dtype=dtype)
    for width in options.dims:
        q = F.normalize(queries[rows, :width], dim=-1)
        units = [F.normalize(x[..., :width], dim=-1) for x in others]
        if options.soft:
            own = units[0].ndim == 3
            cosines = (units[0][rows] @ q[:, :, None]).squeeze(-1) if own else q @ units[0].T
            student = F.log_softmax(cosines.to(dtype) / TEMPERATURE, dim=-1)
            teacher = F.log_softmax(scores[rows].to(dtype) / TEMPERATURE, dim=-1)
            total = total + F.kl_div(student, teacher, reduction="sum", log_target=True)
            continue
        cosines = (q @ torch.cat([x.flatten(0, -2) for x in units]).T).to(dtype)
        own = torch.arange(rows.start, rows.stop, device=queries.device)
        if options.masked:
            positive = cosines.gather(1, own[:, None])
            same = torch.cat([x.flatten() for x in ids]) == ids[0][rows, None]
            masked = (same | (cosines > positive - MARGIN)).scatter(1, own[:, None], False)
            cosines = cosines.masked_fill(masked, -torch.inf)
        total = total + F.cross_entropy(cosines / TEMPERATURE, own, reduction="sum")
    return total / (len(options.dims) * len(queries))


def _eager(options: Options, inputs: Inputs) -> Callable:
    return lambda *given: _of_rows(options, slice(0, len(given[0])), inputs.ids, inputs.scores, *given)


def _compiled(options: Options, inputs: Inputs) -> Callable:
    function = _compiled_of_rows()
    return lambda *given: function(options, slice(0, len(given[0])), inputs.ids, inputs.scores, *given)


@functools.cache
def _compiled_of_rows() -> Callable:
    return compiled(_of_rows, dynamic=False)


def _chunked(options: Options, inputs: Inputs) -> Callable:
    def loss(*given):
        parts = [
            checkpoint(_of_rows, options, rows, inputs.ids, inputs.scores, *given, use_reentrant=False)
            for rows in _chunks(len(given[0]))
        ]
        return torch.stack(parts).sum()

    return loss


def _ours(options: Options, inputs: Inputs) -> Callable:
    dims = list(options.dims)
    if options.soft:
        return lambda q, c: soft_label_loss(q, c, inputs.scores, temperature=TEMPERATURE, dims=dims)
    masks = {"ids": inputs.ids, "fn_margin": MARGIN} if options.masked else {}
    return lambda *given: info_nce(*given, temperature=TEMPERATURE, dims=dims, **masks)


def _sentence_transformers() -> object | None:
    """The module with sentence-transformers' losses, or None."""
    for name in ("sentence_transformers.sentence_transformer", "sentence_transformers"):
        # Asked for a module of a package that is not there, find_spec raises.
        if importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec(name):
            return importlib.import_module(f"{name}.losses")
    return None


def _columns(given) -> list[torch.Tensor]:
    """Queries, positives, and the first, second, ... negatives of all queries."""
    return [*given[:2], *(given[2].unbind(1) if len(given) > 2 else ())]


def _ranking(options: Options, inputs: Inputs) -> Callable:
    loss = _sentence_transformers().MultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()), scale=1 / TEMPERATURE
    )
    return lambda *given: loss.compute_loss_from_embeddings(_columns(given), None)


def _cached_ranking(inputs: Inputs) -> Callable[[], list[torch.Tensor]]:
    """The step from embeddings to their gradients, which the cached form takes between two passes of the model."""
    kind = _sentence_transformers().CachedMultipleNegativesRankingLoss
    loss = kind(torch.nn.Sequential(torch.nn.Identity()), scale=1 / TEMPERATURE, mini_batch_size=CHUNK)

    def both():
        columns = [x.detach().requires_grad_() for x in _columns(inputs.given)]
        value = loss.calculate_loss([[x] for x in columns], with_backward=True)
        gradients = [x.grad for x in columns]
        return [value, *gradients[:2], *([torch.stack(gradients[2:], 1)] if len(columns) > 2 else [])]

    return both


def _liger(options: Options, inputs: Inputs) -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, target = LigerFusedLinearCrossEntropyLoss(), torch.arange(len(inputs.given[0]), device="cuda")
    return lambda q, p: loss(F.normalize(p, dim=1), F.normalize(q, dim=1) / TEMPERATURE, target)


# Cases


def _both(function: Callable, inputs: Inputs) -> Callable[[], list[torch.Tensor]]:
    def both():
        loss = function(*inputs.given)
        return [loss.detach(), *torch.autograd.grad(loss, inputs.given)]

    return both


def _contestant(name, made, sets, options, dtype, *, slack=10, **more) -> Contestant:
    calls: dict = {}

    def run(i):
        if i not in calls:
            calls[i] = made(sets[i])
        return calls[i]()

    def check(output, i):
        for place, (got, right) in enumerate(zip(output, sets[i].truth(options), strict=True)):
            error = ((got.double() - right).norm() / right.norm()).item()
            # `not <=` rather than `>`: NaN must not pass.
            if not error <= slack * TOLERANCE[dtype] * (2 if place else 1):
                return f"{'gradient ' + str(place) if place else 'loss'}: relative error {error:.2g}"
        return None

    return Contestant(name, run, check, **more)


def _dims(kind: str, width: int) -> tuple[int, ...]:
    return tuple(width * part // 12 for part in (12, 8, 4, 2, 1)) if kind == "5 widths" else (width,)


def _columns_of(kind: str, batch: int) -> int:
    return CANDIDATES if kind == "soft labels, own" else batch * (1 + NEGATIVES * kind.startswith("7 negatives"))


def _operations(kind: str, batch: int, width: int) -> float:
    return 6.0 * batch * _columns_of(kind, batch) * width


def _case(kind: str, batch: int, width: int, device: str, dtype: str, peers: bool) -> Case:
    options = Options(kind, _dims(kind, width))
    first = Inputs(options, batch, width, device, dtype, 0)
    numbers = sum(x.numel() for x in first.given)
    # Inputs are read forward and backward, gradients written.
    moved = 3.0 * numbers * first.given[0].element_size()
    if first.scores is not None:
        moved += 4.0 * first.scores.numel()
    count = min(MOST_SETS, max(2, round(CACHE_BYTES / moved)))
    sets = [first, *(Inputs(options, batch, width, device, dtype, seed) for seed in range(1, count))]

    def contestant(name, implementation, **more):
        def made(inputs):
            return _both(implementation(options, inputs), inputs)

        return _contestant(name, made, sets, options, dtype, **more)

    contestants = [contestant("leafkern", _ours, slack=1, ours=True)]
    if peers:
        contestants.append(contestant("torch", _eager))
        contestants.append(contestant("torch.compile", _compiled))
        contestants.append(contestant("torch, checkpointed chunks", _chunked))
        if kind in ("in batch", "7 negatives") and _sentence_transformers() is not None:
            contestants.append(contestant("sentence-transformers", _ranking))
            contestants.append(_contestant("sentence-transformers, cached", _cached_ranking, sets, options, dtype))
        if kind == "in batch" and device == "cuda" and importlib.util.find_spec("liger_kernel"):
            contestants.append(contestant("Liger fused linear cross-entropy", _liger))
    rates = ("bf16_gemm",) if dtype == "bfloat16" else ("fp32_fma", "fp32_gemm")
    work = Work(_operations(kind, batch, width), "FLOP", rates, moved, "copy", float(batch), "query")
    shape = {"kind": kind, "B": batch, "N": _columns_of(kind, batch), "D": width, "dtype": dtype}
    name = f"{kind.replace(', ', ' ').replace(' ', '-')}/{dtype}/B{batch}/D{width}"
    return Case("contrastive", name, shape, work, contestants, count, device)


def pytest_generate_tests(metafunc):
    shapes = SHAPES[metafunc.config.getoption("--size")]
    cases = [(*where, kind, *shape) for where in DEVICES for kind in KINDS for shape in shapes]
    # The largest batches are for GPUs.
    cases = [case for case in cases if case[0] != "cpu" or _operations(*case[2:]) <= MOST_CPU_OPERATIONS]
    ids = [f"{device}-{dtype}-{kind}-B{batch}-D{width}" for device, dtype, kind, batch, width in cases]
    metafunc.parametrize(("device", "dtype", "kind", "batch", "width"), cases, ids=ids)


def test_contrastive(bench, bench_session, kind, batch, width, device, dtype):
    bench(_case(kind, batch, width, device, dtype, bench_session.peers))
    gc.collect()
