"""Registration of operations with torch.library: define + implementation + fake, and autograd where differentiable.

Registered operations (`torch.ops.leafkern.*`) take tensors, ints, floats and lists, and return tensors or tuples of
tensors. They serve torch.compile; eager calls bypass the dispatcher, which costs more than a small kernel. Autocast is
off inside: an operation chooses its own precision.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch

_LIBRARY = torch.library.Library("leafkern", "FRAGMENT")


def without_autocast(function: Callable) -> Callable:
    """`function` with autocast off, whatever the caller's state."""

    @functools.wraps(function)
    def plain(*args, **options):
        active = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not active:
            return function(*args, **options)
        with torch.autocast(active[0], enabled=False), torch.autocast(active[-1], enabled=False):
            return function(*args, **options)

    # torch asks for it at every call of an autograd.Function, and takes longer to find it than some kernels to run.
    plain.__signature__ = inspect.signature(function)
    return plain


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient, tied to the tensors that it depends on: to differentiate it again raises."""

    @staticmethod
    def forward(grad, *depends_on):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("leafkern's operations can be differentiated once: there is no second derivative")


def once_differentiable(backward: Callable) -> Callable:
    """`backward` without a graph of its own; where create_graph=True asks for one, its use raises.

    A gradient depends on the incoming ones and on saved tensors. (torch's decorator of this name looks at the former
    alone, so that a gradient penalty would silently count as a constant.)
    """

    def plain(ctx, *grads):
        ctx.graph_wanted = torch.is_grad_enabled()
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not ctx.graph_wanted:
            return outputs
        depends_on = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(x if x is None else _NoSecondDerivative.apply(x, *depends_on) for x in several)

    return plain


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    eager_backward: Callable | None = None,
) -> Callable:
    """Registers `torch.ops.leafkern.<name>` and returns the function to call in its place.

    schema: "name(Tensor x, int k) -> Tensor". `implementation` serves every device and must return new tensors,
    never its inputs or views of them; `fake` returns empty tensors of the same shapes, dtypes and devices.
    For a differentiable operation, `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` have the meaning
    that they have in `torch.autograd.Function`, which eager calls go through. Save every tensor that the gradient
    depends on: by these, a second derivative is refused (under torch.compile it is not, and must not be taken).
    `backward` must itself be made of registered or torch operations: torch.compile traces it. `eager_backward`: its
    place in eager calls, where nobody else holds what the operation returned.
    """
    name = schema.partition("(")[0].strip()
    implementation = without_autocast(implementation)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leafkern::{name}", fake, lib=_LIBRARY)
    eager = implementation
    if backward is not None:
        eager_backward = once_differentiable(without_autocast(eager_backward or backward))
        backward = once_differentiable(without_autocast(backward))
        torch.library.register_autograd(f"leafkern::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        parts = {"forward": implementation, "setup_context": setup_context, "backward": eager_backward}
        members = {part: staticmethod(function) for part, function in parts.items()}
        eager = type(name, (torch.autograd.Function,), members).apply
    registered = getattr(torch.ops.leafkern, name).default

    def call(*args):
        if torch.compiler.is_compiling():
            return registered(*args)
        return eager(*args) if torch.is_grad_enabled() else implementation(*args)

    call.__name__ = call.__qualname__ = name
    return call


def register_loss(schema: str, implementation: Callable, fake: Callable, *, differentiable: Sequence[int]) -> Callable:
    """Registers a scalar loss that computes its gradient together with its value.

    The operation returns (loss, ..., one gradient for each place in `differentiable`).
    Only the loss is differentiable. A gradient is that of the loss, shaped like its argument, in at least float32, so
    that a loss scale is applied before rounding to half precision; its last schema argument, `bool[] needs` (from
    `needs_gradient`), tells which are wanted: the others are returned as empty (0,). In eager calls the gradients exist
    once: the backward pass hands them on, unless the graph is kept.
    """

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.meta = [None if inputs[place] is None else inputs[place].dtype for place in differentiable]
        gradients = output[len(output) - len(differentiable) :]
        ctx.needs = list(inputs[-1])
        ctx.mark_non_differentiable(*output[1:])
        # The arguments are not needed for the gradient, but it depends on them: see `once_differentiable`.
        ctx.save_for_backward(*gradients, *(inputs[place] for place in differentiable))

    def scaled(ctx, grad, spend):
        # Registered operations want a list of None for a list of tensors, whose entry here is a list too.
        grads = [[None] * len(need) if isinstance(need, list) else None for need in ctx.needs_input_grad]
        if grad is not None:
            gradients = ctx.saved_tensors[: len(differentiable)]
            for place, dtype, wanted, saved in zip(differentiable, ctx.meta, ctx.needs, gradients, strict=True):
                if wanted:
                    grads[place] = (saved.mul_(grad) if spend else grad * saved).to(dtype)
                elif dtype is not None and ctx.needs_input_grad[place]:
                    raise RuntimeError(f"{name}: called with needs=False for an argument whose gradient is asked for")
        return tuple(grads)

    def backward(ctx, grad, *_):
        return scaled(ctx, grad, spend=False)

    def eager_backward(ctx, grad, *_):
        return scaled(ctx, grad, spend=not ctx.graph_wanted and _last_and_single(grad))

    name = schema.partition("(")[0].strip()
    return register(
        schema, implementation, fake, setup_context=setup_context, backward=backward, eager_backward=eager_backward
    )


def _last_and_single(grad: torch.Tensor | None) -> bool:
    """Whether this backward pass is the graph's last, and for one number, not a batch (is_grads_batched=True)."""
    try:
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        return not kept and grad is not None and not torch._C._functorch.is_legacy_batchedtensor(grad)
    except AttributeError:
        # Torch's own names, which another version may lack: then nothing is overwritten.
        return False


def needs_gradient(*tensors: torch.Tensor | None) -> list[bool]:
    """Which of `tensors` a backward pass may reach."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
