"""leafkern's attention and patch in transformers' models, held to their eager attention."""

import copy
import pickle
import re
from collections import Counter

import pytest
import torch
from compare import bounds, relative
from tolerances import TOLERANCE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, CLIPConfig

import leafkern
from leafkern.errors import InputError
from leafkern.integrations import transformers as integration

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {"num_key_value_heads": 2}
MODELS = {
    "bert": ("bert", WITHOUT_DROPOUT),
    "modernbert": ("modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2 bidirectional": ("qwen2", GROUPED | {"is_causal": False}),
    "qwen2 sliding": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "mistral sliding": ("mistral", GROUPED | {"sliding_window": 4}),
    "mistral bidirectional": ("mistral", GROUPED | {"sliding_window": 4, "is_causal": False}),
    "gemma3": ("gemma3_text", GROUPED | {"head_dim": 8, "sliding_window": 6, "use_bidirectional_attention": True}),
}
LONGEST = 13
LENGTHS = [9, LONGEST, 1, 5]
# BERT alone computes in float64 throughout.
CASES = [pytest.param(name, torch.float64 if name == "bert" else torch.float32, id=name) for name in MODELS]


def make(name, dtype=torch.float32, **options):
    kind, more = MODELS[name]
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES | more | options), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # The default initialisation is so small that attention hardly matters.
            parameter.data.mul_(5)
    return model.to(dtype).eval()


def with_leafkern(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("leafkern")
    assert model.config._attn_implementation == "leafkern"
    return model


def batch(side="right"):
    """Token ids (B, L) and where there are tokens."""
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(3, 99, mask.shape), mask.flip(1) if side == "left" else mask


def flat(ids, mask):
    """The tokens of right-padded rows as one row, with what transformers calls their bounds."""
    cu_seqlens = bounds(mask.sum(1).tolist())
    places = torch.arange(mask.shape[1]).expand_as(mask)[mask]
    return {
        "input_ids": ids[mask][None],
        "position_ids": places[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": int(mask.sum(1).max()),
        "max_length_k": int(mask.sum(1).max()),
    }


def states(model, **inputs):
    return model(**inputs, use_cache=False).last_hidden_state


def gradients(model, out, weights):
    model.zero_grad()
    (out * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def assert_equal(model, other, ids, mask, given, dtype):
    """States at tokens, and gradients of all parameters."""
    expected = states(model, input_ids=ids, attention_mask=mask.long())[mask]
    found = states(other, **given)
    found = found[0] if "cu_seq_lens_q" in given else found[mask]
    assert relative(found, expected) <= TOLERANCE[dtype]
    weights = torch.randn_like(expected)
    right = gradients(model, expected, weights)
    assert relative(gradients(other, found, weights), right) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("way", ["right", "left", "flat", "whole", "no mask", "a row of padding"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_equals_eager(name, dtype, way, backend, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", f"attention={backend}")
    model = make(name, dtype)
    ids, mask = batch(way)
    if way in ("whole", "no mask"):
        mask = torch.ones_like(mask)
    if way == "a row of padding":
        mask[2] = False
    given = {"input_ids": ids} | ({} if way == "no mask" else {"attention_mask": mask.long()})
    assert_equal(model, with_leafkern(model), ids, mask, flat(ids, mask) if way == "flat" else given, dtype)


@pytest.mark.parametrize("name", ["bert", "qwen2", "qwen2 bidirectional"])
def test_padding_between_tokens(name):
    model, (ids, mask) = make(name), batch()
    mask[:2] &= torch.rand(2, LONGEST) < 0.6
    mask[:, 0] = True
    given = {"input_ids": ids, "attention_mask": mask.long()}
    assert_equal(model, with_leafkern(model), ids, mask, given, torch.float32)


@pytest.mark.parametrize("name", ["modernbert", "mistral sliding"])
def test_padding_between_tokens_of_a_window_is_refused(name):
    model, (ids, mask) = with_leafkern(make(name)), batch()
    mask[0, 3] = False
    with pytest.raises(InputError, match="attention_mask: a row with padding between its tokens"):
        states(model, input_ids=ids, attention_mask=mask.long())


@pytest.mark.parametrize("way", ["config", "layers"])
def test_bidirectional_equals_eager_with_a_full_mask(way):
    model, (ids, mask) = make("qwen2"), batch()
    other = with_leafkern(model)
    if way == "config":
        other.config.is_causal = False
    else:
        for block in other.layers:
            block.self_attn.is_causal = False
    full = torch.zeros(4, 1, LONGEST, LONGEST).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    expected = states(model, input_ids=ids, attention_mask=full)[mask]
    for given in ({"input_ids": ids, "attention_mask": mask.long()}, flat(ids, mask)):
        found = states(other, **given)
        found = found[0] if "cu_seq_lens_q" in given else found[mask]
        assert relative(found, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2"])
def test_half_precision_error_is_at_most_twice_that_of_eager(name):
    exact, (ids, mask) = make(name), batch()
    model = copy.deepcopy(exact).bfloat16()
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    right = states(exact, **inputs)[mask]
    theirs, mine = (relative(states(m, **inputs)[mask], right) for m in (model, with_leafkern(model)))
    assert 0 < mine <= 2 * theirs


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_under_autocast(name):
    model, (ids, mask) = make(name), batch()
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    right = states(model, **inputs)[mask]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = (states(m, **inputs)[mask] for m in (model, with_leafkern(model)))
    assert mine.dtype == theirs.dtype
    assert relative(mine, right) <= 2 * relative(theirs, right)


class Calls(TorchDispatchMode):
    """How often each operation of torch is called."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "kinds"), [("bert", 1), ("modernbert", 2), ("qwen2", 1), ("mistral sliding", 1)])
def test_places_are_found_once_per_forward(name, kinds):
    model, (ids, mask) = with_leafkern(make(name, num_hidden_layers=4)), batch()
    with torch.no_grad(), Calls() as calls:
        states(model, input_ids=ids, attention_mask=mask.long())
    assert calls.count["nonzero_static"] == kinds
    assert calls.count["index_copy_"] == 4
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, flat(ids, mask)):
        with torch.no_grad(), Calls() as calls:
            states(model, **inputs)
        assert not calls.count.keys() & {"nonzero_static", "index_copy_", "nonzero"}


def layer(**attributes):
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_rows_of_padding_are_zero():
    mask = batch("left")[1]
    q = torch.randn(4, LONGEST, 2, 8).transpose(1, 2).requires_grad_()
    packing = integration.mask(4, LONGEST, mask, allow_is_bidirectional_skip=True)
    out, weights = integration.attention(layer(is_causal=False), q, q, q, packing)
    assert weights is None
    assert out.shape == (4, LONGEST, 2, 8)
    assert (out[~mask] == 0).all()
    assert not (out[mask] == 0).any()
    out.sum().backward()
    assert (q.grad.transpose(1, 2)[~mask] == 0).all()


def test_without_padding_nothing_is_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(integration, "varlen_attention", lambda q, k, v, *_, **__: seen.extend((q, k, v)) or q)
    qkv = torch.randn(4, LONGEST, 3, 2, 8).unbind(2)
    integration.attention(layer(is_causal=False), *(x.transpose(1, 2) for x in qkv), None)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in qkv]
    assert all(x.shape == (4 * LONGEST, 2, 8) for x in seen)


def test_without_a_mask_the_layer_decides():
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    ahead = torch.arange(7) - torch.arange(7)[:, None]
    for causal, window, given in [(True, None, None), (True, 3, None), (False, 3, None), (True, None, False)]:
        seen = torch.ones(7, 7, dtype=torch.bool)
        if causal and given is None:
            seen &= ahead <= 0
        if window is not None:
            seen &= ahead.abs() < window
        module = layer(is_causal=causal)
        found, _ = integration.attention(module, q, k, v, None, is_causal=given, sliding_window=window, scaling=0.3)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3)
        assert relative(found, expected.transpose(1, 2)) <= TOLERANCE[torch.float32]


def test_the_mask_may_be_less_causal_than_the_layer():
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    for options, seen in [
        ({"allow_is_bidirectional_skip": True}, torch.ones(7, 7)),
        ({"allow_is_causal_skip": True}, torch.ones(7, 7).tril()),
    ]:
        packing = integration.mask(2, 7, None, device=q.device, **options)
        found, _ = integration.attention(layer(is_causal=True), q, k, v, packing)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen.bool())
        assert relative(found, expected.transpose(1, 2)) <= TOLERANCE[torch.float32]


def test_without_the_longest_length():
    model, (ids, mask) = with_leafkern(make("bert")), batch()
    given = flat(ids, mask)
    expected = states(model, **given)
    for longest in (None, torch.tensor(LONGEST)):
        torch.testing.assert_close(states(model, **given | {"max_length_q": longest}), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointed_gradients(reentrant):
    model, (ids, mask) = with_leafkern(make("bert")).train(), batch()
    embedded = torch.randn(*ids.shape, 32, requires_grad=True)
    inputs = {"inputs_embeds": embedded, "attention_mask": mask.long()}
    weights = torch.randn(sum(LENGTHS), 32)
    expected = gradients(model, states(model, **inputs)[mask], weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, states(model, **inputs)[mask], weights), expected)


@pytest.mark.parametrize("name", ["bert", "mistral sliding"])
def test_compiled_without_padding(name):
    model, (ids, mask) = with_leafkern(make(name)), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(states(compiled, **flat(ids, mask)), states(model, **flat(ids, mask)))
        if name == "bert":
            torch.testing.assert_close(states(compiled, input_ids=ids), states(model, input_ids=ids))


def test_dropout_in_training_is_refused():
    model, (ids, _) = with_leafkern(make("bert", attention_probs_dropout_prob=0.1)), batch()
    states(model, input_ids=ids)
    with pytest.raises(InputError, match=r"dropout: 0\.1; leafkern attention has none: set attention_dropout"):
        states(model.train(), input_ids=ids)


def test_generation_is_refused():
    model, (ids, _) = with_leafkern(make("qwen2")), batch()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="key: 14 rows for 1 queries; leafkern attention is for encoders"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_cross_attention_is_refused():
    model = make("bert", is_decoder=True, add_cross_attention=True)
    ids, _ = batch()
    with pytest.raises(InputError, match="with cross-attention"):
        with_leafkern(model)(input_ids=ids, encoder_hidden_states=torch.randn(4, LONGEST, 32), use_cache=False)


def test_other_masks_are_refused():
    model, (ids, mask) = with_leafkern(make("bert")), batch()
    with pytest.raises(InputError, match=r"attention_mask: Tensor of shape \(4, 1, 13, 13\); expected the \(B, L\)"):
        states(model, input_ids=ids, attention_mask=torch.zeros(4, 1, LONGEST, LONGEST))
    with pytest.raises(InputError, match="cu_seq_lens_q: given beside an attention_mask with padding"):
        states(model, input_ids=ids, attention_mask=mask.long(), cu_seq_lens_q=bounds(LENGTHS))
    model = with_leafkern(make("qwen2"))
    with pytest.raises(InputError, match="position_ids: several sequences in one row"):
        states(model, input_ids=ids[:1], position_ids=(torch.arange(LONGEST) % 5)[None])
    attend = layer(is_causal=True)
    q = torch.randn(1, 2, 4, 8)
    options = {"allow_is_causal_skip": True, "device": q.device}
    for more in ({"allow_is_causal_skip": False, "use_vmap": True}, {"local_size": 2}):
        packing = integration.mask(1, 4, None, **options | more)
        with pytest.raises(InputError, match="attention_mask: a pattern of the model's own"):
            integration.attention(attend, q, q, q, packing)
    packing = integration.mask(1, 4, torch.ones(1, 3, dtype=torch.bool), **options)
    with pytest.raises(InputError, match=r"attention_mask: shape \(1, 3\); expected \(1, 4\)"):
        integration.attention(attend, q, q, q, packing)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask", "cache"])
def test_what_it_does_not_compute_is_refused(name):
    q = torch.randn(1, 2, 4, 8)
    integration.attention(layer(is_causal=False), q, q, q, None, **{name: None})
    with pytest.raises(InputError, match=f"{name}: leafkern attention has no"):
        integration.attention(layer(is_causal=False), q, q, q, None, **{name: torch.ones(1)})


def test_weights_are_refused():
    model, (ids, _) = with_leafkern(make("bert")), batch()
    with pytest.raises(InputError, match="output_attentions: leafkern attention has no returned weights"):
        states(model, input_ids=ids, output_attentions=True)
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 3


def test_registered_twice():
    integration.register()
    integration.register()
    assert make("bert").set_attn_implementation("leafkern") is None


# patch

REPLACED = {
    "bert": ["attention eager by leafkern", "LayerNorm by add_norm"]
    + ["BertSelfOutput by dense_add_norm", "BertIntermediate by dense_bias_gelu", "BertOutput by dense_add_norm"] * 2,
    "modernbert": ["attention eager by leafkern"] + ["LayerNorm by add_norm"] * 5 + ["GELU by bias_gelu"] * 2,
    "qwen2": ["attention eager by leafkern"]
    + ["Qwen2RMSNorm by add_norm"] * 5
    + ["Qwen2Attention by rotary_attention"] * 2,
    "mistral sliding": ["attention eager by leafkern"]
    + ["MistralRMSNorm by add_norm"] * 5
    + ["MistralAttention by rotary_attention"] * 2,
    # Its RMSNorm multiplies by 1 + weight.
    "gemma3": ["attention eager by leafkern"] + ["GELU by bias_gelu"] * 2,
}


def attributes(model):
    return {path: dict(vars(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize("name", REPLACED)
def test_patched_equals_eager(name):
    model, (ids, mask) = make(name), batch()
    other = copy.deepcopy(model)
    before, names = attributes(other), list(other.state_dict())
    patch = leafkern.patch(other)
    lines = (line.split(": ")[1] for line in patch.replaced)
    assert Counter(re.sub("^.*GELU.* by", "GELU by", line) for line in lines) == Counter(REPLACED[name])
    assert list(other.state_dict()) == names
    for way in ("right", "flat"):
        given = flat(ids, mask) if way == "flat" else {"input_ids": ids, "attention_mask": mask.long()}
        assert_equal(model, other, ids, mask, given, torch.float32)
    patch.undo()
    patch.undo()
    assert patch.replaced == []
    after = attributes(other)
    assert {path: found.keys() for path, found in after.items()} == {path: had.keys() for path, had in before.items()}
    assert other.config._attn_implementation == "eager"


def test_patched_in_half_precision_and_under_autocast():
    exact, (ids, mask) = make("bert"), batch()
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    right = states(exact, **inputs)[mask]
    for model, autocast in ((copy.deepcopy(exact).bfloat16(), False), (exact, True)):
        other = copy.deepcopy(model)
        leafkern.patch(other)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            theirs, mine = (states(m, **inputs)[mask] for m in (model, other))
        assert mine.dtype == theirs.dtype
        assert relative(mine, right) <= 2 * relative(theirs, right)


def test_patched_norm_returns_the_dtype_it_had():
    model, x = make("qwen2"), torch.randn(2, 3, 32, dtype=torch.bfloat16)
    expected = model.norm(x)
    with leafkern.patch(model):
        found = model.norm(x)
    assert found.dtype == expected.dtype == torch.float32
    assert relative(found, expected) <= TOLERANCE[torch.bfloat16]


def test_patched_models_within_a_model():
    small = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    vision = small | {"intermediate_size": 48, "image_size": 16, "patch_size": 8}
    text = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    inputs = {"input_ids": batch()[0], "pixel_values": torch.randn(4, 3, 16, 16)}
    expected = model(**inputs).logits_per_image
    configs = (model.config, model.config.text_config, model.config.vision_config)
    with leafkern.patch(model) as patch:
        assert patch.replaced[0] == "model: attention eager by leafkern"
        assert [config._attn_implementation for config in configs] == ["leafkern"] * 3
        assert relative(model(**inputs).logits_per_image, expected) <= TOLERANCE[torch.float32]
    assert [config._attn_implementation for config in configs] == ["eager"] * 3
    assert torch.equal(model(**inputs).logits_per_image, expected)


def test_patched_with_dropout_outside_of_attention():
    model, (ids, mask) = make("bert", hidden_dropout_prob=0.3).train(), batch()
    other = copy.deepcopy(model)
    leafkern.patch(other)
    found = []
    for m in (model, other):
        torch.manual_seed(0)
        found.append(states(m, input_ids=ids, attention_mask=mask.long())[mask])
    assert relative(found[1], found[0]) <= TOLERANCE[torch.float32]


def test_patched_copies_and_files(tmp_path):
    model, (ids, mask) = make("bert"), batch()
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    expected = states(model, **inputs)
    patch = leafkern.patch(model)
    found = states(model, **inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(states(other, **inputs), found)
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        assert torch.equal(states(model, **inputs), found)
        assert not torch.equal(states(other, **inputs), found)
        other._leafkern_patch.undo()
        assert "forward" not in vars(other.embeddings.LayerNorm)
    assert "forward" in vars(model.embeddings.LayerNorm)
    model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(states(opened, **inputs), expected)
    patch.undo()
    assert torch.equal(states(model, **inputs), expected)


def test_patched_and_compiled():
    model, (ids, mask) = make("bert"), batch()
    with leafkern.patch(model), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(states(compiled, **flat(ids, mask)), states(model, **flat(ids, mask)))
    assert "_leafkern_patch" not in vars(model)


def test_patch_leaves_alone_what_others_changed():
    model, (ids, _) = make("bert"), batch()
    heard = []
    model.encoder.layer[0].output.LayerNorm.register_forward_hook(lambda *_: heard.append(1))
    model.embeddings.LayerNorm.forward = lambda x: x
    replaced = leafkern.patch(model).replaced
    assert not any(line.startswith(("embeddings.LayerNorm", "encoder.layer.0.output:")) for line in replaced)
    states(model, input_ids=ids)
    assert heard == [1]


def test_misuse_of_patch_is_named():
    model = make("bert")
    leafkern.patch(model)
    with pytest.raises(InputError, match="model: this BertModel is patched already"):
        leafkern.patch(model)
    with pytest.raises(InputError, match="model: Linear; expected a transformers PreTrainedModel"):
        leafkern.patch(torch.nn.Linear(2, 2))
    model = AutoModel.from_config(AutoConfig.for_model("mpnet", **SIZES))
    before = attributes(model)
    with pytest.raises(InputError, match="can't exchange the attention of MPNetModel"):
        leafkern.patch(model)
    assert attributes(model).keys() == before.keys()
    assert "_leafkern_patch" not in vars(model)


@pytest.mark.parametrize("name", ["qwen2", "mistral sliding"])
def test_a_patched_model_that_fills_a_cache_equals_eager(name):
    model, (ids, mask) = make(name), batch()
    expected = model(input_ids=ids, attention_mask=mask.long(), use_cache=True)
    leafkern.patch(model)
    found = model(input_ids=ids, attention_mask=mask.long(), use_cache=True)
    assert relative(found.last_hidden_state[mask], expected.last_hidden_state[mask]) <= TOLERANCE[torch.float32]
    assert found.past_key_values.get_seq_length() == LONGEST


def test_rotary_embeddings_of_neighbouring_pairs_stay(monkeypatch):
    from transformers.models.qwen2 import modeling_qwen2

    def neighbours(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    model, (ids, mask) = make("qwen2"), batch()
    monkeypatch.setattr(modeling_qwen2, "rotate_half", neighbours)
    given = {"input_ids": ids, "attention_mask": mask.long()}
    expected = states(model, **given)[mask]
    assert not any("rotary" in line for line in leafkern.patch(model).replaced)
    assert relative(states(model, **given)[mask], expected) <= TOLERANCE[torch.float32]


# Through Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter


@pytest.mark.interpreter
@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("way", ["right", "flat"])
def test_interpreted_kernels_equal_eager(way):
    pytest.importorskip("triton")
    config = BertConfig(**SIZES | WITHOUT_DROPOUT | {"hidden_size": 16, "num_attention_heads": 2})
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    ids = torch.randint(3, 99, mask.shape)
    given = flat(ids, mask) if way == "flat" else {"input_ids": ids, "attention_mask": mask.long()}
    other = copy.deepcopy(model)
    leafkern.patch(other)
    assert_equal(model, other, ids, mask, given, torch.float32)


@pytest.mark.interpreter
@pytest.mark.usefixtures("only_triton")
@pytest.mark.parametrize("way", ["right", "flat"])
@pytest.mark.parametrize("name", ["modernbert", "qwen2 bidirectional", "mistral sliding"])
def test_interpreted_kernels_of_other_families_equal_eager(name, way):
    pytest.importorskip("triton")
    model, (ids, mask) = make(name), batch()
    given = flat(ids, mask) if way == "flat" else {"input_ids": ids, "attention_mask": mask.long()}
    other = copy.deepcopy(model)
    leafkern.patch(other)
    assert_equal(model, other, ids, mask, given, torch.float32)
