"""Splits the documentation into files: what the student learns from, and the titles that are kept for the report."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leafkern.demo.corpus import Page
from leafkern.files import atomic_file

SEED = 0


@dataclass(frozen=True)
class Split:
    """held_out: pages that no training step sees; validation: pages for the curve during training; train: the rest."""

    held_out: list[Page]
    validation: list[Page]
    train: list[Page]


def split_pages(pages: Sequence[Page], *, held_out: int, validation: int) -> Split:
    shuffled = random.Random(SEED).sample(list(pages), len(pages))
    first = held_out + validation
    return Split(shuffled[:held_out], shuffled[held_out:first], shuffled[first:])


def write_lines(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_known_items(folder: Path, pages: Sequence[Page]) -> Path:
    """A BEIR folder in which title i has one right answer, body i."""
    write_lines(folder / "corpus.jsonl", ({"_id": page.name, "title": "", "text": page.body} for page in pages))
    write_lines(folder / "queries.jsonl", ({"_id": page.name, "text": page.title} for page in pages))
    path = folder / "qrels" / "test.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        rows = [f"{page.name}\t{page.name}\t1" for page in pages]
        temporary.write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n", encoding="utf-8")
    return folder


def write_training_texts(folder: Path, pages: Sequence[Page]) -> tuple[Path, Path]:
    """(documents, queries): bodies and titles, each its own file; nothing says which belong together."""
    documents = write_lines(folder / "documents.jsonl", ({"text": page.body, "id": page.name} for page in pages))
    queries = write_lines(folder / "queries.jsonl", ({"text": page.title} for page in pages))
    return documents, queries
