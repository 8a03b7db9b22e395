"""The hybrid drafter: unions, what is learned about members, and what is drafted in the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from hypothesis import given
from hypothesis import strategies as st
from test_token_recycling import mat
from tiny_models import tiny_llama

from specdec import Decoder, zoo
from specdec.contracts import Drafter
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.hybrid import Hybrid
from specdec.drafters.hybrid.mixture import BINS, DEPTHS, LIMIT, MEMORY, RATE, TRUST, Mixture, union
from specdec.errors import CompatibilityError, UsageError
from specdec.tree import DraftTree, Proposal

IDS = torch.tensor([[5, 9, 33]])


@st.composite
def trees(draw, members: int = 2):
    """Trees under one root, siblings distinct, as parents, tokens and priors."""
    made = []
    for _ in range(members):
        parents, tokens = [-1], [9]
        for i in range(1, draw(st.integers(1, 7))):
            parent = draw(st.integers(0, i - 1))
            token = draw(st.integers(0, 3))
            if any(p == parent and t == token for p, t in zip(parents, tokens, strict=True)):
                continue
            parents.append(min(parent, len(parents) - 1))
            tokens.append(token)
        prior = np.array([draw(st.floats(0, 1, width=32)) for _ in tokens], dtype=np.float32)
        made.append((np.array(parents), np.array(tokens), prior))
    return made


def names(parents, tokens) -> list[tuple[int, ...]]:
    """Every node's path of tokens."""
    out: list[tuple[int, ...]] = [()]
    for i in range(1, len(parents)):
        out.append((*out[parents[i]], int(tokens[i])))
    return out


class Reference:
    """The mixture in plain Python, over dictionaries."""

    def __init__(self, members: int):
        self.members = members
        self.counts: dict[tuple[int, int, int], list[float]] = {}
        self.weights: dict[tuple[int, ...], dict[int, float]] = {}

    def group(self, raw) -> tuple[int, ...]:
        return tuple(m for m in range(self.members) if raw[m] >= 0)

    def cell(self, m: int, depth: int, prior: float) -> list[float]:
        octave = min(int(-2 * math.log2(max(prior, 1e-6))), BINS - 1)
        return self.counts.setdefault((m, min(depth, DEPTHS), octave), [0.0, 0.0])

    def logit(self, m: int, depth: int, prior: float) -> float:
        accepted, tried = self.cell(m, depth, prior)
        p = min(max((accepted + TRUST * prior) / (tried + TRUST), 1 - LIMIT), LIMIT)
        return math.log(p / (1 - p))

    def chance(self, depth: int, raw) -> float:
        group = self.group(raw)
        w = self.weights.setdefault(group, dict.fromkeys(group, len(group) ** -0.5))
        return 1 / (1 + math.exp(-sum(w[m] * self.logit(m, depth, raw[m]) for m in group)))

    def learn(self, parents, tokens, raw, emitted) -> None:
        paths = names(parents, tokens)
        chances = [self.chance(len(path), raw[i]) if i else 1.0 for i, path in enumerate(paths)]
        for i, path in enumerate(paths):
            if i == 0 or list(path[:-1]) != emitted[: len(path) - 1] or len(path) > len(emitted):
                continue
            hit = float(path[-1] == emitted[len(path) - 1])
            group = self.group(raw[i])
            for m in group:
                if len(group) > 1:
                    self.weights[group][m] += RATE * (hit - chances[i]) * self.logit(m, len(path), raw[i][m])
                cell = self.cell(m, len(path), raw[i][m])
                if cell[1] >= MEMORY:
                    cell[:] = [cell[0] / 2, cell[1] / 2]
                cell[0] += hit
                cell[1] += 1


@given(trees(members=3))
def test_a_union_holds_every_members_nodes_once(made):
    parents, tokens, raw = union(made)
    want: dict[tuple[int, ...], list[float]] = {(): [1.0, 1.0, 1.0]}
    for m, (above, theirs, prior) in enumerate(made):
        for i, path in enumerate(names(above, theirs)):
            if i:
                entry = want.setdefault(path, [-1.0] * 3)
                entry[m] = max(entry[m], float(prior[i]))
    got = names(parents, tokens)
    assert len(set(got)) == len(got)
    assert dict(zip(got, raw.tolist(), strict=True)) == want


@given(st.lists(st.tuples(trees(), st.lists(st.integers(0, 3), min_size=1, max_size=4)), max_size=12))
def test_the_mixture_agrees_with_plain_python(steps):
    mixture, reference = Mixture(2), Reference(2)
    for made, emitted in steps:
        parents, tokens, raw = union(made)
        depth = [len(path) for path in names(parents, tokens)]
        want = [1.0] + [reference.chance(depth[i], raw[i].tolist()) for i in range(1, len(parents))]
        np.testing.assert_allclose(mixture.priors(parents, raw), want, rtol=1e-5)
        mixture.learn(parents, tokens, raw, np.array(emitted))
        reference.learn(parents, tokens, raw.tolist(), emitted)


def test_counts_follow_a_text_that_changes():
    mixture = Mixture(1)
    parents, tokens, prior = np.array([-1, 0]), np.array([9, 1]), np.ones(2, dtype=np.float32)
    made = union([(parents, tokens, prior)])
    for _ in range(2000):
        mixture.learn(*made, np.array([1]))
    assert mixture.priors(made[0], made[2])[1] > 0.95
    for _ in range(500):
        mixture.learn(*made, np.array([2]))
    assert mixture.priors(made[0], made[2])[1] < 0.6, "old successes are forgotten"
    assert mixture.tried.max() <= MEMORY


def test_agreement_counts_for_more_than_either_alone():
    mixture = Mixture(2)
    alone = (np.array([-1, 0]), np.array([9, 1]), np.array([1, 0.7], dtype=np.float32))
    root = (np.array([-1]), np.array([9]), np.ones(1, dtype=np.float32))
    chance = [float(mixture.priors(u[0], u[2])[1]) for u in (union([alone, root]), union([alone, alone]))]
    assert chance[1] > chance[0] == pytest.approx(0.7, abs=1e-6)


class Half(OracleDrafter):
    """Knows the next two tokens at every other position, and is sure of them; says nothing elsewhere."""

    name = "half"

    def __init__(self, texts, odd: bool):
        super().__init__(texts, depth=2)
        self.odd = odd

    def propose(self, state):
        made = super().propose(state)
        for row, proposal in zip(state.rows, made, strict=True):
            if (len(row.new_tokens) % 2 == 1) is not self.odd:
                proposal.tree = DraftTree.root(int(row.tokens[-1]))
        return made


class Liar(OracleDrafter):
    """Always wrong, and always sure."""

    name = "liar"

    def propose(self, state):
        return [
            Proposal(DraftTree(p.tree.topology, p.tree.tokens, prior=np.full(len(p.tree), 0.99, dtype=np.float32)))
            for p in super().propose(state)
        ]


def text(model, new: int = 80) -> list[list[int]]:
    return new_tokens(model, {"input_ids": IDS}, do_sample=False, max_new_tokens=new)


def test_members_complete_each_other():
    model = tiny_llama()
    truth = text(model)
    even, odd = Half(truth, odd=False), Half(truth, odd=True)
    mats = []
    for drafter in (even, odd, Hybrid([even, odd], size=3)):
        decoder = Decoder(model, drafter)
        assert new_tokens(decoder, {"input_ids": IDS}, do_sample=False, max_new_tokens=80) == truth
        mats.append(decoder.stats.mat)
    assert mats[2] > 2.9 > 2.1 > max(mats[:2])


def test_it_learns_whom_to_believe():
    model = tiny_llama()
    truth = text(model, 200)
    # the honest member gives no priors, so that it is believed less at first
    decoder = Decoder(model, Hybrid([Liar(truth, depth=3, wrong=1.0), OracleDrafter(truth, depth=3)], size=4))
    assert new_tokens(decoder, {"input_ids": IDS}, do_sample=False, max_new_tokens=200) == truth
    accepted = [step.accepted[0] for step in decoder.stats.steps]
    assert accepted[0] == 0
    assert min(accepted[-20:-1]) == 3, "the liar's nodes no longer take the honest member's places"


def test_members_hear_of_every_step_even_when_others_were_right():
    heard = []

    class Listener(Drafter):
        name, summary = "listener", "test"

        def propose(self, state):
            return [None] * len(state.rows)

        def observe(self, state, proposals, output, verdicts):
            heard.append([len(v.emitted) for v in verdicts])

    model = tiny_llama()
    decoder = Decoder(model, Hybrid([Listener(), OracleDrafter(text(model))], size=5))
    decoder.generate(IDS, do_sample=False, max_new_tokens=80)
    assert sum(n for step in heard for n in step) == 80


def test_binding_again_keeps_what_was_learned():
    model = tiny_llama()
    first = Decoder(model, "hybrid", members=["prompt-lookup", "token-recycling"])
    first.generate(IDS, do_sample=False, max_new_tokens=40)
    second = Decoder(model, first.drafter)
    assert second.drafter.warm
    second.generate(IDS, do_sample=False, max_new_tokens=40)
    assert second.stats.mat > first.stats.mat


def test_reset_forgets_what_was_learned():
    decoder = Decoder(tiny_llama(), "hybrid", members=["prompt-lookup", "token-recycling"])
    assert not decoder.drafter.warm
    decoder.generate(IDS, do_sample=False, max_new_tokens=40)
    assert decoder.drafter.warm
    decoder.drafter.reset()
    assert not decoder.drafter.warm


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (["token-recycling"], "two to six"),
        ("token-recycling", "two to six"),
        (["prompt-lookup", Hybrid(["prompt-lookup", "token-recycling"])], "cannot be merged"),
        (["prompt-lookup", "no-such"], "unknown drafter 'no-such'"),
    ],
)
def test_members_that_make_no_sense_are_refused(members, says: str):
    with pytest.raises(UsageError, match=says):
        Hybrid(members)


@pytest.mark.parametrize("options", [{"size": 1}, {"min_prob": 1.0}, {"min_prob": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Hybrid(["prompt-lookup", "token-recycling"], **options)


def test_drawn_trees_cannot_be_merged():
    model = tiny_llama()
    decoder = Decoder(model, Hybrid([DraftModel(tiny_llama(seed=1), branching=(2,)), "prompt-lookup"]))
    decoder.generate(IDS, do_sample=False, max_new_tokens=8)
    with pytest.raises(CompatibilityError, match="'draft-model' draws its tokens"):
        decoder.generate(IDS, do_sample=True, max_new_tokens=8)


def test_it_accepts_at_least_as_much_as_its_best_member_with_as_many_nodes():
    model, tokenizer = zoo.load("tiny", dtype=torch.float32)
    options = {"size": 12, "min_prob": 0.0}
    hybrid = mat(Decoder(model, "hybrid", **options), tokenizer, warm=False)
    members = [
        mat(Decoder(model, "suffix", **options), tokenizer, warm=False),
        mat(Decoder(model, "token-recycling", size=12), tokenizer, warm=False),
    ]
    assert hybrid >= max(members) > 1.5


def test_a_draft_model_is_a_member_like_any_other() -> None:
    model, draft = tiny_llama(), tiny_llama(seed=1, num_hidden_layers=1)
    inputs = left_padded([torch.tensor([5, 6, 7, 8, 5, 6]), torch.tensor([9, 10])])
    want = new_tokens(model, inputs, max_new_tokens=24, do_sample=False)
    members = ["suffix", "draft-model"]
    decoder = Decoder(model, "hybrid", members=members, draft=draft)
    assert new_tokens(decoder, inputs, max_new_tokens=24, do_sample=False) == want
    assert decoder.stats.draft_forwards > 0
    decoder.generate(**inputs, max_new_tokens=24, do_sample=True)  # its trees are looked up then, too
    with pytest.raises(UsageError, match="give draft"):
        Decoder(model, "hybrid", members=members)
    with pytest.raises(UsageError, match="add 'draft-model'"):
        Decoder(model, "hybrid", draft=draft)
