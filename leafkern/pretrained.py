"""Models on disk: finding them, and reading and writing the sentence-transformers layout.

No pickle is read and no code from a model's folder is run.
"""

import dataclasses
import difflib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers
from torch import nn

from leafkern import __version__
from leafkern.errors import DamagedFileError, InputError
from leafkern.files import confined, read_json
from leafkern.nn import Dense, PackedConfig, PackedEncoder, SentenceModel, TransformersBackbone, activation_module

# Every weight file that isn't safetensors is left where it is: opening it would run a pickle.
_DOWNLOAD = ["*.json", "*.safetensors", "*.txt", "*.model"]
_DON_T_DOWNLOAD = ["onnx/*", "openvino/*", "data_config.json"]
# What sentence-transformers has no place for; it ignores the file.
_OWN_FILE = "leafkern.json"
_POOLING_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass
class Layout:
    """What the sentence-transformers files of a folder say; `pooling` is None where there are none."""

    backbone: Path
    pooling: str | None = None
    dense: tuple[Dense, ...] = ()
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    aligned_with: str | None = None


def locate(name_or_path: str | Path) -> Path:
    """The folder of a local model, or of a hub model downloaded (or found) in Hugging Face's cache."""
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"model: {name} is a file; expected the folder of a model or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"model: there is no folder {name}{_nearest_folder(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOAD, ignore_patterns=_DON_T_DOWNLOAD))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model: found neither a folder {name!r} nor a hub model of that id{_nearest_folder(path)}. "
            f"A hub id looks like 'sentence-transformers/all-MiniLM-L6-v2'. The hub said: {reason}"
        ) from None


def _nearest_folder(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        names = []
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / nearest[0]}?" if nearest else ""


def read_layout(folder: Path) -> Layout:
    """Reads modules.json and the files it names; unsupported modules and pooling modes are refused by name."""
    if not (folder / "modules.json").exists():
        return Layout(folder)
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        steps = [(entry["type"].rpartition("."), entry["path"]) for entry in modules]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{folder / 'modules.json'}: not a readable list of modules ({error})") from None
    kinds = [
        kind if package.startswith("sentence_transformers.") else f"{package}.{kind}" for (package, _, kind), _ in steps
    ]
    order = "".join(
        {"Transformer": "T", "Pooling": "P", "Dense": "D", "Normalize": "N"}.get(kind, "?") for kind in kinds
    )
    if not re.fullmatch("TPD*N?", order):
        raise InputError(
            f"{folder / 'modules.json'}: the modules are {', '.join(kinds) or 'missing'}; "
            "expected Transformer, Pooling, any number of Dense, and at most one Normalize, in this order"
        )
    folders = [confined(folder, path) if path else folder for _, path in steps]
    layout = Layout(folders[0], pooling=_read_pooling(folders[1]), normalize=order.endswith("N"))
    layout.dense = tuple(_read_dense(path) for path, kind in zip(folders, kinds, strict=True) if kind == "Dense")
    if (folders[0] / "sentence_bert_config.json").exists():
        config = read_json(folders[0] / "sentence_bert_config.json", "sentence_bert_config.json")
        layout.max_length, layout.lowercase = config.get("max_seq_length"), bool(config.get("do_lower_case"))
    if (folder / "config_sentence_transformers.json").exists():
        config = read_json(folder / "config_sentence_transformers.json", "config_sentence_transformers.json")
        layout.prompts = {name: text or "" for name, text in (config.get("prompts") or {}).items()}
        layout.default_prompt = config.get("default_prompt_name")
    if (folder / _OWN_FILE).exists():
        layout.aligned_with = read_json(folder / _OWN_FILE, _OWN_FILE).get("aligned_with")
    return layout


def _read_pooling(folder: Path) -> str:
    config = read_json(folder / "config.json", "Pooling config")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING_MODES:
        raise InputError(
            f"{folder}: pooling {'+'.join(modes)} is not supported; supported: {', '.join(_POOLING_MODES)}"
        )
    if not config.get("include_prompt", True):
        raise InputError(f"{folder}: pooling that leaves out the prompt (include_prompt: false) is not supported")
    return _POOLING_MODES[modes[0]]


def _read_dense(folder: Path) -> Dense:
    config = read_json(folder / "config.json", "Dense config")
    if not all(isinstance(config.get(key), int) for key in ("in_features", "out_features")):
        raise DamagedFileError(f"{folder / 'config.json'}: no in_features or out_features; expected a Dense config")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise InputError(f"{folder}: {key} {config[key]!r} is not supported; expected 'sentence_embedding'")
    head = Dense(
        config["in_features"],
        config["out_features"],
        bias=config.get("bias", True),
        activation=activation_module(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
        use_residual=config.get("use_residual", False),
    )
    load_weights(head, read_weights(folder), folder)
    return head


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        names = sorted(set(read_json(index, "safetensors index").get("weight_map", {}).values()))
        # Not `confined`: in Hugging Face's cache each of these files is a link to a blob outside the folder.
        if strange := [name for name in names if Path(name).name != name]:
            raise DamagedFileError(f"{index}: names {strange[0]!r}, which is not a file of this folder")
        files = [folder / name for name in names]
    elif (folder / "pytorch_model.bin").exists():
        raise InputError(
            f"model: {folder} has only pytorch_model.bin, a pickle, which leafkern never opens; save the model once "
            "with transformers (save_pretrained writes model.safetensors) or take a revision that has safetensors"
        )
    else:
        raise InputError(f"model: there is no model.safetensors in {folder}; expected the folder of a model")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{file}: not a readable safetensors file ({error})") from None
    return tensors


def load_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Copies `tensors` into the parameters of the same names; a missing one or a wrong shape is named."""
    expected = module.state_dict()
    for name, parameter in expected.items():
        if name not in tensors:
            raise InputError(f"model: {where} has no weights {name!r}; is its config.json of another model?")
        if tensors[name].shape != parameter.shape:
            found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
            raise InputError(f"model: {where}: {name} has shape {found}; config.json says {wanted}")
    module.load_state_dict({name: tensors[name] for name in expected})


def _bert_name(name: str) -> str:
    """The parameter name of today for one in an old checkpoint."""
    name = name.removeprefix("bert.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def load_backbone(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A PackedEncoder for the BERT family, a TransformersBackbone for any other."""
    if not (folder / "config.json").exists():
        raise InputError(f"model: there is no config.json in {folder}; expected the folder of a model")
    config = read_json(folder / "config.json", "model config")
    if not PackedConfig.serves(config):
        positions = config.get("position_embedding_type", "absolute")
        if config.get("model_type") == "bert" and positions != "absolute":
            # transformers would run such a model as if its positions were absolute, with wrong vectors.
            raise InputError(f"model: {folder}: position_embedding_type {positions!r} is not supported for BERT")
        if not any(folder.glob("*.safetensors")):
            read_weights(folder)  # says what is missing
        return TransformersBackbone.from_folder(folder, dtype)
    with torch.device("meta"):
        backbone = PackedEncoder(PackedConfig.from_dict(config))
    backbone = backbone.to_empty(device="cpu").to(dtype)
    tensors = {_bert_name(name): tensor for name, tensor in read_weights(folder).items()}
    load_weights(backbone, tensors, folder)
    return backbone


def load_tokenizer(folder: Path, *, fast: bool, lowercase: bool) -> tuple[Tokenizer, dict]:
    """The tokenizer, without padding or truncation, and the contents of its tokenizer_config.json.

    fast: read tokenizer.json as it stands; otherwise, or where it is missing, transformers builds the tokenizer
    (from vocab.txt, or with what a family's tokenizer class adds). lowercase: lower-case texts first.
    """
    needed = ("tokenizer.json", "tokenizer_config.json")
    if not (fast and all((folder / name).exists() for name in needed)):
        from transformers import AutoTokenizer

        try:
            built = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"model: no tokenizer can be read from {folder}: {error}") from None
        if not built.is_fast:
            raise InputError(f"model: the tokenizer of {folder} has no tokenizers-library form (tokenizer.json)")
        with tempfile.TemporaryDirectory() as temporary:
            built.save_pretrained(temporary)
            return load_tokenizer(Path(temporary), fast=True, lowercase=lowercase)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DamagedFileError(f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    normalizer = tokenizer.normalizer
    if lowercase and '"type":"Lowercase"' not in tokenizer.to_str() and not getattr(normalizer, "lowercase", False):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([normalizer] if normalizer else [])])
    config = read_json(folder / "tokenizer_config.json", "tokenizer config")
    special = folder / "special_tokens_map.json"
    config = (read_json(special, "special tokens map") if special.exists() else {}) | config
    for local in ("name_or_path", "special_tokens_map_file", "tokenizer_file", "is_local", "local_files_only"):
        config.pop(local, None)
    return tokenizer, config


def write_layout(
    folder: Path,
    module: SentenceModel,
    tokenizer: Tokenizer,
    tokenizer_config: Mapping,
    *,
    max_length: int,
    lowercase: bool,
    prompts: Mapping[str, str],
    default_prompt: str | None,
    aligned_with: str | None,
) -> None:
    """Writes everything into an existing folder; the caller makes that atomic."""

    def put(name: str, value: object) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    backbone = module.backbone
    if isinstance(backbone, PackedEncoder):
        put("config.json", backbone.config.to_dict())
        _write_weights(folder, backbone)
    else:
        backbone.model.save_pretrained(folder)
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    whole.save(str(folder / "tokenizer.json"))
    put("tokenizer_config.json", {**tokenizer_config, "model_max_length": max_length})
    put("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lowercase})

    modes = {ours: theirs for theirs, ours in _POOLING_MODES.items()}
    pooling = {"word_embedding_dimension": module.width}
    pooling |= {key: mode == modes[module.pooling] for key, mode in _LEGACY_POOLING.items()}
    put("1_Pooling/config.json", {**pooling, "include_prompt": True})
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for head in module.dense:
        path = f"{len(steps)}_Dense"
        put(f"{path}/config.json", head.config())
        _write_weights(folder / path, head)
        steps.append((path, "Dense"))
    if module.normalize:
        steps.append((f"{len(steps)}_Normalize", "Normalize"))
        (folder / steps[-1][0]).mkdir()
    # The short type names are those that sentence-transformers 5 writes and 6 still opens.
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (path, kind) in enumerate(steps)
    ]
    put("modules.json", modules)
    versions = {"leafkern": __version__, "pytorch": torch.__version__}
    prompts = {"prompts": dict(prompts), "default_prompt_name": default_prompt}
    put("config_sentence_transformers.json", {"__version__": versions, **prompts, "similarity_fn_name": "cosine"})
    if aligned_with is not None:
        put(_OWN_FILE, {"aligned_with": aligned_with})


def _write_weights(folder: Path, module: nn.Module) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
