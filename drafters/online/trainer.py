"""Updates in pieces that fit between requests: one optimiser step on everything in the buffer, record by record."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import torch
from torch import nn

from specdec.drafters.online.buffer import Record
from specdec.drafters.online.learner import Learner, publish

_LEAST = 32  # tokens of the smallest piece, and of the first, which tells how long a token takes
_DROP = 0.05  # fall of mean acceptance that takes weights back


class Trainer:
    """AdamW without weight decay at a constant rate; gradients of a whole update are added up before its step.

    A piece is one record, never padded, or the step. A piece is begun only if it is expected to end within the time
    given, or is the first; a record too long for that is cut to its last tokens, but not below 32. What is left goes on
    next time.

    Args:
        learner: what is trained.
        rate: learning rate.
        clip: largest norm of an update's gradient.

    Attributes:
        version: how often the draft's weights have changed.
        skipped: updates given up because their gradient was not finite.
        running: whether an update has begun and not ended.
    """

    def __init__(self, learner: Learner, rate: float, clip: float):
        self.learner, self.rate, self.clip = learner, rate, clip
        self.version = self.skipped = 0
        self._token_seconds: float | None = None
        self._step_seconds: float | None = None
        self.restart()

    def restart(self) -> None:
        """Drop the update under way and what the optimiser remembers."""
        self._records: list[Record] = []
        self._positions = 0  # of the whole update
        self.running = False
        self.learner.module.zero_grad()
        self._optimizer = torch.optim.AdamW(self.learner.module.parameters(), lr=self.rate, weight_decay=0.0)

    def begin(self, records: list[Record]) -> None:
        """Start an update on ``records``, which hold at least one position."""
        self._records, self.running = list(records), True
        self._positions = sum(len(record.positions) for record in records)

    def run(self, seconds: float) -> None:
        """Do the update's next piece, and further ones as long as they are expected to end within ``seconds``."""
        start = begun = perf_counter()
        while self.running:
            spent = begun - start
            if self._records:
                longest = 0 if self._token_seconds is None else int(seconds / self._token_seconds)
                record = self._records[0].last(max(longest, _LEAST))
                if spent and spent + len(record) * (self._token_seconds or 0.0) > seconds:
                    return
                self._records.pop(0)
                self._add(record)
                took = (perf_counter() - begun) / len(record)
                # forgets a slow moment, but only little by little
                self._token_seconds = max(took, 0.9 * (self._token_seconds or 0.0))
            else:
                expected = self._step_seconds or _LEAST * (self._token_seconds or 0.0)
                if spent and spent + expected > seconds:
                    return
                self._step()
                self._step_seconds = perf_counter() - begun
            begun = perf_counter()

    def _add(self, record: Record) -> None:
        """Add a record's part to the gradient."""
        if len(record.positions) == 0:
            return
        with torch.inference_mode(False), torch.enable_grad():
            (self.learner.loss(record) / self._positions).backward()
        self._wait()

    def _step(self) -> None:
        self.running = False
        if all(p.grad is None for p in self.learner.module.parameters()):
            return  # every record was cut before its first position; momentum alone must not move weights
        with torch.inference_mode(False):
            norm = nn.utils.clip_grad_norm_(self.learner.module.parameters(), self.clip)
            if math.isfinite(float(norm)):
                self._optimizer.step()
                publish(self.learner)
                self.version += 1
            else:
                self.skipped += 1
            self.learner.module.zero_grad()
        self._wait()

    def _wait(self) -> None:
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)

    # ---- what a later process needs to go on exactly ------------------------------------------------------------

    def weights(self) -> list[torch.Tensor]:
        """Copies of the trained weights, float32 on the CPU."""
        return [p.detach().clone().cpu() for p in self.learner.module.parameters()]

    def set_weights(self, weights: list[torch.Tensor]) -> None:
        """Train on from ``weights``, and draft with them. The optimiser starts anew."""
        with torch.inference_mode(False), torch.no_grad():
            for p, saved in zip(self.learner.module.parameters(), weights, strict=True):
                p.copy_(saved)
        publish(self.learner)
        self.restart()

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, counters and the update under way, without its records."""
        return {
            "weights": self.weights(),
            "optimizer": self._optimizer.state_dict()["state"],
            "gradients": [None if p.grad is None else p.grad.cpu() for p in self.learner.module.parameters()],
            "positions": self._positions,
            "running": self.running,
            "version": self.version,
            "skipped": self.skipped,
            "token_seconds": self._token_seconds,
            "step_seconds": self._step_seconds,
        }

    def set_state(self, state: dict[str, Any], records: list[Record]) -> None:
        """Go on from a ``state`` and the ``records`` that were ``left`` then."""
        self.set_weights(state["weights"])
        groups = self._optimizer.state_dict()["param_groups"]  # ours: the rate may be another
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for p, gradient in zip(self.learner.module.parameters(), state["gradients"], strict=True):
            p.grad = None if gradient is None else gradient.to(p.device)
        self._records, self._positions, self.running = records, state["positions"], state["running"]
        self.version, self.skipped = state["version"], state["skipped"]
        self._token_seconds, self._step_seconds = state["token_seconds"], state["step_seconds"]

    @property
    def left(self) -> list[Record]:
        """Records of the update under way that are still to come."""
        return list(self._records)


class Guard:
    """Brings good weights back when acceptance falls: a stream may drift, or be poisoned.

    Acceptance is averaged over blocks of ``length`` requests. The best block so far is remembered with the weights at
    its end. After a block that is 0.05 worse these are restored, and what is good is learned anew: if the traffic has
    changed and not the draft, nothing is lost but that block's training.

    Args:
        length: requests in a block.
        weights: those to return to at first.
    """

    def __init__(self, length: int, weights: list[torch.Tensor]):
        self.length, self.weights = length, weights
        self.best: float | None = None
        self.alphas: list[float] = []

    def watch(self, alpha: float, trainer: Trainer) -> bool:
        """Take note of a request's acceptance; True if weights were restored."""
        self.alphas.append(alpha)
        if len(self.alphas) < self.length:
            return False
        mean = sum(self.alphas) / len(self.alphas)
        self.alphas = []
        if self.best is not None and mean < self.best - _DROP:
            trainer.set_weights(self.weights)
            trainer.version += 1
            self.best = None
            return True
        if self.best is None or mean > self.best:
            self.best, self.weights = mean, trainer.weights()
        return False
