"""Tables and texts as markdown, as GitHub reads it."""

from __future__ import annotations

import re

from rich.table import Table

ALIGN = {"left": ":---", "right": "---:"}


def escape(text: str) -> str:
    """Text that means itself, also in a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return re.sub(r"[\\`*|\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def markdown_table(table: Table) -> str:
    """The table that the terminal shows, without its title."""
    heads = [escape(str(column.header)) for column in table.columns]
    align = [ALIGN.get(column.justify, ":---") for column in table.columns]
    cells = ([escape(str(cell)) for cell in column.cells] for column in table.columns)
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (heads, align, *zip(*cells, strict=True))
    )
