"""Training runs on a tiny model: they learn, keep their records, save what they say, and stop well."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
import yaml

from leafkern import Encoder
from leafkern.errors import DamagedFileError, InputError, NonFiniteLossError
from leafkern.evaluate import evaluate, prompt_for, self_answers
from leafkern.index import Index
from leafkern.textio import write_vectors
from leafkern.train import loop as loop_module
from leafkern.train import run
from leafkern.train.checkpoint import latest_checkpoint
from leafkern.train.head import least_squares
from leafkern.train.loop import learning_rate
from leafkern.train.recipe import Optimiser
from leafkern.train.validate import load_retrieval

WORDS = ["the", "leaf", "kernel", "search", "vector", "python", "how", "to", "is", "a", "of", "file", "list"]


@pytest.fixture
def recipe(tmp_path, tiny_bert):
    """Layers 0 and 2 of the tiny teacher, on 96 documents and 24 queries."""
    rng = np.random.default_rng(11)
    for name, count, longest in (("documents", 96, 20), ("queries", 24, 5)):
        lines = [" ".join(rng.choice(WORDS, rng.integers(2, longest))) + f" {row}" for row in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return {
        "teacher": {"model": str(tiny_bert), "prompts": {"queries": "how "}, "cache": str(tmp_path / "cache")},
        "student": {"layers": [0, 2]},
        "data": {
            "documents": str(tmp_path / "documents.txt"),
            "queries": str(tmp_path / "queries.txt"),
            "validation": 0.1,
        },
        "optimiser": {"lr": 3e-3, "final_lr": 3e-4},
        "schedule": {"cycles": 2, "steps": 20},
        "batch_size": 8,
        "log_every": 1,
        "threads": 1,
        "device": "cpu",
    }


def losses(history):
    return [record["loss"] for record in history if record["event"] == "step"]


def evaluations(history):
    return [record for record in history if record["event"] == "evaluate"]


def test_learns_and_leaves_everything_in_its_folder(recipe, tmp_path):
    seen = []
    result = run(recipe, output=tmp_path / "out", progress=lambda *call: seen.append(call))
    found = losses(result.history)
    assert len(found) == 40
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
    first, last = evaluations(result.history)
    assert last["validation_cosine"] > first["validation_cosine"] + 0.1
    assert last["validation_loss"] == pytest.approx(2 - 2 * last["validation_cosine"], abs=1e-3)
    assert [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()] == result.history
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["optimiser"]["lr"] == 3e-3
    assert {call[0] for call in seen} >= {"teacher", "tokenise", "train", "evaluate"}
    assert [call[1] for call in seen if call[0] == "train"] == list(range(41))
    student = Encoder.from_pretrained(result.model, device="cpu")
    assert student.module.normalize
    assert not any(student.prompts.values())
    assert student.encode(["the leaf"]).shape == (1, 32)


def test_a_student_searches_its_teachers_index_but_adds_nothing_to_it(recipe, tmp_path):
    # That the teacher was cut shorter in training does not make it another.
    result = run(recipe, output=tmp_path / "out", overrides=["schedule.steps=1", "teacher.max_length=16"])
    teacher = Encoder.from_pretrained(recipe["teacher"]["model"], device="cpu")
    student = Encoder.from_pretrained(result.model, device="cpu")
    assert student.aligned_with == teacher.fingerprint != student.fingerprint
    texts = ["the leaf", "a vector", "search a file"]
    Index.build(tmp_path / "index", teacher.encode(texts), encoder=teacher)
    index = Index.open(tmp_path / "index", encoder=student)
    assert index.search(student.encode(texts), 2, encoder=student)[1].shape == (3, 2)
    with pytest.raises(InputError, match="encoder"):
        index.add(student.encode(texts), encoder=student)
    stranger = Encoder.from_layers(teacher, [0, 1])
    with pytest.raises(InputError, match="encoder"):
        Index.open(tmp_path / "index", encoder=stranger)


def test_learning_rate_restarts_with_every_cycle():
    rates = [learning_rate(step, 5, Optimiser(lr=1.0, final_lr=0.2)) for step in range(10)]
    np.testing.assert_allclose(rates, [1.0, 0.8, 0.6, 0.4, 0.2] * 2)
    warm = [learning_rate(step, 5, Optimiser(lr=1.0, final_lr=1.0), warmup=4) for step in range(6)]
    np.testing.assert_allclose(warm, [0.25, 0.5, 0.75, 1, 1, 1])
    assert learning_rate(3, 1, Optimiser(lr=1.0, final_lr=0.5)) == 1.0


@pytest.mark.parametrize(("width", "unit"), [(48, True), (20, False)])
def test_student_of_another_width_opens_in_sentence_transformers(recipe, tmp_path, width, unit):
    from sentence_transformers import SentenceTransformer

    rng = np.random.default_rng(5)
    values = {}
    for kind in ("documents", "queries"):
        lines = (tmp_path / f"{kind}.txt").read_text().splitlines()
        matrix = rng.standard_normal((len(lines), width)).astype(np.float32)
        values[kind] = str(tmp_path / f"{kind}.npy")
        write_vectors(values[kind], matrix / np.linalg.norm(matrix, axis=1, keepdims=True) if unit else matrix)
    recipe |= {"teacher": {"vectors": values}, "student": {"model": recipe["teacher"]["model"], "prompts": {}}}
    recipe["student"]["prompts"] = {"queries": "how to "}
    result = run(recipe, output=tmp_path / "out", overrides=["schedule.steps=3"])
    reopened = Encoder.from_pretrained(result.model, device="cpu")
    theirs = SentenceTransformer(str(result.model), device="cpu")
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Dense"] + ["Normalize"] * unit
    assert theirs[2].linear.bias is None
    texts = ["the leaf of a kernel", "", "search " * 100, "list"]
    ours = reopened.encode(texts, normalize=False)
    assert ours.shape == (4, width)
    np.testing.assert_allclose(ours, theirs.encode(texts), atol=2e-5)
    np.testing.assert_allclose(
        reopened.encode(texts, prompt="query", normalize=False), theirs.encode(texts, prompt_name="query"), atol=2e-5
    )
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1) == pytest.approx(1, abs=1e-5), unit)


def test_least_squares_recovers_a_linear_map():
    generator = torch.Generator().manual_seed(np.random.default_rng().integers(2**31).item())
    states = torch.randn(500, 24, generator=generator) * torch.logspace(-1, 1, 24)
    weight = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    targets = (states.double() @ weight.T).float()
    found = least_squares(states, targets, ridge=1e-12)
    assert ((found - weight).norm() / weight.norm()) < 1e-5
    heavy = least_squares(states, targets, ridge=1e3)
    assert heavy.norm() < 0.1 * weight.norm()
    with pytest.raises(InputError, match="head"):
        least_squares(states, targets[1:], ridge=1e-3)


def test_head_init_lstsq_starts_at_the_answer(recipe, tmp_path, tiny_bert):
    """Targets that are a linear map of the student's own pooled states are met before the first step."""
    student = Encoder.from_pretrained(tiny_bert, device="cpu")
    mapping = np.random.default_rng(3).standard_normal((32, 12)).astype(np.float32)
    values = {}
    for kind in ("documents", "queries"):
        lines = (tmp_path / f"{kind}.txt").read_text().splitlines()
        with torch.no_grad():
            pooled = student.module.pooled(student.collate(student.tokenize(lines))).numpy()
        values[kind] = str(tmp_path / f"{kind}.npy")
        write_vectors(values[kind], pooled @ mapping)
    recipe |= {"teacher": {"vectors": values, "dtype": "float32"}, "student": {"model": str(tiny_bert)}}
    recipe["student"] |= {"head_init": "lstsq", "ridge": 1e-10}
    result = run(recipe, output=tmp_path / "out", overrides=["schedule.steps=1", "optimiser.lr=1e-9"])
    assert evaluations(result.history)[0]["validation_cosine"] > 0.9999
    random = run(recipe, output=tmp_path / "random", overrides=["schedule.steps=1", "student.head_init=random"])
    assert evaluations(random.history)[0]["validation_cosine"] < 0.9


def test_student_without_head_must_fit_its_teacher(recipe, tmp_path):
    recipe["student"] |= {"head": "none"}
    result = run(recipe, output=tmp_path / "out", overrides=["schedule.steps=1"])
    assert not (result.model / "2_Dense").exists()
    path = tmp_path / "wide.npy"
    np.save(path, np.random.default_rng(0).standard_normal((96, 40)))
    recipe["teacher"] = {"vectors": {"documents": str(path)}}
    recipe["student"]["model"] = str(result.model)
    recipe["data"].pop("queries")
    with pytest.raises(InputError, match=r"32 wide and its teacher 40; set head: dense"):
        run(recipe, output=tmp_path / "other", overrides=["student.layers=null"])


def test_retrieval_is_measured_while_training(recipe, tmp_path):
    documents = (tmp_path / "documents.txt").read_text().splitlines()[:20]
    pairs = [{"query": " ".join(text.split()[:-1]), "document": text} for text in documents]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe["evaluate"] = {"every": 5, "retrieval": str(tmp_path / "known.jsonl")}
    result = run(recipe, output=tmp_path / "out", overrides=["schedule.steps=5"])
    found = evaluations(result.history)
    assert [record["step"] for record in found] == [0, 5, 10]
    assert all(0 < record["ndcg@10"] <= 1 for record in found)
    recipe["evaluate"]["retrieval"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"evaluate.retrieval: no file or folder"):
        run(recipe, output=tmp_path / "other")


def test_ndcg_while_training_is_that_of_evaluate(recipe, tmp_path):
    """Queries that are documents themselves, as in some tasks of BEIR: none may count itself."""
    documents = (tmp_path / "documents.txt").read_text().splitlines()[:40]
    task = tmp_path / "task"
    task.mkdir()
    rows = [json.dumps({"_id": f"d{number}", "text": text}) + "\n" for number, text in enumerate(documents)]
    (task / "corpus.jsonl").write_text("".join(rows))
    (task / "queries.jsonl").write_text("".join(rows[:15]))
    (task / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"d{n}\td{n + 15}\t1\n" for n in range(15))
    )
    recipe["student"]["prompts"] = {"queries": "how "}
    recipe["evaluate"] = {"retrieval": str(task)}
    result = run(recipe, output=tmp_path / "out", overrides=["schedule.steps=2"])
    measured = evaluate(result.model, data=task, dims=[32], precisions=["float32"])["rows"][0]["ndcg"]
    assert 0 < measured < 1
    assert evaluations(result.history)[-1]["ndcg@10"] == pytest.approx(measured, abs=1e-9)


def test_known_items_whose_numbers_meet_are_no_documents_of_their_own(tmp_path):
    pairs = [("x", "a b"), ("y", "a b"), ("leaf", "c d"), ("e", "the leaf")]
    rows = "".join(json.dumps({"query": query, "document": document}) + "\n" for query, document in pairs)
    (tmp_path / "known.jsonl").write_text(rows)
    assert self_answers(load_retrieval(str(tmp_path / "known.jsonl"))) == [None] * 4


def test_stop_signal_saves_and_resume_goes_on(recipe, tmp_path):
    whole = run(recipe, output=tmp_path / "whole", overrides=["schedule.steps=8"])

    for number in (signal.SIGINT, signal.SIGTERM):
        output = tmp_path / number.name

        def interrupt(stage, done, total, facts, number=number):
            if stage == "train" and done == 6:
                os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt, match=r"stopped after step 6 of 16; .*--resume"):
            run(recipe, output=output, overrides=["schedule.steps=8"], progress=interrupt)
        assert signal.getsignal(number) is before
        assert latest_checkpoint(output / "checkpoints").name == "step-000000006"
        again = run(recipe, output=output, overrides=["schedule.steps=8"], resume=True)
        assert losses(again.history) == losses(whole.history)
        weights = [(folder / "model.safetensors").read_bytes() for folder in (again.model, whole.model)]
        assert weights[0] == weights[1]


def test_non_finite_loss_names_step_texts_and_checkpoint(recipe, tmp_path, monkeypatch):
    forward = loop_module.Loop._forward
    calls, hit = [], []

    def spoiled(self, batch):
        out = forward(self, batch)
        calls.append(batch)
        if len(calls) >= 7:
            hit.append(self.prepared.corpus.where(self.prepared.stream[self.step][3]))
            out = out * torch.where(torch.arange(len(out)) == 3, torch.nan, 1.0)[:, None]
        return out

    monkeypatch.setattr(loop_module.Loop, "_forward", spoiled)
    with pytest.raises(NonFiniteLossError) as caught:
        run(recipe, output=tmp_path / "out", overrides=["checkpoint.steps=4"])
    error = caught.value
    assert error.step == 7
    assert error.texts == hit[:1]
    assert error.checkpoint == tmp_path / "out/checkpoints/step-000000004"
    for part in ("step 7", "nan", hit[0], "step-000000004"):
        assert part in str(error)
    monkeypatch.undo()
    resumed = run(recipe, output=tmp_path / "out", overrides=["checkpoint.steps=4"], resume=True)
    assert len(losses(resumed.history)) == 40


def test_a_rate_that_explodes_is_stopped_before_the_weights_are_spoilt(recipe, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"optimiser.lr") as caught:
        run(recipe, output=tmp_path / "out", overrides=["optimiser.lr=1e30", "checkpoint.steps=1"])
    assert caught.value.step in (1, 2, 3)
    if caught.value.checkpoint is None:
        assert latest_checkpoint(tmp_path / "out/checkpoints") is None
        return
    saved = Encoder.from_pretrained(caught.value.checkpoint / "model", device="cpu")
    assert all(torch.isfinite(parameter).all() for parameter in saved.module.parameters())


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "fsync-folder"])
def test_disk_full_leaves_the_previous_checkpoint(recipe, tmp_path, monkeypatch, step):
    recipe["schedule"]["steps"] = 6
    whole = run(recipe, output=tmp_path / "whole")

    def full(name, path):
        if name == step and (tmp_path / "out/checkpoints/step-000000004").exists() and "step" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("leafkern.files.on_step", full)
    with pytest.raises(OSError, match="No space"):
        run(recipe, output=tmp_path / "out", overrides=["checkpoint.steps=4"])
    monkeypatch.undo()
    latest = latest_checkpoint(tmp_path / "out/checkpoints")
    assert latest is None or latest.name == "step-000000004"
    resumed = run(recipe, output=tmp_path / "out", overrides=["checkpoint.steps=4"], resume=True)
    assert losses(resumed.history) == losses(whole.history)


def test_checkpoints_are_kept_by_number(recipe, tmp_path):
    run(recipe, output=tmp_path / "out", overrides=["checkpoint.steps=7", "checkpoint.keep=3"])
    names = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert names == ["latest", "step-000000028", "step-000000035", "step-000000040"]


@pytest.fixture
def finished(recipe, tmp_path):
    run(recipe, output=tmp_path / "out", overrides=["schedule.steps=2"])
    recipe["schedule"]["steps"] = 2
    return tmp_path / "out"


def test_a_second_run_in_the_same_folder_is_refused(recipe, finished):
    with pytest.raises(InputError, match="a run stands there already"):
        run(recipe, output=finished)
    assert len(losses(run(recipe, output=finished, resume=True).history)) == 4
    saved = finished / "recipe.yaml"
    assert run(saved, resume=True).path == finished


def test_resuming_another_recipe_or_other_data_is_refused(recipe, finished, tmp_path):
    with pytest.raises(InputError, match=r"optimiser.lr: 0.003 -> 0.1; loss: 'l2sq' -> 'mse'"):
        run(recipe, output=finished, resume=True, overrides=["optimiser.lr=0.1", "loss=mse"])
    with (tmp_path / "queries.txt").open("a") as file:
        file.write("one more\n")
    with pytest.raises(InputError, match="the texts of data's files"):
        run(recipe, output=finished, resume=True)


def test_damaged_checkpoints_are_named(recipe, finished):
    checkpoint = latest_checkpoint(finished / "checkpoints")
    path = checkpoint / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"training.safetensors: altered or truncated"):
        run(recipe, output=finished, resume=True)
    (checkpoint / "state.json").unlink()
    with pytest.raises(DamagedFileError, match=r"no state.json"):
        run(recipe, output=finished, resume=True)
    (finished / "checkpoints/latest").write_text("../../elsewhere\n")
    with pytest.raises(DamagedFileError, match="outside"):
        run(recipe, output=finished, resume=True)
    (finished / "checkpoints/latest").write_text("step-7\n")
    with pytest.raises(DamagedFileError, match="'step-7', which is not there"):
        run(recipe, output=finished, resume=True)


def test_cache_of_another_teacher_is_refused(recipe, finished, tmp_path):
    with pytest.raises(InputError, match="stale: its prompt is 'how '"):
        run(recipe, output=tmp_path / "second", overrides=["teacher.prompts.queries='to '"])
    # The same cache serves another student of the same teacher.
    run(recipe, output=tmp_path / "second", overrides=["student.layers=[1]"])


def test_dry_run_writes_nothing(recipe, tmp_path, capsys):
    recipe["schedule"] = {"cycles": 2, "minutes": 0.2}
    run(recipe, output=tmp_path / "out", dry_run=True)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["texts"] == {"documents": 96, "queries": 24, "training": 108, "validation": 12}
    assert printed["teacher"]["texts_to_encode"] == 120
    assert printed["training"]["steps"] == 2 * printed["training"]["steps_per_cycle"] > 0
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_minutes_become_steps_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module.Loop, "seconds_per_step", lambda self: 0.5)
    recipe["schedule"] = {"cycles": 1, "minutes": 0.1}

    def interrupt(stage, done, total, facts):
        if stage == "train" and done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="step 5 of 12"):
        run(recipe, output=tmp_path / "out", progress=interrupt)
    monkeypatch.setattr(loop_module.Loop, "seconds_per_step", lambda self: 0.001)
    assert len(losses(run(recipe, output=tmp_path / "out", resume=True).history)) == 12


def test_bfloat16_and_other_losses_run(recipe, tmp_path):
    for number, override in enumerate(["precision=bfloat16", "loss=cosine", "loss=l2", "optimiser.clip_norm=0.5"]):
        result = run(recipe, output=tmp_path / str(number), overrides=[override, "schedule.steps=8"])
        found = losses(result.history)
        assert np.isfinite(found).all()
        assert np.mean(found[-4:]) < np.mean(found[:4])


@pytest.mark.parametrize("package", ["yaml", "pydantic"])
def test_a_package_that_is_missing_is_named_with_its_extra(recipe, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'leafkern\[train\]'"):
        run(recipe)


def test_silent_when_piped(recipe, tmp_path, capsys):
    run(recipe, output=tmp_path / "out", overrides=["schedule.steps=1"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("default", [None, "query", "task"])
def test_the_saved_prompts_are_those_trained_with(recipe, tmp_path, tiny_bert, default):
    own = {"query": "how to ", "document": "list ", "task": "search "}
    model = Encoder.from_pretrained(tiny_bert, device="cpu", prompts=own)
    model.default_prompt = default
    model.save_pretrained(tmp_path / "prompted")
    recipe["student"] = {"model": str(tmp_path / "prompted"), "prompts": {"queries": "", "documents": ""}}
    student = Encoder.from_pretrained(run(recipe, output=tmp_path / "out", overrides=["schedule.steps=1"]).model)
    assert [student.prompt_text(prompt_for(student, kind)) for kind in ("query", "document")] == ["", ""]
    assert student.prompt_text() == ""
    recipe["student"]["prompts"] = {"queries": ""}
    student = Encoder.from_pretrained(run(recipe, output=tmp_path / "two", overrides=["schedule.steps=1"]).model)
    assert [student.prompt_text(prompt_for(student, kind)) for kind in ("query", "document")] == ["", "list "]
