"""The definitions of the contrastive losses and of mixed negatives, and the losses' blocked forms.

`brute_*`: as the formulas say, differentiable by autograd. `blocked_*`: value and gradient in one pass over blocks of
queries, so that of all similarities only one block's exist at a time.
"""

from collections.abc import Iterator, Sequence

import torch

from leafkern.ops._core.normalize import brute_normalize, common_dtype, normalize_rows, normalize_rows_backward

# Bytes of similarities (and of what else grows with the rows) that one block of queries may take, in native.py as well.
# Small blocks stay in a CPU's cache; a GPU needs more work per launch.
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def brute_info_nce(
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
) -> torch.Tensor:
    """One width and one query at a time; columns are dropped, not masked."""
    dims = [queries.shape[1]] if dims is None else dims
    dim_weights = [1 / len(dims)] * len(dims) if dim_weights is None else dim_weights
    columns = positives if negatives is None else torch.cat([positives, negatives.flatten(0, 1)])
    if ids is not None:
        ids = ids[0].tolist() + ([] if ids[1] is None else ids[1].flatten().tolist())
    total = sum(0 * x.sum() for x in (queries, columns, mixed) if x is not None)
    for width, weight in zip(dims, dim_weights, strict=True):
        for i, query in enumerate(queries):
            query = brute_normalize(query[:width])
            scores = brute_normalize(columns[:, :width]) @ query
            kept = [
                j
                for j in range(len(columns))
                if j != i
                and (ids is None or ids[j] != ids[i])
                and (fn_margin is None or not scores[j] > scores[i] - fn_margin)
            ]
            others = scores[kept]
            if mixed is not None:
                others = torch.cat([others, brute_normalize(mixed[i, :, :width]) @ query])
            if others.numel() == 0 and gamma > 0:
                continue
            everything = torch.logsumexp(torch.cat([scores[i : i + 1], others]) / temperature, 0)
            log_p = scores[i] / temperature - everything
            focal = 1.0
            if gamma > 0:
                focal = torch.exp(gamma * (torch.logsumexp(others / temperature, 0) - everything))
                focal = focal.detach() if detach_focal else focal
            total = total - weight * focal * log_p / len(queries)
    return total


def brute_soft_label_loss(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """One width and one query at a time; candidates to which the teacher gives no probability add nothing."""
    dims = [queries.shape[1]] if dims is None else dims
    dim_weights = [1 / len(dims)] * len(dims) if dim_weights is None else dim_weights
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    total = (queries.sum() + candidates.sum()) * 0
    if teacher_scores.shape[1] == 0:
        return total
    for width, weight in zip(dims, dim_weights, strict=True):
        for i, query in enumerate(queries):
            against = candidates[i] if candidates.ndim == 3 else candidates
            logits = brute_normalize(against[:, :width]) @ brute_normalize(query[:width]) / temperature
            log_student = logits - torch.logsumexp(logits, 0)
            teacher = teacher_scores[i].detach() / teacher_temperature
            log_teacher = teacher - torch.logsumexp(teacher, 0)
            for mine, theirs in zip(log_student, log_teacher, strict=True):
                if theirs > -torch.inf:
                    total = total + weight * theirs.exp() * (theirs - mine) / len(queries)
    return total


def brute_mix_negatives(
    queries: torch.Tensor,
    negatives: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    lambdas: torch.Tensor,
    listwise: int,
    temperature: float,
) -> torch.Tensor:
    """One mix at a time: the pairs, then the list-wise ones."""
    rows = []
    for query, own, js, ks, weights in zip(queries, brute_normalize(negatives), first, second, lambdas, strict=True):
        mixes = [weight * own[j] + (1 - weight) * own[k] for j, k, weight in zip(js, ks, weights, strict=True)]
        scores = (own @ brute_normalize(query)).detach() / temperature
        mixes += [torch.softmax(scores, 0) @ own] * listwise
        rows.append(brute_normalize(torch.stack(mixes)))
    return torch.stack(rows)


def empty_gradient(x: torch.Tensor | None, wanted: bool, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for the gradient of x: shaped like x, or (0,) where it is not wanted."""
    return like.new_empty(x.shape if wanted and x is not None else (0,), dtype=dtype)


def _row_blocks(rows: int, row_numbers: int, like: torch.Tensor) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most BLOCK_BYTES where a row takes `row_numbers` numbers like `like`'s."""
    size = max(BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cuda"]) // max(row_numbers * like.element_size(), 1), 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _focal(gap: torch.Tensor, gamma: float, detach_focal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row and its derivative, by the gap between the log mass of the other columns and the positive's.

    With a = gap: 1 - p = sigmoid(a), -log p = softplus(a), log(1 - p) = -softplus(-a): exact for p -> 0 and p -> 1,
    where forming p would lose everything. a = -inf, no other columns: -log p = 0, and 1 - p = 0.
    """
    zero = torch.zeros_like(gap)
    surprise = torch.logaddexp(gap, zero)
    if gamma == 0:
        return surprise, torch.sigmoid(gap)
    weight = torch.exp(-gamma * torch.logaddexp(-gap, zero))
    slope = torch.sigmoid(gap)
    if not detach_focal:
        slope = slope + gamma * torch.sigmoid(-gap) * surprise
    return weight * surprise, weight * slope


def blocked_info_nce(
    queries: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None,
    mixed: torch.Tensor | None,
    positive_ids: torch.Tensor | None,
    negative_ids: torch.Tensor | None,
    start: int,
    temperature: float,
    gamma: float,
    detach_focal: bool,
    fn_margin: float | None,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The share of B' queries in the loss of all B, and its gradients by queries, positives, negatives and mixed.

    queries: (B', D), those whose own positives are rows start .. start + B' of positives. positives: (B, D), negatives:
    (B, M, D), ids: (B,), (B, M): of the whole batch. mixed: (B', n, D). The divisor is B: shares add up to the loss.
    """
    dtype = common_dtype(queries, positives, negatives, mixed)
    grads = [
        empty_gradient(x, wanted, queries, dtype).zero_()
        for x, wanted in zip((queries, positives, negatives, mixed), needs, strict=True)
    ]
    total = positives.shape[0]
    columns, ids = positives.to(dtype), positive_ids
    if negatives is not None:
        columns = torch.cat([columns, negatives.to(dtype).flatten(0, 1)])
    if negative_ids is not None:
        ids = torch.cat([ids, negative_ids.flatten()])
    count, own_columns = columns.shape[0], 0 if mixed is None else mixed.shape[1]
    # The columns whose gradient is wanted.
    live = slice(0 if needs[1] else total, count if needs[2] else total)
    loss = queries.new_zeros((), dtype=dtype)
    row_numbers = count + own_columns * (queries.shape[1] + 1)
    buffer = None
    for width, dim_weight in zip(dims, dim_weights, strict=True):
        share = dim_weight / max(total, 1)
        unit = normalize_rows(columns[:, :width])
        live_grad = torch.zeros_like(unit[live])
        for rows in _row_blocks(queries.shape[0], row_numbers, columns):
            size = rows.stop - rows.start
            raw = queries[rows, :width].to(dtype)
            q = normalize_rows(raw)
            if buffer is None:
                buffer = q.new_empty(size, count + own_columns)
            z = buffer[:size]
            shared = z[:, :count]
            torch.mm(q, unit.T, out=shared)
            own = shared[:, start + rows.start :][:, :size].diagonal()
            positive = own.clone()
            masked = None if ids is None else ids[None, :] == ids[start + rows.start :][:size, None]
            if fn_margin is not None:
                above = shared > (positive - fn_margin)[:, None]
                masked = above if masked is None else masked.logical_or_(above)
            if mixed is not None:
                raw_mixed = mixed[rows, :, :width].to(dtype)
                unit_mixed = normalize_rows(raw_mixed)
                z[:, count:] = (unit_mixed @ q[:, :, None]).squeeze(-1)
            if masked is not None:
                shared.masked_fill_(masked, -torch.inf)
            own.fill_(-torch.inf)
            top = z.amax(1)
            top = torch.where(top == -torch.inf, 0.0, top)
            mass = z.sub_(top[:, None]).div_(temperature).exp_().sum(1)
            # Cosines are subtracted before the temperature magnifies them: no digits are lost to large logits.
            gap = (top - positive) / temperature + mass.log()
            value, slope = _focal(gap, gamma, detach_focal)
            loss += share * value.sum()
            if not any(needs):
                continue
            slope = slope * (share / temperature)
            # From exponentials to the gradient by the cosines. The mass is at least 1, or 0 without other columns.
            z.mul_((slope / mass.clamp(min=1))[:, None])
            own.copy_(-slope)
            if needs[0]:
                grad = shared @ unit
                if mixed is not None:
                    grad += (z[:, None, count:] @ unit_mixed).squeeze(1)
                grads[0][rows, :width] += normalize_rows_backward(grad, raw)
            live_grad.addmm_(shared[:, live].T, q)
            if needs[3] and mixed is not None:
                grads[3][rows, :, :width] += normalize_rows_backward(z[:, count:, None] * q[:, None], raw_mixed)
        if live.stop > live.start:
            live_grad = normalize_rows_backward(live_grad, columns[live, :width])
        if needs[1]:
            grads[1][:, :width] += live_grad[:total]
        if needs[2] and negatives is not None:
            grads[2].view(-1, queries.shape[1])[:, :width] += live_grad[total - live.start :]
    return loss, *grads


def blocked_soft_label_loss(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    teacher_scores: torch.Tensor,
    total: int,
    temperature: float,
    teacher_temperature: float,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The share of B' queries in the mean over `total`, and its gradients by queries and candidates.

    queries: (B', D). candidates: (B', C, D) own or (N, D) shared. teacher_scores: (B', C) or (B', N).
    """
    dtype = common_dtype(queries, candidates, teacher_scores)
    grads = [
        empty_gradient(x, wanted, queries, dtype).zero_()
        for x, wanted in zip((queries, candidates), needs, strict=True)
    ]
    shared = candidates.ndim == 2
    loss = queries.new_zeros((), dtype=dtype)
    row_numbers = teacher_scores.shape[1] * (1 if shared else queries.shape[1] + 1)
    for width, dim_weight in zip(dims, dim_weights, strict=True):
        share = dim_weight / max(total, 1)
        if shared:
            raw_candidates = candidates[:, :width].to(dtype)
            unit = normalize_rows(raw_candidates)
            unit_grad = torch.zeros_like(unit)
        for rows in _row_blocks(queries.shape[0], row_numbers, loss):
            raw = queries[rows, :width].to(dtype)
            q = normalize_rows(raw)
            if not shared:
                raw_candidates = candidates[rows, :, :width].to(dtype)
                unit = normalize_rows(raw_candidates)
            cosines = q @ unit.T if shared else (unit @ q[:, :, None]).squeeze(-1)
            log_student = cosines.div_(temperature).log_softmax(1)
            log_teacher = (teacher_scores[rows].to(dtype) / teacher_temperature).log_softmax(1)
            teacher = log_teacher.exp()
            # 0 log 0 = 0.
            terms = torch.where(teacher == 0, 0.0, log_teacher.sub_(log_student).mul_(teacher))
            loss += share * terms.sum()
            if not any(needs):
                continue
            by_cosine = log_student.exp_().sub_(teacher).mul_(share / temperature)
            if needs[0]:
                grad = by_cosine @ unit if shared else (by_cosine[:, None] @ unit).squeeze(1)
                grads[0][rows, :width] += normalize_rows_backward(grad, raw)
            if needs[1] and shared:
                unit_grad.addmm_(by_cosine.T, q)
            elif needs[1]:
                by_unit = by_cosine[:, :, None] * q[:, None]
                grads[1][rows, :, :width] += normalize_rows_backward(by_unit, raw_candidates)
        if needs[1] and shared:
            grads[1][:, :width] += normalize_rows_backward(unit_grad, raw_candidates)
    return loss, *grads
