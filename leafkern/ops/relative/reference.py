"""The definition of the relative similarity loss over given scores, and a form whose memory grows only as P."""

from collections.abc import Callable

import torch


def brute_relative(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, margin: float, reference_ties: bool, min_gap: float
) -> torch.Tensor:
    """All pairs of pairs at once, as the formula says: (P, P) in memory, differentiable in student_scores (B, B)."""
    batch = student_scores.shape[0]
    rows, columns = torch.triu_indices(batch, batch, 1)
    s, t = student_scores[rows, columns].double(), teacher_scores[rows, columns].double()
    count = len(s) * (len(s) - 1) // 2
    if count == 0:
        return s.sum() * 0
    gap = t[:, None] - t  # [P, P]
    higher = (gap > 0) & (gap > min_gap)
    if reference_ties:
        place = torch.arange(len(t), device=t.device)
        higher |= (gap == 0) & (place[:, None] > place)
    violation = (margin - (s[:, None] - s)).relu()  # [P, P]
    return torch.where(higher, violation, 0.0).sum() / count


def blocked_relative(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, margin: float, reference_ties: bool, min_gap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in O(P log P) work and O(P) memory, with its gradient.

    student_scores, teacher_scores: (B, B), of which the upper triangles are read. Returns the loss, float64, and
    (B, B) int64 with, above the diagonal, how often the pair is violated on the low side less on the high side: the
    gradient is this over N. A pair's counts are those of elements in a prefix of both orders, by T and by S; a
    wavelet matrix counts them, bit by bit of the rank by T. Scores must be finite.
    """
    batch = student_scores.shape[0]
    rows, columns = torch.triu_indices(batch, batch, 1, device=student_scores.device)
    scores, teacher = student_scores[rows, columns].double(), teacher_scores[rows, columns].double()
    pairs = len(scores)
    counts = torch.zeros(batch, batch, dtype=torch.int64, device=scores.device)
    if pairs < 2:
        return scores.new_zeros(()), counts
    order = teacher.argsort(stable=True)
    s, t = scores[order], teacher[order]
    by_s = s.argsort(stable=True)
    ranks, own, place = s[by_s], s, torch.arange(pairs, device=s.device)
    # Violated with the own pair on the low side, or not with it on the high side: prefixes of the order by S.
    low = _first(pairs, place, lambda x: ~(margin - (ranks[x] - own) > 0))
    high = _first(pairs, place, lambda x: margin - (own - ranks[x]) > 0)
    # Of the order by T: what begins beyond the own pair's ties and gap, and what ends below them.
    above = _first(pairs, place, lambda x: (t[x] > t) & (t[x] - t > min_gap))
    below = _first(pairs, place, lambda x: ~((t > t[x]) & (t - t[x] > min_gap)))
    spans = [(above, below, 1)]
    if reference_ties:
        tied_above = _first(pairs, place, lambda x: t[x] > t)
        tied_below = _first(pairs, place, lambda x: ~(t > t[x]))
        spans += [(place + 1, place, 1), (tied_above, tied_below, -1)]
    within = _prefix_counts(by_s)
    on_low, on_high = torch.zeros_like(place), torch.zeros_like(place)
    for upper, lower, sign in spans:
        on_low += sign * (low - within(low, upper))
        on_high += sign * (lower - within(high, lower))
    violations = on_low - on_high
    total = margin * on_low.sum().double() + ((s - s[pairs // 2]) * violations).sum()
    counts[rows[order], columns[order]] = violations
    return total / (pairs * (pairs - 1) / 2), counts


def _first(pairs: int, place: torch.Tensor, beyond: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """For every element, the first x in [0, pairs) from which on `beyond` holds, or `pairs`: bisection of them all."""
    low, high = torch.zeros_like(place), torch.full_like(place, pairs)
    for _ in range(pairs.bit_length()):
        middle = (low + high) // 2
        found = (low == high) | beyond(middle.clamp(max=pairs - 1))
        low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
    return high


def _prefix_counts(values: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """within(end, bound): how many of values[:end] are below `bound`; values: a permutation."""
    pairs = len(values)
    bits = range(pairs.bit_length() - 1, -1, -1)
    levels = []
    for bit in bits:
        ones = values >> bit & 1 == 1
        zeros = torch.cat([ones.new_zeros(1, dtype=torch.int32), (~ones).cumsum(0, dtype=torch.int32)])
        levels.append(zeros)
        values = torch.cat([values[~ones], values[ones]])

    def within(end: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        start, found = torch.zeros_like(end), torch.zeros_like(end)
        for bit, zeros in zip(bits, levels):
            zero_start, zero_end = zeros[start].long(), zeros[end].long()
            one = bound >> bit & 1 == 1
            found += torch.where(one, zero_end - zero_start, 0)
            start = torch.where(one, zeros[-1] + start - zero_start, zero_start)
            end = torch.where(one, zeros[-1] + end - zero_end, zero_end)
        return found

    return within
