"""Names to classes. A method's module carries its name; other packages add theirs by entry points.

Built in: ``specdec.drafters.token_recycling`` holds the drafter "token-recycling". Third parties declare entry points
of the groups ``specdec.drafters`` and ``specdec.verifiers``, each naming a class.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import Any, TypeVar

from specdec.contracts import Drafter, Verifier
from specdec.errors import UsageError

Method = TypeVar("Method", Drafter, Verifier)


def drafter_names() -> list[str]:
    """Every drafter that can be named."""
    return _names("specdec.drafters")


def verifier_names() -> list[str]:
    """Every verifier that can be named."""
    return _names("specdec.verifiers")


def drafter_class(name: str) -> type[Drafter]:
    """The class of a drafter; raises UsageError with suggestions for an unknown name."""
    return _load("specdec.drafters", name, Drafter)  # type: ignore[type-abstract]


def verifier_class(name: str) -> type[Verifier]:
    """The class of a verifier; raises UsageError with suggestions for an unknown name."""
    return _load("specdec.verifiers", name, Verifier)  # type: ignore[type-abstract]


def drafter(name: str, **options: Any) -> Drafter:
    """Make a drafter; ``options`` go to its constructor."""
    return _make(drafter_class(name), name, options)


def verifier(name: str, **options: Any) -> Verifier:
    """Make a verifier; ``options`` go to its constructor."""
    return _make(verifier_class(name), name, options)


def options(cls: type[Drafter] | type[Verifier]) -> dict[str, Any]:
    """Names and defaults of a method's options; ``inspect.Parameter.empty`` marks one that must be given."""
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}


def _make(cls: type[Method], name: str, options: dict[str, Any]) -> Method:
    try:
        return cls(**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UsageError(f"{name}: {str(error).replace('__init__()', 'this method')}") from error


def _names(package: str) -> list[str]:
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    built_in = {m.name.replace("_", "-") for m in modules}
    return sorted(built_in | {e.name for e in entry_points(group=package)})


def _load(package: str, name: str, base: type[Method]) -> type[Method]:
    names = _names(package)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        kind = base.__name__.lower()
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        raise UsageError(f"unknown {kind} {name!r}; {hint} (`specdec list` shows all)")
    for entry in entry_points(group=package):
        if entry.name == name:
            return entry.load()
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    for thing in vars(module).values():
        if isinstance(thing, type) and issubclass(thing, base) and getattr(thing, "name", None) == name:
            return thing
    raise UsageError(f"{module.__name__} defines no {base.__name__} named {name!r}")
