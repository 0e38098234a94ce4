"""Vectors on disk: built once, grown, opened without being read, searched exactly.

Format v1: a folder with manifest.json (what the index is, and a list of segments), the segments, a file of deleted rows
for each segment that has some, and the rotation, if any. `add` writes one more segment, `remove` marks rows as deleted,
`compact` writes segments together; nothing else is written again. New files are made durable, then the manifest is
replaced: a kill at any point leaves the previous index whole. One writer at a time, held by a lock; readers need none:
what they have mapped stays.
"""

import os
import uuid
import warnings
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import torch

from leafkern.console import Report, unseen
from leafkern.errors import InputError
from leafkern.files import make_folder, remove_leftovers, writing
from leafkern.index import writer
from leafkern.index.manifest import (
    FORMAT,
    PRECISIONS,
    RESCORE_PRECISIONS,
    VERSION,
    Described,
    checked_rescore,
    code_bytes,
    fingerprint,
    is_part,
    query_fingerprint,
)
from leafkern.index.reader import Candidates, Snapshot, levels_of
from leafkern.index.segment import Column
from leafkern.index.vectors import Rows, checked_source, checked_texts, float32, matrix, random_rotation
from leafkern.textio import check_finite, is_unicode

__all__ = ["PRECISIONS", "RESCORE_PRECISIONS", "ClippedWarning", "Index"]


class ClippedWarning(UserWarning):
    """Added vectors hold values outside the ranges that were frozen when the index was built."""


class Index(Described):
    """An exact dot-product index on disk. Made by `Index.build` or `Index.open`.

    path: its folder. width, precision, rescore: of the vectors, of the codes scanned, of the codes rescored (or None).
    encoder, prompt: fingerprint of what made the vectors, and the text put before each document; None: not known.

    A handle shows the index as it was when it was opened, changed through this handle, or refreshed. Any number of
    threads may read through it beside one that writes. Row numbers are insertion numbers: they stay until `compact`.
    What belongs together, as `search_rows` and `texts_at`, is asked of one `pinned` handle where others may change it.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens the index at `path`; `Index.open` also checks what it holds."""
        self._set_up(path, None)

    def _set_up(self, path: str | os.PathLike, state: Snapshot | None) -> None:
        self.path, self._refreshing = Path(path), Lock()
        self._state = Snapshot.open(self.path) if state is None else state

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
        texts: object = None,
        width: int | None = None,
        ranges: object = None,
        rotate: bool | int = False,
        source: dict | None = None,
        progress: Report = unseen,
    ) -> "Index":
        """Makes an index at `path`, in place of one that is there.

        vectors: numpy or torch (N, D), or an iterable of such blocks (which are kept on disk meanwhile); N may be 0.
        ids: N different int64 or strings; None numbers the rows from 0. texts: N strings that `texts_at` gives back.
        Arrow arrays of either are not copied.
        precision: of the codes scanned; rescore: of the codes that the best candidates are scored with again, finer, or
        None. An index of float32 or float16 needs none: there "float16", the default, means None.
        ranges: numpy or torch (2, D) for the int8 and int4 codes, as `calibrate` gives them; values outside are
        clipped. None takes them from these vectors as `quantize` does. They are frozen; an empty index takes them from
        what is first added.
        encoder (an `Encoder` or its fingerprint), prompt: what made the vectors; kept, and compared by `require`.
        width: D, needed only where `vectors` is an iterable without blocks.
        rotate: True (seed 0) or a seed multiplies vectors and queries by a random rotation, kept in the index, which
        leaves all dot products as they are and spreads what a few dimensions hold over all of them. That helps codes of
        few bits where dimensions differ much; what it adds on real vectors stands in bench/results/recall/guide.md.
        source: a dict that JSON can hold, kept in the manifest as `Index.source`: where the vectors came from.
        progress: called with what is done, rows so far and rows in all; here, by `add` and by `compact`.

        Errors (InputError): NaN, infinity or values too large for float16 (row named), fewer than 100 vectors that are
        not unit-norm and no ranges for their int8 or int4 codes, ranges where nothing takes them, duplicate or unfit
        ids, unknown precision, a folder that holds something else, another process that is writing it.
        """
        path = Path(path)
        if not isinstance(rotate, int) or rotate < 0:
            raise InputError(f"rotate: expected True, False or a seed >= 0, got {rotate!r}")
        if prompt is not None and not (isinstance(prompt, str) and is_unicode(prompt)):
            raise InputError(f"prompt: expected the text put before each document, or None; got {prompt!r:.80}")
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
            "source": checked_source(source),
            "rotation": None,
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
        index._set_up(path, Snapshot(path, manifest, [], None))
        try:
            make_folder(path)
            with Rows(vectors, path, width, ranges, progress) as rows:
                if width not in (None, rows.width):
                    raise InputError(f"width: {width!r}, but the vectors have width {rows.width}; leave it out")
                manifest["width"] = rows.width
                texts = index._checked_new(index._state, rows, texts)
                index._check_ranges(rows, ranges, rotate)
                new_ids = writer.new_ids(index._state, rows.count, ids)
                make_folder(path)  # another build that failed may have removed it
                with writer.changing(path, manifest, anew=True) as change:
                    if rotate is not False:
                        rows.rotation = random_rotation(rows.width, 0 if rotate is True else rotate)
                        change.manifest["rotation"] = change.write(
                            "rotation", {"rotation": Column.of(rows.rotation.numpy())}
                        )
                    writer.append(change, [], rows, new_ids, texts)
        except BaseException:
            if not existed and path.is_dir():
                with suppress(InputError):  # not while another process builds there
                    with writing(path):
                        remove_leftovers(path)
                    with suppress(OSError):  # where there is something in it
                        path.rmdir()
            raise
        index.refresh()
        return index

    @property
    def _facts(self) -> dict:
        return self._state.manifest

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}: {len(self)} × {self.width}, {self.precision}, rescore {self.rescore})"

    @property
    def source(self) -> dict | None:
        """What the last `build` or `add` that was given a source said of it."""
        return self._state.manifest["source"]

    @property
    def rotates(self) -> bool:
        return self._state.manifest["rotation"] is not None

    def info(self) -> dict:
        """What the manifest says, with the bytes on disk and the bytes per vector of codes and of rescoring codes."""
        manifest = self._state.manifest
        kept = (
            "format",
            "version",
            "count",
            "width",
            "precision",
            "rescore",
            "ids",
            "texts",
            "encoder",
            "prompt",
            "source",
        )
        sizes = {f"bytes_per_vector_{level}": code_bytes(p, self.width) for level, p in levels_of(manifest).items()}
        entries = [entry for _, entry in self._state.files()]
        return (
            {name: manifest[name] for name in kept}
            | {"rotates": manifest["rotation"] is not None, "segments": len(manifest["segments"])}
            | {"deleted": sum(entry["rows"] for entry in manifest["segments"]) - manifest["count"]}
            | sizes
            | {"bytes": sum(entry["bytes"] for entry in entries)}
        )

    def require(
        self,
        *,
        width: int | None = None,
        precision: str | None = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> None:
        """Raises InputError unless each thing given, where the index knows it, is what the index was built with."""
        self._require(self._state, width=width, precision=precision, encoder=fingerprint(encoder), prompt=prompt)

    def _require(self, state: Snapshot, **given: object) -> None:
        for name, value in given.items():
            has = state.manifest[name]
            if value is not None and has is not None and value != has:
                raise InputError(
                    f"{name}: the index {self.path} was built with {name} {has!r}, not {value!r}; use the same, or "
                    "build the index anew"
                )

    def refresh(self) -> bool:
        """Shows the newest state on disk from now on; whether it is another than before."""
        with self._refreshing:
            before = self._state
            self._state = Snapshot.open(self.path, before)
            return self._state.manifest["revision"] != before.manifest["revision"]

    def pinned(self) -> "Index":
        """A handle that shows what this one shows now, also after this one has changed or was refreshed."""
        index = type(self).__new__(type(self))
        index._set_up(self.path, self._state)
        return index

    # -- reading -------------------------------------------------------------------------------------------------

    def search(
        self,
        queries: object,
        k: int,
        *,
        oversample: int = 4,
        query_bits: int | None = None,
        dim: int | None = None,
        allowed: object = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows for each query by dot product: (scores float32, ids), both (Q, min(k, N)), best first.

        queries: numpy or torch (Q, D). ids: int64, or strings in an object array. Equal scores: in order of insertion.
        oversample, query_bits: as in `leafkern.ops.search`. encoder, prompt: as in `open`.
        dim: the codes are scanned by their first `dim` dimensions (for vectors of which each prefix is meaningful, as
        Matryoshka learning makes them; their prefixes are not unit vectors). Queries may have from `dim` dimensions to
        D: the best candidates are scored again on as many, with the finest codes. int4 codes end at even dimensions,
        binary ones at multiples of 8; a rotated index has no prefixes.
        allowed: only rows where it is true are searched, and N is how many these are: bool numpy or torch (n,) by row
        number, n = `row_count`.
        """
        state = self._state
        options = {"oversample": oversample, "query_bits": query_bits, "dim": dim, "allowed": allowed}
        scores, rows = self._search(state, queries, k, **options, encoder=encoder, prompt=prompt)
        return scores, state.ids_at(rows)

    def search_rows(
        self,
        queries: object,
        k: int,
        *,
        oversample=4,
        query_bits=None,
        dim=None,
        allowed=None,
        encoder=None,
        prompt=None,
    ):
        """As `search`, with row numbers (insertion numbers, int64) in place of ids."""
        return self._search(self._state, queries, k, oversample, query_bits, dim, allowed, encoder, prompt)

    def candidates(self, queries: object, k: int, **options) -> Candidates:
        """What `search` with these arguments chooses from: so several indexes are searched as one (`reader.joined`)."""
        return self._search(self._state, queries, k, **options, choose=Snapshot.candidates)

    def _search(
        self,
        state: Snapshot,
        queries,
        k,
        oversample=4,
        query_bits=None,
        dim=None,
        allowed=None,
        encoder=None,
        prompt=None,
        choose=Snapshot.search_rows,
    ):
        self._require(state, encoder=query_fingerprint(encoder, state.manifest["encoder"]), prompt=prompt)
        queries = matrix("queries", queries)
        wide, width = queries.shape[1], state.manifest["width"]
        if dim is None:
            self._require(state, width=wide)
            dim = width
        elif not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= width:
            raise InputError(f"dim: expected an int from 1 to {width}, got {dim!r}")
        elif not dim <= wide <= width:
            raise InputError(f"queries: expected from {dim} (dim) to {width} dimensions, got {wide}")
        elif state.rotation is not None and (dim, wide) != (width, width):
            raise InputError(f"dim: the vectors of {self.path} are rotated: their prefixes mean nothing; leave it out")
        for name, value in (("k", k), ("oversample", oversample)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: expected an int >= 1, got {value!r}")
        queries = float32(queries)
        check_finite("queries", queries)
        if allowed is not None:
            allowed = torch.as_tensor(allowed).cpu()
            if allowed.dtype != torch.bool or allowed.shape != (state.row_count,):
                raise InputError(
                    f"allowed: expected a bool for each of {state.row_count} rows, removed ones included; got "
                    f"{allowed.dtype} of shape {tuple(allowed.shape)}"
                )
        return choose(state, torch.from_numpy(queries), k, oversample, query_bits, dim, allowed)

    @property
    def row_count(self) -> int:
        """Rows up to the last row number, removed ones included."""
        return self._state.row_count

    def rows(self) -> np.ndarray:
        """The numbers of all rows that are not removed, int64, in order."""
        return np.concatenate([np.zeros(0, np.int64), *(part.live_rows() for part in self._state.segments)])

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """The ids of row numbers, in an array of the same shape: int64, or strings as objects."""
        return self._state.ids_at(rows)

    def texts_at(self, rows: np.ndarray) -> np.ndarray:
        """The stored texts of row numbers, as objects in an array of the same shape."""
        if not self.has_texts:
            raise InputError(f"{self.path}: the index was built without texts")
        return self._state.texts_at(rows)

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """float32 (..., D): the vectors of row numbers, as the finest codes hold them; a rotation is undone."""
        return self._state.vectors_at(rows)

    def verify(self, *, progress: Report = unseen) -> None:
        """Reads everything; raises DamagedFileError, naming the file, unless it is what was written.

        progress: called with what is done, and millions of bytes so far and in all.
        """
        self._state.verify(progress)

    # -- writing -------------------------------------------------------------------------------------------------

    def add(
        self,
        vectors: object,
        ids: object = None,
        *,
        texts: object = None,
        encoder: object = None,
        prompt: str | None = None,
        source: dict | None = None,
        progress: Report = unseen,
    ) -> int:
        """Appends vectors (as in `build`) as one more segment; how many values were clipped (also warned of).

        Clipped are values outside the ranges of the int8 or int4 codes, which are frozen. Where others have changed the
        index since this handle was opened or refreshed, they are appended to what it holds now (not with `source`).

        ids None: numbered on from the highest so far. encoder, prompt: refused where the index has others. source:
        replaces the index's in the same step as the vectors come in, so that it can say how far one has got; None
        leaves it. Many small segments are searched more slowly than one: `compact` joins them, nothing else does.
        """
        state, source = self._state, checked_source(source)
        self._require(state, encoder=fingerprint(encoder), prompt=prompt)
        with Rows(vectors, self.path, state.manifest["width"], progress=progress) as rows:
            self._require(state, width=rows.width)
            texts = self._checked_new(state, rows, texts)
            rows.rotation = state.rotation
            ids = writer.new_ids(state, rows.count, ids) if ids is not None else None
            if rows.count == 0 and source is None:
                return 0
            with writer.changing(self.path, state.manifest, newest=source is None) as change:
                newest = Snapshot.open(self.path, state)
                if ids is None or newest is not state:
                    ids = writer.new_ids(newest, rows.count, ids)
                state = newest
                ranges = [*writer.ranges_of(state.segments[:1]).values()]
                clipped = rows.clipped(ranges[0]) if ranges else 0
                writer.append(change, state.segments, rows, ids, texts)
                if source is not None:
                    change.manifest["source"] = source
        self.refresh()
        if clipped:
            warnings.warn(
                f"{self.path}: {clipped} of {rows.count * self.width} values lie outside the ranges that the index was "
                "built with and were clipped; build it anew if there are many",
                ClippedWarning,
                stacklevel=2,
            )
        return clipped

    def remove(self, ids: object) -> int:
        """Removes the vectors of `ids`, each of which must be in the index; how many were removed.

        They are marked and found no more; what they take on disk is freed by `compact`. An index without any vector
        left is as one built empty: what is added next sets the ranges of its int8 or int4 codes, and the kind of ids.
        """
        state = self._state
        hits = writer.find(state, ids)
        count = sum(int(some.sum()) for some in hits)
        if count:
            with writer.changing(self.path, state.manifest) as change:
                writer.delete(change, state.segments, hits)
            self.refresh()
        return count

    def compact(self, *, smaller_than: int | None = None, progress: Report = unseen) -> int:
        """Writes all segments as one, without removed rows; how many were written anew.

        smaller_than: only segments of fewer rows, where several stand together or rows were removed. Rows keep their
        order and get new numbers. Takes the memory of a block, and for a while the disk space of both. What a killed
        writer left is removed, as by every change.
        """
        if smaller_than is not None and (not isinstance(smaller_than, int) or smaller_than < 1):
            raise InputError(f"smaller_than: expected an int >= 1 or None, got {smaller_than!r}")
        state = self._state
        grouped = writer.runs(state, smaller_than)
        old = sum(len(run) for run in grouped if not writer.stays(run, smaller_than))
        if old:
            with writer.changing(self.path, state.manifest) as change:
                writer.compact(change, grouped, smaller_than, progress)
            self.refresh()
        else:
            with writing(self.path):
                writer.clean(self.path)
        return old

    def _checked_new(self, state: Snapshot, rows: Rows, texts: object) -> pa.ChunkedArray | None:
        texts = checked_texts(texts, rows.count, state.manifest["texts"])
        rows.check_finite()
        return texts

    def _check_ranges(self, rows: Rows, ranges: object, rotate: bool | int) -> None:
        if ranges is None:
            return
        if not {"int8", "int4"} & set(levels_of(self._state.manifest).values()):
            raise InputError(f"ranges: an index of {self.precision} has no int8 or int4 codes; leave them out")
        if rows.count == 0:
            raise InputError("ranges: an empty index takes them from the vectors first added; leave them out")
        if rotate is not False:
            raise InputError("ranges: a rotated index takes them from the rotated vectors; leave them out")
