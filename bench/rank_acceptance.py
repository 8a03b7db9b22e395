"""How often the target's next token is rank r of token recycling's table: what its trees are grown from.

    python -m specdec.bench.rank_acceptance --data DIR

Measured with the embedded model on TRAINING text of its recipe, never on the prompts that are reported on.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.optimize import isotonic_regression

from specdec import zoo
from specdec.decoder import Decoder
from specdec.drafters.token_recycling import TokenRecycling
from specdec.training.data import read_sources
from specdec.training.recipe import load_recipe


def rank_counts(decoder: Decoder, prompts: list[torch.Tensor], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which the accepted child of the root had rank 0..k-1, and (last) at which none was: int64 [k + 1].

    First for roots whose row is known, then for roots never met, below which the commonest tokens stand. The table is
    forgotten between prompts, as in ``specdec bench``.
    """
    drafter = decoder.drafter
    assert isinstance(drafter, TokenRecycling)
    k = drafter.k
    counts, common = np.zeros((2, k + 1), dtype=np.int64)
    observe = drafter.observe

    def count(state, proposals, output, verdicts) -> None:  # type: ignore[no-untyped-def]
        tree, verdict = proposals[0].tree, verdicts[0]
        if len(tree) > 1 and verdict.emitted:
            kind = counts if drafter.table.seen[tree.tokens[0]] else common
            kind[verdict.path[0] - 1 if verdict.path else k] += 1
        observe(state, proposals, output, verdicts)

    drafter.observe = count  # type: ignore[method-assign]
    for ids in prompts:
        drafter.reset()
        decoder.generate(ids[None], do_sample=False, max_new_tokens=max_new_tokens)
    return counts, common


def main(
    data: Annotated[Path, typer.Option(help="Folder of the recipe's data.")],
    each: Annotated[int, typer.Option(help="Prompts per source.")] = 6,
    max_new_tokens: Annotated[int, typer.Option()] = 96,
) -> None:
    """Print ``RANK_ACCEPTANCE`` and ``COMMON_ACCEPTANCE`` for drafters/token_recycling/trees.py."""
    model, tokenizer = zoo.load("tiny", dtype=torch.float32)
    pick = random.Random(0)
    prompts = []
    for source in read_sources(load_recipe("tiny"), data).values():
        for text in pick.sample(source.train, each):
            ids = tokenizer(text, return_tensors="pt").input_ids[0]
            prompts.append(ids[: max(8, min(len(ids) // 2, 256))])
    # a root with its 8 ranks and nothing below: every step asks for the rank alone
    decoder = Decoder(model, TokenRecycling(paths=[(), *((rank,) for rank in range(8))]))
    counts, common = rank_counts(decoder, prompts, max_new_tokens)
    # a template tries ranks in order, so the measured shares are made non-increasing
    shares = isotonic_regression(counts[:-1] / counts.sum(), increasing=False).x
    print(f"{counts.sum()} steps on {len(prompts)} prompts; none of the 8: {counts[-1] / counts.sum():.3f}")
    print("RANK_ACCEPTANCE = (" + ", ".join(f"{share:.3f}" for share in shares) + ")")
    print(f"COMMON_ACCEPTANCE = {common[:-1].sum() / common.sum() / (len(common) - 1):.3f}  # {common.sum()} steps")


if __name__ == "__main__":
    typer.run(main)
