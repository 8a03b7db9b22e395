"""What trained drafters share: checkpoints, one attention layer, trees, and the loss they are trained with.

A method's own module, drafter and formats stand in its folder under ``drafters/``.
"""

from specdec.heads.checkpoint import Head, HeadConfig
from specdec.heads.drafter import HeadDrafter
from specdec.heads.learner import Learner
from specdec.heads.shared import Batch, Drafts, Output, Shared

__all__ = ["Batch", "Drafts", "Head", "HeadConfig", "HeadDrafter", "Learner", "Output", "Shared"]
