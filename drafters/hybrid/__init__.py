"""Several drafters under one node budget.

``mixture`` learns what each member's nodes are worth, ``drafter`` merges their trees.
"""

from specdec.drafters.hybrid.drafter import Hybrid as Hybrid
