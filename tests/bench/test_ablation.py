"""The ablation on a tiny corpus: what it writes, that it goes on where it stopped, what it refuses."""

import gzip
import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")

WORDS = ["the", "leaf", "kernel", "search", "vector", "python", "how", "to", "is", "a", "of", "file", "list"]


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("bench.ablation")


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def data(tmp_path, monkeypatch):
    texts = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS, 4), 0, 17000, 50)]
    folder = tmp_path / "data"
    write(folder / "distill" / "train.txt.gz", texts[:40])
    write(folder / "distill" / "valid.txt.gz", texts[40:60])
    corpus = [{"_id": str(number), "title": "", "text": text} for number, text in enumerate(texts[60:180])]
    queries = [{"_id": f"q{number}", "text": text} for number, text in enumerate(texts[180:190])]
    write(folder / "scifact" / "corpus.jsonl.gz", map(json.dumps, corpus))
    write(folder / "scifact" / "queries.jsonl.gz", map(json.dumps, queries))
    judged = [f"q{number}\t{number}\t1" for number in range(10)]
    (folder / "scifact" / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    pairs = [f"{number % 6}\t{texts[190 + number]}\t{texts[200 + number]}" for number in range(120)]
    write(folder / "stsb" / "test.tsv.gz", ["score\tsentence1\tsentence2", *pairs])
    monkeypatch.setenv("LEAFKERN_DATA", str(folder))
    return folder


@pytest.mark.slow
def test_all_figures_are_written_and_finished_runs_are_kept(ablation, data, tiny_bert, tmp_path, capsys):
    asked = ["--teacher", str(tiny_bert), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    asked += "--seeds 2 --seconds 0.2 --pilot-seconds 0.1 --rates 1e-3 1e-2 --texts 40 --held-out 20 --batch 8".split()
    asked += "--layers 0 3 --dims 32 8 --train-length 16 --eval-length 16".split()
    assert ablation.main(asked) == 0, capsys.readouterr().err
    path = tmp_path / "out" / "ablation.json"
    document = json.loads(path.read_text())
    assert [(one["seed"], one["arm"]) for one in document["runs"]] == [
        (seed, arm.name) for seed in range(2) for arm in ablation.ARMS
    ]
    for one in document["runs"]:
        assert one["steps"] >= 1
        assert one["cpu_s"] >= 0.2
        assert one["held_out"].keys() == document["references"][1]["held_out"].keys()
    for one in document["runs"] + document["references"]:
        cells = [(row["task"], row["dim"], row["precision"]) for row in one["rows"]]
        assert cells == list(itertools.product(("SciFact", "STS-B"), (32, 8), ("float32", "int8")))
    assert len(document["pilot"]["rows"]) == 4
    assert document["pilot"]["rate"] in (1e-3, 1e-2)
    assert len(document["summary"]) == 5 * 8
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {arm.name} |" in report for arm in ablation.ARMS)
    assert "<svg" in (tmp_path / "work" / "picture.html").read_text()

    # As if it had been stopped before the last run's evaluation.
    last = document["runs"].pop()
    path.write_text(json.dumps(document))
    assert ablation.main(asked) == 0
    resumed = json.loads(path.read_text())["runs"]
    assert resumed[:-1] == document["runs"]
    assert resumed[-1] == last
    assert ablation.main([*asked, "--batch", "4"]) == 2
    assert "was made with other options" in capsys.readouterr().err


def test_it_asks_for_the_data(ablation, monkeypatch, capsys):
    monkeypatch.delenv("LEAFKERN_DATA", raising=False)
    assert ablation.main([]) == 2
    assert "LEAFKERN_DATA is not set" in capsys.readouterr().err


def test_both_kinds_of_heads_weigh_the_losses_alike(ablation):
    wide, targets = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    weights = ablation.ARMS[3].weights
    prefix = ablation.loss_of([wide], targets, weights, [6, 2])
    independent = ablation.loss_of([wide, wide[:, :2]], targets, weights, [6, 2])
    torch.testing.assert_close(independent, prefix)
