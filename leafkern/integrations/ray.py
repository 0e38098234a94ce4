"""Ray (`pip install leafkern[ray]`): many files encoded, and shards searched, by several processes or machines.

    encode_files("my-model", "docs/", "vectors/", workers=8)               # Parquet -> Parquet, file by file
    build_shards("my-model", "docs/", "index/", workers=8, id_field="id")  # a shard per file: leafkern.Shards
    with RayShards("index/", workers=4) as shards:
        scores, ids = shards.search(queries, 10)

Ray is used as it has been initialised (`ray.init`), else started here. Workers open models and files by the names
given, so these must be the same on every machine: a shared file system. A file is the unit of work: its output appears
whole under its final name, and beside the outputs `_leafkern/` keeps a receipt of each. After a worker is lost, Ray
starts another, which does its file again; after the whole job is lost, the same call goes on with the files that have
no output.
"""

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from leafkern import parquet
from leafkern.bulk import documents
from leafkern.console import Report, described, unseen
from leafkern.encode import Encoder
from leafkern.errors import DamagedFileError, InputError, unknown_name
from leafkern.evaluate import prompt_for
from leafkern.files import atomic_file, make_folder, read_json, remove_leftovers, write_json, writing
from leafkern.index import Index
from leafkern.index.manifest import SHARDS, checked_rescore
from leafkern.index.reader import joined
from leafkern.index.shards import (
    Shards,
    alike,
    even_parts,
    is_shard_name,
    shard_folders,
    warn_of_missing,
    write_shards,
)
from leafkern.index.vectors import matrix
from leafkern.textio import BLOCK_ROWS, TEXT_FORMATS, iter_texts, suffix

RECEIPTS = "_leafkern"
VECTOR = "vector"

Inputs = str | os.PathLike | Iterable[str | os.PathLike]


class NoAnswerError(RuntimeError):
    """The actor of some shards died more often than it may be started again, or took longer than the time allowed."""


class Finished(NamedTuple):
    """What a job did. rows: of all outputs; files: their number; kept: how many were there before, and still fit."""

    rows: int
    files: int
    kept: int


def encode_files(
    model: str | os.PathLike,
    inputs: Inputs,
    output: str | os.PathLike,
    *,
    field: str = "text",
    dim: int | None = None,
    precision: str = "float32",
    prompt: str | None = None,
    workers: int = 2,
    cpus: float = 1,
    gpus: float = 0,
    progress: Report = unseen,
) -> Finished:
    """Writes each Parquet file of `inputs` to the folder `output` under its name, with a column "vector" added.

    inputs: a folder (its .parquet files), a file, or a list of files. field, dim, prompt: as in `leafkern encode`.
    precision: "float32" or "float16", of the fixed-size lists in "vector". workers: actors, each with its own copy of
    the model, `cpus` threads and `gpus` GPUs; they encode one file at a time, in blocks of 16,384 rows.
    progress: called with ("encoding", files done, files in all).

    Errors: InputError for wrong arguments, and, once all other files are done, for files that can't be encoded, or
    whose output was made with another model or option; RuntimeError where reading or writing failed. They name the
    files.
    """
    if precision not in ("float32", "float16"):
        raise unknown_name("precision", precision, ("float32", "float16"))
    options = {"field": field, "dim": dim, "precision": precision, "prompt": prompt}
    names = {file: file.name for file in _files(inputs, (".parquet",))}
    return _run(_VectorFiles, names, Path(output), model, options, workers, cpus, gpus, progress)


def build_shards(
    model: str | os.PathLike,
    inputs: Inputs,
    output: str | os.PathLike,
    *,
    field: str = "text",
    id_field: str | None = None,
    dim: int | None = None,
    prompt: str | None = None,
    precision: str = "int8",
    rescore: str | None = "float16",
    texts: bool = True,
    ranges: object = None,
    workers: int = 2,
    cpus: float = 1,
    gpus: float = 0,
    progress: Report = unseen,
) -> Finished:
    """Makes a folder of shards (`leafkern.Shards`) of files of texts: one index per file, in the order of `inputs`.

    inputs: as in `encode_files`; a list may also name .jsonl and .txt files. id_field: field or column of the ids,
    which must differ across all files: this is not looked at; None numbers the rows of each file from 0, so that ids
    alone don't tell the file. prompt: the model's for documents where None. precision, rescore, ranges: as in
    `Index.build`; without ranges each shard takes its own. texts: whether they are kept. A folder whose shards were
    made by other means is refused. The rest, and errors: as in `encode_files`.
    """
    finer = checked_rescore(precision, rescore)
    ranges = None if ranges is None else np.asarray(ranges, np.float32)
    options = {"field": field, "id_field": id_field, "dim": dim, "prompt": prompt, "precision": precision}
    options |= {"rescore": finer, "texts": texts, "ranges": ranges}
    names = {file: file.name[: -len(suffix(file))] for file in _files(inputs, TEXT_FORMATS)}
    return _run(_IndexShards, names, Path(output), model, options, workers, cpus, gpus, progress)


class RayShards:
    """`leafkern.Shards` searched by Ray actors, each of which holds consecutive ones.

    where: as in `Shards.open`. workers: actors, each with `cpus` threads. An actor that dies is started again, with
    the shards as they then are on disk, and asked again, up to `retries` times per search. timeout: seconds that a
    search may take, actors' starts included; None: any. partial: go on, with a warning, without the shards that can't
    be read or whose actor doesn't answer. Which folders these are is settled here. A context manager; `close` ends the
    actors.

    Errors: those of `Shards.open` and `Index.search`, as they would be raised here; NoAnswerError.
    """

    def __init__(
        self,
        where: Inputs,
        *,
        workers: int = 2,
        cpus: float = 1,
        retries: int = 3,
        timeout: float | None = None,
        partial: bool = False,
    ):
        ray = _ray()
        self.timeout, self.partial = timeout, partial
        folders = [folder.resolve() for folder in shard_folders(where)]
        workers = min(_count("workers", workers), len(folders))
        self._groups = [folders[start:stop] for start, stop in even_parts(len(folders), workers)]
        actor = ray.remote(_Searcher).options(num_cpus=cpus, max_restarts=-1, max_task_retries=retries)
        self._actors = [actor.remote(group, partial, _threads(cpus)) for group in self._groups]
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayShards":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __len__(self) -> int:
        return self._facts["count"]

    def info(self) -> dict:
        """As `Shards.info`."""
        return dict(self._facts)

    def refresh(self) -> None:
        """Opens every shard as it now stands on disk."""
        self._facts = alike(self._ask("refresh"))

    def search(self, queries: object, k: int, **options) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.search`. options: as in `Index.search`, but `allowed`; an encoder is given by its fingerprint."""
        if "allowed" in options:
            raise InputError("allowed: actors know no row numbers of all shards; search them with leafkern.Shards")
        answers = self._ask("search", _ray().put(matrix("queries", queries)), k, options).values()
        ids = np.concatenate([found for _, found in answers], axis=1)
        # In place of rows, whose numbers other actors have too: the columns of `ids`.
        columns = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        starts = np.cumsum([found.shape[1] for _, found in answers])[:-1]
        parts = zip(answers, np.split(columns, starts, axis=1))
        scores, columns = joined([found._replace(rows=part) for (found, _), part in parts]).best(k)
        return scores, np.take_along_axis(ids, columns, 1)

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            _ray().kill(actor)
        self._actors = []

    def _ask(self, method: str, *arguments) -> dict[Path, object]:
        """What each actor answers, under the first of its shards."""
        ray = _ray()
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        if not calls:
            raise InputError("the actors have been ended by close(); open the shards anew")
        ready = set(ray.wait(calls, num_returns=len(calls), timeout=self.timeout)[0])
        answers, missing = {}, {}
        for folders, call in zip(self._groups, calls):
            try:
                if call not in ready:
                    raise ray.exceptions.GetTimeoutError(f"no answer within {self.timeout} s")
                answers[folders[0]], said = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                if not (self.partial and isinstance(error.cause, DamagedFileError | OSError)):
                    raise error.cause from None
                missing |= dict.fromkeys(folders, error.cause)
            except ray.exceptions.RayError as error:
                # The actor died, was ended for its memory, lost its arguments, or took too long.
                reason = str(error).splitlines()[0]
                if not self.partial:
                    raise NoAnswerError(f"shards {', '.join(map(str, folders))}: {reason}") from None
                missing |= dict.fromkeys(folders, reason)
            else:
                for category, message in said:
                    warnings.warn(message, category, stacklevel=3)
        if not answers:
            folder, reason = next(iter(missing.items()))
            raise NoAnswerError(f"none of {len(missing)} shards can be searched; {folder}: {reason}")
        warn_of_missing(missing, sum(map(len, self._groups)))
        return answers


class _Searcher:
    """The actor of some shards. Its methods return what they found, and the warnings on the way."""

    def __init__(self, folders: list[Path], partial: bool, threads: int):
        torch.set_num_threads(threads)
        self._folders, self._partial = folders, partial

    @cached_property
    def _shards(self) -> Shards:
        # Not in __init__: an actor whose __init__ fails is lost, and its error with it.
        return Shards.open(self._folders, partial=self._partial)

    def refresh(self):
        self.__dict__.pop("_shards", None)
        return _with_warnings(lambda: self._shards.info())

    def search(self, queries, k, options):
        return _with_warnings(lambda: self._shards.candidates(queries, k, **options))


def _with_warnings(call: Callable[[], object]) -> tuple[object, list[tuple[type[Warning], str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = call()
    return answer, [(warning.category, str(warning.message)) for warning in caught]


def _run(
    worker: type["_Worker"],
    names: dict[Path, str],
    output: Path,
    model: str | os.PathLike,
    options: dict,
    workers: int,
    cpus: float,
    gpus: float,
    progress: Report,
) -> Finished:
    """Every file of `names` by some actors of class `worker`, to its name in the folder `output`."""
    taken: dict[str, Path] = {}
    for file, name in names.items():
        if not is_shard_name(name):
            raise InputError(f"inputs: {file}: its name is not printable; rename it")
        if name in taken or name in (RECEIPTS, SHARDS):
            other = taken.get(name, "another")
            raise InputError(f"inputs: {file} and {other} would both be written to {output / name}")
        if (output / name).resolve() == file:
            raise InputError(f"output: {output} is the folder of the input {file}; choose another")
        taken[name] = file
    workers = min(_count("workers", workers), len(names))
    _ray()
    from ray.data import ActorPoolStrategy, from_items

    if worker is _IndexShards:
        _check_listed(output)
    local = Path(model)
    model = str(local.resolve()) if local.exists() else str(model)
    make_folder(output / RECEIPTS)
    output = output.resolve()
    jobs = [{"input": str(file), "output": str(output / name)} for file, name in names.items()]
    with writing(output):
        remove_leftovers(output)
        results = from_items(jobs, override_num_blocks=len(jobs)).map(
            worker,
            fn_constructor_kwargs={
                "model": model,
                "device": "cuda" if gpus else "cpu",
                "threads": _threads(cpus),
                "options": options,
            },
            # One file at a time: those that wait may go to whoever is free first.
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        done = []
        progress("encoding", 0, len(jobs))
        for result in results.iter_rows():
            done.append(result)
            progress("encoding", len(done), len(jobs))
        remove_leftovers(output)
        failed = [result for result in done if result["error"]]
        if failed:
            kind = InputError if all(result["wrong"] for result in failed) else RuntimeError
            more = f"; and {len(failed) - 8} more" if len(failed) > 8 else ""
            reasons = "; ".join(result["error"] for result in sorted(failed, key=lambda result: result["input"])[:8])
            raise kind(f"{len(failed)} of {len(jobs)} files failed, the others are done: {reasons}{more}")
        if worker is _IndexShards:
            write_shards(output, list(names.values()))
    return Finished(sum(r["rows"] for r in done), len(done), sum(bool(r["kept"]) for r in done))


def _check_listed(output: Path) -> None:
    """Refuses a folder of shards that were made by other means: a new list would leave them there unnamed."""
    listed = []
    if (output / SHARDS).exists():
        with suppress(DamagedFileError):
            listed = shard_folders(output)
    foreign = [folder.name for folder in listed if not (output / RECEIPTS / f"{folder.name}.json").exists()]
    if foreign:
        raise InputError(f"output: {output} holds the shard {foreign[0]!r}, made by other means; choose another folder")


class _Worker(ABC):
    """What an actor does with each file: encodes it, unless its output is there."""

    def __init__(self, model: str, device: str, threads: int, options: dict):
        self._model, self._device, self._threads, self.options = model, device, threads, options

    def __call__(self, job: dict) -> dict:
        result = {"input": job["input"], "rows": 0, "kept": False, "wrong": False, "error": ""}
        try:
            torch.set_num_threads(self._threads)
            rows, kept = self._file(Path(job["input"]), Path(job["output"]))
        except Exception as error:  # whatever it is: the other files are to be done all the same
            known = isinstance(error, InputError | DamagedFileError | OSError)
            text = described(error) if known else f"{type(error).__name__}: {error}"
            where = "" if job["input"] in text or job["output"] in text else f"{job['input']}: "
            return result | {"wrong": isinstance(error, InputError), "error": where + text}
        return result | {"rows": rows, "kept": kept}

    @cached_property
    def encoder(self) -> Encoder:
        # Not in __init__: Ray would start an actor whose __init__ fails again and again.
        return Encoder.from_pretrained(self._model, device=self._device, dim=self.options["dim"])

    def _file(self, source: Path, target: Path) -> tuple[int, bool]:
        """Rows of the output, and whether it was there."""
        receipt = target.parent / RECEIPTS / f"{target.name}.json"
        settings = self._settings()
        status = source.stat()
        given = {"bytes": status.st_size, "modified": status.st_mtime_ns}
        if receipt.exists() and target.exists():
            known = read_json(receipt, "receipt of encoding")
            for name, value in settings.items():
                if known.get(name) != value:
                    raise InputError(
                        f"{target}: was made with {name} {known.get(name)!r}, not {value!r}; choose another folder, or "
                        "remove it"
                    )
            if all(known.get(name) == value for name, value in given.items()):
                return known["rows"], True
            receipt.unlink()
        rows = self.encode(source, target)
        write_json(receipt, settings | given | {"rows": rows})
        return rows, False

    def _settings(self) -> dict:
        """What else than the input decides the output."""
        ranges = self.options.get("ranges")
        digest = None if ranges is None else hashlib.sha256(ranges.tobytes()).hexdigest()[:16]
        made_by = {"model": self.encoder.fingerprint, "max_length": self.encoder.max_length, "ranges": digest}
        return self.options | made_by | {"prompt": self.prompt()}

    def prompt(self) -> str:
        """The literal text put before each text."""
        return self.encoder.prompt_text(self.options["prompt"])

    @abstractmethod
    def encode(self, source: Path, target: Path) -> int:
        """Writes the output, atomically; its rows."""


class _VectorFiles(_Worker):
    def encode(self, source, target):
        options = self.options
        # Read once before anything is encoded, so that a bad row shows at once.
        rows = 0 if _is_empty(source) else sum(len(block.texts) for block in iter_texts(source, options["field"]))
        with parquet.reading(source):
            file = pq.ParquetFile(source)
        if VECTOR in file.schema_arrow.names:
            raise InputError(f"{source}: has a column {VECTOR!r} already")
        kind = pa.list_(getattr(pa, options["precision"])(), self.encoder.dim)
        schema = file.schema_arrow.append(pa.field(VECTOR, kind))
        with atomic_file(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for batch in _batches(file, source):
                texts = batch.column(options["field"]).to_pylist()
                vectors = self.encoder.encode(texts, prompt=options["prompt"], precision=options["precision"])
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.encoder.dim)
                writer.write_batch(pa.record_batch([*batch.columns, column], schema=schema))
        return rows


class _IndexShards(_Worker):
    def prompt(self):
        return self.encoder.prompt_text(self.options["prompt"] or prompt_for(self.encoder, "document"))

    def encode(self, source, target):
        options = self.options
        vectors, ids, texts = iter(()), None, []
        if not _is_empty(source):
            given = documents(self.encoder, source, options["field"], options["id_field"], options["prompt"])
            vectors, ids, texts = given.vectors, given.ids, given.texts
        index = Index.build(
            target,
            vectors,
            ids=ids,
            texts=texts if options["texts"] else None,
            encoder=self.encoder,
            prompt=self.prompt(),
            precision=options["precision"],
            rescore=options["rescore"],
            width=self.encoder.dim,
            ranges=options["ranges"] if texts else None,
        )
        return len(index)


def _is_empty(source: Path) -> bool:
    """Whether a file has columns, but no rows, as other tools write them: nothing is wrong with it."""
    if suffix(source) != ".parquet":
        return False
    with parquet.reading(source):
        return pq.read_metadata(source).num_rows == 0


def _batches(file: pq.ParquetFile, source: Path) -> Iterator[pa.RecordBatch]:
    # Around reading alone: what is wrong while a batch is written is no fault of this file.
    with parquet.reading(source):
        yield from file.iter_batches(batch_size=BLOCK_ROWS)


def _files(inputs: Inputs, formats: tuple[str, ...]) -> list[Path]:
    """The files that `inputs` names, absolute."""
    if isinstance(inputs, str | os.PathLike):
        folder = Path(inputs)
        files = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
        if not files:
            raise InputError(f"inputs: no .parquet files in {folder}")
    else:
        files = [Path(file) for file in inputs]
        if not files:
            raise InputError("inputs: an empty list; expected at least one file")
    for file in files:
        if suffix(file) not in formats:
            raise InputError(f"inputs: {file}: expected {' or '.join(formats)}")
        if not file.is_file():
            raise InputError(f"inputs: {file}: no such file")
    return [file.resolve() for file in files]


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: expected an int >= 1, got {value!r}")
    return value


def _threads(cpus: float) -> int:
    return max(1, int(cpus))


def _ray():
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed: pip install 'leafkern[ray]'") from None
    return ray
