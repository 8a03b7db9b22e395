"""Typical acceptance: the published threshold, the longest path, a sampled first token, and its limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from heads_suite import random_head
from test_contracts import Trusting
from test_law import PROCESSORS, PROMPT, SHAPES, Tables, V, draw_tree, exact, first_two, p_value, processed
from test_training_free import prompts
from tiny_models import tiny_llama
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from typer.testing import CliRunner

from specdec import Decoder, registry
from specdec.bench.arms import DecoderArm
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.cli import app
from specdec.contracts import Drafter, Verdict, Verifier
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.medusa import Medusa
from specdec.errors import UsageError
from specdec.sampling import Sampler
from specdec.state import DecodeState, Row
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal, Topology
from specdec.verifiers.standard import Standard
from specdec.verifiers.typical import Typical

# what makes the threshold 1 at every node of a vocabulary of up to 64 tokens
ONE = {"epsilon": 1.0, "delta": 64.0}
IDS = torch.tensor([[5, 9, 33, 7]])


# ---- one verification ---------------------------------------------------------------------------------------------


def draft(parents: list[int], tokens: list[int]) -> DraftTree:
    return DraftTree(Topology(parents), np.array(tokens))


def verify(
    verifier: Verifier,
    tree: DraftTree,
    logits: Callable[[tuple[int, ...]], torch.Tensor],
    random: Scripted,
    processors: list | None = None,
    do_sample: bool = True,
    eos: frozenset[int] = frozenset(),
    record: bool = False,
) -> tuple[Verdict, Row]:
    """One verdict where ``logits`` gives the target's after a text that starts with PROMPT."""
    contexts = [PROMPT]
    for v in range(1, len(tree)):
        contexts.append((*contexts[tree.topology.parents[v]], int(tree.tokens[v])))
    rows = torch.stack([logits(c) for c in contexts])[None]
    row = Row(0, torch.tensor(PROMPT), 0, 12, random, Sampler(processors, do_sample))
    state = DecodeState([row], SimpleNamespace(context=None), 64, eos, record, record)
    (verdict,) = verifier.verify(state, [Proposal(tree)], StepOutput(rows, {}, [0], [0], [len(tree)], [0], [0]))
    return verdict, row


def emitted(tree: DraftTree, verdict: Verdict) -> tuple[int, ...]:
    return (*(int(tree.tokens[v]) for v in verdict.path), verdict.token)


def fixed(*probabilities: float) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """The same law after every text."""
    return lambda context: torch.tensor(probabilities).log()


def path(verifier: Verifier, tree: DraftTree, logits: Callable[[tuple[int, ...]], torch.Tensor]) -> list[int]:
    return verify(verifier, tree, logits, Scripted([]))[0].path


@pytest.mark.parametrize(
    ("p", "least"),
    [
        ([1.0, 0.0, 0.0, 0.0], 0.09),  # no entropy: epsilon
        ([0.5, 0.5], 0.09),  # 0.3 / 2 is above epsilon
        ([0.5, 0.25, 0.125, 0.125], 0.3 * 2**-1.75),  # 1.75 bits are 1.213 nats
        ([0.125] * 8, 0.3 / 8),
        ([0.25, 0.0, 0.25, 0.25, 0.25, 0.0], 0.3 / 4),  # tokens of probability 0 count for nothing
    ],
)
def test_the_threshold_is_the_published_one_with_entropy_in_nats(p: list[float], least: float):
    assert Typical().threshold(torch.tensor(p)) == pytest.approx(least, rel=1e-6)


def test_the_threshold_follows_both_parameters():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert Typical(epsilon=0.01).threshold(p) == 0.01
    assert Typical(epsilon=0.2, delta=0.5).threshold(p) == pytest.approx(0.5 * 2**-1.75)
    assert Typical(epsilon=0.2, delta=math.inf).threshold(p) == 0.2
    assert Typical(**ONE).threshold(torch.full((64,), 1 / 64)) == 1


def test_a_token_exactly_at_the_threshold_is_not_accepted():
    tree = DraftTree.chain(PROMPT[-1], [1])
    assert path(Typical(epsilon=0.5, delta=9), tree, fixed(0.5, 0.5, 0, 0)) == []
    assert path(Typical(epsilon=0.499, delta=9), tree, fixed(0.5, 0.5, 0, 0)) == [1]


def test_parameters_are_named_and_not_swapped():
    """The published helper has the two defaults the wrong way round (0.3, 0.09)."""
    with pytest.raises(TypeError, match="positional"):
        Typical(0.09, 0.3)
    flat = fixed(*[0.0249] * 40, 0.004)  # H = 3.70: 0.3 exp(-H) = 0.0074, 0.09 exp(-H) = 0.0022
    rare = DraftTree.chain(PROMPT[-1], [40])
    assert path(Typical(), rare, flat) == []
    assert path(Typical(epsilon=0.3, delta=0.09), rare, flat) == [1], "swapped, it passes"
    assert path(Typical(), DraftTree.chain(PROMPT[-1], [7]), flat) == [1]


@pytest.mark.parametrize("wrong", [{"epsilon": 0}, {"epsilon": 1.5}, {"delta": 0}, {"delta": float("nan")}])
def test_options_out_of_range_are_refused(wrong: dict):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
        Typical(**wrong)


def test_the_longest_path_is_kept_though_a_shorter_one_is_likelier():
    tree = draft([-1, 0, 0, 2], [3, 0, 1, 1])
    assert path(Typical(), tree, fixed(0.8, 0.2, 0, 0)) == [2, 3]


def test_of_equally_long_paths_the_likelier_is_kept():
    def logits(context: tuple[int, ...]) -> torch.Tensor:
        after = {(): [0.6, 0.4, 0, 0], (0,): [0.3, 0.3, 0.2, 0.2], (1,): [0.0, 0.0, 0.6, 0.4]}
        return torch.tensor(after.get(context[len(PROMPT) :], [0.25] * 4)).log()

    shape = [-1, 0, 0, 1, 2]
    assert path(Typical(), draft(shape, [3, 0, 1, 0, 2]), logits) == [2, 4], "0.4 x 0.6 beats 0.6 x 0.3"
    assert path(Typical(), draft(shape, [3, 0, 1, 0, 3]), logits) == [1, 3], "0.6 x 0.3 beats 0.4 x 0.4"
    assert path(Typical(), draft([-1, 0, 0], [3, 1, 1]), logits) == [1], "the first of two alike"


def test_a_node_below_a_refused_one_is_not_accepted():
    tree = draft([-1, 0, 1], [3, 1, 0])
    assert path(Typical(), tree, fixed(0.95, 0.05, 0, 0)) == []


def test_short_paths_are_not_padded_with_token_0():
    """The published code fills short paths with token id 0 and index -1, and may then accept the filling."""
    tree = draft([-1, 0, 0, 2, 3], [3, 0, 1, 2, 2])  # the first path is short; 0 is all the target wants
    verdict, _ = verify(Typical(), tree, fixed(1, 0, 0, 0), Scripted([]))
    assert (verdict.path, verdict.token) == ([1], 0)


def test_an_end_token_inside_the_path_is_the_last():
    tree = DraftTree.chain(PROMPT[-1], [0, 1, 0])
    random = Scripted([])
    verdict, row = verify(Typical(), tree, fixed(0.5, 0.5, 0, 0), random, eos=frozenset({1}), record=True)
    assert (verdict.path, verdict.token) == ([1], 1)
    assert random.options == [], "nothing is drawn after the end"
    assert len(row.recorded_scores) == 2, "and no processor is asked"


def test_a_prompt_may_end_with_an_end_token():
    tree = DraftTree.chain(PROMPT[-1], [0])
    assert verify(Typical(), tree, fixed(0.5, 0.5, 0, 0), Scripted([]), eos=frozenset({PROMPT[-1]}))[0].path == [1]


def wide_tree(seed: int) -> DraftTree:
    """Two or three children each, to depth 3, of random tokens; siblings may be alike."""
    dice = np.random.default_rng(seed)
    parents, tokens, level = [-1], [PROMPT[-1]], [0]
    for most in (3, 2, 2):
        start = len(parents)
        parents += [node for node in level for _ in range(dice.integers(1, most + 1))]
        tokens += dice.integers(0, V, len(parents) - start).tolist()
        level = list(range(start, len(parents)))
    return draft(parents, tokens)


def by_hand(
    tables: Tables, tree: DraftTree, processors: list, epsilon: float, delta: float
) -> tuple[list[int], dict[tuple[int, ...], float]]:
    """The path and the law of a step by the paper's words, every node by itself and nothing shared."""
    parents, tokens = tree.topology.parents, tree.tokens.tolist()

    def probabilities(node: int) -> list[float]:
        return processed(tables, (*PROMPT, *(tokens[v] for v in tree.topology.path(node))), processors)

    found: list[tuple[int, float, int]] = []
    for node in range(len(tree)):
        chances = []
        for v in tree.topology.path(node):
            p = probabilities(parents[v])
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            chances.append(p[tokens[v]])
            if not p[tokens[v]] > min(epsilon, delta * math.exp(-entropy)):
                break
        else:
            found.append((len(chances), sum(map(math.log, chances)), -node))
    last = -max(found)[2]
    kept = tree.topology.path(last)
    text = tuple(tokens[v] for v in kept)
    return kept, {(*text, x): px for x, px in enumerate(probabilities(last)) if px > 0}


def error(verifier: Typical, tree: DraftTree, tables: Tables, processors: list) -> float:
    """Total variation between a step of ``verifier`` and the paper's words."""
    got = law(lambda random: emitted(tree, verify(verifier, tree, tables.target_logits, random, processors)[0]))
    return total_variation(got, by_hand(tables, tree, processors, verifier.epsilon, verifier.delta)[1])


@pytest.mark.parametrize("name", PROCESSORS)
def test_path_and_next_token_are_those_of_the_paper_with_every_processor(name: str):
    lengths = set()
    for seed in range(12):
        tables, tree = Tables(seed, zeros=seed % 2 == 1), wide_tree(seed)
        for rule in (Typical(), Typical(epsilon=0.25, delta=0.5)):
            assert error(rule, tree, tables, PROCESSORS[name]) < 1e-6
        lengths.add(len(by_hand(tables, tree, PROCESSORS[name], 0.09, 0.3)[0]))
    assert len(lengths) >= 3, "trees of which nothing, a part and more is accepted were seen"


class GreedyRoot(Typical):
    """The published "fast" mode: the token after the path is the argmax, at every temperature."""

    def verify(self, state, proposals, output):
        state.rows[0].randomness = SimpleNamespace(draw=lambda p: int(p.argmax()))
        return super().verify(state, proposals, output)


class PerRow(Typical):
    """The published other mode: every root-to-leaf row draws its own typical token at each node; the best row wins."""

    def verify(self, state, proposals, output):
        (row,), tree = state.rows, proposals[0].tree
        best, topology = Verdict([], -1), tree.topology
        for leaf in (v for v in range(len(tree)) if not topology.children[v]):
            nodes, tokens, kept = [0, *topology.path(leaf)], [], []
            for node, child in zip(nodes, [*nodes[1:], -1], strict=True):
                p = row.sampler.probabilities(state.scores(0, tokens, output.logits[0, node]))
                token = row.randomness.draw(torch.where(p > self.threshold(p), p, 0))
                if child < 0 or token != tree.tokens[child]:
                    break
                tokens.append(token)
                kept.append(child)
            if best.token < 0 or len(kept) > len(best.path):
                best = Verdict(kept, row.randomness.draw(p))
        return [best]


@pytest.mark.parametrize("defect", [GreedyRoot, PerRow])
def test_defects_of_the_published_code_are_detected(defect: type[Typical]):
    shared = draft([-1, 0, 1, 1], [PROMPT[-1], 0, 1, 2])  # two paths through one node

    def worst(verifier: Typical) -> float:
        return max(error(verifier, shared, Tables(seed), []) for seed in range(6))

    assert worst(Typical()) < 1e-6
    assert worst(defect()) > 0.1


def test_every_step_adds_a_token_that_no_threshold_has_seen():
    tree = draft([-1, 0, 0], [3, 1, 2])
    p = [0.9, 0.06, 0.02, 0.02]
    tokens = law(lambda random: emitted(tree, verify(Typical(), tree, fixed(*p), random)[0]))
    assert total_variation(tokens, {(x,): px for x, px in enumerate(p)}) < 1e-6, "drafted tokens may come after all"


# ---- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_1_has_the_law_of_standard_verification(shape: str, name: str):
    """For every kind of draft: the q of sampled trees is not used, and need not be."""
    tables, processors = Tables(0), PROCESSORS[name]

    def step(random: Scripted) -> tuple[int, ...]:
        tree = draw_tree(tables, SHAPES[shape], random)
        return emitted(tree, verify(Typical(**ONE), tree, tables.target_logits, random, processors)[0])

    assert total_variation(first_two(tables, law(step), processors), exact(tables, processors)) < 1e-6


def test_at_a_low_temperature_only_the_argmax_passes():
    for seed in range(6):
        tables, tree = Tables(seed), wide_tree(seed)
        cold, _ = verify(Typical(), tree, tables.target_logits, Scripted([]), [TemperatureLogitsWarper(1e-3)])
        greedy, _ = verify(Standard(), tree, tables.target_logits, Scripted([]), do_sample=False)
        assert emitted(tree, cold) == emitted(tree, greedy)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.01, "delta": 0.1}, ONE])
def test_greedy_verdicts_are_those_of_standard(options: dict):
    for seed in range(6):
        for processors in PROCESSORS.values():
            one, other = (
                verify(v, wide_tree(seed), Tables(seed).target_logits, Scripted([]), processors, do_sample=False)[0]
                for v in (Typical(**options), Standard())
            )
            assert one == other


# ---- the whole loop -----------------------------------------------------------------------------------------------


class Successors(Drafter):
    """A tree of fixed guesses after the last token: the same whatever rows are decoded beside it."""

    name, summary, budget = "successors", "test", 12

    def propose(self, state: DecodeState) -> list[Proposal | None]:
        shape = Topology([-1, 0, 0, 0, 1, 1, 2, 4, 7])
        roots = [int(row.tokens[-1]) for row in state.rows]
        return [Proposal(DraftTree(shape, np.array([x, *((x * k) % 64 for k in range(3, 11))]))) for x in roots]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def trained(model) -> Callable[[str], Drafter]:
    """Drafters by name, those that need a model or heads included."""
    head, small = random_head("medusa", Target(model)), tiny_llama(seed=1, num_hidden_layers=1)

    def make(name: str) -> Drafter:
        made = {
            "medusa": lambda: Medusa(head, size=12),
            "draft-model": lambda: DraftModel(small, branching=(3, 2)),
            "draft-model iid": lambda: DraftModel(small, branching=(3, 2), law="iid"),
            "successors": Successors,
        }
        return made[name]() if name in made else registry.drafter(name)

    return make


LOOKS_UP = ["prompt-lookup", "token-recycling", "hybrid"]
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 30}


@pytest.mark.parametrize("name", [*LOOKS_UP, "medusa", "draft-model", "successors"])
def test_greedy_ids_are_generates_own_for_every_drafter(model, trained, name: str):
    inputs = left_padded(prompts())
    settings = {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.2}
    want = new_tokens(model, inputs, **settings)
    assert new_tokens(Decoder(model, trained(name), "typical"), inputs, **settings) == want


@pytest.mark.parametrize("name", [*LOOKS_UP, "medusa", "successors"])
def test_with_threshold_1_a_seed_gives_standards_text(model, trained, name: str):
    """Drafts made without randomness leave one draw per token, so that the very tokens are the same."""
    inputs = left_padded(prompts())
    settings = {**SAMPLED, "top_p": 0.9, "repetition_penalty": 1.3, "eos_token_id": 11}
    texts = []
    for verifier in (Standard(), Typical(**ONE)):
        torch.manual_seed(4)
        texts.append(new_tokens(Decoder(model, trained(name), verifier), inputs, **settings))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [*LOOKS_UP, "medusa", "draft-model", "draft-model iid", "successors"])
def test_every_accepted_token_passes_the_threshold_after_its_own_text(model, trained, name: str):
    """The final text, read again by plain forwards."""
    rule = Typical(epsilon=0.03, delta=0.3)
    decoder = Decoder(model, trained(name), rule)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.95)])
    accepted = 0
    for seed in range(3):
        torch.manual_seed(seed)
        ids = decoder.generate(prompts()[0][None], **{**SAMPLED, "max_new_tokens": 60, "top_p": 0.95})
        with torch.no_grad():
            law = torch.softmax(warpers(ids, model(ids).logits[0].float()), -1)
        at = len(prompts()[0])
        for step in decoder.stats.steps:
            for i in range(at, at + sum(step.accepted)):
                assert law[i - 1, ids[0, i]] > rule.threshold(law[i - 1]) * (1 - 1e-3)
            accepted += sum(step.accepted)
            at += sum(step.emitted)
        assert at == ids.shape[1]
    assert accepted > 0


def test_rows_of_a_ragged_batch_are_those_of_each_alone(model):
    decoder = Decoder(model, Successors(), Typical(epsilon=0.02))
    settings = {**SAMPLED, "eos_token_id": 11}
    torch.manual_seed(8)
    together = new_tokens(decoder, left_padded(prompts()), **settings)
    for index, prompt in enumerate(prompts()):
        torch.manual_seed(8)
        for _ in range(index):  # the seeds of the rows before
            torch.randint(1 << 62, ())
        (alone,) = new_tokens(decoder, {"input_ids": prompt[None]}, **settings)
        assert together[index][: len(alone)] == alone
        assert not any(together[index][len(alone) :]), "padding"
        assert decoder.stats.mat > 1


def test_a_text_ends_at_an_end_token_inside_an_accepted_path(model):
    (text,) = new_tokens(model, {"input_ids": IDS}, do_sample=False, max_new_tokens=12)
    oracle = OracleDrafter([text], depth=8, decoys=2)
    settings = {"do_sample": True, "temperature": 1e-3, "top_k": 0, "max_new_tokens": 12, "eos_token_id": text[4]}
    decoder = Decoder(model, oracle, "typical")
    (got,) = new_tokens(decoder, {"input_ids": IDS}, **settings)
    assert got == text[: text.index(text[4]) + 1]
    assert decoder.stats.row_forwards == 1, "the whole text was one path"


def test_returned_scores_and_logits_are_those_of_the_text_and_not_of_other_branches(model):
    decoder = Decoder(model, Successors(), Typical(epsilon=0.01))
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = decoder.generate(IDS, **SAMPLED, **settings)
    assert decoder.stats.mat > 1
    with torch.no_grad():
        want = model(out.sequences).logits[0, IDS.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(out.scores), want / 0.8, rtol=1e-4, atol=1e-4)


def test_it_is_lossy_and_threshold_1_is_not():
    model, small = tiny_llama(vocab_size=32, seed=0), tiny_llama(vocab_size=32, seed=1)
    settings = {"temperature": 1.5, "top_k": 24}

    def p(**options: float) -> float:
        decoder = Decoder(model, DraftModel(small, branching=(3, 1)), Typical(**options))
        return p_value(decoder, model, torch.tensor([[5, 9, 2]]), 1500, **settings)

    assert p() < 1e-6
    assert p(**ONE) > 1e-4


# ---- what is said about it, and lossless=True ---------------------------------------------------------------------


def test_reports_say_that_it_is_lossy(model):
    decoder = Decoder(model, "prompt-lookup", "typical")
    decoder.generate(IDS, do_sample=False, max_new_tokens=4)
    assert not decoder.lossless
    assert not decoder.stats.lossless
    assert decoder.stats.summary()["lossless"] is False
    assert not DecoderArm("row", decoder).lossless
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)["verifiers"]
    assert {v["name"]: v["lossless"] for v in listed}["typical"] is False
    assert "lossy" in Typical.summary
    options = json.loads(CliRunner().invoke(app, ["list", "--options", "typical", "--json"]).stdout)["options"]
    assert [(o["name"], o["default"]) for o in options] == [("epsilon", "0.09"), ("delta", "0.3")]
    assert all(o["meaning"] for o in options)


@pytest.mark.parametrize(
    ("drafter", "verifier", "named"),
    [
        ("none", "typical", "verifier 'typical'"),
        (Trusting(k=2), "standard", "drafter 'trusting'"),
        (Trusting(k=2), "typical", "drafter 'trusting' and verifier 'typical'"),
    ],
)
def test_a_request_for_lossless_text_is_refused_before_any_work(model, drafter, verifier: str, named: str):
    decoder = Decoder(model, drafter, verifier)
    streamer = SimpleNamespace()  # nothing may be put into it
    forwards = decoder.target.forwards
    with pytest.raises(UsageError, match=f"lossless=True: {named} may change the text"):
        decoder.generate(IDS, lossless=True, max_new_tokens=4, streamer=streamer)
    with pytest.raises(UsageError, match=f"lossless=True: {named} may change the text"):
        model.generate(IDS, custom_generate=decoder, lossless=True, max_new_tokens=4)
    assert decoder.target.forwards == forwards
    assert decoder.stats is None
    assert decoder.generate(IDS, lossless=False, do_sample=False, max_new_tokens=4).shape == (1, 8)


def test_a_request_for_lossless_text_changes_nothing_where_it_can_be_had(model):
    decoder = Decoder(model, "prompt-lookup")
    want = model.generate(IDS, do_sample=False, max_new_tokens=12)
    assert torch.equal(decoder.generate(IDS, lossless=True, do_sample=False, max_new_tokens=12), want)
    recipe = model.generate(IDS, custom_generate=decoder, lossless=True, do_sample=False, max_new_tokens=12)
    assert torch.equal(recipe, want)
