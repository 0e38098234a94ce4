"""Every loss through SentenceTransformerTrainer: ten real steps, the loss falls. Models without padding."""

import copy
import pickle

import pytest
import torch

from leafkern.errors import InputError
from leafkern.nn import losses

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

WORDS = ["the leaf kernel", "search a vector", "how to list a file", "python is a kernel", "of the file", "a list"]
TEXTS = [f"{WORDS[i % 6]} {WORDS[(i * 5 + 1) % 6]} {i}" for i in range(16)]
DIMS = {"dims": [32, 8]}
CASES = {
    "alignment": (losses.AlignmentLoss(), 1, (32,)),
    "similarity": (losses.SimilarityLoss(**DIMS), 1, (20,)),
    "relative": (losses.RelativeSimilarityLoss(margin=0.2, **DIMS), 1, (20,)),
    "distill": (losses.DistillLoss(**DIMS), 1, (32,)),
    "info_nce": (losses.InfoNCELoss(temperature=0.05, gamma=0.5, listwise=1, pairwise=None, **DIMS), 4, None),
    "info_nce pairs": (losses.InfoNCELoss(temperature=0.05), 2, None),
    "soft_label": (losses.SoftLabelLoss(**DIMS), 4, (3,)),
}


def dataset(columns, label):
    from datasets import Dataset

    table = {f"text_{c}": [f"{text} {WORDS[c]}" for text in TEXTS] for c in range(columns)}
    if label is not None:
        # What can be learned: unit vectors that go with the first words; the first candidate is the best.
        generator = torch.Generator().manual_seed(3)
        kinds = torch.nn.functional.normalize(torch.randn(6, *label, generator=generator), dim=1)
        labels = torch.tensor([1.0, 0.5, 0.0]).expand(16, 3) if label == (3,) else kinds[torch.arange(16) % 6]
        table["label"] = labels.tolist()
    return Dataset.from_dict(table)


def train(model, loss, table, folder):
    """The losses of ten steps without dropout, each on all rows."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=10,
            per_device_train_batch_size=len(TEXTS),  # every step sees the same rows: the loss may only fall
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=5,
        ),
        train_dataset=table,
        loss=loss,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(name, tiny_bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    from leafkern.integrations.sentence_transformers import TrainerLoss

    loss, columns, label = CASES[name]
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    history = train(model, TrainerLoss(model, loss), dataset(columns, label), tmp_path)
    assert len(history) == 10
    assert history[-1] < 0.9 * history[0], history


def test_misuse_is_named(tiny_bert):
    from sentence_transformers import SentenceTransformer

    from leafkern.integrations.sentence_transformers import TrainerLoss

    model = SentenceTransformer(str(tiny_bert), device="cpu")
    features = [model.tokenize(TEXTS[:3]), model.tokenize(TEXTS[3:6])]
    with pytest.raises(InputError, match="loss: MSELoss; expected one of leafkern"):
        TrainerLoss(model, torch.nn.MSELoss())
    with pytest.raises(InputError, match="AlignmentLoss: 2 text columns; expected one"):
        TrainerLoss(model, losses.AlignmentLoss())(features, torch.ones(3, 32))
    with pytest.raises(InputError, match="AlignmentLoss: the dataset has no label column"):
        TrainerLoss(model, losses.AlignmentLoss())(features[:1], None)
    with pytest.raises(InputError, match="InfoNCELoss: 1 text column"):
        TrainerLoss(model, losses.InfoNCELoss())(features[:1])
    with pytest.raises(InputError, match="SoftLabelLoss: 1 text column"):
        TrainerLoss(model, losses.SoftLabelLoss())(features[:1], torch.ones(3, 1))
    assert TrainerLoss(model, losses.AlignmentLoss(kind="l2")).get_config_dict()["kind"] == "l2"
    assert TrainerLoss(model, losses.InfoNCELoss(listwise=2)).get_config_dict()["mixing"]["listwise"] == 2


# Without padding

MIXED = ["the leaf", "a", "", "search a vector of the python file list " * 4, "how to list", "kernel " * 9]
UNPADDED = [
    "model: attention sdpa by leafkern",
    "0: padded input by unpadded",
    "1: mean pooling of unpadded input by mean_pool",
]


def opened(folder, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


def attributes(model):
    return {path: dict(vars(module)) for path, module in model.named_modules()}


def test_enabled_vectors_are_the_same(tiny_bert):
    from leafkern.integrations.sentence_transformers import enable

    model = opened(tiny_bert)
    before = attributes(model)
    options = [{}, {"prompt": "search: "}, {"batch_size": 2}, {"convert_to_tensor": True, "truncate_dim": 8}]
    expected = [torch.as_tensor(model.encode(MIXED, **more)) for more in options]
    done = enable(model)
    assert done.replaced == UNPADDED
    features = model.preprocess(MIXED)
    assert features["input_ids"].shape == (1, int(features["cu_seq_lens_q"][-1]))
    for more, right in zip(options, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(model.encode(MIXED, **more)), right, rtol=0, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = torch.as_tensor(other.encode(MIXED))
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
    done.undo()
    done.undo()
    assert attributes(model).keys() == before.keys()
    for path, now in attributes(model).items():
        assert now.keys() == before[path].keys()
    assert "input_ids" in model.preprocess(MIXED)
    assert "attention_mask" in model.preprocess(MIXED)
    assert torch.equal(torch.as_tensor(model.encode(MIXED)), expected[0])


def test_prompts_left_out_of_pooling(tiny_bert):
    from leafkern.integrations.sentence_transformers import enable

    model = opened(tiny_bert, prompts={"query": "search: "})
    model[1].include_prompt = False
    expected = model.encode(MIXED, prompt_name="query", convert_to_tensor=True)
    with enable(model):
        found = model.encode(MIXED, prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "max", ("mean", "max")])
def test_other_pooling_stays(tiny_bert, mode):
    from leafkern.integrations.sentence_transformers import enable

    model = opened(tiny_bert)
    model[1].pooling_mode = mode
    expected = model.encode(MIXED, convert_to_tensor=True)
    with enable(model) as done:
        assert done.replaced == UNPADDED[:2]
        torch.testing.assert_close(model.encode(MIXED, convert_to_tensor=True), expected, rtol=0, atol=1e-5)


def test_positions_that_do_not_begin_at_zero(tiny_bert, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    from leafkern.integrations.sentence_transformers import enable

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_bert))
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        pad_token_id=tokenizer.pad_token_id,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = SentenceTransformer(modules=[Transformer(str(tmp_path), max_seq_length=64), Pooling(32)], device="cpu")
    expected = model.encode(MIXED, convert_to_tensor=True)
    with enable(model) as done:
        assert done.replaced == UNPADDED
        torch.testing.assert_close(model.encode(MIXED, convert_to_tensor=True), expected, rtol=0, atol=1e-5)


def test_enabled_model_trains_as_before(tiny_bert, tmp_path):
    from leafkern.integrations.sentence_transformers import TrainerLoss, enable

    history, ways = [], []
    for enabled in (False, True):
        model = opened(tiny_bert)
        if enabled:
            enable(model)
        model[0].register_forward_pre_hook(lambda _, args: ways.append("cu_seq_lens_q" in args[0]))
        loss = TrainerLoss(model, losses.InfoNCELoss(temperature=0.05))
        history.append(train(model, loss, dataset(2, None), tmp_path))
    assert ways == [False] * 20 + [True] * 20
    assert history[1][-1] < 0.9 * history[1][0]
    torch.testing.assert_close(torch.tensor(history[1]), torch.tensor(history[0]), rtol=1e-3, atol=1e-4)


def test_enabled_model_saves_as_before(tiny_bert, tmp_path):
    from leafkern.integrations.sentence_transformers import enable

    model = opened(tiny_bert)
    expected = model.encode(MIXED, convert_to_tensor=True)
    with enable(model):
        model.save_pretrained(str(tmp_path))
    again = opened(tmp_path)
    assert again[0].auto_model.config._attn_implementation == "sdpa"
    assert torch.equal(again.encode(MIXED, convert_to_tensor=True), expected)


def test_enable_and_patch(tiny_bert):
    import leafkern
    from leafkern.integrations.sentence_transformers import enable

    model = opened(tiny_bert)
    expected = model.encode(MIXED, convert_to_tensor=True)
    with enable(model), leafkern.patch(model[0].auto_model) as patch:
        assert any("dense_add_norm" in line for line in patch.replaced)
        torch.testing.assert_close(model.encode(MIXED, convert_to_tensor=True), expected, rtol=0, atol=1e-5)
    assert torch.equal(model.encode(MIXED, convert_to_tensor=True), expected)


def test_where_a_model_needs_padding_it_stays(tiny_bert):
    from leafkern.integrations.sentence_transformers import enable

    def padded(model, why):
        expected = model.encode(MIXED, convert_to_tensor=True)
        with pytest.warns(UserWarning, match=f"leafkern: input stays padded: .*{why}"):
            done = enable(model)
        assert done.replaced == [UNPADDED[0], "0: input stays padded"]
        assert "attention_mask" in model.preprocess(MIXED)
        torch.testing.assert_close(model.encode(MIXED, convert_to_tensor=True), expected, rtol=0, atol=1e-5)
        done.undo()

    model = opened(tiny_bert)
    model[0].unpad_inputs = False
    padded(model, "unpad_inputs is False")

    # A model that doesn't hand positions on, and one that has no place for further arguments.
    model = opened(tiny_bert)
    inner, plain = model[0].auto_model, model[0].auto_model.forward
    inner.forward = lambda *args, position_ids=None, **options: plain(*args, **options)
    padded(model, "BertModel, whose states are others without it")

    def strict(input_ids, attention_mask=None, token_type_ids=None, return_dict=True):
        return plain(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)

    inner.forward = strict
    padded(model, "BertModel, which does not take it otherwise: .*unexpected keyword")


def test_misuse_of_enable_is_named(tiny_bert):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from leafkern.integrations.sentence_transformers import enable

    model = opened(tiny_bert)
    with pytest.raises(InputError, match="model: BertModel; expected a SentenceTransformer"):
        enable(model[0].auto_model)
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(InputError, match="model: its first module is StaticEmbedding; expected a transformers model"):
        enable(static)
    enable(model)
    with pytest.raises(InputError, match="model: this SentenceTransformer is patched already"):
        enable(model)
    # What leafkern's attention refuses leaves the model as it was.
    model = opened(tiny_bert)
    model[0].auto_model.config.add_cross_attention = True
    before = attributes(model)
    with pytest.raises(InputError, match="with cross-attention"):
        enable(model)
    assert {path: now.keys() for path, now in attributes(model).items()} == {
        path: had.keys() for path, had in before.items()
    }
    assert model[0].auto_model.config._attn_implementation == "sdpa"


def test_the_real_minilm(minilm):
    import leafkern
    from leafkern.integrations.sentence_transformers import enable

    model = opened(minilm)
    expected = model.encode(MIXED, convert_to_tensor=True)
    with enable(model), leafkern.patch(model[0].auto_model):
        torch.testing.assert_close(model.encode(MIXED, convert_to_tensor=True), expected, rtol=0, atol=1e-5)
