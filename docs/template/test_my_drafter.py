"""The laws a drafter must keep; add the hand-worked cases of your method's paper."""

from __future__ import annotations

import torch
from tiny_models import tiny_llama

from specdec import Decoder


def test_greedy_text_is_generates_own():
    model = tiny_llama()
    decoder = Decoder(model, "my-drafter")
    ids = torch.tensor([[5, 9, 33]])
    want = model.generate(ids, do_sample=False, max_new_tokens=48)
    assert torch.equal(decoder.generate(ids, do_sample=False, max_new_tokens=48), want)


def test_it_drafts_what_it_says():
    decoder = Decoder(tiny_llama(), "my-drafter", length=3)
    decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=8)
    assert max(step.columns for step in decoder.stats.steps) == 3 + 1 + 2  # drafted, root, pending prompt
