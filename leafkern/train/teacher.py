"""Where teacher vectors come from: a model, a file, or any function. LEAF needs nothing but the vectors."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from leafkern.encode import Encoder
from leafkern.errors import InputError
from leafkern.evaluate import prompt_for
from leafkern.textio import read_vectors
from leafkern.train.cache import check_vectors
from leafkern.train.recipe import Prompts
from leafkern.train.recipe import Teacher as TeacherRecipe

Progress = Callable[[int, int], None]


class Teacher(Protocol):
    """A source of vectors."""

    name: str

    def identity(self, kind: str) -> dict:
        """What the vectors of `kind` ("documents", "queries") depend on: the key of their cache."""

    def encode(self, texts: list[str], kind: str, progress: Progress) -> np.ndarray:
        """(len(texts), D), floating point."""


def model_prompts(encoder: Encoder, given: Prompts) -> dict[str, str]:
    """Literal prompt per kind: the recipe's, else the model's own for that kind, else its default one."""
    own = {
        "queries": encoder.prompt_text(prompt_for(encoder, "query")),
        "documents": encoder.prompt_text(prompt_for(encoder, "document")),
    }
    return {kind: text if getattr(given, kind) is None else getattr(given, kind) for kind, text in own.items()}


class ModelTeacher:
    def __init__(self, recipe: TeacherRecipe, device: str | None):
        self.name = str(recipe.model)
        self.encoder = Encoder.from_pretrained(
            recipe.model, device=device, pooling=recipe.pooling, max_length=recipe.max_length, compute=recipe.compute
        )
        self.prompts = model_prompts(self.encoder, recipe.prompts)
        self.compute = recipe.compute

    def identity(self, kind: str) -> dict:
        return {
            "revision": self.encoder.fingerprint,
            "prompt": self.prompts[kind],
            "max_length": self.encoder.max_length,
            "pooling": self.encoder.module.pooling,
            "norm": self.encoder.module.normalize,
            "compute": self.compute or "default",
        }

    def encode(self, texts: list[str], kind: str, progress: Progress) -> np.ndarray:
        return self.encoder.encode(
            texts,
            prompt_text=self.prompts[kind],
            normalize=self.encoder.module.normalize,
            progress=progress,
        )


class CallableTeacher:
    """`function(texts: list[str]) -> (N, D)`; the prompt of the kind stands before every text it is given."""

    def __init__(self, recipe: TeacherRecipe):
        self.name = recipe.callable
        self.revision = recipe.id
        self.prompts = {"documents": recipe.prompts.documents or "", "queries": recipe.prompts.queries or ""}
        module, _, function = recipe.callable.partition(":")
        # As with `python -m`, so that the command line finds a module beside the recipe too.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            self.function = getattr(importlib.import_module(module), function)
        except ImportError as error:
            raise InputError(f"teacher.callable: {module!r} can't be imported ({error})") from None
        except AttributeError:
            raise InputError(f"teacher.callable: module {module!r} has no function {function!r}") from None
        if not callable(self.function):
            raise InputError(f"teacher.callable: {recipe.callable!r} is {type(self.function).__name__}, not a function")

    def identity(self, kind: str) -> dict:
        return _black_box(f"callable {self.name} id {self.revision}", self.prompts[kind])

    def encode(self, texts: list[str], kind: str, progress: Progress) -> np.ndarray:
        vectors = self.function([self.prompts[kind] + text for text in texts])
        if hasattr(vectors, "detach"):
            vectors = vectors.detach().float().cpu().numpy()
        return np.asarray(vectors)


class VectorsTeacher:
    """Vectors computed elsewhere; equal texts keep their first vector."""

    def __init__(self, recipe: TeacherRecipe, complete: dict[str, list[str]]):
        self.name = "teacher.vectors"
        self.rows: dict[str, dict[str, int]] = {}
        self.vectors: dict[str, list[np.ndarray]] = {}
        self.revisions: dict[str, str] = {}
        for kind, texts in complete.items():
            paths = getattr(recipe.vectors, kind)
            if bool(paths) != bool(texts):
                lacking = f"teacher.vectors.{kind}" if texts else f"data.{kind}"
                raise InputError(f"{lacking}: missing; data.{kind} and teacher.vectors.{kind} go together")
            if paths:
                self._read(kind, paths, texts)

    def _read(self, kind: str, paths: Sequence[str], texts: list[str]) -> None:
        parts = [read_vectors(path) for path in paths]
        by_text = [part.texts is not None for part in parts]
        if any(by_text) != all(by_text):
            raise InputError(f"teacher.vectors.{kind}: files with and without a text column can't be mixed")
        widths = {part.vectors.shape[1] for part in parts}
        if len(widths) > 1:
            raise InputError(f"teacher.vectors.{kind}: widths differ: {sorted(widths)}; expected one")
        count = sum(len(part.vectors) for part in parts)
        if all(by_text):
            texts = [text for part in parts for text in part.texts]
        elif count != len(texts):
            raise InputError(
                f"teacher.vectors.{kind}: {count} vectors for the {len(texts)} texts of data.{kind}; "
                "expected one row per text, in the same order"
            )
        first = 0
        for path, part in zip(paths, parts):
            check_vectors(part.vectors, texts[first : first + len(part.vectors)], path)
            first += len(part.vectors)
        rows: dict[str, int] = {}
        for row, text in enumerate(texts):
            rows.setdefault(text, row)
        self.rows[kind] = rows
        self.vectors[kind] = [part.vectors for part in parts]
        self.revisions[kind] = _files_digest(paths)

    def identity(self, kind: str) -> dict:
        return _black_box(f"file {self.revisions[kind]}", "")

    def encode(self, texts: list[str], kind: str, progress: Progress) -> np.ndarray:
        rows = self.rows[kind]
        lacking = next((text for text in texts if text not in rows), None)
        if lacking is not None:
            raise InputError(f"teacher.vectors.{kind}: no vector for text {lacking!r:.80}")
        wanted = np.array([rows[text] for text in texts])
        out = np.empty((len(texts), self.vectors[kind][0].shape[1]), dtype=np.float32)
        first = 0
        for part in self.vectors[kind]:
            here = (wanted >= first) & (wanted < first + len(part))
            out[here] = part[wanted[here] - first]
            first += len(part)
        return out


def _black_box(revision: str, prompt: str) -> dict:
    """The identity of vectors whose making can't be looked into."""
    return {"revision": revision, "prompt": prompt, "max_length": None, "pooling": None, "norm": None, "compute": None}


def _files_digest(paths: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def open_teacher(recipe: TeacherRecipe, complete: dict[str, list[str]], device: str | None = None) -> Teacher:
    """The recipe's teacher. `complete`: the texts of the data's files, per kind, in order (for files of vectors)."""
    if recipe.model is not None:
        return ModelTeacher(recipe, device)
    if recipe.callable is not None:
        return CallableTeacher(recipe)
    return VectorsTeacher(recipe, complete)
