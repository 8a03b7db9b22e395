"""Finds what specdec measured below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib import rc_context

from specdec.bench.page.parts import Section
from specdec.bench.page.readers import READERS, Reader, read_json
from specdec.errors import UsageError, first_line

MAKERS = (
    "`specdec bench --out`, `specdec spec-bench run`, `specdec verify --out`, `specdec tune --out`, `specdec pareto "
    "--out`, `specdec bench-online --out`, `specdec doctor --json`, `specdec train`"
)


def discover(folder: Path, out: Path) -> tuple[list[Section], list[str]]:
    """Everything below ``folder`` that can be shown, by file; hidden folders and ``out`` are passed over.

    Returns:
        The sections, and files that hold a measurement the page has no view of.

    Raises:
        UsageError: no such folder, nothing in it, or the file that is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give one that holds results of {MAKERS}")
    sections, unknown = [], []
    # names are the user's: a dollar sign starts no formula
    with rc_context({"text.parse_math": False}):
        for file in _json_files(folder, out):
            data = read_json(file)
            if not isinstance(data, dict):
                continue
            where = file.relative_to(folder).as_posix()
            reader = next((read for keys, read in READERS if keys <= data.keys()), None)
            if reader is None:
                if isinstance(data.get("environment"), dict):
                    unknown.append(where)
                continue
            try:
                section = reader(data, file)
            except UsageError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UsageError(
                    f"{file}: damaged, it is not what `{_command(reader)}` writes ({first_line(error)}); write it "
                    "again, or move it away"
                ) from error
            if section is not None:
                section.where = where
                sections.append(section)
    if not sections:
        raise UsageError(f"{folder}: there is nothing in it that specdec measured; results are made by {MAKERS}")
    return sections, unknown


def _json_files(folder: Path, out: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and (Path(place) / f).resolve() != out.resolve()]
        found += [Path(place) / name for name in names if name.endswith(".json") and not name.startswith(".")]
    return sorted(found)


def _command(reader: Reader) -> str:
    return (reader.__doc__ or "").split("`")[1]
