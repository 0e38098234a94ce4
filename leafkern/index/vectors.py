"""Vectors, ids and texts as callers give them to an index, checked and brought to one form."""

import json
import numbers
import tempfile
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from leafkern.console import Report, unseen
from leafkern.errors import InputError
from leafkern.files import TEMPORARY
from leafkern.ops import quantize
from leafkern.ops.quantization import CALIBRATION_ROWS, check_fits, default_ranges
from leafkern.textio import check_finite, is_unicode

BLOCK_VALUES = 1 << 22


def matrix(name: str, x: object) -> np.ndarray:
    """`x`, a floating-point numpy array or torch tensor (N, D), as numpy on the CPU."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if not isinstance(x, np.ndarray):
        raise InputError(f"{name}: expected a numpy array or torch tensor (N, D), got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] < 1 or x.dtype.kind != "f":
        raise InputError(f"{name}: expected a floating-point matrix (N, D), got {x.dtype} of shape {x.shape}")
    return x


def float32(x: np.ndarray) -> np.ndarray:
    """A copy; what is too large becomes infinity, which `check_finite` names."""
    with np.errstate(over="ignore"):
        return np.array(x, dtype=np.float32)


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x float32 (N, D) times a rotation (D, D).

    Summed in float64, so that it does not matter which rows come together.
    """
    return (x.double() @ rotation.double()).float()


def random_rotation(width: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix (D, D), float32, uniform over all: the QR of a Gaussian one, R's diagonal made positive."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return torch.from_numpy((q * np.where(np.diag(r) < 0, -1, 1)).astype(np.float32))


def _ranges(given: object) -> torch.Tensor:
    if not isinstance(given, np.ndarray | torch.Tensor):
        raise InputError(f"ranges: expected a numpy array or torch tensor (2, D), got {type(given).__name__}")
    given = torch.tensor(given) if isinstance(given, np.ndarray) else given.detach().cpu()  # a copy: it may be mapped
    return given.float()


class Rows:
    """`count` vectors of `width`, from a matrix or from an iterable of matrices (kept in a file meanwhile).

    A context manager; `blocks` may be called repeatedly. `given`: (2, D) that `ranges` returns, or None. `progress` is
    told of each pass over the rows. `rotation`, where it is set, is applied to what `blocks` gives.
    """

    def __init__(
        self, vectors: object, folder: Path, width: int | None, given: object = None, progress: Report = unseen
    ):
        self._file, self._progress = None, progress
        self.rotation: torch.Tensor | None = None
        self._given = None if given is None else _ranges(given)
        if isinstance(vectors, np.ndarray | torch.Tensor):
            self._values = matrix("vectors", vectors)
        elif isinstance(vectors, Iterable):
            self._file = tempfile.TemporaryFile(prefix=TEMPORARY, dir=folder)
            try:
                self._values = self._spooled(vectors, width)
            except BaseException:
                self._file.close()
                raise
        else:
            raise InputError(f"vectors: expected a matrix (N, D) or an iterable of them, got {type(vectors).__name__}")
        self.count, self.width = self._values.shape

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *error) -> None:
        self._values = None
        if self._file is not None:
            self._file.close()

    def _spooled(self, blocks: Iterable, width: int | None) -> np.ndarray:
        count = 0
        for block in blocks:
            block = matrix("vectors", block)
            width = block.shape[1] if width is None else width
            if block.shape[1] != width:
                raise InputError(f"vectors: a block of width {block.shape[1]}; expected {width}")
            block = float32(block)
            check_finite("vectors", block, count)
            self._file.write(np.ascontiguousarray(block))
            count += len(block)
        if width is None:
            raise InputError(
                "vectors: none at all, and nothing says their width; give it, or what has one: a .npy of shape (0, D), "
                "a .parquet of lists of a fixed size"
            )
        self._file.flush()
        if count == 0:
            return np.zeros((0, width), np.float32)
        return np.memmap(self._file, dtype=np.float32, mode="r", shape=(count, width))

    def part(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, as they were given: nothing is copied."""
        return self._values[start:stop]

    def blocks(self, doing: str) -> Iterator[torch.Tensor]:
        """Consecutive rows, float32; `doing` names the pass."""
        step = max(1, BLOCK_VALUES // self.width)
        for start in range(0, self.count, step):
            block = torch.from_numpy(float32(self._values[start : start + step]))
            yield block if self.rotation is None else rotated(block, self.rotation)
            self._progress(doing, min(start + step, self.count), self.count)

    def check_finite(self) -> None:
        """Refuses NaN and infinity, also where float32 makes it of a larger type's number."""
        start = 0
        for block in self.blocks("checking"):
            check_finite("vectors", block.numpy(), start)
            start += len(block)

    def ranges(self, precision: str) -> torch.Tensor:
        """Those given, else those that `quantize` takes for these vectors by itself: float32 (2, D)."""
        if self._given is not None:
            return self._given
        if self.count < CALIBRATION_ROWS:
            few = torch.cat([torch.zeros((0, self.width)), *self.blocks("taking ranges")])
            return default_ranges(few, precision, "vectors")
        low = torch.full((self.width,), float("inf"))
        high = -low
        for block in self.blocks("taking ranges"):
            low, high = torch.minimum(low, block.amin(0)), torch.maximum(high, block.amax(0))
        return torch.stack([low, high])

    def clipped(self, ranges: torch.Tensor) -> int:
        """How many values lie outside `ranges`."""
        blocks = self.blocks("comparing with the ranges")
        return sum(int(((block < ranges[0]) | (block > ranges[1])).sum()) for block in blocks)

    def codes(self, precision: str, ranges: torch.Tensor | None) -> Iterator[np.ndarray]:
        """The codes of `blocks`."""
        start = 0
        for block in self.blocks(f"writing {precision}"):
            if precision == "float16":  # as `quantize`, but with the row's number among all
                check_fits("vectors", block.half(), precision, start)
            yield quantize(block, precision, ranges=ranges).codes.numpy()
            start += len(block)


def id_array(ids: object) -> pa.Array:
    """`ids`, integers of 64 bits or strings, or an Arrow array of them, as an Arrow array of int64 or large_string."""
    if isinstance(ids, torch.Tensor):
        ids = ids.cpu().numpy()
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        ids = pa.chunked_array([ids] if isinstance(ids, pa.Array) else ids.chunks, ids.type).combine_chunks()
        _check_unicode("ids", ids)
        if ids.null_count == 0 and (pa.types.is_int64(ids.type) or pa.types.is_large_string(ids.type)):
            return ids
        ids = ids.to_pylist()
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InputError(f"ids: expected a sequence of int or str, got {type(ids).__name__}")
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise InputError(f"ids: expected one dimension, got shape {ids.shape}")
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "i":
        return pa.array(ids.astype(np.int64))
    values = list(ids)
    kind = str if values and isinstance(values[0], str) else numbers.Integral
    for row, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"ids: entry {row} is {value!r}; expected all int or all str")
    try:
        return pa.array(values, pa.large_string() if kind is str else pa.int64())
    except (OverflowError, pa.ArrowInvalid, UnicodeEncodeError) as error:
        raise InputError(f"ids: {error}") from None


def _check_unicode(name: str, strings: pa.Array | pa.ChunkedArray) -> None:
    """Arrow takes any bytes for strings."""
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{name}: {error}") from None


def check_distinct(ids: pa.Array) -> None:
    """Refuses ids of which one is given twice."""
    if len(ids.unique()) != len(ids):
        counted = pc.value_counts(ids)
        twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
        raise InputError(f"ids: {twice[0].as_py()!r} is given more than once ({len(twice)} such ids)")


def checked_texts(texts: object, count: int, kept: bool) -> pa.ChunkedArray | None:
    """Texts for `count` vectors, of an index that keeps texts or doesn't, as an Arrow array of large_string.

    texts: a sequence of str, an Arrow array of strings, which is not copied, or None.
    """
    if kept and count and texts is None:
        raise InputError("texts: the index keeps texts; give one per vector")
    if texts is None:
        return None
    if not kept:
        raise InputError("texts: the index was built without texts; build it anew to keep them")
    if isinstance(texts, str) or not isinstance(texts, Sized):
        raise InputError(f"texts: expected a sequence of str, got {type(texts).__name__}")
    if len(texts) != count:
        raise InputError(f"texts: {len(texts)} for {count} vectors; expected one each")
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)) or texts.null_count:
            raise InputError(f"texts: expected strings without nulls, got {texts.null_count} nulls in {texts.type}")
        _check_unicode("texts", texts)
        return (pa.chunked_array([texts]) if isinstance(texts, pa.Array) else texts).cast(pa.large_string())
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts: row {row} is {type(text).__name__}, not str")
        if not is_unicode(text):
            raise InputError(f"texts: row {row} holds a lone surrogate, which is no valid Unicode text")
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def checked_source(source: object) -> dict | None:
    """`source`, None or a dict that JSON gives back as it was."""
    try:
        if source is None or (
            isinstance(source, dict) and json.loads(json.dumps(source, ensure_ascii=False).encode()) == source
        ):
            return source
    except (TypeError, ValueError):
        pass
    raise InputError(f"source: expected a dict that JSON holds as it is, got {source!r:.80}")
