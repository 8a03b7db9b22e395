"""Decode with specdec: ``model.generate(**inputs, custom_generate=FOLDER_OR_HUB_ID, trust_remote_code=True)``.

transformers fetches this file and the two it imports beside it, and nothing else of the repository: ``settings`` says
which drafter and verifier run, ``specdec_source`` holds specdec as plain text. An installed specdec is preferred to
that text; without one it is written once into transformers' own folder of remote code and imported from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from packaging.version import Version
from transformers.utils import HF_MODULES_CACHE

from .settings import DRAFTER, DRAFTER_OPTIONS, VERIFIER, VERIFIER_OPTIONS  # type: ignore[import-not-found]
from .specdec_source import DIGEST, FILES, VERSION  # type: ignore[import-not-found]

# generate() hands on what it needed itself to fetch this file
LOADING = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
    "revision",
    "token",
    "trust_remote_code",
)


def generate(
    *args: Any,
    model: Any,
    drafter: Any = None,
    verifier: Any = None,
    drafter_options: dict[str, Any] | None = None,
    verifier_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Like ``model.generate``: same arguments, same return types.

    Args:
        drafter, verifier: take another than ``settings`` says (names, or objects of specdec).
        drafter_options, verifier_options: for them; those of ``settings`` hold for what was not given, unless the
            drafter or verifier is another.
        kwargs: ``generate``'s, and ``lossless=True`` to refuse what may change the text.

    Raises:
        specdec.errors.UsageError: a request, drafter or option that cannot be served, with the remedy.
        ImportError: the specdec of this process is older than this recipe.
    """
    if kwargs.get("custom_generate") is not None:
        # the model was loaded together with this recipe, which is its ``generate`` now; specdec asks for the real one
        return type(model).generate(model, *args, **kwargs)
    for name in LOADING:
        kwargs.pop(name, None)
    if drafter in (None, DRAFTER):
        drafter, drafter_options = DRAFTER, {**DRAFTER_OPTIONS, **(drafter_options or {})}
    if verifier in (None, VERIFIER):
        verifier, verifier_options = VERIFIER, {**VERIFIER_OPTIONS, **(verifier_options or {})}
    # a Decoder keeps what it learned and holds its model, so it is kept on the model and goes with it
    kept = vars(model).get("_specdec_recipes")
    if kept is None:
        kept = model._specdec_recipes = Kept()
    key = repr((__name__, drafter, drafter_options, verifier, verifier_options, model.device, model.dtype))
    with kept.lock:  # generate() may be called from several threads, a Decoder may not
        if key not in kept.decoders:
            _import_specdec()  # no import statement: transformers would ask for `pip install` wherever it sees one
            if isinstance(verifier, str):
                verifier = importlib.import_module("specdec.registry").verifier(verifier, **(verifier_options or {}))
            decoder = importlib.import_module("specdec.decoder").Decoder
            tokenizer = kwargs.get("tokenizer")
            kept.decoders[key] = decoder(model, drafter, verifier, tokenizer=tokenizer, **(drafter_options or {}))
        return kept.decoders[key].generate(*args, **kwargs)


class Kept:
    """A model's Decoders."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoders: dict[str, Any] = {}

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies and pickles of the model start without


def _import_specdec() -> None:
    """Make ``specdec`` importable: the installed one, or the copy in ``specdec_source``."""
    found = importlib.util.find_spec("specdec")
    if found is None or found.origin is None:  # a mere folder of that name is no package
        sys.path.append(str(_unpacked()))
    specdec = importlib.import_module("specdec")
    version = getattr(specdec, "__version__", "0")
    if Version(version) < Version(VERSION):
        raise ImportError(
            f"this recipe needs specdec {VERSION} and brings it, but {specdec.__file__} is version {version}: upgrade "
            "or uninstall that one; if another recipe brought it, run this one in a fresh process"
        )


def _unpacked() -> Path:
    """Folder with the files of ``specdec_source``, written whole or not at all; recipes of this version share it."""
    folder = Path(HF_MODULES_CACHE) / f"specdec-{DIGEST}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=HF_MODULES_CACHE) as scratch:
            part = Path(scratch) / folder.name
            for name, text in FILES.items():
                file = part / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            try:
                part.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def _placed(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with values "./files/..." as paths to this repository's own files, downloaded if need be."""
    if not any(str(value).startswith("./files/") for value in options.values()):
        return options
    # only the loader that is importing this file right now knows where it came from
    frame: Any = sys._getframe()
    while frame.f_code.co_name != "load_custom_generate":
        frame = frame.f_back
    source, loading = frame.f_locals["pretrained_model_name_or_path"], frame.f_locals["kwargs"]
    folder = Path(source).resolve()
    if not folder.is_dir():
        commit = Path(__file__).parents[1].name  # of the code that is running, so that files and code fit
        where = {name: loading[name] for name in ("cache_dir", "token") if name in loading}
        offline = constants.HF_HUB_OFFLINE  # some versions ask the hub all the same
        folder = Path(
            snapshot_download(source, revision=commit, allow_patterns="files/*", local_files_only=offline, **where)
        )
    return {k: str(folder / v) if str(v).startswith("./files/") else v for k, v in options.items()}


DRAFTER_OPTIONS, VERIFIER_OPTIONS = _placed(DRAFTER_OPTIONS), _placed(VERIFIER_OPTIONS)
