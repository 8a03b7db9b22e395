"""Is the text really the target's own? Measured on this model, this drafter and this machine, with what was found.

What each section asks stands in ``MEANINGS``. No limit is set by hand: each is a multiple of what the same model
differs from itself when its forward has another shape (token by token against the whole text), which is what drafting
changes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation import EosTokenCriteria

from specdec.bench.enumeration import NotEnumerable, Scripted, law, total_variation
from specdec.bench.harness import Group, end_tokens, generated
from specdec.bench.report import replace_text
from specdec.decoder import Decoder
from specdec.errors import UsageError
from specdec.sampling import Sampler
from specdec.state import DecodeState, Row
from specdec.stopping import StopRules

Progress = Callable[[int, int, str], None]  # done, in all, the section's name
Text = tuple[int, ...]

_BATCH = 8  # most prompts of the padded batch
_AUDITED = 4  # texts that noise and caches are measured on
_SLACK = 3  # limits over the largest noise seen, which is that of a sample
_TEMPERATURE, _WIDE, _OUTCOMES = 1.5, 3, 250  # the reduced law: flat enough that drafts are rejected; most outcomes
_SAMPLES, _ROWS, _LEAST_P = 500, 25, 1e-4  # of the chi-square test; so few rows at a time that large models fit


MEANINGS = {
    "greedy": "in float32 the ids are those of the model's own generate(), for every prompt alone and in a left-padded "
    "batch. A text may part only between two tokens that the model's own noise does not tell apart.",
    "near ties": "greedy texts in the dtype asked for are read back through the plain model, and in float32: where a "
    "token is not the argmax, how far below it is. Kernels of other shapes round otherwise, so near ties may fall "
    "either way; a bug emits tokens far below.",
    "law": f"sampling at temperature {_TEMPERATURE} from the {_WIDE} likeliest tokens, in float32: every random "
    "outcome of the whole loop with its probability, summed up, against the law that plain forwards give; and a "
    f"chi-square test of {_SAMPLES} sampled texts of two tokens a prompt.",
    "cache": "keys and values that a request leaves behind against a fresh forward of its text, alone and left-padded.",
    "allowed": f"{_SLACK} times what the same model differs from itself between forwards of one token, of the whole "
    "text and of two rows, which is what drafting changes; for the law at least 1e-6.",
}


@dataclass
class Section:
    """One question and its answer.

    Attributes:
        name: greedy, near ties, law or cache.
        status: skipped sections say why in ``finding``.
        finding: one or two sentences.
        figures: what it rests on.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    finding: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Noise:
    """How far the model differs from itself between forwards of other shapes; at least a rounding step of its dtype.

    Attributes:
        logits: largest difference of a token's distance to the best one, over the 16 best tokens of a position.
        cache: largest difference of a column of keys or values, relative to the column's norm.
        positions: measured.
    """

    logits: float
    cache: float
    positions: int

    @property
    def gap(self) -> float:
        """The largest gap between two logits that it explains."""
        return _SLACK * self.logits


def certify(
    decoder: Decoder, exact: Decoder | str, ids: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress
) -> list[Section]:
    """All sections.

    Args:
        decoder: in the dtype asked for.
        exact: the same in float32 (the same object if that was asked for), or why there is none.
        ids: token ids of the prompts.
        max_new_tokens: per prompt.
        progress: called with what is done and what there is in all, per section.

    Raises:
        UsageError: drafter or verifier is lossy.
    """
    refuse_lossy(decoder)
    precise = exact if isinstance(exact, Decoder) else None
    missing = f"it needs float32, and {exact}"
    with _plain_settings(decoder.model), _plain_settings((precise or decoder).model):
        noise = measure_noise(decoder, ids, max_new_tokens, progress)
        if precise is None:
            greedy_section, law_section = (Section(name, "skipped", missing) for name in ("greedy", "law"))
            cache_section = caches(decoder, ids, max_new_tokens, noise, progress)
        else:
            its = noise if precise is decoder else measure_noise(precise, ids, max_new_tokens, progress)
            greedy_section = greedy(precise, ids, max_new_tokens, its, progress)
            law_section = sampling_law(precise, ids, progress)
            cache_section = caches(precise, ids, max_new_tokens, its, progress)
        ties_section = near_ties(decoder, precise, ids, max_new_tokens, noise, progress)
    return [greedy_section, ties_section, law_section, cache_section]


def refuse_lossy(decoder: Decoder) -> None:
    """Raise UsageError naming each part that may change the text."""
    lossy = [f"{part.name}" for part in (decoder.drafter, decoder.verifier) if not part.lossless]
    if lossy:
        raise UsageError(
            f"{' and '.join(lossy)}: not lossless by definition, so there is nothing to certify; `specdec pareto` "
            "measures what it changes"
        )


# ---- what the model differs from itself -----------------------------------------------------------------------------


@torch.no_grad()
def measure_noise(decoder: Decoder, ids: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress) -> Noise:
    """Compare generate()'s own one-token forwards with forwards of the whole text, alone and as two rows."""
    model = decoder.model
    step = float(torch.finfo(model.dtype).eps)
    logits, cache, positions = 0.0, step, 0
    for done, prompt in enumerate(ids[:_AUDITED]):
        progress(done, len(ids[:_AUDITED]), "the model's own noise")
        out = _generate(model, [prompt], max_new_tokens, output_logits=True)
        text = out.sequences[:, :-1]
        steps = torch.cat(out.logits).float()  # [n, V]
        whole, two = (_last_logits(model, text.repeat(rows, 1), len(steps)) for rows in (1, 2))
        logits = max(logits, step * float(whole.abs().max()), *(_distance(a, whole) for a in (steps, two)))
        error = _cache_error(out.past_key_values, _prefill(model, text, torch.ones_like(text)), [0])
        assert error is not None, "generate() caches all but the last token"
        cache = max(cache, error)
        positions += len(steps)
    return Noise(logits, cache, positions)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in how far below the best token of ``b`` the 16 best stand; both [n, V]."""
    top = b.topk(min(16, b.shape[-1]), dim=-1).indices
    a, b = a.gather(1, top), b.gather(1, top)
    return float(((a - a[:, :1]) - (b - b[:, :1])).abs().max())


# ---- greedy -----------------------------------------------------------------------------------------------------


def greedy(
    decoder: Decoder, ids: Sequence[Sequence[int]], max_new_tokens: int, noise: Noise, progress: Progress
) -> Section:
    """Token ids against generate()'s, every prompt alone and then a left-padded batch.

    A text may part from generate()'s where the two tokens are nearer than the noise allows to tell; it is counted.
    """
    model, limit = decoder.model, noise.gap
    batch = list(ids[:_BATCH])
    groups = [*([p] for p in ids), batch]
    want: list[list[int]] = []
    mine: list[list[int]] = []
    accepted = forwards = 0
    for done, group in enumerate(groups):
        progress(done, len(groups), "greedy texts")
        if group is batch and decoder.target.capability.tier != "tree":
            want += want[: len(batch)]  # such a model's own generate() gives padded rows another text
        else:
            want += _texts(model, group, max_new_tokens)
        mine += _texts(decoder, group, max_new_tokens)
        assert decoder.stats is not None
        accepted += sum(sum(step.accepted) for step in decoder.stats.steps)
        forwards += decoder.stats.row_forwards
    where = [*(f"prompt {i}" for i in range(len(ids))), *(f"prompt {i} in the batch" for i in range(len(batch)))]
    differences: list[tuple[str, int, float | None]] = []  # where, number of the token, gap
    for place, prompt, plain, got in zip(where, [*ids, *batch], want, mine, strict=True):
        if plain != got:
            at = next(i for i, (a, b) in enumerate(zip_longest(plain, got)) if a != b)
            gap: float | None = None  # one of them ends there
            if at < min(len(plain), len(got)):
                logits = continuation_logits(model, prompt, plain[: at + 1])[-1]
                gap = float((logits[plain[at]] - logits[got[at]]).abs())
            differences.append((place, at, gap))
    bad = [d for d in differences if d[2] is None or d[2] > limit]
    tokens = sum(map(len, mine))
    finding = f"{len(mine) - len(differences)} of {len(mine)} texts ({len(batch)} in a batch) are generate()'s own"
    finding += f", {tokens} tokens, {accepted} of them drafted"
    if differences:
        place, at, gap = (bad or differences)[0]
        near = "one of them ends" if gap is None else f"gap {gap:.1e}"
        finding += f"; {place} parts at token {at} ({near}, noise allows {limit:.1e})"
    listed = [dict(zip(("where", "token", "gap"), d, strict=True)) for d in differences]
    figures = {"texts": len(mine), "tokens": tokens, "drafted": accepted, "mat": tokens / max(forwards, 1)}
    return Section("greedy", _status(not bad), finding, {**figures, "limit": limit, "differences": listed})


# ---- near ties ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def near_ties(
    decoder: Decoder,
    exact: Decoder | None,
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    noise: Noise,
    progress: Progress,
) -> Section:
    """Read every text back through the plain model: how far below its argmax is what was emitted?

    Args:
        decoder: in the dtype asked for.
        exact: in float32, for the gaps there; or None.
        ids, max_new_tokens: prompts.
        noise: of ``decoder``'s model.
    """
    model = decoder.model
    limit = noise.gap
    gaps: list[float] = []
    exact_gaps: list[float] = []
    tokens, own, spread = 0, 0, 0.0
    for done, prompt in enumerate(ids):
        progress(done, len(ids), "near ties")
        (text,) = _texts(decoder, [prompt], max_new_tokens)
        logits = continuation_logits(model, prompt, text)
        tokens += len(text)
        gaps += (mine := _gaps(logits, text))[mine > 0].tolist()
        (plain,) = _texts(model, [prompt], max_new_tokens)
        own += int((_gaps(continuation_logits(model, prompt, plain), plain) > 0).sum())
        if exact is not None and exact is not decoder:
            precise = continuation_logits(exact.model, prompt, text)
            exact_gaps += (mine := _gaps(precise, text))[mine > 0].tolist()
            spread = max(spread, _distance(logits, precise))
    kind = str(model.dtype).removeprefix("torch.")
    finding = (
        f"in {kind} {len(gaps)} of {tokens} tokens are not the plain model's argmax ({own} of generate()'s own are "
        f"not either), the worst {max(gaps, default=0):.2g} below it; noise allows {limit:.2g}"
    )
    figures: dict[str, Any] = {"dtype": kind, "tokens": tokens, "flips": len(gaps), "flips_of_generate": own}
    figures |= {"largest_gap": max(gaps, default=0.0), "limit": limit, "noise": asdict(noise)}
    passed = max(gaps, default=0.0) <= limit
    if spread:
        exact_limit = _SLACK * spread
        figures["float32"] = {
            "flips": len(exact_gaps),
            "largest_gap": max(exact_gaps, default=0.0),
            "limit": exact_limit,
        }
        finding += (
            f". In float32 {len(exact_gaps)} are not the argmax, the worst {max(exact_gaps, default=0):.2g} below it; "
            f"{kind} allows {exact_limit:.2g}"
        )
        passed &= max(exact_gaps, default=0.0) <= exact_limit
    return Section("near ties", _status(passed), finding, figures)


def continuation_logits(model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int]) -> torch.Tensor:
    """float32 [n, V]: what the plain model says before each token of ``text``."""
    ids = torch.tensor([[*prompt, *text[:-1]]], device=model.get_input_embeddings().weight.device)
    return _last_logits(model, ids, len(text))


def _gaps(logits: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
    """How far below the best logit each token is: float32 [n]."""
    emitted = torch.tensor(text, device=logits.device)[:, None]
    return logits.max(dim=-1).values - logits.gather(1, emitted)[:, 0]


# ---- law ------------------------------------------------------------------------------------------------------------


def sampling_law(decoder: Decoder, ids: Sequence[Sequence[int]], progress: Progress) -> Section:
    """The loop's law of the first tokens against the model's own, enumerated and sampled.

    The request samples at temperature 1.5 from the 3 likeliest tokens, so that there are few outcomes, each likely. Two
    tokens are enumerated on three prompts and three tokens on the first, where these are not too many.
    """
    runs: list[dict[str, Any]] = []
    skipped: list[str] = []
    prompts = [_to_draft_from(decoder.model, prompt) for prompt in ids[:3]]
    asked = [*((i, 2) for i in range(len(prompts))), (0, 3)]
    for done, (number, tokens) in enumerate(asked):
        progress(done, len(asked) + 1, "law of sampled tokens")
        try:
            if tokens == 3 and runs[0]["outcomes"] ** 2 > _OUTCOMES:
                raise NotEnumerable(f"more than {_OUTCOMES} outcomes to be expected")
            runs.append({"prompt": number, "tokens": tokens, **_enumerate(decoder, prompts[number], tokens)})
        except NotEnumerable as error:
            skipped.append(f"{tokens} tokens of prompt {number}: {error}")
            if tokens == 2:
                break  # so it will be with the others
    progress(len(asked), len(asked) + 1, "law of sampled tokens")
    p_values = [_sample(decoder, prompt) for prompt in prompts]
    passed = all(r["total_variation"] < r["limit"] for r in runs) and all(p > _LEAST_P for p in p_values)
    if runs:
        worst = max(runs, key=lambda r: r["total_variation"] / r["limit"])
        outcomes, drafted = (sum(r[key] for r in runs) for key in ("outcomes", "drafted"))
        finding = (
            f"{outcomes} random outcomes enumerated, {drafted} accept drafted tokens: total variation from the model's "
            f"own law at most {worst['total_variation']:.1e} (allowed {worst['limit']:.1e})"
        )
    else:
        finding = f"not enumerated ({skipped[0]})"
    finding += f"; chi-square over {_SAMPLES} samples a prompt: p = {', '.join(f'{p:.2g}' for p in p_values)}"
    figures = {"enumerated": runs, "not_enumerated": skipped, "p_values": p_values, "samples": _SAMPLES}
    return Section("law", _status(passed), finding, {**figures, "temperature": _TEMPERATURE, "top_k": _WIDE})


def _to_draft_from(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """A short text with a repetition, so that drafters that copy have something to copy."""
    start = list(prompt[-8:])
    return [*start, *_texts(model, [start], 8)[0], *start]


def _processors() -> LogitsProcessorList:
    return LogitsProcessorList([TemperatureLogitsWarper(_TEMPERATURE), TopKLogitsWarper(_WIDE)])


def _enumerate(decoder: Decoder, ids: list[int], tokens: int) -> dict[str, Any]:
    """Total variation of the enumerated law from the model's own, and what it rests on."""
    ends = end_tokens(decoder.model)
    drafted = outcomes = 0

    def run(randomness: Scripted) -> Text:
        nonlocal drafted, outcomes
        if decoder.drafter.warm is not None:
            decoder.drafter.reset()  # the same drafts whatever was drawn before
        row = _emit(decoder, ids, tokens, ends, randomness)
        assert decoder.stats is not None
        outcomes += 1
        drafted += any(any(step.accepted) for step in decoder.stats.steps)
        return tuple(row.new_tokens.tolist())

    mine = law(run, _OUTCOMES)
    whole, stepped = (_own_law(decoder.model, ids, tokens, ends, cached) for cached in (False, True))
    noise = total_variation(whole, stepped)
    return {
        "outcomes": outcomes,
        "drafted": drafted,
        "texts": len(whole),
        "total_variation": total_variation(mine, whole),
        "limit": max(1e-6, _SLACK * noise),
        "noise": noise,
    }


def _emit(decoder: Decoder, ids: list[int], tokens: int, ends: frozenset[int], randomness: Any) -> Row:
    """One request through the loop itself, with the given randomness."""
    target = decoder.target
    sampler = Sampler(_processors(), do_sample=True)
    row = Row(0, torch.tensor(ids), 0, len(ids) + tokens, randomness, sampler)
    state = DecodeState([row], target, decoder.drafter.budget, ends)
    rules = StopRules([EosTokenCriteria(sorted(ends))] if ends else [])
    with target.session():
        target.open([0], row.max_length + state.budget)
        decoder.run(state, rules, lambda row, tokens, drafted: None)
    return row


@torch.no_grad()
def _own_law(
    model: PreTrainedModel, ids: list[int], tokens: int, ends: frozenset[int], cached: bool
) -> dict[Text, float]:
    """Law of the first ``tokens`` tokens by plain forwards: of the whole text, or of its last token after the rest."""
    device = model.get_input_embeddings().weight.device
    texts: dict[Text, float] = {(): 1.0}
    for _ in range(tokens):
        longer: dict[Text, float] = {}
        for text, weight in texts.items():
            if text and text[-1] in ends:
                longer[text] = weight
                continue
            prefix = torch.tensor([[*ids, *text]], device=device)
            past = model(prefix[:, :-1], use_cache=True).past_key_values if cached else None
            logits = model(prefix[:, -1:] if cached else prefix, past_key_values=past, use_cache=cached).logits[:, -1]
            p = torch.softmax(_processors()(prefix, logits.float()).double(), dim=-1)[0]
            for token in p.nonzero().flatten().tolist():
                longer[(*text, token)] = weight * float(p[token])
        texts = longer
    return texts


def _sample(decoder: Decoder, ids: list[int]) -> float:
    """p-value of sampled pairs under the model's own law; 0 for a text that it cannot say."""
    ends = end_tokens(decoder.model)
    expected = _own_law(decoder.model, ids, 2, ends, cached=False)
    prompt = torch.tensor([ids], device=decoder.target.device)
    counts = dict.fromkeys(expected, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in range(0, _SAMPLES, _ROWS):
            output = decoder.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=_TEMPERATURE,
                top_k=_WIDE,
                max_new_tokens=2,
                num_return_sequences=min(_ROWS, _SAMPLES - start),
            )
            assert isinstance(output, torch.Tensor)
            for text in map(tuple, generated(output, len(ids), ends)):
                if text not in counts:
                    return 0.0
                counts[text] += 1
    common = [text for text, p in expected.items() if p * _SAMPLES >= 5]
    observed = [counts[t] for t in common]
    wanted = [expected[t] * _SAMPLES for t in common]
    if sum(wanted) < _SAMPLES * (1 - 1e-9):  # rare ones together
        observed.append(_SAMPLES - sum(observed))
        wanted.append(_SAMPLES - sum(wanted))
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [w * scale for w in wanted]).pvalue) if len(observed) > 1 else 1.0


# ---- cache ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def caches(
    decoder: Decoder, ids: Sequence[Sequence[int]], max_new_tokens: int, noise: Noise, progress: Progress
) -> Section:
    """What the loop leaves in the cache against a fresh forward of the same tokens, alone and left-padded."""
    model = decoder.model
    limit = _SLACK * noise.cache
    groups = [[p] for p in ids[:_AUDITED]]
    if decoder.target.capability.tier == "tree" and len(groups) > 1:  # else generate()'s own padded rows differ
        groups.append(list(ids[:_AUDITED]))
    errors: list[float | None] = []
    for done, group in enumerate(groups):
        progress(done, len(groups), "caches")
        out = _generate(decoder, group, max_new_tokens)
        cached = out.sequences[:, :-1]
        pads = [max(map(len, group)) - len(p) for p in group]
        mask = torch.ones_like(cached)
        for row, pad in zip(mask, pads, strict=True):
            row[:pad] = 0
        fresh = _prefill(model, cached, mask)
        errors.append(_cache_error(out.past_key_values, fresh, pads))
    known = [e for e in errors if e is not None]
    if len(known) < len(errors):
        finding = f"after request {errors.index(None)} the cache has another number of columns than its text"
    else:
        finding = (
            f"columns of keys and values after {len(groups)} requests differ from a fresh forward by at most "
            f"{max(known):.1e} of their norm (allowed {limit:.1e})"
        )
    passed = len(known) == len(errors) and max(known) <= limit
    return Section("cache", _status(passed), finding, {"errors": errors, "limit": limit})


def _prefill(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, use_cache=True, **more).past_key_values


def _cache_error(mine: Any, fresh: Any, pads: Sequence[int]) -> float | None:
    """Largest |mine - fresh| / |fresh| of a column, over layers and rows; None for another number of columns."""
    worst = 0.0
    if mine.get_seq_length() != fresh.get_seq_length():
        return None
    for a, b in zip(mine.layers, fresh.layers, strict=True):
        if b.keys is None:
            continue
        for x, y in ((a.keys, b.keys), (a.values, b.values)):  # [B, H, T, D]
            columns = min(x.shape[2], y.shape[2])  # layers with windows may keep different numbers of old ones
            x, y = (t[:, :, -columns:].transpose(1, 2).flatten(2).float() for t in (x, y))  # [B, T, H * D]
            error = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-9)
            first = fresh.get_seq_length() - columns
            for row, pad in zip(error, pads, strict=True):
                worst = max(worst, float(row[max(pad - first, 0) :].max()))
    return worst


# ---- shared -----------------------------------------------------------------------------------------------------


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Without the penalties and filters that a checkpoint may bring: the audit reads raw logits."""
    before = model.generation_config
    pad = before.pad_token_id if before.pad_token_id is not None else 0
    model.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id, eos_token_id=before.eos_token_id, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = before


def _generate(
    who: PreTrainedModel | Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, **more: Any
) -> Any:
    """Greedy, with the cache: ``GenerateDecoderOnlyOutput``."""
    ids, mask = Group((), tuple(map(tuple, prompts))).tensors(_device(who))
    more |= {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    return who.generate(ids, attention_mask=mask, **more)


def _texts(who: PreTrainedModel | Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy new ids per prompt, decoded together, each up to and including its end token."""
    model = who.model if isinstance(who, Decoder) else who
    ids, mask = Group((), tuple(map(tuple, prompts))).tensors(_device(who))
    output = who.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    assert isinstance(output, torch.Tensor)
    return generated(output, ids.shape[1], end_tokens(model))


def _device(who: PreTrainedModel | Decoder) -> torch.device:
    model = who.model if isinstance(who, Decoder) else who
    return model.get_input_embeddings().weight.device


@torch.no_grad()
def _last_logits(model: PreTrainedModel, ids: torch.Tensor, n: int) -> torch.Tensor:
    """float32 [n, V] of the last n positions of the first row of ``ids`` [B, S]."""
    few = {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(ids, **few).logits[0, -n:].float()


def _status(passed: bool) -> Literal["passed", "failed"]:
    return "passed" if passed else "failed"


def weights_hash(model: PreTrainedModel) -> dict[str, str]:
    """sha256 of the checkpoint's safetensors files, by name; of the weights in memory where there are none."""
    folder = Path(model.config._name_or_path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if files:
        return {file.name: _sha256(file) for file in files}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {"state_dict": digest.hexdigest()}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- the certificate ------------------------------------------------------------------------------------------------


@dataclass
class Certificate:
    """Sections and where they come from.

    Attributes:
        title: model, drafter, verifier.
        sections: from ``certify``.
        provenance: versions, commit, machine, command, date, hashes, options.
    """

    title: str
    sections: list[Section]
    provenance: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """Sections that failed, by name."""
        return [s.name for s in self.sections if s.status == "failed"]

    @property
    def verdict(self) -> str:
        """PASSED or FAILED, and what that leaves out."""
        skipped = [s.name for s in self.sections if s.status == "skipped"]
        if self.failed:
            return f"FAILED: {', '.join(self.failed)}"
        return f"PASSED, without {', '.join(skipped)} (skipped)" if skipped else "PASSED"

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "passed": not self.failed,
            "verdict": self.verdict,
            "sections": [asdict(s) for s in self.sections],
            "provenance": self.provenance,
        }

    def markdown(self) -> str:
        """One page."""
        lines = [f"# Is it the same text? {self.title}", "", f"**{self.verdict}**", "", "| section | | found |"]
        lines += ["| --- | --- | --- |", *(f"| {s.name} | {s.status} | {s.finding} |" for s in self.sections), ""]
        lines += [f"- {name}: {meaning}" for name, meaning in MEANINGS.items()]
        lines += ["", "| provenance | |", "| --- | --- |"]
        return "\n".join([*lines, *(f"| {key} | {_cell(value)} |" for key, value in self.provenance.items())]) + "\n"

    def write(self, out: Path) -> list[Path]:
        """Write JSON and Markdown, each whole or not at all; ``out`` is from ``files``."""
        json_file, page = files(out)
        replace_text(json_file, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        replace_text(page, self.markdown())
        return [json_file, page]


def files(out: Path) -> tuple[Path, Path]:
    """Where JSON and page go: beside each other, for FILE.json, or in a folder."""
    file = out if out.suffix == ".json" else out / "certificate.json"
    return file, file.with_suffix(".md")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items() if v is not None)
    return "-" if value is None else str(value)
