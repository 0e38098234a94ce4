"""The Triton kernels of the distillation losses in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import itertools

import pytest
import torch
from compare import LargestTensor, recorded_launches, value_and_gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

pytest.importorskip("triton")

from leafkern.ops import alignment_loss, distill_loss, similarity_loss
from leafkern.ops._core.teachers import unit_targets
from leafkern.ops.distill.reference import KINDS, blocked_distill_loss, brute_alignment_loss, brute_distill_loss

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("only_triton"),
    # Of NaN, infinity and a division in the branch of a choice that is not taken.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16]
JASPER = (10.0, 200.0, 20.0)
SIMILAR = torch.ops.leafkern.similarity_loss.default
DISTILL = torch.ops.leafkern.distill_loss.default


@pytest.fixture
def kernels(monkeypatch):
    from leafkern.ops.distill import kernels

    # What is too small to pay for itself must be met by tests that name it.
    monkeypatch.setattr(kernels, "gram_is_cheaper", lambda *_: False)
    return kernels


def drawn(rows, width, *teachers, dtype=torch.float32):
    """A student and its teachers."""
    student = torch.randn(rows, width).to(dtype)
    return student.requires_grad_(), [torch.randn(rows, teacher) for teacher in teachers or (width,)]


def assert_near(found, expected, dtype):
    """Values and gradients within the table's relative error; where they vanish, within rounding of numbers near 1."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y.double()).norm() <= TOLERANCE[dtype] * y.double().norm() + 1e-6


def exact(student, teachers, dims, weights=JASPER, margin=0.015, ties="skip", min_gap=0.0):
    """The terms and the gradient in float64: by definition, or for many rows by the form in blocks, held to it."""
    student, teachers = student.detach().double(), [t.double() for t in teachers]
    targets, options = unit_targets(student, teachers), (dims, weights, margin, ties == "reference", min_gap)
    if len(student) > 8:
        return blocked_distill_loss(student, None, targets, 0, *options, [True])
    target = torch.cat(targets, 1)
    return value_and_gradient(lambda s: brute_distill_loss(s, target, *options), student)


def hold(student, teachers, dims, weights=JASPER, **options):
    found = value_and_gradient(lambda s: distill_loss(s, teachers, dims=dims, weights=weights, **options), student)
    assert all(x.dtype == torch.float32 for x in found[:4])
    assert found[4].dtype == student.dtype
    assert_near(found, exact(student, teachers, dims, weights, **options), student.dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[10, 4, 1], [7, 3]])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8])
def test_equals_definition(kernels, dtype, dims, rows):
    options = {"margin": 0.1, "ties": "reference", "min_gap": 0.05} if rows % 2 else {}
    hold(*drawn(rows, 10, dtype=dtype), dims, **options)


@pytest.mark.parametrize("weights", list(itertools.product([0.0, 3.0], repeat=3)))
def test_every_choice_of_terms(kernels, weights):
    student, teachers = drawn(6, 20, 7, 13)
    found = hold(student, teachers, [16, 5], weights)
    alone = distill_loss(student.detach(), teachers, dims=[16, 5], weights=weights)
    assert all(torch.equal(x, y) for x, y in zip(found[:4], alone, strict=True))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 5),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    data=st.data(),
)
def test_any_shape(dtype, rows, parts, data):
    width = sum(parts)
    dims = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=4, unique=True).map(sorted))[::-1]
    hold(*drawn(rows, width, *parts, dtype=dtype), dims)


def test_several_tiles_of_either_size(kernels, monkeypatch):
    student, teachers = drawn(70, 24, 20, 4)
    for multiprocessors, tile in ((0, 64), (50, 32)):
        monkeypatch.setattr(kernels, "multiprocessors", lambda x, count=multiprocessors: count)
        assert kernels._tile(student) == tile
        hold(student, teachers, [24, 8], (10.0, 200.0, 0.0))


def test_wide_rows():
    hold(*drawn(3, 1200), [1200, 1025, 16], (1.0, 1.0, 0.0))


# (rows of a block, where there is one): all; whole tiles of 32; fewer than a tile, without symmetry.
@pytest.mark.parametrize("rows", [70, 64, 32, 20])
def test_blocks_of_rows(kernels, monkeypatch, rows):
    student, teachers = drawn(70, 12, 5, 8)
    expected = exact(student, teachers, [10, 3], (0.0, 1.0, 0.0))
    monkeypatch.setattr(kernels, "BLOCK", 4 * 3 * 70 * rows)
    with LargestTensor() as seen:
        found = value_and_gradient(lambda s: similarity_loss(s, teachers, dims=[10, 3]), student)
    assert_near(found, (expected[2], expected[4]), torch.float32)
    assert seen.bytes <= kernels.BLOCK
    monkeypatch.setattr(kernels, "MOST_TILES", 1)
    with LargestTensor() as seen:
        alone = similarity_loss(student.detach(), teachers, dims=[10, 3])
    assert_near([alone], found[:1], torch.float32)
    assert seen.bytes <= 4 * 70 * 12


def test_gram_form():
    student, teachers = drawn(60, 6, 2, 4)
    for weights in ((0.0, 3.0, 0.0), (2.0, 3.0, 0.0)):
        hold(student, teachers, [5, 2], weights)
    hold(*drawn(60, 6, 2, 4, dtype=torch.float16), [6, 2], (2.0, 3.0, 0.0))


@pytest.mark.parametrize("weights", [JASPER, (10.0, 200.0, 0.0), (0.0, 0.0, 20.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("counts", [(3, 5), (1, 0, 5, 2)])
def test_shares_of_ranks_add_up(kernels, weights, counts):
    student, teachers = drawn(8, 6, 2, 4)
    student, targets = student.detach(), unit_targets(student, teachers)
    options = ([6, 2], weights, 0.015, False, 0.0, [True])
    ends = itertools.accumulate(counts)
    shares = [DISTILL(student[e - c : e], student, targets, e - c, *options) for c, e in zip(counts, ends)]
    sums = [sum(values) for values in list(zip(*shares))[:4]]
    whole = DISTILL(student, None, targets, 0, *options)
    assert_near((*sums, torch.cat([share[4] for share in shares])), whole, torch.float32)
    assert_near(whole, exact(student, teachers, [6, 2], weights), torch.float32)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_zero_and_tiny_rows(kernels, weights):
    student, teachers = drawn(5, 6)
    with torch.no_grad():
        student[1] = 0
        student[3] *= 1e-14
        student[4, :2] = 0
    found = value_and_gradient(lambda s: distill_loss(s, teachers, dims=[6, 2], weights=weights), student)
    assert (found[4][1] == 0).all()
    # Each row by itself: the tiny row's gradient is 1e12 times the others'.
    expected = exact(student, teachers, [6, 2], weights)
    for x, y in zip((*found[:4], *found[4]), (*expected[:4], *expected[4]), strict=True):
        assert_near([x], [y], torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 1.0)])
def test_nan_of_the_student_propagates(kernels, weights, bad):
    student, teachers = drawn(40, 5)
    with torch.no_grad():
        student[2, 1] = bad
    total, *_, grad = value_and_gradient(lambda s: distill_loss(s, teachers, weights=weights), student)
    assert total.isnan()
    assert grad[2].isnan().all()


def test_strides_do_not_matter(kernels):
    student, (teacher,) = drawn(6, 10)
    student, wide = student.detach(), torch.randn(6, 20)
    expected = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[10, 3]), student)
    wide[:, ::2] = student
    sliced = torch.cat([student, torch.full((6, 3), torch.nan)], 1)[:, :10]
    for strided in (student.T.contiguous().T, wide[:, ::2], sliced):
        targets = [unit_targets(student, teacher)[0].T.contiguous().T]
        found = DISTILL(strided, None, targets, 0, [10, 3], JASPER, 0.015, False, 0.0, [True])
        assert_near(found, expected, torch.float32)


def test_independent_heads(kernels):
    student, teachers = drawn(6, 4, 9, 2)
    hold(student, teachers, [4], (0.0, 200.0, 20.0))


@pytest.fixture
def launches(kernels, monkeypatch):
    return recorded_launches(monkeypatch, kernels)


def test_launches(launches):
    student, teachers = drawn(8, 12, 4, 8)
    distill_loss(student, teachers, dims=[12, 6, 2])
    assert launches == ["norms", "scores", "weights", "finish", "join"]
    launches.clear()
    similarity_loss(student, teachers, dims=[12, 6, 2])
    assert launches == ["norms", "scores", "weights", "finish", "join"]
    launches.clear()
    similarity_loss(student.detach(), teachers, dims=[12, 6, 2])
    assert launches == ["norms", "scores", "join"]
    launches.clear()
    distill_loss(student, teachers, weights=(1, 0, 0))
    assert launches == ["norms", "finish", "join"]
    launches.clear()
    alignment_loss(student, teachers[0].repeat(1, 3))
    assert launches == ["alignment", "join"]
    launches.clear()
    distill_loss(student, teachers, weights=(0, 0, 0))
    similarity_loss(student[:0], [t[:0] for t in teachers])
    assert launches == ["join", "join"]


@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(kernels, wanted):
    student, teachers = drawn(5, 6, 4, 2, dtype=torch.float16)
    targets = unit_targets(student, teachers)
    own = student.detach()[1:3].clone().requires_grad_(wanted)
    torch.library.opcheck(SIMILAR, (own, student.detach(), targets, 1, [6, 2], [wanted]))
    student = student.detach().requires_grad_(wanted)
    torch.library.opcheck(DISTILL, (student, None, targets, 0, [6, 2], JASPER, 0.015, False, 0.0, [wanted]))


def test_compiled_equals_eager(kernels):
    student, teachers = drawn(6, 7, 5, 2)

    def run(s):
        return distill_loss(s, teachers, dims=[7, 3]).total + alignment_loss(s, teachers[0].repeat(1, 2)[:, :7])

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = value_and_gradient(compiled, student), value_and_gradient(run, student)
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(kernels, dtype):
    student, teachers = drawn(9, 16, dtype=dtype)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return value_and_gradient(lambda s: distill_loss(s, teachers, dims=[16, 4]), student)

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False)))


def hold_alignment(student, teacher, kind, normalize):
    loss, grad = value_and_gradient(lambda s: alignment_loss(s, teacher, kind=kind, normalize=normalize), student)
    assert loss.dtype == torch.float32
    assert grad.dtype == student.dtype
    expected = value_and_gradient(
        lambda s: brute_alignment_loss(s, teacher.double(), kind, normalize and kind != "cosine"), student.double()
    )
    assert_near((loss, grad), expected, student.dtype)
    assert torch.equal(alignment_loss(student.detach(), teacher, kind=kind, normalize=normalize), loss)
    return grad


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (7, 13), (21, 384)])
def test_alignment_equals_definition(kind, normalize, dtype, rows, width):
    student, (teacher,) = drawn(rows, width, dtype=dtype)
    hold_alignment(student, teacher.to(dtype), kind, normalize)


@pytest.mark.parametrize("width", [1100, 8192, 20_000])
def test_alignment_of_wide_rows(width):
    for kind, normalize in (("l2sq", True), ("cosine", False)):
        student, (teacher,) = drawn(2, width)
        hold_alignment(student, teacher, kind, normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_alignment_where_the_formula_is_not_smooth(kind, normalize):
    student, (teacher,) = drawn(3, 6)
    scales = torch.tensor([[0.0], [1.0], [1e-14]])
    # Each row by itself: the tiny row's gradient is 1e12 times the others'.
    for row, target in zip(student.detach() * scales, teacher):
        grad = hold_alignment(row[None].requires_grad_(), target[None], kind, normalize)
        if (normalize or kind == "cosine") and not row.any():
            assert (grad == 0).all()
    same = value_and_gradient(lambda s: alignment_loss(s, teacher, kind=kind, normalize=normalize), teacher)
    assert all(x.isfinite().all() for x in same)
    if not normalize:
        assert (same[1].abs() < 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_reads_views_and_propagates_nan(kind):
    student, (teacher,) = drawn(5, 12)
    plain = hold_alignment(student, teacher, kind, True)
    views = [torch.cat([x.detach(), torch.full((5, 4), torch.nan)], 1)[:, :12] for x in (student, teacher)]
    assert torch.equal(hold_alignment(views[0].requires_grad_(), views[1], kind, True), plain)
    with torch.no_grad():
        student[2, 1] = torch.nan
    loss, grad = value_and_gradient(lambda s: alignment_loss(s, teacher, kind=kind), student)
    assert loss.isnan()
    assert grad[2].isnan().any()
    assert grad[:2].isfinite().all()


def test_alignment_through_a_head():
    student, (teacher,) = drawn(9, 6, 10)
    weight = torch.randn(10, 6, requires_grad=True)
    for kind in KINDS:
        loss = alignment_loss(student, teacher, kind=kind, normalize=True, weight=weight)
        exact = [x.detach().double().requires_grad_() for x in (student, weight)]
        expected = brute_alignment_loss(exact[0], teacher.double(), kind, True, exact[1])
        grads = [torch.autograd.grad(x, leaves) for x, leaves in ((loss, (student, weight)), (expected, exact))]
        assert_near((loss, *grads[0]), (expected, *grads[1]), torch.float32)
