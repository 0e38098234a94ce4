"""What the tests of the operations around attention share: their inputs, and each operation held to its definition."""

import torch
from compare import bounds, relative
from tolerances import TOLERANCE

from leafkern.ops.norm import add_norm, add_norm_sum, bias_gelu, embed_norm, rotary
from leafkern.ops.norm.reference import brute_add_norm, brute_bias_gelu, brute_embed_norm, brute_rotary

WORDS, POSITIONS, TYPES = 11, 45, 3


def drawn(*shapes, dtype=torch.float32, device="cpu"):
    """Random leaves; None for None."""
    return [None if s is None else torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in shapes]


def norm_arguments(shape, dtype=torch.float32, *, residual=True, bias=True, device="cpu"):
    width = shape[-1:]
    return drawn(shape, shape if residual else None, width, width if bias else None, dtype=dtype, device=device)


def angles(tokens, width, dtype=torch.float32, device="cpu"):
    """cos and sin with equal halves, as transformers makes them."""
    turned = torch.randn(tokens, width // 2).repeat(1, 2)
    return turned.cos().to(device, dtype), turned.sin().to(device, dtype)


def embed_arguments(lengths, width, dtype=torch.float32, *, types=True, bias=True, positions=POSITIONS):
    """(ids, cu_seqlens, [tables, weight, bias], token types), on the CPU."""
    tokens = sum(lengths)
    shapes = [(rows, width) for rows in (WORDS, positions, TYPES)]
    tables = drawn(*shapes, (width,), (width,) if bias else None, dtype=dtype)
    kinds = torch.randint(TYPES, (tokens,)) if types else None
    return torch.randint(WORDS, (tokens,)), bounds(lengths), tables, kinds


def exactly(arguments):
    """The same values as float64 leaves on the CPU."""
    return [None if a is None else a.detach().cpu().double().requires_grad_() for a in arguments]


def hold(run, definition, arguments, dtype):
    """Values and gradients against the float64 definition, with random gradients of the results."""
    exact = exactly(arguments)
    found, expected = run(*arguments), definition(*exact)
    if isinstance(found, torch.Tensor):
        found, expected = [found], [expected]
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in expected]
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert mine.is_contiguous()
        assert relative(mine, right) <= TOLERANCE[dtype]
    for x in arguments:
        if x is not None:
            x.grad = None
    for results in (found, expected):
        sum((x * w.to(x.device)).sum() for x, w in zip(results, weights, strict=True)).backward()
    for mine, right in zip(arguments, exact, strict=True):
        if mine is not None:
            assert mine.grad.dtype == mine.dtype
            assert relative(mine.grad, right.grad) <= 2 * TOLERANCE[dtype]


def usual_eps(width):
    """Of narrow rows nearly the whole gradient cancels, and its error is relative to little, unless eps is large."""
    return 1e-2 if width > 16 else 1.0


def hold_norm(arguments, kind, dtype, eps=None):
    """add_norm and add_norm_sum."""
    x, residual = arguments[:2]
    eps = usual_eps(x.shape[-1]) if eps is None else eps
    expected = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    for both in (False, True):

        def run(*given, both=both):
            out = (add_norm_sum if both else add_norm)(*given, eps=eps, kind=kind)
            out = out if both else (out,)
            assert all(y.dtype == expected for y in out)
            return out

        hold(run, lambda *a, both=both: brute_add_norm(*a, eps, kind)[: 1 + both], arguments, dtype)


def hold_gelu(arguments, approximate, dtype):
    def run(*given):
        out = bias_gelu(*given, approximate=approximate)
        assert out.dtype == given[0].dtype
        return out

    hold(run, lambda *a: brute_bias_gelu(*a, approximate), arguments, dtype)


def hold_rotary(tokens, heads, kv, width, dtype, *, device="cpu"):
    turned = angles(tokens, width, torch.promote_types(dtype, torch.float32), device)
    exact = [x.cpu().double() for x in turned]

    def run(q, k):
        out = rotary(q, k, *turned)
        assert all(x.dtype == dtype for x in out)
        return out

    arguments = drawn((tokens, heads, width), (tokens, kv, width), dtype=dtype, device=device)
    hold(run, lambda q, k: brute_rotary(q, k, *exact), arguments, dtype)


def hold_embed(lengths, width, dtype, *, types=True, bias=True, device="cpu"):
    positions, eps = max([POSITIONS, *lengths]), usual_eps(width)
    given = embed_arguments(lengths, width, dtype, types=types, bias=bias, positions=positions)
    ids, cu, tables, kinds = given
    there = [None if x is None else x.to(device) for x in (ids, cu, kinds)]

    def run(*tables):
        out = embed_norm(*there[:2], *tables, eps=eps, token_type_ids=there[2])
        assert out.shape == (len(ids), width)
        assert out.dtype == dtype
        return out

    tables = [None if x is None else x.detach().to(device).requires_grad_() for x in tables]
    hold(run, lambda *a: brute_embed_norm(ids, cu, *a, eps, kinds), tables, dtype)


def hold_unchecked(monkeypatch, device="cpu"):
    """embed_norm where no value is looked at: ids and positions that a table hasn't got take its nearest row."""
    for name in ("values_checked", "check_cu_seqlens"):
        monkeypatch.setattr(f"leafkern.ops.norm.{name}", lambda *_: False)
    ids, cu, tables, kinds = embed_arguments([3, 0, 4], 8, positions=2)
    ids[[1, 4]], kinds[[0, 6]] = torch.tensor([-5, 1 << 40]), torch.tensor([-1, TYPES])
    near = ids.clamp(0, WORDS - 1), cu, kinds.clamp(0, TYPES - 1)
    # Positions 2 and 3 are not there either.
    long = torch.cat([tables[1], tables[1][-1:], tables[1][-1:]]).detach()
    expected = brute_embed_norm(*near[:2], tables[0], long, *tables[2:], 1e-5, near[2])
    there = [x.to(device) for x in (ids, cu, kinds)]
    moved = [x.detach().to(device).requires_grad_() for x in tables]
    found = embed_norm(*there[:2], *moved, eps=1e-5, token_type_ids=there[2])
    assert relative(found, expected) <= TOLERANCE[torch.float32]
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), moved))


def opcheck(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.leafkern, name).default, arguments)


def opcheck_all():
    """Every registered operation, as the CPU serves it in this process."""
    for layer, residual in ((True, True), (False, False)):
        arguments = norm_arguments((7, 6), residual=residual, bias=residual)
        opcheck("add_norm", *arguments, 1e-5, layer)
        opcheck("add_norm_sum", *arguments, 1e-5, layer)
        x, other, weight, _ = (None if a is None else a.detach() for a in arguments)
        statistics = torch.rand(2 if layer else 1, 7)
        grads = torch.randn(7, 6), torch.randn(7, 6) if residual else None
        opcheck("add_norm_backward", *grads, x, other, weight, statistics, layer)
    for bias in (None, torch.randn(6, requires_grad=True)):
        opcheck("bias_gelu", torch.randn(7, 6, requires_grad=True), bias, True)
        opcheck("bias_gelu_backward", torch.randn(7, 6), x, None if bias is None else bias.detach(), False)
    opcheck("rotary", *drawn((3, 2, 4), (3, 1, 4)), *angles(3, 4), False)
    ids, cu, tables, kinds = embed_arguments([3, 4], 6)
    for types in (kinds, None):
        opcheck("embed_norm", ids, cu, *tables, 1e-5, types)
    _, statistics, rows = torch.ops.leafkern.embed_norm(ids, cu, *tables, 1e-5, kinds)
    plain = [table.detach() for table in tables[:-1]]
    opcheck("embed_norm_backward", torch.randn(7, 6), statistics.detach(), rows, *plain)
