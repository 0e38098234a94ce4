"""An index that grows block by block from one source, and goes on after a kill where it stopped.

Each block becomes a segment; the manifest that names it says too how many rows of the source are in the index by then.
"""

import os
import warnings
from pathlib import Path

import numpy as np

from leafkern.console import Report, unseen
from leafkern.errors import InputError
from leafkern.index import ClippedWarning, Index
from leafkern.index.manifest import MANIFEST


class Stream:
    """Appends the blocks of one source to the index at `path`, which is made if there is none.

    position: rows of the source that are in the index, where the next block has to begin; 0 for a new index.
    clipped: values of the blocks added here, not before a kill, that lay outside the ranges: the first block sets them.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        origin: dict[str, str | int | bool | None],
        *,
        width: int,
        precision: str = "int8",
        rescore: str | None = "float16",
        encoder: object = None,
        prompt: str | None = None,
        texts: bool = False,
    ):
        """origin: by name, all that decides what the vectors are: the input's checksum, the encoder's, the prompt.

        An index at `path` must have been begun by a stream of the same origin: InputError names what differs. It must
        also hold nothing but an index. The other arguments are those of `Index.build`.
        """
        path, self.clipped = Path(path), 0
        self._origin = dict(origin, precision=precision, rescore=rescore, width=width, texts=texts)
        if not (path / MANIFEST).exists():
            self.index = Index.build(
                path,
                np.zeros((0, width), np.float32),
                precision=precision,
                rescore=rescore,
                encoder=encoder,
                prompt=prompt,
                texts=[] if texts else None,
                source=dict(self._origin, rows=0),
            )
            return
        self.index = Index.open(path)
        begun = self.index.source or {}
        if type(begun.get("rows")) is not int:
            raise InputError(f"{path}: holds an index that was not made by a stream; choose another folder")
        for name, value in self._origin.items():
            if begun.get(name) != value:
                raise InputError(
                    f"{name}: {path} was begun with {name} {begun.get(name)!r}, not {value!r}; go on with the same, or "
                    "choose another folder"
                )

    @property
    def position(self) -> int:
        return self.index.source["rows"]

    def add(self, vectors: np.ndarray, ids: object = None, texts: list[str] | None = None) -> None:
        """Appends the rows of the source from `position` on. When it returns, a kill no longer loses them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClippedWarning)
            source = dict(self._origin, rows=self.position + len(vectors))
            self.clipped += self.index.add(vectors, ids, texts=texts, source=source)

    def finish(self, progress: Report = unseen) -> Index:
        """The index, as one segment, which is what search passes over fastest."""
        if self.clipped:
            warnings.warn(
                f"{self.index.path}: {self.clipped} of the values added now lie outside the ranges of the first block "
                "and were clipped",
                ClippedWarning,
                stacklevel=2,
            )
        self.index.compact(progress=progress)
        return self.index
