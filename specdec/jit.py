"""Numba as the library uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(function: Callable[..., Any]) -> Any:
    """Compile on first call and keep the result on disk, or in memory where no folder can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither beside the source nor in the user's cache folder, as in a read-only container
        return numba.njit(function)
