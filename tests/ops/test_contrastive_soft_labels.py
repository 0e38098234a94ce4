"""soft_label_loss against its definition and torch's kl_div, shares of ranks, edge cases, and torch.compile."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import LargestTensor
from contrastive_cases import soft_label_arguments
from contrastive_cases import soft_label_batch as batch
from contrastive_hold import exactly, hold_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import contrastive, soft_label_loss
from leafkern.ops._core.native import library
from leafkern.ops.contrastive import autograd, native, reference
from leafkern.ops.contrastive.reference import brute_soft_label_loss

BACKENDS = ["native", "reference"] if library()[0] else ["reference"]
FORMS = [reference.blocked_soft_label_loss, native.soft_label_loss][: len(BACKENDS)]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", f"contrastive={request.param}")


def value_and_gradients(function, tensors, **options):
    loss = function(*tensors, **options)
    return loss, torch.autograd.grad(loss, tensors[:2])


def cosines(queries, candidates):
    q, c = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    return q @ c.T if candidates.ndim == 2 else torch.einsum("bd,bcd->bc", q, c)


@pytest.mark.parametrize("teacher_temperature", [None, 0.3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_definition(dtype, shared, teacher_temperature):
    tensors = batch(7, 5, shared=shared, dtype=dtype)
    tensors[2][1, 3] = tensors[2][4, :4] = -torch.inf
    options = {"teacher_temperature": teacher_temperature, "dims": [24, 9], "dim_weights": [1.0, 0.3]}
    hold_labels(*tensors, **options)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    shared=st.booleans(),
    rows=st.integers(3, 8),
    number=st.integers(3, 9),
    width=st.integers(8, 20),
    prefix=st.booleans(),
    excluded=st.booleans(),
    block=st.sampled_from([1, 300, 1 << 20]),
)
def test_any_shape(dtype, shared, rows, number, width, prefix, excluded, block):
    tensors = batch(rows, number, shared=shared, width=width, dtype=dtype)
    if excluded:
        tensors[2][rows // 2, 0] = -torch.inf
    options = {"temperature": 0.2, "teacher_temperature": 0.1, "dims": [width, width // 2] if prefix else None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.BLOCK_BYTES, "cpu", block)
        hold_labels(*tensors, **options)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "number"), [(1, 1), (1, 2), (2, 1), (2, 2), (5, 1), (1, 6)])
def test_small_batches(rows, number, shared):
    """Teacher and student may nearly agree here: errors relative to the logits, of which the loss is a difference."""
    tensors = batch(rows, number, shared=shared)
    loss, grads = value_and_gradients(soft_label_loss, tensors)
    expected, exact = value_and_gradients(brute_soft_label_loss, exactly(tensors))
    assert abs(loss - expected) <= 1e-14 / 0.05
    for mine, right in zip(grads, exact, strict=True):
        assert (mine - right).norm() <= 1e-13 / 0.05**2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.001])
def test_equals_kl_div(shared, temperature):
    tensors = batch(6, 4, shared=shared)
    loss, grads = value_and_gradients(soft_label_loss, tensors, temperature=temperature)
    queries, candidates, scores = exactly(tensors)
    student = (cosines(queries, candidates) / temperature).log_softmax(1)
    teacher = (scores / temperature).log_softmax(1)
    expected = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    assert abs(loss - expected) <= 1e-13 / temperature
    for mine, right in zip(grads, torch.autograd.grad(expected, (queries, candidates)), strict=True):
        assert (mine - right).norm() <= 1e-12 / temperature


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_overflow_at_a_tiny_temperature(dtype, shared):
    tensors = batch(6, 4, shared=shared, dtype=dtype)
    loss, grads = value_and_gradients(soft_label_loss, tensors, temperature=0.001)
    expected = brute_soft_label_loss(*exactly(tensors), temperature=0.001)
    assert all(grad.isfinite().all() for grad in grads)
    assert abs(loss - expected) <= 40 * torch.finfo(dtype).eps / 0.001


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_student_that_equals_its_teacher_has_loss_0_and_gradient_0(dtype, shared):
    queries, candidates, _ = batch(6, 5, shared=shared, dtype=dtype)
    scores = cosines(queries.detach(), candidates.detach())
    epsilon = torch.finfo(dtype).eps
    for options in ({}, {"temperature": 0.02}, {"temperature": 0.5, "dims": [24], "dim_weights": [3.0]}):
        loss, grads = value_and_gradients(soft_label_loss, (queries, candidates, scores), **options)
        temperature = options.get("temperature", 0.05)
        assert abs(loss) <= 10 * epsilon / temperature
        assert all(grad.norm() <= 10 * epsilon / temperature**2 for grad in grads)
        # The same scores for other candidates are another distribution.
        assert soft_label_loss(queries, candidates, scores.flip(1), **options) > 1e-3


def test_only_differences_of_teacher_scores_count():
    queries, candidates, scores = batch(5, 4, shared=True)
    shifted = scores + torch.randn(5, 1, dtype=torch.float64)
    torch.testing.assert_close(
        soft_label_loss(queries, candidates, shifted), soft_label_loss(queries, candidates, scores)
    )


def test_one_hot_teacher_is_cross_entropy():
    queries, candidates, scores = batch(5, 4, shared=False)
    target = torch.randint(4, (5,))
    scores = torch.full_like(scores, -torch.inf).scatter(1, target[:, None], 3.0)
    loss, grads = value_and_gradients(soft_label_loss, (queries, candidates, scores))
    q, c = exactly((queries, candidates))
    expected = F.cross_entropy(cosines(q, c) / 0.05, target)
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(grads, torch.autograd.grad(expected, (q, c)), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared):
    queries, candidates, scores = batch(4, 3, shared=shared, width=5)
    scores[2, 1] = -torch.inf

    def loss(queries, candidates):
        return soft_label_loss(queries, candidates, scores, temperature=0.3, dims=[5, 3], dim_weights=[1.0, 2.0])

    assert torch.autograd.gradcheck(loss, (queries, candidates))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "number"), [(0, 3), (0, 0), (4, 0), (1, 1), (3, 1)])
def test_nothing_to_rank_gives_0(rows, number, shared):
    tensors = batch(rows, number, shared=shared)
    loss, grads = value_and_gradients(soft_label_loss, tensors, dims=[24, 3])
    assert loss.item() == 0
    for x, grad in zip(tensors, grads):
        assert torch.equal(grad, torch.zeros_like(x))


def test_own_candidates_equal_shared_ones_repeated():
    queries, candidates, scores = batch(5, 4, shared=True)
    shared, (by_queries, by_candidates) = value_and_gradients(soft_label_loss, (queries, candidates, scores))
    repeated = candidates.detach().repeat(5, 1, 1).requires_grad_()
    own, (by_same_queries, by_repeated) = value_and_gradients(soft_label_loss, (queries, repeated, scores))
    torch.testing.assert_close(own, shared)
    torch.testing.assert_close(by_same_queries, by_queries)
    torch.testing.assert_close(by_repeated.sum(0), by_candidates)


@pytest.mark.parametrize("shared", [False, True])
def test_prefixes_equal_slicing_by_hand(shared):
    queries, candidates, scores = batch(5, 4, shared=shared)
    given = (queries, candidates)

    def sliced(width):
        return soft_label_loss(queries[:, :width], candidates[..., :width], scores)

    both = soft_label_loss(queries, candidates, scores, dims=[24, 7, 2], dim_weights=[1.0, 0.3, 0.2])
    by_hand = sliced(24) + 0.3 * sliced(7) + 0.2 * sliced(2)
    torch.testing.assert_close(both, by_hand)
    for mine, right in zip(torch.autograd.grad(both, given), torch.autograd.grad(by_hand, given), strict=True):
        torch.testing.assert_close(mine, right)
    equal = soft_label_loss(queries, candidates, scores, dims=[24, 7])
    torch.testing.assert_close(equal, (sliced(24) + sliced(7)) / 2)


@pytest.mark.parametrize("shared", [False, True])
def test_order_does_not_matter(shared):
    queries, candidates, scores = batch(6, 5, shared=shared)
    rows, columns = torch.randperm(6), torch.randperm(5)
    shuffled = candidates[columns] if shared else candidates[rows][:, columns]
    again = soft_label_loss(queries[rows], shuffled, scores[rows][:, columns])
    torch.testing.assert_close(again, soft_label_loss(queries, candidates, scores))


@pytest.mark.parametrize("cuts", [[0, 3, 8], [0, 0, 1, 8, 8], [0, 5, 6, 8]])
@pytest.mark.parametrize("shared", [False, True])
def test_shares_of_ranks_add_up(cuts, shared):
    """What each rank computes: its own rows against the shared candidates of all, or against its own."""
    queries, candidates, scores = tensors = [x.detach() for x in batch(8, 5, shared=shared)]
    options = {"dims": [24, 6], "dim_weights": [0.6, 0.5]}
    whole = torch.ops.leafkern.soft_label_loss(*soft_label_arguments(tensors, 8, **options))
    shares = []
    for start, end in itertools.pairwise(cuts):
        mine = (queries[start:end], candidates if shared else candidates[start:end], scores[start:end])
        shares.append(torch.ops.leafkern.soft_label_loss(*soft_label_arguments(mine, 8, **options)))
    loss, by_queries, by_candidates = zip(*shares)
    torch.testing.assert_close(sum(loss), whole[0])
    torch.testing.assert_close(torch.cat(by_queries), whole[1])
    torch.testing.assert_close(sum(by_candidates) if shared else torch.cat(by_candidates), whole[2])


@pytest.mark.parametrize("shared", [False, True])
def test_gather_with_one_rank_changes_nothing(shared):
    tensors = batch(5, 4, shared=shared)
    assert torch.equal(soft_label_loss(*tensors), soft_label_loss(*tensors, gather="ranks"))


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_do_not_show(monkeypatch, shared):
    tensors = batch(11, 5, shared=shared)
    whole, grads = value_and_gradients(soft_label_loss, tensors, dims=[24, 7])
    for size in (1, 200, 3000):
        monkeypatch.setitem(reference.BLOCK_BYTES, "cpu", size)
        loss, parts = value_and_gradients(soft_label_loss, tensors, dims=[24, 7])
        torch.testing.assert_close(loss, whole)
        for part, grad in zip(parts, grads, strict=True):
            torch.testing.assert_close(part, grad)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_bounded_by_the_block(monkeypatch, form):
    monkeypatch.setitem(reference.BLOCK_BYTES, "cpu", 20_000)
    tensors = [x.detach() for x in batch(128, 500, shared=True, width=8, dtype=torch.float32)]
    with LargestTensor() as largest:
        form(*soft_label_arguments(tensors, 128))
    # All similarities would take 250 KiB; the candidates take 16 kB.
    assert largest.bytes <= 20_000


@pytest.mark.parametrize("shared", [False, True])
def test_empty_memory_is_always_written(poisoned, shared):
    loss, grads = value_and_gradients(soft_label_loss, batch(5, 4, shared=shared), dims=[20, 3])
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_arguments_cost_no_gradient(frozen, shared):
    tensors = batch(5, 4, shared=shared)
    _, expected = value_and_gradients(soft_label_loss, tensors)
    tensors[frozen].requires_grad_(False)
    soft_label_loss(*tensors).backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, expected[1 - frozen])
    needs = [place != frozen for place in range(2)]
    output = torch.ops.leafkern.soft_label_loss(*soft_label_arguments([x.detach() for x in tensors], 5, needs))
    assert [out.shape for out in output[1:]] == [x.shape if need else (0,) for x, need in zip(tensors, needs)]


def test_teacher_gets_no_gradient():
    queries, candidates, scores = batch(4, 3, shared=True)
    scores.requires_grad_()
    soft_label_loss(queries, candidates, scores).backward()
    assert scores.grad is None
    assert not soft_label_loss(queries.detach(), candidates.detach(), scores).requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_zero_rows_have_cosine_0_and_gradient_0(shared):
    tensors, zero = batch(5, 4, shared=shared), 0 if shared else (1, 0)
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][zero] = 0
    loss, grads = value_and_gradients(soft_label_loss, tensors)
    expected, exact = value_and_gradients(brute_soft_label_loss, exactly(tensors))
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, right)
    assert not grads[0][2].any()
    assert not grads[1][zero].any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_of_the_student_propagates(place, shared):
    tensors = batch(4, 3, shared=shared)
    with torch.no_grad():
        tensors[place].view(-1)[3] = torch.nan
    # Also where the teacher gives that candidate no probability.
    tensors[2][:, 0] = -torch.inf
    assert soft_label_loss(*tensors).isnan()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([torch.nan, 0.0, 1.0], r"teacher_scores: row 2 holds NaN or \+infinity \(1 such rows\)"),
        ([torch.inf, 0.0, 1.0], r"teacher_scores: row 2 holds NaN or \+infinity"),
        ([-torch.inf] * 3, r"teacher_scores: row 2 has only -infinity \(1 such rows\)"),
    ],
)
def test_bad_teacher_row_is_named(monkeypatch, row, message):
    queries, candidates, scores = batch(4, 3, shared=True)
    scores[2] = torch.tensor(row)
    with pytest.raises(InputError, match=message):
        soft_label_loss(queries, candidates, scores)
    # Where values are not looked at, as on CUDA without LEAFKERN_CHECK=1.
    monkeypatch.setattr(contrastive, "values_checked", lambda x: False)
    assert soft_label_loss(queries, candidates, scores).isnan()


def test_mixed_dtypes_and_strides():
    queries, candidates, scores = batch(5, 4, shared=False, dtype=torch.float32)
    half = candidates.detach().to(torch.float16).mT.contiguous().mT.requires_grad_()
    scores = scores.to(torch.float64)
    loss, grads = value_and_gradients(soft_label_loss, (queries, half, scores))
    assert [loss.dtype, grads[0].dtype, grads[1].dtype] == [torch.float64, torch.float32, torch.float16]
    torch.testing.assert_close(loss, brute_soft_label_loss(queries.double(), half.double(), scores))


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_changes_nothing(shared):
    tensors = batch(6, 4, shared=shared, dtype=torch.float32)
    expected, right = value_and_gradients(soft_label_loss, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = value_and_gradients(soft_label_loss, tensors)
    assert torch.equal(loss, expected)
    assert all(torch.equal(*pair) for pair in zip(grads, right, strict=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype, needs, shared):
    tensors = batch(5, 4, shared=shared, dtype=dtype)
    for x, need in zip(tensors, needs):
        x.requires_grad_(need)
    arguments = soft_label_arguments(tensors, 9, needs, [24, 5], [1.0, 0.3])
    results = torch.library.opcheck(torch.ops.leafkern.soft_label_loss.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_equals_eager(shared):
    tensors = batch(6, 4, shared=shared, dtype=torch.float32)
    compiled = torch.compile(
        lambda *t: soft_label_loss(*t, dims=[24, 8], teacher_temperature=0.1), fullgraph=True, backend="aot_eager"
    )
    loss, grads = value_and_gradients(compiled, tensors)
    eager, right = value_and_gradients(soft_label_loss, tensors, dims=[24, 8], teacher_temperature=0.1)
    assert torch.equal(loss, eager)
    assert all(torch.equal(*pair) for pair in zip(grads, right, strict=True))


GOOD = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GOOD[0], GOOD, GOOD), {}, "queries: expected 2 dimensions"),
        ((GOOD, GOOD.int(), GOOD), {}, "candidates: expected a floating-point tensor"),
        ((GOOD, GOOD[0], GOOD), {}, r"candidates: expected \(B, C, D\), each query's own, or \(N, D\), shared; got"),
        ((GOOD, GOOD[:, :3], GOOD), {}, "queries, candidates: widths 4 and 3"),
        ((GOOD, torch.ones(2, 5, 4), torch.ones(3, 5)), {}, "queries, candidates: shapes"),
        ((GOOD, GOOD, torch.ones(3)), {}, "teacher_scores: expected 2 dimensions"),
        ((GOOD, GOOD, torch.ones(3, 3).int()), {}, "teacher_scores: expected a floating-point tensor"),
        ((GOOD, GOOD, GOOD), {}, r"teacher_scores: shape \(3, 4\); expected one score for .* \(3, 3\)"),
        ((GOOD, torch.ones(3, 5, 4), GOOD), {}, r"teacher_scores: shape \(3, 4\); .* \(3, 5\)"),
        ((GOOD, GOOD.to("meta"), GOOD), {}, "queries on cpu, candidates on meta"),
        ((GOOD, GOOD, torch.ones(3, 3)), {"temperature": -1}, "temperature: expected a finite number above 0"),
        ((GOOD, GOOD, torch.ones(3, 3)), {"teacher_temperature": 0.0}, "teacher_temperature: expected a finite number"),
        ((GOOD, GOOD, torch.ones(3, 3)), {"dims": [4, 4]}, "dims: expected descending, unique widths"),
        ((GOOD, GOOD, torch.ones(3, 3)), {"dim_weights": [1, 2]}, "dim_weights: expected 1 finite numbers"),
        ((GOOD, GOOD, torch.ones(3, 3)), {"gather": "all"}, "gather: unknown name 'all'"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message):
        soft_label_loss(*arguments, **options)


def test_the_op_says_when_a_wanted_gradient_was_not_asked_for():
    tensors = batch(3, 4, shared=True)
    loss = autograd.soft_label_loss(*soft_label_arguments(tensors, 3, (True, False)))[0]
    with pytest.raises(RuntimeError, match="soft_label_loss: called with needs=False"):
        loss.backward()
