"""A training run on a GPU: it learns in float32 and bfloat16, and resumes from its checkpoint."""

import numpy as np
import pytest

from leafkern.train import run

WORDS = ["the", "leaf", "kernel", "search", "vector", "python", "how", "to", "is", "a", "of", "file", "list"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns_and_resumes_on_a_gpu(tmp_path, tiny_bert, precision):
    rng = np.random.default_rng()
    lines = [" ".join(rng.choice(WORDS, rng.integers(2, 20))) + f" {row}" for row in range(96)]
    (tmp_path / "documents.txt").write_text("\n".join(lines) + "\n")
    recipe = {
        "teacher": {"model": str(tiny_bert)},
        "student": {"layers": [0, 2]},
        "data": {"documents": str(tmp_path / "documents.txt"), "validation": 0.1},
        "optimiser": {"lr": 3e-3, "final_lr": 3e-4},
        "schedule": {"cycles": 1, "steps": 40},
        "checkpoint": {"steps": 20},
        "batch_size": 8,
        "log_every": 1,
        "device": "cuda",
        "precision": precision,
    }

    def interrupt(stage, done, total, facts):
        if stage == "train" and done == 25:
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        run(recipe, output=tmp_path / "out", progress=interrupt)
    result = run(recipe, output=tmp_path / "out", resume=True)
    losses = [record["loss"] for record in result.history if record["event"] == "step"]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
