"""BiLD: both policies against a plain reading of the algorithm, their limits, and what is lossless and what is not."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from families import noisy_copy
from hypothesis import given
from hypothesis import strategies as st
from test_rsd import FAMILIES, IDS, SETTINGS, completed, ragged
from tiny_models import tiny_llama, tiny_mistral
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters.bild import BiLD
from specdec.errors import CompatibilityError, UsageError
from specdec.sampling import Sampler
from specdec.state import DecodeState, Row
from specdec.target import StepOutput
from specdec.tree import DraftTree, Proposal, Topology
from specdec.verifiers.rollback import Rollback


def noisy(model, noise: float = 0.2):
    """A small model that often agrees with ``model``."""
    with torch.no_grad():
        return noisy_copy(model, noise)


def written_out(
    model, draft, prompt: torch.Tensor, fallback: float, threshold: float, new: int, eos: int = -1, length: int = 5
) -> tuple[list[int], Counter]:
    """The algorithm of the paper by whole forwards, greedy, and how often each rule applied."""
    text, start, events = prompt.tolist(), len(prompt), Counter()
    with torch.no_grad():
        while len(text) - start < new and eos not in text[start:]:
            pending: list[int] = []
            while len(text) > start and len(pending) < min(length, start + new - len(text) - 1):
                p = draft(torch.tensor([text + pending])).logits[0, -1].softmax(-1)
                if p.max() < fallback:
                    events["fallback"] += 1
                    break
                pending.append(int(p.argmax()))
                if pending[-1] == eos:
                    break
            rows = model(torch.tensor([text + pending])).logits[0, len(text) - 1 :].log_softmax(-1)
            kept = 0
            for y, row in zip(pending, rows, strict=False):
                if -row[y] > threshold and y != row.argmax():
                    events["rollback"] += 1
                    break
                kept += 1
                events["tolerated"] += bool(y != row.argmax())
            for token in [*pending[:kept], int(rows[kept].argmax())]:
                if eos not in text[start:]:
                    text.append(token)
    return text[start:], events


# ---- the whole method -----------------------------------------------------------------------------------------------


@FAMILIES
def test_greedy_text_is_that_of_the_algorithm_written_out(make):
    model = make()
    draft = noisy(model)
    events: Counter = Counter()
    for fallback, threshold in ((0.2, 2.0), (0.4, 0.5), (0.0, 3.0)):
        decoder = Decoder(model, BiLD(draft, fallback, length=5), Rollback(threshold))
        want = []
        for prompt in ragged():
            text, happened = written_out(model, draft, prompt, fallback, threshold, 24)
            want.append(text)
            events += happened
            assert new_tokens(decoder, {"input_ids": prompt[None]}, do_sample=False, max_new_tokens=24) == [text]
        assert new_tokens(decoder, left_padded(ragged()), do_sample=False, max_new_tokens=24) == want
    assert min(events[rule] for rule in ("fallback", "rollback", "tolerated")) > 3, events


def test_a_small_models_end_token_is_judged_and_ends_the_chain():
    model = tiny_llama()
    draft = noisy(model)
    decoder = Decoder(model, BiLD(draft, 0.0, length=5), Rollback(2.0))
    lengths = set()
    for eos in range(3, 40, 6):
        text, _ = written_out(model, draft, ragged()[0], 0.0, 2.0, 30, eos)
        settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": eos}
        assert new_tokens(decoder, {"input_ids": ragged()[0][None]}, **settings) == [text]
        lengths.add(len(text))
    assert len(lengths) > 2


@FAMILIES
def test_at_the_limit_of_either_knob_greedy_ids_are_generates_own(make):
    model = make()
    draft = noisy(model)
    for fallback, verifier in ((0.0, Rollback(0.0)), (1.1, Rollback(math.inf)), (0.3, "standard")):
        decoder = Decoder(model, BiLD(draft, fallback, length=5), verifier)
        for inputs in ({"input_ids": ragged()[0][None]}, left_padded(ragged())):
            settings = {"do_sample": False, "max_new_tokens": 40}
            want = new_tokens(model, inputs, **settings)
            assert new_tokens(decoder, inputs, **settings) == want
            settings["eos_token_id"] = want[0][20]
            assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)
        drafted = sum(sum(step.accepted) for step in decoder.stats.steps)
        assert drafted > 0 or fallback > 1


def test_with_full_trust_the_target_writes_the_first_token_and_every_sixth():
    model, draft = tiny_llama(), tiny_llama(seed=1)
    decoder = Decoder(model, BiLD(draft, 0.0, length=5), Rollback(math.inf))
    decoder.generate(IDS, do_sample=False, max_new_tokens=1 + 6 * 4)
    assert [step.accepted for step in decoder.stats.steps] == [[0], [5], [5], [5], [5]]


def test_equal_models_never_roll_back():
    model = tiny_llama()
    for do_sample in (False, True):
        decoder = Decoder(model, BiLD(model, 0.0), Rollback(20.0))
        decoder.generate(IDS, do_sample=do_sample, max_new_tokens=1 + 11 * 3)
        assert [step.emitted for step in decoder.stats.steps] == [[1], [11], [11], [11]]


def test_both_caches_are_the_text_so_far_after_every_rollback():
    model = tiny_mistral()
    draft = noisy(model)
    decoder = Decoder(model, BiLD(draft, 0.2, length=5), Rollback(1.0))
    rollbacks, right = 0, []

    def same(owner, row) -> bool:
        b = owner.row_ids.index(row.index)
        cache = owner.caches[0]
        n = cache.lengths[b]
        fresh = owner.model(torch.from_numpy(row.tokens[:n].copy())[None], use_cache=True).past_key_values.layers[1]
        # a sliding layer of transformers holds only its window
        window = fresh.keys.shape[2]
        return all(
            torch.allclose(mine[b : b + 1, :, n - window : n], theirs, atol=1e-4)
            for mine, theirs in zip(cache.layers[1].buffers(), (fresh.keys, fresh.values), strict=True)
        )

    def observe(state, proposals, output, verdicts):
        nonlocal rollbacks
        for row, proposal, verdict in zip(state.rows, proposals, verdicts, strict=True):
            if len(verdict.path) < len(proposal.tree) - 1 and not row.done:
                rollbacks += 1
                assert len(verdict.kept) == len(verdict.emitted) + output.pending[state.rows.index(row)]
                right.append(same(decoder.target, row) and same(decoder.drafter.draft, row))

    decoder.drafter.observe = observe
    decoder.generate(**left_padded(ragged()), do_sample=False, max_new_tokens=30)
    assert rollbacks > 5
    assert all(right)


# ---- rollback -------------------------------------------------------------------------------------------------------

ROWS = [[0.6, 0.3, 0.08, 0.02], [0.1, 0.2, 0.3, 0.4], [0.05, 0.9, 0.04, 0.01], [0.25, 0.35, 0.2, 0.2]]


def decide(
    drafted: list[int],
    threshold: float,
    rows: list[list[float]] = ROWS,
    eos: tuple = (),
    processors: tuple = (),
    parents: tuple | None = None,
) -> tuple[list[int], int]:
    """(kept tokens, the target's token) for tokens drafted below a root; ``rows``: the target's law after each node."""
    tree = DraftTree(Topology(parents or range(-1, len(drafted))), np.array([0, *drafted]))
    row = Row(0, torch.tensor([1, 0]), 0, 20, Scripted([]), Sampler(LogitsProcessorList(processors)))
    state = DecodeState([row], SimpleNamespace(context=None), 64, frozenset(eos))
    logits = torch.tensor(rows[: len(tree)]).log()[None]
    output = StepOutput(logits, {}, [0], [0], [len(tree)], [0], [0])
    (verdict,) = Rollback(threshold).verify(state, [Proposal(tree)], output)
    return [int(tree.tokens[v]) for v in verdict.path], verdict.token


def test_rollback_decisions_worked_by_hand():
    # distances of 1, 2, 0: -log 0.3 = 1.20, -log 0.3 = 1.20, -log 0.05 = 3.00
    assert decide([1, 2, 0], 2.0) == ([1, 2], 1), "rolled back at the third"
    assert decide([1, 2, 0], 3.1) == ([1, 2, 0], 1), "all kept, one more by the target"
    assert decide([1, 2, 0], 1.0) == ([], 0), "the earliest violation counts"
    assert decide([2, 3, 1], 2.0) == ([], 0), "what follows a violation is dropped, however likely"
    assert decide([0, 3, 1], 0.0) == ([0, 3, 1], 1), "the target's own choices need no tolerance"
    assert decide([1, 3, 0], 1.21) == ([1, 3], 1), "-log 0.3 = 1.204 is kept, and nats are meant"
    assert decide([1, 3, 0], 1.20) == ([], 0)
    assert decide([], 5.0) == ([], 0), "nothing pending"


def test_an_unlikely_argmax_is_not_rolled_back_and_the_next_token_is_still_judged():
    flat = [[0.28, 0.24, 0.24, 0.24], [0.97, 0.01, 0.01, 0.01], *ROWS[2:]]
    assert decide([0, 1, 1], 1.0, flat) == ([0], 0)


def test_an_end_token_is_judged_and_nothing_follows_it():
    assert decide([1, 2, 1], 2.0, eos=(1,)) == ([], 1)
    assert decide([2, 1, 1], 2.0, eos=(2,)) == ([], 0), "an unlikely end token is not believed"


def test_a_forbidden_token_is_not_kept_and_the_replacement_is_processed():
    forbidden = (SuppressTokensLogitsProcessor([0, 3]),)
    assert decide([0, 1], math.inf, processors=forbidden) == ([], 1)
    assert decide([2, 3, 2], math.inf, processors=forbidden) == ([2], 2)
    model = tiny_llama()
    decoder = Decoder(model, BiLD(noisy(model), 0.0), Rollback(math.inf))
    common = new_tokens(decoder, {"input_ids": IDS}, do_sample=False, max_new_tokens=30)[0]
    (text,) = new_tokens(decoder, {"input_ids": IDS}, do_sample=False, max_new_tokens=30, suppress_tokens=common)
    assert not set(text) & set(common)


def test_of_several_children_the_targets_choice_goes_first_then_the_likeliest():
    siblings = (-1, 0, 0, 0)
    assert decide([2, 1, 0], 5.0, parents=siblings) == ([0], 1)
    assert decide([3, 2, 1], 5.0, parents=siblings) == ([1], 1)
    assert decide([3, 2, 2], 2.6, parents=siblings) == ([2], 1)
    assert decide([3, 2, 2], 2.4, parents=siblings) == ([], 0)


@given(st.integers(0, 10**6), st.floats(0, 8), st.floats(0, 8))
def test_a_higher_threshold_never_keeps_less_of_the_same_draft(seed: int, a: float, b: float):
    g = np.random.default_rng(seed)
    rows = g.dirichlet([0.3] * 4, size=4).clip(1e-9).tolist()
    drafted = g.integers(0, 4, 3).tolist()
    assert len(decide(drafted, min(a, b), rows)[0]) <= len(decide(drafted, max(a, b), rows)[0])


def test_scores_are_recorded_once_per_token():
    model = tiny_llama()
    decoder = Decoder(model, BiLD(noisy(model), 0.0), Rollback(2.0))
    out = decoder.generate(IDS, do_sample=False, max_new_tokens=20, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 20


# ---- sampling -------------------------------------------------------------------------------------------------------


def sampled_law(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, new: int = 3) -> dict[tuple[int, ...], float]:
    """Law of three tokens of ``new``, every random outcome enumerated; drafts begin after the first."""

    def generate(random: Scripted) -> tuple[int, ...]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(IDS, max_new_tokens=new, do_sample=True, **SETTINGS)[0, 3:6].tolist())

    return law(generate)


@pytest.fixture(scope="module")
def small():
    model = tiny_llama(vocab_size=4, seed=0)
    return model, noisy(model, 0.6), completed(model, {(): 1.0}, 3, None)


@pytest.mark.parametrize(
    ("fallback", "verifier", "new"),
    [(0.0, "standard", 3), (0.6, "standard", 4), (0.0, Rollback(0.0), 3), (1.1, Rollback(math.inf), 4)],
)
def test_the_law_is_exact_with_a_lossless_verifier_and_at_the_limit_of_either_knob(
    small, fallback: float, verifier, new: int, monkeypatch: pytest.MonkeyPatch
):
    model, draft, exact = small
    decoder = Decoder(model, BiLD(draft, fallback), verifier)
    assert total_variation(sampled_law(decoder, monkeypatch, new), exact) < 1e-6


def test_rollback_with_tolerance_has_another_law_and_says_so(small, monkeypatch: pytest.MonkeyPatch):
    model, draft, exact = small
    decoder = Decoder(model, BiLD(draft, 0.0), Rollback(3.0))
    assert total_variation(sampled_law(decoder, monkeypatch), exact) > 0.01
    assert not Rollback.lossless
    assert not decoder.lossless
    assert not decoder.stats.lossless
    assert "lossy" in Rollback.summary
    assert "lossy" in BiLD.summary
    with pytest.raises(UsageError, match="'rollback' may change the text"):
        decoder.generate(IDS, lossless=True)
    assert Decoder(model, BiLD(draft)).lossless


def test_a_fallback_that_looks_at_the_token_is_detected(small, monkeypatch: pytest.MonkeyPatch):
    model, draft, exact = small
    decoder = Decoder(model, BiLD(draft, 0.0))
    grow = decoder.drafter.grow

    def weakest_dropped(state, logits, deepest):
        return [
            tree.cut(0) if len(tree) > 1 and tree.q[0, tree.tokens[1]] < 0.6 else tree
            for tree in grow(state, logits, deepest)
        ]

    decoder.drafter.grow = weakest_dropped
    assert total_variation(sampled_law(decoder, monkeypatch), exact) > 1e-3


# ---- fallback -------------------------------------------------------------------------------------------------------


def test_chains_end_where_the_plain_law_is_flat_and_are_drawn_from_the_requests():
    """At temperature 0.1 every law is peaked; confidence is measured without it, and the record of q is with it."""
    model = tiny_llama()
    draft = noisy(model)
    decoder = Decoder(model, BiLD(draft, 0.2, length=5))
    drafted = []
    propose = decoder.drafter.propose

    def recording(state):
        made = propose(state)
        drafted.append((state.rows[0].tokens.tolist(), made[0].tree))
        return made

    decoder.drafter.propose = recording
    decoder.generate(IDS, do_sample=True, temperature=0.1, top_k=0, max_new_tokens=60)
    assert len(drafted[0][1]) == 1, "the first token is the target's"
    lengths = Counter()
    for text, tree in drafted[1:-5]:
        chain = tree.tokens[1:].tolist()
        with torch.no_grad():
            logits = draft(torch.tensor([text + chain])).logits[0, len(text) - 1 :]
        p = logits.softmax(-1).amax(-1)
        assert (p[: len(chain)] >= 0.2).all()
        assert len(chain) == 5 or p[len(chain)] < 0.2
        for v in range(1, len(tree)):
            want = (logits[v - 1] / 0.1).softmax(-1)
            torch.testing.assert_close(tree.q[tree.q_row[v]], want, atol=1e-3, rtol=1e-3)
        lengths[len(chain)] += 1
    assert len(lengths) > 2


def test_drafting_stops_when_every_row_is_unsure():
    model = tiny_llama()
    decoder = Decoder(model, BiLD(tiny_llama(seed=1), 1.1), Rollback())
    decoder.generate(**left_padded(ragged()), do_sample=False, max_new_tokens=20)
    assert decoder.stats.draft_forwards <= len(decoder.stats.steps), "only to keep its cache in step"


def test_any_drafter_works_with_rollback():
    model = tiny_llama()
    inputs = left_padded(ragged())
    want = new_tokens(model, inputs, do_sample=False, max_new_tokens=30)
    decoder = Decoder(model, OracleDrafter(want, wrong=0.3, decoys=1), Rollback(0.0))
    assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=30) == want
    assert decoder.stats.mat > 1.5


def test_thresholds_out_of_range_and_other_vocabularies_are_refused():
    draft = tiny_llama(seed=1)
    for wrong in (-0.1, math.nan):
        with pytest.raises(UsageError, match=f"fallback={wrong}"):
            BiLD(draft, fallback=wrong)
        with pytest.raises(UsageError, match=f"threshold={wrong}"):
            Rollback(wrong)
    with pytest.raises(UsageError, match="length=0"):
        BiLD(draft, length=0)
    with pytest.raises(CompatibilityError, match="its vocabulary has 64 tokens, the target's 32"):
        Decoder(tiny_llama(vocab_size=32), BiLD(draft))
