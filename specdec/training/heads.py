"""Train a head with `transformers.Trainer`: `specdec train METHOD`.

The target runs in the same process and is never changed. Every few steps the real decoder runs on held-out prompts, and
the checkpoint of the highest MAT is the one that is kept: what training measures is what use gives.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers.integrations import get_available_reporting_integrations

from specdec import registry
from specdec.errors import UsageError, first_line
from specdec.heads import Head, HeadDrafter, Learner
from specdec.heads.checkpoint import replace_folder
from specdec.processes import this_process
from specdec.training.lm import last_checkpoint
from specdec.training.optimizer import MuonAdamW, parameter_groups

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from specdec.target import Target

WINDOW = 32  # batches sorted by length together
RANKS = 10  # candidates per depth whose acceptance is measured


@dataclass(frozen=True)
class Settings:
    """How a head is trained; every field is a key of ``--config`` and ``--set``.

    Attributes:
        epochs: passes over the data; ``max_steps`` replaces it when given.
        batch, accumulate: samples per process and step, and steps per update.
        max_length: tokens of a sample; longer ones are cut.
        optimizer: "adamw", or "muon" (Muon for matrices, AdamW for the rest).
        learning_rate, warmup_share, final_rate_share: peak, and cosine schedule from and to shares of it.
        weight_decay, max_grad_norm, seed: as usual.
        objective, decay: see ``Learner``; None: the method's own.
        log_steps, eval_steps, save_steps: updates between logs, decodings, checkpoints.
        eval_prompts, eval_tokens: held-out samples kept from training, and tokens decoded after each one's prompt.
        loggers: comma list of what Trainer can report to (tensorboard, wandb, trackio, mlflow), or "none".
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    max_length: int = 2048
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_share: float = 0.03
    final_rate_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    objective: str | None = None
    decay: float | None = None
    log_steps: int = 10
    eval_steps: int = 200
    save_steps: int = 200
    eval_prompts: int = 16
    eval_tokens: int = 64
    loggers: str = "none"

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "log_steps", "eval_steps", "save_steps", "eval_prompts", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_length < 8:
            raise UsageError(f"max_length={self.max_length} must be at least 8 tokens")
        if self.optimizer not in ("adamw", "muon"):
            raise UsageError(f"optimizer={self.optimizer!r} must be 'adamw' or 'muon'")
        for multiple in ("eval_steps", "save_steps"):
            if getattr(self, multiple) % self.log_steps:
                raise UsageError(
                    f"{multiple}={getattr(self, multiple)} must be a multiple of log_steps={self.log_steps}"
                )
        known = ("none", "all", *get_available_reporting_integrations())
        for name in self.loggers.split(","):
            if name not in known:
                raise UsageError(f"loggers={name!r} is not installed or not known; choose of {', '.join(known)}")
        if self.save_steps % self.eval_steps:
            raise UsageError(f"save_steps={self.save_steps} must be a multiple of eval_steps={self.eval_steps}")


def head_class(method: str) -> type[Head]:
    """The head a drafter carries; raises UsageError for a drafter that carries none."""
    drafter = registry.drafter_class(method)
    if not issubclass(drafter, HeadDrafter):
        raise UsageError(f"{method}: it has no heads to train; choose one of {', '.join(methods())}")
    return drafter.head_class


def methods() -> list[str]:
    """Drafters whose heads can be trained."""
    return [name for name in registry.drafter_names() if issubclass(registry.drafter_class(name), HeadDrafter)]


def split_settings(
    method: str, values: dict[str, Any], settings: type[Settings] = Settings
) -> tuple[Any, dict[str, Any]]:
    """``settings`` of the training, and options of the method's ``fresh``, out of one flat mapping.

    Raises:
        UsageError: a key that is neither, or a value of the wrong kind.
    """
    own = {f.name: f for f in dataclasses.fields(settings)}
    parameters = inspect.signature(head_class(method).fresh).parameters
    options = {n for n, p in parameters.items() if n not in ("target", "counts") and p.kind is not p.VAR_KEYWORD}
    for key in values:
        if key not in own and key not in options:
            close = difflib.get_close_matches(key, [*own, *options], n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(
                f"setting {key!r} is unknown; {hint}training: {', '.join(own)}; {method}: {', '.join(sorted(options))}"
            )
    training: dict[str, Any] = {}
    for key, value in values.items():
        if key in own:
            kind = str(own[key].type)
            try:
                number: Any = float if "float" in kind else int if "int" in kind else bool if "bool" in kind else str
                if number is bool and not isinstance(value, bool):
                    raise ValueError("neither true nor false")
                training[key] = None if value is None and "None" in kind else number(value)  # YAML reads 1e-3 as text
            except (TypeError, ValueError) as error:
                raise UsageError(f"setting {key}={value!r}: it takes {kind}") from error
    return settings(**training), {k: v for k, v in values.items() if k in options}


def train_head(
    method: str,
    model: PreTrainedModel,
    samples: Dataset,
    out: Path,
    settings: Settings,
    options: dict[str, Any] | None = None,
    tokenizer: Any = None,
    target_id: str | None = None,
    resume: bool = True,
    dtype: torch.dtype | None = None,
) -> Path:
    """Train a head; returns ``out``, which then holds the checkpoint, ``training.json`` and ``curves.png``.

    Checkpoints go to ``out.run``; with ``resume`` a killed run goes on from the last whole one and ends alike.

    Args:
        method: drafter's name.
        model: the target, on the device to train on.
        samples: columns ``input_ids`` and ``loss_mask``.
        out: folder to fill.
        settings: see ``Settings``.
        options: of the method's ``fresh``.
        tokenizer: for the decoder that measures.
        target_id: what the model card calls the target.
        dtype: in which the weights are stored; None: float32.

    Raises:
        UsageError: options, data or an earlier run do not fit.
    """
    from specdec.target import Target

    torch.manual_seed(settings.seed)
    target = Target(model, tokenizer=tokenizer)
    check_vocabulary(samples, target.vocab_size)
    options = dict(options or {})
    head = head_class(method).fresh(target, counts=_counts(samples, target.vocab_size), **options)
    head = head.float().to(target.device)
    if target_id is not None:
        head.config.target_id = public_name(target_id)
    learner = Learner(head, target, settings.objective, settings.decay)
    key = {
        "method": method,
        "options": options,
        "settings": dataclasses.asdict(settings),
        "target": head.config.target_id,
        "samples": [len(samples), int(sum(map(sum, samples["loss_mask"])))],
    }
    held_out, training = split(samples, settings)

    def finish(trainer: Any, seconds: float) -> None:
        _finish(trainer, head, target, held_out, out, key, seconds, dtype)

    return train_learner(learner, training, held_out, out, settings, key, finish, resume)


def train_learner(
    learner: Learner,
    training: Dataset,
    held_out: Dataset,
    out: Path,
    settings: Settings,
    key: dict[str, Any],
    finish: Callable[[Any, float], None],
    resume: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train in ``out.run``, then fill ``out``; returns ``out``.

    Args:
        learner: what is trained.
        training, held_out: samples, in the order of training.
        out: folder to fill.
        settings: see ``Settings``.
        key: what makes a run this one; an earlier run of another key is refused.
        finish: called by one process with the trainer and the seconds it ran; writes ``out``.
        resume: go on from the last whole checkpoint.
        optimizer: None: as ``settings`` say.
        callbacks: further ones for Trainer.

    Raises:
        UsageError: an earlier run does not fit, a loss that is no number, or a disk that is full.
    """
    trainer = _trainer(learner, training, held_out, out, settings, optimizer, callbacks)
    run = out.with_name(out.name + ".run")
    started = time.time()
    try:
        checkpoint = open_run(run, key, resume)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_world_process_zero():
            finish(trainer, time.time() - started)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{run}: a checkpoint could not be written ({first_line(error)}); free space and give the same command: it "
            "goes on from the last whole one"
        ) from error
    trainer.accelerator.wait_for_everyone()
    return out


def open_run(run: Path, key: dict[str, Any], resume: bool) -> str | None:
    """Make the folder of a run's checkpoints; returns the one to go on from, None to start.

    Args:
        run: the folder.
        key: what makes a run this one, besides the number of processes, which decides what a step sees.
        resume: go on with what is there; else remove it.

    Raises:
        UsageError: it holds another run.
    """
    process = this_process()
    key = json.loads(json.dumps({**key, "processes": process.count}))  # as it will be read back
    file = run / "run.json"
    checkpoint = last_checkpoint(run) if resume else None
    if checkpoint is not None:
        before = {"processes": 1, **json.loads(file.read_text(encoding="utf-8"))}
        if before["processes"] != process.count:
            raise UsageError(
                f"{run}: it holds a run of {before['processes']} processes, not {process.count}; start as many, give "
                "another --out, or use --no-resume"
            )
        if before != key:
            raise UsageError(f"{run}: it holds a run of other settings or data; give another --out, or use --no-resume")
    elif process.first:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(key, indent=1), encoding="utf-8")
    return checkpoint


def public_name(target: str) -> str:
    """What others may call the target: a hub id or embedded name as it is, of a folder its last part."""
    return Path(target).name if Path(target).is_absolute() else target


def acceptance(head: Head, target: Target, samples: Dataset, ranks: int = RANKS) -> list[list[float]]:
    """[K][R], how often the target's own token is the candidate of rank r for depth k, on held-out text."""
    hits = torch.zeros(head.depths, ranks, device=target.device)
    count = torch.zeros(head.depths, 1, device=target.device)
    head.eval()
    with torch.no_grad():
        for batch in batches(samples, 4):
            ids, mask = batch["input_ids"].to(target.device), batch["labels"].to(target.device) >= 0
            final, drafts = head.along(target, ids, mask)
            for k, (state, output) in enumerate(zip(drafts.states, drafts.outputs, strict=True)):
                b, m = mask[:, 1:].nonzero().unbind(1)
                there = m > k if drafts.where is None else (m > k) & drafts.where[b, (m - k - 1).clamp_min(0)]
                b, m = b[there], m[there]
                best = head.shared.output(final[b, m]).argmax(-1, keepdim=True)
                top = output(state[b, m - k - 1]).topk(ranks, dim=-1).indices
                top = top if output.ids is None else output.ids[top]
                hits[k] += (top == best).sum(0)
                count[k] += len(b)
    shares: list[list[float]] = (hits / count.clamp_min(1)).tolist()
    return [[round(share, 4) for share in row] for row in shares]


# ---- data ---------------------------------------------------------------------------------------------------------


def check_vocabulary(samples: Dataset, vocab_size: int) -> None:
    """Raise UsageError for tokens that the target does not have."""
    largest = max(max(ids) for ids in samples["input_ids"])
    if largest >= vocab_size:
        raise UsageError(f"--data: token id {largest} is outside the target's vocabulary of {vocab_size}")


def _counts(samples: Dataset, vocab_size: int) -> torch.Tensor:
    """int64 [V], how often each token is learned."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids, mask in zip(samples["input_ids"], samples["loss_mask"], strict=True):
        np.add.at(counts, np.array(ids)[np.array(mask, dtype=bool)], 1)
    return torch.from_numpy(counts)


def split(samples: Dataset, settings: Settings) -> tuple[Dataset, Dataset]:
    """Held-out samples, and the rest in the order of training: every pass shuffled, alike lengths together."""
    needed = settings.eval_prompts + settings.batch
    if len(samples) < needed:
        raise UsageError(
            f"--data: {len(samples)} usable samples, at least {needed} are needed "
            f"(eval_prompts={settings.eval_prompts} kept back and a batch of {settings.batch}); give more data, or "
            "lower these settings"
        )
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(samples))
    held, rest = order[: settings.eval_prompts], order[settings.eval_prompts :]
    # consecutive batches go to the processes, so any number of them sees the same samples together
    together = settings.batch * this_process().count
    lengths = np.array([len(ids) for ids in samples["input_ids"]])
    passes = []
    for _ in range(max(1, math.ceil(settings.epochs)) if settings.max_steps is None else 1):
        passes.append(by_length(rng.permutation(rest), lengths, together, rng))
    return samples.select(held), samples.select(np.concatenate(passes))


def by_length(order: np.ndarray, lengths: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """``order`` with alike lengths in one batch, within windows, so that little is padded; batches in random order."""
    window = batch * WINDOW
    alike = [w[np.argsort(-lengths[w], kind="stable")] for w in np.split(order, range(window, len(order), window))]
    batches = [b for w in alike for b in np.split(w, range(batch, len(w), batch))]
    last = batches.pop() if len(batches[-1]) < batch else None  # only the very last may be short
    shuffled = [batches[i] for i in rng.permutation(len(batches))]
    return np.concatenate([*shuffled, *([last] if last is not None else [])])


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """``input_ids`` int64 [B, S] padded with 0 on the right, and ``labels``: -100 where nothing is learned."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for b, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[b, :n] = torch.tensor(row["input_ids"])
        labels[b, :n] = torch.where(torch.tensor(row["loss_mask"], dtype=torch.bool), ids[b, :n], -100)
    return {"input_ids": ids, "labels": labels}


def batches(samples: Dataset, size: int) -> list[dict[str, torch.Tensor]]:
    """All samples in order, collated ``size`` at a time."""
    return [collate([samples[i] for i in range(j, min(j + size, len(samples)))]) for j in range(0, len(samples), size)]


def _prompt(sample: dict[str, Any]) -> list[int]:
    """A sample's tokens before the first learned one; of plain text, its first 32."""
    first = int(np.argmax(sample["loss_mask"]))
    return sample["input_ids"][: first if first > 1 else 32]


# ---- the trainer --------------------------------------------------------------------------------------------------


def training_arguments(settings: Any, run: Path, cpu: bool, measure: str = "eval_mat", greater: bool = True) -> Any:
    """What `transformers.Trainer` is told.

    Args:
        settings: ``Settings``, or others with its fields.
        run: folder of the checkpoints.
        cpu: train there even if there is a GPU.
        measure: what chooses the checkpoint that is kept, and with ``greater`` which way is better.
    """
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(run),
        num_train_epochs=1,  # passes stand one after the other in the data
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.final_rate_share},
        warmup_steps=settings.warmup_share,  # below 1: a share
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=measure,
        greater_is_better=greater,
        seed=settings.seed,
        report_to=settings.loggers.split(","),
        remove_unused_columns=False,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and this_process().count > 1 else None,
    )


def _trainer(
    learner: Learner,
    training: Dataset,
    held_out: Dataset,
    out: Path,
    settings: Settings,
    optimizer: torch.optim.Optimizer | None,
    callbacks: Sequence[Any],
) -> Any:
    from transformers import Trainer

    class HeadTrainer(Trainer):
        """Loss per learned token, accuracies per depth in the log, MAT of the real decoder as the measure."""

        optimizer: Any
        control: Any
        loss_is_scaled_for_ga = True
        tally: torch.Tensor | None = None  # losses, hits, counts [3, K] since the last log; [3, 1 + K] with the target

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            out = model(inputs["input_ids"], inputs["labels"] >= 0)
            items = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] >= 0).sum()
            loss = out.total / items * self.args.world_size  # processes average their gradients
            if not math.isfinite(loss.item()):
                raise UsageError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower "
                    f"learning_rate={settings.learning_rate} or load the target in float32 or bfloat16. The last "
                    "checkpoint is whole: start again with --out unchanged to go on from it"
                )
            new = torch.stack([out.loss, out.hits, out.count]).detach()
            self.tally = new if self.tally is None else self.tally + new
            return loss

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if "loss" in logs and self.tally is not None:
                tally = self.accelerator.reduce(self.tally, "sum")
                loss, accuracy = (tally[:2] / tally[2].clamp_min(1)).tolist()
                K = learner.head.depths
                logs |= {f"accuracy_{k + 1}": round(a, 5) for k, a in enumerate(accuracy[-K:])}
                logs |= {f"loss_{k + 1 + K - len(loss)}": round(x, 5) for k, x in enumerate(loss)}  # the target's is 0
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

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None and settings.optimizer == "muon":
                groups = parameter_groups(learner, settings.weight_decay)
                self.optimizer = MuonAdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
            return self.optimizer if self.optimizer is not None else super().create_optimizer(*args, **kwargs)

    arguments = training_arguments(settings, out.with_name(out.name + ".run"), learner.target.device.type == "cpu")
    trainer = HeadTrainer(
        model=learner,
        args=arguments,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    trainer.model_accepts_loss_kwargs = True  # it counts the learned tokens of all processes for compute_loss
    return trainer


def _decode(learner: Learner, held_out: Dataset, settings: Settings) -> dict[str, float]:
    """MAT and tokens/s of the head as it is, greedy, on the held-out prompts."""
    from specdec.decoder import Decoder

    # a copy: use may want another dtype than training
    clone = type(learner.head)(learner.head.config)
    clone.load_state_dict(learner.head.state_dict())
    drafter = registry.drafter_class(clone.method)(checkpoint=clone)  # type: ignore[call-arg]
    decoder = Decoder(learner.target.model, drafter)
    tokens = steps = seconds = 0.0
    for sample in held_out:
        ids = torch.tensor([_prompt(sample)], device=learner.target.device)
        room = settings.eval_tokens
        if learner.target.context is not None:
            room = min(room, learner.target.context - ids.shape[1])
        if room < 1:
            continue
        decoder.generate(ids, max_new_tokens=room, do_sample=False)
        stats = decoder.stats
        assert stats is not None
        tokens, steps, seconds = tokens + stats.new_tokens, steps + len(stats.steps), seconds + stats.seconds
    decoder.target.bind(type(drafter.needs)())  # take its hooks off the model again
    return {"eval_mat": tokens / max(steps, 1), "eval_tokens_per_second": tokens / max(seconds, 1e-9)}


def _finish(
    trainer: Any,
    head: Head,
    target: Target,
    held_out: Dataset,
    out: Path,
    key: dict[str, Any],
    seconds: float,
    dtype: torch.dtype | None,
) -> None:
    """Write the checkpoint with its acceptance table, the log and the curves; ``out`` appears when all is there."""
    from specdec.training.curves import write_curves

    head.config.acceptance = acceptance(head, target, held_out)
    history = trainer.state.log_history
    evals = [row for row in history if "eval_mat" in row]
    best = max(evals, key=lambda row: row["eval_mat"]) if evals else None
    card = "## Training\n\n```json\n" + json.dumps({k: key[k] for k in ("options", "settings")}, indent=1) + "\n```\n"
    if best is not None:
        card += (
            f"\nHeld-out prompts ({key['settings']['eval_prompts']}, greedy): MAT {best['eval_mat']:.2f} at step "
            f"{best['step']}, the checkpoint kept.\n"
        )
    part = head.save_pretrained(out.with_name(out.name + ".part"), card, dtype)
    record = {**key, "steps": trainer.state.global_step, "wall_seconds_of_last_process": round(seconds), "log": history}
    (part / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_curves(history, head.method, part / "curves.png")
    replace_folder(part, out)
