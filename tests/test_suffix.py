"""Suffix drafting: the automaton, speculation and the corpus against plain substring counting; hand-worked cases."""

from __future__ import annotations

import heapq
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.suffix import Suffix
from specdec.drafters.suffix.automaton import EDGES, HOPS, LAST, STATES, Automaton, _find, follow, slot_of
from specdec.drafters.suffix.drafter import NOVELTY, Corpus
from specdec.drafters.suffix.speculate import LOOK, speculate
from specdec.errors import UsageError
from specdec.state import DecodeState, Row

NO_ENDS = np.array([], dtype=np.int64)

text = st.lists(st.integers(0, 2), min_size=1, max_size=30)
texts = st.lists(text, min_size=1, max_size=4)


def ids(tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def automaton(*documents, capacity: int = 200) -> Automaton:
    made = Automaton(capacity)
    for document in documents:
        made.new_document()
        made.append(ids(document))
    return made


def state_of(made: Automaton, tokens) -> int:
    """The state of a substring, -1 if it never occurred."""
    state = 0
    for token in tokens:
        edge = _find(made.pools, state, token)
        if edge < 0:
            return -1
        state = int(made.pools.e_dst[edge])
    return state


def children(made: Automaton, state: int) -> dict[int, int]:
    """Token -> state, by the edge list."""
    pools, found = made.pools, {}
    edge = pools.head[state]
    while edge >= 0:
        assert pools.e_src[edge] == state
        assert int(pools.e_tok[edge]) not in found
        found[int(pools.e_tok[edge])] = int(pools.e_dst[edge])
        edge = pools.e_next[edge]
    return found


class Occurrences(dict):
    """Every substring -> its ends in the documents laid one after the other (1-based)."""

    def __init__(self, documents):
        self.length = 0
        for document in documents:
            for start in range(len(document)):
                for end in range(start + 1, len(document) + 1):
                    self.setdefault(tuple(document[start:end]), []).append(self.length + end)
            self.length += len(document)
        self.alphabet = sorted({token for document in documents for token in document})

    def after(self, context) -> dict[int, list[int]]:
        """Token -> ends of the context followed by it."""
        return {t: self[(*context, t)] for t in self.alphabet if (*context, t) in self}


def slow_speculate(seen, context, live, budget, alpha, offset, p_min, novelty, depth, ends, tree, unroll):
    """The published procedure over a dictionary of substrings, every match length on its own."""
    best, best_score = [], 0.0
    for p in range(1, len(context) + 1):
        match = tuple(context[len(context) - p :])
        if match not in seen:
            break
        limit = max(0, min(budget, math.floor(p * alpha + offset + 1e-6)))
        nodes, score = [], 0.0
        heap = [(-1.0, 0, -2, match, -1, 0, 1.0)]
        while heap and len(nodes) <= limit:
            minus, _, parent, at, token, level, chance = heapq.heappop(heap)
            if not tree:
                heap = []
            nodes.append((parent, token, chance))
            score += -minus if level else 0.0
            if level == depth or token in ends:
                continue
            while unroll and level and at and not seen.after(at):
                at = at[1:]
            if not at:
                continue
            count = max(len(seen[at]) - (seen[at][-1] == live), 1)
            for nxt, where in seen.after(at).items():
                part = min(1.0, len(where) / (count + novelty / len(at)))
                if -minus * part >= p_min:
                    entry = (minus * part, -where[-1], len(nodes) - 2, (*at, nxt), nxt, level + 1, part)
                    heapq.heappush(heap, entry)
        nodes = nodes[1 : limit + 1]
        if nodes and score >= best_score:  # the longer match wins ties
            best, best_score = nodes, score
    return best, best_score


def draft(made: Automaton, state, length, live, budget=63, alpha=1.0, offset=0.0, p_min=0.0, novelty=0.0, **changes):
    rest = {"depth": 100, "ends": NO_ENDS, "tree": True, "unroll": True, **changes}
    got = speculate(made.pools, state, length, live, budget, alpha, offset, p_min, novelty, *rest.values())
    parents, tokens, chance, score = got
    return list(zip(parents.tolist(), tokens.tolist(), chance.tolist(), strict=True)), score


def own(tokens, live: bool = True, **options):
    """The draft from a text's own automaton."""
    made = automaton(tokens, capacity=max(len(tokens), 1))
    return draft(made, *made.longest_repeat(), len(tokens) if live else -1, **options)


class TestAutomaton:
    @given(texts)
    def test_states_know_count_and_ends_of_every_substring(self, documents):
        made, seen = automaton(*documents), Occurrences(documents)
        pools = made.pools
        for substring, where in seen.items():
            state = state_of(made, substring)
            assert state > 0
            assert (pools.cnt[state], pools.first_end[state], pools.last_end[state]) == (
                len(where),
                where[0],
                where[-1],
            )
            assert pools.slen[pools.link[state]] < len(substring) <= pools.slen[state]
            following = children(made, state)
            assert following == {t: state_of(made, (*substring, t)) for t in seen.after(substring)}
            assert sum(int(pools.cnt[child]) for child in following.values()) <= pools.cnt[state]
        assert children(made, 0).keys() == set(seen.alphabet), "nothing else hangs below the root"

    @given(texts)
    def test_the_link_of_the_last_state_is_the_longest_suffix_that_occurred_before(self, documents):
        made, seen = automaton(*documents), Occurrences(documents)
        last = documents[-1]
        earlier = [n for n in range(1, len(last) + 1) if len(seen[tuple(last[-n:])]) > 1]
        state, length = made.longest_repeat()
        if len(seen[tuple(last)]) > 1:  # an earlier document contains this one: its state has no longer suffix
            assert made.pools.slen[made.pools.size[LAST]] == len(last)
            return
        assert length == max(earlier, default=0)
        assert state == (state_of(made, last[-length:]) if length else 0)
        if length:
            assert made.pools.first_end[state] == seen[tuple(last[-length:])][0]

    @given(st.lists(st.integers(0, 3), min_size=3, max_size=60))
    def test_it_is_linear_in_the_text(self, tokens):
        size = automaton(tokens).pools.size
        assert size[STATES] <= 2 * len(tokens) - 1
        assert size[EDGES] <= 3 * len(tokens) - 4

    @given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=20))
    def test_many_documents_fit_in_the_same_room(self, documents):
        size, n = automaton(*documents).pools.size, sum(map(len, documents))
        assert size[STATES] <= 2 * n
        assert size[EDGES] <= 3 * n

    @given(st.lists(st.integers(0, 2), max_size=80), st.integers(1, 5))
    def test_growing_changes_nothing(self, tokens, piece: int):
        whole, grown = automaton(tokens), Automaton(1)
        for start in range(0, len(tokens), piece):
            grown.append(ids(tokens[start : start + piece]))
        assert (whole.pools.size == grown.pools.size).all()
        states, edges = whole.pools.size[STATES], whole.pools.size[EDGES]
        for number, (a, b) in enumerate(zip(whole.pools[:10], grown.pools[:10], strict=True)):
            n = states if number < 6 else edges
            assert (a[:n] == b[:n]).all()
        assert state_of(grown, tokens) == state_of(whole, tokens)

    def test_edges_with_the_same_slot_are_told_apart(self):
        slots = 4096
        collide = [t for t in range(400_000) if slot_of(0, t, slots) == 7][:60]
        assert len(collide) == 60
        made = automaton(collide, capacity=slots // 4)
        assert len(made.pools.slots) == slots
        assert [state_of(made, [t]) for t in collide] == [state_of(made, collide[: i + 1]) for i in range(60)]
        assert state_of(made, [400_001]) == -1
        assert made.pools.size[EDGES] == 119

    @given(text, text)
    def test_following_a_text_finds_its_longest_suffix_in_the_documents(self, document, tokens):
        made, seen = automaton(document), Occurrences([document])
        state, length = follow(made.pools, ids(tokens), 0, 0)
        assert length == max((n for n in range(1, len(tokens) + 1) if tuple(tokens[-n:]) in seen), default=0)
        assert state == (state_of(made, tokens[len(tokens) - length :]) if length else 0)

    def test_beyond_256_links_only_the_shortest_counts_are_low(self):
        n = 2 * HOPS
        made = automaton([1] * n, capacity=n)
        counts = [int(made.pools.cnt[state_of(made, [1] * k)]) for k in range(1, n + 1)]
        true = [n - k + 1 for k in range(1, n + 1)]
        assert counts[HOPS:] == true[HOPS:]
        assert all(HOPS <= got <= want for got, want in zip(counts[:HOPS], true[:HOPS], strict=True))
        assert made.longest_repeat()[1] == n - 1
        nodes, _ = draft(made, *made.longest_repeat(), n)
        assert [token for _, token, _ in nodes] == [1] * 63


options = {
    "budget": st.integers(0, 12),
    "alpha": st.sampled_from([0.5, 1.0, 4.0]),
    "offset": st.sampled_from([-1.0, 0.0, 2.0]),
    "p_min": st.sampled_from([0.0, 0.1, 0.4]),
    "novelty": st.sampled_from([0.0, 1.0]),
    "depth": st.sampled_from([0, 2, 100]),
    "ends": st.sampled_from([[], [1]]),
    "tree": st.booleans(),
    "unroll": st.booleans(),
}


class TestSpeculate:
    @settings(max_examples=300)
    @given(st.lists(st.integers(0, 2), min_size=1, max_size=24), st.booleans(), st.fixed_dictionaries(options))
    def test_the_own_text_against_a_dictionary_of_substrings(self, tokens, live: bool, chosen):
        end = len(tokens) if live else -1
        want, want_score = slow_speculate(Occurrences([tokens]), tokens, end, **chosen)
        nodes, score = own(tokens, live, **{**chosen, "ends": ids(chosen["ends"])})
        assert score == want_score
        if want_score:
            assert nodes == want

    @settings(max_examples=300)
    @given(texts, text, st.fixed_dictionaries(options))
    def test_earlier_documents_against_a_dictionary_of_substrings(self, documents, tokens, chosen):
        made = automaton(*documents)
        want, want_score = slow_speculate(Occurrences(documents), tokens, -1, **chosen)
        place = follow(made.pools, ids(tokens), 0, 0)
        nodes, score = draft(made, *place, -1, **{**chosen, "ends": ids(chosen["ends"])})
        assert score == want_score
        if want_score:
            assert nodes == want

    def test_the_live_suffix_does_not_count_unless_published(self):
        assert own([1, 2, 3, 1]) == ([(-1, 2, 1.0)], 1.0)
        assert own([1, 2, 3, 1], live=False, unroll=False) == ([(-1, 2, 0.5)], 0.5)

    def test_what_is_new_is_worth_less_after_a_longer_match(self):
        (_, _, short), *_ = own([1, 2, 3, 1], novelty=1.0)[0]
        (_, _, long), *_ = own([7, 8, 9, 1, 2, 3, 7, 8, 9, 1], novelty=1.0)[0]
        assert (short, long) == (1 / 2, 1 / 1.25)

    def test_counts_weigh_the_branches_and_the_latest_wins_ties(self):
        nodes, score = own([1, 2, 5, 1, 3, 5, 1, 2, 6, 1], alpha=6)
        # 5 and 6 followed 1 2 once each; 6 is the later one, and so is what followed it
        want = [(-1, 2, 2 / 3), (0, 6, 1 / 2), (1, 1, 1.0), (-1, 3, 1 / 3), (3, 5, 1.0), (4, 1, 1.0)]
        assert nodes == want
        assert score == pytest.approx(2 / 3 + 5 / 3)

    def test_a_chain_follows_the_most_frequent(self):
        nodes, _ = own([1, 2, 5, 1, 3, 5, 1, 2, 6, 1], alpha=3, tree=False)
        assert [(parent, token) for parent, token, _ in nodes] == [(-1, 2), (0, 6), (1, 1)]

    def test_text_that_repeats_itself_is_drafted_to_the_limit(self):
        for period in (1, 2, 7, 30):
            tokens = [i % period for i in range(2 * period + 3)]
            nodes, _ = own(tokens, alpha=40, novelty=1.0)
            assert [token for _, token, _ in nodes] == [i % period for i in range(len(tokens), len(tokens) + 63)]

    def test_without_unrolling_a_copy_stops_where_the_text_ends(self):
        nodes, _ = own([0, 1, 2, 0, 1, 2], alpha=40, live=False, unroll=False)
        assert [token for _, token, _ in nodes] == [0, 1, 2]

    def test_published_probabilities_still_reach_the_limit_on_a_long_repetition(self):
        for period in (1, 3, 20):
            nodes, _ = own([i % period for i in range(600)], live=False, unroll=False, p_min=0.1, budget=40)
            assert len(nodes) == 40

    def test_a_state_with_many_continuations_is_looked_at_newest_first(self):
        tokens = [token for i in range(500) for token in (1, 10 + i)] + [1]
        nodes, _ = own(tokens, offset=600.0, budget=600, depth=1)
        assert [token for _, token, _ in nodes] == [10 + i for i in range(499, 499 - LOOK, -1)]

    def test_nothing_repeats_nothing_is_drafted(self):
        for tokens in ([], [3], [1, 2, 3]):
            assert own(tokens, alpha=9) == ([], 0.0)


class TestCorpus:
    def test_no_match_and_no_continuation_spans_two_documents(self):
        corpus = Corpus(10, 100)
        corpus.add(ids([1, 2, 3]))
        corpus.add(ids([4, 5, 6]))
        (made,) = corpus.automata
        assert state_of(made, [3, 4]) == -1
        place = follow(made.pools, ids([2, 3]), 0, 0)
        assert place[1] == 2
        assert draft(made, *place, -1, alpha=9)[0] == []
        assert follow(made.pools, ids([3, 4]), 0, 0)[1] == 1

    def test_a_document_that_begins_like_an_earlier_one_is_counted_again(self):
        corpus = Corpus(10, 100)
        for document in ([1, 2, 3], [1, 2, 4], [2, 3]):
            corpus.add(ids(document))
        (made,) = corpus.automata
        counts = [int(made.pools.cnt[state_of(made, w)]) for w in ([1], [1, 2], [2], [2, 3], [1, 2, 3], [4])]
        assert counts == [2, 2, 3, 2, 1, 1]

    def test_the_older_half_is_dropped_when_the_younger_is_full(self):
        corpus = Corpus(100, 12)
        for first in range(0, 60, 3):
            corpus.add(ids([first, first + 1, first + 2]))
            kept = sum(map(len, corpus.documents))
            assert kept <= 12
            assert kept > 6 or first < 6
            assert corpus.documents[-1].tolist() == [first, first + 1, first + 2]
        assert [d[0] for d in corpus.documents] == [48, 51, 54, 57]
        assert all(state_of(made, [3]) == -1 for made in corpus.automata)
        assert [state_of(made, [57, 58, 59]) > 0 for made in corpus.automata] == [True, False]

    def test_of_a_long_document_the_end_is_kept(self):
        corpus = Corpus(100, 12)
        corpus.add(ids(range(50)))
        assert corpus.documents[0].tolist() == list(range(44, 50))
        nothing = Corpus(100, 0)
        nothing.add(ids([1, 2]))
        assert not nothing.filled

    @given(st.lists(text, min_size=1, max_size=8), st.lists(text, max_size=3))
    def test_a_saved_corpus_is_the_same_corpus(self, documents, more):
        corpus, other = Corpus(3, 80), Corpus(3, 80)
        for document in documents:
            corpus.add(ids(document))
        other.fill(corpus.arrays(), corpus.facts())
        for document in more:
            corpus.add(ids(document))
            other.add(ids(document))
        assert len(corpus.automata) == len(other.automata)
        for a, b in zip(corpus.automata, other.automata, strict=True):
            assert (a.pools.size == b.pools.size).all()
            assert (a.pools.cnt[: a.pools.size[STATES]] == b.pools.cnt[: b.pools.size[STATES]]).all()

    def test_merging_appends(self):
        corpus, other = Corpus(10, 100), Corpus(10, 100)
        corpus.add(ids([1, 2]))
        other.add(ids([3, 4]))
        corpus.merge(other)
        assert [d.tolist() for d in corpus.documents] == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        ("tokens", "starts"),
        [
            (np.array([1, 10], dtype=np.int32), ids([0])),
            (np.array([1, -1], dtype=np.int32), ids([0])),
            (np.array([1, 2], dtype=np.int32), ids([1])),
            (np.array([1, 2], dtype=np.int32), ids([0, 0])),
            (np.array([1, 2], dtype=np.int32), ids([0, 2])),
            (np.array([1, 2], dtype=np.int32), ids([0, 5, 1])),
            (np.array([1, 2], dtype=np.int32), ids([])),
            (np.array([], dtype=np.int32), ids([])),
            (np.array([1.0, 2.0]), ids([0])),
            (np.array([[1, 2]], dtype=np.int32), ids([0])),
            (np.array([1, 2], dtype=np.int32), np.array([0.0])),
        ],
    )
    def test_files_that_are_no_documents_are_refused_and_change_nothing(self, tokens, starts):
        corpus = Corpus(10, 100)
        corpus.add(ids([1, 2, 3]))
        with pytest.raises(ValueError, match=r"tokens|starts"):
            corpus.fill({"tokens": tokens, "starts": starts}, {})
        assert [d.tolist() for d in corpus.documents] == [[1, 2, 3]]


def bound(**options) -> Suffix:
    drafter = Suffix(**{"size": 8, "alpha": 2.0, "min_prob": 0.0, **options})
    tokenizer = word_tokenizer(96)
    drafter.bind(SimpleNamespace(vocab_size=96, device=torch.device("cpu"), tokenizer=tokenizer, context=None))
    return drafter


def begun(drafter: Suffix, *prompts, room: int = 100, eos=()) -> DecodeState:
    rows = [Row(i, torch.tensor(p), 0, len(p) + room, None, None) for i, p in enumerate(prompts)]
    state = DecodeState(rows, drafter._target, drafter.budget, frozenset(eos))
    drafter.begin(state)
    return state


def emit(row: Row, tokens) -> None:
    for token in tokens:
        row.append(token)


def trees(drafter: Suffix, state: DecodeState) -> list[list[tuple[int, int]]]:
    """Per row the drafted (parent, token) pairs."""
    made = [proposal.tree for proposal in drafter.propose(state)]
    for row, tree in zip(state.rows, made, strict=True):
        assert tree.tokens[0] == row.tokens[-1]
    return [list(zip(tree.topology.parents[1:], tree.tokens[1:].tolist(), strict=True)) for tree in made]


class TestSuffix:
    def test_nothing_is_drafted_after_a_first_token(self):
        drafter = bound()
        assert trees(drafter, begun(drafter, [5])) == [[]]

    def test_the_root_belongs_to_the_match(self):
        drafter = bound()
        state = begun(drafter, [1, 2, 3, 4, 9, 1])
        assert trees(drafter, state) == [[(0, 2), (1, 3)]], "a match of one token drafts alpha = 2"
        emit(state.rows[0], [2])
        assert trees(drafter, state) == [[(0, 3), (1, 4), (2, 9), (3, 1)]]

    def test_priors_are_chances_given_the_parent(self):
        drafter = bound(alpha=3.0)
        state = begun(drafter, [1, 2, 5, 1, 3, 5, 1, 2, 6, 1])
        tree = drafter.propose(state)[0].tree
        assert tree.tokens.tolist() == [1, 2, 3, 6]
        want = [1, 2 / (3 + NOVELTY), 1 / (3 + NOVELTY), 1 / (2 + NOVELTY / 2)]
        np.testing.assert_allclose(tree.prior, want, rtol=1e-6)
        assert tree.prior.dtype == np.float32

    def test_drafts_end_with_the_row_at_end_tokens_and_at_the_depth_asked_for(self):
        prompt = [1, 2, 3, 4, 5, 9, 1, 2]
        for want, options, room, eos in (
            ([3, 4, 5, 9], {}, 100, ()),
            ([3, 4], {}, 100, (4,)),
            ([3], {}, 2, ()),
            ([], {}, 1, ()),
            ([3, 4, 5], {"max_depth": 3}, 100, ()),
            ([3], {"size": 2}, 100, ()),
            ([], {"size": 1}, 100, ()),
        ):
            drafter = bound(**options)
            (tree,) = trees(drafter, begun(drafter, prompt, room=room, eos=eos))
            assert [token for _, token in tree] == want

    def test_outputs_serve_later_requests_and_prompts_do_not(self):
        drafter = bound()
        state = begun(drafter, [20, 21, 22])
        emit(state.rows[0], [1, 2, 3, 4])
        drafter.end(state)
        assert drafter.warm
        state = begun(drafter, [1, 2], [20, 21], [30, 1])
        assert trees(drafter, state) == [[(0, 3), (1, 4)], [], [(0, 2), (1, 3)]]
        emit(state.rows[1], [2, 3])
        assert trees(drafter, state)[1] == [(0, 4)], "the match is kept while the row grows"

    def test_the_own_text_wins_a_tie(self):
        drafter = bound()
        drafter.learn(ids([1, 2, 9]))
        assert trees(drafter, begun(drafter, [1, 2, 5, 1, 2])) == [[(0, 5), (1, 1), (2, 2), (3, 5)]]
        drafter = bound(alpha=0.5)
        drafter.learn(ids([1, 2, 9]))
        assert trees(drafter, begun(drafter, [1, 2, 5, 1, 2])) == [[(0, 5)]]
        assert trees(drafter, begun(drafter, [2, 5, 1, 2])) == [[(0, 9)]], "but not over a longer match"

    def test_rows_of_a_batch_do_not_see_each_other(self):
        prompts = [[1, 2, 3, 1, 2], [1, 2, 7, 1], [3, 1, 2, 4]]
        outputs = [[3, 1, 2, 3], [2, 7, 1, 2], [9, 1, 2, 3]]
        together = bound()
        state = begun(together, *prompts)
        alone = [bound() for _ in prompts]
        states = [begun(drafter, prompt) for drafter, prompt in zip(alone, prompts, strict=True)]
        for step in range(4):
            want = [trees(drafter, one)[0] for drafter, one in zip(alone, states, strict=True)]
            assert trees(together, state) == want
            for b, output in enumerate(outputs):
                emit(state.rows[b], output[step : step + 1])
                emit(states[b].rows[0], output[step : step + 1])

    def test_rows_that_vanish_keep_their_outputs_for_the_end(self):
        drafter = bound()
        state = begun(drafter, [50], [60])
        emit(state.rows[0], [1, 2, 3])
        gone = state.rows.pop(0)
        assert trees(drafter, state) == [[]]
        emit(state.rows[0], [4, 1])
        assert trees(drafter, state) == [[]], "not during the request"
        drafter.end(state)
        assert [d.tolist() for d in drafter.table.documents] == [gone.new_tokens.tolist(), [4, 1]]

    def test_documents_that_come_in_during_a_request_are_read_too(self):
        drafter = bound()
        state = begun(drafter, [1, 2])
        drafter.learn(ids([1, 2, 3]))
        assert trees(drafter, state) == [[(0, 3)]]
        drafter.learn(ids([1, 2, 4, 1, 2, 4]))
        assert trees(drafter, state)[0][0] == (0, 4)

    def test_scope_request_keeps_nothing_but_reads_its_file(self, tmp_path):
        teacher = bound()
        teacher.learn(ids([1, 2, 3]))
        teacher.save(tmp_path / "t")
        drafter = bound(scope="request", table=tmp_path / "t")
        for _ in range(2):
            state = begun(drafter, [8, 9], [1, 2])
            assert trees(drafter, state) == [[], [(0, 3)]]
            emit(state.rows[0], [8, 9, 8, 9])
            drafter.end(state)
        assert len(drafter.table.documents) == 1

    def test_files_carry_the_proposals(self, tmp_path):
        first, second = bound(), bound()
        first.learn(ids([1, 2, 3, 1, 2, 4, 1, 2, 4]))
        first.learn(ids([7, 1, 2, 3]))
        first.save(tmp_path / "t")
        second.load(tmp_path / "t")
        third = bound()
        third.learn(ids([1, 2, 3, 1, 2, 4, 1, 2, 4]))
        other = bound()
        other.learn(ids([7, 1, 2, 3]))
        other.save(tmp_path / "o")
        third.merge(tmp_path / "o")
        want = trees(first, begun(first, [1, 2], [7, 1]))
        assert len(want[0]) == 4
        assert trees(second, begun(second, [1, 2], [7, 1])) == want
        assert trees(third, begun(third, [1, 2], [7, 1])) == want
        second.reset()
        assert not second.warm
        other = bound(table=tmp_path / "o")
        other.learn(ids([5, 5]))
        other.reset()
        assert [d.tolist() for d in other.table.documents] == [[7, 1, 2, 3]]

    def test_ids_outside_the_vocabulary_are_not_learned(self):
        for tokens in ([1, 96], [-1]):
            with pytest.raises(UsageError, match=r"0\.\.95"):
                bound().learn(ids(tokens))

    @pytest.mark.parametrize(
        "options",
        [
            {"size": 0},
            {"alpha": -1.0},
            {"alpha": float("nan")},
            {"offset": float("inf")},
            {"min_prob": 1.5},
            {"max_depth": 0},
            {"capacity": -1},
        ],
    )
    def test_bad_options_are_refused(self, options):
        with pytest.raises(UsageError, match=next(iter(options))):
            Suffix(**options)

    def test_published_settings(self):
        drafter = bound(published=True, alpha=None, min_prob=None)
        assert (drafter.alpha, drafter._floor) == (1.0, 0.1)
        tree = drafter.propose(begun(drafter, [1, 2, 3, 1]))[0].tree
        assert (tree.tokens.tolist(), tree.prior.tolist()) == ([1, 2], [1.0, 0.5])

    def test_a_loop_is_drafted_to_the_limit(self):
        for options in ({}, {"published": True}):
            decoder = Decoder(tiny_llama(), "suffix", size=6, **options)
            decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=240)
            accepted = [step.accepted[0] for step in decoder.stats.steps]
            assert accepted[-6:-1] == [5] * 5, "MAT is the draft's length + 1"

    @pytest.mark.parametrize("options", [{}, {"size": 64, "min_prob": 0.0}, {"published": True}, {"scope": "request"}])
    def test_greedy_text_is_the_models_own(self, options):
        model = tiny_llama()
        decoder = Decoder(model, "suffix", **options)
        prompts = [torch.randint(3, 64, (n,)) for n in (3, 9, 5, 7)]
        for batch in (prompts[:1], prompts, prompts):
            inputs = left_padded(batch)
            settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": 7, "pad_token_id": 0}
            assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)
        assert decoder.stats.mat > 1
