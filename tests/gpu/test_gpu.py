"""What the CUDA paths must give: the CPU's vectors and integers."""

import copy

import pytest
import torch

from leafkern.encode import Encoder
from leafkern.ops import alignment_loss, quantize, search

pytestmark = pytest.mark.gpu

TEXTS = ["", "leaf", "how to search a list of vectors in python", "the kernel is a file of the leaf. " * 40, "a"] * 7


def relative(got: torch.Tensor, right: torch.Tensor) -> float:
    got, right = got.double().cpu(), right.double().cpu()
    return ((got - right).norm() / right.norm()).item()


@pytest.fixture(scope="module")
def cpu_encoder(minilm):
    return Encoder.from_pretrained(minilm, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def cpu_vectors(cpu_encoder):
    return cpu_encoder.encode(TEXTS, output="torch")


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-5),
        ({"dtype": "bfloat16"}, 2e-2),
        ({"dtype": "float32", "compute": "bfloat16"}, 2e-2),
        ({"dtype": "float16"}, 4e-3),
    ],
    ids=["fp32", "bf16", "fp32-autocast", "fp16"],
)
@pytest.mark.parametrize("batch_tokens", [None, 300])
def test_encoding_on_cuda_gives_the_cpu_vectors(minilm, cpu_vectors, options, tolerance, batch_tokens):
    encoder = Encoder.from_pretrained(minilm, device="cuda", **options)
    got = encoder.encode(TEXTS, output="torch", batch_tokens=batch_tokens)
    assert got.is_cuda
    assert relative(got, cpu_vectors) <= tolerance
    torch.testing.assert_close(got.float().norm(dim=1).cpu(), torch.ones(len(TEXTS)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["int8", "int4", "binary", "ubinary"])
@pytest.mark.parametrize(("rows", "dim", "count", "k"), [(1000, 384, 7, 10), (257, 97, 1, 300), (5, 8, 3, 5)])
def test_search_on_cuda_gives_the_cpu_integers(precision, rows, dim, count, k):
    base = torch.nn.functional.normalize(torch.randn(rows, dim))
    queries = torch.nn.functional.normalize(torch.randn(count, dim))
    codes = quantize(base, precision)
    for options in [{}] if precision.startswith("int") else [{"query_bits": 1}, {"query_bits": 8}]:
        scores, ids = search(queries, codes, k, **options)
        cuda_scores, cuda_ids = search(queries.cuda(), codes.to("cuda"), k, **options)
        assert cuda_ids.is_cuda
        torch.testing.assert_close(cuda_ids.cpu(), ids, rtol=0, atol=0)
        torch.testing.assert_close(cuda_scores.cpu(), scores, rtol=1e-6, atol=1e-6)


def test_codes_made_on_cuda_are_the_cpu_codes():
    x = torch.nn.functional.normalize(torch.randn(500, 384))
    for precision in ("int8", "int4", "ubinary"):
        ours, theirs = quantize(x.cuda(), precision).codes.cpu(), quantize(x, precision).codes
        # A value on the edge of a bin may round to either side where the device divides differently.
        assert (ours != theirs).float().mean() < 1e-4, precision


def test_float_search_on_cuda():
    base, queries = torch.randn(3000, 128), torch.randn(9, 128)
    scores, _ = search(queries.cuda(), base.cuda(), 10)
    right = (queries.double() @ base.double().T).topk(10, dim=1).values
    torch.testing.assert_close(scores.cpu().double(), right, rtol=1e-5, atol=1e-4)


def test_one_training_step_on_cuda_equals_the_cpu_step(cpu_encoder):
    student = Encoder.from_layers(cpu_encoder, [0, 2])
    losses, weights = {}, {}
    target = torch.nn.functional.normalize(torch.randn(len(TEXTS), student.dim))
    for device in ("cpu", "cuda"):
        module = copy.deepcopy(student.module).to(device).train()
        batch = student.collate(student.tokenize(TEXTS)).to(device)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss = alignment_loss(module(batch), target.to(device))
        loss.backward()
        optimizer.step()
        losses[device] = loss.detach()
        weights[device] = torch.cat([p.detach().flatten().cpu() for p in module.parameters()])
    assert relative(losses["cuda"], losses["cpu"]) <= 1e-5
    before = torch.cat([p.detach().flatten() for p in student.module.parameters()])
    moved = {device: value - before for device, value in weights.items()}
    assert moved["cpu"].norm() > 0
    assert relative(moved["cuda"], moved["cpu"]) <= 1e-3
