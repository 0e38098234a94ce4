"""Shards: an index in several folders, searched as one.

A shard is the folder of an `Index`, wherever it lies. A folder of shards holds them and shards.json, which names them
in their order and is written last. Results are those of one index that holds the shards' rows one after another, in the
order of score, then shard, then insertion number; also the candidates of rescoring are the best of all shards together.
Float vectors without native kernels agree to rounding: a matrix product of another size sums in another order.
Where codes of 8 or 4 bits have ranges of each shard's own, which `Shards.build` avoids, scores before rescoring are as
exact as these codes are.
"""

import copy
import os
import re
import shutil
import sys
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from leafkern.console import Report, unseen
from leafkern.errors import DamagedFileError, InputError
from leafkern.files import TEMPORARY, confined, make_folder, read_json, remove_leftovers, write_json, writing
from leafkern.index import Index
from leafkern.index.manifest import SHARDS, Described, checked_rescore, query_fingerprint
from leafkern.index.reader import Candidates, joined
from leafkern.index.vectors import Rows, check_distinct, id_array
from leafkern.ops.quantization import CALIBRATION_ROWS

__all__ = ["MissingShardWarning", "Shards", "open_index"]

FORMAT = "leafkern-shards"
VERSION = 1
# The folders that `Shards.build` makes, and no other, are its own to remove.
_OWN = re.compile(r"shard-[0-9a-f]{8}-[0-9]{5,}")
# Each attempt to open shards that fails means that a writer has replaced all of them meanwhile.
_ATTEMPTS = 8
# What all shards must have in common for their scores and ids to be comparable.
_COMMON = ("width", "precision", "rescore", "encoder", "prompt", "texts", "ids", "rotates")


class MissingShardWarning(UserWarning):
    """Some shards could not be read; results are those of the others."""


class _State(NamedTuple):
    """Opened shards. starts: the number of each one's first row, and of all rows; missing: why others are not here."""

    indexes: dict[Path, Index]
    starts: list[int]
    facts: dict
    missing: dict[Path, Exception]


class Shards(Described):
    """Indexes in several folders, searched as one. Made by `Shards.open` or `Shards.build`.

    A handle shows the shards as they were when it was opened or refreshed, to any number of threads.
    """

    def __init__(self, where: str | os.PathLike | Iterable[str | os.PathLike], partial: bool = False):
        """Opens the shards; `Shards.open` also checks what they hold."""
        self._where, self.partial = where if isinstance(where, str | os.PathLike) else list(where), partial
        self.refresh()

    @classmethod
    def open(
        cls,
        where: str | os.PathLike | Iterable[str | os.PathLike],
        *,
        partial: bool = False,
        width: int | None = None,
        precision: str | None = None,
        encoder: object = None,
        prompt: str | None = None,
    ) -> "Shards":
        """The shards of the folder `where`, or those in a list of folders, each of which is an index.

        partial: where a shard can't be read, now or in a search, warn (MissingShardWarning) and go on with the others;
        without it, and where none can be read, that is an error. Not all can be caught: codes are mapped into memory,
        so where their file is cut short, or the disk fails, while they are read, the process ends (with
        `integrations.ray.RayShards` only that shard's actor, which is started again). The rest: what the caller
        expects, as in `Index.open`.

        Errors: InputError where no shards are, or where they differ in width, precisions, kind of ids, texts, encoder
        or prompt; DamagedFileError for a damaged file. Each names the folder.
        """
        shards = cls(where, partial)
        known = query_fingerprint(encoder, shards.encoder)
        shards.require(width=width, precision=precision, encoder=known, prompt=prompt)
        return shards

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        vectors: object,
        *,
        shards: int,
        ids: object = None,
        texts: Sequence[str] | None = None,
        precision: str = "int8",
        rescore: str | None = "float16",
        width: int | None = None,
        ranges: object = None,
        **options,
    ) -> "Shards":
        """Makes a folder of `shards` shards at `path`, in place of one that is there.

        Consecutive rows go to each, in equal numbers up to one. All other arguments are those of `Index.build`; ranges
        None takes them from all vectors, for all shards. With `rotate` each shard takes its own: before rescoring,
        scores then differ from one index's by the codes' rounding, and int8 and int4 of fewer than 100 vectors a shard
        want unit vectors. A kill leaves the shards that were there before.

        ids None numbers all rows from 0. What is added to a shard later needs ids that no other shard has: `Index.add`
        without ids counts on from that shard's own.
        """
        path = Path(path)
        existed = path.exists()
        if existed and not path.is_dir():
            raise InputError(f"{path}: is a file; expected a folder for the shards")
        foreign = [entry.name for entry in path.iterdir() if not _is_part(entry.name)] if existed else []
        if foreign:
            raise InputError(f"{path}: holds {foreign[0]!r}, which is no shard; choose another folder")
        finer = checked_rescore(precision, rescore)
        build = uuid.uuid4().hex[:8]
        names = []
        make_folder(path)
        try:
            with writing(path), Rows(vectors, path, width, ranges) as rows:
                if not isinstance(shards, int) or isinstance(shards, bool) or not 1 <= shards <= max(1, rows.count):
                    raise InputError(
                        f"shards: expected an int from 1 to the number of vectors, {rows.count}; got {shards!r}"
                    )
                kept = None if ids is None else _checked_ids(ids, rows.count)
                if texts is not None and len(texts) != rows.count:
                    raise InputError(f"texts: {len(texts)} for {rows.count} vectors; expected one each")
                ranged = {"int8", "int4"} & {precision, finer} and options.get("rotate", False) is False
                if ranges is None and ranged and rows.count >= CALIBRATION_ROWS:
                    ranges = rows.ranges(precision)
                _clean(path)
                for number, (start, stop) in enumerate(even_parts(rows.count, shards)):
                    names.append(f"shard-{build}-{number:05}")
                    Index.build(
                        path / names[-1],
                        rows.part(start, stop),
                        ids=np.arange(start, stop) if kept is None else kept[start:stop],
                        texts=None if texts is None else texts[start:stop],
                        precision=precision,
                        rescore=rescore,
                        width=rows.width,
                        ranges=ranges,
                        **options,
                    )
                write_shards(path, names)
                _clean(path)
        except BaseException:
            _discard(path, names, existed)
            raise
        return cls.open(path)

    def refresh(self) -> None:
        """Shows every shard as it now stands on disk, and the shards that are there now."""
        for attempt in range(_ATTEMPTS):
            folders = shard_folders(self._where)
            try:
                state = self._opened(folders)
                if state.missing and shard_folders(self._where) != folders:
                    continue
            except (InputError, DamagedFileError, OSError):
                # Shards that a writer has meanwhile put others in place of are gone.
                if attempt == _ATTEMPTS - 1 or shard_folders(self._where) == folders:
                    raise
            else:
                break
        warn_of_missing(state.missing, len(folders))
        self._state = state

    def _opened(self, folders: Sequence[Path]) -> _State:
        indexes, missing = {}, {}
        for folder in folders:
            try:
                indexes[folder] = Index.open(folder)
            except (InputError, DamagedFileError, OSError) as error:
                if not self.partial:
                    raise
                missing[folder] = error
        if not indexes:
            folder, error = next(iter(missing.items()))
            raise DamagedFileError(f"none of {len(folders)} shards can be read; {folder}: {error}")
        facts = alike({folder: index.info() for folder, index in indexes.items()})
        starts = [0, *accumulate(index.row_count for index in indexes.values())]
        return _State(indexes, starts, facts, missing)

    def pinned(self) -> "Shards":
        """As `Index.pinned`: row numbers keep their meaning, whoever refreshes this handle meanwhile."""
        return copy.copy(self)

    @property
    def _facts(self) -> dict:
        return self._state.facts

    def __repr__(self) -> str:
        shards = len(self._state.indexes)
        return f"Shards({shards} shards: {len(self)} × {self.width}, {self.precision}, rescore {self.rescore})"

    @property
    def row_count(self) -> int:
        """Rows up to the last row number, removed ones included."""
        return self._state.starts[-1]

    @property
    def missing(self) -> dict[Path, Exception]:
        """Why shards could not be opened, by their folders: only with `partial`."""
        return dict(self._state.missing)

    def info(self) -> dict:
        """What the shards have in common, their number, and the sums of their rows and bytes."""
        return dict(self._state.facts)

    def require(self, **expected) -> None:
        """As `Index.require`, of every shard."""
        for index in self._state.indexes.values():
            index.require(**expected)

    def search(self, queries: object, k: int, **options) -> tuple[np.ndarray, np.ndarray]:
        """As `Index.search`, over all shards: (scores float32, ids), both (Q, min(k, N)), best first."""
        state = self._state
        scores, rows = self._candidates(state, queries, k, **options).best(k)
        return scores, _ids_at(state, rows)

    def search_rows(self, queries: object, k: int, **options) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, with row numbers in place of ids: those of the first shard, then those of the next."""
        return self._candidates(self._state, queries, k, **options).best(k)

    def candidates(self, queries: object, k: int, **options) -> tuple[Candidates, np.ndarray]:
        """What `search` with these arguments chooses from, and the ids of their rows."""
        state = self._state
        found = self._candidates(state, queries, k, **options)
        return found, _ids_at(state, found.rows)

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """The ids of row numbers, in an array of the same shape: int64, or strings as objects."""
        return _ids_at(self._state, rows)

    def texts_at(self, rows: np.ndarray) -> np.ndarray:
        """The stored texts of row numbers, as objects in an array of the same shape."""
        return _gather(self._state, rows, Index.texts_at, object)

    def verify(self, *, progress: Report = unseen) -> None:
        """`Index.verify` of every shard. That no two shards have an id in common is not looked at.

        progress: called with what is done, and shards so far and in all.
        """
        indexes = self._state.indexes
        for done, index in enumerate(indexes.values(), start=1):
            index.verify()
            progress("checking shards", done, len(indexes))

    def _candidates(self, state: _State, queries: object, k: int, *, allowed: object = None, **options) -> Candidates:
        if allowed is not None and len(allowed) != state.starts[-1]:
            raise InputError(f"allowed: expected a bool for each of {state.starts[-1]} rows, got {len(allowed)}")
        starts = dict(zip(state.indexes, state.starts))

        def one(index: Index) -> Candidates:
            start = starts[index.path]
            inside = None if allowed is None else allowed[start : start + index.row_count]
            return index.candidates(queries, k, allowed=inside, **options)

        found = self._each(state, one)
        return joined([part._replace(rows=part.rows + starts[folder]) for folder, part in found.items()])

    def _each(self, state: _State, call: Callable[[Index], Candidates]) -> dict[Path, Candidates]:
        """call(index) of all shards, several at a time; with `partial`, of those that it doesn't find damaged."""

        def guarded(index: Index) -> Candidates | Exception:
            try:
                return call(index)
            except (DamagedFileError, OSError) as error:
                if not self.partial:
                    raise
                return error

        threads = min(len(state.indexes), torch.get_num_threads())
        if threads == 1:
            results = [guarded(index) for index in state.indexes.values()]
        else:
            with ThreadPoolExecutor(threads) as pool:
                results = list(pool.map(guarded, state.indexes.values()))
        found = dict(zip(state.indexes, results))
        missing = {folder: result for folder, result in found.items() if isinstance(result, Exception)}
        if len(missing) == len(found):
            raise results[0]
        warn_of_missing(missing, len(found) + len(state.missing))
        return {folder: result for folder, result in found.items() if folder not in missing}


def _ids_at(state: _State, rows: np.ndarray) -> np.ndarray:
    return _gather(state, rows, Index.ids_at, object if state.facts["ids"] == "string" else np.int64)


def _gather(state: _State, rows: object, read: Callable[[Index, np.ndarray], np.ndarray], dtype: type) -> np.ndarray:
    """read(index, its row numbers) for each row number of all shards."""
    rows = np.asarray(rows)
    out = np.empty(rows.shape, dtype)
    if rows.size and (rows.min() < 0 or rows.max() >= state.starts[-1]):
        raise InputError(f"rows: expected row numbers from 0 to {state.starts[-1] - 1}, as `search_rows` gives them")
    for index, start, stop in zip(state.indexes.values(), state.starts, state.starts[1:]):
        inside = (rows >= start) & (rows < stop)
        if inside.any():
            out[inside] = read(index, rows[inside] - start)
    return out


def open_index(path: str | os.PathLike) -> Index | Shards:
    """The index at `path`, or the shards where it is a folder of shards."""
    return Shards.open(path) if (Path(path) / SHARDS).is_file() else Index.open(path)


def shard_folders(where: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The folders that shards.json of the folder `where` names, or those of a list."""
    if not isinstance(where, str | os.PathLike):
        folders = [Path(folder) for folder in where]
        if not folders:
            raise InputError("shards: an empty list; expected at least one folder of an index")
        twice = [folder for folder, count in Counter(folders).items() if count > 1]
        if twice:
            raise InputError(f"shards: {twice[0]} is named more than once")
        return folders
    file = Path(where) / SHARDS
    if not file.is_file():
        raise InputError(f"{where}: no shards here (there is no {SHARDS}); give the folder of them, or a list of them")
    known = read_json(file, "list of shards")
    names = known.get("shards")
    if known.get("format") != FORMAT:
        raise DamagedFileError(f"{file}: not a list of shards (format {known.get('format')!r})")
    if known.get("version") != VERSION:
        raise InputError(f"{file}: format version {known.get('version')!r}; this leafkern reads version {VERSION}")
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise DamagedFileError(f"{file}: entry 'shards' is missing or not a list of different names")
    for name in names:
        if not is_shard_name(name):
            raise DamagedFileError(f"{file}: {name!r:.80} is not the name of a folder in it")
    return [confined(where, name) for name in names]


def is_shard_name(name: object) -> bool:
    """Whether shards.json may hold a folder of this name."""
    return isinstance(name, str) and name.isprintable() and Path(name).name == name and len(name.encode()) < 256


def write_shards(path: Path, names: Sequence[str]) -> None:
    """Makes `path`, which holds the indexes `names`, a folder of shards in this order."""
    write_json(path / SHARDS, {"format": FORMAT, "version": VERSION, "shards": list(names)})


def alike(infos: Mapping[Path, dict]) -> dict:
    """The `info()` of shards, or of groups of them, as one; InputError where they differ in what must be common."""
    first, common = next(iter(infos)), {}
    for folder, info in infos.items():
        for name in _COMMON:
            if name == "ids" and info["count"] == 0:
                continue  # an empty index takes either kind
            if common.setdefault(name, info[name]) != info[name]:
                raise InputError(
                    f"{folder}: a shard with {name} {info[name]!r}, but {first} has {common[name]!r}; shards of one "
                    "index must have the same"
                )
    sums = {name: sum(info[name] for info in infos.values()) for name in ("count", "deleted", "segments", "bytes")}
    shards = sum(info.get("shards", 1) for info in infos.values())
    return infos[first] | {"ids": None} | common | sums | {"shards": shards}


def even_parts(count: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive parts of `count` things, of equal size up to one."""
    return [(count * number // parts, count * (number + 1) // parts) for number in range(parts)]


def warn_of_missing(missing: Mapping[Path, Exception | str], shards: int) -> None:
    """Says which shards results are without."""
    if missing:
        reasons = "; ".join(f"{folder}: {error}" for folder, error in missing.items())
        # The line that called leafkern, however deep this is.
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals["__name__"].startswith("leafkern."):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"{len(missing)} of {shards} shards can't be read, results are without them: {reasons}",
            MissingShardWarning,
            stacklevel=level,
        )


def _checked_ids(ids: object, count: int) -> np.ndarray:
    ids = id_array(ids)
    if len(ids) != count:
        raise InputError(f"ids: {len(ids)} for {count} vectors; expected one each")
    check_distinct(ids)
    return ids.to_numpy(zero_copy_only=False)


def _is_part(name: str) -> bool:
    return name == SHARDS or name.startswith(TEMPORARY) or _OWN.fullmatch(name) is not None


def _clean(path: Path) -> None:
    """Removes shards and temporary files that shards.json does not name."""
    remove_leftovers(path)
    try:
        named = {folder.name for folder in shard_folders(path)} if (path / SHARDS).exists() else set()
    except (DamagedFileError, InputError):
        return  # about to be replaced: until then, nothing of it is thrown away
    for entry in path.iterdir():
        if _OWN.fullmatch(entry.name) and entry.name not in named:
            shutil.rmtree(entry, ignore_errors=True)


def _discard(path: Path, names: Sequence[str], existed: bool) -> None:
    """Takes back a build that failed."""
    with suppress(DamagedFileError, InputError):
        if names and (path / SHARDS).exists() and shard_folders(path)[0].name == names[0]:
            return  # it had come into force
    for name in names:
        shutil.rmtree(path / name, ignore_errors=True)
    if not existed:
        with suppress(OSError):  # where there is something in it, as the lock of another process
            path.rmdir()
