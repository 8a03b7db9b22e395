"""Suffix drafting (SuffixDecoding, arXiv 2411.04975) on suffix automata (SAM-Decoding, arXiv 2411.10666).

``automaton`` holds the text, ``speculate`` reads draft trees out of it, ``drafter`` the method and what outlives a
request.
"""

from specdec.drafters.suffix.drafter import Suffix as Suffix
