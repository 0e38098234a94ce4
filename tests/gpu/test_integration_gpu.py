"""leafkern's attention and patch in transformers' models on a GPU: eager's states, no waiting for the host, capture."""

import copy
import warnings

import pytest
import torch
from compare import bounds, relative
from tolerances import TOLERANCE

pytest.importorskip("triton")
from transformers import BertConfig, BertModel, MistralConfig, MistralModel

import leafkern
from leafkern.integrations.transformers import NAME

pytestmark = pytest.mark.gpu

LENGTHS = [37, 200, 1, 90, 0, 128]
SIZES = {"vocab_size": 500, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 512}


def make(name):
    if name == "bert":
        config = BertConfig(**SIZES, hidden_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = BertModel(config, add_pooling_layer=False)
    else:
        model = MistralModel(MistralConfig(**SIZES, hidden_size=768, num_key_value_heads=4, sliding_window=50))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # The default initialisation is so small that attention hardly matters.
            parameter.data.mul_(3)
    model.set_attn_implementation("eager")
    return model.cuda().eval()


def inputs():
    """A padded batch, the places of its tokens, and the same without padding."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 500, mask.shape)
    unpadded = {
        "input_ids": ids[mask][None],
        "position_ids": torch.arange(mask.shape[1]).expand_as(mask)[mask][None],
        "cu_seq_lens_q": bounds(LENGTHS),
        "max_length_q": max(LENGTHS),
    }
    padded = {"input_ids": ids, "attention_mask": mask.long()}
    padded, unpadded = (
        {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in way.items()} for way in (padded, unpadded)
    )
    return padded, mask.cuda(), unpadded


def states(model, given, mask):
    found = model(**given, use_cache=False).last_hidden_state
    return found[0] if "cu_seq_lens_q" in given else found[mask]


def gradient(model, out, weights):
    model.zero_grad()
    (out * weights).sum().backward()
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_states_and_gradients_equal_eager(name, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", "attention=triton")
    exact = make(name)
    padded, mask, unpadded = inputs()
    right = states(exact, padded, mask)
    weights = torch.randn_like(right)
    right_gradient = gradient(exact, right, weights)
    half = copy.deepcopy(exact).bfloat16()
    theirs = states(half, padded, mask)
    error, gradient_error = relative(theirs, right), relative(gradient(half, theirs, weights), right_gradient)
    for model, near, gradient_near in [
        (exact, TOLERANCE[torch.float32], TOLERANCE[torch.float32]),
        (half, 2 * error, 2 * gradient_error),
    ]:
        with leafkern.patch(model):
            for given in (padded, unpadded):
                mine = states(model, given, mask)
                assert relative(mine, right) <= near
                assert relative(gradient(model, mine, weights), right_gradient) <= gradient_near


@pytest.fixture
def waits():
    """Counts the host's waits for the GPU inside."""

    def count(function):
        function()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    return count


def test_the_host_waits_once_with_padding_and_never_without(waits, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", "attention=triton")
    model = make("bert").bfloat16()
    model.set_attn_implementation(NAME)
    padded, _, unpadded = inputs()
    with torch.no_grad():
        assert waits(lambda: model(**padded)) == 1
        assert waits(lambda: model(**unpadded)) == 0
        assert waits(lambda: model(input_ids=padded["input_ids"])) == 0


def test_under_graph_capture(monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", "attention=triton")
    model = make("bert").bfloat16()
    _, mask, unpadded = inputs()
    with torch.no_grad(), leafkern.patch(model):
        expected = states(model, unpadded, mask).clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            states(model, unpadded, mask)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = states(model, unpadded, mask)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)
