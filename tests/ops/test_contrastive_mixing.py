"""mix_negatives against its definition, the distribution of what it draws, edge cases, and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from compare import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import info_nce, mix_negatives
from leafkern.ops.contrastive import autograd
from leafkern.ops.contrastive.reference import brute_mix_negatives


def batch(rows, number, width=16, dtype=torch.float64):
    queries = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    return queries, torch.randn(rows, number, width, dtype=dtype, requires_grad=True)


def drawn(rows, number, pairs):
    first, second = torch.randint(number, (rows, pairs)), torch.randint(number, (rows, pairs))
    return first, second, torch.rand(rows, pairs)


@pytest.fixture
def draws(monkeypatch):
    """(first, second, lambdas) of each call of mix_negatives."""
    seen, plain = [], autograd.mix_negatives

    def remember(queries, negatives, first, second, lambdas, *rest):
        seen.append((first, second, lambdas))
        return plain(queries, negatives, first, second, lambdas, *rest)

    monkeypatch.setattr(autograd, "mix_negatives", remember)
    return seen


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.integers(1, 5),
    number=st.integers(1, 6),
    width=st.integers(8, 20),
    pairs=st.integers(0, 5),
    listwise=st.integers(0, 2),
    temperature=st.sampled_from([1.0, 0.2]),
)
def test_equals_definition(dtype, rows, number, width, pairs, listwise, temperature):
    queries, negatives = batch(rows, number, width, dtype)
    picks = drawn(rows, number, pairs)
    found = autograd.mix_negatives(queries, negatives, *picks, listwise, temperature)
    assert found.shape == (rows, pairs + listwise, width)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if pairs + listwise == 0:
        return
    exact = negatives.detach().double().requires_grad_()
    expected = brute_mix_negatives(queries.detach().double(), exact, *picks, listwise, temperature)
    assert relative(found, expected) <= TOLERANCE[dtype]
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert queries.grad is None
    assert negatives.grad.dtype == dtype
    # The gradient of a list-wise mix of one negative is exactly 0.
    assert (negatives.grad.double() - exact.grad).norm() <= TOLERANCE[dtype] * max(exact.grad.norm(), 1)


@pytest.mark.parametrize("listwise", [0, 2])
def test_gradcheck(listwise):
    queries, negatives = batch(3, 4, 5)
    if listwise:
        # The weights carry no gradient: only where they can't change do differences show the same. All are 1/4 here.
        queries = torch.zeros_like(queries)
    picks = drawn(3, 4, 3)
    assert torch.autograd.gradcheck(
        lambda negatives: autograd.mix_negatives(queries.detach(), negatives, *picks, listwise, 0.3), (negatives,)
    )


def test_default_mixes(draws):
    queries, negatives = batch(4, 7)
    mixed = mix_negatives(queries, negatives)
    assert mixed.shape == (4, 8, 16)
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(4, 8, dtype=torch.float64))
    expected = brute_mix_negatives(queries, negatives, *draws[0], 1, 0.05)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize(
    ("number", "options", "count"),
    [
        (0, {}, 0),
        (0, {"pairwise": 5, "listwise": 3}, 0),
        (1, {}, 1),
        (1, {"pairwise": 5, "listwise": 0}, 0),
        (2, {}, 3),
        (3, {"pairwise": 0}, 1),
        (3, {"pairwise": 5}, 6),
        (3, {"pairwise": 2, "listwise": 4}, 6),
        (3, {"pairwise": 0, "listwise": 0}, 0),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_number_of_mixes(rows, number, options, count):
    queries, negatives = batch(rows, number)
    mixed = mix_negatives(queries, negatives, **options)
    assert mixed.shape == (rows, count, 16)
    assert mixed.dtype == torch.float64
    loss = info_nce(queries, queries.detach().clone(), negatives, mixed=mixed)
    loss.backward()
    assert negatives.grad.shape == negatives.shape


def test_one_negative_is_its_own_list():
    queries, negatives = batch(3, 1)
    torch.testing.assert_close(mix_negatives(queries, negatives), F.normalize(negatives, dim=-1))


def test_listwise_weights():
    """Weights by hand: cosines 1 and 0 at temperature 1 / log 3 give 3/4 and 1/4."""
    eye = torch.eye(3, dtype=torch.float64)
    temperature = 1 / torch.tensor(3.0, dtype=torch.float64).log().item()
    mixed = mix_negatives(5 * eye[:1], torch.stack([2 * eye[0], 7 * eye[1]])[None], pairwise=0, temperature=temperature)
    torch.testing.assert_close(mixed[0, 0], F.normalize(torch.tensor([0.75, 0.25, 0], dtype=torch.float64), dim=0))


def test_further_listwise_mixes_repeat_the_first():
    queries, negatives = batch(3, 4)
    mixed = mix_negatives(queries, negatives, pairwise=0, listwise=3)
    assert torch.equal(mixed, mixed[:, :1].expand(-1, 3, -1))
    # A repeated column weighs three times in the denominator.
    positives = torch.randn_like(queries)
    logits = torch.einsum("bd,bnd->bn", F.normalize(queries, dim=-1), mixed)[:, :1] / 0.2
    everyone = F.normalize(queries, dim=-1) @ F.normalize(positives, dim=-1).T / 0.2
    expected = F.cross_entropy(torch.cat([everyone, logits + torch.tensor(3.0).log()], 1), torch.arange(3))
    torch.testing.assert_close(info_nce(queries, positives, mixed=mixed, temperature=0.2), expected)


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_lambda_0_or_1_duplicates_a_negative(lambda_):
    queries, negatives = batch(4, 3)
    positives = torch.randn_like(queries)
    first, second = torch.tensor([0, 1, 2]).repeat(4, 1), torch.tensor([1, 2, 0]).repeat(4, 1)
    lambdas = torch.full((4, 3), lambda_)
    chosen = first if lambda_ else second
    mixed = autograd.mix_negatives(queries, negatives, first, second, lambdas, 0, 0.05)
    duplicates = negatives[torch.arange(4)[:, None], chosen]
    torch.testing.assert_close(mixed, F.normalize(duplicates, dim=-1))
    losses = [
        info_nce(queries, positives, negatives, mixed=own, gamma=0.5, temperature=0.1) for own in (mixed, duplicates)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (queries, negatives)) for loss in losses))


def test_pairs_are_distinct_and_uniform(draws):
    queries, negatives = batch(50, 4)
    generator = torch.Generator().manual_seed(5)
    mix_negatives(queries, negatives, pairwise=1200, generator=generator)
    first, second, _ = draws[0]
    assert (first != second).all()
    counts = torch.bincount((4 * first + second).flatten(), minlength=16).reshape(4, 4)
    assert not counts.diagonal().any()
    # 60000 draws of 12 equally likely pairs: 5000 each, standard deviation 68.
    assert (counts[~torch.eye(4, dtype=torch.bool)] - 5000).abs().max() < 350


def test_two_negatives_always_mix_with_each_other(draws):
    mix_negatives(*batch(20, 2), pairwise=50)
    assert (draws[0][0] + draws[0][1] == 1).all()


def test_lambda_is_beta_2_2(draws):
    generator = torch.Generator().manual_seed(11)
    mix_negatives(*batch(100, 2), pairwise=2000, generator=generator)
    lambdas = draws[0][2].double().flatten()
    assert lambdas.min() >= 0
    assert lambdas.max() < 1
    # 200000 draws: the mean's standard deviation is 0.0005, the variance's about 0.0001.
    assert abs(lambdas.mean() - 1 / 2) < 0.0025
    assert abs(lambdas.var() - 1 / 20) < 0.0005
    # The distribution function of Beta(2, 2) is 3 x^2 - 2 x^3.
    for x in (0.1, 0.25, 0.5, 0.8):
        assert abs((lambdas < x).double().mean() - (3 * x**2 - 2 * x**3)) < 0.006


def test_a_seed_gives_the_same_mixes_and_leaves_torchs_generator_alone(draws):
    queries, negatives = batch(5, 6)
    state = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, same, other = (mix_negatives(queries, negatives, generator=generator) for generator in generators)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, mix_negatives(queries, negatives, generator=generators[0]))
    assert torch.equal(torch.get_rng_state(), state)
    # Whatever the dtype.
    mix_negatives(queries.half(), negatives.half(), generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(*pair) for pair in zip(draws[0], draws[-1], strict=True))
    # Without a generator: torch's own.
    torch.manual_seed(3)
    default = mix_negatives(queries, negatives)
    torch.manual_seed(3)
    assert torch.equal(mix_negatives(queries, negatives), default)


def test_queries_get_no_gradient_from_listwise_weights():
    queries, negatives = batch(3, 4)
    mixed = mix_negatives(queries, negatives, pairwise=0)
    assert torch.autograd.grad(mixed.sum(), queries, allow_unused=True) == (None,)
    assert not mix_negatives(queries, negatives.detach()).grad_fn


def test_zero_and_opposite_negatives():
    negatives = torch.tensor([[[0.0, 0, 0], [3, 0, 0], [-5, 0, 0]]], dtype=torch.float64, requires_grad=True)
    queries = torch.zeros(1, 3, dtype=torch.float64)
    first, second, lambdas = torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]])
    mixed = autograd.mix_negatives(queries, negatives, first, second, lambdas, 1, 0.05)
    expected = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(mixed, expected)
    (grad,) = torch.autograd.grad((mixed * torch.randn_like(mixed)).sum(), negatives)
    assert grad.isfinite().all()
    assert not grad[0, 0].any()


def test_nan_propagates():
    queries, negatives = batch(3, 4)
    with torch.no_grad():
        negatives[1, 2, 0] = torch.nan
    mixed = mix_negatives(queries, negatives)
    assert mixed[1, -1].isnan().all()
    assert mixed[[0, 2]].isfinite().all()


def test_autocast_changes_nothing():
    queries, negatives = batch(3, 4, dtype=torch.float32)
    picks = drawn(3, 4, 3)

    def run():
        mixed = autograd.mix_negatives(queries, negatives, *picks, 1, 0.05)
        return mixed, *torch.autograd.grad(mixed.square().sum() + mixed[..., 0].sum(), negatives)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(torch.equal(*pair) for pair in zip(plain, cast, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pairs", "listwise"), [(3, 1), (0, 2), (2, 0)])
def test_opcheck(dtype, pairs, listwise):
    queries, negatives = batch(5, 4, dtype=dtype)
    queries.requires_grad_(False)
    arguments = (queries, negatives, *drawn(5, 4, pairs), listwise, 0.1)
    results = torch.library.opcheck(torch.ops.leafkern.mix_negatives.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_equals_eager():
    queries, negatives = batch(4, 5, dtype=torch.float32)
    compiled = torch.compile(lambda q, n: mix_negatives(q, n, listwise=2), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda q, n: mix_negatives(q, n, listwise=2)):
        torch.manual_seed(4)
        mixed = function(queries, negatives)
        results.append((mixed, *torch.autograd.grad(mixed[..., 0].sum(), negatives)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


GOOD, OWN = torch.ones(3, 4), torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((OWN, OWN), {}, "queries: expected 2 dimensions"),
        ((GOOD, GOOD), {}, "negatives: expected 3 dimensions"),
        ((GOOD, OWN.int()), {}, "negatives: expected a floating-point tensor"),
        ((GOOD[:2], OWN), {}, "queries, negatives: shapes"),
        ((GOOD, OWN[..., :2]), {}, "queries, negatives: shapes"),
        ((GOOD, OWN.to("meta")), {}, "queries on cpu, negatives on meta"),
        ((GOOD, OWN), {"pairwise": -1}, "pairwise: expected a whole number that is not negative; got -1"),
        ((GOOD, OWN), {"pairwise": 1.5}, "pairwise: expected a whole number"),
        ((GOOD, OWN), {"listwise": True}, "listwise: expected a whole number"),
        ((GOOD, OWN), {"temperature": 0.0}, "temperature: expected a finite number above 0"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message):
        mix_negatives(*arguments, **options)
