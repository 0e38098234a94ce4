"""Forward/backward pairs of the operations around attention and their registration with torch.library.

The norms also return their statistics, (2, T) or (1, T) in at least float32 as `norm_forward` says, which the backward
operations take; embed_norm also the rows that it took of its tables. None of these is differentiable.
"""

import torch
import torch.nn.functional as F

from leafkern.ops._core import launch
from leafkern.ops._core.backend import choose
from leafkern.ops._core.norm import norm_backward, norm_forward, summed_dtype
from leafkern.ops._core.normalize import at_least_float32, common_dtype
from leafkern.ops._core.registration import register

# The widest row that the kernels of the norms hold in registers; kernels.py can't be asked without triton.
WIDEST_NORM = 8192


def _backend(x: torch.Tensor, *others: torch.Tensor | None, norm: bool = False) -> str:
    candidates = launch.candidates("norm", x.device, *(y.dtype for y in (x, *others) if y is not None))
    if norm and x.shape[-1] > WIDEST_NORM and "triton" in candidates:
        candidates["triton"] = candidates["triton"] or f"D = {x.shape[-1]}; its kernel takes at most {WIDEST_NORM}"
    return choose("norm", candidates)


# add_norm, add_norm_sum


def _add_norm_sum(x, residual, weight, bias, eps, layer):
    if _backend(x, residual, weight, bias, norm=True) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.add_norm(x, residual, weight, bias, eps, layer, with_sum=True)
    h = x.clone(memory_format=torch.contiguous_format) if residual is None else (x + residual).contiguous()
    y, statistics = norm_forward(h, weight, bias, eps, layer)
    return y.to(h.dtype), h, statistics


def _add_norm(x, residual, weight, bias, eps, layer):
    if _backend(x, residual, weight, bias, norm=True) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.add_norm(x, residual, weight, bias, eps, layer, with_sum=False)
    h = x if residual is None else x + residual
    y, statistics = norm_forward(h, weight, bias, eps, layer)
    return y.to(h.dtype), statistics


def _add_norm_fake(x, residual, weight, bias, eps, layer):
    y = torch.empty(x.shape, device=x.device, dtype=summed_dtype(x, residual))
    return y, y.new_empty(2 if layer else 1, x.shape[0], dtype=at_least_float32(common_dtype(y, weight, bias)))


def _add_norm_sum_fake(x, residual, weight, bias, eps, layer):
    y, statistics = _add_norm_fake(x, residual, weight, bias, eps, layer)
    return y, torch.empty_like(y), statistics


def _add_norm_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.layer = inputs
    _, *summed, statistics = output
    ctx.dtypes = [None if y is None else y.dtype for y in (x, residual, weight, bias)]
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    # The sum, where there is one, is kept by whoever takes it: x and residual need not be.
    ctx.save_for_backward(*((*summed, None) if summed else (x, residual)), weight, statistics)


def _add_norm_grad(grad, grad_sum, x, residual, weight, statistics, layer):
    """Gradients of x + residual, in the wider dtype of the two, and of weight and bias, in that of the statistics."""
    if _backend(x, residual, grad, grad_sum, weight, norm=True) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.add_norm_backward(grad, grad_sum, x, residual, weight, statistics, layer)
    h = x if residual is None else x + residual
    dx, dweight, dbias = norm_backward(grad, h, statistics, weight, layer)
    if grad_sum is not None:
        dx = dx + grad_sum
    return dx.to(h.dtype), dweight.to(statistics.dtype), dbias.to(statistics.dtype)


def _add_norm_grad_fake(grad, grad_sum, x, residual, weight, statistics, layer):
    dx = torch.empty(x.shape, device=x.device, dtype=summed_dtype(x, residual))
    return dx, *(torch.empty(weight.shape, device=x.device, dtype=statistics.dtype) for _ in range(2))


register(
    "add_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor? residual, Tensor weight, Tensor statistics,"
    " bool layer) -> (Tensor, Tensor, Tensor)",
    _add_norm_grad,
    _add_norm_grad_fake,
)


def _add_norm_backward(ctx, grad, *further):
    *_, grad_sum, _ = (None, *further)
    x, residual, weight, statistics = ctx.saved_tensors
    if grad is None and grad_sum is None:
        return (None,) * 6
    if grad is None:
        grad = torch.zeros_like(grad_sum)
    dx, dweight, dbias = torch.ops.leafkern.add_norm_backward(
        grad, grad_sum, x, residual, weight, statistics, ctx.layer
    )
    grads = zip((dx, dx, dweight, dbias), ctx.dtypes, strict=True)
    return *(None if dtype is None else y.to(dtype) for y, dtype in grads), None, None


_ARGUMENTS = "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool layer)"
add_norm = register(
    f"add_norm{_ARGUMENTS} -> (Tensor out, Tensor statistics)",
    _add_norm,
    _add_norm_fake,
    setup_context=_add_norm_context,
    backward=_add_norm_backward,
)
add_norm_sum = register(
    f"add_norm_sum{_ARGUMENTS} -> (Tensor out, Tensor sum, Tensor statistics)",
    _add_norm_sum,
    _add_norm_sum_fake,
    setup_context=_add_norm_context,
    backward=_add_norm_backward,
)


# bias_gelu


def _approximate(tanh):
    return "tanh" if tanh else "none"


def _bias_gelu(x, bias, tanh):
    if _backend(x, bias) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.bias_gelu(x, bias, tanh)
    h = x if bias is None else x + bias
    return torch.ops.aten.gelu(h.contiguous(), approximate=_approximate(tanh)).to(x.dtype)


def _bias_gelu_fake(x, bias, tanh):
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


def _bias_gelu_context(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _bias_gelu_grad(grad, x, bias, tanh):
    """Gradients of x and, in at least float32, of the bias; without a bias that is (0,)."""
    if _backend(x, bias, grad) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.bias_gelu_backward(grad, x, bias, tanh)
    h = (x if bias is None else x + bias).contiguous()
    dh = torch.ops.aten.gelu_backward(grad.to(h.dtype).contiguous(), h, approximate=_approximate(tanh))
    dtype = at_least_float32(x.dtype)
    return dh.to(x.dtype), dh.new_empty(0, dtype=dtype) if bias is None else dh.sum(0, dtype=dtype)


def _bias_gelu_grad_fake(grad, x, bias, tanh):
    dbias = x.new_empty(0 if bias is None else x.shape[1], dtype=at_least_float32(x.dtype))
    return torch.empty(x.shape, device=x.device, dtype=x.dtype), dbias


register(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool tanh) -> (Tensor, Tensor)",
    _bias_gelu_grad,
    _bias_gelu_grad_fake,
)


def _bias_gelu_backward(ctx, grad):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.leafkern.bias_gelu_backward(grad, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias.to(bias.dtype), None


bias_gelu = register(
    "bias_gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    _bias_gelu,
    _bias_gelu_fake,
    setup_context=_bias_gelu_context,
    backward=_bias_gelu_backward,
)


# rotary


def _rotary(q, k, cos, sin, backwards):
    if _backend(q, k, cos, sin) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.rotary(q, k, cos, sin, backwards)
    dtype, half = common_dtype(q, cos, sin), q.shape[2] // 2
    cos, sin = (y[:, None, :half].to(dtype) for y in (cos, sin))
    sin = -sin if backwards else sin

    def rotated(x):
        first, second = x.to(dtype).chunk(2, -1)
        parts = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(parts, -1).to(x.dtype)

    return rotated(q), rotated(k)


def _rotary_fake(q, k, cos, sin, backwards):
    return tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))


def _rotary_context(ctx, inputs, output):
    *_, cos, sin, ctx.backwards = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx, dq, dk):
    return *torch.ops.leafkern.rotary(dq, dk, *ctx.saved_tensors, not ctx.backwards), None, None, None


rotary = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool backwards) -> (Tensor, Tensor)",
    _rotary,
    _rotary_fake,
    setup_context=_rotary_context,
    backward=_rotary_backward,
)


# embed_norm


def _table_rows(input_ids, cu_seqlens, word, position, token_type, token_type_ids):
    """(3, T) int32: the row of each table that a token takes, the nearest there is."""
    token = torch.arange(input_ids.shape[0], device=input_ids.device, dtype=cu_seqlens.dtype)
    begin = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    types = torch.zeros_like(token) if token_type_ids is None else token_type_ids
    rows = ((input_ids, word), (token - begin, position), (types, token_type))
    return torch.stack([row.clamp(0, table.shape[0] - 1).int() for row, table in rows])


def _embedded(rows, word, position, token_type):
    dtype = torch.promote_types(torch.promote_types(word.dtype, position.dtype), token_type.dtype)
    h = F.embedding(rows[0], word).to(dtype)
    return h.add_(F.embedding(rows[1], position)).add_(F.embedding(rows[2], token_type))


def _embed_norm(input_ids, cu_seqlens, word, position, token_type, weight, bias, eps, token_type_ids):
    if _backend(word, position, token_type, weight, bias, norm=True) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.embed_norm(input_ids, cu_seqlens, word, position, token_type, weight, bias, eps, token_type_ids)
    rows = _table_rows(input_ids, cu_seqlens, word, position, token_type, token_type_ids)
    y, statistics = norm_forward(_embedded(rows, word, position, token_type), weight, bias, eps, True)
    return y.to(word.dtype), statistics, rows


def _embed_norm_fake(input_ids, cu_seqlens, word, position, token_type, weight, bias, eps, token_type_ids):
    tokens, dtype = input_ids.shape[0], common_dtype(word, position, token_type, weight, bias)
    rows = torch.empty(3, tokens, device=word.device, dtype=torch.int32)
    return word.new_empty(tokens, word.shape[1]), word.new_empty(2, tokens, dtype=dtype), rows


def _embed_norm_context(ctx, inputs, output):
    _, _, word, position, token_type, weight, bias, _, token_type_ids = inputs
    _, statistics, rows = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.one_type = token_type_ids is None
    ctx.mark_non_differentiable(statistics, rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(statistics, rows, word, position, token_type, weight)


def _embed_norm_grad(grad, statistics, rows, word, position, token_type, weight):
    """Gradients of the sum of the embeddings, of weight and of bias, all in the dtype of the statistics: the tables'
    gradients are sums over many tokens."""
    if _backend(word, position, token_type, weight, grad, norm=True) == "triton":
        from leafkern.ops.norm import kernels

        return kernels.embed_norm_backward(grad, statistics, rows, word, position, token_type, weight)
    h = _embedded(rows, word, position, token_type).to(statistics.dtype)
    return norm_backward(grad, h, statistics, weight, True)


def _embed_norm_grad_fake(grad, statistics, rows, word, position, token_type, weight):
    return tuple(statistics.new_empty(shape) for shape in (grad.shape, weight.shape, weight.shape))


register(
    "embed_norm_backward(Tensor grad, Tensor statistics, Tensor rows, Tensor word, Tensor position,"
    " Tensor token_type, Tensor weight) -> (Tensor, Tensor, Tensor)",
    _embed_norm_grad,
    _embed_norm_grad_fake,
)


def _embed_norm_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    _, rows, *tables, weight = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.leafkern.embed_norm_backward(grad, *ctx.saved_tensors)
    found = []
    for place, table in enumerate(tables):
        if not ctx.needs_input_grad[2 + place]:
            found.append(None)
        elif place == 2 and ctx.one_type:
            rest = dx.new_zeros(table.shape[0] - 1, table.shape[1])
            found.append(torch.cat((dx.sum(0, keepdim=True), rest)).to(table.dtype))
        else:
            dense = torch.ops.aten.embedding_dense_backward(dx, rows[place], table.shape[0], -1, False)
            found.append(dense.to(table.dtype))
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return None, None, *found, dweight.to(weight.dtype), dbias, None, None


embed_norm = register(
    "embed_norm(Tensor input_ids, Tensor cu_seqlens, Tensor word, Tensor position, Tensor token_type, Tensor weight,"
    " Tensor? bias, float eps, Tensor? token_type_ids) -> (Tensor out, Tensor statistics, Tensor rows)",
    _embed_norm,
    _embed_norm_fake,
    setup_context=_embed_norm_context,
    backward=_embed_norm_backward,
)
