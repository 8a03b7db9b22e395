"""Hand-worked cases of prompt lookup, token recycling and the draft model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.token_recycling.table import AdjacencyTable
from specdec.drafters.token_recycling.trees import template
from specdec.errors import CompatibilityError, UsageError
from specdec.tree import Topology

NO_ENDS = np.array([], dtype=np.int64)


class TestTokenRecycling:
    def test_the_published_tree_is_rebuilt_exactly(self):
        parents, ranks = template(81)
        topology = Topology(parents.tolist())
        assert [len(level) for level in topology.levels] == [1, 8, 21, 25, 15, 8, 3]
        assert sum(not c for c in topology.children) == 40
        assert topology.max_depth == 6
        for children in topology.children:
            assert [ranks[c] for c in children] == list(range(len(children))), "children are ranks 0, 1, ..."

    @pytest.mark.parametrize("size", [1, 2, 8, 16, 33, 64])
    def test_other_sizes_are_closed_trees_of_contiguous_ranks(self, size: int):
        parents, ranks = template(size)
        topology = Topology(parents.tolist())
        assert len(topology) == size
        for children in topology.children:
            assert sorted(ranks[c] for c in children) == list(range(len(children)))

    def test_a_tree_is_read_level_by_level_and_ends_at_unseen_rows_and_end_tokens(self):
        table = AdjacencyTable(10, 2)
        table.update(np.array([1, 2]), np.array([[2, 3], [4, 1]]))
        parents, ranks = np.array([-1, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 0, 1, 0])
        got_parents, tokens, _ = table.fill_tree(1, parents, ranks, NO_ENDS)
        assert tokens.tolist() == [1, 2, 3, 4, 1], "4 and 3 were never seen, so nothing hangs below them"
        assert got_parents.tolist() == [-1, 0, 0, 1, 1]
        assert table.fill_tree(1, parents, ranks, np.array([2]))[1].tolist() == [1, 2, 3]
        assert table.fill_tree(9, parents, ranks, NO_ENDS)[1].tolist() == [9]
        table.count(np.array([2, 7, 2]))
        got_parents, tokens, got_ranks = table.fill_tree(9, parents, ranks, NO_ENDS)
        assert tokens.tolist() == [9, 2, 7, 4, 1], "the commonest tokens stand in below a root never met"
        assert (got_parents.tolist(), got_ranks.tolist()) == ([-1, 0, 0, 1, 1], [0, 2, 2, 0, 1])

    @given(st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=12))
    def test_the_commonest_tokens_are_those_of_the_largest_counts(self, texts: list[list[int]]):
        table = AdjacencyTable(8, 3)
        for text in texts:
            table.count(np.array(text, dtype=np.int64))
        counts = np.bincount([t for text in texts for t in text], minlength=8)
        common = [t for t in table.common.tolist() if t >= 0]
        assert table.counts.tolist() == counts.tolist()
        assert counts[common].tolist() == [c for c in sorted(counts.tolist(), reverse=True)[:3] if c]
        assert len(set(common)) == len(common)

    def test_where_tokens_repeat_the_last_write_wins(self):
        table = AdjacencyTable(10, 2)
        table.update(np.array([1, 1]), np.array([[2, 3], [4, 5]]))
        assert table.successors[1].tolist() == [4, 5]

    def test_after_a_step_each_row_is_the_top_k_at_a_node_that_carries_the_token(self):
        model = tiny_llama(vocab_size=12)
        decoder = Decoder(model, "token-recycling", size=16, k=4)
        drafter = decoder.drafter
        checks = []
        original = drafter.observe

        def observe(state, proposals, output, verdicts):
            original(state, proposals, output, verdicts)
            tree, path = proposals[0].tree, verdicts[0].path
            top = output.logits[0].topk(4, dim=-1).indices
            for token in set(tree.tokens.tolist()):
                row = drafter.table.successors[token].tolist()
                carriers = [v for v in range(len(tree)) if tree.tokens[v] == token]
                accepted = [v for v in carriers if v in [0, *path]]
                allowed = accepted[-1:] or carriers
                checks.append(row in [top[v].tolist() for v in allowed])

        drafter.observe = observe
        decoder.generate(torch.tensor([[5, 9, 3]]), do_sample=False, max_new_tokens=30)
        assert checks
        assert all(checks)

    def test_it_learns_from_the_prompt_unless_told_not_to(self):
        model = tiny_llama()
        prompt = torch.tensor([[5, 9, 33, 7, 20]])
        want = model(prompt).logits[0].topk(8, dim=-1).indices
        for learn in (True, False):
            decoder = Decoder(model, "token-recycling", update_on_prompt=learn, prefill_chunk=2)
            decoder.generate(prompt, do_sample=False, max_new_tokens=1)
            table = decoder.drafter.table
            assert bool(table.seen[9]) == learn
            if learn:
                assert table.successors[33].tolist() == want[2].tolist()

    def test_the_table_outlives_a_request_until_reset(self):
        decoder = Decoder(tiny_llama(), "token-recycling")
        assert decoder.drafter.warm is False
        ids = torch.tensor([[5, 9, 33]])
        decoder.generate(ids, do_sample=False, max_new_tokens=40)
        cold = decoder.stats.mat
        decoder.generate(ids, do_sample=False, max_new_tokens=40)
        assert decoder.drafter.warm
        assert decoder.stats.mat > cold
        decoder.drafter.reset()
        assert decoder.drafter.warm is False

    def test_a_loop_is_drafted_to_full_depth_on_its_second_lap(self):
        decoder = Decoder(tiny_llama(), "token-recycling", size=81)
        decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=240)
        assert max(accepted for step in decoder.stats.steps for accepted in step.accepted) == 6

    def test_options_out_of_range_are_refused(self):
        for options in ({"k": 0}, {"size": 0}):
            with pytest.raises(UsageError):
                TokenRecycling(**options)


class TestDraftModel:
    def test_a_draft_equal_to_the_target_is_always_accepted(self):
        model = tiny_llama()
        for options, depth in (({"length": 5}, 5), ({"branching": (2, 2, 1)}, 3)):
            decoder = Decoder(model, DraftModel(model, **options))
            decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=(depth + 1) * 6)
            assert decoder.stats.mat == depth + 1
            decoder.generate(
                torch.tensor([[5, 9, 33]]), do_sample=True, temperature=0.7, max_new_tokens=(depth + 1) * 6
            )
            if max(decoder.drafter.factors) == 1:
                assert decoder.stats.mat == depth + 1, "q = p accepts the first child with probability 1"

    def test_its_cache_is_the_text_so_far_after_every_step(self):
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

    def test_drafting_costs_one_draft_forward_a_level(self):
        decoder = Decoder(tiny_llama(), DraftModel(tiny_llama(seed=1), length=3))
        decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=30)
        assert decoder.stats.draft_forwards <= 3 * len(decoder.stats.steps)

    def test_another_vocabulary_is_refused_with_both_sizes(self):
        with pytest.raises(CompatibilityError, match=r"draft: its vocabulary has 32 tokens, the target's 64"):
            Decoder(tiny_llama(), DraftModel(tiny_llama(vocab_size=32)))

    def test_a_draft_padded_to_another_size_serves_when_the_tokenizer_is_the_same(self):
        model = tiny_llama()
        ids = torch.tensor([[5, 9, 33]])
        for size in (80, 96):
            decoder = Decoder(model, DraftModel(tiny_llama(vocab_size=size, seed=1), same_tokenizer=True, length=2))
            want = model.generate(ids, do_sample=False, max_new_tokens=20)
            assert torch.equal(decoder.generate(ids, do_sample=False, max_new_tokens=20), want)
            decoder.generate(ids, do_sample=True, max_new_tokens=20)

    def test_fewer_tokens_in_the_support_than_children_asked_for(self):
        model, draft = tiny_llama(), tiny_llama(seed=1)
        decoder = Decoder(model, DraftModel(draft, branching=(4, 2)))
        ids = decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=True, top_k=2, max_new_tokens=30)
        assert ids.shape[1] == 33
