"""Documents and queries as one stream of training texts, in an order that depends on the seed and the step alone."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from leafkern.encode import Encoder
from leafkern.errors import InputError
from leafkern.textio import read_texts
from leafkern.train.cache import text_key
from leafkern.train.recipe import Data

KINDS = ("documents", "queries")
TOKENISE_BLOCK = 4096


@dataclasses.dataclass
class Corpus:
    """Texts of both kinds: documents first, then queries.

    kinds: uint8 (N,), index into KINDS. complete: per kind, the texts of its files before the limit. training,
    validation: row numbers, int64, without a common text.
    """

    texts: list[str]
    kinds: np.ndarray
    complete: dict[str, list[str]]
    files: list[tuple[str, int, int]]  # (path, row of its first text, number of texts)
    training: np.ndarray
    validation: np.ndarray
    fingerprint: str

    def where(self, row: int) -> str:
        """Where text `row` comes from: file:number, the number of the text in the file, from 1."""
        for path, first, count in self.files:
            if first <= row < first + count:
                return f"{path}:{row - first + 1}"
        raise IndexError(row)

    def rows_of(self, kind: str) -> np.ndarray:
        return np.flatnonzero(self.kinds == KINDS.index(kind))


def read_corpus(data: Data) -> Corpus:
    """Reads the files, applies the limits, and holds out the validation part.

    The texts with the lowest hashes are held out: the same ones whatever the order, and equal texts together.
    """
    texts: list[str] = []
    kinds: list[np.ndarray] = []
    files: list[tuple[str, int, int]] = []
    complete: dict[str, list[str]] = {}
    for number, kind in enumerate(KINDS):
        limit = getattr(data, f"limit_{kind}")
        complete[kind] = []
        kept = 0
        for path in getattr(data, kind):
            found = read_texts(path, data.field).texts
            complete[kind].extend(found)
            taken = found if limit is None else found[: limit - kept]
            files.append((path, len(texts), len(taken)))
            texts.extend(taken)
            kept += len(taken)
        kinds.append(np.full(kept, number, dtype=np.uint8))
    all_kinds = np.concatenate(kinds)
    digest = hashlib.blake2b(all_kinds, digest_size=16)
    hashes = np.empty(len(texts), dtype=np.uint64)
    for row, text in enumerate(texts):
        key = text_key(text)
        digest.update(key)
        hashes[row] = int.from_bytes(key[:8], "little")
    held = _held_out(hashes, data)
    if held.all():
        raise InputError(f"data: {len(texts)} texts in all leave none to train on; give more, or data.validation: 0")
    training, validation = np.flatnonzero(~held), np.flatnonzero(held)
    return Corpus(texts, all_kinds, complete, files, training, validation, digest.hexdigest())


def _held_out(hashes: np.ndarray, data: Data) -> np.ndarray:
    if data.validation == 0:
        return np.zeros(len(hashes), dtype=bool)
    count = min(max(1, round(data.validation * len(hashes))), data.validation_limit)
    return hashes <= np.partition(hashes, count - 1)[count - 1]


class Stream:
    """Batches of row numbers; batch `step` depends on (rows, batch_size, seed, step) alone.

    Every epoch is a fresh permutation of all rows; its last batch may be smaller.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(rows) / batch_size)
        self._epoch = -1
        self._order = rows

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            self._epoch = epoch
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


class Tokens:
    """Token ids of many texts in one array: `tokens[rows]` is a list of int32 arrays."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray):
        self.flat = flat
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        return [self.flat[self.starts[row] : self.starts[row + 1]] for row in rows]


def tokenise(
    encoder: Encoder,
    texts: Sequence[str],
    kinds: np.ndarray,
    prompts: dict[str, str],
    progress: Callable[[int, int], None],
) -> Tokens:
    """Tokenises every text once, behind the prompt of its kind."""
    flat: list[np.ndarray] = []
    lengths = np.zeros(len(texts) + 1, dtype=np.int64)
    for start in range(0, len(texts), TOKENISE_BLOCK):
        block = range(start, min(start + TOKENISE_BLOCK, len(texts)))
        ids: dict[int, np.ndarray] = {}
        for number, kind in enumerate(KINDS):
            rows = [row for row in block if kinds[row] == number]
            if rows:
                ids.update(zip(rows, encoder.tokenize([texts[row] for row in rows], prompts[kind])))
        for row in block:
            lengths[row + 1] = len(ids[row])
        flat.append(np.concatenate([ids[row] for row in block]).astype(np.int32))
        progress(block.stop, len(texts))
    return Tokens(np.concatenate(flat), np.cumsum(lengths))
