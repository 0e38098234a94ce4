"""From a recipe to everything that the loop needs: texts, teacher vectors, student, tokens, schedule."""

import dataclasses
import gc
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from leafkern.encode import Encoder
from leafkern.errors import InputError
from leafkern.train.cache import TeacherCache
from leafkern.train.data import KINDS, Corpus, Stream, Tokens, tokenise
from leafkern.train.head import add_head, least_squares
from leafkern.train.progress import Bars
from leafkern.train.recipe import Prompts, Recipe
from leafkern.train.teacher import Teacher, model_prompts, open_teacher
from leafkern.train.validate import Validation, load_retrieval


@dataclasses.dataclass
class Targets:
    """Teacher vectors by row of the corpus."""

    caches: list[TeacherCache | None]  # per kind
    kinds: np.ndarray
    rows: np.ndarray  # int64 (N,), in the cache of the text's kind
    dim: int
    unit_norm: bool

    def vectors(self, rows: np.ndarray) -> torch.Tensor:
        """float32 (len(rows), dim)."""
        out = torch.empty(len(rows), self.dim)
        for kind, cache in enumerate(self.caches):
            here = np.flatnonzero(self.kinds[rows] == kind)
            if len(here):
                out[torch.from_numpy(here)] = cache.vectors(self.rows[rows[here]])
        return out


def cache_folder(recipe: Recipe, output: Path) -> Path:
    return Path(recipe.teacher.cache) if recipe.teacher.cache else output / "teacher-cache"


def make_targets(
    recipe: Recipe, corpus: Corpus, output: Path, device: str | None, bars: Bars, identities: dict | None = None
) -> tuple[Targets, dict]:
    """Encodes what the cache lacks; gives the targets and each kind's cache identity.

    `identities`: those of the run that is resumed; then the teacher is opened only if texts are missing.
    """
    folder = cache_folder(recipe, output)
    kinds = [kind for number, kind in enumerate(KINDS) if (corpus.kinds == number).any()]
    texts = {kind: [corpus.texts[row] for row in corpus.rows_of(kind)] for kind in kinds}
    teacher: Teacher | None = None
    if identities is None:
        teacher = open_teacher(recipe.teacher, corpus.complete, device)
        identities = {kind: teacher.identity(kind) for kind in kinds}
    caches = {kind: TeacherCache(folder / kind, identities[kind], recipe.teacher.dtype) for kind in kinds}
    for kind, cache in caches.items():
        if not cache.missing(texts[kind]):
            continue
        if teacher is None:
            teacher = open_teacher(recipe.teacher, corpus.complete, device)
            # Refuses where the teacher has become another one since.
            cache = caches[kind] = TeacherCache(folder / kind, teacher.identity(kind), recipe.teacher.dtype)
        cache.fill(texts[kind], _encoder_of(teacher, kind), f"teacher {teacher.name}", bars.texts("teacher"))
    # LEAF trains without its teacher: its memory is the student's from here on.
    del teacher
    gc.collect()
    dims = {kind: cache.dim for kind, cache in caches.items()}
    if len(set(dims.values())) > 1:
        raise InputError(f"teacher: widths differ between kinds: {dims}; expected one teacher for both")
    rows = np.empty(len(corpus.texts), dtype=np.int64)
    for kind, cache in caches.items():
        rows[corpus.rows_of(kind)] = cache.rows(texts[kind])
    by_kind = [caches.get(kind) for kind in KINDS]
    unit = all(cache.unit_norm for cache in caches.values())
    return Targets(by_kind, corpus.kinds, rows, next(iter(dims.values())), unit), identities


def _encoder_of(teacher: Teacher, kind: str):
    return lambda texts, progress: teacher.encode(texts, kind, progress)


def open_student(recipe: Recipe, device: str | None) -> Encoder:
    """The student as its checkpoint or its teacher's layers give it, in float32."""
    wanted = recipe.student
    source = wanted.model or recipe.teacher.model
    settings = {"pooling": wanted.pooling, "max_length": wanted.max_length}
    student = Encoder.from_pretrained(source, device=device, dtype="float32", **settings)
    if wanted.layers is not None:
        student = Encoder.from_layers(student, wanted.layers)
    prompts = model_prompts(student, wanted.prompts)
    if any(prompts.values()) or prompts != model_prompts(student, Prompts()):
        student.prompts = {**student.prompts, "query": prompts["queries"], "document": prompts["documents"]}
        if student.prompt_text() not in prompts.values():
            student.default_prompt = None
    return student


def fit_head(recipe: Recipe, student: Encoder, targets: Targets) -> None:
    """Gives the student its W_out and its Normalize, as the teacher's vectors ask for."""
    module = student.module
    module.normalize = targets.unit_norm
    if recipe.student.head == "dense":
        torch.manual_seed(recipe.seed)
        add_head(module, targets.dim)
    elif module.dim != targets.dim:
        raise InputError(
            f"student.head: none, but the student is {module.dim} wide and its teacher {targets.dim}; set head: dense"
        )


def regress_head(recipe: Recipe, student: Encoder, tokens: Tokens, targets: Targets, rows: np.ndarray, bars: Bars):
    """head_init lstsq: ridge regression over at most head_rows of the training `rows`."""
    rows = np.random.default_rng(recipe.seed).permutation(rows)[: recipe.student.head_rows]
    pooled = torch.empty(len(rows), student.module.width)
    done = 0
    with torch.inference_mode():
        for batch in student.batches(tokens.lengths[rows], 4096):
            pooled[torch.from_numpy(batch)] = student.module.pooled(student.collate(tokens[rows[batch]])).cpu()
            done += len(batch)
            bars("head", done, len(rows))
    weight = least_squares(pooled, targets.vectors(rows), recipe.student.ridge)
    linear = student.module.dense[0].linear
    with torch.no_grad():
        linear.weight.copy_(weight)


def settle(module: nn.Module, dropout: float) -> None:
    """Sets the dropout and moves every parameter into memory of its own.

    Mapped weights are not aligned alike in every process, and alignment can change the last bit of a product.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, dropout)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@dataclasses.dataclass
class Prepared:
    corpus: Corpus
    targets: Targets
    student: Encoder
    prompts: dict[str, str]
    tokens: Tokens
    stream: Stream
    validation: Validation
    identities: dict


def prepare(
    recipe: Recipe, corpus: Corpus, output: Path, bars: Bars, checkpoint: Path | None, identities: dict | None
) -> Prepared:
    """Everything but the optimiser. From `checkpoint` the student comes as it was saved there."""
    retrieval = load_retrieval(recipe.evaluate.retrieval) if recipe.evaluate.retrieval else None
    student = open_student(recipe, recipe.device) if checkpoint is None else None
    targets, identities = make_targets(recipe, corpus, output, recipe.device, bars, identities)
    if checkpoint is None:
        fit_head(recipe, student, targets)
    else:
        student = Encoder.from_pretrained(checkpoint / "model", device=recipe.device, dtype="float32")
    of_documents = identities.get("documents") or next(iter(identities.values()))
    student.aligned_with = of_documents["revision"]
    prompts = model_prompts(student, recipe.student.prompts)
    tokens = tokenise(student, corpus.texts, corpus.kinds, prompts, lambda done, total: bars("tokenise", done, total))
    if checkpoint is None and recipe.student.head_init == "lstsq":
        regress_head(recipe, student, tokens, targets, corpus.training, bars)
    settle(student.module, recipe.student.dropout)
    held = corpus.validation
    validation = Validation(
        [corpus.texts[row] for row in held], corpus.kinds[held], targets.vectors(held), retrieval, recipe.loss
    )
    stream = Stream(corpus.training, recipe.batch_size, recipe.seed)
    return Prepared(corpus, targets, student, prompts, tokens, stream, validation, identities)


def steps_per_cycle(recipe: Recipe, stream: Stream) -> int | None:
    """None where only `minutes` are given."""
    if recipe.schedule.steps is not None:
        return recipe.schedule.steps
    epochs = recipe.schedule.epochs_per_cycle
    return None if epochs is None else max(1, math.ceil(epochs * stream.steps_per_epoch))
