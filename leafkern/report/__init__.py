"""Reports as one HTML page: no scripts, nothing loaded from elsewhere, every text escaped, light and dark.

render("Search", [Section("Speed", [
    "What the reader should know first.",
    table(["system", "queries/s"], [["ours", 812.0], ["theirs", 174.0]], best={"queries/s": "max"}),
    scatter([Series("ours", [Point(48, 0.97)])], x="bytes per vector", y="recall", log_x=True),
])])
"""

from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from typing import NamedTuple

from leafkern.report.html import Html
from leafkern.report.plot import Point, Series, scatter

__all__ = ["Html", "Point", "Section", "Series", "cards", "preformatted", "render", "scatter", "table"]


class Section(NamedTuple):
    """A heading and its parts: strings become paragraphs, escaped; `Html` (tables, plots, cards) stands as it is."""

    heading: str
    parts: Sequence[str | Html]


def render(title: str, sections: Sequence[Section], *, lead: str | Html = "", foot: str = "") -> str:
    """The whole page. lead: the sentence below the title; foot: machine, versions."""
    body = [f"<header><h1>{escape(title)}</h1>{_part(lead, 'lead') if lead else ''}</header>"]
    for section in sections:
        heading = f"<h2>{escape(section.heading)}</h2>" if section.heading else ""
        body.append(f"<section>{heading}{''.join(_part(part) for part in section.parts)}</section>")
    if foot:
        body.append(f"<footer>{escape(foot)}</footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _part(part: str | Html, kind: str = "") -> str:
    if isinstance(part, Html):
        return part
    return f'<p class="{kind}">{escape(part)}</p>' if kind else f"<p>{escape(part)}</p>"


def cards(facts: Sequence[tuple[str, str]]) -> Html:
    """A row of headline figures: (figure, what it is)."""
    items = "".join(
        f"<div><strong>{escape(value)}</strong><span>{escape(label)}</span></div>" for value, label in facts
    )
    return Html(f'<div class="cards">{items}</div>')


def preformatted(text: str) -> Html:
    """Text as it stands, in a fixed-width font."""
    return Html(f"<pre>{escape(text)}</pre>")


def format_value(value: object, form: str = "") -> str:
    """A cell's text: None is a dash; `form` a format spec; else whole numbers with separators, others 4 digits."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if value != value:
        return "NaN"
    if form:
        return format(value, form)
    if isinstance(value, Integral) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    formats: Mapping[str, str] | None = None,
    best: Mapping[str, str] | None = None,
    group: str | None = None,
    caption: str = "",
) -> Html:
    """Columns of numbers stand to the right. formats: format spec by column. best: by column "max" or "min", marked.

    group: a column whose changes of value draw a line, and whose repeats are left out.
    """
    formats, best = formats or {}, best or {}
    numeric = [all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))]
    targets = {}
    for name, kind in best.items():
        shown = [row[columns.index(name)] for row in rows if _is_number(row[columns.index(name)])]
        if shown:
            targets[name] = format_value({"max": max, "min": min}[kind](shown), formats.get(name, ""))
    head = "".join(f'<th scope="col"{_number_class(n)}>{escape(name)}</th>' for name, n in zip(columns, numeric))
    lines, previous = [], object()
    for row in rows:
        key = row[columns.index(group)] if group else None
        cells = []
        for name, value, is_number in zip(columns, row, numeric):
            text = format_value(value, formats.get(name, ""))
            classes = (["n"] if is_number else []) + (["best"] if targets.get(name) == text else [])
            if name == group and key == previous:
                text = ""
            attribute = f' class="{" ".join(classes)}"' if classes else ""
            cells.append(f"<td{attribute}>{escape(text)}</td>")
        first = ' class="first"' if group and key != previous and lines else ""
        lines.append(f"<tr{first}>{''.join(cells)}</tr>")
        previous = key
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number_class(is_number: bool) -> str:
    return ' class="n"' if is_number else ""


_CSS = """
:root{--bg:#fcfcfa;--ink:#1d2126;--soft:#5b636d;--line:#e2e3df;--card:#fff;--best:#0a6b47;--best-bg:#e6f4ec;
--c0:#1f6fb4;--c1:#c8501e;--c2:#2a8a57;--c3:#8a4fb0;--c4:#a8760a;--c5:#b03060}
@media (prefers-color-scheme:dark){:root{--bg:#15181c;--ink:#e7e9ea;--soft:#9ba4ae;--line:#30363d;--card:#1c2025;
--best:#7fdcae;--best-bg:#173527;--c0:#6cb2f0;--c1:#f08d5e;--c2:#6fce9c;--c3:#c79af0;--c4:#e3b34c;--c5:#ef86a8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:900px;margin:0 auto;padding:40px 24px 56px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.015em}
h2{font-size:20px;margin:44px 0 8px;letter-spacing:-.01em}
p{margin:8px 0;max-width:72ch}.lead{color:var(--soft);font-size:17px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:20px 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.cards strong{display:block;font-size:25px;line-height:1.2;font-variant-numeric:tabular-nums}
.cards span{color:var(--soft);font-size:14px;line-height:1.35;display:block;margin-top:4px}
.scroll{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:6px}
th,td{padding:5px 7px;text-align:left;white-space:nowrap}th:first-child,td:first-child{padding-left:0}
th{font-weight:600;color:var(--soft);border-bottom:1px solid var(--ink);vertical-align:bottom;white-space:normal;
line-height:1.25}
td{border-bottom:1px solid var(--line)}tr.first td{border-top:2px solid var(--soft)}.n{text-align:right}
td.best{color:var(--best);background:var(--best-bg);font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;
font:13px/1.5 ui-monospace,"SFMono-Regular",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap}
figure{margin:16px 0 8px}figcaption{color:var(--soft);font-size:14px;max-width:72ch}
svg{display:block;width:100%;height:auto;font:13px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
svg text{fill:var(--soft)}svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--soft);stroke-width:1}
svg .name{font-weight:600;font-size:14px}
svg .mark{stroke:var(--bg);stroke-width:1.2}svg .faint{opacity:.35}
footer{margin-top:48px;padding-top:12px;border-top:1px solid var(--line);color:var(--soft);font-size:13px}
@media (max-width:600px){main{padding:24px 14px}h1{font-size:25px}}
""" + "".join(
    f"svg .s{i} .mark{{fill:var(--c{i})}}svg .s{i} .line{{stroke:var(--c{i});fill:none;stroke-width:2}}"
    f"svg .s{i} .name{{fill:var(--c{i})}}svg .s{i} .lead-line{{stroke:var(--c{i});stroke-width:1;opacity:.5}}"
    for i in range(6)
)
