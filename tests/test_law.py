"""Sampling is exact: the emitted law is the target's processed law, for every kind of draft tree."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_models import tiny_llama
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters.draft_model import DraftModel
from specdec.sampling import Randomness, Sampler
from specdec.state import DecodeState, Row
from specdec.target import StepOutput
from specdec.tree import DraftTree, Law, Proposal, Topology
from specdec.verifiers import standard
from specdec.verifiers.standard import Standard

V = 4
PROMPT = (1, 3)
PROCESSORS = {
    "plain": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top-k": [TopKLogitsWarper(3)],
    "top-p": [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.7)],
    "repetition": [RepetitionPenaltyLogitsProcessor(1.7), TopKLogitsWarper(4)],
}
# per depth the laws of a node's children, in trial order
SHAPES = {
    "point": [[Law.POINT] * 2, [Law.POINT]],
    "iid": [[Law.IID] * 2, [Law.IID]],
    "wor": [[Law.WOR] * 3],
    "wor-deep": [[Law.WOR] * 2, [Law.WOR] * 2],
    "mixed": [[Law.POINT, Law.WOR, Law.WOR], [Law.IID]],
    "point-last": [[Law.WOR, Law.POINT], [Law.POINT]],
    "none": [],
}


class Tables:
    """A target and a draft given by tables over the last two tokens."""

    def __init__(self, seed: int, zeros: bool = False):
        g = torch.Generator().manual_seed(seed)
        self.p = torch.randn(V, V, V, generator=g) * 2
        self.q = torch.softmax(torch.randn(V, V, V, generator=g) * 2, -1)
        if zeros:  # tokens the draft can never propose, and tokens the target can never emit
            self.q[..., seed % V] = 0
            self.q /= self.q.sum(-1, keepdim=True)
            self.p[..., (seed + 1) % V] = float("-inf")

    def target_logits(self, context: tuple[int, ...]) -> torch.Tensor:
        return self.p[context[-2], context[-1]]

    def draft_law(self, context: tuple[int, ...]) -> torch.Tensor:
        return self.q[context[-2], context[-1]]


def draw_tree(tables: Tables, shape: list[list[Law]], random: Scripted) -> DraftTree:
    """Grow a tree level by level, as a drafter would; the q recorded is the law drawn from."""
    parents, tokens, laws, q_row = [-1], [PROMPT[-1]], [Law.POINT], [0]
    contexts = [PROMPT]
    rows: list[torch.Tensor] = []
    level = [0]
    for kinds in shape:
        grown = []
        for parent in level:
            q = tables.draft_law(contexts[parent])
            rows.append(q)
            taken: list[int] = []
            for kind in kinds:
                if kind is Law.POINT:
                    token = int(tables.target_logits(contexts[parent]).argsort(descending=True)[len(taken)])
                    if token in taken:
                        continue
                else:
                    left = q.clone()
                    if kind is Law.WOR:
                        left[taken] = 0
                    if left.sum() <= 0:
                        continue
                    token = random.draw(left)
                taken.append(token)
                parents.append(parent)
                tokens.append(token)
                laws.append(kind)
                q_row.append(len(rows) - 1)
                contexts.append((*contexts[parent], token))
                grown.append(len(parents) - 1)
        level = grown[-1:]  # the last sibling grows on: fewer outcomes to enumerate, same rule
    q = torch.stack(rows) if rows else None
    return DraftTree(Topology(parents), np.array(tokens), np.array(laws, dtype=np.int8), np.array(q_row), q)


def verify(tables: Tables, tree: DraftTree, processors: list, random: Scripted) -> tuple[int, ...]:
    """Tokens emitted by one verification of ``tree``."""
    contexts = [PROMPT]
    for v in range(1, len(tree)):
        contexts.append((*contexts[tree.topology.parents[v]], int(tree.tokens[v])))
    logits = torch.stack([tables.target_logits(c) for c in contexts])[None]
    row = Row(0, torch.tensor(PROMPT), 0, 10, random, Sampler(LogitsProcessorList(processors), do_sample=True))
    state = DecodeState([row], SimpleNamespace(context=None), 64)
    output = StepOutput(logits, {}, [0], [0], [len(tree)], [0], [0])
    (verdict,) = Standard().verify(state, [Proposal(tree)], output)
    return (*(int(tree.tokens[v]) for v in verdict.path), verdict.token)


def processed(tables: Tables, context: tuple[int, ...], processors: list) -> list[float]:
    scores = tables.target_logits(context)[None].clone()
    scores = LogitsProcessorList(processors)(torch.tensor([context]), scores)
    return torch.softmax(scores.double(), -1)[0].tolist()


def first_two(tables: Tables, emitted: dict[tuple[int, ...], float], processors: list) -> dict:
    """Joint law of the first two tokens; a text of one token goes on with the target's own law."""
    joint: dict[tuple[int, int], float] = {}
    for tokens, weight in emitted.items():
        if len(tokens) >= 2:
            joint[tokens[:2]] = joint.get(tokens[:2], 0) + weight
            continue
        for b, p in enumerate(processed(tables, (*PROMPT, *tokens), processors)):
            joint[(tokens[0], b)] = joint.get((tokens[0], b), 0) + weight * p
    return joint


def distance(seed: int, shape: list, processors: list, zeros: bool = False) -> float:
    tables = Tables(seed, zeros)
    emitted = law(lambda random: verify(tables, draw_tree(tables, shape, random), processors, random))
    assert abs(sum(emitted.values()) - 1) < 1e-9
    return total_variation(first_two(tables, emitted, processors), exact(tables, processors))


def exact(tables: Tables, processors: list) -> dict[tuple[int, int], float]:
    return {
        (a, b): pa * pb
        for a, pa in enumerate(processed(tables, PROMPT, processors))
        if pa > 0
        for b, pb in enumerate(processed(tables, (*PROMPT, a), processors))
    }


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_emitted_law_is_the_processed_target_law(shape: str, name: str):
    assert distance(0, SHAPES[shape], PROCESSORS[name]) < 1e-6


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("shape", ["iid", "wor", "mixed"])
def test_law_holds_where_draft_or_target_has_probability_zero(shape: str, seed: int):
    assert distance(seed, SHAPES[shape], [], zeros=True) < 1e-6


def worst(shape: list[list[Law]], spoil) -> float:
    """Largest distance over a few tables when the tree's record is spoiled before verification."""
    distances = []
    for seed in range(5):
        tables = Tables(seed)
        emitted = law(lambda random, t=tables: verify(t, spoil(draw_tree(t, shape, random)), [], random))
        distances.append(total_variation(first_two(tables, emitted, []), exact(tables, [])))
    return max(distances)


def _relabel(tree: DraftTree, kind: Law) -> DraftTree:
    return DraftTree(tree.topology, tree.tokens, np.full_like(tree.law, kind), tree.q_row, tree.q)


def _resort(tree: DraftTree) -> DraftTree:
    """Children of the root in order of q: looks harmless, changes the law."""
    children = sorted(tree.topology.children[0], key=lambda c: -float(tree.q[0, tree.tokens[c]]))
    return DraftTree(tree.topology, np.array([tree.tokens[0], *tree.tokens[children]]), tree.law, tree.q_row, tree.q)


def _flatten(tree: DraftTree) -> DraftTree:
    return DraftTree(
        tree.topology, tree.tokens, tree.law, tree.q_row, (tree.q**0.5) / (tree.q**0.5).sum(-1, keepdim=True)
    )


BIASED = {
    "argmax drafts recorded as draws": ([[Law.POINT]], lambda t: _relabel(t, Law.IID)),
    "without replacement verified as iid": ([[Law.WOR] * 2], lambda t: _relabel(t, Law.IID)),
    "children re-sorted by q": ([[Law.WOR] * 2], _resort),
    "q at another temperature than drawn": ([[Law.IID]], _flatten),
}


@pytest.mark.parametrize("name", BIASED)
def test_a_wrong_record_of_the_law_is_detected(name: str):
    assert worst(*BIASED[name]) > 0.01


def test_a_repeated_draw_recorded_as_without_replacement_is_refused():
    with pytest.raises(ValueError, match="probability 0 under its recorded q"):
        worst([[Law.IID] * 2], lambda t: _relabel(t, Law.WOR))


def test_a_verifier_that_forgets_the_residual_is_detected(monkeypatch: pytest.MonkeyPatch):
    original = standard.choose

    def forgetful(p, tree, children, randomness):
        for child in children:
            x = int(tree.tokens[child])
            if randomness.accept(float(p[x] / tree.q[tree.q_row[child]][x])):
                return x, child
        return randomness.draw(p), None  # should be drawn from the residual

    monkeypatch.setattr(standard, "choose", forgetful)
    assert worst([[Law.IID]], lambda t: t) > 0.01
    monkeypatch.setattr(standard, "choose", original)
    assert worst([[Law.IID]], lambda t: t) < 1e-6


def test_greedy_is_the_limit_of_sampling_at_low_temperature():
    tables = Tables(3)
    cold = [TemperatureLogitsWarper(1e-3)]
    emitted = law(lambda random: verify(tables, draw_tree(tables, SHAPES["wor"], random), cold, random))
    best = int(tables.target_logits(PROMPT).argmax())
    assert {tokens[0] for tokens in emitted} == {best}


# ---- the whole loop, with models ---------------------------------------------------------------------------------


def exact_pairs(model, ids: torch.Tensor, **settings) -> dict[tuple[int, int], float]:
    """Joint law of two new tokens by plain forwards and transformers' own processors."""
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(settings["temperature"]), TopKLogitsWarper(settings["top_k"])]
    )

    def p(tokens: list[int]) -> list[float]:
        whole = torch.cat([ids[0], torch.tensor(tokens, dtype=torch.long)])[None]
        with torch.no_grad():
            return torch.softmax(warpers(whole, model(whole).logits[:, -1].float()).double(), -1)[0].tolist()

    return {(a, b): pa * pb for a, pa in enumerate(p([])) if pa for b, pb in enumerate(p([a])) if pb}


@pytest.mark.parametrize("options", [{"branching": (2,)}, {"branching": (2,), "law": "iid"}, {"length": 1}])
def test_whole_loop_with_a_draft_model_has_the_exact_law(options, monkeypatch: pytest.MonkeyPatch):
    model, draft = tiny_llama(vocab_size=4, seed=0), tiny_llama(vocab_size=4, seed=1)
    decoder = Decoder(model, DraftModel(draft, **options))
    ids = torch.tensor([[1, 2, 3]])
    settings = {"temperature": 0.8, "top_k": 3}

    def generate(random: Scripted) -> tuple[int, int]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(ids, max_new_tokens=2, do_sample=True, **settings)[0, 3:].tolist())

    assert total_variation(law(generate), exact_pairs(model, ids, **settings)) < 1e-6


def p_value(decoder: Decoder, model, ids: torch.Tensor, samples: int, **settings) -> float:
    """Chi-square test of sampled pairs against the exact law; rare pairs are pooled."""
    torch.manual_seed(0)
    rows = decoder.generate(ids, max_new_tokens=2, do_sample=True, num_return_sequences=samples, **settings)
    exactly = exact_pairs(model, ids, **settings)
    counts: dict[tuple[int, int], int] = {}
    for pair in map(tuple, rows[:, ids.shape[1] :].tolist()):
        counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) <= set(exactly), "a token outside the warped support was emitted"
    common = [pair for pair, p in exactly.items() if p * samples >= 5]
    rest = 1 - sum(exactly[pair] for pair in common)
    observed = [counts.get(pair, 0) for pair in common]
    expected = [exactly[pair] * samples for pair in common]
    if rest * samples >= 1:
        observed.append(samples - sum(observed))
        expected.append(rest * samples)
    expected = np.array(expected) * sum(observed) / sum(expected)
    return float(chisquare(observed, expected).pvalue)


@pytest.mark.parametrize("drafter", ["draft-model", "token-recycling"])
def test_sampling_at_scale_passes_chi_square(drafter: str):
    model, draft = tiny_llama(vocab_size=32, seed=0), tiny_llama(vocab_size=32, seed=1)
    options = {"draft": draft, "branching": (3, 1)} if drafter == "draft-model" else {}
    decoder = Decoder(model, drafter, **options)
    assert p_value(decoder, model, torch.tensor([[5, 9, 2]]), 3000, temperature=0.9, top_k=6) > 1e-4


def test_chi_square_rejects_a_biased_verifier(monkeypatch: pytest.MonkeyPatch):
    model, draft = tiny_llama(vocab_size=32, seed=0), tiny_llama(vocab_size=32, seed=1)

    def biased(p, tree, children, randomness):
        for child in children:
            if p[tree.tokens[child]] > 0:  # takes whatever the target could have said
                return int(tree.tokens[child]), child
        return randomness.draw(p), None

    monkeypatch.setattr(standard, "choose", biased)
    decoder = Decoder(model, "draft-model", draft=draft, branching=(3, 1))
    assert p_value(decoder, model, torch.tensor([[5, 9, 2]]), 2000, temperature=0.9, top_k=24) < 1e-6


def test_a_draw_has_the_law_it_is_given():
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    randomness = Randomness(3)
    counts = np.bincount([randomness.draw(p) for _ in range(6000)], minlength=6)
    assert not counts[[0, 2, 5]].any(), "a token of probability 0 was drawn"
    assert chisquare(counts[[1, 3, 4]], 6000 * p[[1, 3, 4]].double().numpy() / p.double().sum().item()).pvalue > 1e-4
    assert {randomness.draw(torch.tensor([0.0, 1.0, 0.0])) for _ in range(50)} == {1}
