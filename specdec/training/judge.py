"""Train a judge (Judge Decoding, arXiv 2501.19309): `specdec train judge`, and its data, `specdec train judge-data`.

The target is frozen. Its hidden states at the answers' tokens are read once, by teacher forcing, and kept in `out.run`;
then a linear probe is fitted. Questions, never tokens, are split into training and validation.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata

from specdec.errors import UsageError
from specdec.heads.checkpoint import replace_folder
from specdec.processes import ALONE, Process, gathering, this_process
from specdec.target import Target
from specdec.verifiers.judge.labels import ACCEPTABLE, IGNORED, MISTAKEN, Example, encode, wrong_answer, wrong_number
from specdec.verifiers.judge.module import JudgeHead

from .conversations import json_rows
from .data import read_sources
from .distill import sha256
from .heads import public_name
from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Progress = Callable[[int, int, str], None]

PART = 64  # examples whose features make one file of the cache
RESAMPLES = 300  # of questions, for intervals
BINS = 10  # of the calibration plot


# --- data --------------------------------------------------------------------------------------------------------


def read_examples(file: Path, argument: str = "--data") -> list[Example]:
    """The rows of a `.jsonl` file: "prompt", "correct", "wrong", "mistake": [start, end), and optionally "kind".

    Raises:
        UsageError: no such file, no rows, or the row that lacks or mistypes something.
    """
    examples = []
    for number, row in enumerate(json_rows(file, argument), start=1):
        where = f"{argument} {file}: row {number}"
        for key in ("prompt", "correct", "wrong"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise UsageError(f"{where}: {key!r} must be text that is not empty (keys: {', '.join(row)})")
        span = row.get("mistake")
        if not isinstance(span, list) or len(span) != 2 or not all(type(m) is int for m in span):
            raise UsageError(f"{where}: 'mistake' must be [start, end], characters of 'wrong'; it is {span!r}")
        start, end = span
        if not 0 <= start < end <= len(row["wrong"]):
            raise UsageError(
                f"{where}: mistake [{start}, {end}] must be a span of 'wrong', which has {len(row['wrong'])} characters"
            )
        kind = str(row.get("kind", "all"))
        examples.append(Example(row["prompt"], row["correct"], row["wrong"], (start, end), kind))
    if not examples:
        raise UsageError(
            f'{argument} {file}: there is no row in it; write rows of "prompt", "correct", "wrong" and "mistake"'
        )
    return examples


def make_examples(recipe: Recipe, data: Path, count: int, held_out: bool = False) -> list[Example]:
    """Up to `count` examples of each kind from a recipe's documents, with mistakes made by rule; seeded by the recipe.

    "math" (reader `math`): a number of the right answer is changed. "qa" (reader `context_questions`): the answer to
    another question about the same passage; one question a passage, so that no passage is in two parts of a split.

    Args:
        recipe: whose sources are read.
        data: folder of its files.
        count: of each kind.
        held_out: from the documents that the recipe holds out, in place of those it trains on.

    Raises:
        RecipeError: files that are missing, or no source of either reader.
    """
    makers = {"math": ("math", _math), "context_questions": ("qa", _qa)}
    sources = [source for source in recipe.sources if source.reader in makers]
    if not sources:
        raise RecipeError(
            f"recipe {recipe.name!r}: no source has a reader of {sorted(makers)}, so no mistake can be made"
        )
    documents = read_sources(dataclasses.replace(recipe, sources=sources), data)
    examples = []
    for source in sources:
        kind, make = makers[source.reader]
        texts = documents[source.name].held_out if held_out else documents[source.name].train
        dice = random.Random(f"{recipe.seed} judge {source.name}")
        made = (make(text, dice) for text in dice.sample(texts, len(texts)))
        found = [dataclasses.replace(example, kind=kind) for example in made if example is not None]
        examples += found[:count]
    return examples


def _math(text: str, dice: random.Random) -> Example | None:
    question, _, answer = text.partition("\nAnswer:")
    prompt = question + "\nAnswer:"
    made = wrong_number(prompt, answer, dice)
    return Example(prompt, answer, *made) if made else None


def _qa(text: str, dice: random.Random) -> Example | None:
    context, *pairs = text.split("\nQuestion: ")
    if len(context.split()) > 260:  # as in the held-out prompts
        return None
    asked = [pair.partition("\nAnswer:") for pair in pairs]
    i = dice.randrange(len(asked))
    question, _, answer = asked[i]
    made = wrong_answer(answer, [other for j, (_, _, other) in enumerate(asked) if j != i], dice)
    return Example(f"{context}\nQuestion: {question}\nAnswer:", answer, *made) if made else None


# --- features ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """The labelled tokens of some examples.

    Attributes:
        hidden: [n, d], float16 (float32 where that overflows).
        label: int64 [n], ACCEPTABLE or MISTAKEN.
        example: int64 [n], whose answer the token is in.
        token: int64 [n], its id.
    """

    hidden: torch.Tensor
    label: torch.Tensor
    example: torch.Tensor
    token: torch.Tensor

    def of(self, pick: torch.Tensor) -> Features:
        """Those tokens that ``pick``, a bool tensor [n], marks."""
        return Features(*(getattr(self, f.name)[pick] for f in dataclasses.fields(self)))


def read_features(
    head: JudgeHead,
    target: Target,
    examples: Sequence[Example],
    folder: Path,
    settings: JudgeSettings,
    progress: Progress,
) -> Features:
    """Teacher-force every answer through the target; parts that ``folder`` holds already are taken from there."""
    _write_parts(head, target, examples, folder, settings, progress, ALONE)
    parts = [load_file(file) for file in _files(examples, folder).values()]
    return Features(*(torch.cat([part[f.name] for part in parts]) for f in dataclasses.fields(Features)))


def _files(examples: Sequence[Example], folder: Path) -> dict[int, Path]:
    """By the first example in it."""
    return {start: folder / f"part-{start:06d}.safetensors" for start in range(0, len(examples), PART)}


def _write_parts(
    head: JudgeHead,
    target: Target,
    examples: Sequence[Example],
    folder: Path,
    settings: JudgeSettings,
    progress: Progress,
    process: Process,
) -> None:
    """Make this process's share of the parts that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(_files(examples, folder).items())[process.rank :: process.count]
    for done, (start, file) in enumerate(mine):
        if not file.exists():
            progress(done, len(mine), f"hidden states of {len(examples)} examples")
            found = _part(head, target, examples[start : start + PART], start, settings)
            save_file(found, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)


def _part(
    head: JudgeHead, target: Target, examples: Sequence[Example], start: int, settings: JudgeSettings
) -> dict[str, torch.Tensor]:
    most = min(settings.max_length, target.context or settings.max_length)
    rows: list[tuple[int, list[int], list[int]]] = []
    for i, example in enumerate(examples, start=start):
        for answer, mistake in ((example.correct, None), (example.wrong, example.mistake)):
            tokens, labels = encode(
                example.prompt, answer, mistake, target.tokenizer, settings.chat, head.config.after_error
            )
            rows.append((i, tokens[:most], labels[:most]))
    rows.sort(key=lambda row: len(row[1]))
    found: dict[str, list[torch.Tensor]] = {f.name: [] for f in dataclasses.fields(Features)}
    for batch in (rows[k : k + settings.forward_batch] for k in range(0, len(rows), settings.forward_batch)):
        ids = torch.zeros(len(batch), len(batch[-1][1]), dtype=torch.long)  # [B, S]
        label = torch.full_like(ids, IGNORED)
        for b, (_, tokens, labels) in enumerate(batch):
            ids[b, : len(tokens)], label[b, : len(tokens)] = torch.tensor(tokens), torch.tensor(labels)
        kept = label != IGNORED
        hidden = target.read(ids, head.needs)[head.tap].float().cpu()[kept]
        found["hidden"].append(hidden.half() if bool((hidden.abs() < 65504).all()) else hidden)
        found["label"].append(label[kept])
        found["example"].append(torch.tensor([i for i, _, _ in batch])[:, None].expand_as(ids)[kept])
        found["token"].append(ids[kept])
    return {name: torch.cat(tensors) for name, tensors in found.items()}


# --- fitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is trained; every field is a key of ``--config`` and ``--set``.

    Attributes:
        pre_norm: read hidden states before the final norm (the paper), or after it.
        chat: put prompts into the chat template; do so if it is done in use.
        after_error: labels behind a mistake, "ignore" or "bad".
        max_length: tokens of a prompt with its answer, at most the model's context; the rest is cut off.
        validation: share of the questions that decide when to stop, and the threshold.
        recall: share of the validation's mistaken tokens that the threshold must catch, of each kind.
        learning_rate, weight_decay, batch: of AdamW on standardised features; ``batch`` in tokens.
        epochs, patience: most passes, and passes without a better validation loss after which it stops.
        forward_batch: answers per forward of the target.
        seed: of the split and the order.
    """

    pre_norm: bool = True
    chat: bool = False
    after_error: str = "ignore"
    max_length: int = 2048
    validation: float = 0.1
    recall: float = 0.9
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 1024
    epochs: int = 100
    patience: int = 5
    forward_batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "patience", "forward_batch", "max_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("validation", "recall"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be a share between 0 and 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise UsageError(
                f"learning_rate={self.learning_rate} must be above 0, and weight_decay={self.weight_decay} not below"
            )

    @classmethod
    def of(cls, values: dict[str, Any]) -> JudgeSettings:
        """Settings from a YAML mapping; raises UsageError for a key that is unknown or a value of the wrong kind."""
        kinds: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for key, value in values.items():
            if key not in kinds:
                close = difflib.get_close_matches(key, kinds, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UsageError(f"setting {key!r} is unknown; {hint}settings are {', '.join(kinds)}")
            try:
                if kinds[key] is bool and not isinstance(value, bool):
                    raise ValueError
                found[key] = kinds[key](value)  # YAML reads 1e-3 as text
            except (TypeError, ValueError) as error:
                raise UsageError(f"setting {key}={value!r}: it takes {kinds[key].__name__}") from error
        return cls(**found)


def split_questions(examples: Sequence[Example], share: float, seed: int) -> torch.Tensor:
    """Bool [examples], the validation's: examples of one prompt stay together.

    Raises:
        UsageError: fewer than two different prompts.
    """
    prompts = sorted({example.prompt for example in examples})
    if len(prompts) < 2:
        raise UsageError("--data: a judge needs questions to train on and others to validate on; give at least two")
    random.Random(seed).shuffle(prompts)
    chosen = set(prompts[: min(max(1, round(share * len(prompts))), len(prompts) - 1)])
    return torch.tensor([example.prompt in chosen for example in examples])


def balance(label: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Weight of each token, float32 [n]: N / (2 N1) for acceptable and N / (2 N0) for mistaken ones, N1 + N0 = N.

    They are counted within each kind: where kinds differ in their share of mistakes, a judge would otherwise learn to
    tell the kinds apart.

    Args:
        label: int64 [n], ACCEPTABLE or MISTAKEN.
        kind: int64 [n].

    Raises:
        UsageError: there are none of one label.
    """
    if len(set(label.tolist())) < 2:
        raise UsageError(
            f"--data: a part of the split has {int((label == ACCEPTABLE).sum())} acceptable and "
            f"{int((label == MISTAKEN).sum())} mistaken tokens; a judge needs both. Give more examples, or raise "
            "max_length"
        )
    weight = torch.zeros(len(label))
    for k in kind.unique():
        for y in (ACCEPTABLE, MISTAKEN):
            those = (kind == k) & (label == y)
            weight[those] = (kind == k).sum() / (2 * those.sum())
    return weight


def weighted_loss(f: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """-mean(weight (y log s(f) + (1 - y) log(1 - s(f)))) over tokens; all [n], y = 1 acceptable."""
    return torch.nn.functional.binary_cross_entropy_with_logits(f, label.to(f.dtype), weight)


def fit(
    head: JudgeHead, train: Features, held: Features, kind: torch.Tensor, settings: JudgeSettings
) -> list[dict[str, float]]:
    """Train w and b in place, keep those of the lowest validation loss; returns the losses by epoch.

    Args:
        kind: int64 [examples], see ``balance``.
    """
    weight, held_weight = (balance(part.label, kind[part.example]) for part in (train, held))
    x, y = train.hidden.float(), train.label
    head.mean.copy_(x.mean(dim=0))
    spread = x.std(dim=0)
    head.scale.copy_(torch.where(spread > 1e-6 * spread.max(), spread, 1.0))  # what never varies is not blown up
    groups: list[dict[str, Any]] = [
        {"params": [head.weight], "weight_decay": settings.weight_decay},
        {"params": [head.bias]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    history: list[dict[str, float]] = []
    best, kept, waited = math.inf, {}, 0
    for epoch in range(settings.epochs):
        total = 0.0
        for pick in torch.randperm(len(y), generator=generator).split(settings.batch):
            loss = weighted_loss(head(x[pick]), y[pick], weight[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(pick)
        with torch.no_grad():
            now = weighted_loss(head(held.hidden), held.label, held_weight).item()
        history.append({"epoch": epoch + 1, "loss": total / len(y), "validation_loss": now})
        waited += 1
        if now < best:
            best, waited = now, 0
            kept = {name: t.detach().clone() for name, t in head.state_dict().items()}
        if waited == settings.patience:
            break
    head.load_state_dict(kept)
    return history


def choose_delta(kinds: Sequence[Scored], recall: float) -> float:
    """The lowest threshold that catches a share of ``recall`` of each kind's mistaken tokens (chance <= delta)."""
    wrong = [s.chance[s.label == MISTAKEN] for s in kinds]
    return max(float(np.quantile(chances, recall, method="inverted_cdf")) for chances in wrong)


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Judged tokens, arrays [n]: the judge's probability, label, example and token id."""

    chance: np.ndarray
    label: np.ndarray
    example: np.ndarray
    token: np.ndarray

    @classmethod
    def by(cls, head: JudgeHead, features: Features) -> Scored:
        with torch.no_grad():
            chance = head.acceptable(features.hidden)
        return cls(*(t.numpy() for t in (chance, features.label, features.example, features.token)))

    def at(self, pick: np.ndarray) -> Scored:
        return Scored(self.chance[pick], self.label[pick], self.example[pick], self.token[pick])


def auc(s: Scored) -> float:
    """The chance that an acceptable token scores higher than a mistaken one, ties half; nan without either."""
    wins, pairs = _wins(s.chance, s.label)
    return wins / pairs if pairs else math.nan


def auc_same_token(s: Scored) -> float:
    """The same among pairs of one token id: knowing which tokens are often mistaken (digits) does not help here."""
    order = np.argsort(s.token, kind="stable")
    cuts = np.flatnonzero(np.diff(s.token[order])) + 1
    found = [_wins(s.chance[group], s.label[group]) for group in np.split(order, cuts)]
    pairs = sum(p for _, p in found)
    return sum(w for w, _ in found) / pairs if pairs else math.nan


def _wins(chance: np.ndarray, label: np.ndarray) -> tuple[float, int]:
    """Mann-Whitney's U of the acceptable tokens, and the number of pairs."""
    n1 = int((label == ACCEPTABLE).sum())
    n0 = len(label) - n1
    if not n1 or not n0:
        return 0.0, 0
    return float(rankdata(chance)[label == ACCEPTABLE].sum()) - n1 * (n1 + 1) / 2, n1 * n0


STATISTICS = {"auc": auc, "auc_same_token": auc_same_token}


def interval(statistic: Callable[[Scored], float], s: Scored) -> tuple[float, float]:
    """95 % bootstrap interval, resampling examples."""
    of = [np.flatnonzero(s.example == e) for e in np.unique(s.example)]
    dice = np.random.default_rng(0)
    drawn = (s.at(np.concatenate([of[i] for i in dice.integers(len(of), size=len(of))])) for _ in range(RESAMPLES))
    low, high = np.nanquantile([statistic(d) for d in drawn], [0.025, 0.975])
    return float(low), float(high)


def measure(s: Scored, delta: float) -> dict[str, Any]:
    """What a report says of some judged tokens.

    "caught": share of mistaken tokens at or below the threshold; "accepted": share of acceptable ones above it;
    "precision": share of acceptable ones among those above it. "auc" and "auc_same_token" (left out where no token
    occurs both ways) come with their intervals.
    """
    right, wrong = s.chance[s.label == ACCEPTABLE], s.chance[s.label == MISTAKEN]

    def at(threshold: float) -> dict[str, float]:
        kept, passed = (right > threshold).sum(), (wrong > threshold).sum()
        return {
            "caught": float((wrong <= threshold).mean()),
            "accepted": float((right > threshold).mean()),
            "precision": float(kept / max(kept + passed, 1)),
        }

    found: dict[str, Any] = {
        "examples": len(np.unique(s.example)),
        "acceptable": len(right),
        "mistaken": len(wrong),
        "at_delta": at(delta),
        "at_0.5": at(0.5),
    }
    for name, statistic in STATISTICS.items():
        value = statistic(s)
        if not math.isnan(value):
            found[name] = (value, *interval(statistic, s))
    return found


def by_kind(s: Scored, examples: Sequence[Example]) -> dict[str, Scored]:
    """The tokens of each kind of example that has mistakes in it."""
    kinds = np.array([example.kind for example in examples])[s.example]
    parts = {kind: s.at(kinds == kind) for kind in dict.fromkeys(kinds.tolist())}
    return {kind: part for kind, part in parts.items() if len(set(part.label.tolist())) == 2}


# --- the command -------------------------------------------------------------------------------------------------


def train_judge(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Path,
    out: Path,
    settings: JudgeSettings,
    progress: Progress,
    test: Path | None = None,
    target_id: str = "",
    resume: bool = True,
) -> Path:
    """Train a judge; returns ``out``, which then holds the checkpoint, its card, ``training.json`` and ``judge.png``.

    Hidden states are kept in ``out.run``; with ``resume`` those of an interrupted run are used again.

    Args:
        model: the target, in the precision it will be used in.
        tokenizer: the target's; a fast one.
        data: see ``read_examples``.
        out: folder to fill.
        settings: see ``JudgeSettings``.
        progress: called with (done, total, text).
        test: held-out rows that are only measured on.
        target_id: what the model card calls the target.

    Raises:
        UsageError: data, settings or an earlier run do not fit.
    """
    if not tokenizer.is_fast:
        raise UsageError("--target: the tokenizer does not tell which characters a token stands for; give a fast one")
    if settings.chat and not tokenizer.chat_template:
        raise UsageError("chat=true: this model's tokenizer has no chat template; leave it out")
    examples = read_examples(data)
    held = split_questions(examples, settings.validation, settings.seed)
    tests = read_examples(test, "--test") if test is not None else []
    target = Target(model, tokenizer=tokenizer)
    head = JudgeHead.fresh(target, pre_norm=settings.pre_norm, after_error=settings.after_error)
    head.config.target_id = public_name(target_id)
    key = {
        "target": head.config.target_id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "data_sha256": sha256(data),
        "test_sha256": sha256(test) if test is not None else None,
        **{name: getattr(settings, name) for name in ("pre_norm", "chat", "after_error", "max_length")},
    }
    run = out.with_name(out.name + ".run")
    process = this_process()
    with gathering(process) as gather:
        if process.first:
            _open_run(run, key, resume)
        gather(None)  # the others wait for it
        for rows, name in ((examples, "training"), (tests, "test")):
            _write_parts(head, target, rows, run / name, settings, progress, process)
        if not gather(None):
            return out
    features = read_features(head, target, examples, run / "training", settings, progress)
    parts = (features.of(~held[features.example]), features.of(held[features.example]))
    names = sorted({example.kind for example in examples})
    history = fit(head, *parts, torch.tensor([names.index(example.kind) for example in examples]), settings)
    validation = Scored.by(head, parts[1])
    kinds = by_kind(validation, examples) or {"all": validation}
    head.config.delta = choose_delta(list(kinds.values()), settings.recall)
    scored = {"validation": (validation, examples)}
    if tests:
        scored["held out"] = (
            Scored.by(head, read_features(head, target, tests, run / "test", settings, progress)),
            tests,
        )
    report = {
        f"{part}, {kind}": measure(s, head.config.delta)
        for part, (all_of_it, rows) in scored.items()
        for kind, s in by_kind(all_of_it, rows).items()
    }
    record = {**key, "settings": dataclasses.asdict(settings), "delta": head.config.delta, "measured": report}
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    head.save_pretrained(part, _card(head, report, settings))
    (part / "training.json").write_text(json.dumps({**record, "log": history}, indent=1) + "\n", encoding="utf-8")
    last, rows = scored["held out"] if tests else scored["validation"]
    write_plots(history, by_kind(last, rows), head.config.delta, "held out" if tests else "validation", part)
    return replace_folder(part, out)


def _open_run(run: Path, key: dict[str, Any], resume: bool) -> None:
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    file = run / "run.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != key:
        raise UsageError(f"{run}: it holds features of other settings or data; give another --out, or use --no-resume")
    run.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")  # half a file would stop every later start
    part.write_text(json.dumps(key, indent=1), encoding="utf-8")
    part.replace(file)


def _card(head: JudgeHead, report: dict[str, Any], settings: JudgeSettings) -> str:
    lines = [
        "---\nlibrary_name: specdec\ntags: [speculative-decoding, judge]\n---",
        f"# A judge for {head.config.target_id or 'a target of the sizes in config.json'}\n",
        f"{head.config.hidden_size + 1} parameters. Use: `Decoder(model, drafter, Judge(FOLDER))`. Lossy.\n",
        f"Threshold {head.config.delta:.3f}, the lowest that catches {settings.recall:.0%} of the mistaken tokens "
        "of each kind in validation.\n",
        "| | examples | acceptable, mistaken tokens | AUC [95 %] | same token [95 %] | caught | accepted | caught, "
        "accepted at 0.5 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, m in report.items():
        d, h = m["at_delta"], m["at_0.5"]
        areas = ["{:.3f} [{:.3f}, {:.3f}]".format(*m[area]) if area in m else "-" for area in STATISTICS]
        lines.append(
            f"| {name} | {m['examples']} | {m['acceptable']}, {m['mistaken']} | {' | '.join(areas)} | "
            f"{d['caught']:.0%} | {d['accepted']:.0%} | {h['caught']:.0%}, {h['accepted']:.0%} |"
        )
    lines.append(
        "\nAUC: the chance that an acceptable token scores above a mistaken one; same token: among pairs of one token "
        "id; intervals: bootstrap over examples. caught: mistaken tokens at or below the threshold; accepted: "
        "acceptable ones above it."
    )
    return "\n".join(lines) + "\n"


def write_plots(
    history: Sequence[dict[str, float]], kinds: dict[str, Scored], delta: float, part: str, folder: Path
) -> None:
    """Draw ``judge.png``: ROC, calibration, and what each threshold catches and accepts, by kind; and the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4), layout="constrained")
    roc, calibration, thresholds, loss = figure.subplots(1, 4)
    grid = np.linspace(0, 1, 201)
    for kind, s in kinds.items():
        right, wrong = s.chance[s.label == ACCEPTABLE], s.chance[s.label == MISTAKEN]
        caught, accepted = ([(x <= t).mean() for t in grid] for x in (wrong, right))
        roc.plot(accepted, caught, label=f"{kind}: AUC {auc(s):.3f}")
        thresholds.plot(grid, caught, label=f"{kind}: mistakes caught")
        thresholds.plot(grid, 1 - np.array(accepted), linestyle=":", label=f"{kind}: acceptable kept")
        # both kinds of token weigh alike, as in training
        weight = np.where(s.label == ACCEPTABLE, 1 / len(right), 1 / len(wrong))
        index = np.minimum((s.chance * BINS).astype(int), BINS - 1)
        share = [
            np.average(s.label[index == b], weights=weight[index == b]) if (index == b).any() else math.nan
            for b in range(BINS)
        ]
        calibration.plot((np.arange(BINS) + 0.5) / BINS, share, marker="o", label=kind)
    roc.set(xlabel="acceptable tokens refused", ylabel="mistaken tokens refused", title=part)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    calibration.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    calibration.set(xlabel="judge's probability", ylabel="acceptable, both kinds weighing alike")
    thresholds.axvline(delta, color="grey", linewidth=0.8)
    thresholds.set(xlabel="threshold", ylabel="share of tokens")
    for name in ("loss", "validation_loss"):
        loss.plot([row["epoch"] for row in history], [row[name] for row in history], label=name.replace("_", " "))
    loss.set(xlabel="epoch", ylabel="weighted loss (nats)")
    for axes in (roc, calibration, thresholds, loss):
        axes.legend()
    figure.savefig(folder / "judge.png", dpi=90)
