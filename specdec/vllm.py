"""Our drafters inside vLLM: a proposer for its ``custom_class`` speculative method.

    LLM(model, speculative_config={"method": "custom_class", "model": "specdec.vllm.Proposer",
                                   "num_speculative_tokens": 5},
        additional_config={"specdec": {"drafter": "suffix", "min_prob": 0.1}})

vLLM shows a proposer tokens and nothing else, and verifies chains. So this serves drafters that read the text alone; of
a drafted tree the one path is kept that promises most. vLLM itself is never imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from specdec import registry
from specdec.contracts import Drafter, Verdict
from specdec.drafters.hybrid import Hybrid
from specdec.errors import CompatibilityError, UsageError
from specdec.state import DecodeState, Row
from specdec.target import StepOutput, Target
from specdec.tree import DraftTree, Proposal

DRAFTER = "suffix"
# what a drafter is given unless the user says otherwise: hybrid's own members include one that reads logits
DEFAULTS: dict[str, dict[str, Any]] = {"hybrid": {"members": ["suffix", "aded"]}}


class _Absent:
    """Stands where vLLM gives nothing: who asks it for something gets the reason."""

    def __init__(self, drafter: str):
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        raise CompatibilityError(
            f"drafter {self._drafter!r} asks for the target's {name!r}, and vLLM shows a custom proposer tokens only; "
            "take suffix, prompt-lookup, aded, a hybrid of these, or token-recycling with a table"
        )


class _Served(_Absent):
    """What is known of the model vLLM runs, under the names that ``Target`` has for it."""

    def __init__(self, drafter: str, config: Any):
        super().__init__(drafter)
        self._config = config.model_config
        self.device = torch.device(config.device_config.device_type)
        self.vocab_size: int = self._config.get_vocab_size()
        self.context: int = self._config.max_model_len

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        c = self._config
        if c.skip_tokenizer_init:
            return None
        return AutoTokenizer.from_pretrained(
            c.tokenizer, revision=c.tokenizer_revision, trust_remote_code=c.trust_remote_code
        )


def _ends(model_config: Any) -> frozenset[int]:
    """Tokens that end a text."""
    ids = (model_config.try_get_generation_config() or {}).get("eos_token_id")
    if ids is None:
        ids = getattr(model_config.hf_text_config, "eos_token_id", None)
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


@dataclass
class _State(DecodeState):
    """A request of one row; ``most`` drafted tokens are asked for in a step."""

    most: int = 0

    def depth_left(self, b: int) -> int:
        return min(super().depth_left(b), self.most)


class _Request:
    """One request: a row of our own, and a twin of the drafter that serves it.

    Args:
        drafter: whose tables are shared.
        state: its one row holds the prompt.
        observes: whether the drafter can learn from steps without their logits.
    """

    def __init__(self, drafter: Drafter, state: _State, observes: bool):
        self.drafter, self.state, self.row, self.observes = _twin(drafter), state, state.rows[0], observes
        self._proposal = Proposal(DraftTree.root(int(self.row.tokens[-1])))
        self.drafter.begin(state)

    def is_at(self, text: np.ndarray) -> bool:
        """Whether its tokens are ``text`` int [n]."""
        return np.array_equal(self.row.tokens, text)

    def step(self, emitted: Sequence[int]) -> list[int]:
        """Take in what the target emitted, and draft a chain after it."""
        for token in emitted:
            self.row.append(token)
        if self.observes:
            nothing = cast(StepOutput, _Absent(self.drafter.name))
            verdict = Verdict(list(range(1, len(emitted))), emitted[-1], list(emitted))
            self.drafter.observe(self.state, [self._proposal], nothing, [verdict])
        [proposal] = self.drafter.propose(self.state)
        drafted = best_path(proposal.tree) if proposal is not None and proposal.tree is not None else []
        drafted = drafted[: self.state.depth_left(0)]
        self._proposal = Proposal(DraftTree.chain(emitted[-1], drafted))
        return drafted

    def end(self) -> None:
        self.drafter.end(self.state)


def _twin(drafter: Drafter) -> Drafter:
    """The same drafter for one more request: ``begin`` replaces what a request owns, tables are shared."""
    twin = copy.copy(drafter)
    if isinstance(twin, Hybrid):
        twin.members = [_twin(member) for member in twin.members]
    return twin


def best_path(tree: DraftTree) -> list[int]:
    """Tokens of the path that may be expected to gain most: the sum of the chances that its nodes are reached."""
    prior = [1.0] * len(tree) if tree.prior is None else tree.prior.tolist()
    chance, gain = [1.0], [0.0]
    for v, parent in enumerate(tree.topology.parents[1:], start=1):
        chance.append(chance[parent] * prior[v])
        gain.append(gain[parent] + chance[v])
    best = max(range(len(tree)), key=gain.__getitem__)  # the first of equals
    return [int(tree.tokens[v]) for v in tree.topology.path(best)]


class Proposer:
    """Drafts for vLLM (0.32, model runner V1).

    Options stand in vLLM's ``additional_config`` (``vllm serve --additional-config '{"specdec": {...}}'``) under
    "specdec": ``drafter``, a name ("suffix" if left out), and that drafter's own options. Lossless as vLLM's own
    proposers are: vLLM verifies every drafted token.

    vLLM does not say which request a row belongs to, and rows move. A request is known by its text: it goes on where
    a row's text before the step is the text it has. Requests of equal text are interchangeable. One that no row
    continues has ended, and teaches what its drafter learns from finished requests; if it was only preempted, it comes
    back as a new request with its text as prompt.

    Args:
        vllm_config: vLLM's.

    Attributes:
        drafter: whose tables all requests share.

    Raises:
        UsageError: unknown drafter or option.
        CompatibilityError: a drafter that needs more than tokens, or that is not lossless.
    """

    def __init__(self, vllm_config: Any):
        options = self._options(vllm_config)
        name = str(options.pop("drafter", DRAFTER))
        taken = registry.options(registry.drafter_class(name))
        for option in options:
            if option not in taken:
                raise UsageError(
                    f"additional_config: specdec.{option} is no option of drafter {name!r}; it takes {', '.join(taken)}"
                )
        self.drafter = registry.drafter(name, **{**DEFAULTS.get(name, {}), **options})
        if not self.drafter.lossless:
            raise CompatibilityError(f"drafter {name!r} emits tokens unverified, and vLLM verifies all; take another")
        self.k: int = vllm_config.speculative_config.num_speculative_tokens
        self._target = _Served(name, vllm_config)
        self.drafter.bind(cast(Target, self._target))
        self._eos = _ends(vllm_config.model_config)
        self._requests: list[_Request] = []
        self._observes = self._rehearse()

    @staticmethod
    def _options(vllm_config: Any) -> dict[str, Any]:
        config = vllm_config.additional_config
        options = config.get("specdec", {}) if isinstance(config, dict) else {}
        if not isinstance(options, dict):
            raise UsageError(f"additional_config: specdec={options!r} must be an object like {{'drafter': 'suffix'}}")
        return dict(options)

    def _rehearse(self) -> bool:
        """Play a toy request, so that a drafter that needs more than tokens is refused now; whether it observes."""
        observes, taught = True, self.drafter.warm
        try:
            self._play(observes)
        except CompatibilityError:
            if not taught:
                raise
            observes = False  # it learns from logits, but a file has taught it
            self._play(observes)
        self.drafter.reset()  # what the toy taught
        return observes

    def _play(self, observes: bool) -> None:
        request = self._start(np.zeros(2, dtype=np.int32), observes)
        request.step([0])
        request.step([0])
        request.end()

    def _start(self, prompt: np.ndarray, observes: bool) -> _Request:
        ids = torch.from_numpy(prompt.astype(np.int64))
        row = Row(0, ids, 0, len(ids), cast(Any, None), cast(Any, None))  # made small; it grows with its text
        row.max_length = self._target.context
        state = _State([row], cast(Target, self._target), self.drafter.budget, self._eos, most=self.k)
        return _Request(self.drafter, state, observes)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A chain per row, called by vLLM after every step.

        Args:
            sampled_token_ids: per row of the batch the tokens it gained, [] while its prompt is read.
            num_tokens_no_spec: int [>= B], length of each row's text, these tokens included.
            token_ids_cpu: int32 [>= B, max_model_len], the texts.
            slot_mappings: not used.

        Returns:
            Per row at most ``num_speculative_tokens`` ids, [] for nothing worth drafting.
        """
        before = {
            i: token_ids_cpu[i, : num_tokens_no_spec[i] - len(sampled)]
            for i, sampled in enumerate(sampled_token_ids)
            if sampled
        }
        taken = {i: self._take(text) for i, text in before.items()}
        for request in self._requests:  # nobody's
            request.end()
        self._requests = []
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for i, known in taken.items():
            request = known or self._start(before[i], self._observes)
            drafts[i] = request.step(sampled_token_ids[i])
            self._requests.append(request)
        return drafts

    def _take(self, text: np.ndarray) -> _Request | None:
        """The request whose text this is, out of those not taken yet."""
        for j, request in enumerate(self._requests):  # rows rarely move: mostly the first
            if request.is_at(text):
                return self._requests.pop(j)
        return None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: vLLM calls this of every proposer."""
