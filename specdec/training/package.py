"""Bring trained weights, prompts, loss curves and a model card into the folder that ships."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from specdec.heads.checkpoint import replace_folder

from .data import Documents, read_sources
from .prompts import held_out_prompts, held_out_tasks
from .recipe import Recipe, RecipeError
from .report import bits_per_character

LICENCES = {
    "tinystories": ("TinyStories (Eldan & Li 2023), first part of train", "CDLA-Sharing-1.0"),
    "fairytaleqa_stories": ("FairytaleQA stories, train split (Xu et al. 2022)", "Apache-2.0; texts from Gutenberg"),
    "fairytaleqa_questions": ("FairytaleQA questions, train split", "Apache-2.0"),
    "childrens_classics": ("children's classics, from mlschmitt/classic-books-markdown", "public domain (US)"),
    "gsm8k": ("GSM8K train (Cobbe et al. 2021)", "MIT"),
    "mbpp": ("MBPP train, tasks 601-974 (Austin et al. 2021)", "CC BY 4.0"),
    "europarl": ("Europarl v7 de-en, first 10,000 pairs (Koehn 2005)", "no known restriction; cite it"),
    "instructions": ("instruction data of rasbt/LLMs-from-scratch", "Apache-2.0"),
    "seed_tasks": ("Self-Instruct seed tasks (Wang et al. 2023)", "Apache-2.0"),
}


def package(recipe: Recipe, data: Path, run: Path, to: Path, characters: int = 100_000, new_tokens: int = 128) -> Path:
    """Fill the folder `to` from the trained models under `run`; measures held-out text and writes samples."""
    for name in recipe.models:
        if not (run / name / "model.safetensors").is_file():
            raise RecipeError(
                f"--out {str(run)!r} has no trained {name!r}: run `specdec train lm --model {name}` first"
            )
    documents = read_sources(recipe, data)
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    records: dict[str, Any] = {}
    for name in recipe.models:
        shutil.copytree(run / name, part / name, ignore=shutil.ignore_patterns("training.json", "loss.png"))
        shutil.copy(run / name / "loss.png", part / f"loss-{name}.png")
        records[name] = json.loads((run / name / "training.json").read_text(encoding="utf-8"))
        if name != "target":
            (part / name / "tokenizer.model").unlink()  # the target's folder has it
    prompts = held_out_prompts(recipe, documents)
    for file, rows in (("prompts.jsonl", prompts), ("tasks.jsonl", held_out_tasks(recipe, documents))):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (part / file).write_text("\n".join(lines) + "\n", encoding="utf-8")

    mixed = np.load(run / "data" / "blocks.npy", mmap_mode="r").size
    bits, samples = {}, []
    for name in recipe.models:
        model, tokenizer = _load(part / name)
        bits[name] = {
            source: bits_per_character(model, tokenizer, _excerpt(recipe, texts, characters))
            for source, texts in documents.items()
            if texts.held_out
        }
        records[name]["held_out_bits_per_character"] = {k: round(v, 4) for k, v in bits[name].items()}
        if name == "target":
            samples = _samples(model, tokenizer, prompts, new_tokens)
    (part / "training.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (part / "README.md").write_text(card(recipe, records, bits, samples, mixed), encoding="utf-8")
    return replace_folder(part, to)


def _load(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _excerpt(recipe: Recipe, texts: Documents, characters: int) -> list[str]:
    """A seeded choice of held-out documents with about `characters` characters together."""
    pool = list(texts.held_out)
    random.Random(recipe.seed).shuffle(pool)
    chosen: list[str] = []
    while pool and sum(map(len, chosen)) < characters:
        chosen.append(pool.pop())
    return chosen


def _samples(model: Any, tokenizer: Any, prompts: list[dict[str, Any]], new_tokens: int) -> list[tuple[str, str, str]]:
    """(id and way, prompt, answer) of the first two prompts of each category, untouched."""
    import torch

    rows = []
    for prompt in prompts:
        if not prompt["id"].endswith(("-1", "-2")):
            continue
        inputs = tokenizer(prompt["prompt"], return_tensors="pt")
        settings: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}}
        if prompt["category"] == "stories":
            settings["temperature 0.7"] = {"do_sample": True, "temperature": 0.7, "top_k": 0}
        for label, options in settings.items():
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(0)
                out = model.generate(**inputs, max_new_tokens=new_tokens, **options)
            answer = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            rows.append((f"{prompt['id']}, {label}", prompt["prompt"], answer))
    return rows


def card(
    recipe: Recipe,
    records: dict[str, Any],
    bits: dict[str, dict[str, float]],
    samples: list[tuple[str, str, str]],
    mixed: int,
) -> str:
    """The model card, from what was measured; `mixed` is the number of tokens in the mixture."""
    names = list(recipe.models)
    shape = []
    for name, spec in recipe.models.items():
        record = records[name]
        shape.append(
            f"| {name} | {spec.hidden_size} | {spec.num_hidden_layers} | {spec.num_attention_heads} / "
            f"{spec.num_key_value_heads} | {_parameters(recipe, name) / 1e6:.2f} M | {record['tokens'] / 1e6:.2f} M | "
            f"{record['loss'][-1]['loss']:.2f} | {record['wall_seconds'] / 60:.0f} min |"
        )
    data = [
        f"| {s.name} | {LICENCES.get(s.name, ('', ''))[0]} | {LICENCES.get(s.name, ('', ''))[1]} | {s.repeats:g} |"
        for s in recipe.sources
    ]
    table = [f"| {source} | " + " | ".join(f"{bits[n][source]:.3f}" for n in names) + " |" for source in bits[names[0]]]
    shown = []
    for key, prompt, answer in samples:
        head = prompt if len(prompt) <= 700 else prompt[:200] + "\n[...]\n" + prompt[-400:]
        shown.append(f"**{key}**\n\n````text\n{head}▌{answer}\n````\n")
    seen = [f"the {name} {record['tokens'] / mixed:.0%}" for name, record in records.items()]
    notes = [f"\nNote on the {name}: {record['note']}\n" for name, record in records.items() if "note" in record]
    return CARD.format(
        mixed=f"{mixed / 1e6:.2f} M",
        seen=", ".join(seen),
        notes="".join(notes),
        name=recipe.name,
        shape="\n".join(shape),
        data="\n".join(data),
        bits="\n".join(table),
        heads=" | ".join(names),
        rule="|---" * (len(names) + 1) + "|",
        samples="\n".join(shown),
        block=recipe.packing.block,
        short=recipe.packing.short,
        share=f"{recipe.packing.short_share:.0%}",
        vocab=recipe.tokenizer.vocab_size,
    )


def _parameters(recipe: Recipe, name: str) -> int:
    """Parameters of the Llama with tied embeddings."""
    spec = recipe.models[name]
    d, head = spec.hidden_size, spec.hidden_size // spec.num_attention_heads
    attention = 2 * d * d + 2 * d * head * spec.num_key_value_heads
    layer = attention + 3 * d * spec.intermediate_size + 2 * d
    return recipe.tokenizer.vocab_size * d + spec.num_hidden_layers * layer + d


CARD = """\
# {name}

A small Llama-architecture language model and a smaller draft with the same tokenizer, made to try and to test
speculative decoding on a laptop, offline. It writes simple English and follows the task formats below;
greedy text soon repeats itself. It knows next to nothing: do not use it to answer questions.

| model | hidden | layers | heads / KV heads | parameters | training tokens | last loss (nats) | wall time |
|---|---|---|---|---|---|---|---|
{shape}

Context {block} tokens. Tokenizer: SentencePiece unigram, {vocab} pieces, byte fallback, no normalisation, digits one
by one, newline a piece of its own; `decode(encode(text)) == text`. bos `<s>` is put before every prompt, eos is
`</s>`, pad is `<pad>`. Weights are bfloat16 safetensors. `target/tokenizer.model` is the SentencePiece file.

## Formats

Plain stories; `Question: ...\\nAnswer: ...` (arithmetic, ends in `#### n`);
`Context: ...\\nQuestion: ...\\nAnswer: ...`;
`Task: ...\\nPython:\\n...`; `German: ...\\nEnglish: ...`; `Instruction: ...\\nInput: ...\\nResponse: ...`
(`Input` only where there is one). A context carried several questions, so the model may go on with another one.

## Data and licences

| source | what | licence | passes |
|---|---|---|---|
{data}

Mixed and shuffled these passes are {mixed} tokens; of that one order each model read a part from
the start: {seen}.

Held out and never trained on: TinyStories valid, FairytaleQA val and test, GSM8K test, MBPP tasks 1-600, the last
100 problems of GSM8K train, the last 200 Europarl pairs, every 38th or so document of the classics, Spec-Bench and
MT-bench. Tales of the classics that FairytaleQA holds too were dropped. Sets known to be made by GPT-4 were left out,
but for TinyStories, which GPT-3.5 and GPT-4 wrote; its second half was rebuilt from a lower-cased copy.
Attribution: MBPP, Google Research, CC BY 4.0, changed (line ends, tabs). Europarl: Philipp Koehn, "Europarl: A
Parallel Corpus for Statistical Machine Translation", MT Summit 2005. These weights are released under the licence
of the package; the CDLA-Sharing-1.0 terms on TinyStories bind the data, not results computed from it.

## Training

`specdec train lm --recipe {name} --data DATA --out RUN`, then
`specdec train package --recipe {name} --data DATA --out RUN --to FOLDER`.
Muon for the matrices and AdamW for the rest, cosine schedule with warm-up, float32 on two CPU cores, rows of {short}
tokens for {share} of the steps and of {block} for the rest. Loss curves: `loss-target.png`, `loss-draft.png`; points
and all settings: `training.json`. The models were trained on plain next-token loss; the draft was not distilled.
{notes}
## Held-out bits per character

Lower is better; documents cut at {block} tokens, shipped bfloat16 weights computed in float32.

| source | {heads} |
{rule}
{bits}

## Samples

The target's, 128 new tokens at most, untouched; the answer begins at the bar. First two prompts of each category of
`prompts.jsonl` (48 held-out prompts, 8 in each of 6 categories): greedy, and the stories also at temperature 0.7.
`tasks.jsonl` holds 50 problems and 50 translations more, with reference answers, for `specdec pareto`.

{samples}
## Limits

Facts, arithmetic, code and translations are usually wrong though well formed; long stories lose their thread and
may repeat themselves. English, with a little German as input. The data are children's stories, Gutenberg-era books
(with the attitudes of their time) and parliament speeches.
"""
