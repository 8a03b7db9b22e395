"""Medusa (Cai et al., arXiv 2401.10774): ``module`` the heads, ``drafter`` the trees, ``formats`` others' files."""

from specdec.drafters.medusa.drafter import Medusa

__all__ = ["Medusa"]
