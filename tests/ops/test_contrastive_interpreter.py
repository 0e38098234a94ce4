"""The Triton kernels of the contrastive losses in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import itertools
from functools import partial

import pytest
import torch
from compare import LargestTensor, recorded_launches, relative
from contrastive_cases import some_ids
from contrastive_hold import batch_on, contrast, hold_contrast, hold_labels, labelled_on
from tolerances import TOLERANCE

pytest.importorskip("triton")

from leafkern.ops import info_nce, soft_label_loss
from leafkern.ops.contrastive import kernels
from leafkern.ops.contrastive.reference import blocked_info_nce

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16]
batch, labelled = partial(batch_on, "cpu"), partial(labelled_on, "cpu")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels and of the library's products, in the order of their launch."""
    done = recorded_launches(monkeypatch, kernels)
    product = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda *args: (done.append("product"), product(*args)))
    return done


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of one tile."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)


@pytest.mark.parametrize(("number", "mixes"), [(None, None), (0, 2), (3, 2)])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_definition(dtype, rows, number, mixes):
    hold_contrast(batch(rows, number=number, mixes=mixes, dtype=dtype), temperature=0.1)


@pytest.mark.parametrize(
    ("gamma", "detach_focal", "masks"),
    [(0.0, True, "ids"), (0.0, True, "margin"), (0.5, True, "none"), (0.5, False, "both"), (2.0, False, "none")],
)
def test_focal_weight_and_masks(gamma, detach_focal, masks):
    options = {"temperature": 0.1, "gamma": gamma, "detach_focal": detach_focal}
    if masks in ("ids", "both"):
        options["ids"] = some_ids(9, 3)
    if masks in ("margin", "both"):
        options["fn_margin"] = 0.6
    hold_contrast(batch(9), **options)


@pytest.mark.parametrize("dims", [[80, 32, 16], [80, 33, 5], [48], [64, 63]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(dtype, dims):
    weights = [0.7**k for k in range(len(dims))]
    options = {"temperature": 0.1, "gamma": 0.5, "fn_margin": 0.8, "ids": some_ids(7, 2, kinds=9)}
    hold_contrast(batch(7, 80, 2, 1, dtype), dims=dims, dim_weights=weights, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_one_tile_and_chunk(small_chunks, dtype):
    hold_contrast(batch(65 if dtype == torch.float32 else 129, 20, 1, None, dtype), temperature=0.1, dims=[20, 16])


@pytest.mark.parametrize("needs", [[place == k for place in range(4)] for k in range(5)])
def test_frozen_arguments(needs):
    tensors = batch(5)
    for x, need in zip(tensors, needs):
        x.requires_grad_(need)
    hold_contrast(tensors, temperature=0.1, dims=[24, 8])


def test_no_rows():
    tensors = batch(0)
    loss = contrast(info_nce, tensors, gamma=0.5, ids=some_ids(0, 3), fn_margin=0.1, dims=[24, 4])
    assert loss.item() == 0
    assert [grad.shape for grad in torch.autograd.grad(loss, tensors)] == [x.shape for x in tensors]


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_query_without_other_columns_has_loss_0(gamma):
    tensors = batch(6)[:2]
    # All positives have one id: nothing is left of anybody's columns.
    loss = info_nce(*tensors, gamma=gamma, detach_focal=False, ids=(torch.ones(6, dtype=torch.int64), None))
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("gap", [-16.0, 4.0, 64.0])
def test_where_p_is_nearly_0_or_1(gap, gamma):
    # One query whose columns have exact cosines, 0 and 1.
    first, second = torch.eye(4)[:2]
    near, far = (first, second) if gap > 0 else (second, first)
    tensors = [x.clone().requires_grad_() for x in (first[None], far[None], near[None, None])]
    hold_contrast([*tensors, None], temperature=1 / abs(gap), gamma=gamma, detach_focal=False)


@pytest.mark.parametrize("cuts", [[0, 3, 8], [0, 0, 1, 8]])
def test_shares_of_ranks_add_up(cuts):
    queries, positives, negatives, mixed = (x.detach() for x in batch(8))
    ids = some_ids(8, 3, kinds=6)
    rest = (0.1, 0.5, False, 0.5, [24], [0.7], [True] * 4)
    expected = blocked_info_nce(*(x.double() for x in (queries, positives, negatives, mixed)), *ids, 0, *rest)
    shares = []
    for start, end in itertools.pairwise(cuts):
        mine = slice(start, end)
        shares.append(kernels.info_nce(queries[mine], positives, negatives, mixed[mine], *ids, start, *rest))
    loss, by_queries, by_positives, by_negatives, by_mixed = zip(*shares)
    found = sum(loss), torch.cat(by_queries), sum(by_positives), sum(by_negatives), torch.cat(by_mixed)
    for share, right in zip(found, expected, strict=True):
        assert relative(share, right) <= TOLERANCE[torch.float32]


def test_zero_rows_have_cosine_0_and_gradient_0():
    tensors = batch(5)
    zeros = [(0, 2), (1, 3), (2, (1, 0)), (3, (4, 1))]
    with torch.no_grad():
        for place, row in zeros:
            tensors[place][row] = 0
    hold_contrast(tensors, temperature=0.1, dims=[24, 6], fn_margin=0.9)
    loss = contrast(info_nce, tensors, temperature=0.1)
    grads = torch.autograd.grad(loss, tensors)
    assert not any(grads[place][row].any() for place, row in zeros)


def test_rows_below_the_clamp():
    # n(x) = x / 1e-12 there, without anything projected out.
    tensors = batch(5)
    with torch.no_grad():
        tensors[0][2] *= 1e-14
        tensors[1][3] *= 1e-14
    hold_contrast(tensors, temperature=1.0)


@pytest.mark.parametrize("place", range(4))
def test_nan_propagates(place):
    tensors = batch(4)
    with torch.no_grad():
        tensors[place].view(-1)[30] = torch.nan
    loss = contrast(info_nce, tensors)
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, tensors)[:2])


def test_nan_of_a_masked_column_stays_there():
    tensors, ids = batch(4, mixes=None), some_ids(4, 3, kinds=1)
    with torch.no_grad():
        tensors[2][0, 0, 0] = torch.nan
    assert contrast(info_nce, tensors, ids=ids).item() == 0


def test_a_copy_of_the_positive_is_not_above_it():
    # The positive's score and a column's are the same products: a margin of 0 hides no column equal to the positive.
    queries, positives, _, _ = batch(6)
    with torch.no_grad():
        positives[3] = positives[0]
    with_copies = info_nce(queries, positives, positives.detach()[:, None], fn_margin=0.0, temperature=0.1)
    hidden = info_nce(queries, positives, positives.detach()[:, None], fn_margin=1e-3, temperature=0.1)
    assert with_copies > hidden


def test_views_are_read_in_place(launches):
    wide = [torch.randn(6, 64), torch.randn(6, 64), torch.randn(6, 3, 64), torch.randn(6, 2, 64)]
    views = [x[..., 8:32].requires_grad_() for x in wide]
    hold_contrast(views, temperature=0.1)
    across = [x.detach().mT.contiguous().mT.requires_grad_() for x in views[:2]]
    hold_contrast([*across, views[2].detach()[:, ::2].requires_grad_(), None], temperature=0.1)


def test_mixed_dtypes():
    queries, positives, negatives, mixed = batch(6, dtype=torch.float16)
    # mix_negatives returns float32.
    exactly = [x.detach().float() for x in (queries, positives, negatives, mixed)]
    found = info_nce(queries, positives, negatives, mixed=mixed.detach().float(), temperature=0.1)
    assert relative(found, info_nce(*exactly[:3], mixed=exactly[3], temperature=0.1)) <= TOLERANCE[torch.float32]
    found = info_nce(queries, exactly[1], negatives, temperature=0.1)
    assert relative(found, info_nce(*exactly[:3], temperature=0.1)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_half_precision_holds_the_weights_of_long_and_short_rows(scale):
    tensors = [(x.detach() * scale).requires_grad_() for x in batch(20, number=1, dtype=torch.float16)]
    hold_contrast(tensors, temperature=0.05)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "number"), [(1, 1), (17, 5), (3, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_labels(dtype, rows, number, shared):
    hold_labels(*labelled(rows, number, shared, dtype=dtype))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_labels_at_widths(dtype, shared):
    options = {"temperature": 0.1, "teacher_temperature": 0.3, "dims": [30, 16, 5], "dim_weights": [1.0, 0.3, 0.2]}
    hold_labels(*labelled(9, 6, shared, 40, dtype), **options)


def test_soft_labels_in_more_than_one_tile_and_chunk(small_chunks):
    hold_labels(*labelled(66, 70, True, 20))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_frozen_arguments_of_soft_labels(needs, shared):
    queries, candidates, scores = labelled(5, 4, shared)
    hold_labels(queries.requires_grad_(needs[0]), candidates.requires_grad_(needs[1]), scores)


@pytest.mark.parametrize("shared", [False, True])
def test_soft_labels_of_nothing(shared):
    for rows, number in ((0, 4), (3, 0)):
        queries, candidates, scores = labelled(rows, number, shared)
        loss = soft_label_loss(queries, candidates, scores)
        assert loss.item() == 0
        for x, grad in zip((queries, candidates), torch.autograd.grad(loss, (queries, candidates)), strict=True):
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_of_the_student_propagates(place, shared):
    queries, candidates, scores = labelled(4, 3, shared)
    with torch.no_grad():
        (queries, candidates)[place].view(-1)[3] = torch.nan
    scores[:, 0] = -torch.inf
    assert soft_label_loss(queries, candidates, scores).isnan()


@pytest.mark.parametrize("row", [[torch.nan, 0.0, 1.0], [torch.inf, 0.0, 1.0], [-torch.inf] * 3])
@pytest.mark.parametrize("shared", [False, True])
def test_unchecked_teacher_rows_give_nan(monkeypatch, shared, row):
    monkeypatch.setattr("leafkern.ops.contrastive.values_checked", lambda x: False)
    queries, candidates, scores = labelled(4, 3, shared)
    scores[2] = torch.tensor(row)
    assert soft_label_loss(queries, candidates, scores).isnan()


def test_soft_labels_of_ranks_add_up():
    queries, candidates, scores = (x.detach() for x in labelled(8, 5, True))
    rest = (8, 0.1, 0.2, [24, 6], [0.6, 0.5], [True, True])
    whole = kernels.soft_label_loss(queries, candidates, scores, *rest)
    shares = [
        kernels.soft_label_loss(queries[a:b], candidates, scores[a:b], *rest) for a, b in ((0, 3), (3, 3), (3, 8))
    ]
    loss, by_queries, by_candidates = zip(*shares)
    for found, right in zip((sum(loss), torch.cat(by_queries), sum(by_candidates)), whole, strict=True):
        assert relative(found, right) <= TOLERANCE[torch.float32]


def test_number_of_launches(launches):
    tensors = batch(5)
    contrast(info_nce, [x.detach() for x in tensors])
    # Norms of four tensors, positives, the scores of positives and negatives, rows.
    assert launches == ["prefix"] * 4 + ["score"] * 3 + ["row"]
    for dims in ([24], [24, 8, 4]):
        launches.clear()
        contrast(info_nce, tensors, dims=dims, gamma=0.5, fn_margin=0.1, ids=some_ids(5, 3))
        products = ["weight"] + 2 * len(dims) * ["product"] + ["finish"]
        assert launches == ["prefix"] * 4 + ["score"] * 3 + ["row"] + products * 2 + ["finish"] * 3
    launches.clear()
    queries, candidates, scores = labelled(5, 4, True)
    soft_label_loss(queries, candidates, scores)
    products = ["weight", "product", "product"]
    assert launches == ["prefix"] * 2 + ["teacher", "score", "row"] + products + ["finish"] * 2
    launches.clear()
    queries, candidates, scores = labelled(5, 4, False)
    soft_label_loss(queries, candidates, scores)
    assert launches == ["prefix"] * 2 + ["teacher", "row"] + ["finish"] * 2


def test_launches_by_size(launches, small_chunks):
    tile = kernels.configure(4, "ieee", (0, 16), False, False)
    rows = 2 * tile.columns
    info_nce(*batch(rows, 16, mixes=None, number=None)[:2])
    chunks = (rows // tile.rows) * (rows // tile.columns)
    counts = {name: launches.count(name) for name in set(launches)}
    finishes = rows // tile.columns + 1
    assert counts == {"prefix": 2, "score": 2, "row": 1, "weight": chunks, "product": 2 * chunks, "finish": finishes}


@pytest.mark.parametrize(("rows", "columns"), [(16384, 16384), (128, 131072), (200_000, 100), (1, 1), (16384, 131072)])
@pytest.mark.parametrize(("size", "widths"), [(2, 1), (2, 7), (4, 3)])
def test_chunks_are_whole_tiles_within_their_bytes(rows, columns, size, widths):
    tile = kernels.configure(size, "ieee", tuple(range(0, 64 * widths + 1, 64)), False, False)
    high, wide = kernels.chunk(rows, columns, widths, size, tile)
    assert high % tile.rows == 0
    assert wide % tile.columns == 0
    assert high * wide * widths * size <= kernels.CHUNK_BYTES
    # No row of tiles that nobody needs.
    assert high < rows + tile.rows
    assert wide < columns + tile.columns


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 32 << 10)
    tensors = [x.detach() for x in batch(140, 8, number=None, mixes=None)[:2]]
    with LargestTensor() as largest:
        kernels.info_nce(
            *tensors, None, None, None, None, 0, 0.1, 0.0, True, None, [8], [1.0], [True, True, False, False]
        )
    # All similarities would take 76 KiB.
    assert largest.bytes <= 32 << 10
