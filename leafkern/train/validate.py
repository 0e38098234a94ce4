"""What is measured during training: agreement with the teacher on held-out texts, and retrieval.

Agreement alone misleads: a student whose cosine to its teacher sticks at 0.77 retrieves nothing useful.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from leafkern.encode import Encoder
from leafkern.errors import InputError
from leafkern.evaluate import Retrieval, load_beir, ndcg, self_answers
from leafkern.ops import alignment_loss, search
from leafkern.textio import read_texts
from leafkern.train.data import KINDS

DEPTH = 10


def load_retrieval(path: str) -> Retrieval:
    """A BEIR folder, or known items: rows of a .jsonl or .parquet with the fields query and document."""
    if Path(path).is_dir():
        return load_beir(path)
    if not Path(path).exists():
        raise InputError(
            f"evaluate.retrieval: no file or folder {path!r}; expected a BEIR folder, or a .jsonl or .parquet with the "
            "fields query and document"
        )
    queries, documents = read_texts(path, "query").texts, read_texts(path, "document").texts
    number = {text: str(position) for position, text in enumerate(dict.fromkeys(documents))}
    # No id of a document, for that would make it the document that the query was taken from.
    query_ids = [f"query {position}" for position in range(len(queries))]
    qrels = {query: {number[document]: 1} for query, document in zip(query_ids, documents)}
    return Retrieval(list(number.values()), list(number), query_ids, queries, qrels)


@dataclasses.dataclass
class Validation:
    """Held-out texts with their targets (N, dim), and optionally queries with their known answers."""

    texts: list[str]
    kinds: np.ndarray
    targets: torch.Tensor
    retrieval: Retrieval | None
    loss: str

    def __bool__(self) -> bool:
        return bool(self.texts) or self.retrieval is not None

    def measure(
        self, student: Encoder, prompts: dict[str, str], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, float]:
        """validation_loss, validation_cosine (mean over texts) and ndcg@10, those that there is data for."""
        data = self.retrieval
        total = len(self.texts) + (len(data.corpus_texts) + len(data.query_texts) if data else 0)
        encoded = 0

        def encode(texts: list[str], kind: str) -> torch.Tensor:
            """(N, dim) on the CPU, as the student gives them."""
            nonlocal encoded
            vectors = student.encode(
                texts,
                prompt_text=prompts[kind],
                normalize=student.module.normalize,
                output="torch",
                progress=lambda done, _: progress(encoded + done, total),
            )
            encoded += len(texts)
            return vectors.cpu()

        found: dict[str, float] = {}
        if self.texts:
            vectors = torch.empty_like(self.targets)
            for number, kind in enumerate(KINDS):
                rows = np.flatnonzero(self.kinds == number)
                if len(rows):
                    vectors[rows] = encode([self.texts[row] for row in rows], kind)
            found["validation_loss"] = alignment_loss(vectors, self.targets, kind=self.loss).item()
            found["validation_cosine"] = F.cosine_similarity(vectors, self.targets).mean().item()
        if data is not None:
            documents = F.normalize(encode(data.corpus_texts, "documents"))
            queries = F.normalize(encode(data.query_texts, "queries"))
            own = self_answers(data)
            _, rows = search(queries, documents, DEPTH + any(row is not None for row in own))
            ranked = [[data.corpus_ids[row] for row in found if row != mine] for mine, found in zip(own, rows.tolist())]
            found["ndcg@10"] = float(ndcg(ranked, data.query_ids, data.qrels, k=DEPTH))
        return found
