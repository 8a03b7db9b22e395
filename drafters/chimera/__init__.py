"""Chimera (Zeng et al., arXiv 2402.15758): ``module`` the network, ``drafter`` the trees, ``formats`` other files."""

from specdec.drafters.chimera.drafter import Chimera

__all__ = ["Chimera"]
