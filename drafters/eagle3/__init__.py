"""EAGLE-3 (Li et al., arXiv 2503.01840): ``module`` the head, ``drafter`` the trees, ``formats`` other tools' files."""

from specdec.drafters.eagle3.drafter import Eagle3

__all__ = ["Eagle3"]
