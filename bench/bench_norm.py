"""add_norm, bias_gelu, rotary and embed_norm, forward and with the backward pass, beside plain and compiled PyTorch.

Shapes of two encoders, MiniLM and BERT, at 2,048 tokens (one batch of training) and 65,536 (one of encoding). The limit
is bytes over the measured copy bandwidth: each input read once and each result written once; of the word table, the
rows that occur; with the backward pass, gradients and the inputs that they depend on again, and dense gradients of the
tables. On CUDA a contestant is a captured graph, so that what is timed are kernels and not Python's launches; not so
embed_norm with its backward pass, for torch doesn't promise that the gradient of an embedding can be captured.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from leafkern.ops.norm import add_norm, bias_gelu, embed_norm, rotary
from leafkern.ops.norm.reference import brute_add_norm, brute_bias_gelu, brute_embed_norm, brute_rotary

from .harness import Case, Contestant, Work
from .lengths import LONGEST, lengths
from .machine import as_cuda_graph, compiled

EPS = 1e-12
WORDS = 30522


@dataclass(frozen=True)
class Model:
    width: int
    inner: int
    heads: int


MODELS = {"MiniLM": Model(384, 1536, 12), "BERT": Model(768, 3072, 12)}
SHAPES = {
    "tiny": [("MiniLM", 40)],
    "small": [("MiniLM", 2048)],
    "full": [(model, tokens) for model in MODELS for tokens in (2048, 65536)],
}
MOST_CPU_TOKENS = 2048
DEVICES = [("cpu", "float32"), *([("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else [])]
# Relative Frobenius error, twice that for gradients; a peer that rounds in between gets five times as much.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CACHE_BYTES = 256 << 20  # input sets are rotated until they exceed any cache
MOST_SETS = 8


class Inputs:
    """One input set of one operation: what gets a gradient, what doesn't, and the gradients of the results."""

    def __init__(self, op: str, model: Model, tokens: int, device: str, dtype: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.op, self.tokens, self.model = op, tokens, model

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(getattr(torch, dtype))

        width, head = model.width, model.width // model.heads
        rows, heads = (tokens, model.inner if op == "bias_gelu" else width), (tokens, model.heads, head)
        self.given = {
            "add_norm": lambda: [draw(*rows), draw(*rows), draw(width), draw(width)],
            "bias_gelu": lambda: [draw(*rows), draw(model.inner)],
            "rotary": lambda: [draw(*heads), draw(*heads)],
            "embed_norm": lambda: [*(draw(n, width) for n in (WORDS, LONGEST, 2)), draw(width), draw(width)],
        }[op]()
        self.grads = [draw(*heads), draw(*heads)] if op == "rotary" else [draw(*rows)]
        counts = torch.from_numpy(lengths("real", tokens // 4, seed)).cumsum(0)
        cu_seqlens = torch.cat((counts.new_zeros(1), counts[counts < tokens], counts.new_tensor([tokens])))
        self.cu_seqlens = cu_seqlens.int().to(device)
        place = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
        self.place = place.to(device)
        self.ids = torch.randint(WORDS, (tokens,), generator=generator, device=device)
        angle = place[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
        self.cos, self.sin = (f(angle).repeat(1, 2).to(device) for f in (torch.cos, torch.sin))
        self._truth: list[torch.Tensor] | None = None

    def truth(self, backward: bool) -> list[torch.Tensor]:
        """Results, and gradients of `given`, in float64."""
        if self._truth is None:
            exact = [x.double().requires_grad_() for x in self.given]
            results = _several(DEFINITIONS[self.op](self, *exact))
            gradients = torch.autograd.grad(results, exact, [x.double() for x in self.grads])
            self._truth = [*(x.detach() for x in results), *gradients]
        return self._truth if backward else self._truth[: len(self.grads)]


def _several(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


# Implementations: (inputs, *given) -> results

DEFINITIONS: dict[str, Callable] = {
    "add_norm": lambda i, *given: brute_add_norm(*given, EPS, "layer")[0],
    "bias_gelu": lambda i, *given: brute_bias_gelu(*given, "none"),
    "rotary": lambda i, *given: brute_rotary(*given, i.cos.double(), i.sin.double()),
    "embed_norm": lambda i, *given: brute_embed_norm(i.ids, i.cu_seqlens, *given, EPS, None),
}
OURS: dict[str, Callable] = {
    "add_norm": lambda i, *given: add_norm(*given, eps=EPS),
    "bias_gelu": lambda i, *given: bias_gelu(*given),
    "rotary": lambda i, *given: rotary(*given, i.cos, i.sin),
    "embed_norm": lambda i, *given: embed_norm(i.ids, i.cu_seqlens, *given, eps=EPS),
}


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None].to(x.dtype) + torch.cat((-second, first), -1) * sin[:, None].to(x.dtype)


# Tensors only, for torch.compile. A peer gets the places of its tokens for nothing.
EAGER: dict[str, Callable] = {
    "add_norm": lambda ids, place, cos, sin, x, residual, weight, bias: F.layer_norm(
        x + residual, x.shape[-1:], weight, bias, EPS
    ),
    "bias_gelu": lambda ids, place, cos, sin, x, bias: F.gelu(x + bias),
    "rotary": lambda ids, place, cos, sin, q, k: (_rotated(q, cos, sin), _rotated(k, cos, sin)),
    "embed_norm": lambda ids, place, cos, sin, word, position, token_type, weight, bias: F.layer_norm(
        F.embedding(ids, word) + F.embedding(place, position) + token_type[0], weight.shape, weight, bias, EPS
    ),
}


def _peer(function: Callable) -> Callable:
    return lambda inputs, *given: function(inputs.ids, inputs.place, inputs.cos, inputs.sin, *given)


def _call(function: Callable, inputs: Inputs, backward: bool) -> Callable[[], list[torch.Tensor]]:
    """A function of nothing: the results, or the results and all gradients."""
    given = [x.detach().clone().requires_grad_() for x in inputs.given]

    def forward():
        with torch.inference_mode():
            return list(_several(function(inputs, *given)))

    def both():
        results = _several(function(inputs, *given))
        return [*(x.detach() for x in results), *torch.autograd.grad(results, given, inputs.grads)]

    return both if backward else forward


def _contestant(name, function, sets, backward, dtype, *, captured=False, slack=1, **options) -> Contestant:
    calls: dict = {}

    def run(i):
        # Captured at the first call, which is the one that is checked and not timed.
        if i not in calls:
            call = _call(function, sets[i], backward)
            calls[i] = as_cuda_graph(call) if captured else call
        return calls[i]()

    def check(output, i):
        for place, (got, right) in enumerate(zip(output, sets[i].truth(backward), strict=True)):
            error = ((got.double() - right).norm() / right.norm()).item()
            # `not <=` rather than `>`: NaN must not pass.
            if not error <= slack * TOLERANCE[dtype] * (2 if place >= len(sets[i].grads) else 1):
                return f"output {place}: relative error {error:.2g}"
        return None

    return Contestant(name, run, check, **options)


def _work(backward: bool, inputs: Inputs) -> Work:
    size, width = inputs.given[0].element_size(), inputs.model.width
    tile = float(inputs.grads[0].numel() * size)
    if inputs.op == "add_norm":
        moved, further, operations = 3 * tile, 4 * tile, (10, 16)
    elif inputs.op == "bias_gelu":
        moved, further, operations = 2 * tile, 3 * tile, (30, 40)
    elif inputs.op == "rotary":
        moved = 4 * tile + 4.0 * inputs.cos.numel()  # of cos and sin, float32, half
        further, operations = moved, (6, 6)
    else:
        rows = float(inputs.ids.unique().numel() * width * size)
        tables = float(sum(table.numel() for table in inputs.given[:3]) * size)
        moved, further, operations = tile + rows + 8.0 * inputs.tokens, tile + rows + tables, (11, 20)
    entries = tile / size
    done = entries * (sum(operations) if backward else operations[0])
    moved += further if backward else 0
    return Work(done, "FLOP", ("fp32_fma", "fp32_gemm"), moved, "copy", float(inputs.tokens), "token")


def _case(op: str, part: str, name: str, tokens: int, device: str, dtype: str, peers: bool) -> Case:
    model, backward = MODELS[name], part != "forward"
    captured = device == "cuda" and not (op == "embed_norm" and backward)
    first = Inputs(op, model, tokens, device, dtype, 0)
    work = _work(backward, first)
    count = min(MOST_SETS, max(2, round(CACHE_BYTES / work.bytes)))
    sets = [first, *(Inputs(op, model, tokens, device, dtype, seed) for seed in range(1, count))]
    note = "with Python's launch cost"

    def contestant(name, function, **options):
        return _contestant(name, function, sets, backward, dtype, **({"captured": captured} | options))

    uncaptured = {"note": note} if device == "cuda" and not captured else {}
    contestants = [contestant("leafkern", OURS[op], ours=True, **uncaptured)]
    if captured:
        contestants.append(contestant("leafkern, no graph", OURS[op], captured=False, same_job=False, note=note))
    if peers:
        contestants.append(contestant("torch", _peer(EAGER[op]), slack=5, **uncaptured))
        if device == "cuda":
            peer = _peer(compiled(EAGER[op], dynamic=False))
            contestants.append(contestant("torch.compile", peer, slack=5, **uncaptured))
    shape = {"model": name, "T": tokens, "D": model.width, "dtype": dtype}
    return Case("norm", f"{op}/{part}/{dtype}/{name}/T{tokens}", shape, work, contestants, count, device)


def pytest_generate_tests(metafunc):
    shapes = SHAPES[metafunc.config.getoption("--size")]
    cases = [(*where, *shape) for where in DEVICES for shape in shapes]
    # The largest batches are for GPUs.
    cases = [case for case in cases if case[0] != "cpu" or case[-1] <= MOST_CPU_TOKENS]
    ids = [f"{device}-{dtype}-{model}-T{tokens}" for device, dtype, model, tokens in cases]
    metafunc.parametrize(("device", "dtype", "model", "tokens"), cases, ids=ids)


@pytest.mark.parametrize("part", ["forward", "forward and backward"])
@pytest.mark.parametrize("op", list(OURS))
def test_norm(bench, bench_session, op, part, device, dtype, model, tokens):
    bench(_case(op, part, model, tokens, device, dtype, bench_session.peers))
    gc.collect()
