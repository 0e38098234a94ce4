"""Scatter and line plots as inline SVG, with names beside their lines."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from leafkern.report.html import Html

WIDTH, HEIGHT = 860, 400
_LEFT, _TOP, _BOTTOM = 62, 44, 52
_NAME_GAP = 17
_COLOURS = 6


class Point(NamedTuple):
    """mark: a name that decides the shape (explained above the plot); note: shown when the pointer rests on it."""

    x: float
    y: float
    mark: str = ""
    note: str = ""


class Series(NamedTuple):
    """Points of one colour. line: the points to join, in order; level: a dashed line across at this y instead."""

    name: str
    points: Sequence[Point] = ()
    line: Sequence[tuple[float, float]] | None = None
    level: float | None = None


def frontier(points: Sequence[tuple[float, float]], *, larger_x_better: bool = False) -> list[tuple[float, float]]:
    """The points that no other beats in both: y as large, x as small (or as large) as can be; in order of x."""
    best, kept = -math.inf, []
    for x, y in sorted(points, key=lambda p: (-p[0] if larger_x_better else p[0], -p[1])):
        if y > best:
            best = y
            kept.append((x, y))
    return sorted(kept)


def scatter(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    caption: str = "",
    x_ticks: Sequence[float] | None = None,
) -> Html:
    """A plot of `series`; x, y: what the axes show, with units. Points with NaN are left out."""
    series = [
        one._replace(points=[p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)]) for one in series
    ]
    xs = [p.x for one in series for p in one.points] + [p[0] for one in series for p in one.line or ()]
    ys = [p.y for one in series for p in one.points] + [one.level for one in series if one.level is not None]
    if not xs:
        return Html("<p>Nothing to plot.</p>")
    right = 24 + max(8.2 * len(one.name) for one in series)
    place_x, ticks_x = _axis(xs, _LEFT, WIDTH - right, log_x, x_ticks, 8)
    place_y, ticks_y = _axis(ys, HEIGHT - _BOTTOM, _TOP, False, None, 6)
    marks = list(dict.fromkeys(p.mark for one in series for p in one.points))
    out = [_frame(place_x, place_y, ticks_x, ticks_y, WIDTH - right, x, y), _legend(marks)]
    ends = []
    for number, one in enumerate(series):
        body = []
        if one.level is not None:
            at = place_y(one.level)
            body.append(f'<path class="line" stroke-dasharray="5 4" d="M{_LEFT} {at:.1f}H{WIDTH - right:.1f}"/>')
            ends.append((number, WIDTH - right, at))
        elif one.line or one.points:
            line = [(place_x(a), place_y(b)) for a, b in one.line or ()]
            if len(line) > 1:
                body.append(f'<path class="line" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in line)}"/>')
            joined = set(one.line or ())
            for p in one.points:
                faint = one.line is not None and (p.x, p.y) not in joined
                shape = _shape(marks.index(p.mark), place_x(p.x), place_y(p.y))
                title = f"<title>{escape(p.note)}</title>" if p.note else ""
                group = '<g class="faint">' if faint else "<g>"
                body.append(group + shape.replace("/>", f">{title}</path>") + "</g>")
            ends.append((number, *max(line or [(place_x(p.x), place_y(p.y)) for p in one.points])))
        out.append(f'<g class="s{number % _COLOURS}">{"".join(body)}</g>')
    out.append(_names(series, ends, WIDTH - right))
    label = escape(f"{y} against {x}", quote=True)
    figure = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(out)}</svg>'
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{figure}{note}</figure>")


def _axis(
    values: Sequence[float], start: float, end: float, log: bool, ticks: Sequence[float] | None, most: int
) -> tuple[Callable[[float], float], list[float]]:
    """Where values go between the pixels `start` and `end`, and at most about `most` round ticks among them."""
    low, high = min(values), max(values)
    log = log and low > 0
    if log:
        low, high = math.log(low), math.log(high)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return start + ((math.log(value) if log else value) - low) / (high - low) * (end - start)

    if ticks is None:
        ticks = _log_ticks(low, high, most) if log else _linear_ticks(low, high, most)
    return place, list(ticks)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    exponents = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    for mantissas in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= math.log(m * 10.0**e) <= high]
        if len(ticks) <= most + 1:
            return ticks
    return ticks


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """All in one unit, the largest tick's, from ten thousand on."""
    largest = max(map(abs, ticks), default=0)
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= least:
            return [f"{tick / size:g}{unit if tick else ''}" for tick in ticks]
    return [f"{tick:g}" for tick in ticks]


def _frame(place_x, place_y, ticks_x, ticks_y, right, x, y) -> str:
    bottom = HEIGHT - _BOTTOM
    parts = []
    for tick, text in zip(ticks_y, _tick_texts(ticks_y)):
        at = place_y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(ticks_x, _tick_texts(ticks_x)):
        at = place_x(tick)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v5"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right:.1f}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="{_LEFT - 50}" y="16">{escape(y)}</text>')
    return "".join(parts)


def _legend(marks: Sequence[str]) -> str:
    if len(marks) < 2:
        return ""
    at, parts = WIDTH - 8.0, []
    for number, mark in reversed(list(enumerate(marks))):
        at -= 7.4 * len(mark)
        parts.append(f'<text x="{at:.1f}" y="16">{escape(mark)}</text>')
        parts.append(f'<g style="fill:var(--soft)">{_shape(number, at - 11, 12)}</g>')
        at -= 36
    return "".join(parts)


def _shape(number: int, x: float, y: float) -> str:
    """A mark of about 10 pixels, centred: circle, square, triangle, diamond, plus, ring."""
    r = 5.0
    paths = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - 4.6:.1f} {y - 4.6:.1f}h9.2v9.2h-9.2z",
        f"M{x:.1f} {y - 5.8:.1f}l5.8 10.2h-11.6z",
        f"M{x:.1f} {y - 6.4:.1f}l6.4 6.4l-6.4 6.4l-6.4 -6.4z",
        f"M{x - 2.1:.1f} {y - 6:.1f}h4.2v3.9h3.9v4.2h-3.9v3.9h-4.2v-3.9h-3.9v-4.2h3.9z",
        f"M{x:.1f} {y + 5.8:.1f}l5.8 -10.2h-11.6z",
    )
    return f'<path class="mark" d="{paths[number % len(paths)]}"/>'


def _names(series: Sequence[Series], ends: list[tuple[int, float, float]], right: float) -> str:
    """Each series' name right of its end, moved apart where two would overlap, with a thin line back to it."""
    placed: list[list[float]] = []
    for number, x, y in sorted(ends, key=lambda end: end[2]):
        at = max(y, placed[-1][3] + _NAME_GAP) if placed else max(y, _TOP - 8)
        placed.append([number, x, y, at])
    limit = HEIGHT - _BOTTOM
    for entry in reversed(placed):
        entry[3] = min(entry[3], limit)
        limit = entry[3] - _NAME_GAP
    parts = []
    for number, x, y, at in placed:
        name = escape(series[int(number)].name)
        back = (
            f'<path class="lead-line" d="M{x + 8:.1f} {y:.1f}L{right + 8:.1f} {at:.1f}"/>' if x + 9 < right + 6 else ""
        )
        text = f'<text class="name" x="{right + 12:.1f}" y="{at + 4.5:.1f}">{name}</text>'
        parts.append(f'<g class="s{int(number) % _COLOURS}">{back}{text}</g>')
    return "".join(parts)
