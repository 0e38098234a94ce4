"""One stage from recipe to saved model: a fresh run, a resumed one, or a plan of one."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from leafkern.errors import InputError
from leafkern.train.cache import TeacherCache
from leafkern.train.checkpoint import latest_checkpoint, read_state
from leafkern.train.data import KINDS, Corpus, Stream, read_corpus, tokenise
from leafkern.train.loop import Loop
from leafkern.train.prepare import Prepared, cache_folder, fit_head, open_student, prepare, steps_per_cycle
from leafkern.train.progress import Bars, Report
from leafkern.train.recipe import Recipe, changed_keys, load_recipe, save_recipe
from leafkern.train.teacher import ModelTeacher, Teacher, VectorsTeacher, model_prompts, open_teacher
from leafkern.train.validate import Validation

SAMPLE = 64


def train(recipe: Recipe, output: Path, *, resume: bool, progress: Report | bool | None) -> list[dict]:
    """Runs the stage and returns its history; see `leafkern.train.run`."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    checkpoint = latest_checkpoint(output / "checkpoints")
    if checkpoint is not None and not resume:
        raise InputError(
            f"output {output}: a run stands there already (newest checkpoint: {checkpoint.name}); resume it, or name "
            "another folder"
        )
    state = {} if checkpoint is None else read_state(checkpoint)
    corpus = read_corpus(recipe.data)
    if checkpoint is not None:
        _check_same_run(recipe, corpus, state, checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe.model_copy(update={"output": str(output)}), output / "recipe.yaml")
    with Bars(progress) as bars:
        prepared = prepare(recipe, corpus, output, bars, checkpoint, state.get("identities"))
        place = {"device": prepared.student.device.type, "threads": torch.get_num_threads()}
        if checkpoint is not None and {key: state[key] for key in place} != place:
            bars.say(
                f"resuming on {place}, begun on {state['device']} with {state['threads']} threads: the last bits differ"
            )
        kept = {
            **place,
            "recipe": recipe.model_dump(mode="json"),
            "data": corpus.fingerprint,
            "identities": prepared.identities,
        }
        loop = Loop(recipe, output, prepared, bars, kept, saved=checkpoint)
        if checkpoint is not None:
            loop.step, loop.seconds = state["step"], state["seconds"]
        steps = state.get("steps_per_cycle") or steps_per_cycle(recipe, prepared.stream)
        loop.steps_per_cycle = steps or loop.steps_for(recipe.schedule.minutes)
        history = loop.run()
        prepared.student.save_pretrained(output / "model")
    return history


def _check_same_run(recipe: Recipe, corpus: Corpus, state: dict, checkpoint: Path) -> None:
    changed = changed_keys(load_recipe(state["recipe"]), recipe)
    if corpus.fingerprint != state["data"]:
        changed.append("the texts of data's files")
    if changed:
        raise InputError(
            f"resume: this is not the run of {checkpoint}; changed: {'; '.join(changed)}. "
            "Undo that, or start afresh in another output folder"
        )


@dataclasses.dataclass
class _RandomTargets:
    """Stands in for a cache that is not made yet, to time steps."""

    dim: int
    unit_norm: bool = True

    def vectors(self, rows: np.ndarray) -> torch.Tensor:
        return F.normalize(torch.randn(len(rows), self.dim))


def plan(recipe: Recipe, output: Path) -> str:
    """What `train` would do, in YAML: recipe, counts, steps, estimates (measured on a few texts). Writes nothing."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    corpus = read_corpus(recipe.data)
    teacher = open_teacher(recipe.teacher, corpus.complete, recipe.device)
    student = open_student(recipe, recipe.device)
    cached, teacher_seconds, dim = _plan_teacher(recipe, corpus, output, teacher)
    targets = _RandomTargets(dim or student.module.dim)
    fit_head(recipe, student, targets)
    prompts = model_prompts(student, recipe.student.prompts)
    # Rows of a sample stand for all.
    sample = np.random.default_rng(recipe.seed).permutation(corpus.training)[: 32 * SAMPLE]
    tokens = tokenise(student, [corpus.texts[row] for row in sample], corpus.kinds[sample], prompts, lambda *_: None)
    stream = Stream(corpus.training, recipe.batch_size, recipe.seed)
    few = Prepared(
        corpus, targets, student, prompts, tokens, Stream(np.arange(len(sample)), recipe.batch_size, recipe.seed),
        Validation([], corpus.kinds[:0], torch.empty(0, targets.dim), None, recipe.loss), {},
    )  # fmt: skip
    loop = Loop(recipe, output, few, Bars(False), {})
    loop.steps_per_cycle = steps_per_cycle(recipe, stream) or loop.steps_for(recipe.schedule.minutes)
    per_step = loop.seconds_per_step()
    parameters = sum(parameter.numel() for parameter in student.module.parameters())
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "output": str(output),
        "texts": {kind: len(corpus.rows_of(kind)) for kind in KINDS}
        | {"training": len(corpus.training), "validation": len(corpus.validation)},
        "teacher": {"texts_cached": cached, "texts_to_encode": _distinct(corpus) - cached}
        | ({} if teacher_seconds is None else {"estimated_minutes": round(teacher_seconds / 60, 2)})
        | ({} if dim is None else {"width": dim}),
        "student": {
            "parameters": parameters,
            "width": student.module.width,
            "tokens_per_text": round(float(tokens.lengths.mean()), 1),
            "device": str(student.device),
            "threads": torch.get_num_threads(),
        },
        "training": {
            "steps_per_epoch": stream.steps_per_epoch,
            "steps_per_cycle": loop.steps_per_cycle,
            "steps": loop.total,
            "texts_per_second": round(recipe.batch_size / per_step, 1),
            "estimated_minutes": round(loop.total * per_step / 60, 2),
            "checkpoint_megabytes": round(parameters * 12 / 1e6, 1),
        },
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _distinct(corpus: Corpus) -> int:
    return sum(len({corpus.texts[row] for row in corpus.rows_of(kind)}) for kind in KINDS)


def _plan_teacher(
    recipe: Recipe, corpus: Corpus, output: Path, teacher: Teacher
) -> tuple[int, float | None, int | None]:
    """Texts in the cache, seconds to encode the others (None: not known), width (None: not known)."""
    cached, dim = 0, None
    for kind in KINDS:
        texts = [corpus.texts[row] for row in corpus.rows_of(kind)]
        folder = cache_folder(recipe, output) / kind
        if texts and (folder / "cache.json").exists():
            cache = TeacherCache(folder, teacher.identity(kind), recipe.teacher.dtype)
            cached += len(set(texts)) - len(cache.missing(texts))
            dim = cache.dim or dim
    if isinstance(teacher, VectorsTeacher):
        return cached, 0.0, next(iter(teacher.vectors.values()))[0].shape[1]
    if not isinstance(teacher, ModelTeacher):
        return cached, None, dim  # calling it may cost money
    texts = np.random.default_rng(recipe.seed).permutation(len(corpus.texts))[:SAMPLE].tolist()
    began = time.perf_counter()
    vectors = teacher.encode([corpus.texts[row] for row in texts], KINDS[0], lambda *_: None)
    per_text = (time.perf_counter() - began) / len(texts)
    return cached, per_text * (_distinct(corpus) - cached), vectors.shape[1]
