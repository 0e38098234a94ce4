"""A large batch's exact gradients in the memory of one chunk (GradCache, Gao et al., arXiv 2101.06983)."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch

from leafkern.errors import InputError
from leafkern.ops._core.checks import values_checked

# Of the norm of a chunk's vectors: what the two passes may differ by, well above what a parallel sum makes of a half
# precision and well below what another draw of dropout does.
_SAME_VECTORS = 0.02

Encode = Callable[[object], torch.Tensor]
NoSync = Callable[[], contextlib.AbstractContextManager]


def cached_backward(
    encode: Encode | Sequence[Encode],
    towers: Sequence[Iterable],
    loss: Callable[..., torch.Tensor],
    *,
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    generators: Sequence[torch.Generator] = (),
    no_sync: NoSync | None = None,
) -> torch.Tensor:
    """Adds to every parameter's `.grad` what `loss(*vectors).backward()` of the whole batch would, chunk by chunk.

    A loss over a batch, such as `info_nce` or `distill_loss`, needs all vectors at once, but not all activations: every
    chunk is encoded without a graph; the loss of all vectors gives its gradient by them; then every chunk is encoded
    again, with a graph, and takes its rows of that gradient. Memory: the vectors, their gradient, and the graph of one
    chunk; time: one more forward pass. The gradient is that of one big batch, not an approximation.

    encode: a chunk -> (b, ...) vectors, such as a model or a closure over it; or one for each tower. towers: for each
    argument of the loss (queries, positives, negatives) the chunks of its batch, in order: anything that `encode`
    takes, of any numbers of rows, also 0. loss: takes each tower's vectors, (B, ...), chunks joined; returns a scalar.
    It may have parameters of its own. A tower without gradient, such as a frozen teacher, is no tower: encode it before
    and let `loss` close over its vectors.
    scale: applied to the loss before its gradient is taken: `GradScaler.scale`, or a division where batches accumulate.

    Both passes draw the same random numbers (dropout): the states of torch's generators on the CPU and every GPU in
    use are kept for each chunk, those of `generators` too; afterwards they are as after one pass. Numbers from
    elsewhere must be the same again by themselves. What forward passes count (batch norm) is counted twice.
    Autocast: inside `encode`, or around this call.
    DistributedDataParallel: gradients are exchanged once, in the last chunk; every rank gives at least one chunk, and
    ranks may give different numbers of them. `encode` itself, or no_sync=model.no_sync for a closure over the model. A
    loss with gather="ranks" then is that of all ranks' rows, and so are the averaged gradients.

    Returns the loss, detached and not scaled. Raises InputError for a tower without chunks, vectors that don't fit
    together or have no gradient, a loss that is no scalar and, where values are checked (CPU, or LEAFKERN_CHECK=1), a
    second pass that gives other vectors than the first.

    >>> import torch
    >>> from leafkern.nn.gradcache import cached_backward
    >>> from leafkern.ops import info_nce
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout(0.1))
    >>> optimiser = torch.optim.AdamW(model.parameters())
    >>> queries, positives = torch.randn(1024, 16), torch.randn(1024, 16)
    >>> value = cached_backward(model, [queries.split(64), positives.split(64)], info_nce)
    >>> optimiser.step()
    >>> value.requires_grad
    False
    """
    towers = [list(chunks) for chunks in towers]
    encoders = [encode] * len(towers) if callable(encode) else list(encode)
    _check_towers(encoders, towers)
    random = _Random(generators)
    states, leaves, sizes = [], [], []
    with torch.no_grad():
        for place, (encoder, chunks) in enumerate(zip(encoders, towers)):
            parts = []
            for chunk in chunks:
                states.append(random.state())
                parts.append(encoder(chunk))
            _check_parts(place, parts)
            leaves.append(torch.cat(parts).requires_grad_())
            sizes.append([len(part) for part in parts])
            del parts
    # Where autocast is around this call, some versions of torch would give the second pass weights that it cast without
    # a graph (pytorch/pytorch#158232).
    torch.clear_autocast_cache()
    with torch.enable_grad():
        value = loss(*leaves)
        if not isinstance(value, torch.Tensor) or value.ndim:
            what = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"loss: expected a scalar tensor, got {what} (distill_loss: its field `total`)")
        (value if scale is None else scale(value)).backward()
    afterwards = random.state()
    syncs = [no_sync or getattr(encoder, "no_sync", None) for encoder in encoders]
    before = iter(states)
    try:
        for place, (encoder, chunks, leaf) in enumerate(zip(encoders, towers, leaves)):
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            rows = zip(leaf.detach().split(sizes[place]), gradient.split(sizes[place]))
            for number, (chunk, (first, wanted)) in enumerate(zip(chunks, rows)):
                last = number == len(chunks) - 1 and syncs[place] not in syncs[place + 1 :]
                quiet = contextlib.nullcontext() if last or syncs[place] is None else syncs[place]()
                random.restore(next(before))
                with quiet, torch.enable_grad():
                    again = encoder(chunk)
                    _check_again(place, number, first, again)
                    again.backward(wanted)
    finally:
        random.restore(afterwards)
    return value.detach()


class _Random:
    """The states of all generators that an encoder may draw from."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = [torch.default_generator, *generators]

    def state(self) -> list[torch.Tensor]:
        # A GPU that nothing has used yet has drawn nothing either.
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [*(generator.get_state() for generator in self.generators), *gpus]

    def restore(self, state: list[torch.Tensor]) -> None:
        count = len(self.generators)
        for generator, one in zip(self.generators, state):
            generator.set_state(one)
        if state[count:]:
            torch.cuda.set_rng_state_all(state[count:])


def _check_towers(encoders: Sequence[Encode], towers: Sequence[list]) -> None:
    if not towers or len(encoders) != len(towers):
        raise InputError(f"encode, towers: {len(encoders)} encoders for {len(towers)} towers; expected one for each")
    for place, chunks in enumerate(towers):
        if not chunks:
            raise InputError(f"towers[{place}]: has no chunks; expected one of 0 rows where there is nothing to encode")


def _check_parts(place: int, parts: list[torch.Tensor]) -> None:
    for part in parts:
        if not isinstance(part, torch.Tensor) or part.ndim < 2 or part.shape[1:] != parts[0].shape[1:]:
            what = f"shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
            raise InputError(f"encode: gave {what} for a chunk of towers[{place}]; expected (rows, ...), all alike")


def _check_again(place: int, number: int, first: torch.Tensor, again: torch.Tensor) -> None:
    where = f"chunk {number} of towers[{place}]"
    if not again.requires_grad:
        raise InputError(
            f"encode: gave vectors without gradient for {where}; encode what is not trained before this call, and let "
            "`loss` close over its vectors"
        )
    if again.shape != first.shape:
        raise InputError(f"encode: gave shape {tuple(first.shape)} for {where}, then {tuple(again.shape)}")
    if values_checked(again) and first.numel():
        difference = torch.linalg.vector_norm(again.detach().double() - first.double())
        if difference > _SAME_VECTORS * torch.linalg.vector_norm(first.double()):
            raise InputError(
                f"encode: gave other vectors for {where} the second time; it must draw random numbers from torch's "
                "generators, or from those in `generators`"
            )
