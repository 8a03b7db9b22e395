"""S2D: nested sub-models against truncated ones, catch-up and rollback, what is lossless, one draft for all targets."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import left_padded, new_tokens
from families import noisy_copy
from test_law import exact_pairs
from test_rsd import IDS, SETTINGS, ragged
from tiny_models import _SHAPE, tiny_llama, tiny_mistral
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.s2d import S2D
from specdec.drafters.s2d.nested import Nested
from specdec.drafters.s2d.segments import Segments, Text
from specdec.errors import CompatibilityError, UsageError
from specdec.target import Target
from specdec.tree import DraftTree, Law, Proposal

D = (1, 2, 4)
MIXED = (0.25, 0.35, 0.0)


def qwen2(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **{**_SHAPE, **changes})).eval()


def qwen3(seed: int = 0, **changes):
    """The upper layers slide."""
    torch.manual_seed(seed)
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=64, head_dim=8, **window, **{**_SHAPE, **changes})).eval()


FAMILIES = {"llama": tiny_llama, "mistral": tiny_mistral, "qwen2": qwen2, "qwen3": qwen3}
families = pytest.mark.parametrize("family", FAMILIES)


@cache
def pair(family: str = "llama"):
    """A target, and a draft of four layers that often agrees with it."""
    target = FAMILIES[family](num_hidden_layers=4)
    with torch.no_grad():
        return target, noisy_copy(target, 0.1)


def truncated(model, n: int):
    """The first n layers of ``model`` as a model of its own."""
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n]
    config.num_hidden_layers = n
    small = type(model)(config).eval()
    missing, _ = small.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return small


def written_out(
    submodels, thresholds, tokens: list[int], length: int, full: bool, eos: int
) -> tuple[list[int], list[int]]:
    """A chain and where its tokens left, by whole forwards of truncated models."""
    chain, left = [], []
    with torch.no_grad():
        while len(chain) < length and eos not in chain:
            for s, model in enumerate(submodels):
                logits = model(torch.tensor([tokens + chain])).logits[0, -1]
                if s == len(submodels) - 1 or (not full and logits.softmax(-1).max() > thresholds[s]):
                    break
            chain.append(int(logits.argmax()))
            left.append(s)
            full = False
    return chain, left


# ---- drafting -------------------------------------------------------------------------------------------------------


@families
def test_chains_are_those_of_the_algorithm_written_out_with_truncated_models(family: str):
    target, draft = pair(family)
    submodels = [truncated(draft, n) for n in D]
    decoder = Decoder(target, S2D(draft, D, MIXED, length=4))
    propose, seen = decoder.drafter.propose, np.zeros(3, dtype=int)

    def checking(state):
        made = propose(state)
        for b, (row, proposal) in enumerate(zip(state.rows, made, strict=True)):
            length = min(4, state.depth_left(b))
            start = not len(row.new_tokens)
            chain, left = written_out(submodels, MIXED, row.tokens.tolist(), length, start, 7)
            assert proposal.tree.tokens.tolist() == [int(row.tokens[-1]), *chain]
            np.add.at(seen, left, 1)
        assert (decoder.drafter.exits == seen).all()
        return made

    decoder.drafter.propose = checking
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 7}
    decoder.generate(**left_padded(ragged()), **settings)
    assert (seen > 3).all(), "no mix of exits"
    accepted = sum(sum(step.accepted) for step in decoder.stats.steps)
    assert 0 < accepted < seen.sum(), "no rollback, or nothing but rollbacks"


@families
def test_after_any_mix_of_exits_and_rollbacks_logits_are_those_of_a_fresh_forward(family: str):
    _, draft = pair(family)
    submodels = [truncated(draft, n) for n in D]
    segments = Segments(Target(draft), Nested(D, (0.5, 0.5, 0.0)))
    text, dice = Text(segments), np.random.default_rng(3)
    tokens, behind = np.zeros(0, dtype=np.int64), 0
    with torch.inference_mode():
        for _ in range(60):
            kept = tokens[: dice.integers(max(0, len(tokens) - 3), len(tokens) + 1)]
            tokens = np.append(kept, dice.integers(3, 60, dice.integers(0 if len(kept) else 1, 5)))
            where = int(dice.choice(3, p=(0.6, 0.25, 0.15)))
            segments.nested = Nested(D, tuple(1.0 if s < where else 1e-9 for s in range(3)))
            logits, left = text.read(text.roll_back(tokens))
            assert left == where
            want = submodels[where](torch.from_numpy(tokens)[None]).logits[0, -1]
            torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
            behind = max(behind, text.pending[1].shape[1])
    assert behind > 8, "the deepest segment never fell far behind"


def test_a_forgotten_catch_up_is_noticed():
    _, draft = pair()
    text = Text(Segments(Target(draft), Nested(D, (1e-9, 0.5, 0.0))))
    with torch.inference_mode():
        text.read(np.arange(3, 9))
        text.pending[0] = text.pending[0][:, :-1]
        with pytest.raises(AssertionError):
            text.read(np.array([9]))


@pytest.mark.parametrize(("thresholds", "layers"), [((1.0, 1.0, 0.0), 4), ((0.0, 0.7, 0.0), 1), ((1.0, 0.0, 0.0), 2)])
def test_a_fixed_exit_is_plain_speculative_decoding_with_the_truncated_model(thresholds: tuple, layers: int):
    target, draft = pair()
    nested = Decoder(target, S2D(draft, D, thresholds, length=4))
    plain = Decoder(target, DraftModel(truncated(draft, layers), length=4, law="point"))
    for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7}):
        texts = []
        for decoder in (nested, plain):
            torch.manual_seed(4)
            text = new_tokens(decoder, left_padded(ragged()), max_new_tokens=16, **settings)
            texts.append((text, [step.accepted for step in decoder.stats.steps]))
        assert texts[0] == texts[1]
    drafter = nested.drafter
    assert drafter.exits[D.index(layers)] == drafter.exits.sum() > 0
    # deeper layers are never run: once a token, whatever the number of tokens read
    assert drafter.layers == layers * drafter.exits.sum() == layers * nested.stats.draft_forwards


def test_layers_are_counted_with_what_they_catch_up():
    target, draft = pair()
    drafter = S2D(draft, D, MIXED)
    Decoder(target, drafter).generate(IDS, do_sample=False, max_new_tokens=40)
    assert drafter.layers == (drafter.exits * D).sum()
    first = drafter.exits.copy()
    Decoder(target, drafter).generate(IDS, do_sample=False, max_new_tokens=10)
    assert 0 < drafter.exits.sum() < first.sum(), "counts are of one request"


# ---- lossless -------------------------------------------------------------------------------------------------------


@families
def test_greedy_text_is_generates_own(family: str):
    target, draft = pair(family)
    decoder = Decoder(target, S2D(draft, D, MIXED))
    for inputs in ({"input_ids": ragged()[0][None]}, left_padded(ragged())):
        settings = {"do_sample": False, "max_new_tokens": 24}
        want = new_tokens(target, inputs, **settings)
        assert new_tokens(decoder, inputs, **settings) == want
        settings["eos_token_id"] = want[0][12]
        assert new_tokens(decoder, inputs, **settings) == new_tokens(target, inputs, **settings)


def sampled_pairs(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> dict:
    def generate(random: Scripted) -> tuple[int, int]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(IDS, max_new_tokens=2, do_sample=True, **SETTINGS)[0, 3:].tolist())

    return law(generate)


@pytest.fixture(scope="module")
def small():
    """A target of four tokens, and a draft whose sub-models disagree with it and with each other."""
    target = tiny_llama(vocab_size=4, seed=0)
    return target, tiny_llama(vocab_size=4, seed=1, num_hidden_layers=4), exact_pairs(target, IDS, **SETTINGS)


@pytest.mark.parametrize("thresholds", [(0.55, 0.55, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("kind", ["point", "iid"])
def test_the_sampled_law_is_the_targets(small, kind: str, thresholds: tuple, monkeypatch: pytest.MonkeyPatch):
    target, draft, exact = small
    decoder = Decoder(target, S2D(draft, D, thresholds, law=kind))
    assert total_variation(sampled_pairs(decoder, monkeypatch), exact) < 1e-6
    # only the first of two tokens is drafted, so without its full depth the law has seen early exits too
    read = Text.read
    monkeypatch.setattr(Text, "read", lambda text, tokens, full=False: read(text, tokens))
    assert total_variation(sampled_pairs(decoder, monkeypatch), exact) < 1e-6


def test_likeliest_tokens_recorded_as_drawn_from_softmax_are_detected(small, monkeypatch: pytest.MonkeyPatch):
    """What the published code does above temperature 0."""
    target, draft, exact = small
    decoder = Decoder(target, S2D(draft, D, MIXED, length=1))
    propose = decoder.drafter.propose

    def softmax_as_q(state):
        (made,) = propose(state)
        if len(made.tree) == 1:
            return [made]
        with torch.no_grad():
            q = state.rows[0].sampler.warp(draft(torch.from_numpy(state.rows[0].tokens.copy())[None]).logits[0, -1:])
        record = np.array([Law.POINT, Law.IID], dtype=np.int8)
        tree = DraftTree(made.tree.topology, made.tree.tokens, record, np.zeros(2, dtype=np.int64), q)
        return [Proposal(tree)]

    decoder.drafter.propose = softmax_as_q
    assert total_variation(sampled_pairs(decoder, monkeypatch), exact) > 0.01


def test_a_drawn_token_is_recorded_with_the_law_of_the_sub_model_where_it_left():
    target, draft = pair()
    submodels = [truncated(draft, n) for n in D]
    decoder = Decoder(target, S2D(draft, D, MIXED, law="iid"))
    propose, left = decoder.drafter.propose, set()

    def checking(state):
        made = propose(state)
        text, tree = state.rows[0].tokens.tolist(), made[0].tree
        for v in range(1, len(tree)):
            ids = torch.tensor([text + tree.tokens[1:v].tolist()])
            logits = [m(ids).logits[0, -1] for m in submodels]
            sure = [float(z.softmax(-1).max()) > t for z, t in zip(logits, (*MIXED[:2], -1), strict=True)]
            s = 2 if len(text) == 3 and v == 1 else sure.index(True)
            want = (logits[s] / 0.3).softmax(-1)
            torch.testing.assert_close(tree.q[tree.q_row[v]], want, atol=1e-3, rtol=1e-3)
            left.add(s)
        return made

    decoder.drafter.propose = checking
    decoder.generate(IDS, do_sample=True, temperature=0.3, top_k=0, max_new_tokens=40)
    assert left == {0, 1, 2}


# ---- one draft, many targets ----------------------------------------------------------------------------------------


class Interrupting:
    """A streamer that lets another decoder work in the middle of a request."""

    def __init__(self, other):
        self.other, self.texts = other, []

    def put(self, value) -> None:
        if len(self.texts) < 3:
            self.texts.append(self.other())

    def end(self) -> None:
        pass


def test_two_targets_of_different_sizes_share_one_draft_model_interleaved():
    small, draft = pair()
    large = tiny_llama(seed=5, num_hidden_layers=6, hidden_size=64, intermediate_size=80)
    a, b = Decoder(small, S2D(draft, D, MIXED)), Decoder(large, S2D(draft, D, (0.5, 0.5, 0.0)))
    settings = {"do_sample": False, "max_new_tokens": 16}
    prompts = [{"input_ids": p[None]} for p in ragged()[:2]]
    want = [(new_tokens(small, p, **settings), new_tokens(large, p, **settings)) for p in prompts]
    for p, (first, second) in zip(prompts, want, strict=True):
        assert new_tokens(a, p, **settings) == first
        assert new_tokens(b, p, **settings) == second
    streamer = Interrupting(lambda: new_tokens(b, prompts[1], **settings))
    assert new_tokens(a, prompts[0], streamer=streamer, **settings) == want[0][0]
    assert streamer.texts == [want[1][1]] * 3
    assert len(draft.model.layers) == draft.config.num_hidden_layers == 4, "the draft model was changed"


def test_one_drafter_bound_to_another_target_serves_that_one():
    small, draft = pair()
    drafter = S2D(draft, D, MIXED, same_tokenizer=True)
    for target in (small, tiny_llama(vocab_size=60, seed=6), small):
        decoder = Decoder(target, drafter)
        decoder.generate(IDS, do_sample=True, max_new_tokens=20)
        want = target.generate(IDS, do_sample=False, max_new_tokens=20)
        assert torch.equal(decoder.generate(IDS, do_sample=False, max_new_tokens=20), want)


# ---- files and errors -----------------------------------------------------------------------------------------------


def test_sub_models_beside_the_checkpoint_are_used_unless_others_are_given(tmp_path):
    target, draft = pair()
    draft.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"submodels: no s2d.json .* `specdec train s2d`"):
        Decoder(target, "s2d", draft=tmp_path)
    Nested(D, MIXED).save(tmp_path)
    loaded = type(draft).from_pretrained(tmp_path).eval()
    for source in (tmp_path, str(tmp_path), loaded):
        decoder = Decoder(target, "s2d", draft=source)
        decoder.generate(IDS, do_sample=False, max_new_tokens=20)
        assert (decoder.drafter.exits > 0).all()
    decoder = Decoder(target, "s2d", draft=tmp_path, thresholds=(0, 0, 0))
    decoder.generate(IDS, do_sample=False, max_new_tokens=20)
    assert decoder.drafter.exits.tolist()[1:] == [0, 0]
    decoder = Decoder(target, "s2d", draft=tmp_path, submodels=[3, 4])
    decoder.generate(IDS, do_sample=False, max_new_tokens=20)
    assert len(decoder.drafter.exits) == 2
    (tmp_path / "s2d.json").write_text('{"submodels": 3}')
    with pytest.raises(UsageError, match=r"s2d.json: not "):
        Decoder(target, "s2d", draft=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"submodels": (2, 2, 4)}, r"submodels=\(2, 2, 4\) must be numbers of layers that rise"),
        ({"submodels": (0, 4)}, "rise from at least 1"),
        ({"submodels": ()}, "must be numbers of layers"),
        ({"submodels": (1, 2)}, r"submodels=\(1, 2\): the last one must be the whole model, which has 4 layers"),
        ({"submodels": (2, 8)}, "which has 4 layers"),
        ({"submodels": D, "thresholds": (0.5, 0)}, r"2 for the 3 sub-models \(1, 2, 4\); give one for each"),
        ({"submodels": D, "thresholds": (1.5, 0.5, 0)}, "must be probabilities"),
        ({"submodels": D, "law": "wor"}, "law='wor' must be 'point' or 'iid'"),
        ({"submodels": D, "length": 0}, "length=0 must be at least 1"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict, message: str):
    target, draft = pair()
    with pytest.raises(UsageError, match=message):
        Decoder(target, "s2d", draft=draft, **options)


def test_another_vocabulary_is_refused():
    with pytest.raises(CompatibilityError, match="draft: its vocabulary has 32 tokens, the target's 64"):
        Decoder(pair()[0], S2D(tiny_llama(vocab_size=32), (1, 2)))


def test_a_model_that_cannot_be_cut_is_refused_before_decoding():
    """GPT-2 adds positions to whatever enters its first layer."""
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 64, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=None, **shape)).eval()
    with pytest.raises(CompatibilityError, match=r"GPT2LMHeadModel cannot be run in nested sub-models: .*off by"):
        Decoder(model, S2D(model, D, MIXED))


def test_no_options_are_read_before_the_draft_is():
    """Commands check options first, with a draft model that is not there yet."""
    S2D("")
    with pytest.raises(UsageError, match="must be numbers of layers"):
        S2D("", submodels=(4, 2))
