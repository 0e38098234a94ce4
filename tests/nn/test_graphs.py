"""Buckets of CUDA graphs: that a padded batch gives the same vectors, what is captured when, and what is kept.

Capturing needs a GPU; here a stand-in records the call and repeats it, which shows everything but the graph.
"""

import pytest
import torch
from encoders import Recorder, batch_of, small_model

from leafkern.nn import GraphedModel, graphs

LENGTHS = [[3, 9, 1, 6], [4, 0, 2], [5, 0], [5, 5], [16], [1], [2] * 9, [16] * 5]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_bucket_changes_nothing(lengths, pooling, poisoned):
    module, recorder = small_model(pooling=pooling, normalize=True), Recorder()
    graphed = GraphedModel(module, capture=recorder)
    for _ in range(4):
        batch = batch_of(lengths)
        found = graphed(batch)
        torch.testing.assert_close(found, module(batch))
        assert not found.requires_grad
    assert (recorder.count, recorder.replays) == (1, 3)


def test_one_bucket_serves_other_batches():
    module, recorder = small_model(), Recorder()
    graphed = GraphedModel(module, capture=recorder)
    batches = [batch_of(lengths) for lengths in ([7, 4, 9], [16, 1, 0], [2, 14, 1], [8, 8, 10], [5, 5, 6])]
    found = [graphed(batch) for batch in batches]
    for mine, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(mine, module(batch))
    # 20, 17, 17, 26 and 16 tokens: the last is in a bucket of its own, seen once.
    assert (recorder.count, recorder.replays) == (1, 3)


def test_results_are_the_callers_own():
    graphed = GraphedModel(small_model(), capture=Recorder())
    batches = [batch_of([5, 3]) for _ in range(4)]
    found = [graphed(batch) for batch in batches]
    kept = [x.clone() for x in found]
    graphed(batch_of([4, 4]))
    assert all(torch.equal(*pair) for pair in zip(found, kept, strict=True))


def test_inference_mode_stays_outside():
    module = small_model()
    graphed = GraphedModel(module, capture=Recorder())
    with torch.inference_mode():
        for _ in range(2):
            graphed(batch_of([5, 3]))
    batch = batch_of([5, 3])
    found = graphed(batch)
    assert not found.is_inference()
    torch.testing.assert_close(found, module(batch))


def test_replaced_weights_are_captured_anew_and_changed_ones_seen():
    module, recorder = small_model(), Recorder()
    graphed = GraphedModel(module, capture=recorder)

    def twice():
        for _ in range(2):
            batch = batch_of([5, 3])
            torch.testing.assert_close(graphed(batch), module(batch))

    twice()
    with torch.no_grad():
        module.backbone.encoder.layer[0].attention.self.qkv.weight.mul_(1.5)
    twice()
    assert recorder.count == 1
    module.backbone.float()
    twice()
    assert recorder.count == 2


def test_autocast_has_graphs_of_its_own():
    module, recorder = small_model().float(), Recorder()
    graphed, batch = GraphedModel(module, capture=recorder), batch_of([5, 3])
    for _ in range(2):
        graphed(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, found = module(batch), graphed(batch)
        torch.testing.assert_close(found, expected)
    assert recorder.count == 2


def test_what_runs_as_it_is(monkeypatch):
    module, recorder = small_model(), Recorder()
    graphed = GraphedModel(module, capture=recorder)
    monkeypatch.setattr(graphs, "MOST_TOKENS", 8)
    typed = batch_of([3, 4])._replace(token_type_ids=torch.tensor([0, 0, 1, 1, 0, 1, 1]))
    for batch in (batch_of([9]), batch_of([]), batch_of([0, 0]), typed):
        for _ in range(3):
            torch.testing.assert_close(graphed(batch), module(batch))
    assert recorder.count == 0


def test_the_oldest_graphs_are_dropped(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    module, recorder = small_model(), Recorder()
    graphed = GraphedModel(module, capture=recorder)
    for lengths in ([4], [4], [4, 4], [4, 4], [4] * 5, [4] * 5, [4]):
        graphed(batch_of(lengths))
    # The last one's bucket was dropped for the third: it is new again.
    assert (recorder.count, len(graphed._known)) == (3, 2)


def test_without_a_graph_everything_runs_as_it_is():
    def fails(call, pool=None):
        raise RuntimeError("operation not permitted when stream is capturing")

    module = small_model()
    graphed, batch = GraphedModel(module, capture=fails), batch_of([5, 3])
    graphed(batch)
    with pytest.warns(UserWarning, match="no CUDA graphs for this model.*: operation not permitted"):
        torch.testing.assert_close(graphed(batch), module(batch))
    torch.testing.assert_close(graphed(batch), module(batch))


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 100, 128, 129, 1000, 1024, 1025, 5000, 16384])
def test_buckets_waste_little(tokens):
    found = graphs.token_bucket(tokens)
    assert tokens <= found <= max(16, tokens + max(15, tokens / 8))
    assert found % 16 == 0
    assert graphs.token_bucket(found) == found


def test_there_are_few_buckets():
    assert len({graphs.token_bucket(tokens) for tokens in range(1, graphs.MOST_TOKENS + 1)}) <= 80


def test_a_bucket_is_no_longer_than_the_model_takes():
    assert graphs.bucket(batch_of([17, 3]), 20) == (32, 4, 20)
    assert graphs.bucket(batch_of([3]), 20) == (16, 2, 16)
    assert graphs.bucket(batch_of([16]), 20) == (16, 1, 16)
    assert graphs.bucket(batch_of([2] * 5), 512) == (16, 8, 16)
    assert graphs.bucket(batch_of([1] * 1030), 512) == (1152, 2048, 16)
