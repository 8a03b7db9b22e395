"""Prompt lookup: the index, the copies, the published rule, the trees."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
import torch
from conftest import left_padded
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama

from specdec import Decoder
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.prompt_lookup.index import NgramIndex, continuations
from specdec.errors import UsageError
from specdec.tree import DraftTree

NO_ENDS = np.array([], dtype=np.int64)
texts = st.integers(2, 50).flatmap(lambda size: st.lists(st.integers(0, size - 1), min_size=1, max_size=60))


def array(tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def indexed(tokens, min_n=1, max_n=3, room=1, earliest=False) -> NgramIndex:
    index = NgramIndex(min_n, max_n, room, earliest)
    for n in range(1, len(tokens) + 1):
        index.append(array(tokens[:n]))
    return index


def tree(tokens, depth=99, ends=NO_ENDS, **options) -> DraftTree:
    drafter = PromptLookup(**options)
    drafter._resolve(cuda=False)
    index = drafter._index(8)
    index.append(array(tokens))
    return drafter._tree(index, array(tokens), array(ends), depth)


def copy(tokens, max_n=3, min_n=1, k=4, pick="latest") -> list[int]:
    """The chain of a single candidate."""
    drafted = tree(tokens, max_ngram=max_n, min_ngram=min_n, copy=k, pick=pick, candidates=1)
    assert drafted.topology.parents == tuple(range(-1, len(drafted) - 1))
    return drafted.tokens[1:].tolist()


def paths(drafted: DraftTree) -> list[list[int]]:
    topology = drafted.topology
    return [drafted.tokens[topology.path(v)].tolist() for v in range(len(drafted)) if not topology.children[v]]


# ---- references in plain Python ------------------------------------------------------------------------------------


def earlier_ends(tokens, n: int) -> list[int]:
    """Ends of the earlier occurrences of the last n tokens, latest first."""
    return [e for e in range(len(tokens) - 1, n - 1, -1) if tokens[e - n : e] == tokens[-n:]]


def matched(tokens, end: int, reach: int) -> int:
    size = 0
    while size < min(end, reach) and tokens[end - 1 - size] == tokens[len(tokens) - 1 - size]:
        size += 1
    return size


def unrolled(tokens, end: int, k: int) -> list[int]:
    whole = list(tokens)
    while len(whole) < end + k:
        whole.append(whole[end + len(whole) - len(tokens)])
    return whole[end : end + k]


def published(tokens, max_n: int, k: int) -> list[int]:
    """A literal transcription of the published rule."""
    n = len(tokens)
    for size in range(max_n, 0, -1):
        for i in range(n - size + 1):
            start = i + size
            if tokens[i:start] == tokens[n - size :] and start + k <= n and start < n - size:
                return tokens[start : start + k]
    return []


# ---- tests ---------------------------------------------------------------------------------------------------------


class TestIndex:
    @given(texts, st.booleans())
    def test_every_ngram_points_to_its_occurrences(self, tokens: list[int], collide: bool):
        """Also with a hash that sends all n-grams to one slot, and while the room grows from one token."""
        for earliest in (False, True):
            index = NgramIndex(1, 3, 1, earliest)
            if collide:
                index.multiplier = 0
            for m in range(1, len(tokens) + 1):
                index.append(array(tokens[:m]))
                for n in range(1, 4):
                    want = earlier_ends(tokens[:m], n) if m > n else []
                    if earliest:
                        want = want[-1:]
                    chain, end = [], int(index.before[n - 1, m - 1])
                    while end:
                        chain.append(end)
                        end = int(index.before[n - 1, end - 1])
                    assert chain == want, (m, n)

    @given(texts, st.integers(1, 3), st.integers(0, 2), st.integers(1, 5), st.integers(1, 9))
    def test_the_longest_matches_come_first(self, tokens, min_n: int, more: int, count: int, look: int):
        reach = 6
        ends, lengths = indexed(tokens, min_n, min_n + more).latest(array(tokens), count, look, reach)
        sizes = [n for n in range(min_n, min_n + more + 1) if n < len(tokens) and earlier_ends(tokens, n)]
        found = earlier_ends(tokens, max(sizes))[:look] if sizes else []
        want = sorted(((matched(tokens, e, reach), e) for e in found), reverse=True)[:count]
        assert list(zip(lengths.tolist(), ends.tolist(), strict=True)) == want

    @given(texts, st.integers(1, 12))
    def test_a_copy_goes_round_where_the_text_ends(self, tokens: list[int], k: int):
        ends = range(1, len(tokens))
        got = continuations(array(tokens), array(ends), k)
        assert got.tolist() == [unrolled(tokens, e, k) for e in ends]

    def test_growing_loses_nothing(self):
        tokens = np.random.default_rng(0).integers(0, 9, 5000)
        small, large = NgramIndex(2, 3, 1), NgramIndex(2, 3, 5000)
        for n in range(1, 5001, 7):
            small.append(tokens[:n])
        small.append(tokens)
        large.append(tokens)
        assert (small.before[:, :5000] == large.before).all()
        assert small.before.shape[1] < 4 * 5000

    @pytest.mark.parametrize("alphabet", [1, 2, 50, 50_000])
    def test_a_long_text_costs_no_more_than_a_short_one(self, alphabet: int):
        n = 100_000
        tokens = np.random.default_rng(0).integers(0, alphabet, n)
        drafter = PromptLookup(pick="longest", candidates=8)
        drafter._resolve(cuda=False)
        index = drafter._index(n)
        index.append(tokens[: n - 200])
        seconds = []
        for m in range(n - 199, n + 1):
            start = perf_counter()
            index.append(tokens[:m])
            drafter._tree(index, tokens[:m], NO_ENDS, 10)
            seconds.append(perf_counter() - start)
        assert np.median(seconds) < 1e-3, "a scan of the text takes longer than this"


class TestCopies:
    def test_the_longest_suffix_wins_over_a_later_shorter_one(self):
        assert copy([1, 2, 3, 9, 9, 3, 8, 1, 2, 3], k=2) == [9, 9]

    def test_the_latest_occurrence_is_copied(self):
        assert copy([1, 2, 7, 1, 2, 8, 1, 2], k=1) == [8]
        assert copy([1, 2, 7, 1, 2, 8, 1, 2], k=1, pick="leftmost") == [7]

    def test_the_longest_match_is_copied_if_asked(self):
        # the trigram 2 3 4 stood three times: after 1, which stands there now too, and twice after 8
        text = [1, 2, 3, 4, 7, 8, 2, 3, 4, 5, 8, 2, 3, 4, 6, 1, 2, 3, 4]
        assert copy(text, k=1) == [6]
        assert copy(text, k=1, pick="longest") == [7]

    def test_a_copy_that_reaches_the_end_goes_round(self):
        assert copy([5, 6, 5, 6], k=5) == [5, 6, 5, 6, 5]
        assert copy([7, 7, 7], k=3) == [7, 7, 7]

    def test_the_published_rule_wants_a_full_copy(self):
        assert copy([5, 6, 5, 6], k=3, pick="leftmost") == []

    def test_no_match_and_short_texts_draft_nothing(self):
        assert copy([1, 2, 3]) == []
        assert copy([1]) == []
        assert copy([1, 2, 1], min_n=2) == []
        assert copy([1, 2, 1, 2], min_n=3) == []

    @given(texts, st.integers(1, 3), st.integers(1, 10))
    def test_leftmost_is_the_published_algorithm(self, tokens: list[int], max_n: int, k: int):
        assert copy(tokens, max_n, 1, k, pick="leftmost") == published(tokens, max_n, k)

    @given(texts, st.integers(1, 3), st.integers(0, 2), st.integers(1, 10))
    def test_latest_is_a_scan_for_the_latest_longest_suffix(self, tokens: list[int], min_n: int, more: int, k: int):
        sizes = [n for n in range(min_n, min_n + more + 1) if n < len(tokens) and earlier_ends(tokens, n)]
        want = unrolled(tokens, earlier_ends(tokens, max(sizes))[0], k) if sizes else []
        assert copy(tokens, min_n + more, min_n, k) == want


class TestTrees:
    def test_candidates_that_begin_alike_share_nodes(self):
        text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2]
        drafted = tree(text, copy=2, min_prob=0.0, size=9)
        assert sorted(paths(drafted)) == [[3, 4], [3, 5]]
        assert len(drafted) == 4
        assert drafted.tokens.tolist() == [2, 3, 5, 4], "the later copy first"

    def test_the_node_most_copies_agree_on_comes_first(self):
        text = [1, 2, 3, 0, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]
        drafted = tree(text, copy=1, min_prob=0.0, size=9)
        assert drafted.tokens.tolist() == [2, 3, 4]
        assert drafted.prior[1] > 2 * drafted.prior[2]

    def test_longer_matches_weigh_more(self):
        # after 9 1 2 came 3, after 7 1 2 (later) came 4
        text = [5, 9, 1, 2, 3, 7, 1, 2, 4, 8, 9, 1, 2]
        options = dict(max_ngram=2, copy=1, min_prob=0.0, size=9)
        drafted = tree(text, **options)
        assert drafted.tokens.tolist() == [2, 3, 4]
        assert drafted.prior[1] > drafted.prior[2]

    @given(texts, st.integers(1, 5), st.integers(1, 6), st.integers(1, 12), st.sampled_from([0.0, 0.1]))
    def test_nodes_are_true_continuations_within_the_limits(self, tokens, candidates, k, size, floor):
        drafted = tree(tokens, min_ngram=1, candidates=candidates, copy=k, size=size, min_prob=floor)
        assert len(drafted) <= size
        assert drafted.topology.max_depth <= k
        assert drafted.tokens[0] == tokens[-1]
        sizes = [n for n in (1, 2, 3) if n < len(tokens) and earlier_ends(tokens, n)]
        found = earlier_ends(tokens, max(sizes))[:candidates] if sizes else []
        copies = [unrolled(tokens, e, k) for e in found]
        for path in paths(drafted):
            assert not path or path in [c[: len(path)] for c in copies]
        for children in drafted.topology.children:
            assert len({int(drafted.tokens[c]) for c in children}) == len(children)
        if len(drafted) > 1:
            assert ((drafted.prior > 0) & (drafted.prior <= 1)).all()
            for children in drafted.topology.children:
                assert drafted.prior[list(children)].sum() <= 1.0001, "one of the siblings at most is right"
        if floor == 0.0 and size > candidates * k:
            assert {tuple(c) for c in copies} == {tuple(p) for p in paths(drafted) if p}

    def test_unlikely_nodes_are_left_out(self):
        text = [1, 2, 3, 4, 5, 6, 9, 1, 2]
        assert 1 < len(tree(text)) < len(tree(text, min_prob=0.0)) == 11

    def test_nothing_is_drafted_beyond_the_room_or_an_end_token(self):
        text = [1, 2, 3, 4, 5, 6, 9, 1, 2]
        assert tree(text, depth=0, min_prob=0.0).tokens.tolist() == [2]
        assert tree(text, depth=2, min_prob=0.0).tokens.tolist() == [2, 3, 4]
        assert tree(text, ends=[4, 60], min_prob=0.0).tokens.tolist() == [2, 3, 4]

    def test_sizes_by_default(self):
        drafter = PromptLookup()
        assert drafter.budget == 41
        drafter._resolve(cuda=False)
        assert drafter.budget == 11
        assert PromptLookup(candidates=1).budget == 11
        assert PromptLookup(copy=100).budget == 101
        assert PromptLookup(size=5).budget == 5


class TestDecoding:
    def test_periodic_text_reaches_the_draft_limit(self):
        decoder = Decoder(tiny_llama(), "prompt-lookup", copy=6)
        ids = torch.tensor([[5, 9, 33]])
        got = decoder.generate(ids, do_sample=False, max_new_tokens=240)
        assert torch.equal(got, decoder.model.generate(ids, do_sample=False, max_new_tokens=240))
        accepted = [n for step in decoder.stats.steps for n in step.accepted]
        assert accepted[-20:-1] == [6] * 19, "a random model loops, and lookup must see it"

    @pytest.mark.parametrize("pick", ["latest", "longest", "leftmost"])
    @pytest.mark.parametrize("chunk", [2, 512])
    def test_greedy_text_is_the_targets_own(self, pick, chunk):
        decoder = Decoder(tiny_llama(), "prompt-lookup", pick=pick, min_ngram=1, prefill_chunk=chunk)
        prompts = [torch.tensor(p) for p in ([5, 9, 33], [7, 8, 7, 8, 7], [60], [3, 4, 5, 6, 3, 4])]
        for batch in (prompts[:1], prompts):
            inputs = left_padded(batch)
            settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=[4, 63], pad_token_id=0)
            got = decoder.generate(**inputs, **settings)
            assert torch.equal(got, decoder.model.generate(**inputs, **settings))

    def test_rows_do_not_see_each_other(self):
        drafter = PromptLookup(min_ngram=1, candidates=1)
        decoder, steps = Decoder(tiny_llama(), drafter), []
        original = drafter.propose
        drafter.propose = lambda state: steps.append(original(state)) or steps[-1]
        first, second = [9, 5, 6, 7], [20, 21, 22, 5]  # 5 is followed by 6 in the other row only
        decoder.generate(torch.tensor([first, second]), do_sample=False, max_new_tokens=2)
        assert steps[0][1].tree.tokens.tolist() == [5]
        assert not drafter._indexes, "nothing is left of a request"

    def test_the_first_token_of_a_text_without_repeats_is_not_drafted(self):
        drafter = PromptLookup(min_ngram=1)
        decoder, steps = Decoder(tiny_llama(), drafter), []
        original = drafter.propose
        drafter.propose = lambda state: steps.append(original(state)) or steps[-1]
        decoder.generate(torch.tensor([[5]]), do_sample=False, max_new_tokens=3)
        assert steps[0][0].tree.tokens.tolist() == [5]

    def test_drafts_end_at_an_end_token(self):
        decoder = Decoder(tiny_llama(), "prompt-lookup", min_ngram=1)
        steps = []
        original = decoder.drafter.propose
        decoder.drafter.propose = lambda state: steps.append(original(state)) or steps[-1]
        decoder.generate(torch.tensor([[5, 4, 6, 5]]), do_sample=False, max_new_tokens=3, eos_token_id=[4, 63])
        assert steps[0][0].tree.tokens.tolist() == [5, 4]

    @pytest.mark.parametrize(
        "options",
        [
            {"min_ngram": 4},
            {"min_ngram": 0},
            {"copy": 0},
            {"pick": "first"},
            {"candidates": 0},
            {"size": 0},
            {"min_prob": 1.5},
        ],
    )
    def test_bad_options_are_refused(self, options):
        with pytest.raises(UsageError, match=next(iter(options))):
            Decoder(tiny_llama(), "prompt-lookup", **options)
