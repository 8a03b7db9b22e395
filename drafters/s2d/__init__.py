"""Sorted speculative decoding (Kavehzadeh et al., arXiv 2407.01955)."""

from specdec.drafters.s2d.drafter import S2D

__all__ = ["S2D"]
