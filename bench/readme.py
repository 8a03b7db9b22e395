"""Puts the measured tables into README.md, so that README and results cannot differ.

python -m specdec.bench.readme README.md RESULTS.md...
"""

from __future__ import annotations

import sys
from pathlib import Path

BEGIN, END = "<!-- results: written by `make results` -->", "<!-- end of results -->"


def insert(readme: str, results: str) -> str:
    """``readme`` with everything between its markers replaced by ``results``."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{results.strip()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    target, *sources = map(Path, sys.argv[1:])
    paragraphs: list[str] = []
    for paragraph in (p.strip() for source in sources for p in source.read_text(encoding="utf-8").split("\n\n")):
        if paragraph.startswith("**") or paragraph not in paragraphs:  # titles, and what was not explained before
            paragraphs.append(paragraph)
    results = "\n\n".join(filter(None, paragraphs))
    target.write_text(insert(target.read_text(encoding="utf-8"), results), encoding="utf-8")
