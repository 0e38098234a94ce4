"""Columns of .parquet files, read in batches. Errors name the file and the row."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from leafkern.errors import InputError, unknown_name
from leafkern.files import existing

BATCH_ROWS = 16_384


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Makes Arrow's errors about what the file holds InputErrors; those of the system and of memory pass."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise InputError(f"{path}: not a readable parquet file ({(str(error).splitlines() or [''])[0]})") from None


def _opened(path: str | os.PathLike):
    import pyarrow.parquet as pq

    with reading(path):
        return pq.ParquetFile(existing(path), memory_map=True)


def types(path: str | os.PathLike) -> dict:
    """The Arrow types of a file's columns by their names."""
    schema = _opened(path).schema_arrow
    return dict(zip(schema.names, schema.types))


def type_of(path: str | os.PathLike, name: str):
    """The Arrow type of one column, of which there must be one only."""
    schema = _opened(path).schema_arrow
    if name not in schema.names:
        raise unknown_name(f"{path}: column", name, schema.names)
    if schema.names.count(name) > 1:
        raise InputError(f"{path}: {schema.names.count(name)} columns are named {name!r}; expected one")
    return schema.field(name).type


def batches(path: str | os.PathLike, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator:
    """Columns as Arrow batches of at most `rows`, read as they are asked for."""
    for name in columns:
        type_of(path, name)
    with reading(path):
        found = _opened(path).iter_batches(batch_size=rows, columns=list(columns))
    while True:
        with reading(path):
            batch = next(found, None)
        if batch is None:
            return
        yield batch


def column(path: str | os.PathLike, name: str, kind) -> Iterator:
    """One column as Arrow arrays of type `kind`, refused where a value is null or doesn't fit."""
    import pyarrow as pa

    start = 0
    for batch in batches(path, [name]):
        try:
            values = batch.column(name).cast(kind)
            values.validate(full=True)  # strings need not be UTF-8 there
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{path}: column {name!r}, from row {start}: {error}") from None
        if values.null_count:
            raise InputError(
                f"{path}: row {start + _first_null(values)}: column {name!r} holds a null; expected one value each"
            )
        yield values
        start += len(values)


def _first_null(values) -> int:
    return int(np.flatnonzero(np.asarray(values.is_null()))[0])


def vector_width(path: str | os.PathLike) -> int | None:
    """The width of the column "vector", where its type tells it; refuses another type than lists."""
    import pyarrow as pa

    kind = type_of(path, "vector")
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise InputError(f"{path}: column 'vector' must hold lists of floats, got {kind}")
    return kind.list_size if pa.types.is_fixed_size_list(kind) else None


def vectors(path: str | os.PathLike, rows: int = BATCH_ROWS) -> Iterator[np.ndarray]:
    """The column "vector" in blocks (n, D); values and their type are not checked."""
    width, start = vector_width(path), 0
    for batch in batches(path, ["vector"], rows):
        lists = batch.column("vector")
        if lists.null_count:
            row = start + _first_null(lists)
            raise InputError(f"{path}: row {row}: column 'vector' holds a null; expected a vector each")
        lengths = np.asarray(lists.value_lengths())
        if width is None and len(lengths):
            width = int(lengths[0])
        if width == 0:
            raise InputError(f"{path}: row {start}: an empty vector; expected at least one number")
        bad = np.flatnonzero(lengths != width)
        if len(bad):
            row = int(bad[0])
            raise InputError(f"{path}: row {start + row}: a vector of length {lengths[row]}; expected {width}")
        flat = lists.flatten()
        if flat.null_count:
            raise InputError(f"{path}: row {start + _first_null(flat) // width} holds a null; expected numbers")
        yield flat.to_numpy(zero_copy_only=False).reshape(len(lists), width)
        start += len(lists)
