"""How a report writes numbers, tables and texts: plain, as markdown, as HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping

import markdown
from rich.table import Table

from .arm_rows import is_share
from .statistics import Estimate

NOTHING = "-"


def column_head(name: str) -> str:
    """Of a column, in lines."""
    return f"{name}\n(%)" if is_share(name) else name


def estimate_text(name: str, estimate: Estimate, sign: str = "") -> str:
    """A mean with its interval, if it has one. A mean that is not finite is shown as nan or inf;
    without any value there is nothing to show.

    Args:
        sign: "+" shows the sign of a difference.
    """
    if estimate.n == 0:
        return NOTHING
    share = is_share(name)
    mean = f"{100 * estimate.mean:{sign}.1f}" if share else f"{estimate.mean:{sign}.4g}"
    if math.isnan(estimate.half):
        return mean
    return f"{mean} ±{100 * estimate.half:.1f}" if share else f"{mean} ±{estimate.half:.2g}"


def mean_text(estimate: Estimate, form: str) -> str:
    return NOTHING if estimate.n == 0 else form.format(estimate.mean)


def p_text(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


ALIGNMENTS = {"left": ":---", "right": "---:"}


def escape_markdown(text: str) -> str:
    """Text that means itself, also in a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return re.sub(r"[\\`*|\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def markdown_table(table: Table) -> str:
    """The table that the terminal shows, without its title."""
    heads = [escape_markdown(str(column.header)) for column in table.columns]
    align = [ALIGNMENTS.get(column.justify, ":---") for column in table.columns]
    cells = ([escape_markdown(str(cell)) for cell in column.cells] for column in table.columns)
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (heads, align, *zip(*cells, strict=True))
    )


PAGE_STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --line: #ddd; --soft: #f5f5f5 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #181818; --line: #444; --soft: #222 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line) }
code { background: var(--soft); padding: .1em .3em }
.table { overflow-x: auto; margin: 1em 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--soft) }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back) }
th:first-child { background: var(--soft) }
figure { margin: 1.5em 0; overflow-x: auto }
figure svg { background: #fff; max-width: 100%; height: auto }
figcaption { font-size: 13px }
"""


def html_page(title: str, text: str, svgs: Mapping[str, str]) -> str:
    """A whole document that refers to nothing outside.

    text: the report. svgs: its figures by the paths that it names.
    """
    body = markdown.markdown(text, extensions=["tables"], output_format="html")
    body = body.replace("<table>", '<div class="table"><table>')
    body = body.replace("</table>", "</table></div>")
    body = re.sub(
        r'<p><img alt="([^"]*)" src="([^"]*)"\s*/?></p>',
        lambda m: f"<figure>{_inline_svg(svgs[m[2]])}<figcaption>{m[1]}</figcaption></figure>",
        body,
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _inline_svg(svg: str) -> str:
    """The element alone, without the ids of its groups, which several figures share."""
    element = svg[svg.index("<svg") :]
    return re.sub(r'<g id="[^"]*"', "<g", element).strip()
