"""Sections to report.html, report.md and the figures as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from specdec.bench.page.parts import Picture, Section, Table
from specdec.bench.report import replace_bytes

INTRODUCTION = (
    "Everything below was read from files that specdec's commands wrote; nothing was measured again. Speed-ups are "
    "ratios of total tokens over total time on the same prompts, their intervals 95 % bootstraps over prompts."
)


@dataclass(frozen=True)
class Drawing:
    """A figure as files, under ``stem``, and inside the page."""

    stem: str
    svg: bytes
    png: bytes
    inline: Markup


def write(
    sections: Sequence[Section],
    unknown: Sequence[str],
    title: str,
    out: Path,
    progress: Callable[[int, int, str], None],
) -> list[Path]:
    """Write report.html, report.md, and every figure as PNG and SVG, each whole or not at all.

    Args:
        sections, unknown: from ``discover``.
        title: of the page.
        out: a folder that exists.
        progress: called with figures drawn, figures in all, and the figure's name.

    Returns:
        The files, the page first. The same input makes the same bytes.
    """
    drawings = _drawings(sections, progress)
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = engine.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    inline = {picture: drawing.inline for picture, drawing in drawings.items()}
    page = template.render(
        title=title, introduction=INTRODUCTION, summaries=list(map(_summary, sections)), sections=sections,
        unknown=unknown, drawings=inline,
    )  # fmt: skip
    contents = {"report.html": page.encode(), "report.md": _markdown(sections, unknown, title, drawings).encode()}
    for drawing in drawings.values():
        contents |= {f"{drawing.stem}.svg": drawing.svg, f"{drawing.stem}.png": drawing.png}
    for name, content in contents.items():
        replace_bytes(out / name, content)
    return [out / name for name in contents]


def _summary(section: Section) -> str:
    count = f"{len(section.notes)} note{'s' * (len(section.notes) != 1)}"
    return ", ".join(filter(None, [section.where, section.provenance.get("date", "")[:10], count]))


def _drawings(sections: Sequence[Section], progress: Callable[[int, int, str], None]) -> dict[Picture, Drawing]:
    pictures = [(section, picture) for section in sections for picture in section.pictures]
    taken: dict[str, Drawing] = {}
    found = {}
    for i, (section, picture) in enumerate(pictures):
        progress(i, len(pictures), f"{section.where}: {picture.caption}")
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", f"{section.where.removesuffix('.json')}-{picture.name}").strip("-.")
        while stem in taken:
            stem += "-"
        svg, png = _svg(picture.figure, stem), BytesIO()
        picture.figure.savefig(png, format="png", dpi=150)
        taken[stem] = found[picture] = Drawing(stem, svg.encode(), png.getvalue(), _inline(svg, stem))
    return found


def _svg(figure: Figure, stem: str) -> str:
    """Text stays text; the same figure gives the same bytes, and two figures of a page share no ids."""
    drawn = BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": stem}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue().decode()


def _inline(svg: str, stem: str) -> Markup:
    """For the page: without prologue, in the page's own ink and paper, ids only where something refers to them."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("#000000", "currentColor").replace("fill: #ffffff", "fill: none")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{stem}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{stem}-", svg)
    return Markup(svg)  # matplotlib has escaped what is text in it


def _markdown(sections: Sequence[Section], unknown: Sequence[str], title: str, drawings: dict[Picture, Drawing]) -> str:
    lines = [f"# specdec: {_escape(title)}", "", INTRODUCTION, ""]
    lines += [
        f"{i}. {_escape(f'{s.kind}: {s.title}')} ({_escape(_summary(s))}): {_escape(s.finding)}"
        for i, s in enumerate(sections, start=1)
    ]
    lines.append("")
    if unknown:
        lines += [f"Measured, but without a view here: {_escape(', '.join(unknown))}.", ""]
    for section in sections:
        lines += [f"## {_escape(f'{section.kind}: {section.title}')}", "", f"{_escape(section.where)}", ""]
        lines += [f"**{_escape(section.finding)}**", ""]
        lines += [*(f"- {_escape(note)}" for note in section.notes)]
        lines += [*(f"- Not shown: {_escape(line)}" for line in section.missing), ""]
        for part in section.parts:
            if isinstance(part, Picture):
                lines += [f"![{_escape(part.caption)}]({drawings[part].stem}.png)", ""]
            else:
                lines += [f"**{_escape(part.caption)}**", "", *_rows(part), "", _escape(part.note), ""]
        if section.provenance:
            pairs = [[name, value] for name, value in section.provenance.items()]
            lines += [*_rows(Table("", ["provenance", ""], pairs, words=2)), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _rows(table: Table) -> list[str]:
    rules = ["---" if i < table.words else "---:" for i in range(len(table.headers))]
    lines = [table.headers, *table.rows]
    cells = ["| " + " | ".join(map(_escape, line)) + " |" for line in lines]
    return [cells[0], "| " + " | ".join(rules) + " |", *cells[1:]]


def _escape(text: str) -> str:
    """Text that Markdown takes as text, on one line."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
