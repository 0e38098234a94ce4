"""info_nce against its definition and cross-entropy, its masks, shares of ranks, edge cases, and torch.compile."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from compare import LargestTensor, relative
from contrastive_cases import MatrixWork, batch, info_nce_arguments, some_ids
from contrastive_hold import contrast as call
from contrastive_hold import exactly, hold_contrast
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

from leafkern.errors import BackendError, InputError
from leafkern.ops import info_nce
from leafkern.ops._core.native import library
from leafkern.ops.contrastive import autograd, native, reference
from leafkern.ops.contrastive.reference import brute_info_nce

FOCAL = [(0.0, True), (0.5, True), (0.5, False), (2.0, False)]


BACKENDS = ["native", "reference"] if library()[0] else ["reference"]
FORMS = [reference.blocked_info_nce, native.info_nce][: len(BACKENDS)]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", f"contrastive={request.param}")


def value_and_gradients(function, tensors, **options):
    given = [x for x in tensors if x is not None]
    loss = call(function, tensors, **options)
    return loss, torch.autograd.grad(loss, given)


@pytest.mark.parametrize(("gamma", "detach_focal"), FOCAL)
@pytest.mark.parametrize("masks", ["none", "ids", "margin", "both"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_definition(dtype, masks, gamma, detach_focal):
    options = {"temperature": 0.1, "gamma": gamma, "detach_focal": detach_focal}
    if masks in ("ids", "both"):
        options["ids"] = some_ids(7, 3)
    if masks in ("margin", "both"):
        options["fn_margin"] = 0.6
    hold_contrast(batch(7, dtype=dtype), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("number", "mixes"), [(None, None), (0, None), (3, None), (None, 2), (0, 0), (1, 1)])
def test_small_batches(rows, number, mixes, temperature):
    tensors = batch(rows, number=number, mixes=mixes)
    options = {"temperature": temperature, "gamma": 0.5}
    found, grads = value_and_gradients(info_nce, tensors, **options)
    expected, exact_grads = value_and_gradients(brute_info_nce, exactly(tensors), **options)
    # Rounding of the cosines, magnified by the temperature.
    assert abs(found - expected) <= 1e-14 / temperature
    for mine, exact in zip(grads, exact_grads, strict=True):
        assert mine.shape == exact.shape
        assert (mine - exact).norm() <= 1e-12 / temperature


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.integers(2, 9),
    width=st.integers(8, 20),
    number=st.sampled_from([None, 0, 1, 4]),
    mixes=st.sampled_from([None, 0, 1, 3]),
    gamma=st.sampled_from([0.0, 0.5, 1.5]),
    detach_focal=st.booleans(),
    kinds=st.sampled_from([None, 2, 20]),
    prefix=st.booleans(),
    block=st.sampled_from([1, 300, 1 << 20]),
)
def test_any_shape(dtype, rows, width, number, mixes, gamma, detach_focal, kinds, prefix, block):
    options = {"temperature": 0.3, "gamma": gamma, "detach_focal": detach_focal}
    options["ids"] = None if kinds is None else some_ids(rows, number, kinds)
    if prefix:
        options |= {"dims": [width, width // 2], "dim_weights": [0.7, 0.4]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.BLOCK_BYTES, "cpu", block)
        hold_contrast(batch(rows, width, number, mixes, dtype), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_focal_weight_it_is_cross_entropy(dtype, temperature):
    queries, positives, negatives, _ = batch(6, mixes=None, dtype=dtype)
    found = info_nce(queries, positives, negatives, temperature=temperature)
    grads = torch.autograd.grad(found, (queries, positives, negatives))
    exact = exactly((queries, positives, negatives))
    columns = torch.cat([exact[1], exact[2].flatten(0, 1)])
    logits = F.normalize(exact[0], dim=1) @ F.normalize(columns, dim=1).T / temperature
    expected = F.cross_entropy(logits, torch.arange(6))
    epsilon = torch.finfo(dtype).eps
    # A rounding of the cosines is magnified by the temperature; nothing else may be lost, however large the logits.
    assert abs(found - expected) <= 4 * epsilon / temperature
    for mine, right in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert (mine - right).norm() <= 20 * epsilon / temperature * (1 + right.norm())


def one_hot_pair(gap, temperature, dtype):
    """One query whose columns have exact cosines: the log odds against the positive are gap = +-1 / temperature."""
    first, second = torch.eye(4, dtype=dtype)[:2]
    near, far = (first, second) if gap > 0 else (second, first)
    assert abs(gap) == 1 / temperature
    return [x.clone().requires_grad_() for x in (first[None], far[None], near[None, None])]


@pytest.mark.parametrize(("gamma", "detach_focal"), [*FOCAL[:3], (1.0, False), (1.0, True)])
@pytest.mark.parametrize("gap", [-32.0, -16.0, -4.0, 4.0, 16.0, 64.0, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_focal_weight_where_p_is_nearly_0_or_1(dtype, gap, gamma, detach_focal):
    queries, positives, negatives = one_hot_pair(gap, 1 / abs(gap), dtype)
    options = {"temperature": 1 / abs(gap), "gamma": gamma, "detach_focal": detach_focal}
    loss = info_nce(queries, positives, negatives, **options)
    loss.backward()
    # 1 - p = 1 / (1 + exp(-gap)), -log p = log(1 + exp(gap)).
    surprise = gap + math.log1p(math.exp(-gap)) if gap > 0 else math.log1p(math.exp(gap))
    rest = 1 / (1 + math.exp(-gap))
    slope = rest ** (gamma + 1)
    if not detach_focal:
        slope += gamma * rest**gamma * (1 / (1 + math.exp(gap)) if gap < 700 else 0.0) * surprise
    tolerance = 8 * torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(rest**gamma * surprise, rel=tolerance)
    # The query is the first unit vector: what the loss asks of it along itself is projected out.
    asked = torch.zeros(4, dtype=torch.float64)
    asked[1] = slope * abs(gap) * (-1 if gap > 0 else 1)
    assert relative(queries.grad[0], asked) <= tolerance


def test_no_overflow_at_a_tiny_temperature():
    tensors = batch(8, dtype=torch.float32)
    for gamma, detach_focal in FOCAL:
        options = {"gamma": gamma, "detach_focal": detach_focal, "temperature": 0.001}
        loss, grads = value_and_gradients(info_nce, tensors, **options)
        expected, _ = value_and_gradients(brute_info_nce, exactly(tensors), **options)
        assert all(grad.isfinite().all() for grad in grads)
        assert abs(loss - expected) <= 20 * torch.finfo(torch.float32).eps / 0.001


@pytest.mark.parametrize(("gamma", "detach_focal"), FOCAL)
def test_query_without_other_columns_has_loss_0(gamma, detach_focal):
    tensors = batch(1, number=None, mixes=None)
    loss, grads = value_and_gradients(info_nce, tensors, gamma=gamma, detach_focal=detach_focal)
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize(("gamma", "detach_focal"), FOCAL)
def test_no_rows(gamma, detach_focal):
    tensors = batch(0)
    options = {"gamma": gamma, "detach_focal": detach_focal, "ids": some_ids(0, 3), "fn_margin": 0.1, "dims": [24, 4]}
    loss, grads = value_and_gradients(info_nce, tensors, **options)
    assert loss.item() == 0
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]


@pytest.mark.parametrize(("gamma", "detach_focal"), [(0.0, True), (0.7, False)])
@pytest.mark.parametrize("masks", [False, True])
def test_gradcheck(gamma, detach_focal, masks):
    tensors = batch(4, width=5, number=2)
    options = {"temperature": 0.3, "gamma": gamma, "detach_focal": detach_focal, "dims": [5, 3], "dim_weights": [1, 2]}
    if masks:
        options |= {"ids": some_ids(4, 2), "fn_margin": 0.4}

    def loss(*tensors):
        return call(info_nce, tensors, **options)

    assert torch.autograd.gradcheck(loss, tensors)


def by_hand(tensors, temperature, deleted):
    """Cross-entropy with `deleted[i]`, columns by number, removed from row i."""
    queries, positives, negatives, mixed = tensors
    columns = F.normalize(torch.cat([positives, negatives.flatten(0, 1)]), dim=1)
    total = 0
    for i, query in enumerate(F.normalize(queries, dim=1)):
        kept = [j for j in range(len(columns)) if j != i and j not in deleted.get(i, ())]
        every = torch.cat([columns[[i, *kept]], F.normalize(mixed[i], dim=1)])
        total = total + F.cross_entropy((every @ query)[None] / temperature, torch.zeros(1, dtype=torch.long))
    return total / len(queries)


def assert_same(found, expected, tensors):
    torch.testing.assert_close(found, expected)
    for mine, right in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(mine, right)


def test_ids_delete_columns():
    tensors = batch(4)
    # Positives are columns 0 to 3, the three negatives of query i columns 4 + 3 i and on. Queries 0 and 2 have the
    # same positive: each keeps its own.
    ids = torch.tensor([7, 8, 7, 9]), torch.tensor([[1, 8, 2], [3, 4, 5], [7, 6, 0], [7, 9, 9]])
    deleted = {0: [2, 10, 13], 1: [5], 2: [0, 10, 13], 3: [14, 15]}
    assert_same(call(info_nce, tensors, temperature=0.2, ids=ids), by_hand(tensors, 0.2, deleted), tensors)


def test_margin_deletes_columns():
    """Exact cosines: every entry is a multiple of 1/4, so that only what is strictly above the threshold goes."""
    eye = torch.eye(4, dtype=torch.float64)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    queries = torch.stack([eye[0], eye[1]])
    positives = torch.stack([half, eye[1]])
    negatives = torch.stack([torch.stack([eye[0], half]), torch.stack([-eye[1], eye[2]])])
    tensors = [x.clone().requires_grad_() for x in (queries, positives, negatives, torch.stack([eye[:1], eye[1:2]]))]
    # Cosines of query 0 with columns 0 to 5: 1/2, 0, 1, 1/2, 0, 0; of query 1: 1/2, 1, 0, 1/2, -1, 0.
    for margin, deleted in (
        (0.0, {0: [2], 1: []}),
        (0.25, {0: [2, 3], 1: []}),
        (0.5, {0: [2, 3], 1: []}),
        (0.75, {0: [1, 2, 3, 4, 5], 1: [0, 3]}),
        (10.0, {0: [1, 2, 3, 4, 5], 1: [0, 2, 3, 4, 5]}),
        (-0.75, {}),
    ):
        found = call(info_nce, tensors, temperature=0.2, fn_margin=margin)
        assert_same(found, by_hand(tensors, 0.2, deleted), tensors)


def test_margin_is_compared_at_the_width_of_the_term():
    # At width 4 the negative's cosine is below the positive's, at width 2 above.
    queries = torch.tensor([[1.0, 0, 1, 0]], requires_grad=True)
    positives = torch.tensor([[1.0, 1, 1, 0]])
    negatives = torch.tensor([[[1.0, 0, -1, 1]]])
    whole = info_nce(queries, positives, negatives, fn_margin=0.0)
    assert whole > 0
    both = info_nce(queries, positives, negatives, fn_margin=0.0, dims=[4, 2], dim_weights=[1.0, 1.0])
    torch.testing.assert_close(both, whole)


def test_margin_none_masks_nothing():
    tensors = batch(5)
    none = call(info_nce, tensors, temperature=0.2)
    # No cosine is above 1: a threshold of s+ + 2.5 masks nothing, one of s+ - 1 something.
    assert torch.equal(none, call(info_nce, tensors, temperature=0.2, fn_margin=-2.5))
    assert call(info_nce, tensors, temperature=0.2, fn_margin=1.0) < 0.99 * none


@pytest.mark.parametrize("options", [{"fn_margin": 2.5}, {"ids": (torch.full((4,), 5), torch.full((4, 3), 5))}])
def test_own_positive_and_mixed_are_never_masked(options):
    tensors = batch(4)
    queries, positives, _, mixed = tensors
    alone = [
        info_nce(queries[i : i + 1], positives[i : i + 1], mixed=mixed[i : i + 1], temperature=0.1) for i in range(4)
    ]
    found = call(info_nce, tensors, temperature=0.1, **options)
    torch.testing.assert_close(found, torch.stack(alone).mean())
    assert found > 0
    # Without `mixed` nothing but the own positive remains.
    assert info_nce(queries, positives, tensors[2], temperature=0.1, **options) == 0


def test_mixed_equals_a_negative_that_only_its_query_sees():
    tensors = batch(1, number=2, mixes=1)
    queries, positives, negatives, mixed = tensors
    together = info_nce(queries, positives, torch.cat([negatives, mixed], dim=1))
    torch.testing.assert_close(call(info_nce, tensors), together)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_ids_of_any_width(dtype):
    tensors, ids = batch(5), some_ids(5, 3)
    assert torch.equal(call(info_nce, tensors, ids=ids), call(info_nce, tensors, ids=(ids[0].to(dtype), ids[1])))


def test_prefixes_equal_slicing_by_hand():
    tensors = batch(6)
    options = {"gamma": 0.5, "detach_focal": False, "ids": some_ids(6, 3), "fn_margin": 0.3, "temperature": 0.05}
    dims, weights = [24, 9, 4], [1.0, 0.3, 0.2]

    def sliced(width):
        return call(info_nce, [x[..., :width] for x in tensors], **options)

    by_hand = sum(weight * sliced(width) for width, weight in zip(dims, weights))
    assert_same(call(info_nce, tensors, dims=dims, dim_weights=weights, **options), by_hand, tensors)
    equal = sum(sliced(width) for width in dims) / 3
    assert_same(call(info_nce, tensors, dims=dims, **options), equal, tensors)


def test_order_of_the_batch_does_not_matter():
    tensors, ids, order = batch(9), some_ids(9, 3, 6), torch.randperm(9)
    options = {"gamma": 0.5, "fn_margin": 0.2, "temperature": 0.05}
    loss, grads = value_and_gradients(info_nce, tensors, ids=ids, **options)
    shuffled = [x.detach()[order].requires_grad_() for x in tensors]
    again, other = value_and_gradients(info_nce, shuffled, ids=tuple(x[order] for x in ids), **options)
    torch.testing.assert_close(again, loss)
    for mine, right in zip(other, grads, strict=True):
        torch.testing.assert_close(mine, right[order])


@pytest.mark.parametrize("cuts", [[0, 3, 8], [0, 0, 1, 8, 8], [0, 5, 6, 8]])
def test_shares_of_ranks_add_up(cuts):
    """What each rank computes: its own rows, from `start` on, against the columns of all."""
    tensors, ids = [x.detach() for x in batch(8)], some_ids(8, 3)
    options = {"gamma": 0.5, "detach_focal": False, "fn_margin": 0.5, "dims": [24, 6], "dim_weights": [0.6, 0.5]}
    whole = torch.ops.leafkern.info_nce(*info_nce_arguments(tensors, ids, 0, options))
    queries, positives, negatives, mixed = tensors
    shares = []
    for start, end in itertools.pairwise(cuts):
        mine = (queries[start:end], positives, negatives, mixed[start:end])
        shares.append(torch.ops.leafkern.info_nce(*info_nce_arguments(mine, ids, start, options)))
    loss, by_queries, by_positives, by_negatives, by_mixed = zip(*shares)
    torch.testing.assert_close(sum(loss), whole[0])
    torch.testing.assert_close(torch.cat(by_queries), whole[1])
    torch.testing.assert_close(sum(by_positives), whole[2])
    torch.testing.assert_close(sum(by_negatives), whole[3])
    torch.testing.assert_close(torch.cat(by_mixed), whole[4])


def test_gather_with_one_rank_changes_nothing():
    tensors, ids = batch(5), some_ids(5, 3)
    alone = value_and_gradients(info_nce, tensors, ids=ids)
    gathered = value_and_gradients(info_nce, tensors, ids=ids, gather="ranks")
    assert torch.equal(alone[0], gathered[0])
    assert all(torch.equal(*pair) for pair in zip(alone[1], gathered[1], strict=True))


def test_blocks_do_not_show(monkeypatch):
    tensors, ids = batch(11), some_ids(11, 3)
    options = {"gamma": 0.5, "ids": ids, "fn_margin": 0.4, "dims": [24, 7], "temperature": 0.05}
    whole, grads = value_and_gradients(info_nce, tensors, **options)
    for size in (1, 2000, 5000):
        monkeypatch.setitem(reference.BLOCK_BYTES, "cpu", size)
        loss, parts = value_and_gradients(info_nce, tensors, **options)
        torch.testing.assert_close(loss, whole)
        for part, grad in zip(parts, grads, strict=True):
            torch.testing.assert_close(part, grad)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_bounded_by_the_block(monkeypatch, form):
    monkeypatch.setitem(reference.BLOCK_BYTES, "cpu", 30_000)
    tensors, ids = [x.detach() for x in batch(128, width=8, dtype=torch.float32)], some_ids(128, 3)
    with LargestTensor() as largest:
        form(*info_nce_arguments(tensors, ids, 0, {"gamma": 0.5, "fn_margin": 0.1}))
    # All similarities would take 256 KiB, their mask 64 KiB; the columns take 16 KiB.
    assert largest.bytes <= 30_000


def test_empty_memory_is_always_written(poisoned):
    tensors = batch(5)
    loss, grads = value_and_gradients(info_nce, tensors, gamma=0.5, ids=some_ids(5, 3), fn_margin=0.5)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_arguments_cost_no_gradient(frozen):
    tensors = batch(5)
    _, expected = value_and_gradients(info_nce, tensors, gamma=0.5, temperature=0.1)
    tensors[frozen].requires_grad_(False)
    call(info_nce, tensors, gamma=0.5, temperature=0.1).backward()
    for place, (x, grad) in enumerate(zip(tensors, expected, strict=True)):
        if place == frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, grad)
    needs = [place != frozen for place in range(4)]
    tensors = [x.detach() for x in tensors]
    output = torch.ops.leafkern.info_nce(*info_nce_arguments(tensors, (None, None), 0, {}, needs))
    assert [out.shape for out in output[1:]] == [x.shape if need else (0,) for x, need in zip(tensors, needs)]


@pytest.mark.parametrize(
    ("needs", "work"),
    [
        ((False, False, False), 4),
        ((True, False, False), 4 + 4),
        ((False, True, False), 4 + 1),
        ((False, False, True), 4 + 3),
        ((True, True, True), 4 + 4 + 4),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_matrix_products_are_those_of_the_wanted_gradients(form, needs, work):
    """In units of B·B·D: 4 for the similarities to positives and 3 negatives each."""
    tensors = [x if x is None else x.detach() for x in batch(16, mixes=None)]
    arguments = info_nce_arguments(tensors, (None, None), 0, {}, (*needs, False))
    with MatrixWork() as products:
        form(*arguments)
    assert products.total == work * 16 * 16 * 24


def test_without_gradient_only_the_value_is_computed():
    tensors = batch(5)
    with torch.no_grad():
        loss = call(info_nce, tensors)
    assert not loss.requires_grad
    assert torch.equal(loss, call(info_nce, tensors).detach())
    output = torch.ops.leafkern.info_nce(
        *info_nce_arguments([x.detach() for x in tensors], (None, None), 0, {}, [False] * 4)
    )
    assert [out.numel() for out in output] == [1, 0, 0, 0, 0]


def test_zero_rows_have_cosine_0_and_gradient_0():
    tensors = batch(5)
    with torch.no_grad():
        tensors[0][2] = 0
        tensors[1][4] = 0
        tensors[2][1, 0] = 0
        tensors[3][3, 1] = 0
    loss, grads = value_and_gradients(info_nce, tensors, gamma=0.5, temperature=0.1)
    expected, exact = value_and_gradients(brute_info_nce, exactly(tensors), gamma=0.5, temperature=0.1)
    torch.testing.assert_close(loss, expected)
    for mine, right in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, right)
    assert not any(row.any() for row in (grads[0][2], grads[1][4], grads[2][1, 0], grads[3][3, 1]))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_propagates(place, bad):
    tensors = batch(4)
    with torch.no_grad():
        tensors[place].view(-1)[3] = bad
    assert call(info_nce, tensors, gamma=0.5).isnan()


def test_duplicates_and_constants():
    """Queries that all equal their positives and each other: p = 1/B."""
    row = torch.randn(12, dtype=torch.float64)
    queries, positives = (row.repeat(6, 1).requires_grad_() for _ in range(2))
    loss = info_nce(queries, positives, gamma=1.0)
    torch.testing.assert_close(loss.item(), 5 / 6 * math.log(6))
    loss.backward()
    assert queries.grad.norm() < 1e-12


@pytest.mark.parametrize("transposed", [False, True])
def test_non_contiguous_arguments(transposed):
    tensors = batch(6)
    if transposed:
        strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    else:
        strided = [torch.stack([x.detach(), torch.full_like(x, torch.nan)], -1)[..., 0] for x in tensors]
        strided = [x.requires_grad_() for x in strided]
    assert not strided[0].is_contiguous()
    loss, grads = value_and_gradients(info_nce, strided)
    expected, right = value_and_gradients(info_nce, tensors)
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(grads, right, strict=True):
        torch.testing.assert_close(mine, other)


def test_mixed_dtypes():
    tensors = batch(5)
    tensors = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(tensors, TOLERANCE)]
    loss, grads = value_and_gradients(info_nce, tensors)
    assert loss.dtype == torch.float64
    assert [grad.dtype for grad in grads] == list(TOLERANCE)
    torch.testing.assert_close(loss, call(brute_info_nce, exactly(tensors)))


def test_autocast_changes_nothing():
    tensors = batch(6, dtype=torch.float32)
    options = {"gamma": 0.5, "ids": some_ids(6, 3), "temperature": 0.05}
    expected, right = value_and_gradients(info_nce, tensors, **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = value_and_gradients(info_nce, tensors, **options)
    assert torch.equal(loss, expected)
    assert all(torch.equal(*pair) for pair in zip(grads, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("number", "mixes", "options"),
    [
        (None, None, {}),
        (3, 2, {"gamma": 0.5, "detach_focal": False, "fn_margin": 0.1, "dims": [24, 5], "dim_weights": [1.0, 0.3]}),
    ],
)
def test_opcheck(dtype, number, mixes, options):
    tensors = batch(5, number=number, mixes=mixes, dtype=dtype)
    ids = some_ids(5, number) if number else (None, None)
    for needs in ([x is not None for x in tensors], [True, False, False, False]):
        for x, need in zip(tensors, needs):
            if x is not None:
                x.requires_grad_(need)
        results = torch.library.opcheck(
            torch.ops.leafkern.info_nce.default, info_nce_arguments(tensors, ids, 0, options, needs)
        )
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("full", [False, True])
def test_compiled_equals_eager(full):
    tensors = batch(6, dtype=torch.float32)
    ids = some_ids(6, 3)
    options = {"gamma": 0.5, "ids": ids, "fn_margin": 0.3, "dims": [24, 8]} if full else {}
    if not full:
        tensors[2:] = None, None
    given = [x for x in tensors if x is not None]
    compiled = torch.compile(lambda *t: call(info_nce, t, **options), fullgraph=True, backend="aot_eager")
    loss, eager = compiled(*tensors), call(info_nce, tensors, **options)
    assert torch.equal(loss, eager)
    pairs = zip(torch.autograd.grad(loss, given), torch.autograd.grad(eager, given), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_eager_calls_bypass_the_dispatcher():
    with torch.profiler.profile() as profile:
        info_nce(*batch(3)[:2])
    assert not any("leafkern::" in event.name for event in profile.events())


def test_only_the_backend_that_exists_can_be_forced(monkeypatch):
    tensors = batch(3)[:2]
    monkeypatch.setenv("LEAFKERN_BACKEND", "contrastive=reference")
    info_nce(*tensors)
    monkeypatch.setenv("LEAFKERN_BACKEND", "contrastive=triton")
    with pytest.raises((InputError, BackendError), match="contrastive"):
        info_nce(*tensors)


GOOD = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GOOD[0], GOOD), {}, "queries: expected 2 dimensions"),
        ((GOOD.int(), GOOD), {}, "queries: expected a floating-point tensor, got int32"),
        (([[1.0]], GOOD), {}, "queries: expected a torch.Tensor, got list"),
        ((GOOD, GOOD[:2]), {}, r"queries, positives: shapes \(3, 4\) and \(2, 4\) differ"),
        ((GOOD, GOOD[:, :2]), {}, r"queries, positives: shapes \(3, 4\) and \(3, 2\) differ"),
        ((GOOD, GOOD, GOOD), {}, "negatives: expected 3 dimensions"),
        ((GOOD, GOOD, torch.ones(2, 5, 4)), {}, r"queries, negatives: shapes .* here \(3, ..., 4\)"),
        ((GOOD, GOOD, torch.ones(3, 5, 2)), {}, r"queries, negatives: shapes \(3, 4\) and \(3, 5, 2\)"),
        ((GOOD, GOOD), {"mixed": torch.ones(3, 5, 2)}, "queries, mixed: shapes"),
        ((GOOD, GOOD.to("meta")), {}, "queries on cpu, positives on meta"),
        ((GOOD, GOOD), {"temperature": 0}, "temperature: expected a finite number above 0; got 0"),
        ((GOOD, GOOD), {"temperature": math.nan}, "temperature: expected a finite number above 0"),
        ((GOOD, GOOD), {"gamma": -1.0}, "gamma: expected a finite number of at least 0; got -1.0"),
        ((GOOD, GOOD), {"fn_margin": math.inf}, "fn_margin: expected a finite number; got inf"),
        ((GOOD, GOOD), {"dims": [2, 4]}, "dims: expected descending, unique widths"),
        ((GOOD, GOOD), {"dims": [5]}, "dims: expected prefix widths from 1 to 4"),
        ((GOOD, GOOD), {"dims": [4, 2], "dim_weights": [1.0]}, "dim_weights: expected 2 finite numbers"),
        ((GOOD, GOOD), {"gather": "rank"}, "gather: unknown name 'rank'; did you mean 'ranks'"),
        ((GOOD, GOOD), {"ids": torch.arange(3)}, r"ids: expected \(positive_ids, negative_ids\), got Tensor"),
        ((GOOD, GOOD), {"ids": (torch.ones(3), None)}, r"ids\[0\] \(of positives\): expected dtype int64"),
        ((GOOD, GOOD), {"ids": (torch.arange(2), None)}, r"ids\[0\] \(of positives\): shape \(2,\); expected \(3,\)"),
        ((GOOD, GOOD), {"ids": (None, None)}, r"ids\[0\] \(of positives\): expected a torch.Tensor, got NoneType"),
        ((GOOD, GOOD), {"ids": (torch.arange(3), torch.ones(3, 2).int())}, "ids: ids of negatives, but no negatives"),
        (
            (GOOD, GOOD, torch.ones(3, 2, 4)),
            {"ids": (torch.arange(3), None)},
            r"ids\[1\] \(of negatives\): expected a torch.Tensor, got NoneType",
        ),
        (
            (GOOD, GOOD, torch.ones(3, 2, 4)),
            {"ids": (torch.arange(3), torch.ones(3, 1).int())},
            r"ids\[1\] \(of negatives\): shape \(3, 1\); expected \(3, 2\)",
        ),
        ((GOOD, GOOD), {"ids": (torch.arange(3, device="meta"), None)}, "positives on cpu, ids.* on meta"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message):
        info_nce(*arguments, **options)


def test_the_op_says_when_a_wanted_gradient_was_not_asked_for():
    tensors = batch(3, number=None, mixes=None)
    loss = autograd.info_nce(*info_nce_arguments(tensors, (None, None), 0, {}, [False, True, False, False]))[0]
    with pytest.raises(RuntimeError, match="info_nce: called with needs=False"):
        loss.backward()
