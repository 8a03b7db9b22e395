"""Heads for tests: random ones, and ones overfitted to a few texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from tiny_models import tiny_llama

from specdec import Decoder, registry
from specdec.heads import Head, Learner
from specdec.target import Target
from specdec.training.heads import head_class


def random_head(method: str, target: Target, seed: int = 0, **options: Any) -> Head:
    """A head whose every weight is random, so that its drafts are neither right nor all alike."""
    head = head_class(method).fresh(target, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p += torch.randn(p.shape, generator=g) * 0.3
    return head.eval()


def overfit(
    method: str, updates: int = 300, rate: float = 5e-3, model: Any = None, **options: Any
) -> tuple[list[float], float, float]:
    """Train on four texts the target writes itself, then decode them.

    Args:
        method: drafter's name.
        updates, rate: of Adam, the rate falling to 0.
        model: the target; None: a small Llama.
        options: of ``fresh``.

    Returns:
        accuracy per depth, MAT, and the MAT if every chain but the first step's, which has none, is accepted.
    """
    model = tiny_llama() if model is None else model
    target = Target(model)
    prompts = torch.randint(3, 64, (4, 3), generator=torch.Generator().manual_seed(1))
    new = 21
    ids = model.generate(prompts, max_new_tokens=new, do_sample=False)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:] = True
    torch.manual_seed(0)
    learner = Learner(head_class(method).fresh(target, **options), target, objective="labels")
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(learner.parameters(), lr=rate)
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / updates)
        out = learner(ids, mask)
        optimizer.zero_grad()
        (out.total / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the target was trained"
    learner.head.config.acceptance = [[1.0]] * learner.head.depths  # a chain, where trees are cut from it
    cls = registry.drafter_class(method)
    wanted = {"chain": True, "depth": learner.head.depths, "size": learner.head.depths + 1}
    fitting = {name: value for name, value in wanted.items() if name in registry.options(cls)}
    drafter = registry.drafter(method, checkpoint=learner.head.eval(), **fitting)
    decoder = Decoder(model, drafter)
    tokens = steps = 0
    for prompt in prompts:
        decoder.generate(prompt[None], max_new_tokens=new, do_sample=False)
        tokens, steps = tokens + decoder.stats.new_tokens, steps + len(decoder.stats.steps)
    best = new / (1 + math.ceil((new - 1) / (learner.head.depths + 1)))
    return (out.hits / out.count).tolist(), tokens / steps, best
