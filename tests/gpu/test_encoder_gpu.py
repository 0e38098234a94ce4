"""The packed encoder on a GPU: gradients, no waiting for the host, CUDA graphs, and encoding in blocks."""

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from compare import relative
from torch import nn

from leafkern import encode
from leafkern.encode import Encoder
from leafkern.nn import GraphedModel, PackedConfig, PackedEncoder, SentenceModel, pack

pytestmark = pytest.mark.gpu

SIZES = {"vocab_size": 300, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
LENGTHS = [[3, 9, 1, 6], [4, 0, 2], [64], [200, 7, 128, 1, 1, 30], [1]]


def model(dtype, **options):
    config = PackedConfig(**SIZES, intermediate_size=200, max_position_embeddings=256)
    encoder = PackedEncoder(config)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return SentenceModel(encoder, normalize=True, **options).to("cuda", dtype).eval()


def batch_of(lengths):
    return pack([np.random.randint(1, 300, length) for length in lengths])


def error_and_torchs(found, module, run, dtype):
    """Our error and that of the same arithmetic on the CPU in `dtype`, both against float64."""
    exact = run(copy.deepcopy(module).cpu().double())
    plain = run(copy.deepcopy(module).cpu().to(dtype))
    return [relative(f, e) for f, e in zip(found, exact)], [relative(p, e) for p, e in zip(plain, exact)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_vectors_and_gradients(lengths, dtype):
    module, batch = model(dtype), batch_of(lengths)
    grad = torch.randn(len(lengths), module.dim, dtype=torch.float64)

    def run(module):
        device = next(module.parameters()).device
        found = module(batch.to(device))
        (found * grad.to(device, found.dtype)).sum().backward()
        # Query, key and value together: terms of the first two cancel, and those of the third tell their size.
        return [found.detach(), *(parameter.grad for parameter in module.parameters())]

    ours, plain = error_and_torchs(run(module), module, run, dtype)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine <= 2 * theirs + (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_nothing_waits_for_the_gpu(pooling):
    module = model(torch.bfloat16, pooling=pooling)
    batches = [batch_of(lengths).to("cuda") for lengths in LENGTHS]
    with torch.no_grad():
        expected = [module(batch) for batch in batches]  # compiles what has to be
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [module(batch) for batch in batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine, right)


def test_training_waits_for_nothing():
    module = model(torch.float32).train()
    batch = batch_of(LENGTHS[3]).to("cuda")
    module(batch).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_equal_the_module(dtype, pooling):
    module = model(dtype, pooling=pooling)
    graphed = GraphedModel(module)
    for lengths in LENGTHS * 4:
        batch = batch_of(lengths)
        with torch.no_grad():
            expected = module(batch.to("cuda"))
        for form in (batch, batch.to("cuda")):
            # Another bucket may choose other blocks of attention.
            torch.testing.assert_close(graphed(form), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert len([captured for captured in graphed._known.values() if captured]) >= 4


def test_replays_under_autocast_outlive_it():
    module = model(torch.float32)
    graphed, batch = GraphedModel(module), batch_of([20, 30])
    for _ in range(4):
        with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
            found, expected = graphed(batch), module(batch.to("cuda"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
        torch.empty(1 << 26, device="cuda").fill_(torch.nan)  # over whatever was freed


def test_weights_that_changed_are_seen():
    module = model(torch.float32)
    graphed, batch = GraphedModel(module), batch_of([20, 30])
    for _ in range(3):
        graphed(batch)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
        expected = module(batch.to("cuda"))
    torch.testing.assert_close(graphed(batch), expected, rtol=0, atol=1e-5)


def test_threads_and_streams_take_turns():
    module = model(torch.float32)
    graphed = GraphedModel(module)
    batches = [batch_of([20, 30, 5]) for _ in range(8)]
    with torch.no_grad():
        expected = [module(batch.to("cuda")) for batch in batches]
    torch.cuda.synchronize()
    found = [None] * len(batches)

    def work(place):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[place] = graphed(batches[place])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


FAILS = """
import torch
from leafkern.nn.graphs import capture
x = torch.ones(3, device="cuda")
before = torch.cuda.current_stream()
try:
    capture(lambda: x * float(x.sum()))
except RuntimeError:
    assert torch.cuda.current_stream() == before
    assert torch.equal(capture(lambda: 2 * x)(), 2 * x)
    print("usable")
"""


def test_a_capture_that_fails_leaves_the_process_usable():
    # In a process of its own: torch's generator of random numbers does not survive it.
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True)
    assert done.stdout == "usable\n", done.stderr


def test_where_values_are_checked_nothing_is_captured(monkeypatch):
    monkeypatch.setenv("LEAFKERN_CHECK", "1")
    module, batch = model(torch.float32), batch_of([20, 30])
    graphed = GraphedModel(module)
    found = [graphed(batch) for _ in range(3)]
    assert all(torch.equal(x, found[0]) for x in found)
    assert not graphed._known


def test_encoding_in_blocks_keeps_the_order(minilm, monkeypatch):
    encoder = Encoder.from_pretrained(minilm, device="cuda", dtype="float32")
    words = "leaf kernel search vector index file read write fast exact".split()
    strings = [" ".join(np.random.choice(words, n % 37)) for n in range(500)]
    expected = Encoder.from_pretrained(minilm, device="cpu", dtype="float32").encode(strings)
    monkeypatch.setattr(encode, "_TOKENIZE_TEXTS", 64)
    for batch_tokens in (None, 700, 4000):
        found = encoder.encode(strings, batch_tokens=batch_tokens)
        assert np.abs(found - expected).max() <= 2e-5
    assert encoder._graphed is not None
