"""Train a recipe's language models with `transformers.Trainer`, and write them where they can be loaded from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specdec.heads.checkpoint import replace_folder

from .data import Blocks, mixture, pack, read_sources
from .recipe import ModelSpec, Recipe, RecipeError


def prepare(recipe: Recipe, data: Path, out: Path) -> Path:
    """Fit the tokenizer and pack the mixture under `out/data`, once; later calls with the same recipe reuse it."""
    import numpy as np
    from transformers import AutoTokenizer

    from .tokenizer import fit_sentencepiece, save_tokenizer

    done = out / "data"
    key = {k: recipe.raw[k] for k in ("seed", "tokenizer", "sources", "packing")}
    if done.is_dir():
        _check_same(done, key)
        return done
    documents = read_sources(recipe, data)
    texts = mixture(recipe, documents)
    part = out / "data.part"
    shutil.rmtree(part, ignore_errors=True)
    spec = recipe.tokenizer
    model_file = fit_sentencepiece(texts, part / "tokenizer", spec.vocab_size, spec.sample_chars, recipe.seed)
    save_tokenizer(model_file, part / "tokenizer", context=recipe.packing.block)
    tokenizer = AutoTokenizer.from_pretrained(part / "tokenizer")
    ids = ([*row, tokenizer.eos_token_id] for row in _encode(tokenizer, texts))
    np.save(part / "blocks.npy", pack(ids, recipe.packing.block))
    (part / "recipe.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    part.rename(done)
    return done


def _check_same(folder: Path, key: dict[str, Any]) -> None:
    """What an earlier process left in `folder` must come from the same settings."""
    if json.loads((folder / "recipe.json").read_text(encoding="utf-8")) != key:
        raise RecipeError(f"{folder} was made with another recipe: give another --out or remove that folder")


def _encode(tokenizer: Any, texts: list[str], batch: int = 256) -> Iterable[list[int]]:
    for i in range(0, len(texts), batch):
        yield from tokenizer(texts[i : i + batch], verbose=False).input_ids  # bos comes from the tokenizer


def build_model(recipe: Recipe, spec: ModelSpec) -> Any:
    """A freshly initialised Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.tokenizer.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.hidden_size // spec.num_attention_heads,
        max_position_embeddings=recipe.packing.block,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def train_lm(
    recipe: Recipe, name: str, data: Path, out: Path, max_steps: int | None = None, resume: bool = True
) -> Path:
    """Train `recipe.models[name]`; returns the folder `out/name` with bf16 weights and the loss curve.

    Checkpoints go to `out/name.run`; with `resume` a killed run goes on from the last whole one and ends in
    the same weights. `max_steps` replaces the number of steps (and so the schedule) of the recipe.
    """
    import numpy as np
    import torch
    from transformers import Trainer, TrainingArguments

    from .loss import next_token_loss
    from .optimizer import MuonAdamW, parameter_groups
    from .report import write_curve

    class LanguageTrainer(Trainer):
        """The next-token loss without [B, S, V] logits, data in its stored order, Muon with AdamW."""

        optimizer: Any

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ids = inputs["input_ids"]
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            return next_token_loss(hidden, model.lm_head.weight, ids)

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # the mixture is already shuffled

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                rule, rate = recipe.training, recipe.models[name].learning_rate
                groups = parameter_groups(self.model, rule.weight_decay)
                self.optimizer = MuonAdamW(groups, lr=rate, weight_decay=rule.weight_decay)
            return self.optimizer

    started = time.time()
    prepared = prepare(recipe, data, out)
    spec, rule = recipe.models[name], recipe.training
    blocks = np.load(prepared / "blocks.npy", mmap_mode="r")
    steps = max_steps or spec.tokens // (rule.batch * recipe.packing.block)
    epochs = -(-steps * rule.batch // len(blocks))  # ceil
    if epochs > 1:
        blocks = np.concatenate([blocks] * epochs)
    long_from = int(steps * recipe.packing.short_share) * rule.batch
    dataset = Blocks(blocks[: steps * rule.batch], recipe.packing, long_from)

    run = out / f"{name}.run"
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=rule.batch,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": rule.final_rate_share},
        warmup_steps=max(1, round(rule.warmup_share * steps)),
        max_grad_norm=rule.max_grad_norm,
        logging_steps=rule.logging_steps,
        save_steps=rule.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = LanguageTrainer(
        model=build_model(recipe, spec), args=arguments, train_dataset=dataset, data_collator=dataset.collate
    )
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    key = {"models": recipe.raw["models"][name], "training": recipe.raw["training"], "steps": steps}
    checkpoint = last_checkpoint(run)
    if checkpoint:
        _check_same(run, key)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)

    # All goes to a temporary folder that takes its final name when it is whole.
    part = out / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    save_model(trainer.model, prepared / "tokenizer", part)
    resumed_at = int(checkpoint.split("-")[-1]) if checkpoint else None
    write_curve(recipe, name, trainer.state, time.time() - started, resumed_at, part)
    return replace_folder(part, out / name)


def last_checkpoint(run: Path) -> str | None:
    """The newest whole checkpoint: Trainer writes `trainer_state.json` last, a killed one leaves none or half of it."""

    def parses(file: Path) -> bool:
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return True

    whole = [path for path in run.glob("checkpoint-*") if parses(path / "trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def save_model(model: Any, tokenizer: Path, folder: Path) -> None:
    """bf16 safetensors, configuration and tokenizer files."""
    import torch
    from transformers import GenerationConfig

    config = model.config
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    model.to(torch.bfloat16).save_pretrained(str(folder))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, but it ships to others
