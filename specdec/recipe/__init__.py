"""A folder that ``model.generate(custom_generate=FOLDER, trust_remote_code=True)`` decodes with, by itself.

transformers copies or downloads ``custom_generate/generate.py`` and, of what it imports relatively, single files beside
it; it checks ``requirements.txt`` but installs nothing. specdec therefore travels as text in one such file
(``specdec_source.py``: readable, diffable, versioned and cached by transformers like any other remote code), so that
whoever has torch, transformers and numba needs nothing else. Alternatives: naming specdec in ``requirements.txt`` would
stop every call with "missing requirements"; a wheel or a package's folder would not be fetched from the hub.

    DIR/README.md, LICENSE           the hub's card
    DIR/custom_generate/generate.py  ``specdec/recipe/generate.py``, unchanged
                        settings.py  which drafter and verifier, with their options
                        specdec_source.py, requirements.txt
    DIR/files/drafter/OPTION         local heads, tables and draft models that the options name
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import specdec
from specdec import registry
from specdec.errors import UsageError, first_line

ROOT = Path(specdec.__file__).parent
PARTS = {"README.md", "LICENSE", "custom_generate", "files"}
# decoding imports none of them
LEFT_OUT = {"bench", "cli", "recipe", "training", "vllm.py", "zoo", "__pycache__", "__main__.py"}
# options that name a file or a folder; whether it may be a hub id
TRAVEL = {"checkpoint": True, "codebook": False, "draft": True, "table": False, "units": True}
STAY = {
    "profile": "a profile is for one machine; give --drafter what it chose",
    "state": "whoever runs the recipe would write into that folder",
}


def write(
    folder: str | Path,
    drafter: str = "hybrid",
    drafter_options: dict[str, Any] | None = None,
    verifier: str = "standard",
    verifier_options: dict[str, Any] | None = None,
) -> Path:
    """Write a recipe, whole or not at all; an earlier recipe is replaced.

    Args:
        folder: where to.
        drafter, verifier: names of built-in methods, as for ``Decoder``.
        drafter_options, verifier_options: for them, numbers, text and lists of these. Files and folders that
            ``checkpoint``, ``draft``, ``table``, ``units`` and ``codebook`` name are copied; hub ids stay.

    Raises:
        UsageError: the folder holds anything else, a method of another package, an unknown method, an option that
            cannot travel, or a disk that cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or not {p.name for p in folder.iterdir()} <= PARTS):
        raise UsageError(f"DIR {folder}: it holds something else than a recipe; name a new or an empty folder")
    given, ruled = drafter_options or {}, verifier_options or {}
    # made in order to be checked
    methods: list[Any] = [registry.drafter(drafter, **given), registry.verifier(verifier, **ruled)]
    for method in methods:
        if not type(method).__module__.startswith("specdec."):
            raise UsageError(f"{method.name!r} comes with another package, which a recipe cannot bring along")
    files = _sources()
    copied: dict[str, Path] = {}
    settings = {
        "DRAFTER": drafter,
        "DRAFTER_OPTIONS": _travelling("drafter", given, copied),
        "VERIFIER": verifier,
        "VERIFIER_OPTIONS": _travelling("verifier", ruled, copied),
    }
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        code = part / "custom_generate"
        code.mkdir()
        shutil.copyfile(ROOT / "recipe" / "generate.py", code / "generate.py")
        (code / "specdec_source.py").write_text(_as_module(files), encoding="utf-8")
        (code / "requirements.txt").write_text("\n".join(_requirements(files, methods)) + "\n", encoding="utf-8")
        (part / "README.md").write_text(_card(settings, all(method.lossless for method in methods)), encoding="utf-8")
        for file in metadata.files("specdec") or ():
            if file.name == "LICENSE":
                shutil.copyfile(str(file.locate()), part / "LICENSE")
        for name, source in copied.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, part / name, ignore=shutil.ignore_patterns(".*"))
            else:
                shutil.copyfile(source, part / name)
        lines = ['"""What this recipe runs; see README.md."""', "", *(f"{k} = {v!r}" for k, v in settings.items())]
        if copied:  # transformers tells folders of one name apart by their code alone, not by these files
            lines.append(f"# {uuid.uuid4().hex}")
        (code / "settings.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.chmod(0o755)  # made for the owner alone, but it ships to others
        from specdec.heads.checkpoint import replace_folder

        return replace_folder(part, folder)
    except (OSError, shutil.Error) as error:
        raise UsageError(
            f"DIR {folder}: could not be written ({first_line(error)}); free space or give another"
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _travelling(of: str, options: dict[str, Any], copied: dict[str, Path]) -> dict[str, Any]:
    """``options`` as they hold on any machine; ``copied`` gets what goes along: place in the recipe -> source."""
    result = {}
    for name, value in options.items():
        if name in STAY and value is not None:
            raise UsageError(f"{name}={str(value)!r} cannot go into a recipe: {STAY[name]}")
        if name in TRAVEL and isinstance(value, str | Path):
            source = Path(value).expanduser()
            if name == "draft" and source.is_dir() and not (source / "config.json").is_file():
                raise UsageError(f"draft={str(value)!r}: it has no config.json; give a folder of save_pretrained")
            if source.exists():
                value = f"./files/{of}/{name}" + ("" if source.is_dir() else f"/{source.name}")
                copied[value] = source
            elif not TRAVEL[name] or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(value)):
                raise UsageError(f"{name}={str(value)!r}: no such file or folder" + (", nor a hub id" * TRAVEL[name]))
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError):
            raise UsageError(
                f"{name}={value!r} cannot be written down; give a name, a number, or the folder it was saved to"
            ) from None
        result[name] = value
    return result


def _sources() -> dict[str, str]:
    """specdec's files by name, as far as decoding needs them."""
    files = {}
    for where, folders, names in os.walk(ROOT, followlinks=True):  # drafters/ and others are links in a checkout
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in sorted(set(names) - LEFT_OUT):
            if name.endswith(".py"):
                file = Path(where) / name
                files[f"specdec/{file.relative_to(ROOT).as_posix()}"] = file.read_text(encoding="utf-8")
    return files


def _as_module(files: dict[str, str]) -> str:
    """A Python file that says the same, line by line."""
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    lines = [
        f'"""specdec {specdec.__version__} as text, Apache-2.0; unpacked where specdec is not installed."""',
        "",
        f"VERSION = {specdec.__version__!r}",
        f"DIGEST = {digest!r}",
        "FILES = {}",
    ]
    for name, text in files.items():
        quoted = text.replace("\\", "\\\\").replace("'''", "\\'\\'\\'")
        lines.append(f"\nFILES[{name!r}] = '''\\\n{quoted}'''")
    return "\n".join(lines) + "\n"


def _requirements(files: dict[str, str], methods: list[Any]) -> list[str]:
    """What the core and the chosen methods import on loading, with specdec's own bounds.

    One bound a line: transformers reads no more of a line.
    """
    homes = {tuple(type(method).__module__.split(".")[1:3]) for method in methods}  # ("drafters", "suffix")
    imported: set[str] = set()
    for name, text in files.items():
        home = Path(name).with_suffix("").parts[1:3]
        if home[0] not in ("drafters", "verifiers") or home in homes:
            imported |= set(re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE))
    found = []
    for line in metadata.requires("specdec") or ():
        requirement = Requirement(line)
        if requirement.name in imported and requirement.marker is None:
            found += [f"{requirement.name}{bound}" for bound in sorted(map(str, requirement.specifier))] or [line]
    return found


def _card(settings: dict[str, Any], lossless: bool) -> str:
    drafter, verifier = settings["DRAFTER"], settings["VERIFIER"]
    said = {
        True: "The text is the model's own: greedy token ids are those of plain `generate()`, samples follow the same "
        "distribution. (In half precision near-tied argmaxes can flip, as with any change of batch shape.)",
        False: "**Lossy**: this drafter or verifier may change the text; `lossless=True` in a call refuses to run it.",
    }[lossless]
    options = [*settings["DRAFTER_OPTIONS"].items(), *settings["VERIFIER_OPTIONS"].items()]
    told = "".join(f", `{name}={value!r}`" for name, value in options)
    return f"""\
---
library_name: transformers
license: apache-2.0
tags: [custom_generate, speculative-decoding, specdec]
---
# Speculative decoding with specdec: {drafter}

```python
model.generate(**inputs, max_new_tokens=256, custom_generate="THIS REPOSITORY OR FOLDER", trust_remote_code=True)
```

Drafter `{drafter}`, verifier `{verifier}`{told}.
{said}

Needs what `custom_generate/requirements.txt` lists, nothing else: specdec {specdec.__version__} itself comes as text in
`custom_generate/specdec_source.py` (an installed specdec of this version or a newer one is used instead). The first
call compiles what drafters look up with: tens of seconds, once per machine. Once you have read the code, pin it with
`revision="..."`.

Everything that `generate()` takes works as there: sampling, logits processors, stopping criteria, `stop_strings` with
`tokenizer=tokenizer`, streamers, left-padded batches, `return_dict_in_generate`. Beams, guidance, assistants and
encoder-decoder models are refused. In addition:

| keyword | |
|---|---|
| `drafter="suffix"` | another drafter of specdec for this call |
| `drafter_options={{"size": 16}}` | its options, over those above |
| `verifier=`, `verifier_options=` | the same for the verifier |
| `lossless=True` | refuse drafters and verifiers that may change the text |

What a drafter learns stays with the model object, one drafter per setting, and goes with it. transformers looks at the
repository anew in every call; in a loop, load it once:

```python
generate = model.load_custom_generate("THIS REPOSITORY OR FOLDER", trust_remote_code=True)
generate(model=model, **inputs, max_new_tokens=256)
```
"""
