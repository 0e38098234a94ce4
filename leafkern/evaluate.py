"""What distillation and each saving cost: nDCG@10, recall and Spearman of systems × widths × precisions."""

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from leafkern import __version__
from leafkern.console import Report
from leafkern.encode import Encoder
from leafkern.errors import InputError, unknown_name
from leafkern.index.manifest import PRECISIONS, RESCORE_PRECISIONS, code_bytes
from leafkern.index.vectors import matrix
from leafkern.ops import dequantize, quantize, search
from leafkern.ops._core.normalize import normalize_rows
from leafkern.textio import field_of, iter_lines, iter_objects

# "A+B": A is scanned, the best candidates are scored again with B. "binary@8": bits scanned by 7-bit queries.
DEFAULT_PRECISIONS = ("float32", "int8", "int4", "binary", "binary@8", "binary+int8")
OVERSAMPLE = 4
RECALL_DEPTHS = (10, 100)
_SCORES = 1 << 24  # of a block of queries at a time
_TIMED_SECONDS = 0.2

Qrels = Mapping[str, Mapping[str, int]]


class Retrieval(NamedTuple):
    """A retrieval task. qrels: grade (> 0: relevant) by query id, then document id."""

    corpus_ids: list[str]
    corpus_texts: list[str]
    query_ids: list[str]
    query_texts: list[str]
    qrels: dict[str, dict[str, int]]
    name: str = ""


class Similarity(NamedTuple):
    """A semantic textual similarity task: scores (any scale) of pairs of texts."""

    scores: list[float]
    first: list[str]
    second: list[str]
    name: str = ""


def load(path: str | os.PathLike) -> Retrieval | Similarity:
    """The task at `path`: a BEIR folder (`load_beir`) or an STS file (`load_sts`)."""
    if Path(path).is_dir():
        return load_beir(path)
    if not Path(path).exists():
        raise InputError(f"data: {path}: no such file or folder; expected a BEIR folder or an STS .tsv file")
    return load_sts(path)


def load_beir(path: str | os.PathLike) -> Retrieval:
    """A folder with corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels.tsv or qrels/test.tsv (query-id,
    corpus-id, score, after a header); each may be .gz. A document is "title text"; queries without a relevant document
    are left out. Errors (InputError) name file and line.
    """
    folder = Path(path)
    corpus = {}
    file = _either(folder, "corpus.jsonl")
    for number, value in iter_objects(file):
        where = f"{file}:{number}"
        title = field_of(where, value, "title") if value.get("title") is not None else ""
        _insert(corpus, where, field_of(where, value, "_id"), f"{title} {field_of(where, value, 'text')}".strip())
    queries = {}
    file = _either(folder, "queries.jsonl")
    for number, value in iter_objects(file):
        where = f"{file}:{number}"
        _insert(queries, where, field_of(where, value, "_id"), field_of(where, value, "text"))
    qrels: dict[str, dict[str, int]] = {}
    file = _either(folder, "qrels.tsv", "qrels/test.tsv")
    for number, line in iter_lines(file):
        cells = line.split("\t")
        if number == 1 and not cells[-1].strip().lstrip("-").isdigit():
            continue
        if not line.strip():
            continue
        if len(cells) != 3 or not cells[2].strip().lstrip("-").isdigit():
            raise InputError(f"{file}:{number}: expected query-id, corpus-id, score (an integer), tab-separated")
        query, document, grade = cells[0], cells[1], int(cells[2])
        if query not in queries:
            raise InputError(f"{file}:{number}: query {query!r} is not in the queries")
        qrels.setdefault(query, {})[document] = grade
    judged = [query for query in queries if any(grade > 0 for grade in qrels.get(query, {}).values())]
    if not judged or not any(document in corpus for query in judged for document in qrels[query]):
        raise InputError(f"{file}:1: no query has a relevant document of the corpus")
    texts = [queries[query] for query in judged]
    return Retrieval(list(corpus), list(corpus.values()), judged, texts, qrels, folder.resolve().name)


def _insert(texts: dict[str, str], where: str, identity: str, text: str) -> None:
    if identity in texts:
        raise InputError(f"{where}: _id {identity!r} occurs twice")
    texts[identity] = text


def _either(folder: Path, *names: str) -> Path:
    for name in names:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    raise InputError(f"data: {folder}: has no {' or '.join(names)} (nor .gz)")


def load_sts(path: str | os.PathLike) -> Similarity:
    """A file (also .gz) with a header, then score, sentence1, sentence2, tab-separated. Errors name the line."""
    scores, first, second = [], [], []
    for number, line in iter_lines(path):
        cells = line.split("\t")
        if number == 1 or not line.strip():
            continue
        if len(cells) != 3:
            raise InputError(f"{path}:{number}: {len(cells)} columns; expected score, sentence1, sentence2 (tabs)")
        try:
            score = float(cells[0])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"{path}:{number}: score {cells[0]!r} is not a number")
        scores.append(score)
        first.append(cells[1])
        second.append(cells[2])
    if len(scores) < 2:
        raise InputError(f"{path}:1: {len(scores)} pairs; expected a header and at least two")
    return Similarity(scores, first, second, Path(path).name.split(".")[0])


def ndcg(ranked: Sequence[Sequence[str]], query_ids: Sequence[str], qrels: Qrels, k: int = 10) -> float:
    """Mean nDCG@k as trec_eval and BEIR define it (Järvelin & Kekäläinen 2002, linear gain).

    ranked: document ids per query, best first. DCG = sum of grade / log2(rank + 1) over the first k ranks, divided by
    that of the best possible ranking. Grades <= 0 count as 0; queries without a relevant document are left out.
    """

    def gain(grades: Sequence[int]) -> float:
        return sum(max(grade, 0) / math.log2(rank + 2) for rank, grade in enumerate(grades[:k]))

    values = []
    for query, documents in _judged(ranked, query_ids, qrels):
        grades = qrels[query]
        best = gain(sorted(grades.values(), reverse=True))
        values.append(gain([grades.get(document, 0) for document in documents[:k]]) / best)
    return float(np.mean(values))


def recall(ranked: Sequence[Sequence[str]], query_ids: Sequence[str], qrels: Qrels, k: int = 10) -> float:
    """Mean share of a query's relevant documents (grade > 0) among its first k; the rest as in `ndcg`."""
    values = []
    for query, documents in _judged(ranked, query_ids, qrels):
        relevant = {document for document, grade in qrels[query].items() if grade > 0}
        values.append(len(relevant.intersection(documents[:k])) / len(relevant))
    return float(np.mean(values))


def _judged(ranked, query_ids, qrels) -> list[tuple[str, Sequence[str]]]:
    if len(ranked) != len(query_ids):
        raise InputError(f"ranked: {len(ranked)} rankings for {len(query_ids)} queries")
    found = [
        (query, documents)
        for query, documents in zip(query_ids, ranked)
        if any(grade > 0 for grade in qrels.get(query, {}).values())
    ]
    if not found:
        raise InputError("qrels: no query has a relevant document")
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where either side is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(f"x, y: expected two sequences of one length, got shapes {x.shape} and {y.shape}")

    def centred_ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2

    x, y = centred_ranks(x), centred_ranks(y)
    norm = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else math.nan


class Scan(NamedTuple):
    """What a precision's name says: codes scanned, query_bits as in `search` (None: its choice), codes that rescore."""

    codes: str
    query_bits: int | None
    finer: str | None


def split_precision(name: str) -> Scan:
    """ "binary@8+int8" as ("binary", 8, "int8"); checked."""
    coarse, _, fine = name.partition("+")
    codes, _, bits = coarse.partition("@")
    if codes not in PRECISIONS:
        raise unknown_name("precisions", name, {*PRECISIONS, *DEFAULT_PRECISIONS})
    if "@" in coarse and (bits not in ("1", "8") or codes not in ("binary", "ubinary")):
        raise InputError(f"precisions: {name!r}: expected binary@1 or binary@8, bits scanned by queries of 1 or 7 bits")
    if fine and (fine not in RESCORE_PRECISIONS or PRECISIONS.index(fine) >= PRECISIONS.index(codes)):
        raise InputError(f"precisions: {name!r}: {fine!r} is no finer precision than {coarse!r}")
    return Scan(codes, int(bits) if bits else None, fine or None)


def bytes_per_vector(precision: str, width: int) -> int:
    """Bytes of one vector's codes, those for rescoring included."""
    scan = split_precision(precision)
    return sum(code_bytes(part, width) for part in (scan.codes, scan.finer) if part)


def float32_found(
    documents: torch.Tensor,
    queries: torch.Tensor,
    precision: str,
    dim: int,
    exact: torch.Tensor,
    *,
    depths: Sequence[int] = RECALL_DEPTHS,
    oversample: int = OVERSAMPLE,
) -> dict[str, float | None]:
    """What codes of the first `dim` numbers find of float32's answer at full width: recall against float32.

    documents, queries: unit rows, float32 (N, D) and (Q, D); their prefixes are normalised again. exact: rows of the
    float32 top k per query, for the largest k of `depths` or more, (Q, N) where there are fewer.

    For each k of `depths`, "found_k": the share of the exact top k among the k best of the codes; "found_k_rescored":
    the same after the best oversample*k are scored again by float16 vectors of full width; None for "A+B", which
    rescores by itself.
    """
    scan = split_precision(precision)
    narrow, asked = normalize_rows(documents[:, :dim]), normalize_rows(queries[:, :dim])
    base, options = quantize(narrow, scan.codes), {"query_bits": scan.query_bits}
    if scan.finer is None:
        # One order for every k: the k best are the first of more.
        ranked = search(asked, base, oversample * max(depths), **options)[1]
        scores = _scores_of(queries, documents.half().float(), ranked)
    else:
        options |= {"rescore": quantize(narrow, scan.finer), "oversample": oversample}
    found: dict[str, float | None] = {}
    for depth in depths:
        k, again = min(depth, len(documents)), None
        if scan.finer is None:
            best, count = ranked[:, :k], oversample * depth
            again = _share(_best(scores[:, :count], ranked[:, :count], k), exact[:, :k])
        else:
            best = search(asked, base, k, **options)[1]
        found |= {f"found_{depth}": _share(best, exact[:, :k]), f"found_{depth}_rescored": again}
    return found


def _scores_of(queries: torch.Tensor, documents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Dot products of each query with its rows ids (Q, C), from whole matrix products of blocks of queries."""
    step = max(1, _SCORES // max(1, len(documents)))
    blocks = zip(queries.split(step), ids.split(step))
    return torch.cat([(part @ documents.T).gather(1, rows) for part, rows in blocks])


def _best(scores: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """The k of ids (Q, C) with the largest scores; ties: lower id."""
    ids, order = ids.sort(dim=1)
    places = scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, places[:, :k])


def _share(found: torch.Tensor, exact: torch.Tensor) -> float:
    hits = sum(len(set(ours) & set(theirs)) for ours, theirs in zip(found.tolist(), exact.tolist()))
    return hits / max(1, exact.numel())


def evaluate_vectors(
    systems: Mapping[str, tuple[object, object]],
    task: Retrieval | Similarity,
    *,
    dims: Sequence[int] | None = None,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    rankings: Mapping[str, Sequence[Sequence[str]]] | None = None,
    k: int = 10,
    progress: Report | None = None,
) -> dict:
    """Systems × widths × precisions, from vectors that are already there.

    systems: by name, (document vectors, query vectors), or (first, second) sentences for a similarity task; numpy or
    torch (N, D) and (Q, D), rows in the task's order. Each is cut to its first `dims` numbers (MRL; None: D, D/2, D/4)
    and normalised. rankings: systems without vectors, such as BM25: document ids per query, best first.

    A dict for JSON: "task", "rows", "machine". A row of a retrieval task: system, dim, precision, bytes_per_vector,
    ndcg, recall, neighbours (the share of the float32 top k of the same system and width that is found), what
    `float32_found` gives, queries_per_s (search alone, all queries in one call, best of the calls in 0.2 s). Of a
    similarity task: spearman, the first sentence in float32 against the second one's codes; "A+B" and "A@8" are left
    out, for nothing is scanned.
    """
    for name in precisions:
        split_precision(name)
    prepared = {name: _pair(name, pair, dims) for name, pair in systems.items()}
    retrieval = isinstance(task, Retrieval)
    names = [name for name in precisions if retrieval or name in PRECISIONS]
    cells = [
        (system, dim, precision) for system, (_, _, widths) in prepared.items() for dim in widths for precision in names
    ]
    rows: list[dict] = []
    neighbours: dict[tuple[str, int], np.ndarray] = {}
    exact: dict[str, torch.Tensor] = {}
    whole: dict[str, list[torch.Tensor]] = {}  # of one system at a time: cells come system by system
    for done, (system, dim, precision) in enumerate(cells):
        if progress is not None:
            progress(f"{system} {dim} {precision}", done, len(cells))
        if system not in whole:
            whole = {system: [normalize_rows(torch.from_numpy(part)) for part in prepared[system][:2]]}
        left, right = (normalize_rows(torch.from_numpy(part[:, :dim])) for part in prepared[system][:2])
        row = {
            "system": system,
            "dim": dim,
            "precision": precision,
            "bytes_per_vector": bytes_per_vector(precision, dim),
        }
        if retrieval:
            if (system, dim) not in neighbours:
                neighbours[system, dim] = search(right, left, k)[1].numpy()
            cell = _retrieval_cell(left, right, precision, task, k, neighbours[system, dim])
            documents, queries = whole[system]
            if system not in exact:
                exact[system] = search(queries, documents, max(RECALL_DEPTHS))[1]
            rows.append(row | cell | float32_found(documents, queries, precision, dim, exact[system]))
        else:
            second = dequantize(quantize(right, precision))
            rows.append(row | {"spearman": spearman((left * normalize_rows(second)).sum(1), task.scores)})
    if progress is not None:
        progress("", len(cells), len(cells))
    for system, ranked in (rankings or {}).items():
        quality = {"ndcg": ndcg(ranked, task.query_ids, task.qrels, k)}
        quality["recall"] = recall(ranked, task.query_ids, task.qrels, k)
        rows.append({"system": system, "dim": None, "precision": None, "bytes_per_vector": None, **quality})
    return {
        "format": "leafkern-eval",
        "version": 1,
        "task": _described(task, k),
        "rows": rows,
        "machine": {
            "leafkern": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
    }


def _described(task: Retrieval | Similarity, k: int) -> dict:
    if isinstance(task, Similarity):
        return {"name": task.name, "kind": "similarity", "pairs": len(task.scores)}
    sizes = {"documents": len(task.corpus_ids), "queries": len(task.query_ids)}
    return {"name": task.name, "kind": "retrieval", **sizes, "k": k}


def _pair(name: str, pair: tuple[object, object], dims: Sequence[int] | None):
    left, right = (matrix(f"systems[{name!r}]", part).astype(np.float32) for part in pair)
    width = left.shape[1]
    if right.shape[1] != width:
        raise InputError(f"systems[{name!r}]: widths {width} and {right.shape[1]}; expected equal ones")
    if dims is None:
        return left, right, sorted({max(1, width // part) for part in (1, 2, 4)}, reverse=True)
    over = [dim for dim in dims if not 1 <= dim <= width]
    if over:
        raise InputError(f"dims: {over[0]} is not a width of {name}, whose vectors have {width} numbers")
    return left, right, sorted(set(dims), reverse=True)


def _retrieval_cell(documents, queries, precision: str, task: Retrieval, k: int, exact: np.ndarray) -> dict:
    if len(documents) != len(task.corpus_ids) or len(queries) != len(task.query_ids):
        raise InputError(
            f"systems: {len(documents)} and {len(queries)} vectors for {len(task.corpus_ids)} documents and "
            f"{len(task.query_ids)} queries"
        )
    scan = split_precision(precision)
    base = quantize(documents, scan.codes)
    options = {"rescore": quantize(documents, scan.finer), "oversample": OVERSAMPLE} if scan.finer else {}
    options["query_bits"] = scan.query_bits
    twins = self_answers(task)
    found = search(queries, base, k + any(twin is not None for twin in twins), **options)[1].numpy()
    times, started = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < _TIMED_SECONDS:
        start = time.perf_counter()
        search(queries, base, k, **options)
        times.append(time.perf_counter() - start)
    ranked = [[task.corpus_ids[row] for row in rows if row != twin][:k] for twin, rows in zip(twins, found.tolist())]
    shared = [len(set(ours[:k]) & set(theirs)) for ours, theirs in zip(found.tolist(), exact.tolist())]
    return {
        "ndcg": ndcg(ranked, task.query_ids, task.qrels, k),
        "recall": recall(ranked, task.query_ids, task.qrels, k),
        "neighbours": float(np.mean(shared)) / exact.shape[1],
        "queries_per_s": len(queries) / min(times),
    }


def self_answers(task: Retrieval) -> list[int | None]:
    """For each query the row of the document that it was taken from, which it must not find (as in BEIR), or None.

    That is one of the same id that holds the query's text, unless it was judged relevant.
    """
    row_of = {document: row for row, document in enumerate(task.corpus_ids)}
    found = []
    for query, text in zip(task.query_ids, task.query_texts):
        row = row_of.get(query)
        judged = task.qrels.get(query, {}).get(query, 0) > 0
        found.append(None if row is None or judged or text.strip() not in task.corpus_texts[row] else row)
    return found


def prompt_for(encoder: Encoder, kind: str) -> str | None:
    """The name of the encoder's prompt for "query" or "document", as sentence-transformers chooses it, or None."""
    names = ("query",) if kind == "query" else ("document", "passage", "corpus")
    return next((name for name in names if name in encoder.prompts), None)


def evaluate(
    model: Encoder | str | os.PathLike,
    teacher: Encoder | str | os.PathLike | None = None,
    *,
    data: Retrieval | Similarity | str | os.PathLike,
    dims: Sequence[int] | None = None,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    progress: Report | None = None,
) -> dict:
    """Encodes the task's texts by the student (`model`) and the teacher and gives `evaluate_vectors`' dict.

    Systems: "student"; with a teacher also "teacher" and, where the widths are equal, "asymmetric": documents by the
    teacher, queries by the student. Prompts: "query" and "document" (or "passage", "corpus") where a model has them.
    data: a task, or where `load` finds one. progress(what, done, total). The dict has also "models" and "notes".
    """
    task = data if isinstance(data, Retrieval | Similarity) else load(data)
    for name in precisions:
        split_precision(name)
    encoders = {"student": model} if teacher is None else {"teacher": teacher, "student": model}
    encoders = {
        name: given if isinstance(given, Encoder) else Encoder.from_pretrained(given)
        for name, given in encoders.items()
    }
    for name, encoder in encoders.items():
        over = [dim for dim in dims or () if not 1 <= dim <= encoder.dim]
        if over:
            raise InputError(f"dims: {over[0]} is not a width of {name}, whose vectors have {encoder.dim} numbers")
    retrieval = isinstance(task, Retrieval)
    sides = (task.corpus_texts, task.query_texts) if retrieval else (task.first, task.second)
    kinds = ("document", "query") if retrieval else (None, None)
    systems = {}
    for name, encoder in encoders.items():
        parts = []
        for texts, kind in zip(sides, kinds):

            def report(done: int, total: int, what: str = f"{name}: {kind or 'sentence'} texts") -> None:
                if progress is not None:
                    progress(what, done, total)

            prompt = prompt_for(encoder, kind) if kind else None
            parts.append(encoder.encode(texts, prompt=prompt, progress=report))
        systems[name] = tuple(parts)
    notes = []
    if teacher is not None:
        if encoders["teacher"].dim == encoders["student"].dim:
            systems["asymmetric"] = systems["teacher"][0], systems["student"][1]
        else:
            widths = f"{encoders['teacher'].dim} and {encoders['student'].dim}"
            notes.append(f"No asymmetric system: the vectors of teacher and student have different widths, {widths}.")
    result = evaluate_vectors(systems, task, dims=dims, precisions=precisions, progress=progress)
    result["models"] = {
        name: {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim}
        for name, encoder in encoders.items()
    }
    result["notes"] = notes
    return result
