"""Vectors from and to other tools' files: what `Index.build` and `add` take, and what an index gives back.

.npy, .safetensors, .parquet (columns vector, text and one of ids) and FAISS's flat indexes (.faiss, .index). Files are
mapped or read in blocks: memory holds a block and the ids. Ids that a format has no place for stand beside it:
"v.npy.ids.npy" (int64) or "v.npy.ids.json" (strings) beside "v.npy".
"""

import itertools
import json
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from leafkern import parquet
from leafkern.console import Report, unseen
from leafkern.errors import InputError, unknown_name
from leafkern.files import (
    TEMPORARY,
    atomic_file,
    existing,
    fsync_file,
    fsync_folder,
    rename,
    temporaries,
    temporary_name,
)
from leafkern.index import Index, faiss_flat
from leafkern.index.vectors import BLOCK_VALUES, check_distinct, id_array
from leafkern.ops import quantize
from leafkern.textio import (
    BLOCK_ROWS,
    VECTOR_FORMATS,
    check_finite,
    is_unicode,
    is_vector_file,
    iter_objects,
    load_npy,
    read_vectors,
    suffix,
    vector_writer,
)

EXPORT_FORMATS = (*VECTOR_FORMATS, ".faiss")
EXPORT_PRECISIONS = ("float32", "float16", "ubinary")

_IDS_BESIDE = (".ids.npy", ".ids.json")  # int64, strings


class Source(NamedTuple):
    """What `Index.build` takes, by the same names.

    vectors: a mapped matrix, or an iterator of blocks. texts: strings, or None. width: None: not known yet. encoder,
    prompt (literal): what makes the vectors; None: not known.
    """

    vectors: np.ndarray | Iterator[np.ndarray]
    ids: pa.Array | None
    texts: pa.ChunkedArray | list[str] | None
    width: int | None
    encoder: object = None
    prompt: str | None = None


# -- reading -----------------------------------------------------------------------------------------------------


def holds_vectors(path: str | os.PathLike) -> bool:
    """Whether `read` takes this file: one of vectors, not of texts."""
    return suffix(path) in faiss_flat.SUFFIXES or is_vector_file(path)


def read(
    path: str | os.PathLike,
    *,
    ids_field: str | None = None,
    texts: bool = True,
    binary: bool = False,
    folder: str | os.PathLike | None = None,
) -> Source:
    """The vectors of a file with their ids and texts, for an index: `Index.build(path, **read(file)._asdict())`.

    ids_field: the column of a .parquet file that holds ids. texts: whether to read its column "text", where it has one;
    texts go through a temporary file in `folder` (None: the system's, which may be memory).
    binary: the index keeps bits and nothing finer. An IndexBinaryFlat can't become another: its bits, in the order of
    numpy.packbits and sentence-transformers, come as vectors of 1 and -1.
    Errors (InputError): an unknown suffix, a file that is damaged or holds something else, NaN or infinity (row named).
    """
    kind = suffix(existing(path))
    if kind == ".parquet":
        ids = None if ids_field is None else _id_column(path, ids_field)
        kept = _spooled_texts(path, folder) if texts and "text" in parquet.types(path) else None
        return Source(_checked_blocks(path), ids, kept, parquet.vector_width(path))
    if ids_field is not None:
        raise InputError(f"--ids-field: {path} has no fields; only .parquet keeps ids beside vectors")
    if kind not in faiss_flat.SUFFIXES:
        vectors = read_vectors(path, empty=True).vectors
        return Source(vectors, _ids_beside(path, len(vectors)), None, vectors.shape[1])
    file = faiss_flat.read(path)
    ids = _ids_beside(path, len(file.vectors)) if file.ids is None else pa.array(np.array(file.ids, np.int64))
    if file.binary:
        if not binary:
            raise InputError(f"{path}: holds bits only; choose precision ubinary (or binary) and rescore none")
        return Source(_signs(file.vectors), ids, None, 8 * file.vectors.shape[1])
    check_finite(str(path), file.vectors)
    if file.l2:
        _check_lengths(path, file.vectors)
    return Source(file.vectors, ids, None, file.vectors.shape[1])


def _checked_blocks(path: str | os.PathLike) -> Iterator[np.ndarray]:
    start = 0
    for block in parquet.vectors(path):
        if block.dtype.kind != "f":
            raise InputError(f"{path}: column 'vector' must hold lists of floats, got {block.dtype}")
        check_finite(str(path), block, start)
        yield block
        start += len(block)


def _signs(codes: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(codes), BLOCK_ROWS):
        yield np.unpackbits(codes[start : start + BLOCK_ROWS], axis=1).astype(np.float32) * 2 - 1


def _check_lengths(path: str | os.PathLike, vectors: np.ndarray) -> None:
    """Warns where distance and dot product rank differently: between vectors of different lengths."""
    low, high = np.inf, 0.0
    for start in range(0, len(vectors), BLOCK_ROWS):
        lengths = np.linalg.norm(vectors[start : start + BLOCK_ROWS], axis=1)
        low, high = min(low, lengths.min()), max(high, lengths.max())
    if low < 0.99 * high:
        warnings.warn(
            f"{path}: an IndexFlatL2 of vectors from {low:.3g} to {high:.3g} long; the index ranks by dot product, "
            "which is the order by distance only where all are equally long",
            stacklevel=3,
        )


def _id_column(path: str | os.PathLike, name: str) -> pa.Array:
    """A column of integers or strings."""
    kind = parquet.type_of(path, name)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: column {name!r} must hold integers or strings, got {kind}")
    kind = pa.int64() if pa.types.is_integer(kind) else pa.large_string()
    return checked_ids(path, name, pa.chunked_array(parquet.column(path, name, kind), kind).combine_chunks())


def checked_ids(path: str | os.PathLike, field: str, ids: list[int | str] | pa.Array) -> pa.Array:
    """The ids of all rows of a file as `id_array` gives them; InputError names where one of another kind or one given
    before stands.
    """
    try:
        kept = id_array(ids)
        check_distinct(kept)
        return kept
    except InputError as error:
        problem = error
    lines = (f"{path}:{number}" for number, _ in iter_objects(path))
    places = lines if suffix(path).startswith(".jsonl") else (f"{path}: row {row}" for row in itertools.count())
    seen, ids = set(), ids.to_pylist() if isinstance(ids, pa.Array) else ids
    for place, identity in zip(places, ids):
        if isinstance(identity, str) != isinstance(ids[0], str):
            raise InputError(f"{place}: field {field!r} is {identity!r}; expected all int or all str")
        if identity in seen:
            raise InputError(f"{place}: field {field!r} is {identity!r}, as in a row before; expected a new id")
        seen.add(identity)
    raise InputError(f"{path}: field {field!r}: {problem}")


def _spooled_texts(path: str | os.PathLike, folder: str | os.PathLike | None) -> pa.ChunkedArray:
    """The column "text", mapped from an Arrow file without a name, which goes with the array."""
    schema = pa.schema([("text", pa.large_string())])
    with tempfile.TemporaryFile(prefix=TEMPORARY, dir=folder) as file:
        with pa.ipc.new_file(file, schema) as writer:
            for column in parquet.column(path, "text", pa.large_string()):
                writer.write_batch(pa.record_batch([column], schema=schema))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all().column("text")


def _ids_beside(path: str | os.PathLike, count: int) -> pa.Array | None:
    """The ids that stand beside a file of `count` vectors; None where none do."""
    found = [file for file in _beside(Path(path)) if file.exists()]
    if not found:
        for leftover in _temporary_ids(Path(path)):
            raise InputError(
                f"{path}: an export to it was cut off and its ids are missing; export it again, or remove {leftover} "
                "if it has none"
            )
        return None
    if len(found) > 1:
        raise InputError(f"{path}: both {found[0].name} and {found[1].name} stand beside it; remove one")
    (file,) = found
    if file.suffix == ".npy":
        ids, kind = load_npy(file), pa.int64()
        fits = ids.ndim == 1 and ids.dtype.kind == "i"
    else:
        try:
            ids, kind = json.loads(file.read_bytes()), pa.large_string()
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not readable as JSON ({error})") from None
        fits = isinstance(ids, list) and all(isinstance(each, str) and is_unicode(each) for each in ids)
    if not fits:
        raise InputError(f"{file}: expected a list of ids, integers in .npy or strings in .json")
    kept = pa.array(ids, kind)
    if len(kept) != count:
        raise InputError(f"{file}: {len(kept)} ids for the {count} vectors of {path}; expected one each")
    return kept


# -- writing -----------------------------------------------------------------------------------------------------


def export(
    index: Index,
    path: str | os.PathLike,
    *,
    precision: str = "float32",
    progress: Report = unseen,
) -> int:
    """Writes the vectors of an index to a file, atomically and in order of insertion; their number.

    The vectors are decoded from the finest codes that the index keeps: those for rescoring, where there are some.
    precision: float32; float16 (not .faiss); ubinary: bits, to .npy, .safetensors or, as an IndexBinaryFlat, .faiss.
    .parquet: columns id, vector and, where the index keeps them, text. .faiss: IndexFlatIP, in an IndexIDMap where ids
    are integers other than 0, 1, 2, ... Ids without a place in the format stand beside the file.
    """
    # Row numbers must not change under way.
    index, path, kind = index.pinned(), Path(path), suffix(path)
    if precision not in EXPORT_PRECISIONS:
        raise unknown_name("precision", precision, EXPORT_PRECISIONS)
    if kind not in EXPORT_FORMATS:
        raise InputError(f"{path}: unknown vector format {kind!r}; expected one of {', '.join(EXPORT_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if (kind, precision) in ((".parquet", "ubinary"), (".faiss", "float16")):
        raise InputError(f"precision: {kind} holds no {precision} vectors; write {path.stem}.npy")
    if kind == ".faiss" and precision == "ubinary" and index.width % 8:
        raise InputError(f"precision: FAISS takes multiples of 8 bits, the index has {index.width}; write .npy")
    if kind == ".parquet":
        with atomic_file(path) as temporary:
            _write_parquet(index, temporary, precision, progress)
        return len(index)
    ids = index.ids_at(index.rows())
    beside, mapped = ids, None
    if kind == ".faiss" and ids.dtype == np.int64:
        beside, mapped = None, (None if np.array_equal(ids, np.arange(len(ids))) else ids)
    blocks = (_coded(index, rows, precision) for rows in _row_blocks(index, progress))
    with _ids_replaced(path, beside) as put_aside:
        if kind == ".faiss":
            with atomic_file(path, before_rename=put_aside) as temporary, open(temporary, "wb") as stream:
                binary = precision == "ubinary"
                faiss_flat.write(stream, len(index), index.width, blocks, mapped, binary=binary)
        else:
            metadata = {"precision": precision, "dim": str(index.width)}
            with vector_writer(path, metadata, before_rename=put_aside) as writer:
                for block in blocks:
                    writer.add(block)
    return len(index)


def _row_blocks(index: Index, progress: Report) -> Iterator[np.ndarray]:
    """The numbers of the rows in blocks, of which there is at least one."""
    rows, step = index.rows(), max(1, min(BLOCK_ROWS, BLOCK_VALUES // index.width))
    for start in range(0, max(1, len(rows)), step):
        yield rows[start : start + step]
        progress("exporting", min(start + step, len(rows)), len(rows))


def _coded(index: Index, rows: np.ndarray, precision: str) -> np.ndarray:
    """The vectors of `rows` in an export's precision."""
    vectors = torch.from_numpy(index.vectors_at(rows))
    if precision == "float16":
        wide = rows[~torch.isfinite(vectors.half()).all(dim=1).numpy()]
        if len(wide):
            raise InputError(
                f"precision: row {wide[0]} (id {index.ids_at(wide[:1])[0]!r}) does not fit float16; export float32"
            )
    return quantize(vectors, precision).codes.numpy()


def _write_parquet(index: Index, path: Path, precision: str, progress: Report) -> None:
    """A row group per block."""
    element = pa.float16() if precision == "float16" else pa.float32()
    identity = pa.large_string() if index.info()["ids"] == "string" else pa.int64()
    fields = {"id": identity, "vector": pa.list_(element, index.width)}
    fields |= {"text": pa.large_string()} if index.has_texts else {}
    schema = pa.schema(list(fields.items()))
    with pq.ParquetWriter(path, schema) as writer:
        for rows in _row_blocks(index, progress):
            values = pa.array(_coded(index, rows, precision).reshape(-1), element)
            columns = [pa.array(index.ids_at(rows), identity)]
            columns += [pa.FixedSizeListArray.from_arrays(values, index.width)]
            columns += [pa.array(index.texts_at(rows), pa.large_string())] if index.has_texts else []
            writer.write_table(pa.table(columns, schema=schema))


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.name + end) for end in _IDS_BESIDE]


def _temporary_ids(path: Path) -> list[Path]:
    """Ids of `path` under temporary names: of an export that goes on, or was killed."""
    return [file for ids in _beside(path) for file in temporaries(ids)]


@contextmanager
def _ids_replaced(path: Path, ids: np.ndarray | None) -> Iterator[Callable[[], None]]:
    """Replaces the ids beside `path`, if there are any, by `ids` (None: none stand there), when `path` is replaced.

    What it yields is to be called when all but the renaming of `path` is done: the ids of before then move aside, for
    vectors never stand beside those of others. On an error they come back. A kill in this moment leaves ids under a
    temporary name, by which `read` knows that they are missing.
    """
    before, aside, new = None, [], None

    def put_aside() -> None:
        nonlocal before
        before = path.stat().st_ino if path.exists() else 0
        for file in _beside(path):
            if file.exists():
                aside.append((file, temporary_name(file)))
                rename(*aside[-1])

    try:
        if ids is not None:
            target = _beside(path)[ids.dtype == object]
            new = temporary_name(target)
            _write_ids(new, ids)
            fsync_file(new)
        yield put_aside
    finally:
        if before is not None and path.exists() and path.stat().st_ino != before:
            if new is not None:
                rename(new, target)
            fsync_folder(path.parent)
            for leftover in _temporary_ids(path):
                leftover.unlink(missing_ok=True)
        else:
            for file, hidden in aside:
                if hidden.exists():
                    os.replace(hidden, file)
            if new is not None:
                new.unlink(missing_ok=True)


def _write_ids(path: Path, ids: np.ndarray) -> None:
    with open(path, "wb") as stream:
        if ids.dtype == np.int64:
            np.save(stream, ids)
        else:
            stream.write(json.dumps(ids.tolist(), ensure_ascii=False).encode())
