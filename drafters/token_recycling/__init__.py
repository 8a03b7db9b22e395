"""Token recycling (Luo et al., "Turning Trash into Treasure", arXiv 2408.08696).

``table`` holds the adjacency matrix, ``trees`` the static tree templates, ``drafter`` the method.
"""

from specdec.drafters.token_recycling.drafter import TokenRecycling as TokenRecycling
