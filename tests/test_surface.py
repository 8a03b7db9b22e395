"""``Decoder.generate`` and ``custom_generate=decoder`` take and return what ``model.generate`` takes and returns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from families import DECODED, PAD, VOCABULARY, build
from transformers import (
    BatchEncoding,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import Decoder
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.token_recycling import TokenRecycling
from specdec.errors import CompatibilityError, UsageError

NEW = 24
FAMILIES = {family.name: family for family in DECODED}


@functools.cache
def model(family: str = "llama") -> PreTrainedModel:
    return build(FAMILIES[family])


@functools.cache
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (10, 5, 7)]


def one() -> dict[str, torch.Tensor]:
    return {"input_ids": prompts()[0][None]}


def batch() -> dict[str, torch.Tensor]:
    return left_padded(prompts(), PAD)


INPUTS = pytest.mark.parametrize("inputs", [one, batch], ids=["one row", "padded batch"])


def knowing(inputs: dict, family: str = "llama", **settings) -> OracleDrafter:
    """A drafter of the text that plain ``generate`` gives: a tree with decoys and mistakes."""
    text = new_tokens(model(family), inputs, **{"max_new_tokens": NEW, **settings})
    return OracleDrafter(text, depth=4, wrong=0.25, decoys=1)


def accepted(decoder: Decoder) -> int:
    assert decoder.stats is not None
    return sum(sum(step.accepted) for step in decoder.stats.steps)


def check(inputs: dict, fresh: Callable[[], dict] = dict, **settings) -> None:
    """Drafters that accept and reject give ``generate()``'s sequences; ``fresh`` makes settings that keep state."""
    settings = {"max_new_tokens": NEW, **settings}
    want = model().generate(**inputs, **settings, **fresh())
    drafters = [knowing(inputs, **settings, **fresh()), DraftModel(model()), TokenRecycling(size=81)]
    for drafter in drafters:
        decoder = Decoder(model(), drafter)
        got = decoder.generate(**inputs, **settings, **fresh())
        assert torch.equal(got, want), f"{decoder.drafter.name}: {got.tolist()} is not {want.tolist()}"
        assert accepted(decoder) > 0
        assert torch.equal(model().generate(**inputs, **settings, **fresh(), custom_generate=decoder), want)


# ---- what comes in -------------------------------------------------------------------------------------------------


def test_inputs_come_as_ids_encodings_and_keywords():
    decoder, ids = Decoder(model(), knowing(one())), prompts()[0][None]
    want = model().generate(ids, max_new_tokens=NEW)
    encoding = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for args, kwargs in [
        ((ids,), {}),
        ((), {"inputs": ids}),
        ((), {"input_ids": ids}),
        ((), encoding),
        ((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}),
    ]:
        assert torch.equal(decoder.generate(*args, **kwargs, max_new_tokens=NEW), want)


def test_a_generation_config_its_overrides_and_the_models_own_defaults_are_obeyed():
    decoder = Decoder(model(), knowing(one()))
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.4, pad_token_id=PAD)
    for settings in ({}, {"max_new_tokens": 5}, {"repetition_penalty": 1.0}):
        want = model().generate(**one(), generation_config=config, **settings)
        assert torch.equal(decoder.generate(**one(), generation_config=config, **settings), want)
    assert config.max_new_tokens == 9
    before = model().generation_config
    model().generation_config = config
    try:
        assert torch.equal(decoder.generate(**one()), model().generate(**one()))
        assert decoder.generate(**one()).shape[1] == len(prompts()[0]) + 9
    finally:
        model().generation_config = before


def test_padding_is_inferred_from_pad_tokens_as_generate_does():
    ids = batch()["input_ids"]
    want = model().generate(ids, max_new_tokens=NEW)
    assert torch.equal(want, model().generate(**batch(), max_new_tokens=NEW))
    assert torch.equal(Decoder(model(), knowing(batch())).generate(ids, max_new_tokens=NEW), want)


def test_the_callers_arguments_are_not_changed():
    processors, criteria = LogitsProcessorList(), []
    ids = batch()["input_ids"]
    before = ids.clone()
    config = GenerationConfig(max_new_tokens=6, repetition_penalty=1.3, stop_strings=None)
    state = copy.deepcopy(config.to_dict())
    Decoder(model(), "token-recycling").generate(
        ids, generation_config=config, logits_processor=processors, stopping_criteria=criteria
    )
    assert torch.equal(ids, before)
    assert config.to_dict() == state
    assert len(processors) == len(criteria) == 0


# ---- processors ----------------------------------------------------------------------------------------------------

PROCESSORS = {
    "none": {},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(3, 40))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(3, 50)] + [[60, 61], [70, 71, 72]]},
    "sequence_bias": {"sequence_bias": [[[i], 2.0] for i in range(50, 60)]},
    "suppress_tokens": {"suppress_tokens": list(range(20, 60)), "begin_suppress_tokens": list(range(60, 90))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (12, 1.2), "eos_token_id": 5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[7], [8, 9]]},
    "sampling with one choice": {"do_sample": True, "top_k": 1, "temperature": 0.7, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
@INPUTS
def test_logits_processors_act_as_in_generate(inputs: Callable[[], dict], settings: dict):
    check(inputs(), **settings)


@INPUTS
def test_each_row_has_its_own_allowed_tokens(inputs: Callable[[], dict]):
    """prefix_allowed_tokens_fn(batch_id, ids) gets the row's number and its padded text."""

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [3 + 30 * row + (int(ids[-1]) * 7 + len(ids) + i) % 30 for i in range(12)]

    check(inputs(), prefix_allowed_tokens_fn=allowed)
    text = new_tokens(Decoder(model(), "token-recycling"), inputs(), max_new_tokens=8, prefix_allowed_tokens_fn=allowed)
    assert [sorted({(token - 3) // 30 for token in row}) for row in text] == [[row] for row in range(len(text))]


class Counting(LogitsProcessor):
    """Raises a token's score by how often it has been called, and keeps every prefix it saw."""

    def __init__(self):
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        scores = scores.clone()
        scores[:, (7 * len(self.seen)) % VOCABULARY] += 2.0
        return scores


@INPUTS
def test_a_processor_that_keeps_state_gives_generates_text(inputs: Callable[[], dict]):
    check(inputs(), fresh=lambda: {"logits_processor": [Counting()]})


@pytest.mark.parametrize("sampled", [False, True])
def test_a_processor_is_called_once_per_emitted_token_with_the_true_prefix(sampled: bool):
    counting = Counting()
    drafter = knowing(one(), logits_processor=[Counting()])
    decoder = Decoder(model(), drafter)
    ids = decoder.generate(**one(), logits_processor=[counting], do_sample=sampled, top_k=1, max_new_tokens=NEW)[0]
    assert accepted(decoder) > 0
    assert counting.seen == [ids[:n].tolist() for n in range(len(prompts()[0]), len(ids))]


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["none", "token-recycling", "draft-model"])
def test_sampling_repeats_with_torchs_seed(drafter: str):
    options = {"draft": model("mistral"), "branching": (2, 1)} if drafter == "draft-model" else {}

    target = model()  # making it takes random numbers, the first time

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        decoder = Decoder(target, drafter, **options)
        return decoder.generate(**batch(), do_sample=True, temperature=1.5, max_new_tokens=12)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_num_return_sequences_repeats_each_row():
    decoder = Decoder(model(), "token-recycling")
    got = decoder.generate(**batch(), do_sample=True, num_return_sequences=3, temperature=2.0, max_new_tokens=12)
    longest = batch()["input_ids"].shape[1]
    assert got.shape == (9, longest + 12)
    assert torch.equal(got[:, :longest], batch()["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in got.tolist()}) == 9


def test_sampled_tokens_come_from_the_processed_scores():
    """The returned scores are the warped logits, and every token has positive probability under them."""
    decoder = Decoder(model(), DraftModel(model(), branching=(2, 2)))
    out = decoder.generate(
        **batch(),
        do_sample=True,
        temperature=0.8,
        top_k=9,
        top_p=0.9,
        max_new_tokens=16,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(9), TopPLogitsWarper(0.9)]
    longest = batch()["input_ids"].shape[1]
    for i, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        want = functools.reduce(lambda x, warp: warp(None, x), warpers, logits)
        torch.testing.assert_close(scores, want)
        assert torch.isfinite(scores.gather(1, out.sequences[:, longest + i, None])).all()


# ---- what goes out -------------------------------------------------------------------------------------------------


@INPUTS
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_scores_and_logits_are_generates(inputs: Callable[[], dict], family: str):
    """One [B, V] entry per new token; a finished row's entries mean nothing in either."""
    plain = new_tokens(model(family), inputs(), max_new_tokens=NEW)
    ends = [row[4 + 5 * i] for i, row in enumerate(plain)]
    settings = {
        "max_new_tokens": NEW,
        "repetition_penalty": 1.1,
        "eos_token_id": ends,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    want = model(family).generate(**inputs(), **settings)
    added = want.sequences[:, inputs()["input_ids"].shape[1] :]
    decoder = Decoder(model(family), OracleDrafter(added, depth=4, wrong=0.25, decoys=int(family != "bloom")))
    got = decoder.generate(**inputs(), **settings)
    assert accepted(decoder) > 0
    assert type(got) is GenerateDecoderOnlyOutput
    assert torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert isinstance(ours, tuple)
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
        for row, text in enumerate(added.tolist()):
            length = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
            for i in range(length):
                torch.testing.assert_close(ours[i][row], theirs[i][row], atol=1e-3, rtol=1e-3)
            assert all(torch.isfinite(x[row]).all() for x in ours[length:])


def test_return_types_are_generates():
    decoder = Decoder(model(), "prompt-lookup")
    for settings in ({}, {"return_dict_in_generate": True}, {"return_dict_in_generate": True, "output_scores": True}):
        want = model().generate(**one(), max_new_tokens=6, **settings)
        got = decoder.generate(**one(), max_new_tokens=6, **settings)
        assert type(got) is type(want)
        if settings:
            assert [k for k, v in got.items() if v is not None] == [k for k, v in want.items() if v is not None]
            got, want = got.sequences, want.sequences
        assert (got.dtype, got.device, got.is_inference()) == (want.dtype, want.device, False)


@pytest.mark.parametrize("chunk", [1, 4, 9])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "llama4_text", "bloom"])
def test_prefill_in_chunks_gives_the_same_text_and_logits(family: str, chunk: int):
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    want = model(family).generate(**batch(), **settings)
    drafter = OracleDrafter(want.sequences[:, batch()["input_ids"].shape[1] :], wrong=0.3)
    decoder = Decoder(model(family), drafter, prefill_chunk=chunk)
    got = decoder.generate(**batch(), **settings)
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert accepted(decoder) > 0


def test_half_precision_text_is_the_models_up_to_near_ties():
    """Every token's bfloat16 logit is the maximum, or within rounding of it, when the text is read back."""
    half = copy.deepcopy(model()).to(torch.bfloat16)
    text = new_tokens(half, batch(), max_new_tokens=NEW)
    for drafter in (OracleDrafter(text, decoys=1, wrong=0.2), DraftModel(half), "token-recycling"):
        decoder = Decoder(half, drafter)
        got = decoder.generate(**batch(), max_new_tokens=NEW)
        assert accepted(decoder) > 0
        for prompt, row in zip(prompts(), got, strict=True):
            ids = row[-len(prompt) - NEW :]
            with torch.no_grad():
                logits = half(ids[None]).logits[0, len(prompt) - 1 : -1].float()
            gap = logits.max(dim=-1).values - logits.gather(1, ids[len(prompt) :, None])[:, 0]
            assert gap.max() < 0.1


# ---- streaming -----------------------------------------------------------------------------------------------------


class Collecting(BaseStreamer):
    """Everything that is put, as lists; and whether the end was told."""

    def __init__(self):
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


BOTH = pytest.mark.parametrize("through_model", [False, True], ids=["decoder.generate", "custom_generate"])


def streamed(decoder: Decoder, through_model: bool, inputs: dict, streamer: BaseStreamer, **settings) -> torch.Tensor:
    if through_model:
        return decoder.model.generate(**inputs, **settings, streamer=streamer, custom_generate=decoder)
    return decoder.generate(**inputs, **settings, streamer=streamer)


@BOTH
def test_a_streamer_gets_the_prompt_then_every_token_once_then_the_end(through_model: bool):
    decoder, streamer = Decoder(model(), knowing(one())), Collecting()
    ids = streamed(decoder, through_model, one(), streamer, max_new_tokens=NEW)[0].tolist()
    assert streamer.puts[0] == prompts()[0].tolist()
    assert [token for put in streamer.puts for token in put] == ids
    assert streamer.ended == 1
    assert any(len(put) > 1 for put in streamer.puts[1:]), "accepted drafts arrive together"
    assert decoder.generate(**one(), max_new_tokens=4) is not None
    assert streamer.ended == 1, "the next request has no streamer"


@BOTH
def test_a_text_streamer_prints_generates_text(through_model: bool, tokenizer, capsys: pytest.CaptureFixture):
    model().generate(**one(), max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    want = capsys.readouterr().out
    decoder = Decoder(model(), knowing(one()))
    streamed(decoder, through_model, one(), TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=NEW)
    assert capsys.readouterr().out == want
    assert len(want.split()) >= NEW - 1


@BOTH
def test_an_iterator_streamer_in_a_thread_ends(through_model: bool, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=240.0)
    decoder = Decoder(model(), knowing(one()))
    thread = Thread(target=streamed, args=(decoder, through_model, one(), streamer), kwargs={"max_new_tokens": NEW})
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=240)
    assert not thread.is_alive()
    assert text.split() == tokenizer.decode(new_tokens(model(), one(), max_new_tokens=NEW)[0]).split()


# ---- as a recipe of generate() and in pipelines ----------------------------------------------------------------------


def test_the_users_own_settings_reach_a_decoder_given_as_custom_generate():
    """Names the Decoder takes for itself would be swallowed by generate()."""
    for settings in ({"temperature": 1e-4, "do_sample": True}, {"repetition_penalty": 1.8}, {"use_cache": True}):
        want = model().generate(**batch(), **settings, max_new_tokens=NEW)
        got = model().generate(**batch(), **settings, max_new_tokens=NEW, custom_generate=Decoder(model()))
        assert torch.equal(got, want)


@pytest.mark.parametrize("texts", ["ba do fin", ["ba do fin", "gun", "kan le mi so ru"]], ids=["one", "batch"])
def test_the_text_generation_pipeline_takes_a_decoder(texts: str | list[str], tokenizer):
    decoder = Decoder(model(), "token-recycling")
    pipe = pipeline("text-generation", model=model(), tokenizer=tokenizer)
    settings = {"max_new_tokens": NEW, "do_sample": False, "batch_size": 1 if isinstance(texts, str) else 3}
    want = pipe(texts, **settings)
    assert decoder.stats is None
    assert pipe(texts, **settings, custom_generate=decoder) == want
    assert decoder.stats is not None
    assert pipe(texts, **settings, custom_generate=decoder, return_full_text=False) == pipe(
        texts, **settings, return_full_text=False
    )


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_accept_different_counts_and_finish_at_different_times():
    text = new_tokens(model(), batch(), max_new_tokens=NEW)
    ends = [row[k] for row, k in zip(text, (3, 11, 20), strict=True)]
    want = model().generate(**batch(), max_new_tokens=NEW, eos_token_id=ends)
    decoder = Decoder(model(), OracleDrafter(text, depth=4, wrong=0.3))
    assert torch.equal(decoder.generate(**batch(), max_new_tokens=NEW, eos_token_id=ends), want)
    assert decoder.stats is not None
    steps = decoder.stats.steps
    assert any(len(set(step.accepted)) > 1 for step in steps)
    rows = [len(step.accepted) for step in steps]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 3
    assert rows[-1] < 3


def test_a_row_does_not_depend_on_its_neighbours():
    """The same prompt alone, and beside rows that finish earlier or accept more."""
    together = Decoder(model(), "token-recycling").generate(**batch(), max_new_tokens=NEW)
    for row, prompt in enumerate(prompts()):
        alone = Decoder(model(), "token-recycling").generate(prompt[None], max_new_tokens=NEW)
        assert torch.equal(together[row, -len(prompt) - NEW :], alone[0])


# ---- caches over several turns ---------------------------------------------------------------------------------------

CACHED = ["llama", "gemma2", "mistral", "gpt_oss", "llama4_text", "gpt2", "gemma3n_text", "bloom"]


@contextmanager
def columns_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """Width of every forward."""
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield widths
    finally:
        hook.remove()


def next_turn(sequences: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
    """The text so far and three tokens more from the user."""
    said = torch.arange(40, 40 + 3 * len(sequences)).view(-1, 3)
    ids = torch.cat([sequences, said], dim=1)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    more = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, more], dim=1)}


@pytest.mark.parametrize("family", CACHED)
@INPUTS
def test_a_second_turn_on_the_returned_cache_gives_the_same_text(inputs: Callable[[], dict], family: str):
    """Every direction: ours to ours, ours to plain generate, plain generate's to ours."""
    first = {"max_new_tokens": 13, "return_dict_in_generate": True}
    theirs = model(family).generate(**inputs(), **first)
    decoder = Decoder(model(family), knowing(inputs(), family, **first))
    ours = decoder.generate(**inputs(), **first)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1
    again = next_turn(ours.sequences, inputs())
    want = model(family).generate(**again, max_new_tokens=NEW)
    drafter = knowing(again, family)
    for cache in (ours.past_key_values, theirs.past_key_values):
        for target in (Decoder(model(family), drafter), Decoder(model(family)), model(family)):
            got = target.generate(**again, max_new_tokens=NEW, past_key_values=copy.deepcopy(cache))
            assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_a_cached_prefix_is_not_forwarded_again(family: str):
    first = Decoder(model(family)).generate(**one(), max_new_tokens=13, return_dict_in_generate=True)
    again = next_turn(first.sequences, one())
    decoder = Decoder(model(family))
    with columns_of(model(family)) as widths:
        decoder.generate(**again, max_new_tokens=5, past_key_values=first.past_key_values)
    # the last token of the first turn, three from the user, then one at a time
    assert widths[:5] == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("make", [DynamicCache, lambda: DynamicCache(config=model().config)])
def test_a_cache_of_the_callers_is_filled_as_generate_fills_it(make: Callable[[], DynamicCache]):
    """The documented chat loop: one cache object handed to every call."""
    ours, theirs = make(), make()
    inputs = {k: v.clone() for k, v in batch().items()}
    for _ in range(3):
        want = model().generate(**inputs, max_new_tokens=7, past_key_values=theirs)
        decoder = Decoder(model(), knowing(inputs, max_new_tokens=7))
        assert torch.equal(decoder.generate(**inputs, max_new_tokens=7, past_key_values=ours), want)
        assert ours.get_seq_length() == theirs.get_seq_length() == want.shape[1] - 1
        inputs = next_turn(want, inputs)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        real = batch()["attention_mask"].bool()
        for row, mask in enumerate(real):
            start = int((~mask).sum())
            torch.testing.assert_close(mine.keys[row, :, start:], other.keys[row, :, start:], atol=1e-4, rtol=1e-4)


def test_a_static_cache_of_an_earlier_call_is_read():
    cache = StaticCache(config=model().config, max_cache_len=64)
    first = model().generate(**one(), max_new_tokens=9, past_key_values=cache)
    again = next_turn(first, one())
    want = model().generate(**again, max_new_tokens=NEW)
    got = Decoder(model(), knowing(again)).generate(**again, max_new_tokens=NEW, past_key_values=cache)
    assert torch.equal(got, want)
    static = Decoder(model(), knowing(one())).generate(**one(), max_new_tokens=NEW, cache_implementation="static")
    assert torch.equal(static, model().generate(**one(), max_new_tokens=NEW))


def test_rows_that_finish_early_leave_a_cache_generate_can_go_on_with():
    text = new_tokens(model(), batch(), max_new_tokens=NEW)
    settings = {"max_new_tokens": NEW, "eos_token_id": [text[0][5], text[1][11]], "return_dict_in_generate": True}
    theirs = model().generate(**batch(), **settings)
    ours = Decoder(model(), OracleDrafter(text, wrong=0.2)).generate(**batch(), **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    again = next_turn(ours.sequences, batch())
    want = model().generate(**again, max_new_tokens=8, past_key_values=theirs.past_key_values)
    assert torch.equal(model().generate(**again, max_new_tokens=8, past_key_values=ours.past_key_values), want)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_stats_account_for_every_token_and_forward():
    decoder = Decoder(model(), knowing(batch()))
    assert decoder.stats is None
    with columns_of(model()) as widths:
        decoder.generate(**batch(), max_new_tokens=NEW)
    stats = decoder.stats
    assert stats is not None
    assert (stats.drafter, stats.verifier, stats.lossless) == ("oracle", "standard", True)
    assert (stats.rows, stats.prompt_tokens, stats.new_tokens) == (3, sum(map(len, prompts())), 3 * NEW)
    assert sum(sum(step.emitted) for step in stats.steps) == 3 * NEW
    assert all(e == a + 1 for step in stats.steps for a, e in zip(step.accepted, step.emitted, strict=True))
    assert [step.columns for step in stats.steps] == widths
    assert stats.mat == 3 * NEW / stats.row_forwards
    assert 1 < stats.mat <= 5
    assert 0 < sum(stats.seconds_by_phase().values()) <= stats.seconds
    assert 0 < stats.overhead < 1
    assert stats.summary()["target_forwards"] == len(widths)
    decoder.generate(**one(), max_new_tokens=2)
    assert decoder.stats is not stats
    assert decoder.stats.new_tokens == 2, "stats are of the last call"


# ---- errors ----------------------------------------------------------------------------------------------------------

# what is asked -> words of the message: the argument's name, then the remedy
REFUSED: dict[str, tuple[dict, str]] = {
    "beams": ({"num_beams": 2}, r"num_beams=2.*num_beams=1 or model\.generate"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, r"penalty_alpha.*model\.generate"),
    "dola": ({"dola_layers": "high"}, r"dola_layers.*model\.generate"),
    "guidance": ({"guidance_scale": 1.5}, r"guidance_scale=1\.5.*model\.generate"),
    "assistant": ({"assistant_model": "a model"}, r"assistant_model.*leave it out"),
    "hf prompt lookup": ({"prompt_lookup_num_tokens": 3}, r"prompt_lookup_num_tokens.*leave it out"),
    "another recipe": ({"custom_generate": "someone/recipe"}, r"custom_generate.*leave it out"),
    "negative prompt": ({"negative_prompt_ids": torch.tensor([[5]])}, r"negative_prompt_ids.*leave it out"),
    "synced gpus": ({"synced_gpus": True}, r"synced_gpus=True"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, r"output_attentions.*run model\("),
    "hidden states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        r"output_hidden_states.*run model\(",
    ),
    "right padding": ({"attention_mask": torch.tensor([[1] * 9 + [0]])}, r"attention_mask.*padding_side = 'left'"),
    "a hole": ({"attention_mask": torch.tensor([[1] * 4 + [0] + [1] * 5])}, r"attention_mask.*padding_side = 'left'"),
    "nothing but padding": ({"attention_mask": torch.zeros(1, 10).long()}, r"attention_mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_request_names_the_argument_and_the_remedy(name: str):
    settings, message = REFUSED[name]
    decoder = Decoder(model(), "prompt-lookup")
    with pytest.raises(UsageError, match=message):
        decoder.generate(**one(), max_new_tokens=4, **settings)
    assert decoder.generate(**one(), max_new_tokens=4).shape == (1, 14), "the next request works"


def test_strategies_hidden_in_a_generation_config_are_refused_too():
    config = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(UsageError, match="prompt_lookup_num_tokens"):
        Decoder(model()).generate(**one(), generation_config=config)
    with pytest.raises(UsageError, match="num_beams=3"):
        model().generate(**one(), num_beams=3, custom_generate=Decoder(model()))


def test_inputs_that_cannot_be_decoded_say_why():
    decoder = Decoder(model())
    with pytest.raises(UsageError, match="inputs_embeds"):
        decoder.generate(inputs_embeds=torch.zeros(1, 4, 32), max_new_tokens=4)
    with pytest.raises(UsageError, match=rf"input_ids contains {VOCABULARY}.*{VOCABULARY} tokens"):
        decoder.generate(torch.tensor([[5, VOCABULARY]]), max_new_tokens=4)
    with pytest.raises(UsageError, match=r"input_ids.*200 tokens.*128.*shorten"):
        decoder.generate(torch.full((1, 200), 5), max_new_tokens=4)
    long = Decoder(model()).generate(**one(), max_new_tokens=9, return_dict_in_generate=True).past_key_values
    with pytest.raises(UsageError, match=r"past_key_values holds 18 tokens and input_ids 10.*whole text"):
        decoder.generate(**one(), max_new_tokens=4, past_key_values=long)
    with pytest.raises(UsageError, match=r"streamer takes one sequence, this batch has 3"):
        decoder.generate(**batch(), max_new_tokens=4, streamer=Collecting())


def test_a_decoder_serves_its_own_model_in_eval_mode():
    with pytest.raises(UsageError, match=r"another model.*Decoder\(model"):
        model("mistral").generate(**one(), custom_generate=Decoder(model()), max_new_tokens=4)
    training = copy.deepcopy(model()).train()
    with pytest.raises(UsageError, match=r"training mode.*model\.eval\(\)"):
        Decoder(training)
    smaller = copy.deepcopy(model()).eval()
    smaller.resize_token_embeddings(50)
    with pytest.raises(CompatibilityError, match=r"draft.*vocabulary has 50 tokens"):
        Decoder(model(), DraftModel(smaller))


class Failing(LogitsProcessor):
    def __init__(self, at: int):
        self.left = at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise OSError("the user's own processor failed")
        return scores


@pytest.mark.parametrize("drafter", ["oracle", "token-recycling", "the model itself"])
def test_a_request_that_fails_leaves_no_trace(drafter: str):
    drafters = {"oracle": knowing(one()), "the model itself": DraftModel(model(), branching=(2, 1))}
    decoder = Decoder(model(), drafters.get(drafter, drafter))
    streamer = Collecting()
    with pytest.raises(OSError, match="own processor"):
        decoder.generate(**one(), max_new_tokens=NEW, logits_processor=[Failing(7)], streamer=streamer)
    want = model().generate(**one(), max_new_tokens=NEW)
    assert torch.equal(decoder.generate(**one(), max_new_tokens=NEW), want)
    assert torch.equal(model().generate(**one(), max_new_tokens=NEW), want)
