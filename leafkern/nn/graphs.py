"""CUDA graphs of a sentence model, one per bucket of sizes: a forward pass without Python's cost of launching.

A small encoder makes about fifty launches per batch, which can cost Python more time than the GPU. A graph replays them
at once, but for fixed shapes: a batch is copied into the buffers of the next larger bucket, whose other tokens make
sequences of their own behind it. Not timed yet.
"""

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from leafkern.nn.packed import PackedBatch, pinned
from leafkern.ops._core.checks import values_checked
from leafkern.ops._core.launch import next_power_of_2, on_device

# Above, the GPU takes longer than Python, and a bucket's unused part would cost more than launching.
MOST_TOKENS = 16384
# Graphs kept; what they hold beside their inputs and outputs is shared.
MOST_GRAPHS = 64
_LEAST = 16
# A capture waits for the whole device before it begins, which would spoil another that is under way.
_capturing = threading.Lock()

Result = TypeVar("Result")


def token_bucket(tokens: int) -> int:
    """The next multiple of an eighth of the power of two below, at least 16: at most an eighth more than `tokens`."""
    step = max(_LEAST, next_power_of_2(max(tokens, 1)) // 16)
    return max(1, -(-tokens // step)) * step


def bucket(batch: PackedBatch, longest: int) -> tuple[int, int, int]:
    """(tokens, sequences, max_seqlen) of the smallest bucket that holds `batch`; `longest`: what the model takes."""
    tokens = batch.input_ids.numel()
    length = max(_LEAST, next_power_of_2(max(batch.max_seqlen, 1)))
    length = max(batch.max_seqlen, min(length, longest))
    whole = token_bucket(tokens)
    return whole, next_power_of_2(max(batch.size + -(-(whole - tokens) // length), 1)), length


@functools.cache
def _beside(device: int) -> torch.cuda.Stream:
    """The stream on which what is captured runs first; one for all, as cuBLAS keeps a workspace for each it meets."""
    return torch.cuda.Stream(device)


@functools.cache
def _apart(device: int, pool: tuple[int, int]) -> torch.cuda.Stream:
    """The stream on which graphs of one pool are captured: for they keep its workspace, and other pools' graphs may be
    replayed at the same time."""
    return torch.cuda.Stream(device)


def capture(call: Callable[[], Result], pool=None) -> Callable[[], Result]:
    """`call` as a CUDA graph: a function that replays it and returns its result, which the next replay overwrites.

    `call` takes no arguments, does the same launches every time and never waits for the GPU. It runs twice first, so
    that what compiles or allocates once has done so. pool: of `torch.cuda.graph_pool_handle`, for graphs that are never
    replayed at the same time. Other threads may launch and allocate meanwhile, but not wait for the whole device.
    """
    with _capturing:
        return _capture(call, pool)


def _capture(call: Callable[[], Result], pool) -> Callable[[], Result]:
    device = torch.cuda.current_device()
    stream = None if pool is None else _apart(device, pool)
    pool = pool or torch.cuda.graph_pool_handle()
    current, side = torch.cuda.current_stream(), _beside(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    try:
        # The outer one, as a capture that fails leaves its own stream current.
        with torch.cuda.stream(current), captured:
            out = call()
    except BaseException:
        # torch 2.11's allocator believes for ever that a capture that failed goes on, and refuses every later one.
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
        raise

    def replay() -> Result:
        graph.replay()
        return out

    return replay


@dataclass
class _Captured:
    """A graph and the buffers that it reads; `weights` keeps the memory of those that it reads as well."""

    batch: PackedBatch
    steps: torch.Tensor
    replay: Callable[[], torch.Tensor]
    addresses: list[int]
    weights: list[torch.Tensor]


class GraphedModel:
    """A sentence model for inference, replayed from graphs where that is faster: PackedBatch -> (B, dim).

    module: a SentenceModel in eval mode on a CUDA device, whose forward pass doesn't wait for the GPU. Batches may be
    on the CPU (they are copied through pinned memory) or on the device. The second batch of a bucket captures its
    graph; the first one and those above MOST_TOKENS run as they are, and all where values are checked (LEAFKERN_CHECK),
    which waits. Weights may change in place; replaced ones, and another autocast dtype, capture anew (a replaced part
    of the module is not seen: make another GraphedModel). Where capturing fails, a warning says why, and from then on
    everything runs as it is. Threads may share it, and take turns. The result is the caller's own, without a gradient.
    """

    def __init__(self, module: nn.Module, *, capture: Callable = capture):
        self.module = module
        self._capture = capture
        self._known: OrderedDict[tuple, _Captured | None] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = self._stream = None
        # Asking the module for its parameters takes longer than replaying a small graph.
        self._places = [(part._parameters, name) for part in module.modules() for name in part._parameters]

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        weights = self._weights()
        weight = weights[0]
        # Buffers and results outlive a caller's inference mode, so they must not be made in it.
        with torch.inference_mode(False), torch.no_grad(), on_device(weight):
            fits = 0 < batch.input_ids.numel() <= MOST_TOKENS and batch.token_type_ids is None
            waits = weight.is_cuda and values_checked(weight)
            if not fits or waits or self._capture is None:
                return self.module(batch.to(weight.device))
            with self._lock:
                return self._replayed(batch, weights)

    def _replayed(self, batch: PackedBatch, weights: list[torch.Tensor]) -> torch.Tensor:
        device = weights[0].device
        narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (*bucket(batch, self.module.backbone.max_length), narrow)
        if key not in self._known:
            self._known[key] = None
            if len(self._known) > MOST_GRAPHS:
                _, dropped = self._known.popitem(last=False)
                if dropped is not None and self._stream is not None:
                    # It may still be read there, and the allocator would give its memory to whoever asks.
                    self._stream.synchronize()
            return self.module(batch.to(device))
        self._known.move_to_end(key)
        if device.type == "cuda":
            # The buffers may still be in use on the stream of another caller.
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
        captured = self._known[key]
        if captured is None or captured.addresses != [x.data_ptr() for x in weights]:
            try:
                captured = self._known[key] = self._captured(key, batch, weights)
            except RuntimeError as error:
                self._capture = None
                self._known.clear()
                warnings.warn(f"no CUDA graphs for this model, whose launches are slower: {error}", stacklevel=4)
                return self.module(batch.to(device))
        _fill(captured.batch, captured.steps, batch)
        return captured.replay()[: batch.size].clone()

    def _weights(self) -> list[torch.Tensor]:
        return [x for parameters, name in self._places if (x := parameters[name]) is not None]

    def _captured(self, key: tuple, batch: PackedBatch, weights: list[torch.Tensor]) -> _Captured:
        (tokens, sequences, longest, narrow), device = key, weights[0].device
        ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        bounds = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        steps = torch.arange(1, sequences + 1, dtype=torch.int32, device=device) * longest
        static = PackedBatch(ids, bounds, longest)
        _fill(static, steps, batch)
        if device.type == "cuda" and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Autocast keeps narrowed weights until its context ends; a graph must not read them from there.
        with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None, cache_enabled=False):
            replay = self._capture(lambda: self.module(static), self._pool)
        return _Captured(static, steps, replay, [x.data_ptr() for x in weights], [x.detach() for x in weights])


def _fill(static: PackedBatch, steps: torch.Tensor, batch: PackedBatch) -> None:
    """Copies `batch` to the front of the buffers. Tokens behind it stay as they are, in sequences as long as may be.

    steps: 1, 2, 3, ... times the longest length.
    """
    tokens, sequences, device = batch.input_ids.numel(), batch.size, static.input_ids.device
    static.input_ids[:tokens].copy_(pinned(batch.input_ids, device), non_blocking=True)
    static.cu_seqlens[: sequences + 1].copy_(pinned(batch.cu_seqlens, device), non_blocking=True)
    behind = static.cu_seqlens[sequences + 1 :]
    if len(behind):
        torch.add(steps[: len(behind)], tokens, out=behind).clamp_(max=static.input_ids.numel())
