"""The page: blocks -> one HTML file that loads nothing from anywhere."""

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from fastproj.reporting.figures import COLORS, FAINT, INK, Picture
from fastproj.reporting.style import CSS

# The page may load nothing: what it shows is in it. A browser holds it to that.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VARIABLES = {INK: "ink", FAINT: "faint", **{color: f"c{n}" for n, color in enumerate(COLORS)}}


@dataclass(frozen=True)
class Table:
    """A table with a head; ``title``: a line above it. ``folded``: closed until it is clicked."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False
    how: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; ``code``: as it is typed. ``title``: a line above it."""

    text: str
    title: str = ""
    code: bool = False


@dataclass(frozen=True)
class Missing:
    """One line on what is not there, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Download:
    """A link to a file inside the page."""

    name: str
    kind: str  # of its content, such as text/csv
    content: str


Block = Table | Text | Missing | Picture | Download


@dataclass(frozen=True)
class Section:
    """A part of the page: its title, and its blocks in order."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """``title``, one line ``about`` below it, and the sections; those without blocks are left out.

    ``notes``: what could not be read, one line each.
    """

    title: str
    about: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()

    def pictures(self) -> list[Picture]:
        """Every figure of the page."""
        return [b for section in self.sections for b in section.blocks if isinstance(b, Picture)]

    def html(self, refresh: int = 0) -> str:
        """The page. ``refresh``: seconds until a browser loads it again; 0: never."""
        there = [section for section in self.sections if section.blocks]
        links = "".join(
            f'<a href="#part-{n}">{html.escape(part.title)}</a>' for n, part in enumerate(there)
        )
        again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
        notes = "".join(f'<p class="missing">{html.escape(note)}</p>' for note in self.notes)
        body = "".join(_section(n, part) for n, part in enumerate(there))
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="color-scheme" content="light dark">{again}'
            f'<link rel="icon" href="data:,"><title>{html.escape(self.title)}</title>'
            f"<style>{CSS}</style></head><body><header><h1>{html.escape(self.title)}</h1>"
            f"<p>{html.escape(self.about)}</p>{notes}<nav>{links}</nav></header>"
            f"<main>{body}</main></body></html>\n"
        )


def _section(number: int, section: Section) -> str:
    """Neighboring figures share a grid; everything else takes the whole width."""
    parts, grid = [], ""
    for block in section.blocks:
        if isinstance(block, Picture):
            grid += _block(block)
            continue
        if grid:
            parts.append(f'<div class="grid">{grid}</div>')
            grid = ""
        parts.append(_block(block))
    if grid:
        parts.append(f'<div class="grid">{grid}</div>')
    title = html.escape(section.title)
    return f'<section id="part-{number}"><h2>{title}</h2>{"".join(parts)}</section>'


def _block(block: Block) -> str:
    if isinstance(block, Picture):
        return _picture(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Missing):
        return f'<p class="missing">{html.escape(block.what)}: {html.escape(block.why)}</p>'
    if isinstance(block, Download):
        return f"<p>{link(block.name, block.kind, block.content)}</p>"
    title = f"<h3>{html.escape(block.title)}</h3>" if block.title else ""
    text = html.escape(block.text)
    return title + (f"<pre>{text}</pre>" if block.code else f"<p>{text}</p>")


def _picture(picture: Picture) -> str:
    title, how = html.escape(picture.title), html.escape(picture.how)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(picture.head)
    writer.writerows([[cell(value) for value in row] for row in picture.rows])
    numbers = link(f"{picture.name}.csv", "text/csv", file.getvalue(), "numbers (CSV)")
    return (
        f'<figure id="{picture.name}"><h3>{title}</h3>{themed(picture)}'
        f"<figcaption>{how} {numbers}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>"
        for row in table.rows
    ]
    how = f"<p>{html.escape(table.how)}</p>" if table.how else ""
    inner = f'{how}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
    inner += "".join(rows) + "</tbody></table></div>"
    title = html.escape(table.title)
    if table.folded:
        return f"<details><summary>{title} ({len(rows)})</summary>{inner}</details>"
    return f"<h3>{title}</h3>{inner}" if title else inner


def cell(value: Any) -> str:
    """A value as text: numbers to six digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def link(name: str, kind: str, content: str, text: str = "") -> str:
    """A link that saves ``content`` as the file ``name``."""
    data = quote(content, safe=" ,:;/()=+-.")
    return (
        f'<a download="{html.escape(name)}" href="data:{kind};charset=utf-8,'
        f'{html.escape(data)}">{html.escape(text or name)}</a>'
    )


def themed(picture: Picture) -> str:
    """The figure as an ``svg`` element: colors as CSS variables, as wide as its place.

    Its ids begin with the picture's name: those of matplotlib are the same in all figures.
    """
    svg = picture.svg()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", svg, count=1)
    for before in ('id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{picture.name}-")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"\n\s*", " ", svg)  # matplotlib indents by hundreds of kilobytes
    label = html.escape(picture.title, quote=True)
    most = f' style="max-width:{1.5 * float(width[1]):.0f}px"' if width else ""
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"{most}', 1)
