"""Rows as the Triton kernels of search take them, and a base elsewhere, as in CPU memory, brought over in pieces.

The processor copies a piece to pinned memory, the GPU fetches it on a stream of its own, and searches it while the
next two are under way. The host waits for the copies, for the pinned memory is used again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from leafkern.ops.retrieval import reference

PIECE_BYTES = 64 << 20
# One is searched, one copied.
PIECES = 2


@dataclass(frozen=True)
class Base:
    """rows (N, ...) of codes or floats, adjacent within a row. form, flip: as in `device`; scale float32 and allowed
    bool (N,) or None: on the device of the rows."""

    rows: torch.Tensor
    form: str
    flip: bool
    scale: torch.Tensor | None
    allowed: torch.Tensor | None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def plain(self) -> "Base":
        """Scale and allowed without gaps, the latter as bytes, which every version of Triton takes alike."""
        scale, allowed = (None if x is None else x.contiguous() for x in (self.scale, self.allowed))
        return self.with_tensors(self.rows, scale, None if allowed is None else allowed.view(torch.uint8))

    def words(self) -> torch.Tensor | None:
        """The rows as words of 32 bits; None where they don't begin at such."""
        whole = self.rows.shape[1] % 4 == 0 and self.rows.stride(0) % 4 == 0
        return self.rows.view(torch.uint32) if whole and self.rows.data_ptr() % 4 == 0 else None

    def tensors(self) -> list[torch.Tensor | None]:
        return [self.rows, self.scale, self.allowed]

    def with_tensors(self, rows, scale, allowed) -> "Base":
        return Base(rows, self.form, self.flip, scale, allowed)


def best_keys(base: Base, k: int, device: torch.device, search: Callable[[Base], torch.Tensor]) -> torch.Tensor:
    """The keys (Q, min(k, N)) of the best rows of `base`, best first; `search` gives those of a piece on `device`."""
    best = None
    for first, piece in _pieces(base, device):
        keys = search(piece)
        keys = torch.where(keys == reference.NO_ROW, keys, keys - first)
        best = keys if best is None else torch.cat([best, keys], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return best


def _pieces(base: Base, device: torch.device) -> Iterator[tuple[int, Base]]:
    """(first row, piece on `device`); a piece is good until the next but one is asked for."""
    step = max(1, PIECE_BYTES // max(1, base.rows[:1].nbytes))
    slots = [_Slot(base, min(step, len(base)), device) for _ in range(PIECES)]
    for place, first in enumerate(range(0, len(base), step)):
        slot = slots[place % PIECES]
        yield first, base.with_tensors(*slot.filled(first, min(first + step, len(base))))
        slot.release()


class _Slot:
    """Memory for one piece, on `device` and, pinned, before it."""

    def __init__(self, base: Base, step: int, device: torch.device):
        self.sources = base.tensors()
        shapes = [None if x is None else (step, *x.shape[1:]) for x in self.sources]
        self.pinned, self.near = (
            [x if x is None else torch.empty(s, dtype=x.dtype, **where) for x, s in zip(self.sources, shapes)]
            for where in ({"device": "cpu", "pin_memory": True}, {"device": device})
        )
        self.searching = torch.cuda.current_stream(device)
        self.copying = torch.cuda.Stream(device)
        self.copied, self.searched = torch.cuda.Event(), torch.cuda.Event()
        self.release()

    def filled(self, first: int, stop: int) -> list[torch.Tensor | None]:
        # Until the last piece has left the pinned memory.
        self.copied.synchronize()
        self.copying.wait_event(self.searched)
        found = []
        for source, pinned, near in zip(self.sources, self.pinned, self.near):
            if source is None:
                found.append(None)
                continue
            pinned[: stop - first].copy_(source[first:stop])
            with torch.cuda.stream(self.copying):
                found.append(near[: stop - first].copy_(pinned[: stop - first], non_blocking=True))
        self.copied.record(self.copying)
        self.searching.wait_event(self.copied)
        return found

    def release(self) -> None:
        self.searched.record(self.searching)
