"""Lexical units from model to model: `specdec train lexical-units` (Sun et al., arXiv 2405.15208)."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from specdec.decoder import Decoder
from specdec.drafters.lexical_units import LexicalUnits, Units
from specdec.drafters.lexical_units.learner import UnitLearner, read
from specdec.drafters.lexical_units.units import Packed, find_units, forbid, pack, write_row
from specdec.errors import UsageError, first_line
from specdec.heads.checkpoint import replace_folder
from specdec.processes import this_process
from specdec.target import Target
from specdec.training.heads import Settings, batches, check_vocabulary, open_run, public_name, split, training_arguments
from specdec.training.joint import text_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

CHANGED = (
    "The model was trained further, so its text is no longer {base}'s. What specdec calls lossless holds against the "
    "trained model, not against {base}."
)
AGREEMENT = 0.98  # share of trusted tokens that must be the model's own, by which beta is chosen
LEAST = 50  # fewer prove nothing
BETAS = tuple(np.round(np.arange(0.5, 1.0, 0.01), 2).tolist())
BINS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
NEVER = 1.01


@dataclass(frozen=True)
class UnitSettings(Settings):
    """See ``Settings``.

    Attributes:
        K: most tokens of a unit.
        unit_alpha: confidence from which a token joins the unit before it.
        lam: lambda, weight of placeholders over that of ordinary text.
        packed: share of batches with placeholders; the others keep the model's ordinary text.
        placeholder: token to stand for unknown ones, never produced; None: one the vocabulary does not use.
        rank, alpha, dropout: of the adapters.
    """

    learning_rate: float = 1e-4
    K: int = 4
    unit_alpha: float = 0.9
    lam: float = 1.0
    packed: float = 0.5
    placeholder: int | None = None
    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("peft") is None:
            raise UsageError("lexical-units: adapters need peft: pip install 'specdec[train]'")
        for name, only in {"optimizer": "adamw", "objective": None, "decay": None}.items():
            if getattr(self, name) != only:
                raise UsageError(f"{name}={getattr(self, name)!r} is for heads; leave it out")
        if self.K < 2 or self.rank < 1:
            raise UsageError(f"K={self.K} must be at least 2, and rank={self.rank} at least 1")
        if not 0 < self.unit_alpha <= 1 or not 0 < self.packed <= 1 or not 0 <= self.dropout < 1:
            raise UsageError(
                f"unit_alpha={self.unit_alpha} and packed={self.packed} must be above 0 and at most 1, "
                f"dropout={self.dropout} in [0, 1)"
            )
        if not self.lam > 0 or not self.alpha > 0:
            raise UsageError(f"lam={self.lam} and alpha={self.alpha} must be above 0")


def unit_settings(values: dict[str, Any]) -> UnitSettings:
    """Settings from ``--config`` and ``--set``.

    Raises:
        UsageError: an unknown key, or a value of the wrong kind.
    """
    known = {f.name: str(f.type) for f in dataclasses.fields(UnitSettings)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"setting {key!r} is unknown; {hint}choose of {', '.join(known)}")
        kind = float if "float" in known[key] else int if "int" in known[key] else str
        try:
            found[key] = None if value is None and "None" in known[key] else kind(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError) as error:
            raise UsageError(f"setting {key}={value!r}: it takes {known[key]}") from error
    return UnitSettings(**found)


def train_units(
    model: PreTrainedModel,
    samples: Dataset,
    out: Path,
    settings: UnitSettings,
    tokenizer: Any = None,
    base: str | None = None,
    resume: bool = True,
    dtype: torch.dtype = torch.float32,
    merged: bool = False,
) -> Path:
    """Train a model to fill placeholders; returns ``out``.

    ``out`` then holds peft's adapter, the placeholder's embedding row, ``lexical_units.json`` with the calibrated beta,
    a model card, ``training.json`` and ``curves.png``; with ``merged`` also ``merged``, an ordinary model with its
    tokenizer and the same JSON. Checkpoints go to ``out.run``; a killed run goes on from the last whole one.

    Args:
        model: on the device to train on; it is changed.
        samples: columns ``input_ids`` and ``loss_mask``; the model's own answers are best, its confidences fit them.
        out: folder to fill.
        settings: see ``UnitSettings``.
        tokenizer: the model's; it knows special and unused tokens.
        base: what the model card calls the model.
        resume: go on from an earlier run's last checkpoint.
        dtype: in which adapter and row are stored.
        merged: write the merged model too.

    Raises:
        UsageError: settings, data or an earlier run do not fit; the disk is full.
    """
    torch.manual_seed(settings.seed)
    target = Target(model, tokenizer=tokenizer)
    check_vocabulary(samples, target.vocab_size)
    placeholder = unused_token(samples, target, settings.placeholder)
    base = public_name(base or model.name_or_path or "the original")
    key = {
        "method": "lexical-units",
        "settings": dataclasses.asdict(settings),
        "placeholder": placeholder,
        "base": base,
        "samples": [len(samples), int(sum(map(sum, samples["loss_mask"])))],
    }
    run = out.with_name(out.name + ".run")
    first = this_process().first
    started = time.time()
    try:
        checkpoint = open_run(run, key, resume)
        held_out, training = split(samples.add_column("number", np.arange(len(samples))), settings)
        before = text_loss(target, held_out)
        number, packed = np.array(training["number"]), _packed(len(training), settings)
        wanted = np.unique(number[packed])
        spans = dict(zip(wanted.tolist(), identify(target, samples.select(wanted), settings), strict=True))
        sizes = lengths(list(spans.values()), settings.K)
        if sizes[0] > 0.9 * sum(sizes):
            warnings.warn(
                f"unit_alpha={settings.unit_alpha}: {sizes[0] / sum(sizes):.0%} of the units have one token; lower it",
                stacklevel=2,
            )
        training = training.add_column(
            "spans", [spans[i].tolist() if p else [] for i, p in zip(number.tolist(), packed, strict=True)]
        )
        lora = (settings.rank, settings.alpha, settings.dropout)
        learner = UnitLearner(target, placeholder, settings.K, lora, settings.lam)
        trainer = _trainer(learner, training, held_out, run, settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        if first:
            facts = {"text_loss": {"before": before}, "unit_lengths": sizes}
            _finish(trainer, learner, held_out, out, key, facts, time.time() - started, dtype, merged)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{run}: a checkpoint could not be written ({first_line(error)}); free space and give the same command: it "
            "goes on from the last whole one"
        ) from error
    trainer.accelerator.wait_for_everyone()
    return out


# ---- data -----------------------------------------------------------------------------------------------------------


def unused_token(samples: Dataset, target: Target, wanted: int | None) -> int:
    """A token that never occurs: ``wanted``, or one behind the tokenizer's, one named unused, or the unknown token.

    Raises:
        UsageError: it occurs in the data, is the padding or an end token, or there is none.
    """
    used = set().union(*samples["input_ids"])
    tokenizer = target.tokenizer
    special = {getattr(x, name, None) for x in (target.config, tokenizer) for name in ("bos_token_id", "pad_token_id")}
    eos = [getattr(x, "eos_token_id", None) for x in (target.config, tokenizer)]
    for ids in eos:
        special |= set(ids) if isinstance(ids, list) else {ids}
    if wanted is not None:
        if not 0 <= wanted < target.vocab_size or wanted in used | special:
            raise UsageError(
                f"placeholder={wanted} must be one of the {target.vocab_size} tokens, none that the data holds or that "
                "starts, ends or pads texts"
            )
        return wanted
    if tokenizer is not None:
        names = {i: name.lower() for name, i in tokenizer.get_vocab().items()}
        named = [i for i in sorted(names) if "unused" in names[i] or "reserved" in names[i]]
        for i in [*range(len(tokenizer), target.vocab_size), *named, getattr(tokenizer, "unk_token_id", None)]:
            if i is not None and i not in used | special:
                return i
    raise UsageError("placeholder: no token is known to be unused; name one that is never produced, placeholder=ID")


def identify(target: Target, samples: Dataset, settings: UnitSettings) -> list[np.ndarray]:
    """The units of every sample, spans int64 [U, 2], by the model's confidence in each token after the ones before."""
    from rich.progress import track

    special = np.array(sorted(getattr(target.tokenizer, "all_special_ids", None) or [target.config.eos_token_id or -1]))
    order = np.argsort([-len(ids) for ids in samples["input_ids"]], kind="stable")
    spans = []
    for batch in track(batches(samples.select(order), settings.batch), "units"):
        ids, learned = batch["input_ids"].to(target.device), batch["labels"] >= 0
        learned[:, 0] = False
        c = torch.zeros(ids.shape)
        there = learned[:, 1:].to(ids.device)
        hidden = target.read(ids, LexicalUnits.needs)["final_hidden"][:, :-1][there]  # [N, d]
        right = [
            target.logits(x).softmax(-1).gather(-1, y[:, None])[:, 0].cpu()
            for x, y in zip(hidden.split(512), ids[:, 1:][there].split(512), strict=True)
        ]
        c[:, 1:][there.cpu()] = torch.cat(right)
        for row, mine, text in zip(c.numpy(), learned.numpy(), batch["input_ids"].numpy(), strict=True):
            spans.append(find_units(row, mine, np.isin(text, special), settings.unit_alpha, settings.K))
    return [spans[i] for i in np.argsort(order)]


def lengths(spans: Sequence[np.ndarray], K: int) -> list[int]:
    """[K], how many units have 1, 2, ... K tokens."""
    sizes = np.concatenate([s[:, 1] - s[:, 0] for s in spans])
    return np.bincount(sizes, minlength=K + 1)[1:].tolist()


def _packed(count: int, settings: UnitSettings) -> np.ndarray:
    """bool [count], by batch, so that alike widths stay together."""
    drawn = np.random.default_rng(settings.seed).random(-(-count // settings.batch)) < settings.packed
    return np.repeat(drawn, settings.batch)[:count]


def stack(packed: Sequence[Packed]) -> dict[str, torch.Tensor]:
    """``UnitLearner``'s batch; padding sees itself, and nothing sees it."""
    width = max(len(p.ids) for p in packed)
    batch: dict[str, list[np.ndarray]] = {name: [] for name in ("input_ids", "positions", "labels", "ahead", "weight")}
    visible = np.tile(np.eye(width, dtype=bool), (len(packed), 1, 1))
    for b, p in enumerate(packed):
        n = len(p.ids)
        visible[b, :n, :n] = p.visible
        for (name, column), fill in zip(batch.items(), (0, 0, -100, 0, 0), strict=True):
            column.append(np.pad(getattr(p, name.removeprefix("input_")), (0, width - n), constant_values=fill))
    found = {name: torch.from_numpy(np.stack(column)) for name, column in batch.items()}
    return {**found, "visible": torch.from_numpy(visible)}


def _pack(row: dict[str, Any], spans: Any, K: int, placeholder: int) -> Packed:
    learned = np.array(row["loss_mask"], dtype=bool)
    learned[0] = False
    return pack(np.array(row["input_ids"]), learned, np.array(spans, dtype=np.int64).reshape(-1, 2), K, placeholder)


# ---- the trainer ----------------------------------------------------------------------------------------------------


def _trainer(learner: UnitLearner, training: Dataset, held_out: Dataset, run: Path, settings: UnitSettings) -> Any:
    from transformers import Trainer

    class UnitTrainer(Trainer):
        """Agreement per placeholder in the log, MAT of the real decoder as the measure."""

        control: Any
        tally: torch.Tensor | None = None  # nats, hits, counts [3, K] since the last log

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            out = model(**inputs)
            if not math.isfinite(out.total.item()):
                raise UsageError(
                    f"the loss is {out.total.item()} at step {self.state.global_step + 1}; lower "
                    f"learning_rate={settings.learning_rate}, or load the model in float32 or bfloat16"
                )
            new = torch.stack([out.loss * out.count, out.hits, out.count]).detach()
            self.tally = new if self.tally is None else self.tally + new
            return out.total

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if "loss" in logs and self.tally is not None:
                tally = self.accelerator.reduce(self.tally, "sum")
                loss, accuracy = (tally[:2] / tally[2].clamp_min(1)).tolist()
                logs |= {f"loss_{j}": round(x, 5) for j, x in enumerate(loss)}  # the text's is 0
                logs |= {f"accuracy_{j}": round(x, 5) for j, x in enumerate(accuracy)}
                self.tally = None
            super().log(logs, *args)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            learner.eval()
            metrics = [_decode(learner, held_out, settings) if self.is_world_process_zero() else {}]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(metrics)
            self.log(metrics[0])
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics[0])
            return metrics[0]

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # already in order

    K, placeholder = settings.K, learner.placeholder

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return stack([_pack(row, row["spans"], K, placeholder) for row in rows])

    arguments = training_arguments(settings, run, learner.target.device.type == "cpu")
    return UnitTrainer(
        model=learner, args=arguments, train_dataset=training, eval_dataset=held_out, data_collator=collate
    )


def prompts(held_out: Dataset) -> Iterator[torch.Tensor]:
    """Each sample's tokens before the first learned one, int64 [1, n]; of plain text, its first 32."""
    for sample in held_out:
        first = int(np.argmax(sample["loss_mask"]))
        yield torch.tensor([sample["input_ids"][: first if first > 1 else 32]])


def _decode(learner: UnitLearner, held_out: Dataset, settings: UnitSettings) -> dict[str, float]:
    """MAT on the held-out prompts, greedy, of the model as it is."""
    model = learner.target.model
    decoder = Decoder(model, LexicalUnits(Units(learner.placeholder, settings.K, settings.unit_alpha, NEVER)))
    tokens = steps = 0
    for ids in prompts(held_out):
        decoder.generate(ids.to(model.device), max_new_tokens=settings.eval_tokens, do_sample=False)
        assert decoder.stats is not None
        tokens, steps = tokens + decoder.stats.new_tokens, steps + len(decoder.stats.steps)
    decoder.target.bind(type(LexicalUnits.needs)())  # take its hooks off the model again
    return {"eval_mat": tokens / max(steps, 1)}


# ---- calibration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What placeholders said after every token of a model's own greedy text.

    Attributes:
        sure: float [N, K - 1], probability of each placeholder's likeliest token; -1 where the text had ended.
        right: bool [N, K - 1], whether that is the model's own token.
    """

    sure: np.ndarray
    right: np.ndarray

    def agreement(self, beta: float) -> tuple[float, int]:
        """Share of the tokens trusted at ``beta`` that are the model's own, and their number."""
        trusted = np.logical_and.accumulate(self.sure >= beta, axis=1)
        return float(self.right[trusted].mean()) if trusted.any() else 0.0, int(trusted.sum())

    def beta(self, least: int = LEAST) -> float:
        """The least threshold at which ``AGREEMENT`` of at least ``least`` trusted tokens agree; else above 1."""
        for beta in BETAS:
            share, count = self.agreement(beta)
            if share >= AGREEMENT and count >= least:
                return beta
        return NEVER

    def table(self) -> str:
        """Markdown: agreement (and cases) by confidence, and by placeholder."""
        J = self.sure.shape[1]
        lines = ["| confidence |" + "".join(f" placeholder {j + 1} |" for j in range(J)), "|---|" + "---:|" * J]
        for low, high in pairwise(BINS):
            cells = []
            for j in range(J):
                inside = (self.sure[:, j] >= low) & (self.sure[:, j] < high + (high == 1.0))
                cells.append(f" {self.right[inside, j].mean():.3f} ({inside.sum()}) |" if inside.any() else " - |")
            lines.append(f"| {low} to {high} |" + "".join(cells))
        return "\n".join(lines) + "\n"


@torch.no_grad()
def calibrate(target: Target, texts: Sequence[torch.Tensor], new: int, units: Units) -> Calibration:
    """Ask K - 1 placeholders after every token of greedy text.

    Args:
        target: the trained model.
        texts: prompts int64 [1, n].
        new: most tokens written after each.
        units: its placeholder and K.
    """
    sure, right = [], []
    J = units.K - 1
    for prompt in texts:
        ids = target.model.generate(prompt.to(target.device), max_new_tokens=new, do_sample=False)[0].cpu().numpy()
        learned = np.arange(len(ids)) >= prompt.shape[1]
        starts = np.flatnonzero(learned)
        packed = pack(ids, learned, np.stack([starts, starts + units.K], axis=1), units.K, units.placeholder_id)
        batch = stack([packed])
        hidden = read(target, *(batch[name].to(target.device) for name in ("input_ids", "positions", "visible")))
        logits = target.logits(hidden[0, len(ids) :])
        logits[:, units.placeholder_id] = -torch.inf
        best, token = (x.cpu().numpy() for x in logits.softmax(-1).max(-1))
        place = packed.positions[len(ids) :] - packed.ahead[len(ids) :] + 1 - starts[0], packed.ahead[len(ids) :] - 1
        sure.append(np.full((len(starts), J), -1.0))
        right.append(np.zeros((len(starts), J), dtype=bool))
        sure[-1][place], right[-1][place] = best, token == packed.labels[len(ids) :]
    return Calibration(np.concatenate(sure), np.concatenate(right))


# ---- files ----------------------------------------------------------------------------------------------------------


def _finish(
    trainer: Any,
    learner: UnitLearner,
    held_out: Dataset,
    out: Path,
    key: dict[str, Any],
    facts: dict[str, Any],
    seconds: float,
    dtype: torch.dtype,
    merged: bool,
) -> None:
    """Write ``out``, which appears when all is there."""
    from specdec.training.curves import write_curves

    settings, tokenizer, base = key["settings"], learner.target.tokenizer, key["base"]
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        config, tensors = learner.adapter(dtype)
        config.base_model_name_or_path = base
        config.save_pretrained(str(part))
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        write_row(learner.row.to(dtype), part)
        model = learner.merged()
        forbid(model, learner.placeholder)
        target = Target(model)
        units = Units(learner.placeholder, settings["K"], settings["unit_alpha"], NEVER, base=base)
        found = calibrate(target, list(prompts(held_out)), settings["eval_tokens"], units)
        units = dataclasses.replace(units, beta=found.beta())
        units.write(part)
        facts["text_loss"]["after"] = text_loss(target, held_out)
        facts["agreement"], facts["trusted"] = found.agreement(units.beta)
        card = _card(key, facts, units, found, len(held_out))
        (part / "README.md").write_text(card, encoding="utf-8")
        if merged:
            model.save_pretrained(part / "merged")
            units.write(part / "merged")
            (part / "merged" / "README.md").write_text(card, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(part / "merged")
        history = trainer.state.log_history
        record = {
            **key,
            **facts,
            "steps": trainer.state.global_step,
            "wall_seconds_of_last_process": round(seconds),
            "log": history,
        }
        (part / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_curves(history, "lexical-units", part / "curves.png")
        for file in part.rglob("*.*"):
            file.chmod(0o644)  # some writers make files for the owner alone, but these ship to others
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _card(key: dict[str, Any], facts: dict[str, Any], units: Units, found: Calibration, count: int) -> str:
    sizes = facts["unit_lengths"]
    share = ", ".join(f"{i + 1}: {n / sum(sizes):.1%}" for i, n in enumerate(sizes))
    mean = sum((i + 1) * n for i, n in enumerate(sizes)) / sum(sizes)
    loss = facts["text_loss"]
    return (
        f"---\nlibrary_name: specdec\ntags: [speculative-decoding, lexical-units]\n---\n# {units.base}, trained for "
        f"lexical units\n\n{CHANGED.format(base=units.base)}\n\n"
        f"Use: `Decoder(model, 'lexical-units')`; with `mode='trusting'` tokens are committed unverified, which is "
        f"lossy.\n\nUnits by length, alpha {units.alpha}: {share}; mean {mean:.2f}.\n\n"
        f"Loss on {count} held-out samples, nats a token: {loss['before']:.3f} before, {loss['after']:.3f} after.\n\n"
        f"## Calibration\n\nPlaceholders after every token of the model's greedy answers to {count} held-out prompts: "
        f"share of likeliest tokens that are the model's own (cases).\n\n{found.table()}\n"
        f"beta = {units.beta}, the least at which {AGREEMENT:.0%} of at least {LEAST} trusted tokens agree; above 1 "
        f"there is none ({facts['agreement']:.3f} of {facts['trusted']} here).\n\n"
        f"## Training\n\n```json\n{json.dumps(key['settings'], indent=1)}\n```\n"
    )
