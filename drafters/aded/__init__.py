"""ADED (Liu et al., "Adaptive Draft-Verification for Efficient LLM Decoding", arXiv 2407.12021; released as Adaptix).

``table`` holds the tri-grams, ``search`` grows trees out of them, ``drafter`` is the method.
"""

from specdec.drafters.aded.drafter import Aded as Aded
