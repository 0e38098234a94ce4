"""The packed encoder against transformers, its gradients, and the sentence model around it."""

import json

import numpy as np
import pytest
import torch
from encoders import gradients

from leafkern.errors import InputError
from leafkern.nn import Dense, PackedConfig, PackedEncoder, Padding, SentenceModel, activation_module, pack

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
RAGGED = [[7], [1, 1], [5, 5, 5], [3, 9, 1, 6], [4, 0, 2], [0], []]


def random_encoder(dtype=torch.float64, **more):
    encoder = PackedEncoder(PackedConfig(**SIZES, max_position_embeddings=16, initializer_range=0.3, **more))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.to(dtype)


def random_ids(lengths):
    return [np.random.randint(1, SIZES["vocab_size"], length) for length in lengths]


def as_transformers(encoder):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**encoder.config.to_dict()), add_pooling_layer=False)
    model.load_state_dict(encoder.state_dict(), strict=True)
    return model.to(next(encoder.parameters()).dtype).eval()


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("lengths", RAGGED)
def test_states_equal_transformers(lengths, act):
    encoder, ids = random_encoder(hidden_act=act), random_ids(lengths)
    model = as_transformers(encoder)
    batch = pack(ids)
    states = encoder(batch)
    assert states.shape == (sum(lengths), 24)
    for start, row in zip(batch.cu_seqlens.tolist(), ids, strict=False):
        if len(row):
            expected = model(torch.tensor(row)[None]).last_hidden_state[0]
            torch.testing.assert_close(states[start : start + len(row)], expected)


@pytest.mark.parametrize("lengths", [[3, 9, 1, 6], [4, 0, 2], [5, 5]])
def test_gradients_equal_transformers(lengths):
    encoder, ids = random_encoder(), random_ids(lengths)
    model = as_transformers(encoder)
    weights = torch.randn(sum(lengths), 24, dtype=torch.float64)
    (encoder(pack(ids)) * weights).sum().backward()
    states = [model(torch.tensor(row)[None]).last_hidden_state[0] for row in ids if len(row)]
    (torch.cat(states) * weights).sum().backward()
    for name, mine in gradients(encoder).items():
        theirs = model.get_parameter(name).grad
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_names_are_those_of_transformers():
    encoder = random_encoder()
    state = encoder.state_dict()
    assert list(state) == [name for name, _ in as_transformers(encoder).named_parameters()]
    other = random_encoder()
    assert not other.load_state_dict(state).unexpected_keys
    assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    del state["encoder.layer.1.attention.self.key.weight"]
    with pytest.raises(RuntimeError, match=r"encoder\.layer\.1\.attention\.self"):
        other.load_state_dict(state)


def test_token_types_count():
    encoder, (ids,) = random_encoder(), random_ids([6])
    types = torch.tensor([0, 0, 1, 1, 0, 1])
    states = encoder(pack([ids])._replace(token_type_ids=types))
    expected = as_transformers(encoder)(torch.tensor(ids)[None], token_type_ids=types[None]).last_hidden_state[0]
    torch.testing.assert_close(states, expected)


def test_mean_pooled_equals_mean_of_states():
    encoder, lengths = random_encoder(), [3, 0, 8, 1]
    batch = pack(random_ids(lengths))
    rows = torch.stack([rows.sum(0) / max(len(rows), 1) for rows in encoder(batch).split(lengths)])
    torch.testing.assert_close(encoder.mean_pooled(batch), rows)


def test_a_batch_changes_nothing_for_its_members():
    model = SentenceModel(random_encoder(), normalize=True)
    ids = random_ids([3, 12, 0, 1, 7])
    alone = torch.cat([model(pack([row])) for row in ids])
    torch.testing.assert_close(model(pack(ids)), alone)


def test_pad_and_unpad_are_inverse_and_have_exact_gradients():
    padding = Padding(pack(random_ids([3, 0, 5])))
    x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(padding.unpad(padding.pad(x)), x)
    assert (padding.pad(x)[~padding.mask] == 0).all()
    assert torch.autograd.gradcheck(padding.pad, x)
    assert torch.autograd.gradcheck(padding.unpad, torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True))


def test_compiles_as_one_graph():
    module = SentenceModel(random_encoder(), normalize=True)
    weights = torch.randn(4, 24, dtype=torch.float64)

    def vectors_and_gradients(run, batch):
        module.zero_grad()
        found = run(batch)
        (found * weights).sum().backward()
        return [found.detach(), *(p.grad.clone() for p in module.parameters())]

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 9, 1, 6], [4, 0, 2, 7]):
        batch = pack(random_ids(lengths))
        expected = vectors_and_gradients(module, batch)
        for mine, right in zip(vectors_and_gradients(compiled, batch), expected, strict=True):
            torch.testing.assert_close(mine, right)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(InputError, match="a sequence of 17 tokens; this model has 16 positions"):
        random_encoder()(pack(random_ids([17])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    encoder, batch = random_encoder(torch.float32), pack(random_ids([3, 9, 1]))
    model = SentenceModel(encoder, normalize=True)
    expected = model(batch)
    found = model.to(dtype)(batch)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


def test_dropout_only_where_asked_for_and_only_in_training():
    batch = pack(random_ids([5, 6]))
    plain, dropping = random_encoder(), random_encoder(dropout=0.5)
    assert torch.equal(plain.train()(batch), plain.eval()(batch))
    assert torch.equal(dropping.eval()(batch), dropping(batch))
    assert not torch.equal(dropping.train()(batch), dropping(batch))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling(pooling):
    encoder, lengths = random_encoder(), [4, 0, 1, 6]
    batch = pack(random_ids(lengths))
    states = encoder(batch).split(lengths)
    pick = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}[pooling]
    expected = [pick(x) if len(x) else torch.zeros(24, dtype=torch.float64) for x in states]
    torch.testing.assert_close(SentenceModel(encoder, pooling=pooling).pooled(batch), torch.stack(expected))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_pooling_without_tokens(pooling, lengths):
    model = SentenceModel(random_encoder(), pooling=pooling, dense=(Dense(24, 5, bias=False).double(),), normalize=True)
    out = model(pack(random_ids(lengths)))
    assert out.shape == (len(lengths), 5)
    assert (out == 0).all()


def test_heads_in_order():
    heads = (Dense(24, 8, activation=torch.nn.Tanh()), Dense(8, 8, use_residual=True), Dense(8, 3, use_residual=True))
    model = SentenceModel(random_encoder(torch.float32), dense=heads, normalize=True)
    batch = pack(random_ids([3, 4]))
    x = torch.tanh(heads[0].linear(model.pooled(batch)))
    x = x + heads[1].linear(x)
    x = heads[2].residual(x) + heads[2].linear(x)
    torch.testing.assert_close(model(batch), torch.nn.functional.normalize(x, dim=1))
    assert (model.width, model.dim) == (24, 3)


def test_wrong_models():
    with pytest.raises(InputError, match="did you mean 'mean'"):
        SentenceModel(random_encoder(), pooling="meen")
    with pytest.raises(InputError, match="takes 7 features, but 24 come in"):
        SentenceModel(random_encoder(), dense=(Dense(7, 3),))
    with pytest.raises(InputError, match="hidden_act: unknown name 'gelo'"):
        PackedConfig(**SIZES, hidden_act="gelo")
    with pytest.raises(InputError, match="not a multiple of num_attention_heads = 5"):
        PackedConfig(**(SIZES | {"num_attention_heads": 5}))
    with pytest.raises(InputError, match="num_hidden_layers: expected at least 1"):
        PackedConfig(**(SIZES | {"num_hidden_layers": 0}))
    with pytest.raises(InputError, match="vocab_size, hidden_size"):
        PackedConfig.from_dict({"model_type": "bert"})
    with pytest.raises(InputError, match="row 1 has shape"):
        pack([np.zeros(3, np.int32), np.zeros((2, 2), np.int32)])


def test_config_round_trip():
    config = PackedConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-5)
    assert PackedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "roberta"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"hidden_act": "mish"},
    ],
)
def test_other_models_are_not_taken_for_bert(change):
    config = PackedConfig(**SIZES).to_dict()
    assert PackedConfig.serves(config)
    assert not PackedConfig.serves(config | change)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("torch.nn.modules.linear.Identity", torch.nn.Identity),
        ("torch.nn.modules.activation.Tanh", torch.nn.Tanh),
        ("torch.nn.GELU", torch.nn.GELU),
    ],
)
def test_activations(path, kind):
    assert type(activation_module(path)) is kind


@pytest.mark.parametrize(
    "path",
    ["os.system", "torch.nn.Linear", "torch.nn.modules.activation.os", "torch.hub.load", "Tanh", "torch.nn.Nope"],
)
def test_nothing_else_is_imported_as_an_activation(path):
    with pytest.raises(InputError, match="activation_function"):
        activation_module(path)


def test_activation_with_arguments_is_refused():
    with pytest.raises(InputError, match="needs arguments"):
        activation_module("torch.nn.modules.activation.MultiheadAttention")
