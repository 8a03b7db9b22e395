"""EAD: turns worked by hand on table-driven models, the algorithm written out, both caches, costs, limits, drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from conftest import left_padded, new_tokens, word_tokenizer
from families import noisy_copy
from test_rsd import FAMILIES, IDS, ragged
from tiny_models import tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec import Decoder
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.drafters.ead import EAD, calibrate, entropy
from specdec.errors import CompatibilityError, UsageError

SMALL, LARGE = 16, 40  # first of the eight ids that each table-driven model writes
PROMPT = torch.arange(3, 15)[None]  # 12 tokens, so that row 11 of a table is the first that writes


class Table(PreTrainedModel, GenerationMixin):
    """Logits by position: after the prompt, uniform over 2^k of the model's own tokens."""

    config_class = LlamaConfig

    def __init__(self, first: int, bits: Sequence[int], context: int = 256):
        shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "eos_token_id": None}
        super().__init__(LlamaConfig(vocab_size=64, max_position_embeddings=context, **shape))
        self.embedding = torch.nn.Embedding(64, 8)
        rows = torch.full((256, 64), -torch.inf)
        rows[:11] = torch.randn(11, 64, generator=torch.Generator().manual_seed(0))
        for position, k in enumerate(bits, start=11):
            rows[position, first : first + 2**k] = 0.0
        rows[11 + len(bits) :, first] = 0.0
        self.rows = rows
        self.eval()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=None, attention_mask=None, **_):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return CausalLMOutputWithPast(logits=self.rows[position_ids])


def trace(small: Sequence[int], large: Sequence[int], new: int, **options) -> str:
    """Who wrote each of ``new`` tokens: s or L; entropies in bits of either model at each of them."""
    decoder = Decoder(Table(LARGE, large), EAD(Table(SMALL, small), **options))
    (tokens,) = new_tokens(decoder, {"input_ids": PROMPT}, do_sample=True, max_new_tokens=new)
    writers = "".join("s" if SMALL <= token < SMALL + 8 else "L" for token in tokens)
    cost = decoder.drafter.cost
    assert (cost.small.written, cost.large.written) == (writers.count("s"), writers.count("L"))
    assert cost.switches == writers.count("sL") + writers.count("Ls")
    return writers


def written_out(
    large: PreTrainedModel,
    small: PreTrainedModel,
    prompt: torch.Tensor,
    new: int,
    tau: float = 0.5,
    window: int = 5,
    min_stay: int = 10,
    start: str = "large",
) -> tuple[list[int], str]:
    """The algorithm by whole forwards, greedy: new tokens and who wrote them."""
    text, entropies, writers, c = prompt.tolist(), [], "", min_stay
    active = "L" if start == "large" else "s"
    with torch.no_grad():
        while len(writers) < new:
            logits = (large if active == "L" else small)(torch.tensor([text])).logits[0, -1]
            entropies.append(torch.distributions.Categorical(logits=logits.double()).entropy().item() / math.log(2))
            text.append(int(logits.argmax()))
            writers, c = writers + active, c + 1
            recent = entropies[-window:]
            wanted = "L" if sum(recent) / len(recent) >= tau else "s"
            if c >= min_stay and wanted != active:
                active, c = wanted, 0
    return text[len(prompt) :], writers


def noisy(model: PreTrainedModel, noise: float = 0.3) -> PreTrainedModel:
    with torch.no_grad():
        return noisy_copy(model, noise)


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_traces_worked_by_hand():
    high, low = [3] * 40, [0] * 40
    # one token at once, then a mean of 3 keeps the target
    assert trace(low, high, 8, tau=1.0) == "LLLLLLLL"
    # the target is sure at once; its first token relieves it, as c starts at d_min
    assert trace(low, low, 8, tau=1.0) == "Lsssssss"
    assert trace(low, low, 8, tau=1.0, start="small") == "ssssssss"
    assert trace(low, low, 8, tau=1.0, min_stay=3, stay_at_start=True) == "LLLsssss"
    # the small model always unsure, the target never: stretches of d_min
    assert trace(high, low, 13, tau=1.0, window=2, min_stay=4) == "LssssLLLLssss"
    # window 4 means after 2 2 0 0 | 0: 2, 2, 4/3, 1 (equal: stays), 1/2
    assert trace(low, [2, 2, 0, 0, 0, 3, 3], 8, tau=1.0, window=4, min_stay=0) == "LLLLLsss"
    assert trace(low, [2, 2, 0, 0, 0, 3, 3], 8, tau=1.01, window=4, min_stay=0) == "LLLLssss"
    # a partial window is divided by what it holds: 1, (1 + 0) / 2, (1 + 0 + 0) / 3 < 0.4
    assert trace(low, [1, 0, 0, 0, 0], 6, tau=0.4, window=5, min_stay=0) == "LLLsss"
    # the mean after a switch mixes both models: (0 + 3) / 2, then (3 + 0) / 2, then the target's own 0
    assert trace([0, 3, 3, 3, 3, 3], low, 6, tau=1.0, window=2, min_stay=0) == "LsLLsL"
    # equality at tau sends the small model home as well
    assert trace([2, 2, 2], low, 4, tau=2.0, window=1, min_stay=0, start="small") == "sLsL"


@pytest.mark.parametrize("seed", range(6))
def test_random_entropies_give_the_trace_of_the_algorithm_and_no_stretch_is_too_short(seed: int):
    g = torch.Generator().manual_seed(seed)
    small, large = torch.randint(0, 4, (2, 60), generator=g).tolist()
    for window, min_stay in ((1, 0), (3, 2), (5, 4), (4, 10)):
        settings = dict(tau=1.5, window=window, min_stay=min_stay)
        active, c, entropies, want = "L", min_stay, [], ""
        for t in range(60):
            entropies.append((large if active == "L" else small)[t])
            want, c = want + active, c + 1
            wanted = "L" if sum(entropies[-window:]) >= 1.5 * min(window, t + 1) else "s"
            if c >= min_stay and wanted != active:
                active, c = wanted, 0
        got = trace(small, large, 60, **settings)
        assert got == want
        stretches = got.replace("sL", "s L").replace("Ls", "L s").split()
        assert len(stretches) > 2
        assert min(map(len, stretches[1:-1])) >= min_stay


def test_entropy_is_in_bits_exact_at_certainty_and_finite_in_half_precision():
    for k in range(7):
        logits = torch.full((64,), -torch.inf)
        logits[: 2**k] = 5.0
        assert entropy(logits) == k
    assert entropy(torch.tensor([0.0, -1000.0, -1000.0])) == 0
    many = torch.zeros(150_000, dtype=torch.bfloat16)
    torch.testing.assert_close(entropy(many), torch.tensor(150_000.0).log2(), rtol=1e-4, atol=0)
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.75, 0.0]]])
    want = torch.tensor([[1.5, 0.25 * 2 - 0.75 * math.log2(0.75)]])
    torch.testing.assert_close(entropy(p.log()), want)


def test_temperature_and_processors_do_not_change_the_turns():
    small, large = [0, 0, 3, 3] * 10, [1, 3, 0, 0] * 10
    plain = trace(small, large, 30, tau=1.2, window=2, min_stay=2)
    decoder = Decoder(Table(LARGE, large), EAD(Table(SMALL, small), tau=1.2, window=2, min_stay=2))
    for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.01, "top_k": 1}):
        (tokens,) = new_tokens(decoder, {"input_ids": PROMPT}, max_new_tokens=30, **settings)
        assert "".join("s" if token < LARGE else "L" for token in tokens) == plain
    assert "sL" in plain


def test_noise_in_logits_beyond_the_tokenizer_is_not_uncertainty():
    tokenizer = word_tokenizer(50)
    large, small = Table(LARGE, [0] * 20), Table(SMALL, [0] * 20)
    large.rows[11:, 50:] = -0.01  # 14 rows that no token has
    for known, want in ((tokenizer, "Lsssss"), (None, "LLLLLL")):
        decoder = Decoder(large, EAD(small, tau=1.0), tokenizer=known)
        (tokens,) = new_tokens(decoder, {"input_ids": PROMPT}, do_sample=False, max_new_tokens=6)
        assert "".join("s" if token < LARGE else "L" for token in tokens) == want


# ---- the whole method -----------------------------------------------------------------------------------------------

OPTIONS = [
    {"tau": 4.1, "window": 3, "min_stay": 3},
    {"tau": 3.9, "window": 2, "min_stay": 1, "start": "small"},
    {"tau": 4.2, "window": 5, "min_stay": 5},
]


@FAMILIES
def test_greedy_text_is_that_of_the_algorithm_written_out_alone_and_in_a_batch(make: Callable):
    model = make()
    draft = noisy(model)
    switches = 0
    for options in OPTIONS:
        want = []
        decoder = Decoder(model, EAD(draft, **options))
        for prompt in ragged():
            text, writers = written_out(model, draft, prompt, 30, **options)
            want.append(text)
            switches += writers.count("sL") + writers.count("Ls")
            assert new_tokens(decoder, {"input_ids": prompt[None]}, do_sample=False, max_new_tokens=30) == [text]
            assert decoder.drafter.cost.small.written == writers.count("s")
        assert new_tokens(decoder, left_padded(ragged()), do_sample=False, max_new_tokens=30) == want
        steps = decoder.stats.steps
        assert any(step.trusted and step.emitted for step in steps), "some rows skip a forward that others take"
    assert switches > 20


def test_models_that_take_chains_only_take_turns_as_well():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None)
    model = BloomForCausalLM(config).eval()
    draft = noisy(model)
    want = [written_out(model, draft, prompt, 20, **OPTIONS[0])[0] for prompt in ragged()]
    decoder = Decoder(model, EAD(draft, **OPTIONS[0]))
    assert new_tokens(decoder, left_padded(ragged()), do_sample=False, max_new_tokens=20, pad_token_id=0) == want
    assert decoder.drafter.cost.switches > 4


@pytest.mark.parametrize("speculate", [0, 4])
@FAMILIES
def test_at_either_limit_one_model_writes_alone(make: Callable, speculate: int):
    model, draft = make(), make(seed=1)
    limits = ((model, 0.0, "large", "small"), (draft, math.inf, "small", "large"))
    for inputs in ({"input_ids": ragged()[0][None]}, left_padded(ragged())):
        for alone, tau, start, idle in limits:
            decoder = Decoder(model, EAD(draft, tau=tau, start=start, speculate=speculate))
            want = new_tokens(alone, inputs, do_sample=False, max_new_tokens=24)
            assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=24) == want
            settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": want[0][12]}
            assert new_tokens(decoder, inputs, **settings) == new_tokens(alone, inputs, **settings)
            assert getattr(decoder.drafter.cost, idle).written == 0
            if speculate and start == "large":
                continue  # drafts draw on the same randomness
            settings = {"do_sample": True, "temperature": 0.8, "top_k": 8, "max_new_tokens": 20}
            texts = []
            for sampler in (decoder, Decoder(alone, "none")):
                torch.manual_seed(3)
                texts.append(new_tokens(sampler, inputs, **settings))
            assert texts[0] == texts[1]
            torch.manual_seed(3)
            assert new_tokens(decoder, inputs, **settings) == texts[0]


def test_the_target_never_runs_where_the_small_model_writes_alone():
    decoder = Decoder(tiny_llama(), EAD(tiny_llama(seed=1), tau=math.inf, start="small"))
    decoder.generate(IDS, do_sample=False, max_new_tokens=20)
    assert decoder.target.forwards == 0
    assert decoder.stats.mat is None
    assert decoder.drafter.cost.large.fed == 0
    out = decoder.generate(IDS, do_sample=False, max_new_tokens=20, return_dict_in_generate=True, output_scores=True)
    assert out.past_key_values.get_seq_length() == 22, "the cache handed out is brought up to date"
    assert len(out.scores) == 20


# ---- caches ---------------------------------------------------------------------------------------------------------


def same_cache(owner, row) -> bool:
    """Whether a model's cached columns of a row are those of a fresh forward over the same tokens."""
    b = owner.row_ids.index(row.index)
    cache = owner.caches[0]
    n = cache.lengths[b]
    assert n <= len(row.tokens)
    if n == 0:
        return True
    fresh = owner.model(torch.from_numpy(row.tokens[:n].copy())[None], use_cache=True).past_key_values.layers[1]
    window = fresh.keys.shape[2]  # a sliding layer of transformers holds only its window
    return all(
        torch.allclose(mine[b : b + 1, :, n - window : n], theirs, atol=1e-4)
        for mine, theirs in zip(cache.layers[1].buffers(), (fresh.keys, fresh.values), strict=True)
    )


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_after_every_switch_both_caches_are_those_of_a_fresh_forward(make: Callable, speculate: int):
    model = make()
    drafter = EAD(noisy(model), tau=4.1, window=3, min_stay=4, speculate=speculate)
    decoder = Decoder(model, drafter)
    right: list[bool] = []
    propose = drafter.propose

    def checking(state):
        made = propose(state)
        for row in state.rows:
            turn = drafter._turns[row.index]
            if turn.stay == 1 and len(row.new_tokens) > 1:  # the new writer has read what it had missed
                right.append(same_cache(decoder.target, row) and same_cache(drafter.draft, row))
        return made

    drafter.propose = checking
    decoder.generate(**left_padded(ragged()), do_sample=False, max_new_tokens=40)
    assert len(right) > 5
    assert all(right)


def test_each_model_is_fed_each_token_once_and_in_order():
    model = tiny_llama()
    draft = noisy(model)
    decoder = Decoder(model, EAD(draft, tau=4.1, window=3, min_stay=4))
    fed: dict[int, list[tuple[int, int]]] = {id(model): [], id(draft): []}

    def record(module, args, kwargs) -> None:
        fed[id(module)] += zip(kwargs["position_ids"][0].tolist(), kwargs["input_ids"][0].tolist(), strict=True)

    for module in (model, draft):
        module.register_forward_pre_hook(record, with_kwargs=True)
    text = list(enumerate(decoder.generate(IDS, do_sample=False, max_new_tokens=50)[0].tolist()))
    cost = decoder.drafter.cost
    assert cost.switches > 4
    for module, work in ((model, cost.large), (draft, cost.small)):
        n = len(fed[id(module)])
        assert n > len(text) // 2
        assert fed[id(module)] == text[:n], "in order, none twice"
        assert n == work.fed == work.written + work.caught_up + (len(IDS[0]) - 1 if module is model else 0)


def test_a_small_model_that_missed_a_long_stretch_reads_it_in_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specdec.drafters.ead._CHUNK", 4)
    model = tiny_llama()
    draft = noisy(model)
    want = [written_out(model, draft, prompt, 30, **OPTIONS[0])[0] for prompt in ragged()]
    decoder = Decoder(model, EAD(draft, **OPTIONS[0]), prefill_chunk=4)
    columns: list[int] = []
    draft.register_forward_pre_hook(
        lambda _, __, inputs: columns.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    assert new_tokens(decoder, left_padded(ragged()), do_sample=False, max_new_tokens=30) == want
    assert max(columns) == 4
    assert columns.count(4) > 5


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_a_target_that_missed_a_long_stretch_reads_it_in_chunks(batched: bool):
    model = tiny_llama()
    inputs = left_padded(ragged()) if batched else {"input_ids": IDS}
    texts = []
    for chunk in (512, 3):
        decoder = Decoder(model, EAD(noisy(model), **OPTIONS[0]), prefill_chunk=chunk)
        texts.append(new_tokens(decoder, inputs, max_new_tokens=40, do_sample=False))
        widest = max(step.columns for step in decoder.stats.steps)
        assert decoder.drafter.cost.switches > 1
    assert texts[0] == texts[1]
    assert widest == 3


@pytest.mark.parametrize("speculate", [0, 3])
def test_an_end_token_or_a_limit_inside_any_stretch_ends_the_text_there(speculate: int):
    model = tiny_llama()
    draft = noisy(model)
    decoder = Decoder(model, EAD(draft, **OPTIONS[2], speculate=speculate))
    inputs = {"input_ids": ragged()[0][None]}
    text, writers = written_out(model, draft, ragged()[0], 40, **OPTIONS[2])
    ended_by = set()
    for n in range(1, 41, 3):
        assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=n) == [text[:n]]
        cost = decoder.drafter.cost
        assert (cost.small.written, cost.large.written) == (writers[:n].count("s"), writers[:n].count("L"))
        assert cost.switches == writers[:n].count("sL") + writers[:n].count("Ls")
        first = text.index(text[n - 1])
        settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": text[n - 1]}
        assert new_tokens(decoder, inputs, **settings) == [text[: first + 1]]
        assert decoder.drafter.cost.small.written == writers[: first + 1].count("s")
        ended_by.add(writers[first])
    assert ended_by == {"s", "L"}


def test_rows_of_a_batch_that_end_at_different_times_keep_their_own_turns():
    model = tiny_llama()
    draft = noisy(model)
    decoder = Decoder(model, EAD(draft, **OPTIONS[0]))
    texts = [written_out(model, draft, prompt, 30, **OPTIONS[0])[0] for prompt in ragged()]
    eos = texts[1][9]
    want = [text[: text.index(eos) + 1] if eos in text else text for text in texts]
    assert len(set(map(len, want))) > 1
    for as_dict in (False, True):  # a dict keeps finished rows in the cache
        settings = {"max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 0, "return_dict_in_generate": as_dict}
        got = new_tokens(decoder, left_padded(ragged()), do_sample=False, **settings)
        assert [row[: len(text)] for row, text in zip(got, want, strict=True)] == want
        cost = decoder.drafter.cost
        assert cost.small.written + cost.large.written == sum(map(len, want))


def test_a_streamer_gets_the_text_in_order_token_by_token_where_the_small_model_writes():
    model = tiny_llama()
    decoder = Decoder(model, EAD(noisy(model), **OPTIONS[2], speculate=3))
    got: list[list[int]] = []
    ended: list[bool] = []
    streamer = SimpleNamespace(put=lambda ids: got.append(ids.flatten().tolist()), end=lambda: ended.append(True))
    (ids,) = decoder.generate(IDS, do_sample=False, max_new_tokens=30, streamer=streamer).tolist()
    assert [token for tokens in got for token in tokens] == ids
    assert ended == [True]
    assert max(map(len, got[1:])) > 1
    assert sum(len(tokens) == 1 for tokens in got[1:]) >= decoder.drafter.cost.small.written > 0


def test_where_the_small_models_context_ends_the_target_writes_on():
    for room, want in ((16, "LssssLLLLL"), (12, "LLLLLLLLLL"), (256, "Lsssssssss")):
        decoder = Decoder(Table(LARGE, [0] * 20), EAD(Table(SMALL, [0] * 20, context=room), tau=1.0, min_stay=3))
        (tokens,) = new_tokens(decoder, {"input_ids": PROMPT}, do_sample=False, max_new_tokens=10)
        assert "".join("s" if token < LARGE else "L" for token in tokens) == want
    decoder = Decoder(Table(LARGE, []), EAD(Table(SMALL, [], context=11), tau=1.0, start="small", speculate=3))
    (tokens,) = new_tokens(decoder, {"input_ids": PROMPT}, do_sample=False, max_new_tokens=10)
    assert min(tokens) >= LARGE, "a prompt that does not fit"


# ---- drafts in the target's stretches -------------------------------------------------------------------------------


@FAMILIES
def test_drafts_in_the_targets_stretches_change_no_greedy_text_and_no_turn(make: Callable):
    model = make()
    draft = noisy(model, 0.1)
    accepted = 0
    for options in (*OPTIONS[1:], {"tau": 3.5, "window": 4, "min_stay": 12, "stay_at_start": True}):
        plain, fast = (Decoder(model, EAD(draft, **options, speculate=k)) for k in (0, 4))
        for inputs in ({"input_ids": ragged()[0][None]}, left_padded(ragged())):
            settings = {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.1}
            assert new_tokens(fast, inputs, **settings) == new_tokens(plain, inputs, **settings)
            a, b = plain.drafter.cost, fast.drafter.cost
            assert (a.switches, a.small.written, a.large.written) == (b.switches, b.small.written, b.large.written)
            accepted += sum(sum(step.accepted) for step in fast.stats.steps)
            if b.large.written > 10:
                assert fast.stats.row_forwards <= plain.stats.row_forwards
    assert accepted > 20


def test_a_draft_that_a_turn_could_end_inside_is_detected(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama()
    draft = noisy(model, 0.1)
    plain, fast = (Decoder(model, EAD(draft, **OPTIONS[0], speculate=k)) for k in (0, 4))
    monkeypatch.setattr(EAD, "_goes_on", lambda self, turn, tokens: True)
    settings = {"do_sample": False, "max_new_tokens": 30}
    assert new_tokens(fast, left_padded(ragged()), **settings) != new_tokens(plain, left_padded(ragged()), **settings)


def test_drafts_end_where_a_turn_could():
    # d_min leaves 4 tokens that nothing can cut short, the bonus being the fourth; then the mean decides
    sizes = []
    for large, options in (
        ([0] * 30, {"min_stay": 4, "stay_at_start": True}),
        ([3] * 30, {"min_stay": 0, "window": 6}),
        ([3] * 30, {"min_stay": 0, "window": 1}),
    ):
        decoder = Decoder(Table(LARGE, large), EAD(Table(SMALL, [3] * 30), tau=1.0, speculate=8, **options))
        seen = []
        propose = decoder.drafter.propose

        def recording(state, propose=propose, seen=seen):
            made = propose(state)
            seen.append(len(made[0].tree) - 1 if made[0].tree is not None else None)
            return made

        decoder.drafter.propose = recording
        decoder.generate(PROMPT, do_sample=False, max_new_tokens=12)
        sizes.append(seen[:6])
    # the draft is never right here, so every step writes one token
    assert sizes[0] == [3, 2, 1, 0, None, None]
    # after n tokens of 3 bits, zeros may follow until the mean of at most six falls below one bit
    assert sizes[1] == [0, 2, 4, 4, 4, 4]
    assert sizes[2] == [0] * 6


@pytest.mark.parametrize(
    "options",
    [{"tau": 1.0, "window": 1, "start": "small"}, {"tau": 1.6, "window": 2, "stay_at_start": True}],
    ids=["small", "large"],
)
def test_drafts_in_the_targets_stretches_leave_the_law_as_it_is(options: dict, monkeypatch: pytest.MonkeyPatch):
    """Every random outcome of four tokens, enumerated with drafts and without."""
    model = tiny_llama(vocab_size=4, seed=0)
    draft = noisy(model, 0.6)
    laws, accepted = [], 0
    for speculate in (0, 2):
        decoder = Decoder(model, EAD(draft, min_stay=3, speculate=speculate, **options))

        def generate(random: Scripted, decoder=decoder) -> tuple[int, ...]:
            nonlocal accepted
            monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
            ids = decoder.generate(IDS, max_new_tokens=4, do_sample=True, temperature=0.8, top_k=2)
            accepted += sum(sum(step.accepted) for step in decoder.stats.steps)
            return tuple(ids[0, 3:].tolist())

        laws.append(law(generate))
        assert decoder.drafter.total.switches > 0
    assert total_variation(*laws) < 1e-6
    assert accepted > 0


def test_it_works_with_a_lossy_verifier():
    model = tiny_llama()
    for verifier in ("typical", "rollback"):
        decoder = Decoder(model, EAD(noisy(model), **OPTIONS[2], speculate=3), verifier)
        for do_sample in (False, True):
            new = new_tokens(decoder, left_padded(ragged()), do_sample=do_sample, max_new_tokens=30)
            cost = decoder.drafter.cost
            assert cost.small.written + cost.large.written == sum(map(len, new)) == 30 * len(new)
            assert cost.switches > 0


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_costs_worked_by_hand():
    # 12 prompt tokens; the target writes 1, the small model 4, the target 4, the small model 3
    decoder = Decoder(Table(LARGE, [0] * 20), EAD(Table(SMALL, [3] * 20), tau=1.0, window=2, min_stay=4))
    decoder.generate(PROMPT, do_sample=False, max_new_tokens=12)
    cost = decoder.drafter.cost
    assert (cost.large.written, cost.small.written, cost.switches) == (5, 7, 3)
    # the target reads the prompt, and from its 1st token on all up to the 8th but the last; the small model all up to
    # the 11th. Nobody reads the last token.
    assert (cost.large.fed, cost.large.caught_up) == (12 + 8, 4)
    assert (cost.small.fed, cost.small.caught_up) == (12 + 11, 12 + 4)
    assert cost.alone == 12 + 11
    cost.small.parameters, cost.large.parameters = 3, 11
    assert cost.paper_cost == pytest.approx((5 * 11 + 7 * 3) / (12 * 11))
    assert cost.flops == 2 * (11 * 20 + 3 * 23)
    assert cost.saved == pytest.approx(1 - (11 * 20 + 3 * 23) / (11 * 23))


def test_the_papers_figures_follow_from_its_formula():
    drafter = EAD(tiny_llama(), 0.5)
    Decoder(tiny_llama(), drafter)
    for parameters, share, saved in (((3, 11), 43, 0.415), ((1.5, 14), 25, 0.67)):
        drafter.cost.small.parameters, drafter.cost.large.parameters = parameters
        drafter.cost.large.written, drafter.cost.small.written = share, 100 - share
        assert 1 - drafter.cost.paper_cost == pytest.approx(saved, abs=1e-3)


def test_costs_add_up_over_requests_and_the_target_alone_saves_nothing():
    model = tiny_llama()
    decoder = Decoder(model, EAD(noisy(model), **OPTIONS[0]))
    drafter = decoder.drafter
    assert drafter.total.saved == drafter.total.flops == drafter.total.paper_cost == 0
    written, fed, switches = 0, 0, 0
    for new in (7, 30):
        decoder.generate(**left_padded(ragged()), do_sample=False, max_new_tokens=new)
        assert drafter.cost.small.written + drafter.cost.large.written == decoder.stats.new_tokens
        written, fed = written + decoder.stats.new_tokens, fed + drafter.cost.small.fed + drafter.cost.large.fed
        switches += drafter.cost.switches
    assert drafter.total.small.written + drafter.total.large.written == written
    assert (drafter.total.small.fed + drafter.total.large.fed, drafter.total.switches) == (fed, switches)
    decoder = Decoder(model, EAD(noisy(model), tau=0.0), prefill_chunk=4)
    for inputs in ({"input_ids": torch.arange(3, 23)[None]}, left_padded(ragged())):
        decoder.generate(**inputs, do_sample=False, max_new_tokens=9)
        cost = decoder.drafter.cost
        assert (cost.saved, cost.paper_cost, cost.large.caught_up, cost.switches) == (0, 1, 0, 0)


def test_a_cache_handed_back_is_not_read_again():
    model = tiny_llama()
    decoder = Decoder(model, EAD(noisy(model), tau=0.0))
    turn = decoder.generate(IDS, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    decoder.generate(turn.sequences, past_key_values=turn.past_key_values, do_sample=False, max_new_tokens=5)
    cost = decoder.drafter.cost
    assert cost.alone == cost.large.fed == 5


# ---- calibration, refusals ------------------------------------------------------------------------------------------


def test_calibration_is_the_quantile_of_the_partial_and_full_rolling_means():
    small = Table(SMALL, [0, 1, 2, 3, 3, 1])
    # window 2: 0, 0.5, 1.5, 2.5, 3, 2
    settings = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0}
    assert calibrate(small, [PROMPT[0], PROMPT[0]], 0.5, window=2, **settings) == pytest.approx(1.75)
    for quantile, want in ((0.0, 0.0), (0.2, 0.5), (0.6, 2.0), (0.8, 2.5), (1.0, 3.0)):
        assert calibrate(small, [PROMPT[0]], quantile, window=2, **settings) == pytest.approx(want)
    small.rows[11:, 50:] = 0.0
    means = [calibrate(small, [PROMPT[0]], 1.0, 1, vocabulary=known, **settings) for known in (50, None)]
    assert means[0] == pytest.approx(3)
    assert means[1] == pytest.approx(math.log2(8 + 14))
    for quantile, window, prompts in ((1.5, 5, [PROMPT[0]]), (0.5, 0, [PROMPT[0]]), (0.5, 5, [])):
        with pytest.raises(UsageError):
            calibrate(small, prompts, quantile, window)


def test_it_says_that_it_is_lossy():
    decoder = Decoder(tiny_llama(), EAD(tiny_llama(seed=1)))
    assert "lossy router" in EAD.summary
    assert not decoder.lossless
    with pytest.raises(UsageError, match="drafter 'ead' may change the text"):
        decoder.generate(IDS, lossless=True)
    decoder.generate(IDS, do_sample=False, max_new_tokens=3)
    assert not decoder.stats.lossless


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": -0.1},
        {"tau": math.nan},
        {"window": 0},
        {"min_stay": -1},
        {"start": "medium"},
        {"speculate": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name_and_value(wrong: dict):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=f"{name}={value!r}"):
        EAD(tiny_llama(), **wrong)


def test_another_vocabulary_is_refused_unless_only_padding_differs():
    with pytest.raises(CompatibilityError, match="its vocabulary has 64 tokens, the target's 32"):
        Decoder(tiny_llama(vocab_size=32), EAD(tiny_llama()))
    for size in (48, 80):
        decoder = Decoder(tiny_llama(), EAD(tiny_llama(vocab_size=size, seed=1), tau=1.5, same_tokenizer=True))
        settings = {"suppress_tokens": list(range(48, 64)), "max_new_tokens": 30}
        (new,) = new_tokens(decoder, {"input_ids": IDS}, do_sample=True, **settings)
        assert len(new) == 30
        assert decoder.drafter._ids == min(size, 64)
