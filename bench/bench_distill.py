"""The distillation losses, forward and backward, beside what public code does.

- distill: the three losses over five widths at D = 1024, beside Jasper's public form (P×P matrices of the P = B(B-1)/2
  pairs), plain and compiled; on CPU the limit is one thread's std::sort of the P pairs, as for relative.
- shared: distill_loss beside similarity_loss and relative_similarity_loss each alone; "distill / (similarity +
  relative)" is the ratio of medians, timed in turn.
- similarity: one width and three; the limit is the operations of blocks of B×B, 2·B²·(2·D_s + D_t), or of D×D matrices
  where those are fewer, at the measured rate of float32 products.
- alignment: one batch of LEAF, with and without a Dense head; bytes read and written once.

Every output is checked in float64 before it is timed. On CUDA alignment is a captured graph, so that kernels are timed
and not Python's launches; the others are timed as they are called.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F

from leafkern.ops import alignment_loss, distill_loss, relative_similarity_loss, similarity_loss
from leafkern.ops.distill.reference import brute_alignment_loss
from leafkern.ops.relative.reference import blocked_relative

from .harness import Case, Contestant, Work
from .machine import as_cuda_graph, compiled, synchronizer

WEIGHTS, MARGIN = (10.0, 200.0, 20.0), 0.015
DIM, WIDTHS = 1024, [1024, 512, 256, 128, 64]
DISTILL = {"tiny": [16], "small": [64], "full": [32, 64, 128]}
SHARED = {"tiny": 48, "small": 256, "full": 1024}
SIMILARITY = {"tiny": [(64, 32)], "small": [(1024, 384)], "full": [(b, d) for b in (4096, 16384) for d in (384, 1024)]}
ALIGNMENT = {"tiny": (4, 24, 32), "small": (32, 384, 1024), "full": (32, 384, 1024)}
SETS = 2
CHECKED_ROWS = 64
DEVICES = [("cpu", "float32"), *([("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else [])]
# Relative error of values and gradients; half precision's gradients are rounded to it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
# Pairs near the margin fall on one side or the other as scores are rounded.
NEAR_TIES = 1e-3


def _inputs(batch: int, dim: int, device: str, dtype: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher rows whose similarities agree as those of a student in training do."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, dim, generator=generator)
    student = teacher + torch.randn(batch, dim, generator=generator)
    student, teacher = (x.to(device, getattr(torch, dtype)) for x in (student, teacher))
    return student.requires_grad_(), teacher


def _both(function: Callable, *trained: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The loss and its gradients."""
    loss = function()
    return loss.detach(), *torch.autograd.grad(loss, trained)


def _far(found: torch.Tensor, right: torch.Tensor, most: float, what: str) -> str | None:
    error = ((found.double().cpu() - right.cpu()).norm() / right.norm().cpu()).item()
    # `not <=` rather than `>`: NaN must not pass.
    return None if error <= most else f"{what}: relative error {error:.2g}"


# The three losses together


def _jasper(student: torch.Tensor, teacher: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """All pairs of pairs at once, as public code has it."""
    upper = torch.triu_indices(len(student), len(student), 1, device=student.device).unbind()
    target = F.normalize(teacher, dim=1)
    cosine = (1 - (F.normalize(student, dim=1) * target).sum(1)).mean()
    teacher_scores = target @ target.T
    t = teacher_scores[upper]
    higher = t[:, None] > t
    similarity = relative = 0
    for dim in dims:
        rows = F.normalize(student[:, :dim], dim=1)
        scores = rows @ rows.T
        similarity = similarity + (scores - teacher_scores).square().mean()
        s = scores[upper]
        relative = relative + ((MARGIN - (s[:, None] - s)).relu() * higher).sum() / (len(s) * (len(s) - 1) / 2)
    return WEIGHTS[0] * cosine + (WEIGHTS[1] * similarity + WEIGHTS[2] * relative) / len(dims)


def _right_distill(student, teacher, dims) -> tuple[torch.Tensor, torch.Tensor]:
    """Total and gradient in float64 on the CPU."""
    exact = student.detach().double().cpu().requires_grad_()
    target = F.normalize(teacher.double().cpu(), dim=1)
    teacher_scores = target @ target.T
    pairs = len(exact) * (len(exact) - 1) // 2
    total = WEIGHTS[0] * (1 - (F.normalize(exact, dim=1) * target).sum(1)).mean()
    value = 0.0
    for dim in dims:
        rows = F.normalize(exact[:, :dim], dim=1)
        scores = rows @ rows.T
        total = total + WEIGHTS[1] / len(dims) * (scores - teacher_scores).square().mean()
        loss, counts = blocked_relative(scores.detach(), teacher_scores, MARGIN, False, 0.0)
        value += WEIGHTS[2] / len(dims) * loss.item()
        # Its value is added at the end; the sum here has its gradient.
        slope = counts.double() * (WEIGHTS[2] / len(dims) / (pairs * (pairs - 1) / 2))
        total = total + (scores * slope).sum() - (scores.detach() * slope).sum()
    return total.detach() + value, torch.autograd.grad(total, exact)[0]


def _check_distill(inputs, dims, dtype) -> Callable:
    right = {}

    def check(output, i):
        if i not in right:
            right[i] = _right_distill(*inputs[i], dims)
        most = max(NEAR_TIES, TOLERANCE[dtype])
        return _far(output[0], right[i][0], most, "loss") or _far(output[1], right[i][1], most, "gradient")

    return check


def _sort_work(batch: int, dim: int) -> Work:
    pairs = batch * (batch - 1) // 2
    return Work(pairs * math.log2(pairs), "step", ("std_sort",), 12.0 * batch * dim, "read", pairs, "pair")


def _distill_case(batch: int, device: str, dtype: str) -> Case:
    inputs = [_inputs(batch, DIM, device, dtype, seed) for seed in range(SETS)]
    check = _check_distill(inputs, WIDTHS, dtype)

    def contestant(name, function, **options):
        def run(i):
            return _both(lambda: function(*inputs[i], WIDTHS), inputs[i][0])

        return Contestant(name, run, check, **options)

    contestants = [contestant("leafkern", lambda s, t, dims: distill_loss(s, t, dims=dims).total, ours=True)]
    # In half precision the public form normalises and compares in it: another loss.
    if dtype == "float32":
        contestants.append(contestant("eager, P×P", _jasper))
        contestants.append(contestant("torch.compile of eager", compiled(_jasper, dynamic=False)))
    shape = {"B": batch, "D": DIM, "widths": len(WIDTHS), "dtype": dtype}
    return Case("distill", f"distill/{dtype}/B{batch}", shape, _sort_work(batch, DIM), contestants, SETS, device)


def _shared_case(batch: int, device: str, dtype: str) -> Case:
    inputs = [_inputs(batch, DIM, device, dtype, seed) for seed in range(SETS)]
    synchronize = synchronizer(device)
    times: dict[str, list[float]] = {"distill": [], "similarity": [], "relative": []}
    values: dict[str, float] = {}
    check = _check_distill(inputs, WIDTHS, dtype)
    functions = {
        "distill": lambda s, t: distill_loss(s, t, dims=WIDTHS).total,
        "similarity": lambda s, t: similarity_loss(s, t, dims=WIDTHS),
        "relative": lambda s, t: relative_similarity_loss(s, t, dims=WIDTHS, margin=MARGIN),
    }

    def run(name, i):
        student, teacher = inputs[i]
        synchronize()
        start = time.perf_counter()
        output = _both(lambda: functions[name](student, teacher), student)
        synchronize()
        times[name].append(time.perf_counter() - start)
        if all(times.values()):
            alone = median(times["similarity"]) + median(times["relative"])
            values["distill / (similarity + relative)"] = median(times["distill"]) / alone
        return output

    def check_ours(output, i):
        wrong = check(output, i)
        # The first calls compile and take memory; without --peers these are the others' times.
        for name in ("similarity", "relative") * 3:
            run(name, i)
        for name in times if i == 0 else ():
            times[name].clear()
        return wrong

    def check_part(output, i):
        return None if all(x.isfinite().all() for x in output) else "not finite"

    contestants = [Contestant("leafkern", lambda i: run("distill", i), check_ours, ours=True, values=values)]
    for name, function in (("similarity", "similarity_loss"), ("relative", "relative_similarity_loss")):
        contestants.append(
            Contestant(function, lambda i, name=name: run(name, i), check_part, same_job=False, limited=False)
        )
    shape = {"B": batch, "D": DIM, "widths": len(WIDTHS), "dtype": dtype}
    return Case("distill", f"shared/{dtype}/B{batch}", shape, _sort_work(batch, DIM), contestants, SETS, device)


# Similarity


def _eager_similarity(student, teacher, dims):
    target = F.normalize(teacher, dim=1)
    teacher_scores = target @ target.T
    losses = []
    for dim in dims:
        rows = F.normalize(student[:, :dim], dim=1)
        losses.append((rows @ rows.T - teacher_scores).square().mean())
    return torch.stack(losses).mean()


def _right_similarity(student, teacher, dims, picked) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, by blocks of rows, and the gradient of the rows `picked` in float64. On CPU the loss's products are in
    float32, its sums in float64: float64 would take minutes."""
    wide = torch.float64 if student.is_cuda else torch.float32
    loss, gradient = 0.0, torch.zeros(len(picked), student.shape[1], dtype=torch.float64, device=student.device)
    target = F.normalize(teacher.double(), dim=1)
    for dim in dims:
        exact = student.detach()[:, :dim].double()
        units = F.normalize(exact, dim=1)
        for u, t in zip(units.to(wide).split(1024), target.to(wide).split(1024)):
            error = u @ units.to(wide).T - t @ target.to(wide).T
            loss += error.square_().sum(dtype=torch.float64).item()
        rows = exact[picked].requires_grad_()
        error = F.normalize(rows, dim=1) @ units.T - target[picked] @ target.T
        # An entry off the diagonal stands twice in the mean, and no other row is differentiated here.
        gradient[:, :dim] += torch.autograd.grad(2 * error.square().sum(), rows)[0]
    scale = 1 / (len(dims) * len(student) ** 2)
    return torch.tensor(loss * scale), gradient * scale


def _similarity_operations(batch: int, dims: Sequence[int], teacher: int) -> float:
    by_blocks = batch**2 * (4.0 * dims[0] + 2 * teacher)
    crossed = sum(3.0 * dim**2 + 4 * dim * teacher for dim in dims)
    return min(by_blocks, batch * (crossed + teacher**2))


def _similarity_case(batch: int, dim: int, widths: int, device: str, dtype: str) -> Case:
    dims = [dim // 2**k for k in range(widths)]
    inputs = [_inputs(batch, dim, device, dtype, seed) for seed in range(SETS)]
    picked = torch.randint(batch, (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).to(device)
    right = {}

    def check(output, i):
        if i not in right:
            right[i] = _right_similarity(*inputs[i], dims, picked)
        most = TOLERANCE[dtype]
        wrong = _far(output[0], right[i][0], most, "loss")
        return wrong or _far(output[1][picked], right[i][1], most, "gradient")

    def contestant(name, function, **options):
        def run(i):
            return _both(lambda: function(*inputs[i], dims), inputs[i][0])

        return Contestant(name, run, check, **options)

    contestants = [contestant("leafkern", lambda s, t, dims: similarity_loss(s, t, dims=dims), ours=True)]
    if dtype == "float32":
        contestants.append(contestant("eager, B×B", _eager_similarity))
        if device == "cuda":
            contestants.append(contestant("torch.compile of eager", compiled(_eager_similarity, dynamic=False)))
    operations = _similarity_operations(batch, dims, dim)
    bytes_moved = 3.0 * inputs[0][0].element_size() * batch * dim
    rates = ("bf16_gemm", "fp32_gemm") if dtype == "bfloat16" else ("fp32_fma", "fp32_gemm")
    work = Work(operations, "FLOP", rates, bytes_moved, "copy", batch, "row")
    shape = {"B": batch, "D": dim, "widths": widths, "dtype": dtype}
    return Case("distill", f"similarity/{dtype}/B{batch}/D{dim}/widths{widths}", shape, work, contestants, SETS, device)


# Alignment


def _eager_alignment(student, teacher, weight, kind):
    student = student if weight is None else F.linear(student, weight)
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    return (student - teacher).square().sum(1).mean()


def _alignment_case(batch: int, inner: int, dim: int, head: bool, kind: str, device: str, dtype: str) -> Case:
    sets = []
    for seed in range(SETS):
        student, teacher = _inputs(batch, dim, device, dtype, seed)
        weight = None
        if head:
            student = _inputs(batch, inner, device, dtype, seed)[0]
            weight = torch.randn(dim, inner, generator=torch.Generator().manual_seed(seed)) / inner**0.5
            weight = weight.to(device, getattr(torch, dtype)).requires_grad_()
        sets.append((student, teacher, weight))

    def check(output, i):
        student, teacher, weight = sets[i]
        exact = [x.detach().double().requires_grad_() for x in (student, weight) if x is not None]
        loss = brute_alignment_loss(exact[0], teacher.double(), kind, False, *exact[1:])
        right = loss.detach(), *torch.autograd.grad(loss, exact)
        wrong = [_far(x, y, TOLERANCE[dtype], f"output {k}") for k, (x, y) in enumerate(zip(output, right))]
        return next(filter(None, wrong), None)

    def contestant(name, function, *, captured=False, **options):
        calls: dict = {}

        def run(i):
            if i not in calls:
                student, teacher, weight = sets[i]
                trained = [x for x in (student, weight) if x is not None]

                def call():
                    return _both(lambda: function(student, teacher, weight, kind), *trained)

                # Captured at the first call, which is the one that is checked and not timed.
                calls[i] = as_cuda_graph(call) if captured else call
            return calls[i]()

        return Contestant(name, run, check, **options)

    def ours(student, teacher, weight, kind):
        return alignment_loss(student, teacher, weight=weight, kind=kind)

    captured = device == "cuda"
    contestants = [contestant("leafkern", ours, captured=captured, ours=True)]
    if captured:
        note = "with Python's launch cost"
        contestants.append(contestant("leafkern, no graph", ours, same_job=False, note=note))
    # In half precision torch's own sums are rounded to it: another loss.
    if dtype == "float32":
        contestants.append(contestant("torch", _eager_alignment, captured=captured))
        contestants.append(contestant("torch.compile", compiled(_eager_alignment, dynamic=False), captured=captured))
    size = sets[0][0].element_size()
    operations = 6.0 * batch * dim
    bytes_moved = 3.0 * size * batch * dim
    if head:
        operations += 6.0 * batch * inner * dim
        bytes_moved = size * (batch * (2.0 * inner + dim) + 2.0 * inner * dim)
    work = Work(operations, "FLOP", ("fp32_fma", "fp32_gemm"), bytes_moved, "copy", batch, "row")
    shape = {"B": batch, "D_s": inner if head else dim, "D_t": dim, "kind": kind, "dtype": dtype}
    name = f"alignment/{kind}{'/head' if head else ''}/{dtype}/B{batch}/D{dim}"
    return Case("distill", name, shape, work, contestants, SETS, device)


def _cases(size: str) -> dict[str, Callable[[], Case]]:
    found = {}
    for device, dtype in DEVICES:
        where = f"{device}-{dtype}"
        for batch in DISTILL[size]:
            found[f"distill-{where}-B{batch}"] = lambda b=batch, w=(device, dtype): _distill_case(b, *w)
        found[f"shared-{where}"] = lambda w=(device, dtype): _shared_case(SHARED[size], *w)
        for batch, dim in SIMILARITY[size]:
            for widths in (1, 3):
                found[f"similarity-{where}-B{batch}-D{dim}-widths{widths}"] = (
                    lambda b=batch, d=dim, k=widths, w=(device, dtype): _similarity_case(b, d, k, *w)
                )
        for head, kind in ((False, "l2sq"), (False, "cosine"), (True, "l2sq")):
            found[f"alignment-{where}-{kind}{'-head' if head else ''}"] = lambda h=head, k=kind, w=(device, dtype): (
                _alignment_case(*ALIGNMENT[size], h, k, *w)
            )
    return found


def pytest_generate_tests(metafunc):
    cases = _cases(metafunc.config.getoption("--size"))
    metafunc.parametrize("case", cases.values(), ids=cases.keys())


def test_distill(bench, case):
    bench(case())
    gc.collect()
