"""`python -m leafkern.train` and `leafkern train`: the same command, with the same exit codes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import yaml


@pytest.fixture
def recipe(tmp_path, tiny_bert):
    rng = np.random.default_rng(2)
    words = ["the", "leaf", "kernel", "search", "vector", "python"]
    (tmp_path / "texts.txt").write_text("".join(" ".join(rng.choice(words, 9)) + f" {row}\n" for row in range(40)))
    path = tmp_path / "recipe.yaml"
    values = {
        "teacher": {"model": str(tiny_bert)},
        "student": {"layers": [0, 2]},
        "data": {"documents": str(tmp_path / "texts.txt")},
        "schedule": {"cycles": 1, "steps": 4},
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_ctrl_c_says_how_to_go_on(recipe, tmp_path):
    """A run that sends itself SIGINT at its second step: exit 130, and a checkpoint to go on from."""
    code = (
        "import os, signal, sys\nimport leafkern.train.loop as loop\nfrom leafkern.cli import main\n"
        "step = loop.Loop.one_step\n"
        "def one_step(self):\n"
        "    if self.step == 1:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self)\n"
        "loop.Loop.one_step = one_step\nmain()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "train", str(recipe), "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 130, done.stderr
    assert "stopped after step 2 of 4; go on with --resume" in done.stderr
    assert (tmp_path / "out/checkpoints/latest").read_text().strip() == "step-000000002"


def called(module, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def test_trains_and_prints_where_the_model_is(recipe, tmp_path):
    done = called(["leafkern.train"], recipe, "--set", "schedule.steps=2", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == os.path.join("out", "model")
    assert len((tmp_path / "out/history.jsonl").read_text().splitlines()) == 4
    again = called(["leafkern", "train"], tmp_path / "out/recipe.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "a run stands there already" in again.stderr


def test_wrong_recipes_exit_with_2(recipe, tmp_path):
    done = called(["leafkern.train"], recipe, "--set", "optimiser.learning=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "optimiser.learning" in done.stderr
    assert "Traceback" not in done.stderr


def test_exploding_runs_exit_with_1(recipe, tmp_path):
    done = called(["leafkern.train"], recipe, "--set", "optimiser.lr=1e30", cwd=tmp_path)
    assert done.returncode == 1
    assert "last good checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
