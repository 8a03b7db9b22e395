"""Lexical units: which they are, what placeholders see, that the text is the trained model's, and what trust risks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens
from test_law import exact_pairs
from test_training_free import prompts
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM

from specdec import Decoder, registry
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters.lexical_units import LexicalUnits, Units, load_merged
from specdec.drafters.lexical_units.drafter import groups, repeats
from specdec.drafters.lexical_units.learner import UnitLearner, read
from specdec.drafters.lexical_units.units import find_units, forbid, pack
from specdec.errors import CompatibilityError, UsageError
from specdec.target import Target
from specdec.training.lexical_units import stack

MAKES = [tiny_llama, tiny_gemma2, tiny_mistral]
UNITS = Units(placeholder_id=2, K=4, alpha=0.9, beta=0.3)
LOSSLESS = {
    "chain": {"K": 4, "size": 4, "anchors": 4},
    "tree": {"K": 4, "size": 9, "anchors": 9},
    "one anchor": {"K": 4, "size": 4, "anchors": 1},
    "cpu": {},
}


def made(make=tiny_llama, **changes):
    """A random model whose placeholder is banned, as in a trained one."""
    model = make(**changes)
    forbid(model, UNITS.placeholder_id)
    return model


# ---- units and packed texts ----------------------------------------------------------------------------------------


def spans(c, K=4, alone=(), learned=None) -> list[list[int]]:
    n = len(c)
    mask = np.ones(n, dtype=bool) if learned is None else np.array(learned, dtype=bool)
    mask[0] = False
    return find_units(np.array(c), mask, np.isin(np.arange(n), alone), 0.9, K).tolist()


def test_a_unit_is_any_token_followed_by_sure_ones():
    assert spans([0, 0.1, 0.95, 0.9, 0.2, 0.3, 0.99]) == [[1, 4], [4, 5], [5, 7]]


def test_a_unit_has_at_most_k_tokens():
    sure = [0] + [0.99] * 7
    assert spans(sure, K=3) == [[1, 4], [4, 7], [7, 8]]
    assert spans(sure, K=7) == [[1, 8]]


def test_special_tokens_stand_alone():
    assert spans([0, 0.1, 0.99, 0.99, 0.99, 0.99], alone=[3]) == [[1, 3], [3, 4], [4, 6]]


def test_units_lie_within_what_is_learned():
    learned = [0, 1, 1, 0, 0, 1, 1]
    assert spans([0.99] * 7, learned=learned) == [[1, 3], [5, 7]]
    assert spans([0.99] * 3, learned=[0, 0, 0]) == []


def packed_text(n: int = 9, K: int = 4):
    ids = np.random.default_rng(0).integers(3, 60, n)
    learned = np.arange(n) >= 2
    return ids, learned, pack(ids, learned, np.array([[2, 4], [4, 5], [6, 9]]), K, 2)


def test_labels_and_positions_of_placeholders_are_those_met_in_decoding():
    ids, _, packed = packed_text()
    assert packed.labels[:9].tolist() == [-100, *ids[2:], -100], "the token before a unit predicts its first"
    assert packed.ids[9:].tolist() == [2] * 8
    assert packed.ahead[9:].tolist() == [1, 2, 3, 1, 2, 3, 1, 2], "as far as there is text"
    assert packed.positions[9:].tolist() == [2, 3, 4, 4, 5, 6, 6, 7], "right behind the token before the unit"
    assert packed.labels[9:].tolist() == ids[[3, 4, 5, 5, 6, 7, 7, 8]].tolist()
    assert packed.weight[9:].tolist() == pytest.approx([1, 0.1, 0.1, 0.1, 0.1, 0.1, 1, 1])


def test_placeholders_stop_where_learned_text_stops():
    ids = np.arange(3, 12)
    learned = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    packed = pack(ids, learned, np.array([[2, 4], [6, 9]]), 4, 2)
    assert packed.labels[9:].tolist() == ids[[3, 7, 8]].tolist()


@pytest.mark.parametrize("make", MAKES)
def test_a_packed_forward_equals_one_forward_per_unit(make):
    target = Target(make())
    ids, learned, _ = packed_text(14)
    units = np.array([[2, 5], [5, 6], [9, 12]])
    packed = pack(ids, learned, units, 3, 2)
    batch = stack([packed, pack(ids[:6], learned[:6], units[:1], 3, 2)])
    with torch.no_grad():
        hidden = read(target, batch["input_ids"], batch["positions"], batch["visible"])
        logits = target.logits(hidden)
        text = target.model(torch.from_numpy(ids)[None]).logits[0].float()
        for u, start in enumerate(units[:, 0]):
            alone = target.model(torch.tensor([[*ids[:start], 2, 2]])).logits[0, -2:].float()
            mine = logits[0, 14 + 2 * u : 16 + 2 * u]
            torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0, :14], text, rtol=1e-4, atol=1e-4, msg="the text does not see placeholders")
    torch.testing.assert_close(logits[1, :6], text[:6], rtol=1e-4, atol=1e-4, msg="nor padding")


# ---- the text of the trained model, lossless -----------------------------------------------------------------------


@pytest.mark.parametrize("options", LOSSLESS.values(), ids=LOSSLESS)
@pytest.mark.parametrize("make", MAKES)
def test_greedy_ids_are_generates_own(make, options):
    model = made(make)
    decoder = Decoder(model, LexicalUnits(UNITS, **options))
    for inputs in ({"input_ids": prompts()[0][None]}, left_padded(prompts())):
        want = new_tokens(model, inputs, do_sample=False, max_new_tokens=30)
        assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=30) == want
    settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": want[0][15]}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)
    chunked = Decoder(model, LexicalUnits(UNITS, **options), prefill_chunk=3)
    assert new_tokens(chunked, inputs, do_sample=False, max_new_tokens=30) == want


@pytest.mark.parametrize("mode", ["lossless", "trusting"])
@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_request_of_a_few_tokens_at_the_end_of_the_context(new, mode):
    model = made(max_position_embeddings=16)
    decoder = Decoder(model, LexicalUnits(UNITS, mode))
    inputs = {"input_ids": prompts((13,))[0][None]}
    got = new_tokens(decoder, inputs, do_sample=False, max_new_tokens=new)
    assert len(got[0]) == new
    if mode == "lossless":
        assert got == new_tokens(model, inputs, do_sample=False, max_new_tokens=new)


def test_the_law_of_the_whole_loop_is_exact(monkeypatch):
    model = tiny_llama(vocab_size=4)
    decoder = Decoder(model, LexicalUnits(Units(0, 3, 0.9, 0.9), K=3, size=5, anchors=5))
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    settings = {"temperature": 0.8, "top_k": 3}
    drafted = []
    verify = decoder.verifier.verify

    def counting(state, proposals, output):
        drafted.extend(len(p.tree) - 1 for p in proposals)
        return verify(state, proposals, output)

    def generate(random: Scripted) -> tuple[int, ...]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(ids, max_new_tokens=3, do_sample=True, **settings)[0, 8:10].tolist())

    monkeypatch.setattr(decoder.verifier, "verify", counting)
    assert total_variation(law(generate), exact_pairs(model, ids, **settings)) < 1e-6
    assert any(drafted)


def test_drafts_are_what_placeholders_behind_the_accepted_text_predict():
    """Exactly: the logits that decoding reads are those of a fresh forward over the committed ids."""
    model = made()
    drafter = LexicalUnits(UNITS, **LOSSLESS["tree"])
    decoder = Decoder(model, drafter)
    checked = []
    observe = drafter.observe

    def checking(state, *rest):
        observe(state, *rest)
        for row in state.rows:
            if row.index in drafter._trees:
                ids, chances = drafter._trees[row.index]
                k = len(ids)
                with torch.no_grad():
                    fresh = model(torch.tensor([[*row.tokens[:-1], *[2] * k]])).logits[0, -k:]
                fresh[:, 2] = -torch.inf
                best = fresh.softmax(-1).topk(ids.shape[1], dim=-1)
                checked.append(np.abs(best.values.numpy() - chances).max())
                assert (best.indices[:, 0].numpy() == ids[:, 0]).all()

    drafter.observe = checking
    decoder.generate(**left_padded(prompts()), max_new_tokens=20, do_sample=False)
    assert len(checked) > 40
    assert max(checked) < 1e-4


def test_groups_of_placeholders_see_their_own_path_only():
    layout = groups((0, 2), 3)
    assert layout.anchor.tolist() == [0, 0, 0, 2, 2, 2]
    assert layout.offset.tolist() == [1, 2, 3, 1, 2, 3]
    tri = np.tri(3, dtype=bool)
    assert (layout.see[:3, :3] == tri).all()
    assert (layout.see[3:, 3:] == tri).all()
    assert not layout.see[:3, 3:].any()
    assert not layout.see[3:, :3].any()


# ---- trusting ------------------------------------------------------------------------------------------------------


def test_trusting_is_lossy_and_says_so():
    drafter = LexicalUnits(UNITS, "trusting")
    assert not drafter.lossless
    assert LexicalUnits(UNITS).lossless
    assert "lossy" in LexicalUnits.summary
    with pytest.raises(UsageError, match="lossless=True"):
        Decoder(made(), drafter).generate(prompts()[0][None], max_new_tokens=2, lossless=True)


@pytest.mark.parametrize("make", MAKES)
def test_with_beta_above_one_it_is_greedy_decoding(make):
    model = made(make)
    decoder = Decoder(model, LexicalUnits(UNITS, "trusting", beta=1.01))
    inputs = left_padded(prompts())
    want = new_tokens(model, inputs, do_sample=False, max_new_tokens=30)
    assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=30) == want
    assert len(decoder.stats.steps) == 30


def by_hand(model, prompt: torch.Tensor, new: int, beta: float, guard: bool, eos: int | None = None) -> list[int]:
    """The paper's loop with a fresh forward each step: no cache, so none can be corrupted."""
    ids, m, first = prompt.tolist(), UNITS.K - 1, len(prompt)
    while len(ids) - first < new:
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *[UNITS.placeholder_id] * m]])).logits[0, -m - 1 :].float()
        logits[:, UNITS.placeholder_id] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        ids.append(int(best[0]))
        room = new - (len(ids) - first)  # the last token is always the model's own
        for c, y in zip(confidence[1:].tolist()[: max(room - 1, 0)], best[1:].tolist()):
            if ids[-1] == eos or c < beta or (guard and repeats([*ids, y])):
                break
            ids.append(y)
        if eos in ids[first:]:
            return ids[first : ids.index(eos, first) + 1]
    return ids[first:]


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("make", MAKES)
def test_trusting_is_the_papers_loop(make, guard):
    model = made(make)
    decoder = Decoder(model, LexicalUnits(UNITS, "trusting", beta=0.15, guard=guard))
    for prompt in prompts():
        want = by_hand(model, prompt, 30, 0.15, guard)
        got = new_tokens(decoder, {"input_ids": prompt[None]}, do_sample=False, max_new_tokens=30)
        assert got == [want]
        assert sum(step.trusted for step in decoder.stats.steps) > 3
        stop = want[12]
        settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": stop}
        assert new_tokens(decoder, {"input_ids": prompt[None]}, **settings) == [
            by_hand(model, prompt, 30, 0.15, guard, stop)
        ]
    together = new_tokens(decoder, left_padded(prompts()), do_sample=False, max_new_tokens=30)
    assert together == [by_hand(model, p, 30, 0.15, guard) for p in prompts()]


def test_the_cache_after_trusted_tokens_is_a_fresh_prefills():
    model = made()
    decoder = Decoder(model, LexicalUnits(UNITS, "trusting", beta=0.1))
    out = decoder.generate(prompts()[0][None], max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    assert sum(step.trusted for step in decoder.stats.steps) > 3
    fresh = model(out.sequences[:, :-1], use_cache=True).past_key_values
    for mine, theirs in zip(out.past_key_values.layers, fresh.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "repeating"),
    [
        ([5, 5], True),
        ([1, 5, 6, 5, 6], True),
        ([5, 6, 7, 5, 6, 7], True),
        ([5, 6, 7, 8, 5, 6, 7, 8], False),
        ([5, 6, 5], False),
        ([5], False),
        ([], False),
    ],
)
def test_the_guard_sees_one_two_or_three_tokens_said_again(tokens, repeating):
    assert repeats(tokens) is repeating


def test_what_the_request_forbids_is_not_trusted():
    model = made()
    inputs = {"input_ids": prompts()[0][None]}
    decoder = Decoder(model, LexicalUnits(UNITS, "trusting", beta=0.05, guard=False))
    free = new_tokens(decoder, inputs, do_sample=False, max_new_tokens=30)[0]
    banned = max(set(free), key=free.count)
    settings = {"do_sample": False, "max_new_tokens": 30, "bad_words_ids": [[banned]]}
    assert banned not in new_tokens(decoder, inputs, **settings)[0]
    assert sum(step.trusted for step in decoder.stats.steps) > 0
    with pytest.raises(UsageError, match="use mode='lossless'"):
        decoder.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)


def test_when_sampling_only_the_token_after_a_run_is_drawn():
    model = made()
    decoder = Decoder(model, LexicalUnits(UNITS, "trusting", beta=0.1))
    ids = prompts()[0][None]
    texts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        texts.add(tuple(decoder.generate(ids, max_new_tokens=20, do_sample=True)[0].tolist()))
        steps = decoder.stats.steps
        assert sum(s.trusted for s in steps) + sum(map(sum, (s.emitted for s in steps))) == 20
    assert len(texts) > 1


@pytest.mark.parametrize("mode", ["lossless", "trusting"])
@pytest.mark.parametrize("sample", [False, True])
def test_the_placeholder_is_never_emitted(mode, sample):
    """Even where the model would: its output matrix favours it here by far."""
    model = made(tie_word_embeddings=False)
    with torch.no_grad():
        hidden = model.model(prompts()[0][None]).last_hidden_state[0, -1]
        model.lm_head.weight[2] = 9 * hidden / hidden.norm()
    free = model.generate(prompts()[0][None], max_new_tokens=20, do_sample=False, suppress_tokens=None)
    assert 2 in free[0, len(prompts()[0]) :]
    options = {"beta": 0.1} if mode == "trusting" else LOSSLESS["tree"]
    decoder = Decoder(model, LexicalUnits(UNITS, mode, **options))
    got = new_tokens(decoder, left_padded(prompts()), do_sample=sample, max_new_tokens=30)
    assert all(2 not in row for row in got)


# ---- a toy language ------------------------------------------------------------------------------------------------


def sentences(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Every token names the next one: a cycle of 29 tokens, entered anywhere."""
    cycle = torch.randperm(29, generator=torch.Generator().manual_seed(9)) + 3
    start = torch.randint(0, 29, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return cycle[(start + torch.arange(length)) % 29]


@cache
def learned():
    """A model that speaks the language, the same trained to fill placeholders, its weights before, losses [step][K]."""
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=32, initializer_range=0.08, tie_word_embeddings=True).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        ids = sentences(16, 16, step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    base = tiny_llama(vocab_size=32, tie_word_embeddings=True)
    base.load_state_dict(model.state_dict())
    learner = UnitLearner(Target(model), placeholder=2, K=4, lora=(8, 8.0, 0.0), lam=1.0).train()
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-2, weight_decay=0.0)
    mask = np.arange(32) >= 1
    losses = []
    for step in range(120):
        starts = np.arange(1 + step % 4, 32, 4)
        units = np.stack([starts, np.minimum(starts + 4, 32)], axis=1)
        out = learner(**stack([pack(row, mask, units, 4, 2) for row in sentences(8, 32, 1000 + step).numpy()]))
        out.total.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(out.loss.tolist())
    return base, learner.merged(), before, losses


def test_only_adapters_and_the_placeholders_row_are_trained():
    _, model, before, losses = learned()
    assert (np.array(losses[-1]) < 0.3 * np.array(losses[0]) + 0.05).all()
    table = model.get_input_embeddings().weight.detach()
    old = before["model.embed_tokens.weight"]
    moved = (table != old).any(-1).nonzero()[:, 0].tolist()
    assert moved == [2]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("proj" in name or name == "model.embed_tokens.weight" for name in changed)
    assert len(changed) == 2 * 7 + 1


@pytest.mark.parametrize(
    "options", [{"mode": "trusting"}, {"K": 4, "size": 4, "anchors": 4}, {}], ids=["trusting", "lossless", "cpu"]
)
def test_a_trained_model_writes_the_same_text_in_fewer_forwards(options):
    base, model, _, _ = learned()
    forbid(model, 2)
    decoder = Decoder(model, LexicalUnits(Units(2, 4, 0.9, 0.9), **options))
    inputs = {"input_ids": sentences(1, 12, 3)}
    want = new_tokens(base, inputs, do_sample=False, max_new_tokens=32)
    assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=32) == want
    assert 32 / len(decoder.stats.steps) > 1.5, "tokens per forward"


def test_the_loss_is_that_of_a_loop_over_columns():
    learner = UnitLearner(Target(tiny_llama(tie_word_embeddings=True)), 2, K=4, lora=(2, 2.0, 0.0), lam=0.5)
    _, _, packed = packed_text()
    out = learner(**stack([packed]))
    logits = learner.target.model(
        torch.from_numpy(packed.ids)[None],
        position_ids=torch.from_numpy(packed.positions)[None],
        attention_mask=torch.zeros(1, 1, 17, 17).masked_fill_(~torch.from_numpy(packed.visible), -1e30),
    ).logits[0]
    nats = {0: [], 1: []}
    for c in range(17):
        if packed.labels[c] >= 0:
            own = -logits[c].log_softmax(-1)[packed.labels[c]]
            nats[int(packed.ahead[c] > 0)].append((own, float(packed.weight[c])))
    means = [sum(x * w for x, w in part) / sum(w for _, w in part) for part in nats.values()]
    assert out.total.item() == pytest.approx((means[0] + 0.5 * means[1]).item(), rel=1e-4)
    assert out.count.tolist() == [7, 3, 3, 2]


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "eager"}, "mode='eager' must be one of lossless, trusting"),
        ({"K": 1}, "K=1 must be at least 2"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({"anchors": 0}, "anchors=0 must be at least 1"),
        ({"beta": 0.9}, "beta=0.9 does nothing with mode='lossless'"),
        ({"mode": "trusting", "size": 4}, "size=4 does nothing with mode='trusting'"),
        ({"mode": "trusting", "beta": 0.0}, "beta=0.0 must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        registry.drafter("lexical-units", **options)


def test_a_model_that_was_not_trained_for_it_is_refused(tmp_path):
    with pytest.raises(CompatibilityError, match="needs a model trained by `specdec train lexical-units`"):
        Decoder(made(), "lexical-units")
    with pytest.raises(CompatibilityError, match=r"no readable lexical_units.json"):
        Decoder(made(), "lexical-units", units=tmp_path)
    (tmp_path / "lexical_units.json").write_text('{"placeholder_id": 1}')
    with pytest.raises(CompatibilityError, match=r"no readable lexical_units.json"):
        Decoder(made(), "lexical-units", units=tmp_path)
    Units(64, 4, 0.9, 0.9, base="mine").write(tmp_path)
    with pytest.raises(CompatibilityError, match=r"its placeholder is token 64, this model has 64; .* \(mine\)"):
        Decoder(made(), "lexical-units", units=tmp_path)
    with pytest.raises(UsageError, match="K=5: the model was trained for units of at most K=4"):
        Decoder(made(), LexicalUnits(UNITS, K=5))
    with pytest.raises(CompatibilityError, match=r"no readable lexical_units.json"):
        load_merged(tiny_llama(), tmp_path / "none")
    with pytest.raises(CompatibilityError, match=r"its adapter does not fit this model .* load mine"):
        load_merged(tiny_llama(), tmp_path)


def test_chain_tier_models_are_refused():
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None)
    with pytest.raises(CompatibilityError, match="placeholders need a model that can verify trees"):
        Decoder(BloomForCausalLM(config).eval(), LexicalUnits(UNITS))
