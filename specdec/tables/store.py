"""Table files: safetensors with a header that says whose they are.

Header (the file's metadata): ``specdec`` format version, ``kind`` of table, ``fingerprint`` of the tokenizer,
``vocab_size``, ``crc`` of every array, and the table's own ``facts`` as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from specdec.errors import UsageError

VERSION = "1"


def fingerprint(tokenizer: Any) -> str:
    """A hash of which token has which id: tables are lists of ids and mean nothing under another numbering."""
    vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def write(
    path: str | Path,
    kind: str,
    tokenizer_print: str,
    vocab_size: int,
    arrays: dict[str, np.ndarray],
    facts: dict[str, Any],
) -> None:
    """Write a table file whole or not at all: an earlier file of the name stays until the new one is complete.

    Raises:
        UsageError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {
        "specdec": VERSION,
        "kind": kind,
        "fingerprint": tokenizer_print,
        "vocab_size": str(vocab_size),
        "crc": json.dumps({name: zlib.crc32(array.data.cast("B")) for name, array in arrays.items() if array.size}),
        "facts": json.dumps(facts),
    }
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(
            f"path {str(path)!r}: cannot write there ({error.strerror}); name a file in a folder that exists"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(arrays, header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def header(path: str | Path) -> dict[str, Any]:
    """What a table file says of itself: kind, fingerprint, vocab_size, facts, and shapes of the arrays.

    Raises:
        UsageError: no such file, not a table, truncated, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"table {str(path)!r}: no such file; `specdec table build` or drafter.save(path) makes one")
    try:
        with safe_open(path, framework="numpy") as file:
            found = file.metadata() or {}
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"table {str(path)!r}: not a table, or cut short ({error}); make it again") from None
    if "specdec" not in found:
        raise UsageError(f"table {str(path)!r}: a safetensors file, but not a table of specdec; give one made by save")
    if found["specdec"] != VERSION:
        raise UsageError(
            f"table {str(path)!r}: format {found['specdec']}, this version of specdec reads {VERSION}; make it again"
        )
    facts, crc = json.loads(found["facts"]), json.loads(found["crc"])
    return {**found, "vocab_size": int(found["vocab_size"]), "facts": facts, "crc": crc, "shapes": shapes}


def read(
    path: str | Path, kind: str, tokenizer_print: str, vocab_size: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of a table file.

    Raises:
        UsageError: as ``header``; another drafter's table, another tokenizer's, or contents that are damaged.
    """
    found = header(path)
    if found["kind"] != kind:
        raise UsageError(f"table {str(path)!r}: made by drafter {found['kind']!r}, not {kind!r}; load it there")
    if (found["fingerprint"], found["vocab_size"]) != (tokenizer_print, vocab_size):
        raise UsageError(
            f"table {str(path)!r}: made with another tokenizer (fingerprint {found['fingerprint'][:8]}, "
            f"{found['vocab_size']} ids; here {tokenizer_print[:8]}, {vocab_size} ids); build a table for this model"
        )
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, array in arrays.items():
        if array.size and zlib.crc32(np.ascontiguousarray(array).data.cast("B")) != found["crc"].get(name):
            raise UsageError(f"table {str(path)!r}: array {name!r} is damaged (checksum differs); make it again")
    return arrays, found["facts"]
