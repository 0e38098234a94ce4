"""The relative similarity loss, forward and backward, beside the eager form and, on CPU, `std::sort` of its pairs.

D = 384, one width and five. On CPU the limit that percentages are of is one thread's std::sort of the P = B(B-1)/2
pairs (float key, int32 payload) at the rate measured in this run: a comparison, not a floor. "times std::sort" is the
ratio of medians within the case, the sort timed between our calls; "five widths / one width" likewise. On CUDA the
limit is bytes over the measured copy bandwidth: those of a radix sort of T and of every width's S (float32 keys, 64-bit
places, 8 bits a pass), and 2·16 B·P·log2 P per width for the counts; small batches are counted without either.
"""

import math
import time
from statistics import median

import numpy as np
import pytest
import torch

from leafkern.ops import relative_similarity_loss
from leafkern.ops.relative.autograd import relative_scores

from .ceilings import native_loops, sort_keyed
from .harness import Case, Contestant, Work
from .machine import as_cuda_graph, compiled

DIM, MARGIN = 384, 0.015
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCHES = {
    "cpu": {"tiny": (16, 48), "small": (64, 512), "full": (64, 128, 512, 1024, 2048)},
    "cuda": {"tiny": (16, 48), "small": (256, 1024), "full": (256, 1024, 4096, 8192)},
}
WIDTHS = {1: [DIM], 5: [384, 256, 128, 64, 32]}
EAGER = {"cpu": 128, "cuda": 256}  # the largest batch of the eager form, whose memory grows as B⁴
# Keys and places are read and written once for each of four digits; the keys once more to count them.
SORT_BYTES = 4 * 2 * (4 + 8) + 4
SETS = 2
PICKED, SAMPLES = 32, 2_000_000


def _inputs(batch: int, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher rows whose similarities agree as those of a student in training do."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, DIM, generator=generator)
    student = teacher + torch.randn(batch, DIM, generator=generator)
    return student.to(device).requires_grad_(), teacher.to(device)


def _upper(scores: torch.Tensor) -> torch.Tensor:
    return scores[tuple(torch.triu_indices(*scores.shape, 1, device=scores.device))].double()


def _wrong_scores(student: torch.Tensor, teacher: torch.Tensor, loss: float, gradient: torch.Tensor) -> str | None:
    """Compares some pairs' gradients with the definition, and the loss with its mean over random pairs of pairs."""
    s, t, found = _upper(student), _upper(teacher), _upper(gradient)
    count = len(s) * (len(s) - 1) / 2
    generator = torch.Generator().manual_seed(0)
    for p in torch.randint(len(s), (PICKED,), generator=generator).tolist():
        low = (t > t[p]) & (MARGIN - (s - s[p]) > 0)
        high = (t < t[p]) & (MARGIN - (s[p] - s) > 0)
        expected = int(low.sum() - high.sum())
        if abs(found[p] * count - expected) > 1e-6 * abs(expected) + 1e-3:
            return f"pair {p}: {found[p] * count} violations, low side less high side; expected {expected}"
    a, b = torch.randint(len(s), (2, SAMPLES), generator=generator).to(s.device)
    higher, lower = torch.where(t[a] > t[b], a, b), torch.where(t[a] > t[b], b, a)
    terms = torch.where(t[a] != t[b], (MARGIN - (s[higher] - s[lower])).relu(), 0.0)
    # Pairs with themselves are drawn too: one in P.
    expected, error = terms.mean() * len(s) / (len(s) - 1), terms.std() / SAMPLES**0.5
    return None if abs(loss - expected) <= 6 * error else f"loss {loss}; expected {expected} ± {error}"


def _wrong(output, inputs, dims) -> str | None:
    """What is wrong with (loss, gradient of the student), or None."""
    student, teacher = inputs
    unit = torch.nn.functional.normalize
    target = unit(teacher, dim=1)
    exact = student.detach().requires_grad_()
    units = [unit(exact[:, :dim], dim=1) for dim in dims]
    scores = torch.stack([x @ x.T for x in units])
    losses, gradients = relative_scores(scores.detach(), target @ target.T, MARGIN, False, 0.0, True)
    for each, loss, gradient in zip(scores.detach(), losses, gradients):
        wrong = _wrong_scores(each, target @ target.T, loss.item(), gradient)
        if wrong is not None:
            return wrong
    (expected,) = torch.autograd.grad(scores, exact, gradients / len(dims))
    loss, gradient = output
    if not torch.allclose(loss, losses.mean(), rtol=1e-5):
        return f"loss {loss.item()}; expected {losses.mean().item()}"
    error = ((gradient - expected).norm() / expected.norm()).item()
    return None if error < 1e-4 else f"gradient off by {error:.2g}"


def _both(function, student):
    loss = function()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def _eager(student, teacher, dims):
    """All pairs of pairs at once in float32, as public code has it."""
    unit = torch.nn.functional.normalize
    upper = tuple(torch.triu_indices(len(student), len(student), 1, device=student.device))
    target = unit(teacher, dim=1)
    t = (target @ target.T)[upper]
    higher = t[:, None] > t
    losses = []
    for dim in dims:
        rows = unit(student[:, :dim], dim=1)
        s = (rows @ rows.T)[upper]
        violations = (MARGIN - (s[:, None] - s)).relu()
        losses.append((violations * higher).sum() / (len(s) * (len(s) - 1) / 2))
    return torch.stack(losses).mean()


def _loss(inputs, dims):
    student, teacher = inputs
    return _both(lambda: relative_similarity_loss(student, teacher, dims=dims, margin=MARGIN), student)


def _eager_contestant(name: str, function, inputs, dims) -> Contestant:
    # float32 products of another order flip near ties: values are held to ours by tolerance.
    return Contestant(
        name,
        lambda i: _both(lambda: function(*inputs[i], dims), inputs[i][0]),
        lambda output, i: _wrong(output, inputs[i], dims),
    )


def _cpu_case(batch: int, widths: int) -> Case:
    dims = WIDTHS[widths]
    inputs = [_inputs(batch, seed, "cpu") for seed in range(SETS)]
    pairs = batch * (batch - 1) // 2
    library = native_loops()
    keys = [_upper(x.detach() @ x.detach().T).float().numpy() for x, _ in inputs]
    space = np.zeros(pairs, dtype=np.int64)
    times = {"ours": [], "std::sort": [], "one width": []}
    values = {}

    def timed(name, function):
        start = time.perf_counter()
        output = function()
        times[name].append(time.perf_counter() - start)
        if times["ours"] and times["std::sort"]:
            values["times std::sort"] = median(times["ours"]) / median(times["std::sort"])
        if times["ours"] and times["one width"]:
            values["five widths / one width"] = median(times["ours"]) / median(times["one width"])
        return output

    def ours(i):
        return timed("ours", lambda: _loss(inputs[i], dims))

    def one(i):
        return timed("one width", lambda: _loss(inputs[i], WIDTHS[1]))

    def sort(i):
        timed("std::sort", lambda: sort_keyed(library, keys[i], space))
        return space

    def check_ours(output, i):
        # Without --peers these are no contestants: then these are their times.
        for _ in range(3):
            if library is not None:
                sort(i)
            if widths > 1:
                one(i)
        return _wrong(output, inputs[i], dims)

    def check_sorted(found, i):
        scores = found.view(np.float32)[::2]
        return None if np.array_equal(scores, np.sort(keys[i])) else "not sorted"

    contestants = [Contestant("leafkern", ours, check_ours, ours=True, values=values)]
    if widths > 1:
        contestants.append(
            Contestant(
                "leafkern, one width", one, lambda output, i: _wrong(output, inputs[i], WIDTHS[1]), same_job=False
            )
        )
    if library is not None:
        note = "one thread; P scores, no loss"
        contestants.append(Contestant("std::sort", sort, check_sorted, same_job=False, note=note))
    if batch <= EAGER["cpu"]:
        contestants.append(_eager_contestant("eager, P×P", _eager, inputs, dims))
    bytes_moved = 4.0 * batch * DIM * 3
    work = Work(pairs * math.log2(pairs), "step", ("std_sort",), bytes_moved, "read", pairs, "pair")
    shape = {"B": batch, "D": DIM, "widths": widths}
    return Case("relative", f"B{batch}/widths{widths}", shape, work, contestants, SETS)


def _cuda_case(batch: int, widths: int) -> Case:
    dims = WIDTHS[widths]
    inputs = [_inputs(batch, seed, "cuda") for seed in range(SETS)]
    pairs = batch * (batch - 1) // 2
    graphs = {}

    def captured(i):
        # Captured at the first call, which is the one that is checked and not timed.
        if i not in graphs:
            graphs[i] = as_cuda_graph(lambda: _loss(inputs[i], dims))
        return graphs[i]()

    def check(output, i):
        return _wrong(output, inputs[i], dims)

    note = "captured: without Python's launch cost"
    contestants = [
        Contestant("leafkern", lambda i: _loss(inputs[i], dims), check, ours=True),
        Contestant("leafkern, in a graph", captured, check, same_job=False, note=note),
    ]
    if batch <= EAGER["cuda"]:
        contestants.append(_eager_contestant("eager, P×P", _eager, inputs, dims))
        contestants.append(_eager_contestant("eager, compiled", compiled(_eager, dynamic=False), inputs, dims))
    bytes_moved = float(pairs) * ((widths + 1) * SORT_BYTES + widths * 2 * 16 * math.log2(pairs))
    work = Work(bytes_moved, "byte", ("copy",), bytes_moved, "copy", pairs, "pair")
    shape = {"B": batch, "D": DIM, "widths": widths}
    return Case("relative", f"B{batch}/widths{widths}", shape, work, contestants, SETS, "cuda")


def pytest_generate_tests(metafunc):
    size = metafunc.config.getoption("--size")
    cases = [(device, batch) for device in DEVICES for batch in BATCHES[device][size]]
    metafunc.parametrize(("device", "batch"), cases, ids=[f"{device}-B{batch}" for device, batch in cases])


@pytest.mark.parametrize("widths", list(WIDTHS))
def test_relative(bench, device, batch, widths):
    bench(_cpu_case(batch, widths) if device == "cpu" else _cuda_case(batch, widths))
