"""The Triton kernels of the relative similarity loss on a GPU, against the definition and the CPU: counts, exact.

Tests named `small` are those that suit compute-sanitizer.
"""

import itertools

import pytest
import torch
from relative_cases import CASES, MODES, assert_same, brute_with_gradient, coarse, noise, scores_of

from leafkern.ops import relative_similarity_loss
from leafkern.ops._core.native import library
from leafkern.ops.relative import native
from leafkern.ops.relative.autograd import relative_scores
from leafkern.ops.relative.reference import blocked_relative

pytestmark = pytest.mark.gpu
needs_native = pytest.mark.skipif(library()[0] is None, reason="leafkern._C is not built")


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    # Memory is poisoned only where no matrices are multiplied: cuBLAS wants to be set up for deterministic products.
    monkeypatch.setenv("LEAFKERN_BACKEND", "relative=triton")


@pytest.fixture(params=["all pairs", "sorts"])
def form(monkeypatch, request, poisoned):
    """One form at every size."""
    from leafkern.ops.relative import kernels

    monkeypatch.setattr(kernels, "BRUTE_WORK", 1 << 60 if request.param == "all pairs" else 0)
    return request.param


def on_gpu(student, teacher, margin, mode, with_gradient=True):
    losses, gradients = relative_scores(student.cuda(), teacher.cuda(), margin, *mode, with_gradient)
    return losses.cpu(), gradients.cpu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_small_equals_brute(case, mode, form):
    for batch, margin in itertools.product((2, 3, 4, 33), (0.0, 0.015, 0.5)):
        student, teacher = scores_of(case, batch, torch.float32)
        losses, gradients = on_gpu(torch.stack([student, -student]), teacher, margin, mode)
        for each, loss, gradient in zip((student, -student), losses, gradients):
            expected = brute_with_gradient(each, teacher, margin, *mode)
            assert_same((loss, gradient), expected, torch.float32, (batch, margin))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
def test_small_float64(mode):
    student, teacher = scores_of("tied_teacher", 60)
    losses, gradients = on_gpu(student[None], teacher, 0.015, mode)
    assert losses.dtype == gradients.dtype == torch.float64
    expected = brute_with_gradient(student, teacher, 0.015, *mode)
    assert_same((losses[0], gradients[0]), expected, torch.float64, mode)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_small_scores_that_are_not_finite(bad, form):
    student, teacher = torch.stack([noise(50, torch.float32) for _ in range(2)]), noise(50, torch.float32)
    student[0].fill_diagonal_(torch.nan)
    student[1, 0, 1] = bad
    loss, gradient = on_gpu(student, teacher, 0.015, MODES[0])
    assert loss[0].isfinite()
    assert gradient[0].isfinite().all()
    assert loss[1].isnan()
    assert gradient[1].triu(1).isnan().sum() == 50 * 49 // 2
    assert (gradient.tril() == 0).all()
    teacher[0, 2] = bad
    assert on_gpu(student, teacher, 0.015, MODES[3])[0].isnan().all()


def ties_and_more(batch):
    """Scores some of which are of a hundred values."""
    student, teacher = noise(batch, torch.float32), noise(batch, torch.float32)
    third = slice(None), slice(batch // 3)
    student[third], teacher[third] = coarse(student)[third], coarse(teacher)[third]
    return student, teacher


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [300, 700])
def test_equals_the_reference(batch, mode, form):
    student, teacher = ties_and_more(batch)
    losses, gradients = on_gpu(student[None], teacher, 0.015, mode)
    expected = blocked_relative(student, teacher, 0.015, *mode)
    assert abs(losses[0].double() - expected[0]) <= 1e-6 * expected[0]
    pairs = batch * (batch - 1) // 2
    # float32 rounds the quotient.
    torch.testing.assert_close(
        gradients[0].double() * (pairs * (pairs - 1) // 2), expected[1].double(), rtol=1e-6, atol=0
    )


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("batch", "mode"), [(1500, MODES[3]), (4096, MODES[0])])
def test_equals_the_cpu_kernels(batch, mode):
    student, teacher = ties_and_more(batch)
    student = torch.stack([student, noise(batch, torch.float32)])
    losses, gradients = on_gpu(student, teacher, 0.015, mode)
    expected, right = native.relative_scores(student, teacher, 0.015, *mode, True)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert torch.equal(gradients, right)


def test_a_batch_of_8192():
    student, teacher = (torch.randn(8192, 8192, device="cuda") / 10 for _ in range(2))
    losses, gradients = relative_scores(student[None], teacher, 0.015, False, 0.0, True)
    rows, columns = torch.triu_indices(8192, 8192, 1, device="cuda")
    s, t, found = (x[rows, columns].double() for x in (student, teacher, gradients[0]))
    count = len(s) * (len(s) - 1) / 2
    for p in torch.randint(len(s), (40,)).tolist():
        low = (t > t[p]) & (0.015 - (s - s[p]) > 0)
        high = (t < t[p]) & (0.015 - (s[p] - s) > 0)
        torch.testing.assert_close(found[p] * count, (low.sum() - high.sum()).double(), rtol=1e-6, atol=1e-3)
    assert losses.isfinite().all()


@pytest.mark.parametrize(("batch", "widths"), [(1024, 12), (2048, 1), (2048, 5), (4096, 2)])
def test_memory_per_pair(batch, widths):
    student = torch.randn(widths, batch, batch, device="cuda")
    arguments = (student, torch.randn(batch, batch, device="cuda"), 0.015, False, 0.0, True)
    relative_scores(*arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    relative_scores(*arguments)
    taken = torch.cuda.max_memory_allocated() - before
    pairs = batch * (batch - 1) / 2
    # 12 bytes for T, and for a width 38 or, for a group of them, 256 MiB; the gradient.
    assert taken <= 12 * pairs + max(40 * pairs, 280 << 20) + 4 * student.numel() + (8 << 20)


OURS = ["gather", "windows", "positions", "count", "scan", "partition", "query", "brute"]


@pytest.mark.parametrize(("batch", "widths", "launches"), [(256, 1, 4), (256, 5, 11), (1024, 5, 14), (4096, 2, 26)])
def test_launches(batch, widths, launches):
    arguments = (torch.randn(widths, batch, batch, device="cuda"), torch.randn(batch, batch, device="cuda"))
    relative_scores(*arguments, 0.015, False, 0.0, True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        relative_scores(*arguments, 0.015, False, 0.0, True)
        torch.cuda.synchronize()
    found = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum(name in [f"{ours}_kernel" for ours in OURS] for name in found) == launches


@pytest.mark.parametrize("batch", [40, 700])
def test_the_host_does_not_wait(batch):
    student = torch.randn(batch, 64, device="cuda", requires_grad=True)
    teacher = torch.randn(batch, 32, device="cuda")

    def step():
        loss = relative_similarity_loss(student, teacher, dims=[64, 16])
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The same bits every time.
    assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("batch", [40, 700])
def test_under_graph_capture(batch):
    student = torch.randn(2, batch, batch, device="cuda")
    teacher = torch.randn(batch, batch, device="cuda")
    relative_scores(student, teacher, 0.015, False, 0.0, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = relative_scores(student, teacher, 0.015, False, 0.0, True)
    student.copy_(torch.randn_like(student))
    graph.replay()
    expected = relative_scores(student, teacher, 0.015, False, 0.0, True)
    assert all(torch.equal(*pair) for pair in zip(captured, expected))


def test_opcheck_and_compile():
    student, teacher = torch.randn(20, 6, device="cuda", requires_grad=True), torch.randn(20, 5, device="cuda")

    def loss_of(s, t):
        return relative_similarity_loss(s * 2, t, dims=[6, 3], ties="reference", min_gap=0.01)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found, expected = compiled(student, teacher), loss_of(student, teacher)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    assert torch.equal(*gradients)
    torch.library.opcheck(
        torch.ops.leafkern.relative_similarity_loss.default,
        (student, None, [torch.nn.functional.normalize(teacher, dim=1)], 0, [6, 2], 0.015, False, 0.0, [True]),
    )


def test_the_loss_of_rows_equals_that_on_cpu(monkeypatch):
    # Rows of ±1 have the norms 4 and 2 at widths 16 and 4: all products are exact.
    student, teacher = (torch.randn(200, 16).sign() for _ in range(2))
    options = {"dims": [16, 4], "ties": "reference", "margin": 0.25}
    results = []
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setenv("LEAFKERN_BACKEND", "relative=reference")
        rows = student.to(device).requires_grad_()
        loss = relative_similarity_loss(rows, teacher.to(device), **options)
        results.append((loss.detach().cpu(), torch.autograd.grad(loss, rows)[0].cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-9)
