"""The packaged models: they load, fit, keep text exact, and were not trained on their prompts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from specdec import Decoder, zoo
from specdec.training.heads import methods
from specdec.training.recipe import RECIPES

TINY = Path(zoo.__file__).parent / "tiny"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = [
    "Once upon a time, there was a fox.\nIt ran.",
    "  leading and  double spaces \n\n",
    "def add(a, b):\n    if a:\n        return a + b\n\treturn 12345\n",
    "Grüße aus Köln, “quoted” … 日本 🙂",
    "",
]


def test_names_paths_and_prompts() -> None:
    assert zoo.names() == ["tiny", "tiny-draft", "tiny-image", "tiny-image-draft", "tiny-lexical-units"]
    assert zoo.path("tiny") == TINY / "target"
    assert zoo.path("gpt2") is None
    prompts = zoo.prompts()
    assert Counter(p.category for p in prompts) == {
        c: 8 for c in ("stories", "qa", "math", "code", "translation", "continuation")
    }
    assert len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == 48
    tasks = zoo.tasks()
    assert Counter(t.category for t in tasks) == {"math": 50, "translation": 50}
    assert all(t.reference for t in tasks)
    assert len({t.prompt for t in (*prompts, *tasks)}) == 148


def test_the_models_are_at_most_20_megabytes() -> None:
    folders = {path.name: sum(f.stat().st_size for f in path.rglob("*")) for path in TINY.iterdir() if path.is_dir()}
    assert folders["target"] + folders["draft"] < 20e6
    assert sum(size for name, size in folders.items() if name not in ("target", "draft", "heads")) < 12e6


def test_both_models_load_from_the_package_with_one_vocabulary() -> None:
    target, tokenizer = zoo.load("tiny")
    draft, draft_tokenizer = zoo.load("tiny-draft", dtype=torch.float32)
    assert target.dtype == torch.bfloat16
    assert draft.dtype == torch.float32
    assert 6e6 < target.num_parameters() < 12e6
    assert draft.num_parameters() < 1.2e6
    assert tokenizer.get_vocab() == draft_tokenizer.get_vocab()
    assert len(tokenizer) == target.config.vocab_size == draft.config.vocab_size == 8192
    for model in (target, draft):
        assert model.config.max_position_embeddings == 2048
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_exactly_and_equals_sentencepiece(text: str) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("tiny"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "target" / "tokenizer.model"))
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[1:] == pieces.encode(text)


def test_prompts_are_the_length_their_category_promises() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("tiny"))
    for prompt in zoo.prompts():
        length = len(tokenizer(prompt.prompt).input_ids)
        assert (300 if prompt.category == "continuation" else 10) <= length <= 700


def test_the_target_reads_stories_better_than_the_draft_and_both_better_than_chance() -> None:
    from specdec.training.report import bits_per_character

    stories = [p.prompt for p in zoo.prompts() if p.category == "stories"]
    bits = []
    for name in ("tiny", "tiny-draft"):
        model, tokenizer = zoo.load(name, dtype=torch.float32)
        bits.append(bits_per_character(model, tokenizer, stories))
    assert bits[0] < bits[1] < 2.0


def test_a_damaged_or_missing_checkpoint_gives_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(TINY / "draft", torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    monkeypatch.setattr(zoo, "_FOLDERS", {"torn": torn, "gone": tmp_path / "gone"})
    for name in ("torn", "gone"):
        with pytest.raises(zoo.ZooError, match="reinstall specdec"):
            zoo.load(name)
    with pytest.raises(zoo.ZooError, match="choose one of"):
        zoo.load("tinny")


def test_the_model_without_a_tokenizer_is_loaded_another_way() -> None:
    with pytest.raises(zoo.ZooError, match=r"tiny_image\.load"):
        zoo.load("tiny-image")


def test_the_loss_curves_of_both_models_ship() -> None:
    records = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    for name in ("target", "draft"):
        losses = [point["loss"] for point in records[name]["loss"]]
        assert losses[-1] < losses[0] - 2
        assert (TINY / f"loss-{name}.png").is_file()


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data does not lie beside the checkout")
def test_no_prompt_is_in_the_training_text() -> None:
    from specdec.training.data import leaked, read_sources
    from specdec.training.recipe import load_recipe

    documents = read_sources(load_recipe("tiny"), SHARED)
    train = [text for source in documents.values() for text in source.train]
    assert leaked([p.prompt for p in (*zoo.prompts(), *zoo.tasks())], train) == []
    assert leaked([train[0]], train) == [train[0]]  # the check can fail


HEADS = zoo.heads("tiny")


class TestHeads:
    def test_every_method_ships_one_and_together_they_are_small(self) -> None:
        assert sorted(HEADS) == methods()
        assert sum(file.stat().st_size for folder in HEADS.values() for file in folder.rglob("*")) < 12e6

    @pytest.mark.parametrize("name", sorted(HEADS))
    def test_the_table_of_acceptance_is_what_the_checkpoints_say(self, name: str) -> None:
        acceptance = json.loads((HEADS[name] / "config.json").read_text())["acceptance"]
        cells = [f"{row[0]:.3f}, {sum(row[:5]):.3f}" for row in acceptance[:4]]
        assert " | ".join(cells) in (TINY / "heads" / "README.md").read_text()

    @pytest.mark.parametrize("name", sorted(HEADS))
    def test_it_drafts_for_tiny_and_says_how_it_was_made(self, name: str) -> None:
        model, tokenizer = zoo.load("tiny", torch.float32)
        model.eval()
        decoder = Decoder(model, name, checkpoint=HEADS[name])
        tokens = steps = 0
        for prompt in zoo.prompts("tiny")[::12]:
            inputs = tokenizer(prompt.prompt, return_tensors="pt")
            want = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            assert torch.equal(decoder.generate(**inputs, max_new_tokens=32, do_sample=False), want)
            tokens, steps = tokens + decoder.stats.new_tokens, steps + len(decoder.stats.steps)
        assert tokens / steps > 1.4
        assert decoder.drafter.head.config.target_id == "tiny"
        record = json.loads((HEADS[name] / "training.json").read_text())
        recipe = yaml.safe_load((RECIPES / "methods" / f"{name}.yaml").read_text())
        made = record["settings"] | record["options"]
        assert {key: made[key] for key in recipe} == recipe
        assert "/" not in (HEADS[name] / "config.json").read_text(), "no path of the machine that trained it"
