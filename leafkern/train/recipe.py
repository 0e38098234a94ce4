"""What one training run does: a YAML file or dict, checked before anything is loaded.

Defaults are LEAF's (arXiv 2509.12539). Facts that its authors do not give are options here, with these defaults:
weight_decay 0.01 (unverified), warmup 0 (unverified), loss l2sq (reported both squared and not), Adam's betas and
eps (torch's). Paths are relative to the working directory.

A LEAF recipe (22.9 M parameters, 384 -> 1024)::

    teacher:
      model: mixedbread-ai/mxbai-embed-large-v1
      prompts: {queries: "Represent this sentence for searching relevant passages: "}
    student:
      model: sentence-transformers/all-MiniLM-L6-v2
      head: dense
      head_init: lstsq
      max_length: 512
    data:
      documents: [documents.jsonl]
      queries: [queries.txt]
    schedule: {cycles: 3, epochs: 10}
    evaluate: {every: 2000, retrieval: my-beir-folder}
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from leafkern.errors import InputError, unknown_name
from leafkern.files import atomic_file


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Files = Annotated[list[str], BeforeValidator(_as_list)]


class Prompts(Section):
    """Literal text put before every text of its kind. None: the model's own prompt for that kind, else nothing."""

    queries: str | None = None
    documents: str | None = None


class Vectors(Section):
    """Files of vectors: npy and safetensors (row i = text i of the data's files), parquet (columns text, vector)."""

    documents: Files = []
    queries: Files = []


class Teacher(Section):
    """Exactly one of `model`, `vectors`, `callable`."""

    model: str | None = None  # local folder or hub id
    vectors: Vectors | None = None
    callable: str | None = None  # package.module:function, list of N texts -> (N, D) array
    id: str | None = None  # revision of the callable; changing it makes old caches stale
    prompts: Prompts = Prompts()
    pooling: Literal["mean", "cls", "last"] | None = None  # only for a model that does not say
    max_length: int | None = Field(None, ge=3)  # tokens; None: the model's own
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    dtype: Literal["float16", "float32"] = "float16"  # of the cached vectors
    cache: str | None = None  # folder; None: teacher-cache in the output folder

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("model", "vectors", "callable") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, vectors, callable; got {' and '.join(given) or 'none'}")
        if self.callable is not None:
            if self.id is None or not self.id.strip():
                raise ValueError(
                    "a callable needs `id`: a string that changes whenever its vectors change, such as 'embed-api-v3'"
                )
            module, _, function = self.callable.partition(":")
            if not module or not function:
                raise ValueError(f"callable must read package.module:function; got {self.callable!r}")
        return self


class Student(Section):
    """`model`: any checkpoint; `layers`: those layers of `model`, or of the teacher where `model` is not given."""

    model: str | None = None
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    pooling: Literal["mean", "cls", "last"] | None = None
    head: Literal["dense", "none"] = "dense"  # dense: W_out, width -> teacher's width, no bias
    head_init: Literal["random", "lstsq"] = "random"
    # Of lstsq, relative to the pooled states' mean square; best or near it on held-out texts for 1,000 and 3,500 texts.
    ridge: float = Field(0.03, gt=0)
    head_rows: int = Field(8192, ge=1)  # texts that lstsq regresses on
    prompts: Prompts = Prompts()
    max_length: int | None = Field(None, ge=3)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _some_source(self):
        if self.model is None and self.layers is None:
            raise ValueError("give model (a checkpoint), or layers (numbers of the teacher's layers), or both")
        if self.head == "none" and self.head_init == "lstsq":
            raise ValueError("head_init: lstsq initialises a dense head; set head: dense")
        return self


class Data(Section):
    """Texts to learn from: .txt, .jsonl, .parquet, each also .gz. Limits take the first texts of the files."""

    documents: Files = []
    queries: Files = []
    field: str = "text"
    limit_documents: int | None = Field(None, ge=1)
    limit_queries: int | None = Field(None, ge=1)
    validation: float = Field(0.01, ge=0, lt=1)  # part of the texts held out, chosen by text hash
    validation_limit: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _some_texts(self):
        if not self.documents and not self.queries:
            raise ValueError("give documents, queries, or both (lists of files)")
        return self


class Optimiser(Section):
    """AdamW; no decay on biases and norms. The rate falls linearly from lr to final_lr in every cycle."""

    lr: float = Field(1e-4, gt=0)
    final_lr: float = Field(1e-5, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float | None = Field(None, gt=0)


class Schedule(Section):
    """Length of the run: `epochs` per cycle (default 10), or `steps` per cycle, or `minutes` for the whole run.

    `minutes` is turned into steps once, by timing a few of them before the first, and checkpoints keep the number: a
    resumed run follows the same schedule. Time for evaluation comes on top.
    """

    cycles: int = Field(3, ge=1)
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    warmup: int = Field(0, ge=0)  # steps, at the start of the run only

    @model_validator(mode="after")
    def _one_length(self):
        given = [name for name in ("epochs", "steps", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of epochs, steps, minutes; got {' and '.join(given)}")
        return self

    @property
    def epochs_per_cycle(self) -> float | None:
        """`epochs`, LEAF's 10 where no length is given, None where another one is."""
        return 10.0 if self.epochs is None and self.steps is None and self.minutes is None else self.epochs


class Evaluate(Section):
    """`retrieval`: a BEIR folder, or a .jsonl/.parquet of known items with the fields query and document."""

    every: int | None = Field(None, ge=1)  # steps; None: at the start and at the end only
    retrieval: str | None = None


class Checkpoint(Section):
    """Whichever comes first; one more at the end, on Ctrl-C and on SIGTERM."""

    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(600, gt=0)
    keep: int = Field(2, ge=1)


class Recipe(Section):
    """One LEAF stage. See the module's docstring for an example."""

    teacher: Teacher
    student: Student
    data: Data
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    batch_size: int = Field(32, ge=1)
    loss: Literal["l2sq", "l2", "mse", "cosine"] = "l2sq"
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)  # steps per line of history.jsonl
    threads: int | None = Field(None, ge=1)
    device: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast
    output: str | None = None

    @model_validator(mode="after")
    def _layers_need_a_model(self):
        if self.student.model is None and self.teacher.model is None:
            raise ValueError("student.layers without student.model are the teacher's layers; this teacher is no model")
        return self


# What a run may change when it is resumed: nothing here touches the trajectory at equal device and thread count.
RESUME_MAY_CHANGE = ("evaluate", "checkpoint", "log_every", "threads", "device", "output")


def _section_at(place: tuple) -> type[Section]:
    """The section that the keys `place` lead to."""
    section: type[Section] = Recipe
    for key in place:
        kind = section.model_fields[key].annotation
        section = next(option for option in (kind, *get_args(kind)) if isinstance(option, type))
    return section


def _as_input_error(error: ValidationError, source: str) -> InputError:
    """The first problem that pydantic found, in the project's words."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    *place, key = first["loc"] or ("",)
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = f"{source}: key {dotted}" if place else f"{source}: key"
        return unknown_name(owner, str(key), _section_at(tuple(place)).model_fields)
    if first["type"] == "missing":
        return InputError(f"{source}: {dotted} is missing")
    where = f"{source}: {dotted}" if dotted else source
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return InputError(f"{where}: {message}")
    return InputError(f"{where}: got {first['input']!r}; {message[:1].lower()}{message[1:]}")


def _apply(values: dict, override: str) -> None:
    place, equals, text = override.partition("=")
    keys = [key.strip() for key in place.split(".")]
    if not equals or not all(keys):
        raise InputError(f"--set {override!r}: expected a.b=value, such as --set optimiser.lr=3e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override!r}: the value is not YAML; quote it, such as --set a.b='\"text\"'") from None
    for depth, key in enumerate(keys[:-1], start=1):
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise InputError(f"--set {override!r}: {'.'.join(keys[:depth])} holds a value, not further keys")
    values[keys[-1]] = value


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"recipe: no file {str(path)!r}; expected a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None


def load_recipe(recipe: "Recipe | dict | str | Path", overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The recipe in a YAML file, dict or `Recipe`, with `overrides` ("a.b=value", values in YAML) applied.

    Raises InputError that names the key by its dotted place, what was wrong, and what would be right.
    """
    source = "recipe"
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(exclude_unset=True)
    elif isinstance(recipe, dict):
        values = recipe
    else:
        source = str(recipe)
        values = _read_yaml(Path(recipe))
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected a mapping with the keys teacher, student, data; got {values!r:.60}")
    values = _copied(values)
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _as_input_error(error, source) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe with every default spelt out."""
    with atomic_file(path) as temporary:
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys whose values differ and that a resumed run must keep, as "key: old -> new"."""
    differences: list[str] = []

    def compare(place: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a:
                compare(f"{place}.{key}" if place else key, a[key], b.get(key))
        elif a != b:
            differences.append(f"{place}: {a!r} -> {b!r}")

    skipped = set(RESUME_MAY_CHANGE)
    compare("", old.model_dump(mode="json", exclude=skipped), new.model_dump(mode="json", exclude=skipped))
    return [difference for difference in differences if not difference.startswith("teacher.cache:")]
