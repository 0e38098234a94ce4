"""The Encoder against sentence-transformers, on disk and in memory, and its errors."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from leafkern import Encoder, encode, files
from leafkern.errors import DamagedFileError, InputError
from leafkern.nn import TransformersBackbone, pack
from leafkern.ops import quantize

TEXTS = [
    "the leaf kernel is a list of files",
    "",
    "How to search a vector in python? Use the index; it's quick (and exact).",
    "a",
    "naïve café, 漢字 テスト 😀 \u200b\x00 \ufffd",
    "line one\nline two\tand a tab",
    "leaf " * 60,
    "   ",
]
LONG = "every kernel and every leaf " * 2500


def opened(path, **options):
    return Encoder.from_pretrained(path, device="cpu", **options)


def theirs(path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu")


def close(found, expected, limit=2e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit


@pytest.fixture(scope="module")
def tiny(tiny_bert):
    return opened(tiny_bert)


@pytest.fixture
def tiny_copy(tiny_bert, tmp_path):
    return shutil.copytree(tiny_bert, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_minilm_equals_sentence_transformers(minilm, tmp_path):
    encoder, texts = opened(minilm), [*TEXTS, LONG]
    with pytest.warns(UserWarning, match="1 of 9 texts are longer than max_length = 256"):
        found = encoder.encode(texts)
    close(found, theirs(minilm).encode(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([LONG])
    student = Encoder.from_layers(encoder, [0, 2, 5], dense_out=48)
    student.save_pretrained(tmp_path / "student")
    vectors = student.encode(TEXTS)
    assert np.array_equal(opened(tmp_path / "student").encode(TEXTS), vectors)
    close(theirs(tmp_path / "student").encode(TEXTS), vectors)


def heads(activation, normalize, width=32):
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    modules = [Dense(width, 12, bias=False, activation_function=activation), Dense(12, 10, use_residual=True)]
    return [*modules, Normalize()] if normalize else modules


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.GELU(), None])
def test_reads_and_writes_what_sentence_transformers_does(tiny_bert, tmp_path, pooling, normalize, activation):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [theirs(tiny_bert)[0], Pooling(32, pooling), *(heads(activation, normalize) if activation else [])]
    prompts = {"query": "how to ", "document": ""}
    reference = SentenceTransformer(modules=modules, device="cpu", prompts=prompts, default_prompt_name="query")
    reference.save(str(tmp_path / "theirs"))
    encoder = opened(tmp_path / "theirs")
    expected = reference.encode(TEXTS)
    found = encoder.encode(TEXTS, normalize=False)
    close(found, expected)
    assert encoder.dim == expected.shape[1]
    encoder.save_pretrained(tmp_path / "ours")
    again = opened(tmp_path / "ours")
    assert np.array_equal(again.encode(TEXTS, normalize=False), found)
    assert again.fingerprint == encoder.fingerprint
    assert (again.prompts, again.default_prompt, again.max_length) == (prompts, "query", 64)
    close(theirs(tmp_path / "ours").encode(TEXTS), found)
    close(theirs(tmp_path / "ours").encode(TEXTS, prompt=""), encoder.encode(TEXTS, prompt_text="", normalize=False))


def test_old_pooling_config_without_a_mode_is_mean(tiny_copy, tiny):
    (tiny_copy / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    assert np.array_equal(opened(tiny_copy).encode(TEXTS), tiny.encode(TEXTS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "max"}, "pooling max is not supported; supported: cls, mean, lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, r"pooling cls\+mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "pooling weightedmean"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
    ],
)
def test_unsupported_pooling_is_refused_by_name(tiny_copy, config, message):
    (tiny_copy / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        opened(tiny_copy)


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer", "Normalize"],
        ["Transformer", "Pooling", "Normalize", "Dense"],
        ["Transformer", "Pooling", "LayerNorm"],
        [],
    ],
)
def test_unsupported_modules_are_refused_by_name(tiny_copy, kinds):
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
    (tiny_copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=f"the modules are {', '.join(kinds) or 'missing'}; expected Transformer"):
        opened(tiny_copy)


def test_code_of_the_model_is_not_run(tiny_copy):
    modules = json.loads((tiny_copy / "modules.json").read_text())
    modules[0]["type"] = "custom_code.Transformer"
    (tiny_copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"custom_code\.Transformer"):
        opened(tiny_copy)


@pytest.mark.parametrize("file", ["modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json"])
def test_damaged_files_are_named(tiny_copy, file):
    (tiny_copy / file).write_text("{ not json")
    with pytest.raises(DamagedFileError, match=file.split("/")[-1]):
        opened(tiny_copy)


def test_truncated_weights_are_named(tiny_copy):
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        opened(tiny_copy)


def test_weights_of_another_config_are_named(tiny_copy):
    edit_json(tiny_copy / "config.json", num_hidden_layers=5)
    with pytest.raises(InputError, match=r"no weights 'encoder\.layer\.4"):
        opened(tiny_copy)
    edit_json(tiny_copy / "config.json", num_hidden_layers=4, intermediate_size=65)
    with pytest.raises(InputError, match=r"has shape \(64, 32\); config.json says \(65, 32\)"):
        opened(tiny_copy)


def test_old_checkpoints_with_a_prefix_gamma_beta_and_buffers(tiny_copy, tiny):
    weights = {}
    for name, tensor in load_file(tiny_copy / "model.safetensors").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[f"bert.{name}"] = tensor
    weights |= {"bert.embeddings.position_ids": torch.arange(64)[None], "cls.predictions.bias": torch.zeros(3)}
    save_file(weights, tiny_copy / "model.safetensors")
    assert np.array_equal(opened(tiny_copy).encode(TEXTS), tiny.encode(TEXTS))


def test_sharded_weights(tiny_copy, tiny, tmp_path):
    weights = load_file(tiny_copy / "model.safetensors")
    (tiny_copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        # Links out of the folder, as in Hugging Face's cache.
        save_file({name: weights[name] for name in held}, tmp_path / file)
        (tiny_copy / file).symlink_to(tmp_path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(opened(tiny_copy).encode(TEXTS), tiny.encode(TEXTS))
    index["weight_map"][names[0]] = "../../elsewhere.safetensors"
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFileError, match="not a file of this folder"):
        opened(tiny_copy)


@pytest.mark.parametrize("kind", ["alibi", "relative_key"])
def test_position_schemes_that_would_be_dropped_silently_are_refused(tiny_copy, kind):
    edit_json(tiny_copy / "config.json", position_embedding_type=kind)
    with pytest.raises(InputError, match=f"position_embedding_type '{kind}' is not supported"):
        opened(tiny_copy)


def test_weights_missing_from_another_family_are_named(tiny_copy):
    from transformers import AutoModel, RobertaConfig

    sizes = {"vocab_size": 200, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModel.from_config(RobertaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tiny_copy)
    edit_json(tiny_copy / "config.json", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"no weights .*encoder\.layer\.1"):
        opened(tiny_copy)


def test_dense_without_its_sizes_is_named(tiny_copy):
    modules = json.loads((tiny_copy / "modules.json").read_text())
    modules.insert(2, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (tiny_copy / "modules.json").write_text(json.dumps(modules))
    (tiny_copy / "2_Dense").mkdir()
    (tiny_copy / "2_Dense" / "config.json").write_text('{"in_features": 32}')
    with pytest.raises(DamagedFileError, match="out_features"):
        opened(tiny_copy)


def test_pickled_weights_are_refused(tiny_copy):
    (tiny_copy / "model.safetensors").rename(tiny_copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin, a pickle.*save_pretrained"):
        opened(tiny_copy)


def test_plain_bert_is_pooled_by_the_mean_with_a_warning(tiny_copy, tiny):
    (tiny_copy / "modules.json").unlink()
    with pytest.warns(UserWarning, match=r"no modules\.json: mean pooling"):
        plain = opened(tiny_copy)
    close(plain.encode(TEXTS), tiny.encode(TEXTS))
    assert not plain.module.normalize
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(tiny_copy, pooling="cls").module.pooling == "cls"


def test_vocabulary_alone_makes_a_tokenizer(tiny_copy, tiny):
    vocab = sorted(tiny.tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tiny_copy / "vocab.txt").write_text("\n".join(token for token, _ in vocab) + "\n", encoding="utf-8")
    (tiny_copy / "tokenizer.json").unlink()
    edit_json(tiny_copy / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    for mine, expected in zip(opened(tiny_copy).tokenize(TEXTS), tiny.tokenize(TEXTS), strict=True):
        assert np.array_equal(mine, expected)


def test_lower_casing_asked_for_by_the_transformer_config(tiny_copy, tiny):
    tokenizer = json.loads((tiny_copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (tiny_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not np.array_equal(opened(tiny_copy).tokenize(["THE Leaf"])[0], tiny.tokenize(["the leaf"])[0])
    edit_json(tiny_copy / "sentence_bert_config.json", do_lower_case=True)
    assert np.array_equal(opened(tiny_copy).tokenize(["THE Leaf"])[0], tiny.tokenize(["the leaf"])[0])


@pytest.mark.filterwarnings("ignore:.*longer than max_length")
@pytest.mark.parametrize("family", ["roberta", "modernbert", "qwen2"])
def test_other_families_run_through_transformers(tiny_copy, tmp_path, tiny, family):
    from transformers import AutoConfig, AutoModel

    sizes = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    more = {"num_key_value_heads": 1} if family == "qwen2" else {}
    config = AutoConfig.for_model(family, **sizes, **ends, **more, intermediate_size=32, max_position_embeddings=40)
    for name in ("config.json", "model.safetensors"):
        (tiny_copy / name).unlink()
    AutoModel.from_config(config).eval().save_pretrained(tiny_copy)
    edit_json(tiny_copy / "1_Pooling" / "config.json", embedding_dimension=16, pooling_mode="lasttoken")
    edit_json(tiny_copy / "sentence_bert_config.json", max_seq_length=32)
    encoder = opened(tiny_copy)
    assert isinstance(encoder.module.backbone, TransformersBackbone)
    found = encoder.encode(TEXTS, batch_tokens=64)
    close(found, theirs(tiny_copy).encode(TEXTS))
    encoder.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert np.array_equal(again.encode(TEXTS, batch_tokens=64), found)
    assert again.fingerprint == encoder.fingerprint
    encode._use_kernels(again.module.backbone)  # as from_pretrained does on a GPU
    assert again.module.backbone.model.config._attn_implementation == "leafkern"
    close(again.encode(TEXTS, batch_tokens=64), found)
    assert again.fingerprint == encoder.fingerprint
    again.save_pretrained(tmp_path / "again")
    assert np.array_equal(opened(tmp_path / "again").encode(TEXTS, batch_tokens=64), found)
    with pytest.raises(InputError, match="only a model of the BERT family"):
        Encoder.from_layers(encoder, [0])
    (tiny_copy / "modules.json").unlink()
    with pytest.raises(InputError, match="pooling='mean', 'cls' or 'last'"):
        opened(tiny_copy)
    assert opened(tiny_copy, pooling="last").dim == 16


def test_other_families_load_without_a_word(tiny_copy):
    from transformers import AutoModel, RobertaConfig

    sizes = {"vocab_size": 200, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModel.from_config(RobertaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tiny_copy)
    code = (
        f"from leafkern import Encoder\nEncoder.from_pretrained({str(tiny_copy)!r}, device='cpu', max_length=32)\n"
        "from transformers.utils import logging\nfrom huggingface_hub.utils import are_progress_bars_disabled\n"
        "print(logging.is_progress_bar_enabled(), are_progress_bars_disabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_a_family_with_attention_of_its_own_keeps_it():
    from transformers import MPNetConfig, MPNetModel

    sizes = {"vocab_size": 200, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = TransformersBackbone(MPNetModel(MPNetConfig(num_hidden_layers=1, **sizes)).eval())
    batch = pack([np.arange(5), np.arange(9)])
    before = backbone(batch)
    with pytest.warns(UserWarning, match="MPNetModel stays on transformers' own attention: .*can't exchange"):
        encode._use_kernels(backbone)
    assert torch.equal(backbone(batch), before)


def test_unknown_models(tiny_bert, tmp_path):
    with pytest.raises(InputError, match=f"no folder .*; did you mean {tiny_bert}"):
        opened(tiny_bert.parent / "modle")
    with pytest.raises(InputError, match="neither a folder 'nobody/nothing' nor a hub model"):
        opened("nobody/nothing")
    with pytest.raises(InputError, match=r"no config\.json in"):
        opened(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; expected the folder"):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling: unknown name 'max'"),
        ({"dtype": "float12"}, "dtype: unknown name 'float12'; did you mean 'float"),
        ({"compute": "bf16"}, "compute: unknown name 'bf16'"),
        ({"compute": "int8"}, "'int8' is not yet available"),
        (
            {"compute": "float32", "dtype": "bfloat16"},
            "compute: 'float32' can't serve bfloat16 weights; .*dtype='float32'",
        ),
        ({"compute": "float32", "dtype": torch.float64}, "compute: 'float32' can't serve float64 weights"),
        ({"compute": "float16", "dtype": "float64"}, "compute: 'float16' can't serve float64 weights"),
        ({"dim": 33}, "dim: 33 .* have 32 numbers"),
        ({"dim": 0}, "dim: 0"),
        ({"max_length": 65}, "max_length: 65; this model takes 3 to 64"),
        ({"max_length": 2}, "max_length: 2; this model takes 3 to 64"),
    ],
)
def test_wrong_options(tiny_bert, options, message):
    with pytest.raises(InputError, match=message):
        opened(tiny_bert, **options)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "meta", "cpu:x", "vulkan", 2.5])
def test_a_wrong_device_is_refused_before_anything_is_loaded(tmp_path, device):
    with pytest.raises(InputError, match=r"^device: .*; expected 'cpu'"):
        Encoder.from_pretrained(tmp_path / "no model", device=device)


def test_float32_arithmetic_with_float32_weights(tiny_bert, tiny):
    for dtype in (None, "float32", torch.float32):
        assert np.array_equal(opened(tiny_bert, dtype=dtype, compute="float32").encode(TEXTS), tiny.encode(TEXTS))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (None, {}, "texts: expected a str or a sequence of str, got NoneType"),
        (["a", None], {}, "texts: row 1 is NoneType, not str"),
        (["a", "b", 3], {}, "row 2 is int"),
        (["a", "\ud800"], {}, "row 1 holds a lone surrogate"),
        (["a"], {"prompt": "quary"}, "prompt: unknown name 'quary'; did you mean 'query'"),
        (["a"], {"prompt": "query", "prompt_text": "q: "}, "give one of the two"),
        (["a"], {"precision": "int7"}, "precision: unknown name 'int7'"),
        (["a"], {"precision": "fp8"}, "numpy has no fp8"),
        (["a"], {"output": "list"}, "output: unknown name 'list'"),
        (["a"], {"dim": 64}, "dim: 64 is not a width of this model, whose vectors have 32 numbers"),
        (["a"], {"batch_tokens": 0}, "batch_tokens"),
    ],
)
def test_wrong_calls(tiny_bert, texts, options, message):
    encoder = opened(tiny_bert, prompts={"query": "how to "})
    with pytest.raises(InputError, match=message):
        encoder.encode(texts, **options)


def test_order_and_batches_do_not_show(tiny):
    texts = [text for _ in range(5) for text in TEXTS]
    whole = tiny.encode(texts)
    for batch_tokens in (1, 30, 10**6):
        close(tiny.encode(texts, batch_tokens=batch_tokens), whole, 1e-6)
    order = np.random.permutation(len(texts))
    close(tiny.encode([texts[row] for row in order]), whole[order], 1e-6)


def test_batches_hold_every_row_once_within_the_budget(tiny):
    lengths = np.random.randint(0, 50, 200)
    found = tiny.batches(lengths, 100)
    assert sorted(np.concatenate(found)) == list(range(200))
    assert all(len(rows) * lengths[rows].max() <= 100 or len(rows) == 1 for rows in found[:-1])
    assert tiny.batches([], 100) == []


def test_texts_are_tokenised_in_blocks(tiny, monkeypatch):
    whole = tiny.tokenize(TEXTS, "how to ")
    monkeypatch.setattr("leafkern.encode._TOKENIZE_TEXTS", 3)
    assert all(np.array_equal(*pair) for pair in zip(tiny.tokenize(TEXTS, "how to "), whole, strict=True))
    with pytest.raises(InputError, match="row 7 holds a lone surrogate"):
        tiny.tokenize(["a"] * 7 + ["\ud800"])


def test_single_text_and_none(tiny):
    close(tiny.encode("a leaf"), tiny.encode(["a leaf"])[0], 1e-6)
    assert tiny.encode("a leaf").shape == (32,)
    assert tiny.encode([]).shape == (0, 32)
    assert tiny.encode(np.array(["a leaf", "kernel"])).shape == (2, 32)


def test_prompts(tiny_bert):
    encoder = opened(tiny_bert, prompts={"query": "how to "})
    literal = encoder.encode(["how to search"])
    assert np.array_equal(encoder.encode(["search"], prompt="query"), literal)
    assert np.array_equal(encoder.encode(["search"], prompt_text="how to "), literal)
    assert not np.array_equal(encoder.encode(["search"]), literal)
    encoder.default_prompt = "query"
    assert np.array_equal(encoder.encode(["search"]), literal)
    assert encoder.prompt_text(prompt_text="") == ""


def test_prefix_widths(tiny_bert, tiny):
    whole = tiny.encode(TEXTS)
    prefix = whole[:, :7]
    unit = prefix / np.linalg.norm(prefix, axis=1, keepdims=True)
    close(tiny.encode(TEXTS, dim=7), unit, 1e-6)
    close(tiny.encode(TEXTS, dim=7, normalize=False), prefix, 0)
    narrow = opened(tiny_bert, dim=7)
    assert narrow.dim == 7
    close(narrow.encode(TEXTS), unit, 1e-6)
    assert narrow.encode(TEXTS, dim=9).shape == (len(TEXTS), 9)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4", "binary", "ubinary"])
def test_precision_is_of_the_output(tiny, precision):
    vectors = tiny.encode(TEXTS, output="torch")
    expected = quantize(vectors, precision)
    found = tiny.encode(TEXTS, precision=precision, output="quantized")
    assert torch.equal(found.codes, expected.codes)
    assert (found.precision, found.dim) == (precision, 32)
    assert np.array_equal(tiny.encode(TEXTS, precision=precision), expected.codes.numpy())
    assert torch.equal(tiny.encode(TEXTS, precision=precision, output="torch"), expected.codes)


def test_vectors_may_be_targets_in_training(tiny):
    target = tiny.encode(TEXTS, output="torch")
    student = torch.randn_like(target).requires_grad_()
    (student * target).sum().backward()
    assert torch.equal(student.grad, target)


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_arithmetic(tiny_bert, tiny, compute):
    expected = tiny.encode(TEXTS)
    for encoder in (opened(tiny_bert, compute=compute), opened(tiny_bert, dtype=compute)):
        found = encoder.encode(TEXTS)
        assert found.dtype == np.float32
        assert (found * expected).sum(1).min() > 0.98
        assert not np.array_equal(found, expected)


def test_training_mode_comes_back(tiny_bert):
    encoder = opened(tiny_bert)
    assert not encoder.module.training
    encoder.module.train()
    encoder.encode(["a"])
    assert encoder.module.training


def test_progress_counts_rows(tiny, capsys):
    seen = []
    tiny.encode(TEXTS, batch_tokens=64, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert seen == sorted(seen)
    assert len(seen) > 1
    tiny.encode(TEXTS, progress=True)
    assert capsys.readouterr() == ("", "")


def test_from_layers_copies(tiny_bert):
    teacher = opened(tiny_bert, prompts={"query": "how to "})
    student = Encoder.from_layers(teacher, [0, 3])
    assert student.module.backbone.config.num_hidden_layers == 2
    for name, weights in student.module.backbone.state_dict().items():
        source = name.replace("layer.1.", "layer.3.")
        assert torch.equal(weights, teacher.module.backbone.state_dict()[source])
    assert (student.max_length, student.module.pooling) == (64, "mean")
    assert student.prompts == teacher.prompts
    before = teacher.encode(TEXTS)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.zero_()
    assert np.array_equal(teacher.encode(TEXTS), before)
    whole = Encoder.from_layers(teacher, [0, 1, 2, 3])
    assert np.array_equal(whole.encode(TEXTS), before)
    headed = Encoder.from_layers(teacher, [0], dense_out=20, max_length=16, normalize=False, prompts={})
    assert (headed.dim, headed.max_length, headed.module.normalize, headed.prompts) == (20, 16, False, {})
    assert headed.module.dense[0].linear.bias is None
    for wrong in ([], [4], [-1]):
        with pytest.raises(InputError, match="numbers from 0 to 3"):
            Encoder.from_layers(teacher, wrong)


def test_fingerprint(tiny_bert, tiny):
    encoder = opened(tiny_bert)
    assert encoder.fingerprint == tiny.fingerprint
    assert len(encoder.fingerprint) == 16
    assert opened(tiny_bert, max_length=32).fingerprint == tiny.fingerprint
    assert opened(tiny_bert, pooling="cls").fingerprint != tiny.fingerprint
    with torch.no_grad():
        encoder.module.backbone.embeddings.LayerNorm.bias[3] += 1e-3
    assert encoder.fingerprint != tiny.fingerprint


def test_a_crash_while_saving_leaves_the_model_that_stood_there(tiny_bert, tmp_path, monkeypatch):
    opened(tiny_bert).save_pretrained(tmp_path / "model")
    before = opened(tmp_path / "model").fingerprint
    student = Encoder.from_layers(opened(tiny_bert), [0])
    steps = []
    monkeypatch.setattr(files, "on_step", lambda step, path: steps.append(step))
    student.save_pretrained(tmp_path / "elsewhere")
    for last in range(steps.index("rename") + 1):
        left = iter(range(last))

        def crash(step, path, left=left):
            if next(left, None) is None:
                raise OSError("no space left on device")

        monkeypatch.setattr(files, "on_step", crash)
        with pytest.raises(OSError, match="no space"):
            student.save_pretrained(tmp_path / "model")
        assert opened(tmp_path / "model").fingerprint == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model"]


def test_every_public_name_resolves():
    import leafkern

    for owner in (leafkern, leafkern.ops):
        assert set(owner.__all__) <= set(dir(owner))
        for name in owner.__all__:
            assert getattr(owner, name) is not None


def test_import_is_lazy():
    code = "import sys, leafkern; print([m for m in ('torch', 'triton', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    code = (
        "import sys, leafkern.encode; print([m for m in ('transformers', 'sentence_transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_fingerprint_sees_a_fused_optimiser(tiny_copy):
    encoder = opened(tiny_copy)
    before, (weight, *_) = encoder.fingerprint, encoder.module.parameters()
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], fused=True).step()
    assert encoder.fingerprint != before


def test_blocks_made_ahead_come_in_order_and_fail_where_they_fail():
    def blocks():
        yield from ([1], [2, 3], [])
        raise InputError("texts: row 4")

    found = []
    with pytest.raises(InputError, match="row 4"):
        found.extend(encode._ahead(blocks()))
    assert found == [[1], [2, 3], []]
    assert list(encode._ahead(iter([]))) == []
