"""What notebooks show of gpuconv's objects: fragments of HTML that bring their own style and load nothing.

Colours are the notebook's own, so that they can be read in light and dark. Every text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_TABLE = "border-collapse:collapse;margin:.25em 0"
_CELL = "text-align:left;vertical-align:top;padding:.15em .9em .15em 0;border:0"
_NAME = f"{_CELL};opacity:.75;font-weight:normal;white-space:nowrap"
_HEAD = f"{_CELL};border-bottom:1px solid rgba(128,128,128,.5);font-weight:600"
_NUMBER = "text-align:right;padding:.1em .6em;border:1px solid rgba(128,128,128,.35);font-variant-numeric:tabular-nums"


def fields(rows: Iterable[tuple[str, str]]) -> str:
    """Names and their values."""
    lines = [
        f'<tr><th style="{_NAME}">{_safe(name)}</th><td style="{_CELL}">{_safe(value)}</td></tr>'
        for name, value in rows
    ]
    return f'<table style="{_TABLE}"><tbody>{"".join(lines)}</tbody></table>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], strong: int | None = None) -> str:
    """A table with a head; row ``strong`` stands out."""
    titles = "".join(f'<th style="{_HEAD}">{_safe(title)}</th>' for title in head)
    lines = []
    for at, row in enumerate(rows):
        style = f"{_CELL};font-weight:600" if at == strong else _CELL
        lines.append("<tr>" + "".join(f'<td style="{style}">{_safe(cell)}</td>' for cell in row) + "</tr>")
    return f'<table style="{_TABLE}"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def numbers(rows: Iterable[Iterable[str]]) -> str:
    """A matrix."""
    lines = ("<tr>" + "".join(f'<td style="{_NUMBER}">{_safe(cell)}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<table style="{_TABLE}"><tbody>{"".join(lines)}</tbody></table>'


def paragraph(text: str) -> str:
    """A line or more of prose."""
    return f'<p style="margin:.25em 0">{_safe(text)}</p>'


def folded(summary: str, content: str) -> str:
    """``content``, HTML already, behind a line to click."""
    return f'<details><summary style="cursor:pointer">{_safe(summary)}</summary>{content}</details>'


def page(document: str, title: str, height: int) -> str:
    """A page of its own inside the output, which can run its script but reach nothing of the notebook's."""
    return (
        f'<iframe srcdoc="{html.escape(document)}" sandbox="allow-scripts" title="{_safe(title)}" '
        f'style="width:100%;height:{height}px;border:1px solid rgba(128,128,128,.35);border-radius:6px"></iframe>'
    )


def block(*parts: str) -> str:
    """Fragments one below the other."""
    return f"<div>{''.join(parts)}</div>"


def _safe(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
