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


def success(metrics: Mapping[str, object]) -> str | None:
    """`success` of an evaluation with its interval, in words; None if the environment does not say what one is."""
    found = [metrics.get(name) for name in ("success", "success_low", "success_high")]
    numbers = [value for value in found if isinstance(value, (int, float))]
    if len(numbers) < 3:
        return None
    share, low, high = (f"{100 * value:.1f} %" for value in numbers)
    return f"{share} (95 % interval {low} to {high})"
