"""The Triton kernels around attention, run by Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch
from compare import bounds, relative, served_by_another
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_cases import (
    angles,
    drawn,
    exactly,
    hold_embed,
    hold_gelu,
    hold_norm,
    hold_rotary,
    hold_unchecked,
    norm_arguments,
    opcheck_all,
)
from tolerances import TOLERANCE

pytest.importorskip("triton")

from leafkern.ops._core.norm import NORMS
from leafkern.ops.norm import APPROXIMATIONS, add_norm, add_norm_sum, autograd, bias_gelu, embed_norm, rotary
from leafkern.ops.norm.reference import brute_add_norm, brute_bias_gelu, brute_rotary

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16]
RAGGED = [[1], [0], [3, 0, 1, 17, 1], [0, 0, 4], [2, 0, 0], [40, 1, 21, 0, 35]]
# No token; one tile that is not full; several tiles and programs.
SHAPES = [(0, 3), (1, 20), (5, 24), (70, 100)]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_equals_definition(dtype, shape, kind):
    hold_norm(norm_arguments(shape, dtype), kind, dtype)


@pytest.mark.parametrize("width", [2, 16, 129, 1100, 2100])
def test_widths(width):
    for kind in NORMS:
        hold_norm(norm_arguments((9, width)), kind, torch.float32)
    hold_gelu(drawn((9, width), (width,)), "none", torch.float32)
    hold_embed([7, 2], width, torch.float32)


@pytest.mark.parametrize(("residual", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", NORMS)
def test_add_norm_without_residual_or_bias(kind, residual, bias):
    hold_norm(norm_arguments((26, 12), residual=residual, bias=bias), kind, torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_epsilon():
    # Rows beyond the end of a tile have no deviation to divide by.
    hold_norm(norm_arguments((13, 24)), "layer", torch.float32, eps=0.0)


def test_the_sum_alone_has_a_gradient():
    arguments = norm_arguments((6, 8))
    add_norm_sum(*arguments, eps=1e-5)[1].sum().backward()
    assert torch.equal(arguments[0].grad, torch.ones(6, 8))


def test_mixed_dtypes():
    x, residual, weight, bias = norm_arguments((21, 24), torch.float16)
    weight, residual = (y.detach().float().requires_grad_() for y in (weight, residual))
    for pair in ((x, residual), (x, None)):
        hold_norm([*pair, weight, bias], "layer", torch.float16)
    hold_gelu([x, weight], "none", torch.float16)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 600)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu_equals_definition(dtype, shape, bias, approximate):
    hold_gelu(drawn(shape, shape[-1:] if bias else None, dtype=dtype), approximate, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_tails_of_gelu(approximate):
    x = torch.tensor([[-60.0, -12.0, -5.0, 0.0, 5.0, 12.0, 60.0]], requires_grad=True)
    hold_gelu([x, None], approximate, torch.float32)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv", "width"), [(0, 2, 1, 4), (1, 1, 1, 2), (90, 3, 1, 32), (45, 4, 2, 20)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_equals_definition(dtype, tokens, heads, kv, width):
    hold_rotary(tokens, heads, kv, width, dtype)


def test_rotary_reads_views():
    packed, wide = torch.randn(30, 3, 4, 8), angles(30, 16)
    cos, sin = (x[:, 4:12] for x in wide)
    exact = [x[:, :4].repeat(1, 2).double() for x in (cos, sin)]
    for q, k in (packed.unbind(1)[:2], packed.mT.contiguous().mT.unbind(1)[1:]):
        for mine, right in zip(rotary(q, k, cos, sin), brute_rotary(q.double(), k.double(), *exact), strict=True):
            assert relative(mine, right) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("types", "bias"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_norm_equals_definition(dtype, lengths, types, bias):
    hold_embed(lengths, 24, dtype, types=types, bias=bias)


def test_more_sequences_than_one_step_of_the_search(monkeypatch):
    from leafkern.ops.norm import kernels

    monkeypatch.setattr(kernels, "FAN", 4)
    # Runs of empty sequences longer than a step, and several beginnings within a tile.
    hold_embed([3, 0, 1, 0, 2, *[0] * 9, 1, 1, 1, 1, 1, 1, 1] * 3 + [0] * 10, 8, torch.float32)


def test_unchecked_ids_take_the_nearest_row(monkeypatch):
    hold_unchecked(monkeypatch)


def test_no_sequences():
    ids, tables = torch.randint(11, (0,)), drawn((11, 4), (5, 4), (1, 4), (4,), (4,))
    found = embed_norm(ids, bounds([]), *tables, eps=1e-5)
    found.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in tables)


def test_embed_norm_reads_no_row_that_is_not_there(monkeypatch):
    for name in ("values_checked", "check_cu_seqlens"):
        monkeypatch.setattr(f"leafkern.ops.norm.{name}", lambda *_: False)
    # The tables lie between rows of NaN: what is read beside them shows.
    tables = []
    for rows in (11, 2, 3):
        wide = torch.full((rows + 2, 8), torch.nan)
        wide[1:-1] = torch.randn(rows, 8)
        tables.append(wide[1:-1].requires_grad_())
    ids = torch.tensor([1, 2, 10, 0, -7, 1 << 40, 11])
    kinds = torch.tensor([0, 2, 1, 0, -1, 3, 99])
    found = embed_norm(ids, bounds([2, 5]), *tables, torch.ones(8), None, eps=1e-5, token_type_ids=kinds)
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(found.sum(), tables))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    width=st.integers(8, 40),
    kind=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(lengths, width, kind, dtype):
    hold_norm(norm_arguments((sum(lengths), width), dtype), kind, dtype)
    hold_embed(lengths, width, dtype)


@pytest.mark.parametrize("layout", ["rows apart", "columns apart"])
def test_views_of_wider_tensors(layout):
    wide = torch.randn(2, 30, 48)
    x, residual = ((w[:, 5:29] if layout == "rows apart" else w[:, ::2]).detach().requires_grad_() for w in wide)
    weight, bias = torch.randn(48)[::2].requires_grad_(), torch.randn(48)[::2].requires_grad_()
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    hold_norm([x, residual, weight, bias], "layer", torch.float32)
    hold_gelu([x, bias], "none", torch.float32)


def test_an_expanded_gradient():
    x, bias = drawn((6, 4), (4,))
    exact = exactly([x, bias])
    bias_gelu(x, bias).sum().backward()
    brute_bias_gelu(*exact, "none").sum().backward()
    torch.testing.assert_close(x.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time():
    x, residual, weight, bias = norm_arguments((150, 24))
    runs = []
    for _ in range(2):
        out = add_norm(bias_gelu(x, bias), residual, weight, bias, eps=1e-5)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, residual, weight, bias))))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_nan_stays_in_its_row():
    x = torch.randn(40, 8)
    x[30, 2] = torch.nan
    found = add_norm(x, None, torch.ones(8), None, eps=1e-5)
    assert found[30].isnan().all()
    assert torch.isfinite(found[:30]).all()
    assert torch.isfinite(found[31:]).all()


def test_opcheck():
    opcheck_all()


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.bfloat16, 4, "bfloat16 arithmetic is wrong"),
        (torch.float64, 4, "no kernel for float64"),
        (torch.float32, autograd.WIDEST_NORM + 1, "takes at most"),
    ],
)
def test_what_the_kernel_cannot_serve(monkeypatch, dtype, width, reason):
    arguments = norm_arguments((3, width), dtype)
    found = served_by_another(monkeypatch, lambda: add_norm(*arguments, eps=1e-5), reason)
    assert relative(found, brute_add_norm(*exactly(arguments), 1e-5, "layer")[0]) <= TOLERANCE[dtype]
    found.sum().backward()


def test_the_widest_norm_that_is_let_in_is_proved():
    from leafkern.ops.norm import kernels

    assert max(kernels.WIDTHS["fp32"]) == autograd.WIDEST_NORM
