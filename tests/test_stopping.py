"""A row ends at exactly the token where ``generate()`` ends it, also in the middle of an accepted path."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens, word_tokenizer
from families import DECODED, PAD, VOCABULARY, build
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation import MaxTimeCriteria

from specdec import Decoder, Drafter
from specdec.drafters.draft_model import DraftModel
from specdec.errors import UsageError

NEW = 40


@functools.cache
def model() -> PreTrainedModel:
    return build(next(family for family in DECODED if family.name == "llama"))


@functools.cache
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (9, 4, 6)]


@functools.cache
def texts() -> list[list[int]]:
    """How the rows go on when nothing stops them."""
    return [new_tokens(model(), {"input_ids": prompt[None]}, max_new_tokens=NEW)[0] for prompt in prompts()]


# all of these draft right past the end, for they know nothing of it
DRAFTERS: dict[str, Callable[[], Drafter | str]] = {
    "none": lambda: "none",
    "chain": lambda: OracleDrafter(texts(), depth=6),
    "tree": lambda: OracleDrafter(texts(), depth=5, decoys=2),
    "tree with mistakes": lambda: OracleDrafter(texts(), depth=5, wrong=0.3, decoys=1),
    "the model itself": lambda: DraftModel(model(), length=5),
}


@pytest.fixture(params=DRAFTERS, scope="module")
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(model(), DRAFTERS[request.param](), tokenizer=word_tokenizer())


def one() -> dict[str, torch.Tensor]:
    return {"input_ids": prompts()[0][None]}


def batch() -> dict[str, torch.Tensor]:
    return left_padded(prompts(), PAD)


def check(decoder: Decoder, inputs: dict, **settings) -> list[list[int]]:
    """The Decoder's sequences are ``generate()``'s; returns what was added."""
    settings = {"max_new_tokens": NEW, **settings}
    want = model().generate(**inputs, **settings)
    got = decoder.generate(**inputs, **settings)
    assert torch.equal(got, want), f"{got.tolist()} is not {want.tolist()}"
    return got[:, inputs["input_ids"].shape[1] :].tolist()


def first_at(text: list[int], start: int) -> int:
    """The first position from ``start`` whose token has not occurred before."""
    return next(i for i in range(start, len(text)) if text[i] not in text[:i])


@pytest.mark.parametrize("position", range(9))
def test_an_end_token_stops_there_whatever_was_drafted_after_it(decoder: Decoder, position: int):
    at = first_at(texts()[0], position)
    added = check(decoder, one(), eos_token_id=texts()[0][at])
    assert added[0] == texts()[0][: at + 1]


def test_the_end_token_stands_inside_an_accepted_path():
    """The premise of the tests above: right tokens after the end were drafted and not emitted."""
    decoder = Decoder(model(), OracleDrafter(texts(), depth=6))
    at = first_at(texts()[0], 3)
    decoder.generate(**one(), max_new_tokens=NEW, eos_token_id=texts()[0][at])
    assert decoder.stats is not None
    assert [step.emitted for step in decoder.stats.steps] == [[at + 1]]
    assert 0 < at < 6


def test_the_first_of_several_end_tokens_stops(decoder: Decoder):
    late, early = first_at(texts()[0], 12), first_at(texts()[0], 4)
    added = check(decoder, one(), eos_token_id=[texts()[0][late], texts()[0][early], 1])
    assert len(added[0]) == early + 1


def test_each_row_stops_at_its_own_end_token(decoder: Decoder):
    """Rows finish after different numbers of tokens; finished rows are filled with the pad token."""
    ends = [texts()[row][first_at(texts()[row], start)] for row, start in enumerate((2, 11, 19))]
    added = check(decoder, batch(), eos_token_id=ends)
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), NEW) for row in added]
    assert len(set(lengths)) > 1, "rows should end at different times"
    assert all(set(row[n:]) <= {PAD} for row, n in zip(added, lengths, strict=True))


def test_an_end_token_in_the_first_step_stops_at_once(decoder: Decoder):
    assert check(decoder, one(), eos_token_id=texts()[0][0]) == [texts()[0][:1]]


@pytest.mark.parametrize("new", [1, 2, 3, 5, 6, 7, 8])
def test_max_new_tokens_is_exact(decoder: Decoder, new: int):
    assert check(decoder, one(), max_new_tokens=new) == [texts()[0][:new]]
    check(decoder, batch(), max_new_tokens=new)


def test_max_length_counts_prompt_and_padding(decoder: Decoder):
    added = check(decoder, batch(), max_new_tokens=None, max_length=9 + 5)
    assert all(len(row) == 5 for row in added)


def test_generate_stops_after_its_own_default_length(decoder: Decoder):
    check(decoder, one(), max_new_tokens=None)


def test_text_beyond_the_trained_context_goes_on_as_generate_does(decoder: Decoder):
    """Rotary models run past max_position_embeddings; drafts stop there, the text does not."""
    long = model().config.max_position_embeddings + 10
    check(decoder, one(), max_new_tokens=long)


@pytest.mark.parametrize("words", [1, 2, 3])
@pytest.mark.parametrize("position", [1, 4, 7])
def test_stop_strings_end_inside_and_across_tokens(decoder: Decoder, words: int, position: int):
    tokenizer = word_tokenizer()
    spoken = tokenizer.decode(texts()[0][position : position + words])
    # from the middle of a word to the middle of a word
    string = spoken[1:-1] if words > 1 else spoken
    settings = {"stop_strings": [string, "never said"], "max_new_tokens": NEW}
    want = model().generate(**one(), **settings, tokenizer=tokenizer)
    got = decoder.generate(**one(), **settings)  # the Decoder has the tokenizer
    assert torch.equal(got, want)
    assert torch.equal(Decoder(model(), decoder.drafter).generate(**one(), **settings, tokenizer=tokenizer), want)
    assert want.shape[1] - len(prompts()[0]) <= position + words < NEW


def test_stop_strings_stop_each_row_of_a_batch(decoder: Decoder):
    tokenizer = word_tokenizer()
    strings = [tokenizer.decode(text[k : k + 2])[1:] for text, k in zip(texts(), (3, 8, 14), strict=True)]
    want = model().generate(**batch(), max_new_tokens=NEW, stop_strings=strings, tokenizer=tokenizer, eos_token_id=1)
    got = decoder.generate(**batch(), max_new_tokens=NEW, stop_strings=strings, eos_token_id=1)
    assert torch.equal(got, want)


def test_stop_strings_without_a_tokenizer_name_the_remedy():
    with pytest.raises(UsageError, match=r"stop_strings.*tokenizer"):
        Decoder(model()).generate(**one(), stop_strings=["x"], max_new_tokens=4)


class Sums(StoppingCriteria):
    """Stops a row when its last two tokens add up to one of ``sums``."""

    def __init__(self, sums: set[int]):
        self.sums = sums

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.tensor([int(row[-2:].sum()) in self.sums for row in input_ids])


@pytest.mark.parametrize("position", [1, 2, 5, 9])
def test_a_custom_criterion_stops_in_the_middle_of_a_path(decoder: Decoder, position: int):
    criterion = Sums({sum(texts()[0][position - 1 : position + 1])})
    added = check(decoder, one(), stopping_criteria=[criterion])
    assert len(added[0]) <= position + 1


def test_a_custom_criterion_stops_each_row_by_itself(decoder: Decoder):
    criterion = Sums({sum(text[k - 1 : k + 1]) for text, k in zip(texts(), (3, 9, 16), strict=True)})
    check(decoder, batch(), stopping_criteria=[criterion], eos_token_id=1)


def test_a_criterion_sees_the_scores_of_the_tokens_so_far(decoder: Decoder):
    """And not those of drafted tokens that it has not been asked about yet."""
    seen: dict[str, list[int]] = {"want": [], "got": []}

    class Watching(StoppingCriteria):
        def __init__(self, into: list[int]):
            self.into = into

        def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
            self.into.append(len(scores))
            return torch.tensor([float(scores[-1].max()) > 4.5 and len(scores) > 3])

    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
    want = model().generate(**one(), **settings, stopping_criteria=[Watching(seen["want"])])
    got = decoder.generate(**one(), **settings, stopping_criteria=[Watching(seen["got"])])
    assert torch.equal(got.sequences, want.sequences)
    assert seen["got"] == seen["want"] == list(range(1, len(want.scores) + 1))
    assert len(got.scores) == len(want.scores)


def test_max_time_stops_after_the_token_that_exceeds_it(decoder: Decoder):
    assert check(decoder, one(), max_time=1e-9) == [texts()[0][:1]]
    assert check(decoder, one(), max_time=3600.0) == [texts()[0]]
    past = MaxTimeCriteria(max_time=10.0, initial_timestamp=time.time() - 20)
    assert check(decoder, one(), stopping_criteria=[past]) == [texts()[0][:1]]


@pytest.mark.parametrize("minimum", [2, 5, 11])
def test_min_new_tokens_holds_an_end_token_back(decoder: Decoder, minimum: int):
    at = first_at(texts()[0], 1)
    added = check(decoder, one(), eos_token_id=texts()[0][at], min_new_tokens=minimum)
    assert len(added[0]) >= minimum
    assert texts()[0][at] not in added[0][:minimum]


def test_min_length_holds_an_end_token_back_in_padded_rows(decoder: Decoder):
    ends = [text[first_at(text, 2)] for text in texts()]
    check(decoder, batch(), eos_token_id=ends, min_length=9 + 6)


def test_a_forced_end_token_comes_with_the_last_token(decoder: Decoder):
    added = check(decoder, batch(), forced_eos_token_id=77, eos_token_id=77, max_new_tokens=12)
    assert all(row[-1] in (77, PAD) for row in added)


def test_sampling_stops_at_the_same_token(decoder: Decoder):
    """With top_k=1 the sampled text is the greedy one, decided by the sampling rules."""
    at = first_at(texts()[0], 3)
    settings = {"do_sample": True, "top_k": 1, "eos_token_id": texts()[0][at], "max_new_tokens": NEW}
    assert new_tokens(decoder, one(), **settings) == [texts()[0][: at + 1]]
    assert new_tokens(decoder, one(), do_sample=True, top_k=1, max_new_tokens=7) == [texts()[0][:7]]
