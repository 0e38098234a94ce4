"""Changes of an index on disk: new files first, then the manifest that names them, so that a kill at any point leaves
the index as it was or as it was to be.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from leafkern.console import Report
from leafkern.errors import DamagedFileError, InputError
from leafkern.files import fsync_folder, remove_file, remove_leftovers, write_json, writing
from leafkern.index import segment as segments
from leafkern.index.manifest import (
    LARGEST_ID,
    MANIFEST,
    checked,
    checksum,
    code_dtype,
    data_files,
    is_data,
    read_manifest,
)
from leafkern.index.reader import Segment, Snapshot, levels_of, ranges_of
from leafkern.index.segment import Column
from leafkern.index.vectors import Rows, check_distinct, id_array
from leafkern.ops import quantize
from leafkern.ops.quantization import code_width

_BLOCK_BYTES = 1 << 25


class _Change:
    """A new manifest, and the files written for it."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.files = folder, []
        self.manifest = dict(manifest, revision=uuid.uuid4().hex)

    def write(self, kind: str, columns: dict[str, Column]) -> dict:
        """Writes a file; what the manifest is to say of it."""
        name = f"{kind}-{uuid.uuid4().hex[:16]}.safetensors"
        self.files.append(name)
        metadata = {"index": self.manifest["index"], "segment": name}
        size, sha256 = segments.write(self.folder / name, columns, metadata)
        return {"file": name, "bytes": size, "sha256": sha256}


@contextmanager
def changing(folder: Path, manifest: dict, *, anew: bool = False, newest: bool = False) -> Iterator[_Change]:
    """Holds the writers' lock; at the end, the manifest of what is yielded replaces the one on disk.

    manifest: what is to be changed, refused unless it is the newest; `newest`: the newest state of the same index will
    do; `anew`: whatever there is makes way. On an error the files written are removed.
    """
    with writing(folder):
        if not anew:
            found, same = read_manifest(folder), "index" if newest else "revision"
            if found[same] != manifest[same]:
                raise InputError(f"{folder}: changed on disk since it was opened; refresh it or open it again")
            manifest = found
        clean(folder)
        change = _Change(folder, manifest)
        try:
            yield change
            new = dict(change.manifest, sha256=checksum(change.manifest))
            write_json(folder / MANIFEST, checked(folder / MANIFEST, new))
        except BaseException:
            file = folder / MANIFEST
            content = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
            for name in change.files:
                if name not in content:
                    (folder / name).unlink(missing_ok=True)
            raise
        clean(folder)


def clean(folder: Path) -> None:
    """Removes temporary files, and the data files that the manifest on disk does not name."""
    remove_leftovers(folder)
    named = set()
    if (folder / MANIFEST).exists():
        try:
            named = data_files(read_manifest(folder))
        except (DamagedFileError, InputError):
            return  # about to be replaced by a new build: until then, nothing of it is thrown away
    old = [entry for entry in sorted(folder.iterdir()) if is_data(entry.name) and entry.name not in named]
    if old:
        fsync_folder(folder)  # the manifest may be of a writer that was killed before its renaming was durable
    for entry in old:
        remove_file(entry)


# -- adding ------------------------------------------------------------------------------------------------------------


def new_ids(snapshot: Snapshot, count: int, ids: object) -> pa.Array:
    """The ids of `count` new rows, checked; None numbers them on from the highest so far."""
    has, next_id = snapshot.manifest["ids"], snapshot.manifest["next_id"]
    if ids is None:
        if has == "string" and count:
            raise InputError("ids: the index has string ids; give one per vector")
        if next_id + count - 1 > LARGEST_ID:
            raise InputError(f"ids: {count} more than {next_id - 1} exceed 64 bits; give them")
        ids = np.arange(next_id, next_id + count, dtype=np.int64)
        if next_id < LARGEST_ID:  # at its end next_id may have been given already
            return pa.array(ids)
    ids = id_array(ids)
    if len(ids) != count:
        raise InputError(f"ids: {len(ids)} for {count} vectors; expected one each")
    if has is not None and count and _kind(ids) != has:
        raise InputError(f"ids: the index has {has} ids, got {ids[0].as_py()!r}")
    check_distinct(ids)
    if count == 0 or (has == "int64" and pc.min(ids).as_py() >= next_id and next_id < LARGEST_ID):
        return ids  # above all that are there
    again = [part.live_ids() for part in snapshot.segments]
    again = [known.filter(pc.is_in(known, value_set=ids)) for known in again]
    if sum(map(len, again)):
        again = pa.chunked_array(again)
        raise InputError(f"ids: {again[0].as_py()!r} is already in the index ({len(again)} such ids)")
    return ids


def _kind(ids: pa.Array) -> str:
    return "int64" if pa.types.is_int64(ids.type) else "string"


def append(change: _Change, parts: list[Segment], rows: Rows, ids: pa.Array, texts: pa.ChunkedArray | None) -> None:
    """One more segment, of `rows`; their codes have the ranges of `parts`, if there are any."""
    if rows.count == 0:
        return
    manifest = change.manifest
    columns = _id_columns(ids)
    if manifest["texts"]:
        columns |= segments.string_columns("text", texts)
    frozen = ranges_of(parts[:1])
    for level, precision in levels_of(manifest).items():
        ranges = None
        if precision in ("int8", "int4"):
            ranges = frozen[f"{level}_ranges"] if parts else rows.ranges(precision)
            probe = quantize(torch.zeros((0, rows.width)), precision, ranges=ranges)
            columns[f"{level}_ranges"] = Column.of(ranges.numpy())
            columns[f"{level}_scale"] = Column.of(probe.scale.numpy())
            columns[f"{level}_offset"] = Column.of(probe.offset.numpy())
        shape = rows.count, code_width(precision, rows.width)
        columns[level] = Column(_numpy_dtype(precision), shape, rows.codes(precision, ranges))
    _add_segment(change, manifest["segments"], columns, rows.count)
    manifest["count"] += rows.count
    manifest["ids"] = _kind(ids)
    if manifest["ids"] == "int64":
        manifest["next_id"] = max(manifest["next_id"], min(pc.max(ids).as_py(), LARGEST_ID - 1) + 1)


def _add_segment(change: _Change, entries: list[dict], columns: dict[str, Column], rows: int) -> None:
    written = change.write("segment", columns)
    change.manifest["segments"] = [*entries, written | {"layout": "rows", "rows": rows, "deleted": None}]


def _id_columns(ids: pa.Array) -> dict[str, Column]:
    return {"ids": Column.of(ids.to_numpy())} if _kind(ids) == "int64" else segments.string_columns("id", ids)


def _numpy_dtype(precision: str) -> np.dtype:
    return torch.empty(0, dtype=code_dtype(precision)).numpy().dtype


# -- removing ----------------------------------------------------------------------------------------------------------


def find(snapshot: Snapshot, ids: object) -> list[np.ndarray]:
    """For each segment, which of its rows (bool) have one of `ids`, each of which must be in the index."""
    ids = id_array(ids).unique()
    has = snapshot.manifest["ids"]
    if len(ids) == 0:
        return []
    if _kind(ids) != has:
        kind = "the index is empty" if has is None else f"the index has {has} ids"
        raise InputError(f"ids: {ids[0].as_py()!r} is not in the index ({kind})")
    found = []
    for part in snapshot.segments:
        hits = np.asarray(pc.is_in(part.ids(), value_set=ids))
        found.append(hits if part.allowed is None else hits & part.allowed.numpy())
    if sum(int(hits.sum()) for hits in found) != len(ids):
        known = pa.chunked_array([part.live_ids() for part in snapshot.segments])
        missing = ids.filter(pc.invert(pc.is_in(ids, value_set=known)))
        if len(missing) == 0:
            raise DamagedFileError(f"{snapshot.folder}: some ids occur twice")
        raise InputError(f"ids: {missing[0].as_py()!r} is not in the index ({len(missing)} such ids)")
    return found


def delete(change: _Change, parts: list[Segment], hits: list[np.ndarray]) -> None:
    """Marks rows of segments as deleted, in a new file for each; without any row left, the segments go too."""
    manifest, entries = change.manifest, []
    manifest["count"] -= sum(int(some.sum()) for some in hits)
    if manifest["count"] == 0:
        manifest["segments"], manifest["ids"] = [], None
        return
    for part, some in zip(parts, hits):
        entry = part.entry
        if some.any():
            deleted = some if part.allowed is None else some | ~part.allowed.numpy()
            written = change.write("deleted", {"deleted": Column.of(np.packbits(deleted, bitorder="little"))})
            entry = dict(entry, deleted=written | {"count": int(deleted.sum())})
        entries.append(entry)
    manifest["segments"] = entries


# -- compacting --------------------------------------------------------------------------------------------------------


def runs(snapshot: Snapshot, smaller_than: int | None) -> list[list[Segment]]:
    """The segments in order, together where they are to become one; those that stay as they are, alone."""
    grouped: list[list[Segment]] = []
    joining = False
    for part in snapshot.segments:
        small = smaller_than is None or part.live < smaller_than
        if small and joining:
            grouped[-1].append(part)
        else:
            grouped.append([part])
        joining = small
    return grouped


def stays(run: list[Segment], smaller_than: int | None) -> bool:
    """Whether a run of `runs` is a segment that need not be written again."""
    return len(run) == 1 and (run[0].allowed is None or (smaller_than is not None and run[0].live >= smaller_than))


def compact(change: _Change, grouped: list[list[Segment]], smaller_than: int | None, progress: Report) -> None:
    """Each run becomes one segment without its deleted rows, in blocks of bounded memory."""
    change.manifest["segments"] = []
    for run in grouped:
        rows = sum(part.live for part in run)
        if stays(run, smaller_than):
            change.manifest["segments"].append(run[0].entry)
        elif rows:
            _add_segment(change, change.manifest["segments"], _merged(run, rows, progress), rows)


def _merged(run: list[Segment], rows: int, progress: Report) -> dict[str, Column]:
    """The columns of `run` without deleted rows; ranges and factors are the first segment's, which all share."""
    ranges_of(run)
    columns = {}
    for name, tensor in run[0].tensors.items():
        if name.endswith(("_ranges", "_scale", "_offset")):
            columns[name] = Column.of(tensor.numpy())
        elif name.endswith("_ends"):
            columns |= _merged_strings(run, name.removesuffix("_ends"), rows)
        elif not name.endswith("_bytes"):
            array = tensor[:0].numpy()
            columns[name] = Column(array.dtype, (rows, *array.shape[1:]), _row_blocks(run, name, progress))
    return columns


def _pieces(part: Segment, row_bytes: int) -> Iterator[tuple[slice, np.ndarray | None]]:
    """Rows of a segment in blocks, and which of them are kept (bool; None: all)."""
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(part), step):
        piece = slice(start, min(start + step, len(part)))
        yield piece, None if part.allowed is None else part.allowed[piece].numpy()


def _row_blocks(run: list[Segment], name: str, progress: Report) -> Iterator[np.ndarray]:
    read, total = 0, sum(map(len, run))
    for part in run:
        values = part.tensors[name].numpy()
        for piece, kept in _pieces(part, values[:1].nbytes):
            yield values[piece] if kept is None else values[piece][kept]
            read += piece.stop - piece.start
            progress(f"writing {name}", read, total)


def _string_blocks(run: list[Segment], name: str) -> Iterator[dict[str, np.ndarray]]:
    """Strings in blocks: "ends" (without the first, counted on over all blocks) and "bytes"."""
    total = 0
    for part in run:
        for piece, kept in _pieces(part, max(1, part.tensors[f"{name}_bytes"].numel() // len(part)) + 8):
            strings = segments.strings_of(part.tensors, name, piece, part.path)
            if kept is not None:
                strings = strings.filter(pa.array(kept))
            ends, content = (column.blocks[-1] for column in segments.string_columns(name, strings).values())
            yield {"ends": ends[1:] + total, "bytes": content}
            total += len(content)


def _merged_strings(run: list[Segment], name: str, rows: int) -> dict[str, Column]:
    def ends() -> Iterator[np.ndarray]:
        yield np.zeros(1, np.int64)
        for block in _string_blocks(run, name):
            yield block["ends"]

    size = sum(len(block["bytes"]) for block in _string_blocks(run, name))
    content = (block["bytes"] for block in _string_blocks(run, name))
    return {
        f"{name}_ends": Column(np.dtype(np.int64), (rows + 1,), ends()),
        f"{name}_bytes": Column(np.dtype(np.uint8), (size,), content),
    }
