"""Autotuning of the Triton kernels of attention, on request: LEAFKERN_AUTOTUNE=1.

On CUDA, the first call for a key times the candidates on its own tensors, which waits for the host, and the fastest
serves that key for the life of the process. Nothing is printed or kept on disk. Nothing is timed while a CUDA graph is
captured or torch.compile traces: then what was found earlier serves, else the heuristic. Blocks decide the order of
sums, so with autotuning results may differ within rounding from process to process.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

Choice = TypeVar("Choice")
_found: dict[Hashable, object] = {}


def requested(device: torch.device) -> bool:
    """Whether calls on `device` are to be tuned."""
    return device.type == "cuda" and os.environ.get("LEAFKERN_AUTOTUNE") == "1"


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of `run` on the current device."""
    return do_bench(run, warmup=5, rep=20, return_mode="median")


def fastest(key: Hashable, candidates: Callable[[], Sequence[Choice]], run: Callable[[Choice], object]) -> Choice:
    """The candidate for which `run` is fastest, timed once per key; the first, for now, where nothing can be timed.

    `run` must leave the same result however often it is called. A candidate that doesn't fit the GPU is passed over;
    at least the first must fit.
    """
    if key in _found:
        return _found[key]
    choices = candidates()
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return choices[0]
    times = {choice: _time(run, choice) for choice in choices}
    return _found.setdefault(key, min(times, key=times.get))


def _time(run: Callable[[Choice], object], choice: Choice) -> float:
    try:
        return milliseconds(lambda: run(choice))
    except (OutOfResources, PTXASError):
        return float("inf")
