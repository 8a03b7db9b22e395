"""Token recycling: hand-worked cases, a literal reading of the specification, learning from a corpus."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama

from specdec import Decoder, zoo
from specdec.bench.prompts import load_prompts
from specdec.contracts import Drafter
from specdec.drafters.token_recycling import TokenRecycling
from specdec.drafters.token_recycling.table import AdjacencyTable
from specdec.drafters.token_recycling.trees import template
from specdec.errors import UsageError
from specdec.tree import DraftTree, Proposal, Topology

NO_ENDS = np.array([], dtype=np.int64)


def test_the_published_tree_is_rebuilt_exactly():
    parents, ranks = template(81)
    topology = Topology(parents.tolist())
    assert [len(level) for level in topology.levels] == [1, 8, 21, 25, 15, 8, 3]
    assert sum(not c for c in topology.children) == 40
    assert topology.max_depth == 6
    for children in topology.children:
        assert [ranks[c] for c in children] == list(range(len(children))), "children are ranks 0, 1, ..."


@pytest.mark.parametrize("size", [1, 2, 8, 16, 33, 64])
def test_other_sizes_are_closed_trees_of_contiguous_ranks(size: int):
    parents, ranks = template(size)
    topology = Topology(parents.tolist())
    assert len(topology) == size
    for children in topology.children:
        assert sorted(ranks[c] for c in children) == list(range(len(children)))


def test_a_tree_is_read_level_by_level_and_ends_at_unseen_rows_and_end_tokens():
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
def test_the_commonest_tokens_are_those_of_the_largest_counts(texts: list[list[int]]):
    table = AdjacencyTable(8, 3)
    for text in texts:
        table.count(np.array(text, dtype=np.int64))
    counts = np.bincount([t for text in texts for t in text], minlength=8)
    common = [t for t in table.common.tolist() if t >= 0]
    assert table.counts.tolist() == counts.tolist()
    assert counts[common].tolist() == [c for c in sorted(counts.tolist(), reverse=True)[:3] if c]
    assert len(set(common)) == len(common)


def test_where_tokens_repeat_the_last_write_wins():
    table = AdjacencyTable(10, 2)
    table.update(np.array([1, 1]), np.array([[2, 3], [4, 5]]))
    assert table.successors[1].tolist() == [4, 5]


def test_after_a_step_each_row_is_the_top_k_at_a_node_that_carries_the_token():
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


def test_it_learns_from_the_prompt_unless_told_not_to():
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


def test_the_table_outlives_a_request_until_reset():
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


def test_a_loop_is_drafted_to_full_depth_on_its_second_lap():
    decoder = Decoder(tiny_llama(), "token-recycling", size=81)
    decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=240)
    assert max(accepted for step in decoder.stats.steps for accepted in step.accepted) == 6


def test_options_out_of_range_are_refused():
    for options in ({"k": 0}, {"size": 0}):
        with pytest.raises(UsageError):
            TokenRecycling(**options)


class Literal(Drafter):
    """The published algorithm, word for word: zeros at first, 80 drafts always, every node's row overwritten, nothing
    learned from the prompt."""

    name, summary, training, budget = "literal", "test", "online", 81

    def bind(self, target):
        self.table = np.zeros((target.vocab_size, 8), dtype=np.int64)
        self.parents, self.ranks = (a.tolist() for a in template(81))

    def reset(self):
        self.table[:] = 0

    def propose(self, state):
        out = []
        for row in state.rows:
            tokens = [int(row.tokens[-1])]
            for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
                tokens.append(int(self.table[tokens[parent], rank]))
            out.append(Proposal(DraftTree(Topology(self.parents), np.array(tokens))))
        return out

    def observe(self, state, proposals, output, verdicts):
        for b, (proposal, verdict) in enumerate(zip(proposals, verdicts, strict=True)):
            if verdict.emitted:
                top = output.logits[b].topk(8, dim=-1).indices.numpy()
                for v in [*range(len(proposal.tree)), 0, *verdict.path]:
                    self.table[proposal.tree.tokens[v]] = top[v]


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("tiny", dtype=torch.float32)


def mat(decoder: Decoder, tokenizer, warm: bool, limit: int = 6) -> float:
    """Tokens per target forward over embedded prompts."""
    tokens = forwards = 0
    decoder.drafter.reset()
    for prompt in load_prompts("embedded", limit):
        if not warm:
            decoder.drafter.reset()
        decoder.generate(**tokenizer(prompt.text, return_tensors="pt"), do_sample=False, max_new_tokens=64)
        tokens += decoder.stats.new_tokens
        forwards += decoder.stats.row_forwards
    return tokens / forwards


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_it_accepts_as_much_as_a_literal_reading_of_the_specification(tiny, warm: bool):
    model, tokenizer = tiny
    literal = mat(Decoder(model, Literal()), tokenizer, warm)
    assert literal > 1.5
    assert mat(Decoder(model, "token-recycling", size=81), tokenizer, warm) >= 0.97 * literal


def test_a_corpus_teaches_what_the_target_predicts_after_each_token(tiny):
    model, tokenizer = tiny
    decoder = Decoder(model, "token-recycling")
    ids = tokenizer(load_prompts("embedded", 1)[0].text, return_tensors="pt").input_ids
    text = ids[0].repeat(2)[:400]
    decoder.drafter.learn(text.numpy())
    with torch.no_grad():
        want = model(text[None]).logits[0]
    for token in set(text.tolist()):
        last = max(i for i, t in enumerate(text.tolist()) if t == token)
        assert decoder.drafter.table.successors[token, 0] == want[last].argmax()
    assert decoder.drafter.table.seen.sum() == len(set(text.tolist()))
