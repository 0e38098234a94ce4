"""Teacher vectors on disk: every text is encoded once, whatever happens to the process.

One folder holds the vectors of one teacher, prompt, maximal length, pooling and norm: its `cache.json` says which
("identity"), and opening it for another is refused. Vectors stand in safetensors shards, each with the hashes of
its texts ("keys"), so that rows are found by text and never by position. A shard appears whole or not at all;
texts without a shard are encoded when they are asked for. One process writes at a time.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from leafkern.errors import DamagedFileError, InputError
from leafkern.files import atomic_file, read_json, remove_leftovers, write_json

FORMAT = "leafkern teacher cache"
VERSION = 1
# Of ‖v‖ around 1, for vectors that count as unit-norm: float16 rounding moves a norm by at most 5e-4.
UNIT_TOLERANCE = 0.01
BLOCK_ROWS = 1024
SHARD_ROWS = 16384
SHARD_SECONDS = 60.0

Encode = Callable[[list[str], Callable[[int, int], None]], np.ndarray]
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def text_key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shown(text: str) -> str:
    """`text` as an error quotes it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _checksum(keys: torch.Tensor, vectors: torch.Tensor) -> str:
    digest = hashlib.blake2b(keys.numpy(), digest_size=16)
    digest.update(vectors.numpy().view(np.uint8))
    return digest.hexdigest()


def check_vectors(
    vectors: np.ndarray, texts: Sequence[str], source: str, dtype: str = "float32", among: Sequence[str] | None = None
) -> None:
    """Names the first row, and its text, that `dtype` can't hold as a finite vector other than zero.

    `among`: the texts by which rows are numbered, where `texts` are a part of them.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(vectors).astype(dtype)
    finite = np.isfinite(stored).all(axis=1)
    bad = ~finite | ~stored.any(axis=1)
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    if finite[row]:
        what = "is all zeros"
    elif np.isfinite(vectors[row]).all():
        what = f"does not fit {dtype}; set teacher.dtype: float32"
    else:
        what = "holds NaN or infinity"
    number = row if among is None else among.index(texts[row])
    raise InputError(
        f"{source}: row {number} {what} ({int(bad.sum())} such rows), text {shown(texts[row])}; "
        "expected finite vectors other than zero"
    )


class TeacherCache:
    """Vectors (N, dim) of one teacher, found by text, memory-mapped."""

    def __init__(self, folder: str | Path, identity: dict, dtype: str = "float16"):
        """Opens the cache in `folder`, or starts one there.

        Raises InputError where the folder holds the vectors of another `identity` or dtype, DamagedFileError
        (naming the file) where a shard is truncated, altered, misaligned or foreign. Every byte is read once.
        """
        self.folder = Path(folder)
        self.identity = {**identity, "dtype": dtype}
        self.dim: int | None = None
        self._shards: list[torch.Tensor] = []
        self._starts: list[int] = [0]
        self._row_of: dict[bytes, int] = {}
        self._bad_rows: set[int] = set()
        self._norms = (np.inf, -np.inf)
        self._check_identity()
        remove_leftovers(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open_shard(path)

    def _check_identity(self) -> None:
        manifest = self.folder / "cache.json"
        if not manifest.exists():
            if any(self.folder.glob("*.safetensors")):
                raise DamagedFileError(f"{self.folder}: holds shards but no cache.json; it is no teacher cache")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(manifest, {"format": FORMAT, "version": VERSION, "identity": self.identity})
            return
        value = read_json(manifest, FORMAT)
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            raise DamagedFileError(f"{manifest}: expected a {FORMAT} of version {VERSION}; got {value!r:.80}")
        held = value.get("identity")
        if not isinstance(held, dict):
            raise DamagedFileError(f"{manifest}: it does not say whose vectors these are")
        for name in {**held, **self.identity}:
            if held.get(name) != self.identity.get(name):
                raise InputError(
                    f"teacher cache {self.folder}: stale: its {name} is {held.get(name)!r}, the recipe's teacher has "
                    f"{self.identity.get(name)!r}; name another folder in teacher.cache, or delete this one"
                )

    @property
    def _fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _open_shard(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Views of the mapped file: nothing is copied until rows are looked up.
                keys, vectors = file.get_tensor("keys"), file.get_tensor("vectors")
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{path}: truncated, or no shard of a teacher cache ({error}); delete it") from None
        if metadata.get("identity") != self._fingerprint:
            raise DamagedFileError(f"{path}: foreign: the shard belongs to another teacher cache; delete it")
        fits = keys.dtype == torch.uint8 and keys.ndim == 2 and keys.shape[1] == 16 and vectors.ndim == 2
        if not fits or len(keys) != len(vectors) or self.dim not in (None, vectors.shape[1]):
            raise DamagedFileError(
                f"{path}: misaligned: keys {tuple(keys.shape)} beside vectors {tuple(vectors.shape)}, "
                f"the cache's width is {self.dim}; delete it"
            )
        if metadata.get("checksum") != _checksum(keys, vectors):
            raise DamagedFileError(f"{path}: altered: its checksum does not fit its content; delete it")
        start = self._starts[-1]
        for row, key in enumerate(keys.numpy(), start):
            self._row_of.setdefault(key.tobytes(), row)
        norms = torch.linalg.vector_norm(vectors.float(), dim=1).numpy()
        bad = ~np.isfinite(norms) | (norms == 0)
        self._bad_rows.update((start + np.flatnonzero(bad)).tolist())
        if len(norms):
            self._norms = (min(self._norms[0], norms.min()), max(self._norms[1], norms.max()))
        self.dim = vectors.shape[1]
        self._shards.append(vectors)
        self._starts.append(start + len(vectors))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def unit_norm(self) -> bool:
        """Whether every vector's norm is 1 ± 0.01."""
        low, high = self._norms
        return len(self) > 0 and 1 - UNIT_TOLERANCE <= low and high <= 1 + UNIT_TOLERANCE

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts, each once and in order, that have no vector yet."""
        return [text for text in dict.fromkeys(texts) if text_key(text) not in self._row_of]

    def fill(
        self, texts: Sequence[str], encode: Encode, source: str, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Encodes the texts that are missing and returns how many those were.

        `encode(texts, progress)` gives (n, dim) finite rows other than zero, else InputError names row and text.
        A killed process loses at most the shard being gathered (a minute, or SHARD_ROWS rows).
        """
        missing = self.missing(texts)
        report = progress or (lambda done, total: None)
        blocks: list[np.ndarray] = []
        flushed, done, began = 0, 0, time.monotonic()
        while done < len(missing):
            block = missing[done : done + BLOCK_ROWS]
            vectors = np.asarray(encode(block, lambda n, _, at=done: report(at + n, len(missing))))
            self._check_shape(vectors, len(block), source)
            check_vectors(vectors, block, source, self.identity["dtype"], texts)
            blocks.append(vectors)
            done += len(block)
            report(done, len(missing))
            full = done - flushed >= SHARD_ROWS or time.monotonic() - began >= SHARD_SECONDS
            if full or done == len(missing):
                self._write_shard(missing[flushed:done], np.concatenate(blocks))
                blocks, flushed, began = [], done, time.monotonic()
        return len(missing)

    def _check_shape(self, vectors: np.ndarray, rows: int, source: str) -> None:
        width = "D" if self.dim is None else self.dim
        if vectors.ndim != 2 or len(vectors) != rows or width not in ("D", vectors.shape[1]):
            raise InputError(f"{source}: gave shape {vectors.shape} for {rows} texts; expected ({rows}, {width})")
        if not np.issubdtype(vectors.dtype, np.floating):
            raise InputError(f"{source}: gave {vectors.dtype}; expected floating-point vectors")
        self.dim = vectors.shape[1]

    def _write_shard(self, texts: list[str], vectors: np.ndarray) -> None:
        keys = torch.frombuffer(bytearray(b"".join(map(text_key, texts))), dtype=torch.uint8).view(-1, 16)
        stored = torch.from_numpy(vectors).to(DTYPES[self.identity["dtype"]]).contiguous()
        number = len(self)
        # Where a shard was deleted, the name by row count may be taken.
        while (path := self.folder / f"{number:012d}.safetensors").exists():
            number += 1
        metadata = {"identity": self._fingerprint, "checksum": _checksum(keys, stored)}
        with atomic_file(path) as temporary:
            save_file({"keys": keys, "vectors": stored}, temporary, metadata)
        self._open_shard(path)

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """Row numbers, int64 (N,). InputError for a text without a vector, or whose vector is zero or not finite."""
        found = np.empty(len(texts), dtype=np.int64)
        for number, text in enumerate(texts):
            row = self._row_of.get(text_key(text))
            if row is None:
                raise InputError(f"teacher cache {self.folder}: no vector for text {shown(text)}")
            if row in self._bad_rows:
                raise InputError(
                    f"teacher cache {self.folder}: row {row} is zero or not finite, text {shown(text)}; "
                    "delete the cache and make it again"
                )
            found[number] = row
        return found

    def vectors(self, rows: np.ndarray) -> torch.Tensor:
        """float32 (len(rows), dim), a copy."""
        rows = np.asarray(rows, dtype=np.int64)
        out = torch.empty(len(rows), self.dim or 0)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            inside = torch.from_numpy(rows[here] - self._starts[shard])
            out[torch.from_numpy(here)] = self._shards[shard][inside].float()
        return out
