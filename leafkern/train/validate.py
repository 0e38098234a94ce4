"""What is measured during training: agreement with the teacher on held-out texts, and retrieval.

Agreement alone misleads: a student whose cosine to its teacher sticks at 0.77 retrieves nothing useful.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from leafkern.encode import Encoder
from leafkern.errors import InputError
from leafkern.ops import alignment_loss, search
from leafkern.textio import read_texts
from leafkern.train.data import KINDS

if TYPE_CHECKING:
    from leafkern.evaluate import Retrieval

DEPTH = 10


def load_retrieval(path: str) -> "Retrieval":
    """A BEIR folder, or known items: rows of a .jsonl or .parquet with the fields query and document."""
    from leafkern.evaluate import Retrieval, load_beir

    if Path(path).is_dir():
        return load_beir(path)
    if not Path(path).exists():
        raise InputError(
            f"evaluate.retrieval: no file or folder {path!r}; expected a BEIR folder, or a .jsonl or .parquet with the "
            "fields query and document"
        )
    queries, documents = read_texts(path, "query").texts, read_texts(path, "document").texts
    number = {text: str(position) for position, text in enumerate(dict.fromkeys(documents))}
    query_ids = [str(position) for position in range(len(queries))]
    qrels = {query: {number[document]: 1} for query, document in zip(query_ids, documents)}
    return Retrieval(list(number.values()), list(number), query_ids, queries, qrels)


@dataclasses.dataclass
class Validation:
    """Held-out texts with their targets (N, dim), and optionally queries with their known answers."""

    texts: list[str]
    kinds: np.ndarray
    targets: torch.Tensor
    retrieval: "Retrieval | None"
    loss: str

    def __bool__(self) -> bool:
        return bool(self.texts) or self.retrieval is not None

    def measure(self, student: Encoder, prompts: dict[str, str]) -> dict[str, float]:
        """validation_loss, validation_cosine (mean over texts) and ndcg@10, those that there is data for."""
        found: dict[str, float] = {}
        if self.texts:
            vectors = torch.empty_like(self.targets)
            for number, kind in enumerate(KINDS):
                rows = np.flatnonzero(self.kinds == number)
                if len(rows):
                    vectors[rows] = _encode(student, [self.texts[row] for row in rows], prompts[kind])
            found["validation_loss"] = alignment_loss(vectors, self.targets, kind=self.loss).item()
            found["validation_cosine"] = F.cosine_similarity(vectors, self.targets).mean().item()
        if self.retrieval is not None:
            found["ndcg@10"] = self._ndcg(student, prompts)
        return found

    def _ndcg(self, student: Encoder, prompts: dict[str, str]) -> float:
        from leafkern.evaluate import ndcg

        data = self.retrieval
        documents = F.normalize(_encode(student, data.corpus_texts, prompts["documents"]))
        queries = F.normalize(_encode(student, data.query_texts, prompts["queries"]))
        _, rows = search(queries, documents, DEPTH)
        ranked = [[data.corpus_ids[row] for row in of_query] for of_query in rows.tolist()]
        return float(ndcg(ranked, data.query_ids, data.qrels, k=DEPTH))


def _encode(student: Encoder, texts: list[str], prompt: str) -> torch.Tensor:
    """(N, dim) on the CPU, as the student gives them."""
    return student.encode(texts, prompt_text=prompt, normalize=student.module.normalize, output="torch").cpu()
