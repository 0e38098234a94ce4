"""add_norm, bias_gelu, rotary and embed_norm against their definitions, their gradients, and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from compare import bounds, relative
from norm_cases import (
    angles,
    drawn,
    embed_arguments,
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

from leafkern.errors import BackendError, InputError
from leafkern.ops._core.norm import NORMS
from leafkern.ops.norm import APPROXIMATIONS, add_norm, add_norm_sum, bias_gelu, embed_norm, rotary
from leafkern.ops.norm.reference import brute_add_norm, brute_bias_gelu, brute_embed_norm

SHAPES = [(0, 3), (1, 20), (7, 24), (2, 3, 16), (40, 129)]
RAGGED = [[1], [0], [3, 0, 1, 17, 1], [0, 0, 4], [2, 0, 0]]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_norm_equals_definition(dtype, shape, kind):
    hold_norm(norm_arguments(shape, dtype), kind, dtype)


@pytest.mark.parametrize(("residual", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", NORMS)
def test_add_norm_without_residual_or_bias(kind, residual, bias):
    hold_norm(norm_arguments((9, 64), residual=residual, bias=bias), kind, torch.float32, eps=1e-6)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_through_one_result_of_the_sum(place, kind):
    arguments = norm_arguments((5, 8), torch.float64)
    exact = exactly(arguments)
    found, expected = (f(*a, 1e-3, kind) for f, a in ((_summed, arguments), (brute_add_norm, exact)))
    for results in (found, expected):
        results[place].square().sum().backward()
    for mine, right in zip(arguments, exact, strict=True):
        torch.testing.assert_close(torch.zeros_like(right) if mine.grad is None else mine.grad, _grad(right))


def _summed(x, residual, weight, bias, eps, kind):
    return add_norm_sum(x, residual, weight, bias, eps=eps, kind=kind)


def _grad(x):
    return torch.zeros_like(x) if x.grad is None else x.grad


def test_mixed_dtypes():
    x, residual, weight, bias = norm_arguments((9, 8), torch.bfloat16)
    weight, residual = (y.detach().float().requires_grad_() for y in (weight, residual))
    for pair in ((x, residual), (x, None)):
        hold_norm([*pair, weight, bias], "layer", torch.bfloat16)
    hold_norm([x, None, weight.detach().double().requires_grad_(), bias], "layer", torch.bfloat16)


def test_statistics_of_half_precision_are_float32():
    # A mean of 300 with deviation 1: bfloat16's steps are 2 there, and those of a mean kept in it would show.
    x = (300 + torch.randn(50, 64)).bfloat16()
    found = add_norm(x, None, torch.ones(64), None, eps=0.0)
    expected = F.layer_norm(x.double(), (64,))
    assert relative(found, expected) <= TOLERANCE[torch.bfloat16]
    _, statistics = torch.ops.leafkern.add_norm(x, None, torch.ones(64).bfloat16(), None, 0.0, True)
    assert statistics.dtype == torch.float32


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bias_gelu_equals_definition(dtype, shape, bias, approximate):
    hold_gelu(drawn(shape, shape[-1:] if bias else None, dtype=dtype), approximate, dtype)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_definition_of_gelu_is_torchs(approximate):
    x = torch.randn(100, dtype=torch.float64)
    torch.testing.assert_close(brute_bias_gelu(x, None, approximate), F.gelu(x, approximate=approximate))


def test_bias_gelu_of_mixed_dtypes():
    x, bias = torch.randn(30, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)
    hold_gelu([x, bias], "none", torch.bfloat16)


@pytest.mark.parametrize(("tokens", "heads", "kv", "width"), [(0, 2, 1, 4), (1, 1, 1, 2), (9, 3, 1, 8), (5, 4, 2, 10)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotary_equals_definition(dtype, tokens, heads, kv, width):
    hold_rotary(tokens, heads, kv, width, dtype)


def test_rotary_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, (cos, sin) = torch.randn(7, 4, 8), torch.randn(7, 2, 8), angles(7, 8)
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for mine, right in zip(rotary(q, k, cos, sin), expected, strict=True):
        torch.testing.assert_close(mine, right[0].transpose(0, 1))


def test_rotary_reads_slices_of_a_packed_tensor():
    packed, (cos, sin) = torch.randn(6, 3, 4, 8), angles(6, 8)
    q, k, _ = packed.unbind(1)
    for mine, right in zip(rotary(q, k, cos, sin), rotary(q.clone(), k.clone(), cos, sin), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_embed_norm_equals_definition(dtype, lengths, types):
    hold_embed(lengths, 24, dtype, types=types)


def test_unchecked_ids_take_the_nearest_row(monkeypatch):
    hold_unchecked(monkeypatch)


def test_embed_norm_of_int32_and_without_bias():
    ids, cu, tables, kinds = embed_arguments([3, 4], 8, torch.float64, bias=False)
    found = embed_norm(ids.int(), cu.long(), *tables, eps=1e-5, token_type_ids=kinds.int())
    torch.testing.assert_close(found, brute_embed_norm(ids, cu, *tables, 1e-5, kinds))


def test_embed_norm_of_frozen_tables():
    ids, cu, tables, kinds = embed_arguments([3, 4], 8)
    frozen = [table.detach() if place < 2 else table for place, table in enumerate(tables)]
    grads = []
    for given in (tables, frozen):
        out = embed_norm(ids, cu, *given, eps=1e-5, token_type_ids=kinds)
        grads.append(torch.autograd.grad(out.square().sum(), given[2:]))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_gradcheck():
    cu, (cos, sin) = bounds([2, 0, 1, 4]), angles(3, 4, torch.float64)
    ids, kinds = torch.randint(11, (7,)), torch.randint(3, (7,))
    for kind in NORMS:
        arguments = norm_arguments((5, 4), torch.float64)
        for call in (add_norm, add_norm_sum):
            assert torch.autograd.gradcheck(lambda *a, f=call, kind=kind: f(*a, eps=1e-3, kind=kind), arguments)
    for approximate in APPROXIMATIONS:
        arguments = drawn((5, 4), (4,), dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda *a, how=approximate: bias_gelu(*a, approximate=how), arguments)
    arguments = drawn((3, 2, 4), (3, 1, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), arguments)
    _, _, tables, _ = embed_arguments([], 4, torch.float64)
    for types in (kinds, None):
        assert torch.autograd.gradcheck(lambda *a, t=types: embed_norm(ids, cu, *a, eps=1e-3, token_type_ids=t), tables)


def test_no_second_derivative():
    x, bias = drawn((3, 4), (4,))
    (grad,) = torch.autograd.grad(bias_gelu(x, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_non_contiguous_input():
    x, residual = torch.randn(6, 10).T, torch.randn(6, 10).T
    weight, bias = torch.randn(12)[::2], torch.randn(6)
    found, expected = (
        (*add_norm_sum(a, b, weight, bias, eps=1e-5), add_norm(a, b, weight, bias, eps=1e-5), bias_gelu(a, bias))
        for a, b in ((x, residual), (x.contiguous(), residual.contiguous()))
    )
    for mine, right in zip(found, expected, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, right)


def test_autocast_changes_nothing():
    norm, gelu, (cos, sin) = norm_arguments((4, 8)), drawn((4, 8), (8,)), angles(3, 4)
    heads = drawn((3, 2, 4), (3, 1, 4))
    ids, cu, tables, _ = embed_arguments([3, 4], 8)

    def outputs():
        return (
            add_norm(*norm, eps=1e-5),
            *add_norm_sum(*norm, eps=1e-5, kind="rms"),
            bias_gelu(*gelu),
            *rotary(*heads, cos, sin),
            embed_norm(ids, cu, *tables, eps=1e-5),
        )

    expected = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_triton_is_not_for_cpu_tensors(monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"norm=triton.* only under TRITON_INTERPRET=1"):
        bias_gelu(torch.randn(3, 2))


NORM = {"x": torch.zeros(4, 2), "residual": None, "weight": torch.ones(2), "bias": None, "eps": 1e-5}
ROTARY = {"q": torch.zeros(3, 2, 4), "k": torch.zeros(3, 1, 4), "cos": torch.zeros(3, 4), "sin": torch.zeros(3, 4)}
EMBED = {
    "input_ids": torch.tensor([1, 2, 0]),
    "cu_seqlens": bounds([2, 1]),
    "word": torch.zeros(4, 2),
    "position": torch.zeros(2, 2),
    "token_type": torch.zeros(2, 2),
    "weight": torch.ones(2),
    "bias": None,
    "eps": 1e-5,
}


@pytest.mark.parametrize(
    ("function", "given", "change", "message"),
    [
        (add_norm, NORM, {"x": torch.zeros(4)}, r"x: expected \(..., D\)"),
        (add_norm, NORM, {"x": torch.zeros(4, 2, dtype=torch.int64)}, "x: expected a floating-point"),
        (add_norm, NORM, {"residual": torch.zeros(4, 3)}, "residual: shape"),
        (add_norm, NORM, {"weight": torch.zeros(3)}, "weight: 3 entries; expected D = 2"),
        (add_norm_sum, NORM, {"bias": torch.zeros(1)}, "bias: 1 entries"),
        (add_norm_sum, NORM, {"kind": "batch"}, "kind: unknown name 'batch'"),
        (add_norm, NORM, {"eps": -1.0}, "eps: -1.0"),
        (bias_gelu, {"x": torch.zeros(4)}, {}, r"x: expected \(..., D\)"),
        (bias_gelu, {"x": torch.zeros(4, 2)}, {"bias": torch.zeros(3)}, "bias: 3 entries; expected D = 2"),
        (bias_gelu, {"x": torch.zeros(4, 2)}, {"approximate": "erf"}, "approximate: unknown name 'erf'"),
        (rotary, ROTARY, {"k": torch.zeros(3, 1, 2)}, "k: shape"),
        (rotary, ROTARY, {"k": torch.zeros(3, 1, 4).half()}, "k: dtype float16; expected that of q, float32"),
        (rotary, ROTARY, {"q": torch.zeros(3, 1, 3), "k": torch.zeros(3, 1, 3)}, "width D = 3; expected an even"),
        (rotary, ROTARY, {"cos": torch.zeros(1, 4)}, r"cos: shape \(1, 4\); expected \(T, D\) = \(3, 4\)"),
        (rotary, ROTARY, {"sin": torch.zeros(3, 4, requires_grad=True)}, "sin: requires a gradient"),
        (embed_norm, EMBED, {"input_ids": torch.zeros(3)}, "input_ids: expected dtype int64, int32"),
        (embed_norm, EMBED, {"input_ids": torch.tensor([1, 4, 0])}, "input_ids: row 1 holds 4; expected 0 to 3"),
        (embed_norm, EMBED, {"input_ids": torch.tensor([1, 3, -1])}, "input_ids: row 2 holds -1"),
        (embed_norm, EMBED, {"token_type_ids": torch.tensor([0, 0, 2])}, "token_type_ids: row 2 holds 2"),
        (embed_norm, EMBED, {"token_type_ids": torch.tensor([0, 0])}, "token_type_ids: 2 entries; expected T = 3"),
        (embed_norm, EMBED, {"cu_seqlens": bounds([3])}, "a sequence of 3 tokens; position has 2 rows"),
        (embed_norm, EMBED, {"cu_seqlens": bounds([2, 2])}, "from 0 to T = 3; got 0 to 4"),
        (embed_norm, EMBED, {"position": torch.zeros(2, 3)}, "position: shape"),
        (embed_norm, EMBED, {"token_type": torch.zeros(0, 2)}, "token_type: shape"),
        (embed_norm, EMBED, {"weight": torch.zeros(3)}, "weight: 3 entries"),
    ],
)
def test_wrong_arguments(function, given, change, message):
    with pytest.raises(InputError, match=message):
        function(**(given | change))


def test_opcheck():
    opcheck_all()


def test_compiled_equals_eager():
    ids, cu, tables, kinds = embed_arguments([4, 0, 4], 8)
    (cos, sin), heads = angles(8, 4), (8, 2, 4)
    weight, bias = drawn((8,), (8,))

    def layer(weight, bias, *tables):
        x = embed_norm(ids, cu, *tables, eps=1e-5, token_type_ids=kinds)
        q, k = rotary(x.view(heads), x.view(heads)[:, :1], cos, sin)
        x, total = add_norm_sum(bias_gelu(x, bias), q.flatten(1), weight, None, eps=1e-5, kind="rms")
        return add_norm(x, total, weight, bias, eps=1e-5), k

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    arguments = (weight, bias, *tables)
    found, expected = compiled(*arguments), layer(*arguments)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    grads = (torch.autograd.grad(sum(x.square().sum() for x in out), arguments) for out in (found, expected))
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right)
