"""kill -9 at any moment, and the resumed run is the one left alone: same losses, same weights, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORDS = ["the", "leaf", "kernel", "search", "vector", "python", "how", "to", "is", "a", "of", "file", "list"]
STEPS = 18
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def history(folder):
    """Everything but the clock."""
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_runs_end_like_the_one_left_alone(tmp_path, tiny_bert):
    rng = np.random.default_rng()
    seed = int(rng.integers(2**31))
    for name, count, longest in (("documents", 70, 20), ("queries", 20, 5)):
        lines = [" ".join(rng.choice(WORDS, rng.integers(2, longest))) + f" {row}" for row in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    recipe = {
        "teacher": {"model": str(tiny_bert), "prompts": {"queries": "how "}},
        "student": {"layers": [1, 3], "head_init": "lstsq", "dropout": 0.1},
        "data": {kind: str(tmp_path / f"{kind}.txt") for kind in ("documents", "queries")} | {"validation": 0.1},
        "schedule": {"cycles": 2, "steps": STEPS // 2},
        "checkpoint": {"steps": 5},
        "evaluate": {"every": 6},
        "batch_size": 8,
        "log_every": 1,
        "seed": seed,
        "threads": 1,
        "device": "cpu",
    }

    def at_steps(*counts):
        return [{"at": "step", "stage": "train", "count": int(count)} for count in counts]

    def at_write(count):
        return {"at": "write", "count": int(count)}

    runs = {
        "alone": [],
        "early": at_steps(rng.integers(1, 5)),
        "once": at_steps(rng.integers(5, STEPS)),
        "twice": at_steps(rng.integers(5, 10), rng.integers(1, 6)),
        "teacher": [{"at": "step", "stage": "teacher", "count": 1}],
        # Moments inside the writing of caches, checkpoints, the history and the final model.
        **{f"write-{number}": [at_write(count)] for number, count in enumerate(rng.integers(1, 120, 4))},
    }
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"recipe": recipe, "folder": str(tmp_path), "runs": runs}))
    driver = Path(__file__).with_name("kill_driver.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, driver, job], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, f"{runs}\n{done.stderr}"
    ended = json.loads(done.stdout.splitlines()[-1])
    for name in ("early", "once", "twice", "teacher"):
        assert set(ended[name][:-1]) == {9}, (name, ended)
    expected_history, expected_model = history(tmp_path / "alone"), content(tmp_path / "alone/model")
    assert [record["step"] for record in expected_history if record["event"] == "step"] == list(range(1, STEPS + 1))
    for name in runs:
        assert ended[name][-1] == 0
        assert history(tmp_path / name) == expected_history, (name, runs[name], seed)
        assert content(tmp_path / name / "model") == expected_model, (name, runs[name], seed)
        leftovers = [path for path in (tmp_path / name).rglob(".leafkern-tmp-*") if "checkpoints" in path.parts]
        assert leftovers == []
