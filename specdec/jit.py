"""Numba as the library uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from filelock import FileLock


def njit(function: Callable[..., Any]) -> Any:
    """Compile on first call and keep the result on disk, or in memory where no folder can be written."""
    try:
        compiled = numba.njit(cache=True)(function)
    except RuntimeError:  # neither beside the source nor in the user's cache folder, as in a read-only container
        return numba.njit(function)
    cache = getattr(compiled, "_cache", None)
    if cache is not None:  # there is none under NUMBA_DISABLE_JIT
        _save_alone(cache._cache_file)
    return compiled


def _save_alone(file: Any) -> None:
    """Let one process at a time save a signature.

    Numba reads its index, takes the next free name and writes; two processes that save two signatures of a function at
    a time take the same name, and one signature runs the other's machine code ever after.
    """
    save = file.save

    def save_alone(key: Any, data: Any) -> None:
        with FileLock(f"{file._index_path}.lock"):
            save(key, data)

    file.save = save_alone
