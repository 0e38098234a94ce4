"""Files of FAISS's flat indexes, read and written without faiss.

Numbers are little-endian, without gaps. Each index starts with four letters that tell its class:

    IxFI, IxF2   IndexFlatIP, IndexFlatL2: head; int64 N·D; float32 (N, D)
    IBxF         IndexBinaryFlat: head; int64 N·bytes; uint8 (N, bytes)
    IxMp, IxM2   IndexIDMap, IndexIDMap2: head; one of the first two; int64 N; int64 ids (N,)
    IBMp, IBM2   IndexBinaryIDMap, IndexBinaryIDMap2: the same around IBxF

    head of Ix..: int32 D, int64 N, two int64 that nothing reads, bool trained, int32 metric (0 dot product, 1 L2)
    head of IB..: int32 bits, int32 bytes per vector, int64 N, bool trained, int32 metric

These are what `faiss.write_index` and `write_index_binary` write (held to faiss-cpu 1.15 by tests).
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from leafkern.errors import InputError

SUFFIXES = (".faiss", ".index")

_FLOAT_HEAD, _BINARY_HEAD = struct.Struct("<iqqq?i"), struct.Struct("<iiq?i")
_FLOAT_FLAT, _FLOAT_MAPS = {b"IxFI": 0, b"IxF2": 1}, (b"IxMp", b"IxM2")
_BINARY_FLAT, _BINARY_MAPS = b"IBxF", (b"IBMp", b"IBM2")
_UNREAD = 1 << 20
_L2 = 1


class FlatFile(NamedTuple):
    """vectors: memory-mapped float32 (N, D), or uint8 (N, bytes) where binary; ids: int64 (N,) or None; l2: metric."""

    vectors: np.ndarray
    ids: np.ndarray | None
    binary: bool
    l2: bool


class _Reader:
    """Consecutive parts of a file, each refused where the file ends too early."""

    def __init__(self, path: Path, stream: BinaryIO):
        self.path, self.stream, self.size = path, stream, os.fstat(stream.fileno()).st_size

    def take(self, size: int) -> bytes:
        self.need(size)
        return self.stream.read(size)

    def need(self, size: int) -> None:
        at = self.stream.tell()
        if size > self.size - at:
            raise self.wrong(f"{self.size} bytes; {size} more were to follow byte {at}: truncated or damaged")

    def head(self, binary: bool) -> tuple[int, int, int]:
        """(bytes of a vector, number of vectors, metric)"""
        fields = _BINARY_HEAD if binary else _FLOAT_HEAD
        width, *rest = fields.unpack(self.take(fields.size))
        row, count = (rest[0], rest[1]) if binary else (4 * width, rest[0])
        if width < 1 or count < 0 or (binary and 8 * row != width):
            raise self.wrong(f"{count} vectors of width {width} in {row} bytes; the head is damaged")
        return row, count, rest[-1]

    def counted(self, expected: int, what: str) -> None:
        """A count, which must be `expected`."""
        (found,) = struct.unpack("<q", self.take(8))
        if found != expected:
            raise self.wrong(f"says {found} {what}; expected {expected}")

    def array(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """What follows, memory-mapped; nothing is copied."""
        size = int(np.dtype(dtype).itemsize) * int(np.prod(shape, dtype=object))
        self.need(size)
        at = self.stream.tell()
        self.stream.seek(size, os.SEEK_CUR)
        if size == 0:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", at, shape)

    def wrong(self, message: str) -> InputError:
        return InputError(f"{self.path}: not a readable FAISS file ({message})")


def read(path: str | os.PathLike) -> FlatFile:
    """The vectors of a flat index that FAISS or `write` wrote; InputError for any other file."""
    path = Path(path)
    with open(path, "rb") as stream:
        reader = _Reader(path, stream)
        name, outer = reader.take(4), None
        if name in (*_FLOAT_MAPS, *_BINARY_MAPS):
            outer = reader.head(name in _BINARY_MAPS)
            name, mapped_binary = reader.take(4), name in _BINARY_MAPS
            if mapped_binary != (name == _BINARY_FLAT):
                raise reader.wrong(f"ids around {name!r}; expected a flat index")
        if name != _BINARY_FLAT and name not in _FLOAT_FLAT:
            raise reader.wrong(
                f"starts with {name!r}; expected IndexFlatIP, IndexFlatL2 or IndexBinaryFlat, alone or in an IndexIDMap"
            )
        binary = name == _BINARY_FLAT
        row, count, metric = reader.head(binary)
        if not binary and metric != _FLOAT_FLAT[name]:
            raise reader.wrong(f"{name!r} with metric {metric}")
        if outer is not None and outer[:2] != (row, count):
            raise reader.wrong(f"ids for {outer[1]} vectors of {outer[0]} bytes around {count} of {row}")
        if binary:
            reader.counted(count * row, "bytes of vectors")
            vectors = reader.array("u1", (count, row))
        else:
            reader.counted(count * row // 4, "numbers")
            vectors = reader.array("<f4", (count, row // 4))
        ids = None
        if outer is not None:
            reader.counted(count, "ids")
            ids = reader.array("<i8", (count,))
        if stream.tell() != reader.size:
            raise reader.wrong(f"{reader.size - stream.tell()} bytes follow its end")
    return FlatFile(vectors, ids, binary, metric == _L2)


def write(
    stream: BinaryIO, count: int, width: int, blocks: Iterable[np.ndarray], ids: np.ndarray | None, *, binary: bool
) -> None:
    """Writes an IndexFlatIP of float32 blocks (n, width) or, if binary, an IndexBinaryFlat of uint8 (n, width / 8).

    blocks: `count` rows together. ids: int64 (count,) puts an IndexIDMap around it.
    """
    head = _BINARY_HEAD.pack(width, width // 8, count, True, _L2) if binary else b""
    head = head or _FLOAT_HEAD.pack(width, count, _UNREAD, _UNREAD, True, 0)
    if ids is not None:
        stream.write((_BINARY_MAPS if binary else _FLOAT_MAPS)[0] + head)
    stream.write((_BINARY_FLAT if binary else b"IxFI") + head)
    stream.write(struct.pack("<q", count * width // (8 if binary else 1)))
    for block in blocks:
        if block.size:
            stream.write(memoryview(np.ascontiguousarray(block, "u1" if binary else "<f4")).cast("B"))
    if ids is not None:
        stream.write(struct.pack("<q", count))
        stream.write(ids.astype("<i8").tobytes())
