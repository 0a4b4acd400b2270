"""Tables and texts as markdown, as GitHub reads it."""

from __future__ import annotations

import re

from rich.table import Table

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
