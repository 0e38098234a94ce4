"""One segment of an index on disk: a safetensors file that is memory-mapped, never read to be opened.

Tensors start at multiples of 64 bytes of the file, so that kernels get aligned rows; a tensor named "_pad…" fills each
gap, for the format allows none. Strings are kept as Arrow's large_string: offsets int64 (N+1,) and UTF-8 bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import safetensors
import torch

from leafkern import files
from leafkern.errors import DamagedFileError
from leafkern.files import atomic_file
from leafkern.textio import safetensors_header

FORMAT = "leafkern-index-segment"
_ALIGNMENT = 64
_HASH_BLOCK = 1 << 22


class Column(NamedTuple):
    """An array of known dtype and shape, whose rows come in blocks."""

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]

    @staticmethod
    def of(array: np.ndarray) -> "Column":
        return Column(array.dtype, array.shape, (array,))


def write(path: Path, columns: Mapping[str, Column], metadata: dict[str, str]) -> tuple[int, str]:
    """Writes a segment atomically; its size in bytes and the SHA-256 of its content."""
    arrays: dict[str, tuple[np.dtype, Sequence[int]]] = {}
    for name, column in columns.items():
        arrays[name] = column.dtype, column.shape
        gap = -_size(column) % _ALIGNMENT
        if gap:
            arrays[f"_pad-{name}"] = np.dtype(np.uint8), (gap,)
    digest, written = hashlib.sha256(), 0
    with atomic_file(path) as temporary, open(temporary, "wb") as stream:

        def put(data) -> None:
            nonlocal written
            files.on_step("write", temporary)
            digest.update(data)
            stream.write(data)
            written += len(data)

        put(safetensors_header(arrays, {"format": FORMAT, **metadata}))
        for column in columns.values():
            start = written
            for block in column.blocks:
                if block.size:
                    put(memoryview(np.ascontiguousarray(block)).cast("B"))
            if written - start != _size(column):
                raise RuntimeError(f"{path}: a column of {_size(column)} bytes got {written - start}")
            put(bytes(-written % _ALIGNMENT))
        stream.flush()
    return written, digest.hexdigest()


def _size(column: Column) -> int:
    return int(np.prod(column.shape, dtype=np.int64)) * np.dtype(column.dtype).itemsize


def checksum(path: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file; `read` is told of every block's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def open_mapped(
    path: Path, size: int, metadata: dict[str, str], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]
) -> dict[str, torch.Tensor]:
    """The tensors of a segment, memory-mapped. `expected`: dtype and shape (None: any length, 1-D) of each.

    Raises DamagedFileError, naming the file, when it is missing, truncated, not a segment, or not this index's.
    """
    missing = f"{path}: the manifest names this file, but it is missing"
    try:
        found = path.stat().st_size
        if found != size:
            raise DamagedFileError(f"{path}: {found} bytes, the manifest says {size}: truncated or altered")
        with safetensors.safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("_pad")}
    except FileNotFoundError:
        raise DamagedFileError(missing) from None
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a segment of an index ({error})") from None
    except RuntimeError:  # torch opens the file a second time; a writer may have removed it just now
        if path.exists():
            raise
        raise DamagedFileError(missing) from None
    for key, value in {"format": FORMAT, **metadata}.items():
        if stored.get(key) != value:
            raise DamagedFileError(f"{path}: not a segment of this index ({key}: {stored.get(key)!r}, not {value!r})")
    if set(tensors) != set(expected):
        raise DamagedFileError(f"{path}: holds {sorted(tensors)}, expected {sorted(expected)}")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or (tensor.ndim != 1 if shape is None else tuple(tensor.shape) != shape):
            raise DamagedFileError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    return tensors


def string_columns(name: str, strings: pa.LargeStringArray | pa.ChunkedArray) -> dict[str, Column]:
    """The two columns that hold `strings`: views of them, but for the ends of several chunks."""
    chunks = strings.chunks if isinstance(strings, pa.ChunkedArray) else [strings]
    ends, contents, total = [np.zeros(1, np.int64)], [np.zeros(0, np.uint8)], 0
    for chunk in filter(len, chunks):
        _, offsets, data = chunk.buffers()
        inside = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        content = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        contents.append(content[inside[0] : inside[-1]])
        ends.append(inside[1:] - inside[0] + total)
        total += len(contents[-1])
    size = np.dtype(np.uint8), (total,)
    return {f"{name}_ends": Column.of(np.concatenate(ends)), f"{name}_bytes": Column(*size, contents)}


def string_expected(name: str, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    return {f"{name}_ends": (torch.int64, (rows + 1,)), f"{name}_bytes": (torch.uint8, None)}


def strings_at(tensors: Mapping[str, torch.Tensor], name: str, rows: np.ndarray, path: Path) -> np.ndarray:
    """The strings of `rows`, as an object array of the same shape; reads only these."""
    ends, content = tensors[f"{name}_ends"].numpy(), tensors[f"{name}_bytes"].numpy()
    out = np.empty(rows.shape, dtype=object)
    for where, row in np.ndenumerate(rows):
        start, end = int(ends[row]), int(ends[row + 1])
        try:
            if not 0 <= start <= end <= len(content):
                raise ValueError(f"runs from byte {start} to {end} of {len(content)}")
            out[where] = content[start:end].tobytes().decode("utf-8")
        except ValueError as error:
            raise DamagedFileError(f"{path}: {name} of row {row} is damaged ({error})") from None
    return out


def strings_of(tensors: Mapping[str, torch.Tensor], name: str, rows: slice, path: Path) -> pa.LargeStringArray:
    """The strings of consecutive rows, checked: views of the file."""
    ends, content = tensors[f"{name}_ends"].numpy(), tensors[f"{name}_bytes"].numpy()
    ends = ends[rows.start : rows.stop + 1]
    strings = pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(content))
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DamagedFileError(f"{path}: {name} is damaged ({error})") from None
    return strings


def all_strings(tensors: Mapping[str, torch.Tensor], name: str, path: Path) -> pa.LargeStringArray:
    """All strings of a segment, checked in full."""
    ends = tensors[f"{name}_ends"]
    if ends[0] != 0 or ends[-1] != tensors[f"{name}_bytes"].numel():
        raise DamagedFileError(f"{path}: the offsets of {name} are damaged")
    return strings_of(tensors, name, slice(0, len(ends) - 1), path)
