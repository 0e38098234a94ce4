"""The command line: thin, and quick to start, for every command imports what it needs when it runs."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leafkern.console import Report, guarded, progress_bar, say
from leafkern.errors import InputError

if TYPE_CHECKING:
    from leafkern.encode import Encoder
    from leafkern.index import Index
    from leafkern.index.exchange import Source

app = typer.Typer(
    name="leafkern",
    help="Distil, encode, index and search with small embedding models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
index_app = typer.Typer(help="Make, extend, look at and export an index.", no_args_is_help=False)
app.add_typer(index_app, name="index")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a model's folder or hub id")]
IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="the index's folder")]
Input = Annotated[str, typer.Argument(metavar="INPUT", help="a file of texts or vectors; '-' is standard input")]
Rescore = Annotated[
    str, typer.Option(help="in an index: finer codes for the best candidates: float32, float16, int8, int4 or none")
]
KeepTexts = Annotated[bool, typer.Option(help="in an index: keep the texts, for search to show")]
Field = Annotated[str, typer.Option(help="field or column of the text in .jsonl and .parquet")]
IdsField = Annotated[str | None, typer.Option(help="field or column of the ids; without it rows are numbered")]
ModelOption = Annotated[str | None, typer.Option(help="the model that encodes INPUT when it holds texts")]
DocumentPrompt = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="the model's prompt put before every text; default: its prompt for documents"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the first GPU, else the CPU")]


def main() -> None:
    """The entry point: runs the command and exits with 0 (fine), 1 (failed), 2 (wrong use) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] or ["--help"]
    literal = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:literal]
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i > literal]

    # A polite kill unwinds as Ctrl-C does, so that no half-written file stays behind; training sets its own handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def run() -> int | None:
        try:
            return app(arguments, prog_name="leafkern", standalone_mode=False)
        except typer.Abort:
            raise KeyboardInterrupt from None

    sys.exit(guarded(run, debug))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    if version:
        from leafkern import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a .yaml recipe")],
    set: Annotated[list[str] | None, typer.Option(metavar="a.b=c", help="replaces one entry; may be repeated")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="folder of all that is written")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
) -> None:
    """Distil a student as a recipe says, and print where its model is.

    Example: `leafkern train recipe.yaml --set optimiser.lr=2e-4 --output runs/first`
    """
    from leafkern.train import run

    result = run(recipe, resume=resume, output=output, overrides=tuple(set or ()), dry_run=dry_run)
    if not dry_run:
        print(result.model)


@app.command()
def encode(
    model: Model,
    input: Input,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help=".npy, .safetensors, .parquet, or an index's folder")
    ],
    field: Field = "text",
    ids_field: IdsField = None,
    dim: Annotated[int | None, typer.Option(help="keep the first DIM numbers of each vector (MRL), normalised")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, float16, int8, int4, binary or ubinary; default: float32, of an index int8"),
    ] = None,
    rescore: Rescore = "float16",
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="the model's prompt put before every text; default: for an index its prompt for documents, for a file "
            "the one it names as its default, often none",
        ),
    ] = None,
    texts: KeepTexts = True,
    device: Device = None,
) -> None:
    """Turn texts (.txt, .jsonl, both also .gz; .parquet; '-') into vectors, row for row.

    Big files are read in blocks. int8 and int4 take their ranges from the first 16,384 texts; in files they go to
    .safetensors, with their scale and offset.

    OUT without a suffix, or with a / behind it, is an index. It grows by 16,384 texts at a time; when the command was
    stopped, the same command goes on where it was.

    Example: `leafkern encode my-model docs.jsonl -o docs.npy --field body`

    Example: `leafkern encode my-model docs.jsonl -o my-index/ --ids-field id`
    """
    from leafkern.bulk import encode_file, encode_index
    from leafkern.textio import VECTOR_FORMATS, suffix

    index = output.endswith("/") or Path(output).is_dir() or not Path(output).suffix
    if not index:
        kind = suffix(output)
        if kind not in VECTOR_FORMATS:
            raise InputError(
                f"OUT: unknown vector format {kind!r}; expected one of {', '.join(VECTOR_FORMATS)}, or '{output}/' for "
                "an index"
            )
        for option, given in {
            "--ids-field": ids_field is not None,
            "--rescore": rescore != "float16",
            "--no-texts": not texts,
        }.items():
            if given:
                raise InputError(f"{option}: {output} is no index; leave it out")
    options = {"field": field, "dim": dim, "prompt": prompt}
    if index:
        options |= {
            "precision": precision or "int8",
            "rescore": _level(rescore),
            "ids_field": ids_field,
            "texts": texts,
        }
        with progress_bar() as report:
            built = encode_index(lambda: open_model(model, device), input, output, **options, progress=report)
        say(_described(built))
        print(output)
    else:
        options |= {"precision": precision or "float32"}
        with progress_bar() as report:
            rows, width = encode_file(
                lambda: open_model(model, device), input, Path(output), **options, progress=report
            )
        say(f"{rows:,} vectors of width {width}, {options['precision']}: {output}")


def _level(rescore: str) -> str | None:
    return None if rescore == "none" else rescore


def _described(index: "Index") -> str:
    return f"{len(index):,} vectors of width {index.width}, {index.precision}, rescored {index.rescore}"


@index_app.command("build")
def index_build(
    index: IndexPath,
    input: Input,
    model: ModelOption = None,
    precision: Annotated[
        str, typer.Option(help="of the codes scanned: float32, float16, int8, int4, binary, ubinary")
    ] = "int8",
    rescore: Rescore = "float16",
    field: Field = "text",
    ids_field: IdsField = None,
    prompt: DocumentPrompt = None,
    texts: KeepTexts = True,
    ranges: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy",
            help="(2, D): least and greatest values of the int8 or int4 codes, as `leafkern.ops.calibrate` gives them",
        ),
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="turn all vectors by one random rotation")] = False,
    device: Device = None,
) -> None:
    """Make an index of vectors (.npy, .safetensors, .parquet, FAISS's flat .faiss) or, with --model, of texts.

    It appears, whole, when all is done, in place of one that stood there. Ids come from --ids-field (.jsonl, .parquet),
    from the .faiss file, or from docs.npy.ids.npy or docs.npy.ids.json beside docs.npy, as `index export` writes them.

    Example: `leafkern index build my-index docs.jsonl --model my-model --field body --ids-field id`

    Example: `leafkern index build my-index vectors.parquet --ids-field id --precision ubinary --rescore int8`
    """
    from leafkern.index import Index
    from leafkern.index.manifest import checked_rescore

    finer = checked_rescore(precision, _level(rescore))
    limits = None if ranges is None else _ranges(ranges)
    binary = precision in ("binary", "ubinary") and finer is None
    folder = next(each for each in (index, *index.absolute().parents) if each.is_dir())
    reading = {"texts": texts, "binary": binary, "folder": folder}
    options = {"precision": precision, "rescore": finer, "ranges": limits, "rotate": rotate}
    with progress_bar() as report:
        given = _documents(input, model, field, ids_field, prompt, device, report, **reading)
        built = Index.build(index, **given._asdict(), **options, progress=report)
    say(_described(built))
    print(index)


def _ranges(path: Path) -> object:
    """(2, D) of floats from a .npy file."""
    from leafkern.textio import read_vectors, suffix

    if suffix(path) != ".npy":
        raise InputError(f"--ranges: {path} is no .npy file; save a float array (2, D), least and greatest values")
    return read_vectors(path).vectors


@index_app.command("add")
def index_add(
    index: IndexPath,
    input: Input,
    model: ModelOption = None,
    field: Field = "text",
    ids_field: IdsField = None,
    prompt: DocumentPrompt = None,
    device: Device = None,
) -> None:
    """Append vectors or, with --model, texts; another model or prompt than the index's is refused.

    Example: `leafkern index add my-index more.jsonl --model my-model --field body --ids-field id`
    """
    from leafkern.index import Index

    opened = Index.open(index)
    reading = {
        "texts": opened.has_texts,
        "binary": opened.precision in ("binary", "ubinary") and opened.rescore is None,
        "folder": index,
        "check": opened.require,
    }
    with progress_bar() as report:
        given = _documents(input, model, field, ids_field, prompt, device, report, **reading)._asdict()
        del given["width"]  # is the index's
        clipped = opened.add(**given, progress=report)
    say(f"{len(opened):,} vectors now; {clipped} new values were clipped")


@index_app.command("remove")
def index_remove(
    index: IndexPath,
    ids: Annotated[
        list[str],
        typer.Argument(metavar="ID...", help="ids in the index, negative ones behind '--'; '-' reads one per line"),
    ],
) -> None:
    """Remove vectors by their ids, all or, if one is not in the index, none. `index compact` frees their space.

    Example: `leafkern index remove my-index doc17 doc42`

    Example: `leafkern index remove my-index -- -5 -7`

    Example: `leafkern index remove my-index - < obsolete-ids.txt`
    """
    from leafkern.index import Index
    from leafkern.textio import read_texts

    opened = Index.open(index)
    named = []
    for given in ids:
        named += [line for line in read_texts("-").texts if line.strip()] if given == "-" else [given]
    if opened.info()["ids"] == "int64":
        named = [_integer(each) for each in named]
    removed = opened.remove(named)
    say(f"{removed:,} vectors removed, {len(opened):,} left")


def _integer(identity: str) -> int:
    import re

    if not re.fullmatch("-?[0-9]{1,20}", identity):
        raise InputError(f"ID: {identity!r:.80} is no whole number, as the ids of this index are")
    return int(identity)


@index_app.command("compact")
def index_compact(
    index: IndexPath,
    smaller_than: Annotated[
        int | None, typer.Option(metavar="ROWS", help="join only segments of fewer vectors; default: all")
    ] = None,
) -> None:
    """Write an index's segments together, without what was removed: less space, faster search.

    Example: `leafkern index compact my-index --smaller-than 100000`
    """
    from leafkern.index import Index

    opened = Index.open(index)
    before = opened.info()
    with progress_bar() as report:
        opened.compact(smaller_than=smaller_than, progress=report)
    after = opened.info()
    say(f"{before['segments']} segments became {after['segments']}, {before['bytes']:,} bytes {after['bytes']:,}")


@index_app.command("export")
def index_export(
    index: IndexPath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help=".npy, .safetensors, .parquet or .faiss")],
    precision: Annotated[str, typer.Option(help="float32, float16, or ubinary (bits)")] = "float32",
) -> None:
    """Write the vectors of an index to a file, decoded from its finest codes, in order of insertion.

    .parquet gets columns id, vector and text. .faiss is an IndexFlatIP, with ubinary an IndexBinaryFlat, in an
    IndexIDMap where the ids are not 0, 1, 2, ... Other ids go beside OUT: docs.npy.ids.npy or docs.npy.ids.json.
    `index build` reads all of these again, but for bits in .npy and .safetensors.

    Example: `leafkern index export my-index docs.parquet`
    """
    from leafkern.index import Index, exchange

    with progress_bar() as report:
        rows = exchange.export(Index.open(index), output, precision=precision, progress=report)
    say(f"{rows:,} vectors, {precision}")
    print(output)


@index_app.command("info")
def index_info(index: IndexPath, json_: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Print what an index, or a folder of shards, holds.

    Example: `leafkern index info my-index`
    """
    import json

    from leafkern.index.shards import open_index

    facts = open_index(index).info()
    if json_:
        print(json.dumps(facts))
    else:
        facts |= {f"source {name}": value for name, value in (facts.pop("source", None) or {}).items()}
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {'' if value is None else value}")


@index_app.command("verify")
def index_verify(index: IndexPath) -> None:
    """Read an index, or a folder of shards, in full and compare it with its checksums; exit 1 names the damaged file.

    Example: `leafkern index verify my-index`
    """
    from leafkern.index.shards import open_index

    for attempts_left in (2, 1, 0):
        opened = open_index(index)
        try:
            with progress_bar() as report:
                opened.verify(progress=report)
            break
        except InputError:  # a writer has just removed what was opened
            if not attempts_left:
                raise
    print(f"{index}: {len(opened):,} vectors, as written")


@app.command()
def search(
    index: IndexPath,
    model: Model,
    query: Annotated[list[str], typer.Argument(metavar="QUERY...", help="the questions; '-' reads one per line")],
    k: Annotated[int, typer.Option("--k", "-k", help="results per query")] = 10,
    oversample: Annotated[int, typer.Option(help="candidates that are rescored, as a multiple of k")] = 4,
    dim: Annotated[
        int | None, typer.Option(help="scan only the first DIM numbers of each vector (MRL), then rescore by all")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='the model\'s prompt put before every query; default: its "query" prompt'),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="search also where MODEL does not say that it fits this index")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object per query")] = False,
    device: Device = None,
) -> None:
    """Print rank, score, id and (where the index keeps them) text of the best documents.

    INDEX may be a folder of shards.

    Example: `leafkern search my-index my-model "how do I read a file line by line" -k 3`
    """
    import json

    from leafkern.evaluate import prompt_for
    from leafkern.index.shards import open_index
    from leafkern.textio import read_texts

    opened = open_index(index)
    queries = [text for given in query for text in (read_texts("-").texts if given == "-" else [given])]
    encoder = open_model(model, device)
    if encoder.dim < opened.width:
        opened.require(width=encoder.dim)
    if not asymmetric and opened.encoder not in (None, encoder.fingerprint, encoder.aligned_with):
        raise InputError(
            f"MODEL: {model} (fingerprint {encoder.fingerprint}) is neither the encoder that made the index "
            f"({opened.encoder}) nor a student of it; use one of these, or --asymmetric if you know that it fits"
        )
    vectors = encoder.encode(queries, prompt=prompt or prompt_for(encoder, "query"), dim=opened.width)
    scores, rows = opened.search_rows(vectors, k, oversample=oversample, dim=dim)
    ids = opened.ids_at(rows).tolist()
    texts = opened.texts_at(rows).tolist() if opened.has_texts else None
    for number, text in enumerate(queries):
        results = [
            {"rank": rank + 1, "score": float(scores[number, rank]), "id": ids[number][rank]}
            | ({} if texts is None else {"text": texts[number][rank]})
            for rank in range(rows.shape[1])
        ]
        if json_:
            print(json.dumps({"query": text, "results": results}, ensure_ascii=False))
        else:
            _print_results(text if len(queries) > 1 else None, results)


def _print_results(query: str | None, results: list[dict]) -> None:
    import shutil

    if query is not None:
        print(f"\n{query}")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    for result in results:
        line = f"{result['rank']:>3}  {result['score']:.4f}  {result['id']}"
        if "text" in result:
            line += "  " + " ".join(result["text"].split())
        print(line if len(line) <= columns else line[: columns - 1] + "…")


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(metavar="BEIR_DIR|STS.tsv", help="the task")],
    teacher: Annotated[str | None, typer.Option(help="the teacher, to compare with")] = None,
    dims: Annotated[str | None, typer.Option(metavar="384,192", help="widths; default: full, half, quarter")] = None,
    precisions: Annotated[str | None, typer.Option(metavar="float32,binary+int8", help="A+B: A rescored by B")] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write one self-contained page")] = None,
    device: Device = None,
) -> None:
    """Measure quality, size and speed of a model, its teacher and both together, by width and precision.

    BEIR_DIR holds corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv; an STS file has a header, then score,
    sentence1, sentence2; each also .gz.

    Example: `leafkern eval my-model --teacher my-teacher --data scifact --html report.html`
    """
    from leafkern.evaluate import DEFAULT_PRECISIONS, load, split_precision
    from leafkern.evaluate import evaluate as measure
    from leafkern.files import atomic_file, write_json
    from leafkern.report.evaluation import page

    names = precisions.split(",") if precisions else DEFAULT_PRECISIONS
    for name in names:
        split_precision(name)
    widths = _widths(dims)
    for file in (json_, html):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"{file}: the folder {file.parent} does not exist")
    task = load(data)
    student = open_model(model, device)
    known = open_model(teacher, device) if teacher else None
    with progress_bar() as report:
        result = measure(student, known, data=task, dims=widths, precisions=names, progress=report)
    _print_evaluation(result)
    if json_ is not None:
        write_json(json_, result)
    if html is not None:
        with atomic_file(html) as temporary:
            temporary.write_text(page(result), encoding="utf-8")


def _widths(dims: str | None) -> list[int] | None:
    try:
        return None if dims is None else [int(part) for part in dims.split(",")]
    except ValueError:
        raise InputError(f"--dims: {dims!r}; expected whole numbers with commas between, such as 384,192") from None


def _print_evaluation(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    from leafkern.report import format_value
    from leafkern.report.evaluation import cells

    columns, rows, formats, _ = cells(result)
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("system", "precision") else "right")
    for row in rows:
        table.add_row(*(format_value(value, formats.get(name, "")) for name, value in zip(columns, row)))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for note in result["notes"]:
        say(note)


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="which operations; default: all")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="other libraries in the same run")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="write one self-contained page")] = None,
    size: Annotated[str, typer.Option(help="tiny, small or full (the published figures)")] = "full",
) -> int:
    """Measure the operations on this machine against its limits; results are checked before they are timed.

    Example: `leafkern bench search --peers --report search.html`
    """
    from leafkern.bench import main as run

    # Pytest would take the SystemExit of our handler for one failed case, and go on.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return run(ops or [], peers=peers, report=report, size=size)


@app.command()
def doctor() -> None:
    """Print versions, what serves each operation here and why, and what would be faster.

    Example: `leafkern doctor`
    """
    from leafkern import doctor as facts

    # Before anything is printed: a wrong LEAFKERN_BACKEND is an error.
    served = {device: facts.operations(device) for device in ("cpu", "cuda")}
    for title, rows in (("Versions", facts.versions()), ("Machine", facts.machine())):
        print(title)
        for name, value in rows:
            print(f"  {name:<22} {value}")
    for device, rows in served.items():
        absent = device == "cuda" and not facts.has_gpu()
        print(f"Operations on {device.upper()} tensors{' (no GPU that torch can use; with one:)' if absent else ''}")
        for operation, backend, why, faster in rows:
            print(f"  {operation:<22} {backend:<10} {why}")
            print(f"  {'':<22} {', '.join(facts.functions(operation))}")
            if faster:
                print(f"  {'':<22} faster: {faster}")
    if facts.absent():
        print("To install for more")
        for extra, purpose in facts.absent():
            print(f"  {extra:<22} {purpose}")


def open_model(model: str, device: str | None) -> "Encoder":
    from leafkern.encode import Encoder

    return Encoder.from_pretrained(model, device=device)


def _documents(
    input: str,
    model: str | None,
    field: str,
    ids_field: str | None,
    prompt: str | None,
    device: str | None,
    report: Report,
    **options,
) -> "Source":
    """What is to be indexed; see `leafkern.bulk.documents`."""
    from leafkern.bulk import documents
    from leafkern.files import existing

    if input != "-":
        existing(input)
    encoder = open_model(model, device) if model else None
    return documents(encoder, input, field, ids_field, prompt, progress=report, **options)
