"""What every drafter with a trained head must hold: the text, the law, its files, targets it was not made for."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import left_padded, new_tokens
from heads_suite import overfit, random_head
from test_law import exact_pairs, p_value
from test_training_free import prompts
from tiny_models import tiny_gemma2, tiny_llama, tiny_mistral
from transformers import BloomConfig, BloomForCausalLM

from specdec import Decoder, registry
from specdec.bench.enumeration import Scripted, law, total_variation
from specdec.cli.train_heads import METHODS
from specdec.drafters.token_recycling import TokenRecycling
from specdec.errors import CompatibilityError, UsageError
from specdec.heads import HeadDrafter
from specdec.target import Target
from specdec.training.heads import head_class, methods


def drafter(name: str, model, seed: int = 0, **options) -> HeadDrafter:
    return registry.drafter_class(name)(checkpoint=random_head(name, Target(model), seed), **options)


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma2, tiny_mistral], ids=["llama", "gemma2", "mistral"])
def model(request):
    return request.param(num_hidden_layers=4)


def test_every_head_has_a_command():
    assert sorted(METHODS) == methods()


@pytest.mark.parametrize("name", methods())
class TestText:
    def test_greedy_ids_are_generates_own(self, model, name: str):
        decoder = Decoder(model, drafter(name, model))
        for inputs in ({"input_ids": prompts()[0][None]}, left_padded(prompts())):
            want = new_tokens(model, inputs, do_sample=False, max_new_tokens=40)
            assert new_tokens(decoder, inputs, do_sample=False, max_new_tokens=40) == want
            settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": want[0][10]}
            assert new_tokens(decoder, inputs, **settings) == new_tokens(model, inputs, **settings)

    def test_a_prompt_in_chunks_changes_nothing(self, model, name: str):
        inputs = left_padded(prompts())
        want = new_tokens(model, inputs, do_sample=False, max_new_tokens=25)
        got = new_tokens(
            Decoder(model, drafter(name, model), prefill_chunk=3), inputs, do_sample=False, max_new_tokens=25
        )
        assert got == want

    @pytest.mark.parametrize("size", [1, 2, 5, 20])
    def test_any_size_of_tree(self, name: str, size: int):
        model = tiny_llama()
        inputs = left_padded(prompts())
        want = new_tokens(model, inputs, do_sample=False, max_new_tokens=20)
        assert new_tokens(Decoder(model, drafter(name, model, size=size)), inputs, max_new_tokens=20) == want

    @pytest.mark.parametrize("new", [1, 2, 3])
    def test_a_request_of_a_few_tokens(self, name: str, new: int):
        model = tiny_llama(max_position_embeddings=16)
        inputs = {"input_ids": prompts((13,))[0][None]}  # the context ends with the request
        want = new_tokens(model, inputs, do_sample=False, max_new_tokens=new)
        assert new_tokens(Decoder(model, drafter(name, model)), inputs, do_sample=False, max_new_tokens=new) == want

    def test_a_next_turn_from_the_cache_of_the_last(self, name: str):
        model = tiny_llama()
        decoder = Decoder(model, drafter(name, model))
        first = decoder.generate(prompts()[0][None], do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
        want = model.generate(ids, do_sample=False, max_new_tokens=12)
        got = decoder.generate(ids, do_sample=False, max_new_tokens=12, past_key_values=first.past_key_values)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", methods())
def test_the_law_of_the_whole_loop_is_exact(name: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama(vocab_size=4, num_hidden_layers=4)
    decoder = Decoder(model, drafter(name, model, size=5))
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    settings = {"temperature": 0.8, "top_k": 3}
    drafted, verify = [], decoder.verifier.verify

    def counting(state, proposals, output):
        drafted.extend(len(p.tree) - 1 for p in proposals if p is not None and p.tree is not None)
        return verify(state, proposals, output)

    monkeypatch.setattr(decoder.verifier, "verify", counting)

    def generate(random: Scripted) -> tuple[int, ...]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        # the first token has no draft where heads need a hidden state, so the pair after it is looked at
        return tuple(decoder.generate(ids, max_new_tokens=2, do_sample=True, **settings)[0, 5:].tolist())

    assert total_variation(law(generate), exact_pairs(model, ids, **settings)) < 1e-6

    def three(random: Scripted) -> tuple[int, ...]:
        monkeypatch.setattr("specdec.surface.Randomness", lambda seed, device: random)
        return tuple(decoder.generate(ids, max_new_tokens=3, do_sample=True, **settings)[0, 5:].tolist())

    want = {}
    for (a,), p in first_tokens(model, ids, **settings).items():
        for pair, q in exact_pairs(model, torch.cat([ids, torch.tensor([[a]])], 1), **settings).items():
            want[(a, *pair)] = p * q
    assert total_variation(law(three), want) < 1e-6
    assert any(drafted)


def first_tokens(model, ids, **settings) -> dict[tuple[int], float]:
    found: dict[tuple[int], float] = {}
    for pair, p in exact_pairs(model, ids, **settings).items():
        found[pair[:1]] = found.get(pair[:1], 0.0) + p
    return found


@pytest.mark.parametrize("name", methods())
def test_sampling_many_rows_passes_chi_square(name: str):
    model = tiny_llama(vocab_size=32)
    decoder = Decoder(model, drafter(name, model, size=6))
    assert p_value(decoder, model, torch.tensor([[5, 9, 2, 5, 9]]), 1500, temperature=0.9, top_k=6) > 1e-4


LEARNING = {
    "medusa": {"num_heads": 3, "shared_output": False},
    "chimera": {"num_heads": 3},
    "eagle3": {"steps": 4},
    # linear maps of 32 channels cannot tell 70 positions apart
    "hidden-transfer": {"num_steps": 3, "transfer_layers": [1, 1, 1], "share": 1.0, "hidden_size": 128, "updates": 400},
}


@pytest.mark.parametrize("name", methods())
def test_four_texts_learned_by_heart_are_drafted_whole(name: str):
    """Training and decoding agree, or what one learns the other could not use."""
    options = dict(LEARNING[name])
    model = tiny_llama(hidden_size=options.pop("hidden_size", 32), num_hidden_layers=4)
    accuracy, mat, best = overfit(name, model=model, **options)
    assert min(accuracy) > 0.99
    assert mat > 0.95 * best


@pytest.mark.parametrize("name", methods())
def test_a_checkpoint_comes_back_with_the_same_drafts(name: str, tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    made = random_head(name, Target(model))
    made.config.acceptance = [[0.5, 0.2, 0.1]] * made.depths
    folder = made.save_pretrained(tmp_path / "head", "Made for a test.")
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    seen = []
    for head in (made, folder):
        decoder = Decoder(model, registry.drafter_class(name)(checkpoint=head))
        trees, propose = [], decoder.drafter.propose
        decoder.drafter.propose = lambda state, propose=propose, trees=trees: [
            (trees.append(p.tree.tokens.tolist()), p)[1] for p in propose(state)
        ]
        decoder.generate(torch.tensor([[5, 9, 33]]), do_sample=False, max_new_tokens=20)
        seen.append(trees)
    assert seen[0] == seen[1]
    assert max(map(len, seen[0])) > 1


@pytest.mark.parametrize("name", methods())
def test_targets_it_was_not_made_for_are_refused(name: str):
    head = random_head(name, Target(tiny_llama(num_hidden_layers=4)))
    made = registry.drafter_class(name)(checkpoint=head)
    for other, said in (
        (tiny_llama(hidden_size=16, num_hidden_layers=4), "hidden_size=32, this target has 16"),
        (tiny_llama(vocab_size=80, num_hidden_layers=4), "vocab_size=64, this target has 80"),
        (tiny_llama(num_hidden_layers=5), "num_hidden_layers=4, this target has 5"),
    ):
        with pytest.raises(CompatibilityError, match=said):
            Decoder(other, made)


@pytest.mark.parametrize("name", methods())
def test_another_methods_head_is_refused(name: str):
    other = next(m for m in methods() if m != name)
    head = random_head(other, Target(tiny_llama(num_hidden_layers=4)))
    with pytest.raises(UsageError, match=f"holds {other} heads, not {name}"):
        registry.drafter_class(name)(checkpoint=head)


@pytest.mark.parametrize("name", methods())
def test_a_model_of_chains_gets_chains_or_a_reason(name: str):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.3, eos_token_id=None)
    bloom = BloomForCausalLM(config).eval()
    made = drafter(name, bloom)
    if made.needs.hooks:
        with pytest.raises(CompatibilityError, match="verify trees"):
            Decoder(bloom, made)
        return
    decoder = Decoder(bloom, made)
    inputs = {"input_ids": prompts()[0][None]}
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    assert new_tokens(decoder, inputs, **settings) == new_tokens(bloom, inputs, **settings)


@pytest.mark.parametrize("name", methods())
def test_half_precision_targets_take_heads_stored_in_float32(name: str):
    model = tiny_llama(num_hidden_layers=4).bfloat16()
    decoder = Decoder(model, drafter(name, model))
    assert decoder.generate(prompts()[0][None], do_sample=False, max_new_tokens=10).shape == (1, 19)


@pytest.mark.parametrize("name", methods())
def test_rows_do_not_influence_each_other(name: str):
    """The drafts of a row are the same alone and in a batch of rows that end at different times."""
    model = tiny_llama(num_hidden_layers=4)
    decoder = Decoder(model, drafter(name, model))
    seen: dict[int, list] = {}
    propose = decoder.drafter.propose

    def recording(state):
        made = propose(state)
        for row, p in zip(state.rows, made, strict=True):
            seen.setdefault(row.index, []).append(p.tree.tokens.tolist())
        return made

    decoder.drafter.propose = recording
    texts = prompts()
    eos = new_tokens(model, left_padded(texts), do_sample=False, max_new_tokens=30)[1][6]
    decoder.generate(**left_padded(texts), do_sample=False, max_new_tokens=30, eos_token_id=eos)
    together, alone = dict(seen), []
    for text in texts:
        seen.clear()
        decoder.generate(text[None], do_sample=False, max_new_tokens=30, eos_token_id=eos)
        alone.append(seen[0])
    for b, trees in enumerate(alone):
        assert [sorted(t) for t in together[b][: len(trees)]] == [sorted(t) for t in trees]


@pytest.mark.parametrize("name", methods())
def test_options_of_a_fresh_head_are_plain(name: str):
    """They become ``--set key=value``."""
    for option in list(inspect.signature(head_class(name).fresh).parameters.values())[1:]:
        assert option.kind is option.VAR_KEYWORD or option.default is not option.empty


def test_options_of_heads_do_not_leak_into_drafters_without():
    with pytest.raises(UsageError):
        registry.drafter("token-recycling", checkpoint="x")
    assert not issubclass(TokenRecycling, HeadDrafter)
