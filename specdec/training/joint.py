"""Medusa-2 from model to model: `specdec train medusa-2`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from specdec.drafters.medusa.joint import FINAL, JointLearner, next_token_loss
from specdec.drafters.medusa.module import Medusa
from specdec.errors import UsageError
from specdec.heads import Shared
from specdec.heads.checkpoint import replace_folder
from specdec.target import Target
from specdec.training.heads import Settings, acceptance, batches, check_vocabulary, public_name, split, train_learner

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

CHANGED = (
    "The target was trained together with its heads, so its text is no longer the original's. What specdec calls "
    "lossless holds against this new target, not against {original}."
)


@dataclass(frozen=True)
class JointSettings(Settings):
    """See ``Settings``; ``learning_rate`` is the target's own.

    Attributes:
        adapt: "lora" (adapters, merged at the end), or "full" (every weight).
        rank, alpha, dropout: of the adapters.
        self_distill: keep to the target's own distribution as it was, in place of the text; needs "lora".
        lambda0: weight of the heads' loss; None: 0.2, or with ``self_distill`` 0.01, reached along a sine.
        head_rate: learning rate of the heads over the target's.
        heads: checkpoint of trained Medusa heads to start from (first stage); None: fresh ones.
    """

    learning_rate: float = 1e-4
    adapt: str = "lora"
    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05
    self_distill: bool = False
    lambda0: float | None = None
    head_rate: float = 4.0
    heads: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapt not in ("lora", "full"):
            raise UsageError(f"adapt={self.adapt!r} must be 'lora' or 'full'")
        if self.self_distill and self.adapt == "full":
            raise UsageError(
                "self_distill=true needs adapt=lora: the teacher is the same model with its adapters switched off"
            )
        if self.adapt == "lora" and importlib.util.find_spec("peft") is None:
            raise UsageError("adapt=lora needs peft: pip install 'specdec[train]'")
        if self.optimizer != "adamw":
            raise UsageError(f"optimizer={self.optimizer!r}: a target is trained jointly with 'adamw' only")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"rank={self.rank} must be at least 1, and dropout={self.dropout} in [0, 1)")
        for name in ("alpha", "lambda0", "head_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name}={value} must be above 0")


def train_joint(
    model: PreTrainedModel,
    samples: Dataset,
    out: Path,
    settings: JointSettings,
    options: dict[str, Any] | None = None,
    tokenizer: Any = None,
    target_id: str | None = None,
    resume: bool = True,
    dtype: torch.dtype | None = None,
) -> Path:
    """Train a target and its Medusa heads together; returns ``out``.

    ``out`` then holds ``target`` (a model as ``save_pretrained`` writes it, with its tokenizer), ``heads`` (a Medusa
    checkpoint for it), ``training.json`` and ``curves.png``. For runs and resuming see ``train_head``.

    Args:
        model: the target, on the device to train on; it is changed.
        samples: columns ``input_ids`` and ``loss_mask``.
        out: folder to fill.
        settings: see ``JointSettings``.
        options: of ``Medusa.fresh``, for fresh heads.
        tokenizer: the target's; None: none is saved.
        target_id: what the model cards call the target.
        dtype: in which the heads are stored; None: float32.

    Raises:
        UsageError: options, data or an earlier run do not fit.
        CompatibilityError: ``settings.heads`` are for another target.
    """
    torch.manual_seed(settings.seed)
    options = dict(options or {})
    target = Target(model, tokenizer=tokenizer)
    check_vocabulary(samples, target.vocab_size)
    held_out, training = split(samples, settings)
    head = _heads(target, settings, options)
    original = target_id or getattr(model.config, "_name_or_path", "") or "the original"
    original = public_name(original)
    learner = JointLearner(
        head,
        target,
        lora=(settings.rank, settings.alpha, settings.dropout) if settings.adapt == "lora" else None,
        self_distill=settings.self_distill,
        lambda0=settings.lambda0 or (0.01 if settings.self_distill else 0.2),
        objective=settings.objective,
        decay=settings.decay,
    )
    before = text_loss(target, held_out)
    key = {
        "method": "medusa-2",
        "options": options,
        "settings": {
            **dataclasses.asdict(settings),
            "lambda0": learner.lambda0,
            "heads": settings.heads and Path(settings.heads).name,
        },
        "target": original,
        "samples": [len(samples), int(sum(map(sum, samples["loss_mask"])))],
    }

    def finish(trainer: Any, seconds: float) -> None:
        _finish(trainer, learner, held_out, out, key, seconds, before, dtype)

    optimizer = torch.optim.AdamW(_groups(learner, settings), lr=settings.learning_rate, betas=(0.9, 0.95))
    return train_learner(
        learner, training, held_out, out, settings, key, finish, resume, optimizer, [_Progress(learner)]
    )


def text_loss(target: Target, samples: Dataset) -> float:
    """Nats a learned token of the target itself, on held-out text."""
    loss = count = 0.0
    for batch in batches(samples, 4):
        ids, mask = batch["input_ids"].to(target.device), batch["labels"].to(target.device) >= 0
        final = target.read(ids, FINAL)["final_hidden"]
        output = Shared.of(target.model, target.head).output
        found = next_token_loss(final, output, ids, mask)
        loss, count = loss + float(found.loss), count + float(found.count)
    return loss / max(count, 1)


def _heads(target: Target, settings: JointSettings, options: dict[str, Any]) -> Medusa:
    """Those of the first stage, or fresh ones."""
    if settings.heads is None:
        return Medusa.fresh(target, **options).float().to(target.device)
    if options:
        raise UsageError(f"{', '.join(options)}: heads={settings.heads} says that already; leave one of them out")
    return Medusa.from_pretrained(settings.heads).float().to(target.device)


def _groups(learner: JointLearner, settings: JointSettings) -> Iterator[dict[str, Any]]:
    """The heads learn faster than the target; vectors do not decay."""
    rate = settings.learning_rate
    for module, lr in ((learner.trained, rate), (learner.head, rate * settings.head_rate)):
        for decays in (True, False):
            found = [p for p in module.parameters() if (p.ndim > 1) == decays]
            yield {"params": found, "lr": lr, "weight_decay": settings.weight_decay if decays else 0.0}


class _Progress(TrainerCallback):
    """Tells the learner how far the training is."""

    def __init__(self, learner: JointLearner):
        self.learner = learner

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learner.progress = state.global_step / state.max_steps


def _finish(
    trainer: Any,
    learner: JointLearner,
    held_out: Dataset,
    out: Path,
    key: dict[str, Any],
    seconds: float,
    before: float,
    dtype: torch.dtype | None,
) -> None:
    """Write target, heads, log and curves; ``out`` appears when all is there."""
    from specdec.training.curves import write_curves

    head, tokenizer, original = learner.head, learner.target.tokenizer, key["target"]
    model = learner.merged()
    target = Target(model)
    head.attach(target)
    head.config.target_id = f"{out.name}/target"  # the original's name would be loaded in its place
    head.config.acceptance = acceptance(head, target, held_out)
    after = text_loss(target, held_out)
    history = trainer.state.log_history
    best = max((row for row in history if "eval_mat" in row), key=lambda row: row["eval_mat"], default=None)

    note = CHANGED.format(original=original) + "\n\n"
    note += f"Loss on {len(held_out)} held-out samples, nats a token: {before:.3f} before, {after:.3f} after.\n"
    if best is not None:
        note += f"Held-out prompts, greedy: MAT {best['eval_mat']:.2f} at step {best['step']}, the checkpoint kept.\n"
    settings = {name: key[name] for name in ("options", "settings")}
    note += "\n## Training\n\n```json\n" + json.dumps(settings, indent=1) + "\n```\n"

    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part / "target")
        if tokenizer is not None:
            tokenizer.save_pretrained(part / "target")
        use = "Use with the heads beside it: `Decoder(model, 'medusa', checkpoint=HEADS)`."
        (part / "target" / "README.md").write_text(f"# {original}, after Medusa-2\n\n{use}\n\n{note}", encoding="utf-8")
        for file in (part / "target").iterdir():
            file.chmod(0o644)  # some writers make files for the owner alone, but these ship to others
        head.save_pretrained(part / "heads", "For the target beside it, and no other.\n\n" + note, dtype)
        record = {
            **key,
            "steps": trainer.state.global_step,
            "wall_seconds_of_last_process": round(seconds),
            "text_loss": {"before": before, "after": after},
            "log": history,
        }
        (part / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_curves(history, "medusa-2", part / "curves.png")
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
