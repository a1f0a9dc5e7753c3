"""Results as HTML for a notebook's cell. Every text is escaped: what a model or a task wrote never becomes markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from keel.monitor.live import number
from keel.monitor.printable import printable

TEXT_LIMIT = 300  # characters of a text in a cell


def shown(value: object) -> str:
    """A value as escaped text: numbers short, None as a dash, long texts cut, what shows nothing by itself spelled."""
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return html.escape(number(value))
    return html.escape(printable(str(value), limit=TEXT_LIMIT))


def facts(title: str, values: Mapping[str, object]) -> str:
    """A heading and a table of names and values; what is None is left out."""
    rows = "".join(
        f'<tr><th style="text-align:left">{shown(name)}</th><td style="text-align:left">{shown(value)}</td></tr>'
        for name, value in values.items()
        if value is not None
    )
    return f"<div><strong>{shown(title)}</strong><table>{rows}</table></div>"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A heading and a table with a row of column names."""
    head = "".join(f'<th style="text-align:left">{shown(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{shown(value)}</td>' for value in row) + "</tr>" for row in rows
    )
    return f"<div><strong>{shown(title)}</strong><table><tr>{head}</tr>{body}</table></div>"
