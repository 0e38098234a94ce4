"""Packed batches: the tokens of all sequences end to end, without padding, and the way in and out of padding."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from leafkern.errors import InputError


class PackedBatch(NamedTuple):
    """B sequences of T tokens in all, end to end.

    input_ids: (T,) int64. cu_seqlens: (B+1,) int32, from 0 to T; sequence b is the tokens cu_seqlens[b] to
    cu_seqlens[b+1] - 1 and may be empty. max_seqlen: the longest sequence. token_type_ids: None (all zero) or (T,).
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    token_type_ids: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        """On `device`; from the CPU to a GPU through pinned memory, so that the host need not wait for the copy."""
        device = torch.device(device)

        def moved(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else pinned(x, device).to(device, non_blocking=True)

        return PackedBatch(moved(self.input_ids), moved(self.cu_seqlens), self.max_seqlen, moved(self.token_type_ids))


def pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` where a copy to `device` can run beside the host: pinned if it goes from the CPU to a GPU."""
    return x.pin_memory() if x.device.type == "cpu" and device.type == "cuda" else x


def pack(token_ids: Sequence[np.ndarray]) -> PackedBatch:
    """The token ids of B sequences (1-D integer arrays) as one batch on the CPU."""
    for row, ids in enumerate(token_ids):
        if np.ndim(ids) != 1:
            raise InputError(f"token_ids: row {row} has shape {np.shape(ids)}; expected one dimension")
    lengths = np.fromiter((len(ids) for ids in token_ids), np.int64, len(token_ids))
    cu_seqlens = np.zeros(len(token_ids) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    packed = np.concatenate(token_ids).astype(np.int64) if len(token_ids) else np.empty(0, np.int64)
    return PackedBatch(torch.from_numpy(packed), torch.from_numpy(cu_seqlens), int(lengths.max(initial=0)))


class Padding:
    """Where each packed token stands in the padded (B, L) form of a batch; L is the longest sequence.

    The gradients of `pad` and `unpad` are each other's gather, so no scatter-add is needed and both are
    deterministic on every device.
    """

    def __init__(self, batch: PackedBatch):
        self.tokens = batch.input_ids.numel()
        self.size = batch.size
        self.longest = batch.max_seqlen
        self.cu_seqlens = batch.cu_seqlens.long()
        # Known from the shapes alone: no synchronisation with a GPU.
        self.trivial = self.tokens == self.size * self.longest

    @cached_property
    def lengths(self) -> torch.Tensor:
        return self.cu_seqlens.diff()

    @cached_property
    def sequence(self) -> torch.Tensor:
        """(T,): the sequence of each token."""
        numbers = torch.arange(self.size, device=self.cu_seqlens.device)
        return torch.repeat_interleave(numbers, self.lengths, output_size=self.tokens)

    @cached_property
    def position(self) -> torch.Tensor:
        """(T,): the place of each token in its sequence."""
        return torch.arange(self.tokens, device=self.cu_seqlens.device) - self.cu_seqlens[self.sequence]

    @cached_property
    def place(self) -> torch.Tensor:
        """(T,): row of each token in the padded form flattened to (B·L, …)."""
        return self.sequence * self.longest + self.position

    @cached_property
    def mask(self) -> torch.Tensor:
        """(B, L) bool: True at tokens."""
        return torch.arange(self.longest, device=self.cu_seqlens.device) < self.lengths[:, None]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(T, …) -> (B, L, …), zeros where there is no token."""
        if not self.trivial:
            x = spread_rows(x, self.place, self.size * self.longest)
        return x.view(self.size, self.longest, *x.shape[1:])

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, …) -> (T, …)."""
        x = x.reshape(self.size * self.longest, *x.shape[2:])
        return x if self.trivial else take_rows(x, self.place)


def spread_rows(x: torch.Tensor, place: torch.Tensor, rows: int) -> torch.Tensor:
    """(T, …) -> (rows, …): row i of `x` at place[i], no two at one; zeros elsewhere. Its gradient is a gather."""
    return _Spread.apply(x, place, rows)


def take_rows(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(rows, …) -> (T, …): the rows at `place`, none twice. Its gradient needs no sum."""
    return _Take.apply(x, place)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place, rows):
        ctx.save_for_backward(place)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        ctx.rows = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, place, grad), None
