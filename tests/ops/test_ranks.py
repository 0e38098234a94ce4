"""gather="ranks": one, two and three gloo processes give the same loss and, averaged, the same parameter gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch
import torch.distributed as dist

from leafkern.errors import InputError
from leafkern.ops import alignment_loss

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("counts", [(5, 3), (0, 8), (1, 6, 1), (3, 0, 5)], ids=str)
def test_ranks_equal_one_process(counts, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    worker = [sys.executable, ranks_worker.__file__]
    ranks = [
        subprocess.Popen(
            [*worker, str(rank), ",".join(map(str, counts)), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(counts))
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(counts), said
    for dtype, tolerance in TOLERANCE.items():
        alone = ranks_worker.results(ranks_worker.data(dtype), "none", dtype)
        for rank in range(len(counts)):
            found = torch.load(tmp_path / f"{rank}-{str(dtype).removeprefix('torch.')}.pt")
            assert found.keys() == alone.keys()
            for name, (loss, grad) in alone.items():
                assert loss > 0
                assert grad.norm() > 0
                assert abs(found[name][0] - loss) <= tolerance * loss, name
                assert (found[name][1] - grad).norm() <= 2 * tolerance * grad.norm(), name
    right = ranks_worker.results(ranks_worker.data(torch.float64), "none", torch.float64)["distill"][1]
    for rank in range(len(counts)):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}-ddp.pt"), right, rtol=1e-9, atol=1e-12)
        first, second, *several, third, fourth = Path(tmp_path / f"{rank}-errors.txt").read_text().splitlines()
        assert first.startswith(
            "student: ranks must agree in all but the number of rows; they hold (rows, 4) of float32"
        )
        assert second.startswith("teacher: ranks must agree in all but the number of rows; they hold (rows, 3) of")
        assert several[0].startswith("teacher: ranks must agree in all but the number of rows; they hold (rows, 3) of")
        assert "(rows, 3, 2) of float32" in several[0]
        assert several[1].startswith("teacher[1]: ranks must agree in all but the number of rows; they hold (rows, 5)")
        assert "they hold (rows, 4) of float16, (rows, 4) of bfloat16" in third
        assert fourth.startswith(
            "negatives: ranks must agree in all but the number of rows; they hold None, (rows, 1, 4)"
        )


def test_without_a_process_group_ranks_means_one():
    rows = ranks_worker.data(torch.float64)
    alone = ranks_worker.results(rows, "none", torch.float64)
    for name, (loss, grad) in ranks_worker.results(rows, "ranks", torch.float64).items():
        assert torch.equal(loss, alone[name][0])
        assert torch.equal(grad, alone[name][1])


def test_unknown_name():
    with pytest.raises(InputError, match=r"gather: unknown name 'rank'; did you mean 'ranks'\?"):
        alignment_loss(torch.ones(2, 3), torch.ones(2, 3), gather="rank")
