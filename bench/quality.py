"""What a lossy method loses: scores of the texts that a comparison has produced.

A score belongs to a set of texts, not to one: most are means, some (Fréchet distances) are not. So each is a function
of which prompts to look at, and intervals resample prompts, the same ones for the method and for the target alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.bench.prompts import Prompt
from specdec.errors import UsageError

Statistic = Callable[[np.ndarray], float]  # numbers of prompts, int64 [n] with repetitions -> the score of their texts


@dataclass(frozen=True)
class Score:
    """One figure of one method.

    Attributes:
        value: the score.
        ci: its 95 % bootstrap interval over prompts.
        change: what it is above the target's own score on the same prompts.
        change_ci: interval of that, paired.
    """

    value: float
    ci: tuple[float, float]
    change: float
    change_ci: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Quality(Protocol):
    """How texts of a model are scored.

    Attributes:
        meanings: name of a score -> what it is, and which way is better.
        resamples: bootstrap samples that its statistics allow.
    """

    meanings: dict[str, str]
    resamples: int

    def statistics(self, ids: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> dict[str, Statistic]:
        """The scores of one method.

        Args:
            ids: generated token ids, one text per prompt.
            plain: what the target alone generated.
        """


def score(mine: Statistic, plain: Statistic, prompts: int, resamples: int) -> Score:
    """A figure with its intervals; ``plain`` is the same statistic of the target's own texts."""
    everyone = np.arange(prompts)
    picks = np.random.default_rng(0).integers(0, prompts, (resamples, prompts))
    values = np.array([(mine(pick), plain(pick)) for pick in picks])  # [resamples, 2]
    value, change = mine(everyone), mine(everyone) - plain(everyone)
    return Score(value, _interval(value, values[:, 0]), change, _interval(change, values[:, 0] - values[:, 1]))


def _interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """Percentiles, moved to where the score is: resamples of a Fréchet distance are larger than it on average."""
    low, high = np.nanquantile(resampled, [0.025, 0.975]) - np.nanmean(resampled)
    return value + float(low), value + float(high)


class TextQuality:
    """Scores of texts: how likely the target finds them, and the answers to tasks.

    Args:
        model, tokenizer: the target's.
        prompts: those with a ``reference`` are tasks; of category "math" they are scored by the answer's number, others
            by chrF (Popović 2015).
        prompt_ids: their tokens.
        greedy: whether texts are the argmax ones, which can then be the target's own word for word.

    Raises:
        UsageError: sacrebleu is missing.
    """

    resamples = 2000

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        greedy: bool,
    ):
        self.model, self.tokenizer, self.prompts, self.prompt_ids = model, tokenizer, prompts, prompt_ids
        self.greedy = greedy
        self.meanings = {
            "log p": "mean log-likelihood of a token by the target, nats; of greedy texts: higher is better"
        }
        if any(p.reference is not None and p.category == "math" for p in prompts):
            self.meanings["exact match"] = "share of math answers whose number is the reference's; higher is better"
        if any(p.reference is not None and p.category != "math" for p in prompts):
            try:
                from sacrebleu.metrics.chrf import CHRF
            except ImportError as error:
                raise UsageError("chrF needs sacrebleu: pip install 'specdec[bench]'") from error
            self._chrf = CHRF()
            self.meanings["chrF"] = "mean chrF against the reference, 0 to 100; higher is better"
        if greedy:
            self.meanings["same text"] = "share of texts that are the target's own, token for token"
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

    def statistics(self, ids: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> dict[str, Statistic]:
        sums = np.array([self._log_likelihood(i, tuple(text)) for i, text in enumerate(ids)])
        lengths = np.array([len(text) for text in ids])
        texts = self.tokenizer.batch_decode([list(text) for text in ids], skip_special_tokens=True)
        values = {
            "exact match": np.array([self._match(p, text) for p, text in zip(self.prompts, texts, strict=True)]),
            "chrF": np.array([self._chrf_of(p, text) for p, text in zip(self.prompts, texts, strict=True)]),
            "same text": np.array([list(a) == list(b) for a, b in zip(ids, plain, strict=True)], dtype=float),
        }
        found: dict[str, Statistic] = {"log p": lambda pick: float(sums[pick].sum() / lengths[pick].sum())}
        found.update({name: _mean(values[name]) for name in self.meanings if name in values})
        return found

    def _log_likelihood(self, number: int, text: tuple[int, ...]) -> float:
        """Sum of log p over a text, given its prompt. Methods often write the same one."""
        if (number, text) not in self._known:
            prompt = list(self.prompt_ids[number])
            ids = torch.tensor([prompt + list(text)], device=self.model.get_input_embeddings().weight.device)
            with torch.inference_mode():
                logits = self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # [n, V]
            chosen = logits.float().log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None].to(logits.device))
            self._known[number, text] = float(chosen.sum())
        return self._known[number, text]

    def _match(self, prompt: Prompt, text: str) -> float:
        if prompt.reference is None or prompt.category != "math":
            return float("nan")
        return float(answer(text) is not None and answer(text) == answer(prompt.reference))

    def _chrf_of(self, prompt: Prompt, text: str) -> float:
        if prompt.reference is None or prompt.category == "math":
            return float("nan")
        return float(self._chrf.sentence_score(text.strip(), [prompt.reference]).score)


def answer(text: str) -> float | None:
    """The number after the last ``####``, as GSM8K marks answers, else the last number; None without one."""
    marked = text.rpartition("####")[2] if "####" in text else text
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked)
    if not numbers:
        return None
    return float((numbers[0] if "####" in text else numbers[-1]).replace(",", ""))


def _mean(values: np.ndarray) -> Statistic:
    """Mean over the prompts that have the score."""

    def mean(pick: np.ndarray) -> float:
        chosen = values[pick]
        chosen = chosen[~np.isnan(chosen)]
        return float(chosen.mean()) if len(chosen) else float("nan")

    return mean
