"""Greedy text is ``generate()``'s, for every drafter, on every family of causal LMs that can be built here.

``docs/families.md`` is written by ``SPECDEC_WRITE_DOCS=1 pytest tests/test_families.py``; every test checks its line.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import OracleDrafter, left_padded, new_tokens
from families import DECODED, REFUSED, TRANSFORMERS, VOCABULARY, Family, build, noisy_copy, row, shows, table
from transformers import PreTrainedModel

from specdec import Decoder, Drafter, Target
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.hybrid import Hybrid
from specdec.drafters.token_recycling import TokenRecycling
from specdec.errors import CompatibilityError
from specdec.structure import NOTHING, Needs

NEW = 48
DOCS = Path(__file__).parents[1] / "docs" / "families.md"
WRITE = bool(os.environ.get("SPECDEC_WRITE_DOCS"))


@functools.cache
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (13, 6, 10)]


@functools.cache
def stranger() -> PreTrainedModel:
    """A draft model of another family and other weights, which agrees by chance only."""
    return build(next(family for family in DECODED if family.name == "llama"), seed=7)


def documented() -> list[str]:
    lines = DOCS.read_text().splitlines() if DOCS.exists() else []
    return [line for line in lines if line.startswith("| ")][1:]


def check_line(line: str) -> None:
    """The docs hold this line; the tiers of another release of transformers may differ."""
    if not WRITE and f"transformers {TRANSFORMERS}:" in DOCS.read_text():
        assert line in documented(), "docs/families.md is out of date: run SPECDEC_WRITE_DOCS=1 pytest " + __file__


def decoded_line(family: Family, model: PreTrainedModel, target: Target) -> str:
    masks = ", ".join(kind.removesuffix("_attention") for kind in target.layer_kinds)
    untapped = [] if tappable(target) else ["hidden states out of reach"]
    return row(family, *_tier(target), masks, target.attention, [*shows(model), *untapped])


def tappable(target: Target) -> bool:
    """Whether drafters can read the hidden state that the head reads (lookahead and trained heads must)."""
    try:
        target.bind(Needs(final_hidden=True))
    except CompatibilityError:
        return False
    target.bind(NOTHING)
    return True


def _tier(target: Target) -> tuple[str, str]:
    return target.capability.tier, target.capability.reason


def refused_line(family: Family) -> str:
    with pytest.raises(CompatibilityError) as error:
        Target(build(family))
    reason = str(error.value).partition("cannot be decoded by specdec: ")[2]
    return row(family, "none", reason, "", "", [])


def need(family: Family) -> None:
    if not family.installed:
        pytest.skip(f"transformers {TRANSFORMERS} has no {family.type}, or does not decode it")


def drafters(model: PreTrainedModel, target: Target) -> dict[str, Drafter | str]:
    """Every drafter of the library that needs no training, some in two shapes."""
    noisy = noisy_copy(model, 0.1)
    either: dict[str, Drafter | str] = {
        "none": "none",
        "token-recycling": TokenRecycling(size=24),
        "hybrid of all tables": Hybrid(["suffix", "aded", "prompt-lookup", "token-recycling"], size=24, min_prob=0.0),
        "draft-model, chain": DraftModel(noisy, length=4),
        "draft-model of another family, tree": DraftModel(stranger(), branching=(2, 2, 1)),
        "draft-model, itself": DraftModel(model, length=4),
    }
    if target.capability.tier == "chain":
        return either
    # a chain-tier model takes no probes, and cannot grow trees as a draft either
    probing: dict[str, Drafter | str] = {"lookahead": "lookahead"} if tappable(target) else {}
    return (
        either
        | probing
        | {
            "draft-model, tree": DraftModel(noisy, branching=(2, 2, 1)),
            "draft-model, itself as a tree": DraftModel(model, branching=(2, 2, 1)),
        }
    )


@pytest.mark.parametrize("family", DECODED, ids=lambda family: family.name)
def test_greedy_text_is_generates_own_for_every_drafter(family: Family):
    need(family)
    model = build(family)
    recorded = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    plain = [model.generate(prompt[None], **recorded) for prompt in prompts()]
    alone = [out.sequences[0, -NEW:].tolist() for out in plain]
    one, three = {"input_ids": prompts()[0][None]}, left_padded(prompts())
    assert (new_tokens(model, three, max_new_tokens=NEW) == alone) is family.padded
    target = Target(model)
    tier = target.capability.tier

    for name, drafter in drafters(model, target).items():
        decoder = Decoder(model, drafter)
        for inputs in (one, three):
            got = new_tokens(decoder, inputs, max_new_tokens=NEW)
            assert got == alone[: len(got)], f"{name}, {len(got)} rows"
        assert decoder.stats is not None
        mat = decoder.stats.mat
        if "itself" in name:  # draft and target agree, so every draft is accepted and the text is left in full strides
            depth = decoder.drafter.topology.max_depth
            assert mat == NEW / math.ceil(NEW / (depth + 1)), f"{name}: drafts of the same model are rejected"
        elif name in ("draft-model, chain", "draft-model, tree"):
            assert 1 < mat < 4, f"{name}: some drafts should be accepted and some rejected"

    # true paths between decoys, and mistakes: rows accept different counts, kept columns are scattered over the step
    decoder = Decoder(model, OracleDrafter(alone, wrong=0.2, decoys=2 if tier == "tree" else 0))
    for inputs in (one, three):
        out = decoder.generate(**inputs, **recorded)
        assert out.sequences[:, -NEW:].tolist() == alone[: len(out.sequences)]
        for i, logits in enumerate(out.logits):
            want = torch.cat([p.logits[i] for p in plain[: len(logits)]])
            torch.testing.assert_close(logits, want, atol=1e-3, rtol=1e-3)
    assert decoder.stats is not None
    assert 2 < decoder.stats.mat < 5
    assert any(len(set(step.accepted)) > 1 for step in decoder.stats.steps)
    check_line(decoded_line(family, model, target))


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: f"{family.name}-{family.auto.__name__[13:]}")
def test_a_family_that_cannot_be_decoded_is_refused_with_the_reason(family: Family):
    need(family)
    with pytest.raises(
        CompatibilityError, match=rf"^{type(build(family)).__name__} cannot be decoded.*{family.refused}"
    ):
        Decoder(build(family), "prompt-lookup")
    check_line(refused_line(family))


def test_a_recurrent_draft_model_is_refused_too():
    mamba = next(family for family in REFUSED if family.name == "mamba")
    with pytest.raises(CompatibilityError, match="rolled back"):
        Decoder(stranger(), DraftModel(build(mamba)))


def test_a_chain_tier_draft_model_cannot_branch():
    bloom = build(next(family for family in DECODED if family.name == "bloom"))
    with pytest.raises(CompatibilityError, match=r"branching=\(2, 1\).*tree-capable"):
        Decoder(stranger(), DraftModel(bloom, branching=(2, 1)))
    decoder = Decoder(stranger(), DraftModel(bloom, length=3))
    want = new_tokens(stranger(), left_padded(prompts()), max_new_tokens=NEW)
    assert new_tokens(decoder, left_padded(prompts()), max_new_tokens=NEW) == want


def test_the_page_of_families_is_complete():
    """Each line is checked by its family's test; here: that no family is missing, and that enough kinds are there."""
    if WRITE:
        lines = []
        for family in DECODED:
            model = build(family)
            lines.append(decoded_line(family, model, Target(model)))
        lines += [refused_line(family) for family in REFUSED]
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(table(lines))
    lines = documented()
    assert DOCS.read_text() == table(lines).replace(f"transformers {TRANSFORMERS}:", _documented_release())
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert names == [family.name for family in (*DECODED, *REFUSED)]
    tiers = {name: line.split(" | ")[1] for name, line in zip(names[: len(DECODED)], lines, strict=False)}
    assert len(tiers) == len(DECODED) >= 40
    for name in ("bloom", "mpt", "falcon-alibi", "gpt_neo"):
        assert tiers.pop(name) == "chain"
    assert list(tiers.values()).count("tree") >= 40
    shown = {word for line in lines for word in line.split(" | ")[4].split(", ")}
    assert shown >= {"window", "chunks", "dict mask", "grouped heads", "latent heads", "shared KV layers"}
    assert shown >= {"learned positions", "ALiBi", "local window", "experts", "softcap", "sinks"}


def _documented_release() -> str:
    page = DOCS.read_text()
    start = page.index("transformers ")
    return page[start : page.index(":", start) + 1]
