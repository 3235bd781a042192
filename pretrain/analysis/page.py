"""A report as one HTML file that stands alone: no script, no network, pictures inside."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import InputError, first_line
from pretrain.run.durable import write_text

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1180px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0.2em; }
h2 { font-size: 1.2em; margin: 2em 0 0.4em; border-bottom: 1px solid #d8dee4; }
p { max-width: 75ch; }
p.verdict { font-size: 1.15em; padding: 0.6em 0.9em; border-left: 5px solid #8b949e; background: #f6f8fa;
  max-width: none; }
p.good { border-color: #2da44e; }
p.doubtful { border-color: #d4a72c; }
p.bad { border-color: #cf222e; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8em 0; }
th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #eaeef2;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; border-bottom-color: #8b949e; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.facts th, table.facts td { text-align: left; border: 0; }
table.pictures td, table.pictures th { text-align: center; border: 0; padding: 3px; font-weight: 400;
  font-size: 0.85em; }
table.pictures img { image-rendering: pixelated; display: block; }
figure { margin: 0.8em 0; display: inline-block; vertical-align: top; max-width: 100%; }
figure img { max-width: 100%; display: block; }
figcaption { color: #57606a; font-size: 0.9em; max-width: 60ch; }
"""
WIDTH, GAP = 1180, 6  # pixels of the page, and between pictures
SMALLEST, LARGEST = 84, 150  # pixels of a picture in a table; where they do not fit, the table scrolls
Picture = tuple[bytes, str]  # content, and what it shows in words


class Table(NamedTuple):
    """Headings and rows; the first column is text, the others are figures."""

    headings: list[str]
    rows: list[list[str]]


class Page:
    """A report that grows from top to bottom; all text is escaped."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self.text(subtitle)

    def section(self, heading: str, *paragraphs: str) -> None:
        """A heading, and text under it."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")
        for paragraph in paragraphs:
            self.text(paragraph)

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def verdict(self, line: str, tone: str = "") -> None:
        """The answer, in a box; `tone` is good, doubtful, bad or nothing."""
        self._parts.append(f'<p class="verdict {escape(tone)}">{escape(line)}</p>')

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Text left in the first column, figures right in the others."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f'<div class="scroll">{table}</div>')

    def figure(self, picture: Picture, caption: str = "") -> None:
        """A plot (SVG) or a picture (PNG)."""
        under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{_image(picture)}{under}</figure>")

    def pictures(self, columns: Sequence[str], rows: Sequence[Sequence[Picture]]) -> None:
        """Small pictures under the titles of their columns."""
        head = "".join(f"<th>{escape(title)}</th>" for title in columns)
        width = min(LARGEST, max(SMALLEST, WIDTH // max(1, len(columns)) - GAP))
        body = "".join(
            f"<tr>{''.join(f'<td>{_image(cell, width)}</td>' for cell in row)}</tr>" for row in rows
        )
        table = f'<table class="pictures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        self._parts.append(f'<div class="scroll">{table}</div>')

    def facts(self, values: Mapping[str, str]) -> None:
        """Names and values, a row each."""
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items())
        self._parts.append(f'<div class="scroll"><table class="facts">{"".join(rows)}</table></div>')

    def html(self) -> str:
        """The whole document."""
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style>'
        icon = '<link rel="icon" href="data:,">'  # else browsers ask for one
        body = "\n".join(self._parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}{icon}</head>\n<body>\n{body}\n</body></html>\n'

    def write(self, path: Path) -> None:
        """To a file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, self.html())
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({first_line(error)})") from error


def figures_path(page: Path) -> Path:
    """Where the figures of a page go; not NAME.json, which belongs to weights of that name."""
    return page.with_suffix(".figures.json")


def write_figures(page: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures of a page beside it.

    Raises:
        InputError: they cannot be written.
    """
    path = figures_path(page)
    try:
        write_text(path, json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({first_line(error)})") from error


def check_page(page: Path, force: bool, option: str = "--report") -> None:
    """Refuse a page that cannot be written, before the work is done.

    Raises:
        InputError: it is no .html, or it or its figures exist and `force` is not set.
    """
    if page.suffix != ".html":
        raise InputError(f"{option}: {page} must end in .html; figures go beside it, in .figures.json")
    for path in (page, figures_path(page)):
        if path.exists() and not force:
            raise InputError(f"{option}: {path} exists; choose another name, or --force")


def _image(picture: Picture, width: int | None = None) -> str:
    content, shows = picture
    size = f' width="{width}"' if width else ""
    kind = "png" if content.startswith(b"\x89PNG") else "svg+xml"
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(shows)}"{size} src="data:image/{kind};base64,{data}">'
