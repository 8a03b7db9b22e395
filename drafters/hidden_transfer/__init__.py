"""Hidden transfer (Wu et al., arXiv 2404.12022): ``module`` the maps, ``drafter`` the trees and pseudo columns."""

from specdec.drafters.hidden_transfer.drafter import HiddenTransfer

__all__ = ["HiddenTransfer"]
