"""The Triton kernels of attention, run by Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch
from compare import bounds, relative
from tolerances import TOLERANCE

pytest.importorskip("triton")

import triton
import triton.language as tl

from leafkern.errors import BackendError
from leafkern.ops import attention_mean_pool, varlen_attention
from leafkern.ops._core import backend, launch
from leafkern.ops.attention.exponential import exp2, polynomial_exp2
from leafkern.ops.attention.reference import brute_attention, brute_attention_mean_pool

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16]
# The first fills blocks and goes beyond them; in the last, programs search their sequence.
RAGGED = [[33, 0, 1, 32], [1], [0], [0, 0, 4], [5, 0, 0], [2, 40, 0, 3, 1, 7, 1]]
OPS = torch.ops.leafkern


@pytest.fixture(params=["own", "16 x 32", "32 x 16"])
def blocks(request, monkeypatch):
    """Blocks as configured, or so small that every loop goes round; several heads or one to a program."""
    from leafkern.ops.attention import kernels

    if request.param != "own":
        rows, columns = map(int, request.param.split(" x "))
        small = kernels.Config(rows, columns, warps=1, stages=1, heads=3 if rows == 16 else 1)
        monkeypatch.setattr(kernels, "configure", lambda *_: small)


def make(tokens, heads=(2, 1), width=8, dtype=torch.float32):
    """Leaves q (T, H, D), k and v (T, H_kv, D)."""
    return [torch.randn(tokens, n, width, dtype=dtype).requires_grad_() for n in (heads[0], heads[1], heads[1])]


def exactly(qkv):
    return [x.detach().double().requires_grad_() for x in qkv]


def hold(function, definition, qkv, cu, **options):
    """Values and gradients against the float64 definition, with a random gradient of the result."""
    exact, tolerance = exactly(qkv), TOLERANCE[qkv[0].dtype]
    longest = int(cu.diff().max()) if cu.numel() > 1 else 0
    found, expected = function(*qkv, cu, longest, **options), definition(*exact, cu, **options)
    assert found.shape == expected.shape
    assert relative(found, expected) <= tolerance
    weights = torch.randn(found.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, qkv, weights.to(found.dtype))
    rights = torch.autograd.grad(expected, exact, weights, materialize_grads=True)
    # Terms of dq and dk cancel, for a single token entirely: dv tells the size of the terms.
    size = rights[2].norm()
    for mine, right, x in zip(grads, rights, qkv, strict=True):
        assert mine.dtype == x.dtype
        assert mine.is_contiguous()
        assert (mine.double() - right).norm() <= 2 * tolerance * torch.maximum(size, right.norm())


def attention_definition(q, k, v, cu, *, scale=None, causal=False, window=(-1, -1)):
    return brute_attention(q, k, v, cu, q.shape[2] ** -0.5 if scale is None else scale, causal, window)


def pool_definition(q, k, v, cu, *, scale=None):
    return brute_attention_mean_pool(q, k, v, cu, q.shape[2] ** -0.5 if scale is None else scale)


def hold_attention(qkv, cu, **options):
    hold(varlen_attention, attention_definition, qkv, cu, **options)


def hold_pool(qkv, cu, **options):
    hold(attention_mean_pool, pool_definition, qkv, cu, **options)


def hold_both(qkv, cu, **options):
    hold_attention(qkv, cu, **options)
    hold_pool(qkv, cu, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_serves(dtype):
    candidates = launch.candidates("attention", torch.device("cpu"), dtype)
    assert backend.choose("attention", candidates) == "triton"


@pytest.mark.parametrize("lengths", RAGGED)
def test_equal_definition(lengths, blocks):
    hold_both(make(sum(lengths)), bounds(lengths))


@pytest.mark.parametrize("lengths", RAGGED)
def test_half_precision(lengths):
    hold_both(make(sum(lengths), dtype=torch.float16), bounds(lengths))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (5, 1), (6, 2)])
@pytest.mark.parametrize("blocks", ["16 x 32"], indirect=True)
def test_heads(heads, blocks):
    hold_both(make(23, heads), bounds([18, 5]))


@pytest.mark.parametrize("window", [(0, 0), (2, -1), (-1, 1), (0, 3), (20, 17), (1000, 1000)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", ["16 x 32", "32 x 16"], indirect=True)
def test_windows(causal, window, blocks):
    hold_attention(make(55, (1, 1)), bounds([3, 0, 50, 2]), causal=causal, window=window)


def test_causal(blocks):
    hold_attention(make(80), bounds([3, 0, 60, 17]), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 32, 64, 104, 128])
def test_widths(width, dtype):
    lengths = [35, 0, 1, 16]
    hold_both(make(sum(lengths), (1, 1), width, dtype), bounds(lengths))
    hold_attention(make(sum(lengths), (1, 1), width, dtype), bounds(lengths), causal=True)


@pytest.mark.parametrize("lengths", [[16, 16], [400, 20], [50, 60], [140, 3, 20]])
def test_configured_classes_of_lengths(lengths):
    # Blocks as short as the texts, long ones, one for a text, and several for one text among short ones.
    hold_both(make(sum(lengths), (1, 1), 32, torch.float16), bounds(lengths))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 2.0])
@pytest.mark.parametrize("blocks", ["16 x 32"], indirect=True)
def test_scales(scale, blocks):
    lengths = [4, 33]
    cu, qkv = bounds(lengths), make(sum(lengths))
    hold_both(qkv, cu, scale=scale)
    hold_attention(qkv, cu, scale=scale, causal=True, window=(18, -1))


def test_places_hold_every_block():
    from leafkern.ops.attention import kernels

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(0, 70, (count,), generator=generator).tolist()
        cu, size = bounds(lengths).tolist(), 16
        first = [begin // size + number for number, begin in enumerate(cu)]
        for number, length in enumerate(lengths):
            assert first[number] + -(-length // size) <= first[number + 1]
        q = torch.zeros(cu[-1], 1, 8)
        places, blocks, search = kernels._Batch.of(q, q, q, bounds(lengths), 70, 1.0).places(size)
        assert places >= first[count - 1] + -(-lengths[-1] // size) if search else places == count * blocks


def test_more_sequences_than_one_step_of_the_search(monkeypatch):
    from leafkern.ops.attention import kernels

    # 11 sequences, 2 per step: four steps, the last ones ragged.
    lengths = [1, 0, 1, 0, 0] * 2 + [40]
    monkeypatch.setattr(kernels, "FAN", 2)
    cu, qkv = bounds(lengths), make(sum(lengths), (1, 1))
    places, _, search = kernels._Batch.of(*qkv, cu, 40, 1.0).places(16)
    assert search
    assert places < 11 * 3
    monkeypatch.setattr(kernels, "configure", lambda *_: kernels.Config(16, 16, warps=1, stages=1))
    hold_both(qkv, cu)


def test_only_empty_sequences():
    for lengths in ([0, 0], []):
        cu, qkv = bounds(lengths), make(0)
        found = varlen_attention(*qkv, cu, 0)
        assert found.shape == (0, 2, 8)
        pooled = attention_mean_pool(*qkv, cu, 0)
        assert torch.equal(pooled, torch.zeros(len(lengths), 2, 8))
        for x in torch.autograd.grad(found.sum() + pooled.sum(), qkv):
            assert x.shape[0] == 0


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("blocks", ["own", "16 x 32"], indirect=True)
def test_nan_stays_in_its_sequence(place, blocks):
    cu, others = bounds([17, 20, 2]), [*range(17), 37, 38]
    clean = [x.detach() for x in make(39, (2, 2))]
    dirty = [x.clone() for x in clean]
    # The last token of the second sequence, whose neighbours share its block.
    dirty[place][36, 1, 2] = torch.nan
    clean, dirty = ([x.requires_grad_() for x in qkv] for qkv in (clean, dirty))
    for function, kept in ((varlen_attention, others), (attention_mean_pool, [0, 2])):
        found, right = (function(*qkv, cu, 20) for qkv in (dirty, clean))
        assert torch.equal(found[kept], right[kept])
        assert found.isnan().any()
        weights = torch.randn(found.shape)
        grads = (torch.autograd.grad(out, qkv, weights) for out, qkv in ((found, dirty), (right, clean)))
        for mine, good in zip(*grads, strict=True):
            assert torch.equal(mine[others], good[others])


def test_views_of_a_packed_tensor(monkeypatch):
    cu, packed = bounds([20, 0, 7]), torch.randn(27, 3, 2, 8)
    views = [x.detach().requires_grad_() for x in packed.unbind(1)]
    assert not views[0].is_contiguous()
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: (x.is_contiguous() or copies.append(x), contiguous(x))[1])
    varlen_attention(*views, cu, 20)
    attention_mean_pool(*views, cu, 20)
    assert not copies
    hold_both(views, cu)


@pytest.mark.parametrize("layout", ["entries apart", "rows not aligned", "expanded"])
def test_other_views(layout):
    cu, wide = bounds([20, 0, 7]), torch.randn(27, 2, 24)
    view = {
        "entries apart": wide[..., ::3],
        "rows not aligned": wide.view(27, 48)[:, :42].unflatten(1, (2, 21))[..., 1:9],
        "expanded": wide[:, :1, 8:16].expand(27, 2, 8),
    }[layout]
    hold_both([view.detach().requires_grad_() for _ in range(3)], cu)


def test_an_expanded_gradient():
    cu, qkv = bounds([4, 2]), make(6)
    exact = exactly(qkv)
    found = torch.autograd.grad(varlen_attention(*qkv, cu, 4).sum(), qkv)
    expected = torch.autograd.grad(attention_definition(*exact, cu).sum(), exact)
    assert relative(found[2], expected[2]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("blocks", ["own", "16 x 32"], indirect=True)
def test_equal_values_leave_nothing_to_queries_and_keys(blocks):
    # The weights add up to 1, so they don't matter when all values are the same. At scores of some 1,000 the rounding
    # of lse moves recomputed weights by about 1e-4 of themselves; it must cancel.
    q, k, _ = (30 * x.detach() for x in make(90))
    qkv = [x.requires_grad_() for x in (q, k, torch.randn(1, 1, 8).repeat(90, 1, 1))]
    for function, rows in ((varlen_attention, 90), (attention_mean_pool, 2)):
        out = function(*qkv, bounds([40, 50]), 50, scale=1.0)
        dq, dk, dv = torch.autograd.grad(out, qkv, torch.randn(rows, 2, 8))
        bound = 3e-7 * dv.norm() / 90**0.5
        assert dq.norm() <= bound * k.norm()
        assert dk.norm() <= bound * q.norm()


def test_lse_is_the_logarithm_of_the_sum(blocks):
    cu, (q, k, v) = bounds([20, 35]), (x.detach() for x in make(55, (2, 2), 16))
    expected = torch.cat(
        [torch.einsum("ihd,jhd->hij", q[rows], k[rows]).mul(0.3).logsumexp(-1) for rows in (slice(20), slice(20, 55))],
        1,
    )
    for found in (
        OPS.varlen_attention(q, k, v, cu, 35, 0.3, False, -1, -1)[1],
        OPS.attention_mean_pool(q, k, v, cu, 35, 0.3)[1],
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_int64_bounds_and_a_longer_max_seqlen():
    qkv, cu = make(24), bounds([14, 10])
    for function in (varlen_attention, attention_mean_pool):
        expected = function(*qkv, cu, 14)
        assert torch.equal(function(*qkv, cu.long(), 14), expected)
        torch.testing.assert_close(function(*qkv, cu, 999), expected, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time():
    qkv, cu = make(50), bounds([33, 17])
    for function in (varlen_attention, attention_mean_pool):
        first, second = (
            (out, *torch.autograd.grad(out.square().sum(), qkv)) for out in (function(*qkv, cu, 33) for _ in range(2))
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    cu, qkv = bounds([3, 0, 5]), make(8)
    plain = [x.detach() for x in qkv]
    torch.library.opcheck(OPS.varlen_attention.default, (*qkv, cu, 5, 0.3, True, 2, -1))
    out, lse = OPS.varlen_attention(*plain, cu, 5, 0.3, True, 2, -1)
    arguments = (torch.randn_like(out), *plain, out, lse, cu, 5, 0.3, True, 2, -1)
    torch.library.opcheck(OPS.varlen_attention_backward.default, arguments)
    torch.library.opcheck(OPS.attention_mean_pool.default, (*qkv, cu, 5, 0.3))
    pooled, lse = OPS.attention_mean_pool(*plain, cu, 5, 0.3)
    torch.library.opcheck(OPS.attention_mean_pool_backward.default, (torch.randn_like(pooled), *plain, lse, cu, 5, 0.3))


def test_compiled_equals_eager():
    qkv, cu = make(20), bounds([12, 8])

    def both(q, k, v):
        return varlen_attention(q, k, v, cu, 12, causal=True), attention_mean_pool(q, k, v, cu, 12)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*qkv), both(*qkv)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    grads = (torch.autograd.grad(sum(x.square().sum() for x in out), qkv) for out in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.bfloat16, 8, "bfloat16 arithmetic is wrong"),
        (torch.float64, 8, "no kernel for float64"),
        (torch.float32, 12, "D = 12; its kernels take multiples of 8 up to 128"),
        (torch.float32, 136, "D = 136; its kernels take"),
    ],
)
def test_what_the_kernels_cannot_serve(monkeypatch, dtype, width, reason):
    qkv, cu = make(5, width=width, dtype=dtype), bounds([3, 2])
    for function in (varlen_attention, attention_mean_pool):
        with pytest.raises(BackendError, match=reason):
            function(*qkv, cu, 3)
    monkeypatch.delenv("LEAFKERN_BACKEND")
    backend._warn_once.cache_clear()
    with pytest.warns(backend.FallbackWarning, match=reason):
        hold_both(qkv, cu)


@pytest.mark.parametrize("share", [2, 4])
def test_partly_polynomial_exponentials(monkeypatch, share):
    from leafkern.ops.attention import kernels

    config = kernels.Config(32, 16, warps=1, stages=1, share=share)
    monkeypatch.setattr(kernels, "configure", lambda *_: config)
    hold_both(make(66), bounds(RAGGED[0]))
    hold_attention(make(66), bounds(RAGGED[0]), window=(3, 5))


def test_autotuning_chooses_for_each_kernel(monkeypatch):
    from leafkern.ops.attention import kernels, tuning

    # The last of two that are run wins; every call after the first finds it.
    chosen = [kernels.Config(rows, 16, warps=1, stages=1) for rows in (16, 32)]
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "requested", lambda device: True)
    monkeypatch.setattr(tuning, "milliseconds", lambda run: (run(), next(times))[1])
    monkeypatch.setattr(kernels, "candidates", lambda *_: chosen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    hold_both(make(66), bounds(RAGGED[0]))
    forms = {key[:2] for key in tuning._found}
    plain = {(name, False) for name in kernels.KERNELS}
    assert forms == plain | {(name, True) for name in ("attend", "dq", "dkv")}
    assert set(tuning._found.values()) == {chosen[1]}
    monkeypatch.setattr(tuning, "milliseconds", None)
    hold_both(make(66), bounds(RAGGED[0]))


@triton.jit
def polynomial_kernel(x, out, SIZE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + places, polynomial_exp2(tl.load(x + places)))


@triton.jit
def mixed_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARE: tl.constexpr):
    places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + places, exp2(tl.load(x + places), SHARE))


def polynomial(x):
    out = torch.empty_like(x)
    polynomial_kernel[len(x) // 1024,](x, out, 1024)
    return out


def test_polynomial_exponential():
    x = torch.cat([-126 * torch.rand(200_000), 127 * torch.rand(2048), torch.randn(2752) / 8])
    right = torch.exp2(x.double())
    assert ((polynomial(x).double() - right) / right).abs().max() <= 3e-6
    # Whole numbers are exact, above all 0, the score of a row's largest.
    whole = torch.arange(-127, 129).float().clamp(-126, 127).repeat(4)
    assert torch.equal(polynomial(whole), torch.exp2(whole))


def test_polynomial_exponential_where_results_vanish():
    below = torch.cat(
        [-126 - torch.rand(1016) * 30, torch.tensor([-127, -150, -1e4, -3e38, -1e9, -126.5, -5e6, -1e20])]
    )
    found = polynomial(below).double()
    assert (found - torch.exp2(below.double())).abs().max() <= 2.0**-126
    assert (found >= 0).all()
    assert (found[below <= -127] == 0).all()
    assert (polynomial(torch.full((1024,), -torch.inf)) == 0).all()
    assert polynomial(torch.full((1024,), torch.nan)).isnan().all()


@pytest.mark.parametrize("share", [0, 2, 4])
def test_share_of_polynomial_exponentials(share):
    x = -20 * torch.rand(16, 32)
    out = torch.empty_like(x)
    mixed_kernel[1,](x, out, 16, 32, share)
    right = torch.exp2(x.double())
    error = ((out.double() - right) / right).abs()
    assert error.max() <= 3e-6
    # Those columns whose error is beyond that of a rounded exp2.
    columns = (error > 3e-7).any(0).nonzero().flatten().tolist()
    assert columns == {0: [], 2: list(range(1, 32, 2)), 4: [c for c in range(1, 32, 2) if c & 8]}[share]
