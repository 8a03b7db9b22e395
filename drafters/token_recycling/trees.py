"""Static tree templates: which ranks of successors are tried where.

A template is a list of paths, each a tuple of ranks; node i's parent is its path without the last rank.
"""

from __future__ import annotations

from functools import cache

from specdec.templates import Paths, Template, best_first, from_paths

# The published 81-node tree "2.2.2": path of the parent -> number of children, always ranks 0..n-1.
_PUBLISHED = {
    "": 8,
    **dict(zip("01234567", (8, 4, 3, 2, 1, 1, 1, 1), strict=True)),
    **dict(zip(("00", "01", "02", "03", "04", "05", "06", "07"), (8, 3, 2, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("10", "11", "20", "30", "40", "50"), (2, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("000", "001", "002", "003", "004", "010", "020", "100", "200", "300"), (5, 2, *[1] * 8), strict=True)),
    **dict(zip(("0000", "0001", "0002", "0010", "0100", "1000"), (3, 1, 1, 1, 1, 1), strict=True)),
    **dict(zip(("00000", "00010"), (2, 1), strict=True)),
}

# Chance that the target's token is the table's successor of rank r, given that the parent was accepted. Measured with
# the embedded model on training text of all its sources (`make tables`); other models and texts will differ.
RANK_ACCEPTANCE = (0.581, 0.132, 0.055, 0.029, 0.017, 0.010, 0.010, 0.010)
COMMON_ACCEPTANCE = 0.033  # that it is a given one of the commonest tokens, below a token never met; also measured

PUBLISHED_SIZE = 81
CPU_SIZE = 8  # fastest of 5, 8, 12 and 16 nodes on two cores with the embedded model, on training prompts


@cache
def template(size: int, k: int = 8) -> Template:
    """A template of ``size`` nodes, root included.

    81 is the published tree. Other sizes take the nodes most likely to be accepted, every depth alike.
    """
    if size == PUBLISHED_SIZE and k >= 8:
        return from_paths(_published())
    return best_first([RANK_ACCEPTANCE[:k]] * size, size)


def _published() -> Paths:
    paths = [""]
    for path in paths:  # grows while it is read: breadth first
        paths += [path + str(rank) for rank in range(_PUBLISHED.get(path, 0))]
    return [tuple(map(int, path)) for path in paths]
