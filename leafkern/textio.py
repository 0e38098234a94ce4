"""Texts and vectors from and to files.

Texts: .txt (a text per line), .jsonl, both also .gz; .parquet; "-" is standard input, a text per line. Vectors: .npy,
.safetensors, .parquet (columns text, vector). Errors name the file and the line or row.
"""

import gzip
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tokenize import TokenError  # numpy's reader of .npy headers lets it through
from typing import NamedTuple

import numpy as np

from leafkern import parquet
from leafkern.errors import InputError
from leafkern.files import atomic_file, existing, temporaries

TEXT_FORMATS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
VECTOR_FORMATS = (".npy", ".safetensors", ".parquet")
BLOCK_ROWS = 16_384

# Of .safetensors: matrices of vectors, and the names by which one is recognised among several.
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_VECTOR_NAMES = ("vectors", "embeddings", "codes")


class Texts(NamedTuple):
    """`texts`, and `ids` of the same length (str or int) when an id field was asked for, else None."""

    ids: list[str | int] | None
    texts: list[str]


class Vectors(NamedTuple):
    """`texts` (None but for parquet) and `vectors`, a float array (N, D): row i belongs to text i."""

    texts: list[str] | None
    vectors: np.ndarray


def suffix(path: str | os.PathLike) -> str:
    """The lower-case suffix, with .gz kept together with what stands before it: "a.JSONL.gz" gives ".jsonl.gz"."""
    suffixes = [part.lower() for part in Path(path).suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def is_vector_file(path: str | os.PathLike) -> bool:
    """Whether `path` holds vectors rather than texts, by its suffix and, for parquet, its columns."""
    kind = suffix(path)
    return kind in (".npy", ".safetensors") or (kind == ".parquet" and "vector" in parquet.types(path))


def iter_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, of a .gz of one, or of standard input ("-")."""
    name = "<stdin>" if str(path) == "-" else str(path)
    with ExitStack() as stack:
        if str(path) == "-":
            stream = sys.stdin.buffer
        else:
            stream = stack.enter_context(
                gzip.open(existing(path)) if suffix(path).endswith(".gz") else open(existing(path), "rb")
            )
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.rstrip(b"\r\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x} at column {error.start + 1});"
                " convert the file to UTF-8"
            ) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{name}:{number + 1}: not readable as gzip ({error})") from None


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def iter_texts(
    path: str | os.PathLike, field: str = "text", id_field: str | None = None, rows: int = BLOCK_ROWS
) -> Iterator[Texts]:
    """The texts of a file in blocks of at most `rows`; see `read_texts`."""
    kind = ".txt" if str(path) == "-" else suffix(existing(path))
    if kind not in TEXT_FORMATS:
        raise InputError(f"{path}: unknown text format {kind!r}; expected one of {', '.join(TEXT_FORMATS)} or '-'")
    if kind == ".parquet":
        pairs = _parquet_pairs(path, field, id_field, rows)
    elif kind.startswith(".jsonl"):
        pairs = _jsonl_pairs(path, field, id_field)
    elif id_field is not None:
        raise InputError(f"{path}: a file of plain lines has no field {id_field!r} for ids; use .jsonl or .parquet")
    else:
        pairs = ((None, line) for _, line in iter_lines(path))
    ids, texts, seen = [], [], False
    for identity, text in pairs:
        seen = True
        ids.append(identity)
        texts.append(text)
        if len(texts) == rows:
            yield Texts(ids if id_field is not None else None, texts)
            ids, texts = [], []
    if not seen:
        raise InputError(f"{'<stdin>' if str(path) == '-' else path}:1: empty; expected at least one text")
    if texts:
        yield Texts(ids if id_field is not None else None, texts)


def read_texts(path: str | os.PathLike, field: str = "text", id_field: str | None = None) -> Texts:
    """All texts of a file, in order.

    `field`, `id_field`: names of the text and id fields (.jsonl) or columns (.parquet). In .txt and standard input
    every line is a text, an empty line the empty text; empty lines of .jsonl are skipped.
    Errors (InputError, with file and line or row): unknown suffix, no such file, not UTF-8, damaged gzip, not JSON,
    missing field, a field that is no string, an empty file.
    """
    ids, texts = [], []
    for block in iter_texts(path, field, id_field):
        ids.extend(block.ids or ())
        texts.extend(block.texts)
    return Texts(ids if id_field is not None else None, texts)


def iter_objects(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line of a .jsonl file that is not empty."""
    for number, line in iter_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number too long, nested too deeply
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
        yield number, value


def field_of(where: str, value: dict, field: str, types: tuple[type, ...] = (str,)) -> object:
    """`value[field]`, refused with `where` (file:line) when it is missing, of another type or no valid Unicode."""
    if field not in value:
        has = ", ".join(map(repr, value)) or "no field"
        raise InputError(f"{where}: no field {field!r}; this line has {has}")
    if not isinstance(value[field], types) or isinstance(value[field], bool):
        expected = " or ".join(t.__name__ for t in types)
        raise InputError(f"{where}: field {field!r} must be {expected}, got {type(value[field]).__name__}")
    if isinstance(value[field], str) and not is_unicode(value[field]):
        raise InputError(f"{where}: field {field!r} holds a lone surrogate, which is no valid Unicode text")
    return value[field]


def _jsonl_pairs(path, field: str, id_field: str | None) -> Iterator[tuple[str | int | None, str]]:
    for number, value in iter_objects(path):
        where = f"{path}:{number}"
        identity = None if id_field is None else field_of(where, value, id_field, (str, int))
        yield identity, field_of(where, value, field)


def _parquet_pairs(path, field: str, id_field: str | None, rows: int) -> Iterator[tuple[str | int | None, str]]:
    columns = [field] if id_field is None else [field, id_field]
    row = 0
    for batch in parquet.batches(path, columns, rows):
        with parquet.reading(path):
            values = {name: batch.column(name).to_pylist() for name in columns}
        for number, text in enumerate(values[field]):
            identity = None if id_field is None else values[id_field][number]
            if not isinstance(text, str):
                raise InputError(f"{path}: row {row}: column {field!r} must be str, got {type(text).__name__}")
            if id_field is not None and not isinstance(identity, (str, int)):
                raise InputError(
                    f"{path}: row {row}: column {id_field!r} must be str or int, got {type(identity).__name__}"
                )
            yield identity, text
            row += 1


def read_vectors(path: str | os.PathLike, *, empty: bool = False) -> Vectors:
    """The vectors of a file as (texts or None, array (N, D) of float16, float32 or float64); .npy is memory-mapped.

    .safetensors: its only matrix, or the one named "vectors" or "embeddings". .parquet: column "vector" (lists of one
    length) and, where there is one, column "text". Errors (InputError): unknown suffix, not a matrix of floats, NaN or
    infinity (the row is named), no rows unless `empty`.
    """
    kind = suffix(path)
    if kind not in VECTOR_FORMATS:
        raise InputError(f"{path}: unknown vector format {kind!r}; expected one of {', '.join(VECTOR_FORMATS)}")
    existing(path)
    texts = None
    if kind == ".npy":
        vectors = load_npy(path)
    elif kind == ".safetensors":
        vectors = _safetensors_matrix(path)
    else:
        vectors = list(parquet.vectors(path))
        vectors = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)
        if "text" in parquet.types(path):
            texts = [text for batch in parquet.batches(path, ["text"]) for text in batch.column("text").to_pylist()]
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: expected a float matrix (N, D); got {vectors.dtype} of shape {vectors.shape}")
    if len(vectors) == 0 and not empty:
        raise InputError(f"{path}: holds no rows")
    check_finite(str(path), vectors)
    return Vectors(texts, vectors)


def load_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, memory-mapped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        raise ValueError("several arrays, as .npz holds")
    except (ValueError, EOFError, OSError, SyntaxError, TokenError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a readable .npy file ({error})") from None


def check_finite(name: str, vectors: np.ndarray, first_row: int = 0) -> None:
    """Names the first row of `vectors` (N, D), counted from `first_row`, that holds NaN or infinity."""
    for start in range(0, len(vectors), BLOCK_ROWS):
        bad = ~np.isfinite(vectors[start : start + BLOCK_ROWS]).all(axis=1)
        if bad.any():
            row = first_row + start + int(bad.argmax())
            raise InputError(f"{name}: row {row} holds NaN or infinity; expected finite values")


def _safetensors_matrix(path) -> np.ndarray:
    """Memory-mapped: the library, which checks the header, would copy all."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]
            chosen = names if len(names) == 1 else [name for name in _VECTOR_NAMES if name in names]
            if not chosen:
                raise InputError(f"{path}: expected one matrix, or one named 'vectors'; it has {names or 'none'}")
            kind, shape = file.get_slice(chosen[0]).get_dtype(), file.get_slice(chosen[0]).get_shape()
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a readable .safetensors file ({error})") from None
    if kind not in _FLOATS:
        raise InputError(f"{path}: {chosen[0]} is a matrix of {kind}; expected {', '.join(_FLOATS)}")
    if 0 in shape:
        return np.zeros(shape, _FLOATS[kind])
    with open(path, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        start, _ = json.loads(stream.read(length))[chosen[0]]["data_offsets"]
    return np.memmap(path, _FLOATS[kind], "r", 8 + length + start, tuple(shape))


@contextmanager
def vector_writer(
    path: str | os.PathLike, metadata: dict[str, str] | None = None, before_rename: Callable[[], None] = lambda: None
) -> Iterator["_Writer"]:
    """A writer whose `add(block, texts)` appends rows; `path` appears, whole, when the block ends without an error.

    .npy and .safetensors (tensor "vectors") take any dtype, .parquet floats, and texts, which the other two ignore. The
    writer's `extra`, set before the first `add`, holds more arrays by name for .safetensors. before_rename: as in
    `atomic_file`.
    """
    kind = suffix(path)
    if kind not in VECTOR_FORMATS:
        raise InputError(f"{path}: unknown vector format {kind!r}; expected one of {', '.join(VECTOR_FORMATS)}")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {Path(path).parent} does not exist")
    for leftover in temporaries(path):
        leftover.unlink(missing_ok=True)
    with atomic_file(path, before_rename) as temporary:
        writer = (_ParquetWriter if kind == ".parquet" else _RawWriter)(temporary, kind, metadata or {})
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


def write_vectors(
    path: str | os.PathLike,
    vectors: np.ndarray,
    texts: Sequence[str] | None = None,
    *,
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes `vectors` (N, D) to .npy, .safetensors or .parquet, atomically.

    `texts`: needed by, and written only to, .parquet. `extra`, `metadata`: more arrays and strings, .safetensors only.
    """
    with vector_writer(path, metadata) as writer:
        writer.extra = extra or {}
        writer.add(np.asarray(vectors), texts)


class _Writer:
    extra: dict[str, np.ndarray]

    def __init__(self, path: Path, kind: str, metadata: dict[str, str]):
        self.path, self.kind, self.metadata, self.extra = path, kind, metadata, {}
        self.rows, self.width, self.dtype = 0, None, None

    def _check(self, block: np.ndarray) -> np.ndarray:
        if block.ndim != 2:
            raise InputError(f"vectors: expected a matrix (N, D), got shape {block.shape}")
        if self.width is None:
            self.width, self.dtype = block.shape[1], block.dtype
        if block.shape[1] != self.width or block.dtype != self.dtype:
            raise InputError(
                f"vectors: expected width {self.width} of {self.dtype}, got {block.shape[1]} {block.dtype}"
            )
        self.rows += len(block)
        return np.ascontiguousarray(block)


class _RawWriter(_Writer):
    # The header is written last, into room kept for it: the number of rows is known only then.
    ROOM = 8192

    def __init__(self, path, kind, metadata):
        super().__init__(path, kind, metadata)
        self.stream = open(path, "wb")
        self.stream.write(b"\0" * self.ROOM)

    def add(self, block: np.ndarray, texts: Sequence[str] | None = None) -> None:
        first = self.width is None
        block = self._check(block)
        if first:  # before the rows, whose number of bytes may leave floats behind them misaligned
            for array in self.extra.values():
                self._put(np.ascontiguousarray(array))
        self._put(block)

    def _put(self, array: np.ndarray) -> None:
        if array.size:  # not tofile, whose error on a full disk doesn't say so
            self.stream.write(memoryview(array).cast("B"))

    def finish(self) -> None:
        if self.width is None:
            raise InputError("vectors: none to write")
        shape = (self.rows, self.width)
        if self.kind == ".npy":
            text = repr({"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape})
            header = b"\x93NUMPY\x01\x00" + struct.pack("<H", self.ROOM - 10)
            header += text.encode().ljust(self.ROOM - 11) + b"\n"
        else:
            sizes = {name: (array.dtype, array.shape) for name, array in self.extra.items()}
            header = safetensors_header(sizes | {"vectors": (self.dtype, shape)}, self.metadata, self.ROOM)
        self.stream.seek(0)
        self.stream.write(header)
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class _ParquetWriter(_Writer):
    writer = None

    def add(self, block: np.ndarray, texts: Sequence[str] | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        block = self._check(block)
        if block.dtype not in (np.float16, np.float32, np.float64):
            raise InputError(f"parquet holds float vectors only, not {block.dtype}; write .safetensors or .npy")
        if texts is None or len(texts) != len(block):
            raise InputError(f"texts: parquet needs one text per vector ({len(block)})")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), self.width)
        table = pa.table({"text": pa.array(texts, pa.string()), "vector": vectors})
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)

    def finish(self) -> None:
        if self.writer is None:
            raise InputError("vectors: none to write")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


def safetensors_header(
    arrays: dict[str, tuple[np.dtype, Sequence[int]]], metadata: dict[str, str], room: int | None = None
) -> bytes:
    """The head of a safetensors file whose data are `arrays` (dtype, shape) in this order, without gaps.

    The length is `room`, or the next multiple of 64. Written by hand because the library's writer wants all data in
    memory at once.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, shape) in arrays.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        entries[name] = {
            "dtype": _SAFETENSORS[np.dtype(dtype).name],
            "shape": list(map(int, shape)),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries).encode()
    length = (room or -(-(len(text) + 8) // 64) * 64) - 8
    if len(text) > length:
        raise InputError(f"metadata: {len(text)} bytes of header, more than the {length} kept for it")
    return struct.pack("<Q", length) + text.ljust(length)
