"""Contrastive losses and mixed negatives, as KaLM-Embedding-V2 and LG-ANNA-Embedding train with them."""

from collections.abc import Sequence

import torch

from leafkern.errors import InputError
from leafkern.ops._core.checks import (
    check_dim_weights,
    check_dims,
    check_flag,
    check_floating,
    check_number,
    check_same_device,
    check_tensor,
    values_checked,
)
from leafkern.ops._core.normalize import common_dtype
from leafkern.ops._core.ranks import gather_constant, gather_rows, loss_of_ranks, ranks_of
from leafkern.ops._core.registration import needs_gradient
from leafkern.ops.contrastive import autograd

__all__ = ["info_nce", "mix_negatives", "soft_label_loss"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_own(name: str, x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """`x` itself, if it is floating-point (B, any number, D)."""
    check_floating(name, x, ndim=3)
    if x.shape[0] != queries.shape[0] or x.shape[2] != queries.shape[1]:
        raise InputError(
            f"queries, {name}: shapes {tuple(queries.shape)} and {tuple(x.shape)}; expected (B, D) and "
            f"(B, number for each query, D), here ({queries.shape[0]}, ..., {queries.shape[1]})"
        )
    return x


def _check_ids(
    ids: object, positives: torch.Tensor, negatives: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The ids of positives and negatives as int64; None where there are none."""
    if ids is None:
        return None, None
    if not (isinstance(ids, (tuple, list)) and len(ids) == 2):
        raise InputError(f"ids: expected (positive_ids, negative_ids), got {type(ids).__name__}")
    shapes = [positives.shape[:1], None if negatives is None else negatives.shape[:2]]
    if ids[1] is None and (negatives is None or negatives.numel() == 0):
        if negatives is not None:
            # Other ranks may have some.
            ids = (ids[0], torch.empty(shapes[1], dtype=torch.int64, device=negatives.device))
    elif negatives is None:
        raise InputError("ids: ids of negatives, but no negatives; expected (positive_ids, None)")
    checked = []
    for name, given, shape in zip(("ids[0] (of positives)", "ids[1] (of negatives)"), ids, shapes):
        if shape is None:
            checked.append(None)
            continue
        if check_tensor(name, given, dtypes=_INTEGERS).shape != shape:
            raise InputError(f"{name}: shape {tuple(given.shape)}; expected {tuple(shape)}")
        check_same_device(positives=positives, **{name: given})
        checked.append(given.to(torch.int64))
    return checked[0], checked[1]


def info_nce(
    queries: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None = None,
    *,
    temperature: float = 0.01,
    gamma: float = 0.0,
    detach_focal: bool = True,
    mixed: torch.Tensor | None = None,
    ids: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    fn_margin: float | None = None,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    gather: str = "none",
) -> torch.Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748) with the focal weight of KaLM-Embedding-V2 (arXiv 2506.20923).

    L = mean_i −(1 − p_i)^gamma · log p_i, where p_i is the softmax probability of query i's own positive among its
    columns, by cosine / temperature. The columns of query i: all positives of the batch, all negatives of the batch,
    and its own `mixed` (from `mix_negatives`). gamma = 0 is cross-entropy; a query without any other column has p = 1
    and loss 0. detach_focal: the weight (1 − p_i)^gamma carries no gradient (the paper does not say; False
    differentiates it).

    Masked columns, each as if it were not there: with ids = (positive_ids, negative_ids), columns with the id of the
    query's own positive; with fn_margin, columns whose cosine is above that of the own positive minus fn_margin (0.1:
    anything above s⁺ − 0.1; compared at the width of the term, before the temperature). The own positive and `mixed`
    are never masked. Masks carry no gradient.
    dims: prefix widths, each normalised by itself (Matryoshka): L = Σ_k w_k L_k, dim_weights None = 1/K each.

    queries, positives: (B, D); negatives: (B, M, D); mixed: (B, n, D); any float dtypes, one device. ids: integer
    tensors (B,) and (B, M), the latter None without negatives. Returns a scalar in at least float32. Differentiable in
    queries, positives, negatives and mixed; an argument that needs no gradient costs none. A zero row has cosine 0 and
    gradient 0; NaN propagates; B = 0 gives 0.
    Value and gradient are computed together, for one block of queries at a time: the similarities of a block against
    all columns are the only ones that exist (`reference.BLOCK_BYTES`), and no mask outlives its block. On the CPU
    nothing else is as large as an argument: half-precision ones are converted in pieces, and all widths cost the
    products of one. A step at B = 16,384 takes 42 MiB beyond arguments and gradients, whatever D and the widths are
    (from bfloat16: 51, and the gradients in float32 until the backward pass has rounded them). Triton forms tiles of
    similarities, and stores weights of the gradients' products 32 MiB at a time: counted, 36 MiB there in bfloat16.
    Gradients are in at least float32, and once: the backward pass scales them where they are, unless the graph is kept
    or an argument is in half precision. Backends: Triton (CUDA); native (CPU); reference, which copies half-precision
    arguments, joins positives and negatives, and forms their unit vectors.
    gather: "ranks" = the loss of the global batch on every rank: positives, negatives and ids of all ranks are columns
    of each, queries and mixed stay where they are. All ranks must give the same arguments (of any number of rows, also
    0) and run the backward pass if one does; not under torch.compile.
    Raises InputError for shapes, dtypes, devices and numbers that don't fit.
    """
    check_floating("queries", queries, ndim=2)
    check_floating("positives", positives, ndim=2)
    if positives.shape != queries.shape:
        raise InputError(
            f"queries, positives: shapes {tuple(queries.shape)} and {tuple(positives.shape)} differ; expected one "
            "positive for each query, of the same width"
        )
    for name, own in (("negatives", negatives), ("mixed", mixed)):
        if own is not None:
            _check_own(name, own, queries)
    check_same_device(queries=queries, positives=positives, negatives=negatives, mixed=mixed)
    positive_ids, negative_ids = _check_ids(ids, positives, negatives)
    temperature, gamma = check_number("temperature", temperature, above=0), check_number("gamma", gamma, least=0)
    detach_focal = check_flag("detach_focal", detach_focal)
    fn_margin = None if fn_margin is None else check_number("fn_margin", fn_margin)
    dims = check_dims(dims, queries.shape[1])
    dim_weights = check_dim_weights(dim_weights, dims)

    ids_given = {"ids[0] (of positives)": positive_ids, "ids[1] (of negatives)": negative_ids}
    ranks = ranks_of(gather, positives=positives, negatives=negatives, **ids_given)
    positives = gather_rows(ranks, "positives", positives)
    if negatives is not None:
        negatives = gather_rows(ranks, "negatives", negatives)
    if positive_ids is not None:
        positive_ids = gather_constant(ranks, positive_ids)
    if negative_ids is not None:
        negative_ids = gather_constant(ranks, negative_ids)
    needs = needs_gradient(queries, positives, negatives, mixed)
    loss = autograd.info_nce(
        queries,
        positives,
        negatives,
        mixed,
        positive_ids,
        negative_ids,
        ranks.start,
        temperature,
        gamma,
        detach_focal,
        fn_margin,
        dims,
        dim_weights,
        needs,
    )[0]
    return loss_of_ranks(ranks, loss)


def _check_teacher_scores(teacher_scores: torch.Tensor) -> None:
    if not values_checked(teacher_scores) or teacher_scores.numel() == 0:
        return
    bad = (teacher_scores.isnan() | (teacher_scores == torch.inf)).any(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise InputError(
            f"teacher_scores: row {rows[0]} holds NaN or +infinity ({len(rows)} such rows); expected finite scores, or "
            "-infinity for a candidate of probability 0"
        )
    dead = (teacher_scores == -torch.inf).all(1)
    if dead.any():
        rows = dead.nonzero().flatten().tolist()
        raise InputError(
            f"teacher_scores: row {rows[0]} has only -infinity ({len(rows)} such rows); expected at least one finite "
            "score in each row"
        )


def soft_label_loss(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    gather: str = "none",
) -> torch.Tensor:
    """Divergence from a teacher's ranking of candidates, as KaLM-Embedding-V2.5 (arXiv 2506.20923) distils it.

    L = mean_i KL(softmax(teacher_scores_i / teacher_temperature) ‖ softmax(cos(query_i, candidates) / temperature)),
    without a factor temperature². teacher_temperature None = temperature. LG-ANNA-Embedding (arXiv 2506.07438) adds
    the same term to InfoNCE, with a cross-encoder's scores; that paper leaves the term's form open.
    dims: prefix widths of queries and candidates, each normalised by itself: L = Σ_k w_k L_k, dim_weights None = 1/K
    each; the teacher's scores are the same for all.

    queries: (B, D). candidates: (B, C, D), each query's own, or (N, D), shared by all queries. teacher_scores: (B, C)
    or (B, N); -inf gives a candidate probability 0, but each row needs a finite score. Any float dtypes, one device.
    Returns a scalar in at least float32. Differentiable in queries and candidates, never in teacher_scores. A zero row
    has cosine 0 and gradient 0; NaN of queries or candidates propagates; B = 0 or no candidates gives 0.
    Value and gradient are computed together, for one block of queries at a time (`reference.BLOCK_BYTES`). Backends and
    memory as for `info_nce`.
    gather: "ranks" = the loss of the global batch on every rank. Own candidates stay where they are; shared candidates
    of all ranks, (N_r, D) each, are gathered in rank order, and teacher_scores must be (B_r, Σ N_r): this rank's
    queries against everyone's candidates. Ranks may hold different numbers of rows, also 0; all must call, and run
    the backward pass if one does; not under torch.compile.
    Raises InputError for shapes, dtypes, devices and numbers that don't fit and, where values are checked (CPU, or
    LEAFKERN_CHECK=1), for a row of teacher_scores with NaN, +inf or nothing but -inf.
    """
    check_floating("queries", queries, ndim=2)
    check_floating("candidates", candidates)
    shared = candidates.ndim == 2
    if not shared:
        if candidates.ndim != 3:
            raise InputError(
                f"candidates: expected (B, C, D), each query's own, or (N, D), shared; got {tuple(candidates.shape)}"
            )
        _check_own("candidates", candidates, queries)
    elif candidates.shape[1] != queries.shape[1]:
        raise InputError(f"queries, candidates: widths {queries.shape[1]} and {candidates.shape[1]}; expected the same")
    check_floating("teacher_scores", teacher_scores, ndim=2)
    check_same_device(queries=queries, candidates=candidates, teacher_scores=teacher_scores)
    _check_teacher_scores(teacher_scores)
    temperature = check_number("temperature", temperature, above=0)
    if teacher_temperature is None:
        teacher_temperature = temperature
    teacher_temperature = check_number("teacher_temperature", teacher_temperature, above=0)
    dims = check_dims(dims, queries.shape[1])
    dim_weights = check_dim_weights(dim_weights, dims)

    own = {} if shared else {"candidates": candidates}
    ranks = ranks_of(gather, queries=queries, **own)
    if shared:
        candidates = gather_rows(ranks_of(gather, candidates=candidates), "candidates", candidates)
    expected = (queries.shape[0], candidates.shape[0] if shared else candidates.shape[1])
    if teacher_scores.shape != expected:
        raise InputError(
            f"teacher_scores: shape {tuple(teacher_scores.shape)}; expected one score for each query and candidate"
            f"{' of all ranks' if ranks.world > 1 and shared else ''}, {expected}"
        )
    loss = autograd.soft_label_loss(
        queries,
        candidates,
        teacher_scores.detach(),
        ranks.total,
        temperature,
        teacher_temperature,
        dims,
        dim_weights,
        needs_gradient(queries, candidates),
    )[0]
    return loss_of_ranks(ranks, loss)


def _check_count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name}: expected a whole number that is not negative; got {value!r}")
    return value


def mix_negatives(
    queries: torch.Tensor,
    negatives: torch.Tensor,
    *,
    pairwise: int | None = None,
    listwise: int = 1,
    temperature: float = 0.05,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Harder negatives, mixed from each query's own: KaLM-Embedding-V2's online mixing (arXiv 2506.20923).

    With unit negatives p_m: `pairwise` mixes n(λ p_j + (1 − λ) p_k) of two distinct negatives each, drawn anew for
    each mix, λ ~ Beta(2, 2); then `listwise` mixes n(Σ_m w_m p_m), w = softmax(cos(query, p_m) / temperature) without
    gradient (the paper does not say what the weights are). The list-wise mix is a function of the query and its
    negatives alone, so listwise > 1 repeats it: in `info_nce` that adds log(listwise) to the column's logit.

    queries: (B, D); negatives: (B, M, D); any float dtypes, one device. pairwise None: M mixes; M < 2: none, whatever
    is asked. M = 0: no mixes at all. Returns (B, pairwise + listwise, D): unit rows in at least float32 (mixes that
    cancel to 0 stay 0, with gradient 0), for `info_nce`'s `mixed`. Differentiable in negatives. NaN propagates.
    generator: draws on its own device; None: torch's generator of the tensors' device. λ is drawn in float32 whatever
    the dtype, so that a seed gives the same mixes in each. In PyTorch, whatever backend is forced.
    Raises InputError for shapes, dtypes, devices and numbers that don't fit.
    """
    check_floating("queries", queries, ndim=2)
    check_floating("negatives", negatives)
    _check_own("negatives", negatives, queries)
    check_same_device(queries=queries, negatives=negatives)
    temperature = check_number("temperature", temperature, above=0)
    rows, number, width = negatives.shape
    pairwise = number if pairwise is None else _check_count("pairwise", pairwise)
    _check_count("listwise", listwise)
    if number == 0:
        return negatives.new_empty(rows, 0, width, dtype=common_dtype(queries, negatives))
    shape = (rows, pairwise if number > 1 else 0)
    device = negatives.device if generator is None else generator.device
    first = torch.randint(number, shape, generator=generator, device=device)
    # One of the others: from the first's place on, one further.
    second = torch.randint(max(number - 1, 1), shape, generator=generator, device=device)
    second = second + (second >= first)
    # The median of three uniform numbers is distributed as Beta(2, 2). (torch's own also returns places, and is refused
    # for them on a GPU where algorithms must be deterministic.)
    lambdas = torch.rand(*shape, 3, generator=generator, device=device, dtype=torch.float32).sort(-1).values[..., 1]
    first, second, lambdas = (drawn.to(negatives.device) for drawn in (first, second, lambdas))
    return autograd.mix_negatives(queries.detach(), negatives, first, second, lambdas, listwise, temperature)
