"""Lookahead and Jacobi decoding: the window against its rule, the pool against a plain one, and whole texts."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import left_padded, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_gemma2, tiny_llama
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from specdec import Decoder
from specdec.drafters.jacobi import Jacobi
from specdec.drafters.lookahead import Lookahead
from specdec.drafters.lookahead.pool import Pool
from specdec.drafters.lookahead.window import Window, layout, most_probes
from specdec.errors import CompatibilityError, UsageError
from specdec.structure import Needs
from specdec.target import Target
from specdec.tree import DraftTree, Probes, Proposal, Topology

NO_ENDS = np.array([], dtype=np.int64)
IDS = torch.tensor([[5, 9, 33, 7, 20]])
FAINT = 0.01  # a model whose context changes nothing at all fails the self-test
SHAPES = [(3, 1, 1), (3, 4, 2), (4, 3, 3), (5, 7, 7), (5, 2, 4), (6, 1, 2)]


def prompts(count: int = 4) -> dict[str, torch.Tensor]:
    """A left-padded batch of different lengths."""
    drawn = torch.Generator().manual_seed(3)
    return left_padded([torch.randint(3, 64, (n,), generator=drawn) for n in (5, 2, 9, 14)[:count]])


def cyclic(model):
    """Rewrite a tiny model so that the argmax after token x is always x + 1, whatever came before."""
    n, d = model.config.vocab_size, model.config.hidden_size
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(FAINT)
        layer.mlp.down_proj.weight.data.mul_(FAINT)
    codes = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(1)), dim=-1)
    model.model.embed_tokens.weight.data = codes
    model.lm_head.weight.data = codes.roll(1, dims=0)  # row x + 1 is the code of x
    return model


def positional(model):
    """Rewrite a tiny GPT-2 so that its argmax depends on the position alone: position p predicts token p + 1."""
    for block in model.transformer.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.data.mul_(FAINT)
    codes = torch.randn(model.config.vocab_size, model.config.n_embd, generator=torch.Generator().manual_seed(1))
    codes = torch.nn.functional.normalize(codes - codes.mean(dim=-1, keepdim=True), dim=-1)
    model.transformer.wte.weight.data.mul_(FAINT)
    model.transformer.wpe.weight.data = codes.clone()
    model.lm_head.weight = torch.nn.Parameter(codes.roll(1, dims=0))
    return model


def recorded(decoder: Decoder) -> list:
    """The proposals of row 0 of every later step."""
    steps = []
    original = decoder.drafter.propose

    def propose(state):
        proposals = original(state)
        steps.append(proposals[0])
        return proposals

    decoder.drafter.propose = propose
    return steps


# ---- the window --------------------------------------------------------------------------------------------------


def rule_3_2(ngram: int, width: int) -> tuple[list[tuple[int, int]], np.ndarray, list[int]]:
    """The steady window row by row: which cells, what they see of each other, and their distance to the root.

    Block 0 = [current, win0[0..W-2]], causal among themselves. Level l, column j sees block 0 up to j, its own column
    on levels 1..l-1, and itself; it stands at t + l + j.
    """
    cells = [(0, j) for j in range(width)] + [(lv, j) for lv in range(1, ngram - 1) for j in range(width)]
    see = np.zeros((len(cells), len(cells)), dtype=bool)
    for q, (level, j) in enumerate(cells):
        for k, (level_k, i) in enumerate(cells):
            if level == 0:
                see[q, k] = level_k == 0 and i <= j
            else:
                see[q, k] = (level_k == 0 and i <= j) or (0 < level_k < level and i == j) or q == k
    return cells, see, [level + j for level, j in cells]


class TestWindow:
    @pytest.mark.parametrize("pending", [0, 3])
    @pytest.mark.parametrize(("ngram", "width", "guesses"), SHAPES)
    def test_the_mask_and_positions_are_rule_3_2(self, ngram, width, guesses, pending):
        """The whole step as the Target lays it out: window columns see prefix, pending, root and their rule."""
        target, window = Target(tiny_llama()), Window(ngram, width, np.random.default_rng(0), np.arange(3, 60))
        for _ in range(ngram - 2):
            assert window.advance(np.arange(window.read), NO_ENDS) is None
        text = np.arange(3, 12)
        tree = DraftTree(_fan(guesses, ngram - 1), np.arange(1 + guesses * (ngram - 1)) % 60)
        with target.session():
            target.open([0], 64)
            start = len(text) - 1 - pending
            target.commit(target.step([text[:start]], [Proposal(DraftTree.root(int(text[start - 1])))]), [[]])
            proposal = Proposal(tree, window.probes(int(text[-1])))
            columns = target._columns(target.caches[0], [text], [proposal], [pending])
        cells, see, offset = rule_3_2(ngram, width)
        first, nodes = pending, len(tree)
        at = [first, *range(first + nodes, first + nodes + len(cells) - 1)]  # the current token is the root
        assert columns.block is not None
        np.testing.assert_array_equal(columns.block[0][np.ix_(at, at)], see)
        assert columns.positions[0, at].tolist() == [len(text) - 1 + o for o in offset]
        assert columns.block[0, at, :pending].all(), "everything pending is seen"
        assert not columns.block[0, at[1:], first + 1 : first + nodes].any(), "window columns see no guess"
        assert not columns.block[0, : first + nodes, first + nodes :].any(), "nothing real sees the window"

    def test_three_steps_by_hand(self):
        """N = 4, W = 2: two steps of warm-up, then the first n-grams."""
        window = Window(4, 2, np.random.default_rng(0), np.arange(3, 60))
        assert window.cells.shape == (1, 4)
        _, a1, a2, a3 = window.cells[0].tolist()
        assert window.probes(100).tokens.tolist() == [a1, a2, a3]
        assert window.read == 3
        assert window.advance(np.array([11, 12, 13]), NO_ENDS) is None
        # level 0 lost its first entry, level 1 is what the model said after it
        assert window.probes(101).tokens.tolist() == [a2, a3, 11, 12, 13]
        assert window.read == 2, "the deepest level without its first entry"
        assert window.advance(np.array([22, 23]), NO_ENDS) is None
        assert window.probes(102).tokens.tolist() == [a3, 12, 13, 22, 23]
        assert window.read == 2
        ngrams = window.advance(np.array([32, 33]), NO_ENDS)
        assert ngrams is not None
        assert ngrams.tolist() == [[102, 12, 22, 32], [a3, 13, 23, 33]], "column 0's key is the current token"
        assert window.probes(103).tokens.tolist() == [13, 22, 23, 32, 33]

    def test_layouts_are_made_once_a_shape(self):
        window = Window(4, 3, np.random.default_rng(0), np.arange(9))
        first = window.probes(1).layout
        assert window.probes(2).layout is first
        assert layout(3, 3) is layout(3, 3)

    @pytest.mark.parametrize(("ngram", "width", "guesses"), SHAPES)
    def test_the_budget_is_reached_and_not_exceeded(self, ngram, width, guesses):
        window, sizes = Window(ngram, width, np.random.default_rng(0), np.arange(9)), []
        for _ in range(ngram + 2):
            sizes.append(len(window.probes(1)))
            window.advance(np.zeros(window.read, dtype=np.int64), NO_ENDS)
        assert max(sizes) == most_probes(ngram, width)
        assert Lookahead(ngram, width, guesses).budget == 1 + guesses * (ngram - 1) + max(sizes)

    def test_end_tokens_close_ngrams_but_do_not_stay_in_the_window(self):
        window = Window(3, 2, np.random.default_rng(0), np.arange(50, 60))
        window.probes(1)
        window.advance(np.array([2, 4]), np.array([2]))
        assert window.cells[1, 0] in range(50, 60)
        assert window.cells[1, 1] == 4
        window.probes(1)
        ngrams = window.advance(np.array([5, 2]), np.array([2]))
        assert ngrams[:, -1].tolist() == [5, 2]
        assert window.cells[1, 1] in range(50, 60)

    @pytest.mark.parametrize(
        ("make", "attention"), [(tiny_llama, "eager"), (tiny_llama, "sdpa"), (tiny_gemma2, "eager")]
    )
    def test_window_tokens_do_not_reach_the_roots_logits(self, make, attention):
        model = make()
        model.set_attn_implementation(attention)
        target = Target(model, Needs(final_hidden=True))
        text, outcomes = np.arange(3, 30), []
        for seed in (0, 1):
            window = Window(4, 5, np.random.default_rng(seed), np.arange(3, 60))
            with target.session():
                target.open([0], 96)
                target.commit(target.step([text[:20]], [Proposal(DraftTree.root(int(text[19])))]), [[]])
                tree = DraftTree.chain(int(text[-1]), [40, 41])
                outcomes.append(target.step([text], [Proposal(tree, window.probes(int(text[-1])))]))
        assert torch.equal(outcomes[0].logits, outcomes[1].logits)
        hidden = [o.probe_hidden("final_hidden", 0) for o in outcomes]
        assert not torch.allclose(*hidden), "the windows do differ"

    def test_random_tokens_come_from_the_prompt_or_the_plain_vocabulary(self):
        decoder = Decoder(tiny_llama(96), "lookahead", tokenizer=word_tokenizer(96))
        steps = recorded(decoder)
        decoder.generate(torch.tensor([[5, 9, 33, 2]]), do_sample=False, max_new_tokens=8, eos_token_id=[2])
        assert set(steps[0].probes.tokens.tolist()) <= {5, 9, 33}
        steps.clear()
        decoder.drafter.window = 40
        decoder.drafter.budget = 200
        decoder.generate(torch.tensor([[9]]), do_sample=False, max_new_tokens=8)
        first = steps[0].probes.tokens.tolist()
        assert len(set(first)) > 10
        assert not set(first) & set(decoder.tokenizer.all_special_ids)


def _fan(chains: int, length: int) -> Topology:
    parents = [-1]
    for _ in range(chains):
        for d in range(length):
            parents.append(0 if d == 0 else len(parents) - 1)
    return Topology(parents)


# ---- the pool ----------------------------------------------------------------------------------------------------


class PlainPool:
    """The pool as the specification states it: LRU per key, newest last."""

    def __init__(self, guesses: int):
        self.guesses, self.of = guesses, {}

    def put(self, ngram: tuple[int, ...]) -> None:
        mine = self.of.setdefault(ngram[0], OrderedDict())
        mine.pop(ngram[1:], None)
        mine[ngram[1:]] = True
        if len(mine) > self.guesses:
            mine.popitem(last=False)

    def of_key(self, key: int) -> list[list[int]]:
        return [list(values) for values in reversed(self.of.get(key, {}))]


def same(pool: Pool, plain: PlainPool, vocab_size: int) -> bool:
    return all(pool.guesses(key).tolist() == plain.of_key(key) for key in range(vocab_size))


grams = st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=60)
texts = st.lists(st.integers(0, 3), max_size=40)


class TestPool:
    @given(grams, texts, st.integers(1, 4))
    def test_it_is_an_lru_of_each_key(self, ngrams, text, guesses):
        pool, plain = Pool(4, guesses, 3), PlainPool(guesses)
        pool.insert(np.array(ngrams, dtype=np.int64).reshape(-1, 3))
        for ngram in ngrams:
            plain.put(ngram)
        assert same(pool, plain, 4)
        pool.feed(np.array(text, dtype=np.int64), 0)
        for i in range(len(text) - 2):
            plain.put(tuple(text[i : i + 3]))
        assert same(pool, plain, 4)

    @given(texts, st.integers(0, 40))
    def test_a_text_fed_in_two_parts_is_fed_once(self, text, cut):
        whole, parts = Pool(4, 3, 4), Pool(4, 3, 4)
        tokens = np.array(text, dtype=np.int64)
        whole.feed(tokens, 0)
        parts.feed(tokens[:cut], 0)
        parts.feed(tokens, min(cut, len(tokens)))
        assert (whole.count == parts.count).all()
        assert all(whole.guesses(k).tolist() == parts.guesses(k).tolist() for k in range(4))

    @given(grams, grams, st.integers(1, 4))
    def test_merging_puts_the_others_guesses_behind_ours(self, ours, theirs, guesses):
        pools = []
        for ngrams in (ours, theirs):
            pools.append(Pool(4, guesses, 3))
            pools[-1].insert(np.array(ngrams, dtype=np.int64).reshape(-1, 3))
        want = {}
        for key in range(4):
            mine = pools[0].guesses(key).tolist()
            want[key] = (mine + [g for g in pools[1].guesses(key).tolist() if g not in mine])[:guesses]
        pools[0].merge(pools[1])
        assert all(pools[0].guesses(key).tolist() == want[key] for key in range(4))

    @given(grams)
    def test_what_is_saved_fills_another(self, ngrams):
        first, second = Pool(4, 2, 3), Pool(4, 2, 3)
        first.insert(np.array(ngrams, dtype=np.int64).reshape(-1, 3))
        second.insert(np.array([[1, 1, 1]]))
        second.fill(first.arrays(), first.facts())
        assert all(first.guesses(k).tolist() == second.guesses(k).tolist() for k in range(4))
        assert first.filled == bool(ngrams)

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("keys", [1, 4], "keys are not token ids"),
            ("keys", [-1, 2], "keys are not token ids"),
            ("keys", [2, 2], "ascending"),
            ("count", [0, 1], "count"),
            ("count", [3, 1], "count"),
            ("count", [1], "shapes"),
            ("successors", np.full((2, 2, 2), 4), "no token id"),
            ("successors", np.full((2, 2, 2), -1), "no token id"),
            ("successors", np.zeros((2, 2, 3)), "shapes"),
        ],
    )
    def test_contents_that_do_not_fit_are_refused_and_nothing_changes(self, name, value, reason):
        pool = Pool(4, 2, 3)
        pool.insert(np.array([[1, 2, 3], [2, 0, 1]]))
        before = {k: v.copy() for k, v in pool.arrays().items()}
        arrays = {**pool.arrays(), name: np.array(value, dtype=np.int32)}
        with pytest.raises(ValueError, match=reason):
            pool.fill(arrays, pool.facts())
        with pytest.raises(ValueError, match="int32"):
            pool.fill({**pool.arrays(), "count": pool.arrays()["count"].astype(np.float32)}, pool.facts())
        with pytest.raises(ValueError, match="4-grams"):
            pool.fill(pool.arrays(), {"ngram": 4, "guesses": 2})
        assert all((before[k] == v).all() for k, v in pool.arrays().items())


# ---- the drafter -------------------------------------------------------------------------------------------------


class TestHarvest:
    def test_ngrams_are_the_models_own(self):
        """After x this model always says x + 1, so every n-gram must count upwards (keys not off by one)."""
        decoder = Decoder(cyclic(tiny_llama()), "lookahead", ngram=4, window=5, guesses=3, from_prompt=False)
        pool, seen = decoder.drafter.table, []
        insert = pool.insert
        pool.insert = lambda ngrams: seen.append(ngrams) or insert(ngrams)
        decoder.generate(IDS, do_sample=False, max_new_tokens=200)
        assert len(seen) > 20
        for i, ngrams in enumerate(seen):
            # the random tokens leave level 0 with the first step; what stands below it was predicted. Column 0 grew
            # from a random token too, and this model cannot see that its key is another
            sure = ngrams[:, 1:] if i == 0 else ngrams[1:]
            assert (np.diff(sure, axis=1) % 64 == 1).all()
        assert decoder.stats.mat > 2

    @pytest.mark.parametrize(("ngram", "width"), [(3, 4), (5, 3)])
    def test_positions_are_current_plus_level_plus_column(self, ngram, width):
        """This model reads positions alone, and says p + 1 at p: the cell at t + l + j must hold t + l + j."""
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=200, eos_token_id=None)
        model = positional(GPT2LMHeadModel(config).eval())
        decoder = Decoder(model, Lookahead(ngram, width, 4, from_prompt=False))
        # without drafts every step commits one token, so that no cell is left behind
        decoder.drafter._tree = lambda pool, root, *_: (np.array([-1]), np.array([root]), np.ones(1, np.float32))
        steps = recorded(decoder)
        out = decoder.generate(IDS, do_sample=False, max_new_tokens=60, pad_token_id=0)
        assert out[0, 5:].tolist() == list(range(5, 65))
        checked = steps[ngram - 1 : -1]
        assert len(checked) > 50
        for step in checked:
            t = int(step.tree.tokens[0])
            cells = np.array([t, *step.probes.tokens]).reshape(ngram - 1, width)
            assert cells.tolist() == [[t + level + j for j in range(width)] for level in range(ngram - 1)]
        for key in range(10, 60):
            assert decoder.drafter.table.guesses(key).tolist()[0] == list(range(key + 1, key + ngram))

    def test_a_full_guess_commits_n_tokens_and_one_less_as_published(self):
        model = cyclic(tiny_llama())
        for published, most in ((False, 5), (True, 4)):
            decoder = Decoder(model, Lookahead(5, 6, 4, from_prompt=False, published=published))
            decoder.generate(IDS, do_sample=False, max_new_tokens=150)
            emitted = [n for step in decoder.stats.steps for n in step.emitted]
            assert max(emitted) == most
            assert emitted[-20:-1].count(most) > 10, "this text is known by heart on its second lap"

    def test_nothing_is_drafted_before_the_window_is_full(self):
        decoder = Decoder(tiny_llama(), Lookahead(5, 4, 4, published=True))
        steps = recorded(decoder)
        out = decoder.generate(IDS, do_sample=False, max_new_tokens=12)
        assert [len(step.tree) for step in steps[:4]] == [1, 1, 1, 1], "N - 2 steps of warm-up and the first harvest"
        assert [len(step.probes) for step in steps[:4]] == [6, 2 * 6 - 1, 3 * 5 - 1, 4 * 4 - 1]
        assert torch.equal(out, tiny_llama().generate(IDS, do_sample=False, max_new_tokens=12))

    def test_the_prompts_ngrams_are_drafted_at_once_unless_told_not_to(self):
        ids = torch.tensor([[5, 9, 33, 7, 20, 5]])
        for options, first in (({}, [5, 9, 33]), ({"from_prompt": False}, [5]), ({"published": True}, [5])):
            decoder = Decoder(tiny_llama(), "lookahead", ngram=3, **options)
            steps = recorded(decoder)
            decoder.generate(ids, do_sample=False, max_new_tokens=6)
            assert steps[0].tree.tokens.tolist() == first

    def test_guesses_that_begin_alike_share_nodes(self):
        decoder = Decoder(tiny_llama(), "lookahead", ngram=4, guesses=3)
        drafter = decoder.drafter
        drafter.table.insert(np.array([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8]]))
        drafter._floor = 0.0
        parents, tokens, prior = drafter._tree(drafter.table, 5, NO_ENDS, 3, 10)
        assert tokens.tolist() == [5, 6, 7, 8, 9]
        assert parents.tolist() == [-1, 0, 1, 2, 2]
        assert prior[3] > prior[4], "the newer guess is likelier"
        assert drafter._tree(drafter.table, 5, np.array([7]), 3, 10)[1].tolist() == [5, 6, 7]
        assert drafter._tree(drafter.table, 5, NO_ENDS, 1, 10)[1].tolist() == [5, 6]


class TestTexts:
    @pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
    @pytest.mark.parametrize(
        "drafter",
        [
            lambda: Lookahead(),
            lambda: Lookahead(5, 7, 7),
            lambda: Lookahead(4, 3, 3, published=True),
            lambda: Jacobi(),
            lambda: Jacobi(window=9),
        ],
    )
    def test_greedy_text_is_the_models_own(self, make, drafter):
        model = make()
        decoder = Decoder(model, drafter())
        for inputs in ({"input_ids": IDS}, prompts()):
            want = model.generate(**inputs, do_sample=False, max_new_tokens=40)
            for _ in range(2):  # the second time with what the first left in the pool
                assert torch.equal(decoder.generate(**inputs, do_sample=False, max_new_tokens=40), want)

    @pytest.mark.parametrize("name", ["lookahead", "jacobi"])
    def test_rows_of_a_batch_finish_at_different_times(self, name):
        model, inputs = tiny_llama(), prompts()
        plain = model.generate(**inputs, do_sample=False, max_new_tokens=40)[:, 14:]
        ends = [int(plain[0, 3]), int(plain[2, 10])]
        want = model.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=ends, pad_token_id=0)
        lengths = {int((row != 0).sum()) for row in want[:, 14:]}
        assert len(lengths) > 1
        decoder = Decoder(model, name)
        got = decoder.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=ends, pad_token_id=0)
        assert torch.equal(got, want)

    @pytest.mark.parametrize("name", ["lookahead", "jacobi"])
    @pytest.mark.parametrize("new", [1, 2, 3, 12])
    def test_the_end_of_the_context_and_of_the_room_are_respected(self, name, new):
        model = tiny_llama(max_position_embeddings=32)
        prompt = torch.arange(3, 3 + 32 - new)[None]
        want = model.generate(prompt, do_sample=False, max_new_tokens=new)
        assert torch.equal(Decoder(model, name).generate(prompt, do_sample=False, max_new_tokens=new), want)

    def test_chunks_of_a_long_prompt_change_nothing(self):
        model, prompt = tiny_llama(), torch.arange(3, 60)[None]
        runs = []
        for chunk in (7, 512):
            decoder = Decoder(model, "lookahead", prefill_chunk=chunk)
            steps = recorded(decoder)
            out = decoder.generate(prompt, do_sample=False, max_new_tokens=30)
            runs.append(
                (out.tolist(), [(s.tree.tokens.tolist(), s.probes and s.probes.tokens.tolist()) for s in steps])
            )
        assert runs[0] == runs[1]

    def test_a_repetitive_prompt_is_drafted_well(self):
        model = tiny_llama()
        text = model.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=190)
        decoder = Decoder(model, "lookahead", ngram=5, window=5, guesses=5)
        decoder.generate(text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=60)
        assert decoder.stats.mat > 2, "a random model loops, and its loop stands in the prompt"

    @pytest.mark.parametrize("name", ["lookahead", "jacobi"])
    def test_reset_repeats_the_first_run_exactly(self, name):
        decoder = Decoder(tiny_llama(), name)
        steps = recorded(decoder)
        runs = []
        for _ in range(2):
            decoder.generate(**prompts(2), do_sample=False, max_new_tokens=30)
            runs.append([s.tree.tokens.tolist() for s in steps])
            steps.clear()
            decoder.drafter.reset()
        assert runs[0] == runs[1]

    def test_sampling_runs_and_a_batch_row_equals_its_lone_run(self):
        model = tiny_llama()
        decoder = Decoder(model, Lookahead(published=True))
        decoder.generate(**prompts(), do_sample=True, top_k=5, max_new_tokens=20)
        batch, lone = recorded(decoder), []
        decoder.generate(**prompts(2), do_sample=False, max_new_tokens=20)
        lone = [s.tree.tokens.tolist() for s in batch]
        batch.clear()
        decoder.generate(**prompts(1), do_sample=False, max_new_tokens=20)
        assert [s.tree.tokens.tolist() for s in batch] == lone[: len(batch)], "rows of a request do not meet"


class TestDrafterObject:
    def test_a_pool_lasts_over_requests_or_not(self):
        for options, warm in (({}, True), ({"scope": "request"}, False), ({"published": True}, False)):
            decoder = Decoder(tiny_llama(), "lookahead", **options)
            decoder.generate(IDS, do_sample=False, max_new_tokens=30)
            assert decoder.drafter.warm == warm
        assert Lookahead(published=True, scope="shared").scope == "shared"

    def test_files(self, tmp_path):
        tokenizer = word_tokenizer(96)
        first = Decoder(tiny_llama(96), "lookahead", tokenizer=tokenizer)
        first.generate(IDS, do_sample=False, max_new_tokens=30)
        first.drafter.save(tmp_path / "t")
        second = Decoder(tiny_llama(96), "lookahead", tokenizer=tokenizer, table=tmp_path / "t", scope="request")
        second.generate(IDS, do_sample=False, max_new_tokens=30)
        assert second.stats.mat > 1
        assert (second.drafter.table.count == first.drafter.table.count).all()
        with pytest.raises(UsageError, match="5-grams"):
            Decoder(tiny_llama(96), "lookahead", tokenizer=tokenizer, table=tmp_path / "t", ngram=4)

    def test_a_document_is_learned_without_a_request(self):
        decoder = Decoder(tiny_llama(), "lookahead", ngram=3)
        decoder.drafter.learn(np.array([1, 2, 3, 4], dtype=np.int32))
        assert decoder.drafter.table.guesses(2).tolist() == [[3, 4]]
        with pytest.raises(UsageError, match=r"not all in 0\.\.63"):
            decoder.drafter.learn(np.array([1, 64, 3]))

    def test_another_drafters_step_teaches_committed_text_alone(self):
        """Its proposals carry no window of ours, nor do foreign probes count as ours."""
        drafter = Lookahead(3, 2, 2, scope="request")
        target = Target(tiny_llama(), drafter.needs)
        drafter.bind(target)
        tokens = np.array([5, 6, 7, 8])
        row = SimpleNamespace(index=0, tokens=tokens, tokens_left=20)
        state = SimpleNamespace(rows=[row], eos=frozenset(), target=target, depth_left=lambda b: 9)
        drafter.begin(state)
        drafter.propose(state)
        cells = drafter._windows[0].cells.copy()
        foreign = Probes(layout(1, 3), np.array([1, 2]))
        for probes in (None, foreign):
            drafter.observe(state, [Proposal(DraftTree.root(8), probes)], SimpleNamespace(), [None])
        assert (drafter._windows[0].cells == cells).all()
        row.tokens = np.array([5, 6, 7, 8, 9])
        drafter.propose(state)
        assert drafter.table_of(row).guesses(7).tolist() == [[8, 9]]

    def test_a_chain_tier_model_is_refused_with_the_reason(self):
        bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)).eval()
        with pytest.raises(CompatibilityError, match="siblings cannot share a position"):
            Decoder(bloom, "lookahead")
        want = bloom.generate(IDS, do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(Decoder(bloom, "jacobi").generate(IDS, do_sample=False, max_new_tokens=20), want)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("lookahead", {"ngram": 2}),
            ("lookahead", {"window": 0}),
            ("lookahead", {"guesses": 0}),
            ("lookahead", {"seed": -1}),
            ("jacobi", {"window": 0}),
            ("jacobi", {"seed": -1}),
        ],
    )
    def test_bad_options_are_refused(self, name, options):
        with pytest.raises(UsageError, match=next(iter(options))):
            Decoder(tiny_llama(), name, **options)


class TestJacobi:
    @pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
    @pytest.mark.parametrize("n", [1, 6, 20])
    def test_n_tokens_take_at_most_n_steps(self, make, n):
        model = make()
        decoder = Decoder(model, "jacobi", window=n)
        out = decoder.generate(IDS, do_sample=False, max_new_tokens=n)
        assert torch.equal(out, model.generate(IDS, do_sample=False, max_new_tokens=n))
        assert len(decoder.stats.steps) <= n

    def test_guesses_are_the_argmaxes_below_what_was_accepted(self):
        model = tiny_llama()
        decoder = Decoder(model, "jacobi", window=4)
        drafter, original, checks = decoder.drafter, decoder.drafter.observe, []

        def observe(state, proposals, output, verdicts):
            original(state, proposals, output, verdicts)
            best = output.logits[0].argmax(-1).tolist()
            accepted = len(verdicts[0].path)
            checks.append(drafter._guesses[0].tolist() == best[accepted + 1 : len(proposals[0].tree)])

        drafter.observe = observe
        steps = recorded(decoder)
        decoder.generate(IDS, do_sample=False, max_new_tokens=60)
        assert len(checks) > 10
        assert all(checks)
        assert set(steps[0].tree.tokens.tolist()) <= set(IDS[0].tolist())
        assert len(steps[0].tree) == 5

    def test_text_that_depends_on_the_last_token_alone_is_found_in_one_step_a_token(self):
        """A wrong token stays wrong below itself: nothing is gained, and nothing is lost."""
        decoder = Decoder(cyclic(tiny_llama()), "jacobi", window=6)
        out = decoder.generate(torch.tensor([[40, 3, 10]]), do_sample=False, max_new_tokens=20)
        assert out[0].tolist() == [40, 3, *range(10, 31)]
