"""Texts to vectors: tokenise, sort by length, pack, run, pool, slice, quantise."""

import copy
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from leafkern.errors import InputError, unknown_name
from leafkern.files import atomic_folder
from leafkern.nn import Dense, GraphedModel, PackedBatch, PackedEncoder, SentenceModel, TransformersBackbone, pack
from leafkern.nn.packed import pinned
from leafkern.ops._core.normalize import normalize_rows
from leafkern.pretrained import load_backbone, load_tokenizer, locate, read_layout, write_layout
from leafkern.textio import is_unicode

COMPUTE = ("float32", "bfloat16", "float16", "int8")
OUTPUTS = ("numpy", "torch", "quantized")
_FLOATS = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# Tokens per batch: small batches stay in a CPU's caches; a GPU wants enough work for every launch.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 65536}
# Texts per call of the tokenizers library, whose result takes some kilobytes per text.
_TOKENIZE_TEXTS = 8192

Progress = bool | Callable[[int, int], None] | None


class Encoder:
    """A sentence-embedding model with its tokenizer: texts in, vectors out, order kept."""

    def __init__(
        self,
        module: SentenceModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        tokenizer_config: Mapping | None = None,
        lowercase: bool = False,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        compute: str | None = None,
        dim: int | None = None,
        name: str = "",
        aligned_with: str | None = None,
    ):
        least, most = tokenizer.num_special_tokens_to_add(False) + 1, module.backbone.max_length
        if max_length < least or (most is not None and max_length > most):
            raise InputError(f"max_length: {max_length}; this model takes {least} to {most or 'any number of'} tokens")
        if default_prompt is not None and default_prompt not in (prompts or {}):
            raise unknown_name("default_prompt", default_prompt, prompts or {})
        self.module = module
        self.tokenizer = tokenizer
        self.tokenizer_config = dict(tokenizer_config or {})
        self.lowercase = lowercase
        self.max_length = max_length
        self.prompts = dict(prompts or {})
        self.default_prompt = default_prompt
        self.compute = _checked_compute(compute, next(module.parameters()).dtype)
        self.name = name
        # Whose vectors this student learned to give (the teacher's fingerprint): it may query their indexes.
        self.aligned_with = aligned_with
        self._dim = None
        if dim is not None:
            self._dim = self._width(dim)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, direction=self.tokenizer_config.get("truncation_side", "right"))
        self._cut_reported = False
        self._fingerprint: tuple[object, str] = (None, "")
        self._graphed: GraphedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compute: str | None = None,
        pooling: str | None = None,
        dim: int | None = None,
        prompts: Mapping[str, str] | None = None,
        max_length: int | None = None,
    ) -> "Encoder":
        """Opens a model in the sentence-transformers layout, or a plain transformers model.

        name_or_path: a local folder or a hub id. device: the first GPU where there is one, otherwise the CPU.
        dtype: of the weights ("float32", the default, "bfloat16", "float16", "float64"). compute: arithmetic of
        `encode` where it differs from dtype ("float32", "bfloat16", "float16"), by autocast. pooling: "mean", "cls" or
        "last", over what the model's files say; without such files a BERT is pooled by the mean, with a warning, as
        sentence-transformers does, and any other family needs it. dim: prefix width of every vector (MRL). prompts:
        more prompts by name, over the model's own. max_length: tokens per text, otherwise the model's own limit.
        On a GPU a model of another family than BERT runs on `leafkern.patch`, if that gives the same states.
        Only safetensors are read; no code from the model's folder is run.
        Raises InputError where the model can't be found or isn't supported, or torch can't use the device here;
        DamagedFileError for unreadable files.
        """
        device = _checked_device(device)
        folder = locate(name_or_path)
        layout = read_layout(folder)
        backbone = load_backbone(layout.backbone, _checked_dtype(dtype))
        bert = isinstance(backbone, PackedEncoder)
        pooling = pooling or layout.pooling
        if pooling is None:
            if not bert:
                raise InputError(
                    f"pooling: {folder} has no sentence-transformers files to say how its tokens are pooled; "
                    "pass pooling='mean', 'cls' or 'last'"
                )
            pooling = "mean"
            warnings.warn(f"{folder} has no modules.json: mean pooling, no normalisation", stacklevel=2)
        module = SentenceModel(backbone, pooling=pooling, dense=layout.dense, normalize=layout.normalize)
        tokenizer, config = load_tokenizer(layout.backbone, fast=bert, lowercase=layout.lowercase)
        if max_length is None:
            limits = (layout.max_length or config.get("model_max_length"), backbone.max_length)
            max_length = int(min((limit for limit in limits if limit), default=512))
        module = module.to(device, _checked_dtype(dtype)).eval()
        if not bert and device.type == "cuda":
            _use_kernels(backbone)
        return cls(
            module,
            tokenizer,
            max_length=max_length,
            tokenizer_config=config,
            lowercase=layout.lowercase,
            prompts={**layout.prompts, **(prompts or {})},
            default_prompt=layout.default_prompt,
            compute=compute,
            dim=dim,
            name=str(name_or_path),
            aligned_with=layout.aligned_with,
        )

    @classmethod
    def from_layers(
        cls,
        teacher: "Encoder",
        layers: Sequence[int],
        *,
        dense_out: int | None = None,
        normalize: bool | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        prompts: Mapping[str, str] | None = None,
        dropout: float = 0.0,
    ) -> "Encoder":
        """A student made of copies of a BERT-family teacher's embeddings and chosen layers, counted from 0.

        Everything else is the teacher's unless given: tokenizer, pooling, max_length, prompts, heads, normalize.
        dense_out: one fresh Dense of this width, without bias or activation, instead of the teacher's heads (LEAF's
        W_out, arXiv 2509.12539).
        """
        source = teacher.module.backbone
        if not isinstance(source, PackedEncoder):
            raise InputError("teacher: only a model of the BERT family can give layers to a student")
        total = source.config.num_hidden_layers
        layers = list(layers)
        if not layers or any(not 0 <= layer < total for layer in layers):
            raise InputError(f"layers: {layers}; expected numbers from 0 to {total - 1}, the teacher's layers")
        backbone = source.with_layers(layers, dropout=dropout)
        dense = copy.deepcopy(tuple(teacher.module.dense))
        if dense_out is not None:
            head = Dense(backbone.width, dense_out, bias=False)
            dense = (head.to(teacher.device, teacher.dtype),)
        module = SentenceModel(
            backbone,
            pooling=pooling or teacher.module.pooling,
            dense=dense,
            normalize=teacher.module.normalize if normalize is None else normalize,
        )
        return cls(
            module.eval(),
            Tokenizer.from_str(teacher.tokenizer.to_str()),
            max_length=max_length or teacher.max_length,
            tokenizer_config=teacher.tokenizer_config,
            lowercase=teacher.lowercase,
            prompts=teacher.prompts if prompts is None else prompts,
            default_prompt=teacher.default_prompt if prompts is None else None,
            compute=teacher.compute,
            name=f"{teacher.name}[{','.join(map(str, layers))}]",
        )

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def dim(self) -> int:
        """Width of the vectors that `encode` returns by default."""
        return self._dim or self.module.dim

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with weights, config, tokenizer, pooling, heads or normalize.

        Not with max_length: where texts are cut does not make another model. A teacher cache keeps it beside this.
        """
        state = self.module.state_dict()
        # Fused optimisers write without counting a version: hence the sums of bits.
        seen = [(name, x.data_ptr(), x._version, _sum_of_bits(x)) for name, x in state.items()]
        key = [self.module.normalize, self.module.pooling, *seen]
        if self._fingerprint[0] != key:
            digest = hashlib.sha256()
            backbone = self.module.backbone
            described = {
                "config": backbone.description(),
                "pooling": self.module.pooling,
                "dense": [head.config() for head in self.module.dense],
                "normalize": self.module.normalize,
                "tokenizer": {
                    **json.loads(self.tokenizer.to_str()),
                    "truncation": self.tokenizer.truncation["direction"],
                },
            }
            digest.update(json.dumps(described, sort_keys=True, default=str).encode())
            for name, tensor in sorted(state.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._fingerprint = (key, digest.hexdigest()[:16])
        return self._fingerprint[1]

    def prompt_text(self, prompt: str | None = None, prompt_text: str | None = None) -> str:
        """The literal text that stands before every text: a prompt by name, a literal, or the model's default."""
        if prompt is not None and prompt_text is not None:
            raise InputError("prompt, prompt_text: give one of the two, a name or a literal text")
        if prompt_text is not None:
            return prompt_text
        prompt = self.default_prompt if prompt is None else prompt
        if prompt is None:
            return ""
        if prompt not in self.prompts:
            raise unknown_name("prompt", prompt, self.prompts)
        return self.prompts[prompt]

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[np.ndarray]:
        """Token ids of each text, int32, with special tokens, cut at max_length (said once per Encoder).

        prompt: literal text put before every text. Raises InputError that names the first row that is no text.
        """
        return list(itertools.chain.from_iterable(self._tokenized(self._checked_texts(texts), prompt)))

    @staticmethod
    def _checked_texts(texts: Iterable[str]) -> list[str]:
        texts = list(texts)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts: row {row} is {type(text).__name__}, not str")
        return texts

    def _tokenized(self, texts: Sequence[str], prompt: str) -> Iterator[list[np.ndarray]]:
        """`tokenize`, some thousand texts at a time."""
        cut = 0
        for start in range(0, len(texts), _TOKENIZE_TEXTS):
            block = [prompt + text for text in texts[start : start + _TOKENIZE_TEXTS]]
            try:
                encodings = self.tokenizer.encode_batch_fast(block)
            except TypeError:
                row = start + next(row for row, text in enumerate(block) if not is_unicode(text))
                raise InputError(f"texts: row {row} holds a lone surrogate, which is no valid Unicode text") from None
            cut += sum(1 for encoding in encodings if len(encoding) == self.max_length and encoding.overflowing)
            yield [np.array(encoding.ids, np.int32) for encoding in encodings]
        if cut and not self._cut_reported:
            self._cut_reported = True
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than max_length = {self.max_length} tokens and were cut "
                "(said once)",
                stacklevel=2,
            )

    def collate(self, token_ids: Sequence[np.ndarray]) -> PackedBatch:
        """One packed batch on this encoder's device, in the order given."""
        return pack(token_ids).to(self.device)

    def batches(self, lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        """Row numbers of each batch: sorted by length, longest first, at most batch_tokens tokens when padded.

        A text longer than batch_tokens makes a batch of its own.
        """
        if batch_tokens < 1:
            raise InputError(f"batch_tokens: expected a positive number, got {batch_tokens}")
        lengths = np.asarray(lengths, np.int64)
        order = np.argsort(-lengths, kind="stable")
        found, start = [], 0
        while start < len(order):
            rows = max(1, batch_tokens // max(1, int(lengths[order[start]])))
            found.append(order[start : start + rows])
            start += rows
        return found

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_text: str | None = None,
        dim: int | None = None,
        normalize: bool = True,
        precision: str = "float32",
        output: str = "numpy",
        batch_tokens: int | None = None,
        progress: Progress = None,
    ):
        """Vectors of `texts`, in their order: (N, dim), or (dim,) for a single str.

        prompt: a prompt's name; prompt_text: a literal one; neither: the model's default. dim: the first dim numbers of
        each vector (MRL). normalize: unit length, after slicing; False leaves what the model gives. precision: of the
        output only, by `leafkern.ops.quantize`. output: "numpy", "torch" (on the encoder's device) or "quantized" (a
        Quantized, with scale and offset). batch_tokens: tokens per batch. progress: True for a bar on a terminal, or a
        function called with (rows done, rows in all).
        Raises InputError for a row that is no text, an unknown prompt, precision or output, and a dim over the model's.
        """
        from leafkern.ops.quantization import PRECISIONS, quantize

        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        if output not in OUTPUTS:
            raise unknown_name("output", output, OUTPUTS)
        if precision == "fp8" and output == "numpy":
            raise InputError("output: numpy has no fp8; use output='torch' or 'quantized'")
        width = self.dim if dim is None else self._width(dim)
        single = isinstance(texts, str)
        if not (single or isinstance(texts, Iterable)):
            raise InputError(f"texts: expected a str or a sequence of str, got {type(texts).__name__}")
        texts = self._checked_texts([texts] if single else texts)
        blocks = self._tokenized(texts, self.prompt_text(prompt, prompt_text))
        batch_tokens = _BATCH_TOKENS.get(self.device.type, 65536) if batch_tokens is None else batch_tokens
        vectors = self._run(blocks, len(texts), width, normalize, batch_tokens, progress)
        if precision != "float32" or output == "quantized":
            quantized = quantize(vectors, precision)
            if output == "quantized":
                return quantized
            vectors = quantized.codes
        vectors = vectors[0] if single else vectors
        return vectors if output == "torch" else vectors.cpu().numpy()

    def _run(
        self,
        blocks: Iterator[list[np.ndarray]],
        total: int,
        width: int,
        normalize: bool,
        batch_tokens: int,
        progress: Progress,
    ) -> torch.Tensor:
        # On a GPU the next block is tokenised while this one runs; a CPU does one thing after the other, and sorts all.
        gpu = self.device.type == "cuda"
        blocks = _ahead(blocks) if gpu else [list(itertools.chain.from_iterable(blocks))]
        # Made outside inference mode, so that it may be a target in training.
        vectors = torch.empty(total, width, device=self.device)
        model = self._model()
        was_training = self.module.training
        # Setting the mode of every part takes longer than asking for it.
        training = any(part.training for part in self.module.modules())
        if training:
            self.module.eval()
        first = done = 0
        try:
            with torch.inference_mode(), self._arithmetic(), _reporting(progress, total) as report:
                for token_ids in blocks:
                    for rows in self.batches([len(ids) for ids in token_ids], batch_tokens):
                        found = model(pack([token_ids[row] for row in rows])).float()[:, :width]
                        if normalize and not (self.module.normalize and width == self.module.dim):
                            found = normalize_rows(found)
                        places = pinned(torch.from_numpy(first + rows), self.device)
                        vectors[places.to(self.device, non_blocking=True)] = found
                        done += len(rows)
                        report(done, total)
                    first += len(token_ids)
        finally:
            if training:
                self.module.train(was_training)
        return vectors

    def _model(self) -> Callable[[PackedBatch], torch.Tensor]:
        """What turns a batch on the CPU into vectors: where nothing in the model waits for the GPU, CUDA graphs."""
        backbone = self.module.backbone
        if not (isinstance(backbone, PackedEncoder) and backbone.capturable):
            return lambda batch: self.module(batch.to(self.device))
        if self._graphed is None or self._graphed.module is not self.module:
            self._graphed = GraphedModel(self.module)
        return self._graphed

    def _arithmetic(self):
        dtype = self.dtype if self.compute is None else _FLOATS[self.compute]
        return nullcontext() if dtype == self.dtype else torch.autocast(self.device.type, dtype=dtype)

    def _width(self, dim: int) -> int:
        if not 1 <= dim <= self.module.dim:
            raise InputError(f"dim: {dim} is not a width of this model, whose vectors have {self.module.dim} numbers")
        return dim

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the sentence-transformers layout, whole or not at all; a model that stood there is replaced.

        Opens in sentence-transformers with equal vectors, Dense and Normalize included, and in `from_pretrained` with
        vectors equal to the bit.
        """
        with atomic_folder(path) as folder:
            write_layout(
                folder,
                self.module,
                self.tokenizer,
                self.tokenizer_config,
                max_length=self.max_length,
                lowercase=self.lowercase,
                prompts=self.prompts,
                default_prompt=self.default_prompt,
                aligned_with=self.aligned_with,
            )


def _sum_of_bits(x: torch.Tensor) -> int:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.detach().contiguous().view(whole).sum())


def _checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOATS:
        raise unknown_name("dtype", name, _FLOATS)
    return _FLOATS[name]


def _checked_device(device: str | torch.device | None) -> torch.device:
    """The device, found by making a tensor there; by default the first GPU, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # AssertionError: torch was built without this kind of device.
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"device: {str(device)!r} can't be used here ({reason}); expected {_devices()}") from None
    if found.type == "meta":
        raise InputError(f"device: 'meta' holds no numbers; expected {_devices()}")
    return found


def _devices() -> str:
    return ", ".join(["'cpu'", *(f"'cuda:{number}'" for number in range(torch.cuda.device_count()))])


def _checked_compute(compute: str | None, dtype: torch.dtype) -> str | None:
    if compute is not None and compute not in COMPUTE:
        raise unknown_name("compute", compute, COMPUTE)
    if compute == "int8":
        raise InputError("compute: 'int8' is not yet available on this device; use 'float32', 'bfloat16' or 'float16'")
    # Autocast narrows float32 and the halves, but neither widens to float32 nor touches float64.
    if compute is not None and _FLOATS[compute] != dtype and (compute == "float32" or dtype == torch.float64):
        weights = str(dtype).removeprefix("torch.")
        raise InputError(f"compute: {compute!r} can't serve {weights} weights; it needs dtype='float32'")
    return compute


def _use_kernels(backbone: TransformersBackbone) -> None:
    """leafkern's attention and norms in a transformers model; where they can't serve it, a warning says why."""
    from leafkern.integrations.patch import patch_if_equal

    texts = [np.arange(length) % backbone.vocabulary for length in (7, 1, 12)]
    batch = pack(texts).to(next(backbone.parameters()).device)
    reason = patch_if_equal(backbone.model, lambda: backbone(batch))
    if reason is not None:
        warnings.warn(f"{type(backbone.model).__name__} stays on transformers' own attention: {reason}", stacklevel=3)


def _ahead(blocks: Iterator[list]) -> Iterator[list]:
    """`blocks`, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = thread.submit(next, blocks, None)
            yield block


@contextmanager
def _reporting(progress: Progress, total: int) -> Iterator[Callable[[int, int], None]]:
    """What to call with (rows done, rows in all): the caller's function, a bar on a terminal, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=total)
        yield lambda done, total: bar.update(task, completed=done)
