"""Layer and RMS normalisation of rows: checks, definition, forward and backward pass by PyTorch's own kernels."""

import torch

from leafkern.errors import InputError, unknown_name
from leafkern.ops._core.checks import check_floating
from leafkern.ops._core.normalize import at_least_float32, common_dtype

NORMS = ("layer", "rms")


def check_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str = "layer",
) -> float:
    """`eps` as a float, if the other arguments are those of norm(x + residual) over the last dimension of x."""
    if residual is not None and check_floating("residual", residual).shape != x.shape:
        raise InputError(f"residual: shape {tuple(residual.shape)}; expected that of x, {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None and name == "bias":
            continue
        if check_floating(name, vector, ndim=1).shape[0] != x.shape[-1]:
            raise InputError(f"{name}: {vector.shape[0]} entries; expected D = {x.shape[-1]}")
    if kind not in NORMS:
        raise unknown_name("kind", kind, NORMS)
    if not eps >= 0:
        raise InputError(f"eps: {eps}; expected a number that is not negative")
    return float(eps)


def summed_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    """The dtype of x + residual."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def brute_norm(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: str) -> torch.Tensor:
    """The norm over the last dimension as its formula says, in the dtype of h and at least float32."""
    dtype = at_least_float32(h.dtype)
    h = h.to(dtype)
    if kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    y = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _native(*rows: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """`rows` as torch's layer norm takes them beside a weight of `dtype`: on the CPU, half precision as it is."""
    kept = (torch.float16, torch.bfloat16) if dtype == torch.float32 else ()
    return [x if x.is_cpu and x.dtype in kept else x.to(dtype) for x in rows]


def norm_forward(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, layer: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the rows of h (T, D), in at most the common dtype; statistics (2, T): mean and 1 / deviation, or (1, T),
    1 / root mean square), the statistics in at least float32."""
    dtype = common_dtype(h, weight, bias)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if layer:
        (h,) = _native(h, dtype=dtype)
        y, mean, inverse = torch.ops.aten.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
        return y, torch.cat((mean.T, inverse.T))
    h = h.to(dtype)
    inverse = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    y = (h * inverse).mul_(weight)
    return y if bias is None else y.add_(bias), inverse.T.contiguous()


def norm_backward(
    grad: torch.Tensor, h: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor, layer: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with respect to h, weight and bias, given that of norm_forward's result and its statistics."""
    dtype = common_dtype(h, weight)
    weight, inverse = weight.to(dtype), statistics[-1][:, None]
    if layer:
        grad, h = _native(grad.to(h.dtype), h, dtype=dtype)
        mean, wanted = statistics[0][:, None], [True] * 3
        # Of the bias, its kernel looks only at the shape and dtype, which are those of the weight.
        return torch.ops.aten.native_layer_norm_backward(grad, h, h.shape[-1:], mean, inverse, weight, weight, wanted)
    grad, unit = grad.to(dtype), h.to(dtype) * inverse
    inner = grad * weight
    projected = inner - unit * (inner * unit).mean(-1, keepdim=True)
    return projected * inverse, (grad * unit).sum(0), grad.sum(0)
