"""SoFT: all nested sub-models of a small model trained at once (Kavehzadeh et al., arXiv 2309.08968 and 2407.01955)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from specdec.drafters.s2d.nested import Nested
from specdec.drafters.s2d.segments import Segments
from specdec.errors import CompatibilityError, UsageError, first_line
from specdec.heads.checkpoint import replace_folder
from specdec.target import Target
from specdec.training.heads import Settings, batches, check_vocabulary, collate, open_run, split, training_arguments
from specdec.training.loss import LinearCrossEntropy
from specdec.training.optimizer import MuonAdamW, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel

OF_HEADS = ("objective", "decay", "eval_tokens")  # settings that mean nothing here


@dataclass(frozen=True)
class SortedSettings(Settings):
    """See ``Settings``. No target takes part; every ``eval_steps`` the losses of ``eval_prompts`` samples are measured,
    and the checkpoint of the lowest mean is kept.

    Attributes:
        submodels: D, layers of each sub-model.
        thresholds: T, see ``Nested``; None: the smallest at which the tokens that leave are the whole model's own with
            the share ``agreement``, measured on the held-out samples.
        layers: cut the checkpoint to its first layers, or add fresh ones, before training; None: as it is.
        fresh: sizes of its configuration to change; the weights then start at random.
    """

    learning_rate: float = 2e-5
    warmup_share: float = 0.04
    submodels: tuple[int, ...] = ()
    thresholds: tuple[float, ...] | None = None
    agreement: float = 0.9
    layers: int | None = None
    fresh: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Nested.of(self.submodels, self.thresholds)
        if not 0 < self.agreement <= 1:
            raise UsageError(f"agreement={self.agreement} must be a share above 0, at most 1")
        if self.layers is not None and self.layers < 1:
            raise UsageError(f"layers={self.layers} must be at least 1")


def read_settings(values: dict[str, Any]) -> SortedSettings:
    """Settings out of a mapping as YAML gives it; lists may be texts with commas.

    Raises:
        UsageError: an unknown key, or a value of the wrong kind.
    """
    kinds = {f.name: str(f.type) for f in dataclasses.fields(SortedSettings) if f.name not in OF_HEADS}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"setting {key!r} is unknown; {hint}settings: {', '.join(kinds)}")
        kind = kinds[key]
        number: Any = float if "float" in kind else int if "int" in kind else dict if "dict" in kind else str
        try:
            if value is None and "None" in kind:
                found[key] = None
            elif "tuple" in kind:
                parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
                found[key] = tuple(map(number, parts))
            else:
                found[key] = number(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError) as error:
            raise UsageError(f"setting {key}={value!r}: it takes {kind}") from error
    return SortedSettings(**found)


def load_draft(draft: str, settings: SortedSettings) -> PreTrainedModel:
    """The model to train, float32, with the layers and sizes that ``settings`` ask for.

    Raises:
        UsageError: no such model, a size it does not have, or sub-models that do not fit it (before weights are read).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(settings.seed)
    try:
        config = AutoConfig.from_pretrained(draft)
    except Exception as error:  # readers of JSON and hub raise their own kinds
        raise UsageError(f"--draft {draft!r}: no model there ({first_line(error)})") from error
    had = config.num_hidden_layers
    changes = {**(settings.fresh or {}), **({"num_hidden_layers": settings.layers} if settings.layers else {})}
    for key, value in changes.items():
        if not hasattr(config, key):
            raise UsageError(f"fresh: {config.model_type} models have no {key!r}; see {draft}/config.json")
        setattr(config, key, value)
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = (kinds * layers)[:layers]
    Nested.of(settings.submodels, settings.thresholds).check(layers)
    config.use_cache = True
    if settings.fresh:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            draft, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise UsageError(f"--draft {draft!r}: it cannot be read ({first_line(error)})") from error
    if info["missing_keys"] and layers <= had:
        raise UsageError(
            f"--draft {draft!r}: the checkpoint lacks {sorted(info['missing_keys'])[0]}; download it again"
        )
    return model.eval()


class Exits:
    """What the sub-models of a model say along texts, teacher-forced.

    Args:
        model: in eval mode; trained from outside.
        nested: its sub-models.

    Raises:
        UsageError, CompatibilityError: see ``Segments``; or an output that is more than a matrix.
    """

    def __init__(self, model: PreTrainedModel, nested: Nested):
        every = Nested(nested.submodels, (1.0,) * len(nested.submodels))
        draft = Target(model)
        self.submodels, self.norm = nested.submodels, Segments(draft, every).norm
        head = draft.head
        if head.scale != 1 or head.cap is not None or getattr(head.module, "bias", None) is not None:
            raise CompatibilityError(
                f"draft: {type(model).__name__} scales, caps or shifts its logits, which sorted training does not do; "
                "use a Llama, Qwen or Mistral model"
            )
        self._output = head.module

    def states(self, model: Any, ids: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Per sub-model what the head reads before each learned token, [N, d], and these tokens, int64 [N].

        Args:
            model: the model, or what a trainer wraps it in.
            ids, labels: int64 [B, S]; labels are -100 where nothing is learned.
        """
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        b, m = (labels[:, 1:] >= 0).nonzero().unbind(1)
        whole = len(hidden) - 1  # its states are behind the norm already
        states = [hidden[n][b, m] if n == whole else self.norm(hidden[n][b, m]) for n in self.submodels]
        return states, labels[b, m + 1]

    def loss(self, model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every sub-model, [|D|], in nats, means over the learned tokens."""
        states, tokens = self.states(model, ids, labels)
        weight = self._output.weight.float()
        return torch.stack([LinearCrossEntropy.apply(h.float(), weight, tokens) for h in states])

    @torch.no_grad()
    def chances(self, model: Any, samples: Dataset, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of every learned token: nats of each sub-model, its largest probability, and its likeliest token, all
        [|D|, N]."""
        parts = []
        for batch in batches(samples, 4):
            states, tokens = self.states(model, batch["input_ids"].to(device), batch["labels"].to(device))
            logs = [self._output(h).float().log_softmax(-1) for h in states]  # [N, V] each
            best = [x.max(-1) for x in logs]
            nats = torch.stack([-x.gather(1, tokens[:, None])[:, 0] for x in logs])
            parts.append((nats, torch.stack([x.values.exp() for x in best]), torch.stack([x.indices for x in best])))
        return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def choose_thresholds(confidence: Tensor, best: Tensor, agreement: float) -> tuple[float, ...]:
    """Per sub-model the smallest threshold beyond which the share ``agreement`` of tokens is the whole model's own.

    Args:
        confidence: [|D|, N], largest probabilities.
        best: int64 [|D|, N], likeliest tokens; the last row is the whole model's.
        agreement: share, above 0.
    """
    thresholds = []
    for c, own in zip(confidence[:-1], best[:-1], strict=True):
        order = c.argsort(descending=True)
        right = (own == best[-1])[order].double()
        enough = (right.cumsum(0) / torch.arange(1, len(c) + 1, device=c.device) >= agreement).nonzero()
        leaving = int(enough[-1]) + 1 if len(enough) else 0  # tokens above the threshold
        none, every = leaving == 0, leaving == len(c)
        thresholds.append(1.0 if none else 0.0 if every else math.ceil(float(c[order[leaving]]) * 1e3) / 1e3)
    return (*thresholds, 0.0)


def train_sorted(
    model: PreTrainedModel,
    samples: Dataset,
    out: Path,
    settings: SortedSettings,
    tokenizer: Any = None,
    resume: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Train every sub-model of ``model``; returns ``out``: an ordinary causal LM with ``s2d.json`` beside it.

    L = mean over n in D of the cross-entropy of the first n layers; all parameters train. Checkpoints go to
    ``out.run``; with ``resume`` a killed run goes on from the last whole one and ends alike.

    Args:
        model: in eval mode, on the device to train on; it is changed.
        samples: columns ``input_ids`` and ``loss_mask``.
        out: folder to fill.
        settings: see ``SortedSettings``.
        tokenizer: saved along; None: none.
        dtype: in which the weights are stored.

    Raises:
        UsageError: settings, data or an earlier run do not fit, a loss that is no number, or a disk that is full.
        CompatibilityError: a model that cannot be sorted.
    """
    torch.manual_seed(settings.seed)
    check_vocabulary(samples, model.config.vocab_size)
    nested = Nested.of(settings.submodels, settings.thresholds)
    exits = Exits(model, nested)
    held_out, training = split(samples, settings)
    trainer = _trainer(model, exits, training, held_out, out, settings)
    run = out.with_name(out.name + ".run")
    key: dict[str, Any] = {
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in OF_HEADS},
        "samples": [len(samples), int(sum(map(sum, samples["loss_mask"])))],
    }
    started = time.time()
    try:
        checkpoint = open_run(run, key, resume)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_world_process_zero():
            model.eval()
            if settings.thresholds is None:
                _, confidence, best = exits.chances(model, held_out, model.device)
                nested = Nested.of(settings.submodels, choose_thresholds(confidence, best, settings.agreement))
            key |= {"steps": trainer.state.global_step, "wall_seconds_of_last_process": round(time.time() - started)}
            _write(model.to(dtype), tokenizer, nested, {**key, "log": trainer.state.log_history}, out)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{run}: a checkpoint could not be written ({first_line(error)}); free space and give the same command: it "
            "goes on from the last whole one"
        ) from error
    trainer.accelerator.wait_for_everyone()
    return out


def _trainer(
    model: PreTrainedModel, exits: Exits, training: Dataset, held_out: Dataset, out: Path, settings: SortedSettings
) -> Any:
    from transformers import Trainer

    class SortedTrainer(Trainer):
        """Loss per learned token, losses by depth in the log and of the held-out samples."""

        optimizer: Any
        control: Any
        tally: Tensor | None = None  # sums of losses, then the learned tokens, [|D| + 1], since the last log

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            losses = exits.loss(model, inputs["input_ids"], inputs["labels"])
            count = (inputs["labels"][:, 1:] >= 0).sum()
            items = num_items_in_batch if num_items_in_batch is not None else count
            loss = losses.mean() * count / items * self.args.world_size  # processes average their gradients
            if not math.isfinite(loss.item()):
                raise UsageError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower "
                    f"learning_rate={settings.learning_rate}. The last checkpoint is whole: start again with --out "
                    "unchanged to go on from it"
                )
            new = torch.cat([losses.detach() * count, count[None]])
            self.tally = new if self.tally is None else self.tally + new
            return loss

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if "loss" in logs and self.tally is not None:
                tally = self.accelerator.reduce(self.tally, "sum")
                means = (tally[:-1] / tally[-1]).tolist()
                logs |= {f"loss_{n}": round(x, 5) for n, x in zip(exits.submodels, means, strict=True)}
                self.tally = None
            super().log(logs, *args)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            self.model.eval()
            nats, _, _ = exits.chances(self.model, held_out, self.args.device)
            means = nats.mean(1).tolist()
            metrics = {"eval_loss": sum(means) / len(means)}
            metrics |= {f"eval_loss_{n}": x for n, x in zip(exits.submodels, means, strict=True)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # already in order

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None and settings.optimizer == "muon":
                groups = parameter_groups(self.model, settings.weight_decay)
                self.optimizer = MuonAdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
            return self.optimizer if self.optimizer is not None else super().create_optimizer(*args, **kwargs)

    run, cpu = out.with_name(out.name + ".run"), model.device.type == "cpu"
    arguments = training_arguments(settings, run, cpu, measure="eval_loss", greater=False)
    trainer = SortedTrainer(
        model=model, args=arguments, train_dataset=training, eval_dataset=held_out, data_collator=collate
    )
    trainer.model_accepts_loss_kwargs = True  # it counts the learned tokens of all processes for compute_loss
    return trainer


def _write(model: PreTrainedModel, tokenizer: Any, nested: Nested, record: dict[str, Any], out: Path) -> None:
    """Weights, tokenizer, sub-models, log and curves; ``out`` appears when all is there."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        nested.save(part)
        (part / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _draw(record["log"], nested.submodels, part / "loss.png")
        for file in part.iterdir():
            file.chmod(0o644)  # some writers make files for the owner alone, but these ship to others
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draw(history: Sequence[dict[str, Any]], submodels: Sequence[int], file: Path) -> None:
    """Losses by depth over steps, trained on and held out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for n in submodels:
        for kind, style in (("loss", "-"), ("eval_loss", "--")):
            rows = [row for row in history if f"{kind}_{n}" in row]
            label = f"{n} layers" + (", held out" if kind == "eval_loss" else "")
            axes.plot([r["step"] for r in rows], [r[f"{kind}_{n}"] for r in rows], style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a learned token)")
    axes.legend()
    figure.savefig(file, dpi=90, bbox_inches="tight")
