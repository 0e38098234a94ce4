"""The kernels of the distillation losses on a GPU, bfloat16 included, against their definitions in float64.

Tests named `small` are also run under compute-sanitizer (bench/gpu.sh, stage "sanitizer").
"""

import itertools

import pytest
import torch
from compare import backend, relative, value_and_gradient
from tolerances import TOLERANCE

from leafkern.ops import alignment_loss, distill_loss, similarity_loss
from leafkern.ops._core.teachers import unit_targets
from leafkern.ops.distill.reference import KINDS, blocked_distill_loss, brute_alignment_loss, lean_alignment_loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
JASPER = (10.0, 200.0, 20.0)
WITHOUT_RELATIVE = (10.0, 200.0, 0.0)
MRL = [1024, 768, 512, 256, 128]
DISTILL = torch.ops.leafkern.distill_loss.default


def drawn(rows, width, *teachers, dtype=torch.float32):
    """A student and its teachers, which know something of it: cosines of either sign, and errors that vary."""
    student = torch.randn(rows, width, device="cuda")
    mixed = [torch.randn(width, teacher, device="cuda") / width**0.5 for teacher in teachers or (width,)]
    teachers = [student @ m + torch.randn(rows, m.shape[1], device="cuda") for m in mixed]
    return student.to(dtype).requires_grad_(), teachers


def exact(student, teachers, dims, weights, margin=0.015):
    """The terms and the gradient in float64, by the form in blocks, on the CPU."""
    student = student.detach().cpu().double()
    targets = unit_targets(student, [t.cpu().double() for t in teachers])
    with backend("relative=reference"):
        return blocked_distill_loss(student, None, targets, 0, dims, weights, margin, False, 0.0, [True])


def hold(student, teachers, dims, weights=JASPER):
    found = value_and_gradient(lambda s: distill_loss(s, teachers, dims=dims, weights=weights), student)
    for mine, right in zip(found, exact(student, teachers, dims, weights), strict=True):
        assert mine.dtype == (student.dtype if mine.ndim else torch.float32)
        assert (mine.double().cpu() - right).norm() <= TOLERANCE[student.dtype] * right.norm() + 1e-6
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[24], [24, 16, 7]])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 70])
def test_small_equals_definition(dtype, dims, rows):
    hold(*drawn(rows, 24, dtype=dtype), dims)


@pytest.mark.parametrize("weights", list(itertools.product([0.0, 3.0], repeat=3)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_every_choice_of_terms(dtype, weights):
    student, teachers = drawn(40, 100, 64, 36, dtype=dtype)
    found = hold(student, teachers, [80, 33], weights)
    alone = distill_loss(student.detach(), teachers, dims=[80, 33], weights=weights)
    assert all(torch.equal(x, y) for x, y in zip(found[:4], alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_views(dtype):
    student, (teacher,) = drawn(50, 40, dtype=dtype)
    wide = torch.cat([student.detach(), torch.full_like(student, torch.nan)], 1)
    expected = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[40, 8]), student)
    for view in (wide[:, :40], student.detach().T.contiguous().T):
        targets = [unit_targets(student, teacher)[0].T.contiguous().T]
        found = DISTILL(view, None, targets, 0, [40, 8], JASPER, 0.015, False, 0.0, [True])
        assert all(relative(x, y) <= TOLERANCE[dtype] for x, y in zip(found, expected, strict=True))


# Tiles of 32, of 64; several teachers of odd widths; more teachers than widths.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "teachers", "dims"),
    [(300, 1024, (1024,), MRL), (2500, 384, (200, 184), [384, 96]), (1111, 100, (17, 33, 1, 40, 9), [99, 50, 3])],
)
def test_larger_batches(dtype, rows, width, teachers, dims):
    hold(*drawn(rows, width, *teachers, dtype=dtype), dims, WITHOUT_RELATIVE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_relative_term_of_larger_batches(dtype):
    hold(*drawn(300, 256, dtype=dtype), [256, 64])


@pytest.mark.parametrize("block", [4 * 3 * 700 * 200, 4 * 3 * 700 * 10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_rows(monkeypatch, dtype, block):
    from leafkern.ops.distill import kernels

    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(kernels, "gram_is_cheaper", lambda *_: False)
    hold(*drawn(700, 64, dtype=dtype), [64, 30], WITHOUT_RELATIVE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_form(monkeypatch, dtype):
    from leafkern.ops.distill import kernels

    monkeypatch.setattr(kernels, "gram_is_cheaper", lambda *_: True)
    hold(*drawn(700, 64, dtype=dtype), [64, 30], WITHOUT_RELATIVE)


@pytest.mark.parametrize("weights", [JASPER, WITHOUT_RELATIVE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_of_ranks_add_up(weights, dtype):
    student, teachers = drawn(200, 64, 40, 24, dtype=dtype)
    student, targets = student.detach(), unit_targets(student, teachers)
    options = ([64, 20], weights, 0.015, False, 0.0, [True])
    shares = [DISTILL(student[a:b], student, targets, a, *options) for a, b in ((0, 70), (70, 70), (70, 200))]
    whole = DISTILL(student, None, targets, 0, *options)
    sums = [sum(values) for values in list(zip(*shares))[:4]]
    for mine, right in zip((*sums, torch.cat([share[4] for share in shares])), whole, strict=True):
        assert relative(mine, right) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 1.0)])
def test_small_nan_of_the_student_propagates(weights, bad):
    student, teachers = drawn(90, 40)
    with torch.no_grad():
        student[70, 1] = bad
    total, *_, grad = value_and_gradient(lambda s: distill_loss(s, teachers, weights=weights), student)
    assert total.isnan()
    assert grad[70].isnan().all()


def test_small_zero_and_tiny_rows():
    student, teachers = drawn(40, 24)
    with torch.no_grad():
        student[1] = 0
        student[3] *= 1e-14
    found = value_and_gradient(lambda s: distill_loss(s, teachers, dims=[24, 8], weights=WITHOUT_RELATIVE), student)
    expected = exact(student, teachers, [24, 8], WITHOUT_RELATIVE)
    assert (found[4][1] == 0).all()
    # Each row by itself: the tiny row's gradient is 1e12 times the others'.
    for mine, right in zip((*found[:4], *found[4]), (*expected[:4], *expected[4]), strict=True):
        assert (mine.double().cpu() - right).norm() <= TOLERANCE[torch.float32] * right.norm() + 1e-6


def kernels_launched(function):
    """How many kernels `function` runs on the GPU, copies and fills of memory among them."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return len([event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA])


def peak_memory(function):
    """Bytes that `function` adds to what is allocated."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def arguments(rows, width, dims, weights, wanted, dtype=torch.float32):
    student, teachers = drawn(rows, width, dtype=dtype)
    targets = unit_targets(student, teachers)
    return student.detach(), None, targets, 0, dims, weights, 0.015, False, 0.0, [wanted]


# A product may take two launches: of split sums, and their joining.
@pytest.mark.parametrize(("wanted", "most"), [(True, 5 + 2 * len(MRL)), (False, 3)])
def test_few_launches(wanted, most):
    given = arguments(1024, 1024, MRL, WITHOUT_RELATIVE, wanted)
    torch.use_deterministic_algorithms(False)
    # The cosine term's value takes part in finish.
    assert kernels_launched(lambda: DISTILL(*given)) <= most + (not wanted)


def test_few_launches_of_alignment():
    student, (teacher,) = drawn(1000, 1024)
    torch.use_deterministic_algorithms(False)
    arguments = student.detach(), teacher, None, KINDS.index("l2"), True, [True, False]
    assert kernels_launched(lambda: torch.ops.leafkern.alignment_loss(*arguments)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1024, 8192])
def test_peak_memory(rows, dtype):
    # Gradient, half precision's copy, and a block of cosines for all widths and the teacher with its sums.
    given = arguments(rows, 1024, MRL, WITHOUT_RELATIVE, True, dtype)
    copies = 1 if dtype == torch.float32 else 2
    block = min(4 * (len(MRL) + 1) * rows**2, 256 << 20)
    assert peak_memory(lambda: DISTILL(*given)) <= 4 * rows * 1024 * copies + 1.1 * block + (1 << 20)
    value = arguments(rows, 1024, MRL, WITHOUT_RELATIVE, False, dtype)
    assert peak_memory(lambda: DISTILL(*value)) <= 1 << 20


def test_nothing_waits_for_the_gpu():
    student, teachers = drawn(300, 128, dtype=torch.bfloat16)
    distill_loss(student, teachers, dims=[128, 32], weights=WITHOUT_RELATIVE).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distill_loss(student, teachers, dims=[128, 32], weights=WITHOUT_RELATIVE).total.backward()
        similarity_loss(student.detach(), teachers)
        alignment_loss(student, teachers[0], kind="l2", normalize=True).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_every_time():
    student, teachers = drawn(1500, 384, dtype=torch.bfloat16)
    runs = [
        value_and_gradient(lambda s: distill_loss(s, teachers, dims=[384, 128], weights=WITHOUT_RELATIVE), student)
        for _ in range(3)
    ]
    assert all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, wanted):
    student, teachers = drawn(40, 24, 16, 8, dtype=dtype)
    student, targets = student.detach().requires_grad_(wanted), unit_targets(student, teachers)
    given = student, None, targets, 0, [24, 8], WITHOUT_RELATIVE, 0.015, False, 0.0, [wanted]
    torch.library.opcheck(DISTILL, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_equals_eager(dtype):
    student, teachers = drawn(60, 32, dtype=dtype)

    def run(s):
        losses = distill_loss(s, teachers, dims=[32, 8], weights=WITHOUT_RELATIVE).total
        return losses + alignment_loss(s, teachers[0])

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True)
    for found, expected in zip(value_and_gradient(compiled, student), value_and_gradient(run, student), strict=True):
        assert relative(found, expected) <= TOLERANCE[dtype]


def hold_alignment(student, teacher, kind, normalize, definition, scale=1):
    """scale: of the loss before its gradient is rounded to the student's dtype."""
    options = {"kind": kind, "normalize": normalize}
    loss, grad = value_and_gradient(lambda s: scale * alignment_loss(s, teacher, **options), student)
    exact = student.detach().cpu().double().requires_grad_()
    expected, gradient = definition(exact, teacher.detach().cpu().double(), kind, normalize)
    for mine, right in ((loss, expected), (grad, gradient)):
        assert (mine.double().cpu() / scale - right).norm() <= TOLERANCE[student.dtype] * right.norm() + 1e-6


def by_definition(student, teacher, kind, normalize):
    loss = brute_alignment_loss(student, teacher, kind, normalize and kind != "cosine")
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def by_reference(student, teacher, kind, normalize):
    return lean_alignment_loss(student.detach(), teacher, KINDS.index(kind), normalize, True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (23, 100), (40, 384)])
def test_small_alignment(dtype, rows, width, kind, normalize):
    student, (teacher,) = drawn(rows, width, dtype=dtype)
    hold_alignment(student, teacher.to(dtype), kind, normalize, by_definition)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 8192, 20_000])
def test_alignment_of_wide_rows(dtype, width, kind):
    student, (teacher,) = drawn(300, width, dtype=dtype)
    # Entries of a mean over so many would be subnormal in float16.
    hold_alignment(student, teacher, kind, True, by_reference, scale=2**20)
