"""Lexical unit decoding (Sun et al., arXiv 2405.15208): ``units`` texts and files, ``learner`` and ``drafter``."""

from specdec.drafters.lexical_units.drafter import LexicalUnits
from specdec.drafters.lexical_units.units import Units, load_merged

__all__ = ["LexicalUnits", "Units", "load_merged"]
