"""Vectors on disk: built once, opened without being read, searched exactly.

Format v1: a folder with manifest.json (what the index is, and a list of segments) and the segments. Writing makes a new
segment, syncs it, then replaces the manifest: a kill at any point leaves the previous index whole.
"""

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from leafkern.errors import DamagedFileError, InputError
from leafkern.files import confined, make_folder, remove_leftovers, write_json, writing
from leafkern.index import segment as segments
from leafkern.index.manifest import (
    FORMAT,
    MANIFEST,
    PRECISIONS,
    RESCORE_PRECISIONS,
    VERSION,
    checked_rescore,
    code_bytes,
    code_dtype,
    fingerprint,
    is_part,
    query_fingerprint,
    read_manifest,
)
from leafkern.index.segment import Column
from leafkern.index.vectors import Rows, float32, id_array, matrix
from leafkern.ops import Quantized, quantize, search
from leafkern.ops.quantization import code_width
from leafkern.textio import check_finite, is_unicode

__all__ = ["PRECISIONS", "RESCORE_PRECISIONS", "ClippedWarning", "Index"]

_BLOCK_BYTES = 1 << 25


class ClippedWarning(UserWarning):
    """Added vectors hold values outside the ranges that were frozen when the index was built."""


class Index:
    """An exact dot-product index on disk. Made by `Index.build` or `Index.open`.

    path: its folder. width, precision, rescore: of the vectors, of the codes scanned, of the codes rescored (or None).
    encoder, prompt: fingerprint of what made the vectors, and the text put before each document; None: not known.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens the index at `path`; `Index.open` also checks what it holds."""
        self.path = Path(path)
        self._load()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        width: int | None = None,
        precision: str | None = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> "Index":
        """The index at `path`, memory-mapped: opening reads only the manifest and the heads of the segments.

        width, precision, encoder (an `Encoder` or its fingerprint), prompt: what the caller expects; another is refused
        with an InputError. A student trained to give the vectors of the index's encoder (`Encoder.aligned_with`) may
        open and search it, but not add to it. Errors: InputError where no index is, DamagedFileError for a damaged
        file.
        """
        index = cls(path)
        known = query_fingerprint(encoder, index.encoder)
        index.require(width=width, precision=precision, encoder=known, prompt=prompt)
        return index

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        vectors: object,
        *,
        ids: object = None,
        precision: str = "int8",
        rescore: str | None = "float16",
        encoder: object = None,
        prompt: str | None = None,
        texts: Sequence[str] | None = None,
        width: int | None = None,
        ranges: object = None,
    ) -> "Index":
        """Makes an index at `path`, in place of one that is there.

        vectors: numpy or torch (N, D), or an iterable of such blocks (which are kept on disk meanwhile); N may be 0.
        ids: N different int64 or strings; None numbers the rows from 0. texts: N strings that `text_of` gives back.
        precision: of the codes scanned; rescore: of the codes that the best candidates are scored with again, finer, or
        None. An index of float32 or float16 needs none: there "float16", the default, means None.
        ranges: numpy or torch (2, D) for the int8 and int4 codes, as `calibrate` gives them; values outside are
        clipped. None takes them from these vectors as `quantize` does. They are frozen; an empty index takes them from
        what is first added.
        encoder (an `Encoder` or its fingerprint), prompt: what made the vectors; kept, and compared by `require`.
        width: D, needed only where `vectors` is an iterable without blocks.

        Errors (InputError): NaN, infinity or values too large for float16 (row named), fewer than 100 vectors that are
        not unit-norm and no ranges for their int8 or int4 codes, ranges where nothing takes them, duplicate or unfit
        ids, unknown precision, a folder that holds something else, another process that is writing it.
        """
        path = Path(path)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "index": uuid.uuid4().hex,
            "revision": "",
            "width": width,
            "precision": precision,
            "rescore": checked_rescore(precision, rescore),
            "encoder": fingerprint(encoder),
            "prompt": prompt,
            "ids": None,
            "next_id": 0,
            "texts": texts is not None,
            "count": 0,
            "segments": [],
        }
        existed = path.exists()
        if existed and not path.is_dir():
            raise InputError(f"{path}: is a file; expected a folder for the index")
        foreign = [entry.name for entry in path.iterdir() if not is_part(entry.name)] if existed else []
        if foreign:
            raise InputError(f"{path}: holds {foreign[0]!r}, which is not part of an index; choose another folder")
        index = cls.__new__(cls)
        index.path = path
        index._manifest, index._tensors, index._files = manifest, [], []
        try:
            make_folder(path)
            with Rows(vectors, path, width, ranges) as rows:
                manifest["width"] = rows.width
                index._check_new(rows, texts)
                index._check_ranges(rows, ranges)
                index._replace(None, rows, index._new_ids(rows.count, ids), texts)
        except BaseException:
            if not existed and path.is_dir():
                with suppress(InputError), writing(path):  # not while another process builds there
                    remove_leftovers(path)
                    if not any(path.iterdir()):
                        path.rmdir()
            raise
        return index

    def __len__(self) -> int:
        return self._manifest["count"]

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}: {len(self)} × {self.width}, {self.precision}, rescore {self.rescore})"

    @property
    def width(self) -> int:
        return self._manifest["width"]

    @property
    def precision(self) -> str:
        return self._manifest["precision"]

    @property
    def rescore(self) -> str | None:
        return self._manifest["rescore"]

    @property
    def encoder(self) -> str | None:
        return self._manifest["encoder"]

    @property
    def prompt(self) -> str | None:
        return self._manifest["prompt"]

    @property
    def has_texts(self) -> bool:
        return self._manifest["texts"]

    def info(self) -> dict:
        """What the manifest says, with the bytes on disk and the bytes per vector of codes and of rescoring codes."""
        kept = ("format", "version", "count", "width", "precision", "rescore", "ids", "texts", "encoder", "prompt")
        sizes = {f"bytes_per_vector_{level}": code_bytes(p, self.width) for level, p in self._levels().items()}
        total = sum(entry["bytes"] for entry in self._manifest["segments"])
        return {name: self._manifest[name] for name in kept} | sizes | {"bytes": total}

    def require(
        self,
        *,
        width: int | None = None,
        precision: str | None = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> None:
        """Raises InputError unless each thing given, where the index knows it, is what the index was built with."""
        given = {"width": width, "precision": precision, "encoder": fingerprint(encoder), "prompt": prompt}
        for name, value in given.items():
            has = self._manifest[name]
            if value is not None and has is not None and value != has:
                raise InputError(
                    f"{name}: the index {self.path} was built with {name} {has!r}, not {value!r}; use the same, or "
                    "build the index anew"
                )

    def search(
        self,
        queries: object,
        k: int,
        *,
        oversample: int = 4,
        query_bits: int | None = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows for each query by dot product: (scores float32, ids), both (Q, min(k, N)), best first.

        queries: numpy or torch (Q, D). ids: int64, or strings in an object array. Equal scores: in order of insertion.
        oversample, query_bits: as in `leafkern.ops.search`. encoder, prompt: as in `open`.
        """
        scores, rows = self.search_rows(
            queries, k, oversample=oversample, query_bits=query_bits, encoder=encoder, prompt=prompt
        )
        return scores, self._strings_or_ids(rows)

    def search_rows(self, queries: object, k: int, *, oversample=4, query_bits=None, encoder=None, prompt=None):
        """As `search`, with row numbers (insertion numbers, int64) in place of ids."""
        self.require(encoder=query_fingerprint(encoder, self.encoder), prompt=prompt)
        queries = matrix("queries", queries)
        self.require(width=queries.shape[1])
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InputError(f"k: expected an int >= 1, got {k!r}")
        queries = float32(queries)
        check_finite("queries", queries)
        queries = torch.from_numpy(queries)
        found, start = [], 0
        for tensors, entry in zip(self._tensors, self._manifest["segments"]):
            levels = {level: self._quantized(tensors, level) for level in self._levels()}
            options = {"oversample": oversample} if "rescore" in levels else {}
            scores, rows = search(
                queries, levels["codes"], k, rescore=levels.get("rescore"), query_bits=query_bits, **options
            )
            found.append((scores.numpy(), rows.numpy() + start))
            start += entry["rows"]
        if not found:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found))
        if len(found) > 1:
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return scores, rows

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """The ids of row numbers, in an array of the same shape: int64, or strings as objects."""
        return self._strings_or_ids(np.asarray(rows))

    def texts_at(self, rows: np.ndarray) -> np.ndarray:
        """The stored texts of row numbers, as objects in an array of the same shape."""
        if not self.has_texts:
            raise InputError(f"{self.path}: the index was built without texts")
        return self._gather(
            np.asarray(rows), lambda tensors, rows, path: segments.strings_at(tensors, "text", rows, path)
        )

    def add(
        self,
        vectors: object,
        ids: object = None,
        *,
        texts: Sequence[str] | None = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> int:
        """Appends vectors (as in `build`); the number of values outside the frozen ranges, clipped (also warned of).

        ids None: numbered on from the highest so far. encoder, prompt: refused where the index has others.
        """
        self.require(encoder=encoder, prompt=prompt)
        with Rows(vectors, self.path, self.width) as rows:
            self.require(width=rows.width)
            self._check_new(rows, texts)
            new_ids = self._new_ids(rows.count, ids)
            if rows.count == 0:
                return 0
            tensors = self._tensors[0] if self._tensors else {}
            frozen = next((tensors[name] for name in ("codes_ranges", "rescore_ranges") if name in tensors), None)
            clipped = 0 if frozen is None else rows.clipped(frozen)
            self._replace(None, rows, new_ids, texts)
        if clipped:
            warnings.warn(
                f"{self.path}: {clipped} of {rows.count * self.width} values lie outside the ranges that the index was "
                "built with and were clipped; build it anew if there are many",
                ClippedWarning,
                stacklevel=2,
            )
        return clipped

    def remove(self, ids: object) -> int:
        """Removes the vectors of `ids`, each of which must be in the index; how many were removed."""
        ids = id_array(ids)
        known = self._all_ids()
        if len(ids) == 0:
            return 0
        if known is None or ids.type != known.type:
            kind = "the index is empty" if known is None else f"the index has {self._manifest['ids']} ids"
            raise InputError(f"ids: {ids[0].as_py()!r} is not in the index ({kind})")
        missing = ids.filter(pc.invert(pc.is_in(ids, value_set=known)))
        if len(missing):
            raise InputError(f"ids: {missing[0].as_py()!r} is not in the index ({len(missing)} such ids)")
        keep = ~np.asarray(pc.is_in(known, value_set=ids))
        self._replace(keep, None, None, None)
        return int((~keep).sum())

    def verify(self) -> None:
        """Reads everything; raises DamagedFileError, naming the file, unless it is what was written."""
        for entry, path, tensors in zip(self._manifest["segments"], self._files, self._tensors):
            found = segments.checksum(path)
            if found != entry["sha256"]:
                raise DamagedFileError(f"{path}: damaged: SHA-256 {found}, the manifest says {entry['sha256']}")
            if self.has_texts:
                segments.all_strings(tensors, "text", path)
        ids = self._all_ids()
        if ids is not None and len(ids.unique()) != len(self):
            raise DamagedFileError(f"{self.path}: some ids occur twice")

    # -- reading -------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        for attempt in range(8):
            self._manifest = read_manifest(self.path)
            self._tensors, self._files = [], []
            try:
                for entry in self._manifest["segments"]:
                    path = confined(self.path, entry["file"])
                    metadata = {"index": self._manifest["index"], "segment": entry["file"]}
                    self._tensors.append(
                        segments.open_mapped(path, entry["bytes"], metadata, self._expected(entry["rows"]))
                    )
                    self._files.append(path)
                return
            except DamagedFileError:
                # A writer may have replaced the segments between the two reads: then the manifest is another.
                if attempt == 7 or read_manifest(self.path)["revision"] == self._manifest["revision"]:
                    raise

    def _levels(self) -> dict[str, str]:
        """The tensors that hold codes, and their precisions."""
        return {"codes": self.precision} | ({"rescore": self.rescore} if self.rescore else {})

    def _expected(self, rows: int) -> dict:
        expected = segments.string_expected("id", rows) if self._manifest["ids"] == "string" else {}
        if self._manifest["ids"] == "int64":
            expected["ids"] = torch.int64, (rows,)
        if self.has_texts:
            expected |= segments.string_expected("text", rows)
        for level, precision in self._levels().items():
            dtype = code_dtype(precision)
            expected[level] = dtype, (rows, code_width(precision, self.width))
            if precision in ("int8", "int4"):
                expected |= {f"{level}_{part}": (torch.float32, (self.width,)) for part in ("scale", "offset")}
                expected[f"{level}_ranges"] = torch.float32, (2, self.width)
        return expected

    def _quantized(self, tensors: dict, level: str) -> Quantized:
        scale, offset = tensors.get(f"{level}_scale"), tensors.get(f"{level}_offset")
        return Quantized(tensors[level], scale, offset, self._levels()[level], self.width)

    def _gather(self, rows: np.ndarray, read: Callable[..., np.ndarray], dtype: type = object) -> np.ndarray:
        """read(tensors of a segment, row numbers in it, its file) for each row number of the index."""
        out, start = np.empty(rows.shape, dtype), 0
        for entry, tensors, path in zip(self._manifest["segments"], self._tensors, self._files):
            inside = (rows >= start) & (rows < start + entry["rows"])
            out[inside] = read(tensors, rows[inside] - start, path)
            start += entry["rows"]
        return out

    def _strings_or_ids(self, rows: np.ndarray) -> np.ndarray:
        if self._manifest["ids"] == "string":
            return self._gather(rows, lambda tensors, rows, path: segments.strings_at(tensors, "id", rows, path))
        return self._gather(rows, lambda tensors, rows, path: tensors["ids"].numpy()[rows], np.int64)

    def _all_ids(self) -> pa.Array | None:
        """All ids in order of rows; None where there are none."""
        if not self._tensors:
            return None
        if self._manifest["ids"] == "string":
            parts = [segments.all_strings(t, "id", path) for t, path in zip(self._tensors, self._files)]
        else:
            parts = [pa.array(tensors["ids"].numpy()) for tensors in self._tensors]
        return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)

    # -- writing -------------------------------------------------------------------------------------------------

    def _check_new(self, rows: Rows, texts: Sequence[str] | None) -> None:
        if self.has_texts and rows.count and texts is None:
            raise InputError("texts: the index keeps texts; give one per vector")
        if texts is not None and not self.has_texts:
            raise InputError("texts: the index was built without texts; build it anew to keep them")
        if texts is not None and len(texts) != rows.count:
            raise InputError(f"texts: {len(texts)} for {rows.count} vectors; expected one each")
        for row, text in enumerate(() if texts is None else texts):
            if not isinstance(text, str):
                raise InputError(f"texts: row {row} is {type(text).__name__}, not str")
            if not is_unicode(text):
                raise InputError(f"texts: row {row} holds a lone surrogate, which is no valid Unicode text")
        rows.check_finite()

    def _check_ranges(self, rows: Rows, ranges: object) -> None:
        if ranges is None:
            return
        if not {"int8", "int4"} & set(self._levels().values()):
            raise InputError(f"ranges: an index of {self.precision} has no int8 or int4 codes; leave them out")
        if rows.count == 0:
            raise InputError("ranges: an empty index takes them from the vectors first added; leave them out")

    def _new_ids(self, count: int, ids: object) -> pa.Array:
        """The ids of `count` new rows, checked; sets what the manifest says of ids."""
        if ids is None:
            if self._manifest["ids"] == "string":
                raise InputError("ids: the index has string ids; give one per vector")
            start = self._manifest["next_id"]
            ids = np.arange(start, start + count, dtype=np.int64)
        ids = id_array(ids)
        if len(ids) != count:
            raise InputError(f"ids: {len(ids)} for {count} vectors; expected one each")
        known = self._all_ids()
        if known is not None and count and known.type != ids.type:
            raise InputError(f"ids: the index has {self._manifest['ids']} ids, got {ids[0].as_py()!r}")
        if len(ids.unique()) != count:
            counted = pc.value_counts(ids)
            twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
            raise InputError(f"ids: {twice[0].as_py()!r} is given more than once ({len(twice)} such ids)")
        if known is not None:
            again = ids.filter(pc.is_in(ids, value_set=known))
            if len(again):
                raise InputError(f"ids: {again[0].as_py()!r} is already in the index ({len(again)} such ids)")
        return ids

    def _replace(
        self, keep: np.ndarray | None, new: Rows | None, new_ids: pa.Array | None, new_texts: Sequence[str] | None
    ) -> None:
        """Writes old rows (those of `keep`, or all) and new ones as one segment, then replaces the manifest."""
        with writing(self.path):
            self._replace_alone(keep, new, new_ids, new_texts)

    def _replace_alone(self, keep, new, new_ids, new_texts) -> None:
        if (self.path / MANIFEST).exists() and self._manifest["revision"]:
            if read_manifest(self.path)["revision"] != self._manifest["revision"]:
                raise InputError(f"{self.path}: changed on disk since it was opened; open it again")
        self._clean()
        manifest = dict(self._manifest, revision=uuid.uuid4().hex, segments=[])
        kept = (int(keep.sum()) if keep is not None else len(self)) if self._tensors else 0
        manifest["count"] = kept + (new.count if new is not None else 0)
        if new_ids is not None and len(new_ids):
            manifest["ids"] = "int64" if pa.types.is_int64(new_ids.type) else "string"
            if manifest["ids"] == "int64":
                manifest["next_id"] = max(manifest["next_id"], min(pc.max(new_ids).as_py(), 2**63 - 2) + 1)
        path = None
        try:
            if manifest["count"]:
                name = f"segment-{uuid.uuid4().hex[:16]}.safetensors"
                path = self.path / name
                columns = self._columns(keep, new, new_ids, new_texts, manifest["count"])
                metadata = {"index": manifest["index"], "segment": name}
                size, sha256 = segments.write(path, columns, metadata)
                manifest["segments"] = [
                    {"file": name, "layout": "rows", "rows": manifest["count"], "bytes": size, "sha256": sha256}
                ]
            else:
                manifest["ids"] = None
            write_json(self.path / MANIFEST, manifest)
        except BaseException:
            on_disk = self.path / MANIFEST
            if path is not None and not (on_disk.exists() and name.encode() in on_disk.read_bytes()):
                path.unlink(missing_ok=True)
            raise
        self._load()
        self._clean()

    def _clean(self) -> None:
        """Removes temporary files and the segments that the manifest on disk does not name."""
        remove_leftovers(self.path)
        named = set()
        if (self.path / MANIFEST).exists():
            try:
                named = {entry["file"] for entry in read_manifest(self.path)["segments"]}
            except DamagedFileError:
                return  # about to be replaced by a new build: until then, nothing of it is thrown away
        for entry in self.path.glob("segment-*.safetensors"):
            if entry.name not in named:
                try:
                    entry.unlink(missing_ok=True)
                except PermissionError:
                    pass  # Windows keeps a file that is still mapped; the next writer removes it

    def _columns(self, keep, new, new_ids, new_texts, count) -> dict[str, Column]:
        columns: dict[str, Column] = {}
        old_ids = self._all_ids()
        ids = _joined(old_ids, keep, new_ids)
        if pa.types.is_int64(ids.type):
            columns["ids"] = Column.of(ids.to_numpy())
        else:
            columns |= segments.string_columns("id", ids)
        if self.has_texts:
            old = [segments.all_strings(t, "text", path) for t, path in zip(self._tensors, self._files)]
            texts = None if new_texts is None else pa.array(new_texts, pa.large_string())
            columns |= segments.string_columns("text", _joined(pa.concat_arrays(old) if old else None, keep, texts))
        for level, precision in self._levels().items():
            ranges = None
            if precision in ("int8", "int4"):
                ranges = self._tensors[0][f"{level}_ranges"] if self._tensors else new.ranges(precision)
                probe = quantize(torch.zeros((0, self.width)), precision, ranges=ranges)
                columns[f"{level}_ranges"] = Column.of(ranges.numpy())
                columns[f"{level}_scale"] = Column.of(probe.scale.numpy())
                columns[f"{level}_offset"] = Column.of(probe.offset.numpy())
            dtype = torch.empty(0, dtype=code_dtype(precision)).numpy().dtype
            blocks = self._code_blocks(level, precision, ranges, keep, new)
            columns[level] = Column(dtype, (count, code_width(precision, self.width)), blocks)
        return columns

    def _code_blocks(self, level, precision, ranges, keep, new) -> Iterator[np.ndarray]:
        start = 0
        for tensors in self._tensors:
            codes = tensors[level].numpy()
            step = max(1, _BLOCK_BYTES // (codes.shape[1] * codes.itemsize))
            for first in range(0, len(codes), step):
                block = codes[first : first + step]
                yield block if keep is None else block[keep[start + first : start + first + len(block)]]
            start += len(codes)
        if new is not None:
            yield from new.codes(precision, ranges)


def _joined(old: pa.Array | None, keep: np.ndarray | None, new: pa.Array | None) -> pa.Array:
    parts = [] if old is None else [old if keep is None else old.filter(pa.array(keep))]
    parts += [] if new is None else [new]
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
