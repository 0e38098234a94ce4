"""The three collections that bench/recall.py searches, and their all-MiniLM-L6-v2 vectors, kept between runs."""

import ast
import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from leafkern.console import say
from leafkern.demo.corpus import MAX_FILE_BYTES, SKIPPED, read_pages, source_roots
from leafkern.demo.data import split_pages
from leafkern.encode import Encoder
from leafkern.evaluate import Retrieval, load_beir
from leafkern.files import atomic_file

SEED = 0
DOCSTRINGS, HELD_OUT, CHARACTERS = 12_000, 500, (20, 160)
TITLES, TITLE_TOKENS = 2_000, 64


def collections(data: Path | None) -> dict[str, tuple[Retrieval, int | None]]:
    """By name: the task and its tokens per text (None: the model's own limit). "scifact" needs the folder `data`."""
    found: dict[str, tuple[Retrieval, int | None]] = {"docstrings": (docstrings(), None)}
    found["documentation"] = documentation(), TITLE_TOKENS
    if data is not None and (data / "scifact").is_dir():
        found["scifact"] = load_beir(data / "scifact"), None
    return found


def docstrings() -> Retrieval:
    """Docstrings of at most 160 characters found on this machine: 11,500 documents, 500 others as queries, no answers.

    With so many near each other and nothing judged, it serves to compare codes with float32 only.
    """
    texts = random.Random(SEED).sample(sorted(set(_docstrings())), DOCSTRINGS)
    queries, documents = texts[:HELD_OUT], texts[HELD_OUT:]
    return Retrieval(_numbered("d", documents), documents, _numbered("q", queries), queries, {}, "docstrings")


def _docstrings() -> Iterator[str]:
    least, most = CHARACTERS
    for root in source_roots():
        for file in sorted(root.rglob("*.py")):
            if SKIPPED.intersection(file.relative_to(root).parts) or file.stat().st_size > MAX_FILE_BYTES:
                continue
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if least <= len(text) <= most:
                        yield text


def _numbered(letter: str, texts: Sequence[str]) -> list[str]:
    return [f"{letter}{number}" for number in range(len(texts))]


def documentation() -> Retrieval:
    """The demo's corpus, all of it: a page's title is a query, its body (which lacks the title) the one answer."""
    pages = read_pages()
    asked = split_pages(pages, held_out=TITLES, validation=0).held_out
    names, bodies = [page.name for page in pages], [page.body for page in pages]
    queries = [f"title of {page.name}" for page in asked]
    qrels = {query: {page.name: 1} for query, page in zip(queries, asked)}
    return Retrieval(names, bodies, queries, [page.title for page in asked], qrels, "documentation")


def vectors(task: Retrieval, tokens: int | None, model: Path, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """(documents, queries) float32, encoded once: `work` keeps them under the texts' and the model's fingerprint."""
    texts = "\n".join([*task.corpus_texts, "", *task.query_texts])
    encoder = Encoder.from_pretrained(model, max_length=tokens)
    key = hashlib.sha256(f"{encoder.fingerprint} {tokens}\n{texts}".encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{task.name}-{key}.npz"
    if not path.exists():
        say(f"{task.name}: encoding {len(task.corpus_texts):,} documents and {len(task.query_texts):,} queries")
        documents, queries = encoder.encode(task.corpus_texts), encoder.encode(task.query_texts)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, documents=documents, queries=queries)
    with np.load(path) as kept:
        return kept["documents"], kept["queries"]
