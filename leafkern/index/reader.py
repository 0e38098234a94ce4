"""What an index holds at one moment: its segments, mapped into memory; searched, looked up and checked.

A row's number is the place at which it was inserted, counted over all segments in their order, deleted rows included.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from leafkern.console import Report
from leafkern.errors import DamagedFileError, InputError
from leafkern.files import confined
from leafkern.index import segment as segments
from leafkern.index.manifest import LARGEST_ID, MANIFEST, checksum, code_dtype, live, read_manifest
from leafkern.index.vectors import rotated
from leafkern.ops import Quantized, dequantize, search
from leafkern.ops._core.checks import all_finite
from leafkern.ops.quantization import code_width
from leafkern.ops.retrieval import FoldedQueries, checked_query_bits, is_integer, rescore_candidates

# Each attempt that fails means that a writer has replaced files meanwhile.
_ATTEMPTS = 64
_RANGED = ("int8", "int4")
# Rows of several segments that are brought together at a time to be rescored.
_GATHERED_BYTES = 1 << 26


def levels_of(manifest: dict) -> dict[str, str]:
    """The tensors of a segment that hold codes, from coarse to fine, and their precisions."""
    return {"codes": manifest["precision"]} | ({"rescore": manifest["rescore"]} if manifest["rescore"] else {})


def _expected(manifest: dict, rows: int) -> dict:
    """The tensors of a segment: their dtypes and shapes."""
    width = manifest["width"]
    expected = segments.string_expected("id", rows) if manifest["ids"] == "string" else {}
    if manifest["ids"] == "int64":
        expected["ids"] = torch.int64, (rows,)
    if manifest["texts"]:
        expected |= segments.string_expected("text", rows)
    for level, precision in levels_of(manifest).items():
        expected[level] = code_dtype(precision), (rows, code_width(precision, width))
        if precision in _RANGED:
            expected |= {f"{level}_{part}": (torch.float32, (width,)) for part in ("scale", "offset")}
            expected[f"{level}_ranges"] = torch.float32, (2, width)
    return expected


class Segment:
    """A mapped segment. entry: the manifest's; first: the number of its first row; tensors: as in the file."""

    def __init__(self, path: Path, entry: dict, first: int, tensors: dict, deleted: tuple[Path, torch.Tensor] | None):
        self.path, self.entry, self.first, self.tensors, self._deleted = path, entry, first, tensors, deleted

    def __len__(self) -> int:
        """Rows, deleted ones included."""
        return self.entry["rows"]

    @property
    def live(self) -> int:
        return live(self.entry)

    @property
    def parts(self) -> Iterator[tuple[Path, dict]]:
        """Its files, and what the manifest says of each."""
        yield self.path, self.entry
        if self._deleted is not None:
            yield self._deleted[0], self.entry["deleted"]

    @cached_property
    def allowed(self) -> torch.Tensor | None:
        """bool (rows,): not deleted. None: no row is. Read when first asked for."""
        if self._deleted is None:
            return None
        path, bits = self._deleted
        deleted = np.unpackbits(bits.numpy(), bitorder="little").astype(bool)
        if deleted[len(self) :].any() or deleted.sum() != self.entry["deleted"]["count"]:
            raise DamagedFileError(
                f"{path}: marks {deleted.sum()} rows, the manifest says {self.entry['deleted']['count']}"
            )
        return torch.from_numpy(~deleted[: len(self)])

    def among(self, allowed: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
        """Its rows (bool; None: all) that are not deleted and in `allowed`, bool of all rows; and how many they are."""
        if allowed is None:
            return self.allowed, self.live
        inside = allowed[self.first : self.first + len(self)]
        inside = inside if self.allowed is None else inside & self.allowed
        return inside, int(inside.sum())

    def live_rows(self) -> np.ndarray:
        """The numbers of its rows that are not deleted."""
        inside = np.arange(len(self)) if self.allowed is None else np.flatnonzero(self.allowed.numpy())
        return inside + self.first

    def level(self, name: str, precision: str, width: int) -> Quantized:
        """The codes of one level: views of the file."""
        scale, offset = self.tensors.get(f"{name}_scale"), self.tensors.get(f"{name}_offset")
        return Quantized(self.tensors[name], scale, offset, precision, width)

    def ids(self) -> pa.Array:
        """All its ids, of deleted rows too."""
        if "ids" in self.tensors:
            return pa.array(self.tensors["ids"].numpy())
        return segments.all_strings(self.tensors, "id", self.path)

    def live_ids(self) -> pa.Array:
        return self.ids() if self.allowed is None else self.ids().filter(pa.array(self.allowed.numpy()))


class Snapshot:
    """The index in `folder` as one manifest says; never changes. rotation: float32 (D, D), or None."""

    def __init__(self, folder: Path, manifest: dict, parts: list[Segment], rotation: torch.Tensor | None):
        self.folder, self.manifest, self.segments, self.rotation = folder, manifest, parts, rotation

    @classmethod
    def open(cls, folder: Path, known: "Snapshot | None" = None) -> "Snapshot":
        """The newest state. Segments that `known` has mapped are not opened again."""
        attempts = 0
        while True:
            manifest = read_manifest(folder)
            if known is not None and known.manifest["revision"] == manifest["revision"]:
                return known
            try:
                return cls._mapped(folder, manifest, known)
            except DamagedFileError:
                # A writer may have removed files since the manifest was read: then there is a newer one.
                attempts += 1
                if attempts == _ATTEMPTS or read_manifest(folder)["revision"] == manifest["revision"]:
                    raise

    @classmethod
    def _mapped(cls, folder: Path, manifest: dict, known: "Snapshot | None") -> "Snapshot":
        mapped = {} if known is None else {part.entry["file"]: part for part in known.segments}

        def tensors(entry: dict, expected: dict) -> tuple[Path, dict]:
            path = confined(folder, entry["file"])
            metadata = {"index": manifest["index"], "segment": entry["file"]}
            return path, segments.open_mapped(path, entry["bytes"], metadata, expected)

        parts, first = [], 0
        for entry in manifest["segments"]:
            same = mapped.get(entry["file"])
            if same is None or same.entry["sha256"] != entry["sha256"] or len(same) != entry["rows"]:
                path, content = tensors(entry, _expected(manifest, entry["rows"]))
            else:
                path, content = same.path, same.tensors
            deleted = None
            if entry["deleted"] is not None:
                size = (entry["rows"] + 7) // 8
                bits_path, bits = tensors(entry["deleted"], {"deleted": (torch.uint8, (size,))})
                deleted = bits_path, bits["deleted"]
            parts.append(Segment(path, entry, first, content, deleted))
            first += entry["rows"]
        rotation = None
        if manifest["rotation"] is not None:
            shape = manifest["width"], manifest["width"]
            rotation = tensors(manifest["rotation"], {"rotation": (torch.float32, shape)})[1]["rotation"]
        return cls(folder, manifest, parts, rotation)

    @property
    def row_count(self) -> int:
        return sum(map(len, self.segments))

    def files(self) -> list[tuple[Path, dict]]:
        """All its files, and what the manifest says of each."""
        found = [pair for part in self.segments for pair in part.parts]
        rotation = self.manifest["rotation"]
        return found if rotation is None else [*found, (self.folder / rotation["file"], rotation)]

    # -- search ----------------------------------------------------------------------------------------------------

    def search_rows(
        self,
        queries: torch.Tensor,
        k: int,
        oversample: int,
        query_bits: int | None,
        dim: int,
        allowed: torch.Tensor | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores, row numbers) of the best rows for queries float32 (Q, D'); the first stage on `dim` dimensions.

        allowed: bool of all rows, or None. The candidates are the best of all segments together, by integers where the
        codes are searched by such: how rows lie in segments changes no result.
        """
        if len(self.segments) == 1 and queries.shape[1] == dim and "rescore" in levels_of(self.manifest):
            queries, coarse, finer = self._stages(queries, dim)
            inside, count = self.segments[0].among(allowed)
            options = {"rescore": finer[0], "oversample": oversample, "query_bits": query_bits, "allowed": inside}
            scores, rows = search(queries, coarse[0], max(1, min(k, count)), **options)
            return scores[:, :count].numpy(), rows[:, :count].numpy()
        return self.candidates(queries, k, oversample, query_bits, dim, allowed).best(k)

    def candidates(
        self,
        queries: torch.Tensor,
        k: int,
        oversample: int,
        query_bits: int | None,
        dim: int,
        allowed: torch.Tensor | None,
    ) -> "Candidates":
        """What `search_rows` chooses from."""
        queries, coarse, finer = self._stages(queries, dim)
        rescoring = finer is not None
        keep = k * oversample if rescoring else k
        best = _FirstStage(queries[:, :dim].contiguous(), query_bits, rescoring)
        found = []
        for part, level in zip(self.segments, coarse):
            inside, count = part.among(allowed)
            if count:
                order, scores, rows = best(level, min(keep, count), inside)
                found.append((order, scores, rows + part.first))
        if not found:
            none = np.zeros((len(queries), 0), np.float32)
            return Candidates(none.astype(np.int64), none.astype(np.float64), none, keep, rescoring)
        order, scores, rows = (torch.cat(some, dim=1) for some in zip(*found))
        # Stable, and the segments stand in order: equal scores stay in order of insertion.
        places = order.sort(dim=1, descending=True, stable=True).indices[:, :keep]
        rows, rising = rows.gather(1, places).sort(dim=1)
        order, fine = (values.gather(1, places).gather(1, rising) for values in (order, scores))
        if rescoring:
            fine = self._fine(queries, finer, rows)
            if not all_finite(fine):
                raise InputError("queries: scores overflow float32; scale the queries down")
        return Candidates(rows.numpy(), order.numpy(), fine.numpy(), keep, rescoring)

    def _fine(self, queries: torch.Tensor, levels: list[Quantized], rows: torch.Tensor) -> torch.Tensor:
        """The scores of rows (Q, C) by the segments' `levels`: (Q, C)."""
        step = max(1, _GATHERED_BYTES // max(1, rows.shape[1] * levels[0].codes[:1].nbytes))
        found = []
        for some, candidates in zip(queries.split(step), rows.split(step)):
            level = self._gathered(levels, candidates.flatten())
            parts = level.codes, level.scale, level.offset, level.precision
            places = torch.arange(candidates.numel()).view_as(candidates)
            scores, order = rescore_candidates(some, *parts, places, candidates.shape[1])
            found.append(scores.gather(1, order.sort(dim=1).indices))
        return torch.cat(found)

    def _gathered(self, levels: list[Quantized], rows: torch.Tensor) -> Quantized:
        """The rows of these numbers (N,), each from its segment's level."""
        like = levels[0]
        codes = torch.empty((len(rows), like.codes.shape[1]), dtype=like.codes.dtype)
        for part, level in zip(self.segments, levels):
            inside = (rows >= part.first) & (rows < part.first + len(part))
            codes[inside] = level.codes[rows[inside] - part.first]
        return Quantized(codes, like.scale, like.offset, like.precision, like.dim)

    def _stages(self, queries: torch.Tensor, dim: int) -> tuple[torch.Tensor, list[Quantized], list[Quantized] | None]:
        """Queries as the codes need them; what each segment is scanned by, and rescored by, if at all."""
        levels, width, wide = levels_of(self.manifest), self.manifest["width"], queries.shape[1]
        fine = "rescore" if "rescore" in levels else "codes" if wide > dim else None
        coarse = [part.level("codes", levels["codes"], width).prefix(dim) for part in self.segments]
        finer = [part.level(fine, levels[fine], width).prefix(wide) for part in self.segments] if fine else None
        return queries if self.rotation is None else rotated(queries, self.rotation), coarse, finer

    # -- looking up ------------------------------------------------------------------------------------------------

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        if self.manifest["ids"] == "string":
            return self._gather(rows, lambda part, inside: segments.strings_at(part.tensors, "id", inside, part.path))
        return self._gather(rows, lambda part, inside: part.tensors["ids"].numpy()[inside], np.int64)

    def texts_at(self, rows: np.ndarray) -> np.ndarray:
        return self._gather(rows, lambda part, inside: segments.strings_at(part.tensors, "text", inside, part.path))

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """float32 (..., D): what the finest codes of rows stand for, before rotation."""
        rows = self._checked(rows)
        if rows.size == 0:
            return np.zeros((*rows.shape, self.manifest["width"]), np.float32)
        name, precision = list(levels_of(self.manifest).items())[-1]
        levels = [part.level(name, precision, self.manifest["width"]) for part in self.segments]
        found = dequantize(self._gathered(levels, torch.from_numpy(rows.ravel())))
        found = found if self.rotation is None else rotated(found, self.rotation.T)
        return found.view(*rows.shape, -1).numpy()

    def _checked(self, rows: object) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.size == 0:
            return rows.astype(np.int64)
        if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= self.row_count:
            raise InputError(f"rows: expected row numbers from 0 to {self.row_count - 1}, as `search_rows` gives them")
        return rows.astype(np.int64)

    def _gather(self, rows: np.ndarray, read: Callable[..., np.ndarray], dtype: type = object) -> np.ndarray:
        """read(segment, row numbers in it) for each row number of the index."""
        rows = self._checked(rows)
        out = np.empty(rows.shape, dtype)
        for part in self.segments:
            inside = (rows >= part.first) & (rows < part.first + len(part))
            if inside.any():
                out[inside] = read(part, rows[inside] - part.first)
        return out

    # -- checking --------------------------------------------------------------------------------------------------

    def verify(self, progress: Report) -> None:
        """Reads everything; raises DamagedFileError, naming the file, unless it is what was written."""
        done, total = 0, sum(entry["bytes"] for _, entry in self.files())

        def read(count: int) -> None:
            nonlocal done
            done += count
            progress("checking, in MB", -(-done // 10**6), -(-total // 10**6))

        for path, entry in self.files():
            try:
                found = segments.checksum(path, read)
            except FileNotFoundError:
                if read_manifest(self.folder)["revision"] != self.manifest["revision"]:
                    raise InputError(f"{self.folder}: changed on disk since it was opened; refresh it first") from None
                raise DamagedFileError(f"{path}: the manifest names this file, but it is missing") from None
            if found != entry["sha256"]:
                raise DamagedFileError(f"{path}: damaged: SHA-256 {found}, the manifest says {entry['sha256']}")
        for part in self.segments:
            if self.manifest["texts"]:
                segments.all_strings(part.tensors, "text", part.path)
            ranges_of([*self.segments[:1], part])
        ids = [part.live_ids() for part in self.segments]
        if ids and len(pa.chunked_array(ids).unique()) != self.manifest["count"]:
            raise DamagedFileError(f"{self.folder}: some ids occur twice")
        file, manifest = self.folder / MANIFEST, self.manifest
        if manifest["ids"] == "int64":
            highest = max(pc.max(part.ids()).as_py() for part in self.segments)
            if min(highest, LARGEST_ID - 1) >= manifest["next_id"]:
                raise DamagedFileError(f"{file}: next_id {manifest['next_id']}, but there is an id {highest}")
        found = checksum(manifest)
        if manifest.get("sha256", found) != found:  # earlier versions wrote none
            raise DamagedFileError(f"{file}: damaged: SHA-256 {found}, it says {manifest['sha256']}")


class _FirstStage:
    """The best rows of segments' codes for queries float32 (Q, D): (order float64, scores float32, rows) of each."""

    def __init__(self, queries: torch.Tensor, query_bits: int | None, rescoring: bool):
        self._queries, self._query_bits, self._rescoring = queries, query_bits, rescoring
        self._folded: FoldedQueries | None = None
        self._like: Quantized | None = None

    def __call__(
        self, level: Quantized, k: int, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query_bits = checked_query_bits(level, self._query_bits, self._rescoring)
        if not is_integer(level):
            scores, rows = search(self._queries, level, k, allowed=allowed)
            return scores.double(), scores, rows
        if self._like is None or not _same_ranges(level, self._like):
            self._folded, self._like = FoldedQueries.of(self._queries, level, query_bits), level
        integers, rows = self._folded.search(level.codes, k, allowed)
        return self._folded.exact(integers), self._folded.scores(integers), rows


def _same_ranges(one: Quantized, other: Quantized) -> bool:
    return one.scale is None or (torch.equal(one.scale, other.scale) and torch.equal(one.offset, other.offset))


class Candidates(NamedTuple):
    """What a search chooses from: for each query rows in rising order, and their scores in both stages, all (Q, C).

    coarse: of the first stage, float64, in which those of different integers differ. fine: float32, of the second stage
    or, without one, of the first. keep: how many of the best by coarse the second stage sees. rescored: whether there
    is a second one, which decides then.
    """

    rows: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray
    keep: int
    rescored: bool

    def best(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, rows) of the k best; equal scores in order of rows."""
        order = np.argsort(-(self.fine if self.rescored else self.coarse), axis=1, kind="stable")[:, :k]
        return np.take_along_axis(self.fine, order, 1), np.take_along_axis(self.rows, order, 1)


def joined(found: Sequence[Candidates]) -> Candidates:
    """Those of several indexes as those of one that holds all their rows, which must rise from one to the next.

    What one index would not have kept for the second stage is left out here, too: so no result tells the two apart.
    """
    rows, coarse, fine = (np.concatenate(parts, axis=1) for parts in list(zip(*found))[:3])
    keep, rescored = found[0].keep, found[0].rescored
    kept = np.sort(np.argsort(-coarse, axis=1, kind="stable")[:, :keep], axis=1)
    return Candidates(*(np.take_along_axis(values, kept, 1) for values in (rows, coarse, fine)), keep, rescored)


def ranges_of(parts: list[Segment]) -> dict[str, torch.Tensor]:
    """The frozen ranges of each level that has some, which all segments share."""
    ranges = {name: value for name, value in parts[0].tensors.items() if name.endswith("_ranges")} if parts else {}
    for part in parts[1:]:
        for name, value in ranges.items():
            if not torch.equal(part.tensors[name], value):
                raise DamagedFileError(f"{part.path}: {name} are not those of {parts[0].path.name}")
    return ranges
