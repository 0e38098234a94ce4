"""cached_backward against one backward pass of the whole batch: gradients, random numbers, memory, ranks."""

import doctest
import os
import subprocess
import sys
import weakref
from pathlib import Path

import gradcache_worker
import pytest
import torch
import torch.distributed as dist
from compare import relative
from encoders import small_model
from gradcache_worker import OUT, ROWS, WORLD, batch, encoder, gradients, three_towers
from tolerances import TOLERANCE

import leafkern
from leafkern.errors import InputError
from leafkern.nn import cached_backward, gradcache, pack
from leafkern.ops import distill_loss, info_nce


def contrastive(queries, positives, negatives):
    return info_nce(queries, positives, negatives, temperature=0.2, dims=[OUT, 2])


def with_all_graphs(encode, towers, loss):
    """What cached_backward does, with every chunk's graph alive."""
    value = loss(*(torch.cat([encode(chunk) for chunk in chunks]) for chunks in towers))
    value.backward()
    return value.detach()


@pytest.mark.parametrize("sizes", [[9], [4, 5], [5, 3, 1], [0, 8, 0, 1], [1] * 9], ids=str)
def test_gradients_are_those_of_one_big_batch(sizes):
    model, exact = encoder(), encoder()
    value = cached_backward(model, [x.split(sizes) for x in three_towers()], contrastive)
    expected = contrastive(*map(exact, three_towers()))
    expected.backward()
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(model), gradients(exact), rtol=1e-11, atol=1e-14)


def test_towers_may_be_cut_and_encoded_differently():
    model, exact = [encoder(), encoder().double()], [encoder(), encoder().double()]
    queries, positives, _ = three_towers()
    cached_backward(model, [queries.split(4), positives.split(5)], info_nce)
    info_nce(exact[0](queries), exact[1](positives)).backward()
    for mine, right in zip(model, exact):
        torch.testing.assert_close(gradients(mine), gradients(right), rtol=1e-11, atol=1e-14)


def test_distillation_adds_to_the_gradients_that_are_there():
    model, exact = encoder(), encoder()
    texts, teacher = batch(ROWS), torch.randn(ROWS, OUT, dtype=torch.float64)

    def loss(student):
        return distill_loss(student, teacher, dims=[OUT, 2], margin=0.3).total

    for _ in range(2):
        cached_backward(model, [texts.split(4)], loss, scale=lambda value: value / 2)
    loss(exact(texts)).backward()
    torch.testing.assert_close(gradients(model), gradients(exact), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_numbers_are_those_of_one_pass(device):
    own = torch.Generator(device)
    towers = [x.to(device).split(4) for x in three_towers()]

    def noisy(model):
        return lambda x: (
            model(x) * (1 + torch.rand(x.shape[:-1], generator=own, dtype=x.dtype, device=device)[..., None])
        )

    def loss(*vectors):
        return contrastive(*vectors) + 0 * torch.rand((), device=device)

    found = []
    for backward, options in [(with_all_graphs, {}), (cached_backward, {"generators": [own]})]:
        model = encoder(dropout=0.5).to(device)
        torch.manual_seed(8)
        own.manual_seed(9)
        value = backward(noisy(model), towers, loss, **options)
        found.append([value, gradients(model), torch.rand(3), torch.rand(3, device=device), own.get_state()])
    for mine, right in zip(found[1][:2], found[0][:2]):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-14)
    for mine, right in zip(found[1][2:], found[0][2:]):
        assert torch.equal(mine, right)


def test_packed_encoder_with_dropout():
    def model():
        torch.manual_seed(1)
        made = small_model().train()
        for part in made.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.3
        return made

    chunks = [pack([torch.arange(1, n + 1).numpy() for n in lengths]) for lengths in ([3, 1], [7], [], [2, 5, 4])]
    teacher = torch.randn(6, 8, dtype=torch.float64)
    found = []
    for backward in (with_all_graphs, cached_backward):
        one = model()
        torch.manual_seed(4)
        backward(one, [chunks], lambda x: distill_loss(x, teacher, weights=(0, 1, 1), margin=0.5).total)
        found.append(gradients(one))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


def test_no_rows():
    model = encoder()
    assert cached_backward(model, [[batch(0)], [batch(0)]], info_nce) == 0
    assert torch.equal(gradients(model), torch.zeros_like(gradients(model)))


@pytest.mark.parametrize("outside", [True, False], ids=["around the call", "in encode"])
def test_autocast(outside):
    model, exact = encoder(dtype=torch.float32), encoder(dtype=torch.float32)
    queries, positives, _ = (x.float() for x in three_towers())

    def encode(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
            return model(x)

    with torch.autocast("cpu", torch.bfloat16):
        expected = info_nce(exact(queries), exact(positives), temperature=0.2)
    expected.backward()
    if outside:
        with torch.autocast("cpu", torch.bfloat16):
            value = cached_backward(model, [queries.split(2), positives.split(4)], info_nce_at(0.2))
    else:
        value = cached_backward(encode, [queries.split(2), positives.split(4)], info_nce_at(0.2))
    assert relative(value, expected.detach()) <= TOLERANCE[torch.bfloat16]
    assert relative(gradients(model), gradients(exact)) <= TOLERANCE[torch.bfloat16]


def info_nce_at(temperature):
    return lambda queries, positives: info_nce(queries, positives, temperature=temperature)


def test_scaled_gradients_and_parameters_of_the_loss():
    model, exact = encoder(), encoder()
    temperatures = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(temperature):
        return lambda queries, positives: torch.nn.functional.cross_entropy(
            queries @ positives.T / temperature, torch.arange(ROWS)
        )

    queries, positives, _ = three_towers()
    towers = [queries.split(2), positives.split(2)]
    value = cached_backward(model, towers, loss(temperatures[0]), scale=lambda one: 1024 * one)
    expected = loss(temperatures[1])(exact(queries), exact(positives))
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(model), 1024 * gradients(exact), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(temperatures[0].grad, 1024 * temperatures[1].grad, rtol=1e-11, atol=1e-14)


class Saved:
    """Bytes of activations that graphs hold, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def __call__(self, encode):
        def counted(x):
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held[0]):
                return encode(x)

        return counted

    def _pack(self, x):
        held = _Held([x])
        self.now += x.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(held, self._free, x.nbytes)
        return held

    def _free(self, size):
        self.now -= size


class _Held(list):
    """A list that can be referred to weakly."""


def test_one_chunk_s_graph_at_a_time():
    of_one, of_all = Saved(), Saved()
    texts = batch(64)
    model = encoder()
    one = of_one(model)(texts[:8])
    del one
    cached_backward(of_all(model), [texts.split(8), texts.split(8)], info_nce)
    assert of_all.most == of_one.most > 0
    assert of_all.now == 0


def test_what_is_refused():
    model, x = encoder(), batch(4)
    refused = [
        (r"towers\[1\]: has no chunks; expected one of 0 rows", model, [[x], []], info_nce),
        ("encode, towers: 1 encoders for 2 towers", [model], [[x], [x]], info_nce),
        ("encode, towers: 0 encoders for 0 towers", model, [], info_nce),
        (r"encode: gave tuple for a chunk of towers\[0\]", lambda x: (x,), [[x]], info_nce),
        (r"encode: gave shape \(4, 3\) for a chunk of towers\[0\]", lambda x: x, [[x, x[:, :3]]], info_nce),
        (r"without gradient for chunk 0 of towers\[1\]", [model, lambda x: x[:, :OUT]], [[x], [x]], info_nce),
        (r"loss: expected a scalar tensor, got shape \(4, 4\)", model, [[x]], lambda x: x),
        (r"loss: .* got DistillTerms \(distill_loss: its field `total`\)", model, [[x]], lambda x: distill_loss(x, x)),
    ]
    for message, encode, towers, loss in refused:
        with pytest.raises(InputError, match=message):
            cached_backward(encode, towers, loss)


def test_another_second_pass_is_noticed():
    model, calls = encoder(), []

    def encode(x):
        calls.append(x)
        return model(x) * (1.1 if len(calls) == 4 else 1)

    with pytest.raises(InputError, match=r"gave other vectors for chunk 1 of towers\[0\] the second time"):
        cached_backward(encode, [batch(4).split(2)], lambda x: x.square().sum())
    calls.clear()
    with pytest.raises(InputError, match=r"gave shape \(2, 4\) for chunk 0 of towers\[0\], then \(1, 4\)"):
        cached_backward(lambda x: calls.append(x) or model(x[len(calls) - 1 :]), [[batch(2)]], lambda x: x.sum())


def test_the_docstring_s_example():
    found = doctest.testmod(gradcache)
    assert found.attempted > 5
    assert found.failed == 0


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_ranks_equal_one_process(tmp_path):
    package = str(Path(leafkern.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": package}
    command = [sys.executable, gradcache_worker.__file__, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, said
    exact = encoder()
    queries, positives, _ = three_towers()
    expected = info_nce(exact(queries), exact(positives), temperature=0.2)
    expected.backward()
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 4
        for value, grad, exchanges in found.values():
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(grad, gradients(exact), rtol=1e-10, atol=1e-13)
            assert exchanges == 1


def test_a_second_pass_that_fails_leaves_the_random_numbers_in_order():
    calls = []

    def encode(x):
        calls.append(x)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return x * torch.rand(4, dtype=x.dtype) * weight

    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    chunks = torch.randn(6, 4, dtype=torch.float64).split(3)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_backward(encode, [chunks], lambda x: x.square().sum())
    after = torch.rand(2)
    torch.manual_seed(3)
    torch.rand(2, 4, dtype=torch.float64)
    assert torch.equal(after, torch.rand(2))
