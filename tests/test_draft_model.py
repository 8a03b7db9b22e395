"""Hand-worked cases of the draft model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.draft_model import DraftModel
from specdec.errors import CompatibilityError


def test_a_draft_equal_to_the_target_is_always_accepted():
    model = tiny_llama()
    for options, depth in (({"length": 5}, 5), ({"branching": (2, 2, 1)}, 3)):
        decoder = Decoder(model, DraftModel(model, **options))
        decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=(depth + 1) * 6)
        assert decoder.stats.mat == depth + 1
        decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=True, temperature=0.7, max_new_tokens=(depth + 1) * 6)
        if max(decoder.drafter.factors) == 1:
            assert decoder.stats.mat == depth + 1, "q = p accepts the first child with probability 1"


def test_its_cache_is_the_text_so_far_after_every_step():
    model, draft = tiny_llama(), tiny_llama(seed=1)
    decoder = Decoder(model, DraftModel(draft, branching=(2, 1)))
    seen = []
    original = decoder.drafter.observe

    def observe(state, proposals, output, verdicts):
        original(state, proposals, output, verdicts)
        cache = decoder.drafter.draft.caches[0]
        n = cache.lengths[0]
        text = torch.from_numpy(state.rows[0].tokens[:n].copy())[None]
        want = draft(text, use_cache=True).past_key_values.layers[1].keys
        seen.append(torch.allclose(cache.layers[1].keys[:, :, :n], want, atol=1e-4))

    decoder.drafter.observe = observe
    decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=12)
    assert len(seen) > 3
    assert all(seen)


def test_drafting_costs_one_draft_forward_a_level():
    decoder = Decoder(tiny_llama(), DraftModel(tiny_llama(seed=1), length=3))
    decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=30)
    assert decoder.stats.draft_forwards <= 3 * len(decoder.stats.steps)


def test_another_vocabulary_is_refused_with_both_sizes():
    with pytest.raises(CompatibilityError, match=r"draft: its vocabulary has 32 tokens, the target's 64"):
        Decoder(tiny_llama(), DraftModel(tiny_llama(vocab_size=32)))


def test_a_draft_padded_to_another_size_serves_when_the_tokenizer_is_the_same():
    model = tiny_llama()
    ids = torch.tensor([[5, 9, 33]])
    for size in (80, 96):
        decoder = Decoder(model, DraftModel(tiny_llama(vocab_size=size, seed=1), same_tokenizer=True, length=2))
        want = model.generate(ids, do_sample=False, max_new_tokens=20)
        assert torch.equal(decoder.generate(ids, do_sample=False, max_new_tokens=20), want)
        decoder.generate(ids, do_sample=True, max_new_tokens=20)


def test_fewer_tokens_in_the_support_than_children_asked_for():
    model, draft = tiny_llama(), tiny_llama(seed=1)
    decoder = Decoder(model, DraftModel(draft, branching=(4, 2)))
    ids = decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=True, top_k=2, max_new_tokens=30)
    assert ids.shape[1] == 33
