"""Registration of operations with torch.library: define + implementation + fake, and autograd where differentiable.

Registered operations (`torch.ops.leafkern.*`) take tensors, ints, floats and lists, and return tensors or tuples of
tensors. They serve torch.compile; eager calls bypass the dispatcher, which costs more than a small kernel.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("leafkern", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `torch.ops.leafkern.<name>` and returns the function to call in its place.

    schema: "name(Tensor x, int k) -> Tensor". `implementation` serves every device and must return new tensors,
    never its inputs or views of them; `fake` returns empty tensors of the same shapes, dtypes and devices.
    For a differentiable operation, `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` have the meaning
    that they have in `torch.autograd.Function`, which eager calls go through. `backward` must itself be made of
    registered or torch operations: torch.compile traces it.
    """
    name = schema.partition("(")[0].strip()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leafkern::{name}", fake, lib=_LIBRARY)
    eager = implementation
    if backward is not None:
        torch.library.register_autograd(f"leafkern::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        parts = {"forward": implementation, "setup_context": setup_context, "backward": backward}
        members = {part: staticmethod(function) for part, function in parts.items()}
        eager = type(name, (torch.autograd.Function,), members).apply
    registered = getattr(torch.ops.leafkern, name).default

    def call(*args):
        return registered(*args) if torch.compiler.is_compiling() else eager(*args)

    call.__name__ = call.__qualname__ = name
    return call
