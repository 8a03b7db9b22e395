"""Lookahead decoding (Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding",
arXiv 2402.02057).

``window`` holds the Jacobi window that finds n-grams, ``pool`` keeps them, ``drafter`` is the method.
"""

from specdec.drafters.lookahead.drafter import Lookahead as Lookahead
