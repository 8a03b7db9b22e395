"""RSD: drawing without replacement is exact for both constructions, and its trees have the law of their method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from test_law import exact_pairs
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters import rsd
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.rsd import RSD
from specdec.errors import CompatibilityError, UsageError
from specdec.sampling import Randomness
from specdec.tree import DraftTree, Law, Topology

V = 4
IDS = torch.tensor([[1, 2, 3]])
SETTINGS = {"temperature": 0.8, "top_k": 3}
SHAPES = {"beam": {"width": 2, "depth": 2}, "constant": {"branching": (2, 1)}}


# with tied embeddings so small a Gemma 2 only repeats its last token
FAMILIES = pytest.mark.parametrize(
    "make",
    [tiny_llama, partial(tiny_gemma2, tie_word_embeddings=False), tiny_mistral],
    ids=["llama", "gemma2", "mistral"],
)


class Races(Scripted):
    """Enumerates stochastic beam search too.

    In time t = exp(-G) sequences arrive one after another, and a node arrives with the first of its sequences. Given
    when the nodes of one depth arrive, arrivals at the next depth are a chain of draws: the next event is either the
    next one of the depth above, which brings the first child of the node that arrives then, or a further child c of a
    node v that is there, at the rate phi_v q(c | v). ``race`` draws that chain and returns times that produce it.
    """

    def begin(self, width: int, eos: frozenset[int]) -> None:
        """A tree begins."""
        self.width, self.eos = width, eos
        self.nodes = [(1.0, 0.0, True)]  # of the last depth: phi, time, whether children may follow
        self.events = [(0.0, 1.0, 0)]  # of the last depth: time, rate of waiting for it, the node that arrives

    def race(self, q: torch.Tensor) -> torch.Tensor:
        above, self.events = self.events, []
        there: list[int] = []
        children: dict[tuple[int, int], float] = {}  # (parent, token) -> time, in order of arrival
        now = 0.0
        while len(children) < self.width:
            rates = {
                (v, c): self.nodes[v][0] * float(q[v, c])
                for v in there
                for c in range(q.shape[1])
                if self.nodes[v][2] and (v, c) not in children and q[v, c] > 0
            }
            rate = (above[0][1] if above else 0.0) + sum(rates.values())
            if rate == 0:
                break
            waiting = [(None, above[0][1] / rate)] if above else []
            event = self._choose(waiting + [(child, r / rate) for child, r in rates.items()])
            arrived = None
            if event is None:
                now, _, v = above.pop(0)
                if v is not None:
                    there.append(v)
                    if self.nodes[v][2]:
                        event = (v, self.draw(q[v]))
            else:
                now = (now + above[0][0]) / 2 if above else now + 1
            if event is not None:
                arrived = len(children)
                children[event] = now
            self.events.append((now, rate, arrived))
        times = torch.ones_like(q)  # of nodes that are not there yet: nothing before their own arrival
        for v in there:
            phi, t, _ = self.nodes[v]
            times[v] += (now + 1000 - t) * phi
            for (parent, c), when in children.items():
                if parent == v:
                    times[v, c] = 1 + (when - t) * phi
        self.nodes = [(self.nodes[v][0] * float(q[v, c]), t, c not in self.eos) for (v, c), t in children.items()]
        return times.masked_fill(q == 0, float("inf"))


class Halt(Exception):
    """Ends a request after what a test wants to see."""

    def __init__(self, seen):
        self.seen = seen


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Makes ``generate`` of a decoder a function of the random choices; ``spoil`` changes what was drafted."""

    def prepare(decoder: Decoder, spoil: Callable[[DraftTree], DraftTree] = lambda tree: tree) -> Callable:
        grow = decoder.drafter.grow

        def scripted_grow(state, logits, deepest):
            if getattr(decoder.drafter, "beam", None) is not None:
                state.rows[0].randomness.begin(decoder.drafter.beam, state.eos)
            return [spoil(tree) for tree in grow(state, logits, deepest)]

        def generate(random: Races, new: int, **settings) -> tuple[int, ...]:
            monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
            settings = {"max_new_tokens": new, "do_sample": True, **SETTINGS, **settings}
            return tuple(decoder.generate(IDS, **settings)[0, 3:].tolist())

        monkeypatch.setattr(decoder.drafter, "grow", scripted_grow)
        monkeypatch.setattr("specdec.bench.enumeration.Scripted", Races)
        return generate

    return prepare


def models(seed: int = 0, vocab_size: int = V) -> tuple:
    return tiny_llama(vocab_size=vocab_size, seed=seed), tiny_llama(vocab_size=vocab_size, seed=seed + 1)


def next_law(model, tokens: tuple[int, ...]) -> list[float]:
    """Law of the token after IDS and ``tokens``, by a plain forward and transformers' own warpers."""
    whole = torch.cat([IDS[0], torch.tensor(tokens, dtype=torch.long)])[None]
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(SETTINGS["temperature"]), TopKLogitsWarper(SETTINGS["top_k"])]
    )
    with torch.no_grad():
        return torch.softmax(warpers(whole, model(whole).logits[:, -1].float()).double(), -1)[0].tolist()


def completed(model, started: dict[tuple[int, ...], float], n: int, eos: int | None) -> dict[tuple[int, ...], float]:
    """Law of the first ``n`` tokens when texts that are shorter, and not ended, go on with the model's own law."""
    for _ in range(n):
        longer: dict[tuple[int, ...], float] = Counter()
        for tokens, weight in started.items():
            if len(tokens) >= n or eos in tokens:
                longer[tokens[:n]] += weight
            else:
                for token, p in enumerate(next_law(model, tokens)):
                    longer[(*tokens, token)] += weight * p
        started = longer
    return started


def first_step(scripted, decoder: Decoder, new: int, **settings) -> dict[tuple[int, ...], float]:
    """Exact law of what the first step of a request of ``new`` tokens emits."""
    generate = scripted(decoder)

    def observe(state, proposals, output, verdicts):
        raise Halt(tuple(verdicts[0].emitted))

    decoder.drafter.observe = observe

    def step(random: Races) -> tuple[int, ...]:
        with pytest.raises(Halt) as halt:
            generate(random, new, **settings)
        return halt.value.seen

    return law(step)


# ---- the emitted law ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_of_the_whole_loop_is_exact(scripted, shape: str, seed: int):
    """Every random outcome of a request of two tokens."""
    model, draft = models(seed)
    generate = scripted(Decoder(model, RSD(draft, **SHAPES[shape])))
    assert total_variation(law(lambda random: generate(random, 2)), exact_pairs(model, IDS, **SETTINGS)) < 1e-6


@pytest.mark.parametrize(("seed", "eos"), [(0, None), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_of_a_step_with_a_deep_tree_is_exact(scripted, shape: str, seed: int, eos: int | None):
    """Every random outcome of the first step, whose trees have two depths; the text then goes on as the target's."""
    model, draft = models(seed)
    decoder = Decoder(model, RSD(draft, **SHAPES[shape]))
    emitted = first_step(scripted, decoder, 3, eos_token_id=eos)
    assert max(map(len, emitted)) == 3, "no tree of two depths was accepted"
    assert total_variation(completed(model, emitted, 3, eos), completed(model, {(): 1.0}, 3, eos)) < 1e-6


def _by_q(tree: DraftTree) -> DraftTree:
    """Siblings at the root in order of their probability."""
    order = sorted(range(1, len(tree)), key=lambda v: -float(tree.q[0, tree.tokens[v]]))
    return DraftTree(tree.topology, tree.tokens[[0, *order]], tree.law, tree.q_row, tree.q)


def _re_ranked(tree: DraftTree) -> DraftTree:
    """Only nodes likelier than an even chance: a cut that looks at what was drawn."""
    kept = [v for v in range(len(tree)) if v == 0 or tree.q[0, tree.tokens[v]] > 1 / 3]
    parents = [-1] + [0] * (len(kept) - 1)
    return DraftTree(Topology(parents), tree.tokens[kept], tree.law[kept], tree.q_row[kept], tree.q)


def _as_iid(tree: DraftTree) -> DraftTree:
    return DraftTree(tree.topology, tree.tokens, np.full_like(tree.law, Law.IID), tree.q_row, tree.q)


@pytest.mark.parametrize("spoil", [_by_q, _re_ranked, _as_iid])
@pytest.mark.parametrize("shape", [{"width": 2, "depth": 1}, {"branching": (2,)}], ids=["beam", "constant"])
def test_a_tree_changed_after_drawing_is_detected(scripted, shape: dict, spoil: Callable):
    distances = []
    for seed in range(3):
        model, draft = models(seed)
        generate = scripted(Decoder(model, RSD(draft, **shape)), spoil)
        emitted = law(lambda random, generate=generate: generate(random, 2))
        distances.append(total_variation(emitted, exact_pairs(model, IDS, **SETTINGS)))
    assert max(distances) > 1e-3


def first_trees(decoder: Decoder, generate: Callable, *args, **settings) -> list[DraftTree]:
    """What the drafter proposes in the first step, row by row."""
    propose = decoder.drafter.propose

    def halting(state):
        raise Halt([proposal.tree for proposal in propose(state)])

    decoder.drafter.propose = halting
    try:
        with pytest.raises(Halt) as halt:
            generate(*args, **settings)
    finally:
        decoder.drafter.propose = propose
    return halt.value.seen


def fit(counts: Counter, expected: dict) -> float:
    """p-value of a chi-square test; rare outcomes are pooled."""
    total = counts.total()
    assert set(counts) <= {k for k, p in expected.items() if p > 0}, "an impossible outcome was drawn"
    common = [k for k, p in expected.items() if p * total >= 5]
    observed, want = [counts[k] for k in common], [expected[k] * total for k in common]
    if (rest := total - sum(want)) >= 1:
        observed.append(total - sum(observed))
        want.append(rest)
    return float(chisquare(observed, np.array(want) * sum(observed) / sum(want)).pvalue)


def test_sampling_at_scale_passes_chi_square():
    """Two tokens of texts of three, so that trees are two deep."""
    model, draft = models(vocab_size=32)
    settings = {"temperature": 0.9, "top_k": 6}
    torch.manual_seed(0)
    decoder = Decoder(model, RSD(draft, width=4, depth=2))
    rows = decoder.generate(IDS, max_new_tokens=3, do_sample=True, num_return_sequences=1500, **settings)
    pairs = Counter(map(tuple, rows[:, 3:5].tolist()))
    assert fit(pairs, exact_pairs(model, IDS, **settings)) > 1e-4


def test_two_nodes_without_replacement_are_accepted_more_often_than_two_independent_ones(scripted):
    """Expected tokens of the first step, exactly; at scale see the slow test below."""
    gains = []
    for seed in range(4):
        model, draft = models(seed)
        expected = [
            sum(len(tokens) * weight for tokens, weight in first_step(scripted, Decoder(model, drafter), 2).items())
            for drafter in (RSD(draft, width=2, depth=1), DraftModel(draft, branching=(2,), law="iid"))
        ]
        gains.append(expected[0] - expected[1])
    assert min(gains) > -1e-9
    assert max(gains) > 0.02


# ---- the trees ------------------------------------------------------------------------------------------------------


def shape_of(tree: DraftTree) -> tuple:
    return tree.topology.parents, tuple(tree.tokens.tolist())


def sampled_trees(draft, count: int, **shape) -> list[DraftTree]:
    """Trees below IDS, drawn with real randomness; the draft is its own target, since only drafting matters."""
    torch.manual_seed(0)
    decoder = Decoder(draft, RSD(draft, **shape))
    settings = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": count, **SETTINGS}
    return first_trees(decoder, decoder.generate, IDS, **settings)


def tree_law(scripted, draft, **shape) -> dict:
    decoder = Decoder(draft, RSD(draft, **shape))
    generate = scripted(decoder)
    return law(lambda random: shape_of(first_trees(decoder, generate, random, 3)[0]))


def test_drawn_trees_have_the_enumerated_law_of_stochastic_beam_search(scripted, monkeypatch: pytest.MonkeyPatch):
    draft = models()[1]
    trees = Counter(map(shape_of, sampled_trees(draft, 5000, width=2, depth=2)))
    perturbed = rsd.perturbed
    monkeypatch.setattr(rsd, "perturbed", lambda times, phi, g: perturbed(times, torch.zeros_like(phi), g))
    biased = Counter(map(shape_of, sampled_trees(draft, 5000, width=2, depth=2)))
    monkeypatch.setattr(rsd, "perturbed", perturbed)
    expected = tree_law(scripted, draft, width=2, depth=2)
    assert len(expected) > 50
    assert fit(trees, expected) > 1e-4
    assert fit(biased, expected) < 1e-6, "noise located by the last token instead of the path must be seen"


@pytest.mark.parametrize("width", [1, 2])
def test_the_sequences_of_the_last_depth_are_drawn_without_replacement(width: int):
    """In order of G: the first has the draft's law, the second that of the rest."""
    draft = models()[1]
    q = completed(draft, {(): 1.0}, 2, None)

    def sequences(tree: DraftTree) -> tuple:
        return tuple(tuple(tree.tokens[tree.topology.path(v)].tolist()) for v in tree.topology.levels[2])

    drawn = Counter(map(sequences, sampled_trees(draft, 5000, width=width, depth=2)))
    expected = {(a,): q[a] for a in q}
    if width == 2:
        expected = {(a, b): q[a] * q[b] / (1 - q[a]) for a in q if q[a] for b in q if b != a}
    assert fit(drawn, expected) > 1e-4


def test_siblings_of_constant_branching_are_drawn_without_replacement():
    """Gumbel-Top-k: the law of ordered pairs is q(a) q(b) / (1 - q(a))."""
    draft = models()[1]
    q = next_law(draft, ())
    drawn = Counter(tuple(tree.tokens[1:].tolist()) for tree in sampled_trees(draft, 5000, branching=(2,)))
    expected = {(a, b): q[a] * q[b] / (1 - q[a]) for a in range(V) if q[a] for b in range(V) if b != a}
    assert fit(drawn, expected) > 1e-4


@given(st.integers(0, 10**6), st.floats(-1500, 0), st.floats(-2000, 50))
def test_the_earliest_child_keeps_its_parents_perturbed_log_probability(seed: int, phi: float, g: float):
    randomness = Randomness(seed)
    q = torch.softmax(4 * torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)).double(), -1)
    q[:, seed % 7] = 0
    parents = torch.tensor([g, g - 5, float("inf")], dtype=torch.float64)
    children = rsd.perturbed(randomness.race(q), torch.full((3,), phi, dtype=torch.float64), parents)
    assert not children.isnan().any()
    torch.testing.assert_close(children.amax(-1), parents, rtol=1e-12, atol=0)
    assert (children[:, seed % 7] == -float("inf")).all()


def ragged(sizes: tuple[int, ...] = (9, 3, 14, 6)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 20, (4,), generator=g).repeat(9)[:n] for n in sizes]


@FAMILIES
def test_every_node_was_drawn_from_the_draft_models_law_after_its_path(make: Callable):
    draft = make(seed=1)
    decoder = Decoder(tiny_llama(), RSD(draft, width=3, depth=3))
    settings = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_k": 0}
    trees = first_trees(decoder, decoder.generate, **left_padded(ragged()), **settings)
    for prompt, tree in zip(ragged(), trees, strict=True):
        assert [len(level) for level in tree.topology.levels] == [1, 3, 3, 3]
        for v, children in enumerate(tree.topology.children):
            if children:
                path = torch.from_numpy(tree.tokens[tree.topology.path(v)])
                with torch.no_grad():
                    logits = draft(torch.cat([prompt, path])[None]).logits[0, -1]
                want = torch.softmax(logits / 0.7, -1)
                for child in children:
                    torch.testing.assert_close(tree.q[tree.q_row[child]], want, atol=1e-4, rtol=1e-3)


def test_trees_of_greedy_requests_are_plain_beam_searches():
    draft = models()[1]
    decoder = Decoder(draft, RSD(draft, width=3, depth=2))
    (tree,) = first_trees(decoder, decoder.generate, IDS, max_new_tokens=3, do_sample=False)
    assert tree.law is None, "every node is a point"

    def log_law(tokens: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return draft(torch.tensor([[1, 2, 3, *tokens]])).logits[0, -1].log_softmax(-1)

    top = log_law(()).topk(3)
    paths = {
        (a, b): float(p + log_law((a,))[b])
        for p, a in zip(*map(torch.Tensor.tolist, top), strict=True)
        for b in range(V)
    }
    assert tree.tokens[1:4].tolist() == top.indices.tolist()
    found = [tuple(tree.tokens[tree.topology.path(v)].tolist()) for v in tree.topology.levels[2]]
    assert found == sorted(paths, key=lambda path: -paths[path])[:3]


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_budget_is_never_exceeded_and_nothing_is_drawn_twice(do_sample: bool):
    model, draft = tiny_llama(), tiny_llama(seed=1)
    shapes = [{"width": 5, "depth": 2}, {"width": 1, "depth": 4}, {"width": 2, "depth": 7}, {"branching": (2, 2, 2)}]
    for shape, drafted in zip(shapes, (10, 4, 14, 14), strict=True):
        decoder = Decoder(model, RSD(draft, **shape))
        assert decoder.drafter.budget == 1 + drafted
        settings = {"max_new_tokens": 20, "do_sample": do_sample, "top_k": 0}
        for tree in first_trees(decoder, decoder.generate, **left_padded(ragged()), **settings):
            assert len(tree) == 1 + drafted
            for children in tree.topology.children:
                assert len({int(tree.tokens[c]) for c in children}) == len(children)


def test_fewer_continuations_than_the_width():
    draft = models()[1]
    decoder = Decoder(draft, RSD(draft, width=6, depth=3))
    for settings, levels in (({"top_k": 0}, [1, 4, 6, 6]), ({"top_k": 2}, [1, 2, 4, 6]), ({"top_k": 1}, [1, 1, 1, 1])):
        settings = {"max_new_tokens": 4, "do_sample": True, **settings}
        (tree,) = first_trees(decoder, decoder.generate, IDS, **settings)
        assert [len(level) for level in tree.topology.levels] == levels
        assert decoder.generate(IDS, **settings).shape == (1, 7)


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_end_token_has_no_children(do_sample: bool):
    draft = models()[1]
    decoder = Decoder(draft, RSD(draft, width=4, depth=3))
    for eos in (2, [0, 1, 2, 3]):
        settings = {"max_new_tokens": 4, "do_sample": do_sample, "top_k": 0, "eos_token_id": eos}
        (tree,) = first_trees(decoder, decoder.generate, IDS, **settings)
        ends = [v for v in range(1, len(tree)) if tree.tokens[v] in np.atleast_1d(eos)]
        assert ends
        assert not any(tree.topology.children[v] for v in ends)
    assert tree.topology.max_depth == 1, "where every token ends the text, nothing follows the first depth"


# ---- text, cache, cost ----------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("shape", [{"width": 3, "depth": 4}, {"branching": (2, 2, 1)}], ids=["beam", "constant"])
def test_greedy_ids_are_generates_own(shape: dict, make: Callable):
    model = make()
    for draft in (model, make(seed=1)):
        decoder = Decoder(model, RSD(draft, **shape))
        for inputs in ({"input_ids": ragged()[0][None]}, left_padded(ragged())):
            settings = {"do_sample": False, "max_new_tokens": 40}
            want = new_tokens(model, inputs, **settings)
            assert new_tokens(decoder, inputs, **settings) == want
            settings["eos_token_id"] = want[0][20]
            assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)


def test_a_draft_equal_to_the_target_is_accepted_at_its_first_children():
    model = tiny_llama()
    for shape in ({"width": 3, "depth": 4}, {"branching": (3, 2, 1, 1)}):
        decoder = Decoder(model, RSD(model, **shape))
        decoder.generate(IDS, do_sample=True, max_new_tokens=30)
        assert decoder.stats.mat == 5


def test_the_drafts_cache_is_the_text_so_far_after_every_step():
    draft = tiny_llama(seed=1)
    decoder = Decoder(tiny_llama(), RSD(draft, width=3, depth=3))
    seen = []

    def observe(state, proposals, output, verdicts):
        cache, row_ids = decoder.drafter.draft.caches[0], decoder.drafter.draft.row_ids
        for row in state.rows:
            b = row_ids.index(row.index)
            n = cache.lengths[b]
            want = draft(torch.from_numpy(row.tokens[:n].copy())[None], use_cache=True).past_key_values.layers[1].keys
            seen.append(torch.allclose(cache.layers[1].keys[b : b + 1, :, :n], want, atol=1e-4))

    decoder.drafter.observe = observe
    decoder.generate(**left_padded(ragged()), do_sample=True, max_new_tokens=12)
    assert len(seen) > 10
    assert all(seen)


def test_a_depth_costs_one_draft_forward():
    decoder = Decoder(tiny_llama(), RSD(tiny_llama(seed=1), width=4, depth=3))
    decoder.generate(IDS, do_sample=True, max_new_tokens=30)
    assert decoder.stats.draft_forwards <= 3 * len(decoder.stats.steps)


def bloom() -> BloomForCausalLM:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None)
    return BloomForCausalLM(config).eval()


def test_a_target_that_takes_no_trees_gets_chains():
    model = bloom()
    decoder = Decoder(model, RSD(tiny_llama(seed=1), width=3, depth=3))
    settings = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    inputs = {"input_ids": ragged()[0][None]}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)


def test_bad_shapes_and_drafts_are_refused():
    draft = tiny_llama(seed=1)
    for shape in ({"width": 0}, {"depth": 0}, {"branching": ()}, {"branching": (2, 0)}):
        with pytest.raises(UsageError, match=f"{next(iter(shape))}.*"):
            RSD(draft, **shape)
    with pytest.raises(CompatibilityError, match="its vocabulary has 64 tokens, the target's 4"):
        Decoder(models()[0], RSD(draft))
    with pytest.raises(CompatibilityError, match="tree-capable draft"):
        Decoder(tiny_llama(), RSD(bloom(), width=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "iid"),
    [
        ({"width": 2, "depth": 7}, (2, 2, 2)),
        ({"branching": (2, 2, 2)}, (2, 2, 2)),
        ({"width": 6, "depth": 5}, (2, 2, 2, 2)),
        ({"branching": (2, 2, 2, 2)}, (2, 2, 2, 2)),
    ],
)
def test_mat_is_at_least_that_of_iid_trees_of_the_same_budget(shape: dict, iid: tuple[int, ...]):
    """On the embedded model's prompts at temperature 1; the interval is a bootstrap over prompts, as in ``bench``."""
    from specdec import zoo
    from specdec.bench.prompts import load_prompts
    from specdec.bench.statistics import speedup_interval

    (model, tokenizer), (draft, _) = (zoo.load(name, dtype=torch.float32) for name in ("tiny", "tiny-draft"))
    arms = [Decoder(model, RSD(draft, **shape)), Decoder(model, DraftModel(draft, branching=iid, law="iid"))]
    assert arms[0].drafter.budget == arms[1].drafter.budget
    costs = []  # per prompt: tokens and forwards of both
    for i, prompt in enumerate(load_prompts("embedded")):
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        for decoder in arms:
            torch.manual_seed(i)
            decoder.generate(ids, max_new_tokens=96, do_sample=True, temperature=1.0, top_k=0)
            costs.append((decoder.stats.new_tokens, decoder.stats.row_forwards))
    (tokens, forwards), (iid_tokens, iid_forwards) = np.array(costs, dtype=float).reshape(-1, 2, 2).transpose(1, 2, 0)
    ratio = (tokens.sum() / forwards.sum()) / (iid_tokens.sum() / iid_forwards.sum())
    low, high = speedup_interval(tokens, forwards, iid_tokens, iid_forwards)
    print(f"{shape}: MAT {tokens.sum() / forwards.sum():.3f}, {ratio:.3f} times i.i.d.'s, 95 % [{low:.3f}, {high:.3f}]")
    assert high >= 1, f"MAT is {ratio:.3f} times that of i.i.d. trees, interval [{low:.3f}, {high:.3f}]"
