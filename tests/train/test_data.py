"""The stream of training texts: split, order, tokens."""

import numpy as np
import pytest

from leafkern import Encoder
from leafkern.errors import InputError
from leafkern.train.data import Stream, read_corpus, tokenise
from leafkern.train.recipe import Data


@pytest.fixture
def files(tmp_path):
    for name, count in (("a", 30), ("b", 20), ("q", 12)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} text {row}\n" for row in range(count)))
    return {"documents": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "queries": [str(tmp_path / "q.txt")]}


def test_both_kinds_and_where_they_come_from(files):
    corpus = read_corpus(Data(**files, validation=0.1))
    assert len(corpus.texts) == 62
    assert corpus.kinds.tolist() == [0] * 50 + [1] * 12
    assert corpus.where(0) == f"{files['documents'][0]}:1"
    assert corpus.where(49) == f"{files['documents'][1]}:20"
    assert corpus.where(51) == f"{files['queries'][0]}:2"
    assert len(corpus.validation) == 6
    assert sorted([*corpus.training, *corpus.validation]) == list(range(62))


def test_limits_count_over_files_and_keep_what_stood_before(files):
    corpus = read_corpus(Data(**files, limit_documents=35, limit_queries=1, validation=0))
    assert [corpus.texts[row] for row in (29, 30, 34, 35)] == ["a text 29", "b text 0", "b text 4", "q text 0"]
    assert len(corpus.texts) == 36
    assert len(corpus.complete["documents"]) == 50
    assert len(corpus.validation) == 0


def test_held_out_texts_do_not_depend_on_order_or_appear_in_training(tmp_path):
    texts = [f"text {row % 40}" for row in range(120)]
    held = []
    for name, order in (("one", np.arange(120)), ("two", np.random.default_rng().permutation(120))):
        (tmp_path / f"{name}.txt").write_text("".join(texts[row] + "\n" for row in order))
        corpus = read_corpus(Data(documents=[str(tmp_path / f"{name}.txt")], validation=0.1))
        held.append({corpus.texts[row] for row in corpus.validation})
        assert not held[-1] & {corpus.texts[row] for row in corpus.training}
    assert held[0] == held[1]
    assert held[0]


def test_nothing_left_to_train_on(tmp_path):
    (tmp_path / "one.txt").write_text("only\n")
    with pytest.raises(InputError, match=r"data.validation: 0"):
        read_corpus(Data(documents=[str(tmp_path / "one.txt")], validation=0.5))


def test_fingerprint_follows_texts_and_kinds(files):
    data = Data(**files)
    before = read_corpus(data).fingerprint
    assert read_corpus(data).fingerprint == before
    assert read_corpus(Data(documents=files["documents"] + files["queries"])).fingerprint != before


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
def test_every_epoch_is_a_permutation(rows):
    numbers = np.random.default_rng().integers(0, 10**6, rows)
    stream = Stream(numbers, 8, seed=3)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        batches = [stream[step] for step in steps]
        assert all(len(batch) == 8 for batch in batches[:-1])
        epochs.append(np.concatenate(batches))
        assert sorted(epochs[-1]) == sorted(numbers)
    if rows > 8:
        assert (epochs[0] != epochs[1]).any()
        assert (Stream(numbers, 8, seed=4)[0] != stream[0]).any()


def test_any_step_can_be_asked_for_first():
    numbers = np.arange(50)
    forward = [Stream(numbers, 8, 0)[step].tolist() for step in range(20)]
    stream = Stream(numbers, 8, 0)
    assert [stream[step].tolist() for step in reversed(range(20))] == forward[::-1]


def test_tokens_follow_the_prompt_of_their_kind(files, tiny_bert):
    encoder = Encoder.from_pretrained(tiny_bert, device="cpu")
    corpus = read_corpus(Data(**files))
    prompts = {"documents": "", "queries": "how "}
    seen = []
    tokens = tokenise(encoder, corpus.texts, corpus.kinds, prompts, lambda done, total: seen.append((done, total)))
    expected = encoder.tokenize(corpus.texts[:50]) + encoder.tokenize(corpus.texts[50:], "how ")
    assert len(tokens) == 62
    assert seen[-1] == (62, 62)
    for row, ids in enumerate(tokens[np.arange(62)]):
        np.testing.assert_array_equal(ids, expected[row])
        assert tokens.lengths[row] == len(expected[row])
