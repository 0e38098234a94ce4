"""relative_similarity_loss against its definition, over scores formed once and end to end; memory; torch.compile.

Kernels and brute force get the same scores: two summation orders of a product flip near ties. Ties from end to end come
from rows whose products are exact.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relative_cases import CASES, MODES, any_scores, assert_same, brute_with_gradient, coarse, noise, scores_of
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import relative_similarity_loss
from leafkern.ops._core.native import library
from leafkern.ops.relative import TIES, native
from leafkern.ops.relative.autograd import relative_scores
from leafkern.ops.relative.reference import blocked_relative, brute_relative

needs_native = pytest.mark.skipif(library()[0] is None, reason="leafkern._C is not built")


# Given scores


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [2, 3, 4, 5, 9, 21])
def test_blocked_equals_brute(case, batch):
    student, teacher = scores_of(case, batch)
    for (reference_ties, min_gap), margin in itertools.product(MODES, [0.0, 0.015, 0.5]):
        settings = (margin, reference_ties, min_gap)
        loss, counts = blocked_relative(student, teacher, *settings)
        expected, expected_counts = brute_with_gradient(student, teacher, *settings)
        assert abs(loss - expected) <= 1e-9 * abs(expected) + 1e-15, settings
        assert torch.equal(counts, expected_counts), settings


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_native_equals_brute(case, dtype, isa):
    for batch in (3, 4, 5, 11, 26):
        student, teacher = scores_of(case, batch, dtype)
        for (reference_ties, min_gap), margin in itertools.product(MODES, [0.0, 0.015, 0.5]):
            settings = (margin, reference_ties, min_gap)
            loss, gradient = native.relative_scores(student[None], teacher, *settings, True)
            assert loss.dtype == gradient.dtype == dtype
            expected = brute_with_gradient(student, teacher, *settings)
            assert_same((loss[0], gradient[0]), expected, dtype, (batch, settings))


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_native_equals_brute_of_many_pairs(case, mode):
    student, teacher = scores_of(case, 60, torch.float32)
    loss, gradient = native.relative_scores(student[None], teacher, 0.015, *mode, True)
    assert_same((loss[0], gradient[0]), brute_with_gradient(student, teacher, 0.015, *mode), torch.float32, mode)


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_threads_gives_the_same(case, isa):
    student, teacher = scores_of(case, 420)
    for mode in MODES if case in ("random", "tied", "constant_teacher") else MODES[:1]:
        first = native.relative_scores(student[None], teacher, 0.015, *mode, True, threads=1)
        for threads in (2, 3, 4):
            again = native.relative_scores(student[None], teacher, 0.015, *mode, True, threads=threads)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])


@needs_native
@pytest.mark.parametrize(("case", "mode"), [*((case, MODES[0]) for case in CASES), *(("tied", mode) for mode in MODES)])
def test_native_equals_blocked(case, mode):
    student, teacher = scores_of(case, 300)
    loss, gradient = native.relative_scores(student[None], teacher, 0.015, *mode, True, threads=3)
    expected = blocked_relative(student, teacher, 0.015, *mode)
    assert_same((loss[0], gradient[0]), expected, torch.float64, (case, mode))


def counted(student, teacher, margin, min_gap, picked):
    """Violations of a few pairs, low side less high side, straight from the definition (ties skipped)."""
    found = []
    for p in picked:
        above = (teacher > teacher[p]) & (teacher - teacher[p] > min_gap)
        below = (teacher < teacher[p]) & (teacher[p] - teacher > min_gap)
        low = above & (margin - (student - student[p]) > 0)
        high = below & (margin - (student[p] - student) > 0)
        found.append(int(low.sum() - high.sum()))
    return torch.tensor(found)


@needs_native
@pytest.mark.parametrize(
    ("batch", "min_gap"),
    [(700, 0.0), (700, 0.1), (2100, 0.0), pytest.param(4200, 0.0, marks=pytest.mark.slow)],
)
def test_picked_pairs_of_large_batches(batch, min_gap):
    student, teacher = noise(batch, torch.float32), noise(batch, torch.float32)
    # Some hundred values: ties of many.
    student[:, : batch // 3], teacher[:, : batch // 3] = (
        coarse(student)[:, : batch // 3],
        coarse(teacher)[:, : batch // 3],
    )
    _, gradient = native.relative_scores(student[None], teacher, 0.015, False, min_gap, True, threads=2)
    rows, columns = torch.triu_indices(batch, batch, 1)
    picked = torch.randint(len(rows), (60,))
    pairs = len(rows)
    counts = gradient[0][rows, columns].double() * (pairs * (pairs - 1) // 2)
    expected = counted(student[rows, columns].double(), teacher[rows, columns].double(), 0.015, min_gap, picked)
    # float32 rounds the quotient.
    torch.testing.assert_close(counts[picked], expected.double(), rtol=1e-6, atol=1e-3)
    assert abs(counts.sum()) <= 1e-6 * counts.abs().sum()


@needs_native
def test_widths_share_nothing_but_the_teacher():
    student, teacher = torch.stack([noise(40) for _ in range(4)]), noise(40)
    together = native.relative_scores(student, teacher, 0.015, False, 0.0, True)
    for k, scores in enumerate(student):
        alone = native.relative_scores(scores[None], teacher, 0.015, False, 0.0, True)
        assert torch.equal(together[0][k], alone[0][0])
        assert torch.equal(together[1][k], alone[1][0])
    without, empty = native.relative_scores(student, teacher, 0.015, False, 0.0, False)
    assert torch.equal(without, together[0])
    assert empty.shape == (0,)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [3, 200])
def test_scores_that_are_not_finite(backend, bad, batch, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", f"relative={backend}")
    student, teacher = torch.stack([noise(batch), noise(batch)]), noise(batch)
    student[0].fill_diagonal_(torch.nan)
    student[1, 0, 1] = bad
    teacher[2, 0] = torch.nan
    loss, gradient = relative_scores(student, teacher, 0.015, False, 0.0, True)
    assert loss[0].isfinite()
    assert gradient[0].isfinite().all()
    assert loss[1].isnan()
    assert gradient[1].triu(1).isnan().sum() == batch * (batch - 1) // 2
    assert (gradient.tril() == 0).all()
    teacher[0, 2] = bad
    loss, gradient = relative_scores(student, teacher, 0.015, True, 0.0, True)
    assert loss.isnan().all()
    assert relative_scores(student, teacher, 0.015, False, 0.1, False)[0].isnan().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_only_upper_triangles_are_read_and_strides_are_free(backend, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", f"relative={backend}")
    student, teacher = noise(20), noise(20)
    expected = relative_scores(student[None], teacher, 0.015, False, 0.0, True)
    found = relative_scores(student.triu(1).T.contiguous().T[None], teacher.triu(1), 0.015, False, 0.0, True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_scores(data):
    student, teacher, margin, mode = any_scores(data, 9)
    expected = brute_with_gradient(student, teacher, margin, *mode)
    for dtype in (torch.float32, torch.float64):
        loss, gradient = relative_scores(student[None].to(dtype), teacher.to(dtype), margin, *mode, True)
        assert_same((loss[0], gradient[0]), expected, dtype, (margin, mode))


# From end to end


def pair(rows, width, dtype=torch.float64, teacher_width=None):
    teacher = torch.randn(rows, teacher_width or width, dtype=dtype)
    student = torch.randn(rows, width, dtype=dtype)
    student[:, : min(width, teacher.shape[1])] += teacher[:, :width]
    return student.requires_grad_(), teacher


def definition(student, teacher, dims=None, margin=0.015, ties="skip", min_gap=0.0):
    t = torch.nn.functional.normalize(teacher.double(), dim=1)
    losses = []
    for dim in dims or [student.shape[1]]:
        s = torch.nn.functional.normalize(student[:, :dim], dim=1)
        losses.append(brute_relative(s @ s.T, t @ t.T, margin, ties == "reference", min_gap))
    return torch.stack(losses).mean()


def with_gradient(loss, student):
    return loss, torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, {"dims": [24, 10, 3]}, {"min_gap": 0.1, "margin": 0.2, "ties": "reference"}])
def test_equals_definition(dtype, options, backend, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", f"relative={backend}")
    # Seeded: now and then a difference lies so near the margin that float32 and float64 disagree.
    torch.manual_seed(0)
    student, teacher = pair(14, 24, dtype, teacher_width=31)
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher, **options), student)
    exact = student.detach().double().requires_grad_()
    expected, expected_gradient = with_gradient(definition(exact, teacher, **options), exact)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert abs(loss.double() - expected) <= TOLERANCE[dtype] * expected
    assert (gradient.double() - expected_gradient).norm() <= TOLERANCE[dtype] * expected_gradient.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ties", TIES)
def test_exact_ties(dtype, ties):
    # Rows of ±1 have the norms 4 and 2 at widths 16 and 4: all products are exact.
    student, teacher = (torch.randn(20, 16).sign().to(dtype) for _ in range(2))
    teacher[3] = teacher[7]
    student[5] = student[9]
    student.requires_grad_()
    options = {"dims": [16, 4], "ties": ties, "margin": 0.25}
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher, **options), student)
    exact = student.detach().double().requires_grad_()
    expected, expected_gradient = with_gradient(definition(exact, teacher, **options), exact)
    assert abs(loss.double() - expected) <= TOLERANCE[dtype] * expected
    assert (gradient.double() - expected_gradient).norm() <= TOLERANCE[dtype] * expected_gradient.norm()


def test_one_hot_rows():
    student, teacher = torch.eye(6)[[0, 0, 1, 2, 2, 3]], torch.eye(6)[[0, 1, 1, 2, 3, 3]]
    for ties in TIES:
        found = relative_similarity_loss(student, teacher, ties=ties, margin=0.5)
        assert abs(found - definition(student.double(), teacher, ties=ties, margin=0.5)) < 1e-6


@pytest.mark.parametrize("ties", TIES)
def test_gradcheck(ties):
    torch.manual_seed(1)
    student, teacher = pair(6, 5)
    dims = [5, 3]
    # Away from kinks: no two scores lie a margin apart, to well more than gradcheck's step.
    for dim in dims:
        s = torch.nn.functional.normalize(student.detach()[:, :dim], dim=1)
        scores = (s @ s.T)[tuple(torch.triu_indices(6, 6, 1))]
        assert (0.2 - (scores[:, None] - scores)).abs().min() > 1e-5
    assert torch.autograd.gradcheck(
        lambda s: relative_similarity_loss(s, teacher, dims=dims, margin=0.2, ties=ties), student
    )


def test_permutation_of_the_batch():
    student, teacher = pair(40, 16)
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher), student)
    order = torch.randperm(40)
    mixed = student.detach()[order].requires_grad_()
    again, mixed_gradient = with_gradient(relative_similarity_loss(mixed, teacher[order]), mixed)
    torch.testing.assert_close(again, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(mixed_gradient, gradient[order], rtol=1e-9, atol=1e-15)


def test_prefixes_equal_slicing_by_hand():
    student, teacher = pair(30, 16)
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher, dims=[12, 4]), student)
    parts = [relative_similarity_loss(student[:, :dim], teacher) for dim in (12, 4)]
    expected, expected_gradient = with_gradient(sum(parts) / 2, student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert (gradient[:, 12:] == 0).all()


def test_several_teachers_are_their_weighted_cosines():
    student, first = pair(25, 8)
    second = torch.randn(25, 5, dtype=torch.float64)
    units = [torch.nn.functional.normalize(t, dim=1) for t in (first, second)]
    joined = torch.cat([3**0.5 * units[0], units[1]], dim=1)
    found = relative_similarity_loss(student, [first, second], teacher_weights=[3, 1])
    torch.testing.assert_close(found, relative_similarity_loss(student, joined), rtol=1e-12, atol=0)


def test_student_that_equals_the_teacher():
    teacher = torch.randn(12, 6, dtype=torch.float64)
    # Without a margin nothing is out of order; with one, near scores are.
    assert relative_similarity_loss(teacher, teacher, margin=0) == 0
    assert relative_similarity_loss(teacher, teacher, margin=0.1) > 0


@pytest.mark.parametrize("batch", range(6))
def test_small_batches(batch):
    student, teacher = pair(batch, 4)
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher, dims=[4, 2]), student)
    assert gradient.shape == (batch, 4)
    if batch < 3:
        assert loss == 0
        assert (gradient == 0).all()
    else:
        torch.testing.assert_close(loss, definition(student, teacher, dims=[4, 2]))


def test_zero_row_and_row_of_nan():
    student, teacher = pair(8, 5)
    with torch.no_grad():
        student[2] = 0
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher), student)
    assert loss.isfinite()
    assert (gradient[2] == 0).all()
    assert gradient.isfinite().all()
    with torch.no_grad():
        student[4, 1] = torch.nan
    loss, gradient = with_gradient(relative_similarity_loss(student, teacher), student)
    assert loss.isnan()
    assert gradient.isnan().any()


def test_teacher_gets_no_gradient():
    student, teacher = pair(5, 4)
    teacher.requires_grad_()
    relative_similarity_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_bad_teacher_row_is_named(bad):
    student, teacher = pair(4, 5)
    teacher[3] = bad
    with pytest.raises(InputError, match="teacher: row 3"):
        relative_similarity_loss(student, teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": torch.zeros(2)}, "student: expected 2 dimensions"),
        ({"student": torch.zeros(4, 5, dtype=torch.int64)}, "student: expected a floating-point"),
        ({"teacher": torch.ones(3, 5)}, "4 and 3 rows"),
        ({"teacher": [torch.ones(4, 5)], "teacher_weights": [1, 2]}, "teacher_weights: expected 1 finite numbers"),
        ({"dims": [2, 5]}, "dims: expected descending"),
        ({"dims": [6]}, "dims: expected prefix widths from 1 to 5"),
        ({"margin": -0.1}, "margin: expected a finite number of at least 0"),
        ({"margin": float("nan")}, "margin: expected a finite number"),
        ({"margin": float("inf")}, "margin: expected a finite number"),
        ({"min_gap": -1}, "min_gap: expected a finite number of at least 0"),
        ({"ties": "skipp"}, "ties: unknown name 'skipp'; did you mean 'skip'"),
        ({"gather": "rank"}, "gather: unknown name 'rank'; did you mean 'ranks'"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {"student": torch.ones(4, 5), "teacher": torch.ones(4, 5), **changes}
    with pytest.raises(InputError, match=message):
        relative_similarity_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def op_arguments(student, target, everyone=None, start=0, needs=True):
    return (student, everyone, [target], start, [student.shape[1], 2], 0.015, False, 0.0, [needs])


def test_rows_of_all_ranks():
    student, teacher = pair(17, 6)
    student, target = student.detach(), torch.nn.functional.normalize(teacher, dim=1)
    op = torch.ops.leafkern.relative_similarity_loss
    loss, gradient = op(*op_arguments(student, target))
    bounds = [0, 5, 5, 16, 17]
    parts = [
        op(*op_arguments(student[start:end], target, everyone=student, start=start))
        for start, end in itertools.pairwise(bounds)
    ]
    # Every rank has the whole loss, and the gradient of its own rows.
    assert all(torch.equal(part, loss) for part, _ in parts)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient, rtol=1e-12, atol=1e-15)


def test_alone_among_ranks():
    student, teacher = pair(9, 4)
    alone = with_gradient(relative_similarity_loss(student, teacher, gather="ranks"), student)
    for found, expected in zip(alone, with_gradient(relative_similarity_loss(student, teacher), student)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("needs", [True, False])
def test_opcheck(needs):
    student, teacher = pair(7, 5, torch.float32)
    target = torch.nn.functional.normalize(teacher, dim=1)
    student = student.detach().requires_grad_(needs)
    torch.library.opcheck(
        torch.ops.leafkern.relative_similarity_loss.default, op_arguments(student, target, needs=needs)
    )
    everyone = torch.cat([student.detach(), torch.randn(2, 5)])
    target = torch.cat([target, torch.eye(5)[:2]])
    arguments = op_arguments(student, target, everyone=everyone, needs=needs)
    torch.library.opcheck(torch.ops.leafkern.relative_similarity_loss.default, arguments)


def test_compiled_equals_eager():
    student, teacher = pair(20, 7, torch.float32)

    def loss_of(s, t):
        return relative_similarity_loss(s * 2, t, dims=[7, 3], ties="reference", min_gap=0.01)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    eager, found = (with_gradient(function(student, teacher), student) for function in (loss_of, compiled))
    assert torch.equal(eager[0], found[0])
    assert torch.equal(eager[1], found[1])


def test_autocast_changes_nothing():
    student, teacher = pair(20, 16, torch.float32)
    expected = with_gradient(relative_similarity_loss(student, teacher), student)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradient(relative_similarity_loss(student, teacher), student)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# Memory


@needs_native
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("batch", [512, 1024, 2048, 4096, 8192])
def test_memory_per_pair(batch, is_double):
    pairs = batch * (batch - 1) / 2
    gradient = batch * batch * (8 if is_double else 4)
    for threads in (1, 2, 16, 64):
        workspace = library()[0].relative_workspace(is_double, batch, 1, threads)
        # A thread's own tables do not grow with the batch.
        assert workspace + gradient <= 64 * pairs + threads * 65536


MEMORY = """
import resource, torch
from leafkern.ops import relative_similarity_loss
student, teacher = torch.randn(4096, 64, requires_grad=True), torch.randn(4096, 64)
relative_similarity_loss(student[:64], teacher[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
relative_similarity_loss(student, teacher).backward()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@needs_native
@pytest.mark.slow
def test_peak_memory_at_4096():
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, check=True)
    pairs = 4096 * 4095 / 2
    # 64 bytes per pair, the two matrices of scores, and the gradient's sum with its transpose.
    assert int(done.stdout) <= (64 + 2 * 8 + 8) * pairs + (64 << 20)


def test_another_default_device_changes_nothing():
    student, teacher = torch.randn(6, 4), torch.randn(6, 3)
    expected = relative_similarity_loss(student, teacher)
    with torch.device("meta"):
        assert torch.equal(relative_similarity_loss(student, teacher), expected)
