"""The drop-in surface: everything ``generate()`` prepares comes in, everything it returns goes out.

transformers prepares the request (configuration, processors, criteria, padding mask) and calls the Decoder as
``custom_generate``; what it does not hand on to a callable (streamer, tokenizer) is carried here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from specdec.errors import UsageError
from specdec.sampling import Randomness, Sampler
from specdec.state import DecodeState, Row
from specdec.stopping import StopRules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.contracts import Drafter, Verifier
    from specdec.target import Target

# what generate() may hand over besides the named arguments; anything else would silently be ignored
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "cache_position"}


class GenerateSurface:
    """``generate`` and ``__call__`` of ``Decoder``."""

    if TYPE_CHECKING:
        target: Target
        drafter: Drafter
        verifier: Verifier
        tokenizer: Any
        model: PreTrainedModel
        run: Callable[..., None]
        catch_up: Callable[[DecodeState], None]

    _streamer: Any = None

    def generate(self, *args: Any, lossless: bool = False, **kwargs: Any) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Like ``model.generate``: same arguments, same return types, same text.

        Takes input ids or a batch encoding, ``generation_config`` and keyword settings, ``logits_processor``,
        ``stopping_criteria``, ``stop_strings`` (with ``tokenizer`` here or in the Decoder), ``streamer``,
        ``return_dict_in_generate`` with ``output_scores``/``output_logits``, ``num_return_sequences``, left-padded
        batches and ``past_key_values`` of an earlier call.

        Args:
            lossless: refuse to run with a drafter or verifier that may change the text or its distribution.

        Returns:
            int64 [B, prompt + new] or ``GenerateDecoderOnlyOutput``.

        Raises:
            UsageError: beams, guidance, assistants, encoder-decoder inputs and other requests that cannot be served.
        """
        if lossless:
            self._refuse_lossy()
        for name in ("assistant_model", "custom_generate", "negative_prompt_ids", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise UsageError(f"{name} cannot be combined with a Decoder, which drafts by itself; leave it out")
        if kwargs.get("synced_gpus"):
            raise UsageError("synced_gpus=True is not supported: rows finish after different numbers of forwards")
        self._streamer = kwargs.pop("streamer", None)
        tokenizer = kwargs.pop("tokenizer", None) or self.tokenizer
        # generate() cannot see the tokenizer of a callable, so stop strings become a criterion here
        config = kwargs.get("generation_config") or self.model.generation_config
        strings = kwargs.pop("stop_strings", None) or config.stop_strings
        if strings is not None:
            if tokenizer is None:
                raise UsageError("stop_strings needs the tokenizer: pass tokenizer=... to Decoder or to generate")
            criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
            kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
            if config.stop_strings is not None:
                kwargs["generation_config"] = copy.deepcopy(config)
                kwargs["generation_config"].stop_strings = None
        if self._streamer is not None:
            kwargs["streamer"] = self._streamer
        if isinstance(kwargs.get("past_key_values"), Cache):
            kwargs["past_key_values"]._is_user_defined = True  # transformers 5.16 does not say so
        try:
            return self.model.generate(*args, custom_generate=self, **kwargs)
        finally:
            self._streamer = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        lossless: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The decoding method ``generate(custom_generate=decoder)`` calls. Use ``generate`` above, or that."""
        if lossless:
            self._refuse_lossy()
        if model is not self.model:
            raise UsageError("custom_generate: this Decoder wraps another model; make one with Decoder(model, ...)")
        if self.target.ranks is not None:
            self.target.ranks.agree(input_ids, model_kwargs.get("attention_mask"), generation_config)
        _refuse(generation_config, logits_processor, model_kwargs)
        streamer = self._streamer if self._streamer is not None else _callers_streamer()
        if streamer is not None and len(input_ids) > 1:
            raise UsageError(f"streamer takes one sequence, this batch has {len(input_ids)}; generate them one by one")
        rules = StopRules(stopping_criteria)
        state = self._state(input_ids, logits_processor, rules, generation_config, model_kwargs.get("attention_mask"))

        def emit(row: Row, tokens: list[int], drafted: int) -> None:
            if streamer is not None and tokens:
                if hasattr(streamer, "accepted"):  # our own streamers colour what was drafted
                    streamer.accepted(drafted)
                streamer.put(torch.tensor(tokens))

        as_dict = generation_config.return_dict_in_generate
        past = model_kwargs.get("past_key_values")
        wants_cache = as_dict or getattr(past, "_is_user_defined", False)
        cache: Cache | None = None
        with self.target.session():
            rows = state.rows
            longest = max(row.max_length for row in rows)
            capacity = min(longest, max(len(row) for row in rows) + 1024) + state.budget
            self.target.open([row.index for row in rows], capacity)
            if isinstance(past, Cache) and past.get_seq_length() > 0:
                self._import(past, state)
            self.run(state, rules, emit, keep_rows=bool(wants_cache))
            sequences = self._sequences(state, input_ids, generation_config)
            if wants_cache:
                for row, sequence in zip(rows, sequences, strict=True):
                    for token in sequence[len(row) :].tolist():
                        row.append(token)  # generate() caches the padding of finished rows too
                self.catch_up(state)
                exported = self.target.export([row.pad for row in rows])
        if streamer is not None:
            streamer.end()
        sequences = sequences.clone()  # made under inference_mode: give the caller an ordinary tensor
        if wants_cache:
            cache = DynamicCache(config=self.target.config)
            for layer, (keys, values) in enumerate(exported):
                cache.update(keys.clone(), values.clone(), layer)
            if isinstance(past, DynamicCache):  # the caller's own goes from turn to turn
                past.layers, cache = cache.layers, past
        if not as_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_stack(state, "recorded_scores") if state.record_scores else None,
            logits=_stack(state, "recorded_logits") if state.record_logits else None,
            past_key_values=cache,
        )

    def _refuse_lossy(self) -> None:
        """Raise UsageError naming each part that may change the text."""
        parts: dict[str, Drafter | Verifier] = {"drafter": self.drafter, "verifier": self.verifier}
        lossy = [f"{kind} {part.name!r}" for kind, part in parts.items() if not part.lossless]
        if lossy:
            raise UsageError(
                f"lossless=True: {' and '.join(lossy)} may change the text; take a lossless one (`specdec list`), or "
                "leave lossless out"
            )

    def _state(
        self,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        rules: StopRules,
        config: Any,
        attention_mask: torch.Tensor | None,
    ) -> DecodeState:
        """Rows for a request, checked."""
        if input_ids.shape[1] == 0:
            raise UsageError("input_ids is empty: give at least one token (a tokenizer's bos token will do)")
        biggest = int(input_ids.max())
        if biggest >= self.target.vocab_size or int(input_ids.min()) < 0:
            raise UsageError(f"input_ids contains {biggest}, the model has {self.target.vocab_size} tokens (0-based)")
        pads = _padding(input_ids, attention_mask)
        room = self.target.context
        longest = input_ids.shape[1] - min(pads)
        if room is not None and longest > room:
            raise UsageError(
                f"input_ids: the prompt has {longest} tokens, the model's context is {room}; shorten the prompt"
            )
        max_length = rules.max_length or input_ids.shape[1] + (room or 1 << 20)
        host = input_ids.cpu()
        rows = []
        for index, (ids, pad) in enumerate(zip(host, pads, strict=True)):
            # a row's seed comes from torch's global generator, so torch.manual_seed makes runs repeatable
            randomness = Randomness(int(torch.randint(1 << 62, ())), self.target.device)
            sampler = Sampler(_for_row(processors, index, len(host)), config.do_sample)
            rows.append(Row(index, ids, pad, max_length, randomness, sampler))
        as_dict = bool(config.return_dict_in_generate)
        return DecodeState(
            rows,
            self.target,
            self.drafter.budget,
            rules.eos,
            record_scores=as_dict and bool(config.output_scores),
            record_logits=as_dict and bool(config.output_logits),
        )

    def _import(self, past: Cache, state: DecodeState) -> None:
        """Take over the keys and values of an earlier call."""
        have = int(past.get_seq_length())  # a tensor for static caches
        shortest = min(len(row) for row in state.rows)
        if have >= shortest:
            raise UsageError(
                f"past_key_values holds {have} tokens and input_ids {shortest}: input_ids must be the whole text, "
                "with at least one token that is not cached yet"
            )
        self.target.adopt([(layer.keys, layer.values) for layer in past.layers], have, [r.pad for r in state.rows])

    def _sequences(self, state: DecodeState, input_ids: torch.Tensor, config: Any) -> torch.Tensor:
        """Rows side by side, finished ones filled with the pad token: int64 [B, prompt + new]."""
        longest = max(len(row) for row in state.rows)
        pad = config._pad_token_tensor
        sequences = input_ids.new_full((len(state.rows), longest), 0 if pad is None else int(pad))
        for sequence, row in zip(sequences, state.rows, strict=True):
            sequence[: len(row)] = row.ids
        return sequences


def _refuse(config: Any, processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> None:
    """One clear error for requests this loop cannot serve."""
    if config.num_beams > 1:
        raise UsageError(
            f"num_beams={config.num_beams}: beam search is not supported; use num_beams=1 or model.generate"
        )
    for name in ("penalty_alpha", "dola_layers", "force_words_ids", "constraints", "prompt_lookup_num_tokens"):
        if getattr(config, name, None) is not None:
            raise UsageError(f"{name} selects a decoding strategy of its own; use model.generate for it")
    if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
        raise UsageError(f"guidance_scale={config.guidance_scale} is not supported; use model.generate for it")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise UsageError(
            "output_attentions and output_hidden_states are not supported: drafted columns have no counterpart in "
            "plain decoding; run model(sequences, output_hidden_states=True) on the result"
        )
    unknown = {name for name, value in model_kwargs.items() if value is not None} - _KNOWN
    if unknown:
        raise UsageError(f"{', '.join(sorted(unknown))}: only text token ids can be decoded; leave these inputs out")


def _padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """Leading padding per row; anything but left padding is refused."""
    if attention_mask is None:
        return [0] * len(input_ids)
    mask = attention_mask[:, : input_ids.shape[1]].bool().cpu()
    pads = (~mask).sum(dim=1)
    expected = torch.arange(mask.shape[1]) >= pads[:, None]
    if not torch.equal(mask, expected) or bool((pads == mask.shape[1]).any()):
        raise UsageError("attention_mask must be left padding (zeros, then ones): set tokenizer.padding_side = 'left'")
    return pads.tolist()


def _for_row(processors: LogitsProcessorList, index: int, rows: int) -> LogitsProcessorList:
    """The processors of one row: a private copy when a batch would mix their states."""
    if rows == 1:
        return processors
    return LogitsProcessorList(_of_row(p, index, rows) for p in processors)


def _of_row(processor: Any, index: int, rows: int) -> Any:
    """One processor for one row of the batch; those that hold something per row get their row's part."""
    mine = copy.copy(processor)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        # it counts rows itself and would always see row 0 here
        mine._prefix_allowed_tokens_fn = lambda _, ids: processor._prefix_allowed_tokens_fn(index, ids)
    elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
        padding = getattr(processor, "prompt_ignore_length", None)
        if torch.is_tensor(padding):
            mine.prompt_ignore_length = _part(padding, index, rows)
    elif isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        mine.encoder_input_ids = _part(processor.encoder_input_ids, index, rows)
    elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        mine.generated_ngrams, mine.batch_size = _part(processor.generated_ngrams, index, rows), 1
    else:
        return copy.deepcopy(processor) if index else processor
    return mine


def _part(per_row: Any, index: int, rows: int) -> Any:
    """The entry of one row, where ``num_return_sequences`` may have repeated the rows since."""
    i = index * len(per_row) // rows
    return per_row[i : i + 1]


def _callers_streamer() -> Any:
    """The streamer given to ``model.generate(custom_generate=decoder, streamer=...)``.

    generate() puts the prompt into it but does not hand it to a callable (huggingface/transformers#40586), so a
    consumer would wait for ever. Its frame is the only place where it can be found.
    """
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_code.co_name != "generate":
        frame = frame.f_back
    return frame.f_locals.get("streamer") if frame is not None else None


def _stack(state: DecodeState, name: str) -> tuple[torch.Tensor, ...]:
    """Per new token the rows' [V] side by side: [B, V]; finished rows repeat zeros."""
    columns = [getattr(row, name)[: len(row) - row.prompt_length] for row in state.rows]
    longest = max(map(len, columns))
    blank = torch.zeros_like(columns[0][0])
    return tuple(torch.stack([c[i] if i < len(c) else blank for c in columns]).clone() for i in range(longest))
